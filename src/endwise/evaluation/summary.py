"""One measured run: what it is, what it measured, what it cost."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endwise.common.errors import FormatError, RunFolderError
from endwise.common.remarks import gathered, remarks_on
from endwise.common.statistics import Floats, resampled_ratio
from endwise.config.method import Knob, Method
from endwise.config.places import Recipe
from endwise.config.run import RunConfig
from endwise.evaluation.evaluate import read_sums
from endwise.evaluation.measure import Evaluation
from endwise.runs.folder import RunFolder, seconds_of
from endwise.runs.several import joint_with

_LAYER = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")

Seeds = tuple[int, int]
"""Seeds of the SAE's first weights, and of the order of the training text."""


@dataclass(frozen=True)
class RunSummary:
    """One evaluated run: what it is, what it measured, what it cost."""

    method: Method
    """Method by which it was trained: runs of one curve agree in it."""
    site: str
    knob: Knob
    """Place on the curve."""
    seed: int
    l0: float
    alive: int
    alive_tokens: int
    """Held-out tokens over which they were counted."""
    d_sae: int
    ce_increase: float
    """Nats per token."""
    kl: float
    explained_variance: float
    """Per token, as the reference code has it: mean of 1 − ‖error‖² / ‖a − mean‖²."""
    downstream_mse: Mapping[str, float]
    """Errors by later site, in the order of the model."""
    tokens: int
    """Training tokens; 0: trained elsewhere, training length unknown."""
    seconds: float
    """Wall-clock of training."""
    folder: str
    explained_variances: Mapping[str, float] = field(default_factory=dict)
    """Every form of it: per_token, pooled, and both after LayerNorm."""
    downstream_cosine: Mapping[str, float] = field(default_factory=dict)
    """Cosines by later site; empty for a run that was measured before this was."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap intervals by metric."""
    data_seed: int = 0
    """Seed of the order of the training text."""
    model: str = ""
    learning_rate: float | None = None
    remarks: tuple[str, ...] = ()
    """Remarks that a reader of these numbers needs, computed from the record (`endwise.common.remarks`)."""
    start: str | None = None
    """The folder of the SAE that training began with; None: random weights."""
    text: str | None = None
    """Digest of the held-out sequences that it was measured on; None: measured by a version that kept none."""
    heldout: str | None = None
    """Fingerprint of all its held-out text, where its folder has it."""
    prefixes: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """L0 and CE increase of the first so many features alone, where an architecture means them to reconstruct alone."""
    sums: Mapping[str, Floats] | None = field(default=None, repr=False, compare=False)
    """Per-sequence sums `[sequences]` by name: l0, tokens, ce_increase, predictions, downstream_mse.<site>. Without
    them there are ratios but no intervals."""

    @classmethod
    def of(cls, config: RunConfig, evaluation: Evaluation, seconds: float, folder: Path | str) -> "RunSummary":
        """The summary of a trained and measured run."""
        more = {"method": Method.of(config), "seconds": seconds, "folder": str(folder), "sums": evaluation.sums}
        return cls._from(config, evaluation.to_json(), **more)

    @classmethod
    def read(cls, path: Path) -> "RunSummary":
        """The summary of an evaluated run folder.

        Raises:
            RunFolderError: it is none, was not measured yet, or not with the weights that its SAE has now.
            FormatError: what it holds cannot be read.
        """
        folder = RunFolder.open(path)
        config, measured = folder.recipe(), folder.measured()
        if measured is None:
            raise RunFolderError(f"{path} was not measured yet. Measure it: endwise evaluate {shlex.quote(str(path))}")
        try:
            more = {"seconds": seconds_of(path), "heldout": folder.fingerprint("heldout"), "sums": read_sums(path)}
            return cls._from(config, measured, method=method_of(path, config), folder=str(path), **more)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{folder.evaluation_file} is not a valid evaluation ({error!r}). Measure the run again: "
                f"endwise evaluate {shlex.quote(str(path))}"
            ) from None

    @classmethod
    def _from(cls, config: Recipe, measured: Mapping[str, Any], **more: Any) -> "RunSummary":
        """
        Args:
            measured: as `evaluation.json` has it.
            more: the fields that are not of it.

        Raises:
            KeyError, TypeError, ValueError: it is not a valid evaluation.
        """
        named = ("l0", "alive", "alive_tokens", "d_sae", "ce_increase", "kl", "downstream_mse")
        explained = measured["explained_variance"] if isinstance(config, RunConfig) else {}
        return cls(
            site=config.place,
            knob=Knob.of(config),
            seed=config.seed,
            **{name: measured[name] for name in named},
            explained_variance=explained.get("per_token", math.nan),
            downstream_cosine=measured.get("downstream_cosine", {}),
            tokens=config.training.tokens,
            explained_variances=explained,
            intervals={name: (low, high) for name, (low, high) in measured["intervals"].items()},
            **_origin(config),
            text=measured.get("text"),
            prefixes=_prefixes(measured.get("prefix_l0", {}), measured.get("prefix_ce_increase", {})),
            remarks=tuple(remarks_on(measured)),
            **more,
        )

    @property
    def kind(self) -> str:
        """The method by the name that tables, `summary.json` and versions up to 0.1 call it."""
        return self.method.key

    @property
    def trained_here(self) -> bool:
        """True if its training is known: seeds, tokens, learning rate."""
        return self.tokens > 0

    def known(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of a table on it without what is not known of its training."""
        unknown = () if self.trained_here else ("seed", "data_seed", "training_tokens")
        return {name: None if name in unknown else value for name, value in row.items()}

    @property
    def point(self) -> str:
        """Label among the runs of its method: `λ 3, seed 0`."""
        return f"{self.knob}, seed {self.seed}" if self.trained_here else str(self.knob)

    @property
    def title(self) -> str:
        """Name of it among other runs: `e2e, λ 3, seed 0`."""
        return f"{self.method.label}, {self.point}"

    @property
    def coefficient(self) -> float:
        """The knob's value, by its old name."""
        return self.knob.value

    @property
    def seeds(self) -> Seeds:
        """Seeds, which tell apart the repeats of one setting."""
        return self.seed, self.data_seed

    def to_json(self) -> dict[str, Any]:
        """Every field but the per-sequence sums."""
        shown = {"kind": self.method.key, "label": self.method.label, "site": self.site, **self.knob.columns}
        record = shown | {name: value for name, value in vars(self).items() if name not in ("sums", "knob")}
        record["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        record["remarks"] = list(self.remarks)
        record["method"] = dict(self.method.content)
        record["prefixes"] = {str(length): list(numbers) for length, numbers in self.prefixes.items()}
        groups = ("downstream_mse", "downstream_cosine", "explained_variances")
        return record | {name: dict(getattr(self, name)) for name in groups}


def method_of(path: Path, config: Recipe) -> Method:
    """Name the method of a run folder's recipe, which of one place of a run that trains several jointly says so."""
    joint = joint_with(path)
    return Method.of(config) if joint is None else Method.of(config).jointly(*joint)


def _origin(config: Recipe) -> dict[str, Any]:
    start = next((str(each.init_from) for each in config.recipes if each.init_from is not None), None)
    rate = config.training.learning_rate if config.training.tokens else None
    return {"model": config.model.name, "learning_rate": rate, "start": start, "data_seed": config.data.seed}


def knob_labels(runs: Iterable[RunSummary]) -> str:
    """Name what runs of one method differ in, as the head of a column: `λ`, or `λ, k` where there are several."""
    return ", ".join(dict.fromkeys(run.knob.label for run in runs))


def what_varies(runs: Sequence[RunSummary]) -> str:
    """Name what the seeds of runs are of; empty where all have one."""
    varying = {
        "initialisation": {run.seed for run in runs},
        "order of the text": {run.data_seed for run in runs},
    }
    return " and ".join(name for name, seeds in varying.items() if len(seeds) > 1)


def remarks_of(runs: Iterable[RunSummary]) -> list[str]:
    """Each remark once, with the runs that it is on."""
    return gathered({run.folder: run.remarks for run in runs})


def layer_label(site: str) -> str:
    """`4` for what enters block 4, `5 out` for what leaves block 5; other sites keep their name."""
    match = _LAYER.fullmatch(site)
    return site if match is None else match[1] + (" out" if match[2] == "post" else "")


_DENOMINATORS = {"ce_increase": "predictions"}


LATER_MSE = "later_mse"
"""Geometric mean over the later sites of the downstream MSE, so that each counts alike, whatever its scale."""


def estimate(run: RunSummary, metric: str) -> float:
    if metric != LATER_MSE:
        return float(getattr(run, metric))
    values = list(run.downstream_mse.values())
    return float(np.exp(np.mean(np.log(values)))) if values and min(values) > 0 else math.nan


def resampled(run: RunSummary, metrics: set[str], resamples: int, seed: int) -> dict[str, Floats]:
    """Each metric in each resample, `[resamples]`."""
    assert run.sums is not None
    if LATER_MSE in metrics:
        sites = resampled(run, {f"downstream_mse.{site}" for site in run.downstream_mse}, resamples, seed)
        mean = np.exp(np.mean(np.log(list(sites.values())), axis=0))
        return {LATER_MSE: mean, **resampled(run, metrics - {LATER_MSE}, resamples, seed)}
    return {
        name: np.full(resamples, float(run.alive))
        if name == "alive"
        else resampled_ratio(run.sums[name], run.sums[_DENOMINATORS.get(name, "tokens")], resamples, seed)
        for name in metrics
    }


def other_text(runs: Sequence[RunSummary]) -> str | None:
    """Say why the runs' numbers cannot be compared, if they were measured on different text, as far as is known."""
    for texts in ([run.text for run in runs], [run.heldout for run in runs]):
        if None not in texts:
            return "the runs were measured on different held-out text" if len(set(texts)) > 1 else None
    return None


def unpaired(runs: Sequence[RunSummary], names: set[str] | None = None) -> str | None:
    """Say why the runs cannot share resamples, if they cannot."""
    if reason := other_text(runs):
        return reason
    wanted = (names or {"l0", "ce_increase", "predictions"}) | {"tokens"}
    counts: list[Floats] = []
    for run in runs:
        if run.sums is None or not wanted <= set(run.sums):
            return "not every run has its per-sequence sums"
        counts.append(run.sums["tokens"])
    if any(not np.array_equal(count, counts[0]) for count in counts):
        return "the runs were not measured on the same held-out sequences"
    return "one held-out sequence cannot be resampled" if len(counts[0]) < 2 else None


def _prefixes(l0: Mapping[str, float], ce_increase: Mapping[str, float]) -> dict[int, tuple[float, float]]:
    """Read L0 and CE increase by number of features, ascending."""
    return {length: (l0[str(length)], ce_increase[str(length)]) for length in sorted(map(int, l0))}
