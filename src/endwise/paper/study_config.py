"""The file of a study: one model, and what is varied on it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from endwise.common.errors import ConfigError
from endwise.common.files import expanded, there_is
from endwise.common.kinds import other_kind
from endwise.config.base import Config
from endwise.config.objective import Kind
from endwise.config.run import EvaluationConfig, Positive
from endwise.sweeps.sweep_config import EngineConfig

STUDIES = Path(__file__).parent / "studies"

Positives = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class KindConfig(Config):
    """Training of one kind."""

    coefficients: Positives
    """Sparsity coefficients, one run each."""
    learning_rates: Positives
    """All are tried with the middle three coefficients at every site, and the best of a site is used there."""
    downstream_mse: Annotated[float, Field(gt=0)] | None = None
    """β, for e2e_ds."""


class StudyConfig(EngineConfig):
    """The experiments of `endwise reproduce` on one model. Another model takes another `recipe.model.name`, its sites,
    and coefficients of its scale.
    """

    recipe: dict[str, Any]
    """Settings that all runs share: model, data, dictionary, training, evaluation. `training.tokens` is each run's
    length where no budget is given."""
    sites: Annotated[dict[str, dict[Kind, dict[str, Any]]], Field(min_length=1)]
    """Each with what its kinds do otherwise there. At the first one lengths, sizes and starts are compared."""
    kinds: dict[Kind, KindConfig]
    seeds: Positive = 3
    """Training seeds of the curves, from 0: of the SAE's first weights and of the order of the text, both."""
    lengths: Positives = (0.5, 2.0, 4.0)
    """Training lengths that are compared, as multiples of the study's."""
    ratios: Positives
    """Dictionary sizes that are compared, as multiples of the site's width."""
    starts: Positives = (0.25, 0.5)
    """Lengths of end-to-end training that starts from a local SAE, as multiples of the study's."""
    highest_ce_increase: Annotated[float, Field(gt=0)] | None = None
    """Runs that end above this CE increase (nats per token) are not looked at when learning rates are chosen."""
    least_tokens: Positive = 50_000
    """A budget that does not permit runs of this length drops experiments, the last ones first."""
    batch_of_runs: Positive = 8
    """Most SAEs in training at a time in one pass."""
    cost_tokens: Positive = 15_000
    """Tokens over which a kind's cost is measured."""

    @model_validator(mode="after")
    def _can_be_compared(self) -> "StudyConfig":
        if "local" not in self.kinds or len(self.kinds) < 2:
            raise ValueError("kinds needs local, which the others are compared with, and at least one other")
        for key in ("site", "objective", "seed", "out", "init_from"):
            if key in self.recipe:
                raise ValueError(f"recipe.{key} is what the study varies; leave it out")
        return self

    @property
    def site(self) -> str:
        """The first."""
        return next(iter(self.sites))

    @property
    def tuning(self) -> dict[str, int]:
        """Settings of the runs that learning rates are chosen by: they are measured on held-out text of their own."""
        return {
            "evaluation.skip": EvaluationConfig.build(self.recipe.get("evaluation", {}), "recipe.evaluation").needed
        }

    def kind(self, kind: Kind, site: str) -> KindConfig:
        """Return how a kind is trained at a site."""
        changes = self.sites[site].get(kind, {})
        return KindConfig.build({**self.kinds[kind].model_dump(), **changes}, f"sites.{site}.{kind}")


def find_study(name: str) -> StudyConfig:
    """The study in a file, or one that ships.

    Raises:
        ConfigError: there is neither, or it breaks a rule.
    """
    ships = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    if name in ships:
        return StudyConfig.read(STUDIES / f"{name}.yaml")
    if not (path := expanded(name)).is_file():
        other = other_kind(path, "study") if there_is(path) else None
        raise other or ConfigError(
            f"There is no study {name!r:.200}, neither a file nor one that ships ({', '.join(ships)})."
        )
    return StudyConfig.read(Path(name))
