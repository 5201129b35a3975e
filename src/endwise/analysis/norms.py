"""How long a reconstruction is and which way it points, compared with the activation (paper, figures 10 and 11)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from endwise.dictionaries import SAE
from endwise.errors import FormatError
from endwise.files import write_json
from endwise.language_model import LanguageModel
from endwise.reading import read_json
from endwise.sites import Site
from endwise.statistics import Interval, bootstrap_ratio
from endwise.tokens import Corpus

SAMPLE = 1500
"""Tokens that are kept one by one, for a scatter plot."""
BINS = 40
"""Of the cosine's histogram, from −1 to 1."""


@dataclass(frozen=True)
class Norms:
    """Of one SAE on held-out text; position 0 is apart, since models keep an activation of its own there, often many
    times as long as any other.
    """

    ratio: Interval
    """Mean over tokens of ‖â‖ / ‖a‖ (L2), at all positions but 0; 95 % bootstrap interval over sequences."""
    ratio_at_0: Interval | None
    """At position 0; None where that is masked throughout."""
    cosine: Interval
    """Mean over tokens of the cosine between a and â, at all positions but 0."""
    histogram: tuple[int, ...]
    """Tokens (all positions but 0) by their cosine, in `BINS` equal bins from −1 to 1."""
    sample: tuple[tuple[int, float, float], ...]
    """Position, ‖a‖ and ‖â‖ of `SAMPLE` tokens, spread evenly over the text."""
    tokens: int

    def to_json(self) -> dict[str, Any]:
        intervals = {name: getattr(self, name) for name in ("ratio", "ratio_at_0", "cosine")}
        return {**vars(self), **{name: None if each is None else vars(each) for name, each in intervals.items()}}

    @classmethod
    def read(cls, file: Path) -> "Norms":
        """
        Raises:
            FormatError: the file does not hold norms as `to_json` gives them.
        """
        try:
            values = read_json(file)
            at_0 = values["ratio_at_0"]
            return cls(
                ratio=Interval(**values["ratio"]),
                ratio_at_0=None if at_0 is None else Interval(**at_0),
                cosine=Interval(**values["cosine"]),
                histogram=tuple(values["histogram"]),
                sample=tuple((int(position), float(a), float(b)) for position, a, b in values["sample"]),
                tokens=values["tokens"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file} holds no norms as they are written ({error}). Remove it.") from None

    def write(self, file: Path) -> None:
        write_json(file, self.to_json())


def norms(
    model: LanguageModel,
    sae: SAE,
    site: Site,
    corpus: Corpus,
    *,
    tokens: int,
    batch: int = 16,
    resamples: int = 1000,
    seed: int = 12345,
) -> Norms:
    """Measures lengths and directions on the first `tokens` tokens of a corpus; masked positions do not count."""
    sequences = tokens // corpus.context
    measured = [
        _of_batch(model, sae, site, corpus, range(start, min(start + batch, sequences)))
        for start in range(0, sequences, batch)
    ]
    a, b, cosines, kept = (np.concatenate(parts) for parts in zip(*measured, strict=True))
    ratios = b / np.maximum(a, np.finfo(np.float32).tiny)
    first, later = kept[:, :1], kept[:, 1:]

    def mean(values: NDArray[Any], mask: NDArray[Any]) -> Interval:
        return bootstrap_ratio((values * mask).sum(1), mask.sum(1).astype(float), resamples, seed)

    positions = np.broadcast_to(np.arange(corpus.context), kept.shape)
    listed = np.stack([positions[kept], a[kept], b[kept]], axis=1)
    chosen = listed[np.linspace(0, len(listed) - 1, min(SAMPLE, len(listed))).astype(int)]
    return Norms(
        ratio=mean(ratios[:, 1:], later),
        ratio_at_0=mean(ratios[:, :1], first) if first.any() else None,
        cosine=mean(cosines[:, 1:], later),
        histogram=tuple(int(n) for n in np.histogram(cosines[:, 1:][later], bins=BINS, range=(-1.0, 1.0))[0]),
        sample=tuple((int(position), float(length), float(after)) for position, length, after in chosen),
        tokens=int(kept.sum()),
    )


@torch.no_grad()
def _of_batch(
    model: LanguageModel, sae: SAE, site: Site, corpus: Corpus, rows: range
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """‖a‖, ‖â‖, their cosine, and which positions count; `[batch pos]` each, in float64."""
    batch = corpus.batch(rows)
    activation = model.clean(batch.tokens.to(model.device), record={site}).activations[site].double()
    reconstruction = sae(activation.float()).double()
    values = (activation.norm(dim=-1), reconstruction.norm(dim=-1), cosine_similarity(activation, reconstruction, -1))
    length, length_after, cosine = (value.cpu().numpy() for value in values)
    return length, length_after, cosine, batch.mask.numpy()
