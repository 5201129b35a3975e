"""SAELens's file of an SAE, of any of its versions, told as what the function is; or refused, where ours cannot be it.

Nothing that changes the function is passed over: every field and tensor is read, known to change nothing, or refused.
Before its version 6, SAELens wrote one flat object, in which settings of the training stand beside the function's.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from endwise.errors import FormatError
from endwise.reading import read_json
from endwise.remedies import unreadable

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FIRST_VERSION = 6
"""The generation of SAELens that keeps under `metadata` what says nothing of the function."""
_SCALES = ("scaling_factor", "finetuning_scaling_factor")
"""The tensor's names in a file and in SAELens itself: what each latent is multiplied by as it is decoded."""
_UNSET = (None, False, "", "none", [], {})

_READ = {"architecture", "d_in", "d_sae", "apply_b_dec_to_input", "metadata", "finetuning_scaling_factor"}
_NOT_THE_FUNCTION = """
dtype device sae_lens_version sae_lens_training_version model_name model_class_name model_from_pretrained_kwargs
model_kwargs model_batch_size hook_name hook_point hook_layer hook_point_layer hook_head_index
hook_point_head_index hook_eval hook_point_eval dataset_path dataset_trust_remote_code is_dataset_tokenized
streaming use_chat_formatting context_size prepend_bos seqpos_slice exclude_special_tokens sequence_separator_token
disable_concat_sequences neuronpedia_id use_cached_activations cached_activations_path from_pretrained_path
n_batches_in_buffer store_batch_size store_batch_size_prompts activations_mixing_fraction training_tokens
total_training_tokens total_training_steps finetuning_tokens finetuning_method finetuning_steps train_batch_size
train_batch_size_tokens tokens_per_buffer eval_batch_size_prompts n_eval_batches seed autocast autocast_lm
autocast_sae compile_llm compile_sae llm_compilation_mode sae_compilation_mode llm_device act_store_device
prefetch_llm_batches expansion_factor b_dec_init_method init_encoder_as_decoder_transpose decoder_heuristic_init
decoder_init_norm decoder_orthogonal_init apply_decoder_heuristic_init normalize_sae_decoder noise
mse_loss_normalization scale_sparsity_penalty_by_decoder_norm l1_coefficient l1_warm_up_steps lp_norm
l1_loss_fn_name use_ghost_grads ghost_grads ghost_grads_stop_condition resample resample_method
feature_resampling_method resample_batches feature_reinit_scale dead_feature_estimation_method
feature_sampling_method feature_sampling_window feature_sampling_batch_size dead_feature_window
dead_feature_threshold adam_beta1 adam_beta2 lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps
n_restart_cycles train_sae wandb_project wandb_entity wandb_id wandb_log_frequency wandb_group log_to_wandb
run_name eval_every_n_wandb_logs log_activations_store_to_wandb log_optimizer_state_to_wandb log_weights_to_wandb
logger n_checkpoints checkpoint_path save_final_checkpoint output_path resume resume_from_checkpoint verbose
n_batches_for_norm_estimate sparsity
"""
"""Where the SAE belongs, and how it was trained, in the words of all of SAELens's versions."""

_NO_RELU = "no ReLU SAE computes the same, so that no conversion helps."
_OTHERS = {
    **dict.fromkeys(
        (
            *("topk", "abstopk", "jumprelu", "gated", "temporal", "matching_pursuit"),
            *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
        ),
        "Use it with SAELens",
    ),
    **dict.fromkeys(
        ("batchtopk", "matryoshka_batchtopk"),
        "It is as its training left it: use it with SAELens, whose TrainingSAE.load_from_disk alone opens it",
    ),
}
"""What else SAELens knows, and how each can be used."""
_NORMALISATIONS = {
    "layer_norm": (
        "each activation is centred and divided by its own standard deviation, which no weights can do, so that it "
        "cannot be folded into them. Use it with SAELens"
    ),
    "constant_norm_rescale": (
        "each activation is divided by its own norm, which no weights can do, so that it cannot be folded into them. "
        "Use it with SAELens"
    ),
    "expected_average_only_in": (
        "activations are multiplied by one number, which the file does not hold. Where you know it, load the SAE with "
        "SAELens, call fold_activation_norm_scaling_factor with it, and save_model"
    ),
    "covariance_whitening": (
        "activations are whitened by matrices that the file does not hold. Where you have those of its training "
        "(activation_whitening.safetensors), load the SAE with SAELens, call fold_activation_whitening, and save_model"
    ),
}


