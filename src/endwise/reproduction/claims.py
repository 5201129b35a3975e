"""The paper's claims against a study's findings: shown, not shown, or not testable here, and why."""

from collections.abc import Iterable, Mapping, Sequence

from endwise.analysis import paper
from endwise.analysis.claims import Claim, Verdict, shown_if_all
from endwise.analysis.comparison import LABELS, Ratio, layer_label, times
from endwise.analysis.directions import norm_claim
from endwise.reproduction.findings import Findings
from endwise.reproduction.mitigations import CostPoint, Way
from endwise.run_config import Kind
from endwise.statistics import Interval

END_TO_END: tuple[Kind, ...] = ("e2e", "e2e_ds")
SAME = 1.02
"""Factor within which a CE increase counts as reached."""


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


def _downstream(found: Findings) -> Claim:
    ratios = {
        site: summary.downstream["e2e_ds/e2e"]
        for site, summary in found.sites.items()
        if "e2e_ds/e2e" in summary.downstream
    }
    told = "; ".join(f"{_layer(site)}: {_times(ratio)}" for site, ratio in ratios.items())
    return Claim(
        "e2e+ds keeps the later layers' activations where e2e does not, at a similar CE increase",
        "e2e 14.5 to 22, e2e+ds 3.5 to 2.5 in MSE after layer 6 (about a sixth)",
        f"e2e+ds's downstream MSE relative to e2e's: {told}" if told else "not both kinds were run",
        below(ratios.values(), 1.0),
    )


def _times(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return f"not measured ({ratio.reason})"
    ends = "" if ratio.widest is None else f" [{times(ratio.widest[0])}, {times(ratio.widest[1])}]"
    return f"{times(ratio.estimate)}{ends}"


def _norms(found: Findings) -> Claim:
    return norm_claim(
        {
            _layer(site): {run.kind: found.norms[run.folder].ratio for run in runs if run.folder in found.norms}
            for site, runs in found.similar_ce.items()
        }
    )


def _learning_rate(found: Findings) -> Claim:
    """Of each kind, the chosen rate against the highest."""
    told, holds = [], []
    for kind in found.made.experiments.study.kinds:
        runs = {
            r.config.training.learning_rate: r.summary
            for r in found.experiments["learning_rates"]
            if r.summary.kind == kind
        }
        rate = found.made.rates.get(kind)
        if rate is None or rate not in runs or max(runs) == rate:
            continue
        chosen, highest = runs[rate], runs[max(runs)]
        holds.append(highest.alive < chosen.alive and highest.l0 > chosen.l0)
        told.append(
            f"{LABELS[kind]} from {rate:g} to {max(runs):g}: alive {chosen.alive:,} to {highest.alive:,}, "
            f"L0 {chosen.l0:.1f} to {highest.l0:.1f}"
        )
    return Claim(
        "A learning rate above the best lowers the number of alive features, and L0 creeps up",
        "so above 5e-4",
        "; ".join(told) or "the highest rate tried is the best",
        shown_if_all(holds),
    )


def _sizes(found: Findings) -> Claim:
    told, holds = [], []
    for kind in found.made.experiments.study.kinds:
        points = _known(found, kind, "dictionary")
        points.sort(key=lambda point: point.variant.runs[0].d_sae)
        if len(points) > 1:
            small, large = points[0].ce_increase, points[-1].ce_increase
            holds.append(small is not None and large is not None and large.high < small.low)
            told.append(
                f"{LABELS[kind]}: " + ", ".join(f"{p.variant.label} {_interval(p.ce_increase)}" for p in points)
            )
    return Claim(
        "A larger dictionary lowers the CE increase at equal L0",
        "it does, up to about 60 features per dimension",
        _at_l0(found, told),
        shown_if_all(holds),
    )


def _lengths(found: Findings) -> Claim:
    """The longest training against the study's own length."""
    shares: dict[str, float] = {}
    told = []
    for kind in found.made.experiments.study.kinds:
        points = sorted(_known(found, kind, "tokens"), key=lambda point: point.variant.tokens)
        base = [p for p in points if p.variant.tokens == found.made.experiments.tokens]
        if base and points[-1] is not base[0] and base[0].ce_increase and points[-1].ce_increase:
            shares[kind] = points[-1].ce_increase.estimate / base[0].ce_increase.estimate
        told.append(f"{LABELS[kind]}: " + ", ".join(f"{p.variant.label} {_interval(p.ce_increase)}" for p in points))
    verdict: Verdict = "not testable here"
    if set(shares) >= {"local", *END_TO_END}:
        verdict = "shown" if all(shares[kind] < shares["local"] for kind in END_TO_END) else "not shown"
    return Claim(
        "With longer training the end-to-end kinds go on improving where local has stopped",
        "local flat from 200k samples, e2e improves up to 800k, e2e+ds up to 400k",
        _at_l0(found, told),
        verdict,
    )


def _seeds(found: Findings) -> Claim:
    """The spread of seeds against the distance of kinds, both as ratios at equal L0."""
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
        "; ".join(told) or "fewer than three seeds",
        shown_if_all(holds),
    )


