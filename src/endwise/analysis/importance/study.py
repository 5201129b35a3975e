"""Which features matter, and on how few the model's behaviour rests: measured runs, compared method by method."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from endwise.analysis.claims import Claim, are_similar
from endwise.analysis.comparable import Setting, baseline_of, methods_of, runs_in, with_settings
from endwise.analysis.comparison.comparison import runs_at_similar, similar_by_seed
from endwise.analysis.correlations import pearson, spearman
from endwise.analysis.importance.concentration import (
    CARRIED,
    HALF,
    SEED,
    carrying,
    carrying_ratio,
    correlation,
    correlation_draws,
    count_with,
    half_ratio,
    measured_about,
    share_draws,
    shares,
)
from endwise.analysis.importance.faithfulness import NARROW
from endwise.analysis.importance.measure import ABLATED, measure_importance
from endwise.analysis.over_seeds import CORRELATION, OverSeeds, judged, over, over_seeds
from endwise.common.statistics import Floats, Interval, percentile_interval
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, knob_labels
from endwise.features.importance_table import Faithfulness, MeasuredImportance
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpora

FOLLOWS = 0.5
"""Spearman's correlation with exact ablation above which an estimate counts as following it."""
ORDERS = ("second", "first", "random")
"""In which features are kept: by the second-order estimate, by the first-order one's magnitude, at random."""
LOSSES: tuple[Literal["ce", "kl"], ...] = ("ce", "kl")
Order = Literal["first", "second"]
ESTIMATES: dict[Order, str] = {"first": "estimated", "second": "second"}
"""How their arrays are called."""


@dataclass(frozen=True)
class ImportantRun:
    """A run, and the importance of its features."""

    summary: RunSummary
    measured: MeasuredImportance

    @cached_property
    def half(self) -> float:
        """Features that hold half of the summed importance."""
        return count_with(HALF, self.measured.importance.ce_second)

    @cached_property
    def carrying(self) -> Interval:
        """Features that carry 90 % of what the SAE carries."""
        return carrying(self.measured.faithfulness)

    @cached_property
    def about(self) -> tuple[int, int] | None:
        """The measured counts between which `carrying` lies; None where the SAE carries nothing."""
        return measured_about(self.measured.faithfulness)

    @cached_property
    def share(self) -> float:
        """Share of the model's behaviour that the whole SAE carries."""
        return float(shares(self.measured.faithfulness, self.measured.faithfulness.ce)[-1])

    def agreement(
        self, order: Order, loss: Literal["ce", "kl"] = "ce", *, random_only: bool = False
    ) -> dict[str, Interval | None]:
        """Pearson's and Spearman's correlation between an estimate and exact ablation, over the ablated features.

        Args:
            order: to which the estimate goes.
            random_only: only those that were drawn at random, which stand for all alive features.
        """
        estimated, exact = self._ablated(order, loss, random_only)
        if np.isnan(estimated).any():
            return {"pearson": None, "spearman": None}
        return {of.__name__: correlation(estimated, exact, of) for of in (pearson, spearman)}

    def ranks_as_exact(self, order: Order, seed: int) -> Floats | None:
        """Spearman's correlation with exact ablation, and that of each resample of the features."""
        estimated, exact = self._ablated(order, "ce", False)
        return correlation_draws(estimated, exact, spearman, seed)

    def _ablated(self, order: Order, loss: Literal["ce", "kl"], random_only: bool) -> tuple[Floats, Floats]:
        """Estimates and exact rises of the ablated features."""
        ablated = self.measured.ablations
        kept = ~ablated.by_rank if random_only else np.ones(len(ablated.features), dtype=bool)
        return getattr(ablated, f"{ESTIMATES[order]}_{loss}")[kept], getattr(ablated, loss)[kept]


def curve_of(curve: Faithfulness, order: str) -> tuple[np.ndarray, Floats]:
    """Counts of features kept in one of `ORDERS`, ascending, and their CE `[points sequences]`."""
    return curve.by_importance if order == "second" else (curve.kept, getattr(curve, _CURVES[order]))


_CURVES = {"first": "first_order_ce", "random": "random_ce"}


