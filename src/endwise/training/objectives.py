"""Objective that an SAE is trained for: a sum of weighted terms, each a small object that says what it needs.

Every term is a sum over tokens of one number per token; the objective divides by the number of tokens that count. So a
batch can be cut into microbatches, and masked positions drop out, without any term knowing about either.

Two kinds of term: those that read the *spliced* pass (KL, downstream MSE) and those that need the site alone (local
MSE, sparsity). The second kind never causes a spliced pass. A further term is a class of either kind, added to `TERMS`
by its name, which a recipe then gives a weight under `objective.terms`; it is logged under that name.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ConfigError
from endwise.config.objective import TERMS, Balance, Horizon, ObjectiveConfig, TermConfig, WeightedTerm
from endwise.dictionaries import Latents
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.readout import Readout
from endwise.models.sites import Part, Site
from endwise.models.splicing import Scalar, later_residuals, squared_error
from endwise.training.error_scale import ErrorScale


class Term(ABC):
    """A named, weighted part of an objective."""

    name: ClassVar[str]
    """Name by which it is registered and logged."""
    unit: ClassVar[str]
    is_spliced: ClassVar[bool] = False
    """True if it reads the spliced pass."""
    Settings: ClassVar[type[TermConfig]] = TermConfig
    """Settings that a recipe can give."""
    scales: tuple[ErrorScale, ...] = ()
    """Sizes of activations that it divides by, to be measured before the first step."""
    coefficient: float

    @property
    def weight(self) -> float | Tensor:
        """Weight of the term in this step; a tensor where the device computes it."""
        return self.coefficient

    def at(self, step: int) -> "Term":
        """Return what the term is in the step after `step` others, where it draws something for each."""
        return self

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "Term":
        """Build the term of a recipe for an SAE at `site`.

        Args:
            settings: the fields of `Settings` but for the weight.
        """
        return cls(weight, **settings)  # type: ignore[pyrefly:bad-argument-count]  of a term's dataclass, not of `Term`


class SplicedTerm(Term):
    """A term that compares the spliced pass with the clean one, and says what of them must be recorded."""

    is_spliced = True
    sites: tuple[Site, ...] = ()
    """Later sites whose activations it reads, in both passes."""
    final: bool = False
    """True if it reads the final hidden states."""

    @property
    def predicted(self) -> float:
        """Share of the positions whose predictions it computes, in both passes."""
        return float(self.final)

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

    is_spliced = True

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
    coefficient: float  # pyrefly: ignore[bad-override]

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
    coefficient: float  # pyrefly: ignore[bad-override]
    sites: tuple[Site, ...]  # pyrefly: ignore[bad-override]
    scales: tuple[ErrorScale, ...] = ()  # pyrefly: ignore[bad-override]
    """One for each site, or none."""

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "DownstreamMSE":
        """
        Raises:
            ConfigError: a downstream site does not come after the site, or there is none, or it is past the horizon.
            SiteError: a downstream site does not exist in the model.
        """
        sites = downstream_sites(settings["sites"], settings.get("end"), model, site)
        return cls(weight, sites, scales_at(sites, settings, model))

    def total(self, readout: Readout, clean: Clean, spliced: Spliced, mask: TokenMask) -> Scalar:
        scales = self.scales or [None] * len(self.sites)
        errors = [
            squared_error(spliced.activations[site], clean.activations[site], mask, scale)
            for site, scale in zip(self.sites, scales, strict=True)
        ]
        return torch.stack(errors).mean()


@TERMS.add("local_mse")
@dataclass(frozen=True)
class LocalMSE(SiteTerm):
    """Squared error of the reconstruction at the site, mean over dims (paper eq. 3)."""

    name = "local_mse"
    unit = "activation² per token and dimension"
    coefficient: float  # pyrefly: ignore[bad-override]
    scales: tuple[ErrorScale, ...] = ()  # pyrefly: ignore[bad-override]
    """Scale of the site, or none."""

    @classmethod
    def build(cls, weight: float, settings: Mapping[str, Any], model: LanguageModel, site: Site) -> "LocalMSE":
        return cls(weight, scales_at((site,), settings, model))

    def total(self, activation: Activation, reconstruction: Activation, latents: Latents, mask: TokenMask) -> Scalar:
        return squared_error(reconstruction, activation, mask, *self.scales)


@TERMS.add("sparsity")
@dataclass(frozen=True)
class Sparsity(SiteTerm):
    """Σ over features of |c|^p, divided by d_model (paper: p = 1, where the reference code's norm is the same).

    A dictionary may have a penalty of another kind (`Latents.penalty`), or count |c|·‖d‖ where directions are free. All
    are divided by d_model as the MSE is, so that λ is that of papers whose MSE is a sum over dimensions.
    """

    name = "sparsity"
    unit = "latent^p per token and dimension"
    coefficient: float  # pyrefly: ignore[bad-override]
    p: float = 1.0
    warmup: float = 0.0
    p_end: float | None = None
    p_steps: float = 0.8
    p_changes: int = 10
    target_l0: float | None = None
    target_ce_increase: float | None = None
    """These six are followed by `training.sparsity`."""
    scale: Tensor | None = field(default=None, repr=False)
    """Factor that keeps the penalty as large as before p fell; logged with it."""
    steered: Tensor | None = field(default=None, repr=False)
    """λ in place of `coefficient`, where it follows a target."""

    @property
    def weight(self) -> float | Tensor:
        return self.coefficient if self.steered is None else self.steered

    @property
    def target(self) -> float | None:
        """Controller that λ follows, if any."""
        return self.target_l0 if self.target_ce_increase is None else self.target_ce_increase

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
    coefficient: float  # pyrefly: ignore[bad-override]

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
    local_scale: tuple[ErrorScale, ...] = ()
    """Scale of local errors, where these are relative."""
    sites: tuple[Site, ...] = field(init=False)
    """Later sites that must be recorded in both passes."""
    final: bool = field(init=False)
    """True if the final hidden state must be recorded."""

    def __post_init__(self) -> None:
        sites = {site for term in self.spliced_terms for site in term.sites}
        object.__setattr__(self, "sites", tuple(sorted(sites)))
        object.__setattr__(self, "final", any(term.final for term in self.spliced_terms))

    @classmethod
    def of(
        cls, terms: Iterable[Term], balance: Balance | None = None, local_scale: tuple[ErrorScale, ...] = ()
    ) -> "Objective":
        """Make the objective that is the sum of `terms`, which are added up in their order."""
        terms = tuple(terms)
        return cls(
            tuple(term for term in terms if isinstance(term, SplicedTerm)),
            tuple(term for term in terms if isinstance(term, SiteTerm)),
            tuple(term for term in terms if isinstance(term, PlacesTerm)),
            balance,
            local_scale,
        )

    def at(self, step: int) -> "Objective":
        """Return the objective of the step after `step` others (`Term.at`)."""
        terms = [term.at(step) for term in self.terms]
        same = all(new is old for new, old in zip(terms, self.terms, strict=True))
        return self if same else Objective.of(terms, self.balance, self.local_scale)

    @property
    def scales(self) -> list[ErrorScale]:
        """All that errors are divided by; several may be of one site."""
        return [*self.local_scale, *(scale for term in self.terms for scale in term.scales)]

    def local_error(self, reconstruction: Activation, target: Activation, mask: TokenMask) -> Scalar:
        """Return the sum over the mask's tokens of local errors, in the unit of the objective."""
        return squared_error(reconstruction, target, mask, *self.local_scale)

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
"""Terms that several places have in common when they are spliced jointly; each has its `SiteTerm`s besides."""


def build_objective(
    config: ObjectiveConfig,
    model: LanguageModel,
    site: Site,
    kinds: tuple[type[Term], ...] = OF_ONE,
    last: Site | None = None,
) -> Objective:
    """Build the terms that a recipe names; a term of weight 0 is left out.

    Args:
        site: where the spliced pass begins, and what local errors are of.
        kinds: of terms; the others are left out.
        last: the last site that is written in the pass, from which the horizon is counted; None: `site`.

    Raises:
        ConfigError: a downstream site does not come after the site, or there is none; a site is past the horizon; or a
            term needs several places.
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
    end = horizon_end(config.horizon, model, last or site)
    built = [TERMS[term.name].build(term.weight, {**term.settings, **_end(term, end)}, model, site) for term in asked]
    objective = Objective.of(built, config.balance, scales_at((site,), {"errors": config.errors}, model))
    if end is not None and (far := [each.name for each in objective.sites if end < each.stream]):
        raise ConfigError(
            f"{far[0]} lies past the horizon: of {(last or site).name}, horizon {config.horizon} ends at "
            f"{end.name}. Raise objective.horizon, or name a site before that."
        )
    return objective


def _end(term: WeightedTerm, end: Site | None) -> dict[str, Site | None]:
    return {"end": end} if term.name == DownstreamMSE.name else {}


def horizon_end(horizon: Horizon | None, model: LanguageModel, site: Site) -> Site | None:
    """Return the last site of passes that go `horizon` blocks past a site; None: they go to the predictions. A horizon
    beyond the last block ends with it, which is reported.
    """
    if horizon in (None, "all"):
        return None
    start = site.layer if site.part is Part.RESID_PRE else site.layer + 1
    end = start + int(horizon)
    if end > model.n_layers:
        warnings.warn(
            f"objective.horizon {horizon} goes past the last block of {model.name}; from {site.name} it ends after "
            f"{model.n_layers - start}.",
            stacklevel=2,
        )
        end = model.n_layers
    return Site(end, Part.RESID_PRE)


def downstream_sites(
    given: tuple[str, ...] | None, end: Site | None, model: LanguageModel, site: Site
) -> tuple[Site, ...]:
    """Find the later sites that are named, or those of the default, in the model.

    Args:
        end: where the horizon is; None: there is none.
    """
    if given is not None:
        sites = tuple(model.readable(name) for name in given)
    elif end is None:
        sites = later_residuals(model, site)
    else:
        after_last = model.readable(Site(model.n_layers - 1, Part.RESID_POST))
        streams = [each for each in (*later_residuals(model, site), after_last) if site.stream < each.stream]
        sites = tuple(each for each in streams if not end < each.stream)
    early = [later.name for later in sites if not site < later]
    if early or not sites:
        found = (
            f"not later: {', '.join(early)}" if early else "by default the input of every later block; there is none"
        )
        last = Site(model.n_layers - 1, Part.RESID_POST)
        named = f"objective.downstream_sites=[{last.name}], or " if site < last else ""
        raise ConfigError(
            f"objective.downstream_sites must come after the SAE's own site {site.name} ({found}). "
            f"Set {named}objective.kind=e2e, which needs none."
        )
    return sites


def scales_at(sites: Sequence[Site], settings: Mapping[str, Any], model: LanguageModel) -> tuple[ErrorScale, ...]:
    """Return what squared errors at the sites are divided by; none where they are absolute."""
    return tuple(ErrorScale(site, model.device) for site in sites) if settings.get("errors") == "relative" else ()
