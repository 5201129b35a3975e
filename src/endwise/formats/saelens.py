"""Files of SAELens, of any of its versions, each read as the function that it is, or refused where ours cannot be it.

Nothing that changes the function is passed over: every field and tensor is read, known to change nothing, or refused.
Before its version 6, SAELens wrote one flat object, in which settings of the training stand beside the function's.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from endwise.common.errors import FormatError
from endwise.common.files import read_json, write_json
from endwise.common.tensor_files import write_tensors
from endwise.formats.base import PER_TOKEN, Format, Layout, Stored, added, check_tensors
from endwise.formats.reading import safetensors_at, unit_directions

CFG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
HEADS_JOINED = "hook_z"
"""`reshape_activations`: SAELens sets the heads' results one after the other, as they are at the site `attn.hook_z`."""
FIRST_VERSION = 6
"""The generation of SAELens that keeps under `metadata` what says nothing of the function."""
WRITTEN_VERSION = "6.0.0"
"""The generation whose layout is written; SAELens reads older numbers through a legacy path."""
_SCALES = ("scaling_factor", "finetuning_scaling_factor")
"""The tensor's names in a file and in SAELens itself: what each latent is multiplied by as it is decoded."""
_UNSET = (None, False, "", "none", [], {})

NAMES = re.compile(r"(?:(?!skip_)(?P<architecture>\w+?)_)?(?P<skip>skip_)?transcoder")
"""Names of transcoders: SAELens has the four of `standard` (not named) and of `jumprelu`; those of others are ours."""
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
"""Keys of where the SAE belongs and how it was trained, of all of SAELens's versions."""

_ABOUT = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"} | {
    name: name
    for name in (
        *("model_name", "hook_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos", "context_size"),
        *("dataset_path", "neuronpedia_id", "seqpos_slice", "sae_lens_training_version"),
    )
}
"""Keys before version 6 of where an SAE belongs, with their names under `metadata` since."""

_FOLDED = {"topk": {"rescale_acts_by_decoder_norm"}}
"""An architecture's keys that are made part of the weights as they are read."""
_NOT_OURS = "endwise computes no such function, and no conversion keeps it."
_OTHERS = {
    **dict.fromkeys(("abstopk", "temporal", "matching_pursuit"), "Use it with SAELens"),
    **dict.fromkeys(
        ("batchtopk", "matryoshka_batchtopk"),
        "It is a training checkpoint: open it with SAELens's TrainingSAE.load_from_disk and save it for inference "
        "(save_inference_model)",
    ),
}
"""Further keys of SAELens, and how each can be used."""
_NORMALISATIONS = {
    **dict.fromkeys(PER_TOKEN, "of a transcoder SAELens applies it to the input and undoes it nowhere. Use it there"),
    "expected_average_only_in": (
        "activations are multiplied by one number, which the file does not hold. If you know it, load the SAE with "
        "SAELens, call fold_activation_norm_scaling_factor with it, and save_model"
    ),
    "covariance_whitening": (
        "activations are whitened by matrices that the file does not hold. If you have those of its training "
        "(activation_whitening.safetensors), load the SAE with SAELens, call fold_activation_whitening, and save_model"
    ),
}


