"""Compile every Triton kernel as it is launched, for cards that need not be there, and print what each takes.

    python tools/kernel_resources.py [--arch 80 90 100] [--dtype bfloat16 float32] [--kernel NAME ...]

Prints the table of docs/performance.md: registers of a thread, bytes that it spills, and shared memory of a program,
by the assembler's own account (`cuobjdump`, which Triton brings).
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from endwise.kernels import Pairs, Unembedding
from endwise.kernels.encoder_on_cuda import Bounds
from endwise.kernels.on_cuda import TritonKernels

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Most bytes that a program can have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
ROWS, VOCAB, WIDTH = 1024, 50257, 768
FEATURES, PAIRS = 46080, 51200
DTYPES = ["bfloat16", "float32", "float16"]
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


OF = {("PAIR", True): "KL", ("PAIR", False): "CE", ("DOTS", False): "sums", ("DOTS", True): "gradients"}
"""Uses of the kernels' variants, by their constants."""


class Launched(NamedTuple):
    """A kernel with all that its machine code depends on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16, as the launcher would find."""

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Resources(NamedTuple):
    registers: int
    spilled: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""


def launched(dtype: torch.dtype) -> list[Launched]:
    """Every kernel that is launched, KL's and cross-entropy's with bias and soft-cap, on tensors without values; the
    encoder's with those in bf16, whatever it searches.
    """
    found: dict[Launched, None] = {}

    def record(kernel: Any, _grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found[_launched(kernel, arguments, constants)] = None

    kernels = TritonKernels(record)
    with torch.device("meta"):
        hidden = torch.empty(ROWS, WIDTH, dtype=dtype)
        keep, targets = torch.empty(ROWS, dtype=torch.bool), torch.empty(ROWS, dtype=torch.int64)
        weight, bias = torch.empty(VOCAB, WIDTH, dtype=dtype), torch.empty(VOCAB, dtype=dtype)
        unembedding = Unembedding(weight, bias, softcap=30.0)
        kernels.kl(hidden, hidden, keep, unembedding)
        kernels.cross_entropy(hidden, targets, keep, unembedding, with_gradient=True)
        _launch_sparse(kernels, hidden)
        if dtype == torch.bfloat16:
            bounds = Bounds(record, torch.empty(ROWS, WIDTH), torch.empty(FEATURES, WIDTH), torch.empty(FEATURES))
            bounds.places(bounds.reaching(bounds.reached_by(1)), room=PAIRS)
    return list(found)


def _launch_sparse(kernels: TritonKernels, rows: torch.Tensor) -> None:
    places, starts = torch.empty(2, PAIRS, dtype=torch.int64), torch.empty(ROWS, dtype=torch.int64)
    pairs, numbers = Pairs(places[0], places[1], starts, FEATURES), rows.new_empty(PAIRS)
    table = rows.new_empty(FEATURES, WIDTH)
    kernels.weighted_sums(table, pairs.features, pairs.row_starts, numbers)
    kernels.dot_products(table, pairs.features, rows, pairs)
    kernels.decoder_gradients(table, pairs, numbers, rows)


def _launched(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launched:
    signature, aligned = [], []
    for parameter, value in zip(kernel.params, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, f"*{NAMES[value.dtype]}"))
            aligned.append(parameter.name)
        else:
            signature.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(parameter.name)
    signature += [(name, "constexpr") for name in constants if name in kernel.arg_names]
    return Launched(kernel, tuple(signature), tuple(constants.items()), tuple(aligned))


def compiled(each: Launched, arch: int) -> Resources:
    """Compile it for a compute capability."""
    names = each.kernel.arg_names
    constants = {name: value for name, value in each.constants if name in names}
    options = {name: value for name, value in each.constants if name not in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in each.aligned}
    source = ASTSource(each.kernel, dict(each.signature), constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        program = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
        usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared)


def table(archs: list[int], dtypes: list[torch.dtype], names: list[str] | None) -> Iterator[str]:
    """Rows of the table, as they are compiled."""
    yield "| kernel | numbers | of | card | registers | spilled, bytes | shared memory, KiB |"
    yield "|---|---|---|---|---|---|---|"
    for dtype in dtypes:
        for each in (each for each in launched(dtype) if names is None or each.name in names):
            of = next((name for constant, name in OF.items() if constant in each.constants), "all")
            for arch in archs:
                used = compiled(each, arch)
                numbers = f"{used.registers} | {used.spilled} | {used.shared / 1024:.0f}"
                yield f"| {each.name} | {NAMES[dtype]} | {of} | sm_{arch} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:2])
    parser.add_argument("--kernel", nargs="+", help="these alone")
    arguments = parser.parse_args()
    for line in table(arguments.arch, [getattr(torch, name) for name in arguments.dtype], arguments.kernel):
        print(line, flush=True)


if __name__ == "__main__":
    main()
