"""Common ground of all formats of an SAE's file: contents, detection, reading and writing.

A format is one file: a subclass of `Format` with a name, an instance of which `FORMATS.add` registers.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import there_is
from endwise.common.registry import Registry

TENSORS = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
"""The tensors that all architectures have, and their axes."""
SKIP = {"W_skip": ("d_out", "d_in")}
"""Tensors of a transcoder with a linear path beside its features."""

PROCESSING, FOLDED = "model_from_pretrained_kwargs", "fold_value_biases"
"""Key of an SAE's metadata for what TransformerLens does to the weights as it loads its model; a key within it."""
PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""Norms that depend on the token, by SAELens's names."""

CENTRED = "centred"
"""Norm of an SAE whose model had its writing weights centred by TransformerLens: a token's mean over the dimensions is
taken out, and put back."""
_CENTRED_AT = re.compile(r"blocks\.[0-9]+\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)")
_LAYER_NORMED = re.compile(r"gpt-?2|gpt-?neo|gpt-?j|pythia|tinystories|(^|/)opt-", re.IGNORECASE)
"""Models that TransformerLens centres: those whose residual stream is read behind layer norms alone, which take the
mean out in any case. It leaves others (RMSNorm) as they are, whatever was asked for."""


_B_ENC: Mapping[str, str | None] = {"b_enc": None}


@dataclass(frozen=True)
class Layout:
    """Tensors that one architecture keeps in a file; anything else in it is noticed."""

    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of its own, beside the four that all have; the axes of each are `d_in`, `d_sae` or `d_out`."""
    biases: Mapping[str, str | None] = field(default_factory=lambda: _B_ENC)
    """The biases that are added to what is encoded, each with the tensor, if any, whose exponential multiplies `W_enc`
    for it. Without `b_enc` among them, the architecture has none."""
    settings: frozenset[str] = frozenset()
    """Keys of its own in the file's configuration; with `d_out`, it may write another width than it reads."""
    rule: str = ""
    """The latents in symbols, of pre-activations z, with settings in braces; empty: the architecture's name."""
    norms: bool = False
    """True where it can stand behind a norm of each token, `normalize` of its configuration (`PER_TOKEN`)."""
    transcodes: bool = False
    """True where it can be a transcoder, with a `d_out`."""
    skip: bool = False
    """True where its transcoders can have a skip connection."""

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of an SAE with this configuration, by name."""
        sizes = {"d_out": config["d_in"], **config}
        shared = {name: its for name, its in TENSORS.items() if name != "b_enc" or name in self.biases}
        axes = {**shared, **self.tensors}
        return {name: tuple(sizes[axis] for axis in its) for name, its in axes.items()}

    def of_transcoder(self, skip: bool) -> "Layout":
        """Return what its transcoders keep, those with a skip connection where it has such."""
        tensors = {**self.tensors, **(SKIP if skip and self.skip else {})}
        return replace(self, norms=False, tensors=tensors, settings=self.settings | {"d_out"})


@dataclass(frozen=True)
class Stored:
    """An SAE as a file describes it, whatever the format."""

    architecture: str
    """SAELens's name."""
    config: Mapping[str, Any]
    """`d_in`, `d_sae`, and the architecture's own settings by the names of its `Layout`."""
    tensors: Mapping[str, Tensor]
    """`W_enc [d_in d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae d_out]`, `b_dec [d_out]`, and the architecture's own."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Entries that leave the function as it is: where the SAE belongs, and how it was trained."""
    subtracts_b_dec: bool = False
    """The file's rule: whether `b_dec` is subtracted from what is encoded."""

    @property
    def skips(self) -> bool:
        """True where a linear path runs beside the features."""
        return any(name in self.tensors for name in SKIP)

    @property
    def norm(self) -> str | None:
        """The norm of each token that it stands behind, of `PER_TOKEN` or `CENTRED`; None: it stands behind none."""
        if (own := self.config.get("normalize")) is not None:
            return own
        own, at = self.metadata.get("endwise"), self.metadata.get("hook_name")
        if isinstance(own, Mapping) and own.get(CENTRED) is True:
            return CENTRED
        known = _LAYER_NORMED.search(str(self.metadata.get("model_name"))) is not None and not self.transcodes
        return CENTRED if self.of_centred and known and _CENTRED_AT.fullmatch(str(at)) else None

    @property
    def of_centred(self) -> bool:
        """True where TransformerLens was asked to centre the weights of the model that it was trained on."""
        return self._processing.get("center_writing_weights") is True

    @property
    def lacks_value_biases(self) -> bool:
        """True where it reads heads' results without their value biases, which TransformerLens was asked to fold into
        what attention adds to the residual stream.
        """
        return self._of_heads and self._processing.get(FOLDED) is True

    @property
    def of_unknown_processing(self) -> bool:
        """True where TransformerLens may have changed what it reads, and that is not undone."""
        return self.of_centred and self.norm is None and not (self._of_heads and self._processing.get(FOLDED) is False)

    @property
    def _of_heads(self) -> bool:
        return str(self.metadata.get("hook_name")).endswith("attn.hook_z")

    @property
    def _processing(self) -> Mapping[str, Any]:
        """Changes to the model's weights that TransformerLens was asked to make."""
        given = self.metadata.get(PROCESSING)
        return given if isinstance(given, Mapping) else {}

    def with_value_bias(self, bias: Tensor, layout: Layout) -> "Stored":
        """Return what reads heads' results as they are, and gives them back so, by f(x − b) + b.

        Args:
            bias: b, `[d_in]`, which the heads' results of the model as it is have besides.

        Raises:
            FormatError: it is a transcoder, or stands behind a norm of each token.
        """
        if bool(bias.any()) and (self.transcodes or self.norm is not None):
            raise FormatError(
                "It reads heads' results of a model whose value biases were folded (fold_value_biases), and is a "
                "transcoder or stands behind a norm: endwise cannot give it the values that it was trained on."
            )
        whole = replace(self, metadata={**self.metadata, PROCESSING: {**self._processing, FOLDED: False}})
        if not bool(bias.any()):
            return whole
        tensors = self.under(True, layout.biases)
        return replace(whole, tensors={**tensors, "b_dec": tensors["b_dec"] + bias}, subtracts_b_dec=True)

    @property
    def transcodes(self) -> bool:
        """True where its result stands for another site than the one it reads, by its widths, tensors or metadata."""
        d_in, of = self.config["d_in"], self.metadata
        elsewhere = of.get("hook_name_out") not in (None, of.get("hook_name"))
        return self.skips or elsewhere or self.config.get("d_out", d_in) != d_in

    def rule(self, layout: Layout) -> str:
        """Return the function in symbols, by which it was read."""
        x = {None: "x", CENTRED: "(x − mean of x)"}.get(self.norm, f"{self.norm}(x)")
        z = f"({x} − b_dec)·W_enc" if self.subtracts_b_dec else f"{x}·W_enc"
        latents = layout.rule.format_map(self.config) or self.architecture
        bias = " + b_enc" if "b_enc" in layout.biases else ""
        undone = ", the norm undone" if self.norm is not None else ""
        return f"z = {z}{bias}; f = {latents}; output f·W_dec + b_dec{' + x·W_skipᵀ' if self.skips else ''}{undone}"

    def under(self, subtracts: bool, biases: Mapping[str, str | None] = _B_ENC) -> dict[str, Tensor]:
        """Return the tensors in float32, of the same function under a rule of what is encoded: x, or x − b_dec.

        (x − b_dec)·W_enc + b_enc = x·W_enc + (b_enc − b_dec·W_enc), so b_dec·W_enc is added to the biases.

        Args:
            subtracts: whether b_dec is subtracted.
            biases: see `Layout.biases`.
        """
        tensors = {name: tensor.detach().float() for name, tensor in self.tensors.items()}
        if subtracts == self.subtracts_b_dec:
            return tensors
        shift = tensors["b_dec"] @ tensors["W_enc"] * (1 if subtracts else -1)
        for bias, scale in biases.items():
            tensors[bias] = tensors[bias] + (shift if scale is None else shift * tensors[scale].exp())
        return tensors


