"""What a dashboard shows of explanations, whoever wrote them."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from endwise.features.explanations import read_explanations as read


@runtime_checkable
class Explanation(Protocol):
    """What a feature stands for, in words, and how well the words tell where it fires."""

    @property
    def text(self) -> str: ...
    @property
    def detection(self) -> float | None:
        """Balanced accuracy of telling texts in which it fires from others, 0 to 1; None: not scored."""

    @property
    def fuzzing(self) -> float | None:
        """The same of telling tokens at which it fires from others."""


@runtime_checkable
class Explanations(Protocol):
    def of(self, feature: int) -> Explanation | None: ...


Explained = Callable[[Path], Explanations | None]
"""From a run's folder; None where its features were not explained."""


def read_explanations(run: Path) -> Explanations | None:
    """A run's explanations, None where there are none."""
    return read(run)
