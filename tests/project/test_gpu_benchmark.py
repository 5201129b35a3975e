"""The script for a card, tried on a processor, and the roofline that it is held against."""

import gc
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_modules import benchmark_modules
from places import BENCHMARKS

MODULES = ("card", "gpu", "gpu_job", "gpu_kernels", "gpu_parts", "gpu_report", "roofline", "shapes", "flops")
EVERYWHERE = (
    *("card", "steps gpt2-small mixed", "kernels", "waits", "long run"),
    *("steps smollm2-135m exact, TF32", "steps tinystories-1m exact", "steps gemma-2-2b mixed", "resume", "plan"),
)
"""Parts that need nothing but endwise; of steps, every shape and every precision once."""


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def results(bench, loaded_once, tmp_path_factory):
    """Results of the parts on tiny shapes, made as their processes would make them."""
    gpu, out = bench["gpu"], tmp_path_factory.mktemp("results") / "gpu.json"
    results = gpu.Results(out, {"device": "cpu", "tiny": True})
    results.all["calls"].append({"command": "python gpu.py", "date": "2026-11-30"})
    runner = gpu.Runner(results, "cpu", True, 1.0)
    gc.freeze()  # or each row would look through all that the tests have imported, for what it may give back
    for part in EVERYWHERE:
        replies = io.StringIO()
        bench["gpu_parts"].work(runner.job_of(part, str(tmp_path_factory.mktemp("scratch"))), replies)
        for line in replies.getvalue().splitlines():
            told = json.loads(line)
            results.put(part, told["row"], told["found"])
        results.end(part, "done")
        for name, row in results.part(part)["rows"].items():
            if "tensors_bytes" in row:  # the next in one process has its memory there already
                row["tensors_bytes"] = 1 << 20 if (part, name) == ("steps gpt2-small mixed", "e2e") else 0
    gc.unfreeze()
    results.end("peer saelens topk", "skipped", reason="not installed: sae_lens")
    return results.all


@pytest.fixture(scope="module")
def made(results):
    return {name: part["rows"] for name, part in results["parts"].items() if part["status"] == "done"}


pytestmark = pytest.mark.filterwarnings("ignore:training.precision=mixed on a processor")


def test_every_row_is_made(made):
    failed = {f"{part}: {name}": row.get("traceback") for part, rows in made.items() for name, row in rows.items()}
    assert not {name: told for name, told in failed.items() if told}
    assert all(made.values())
    assert made["plan"]["gpt2-small mixed e2e"]["ratio"] > 0


def test_steps_are_steps(made, bench):
    for part in (part for part in EVERYWHERE if part.startswith("steps ")):
        for row in made[part].values():
            assert row["l0"] == pytest.approx(bench["gpu_job"].TINY_L0, abs=1.5) and math.isfinite(row["loss"])
            assert min(row["tokens_per_second"], row["mfu"], row["share_of_roofline"]) > 0
            assert row["attention"] == ("eager" if "gemma" in part else "sdpa"), "as transformers has it"


def test_kernels_are_held_to_their_definitions(made):
    """On a processor the eager ones alone, and the sparse decoder with the dense one."""
    for name, row in made["kernels"].items():
        worst = max(error for side in row["errors"].values() for error in side.values())
        assert worst < (3e-2 if "bf16" in name else 1e-5), name
        assert set(row["seconds"]) == ({"ours", "dense"} if "decoder" in name else {"eager"})
    assert {name.partition(" ")[0] for name in made["kernels"]} == {
        "kl",
        "cross-entropy",
        "active",
        "largest",
        "decoder",
    }


def test_a_wrong_kernel_is_seen(bench, tmp_path):
    class Wrong(bench["gpu_kernels"].EagerKernels):
        def kl(self, clean, spliced, keep, unembedding):
            return super().kl(clean, 1.01 * spliced, keep, unembedding)

    job = bench["gpu_job"].Job("cpu", True, 0.0, tmp_path)
    problem = bench["gpu_kernels"]._kl(job, job.shape("gpt2-small"), "fp32")
    errors = bench["gpu_kernels"]._errors(problem.run(Wrong(), 8), problem.definition(8))
    assert min(errors.values()) > 1e-3