@dataclass(frozen=True)
class ImportanceStudy:
    """The runs of one setting, compared."""

    setting: Setting
    runs: tuple[ImportantRun, ...]

    @cached_property
    def similar(self) -> tuple[ImportantRun, ...]:
        """One run of each method, all of one seed, those whose CE increases are closest."""
        return self._of(runs_at_similar([run.summary for run in self.runs], "ce_increase"))

    @cached_property
    def by_seed(self) -> tuple[tuple[ImportantRun, ...], ...]:
        """The same of every seed."""
        chosen = similar_by_seed([run.summary for run in self.runs], "ce_increase")
        return tuple(self._of(runs) for runs in chosen.values())

    def _of(self, summaries: Sequence[RunSummary]) -> tuple[ImportantRun, ...]:
        by_folder = {run.summary.folder: run for run in self.runs}
        return tuple(by_folder[each.folder] for each in summaries)

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        others = [method for method in methods_of(run.summary for run in self.runs) if method != self.baseline]
        compared = [claim for method in others for claim in (self._carrying(method), self._half(method))]
        present = dict.fromkeys(run.summary.method for run in self.similar)
        return (*compared, *(self._follows(method, order) for order in ESTIMATES for method in present))

    @cached_property
    def baseline(self) -> Method:
        """What the others are related to."""
        return baseline_of(methods_of(run.summary for run in self.runs))

    def _carrying(self, method: Method) -> Claim:
        claim = (
            f"{method.label} needs fewer features than {self.baseline.label} to carry {100 * CARRIED:.0f} % of what "
            "its SAE carries"
        )
        pairs = self._pairs(method)
        if not pairs:
            return Claim(claim, None, self._unpaired(method), "not testable here")
        ratio = carrying_ratio([(one.measured.faithfulness, base.measured.faithfulness) for one, base in pairs])
        return _ratio_finding(claim, pairs, ratio, [_counted(run) for run in pairs[0]])

    def _half(self, method: Method) -> Claim:
        claim = f"Half of the importance lies in fewer features of {method.label} than of {self.baseline.label}"
        pairs = self._pairs(method)
        if not pairs:
            return Claim(claim, None, self._unpaired(method), "not testable here")
        ratio = half_ratio([(one.measured.importance, base.measured.importance) for one, base in pairs])
        return _ratio_finding(claim, pairs, ratio, [f"{run.half:,.0f}" for run in pairs[0]])

    def _with_baseline(self, method: Method) -> list[tuple[ImportantRun, ImportantRun]]:
        """Of each seed that has both, a run of the method and one of the baseline."""
        chosen = [{run.summary.method: run for run in runs} for runs in self.by_seed]
        return [(of[method], of[self.baseline]) for of in chosen if {method, self.baseline} <= set(of)]

    def _pairs(self, method: Method) -> list[tuple[ImportantRun, ImportantRun]]:
        """Those at a similar CE increase."""
        return [pair for pair in self._with_baseline(method) if are_similar(run.summary for run in pair)]

    def _unpaired(self, method: Method) -> str:
        both = self._with_baseline(method)
        return "no two runs of a seed have a similar CE increase" if both else "no seed has both kinds"

    def _follows(self, method: Method, order: Order) -> Claim:
        claim = (
            f"The {order}-order estimate ranks {method.label}'s features as exact ablation does "
            f"(Spearman above {FOLLOWS:g})"
        )
        runs = [run for each in self.by_seed for run in each if run.summary.method == method]
        # Other features are ablated in each run, so each is resampled apart.
        draws = [run.ranks_as_exact(order, SEED + place) for place, run in enumerate(runs)]
        known = [(run, each) for run, each in zip(runs, draws, strict=True) if each is not None]
        if not known:
            most = max(len(run.measured.ablations.features) for run in runs)
            return Claim(claim, None, f"{most} features were ablated", "not testable here")
        rank = over_seeds(np.stack([each for _, each in known]), CORRELATION)
        summaries = [run.summary for run, _ in known]
        linear = [run.agreement(order)["pearson"] for run, _ in known]
        features = sum(len(run.measured.ablations.features) for run, _ in known)
        ours = (
            f"Spearman {rank.told('{:.2f}'.format)} {over('features', summaries)}, Pearson "
            f"{', '.join('–' if each is None else f'{each.estimate:.2f}' for each in linear)}, {features} features, "
            f"{knob_labels(summaries)} "
            f"{', '.join(f'{each:g}' for each in dict.fromkeys(run.knob.value for run in summaries))}"
        )
        return Claim(claim, None, ours, judged((rank, rank.low > FOLLOWS)))


