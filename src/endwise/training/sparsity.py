"""Course of the sparsity penalty in training: its warm-up, and powers that fall (p-annealing)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from endwise.common.axes import TokenMask
from endwise.dictionaries import Latents
from endwise.training.objectives import Objective, Sparsity

WINDOW = 10
"""Steps before a change of p over which both penalties are compared."""


class SparsitySchedule:
    """The penalty s·Σ|c|^p of each step: p falls in steps, and s is such that no change of p moves the mean penalty.

    At a change from p to q, s ← s·Σ|c|^p / Σ|c|^q, both summed over the tokens of up to `WINDOW` steps before it, so
    that λ means what it did (Karvonen et al. 2024, arXiv 2408.00113; dictionary_learning's `Lp^p`).

    Args:
        powers: p from each of `starts` on.
        starts: steps, ascending, the first 0.
        warm: steps over which the weight rises linearly from 0.
    """

    def __init__(
        self,
        term: Sparsity,
        powers: Sequence[float],
        starts: Sequence[int],
        warm: int = 0,
        window: int = WINDOW,
        device: torch.device | str = "cpu",
    ) -> None:
        self._term, self._powers, self._starts, self._warm, self._window = term, powers, starts, warm, window
        self.state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        """s, and the two sums."""
        self.seen = torch.zeros(2, dtype=torch.float64, device=device)
        """Amounts that the step adds to them."""

    @classmethod
    def of(cls, objective: Objective, steps: int, device: torch.device) -> "SparsitySchedule | None":
        """Plan the penalty of an objective over so many steps; None: it stays as it is."""
        term = next((each for each in objective.site_terms if isinstance(each, Sparsity)), None)
        if term is None or (term.p_end is None and not term.warmup):
            return None
        changes = {0: term.p}
        if term.p_end is not None:
            for number in range(1, term.p_changes + 1):
                share = number / term.p_changes
                changes[round(term.p_steps * steps * share)] = term.p + (term.p_end - term.p) * share
        return cls(term, list(changes.values()), list(changes), round(term.warmup * steps), device=device)

    def objective(self, objective: Objective, step: int) -> Objective:
        """Return the objective of the step after `step` others."""
        return Objective.of(self.term(step) if each is self._term else each for each in objective.terms)

    def term(self, step: int) -> Sparsity:
        """Return the penalty of the step after `step` others."""
        warm = min(1.0, step / self._warm) if self._warm else 1.0
        return replace(self._term, coefficient=self._term.coefficient * warm, p=self._power(step), scale=self.state[0])

    def see(self, step: int, latents: Latents, mask: TokenMask) -> None:
        """Compare the penalties of before and after the change that comes, if it is near."""
        change = next((start for start in self._starts if step < start <= step + self._window), None)
        if change is not None:
            with torch.no_grad():
                both = [latents.penalty(p, mask).sum() for p in (self._power(step), self._power(change))]
            self.seen += torch.stack(both)

    def after_step(self, step: int) -> None:
        """Follow the step after `step` others, once `seen` is that of all processes."""
        self.state[1:] += self.seen
        self.seen.zero_()
        if step + 1 in self._starts[1:]:
            now, then = self.state[1:].clone()
            self.state[0] *= (now / then).where((now > 0) & (then > 0), 1.0)
            self.state[1:] = 0

    def _power(self, step: int) -> float:
        return next(p for p, start in zip(reversed(self._powers), reversed(self._starts), strict=True) if start <= step)


def own_tensors(schedule: SparsitySchedule | None) -> dict[str, Tensor]:
    """Name what a checkpoint keeps of it."""
    return {} if schedule is None else {"sparsity": schedule.state}
