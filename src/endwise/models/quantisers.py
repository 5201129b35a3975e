"""Quantisers of transformers' that pack a model's weights in 8 or 4 bits as it is loaded."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
import transformers

from endwise.common.errors import ModelError
from endwise.common.extras import check_extra
from endwise.models.plain_weights import is_quantised, quantiser_of

Make = Callable[[torch.dtype], Any]
"""Of the dtype that is computed in, transformers' configuration of a quantiser."""

_nf4 = partial(transformers.BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
QUANTISERS: Mapping[str, tuple[str, Make]] = {
    "bitsandbytes-8bit": ("bitsandbytes", lambda _: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes-4bit": ("bitsandbytes", lambda dtype: _nf4(bnb_4bit_compute_dtype=dtype)),
    "torchao-8bit": (
        "torchao",
        lambda _: transformers.TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig()),
    ),
}
"""By name, the package that packs and computes, and what is asked of it. All leave the unembedding as it is."""


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
            "quantiser knows (torchao packs nn.Linear, which GPT-2 has not). Take a kind of bitsandbytes, or unset it."
        )
