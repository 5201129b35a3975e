"""A folder that endwise wrote, opened by SAELens."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def compare(folder: Path, expected: Path, tolerance: float) -> int:
    """Prints the largest differences of latents and outputs, absolute; 1 if one is over the tolerance or not finite."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    stored = load_file(expected)
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        latents = sae.encode(stored["inputs"])
        outputs = sae(stored["inputs"])
    sys.stdout.write(f"{type(sae).__name__}: {sae.cfg.to_dict()}\n")
    failed = False
    for name, ours in (("latents", latents), ("outputs", outputs)):
        if ours.shape != stored[name].shape:
            sys.stdout.write(f"{name}: SAELens gives {list(ours.shape)}, the file has {list(stored[name].shape)}\n")
            failed = True
            continue
        difference = (ours - stored[name]).abs().max().item()
        within = difference <= tolerance  # false for NaN too
        failed |= not within
        sys.stdout.write(f"{name}: largest difference {difference:.3g}, {'within' if within else 'OVER'} {tolerance}\n")
    return int(failed)