def test_waits_are_counted(made, bench):
    """A processor finds latents by counting, which is a wait on a card; and what it is asked for, it counts exactly."""
    assert all(row["waits_per_step"] > 0 for row in made["waits"].values())
    host = bench["card"].Host()
    value = bench["card"].torch.ones(3)
    assert host.waits(lambda: [value.sum().item() for _ in range(4)]) == {"aten::_local_scalar_dense": 4}
    assert host.waits(lambda: value + value) == {}


def test_a_profiler_that_sees_nothing_counts_nothing(bench):
    class Blind(bench["card"].Host):
        host_waits = ("cudaStreamSynchronize",)

    with pytest.raises(bench["card"].BlindProfiler, match="no wait where there is one"):
        Blind().waits(lambda: None)


def test_runs_agree_with_themselves(made):
    assert made["long run"]["first steps, as on a processor"]["largest_difference"] == 0
    assert all(row["same_bits"] and row["agrees"] for row in made["resume"].values())


def test_the_report_has_a_line_for_every_row(results, bench, tmp_path):
    out = tmp_path / "gpu.json"
    bench["gpu_report"].write_report(results, out)
    page = (tmp_path / "gpu.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    for part in ("steps gpt2-small mixed", "kernels", "waits"):
        for name in results["parts"][part]["rows"]:
            assert any(name in line for line in lines), name
    assert "No figures" not in page and "Tried on a processor" in page and "python gpu.py" in page
    assert "- peer saelens topk: skipped; not installed: sae_lens" in page
    assert {path.name for path in (tmp_path / "gpu-figures").glob("*.png")} == {"steps.png", "long_run.png"}
    assert bench["gpu_report"].summary(results, out).endswith("gpu.json: parts 10 done, 1 skipped")
    assert "not judged" in page


def test_goals_are_judged_on_the_card_they_are_for(results, bench):
    report, device = bench["gpu_report"], results["parts"]["card"]["rows"]["device"]
    whole = {**results, "made_with": {"device": "cuda", "tiny": False}}
    whole["parts"] = {
        **results["parts"],
        "card": {"status": "done", "rows": {"device": {**device, "gpu": "NVIDIA H200"}}},
    }
    assert report.is_judged(whole) and not report.is_judged(results)
    by_key = {goal.key: goal for goal in bench["roofline"].goals()}
    found = report.measured(whole)
    assert {"e2e", "local", "minutes", "ds", "decoder, mixed", "decoder, exact", "gemma"} == set(found)
    assert report.verdict(by_key["e2e"], {"e2e": 400_000.0}) == "met"
    assert report.verdict(by_key["ds"], {"ds": 1.06}) == "**missed**"
    assert report.verdict(by_key["kl"], found) == "not measured"


# The driver, with a worker that does what its parts' names say.

WORKER = """
import json, os, sys, time
told = json.loads(sys.argv[1])
rows = {"card": ["device"], "crashes": ["first", "crash"], "hangs": ["first", "hang"], "raises": ["first", "bad"],
        "lacks": ["first", "deep"]}
for row in rows.get(told["part"], ["first"]):
    if row in told["have"]:
        continue
    if os.path.exists(told["results"] + ".mended"):
        found = {"ok": True}
    elif row == "crash":
        sys.stderr.write("out of luck")
        sys.stderr.flush()
        os._exit(11)
    elif row == "hang":
        time.sleep(600)
    else:
        raised = {"bad": "ValueError: bad", "deep": "ModuleNotFoundError: No module named 'deeper'"}
        found = {"failed": raised[row]} if row in raised else {"ok": True}
    print(json.dumps({"row": row, "found": found}), flush=True)
"""


@pytest.fixture
def drive(bench, tmp_path):
    gpu, script, out = bench["gpu"], tmp_path / "worker.py", tmp_path / "results" / "gpu.json"
    script.write_text(WORKER)

    def drive(*parts, minutes=1.0, made_with=None):
        results = gpu.Results(out, made_with or {"device": "cpu"})
        gpu.Runner(results, "cpu", True, minutes, script).run(gpu.Part(*part) for part in parts)
        kept = json.loads(out.read_text())["parts"]
        assert kept == results.all["parts"], "what is on the disk is what is known"
        return kept

    drive.out = out
    return drive


def test_a_part_that_crashes_hangs_or_fails_costs_the_others_nothing(drive):
    parts = [
        ("card", 60),
        ("crashes", 60),
        ("hangs", 3),
        ("needs", 60, ("no_such_module",)),
        ("raises", 60),
        ("lacks", 60, ("json",)),
        ("good", 60),
    ]
    found = drive(*parts)
    status = {name: part["status"] for name, part in found.items()}
    expected = dict.fromkeys(("crashes", "hangs", "raises"), "failed") | {
        "card": "done",
        "needs": "skipped",
        "lacks": "skipped",
        "good": "done",
    }
    assert status == expected
    assert found["crashes"]["log"] == "out of luck" and "ended with 11" in found["crashes"]["reason"]
    assert found["needs"]["reason"] == "not installed: no_such_module"
    assert found["lacks"]["reason"] == "rows lack what json need"
    assert all("first" in part["rows"] for name, part in found.items() if name not in ("card", "needs", "hangs"))
    Path(f"{drive.out}.mended").touch()
    dates = {name: part.get("date") for name, part in found.items()}
    again = drive(*parts)
    assert {name: part["status"] for name, part in again.items()} == {
        **dict.fromkeys(expected, "done"),
        "needs": "skipped",
    }
    assert again["good"]["date"] == dates["good"], "what was done is not made again"
    assert set(again["raises"]["rows"]) == {"first", "bad"} and again["raises"]["rows"]["bad"] == {"ok": True}


def test_when_the_minutes_are_over_the_rest_is_left(drive):
    found = drive(("card", 60), ("good", 60), minutes=0.0)
    assert {part["status"] for part in found.values()} == {"left"}
    assert {part["status"] for part in drive(("card", 60), ("good", 60)).values()} == {"done"}


def test_without_a_device_nothing_else_is_tried(drive):
    found = drive(("card", 0.0), ("good", 60))
    assert set(found) == {"card"} and found["card"]["status"] == "failed"


def test_results_of_other_settings_are_not_mixed(drive, bench):
    drive(("card", 60))
    with pytest.raises(bench["gpu"].OtherResults, match="Give another --out"):
        drive(("card", 60), made_with={"device": "cuda"})
    whole = json.loads(drive.out.read_text())
    others = [
        {},
        [],
        whole | {"calls": None},
        whole | {"parts": ["card"]},
        whole | {"parts": {"card": {"status": "done"}}},
    ]
    for text in (*map(json.dumps, others), json.dumps(whole)[:-9]):
        drive.out.write_text(text)
        with pytest.raises(bench["gpu"].OtherResults, match="no whole file of results"):
            drive(("card", 60))


def called(bench, monkeypatch, capsys, *arguments):
    """Return the exit code of the command in this process, and what it says."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *map(str, arguments)])
    with monkeypatch.context() as patched:
        patched.setattr(bench["gpu"].signal, "signal", lambda *_: None)
        code = bench["gpu"].main()
    told = capsys.readouterr()
    return code, told.out + told.err


def test_an_interrupted_call_reports_what_it_has(bench, monkeypatch, capsys, tmp_path):
    def interrupted(self, parts):
        self.results.end("card", "done")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench["gpu"].Runner, "run", interrupted)
    code, told = called(bench, monkeypatch, capsys, "--out", tmp_path / "new" / "gpu.json")
    assert (code, told) == (130, f"{tmp_path / 'new' / 'gpu.json'}: parts 1 done\n")
    assert (tmp_path / "new" / "gpu.md").exists()


def test_a_call_that_cannot_be_is_refused_first(bench, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "gpu.json"):
        code, told = called(bench, monkeypatch, capsys, "--out", out)
        assert code == 2 and "Give another --out" in told and told.count("\n") == 1
    for minutes in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            called(bench, monkeypatch, capsys, "--minutes", minutes)
        assert "--minutes" in capsys.readouterr().err


def test_every_part_is_known_to_the_worker(bench, tmp_path):
    """Those that need other packages too; their rows are not made here."""
    job = bench["gpu_job"].Job("cpu", True, 0.0, tmp_path, {"steps gpt2-small mixed": {"e2e": {"tensors_bytes": 1}}})
    for part in bench["gpu"].PARTS:
        assert bench["gpu_parts"].rows_of(part.name, job), part.name


# The roofline.


def test_the_pages_have_the_tables_as_they_are_computed(bench):
    for page in bench["roofline"].PAGES:
        assert page.read_text(encoding="utf-8") == bench["roofline"].written(page), "run `make docs`"


def test_a_kernel_takes_as_long_as_the_longer_of_two(bench):
    machine = bench["roofline"].Machine("a card", 10.0, {"bf16": 4.0, "tf32": 3.0, "fp32": 1.0}, 20.0)
    for (flops, moved, numbers, gathered), expected in {
        (8.0, 10.0, "bf16", 0.0): (2.0, "arithmetic"),
        (8.0, 40.0, "bf16", 0.0): (4.0, "memory"),
        (8.0, 10.0, "tf32x3", 0.0): (8.0, "arithmetic"),
        (0.0, 5.0, "fp32", 60.0): (3.0, "cache"),
    }.items():
        kernel = bench["roofline"].Kernel("", flops, moved, numbers, gathered)
        assert (kernel.seconds(machine), kernel.bound(machine)) == expected


@pytest.mark.parametrize("objective", ["local", "e2e", "e2e_ds"])
def test_the_roofline_counts_the_operations_of_the_step(bench, objective):
    """Those that a step cannot do without, two more products with the unembedding, and the optimiser's."""
    roofline, shape = bench["roofline"], bench["shapes"].CARD_SHAPES["smollm2-135m"]
    least = bench["flops"].minimal_flops(shape, objective, 50.0)
    kernels = roofline.step_kernels(shape, objective, "mixed", 50.0)
    adam = 17 * 2 * shape.d_model * shape.d_sae
    more = 0 if objective == "local" else 2 / 3 * least["unembedding"]
    assert sum(kernel.flops for kernel in kernels) == pytest.approx(sum(least.values()) + more + adam)


def test_traffic_written_out_by_hand(bench):
    """A GPT-2 of width 4, MLP 16, vocabulary 10, 2 blocks, 8 tokens, 32 features, L0 3; bf16."""
    shape = bench["shapes"].Shape("gpt2", 2, 4, 1, 10, 8, 8, batch=1, layer=1, d_sae=32)
    moved = {k.name: k.bytes for k in bench["roofline"].step_kernels(shape, "e2e_ds", "mixed", 3.0)}
    weights = 4 * 12 + 4 * 4 + 2 * 4 * 16
    products = 8 * ((4 + 12) + (4 + 4) + (4 + 16) + (16 + 4))
    attention = 8 * (12 + 4)
    block, backward = 2 * (weights + products + attention), 2 * (weights + products + 2 * attention)
    pairs, matrix, states = 24, 32 * 4, 8 * 4
    assert moved == {
        "clean pass": 2 * block,
        "weights to bf16": 2 * matrix * 6,
        "encoder": 2 * (matrix + 32) + 8 * pairs,
        "decoder": 2 * matrix + 10 * pairs + 2 * states,
        "tail, forward": block,
        "KL: statistics": 2 * (2 * 32 + 40),
        "KL: differences": 2 * (2 * 32 + 40) + 2 * 80,
        "KL: add_product": 2 * 80 + 2 * 40 + 4 * 32,
        "downstream MSE": 0,
        "tail, backward": backward,
        "decoder's gradients": 2 * states + 10 * pairs + (2 + 4) * matrix + (8 + 14) * pairs,
        "encoder's gradient": 2 * states + 10 * pairs + 4 * matrix,
        "Adam": 32 * 2 * matrix,
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_command(tmp_path):
    """Every part in its own process; a second call has nothing to do."""
    out, environment = tmp_path / "gpu.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "60",
        "--out",
        str(out),
    ]
    for _ in "12":
        told = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=900)
        assert told.returncode == 0, told.stdout + told.stderr
        assert " failed" not in told.stdout.splitlines()[-1] and " done" in told.stdout.splitlines()[-1]
    again = dict(line.split(": ", 1) for line in told.stdout.splitlines()[:-1])
    assert again.pop("plan") == "done"  # of the steps that were taken after it
    assert all(status.startswith("skipped") for status in again.values())
    assert "MFU" in (tmp_path / "gpu.md").read_text()


def test_a_card_that_is_not_there_is_said_so(bench, monkeypatch):
    monkeypatch.setattr(bench["card"].torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device is there"):
        bench["card"].device_named("cuda")
