"""Running a model on its SAE's reconstructions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ModelError
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Part, Site

Scalar = Float[Tensor, ""]


@contextmanager
def spliced(model: LanguageModel, saes: Mapping[str | Site, Callable[[Tensor], Tensor]]) -> Iterator[LanguageModel]:
    """Within it, the Hugging Face model `model.model` computes, and generates, with reconstructions in place.

    Args:
        model: the model to run.
        saes: by site, an SAE or any function of the activation `[batch pos d_model]`. Several sites feed each other in
            the order of the model.

    Raises:
        SiteError: the model has no such site.
        ModelError: an SAE is not as wide as its site.
    """
    for site, sae in saes.items():
        width = getattr(sae, "d_in", model.width(site))
        if width != model.width(site):
            raise ModelError(
                f"{model.site(site).name} of {model.name} has width {model.width(site)}; "
                f"the SAE given for it has {width}."
            )
    with model.patched({model.site(site): sae for site, sae in saes.items()}):
        yield model


def squared_error(estimate: Activation, truth: Activation, mask: TokenMask) -> Scalar:
    """Σ over the mask's tokens of the mean over dims of the squared difference, in fp32 (float64 stays float64)."""
    difference = estimate - truth if estimate.dtype == torch.float64 else estimate.float() - truth.float()
    # Masked before it is squared: the gradient of a square that overflows would be 0 · ∞.
    return difference.where(mask[..., None], 0.0).square().mean(-1).sum()


def later_residuals(model: LanguageModel, site: Site) -> tuple[Site, ...]:
    """`hook_resid_pre` of every block after the site's own (the reference's downstream sites), less the one that is the
    site itself under its other name, `hook_resid_post` of the block before.
    """
    first = site.layer + 1 + (site.part is Part.RESID_POST)
    return tuple(model.readable(Site(layer, Part.RESID_PRE)) for layer in range(first, model.n_layers))
