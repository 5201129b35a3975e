"""A replacement model of the embedded one: a transcoder for every MLP, trained in four ways on the same tokens.

    python tools/joint_comparison.py --tokens 100000 --out runs/joint

*local*: each learns the MLP's output. *apart*: each end to end, with the others' MLPs in place. *joint*: all end to
end, spliced together. *joint-and-local*: that and the first. TopK, so that none has an L0 above k at any place. Runs
lie in `--out` and are taken up where they were left; a JSON object for each is written into `--rows`, and the table of
whatever is there is printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from endwise import evaluate, load_model, train_places
from endwise.common.files import write_json

MLPS = [{"site": f"blocks.{n}.mlp_in", "writes": f"blocks.{n}.hook_mlp_out"} for n in range(6)]
WAYS: dict[str, dict[str, Any]] = {
    "local": {"joint": False, "objective": {"kind": "local"}, "rate": 3.2e-2},
    "apart": {"joint": False, "objective": {"kind": "e2e"}, "rate": 1.6e-2},
    "joint": {"joint": True, "objective": {"kind": "e2e"}, "rate": 1.6e-2},
    "joint-and-local": {"joint": True, "objective": {"kind": "e2e", "local_mse": 1.0}, "rate": 1.6e-2},
}
"""Learning rates are those of docs/results/learning_rates.md, tuned for one ReLU SAE of the residual stream."""


def recipe(way: str, tokens: int, k: int, out: Path) -> dict[str, Any]:
    chosen = WAYS[way]
    return {
        "places": MLPS,
        "joint": chosen["joint"],
        "dictionary": {"architecture": "topk", "k": k, "ratio": 8},
        "objective": chosen["objective"],
        "seed": 0,
        "training": {"tokens": tokens, "batch": 2, "learning_rate": chosen["rate"], "checkpoint_every": 50},
        "evaluation": {"tokens": 12_000, "during_training_tokens": 1024},
        "out": str(out / f"{way}-{tokens}-k{k}"),
    }


def row(way: str, tokens: int, k: int, out: Path) -> dict[str, Any]:
    model = load_model("embedded")
    config = recipe(way, tokens, k, out)
    run = train_places(config, model=model, resume="if_started", display=False)
    measured = evaluate(run.folder, model=model)
    whole = measured[run.folder]
    interval = whole.metrics["ce_increase"]
    return {
        "way": way,
        "tokens": tokens,
        "k": k,
        "seed": config["seed"],
        "seconds": round(run.seconds),
        "heldout_tokens": whole.tokens,
        "ce_clean": whole.baselines.clean,
        "together": {"ce_increase": interval.estimate, "interval": [interval.low, interval.high], "l0": whole["l0"]},
        "zeros": whole.baselines.zero_ablated - whole.baselines.clean,
        "means": whole.baselines.mean_ablated - whole.baselines.clean,
        "alone": {place: measured[folder]["ce_increase"] for place, folder in run.folders.items()},
        "l0_alone": {place: measured[folder]["l0"] for place, folder in run.folders.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """CE increase in nats per token: of each place alone, their sum, and all in place."""
    head = ["way", "k", *(f"MLP {n}" for n in range(len(MLPS))), "sum", "all together [95 %]", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for each in rows:
        alone, whole = list(each["alone"].values()), each["together"]
        low, high = whole["interval"]
        cells = [each["way"], str(each["k"]), *(f"{value:+.3f}" for value in alone), f"{sum(alone):+.3f}"]
        cells += [f"**{whole['ce_increase']:+.3f}** [{low:.3f}, {high:.3f}]", str(each["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/joint"))
    parser.add_argument("--rows", type=Path, default=Path("docs/results/joint"))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for way in arguments.ways:
        found = row(way, arguments.tokens, arguments.k, arguments.out)
        write_json(arguments.rows / f"{way}-{arguments.tokens}-k{arguments.k}.json", found)
    order = list(WAYS)
    rows = [json.loads(file.read_text()) for file in arguments.rows.glob("*.json")]
    print(table(sorted(rows, key=lambda each: (each["tokens"], each["k"], order.index(each["way"])))))


if __name__ == "__main__":
    main()
