"""The least time that a training step can take on a card, on paper: `python benchmarks/roofline.py [--write]`.

A kernel takes as long as its arithmetic or its traffic with the card's memory, whichever is longer; a step is one
kernel after another. Arithmetic is that of `flops.py`, but for the KL, whose kernels compute both passes' logits twice.
Traffic is what no arrangement of that kernel can spare: each factor of a product is read once and its result written
once, and what is done element by element is part of the product before it. A sparse dictionary gathers a row for every
pair, in strips that stay in the card's cache, as `endwise.kernels.triton_sparse` does: each table comes from memory
once.

`--write` brings the tables in docs/performance.md and benchmarks/README.md up to date.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from endwise.training.planning.flops import (
    OPTIMISER_OPERATIONS,
    PRODUCTS_PER_ACTIVE_LATENT,
    product_flops,
    sparse_flops,
)
from flops import minimal_flops, stretches
from shapes import CARD_SHAPES, OBJECTIVES, Shape

ROOT = Path(__file__).parents[1]
L0 = 50.0
"""Active features per token of the steps that are counted and timed."""
FP32, PAIR = 4, 8
"""Bytes of a number that is kept in full precision (weights, gradients, the optimiser's moments), and of a pair: its
feature and its value."""
STRIP = 512
"""Bytes of a row that are gathered at a time (`endwise.kernels.triton_sparse`)."""
OPTIMISER_BYTES = 8 * FP32
"""For each parameter: the gradient is read for its norm; it, the weight and two moments are read; these are written."""
KL_PRODUCTS = {"statistics": 2, "differences": 2, "add_product": 1}
"""Products of hidden states and unembedding in each of the KL's kernels (`endwise.kernels.triton_vocabulary`)."""
EAGER_KL_BYTES = 140
"""About what the eager KL moves for each logit in bf16 besides its three products (docs/performance.md)."""
DECODER = replace(CARD_SHAPES["gpt2-small"], d_sae=65536)
DECODER_L0 = 64
"""Shape and L0 at which a sparse decoder is compared with a dense one."""


@dataclass(frozen=True)
class Machine:
    name: str
    bandwidth: float
    """Bytes a second."""
    rates: dict[str, float]
    """Operations a second in products of `bf16`, `tf32` and `fp32`."""
    cached: float
    """Bytes a second out of the cache."""

    def rate(self, numbers: str) -> float:
        """`tf32x3` are products of fp32 as three of tf32."""
        return self.rates["tf32"] / 3 if numbers == "tf32x3" else self.rates[numbers]


_DATA_SHEET = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}
_REACHED = 790 / 989.4
H200 = Machine("H200", 4.3e12, {numbers: rate * _REACHED for numbers, rate in _DATA_SHEET.items()}, 9.7e12)
"""Bandwidth and the rate in bf16 as they were measured on such a card; the others reach as much of the data sheet. The
cache's: https://github.com/te42kyfo/gpu-benches/blob/master/gpu-l2-cache/h200.txt."""
CACHE = 40e6
"""Bytes of a strip of a table that the cache can hold."""
H200_GIB = 139
"""Memory of it that a process can have, about."""


@dataclass(frozen=True)
class Numbers:
    """Numbers in which a step multiplies."""

    products: str
    kl: str
    size: int
    """Bytes of an activation, and of a weight of the language model."""


PRECISIONS = {
    "mixed": Numbers("bf16", "bf16", 2),
    "exact, TF32": Numbers("tf32", "tf32", FP32),
    "exact": Numbers("fp32", "tf32x3", FP32),
}


@dataclass(frozen=True)
class Kernel:
    name: str
    flops: float
    bytes: float
    numbers: str
    gathered: float = 0.0
    """Bytes of rows that are gathered, out of the cache."""

    def _times(self, machine: Machine) -> dict[str, float]:
        return {
            "memory": self.bytes / machine.bandwidth,
            "cache": self.gathered / machine.cached,
            "arithmetic": self.flops / machine.rate(self.numbers),
        }

    def seconds(self, machine: Machine) -> float:
        return max(self._times(machine).values())

    def bound(self, machine: Machine) -> str:
        times = self._times(machine)
        return max(times, key=lambda each: times[each])


