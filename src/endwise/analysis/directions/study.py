"""Lengths, directions and later layers: what each kind of SAE keeps of an activation, and whether it is what counts.

Along each principal direction of the activations, an SAE's reconstruction is compared with what the model loses when
the direction is resample-ablated (paper, figures 21 to 23). If an SAE drops what the model does not use, then over
directions the quality of its reconstruction rises with that loss, as Spearman's rank correlation says without assuming
any shape. Its interval resamples directions. Kinds are compared seed by seed, and what is claimed of them rests on an
interval that holds the seeds too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from endwise.analysis import published as paper
from endwise.analysis.claims import Claim, Unmeasured, Verdict, all_shown, are_similar
from endwise.analysis.comparable import Setting, comparable, in_order, methods_of, pairs_of
from endwise.analysis.comparison.comparison import later_error, runs_at_similar, similar_by_seed
from endwise.analysis.correlations import LEAST, interval_of, partial_spearman, resampled_points, spearman
from endwise.analysis.directions.measure import RunDirections, measure_directions
from endwise.analysis.directions.norms import Norms
from endwise.analysis.over_seeds import CORRELATION, OverSeeds, judged, over, over_seeds, with_error
from endwise.analysis.pareto.curves import RESAMPLES, SEED
from endwise.analysis.ratios import Ratio, times
from endwise.analysis.sets import ShownSet
from endwise.common.counting import showing_progress
from endwise.common.statistics import Floats, Interval, error_of
from endwise.common.text import minus
from endwise.config.method import PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary, Seeds
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpora

PAIRS = (("e2e", "local"), ("e2e_ds", "local"), ("e2e", "e2e_ds"))
"""Kinds that are held against each other."""


@dataclass(frozen=True)
class Follows:
    """Agreement of a run's reconstruction of directions with their use: rank correlations over directions, with 95 %
    bootstrap intervals.
    """

    rank: Interval
    """Correlation of how well a component is reconstructed with the resample-ablation KL."""
    given_variance: Interval
    """The same given the directions' variance, which drives both."""
    directions: int


@dataclass(frozen=True)
class Contrast:
    """Two methods, of each seed two runs at a similar CE increase; all is paired over directions, within the seed."""

    method: Method
    reference: Method
    runs: tuple[RunSummary, ...]
    """Runs of both methods."""
    directions: int
    own: OverSeeds
    """`Follows.rank` of `method`."""
    own_given_variance: OverSeeds
    of_reference: OverSeeds
    of_reference_given_variance: OverSeeds
    rank: OverSeeds
    """Difference of their `Follows.rank`."""
    given_variance: OverSeeds
    dropped: OverSeeds
    """Rank correlation of the KL with how much worse `method` reconstructs a direction than `reference` (difference of
    correlations). Below 0: what it drops is what the model uses less."""
    dropped_given_variance: OverSeeds
    """The same given the directions' variance: whether, of directions of like variance, it drops those less used."""