def importance(
    paths: Iterable[str | Path],
    *,
    tokens: int | None = None,
    ablate: int = ABLATED,
    kl: bool = False,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = False,
) -> list[ImportanceStudy]:
    """Measures what was not measured yet (`features.measuring.measure_importance`) and compares what can be compared.

    Args:
        paths: evaluated run folders, or folders that hold some at any depth (a sweep's).

    Raises:
        RunFolderError: there is no run, or one was not evaluated yet.
        FormatError: what a run holds cannot be read.
        ConfigError, DataError: see `measure_importance`.
    """
    folders = runs_in(paths)
    summaries = with_settings(folders)
    measured = measure_importance(
        folders, tokens=tokens, ablate=ablate, kl=kl, again=again, model=model, corpora=corpora, display=display
    )
    sets: dict[tuple[Setting, int, str], list[ImportantRun]] = {}
    for folder, (summary, setting) in zip(folders, summaries, strict=True):
        settings = measured[folder].settings
        same = (setting, int(settings["tokens"]), str(settings["heldout"]))
        sets.setdefault(same, []).append(ImportantRun(summary, measured[folder]))
    return [ImportanceStudy(same[0], _in_order(sets[same])) for same in sorted(sets, key=_place)]


def _place(same: tuple[Setting, int, str]) -> tuple[str, str, bool, int, int, tuple[tuple[str, str], ...], int]:
    s, tokens, _ = same
    return s.model, s.site, s.started, s.d_sae, s.tokens, s.further, tokens


def _in_order(runs: Sequence[ImportantRun]) -> tuple[ImportantRun, ...]:
    def place(run: ImportantRun) -> tuple[Any, ...]:
        return run.summary.method.place, run.summary.seed, run.summary.knob

    return tuple(sorted(runs, key=place))


def _counted(run: ImportantRun) -> str:
    """The features that carry `CARRIED`; with the measured counts about them where these are far apart."""
    count, about = f"{run.carrying.estimate:,.0f}", run.about
    if about is None or about[1] <= max(NARROW * about[0], about[0] + 1):
        return count
    return f"{count} (interpolated between {about[0]:,} and {about[1]:,}; --again measures in between)"


def _ratio_finding(
    claim: str, pairs: Sequence[tuple[ImportantRun, ImportantRun]], ratio: OverSeeds, counts: Sequence[str]
) -> Claim:
    """Shown if the whole of an interval that holds text and seeds lies below 1.

    Args:
        counts: of the first pair.
    """
    if not np.isfinite(ratio.estimate):
        return Claim(
            claim, None, "an SAE carries nothing, or needs no feature for what it carries", "not testable here"
        )
    one, base = (run.summary for run in pairs[0])
    told = ratio.told(lambda share: f"{100 * share:.0f}", " %")
    ours = (
        f"{told} of {base.method.label}'s {over('held-out text', [run.summary for pair in pairs for run in pair])}; "
        f"{' against '.join(counts)} features, at CE increases of {one.ce_increase:+.3f} and {base.ce_increase:+.3f} "
        f"and L0s of {one.l0:.1f} and {base.l0:.1f} (seed {one.seed})"
    )
    return Claim(claim, None, ours, judged((ratio, ratio.high < 1)))


def feature_rows(studies: Sequence[ImportanceStudy]) -> list[dict[str, Any]]:
    """One row per run and feature; `rank` and `share` are by `ce.second`. Those that never fired have no rank."""
    rows = []
    for run in _runs(studies):
        found = run.measured.importance
        magnitudes = np.abs(found.ce_second)
        total = magnitudes.sum() or 1.0
        order = np.lexsort((-found.ce_second, found.firings == 0))
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(1, len(order) + 1)
        for f in range(len(places)):
            row: dict[str, Any] = {"run": run.summary.folder, "kind": run.summary.method.key, "feature": f}
            row |= {"firings": int(found.firings[f]), "density": found.firings[f] / found.tokens}
            row |= {"mean_active": found.mean_active[f], "ce": found.ce[f], "ce.se": found.ce_se[f]}
            row |= {
                "ce.second": found.ce_second[f],
                "ce.absolute": found.ce_absolute[f],
                "kl": found.kl[f],
                "kl.se": found.kl_se[f],
            }
            row |= {"kl.absolute": found.kl_absolute[f], "share": magnitudes[f] / total}
            rows.append(_plain(row | {"rank": int(places[f]) if found.firings[f] else None}))
    return rows


