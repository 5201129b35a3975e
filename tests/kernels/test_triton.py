"""Triton kernels on a CPU: their values, in its interpreter, and that compilers for cards take them.

Both run in processes of their own; Triton reads whether it is to interpret when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

import warm
from endwise.kernels import has_version, kernels_for, registered

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
"""Most shared memory of a program, by card (CUDA C++ Programming Guide, technical specifications)."""
FILES = sorted(HERE.glob("interpreted_*.py"))
KERNELS = ["statistics", "differences", "add_product", "bag_sums", "chunk_sums", "pair_dots"]
ENCODER = ["candidate_bits", "block_maxima", "places_of_bits"]
"""Kernels on bf16 numbers and bits, whatever they search."""
needs_triton = pytest.mark.skipif(
    not has_version("triton", Version("3.7")), reason="Triton 3.7 or newer is not installed"
)


def run(command, **environment):
    """Return what a process of Python prints that succeeds."""
    own = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=own, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreted(marked, *files):
    told = run([sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, *files], TRITON_INTERPRET="1")
    assert " passed" in told and "skipped" not in told


@needs_triton
def test_values_in_the_interpreter():
    interpreted("not slow", *FILES)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_more_values_in_the_interpreter(file):
    interpreted("slow", file)


def compiled(cache, *options):
    """Rows of the table: kernel, numbers, what of, card, registers, spilled, shared memory in KiB."""
    command = warm.command(ROOT / "tools" / "kernel_resources.py", *options)
    lines = run(command, TRITON_CACHE_DIR=str(cache)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def check(rows):
    for kernel, numbers, of, card, registers, spilled, shared in rows:
        assert 0 < int(registers) <= 255 and int(spilled) == 0, (kernel, numbers, of, card)
        assert int(shared) <= SHARED_KIB[card]


@needs_triton
def test_a_kernel_compiles_without_spilling(tmp_path):
    rows = compiled(tmp_path, "--arch", "80", "--dtype", "float32", "--kernel", "differences", "bag_sums")
    variants = [("differences", "KL"), ("differences", "CE"), ("bag_sums", "sums"), ("bag_sums", "gradients")]
    assert [row[0:4] for row in rows] == [[kernel, "fp32", of, "sm_80"] for kernel, of in variants]
    check(rows)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_kernels_compile_without_spilling(tmp_path, dtype):
    rows = compiled(tmp_path, "--dtype", dtype)
    kernels = [*KERNELS, *ENCODER] if dtype == "bfloat16" else KERNELS
    assert {(row[0], row[3]) for row in rows} == {(kernel, card) for kernel in kernels for card in SHARED_KIB}
    check(rows)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch asks the card")
def test_without_cuda_there_is_nothing_to_choose():
    assert kernels_for(torch.device("cuda")) is registered()["eager"]


def test_an_older_triton_is_none(monkeypatch):
    monkeypatch.setattr("endwise.kernels.find_spec", lambda package: package == "triton" or None)
    monkeypatch.setattr("endwise.kernels.import_module", lambda package: SimpleNamespace(__version__="3.6.0"))
    assert has_version("triton", Version("3.6")) and not has_version("triton", Version("3.7"))
    assert not has_version("no_triton", Version("3.6"))
