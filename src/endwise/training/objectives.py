"""Objective that an SAE is trained for: a sum of weighted terms, each a small object that says what it needs.

Every term is a sum over tokens of one number per token; the objective divides by the number of tokens that count. So a
batch can be cut into microbatches, and masked positions drop out, without any term knowing about either.

Two kinds of term: those that read the *spliced* pass (KL, downstream MSE) and those that need the site alone (local
MSE, sparsity). The second kind never causes a spliced pass. A further term is a class of either kind, added to `TERMS`
by its name, which a recipe then gives a weight under `objective.terms`; it is logged under that name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ConfigError
from endwise.config.objective import TERMS, Balance, ObjectiveConfig, TermConfig
from endwise.dictionaries import Latents
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Site
from endwise.models.splicing import Scalar, later_residuals, squared_error


class Term(ABC):
    """A named, weighted part of an objective."""

    name: ClassVar[str]
    """Name by which it is registered and logged."""
    unit: ClassVar[str]
    Settings: ClassVar[type[TermConfig]] = TermConfig
    """Settings that a recipe can give."""
    coefficient: float

    @property
    def weight(self) -> float | Tensor:
        """Weight of the term in this step; a tensor where the device computes it."""
        return self.coefficient

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "Term":
        """Build the term of a recipe for an SAE at `site`.

        Args:
            settings: the fields of `Settings` but for the weight.
        """
        return cls(weight, **settings)  # pyright: ignore[reportCallIssue]  of a term's dataclass, not of `Term`


class SplicedTerm(Term):
    """A term that compares the spliced pass with the clean one, and says what of them must be recorded."""

    sites: tuple[Site, ...] = ()
    """Later sites whose activations it reads, in both passes."""
    final: bool = False
    """True if it reads the final hidden states."""

    @abstractmethod
    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        """Unweighted sum over the mask's tokens."""


class SiteTerm(Term):
    """A term that reads the SAE's output and latents, and the activation that the output stands for: at the SAE's site,
    or at the one that a transcoder writes.
    """

    @abstractmethod
    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        """Unweighted sum over the mask's tokens."""


class PlacesTerm(Term):
    """A term of several places that are spliced jointly: it compares the latents of the later ones with those that they
    have in the clean pass.
    """

    @abstractmethod
    def total(self, places: Sequence["LaterLatents"], mask: TokenMask) -> Scalar:
        """Unweighted sum over the mask's tokens."""


@dataclass(frozen=True)
class LaterLatents:
    """Latents of a dictionary whose input earlier reconstructions have changed."""

    clean: Latents
    """Latents of the model's own activation; no gradient enters them."""
    spliced: Latents
    d_in: int


@TERMS.add("kl")
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


@TERMS.add("downstream_mse")
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

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "DownstreamMSE":
        """
        Raises:
            ConfigError: a downstream site does not come after the site, or there is none.
            SiteError: a downstream site does not exist in the model.
        """
        return cls(weight, downstream_sites(settings["sites"], model, site))

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        errors = [squared_error(spliced.activations[site], clean.activations[site], mask) for site in self.sites]
        return torch.stack(errors).mean()


@TERMS.add("local_mse")
@dataclass(frozen=True)
class LocalMSE(SiteTerm):
    """Squared error of the reconstruction at the site, mean over dims (paper eq. 3)."""

    name = "local_mse"
    unit = "activation² per token and dimension"
    coefficient: float

    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        return squared_error(reconstruction, activation, mask)


@TERMS.add("sparsity")
@dataclass(frozen=True)
class Sparsity(SiteTerm):
    """Σ over features of |c|^p, divided by d_model (paper: p = 1, where the reference code's norm is the same).

    A dictionary may have a penalty of another kind (`Latents.penalty`), or count |c|·‖d‖ where directions are free. All
    are divided by d_model as the MSE is, so that λ is that of papers whose MSE is a sum over dimensions.
    """

    name = "sparsity"
    unit = "latent^p per token and dimension"
    coefficient: float
    p: float = 1.0
    warmup: float = 0.0
    p_end: float | None = None
    p_steps: float = 0.8
    p_changes: int = 10
    target_l0: float | None = None
    """These five are followed by `training.sparsity`."""
    scale: Tensor | None = None
    """Factor that keeps the penalty as large as before p fell; logged with it."""
    steered: Tensor | None = None
    """λ in place of `coefficient`, where it follows a target."""

    @property
    def weight(self) -> float | Tensor:
        return self.coefficient if self.steered is None else self.steered

    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        total = latents.penalty(self.p, mask).sum() / activation.shape[-1]
        return total if self.scale is None else total * self.scale.to(total.dtype)


