"""Lengths, directions and later layers: what each kind of SAE keeps of an activation, and whether it is what counts.

Along each principal direction of the activations, an SAE's reconstruction is compared with what the model loses when
the direction is resample-ablated (paper, figures 21 to 23). If an SAE drops what the model does not use, then over
directions the quality of its reconstruction rises with that loss, as Spearman's rank correlation says without assuming
any shape. Its interval resamples directions.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.analysis import paper
from endwise.analysis.claims import Claim, Verdict, are_similar, shown_if_all
from endwise.analysis.comparison import runs_at_similar
from endwise.analysis.correlations import LEAST, interval_of, partial_spearman, resampled_points, spearman
from endwise.analysis.pareto import RESAMPLES, SEED, Setting, columns_of, comparable
from endwise.analysis.ratios import Ratio, downstream_ratio, times
from endwise.analysis.run_summary import KINDS, LABELS, RunSummary
from endwise.features.directions import RunDirections, measure_directions
from endwise.features.norms import Norms
from endwise.language_model import LanguageModel
from endwise.statistics import Interval
from endwise.tokens import Corpora

PAIRS = (("e2e", "local"), ("e2e_ds", "local"), ("e2e", "e2e_ds"))
"""Kinds that are held against each other."""


@dataclass(frozen=True)
class Follows:
    """How far a run's reconstruction of directions follows their use: rank correlations over directions, with 95 %
    bootstrap intervals.
    """

    rank: Interval
    """Of the correlation between original and reconstructed component with the resample-ablation KL."""
    given_variance: Interval
    """The same given the directions' variance, which drives both."""
    directions: int


@dataclass(frozen=True)
class Contrast:
    """Two runs at similar CE increase; everything paired over directions."""

    kind: str
    reference: str
    rank: Interval
    """Difference of their `Follows.rank`."""
    given_variance: Interval
    dropped: Interval
    """Rank correlation of the KL with how much worse `kind` reconstructs a direction than `reference` (difference of
    correlations). Below 0: what it drops is what the model uses less."""
    dropped_given_variance: Interval
    """The same given the directions' variance: whether, of directions of like variance, it drops those less used."""


