"""Things that are known by a name, and that a file adds with one line: dictionaries, terms, formats, trackers."""

import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from endwise.common.errors import ConfigError

T = TypeVar("T")
Added = TypeVar("Added")


class Registry(Generic[T]):
    """A table from names to things, which is filled when it is first read.

    Built-in things are added as `home` is imported; those of installed packages, as their entry points in the group
    `endwise.<what>` are loaded. So whoever reads the table need not import what fills it.

    Args:
        what: what the things are, in the plural, as an error names them.
        home: the module that adds the built-in ones.
        load: imports it.
    """

    def __init__(self, what: str, home: str, load: Callable[[str], object] = import_module) -> None:
        self._what, self._home, self._load = what, home, load
        self._things: dict[str, T] = {}
        self._filled = False

    def add(self, *names: str) -> Callable[[Added], Added]:
        """Decorate what is to be known by these names.

        Raises:
            ConfigError: a name stands for something else already. The same definition, run again as in a notebook,
                replaces itself.
        """

        def added(thing: Added) -> Added:
            for name in names:
                self._put(name, thing)
            return thing

        return added

    def __getitem__(self, name: str) -> T:
        """
        Raises:
            ConfigError: there is none of this name; the message lists those there are.
        """
        self._fill()
        if name not in self._things:
            near = difflib.get_close_matches(name, self._things, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"There is no {name!r:.80} among the {self._what}: {', '.join(self.names())}.{hint}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._things

    def names(self) -> list[str]:
        """List all names, in the order in which they were added."""
        self._fill()
        return list(self._things)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        own, self._things = self._things, {}
        self._load(self._home)
        for point in entry_points(group=f"endwise.{self._what}"):
            point.load()
        for name, thing in own.items():
            self._put(name, thing)

    def _put(self, name: str, thing: Any) -> None:
        known = self._things.get(name, thing)
        if _definition(known) != _definition(thing):
            raise ConfigError(
                f"{name!r:.80} is the name of one of the {self._what} already ({_definition(known)}), so that "
                f"{_definition(thing)} cannot have it. Register it by another name."
            )
        self._things[name] = thing


def _definition(thing: Any) -> str:
    """Say where a thing, or what it is an instance of, is defined."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
