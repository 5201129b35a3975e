"""A registry: filled at the first look-up, which names the nearest of unknown names."""

import sys
from types import ModuleType

import pytest

from endwise.common.errors import ConfigError
from endwise.common.registry import Registry


@pytest.fixture
def registry(monkeypatch):
    registry = Registry("animals", "home_of_animals")
    monkeypatch.setitem(sys.modules, "home_of_animals", ModuleType("home_of_animals"))
    registry.add("cat", "felis")("built-in cat")
    return registry


def test_a_thing_is_known_by_each_of_its_names(registry):
    assert registry["cat"] == registry["felis"] == "built-in cat"
    assert registry.names() == ["cat", "felis"] and "cat" in registry and "dog" not in registry


def test_an_unknown_name_is_told_with_the_nearest(registry):
    with pytest.raises(ConfigError, match=r"no 'cta' among the animals: cat, felis. Did you mean cat"):
        registry["cta"]


def test_a_name_stands_for_one_thing(registry):
    @registry.add("ox")
    class Ox:
        pass

    again = type("Ox", (), {"__module__": Ox.__module__, "__qualname__": Ox.__qualname__})
    registry.add("ox")(again)  # a notebook's cell, run again
    assert registry["ox"] is again
    with pytest.raises(ConfigError, match=r"'ox' is the name of one of the animals already .*Ox.*Registry"):
        registry.add("ox")(Registry)
    assert registry["ox"] is again


def test_a_built_in_name_cannot_be_taken_before_it_is_read():
    registry = Registry("animals", "home_of_animals", lambda _: registry.add("cat")(ModuleType))
    registry.add("cat")(Registry)
    with pytest.raises(ConfigError, match=r"'cat' is the name of one of the animals already"):
        registry.names()


def test_the_home_is_imported_at_the_first_look_up_alone():
    imported = []
    registry = Registry("animals", "endwise.nowhere", imported.append)
    registry.add("cat")("cat")
    assert not imported
    assert registry["cat"] == "cat" and registry.names() == ["cat"]
    assert imported == ["endwise.nowhere"]
