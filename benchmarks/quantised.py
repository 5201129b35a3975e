"""A spliced pass through weights of 8 and 4 bits, against the same in float32 and bfloat16, on one CPU thread.

    python benchmarks/quantised.py                                   # a Llama's shape, random weights
    python benchmarks/quantised.py --layers 2 --width 64 --rounds 2  # to try it

Timed is what a step asks of the frozen model: the clean pass, and the tail after the first block forward and backward.
All sides are in one process and take turns, so that a ratio is of one run. Seconds are of CPU time, which other
programs disturb little, and nothing is discarded. Sides whose package is missing (extras `bitsandbytes`, `torchao`) are
skipped. The error is of the gradient, relative to float32's, with random weights, which quantise no better than others.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from endwise import LanguageModel, Site, load_model
from endwise.common.digests import tensor_parts
from endwise.common.errors import EndwiseError
from endwise.models.plain_weights import QUANTISERS
from endwise.models.sites import Part
from harness import give_out, machine

SITE = Site(1, Part.RESID_PRE)
SIDES: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}}
SIDES |= {kind: {"quantization": kind} for kind in QUANTISERS}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_model(folder: str, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    width = arguments.width
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=arguments.tokens,
        initializer_range=width**-0.5,  # a product is as large as its factor: attention is not all or nothing
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def step(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The gradient at the site of the final state along a random direction; its norm would not do, which is fixed."""
    clean = model.clean(tokens, [SITE], final=True)
    value = clean.activations[SITE].clone().requires_grad_()
    final = model.replay(clean, {SITE: value}).final
    assert final is not None
    along = torch.randn(final.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((final.float() * along).sum(), value)
    return gradient.float()


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of packed weights, their scales included where these are tensors of the same parameter."""
    weights = model.model.named_parameters()
    return sum(part.nbytes for name, weight in weights for _, part in tensor_parts(name, weight))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a step by side, the bytes of its weights, its gradient's error, and what was skipped."""
    models: dict[str, LanguageModel] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, arguments)
        for side, settings in SIDES.items():
            try:
                models[side] = load_model(folder, device="cpu", **settings)
            except EndwiseError as error:
                skipped[side] = str(error)
    tokens = torch.randint(arguments.vocabulary, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    gradients = {side: step(model, tokens) for side, model in models.items()}
    seconds: dict[str, list[float]] = {side: [] for side in models}
    for _ in range(arguments.rounds):
        for side, model in models.items():
            start = time.process_time()
            step(model, tokens)
            seconds[side].append(time.process_time() - start)
    truth = gradients["float32"]
    sides = {
        side: {
            "seconds": median(seconds[side]),
            "weights_mib": weight_bytes(model) / 2**20,
            "gradient_error": float((gradients[side] - truth).norm() / truth.norm()),
        }
        for side, model in models.items()
    }
    return {"machine": machine(1), "shape": {**vars(arguments), "out": None}, "sides": sides, "skipped": skipped}


def show(result: dict[str, Any]) -> None:
    sides = result["sides"]
    print(f"{'weights':20} {'CPU s':>9} {'/float32':>9} {'/bfloat16':>9} {'MiB':>8} {'error':>8}")
    for name, side in sides.items():
        ratios = " ".join(f"{side['seconds'] / sides[base]['seconds']:9.2f}" for base in ("float32", "bfloat16"))
        print(f"{name:20} {side['seconds']:9.4f} {ratios} {side['weights_mib']:8.1f} {side['gradient_error']:8.4f}")
    for name, why in result["skipped"].items():
        print(f"{name:20} skipped: {why}")


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    result = run(arguments)
    show(result)
    give_out(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