def step_kernels(shape: Shape, objective: str, precision: str, l0: float = L0) -> list[Kernel]:
    """Kernels of one step, in order."""
    numbers, flops = PRECISIONS[precision], minimal_flops(shape, objective, l0)
    local, layers = objective == "local", range(shape.layers)
    after = layers[shape.layer :]
    clean = layers[: shape.layer] if local else layers
    weights = 2 * shape.d_model * shape.d_sae
    found = [
        Kernel("clean pass", flops["clean"], _traffic(shape, clean, numbers.size), numbers.products),
        *dictionary_forward(shape, precision, l0),
    ]
    states = shape.tokens * shape.d_model * numbers.size
    if local:
        found.append(Kernel("local MSE", 0, 3 * states, "fp32"))
    else:
        forward = _traffic(shape, after, numbers.size)
        found.append(Kernel("tail, forward", flops["tail_forward"], forward, numbers.products))
        found += kl_kernels(shape, precision)
        if objective == "e2e_ds":
            found.append(Kernel("downstream MSE", 0, 3 * states * (len(after) - 1), "fp32"))
        backward = _traffic(shape, after, numbers.size, attention=2)
        found.append(Kernel("tail, backward", flops["tail_gradient"], backward, numbers.products))
    found += dictionary_gradients(shape, precision, l0)
    optimiser = Kernel("Adam", OPTIMISER_OPERATIONS * weights, OPTIMISER_BYTES * weights, "fp32")
    return [*found, optimiser]


def _traffic(shape: Shape, layers: range, size: int, attention: int = 1) -> float:
    """Bytes that some blocks move: matrices, each product's input and output, and queries, keys, values and results."""
    (queries, keys), mlp = shape.attention_widths, shape.mlp_matrices - 1
    products = 4 * shape.d_model + 2 * (queries + keys) + (mlp + 1) * shape.d_mlp
    between = attention * 2 * (queries + keys)
    weights = sum(stretch.weights for stretch in stretches(shape, layers))
    return float(size * (weights + len(layers) * shape.tokens * (products + between)))


def dictionary_forward(shape: Shape, precision: str, l0: float) -> list[Kernel]:
    """Encode in one product, whose result is written as pairs alone, and decode."""
    numbers, size = PRECISIONS[precision], PRECISIONS[precision].size
    weights, states = shape.d_model * shape.d_sae, shape.tokens * shape.d_model
    pairs = shape.tokens * l0
    copies = [Kernel("weights to bf16", 0, 2 * weights * (FP32 + size), "bf16")] if size < FP32 else []
    encoder = product_flops(shape.tokens, shape.d_model, shape.d_sae)
    return [
        *copies,
        Kernel("encoder", encoder, size * (weights + states) + PAIR * pairs, numbers.products),
        _gather("decoder", shape, size, l0, shape.d_sae, size * states),
    ]


def dictionary_gradients(shape: Shape, precision: str, l0: float) -> list[Kernel]:
    """Gather rows twice: of the reconstruction's gradient, for both gradients of the decoder, and of the input."""
    size, rows = PRECISIONS[precision].size, shape.tokens
    weights = shape.d_model * shape.d_sae
    both = weights * (size + FP32) + shape.tokens * l0 * (8 * _strips(shape, size) + 12 + size)
    return [
        _gather("decoder's gradients", shape, size, l0, rows, both, sums=2),
        _gather("encoder's gradient", shape, size, l0, rows, FP32 * weights),
    ]


def _gather(name: str, shape: Shape, size: int, l0: float, rows: int, besides: float, sums: int = 1) -> Kernel:
    """Gather a row for every pair out of a table of so many rows, and add it up or multiply it.

    Args:
        besides: bytes that move besides the table and, for every strip, the pairs.
        sums: of sums and dot products that are taken of what is gathered.
    """
    pairs = shape.tokens * l0
    gathered, table = pairs * shape.d_model * size, rows * shape.d_model * size
    moved = (table if rows * STRIP <= CACHE else gathered) + _strips(shape, size) * (8 + size) * pairs + besides
    flops = sums * sparse_flops(shape.tokens, shape.d_model, l0) / PRODUCTS_PER_ACTIVE_LATENT
    return Kernel(name, flops, moved, "fp32", gathered)


