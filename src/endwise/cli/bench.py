"""The command that runs benchmark suites of others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from endwise.cli.app import Json, Quiet, command, echo, print_json, report, saying, status

if TYPE_CHECKING:
    from endwise.suites.bench import Bench


@command
def bench(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder, or a folder that holds some (a sweep's).")],
    settings: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Changes to the suite's settings.")
    ] = None,
    suite: Annotated[str, Option(help="saebench-core, saebench-sparse-probing, sae-probes, ...")] = "saebench-core",
    python: Annotated[
        Path | None, Option(help="Interpreter of the environment that has the suite; unset: this one.")
    ] = None,
    model: Annotated[
        str | None, Option(help="A local folder or a Hugging Face hub id; unset: that of the recipe.")
    ] = None,
    data: Annotated[
        str | None,
        Option(help="run: the run's held-out text; or a folder of local data; unset: the suite's own data sets."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for the results, of several runs one for each in it; unset: bench/ in a run."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what it would ask the network for.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run a benchmark suite on a run, in the suite's own environment: SAEBench's, sae-probes."""
    from endwise.runs.finding import trained_runs
    from endwise.suites.bench import Benching

    runs = trained_runs(run)
    single = len(runs) == 1
    given: dict[str, Any] = {"python": python, "model": model, "data": data, "overrides": settings}
    benchings = [Benching(each, suite, **given, out=out if out is None or single else out / each.name) for each in runs]
    asked = dict.fromkeys(name for each in benchings for name in each.asks())
    line = f"{suite} asks the Hugging Face hub for {', '.join(asked) or 'nothing'}"
    if dry_run:
        report(json, {"asks": list(asked)}, line)
        return
    if not quiet:
        (status if json else echo)(line)
    found = {run: benching.start(saying(quiet)) for run, benching in zip(runs, benchings, strict=True)}
    if json:
        print_json([{"run": run, "file": f.file, "numbers": f.numbers, "endwise": f.ours} for run, f in found.items()])
        return
    for each in found.values():
        _show(suite, each)


def _show(suite: str, found: "Bench") -> None:
    """Print the suite's numbers, beside those of endwise, and where they are kept."""
    from endwise.common.terminal import Grid, show

    others = [found.ours] if found.ours else []
    headings = (suite, "its number", *("endwise evaluate" for _ in others))
    rows = [
        (name, *(f"{each[name]:.5g}" if name in each else "" for each in [found.numbers, *others]))
        for name in found.numbers
    ]
    show(Grid(headings, rows))
    echo(f"Its numbers: {found.file}")
