"""Base of every sparse dictionary: its parts, its two maps, and its file."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from endwise.common.errors import ConfigError, FormatError
from endwise.common.files import expanded
from endwise.common.processes import ALONE, World
from endwise.config.dictionary import ARCHITECTURES, DictionaryConfig
from endwise.dictionaries.latents import Latents
from endwise.dictionaries.shown import ShownDictionary
from endwise.dictionaries.splitting import SplitDictionary
from endwise.formats import CENTRED, FORMATS, NATIVE, PROCESSING, Layout, Stored, stored_at


@contextmanager
def at_inference(saes: Iterable["SAE"]) -> Iterator[None]:
    """Context in which dictionaries in training are used as they will be after it."""
    training = [sae for sae in saes if sae.training]
    for sae in training:
        sae.eval()
    try:
        yield
    finally:
        for sae in training:
            sae.train()


def within_norm(
    x: Float[Tensor, "*rows width"], limit: Tensor | float | None, counted: Bool[Tensor, "*rows"]
) -> Bool[Tensor, "*rows"]:
    """Return the rows that count, less those whose L2 norm is above a limit; see `SAE.within_limit`."""
    return counted if limit is None else counted & ~(x.float().norm(dim=-1) > limit)


@dataclass(frozen=True)
class Exported:
    """A dictionary as it is saved: what computes its latents and reconstructions outside training."""

    tensors: Mapping[str, Tensor]
    """Tensors by SAELens's names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The architecture's own, by the names of its `layout`."""
    architecture: str | None = None
    """Architecture that computes this function outside training, where that is another architecture; None: this one."""


@dataclass(frozen=True)
class TrainingPass:
    """A pass over some of a step's rows, as an architecture's own terms see it."""

    x: Float[Tensor, "*rows d_in"]
    """Input that was encoded."""
    target: Float[Tensor, "*rows d_out"]
    """Activation that the reconstruction stands for: `x`, or of a transcoder the activation that it writes."""
    latents: Latents
    reconstruction: Float[Tensor, "*rows d_out"]
    counted: Bool[Tensor, "*rows"]
    dead: Bool[Tensor, " d_sae"]
    """Features that have fired on none of the latest training tokens (`SAE.dead_window`)."""
    gradient: Float[Tensor, "*rows d_out"] | None = None
    """Gradient of the objective's spliced terms, weighted, summed over tokens, at the reconstruction; None: of none."""
    at_site: Float[Tensor, "*rows d_out"] | None = None
    """Gradient of its terms at the site, likewise, for dictionaries that want it (`SAE.wants_gradient`)."""

    @property
    def gradients(self) -> Float[Tensor, "*rows d_out"]:
        """Gradient of all terms that read the reconstruction."""
        given = [each for each in (self.gradient, self.at_site) if each is not None]
        return torch.stack(given).sum(0) if given else torch.zeros_like(self.reconstruction)


@dataclass(frozen=True)
class TokenLosses:
    """Tokens of the latest training text, each with what it adds to the objective."""

    x: Float[Tensor, "tokens d_in"]
    target: Float[Tensor, "tokens d_out"]
    losses: Float[Tensor, " tokens"]
    """The objective's weighted terms of each token alone, those of a penalty included."""
    dead: Bool[Tensor, " d_sae"]
    generator: np.random.Generator
    """Generator for random draws: the same whenever the run comes to this step."""


