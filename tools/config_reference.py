"""Writes docs/configuration.md from the definitions of recipes and sweeps: `python tools/config_reference.py`.

Keys, types, rules and defaults come from the pydantic models of `endwise.config.run` and
`endwise.sweeps.sweep_config`; their meaning from the strings that stand under the fields there. With `--check` nothing
is written, and the exit code is 1 where the page is stale.
"""

import argparse
import ast
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from endwise.config.base import Config, section_of
from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.config.fields import EXECUTION
from endwise.config.places import PlaceConfig, PlacesConfig
from endwise.config.recipes import find_recipe, find_sweep, recipe_names, sweep_names
from endwise.config.run import RunConfig
from endwise.sweeps.sweep_config import SweepConfig, Target

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEADING = """\
# Configuration

<!-- Written by tools/config_reference.py from src/endwise/config/ and src/endwise/sweeps/sweep_config.py; edit
there, then run `make docs`. -->

A recipe is a YAML file with the keys below; `endwise train` takes its path, or the name of one that ships, and then any
number of changes:

```sh
endwise train my-recipe.yaml objective.sparsity.coefficient=3 seed=1
```

The value of a change is YAML. The smallest recipe names a site, a size, an objective and an amount of training; with
nothing else it runs on the embedded model and corpus:

```yaml
site: blocks.3.hook_resid_pre
dictionary:
  ratio: 12
objective:
  kind: e2e
  sparsity:
    coefficient: 1.0
training:
  tokens: 600_000
```

Unknown keys, values that break a rule and keys that are missing are refused before anything is loaded, each with one
line that names the key, the value and the remedy. So are a key that is there twice, aliases that unfold into more than
10,000 values and a file of more than 100,000 bytes; anchors, aliases and merge keys of honest size work. A run folder's
`config.yaml` is the recipe with every default filled in, and can be trained again with another `out`.

A key says what is computed, or how it is executed. The second kind may be changed when a run is resumed
(`endwise train --resume RUN training.microbatch=2`), and does not keep runs apart that are compared or swept.
`out` is where the folder lies: move the folder itself.
"""

SEVERAL = """\
## A recipe for several places

With `places` in place of `site` and `writes` a recipe is one for [several places](joint.md). Its `dictionary`,
`objective`, `seed` and `init_from` stand for each of them; its other sections are as above.
"""

SWEEPS = """\
## A sweep

A sweep is a YAML file of its own, with the keys below; [sweeps](sweeps.md) says how to write one.
"""

TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "any value"}
TYPES |= {PlaceConfig: "mapping"}
TABLE = ("| key | value | default | meaning |", "|---|---|---|---|")
BOUNDS = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}


def reference() -> str:
    """The whole page."""
    recipes = _listed("Recipes", "train", {name: find_recipe(name) for name in recipe_names()})
    sweeps = _listed("Sweeps", "sweep", {name: find_sweep(name) for name in sweep_names()})
    keys_of_sweeps = (*_sections(SweepConfig, "", "### Its own keys", "###"), *_sections(Target, "", "### A target"))
    return "\n".join(
        [
            HEADING,
            *_sections(RunConfig, "", "## The recipe itself"),
            _several(),
            recipes,
            SWEEPS,
            *keys_of_sweeps,
            sweeps,
        ]
    )


def _several() -> str:
    """Tables of the further keys of a recipe for several places."""
    meanings = _docstrings(PlacesConfig)
    rows = [_row(key, PlacesConfig.model_fields[key], meanings[key]) for key in ("places", "joint", "inputs")]
    return "\n".join([SEVERAL, *TABLE, *rows, ""])


def _sections(section: type[Config], prefix: str, title: str, inner_title: str = "##") -> Iterator[str]:
    """A table for the section's own keys, then the sections inside it.

    Args:
        inner_title: what stands before the name of a section inside it.
    """
    meanings = _meanings(section)
    rows, inner = [], []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if (below := section_of(field)) is not None:
            inner.append((below, f"{key}."))
        else:
            rows.append(_row(key, field, meanings.get(name, "")))
    table = [*TABLE, *rows]
    yield "\n".join([title, "", inspect.cleandoc(section.__doc__ or ""), "", *table, ""])
    for inner_section, inner_prefix in inner:
        yield from _sections(inner_section, inner_prefix, f"{inner_title} `{inner_prefix.rstrip('.')}`", inner_title)
        if inner_section is DictionaryConfig:
            yield from _architectures(inner_prefix)


def _architectures(prefix: str) -> Iterator[str]:
    """A table for the own keys of each architecture that has any."""
    for name in dict.fromkeys(ARCHITECTURES[name].architecture for name in ARCHITECTURES.names()):
        section = ARCHITECTURES[name].Config
        own = {key: field for key, field in section.model_fields.items() if key not in DictionaryConfig.model_fields}
        if own and section.__module__.startswith("endwise."):  # not one that a test has added
            meanings = _meanings(section)
            rows = [_row(f"{prefix}{key}", field, meanings.get(key, "")) for key, field in own.items()]
            yield "\n".join(
                [f"### `architecture: {name}`", "", inspect.cleandoc(section.__doc__ or ""), "", *TABLE, *rows, ""]
            )


def _row(key: str, field: FieldInfo, meaning: str) -> str:
    if EXECUTION in field.metadata:
        meaning = f"{meaning} *May change on `--resume`.*"
    cells = (f"`{key}`", _kind(field), _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meanings(section: type) -> dict[str, str]:
    """The string under each field, of those that it inherits too."""
    return {name: text for base in reversed(section.__mro__) for name, text in _docstrings(base).items()}


def _docstrings(section: type) -> dict[str, str]:
    """The string under each field of the class, on one line; a class of another package has none."""
    if not issubclass(section, Config):
        return {}
    tree = ast.parse(inspect.getsource(section))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        value = following.value if isinstance(following, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found[statement.target.id] = " ".join(value.value.split())
    return found


def _kind(field: FieldInfo) -> str:
    rules = [rule for rule in field.metadata if type(rule) in BOUNDS]
    return _describe(field.annotation, rules)


def _describe(annotation: Any, rules: list[Any]) -> str:
    """An annotation in words, with the bounds on its number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [rule for info in arguments[1:] for rule in getattr(info, "metadata", [info]) if type(rule) in BOUNDS]
        return _describe(arguments[0], [*rules, *inner])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a, rules) for a in arguments if a is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and Ellipsis not in arguments and len(set(arguments)) > 1:
        return f"[{', '.join(_describe(each, []) for each in arguments)}]"
    if origin is tuple:
        each = _describe(arguments[0], [])
        return f"list of {each}s" if each.isalpha() else f"list, each a {each}"
    if origin is dict:
        return "mapping"
    words = TYPES[annotation]
    return f"{words} {', '.join(_bound(rule) for rule in rules)}" if rules else words


def _bound(rule: Any) -> str:
    sign, attribute = BOUNDS[type(rule)]
    return f"{sign} {getattr(rule, attribute):g}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "unset"
    plain = str(default) if isinstance(default, Path) else list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _listed(what: str, command: str, files: dict[str, Path]) -> str:
    """Files that ship, each with its first line."""
    lines = [f"- `{name}`: {_first_comment(path)}" for name, path in files.items()]
    first = next(iter(files), "NAME")
    intro = f"Found by name, for example `endwise {command} {first}`; a copy of the file is a good start for one's own."
    return "\n".join([f"## {what} that ship", "", intro, "", *lines, ""])


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    page = reference()
    if parser.parse_args().check:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page:
            sys.exit(f"{TARGET} is stale: run `make docs`.")
    else:
        TARGET.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
