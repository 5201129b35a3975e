"""The seam of suites: what one needs, what it asks for, and which of its numbers endwise has too."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from endwise.common.errors import ConfigError
from endwise.common.registry import Registry
from endwise.config.base import Config

Given = TypeVar("Given", bound=Config)

INSIDE = Path(__file__).parent / "inside"


class Suite(ABC, Generic[Given]):
    """A suite with the settings that it has been given.

    Args:
        local: a folder of data to use instead of its own data sets.

    Raises:
        ConfigError: it takes no such data, or finds none in the folder.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    """The distribution that pip installs."""
    module: ClassVar[str]
    """The module by which an environment is asked if it is there."""
    program: ClassVar[Path]
    """Program that its interpreter runs, in a folder of its own: it reads `job.json` (see `inside/opening.py`), keeps
    what it makes in `results/` and `cache/`, and at the end writes its numbers as an object, `done.json`.
    """
    Settings: ClassVar[Any]
    """Class of its settings: a `Config`."""
    takes_heldout: ClassVar[bool] = False
    """True if it can measure on sequences of tokens: the run's held-out text."""

    def __init__(self, settings: Given, local: Path | None = None) -> None:
        self.settings, self.local = settings, local

    @abstractmethod
    def data_sets(self) -> list[str]:
        """List the data sets that it asks the Hugging Face hub for, by their names there."""

    def ours(self, evaluation: Mapping[str, Any]) -> dict[str, float]:
        """Pick what `evaluation.json` has under the suite's names of its numbers, where both measure one thing."""
        return {}

    def takes_no_data(self, remedy: str) -> ConfigError:
        return ConfigError(f"{self.name} takes no --data; given {str(self.local)!r:.200}. {remedy}")


SUITES: Registry[type[Suite[Any]]] = Registry("suites", "endwise.suites")
