"""The command line. Every command is a thin door to one function; torch is imported only behind it."""

import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer

from endwise.errors import EndwiseError
from endwise.printable import printable

app = typer.Typer(
    name="endwise",
    help="Train sparse autoencoders on what a language model does, and compare them with local ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, e.g. objective.sparsity.coefficient=3"
    ),
]

DOES_NOT_FIT = 8
"""The exit code of `plan` for a run that will not fit; 1 to 7 and 9 are those of errors."""

P = ParamSpec("P")
R = TypeVar("R")


def main() -> None:
    app()


def _say(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def _fail(message: str, code: int) -> NoReturn:
    process = f" (process {os.environ.get('RANK')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    _say(f"endwise{process}: {message}", err=True)
    raise typer.Exit(code)


def _plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Turns our own errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except EndwiseError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("stopped", 130)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except OSError as error:  # of the machine, not of the program: a disk that fails, a file that may not be read
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}. Check that path, its permissions and its disk.", 1)

    return run


@app.command()
@_plainly
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the runs, summary.json and report.html.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every SAE's initialisation.")] = 0,
) -> None:
    """Train the three kinds of SAE on the embedded model and compare them (a few minutes on two cores)."""
    from endwise.quickstart import quickstart as run

    run(out, seed=seed)


@app.command()
@_plainly
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's path, or the name of one that ships.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option(min=0, help="With --resume: go on from this step's checkpoint, 0 for the beginning."),
    ] = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Go on with the recipe's run if it was started before.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train one SAE as a recipe says, or go on with an interrupted run; under torchrun, with all its processes."""
    from endwise.distributed import is_first_process
    from endwise.errors import ConfigError
    from endwise.recipes import find_recipe
    from endwise.run_config import RunConfig
    from endwise.run_folder import RunFolder
    from endwise.training import train as run

    if (recipe is None) == (resume is None):
        raise ConfigError("Give either a recipe to start (endwise train RECIPE) or a run to go on with (--resume RUN).")
    if from_step is not None and resume is None:
        raise ConfigError("--from-step needs --resume RUN, the run whose checkpoint it names.")
    if resume is not None:
        config = RunFolder.open(resume).config().model_copy(update={"out": resume})
    else:
        config = RunConfig.read(find_recipe(recipe or ""), overrides)
    going_on = resume is not None or ("if_started" if or_resume else False)
    result = run(config, resume=going_on, from_step=from_step, display=not quiet)
    if is_first_process():
        _say(f"Trained {config.objective.kind} at {config.site}: {result.folder}")
        _say(f"Next: endwise evaluate {shlex.quote(str(result.folder))}")


@app.command()
@_plainly
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of one that ships.")],
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Plan for a device with this much memory, e.g. 80GiB, instead of this one's."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Plan one of this many processes that share each batch.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run will need, before it starts: parameters, memory, operations, and what will not fit.

    Exit code: 0 if everything fits, 8 if something does not, another if the recipe breaks a rule.
    """
    from json import dumps

    from endwise.machine import parse_size
    from endwise.planning import plan as make
    from endwise.recipes import find_recipe
    from endwise.report import print_plan
    from endwise.run_config import RunConfig

    made = make(
        RunConfig.read(find_recipe(recipe), overrides),
        processes=processes,
        memory=None if memory is None else parse_size(memory),
    )
    if json:
        typer.echo(dumps(made.to_json(), indent=2))
    else:
        print_plan(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
@_plainly
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens, instead of each recipe's.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write all runs as one CSV table.")] = None,
) -> None:
    """Measure finished runs on held-out text: a table, evaluation.json in each folder, and CSV."""
    from endwise.distributed import is_first_process
    from endwise.files import write_atomic
    from endwise.report import print_evaluations
    from endwise.run_evaluation import evaluate as run
    from endwise.run_evaluation import evaluations_csv, unfinished
    from endwise.run_folder import RunFolder

    evaluations = run(runs, tokens=tokens)
    if not is_first_process():
        return
    configs = {path: RunFolder.open(path).config() for path in evaluations}
    print_evaluations(configs, evaluations)
    for path, config in configs.items():
        if remark := unfinished(path, config):
            _say(remark)
    for path, evaluation in evaluations.items():
        write_atomic(path / "evaluation.csv", evaluations_csv(configs, {path: evaluation}).encode())
    if csv is not None:
        write_atomic(csv, evaluations_csv(configs, evaluations).encode())


@app.command()
@_plainly
def sweep(
    sweep: Annotated[str, typer.Argument(help="A sweep's path, or the name of one that ships.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the sweep (out=..., together=4) or its recipe (training.tokens=...)",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say where each run stands; train nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train and measure every run of a sweep: what is finished is skipped, what was broken off gone on with.

    Exit code: 0 if all runs are finished, 7 if some failed, another if the sweep breaks a rule.
    """
    from endwise.errors import TrainingStopped
    from endwise.sweeps import sweep as run
    from endwise.sweeps.survey import survey
    from endwise.sweeps.sweep_config import read_sweep
    from endwise.sweeps.tables import print_prospects, print_rows

    config = read_sweep(sweep, overrides or ())
    if dry_run:
        print_prospects(survey(config))
        return
    swept = run(config, display=not quiet)
    print_rows(swept.rows)
    for point, why in swept.failures.items():
        _say(f"failed: {point} in {swept.places[point]}: {why}", err=True)
    if missed := swept.missing(config.search.tolerance):
        _say(
            f"Further than {config.search.tolerance:.0%} from their target: {len(missed)}. To come nearer, raise "
            "search.tokens or search.corrections, and start the sweep again."
        )
    _say(f"{len(swept.runs)} of {len(swept.places)} runs finished. The table of all: {swept.summary}")
    if swept.failures:
        raise typer.Exit(TrainingStopped.exit_code)


