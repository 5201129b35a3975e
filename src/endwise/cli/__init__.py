"""The command line. Every command is a thin door to one function; torch is imported only behind it."""

from endwise.cli import runs, comparisons, features, about  # isort: skip  In this order --help lists their commands.
from endwise.cli.door import app

__all__ = ["about", "app", "comparisons", "features", "main", "runs"]


def main() -> None:
    app()
