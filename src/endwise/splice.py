"""Running a model on its SAE's reconstructions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from endwise.dictionaries import SAE
from endwise.errors import ModelError
from endwise.language_model import LanguageModel
from endwise.sites import Site


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
        if isinstance(sae, SAE) and sae.d_in != model.width(site):
            raise ModelError(
                f"{model.site(site).name} of {model.name} has width {model.width(site)}; "
                f"the SAE given for it has {sae.d_in}."
            )
    with model.patched({model.site(site): sae for site, sae in saes.items()}):
        yield model
