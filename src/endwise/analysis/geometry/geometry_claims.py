"""The paper's geometric claims against one's own dictionaries: shown, not shown, or not testable here, and why."""

from collections.abc import Sequence

from endwise.analysis.claims import Claim, Verdict
from endwise.analysis.comparable import methods_of, pairs_of
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.similarity import (
    SimilarityDifference,
    across_kinds,
    across_seeds,
    alive_of,
    difference,
    within,
)
from endwise.analysis.over_seeds import judged, over
from endwise.config.method import LOCAL, PRESET_METHODS, Method
from endwise.evaluation.summary import RunSummary

PUBLISHED = {"e2e": "−0.166 [−0.168, −0.163] (layer 6)", "e2e_ds": "−0.040 [−0.043, −0.037] (layer 6)"}
"""Mean within cosine less local's; GPT2-small."""

PAIRS = (("e2e", "local"), ("e2e_ds", "local"), ("e2e_ds", "e2e"))
E2E, E2E_DS = PRESET_METHODS["e2e"], PRESET_METHODS["e2e_ds"]

WITHIN, SEEDS = "within", "across seeds"
EQUALLY_MANY = ", among equally many"
"""The more features there are, the nearer the nearest: a control in which both have as many."""


def differences(found: Geometry) -> list[SimilarityDifference]:
    """Of every two presets, and of each further method and the baseline, within and across seeds; and, towards and from
    each preset, of the other two.
    """
    made = []
    for a, b in pairs_of(PAIRS, methods_of(found.runs)):
        for equally_many in (False, True):
            made.append(_difference(found, WITHIN, a, b, equally_many))
            made.append(_difference(found, SEEDS, a, b, equally_many))
    for a, b, to in ((E2E_DS, E2E, LOCAL), (E2E_DS, LOCAL, E2E), (LOCAL, E2E, E2E_DS)):
        made.append(_towards(found, a, b, to))
        made.append(_seen_from(found, to, a, b))
    return made


def claims(found: Geometry) -> list[Claim]:
    """The verdicts on the dictionaries of one setting."""
    by_name = {(each.name, each.a, each.b): each for each in differences(found)}
    made = [
        _below(
            f"{a.label} dictionaries are more orthogonal than {b.label} ones: their features lie further apart",
            PUBLISHED.get(a.key),
            by_name[WITHIN, a, b],
            control=by_name[f"{WITHIN}{EQUALLY_MANY}", a, b],
        )
        for a, b in pairs_of(PAIRS[:2], methods_of(found.runs))
    ]
    seeds, control = (by_name[f"{SEEDS}{among}", E2E_DS, E2E] for among in ("", EQUALLY_MANY))
    claim = "e2e+ds features recur across seeds more than e2e's"
    made.append(_above(claim, "far more (figure 3)", seeds, control=control))
    local = by_name["nearest in local", E2E_DS, E2E]
    published = "e2e+ds is nearer to local than e2e is (figure 3)"
    made.append(_above("e2e+ds dictionaries are partly aligned with local ones, more than e2e's are", published, local))
    published = "e2e+ds sits between them (figure 3)"
    e2e = by_name["nearest in e2e", E2E_DS, LOCAL]
    made.append(
        _above("e2e+ds lies between local and e2e: nearer to either than they are to each other", published, local, e2e)
    )
    return made


def _difference(found: Geometry, name: str, a: Method, b: Method, equally_many: bool) -> SimilarityDifference:
    """Within, or across seeds; with `equally_many`, as if either had as many alive features as the one with fewer."""
    measure, similar = (within, found.similar) if name == WITHIN else (across_seeds, found.seeded)
    runs = {run.method: run for run in similar}
    full_name = f"{name}{EQUALLY_MANY if equally_many else ''}"
    what = "two alive features" if name == WITHIN else "several seeds"
    if (missing := _missing(runs, (a, b), what)) is not None:
        return SimilarityDifference(full_name, a, b, reason=missing)
    among = min(alive_of(found, runs[method]) for method in (a, b)) if equally_many else None
    of_a, of_b = (measure(found, runs[method], among) for method in (a, b))
    assert of_a is not None and of_b is not None
    return difference(full_name, of_a, of_b, (a, b))


def _towards(found: Geometry, a: Method, b: Method, to: Method) -> SimilarityDifference:
    """How much nearer `a`'s features have one of `to` than `b`'s have; of different features, so unpaired."""
    runs, name = {run.method: run for run in found.similar}, f"nearest in {to.label}"
    if (missing := _missing(runs, (a, b, to), "two alive features")) is not None:
        return SimilarityDifference(name, a, b, reason=missing)
    of_a, of_b = (across_kinds(found, runs[method], runs[to]) for method in (a, b))
    return (
        difference(name, of_a, of_b, (a, b))
        if of_a and of_b
        else SimilarityDifference(name, a, b, reason="no seed has both")
    )


def _seen_from(found: Geometry, of: Method, a: Method, b: Method) -> SimilarityDifference:
    """How much nearer the features of `of` have one of `a` than one of `b`; the same features, so paired."""
    runs, name = {run.method: run for run in found.similar}, f"{of.label}'s features, nearest in"
    if (missing := _missing(runs, (of, a, b), "two alive features")) is not None:
        return SimilarityDifference(name, a, b, reason=missing)
    to_a, to_b = (across_kinds(found, runs[of], runs[method]) for method in (a, b))
    if to_a is None or to_b is None:
        return SimilarityDifference(name, a, b, reason="no seed has both")
    same = to_a.values.keys() == to_b.values.keys()
    return difference(name, to_a, to_b, (a, b), paired=same)


def _missing(runs: dict[Method, RunSummary], methods: Sequence[Method], what: str) -> str | None:
    absent = [method.label for method in methods if method not in runs]
    return f"there is no run of {', '.join(absent)} with {what}, of a seed of the others" if absent else None


def _above(
    claim: str, published: str | None, *parts: SimilarityDifference, control: SimilarityDifference | None = None
) -> Claim:
    return Claim(claim, published, _all_told(parts, control), _verdict(parts, 1))


def _below(
    claim: str, published: str | None, *parts: SimilarityDifference, control: SimilarityDifference | None = None
) -> Claim:
    return Claim(claim, published, _all_told(parts, control), _verdict(parts, -1))


def _all_told(parts: Sequence[SimilarityDifference], control: SimilarityDifference | None) -> str:
    """A control is told where there is one, but decides nothing: the claim is the paper's, and so is its measure."""
    known = [*parts] if control is None or control.interval is None else [*parts, control]
    return "; ".join(map(told, known))


def _verdict(parts: Sequence[SimilarityDifference], sign: int) -> Verdict:
    """Shown if the whole interval of every part lies on that side of 0, each holding features and seeds."""
    intervals = [part.interval for part in parts]
    if None in intervals:
        return "not testable here"
    return judged(*((each, min(sign * each.low, sign * each.high) > 0) for each in intervals if each is not None))


def told(part: SimilarityDifference) -> str:
    """The difference in words."""
    what = f"mean greatest cosine {part.name}, {part.a.label} less {part.b.label}"
    if part.interval is None:
        return f"{what}: not measured ({part.reason})"
    return f"{what}: {part.interval.told(signed)} {over('features', part.runs)}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
