"""A model without its weights: shapes to plan with."""

from functools import partial

import torch
from transformers import AutoConfig

from endwise.common.errors import ModelError
from endwise.config.run import ModelConfig
from endwise.models.files import refuse_adapter
from endwise.models.gpt_neo_attention import use_sdpa
from endwise.models.language_model import LanguageModel
from endwise.models.loading import LOADING, arguments_for, explained, reader_of
from endwise.models.plain_weights import refuse_quantised_config
from endwise.training.planning.memory_trace import MemoryTrace


def outline_model(settings: ModelConfig, dtype: torch.dtype, trace: MemoryTrace) -> LanguageModel:
    """The model that `load_model` would give, without its weights: its tensors have shapes and no values.

    Args:
        settings: a recipe's; its device is not looked at.
        trace: within which the model is made and can be run.

    Raises:
        ModelError: there is no such model, or it cannot be followed without values.
    """
    source, shared = arguments_for(settings.name, settings.gguf_file, settings.revision, settings.trust_remote_code)
    with LOADING:
        try:
            refuse_adapter(source, settings.name, shared["revision"])
            config = AutoConfig.from_pretrained(source, **shared)
            refuse_quantised_config(config, settings.name)
            code = shared["trust_remote_code"]
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
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(explained(settings.name, error)) from error
