"""Fields of a recipe: they say what is computed (identity), or how it is executed (execution).

A field is of the identity unless it is marked. Execution may change at any time: on resuming, among runs that are
compared, in a sweep that is begun again. Everything that asks whether two recipes agree asks here.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from pydantic.fields import FieldInfo

from endwise.config.base import Config


class FieldMark(Enum):
    """Marks in the metadata of a field: `Annotated[int, EXECUTION]`."""

    EXECUTION = "execution"
    """A setting of how something is executed: it changes no more of the numbers written than their rounding."""
    SHARED = "shared"
    """SAEs that train in one pass agree in it."""


EXECUTION, SHARED = FieldMark.EXECUTION, FieldMark.SHARED


def identity(config: Config, *, short: bool = False) -> dict[str, Any]:
    """Return what a recipe or a section of it computes: its fields as JSON, nested, without those of execution.

    Args:
        short: without those at their defaults too, so that a new field leaves it as it was.
    """
    dumped = config.model_dump(mode="json", exclude_defaults=short)
    return _part(config, dumped, lambda field: EXECUTION not in field.metadata, short)


def shared(config: Config) -> dict[str, Any]:
    """Return what recipes whose SAEs train in one pass agree in, execution included."""
    kept: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if SHARED in field.metadata:
            kept[name] = config.model_dump(mode="json", include={name})[name]
        elif isinstance(value, Config) and (inner := shared(value)):
            kept[name] = inner
    return kept


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two nested mappings differ, each with both values; None where it is not there."""
    left, right = flat(one), flat(other)
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def _part(value: Any, dumped: Any, keeps: Callable[[FieldInfo], bool], short: bool) -> Any:
    """Keep some fields of what a value was dumped as, of sections in lists and mappings too."""
    if isinstance(value, Config):
        kept: dict[str, Any] = {}
        for name, field in type(value).model_fields.items():
            if name not in dumped or not keeps(field):
                continue
            part = _part(getattr(value, name), dumped[name], keeps, short)
            if part != {} or dumped[name] == {} or not short:
                kept[name] = part
        return kept
    if isinstance(value, list | tuple):
        return [_part(each, part, keeps, short) for each, part in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _part(value[key], part, keeps, short) for key, part in dumped.items()}
    return dumped
