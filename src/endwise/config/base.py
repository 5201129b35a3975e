"""The ground of all configuration: frozen pydantic models, read from YAML, changed by dotted overrides."""

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from endwise.common.errors import ConfigError
from endwise.common.files import expanded
from endwise.common.remedies import reason, remedy
from endwise.config.strict_yaml import parse_yaml

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
LARGEST_FILE = 100_000
"""Bytes of a recipe; those that ship have about a thousand."""
LONGEST = 4096
"""Characters of a value: what most systems take as a path."""
LINES = 20
"""Broken rules that one message lists."""

Section = TypeVar("Section", bound="Config")
Built = TypeVar("Built")
Positive = Annotated[int, Field(gt=0, le=10**15)]
"""No corpus is as large as the bound, and every integer up to it is exact in all that reads it."""
SiteName = Annotated[str, BeforeValidator(lambda given: getattr(given, "name", given))]
"""The name of a site; a site itself (`models.sites`) will do."""


class Config(BaseModel):
    """A frozen section of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Any:
        """List what differs from the defaults, which distinguishes one from another."""
        own = {
            name: each.get_default(call_default_factory=True, validated_data={})
            for name, each in type(self).model_fields.items()
        }
        return [(name, value) for name, value in self if name not in own or value != own[name]]

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_named(cls, value: Any) -> Any:
        """Refuse what no file system, hub or tokenizer takes, and each fails on in its own way; take a path's text."""
        if isinstance(value, str | Path):
            text = str(value)
            if not value or len(text) > LONGEST:
                raise ValueError(f"must have 1 to {LONGEST:,} characters; leave it out for the default")
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("must hold neither NUL nor bytes that are not UTF-8; leave them out")
            return text
        return value

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        return expanded(value) if isinstance(value, Path) else value

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> "type[Config]":
        """The section whose rules hold for these values: this one, unless a value chooses among several."""
        return cls

    @classmethod
    def all_fields(cls) -> dict[str, FieldInfo]:
        """Every key that the section may have, whatever its values choose."""
        return cls.model_fields

    @classmethod
    def build(cls: type[Section], values: dict[str, Any], source: str = "the configuration") -> Section:
        """Validate `values`.

        Raises:
            ConfigError: one line per broken rule, each with the field, the value and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_describe(cls, values, detail) for detail in error.errors()[:LINES]]
            lines += [f"and {error.error_count() - LINES} more"] if error.error_count() > LINES else []
            raise ConfigError(f"{source} is not valid:\n  " + "\n  ".join(lines)) from None

    @classmethod
    def of(cls: type[Section], given: "Section | Mapping[str, Any]") -> Section:
        """Take a section as it is, or a mapping of its keys.

        Raises:
            ConfigError: see `build`.
        """
        return given if isinstance(given, cls) else cls.build(dict(given), cls.__name__)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @classmethod
    def read(cls: type[Section], path: str | Path, overrides: Sequence[str] | None = None) -> Section:
        """Read a YAML file and apply overrides of the form `section.key=value` (the value is YAML)."""
        return changed_and_built(read_yaml(Path(path)), overrides or [], cls.changed, cls.build, str(path))

    @classmethod
    def changed(cls, values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of `values` with each dotted key set, an entry of a list by its number, and without what those leave
        no room for.
        """
        return with_values(values, changes)

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=_DUMPER, sort_keys=False)


