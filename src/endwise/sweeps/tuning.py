"""Settings of a recipe for a new model, from short runs: the learning rate, and λ at which training begins.

Rounds of runs that share every pass, each round longer and of fewer rates (successive halving, Jamieson and Talwalkar
2016, arXiv 1502.07943): what does badly stops early. λ of each run is steered to the target, and where it ends is
where the next round's begins.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from endwise.common.errors import ConfigError
from endwise.common.terminal import printing_once
from endwise.common.text import minus
from endwise.config.base import Config, Positive, read_overrides, read_yaml, with_values
from endwise.config.places import OF_A_SWEEP, build_recipe, changed_recipe
from endwise.config.recipes import find_recipe
from endwise.config.run import EvaluationConfig, RunConfig
from endwise.evaluation.measure import Evaluation, measure
from endwise.models.language_model import LanguageModel
from endwise.runs.folder import RunFolder
from endwise.sweeps.sweep_config import Target
from endwise.tokens import Corpora, check_readable
from endwise.training.members import Run, SomeFailed, TrialMember
from endwise.training.setup import TrainingRequest, corpora_of, model_for
from endwise.training.steering import BOUND
from endwise.training.train import trained

ROUNDS = ((5, 1 / 6), (3, 1 / 3), (2, 1 / 2))
"""Rates of each round, and the share of the budget that its pass reads."""
FACTORS = (3.0, math.sqrt(3.0))
"""Ratio of neighbouring rates in the first round, and in the second."""
MEASURED_ON = 32_768
"""Most held-out tokens by which runs are compared, no more than each trains on; after those of the recipe's own
evaluations where there are so many.
"""
LEAST_STEPS = 100
"""Steps of the shortest run, from which on λ follows a target."""
NEAR = 1.25
"""A run whose L0, or CE increase, is further from the target than by this ratio is compared with no other."""
LAMBDA = "sparsity_coefficient"


class TuningBudget(Config):
    """Target and budget of a tuning."""

    target: Target
    tokens: Positive | None = None
    """Tokens that the passes of all rounds read together; unset: half of `training.tokens`, or the least possible."""


@dataclass(frozen=True)
class RateTrial:
    """A short run."""

    learning_rate: float
    tokens: int
    coefficient: float | None
    """λ after its last step."""
    l0: float
    ce_increase: float
    low: float
    """Ends of the 95 % interval of what is compared, over text."""
    high: float
    miss: float
    """Distance from the target, as a share of it."""
    score: float
    """The number compared, smaller is better: the CE increase at an L0, or L0 at a CE increase."""
    failed: str = ""
    is_bound: bool = False
    """True where λ ended as far from where it began as it may."""

    @property
    def is_near(self) -> bool:
        return not self.failed and 1 / NEAR <= 1 + self.miss <= NEAR


@dataclass(frozen=True)
class Tuned:
    """Settings that were found, and how sure they are."""

    learning_rate: float
    coefficient: float | None
    """λ to begin with; None: the dictionary sets L0 itself."""
    trials: tuple[tuple[RateTrial, ...], ...]
    """Trials by round."""
    remarks: tuple[str, ...]
    """Remarks on how sure the choice is."""
    text: str
    """The recipe with them, as YAML."""

    def to_json(self) -> dict[str, Any]:
        rounds = [[asdict(trial) for trial in each] for each in self.trials]
        found = {"learning_rate": self.learning_rate, "coefficient": self.coefficient}
        return {**found, "remarks": list(self.remarks), "rounds": rounds}


def tune(
    recipe: Mapping[str, Any] | str | Path,
    budget: TuningBudget | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    model: LanguageModel | None = None,
    corpora: Corpora | None = None,
    say: Callable[[str], None] = lambda _: None,
    display: bool = True,
) -> Tuned:
    """Find a learning rate and an initial λ for a recipe, by short runs that share their passes.

    Args:
        recipe: a mapping of its fields, the path of a YAML file, or the name of one that ships.
        budget: the target, and tokens to spend.
        overrides: `key=value`, as for `endwise train`.
        model: a loaded one to use instead of the recipe's.
        corpora: loaded token sequences, likewise.
        say: called with what is being done.
        display: show training's progress.

    Raises:
        ConfigError: the recipe breaks a rule, or is of several places; the budget is too small or too large; or no run
            came near the target.
        EndwiseError: see `train`.
    """
    budget = TuningBudget.of(budget)
    values = dict(recipe) if isinstance(recipe, Mapping) else read_yaml(find_recipe(str(recipe)))
    values = changed_recipe(_aimed(values, budget.target), read_overrides(list(overrides)))
    config = build_recipe(values, "the recipe")
    if not isinstance(config, RunConfig):
        raise ConfigError("A recipe for several places is tuned place by place: give it one `site`.")
    if model is None and corpora is None:  # what is wrong with the text is known before weights are read
        check_readable(config.data)
    model = model or model_for(config)
    corpora = corpora or corpora_of([config], model)
    search = _Search(config, budget, model, corpora, display)
    rounds = search.rounds(say)
    best = _best(rounds[-1], budget.target)
    steered = config.objective.is_steered
    found = {"training.learning_rate": float(f"{best.learning_rate:.2g}")}
    found |= (
        {"objective.sparsity.coefficient": float(f"{best.coefficient:.3g}")} if steered and best.coefficient else {}
    )
    remarks = _remarks(config, rounds, budget.target, search.is_apart)
    return Tuned(
        found["training.learning_rate"],
        found.get("objective.sparsity.coefficient"),
        tuple(rounds),
        remarks,
        _written(with_values(values, found), remarks),
    )


def _aimed(values: dict[str, Any], target: Target) -> dict[str, Any]:
    """The recipe's values with the target: of its sparsity coefficient, or of the key by which its dictionary sets L0.

    Raises:
        ConfigError: the dictionary sets L0 itself, and a CE increase is asked for.
    """
    if {*values} >= OF_A_SWEEP:
        raise ConfigError("This is a sweep, of many runs. Give one of its recipes.")
    config = build_recipe(values, "the recipe")
    dictionary = config.dictionary
    knob = next((name for name in dictionary.knobs if getattr(dictionary, name) is not None), None)
    if knob is None:
        objective = dict(values.get("objective") or {})
        kept = {
            key: value for key, value in dict(objective.get("sparsity") or {}).items() if not key.startswith("target_")
        }
        return {**values, "objective": {**objective, "sparsity": {**kept, f"target_{target.metric}": target.value}}}
    if target.metric != "l0":
        raise ConfigError(
            f"dictionary.{knob} sets how many features are active, so that no CE increase can be met: give --l0."
        )
    value = round(target.value) if isinstance(getattr(dictionary, knob), int) else target.value
    return with_values(values, {f"dictionary.{knob}": value})


class _Search:
    """Rounds of short runs on one model and text."""

    def __init__(
        self, config: RunConfig, budget: TuningBudget, model: LanguageModel, corpora: Corpora, display: bool
    ) -> None:
        self.config, self.model, self.corpora = config, model, corpora
        self.target, self.display = budget.target, display
        per_step = config.training.batch * corpora.train.context
        self.tokens = self._budget(budget.tokens, config.training.tokens, per_step)
        self.is_apart = corpora.heldout.tokens >= config.evaluation.needed + self._asked(max(self._tokens_of_rounds()))
        """True if runs are compared on text that the recipe's own evaluation leaves alone."""

    def _tokens_of_rounds(self) -> list[int]:
        return [int(self.tokens * share) for _, share in ROUNDS]

    def _asked(self, tokens: int) -> int:
        """Held-out tokens to measure runs of so many tokens on: whole sequences."""
        context = self.corpora.heldout.context
        return max(context, min(tokens, MEASURED_ON) // context * context)

    def _measuring(self, tokens: int) -> EvaluationConfig:
        own, heldout = self.config.evaluation, self.corpora.heldout
        skip = own.needed if self.is_apart else own.skip
        few = {"skip": skip, "tokens": min(self._asked(tokens), heldout.tokens - skip)}
        few["during_training_tokens"] = heldout.context
        return EvaluationConfig.of({**few, "bootstrap": own.bootstrap, "seed": own.seed})

    def _budget(self, asked: int | None, whole: int, per_step: int) -> int:
        """Return the tokens to spend.

        Raises:
            ConfigError: the shortest run would have too few steps, or the longest be longer than the recipe's.
        """
        shares = [share for _, share in ROUNDS]
        least, most = math.ceil(LEAST_STEPS * per_step / min(shares)), int(whole / max(shares))
        if least > most:
            raise ConfigError(
                f"training.tokens is {whole:,}, {whole // per_step:,} steps of {per_step:,} tokens: too few to try out "
                f"settings in shorter runs of {LEAST_STEPS} steps. Lower training.batch, or train longer."
            )
        tokens = max(least, whole // 2) if asked is None else asked
        if not least <= tokens <= most:
            raise ConfigError(
                f"The budget is {tokens:,} tokens, and must be from {least:,}, {LEAST_STEPS} steps in the "
                f"shortest run, to {most:,}, training.tokens in the longest. Give another with --budget."
            )
        return tokens

    def rounds(self, say: Callable[[str], None]) -> list[tuple[RateTrial, ...]]:
        """Carry out all rounds."""
        with printing_once():
            return self._rounds(say)

    def _rounds(self, say: Callable[[str], None]) -> list[tuple[RateTrial, ...]]:
        first, coefficient = self.config.training.learning_rate, self.config.objective.coefficient
        rates = [first * FACTORS[0] ** power for power in (-2, -1, 0, 1, 2)]
        rounds: list[tuple[RateTrial, ...]] = []
        for number, tokens in enumerate(self._tokens_of_rounds()):
            listed = ", ".join(f"{rate:.2g}" for rate in rates)
            say(f"Round {number + 1} of {len(ROUNDS)}, {tokens:,} tokens: learning rates {listed}")
            rounds.append(self.round(rates, coefficient, tokens))
            ranked = _ranked(rounds[-1])
            coefficient = ranked[0].coefficient or coefficient
            if number == 0:  # where no run is near the target none is better, and λ alone is moved
                middle = ranked[0].learning_rate if ranked[0].is_near else first
                rates = [middle * FACTORS[1] ** power for power in (-1, 0, 1)]
            else:
                rates = [trial.learning_rate for trial in ranked[: ROUNDS[-1][0]]]
        return rounds

    def round(self, rates: Sequence[float], coefficient: float | None, tokens: int) -> tuple[RateTrial, ...]:
        """Train a run at each rate in one pass, and measure them."""
        measuring = self._measuring(tokens)
        with tempfile.TemporaryDirectory(prefix="endwise-tune-") as folder:
            short = self._short(coefficient, tokens, measuring)
            configs = [_at_rate(short, rate, Path(folder) / f"rate-{rate:.2g}") for rate in rates]
            failed: dict[Path, str] = {}
            try:
                request = TrainingRequest(configs, display=self.display, member=TrialMember)
                runs: Sequence[Any] = trained(request, self.model, self.corpora)
            except SomeFailed as error:
                runs, failed = error.finished, {each.folder: str(each.error) for each in error.failures}
            found = {run.folder: run for run in runs if isinstance(run, Run)}
            saes = {str(path): (run.config.place, run.sae) for path, run in found.items()}
            measured = measure(self.model, saes, self.corpora.heldout, measuring, baselines=False) if saes else {}
            return tuple(
                self._trial(config, found.get(config.out), measured.get(str(config.out)), failed.get(config.out, ""))
                for config in configs
                if config.out is not None
            )

    def _short(self, coefficient: float | None, tokens: int, measuring: EvaluationConfig) -> RunConfig:
        config, sparsity = self.config, self.config.objective.sparsity
        quiet = {"evaluate_every": None, "checkpoint_every": None, "save_at": ()}
        training = config.training.model_copy(update={"tokens": tokens, **quiet})
        objective = config.objective
        if sparsity is not None and coefficient is not None:
            begun = sparsity.model_copy(update={"coefficient": coefficient})
            objective = objective.model_copy(update={"sparsity": begun})
        short = {"training": training, "objective": objective, "trackers": (), "evaluation": measuring}
        return config.model_copy(update=short)

    def _trial(self, config: RunConfig, run: Run | None, found: Evaluation | None, failed: str) -> RateTrial:
        rate, tokens = config.training.learning_rate, config.training.tokens
        if run is None or found is None:
            nan = math.nan
            return RateTrial(rate, tokens, None, nan, nan, nan, nan, nan, math.inf, failed or "it did not finish")
        first = config.objective.coefficient
        last = RunFolder(run.folder).metrics()[-1].get(LAMBDA, first)
        score = found.metrics["ce_increase" if self.target.metric == "l0" else "l0"]
        ends = (found["l0"], found["ce_increase"], score.low, score.high)
        miss = found[self.target.metric] / self.target.value - 1
        is_bound = first is not None and config.objective.is_steered and _is_bound(first, last)
        return RateTrial(rate, tokens, last, *ends, miss, score.estimate, is_bound=is_bound)


def _is_bound(first: float, last: float) -> bool:
    return abs(math.log(last / first)) > 0.999 * math.log(BOUND)


def _at_rate(short: RunConfig, rate: float, out: Path) -> RunConfig:
    training = short.training.model_copy(update={"learning_rate": rate})
    return short.model_copy(update={"training": training, "out": out})


def _ranked(trials: Sequence[RateTrial]) -> list[RateTrial]:
    """The trials near the target, the best first, then the others, the nearest first."""
    return sorted(trials, key=lambda trial: (not trial.is_near, trial.score if trial.is_near else _distance(trial)))


def _distance(trial: RateTrial) -> float:
    return math.inf if trial.failed or trial.miss <= -1 else abs(math.log1p(trial.miss))


def _best(trials: Sequence[RateTrial], target: Target) -> RateTrial:
    """
    Raises:
        ConfigError: none came near the target.
    """
    best = _ranked(trials)[0]
    if best.failed:
        raise ConfigError(f"No rate that was tried for {target} trains: {best.failed} Lower training.learning_rate.")
    if not best.is_near:
        last = "" if best.coefficient is None else f", with λ at {best.coefficient:.3g}"
        raise ConfigError(
            f"No run came within {NEAR - 1:.0%} of {target}: the nearest, of {best.tokens:,} tokens, ended at L0 "
            f"{best.l0:.1f} and a CE increase of {best.ce_increase:+.3f}{last}. Raise --budget, or begin nearer: "
            "objective.sparsity.coefficient."
        )
    return best


def _remarks(
    config: RunConfig, rounds: Sequence[Sequence[RateTrial]], target: Target, is_apart: bool
) -> tuple[str, ...]:
    """List how sure the settings are: what they rest on, what they may be no better than, what would change them."""
    best, last = _best(rounds[-1], target), rounds[-1]
    tried = sorted(trial.learning_rate for trial in rounds[0])
    what, whole = "CE increase" if target.metric == "l0" else "L0", config.training.tokens
    longer = f", and the recipe trains {whole:,}: longer runs often want a lower rate" if best.tokens < whole else ""
    numbers = minus(f"L0 {best.l0:.1f} with a CE increase of {best.ce_increase:+.3f}")
    interval = minus(f"{what}, 95 % over text: [{best.low:.3f}, {best.high:.3f}]")
    lines = [f"Found by runs of {best.tokens:,} tokens{longer}."]
    lines += [f"The best ended at {numbers} ({interval}); {target} was the target ({minus(f'{best.miss:+.0%}')})."]
    near = [trial for each in rounds[-2:] for trial in each if trial.is_near and trial.low <= best.high]
    rates = sorted({trial.learning_rate for trial in (*near, best)})
    if len(rates) > 1:
        lines.append(
            f"Rates from {rates[0]:.2g} to {rates[-1]:.2g} may be equal: their intervals overlap, and each is a "
            "run of one seed."
        )
    if not tried[0] < best.learning_rate < tried[-1]:
        lines.append("The best rate is at an end of those tried: tune again from the recipe written.")
    lambdas = [trial.coefficient for trial in last if trial.coefficient is not None]
    if config.objective.is_steered and lambdas:
        lines.append(f"λ ended between {min(lambdas):.3g} and {max(lambdas):.3g}; training begins there and steers it.")
    if best.is_bound:
        lines.append(
            f"λ of the best is at its bound, {BOUND:,.0f} times from where its run began: L0 was still on its way "
            "when the run ended. Raise --budget."
        )
    for each in (trial for trials in rounds for trial in trials if trial.failed):
        why, *_ = each.failed.split(". ")
        lines.append(f"The run of {each.tokens:,} tokens at {each.learning_rate:.2g} failed: {why}.")
    if not is_apart:
        lines.append(
            "Too little text is held out to compare runs on text of its own: the rate was chosen on what the recipe is "
            "measured on, which flatters it. Give more text (data.heldout)."
        )
    return tuple(lines)


def _written(values: Mapping[str, Any], remarks: Sequence[str]) -> str:
    comments = "".join(f"# {' '.join(remark.split())}\n" for remark in remarks)
    return f"# Tuned by endwise tune.\n{comments}{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}"