class Format(ABC):
    """A way in which SAEs are kept in files."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Files of the folder that an SAE is, the weights first; none where it is a file by itself."""

    def detects(self, path: Path) -> bool:
        """Return whether an SAE in this format is at a path, all of it as far as can be seen without reading it."""
        return bool(self.files) and all(there_is(path / name) for name in self.files)

    @abstractmethod
    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        """Read an SAE.

        Args:
            layouts: of the architectures that can be used, by name.

        Raises:
            FormatError: the file is missing or not what the format says, or says something of the function that none of
                these architectures computes.
        """

    def write(self, path: Path, stored: Stored) -> None:
        """Write an SAE, so that whoever knows the format reads the same function; a format that is only read does not
        say how.

        Raises:
            FormatError: the format cannot say what this function is, or is only read.
            RunFolderError: the disk is full or the folder cannot be written.
        """
        raise FormatError(f"{self.name} can only be read. Write {NATIVE}, or another format of docs/formats.md.")

    @property
    def writes(self) -> bool:
        """True where SAEs are written in it."""
        return type(self).write is not Format.write

    def weights(self, path: Path) -> Path:
        """The file whose content tells the SAE's weights from others."""
        return path / self.files[0] if self.files else path

    @abstractmethod
    def metadata(self, path: Path) -> Mapping[str, Any]:
        """Read what `Stored.metadata` holds, without the tensors.

        Raises:
            FormatError: it cannot be read.
        """


FORMATS: Registry[Format] = Registry("formats", "endwise.formats")
"""Formats by name; the first one that detects a file reads it."""
NATIVE = "saelens"
"""The format that runs write."""
Kind = TypeVar("Kind", bound=type[Format])


def added(kind: Kind) -> Kind:
    """Decorate a format's class, so that an instance of it is known by its name."""
    FORMATS.add(kind.name)(kind())
    return kind


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], origin: str = "its configuration"
) -> None:
    """Refuse tensors that are missing, of another shape, or not finite.

    Args:
        origin: what says the shapes.

    Raises:
        FormatError: naming the first of them.
    """
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        found = "no such tensor" if tensor is None else tuple(tensor.shape)
        if tensor is None or found != shape:
            raise FormatError(f"{path}: {name} must have the shape {shape} of {origin}, found {found}.")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise FormatError(
                f"{path}: {name} must hold finite floating-point numbers, but it is "
                f"{tensor.dtype}{' with NaN or infinity' if tensor.is_floating_point() else ''}. "
                "Restore the file, or train the SAE again."
            )
