"""The paper's geometric claims against one's own dictionaries: shown, not shown, or not testable here, and why."""

from collections.abc import Sequence

import numpy as np

from endwise.analysis.claims import Claim, Unmeasured, Verdict
from endwise.analysis.comparable import methods_of, pairs_of
from endwise.analysis.geometry.geometry import Geometry
from endwise.analysis.geometry.similarity import (
    SimilarityDifference,
    across_kinds,
    across_seeds,
    difference,
    within,
)
from endwise.analysis.over_seeds import judged, over
from endwise.analysis.sets import once
from endwise.common.text import minus
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
    """List those between the methods that are there."""
    there = set(methods_of(found.runs))
    return [each for kinds, each in _differences(found) if there.issuperset(kinds)]


@once
def _differences(found: Geometry) -> list[tuple[tuple[Method, ...], SimilarityDifference]]:
    """List those of every two presets, and of each further method and the baseline, within and across seeds; and,
    towards and from each preset, of the other two; each with the methods that it takes.
    """
    made: list[tuple[tuple[Method, ...], SimilarityDifference]] = [
        ((a, b), _difference(found, name, a, b, equally_many))
        for a, b in pairs_of(PAIRS, methods_of(found.runs))
        for equally_many in (False, True)
        for name in (WITHIN, SEEDS)
    ]
    for a, b, to in ((E2E_DS, E2E, LOCAL), (E2E_DS, LOCAL, E2E), (LOCAL, E2E, E2E_DS)):
        # How much nearer a's features have one of `to` than b's; of different features, so unpaired.
        made.append(((a, b, to), _between(found, f"nearest in {to.label}", (a, b), ((a, to), (b, to)))))
        # How much nearer the features of `to` have one of a than one of b; the same features, so paired.
        towards = f"{to.label}'s features, nearest in"
        made.append(((a, b, to), _between(found, towards, (a, b), ((to, a), (to, b)))))
    return made


def claims(found: Geometry) -> list[Claim]:
    """The verdicts on the dictionaries of one setting."""
    by_name = {(each.name, each.a, each.b): each for _, each in _differences(found)}

    def judge(claim: str, published: str | None, sign: int, *names: tuple[str, Method, Method]) -> Claim:
        """Name a control where there is one; it decides nothing, for claim and measure are the paper's."""
        name, a, b = names[0]
        parts, control = [by_name[each] for each in names], by_name.get((f"{name}{EQUALLY_MANY}", a, b))
        if not any(part.interval for part in parts):
            return Unmeasured(claim, published, "; ".join(dict.fromkeys(part.reason or "" for part in parts)))
        known = [*parts] if control is None or control.interval is None else [*parts, control]
        return Claim(claim, published, "; ".join(map(in_words, known)), _verdict(parts, sign))

    further_apart = "dictionaries are more orthogonal than {} ones: their features lie further apart"
    made = [
        judge(f"{a.label} {further_apart.format(b.label)}", PUBLISHED.get(a.key), -1, (WITHIN, a, b))
        for a, b in pairs_of(PAIRS[:2], methods_of(found.runs))
    ]
    to_local, to_e2e = ("nearest in local", E2E_DS, E2E), ("nearest in e2e", E2E_DS, LOCAL)
    recur = "e2e+ds features recur across seeds more than e2e's"
    aligned = "e2e+ds dictionaries are partly aligned with local ones, more than e2e's are"
    between = "e2e+ds lies between local and e2e: nearer to either than they are to each other"
    return [
        *made,
        judge(recur, "far more (figure 3)", 1, (SEEDS, E2E_DS, E2E)),
        judge(aligned, "e2e+ds is nearer to local than e2e is (figure 3)", 1, to_local),
        judge(between, "e2e+ds sits between them (figure 3)", 1, to_local, to_e2e),
    ]


def _difference(found: Geometry, name: str, a: Method, b: Method, equally_many: bool) -> SimilarityDifference:
    """Compare within, or across seeds; with `equally_many`, as if both had as many alive features as the smaller."""
    measure, similar = (within, found.similar) if name == WITHIN else (across_seeds, found.seeded)
    runs = {run.method: run for run in similar}
    full_name = f"{name}{EQUALLY_MANY if equally_many else ''}"
    what = "two alive features" if name == WITHIN else "several seeds"
    if (missing := _missing(runs, (a, b), what)) is not None:
        return SimilarityDifference(full_name, a, b, reason=missing)
    alive = [float(np.mean([one.alive for one in found.twins(runs[method])])) for method in (a, b)]
    among = min(alive) if equally_many else None
    of_a, of_b = (measure(found, runs[method], among) for method in (a, b))
    assert of_a is not None and of_b is not None
    return difference(full_name, of_a, of_b, (a, b))


def _between(
    found: Geometry, name: str, methods: tuple[Method, Method], pairs: Sequence[tuple[Method, Method]]
) -> SimilarityDifference:
    """Measure how much nearer the features of the first pair's first lie to its second than those of the other pair."""
    runs = {run.method: run for run in found.similar}
    wanted = list(dict.fromkeys(method for side in zip(*pairs, strict=True) for method in side))
    if (missing := _missing(runs, wanted, "two alive features")) is not None:
        return SimilarityDifference(name, *methods, reason=missing)
    of_a, of_b = (across_kinds(found, runs[of], runs[to]) for of, to in pairs)
    if of_a is None or of_b is None:
        return SimilarityDifference(name, *methods, reason="no seed has both")
    same = pairs[0][0] == pairs[1][0] and of_a.values.keys() == of_b.values.keys()
    return difference(name, of_a, of_b, methods, paired=same)


def _missing(runs: dict[Method, RunSummary], methods: Sequence[Method], what: str) -> str | None:
    absent = [method.label for method in methods if method not in runs]
    return f"there is no run of {', '.join(absent)} with {what}, of a seed of the others" if absent else None


def _verdict(parts: Sequence[SimilarityDifference], sign: int) -> Verdict:
    """Shown if the whole interval of every part lies on that side of 0, each holding features and seeds."""
    intervals = [part.interval for part in parts]
    if None in intervals:
        return "not testable here"
    return judged(*((each, min(sign * each.low, sign * each.high) > 0) for each in intervals if each is not None))


def in_words(part: SimilarityDifference) -> str:
    """The difference in words."""
    what = f"mean greatest cosine {part.name}, {part.a.label} less {part.b.label}"
    if part.interval is None:
        return f"{what}: not measured ({part.reason})"
    return f"{what}: {part.interval.text(signed)} {over('features', part.runs)}"


def signed(value: float) -> str:
    return minus(f"{value:+.3f}")
