"""Foundations of the benchmarks: the count of operations, the rule for disturbed samples, and our own worker."""

import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import kl_div
from torch.utils.flop_counter import FlopCounterMode

from benchmark_modules import benchmark_modules
from endwise.training.planning.flops import forward_flops, gradient_flops, product_flops
from places import BENCHMARKS

MODULES = (
    *("harness", "shapes", "flops", "ours", "reference"),
    *("versus_reference", "many_in_one_pass", "sae_step", "joint_worker", "joint_step", "gpu_job"),
)


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def gpt2(bench):
    return bench["shapes"].Shape("gpt2", 4, 16, 2, 40, 12, 8, batch=2, layer=1, d_sae=64)


def spec(shape, folder, **more):
    return {"threads": 1, "shape": vars(shape), "folder": str(folder), "seed": 0, "l0": 6.0, **more}


@pytest.mark.parametrize("name", ["gpt2-small", "tinystories-1m", "smollm2-135m", "gemma-2-2b"])
def test_counted_operations_are_those_of_the_model(bench, name):
    """Eager attention multiplies all pairs; less the unembedding, which the formula counts on its own."""
    shape = bench["gpu_job"].TINY[name]
    model = bench["shapes"].random_model(shape)
    model.set_attn_implementation("eager")
    embedded = torch.randn(shape.batch, shape.context, shape.d_model, requires_grad=True)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    blocks = bench["flops"].stretches(shape, range(shape.layers))
    context, pairs = shape.context, shape.context**2
    unembedding = product_flops(shape.tokens, shape.d_model, shape.vocab)
    assert forward.get_total_flops() == shape.batch * forward_flops(blocks, context, pairs) + unembedding
    assert backward.get_total_flops() == shape.batch * gradient_flops(blocks, context, pairs) + unembedding


def test_minimal_operations_of_a_step(bench, gpt2):
    """Against sums written out by hand: d 16, MLP 64, 8 tokens with 36 causal pairs, 2 sequences, 1 block + 3."""
    found = bench["flops"].minimal_flops(gpt2, "e2e", l0=6.0)
    linear, attention = 2 * 8 * (4 * 16 * 16 + 2 * 16 * 64), 2 * 2 * 16 * 36
    assert found["clean"] == 2 * 4 * (linear + attention)
    assert found["tail_forward"] == 2 * 3 * (linear + attention)
    assert found["tail_gradient"] == 2 * 3 * (linear + 2 * attention)
    assert found["encoder"] == 2 * 16 * 16 * 64
    assert found["sparse"] == 4 * 2 * 16 * 16 * 6
    assert found["unembedding"] == 3 * 2 * 16 * 16 * 40
    local = bench["flops"].minimal_flops(gpt2, "local", l0=6.0)
    assert set(local) == {"clean", "encoder", "sparse"} and local["clean"] == 2 * (linear + attention)


def samples(bench, *pairs, wall=1.0):
    return [bench["harness"].Sample(1, wall, cpu, others) for cpu, others in pairs]


def test_samples_that_others_disturbed_are_dropped(bench):
    quiet, busy, starved = (1.9, 0.02), (1.9, 0.5), (1.2, 0.0)
    taken = samples(bench, quiet, busy, quiet, starved, quiet)
    assert bench["harness"].kept(taken, cores=2) == [taken[0], taken[2], taken[4]]
    timing = bench["harness"].timing(taken, cores=2)
    assert (timing.samples, timing.discarded, timing.quiet) == (3, 2, True)


def test_ticks_of_the_clock_do_not_count_as_others(bench):
    """In 0.3 s the kernel's count of two cores' busy time may be 0.04 s too high."""
    assert bench["harness"].kept(samples(bench, (0.58, 0.05), wall=0.3), cores=2)
    assert not bench["harness"].kept(samples(bench, (0.58, 0.12), wall=0.3), cores=2)