def _strips(shape: Shape, size: int) -> int:
    return -(-shape.d_model * size // STRIP)


def kl_kernels(shape: Shape, precision: str) -> list[Kernel]:
    """KL and its gradient, as `on_cuda` launches them."""
    numbers = PRECISIONS[precision]
    states, weight = shape.tokens * shape.d_model, shape.d_model * shape.vocab
    read, logits = (2 * states + weight) * numbers.size, shape.tokens * shape.vocab * numbers.size
    traffic = {
        "statistics": read,
        "differences": read + logits,
        "add_product": logits + weight * numbers.size + FP32 * states,
    }
    product = product_flops(shape.tokens, shape.d_model, shape.vocab)
    return [Kernel(f"KL: {name}", n * product, traffic[name], numbers.kl) for name, n in KL_PRODUCTS.items()]


def eager_kl(shape: Shape, precision: str) -> list[Kernel]:
    """KL in PyTorch's own operations: three products, and what follows them on every logit."""
    numbers = PRECISIONS[precision]
    logits, product = shape.tokens * shape.vocab, product_flops(shape.tokens, shape.d_model, shape.vocab)
    moved = EAGER_KL_BYTES * logits * numbers.size / PRECISIONS["mixed"].size
    return [
        Kernel("products", 3 * product, 3 * logits * numbers.size, numbers.products),
        Kernel("softmax, sum, gradient", 0, moved, "fp32"),
    ]


def dense_decoder(shape: Shape, precision: str) -> list[Kernel]:
    """Decode densely: a product forward, two backward, over all features."""
    numbers = PRECISIONS[precision]
    product = product_flops(shape.tokens, shape.d_model, shape.d_sae)
    latents, weights = shape.tokens * shape.d_sae * numbers.size, shape.d_model * shape.d_sae
    traffic = latents + weights * numbers.size, latents + weights * numbers.size, latents + weights * FP32
    return [Kernel("dense", product, moved, numbers.products) for moved in traffic]


def sparse_decoder(shape: Shape, precision: str, l0: float) -> list[Kernel]:
    """Decode by pairs, with the gradients of values and weights."""
    return [dictionary_forward(shape, precision, l0)[-1], dictionary_gradients(shape, precision, l0)[0]]


def seconds(kernels: Iterable[Kernel], machine: Machine = H200) -> float:
    return sum(kernel.seconds(machine) for kernel in kernels)


def tokens_per_second(name: str, objective: str, precision: str = "mixed", machine: Machine = H200) -> float:
    shape = CARD_SHAPES[name]
    return shape.tokens / seconds(step_kernels(shape, objective, precision), machine)


def least_gib(shape: Shape) -> float:
    """Memory that a step in mixed precision cannot do without: the model in bf16, the SAE's weights, gradients and
    moments in fp32, its copy in bf16, and the activations that the clean pass records.
    """
    parameters = sum(each.weights for each in stretches(shape, range(shape.layers))) + shape.vocab * shape.d_model
    dictionary, recorded = 2 * shape.d_model * shape.d_sae, 2 * shape.tokens * shape.d_model
    return (2 * (parameters + dictionary + recorded) + 4 * FP32 * dictionary) / (1 << 30)


PAPER_TOKENS = 410e6
"""Training tokens of the paper's runs."""


@dataclass(frozen=True)
class Goal:
    """An aim on an H200."""

    key: str
    """Its name among the figures that a card gave (`gpu_report.measured`)."""
    text: str
    target: float
    paper: float
    """Speed that the roofline allows."""
    at_least: bool = True
    form: str = "{:,.0f}"

    def met_by(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target

    @property
    def aim(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.form.format(self.target)}"


def goals() -> list[Goal]:
    gpt2 = CARD_SHAPES["gpt2-small"]
    e2e, ds = (tokens_per_second("gpt2-small", kind) for kind in ("e2e", "e2e_ds"))
    kl = seconds(eager_kl(gpt2, "mixed")) / seconds(kl_kernels(gpt2, "mixed"))
    decoder = {
        name: seconds(dense_decoder(DECODER, name)) / seconds(sparse_decoder(DECODER, name, DECODER_L0))
        for name in ("mixed", "exact")
    }
    minutes = "minutes that the paper's run takes so (410 million tokens; 680 on its A100)"
    decoded = f"decoder with gradients at {DECODER_L0} of {DECODER.d_sae:,} features, times as fast as dense in"
    times, fits = "{:.1f}", f"GiB that an e2e step of Gemma-2-2B's shape with 131,072 features takes, of {H200_GIB}"
    return [
        Goal("e2e", "e2e, GPT2-small's shape, mixed, tokens a second", 400_000, e2e),
        Goal("local", "local, the same", 1_500_000, tokens_per_second("gpt2-small", "local")),
        Goal("minutes", minutes, 20, PAPER_TOKENS / e2e / 60, False),
        Goal("ds", "time of an e2e+ds step, in e2e steps", 1.05, e2e / ds, False, "{:.2f}"),
        Goal("kl", "KL with its gradient in bf16, times as fast as eager", 6, kl, True, times),
        Goal("decoder, mixed", f"{decoded} bf16", 10, decoder["mixed"], True, times),
        Goal("decoder, exact", f"{decoded} fp32", 10, decoder["exact"], True, times),
        Goal("gemma", fits, H200_GIB, least_gib(CARD_SHAPES["gemma-2-2b"]), False),
    ]


def goals_table() -> Iterator[str]:
    yield "| goal | aim | on paper | |"
    yield "|---|---|---|---|"
    for goal in goals():
        within = "" if goal.met_by(goal.paper) else "**out of reach on paper**"
        yield f"| {goal.text} | {goal.aim} | {goal.form.format(goal.paper)} | {within} |"


PAPER_SHAPES = ("gpt2-small", "smollm2-135m", "gemma-2-2b")


def kernels_table() -> Iterator[str]:
    """Milliseconds of every kernel of an e2e+ds step in mixed precision, and what bounds it."""
    by_shape = [step_kernels(CARD_SHAPES[name], "e2e_ds", "mixed") for name in PAPER_SHAPES]
    yield f"| kernel, ms | {' | '.join(PAPER_SHAPES)} |"
    yield f"|---|{'---|' * len(PAPER_SHAPES)}"
    for same in zip(*by_shape, strict=True):
        cells = (f"{1e3 * each.seconds(H200):.2f} {each.bound(H200)}" for each in same)
        yield f"| {same[0].name} | {' | '.join(cells)} |"
    eager = [eager_kl(CARD_SHAPES[name], "mixed") for name in PAPER_SHAPES]
    for what, sums in (("together", by_shape), ("the eager KL, in place of ours", eager)):
        yield f"| {what} | {' | '.join(f'{1e3 * seconds(each):.2f}' for each in sums)} |"


def steps_table() -> Iterator[str]:
    yield f"| shape | kind | Tflop | GB | {' | '.join(f'tokens a second, {name}' for name in PRECISIONS)} |"
    yield f"|---|---|---|---|{'---|' * len(PRECISIONS)}"
    for name in PAPER_SHAPES:
        for kind in OBJECTIVES:
            kernels = step_kernels(CARD_SHAPES[name], kind, "mixed")
            sums = f"{sum(k.flops for k in kernels) / 1e12:.2f} | {sum(k.bytes for k in kernels) / 1e9:.1f}"
            speeds = (f"{tokens_per_second(name, kind, precision):,.0f}" for precision in PRECISIONS)
            yield f"| {name} | {kind} | {sums} | {' | '.join(speeds)} |"


def decoders_table() -> Iterator[str]:
    """Sparse decoders of 64 active features against a dense one in bf16."""
    yield "| | forward, ms | both gradients, ms | dense in bf16, ms | dense : sparse |"
    yield "|---|---|---|---|---|"
    for features in (DECODER.d_sae, CARD_SHAPES["gpt2-small"].d_sae):
        shape = replace(DECODER, d_sae=features)
        dense = seconds(dense_decoder(shape, "mixed"))
        for name, precision in {"fp32": "exact", "bf16": "mixed"}.items():
            kernels = sparse_decoder(shape, precision, DECODER_L0)
            cells = [f"{1e3 * each.seconds(H200):.2f}" for each in kernels]
            cells += [f"{1e3 * dense:.1f}", f"{dense / seconds(kernels):.1f}"]
            yield f"| {features:,} features, {name} | {' | '.join(cells)} |"


PAGES = {
    ROOT / "docs" / "performance.md": {
        "roofline of kernels": kernels_table,
        "roofline of steps": steps_table,
        "roofline of decoders": decoders_table,
    },
    ROOT / "benchmarks" / "README.md": {"goals": goals_table},
}
"""By page, the tables between `<!-- NAME -->` and `<!-- end -->`."""


def written(page: Path) -> str:
    """The page with its tables as they are to be."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        marked = re.compile(rf"(<!-- {name}[^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        lines = "\n".join(table())
        text, found = marked.subn(lambda match, lines=lines: f"{match[1]}\n{lines}\n\n{match[2]}", text)
        assert found == 1, f"{page} has no table {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring the pages up to date, and print nothing")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(written(page), encoding="utf-8")
    else:
        for table in (kernels_table, steps_table, decoders_table, goals_table):
            print(*table(), "", sep="\n")


if __name__ == "__main__":
    main()
