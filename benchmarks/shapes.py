"""The shapes that the figures are taken on: language models with random weights, a site, a dictionary, a batch."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOGIT_SPREAD = 2.8
"""Standard deviation of a random model's logits: predictions neither uniform nor certain."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "local": {"kind": "local", "local_mse": 1.0, "sparsity": {"coefficient": 4.0}},
    "e2e": {"kind": "e2e", "kl": 1.0, "sparsity": {"coefficient": 1.5}},
    "e2e_ds": {"kind": "e2e_ds", "kl": 0.5, "downstream_mse": 2.5, "sparsity": {"coefficient": 1.5}},
}
"""The paper's three, in the words of a recipe; a step's time does not depend on the coefficients."""
LEARNING_RATE = 1e-7
"""So small that L0 stays where it was during the steps that are timed."""
STEPS = 1_000_000
"""Steps of the pretended run: enough for the learning rate not to move."""


@dataclass(frozen=True)
class Shape:
    family: Literal["gpt2", "gpt_neo", "llama", "gemma2"]
    layers: int
    d_model: int
    heads: int
    vocab: int
    positions: int
    """Longest sequence that the model can read."""
    context: int
    """Tokens per sequence."""
    batch: int
    """Sequences per step."""
    layer: int
    """The SAE sits at `blocks.<layer>.hook_resid_pre`."""
    d_sae: int
    window: int | None = None
    """GPT-Neo: every second block attends to this many latest tokens only."""
    kv_heads: int | None = None
    """Heads of keys and of values; None: as many as of queries."""
    d_head: int | None = None
    """None: the width shared out among the heads."""
    d_mlp: int = 0
    """0: four times the width."""
    mlp_matrices: int = 2
    """3 where one of them gates another."""

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.layers or self.d_model % self.heads or self.context > self.positions:
            raise ValueError(f"no such model: {self}")
        object.__setattr__(self, "d_mlp", self.d_mlp or 4 * self.d_model)

    @property
    def site(self) -> str:
        return f"blocks.{self.layer}.hook_resid_pre"

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Widths of all heads' queries together, and of all heads' keys."""
        d_head = self.d_head or self.d_model // self.heads
        return self.heads * d_head, (self.kv_heads or self.heads) * d_head

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.batch * self.context

    def block_window(self, layer: int) -> int | None:
        """Tokens back that a block attends to; None: to the start."""
        return self.window if layer % 2 else None


GPT2 = Shape("gpt2", 12, 768, 12, 50257, 1024, 1024, batch=4, layer=6, d_sae=46080)
TINYSTORIES = Shape("gpt_neo", 8, 64, 16, 50257, 2048, 512, batch=4, layer=4, d_sae=3200, window=256)
SHAPES = {
    "gpt2-small-4": GPT2,
    "gpt2-small-1": Shape("gpt2", 12, 768, 12, 50257, 1024, 1024, batch=1, layer=6, d_sae=46080),
    "tinystories-1m-4": TINYSTORIES,
    "tinystories-1m-20": Shape("gpt_neo", 8, 64, 16, 50257, 2048, 512, batch=20, layer=4, d_sae=3200, window=256),
}

CARD_SHAPES = {
    "gpt2-small": replace(GPT2, batch=16),
    "smollm2-135m": Shape(
        *("llama", 30, 576, 9, 49152, 8192, 1024), batch=16, layer=15, d_sae=36864,
        kv_heads=3, d_mlp=1536, mlp_matrices=3,
    ),
    "tinystories-1m": SHAPES["tinystories-1m-20"],
    "gemma-2-2b": Shape(
        *("gemma2", 26, 2304, 8, 256000, 8192, 1024), batch=16, layer=13, d_sae=131072,
        kv_heads=4, d_head=256, d_mlp=9216, mlp_matrices=3,
    ),
}  # fmt: skip
"""Shapes that a GPU is tried with; Gemma's window of 4,096 tokens is longer than the context."""


def random_model(shape: Shape, seed: int = 0) -> "PreTrainedModel":
    """A Hugging Face model of the shape. As in a trained one, tokens differ much more than biases do, norms and biases
    are not trivial, and blocks change the residual stream without drowning it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                parameter += 0.1 * noise
            elif any(part in name for part in ("wte", "wpe", "embed")):
                parameter.copy_(noise * LOGIT_SPREAD / shape.d_model**0.5)
            else:
                # Conv1D holds its matrix as [in out], Linear as [out in]; the larger is close enough to the fan-in
                parameter.copy_(noise * 0.5 / max(parameter.shape) ** 0.5)
    return model


def model_config(shape: Shape) -> "PreTrainedConfig":
    from transformers import Gemma2Config, GPT2Config, GPTNeoConfig, LlamaConfig

    if shape.mlp_matrices == 3:
        return {"llama": LlamaConfig, "gemma2": Gemma2Config}[shape.family](
            vocab_size=shape.vocab,
            max_position_embeddings=shape.positions,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            head_dim=shape.d_head or shape.d_model // shape.heads,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    if shape.family == "gpt2":
        return GPT2Config(
            vocab_size=shape.vocab,
            n_positions=shape.positions,
            n_embd=shape.d_model,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    kinds = ["global", "local"] * shape.layers
    return GPTNeoConfig(
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        hidden_size=shape.d_model,
        num_layers=shape.layers,
        num_heads=shape.heads,
        window_size=shape.window or shape.positions,
        attention_types=[[[kind], 1] for kind in kinds[: shape.layers]],
        bos_token_id=0,
        eos_token_id=0,
    )
