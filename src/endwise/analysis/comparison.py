"""What the kinds of SAE cost each other: ratios at equal CE increase and at equal sparsity, with paired intervals.

A kind's runs, one per sparsity coefficient, are points of a curve. Two curves are compared only where both were
measured: at 20 levels spread evenly over their common range, the logarithms of the interpolated values are
subtracted, and the ratio reported is the exponential of the mean difference. Its interval repeats all of this on
resampled held-out sequences, the same ones for both kinds. Where the runs do not determine a ratio, a reason stands in
its place.

These intervals cover the choice of held-out text. They do not cover the training seed, and the number of alive
features, being counted over the whole text, is kept fixed in them. Where both kinds have three seeds or more, a second
interval covers the seed: of one ratio a seed, Student's t on the logarithms.
"""

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.errors import ConfigError, FormatError, RunFolderError
from endwise.evaluation import Evaluation
from endwise.run_config import RunConfig
from endwise.run_evaluation import read_sums
from endwise.run_folder import RunFolder
from endwise.statistics import (
    LEAST_SEEDS,
    InterpolationError,
    interpolate_at,
    interval_over_seeds,
    monotone_points,
    percentile_interval,
    resampled_ratio,
)

KINDS = ("local", "e2e", "e2e_ds")
LABELS = {"local": "local", "e2e": "e2e", "e2e_ds": "e2e+ds"}
"""The kinds as the paper writes them, in the order of every table and legend."""

LEVELS = 20
DEFINED_SHARE = 0.95
"""An interval is reported if at least this share of the resamples determine the ratio."""

