"""The runs of a study: for each experiment its recipes, given how long they train and with which learning rates."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endwise.config.base import with_values
from endwise.config.objective import Kind
from endwise.config.run import RunConfig
from endwise.paper.study_config import StudyConfig
from endwise.sweeps.points import placed

Rates = Mapping[str, Mapping[Kind, float]]
"""Learning rate of each kind, by site."""


@dataclass(frozen=True)
class Experiments:
    """The recipes of a study whose runs train on `tokens` tokens and lie in `folder`."""

    study: StudyConfig
    tokens: int
    folder: Path

    def rates(self, choose: Callable[[Sequence[float]], float]) -> Rates:
        """Choose, of those that are tried, one for every kind and site."""
        return {
            site: {kind: choose(self.study.kind(kind, site).learning_rates) for kind in self.study.kinds}
            for site in self.study.sites
        }

    def learning_rates(self) -> list[RunConfig]:
        """The curves' inner part with every rate of every kind at every site, measured on text of their own."""
        return [
            self._recipe(kind, site, coefficient, rate, further=self.study.tuning)
            for site in self.study.sites
            for kind in self.study.kinds
            for rate in self.study.kind(kind, site).learning_rates
            for coefficient in inner(self._coefficients(kind, site))
        ]

    def curves(self, rates: Rates) -> list[RunConfig]:
        """All coefficients of all kinds at every site, with seed 0."""
        return self._curves(rates, seed=0)

    def seeds(self, rates: Rates) -> list[RunConfig]:
        """The curves again, with the other seeds."""
        return [recipe for seed in range(1, self.study.seeds) for recipe in self._curves(rates, seed)]

    def _curves(self, rates: Rates, seed: int) -> list[RunConfig]:
        return [
            self._recipe(kind, site, coefficient, rates[site][kind], seed=seed)
            for site in self.study.sites
            for kind in self.study.kinds
            for coefficient in self._coefficients(kind, site)
        ]

    def lengths(self, rates: Rates) -> list[RunConfig]:
        """The curves' inner part with other numbers of training tokens."""
        return [recipe for factor in self.study.lengths for recipe in self._inner(rates, tokens=self._tokens(factor))]

    def sizes(self, rates: Rates) -> list[RunConfig]:
        """The curves' inner part with dictionaries of other sizes."""
        return [recipe for ratio in self.study.ratios for recipe in self._inner(rates, ratio=ratio)]

    def starts(self, rates: Rates) -> list[RunConfig]:
        """End-to-end training that starts from the local SAE of the curves at the same place in its list, with every
        seed.
        """
        site = self.study.site
        local = inner(self._coefficients("local", site))
        recipes = []
        for seed, factor, kind in itertools.product(range(self.study.seeds), self.study.starts, self.study.kinds):
            if kind == "local":
                continue
            for coefficient, from_coefficient in zip(inner(self._coefficients(kind, site)), local, strict=False):
                start = self._recipe("local", site, from_coefficient, rates[site]["local"], seed=seed).out
                tokens, rate = self._tokens(factor), rates[site][kind]
                recipes.append(self._recipe(kind, site, coefficient, rate, seed=seed, tokens=tokens, start=start))
        return recipes

    def single(self, kind: Kind, site: str, ratio: float | None, tokens: int) -> RunConfig:
        """One run to time a kind by."""
        settings = self.study.kind(kind, site)
        rate = middle(settings.learning_rates)
        return self._recipe(kind, site, middle(settings.coefficients), rate, tokens=tokens, ratio=ratio)

    def _inner(self, rates: Rates, tokens: int | None = None, ratio: float | None = None) -> Iterator[RunConfig]:
        site = self.study.site
        for kind in self.study.kinds:
            for coefficient in inner(self._coefficients(kind, site)):
                yield self._recipe(kind, site, coefficient, rates[site][kind], tokens=tokens, ratio=ratio)

    def _coefficients(self, kind: Kind, site: str) -> Sequence[float]:
        return self.study.kind(kind, site).coefficients

    def _tokens(self, factor: float) -> int:
        return round(self.tokens * factor)

    def _recipe(
        self,
        kind: Kind,
        site: str,
        coefficient: float,
        rate: float,
        *,
        seed: int = 0,
        tokens: int | None = None,
        ratio: float | None = None,
        start: Path | None = None,
        further: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        settings = self.study.kind(kind, site)
        objective: dict[str, Any] = {"kind": kind, "sparsity": {"coefficient": coefficient}}
        if settings.downstream_mse is not None:
            objective["downstream_mse"] = settings.downstream_mse
        changes = {
            "site": site,
            "objective": objective,
            "seed": seed,
            "data.seed": seed,
            "training.tokens": tokens or self.tokens,
            "training.learning_rate": rate,
        }
        changes |= further or {}
        changes |= {} if ratio is None else {"dictionary": {"ratio": ratio}}
        changes |= {} if start is None else {"init_from": str(start)}
        return placed(RunConfig.build(with_values(self.study.recipe, changes), "the study"), self.folder)


def middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]


def inner(values: Sequence[float]) -> Sequence[float]:
    """The middle three, or what there is: enough for a curve."""
    start = max(0, len(values) // 2 - 1)
    return values[start : start + 3]