@dataclass(frozen=True)
class Directions:
    """The runs of one setting and one held-out text."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    measured: Mapping[str, RunDirections]
    """By run folder."""
    similar: tuple[RunSummary, ...]
    """One run of each kind, those whose CE increases are closest to each other."""
    follows: Mapping[str, Follows]
    """By run folder; none where fewer than `LEAST` directions were ablated."""
    contrasts: tuple[Contrast, ...]
    """Of `similar`."""
    downstream: Ratio | None
    """Downstream MSE of e2e+ds relative to e2e, of `similar`; None where one is missing."""

    @property
    def norms(self) -> dict[str, Norms]:
        """By run folder."""
        return {folder: each.norms for folder, each in self.measured.items()}

    @property
    def claims(self) -> list[Claim]:
        """What the paper says of lengths, later layers and dropped directions, held against the runs of `similar`."""
        return [
            norm_claim({self.setting.site: self.similar}, self.norms),
            _downstream_claim(self),
            *(claim for kind in ("e2e", "e2e_ds") for claim in _dropped_claims(self, kind)),
        ]


def directions(
    runs: str | Path | Iterable[str | Path],
    *,
    tokens: int | None = None,
    directions: int | None = None,
    with_starts: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
) -> list[Directions]:
    """Measures evaluated runs, or reads what was measured before, and compares those that can be compared.

    Args:
        runs: run folders, or folders that hold some at any depth.
        tokens: held-out tokens, instead of each recipe's `evaluation.tokens`.
        directions: resample-ablate this many of the first principal directions and as many of the others; None: all of
            them at a narrow site (`features.directions.SMALL`).
        with_starts: position 0 and document starts count among the tokens that the directions are of.
        model, corpora: loaded ones to use instead of the recipes'.

    Raises:
        RunFolderError: there is no run, or one was not evaluated yet.
        FormatError: what a run holds cannot be read.
        ConfigError: fewer tokens than one sequence has.
    """
    paths = [runs] if isinstance(runs, str | Path) else runs
    sets = comparable(paths)
    summaries = [run for group in sets.values() for run in group]
    measured = measure_directions(
        [Path(run.folder) for run in summaries],
        tokens=tokens,
        directions=directions,
        with_starts=with_starts,
        model=model,
        corpora=corpora,
    )
    by_folder = {str(path): each for path, each in measured.items()}
    found = []
    for setting, group in sets.items():
        texts = dict.fromkeys(by_folder[run.folder].text for run in group)
        found += [
            _compare(setting, [r for r in group if by_folder[r.folder].text == text], by_folder) for text in texts
        ]
    return found


def _compare(setting: Setting, runs: Sequence[RunSummary], by_folder: Mapping[str, RunDirections]) -> Directions:
    ordered = tuple(sorted(runs, key=lambda run: (KINDS.index(run.kind), run.coefficient, run.seed)))
    measured = {run.folder: by_folder[run.folder] for run in ordered}
    similar = {run.kind: run for run in runs_at_similar(ordered, "ce_increase")}
    pairs = [(a, b) for a, b in PAIRS if a in similar and b in similar]
    enough = len(_ablated(next(iter(measured.values())))) >= LEAST
    both = "e2e" in similar and "e2e_ds" in similar
    return Directions(
        setting=setting,
        runs=ordered,
        measured=measured,
        similar=tuple(similar.values()),
        follows={folder: follows(each) for folder, each in measured.items()} if enough else {},
        contrasts=tuple(
            contrast(a, measured[similar[a].folder], b, measured[similar[b].folder]) for a, b in pairs if enough
        ),
        downstream=downstream_ratio(similar["e2e_ds"], similar["e2e"], RESAMPLES, SEED) if both else None,
    )


def _ablated(run: RunDirections) -> NDArray[np.intp]:
    """Numbers of the directions that were ablated and are there at all."""
    return np.flatnonzero(np.isfinite(run.kl.estimate) & np.isfinite(run.correlation.estimate))


def follows(run: RunDirections, resamples: int = RESAMPLES, seed: int = SEED) -> Follows:
    """
    Raises:
        DataError: too few directions were ablated.
    """
    at = _ablated(run)
    weights = resampled_points(len(at), resamples, seed)
    kept, kl, variance = run.correlation.estimate[at], run.kl.estimate[at], run.variance[at]
    rank, given = spearman(kept, kl, weights), partial_spearman(kept, kl, variance, weights)
    return Follows(interval_of(rank), interval_of(given), len(at))


def contrast(
    kind: str,
    run: RunDirections,
    reference: str,
    other: RunDirections,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Contrast:
    """
    Raises:
        DataError: too few directions were ablated.
    """
    at = _ablated(run)
    weights = resampled_points(len(at), resamples, seed)
    kl, variance = run.kl.estimate[at], run.variance[at]
    kept, kept_by_other = run.correlation.estimate[at], other.correlation.estimate[at]
    return Contrast(
        kind,
        reference,
        interval_of(spearman(kept, kl, weights) - spearman(kept_by_other, kl, weights)),
        interval_of(
            partial_spearman(kept, kl, variance, weights) - partial_spearman(kept_by_other, kl, variance, weights)
        ),
        interval_of(spearman(kept_by_other - kept, kl, weights)),
        interval_of(partial_spearman(kept_by_other - kept, kl, variance, weights)),
    )


def norm_claim(similar: Mapping[str, Sequence[RunSummary]], measured: Mapping[str, Norms]) -> Claim:
    """Table 5.

    Args:
        similar: the runs of each place whose CE increases are closest to each other; only where these are similar is
            anything said of their order.
        measured: by run folder.
    """
    told, holds = [], []
    for place, runs in similar.items():
        ratios = {run.kind: measured[run.folder].ratio for run in runs if run.folder in measured}
        told.append(f"{place}: " + ", ".join(f"{LABELS[kind]} {_told(each)}" for kind, each in ratios.items()))
        if set(ratios) >= set(KINDS) and are_similar(runs):
            order = [ratios[kind] for kind in ("e2e", "e2e_ds", "local")]
            shorter = ratios["local"].high < 1
            holds.append(shorter and all(a.high < b.low for a, b in itertools.pairwise(order)))
    published = ", ".join(
        f"{LABELS[kind]} {'/'.join(f'{value:.2f}' for value in values)}" for kind, values in paper.NORM_RATIO.items()
    )
    return Claim(
        "At a similar CE increase reconstructions are shorter than activations (‖â‖/‖a‖), e2e's most, e2e+ds's less, "
        "local's least",
        f"{published} (layers 2/6/10)",
        "; ".join(told) or "no runs of all kinds",
        shown_if_all(holds),
    )


def _downstream_claim(found: Directions) -> Claim:
    ratio, missing = found.downstream, _missing(found, "e2e", "e2e_ds")
    verdict: Verdict = "not testable here"
    if missing or ratio is None:
        told = missing
    elif ratio.estimate is None:
        told = f"not measured ({ratio.reason})"
    else:
        ends = f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]" if ratio.interval else f" ({ratio.reason})"
        told = "; ".join(
            [f"e2e+ds's downstream MSE is {times(ratio.estimate)}{ends} times e2e's", *_later_cosines(found)]
        )
        verdict = ratio.below
    return Claim(
        "e2e strays further from the original activations in later layers than e2e+ds, at a similar CE increase",
        "e2e 14.5 to 22, e2e+ds 3.5 to 2.5 in MSE after layer 6 (about a sixth)",
        told,
        verdict,
    )


def _missing(found: Directions, kind: str, other: str) -> str:
    """Why two kinds cannot be compared at a similar CE increase; empty if they can."""
    runs = [run for run in found.similar if run.kind in (kind, other)]
    if len(runs) < 2:
        return f"not both {LABELS[kind]} and {LABELS[other]} are there"
    return "" if are_similar(runs) else "no two runs have a similar CE increase"


def _later_cosines(found: Directions) -> list[str]:
    """The mean over later layers, where it was measured."""
    return [
        f"{LABELS[run.kind]}'s cosine to the original there is {np.mean(list(run.downstream_cosine.values())):.3f}"
        for run in found.similar
        if run.downstream_cosine
    ]


def _dropped_claims(found: Directions, kind: str) -> list[Claim]:
    """Whether what a kind drops is used less, and whether that is more than a matter of variance."""
    name = LABELS[kind]
    words = [
        f"What {name} drops is what the model uses least: over directions, its reconstruction follows their use",
        f"Of directions of like variance, {name} drops those that the model uses less",
    ]
    published = ["directions that are not reconstructed have little effect (figures 21 to 23)", None]
    of = {run.kind: found.follows[run.folder] for run in found.similar if run.folder in found.follows}
    against = next((each for each in found.contrasts if (each.kind, each.reference) == (kind, "local")), None)
    missing = _missing(found, kind, "local")
    if missing or against is None:
        missing = missing or "too few directions were ablated"
        return [Claim(*pair, missing, "not testable here") for pair in zip(words, published, strict=True)]
    own, local = of[kind], of["local"]
    use = (
        f"rank correlation of reconstruction and resample-ablation KL over {own.directions} directions: {name} "
        f"{_told(own.rank)}, local {_told(local.rank)}, difference {_told(against.rank)}; "
        f"of the KL with how much worse {name} reconstructs than local: {_told(against.dropped)}"
    )
    alike = (
        f"given the variance, the KL with how much worse {name} reconstructs than local: "
        f"{_told(against.dropped_given_variance)}; reconstruction and KL: {name} {_told(own.given_variance)}, local "
        f"{_told(local.given_variance)}, difference {_told(against.given_variance)}"
    )
    return [
        Claim(words[0], published[0], use, shown_if_all([own.rank.low > 0, against.dropped.high < 0])),
        Claim(words[1], published[1], alike, shown_if_all([against.dropped_given_variance.high < 0])),
    ]


def _told(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def norm_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: lengths and cosine, with position 0 and document starts apart."""
    return [{**_run_columns(one, run), **one.norms[run.folder].to_row()} for one in found for run in one.runs]


