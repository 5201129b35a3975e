"""A model without its weights: shapes to plan with."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from endwise.common.errors import ModelError
from endwise.common.files import at_home
from endwise.config.run import ModelConfig
from endwise.models.gpt_neo_attention import use_sdpa
from endwise.models.language_model import LanguageModel
from endwise.models.loading import LOADING, based_on, explained, load_model, reader_of
from endwise.models.plain_weights import quantiser_of
from endwise.models.quiet import quiet_transformers
from endwise.training.planning.memory_trace import MemoryTrace

MOST_RANDOM = 1 << 30
"""Parameters of a model that is made with random weights; drawing those of a larger one takes long, and much memory."""


def outline_model(settings: ModelConfig, dtype: torch.dtype, trace: AbstractContextManager[object]) -> LanguageModel:
    """The model that `load_model` would give, without its weights: its tensors have shapes and no values.

    Args:
        settings: a recipe's; its device is not looked at.
        trace: a `MemoryTrace`, within which the model is made and can be run; or none, for random weights.

    Raises:
        ModelError: there is no such model, or it cannot be followed without values.
    """
    with LOADING, _explaining(settings):
        return _outline(settings, _configuration(settings), dtype, trace)


def outlines(
    settings: ModelConfig, dtypes: tuple[torch.dtype, ...], part: str
) -> tuple[MemoryTrace, tuple[LanguageModel, ...]]:
    """Outline a model in several dtypes, in a trace that holds them, as this part, and nothing else. Those of the last
    model are kept as long as its configuration stays: phases, and recipes that are tried one after another, share it.

    Raises:
        ModelError: see `outline_model`.
    """
    with LOADING, _explaining(settings):
        config = _configuration(settings)
        known = type(config).__module__.startswith("transformers.")  # code of others may be another behind one name
        key = (settings, dtypes, part, config.to_json_string(use_diff=False), None if known else object())
        if key not in _LAST:
            trace = MemoryTrace()
            with trace.part(part):
                made = tuple(_outline(settings, copy.deepcopy(config), dtype, trace) for dtype in dtypes)
            _LAST.clear()
            _LAST[key] = trace, made
        trace, made = _LAST[key]
        return trace.copy(), made


_LAST: dict[tuple[object, ...], tuple[MemoryTrace, tuple[LanguageModel, ...]]] = {}


@contextmanager
def _explaining(settings: ModelConfig) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(explained(settings.name, error)) from error


def _configuration(settings: ModelConfig) -> Any:
    named = (settings.name, settings.gguf_file, settings.revision, settings.trust_remote_code)
    source, shared, _ = based_on(*named)  # an adapter's shapes are those of its base
    config = AutoConfig.from_pretrained(source, **shared)
    method = quantiser_of(config)
    method = method if settings.quantization is None else f" by {settings.quantization} (model.quantization)"
    if method is not None:
        raise ModelError(
            f"{settings.name} is quantised{method}: without its weights the memory of a pass is unknown. "
            "Plan with the checkpoint that it was made from, which takes more."
        )
    return config


def _outline(
    settings: ModelConfig, config: Any, dtype: torch.dtype, trace: AbstractContextManager[object]
) -> LanguageModel:
    code = settings.trust_remote_code
    make = partial(reader_of(config).from_config, config, dtype=dtype, trust_remote_code=code)
    with trace:
        try:
            model = make(attn_implementation=settings.attention or "sdpa")
        except ValueError as error:
            if settings.attention not in (None, "sdpa") or "scaled_dot_product_attention" not in str(error):
                raise
            model = make(attn_implementation="eager")
    if settings.attention in (None, "sdpa"):
        use_sdpa(model)
    with trace:
        return LanguageModel(model, None, settings.name)


@dataclass(frozen=True)
class Sites:
    """Sites of a model, by name and in the order of computation."""

    widths: dict[str, int]
    unspliceable: dict[str, str]
    """Sites that have a value but take no SAE, each with the reason."""


def sites_of(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Sites:
    """Find where an SAE can be spliced into a model; of a GGUF file, whose weights take long to unpack, with random
    ones, since which sites there are does not depend on them.

    Args:
        name, gguf_file, trust_remote_code: see `load_model`.

    Raises:
        ModelError: see `load_model`.
    """
    given = {"name": name, "gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    settings = ModelConfig.build(given, "the model")
    found = (
        _with_random_weights(settings) if "gguf_file" in based_on(at_home(name), gguf_file, None, False)[1] else None
    )
    found = found or load_model(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    widths = {site.name: found.width(site) for site in found.sites()}
    return Sites(widths, {site.name: why for site, why in sorted(found.unspliceable.items())})


def _with_random_weights(settings: ModelConfig) -> LanguageModel | None:
    """The model of a configuration; None: it is large, or no pass of it is finite."""
    try:
        with quiet_transformers():
            outline = outline_model(settings, torch.float32, MemoryTrace())
            if sum(each.numel() for each in outline.model.parameters()) <= MOST_RANDOM:
                return outline_model(settings, torch.float32, nullcontext())
    except ModelError:  # which reading the weights explains better
        pass
    return None
