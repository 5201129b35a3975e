"""Tries tiny random models of many families and writes the table of docs/sites.md: which sites each offers.

python tools/models_tried.py            writes the table
python tools/models_tried.py FAMILY...  prints these rows
"""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from endwise import LanguageModel
from endwise.common.errors import ModelError
from endwise.models.loading import reader_of
from endwise.models.sites import Part

PAGE = Path(__file__).parents[1] / "docs" / "sites.md"
BEGIN, END = "<!-- written by tools/models_tried.py -->", "<!-- end of the table -->"
WIDTH, VOCAB, CONTEXT, SEPARATOR = 32, 48, 32, 5
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "attention_hidden_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_d_head", "num_heads"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "chunk_size", "mamba_chunk_size", "head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "mamba_dt_rank", "time_step_rank", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_ngroups", "n_shared_experts"), 1),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    "vocab_size": VOCAB,
    "pad_token_id": None,
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    "word_embed_proj_dim": WIDTH,
}
"""Values of whichever of these keys a configuration has."""
IMAGES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES |= {"image_size": 28, "patch_size": 14, "vocab_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
IMAGES |= {"out_hidden_size": WIDTH}
NO_KERNELS = {"use_mamba_kernels": False}


def plain(*kinds: str) -> "dict[str, Overrides]":
    return {kind: {} for kind in kinds}


Overrides = dict[str, Any]
DENSE, EXPERTS, STATES, IMAGE = "dense", "mixture of experts", "state space or hybrid", "with images: its text part"
FAMILIES: dict[str, dict[str, Overrides]] = {
    DENSE: {
        **plain("gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "opt", "bloom", "mpt", "phi", "phi3"),
        **plain("llama", "mistral", "ministral", "starcoder2", "stablelm", "granite", "smollm3"),
        **plain("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"),
        **plain("cohere", "cohere2", "glm", "glm4", "exaone4", "nemotron", "seed_oss", "apertus"),
        "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        "gptj": {"rotary_dim": 4},
        "falcon": {},
    },
    EXPERTS: {
        **plain("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"),
        **plain("ernie4_5_moe", "glm4_moe", "llama4_text"),
        "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    },
    STATES: {
        **plain("mamba", "mamba2", "falcon_mamba", "falcon_h1", "rwkv", "lfm2", "qwen3_next"),
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, **NO_KERNELS},
        "bamba": {"attn_layer_indices": [1, 3]},
        "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, **NO_KERNELS}
        | {"attention_hidden_size": 64, "attention_head_dim": 16},
        "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2}
        | {"hybrid_layer_ids": [2, 5], "num_mem_blocks": 1, "adapter_rank": 4, **NO_KERNELS}
        | {"attention_hidden_size": 64, "attention_head_dim": 16},
        "recurrent_gemma": {"num_hidden_layers": 6},
        "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    },
    IMAGE: plain("gemma3", "llama4", "mistral3", "qwen3_vl", "llava"),
}


def small(kind: str, overrides: Overrides) -> hf.PretrainedConfig:
    """A family's configuration, as small as a test needs it."""
    whole: Any = CONFIG_MAPPING[kind]
    default = whole()
    text = getattr(default, "text_config", None)
    if text is None:
        return whole(**{**_there(SMALL, default), **overrides})
    images = _there(IMAGES, getattr(default, "vision_config", None))
    return whole(text_config=_there(SMALL, text) | overrides, **({"vision_config": images} if images else {}))


def _there(values: Overrides, config: Any) -> Overrides:
    fixed = {key for key in values if isinstance(getattr(type(config), key, None), property)}
    return {key: value for key, value in values.items() if hasattr(config, key) and key not in fixed}


def made(kind: str, overrides: Overrides) -> Any:
    """A random model of a family, by the class that reads its checkpoints."""
    torch.manual_seed(0)
    config = small(kind, overrides)
    return reader_of(config).from_config(config).eval()


def row(kind: str, overrides: Overrides) -> str:
    """A line of the table: the class, the sites that it offers, and what is particular."""
    hugging = made(kind, overrides)
    name = f"| `{kind}` | {type(hugging).__name__} |"
    try:
        model = LanguageModel(hugging, name=kind)
    except ModelError as error:
        return f"{name} none | {' '.join(str(error).split())} |"
    layers = {part: [site.layer for site in model.sites() if site.part is part] for part in Part}
    return f"{name} {_sites(layers, model.n_layers)} | {_particular(model)} |"


def _sites(layers: dict[Part, list[int]], count: int) -> str:
    """Say in how many of the layers there is each site."""
    missing = [part for part, found in layers.items() if not found]
    if all(len(found) in (0, count) for found in layers.values()) and len(missing) < 2:
        return "all" + "".join(f" but `{part.value}`" for part in missing)
    counts = sorted({len(found) for found in layers.values() if found}, reverse=True)
    named = {n: ", ".join(f"`{part.value}`" for part, found in layers.items() if len(found) == n) for n in counts}
    return "; ".join(names if n == count else f"{names} in {n} of {count} layers" for n, names in named.items())


def _particular(model: LanguageModel) -> str:
    kinds = sorted({type(block.module).__name__ for block in model._blocks})  # noqa: SLF001
    remarks = [f"blocks of {len(kinds)} kinds"] if len(kinds) > 1 else []
    remarks += [f"{len(model.unspliceable)} sites are not offered"] if model.unspliceable else []
    try:
        model.attend_within(SEPARATOR)
    except ModelError:
        remarks.append("documents of one sequence cannot be kept apart")
    return "; ".join(remarks)


def table() -> str:
    lines = [f"transformers {hf.__version__}, torch {torch.__version__.partition('+')[0]}:"]
    for what, families in FAMILIES.items():
        lines += ["", f"| {what} | class | sites | |", "|---|---|---|---|"]
        lines += [row(kind, families[kind]) for kind in sorted(families)]
    return "\n".join(lines)


def main(kinds: list[str]) -> None:
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    known = {kind: overrides for families in FAMILIES.values() for kind, overrides in families.items()}
    if kinds:
        print("\n".join(row(kind, known[kind]) for kind in kinds))
        return
    page = PAGE.read_text(encoding="utf-8")
    found = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    PAGE.write_text(found.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
