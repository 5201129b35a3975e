"""The paper's claims against a study's findings: shown, not shown, or not testable here, and why."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from endwise.analysis import published as paper
from endwise.analysis.claims import Claim, shown_if_all
from endwise.analysis.comparison.comparison import Summary, similar_by_seed
from endwise.analysis.directions.study import norm_claim
from endwise.analysis.over_seeds import bracketed
from endwise.analysis.ratios import Ratio, below, l0_ratio, percent, times
from endwise.config.method import LOCAL
from endwise.config.objective import LABELS, Kind
from endwise.evaluation.summary import layer_label
from endwise.paper.costs import relative_to_local
from endwise.paper.findings import Findings
from endwise.paper.mitigations import WAYS, CostPoint, Way, reaches

END_TO_END: tuple[Kind, ...] = ("e2e", "e2e_ds")
REACHED = 1.05
"""A CE increase counts as reached if the whole interval of its ratio to the other lies below this factor."""


def claims(found: Findings) -> list[Claim]:
    """Every quantitative claim that runs alone can bear out, in the paper's order."""
    kinds: list[Kind] = [kind for kind in END_TO_END if kind in found.made.experiments.study.kinds]
    made = [claim for kind in kinds for claim in _relative_to_local(found, kind)]
    made += [_downstream(found), _norms(found), _learning_rate(found), _sizes(found), _lengths(found), _seeds(found)]
    made += [_cost(found, kind) for kind in kinds]
    made += [_mitigation(found, way) for way in ("tokens", "dictionary", "start")]
    return [*made, _break_even(found)]


def _relative_to_local(found: Findings, kind: Kind) -> Iterator[Claim]:
    name = LABELS[kind]
    shares = (paper.relative_to_local(paper.SIMILAR_CE, kind, metric) for metric in ("l0", "alive"))
    l0, alive = (f"{'/'.join(f'{100 * share:.0f}' for share in own)} % (layers 2/6/10)" for own in shares)
    fewer, lower = "for the same CE increase", f"{name} has a lower CE increase than local at the same"
    claimed = {
        "features_at_equal_ce": (f"{name} needs fewer features per token than local {fewer}", f"{l0} of local's L0"),
        "alive_at_equal_ce": (f"{name} needs fewer alive features in all than local {fewer}", f"{alive} of local's"),
        "ce_increase_at_equal_l0": (f"{lower} L0", "under 45 % of local's (layer 6)"),
        "ce_increase_at_equal_alive": (f"{lower} number of alive features", "lower (figure 1)"),
    }
    absent = Ratio(None, reason="there are no runs of local")
    for measure, (claim, published) in claimed.items():
        ratios = {site: to_local(summary, measure).get(kind, absent) for site, summary in found.sites.items()}
        parts = "; ".join(f"{_layer(site)}: {_percent(ratio)}" for site, ratio in ratios.items())
        yield Claim(claim, published, parts, below(ratios.values()))


def to_local(summary: Summary, measure: str) -> Mapping[str, Ratio]:
    """The ratios of one measure by kind, where there are local runs that they are relative to."""
    return summary.ratios[measure] if summary.baseline == LOCAL else {}


