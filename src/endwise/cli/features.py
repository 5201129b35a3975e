"""Commands about single features: gathered, shown, explained."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from endwise.cli.door import app, aside, plainly, say


@app.command()
@plainly
def harvest(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to read; unset: the recipe's evaluation.tokens, or all of --corpus."),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Read the recipe's training text instead.")] = False,
    corpus: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Read this text instead: a file or folder, as data.source.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Contexts of each feature's greatest activations.")] = 24,
    quantiles: Annotated[int, typer.Option(min=0, help="Groups of contexts from low activations to high.")] = 5,
    per_quantile: Annotated[int, typer.Option(min=0, help="Contexts from each of these.")] = 8,
    no_importance: Annotated[
        bool, typer.Option("--no-importance", help="Do not attribute the CE where importance was not measured.")
    ] = False,
    shards: Annotated[int, typer.Option(min=1, help="Parts of the text, each read by a process of its own.")] = 1,
    shard: Annotated[int, typer.Option(min=0, help="Which of them this process reads, from 0.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Harvest again what was harvested before.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Gather what every feature fires on, raises, fires with and is worth, in one pass, into RUN/harvest."""
    from endwise.distributed import is_first_process
    from endwise.errors import ConfigError
    from endwise.features.harvesting import harvest as gather
    from endwise.features.harvesting.gathering import Kept

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
    for path, each in found.items() if is_first_process() else ():
        if each is None:
            say(f"{path}: this shard is done; the process that is done last joins all {shards}.")
            continue
        alive = int((each.firings > 0).sum())
        say(f"{each.folder}: {alive:,} of {each.d_sae:,} features fired on {each.about['tokens']:,} tokens.")


@app.command()
@plainly
def export_neuronpedia(
    run: Annotated[Path, typer.Argument(help="A harvested run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the export.")] = Path("neuronpedia"),
    model_id: Annotated[
        str | None, typer.Option(help="Neuronpedia's id of the model; unset: made from the model's name.")
    ] = None,
    source_set: Annotated[
        str | None, typer.Option("--set", help="Name of the source set; unset: made from site, kind and size.")
    ] = None,
    release: Annotated[str, typer.Option(help="Name of the release.")] = "endwise",
    creator: Annotated[str, typer.Option(help="Who made the SAE.")] = "endwise",
    creator_id: Annotated[
        str | None, typer.Option(help="The importing server's user; unset: $DEFAULT_CREATOR_ID, or Neuronpedia's own.")
    ] = None,
) -> None:
    """Write a run's harvest as Neuronpedia imports it: OUT/MODEL/SOURCE with features and activations."""
    from endwise.features.neuronpedia import export

    written = export(
        run, out, model_id=model_id, source_set=source_set, release=release, creator=creator, creator_id=creator_id
    )
    say(f"{written.features:,} features with {written.activations:,} activations: {written.folder}")


@app.command()
@plainly
def dashboard(
    runs: Annotated[list[Path], typer.Argument(help="Harvested run folders, shown side by side.")],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What the search for the nearest features may hold beside the SAEs.")
    ] = "512MiB",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the site; unset: dashboard/ in the run, or beside the first of several."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Write a site that shows every feature: where it fires, what it does, what is like it. It opens from the disk."""
    from endwise.dashboard import write_dashboard
    from endwise.machine import parse_size

    say(f"Open it: {write_dashboard(runs, out, memory=parse_size(memory), say=None if quiet else aside)}")


