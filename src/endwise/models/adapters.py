"""Adapters (LoRA and its like): small weights beside a model's own, with which it is another model of the same name."""

from torch import nn

from endwise.common.errors import ModelError

MERGING = (
    "PeftModel.from_pretrained(base, adapter).merge_and_unload(){}. (One of prompts or prefixes cannot be merged, and "
    "endwise takes no model with it.)"
)
"""Advice on merging an adapter into a model's own weights; what is done with it follows."""
PACKAGES = ("peft", "adapters")
"""Packages whose modules change what the modules compute that they stand in for."""


def refuse_adapted(model: nn.Module, name: str) -> None:
    """Looks for modules of packages of adapters, whichever way they came into the model and whether they are on or off.

    Raises:
        ModelError: it holds one: what it computes depends on what is switched on at the time.
    """
    for place, module in model.named_modules():
        kind = type(module)
        if any(base.__module__.partition(".")[0] in PACKAGES for base in kind.__mro__):
            at = f" at {place}" if place else ""
            raise ModelError(
                f"{name} holds an adapter that is not merged ({kind.__module__}.{kind.__name__}{at}); with and without "
                "it, that is not the same model. For the model alone, load it again; for both, give what merging them "
                f"returns: {MERGING.format('')}"
            )
