"""Commands about single features: gathered, shown, explained."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from endwise.cli.adopted import taking_saes
from endwise.cli.app import (
    OR_FOLDERS,
    Again,
    Json,
    Measured,
    Quiet,
    Runs,
    Tokens,
    command,
    echo,
    present,
    print_json,
    report,
    results_beside,
    results_folder,
    run_argument,
    saying,
    status,
)
from endwise.cli.overriding import on_device

if TYPE_CHECKING:
    from endwise.explaining.endpoint import Endpoint
    from endwise.explaining.settings import Settings
    from endwise.features.harvest.results import Harvest


@command
@taking_saes
@on_device
def harvest(
    runs: Runs,
    tokens: Annotated[
        int | None, Option(min=1, help="Tokens to read; unset: the recipe's evaluation.tokens, or all of --corpus.")
    ] = None,
    train: Annotated[bool, Option("--train", help="Read the recipe's training text instead.")] = False,
    corpus: Annotated[
        Path | None, Option(metavar="SOURCE", help="Read this text instead: a file or folder, as data.source.")
    ] = None,
    top: Annotated[int, Option(min=0, help="Contexts of each feature's greatest activations.")] = 24,
    quantiles: Annotated[int, Option(min=0, help="Groups of contexts from low activations to high.")] = 5,
    per_quantile: Annotated[int, Option(min=0, help="Contexts from each of these.")] = 8,
    no_importance: Annotated[
        bool, Option("--no-importance", help="Do not attribute the CE where importance was not measured.")
    ] = False,
    shards: Annotated[int, Option(min=1, help="Parts of the text, each read by a process of its own.")] = 1,
    shard: Annotated[int, Option(min=0, help="Which of them this process reads, from 0.")] = 0,
    again: Again = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Collect every feature's contexts, logit effects, co-firing and importance, in one pass, into RUN/harvest."""
    from endwise.common.errors import ConfigError
    from endwise.common.processes import is_first_process
    from endwise.features.harvest.gathering import Kept
    from endwise.features.harvest.run import harvest as gather

    if train and corpus is not None:
        raise ConfigError("Give either --train or --corpus SOURCE, not both: one text is read.")
    found = gather(
        runs,
        tokens=tokens,
        text=corpus or ("train" if train else "heldout"),
        kept=Kept(top=top, groups=quantiles, per_group=per_quantile),
        importance=not no_importance,
        shards=shards,
        shard=shard,
        again=again,
        display=not quiet,
    )
    if not is_first_process():
        return
    if json:
        print_json([_gathered(path, each) for path, each in found.items()])
        return
    for path, each in found.items():
        if each is None:
            echo(f"{path}: this shard is done; the last process to finish joins all {shards}.")
            continue
        alive = int((each.firings > 0).sum())
        echo(f"{each.folder}: {alive:,} of {each.d_sae:,} features fired on {each.about['tokens']:,} tokens.")


def _gathered(path: Path, found: "Harvest | None") -> dict[str, object]:
    if found is None:
        return {"run": path, "joined": False}
    fired = int((found.firings > 0).sum())
    shared = {"folder": found.folder, "fired": fired, "d_sae": found.d_sae, "tokens": found.about["tokens"]}
    return {"run": path, "joined": True, **shared}


@command
def export_neuronpedia(
    runs: Annotated[list[Path], run_argument(f"Harvested run folders, {OR_FOLDERS}")],
    out: Annotated[Path, Option(help="Folder for the export.")] = Path("neuronpedia"),
    model_id: Annotated[
        str | None, Option(help="Neuronpedia's id of the model; unset: made from the model's name.")
    ] = None,
    source_set: Annotated[
        str | None, Option("--set", help="Name of the source set; unset: made from site, kind and size.")
    ] = None,
    release: Annotated[str, Option(help="Name of the release.")] = "endwise",
    creator: Annotated[str, Option(help="Who made the SAE.")] = "endwise",
    creator_id: Annotated[
        str | None, Option(help="The importing server's user; unset: $DEFAULT_CREATOR_ID, or Neuronpedia's own.")
    ] = None,
    json: Json = False,
) -> None:
    """Write runs' harvests as Neuronpedia imports them: OUT/MODEL/SOURCE with features and activations."""
    from endwise.features.harvest.neuronpedia import export

    written = export(
        runs, out, model_id=model_id, source_set=source_set, release=release, creator=creator, creator_id=creator_id
    )
    lines = [f"{each.features:,} features with {each.activations:,} activations: {each.folder}" for each in written]
    report(json, list(map(vars, written)), *lines)


