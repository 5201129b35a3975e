"""The ground of all configuration: frozen pydantic models, read from YAML, changed by dotted overrides."""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from endwise.errors import ConfigError

Section = TypeVar("Section", bound="Config")


class Config(BaseModel):
    """A frozen section of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def build(cls: type[Section], values: dict[str, Any], source: str = "the configuration") -> Section:
        """Validates `values`.

        Raises:
            ConfigError: one line per broken rule, each with the field, the value and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_describe(cls, detail) for detail in error.errors()]
            raise ConfigError(f"{source} is not valid:\n  " + "\n  ".join(lines)) from None

    @classmethod
    def read(cls: type[Section], path: Path, overrides: list[str] | None = None) -> Section:
        """Reads a YAML file and applies overrides of the form `section.key=value` (the value is YAML)."""
        return cls.build(apply_overrides(read_yaml(path), overrides or []), source=str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}. Give the path of a recipe, for example one of recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}. Give a YAML text file.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings (key: value), not {type(values).__name__}.")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=value` set; sections that are missing are made."""
    result = _copied(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            raise ConfigError(f"An override must read section.key=value; given {override!r}.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"The value in the override {override!r} is not valid YAML; quote it.") from None
        section = result
        for part in path[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"Cannot set {key!r}: {part!r} is a value, not a section.")
        section[path[-1]] = value
    return result


def _copied(values: Any) -> Any:
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, dict) else values


def _describe(model: type[BaseModel], detail: ErrorDetails) -> str:
    field = ".".join(str(part) for part in detail["loc"]) or "the recipe"
    if detail["type"] == "extra_forbidden":
        valid = sorted(_fields_at(model, detail["loc"][:-1]))
        near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1)
        return f"{field}: there is no such key; " + (
            f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
        )
    if detail["type"] == "missing":
        return f"{field}: this key is required"
    given = "" if isinstance(detail["input"], dict) else f" (given {detail['input']!r:.80})"
    return f"{field}: {detail['msg'].removeprefix('Value error, ')}{given}"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The valid keys of the section that `path` leads to."""
    for part in path:
        info = model.model_fields.get(str(part))
        if info is None:
            return set()
        candidates = [info.annotation, *get_args(info.annotation)]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return set()
        model = sections[0]
    return set(model.model_fields)
