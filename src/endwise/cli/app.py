"""Application that all commands belong to: how they speak, how they fail.

Every command that can have one of these options has it, and `tests/cli/test_alike.py` names those that cannot: `--json`
where a command ends with a result; `--quiet` where it shows progress; `--out` where it makes a file or folder of its
own, unless an argument says where; `--again` where it takes what was made before.
"""

import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from endwise.common.errors import ConfigError, EndwiseError
from endwise.common.files import check_can_write, expanded
from endwise.common.remedies import reason, remedy
from endwise.common.text import printable

LONGEST = 1000
"""Characters of a command's first sentence: all of it."""


class Commands(TyperGroup):
    """Lists the commands with their first sentences whole, over as many lines as they take."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(LONGEST)) for name, each in commands if each is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="endwise",
    cls=Commands,
    help="Train sparse autoencoders on what a language model does, and compare them with local ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run_path(text: str) -> Path:
    """Refuse an empty name, which would mean all runs below the current folder, and stands there by mistake."""
    if not text:
        raise typer.BadParameter("a run's name is empty. Give its folder, or . for all runs in this one.")
    return Path(text)


def run_argument(help: str) -> Any:  # noqa: A002  As typer calls it.
    return Argument(help=help, parser=run_path, metavar="RUN...", show_default=False)


OR_FOLDERS = "or folders that hold some (a sweep's)."
Runs = Annotated[list[Path], run_argument(f"Run folders, {OR_FOLDERS}")]
Measured = Annotated[list[Path], run_argument(f"Measured run folders, {OR_FOLDERS}")]
Model = Annotated[str, Argument(help="embedded, a local folder or .gguf file, or a Hugging Face hub id.")]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, e.g. objective.sparsity.coefficient=3"),
]
Quiet = Annotated[bool, Option("--quiet", help="Show no progress.")]
Json = Annotated[bool, Option("--json", help="Print JSON instead.")]
Again = Annotated[bool, Option("--again", help="Redo what was done before.")]
Tokens = Annotated[int | None, Option(min=1, help="Held-out tokens, instead of each recipe's.")]


def _version(asked: bool) -> bool:
    if asked:
        from endwise import __version__

        typer.echo(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _options(
    _: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def results_folder(name: str) -> Any:
    """The option `--out` of a command that compares runs."""
    where = "in the first folder, or beside it if it is a run"
    return Option(help=f"Folder for tables, figures and {name}.html; unset: {name}/ {where}.")


def results_beside(runs: list[Path], name: str) -> Path:
    """Return the folder for results where `--out` is unset: beside the first run, or in a first folder of runs.

    Raises:
        RunFolderError: it is no folder, or nothing can be written there, which is better known before the work than
            after it.
    """
    from endwise.runs.folder import RunFolder
    from endwise.runs.no_run import no_run

    if runs[0].is_file():
        raise no_run(runs[0])
    folder = (runs[0].parent if RunFolder(runs[0]).has_run() else runs[0]) / name
    check_can_write(folder)
    return folder


P = ParamSpec("P")
R = TypeVar("R")


def echo(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def status(text: str) -> None:
    """Print progress to stderr."""
    echo(text, err=True)


def saying(quiet: bool) -> Callable[[str], None]:
    """Return the function that prints progress, or one that does nothing."""
    return (lambda _: None) if quiet else status


def print_json(value: Any) -> None:
    """Print a value as JSON; what is no finite number, which JSON has not, as null."""
    from json import dumps

    typer.echo(dumps(_finite(value), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(json: bool, value: Any, *lines: str) -> None:
    """Print lines; as JSON, the record they are made from."""
    if json:
        print_json(value)
    for line in () if json else lines:
        echo(line)


def present(json: bool, show: Callable[[], None], write: Callable[[], Path]) -> None:
    """Show results, then write their page and tables; as JSON, print the rows of these tables."""
    from endwise.common.tables import recorded_tables

    if not json:
        show()
    with recorded_tables() as tables:
        page = write()
    if json:
        print_json({"page": page, **tables})
    else:
        echo(f"The page, figures and tables: {page}")


def warnings_in_one_line() -> None:
    """Show a warning by what it says, without the line of code that gave it; transformers' own only if asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # see `models.quiet`

    def shown(message: Warning | str, *_: Any, **__: Any) -> None:
        from endwise.common.terminal import is_new_line

        if is_new_line(line := f"warning: {' '.join(str(message).split())}"):
            status(line)

    warnings.showwarning = shown


def _processes() -> str:
    """Number of processes that a launcher has started; "1" without one."""
    return os.environ.get("WORLD_SIZE", "1")


def _fail(message: str, code: int) -> NoReturn:
    process = f" (process {os.environ.get('RANK')})" if _processes() != "1" else ""
    echo(f"endwise{process}: {message}", err=True)
    raise typer.Exit(code)


def _at_home(value: Any) -> Any:
    """Paths with `~` resolved, which a shell leaves as it stands in `--out=~/x`."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return expanded(value) if isinstance(value, Path) else value


IN_SEVERAL_PROCESSES = frozenset({"train", "evaluate", "harvest", "doctor", "version"})
"""Commands that share their work among the processes of torchrun, or say something of each."""


def _refuse_torchrun(name: str) -> None:
    """
    Raises:
        ConfigError: torchrun started the command several times, and it would do the same each time.
    """
    if (processes := _processes()) == "1" or name in IN_SEVERAL_PROCESSES:
        return
    from endwise.common.processes import launched

    if launched():
        shared = "train, evaluate and harvest share their work among processes"
        name = name.replace("_", "-")
        raise ConfigError(
            f"torchrun started endwise {name} {processes} times; only {shared}. Start it without torchrun."
        )


def _end_unless_failing(number: int, _frame: object) -> None:
    """End at a SIGTERM as any process does, but let an error that is on its way be reported: when one process of
    several is gone, torchrun ends the others while they say so.
    """
    if sys.exception() is None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Add a command. A folder `--out` that cannot be written ends it before the work. Our own errors end it with one
    message and an exit code; anything else is a bug and keeps its traceback.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from endwise.common.terminal import printing_once

        try:
            _refuse_torchrun(function.__name__)
            if _processes() != "1":
                signal.signal(signal.SIGTERM, _end_unless_failing)
            kwargs.update({name: _at_home(value) for name, value in kwargs.items()})
            if isinstance(out := kwargs.get("out"), Path):
                check_can_write(out)
            with printing_once():
                return function(*args, **kwargs)
        except EndwiseError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("stopped", 130)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except OSError as error:  # of the machine, not of the program: a disk that fails, a file that may not be read
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{reason(error)}. {remedy(error)}", 1)

    return app.command()(run)
