"""Plans against real tensors, real files, counted operations, and the memory that real runs hold."""

import importlib
import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel
from typer.testing import CliRunner

import warm
from endwise import kernels, load_model
from endwise.cli import app
from endwise.cli.runs import DOES_NOT_FIT
from endwise.common.errors import ConfigError, ModelError, SiteError
from endwise.config.run import RunConfig
from endwise.kernels import standing_in
from endwise.models.language_model import Clean, LanguageModel, Spliced
from endwise.models.sites import Part
from endwise.runs.checkpoints import write_checkpoint
from endwise.tokens import TokenBatch
from endwise.training.kl_subset import KLSubset
from endwise.training.making import new_trainee
from endwise.training.planning.divided import GATHERED
from endwise.training.planning.dry_run import (
    ALLOCATOR,
    CHECKPOINT,
    CLEAN,
    EVALUATION,
    GRADIENTS,
    LATENTS,
    MODEL,
    OPTIMISER,
    SAVING,
    STEP,
    WEIGHTS,
    DryRun,
)
from endwise.training.planning.flops import forward_flops, gradient_flops
from endwise.training.planning.memory_trace import MemoryTrace
from endwise.training.planning.plan import _parameters, count_flops, plan
from endwise.training.step import tail_model, take_step
from own_kernels import HeldKernels
from places import BENCHMARKS
from tiny_models import CONTEXT, FAMILIES, VOCAB, WIDTH, build, tokens

SITES = ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")
MIB = 1 << 20