def direction_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and direction, from the first, 0, on; nothing where a number is not defined."""
    rows = []
    for one in found:
        for run in one.runs:
            of = one.measured[run.folder]
            common, shares = _run_columns(one, run), of.variance_share
            for index in range(len(shares)):
                row = {**common, "direction": index, "variance_share": float(shares[index])}
                for name in ("correlation", "explained_variance", "kl"):
                    estimates = getattr(of, name)
                    for column, end in ((name, "estimate"), (f"{name}.low", "low"), (f"{name}.high", "high")):
                        number = float(getattr(estimates, end)[index])
                        row[column] = number if np.isfinite(number) else None
                rows.append(row)
    return rows


def downstream_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each run and later residual stream."""
    rows = []
    for one in found:
        for run in one.runs:
            for later in run.downstream_mse:
                row = {**_run_columns(one, run), "later_site": later}
                for column, numbers in (("mse", run.downstream_mse), ("cosine", run.downstream_cosine)):
                    low, high = run.intervals.get(f"downstream_{column}.{later}", (None, None))
                    row |= {column: numbers.get(later), f"{column}.low": low, f"{column}.high": high}
                rows.append(row)
    return rows


def use_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row a run: how its reconstruction of directions follows their use."""
    rows = []
    for one in found:
        for run in one.runs:
            if (of := one.follows.get(run.folder)) is not None:
                row = {**_run_columns(one, run), "directions": of.directions}
                rows.append(row | _ends("rank", of.rank) | _ends("rank_given_variance", of.given_variance))
    return rows


def contrast_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each pair of kinds, of their runs at similar CE increase."""
    return [
        {
            **columns_of(one.setting),
            "kind": each.kind,
            "reference": each.reference,
            **_ends("rank", each.rank),
            **_ends("rank_given_variance", each.given_variance),
            **_ends("dropped", each.dropped),
            **_ends("dropped_given_variance", each.dropped_given_variance),
        }
        for one in found
        for each in one.contrasts
    ]


def _ends(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}.low": interval.low, f"{name}.high": interval.high}


def _run_columns(one: Directions, run: RunSummary) -> dict[str, Any]:
    similar = run.folder in {each.folder for each in one.similar}
    own = {"kind": run.kind, "coefficient": run.coefficient, "seed": run.seed, "at_similar_ce": similar}
    return {**columns_of(one.setting), **own, "ce_increase": run.ce_increase, "l0": run.l0, "run": run.folder}


def claim_rows(found: Sequence[Directions]) -> list[dict[str, Any]]:
    """One row for each claim of each set."""
    names = ("claim", "published", "ours", "verdict")
    return [
        {**columns_of(one.setting), **{name: getattr(claim, name) for name in names}}
        for one in found
        for claim in one.claims
    ]
