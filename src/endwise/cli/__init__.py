"""The command line. Every command is a thin door to one function; torch is imported only behind it."""

from endwise.cli import about, comparisons, features, runs  # isort: skip  In this order --help lists their commands.
from endwise.cli.app import app, warnings_in_one_line

__all__ = ["about", "app", "comparisons", "features", "main", "runs"]


def main() -> None:
    warnings_in_one_line()
    app()
