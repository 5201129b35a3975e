"""Look at the features of an SAE that you have: a run, a file of another package, or a name on the hub.

python examples/see_features.py runs/own
python examples/see_features.py path/to/sae --model gpt2 --text texts.jsonl
"""

import argparse
from pathlib import Path

import endwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae")
    parser.add_argument("--model", help="of an SAE that is no run: its model; unset: the one that it names")
    parser.add_argument("--text", help="of such an SAE: what to read")
    parser.add_argument("--site", help="of such an SAE: its place, where its file says none")
    parser.add_argument("--tokens", type=int, default=40_960, help="held-out tokens to read")
    parser.add_argument("--features", type=int, default=10, help="how many to print, the most important first")
    parser.add_argument(
        "--rarer-than", type=float, default=0.1, help="share of tokens; features that fire more say little"
    )
    asked = parser.parse_args()

    run = Path(asked.sae)
    if not (run / "config.yaml").exists():
        run = endwise.adopt(asked.sae, model=asked.model, data=asked.text, site=asked.site)
    harvest = endwise.harvest([run], tokens=asked.tokens)[run]
    assert harvest is not None  # it is in one part

    importance = harvest.column("ce_second")  # what the CE would rise by without the feature, nats per token
    density = harvest.column("density")
    order = [int(feature) for feature in (-importance).argsort() if 0 < density[feature] < asked.rarer_than]
    for feature in order[: asked.features]:
        raised = harvest.features["boosted"][feature].as_py()[:5]
        best = harvest.contexts(feature)[0]
        words = harvest.written(best.tokens)
        words[best.peak] = f"⟦{words[best.peak]}⟧"
        print(f"feature {feature}: fires at {density[feature]:.2%} of tokens, ", end="")
        print(f"importance {importance[feature]:+.4f}; raises {', '.join(map(repr, harvest.written(raised)))}")
        print(f"    {''.join(words[max(0, best.peak - 15) : best.peak + 6])!r}")


if __name__ == "__main__":
    main()