def recipe(folder, kind="e2e", site=SITES[0], size=40, out="run", model=None, **training) -> RunConfig:
    objective = {"kind": kind, "sparsity": {"coefficient": 1.0}}
    if kind == "e2e_ds":
        objective["downstream_mse"] = 2.0
    return RunConfig.build(
        {
            "model": {"name": str(folder), "device": "cpu", **(model or {})},
            "site": site,
            "dictionary": {"size": size},
            "objective": objective,
            "training": {"tokens": 64 * CONTEXT, "batch": 8, "microbatch": 2, **training},
            "evaluation": {"tokens": 4 * CONTEXT, "during_training_tokens": 4 * CONTEXT, "batch": 2},
            "out": str(Path(folder) / out),
        }
    )


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """The folder of a tiny model of a family."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(folders[family])
        return folders[family]

    return folder


def gpt2_of(blocks: int, folder: Path) -> Path:
    config = FAMILIES["gpt2"].config()
    config.n_layer = blocks
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """The folder of a GPT-2 of two blocks, where it does not matter how many there are."""
    return gpt2_of(2, tmp_path_factory.mktemp("two_blocks"))


@pytest.fixture(scope="session")
def three_blocks(tmp_path_factory):
    return gpt2_of(3, tmp_path_factory.mktemp("three_blocks"))


def dry(config: RunConfig, device="cpu") -> DryRun:
    return DryRun(config, torch.device(device), config.training.batch)


@cache
def known(folder: Path, kind="e2e", **training):
    """The plan of a recipe that several tests compare with, in this process."""
    return plan(recipe(folder, kind, **training))


def flops_of(config: RunConfig):
    return count_flops(dry(config), config.training.batch * CONTEXT)[0]


def step_bytes(config: RunConfig) -> int:
    dry_run = dry(config)
    return dry_run.stages(dry_run.accumulation, dry_run.microbatch, only_step=True)[STEP].bytes


def held_by(values) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    return sum(storages.values())


def test_a_trace_follows_storages_views_and_the_graph():
    trace = MemoryTrace()
    with trace:
        with trace.part("a"):
            first = torch.zeros(1000, requires_grad=True)
            view = first[10:].view(2, -1)
        with trace.part("b"):
            trace.start()
            second = view.exp().sin()  # exp's result is kept for both backward passes
        assert trace.peak().parts == {"a": 4000, "b": 2 * 3960}
        del second
        trace.start()
        assert trace.peak().parts == {"a": 4000}
        view.sum().backward()
        assert first.grad is not None
        trace.claim(first.grad, "gradient")
        trace.start()
    assert trace.peak().parts == {"a": 4000, "gradient": 4000}


OF_A_KIND = ("llama", "mistral", "mistral_sliding", "qwen2", "qwen3", "gemma2", "olmo2", "neox_sequential")
"""Families whose parameters and buffers lie as another's do that stays: as those of Llama with tied weights, Gemma 3 or
Pythia."""


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=pytest.mark.slow if each in OF_A_KIND else ()) for each in FAMILIES]
)
def test_parameters_and_bytes_are_those_of_the_model(stored, family):
    dry_run = dry(recipe(stored(family), "local"))
    found = _parameters(dry_run)
    model = LanguageModel(build(family))
    held = held_by([*model.model.parameters(), *model.model.buffers()])
    assert dry_run.trace.peak().parts[MODEL] == held
    if family == "gpt2":
        planned = plan(dry_run.config)
        assert planned.parameters == found and [stage.parts[MODEL] for stage in planned.stages] == [held] * 3
    blocks = model.model.get_submodule(FAMILIES[family].blocks)
    first = {id(parameter) for parameter in blocks[0].parameters()}
    unembedding = {id(parameter) for parameter in model.model.get_output_embeddings().parameters()}
    sizes = {id(parameter): parameter.numel() for parameter in model.model.parameters()}
    assert found.model == sum(sizes.values())
    assert found.unembedding == sum(sizes[each] for each in unembedding)
    assert found.before_site + found.after_site + found.unembedding == found.model
    final_norm = model.model.get_submodule(FAMILIES[family].final_norm)
    later = [*blocks[1:].parameters(), *final_norm.parameters()]
    assert found.after_site == sum(parameter.numel() for parameter in later)
    assert first.isdisjoint(map(id, later))


loaded = cache(partial(load_model, device="cpu"))


def real_trainee(config: RunConfig, load=load_model):
    model = load(config.model.name, device="cpu")
    return model, new_trainee(config, model, 1)


def batch_of(config: RunConfig) -> TokenBatch:
    ids = tokens(config.training.batch)
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))


def test_bytes_of_the_sae_and_its_optimiser_and_its_file(gpt2, tmp_path):
    config = recipe(gpt2)
    dry_run = dry(config)
    held = dry_run.stages(1, 2)
    model, trainee = real_trainee(config)
    take_step(model, [trainee], batch_of(config))
    parameters = list(trainee.sae.parameters())
    assert held[STEP].parts[WEIGHTS] == held_by(parameters)
    between = held[CHECKPOINT].parts
    assert between[GRADIENTS] == held_by([parameter.grad for parameter in parameters])
    moments = held_by([v for values in trainee.optimizer.state.values() for v in values.values()])
    counters = between[OPTIMISER] - moments
    assert 0 <= counters - 9 * trainee.sae.d_sae < 200  # last_fired, _fired, and scalars
    write_checkpoint(tmp_path / "checkpoint", trainee.checkpoint())
    trainee.sae.save(tmp_path / "sae")
    checkpoint, sae = dry_run.file_sizes()
    for planned, path in ((checkpoint, "checkpoint"), (sae, "sae/sae_weights.safetensors")):
        size = (tmp_path / path).stat().st_size
        header = 8 + int.from_bytes((tmp_path / path).read_bytes()[:8], "little")
        assert size - header == planned
    assert between[SAVING] == sae  # a checkpoint is written from where its tensors lie


CASES = {
    "local": {"kind": "local"},
    "e2e": {},
    "e2e_ds": {"kind": "e2e_ds"},
    "passes": {"accumulation": 2},
    "more passes": {"accumulation": 4, "microbatch": 1},
    "one microbatch": {"microbatch": 8},
    "in a block": {"site": SITES[1]},
    "wide": {"size": 4000},
    "mixed": {"precision": "mixed"},
}


@pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")
@pytest.mark.parametrize(
    "case",  # "more passes" holds what "passes" does, and of a step's sizes one is enough
    [pytest.param(case, marks=pytest.mark.slow if case in ("passes", "wide") else ()) for case in CASES],
)
def test_a_dry_step_holds_what_a_real_one_holds(gpt2, three_blocks, case):
    """The same is followed while real tensors go through the training loop's own step."""
    config = recipe(three_blocks if case == "e2e_ds" else gpt2, **CASES[case])  # of later sites there are several
    training = config.training
    dry_run = dry(config)
    planned = dry_run.stages(training.accumulation, dry_run.microbatch, only_step=True)[STEP]
    trace = MemoryTrace(fake=False)
    with trace, standing_in("cpu", dry_run.kernels):
        model, trainee = real_trainee(config)
        tail = tail_model(model, training)
        take_step(model, [trainee], batch_of(config), training.accumulation, tail=tail)
        trace.start()
        before = trace.peak().bytes
        take_step(model, [trainee], batch_of(config), training.accumulation, tail=tail)
    grown = trace.peak().bytes - before
    settled = sum(planned.parts.get(part, 0) for part in (MODEL, WEIGHTS, OPTIMISER, ALLOCATOR))
    gradients = held_by([parameter.grad for parameter in trainee.sae.parameters()])
    assert planned.bytes - settled == pytest.approx(grown + gradients, rel=0.01)


