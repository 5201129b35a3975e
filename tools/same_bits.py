"""Compare this checkout with another, bit by bit: losses, weights and measurements of every kind, resumed and not.

    python tools/same_bits.py ANOTHER_CHECKOUT

On one machine and one thread both must write the same bytes. Ends with exit code 1 where a file differs.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
        digests = {root: _digests(root, Path(scratch, str(number))) for number, root in enumerate((other, here))}
    differing = [name for name, digest in digests[here].items() if digests[other][name] != digest]
    print(f"{len(digests[here]) - len(differing)} of {len(digests[here])} files are the same in {other} and {here}")
    for name in differing:
        print(f"differs: {name}")
    sys.exit(bool(differing))


def _digests(root: Path, out: Path) -> dict[str, str]:
    """What one checkout writes, by file."""
    out.mkdir()
    (out / "recipe.yaml").write_text(RECIPE)
    found = {}
    for name, changes in OBJECTIVES.items():
        run = out / name
        _endwise(root, out, "train", "recipe.yaml", *changes, f"out={run}")
        _endwise(root, out, "evaluate", str(run))
        found |= {f"{name}/{file}": _digest(run / file) for file in COMPARED}
        _endwise(root, out, "train", "--resume", str(run), "--from-step", "4")
        found |= {f"{name} resumed/{file}": _digest(run / file) for file in COMPARED[:2]}
    return found


def _endwise(root: Path, folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "endwise", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