def _percent(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return (ratio.reason or "") if ratio.crossings else f"not measured ({ratio.reason})"
    return percent(ratio) if ratio.interval is not None else f"{percent(ratio)} (no interval: {ratio.reason})"


def _layer(site: str) -> str:
    label = layer_label(site)
    return site if label == site else f"layer {label}"


def _downstream(found: Findings) -> Claim:
    absent = Ratio(None, reason="not both kinds were run")
    ratios = {site: summary.downstream.get("e2e_ds/e2e", absent) for site, summary in found.sites.items()}
    parts = "; ".join(f"{_layer(site)}: {_times(ratio)}" for site, ratio in ratios.items())
    return Claim(
        "e2e+ds keeps the later layers' activations where e2e does not, at the same CE increase",
        "e2e 14.5 to 22, e2e+ds 3.5 to 2.5 in MSE after layer 6 (about a sixth)",
        f"e2e+ds's downstream MSE relative to e2e's (geometric mean over later layers): {parts}",
        below(ratios.values()),
    )


def _times(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return (ratio.reason or "") if ratio.crossings else f"not measured ({ratio.reason})"
    ends = "" if ratio.interval is None else f" [{times(ratio.interval[0])}, {times(ratio.interval[1])}]"
    return f"{times(ratio.estimate)}{ends}" + ("" if ratio.holds_seeds else f", {ratio.rests_on}")


def _norms(found: Findings) -> Claim:
    places = {_layer(site): similar_by_seed(summary.runs, "ce_increase") for site, summary in found.sites.items()}
    return norm_claim({place: list(by_seed.values()) for place, by_seed in places.items()}, found.norms)


def _learning_rate(found: Findings) -> Claim:
    """Compare each kind's chosen rate with the highest, both with the middle coefficient and one seed."""
    parts = []
    site = found.made.experiments.study.site
    for kind in found.made.experiments.study.kinds:
        runs = {
            r.config.training.learning_rate: r.summary
            for r in found.experiments["learning_rates"]
            if (r.summary.kind, r.summary.site) == (kind, site)
            and r.summary.coefficient == found.middle_coefficient(kind)
        }
        rate = found.made.rates.get(site, {}).get(kind)
        if rate is None or rate not in runs or max(runs) == rate:
            continue
        chosen, highest = runs[rate], runs[max(runs)]
        ratio = l0_ratio(highest, chosen, found.settings.bootstrap, found.settings.seed)
        parts.append(
            f"{LABELS[kind]} from {rate:g} to {max(runs):g}: alive {chosen.alive:,} to {highest.alive:,}, "
            f"L0 {chosen.l0:.1f} to {highest.l0:.1f} ({_percent(ratio)})"
        )
    return Claim(
        "A learning rate above the best lowers the number of alive features, and L0 creeps up",
        "so above 5e-4",
        "; ".join(parts) or "the highest rate tried is the best",
        "not testable here",
    )


def _sizes(found: Findings) -> Claim:
    """The largest dictionary against the smallest."""
    parts, ratios = [], []
    for kind in found.made.experiments.study.kinds:
        points = sorted(_known(found, kind, "dictionary"), key=lambda point: point.variant.runs[0].d_sae)
        if len(points) > 1:
            ratio = points[-1].relative_to(points[0])
            ratios.append(ratio)
            parts.append(f"{_listed(kind, points)} (last to first: {_percent(ratio)})")
    return Claim(
        "A larger dictionary lowers the CE increase at equal L0",
        "it does, up to about 60 features per dimension",
        _at_l0(found, parts),
        below(ratios),
    )


def _lengths(found: Findings) -> Claim:
    """The longest training against the study's own length: what it lowers, and whether that is more than for local."""
    parts, ratios = [], {}
    for kind in found.made.experiments.study.kinds:
        points = sorted(_known(found, kind, "tokens"), key=lambda point: point.variant.tokens)
        base = next((p for p in points if p.variant.tokens == found.made.experiments.tokens), None)
        if base is not None and points[-1] is not base:
            ratios[kind] = points[-1].relative_to(base)
            parts.append(f"{_listed(kind, points)} (last to 1 ×: {_percent(ratios[kind])})")
    compared = [ratios[kind] for kind in END_TO_END if kind in ratios] if "local" in ratios else []
    verdict = below(compared)
    if verdict == "shown":
        verdict = shown_if_all([_gains_more(ratio, ratios["local"]) for ratio in compared])
    return Claim(
        "With longer training the end-to-end kinds still improve, and by more than local does",
        "local flat from 200k samples, e2e improves up to 800k, e2e+ds up to 400k",
        _at_l0(found, parts),
        verdict,
    )


def _gains_more(ratio: Ratio, local: Ratio) -> bool:
    """True if what longer training leaves of the CE increase is less than what it leaves of local's: the intervals lie
    apart.
    """
    return ratio.interval is not None and local.interval is not None and ratio.interval[1] < local.interval[0]


def _seeds(found: Findings) -> Claim:
    """Judge if kinds differ by more than seeds do: the interval over seeds of a ratio to local leaves out 100 %."""
    parts, holds = [], []
    for site, summary in found.sites.items():
        for kind, ratio in to_local(summary, "features_at_equal_ce").items():
            if ratio.estimate is not None and ratio.over_seeds is not None:
                low, high = ratio.over_seeds
                holds.append(high < 1 or low > 1)
                ends = f"[{100 * low:.0f}, {100 * high:.0f}] over {ratio.rests_on} alone"
                parts.append(f"{_layer(site)}: {LABELS[kind]} {100 * ratio.estimate:.0f} % of local's L0, {ends}")
    return Claim(
        "Seeds agree on the Pareto curve: they differ less than the kinds do",
        "two seeds agree",
        "; ".join(parts) or "no ratio that stays on one side is determined by three seeds",
        shown_if_all(holds),
    )


def _cost(found: Findings, kind: Kind) -> Claim:
    published = "/".join(f"{ratio:.1f}" for ratio in paper.cost_relative_to_local(kind))
    parts, holds = [], []
    for site in found.made.experiments.study.sites:
        if (ratio := relative_to_local(found.made.costs, kind, site)) is not None:
            timed = not math.isnan(ratio.low)
            ends = f" [{times(ratio.low)}, {times(ratio.high)}]" if timed else ""
            without = "" if timed else " (timed without an interval)"
            parts.append(f"{_layer(site)}: {times(ratio.estimate)}{ends} times per token{without}")
            holds += [ratio.low > 1] if timed else []
    return Claim(
        f"Training {LABELS[kind]} takes longer than local",
        f"{published} times (layers 2/6/10)",
        "; ".join(parts) or "not both kinds were timed",
        shown_if_all(holds),
        timed=True,
    )


def _mitigation(found: Findings, way: Way) -> Claim:
    """Judge if a cheaper variant of an end-to-end kind does as well as its full training."""
    words, published = {
        "tokens": ("Training on fewer tokens", "e2e+ds saturates at 400k samples, e2e at 800k"),
        "dictionary": ("A smaller dictionary", "5 features per dimension are acceptable on TinyStories-1M"),
        "start": ("A start from a local SAE", "suggested"),
    }[way]
    parts, holds = [], []
    for kind in END_TO_END:
        points = _known(found, kind, way)
        base = next((p for p in points if found.is_base(p)), None)
        cheaper = [] if base is None else [p for p in points if _is_cheaper(p, base)]
        if base is None or not cheaper:
            continue
        good = [p for p in cheaper if reaches(p, base, REACHED)]
        if any(p.relative_to(base).holds_seeds for p in cheaper):
            holds.append(bool(good))
        lowest = min(cheaper, key=lambda p: p.ce_increase.estimate if p.ce_increase else math.inf)
        best = min(good, key=lambda p: p.variant.seconds, default=lowest)
        parts.append(
            f"{LABELS[kind]}: {best.variant.label} has {bracketed(best.ce_increase)} where full training has "
            f"{bracketed(base.ce_increase)}, {_percent(best.relative_to(base))}, at "
            f"{100 * best.variant.seconds / base.variant.seconds:.0f} % of its time"
        )
    return Claim(
        f"{words} lowers what end-to-end training costs and raises the CE increase by less than {_MARGIN}",
        published,
        _at_l0(found, parts),
        shown_if_all(holds),
        timed=True,
    )


def _break_even(found: Findings) -> Claim:
    """The cheapest end-to-end training that reaches the CE increase of the study's local SAEs."""
    parts, holds = [], []
    local = next((p for p in _known(found, "local", "tokens") if found.is_base(p)), None)
    for kind in END_TO_END:
        if found.mitigations is None or local is None or not any(_known(found, kind, way) for way in WAYS):
            continue
        best = found.mitigations.cheapest(kind, local, REACHED)
        if best is None:
            parts.append(f"{LABELS[kind]}: no variant with three seeds reaches local's {bracketed(local.ce_increase)}")
            holds.append(False)
            continue
        ratio = best.variant.seconds / local.variant.seconds
        holds.append(ratio <= 1)
        parts.append(
            f"{LABELS[kind]}: {best.variant.label} ({_percent(best.relative_to(local))} of local's), in {times(ratio)} "
            "times local's time"
        )
    return Claim(
        f"End-to-end training reaches local's CE increase at equal L0 (within {_MARGIN}) in no more time than local",
        "not claimed; it is what would make local training pointless",
        _at_l0(found, parts),
        shown_if_all(holds),
        timed=True,
    )


def _known(found: Findings, kind: str, way: Way) -> list[CostPoint]:
    points = [point for point in found.points if (point.variant.kind, point.variant.way) == (kind, way)]
    return [point for point in points if point.ce_increase is not None]


def _is_cheaper(point: CostPoint, base: CostPoint) -> bool:
    """Return whether a variant takes less time with no larger dictionary, which by timings alone may cost less."""
    variant, full = point.variant, base.variant
    return variant.seconds < full.seconds and variant.runs[0].d_sae <= full.runs[0].d_sae


def _at_l0(found: Findings, parts: Sequence[str]) -> str:
    if not parts or found.mitigations is None:
        return "no variants with a curve over one L0"
    return f"CE increase at L0 {found.mitigations.l0:.0f}: {'; '.join(parts)}"


_MARGIN = f"{100 * (REACHED - 1):.0f} %"


def _listed(kind: Kind, points: Iterable[CostPoint]) -> str:
    return f"{LABELS[kind]}: " + ", ".join(f"{p.variant.label} {bracketed(p.ce_increase)}" for p in points)
