"""Tiny random instances of every family of language models that endwise says it supports, and where their parts are.

The paths are written out by hand, so that a test can hook the model without asking endwise how.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from endwise import LanguageModel, ReluSAE, Site
from endwise.models.sites import Part

LAYERS, WIDTH, HEADS, VOCAB, CONTEXT = 4, 16, 4, 48, 16
WINDOW = 5
"""Window of sliding attention, shorter than the context so that it matters."""
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = LLAMA_LIKE | {"num_key_value_heads": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
GPT_2_LIKE: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": WIDTH, "n_head": HEADS}
GPT_2_LIKE |= {"n_layer": LAYERS, "bos_token_id": 0, "eos_token_id": 0}
GPT_NEO = LLAMA_LIKE | {"num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW}
GPT_NEO |= {"attention_types": [[["global", "local"], LAYERS // 2]]}


@dataclass(frozen=True)
class Family:
    config: Callable[[], hf.PretrainedConfig]
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    """The child of a block whose output is added to the residual stream."""
    mlp: str = "mlp"
    projection: str = "self_attn.o_proj"
    """Name of the projection from attention's heads to its output."""
    middle: str | None = "post_attention_layernorm"
    """The child of a block that reads the residual stream between attention and MLP; None: a parallel block."""


POST_NORM = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
GEMMA = {"middle": "pre_feedforward_layernorm", **POST_NORM}
IN_TRANSFORMER = {"blocks": "transformer.h", "final_norm": "transformer.ln_f", "attention": "attn", "middle": "ln_2"}
NEOX = {"blocks": "gpt_neox.layers", "final_norm": "gpt_neox.final_layer_norm", "attention": "attention"}
NEOX |= {"projection": "attention.dense"}
SOFT_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}

FAMILIES = {
    "gpt2": Family(lambda: hf.GPT2Config(**GPT_2_LIKE), **IN_TRANSFORMER, projection="attn.c_proj"),
    "gpt_neo": Family(lambda: hf.GPTNeoConfig(**GPT_NEO), **IN_TRANSFORMER, projection="attn.attention.out_proj"),
    "pythia": Family(lambda: hf.GPTNeoXConfig(**LLAMA_LIKE, use_parallel_residual=True), **NEOX, middle=None),
    "neox_sequential": Family(lambda: hf.GPTNeoXConfig(**LLAMA_LIKE, use_parallel_residual=False), **NEOX),
    "llama": Family(lambda: hf.LlamaConfig(**LLAMA_LIKE)),
    "llama_grouped_tied": Family(lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral": Family(lambda: hf.MistralConfig(**GROUPED, sliding_window=None)),
    "mistral_sliding": Family(lambda: hf.MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "qwen2": Family(lambda: hf.Qwen2Config(**GROUPED)),
    "qwen3": Family(lambda: hf.Qwen3Config(**GROUPED, head_dim=6)),
    "gemma2": Family(lambda: hf.Gemma2Config(**GROUPED, **SOFT_CAPS, head_dim=6, sliding_window=WINDOW), **GEMMA),
    "gemma3": Family(
        lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=6, sliding_window=WINDOW, layer_types=ALTERNATING), **GEMMA
    ),
    "olmo2": Family(lambda: hf.Olmo2Config(**GROUPED), **POST_NORM, middle="mlp"),
    "phi3": Family(lambda: hf.Phi3Config(**GROUPED)),
    # Not named in the documentation; found by structure, with their own turns: outputs taken as `outputs[0]` and an
    # unembedding with a bias, logits that are scaled, several experts.
    "gptj": Family(
        lambda: hf.GPTJConfig(**GPT_2_LIKE, rotary_dim=2),
        **IN_TRANSFORMER | {"middle": None},
        projection="attn.out_proj",
    ),
    "cohere": Family(lambda: hf.CohereConfig(**GROUPED, logit_scale=0.3), middle=None),
    "mixtral": Family(lambda: hf.MixtralConfig(**GROUPED, num_local_experts=3)),
}


def parts(family: str) -> list[Part]:
    """Those that a family's blocks have, in the order of computation."""
    return [part for part in Part if part is not Part.RESID_MID or FAMILIES[family].middle]


def width(family: str, part: Part) -> int:
    head_dim = getattr(FAMILIES[family].config(), "head_dim", None) or WIDTH // HEADS
    return HEADS * head_dim if part is Part.ATTN_Z else WIDTH


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Every parameter random, biases and norms too: a part that is left out or doubled then shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)


