"""One SAE in training: its weights, objective, optimiser and counters, and the step that joins them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from endwise.common.axes import Activation, AnyWidth, TokenMask
from endwise.common.errors import NotFinite
from endwise.common.processes import World
from endwise.common.seeds import generator_states, restore_generators
from endwise.config.run import TrainingConfig
from endwise.dictionaries import SAE, Latents, TrainingPass
from endwise.kernels import Rooms
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.sites import Place, Site
from endwise.models.splicing import SplicedPass
from endwise.runs.checkpoints import Checkpoint, check_fits, optimizer_tensors, restore_optimizer
from endwise.training.course import Course, Phases
from endwise.training.objectives import Objective
from endwise.training.sparsity import coefficient_of
from endwise.training.tail_terms import Pulls, balanced, pulls

CLIP_EPSILON = 1e-6
"""Constant of `torch.nn.utils.clip_grad_norm_`."""
DEAD_SHARE = 20
"""Training is so many times as long as a feature may be silent before it counts as dead, unless a recipe says."""
LEFT_OUT = "left_out"
"""Share of a step's tokens that count in the batch which is left out for its norm (`SAE.norm_limit`)."""
UNCHECKED = ("optimizer.", "random.cuda.")
"""A checkpoint's tensors that a run that is resumed from it may not have yet, or has more or fewer of."""


Met = tuple[AnyWidth, AnyWidth]
"""Activations: what is read at a place, and what is to be written."""


@dataclass(frozen=True)
class Encoded:
    """The SAE's pass over a batch, its graph still open."""

    read: AnyWidth
    target: AnyWidth
    """Activation that the reconstruction stands for."""
    latents: Latents
    reconstruction: Activation
    nested: Sequence[Activation]
    """See `SAE.nested`; `reconstruction` alone where it has none, or no term reads them."""


