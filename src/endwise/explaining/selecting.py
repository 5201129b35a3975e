"""Which features are explained: `all`, `random:N`, `top:N`, or numbers and ranges."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from endwise.common.errors import ConfigError
from endwise.common.seeds import numpy_stream
from endwise.features.harvest.results import Harvest

_COUNTED = re.compile(r"(random|top):(\d{1,9})", re.ASCII)
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
MOST_NAMED = 10_000_000


@dataclass(frozen=True)
class Choice:
    """A `--features` that was understood."""

    how: Literal["all", "random", "top", "named"]
    count: int | None = None
    """Of `random` and `top`."""
    named: tuple[int, ...] = ()

    def candidates(self, harvest: Harvest, seed: int) -> list[int]:
        """In the order in which they are taken, those first that are wanted most; only named ones may never have fired.

        Raises:
            ConfigError: a named one does not exist, or importance was not measured.
        """
        if self.how == "named":
            if self.named[-1] >= harvest.d_sae:
                raise ConfigError(
                    f"--features names {max(self.named)}, but {harvest.folder.parent} has {harvest.d_sae:,} features, "
                    f"numbered from 0. Name others."
                )
            return list(self.named)
        alive = np.flatnonzero(harvest.firings > 0)
        if self.how == "all":
            return alive.tolist()
        if self.how == "random":
            return numpy_stream(seed, "features to explain").permutation(alive).tolist()
        importance = harvest.column("ce_second")[alive].astype(np.float64)
        if np.isnan(importance).all():
            raise ConfigError(
                f"--features top:N takes the most important, but the harvest of {harvest.folder.parent} knows no "
                "importance. Measure it (endwise importance RUN), harvest again (endwise harvest --again RUN), or take "
                "random:N."
            )
        order = np.lexsort((alive, -np.nan_to_num(importance, nan=-np.inf)))
        return alive[order].tolist()


def parse_features(text: str) -> Choice:
    """
    Raises:
        ConfigError: it is none of the forms.
    """
    if text == "all":
        return Choice("all")
    if counted := _COUNTED.fullmatch(text):
        count = int(counted[2])
        if count:
            return Choice("random" if counted[1] == "random" else "top", count)
    ranges = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(ranges):
        raise ConfigError(
            f"--features must be all, random:N, top:N, or numbers and ranges such as 1,5,10-20; given {text!r:.80}."
        )
    named: set[int] = set()
    for first, last in ((int(each[1]), int(each[2] or each[1])) for each in ranges if each):
        if last < first or last - first >= MOST_NAMED:
            raise ConfigError(f"--features {first}-{last} is no range of at most {MOST_NAMED:,} features. Correct it.")
        named.update(range(first, last + 1))
    return Choice("named", named=tuple(sorted(named)))
