"""Folders that endwise wrote, opened by SAELens: what it makes of each, beside what endwise gives for them."""

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from rival_packages.making import TARGET

OURS = "ours.safetensors"
"""Beside the folders: `inputs [rows d_in]`, and `<kind>.latents` and `<kind>.outputs` as endwise gives them."""
TOLERANCE = 1e-5
"""Largest difference, as a share of the root mean square of the numbers compared."""
HEADS = 2
STORED = 2
"""Rows that are stored."""
WHERE = TARGET / "opened"


def run(folder: Path) -> int:
    """Opens every folder of `folder`, stores what SAELens computes, and prints the largest differences; 1 if one is
    over the tolerance or not finite.
    """
    given = load_file(folder / OURS)
    opened: dict[str, tuple[str, Tensor, Tensor]] = {}
    refused: dict[str, str] = {}
    worst = 0.0
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            opened[path.name] = found = _opened(path, given["inputs"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            refused[path.name] = f"{type(error).__name__}: {error}"
            sys.stdout.write(f"{path.name}: refused, {refused[path.name]}\n")
            continue
        apart = [_apart(found[1], given[f"{path.name}.latents"]), _apart(found[2], given[f"{path.name}.outputs"])]
        sys.stdout.write(f"{path.name}: {found[0]}, latents {apart[0]:.1e}, outputs {apart[1]:.1e}\n")
        worst = max([worst, *apart], key=lambda each: (each != each, each))
    _store(opened, refused)
    within = worst <= TOLERANCE  # false for NaN too
    counts = f"{len(opened)} opened, {len(refused)} refused; largest difference {worst:.2g} of the root mean square"
    sys.stdout.write(f"{counts}, {'within' if within else 'OVER'} {TOLERANCE}\n")
    return int(not within)


def _opened(path: Path, x: Tensor) -> tuple[str, Tensor, Tensor]:
    """The class that SAELens opens a folder as, its latents `[rows d_sae]` and outputs `[rows d_out]`."""
    from sae_lens import SAE  # type: ignore[pyrefly:missing-import]

    sae = SAE.load_from_disk(path)
    if json.loads((path / "cfg.json").read_text())["reshape_activations"] == "hook_z":
        x = x.unflatten(-1, (HEADS, -1))
    with torch.no_grad():
        latents, outputs = sae.encode(x), sae(x)
    return type(sae).__name__, latents, outputs.flatten(1)


def _apart(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        return float("nan")
    return float((theirs - ours).abs().max() / ours.square().mean().sqrt())


def _store(opened: Mapping[str, tuple[str, Tensor, Tensor]], refused: Mapping[str, str]) -> None:
    """Latents and outputs of all kinds one after the other, the narrower outputs filled up with zeros."""
    widest = max(outputs.shape[1] for *_, outputs in opened.values())
    columns = {
        "latents": [latents[:STORED] for _, latents, _ in opened.values()],
        "outputs": [pad(outputs[:STORED], (0, widest - outputs.shape[1])) for *_, outputs in opened.values()],
    }
    save_file({name: torch.stack(each).contiguous() for name, each in columns.items()}, f"{WHERE}.safetensors")
    about = {
        "package": "sae-lens",
        "version": version("sae-lens"),
        "opened": {name: kind for name, (kind, *_) in opened.items()},
        "refused": dict(refused),
    }
    WHERE.with_suffix(".json").write_text(json.dumps(about, indent=0) + "\n")