@app.command()
@plainly
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Harvested run folders, as for endwise dashboard.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any that is free.")] = 8008,
    again: Annotated[bool, typer.Option("--again", help="Write the dashboard again, though it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Serve the dashboard to this machine, with the model behind it: which features fire on a text that you type?"""
    from endwise.dashboard.serving import dashboard_server

    with dashboard_server(runs, port=port, again=again, say=None if quiet else aside) as server:
        say(f"{server.url} (Ctrl+C ends it)")
        server.serve_forever()


@app.command()
@plainly
def explain(
    runs: Annotated[list[Path], typer.Argument(help="Harvested run folders.")],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="Base of an OpenAI-compatible API, e.g. http://127.0.0.1:8080/v1")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="The model that explains, as the endpoint calls it.")],
    scorer_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that is asked with explanations; unset: the same.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="all, random:N, top:N (by importance), or numbers and ranges: 1,5,10-20")
    ] = "random:200",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of features and texts.")] = 0,
    key_variable: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the key; unset: no key is sent."),
    ] = None,
    scorers: Annotated[str, typer.Option(help="Any of detection,fuzzing.")] = "detection,fuzzing",
    shown: Annotated[int, typer.Option(help="Texts from which an explanation is made, at most.")] = 20,
    scored: Annotated[int, typer.Option(help="Items of each scorer, half true and half false.")] = 20,
    per_call: Annotated[int, typer.Option(help="Items of one call.")] = 5,
    shuffled: Annotated[
        bool, typer.Option("--shuffled/--no-shuffled", help="Control: also score another feature's explanation.")
    ] = True,
    random: Annotated[int, typer.Option(help="Control: random texts in the place of so many features.")] = 50,
    prompts: Annotated[Path | None, typer.Option(help="Folder with prompts in place of those that ship.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the model's answers.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Of an answer; models that think first need more.")] = 500,
    extra: Annotated[
        str,
        typer.Option(metavar="JSON", help='Further fields of each request; null takes one out: {"max_tokens": null}'),
    ] = "{}",
    timeout: Annotated[float, typer.Option(help="Seconds for one attempt.")] = 120.0,
    attempts: Annotated[int, typer.Option(help="Of each call, before it counts as failed.")] = 6,
    concurrency: Annotated[int, typer.Option(help="Calls at a time.")] = 4,
    per_minute: Annotated[float | None, typer.Option(help="Calls a minute, at most; unset: no limit.")] = None,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens written.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take; make no call.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
) -> None:
    """Have features explained by a language model, and score how well the explanations predict them.

    What was answered before is never asked again, so that a call that was interrupted resumes where it was.
    """
    from endwise.explaining.client import Patience
    from endwise.explaining.endpoint import find_endpoint
    from endwise.explaining.explain import estimate_lines
    from endwise.explaining.explain import explain as run
    from endwise.explaining.explain import plan as make
    from endwise.explaining.settings import Settings, parse_extra

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
        patience=Patience(timeout, attempts, concurrency, per_minute),
    )
    made = make(runs, settings, find_endpoint(endpoint, key_variable), say)
    for line in estimate_lines(made.estimate, (price_in, price_out)):
        say(line)
    if dry_run:
        return
    if made.estimate.calls and not yes and not _agreed():
        return
    found, tally = run(made, aside)
    for path, explanations in found.items():
        say(f"Explained {len(explanations.rows):,} features: {path / 'explanations'}")
    say(str(tally))
    if tally.failed or tally.unreadable:
        say("Items of calls that failed, or whose answer could not be read, count neither way in a score.", err=True)
    say(f"Next: endwise compare-explanations {shlex.join(map(str, found))}")


def _agreed() -> bool:
    """
    Raises:
        ConfigError: there is nobody to ask.
    """
    from endwise.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError("Calls may cost money. Say --yes to make them, or --dry-run to see this much only.")
    return typer.confirm("Make these calls?")


@app.command()
@plainly
def compare_explanations(
    runs: Annotated[list[Path], typer.Argument(help="Explained run folders, or folders that hold some (a sweep's).")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables, figures and interpretability.html; unset: interpretability/ beside the first."
        ),
    ] = None,
) -> None:
    """Compare how well features can be explained, kind by kind: means, differences with permutation tests, violins."""
    from endwise.analysis.interpretability import interpretability as compare
    from endwise.report import print_interpretability, write_interpretability

    found = compare(runs)
    print_interpretability(found)
    say(f"The page, figures and tables: {write_interpretability(found, out or runs[0].parent / 'interpretability')}")
