"""The least arithmetic that a training step needs, and the rate at which the machine does such arithmetic.

Counted are matrix products alone (`endwise.training.planning.flops`): a bound that no implementation in this
arithmetic can pass, since norms, softmaxes, the optimiser and all memory traffic come on top. The encoder's forward
counts as dense; everything else of a sparse dictionary counts at its L0. A step that finds its active features more
cheaply than by a dense product in fp32 can pass the bound.
"""

from endwise.training.planning.flops import Stretch, forward_flops, gradient_flops, product_flops, sparse_flops
from shapes import Shape


def stretches(shape: Shape, layers: range) -> list[Stretch]:
    """Attention and MLP of some blocks."""
    d, (queries, keys) = shape.d_model, shape.attention_widths
    attention, mlp = 2 * d * (queries + keys), shape.mlp_matrices * d * shape.d_mlp
    blocks = ((Stretch(attention, queries, shape.block_window(layer)), Stretch(mlp)) for layer in layers)
    return [stretch for block in blocks for stretch in block]


def minimal_flops(shape: Shape, objective: str, l0: float) -> dict[str, float]:
    """Count the operations of one step, part by part."""
    before, after = stretches(shape, range(shape.layer)), stretches(shape, range(shape.layer, shape.layers))
    d, tokens = shape.d_model, shape.tokens
    parts: dict[str, float] = {
        "clean": shape.batch * forward_flops(before, shape.context),
        "encoder": product_flops(tokens, d, shape.d_sae),
        "sparse": sparse_flops(tokens, d, l0),
    }
    if objective != "local":
        parts["clean"] += shape.batch * forward_flops(after, shape.context)
        parts["tail_forward"] = shape.batch * forward_flops(after, shape.context)
        parts["tail_gradient"] = shape.batch * gradient_flops(after, shape.context)
        parts["unembedding"] = 3 * product_flops(tokens, d, shape.vocab)
    return {part: float(flops) for part, flops in parts.items()}
