"""Which features matter, and on how few the model's behaviour rests: measured runs, compared kind by kind."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from endwise.analysis.claims import Claim, Verdict
from endwise.analysis.comparison import runs_at_similar
from endwise.analysis.concentration import (
    CARRIED,
    HALF,
    carrying,
    carrying_ratio,
    correlation,
    count_with,
    half_ratio,
    share_draws,
    shares,
)
from endwise.analysis.correlations import pearson, spearman
from endwise.analysis.pareto import Setting, runs_in, with_settings
from endwise.analysis.run_summary import KINDS, LABELS, RunSummary
from endwise.features.importance import Faithfulness, Measured
from endwise.features.measuring import ABLATED, measure_importance
from endwise.language_model import LanguageModel
from endwise.statistics import LEAST_SEEDS, Interval, interval_over_seeds, percentile_interval
from endwise.tokens import Corpora

FOLLOWS = 0.5
"""Spearman's correlation with exact ablation above which an estimate counts as following it."""
ORDERS = {"second": "ce", "first": "first_order_ce", "random": "random_ce"}
"""In which features are kept: by the second-order estimate, by the first-order one's magnitude, at random."""
LOSSES: tuple[Literal["ce", "kl"], ...] = ("ce", "kl")
Order = Literal["first", "second"]
ESTIMATES: dict[Order, str] = {"first": "estimated", "second": "second"}
"""How their arrays are called."""


@dataclass(frozen=True)
class ImportantRun:
    """A run, and the importance of its features."""

    summary: RunSummary
    measured: Measured

    @cached_property
    def half(self) -> float:
        """Features that hold half of the summed importance."""
        return count_with(HALF, self.measured.importance.ce_second)

    @cached_property
    def carrying(self) -> Interval:
        """Features that carry 90 % of what the SAE carries."""
        return carrying(self.measured.faithfulness)

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
        ablated = self.measured.ablations
        kept = ~ablated.by_rank if random_only else np.ones(len(ablated.features), dtype=bool)
        estimated, exact = (getattr(ablated, name)[kept] for name in (f"{ESTIMATES[order]}_{loss}", loss))
        if np.isnan(estimated).any():
            return {"pearson": None, "spearman": None}
        return {of.__name__: correlation(estimated, exact, of) for of in (pearson, spearman)}


@dataclass(frozen=True)
class ImportanceStudy:
    """The runs of one setting, compared."""

    setting: Setting
    runs: tuple[ImportantRun, ...]

    @cached_property
    def similar(self) -> tuple[ImportantRun, ...]:
        """One run of each kind, those of the first seed whose CE increases are closest."""
        return self._similar(min(run.summary.seed for run in self.runs))

    def _similar(self, seed: int) -> tuple[ImportantRun, ...]:
        by_folder = {run.summary.folder: run for run in self.runs if run.summary.seed == seed}
        return tuple(
            by_folder[each.folder]
            for each in runs_at_similar([run.summary for run in by_folder.values()], "ce_increase")
        )

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        kinds = [kind for kind in KINDS[1:] if any(run.summary.kind == kind for run in self.runs)]
        compared = [claim for kind in kinds for claim in (self._carrying(kind), self._half(kind))]
        return (*compared, *(_follows(run, order) for order in ESTIMATES for run in self.similar))

    def _carrying(self, kind: str) -> Claim:
        claim = f"{LABELS[kind]} needs fewer features than local to carry {100 * CARRIED:.0f} % of what its SAE carries"
        pairs = self._pairs(kind)
        ratios = [carrying_ratio(one.measured.faithfulness, local.measured.faithfulness) for one, local in pairs]
        return _ratio_finding(claim, pairs, ratios, [f"{run.carrying.estimate:,.0f}" for run in _first(pairs)])

    def _half(self, kind: str) -> Claim:
        claim = f"Half of the importance lies in fewer features of {LABELS[kind]} than of local"
        pairs = self._pairs(kind)
        ratios = [half_ratio(one.measured.importance, local.measured.importance) for one, local in pairs]
        return _ratio_finding(claim, pairs, ratios, [f"{run.half:,.0f}" for run in _first(pairs)])

    def _pairs(self, kind: str) -> list[tuple[ImportantRun, ImportantRun]]:
        """Of each seed that has both, a run of the kind and a local one, at similar CE increase."""
        pairs = []
        for seed in sorted({run.summary.seed for run in self.runs}):
            of = {each: [r for r in self.runs if (r.summary.seed, r.summary.kind) == (seed, each)] for each in KINDS}
            if of[kind] and of["local"]:
                chosen = {run.summary.kind: run for run in self._similar(seed)}
                pairs.append((chosen[kind], chosen["local"]))
        return pairs


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
    def place(run: ImportantRun) -> tuple[int, int, float]:
        return KINDS.index(run.summary.kind), run.summary.seed, run.summary.coefficient

    return tuple(sorted(runs, key=place))


