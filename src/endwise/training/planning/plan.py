"""Plan of a run's needs, before it starts: parameters, memory by part, operations per token, and what will not fit.

No weight is read: see `dry_run` for how memory is found, `flops` for how operations are counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from endwise.common.errors import ConfigError
from endwise.common.machine import available_memory, free_disk, resident_memory, size_text
from endwise.config.adopted import refuse_adopted
from endwise.config.places import Recipe
from endwise.kernels import kernels_for
from endwise.models.loading import find_device
from endwise.training.kept_activations import reads_splice
from endwise.training.planning.divided import DividedDryRun
from endwise.training.planning.dry_run import (
    CLEAN,
    EVALUATION,
    GRADIENTS,
    LATENTS,
    MODEL,
    OPTIMISER,
    READOUT,
    SAVING,
    STEP,
    TAIL,
    WEIGHTS,
    DryRun,
)
from endwise.training.planning.flops import (
    DENSE_GRADIENT_PRODUCTS,
    OPTIMISER_OPERATIONS,
    forward_flops,
    gradient_flops,
    product_flops,
    search_flops,
    sparse_flops,
)
from endwise.training.planning.memory_trace import Held
from endwise.training.planning.one_shard import whole_count
from endwise.training.setup import check_sharded, default_folder, steps_of

CUDA_CONTEXT = 1 << 29
"""Bytes that CUDA and its libraries take on a device before the first tensor, about."""
REMEDIES = {
    MODEL: "a smaller model.dtype (bfloat16, with training.precision=mixed), or model.sharded in several processes",
    **dict.fromkeys((WEIGHTS, GRADIENTS, OPTIMISER, SAVING), "a smaller dictionary.size (or dictionary.ratio)"),
    **dict.fromkeys((CLEAN, LATENTS), "a larger training.accumulation (or a smaller training.batch)"),
    **dict.fromkeys((TAIL, READOUT), "a smaller training.microbatch"),
}
"""Settings that lower each part."""


@dataclass(frozen=True)
class Parameters:
    model: int
    before_site: int
    """The embeddings, and the part of the blocks that only the clean pass runs."""
    after_site: int
    """The rest, which the spliced pass runs too, less the unembedding."""
    unembedding: int
    """Parameters of both, where it is tied to the embedding."""
    dictionary: int


@dataclass(frozen=True)
class Stage(Held):
    """A part of the run, at the moment at which it holds most."""

    name: str


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for each training token: matrix products, and the optimiser's. Those of dictionaries
    are counted as their own code does them.
    """

    clean_prefix: float
    clean_tail: float
    clean_readout: float
    sae_forward: float
    sae_backward: float
    """Gradient of the reconstruction."""
    sae_own: float
    """Terms of the dictionary itself, and prefixes, forward and backward, as if all features were dead."""
    tail_forward: float
    tail_backward: float
    """Gradients of activations alone: the model is frozen."""
    readout_forward: float
    readout_backward: float
    optimiser: float
    """Operations of a step, shared among its tokens."""

    @property
    def per_token(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Need:
    """Something that the run takes of a machine."""

    what: str
    bytes: int
    available: int | None
    """None: unknown."""
    advice: str | None = None
    """Advice where it does not fit: what takes most, and what to change."""

    @property
    def fits(self) -> bool:
        return self.available is None or self.bytes <= self.available


@dataclass(frozen=True)
class PhasePlan:
    """A phase of the run: see `config.phases`."""

    kind: str
    share: float
    learning_rate: float
    flops_per_token: float
    """Operations for each of its tokens, with dense latents."""


@dataclass(frozen=True)
class TrainingPlan:
    model: str
    site: str
    kind: str
    splices: bool
    """True if the objective has terms that read the spliced pass."""
    device: str
    dtype: str
    processes: int
    shards: int
    """Processes that share the features; memory, and operations per token, are those of one."""
    context: int
    sequences: int
    """Sequences of each batch in one process."""
    accumulation: int
    microbatch: int
    steps: int
    d_model: int
    """Width; of several places, the largest."""
    d_sae: int
    """Features of all places together."""
    parameters: Parameters
    stages: tuple[Stage, ...]
    checkpoint_bytes: int
    """Size of one file, but for its header."""
    sae_bytes: int
    kept_bytes: int
    """Activations that `data.activations` keeps on the disk, at most; operations are counted as if none were there."""
    flops: Flops
    sparse_flops: float | None
    """Per token, at most, once latents are sparse; None on a GPU for which no such kernels are known."""
    total_flops: float
    """Operations of the run, all processes together, with dense latents; evaluations are left out."""
    needs: tuple[Need, ...]
    phases: tuple[PhasePlan, ...] = ()
    """Places of a run of several. The rest is then of all: memory of the one that needs most, operations on average."""

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    def to_json(self) -> dict[str, Any]:
        """All of it, with the sums."""
        values = asdict(self)
        values["flops"]["per_token"] = self.flops.per_token
        for stage, own in zip(values["stages"], self.stages, strict=True):
            stage["bytes"] = own.bytes
        for need, own in zip(values["needs"], self.needs, strict=True):
            need["fits"] = own.fits
        return values | {"fits": self.fits}


def plan(config: Recipe, *, processes: int = 1, memory: int | None = None) -> TrainingPlan:
    """Plan what one of a run's processes will need.

    Args:
        processes: that train together; each holds its share of the SAE (`training.shards`) with the optimiser's, and
            the model in full, but for the blocks of one that is sharded.
        memory: bytes that each process will have, on its device; unset: what this machine has free, which processes on
            a CPU share.

    Raises:
        EndwiseError: the recipe cannot be run at all, here or elsewhere.
    """
    refuse_adopted(config)
    if config.phases:
        return _of_phases(config, [plan(each, processes=processes, memory=memory) for each in config.in_phases])
    training, device = config.training, _device(config, memory)
    sequences = training.batch // _sharing_batches(config, processes)
    check_sharded(config, processes, device)
    sharded = config.model.sharded
    dry_run = DividedDryRun(config, device, sequences, processes) if sharded else DryRun(config, device, sequences)
    steps, per_step = steps_of(training, dry_run.context), training.batch * dry_run.context
    stages = dry_run.stages(dry_run.accumulation, dry_run.microbatch)
    flops, sparse = count_flops(dry_run, per_step)
    checkpoint, sae = dry_run.file_sizes()
    return TrainingPlan(
        model=config.model.name,
        site=config.place,
        kind=config.objective_name,
        splices=any(map(reads_splice, dry_run.objectives.values())),
        device=dry_run.device.type,
        dtype=str(dry_run.model.dtype).removeprefix("torch."),
        processes=processes,
        shards=training.shards,
        context=dry_run.context,
        sequences=dry_run.sequences,
        accumulation=dry_run.accumulation,
        microbatch=dry_run.microbatch,
        steps=steps,
        d_model=max(sae.d_in for sae in dry_run.saes),
        d_sae=sum(sae.d_sae for sae in dry_run.saes),
        parameters=_parameters(dry_run),
        stages=tuple(Stage(held.parts, held.during, name) for name, held in stages.items()),
        checkpoint_bytes=checkpoint,
        sae_bytes=sae,
        kept_bytes=(kept := _kept_bytes(dry_run, steps)),
        flops=flops,
        sparse_flops=sparse,
        total_flops=flops.per_token * steps * per_step * training.shards,
        needs=(
            *_memory_needs(dry_run, stages, processes, memory),
            _disk_need(dry_run, steps),
            *_kept_needs(config, kept),
        ),
    )


def _sharing_batches(config: Recipe, processes: int) -> int:
    """The processes, or groups of them, that share each batch."""
    training, shards = config.training, config.training.shards
    if processes % shards:
        raise ConfigError(
            f"training.shards is {shards}, among which features are shared out, and {processes} is not a multiple of "
            f"it. Plan for so many processes, or a multiple: --processes {shards}."
        )
    sharing = processes // shards
    if sharing < 1 or training.batch % (sharing * training.accumulation):
        raise ConfigError(
            f"{sharing} processes cannot share batches of {training.batch} sequences in passes of equal size "
            f"(training.accumulation {training.accumulation}). Change training.batch or the number of processes."
        )
    return sharing


def _of_phases(config: Recipe, plans: Sequence[TrainingPlan]) -> TrainingPlan:
    """Join the plans of the phases of one run."""
    shares = [phase.share for phase in config.phases]
    most = max(plans, key=lambda each: max(stage.bytes for stage in each.stages))
    flops = {
        name: math.fsum(share * getattr(each.flops, name) for share, each in zip(shares, plans, strict=True))
        for name in vars(most.flops)
    }
    sparse = [each.sparse_flops for each in plans]
    phases = (
        PhasePlan(each.kind, phase.share, phase.learning_rate or config.training.learning_rate, each.flops.per_token)
        for each, phase in zip(plans, config.phases, strict=True)
    )
    return replace(
        most,
        kind=config.objective_name,
        splices=any(each.splices for each in plans),
        flops=Flops(**flops),
        sparse_flops=math.fsum(share * each for share, each in zip(shares, sparse, strict=True) if each is not None)
        if None not in sparse
        else None,
        total_flops=math.fsum(share * each.total_flops for share, each in zip(shares, plans, strict=True)),
        phases=tuple(phases),
        kept_bytes=(kept := round(sum(share * each.kept_bytes for share, each in zip(shares, plans, strict=True)))),
        needs=(*(need for need in most.needs if need.what != _kept_at(config)), *_kept_needs(config, kept)),
    )


def _device(config: Recipe, memory: int | None) -> torch.device:
    """The recipe's; if its memory is given, it may be one that this machine has not."""
    name = config.model.device
    try:
        return find_device(name)
    except ConfigError as error:
        if memory is not None and name.partition(":")[0] == "cuda":
            return torch.device("cuda")
        raise ConfigError(f"{error} To plan for another machine, give its device's memory (--memory 80GiB).") from None


def _parameters(dry_run: DryRun) -> Parameters:
    total = sum(parameter.numel() for parameter in dry_run.model.model.parameters())
    head = dry_run.pieces[: dry_run.pieces_before(dry_run.site)]
    before = dry_run.embedding_parameters() + sum(piece.parameters for piece in head)
    unembedding = sum(parameter.numel() for parameter in dry_run.unembedding.parameters())
    dictionary = sum(map(whole_count, dry_run.saes))
    return Parameters(total, before, total - before - unembedding, unembedding, dictionary)


def count_flops(dry_run: DryRun, per_step: int) -> tuple[Flops, float | None]:
    """Count operations for each of a step's tokens, with dense latents; and their sum once they are sparse."""
    context, site = dry_run.context, dry_run.pieces_before(dry_run.site)
    head = [piece.stretch for piece in dry_run.pieces[:site]]
    tail = [piece.stretch for piece in dry_run.pieces[site : dry_run.end]]
    passes = {site: each for site, each in dry_run.objectives.items() if reads_splice(each)}
    starts = map(dry_run.pieces_before, passes)
    tails = [[piece.stretch for piece in dry_run.pieces[start : dry_run.end]] for start in starts]
    backs = [
        tail for tail, each in zip(tails, passes.values(), strict=True) for _ in range(max(1, each.backward_passes))
    ]
    encodings, counted = dry_run.encodings(), dry_run.dictionary_flops()
    products = [
        (product_flops(1, sae.d_in, sae.d_sae) + product_flops(1, sae.d_sae, sae.d_out)) / 2 for sae, _ in encodings
    ]
    backward = [DENSE_GRADIENT_PRODUCTS * product for product in products]
    logits = 2.0 * dry_run.model.readout.unembedding.weight.numel()
    each_predicted = [
        term.predicted for objective in dry_run.objectives.values() for term in objective.spliced_terms if term.final
    ]
    readouts = logits * sum(each_predicted)
    flops = Flops(
        clean_prefix=forward_flops(head, context) / context,
        clean_tail=forward_flops(tail, context) / context,
        clean_readout=logits * max(each_predicted, default=0.0),
        sae_forward=sum(n * forward for (_, n), (forward, _) in zip(encodings, counted, strict=True)),
        sae_backward=sum(n * each for (_, n), each in zip(encodings, backward, strict=True)),
        sae_own=sum(learning - each for (_, learning), each in zip(counted, backward, strict=True)),
        tail_forward=sum(forward_flops(each, context) for each in tails) / context,
        tail_backward=sum(gradient_flops(each, context) for each in backs) / context,
        readout_forward=readouts,
        readout_backward=readouts,
        optimiser=OPTIMISER_OPERATIONS * sum(e.numel() for sae in dry_run.saes for e in sae.parameters()) / per_step,
    )
    sparse = flops.per_token - flops.sae_backward
    in_slots = kernels_for(dry_run.device).holds
    for product, (sae, n) in zip(products, encodings, strict=True):
        active = sae.sparse_below * sae.d_sae
        searched = search_flops(1, sae.d_in, sae.d_sae, active) if in_slots else 0.0
        sparse += n * (sparse_flops(1, (sae.d_in + sae.d_out) // 2, active) - product + searched)
    return flops, None if dry_run.device.type == "cuda" and not in_slots else sparse


def _memory_needs(dry_run: DryRun, stages: Mapping[str, Held], processes: int, memory: int | None) -> Iterator[Need]:
    """Yield the needs of the device; where that is a GPU, of its host too."""
    own = resident_memory()
    spare = available_memory()
    host = None if spare is None else (spare + own) // processes
    if dry_run.device.type == "cpu":
        yield _device_need(dry_run, stages, "memory", own, memory or host)
        return
    available = memory
    if memory is None:
        available = torch.cuda.mem_get_info(dry_run.device)[0] + CUDA_CONTEXT
    yield _device_need(dry_run, stages, "GPU memory", CUDA_CONTEXT, available)
    checkpoint, _ = dry_run.file_sizes()
    loaded = max(checkpoint, stages[STEP].parts[MODEL])
    # What is planned for a GPU elsewhere says nothing of that machine's own memory.
    need = Need("host memory", own + loaded, host if memory is None else None)
    yield need if need.fits else replace(need, advice=f"What lowers it: {REMEDIES[SAVING]}.")


def _device_need(dry_run: DryRun, stages: Mapping[str, Held], what: str, base: int, available: int | None) -> Need:
    name, held = max(stages.items(), key=lambda stage: stage[1].bytes)
    need = Need(what, base + held.bytes, available)
    if available is None or need.fits:
        return need
    return replace(need, advice=_advice(dry_run, stages, available - base, name))


def _advice(dry_run: DryRun, stages: Mapping[str, Held], room: int, worst: str) -> str:
    held = stages[worst]
    part = max(held.parts, key=lambda name: held.parts[name])
    text = f"Most is held in the {worst}: {size_text(held.bytes)}, of which {size_text(held.parts[part])} are {part}."
    if worst == EVALUATION and part not in (MODEL, WEIGHTS, OPTIMISER):
        text += " Lower evaluation.batch"
    else:
        text += f" What lowers that: {REMEDIES[part]}" if part in REMEDIES else ""
    others = [name for name, each in stages.items() if each.bytes > room and name != STEP]
    if stages[STEP].bytes <= room:
        return text + "."
    found = _smaller(dry_run, room)
    if found is None:
        return (
            f"{text}. No training.accumulation and training.microbatch make the training step fit: take a smaller "
            "dictionary.size, training.batch or data.context, or more processes on as many devices."
        )
    accumulation, microbatch = found
    also = f"; {' and '.join(others)} would still not fit" if others else ""
    settings = f"training.accumulation={accumulation} training.microbatch={microbatch}"
    return f"{text}. The training step fits with {settings}{also}."


def _smaller(dry_run: DryRun, room: int) -> tuple[int, int] | None:
    """The fewest passes, and in them the largest microbatch, with which the step fits."""

    def fits(accumulation: int, microbatch: int) -> bool:
        return dry_run.stages(accumulation, microbatch, only_step=True)[STEP].bytes <= room

    for accumulation in _divisors(dry_run.sequences):
        if accumulation < dry_run.accumulation or not fits(accumulation, 1):
            continue
        sizes = [size for size in _divisors(dry_run.sequences // accumulation) if size <= dry_run.microbatch]
        return accumulation, next((size for size in reversed(sizes[1:]) if fits(accumulation, size)), 1)
    return None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _kept_bytes(dry_run: DryRun, steps: int) -> int:
    config = dry_run.config
    if config.data.activations is None or any(map(reads_splice, dry_run.objectives.values())):
        return 0
    sequences = -(-steps * config.training.batch // config.data.epochs)
    widths = {site: dry_run.model.width(site) for place in dry_run.places for site in place.sites}
    return sequences * dry_run.context * sum(widths.values()) * dry_run.model.dtype.itemsize


def _kept_at(config: Recipe) -> str:
    return f"activations kept in {config.data.activations}"


def _kept_needs(config: Recipe, size: int) -> list[Need]:
    if not size:
        return []
    folder = Path(str(config.data.activations))
    advice = "Free space, set data.activations=FOLDER on another disk, or unset it."
    need = Need(_kept_at(config), size, free_disk(folder))
    return [need if need.fits else replace(need, advice=advice)]


def _disk_need(dry_run: DryRun, steps: int) -> Need:
    config = dry_run.config
    folder = config.out or default_folder(config)
    every = config.training.checkpoint_every
    saves = 1 if every is None else steps // every + (steps % every > 0)
    checkpoint, sae = dry_run.file_sizes()
    kept = config.training.keep_checkpoints + 1  # with the one that is being written
    size = min(kept, saves) * checkpoint + min(2, saves) * sae
    free = free_disk(Path(folder))
    advice = "Free space, set out=FOLDER on another disk, or take a smaller dictionary.size." if size > free else None
    return Need(f"disk at {folder}", size, free, advice)
