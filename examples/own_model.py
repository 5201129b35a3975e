"""Train a dictionary on your own model and text, measure it, and write the dashboard of its features.

    python examples/own_model.py path/to/model texts.jsonl --tokens 10_000_000 --learning-rate 5e-4

The model is a folder or a Hugging Face id, the text a file, a folder or a data set; without them, those that ship.
"""

import argparse

import endwise
from endwise.dashboard import write_dashboard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("text", nargs="?", default="embedded")
    parser.add_argument("--site", help="unset: the residual stream in the middle")
    parser.add_argument("--kind", default="local", help="local: reconstruct; e2e_ds: keep what the model predicts")
    parser.add_argument("--k", type=int, default=32, help="active features per token")
    parser.add_argument("--ratio", type=float, default=8, help="features per dimension")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--heldout", type=int, default=40_960, help="tokens to measure on")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=8e-3, help="5e-4 or less for a large model")
    parser.add_argument("--out", default="runs/own")
    asked = parser.parse_args()

    model = endwise.load_model(asked.model)
    run = endwise.train(
        {
            "model": {"name": asked.model},
            "data": {"source": asked.text, "context": asked.context},
            "site": asked.site or f"blocks.{model.n_layers // 2}.hook_resid_pre",
            "dictionary": {
                "architecture": "batchtopk",
                "k": asked.k,
                "ratio": asked.ratio,
                "aux": 0.03125,
                "revive": 1e-3,
            },
            "objective": {"kind": asked.kind, **({"downstream_mse": 1.0} if asked.kind == "e2e_ds" else {})},
            "training": {"tokens": asked.tokens, "batch": 2, "learning_rate": asked.learning_rate},
            "evaluation": {"tokens": asked.heldout, "during_training_tokens": min(asked.heldout, 20_000)},
            "out": asked.out,
        },
        model=model,
    )
    measured = endwise.evaluate(run.folder, model=model)[run.folder]
    cost = measured.metrics["ce_increase"]
    print(f"L0 {measured['l0']:.1f}, {measured.alive} features alive on {asked.heldout:,} held-out tokens")
    print(f"CE increase {cost.estimate:+.3f} [{cost.low:+.3f}, {cost.high:+.3f}] nats per token")

    endwise.harvest([run.folder], model=model)
    print(f"All features: {write_dashboard([run.folder], run.folder / 'dashboard')}")


if __name__ == "__main__":
    main()
