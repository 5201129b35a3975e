"""A run on tensors without values: what the step that training takes holds in memory, and of what it consists.

The language model is made from its configuration, on fake tensors, and the code that training runs is run on them
(`memory_trace`), so that what is alive at once need not be said a second time. Followed are two microbatches of two
passes, in which everything that repeats is met.

The dictionary's latents are dense here: half of a new dictionary is active. On a CPU they become sparse as it learns,
and memory and operations fall.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from endwise.common.axes import Activation, TokenMask
from endwise.common.errors import ConfigError
from endwise.common.seeds import generator_states
from endwise.config.run import RunConfig, TrainingConfig
from endwise.dictionaries import SAE
from endwise.evaluation.measure import residuals_after
from endwise.kernels import Divergence, Found, Unembedding, standing_in
from endwise.kernels.eager import EagerKernels
from endwise.kernels.interface import rows_per_chunk
from endwise.models.blocks import Block, find_blocks
from endwise.models.language_model import Clean, LanguageModel
from endwise.models.loading import DTYPES
from endwise.models.sites import Part, Place, Site
from endwise.models.splicing import SplicedPass, clean_by_tail, sequences_at_a_time
from endwise.training.objectives import Objective, build_objective
from endwise.training.planning.flops import Stretch
from endwise.training.planning.memory_trace import Held, MemoryTrace
from endwise.training.planning.outline import outline_model
from endwise.training.setup import new_dictionary
from endwise.training.trainee import Trainee

FOLLOWED = 2
"""Passes, and microbatches of a pass, that are followed: in the second, all that the first leaves behind is there."""
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

    def __init__(self, config: RunConfig, device: torch.device, sequences: int) -> None:
        self.config, self.device, self.sequences = config, device, sequences
        self.accumulation = config.training.accumulation
        mixed, on_gpu = config.training.precision == "mixed", device.type == "cuda"
        dtype = DTYPES[config.model.dtype or ("bfloat16" if mixed and on_gpu else "float32")]
        self.trace = trace = MemoryTrace()
        with trace.part(MODEL):
            self.model = outline_model(config.model, dtype, trace)
            copied = mixed and dtype == torch.float32
            self.tail = outline_model(config.model, torch.bfloat16, trace) if copied else self.model
        self.place = self.model.place(config.place)
        self.site = self.place.writes
        """Where the spliced pass begins."""
        self.objective = build_objective(config.objective, self.model, self.site)
        self.context = _context(config, self.model)
        at_a_time = config.training.microbatch or sequences_at_a_time(self.context, device)
        self.microbatch = min(at_a_time, sequences // self.accumulation)
        with trace, trace.part(WEIGHTS):
            self.sae = new_dictionary(config, self.model, self.place)
        self.kernels = _DenseKernels(trace, on_gpu)

    def stages(self, accumulation: int, microbatch: int, *, only_step: bool = False) -> dict[str, Held]:
        """What each stage of the run (`STEP`, `EVALUATION`, and on a CPU `CHECKPOINT`) holds when it holds most."""
        training = self.config.training.model_copy(update={"microbatch": microbatch})
        with self.trace, standing_in("cpu", self.kernels):
            trainee = _DryTrainee(self.sae, self.place, self.objective, training, self.trace, self.device)
            self._settle(trainee)
            found = {STEP: self._step(trainee, self.sequences // accumulation, accumulation)}
            if not only_step:
                self.trace.start()
                between = self.trace.peak()
                found[EVALUATION] = self._evaluation()
                if self.device.type == "cpu":
                    _, copied = self.file_sizes()  # of the SAE as it is used; a checkpoint is written as it lies
                    found[CHECKPOINT] = Held({**between.parts, SAVING: copied}, SAVING)
            trainee.leave()
        if self.device.type == "cpu":
            for held in found.values():
                held.parts[ALLOCATOR] = ALLOCATOR_BYTES
        return found

    def _settle(self, trainee: Trainee) -> None:
        """Takes a step without a gradient, after which the optimiser has its moments."""
        trainee.begin_step()
        for parameter in self.sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with self.trace.part(OPTIMISER):
            trainee.finish_step(torch.ones(()), 0)

    def _step(self, trainee: Trainee, sequences: int, passes: int) -> Held:
        with self.trace.part(INPUTS):
            tokens = torch.zeros(self.sequences, self.context, dtype=torch.int64)
            mask = torch.ones(self.sequences, self.context, dtype=torch.bool)
            count = mask.sum()
        rows = slice(0, sequences)
        self.trace.start()
        trainee.begin_step()
        for _ in range(min(passes, FOLLOWED)):
            clean = self._clean(tokens[rows])  # as in training, what the pass before recorded is still there meanwhile
            with self.trace.part(LATENTS):
                trainee.accumulate(self.tail, clean, mask[rows], count)
        with self.trace.part(OPTIMISER):
            trainee.finish_step(count, tokens.numel())
        return self.trace.peak()

    def _clean(self, tokens: Tensor) -> Clean:
        objective = self.objective
        with self.trace.part(CLEAN):
            if self.tail is self.model:
                return self.model.clean(tokens, {*self.place.sites, *objective.sites}, final=objective.final)
            head = self.model.clean(tokens, self.place.sites)
            return clean_by_tail(self.tail, head, self.site, objective.sites, objective.final)

    @torch.no_grad()
    def _evaluation(self) -> Held:
        """One batch of held-out text, as `evaluation.measure` goes through it."""
        settings = self.config.evaluation
        sequences = min(settings.batch, max(1, settings.during_training_tokens // self.context))
        later = residuals_after(self.model, self.site)
        trace = self.trace
        with trace.part(INPUTS):
            tokens = torch.zeros(sequences, self.context, dtype=torch.int64)
            mask = torch.ones(sequences, self.context, dtype=torch.bool)
        trace.start()
        with trace.part(CLEAN):
            clean = self.model.clean(tokens, {*self.place.sites, *later}, final=True)
        with trace.part(LATENTS):
            read = clean.activations[self.place.reads]
            latents = self.sae.encode(read)
            estimate = self.sae.reconstruct(latents, read)
            latents.fired(mask)
            latents.l0()
        with trace.part(TAIL):
            spliced = SplicedPass(self.model, self.site, later).run(clean, estimate, mask)
        with trace.part(READOUT):
            assert clean.final is not None and spliced.final is not None
            self.model.readout.compare(clean.final, [spliced.final], tokens, mask)
        return trace.peak()

    def file_sizes(self) -> tuple[int, int]:
        """Bytes of a checkpoint and of the saved SAE, but for their headers."""
        weights = 4 * _count(self.sae)
        counters = 4 * len(list(self.sae.parameters()))  # Adam's, one to a parameter
        generators = sum(state.nbytes for state in generator_states().values())
        return 3 * weights + counters + 8 * self.sae.d_sae + generators, weights

    @cached_property
    def pieces(self) -> list[Piece]:
        """Of all blocks, in the order of computation."""
        config: Any = self.model.model.config.get_text_config()
        return [
            piece
            for layer, block in enumerate(find_blocks(self.model.model, self.model.n_layers))
            for piece in _pieces(block, layer, config)
        ]

    def pieces_before(self, site: Site) -> int:
        """How many pieces come before a site."""
        return 2 * site.layer + {Part.RESID_PRE: 0, Part.MLP_OUT: 2, Part.RESID_POST: 2}.get(site.part, 1)

    @property
    def end(self) -> int:
        """How many pieces the clean pass runs."""
        return (
            len(self.pieces)
            if self.objective.final
            else max(map(self.pieces_before, [self.site, *self.objective.sites]))
        )

    @property
    def unembedding(self) -> nn.Module:
        module = self.model.model.get_output_embeddings()
        assert isinstance(module, nn.Module)
        return module

    def embedding_parameters(self) -> int:
        """Of everything that comes before the blocks, less an embedding that is the unembedding too."""
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
        self._trace, self._planned = trace, device
        self._hooks = [each.register_post_accumulate_grad_hook(self._claim) for each in sae.parameters()]

    def leave(self) -> None:
        """Leaves the SAE as it was."""
        for hook in self._hooks:
            hook.remove()
        self.sae.zero_grad(set_to_none=True)

    def _claim(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._trace.claim(parameter.grad, GRADIENTS)

    def products(self) -> torch.autocast:
        on_gpu = self._planned.type == "cuda"
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "mixed" and on_gpu)

    def _tail_gradient(
        self, tail: LanguageModel, clean: Clean, reconstruction: Activation, mask: TokenMask
    ) -> Activation:
        rows = slice(0, FOLLOWED * (self.config.microbatch or 1))
        with self._trace.part(TAIL):
            rest = torch.empty_like(reconstruction[rows.stop :])
            some = super()._tail_gradient(tail, clean.rows(rows), reconstruction[rows], mask[rows])
            del rest, some
            return torch.empty_like(reconstruction)


class _DenseKernels(EagerKernels):
    """Those of a dictionary too active for sparse latents, with the planned device's chunks."""

    def __init__(self, trace: MemoryTrace, on_gpu: bool) -> None:
        self._trace, self._on_gpu = trace, on_gpu

    def rows_per_chunk(self, unembedding: Unembedding) -> int:
        return rows_per_chunk(*unembedding.weight.shape, on_gpu=self._on_gpu)

    def active(self, x: Tensor, weight: Tensor, bias: Tensor, limit: int, above: Tensor | None = None) -> Found | None:
        return None

    def kl(self, clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding) -> Divergence:
        with self._trace.part(READOUT):
            return super().kl(clean, spliced, keep, unembedding)


def _context(config: RunConfig, model: LanguageModel) -> int:
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