@added
class SAELens(Format):
    """A folder with `cfg.json` and `sae_weights.safetensors`. All versions are read, version 6 is written."""

    name = "saelens"
    files = (WEIGHTS_FILE, CFG_FILE)

    def read(self, path: Path, layouts: Mapping[str, Layout]) -> Stored:
        file, cfg = path / CFG_FILE, read_cfg(path)
        architecture, layout = _found(file, cfg, layouts)
        _check_function(file, cfg, layout, _FOLDED.get(architecture, set()))
        config = {key: cfg[key] for key in ("d_in", "d_sae", *layout.settings) if key in cfg}
        if cfg.get("normalize_activations") in PER_TOKEN:
            config["normalize"] = cfg["normalize_activations"]
        if "k" in layout.settings:
            config["k"] = _k(file, cfg)
        tensors = _read_weights(path, {**cfg, "architecture": architecture}, layout)
        if cfg.get("rescale_acts_by_decoder_norm"):
            tensors = unit_directions(tensors)  # by which it decodes what is chosen among latents times their norms
        return Stored(architecture, config, tensors, cfg["metadata"], cfg.get("apply_b_dec_to_input", True))

    def write(self, path: Path, stored: Stored) -> None:
        own, of_heads = dict(stored.config), str(stored.metadata.get("hook_name")).endswith("attn.hook_z")
        if stored.transcodes:  # whose input SAELens takes as it is
            if "normalize" in own:
                raise FormatError(
                    f"{path}: a transcoder behind {own['normalize']} cannot be written, since a file's "
                    "normalize_activations is undone at what is read. Save one that has no norm of each token."
                )
            own.setdefault("d_out", own["d_in"])
            of_heads = False
        cfg = {
            "architecture": transcoder_name(stored) if stored.transcodes else stored.architecture,
            "d_in": own.pop("d_in"),
            "d_sae": own.pop("d_sae"),
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": stored.subtracts_b_dec,
            "normalize_activations": own.pop("normalize", "none"),
            "reshape_activations": HEADS_JOINED if of_heads else "none",
            **own,
            "metadata": {"sae_lens_version": WRITTEN_VERSION, **stored.metadata},
        }
        weights = stored.under(stored.subtracts_b_dec)
        write_tensors(path / WEIGHTS_FILE, weights, {"metadata": json.dumps(cfg["metadata"])})
        write_json(path / CFG_FILE, cfg)

    def metadata(self, path: Path) -> Mapping[str, Any]:
        return read_cfg(path)["metadata"]


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
    if _is_old(cfg):  # which had beside the function what is under metadata since
        cfg["metadata"] = {ours: cfg[name] for name, ours in _ABOUT.items() if cfg.get(name) is not None} | cfg[
            "metadata"
        ]
    return cfg


def transcoder_name(stored: Stored) -> str:
    """SAELens's name of an architecture's transcoder, or by the same rule the name of one that it does not know."""
    own = "" if stored.architecture == "standard" else f"{stored.architecture}_"
    return f"{own}{'skip_' if stored.skips else ''}transcoder"


def _found(file: Path, cfg: Mapping[str, Any], layouts: Mapping[str, Layout]) -> tuple[str, Layout]:
    """The architecture by our name, and what a file of it holds.

    Raises:
        FormatError: it is none of `layouts`, or a transcoder's file lacks what SAELens asks of one.
    """
    stated = _architecture(cfg)
    if isinstance(stated, str) and stated in layouts and stated not in _OTHERS:
        return stated, layouts[stated]
    named = NAMES.fullmatch(stated) if isinstance(stated, str) else None
    architecture = named["architecture"] or "standard" if named else ""
    known = named is not None and architecture in layouts and layouts[architecture].transcodes
    if named is None or not known or (named["skip"] and not layouts[architecture].skip):
        names, why = ", ".join(sorted(layouts)), "endwise does not know it. Give an SAE of another kind"
        if isinstance(stated, str) and stated in _OTHERS:
            why = f"{_NOT_OURS} {_OTHERS[stated]}"
        raise FormatError(f"{file}: architecture {stated!r:.80} is not one of {names}, nor a transcoder of one; {why}.")
    if type(cfg.get("d_out")) is not int or cfg["d_out"] < 1:
        raise FormatError(f"{file}: d_out must be a whole number above 0, not {cfg.get('d_out')!r:.80}. Correct it.")
    if cfg.get("apply_b_dec_to_input", True):
        raise FormatError(
            f"{file}: a transcoder's b_dec is of what it writes and cannot be subtracted from what it reads, so that "
            "apply_b_dec_to_input must be false. Correct it."
        )
    return architecture, layouts[architecture].of_transcoder(skip=bool(named["skip"]))


