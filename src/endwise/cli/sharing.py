"""Commands that share runs through the Hugging Face hub."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from endwise.cli.app import OR_FOLDERS, Json, Quiet, command, echo, report, run_argument


@command
def push(
    runs: Annotated[list[Path], run_argument(f"Measured run folders, {OR_FOLDERS}")],
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository; made if there is none.")],
    private: Annotated[bool, Option("--private", help="Make it private, if it is made.")] = False,
    licence: Annotated[str | None, Option(help="Identifier of the hub's, e.g. mit or apache-2.0.")] = None,
    revision: Annotated[str | None, Option(help="Branch to push to; unset: main.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be pushed; the hub is not asked.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Push runs to the Hugging Face hub: SAEs that endwise and SAELens load, and a card with their numbers.

    The same command resumes a push that broke off; of runs that were pushed before only what changed is sent.
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
        echo("! The card states no licence, without which others may not use it. Say one with --licence.", err=True)


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
    """Bring runs from the Hugging Face hub to folders that evaluate and pareto read; other SAEs as they are."""
    from endwise.runs.folder import RunFolder
    from endwise.sharing.pulling import pull as run

    _show_bars(not quiet)
    verbs = {path: "evaluate" if RunFolder(path).has_run() else "inspect" for path in run(name, target)}
    lines = [f"{path}\nNext: endwise {verb} {shlex.quote(str(path))}" for path, verb in verbs.items()]
    report(json, [{"path": path, "is_run": verb == "evaluate"} for path, verb in verbs.items()], *lines)
