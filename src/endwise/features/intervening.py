"""Interventions on features: a Hugging Face model that computes, and generates, with some of its features edited."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from operator import index
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from endwise.common.axes import TokenMask
from endwise.common.errors import ConfigError, ModelError
from endwise.common.showing import Shown
from endwise.dictionaries import SAE, DenseLatents, at_inference
from endwise.features.harvest.results import Harvest
from endwise.models.language_model import LanguageModel
from endwise.models.positions import Passed, Passes, Positions, refuse_positions
from endwise.models.sites import Place, Site
from endwise.models.splicing import Change, at_places, changed
from endwise.tokens.encoding import special_ids

FARTHEST = 1e18
"""Length of a change whose square, which a norm takes, just has a place in float32."""


@dataclass(frozen=True, repr=False)
class Intervention(Shown, ABC):
    """An edit of some features' activations, after the dictionary has selected which are active."""

    feature: int | Sequence[int]
    """Number of the feature, or of several."""
    _: KW_ONLY
    place: str | Site | Place | None = None
    """Place whose dictionary is meant; None: the only one."""

    @property
    def features(self) -> list[int]:
        """
        Raises:
            ConfigError: they are no whole numbers.
        """
        try:
            several = [self.feature] if hasattr(self.feature, "__index__") else list(self.feature)  # type: ignore[pyrefly:bad-argument-type]
            if any(isinstance(each, bool) for each in several):
                raise TypeError
            return [index(each) for each in several]  # type: ignore[pyrefly:bad-argument-type]
        except TypeError:
            raise ConfigError(
                f"{type(self).__name__} takes the number of a feature, or several; given {self.feature!r:.80}."
            ) from None

    def check(self, sae: SAE, dtype: torch.dtype) -> None:
        """Refuse what would change nothing, or what the model cannot compute with.

        Args:
            dtype: of the model.

        Raises:
            ConfigError: the dictionary has no such feature.
        """
        if wrong := [each for each in self.features if not 0 <= each < sae.d_sae]:
            raise ConfigError(
                f"{type(self).__name__}: there is no feature {wrong[0]}; the dictionary has {sae.d_sae:,}, from 0 to "
                f"{sae.d_sae - 1}. Correct the number."
            )

    def chosen(self, latents: Float[Tensor, "*rows d_sae"]) -> Bool[Tensor, " d_sae"]:
        """Mark the features."""
        return self._spread(latents, 1.0) != 0

    def _spread(self, latents: Tensor, values: float | Sequence[float]) -> Float[Tensor, " d_sae"]:
        """Return one value for each of the features, and 0 for others."""
        spread = latents.new_zeros(latents.shape[-1])
        spread[self.features] = torch.as_tensor(values, dtype=latents.dtype, device=latents.device)
        return spread

    @abstractmethod
    def edit(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        """Return the activations as they are to be."""


@dataclass(frozen=True, repr=False)
class _ByAmount(Intervention):
    """An edit by a number."""

    _: KW_ONLY
    relative_to: Harvest | None = None
    """Harvest; if given, the number is in multiples of the feature's greatest activation in it (`max_active`)."""

    @property
    @abstractmethod
    def amount(self) -> float | int: ...

    @property
    def amounts(self) -> list[float]:
        """The number for each of the features, in the unit of their activations."""
        if self.relative_to is None:
            return [float(self.amount)] * len(self.features)
        greatest = self.relative_to.column("max_active")
        return [float(self.amount) * (float(greatest[each]) or math.nan) for each in self.features]

    def check(self, sae: SAE, dtype: torch.dtype) -> None:
        super().check(sae, dtype)
        name, harvest = type(self).__name__, self.relative_to
        if isinstance(self.amount, bool) or not abs(self.amount) < sys.float_info.max:
            raise ConfigError(f"{name} takes a finite number; given {self.amount!r:.80}.")
        if harvest is not None and harvest.d_sae != sae.d_sae:
            raise ConfigError(
                f"{name}: the harvest in {harvest.folder} is of {harvest.d_sae:,} features, and the dictionary has "
                f"{sae.d_sae:,}. Give the harvest of the same run."
            )
        longest = min(torch.finfo(dtype).max, FARTHEST)
        lengths = sae.W_dec[self.features].double().norm(dim=-1).tolist()
        for feature, amount, length in zip(self.features, self.amounts, lengths, strict=True):
            if not math.isfinite(amount):
                raise ConfigError(
                    f"{name}: feature {feature} never fired on the text that was harvested, so there is no greatest "
                    "activation to multiply. Leave relative_to out, and give an activation."
                )
            if not 0 < length < math.inf:
                raise ConfigError(
                    f"{name}: the direction of feature {feature} has the length {length:g}, so there is nothing to "
                    "steer with. Choose another feature."
                )
            if abs(amount) * length > longest:
                raise ConfigError(
                    f"{name}: {amount:g} for feature {feature} moves the model by {abs(amount) * length:.3g}, beyond "
                    f"{longest:.3g}, where {dtype} overflows. Give less."
                )


@dataclass(frozen=True, repr=False)
class Steer(_ByAmount):
    """Add `by` to a feature's activation, whether it is active or not: the model's own activation moves by `by · W_dec`
    (which has unit length in SAEs of endwise), times what an input norm undoes for the token. Below 0 it moves back.
    """

    by: float | int
    """Amount in the unit of the activations that the dictionary gives."""

    @property
    def amount(self) -> float | int:
        return self.by

    def edit(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        return latents + self._spread(latents, self.amounts)


@dataclass(frozen=True, repr=False)
class Clamp(_ByAmount):
    """Set a feature's activation, whether it is active or not."""

    to: float | int
    """See `Steer.by`."""

    @property
    def amount(self) -> float | int:
        return self.to

    def edit(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        return torch.where(self.chosen(latents), self._spread(latents, self.amounts), latents)


@dataclass(frozen=True, repr=False)
class Ablate(Intervention):
    """Set features to 0."""

    def edit(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        return latents.where(~self.chosen(latents), 0.0)


@dataclass(frozen=True, repr=False)
class Keep(Intervention):
    """Set all other features to 0."""

    def edit(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
        return latents.where(self.chosen(latents), 0.0)


@contextmanager
def intervene(
    model: LanguageModel | PreTrainedModel,
    saes: Mapping[str | Site | Place, SAE],
    interventions: Sequence[Intervention] = (),
    *,
    error: Literal["keep", "drop"] = "keep",
    positions: Positions = "all",
    skip_special_tokens: bool = False,
) -> Iterator[LanguageModel]:
    """Context in which the Hugging Face model computes, and generates, with features edited.

    With z the features' activations of what a place reads, and z′ the edited ones, what it writes, y, becomes
    `y + decode(z′) − decode(z)`, or, without the error of the reconstruction, `decode(z′)`. Edits of one place follow
    each other in the order in which they are given; places, and contexts within each other, each read what the earlier
    ones have made of the model.

    Args:
        model: the model to run, frozen if it is none of endwise's yet.
        saes: by place (a `Place`, or its name), SAEs or transcoders; see `spliced`.
        interventions: `Steer`, `Clamp`, `Ablate`, `Keep`; each names its place where there are several.
        error: `keep` what the reconstruction misses, so that nothing but the edited features changes; or `drop` it, as
            `spliced` does, at all places that are given.
        positions: where a text is changed; see `Positions`. Elsewhere, at padding, and where the norm of what is read
            is above the dictionary's `norm_limit`, the model's own activation stays as it is, to the bit.
        skip_special_tokens: leave the tokenizer's special tokens (BOS, say) as they are, too.

    Raises:
        SiteError: the model has no such place.
        ConfigError: an intervention names a feature or a place that there is not, or a number that is of no use.
        ModelError: a dictionary is not as wide as its site, or on another device.
    """
    model = model if isinstance(model, LanguageModel) else LanguageModel(model)
    refuse_positions(positions)
    refuse_error(error)
    placed = _placed(model, saes)
    edits = _by_place(model, placed, interventions)
    special = _special_ids(model) if skip_special_tokens else None
    kept = error == "keep"
    there = {place: sae for place, sae in placed.items() if edits[place] or not kept}
    with ExitStack() as stack:
        stack.enter_context(at_inference(there.values()))
        if there:
            passes = stack.enter_context(Passes(model.model).followed())

            def scope() -> TokenMask:
                return _scope(passes.now, positions, special)

            changes = {place: _change(sae, edits[place], kept, scope) for place, sae in there.items()}
            stack.enter_context(changed(model, changes))
        yield model


def refuse_error(error: str) -> None:
    """
    Raises:
        ConfigError: it is none of what `intervene` does with the error of a reconstruction.
    """
    if error not in ("keep", "drop"):
        raise ConfigError(f"error is keep or drop; given {error!r:.80}.")


def _placed(model: LanguageModel, saes: Mapping[str | Site | Place, SAE]) -> dict[Place, SAE]:
    for name, sae in saes.items():
        if not isinstance(sae, SAE):
            raise ConfigError(
                f"The dictionary at {name} is {type(sae).__name__}, not an SAE. Load one: endwise.SAE.load(PATH)"
            )
    placed = at_places(model, saes)
    for place, sae in placed.items():
        if (device := sae.b_dec.device) != model.device:
            raise ModelError(
                f"The SAE at {place} is on {device}, and {model.name} on {model.device}. Move it: "
                f"sae.to({str(model.device)!r})"
            )
    return placed


def _by_place(
    model: LanguageModel, placed: Mapping[Place, SAE], interventions: Sequence[Intervention]
) -> dict[Place, list[Intervention]]:
    found: dict[Place, list[Intervention]] = {place: [] for place in placed}
    names = ", ".join(map(str, placed)) or "none"
    for each in interventions:
        if not isinstance(each, Intervention):
            raise ConfigError(f"An intervention is Steer, Clamp, Ablate or Keep; given {each!r:.80}.")
        if each.place is None and len(placed) != 1:
            raise ConfigError(f"{each!r:.200} does not say whose features it means. Give place=, one of: {names}.")
        place = next(iter(placed)) if each.place is None else model.place(each.place)
        if place not in placed:
            raise ConfigError(f"{each!r:.200} is at a place without an SAE. There are: {names}.")
        each.check(placed[place], model.dtype)
        found[place].append(each)
    return found


def _special_ids(model: LanguageModel) -> Sequence[int]:
    if model.tokenizer is None:
        raise ConfigError(
            f"skip_special_tokens: which tokens of {model.name} are special is not known, since it has no tokenizer "
            f"because {model.no_tokenizer} Leave it out, or name positions."
        )
    return sorted(special_ids(model.tokenizer))


def _scope(now: Passed, positions: Positions, special: Sequence[int] | None) -> TokenMask:
    chosen = now.chosen(positions)
    if special is None:
        return chosen
    if now.ids is None:
        raise ModelError("skip_special_tokens needs a pass of token ids; this one has embeddings. Leave it out.")
    return chosen & ~torch.isin(now.ids, torch.tensor(special, device=now.ids.device))


def _change(sae: SAE, edits: Sequence[Intervention], kept: bool, scope: Callable[[], TokenMask]) -> Change:
    """Return what a pass puts where an SAE writes."""

    def change(read: Tensor, own: Tensor) -> Tensor:
        latents = sae.encode(read)
        if edits:
            before = after = latents.dense()
            for each in edits:
                after = each.edit(after)
            value = sae.reconstruct(DenseLatents(after), read)
            if kept:
                value = own + (value - sae.reconstruct(DenseLatents(before), read))
        else:
            value = sae.reconstruct(latents, read)
        return torch.where(sae.within_limit(read, scope())[..., None], value, own)

    return change