def _architecture(cfg: Mapping[str, Any]) -> Any:
    """Migrate as SAELens does: before version 6 a file without one is standard, and one that says topk is topk."""
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn")
    if str(activation).lower() == "topk" and cfg.get("architecture", "standard") == "standard":
        return "topk"
    return cfg.get("architecture", "standard" if _is_old(cfg) else None)


def _k(file: Path, cfg: Mapping[str, Any]) -> int:
    """Features per token; before version 6 it is an argument of the activation."""
    arguments = cfg.get("activation_fn_kwargs")
    k = cfg.get("k", arguments.get("k") if isinstance(arguments, dict) else None)
    if type(k) is not int or not 1 <= k <= cfg["d_sae"]:
        raise FormatError(
            f"{file}: k must be a whole number from 1 to d_sae {cfg['d_sae']}, not {k!r:.80}. Correct it."
        )
    return k


def _is_old(cfg: Mapping[str, Any]) -> bool:
    version = str(cfg.get("sae_lens_version") or cfg["metadata"].get("sae_lens_version") or 0)
    major = version.partition(".")[0]
    return not major.isdecimal() or int(major) < FIRST_VERSION


def _check_function(path: Path, cfg: Mapping[str, Any], layout: Layout, folded: set[str]) -> None:
    """
    Args:
        folded: keys whose meaning is folded into the weights.

    Raises:
        FormatError: a field other than those that are read changes the function, or may.
    """
    activations = {"relu", "topk"} if "k" in layout.settings else {"relu"}
    for key in ("activation_fn", "activation_fn_str"):
        given = cfg.get(key)
        if given not in _UNSET and str(given).lower() not in activations:
            raise FormatError(
                f"{path}: {key} is {given!r:.80} rather than 'relu'; {_NOT_OURS} Use it with a SAELens of the version "
                f"that wrote it: since {FIRST_VERSION}, it takes all but topk for ReLU, and does not say so."
            )
    norm = cfg.get("normalize_activations")
    norm = "expected_average_only_in" if norm is True else norm
    kept = (None, False, "none", *(PER_TOKEN if layout.norms else ()))
    if norm not in kept:
        why = _NORMALISATIONS.get(norm) if isinstance(norm, str) else None
        raise FormatError(f"{path}: normalize_activations is {norm!r:.80}: {why or 'endwise does not know it'}.")
    shape = cfg.get("reshape_activations")
    if shape not in (None, "none", HEADS_JOINED):
        raise FormatError(
            f"{path}: reshape_activations is {shape!r:.80}, which endwise does not know. Use it with SAELens."
        )
    settled = {"activation_fn", "activation_fn_str", "normalize_activations", "reshape_activations"}
    arguments = cfg.get("activation_fn_kwargs")
    if "k" in layout.settings and isinstance(arguments, dict) and arguments.keys() <= {"k"}:
        settled.add("activation_fn_kwargs")
    known = _READ | set(_NOT_THE_FUNCTION.split()) | settled | layout.settings | folded
    if unknown := {key: value for key, value in cfg.items() if key not in known and value not in _UNSET}:
        keys = ", ".join(f"{key}={value!r:.40}" for key, value in list(unknown.items())[:5])
        raise FormatError(
            f"{path}: {keys[:300]} may change what the SAE computes, and endwise does not know how. If it says nothing "
            "of the function, move it under metadata; if it does, use the SAE with SAELens."
        )


def _read_weights(folder: Path, cfg: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    tensors = safetensors_at(path)
    shapes = layout.shapes(cfg)
    scales = {name: (cfg["d_sae"],) for name in _SCALES if name in tensors}
    if others := sorted(set(tensors) - set(shapes) - set(scales)):
        raise FormatError(
            f"{path} also holds {', '.join(others)[:200]}, which change what the SAE computes, while a "
            f"{cfg['architecture']} SAE has {', '.join(shapes)} alone. Use it with SAELens, or give the "
            "SAE as SAELens saves it for inference."
        )
    check_tensors(path, tensors, {**shapes, **scales}, CFG_FILE)
    return _scaled(path, tensors, bool(cfg.get("finetuning_scaling_factor")))


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
