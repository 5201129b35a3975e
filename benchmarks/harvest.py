"""Cost of a harvest, relative to the bare spliced forward pass, on the embedded model.

    python benchmarks/harvest.py                       # the passes in turn, then a whole harvest of 1,000,000 tokens
    python benchmarks/harvest.py --whole 0 --l0 100    # the passes alone

Needs endwise alone. Per batch of the embedded model's training text, in turn (`harness.py`), in one process:

- `spliced`: the bare spliced forward pass: the blocks before the site, the SAE, the tail, the CE of each token;
- `harvest`: what `endwise harvest` does where the importance was measured before, or is not asked for;
- `harvest+ce`: the same with the attribution of the CE, which needs the tail forward and backward, in every second
  batch, as of a long text.

Each continues with the next batch. The SAE is a random one whose bias is lowered until `--l0` features are active per
token, so that they are all alive, and no two runs of the benchmark differ. `--whole` then harvests so many tokens from
the beginning, files, attribution and all.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Side, Worker, cores, give_out, machine, serve, time_in_turn, unquiet, worker_environment
from importance import Act

ACTS = ("spliced", "harvest", "harvest+ce")
BAR_THROUGHPUT, BAR_SECONDS = 0.6, 300.0
"""The least share of the spliced pass's throughput, and the most seconds for a million tokens on two cores."""
BATCH = 16


