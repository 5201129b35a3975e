"""The least arithmetic that a training step needs, and the rate at which the machine does such arithmetic.

Counted are matrix products alone, two operations per multiply-add: a bound that no implementation in this arithmetic
can pass, since norms, softmaxes, the optimiser and all memory traffic come on top. The encoder's forward counts as
dense; everything else of a sparse dictionary counts at its L0. A step that finds its active features more cheaply than
by a dense product in fp32 can pass the bound.
"""

from shapes import Shape

PRODUCTS_PER_ACTIVE_LATENT = 4
"""Each of d_model multiply-adds: decoder forward, gradient of the latent, of the decoder's and of the encoder's row."""


def attention_pairs(context: int, window: int | None) -> int:
    """(query, key) pairs of one sequence that a causal attention connects."""
    reach = min(context, window or context)
    return reach * (reach + 1) // 2 + (context - reach) * reach


def block_flops(shape: Shape, layer: int, pairs: int | None = None) -> tuple[int, int]:
    """Forward operations of a block on one sequence: its linear maps, and its attention's two products.

    Args:
        pairs: of (query, key) that attention computes; unset: those that it needs.
    """
    d = shape.d_model
    linear = 2 * shape.context * (4 * d * d + 2 * d * shape.d_mlp)
    if pairs is None:
        pairs = attention_pairs(shape.context, shape.block_window(layer))
    return linear, 2 * 2 * d * pairs


def forward_flops(shape: Shape, layers: range, pairs: int | None = None) -> int:
    """Of some blocks, on one sequence."""
    return sum(sum(block_flops(shape, layer, pairs)) for layer in layers)


def gradient_flops(shape: Shape, layers: range) -> int:
    """Of the activations' gradient through some blocks whose weights are frozen, on one sequence.

    One product for each linear map; four for attention's two, since both of their factors depend on activations.
    """
    return sum(linear + 2 * attention for linear, attention in (block_flops(shape, layer) for layer in layers))


def minimal_flops(shape: Shape, objective: str, l0: float) -> dict[str, float]:
    """Of one step, part by part."""
    before, after = range(shape.layer), range(shape.layer, shape.layers)
    d, tokens = shape.d_model, shape.tokens
    parts = {
        "clean": shape.batch * forward_flops(shape, before),
        "encoder": 2 * tokens * d * shape.d_sae,
        "sparse": PRODUCTS_PER_ACTIVE_LATENT * 2 * tokens * d * l0,
    }
    if objective != "local":
        parts["clean"] += shape.batch * forward_flops(shape, after)
        parts["tail_forward"] = shape.batch * forward_flops(shape, after)
        parts["tail_gradient"] = shape.batch * gradient_flops(shape, after)
        parts["unembedding"] = 3 * 2 * tokens * d * shape.vocab
    return {part: float(flops) for part, flops in parts.items()}
