"""The file of a sweep: a recipe, what varies in it by dotted keys, and where the runs are carried out."""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from endwise.common.errors import ConfigError
from endwise.config.base import Config, apply_overrides, changed_and_built, read_yaml, section_of
from endwise.config.places import OF_A_SWEEP
from endwise.config.recipes import find_sweep
from endwise.config.run import Positive, RunConfig

RANGE, TARGET, PLACE, OUT = "log_range", "target", "place", "out"
OF_SEVERAL = ("places", "joint", "inputs")
"""Keys of a recipe for several places alone."""
OF_ONE = re.compile(r"places\.\d+\.")
"""Beginning of a key that is of one of several places."""
Share = Annotated[float, Field(gt=0, le=1)]


class Target(Config):
    """Target that a run is to reach; its sparsity coefficient is searched for."""

    ce_increase: Annotated[float, Field(gt=0)] | None = None
    """Nats per token."""
    l0: Annotated[float, Field(gt=0)] | None = None
    """Features per token."""

    @model_validator(mode="after")
    def _one(self) -> "Target":
        if (self.ce_increase is None) == (self.l0 is None):
            raise ValueError("name exactly one of ce_increase (nats per token) and l0 (features per token)")
        return self

    @property
    def metric(self) -> Literal["ce_increase", "l0"]:
        return "l0" if self.ce_increase is None else "ce_increase"

    @property
    def value(self) -> float:
        return getattr(self, self.metric)

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


class SearchConfig(Config):
    """Search for the coefficient that meets a target; the recipe's own is the first that is tried."""

    tokens: Share = 0.2
    """Length of a trial, as a share of `training.tokens`."""
    trials: Annotated[int, Field(ge=2, le=50)] = 6
    """Most trials of a point."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Distance from the target, as a share of it, counts as met."""
    corrections: Annotated[int, Field(ge=0, le=10)] = 1
    """Further runs at full length where the first ends outside the tolerance, as trials are shorter than it."""


class RayConfig(Config):
    """Tasks on Ray (extra `ray`)."""

    address: str | None = None
    """`auto` for the cluster that this machine is part of, `ray://HOST:PORT` for another (needs `ray[client]`); unset:
    a Ray of its own on this machine, for as long as the sweep lasts."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """Cores that a task asks for, and (rounded down, at least 1) threads that it computes with."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that a task asks for; 0.25 lets four tasks share one. Above 1 a whole number."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Times that a task is started again whose worker or machine was lost; it resumes from its last checkpoints."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> "RayConfig":
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus above 1 must be a whole number; given {self.gpus:g}")
        return self


class SlurmConfig(Config):
    """Tasks as SLURM jobs (extra `slurm`, submitit)."""

    cluster: Literal["slurm", "local"] = "slurm"
    """`local` runs the jobs as processes of this machine, to try a sweep out."""
    partition: str | None = None
    """Partition of the cluster; unset: its default one."""
    minutes: Positive = 240
    """Time limit of a job. One that comes near it saves, is queued again, and resumes from there."""
    save_seconds: Annotated[int, Field(gt=0, le=65535)] = 120
    """Time before its limit at which a job begins to save: longer than a step, a checkpoint and an evaluation."""
    cpus: Positive = 4
    """Cores of a job, and threads that it computes with."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs of a job."""
    memory_gb: Positive = 32
    """Memory of a job."""
    at_once: Positive = 16
    """Jobs in the queue at a time."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Times that a job is submitted again that ended without a result; it resumes from its last checkpoints."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Further options of `sbatch`, by their names with underscores, e.g. `account: mine` or `exclusive: true`."""

    @model_validator(mode="after")
    def _time_to_save(self) -> "SlurmConfig":
        if self.save_seconds >= 60 * self.minutes:
            raise ValueError(
                f"save_seconds ({self.save_seconds}) must be shorter than the time limit, minutes ({self.minutes})"
            )
        return self


class EngineConfig(Config):
    """Engine that carries out the runs."""

    engine: Literal["in_process", "ray", "slurm"] = "in_process"
    """Engine that runs the tasks (runs, or groups of runs in one pass)."""
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()


