"""Small runs at several places, and what they leave."""

import copy
import json

import torch

from endwise import LanguageModel, Site, train_places
from endwise.runs.checkpoints import checksum, read_checkpoint
from small_gpt2 import LAYERS, recipe, small_corpora, small_model
from tiny_models import tiny

MLPS = [f"blocks.{layer}.mlp_in -> blocks.{layer}.hook_mlp_out" for layer in range(4)]
RESIDUAL = ["blocks.1.hook_resid_pre", "blocks.2.hook_attn_out", "blocks.3.hook_resid_pre"]
LATER = Site.parse("blocks.3.hook_resid_post")


def in_double():
    return LanguageModel(copy.deepcopy(tiny("gpt2").model).double(), name="gpt2")


def some_masked(ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = mask[1, 5:8] = mask[2, -1] = False
    return mask


def several(out, places=None, kind="e2e_ds", **changes):
    """A recipe for the residual stream before every block, or other places."""
    base = recipe(out, kind, checkpoint_every=5, log_every=1, evaluate_every=10).model_dump(mode="json")
    base = {key: value for key, value in base.items() if key not in ("site", "writes")}
    places = places or [{"site": f"blocks.{layer}.hook_resid_pre"} for layer in range(LAYERS)]
    return base | {"places": places} | changes


def start(made, values, **options):
    return train_places(values, model=small_model(), corpora=small_corpora(made), display=False, **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    """Read what training leaves; of a checkpoint all but the generators, which the test run draws from too."""
    names = [*folder.glob("**/sae_weights.safetensors"), *folder.glob("**/*.jsonl")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in names if path.name != "timings.jsonl"}
    for path in folder.glob("**/step-*"):
        checkpoint = read_checkpoint(path)
        own = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("random.")}
        found[str(path.relative_to(folder))] = checksum(own, json.dumps(checkpoint.state))
    return found
