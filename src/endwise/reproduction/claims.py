"""The paper's claims against a study's findings: shown, not shown, or not testable here, and why."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from endwise.analysis.ratios import Ratio, l0_ratio, ratio_to_local, times
from endwise.analysis.run_summary import LABELS, LATER_MSE, RunSummary, layer_label
from endwise.reproduction import paper
from endwise.reproduction.costs import relative_to_local
from endwise.reproduction.findings import Findings
from endwise.reproduction.mitigations import WAYS, CostPoint, Way, reaches
from endwise.run_config import Kind
from endwise.statistics import Interval, percentile_interval

Verdict = Literal["shown", "not shown", "not testable here"]
END_TO_END: tuple[Kind, ...] = ("e2e", "e2e_ds")
REACHED = 1.05
"""A CE increase counts as reached if the whole interval of its ratio to the other lies below this factor."""
SIMILAR = 1.5
"""Factor within which CE increases count as similar. (The paper's table 2 goes up to 1.33.)"""


@dataclass(frozen=True)
class Claim:
    claim: str
    published: str
    ours: str
    """What was measured, with 95 % intervals; or why nothing was."""
    verdict: Verdict
    timed: bool = False
    """It rests on wall-clock, so that another machine, or another hour, may judge otherwise."""


def claims(found: Findings) -> list[Claim]:
    """Every quantitative claim that runs alone can bear out, in the paper's order."""
    made: list[Claim] = []
    for kind in END_TO_END:
        if kind in found.made.experiments.study.kinds:
            made += [
                _features(found, kind),
                _alive(found, kind),
                _ce_at_equal(found, kind, "l0"),
                _ce_at_equal(found, kind, "alive"),
            ]
    made += [_downstream(found), _norms(found), _learning_rate(found), _sizes(found), _lengths(found), _seeds(found)]
    made += [_cost(found, kind) for kind in END_TO_END if kind in found.made.experiments.study.kinds]
    made += [_mitigation(found, way) for way in ("tokens", "dictionary", "start")]
    return [*made, _break_even(found)]


def _features(found: Findings, kind: Kind) -> Claim:
    published = _percents(paper.relative_to_local(paper.SIMILAR_CE, kind, "l0"))
    claim = f"{LABELS[kind]} needs fewer features per token than local for the same CE increase"
    return _of_ratios(found, claim, f"{published} of local's L0", "features_at_equal_ce", kind)


def _alive(found: Findings, kind: Kind) -> Claim:
    published = _percents(paper.relative_to_local(paper.SIMILAR_CE, kind, "alive"))
    claim = f"{LABELS[kind]} needs fewer alive features in all than local for the same CE increase"
    return _of_ratios(found, claim, f"{published} of local's", "alive_at_equal_ce", kind)


def _ce_at_equal(found: Findings, kind: Kind, at: str) -> Claim:
    words = {"l0": "L0", "alive": "number of alive features"}[at]
    published = "under 45 % of local's (layer 6)" if at == "l0" else "lower (figure 1)"
    claim = f"{LABELS[kind]} has a lower CE increase than local at the same {words}"
    return _of_ratios(found, claim, published, f"ce_increase_at_equal_{at}", kind)


def _of_ratios(found: Findings, claim: str, published: str, measure: str, kind: Kind) -> Claim:
    ratios = {site: summary.ratios[measure][kind] for site, summary in found.sites.items()}
    return Claim(claim, published, _told(ratios), below(ratios.values(), 1.0))


def below(ratios: Iterable[Ratio], bound: float) -> Verdict:
    """Shown if the whole interval of every ratio that could be measured lies below the bound."""
    known = [ratio for ratio in ratios if ratio.estimate is not None and ratio.widest is not None]
    if not known:
        return "not testable here"
    return "shown" if all(ratio.widest[1] < bound for ratio in known if ratio.widest) else "not shown"


def _told(ratios: Mapping[str, Ratio]) -> str:
    return "; ".join(f"{_layer(site)}: {_percent(ratio)}" for site, ratio in ratios.items())


def _percent(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return f"not measured ({ratio.reason})"
    if ratio.widest is None:
        return f"{100 * ratio.estimate:.0f} % (no interval: {ratio.reason})"
    return f"{100 * ratio.estimate:.0f} % [{100 * ratio.widest[0]:.0f}, {100 * ratio.widest[1]:.0f}]"


def _layer(site: str) -> str:
    label = layer_label(site)
    return site if label == site else f"layer {label}"


def _are_similar(runs: Iterable[RunSummary]) -> bool:
    """Whether runs that were chosen for their CE increases have similar ones."""
    increases = [run.ce_increase for run in runs]
    return min(increases) > 0 and max(increases) <= SIMILAR * min(increases)


def _downstream(found: Findings) -> Claim:
    """At equal CE increase, as ratios of curves are."""
    settings = found.settings
    ratios = {
        site: ratio_to_local(
            s.runs, "e2e_ds", LATER_MSE, "ce_increase", settings.bootstrap, settings.seed, reference="e2e"
        )
        for site, s in found.sites.items()
    }
    told = "; ".join(f"{_layer(site)}: {_times(ratio)}" for site, ratio in ratios.items())
    return Claim(
        "e2e+ds keeps the later layers' activations where e2e does not, at the same CE increase",
        "e2e 14.5 to 22, e2e+ds 3.5 to 2.5 in MSE after layer 6 (about a sixth)",
        f"e2e+ds's downstream MSE relative to e2e's (geometric mean over later layers): {told}",
        below(ratios.values(), 1.0),
    )


def _times(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return f"not measured ({ratio.reason})"
    ends = "" if ratio.widest is None else f" [{times(ratio.widest[0])}, {times(ratio.widest[1])}]"
    return f"{times(ratio.estimate)}{ends}"


def _norms(found: Findings) -> Claim:
    told, holds = [], []
    for site, runs in found.similar_ce.items():
        ratios = {run.kind: found.norms[run.folder].ratio for run in runs if run.folder in found.norms}
        told.append(
            f"{_layer(site)}: " + ", ".join(f"{LABELS[kind]} {_interval(each)}" for kind, each in ratios.items())
        )
        if set(ratios) >= {"local", *END_TO_END} and _are_similar(runs):
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
        _all(holds),
    )


def _learning_rate(found: Findings) -> Claim:
    """Of each kind, the chosen rate against the highest, both with the middle coefficient."""
    told, holds = [], []
    for kind in found.made.experiments.study.kinds:
        runs = {
            r.config.training.learning_rate: r.summary
            for r in found.experiments["learning_rates"]
            if r.summary.kind == kind and r.summary.coefficient == found.middle_coefficient(kind)
        }
        rate = found.made.rates.get(kind)
        if rate is None or rate not in runs or max(runs) == rate:
            continue
        chosen, highest = runs[rate], runs[max(runs)]
        ratio = l0_ratio(highest, chosen, found.settings.bootstrap, found.settings.seed)
        if ratio.interval is not None:
            holds.append(highest.alive < chosen.alive and ratio.interval[0] > 1)
        told.append(
            f"{LABELS[kind]} from {rate:g} to {max(runs):g}: alive {chosen.alive:,} to {highest.alive:,}, "
            f"L0 {chosen.l0:.1f} to {highest.l0:.1f} ({_percent(ratio)})"
        )
    return Claim(
        "A learning rate above the best lowers the number of alive features, and L0 creeps up",
        "so above 5e-4",
        "; ".join(told) or "the highest rate tried is the best",
        _all(holds),
    )


def _sizes(found: Findings) -> Claim:
    """The largest dictionary against the smallest."""
    told, holds = [], []
    for kind in found.made.experiments.study.kinds:
        points = sorted(_known(found, kind, "dictionary"), key=lambda point: point.variant.runs[0].d_sae)
        if len(points) > 1 and (ratio := points[-1].relative_to(points[0])) is not None:
            holds.append(ratio.high < 1)
            told.append(f"{_listed(kind, points)} (last to first: {_share(ratio)})")
    return Claim(
        "A larger dictionary lowers the CE increase at equal L0",
        "it does, up to about 60 features per dimension",
        _at_l0(found, told),
        _all(holds),
    )


def _lengths(found: Findings) -> Claim:
    """The longest training against the study's own length: what it lowers, and whether that is more than for local."""
    told, ends = [], {}
    for kind in found.made.experiments.study.kinds:
        points = sorted(_known(found, kind, "tokens"), key=lambda point: point.variant.tokens)
        base = next((p for p in points if p.variant.tokens == found.made.experiments.tokens), None)
        ratio = None if base is None or points[-1] is base else points[-1].relative_to(base)
        if base is not None and ratio is not None:
            ends[kind] = (points[-1], base)
            told.append(f"{_listed(kind, points)} (last to 1 ×: {_share(ratio)})")
    compared = [kind for kind in END_TO_END if kind in ends] if "local" in ends else []
    holds = [_gains_more(*ends[kind], *ends["local"]) for kind in compared]
    return Claim(
        "With longer training the end-to-end kinds still improve, and by more than local does",
        "local flat from 200k samples, e2e improves up to 800k, e2e+ds up to 400k",
        _at_l0(found, told),
        _all(holds),
    )


def _gains_more(longest: CostPoint, base: CostPoint, local_longest: CostPoint, local_base: CostPoint) -> bool:
    """Whether both intervals lie below 1: of what longer training leaves of the CE increase, and of that relative to
    what it leaves of local's.
    """
    own = longest.relative_to(base)
    every = [point.draws for point in (longest, base, local_longest, local_base)]
    if own is None or any(draws is None for draws in every):
        return False
    a, b, c, d = (np.asarray(draws) for draws in every)
    return own.high < 1 and percentile_interval((a / b) / (c / d), own.estimate).high < 1


def _seeds(found: Findings) -> Claim:
    """Whether kinds differ by more than seeds do: the interval over seeds of a ratio to local leaves out 100 %."""
    told, holds = [], []
    summary = found.sites.get(found.made.experiments.study.site)
    for kind, ratio in summary.ratios["features_at_equal_ce"].items() if summary else ():
        if ratio.estimate is not None and ratio.over_seeds is not None:
            low, high = ratio.over_seeds
            holds.append(high < 1 or low > 1)
            ends = f"[{100 * low:.0f}, {100 * high:.0f}]"
            told.append(f"{LABELS[kind]} {100 * ratio.estimate:.0f} % of local's L0, over seeds {ends}")
    return Claim(
        "Seeds agree on the Pareto curve: they differ less than the kinds do",
        "two seeds agree",
        "; ".join(told) or "fewer than three seeds determine a ratio",
        _all(holds),
    )


def _cost(found: Findings, kind: Kind) -> Claim:
    published = "/".join(f"{ratio:.1f}" for ratio in paper.cost_relative_to_local(kind))
    told, holds = [], []
    for site in found.made.experiments.study.sites:
        if (ratio := relative_to_local(found.made.costs, kind, site)) is not None:
            timed = not math.isnan(ratio.low)
            ends = f" [{times(ratio.low)}, {times(ratio.high)}]" if timed else ""
            without = "" if timed else " (timed without an interval)"
            told.append(f"{_layer(site)}: {times(ratio.estimate)}{ends} times per token{without}")
            holds += [ratio.low > 1] if timed else []
    return Claim(
        f"Training {LABELS[kind]} takes longer than local",
        f"{published} times (layers 2/6/10)",
        "; ".join(told) or "not both kinds were timed",
        _all(holds),
        timed=True,
    )


def _mitigation(found: Findings, way: Way) -> Claim:
    """Whether a cheaper variant of an end-to-end kind does as well as its full training."""
    words = {
        "tokens": "Training on fewer tokens",
        "dictionary": "A smaller dictionary",
        "start": "A start from a local SAE",
    }[way]
    told, holds = [], []
    for kind in END_TO_END:
        points = _known(found, kind, way)
        base = next((p for p in points if _is_base(found, p)), None)
        cheaper = [] if base is None else [p for p in points if p.variant.seconds < base.variant.seconds]
        if base is None or not cheaper:
            continue
        good = [p for p in cheaper if reaches(p, base, REACHED)]
        holds.append(bool(good))
        lowest = min(cheaper, key=lambda p: p.ce_increase.estimate if p.ce_increase else math.inf)
        best = min(good, key=lambda p: p.variant.seconds, default=lowest)
        told.append(
            f"{LABELS[kind]}: {best.variant.label} has {_interval(best.ce_increase)} where full training has "
            f"{_interval(base.ce_increase)}, {_share(best.relative_to(base))}, at "
            f"{100 * best.variant.seconds / base.variant.seconds:.0f} % of its time"
        )
    return Claim(
        f"{words} lowers what end-to-end training costs and raises the CE increase by less than {_MARGIN}",
        {
            "tokens": "e2e+ds saturates at 400k samples, e2e at 800k",
            "dictionary": "5 features per dimension are acceptable on TinyStories-1M",
            "start": "suggested",
        }[way],
        _at_l0(found, told),
        _all(holds),
        timed=True,
    )


def _break_even(found: Findings) -> Claim:
    """The cheapest end-to-end training that reaches the CE increase of the study's local SAEs."""
    told, holds = [], []
    local = next((p for p in _known(found, "local", "tokens") if _is_base(found, p)), None)
    for kind in END_TO_END:
        if found.mitigations is None or local is None or not any(_known(found, kind, way) for way in WAYS):
            continue
        best = found.mitigations.cheapest(kind, local, REACHED)
        if best is None:
            told.append(f"{LABELS[kind]}: no variant reaches local's {_interval(local.ce_increase)}")
            holds.append(False)
            continue
        ratio = best.variant.seconds / local.variant.seconds
        holds.append(ratio <= 1)
        told.append(
            f"{LABELS[kind]}: {best.variant.label} ({_share(best.relative_to(local))} of local's), in {times(ratio)} "
            "times local's time"
        )
    return Claim(
        f"End-to-end training reaches local's CE increase at equal L0 (within {_MARGIN}) in no more time than local",
        "not claimed; it is what would make local training pointless",
        _at_l0(found, told),
        _all(holds),
        timed=True,
    )


def _known(found: Findings, kind: str, way: Way) -> list[CostPoint]:
    if found.mitigations is None:
        return []
    points = [p for p in found.mitigations.points if (p.variant.kind, p.variant.way) == (kind, way)]
    return [point for point in points if point.ce_increase is not None]


def _is_base(found: Findings, point: CostPoint) -> bool:
    """Whether a variant is the study's own training."""
    curves = {run.folder for run in found.summaries("curves")}
    return all(run.folder in curves for run in point.variant.runs)


def _at_l0(found: Findings, told: Sequence[str]) -> str:
    if not told or found.mitigations is None:
        return "no variants with a curve over one L0"
    return f"CE increase at L0 {found.mitigations.l0:.0f}: {'; '.join(told)}"


_MARGIN = f"{100 * (REACHED - 1):.0f} %"


def _listed(kind: Kind, points: Iterable[CostPoint]) -> str:
    return f"{LABELS[kind]}: " + ", ".join(f"{p.variant.label} {_interval(p.ce_increase)}" for p in points)


def _share(ratio: Interval | None) -> str:
    return "–" if ratio is None else f"{100 * ratio.estimate:.0f} % [{100 * ratio.low:.0f}, {100 * ratio.high:.0f}]"


def _interval(value: Interval | None) -> str:
    return "–" if value is None else f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _percents(values: Sequence[float]) -> str:
    return f"{'/'.join(f'{100 * value:.0f}' for value in values)} % (layers 2/6/10)"


def _all(holds: Sequence[bool]) -> Verdict:
    if not holds:
        return "not testable here"
    return "shown" if all(holds) else "not shown"