class SweepConfig(EngineConfig):
    """Runs that differ in some fields of one recipe."""

    recipe: str | dict[str, Any]
    """A recipe's path, the name of one that ships, or its content. Its `out` is ignored."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe, by dotted key, that all runs share."""
    grids: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """The runs are those of all grids. A grid sets dotted keys of the recipe: to a value; to each of a list; or to each
    of `{log_range: [from, to, how many]}`, evenly spaced on a logarithmic scale. All combinations are made. The key
    `target` takes a target (`{ce_increase: 0.1}` or `{l0: 40}`) or a list of them in place of the sparsity coefficient;
    the key `place` sets `site` and `writes` at once (`blocks.1.mlp_in -> blocks.1.hook_mlp_out`, or a site alone).
    Weights that a kind does not use are left out of its runs if a grid chooses the kind, and so are keys of the
    dictionary that an architecture does not have if it chooses that. With `places` a key applies to every place, or to
    one by its number (`places.0.dictionary.k`)."""
    search: SearchConfig = SearchConfig()
    together: Positive = 8
    """Most SAEs in training at a time in one pass: those of one kind that agree in model, site, data and length. Each
    ends as it would alone; memory grows with their number."""
    out: Path = Path("runs/sweep")
    """Folder of the sweep: its runs, and the table of them. Read from a file, a sweep without it goes to
    `runs/<the file's name>`."""


def read_sweep(name: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep by its path, or by the name of one that ships.

    Args:
        overrides: `key=value`, the value in YAML: of the sweep's own keys, or of its recipe's for all runs.

    Raises:
        ConfigError: there is no such file; or it, or an override, breaks a rule.
    """
    path = find_sweep(str(name))
    own = [override for override in overrides if _is_own(override)]
    values = {"out": f"runs/{path.stem}", **read_yaml(path)}
    if "training" in values and not OF_A_SWEEP & values.keys():
        raise ConfigError(f"{path} is a recipe, of one run. Train it: endwise train {shlex.quote(str(path))}")
    sweep = changed_and_built(values, own, SweepConfig.changed, SweepConfig.build, str(path))
    others = [override.removeprefix("settings.") for override in overrides if override not in own]
    changes = flattened(apply_overrides({}, others), "the command line")
    for number, grid in enumerate(sweep.grids, 1):
        if both := changes.keys() & flattened(grid, f"grid {number}").keys():
            raise ConfigError(
                f"{min(both)} is set by grid {number} of {path}, so that no other value counts. Set it there."
            )
    return sweep.model_copy(update={"settings": {**flattened(sweep.settings, "settings"), **changes}})


def as_sweep(config: SweepConfig | Mapping[str, Any] | str | Path) -> SweepConfig:
    """A sweep from what a caller may give: an object, a mapping of its fields, a path, or a name.

    Raises:
        ConfigError: see `read_sweep`.
    """
    if isinstance(config, SweepConfig):
        return config
    if isinstance(config, str | Path):
        return read_sweep(config)
    if "training" in config and not OF_A_SWEEP & config.keys():
        raise ConfigError("The sweep is a recipe, of one run. Train it: endwise.train")
    return SweepConfig.build(dict(config), "the sweep")


def _is_own(override: str) -> bool:
    """Return whether a change is one of the sweep, and not of its recipe; only `out` is a key of both, and no run's."""
    first, dot, _ = override.partition("=")[0].partition(".")
    return first in SweepConfig.model_fields and not (first == "settings" and dot)


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
    """Return whether a field's numbers have no fractions."""
    field = recipe_fields().get(OF_ONE.sub("", key))
    return field is not None and int in (kinds := _kinds(field.annotation)) and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return {annotation} if not inner else {kind for each in inner for kind in _kinds(each)}


def _check_exists(key: str, where: str) -> None:
    fields, key = recipe_fields(), OF_ONE.sub("", key)
    sections = {name.rpartition(".")[0] for name in fields}
    if key in fields or key in sections or key in (TARGET, PLACE, *OF_SEVERAL):
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
    near = near or difflib.get_close_matches(key[:200], [*SweepConfig.model_fields, *fields], n=1)
    if not near:
        ends = {name.rpartition(".")[2]: name for name in fields}
        near = [ends[end] for end in difflib.get_close_matches(last[:80], list(ends), n=1)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it has for example {', '.join(EXAMPLES)}, and docs/configuration.md lists all."


EXAMPLES = ("site", "seed", "objective.kind", "objective.sparsity.coefficient", "dictionary.ratio", "training.tokens")
