"""Features that matter, and the few on which the model's behaviour rests: measured runs, compared method by method."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from endwise.analysis.claims import Claim, Unmeasured, are_similar
from endwise.analysis.comparable import baseline_of, runs_in, with_settings
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
from endwise.analysis.over_seeds import CORRELATION, OverSeeds, interval_columns, judged, over, over_seeds
from endwise.analysis.sets import RunSet, columns_of_run, in_sets
from endwise.common.statistics import Floats, Interval, percentile_interval
from endwise.common.text import minus
from endwise.config.method import Method
from endwise.evaluation.summary import RunSummary, knob_labels
from endwise.features.importance_table import Faithfulness, MeasuredImportance
from endwise.models.language_model import LanguageModel
from endwise.runs.finding import Paths
from endwise.tokens import Corpora

FOLLOWS = 0.5
"""Spearman's correlation with exact ablation above which an estimate counts as following it."""
ORDERS = ("second", "first", "random")
"""Orders in which features are kept: by the second-order estimate, by the first-order one's magnitude, at random."""
LOSSES: tuple[Literal["ce", "kl"], ...] = ("ce", "kl")
Row = dict[str, Any]
Order = Literal["first", "second"]
ESTIMATES: dict[Order, str] = {"first": "estimated", "second": "second"}
"""Prefixes of the arrays' names."""


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


@dataclass(frozen=True, repr=False)
class ImportanceStudy(RunSet[ImportantRun]):
    """The runs of one setting, compared."""

    @cached_property
    def similar(self) -> tuple[ImportantRun, ...]:
        """One run of each method, all of one seed, those whose CE increases are closest."""
        return self.closest("ce_increase")

    @cached_property
    def by_seed(self) -> list[dict[Method, ImportantRun]]:
        """The same of every seed, by method."""
        return self.closest_by_seed("ce_increase")

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        compared = [claim for method in self.methods if method != self.baseline for claim in self._counts(method)]
        present = dict.fromkeys(run.summary.method for run in self.similar)
        return (*compared, *(self._follows(method, order) for order in ESTIMATES for method in present))

    @cached_property
    def baseline(self) -> Method:
        """Method that the others are related to."""
        return baseline_of(self.methods)

    def _counts(self, method: Method) -> list[Claim]:
        """Judge on how few features a method rests, relative to the baseline."""
        name, base = method.label, self.baseline.label
        carrying = f"{name} needs fewer features than {base} to carry {100 * CARRIED:.0f} % of what its SAE carries"
        half = f"Half of the importance lies in fewer features of {name} than of {base}"
        both = [(of[method], of[self.baseline]) for of in self.by_seed if {method, self.baseline} <= set(of)]
        pairs = [pair for pair in both if are_similar(run.summary for run in pair)]
        if not pairs:
            why = "no two runs of a seed have a similar CE increase" if both else "no seed has both kinds"
            return [Unmeasured(claim, None, why) for claim in (carrying, half)]
        measured = [(one.measured, other.measured) for one, other in pairs]
        ratio = carrying_ratio([(one.faithfulness, other.faithfulness) for one, other in measured])
        of_half = half_ratio([(one.importance, other.importance) for one, other in measured])
        return [
            _ratio_finding(carrying, pairs, ratio, [_counted(run) for run in pairs[0]]),
            _ratio_finding(half, pairs, of_half, [f"{run.half:,.0f}" for run in pairs[0]]),
        ]

    def _follows(self, method: Method, order: Order) -> Claim:
        claim = (
            f"The {order}-order estimate ranks {method.label}'s features as exact ablation does "
            f"(Spearman above {FOLLOWS:g})"
        )
        runs = [of[method] for of in self.by_seed if method in of]
        # Other features are ablated in each run, so each is resampled apart.
        draws = [run.ranks_as_exact(order, SEED + place) for place, run in enumerate(runs)]
        known = [(run, each) for run, each in zip(runs, draws, strict=True) if each is not None]
        if not known:
            most = max(len(run.measured.ablations.features) for run in runs)
            return Unmeasured(claim, None, f"{most} features were ablated")
        rank = over_seeds(np.stack([each for _, each in known]), CORRELATION)
        summaries = [run.summary for run, _ in known]
        linear = [run.agreement(order)["pearson"] for run, _ in known]
        pearson = ", ".join("–" if each is None else minus(f"{each.estimate:.2f}") for each in linear)
        features = sum(len(run.measured.ablations.features) for run, _ in known)
        ours = (
            f"Spearman {rank.text('{:.2f}'.format)} {over('features', summaries)}, Pearson {pearson}, "
            f"{features} features, {knob_labels(summaries)} "
            f"{', '.join(f'{each:g}' for each in dict.fromkeys(run.knob.value for run in summaries))}"
        )
        return Claim(claim, None, ours, judged((rank, rank.low > FOLLOWS)))