COUNTED = {"gpt2": 0, "pythia": 1, "llama_grouped_tied": 2, "gemma2": 1, "qwen3": 3, "gptj": 1, "phi3": 2}
"""With the site at which each is in the quick tier; parallel blocks (Pythia, GPT-J) where attention writes."""


@pytest.mark.parametrize(
    ("family", "site"),
    [
        pytest.param(family, site, marks=() if place == quick else pytest.mark.slow)
        for family, quick in COUNTED.items()
        for place, site in enumerate(SITES)
    ],
)
def test_counted_operations_are_those_of_the_passes(stored, family, site):
    """Eager attention multiplies all pairs, and so does the formula when it is asked to."""
    dry_run = dry(recipe(stored(family), site=site))
    hf = build(family)
    hf.set_attn_implementation("eager")
    model, ids, pairs = LanguageModel(hf), tokens(2), CONTEXT**2
    place = dry_run.pieces_before(dry_run.site)
    head = [piece.stretch for piece in dry_run.pieces[:place]]
    tail = [piece.stretch for piece in dry_run.pieces[place:]]

    def counted(act) -> tuple[object, int]:
        with FlopCounterMode(display=False) as counter:
            result = act()
        return result, counter.get_total_flops()

    at = model.site(site)
    clean, flops = counted(lambda: model.clean(ids, [at]))
    assert flops == 2 * forward_flops(head, CONTEXT, pairs)
    leaf = clean.activations[at].clone().requires_grad_()
    spliced, flops = counted(lambda: model.replay(clean, {at: leaf}))
    assert flops == 2 * forward_flops(tail, CONTEXT, pairs)
    _, flops = counted(spliced.final.sum().backward)
    if family in ("pythia", "gptj") and at.part is Part.ATTN_OUT:
        tail = tail[1:]  # a parallel block's MLP does not read what attention wrote: this one gradient is a surplus
    assert flops == 2 * gradient_flops(tail, CONTEXT, pairs)


