"""Course of a training: its phases, each with an objective, a learning rate and a sparsity penalty of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from endwise.common.axes import Activation, TokenMask
from endwise.config.objective import PHASE
from endwise.config.run import TrainingConfig
from endwise.dictionaries import Latents
from endwise.training.error_scale import ErrorScale, restore_scales, scale_tensors
from endwise.training.objectives import Objective
from endwise.training.sparsity import SparsitySchedule, coefficient_of, errors_of, own_tensors, penalty_of
from endwise.training.steering import Steering

MOST_AT_ONCE = 100.0
"""Bound on the ratio, either way, by which λ changes where a phase begins."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a training.

    Args:
        share: of the steps.
        learning_rate: its largest; None: that of the training.
        warmup: share of its steps over which the rate rises linearly, besides the training's own warm-up.
        fresh: whether the optimiser starts from the beginning with it.
    """

    objective: Objective
    share: float = 1.0
    learning_rate: float | None = None
    warmup: float = 0.0
    fresh: bool = False


Phases = Objective | Sequence[Phase]
"""Phases in their order; or the objective of the one there is."""


class Course:
    """Objective and learning rate of each step.

    The training's warm-up and decay span all phases; within a phase its own learning rate is the largest. A penalty
    spans all phases in a row that have the same: its warm-up, its falling powers and a λ that is steered continue from
    one to the next. Where a phase has another, that one starts, a λ that it steers where λ was. After the first step of
    a phase with other terms a steered λ is multiplied by what the weighted errors are of those of the last step before:
    the penalty keeps its share of the loss, whatever the size of the new terms.

    Args:
        steps: of the whole training.
    """

    def __init__(self, phases: Phases, config: TrainingConfig, steps: int, device: torch.device) -> None:
        self.phases = (Phase(phases),) if isinstance(phases, Objective) else tuple(phases)
        self._config, self._steps = config, steps
        self._rates = [phase.learning_rate or config.learning_rate for phase in self.phases]
        shares = [phase.share for phase in self.phases]
        self._starts = [round(steps * math.fsum(shares[:number])) for number in range(len(shares))]
        self._schedules = self._plan_penalties(device)
        self._error = torch.full((), float("nan"), device=device)
        """Weighted sum of the terms but for the penalty, of the last step before a phase."""

    def _plan_penalties(self, device: torch.device) -> list[SparsitySchedule | None]:
        """Plan by phase what changes its penalty: one for all in a row that have the same; None: nothing does."""
        terms = [penalty_of(phase.objective) for phase in self.phases]
        planned: list[SparsitySchedule | None] = []
        for number, (term, start) in enumerate(zip(terms, self._starts, strict=True)):
            if number and term == terms[number - 1]:
                planned.append(planned[-1])
                continue
            ends = (s for s, other in zip(self._starts[number:], terms[number:], strict=True) if other != term)
            steps = next(ends, self._steps) - start
            planned.append(SparsitySchedule.of(self.phases[number].objective, steps, device, start))
        return planned

    @property
    def schedules(self) -> list[SparsitySchedule]:
        """All that change a penalty, each once."""
        return [each for each in dict.fromkeys(self._schedules) if each is not None]

    @property
    def scales(self) -> list[ErrorScale]:
        """All that errors are divided by; several may be of one site."""
        return [scale for phase in self.phases for scale in phase.objective.scales]

    def number(self, step: int) -> int:
        """Return the number, from 0, of the phase of the step after `step` others; before any, of the first."""
        return max(number for number, start in enumerate(self._starts) if start <= step or number == 0)

    def objective(self, step: int) -> Objective:
        """Return what the step after `step` others is trained for: of one phase one objective, whose penalty may
        change.
        """
        step = max(step, 0)
        objective, schedule = self.phases[self.number(step)].objective.at(step), self.schedule(step)
        return objective if schedule is None else schedule.objective(objective, step)

    def unbalanced(self, step: int) -> set[str]:
        """Name the spliced terms of the step after `step` others whose weights stay as they are."""
        objective = self.phases[self.number(step)].objective
        return set() if objective.balance else {each.name for each in objective.spliced_terms}

    def named(self, step: int) -> dict[str, int]:
        """Name the phase of the step after `step` others, from 1; of a training of one phase, nothing."""
        return {PHASE: self.number(step) + 1} if len(self.phases) > 1 else {}

    def schedule(self, step: int) -> SparsitySchedule | None:
        """Return what changes the penalty of the step after `step` others."""
        return self._schedules[self.number(step)]

    def rate(self, step: int) -> float:
        """Return the learning rate of the step after `step` others."""
        number = self.number(step)
        first, end = self._starts[number], (*self._starts, self._steps)[number + 1]
        warm = round(self.phases[number].warmup * (end - first))
        own = min(1.0, (step - first + 1) / (warm + 1))
        return self._rates[number] * own * rate_factor(step, self._steps, self._config)

    def prepare(self, optimizer: Optimizer, step: int) -> None:
        """Give the optimiser the rate of the step after `step` others, and fresh moments where its phase has them."""
        if step in self._starts[1:] and self.phases[self.number(step)].fresh:
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        for schedule in self.schedules:
            schedule.seen.zero_()

    def see(self, step: int, latents: Latents, mask: TokenMask) -> None:
        """See `SparsitySchedule.see`."""
        if (schedule := self.schedule(step)) is not None:
            schedule.see(step, latents, mask)

    def start(self, latents: Latents, reconstruction: Activation, target: Activation) -> None:
        """See `SparsitySchedule.start`, of the first phase."""
        if (schedule := self._schedules[0]) is not None:
            schedule.start(self.phases[0].objective, latents, reconstruction, target)

    def after_step(self, step: int, values: Mapping[str, Tensor], counts: Tensor) -> None:
        """Follow the step after `step` others: see `SparsitySchedule.after_step`."""
        schedule, following = self.schedule(step), self.schedule(step + 1)
        if schedule is not None:
            schedule.after_step(step, values, self.rate(step) / max(self._rates), counts)
        if following is not None and following is not schedule:
            penalty = penalty_of(self.phases[self.number(step)].objective)
            last = penalty if schedule is None else schedule.term(step + 1)
            if last is not None:
                following.take_over(last.weight)
        if schedule is not None and schedule.steering is not None:
            self._keep_share(step, values, counts, schedule.steering)

    def _keep_share(self, step: int, values: Mapping[str, Tensor], counts: Tensor, steering: Steering) -> None:
        """Multiply λ, after the first step of a phase with other terms, by how the weighted errors have changed."""
        number = self.number(step)
        is_first = number > 0 and step == self._starts[number]
        if not is_first and step + 1 not in self._starts:
            return
        objective, fixed = self.objective(step), self.unbalanced(step)
        error = self._error.new_zeros(())
        for each in errors_of(objective):
            weight = values.get(coefficient_of(each.name), each.weight) if each.name not in fixed else each.weight
            error = error + weight * values[each.name]
        before = self.phases[number - 1].objective.at(step)
        others = errors_of(objective) != errors_of(before) or objective.balance != before.balance
        if is_first and others:
            ratio = error / self._error
            usable = counts & (error > 0) & (self._error > 0) & torch.isfinite(ratio)
            steering.multiply(torch.where(usable, ratio, 1.0).clamp(1 / MOST_AT_ONCE, MOST_AT_ONCE))
        self._error.copy_(torch.where(counts, error, self._error))

    @property
    def columns(self) -> list[str]:
        """Name what is logged of the penalties."""
        return list(dict.fromkeys(name for schedule in self.schedules for name in schedule.columns))

    def tensors(self) -> dict[str, Tensor]:
        """Name what a checkpoint keeps of it."""
        own = {"phases.error": self._error} if len(self.phases) > 1 and self.columns else {}
        return own | self._of_penalties() | scale_tensors(self.scales)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` named."""
        for name, tensor in self._of_penalties().items():
            tensor.copy_(tensors[name])
        if "phases.error" in tensors:
            self._error.copy_(tensors["phases.error"])
        restore_scales(self.scales, tensors)

    def _of_penalties(self) -> dict[str, Tensor]:
        numbered = enumerate(self.schedules, 1)
        return {
            name if number == 1 else f"{name}.{number}": tensor
            for number, schedule in numbered
            for name, tensor in own_tensors(schedule).items()
        }


def rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Share of the learning rate at `step` (from 0): linear warm-up to 1, then down to the floor on a cosine or a line,
    over the last steps that `decay` says, or over all that are left.
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = warmup if config.decay is None else max(warmup, total_steps - round(config.decay * total_steps))
    if config.schedule == "constant" or step < start:
        return 1.0
    progress = (step - start) / max(1, total_steps - start)
    if config.schedule == "linear":
        return 1 - (1 - config.floor) * progress
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2
