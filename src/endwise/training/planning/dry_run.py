"""A dry run on fake tensors: the peak memory of a training step, by component.

The language model is made from its configuration, on fake tensors, and the code that training runs is run on them
(`memory_trace`), so that nothing need state a second time what is alive at once. It follows two microbatches of two
passes, in which everything that repeats is met.

The dictionary's latents are dense here: half of a new dictionary is active. They become sparse as it learns, and memory
and operations fall.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from endwise.common.axes import Activation, AnyWidth, TokenMask
from endwise.common.errors import ConfigError
from endwise.common.seeds import generator_states
from endwise.config.places import PlacesConfig, Recipe
from endwise.config.run import TrainingConfig
from endwise.dictionaries import SAE, Latents
from endwise.evaluation.measure import residuals_after
from endwise.kernels import Divergence, Found, Unembedding, standing_in
from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import rows_per_chunk
from endwise.models.blocks import Block, find_blocks
from endwise.models.joint_pass import AtPlace, JointGradients, JointPass
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.loading import DTYPES
from endwise.models.readout import next_tokens
from endwise.models.sites import Part, Place, Site
from endwise.models.splicing import SplicedPass, sequences_at_a_time
from endwise.training.joint import JointTrainee
from endwise.training.objectives import OF_THE_PASS, Objective, SiteTerm, build_objective
from endwise.training.planning.flops import Stretch
from endwise.training.planning.memory_trace import Held, MemoryTrace
from endwise.training.planning.one_shard import planned_dictionary, whole_count
from endwise.training.planning.outline import outlines
from endwise.training.step import clean_passes
from endwise.training.tail_terms import Pulls
from endwise.training.trainee import Trainee

FOLLOWED = 2
"""Passes, microbatches, chunks of logits that are followed: in the second, all that the first leaves is there."""
MODEL, WEIGHTS, GRADIENTS, OPTIMISER = "language model", "SAE weights", "SAE gradients", "optimiser"
CLEAN, LATENTS, TAIL, READOUT = "clean pass", "SAE activations", "spliced tail", "readout"
INPUTS, SAVING, ALLOCATOR = "batch", "files in the making", "allocator and libraries"
ALLOCATOR_BYTES = 80 << 20
"""Held on a CPU beside tensors: glibc keeps freed blocks of up to 32 MiB and cannot use all of them again, and
libraries have buffers of their own. The middle of what measured peaks had beside tensors (docs/planning.md)."""
STEP, EVALUATION, CHECKPOINT = "training step", "evaluation", "checkpoint"


@dataclass(frozen=True)
class Piece:
    """One of a block's two stretches: attention, and the rest."""

    parameters: int
    stretch: Stretch


