"""Displays of a dictionary, in a line and in a notebook."""

from typing import Any, ClassVar

from torch import Tensor

from endwise.common.showing import card


class ShownDictionary:
    """Words on a dictionary for a reader."""

    architecture: ClassVar[str]
    d_in: int
    d_sae: int
    d_out: int
    b_dec: Any
    norm_limit: Tensor | None

    def section(self) -> dict[str, Any]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say what `repr` shows of it."""
        return ", ".join(f"{name} {fact}" for name, fact in self.shown_facts().items())

    def shown_facts(self) -> dict[str, object]:
        """Return what a reader wants to know of it first, by names."""
        width = f"{self.d_in:,}" if self.d_out == self.d_in else f"{self.d_in:,} to {self.d_out:,}"
        facts: dict[str, object] = {"architecture": self.architecture, "features": f"{self.d_sae:,}", "width": width}
        normalize = self.section().get("normalize", "none")
        facts |= {} if normalize == "none" else {"input norm": normalize}
        return facts | ({} if self.norm_limit is None else {"leaves out norms above": f"{float(self.norm_limit):.4g}"})

    def _repr_html_(self) -> str:
        return card(type(self).__name__, {**self.shown_facts(), "on": f"{self.b_dec.device}, {self.b_dec.dtype}"})
