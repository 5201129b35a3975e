"""Commands that train and measure."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from endwise.cli.adopted import taking_saes
from endwise.cli.app import (
    OR_FOLDERS,
    Json,
    Overrides,
    Quiet,
    Runs,
    Tokens,
    command,
    echo,
    print_json,
    report,
    run_argument,
)
from endwise.cli.overriding import on_device, taking_keys

if TYPE_CHECKING:
    from endwise.config.places import Recipe
    from endwise.evaluation.measure import Evaluation
    from endwise.sweeps import Sweep

DOES_NOT_FIT = 8
"""The exit code of `plan` for a run that will not fit; 1 to 7 and 9 up are those of errors."""


def recipe_completions(incomplete: str) -> list[str]:
    """List recipes that ship, and those beside, for a shell that completes a name."""
    from endwise.config.recipes import recipe_names

    beside = [str(path) for path in Path().glob(f"{incomplete}*") if path.suffix in (".yaml", ".yml") or path.is_dir()]
    return [name for name in (*recipe_names(), *sorted(beside)) if name.startswith(incomplete)]


RECIPE: Any = Argument(help="A recipe's path, or the name of one that ships.", autocompletion=recipe_completions)


@command
@taking_keys("device")
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, Option(help="Folder for the runs, summary.json and report.html.")] = Path("runs/quickstart"),
    seed: Annotated[int, Option(help="Seed of every SAE's initialisation.")] = 0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train the paper's three kinds of SAE and the recommended one on the embedded model and compare them (minutes)."""
    from endwise.analysis.comparison.printed import print_summary
    from endwise.common.files import read_json
    from endwise.paper.quickstart import SUMMARY
    from endwise.paper.quickstart import quickstart as run

    summary = run(out, seed=seed, overrides=overrides or (), display=not (quiet or json))
    if json:
        print_json(read_json(out / SUMMARY))
    elif quiet:
        print_summary(summary)


