"""Files of every format that is read, made from formulas: with each, what its own package computes of it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

D, F, K = 6, 12, 3


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


W, B, DIRECTIONS, BIAS = drawn(F, D, seed=1), drawn(F, seed=2, scale=0.3), drawn(F, D, seed=3), drawn(D, seed=4)
THETA, SKIP = drawn(F, seed=5).abs() * 0.5 + 0.1, drawn(D, D, seed=6)
X = drawn(40, D, seed=7) + 0.4


def relu(z):
    return z.clamp(min=0)


def above(threshold):
    return lambda z: z * (z > threshold)


def largest(z):
    z = relu(z)
    top = z.topk(K, -1)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values)


def plain(act, subtracts=False, skip=False, w=W, b=B, directions=DIRECTIONS, bias=BIAS):
    """The function of two matrices."""

    def computed(x):
        latents = act((x - bias if subtracts else x) @ w.T + b)
        return latents, latents @ directions + bias + (x @ SKIP.T if skip else 0)

    return computed


def centred(function):
    """The function on the model as it is, of one on a model whose writing weights are centred."""

    def computed(x):
        mean = x.mean(-1, keepdim=True)
        latents, output = function(x - mean)
        return latents, output + mean

    return computed


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    format: str
    file: str
    """The weights, below a folder."""
    tensors: dict
    oracle: Callable
    config: dict = field(default_factory=dict)
    config_file: str = ""
    path: str = ""
    """Path that is loaded, below the folder; empty: the weights' folder."""
    about: dict = field(default_factory=dict)
    """Metadata: where it belongs, and what it is."""
    transposed: bool = False

    def made(self, folder: Path) -> Path:
        file = folder / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: each.contiguous() if isinstance(each, torch.Tensor) else each for name, each in self.tensors.items()
        }
        if file.suffix == ".safetensors":
            save_file(tensors, file)
        elif file.suffix == ".npz":
            np.savez(file, **{name: each.numpy() for name, each in tensors.items()})
        else:
            torch.save(tensors, file)
        if self.config_file:
            dumped = json.dumps if self.config_file.endswith("json") else yaml.safe_dump
            (folder / self.config_file).write_text(dumped(self.config))
        return folder / self.path if self.path else file.parent

    def but(self, config=None, **tensors):
        """The same with other settings or tensors; a value None leaves one out."""

        def merged(old, new):
            both = {**old, **new}
            return {name: value for name, value in both.items() if value is not None}

        return replace(self, tensors=merged(self.tensors, tensors), config=merged(self.config, config or {}))


def site(part, layer=3):
    return {"hook_name": f"blocks.{layer}.{part}"}


SPARSIFY = {"encoder.weight": W, "encoder.bias": B, "W_dec": DIRECTIONS, "b_dec": BIAS}
SPARSIFY_CFG = {
    "activation": "topk",
    "expansion_factor": 2,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}
OLD_CFG = {"expansion_factor": 2, "normalize_decoder": True, "k": K, "d_in": D}
MLP = {**site("mlp_in"), "hook_name_out": "blocks.3.hook_mlp_out"}


def sparsify(tensors, cfg, oracle, about, folder="run/layers.3"):
    return Kind("sparsify", f"{folder}/sae.safetensors", tensors, oracle, cfg, f"{folder}/cfg.json", about=about)


LINEAR = {"encoder.weight": W, "encoder.bias": B, "decoder.weight": DIRECTIONS.T}
NAMED = {"W_enc": W.T, "b_enc": B, "W_dec": DIRECTIONS, "b_dec": BIAS}
GATES = {"r_mag": drawn(F, seed=8, scale=0.3), "gate_bias": drawn(F, seed=9), "mag_bias": drawn(F, seed=10)}
NORMS = DIRECTIONS.norm(dim=1)
UNIT = DIRECTIONS / NORMS[:, None]
ONE = torch.tensor(0.4)
COUNT = torch.tensor(K, dtype=torch.int)


def gated(x):
    z = (x - BIAS) @ W.T
    latents = (z + GATES["gate_bias"] > 0) * relu(GATES["r_mag"].exp() * z + GATES["mag_bias"])
    return latents, latents @ DIRECTIONS + BIAS