def section_of(field: FieldInfo) -> type[Config] | None:
    """Return the section that a field holds, or may hold; None: it holds a value."""
    candidates = [field.annotation, *get_args(field.annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Config)), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: there is no such file, or it is no mapping in YAML; see `strict_yaml`.
    """
    path = expanded(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"{path} has more than {LARGEST_FILE:,} bytes, which no recipe needs. Give a recipe.")
        values = parse_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}. Give the path of a recipe, for example one of recipes/.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {reason(error)}. {remedy(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"Cannot read {path}: {error}. Give a YAML text file.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML for a recipe: {error}. Correct it there.") from None
    if not isinstance(values, dict):
        held = {"NoneType": "is empty", "list": "holds a list"}.get(type(values).__name__, "holds a single value")
        raise ConfigError(f"{path} must hold a mapping of settings (key: value); it {held}. Write its keys into it.")
    return values


def changed_and_built(
    values: dict[str, Any],
    overrides: Sequence[str],
    change: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]],
    build: Callable[[dict[str, Any], str], Built],
    source: str,
) -> Built:
    """Change values and build what they say; where it is the changes that break a rule, the error names them, not the
    source alone.
    """
    changed = change(values, read_overrides(list(overrides)))
    try:
        return build(changed, source)
    except ConfigError:
        if not overrides or not _builds(build, values):
            raise
    return build(changed, f"{source} with {' '.join(f'{each:.200}' for each in overrides)}")


def _builds(build: Callable[[dict[str, Any], str], object], values: dict[str, Any]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            build(values, "")
        except ConfigError:
            return False
    return True


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=value` set; sections that are missing are made."""
    return with_values(values, read_overrides(overrides))


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """The value of each dotted key in `a.b.c=value`."""
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"An override must read section.key=value; given {override!r:.200}.")
        try:
            changes[key] = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(
                f"The value in the override {override!r:.200} is not valid YAML ({error}); quote it."
            ) from None
    return changes


def with_values(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with the value of each dotted key set; sections that are missing are made."""
    result = _copied(values)
    for key, value in changes.items():
        path = key.split(".")
        if not all(path):
            raise ConfigError(f"A key must read section.key; given {key!r:.200}.")
        section: Any = result
        for part in path[:-1]:
            section = section[_at(section, part, key)] if isinstance(section, list) else section.setdefault(part, {})
            if not isinstance(section, dict | list):
                raise ConfigError(f"Cannot set {key!r:.200}: {part!r:.80} is a value, not a section.")
        section[_at(section, path[-1], key)] = value
    return result


def _at(section: Any, part: str, key: str) -> Any:
    """Return the key or place of a part of a dotted key in its section: in a list, the entry of that number."""
    entries = section if isinstance(section, list) else None
    if entries is None:
        return part
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    raise ConfigError(
        f"Cannot set {key!r:.200}: the list has the entries 0 to {len(entries) - 1}, and no {part!r:.80}. Name one of "
        "them by its number."
    )


def _copied(values: Any) -> Any:
    if isinstance(values, list):
        return [_copied(value) for value in values]
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, dict) else values


def _describe(model: type[Config], values: Any, detail: ErrorDetails) -> str:
    field = ".".join(f"{part!s:.80}" for part in detail["loc"]) or "the recipe"
    if detail["type"] == "extra_forbidden":
        valid = sorted(_fields_at(model, values, detail["loc"][:-1]))
        near = difflib.get_close_matches(f"{detail['loc'][-1]!s:.80}", valid, n=1)
        return f"{field}: there is no such key; " + (
            f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
        )
    if detail["type"] == "missing":
        return f"{field}: this key is required"
    if detail["type"] == "path_type":
        return f"{field}: must be a path (given {_shown(detail['input'])})"
    if detail["type"] == "too_short":
        least = detail.get("ctx", {}).get("min_length", 1)
        return f"{field}: must hold at least {least} (given {_shown(detail['input'])})"
    given = "" if isinstance(detail["input"], dict) else f" (given {_shown(detail['input'])})"
    return f"{field}: {detail['msg'].removeprefix('Value error, ')}{given}"


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list that holds itself
        return f"a value that cannot be written out, {type(value).__name__}"


def _fields_at(model: type[Config], values: Any, path: tuple[int | str, ...]) -> set[str]:
    """The valid keys of the section that `path` leads to."""
    for part in path:
        if isinstance(part, int):  # one of a list, whose section is the model already
            values = values[part] if isinstance(values, list | tuple) and part < len(values) else None
            continue
        info = model.model_fields.get(str(part))
        if info is None:
            return set()
        section = section_of(info)
        if section is None:
            return set()
        values = values.get(part) if isinstance(values, Mapping) else None
        model = section.chosen(values) if isinstance(values, Mapping) else section
    return set(model.model_fields)