@command
@taking_keys()
def train(
    recipe: Annotated[str | None, RECIPE] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, Option(metavar="RUN", help="Resume the run in this folder.")] = None,
    from_step: Annotated[
        int | None, Option(min=0, help="With --resume: start from this step's checkpoint, 0 for the beginning.")
    ] = None,
    or_resume: Annotated[bool, Option("--or-resume", help="Resume the recipe's run if it was started before.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train one SAE as a recipe says, or resume an interrupted run; under torchrun, with all its processes.

    With --resume, changes may be given to how the run is executed, e.g. training.microbatch=2, but not to what it is.

    Exit code: 0 if it was trained, 7 if it stopped or diverged, another if the recipe breaks a rule.
    """
    from endwise.common.errors import ConfigError, TrainingStopped
    from endwise.common.processes import is_first_process
    from endwise.common.terminal import note
    from endwise.config.places import read_recipe
    from endwise.config.recipes import find_recipe
    from endwise.config.run import RunConfig
    from endwise.training.resume import recipe_to_resume
    from endwise.training.train import train as run
    from endwise.training.train import train_places

    is_recipe = recipe is not None and (resume is None or "=" not in recipe)  # with --resume it may be a change
    if is_recipe == (resume is not None):
        raise ConfigError("Give either a recipe to start (endwise train RECIPE) or a run to resume (--resume RUN).")
    if from_step is not None and resume is None:
        raise ConfigError("--from-step needs --resume RUN, the run whose checkpoint it names.")
    if resume is not None:
        config = recipe_to_resume(resume, [*([] if recipe is None else [recipe]), *(overrides or [])])
    else:
        config = read_recipe(find_recipe(recipe or ""), overrides)
    resuming = resume is not None or ("if_started" if or_resume else False)
    options: dict[str, Any] = {"resume": resuming, "from_step": from_step, "display": not quiet}
    before = _saved_steps(config) if resuming and from_step is None else None
    result = run(config, **options) if isinstance(config, RunConfig) else train_places(config, **options)
    if is_first_process():
        for remark in result.remarks:
            note(f"! {remark}")
        record = {"run": result.folder, "objective": config.objective_name, "place": str(config.place)}
        record |= {"diverged": result.diverged, "remarks": result.remarks}
        if result.diverged:
            report(json, record)
            echo(f"Diverged, not usable: {result.folder}", err=True)
            raise typer.Exit(TrainingStopped.exit_code)
        done = "Already trained:" if before and before == _saved_steps(config) else "Trained"
        report(
            json,
            record,
            f"{done} {config.objective_name} at {config.place}: {result.folder}",
            f"Next: endwise evaluate {shlex.quote(str(result.folder))}",
        )


def _saved_steps(config: "Recipe") -> list[list[int]]:
    """Steps of the checkpoints in a run's folder, or in those of its places."""
    from endwise.config.run import RunConfig
    from endwise.runs.folder import RunFolder
    from endwise.runs.several import place_folders
    from endwise.training.setup import default_folder

    path = config.out or default_folder(config)
    folders = [path, *([] if isinstance(config, RunConfig) else place_folders(path, config))]
    return [steps for each in folders if (steps := RunFolder(each).saved_steps())]


@command
@taking_keys()
def plan(
    recipe: Annotated[str, RECIPE],
    overrides: Overrides = None,
    memory: Annotated[
        str | None,
        Option(metavar="SIZE", help="Plan for a device with this much memory, e.g. 80GiB, instead of this one's."),
    ] = None,
    processes: Annotated[int, Option(min=1, help="Plan one of this many processes that share each batch.")] = 1,
    json: Json = False,
) -> None:
    """Say what a run will need, before it starts: parameters, memory, operations, and what will not fit.

    Exit code: 0 if everything fits, 8 if something does not, another if the recipe breaks a rule.
    """
    from endwise.common.machine import parse_size
    from endwise.config.places import read_recipe
    from endwise.config.recipes import find_recipe
    from endwise.training.planning.plan import plan as make
    from endwise.training.planning.printed import print_plan

    made = make(
        read_recipe(find_recipe(recipe), overrides),
        processes=processes,
        memory=None if memory is None else parse_size(memory),
    )
    if json:
        print_json(made.to_json())
    else:
        print_plan(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


@command
@taking_saes
@on_device
def evaluate(
    runs: Runs,
    tokens: Tokens = None,
    csv: Annotated[Path | None, Option(help="Also write all runs as one CSV table.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure finished runs on held-out text: a table, evaluation.json in each folder, and CSV."""
    from endwise.common.files import check_can_write, write_atomic
    from endwise.common.processes import is_first_process
    from endwise.evaluation.evaluate import evaluate as run
    from endwise.evaluation.evaluate import evaluations_csv
    from endwise.runs.folder import RunFolder

    if csv is not None:
        check_can_write(csv.parent)
    evaluations = run(runs, tokens=tokens, display=not quiet)
    if not is_first_process():
        return
    configs = {path: RunFolder.open(path).recipe() for path in evaluations}
    if json:
        print_json([{"run": path, **(RunFolder(path).evaluation() or {})} for path in evaluations])
    else:
        _show_evaluations(configs, evaluations)
    for path, evaluation in evaluations.items():
        write_atomic(path / "evaluation.csv", evaluations_csv(configs, {path: evaluation}).encode())
    if csv is not None:
        write_atomic(csv, evaluations_csv(configs, evaluations).encode())


def _show_evaluations(configs: "dict[Path, Recipe]", evaluations: "dict[Path, Evaluation]") -> None:
    """Tables of single places, then of several together, and what is not finished."""
    from endwise.analysis.comparison.printed import print_evaluations, print_together
    from endwise.config.places import PlacesConfig
    from endwise.config.run import RunConfig
    from endwise.evaluation.finished import unfinished
    from endwise.evaluation.together import JointEvaluation
    from endwise.runs.several import place_folder

    alone = {path: config for path, config in configs.items() if isinstance(config, RunConfig)}
    print_evaluations(alone, {path: evaluations[path] for path in alone})
    for path, config in configs.items():
        if isinstance(together := evaluations[path], JointEvaluation) and isinstance(config, PlacesConfig):
            own = {each.place: evaluations[place_folder(path, each)] for each in config.recipes}
            print_together(together, own)
    for path, config in alone.items():
        if remark := unfinished(path, config):
            echo(remark)


@command
def track(
    runs: Runs,
    to: Annotated[
        list[str] | None,
        Option(metavar="TRACKER", help="wandb, tensorboard, trackio or mlflow; unset: the recipe's trackers."),
    ] = None,
    json: Json = False,
) -> None:
    """Send run folders to trackers: what they lack, into the tracked runs that exist already."""
    from endwise.runs.finding import runs_at
    from endwise.runs.tracking.track import track as send

    given = runs_at(runs, lambda _: True, lacking="is one", remedy="Give run folders.")
    sent = {run: send(run, to or ()) for run in given}
    report(
        json,
        [{"run": run, "trackers": names} for run, names in sent.items()],
        *(f"{run}: sent to {', '.join(names)}" for run, names in sent.items()),
    )


@command
@taking_keys()
def sweep(
    sweep: Annotated[str, Argument(help="A sweep's path, or the name of one that ships.")],
    overrides: Annotated[
        list[str] | None,
        Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the sweep (out=..., together=4) or its recipe (training.tokens=...)",
        ),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the state of each run; train nothing.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train and measure every run of a sweep: what is finished is skipped, what was interrupted is resumed.

    Exit code: 0 if all runs are finished, 7 if some failed, another if the sweep breaks a rule.
    """
    from endwise.common.errors import TrainingStopped
    from endwise.sweeps import sweep as run
    from endwise.sweeps.survey import survey
    from endwise.sweeps.sweep_config import read_sweep
    from endwise.sweeps.tables import print_prospects

    config = read_sweep(sweep, overrides or ())
    if dry_run:
        prospects = survey(config)
        if json:
            print_json([{**vars(each), "point": str(each.point)} for each in prospects])
        else:
            print_prospects(prospects)
        return
    swept = run(config, display=not quiet)
    for point, why in swept.failures.items():
        echo(f"failed: {point} in {swept.places[point]}: {why}", err=True)
    if json:
        print_json({"summary": swept.summary, "runs": swept.rows})
    else:
        _show_sweep(swept, config.search.tolerance)
    if swept.failures:
        raise typer.Exit(TrainingStopped.exit_code)


def _show_sweep(swept: "Sweep", tolerance: float) -> None:
    from endwise.sweeps.tables import print_rows

    print_rows(swept.rows)
    if missed := swept.missing(tolerance):
        echo(
            f"Further than {tolerance:.0%} from their target: {len(missed)}. To come nearer, raise "
            "search.tokens or search.corrections, and start the sweep again."
        )
    echo(f"{len(swept.runs)} of {len(swept.places)} runs finished. The table of all: {swept.summary}")


@command
def reproduce(
    what: Annotated[str, Argument(metavar="paper", help="Whose experiments: those of the paper.")],
    model: Annotated[
        str, Option(help="The study: embedded, gpt2-small, tinystories-1m, or a file like these.")
    ] = "embedded",
    budget: Annotated[
        str | None, Option(metavar="TIME", help="Make the runs as long as fits in 90s, 30m or 2h.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder for runs, tables, figures and report.html; the same command resumes there.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Repeat the paper's experiments on a model, and write one report: figures, tables, and verdicts on its claims.

    Exit code: 0 if all runs are finished, 7 if some failed, another if the study breaks a rule.
    """
    from endwise.common.errors import ConfigError, TrainingStopped
    from endwise.paper import reproduce as run

    if what != "paper":
        raise ConfigError(f"Only the paper can be reproduced (endwise reproduce paper); given {what!r:.80}.")
    made = run(model, out, budget=budget, display=not quiet)
    for folder, why in made.runs.failures.items():
        echo(f"failed: {folder}: {why}", err=True)
    if json:
        print_json({"report": made.report, "claims": list(map(vars, made.claims)), "remarks": made.remarks})
    else:
        for claim in made.claims:
            echo(f"{claim.verdict}: {claim.claim} ({claim.ours})")
        for remark in made.remarks:
            echo(f"! {remark}")
        echo(f"The report: {made.report}")
    if made.runs.failures:
        raise typer.Exit(TrainingStopped.exit_code)


@command
def push(
    runs: Annotated[list[Path], run_argument(f"Measured run folders, {OR_FOLDERS}")],
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, Option("--private", help="Make it private, if it is created.")] = False,
    licence: Annotated[str | None, Option(help="The hub's identifier of a licence, e.g. mit or apache-2.0.")] = None,
    revision: Annotated[str | None, Option(help="Branch to push to; unset: main.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List what would be pushed; the hub is not asked.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Push runs to the Hugging Face hub: SAEs that endwise and SAELens load, and a card with their numbers.

    The same command resumes an interrupted push; for runs pushed before, only changes are sent.
    """
    from endwise.common.machine import size_text
    from endwise.sharing.pushing import push as run

    _show_bars(not quiet)
    done = run(runs, repo, private=private, licence=licence, revision=revision, dry_run=dry_run)
    lines = [f"{size_text(size):>12}  {name}" for name, size in done.files.items()]
    pushed = f"Pushed {len(runs)} run{'' if len(runs) == 1 else 's'}: {done.name}, commit {done.commit}"
    to_be = [done.card, f"Nothing was sent. Without --dry-run it goes to {done.name}."]
    report(json, {**vars(done), "repo": done.name}, *lines, *(to_be if dry_run else [pushed]))
    if not dry_run and licence is None and "\nlicense:" not in done.card:
        echo("! The card states no licence, without which others may not use it. Give one with --licence.", err=True)


def _show_bars(shown: bool) -> None:
    """Leave out huggingface_hub's progress bars, if they are not to be shown."""
    from huggingface_hub.utils import disable_progress_bars

    if not shown:
        disable_progress_bars()


@command
def pull(
    name: Annotated[
        str, Argument(metavar="OWNER/NAME[/PATH]", help="With @REVISION behind NAME; or release/sae_id of SAELens.")
    ],
    target: Annotated[Path | None, Argument(metavar="[OUT]", help="Folder; unset: runs/NAME/PATH.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Download runs from the Hugging Face hub into folders that evaluate and pareto read; other SAEs as they are."""
    from endwise.runs.folder import RunFolder
    from endwise.sharing.pulling import pull as run

    _show_bars(not quiet)
    verbs = {path: "evaluate" if RunFolder(path).has_run() else "inspect" for path in run(name, target)}
    lines = [f"{path}\nNext: endwise {verb} {shlex.quote(str(path))}" for path, verb in verbs.items()]
    report(json, [{"path": path, "is_run": verb == "evaluate"} for path, verb in verbs.items()], *lines)
