"""Cost of the importance of all features, in forward passes of the bare model.

    python benchmarks/importance.py                                        # GPT2-small's shape, three layers
    python benchmarks/importance.py --shape tinystories-1m-4 --layers 0 4 7

Needs endwise alone. Per batch, in turn (`harness.py`), in one process:

- `logits`: the bare model's forward pass, `[batch pos vocab]` logits and all;
- `forward`: the same with the CE of each token read from its logits in chunks, which need less memory traffic;
- `spliced`: the same through the SAE, without a gradient;
- `ce`: attribution of the CE: the blocks before the site, the SAE, the tail forward and backward, every active pair;
- `kl`: attribution of the KL alone: the whole clean pass besides;
- `ce+kl`: attribution of both: the whole clean pass, the tail forward once and backward twice.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from endwise.training.planning.flops import forward_flops, gradient_flops, product_flops
from flops import stretches
from harness import Side, Worker, cores, give_out, machine, serve, time_in_turn, unquiet, worker_environment
from shapes import SHAPES, Shape

ACTS = ("logits", "forward", "spliced", "ce", "kl", "ce+kl")
BAR = 2.5
"""Forward passes of the bare model (`logits`) that `ce`, the default, may cost."""


def least(shape: Shape) -> dict[str, float]:
    """Matrix products of each attribution, as a multiple of those of a forward pass with logits; the encoder dense."""
    before, after = stretches(shape, range(shape.layer)), stretches(shape, range(shape.layer, shape.layers))
    first, tail = (shape.batch * forward_flops(blocks, shape.context) for blocks in (before, after))
    back = shape.batch * gradient_flops(after, shape.context)
    vocabulary = product_flops(shape.tokens, shape.d_model, shape.vocab)
    encoder = product_flops(shape.tokens, shape.d_model, shape.d_sae)
    ce = first + encoder + tail + back + 2 * vocabulary
    kl = ce + tail + vocabulary
    whole = first + tail + vocabulary
    return {"ce": ce / whole, "kl": kl / whole, "ce+kl": (kl + back + 2 * vocabulary) / whole}


class Importance(Side):
    """A model, an SAE and a batch, and the passes that are timed."""

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        import torch

        from endwise import LanguageModel, ReluSAE
        from endwise.features.attribution import Attribution, contributions, spliced_gradients
        from endwise.features.spliced import spliced_ce
        from ours import bias_shift
        from shapes import random_model

        torch.set_num_threads(spec["threads"])
        shape = Shape(**spec["shape"])
        model = LanguageModel(random_model(shape, spec["seed"]))
        generator = torch.Generator().manual_seed(spec["seed"])
        tokens = torch.randint(shape.vocab, (shape.batch, shape.context), generator=generator)
        mask, site = torch.ones_like(tokens, dtype=torch.bool), model.site(shape.site)
        trained = ReluSAE(shape.d_model, shape.d_sae, seed=spec["seed"]).requires_grad_(False)
        rows = model.clean(tokens[:1], record=[site]).activations[site][0, :256]
        trained.b_enc.sub_(bias_shift(rows, trained.encoder, trained.b_enc, spec["l0"]))
        tensors = {name: getattr(trained, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        sae = ReluSAE.from_tensors(tensors, {"apply_b_dec_to_input": False}).requires_grad_(False)

        def forward() -> None:
            final = model.clean(tokens, final=True).final
            assert final is not None
            with torch.no_grad():
                model.readout.cross_entropy(final, tokens, mask)

        def spliced() -> None:
            clean = model.clean(tokens, record=[site])
            with torch.no_grad():
                spliced_ce(model, clean, site, mask, sae(clean.activations[site]))

        def kl_alone() -> None:
            clean = model.clean(tokens, record=[site], final=True)
            with torch.no_grad():
                latents = sae.encode(clean.activations[site])
                reconstruction = sae.decode(latents)
            gradients = spliced_gradients(model, clean, site, reconstruction, mask, ["kl"])
            contributions(latents, sae.W_dec, [gradients["kl"]], mask)

        def attributed(kl: bool) -> None:
            clean = model.clean(tokens, record=[site], final=kl)
            attributions[kl].add(model, clean, site, mask)

        endless = 1 << 40
        attributions = {kl: Attribution(sae, endless, 20, kl=kl) for kl in (False, True)}
        self.acts: dict[str, Callable[[], Any]] = {
            "logits": lambda: model.logits(tokens),
            "forward": forward,
            "spliced": spliced,
            "ce": lambda: attributed(False),
            "kl": kl_alone,
            "ce+kl": lambda: attributed(True),
        }
        latents = sae.encode(model.clean(tokens, record=[site]).activations[site])
        return {"l0": float(latents.l0().mean()), "latents": type(latents).__name__}

    def step(self) -> None:
        self.acts[self.act]()

    def turn_of(self, act: str, seconds: float) -> list[dict[str, float]]:
        self.act = act
        return self.turn(seconds)


class Act(Worker):
    """One of the passes of a worker, to be timed in turn with the others."""

    def __init__(self, worker: Worker, act: str) -> None:
        self._worker, self._act = worker, act

    def call(self, name: str, **arguments: Any) -> Any:
        assert name == "turn"
        return self._worker.call("turn_of", act=self._act, **arguments)


def run(shape: Shape, l0: float, seconds: float, threads: int, acts: tuple[str, ...] = ACTS) -> dict[str, Any]:
    """
    Raises:
        WorkerError: the worker failed.
        RuntimeError: a pass failed.
    """
    worker = Worker(Path(__file__), worker_environment(threads) | {"ENDWISE_BENCHMARK_WORKER": "1"})
    try:
        built = worker.call("build", spec={"shape": asdict(shape), "l0": l0, "threads": threads, "seed": 0})
        for act in acts:
            worker.call("turn_of", act=act, seconds=0)
        timings, failed = time_in_turn({act: Act(worker, act) for act in acts}, seconds, cores())
        if failed:
            raise RuntimeError("\n".join(failed.values()))
        peak = worker.call("peak_memory")
    finally:
        worker.stop()
    ratios = {
        f"{act}/{base}": timings[act].seconds / timings[base].seconds
        for act in acts[3:]
        for base in ("logits", "forward", "spliced")
    }
    return {
        "shape": asdict(shape),
        **built,
        "timings": {act: asdict(timing) for act, timing in timings.items()},
        "ratios": ratios,
        "least": least(shape),
        "peak_gib": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small-1")
    parser.add_argument("--layers", type=int, nargs="+", help="sites blocks.<layer>.hook_resid_pre; unset: three")
    parser.add_argument("--batch", type=int, help="sequences")
    parser.add_argument("--context", type=int, help="tokens of a sequence")
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="of each pass at each site")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    given = SHAPES[arguments.shape]
    shape = replace(given, batch=arguments.batch or given.batch, context=arguments.context or given.context)
    layers = arguments.layers or [0, shape.layers // 2, shape.layers - 2]
    sites = [run(replace(shape, layer=layer), arguments.l0, arguments.seconds, arguments.threads) for layer in layers]
    for site in sites:
        print(f"layer {site['shape']['layer']}, L0 {site['l0']:.1f}, peak {site['peak_gib']:.2f} GiB")
        for act, timing in site["timings"].items():
            forwards = timing["seconds"] / site["timings"]["logits"]["seconds"]
            print(
                f"  {act:8} {timing['seconds']:.4f} s/batch = {forwards:.2f} logits, {timing['samples']} samples, "
                f"{timing['discarded']} discarded" + unquiet(timing)
            )
        products = ", ".join(f"{act} {ratio:.2f}" for act, ratio in site["least"].items())
        print(f"  matrix products alone, in forward passes: {products}")
    worst = max(site["ratios"]["ce/logits"] for site in sites)
    print(f"attribution of the CE costs at most {worst:.2f} forward passes (bar: {BAR})")
    result = {"machine": machine(arguments.threads), "sites": sites, "worst": worst}
    give_out(result, arguments.out)
    return int(worst > BAR)


if __name__ == "__main__":
    import os

    if os.environ.get("ENDWISE_BENCHMARK_WORKER"):
        serve(Importance())
    else:
        sys.exit(main())
