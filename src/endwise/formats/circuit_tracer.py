"""circuit-tracer's set of transcoders: `config.yaml` for all layers, and a file of tensors for each.

A path names the file of one layer, `SET/layer_3.safetensors`. Latents are σ(x·W_encᵀ + b_enc) and the output is
latents·W_dec + b_dec (+ x·W_skipᵀ), with W_enc `[F d]`, W_dec `[F d]`, W_skip `[d d]`. The set's `activation` says what
σ is; where it says neither `relu` nor `topk`, a file with thresholds is of jumprelu, and another of relu.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import write_atomic
from endwise.common.tensor_files import write_tensors
from endwise.formats.base import Format, Layout, Stored, added
from endwise.formats.reading import assembled, safetensors_at, taken, whole, yaml_at

CONFIG_FILE, KIND = "config.yaml", "transcoder_set"
LAYER_FILE = re.compile(r"layer_([0-9]{1,6})\.safetensors")
THRESHOLD = "activation_function.threshold"
_NAMES = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_OWN = {"W_skip": "W_skip", THRESHOLD: "threshold"}
_PLACE = re.compile(r"blocks\.([0-9]+)\.(.+)")
_OURS = {"mlp.hook_in": "mlp_in", "mlp.hook_out": "hook_mlp_out"}
"""circuit-tracer's names of what the MLP receives and of what it adds, in a block; others are the same."""
_THEIRS = {"mlp_in": "mlp.hook_in"}
_NEGATIVE = (
    "circuit-tracer keeps the k largest pre-activations of a token even if some are negative, endwise only those above "
    "0: the two differ in tokens that have fewer than k positive ones."
)


@added
class CircuitTracer(Format):
    """One layer of a set. A set is written layer by layer, which must agree in size and activation."""

    name = "circuit-tracer"

    def detects(self, path: Path) -> bool:
        folder = path if path.is_dir() else path.parent
        try:
            files = path.iterdir() if path.is_dir() else (path,) if path.is_file() else ()
            if not any(LAYER_FILE.fullmatch(each.name) for each in files):  # a run folder's recipe has the same name
                return False
            return _config(folder).get("model_kind") == KIND
        except (FormatError, OSError):
            return False

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        if path.is_dir():
            layers = sorted(each.name for each in path.iterdir() if LAYER_FILE.fullmatch(each.name))
            raise FormatError(
                f"{path} is a set of transcoders, one for each layer. Give the file of one: {', '.join(layers[:5])}"
                f"{', ...' if len(layers) > 5 else ''} there."
            )
        config, found = _config(path.parent), safetensors_at(path)
        found.pop("k", None)
        architecture = _architecture(path, config, found)
        names = {**_NAMES, **{name: ours for name, ours in _OWN.items() if name in found}}
        tensors = taken(path, found, names)
        if "threshold" in tensors and (tensors["threshold"] < 0).any():
            raise FormatError(f"{path}: thresholds must be at least 0; below it, endwise has no latents.")
        own = {}
        if architecture == "topk":
            own["k"] = whole(path.parent / CONFIG_FILE, config, "k", len(tensors["b_enc"]))
            warnings.warn(f"{path}: {_NEGATIVE}", stacklevel=4)
        about = self.metadata(path)
        return assembled(path, architecture, tensors, layouts, config=own, metadata=about, transcodes=True)

    def write(self, path: Path, stored: Stored) -> None:
        """
        Raises:
            FormatError: the file is not called `layer_<number>.safetensors`, the set's other layers are of another
                kind, or circuit-tracer has no such transcoder.
        """
        config = _joint_config(path, stored)
        tensors = stored.under(False)
        tensors["W_enc"] = tensors["W_enc"].mT
        if "threshold" in tensors:
            tensors[THRESHOLD] = tensors.pop("threshold")
        write_tensors(path, tensors, {})
        write_atomic(path.parent / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())

    def metadata(self, path: Path) -> Mapping[str, Any]:
        if path.is_dir():
            return {}
        config, match = _config(path.parent), LAYER_FILE.fullmatch(path.name)
        layer = match[1] if match else ""
        hooks = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook"}
        given = {name: config.get(key) for name, key in hooks.items()}
        places = {
            name: f"blocks.{int(layer)}.{_OURS.get(hook, hook)}"
            for name, hook in given.items()
            if isinstance(hook, str)
        }
        return {**places, **({"model_name": config["model_name"]} if "model_name" in config else {})}


def _config(folder: Path) -> dict[str, Any]:
    return yaml_at(folder / CONFIG_FILE)


def _architecture(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    activation, thresholds = config.get("activation"), THRESHOLD in tensors
    if activation not in (None, "relu", "topk", "jumprelu", "jump_relu"):
        raise FormatError(f"{path.parent / CONFIG_FILE}: activation {activation!r:.80} is unknown to endwise.")
    if thresholds and activation in ("relu", "topk"):
        raise FormatError(f"{path} holds thresholds, while {CONFIG_FILE} says activation: {activation}. Correct one.")
    return {"topk": "topk", "relu": "standard"}.get(str(activation), "jumprelu" if thresholds else "standard")


def _joint_config(path: Path, stored: Stored) -> dict[str, Any]:
    """The set's configuration with this layer in it."""
    match = LAYER_FILE.fullmatch(path.name)
    activation = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}.get(stored.architecture)
    if match is None:
        raise FormatError(f"{path.name!r:.80}: a layer of circuit-tracer's is written to layer_<number>.safetensors.")
    if activation is None or stored.norm is not None:
        what = f"{stored.architecture}{' with a norm of each token' if stored.norm is not None else ''}"
        raise FormatError(f"circuit-tracer has transcoders of standard, topk and jumprelu alone, and no {what:.80}.")
    if stored.config.get("d_out", stored.config["d_in"]) != stored.config["d_in"]:
        raise FormatError("circuit-tracer's transcoders write as wide as they read; this one does not.")
    config = {"model_kind": KIND, "model_name": str(stored.metadata.get("model_name", "")), "activation": activation}
    for key, name in (("feature_input_hook", "hook_name"), ("feature_output_hook", "hook_name_out")):
        hook = stored.metadata.get(name, stored.metadata.get("hook_name"))
        place = _PLACE.fullmatch(str(hook))
        if place is None or int(place[1]) != int(match[1]):
            raise FormatError(f"metadata.{name} is {hook!r:.80}, not a place in block {int(match[1])} ({path.name}).")
        config[key] = _THEIRS.get(place[2], place[2])
    if activation == "topk":
        config["k"] = stored.config["k"]
        warnings.warn(_NEGATIVE, stacklevel=4)
    if (path.parent / CONFIG_FILE).exists():
        there = _config(path.parent)
        if apart := [key for key in config if there.get(key) != config[key]]:
            raise FormatError(
                f"{path.parent / CONFIG_FILE} is of another set, which differs in {', '.join(apart)}. Write to a "
                "folder of its own."
            )
        return there
    return config