@app.command()
@_plainly
def pareto(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for tables, figures and pareto.html; unset: pareto/ in the first, or beside it if it is a run."
        ),
    ] = None,
) -> None:
    """Compare kinds by their curves: CE increase and KL against features, fronts, bands, and ratios with intervals."""
    from endwise.analysis.pareto import pareto as compare
    from endwise.report import print_pareto, write_pareto
    from endwise.run_folder import RunFolder

    found = compare(runs)
    print_pareto(found)
    beside = runs[0].parent if RunFolder(runs[0]).has_run() else runs[0]
    _say(f"The page, figures and tables: {write_pareto(found, out or beside / 'pareto')}")


@app.command()
@_plainly
def geometry(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN,RUN", help="Also compare these two; may be given several times."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="The cosine at which a feature counts as found again.")
    ] = 0.7,
    umap: Annotated[
        bool, typer.Option("--umap", help="Also lay the features out on a map (needs the extra umap).")
    ] = False,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="What a search may hold beside the dictionaries themselves.")
    ] = "512MiB",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and geometry.html; unset: geometry/ beside the first run."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Compare dictionaries by the cosines of their features: within each, across seeds, and across kinds."""
    from endwise.analysis.feature_map import feature_maps
    from endwise.analysis.geometry import geometry as compare
    from endwise.errors import ConfigError
    from endwise.machine import parse_size
    from endwise.report import print_geometry, write_geometry
    from endwise.run_folder import RunFolder

    pairs = [tuple(text.split(",")) for text in pair or ()]
    for each in pairs:
        if len(each) != 2:
            raise ConfigError(f"A pair is two run folders with a comma between them; given {','.join(each)!r:.200}.")
    say = None if quiet else lambda text: _say(text, err=True)
    found = compare(runs, pairs=[(a, b) for a, b in pairs], memory=parse_size(memory), say=say)
    print_geometry(found)
    maps = feature_maps(found, say=say) if umap else None
    beside = runs[0].parent if RunFolder(runs[0]).has_run() else runs[0]
    path = write_geometry(found, out or beside / "geometry", threshold=threshold, maps=maps)
    _say(f"The page, figures and tables: {path}")


@app.command()
@_plainly
def importance(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens, instead of each recipe's.")] = None,
    ablate: Annotated[int, typer.Option(min=0, help="Features of each run to ablate one by one.")] = 100,
    kl: Annotated[bool, typer.Option("--kl", help="Attribute the KL besides the CE, at about twice the cost.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was measured before.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and importance.html; unset: importance/ beside the first."),
    ] = None,
) -> None:
    """Measure what every feature does for the predictions, and on how few features they rest, kind by kind."""
    from endwise.analysis.importance import importance as measure
    from endwise.report import print_importance, write_importance

    found = measure(runs, tokens=tokens, ablate=ablate, kl=kl, again=again, display=True)
    print_importance(found)
    _say(f"The page, figures and tables: {write_importance(found, out or runs[0].parent / 'importance')}")


@app.command()
@_plainly
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
            _say(f"{path}: this shard is done; the process that is done last joins all {shards}.")
            continue
        alive = int((each.firings > 0).sum())
        _say(f"{each.folder}: {alive:,} of {each.d_sae:,} features fired on {each.about['tokens']:,} tokens.")


@app.command()
@_plainly
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
    _say(f"{written.features:,} features with {written.activations:,} activations: {written.folder}")


