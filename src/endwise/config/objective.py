"""Objectives as a recipe says them: a list of named, weighted terms, of which the paper's kinds are
presets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from endwise.common.errors import ConfigError
from endwise.common.registry import Registry
from endwise.config.base import Config, Positive, SiteName

if TYPE_CHECKING:
    from endwise.training.objectives import Term

Kind = Literal["local", "e2e", "e2e_ds"]
KINDS: tuple[Kind, ...] = ("local", "e2e", "e2e_ds")
LABELS = {"local": "local", "e2e": "e2e", "e2e_ds": "e2e+ds"}
"""The paper's kinds as it writes them, in the order of every table and legend."""
PRESETS: dict[str, dict[str, float]] = {"local": {"local_mse": 1.0}, "e2e": {"kl": 1.0}, "e2e_ds": {"kl": 0.5}}
"""Presets by the paper's kinds: the weights of reconstruction terms that it sets. The others are 0, but for β of
e2e_ds, which is required.
"""
PRESET_TERMS: dict[str, set[str]] = {"local": {"local_mse"}, "e2e": {"kl"}, "e2e_ds": {"kl", "downstream_mse"}}
"""Reconstruction terms by the paper's kinds."""
FURTHER_PRESETS: dict[str, dict[str, Any]] = {
    "horizon": {"horizon": 1, "downstream_mse": 1.0, "errors": "relative"},
    "finetune": {"kl": 0.5, "local_mse": 0.5, "balance": "loss"},
}
"""Presets by further kinds: the values that it sets, unless a recipe does."""
HORIZON_ENDS: dict[int | str, dict[str, float]] = {
    0: {"local_mse": 1.0, "downstream_mse": 0.0},
    "all": {"kl": 0.5},
}
"""Weights that the kind `horizon` sets at the ends of the dial, unless a recipe does: local, and e2e+ds."""
OWN_KEYS = ("kl", "downstream_mse", "local_mse", "sparsity")
"""Terms that have a key of their own in `objective`, in the order in which they are added up."""
PHASE = "phase"
"""Column of the number of a line's phase, from 1."""
COLUMNS = (
    *("loss", "l0", "gradient_norm", "alive", "step", "tokens", "learning_rate", "seed", "heldout"),
    *("left_out", PHASE),
)
"""Columns that a line of metrics.jsonl holds beside the terms, none of which can have such a name."""
COEFFICIENT = "_coefficient"
"""End of the name of a column that holds a term's weight, where it changes."""

TERMS: "Registry[type[Term]]" = Registry("terms", "endwise.training.terms")
"""Every term that a recipe can name."""
NonNegative = Annotated[float, Field(ge=0)]
Balance = Literal["loss", "gradient"]
Errors = Literal["absolute", "relative"]
Horizon = int | Literal["all"]


TARGETS = ("target_l0", "target_ce_increase")
"""Keys of what λ can be steered to."""


class SparsityConfig(Config):
    coefficient: NonNegative
    """λ, the weight of the sparsity penalty. With a target: where λ starts, by default at 0.1."""
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """Active features per token that λ is steered to in training."""
    target_ce_increase: Annotated[float, Field(gt=0)] | None = None
    """CE increase, nats per token, that λ is steered to instead. It is measured on 32,768 tokens of held-out text,
    those after `evaluation.skip` and `evaluation.tokens`."""
    p: Annotated[float, Field(gt=0)] = 1.0
    """The penalty is the mean over tokens of Σ|c|^p / d_model."""

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which λ rises linearly from 0."""
    p_end: Annotated[float, Field(gt=0)] | None = None
    """Power that p falls to in the course of training (p-annealing; usual: 0.2). With every change the penalty is
    rescaled so that its mean stays as it was."""
    p_steps: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the steps after which p is `p_end`."""
    p_changes: Positive = 10
    """Number of equal changes."""

    @model_validator(mode="before")
    @classmethod
    def _start(cls, given: Any) -> Any:
        if isinstance(given, dict) and any(given.get(name) is not None for name in TARGETS):
            return {"coefficient": 0.1, **given}
        return given

    @model_validator(mode="after")
    def _can_be_steered(self) -> "SparsityConfig":
        if self.target_l0 is not None and self.target_ce_increase is not None:
            raise ValueError("target_l0 and target_ce_increase are both given, and λ can follow one of them: give one")
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                f"coefficient is 0, and steering towards {self.target[0]} multiplies it: give a coefficient above 0, "
                "or none"
            )
        return self

    @property
    def target(self) -> tuple[str, float] | None:
        """Key and value of what λ is steered to; None: it is not."""
        return next(((name, value) for name in TARGETS if (value := getattr(self, name)) is not None), None)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the coefficient."""
        return self.model_dump(exclude={"coefficient"})


class TermConfig(Config):
    """A registered term's part of a recipe. A term with settings beyond its weight extends it (`Term.Settings`)."""

    weight: NonNegative