def build(family: str | hf.PretrainedConfig, seed: int = 0) -> hf.PreTrainedModel:
    """A new instance, for tests that change it."""
    config = FAMILIES[family].config() if isinstance(family, str) else family
    model = hf.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    return model


@cache
def tiny(family: str) -> LanguageModel:
    return LanguageModel(build(family), name=family)


def tokens(batch: int = 3, length: int = CONTEXT, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


FUSED = 20
"""Units in the last place by which the exponentials of torch's fused attention may be off (`exp_u20` in its source), on
some processors; those of a softmax by itself are off by one."""


def assert_as_exact(ours: Tensor, theirs: Tensor, truth: Tensor, times: float = 3) -> None:
    """`ours` and `theirs` compute `truth`, which is in float64, each rounding in an order of its own. How far that
    takes them depends on the processor, but it takes both alike: over many numbers, their errors have one size.

    Args:
        times: how much further ours may be from it; `FUSED` where only ours attends with the fused kernel.
    """
    error, other = relative(ours, truth), relative(theirs, truth)
    assert error <= times * other, (error, other)


def block(family: str, model: nn.Module, layer: int) -> nn.Module:
    return model.get_submodule(f"{FAMILIES[family].blocks}.{layer}")


def hook(family: str, model: nn.Module, site: Site, act: Callable[[Tensor], Tensor | None]) -> Any:
    """Calls `act` with the value at the site in every pass; what it returns replaces the value."""

    def first(values: Any) -> Tensor:
        return values[0] if isinstance(values, tuple) else values

    def replaced(values: Any) -> Any:
        new = act(first(values))
        return None if new is None else (new, *values[1:]) if isinstance(values, tuple) else new

    where = block(family, model, site.layer)
    if site.part is Part.RESID_MID:
        return hook_middle(family, where, act)
    read = {Part.RESID_PRE: "", Part.ATTN_Z: FAMILIES[family].projection, Part.MLP_IN: "mlp"}.get(site.part)
    if read is not None:
        return where.get_submodule(read).register_forward_pre_hook(lambda _module, args: replaced(args))
    child = {Part.ATTN_OUT: FAMILIES[family].attention, Part.MLP_OUT: FAMILIES[family].mlp}.get(site.part)
    module = where if child is None else where.get_submodule(child)
    return module.register_forward_hook(lambda _module, _args, output: replaced(output))


def hook_middle(family: str, where: nn.Module, act: Callable[[Tensor], Tensor | None]) -> Any:
    """As `hook`, between attention and MLP: what reads the stream there is given another, and the block's result made
    again from it.
    """
    of, kept = FAMILIES[family], {}
    assert of.middle is not None

    def reading(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        kept["stream"] = act(args[0])
        return None if kept["stream"] is None else (kept["stream"],)

    def ending(_module: nn.Module, _args: Any, output: Any) -> Any:
        if kept["stream"] is None:
            return None
        result = kept["stream"] + kept["mlp"]
        return (result, *output[1:]) if isinstance(output, tuple) else result

    handles = [
        where.get_submodule(of.middle).register_forward_pre_hook(reading),
        where.get_submodule(of.mlp).register_forward_hook(
            lambda _module, _args, output: kept.update(mlp=output[0] if isinstance(output, tuple) else output)
        ),
        where.register_forward_hook(ending),
    ]
    return SimpleNamespace(remove=lambda: [handle.remove() for handle in handles])


@contextmanager
def hooked(family: str, model: nn.Module, acts: dict[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for site, act in acts.items():
            stack.callback(hook(family, model, site, act).remove)
        yield


def values_at(family: str, model: hf.PreTrainedModel, ids: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
    """The value at each site in a full pass, kept by hooks of our own."""
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda value: kept.__setitem__(site, value.clone())

    with torch.no_grad(), hooked(family, model, {site: keep(site) for site in sites}):
        model(input_ids=ids, use_cache=False)
    return kept


def patched_logits(
    family: str, model: hf.PreTrainedModel, ids: Tensor, acts: dict[Site, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Logits of a full pass in which hooks of our own replace the values; gradients flow."""
    with hooked(family, model, acts):
        return model(input_ids=ids, use_cache=False).logits


def sae(seed=0, width=WIDTH):
    """A dictionary far from the identity, whose reconstruction depends on its input."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = ReluSAE(width, 3 * width, seed=seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return dictionary.requires_grad_(False)


def count_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [[len(getattr(module, kind)) for kind in kinds] for module in model.modules()]


def make_tokenizer():
    """Word `w7` has id 7."""
    vocabulary = {f"w{i}": i for i in range(VOCAB - 1)} | {"<eos>": VOCAB - 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<eos>")