@dataclass(frozen=True, repr=False)
class Directions(ShownSet):
    """The runs of one setting and one held-out text."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    measured: Mapping[str, RunDirections]
    """Measurements by run folder."""
    similar: tuple[RunSummary, ...]
    """One run of each method, all of one seed, those whose CE increases are closest to each other."""
    by_seed: Mapping[Seeds, tuple[RunSummary, ...]]
    """The same of every seed."""
    follows: Mapping[str, Follows]
    """Results by run folder; none where fewer than `LEAST` directions were ablated."""
    contrasts: tuple[Contrast, ...]
    """Comparisons of the runs in `by_seed`, where CE increases are similar."""
    downstream: Ratio | None
    """Downstream MSE of e2e+ds relative to e2e at equal CE increase; None where one is missing."""

    @property
    def norms(self) -> dict[str, Norms]:
        """Norms by run folder."""
        return {folder: each.norms for folder, each in self.measured.items()}

    @property
    def claims(self) -> list[Claim]:
        """Verdicts on what the paper says of lengths, later layers and dropped directions."""
        pairs = pairs_of([("e2e", "local"), ("e2e_ds", "local")], methods_of(self.runs))
        return [
            norm_claim({self.setting.site: list(self.by_seed.values())}, self.norms),
            _downstream_claim(self),
            *(claim for pair in pairs for claim in _dropped_claims(self, *pair)),
        ]


def directions(
    runs: str | Path | Iterable[str | Path],
    *,
    tokens: int | None = None,
    directions: int | None = None,
    with_starts: bool = False,
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    display: bool = True,
) -> list[Directions]:
    """Measure evaluated runs, or read what was measured before, and compare those that can be compared.

    Args:
        runs: run folders, or folders that hold some at any depth.
        tokens: held-out tokens, instead of each recipe's `evaluation.tokens`.
        directions: resample-ablate this many of the first principal directions and as many of the others, spread
            evenly; None: all up to `SMALL` dimensions, `TOP` above.
        with_starts: position 0 and document starts count among the tokens that the directions are of.
        model: a loaded one to use instead of the recipes'.
        corpora: loaded token sequences, likewise.
        display: show how far it is.

    Raises:
        RunFolderError: there is no run, or one was not evaluated yet.
        FormatError: what a run holds cannot be read.
        ConfigError: fewer tokens than one sequence has.
    """
    paths = [runs] if isinstance(runs, str | Path) else runs
    sets = comparable(paths)
    summaries = [run for group in sets.values() for run in group]
    with showing_progress(display):
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
    ordered = tuple(sorted(runs, key=lambda run: (*in_order(run)[:2], run.seed)))
    measured = {run.folder: by_folder[run.folder] for run in ordered}
    similar, by_seed = runs_at_similar(ordered, "ce_increase"), similar_by_seed(ordered, "ce_increase")
    enough = len(_ablated(measured.values())) >= LEAST
    contrasts = []
    for method, reference in pairs_of(PAIRS, methods_of(ordered)) if enough else ():
        if pairs := _pairs(by_seed, method, reference):
            contrasts.append(contrast(method, reference, pairs, measured))
    e2e, e2e_ds = PRESET_METHODS["e2e"], PRESET_METHODS["e2e_ds"]
    both = {e2e, e2e_ds} <= {run.method for run in similar}
    return Directions(
        setting=setting,
        runs=ordered,
        measured=measured,
        similar=similar,
        by_seed=by_seed,
        follows={folder: follows(each) for folder, each in measured.items()} if enough else {},
        contrasts=tuple(contrasts),
        downstream=later_error(ordered, e2e_ds, e2e, RESAMPLES, SEED) if both else None,
    )


Pair = tuple[RunSummary, RunSummary]


def _pairs(by_seed: Mapping[Seeds, Sequence[RunSummary]], method: Method, reference: Method) -> list[Pair]:
    """Find the pair of each seed that has runs of both methods at a similar CE increase."""
    chosen = [{run.method: run for run in runs} for runs in by_seed.values()]
    pairs = [(of[method], of[reference]) for of in chosen if {method, reference} <= set(of)]
    return [pair for pair in pairs if are_similar(pair)]


def _ablated(runs: Iterable[RunDirections]) -> NDArray[np.intp]:
    """Numbers of the directions that were ablated and are there at all, in every run."""
    known = [np.isfinite(run.kl.estimate) & np.isfinite(run.correlation.estimate) for run in runs]
    return np.flatnonzero(np.all(known, axis=0))


def follows(run: RunDirections, resamples: int = RESAMPLES, seed: int = SEED) -> Follows:
    """
    Raises:
        DataError: too few directions were ablated.
    """
    at = _ablated([run])
    weights = resampled_points(len(at), resamples, seed)
    kept, kl, variance = run.correlation.estimate[at], run.kl.estimate[at], run.variance[at]
    rank, given = spearman(kept, kl, weights), partial_spearman(kept, kl, variance, weights)
    return Follows(interval_of(rank), interval_of(given), len(at))


def contrast(
    method: Method,
    reference: Method,
    pairs: Sequence[Pair],
    measured: Mapping[str, RunDirections],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Contrast:
    """
    Args:
        pairs: of each seed a run of either method.
        measured: by run folder.

    Raises:
        DataError: too few directions were ablated.
    """
    of = [(measured[run.folder], measured[other.folder]) for run, other in pairs]
    at = _ablated(each for pair in of for each in pair)
    weights = resampled_points(len(at), resamples, seed)
    every = [_of_seed(run, other, at, weights) for run, other in of]
    own, own_given, others, others_given, dropped, dropped_given = (np.stack(each) for each in zip(*every, strict=True))
    return Contrast(
        method,
        reference,
        tuple(run for pair in pairs for run in pair),
        len(at),
        own=over_seeds(own, CORRELATION),
        own_given_variance=over_seeds(own_given, CORRELATION),
        of_reference=over_seeds(others, CORRELATION),
        of_reference_given_variance=over_seeds(others_given, CORRELATION),
        rank=over_seeds(own - others),
        given_variance=over_seeds(own_given - others_given),
        dropped=over_seeds(dropped, CORRELATION),
        dropped_given_variance=over_seeds(dropped_given, CORRELATION),
    )


def _of_seed(run: RunDirections, other: RunDirections, at: NDArray[np.intp], weights: Floats) -> tuple[Floats, ...]:
    """Correlate what either run keeps with the KL, then that of what is dropped; each as it is and given
    the variance, `[1 + resamples]`.
    """
    kl, variance = run.kl.estimate[at], run.variance[at]
    kept, kept_by_other = run.correlation.estimate[at], other.correlation.estimate[at]
    return tuple(
        values
        for of in (kept, kept_by_other, kept_by_other - kept)
        for values in (spearman(of, kl, weights), partial_spearman(of, kl, variance, weights))
    )


def norm_claim(places: Mapping[str, Sequence[Sequence[RunSummary]]], measured: Mapping[str, Norms]) -> Claim:
    """Table 5.

    Args:
        places: of each place and seed the runs whose CE increases are closest to each other; only where these are
            similar is anything said of their order.
        measured: by run folder.
    """
    measured_at, verdicts, presets = [], [], set(PRESET_METHODS.values())
    for place, choices in places.items():
        kept = [[run for run in runs if run.folder in measured] for runs in choices]
        whole = [runs for runs in kept if {run.method for run in runs} >= presets and are_similar(runs)]
        apart = "" if whole else ", no seed has all kinds at a similar CE increase"
        measured_at.append(f"{place}: {_lengths(whole or kept[:1], measured)}{apart}")
        if whole:
            verdicts.append(_in_order(whole, measured))
    published = ", ".join(
        f"{PRESET_METHODS[kind].label} {'/'.join(f'{value:.2f}' for value in values)}"
        for kind, values in paper.NORM_RATIO.items()
    )
    return Claim(
        "At a similar CE increase reconstructions are shorter than activations (‖â‖/‖a‖), e2e's most, e2e+ds's less, "
        "local's least",
        f"{published} (layers 2/6/10)",
        "; ".join(measured_at) or "no runs of all kinds",
        all_shown(verdicts),
    )


def _lengths(choices: Sequence[Sequence[RunSummary]], measured: Mapping[str, Norms]) -> str:
    """The ratio of each method, over the seeds."""
    runs = [run for choice in choices for run in choice]
    by_method = {of: [measured[run.folder].ratio for run in runs if run.method == of] for of in methods_of(runs)}
    each = [f"{method.label} {_mean(ratios).text()}" for method, ratios in by_method.items()]
    return f"{', '.join(each)} {over('held-out text', runs)}" if each else "no runs of all kinds"


def _in_order(choices: Sequence[Sequence[RunSummary]], measured: Mapping[str, Norms]) -> Verdict:
    """Judge if e2e's reconstructions are shorter than e2e+ds's, these than local's, and these than the activations."""
    e2e, e2e_ds, local = (
        [measured[run.folder].ratio for runs in choices for run in runs if run.method == PRESET_METHODS[of]]
        for of in ("e2e", "e2e_ds", "local")
    )
    steps = [_mean(e2e_ds, less=e2e), _mean(local, less=e2e_ds)]
    shorter = _mean(local)
    return judged((shorter, shorter.high < 1), *((step, step.low > 0) for step in steps))


