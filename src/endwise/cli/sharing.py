"""Commands that share runs through the Hugging Face hub."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from endwise.cli.app import OR_FOLDERS, command, echo, run_argument


@command
def push(
    runs: Annotated[list[Path], run_argument(f"Measured run folders, {OR_FOLDERS}")],
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, Option("--private", help="Make it private, if it is made.")] = False,
    licence: Annotated[str | None, Option(help="Identifier of the hub's, e.g. mit or apache-2.0.")] = None,
    revision: Annotated[str | None, Option(help="Branch to push to; unset: main.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be pushed; the hub is not asked.")] = False,
) -> None:
    """Push runs to the Hugging Face hub: SAEs that endwise and SAELens load, and a card with their numbers.

    The same command resumes a push that broke off; of runs that were pushed before only what changed is sent.
    """
    from endwise.common.machine import size_text
    from endwise.sharing.pushing import push as run

    done = run(runs, repo, private=private, licence=licence, revision=revision, dry_run=dry_run)
    for name, size in done.files.items():
        echo(f"{size_text(size):>12}  {name}")
    if dry_run:
        echo(done.card)
        echo(f"Nothing was sent. Without --dry-run it goes to {done.name}.")
        return
    if licence is None and "\nlicense:" not in done.card:
        echo("! The card states no licence, without which others may not use it. Say one with --licence.", err=True)
    echo(f"Pushed {len(runs)} run{'' if len(runs) == 1 else 's'}: {done.name}, commit {done.commit}")


@command
def pull(
    name: Annotated[
        str, Argument(metavar="OWNER/NAME[/PATH]", help="With @REVISION behind NAME; or release/sae_id of SAELens.")
    ],
    target: Annotated[Path | None, Argument(metavar="[OUT]", help="Folder; unset: runs/NAME/PATH.")] = None,
) -> None:
    """Bring runs from the Hugging Face hub to folders that evaluate and pareto read; other SAEs as they are."""
    from endwise.runs.folder import RunFolder
    from endwise.sharing.pulling import pull as run

    for path in run(name, target):
        verb = "evaluate" if RunFolder(path).has_run() else "inspect"
        echo(f"{path}\nNext: endwise {verb} {shlex.quote(str(path))}")
