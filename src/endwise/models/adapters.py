"""Adapters (LoRA and its like): small weights beside a model's own, with which it is another model of the same name."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from endwise.common.errors import ModelError

MERGING = (
    "PeftModel.from_pretrained(base, adapter).merge_and_unload(){}. (Prompts and prefixes cannot be merged, and "
    "endwise takes no model with them.)"
)
"""Advice on merging an adapter into a model's own weights; what is done with it follows."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PACKAGES = ("peft", "adapters")
"""Packages whose modules change what the modules compute that they stand in for."""


def refuse_adapted(model: nn.Module, name: str) -> None:
    """Look for modules of packages of adapters, whichever way they came into the model and whether they are on or off.

    Raises:
        ModelError: it holds one: what it computes depends on what is switched on at the time.
    """
    for place, module in model.named_modules():
        kind = type(module)
        if any(base.__module__.partition(".")[0] in PACKAGES for base in kind.__mro__):
            at = f" at {place}" if place else ""
            raise ModelError(
                f"{name} holds an adapter that is not merged ({kind.__module__}.{kind.__name__}{at}); with and without "
                "it, the model differs. For the model alone, load it again; for both, give what merging them "
                f"returns: {MERGING.format('')}"
            )


@dataclass(frozen=True)
class Adapter:
    """Small weights that stand beside those of a base model, in a folder of their own."""

    name: str
    base: str
    """Name of the model that it is based on."""
    revision: str | None
    """Revision of the base on the hub."""
    folder: Path

    def merged(self, model: Any, tokenizer: Any | None) -> Any:
        """The base model with the adapter in its weights.

        Args:
            model: the base.
            tokenizer: the adapter's own; where it has more tokens than the base has embeddings, these are added first.

        Raises:
            ModelError: peft is not installed, or it cannot be merged, or not all of it belongs to this base.
        """
        try:
            from peft import PeftModel, get_peft_model_state_dict  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ModelError(
                f'{self.name} is an adapter of {self.base!r:.100}, which peft merges: pip install "endwise[peft]". Or '
                f"give the merged model: {MERGING.format('.save_pretrained(FOLDER)')}"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # their subject is checked below
                if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                adapted = PeftModel.from_pretrained(model, str(self.folder))
                with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
                    apart = sorted({*file.keys()} ^ get_peft_model_state_dict(adapted).keys())
                merged = None if apart else adapted.merge_and_unload(safe_merge=True)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise self._not_merged(reason) from error
        if merged is None:
            raise self._not_merged(f"they do not agree in {len(apart)} tensors ({', '.join(apart[:2])})")
        return merged

    def _not_merged(self, why: str) -> ModelError:
        return ModelError(
            f"The adapter {self.name} cannot be merged into {self.base}: {why}. Name the base that it was trained on "
            "in its adapter_config.json, or give the merged model. (Prompts and prefixes cannot be merged.)"
        )
