"""Display of a language model, in a line and in a notebook."""

import torch
from transformers import PreTrainedModel

from endwise.common.showing import Shown


class ShownModel(Shown):
    """A language model, by its name and sizes."""

    name: str
    model: PreTrainedModel
    n_layers: int
    d_model: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def shown_facts(self) -> dict[str, object]:
        sizes = {"blocks": self.n_layers, "width": f"{self.d_model:,}", "vocabulary": f"{self.vocab_size:,}"}
        where = f"{self.dtype}".removeprefix("torch.")
        return {"": f"{self.name}, {type(self.model).__name__}", **sizes, "in": where, "on": self.device}
