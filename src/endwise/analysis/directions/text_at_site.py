"""The activations of held-out text at one site, batch by batch, with position 0 and document starts kept apart."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ConfigError
from endwise.evaluation.counting import EVERY, Counting
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site
from endwise.tokens import Corpus

Where = Literal["position_0", "starts", "others"]
WHERE: tuple[Where, ...] = ("position_0", "starts", "others")
"""Every token that counts is in one of: position 0 of a sequence; the first token of a document elsewhere; the rest."""


@dataclass(frozen=True)
class SiteBatch:
    """Some sequences; everything on the model's device."""

    clean: Clean
    activation: Activation
    """At the site, as the model computes it."""
    mask: TokenMask
    """True where a position counts (see `TokenBatch.mask`)."""
    starts: TokenMask
    """True at the first token of a document."""
    reads: Site | None = None
    """The site that a transcoder reads which writes this one."""

    @property
    def read(self) -> Activation:
        """Input of the dictionary at the site: the activation there, or what a transcoder reads."""
        return self.activation if self.reads is None else self.clean.activations[self.reads]

    def where(self, group: Where) -> TokenMask:
        """The positions that count and belong to a group of `WHERE`."""
        first = torch.zeros_like(self.mask)
        first[:, 0] = True
        return (
            self.mask & {"position_0": first, "starts": self.starts & ~first, "others": ~(self.starts | first)}[group]
        )

    def counted(self, with_starts: bool) -> TokenMask:
        """All positions that count, or those besides position 0 and document starts."""
        return self.mask if with_starts else self.where("others")


@dataclass(frozen=True)
class TextAtSite:
    """The first sequences of a corpus, and a site at which to read them."""

    model: LanguageModel
    site: Site
    corpus: Corpus
    sequences: int
    batch: int = 16
    """Sequences at a time."""
    reads: Site | None = None
    """The site that a transcoder reads which writes `site`."""
    counting: Counting = EVERY
    """Tokens that count, of those that do in the corpus."""

    @classmethod
    def first(
        cls,
        model: LanguageModel,
        place: Place | Site,
        corpus: Corpus,
        tokens: int,
        batch: int = 16,
        counting: Counting = EVERY,
    ) -> "TextAtSite":
        """The first `tokens` tokens, in whole sequences.

        Args:
            place: whose written site is meant.

        Raises:
            ConfigError: not one whole sequence.
        """
        sequences = min(tokens // corpus.context, len(corpus))
        if not sequences:
            raise ConfigError(f"{tokens} held-out tokens were asked for, but one sequence alone has {corpus.context}.")
        place = Place.of(place)
        reads = None if place.reads == place.writes else place.reads
        return cls(model, place.writes, corpus, sequences, batch, reads, counting)

    def of_at_most(self, tokens: int) -> "TextAtSite":
        """The same, or its first sequences: no more than `tokens` tokens, but one sequence at least."""
        return replace(self, sequences=min(self.sequences, max(1, tokens // self.corpus.context)))

    @torch.no_grad()
    def batches(self, final: bool = False) -> Iterator[SiteBatch]:
        """One clean pass, as far as the site or, with `final`, to the end."""
        self.model.attend_within(self.corpus.layout.ends)
        for start in range(0, self.sequences, self.batch):
            rows = range(start, min(start + self.batch, self.sequences))
            text = self.corpus.batch(rows).to(self.model.device)
            sites = {self.site} if self.reads is None else {self.site, self.reads}
            clean = self.model.clean(text.tokens, record=sites, final=final)
            starts = self.corpus.document_starts(rows).to(self.model.device)
            mask = self.counting.of_these(clean, text.mask)
            yield SiteBatch(clean, clean.activations[self.site], mask, starts, self.reads)
