"""The file of a sweep: a recipe, what varies in it, and where the runs are carried out."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from endwise.config import Config
from endwise.run_config import Positive

Share = Annotated[float, Field(gt=0, le=1)]


class Target(Config):
    """What a run is to reach; its sparsity coefficient is searched for."""

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
    """How the coefficient that meets a target is looked for; the recipe's own is the first that is tried."""

    tokens: Share = 0.2
    """Length of a trial, as a share of `training.tokens`."""
    trials: Annotated[int, Field(ge=2, le=50)] = 6
    """Most trials of a point."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """How far from the target, as a share of it, counts as met."""
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
    """How often a task is begun again whose worker or machine was lost; it goes on from its last checkpoints."""

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
    minutes: Positive = 240
    """Time limit of a job. One that comes near it saves, is queued again, and goes on from there."""
    save_seconds: Annotated[int, Field(gt=0, le=65535)] = 120
    """How long before its time limit a job begins to save: longer than a step, a checkpoint and an evaluation."""
    cpus: Positive = 4
    """Cores of a job, and threads that it computes with."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs of a job."""
    memory_gb: Positive = 32
    at_once: Positive = 16
    """Jobs in the queue at a time."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """How often a job is submitted again that ended without a result; it goes on from its last checkpoints."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Further options of `sbatch`, by their names with underscores, e.g. `account: mine` or `exclusive: true`."""

    @model_validator(mode="after")
    def _time_to_save(self) -> "SlurmConfig":
        if self.save_seconds >= 60 * self.minutes:
            raise ValueError(
                f"save_seconds ({self.save_seconds}) must be shorter than the time limit, minutes ({self.minutes})"
            )
        return self


class SweepConfig(Config):
    """Runs that differ in some fields of one recipe."""

    recipe: str | dict[str, Any]
    """A recipe's path, the name of one that ships, or its content."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe, by dotted key, that all runs share."""
    grids: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """The runs are those of all grids. A grid sets dotted keys of the recipe: to a value; to each of a list; or to each
    of `{log_range: [from, to, how many]}`, whose neighbours have one ratio. All combinations are made. The key `target`
    takes a target (`{ce_increase: 0.1}` or `{l0: 40}`) or a list of them in place of the sparsity coefficient."""
    search: SearchConfig = SearchConfig()
    together: Positive = 8
    """Most SAEs in training at a time in one pass: those of one kind that agree in model, site, data and length. Each
    ends as it would alone; memory grows with their number."""
    engine: Literal["in_process", "ray", "slurm"] = "in_process"
    """Where tasks (runs, or groups of runs in one pass) are carried out."""
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()
    out: Path = Path("runs/sweep")
    """Folder of the sweep: its runs, and the table of them."""