class DryRun:
    """A run on tensors without values.

    Args:
        sequences: of each batch in this process.
    """

    def __init__(self, config: Recipe, device: torch.device, sequences: int) -> None:
        self.config, self.device, self.sequences = config, device, sequences
        self.accumulation = config.training.accumulation
        mixed, on_gpu = config.training.precision == "mixed", device.type == "cuda"
        dtype = DTYPES[config.model.dtype or ("bfloat16" if mixed and on_gpu else "float32")]
        copied = mixed and dtype == torch.float32
        self.trace, models = outlines(config.model, (dtype, torch.bfloat16) if copied else (dtype,), MODEL)
        self.model, self.tail, trace = models[0], models[-1], self.trace
        self.joint = isinstance(config, PlacesConfig) and config.joint
        recipes = config.recipes if isinstance(config, PlacesConfig) else [config]
        self.recipes = sorted(recipes, key=lambda recipe: self.model.place(recipe.place))
        self.places = [self.model.place(recipe.place) for recipe in self.recipes]
        self.site = self.places[0].writes
        """Site where the (first) spliced pass begins."""
        with trace:
            self.objectives = self._objectives()
        self.context = _context(config, self.model)
        whole = self.joint and any(recipe.dictionary.batchwise for recipe in self.recipes[1:])
        at_a_time = sequences if whole else config.training.microbatch or sequences_at_a_time(self.context, device)
        self.microbatch = min(at_a_time, sequences // self.accumulation)
        with trace, trace.part(WEIGHTS):
            places = zip(self.recipes, self.places, strict=True)
            self.saes = [planned_dictionary(recipe, self.model, place) for recipe, place in places]
        self.kernels = _DenseKernels(trace, on_gpu)

    def _objectives(self) -> dict[Site, Objective]:
        """Objectives by the site where a spliced pass begins: what each spliced pass is compared by."""
        if self.joint:
            last = self.places[-1].writes
            return {self.site: build_objective(self.config.objective, self.model, self.site, OF_THE_PASS, last)}
        places = zip(self.recipes, self.places, strict=True)
        return {place.writes: build_objective(each.objective, self.model, place.writes) for each, place in places}

    @property
    def final(self) -> bool:
        """True if passes continue to the unembedding."""
        return any(objective.final for objective in self.objectives.values())

    def encodings(self) -> list[tuple[SAE, int]]:
        """Each dictionary, and how often it encodes a token: once more if it is inside a joint pass."""
        first = self.site
        later = [self.joint and first < place.writes and not place.reads < first for place in self.places]
        return [(sae, 1 + each) for sae, each in zip(self.saes, later, strict=True)]

    def _trainees(self, training: TrainingConfig) -> "list[_DryTrainee] | list[_DryJoint]":
        each = list(zip(self.saes, self.places, self.recipes, strict=True))
        known = (training, self.trace, self.device)
        if not self.joint:
            return [_DryTrainee(sae, place, self.objectives[place.writes], *known) for sae, place, _ in each]
        own = [build_objective(recipe.objective, self.model, self.site, (SiteTerm,)) for *_, recipe in each]
        parts = [_DryTrainee(sae, place, at, *known) for (sae, place, _), at in zip(each, own, strict=True)]
        assert isinstance(self.config, PlacesConfig)
        return [_DryJoint(parts, self.objectives[self.site], self.config.inputs, training.microbatch)]

    def stages(self, accumulation: int, microbatch: int, *, only_step: bool = False) -> dict[str, Held]:
        """Return what each stage (`STEP`, `EVALUATION`, and on a CPU `CHECKPOINT`) holds when it holds most."""
        training = self.config.training.model_copy(update={"microbatch": microbatch})
        with self.trace, standing_in("cpu", self.kernels):
            trainees = self._trainees(training)
            self._settle(trainees)
            found = {STEP: self._step(trainees, self.sequences // accumulation, accumulation)}
            if not only_step:
                self.trace.start()
                between = self.trace.peak()
                found[EVALUATION] = self._evaluation()
                if self.device.type == "cpu":
                    # The SAE as it is used; of shards the checkpoint too, else written as it lies.
                    copied = self.file_sizes()[0 if self.config.training.shards > 1 else 1]
                    found[CHECKPOINT] = Held({**between.parts, SAVING: copied}, SAVING)
            for trainee in trainees:
                trainee.leave()
        if self.device.type == "cpu":
            for held in found.values():
                held.parts[ALLOCATOR] = ALLOCATOR_BYTES
        return found

    def dictionary_flops(self) -> list[tuple[float, float]]:
        """Count each dictionary's operations on a token, latents dense and all features dead, as the step's code does
        them: of encoding and reconstructing; and of the gradients, with the terms at the site and its own.
        """
        sequences = self.sequences // self.accumulation
        training = self.config.training.model_copy(update={"microbatch": self.microbatch})
        counts: list[tuple[float, float]] = []
        with self.trace, standing_in("cpu", self.kernels):
            trainees = self._trainees(training)
            mask = torch.ones(sequences, self.context, dtype=torch.bool)
            for part in (part for trainee in trainees for part in trainee.parts):
                part.begin_step()
                values = {site: torch.zeros(*mask.shape, self.model.width(site)) for site in part.place.sites}
                with FlopCounterMode(display=False) as forward:
                    encoded = part.encode(values[part.place.reads], values[part.place.writes], mask)
                gradient = torch.zeros_like(encoded.reconstruction) if part.is_spliced else None
                with FlopCounterMode(display=False) as backward:
                    part.learn(encoded, mask, mask.sum(), gradient)
                counts.append((forward.get_total_flops() / mask.numel(), backward.get_total_flops() / mask.numel()))
            for trainee in trainees:
                trainee.leave()
        return counts

    def _settle(self, trainees: "Sequence[_DryTrainee | _DryJoint]") -> None:
        """Take a step without a gradient, after which the optimisers have their moments."""
        for trainee in trainees:
            trainee.begin_step()
        for sae in self.saes:
            for parameter in sae.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with self.trace.part(OPTIMISER):
            for trainee in trainees:
                trainee.finish_step(torch.ones(()), 0)

    def _step(self, trainees: "Sequence[_DryTrainee | _DryJoint]", sequences: int, passes: int) -> Held:
        with self.trace.part(INPUTS):
            tokens = torch.zeros(self.sequences, self.context, dtype=torch.int64)
            mask = torch.ones(self.sequences, self.context, dtype=torch.bool)
            count = mask.sum()
        rows = slice(0, sequences)
        self.trace.start()
        for trainee in trainees:
            trainee.begin_step()
        for _ in range(min(passes, FOLLOWED)):
            with self.trace.part(CLEAN):  # as in training, what the pass before recorded is still there meanwhile
                clean = clean_passes(self.model, self.tail, trainees, tokens[rows])
            with self.trace.part(LATENTS):
                for trainee in trainees:
                    trainee.accumulate(self.tail, clean[trainee.site], mask[rows], count)
        with self.trace.part(OPTIMISER):
            for trainee in trainees:
                trainee.finish_step(count, tokens.numel())
        return self.trace.peak()

    @torch.no_grad()
    def _evaluation(self) -> Held:
        """One batch of held-out text, as `evaluation.measure` goes through it."""
        settings = self.config.evaluation
        sequences = min(settings.batch, max(1, settings.during_training_tokens // self.context))
        later = residuals_after(self.model, self.site)
        with self.trace.part(INPUTS):
            tokens = torch.zeros(sequences, self.context, dtype=torch.int64)
            mask = torch.ones(sequences, self.context, dtype=torch.bool)
        self.trace.start()
        with self.trace.part(CLEAN):
            clean = self.model.clean(tokens, {*later, *(at for place in self.places for at in place.sites)}, final=True)
        finals = self._joint_final(clean, mask, later) if self.joint else self._finals(clean, mask)
        with self.trace.part(READOUT):
            assert clean.final is not None
            some = -(-FOLLOWED * self.kernels.rows_per_chunk(self.model.readout.unembedding) // self.context)
            rest = [*next_tokens(tokens[some:], mask[some:]), torch.zeros(5 * len(finals), mask[some:].numel())]
            self.model.readout.compare(clean.final[:some], [each[:some] for each in finals], tokens[:some], mask[:some])
            del rest
        return self.trace.peak()

    def _finals(self, clean: Clean, mask: TokenMask) -> list[Activation]:
        finals: list[Activation] = []
        for sae, place in zip(self.saes, self.places, strict=True):
            with self.trace.part(LATENTS):
                read = clean.activations[place.reads]
                latents = sae.encode(read)
                estimate = sae.reconstruct(latents, read)
                latents.fired(mask)
                latents.l0()
            with self.trace.part(TAIL):
                later = residuals_after(self.model, place.writes)
                spliced = SplicedPass(self.model, place.writes, later).run(clean, estimate, mask)
                assert spliced.final is not None
                finals.append(spliced.final)
        return finals

    def _joint_final(self, clean: Clean, mask: TokenMask, later: Sequence[Site]) -> list[Activation]:
        kept: list[Latents] = []
        places = zip(self.places, self.saes, strict=True)
        functions = {place: partial(_keeping, kept, sae) for place, sae in places}
        with self.trace.part(TAIL):
            spliced = JointPass(self.model, functions, later).run(clean, {}, mask).spliced
            assert spliced.final is not None
            return [spliced.final]

    def file_sizes(self) -> tuple[int, int]:
        """Bytes of a checkpoint and of the saved SAE, but for their headers."""
        weights = 4 * sum(map(whole_count, self.saes))
        counters = 4 * sum(len(list(sae.parameters())) for sae in self.saes)  # Adam's, one to a parameter
        generators = sum(state.nbytes for state in generator_states().values())
        return 3 * weights + counters + 8 * sum(sae.d_sae for sae in self.saes) + generators, weights

    @cached_property
    def pieces(self) -> list[Piece]:
        """Pieces of all blocks, in the order of computation."""
        config: Any = self.model.model.config.get_text_config()
        return [
            piece
            for layer, block in enumerate(find_blocks(self.model.model, self.model.n_layers))
            for piece in _pieces(block, layer, config)
        ]

    def pieces_before(self, site: Site) -> int:
        """Count the pieces that come before a site."""
        return 2 * site.layer + {Part.RESID_PRE: 0, Part.MLP_OUT: 2, Part.RESID_POST: 2}.get(site.part, 1)

    @property
    def end(self) -> int:
        """Number of pieces that the clean pass runs."""
        if self.final:
            return len(self.pieces)
        sites = [site for objective in self.objectives.values() for site in objective.sites]
        return max(map(self.pieces_before, [*(place.writes for place in self.places), *sites]))

    @property
    def unembedding(self) -> nn.Module:
        module = self.model.model.get_output_embeddings()
        assert isinstance(module, nn.Module)
        return module

    def embedding_parameters(self) -> int:
        """Count the parameters of all that comes before the blocks, less an embedding that is the unembedding too."""
        model = self.model.model
        tied = {id(parameter) for parameter in _parameters(self.unembedding)}
        first = id(next(iter(find_blocks(model, self.model.n_layers)[0].module.parameters())))
        count = 0
        for parameter in model.parameters():
            if id(parameter) == first:
                break
            count += 0 if id(parameter) in tied else parameter.numel()
        return count


class _DryTrainee(Trainee):
    """A trainee that says which part it is at, and skips microbatches like those before.

    Args:
        device: the one planned for.
    """

    def __init__(
        self,
        sae: SAE,
        place: Place,
        objective: Objective,
        config: TrainingConfig,
        trace: MemoryTrace,
        device: torch.device,
    ) -> None:
        with trace.part(OPTIMISER):
            super().__init__(sae, place, objective, config, 1)
        self.trace, self._planned = trace, device
        self._hooks = [each.register_post_accumulate_grad_hook(self._claim) for each in sae.parameters()]

    def leave(self) -> None:
        """Leave the SAE as it was."""
        for hook in self._hooks:
            hook.remove()
        self.sae.zero_grad(set_to_none=True)

    def _claim(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.trace.claim(parameter.grad, GRADIENTS)

    def products(self) -> torch.autocast:
        on_gpu = self._planned.type == "cuda"
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "mixed" and on_gpu)

    def _pulls(
        self, tail: LanguageModel, clean: Clean, reconstruction: Activation, target: Activation, mask: TokenMask
    ) -> Pulls:
        rows, count = slice(0, FOLLOWED * (self.config.microbatch or 1)), self.objective.backward_passes
        with self.trace.part(TAIL):
            rest = [torch.empty_like(reconstruction[rows.stop :]) for _ in range(count)]
            some = super()._pulls(tail, clean.rows(rows), reconstruction[rows], target[rows], mask[rows])
            sizes = some.sizes
            del rest, some
            return Pulls([torch.empty_like(reconstruction) for _ in range(count)], sizes)


class _DryJoint(JointTrainee):
    """Variant of `_DryTrainee` for several places that are spliced jointly."""

    def leave(self) -> None:
        for part in self.parts:
            assert isinstance(part, _DryTrainee)
            part.leave()

    def _joint_pass(
        self, tail: LanguageModel, clean: Clean, values: Mapping[Site, AnyWidth], mask: TokenMask
    ) -> JointGradients:
        part = self.parts[0]
        assert isinstance(part, _DryTrainee)
        rows = slice(0, FOLLOWED * (self.microbatch or 1))
        some = {site: value[rows] for site, value in values.items()}
        with part.trace.part(TAIL):
            rest = [torch.empty_like(value[rows.stop :]) for value in values.values()]
            found = super()._joint_pass(tail, clean.rows(rows), some, mask[rows])
            del rest
            return JointGradients(
                {site: torch.empty_like(values[site]) for site in found.values},
                found.parameters,
                {place: _as_long_as(mask, at) for place, at in found.at.items()},
            )


def _as_long_as(mask: TokenMask, at: AtPlace) -> AtPlace:
    read, found, value = (torch.empty(*mask.shape, each.shape[-1]) for each in (at.read, at.found, at.value))
    return AtPlace(read, read if at.found is at.read else found, value)


def _keeping(kept: list[Latents], sae: SAE, x: Activation, mask: TokenMask) -> Activation:
    """Reconstruct, and hold the latents until all have been compared, as evaluation does."""
    latents = sae.encode(x)
    latents.fired(mask)
    kept.append(latents)
    return sae.reconstruct(latents, x)


class _DenseKernels(EagerKernels):
    """Latents of a dictionary too active for sparse ones, with the planned device's chunks."""

    def __init__(self, trace: MemoryTrace, on_gpu: bool) -> None:
        self._trace, self._on_gpu = trace, on_gpu

    def rows_per_chunk(self, unembedding: Unembedding) -> int:
        return rows_per_chunk(*unembedding.weight.shape, on_gpu=self._on_gpu)

    def active(self, x: Tensor, weight: Tensor, bias: Tensor, limit: int, above: Tensor | None = None) -> Found | None:
        return None

    def largest(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, limit: int) -> Found | None:
        return None

    def kl(self, clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding) -> Divergence:
        with self._trace.part(READOUT):
            return super().kl(clean, spliced, keep, unembedding)


def _context(config: Recipe, model: LanguageModel) -> int:
    context = config.data.context or model.context
    if context is None:
        raise ConfigError("The model names no longest context. Set data.context, the tokens per sequence.")
    if model.context is not None and context > model.context:
        raise ConfigError(
            f"data.context is {context}, but the model takes at most {model.context} positions. Lower it."
        )
    return context


def _pieces(block: Block, layer: int, config: Any) -> tuple[Piece, Piece]:
    """A block's attention and the rest of it. All that has two axes is a matrix that every token is multiplied with; of
    what has three, which are experts, a token meets a few.
    """
    attention = None if block.attention is None else block.attention.compute
    own = {id(parameter) for parameter in _parameters(attention)}
    rest = [parameter for parameter in block.module.parameters() if id(parameter) not in own]
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    return (
        Piece(
            _count(attention),
            Stretch(_multiplied(_parameters(attention), config), width if own else 0, _window(config, layer)),
        ),
        Piece(sum(parameter.numel() for parameter in rest), Stretch(_multiplied(rest, config))),
    )


def _multiplied(parameters: list[nn.Parameter], config: Any) -> int:
    matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
    experts = sum(parameter.numel() // len(parameter) for parameter in parameters if parameter.ndim == 3)
    return matrices + experts * (getattr(config, "num_experts_per_tok", None) or 1)


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None and kinds[layer] not in ("sliding_attention", "local"):
        return None
    return getattr(config, "sliding_window", None) or (getattr(config, "window_size", None) if kinds else None)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in _parameters(module))