_LAYER = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunSummary:
    """One evaluated run: what it is, what it measured, what it cost."""

    kind: str
    site: str
    coefficient: float
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
    """By later site, in the order of the model."""
    tokens: int
    """Training tokens."""
    seconds: float
    """Wall-clock of training."""
    folder: str
    explained_variances: Mapping[str, float] = field(default_factory=dict)
    """Every form of it: per_token, pooled, and both after LayerNorm."""
    downstream_cosine: Mapping[str, float] = field(default_factory=dict)
    """By later site; empty for a run that was measured before this was."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % bootstrap intervals by metric."""
    model: str = ""
    learning_rate: float | None = None
    start: str | None = None
    """The folder of the SAE that training began with; None: random weights."""
    sums: Mapping[str, Floats] | None = field(default=None, repr=False, compare=False)
    """Per-sequence sums `[sequences]` by name: l0, tokens, ce_increase, predictions, downstream_mse.<site>. Without
    them there are ratios but no intervals."""

    @classmethod
    def of(cls, config: RunConfig, evaluation: Evaluation, seconds: float, folder: Path | str) -> "RunSummary":
        """The summary of a trained and measured run."""
        metrics = evaluation.metrics
        return cls(
            kind=config.objective.kind,
            site=config.site,
            coefficient=config.objective.sparsity.coefficient,
            seed=config.seed,
            l0=evaluation["l0"],
            alive=evaluation.alive,
            alive_tokens=evaluation.tokens,
            d_sae=evaluation.d_sae,
            ce_increase=evaluation["ce_increase"],
            kl=evaluation["kl"],
            explained_variance=evaluation["explained_variance.per_token"],
            downstream_mse=_group(metrics, "downstream_mse."),
            downstream_cosine=_group(metrics, "downstream_cosine."),
            tokens=config.training.tokens,
            seconds=seconds,
            folder=str(folder),
            explained_variances=_group(metrics, "explained_variance."),
            intervals={name: (interval.low, interval.high) for name, interval in metrics.items()},
            **_origin(config),
            sums=evaluation.sums,
        )

    @classmethod
    def read(cls, path: Path) -> "RunSummary":
        """The summary of an evaluated run folder.

        Raises:
            RunFolderError: it is none, or was not measured yet.
            FormatError: what it holds cannot be read.
        """
        folder = RunFolder.open(path)
        config, measured = folder.config(), folder.evaluation()
        if measured is None:
            raise RunFolderError(f"{path} was not measured yet. Measure it: endwise evaluate {shlex.quote(str(path))}")
        try:
            return cls(
                kind=config.objective.kind,
                site=config.site,
                coefficient=config.objective.sparsity.coefficient,
                seed=config.seed,
                l0=measured["l0"],
                alive=measured["alive"],
                alive_tokens=measured["alive_tokens"],
                d_sae=measured["d_sae"],
                ce_increase=measured["ce_increase"],
                kl=measured["kl"],
                explained_variance=measured["explained_variance"]["per_token"],
                downstream_mse=measured["downstream_mse"],
                downstream_cosine=measured.get("downstream_cosine", {}),
                tokens=config.training.tokens,
                seconds=folder.seconds(),
                folder=str(path),
                explained_variances=measured["explained_variance"],
                intervals={name: (low, high) for name, (low, high) in measured["intervals"].items()},
                **_origin(config),
                sums=read_sums(path),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{folder.evaluation_file} is not as it is written ({error!r}). Measure the run again: "
                f"endwise evaluate {shlex.quote(str(path))}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Every field but the per-sequence sums."""
        record = {name: value for name, value in vars(self).items() if name != "sums"}
        record["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        groups = ("downstream_mse", "downstream_cosine", "explained_variances")
        return record | {name: dict(getattr(self, name)) for name in groups}


def _origin(config: RunConfig) -> dict[str, Any]:
    start = None if config.init_from is None else str(config.init_from)
    return {"model": config.model.name, "learning_rate": config.training.learning_rate, "start": start}


@dataclass(frozen=True)
class Ratio:
    """How much of one thing a kind has or needs relative to another kind; or why that cannot be said."""

    estimate: float | None
    interval: tuple[float, float] | None = None
    over: tuple[float, float] | None = None
    """The range of the quantity that was held equal."""
    at_middle: float | None = None
    """The ratio at the reference's middle run alone."""
    middle: float | None = None
    """Where that is."""
    reason: str | None = None
    """Why the estimate, or only the interval, is missing."""
    over_seeds: tuple[float, float] | None = None
    """95 % interval over training seeds, where each kind has three or more; `interval` is over held-out text."""

    @property
    def widest(self) -> tuple[float, float] | None:
        """The wider of the intervals over held-out text and over seeds."""
        known = [ends for ends in (self.interval, self.over_seeds) if ends is not None]
        return max(known, key=lambda ends: ends[1] / max(ends[0], 1e-12), default=None)

    def to_row(self) -> dict[str, Any]:
        """Flat, for a table."""
        text, seeds = self.interval or (None, None), self.over_seeds or (None, None)
        return {
            "ratio": self.estimate,
            "text.low": text[0],
            "text.high": text[1],
            "seeds.low": seeds[0],
            "seeds.high": seeds[1],
            "over.low": None if self.over is None else self.over[0],
            "over.high": None if self.over is None else self.over[1],
            "reason": self.reason,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.estimate,
            "interval": _as_list(self.interval),
            "over": _as_list(self.over),
            "at_middle": self.at_middle,
            "middle": self.middle,
            "reason": self.reason,
            "interval_over_seeds": _as_list(self.over_seeds),
        }


@dataclass(frozen=True)
class Measure:
    """A question that `ratio_to_local` answers: how much of `of` at equal `at`."""

    key: str
    of: str
    at: str


MEASURES = (
    Measure("features_at_equal_ce", of="l0", at="ce_increase"),
    Measure("alive_at_equal_ce", of="alive", at="ce_increase"),
    Measure("ce_increase_at_equal_l0", of="ce_increase", at="l0"),
    Measure("ce_increase_at_equal_alive", of="ce_increase", at="alive"),
)
NAMES = {"l0": "L0", "alive": "alive features", "ce_increase": "CE increase"}


@dataclass(frozen=True)
class Summary:
    """A comparison of the kinds at one site: what `summary.json` and the report are made of."""

    site: str
    clean_ce: float
    mean_ablated_ce: float | None
    zero_ablated_ce: float | None
    runs: tuple[RunSummary, ...]
    ratios: Mapping[str, Mapping[str, Ratio]]
    """By the key of `MEASURES`, then by kind; each relative to local."""
    similar: tuple[RunSummary, ...]
    """One run of each kind, those whose CE increases are closest to each other."""
    downstream: Mapping[str, Ratio]
    """Of `similar`: ratio of downstream MSE, by `<kind>/<kind>`; geometric mean over the later sites."""
    resamples: int
    model: str = ""
    command: str = ""
    seconds: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features_at_equal_ce(self) -> Mapping[str, Ratio]:
        return self.ratios["features_at_equal_ce"]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What the numbers show, and what they do not, in plain sentences."""
        return verdicts(self)

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`; JSON types only."""
        ratios = {key: {kind: ratio.to_json() for kind, ratio in group.items()} for key, group in self.ratios.items()}
        return {
            "clean_ce": self.clean_ce,
            "mean_ablated_ce": self.mean_ablated_ce,
            "zero_ablated_ce": self.zero_ablated_ce,
            "site": self.site,
            "model": self.model,
            "runs": [run.to_json() for run in self.runs],
            **ratios,
            "downstream_mse_ratio": {pair: ratio.to_json() for pair, ratio in self.downstream.items()},
            "runs_at_similar_ce": [run.folder for run in self.similar],
            "verdicts": list(self.verdicts),
            "bootstrap_resamples": self.resamples,
            "command": self.command,
            "seconds": self.seconds,
            "environment": dict(self.environment),
        }


def summarise(
    runs: Sequence[RunSummary],
    *,
    clean_ce: float,
    mean_ablated_ce: float | None = None,
    zero_ablated_ce: float | None = None,
    resamples: int = 1000,
    seed: int = 12345,
    model: str = "",
    command: str = "",
    seconds: float | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Summary:
    """Compares runs of one site. Runs of one kind and coefficient that differ in seed count as one point, their mean.

    Raises:
        ConfigError: no runs, a kind that endwise does not know, or more than one site.
    """
    sites = sorted({run.site for run in runs})
    if len(sites) != 1:
        raise ConfigError(f"A comparison is of runs at one site; given {', '.join(sites) or 'no runs'}.")
    unknown = sorted({run.kind for run in runs} - set(KINDS))
    if unknown:
        raise ConfigError(f"A run's kind is one of {', '.join(KINDS)}; given {', '.join(unknown)}.")
    ordered = tuple(sorted(runs, key=lambda run: (KINDS.index(run.kind), run.coefficient, run.seed)))
    ratios = {
        m.key: {kind: ratio_to_local(ordered, kind, m.of, m.at, resamples, seed) for kind in KINDS[1:]}
        for m in MEASURES
    }
    similar = runs_at_similar(ordered, "ce_increase")
    downstream = {
        f"{a.kind}/{b.kind}": downstream_ratio(a, b, resamples, seed) for b, a in itertools.combinations(similar, 2)
    }
    return Summary(
        site=sites[0],
        clean_ce=clean_ce,
        mean_ablated_ce=mean_ablated_ce,
        zero_ablated_ce=zero_ablated_ce,
        runs=ordered,
        ratios=ratios,
        similar=similar,
        downstream=downstream,
        resamples=resamples,
        model=model,
        command=command,
        seconds=seconds,
        environment=environment or {},
    )


def ratio_to_local(
    runs: Sequence[RunSummary], kind: str, of: str, at: str, resamples: int, seed: int, levels: int = LEVELS
) -> Ratio:
    """How much of `of` the runs of `kind` have relative to local's at equal `at` (l0, alive or ce_increase).

    exp of the mean over `levels` values of `at`, evenly spread over the common range, of the difference of
    log-interpolated curves; and the same at local's middle run alone.
    """
    groups = {name: [run for run in runs if run.kind == name] for name in (kind, "local")}
    for name, group in groups.items():
        if not group:
            return Ratio(None, reason=f"there are no runs of {LABELS[name]}")

    def curves(metric: Callable[[RunSummary, str], float]) -> list[_Curve]:
        return [_curve(group, LABELS[name], of, at, metric) for name, group in groups.items()]

    try:
        curve, local = curves(_estimate)
        low, high = _common_range(curve, local, at)
        mean, at_middle = _ratio_of_curves(curve, local, at, levels)
    except InterpolationError as error:
        return Ratio(None, reason=str(error))
    members = [run for group in groups.values() for run in group]
    if "alive" in (of, at) and len({run.alive_tokens for run in members}) > 1:
        return Ratio(None, reason="alive features were counted over different numbers of tokens")
    result = Ratio(
        mean,
        over=(low, high),
        at_middle=at_middle,
        middle=None if at_middle is None else local.middle,
        over_seeds=_over_seeds(groups, kind, of, at, levels),
    )
    if reason := _unpaired(members):
        return replace(result, reason=reason)
    drawn = {id(run): resampled(run, {of, at}, resamples, seed) for run in members}
    draws = np.full(resamples, np.nan)
    for index in range(resamples):
        try:
            curve, local = curves(lambda run, name, index=index: drawn[id(run)][name][index])
            draws[index], _ = _ratio_of_curves(curve, local, at, levels)
        except InterpolationError:
            continue
    return _with_draws(result, draws)


def _over_seeds(
    groups: Mapping[str, Sequence[RunSummary]], kind: str, of: str, at: str, levels: int
) -> tuple[float, float] | None:
    """The ratio's interval over training seeds, one ratio of curves a seed; None where fewer than three seeds of both
    kinds determine it.
    """
    ratios = []
    for seed in sorted(set.intersection(*({run.seed for run in group} for group in groups.values()))):
        try:
            own, local = (
                _curve([run for run in groups[name] if run.seed == seed], LABELS[name], of, at, _estimate)
                for name in (kind, "local")
            )
            ratios.append(_ratio_of_curves(own, local, at, levels)[0])
        except InterpolationError:
            continue
    if len(ratios) < LEAST_SEEDS:
        return None
    interval = interval_over_seeds(ratios)
    return interval.low, interval.high


def runs_at_similar(runs: Sequence[RunSummary], metric: str) -> tuple[RunSummary, ...]:
    """One run of each kind: the choice whose ce_increase or l0 (`metric`) differs least, relative to its mean."""
    groups = [[run for run in runs if run.kind == kind] for kind in KINDS]

    def spread(choice: tuple[RunSummary, ...]) -> float:
        values = [_estimate(run, metric) for run in choice]
        return (max(values) - min(values)) / max(abs(float(np.mean(values))), 1e-9)

    return min(itertools.product(*(group for group in groups if group)), key=spread)


def downstream_ratio(run: RunSummary, reference: RunSummary, resamples: int, seed: int) -> Ratio:
    """Geometric mean over the later sites of run's downstream MSE / the reference's."""
    sites = [site for site in run.downstream_mse if site in reference.downstream_mse]
    if not sites:
        return Ratio(None, reason="the runs have no later site in common")
    pairs = [(run.downstream_mse[site], reference.downstream_mse[site]) for site in sites]
    if min(min(pair) for pair in pairs) <= 0:
        return Ratio(None, reason="a downstream MSE is zero")
    result = Ratio(float(np.exp(np.mean([np.log(a / b) for a, b in pairs]))))
    names = {f"downstream_mse.{site}" for site in sites}
    if reason := _unpaired([run, reference], names):
        return replace(result, reason=reason)
    drawn, drawn_reference = (resampled(one, names, resamples, seed) for one in (run, reference))
    logs = [np.log(drawn[name] / drawn_reference[name]) for name in names]
    return _with_draws(result, np.exp(np.mean(logs, axis=0)))


def verdicts(summary: Summary) -> tuple[str, ...]:
    """What the numbers show, and what they do not, in plain sentences."""
    sentences = [_features_verdict(kind, ratio) for kind, ratio in summary.features_at_equal_ce.items()]
    chosen = {run.kind: run for run in summary.similar}
    for pair, ratio in summary.downstream.items():
        kind, reference = pair.split("/")
        if pair != "e2e_ds/local":
            sentences.append(_downstream_verdict(chosen[kind], chosen[reference], ratio))
    return tuple(sentences)


def percent(ratio: Ratio) -> str:
    """`48 % [44, 53]`, with the wider interval."""
    if ratio.estimate is None:
        return "–"
    ends = "" if ratio.widest is None else f" [{100 * ratio.widest[0]:.0f}, {100 * ratio.widest[1]:.0f}]"
    return f"{100 * ratio.estimate:.0f} %{ends}"


def times(value: float) -> str:
    """A ratio with two digits after the point, fewer as it grows."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def later_mse(run: RunSummary) -> float | None:
    """Mean over the later sites of the downstream MSE."""
    return float(np.mean(list(run.downstream_mse.values()))) if run.downstream_mse else None


def layer_label(site: str) -> str:
    """`4` for what enters block 4, `5 out` for what leaves block 5; other sites keep their name."""
    match = _LAYER.fullmatch(site)
    return site if match is None else match[1] + (" out" if match[2] == "post" else "")


def _features_verdict(kind: str, ratio: Ratio) -> str:
    name = LABELS[kind]
    if ratio.estimate is None:
        return f"How many features {name} needs at local's CE increase cannot be said from these runs: {ratio.reason}."
    fact = f"{percent(ratio)} of local's features per token at the same CE increase"
    if ratio.widest is None:
        return f"{name} needs {fact}; how sure that is, is not known: {ratio.reason}."
    low, high = ratio.widest
    if low <= 1 <= high:
        return f"That {name} needs fewer features than local is not shown: {fact}, and the interval includes 100 %."
    return f"{name} needs {fact}." if high < 1 else f"{name} needs more features than local, not fewer: {fact}."


def _downstream_verdict(run: RunSummary, reference: RunSummary, ratio: Ratio) -> str:
    name, other = LABELS[run.kind], LABELS[reference.kind]
    where = f"at their closest CE increases ({name} {run.ce_increase:+.3f}, {other} {reference.ce_increase:+.3f})"
    if ratio.estimate is None:
        return f"How {name} and {other} compare downstream cannot be said: {ratio.reason}."
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    fact = f"its downstream MSE is {times(ratio.estimate)} times{ends} {other}'s, {where}"
    if ratio.interval is None:
        return f"{name} against {other}: {fact}; how sure that is, is not known: {ratio.reason}."
    if ratio.interval[0] <= 1 <= ratio.interval[1]:
        return f"That {name} and {other} differ downstream is not shown: of {name}, {fact}."
    closely = "more" if ratio.estimate < 1 else "less"
    return f"{name} follows the original activations {closely} closely than {other}: {fact}."


@dataclass(frozen=True)
class _Curve:
    """One kind's points in order of x, the quantity held equal."""

    name: str
    x: Floats
    y: Floats

    @property
    def middle(self) -> float:
        return float(self.x[len(self.x) // 2])


def _curve(
    runs: Sequence[RunSummary], name: str, of: str, at: str, metric: Callable[[RunSummary, str], float]
) -> _Curve:
    """One point per coefficient."""
    points: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        points.setdefault(run.coefficient, []).append((metric(run, at), metric(run, of)))
    means = [np.mean(group, axis=0) for group in points.values()]
    try:
        x, y = monotone_points([point[0] for point in means], [point[1] for point in means])
    except InterpolationError as error:
        raise InterpolationError(f"{name}'s curve of {NAMES[of]} over {NAMES[at]}: {str(error).rstrip('.')}") from None
    if y[-1] > y[0]:
        raise InterpolationError(f"{name}'s curve is no trade-off: its {NAMES[of]} rises with its {NAMES[at]}")
    return _Curve(name, x, y)


def _common_range(curve: _Curve, other: _Curve, at: str) -> tuple[float, float]:
    low, high = max(curve.x[0], other.x[0]), min(curve.x[-1], other.x[-1])
    if low >= high:
        covered = [f"{one.name} covers {one.x[0]:.3g} to {one.x[-1]:.3g}" for one in (curve, other)]
        raise InterpolationError(f"the runs have no {NAMES[at]} in common: {', '.join(covered)}")
    return float(low), float(high)


def _ratio_of_curves(curve: _Curve, other: _Curve, at: str, levels: int) -> tuple[float, float | None]:
    """The mean ratio over the common range, and the ratio at the other's middle point (None where out of range)."""
    grid = np.linspace(*_common_range(curve, other, at), levels)
    gaps = np.log(interpolate_at(curve.x, curve.y, grid)) - np.log(interpolate_at(other.x, other.y, grid))
    at_middle = None
    if curve.x[0] <= other.middle <= curve.x[-1]:
        at_middle = float(
            interpolate_at(curve.x, curve.y, other.middle) / interpolate_at(other.x, other.y, other.middle)
        )
    return float(np.exp(gaps.mean())), at_middle


_DENOMINATORS = {"ce_increase": "predictions"}


def _estimate(run: RunSummary, metric: str) -> float:
    return float(getattr(run, metric))


def resampled(run: RunSummary, metrics: set[str], resamples: int, seed: int) -> dict[str, Floats]:
    """Each metric in each resample, `[resamples]`."""
    assert run.sums is not None
    return {
        name: np.full(resamples, float(run.alive))
        if name == "alive"
        else resampled_ratio(run.sums[name], run.sums[_DENOMINATORS.get(name, "tokens")], resamples, seed)
        for name in metrics
    }


def _unpaired(runs: Sequence[RunSummary], names: set[str] | None = None) -> str | None:
    """Why the runs cannot share resamples, if they cannot."""
    wanted = (names or {"l0", "ce_increase", "predictions"}) | {"tokens"}
    counts: list[Floats] = []
    for run in runs:
        if run.sums is None or not wanted <= set(run.sums):
            return "not every run has its per-sequence sums"
        counts.append(run.sums["tokens"])
    if any(not np.array_equal(count, counts[0]) for count in counts):
        return "the runs were not measured on the same held-out sequences"
    return "one held-out sequence cannot be resampled" if len(counts[0]) < 2 else None


def _with_draws(ratio: Ratio, draws: Floats) -> Ratio:
    assert ratio.estimate is not None
    defined = float(np.mean(~np.isnan(draws)))
    if defined < DEFINED_SHARE:
        return replace(ratio, reason=f"only {100 * defined:.0f} % of the resamples determine the ratio")
    interval = percentile_interval(draws, ratio.estimate)
    return replace(ratio, interval=(interval.low, interval.high))


def _group(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): metric.estimate for name, metric in metrics.items() if name.startswith(prefix)}


def _as_list(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else list(ends)