def trained_by(dict_class, tensors, oracle, **more):
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "a/model", **more}
    config = {"trainer": trainer, "buffer": {"ctx_len": 64}}
    about = {**site("hook_resid_post"), "model_name": "a/model", "context_size": 64, "dict_class": dict_class}
    about |= {"stated_l0": float(more["k"])} if "k" in more else {}
    return Kind("dictionary_learning", "t/ae.pt", tensors, oracle, config, "t/config.json", about=about)


def folded(x):
    """An AutoEncoder as its loader makes it: with directions of norm 1."""
    latents = relu((x - BIAS) @ W.T + B) * NORMS
    return latents, latents @ UNIT + BIAS


GEMMA = {**NAMED, "threshold": THETA}
GEMMA_ABOUT = {"stated_l0": 71.0, "model_name": "google/gemma-2-2b", "context_size": 1024, "prepend_bos": True}


def gemma(kind, about):
    folder = f"gemma-scope-2b-pt-{kind}/layer_3/width_16k/average_l0_71"
    return Kind("gemma-scope", f"{folder}/params.npz", GEMMA, plain(above(THETA)), about={**about, **GEMMA_ABOUT})


GEMMA_2 = {"w_enc": W.T, "b_enc": B, "w_dec": DIRECTIONS, "b_dec": BIAS, "threshold": THETA}


def gemma_2(tensors, oracle, about, reads, writes=None, **more):
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 60, "hf_hook_point_in": reads, **more}
    about = {**about, "hf_hook_name": reads, "model_name": "google/gemma-3-1b-pt", "stated_l0": 60.0}
    if writes:
        config["hf_hook_point_out"] = about["hf_hook_name_out"] = writes
    return Kind("gemma-scope-2", "s/params.safetensors", tensors, oracle, config, "s/config.json", about=about)


NORM_IN, NORM_OUT = 1.7, 0.6
S_IN, S_OUT = math.sqrt(D) / NORM_IN, math.sqrt(D) / NORM_OUT
BOTH = {"encoder.weight": W, "encoder.bias": B, "decoder.weight": DIRECTIONS.T, "decoder.bias": BIAS}


def llama_scope(gate, include=True):
    """Own parameters as lm-saes brought them into the activations' own scale, then directions of norm 1."""
    b, directions, bias = B / S_IN, DIRECTIONS * S_IN / S_OUT, BIAS / S_OUT
    n = directions.norm(dim=1) if include else torch.ones(F)

    def computed(x):
        z = x @ W.T + b
        compared = {"released": z * n, "saelens": z, "trained": z * n * S_OUT}[gate or "released"]
        latents = z * n * (compared > 0.4)
        return latents, latents @ (directions / n[:, None]) + bias

    config = {"hook_point_in": "blocks.3.mlp_in", "hook_point_out": "blocks.3.hook_mlp_out", "act_fn": "jumprelu"}
    config |= {"jump_relu_threshold": 0.4, "d_model": D, "d_sae": F, "top_k": 50, "norm_activation": "dataset-wise"}
    config |= {"apply_decoder_bias_to_pre_encoder": False}
    config |= {"dataset_average_activation_norm": {"in": NORM_IN, "out": NORM_OUT}}
    config |= {"sparsity_include_decoder_norm": include, **({"gate": gate} if gate else {})}
    folder, about = "Llama3_1-8B-L3M-2x", {**MLP, "model_name": "meta-llama/Llama-3.1-8B", "stated_l0": 50.0}
    weights = f"{folder}/checkpoints/final.safetensors"
    return Kind("llama-scope", weights, BOTH, computed, config, f"{folder}/hyperparams.json", folder, about)


LLAMASCOPIUM = {"W_E": W.T, "b_E": B, "W_D": DIRECTIONS, "b_D": BIAS}
SCALE = {"dataset_average_activation_norm.blocks.3.hook_resid_post": torch.tensor(NORM_IN)}


def llamascopium(act_fn, tensors, oracle, **more):
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": 2, "act_fn": act_fn, "top_k": K}
    config |= {f"hook_point_{way}": "blocks.3.hook_resid_post" for way in ("in", "out")} | more
    file, about = "s/sae_weights.safetensors", site("hook_resid_post")
    return Kind("llamascopium", file, tensors, oracle, config, "s/config.json", about=about)


