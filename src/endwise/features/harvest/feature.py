"""One feature of a harvest, and an overview of all, as a notebook shows them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from endwise.common.errors import ConfigError
from endwise.common.html import paragraph, part, table
from endwise.common.showing import CARD, Shown, bars, box
from endwise.features.explanations import read_explanations
from endwise.features.harvest.results import TOP, Context, Harvest

CONTEXTS, PER_QUANTILE, EFFECTS = 8, 2, 8
"""Contexts of a feature's greatest activations and of each quantile that are shown, and tokens of its logit effects."""
LISTED, BINS = 12, 30
"""Features of an overview, and bins of its histogram."""
_MEANT = (
    "Importance: nats per token that its ablation adds to the CE, to second order. Logit effects: its direction times "
    "the unembedding, for an activation of 1."
)


@dataclass(frozen=True, repr=False)
class HarvestedFeature(Shown):
    """A feature with all that was harvested of it."""

    harvest: Harvest
    number: int
    row: Mapping[str, Any]
    """Row of `Harvest.features`."""

    @classmethod
    def of(cls, harvest: Harvest, number: int) -> "HarvestedFeature":
        """
        Raises:
            ConfigError: there is none of that number.
        """
        if not 0 <= number < harvest.d_sae:
            raise ConfigError(f"There is no feature {number}; the harvest has {harvest.d_sae:,}, from 0. Correct it.")
        return cls(harvest, number, harvest.features.slice(number, 1).to_pylist()[0])

    @property
    def contexts(self) -> list[Context]:
        """See `Harvest.contexts`."""
        return self.harvest.contexts(self.number)

    @property
    def explanation(self) -> str | None:
        """A language model's explanation of it, if one was asked for (`endwise explain`)."""
        explanations = read_explanations(self.harvest.folder.parent)
        found = None if explanations is None else explanations.of(self.number)
        return None if found is None else found.text

    @property
    def title(self) -> str:
        return f"Feature {self.number}"

    def shown_facts(self) -> Mapping[str, object]:
        if not self.row["firings"]:
            return {"": "dead", "in": f"{self.harvest.about['tokens']:,} tokens"}
        numbers = {"density": f"{self.row['density']:.3%}", "greatest": _number(self.row["max_active"])}
        numbers |= {"mean": _number(self.row["mean_active"]), "importance": _number(self.row["ce_second"])}
        return {**numbers, "firings": f"{self.row['firings']:,} of {self.harvest.about['tokens']:,} tokens"}

    def shown_parts(self) -> Iterable[str]:
        if words := self.explanation:
            yield paragraph(words)
        if not self.row["firings"]:
            return
        greatest, contexts = float(self.row["max_active"]), self.contexts
        yield _listed([each for each in contexts if each.group == TOP][:CONTEXTS], greatest)
        if lower := [each for each in contexts if each.group != TOP and each.rank < PER_QUANTILE]:
            yield _listed(lower, greatest, "At lower activations")
        yield box("parts", self._pictures())
        yield paragraph(_MEANT, "note")

    def _pictures(self) -> Iterable[Markup]:
        if counts := self.row["histogram"]:
            yield bars(counts, self.row["histogram_edges"], "Firings by activation")
        for name, heading in (("boosted", "likelier"), ("suppressed", "less likely")):
            tokens, logits = self.row[name] or (), self.row[f"{name}_logits"] or ()
            rows = [
                (_visible(self.harvest.vocabulary[token]), f"{logit:+.3f}")
                for token, logit in list(zip(tokens, logits, strict=True))[:EFFECTS]
            ]
            if rows:
                yield table((heading, "logit"), rows)


def overview(harvest: Harvest) -> Iterable[Markup]:
    """Show the densities of a harvest's features, and those that matter most, or fire most."""
    alive = np.flatnonzero(harvest.firings > 0)
    if not len(alive):
        return
    density = harvest.column("density")[alive]
    counts, edges = np.histogram(np.log10(density), bins=BINS)
    yield bars(counts.tolist(), (10**edges).tolist(), "Alive features by density (share of tokens at which one fires)")
    importance = harvest.column("ce_second")[alive]
    measured = bool(np.isfinite(importance).any())
    order = np.argsort(-np.nan_to_num(importance, nan=-math.inf) if measured else -density, kind="stable")
    listed = alive[order[:LISTED]].tolist()
    tops = {
        number: max(contexts, key=lambda each: each.activation) for number, contexts in harvest.all_contexts(listed)
    }
    rows = []
    for number in listed:
        row, top = harvest.feature(number).row, tops.get(number)
        token = "" if top is None else _visible(top.texts[top.peak])
        raised = "" if not row["boosted"] else _visible(harvest.vocabulary[row["boosted"][0]])
        numbers = (f"{row['density']:.3%}", _number(row["max_active"]), _number(row["ce_second"]))
        rows.append((number, *numbers, token, raised))
    headings = ("feature", "density", "greatest", "importance", "fires most at", "raises most")
    yield table(headings, rows, text=(4, 5))
    which = "most important" if measured else "densest"
    yield paragraph(f"The {len(rows)} {which} features; see one: harvest.feature(NUMBER)", "note")


def _listed(contexts: Iterable[Context], greatest: float, summary: str = "") -> Markup:
    """Show contexts one below another, folded away where there is a summary."""
    rows = [(f"{each.activation:.3g}", list(zip(each.texts, each.activations, strict=True))) for each in contexts]
    return part(CARD, "contexts", rows, greatest, summary)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def _visible(text: str) -> str:
    """Write a token so that its ends are seen."""
    return text.replace(" ", "␣").replace("\n", "⏎")