@command
@taking_saes
def dashboard(
    runs: Annotated[list[Path], run_argument(f"Harvested run folders, {OR_FOLDERS} Shown side by side.")],
    memory: Annotated[
        str, Option(metavar="SIZE", help="Memory of the search for the nearest features, beside the SAEs.")
    ] = "512MiB",
    out: Annotated[
        Path | None, Option(help="Folder for the site; unset: dashboard/ in the run, or beside the first of several.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write a site that shows every feature: where it fires, what it does, its neighbours. It opens from the disk."""
    from endwise.common.machine import parse_size
    from endwise.dashboard import write_dashboard

    page = write_dashboard(runs, out, memory=parse_size(memory), say=None if quiet else status)
    report(json, {"page": page}, f"Open it: {page}")


@command
@taking_saes
@on_device
def serve(
    runs: Annotated[list[Path], run_argument("Harvested run folders, as for endwise dashboard.")],
    port: Annotated[int, Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 8008,
    again: Again = False,
    quiet: Quiet = False,
) -> None:
    """Serve the dashboard to this machine, with the model behind it: see which features fire on a text that you type,
    and steer it with one.
    """
    from endwise.dashboard.server import dashboard_server

    with dashboard_server(runs, port=port, again=again, say=None if quiet else status) as server:
        echo(f"{server.url} (Ctrl+C to stop)")
        server.serve_forever()


@command
def explain(
    runs: Annotated[list[Path], run_argument(f"Harvested run folders, {OR_FOLDERS}")],
    endpoint: Annotated[
        str, Option(metavar="URL", help="Base of an OpenAI-compatible API, e.g. http://127.0.0.1:8080/v1")
    ],
    model: Annotated[str, Option(metavar="NAME", help="The model that explains, as the endpoint calls it.")],
    scorer_model: Annotated[
        str | None, Option(metavar="NAME", help="The model that is asked with explanations; unset: the same.")
    ] = None,
    features: Annotated[str, Option(help="all, random:N, top:N (by importance), or 1,5,10-20")] = "random:200",
    seed: Annotated[int, Option(min=0, help="Seed of the choice of features and texts.")] = 0,
    key_variable: Annotated[str | None, Option(metavar="NAME", help="Environment variable with the key.")] = None,
    scorers: Annotated[str, Option(help="Any of detection,fuzzing.")] = "detection,fuzzing",
    shown: Annotated[int, Option(help="Texts from which an explanation is made, at most.")] = 20,
    scored: Annotated[int, Option(help="Items of each scorer, half true and half false.")] = 20,
    per_call: Annotated[int, Option(help="Items per call.")] = 5,
    shuffled: Annotated[bool, Option(help="Control: also score another feature's explanation.")] = True,
    random: Annotated[int, Option(help="Control: random texts in place of this many features.")] = 50,
    prompts: Annotated[Path | None, Option(help="Folder with prompts in place of those that ship.")] = None,
    temperature: Annotated[float, Option(help="Temperature of the model's answers.")] = 0.0,
    max_tokens: Annotated[int, Option(help="Tokens per answer; models that think first need more.")] = 500,
    extra: Annotated[str, Option(metavar="JSON", help="Further fields of a request; null: leave one out.")] = "{}",
    timeout: Annotated[float, Option(help="Seconds for one attempt.")] = 120.0,
    attempts: Annotated[int, Option(help="Attempts per call, before it counts as failed.")] = 8,
    concurrency: Annotated[int, Option(help="Concurrent calls.")] = 4,
    per_minute: Annotated[float | None, Option(help="Calls per minute, at most; unset: no limit.")] = None,
    price_in: Annotated[float | None, Option(min=0, help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, Option(min=0, help="Price of a million tokens written.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Estimate calls and cost; make no call.")] = False,
    yes: Annotated[bool, Option("--yes", help="Start without asking.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Explain features by a language model, and score how well the explanations predict them.

    Answers are kept and never requested again, so an interrupted call resumes where it was.

    Exit code: 0 if all calls were answered, 9 if some failed.
    """
    from endwise.explaining.endpoint import find_endpoint
    from endwise.explaining.settings import RetryPolicy, Settings, parse_extra

    settings = Settings(
        model=model,
        scorer_model=scorer_model,
        features=features,
        seed=seed,
        scorers=tuple(name.strip() for name in scorers.split(",")),
        shown=shown,
        scored=scored,
        per_call=per_call,
        shuffled=shuffled,
        random=random,
        temperature=temperature,
        max_tokens=max_tokens,
        extra=parse_extra(extra),
        prompts=prompts,
        retry=RetryPolicy(timeout, attempts, concurrency, per_minute),
    )
    _explain(runs, settings, find_endpoint(endpoint, key_variable), (price_in, price_out), dry_run, yes, quiet, json)


def _explain(
    runs: list[Path],
    settings: "Settings",
    endpoint: "Endpoint",
    prices: tuple[float | None, float | None],
    dry_run: bool,
    yes: bool,
    quiet: bool,
    json: bool,
) -> None:
    """Say what it will take, ask, explain, and report.

    Raises:
        EndpointError: calls failed; what the others gave is kept.
    """
    from dataclasses import asdict

    from endwise.common.errors import EndpointError
    from endwise.explaining.explain import estimate_lines
    from endwise.explaining.explain import explain as run
    from endwise.explaining.explain import plan as make

    say = status if json else echo
    made = make(runs, settings, endpoint, say)
    for line in estimate_lines(made.estimate, prices):
        say(line)
    if dry_run:
        report(json, asdict(made.estimate))
        return
    if made.estimate.stats.calls and not yes and not _agreed():
        return
    found, stats = run(made, saying(quiet))
    report(
        json,
        {"stats": vars(stats), "runs": [{"run": path, "explained": len(each.rows)} for path, each in found.items()]},
        *(f"Explained {len(each.rows):,} features: {path / 'explanations'}" for path, each in found.items()),
        str(stats),
    )
    if stats.failed or stats.unreadable:
        echo("Items whose call failed, or whose answer could not be read, are left out of the scores.", err=True)
    if stats.failed:
        raise EndpointError(
            f"{stats.failed:,} of {stats.calls + stats.failed:,} calls failed in every attempt, the last one because "
            f"{stats.last_failure}. Check the server at {endpoint.url}; the same command repeats only these."
        )
    say(f"Next: endwise compare-explanations {shlex.join(map(str, found))}")


def _agreed() -> bool:
    """
    Raises:
        ConfigError: there is nobody to ask.
    """
    from endwise.common.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError("Calls may cost money. Give --yes to make them, or --dry-run to stop here.")
    return typer.confirm("Make these calls?")


@command
def compare_explanations(
    runs: Annotated[list[Path], run_argument(f"Explained run folders, {OR_FOLDERS}")],
    out: Annotated[Path | None, results_folder("interpretability")] = None,
    json: Json = False,
) -> None:
    """Compare how well features can be explained, kind by kind: means, differences with permutation tests, violins."""
    from endwise.analysis.interpretability.page import print_interpretability, write_interpretability
    from endwise.analysis.interpretability.study import interpretability as compare

    out = out or results_beside(runs, "interpretability")
    found = compare(runs)
    present(json, lambda: print_interpretability(found), lambda: write_interpretability(found, out))


@command
@taking_saes
@on_device
def patterns(
    runs: Measured,
    tokens: Tokens = None,
    contexts: Annotated[int, Option(help="Firings of a feature that its patterns are made of.")] = 16,
    longest: Annotated[int, Option(help="Tokens of a pattern, at most.")] = 6,
    kept: Annotated[float, Option(help="Share of an activation that a pattern must keep.")] = 0.5,
    substitutes: Annotated[int, Option(help="Tokens tried in the place of each, at random and by likeness.")] = 8,
    random: Annotated[int, Option(help="Control: this many random directions.")] = 100,
    seed: Annotated[int, Option(help="Seed of contexts, substitutes and controls.")] = 0,
    again: Again = False,
    json: Json = False,
    out: Annotated[Path | None, results_folder("patterns")] = None,
    quiet: Quiet = False,
) -> None:
    """Explain features by patterns of tokens, without a language model, and test them on other text, kind by kind."""
    from endwise.analysis.patterns.page import print_patterns, write_patterns_page
    from endwise.analysis.patterns.study import patterns as explain_by
    from endwise.features.patterns.settings import PatternSettings

    settings = PatternSettings(
        kept=kept, contexts=contexts, longest=longest, substitutes=substitutes, random=random, seed=seed
    )
    out = out or results_beside(runs, "patterns")
    found = explain_by(runs, tokens=tokens, settings=settings, again=again, display=not quiet)
    present(json, lambda: print_patterns(found), lambda: write_patterns_page(found, out))
