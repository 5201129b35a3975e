"""Importance of a run's features, as its folder keeps it: `importance.safetensors` in its folder.

Three measurements on held-out text, each against the SAE's own spliced pass: an estimate for every feature
(`FeatureImportance`), the exact effect of zeroing some of them (`Ablations`), and what is left when only the most
important are kept (`Faithfulness`). Their measurement is described in `attribution`, `ablation` and `faithfulness`.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from endwise.common.errors import FormatError
from endwise.common.files import expanded
from endwise.common.remedies import unreadable
from endwise.common.showing import Shown
from endwise.common.statistics import Floats
from endwise.common.tensor_files import write_tensors

IMPORTANCE_FILE = "importance.safetensors"

Counts = NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class FeatureImportance(Shown):
    """Estimates of what zeroing each feature does, on held-out text, to first and to second order.

    All arrays are `[d_sae]` unless stated otherwise; a feature that never fired holds 0.
    """

    ce: Floats
    """First-order estimate: mean over the predictions that count of −c·dCE/dc, nats per token, which is by how much CE
    would rise if it were linear in c. Negative: the text would be predicted better without the feature."""
    ce_second: Floats
    """Second-order estimate, nats per token: `ce` and half the curvature (`attribution`), which is most of it where
    training has left little slope. This is the importance that features are ranked by."""
    ce_se: Floats
    """Standard error over sequences."""
    ce_absolute: Floats
    """Mean of |c·dCE/dc|, token by token: not less than |ce|, and equal to it where no tokens disagree."""
    kl: Floats
    """Mean over tokens of −c·dKL/dc, KL(clean ‖ spliced) at the spliced state, nats per token; NaN throughout where it
    was not asked for."""
    kl_se: Floats
    kl_absolute: Floats
    firings: Counts
    """Tokens at which the feature is not 0."""
    mean_active: Floats
    """Mean of c over these; NaN for a feature that never fired."""
    ce_blocks: Floats
    """`[blocks d_sae]`: sums of −c·dCE/dc over an even number of blocks of sequences, in the order of the text. The
    first half of the blocks ranks features, on the second half ablation and faithfulness are measured."""
    squares_blocks: Floats
    """`[blocks d_sae]`: sums over the sequences of a block of the square of each one's −c·dCE/dc."""
    predictions_blocks: Floats
    """`[blocks]`: predictions that count in each."""
    kl_blocks: Floats
    """Variant of `ce_blocks` for the KL; no blocks where it was not asked for."""
    tokens_blocks: Floats
    """`[blocks]`: tokens that count in each."""
    tokens: int
    """Tokens that count."""

    def shown_facts(self) -> dict[str, object]:
        return {"alive": f"{self.alive:,} of {len(self.ce):,}", "tokens": f"{self.tokens:,}"}

    @property
    def alive(self) -> int:
        return int((self.firings > 0).sum())

    @property
    def has_kl(self) -> bool:
        return len(self.kl_blocks) > 0

    def ce_of_half(self, half: Literal[0, 1]) -> Floats:
        """`ce` on the first or the second half of the sequences, `[d_sae]`."""
        return _of_half(self.ce_blocks, self.predictions_blocks, half)

    def kl_of_half(self, half: Literal[0, 1]) -> Floats:
        """`kl` on one half; NaN throughout where it was not asked for."""
        return _of_half(self.kl_blocks, self.tokens_blocks, half) if self.has_kl else np.full_like(self.kl, np.nan)

    def curvature_of_half(self, half: Literal[0, 1]) -> Floats:
        """Return what `ce_second` and the KL's second-order estimate add to the first-order one, on one half."""
        return _of_half(self.squares_blocks, self.predictions_blocks, half) / 2

    @property
    def second_blocks(self) -> Floats:
        """`[blocks d_sae]`: sums whose total per prediction is `ce_second`."""
        return self.ce_blocks + self.squares_blocks / 2

    def ranking(self, *, first_order: bool = False) -> Counts:
        """Every feature, `[d_sae]`, by its importance on the first half, the most important first; those that never
        fired come at the end.

        Args:
            first_order: rank by |ce| rather than by the second-order estimate.
        """
        ce = self.ce_of_half(0)
        return np.lexsort((-np.abs(ce) if first_order else -(ce + self.curvature_of_half(0)), self.firings == 0))


def _of_half(blocks: Floats, counts: Floats, half: Literal[0, 1]) -> Floats:
    middle = len(blocks) // 2
    part = slice(middle, None) if half else slice(0, middle)
    return blocks[part].sum(0) / max(1.0, float(counts[part].sum()))


@dataclass(frozen=True, repr=False)
class Ablations(Shown):
    """The exact effect, on the second half of the sequences, of zeroing one feature in the spliced pass; `[sample]`."""

    features: Counts
    by_rank: NDArray[np.bool_]
    """Chosen for its rank on the first half; the others are drawn at random from all that fired."""
    ce: Floats
    """Rise of CE, nats per token."""
    ce_se: Floats
    """Standard error over sequences."""
    kl: Floats
    """Rise of KL(clean ‖ spliced), nats per token."""
    kl_se: Floats
    sequences: Counts
    """Sequences of the half in which the feature fires. In all others zeroing it changes nothing."""
    estimated_ce: Floats
    """First-order estimate, on the same sequences."""
    estimated_kl: Floats
    """NaN where it was not asked for."""
    second_ce: Floats
    """Second-order estimate, on the same sequences."""
    second_kl: Floats
    """NaN where it was not asked for."""