def _mean(ratios: Sequence[Interval], less: Sequence[Interval] | None = None) -> OverSeeds:
    """Over seeds, of ratios or of their differences from others. All seeds are measured on one text, so that its part
    of the error does not grow less with more of them; two ratios' errors are added as if they were independent.
    """
    values = np.array([each.estimate for each in ratios])
    error = float(np.mean([error_of(each) for each in ratios]))
    if less is None:
        return with_error(values, error)
    other = float(np.mean([error_of(each) for each in less]))
    return with_error(values - np.array([each.estimate for each in less]), float(np.hypot(error, other)))


def _downstream_claim(found: Directions) -> Claim:
    ratio = found.downstream
    claim = "e2e strays further from the original activations in later layers than e2e+ds, at a similar CE increase"
    published = "e2e 14.5 to 22, e2e+ds 3.5 to 2.5 in MSE after layer 6 (about a sixth)"
    if ratio is None:
        return Unmeasured(claim, published, "not both e2e and e2e+ds are there")
    if ratio.at_ends is None and ratio.estimate is None:
        return Unmeasured(claim, published, f"not measured: {ratio.reason}")
    return Claim(claim, published, "; ".join([_later_ratio(ratio), *_later_cosines(found)]), ratio.below)


def _later_ratio(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return f"e2e+ds's downstream MSE against e2e's: {ratio.reason}"
    where = "at the closest CE increases" if ratio.over is None else "at equal CE increase"
    ends = f" ({ratio.reason})"
    if ratio.interval is not None:
        text = "held-out text and" if ratio.holds_seeds else "held-out text alone,"
        ends = f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}] over {text} {ratio.rests_on}"
    return f"e2e+ds's downstream MSE {where} is {times(ratio.estimate)}{ends} times e2e's"