class Trainee:
    """An SAE at its place, with what trains it.

    Sums over a batch (loss terms, L0) stay on the device until `report` reads them, so that a step never waits for it.
    """

    def __init__(
        self, sae: SAE, place: Place | Site, objective: Phases, config: TrainingConfig, total_steps: int
    ) -> None:
        self.sae, self.place, self.config, self.total_steps = sae.train(), Place.of(place), config, total_steps
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
        self.step, self.tokens = 0, 0
        self.rooms, device = Rooms(), sae.b_enc.device
        self.course = self._pass = Course(objective, config, total_steps, device)
        self.last_fired = torch.full((sae.d_sae,), -1, dtype=torch.int64, device=device)
        """Training tokens seen when each feature last fired; -1: never."""
        objectives = [phase.objective for phase in self.course.phases]
        names = dict.fromkeys(term.name for each in objectives for term in each.terms)
        self._terms = [*names, *sae.own_weights]
        """Every term of any phase, the dictionary's own included."""
        self._per_token = [*self._terms, "l0"]
        self._watched = [*self._terms, "gradient_norm"]
        self._first_bad = torch.full((len(self._watched),), -1, dtype=torch.int64, device=device)
        """Step at which each watched number was first not finite; -1: never."""
        further = ["gradient_norm"] if sae.norm_limit is None else ["gradient_norm", LEFT_OUT]
        further += self.course.columns
        further += [coefficient_of(term.name) for each in objectives if each.balance for term in each.spliced_terms]
        self._sums = {name: torch.zeros((), device=device) for name in [*self._per_token, *further]}
        self._fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=device)

    @property
    def site(self) -> Site:
        """Site whose activation the reconstruction stands for."""
        return self.place.writes

    @property
    def parts(self) -> "list[Trainee]":
        """The dictionaries in training: this one."""
        return [self]

    @property
    def sites(self) -> set[Site]:
        """Sites that the clean pass records for the place."""
        return set(self.place.sites)

    @property
    def later_sites(self) -> set[Site]:
        """Sites recorded after `site` besides, by the model that runs the spliced pass."""
        return set(self.objective.sites)

    @property
    def device(self) -> torch.device:
        return self.last_fired.device

    @property
    def microbatch(self) -> int | None:
        """Sequences at a time in the spliced pass; None: `sequences_at_a_time`."""
        return self.config.microbatch

    @property
    def objective(self) -> Objective:
        """Objective of the step that comes, or is being taken."""
        return self.course.objective(self.step)

    @property
    def is_spliced(self) -> bool:
        """True if the reconstruction goes into a spliced pass in the step that comes, or is being taken."""
        objective = self._pass.objective(self.step)
        return bool(objective.spliced_terms or objective.places_terms)

    def join(self, course: Course) -> None:
        """Go into the pass of several places, whose terms are those of its own course."""
        self._pass = course

    def begin_step(self) -> None:
        self.course.prepare(self.optimizer, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.begin_step(self.step / self.total_steps)
        for total in self._sums.values():
            total.zero_()
        self._fired.zero_()

    def accumulate(self, tail: LanguageModel, clean: Clean, mask: TokenMask, tokens_in_step: Tensor) -> None:
        """Add the gradient of some of the step's sequences.

        The spliced pass runs on a detached copy of the reconstruction, one microbatch after another; its gradient there
        then enters the SAE together with the site terms' gradient, in one backward pass. Memory is bounded by one
        microbatch of the model's tail.

        Args:
            tail: the model that runs the spliced pass, and that ran the clean pass after the site.
        """
        objective, gradient, found = self.objective, None, None
        with all_or_none([self.sae], also=objective.balance is not None):
            encoded = self.encode(*self.meets(clean), mask)
            if objective.spliced_terms:
                found = self._pulls(tail, clean, encoded.reconstruction, encoded.target, mask)
        if found is not None:
            gradient, weights = balanced(objective, found, self.sae.world.replicas)
            for name, weight in weights.items():
                self.see(coefficient_of(name), weight)
        self.learn(encoded, mask, tokens_in_step, gradient)

    def meets(self, clean: Clean) -> Met:
        """Return what is read and what is to be written in a pass without reconstructions."""
        return clean.activations[self.place.reads], clean.activations[self.place.writes]

    def encode(self, read: AnyWidth, target: AnyWidth, mask: TokenMask) -> Encoded:
        same = read is target
        read = harmless(read, mask)
        target = read if same else harmless(target, mask)
        with self.products(), self.rooms.in_use():
            latents = self.sae.encode(read, mask)
            nested = self.sae.nested(latents, read) if self.objective.site_terms else ()
            if self.is_spliced:
                reconstruction = self.sae.spliced(latents, read)
            else:
                reconstruction = nested[-1] if nested else self.sae.reconstruct(latents, read)
        return Encoded(read, target, latents, reconstruction, nested or [reconstruction])

    def learn(
        self, encoded: Encoded, mask: TokenMask, tokens: Tensor, gradient: Activation | None = None, is_in: bool = False
    ) -> None:
        """Add the gradient of the terms at the site and of the dictionary's own, and count what fired.

        Args:
            tokens: of the step.
            gradient: of the spliced terms' sum at the reconstruction; None: there are none.
            is_in: it is in the weights' gradient already.
        """
        loss = self._site_loss(encoded, encoded.target, mask)
        self.course.see(self.step, encoded.latents, mask)
        if self.sae.own_weights:
            pair = (encoded.latents, encoded.reconstruction)
            at_site = _gradient_at(encoded.reconstruction, loss) if self.sae.wants_gradient else None
            seen = TrainingPass(encoded.read, encoded.target, *pair, mask, self.dead(), gradient, at_site)
            loss = loss + self._own_loss(seen)
        outputs = [loss / tokens] if loss.requires_grad else []
        gradients: list[Tensor | None] = [None] * len(outputs)
        if gradient is not None and not is_in:
            outputs.append(encoded.reconstruction)
            gradients.append(gradient / tokens)
        if outputs:
            torch.autograd.backward(outputs, gradients)
        self._sums["l0"] += encoded.latents.l0().where(mask, 0.0).sum()
        self._fired |= encoded.latents.fired(mask)

    def products(self) -> torch.autocast:
        """Context for the SAE's products. Mixed precision takes bf16 on a GPU. On a CPU that would change what is
        active, and win little: sparse latents leave one product, which is screened in bf16 where that is fast.
        """
        device = self.sae.b_enc.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "mixed" and device == "cuda")

    def _site_loss(self, encoded: Encoded, target: AnyWidth, mask: TokenMask) -> Float[Tensor, ""]:
        loss = target.new_zeros(())
        for term in self.objective.site_terms:
            totals = [term.total(target, each, encoded.latents, mask) for each in encoded.nested]
            total = totals[0] if len(totals) == 1 else torch.stack(totals).mean()
            self._sums[term.name] += total.detach()
            loss = loss + term.weight * total
        return loss

    def _own_loss(self, seen: TrainingPass) -> Float[Tensor, ""]:
        """The dictionary's own terms, which see the spliced terms' gradient where there is one."""
        loss, own = seen.target.new_zeros(()), self.sae.own_terms(seen)
        for name, weight in self.sae.own_weights.items():
            self._sums[name] += own[name].detach()
            loss = loss + weight * own[name]
        return loss

    def _pulls(
        self, tail: LanguageModel, clean: Clean, reconstruction: Activation, target: Activation, mask: TokenMask
    ) -> Pulls:
        """Go through the tail and back. Masked positions keep their own activation."""
        objective = self.objective
        spliced = SplicedPass(tail, self.site, objective.sites, objective.final, self.config.microbatch)
        return pulls(spliced, objective, clean, reconstruction, target, mask, self.see)

    def see(self, name: str, total: Tensor) -> None:
        """Add to a number of the step."""
        self._sums[name] += total

    def add_up(self, world: World) -> None:
        """Add up over the processes what each accumulated: gradients, sums, and which features fired."""
        names, fired = list(self._per_token), self._fired.int()
        sums = torch.stack([self._sums[name] for name in names])
        scheduled = [schedule.seen for schedule in self.course.schedules]
        world.add([*self._gradients(), *self.sae.step_statistics(), sums, fired, *scheduled])
        for name, total in zip(names, sums, strict=True):
            self._sums[name].copy_(total)
        self._fired = fired > 0

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]

    def finish_step(self, tokens_in_step: Tensor, tokens: int) -> None:
        """Clip, check, update. A step with a number that is not finite changes no weight, nor does any later one."""
        self.update(self.found_bad(), tokens_in_step, tokens)

    def found_bad(self) -> Tensor:
        """Return whether a number was not finite at this step, or at any since the last report."""
        self._norm = _norm_of(self._gradients(), self.sae.world.shards)
        self._sums["gradient_norm"] += self._norm
        bad = ~torch.isfinite(torch.stack([self._sums[name] for name in self._watched]))
        self._first_bad = torch.where(bad & (self._first_bad < 0), self.step, self._first_bad)
        return (self._first_bad >= 0).any()

    def update(self, bad: Tensor, tokens_in_step: Tensor, tokens: int) -> None:
        """Take the step, unless `bad`."""
        # Fused optimisers divide by `grad_scale` as they read the gradient, and skip a step on the device when
        # `found_inf` is 1, without the host having to look.
        found_inf = bad.float()
        grad_scale = ((self._norm + CLIP_EPSILON) / (self.config.gradient_clip or float("inf"))).clamp_min(1.0)
        self.optimizer.found_inf, self.optimizer.grad_scale = found_inf, grad_scale.float()  # type: ignore[pyrefly:missing-attribute]
        self.optimizer.step()
        self.sae.after_step()
        for name in self._per_token:
            self._sums[name] /= tokens_in_step
        self.course.after_step(self.step, self._sums, found_inf == 0)
        self.step += 1
        self.tokens += tokens
        self.last_fired.masked_fill_(self._fired & (found_inf == 0), self.tokens)

    def alive(self) -> Tensor:
        """Number of features that fired within the window of latest training tokens (`training.alive_window`)."""
        return ((self.last_fired >= 0) & (self.tokens - self.last_fired < self.config.alive_window)).sum()

    def dead(self) -> Tensor:
        """Features that have fired on none of the latest tokens; in the first of training, none."""
        window = self.sae.dead_window or min(self.config.alive_window, self.config.tokens // DEAD_SHARE)
        return self.tokens - self.last_fired.clamp_min(0) >= max(window, 1)

    def report(self) -> dict[str, float | int]:
        """The latest step's numbers, per token; waits for the device.

        Raises:
            NotFinite: a number was not finite at some step since the last report.
        """
        if (found := self.first_bad()) is not None:
            self.go_back(found[0])
            raise not_finite(*found)
        values = self.values()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "loss": sum(self.weighted(values)),
            **self.course.named(self.step - 1),
            **values,
            "alive": int(self.alive()),
        }

    def first_bad(self) -> tuple[int, str] | None:
        """The first step at which a number was not finite, and its name: of one step's, a term before its gradient."""
        first_bad = self._first_bad.tolist()
        failed = [(step, name) for step, name in zip(first_bad, self._watched, strict=True) if step >= 0]
        return min(failed, key=lambda failure: failure[0], default=None)

    def go_back(self, step: int) -> None:
        """Count the steps and tokens that the weights have seen, which stand where they were before a bad step."""
        self.tokens, self.step = self.tokens * step // self.step, step

    def values(self) -> dict[str, float]:
        """The latest step's sums, per token, of the terms that it had; waits for the device."""
        missing = set(self._terms) - set(self._weights())
        without = missing | set(map(coefficient_of, missing | self.course.unbalanced(self.step - 1)))
        return {name: float(total) for name, total in self._sums.items() if name not in without}

    def _weights(self) -> dict[str, float]:
        """Weight of every term of the latest step, the dictionary's own included."""
        return {e.name: e.coefficient for e in self.course.objective(self.step - 1).terms} | dict(self.sae.own_weights)

    def weighted(self, values: Mapping[str, float]) -> list[float]:
        """The loss, term by term."""
        return [values.get(coefficient_of(name), weight) * values[name] for name, weight in self._weights().items()]

    def checkpoint(self) -> Checkpoint:
        """Everything that training is resumed from. The place in the data and in the schedule is the step."""
        weights = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        optimizer = optimizer_tensors(self.optimizer, self.sae)
        state = {
            "phase": "finished" if self.step == self.total_steps else "training",
            "step": self.step,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
        }
        own = {"last_fired": self.last_fired, **self.course.tensors(), **generator_states()}
        return Checkpoint({**weights, **optimizer, **own}, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back as it was at a checkpoint, the generators that all code shares included."""
        tensors, own = checkpoint.tensors, self.checkpoint().tensors
        check_fits(checkpoint, {name: own[name] for name in own if not name.startswith(UNCHECKED)}, self.total_steps)
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        restore_optimizer(self.optimizer, self.sae, tensors)
        self.last_fired = tensors["last_fired"].to(self.last_fired.device)
        self.course.restore(tensors)
        self.step, self.tokens = checkpoint.state["step"], checkpoint.state["tokens"]
        restore_generators(tensors)


def _norm_of(gradients: Sequence[Tensor], shards: World) -> Float[Tensor, ""]:
    """L2 norm of the gradients of all shards together."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm if shards.size == 1 else torch.linalg.vector_norm(shards.stack(norm))


def _gradient_at(reconstruction: Activation, loss: Float[Tensor, ""]) -> Activation | None:
    """Gradient of a loss whose graph is kept; None: it does not depend on the reconstruction."""
    if not loss.requires_grad:
        return None
    (found,) = torch.autograd.grad(loss, reconstruction, retain_graph=True, allow_unused=True)
    return found


def all_or_none(saes: Sequence[SAE], also: bool = False) -> AbstractContextManager[None]:
    """Context in which what fails in one process fails in all, where one of the dictionaries then sums over them, or
    something else does.
    """
    world = next((sae.world for sae in saes if sae.world.size > 1 and (also or sae.sums_as_it_learns)), None)
    return nullcontext() if world is None else world.together("a pass of training")


def not_finite(step: int, name: str) -> NotFinite:
    """Say which number of the step after `step` others was not finite."""
    return NotFinite(
        f"At step {step + 1} the term {name} was not finite (NaN or infinity); the weights are kept as they were "
        "before it. Start again with a lower training.learning_rate or training.gradient_clip; or check the data there."
    )


def harmless(activation: Activation, mask: TokenMask) -> Activation:
    """The activation, with zeros in those masked rows whose squares are not finite: the gradient that they add to the
    weights, 0 times what they hold, would be NaN.
    """
    largest = torch.finfo(torch.float32).max ** 0.5
    harmless = mask | (activation.abs().amax(-1) < largest)
    return activation.where(harmless[..., None], 0.0)
