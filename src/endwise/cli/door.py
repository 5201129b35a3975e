"""What all commands share: the application they belong to, how they speak, how they fail."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from endwise.errors import EndwiseError
from endwise.printable import printable
from endwise.reading import expanded
from endwise.remedies import reason, remedy

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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

P = ParamSpec("P")
R = TypeVar("R")


def say(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def aside(text: str) -> None:
    """To stderr: what is being done, while it is."""
    say(text, err=True)


def _fail(message: str, code: int) -> NoReturn:
    process = f" (process {os.environ.get('RANK')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    say(f"endwise{process}: {message}", err=True)
    raise typer.Exit(code)


def _at_home(value: Any) -> Any:
    """Paths with `~` resolved, which a shell leaves as it stands in `--out=~/x`."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return expanded(value) if isinstance(value, Path) else value


def plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Turns our own errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            kwargs.update({name: _at_home(value) for name, value in kwargs.items()})
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
            _fail(f"{where}{reason(error)}. {remedy(error)}", 1)

    return run