def importance(
    paths: Paths,
    *,
    tokens: int | None = None,
    ablate: int = ABLATED,
    kl: bool = False,
    again: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = False,
) -> list[ImportanceStudy]:
    """Measure what every feature of runs is worth, and write `importance.safetensors` into each; what was measured
    with the same settings is read. Compares what can be compared.

    Args:
        paths: evaluated run folders, or folders that hold some at any depth (a sweep's); those of one model and one
            corpus share every clean pass.
        tokens: held-out tokens, instead of each recipe's `evaluation.tokens`.
        ablate: features of each run to ablate one by one.
        kl: attribute the KL besides the CE, which needs the whole clean pass and a second backward pass.
        again: measure whatever was measured before.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        display: show progress on stderr.

    Raises:
        RunFolderError: there is no run, or one was not evaluated yet.
        FormatError: what a run holds cannot be read.
        ConfigError: fewer than two sequences, which cannot be halved, or a negative number of features.
        DataError: the held-out text is too short, or a loss on it is NaN or infinite.
    """
    folders = runs_in(paths)
    summaries = with_settings(folders)
    measured = measure_importance(
        folders, tokens=tokens, ablate=ablate, kl=kl, again=again, model=model, corpora=corpora, display=display
    )
    runs = [
        (setting, ImportantRun(summary, measured[folder]))
        for folder, (summary, setting) in zip(folders, summaries, strict=True)
    ]

    def text(run: ImportantRun) -> tuple[int, str]:
        return int(run.measured.settings["tokens"]), str(run.measured.settings["heldout"])

    return [ImportanceStudy(*each) for each in in_sets(runs, text)]


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
        return Unmeasured(claim, None, "an SAE carries nothing, or needs no feature for what it carries")
    one, base = (run.summary for run in pairs[0])
    shares = ratio.text(lambda share: f"{100 * share:.0f}", " %")
    ours = (
        f"{shares} of {base.method.label}'s {over('held-out text', [run.summary for pair in pairs for run in pair])}; "
        f"{' against '.join(counts)} features, at CE increases of "
        + minus(f"{one.ce_increase:+.3f} and {base.ce_increase:+.3f} ")
        + f"and L0s of {one.l0:.1f} and {base.l0:.1f} (seed {one.seed})"
    )
    return Claim(claim, None, ours, judged((ratio, ratio.high < 1)))


def feature_rows(studies: Sequence[ImportanceStudy]) -> list[Row]:
    """One row per run and feature; `rank` and `share` are by `ce.second`. Those that never fired have no rank."""
    rows = []
    for run in _runs(studies):
        found = run.measured.importance
        magnitudes, order = np.abs(found.ce_second), np.lexsort((-found.ce_second, found.firings == 0))
        places = np.empty(len(order))
        places[order] = np.arange(1, len(order) + 1)
        columns = {
            "feature": np.arange(len(order)),
            "firings": found.firings,
            "density": found.firings / found.tokens,
            "mean_active": found.mean_active,
            "ce": found.ce,
            "ce.se": found.ce_se,
            "ce.second": found.ce_second,
            "ce.absolute": found.ce_absolute,
            "kl": found.kl,
            "kl.se": found.kl_se,
            "kl.absolute": found.kl_absolute,
            "share": magnitudes / (magnitudes.sum() or 1.0),
        }
        ranks = [int(place) if fires else None for place, fires in zip(places, found.firings > 0, strict=True)]
        rows += [row | {"rank": rank} for row, rank in zip(_rows_of(run, columns), ranks, strict=True)]
    return rows


