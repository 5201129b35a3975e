"""Weights that are no plain floats: packed by a quantiser, they mean nothing without its scales and its code.

endwise casts weights, reads the unembedding itself and copies models in bf16, all of which would drop the scales. A
model that a quantiser of transformers' runs is taken as it is: none of that is done to it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from endwise.common.errors import ModelError
from endwise.common.extras import check_extra
from endwise.models.sharding import shares

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STORED_PLAIN = ("F64", "F32", "BF16", "F16")
"""The same, as safetensors names them."""
PACKED = ("W_q", "SCB", "codes", "qzeros", "indices", "Qidxs")
"""Names of packed weights and scales that do not say so."""
PACKAGES = ("bitsandbytes", "optimum.quanto", "torchao", "compressed_tensors", "gptqmodel", "auto_gptq", "awq", "hqq")
"""Packages whose modules compute with weights that are none of the model's own."""
_REMEDY = (
    "endwise would cast the weights and lose their scales. Give the checkpoint that it was made from, or unpack it "
    "first, where its quantiser can: from_pretrained(...).dequantize().save_pretrained(FOLDER)."
)


def is_quantised(model: nn.Module) -> bool:
    """Return whether a quantiser of transformers' packed the model's weights, and computes with them."""
    return getattr(model, "hf_quantizer", None) is not None and next(_quantised_parts(model), None) is not None


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights in the layout that gradients go through. On a CPU with bf16 products a pass
    without gradients would pack them for inference, after which every layer's gradient is silently 0.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # it names its type in each layer of each pass


def refuse_quantised(model: nn.Module, name: str) -> None:
    """
    Raises:
        ModelError: the model says that it is quantised, or holds parameters or modules that are, without a quantiser of
            transformers' that knows how to compute with them; or its unembedding is quantised.
    """
    if is_quantised(model):
        get: Any = getattr(model, "get_output_embeddings", lambda: None)
        weight = getattr(get(), "weight", None)
        if isinstance(weight, torch.Tensor) and not _is_plain(weight):
            raise ModelError(
                f"{name}: its unembedding is quantised ({type(weight.data).__name__} of {weight.dtype}), and "
                "predictions are compared by it. Quantise the rest alone (llm_int8_skip_modules or "
                "modules_to_not_convert: [lm_head])."
            )
        return
    if (method := quantiser_of(getattr(model, "config", None))) is not None:
        raise ModelError(f"{name} is quantised{method}. {_REMEDY}")
    found = next(_quantised_parts(model), None)
    if getattr(model, "is_quantized", False) is True:
        found = f"{type(model).__name__}.is_quantized is true"
    if found is not None:
        raise ModelError(f"{name} is quantised: {found}. {_REMEDY}")


def refuse_copying(model: nn.Module, name: str) -> None:
    """
    Raises:
        ModelError: the model is quantised, and has no weights that bf16 could be made of; or it is sharded.
    """
    kind = "quantised" if is_quantised(model) else "sharded" if shares(model) > 1 else None
    if kind is not None:
        raise ModelError(
            f"{name} is {kind} and cannot be copied in bf16. For training.precision mixed load it with model.dtype "
            "bfloat16; or set training.precision to exact."
        )


def quantiser_of(config: Any) -> str | None:
    """Say by which quantiser a configuration of transformers' says that the weights are packed; None: by none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    for section in (config, text):
        for key in ("quantization_config", "compression_config"):
            found = getattr(section, key, None)
            if found is not None:
                kind = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
                method = f" by {getattr(kind, 'value', kind)!s:.40}" if kind else ""
                return f"{method} ({key} in its config.json)"
    return None


def refuse_packed_files(files: list[Path], name: str) -> None:
    """Look at the headers of the safetensors files that hold the model's weights.

    Whole numbers have their place beside weights (masks, positions), but no weight is made of them.

    Raises:
        ModelError: a weight is stored in a type that is no plain float.
        SafetensorError: a file is damaged.
    """
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - safetensors' own, and no mapping
                dtype = stored.get_slice(key).get_dtype()
                if dtype not in STORED_PLAIN and _is_weight(key):
                    raise ModelError(f"{name} is quantised: {file.name} stores {key} as {dtype}. {_REMEDY}")


def _is_weight(key: str) -> bool:
    """Recognise weights by the names that quantisers give: `weight`, `weight.absmax`, `weight._data._data`, `qweight`,
    `weight_packed`, `W_q`, `SCB`, `codes`, `experts.gate_up_proj_blocks`, ...
    """
    parts = key.split(".")
    last = parts[-2:]
    named = any("weight" in part or part.endswith(("_blocks", "_scales")) for part in last)
    return named or "weight" in parts or last[-1] in PACKED


def _is_plain(value: torch.Tensor) -> bool:
    return value.dtype in PLAIN and type(value.data).__module__.partition(".")[0] == "torch"


def _quantised_parts(model: nn.Module) -> Iterator[str]:
    """Parameters of another dtype, or of a class with arithmetic of its own (torchao, quanto); the
    packed buffers of GPTQ and AWQ; and modules of a quantiser's, PyTorch's own among them.
    """
    for name, value in model.named_parameters():
        if not _is_plain(value):
            of = f"of {value.dtype}" if value.dtype not in PLAIN else f"a {type(value.data).__name__}"
            yield f"{name} is {of}"
    for name, value in model.named_buffers():
        if value.dtype not in PLAIN and _is_weight(name):
            yield f"{name} is of {value.dtype}"
    for name, module in model.named_modules():
        kind = type(module)
        if ".quantized" in kind.__module__ or f"{kind.__module__}.".startswith(tuple(f"{each}." for each in PACKAGES)):
            yield f"{name} is a {kind.__module__}.{kind.__name__}"


Make = Callable[[torch.dtype], Any]
"""Builder of transformers' configuration of a quantiser, from the dtype that is computed in."""

_nf4 = partial(transformers.BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
QUANTISERS: Mapping[str, tuple[str, Make]] = {
    "bitsandbytes-8bit": ("bitsandbytes", lambda _: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes-4bit": ("bitsandbytes", lambda dtype: _nf4(bnb_4bit_compute_dtype=dtype)),
    "torchao-8bit": (
        "torchao",
        lambda _: transformers.TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig()),
    ),
}
"""Quantisers by name: the package that packs and computes, and its settings. All leave the unembedding as it is."""


def quantisation(kind: str, config: Any, dtype: torch.dtype, name: str) -> Any:
    """Return what transformers needs to pack the weights of a model with this configuration as it loads them.

    Raises:
        ConfigError: the package is not installed.
        ModelError: the weights are packed already.
    """
    package, make = QUANTISERS[kind]
    if (method := quantiser_of(config)) is not None:
        raise ModelError(f"{name} is quantised{method} already. Unset model.quantization, {kind}.")
    check_extra(package)
    return make(dtype)


def refuse_unpacked(model: Any, kind: str, name: str) -> None:
    """
    Raises:
        ModelError: the quantiser packed none of the weights.
    """
    if not is_quantised(model):
        raise ModelError(
            f"model.quantization is {kind}, but none of {name}'s weights were packed: it has no layers that this "
            "quantiser knows (torchao packs nn.Linear, which GPT-2 lacks). Take a kind of bitsandbytes, or unset it."
        )