def scaled(act, act_of_norms=False):
    """Activations of norm √d, and the result brought back."""

    def computed(x):
        z = x * S_IN @ W.T + B
        latents = act(z * NORMS) / (1 if act_of_norms else NORMS)
        return latents, (latents @ (UNIT if act_of_norms else DIRECTIONS) + BIAS) / S_IN

    return computed


OPENAI = {"pre_bias": BIAS, "encoder.weight": W, "latent_bias": B, "decoder.weight": DIRECTIONS.T}
STATS = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_mean_square": torch.ones(F)}


def of_normed(x):
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    latents = largest(((x - mean) / (std + 1e-5) - BIAS) @ W.T + B)
    return latents, (latents @ DIRECTIONS + BIAS) * std + mean


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
OF_OPENAI = "resid_delta_mlp_v5_32k/autoencoders/3.pt"
QWEN = {"W_enc": W, "b_enc": B, "W_dec": DIRECTIONS.T, "b_dec": BIAS}
QWEN_CONFIG = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-8B-Base", "d_model": D, "d_sae": F, "k": K}
QWEN_ABOUT = {**site("hook_resid_post"), "model_name": "Qwen/Qwen3-8B-Base"}
START = "blocks-3-hook_resid_pre"
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
POST, PRE = "model.layers.3.post_feedforward_layernorm.output", "model.layers.3.pre_feedforward_layernorm.output"

