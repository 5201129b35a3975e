"""Geometry of dictionaries: each alive feature's greatest cosine within its dictionary, across seeds and across kinds.

Alive are the features that fired at least once on the held-out tokens; dictionaries are compared only where these were
equally many, of one model and one site. *Within* is the cosine of a feature's decoder direction with the nearest other
of the same dictionary; *across seeds* with the nearest in a run that differs in its seeds alone; *across kinds* with
the nearest in another kind's run of the same seed, at a similar CE increase (paper, figure 3).
"""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from endwise.analysis.comparable import Setting, comparable, in_order, methods_of
from endwise.analysis.comparison.comparison import runs_at_similar
from endwise.analysis.geometry.cosines import MEMORY, Nearest, nearest_across, nearest_within
from endwise.analysis.geometry.matching import CANDIDATES, Matching, match
from endwise.analysis.sets import ShownSet
from endwise.common.errors import ConfigError, FormatError
from endwise.common.files import expanded
from endwise.common.showing import Shown
from endwise.dictionaries import SAE
from endwise.evaluation.evaluate import read_firings
from endwise.evaluation.summary import RunSummary, other_text
from endwise.features.importance_table import read_measured
from endwise.runs.finding import Paths, check_same_weights, each_path
from endwise.runs.folder import RunFolder

Importance = NDArray[np.float64]
"""Importance of every feature, alive or not, `[d_sae]`; nats per token."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Alive:
    """A run's dictionary as far as it is alive."""

    features: NDArray[np.int64]
    """Their numbers, ascending; `[n]`."""
    firings: NDArray[np.int64]
    """Held-out tokens on which each fired, `[n]`."""
    directions: Float[Tensor, "n d_model"]
    """Decoder directions, of unit length."""


@dataclass(frozen=True, repr=False)
class Similarity(Shown):
    """Nearest neighbour of every alive feature of a run, the nearest of its own dictionary or of another run's."""

    run: RunSummary
    other: RunSummary | None
    """None: the same dictionary."""
    features: NDArray[np.int64]
    nearest: NDArray[np.int64]
    """The number of the nearest feature."""
    ranked: NDArray[np.float32]
    """The greatest cosines, `[n k]`, the greatest first; k is `CANDIDATES`, or fewer where there are fewer."""
    candidates: int
    """Number of features among which the nearest was searched for."""

    @property
    def cosine(self) -> NDArray[np.float32]:
        """The greatest, `[n]`."""
        return self.ranked[:, 0]

    def among(self, candidates: float) -> NDArray[np.float64]:
        """Estimate the mean greatest cosine if only so many of the candidates, chosen at random, are there.

        Each stands in with probability p = candidates / self.candidates, so the j-th nearest is the nearest left with
        probability p·(1 − p)^(j−1). What lies beyond the k ranked counts as the k-th: too high, but its weight
        (1 − p)^k is 1 % at a quarter of the candidates.
        """
        p = min(1.0, candidates / self.candidates)
        k = self.ranked.shape[1]
        weights = p * (1 - p) ** np.arange(k)
        weights[-1] += (1 - p) ** k
        return self.ranked.astype(np.float64) @ weights


@dataclass(frozen=True)
class Pair:
    """Two dictionaries."""

    there: Similarity
    """Cosines of the first's features, in the second."""
    back: Similarity
    matching: Matching
    """One to one; its rows are places among the alive features."""


@dataclass(frozen=True, repr=False, eq=False)
class Geometry(ShownSet):
    """The dictionaries of one setting."""

    setting: Setting
    runs: tuple[RunSummary, ...]
    within: Mapping[str, Similarity]
    """Similarities by run folder; a run with fewer than two alive features has none."""
    pairs: Mapping[tuple[str, str], Pair]
    """Pairs by run folders, each pair once."""
    similar: tuple[RunSummary, ...]
    """One run of each method, all of one seed, those whose CE increases are closest to each other."""
    seeded: tuple[RunSummary, ...]
    """Variant of `similar`, among the runs that were trained with several seeds."""
    given: tuple[tuple[str, str], ...]
    """Pairs that were asked for, beside those across seeds and across kinds at similar CE increase."""
    importance: Mapping[str, Importance]
    """Importance by run folder, for the runs in which it was measured."""

    def between(self, run: RunSummary, other: RunSummary) -> Similarity | None:
        """Return the cosines of the features of `run`, in `other`."""
        if (pair := self.pairs.get((run.folder, other.folder))) is not None:
            return pair.there
        pair = self.pairs.get((other.folder, run.folder))
        return None if pair is None else pair.back

    def twins(self, run: RunSummary) -> tuple[RunSummary, ...]:
        return twins(run, self.runs)