def test_a_side_that_was_never_quiet_says_so(bench):
    timing = bench["harness"].timing(samples(bench, (1.0, 1.0), (1.0, 0.9), (1.0, 1.0)), cores=2)
    assert (timing.samples, timing.discarded, timing.quiet) == (3, 0, False)


def test_a_busy_neighbour_is_seen(bench):
    """The kernel counts the work of a second process as that of others."""
    harness = bench["harness"]
    if not harness.busy_seconds():
        pytest.skip("this kernel does not tell how busy the machine is")
    cpu, busy = time.process_time(), harness.busy_seconds()
    work = "import time\nwhile time.process_time() < 0.5: pass"  # however long it waits for a core
    subprocess.run([sys.executable, "-c", work], check=True)
    assert harness.busy_seconds() - busy - (time.process_time() - cpu) > 0.1


def test_no_preactivation_is_left_near_the_kink(bench):
    ours = bench["ours"]
    generator = torch.Generator().manual_seed(0)
    rows, encoder = torch.randn(500, 16, generator=generator), torch.randn(300, 16, generator=generator)
    for level in (0.0, -6.0, -40.0):  # half of the features active, few, none
        bias = torch.full((300,), level)
        before = rows @ encoder.T + bias
        after = before - ours.off_the_kink(rows, encoder, bias)
        least = ours.MARGIN / 2 * before.std(0)
        assert (after.abs().amin(0) > 0.9 * least).all()
        assert abs(float(((after > 0) != (before > 0)).sum())) <= 0.001 * before.numel()
        if not level:
            assert (before.abs().amin(0) < least).any()


@pytest.fixture(scope="module")
def prepared(bench, gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    bench["ours"].Ours().prepare(spec(gpt2, folder))
    return folder


@pytest.mark.parametrize("objective", ["local", "e2e", "e2e_ds"])
def test_our_worker_steps_and_reports(bench, gpt2, prepared, objective, tmp_path):
    side = bench["ours"].Ours()
    side.build(spec(gpt2, prepared, objective=objective))
    side.step()
    report = side.report()
    assert report["l0"] == pytest.approx(6.0, abs=0.2)
    side.write_gradients(str(tmp_path / "gradients"))
    errors = bench["versus_reference"].compare(report, report, (tmp_path / "gradients", tmp_path / "gradients"))
    assert {f"gradient.{name}" for name in bench["ours"].WEIGHTS} < set(errors)
    assert set(errors.values()) == {0.0}
    side.step()
    assert side.report()["loss"] == pytest.approx(report["loss"], rel=1e-3)
    assert side.l0() == pytest.approx(report["l0"], abs=0.2)


def test_a_wrong_gradient_is_seen(bench, gpt2, prepared, tmp_path):
    gradients, reports = [tmp_path / "right", tmp_path / "wrong"], []
    for path, coefficient in zip(gradients, (1.0, 1.001), strict=True):
        side = bench["ours"].Ours()
        side.build(spec(gpt2, prepared, objective="local"))
        with torch.no_grad():
            side.trainees[0].sae.get_parameter("b_dec").mul_(coefficient)
        side.step()
        side.write_gradients(str(path))
        reports.append(side.report())
    errors = bench["versus_reference"].compare(reports[1], reports[0], (gradients[1], gradients[0]))
    assert max(errors.values()) > bench["versus_reference"].TOLERANCE["exact"]


def test_what_is_no_number_never_agrees(bench, tmp_path):
    right, wrong = {"b_dec": torch.ones(3)}, {"b_dec": torch.tensor([1.0, float("nan"), 1.0])}
    for path, tensors in ((tmp_path / "right", right), (tmp_path / "wrong", wrong)):
        save_file(tensors, path)
    errors = bench["versus_reference"].compare(
        {"kl": float("nan")}, {"kl": 1.0}, (tmp_path / "wrong", tmp_path / "right")
    )
    assert set(errors.values()) == {float("inf")}


def test_the_careful_kl_is_the_kl(bench):
    """Value and gradient against torch's own in float64, with more rows than it takes at once."""
    generator = torch.Generator().manual_seed(0)
    clean, spliced = (torch.randn(100, 30, generator=generator, dtype=torch.float64) for _ in "pq")
    spliced.requires_grad_()
    expected = kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")
    [gradient] = torch.autograd.grad(3 * expected, spliced)
    found = bench["reference"].CarefulKL.apply(spliced, clean)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, spliced)[0], gradient)