@dataclass(frozen=True, repr=False)
class Faithfulness(Shown):
    """CE of the spliced pass when only some features are kept, on the second half of the sequences.

    Sums over predictions, per sequence, so that every share is a ratio that can be resampled.
    """

    kept: Counts
    """`[points]`: how many features are kept, from 0 to all that are alive; with all, it is the SAE as it is."""
    ce: Floats
    """`[points sequences]`: those that are first in rank, by the second-order estimate on the first half."""
    first_order_ce: Floats
    """`[points sequences]`: those that are first in rank by |ce|, the first-order estimate, on the first half."""
    random_ce: Floats
    """`[points sequences]`: as many, drawn at random from those that are alive."""
    clean: Floats
    """`[sequences]`: of the model itself."""
    mean_ablated: Floats
    """`[sequences]`: with the site at its mean activation."""
    predictions: Floats
    """`[sequences]`"""
    between_kept: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    """`[more]`: further counts of those first in rank, about where `faithfulness.CARRIED` is reached; none in what
    version 0.1 wrote."""
    between_ce: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """`[more sequences]`, as `ce`."""

    @property
    def by_importance(self) -> tuple[Counts, Floats]:
        """All counts of those first in rank, ascending, and their CE."""
        if not len(self.between_kept):
            return self.kept, self.ce
        kept = np.concatenate([self.kept, self.between_kept])
        order = np.argsort(kept)
        return kept[order], np.concatenate([self.ce, self.between_ce])[order]


@dataclass(frozen=True, repr=False)
class MeasuredImportance(Shown):
    """Everything in `importance.safetensors`."""

    importance: FeatureImportance
    ablations: Ablations
    faithfulness: Faithfulness
    settings: Mapping[str, Any]
    """Settings of the measurement: two measurements with equal settings are equal."""


def read_importance(run: str | Path) -> FeatureImportance | None:
    """The importance of every feature of a run; None if it was not measured.

    Raises:
        FormatError: the file is there, but does not hold what `endwise importance` writes.
    """
    measured = read_measured(run)
    return None if measured is None else measured.importance


def read_measured(run: str | Path) -> MeasuredImportance | None:
    """Everything that `endwise importance` measured of a run; None if it did not.

    Raises:
        FormatError: see `read_importance`.
    """
    run = expanded(run)
    file = run / IMPORTANCE_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as opened:
            settings = json.loads((opened.metadata() or {})["endwise"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  It is no mapping.
        if not isinstance(settings, dict):
            raise TypeError("its settings are no object")
        return MeasuredImportance(
            _read_part(FeatureImportance, tensors, tokens=int(settings["tokens_that_count"])),
            _read_part(Ablations, tensors),
            _read_part(Faithfulness, tensors),
            settings,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        again = f"endwise importance --again {shlex.quote(str(run))}"
        raise unreadable(file, error) or FormatError(
            f"{file} does not hold the importance of features ({error}). Measure it again: {again}"
        ) from None


def write_measured(run: Path, measured: MeasuredImportance) -> None:
    """
    Raises:
        RunFolderError: the folder cannot be written; an older measurement is untouched.
    """
    parts = (measured.importance, measured.ablations, measured.faithfulness)
    tensors = {f"{_prefix(type(part))}{name}": values for part in parts for name, values in _arrays(part).items()}
    settings = {**measured.settings, "tokens_that_count": measured.importance.tokens}
    written = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tensors.items()}
    write_tensors(run / IMPORTANCE_FILE, written, {"endwise": json.dumps(settings)})


_Part = TypeVar("_Part", FeatureImportance, Ablations, Faithfulness)


def _prefix(part: type) -> str:
    return "" if part is FeatureImportance else f"{part.__name__.lower()}."


def _arrays(part: FeatureImportance | Ablations | Faithfulness) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}


def _read_part(part: type[_Part], tensors: Mapping[str, NDArray[Any]], **others: Any) -> _Part:
    """Arrays of one length along each axis that they share; whatever else they are, they are numbers."""
    named = {f"{_prefix(part)}{each.name}": each for each in fields(part) if each.name not in others}
    optional = [key for key, each in named.items() if each.default_factory is not MISSING and key not in tensors]
    arrays = {each.name: tensors[key] for key, each in named.items() if key not in optional}
    lengths = {array.shape[-1] for name, array in arrays.items() if name not in _OTHER_AXES}
    if len(lengths) > 1:
        raise ValueError(f"the arrays of {part.__name__} have {sorted(lengths)} entries, which must agree")
    return part(**arrays, **others)


_OTHER_AXES = ("predictions_blocks", "tokens_blocks", "kept", "between_kept")
"""Arrays whose last axis is not the one that the others of their part share."""
