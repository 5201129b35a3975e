"""The command line. Every command is a thin door to one function; torch is imported only behind it."""

from endwise.cli import beginning, about, comparisons, features, steering, files, runs, bench  # isort: skip  In this order --help lists commands.
from endwise.cli.app import app, warnings_in_one_line

__all__ = [
    "about",
    "app",
    "beginning",
    "bench",
    "comparisons",
    "features",
    "files",
    "main",
    "runs",
    "steering",
]


def main() -> None:
    warnings_in_one_line()
    app()
