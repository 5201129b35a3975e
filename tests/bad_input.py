"""What every command owes whoever gives it bad input: one plain message, no traceback, nothing hidden in it."""

import unicodedata

from click.testing import Result
from typer.testing import CliRunner

from endwise.cli import app

HOSTILE = "<script>alert(1)</script>\x1b[31m[red]x[/][/nope]\x07\r\x9b5m\u202eevil\u2066 \"'&"
"""Tags, escape sequences of terminals, rich's markup, characters that turn a line around."""
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def hidden_in(text: str) -> set[str]:
    """The characters of a text that show nothing themselves, but may change how the others are shown."""
    return {character for character in text if unicodedata.category(character) in HIDDEN} - set("\n\u200c\u200d")


def told(*arguments: object) -> Result:
    """Runs a command in this process: it ends well, or with a message of ours or of the command line's own."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        assert result.stderr.startswith(("endwise: ", "Usage: ")), result.stderr
        assert result.stderr.startswith("Usage: ") or not hidden_in(result.output), hidden_in(result.output)
    return result


def refused(*arguments: object, code: int | None = None) -> str:
    """The message of a command that must fail plainly."""
    result = told(*arguments)
    assert result.exit_code not in (0, 1), result.output
    assert code in (None, result.exit_code), result.output
    return result.stderr.strip()