def ablation_rows(studies: Sequence[ImportanceStudy]) -> list[Row]:
    """One row per run and ablated feature: what zeroing it does, and what was estimated on the same sequences."""
    rows = []
    for run in _runs(studies):
        found = run.measured.ablations
        columns = {"feature": found.features, "chosen": np.where(found.by_rank, "by rank", "at random")}
        columns["sequences"] = found.sequences
        for loss in LOSSES:
            columns |= {loss: getattr(found, loss), f"{loss}.se": getattr(found, f"{loss}_se")}
            columns |= {f"{loss}.{order}": getattr(found, f"{prefix}_{loss}") for order, prefix in ESTIMATES.items()}
        rows += _rows_of(run, columns)
    return rows


def faithfulness_rows(studies: Sequence[ImportanceStudy]) -> list[Row]:
    """One row per run, order and number of features kept; shares of the model's behaviour with 95 % intervals, and
    `share_from_zeroed`: the same with no feature kept, the decoder's bias alone, as the baseline.
    """
    rows = []
    for run in _runs(studies):
        curve = run.measured.faithfulness
        predictions, clean = curve.predictions.sum(), curve.clean.sum()
        for order in ORDERS:
            kept, sums = curve_of(curve, order)
            intervals, ce = share_intervals(curve, sums), np.array([each.sum() for each in sums])
            whole = ce[0] - clean
            columns = {
                "order": np.full(len(kept), order),
                "kept": kept,
                "ce": ce / predictions,
                "ce_increase": (ce - clean) / predictions,
                "share": np.array([each.estimate for each in intervals]),
                "share.low": np.array([each.low for each in intervals]),
                "share.high": np.array([each.high for each in intervals]),
                "share_from_zeroed": (ce[0] - ce) / whole if whole else np.full(len(ce), np.nan),
            }
            rows += _rows_of(run, columns)
    return rows


def share_intervals(curve: Faithfulness, ce: np.ndarray) -> list[Interval]:
    """The share at each point, with its 95 % bootstrap interval over sequences."""
    draws = share_draws(curve, ce)
    return [percentile_interval(*pair) for pair in zip(draws.T, shares(curve, ce).tolist(), strict=True)]


def run_rows(studies: Sequence[ImportanceStudy]) -> list[Row]:
    """One row a run: what it is, on how few features it rests, and how the estimate agrees with exact ablation."""
    rows = []
    for run in _runs(studies):
        summary, found = run.summary, run.measured.importance
        below, above = run.about or (None, None)
        row = {"run": summary.folder, "model": summary.model, "site": summary.site, **columns_of_run(summary)}
        row |= {"l0": summary.l0, "ce_increase": summary.ce_increase, "tokens": found.tokens, "alive": found.alive}
        row |= {"half_of_importance": _known(run.half), "share": _known(run.share)}
        row |= {**interval_columns("carrying", run.carrying), "measured_below": below, "measured_above": above}
        rows.append(row | {"ablated": len(run.measured.ablations.features)} | _agreement_columns(run))
    return rows


def claim_rows(studies: Sequence[ImportanceStudy]) -> list[Row]:
    """One row for each claim of each set."""
    return [{"site": study.setting.site, **vars(claim)} for study in studies for claim in study.claims]


def _agreement_columns(run: ImportantRun) -> Row:
    """`spearman.ce.second.at_random.low` and their like."""
    columns: Row = {}
    for loss, order, (only, suffix) in itertools.product(LOSSES, ESTIMATES, ((False, ""), (True, ".at_random"))):
        for name, interval in run.agreement(order, loss, random_only=only).items():
            columns |= interval_columns(f"{name}.{loss}.{order}{suffix}", interval)
    return columns


def _runs(studies: Sequence[ImportanceStudy]) -> list[ImportantRun]:
    return [run for study in studies for run in study.runs]


def _rows_of(run: ImportantRun, columns: Mapping[str, np.ndarray]) -> list[Row]:
    """Columns as rows of Python's own numbers, the run in front; nothing in the place of NaN."""
    head = {"run": run.summary.folder, "kind": run.summary.method.key}
    cells = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{**head, **dict(zip(columns, map(_known, row), strict=True))} for row in cells]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value
