"""dictionary_learning's folder of one trainer: `ae.pt` and `config.json` (saprmarks, Karvonen).

`trainer.dict_class` of the configuration says which of seven classes it is, and so the names and the function:

    AutoEncoder, BatchTopKSAE, AutoEncoderTopK, GatedAutoEncoder, MatryoshkaBatchTopKSAE subtract b_dec from the input;
    AutoEncoderNew and JumpReluAutoEncoder do not.

BatchTopK and Matryoshka are used above their one threshold, TopK by its k largest, whatever threshold it holds. Of an
AutoEncoder the package's own loader moves the norms of directions into the latents, and so does this one.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import write_atomic, write_json
from endwise.common.tensor_files import laid_out
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import (
    TRANSPOSED,
    Named,
    assembled,
    config_at,
    known,
    meta,
    pickle_at,
    taken,
    unit_directions,
    whole,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "encoder.weight": "W_enc.T",
    "decoder.weight": "W_dec.T",
    "decoder_bias": "b_dec",
    "r_mag": "r_mag",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_THRESHOLD = {"threshold": "threshold"}


@dataclass(frozen=True)
class _Class:
    """One of the package's classes."""

    architecture: str
    """Name in endwise."""
    names: Named
    subtracts: bool
    """True where it subtracts b_dec."""
    left: tuple[str, ...] = ()
    """Tensors of a file that say nothing of the function."""


CLASSES = {
    "AutoEncoder": _Class("standard", {**_LINEAR, "bias": "b_dec"}, True),
    "AutoEncoderNew": _Class("standard", {**_LINEAR, "decoder.bias": "b_dec"}, False),
    "GatedAutoEncoder": _Class("gated", _GATED, True),
    "JumpReluAutoEncoder": _Class("jumprelu", {**_PLAIN, **_THRESHOLD}, False),
    "AutoEncoderTopK": _Class("topk", {**_LINEAR, "b_dec": "b_dec"}, True, ("k", "threshold")),
    "BatchTopKSAE": _Class("jumprelu", {**_LINEAR, "b_dec": "b_dec", **_THRESHOLD}, True, ("k",)),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", {**_PLAIN, **_THRESHOLD}, True, ("k", "group_sizes")),
}
_WRITTEN = {
    "standard": "AutoEncoderNew",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


@added
class DictionaryLearning(Format):
    """The folder of a trainer."""

    name = "dictionary_learning"
    files = (WEIGHTS_FILE, CONFIG_FILE)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, trainer = path / CONFIG_FILE, _trainer(path)
        kind = CLASSES[known(file, trainer, "dict_class", tuple(CLASSES))]
        weights, config = path / WEIGHTS_FILE, {"d_in": whole(file, trainer, "activation_dim")}
        config["d_sae"] = whole(file, trainer, "dict_size")
        found = pickle_at(weights)
        tensors = taken(weights, found, kind.names, kind.left)
        if kind.architecture == "topk":
            config["k"] = whole(file, trainer, "k", config["d_sae"])
            if isinstance(k := found.get("k"), Tensor) and (k.numel() != 1 or int(k) != config["k"]):
                raise FormatError(f"{weights} and {CONFIG_FILE} disagree in k: {k!r:.80}, {config['k']}. Correct one.")
        stored = assembled(
            *(weights, kind.architecture, tensors, layouts),
            config=config,
            metadata=self.metadata(path),
            subtracts_b_dec=kind.subtracts,
            origin=CONFIG_FILE,
        )
        norms = tensors["W_dec"].float().norm(dim=-1)
        if trainer["dict_class"] != "AutoEncoder" or torch.allclose(norms, torch.ones_like(norms)):
            return stored
        return replace(stored, tensors=unit_directions(tensors))

    def write(self, path: Path, stored: Stored) -> None:
        name = _WRITTEN.get(stored.architecture)
        if name is None or stored.transcodes or stored.norm is not None:
            what = "transcoder" if stored.transcodes else stored.architecture
            raise FormatError(
                f"dictionary_learning has {', '.join(_WRITTEN)} alone, which write what they read and have no norm of "
                f"each token, and no such {what:.80}. Write {path} in another format."
            )
        kind, own = CLASSES[name], {"b_gate": None, "b_mag": "r_mag"} if name == "GatedAutoEncoder" else {"b_enc": None}
        tensors = stored.under(kind.subtracts, own)
        written = {
            theirs: tensors[ours.removesuffix(TRANSPOSED)].mT if ours.endswith(TRANSPOSED) else tensors[ours]
            for theirs, ours in kind.names.items()
        }
        trainer: dict[str, Any] = {"dict_class": name, "activation_dim": stored.config["d_in"]}
        trainer["dict_size"] = stored.config["d_sae"]
        if name == "AutoEncoderTopK":
            trainer["k"] = stored.config["k"]
            written |= {"k": torch.tensor(stored.config["k"], dtype=torch.int), "threshold": torch.tensor(-1.0)}
        content = io.BytesIO()
        torch.save(laid_out(written), content)
        write_atomic(path / WEIGHTS_FILE, content.getvalue())
        site, block, layer = str(stored.metadata.get("hook_name", "")), "blocks.", None
        if site.startswith(block) and site.split(".")[1].isdecimal():
            layer = int(site.split(".")[1])
        about = meta(layer=layer, lm_name=stored.metadata.get("model_name"), submodule_name=site or None)
        buffer = meta(ctx_len=stored.metadata.get("context_size"))
        write_json(path / CONFIG_FILE, {"trainer": trainer | about, "buffer": buffer})

    def metadata(self, path: Path) -> Mapping[str, Any]:
        config, trainer = config_at(path / CONFIG_FILE), _trainer(path)
        buffer = config.get("buffer")
        layer, module = trainer.get("layer"), trainer.get("submodule_name")
        site = None
        if type(layer) is int and layer >= 0:
            site = f"blocks.{layer}.hook_resid_post" if module is None or str(module)[:10] == "resid_post" else None
        if isinstance(module, str) and module.startswith("blocks."):
            site = module
        return meta(
            hook_name=site,
            model_name=trainer.get("lm_name"),
            hf_hook_name=module,
            context_size=buffer.get("ctx_len") if isinstance(buffer, dict) else None,
            dict_class=trainer.get("dict_class"),
            stated_l0=float(k) if type(k := trainer.get("k")) is int and k > 0 else None,
        )


def _trainer(path: Path) -> dict[str, Any]:
    trainer = config_at(path / CONFIG_FILE).get("trainer")
    if not isinstance(trainer, dict):
        raise FormatError(f"{path / CONFIG_FILE} must have a section trainer, which says the dict_class. Restore it.")
    return trainer
