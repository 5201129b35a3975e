"""Length and direction of a reconstruction, compared with the activation (paper, figures 10 and 11)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.nn.functional import cosine_similarity

from endwise.analysis.directions.text_at_site import WHERE, SiteBatch, TextAtSite, Where
from endwise.analysis.over_seeds import interval_columns
from endwise.common.axes import Activation
from endwise.common.errors import FormatError
from endwise.common.files import read_json, write_json
from endwise.common.statistics import Interval, bootstrap_ratio
from endwise.dictionaries import SAE
from endwise.evaluation.counting import Counting
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place, Site
from endwise.tokens import Corpus

SAMPLE = {"others": 1500, "position_0": 100, "starts": 500}
"""Tokens of each group that are kept one by one, for a scatter plot."""
BINS = 200
"""Number of bins in the cosine's histogram, from −1 to 1."""


@dataclass(frozen=True)
class Norms:
    """Lengths and cosines of one SAE on held-out text. Position 0 is apart, since models keep an activation of its own
    there, often many times as long as any other; and so are document starts at other positions, where packed text
    starts again.

    Lengths are L2 norms; intervals are 95 % bootstrap ones over sequences.
    """

    ratio: Interval
    """Mean over tokens of ‖â‖ / ‖a‖, position 0 and document starts left out (paper, table 5)."""
    ratio_at_0: Interval | None
    """The same at position 0; None where that is masked throughout."""
    ratio_at_starts: Interval | None
    """The same at document starts; None where the text has none (but at position 0)."""
    cosine: Interval
    """Mean over tokens of the cosine between a and â, position 0 and document starts left out."""
    histogram: Annotated[tuple[int, ...], Field(min_length=BINS, max_length=BINS)]
    """Tokens, without position 0 and document starts, by their cosine, in `BINS` equal bins from −1 to 1."""
    sample: Mapping[Where, tuple[tuple[float, float], ...]]
    """‖a‖ and ‖â‖ of `SAMPLE` tokens of each group, spread evenly over the text."""
    tokens: int

    def to_row(self) -> dict[str, float | None]:
        """Every interval that there is, flat, for a table."""
        known = [name for name in COLUMNS.values() if getattr(self, name) is not None]
        return {key: end for name in known for key, end in interval_columns(name, getattr(self, name)).items()}

    def to_json(self) -> dict[str, Any]:
        return TypeAdapter(Norms).dump_python(self, mode="json")

    @classmethod
    def of_json(cls, values: object) -> "Norms":
        """Read what `to_json` gives.

        Raises:
            ValueError: it is something else.
        """
        return TypeAdapter(Norms).validate_python(values)

    @classmethod
    def read(cls, file: Path) -> "Norms":
        """
        Raises:
            FileNotFoundError: there is no such file.
            FormatError: it does not hold norms as `to_json` gives them.
        """
        try:
            return cls.of_json(read_json(file))
        except ValueError as error:
            raise FormatError(f"{file} is not a valid file of norms ({error}). Remove it.") from None

    def write(self, file: Path) -> None:
        write_json(file, self.to_json())


COLUMNS = {
    "‖â‖/‖a‖": "ratio",
    "at position 0": "ratio_at_0",
    "at document starts": "ratio_at_starts",
    "cosine of a and â": "cosine",
}
"""The intervals, by what heads them in a table."""


def norms(
    model: LanguageModel,
    sae: SAE,
    site: Place | Site,
    corpus: Corpus,
    *,
    tokens: int,
    batch: int = 16,
    resamples: int = 1000,
    seed: int = 12345,
) -> Norms:
    """Measure lengths and directions on the first `tokens` tokens of a corpus; masked positions do not count.

    Raises:
        ConfigError: fewer tokens than one sequence has.
    """
    collector = NormCollector()
    counting = Counting.of([(Place.of(site), sae)])
    for part in TextAtSite.first(model, site, corpus, tokens, batch, counting).batches():
        collector.add(part, sae(part.read.float()))
    return collector.norms(resamples, seed)


class NormCollector:
    """Takes batch after batch of one SAE's reconstructions."""

    def __init__(self) -> None:
        self._lengths: list[NDArray[np.float64]] = []
        """‖a‖, ‖â‖ and their cosine: `[3 batch pos]` of each batch."""
        self._groups: list[NDArray[np.bool_]] = []
        """Masks in the order of `WHERE`: `[3 batch pos]` of each batch."""

    def add(self, batch: SiteBatch, reconstruction: Activation) -> None:
        a, b = (x.double().where(batch.mask[..., None], 0.0) for x in (batch.activation, reconstruction))
        self._lengths.append(_stacked([a.norm(dim=-1), b.norm(dim=-1), cosine_similarity(a, b, -1)]))
        self._groups.append(_stacked([batch.where(group) for group in WHERE]))

    def norms(self, resamples: int, seed: int) -> Norms:
        """Join what all batches show."""
        a, b, cosines = np.concatenate(self._lengths, axis=1)
        groups: dict[Where, NDArray[np.bool_]] = dict(zip(WHERE, np.concatenate(self._groups, axis=1), strict=True))
        ratios = b / np.maximum(a, np.finfo(np.float32).tiny)
        others = groups["others"]

        def mean(values: NDArray[np.float64], kept: NDArray[np.bool_]) -> Interval:
            return bootstrap_ratio(np.where(kept, values, 0.0).sum(1), kept.sum(1).astype(float), resamples, seed)

        at_0, at_starts = (
            mean(ratios, groups[group]) if groups[group].any() else None for group in ("position_0", "starts")
        )
        return Norms(
            ratio=mean(ratios, others),
            ratio_at_0=at_0,
            ratio_at_starts=at_starts,
            cosine=mean(cosines, others),
            histogram=tuple(int(n) for n in np.histogram(cosines[others], bins=BINS, range=(-1.0, 1.0))[0]),
            sample={group: _sample(a[kept], b[kept], SAMPLE[group]) for group, kept in groups.items()},
            tokens=int(sum(kept.sum() for kept in groups.values())),
        )


def _stacked(values: list[Tensor]) -> NDArray[Any]:
    return np.stack([value.cpu().numpy() for value in values])


def _sample(a: NDArray[np.float64], b: NDArray[np.float64], count: int) -> tuple[tuple[float, float], ...]:
    chosen = np.linspace(0, len(a) - 1, min(count, len(a))).astype(int)
    return tuple((float(length), float(after)) for length, after in zip(a[chosen], b[chosen], strict=True))
