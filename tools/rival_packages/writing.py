"""Every kind of file that endwise writes in SAELens's layout, with numbers of which none is at a special value."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import SAE, NormedSAE
from endwise.formats.base import PER_TOKEN
from rival_packages.opening import OURS

WIDTH, FEATURES, OUT, ROWS = 6, 12, 5, 200
FINISHED = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
SAVED_ALIKE = {"matryoshka_batchtopk": "batchtopk"}
"""Architectures whose files hold the same as another's: a few kinds of them are enough."""


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    make: Callable[[], SAE]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> Tensor:
    """`[ROWS WIDTH]`, off the origin, of many norms."""
    return (drawn(ROWS, WIDTH) + 0.5 * drawn(WIDTH, seed=1)) * (0.5 + drawn(ROWS, 1, seed=2).abs())


def finished(architecture: str, d_out: int = WIDTH, skip: bool = False) -> SAE:
    """A dictionary as a file gives it, with directions of many norms."""
    lengths = torch.linspace(0.3, 2.0, FEATURES)[:, None]
    tensors = {
        "W_enc": drawn(WIDTH, FEATURES, seed=3) / 2,
        "b_enc": drawn(FEATURES, seed=4) / 4,
        "W_dec": drawn(FEATURES, d_out, seed=5) * lengths / 2,
        "b_dec": drawn(d_out, seed=6),
        "threshold": 0.2 + drawn(FEATURES, seed=7).abs() / 2,
    }
    gated = {name: drawn(FEATURES, seed=seed) / 3 for seed, name in enumerate(("b_gate", "b_mag", "r_mag"), 8)}
    if skip:
        tensors["W_skip"] = drawn(d_out, WIDTH, seed=11) / 2
    config = {"d_in": WIDTH, "d_sae": FEATURES, "d_out": d_out, "k": 4}
    return ARCHITECTURES[architecture].from_tensors(tensors | gated, config).requires_grad_(False).eval()


def as_trained(architecture: str, source: str | None = None) -> SAE:
    """One in training, with directions that are normalised where they are used.

    Args:
        source: what it was taken over from; None: an SAE of its own architecture.
    """
    sae = finished(source or architecture)
    section = ARCHITECTURES[architecture].Config
    own = {"k": 4, "decoder_norm": "free"} if "k" in section.model_fields else {}
    taken = ARCHITECTURES[architecture].continuing(sae, section(architecture=architecture, size=FEATURES, **own))
    return taken.requires_grad_(False).eval()


def behind(architecture: str, norm: str, d_out: int = WIDTH, skip: bool = False) -> SAE:
    """One behind a norm, which is fitted where it is."""
    sae = NormedSAE(finished(architecture, d_out, skip), norm)
    x = inputs()
    with torch.no_grad():
        sae.see_first(x, x[:, :d_out] * 2 + 1)
    return sae.requires_grad_(False).eval()


def kinds() -> dict[str, Kind]:
    """Every kind by its name."""
    site, heads = {"hook_name": "blocks.1.hook_resid_pre"}, {"hook_name": "blocks.1.attn.hook_z"}
    mlp = {"hook_name": "blocks.1.mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    found: dict[str, Kind] = {}
    for name in FINISHED:
        found[name] = Kind(partial(finished, name), site)
        found[f"{name}_trained"] = Kind(partial(as_trained, name), site)
        found[f"{name}_transcoder"] = Kind(partial(finished, name), mlp)
        if name in SAVED_ALIKE:
            continue
        found[f"{name}_hook_z"] = Kind(partial(finished, name), heads)
        found[f"{name}_skip_transcoder"] = Kind(partial(finished, name, OUT, skip=True), mlp)
        for norm in (*PER_TOKEN, "scalar", "whitening"):
            found[f"{name}_{norm}"] = Kind(partial(behind, name, norm), site)
        found[f"{name}_layer_norm_hook_z"] = Kind(partial(behind, name, "layer_norm"), heads)
        found[f"{name}_whitening_skip_transcoder"] = Kind(partial(behind, name, "whitening", OUT, skip=True), mlp)
    found["transcoder_of_another_width"] = Kind(partial(finished, "standard", OUT))
    found["heads_transcoder"] = Kind(partial(finished, "standard"), heads | {"hook_name_out": mlp["hook_name_out"]})
    found["gated_taken_over"] = Kind(partial(as_trained, "jumprelu", "gated"), site)
    return found


def run(folder: Path) -> int:
    """Writes a folder for each kind, and what endwise gives for all of them: `<kind>.latents`, `<kind>.outputs`."""
    x = inputs()
    given = {"inputs": x}
    for name, kind in kinds().items():
        sae = kind.make()
        sae.save(folder / name, kind.metadata)
        with torch.no_grad():
            given |= {f"{name}.latents": sae.encode(x).dense(), f"{name}.outputs": sae(x)}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / OURS)
    sys.stdout.write(f"{len(kinds())} folders in {folder}\n")
    return 0