class SAE(ShownDictionary, SplitDictionary, nn.Module, ABC):
    """A sparse autoencoder `x̂ = decode(encode(x))` of width `d_in` with `d_sae` features.

    A transcoder's result stands for the activation at another site, and may be of another width, `d_out`.
    `W_enc [d_in d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae d_out]`, `b_dec [d_out]` are the field's names for what the
    function uses; how an architecture stores them is its own matter. An architecture is one file: a subclass that
    `ARCHITECTURES.add` registers, with the section of its settings. Where training and inference differ,
    `self.training` says which; buffers are running statistics, which checkpoints keep.
    """

    architecture: ClassVar[str]
    """SAELens's name of the architecture."""
    Config: ClassVar[type[DictionaryConfig]] = DictionaryConfig
    """Section of a recipe."""
    layout: ClassVar[Layout] = Layout()
    """Tensors and settings that it keeps in a file."""
    two_widths: ClassVar[bool] = False
    """True if it can be of two widths; then `build` takes `d_out` besides."""
    first_tokens: int = 0
    """Tokens whose activations `see_first` wants before the first step of a training that starts."""
    last_tokens: int = 0
    """Tokens whose activations `see_last` wants after the last step."""
    dead_window: int | None = None
    """Training tokens without firing after which a feature counts as dead; None: `training.alive_window`, but at most a
    twentieth of all training tokens."""
    wants_gradient: ClassVar[bool] = False
    """True if its own terms read the gradient of the objective's terms at the site too (`TrainingPass.at_site`)."""
    sparse_below: float = 0.0
    """Largest share of active features for which `encode` gives sparse latents."""

    seed: int = 0
    """Seed of what is drawn in training."""
    counts: bool = True
    """True if what is encoded in training now is what a step splices, or trains on where nothing is spliced; if not
    (`aside`), nothing of it may enter running statistics."""
    world: World = ALONE
    """The processes that train it, over which an architecture that chooses among all tokens of a step agrees with the
    others as it encodes in training."""

    b_enc: nn.Parameter
    b_dec: nn.Parameter

    norm_limit: Float64[Tensor, ""] | None
    """L2 norm above which an input is left out of losses, k and metrics (`data.leave_out_norms`), in training and after
    it; None: none is. NaN until it was measured."""

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in if d_out is None else d_out
        self.register_buffer("norm_limit", None)

    @classmethod
    @abstractmethod
    def build(cls, config: Any, d_in: int, seed: int) -> "SAE":
        """The dictionary that training starts with.

        Args:
            config: of the type `Config`.
            d_in: width of the site.
            seed: of the first weights.
        """

    @property
    @abstractmethod
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]: ...

    @property
    @abstractmethod
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]: ...

    @abstractmethod
    def encode(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"] | None = None) -> Latents:
        """
        Args:
            counted: the rows that count, for architectures that choose among all rows of a batch; None: all do.
        """

    def leave_out_above(self, limit: float | None) -> None:
        """Set `norm_limit`."""
        device = self.b_enc.device
        self.norm_limit = None if limit is None else torch.tensor(limit, dtype=torch.float64, device=device)

    def within_limit(self, x: Float[Tensor, "*rows d_in"], counted: Bool[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Return the rows that count, less those whose norm is above `norm_limit`. A norm that is NaN is above none, so
        that the caller meets and reports it.
        """
        return within_norm(x, self.norm_limit, counted)

    @abstractmethod
    def decode(self, latents: Latents | Tensor) -> Float[Tensor, "*rows d_out"]:
        """Sum the features' directions, each times its latent (`encode`'s or a tensor `[*rows d_sae]`)."""

    def reconstruct(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return x̂: what is decoded, and whatever the architecture makes of the input beside its features.

        Args:
            latents: of `x`, or what an analysis has made of them.
        """
        return self.decode(latents)

    def row_scale(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"] | None:
        """Return the factor, of each row, by which `W_dec` times a latent is multiplied in the reconstruction of `x`;
        None: it is 1.
        """
        return None

    def nested(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Sequence[Float[Tensor, "*rows d_out"]]:
        """Return the reconstructions over which terms at the site are averaged in training, the last of which is the
        whole one; empty: that one alone.
        """
        return ()

    def spliced(self, latents: Latents, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return what spliced terms see in training: x̂, or what stands for several reconstructions at once."""
        return self.reconstruct(latents, x)

    def join(self, world: World) -> None:
        """Agree from now on with the other processes of a training (`world`)."""
        self.world = world

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context in which encoding is apart from what the step splices, and enters no running statistics."""
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before

    @property
    def sums_as_it_learns(self) -> bool:
        """True if it adds up sums over the processes while it learns from a pass: all of them must come that far."""
        return False

    def begin_step(self, done: float) -> None:
        """Prepare a training step: move what is annealed.

        Args:
            done: share of the steps that are done, from 0 to below 1.
        """

    @property
    def auxiliary_weights(self) -> Mapping[str, float]:
        """Weight of each term that this architecture adds to any objective, by name."""
        return {}

    def auxiliary(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        """Each term of `auxiliary_weights`, unweighted: a sum over the rows that count."""
        return {}

    @property
    def own_weights(self) -> Mapping[str, float]:
        """Weight of every term that training adds to the objective: those of `auxiliary_weights`, and of the options
        that a family of architectures has in common.
        """
        return self.auxiliary_weights

    def own_terms(self, seen: TrainingPass) -> Mapping[str, Float[Tensor, ""]]:
        """Each term of `own_weights`, as `auxiliary` gives its."""
        return self.auxiliary(seen)

    def see_first(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        """Fit what is fitted before training to `first_tokens` activations of training text: an input's scale or
        whitening, the first `b_dec`.
        """

    def wants_losses(self, steps: int) -> Mapping[int, int]:
        """Return how many tokens `see_losses` wants, by how many of `steps` steps are done when it does."""
        return {}

    def see_losses(self, seen: TokenLosses) -> Int64[Tensor, " features"]:
        """Replace features by others that the losses ask for, and return which."""
        return torch.zeros(0, dtype=torch.int64)

    def per_feature(self) -> Sequence[nn.Parameter]:
        """Parameters whose first axis is that of the features."""
        return ()

    def raise_bar(self, by: float) -> None:
        """Raise by one amount what each feature's pre-activation must exceed for it to be active, by parameters of one
        axis alone; an architecture that does not say how stays as it is.
        """

    def see_last(self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"]) -> None:
        """Fit what is fitted after training to `last_tokens` activations of the latest training text: thresholds."""

    def step_statistics(self) -> Sequence[Tensor]:
        """Return what this process's share of a step adds to the running statistics: tensors that are summed over all
        processes in place, before `after_step`.
        """
        return ()

    def after_step(self) -> None:
        """Follow an optimiser step: renew norms, thresholds, running statistics. A step that was not finite, and so
        changed no weight, comes here too.
        """

    def section(self) -> dict[str, Any]:
        """Return the `dictionary` of a recipe whose `init_from` takes it over as the same function."""
        return {"architecture": self.architecture, "size": self.d_sae}

    def to_train(self, config: DictionaryConfig) -> "SAE":
        """The same function, in the form that training starts from.

        Raises:
            ConfigError: this architecture cannot be trained, or not as the settings say.
        """
        raise ConfigError(f"endwise cannot train a {self.architecture} SAE further.")

    @classmethod
    def continuing(cls, sae: "SAE", config: DictionaryConfig) -> "SAE":
        """Make of a finished dictionary, of this architecture or of one that it can take over, what trains on.

        Raises:
            ConfigError: it can be none of this architecture.
        """
        if sae.architecture != cls.architecture:
            raise ConfigError(
                f"a {sae.architecture} SAE cannot be trained on as {cls.architecture}. "
                f"Set dictionary.architecture={sae.architecture}."
            )
        return sae.to_train(config)

    def export(self) -> Exported:
        """Return what computes its latents and reconstructions outside training."""
        return Exported({name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")})

    @classmethod
    def kept(cls) -> Layout:
        """Return `layout`, with what all architectures of its base may keep in a file."""
        return replace(cls.layout, transcodes=cls.two_widths)

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> "SAE":
        """The dictionary that a file describes, as a function unchanged.

        Args:
            tensors: by SAELens's names, in float32; nothing is subtracted from what is encoded.
            cfg: `d_in`, `d_sae`, and the settings of `layout`.
        """

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.reconstruct(self.encode(x), x)

    def save(self, folder: Path | str, metadata: Mapping[str, Any] | None = None, *, format_name: str = NATIVE) -> None:
        """Write it as it is used, by default in SAELens's layout, which opens in SAELens as it is.

        Args:
            folder: where to; in a format of one file, that file.
            metadata: what says nothing of the function, for readers.
            format_name: one of `formats.FORMATS`.
        """
        exported, about = self.export(), dict(metadata or {})
        if self.norm_limit is not None and not self.norm_limit.isnan():
            about["endwise"] = {**_section(about, "endwise"), "norm_limit": float(self.norm_limit)}
        of_two = {"d_out": self.d_out} if self.d_out != self.d_in else {}
        config = {"d_in": self.d_in, "d_sae": self.d_sae, **of_two, **exported.settings}
        if config.get("normalize") == CENTRED:  # which is of the model that it belongs to, not of the file
            del config["normalize"]
            about[PROCESSING] = {**_section(about, PROCESSING), "center_writing_weights": True}
            about["endwise"] = {**_section(about, "endwise"), CENTRED: True}
        stored = Stored(exported.architecture or self.architecture, config, exported.tensors, about)
        FORMATS[format_name].write(expanded(folder), stored)

    @staticmethod
    def load(folder: Path | str, device: str | torch.device = "cpu") -> "SAE":
        """Read an SAE in any format that is known (`formats.FORMATS`).

        Args:
            folder: a folder, which may be a run's, or a file; `hf://owner/name[@revision]/path` of the Hugging Face
                hub; or `release/sae_id` of SAELens's registry.

        Raises:
            FormatError: there is none, it is not what its format says, or what it says of the function is none of ours.
            HubError: the hub does not have it, or does not give it.
        """
        return SAE.of(stored_at(expanded(folder), SAE.layouts()), device)

    @staticmethod
    def layouts() -> dict[str, Layout]:
        """Return what each architecture may keep in a file, by its name."""
        return {name: ARCHITECTURES[name].kept() for name in ARCHITECTURES.names()}

    @staticmethod
    def of(stored: Stored, device: str | torch.device = "cpu") -> "SAE":
        """Return the dictionary that a file describes.

        Raises:
            FormatError: what it says of the function is none of ours.
        """
        architecture: type[SAE] = ARCHITECTURES[stored.architecture]
        sae = architecture.from_tensors(stored.under(False, architecture.layout.biases), stored.config)
        if stored.norm is not None:
            from endwise.dictionaries.normed import NormedSAE  # which is an SAE

            sae = NormedSAE(sae, stored.norm)
        sae.leave_out_above(_norm_limit(stored.metadata))
        return sae.to(device).requires_grad_(False).eval()


def _section(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of metadata; empty, where a file has something else there."""
    section = metadata.get(name)
    return section if isinstance(section, Mapping) else {}


def _norm_limit(metadata: Mapping[str, Any]) -> float | None:
    """Read `SAE.norm_limit` from a file's metadata."""
    limit = _section(metadata, "endwise").get("norm_limit")
    if limit is not None and not (isinstance(limit, float) and 0 < limit < math.inf):
        raise FormatError(
            f"metadata.endwise.norm_limit, the norm above which inputs are left out, is {limit!r:.40}, no number above "
            "0. Restore the file."
        )
    return limit
