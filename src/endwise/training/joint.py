"""Several dictionaries of one model in training for one loss: all reconstructions are in place in one spliced pass."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from endwise.common.axes import AnyWidth, TokenMask, Tokens
from endwise.common.errors import ConfigError
from endwise.common.processes import World
from endwise.config.places import Inputs
from endwise.config.run import TrainingConfig
from endwise.dictionaries import Latents, at_inference
from endwise.models.joint_pass import JointGradients, JointPass, JointRows
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.readout import Readout
from endwise.models.sites import Place, Site
from endwise.models.splicing import Scalar
from endwise.runs.checkpoints import Checkpoint
from endwise.training.course import Course, Phases
from endwise.training.objectives import LaterLatents, Objective
from endwise.training.trainee import Met, Trainee, all_or_none, harmless, not_finite

OF_THE_PASS = "pass."
"""Prefix of what a checkpoint has of the pass."""
SHARED_TENSORS = "random."
"""Prefix of what a checkpoint has one of, whatever the number of places: the states of generators."""


class JointTrainee:
    """Dictionaries at several places, with what trains them.

    Each place is a `Trainee` with its terms at the site, optimiser and counters. Terms of the pass are here: their
    gradient is that of one spliced pass in which each dictionary encodes what the model computes with the earlier
    reconstructions in place. Dictionaries that read what none of the others changes (*heads*) encode all sequences of a
    pass at once, as in a run of one place; the others encode a microbatch at a time, inside the pass, and once more for
    their own terms. Running statistics of a dictionary, and what is fitted after the last step (thresholds), are of the
    latents that are spliced; L0, and what has fired, of those that its own terms are computed on.

    Args:
        parts: in any order.
        objective: the terms of the pass.
        inputs: what each place's own terms are computed on.
        microbatch: sequences at a time in the spliced pass; None: `sequences_at_a_time`.

    Raises:
        ConfigError: a term compares later places, and there is none; a dictionary resamples features by the losses of
            tokens, of which a joint pass has none for one place.
    """

    def __init__(
        self, parts: Sequence[Trainee], objective: Phases, inputs: Inputs, microbatch: int | None = None
    ) -> None:
        self.parts = sorted(parts, key=lambda part: part.place)
        self.inputs, self.microbatch = inputs, microbatch
        self.course = Course(objective, self.config, self.total_steps, self.device)
        objectives = [phase.objective for phase in self.course.phases]
        first = self.parts[0].site
        self._heads = [part for part in self.parts if part.place.reads < first or part is self.parts[0]]
        self._later = [part for part in self.parts if part not in self._heads]
        of_places = [term.name for each in objectives for term in each.places_terms]
        if of_places and not self._later:
            raise ConfigError(
                f"objective.terms.{of_places[0]} compares latents of places that read what an "
                f"earlier one has changed, which is not so at {', '.join(part.place.name for part in self.parts)}. "
                "Leave it out, or add a later place."
            )
        for part in self.parts:
            part.join(self.course)
            if part.sae.wants_losses(part.total_steps):
                raise ConfigError(
                    f"dictionary.resample_at at {part.place.name}: a joint loss is not the loss of one place, which "
                    "resampling needs. Leave it out, or set joint: false."
                )
        names = dict.fromkeys(term.name for each in objectives for term in each.terms)
        self._sums = {name: torch.zeros((), device=self.device) for name in names}
        self._first_bad = torch.full((len(self._sums),), -1, dtype=torch.int64, device=self.device)
        self._latents: dict[Place, Latents] = {}
        """Latents of the microbatch that is in the pass."""

    @property
    def objective(self) -> Objective:
        """Terms of the pass in the step that comes, or is being taken."""
        return self.course.objective(self.step)

    @property
    def config(self) -> TrainingConfig:
        return self.parts[0].config

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def step(self) -> int:
        return self.parts[0].step

    @property
    def tokens(self) -> int:
        return self.parts[0].tokens

    @property
    def total_steps(self) -> int:
        return self.parts[0].total_steps

    @property
    def site(self) -> Site:
        """Site where the spliced pass begins."""
        return self.parts[0].site

    @property
    def sites(self) -> set[Site]:
        """Sites that the clean pass records for the places."""
        return {site for part in self.parts for site in part.place.sites}

    @property
    def later_sites(self) -> set[Site]:
        """Sites recorded after `site` besides, by the model that runs the spliced pass."""
        return {*self.objective.sites, *(site for site in self.sites if self.site < site)}

    def begin_step(self) -> None:
        for part in self.parts:
            part.begin_step()
        for total in self._sums.values():
            total.zero_()

    def accumulate(self, tail: LanguageModel, clean: Clean, mask: TokenMask, tokens_in_step: Tensor) -> None:
        """Add the gradient of some of the step's sequences: see `Trainee.accumulate`."""
        with all_or_none([part.sae for part in self.parts]):
            heads = {part.place: part.encode(*part.meets(clean), mask) for part in self._heads}
            values = {place.writes: encoded.reconstruction for place, encoded in heads.items()}
            found = self._joint_pass(tail, clean, values, mask)
        for part in self._heads:
            part.learn(heads.pop(part.place), mask, tokens_in_step, found.values.get(part.site))
        for part in self._later:
            at = found.at.get(part.place)
            read, target = (at.read, at.found) if at and self.inputs == "spliced" else part.meets(clean)
            gradient = at.value if at and self.objective.terms else None
            with part.sae.aside() if at else nullcontext():
                encoded = part.encode(read, target, mask)
            part.learn(encoded, mask, tokens_in_step, gradient, is_in=True)
        for parameter, gradient in zip(self._later_parameters(), found.parameters, strict=bool(found.parameters)):
            own = gradient / tokens_in_step
            parameter.grad = own if parameter.grad is None else parameter.grad + own
        self._latents.clear()

    @property
    def _runs_pass(self) -> bool:
        return bool(self.objective.terms) or (self.inputs == "spliced" and bool(self._later))

    def before(self, part: Trainee) -> list[Trainee]:
        """Return those whose reconstructions are in place where a part reads in the pass; without a pass, none."""
        if not self._runs_pass or part in self._heads:
            return []
        return [each for each in self.parts if each.place < part.place]

    def _later_parameters(self) -> list[Tensor]:
        return [parameter for part in self._later for parameter in part.sae.parameters()]

    def _joint_pass(
        self, tail: LanguageModel, clean: Clean, values: Mapping[Site, AnyWidth], mask: TokenMask
    ) -> JointGradients:
        """The pass, where anything asks for it: a term, or places' own terms on spliced inputs.

        Args:
            values: the heads' reconstructions.
        """
        terms = bool(self.objective.terms)
        if not self._runs_pass:
            return JointGradients({}, [], {})
        record = {*self.objective.sites, *([self.parts[-1].site] if self._later else [])}
        functions = {part.place: partial(self._reconstruct, part) for part in self._later}
        joint = JointPass(tail, functions, sorted(record), self.objective.final, self.microbatch)
        parameters = self._later_parameters() if terms else []
        if terms:
            return joint.gradients(clean, values, mask, partial(self._loss, tail.readout), parameters)
        with torch.no_grad():
            met = joint.gradients(clean, values, mask, partial(self._loss, tail.readout))
        return JointGradients({}, [], met.at)

    def _reconstruct(self, part: Trainee, x: AnyWidth, mask: TokenMask) -> AnyWidth:
        x = harmless(x, mask)
        with part.products(), part.rooms.in_use():
            latents = self._latents[part.place] = part.sae.encode(x, mask)
            return part.sae.spliced(latents, x) if part.is_spliced else part.sae.reconstruct(latents, x)

    def _loss(self, readout: Readout, rows: JointRows) -> Scalar:
        loss = torch.zeros((), device=rows.mask.device)
        totals = [term.total(readout, rows.clean, rows.spliced, rows.mask) for term in self.objective.spliced_terms]
        if self.objective.places_terms:
            latents = [self._later_latents(part, rows) for part in self._later]
            totals += [term.total(latents, rows.mask) for term in self.objective.places_terms]
        for term, total in zip(self.objective.terms, totals, strict=True):
            self._sums[term.name] += total.detach()
            loss = loss + term.coefficient * total
        return loss

    def _later_latents(self, part: Trainee, rows: JointRows) -> LaterLatents:
        with torch.no_grad(), part.products(), part.rooms.in_use(), part.sae.aside():
            clean = part.sae.encode(harmless(rows.clean.activations[part.place.reads], rows.mask), rows.mask)
        return LaterLatents(clean, self._latents[part.place], part.sae.d_in)

    def add_up(self, world: World) -> None:
        """See `Trainee.add_up`."""
        for part in self.parts:
            part.add_up(world)
        if self._sums:
            sums = torch.stack(list(self._sums.values()))
            world.add([sums])
            for own, total in zip(self._sums.values(), sums, strict=True):
                own.copy_(total)

    def finish_step(self, tokens_in_step: Tensor, tokens: int) -> None:
        """Variant of `Trainee.finish_step`: a non-finite number at one place, or in the pass, keeps all weights."""
        found = [part.found_bad() for part in self.parts]
        if self._sums:
            bad = ~torch.isfinite(torch.stack(list(self._sums.values())))
            self._first_bad = torch.where(bad & (self._first_bad < 0), self.step, self._first_bad)
            found.append((self._first_bad >= 0).any())
        for part in self.parts:
            part.update(torch.stack(found).any(), tokens_in_step, tokens)
        for total in self._sums.values():
            total /= tokens_in_step

    def report(self) -> dict[str, Any]:
        """The latest step's numbers, per token: those of the pass, and under `places` each place's own. `l0` and
        `alive` are sums over the places.

        Raises:
            NotFinite: a number was not finite at some step since the last report.
        """
        if (bad := self._earliest_bad()) is not None:
            for part in self.parts:
                part.go_back(bad[0])
            raise not_finite(*bad)
        terms = self.course.objective(self.step - 1).terms
        of_pass = {term.name: float(self._sums[term.name]) for term in terms}
        places = {part.place.name: part.values() for part in self.parts}
        weighted = [term.coefficient * of_pass[term.name] for term in terms]
        for part in self.parts:
            weighted += part.weighted(places[part.place.name])
        own = {part.place.name: {**places[part.place.name], "alive": int(part.alive())} for part in self.parts}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "learning_rate": float(self.parts[0].optimizer.param_groups[0]["lr"]),
            "loss": sum(weighted),
            **self.course.named(self.step - 1),
            **of_pass,
            "l0": sum(each["l0"] for each in own.values()),
            "alive": sum(each["alive"] for each in own.values()),
            "places": own,
        }

    def _earliest_bad(self) -> tuple[int, str] | None:
        bad = [(step, name) for step, name in zip(self._first_bad.tolist(), self._sums, strict=True) if step >= 0]
        of_parts = ((part.first_bad(), part.place) for part in self.parts)
        bad += [(found[0], f"{found[1]} at {place}") for found, place in of_parts if found is not None]
        return min(bad, key=lambda each: each[0], default=None)

    def checkpoint(self) -> Checkpoint:
        """Variant of `Trainee.checkpoint`; each place's tensors have its name in front."""
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            for name, tensor in part.checkpoint().tensors.items():
                tensors[name if name.startswith(SHARED_TENSORS) else f"{part.place}:{name}"] = tensor
        tensors |= {f"{OF_THE_PASS}{name}": tensor for name, tensor in self.course.tensors().items()}
        return Checkpoint(tensors, self.parts[0].checkpoint().state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Trainee.restore`."""
        shared = {name: each for name, each in checkpoint.tensors.items() if name.startswith(SHARED_TENSORS)}
        for part in self.parts:
            start = f"{part.place}:"
            own = {n.removeprefix(start): each for n, each in checkpoint.tensors.items() if n.startswith(start)}
            part.restore(Checkpoint({**own, **shared}, checkpoint.state))
        self.course.restore({name.removeprefix(OF_THE_PASS): each for name, each in checkpoint.tensors.items()})


def spliced_before(trainee: "AnyTrainee", part: Trainee) -> list[Trainee]:
    """Return those of a trainee's parts whose reconstructions are in place where one of them reads."""
    return trainee.before(part) if isinstance(trainee, JointTrainee) else []


def met_in_use(trainee: "AnyTrainee", part: Trainee, model: LanguageModel, tokens: Tokens, mask: TokenMask) -> Met:
    """Return what one of a trainee's parts meets outside training, where those that it is spliced with are in place."""
    if not (earlier := spliced_before(trainee, part)):
        return part.meets(model.clean(tokens, record=part.place.sites))
    record = {site for each in earlier for site in each.place.sites}
    joint = JointPass(model, {each.place: partial(_as_used, each) for each in earlier}, part.place.sites, final=False)
    with torch.no_grad(), at_inference(each.sae for each in earlier):
        spliced = joint.run(model.clean(tokens, record=record), {}, mask).spliced.activations
    return spliced[part.place.reads], spliced[part.place.writes]


def _as_used(part: Trainee, x: AnyWidth, _mask: TokenMask) -> AnyWidth:
    return part.sae.reconstruct(part.sae.encode(x), x)


AnyTrainee = Trainee | JointTrainee
"""Trainee that takes a step: the dictionary of one place, or those of several."""
