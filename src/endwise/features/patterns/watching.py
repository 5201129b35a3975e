"""Features that patterns are made for: an SAE's and, numbered after them, random directions, as a control."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from endwise.common.axes import TokenMask, Tokens
from endwise.common.seeds import torch_stream
from endwise.dictionaries import SAE, DenseLatents
from endwise.features.harvest.firings import Firings
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place


@dataclass(frozen=True)
class Watched:
    """A random direction r fires where r·x exceeds its threshold, by as much as it does."""

    model: LanguageModel
    place: Place
    sae: SAE
    directions: Float[Tensor, "random d_in"]
    """Random directions of unit length."""
    thresholds: Float[Tensor, " random"]

    @classmethod
    def of(cls, model: LanguageModel, place: Place, sae: SAE, random: int, seed: int) -> "Watched":
        """Start with so many random directions, none of which fires yet."""
        drawn = torch.randn(random, sae.d_in, generator=torch_stream(seed, "random directions of patterns"))
        directions = torch.nn.functional.normalize(drawn, dim=1).to(model.device)
        return cls(model, place, sae, directions, torch.full((random,), torch.inf, device=model.device))

    @property
    def count(self) -> int:
        return self.sae.d_sae + len(self.directions)

    def above(self, thresholds: Float[Tensor, " random"]) -> "Watched":
        return replace(self, thresholds=thresholds)

    @torch.no_grad()
    def read(
        self, tokens: Tokens, mask: TokenMask
    ) -> tuple[Float[Tensor, "batch pos d_in"], Bool[Tensor, "batch pos"]]:
        """Run the clean pass as far as the SAE reads, and return what it reads and the mask of counted tokens."""
        read = self.model.clean(tokens, record=[self.place.reads]).activations[self.place.reads]
        return read, self.sae.within_limit(read, mask)

    def along(self, read: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows random"]:
        return read.float() @ self.directions.T

    @torch.no_grad()
    def values(self, read: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows watched"]:
        """Every latent, then every random direction's activation."""
        return torch.cat([self.sae.encode(read).dense().float(), self.random_values(self.along(read))], 1)

    def random_values(self, along: Float[Tensor, "*rows random"]) -> Float[Tensor, "*rows random"]:
        return torch.relu(along - self.thresholds)

    @torch.no_grad()
    def firings(
        self, read: Float[Tensor, "batch pos d_in"], mask: TokenMask, numbers: Int64[Tensor, " batch"]
    ) -> Firings:
        """
        Raises:
            DataError: a latent is NaN, infinite or negative.
        """
        own = Firings.of(self.sae.encode(read), mask, numbers, self.sae.d_sae)
        return self.with_random(own, self.along(read), mask)

    def with_random(self, own: Firings, along: Float[Tensor, "batch pos random"], mask: TokenMask) -> Firings:
        """The SAE's firings, and after them those of the random directions."""
        other = Firings.of(DenseLatents(self.random_values(along)), mask, own.numbers, len(self.directions))
        rows, values = torch.cat([own.rows, other.rows]), torch.cat([own.values, other.values])
        features = torch.cat([own.features, other.features + self.sae.d_sae])
        return Firings(rows, features, values, own.numbers, own.context, self.count)
