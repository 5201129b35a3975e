"""The dotted keys of a recipe, as a sweep names them: which there are, and how sections are written out in them."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from endwise.common.errors import ConfigError
from endwise.config.base import Config, section_of
from endwise.config.run import RunConfig

RANGE, TARGET, OUT = "log_range", "target", "out"


def recipe_fields() -> dict[str, FieldInfo]:
    """Every field of a recipe by its dotted key, `training.tokens` for one, sections aside."""
    return dict(_fields(RunConfig, ""))


def _fields(section: type[Config], prefix: str) -> list[tuple[str, FieldInfo]]:
    found: list[tuple[str, FieldInfo]] = []
    for name, field in section.all_fields().items():
        if (inner := section_of(field)) is not None:
            found += _fields(inner, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", field))
    return found


def flattened(values: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The values by dotted key: a section that is written out, as in `{training: {tokens: 1}}`, becomes its keys.

    Raises:
        ConfigError: a key is there twice, or is none of a recipe's.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and RANGE not in value and dotted != TARGET:
            parts = flattened(value, where, f"{dotted}.")
        else:
            _check_exists(dotted, where)
            parts = {dotted: value}
        if twice := result.keys() & parts.keys():
            raise ConfigError(f"{where} sets {min(twice)} twice. Keep one.")
        result |= parts
    return result


def takes_whole_numbers(key: str) -> bool:
    """Whether a field's numbers have no fractions."""
    field = recipe_fields().get(key)
    return field is not None and int in (kinds := _kinds(field.annotation)) and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation} if not inner else {kind for each in inner for kind in _kinds(each)}


def _check_exists(key: str, where: str) -> None:
    fields = recipe_fields()
    sections = {name.rpartition(".")[0] for name in fields}
    if key in fields or key in sections or key == TARGET:
        return
    within = next((name for name in (*fields, TARGET) if key.startswith(f"{name}.")), None)
    if within in fields and get_origin(fields[within].annotation) is dict:
        return  # names of the user's own, which the recipe checks
    if within is not None:
        given = key.removeprefix(f"{within}.")
        takes = "{ce_increase: 0.1} or {l0: 40}" if within == TARGET else "a value, a list, or {log_range: [...]}"
        raise ConfigError(f"{where}: {within:.200} takes {takes}, and has no part {given!r:.80}.")
    raise ConfigError(f"{where}: a recipe has no key {key!r:.200}; {_nearest(key)}")


def _nearest(key: str) -> str:
    fields = list(recipe_fields())
    last = key.rpartition(".")[2]
    near = [name for name in fields if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key[:200], fields, n=1)
    if not near:
        ends = {name.rpartition(".")[2]: name for name in fields}
        near = [ends[end] for end in difflib.get_close_matches(last[:80], list(ends), n=1)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it has for example {', '.join(EXAMPLES)}, and docs/configuration.md lists all."


EXAMPLES = ("site", "seed", "objective.kind", "objective.sparsity.coefficient", "dictionary.ratio", "training.tokens")
