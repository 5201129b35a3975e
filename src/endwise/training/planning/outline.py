"""A model without its weights: shapes to plan with."""

from functools import partial

import torch
from transformers import AutoConfig

from endwise.common.errors import ModelError
from endwise.config.run import ModelConfig
from endwise.models.gpt_neo_attention import use_sdpa
from endwise.models.language_model import LanguageModel
from endwise.models.loading import LOADING, based_on, explained, reader_of
from endwise.models.plain_weights import quantiser_of
from endwise.training.planning.memory_trace import MemoryTrace


def outline_model(settings: ModelConfig, dtype: torch.dtype, trace: MemoryTrace) -> LanguageModel:
    """The model that `load_model` would give, without its weights: its tensors have shapes and no values.

    Args:
        settings: a recipe's; its device is not looked at.
        trace: within which the model is made and can be run.

    Raises:
        ModelError: there is no such model, or it cannot be followed without values.
    """
    named = (settings.name, settings.gguf_file, settings.revision, settings.trust_remote_code)
    source, shared, _ = based_on(*named)  # an adapter's shapes are those of its base
    with LOADING:
        try:
            config = AutoConfig.from_pretrained(source, **shared)
            if (method := quantiser_of(config)) is not None:
                raise ModelError(
                    f"{settings.name} is quantised{method}: without its weights nothing is known of what a pass takes. "
                    "Plan with the checkpoint that it was made from, which takes more."
                )
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
