"""Compare kinds by how well patterns predict their features: `python tools/pattern_study.py --keep FOLDER`.

The runs are some of tools/dictionary_study.py's: at layer 3, at levels where their CE increases or their L0s are
similar, three seeds. Those that FOLDER does not hold yet, under the hash of the recipe, are trained; each is measured,
and explained by patterns, as `endwise patterns` does, whose page goes to FOLDER/page. Tables of kinds and pairs go to
docs/results/patterns. Whatever was made before is read, so that the command may be stopped and started again.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dictionary_study import HERE, Setting
from endwise import evaluate, load_model, train_together
from endwise.analysis.claims import SIMILAR
from endwise.analysis.patterns.page import print_patterns, write_patterns_page
from endwise.analysis.patterns.study import PatternRun, PatternStudy, patterns
from endwise.analysis.scored import AT, At, ScoreDifference, mean_difference
from endwise.common.files import write_atomic
from endwise.common.tables import as_csv, as_table
from endwise.config.run import RunConfig
from endwise.evaluation.summary import estimate
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
)
"""Objective, dictionary and its knob."""
TOKENS = 102_400
"""Held-out tokens, of which the first half makes the patterns and the second tests them."""
PAIRS = (
    ("e2e_ds", "local"),
    ("e2e_ds-jumprelu", "local-jumprelu"),
    ("e2e_ds-jumprelu", "e2e_ds"),
    ("local-jumprelu", "local"),
    ("local-gated", "local"),
    ("local-batchtopk", "local"),
    ("local-batchtopk", "local-jumprelu"),
    ("local-gated", "local-jumprelu"),
)
"""Kinds that are compared, the first less the second."""
COMPARED = ("f1", "explained", "correlation")
MEANS = ("f1", "precision", "recall", "correlation", "explained", "f1.shuffled", "f1.random")


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


class Pair(PatternStudy):
    """Two kinds, compared by fewer scores."""

    @property
    def own_names(self) -> tuple[str, ...]:
        return COMPARED


def pair_rows(found: PatternStudy) -> Iterator[dict[str, Any]]:
    """Mean differences over seeds of every pair, each of the two runs a seed whose CE increases or L0s are closest."""
    for pair in PAIRS:
        runs = tuple(run for run in found.runs if run.summary.method.key in pair)
        of_pair = Pair(found.setting, runs).differences
        for at, score in product(AT, COMPARED):
            some = [each for each in of_pair if (each.at, each.name) == (at, score)]
            sign = 1 if some[0].run.summary.method.key == pair[0] else -1
            mean = mean_difference(some)
            ends = sorted((sign * mean.low, sign * mean.high))
            values = [estimate(side.summary, at) for each in some for side in (each.run, each.other)]
            yield {
                "kind": pair[0],
                "other": pair[1],
                "at": at,
                "score": score,
                "seeds": mean.seeds,
                "difference": sign * mean.estimate,
                "low": ends[0],
                "high": ends[1],
                "p": " ".join(f"{each.p:.2g}" for each in some),
                "features": " ".join(str(each.features) for each in some),
                "at.low": min(values),
                "at.high": max(values),
                "similar": all(_alike(each, at) for each in some),
            }


def _alike(each: ScoreDifference[PatternRun], at: At) -> bool:
    values = [estimate(side.summary, at) for side in (each.run, each.other)]
    return max(values) <= SIMILAR * min(values)


def table(found: PatternStudy, pairs: list[dict[str, Any]]) -> str:
    """Means over features and seeds of every kind and level, then the pairs."""
    lines = [f"| dictionary | knob | L0 | CE increase | scored | served | {' | '.join(MEANS)} |"]
    lines.append("|---" * (6 + len(MEANS)) + "|")
    groups: dict[tuple[str, float], list[PatternRun]] = {}
    for run in found.runs:
        groups.setdefault((run.summary.method.label, run.summary.knob.value), []).append(run)
    for (label, knob), runs in groups.items():
        numbers = [f"{np.mean([run.summary.l0 for run in runs]):.1f}"]
        numbers += [f"{np.mean([run.summary.ce_increase for run in runs]):.3f}"]
        numbers += [" / ".join(str(run.features) for run in runs)]
        numbers += [f"{np.mean([run.values('served').sum() / run.values('sampled').sum() for run in runs]):.2f}"]
        numbers += [f"{np.mean([np.nanmean(run.values(name)) for run in runs]):.3f}" for name in MEANS]
        lines.append(f"| {label} | {knob:g} | {' | '.join(numbers)} |")
    lines += ["", "| first less second | at similar | score | difference | p, by seed | features each | similar |"]
    lines.append("|---" * 7 + "|")
    for row in pairs:
        difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        ends = f"{row['at.low']:.3g} to {row['at.high']:.3g}"
        alike = "yes" if row["similar"] else "no"
        at = AT[row["at"]]
        names = f"{row['kind']} − {row['other']}"
        cells = (names, f"{at}, {ends}", row["score"], difference, row["p"], row["features"], alike)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for the tables")
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
    pairs = list(pair_rows(found[0]))
    write_atomic(arguments.out / "pairs.csv", as_csv(as_table(pairs)))
    write_atomic(arguments.out / "table.md", table(found[0], pairs).encode())
    print(write_patterns_page(found, arguments.keep / "page"))


if __name__ == "__main__":
    main()
