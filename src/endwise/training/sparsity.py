"""Course of the sparsity penalty in training: warm-up, falling powers (p-annealing), a λ that follows L0."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from endwise.common.axes import Activation, TokenMask
from endwise.config.objective import COEFFICIENT
from endwise.dictionaries import Latents
from endwise.training.objectives import Objective, Sparsity, Term
from endwise.training.steering import Steering

START = 0.5
"""Share of the local error that the penalty of a finished dictionary has, where its λ is steered."""
WINDOW = 10
"""Steps before a change of p over which both penalties are compared."""


class SparsitySchedule:
    """The penalty s·Σ|c|^p of each step: p falls in steps, and s is such that no change of p moves the mean penalty.

    At a change from p to q, s ← s·Σ|c|^p / Σ|c|^q, both summed over the tokens of up to `WINDOW` steps before it, so
    that λ means what it did (Karvonen et al. 2024, arXiv 2408.00113; dictionary_learning's `Lp^p`).

    Args:
        powers: p from each of `starts` on.
        starts: steps, ascending, the first that of its first step.
        warm: steps over which the weight rises linearly from 0.
        steering: what multiplies the weight.
    """

    def __init__(
        self,
        term: Sparsity,
        powers: Sequence[float],
        starts: Sequence[int],
        warm: int = 0,
        window: int = WINDOW,
        steering: Steering | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._term, self._powers, self._starts, self._warm, self._window = term, powers, starts, warm, window
        self.steering = steering
        self.state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        """s, and the two sums."""
        self.seen = torch.zeros(2, dtype=torch.float64, device=device)
        """Amounts that the step adds to them."""

    @classmethod
    def of(cls, objective: Objective, steps: int, device: torch.device, first: int = 0) -> "SparsitySchedule | None":
        """Plan the penalty of an objective over `steps` steps, after `first` others; None: it stays as it is."""
        term = penalty_of(objective)
        if term is None or (term.p_end is None and not term.warmup and term.target is None):
            return None
        changes = {first: term.p}
        if term.p_end is not None:
            for number in range(1, term.p_changes + 1):
                share = number / term.p_changes
                changes[first + round(term.p_steps * steps * share)] = term.p + (term.p_end - term.p) * share
        warm = round(term.warmup * steps)
        by_ce = term.target_ce_increase is not None
        steering = None if term.target is None else Steering(term.target, steps, warm, device, first, by_ce=by_ce)
        return cls(term, list(changes.values()), list(changes), warm, steering=steering, device=device)

    def start(self, objective: Objective, latents: Latents, reconstruction: Activation, target: Activation) -> None:
        """Begin where the penalty of a finished dictionary weighs `START` of its local error, on some tokens. A λ that
        follows a target would otherwise spend a short training on finding its size, while L0 goes astray.
        """
        mask = torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
        penalty = self._term.coefficient * float(self._term.total(target, reconstruction, latents, mask))
        if self.steering is not None and penalty > 0:
            self.steering.start(START * float(objective.local_error(reconstruction, target, mask)) / penalty)

    def take_over(self, weight: float | Tensor) -> None:
        """Begin with the λ of another penalty, where it is steered."""
        if self.steering is not None:
            self.steering.start(weight / self._term.coefficient)

    def objective(self, objective: Objective, step: int) -> Objective:
        """Return the objective of the step after `step` others."""
        terms = (self.term(step) if isinstance(each, Sparsity) else each for each in objective.terms)
        return Objective.of(terms, objective.balance, objective.local_scale)

    def term(self, step: int) -> Sparsity:
        """Return the penalty of the step after `step` others."""
        planned = self._term.coefficient * (min(1.0, (step - self._starts[0]) / self._warm) if self._warm else 1.0)
        steered = None if self.steering is None else planned * self.steering.factor()
        changed = {"coefficient": planned, "steered": steered, "p": self._power(step), "scale": self.state[0]}
        return replace(self._term, **changed)

    def see(self, step: int, latents: Latents, mask: TokenMask) -> None:
        """Compare the penalties of before and after the change that comes, if it is near."""
        change = next((start for start in self._starts if step < start <= step + self._window), None)
        if change is not None:
            with torch.no_grad():
                both = [latents.penalty(p, mask).sum() for p in (self._power(step), self._power(change))]
            self.seen += torch.stack(both)

    @property
    def columns(self) -> list[str]:
        """Name what is logged of it: λ, where it follows a target."""
        return [] if self.steering is None else [coefficient_of(self._term.name)]

    def after_step(self, step: int, values: Mapping[str, Tensor], pace: float, counts: Tensor) -> None:
        """Follow the step after `step` others, once `seen` is that of all processes.

        Args:
            values: what is logged of it; `columns` are filled in.
            pace: its learning rate over the largest one.
            counts: whether it changed the weights.
        """
        if self.steering is not None:
            values[coefficient_of(self._term.name)].add_(self.term(step).weight)
            self.steering.after_step(step, values["l0"], pace, counts)
        self.state[1:] += self.seen
        self.seen.zero_()
        if step + 1 in self._starts[1:]:
            now, then = self.state[1:].clone()
            self.state[0] *= (now / then).where((now > 0) & (then > 0), 1.0)
            self.state[1:] = 0

    def _power(self, step: int) -> float:
        return next(p for p, start in zip(reversed(self._powers), reversed(self._starts), strict=True) if start <= step)


def penalty_of(objective: Objective) -> Sparsity | None:
    """Return the penalty among an objective's terms."""
    return next((each for each in objective.site_terms if isinstance(each, Sparsity)), None)


def errors_of(objective: Objective) -> tuple[Term, ...]:
    """Return an objective's terms but for the penalty."""
    return tuple(each for each in objective.terms if not isinstance(each, Sparsity))


def coefficient_of(term: str) -> str:
    """Name the column of a term's weight, where it changes."""
    return f"{term}{COEFFICIENT}"


def own_tensors(schedule: SparsitySchedule) -> dict[str, Tensor]:
    """Name what a checkpoint keeps of it."""
    return {"sparsity": schedule.state} | ({} if schedule.steering is None else {"steering": schedule.steering.state})