def twins(run: RunSummary, runs: Iterable[RunSummary]) -> tuple[RunSummary, ...]:
    """The runs that differ from it in their seeds alone, and itself; one of each, in their order."""
    alike = {run.seeds: run}
    for other in runs:
        if (other.method, other.knob, other.learning_rate) == (run.method, run.knob, run.learning_rate):
            alike.setdefault(other.seeds, other)
    return tuple(alike[seeds] for seeds in sorted(alike))


def geometry(
    paths: Paths,
    *,
    pairs: Iterable[tuple[str | Path, str | Path]] = (),
    importance: Callable[[Path], Importance | None] | None = None,
    memory: int = MEMORY,
    say: Say | None = None,
) -> list[Geometry]:
    """Compare the dictionaries of measured runs, in as many sets as can be compared.

    Args:
        paths: run folders, or folders that hold some at any depth.
        pairs: run folders to compare with each other besides those across seeds and across kinds.
        importance: of a run folder what each feature is worth, or None where that is not known; unset:
            `measured_importance`.
        memory: bytes that a search for nearest directions may hold beside the dictionaries themselves.
        say: called with what is compared next.

    Raises:
        RunFolderError: there is no run, or one was not measured yet.
        ConfigError: a pair's runs are not of one model, one site and equally many held-out tokens.
        FormatError: what a run holds cannot be read, or dictionaries of one site differ in width.
    """
    asked = [(expanded(a), expanded(b)) for a, b in pairs]
    for path in (path for pair in asked for path in pair):
        RunFolder(path).check_exists()
    sets = comparable([*each_path(paths), *(path for pair in asked for path in pair)])
    by_folder = {run.folder: run for runs in sets.values() for run in runs}
    given = [_checked(by_folder[str(a)], by_folder[str(b)]) for a, b in asked]
    look = _Look(memory, say or (lambda _: None), importance or measured_importance)
    return [look.at(setting, runs, [pair for pair in given if pair[0] in runs]) for setting, runs in sets.items()]


def measured_importance(run: Path) -> Importance | None:
    """Read what `endwise importance` found: the rise of CE if a feature is zeroed, to second order, nats per token."""
    measured = read_measured(run)
    if measured is None:
        return None
    weights = measured.settings.get("weights")
    again = f"Measure it again: endwise importance --again {shlex.quote(str(run))}"
    if weights is not None:
        check_same_weights(run, weights, "measured for importance", again)
    return measured.importance.ce_second


def alive(run: RunSummary) -> Alive:
    """
    Raises:
        FormatError: its SAE or its firings cannot be read, or do not belong together.
    """
    path = Path(run.folder)
    firings, directions = read_firings(path), SAE.load(path).W_dec.detach()
    features = np.flatnonzero(firings)
    if len(firings) != len(directions) or len(features) != run.alive:
        raise FormatError(
            f"{path} was measured with {len(firings):,} features, {run.alive:,} of them alive; its SAE has "
            f"{len(directions):,}, and {len(features):,} fired. "
            f"Measure it again: endwise evaluate {shlex.quote(str(path))}"
        )
    rows = directions[torch.from_numpy(features)].double()
    unit = torch.nn.functional.normalize(rows, dim=1).float()
    if bool((unit.norm(dim=1) < 0.5).any()):
        raise FormatError(f"{path}: an alive feature has a decoder direction of length 0. Restore its sae/.")
    return Alive(features, firings[features], unit)


def _checked(a: RunSummary, b: RunSummary) -> tuple[RunSummary, RunSummary]:
    common = {"model": "model", "site": "site", "number of held-out tokens": "alive_tokens"}
    for name, of in common.items():
        one, other = getattr(a, of), getattr(b, of)
        if one != other:
            raise ConfigError(
                f"Runs of a pair must have one {name}; {a.folder} has {one}, {b.folder} has {other}. "
                "Choose another pair, or measure both on the same held-out text."
            )
    if reason := other_text([a, b]):
        raise ConfigError(f"{a.folder} and {b.folder} are not a pair: {reason}. Measure both on one: endwise evaluate.")
    if a.folder == b.folder:
        raise ConfigError(f"A pair takes two runs; given {a.folder} twice.")
    for run in (a, b):
        if not run.alive:
            raise ConfigError(f"A pair's runs must have alive features; {run.folder} has none.")
    return a, b