def _first(pairs: Sequence[tuple[ImportantRun, ImportantRun]]) -> tuple[ImportantRun, ...]:
    return pairs[0] if pairs else ()


def _ratio_finding(
    claim: str,
    pairs: Sequence[tuple[ImportantRun, ImportantRun]],
    ratios: Sequence[Interval],
    counts: Sequence[str],
) -> Claim:
    """Shown if the whole interval lies below 1; over seeds where there are enough, otherwise over held-out text."""
    if not pairs:
        return Claim(claim, None, "no seed has both kinds", "not testable here")
    if not all(np.isfinite([each.estimate for each in ratios])):
        return Claim(
            claim, None, "an SAE carries nothing, or needs no feature for what it carries", "not testable here"
        )
    one, local = (run.summary for run in pairs[0])
    where = f"at CE increases of {one.ce_increase:+.3f} and {local.ce_increase:+.3f}"
    if len(ratios) >= LEAST_SEEDS:
        ratio, over = interval_over_seeds([each.estimate for each in ratios]), f"over {len(ratios)} seeds"
    else:
        ratio, over = ratios[0], "over held-out text"
    verdict: Verdict = "shown" if ratio.high < 1 else "not shown"
    ends = f"[{100 * ratio.low:.0f}, {100 * ratio.high:.0f}]"
    ours = f"{100 * ratio.estimate:.0f} % of local's {ends} {over}; {' against '.join(counts)} features, {where}"
    return Claim(claim, None, ours + (f" (seed {one.seed})" if len(ratios) > 1 else ""), verdict)


def _follows(run: ImportantRun, order: Order) -> Claim:
    kind = LABELS[run.summary.kind]
    claim = f"The {order}-order estimate ranks {kind}'s features as exact ablation does (Spearman above {FOLLOWS:g})"
    found = run.agreement(order)
    rank, linear = found["spearman"], found["pearson"]
    if rank is None or linear is None:
        return Claim(claim, None, f"{len(run.measured.ablations.features)} features were ablated", "not testable here")
    ours = (
        f"Spearman {rank.estimate:.2f} [{rank.low:.2f}, {rank.high:.2f}], Pearson {linear.estimate:.2f} "
        f"[{linear.low:.2f}, {linear.high:.2f}] over {len(run.measured.ablations.features)} features, "
        f"λ {run.summary.coefficient:g}"
    )
    return Claim(claim, None, ours, "shown" if rank.low > FOLLOWS else "not shown")


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
            row: dict[str, Any] = {"run": run.summary.folder, "kind": run.summary.kind, "feature": f}
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
            row: dict[str, Any] = {"run": run.summary.folder, "kind": run.summary.kind, "feature": int(feature)}
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
        for order, name in ORDERS.items():
            sums = getattr(curve, name)
            from_zeroed = _share_from_zeroed(curve, sums)
            for point, interval in enumerate(share_intervals(curve, sums)):
                ce = sums[point].sum()
                row = {"run": run.summary.folder, "kind": run.summary.kind, "order": order}
                row |= {
                    "kept": int(curve.kept[point]),
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
            row |= {"kind": summary.kind, "coefficient": summary.coefficient, "seed": summary.seed}
            row |= {"l0": summary.l0, "ce_increase": summary.ce_increase, "tokens": found.tokens}
            row |= {"alive": found.alive, "half_of_importance": run.half, "share": run.share}
            row |= {"carrying": run.carrying.estimate, "carrying.low": run.carrying.low}
            row |= {"carrying.high": run.carrying.high, "ablated": len(run.measured.ablations.features)}
            rows.append(_plain(row | _agreement_columns(run)))
    return rows


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