def _missing(found: Directions, method: Method, other: Method) -> str:
    """Say why two methods cannot be compared at a similar CE increase."""
    if any({method, other} <= {run.method for run in runs} for runs in found.by_seed.values()):
        similar = bool(_pairs(found.by_seed, method, other))
        return "too few directions were ablated" if similar else "no two runs of a seed have a similar CE increase"
    return f"no seed has both {method.label} and {other.label}"


def _later_cosines(found: Directions) -> list[str]:
    """The mean over later layers, where it was measured."""
    return [
        minus(
            f"{run.method.label}'s cosine to the original there is {np.mean(list(run.downstream_cosine.values())):.3f} "
            f"(CE {run.ce_increase:+.3f}, seed {run.seed})"
        )
        for run in found.similar
        if run.downstream_cosine
    ]


def _dropped_claims(found: Directions, method: Method, base: Method) -> list[Claim]:
    """Judge if what a method drops is used less, and if that is more than a matter of variance."""
    name, other = method.label, base.label
    words = [
        f"What {name} drops is what the model uses least: over directions, its reconstruction follows their use",
        f"Of directions of like variance, {name} drops those that the model uses less",
    ]
    paper_says = "directions that are not reconstructed have little effect (figures 21 to 23)"
    published = [paper_says if method.is_preset else None, None]
    against = next((each for each in found.contrasts if (each.method, each.reference) == (method, base)), None)
    if against is None:
        missing = _missing(found, method, base)
        return [Unmeasured(*pair, missing) for pair in zip(words, published, strict=True)]
    use = (
        f"rank correlation of reconstruction and resample-ablation KL over {against.directions} directions: {name} "
        f"{against.own.text()}, {other} {against.of_reference.text()}, difference {against.rank.text()}; "
        f"of the KL with how much worse {name} reconstructs than {other}: {against.dropped.text()}"
    )
    alike = (
        f"given the variance, the KL with how much worse {name} reconstructs than {other}: "
        f"{against.dropped_given_variance.text()}; reconstruction and KL: {name} {against.own_given_variance.text()}, "
        f"{other} {against.of_reference_given_variance.text()}, difference {against.given_variance.text()}"
    )
    where = f"intervals {over('directions', against.runs)}"
    dropped, alone = against.dropped, against.dropped_given_variance
    return [
        Claim(
            words[0],
            published[0],
            f"{use}; {where}",
            judged((against.own, against.own.low > 0), (dropped, dropped.high < 0)),
        ),
        Claim(words[1], published[1], f"{alike}; {where}", judged((alone, alone.high < 0))),
    ]
