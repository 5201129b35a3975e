"""Compare this checkout with another, bit by bit: losses, weights and measurements of every kind, resumed and not.

    python tools/same_bits.py ANOTHER_CHECKOUT

On one machine and one thread both must write the same values: tensors to the byte, numbers to the last digit. A file of
one version may hold more than that of another; what both hold is compared, and what one has alone is named. Ends with
exit code 1 where a value differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

OBJECTIVES = {
    "local": ["objective.kind=local"],
    "e2e": ["objective.kind=e2e"],
    "e2e_ds": ["objective.kind=e2e_ds", "objective.downstream_mse=1.5"],
    "mlp_out": ["objective.kind=e2e_ds", "objective.downstream_mse=1.5", "site=blocks.2.hook_mlp_out"],
}
RECIPE = """\
site: blocks.3.hook_resid_pre
dictionary: {size: 200}
objective: {kind: local, sparsity: {coefficient: 1.0}}
training: {tokens: 16384, batch: 4, learning_rate: 1.0e-2, log_every: 1, checkpoint_every: 4, keep_checkpoints: 9}
evaluation: {tokens: 8192, during_training_tokens: 2048, bootstrap: 20}
"""
COMPARED = ("metrics.jsonl", "sae/sae_weights.safetensors", "evaluation_sums.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the root of another checkout")
    other = parser.parse_args().other.resolve()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = (_written(root, Path(scratch, str(number))) for number, root in enumerate((here, other)))
    differing = 0
    for file, own in ours.items():
        shared = own.keys() & theirs[file].keys()
        different = sorted(name for name in shared if own[name] != theirs[file][name])
        differing += len(different)
        alone = {here: own.keys() - shared, other: theirs[file].keys() - shared}
        only_one = [f"{root} alone has {', '.join(sorted(_names(names)))}" for root, names in alone.items() if names]
        print(f"{file}: {len(shared) - len(different)} of {len(shared)} values are the same", *only_one, sep="; ")
        for name in different:
            print(f"  differs: {name}: {own[name]} here, {theirs[file][name]} there")
    sys.exit(bool(differing))


def _names(values: Any) -> set[str]:
    """The names of values, whatever their lines."""
    return {name.partition(": ")[2] or name for name in values}


def _written(root: Path, out: Path) -> dict[str, dict[str, str]]:
    """Values that one checkout writes, by file."""
    out.mkdir()
    (out / "recipe.yaml").write_text(RECIPE)
    found = {}
    for name, changes in OBJECTIVES.items():
        run = out / name
        _endwise(root, out, "train", "recipe.yaml", *changes, f"out={run}")
        _endwise(root, out, "evaluate", str(run))
        found |= {f"{name}/{file}": dict(_values(run / file)) for file in COMPARED}
        _endwise(root, out, "train", "--resume", str(run), "--from-step", "4")
        found |= {f"{name} resumed/{file}": dict(_values(run / file)) for file in COMPARED[:2]}
    return found


def _endwise(root: Path, folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "endwise", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _values(file: Path) -> Iterator[tuple[str, str]]:
    """The values of a file of tensors, or of lines of JSON, each with its name."""
    if file.suffix == ".jsonl":
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for name, value in _leaves(json.loads(line)):
                yield f"line {number}: {name}", repr(value)
        return
    with safe_open(file, framework="numpy") as opened:
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            tensor = opened.get_tensor(name)
            yield name, f"{tensor.dtype}{list(tensor.shape)} {hashlib.sha256(tensor.tobytes()).hexdigest()[:16]}"


def _leaves(record: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


if __name__ == "__main__":
    main()