class Harvesting(Side):
    """The embedded model, an SAE, its text, and the passes that are timed."""

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        import torch

        from endwise import ReluSAE, load_model
        from endwise.config.run import DataConfig
        from endwise.features.harvest.gathering import Gathered, Kept, share_of_tokens
        from endwise.features.harvest.run import LONG_TEXT_EVERY
        from endwise.features.spliced import spliced_ce
        from endwise.tokens import corpora_for
        from ours import bias_shift

        torch.set_num_threads(spec["threads"])
        self.model = model = load_model("embedded")
        site = model.site(spec["site"])
        needed = max(spec["whole"], 100 * BATCH)
        self.corpora = corpora_for(model, DataConfig(), training_tokens=needed, evaluation_tokens=10_000)
        corpus = self.corpora.train
        trained = ReluSAE(model.width(site), spec["d_sae"], seed=0).requires_grad_(False)
        rows = model.clean(corpus.batch(range(BATCH)).tokens, record=[site]).activations[site].flatten(0, 1)[:1024]
        trained.b_enc.sub_(bias_shift(rows, trained.encoder, trained.b_enc, spec["l0"]))
        tensors = {name: getattr(trained, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        self.sae = sae = ReluSAE.from_tensors(tensors, {"apply_b_dec_to_input": False}).requires_grad_(False)
        share = share_of_tokens(spec["whole"] or 1_000_000)
        gathered = {ce: Gathered(sae, Kept(), share, attribute=ce) for ce in (False, True)}
        at: dict[str, int] = dict.fromkeys(ACTS, 0)

        def following(act: str) -> tuple[Any, Any]:
            start = at[act] * BATCH % (len(corpus) - BATCH)
            at[act] += 1
            numbers = torch.arange(start, start + BATCH)
            return corpus.batch(numbers.tolist()), numbers

        def spliced() -> None:
            text, _ = following("spliced")
            clean = model.clean(text.tokens, record=[site])
            with torch.no_grad():
                spliced_ce(model, clean, site, text.mask, sae(clean.activations[site]))

        def harvest(ce: bool) -> None:
            act = "harvest+ce" if ce else "harvest"
            text, numbers = following(act)
            clean = model.clean(text.tokens, record=[site])
            gathered[ce].add(model, clean, site, text.mask, numbers, at[act] % LONG_TEXT_EVERY == 0)

        self.acts: dict[str, Callable[[], None]] = {
            "spliced": spliced,
            "harvest": lambda: harvest(False),
            "harvest+ce": lambda: harvest(True),
        }
        latents = sae.encode(rows)
        return {"l0": float(latents.l0().mean()), "latents": type(latents).__name__, "context": corpus.context}

    def step(self) -> None:
        self.acts[self.act]()

    def turn_of(self, act: str, seconds: float) -> list[dict[str, float]]:
        self.act = act
        return self.turn(seconds)

    def whole(self, tokens: int, site: str) -> dict[str, float]:
        """A whole harvest of the training text, from the run folder to the files."""
        from endwise import harvest
        from endwise.config.run import RunConfig

        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            objective = {"kind": "e2e", "sparsity": {"coefficient": 1.0}}
            recipe = {"site": site, "dictionary": {"size": self.sae.d_sae}, "objective": objective, "out": run}
            run.mkdir()
            config = RunConfig.build({**recipe, "training": {"tokens": tokens, "batch": BATCH}})
            (run / "config.yaml").write_text(config.to_yaml())
            self.sae.save(run / "sae")
            start = time.perf_counter()
            (found,) = harvest([run], tokens=tokens, text="train", model=self.model, corpora=self.corpora).values()
            seconds = time.perf_counter() - start
            assert found is not None
            size = sum(file.stat().st_size for file in found.folder.iterdir())
            return {"seconds": seconds, "tokens": found.about["tokens"], "mib": size / 2**20}


def run(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """
    Raises:
        WorkerError: the worker failed.
        RuntimeError: a pass failed.
    """
    worker = Worker(Path(__file__), worker_environment(spec["threads"]) | {"ENDWISE_BENCHMARK_WORKER": "1"})
    try:
        built = worker.call("build", spec=spec)
        for act in ACTS:
            worker.call("turn_of", act=act, seconds=0)
        timings, failed = time_in_turn({act: Act(worker, act) for act in ACTS}, seconds, cores())
        if failed:
            raise RuntimeError("\n".join(failed.values()))
        whole = worker.call("whole", tokens=spec["whole"], site=spec["site"]) if spec["whole"] else None
        peak = worker.call("peak_memory")
    finally:
        worker.stop()
    throughput = {act: timings["spliced"].seconds / timings[act].seconds for act in ACTS[1:]}
    return {
        **built,
        "timings": {act: asdict(timing) for act, timing in timings.items()},
        "throughput/spliced": throughput,
        "whole": whole,
        "peak_gib": peak,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--site", default="blocks.3.hook_resid_pre")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="of each pass")
    parser.add_argument("--whole", type=int, default=1_000_000, help="tokens to harvest from end to end; 0: none")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = ("site", "d_sae", "l0", "whole", "threads")
    spec = {name: getattr(arguments, name) for name in names}
    found = run(spec, arguments.seconds)
    tokens = BATCH * found["context"]
    print(f"L0 {found['l0']:.1f} ({found['latents']}), peak {found['peak_gib']:.2f} GiB")
    for act, timing in found["timings"].items():
        print(
            f"  {act:11} {tokens / timing['seconds']:,.0f} tokens/s, {timing['samples']} samples, "
            f"{timing['discarded']} discarded" + unquiet(timing)
        )
    shares, whole = found["throughput/spliced"], found["whole"]
    for act, share in shares.items():
        print(f"{act} has {share:.0%} of the bare spliced pass's throughput (bar: {BAR_THROUGHPUT:.0%})")
    if whole:
        print(f"{whole['tokens']:,} tokens took {whole['seconds']:.0f} s and {whole['mib']:.0f} MiB of files")
    result = {"machine": machine(arguments.threads), "spec": spec, **found}
    give_out(result, arguments.out)
    slow = whole is not None and whole["seconds"] > BAR_SECONDS * whole["tokens"] / 1_000_000
    return int(min(shares.values()) < BAR_THROUGHPUT or slow)


if __name__ == "__main__":
    if os.environ.get("ENDWISE_BENCHMARK_WORKER"):
        serve(Harvesting())
    else:
        sys.exit(main())