def _cost(found: Findings, kind: Kind) -> Claim:
    published = "/".join(f"{ratio:.1f}" for ratio in paper.cost_relative_to_local(kind))
    ratios = {}
    for site in found.made.experiments.study.sites:
        by_kind = {
            each.kind: each.seconds_per_token for each in found.made.costs if each.site == site and each.ratio is None
        }
        if kind in by_kind and "local" in by_kind:
            ratios[site] = by_kind[kind] / by_kind["local"]
    return Claim(
        f"Training {LABELS[kind]} takes several times as long as local",
        f"{published} times (layers 2/6/10)",
        "; ".join(f"{_layer(site)}: {times(ratio)} times per token" for site, ratio in ratios.items()),
        shown_if_all([ratio > 1 for ratio in ratios.values()]),
        timed=True,
    )


def _mitigation(found: Findings, way: Way) -> Claim:
    """Whether a cheaper variant of an end-to-end kind does as well as its full training."""
    words = {
        "tokens": "Fewer training tokens",
        "dictionary": "A smaller dictionary",
        "start": "A start from a local SAE",
    }[way]
    told, holds = [], []
    for kind in END_TO_END:
        points = _known(found, kind, way)
        base = next((p for p in points if _is_base(found, p)), None)
        if base is None or base.ce_increase is None:
            continue
        cheaper = [p for p in points if p.variant.seconds < base.variant.seconds]
        if not cheaper:
            continue
        best = min(cheaper, key=lambda p: p.ce_increase.estimate if p.ce_increase else float("inf"))
        assert best.ce_increase is not None
        holds.append(best.ce_increase.low <= base.ce_increase.high)
        share = best.variant.seconds / base.variant.seconds
        told.append(
            f"{LABELS[kind]}: {best.variant.label} has {_interval(best.ce_increase)} where full training has "
            f"{_interval(base.ce_increase)}, at {100 * share:.0f} % of its time"
        )
    return Claim(
        f"{words} lowers what end-to-end training costs without raising the CE increase",
        {
            "tokens": "e2e+ds saturates at 400k samples, e2e at 800k",
            "dictionary": "5 features per dimension are acceptable on TinyStories-1M",
            "start": "suggested",
        }[way],
        _at_l0(found, told),
        shown_if_all(holds),
        timed=True,
    )


def _break_even(found: Findings) -> Claim:
    """The cheapest end-to-end training that reaches the CE increase of the study's local SAEs."""
    told, holds = [], []
    local = next((p for p in _known(found, "local", "tokens") if _is_base(found, p)), None)
    if found.mitigations is not None and local is not None and local.ce_increase is not None:
        for kind in END_TO_END:
            best = found.mitigations.cheapest(kind, SAME * local.ce_increase.estimate)
            if best is None:
                told.append(f"{LABELS[kind]}: no variant reaches local's {_interval(local.ce_increase)}")
                holds.append(False)
                continue
            ratio = best.variant.seconds / local.variant.seconds
            holds.append(ratio <= 1)
            told.append(f"{LABELS[kind]}: {best.variant.label}, in {times(ratio)} times local's time")
    return Claim(
        "End-to-end training reaches local's CE increase at equal L0 in no more time than local takes",
        "not claimed; it is what would make local training pointless",
        _at_l0(found, told),
        shown_if_all(holds),
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


def _interval(value: Interval | None) -> str:
    return "–" if value is None else f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _percents(values: Sequence[float]) -> str:
    return f"{'/'.join(f'{100 * value:.0f}' for value in values)} % (layers 2/6/10)"
