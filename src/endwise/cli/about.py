"""Commands that say what there is."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from endwise.cli.app import Json, Model, command, echo, print_json, status


@command
def sites(
    model: Model = "embedded",
    gguf_file: Annotated[str | None, Option(help="GGUF file inside the folder or repository.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run code the model ships with.")] = False,
    json: Json = False,
) -> None:
    """List the sites of a model, where an SAE can be spliced in, with their widths; on stderr, those where none can."""
    from endwise.training.planning.outline import sites_of

    found = sites_of(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if json:
        print_json({"model": model, "sites": found.widths, "not_offered": found.unspliceable})
        return
    for name, width in found.widths.items():
        echo(f"{name:<34}{width:>8}")
    for name, reason in found.unspliceable.items():
        status(f"{name}: not offered: {reason}")


@command
def runs(
    folders: Annotated[list[Path] | None, Argument(metavar="[FOLDER]...", help="Where to look; unset: runs.")] = None,
    json: Json = False,
) -> None:
    """List the runs in folders: what each trains, how far it is, and what it measured."""
    from endwise.evaluation.listing import list_runs, print_runs

    found = list_runs(folders or [Path("runs")])
    if json:
        print_json([each.to_json() for each in found])
    else:
        print_runs(found)


@command
def doctor(json: Json = False) -> None:
    """Check this installation: versions, processor, GPU, cache, disk, and known conflicts.

    Exit code: 0 if no problem was found, 1 otherwise.
    """
    from endwise.common.doctor import examine

    found = examine()
    if json:
        print_json(found.to_json())
    else:
        for what, fact in found.facts.items():
            echo(f"{what:<16}{fact}")
        for problem in found.problems:
            echo(f"! {problem}")
        echo("No problem was found with this installation." if found.is_well else "See the lines that begin with !.")
    if not found.is_well:
        raise typer.Exit(1)


@command
def version() -> None:
    """Print the version."""
    from endwise import __version__

    typer.echo(__version__)
