"""SAEs in formats of several packages for the tiny GPT-2, as anybody may have them: they are no runs of ours."""

import json

import torch
from torch.nn.functional import normalize

from endwise import ReluSAE
from endwise.dictionaries import JumpReLUSAE, TopKSAE
from endwise.dictionaries.selection import Annealed
from small_gpt2 import SITE, WIDTH

FEATURES = 40
AT_SITE = {"hook_name": SITE, "model_name": "gpt2-tiny"}


def filled(sae, seed=0):
    """Features that read along the direction that they write, a little under 0."""
    directions = normalize(torch.randn(FEATURES, sae.d_in, generator=torch.Generator().manual_seed(seed)), dim=1)
    tensors = {"W_enc": directions.T / 2, "b_enc": torch.full((FEATURES,), -0.02), "W_dec": directions}
    sae.fill({**tensors, "b_dec": torch.zeros(sae.d_in), "threshold": torch.full((FEATURES,), 0.05)})
    return sae


def saelens(folder, about=AT_SITE, seed=0):
    filled(ReluSAE(WIDTH, FEATURES), seed).save(folder / "standard", about)
    return folder / "standard"


def saelens_jumprelu(folder):
    filled(JumpReLUSAE(WIDTH, FEATURES)).save(folder / "jumprelu", AT_SITE)
    return folder / "jumprelu"


def sparsify(folder, k=6):
    sae = filled(TopKSAE(WIDTH, FEATURES, k=Annealed(k)))
    sae.save(folder / f"k{k}" / "layers.0", format_name="sparsify")
    return folder / f"k{k}" / "layers.0"


def batchtopk(folder, k=9):
    """One of dictionary_learning's, which endwise reads and does not write."""
    path = folder / "trainer_0"
    path.mkdir(parents=True)
    made = filled(ReluSAE(WIDTH, FEATURES)).export().tensors
    tensors = {"encoder.weight": made["W_enc"].T, "encoder.bias": made["b_enc"], "decoder.weight": made["W_dec"].T}
    torch.save(
        {**tensors, "b_dec": made["b_dec"], "k": torch.tensor(k), "threshold": torch.tensor(0.05)}, path / "ae.pt"
    )
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": WIDTH, "dict_size": FEATURES, "layer": 0, "k": k}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 8}}))
    return path


def gemma_scope(folder, l0=12):
    path = folder / f"gemma-scope-2b-pt-res/layer_0/width_40/average_l0_{l0}"
    filled(JumpReLUSAE(WIDTH, FEATURES)).save(path, format_name="gemma-scope")
    return path


FOREIGN = {
    "saelens": saelens,
    "saelens jumprelu": saelens_jumprelu,
    "sparsify": sparsify,
    "dictionary_learning": batchtopk,
    "gemma-scope": gemma_scope,
}
