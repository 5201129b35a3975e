"""Display of a language model, in a line and in a notebook."""

from typing import Any

from endwise.common.showing import Shown


class ShownModel(Shown):
    """A language model, by its name and sizes."""

    def shown_facts(self: Any) -> dict[str, object]:
        sizes = {"blocks": self.n_layers, "width": f"{self.d_model:,}", "vocabulary": f"{self.vocab_size:,}"}
        stored = str(self.dtype).removeprefix("torch.")
        return {"": f"{self.name}, {type(self.model).__name__}", **sizes, "in": stored, "on": self.device}