def test_a_new_sae_is_planned_dense_and_a_sparse_one_is_cheaper(gpt2):
    found = plan(recipe(gpt2, size=400))
    product = 2 * WIDTH * 400
    assert (found.flops.sae_forward, found.flops.sae_backward) == (2 * product, 3 * product)
    saved = found.flops.per_token - found.sparse_flops
    assert saved == pytest.approx(4 * product - 4 * 2 * WIDTH * 400 / 32)
    assert found.flops.clean_readout == found.flops.readout_forward == 2 * WIDTH * VOCAB
    assert found.total_flops == pytest.approx(found.flops.per_token * 64 * CONTEXT)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_kl_of_some_positions_is_planned_with_as_many_fewer_products(gpt2, stride):
    """As many as its readout computes, when the mask keeps all."""
    config = recipe(gpt2)
    objective = {"kl": 0.0, "terms": {"kl_subset": {"weight": 1.0, "stride": stride}}}
    values = config.model_dump(exclude_unset=True)
    some = flops_of(RunConfig.build(values | {"objective": {**objective, "sparsity": {"coefficient": 1.0}}}, "it"))
    every = flops_of(config)
    readouts = ("clean_readout", "readout_forward", "readout_backward")
    for name, value in vars(every).items():
        assert getattr(some, name) == (value / stride if name in readouts else value)
    readout, mask = LanguageModel(build("gpt2")).readout, torch.ones(2, CONTEXT, dtype=torch.bool)
    term, (clean, spliced) = KLSubset(1.0, stride), torch.randn(2, 2, CONTEXT, WIDTH)
    ids, spliced = tokens(2), spliced.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        term.total(readout, Clean(ids, {}, clean), Spliced({}, spliced), mask).backward()
    assert counter.get_total_flops() / (2 * CONTEXT) == sum(getattr(some, name) for name in readouts)


def test_kept_activations_are_planned_on_the_disk(gpt2, tmp_path):
    config = recipe(gpt2, kind="local")
    values = config.model_dump(exclude_unset=True) | {"data": {"activations": str(tmp_path), "epochs": 2}}
    size = 64 * CONTEXT * WIDTH * 4 // 2
    found = plan(RunConfig.build(values, "it"))
    assert found.kept_bytes == found.needs[-1].bytes == size and str(tmp_path) in found.needs[-1].what
    phases = [{"share": 0.75, "objective": {"kind": "local"}}, {"share": 0.25, "objective": {"kind": "e2e"}}]
    found = plan(RunConfig.build(values | {"phases": phases}, "it"))
    assert found.kept_bytes == found.needs[-1].bytes == size * 3 // 4
    assert known(gpt2, "local").kept_bytes == known(gpt2).kept_bytes == 0


DICTIONARIES = {
    "standard": [{}, {"revive": 0.1}, {"aux": 0.1}, {"skip": True}, {"normalize": "whitening"}],
    "gated": [{}, {"aux": 0.1}],
    "topk": [{"k": 4}, {"k": 4, "aux": 0.1, "aux_k": 3}],
    "batchtopk": [{"k": 4}, {"k": 4, "aux": 0.1}],
    "jumprelu": [{}, {"penalty": "tanh"}, {"revive": 0.1}],
    "matryoshka_batchtopk": [{"k": 4}, {"k": 4, "aux": 0.1}, {"k": 4, "random_prefixes": 3}],
}
"""Each with what adds to a step's products."""