def test_the_breakdown_adds_up_and_leaves_nothing_behind(bench, gpt2, prepared):
    ours = bench["ours"]
    side = ours.Ours()
    side.build(spec(gpt2, prepared, objective="e2e"))
    before = ours.LanguageModel.replay, torch.autograd.backward, vars(type(side.trainees[0].sae)).get("encode")
    parts = side.breakdown(2)
    after = ours.LanguageModel.replay, torch.autograd.backward, vars(type(side.trainees[0].sae)).get("encode")
    assert before == after
    assert {"clean pass", "tail forward", "KL", "tail backward", "SAE backward", "optimiser"} <= set(parts)
    assert all(seconds >= 0 for seconds in parts.values())
    with ours.measured(side.trainees[0]) as clock:
        start = time.perf_counter()
        side.step()
        wall = time.perf_counter() - start
    assert sum(clock.spent.values()) <= wall


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own(bench, gpt2, prepared):
    harness = bench["harness"]
    environment = harness.worker_environment(1)
    worker = harness.Worker(BENCHMARKS / "ours.py", environment)
    try:
        worker.call("build", spec=spec(gpt2, prepared, objective="local"))
        memory = worker.call("begin_memory")
        [sample, *_] = worker.call("turn", seconds=0.0)
        assert sample["steps"] > 0 and sample["wall"] > 0 and sample["cpu"] > 0
        assert worker.call("peak_memory") >= memory["before"] * 0.9 > 0
        with pytest.raises(harness.WorkerError, match="no_such_thing"):
            worker.call("no_such_thing")
        assert worker.call("l0") > 0  # and it continues
    finally:
        worker.stop()


def test_a_worker_that_dies_says_how(bench, tmp_path):
    harness = bench["harness"]
    script = tmp_path / "dies.py"
    script.write_text("import sys\nsys.stdin.readline()\nprint('out of luck', file=sys.stderr)\nsys.exit(3)\n")
    worker = harness.Worker(script, harness.worker_environment(1))
    with pytest.raises(harness.WorkerError, match=r"(?s)exit status 3.*out of luck"):
        worker.call("build")
    worker.stop()


@pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")
@pytest.mark.parametrize("precision", ["exact", "mixed"])
def test_the_tail_runs_in_the_precision_asked_for(bench, gpt2, prepared, precision):
    side = bench["ours"].Ours()
    side.build(spec(gpt2, prepared, objective="e2e", precision=precision))
    assert side.trainees[0].config.precision == precision
    assert side.tail.dtype == (torch.float32 if precision == "exact" else torch.bfloat16)
    parts = side.breakdown(1)
    assert parts["tail forward"] > 0 and parts["tail backward"] > 0


def test_transcoders_jointly_apart_and_in_single_runs(bench, gpt2):
    """The three sides take a step of the same members, with as many active features."""
    more = {"threads": 1, "seed": 0, "shape": vars(gpt2), "objective": "e2e", "ratio": 4, "batch": 2, "context": 8}
    for how, passes, trainees in (("joint", 1, 1), ("apart", 1, 4), ("single", 4, 4)):
        side = bench["joint_worker"].Transcoders()
        side.build({**more, "how": how, "l0": 6.0})
        assert (len(side.in_one_pass), len(side.trainees)) == (passes, trainees)
        side.step()
        assert side.l0() == pytest.approx(6, abs=0.1)
        assert sum(len(each.parts) for each in side.trainees) == 4 and all(each.step == 1 for each in side.trainees)
