"""The SAE's step alone, on given activations: ours against the paper's code, SAELens, dictionary_learning, sparsify.

    python benchmarks/sae_step.py
    python benchmarks/sae_step.py --peers ours sparsify --python sparsify=/path/to/its/environment/bin/python
    python benchmarks/sae_step.py --rows 64 --d-model 16 --d-sae 128 --l0 5 --seconds 1     # to see that all is there

One environment can hold all five, in the versions that are the newest on PyPI in November 2026; what
dictionary_learning itself asks for (nnsight below 0.4 among it) its trainer does not need:

    python -m venv .venv-bench
    .venv-bench/bin/pip install -c constraints.txt -e . accelerate beartype better_abc einops fancy_einsum \\
        python-dotenv typeguard wandb sae-lens==6.54.12 eai-sparsify==1.3.3
    .venv-bench/bin/pip install --no-deps e2e-sae==2.1.1 transformer-lens==3.9.0 dictionary-learning==0.1.0
    .venv-bench/bin/python benchmarks/sae_step.py

Ours has ReLU features at `--l0` active ones: a new SAE's biases, lowered. Its other architectures have as many: `gated`
with both biases lowered; `jumprelu` with thresholds there and half a typical pre-activation of bandwidth, so that about
twice as many pairs learn; `topk`, `batchtopk` and `matryoshka_batchtopk` with a k of as many and a new SAE's biases,
where half of all pre-activations are positive, or with `--lowered` biases, where twice k are. A trained one lies
between these two. NAME+aux is the same with the term for dead features, half the width of them a token, where a tenth
is dead and never fires; what it adds to a step is on a line of its own.

`saelens/NAME` and `dictionary_learning/NAME` are these packages' own of that architecture, at the same k; of others,
whose latents are dense, the time does not depend on how many are active. sparsify's TopK has `--k`.
Everything else as in `versus_reference.py`.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Worker, WorkerError, cores, give_out, machine, time_in_turn, unquiet, worker_environment

HERE = Path(__file__).parent
ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated")
AUX = "+aux"
"""Suffix of ours with the term for dead features."""
OURS = ("ours", "mixed", *ARCHITECTURES, *(name + AUX for name in ("ours", *ARCHITECTURES)))
PACKAGES = ("saelens", "dictionary_learning")
FIRST = ("ours", "reference", *PACKAGES, "sparsify")
NAMES = (*OURS, *FIRST[1:], *(f"{package}/{name}" for package in PACKAGES for name in ARCHITECTURES))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=FIRST, metavar="PEER")
    parser.add_argument("--lowered", action="store_true", help="of our top-k dictionaries: the biases")
    parser.add_argument("--tuned", action="store_true", help="all with the allocator that keeps freed memory")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=46080)
    parser.add_argument("--l0", default="50", help="ours; or `init` for a new SAE's")
    parser.add_argument("--k", type=int, default=32, help="sparsify's active features")
    parser.add_argument("--seconds", type=float, default=60, help="of timed steps for each peer")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-source", help="a source tree of e2e_sae, instead of the installed package")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.python = dict(entry.split("=", 1) for entry in arguments.python)
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    spec = {name: getattr(arguments, name) for name in ("rows", "d_model", "d_sae", "k", "threads", "seed", "lowered")}
    spec |= {"l0": None if arguments.l0 == "init" else float(arguments.l0), "source": arguments.reference_source}
    environment = worker_environment(arguments.threads, arguments.tuned)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    try:
        for name in arguments.peers:
            python = arguments.python.get(name.partition("/")[0], sys.executable)
            workers[name] = Worker(HERE / "sae_peers.py", environment, python)
        for name in list(workers):
            try:
                found[name] = workers[name].call("build", spec=spec | peer_of(name))
                found[name]["memory"] = workers[name].call("begin_memory")
                workers[name].call("step")
            except WorkerError as error:
                failed[name] = str(error)
                workers.pop(name).stop()
        timings, lost = time_in_turn(workers, arguments.seconds, cores())
        failed |= lost
        for name, timing in timings.items():
            found[name]["timing"] = asdict(timing)
            found[name]["tokens_per_second"] = arguments.rows / timing.seconds
            found[name]["peak_gib"] = workers[name].call("peak_memory")
            found[name]["l0"] = workers[name].call("l0")
    finally:
        for worker in workers.values():
            worker.stop()
    timed = {name: peer for name, peer in found.items() if "timing" in peer}
    ratios = {
        f"{name} : {other}": timed[name]["tokens_per_second"] / timed[other]["tokens_per_second"]
        for name in OURS
        for other in timed
        if name in timed and compared(name, other)
    }
    return {"spec": spec, "tuned": arguments.tuned, "peers": timed, "ratios": ratios, "failed": failed}


def peer_of(name: str) -> dict[str, Any]:
    """Parts of a worker's specification that its name states."""
    plain = name.removesuffix(AUX)
    peer, _, architecture = ("ours", "", plain) if name in OURS else name.partition("/")
    return {
        "peer": peer,
        "aux": name != plain,
        **({"precision": "mixed"} if name == "mixed" else {}),
        **({"architecture": architecture} if architecture in ARCHITECTURES else {}),
    }


def compared(name: str, other: str) -> bool:
    """True if one of ours is compared with another: with our ReLU dictionary, with itself without the term for dead
    features, and with packages' of the same architecture, or of any where they have but one.
    """
    if name.endswith(AUX):
        return other == name.removesuffix(AUX)
    if other in OURS:
        return other == "ours" and name in ARCHITECTURES
    return "/" not in other or other.endswith(f"/{name}")


def show(result: dict[str, Any]) -> None:
    print(f"{'peer':40} {'tokens/s':>10} {'s/step':>9} {'kept':>5} {'dropped':>7} {'peak GiB':>9} {'L0':>8}")
    for name, peer in result["peers"].items():
        timing = peer["timing"]
        print(
            f"{name:40} {peer['tokens_per_second']:10,.0f} {timing['seconds']:9.4f} {timing['samples']:5} "
            f"{timing['discarded']:7} {peer['peak_gib']:9.2f} {peer['l0']:8.1f}" + unquiet(timing)
        )
    for pair, ratio in result["ratios"].items():
        print(f"{pair}: {ratio:.2f} ×")
    for name, peer in result["peers"].items():
        plain = name.removesuffix(AUX)
        if name != plain and plain in result["peers"]:
            alone = result["peers"][plain]["timing"]["seconds"]
            added = peer["timing"]["seconds"] - alone
            print(f"the term for dead features adds {added:.4f} s ({added / alone:.0%}) to a step of {plain}")
    for name, message in result["failed"].items():
        print(f"{name} failed: {message}")


def main() -> int:
    arguments = parse()
    result = {"machine": machine(arguments.threads), **run(arguments)}
    show(result)
    give_out(result, arguments.out)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
