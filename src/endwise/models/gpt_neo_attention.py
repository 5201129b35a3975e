"""Fused attention for GPT-Neo, for which transformers has an eager one only.

The eager one builds the scores of every pair of positions, `[batch heads pos pos]` in fp32, several times over. Here
`torch.nn.functional.scaled_dot_product_attention` takes its place, with what is particular to GPT-Neo: scores are not
divided by √d_head, and every other layer is *local*: a position sees itself and the `window_size - 1` before it.

Precision: the eager one computes scores and softmax in fp32 whatever the model's dtype. PyTorch's fused kernels do so
too for bf16 and fp16, and so does the one it takes where none of them fits. A float64 model is computed in float64.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedModel

try:
    from transformers.models.gpt_neo import modeling_gpt_neo

    _Eager: Any = modeling_gpt_neo.GPTNeoSelfAttention
except (ImportError, AttributeError):  # a later transformers may arrange GPT-Neo otherwise: no module is replaced then
    _Eager = nn.Module


class FusedSelfAttention(_Eager):
    """GPT-Neo's attention with `scaled_dot_product_attention`.

    It takes the masks that transformers makes for `sdpa`: none where every position sees all before it, else
    `bool[batch 1 query key]`. A query that no key is left for (padding) yields zeros. Attention weights, dropout on
    them and masks of another form are left to the eager implementation.
    """

    cpu_rows = 128
    """Queries in one call on a CPU. Its kernel computes keys in blocks of 512, so that short sequences do not gain from
    `is_causal`, nor any from a window; with few queries at a time the keys that none of them sees can be left out."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Same as the eager one: `[batch pos d_model]` to the same, and the attention weights or None."""
        # A static cache returns its whole length, filled or not. Without a mask nothing was in it before this call.
        static = bool(getattr(layer_past, "is_compileable", False))
        understood = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.dim() == 4)
        drops = self.training and self.attn_dropout.p > 0
        if output_attentions or drops or not understood or (static and attention_mask is not None):
            if static and attention_mask is None:  # which the eager one takes for a cache that is full
                keys = layer_past.layers[self.layer_id].max_cache_len
                attention_mask = self.bias[:, :, : hidden_states.shape[1], :keys]
            mask = _additive(attention_mask, hidden_states.dtype)
            return super().forward(hidden_states, mask, layer_past, use_cache, output_attentions, **kwargs)
        query, key, value = (
            self._split_heads(project(hidden_states), self.num_heads, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            cached = layer_past.update(key, value, self.layer_id)
            key, value = (key, value) if static else cached
        attended = self._attend(query, key, value, attention_mask)
        merged = self._merge_heads(attended, self.num_heads, self.head_dim)
        return self.resid_dropout(self.out_proj(merged)), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch heads pos d_head]` of each to that of the queries, which are the last of the keys' positions."""
        rows, columns = query.shape[-2], key.shape[-2]
        past = columns - rows
        window = self.config.window_size if self.attention_type == "local" else columns
        step = min(rows, self.cpu_rows) if query.device.type == "cpu" else rows
        if mask is None and step == columns <= window:  # all in one call, and nothing in a cache
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        # The module's own mask, causal or banded, for every position that the model has: nothing to build or to keep.
        allowed = self.bias[:, :, past:columns, :columns]
        if mask is not None:
            allowed = allowed & mask
        parts: list[Tensor] = []
        for start in range(0, rows, step):
            end = min(start + step, rows)
            keys = slice(max(0, past + start + 1 - window), past + end)  # what at least one of these queries sees
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, start:end],
                    key[:, :, keys],
                    value[:, :, keys],
                    attn_mask=allowed[:, :, start:end, keys],
                    scale=1.0,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def use_sdpa(model: PreTrainedModel) -> bool:
    """Give a GPT-Neo model fused attention, in place: this instance's, no other's.

    The model gets a configuration of its own, which then names `sdpa`, so that transformers makes the masks for it.

    Returns:
        Whether its attention is the fused one now. False, and nothing is changed: it is not a GPT-Neo with eager
        attention, or the installed transformers computes it in another way than what would replace it.
    """
    attention = [module for module in model.modules() if isinstance(module, _Eager)]
    if attention and all(type(module) is FusedSelfAttention for module in attention):
        return True
    if not _is_plain_eager(model, attention) or not _agrees():
        return False
    _install(model, attention)
    return True


def _is_plain_eager(model: PreTrainedModel, attention: list[Any]) -> bool:
    """Every layer has transformers' own eager module, and nobody else has put a `forward` on it, as accelerate does."""
    config: Any = model.config
    return (
        isinstance(config, GPTNeoConfig)
        and getattr(config, "_attn_implementation", None) == "eager"
        and len(attention) == config.num_layers
        and all(type(module) is _Eager and "forward" not in vars(module) for module in attention)
    )


def _install(model: PreTrainedModel, attention: list[Any]) -> None:
    shared: Any = model.config
    own = copy.deepcopy(shared)
    own._attn_implementation = "sdpa"  # noqa: SLF001 - there is no public setter that takes it for GPT-Neo
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    for module in attention:
        module.__class__ = FusedSelfAttention


@functools.cache
def _agrees() -> bool:
    """Return whether a tiny model, with a window and with padding, gives the logits of transformers' own attention.

    It stands guard over what this file takes for granted of transformers, once per process.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "num_layers": 2, "num_heads": 2}
            sizes |= {"window_size": 3, "attention_types": [[["global", "local"], 1]], "bos_token_id": 0}
            length = FusedSelfAttention.cpu_rows + 8  # in more than one call
            sizes |= {"max_position_embeddings": length, "eos_token_id": 0}
            eager = GPTNeoForCausalLM(GPTNeoConfig(**sizes)).float().eval()
            for parameter in eager.parameters():
                parameter.normal_(generator=generator)
            fused = copy.deepcopy(eager)
            _install(fused, [module for module in fused.modules() if type(module) is _Eager])
            tokens = torch.arange(2 * length).view(2, -1) % 13
            padding = torch.ones_like(tokens)
            padding[1, :2] = 0
            for given in (None, padding):
                expected, logits = (
                    model(tokens, attention_mask=given, use_cache=False).logits[padding.bool()]
                    for model in (eager, fused)
                )
                if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
                    return False
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as the eager implementation takes it: 0 to see, the lowest number not to."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
