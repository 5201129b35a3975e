"""What an SAE is trained for: a sum of weighted terms, each a small object that says what it needs.

Every term is a sum over tokens of one number per token; the objective divides by the number of tokens that count. So a
batch can be cut into microbatches, and masked positions drop out, without any term knowing about either.

Two kinds of term: those that read the *spliced* pass (KL, downstream MSE) and those that need the site alone (local
MSE, sparsity). The second kind never causes a spliced pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ConfigError
from endwise.config.run import ObjectiveConfig
from endwise.dictionaries import Latents
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Site
from endwise.models.splicing import Scalar, later_residuals, squared_error


class Term(ABC):
    """A named, weighted part of an objective."""

    name: ClassVar[str]
    unit: ClassVar[str]
    coefficient: float


class SplicedTerm(Term):
    """A term that compares the spliced pass with the clean one."""

    sites: tuple[Site, ...] = ()
    """Later sites whose activations it reads, in both passes."""
    final: bool = False
    """Whether it reads the final hidden states."""

    @abstractmethod
    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        """Unweighted sum over the mask's tokens."""


class SiteTerm(Term):
    """A term that reads the SAE's input, output and latents, and nothing of the model."""

    @abstractmethod
    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        """Unweighted sum over the mask's tokens."""


@dataclass(frozen=True)
class KL(SplicedTerm):
    """KL(original ‖ spliced) of the next-token distributions (paper eq. 4; direction as in the reference's code)."""

    name = "kl"
    unit = "nats per token"
    final = True
    coefficient: float

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        if clean.final is None or spliced.final is None:
            raise ValueError("the KL term needs the final hidden state of both passes")
        return readout.kl(clean.final, spliced.final, mask)


@dataclass(frozen=True)
class DownstreamMSE(SplicedTerm):
    """Squared error of later activations, spliced against clean: mean over dims, mean over sites (paper eq. 5).

    The coefficient is the total β, shared equally among the sites. The paper writes squared L2 norms (larger by a
    factor d_model) and divides by L − l; the reference's code, followed here, takes means and counts its sites.
    """

    name = "downstream_mse"
    unit = "activation² per token and dimension"
    coefficient: float
    sites: tuple[Site, ...]

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        errors = [squared_error(spliced.activations[site], clean.activations[site], mask) for site in self.sites]
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class LocalMSE(SiteTerm):
    """Squared error of the reconstruction at the site, mean over dims (paper eq. 3)."""

    name = "local_mse"
    unit = "activation² per token and dimension"
    coefficient: float

    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        return squared_error(reconstruction, activation, mask)


@dataclass(frozen=True)
class Sparsity(SiteTerm):
    """Σ over features of |c|^p, divided by d_model (paper: p = 1, where the reference code's norm is the same)."""

    name = "sparsity"
    unit = "latent^p per token and dimension"
    coefficient: float
    p: float = 1.0

    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        return latents.penalty(self.p, mask).sum() / activation.shape[-1]


@dataclass(frozen=True)
class Objective:
    """The weighted sum of terms that one SAE is trained for."""

    spliced_terms: tuple[SplicedTerm, ...] = ()
    site_terms: tuple[SiteTerm, ...] = ()
    sites: tuple[Site, ...] = field(init=False)
    """Later sites that must be recorded in both passes."""
    final: bool = field(init=False)
    """Whether the final hidden state must be recorded."""

    def __post_init__(self) -> None:
        sites = {site for term in self.spliced_terms for site in term.sites}
        object.__setattr__(self, "sites", tuple(sorted(sites)))
        object.__setattr__(self, "final", any(term.final for term in self.spliced_terms))

    @property
    def terms(self) -> Sequence[Term]:
        return (*self.spliced_terms, *self.site_terms)


def build_objective(config: ObjectiveConfig, model: LanguageModel, site: Site) -> Objective:
    """The terms that a recipe names; a term of weight 0 is left out.

    Raises:
        ConfigError: a downstream site does not come after the site, or there is none.
        SiteError: a downstream site does not exist in the model.
    """
    weights = config.weights
    spliced: list[SplicedTerm] = []
    at_site: list[SiteTerm] = []
    if weights["kl"]:
        spliced.append(KL(weights["kl"]))
    if weights["downstream_mse"]:
        spliced.append(DownstreamMSE(weights["downstream_mse"], downstream_sites(config, model, site)))
    if weights["local_mse"]:
        at_site.append(LocalMSE(weights["local_mse"]))
    at_site.append(Sparsity(config.sparsity.coefficient, config.sparsity.p))
    return Objective(tuple(spliced), tuple(at_site))


def downstream_sites(config: ObjectiveConfig, model: LanguageModel, site: Site) -> tuple[Site, ...]:
    if config.downstream_sites is None:
        sites = later_residuals(model, site)
    else:
        sites = tuple(model.readable(name) for name in config.downstream_sites)
    early = [later.name for later in sites if not site < later]
    if early or not sites:
        found = f"not later: {', '.join(early)}" if early else f"{site.name} has none"
        raise ConfigError(
            f"objective.downstream_sites must come after the SAE's own site {site.name} ({found}). "
            "Name later sites, or use kind e2e, which needs none."
        )
    return sites