class Described(NamedTuple):
    """What a file says of the function."""

    cfg: dict[str, Any]
    """With `architecture`, `d_in`, `d_sae`, `apply_b_dec_to_input`."""
    tensors: dict[str, Tensor]
    """`W_enc [d_in d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae d_in]`, `b_dec [d_in]`, finite, as they are used."""


def read_cfg(folder: Path) -> dict[str, Any]:
    """
    Raises:
        FormatError: there is no `cfg.json`, or it is not what the format says.
    """
    path = folder / CFG_FILE
    try:
        cfg = read_json(path)
    except FileNotFoundError:
        raise FormatError(f"{folder} holds no {CFG_FILE}: give a folder in SAELens's layout or a run folder.") from None
    for key in ("d_in", "d_sae"):
        if type(cfg.get(key)) is not int or cfg[key] < 1:
            raise FormatError(f"{path}: {key} must be a whole number above 0, not {cfg.get(key)!r:.80}. Correct it.")
    for key in ("apply_b_dec_to_input", "finetuning_scaling_factor"):
        if type(cfg.get(key, True)) is not bool:
            raise FormatError(f"{path}: {key} must be true or false, not {cfg[key]!r:.80}. Correct it.")
    if not isinstance(cfg.setdefault("metadata", {}), dict):
        raise FormatError(f"{path}: metadata must be an object, not {cfg['metadata']!r:.80}. Correct it.")
    return cfg


def describe(folder: Path, architectures: set[str]) -> Described:
    """
    Args:
        architectures: SAELens's names of those that can be read.

    Raises:
        FormatError: the configuration or the weights are missing or not what the format says, or say something of the
            function that is none of ours.
    """
    path, cfg = folder / CFG_FILE, read_cfg(folder)
    architecture = _architecture(cfg)
    if not isinstance(architecture, str) or architecture not in architectures:
        known, told = ", ".join(sorted(architectures)), f"{architecture!r:.80}"
        why = "endwise does not know it. Give an SAE of another kind"
        if isinstance(architecture, str) and architecture in _OTHERS:
            why = f"{_NO_RELU} {_OTHERS[architecture]}"
        raise FormatError(f"{path}: architecture {told} is not one of {known}; {why}.")
    _check_function(path, cfg)
    _warn_of_processing(path, cfg)
    tensors = _read_weights(folder, cfg)
    return Described({**cfg, "architecture": architecture}, tensors)


def _architecture(cfg: Mapping[str, Any]) -> Any:
    """As SAELens migrates it: before version 6 a file without one is standard, and one that says topk is none."""
    old = _is_old(cfg)
    if str(_activation(cfg)).lower() == "topk" and cfg.get("architecture", "standard") == "standard":
        return "topk"
    return cfg.get("architecture", "standard" if old else None)


def _activation(cfg: Mapping[str, Any]) -> Any:
    return cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"


def _is_old(cfg: Mapping[str, Any]) -> bool:
    version = str(cfg.get("sae_lens_version") or cfg["metadata"].get("sae_lens_version") or 0)
    major = version.partition(".")[0]
    return not major.isdecimal() or int(major) < FIRST_VERSION


