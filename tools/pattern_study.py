"""Compare kinds by how well patterns foretell their features: `python tools/pattern_study.py --keep FOLDER`.

The runs are some of tools/dictionary_study.py's: at layer 3, at levels where their CE increases or their L0s are
similar, three seeds. Those that FOLDER does not hold yet, under the hash of the recipe, are trained; each is measured,
and explained by patterns, as `endwise patterns` does. What is found goes to docs/results/patterns. Whatever was made
before is read, so that the command may be stopped at any time and started again.
"""

import argparse
import time
from pathlib import Path

import torch
import yaml

from dictionary_study import HERE, Setting
from endwise import evaluate, load_model, train_together
from endwise.analysis.patterns.page import print_patterns, write_patterns_page
from endwise.analysis.patterns.study import patterns
from endwise.config.run import RunConfig
from endwise.features.patterns.run import find_patterns
from endwise.runs.folder import RunFolder
from endwise.sweeps.points import fingerprint

RESULTS = HERE.parent / "patterns"
SITE = "blocks.3.hook_resid_pre"
SEEDS = (0, 1, 2)
LEVELS = (
    ("local", "jumprelu", 16),
    ("local", "gated", 2),
    ("local", "batchtopk", 16),
    ("e2e_ds", "jumprelu", 16),
    ("local", "standard", 0.5),
    ("local", "standard", 2),
    ("e2e_ds", "standard", 1),
    ("e2e_ds", "standard", 2),
)
"""Objective, dictionary and its knob."""
TOKENS = 102_400
"""Held-out tokens, of which the first half makes the patterns and the second tests them."""


def recipes(seed: int) -> dict[str, RunConfig]:
    """By their hashes.

    Raises:
        SystemExit: the learning rate of a kind was not chosen yet.
    """
    study = yaml.safe_load((HERE / "study.yaml").read_text())
    found = {}
    for kind, architecture, level in LEVELS:
        setting = Setting(SITE, kind, architecture, study, seed)
        rate = setting.rate()
        if rate is None:
            raise SystemExit(f"{kind} {architecture} has no learning rate: run tools/dictionary_study.py first.")
        config = setting.recipe(level, rate)
        found[fingerprint(config)] = config
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after this time")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    model, whole = load_model("embedded"), []
    for seed in SEEDS:
        configs = recipes(seed)
        folders = {name: arguments.keep / name for name in configs}
        untrained = [name for name, folder in folders.items() if not RunFolder(folder).sae.exists()]
        missing = [configs[name].model_copy(update={"out": folders[name]}) for name in untrained]
        if missing and time.monotonic() < ends:
            print(f"seed {seed}: training {len(missing)} runs", flush=True)
            train_together(missing, model=model, display=False)
        there = [folder for folder in folders.values() if RunFolder(folder).sae.exists()]
        evaluate([folder for folder in there if not RunFolder(folder).evaluation_file.exists()], model=model)
        for folder in there:
            if time.monotonic() < ends:
                begun = time.monotonic()
                find_patterns([folder], tokens=TOKENS, model=model)
                whole.append(folder)
                print(f"{folder.name}: {time.monotonic() - begun:.0f} s, {torch.get_num_threads()} threads", flush=True)
    found = patterns(whole, tokens=TOKENS, model=model)
    print_patterns(found)
    print(write_patterns_page(found, RESULTS))


if __name__ == "__main__":
    main()
