"""Dictionaries of two matrices: their weights, first values, unit norms, skip connection, and file."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from endwise.common.errors import ConfigError
from endwise.common.seeds import torch_stream
from endwise.config.dictionary import DictionaryConfig
from endwise.dictionaries.base import SAE, Exported, TokenLosses, TrainingPass
from endwise.dictionaries.dead import AUX, DeadConfig, DeadFeatures
from endwise.dictionaries.latents import Latents, SparseLatents, decode_sparse, latents_of
from endwise.formats import Layout

NORM_FLOOR = 1e-12
"""Least norm, as in `torch.nn.functional.normalize`."""
FITTED_ON = 16_384
"""Tokens that the threshold of what is taken over is fitted to."""
FITTED_ROWS, FITTED_ELEMENTS = 512, 1 << 23
"""Rows and pre-activations at a time there."""
Initialisation = Literal["reference", "transposed"]


class LinearConfig(DeadConfig):
    """Settings of every dictionary of two matrices."""

    initialisation: Initialisation = "reference"
    """`reference`: encoder and biases uniform in ±1/√fan_in, decoder orthogonal (paper's code). `transposed`: decoder
    directions uniform on the sphere, encoder their transpose, biases 0 (Anthropic 2024, SAELens, sparsify)."""
    decoder_init_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm of each decoder row at the start, also of the raw rows under unit norm, whose relative step it sets; unset:
    as the initialisation leaves it, which is 1 for `transposed`."""
    encoder_scale: Annotated[float, Field(gt=0)] = 1.0
    """The encoder at the start is this times what `initialisation` says."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """`unit`: each decoder row is normalised where it is used. `free`: it is used as it is, and a penalty counts each
    latent times its row's norm (Anthropic 2024, with `initialisation: transposed` and `decoder_init_norm: 0.1`)."""
    normalize: Literal["none", "scalar", "layer_norm", "constant_norm_rescale", "centred", "whitening"] = "none"
    """Norm of what is read, undone at what is written: `scalar` brings the mean norm to √d, `whitening` makes all
    directions vary alike (both fitted to the first training text and saved as part of the weights); `layer_norm` and
    `constant_norm_rescale` divide each token by its own deviation or norm (kept in the file); `centred` takes out each
    token's mean, as of SAEs of TransformerLens's processed models."""
    skip: bool = False
    """A linear path `x·W_skipᵀ` beside the features, 0 at the start: for transcoders, and refused for SAEs."""


class LinearSAE(SAE):
    """`c = σ(W_eᵀ·x + b_e)`, `x̂ = c·D + b_d (+ x·W_skipᵀ)`, where a subclass says what σ is (`encode`).

    Both matrices are stored feature-major, `encoder [d_sae d_in]` and `decoder [d_sae d_out]`. Under unit norm,
    `decoder` is raw and each feature's direction is normalised where it is used, as in the reference code; a dictionary
    read from a file is used as it is.

    Args:
        initialisation: see `LinearConfig`; None: zeros, for weights that are filled in afterwards.
    """

    Config = LinearConfig
    two_widths = True

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        seed: int = 0,
        unit_norm: bool = True,
        skip: bool = False,
        initialisation: Initialisation | None = "reference",
        decoder_init_norm: float | None = None,
        encoder_scale: float = 1.0,
    ) -> None:
        super().__init__(d_in, d_sae, d_out)
        self.unit_norm = unit_norm
        self.dead: DeadFeatures | None = None
        """Means of training for dead features."""
        self.replaces: tuple[SAE, ...] = ()
        """Dictionary that it was made of, until its thresholds are fitted to that."""
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.decoder = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None
        if initialisation is not None:
            with torch.no_grad():
                _FIRST_WEIGHTS[initialisation](self, torch_stream(seed, "initialisation"))
                self.encoder.mul_(encoder_scale)
                if decoder_init_norm is not None:
                    self.decoder.copy_(normalize(self.decoder, dim=-1) * decoder_init_norm)

    @classmethod
    def build(cls, config: Any, d_in: int, seed: int, d_out: int | None = None) -> "LinearSAE":
        sae = cls(
            d_in,
            config.features(d_in),
            d_out,
            seed=seed,
            unit_norm=config.decoder_norm == "unit",
            skip=config.skip,
            initialisation=config.initialisation,
            decoder_init_norm=config.decoder_init_norm,
            encoder_scale=config.encoder_scale,
            **cls.own(config.model_dump()),
        )
        sae.dead = DeadFeatures(config)
        return sae

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Pick an architecture's own arguments out of a recipe's section, or of a file's settings."""
        return {}

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        return normalize(self.decoder, dim=-1) if self.unit_norm else self.decoder

    def directions(self, features: Int64[Tensor, " some"]) -> Float[Tensor, "some d_out"]:
        """Some rows of `W_dec`."""
        rows = self.decoder[features]
        return normalize(rows, dim=-1) if self.unit_norm else rows

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """L2 norm of each direction as it is used: a factor of latents whose size is to mean the same for all."""
        return torch.ones_like(self.b_enc) if self.unit_norm else self.decoder.norm(dim=-1)

    def before(
        self, x: Float[Tensor, "*rows d_in"], features: Int64[Tensor, " some"] | None = None
    ) -> Float[Tensor, "*rows features"]:
        """Pre-activations of some features; None: of all."""
        weight, bias = self.encoder, self.b_enc
        if features is not None:
            weight, bias = weight[features], bias[features]
        return linear(x.to(weight.dtype), weight, bias)

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """Values that a pre-activation must exceed for its feature to be active: 0 without thresholds of its own."""
        return torch.zeros_like(self.b_enc)

    def to_exceed(self, latents: Latents, features: Int64[Tensor, " some"]) -> Float[Tensor, "*rows_or_not some"]:
        """Return what pre-activations of some features must exceed in a pass to be active; no gradient enters it.

        Args:
            latents: of that pass.
        """
        return self.thresholds()[features]

    @torch.no_grad()
    def raise_bar(self, by: float) -> None:
        self.b_enc.sub_(by)

    def sums(self, latents: SparseLatents) -> Float[Tensor, "*rows d_out"]:
        """Sum the features' directions, each times its latent, without the bias."""
        norms = self.decoder.detach().norm(dim=-1).clamp_min(NORM_FLOOR) if self.unit_norm else None
        return decode_sparse(latents, self.decoder, norms=norms)

    def penalty_norms(self) -> Float[Tensor, " d_sae"] | None:
        """Norms by which a penalty multiplies latents, with their gradient; None: all are 1, or nothing is penalised.

        Directions of any norm, whose latents alone were penalised, would grow as these shrink (Anthropic, April 2024).
        """
        return self.decoder_norms() if self.training and not self.unit_norm else None

    def decode(self, latents: Latents | Tensor) -> Float[Tensor, "*rows d_out"]:
        return self.decode_by(latents_of(latents, self.d_sae), self.decoder, self.b_dec)

    def decode_by(
        self, latents: Latents, decoder: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "*rows d_out"]:
        """Variant of `decode` by the weights given, of which `decoder` is normalised where the dictionary's is."""
        if (sparse := latents.pairs()) is not None:
            norms = decoder.detach().norm(dim=-1).clamp_min(NORM_FLOOR) if self.unit_norm else None
            return decode_sparse(sparse, decoder, b_dec, norms)
        return linear(latents.dense(), (normalize(decoder, dim=-1) if self.unit_norm else decoder).T, b_dec)

    def reconstruct(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        decoded = self.decode(latents)
        return decoded if self.W_skip is None else decoded + linear(x.to(self.W_skip.dtype), self.W_skip)

    @property
    def dead_window(self) -> int | None:  # type: ignore[pyrefly:bad-override]  a recipe says it
        return self.dead.config.dead_window if self.dead else None

    @property
    def sums_as_it_learns(self) -> bool:
        return self.dead is not None and AUX in self.dead.weights

    @property
    def own_weights(self) -> Mapping[str, float]:
        return {**self.auxiliary_weights, **(self.dead.weights if self.dead else {})}

    def own_terms(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        return {**self.auxiliary(seen), **(self.dead.terms(self, seen) if self.dead else {})}

    def wants_losses(self, steps: int) -> Mapping[int, int]:
        return self.dead.wants_losses(steps) if self.dead else {}

    def see_losses(self, seen: TokenLosses) -> Int64[Tensor, " features"]:
        return self.dead.resample(self, seen) if self.dead else super().see_losses(seen)

    def per_feature(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name not in ("b_dec", "W_skip")]

    def unsplit(self) -> str | None:
        taken_over = "init_from is of another architecture" if self.replaces else None
        return super().unsplit() or (self.dead.unsplit() if self.dead else None) or taken_over

    def section(self) -> dict[str, Any]:
        return {**super().section(), **({} if self.W_skip is None else {"skip": True})}

    def to_train(self, config: DictionaryConfig) -> "LinearSAE":
        """The same function, in the form that training starts from: under unit norm, with directions that are
        normalised where they are used.

        A feature's latents are multiplied by the norm that its direction gives up (`rescale`), so that x̂ stays as it
        is, and a sparsity penalty counts them as it counts those of any SAE in training.
        """
        unit = getattr(config, "decoder_norm", "unit") == "unit"
        sae = deepcopy(self)
        with torch.no_grad():
            if unit and not sae.unit_norm:
                sae.rescale(sae.decoder_norms())
            elif not unit:
                sae.decoder.copy_(sae.W_dec)
        sae.unit_norm = unit
        sae.dead = DeadFeatures(config) if isinstance(config, DeadConfig) else None
        return sae.requires_grad_(True)

    @classmethod
    def continuing(cls, sae: SAE, config: DictionaryConfig) -> "LinearSAE":
        """Make of a finished dictionary of two matrices, of any architecture, what trains on as this one.

        Where features are active above thresholds, and this architecture has thresholds, it is the same function. Where
        they are not, as of the k largest, those thresholds are fitted by `see_first` at which as many are active on
        average as were. What a change of architecture costs is measured where training starts (`training.fitting`).
        """
        if sae.architecture == cls.architecture:
            taken = sae.to_train(config)
            assert isinstance(taken, LinearSAE)
            return taken
        if not isinstance(sae, LinearSAE):
            raise ConfigError(
                f"a {sae.architecture} SAE cannot be trained on as {cls.architecture}, since endwise does not know its "
                f"features as directions with a bias. Set dictionary.architecture={sae.architecture}."
            )
        ready = LinearSAE.to_train(sae, config)  # with its norms as the recipe has them
        weights = ready.as_thresholded()
        taken = cls(
            *(sae.d_in, sae.d_sae, sae.d_out),
            unit_norm=ready.unit_norm,
            skip=sae.W_skip is not None,
            initialisation=None,
            **cls.own(config.model_dump()),
        )
        none = torch.zeros_like(sae.b_enc)
        taken.fill(weights if weights is not None else {**ready.export().tensors, "threshold": none})
        taken = taken.to_train(config)
        if weights is None:
            taken.replaces, taken.first_tokens = (sae,), max(taken.first_tokens, FITTED_ON)
        return taken

    def as_thresholded(self) -> Mapping[str, Tensor] | None:
        """Return the weights of the same function as features `z·[z > θ]`, by SAELens's names; None: it is none."""
        tensors = self.export().tensors
        return tensors if "threshold" in tensors else None

    def take_threshold(self, threshold: float) -> None:
        """Make features active above one threshold for all, where the architecture has any; their encoder is that of
        features above 0.
        """

    @torch.no_grad()
    def see_first(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        """Choose the threshold of what was taken over from an architecture without one."""
        if self.replaces:
            before = self.replaces[0].to(x.device)
            active = sum(float(before.encode(rows).l0().sum()) for rows in x.split(FITTED_ROWS)) / len(x)
            self.take_threshold(self._threshold_for(x, active))
            self.replaces = ()

    def _threshold_for(self, x: Float[Tensor, "tokens d_in"], active: float) -> float:
        """Find the θ above which so many pre-activations are on average, or 0 if there are fewer positive ones."""
        count = round(active * len(x))
        largest = x.new_zeros(0)
        for rows in x.split(max(1, FITTED_ELEMENTS // self.d_sae)):
            z = self.before(rows).view(-1)
            largest = torch.cat([largest, z[z > 0]])
            largest = largest.topk(min(count + 1, len(largest))).values
        return float(largest[-1]) if len(largest) > count else 0.0

    @torch.no_grad()
    def refill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the weights of another function, by SAELens's names, with the norms that training has."""
        self.fill(tensors)
        if self.unit_norm:
            self.rescale(self.decoder.norm(dim=-1))

    def rescale(self, factors: Float[Tensor, " d_sae"]) -> None:
        """Multiply every feature's latents by a positive factor, and divide its direction by it."""
        self.encoder.mul_(factors[:, None])
        self.b_enc.mul_(factors)
        self.decoder.div_(factors.clamp_min(NORM_FLOOR)[:, None])

    def export(self) -> Exported:
        own = super().export().tensors
        return Exported({**own, "W_skip": self.W_skip} if self.W_skip is not None else own)

    @classmethod
    def kept(cls) -> Layout:
        return replace(super().kept(), skip=True, norms=True)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "LinearSAE":
        sae = cls(
            *(cfg["d_in"], cfg["d_sae"], cfg.get("d_out")),
            unit_norm=False,
            skip="W_skip" in tensors,
            initialisation=None,
            **cls.own(cfg),
        )
        sae.fill(tensors)
        return sae

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over weights by SAELens's names; an architecture adds its own."""
        self.encoder.copy_(tensors["W_enc"].T)
        self.decoder.copy_(tensors["W_dec"])
        for name in ("b_enc", "b_dec", "W_skip"):
            if name in tensors:
                getattr(self, name).copy_(tensors[name])


def _reference(sae: LinearSAE, generator: torch.Generator) -> None:
    """Encoder and biases as PyTorch's Linear has them; decoder orthogonal (orthonormal over `d_out`, so that a raw
    row's norm is about √(d_out/d_sae)).
    """

    def uniform(parameter: Tensor, fan_in: int) -> None:
        parameter.copy_((torch.rand(*parameter.shape, generator=generator) * 2 - 1) / fan_in**0.5)

    uniform(sae.encoder, sae.d_in)
    uniform(sae.b_enc, sae.d_in)
    nn.init.orthogonal_(sae.decoder, generator=generator)
    uniform(sae.b_dec, sae.d_sae)


def _transposed(sae: LinearSAE, generator: torch.Generator) -> None:
    sae.decoder.copy_(normalize(torch.randn(sae.decoder.shape, generator=generator), dim=-1))
    if sae.d_in == sae.d_out:
        sae.encoder.copy_(sae.decoder)
    else:  # there is no transpose of another width
        sae.encoder.copy_(normalize(torch.randn(sae.encoder.shape, generator=generator), dim=-1))


_FIRST_WEIGHTS = {"reference": _reference, "transposed": _transposed}