@pytest.mark.filterwarnings("ignore:objective.sparsity is left out")
@pytest.mark.parametrize(
    ("architecture", "options", "kind"),
    [  # those that add nothing are in the others too
        pytest.param(name, options, ("local", "e2e")[number % 2], marks=() if number else pytest.mark.slow)
        for name, each in DICTIONARIES.items()
        for number, options in enumerate(each)
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_a_dictionarys_operations_are_those_of_its_step(gpt2, architecture, options, kind):
    """A whole step on real tensors, less what the model's own passes take, which another test counts."""
    values = recipe(gpt2, kind, size=400).model_dump(mode="json")
    values["dictionary"] = {"architecture": architecture, "size": 400, **options}
    if options.get("skip"):
        values |= {"site": "blocks.1.mlp_in", "writes": "blocks.1.hook_mlp_out"}
    config = RunConfig.build(values)
    dry_run, batch = dry(config), batch_of(config)
    with standing_in("cpu", dry_run.kernels):
        model, trainee = real_trainee(config, loaded)
        trainee.tokens = 1 << 30  # long after any feature fired
        clean = model.clean(batch.tokens, trainee.sites)
        trainee.begin_step()
        with FlopCounterMode(display=False) as counter:
            encoded = trainee.encode(*trainee.meets(clean), batch.mask)
            gradient = torch.ones_like(encoded.reconstruction) if kind == "e2e" else None
            trainee.learn(encoded, batch.mask, batch.mask.sum(), gradient)
    assert trainee.dead().all()
    found = count_flops(dry_run, batch.mask.numel())[0]
    planned = found.sae_forward + found.sae_backward + found.sae_own
    assert planned == counter.get_total_flops() / batch.mask.numel()
    terms = {"revive", "aux"} & options.keys() or architecture == "gated"
    assert found.sae_own + found.sae_forward >= (2 + 2 * bool(terms)) * 2 * WIDTH * 400


@pytest.mark.filterwarnings("ignore:objective.sparsity is left out")
@pytest.mark.parametrize(
    ("kind", "dictionary", "options"),
    [
        ("local", {"architecture": "standard"}, [{"revive": 0.1}, {"aux": 0.1}]),
        ("e2e_ds", {"architecture": "batchtopk", "k": 4}, [{"aux": 0.1}]),
        pytest.param("e2e_ds", {"architecture": "standard"}, [{"revive": 0.1}, {"aux": 0.1}], marks=pytest.mark.slow),
        pytest.param("local", {"architecture": "batchtopk", "k": 4}, [{"aux": 0.1}], marks=pytest.mark.slow),
    ],
    ids=["standard", "batchtopk", "standard-e2e_ds", "batchtopk-local"],
)
def test_dead_features_are_planned_as_if_all_were_dead(gpt2, three_blocks, kind, dictionary, options):
    """Plan for all features dead, since their number is not known before."""
    values = recipe(three_blocks if kind == "e2e_ds" else gpt2, kind, size=400).model_dump(mode="json")

    def planned(more) -> int:
        return step_bytes(RunConfig.build(values | {"dictionary": {"size": 400, **dictionary, **more}}))

    without = planned({})
    assert all(planned(more) > without for more in options)


def test_a_local_objective_stops_at_the_site(gpt2):
    found = flops_of(recipe(gpt2, "local"))
    assert found.clean_prefix > 0
    after = ("clean_tail", "clean_readout", "tail_forward", "tail_backward", "readout_forward", "readout_backward")
    assert [getattr(found, name) for name in after] == [0] * 6


def test_processes_share_a_batch(gpt2):
    alone, one_of_four = known(gpt2, microbatch=1), plan(recipe(gpt2, microbatch=1), processes=4)
    assert (alone.sequences, one_of_four.sequences) == (8, 2)
    assert one_of_four.steps == alone.steps and one_of_four.total_flops == alone.total_flops
    clean = [each.stages[0].parts[CLEAN] for each in (alone, one_of_four)]
    assert clean[1] < clean[0] / 2
    smaller = plan(recipe(gpt2, microbatch=1, batch=2))
    assert one_of_four.stages == smaller.stages
    with pytest.raises(ConfigError, match="3 processes cannot share batches of 8"):
        plan(recipe(gpt2), processes=3)


@pytest.mark.parametrize(
    ("kind", "dictionary"),
    [
        ("e2e", {"architecture": "standard", "aux": 0.1}),
        pytest.param("local", {"architecture": "jumprelu"}, marks=pytest.mark.slow),
        ("local", {"architecture": "topk", "k": 5, "aux": 0.1, "revive": 0.1}),
        ("local", {"architecture": "batchtopk", "k": 5}),
    ],
    ids=["standard", "jumprelu", "topk", "batchtopk"],
)
@pytest.mark.filterwarnings("ignore:objective.sparsity is left out")
def test_a_shard_holds_its_features(gpt2, kind, dictionary):
    def given(size, **training):
        config = recipe(gpt2, kind, microbatch=1, **training).model_dump(mode="json")
        return RunConfig.build(config | {"dictionary": {"size": size, **dictionary}})

    def planned(processes, size, **training):
        return plan(given(size, **training), processes=processes)

    shard, smaller = planned(8, 4000, shards=4), planned(1, 1000, batch=4)
    assert shard.sequences == smaller.sequences == 4
    ours, theirs = shard.stages[0].parts, smaller.stages[0].parts
    assert ours[WEIGHTS] == theirs[WEIGHTS]
    assert ours[OPTIMISER] == pytest.approx(theirs[OPTIMISER], rel=0.3)  # when each feature fired is known of all
    assert ours[LATENTS] == pytest.approx(theirs[LATENTS], rel=0.3)  # and what is gathered from the others
    whole = dry(given(4000))
    assert (shard.d_sae, shard.parameters) == (4000, _parameters(whole))
    assert (shard.checkpoint_bytes, shard.sae_bytes) == whole.file_sizes()
    per_token, _ = count_flops(whole, 8 * CONTEXT)
    assert shard.total_flops > per_token.per_token * 64 * CONTEXT  # each of four runs the model
    with pytest.raises(ConfigError, match=r"training.shards is 4, .* 6 is not a multiple"):
        planned(6, 4000, shards=4)


def test_blocks_divided_among_processes(three_blocks):
    gpt2 = three_blocks
    sharded = recipe(gpt2, microbatch=1, model={"sharded": True})
    whole, part = (plan(each, processes=2) for each in (recipe(gpt2, microbatch=1), sharded))
    blocks = load_model(str(gpt2)).model.transformer.h
    sizes = [sum(each.nbytes for each in block.parameters()) for block in blocks]
    for one, other in zip(whole.stages, part.stages, strict=True):
        assert one.parts[MODEL] - other.parts[MODEL] == sum(sizes) / 2
        assert other.parts.get(GATHERED, 0) == (0 if other.name == CHECKPOINT else 2 * sizes[0])
        assert {**other.parts, MODEL: 0, GATHERED: 0} == {**one.parts, MODEL: 0, GATHERED: 0}
    with pytest.raises(ConfigError, match="there is one process only"):
        plan(sharded)


def test_what_does_not_fit_is_named_with_settings_that_do(gpt2):
    config = recipe(gpt2, size=4000, microbatch=8)
    roomy = plan(config)
    assert roomy.fits
    need = roomy.needs[0]
    tight = plan(config, memory=need.bytes - 2 * MIB)
    assert not tight.fits and not tight.needs[0].fits
    advice = tight.needs[0].advice
    assert "training.accumulation" in advice and "training step" in advice
    settings = [word.rstrip(".;") for word in advice.split() if word.startswith("training.") and "=" in word]
    values = {key.removeprefix("training."): int(value) for key, _, value in (word.partition("=") for word in settings)}
    assert set(values) == {"accumulation", "microbatch"}
    changed = recipe(gpt2, size=4000, **values)
    assert step_bytes(changed) <= roomy.stages[0].bytes - 2 * MIB < roomy.stages[0].bytes


def test_where_nothing_helps_it_says_so(gpt2):
    found = plan(recipe(gpt2, "local", batch=2), memory=1000)
    assert not found.fits
    assert "No training.accumulation and training.microbatch" in found.needs[0].advice


def test_a_gpu_elsewhere_is_planned_with_its_own_chunks(gpt2):
    config = recipe(gpt2, model={"device": "cuda"}, precision="mixed")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--memory"):
            plan(config)
    found = plan(config, memory=80 << 30)
    assert (found.device, found.dtype) == ("cuda", "bfloat16") and found.sparse_flops is None
    assert [need.what.partition(" at ")[0] for need in found.needs] == ["GPU memory", "host memory", "disk"]
    assert [stage.name for stage in found.stages] == [STEP, EVALUATION]
    with standing_in("cuda", HeldKernels()):
        held = plan(config, memory=80 << 30)
    product, active = 2 * WIDTH * held.d_sae, held.d_sae / 32
    searched = product + 2 * WIDTH * 2.5 * active  # a second product of bounds, and slots of candidates
    assert held.flops == found.flops and held.stages == found.stages
    saved = held.flops.per_token - held.sparse_flops
    assert saved == pytest.approx(4 * product - 4 * 2 * WIDTH * active - searched)
    exact = known(gpt2)
    assert 2 * found.stages[0].parts[MODEL] == pytest.approx(exact.stages[0].parts[MODEL], rel=0.1)


def test_mixed_precision_on_a_cpu_holds_a_second_model(gpt2):
    found = known(gpt2, "local"), plan(recipe(gpt2, "local", precision="mixed"))
    exact, mixed = (each.stages[0].parts[MODEL] for each in found)
    assert mixed == pytest.approx(1.5 * exact, rel=0.02)


def test_what_no_machine_can_run_is_refused(gpt2):
    with pytest.raises(SiteError, match=r"blocks\.0 to blocks\.1"):
        plan(recipe(gpt2, site="blocks.9.hook_resid_pre"))
    with pytest.raises(ConfigError, match="one step alone takes"):
        plan(recipe(gpt2, tokens=CONTEXT))
    with pytest.raises(ModelError, match="/nowhere/at/all"):
        plan(recipe(gpt2, model={"name": "/nowhere/at/all"}))


def test_nothing_is_left_behind_and_no_weight_is_read(gpt2, tmp_path):
    registered = dict(kernels.registered())
    hollow = tmp_path / "model"
    hollow.mkdir()
    for file in gpt2.iterdir():
        (hollow / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    assert plan(recipe(hollow, "local")).parameters == known(gpt2, "local").parameters
    assert dict(kernels.registered()) == registered
    assert torch.ones(2).sum() == 2
    assert not (hollow / "run").exists()


def test_plans_one_after_another_share_an_outline_as_long_as_the_configuration_stays(tmp_path):
    config = FAMILIES["gpt2"].config()
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    first, other = (dry(recipe(tmp_path, kind)) for kind in ("local", "e2e"))
    held = first.stages(1, 2)
    assert other.model is first.model and other.stages(1, 2)[STEP].bytes > held[STEP].bytes
    assert dry(recipe(tmp_path, "local")).stages(1, 2) == first.stages(1, 2) == held  # nothing of another is counted
    config.n_layer = 2
    config.save_pretrained(tmp_path)
    fewer = dry(recipe(tmp_path, "local"))
    assert fewer.model.n_layers == 2 and fewer.stages(1, 2)[STEP].parts[MODEL] < held[STEP].parts[MODEL]


@pytest.mark.parametrize(
    ("kind", "arguments", "code"),
    [
        pytest.param("e2e", [], 0, marks=pytest.mark.slow),
        ("local", ["--memory", "1MiB"], DOES_NOT_FIT),
        ("local", ["--processes", "2"], 0),
    ],
)
def test_the_command_prints_and_says_whether_it_fits(gpt2, tmp_path, kind, arguments, code):
    config = recipe(gpt2, kind, batch=2)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    command = ["plan", str(tmp_path / "recipe.yaml"), "training.microbatch=1", *arguments]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == code, shown.output
    assert ("Everything fits." in shown.stdout) == (code == 0)
    told = CliRunner().invoke(app, [*command, "--json"])
    values = json.loads(told.stdout)
    assert told.exit_code == code and values["fits"] == (code == 0)
    assert values["microbatch"] == 1 and values["stages"][0]["bytes"] == sum(values["stages"][0]["parts"].values())


@pytest.fixture(scope="module")
def measuring():
    """`benchmarks/` is no package and not installed; its scripts import each other by bare name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("plan_versus_measured")
        for name in ("plan_versus_measured", "harness", "shapes"):
            sys.modules.pop(name, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("objective", ["local", pytest.param("e2e", marks=pytest.mark.slow)])
def test_planned_memory_is_near_what_a_run_holds(measuring, objective):
    """A process that trains, measures and saves: the most that it ever holds beyond what it held after its imports."""
    shape = measuring.Shape("gpt2", 6, 256, 4, 4096, 256, 256, batch=12, layer=2, d_sae=8192)
    result = measuring.compare(measuring.Case("width 256", shape, objective, microbatch=2), 1, warm.command())["stages"]
    planned, measured = (max(stage[key] for stage in result.values()) for key in ("planned", "measured"))
    assert measured > 300 * MIB
    assert 0.8 < planned / measured < 1.25, result