@dataclass(frozen=True)
class WeightedTerm:
    """A term that an objective names."""

    name: str
    weight: float
    settings: Mapping[str, Any] = field(default_factory=dict)


class ObjectiveConfig(Config):
    """Objective that the SAE is trained for: a sum of weighted terms. `kind` is the paper's preset of weights; those
    below override it term by term, and `terms` adds others.
    """

    kind: Literal["local", "e2e", "e2e_ds", "horizon", "finetune"] | None = None
    """The paper's `local`, `e2e` or `e2e_ds`; `horizon`: errors of the blocks within `horizon`; `finetune`: of a
    finished SAE (arXiv 2503.17272). Unset: only the terms that have a weight below."""
    sparsity: SparsityConfig | None = None
    """Required, but for dictionaries that set the number of active features otherwise: these have no penalty."""
    kl: NonNegative | None = None
    """Weight of KL(original ‖ spliced), nats per token. Preset: 0, 1, 0.5 for local, e2e, e2e_ds."""
    local_mse: NonNegative | None = None
    """Weight of the reconstruction's mean squared error at the site. Preset: 1, 0, 0."""
    downstream_mse: NonNegative | None = None
    """β, total weight of the later sites' mean squared error, shared equally among them. Preset: 0, 0, required."""
    downstream_sites: tuple[SiteName, ...] | None = None
    """Unset: `hook_resid_pre` of every later block, as in the reference code; of a finite `horizon`, the residual
    stream after each block within it."""
    horizon: Horizon | None = None
    """Blocks after the site that passes go through: 0 is local training; `all` (as unset): to the predictions, which
    terms of a finite horizon cannot read. One beyond the last block ends there. Unset, for the kind `horizon`: 1."""
    errors: Errors | None = None
    """`relative`: every squared error of an activation is divided by the variance of the clean activations at its site,
    measured before the first step; at a position whose norm is more than 10 times the median, by that position's own
    mean square. `absolute`: not divided. Unset: `absolute`, for the kind `horizon` `relative`."""
    balance: Balance | None = None
    """Weights of terms that read the spliced pass are shares of the local error: each is multiplied by the local mean
    squared error over the term (`loss`), or by the ratio of their gradients' norms at the reconstruction (`gradient`),
    of the step's tokens. With `kl: 0.5`, `local_mse: 0.5` and `loss`: the finetuning of arXiv 2503.17272."""
    terms: dict[str, SerializeAsAny[TermConfig]] = Field(default_factory=dict)
    """Further terms by the name they are registered by, each with its weight, or with `weight` and its settings."""

    @field_validator("terms", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: _term(name, value) for name, value in given.items()}

    @field_validator("horizon", mode="before")
    @classmethod
    def _counts_blocks(cls, given: Any) -> Any:
        if given not in (None, "all") and (type(given) is not int or given < 0):
            raise ValueError("must be a number of blocks, 0 or more, or all")
        return given

    @model_validator(mode="before")
    @classmethod
    def _of_kind(cls, given: Any) -> Any:
        """Fill in what a kind that is not the paper's stands for."""
        if not isinstance(given, dict) or not isinstance(kind := given.get("kind"), str):
            return given
        own = {name: value for name, value in given.items() if value is not None}
        preset = FURTHER_PRESETS.get(kind, {})
        reach = own.get("horizon", preset.get("horizon"))
        ends = HORIZON_ENDS.get(reach, {}) if "horizon" in preset and isinstance(reach, int | str) else {}
        return given | preset | ends | own

    @model_validator(mode="after")
    def _resolved(self) -> "ObjectiveConfig":
        if self.kind == "e2e_ds" and not self.downstream_mse:
            raise ValueError(
                "kind e2e_ds needs downstream_mse, the total weight of the later sites' errors (β), above 0"
            )
        sites = self.downstream_sites or ()
        if len(set(sites)) < len(sites):
            raise ValueError(f"downstream_sites names a site twice: {', '.join(sites)}; name each once")
        if not any(self.weights.values()):
            remedy = "" if self.kind else f"; give kind ({', '.join((*KINDS, *FURTHER_PRESETS))}), or a weight"
            raise ValueError(
                f"every weight of the objective but sparsity is 0, so there is nothing to reconstruct{remedy}"
            )
        return self

    @model_validator(mode="after")
    def _within_the_horizon(self) -> "ObjectiveConfig":
        if self.horizon in (None, "all"):
            return self
        later = self._spliced
        if ahead := [name for name in later if getattr(TERMS[name], "final", False)]:
            raise ValueError(
                f"horizon is {self.horizon}, and {ahead[0]} reads the predictions, which only horizon all reaches. Set "
                f"{ahead[0]} to 0 (or kind to horizon, which has none), or horizon to all"
            )
        if self.horizon == 0 and later:
            raise ValueError(
                f"horizon is 0, which ends at the site, and {later[0]} reads what comes after it. Set {later[0]} to 0 "
                "(or kind to local), or horizon to 1 or more"
            )
        return self

    def __hash__(self) -> int:
        return hash((*(vars(self)[name] for name in vars(self) if name != "terms"), frozenset(self.terms.items())))

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reconstruction term after the preset is applied."""
        given = {"kl": self.kl, "local_mse": self.local_mse, "downstream_mse": self.downstream_mse}
        preset = PRESETS.get(self.kind or "", {})
        own = {term: preset.get(term, 0.0) if value is None else value for term, value in given.items()}
        return own | {name: term.weight for name, term in self.terms.items()}

    @property
    def coefficient(self) -> float | None:
        """λ, where there is a penalty."""
        return None if self.sparsity is None else self.sparsity.coefficient

    @property
    def is_steered(self) -> bool:
        """True where λ follows a target."""
        return self.sparsity is not None and self.sparsity.target is not None

    @property
    def weighted_terms(self) -> list[WeightedTerm]:
        """Every term with what it is built from; of weight 0 only sparsity is kept."""
        weights = self.weights
        settings: dict[str, dict[str, Any]] = {
            **{name: term.model_dump(exclude={"weight"}) for name, term in self.terms.items()},
            "downstream_mse": {"sites": self.downstream_sites, "errors": self.errors},
            "local_mse": {"errors": self.errors},
        }
        names = ("kl", "downstream_mse", "local_mse", *self.terms)
        terms = [WeightedTerm(name, weights[name], settings.get(name, {})) for name in names if weights[name]]
        if self.sparsity is None:
            return terms
        return [*terms, WeightedTerm("sparsity", self.sparsity.coefficient, self.sparsity.settings)]

    @property
    def method(self) -> dict[str, Any]:
        """Return the objective without the sparsity coefficient. Runs that differ in it are of two methods."""
        sites = None if self.downstream_sites is None else list(self.downstream_sites)
        settings = {name: term.model_dump(mode="json", exclude={"weight"}) for name, term in self.terms.items()}
        further = {f"terms.{name}": of for name, of in settings.items() if of}
        sparsity = self.sparsity
        penalty = {} if sparsity is None else {"p": sparsity.p, **sparsity.model_dump(exclude_defaults=True)}
        penalty.pop("coefficient", None)
        if sparsity is not None and sparsity.target is not None:
            penalty[sparsity.target[0]] = "steered"
        further |= {} if self.balance is None else {"balance": self.balance}
        further |= {} if self.errors in (None, "absolute") else {"errors": self.errors}
        further |= {"horizon": self.horizon} if self._reach else {}
        return {**self.weights, "downstream_sites": sites, **penalty, **further}

    @property
    def name(self) -> str:
        """The kind, and the terms that are added to it: what folders, lines and tables call the objective."""
        own = [term for term in ("kl", "local_mse", "downstream_mse") if self.weights[term]]
        if self._reach:
            start = [self._reach, *(term for term in own if term != "downstream_mse")]
        else:
            start = [(self.kind != "horizon" and self.kind) or self._preset or "+".join(own)]
        return "+".join(part for part in (*start, *(name for name, term in self.terms.items() if term.weight)) if part)

    @property
    def method_kind(self) -> str:
        """The kind whose terms these weights keep, whatever `kind` says; where they are no preset's, `name`."""
        return self._preset if self._preset and not any(term.weight for term in self.terms.values()) else self.name

    @property
    def _spliced(self) -> list[str]:
        """Terms that read the spliced pass."""
        return [name for name, weight in self.weights.items() if weight and TERMS[name].is_spliced]

    @property
    def _reach(self) -> str | None:
        """The finite horizon of its terms, as a name."""
        return f"horizon{self.horizon}" if self.horizon not in (None, "all") and self._spliced else None

    @property
    def _preset(self) -> str | None:
        """The paper's kind that has just those terms with keys of their own which these weights keep."""
        kept = {term for term in ("kl", "local_mse", "downstream_mse") if self.weights[term]}
        return next((kind for kind, terms in PRESET_TERMS.items() if terms == kept), None)


def loss_of(line: Mapping[str, Any]) -> float:
    """Return the loss of a line of metrics, without a sparsity penalty whose weight changes in training: as λ rises to
    a target, so does a loss that nothing is wrong with.
    """
    ends = [name for name in line if name.endswith(f"sparsity{COEFFICIENT}")]
    penalties = (float(line[name]) * float(line[name.removesuffix(COEFFICIENT)]) for name in ends)
    return float(line["loss"]) - sum(penalties)


def _term(name: Any, value: Any) -> Any:
    """A registered term's settings, of the class that the term says."""
    if name in OWN_KEYS:
        raise ValueError(f"{name} has a key of its own; set objective.{name}")
    if name in COLUMNS or str(name).endswith(COEFFICIENT):
        raise ValueError(f"no term can be called {name}, since metrics.jsonl has such a number")
    try:
        settings = TERMS[str(name)].Settings
        if isinstance(value, settings):
            return value
        values = value if isinstance(value, dict) else {"weight": value}
        return settings.build(values, f"the term {name}")
    except ConfigError as error:
        raise ValueError(" ".join(str(error).split())) from None
