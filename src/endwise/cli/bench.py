"""The command that runs benchmark suites of others."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from endwise.cli.app import Json, command, echo, print_json, status


@command
def bench(
    run: Annotated[Path, Argument(help="A run folder with an SAE.")],
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
    out: Annotated[Path | None, Option(help="Folder for the results; unset: bench/ in the run.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what it would ask the network for.")] = False,
    json: Json = False,
) -> None:
    """Run a benchmark suite of others on a run, in an environment of its own: SAEBench's, sae-probes."""
    from rich.console import Console

    from endwise.common.terminal import Grid, show
    from endwise.suites.bench import Benching

    benching = Benching(run, suite, python=python, model=model, data=data, out=out, overrides=settings)
    asked = benching.asks()
    say = status if json else echo
    say(f"{suite} asks the Hugging Face hub for " + (", ".join(asked) if asked else "nothing"))
    if dry_run:
        return
    found = benching.start(say)
    if json:
        print_json({"file": found.file, "numbers": found.numbers, "endwise": found.ours})
        return
    others = [found.ours] if found.ours else []
    headings = (suite, "its number", *("endwise evaluate" for _ in others))
    rows = [
        (name, *(f"{each[name]:.5g}" if name in each else "" for each in [found.numbers, *others]))
        for name in found.numbers
    ]
    show(Grid(headings, rows), Console())
    echo(f"Its numbers: {found.file}")