class _Look:
    """Compares dictionaries, of which it keeps the latest few."""

    KEPT = 3

    def __init__(self, memory: int, say: Say, importance: Callable[[Path], Importance | None]) -> None:
        self.memory, self.say, self.importance = memory, say, importance
        self._kept: dict[str, Alive] = {}

    def at(
        self, setting: Setting, runs: Sequence[RunSummary], given: Sequence[tuple[RunSummary, RunSummary]]
    ) -> Geometry:
        ordered = tuple(sorted(runs, key=lambda run: (*in_order(run), run.folder)))
        within = {run.folder: self.within(run) for run in ordered if run.alive > 1}
        living = [run for run in ordered if run.folder in within]
        several = [run for run in living if len(twins(run, living)) > 1]
        similar = _at_similar_ce(living)
        seeded = _at_similar_ce(several, beside=similar)
        seeds = [pair for run in several for pair in combinations(twins(run, several), 2)]
        wanted = [*seeds, *_across_kinds(similar, living), *_across_kinds(seeded, living), *given]
        pairs: dict[tuple[str, str], Pair] = {}
        for a, b in wanted:
            if {(a.folder, b.folder), (b.folder, a.folder)}.isdisjoint(pairs):
                pairs[a.folder, b.folder] = self.pair(a, b)
        named = tuple((a.folder, b.folder) for a, b in given)
        known = {run.folder: self.importance(Path(run.folder)) for run in ordered}
        importance = {folder: worth for folder, worth in known.items() if worth is not None}
        return Geometry(setting, ordered, within, pairs, similar, seeded, named, importance)

    def within(self, run: RunSummary) -> Similarity:
        self.say(f"within {run.folder}")
        own = self.read(run)
        found = nearest_within(own.directions, k=CANDIDATES, memory=self.memory)
        return _similarity(run, None, own, own, found)

    def pair(self, a: RunSummary, b: RunSummary) -> Pair:
        self.say(f"{a.folder} with {b.folder}")
        of_a, of_b = self.read(a), self.read(b)
        widths = [of.directions.shape[1] for of in (of_a, of_b)]
        if widths[0] != widths[1]:
            raise FormatError(
                f"{a.folder} has directions of width {widths[0]}, {b.folder} of {widths[1]}, at one site of one model. "
                "Restore the sae/ that is not its run's own."
            )
        found = nearest_across(of_a.directions, of_b.directions, k=CANDIDATES, memory=self.memory)
        there, back = (partial(_similarity, a, b, of_a, of_b), partial(_similarity, b, a, of_b, of_a))
        return Pair(there(found[0]), back(found[1]), match(of_a.directions, of_b.directions, found))

    def read(self, run: RunSummary) -> Alive:
        read = self._kept.pop(run.folder, None) or alive(run)
        self._kept[run.folder] = read
        while len(self._kept) > self.KEPT:
            del self._kept[next(iter(self._kept))]
        return read


def _similarity(run: RunSummary, other: RunSummary | None, of: Alive, to: Alive, found: Nearest) -> Similarity:
    nearest = to.features[found.index[:, 0].numpy()]
    candidates = len(to.features) - (other is None)
    return Similarity(run, other, of.features, nearest, found.cosine.numpy(), candidates)


def _at_similar_ce(runs: Sequence[RunSummary], beside: Sequence[RunSummary] = ()) -> tuple[RunSummary, ...]:
    """One run of each method, all of the learning rate that most of its runs have: where one was tuned, the others
    are of dictionaries that nobody would use. Of a single method, the run nearest to those `beside`.
    """
    kept = []
    for method in methods_of(runs):
        own = [run for run in runs if run.method == method]
        usual = Counter(run.learning_rate for run in own).most_common(1)
        kept += [run for run in own if run.learning_rate == usual[0][0]]
    if beside and len({run.method for run in kept}) == 1:
        middle = float(np.mean([run.ce_increase for run in beside]))
        return (min(kept, key=lambda run: abs(run.ce_increase - middle)),)
    return runs_at_similar(kept, "ce_increase") if kept else ()


def _across_kinds(similar: Sequence[RunSummary], runs: Sequence[RunSummary]) -> list[tuple[RunSummary, RunSummary]]:
    """Every two of them and, of each seed that both have, the twins."""
    pairs = []
    for a, b in combinations(similar, 2):
        pairs += [(a, b), *at_common_seeds(twins(a, runs), twins(b, runs))]
    return pairs


def at_common_seeds(runs: Sequence[RunSummary], others: Sequence[RunSummary]) -> list[tuple[RunSummary, RunSummary]]:
    """Pair the runs of one seed."""
    by_seed = {run.seeds: run for run in others}
    return [(run, by_seed[run.seeds]) for run in runs if run.seeds in by_seed]