@TERMS.add("feature_mse")
@dataclass(frozen=True)
class FeatureMSE(PlacesTerm):
    """Squared error of the later places' latents, spliced against clean: Σ over features of (c(x̃) − c(x))², divided by
    the width that is read, mean over the places that come after the first.

    x̃ is what the place reads with all earlier reconstructions in place, and c(x) is taken as given. The error of the
    next layer's features is what replacement-aware training adds (elloworld.net, January 2026), with the reconstruction
    of one layer in place; here all earlier ones are. The division by the width is that of `sparsity`.
    """

    name = "feature_mse"
    unit = "latent² per token and dimension"
    coefficient: float

    def total(self, places: Sequence[LaterLatents], mask: TokenMask) -> Scalar:
        errors = []
        for each in places:
            difference = (each.spliced.dense() - each.clean.dense()).where(mask[..., None], 0.0)
            errors.append(difference.square().sum() / each.d_in)
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class Objective:
    """The weighted sum of terms that one SAE is trained for."""

    spliced_terms: tuple[SplicedTerm, ...] = ()
    site_terms: tuple[SiteTerm, ...] = ()
    places_terms: tuple[PlacesTerm, ...] = ()
    balance: Balance | None = None
    """Way in which spliced terms are brought to one size (`training.tail_terms`)."""
    sites: tuple[Site, ...] = field(init=False)
    """Later sites that must be recorded in both passes."""
    final: bool = field(init=False)
    """True if the final hidden state must be recorded."""

    def __post_init__(self) -> None:
        sites = {site for term in self.spliced_terms for site in term.sites}
        object.__setattr__(self, "sites", tuple(sorted(sites)))
        object.__setattr__(self, "final", any(term.final for term in self.spliced_terms))

    @classmethod
    def of(cls, terms: Iterable[Term], balance: Balance | None = None) -> "Objective":
        """Make the objective that is the sum of `terms`, which are added up in their order."""
        terms = tuple(terms)
        return cls(
            tuple(term for term in terms if isinstance(term, SplicedTerm)),
            tuple(term for term in terms if isinstance(term, SiteTerm)),
            tuple(term for term in terms if isinstance(term, PlacesTerm)),
            balance,
        )

    @property
    def backward_passes(self) -> int:
        """Passes back through the tail that spliced terms take: one, or one for each that is balanced."""
        return len(self.spliced_terms) if self.balance else min(1, len(self.spliced_terms))

    @property
    def terms(self) -> Sequence[Term]:
        return (*self.spliced_terms, *self.places_terms, *self.site_terms)


OF_ONE: tuple[type[Term], ...] = (SplicedTerm, SiteTerm)
"""The terms of a dictionary that is spliced alone."""
OF_THE_PASS: tuple[type[Term], ...] = (SplicedTerm, PlacesTerm)
"""Those that several places have in common when they are spliced jointly; each has its `SiteTerm`s besides."""


def build_objective(
    config: ObjectiveConfig, model: LanguageModel, site: Site, kinds: tuple[type[Term], ...] = OF_ONE
) -> Objective:
    """Build the terms that a recipe names; a term of weight 0 is left out.

    Args:
        site: where the spliced pass begins.
        kinds: of terms; the others are left out.

    Raises:
        ConfigError: a downstream site does not come after the site, or there is none; or a term needs several places.
        SiteError: a downstream site does not exist in the model.
    """
    terms = config.weighted_terms
    needing = [term.name for term in terms if issubclass(TERMS[term.name], PlacesTerm)]
    if needing and kinds == OF_ONE:
        raise ConfigError(
            f"objective.terms.{needing[0]} compares latents at later places, but one place alone is spliced. Give a "
            "recipe with several `places` and `joint: true`, or leave the term out."
        )
    asked = [term for term in terms if issubclass(TERMS[term.name], kinds)]
    built = [TERMS[term.name].build(term.weight, term.settings, model, site) for term in asked]
    return Objective.of(built, config.balance)


def downstream_sites(given: tuple[str, ...] | None, model: LanguageModel, site: Site) -> tuple[Site, ...]:
    """Find the later sites that are named, or those of the default, in the model."""
    sites = later_residuals(model, site) if given is None else tuple(model.readable(name) for name in given)
    early = [later.name for later in sites if not site < later]
    if early or not sites:
        found = f"not later: {', '.join(early)}" if early else f"{site.name} has none"
        raise ConfigError(
            f"objective.downstream_sites must come after the SAE's own site {site.name} ({found}). "
            "Name later sites, or use kind e2e, which needs none."
        )
    return sites