def ablation_rows(studies: Sequence[ImportanceStudy]) -> list[dict[str, Any]]:
    """One row per run and ablated feature: what zeroing it does, and what was estimated on the same sequences."""
    rows = []
    for run in _runs(studies):
        found = run.measured.ablations
        for i, feature in enumerate(found.features):
            row: dict[str, Any] = {"run": run.summary.folder, "kind": run.summary.method.key, "feature": int(feature)}
            row |= {"chosen": "by rank" if found.by_rank[i] else "at random", "sequences": int(found.sequences[i])}
            for loss in LOSSES:
                row |= {loss: getattr(found, loss)[i], f"{loss}.se": getattr(found, f"{loss}_se")[i]}
                row |= {f"{loss}.{order}": getattr(found, f"{prefix}_{loss}")[i] for order, prefix in ESTIMATES.items()}
            rows.append(_plain(row))
    return rows


def faithfulness_rows(studies: Sequence[ImportanceStudy]) -> list[dict[str, Any]]:
    """One row per run, order and number of features kept; shares of the model's behaviour with 95 % intervals."""
    rows = []
    for run in _runs(studies):
        curve = run.measured.faithfulness
        predictions, clean = curve.predictions.sum(), curve.clean.sum()
        for order in ORDERS:
            kept, sums = curve_of(curve, order)
            from_zeroed = _share_from_zeroed(curve, sums)
            for point, interval in enumerate(share_intervals(curve, sums)):
                ce = sums[point].sum()
                row = {"run": run.summary.folder, "kind": run.summary.method.key, "order": order}
                row |= {
                    "kept": int(kept[point]),
                    "ce": ce / predictions,
                    "ce_increase": (ce - clean) / predictions,
                }
                row |= {"share": interval.estimate, "share.low": interval.low, "share.high": interval.high}
                rows.append(_plain(row | {"share_from_zeroed": from_zeroed[point]}))
    return rows


def share_intervals(curve: Faithfulness, ce: np.ndarray) -> list[Interval]:
    """The share at each point, with its 95 % bootstrap interval over sequences."""
    draws = share_draws(curve, ce)
    return [percentile_interval(*pair) for pair in zip(draws.T, shares(curve, ce).tolist(), strict=True)]


def _share_from_zeroed(curve: Faithfulness, ce: np.ndarray) -> list[float]:
    """The same with another baseline: no feature kept, the decoder's bias alone."""
    base, clean = ce[0].sum(), curve.clean.sum()
    return [float((base - each.sum()) / (base - clean)) if base != clean else float("nan") for each in ce]


def run_rows(studies: Sequence[ImportanceStudy]) -> list[dict[str, Any]]:
    """One row a run: what it is, on how few features it rests, and how the estimate agrees with exact ablation."""
    rows = []
    for study in studies:
        for run in study.runs:
            summary, found = run.summary, run.measured.importance
            row: dict[str, Any] = {"run": summary.folder, "model": summary.model, "site": summary.site}
            row |= {"kind": summary.method.key, **summary.knob.columns, "seed": summary.seed}
            row |= {"data_seed": summary.data_seed}
            row |= {"l0": summary.l0, "ce_increase": summary.ce_increase, "tokens": found.tokens}
            row |= {"alive": found.alive, "half_of_importance": run.half, "share": run.share}
            row |= {"carrying": run.carrying.estimate, "carrying.low": run.carrying.low}
            below, above = run.about or (None, None)
            row |= {"carrying.high": run.carrying.high, "measured_below": below, "measured_above": above}
            row |= {"ablated": len(run.measured.ablations.features)}
            rows.append(_plain(row | _agreement_columns(run)))
    return rows


def claim_rows(studies: Sequence[ImportanceStudy]) -> list[dict[str, Any]]:
    """One row for each claim of each set."""
    return [{"site": study.setting.site, **vars(claim)} for study in studies for claim in study.claims]


def _agreement_columns(run: ImportantRun) -> dict[str, float | None]:
    """`spearman.ce.second.at_random.low` and their like."""
    columns: dict[str, float | None] = {}
    for loss, order, (only, suffix) in itertools.product(LOSSES, ESTIMATES, ((False, ""), (True, ".at_random"))):
        for name, interval in run.agreement(order, loss, random_only=only).items():
            ends = (None, None, None) if interval is None else (interval.estimate, interval.low, interval.high)
            keys = (f"{name}.{loss}.{order}{suffix}{end}" for end in ("", ".low", ".high"))
            columns |= dict(zip(keys, ends, strict=True))
    return columns


def _runs(studies: Sequence[ImportanceStudy]) -> list[ImportantRun]:
    return [run for study in studies for run in study.runs]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Python's own numbers; nothing in the place of NaN."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    return {n: None if isinstance(value, float) and np.isnan(value) else value for n, value in values.items()}