@app.command()
@_plainly
def directions(
    runs: Annotated[list[Path], typer.Argument(help="Measured run folders, or folders that hold some (a sweep's).")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens, instead of each recipe's.")] = None,
    directions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ablate this many principal directions and as many of the others; unset: all at a narrow site."
        ),
    ] = None,
    with_starts: Annotated[
        bool, typer.Option("--with-starts", help="Directions of all tokens, position 0 and document starts among them.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables, figures and directions.html; unset: directions/ beside the first."),
    ] = None,
) -> None:
    """Compare what SAEs keep: lengths, principal directions against what the model does with them, later layers."""
    from endwise.analysis.directions import directions as compare
    from endwise.report import print_directions, write_directions

    found = compare(runs, tokens=tokens, directions=directions, with_starts=with_starts)
    print_directions(found)
    _say(f"The page, figures and tables: {write_directions(found, out or runs[0].parent / 'directions')}")


@app.command()
@_plainly
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

    say = None if quiet else lambda text: _say(text, err=True)
    _say(f"Open it: {write_dashboard(runs, out, memory=parse_size(memory), say=say)}")


@app.command()
@_plainly
def serve(
    runs: Annotated[list[Path], typer.Argument(help="Harvested run folders, as for endwise dashboard.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any that is free.")] = 8008,
    again: Annotated[bool, typer.Option("--again", help="Write the dashboard anew, though it is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Serve the dashboard to this machine, with the model behind it: which features fire on a text that you type?"""
    from endwise.dashboard.serving import dashboard_server

    say = None if quiet else lambda text: _say(text, err=True)
    with dashboard_server(runs, port=port, again=again, say=say) as server:
        _say(f"{server.url} (Ctrl+C ends it)")
        server.serve_forever()


@app.command()
@_plainly
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
    """Have features explained by a language model, and score how well the explanations foretell them.

    What was answered before is never asked again, so that a call that was broken off goes on where it was.
    """
    from endwise.errors import ConfigError
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
    made = make(runs, settings, find_endpoint(endpoint, key_variable), _say)
    for line in estimate_lines(made.estimate, (price_in, price_out)):
        _say(line)
    if dry_run:
        return
    if made.estimate.calls and not yes:
        if not sys.stdin.isatty():
            raise ConfigError("Calls may cost money. Say --yes to make them, or --dry-run to see this much only.")
        if not typer.confirm("Make these calls?"):
            return
    found, tally = run(made, lambda text: _say(text, err=True))
    for path, explanations in found.items():
        _say(f"Explained {len(explanations.rows):,} features: {path / 'explanations'}")
    _say(
        f"{tally.calls:,} calls, {tally.kept:,} answers from before, {tally.retries:,} tried again, "
        f"{tally.failed:,} calls failed, {tally.unreadable:,} answers could not be read; {tally.tokens_in:,} tokens "
        f"in, {tally.tokens_out:,} out."
    )
    if tally.failed or tally.unreadable:
        _say("Items of calls that failed, or whose answer could not be read, count neither way in a score.", err=True)
    _say(f"Next: endwise compare-explanations {shlex.join(map(str, found))}")


@app.command()
@_plainly
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
    _say(f"The page, figures and tables: {write_interpretability(found, out or runs[0].parent / 'interpretability')}")


@app.command()
@_plainly
def reproduce(
    what: Annotated[str, typer.Argument(metavar="paper", help="Whose experiments: those of the paper.")],
    model: Annotated[
        str, typer.Option(help="The study: embedded, gpt2-small, tinystories-1m, or a file like these.")
    ] = "embedded",
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Make the runs as long as fits into 90s, 30m or 2h.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs, tables, figures and report.html; begun again, it goes on there."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Carry out the paper's experiments on a model, and write one report: figures, tables, and what shows of it.

    Exit code: 0 if all runs are finished, 7 if some failed, another if the study breaks a rule.
    """
    from endwise.errors import ConfigError, TrainingStopped
    from endwise.reproduction import reproduce as run

    if what != "paper":
        raise ConfigError(f"Only the paper can be reproduced (endwise reproduce paper); given {what!r:.80}.")
    made = run(model, out, budget=budget, display=not quiet)
    for claim in made.claims:
        _say(f"{claim.verdict}: {claim.claim} ({claim.ours})")
    for folder, why in made.runs.failures.items():
        _say(f"failed: {folder}: {why}", err=True)
    _say(f"The report: {made.report}")
    if made.runs.failures:
        raise typer.Exit(TrainingStopped.exit_code)


@app.command()
@_plainly
def sites(
    model: Annotated[str, typer.Argument(help="embedded, a local folder, or a Hugging Face hub id.")] = "embedded",
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder or repository.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code the model ships with.")
    ] = False,
) -> None:
    """List the sites of a model, where an SAE can be spliced in, with their widths."""
    from endwise.model_loading import load_model

    loaded = load_model(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    for site in loaded.sites():
        _say(f"{site.name:<34}{loaded.width(site):>8}")


@app.command()
def version() -> None:
    """Print the version."""
    from endwise import __version__

    typer.echo(__version__)