def _check_function(path: Path, cfg: Mapping[str, Any]) -> None:
    """
    Raises:
        FormatError: a field other than those that are read changes the function, or may.
    """
    for key in ("activation_fn", "activation_fn_str"):
        given = cfg.get(key)
        if given not in _UNSET and str(given).lower() != "relu":
            raise FormatError(
                f"{path}: {key} is {given!r:.80} rather than 'relu'; {_NO_RELU} Use it with a SAELens of the version "
                f"that wrote it: since {FIRST_VERSION}, it takes all but topk for ReLU, and does not say so."
            )
    norm = cfg.get("normalize_activations")
    norm = "expected_average_only_in" if norm is True else norm
    if norm not in (None, False, "none"):
        why = _NORMALISATIONS.get(norm) if isinstance(norm, str) else None
        raise FormatError(f"{path}: normalize_activations is {norm!r:.80}: {why or 'endwise does not know it'}.")
    shape = cfg.get("reshape_activations")
    if shape is None and _is_old(cfg) and "hook_z" in str(cfg.get("hook_name") or cfg.get("hook_point")):
        shape = "hook_z"
    if shape not in (None, "none"):
        raise FormatError(
            f"{path}: reshape_activations is {shape!r:.80}: it is for the outputs of single heads, which endwise has "
            "no site for. Use it with SAELens."
        )
    settled = {"activation_fn", "activation_fn_str", "normalize_activations", "reshape_activations"}
    known = _READ | set(_NOT_THE_FUNCTION.split()) | settled
    if unknown := {key: value for key, value in cfg.items() if key not in known and value not in _UNSET}:
        told = ", ".join(f"{key}={value!r:.40}" for key, value in list(unknown.items())[:5])
        raise FormatError(
            f"{path}: {told[:300]} may change what the SAE computes, and endwise does not know how. If it says nothing "
            "of the function, move it under metadata; if it does, use the SAE with SAELens."
        )


def _warn_of_processing(path: Path, cfg: Mapping[str, Any]) -> None:
    """An SAE of a model whose weights TransformerLens centred reads activations that Hugging Face's model has not."""
    given = cfg["metadata"].get("model_from_pretrained_kwargs") or cfg.get("model_from_pretrained_kwargs")
    if isinstance(given, dict) and given.get("center_writing_weights"):
        warnings.warn(
            f"{path}: this SAE was trained on a model loaded with center_writing_weights, whose activations have their "
            "mean over the dimensions taken out; the Hugging Face model's have it, so that the SAE reads them wrongly.",
            stacklevel=4,
        )


def _read_weights(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{folder} holds no {WEIGHTS_FILE}; only safetensors weights are read.") from None
    except (OSError, SafetensorError, ValueError) as error:
        damaged = FormatError(f"{path} is not a valid safetensors file ({error}). Restore it.")
        raise unreadable(path, error) or damaged from None
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    scales = {name: (d_sae,) for name in _SCALES if name in tensors}
    if others := sorted(set(tensors) - set(shapes) - set(scales)):
        raise FormatError(
            f"{path} also holds {', '.join(others)[:200]}, which change what the SAE computes, while a ReLU SAE has "
            f"{', '.join(shapes)} alone. Use it with SAELens, or give the SAE as SAELens saves it for inference."
        )
    for name, shape in {**shapes, **scales}.items():
        _check_tensor(path, name, tensors.get(name), shape)
    return _scaled(path, tensors, bool(cfg.get("finetuning_scaling_factor")))


def _check_tensor(path: Path, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    found = "no such tensor" if tensor is None else tuple(tensor.shape)
    if tensor is None or found != shape:
        raise FormatError(f"{path}: {name} must have the shape {shape} of cfg.json, found {found}.")
    if not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise FormatError(
            f"{path}: {name} must hold finite floating-point numbers, but it is "
            f"{tensor.dtype}{' with NaN or infinity' if tensor.is_floating_point() else ''}. "
            "Restore the file, or train the SAE again."
        )


def _scaled(path: Path, tensors: dict[str, Tensor], scales: bool) -> dict[str, Tensor]:
    """Σ (s·c)·W_dec = Σ c·(s·W_dec), with the latents as they were. A factor of ones, which SAELens once wrote into
    every file, is none.
    """
    given = [tensors.pop(name) for name in _SCALES if name in tensors]
    factors = [each.float() for each in given if not torch.allclose(each.float(), torch.ones(()))]
    if len(given) > 1 or bool(factors) > scales or scales > bool(given):
        raise FormatError(
            f"{path}: finetuning_scaling_factor is {str(scales).lower()} in {CFG_FILE}, but the file has {len(given)} "
            f"tensors of that name, {len(factors)} of them other than ones. Correct whichever is wrong: {_SCALES[0]} "
            "multiplies the latents as they are decoded."
        )
    if factors:
        tensors["W_dec"] = tensors["W_dec"].float() * factors[0][:, None]
    return tensors