KINDS = {
    "sparsify": sparsify(
        *(SPARSIFY, SPARSIFY_CFG, plain(largest, True)), {**site("hook_resid_post"), "hf_hook_name": "layers.3"}
    ),
    "sparsify, old": sparsify(
        *(SPARSIFY, OLD_CFG, plain(largest, True)), {**site("hook_resid_post"), "hf_hook_name": "layers.3"}
    ),
    "sparsify, old transcoder": sparsify(
        {**SPARSIFY, "W_skip": SKIP},
        OLD_CFG | {"skip_connection": True},
        plain(largest, True, True),
        {**MLP, "hf_hook_name": "layers.3.mlp"},
        "run/layers.3.mlp",
    ),
    "sparsify, transcoder": sparsify(
        {**SPARSIFY, "W_skip": SKIP},
        SPARSIFY_CFG | {"skip_connection": True, "transcode": True, "num_latents": F},
        plain(largest, False, True),
        {**MLP, "hf_hook_name": "layers.3.mlp"},
        "run/layers.3.mlp",
    ),
    "AutoEncoder": trained_by("AutoEncoder", LINEAR | {"bias": BIAS}, folded),
    "AutoEncoderNew": trained_by("AutoEncoderNew", LINEAR | {"decoder.bias": BIAS}, plain(relu)),
    "GatedAutoEncoder": trained_by(
        "GatedAutoEncoder", {"encoder.weight": W, "decoder.weight": DIRECTIONS.T, "decoder_bias": BIAS, **GATES}, gated
    ),
    "JumpReluAutoEncoder": trained_by("JumpReluAutoEncoder", NAMED | {"threshold": THETA}, plain(above(THETA))),
    "AutoEncoderTopK": trained_by(
        "AutoEncoderTopK", LINEAR | {"b_dec": BIAS, "k": COUNT, "threshold": ONE}, plain(largest, True), k=K
    ),
    "BatchTopKSAE": trained_by(
        "BatchTopKSAE", LINEAR | {"b_dec": BIAS, "k": COUNT, "threshold": ONE}, plain(above(0.4), True), k=K
    ),
    "BatchTopKSAE, before its threshold": trained_by(
        "BatchTopKSAE", LINEAR | {"b_dec": BIAS, "k": COUNT, "threshold": -ONE}, plain(relu, True), k=K
    ),
    "MatryoshkaBatchTopKSAE": trained_by(
        "MatryoshkaBatchTopKSAE",
        NAMED | {"k": COUNT, "threshold": ONE, "group_sizes": torch.tensor([4, 8])},
        plain(above(0.4), True),
        k=K,
    ),
    "e2e_sae": Kind(
        "e2e_sae",
        "r/samples_9.pt",
        {f"{START}.{name.replace('encoder.', 'encoder.0.')}": tensor for name, tensor in BOTH.items()},
        centred(plain(relu, directions=UNIT)),
        {"tlens_model_name": "gpt2-small"},
        "r/final_config.yaml",
        "r/samples_9.pt",
        {**site("hook_resid_pre"), "model_name": "gpt2-small", **CENTRED},
    ),
    "gemma-scope res": gemma("res", site("hook_resid_post")),
    "gemma-scope mlp": gemma("mlp", site("hook_mlp_out")),
    "gemma-scope att": gemma("att", site("attn.hook_z")),
    "gemma-scope transcoders": gemma("transcoders", MLP),
    "gemma-scope-2": gemma_2(GEMMA_2, plain(above(THETA)), site("hook_resid_post"), "model.layers.3.output", width=F),
    "gemma-scope-2 att": gemma_2(
        GEMMA_2, plain(above(THETA)), site("attn.hook_z"), "model.layers.3.self_attn.o_proj.input"
    ),
    "gemma-scope-2 mlp": gemma_2(GEMMA_2, plain(above(THETA)), site("hook_mlp_out"), POST),
    "gemma-scope-2 affine": gemma_2(
        *(GEMMA_2 | {"affine_skip_connection": SKIP.T}, plain(above(THETA), skip=True), MLP, PRE, POST),
        affine_connection=True,
    ),
    "goodfire": Kind(
        "goodfire",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        {name.replace(".", "_linear."): tensor for name, tensor in BOTH.items()},
        plain(relu),
        path="Llama-3.1-8B-Instruct-SAE-l19.pth",
        about={**site("hook_resid_post", 19), "model_name": "meta-llama/Llama-3.1-8B-Instruct"},
    ),
    "llama-scope": llama_scope(None),
    "llama-scope, norms left out": llama_scope(None, False),
    "llama-scope, as SAELens": llama_scope("saelens"),
    "llama-scope, as trained": llama_scope("trained"),
    "llamascopium": llamascopium(
        *("jumprelu", {**LLAMASCOPIUM, **SCALE, "activation_function.log_jumprelu_threshold": THETA.log()}),
        scaled(above(THETA)),
    ),
    "llamascopium topk": llamascopium("topk", {**LLAMASCOPIUM, **SCALE}, scaled(largest, True)),
    "llamascopium relu, folded": llamascopium("relu", LLAMASCOPIUM, plain(relu), norm_activation="inference"),
    "llamascopium, before 2": llamascopium(
        *("jumprelu", {**BOTH, "log_jumprelu_threshold": THETA.log()}, plain(above(THETA))),
        norm_activation="inference",
        sparsity_include_decoder_norm=False,
    ),
    "openai": Kind("openai", OF_OPENAI, OPENAI | STATS, plain(relu, True), path=OF_OPENAI),
    "openai topk": Kind("openai", OF_OPENAI, OPENAI | STATS | TOPK, of_normed, path=OF_OPENAI),
    "qwen-scope": Kind(
        "qwen-scope",
        "q/layer3.sae.pt",
        QWEN,
        plain(largest),
        QWEN_CONFIG,
        "q/config.json",
        "q/layer3.sae.pt",
        QWEN_ABOUT,
    ),
    "qwen-scope by its name": Kind(
        "qwen-scope",
        "SAE-Res-Qwen3-8B-Base-W0K-L0_3/layer3.sae.pt",
        QWEN,
        plain(largest),
        path="SAE-Res-Qwen3-8B-Base-W0K-L0_3/layer3.sae.pt",
        about=QWEN_ABOUT,
    ),
}
for _name in ("openai", "openai topk"):
    KINDS[_name] = replace(KINDS[_name], about={**site("hook_mlp_out"), "model_name": "gpt2"})
_TIED = {name: each for name, each in OPENAI.items() if name != "decoder.weight"} | {"decoder.linear.weight": W}
KINDS["openai, tied"] = replace(KINDS["openai"], tensors=_TIED | STATS, oracle=plain(relu, True, directions=W))


def one_of_each(trait: Callable[[Kind], object]) -> pytest.MarkDecorator:
    """Parametrise over all kinds, of which those that share a trait with one before are slow."""
    seen, cases = set(), []
    for name, kind in KINDS.items():
        of = (kind.format, trait(kind))
        cases.append(pytest.param(kind, id=name, marks=pytest.mark.slow if of in seen else ()))
        seen.add(of)
    return pytest.mark.parametrize("kind", cases)
