"""Operations of a training step, counted from shapes: two for each multiply-add of a matrix product.

A language model is a row of *stretches*, two to a block (attention, then the rest), so that a site cuts the row in two.
Norms, softmaxes and all else that is no product are left out. Nothing here knows of a machine.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from endwise.kernels.rooms import WORTH, Rooms

PRODUCTS_PER_ACTIVE_LATENT = 4
"""Each of d_model multiply-adds: decoder forward, gradient of the latent, of the decoder's and of the encoder's row."""
DENSE_GRADIENT_PRODUCTS = 3
"""Products of a dense dictionary, each `d_model × d_sae` multiply-adds a token: the gradients of the latents and of the
two matrices. The input needs none."""
OPTIMISER_OPERATIONS = 17
"""Operations for each parameter and step: 14 of Adam's update, one to clip and two for the gradient's norm."""


@dataclass(frozen=True)
class Stretch:
    """Part of a block."""

    weights: int
    """Elements of the matrices that each token is multiplied with."""
    width: int = 0
    """Width of all attention heads' queries together; 0: no attention."""
    window: int | None = None
    """Tokens back that attention reaches; None: to the start."""

    def products(self, context: int, pairs: int | None = None) -> tuple[int, int]:
        """Forward operations on one sequence: its linear maps, and its attention's two products.

        Args:
            pairs: of (query, key) that attention computes; unset: those that it needs.
        """
        pairs = attention_pairs(context, self.window) if pairs is None else pairs
        return 2 * context * self.weights, 2 * 2 * self.width * pairs


def attention_pairs(context: int, window: int | None) -> int:
    """(query, key) pairs of one sequence that a causal attention connects."""
    reach = min(context, window or context)
    return reach * (reach + 1) // 2 + (context - reach) * reach


def forward_flops(stretches: Iterable[Stretch], context: int, pairs: int | None = None) -> int:
    """Count those of one sequence."""
    return sum(sum(stretch.products(context, pairs)) for stretch in stretches)


def gradient_flops(stretches: Iterable[Stretch], context: int, pairs: int | None = None) -> int:
    """Count those of the activations' gradient through stretches whose weights are frozen, on one sequence.

    One product for each linear map; four for attention's two, since both of their factors depend on activations.
    """
    each = (stretch.products(context, pairs) for stretch in stretches)
    return sum(linear + 2 * attention for linear, attention in each)


def product_flops(tokens: int, inner: int, columns: int) -> int:
    """`[tokens inner]` by `[inner columns]`."""
    return 2 * tokens * inner * columns


def sparse_flops(tokens: int, d_model: int, l0: float) -> float:
    """Count what a sparse dictionary costs besides its encoder's product, forward and backward."""
    return PRODUCTS_PER_ACTIVE_LATENT * 2 * tokens * d_model * l0


def search_flops(tokens: int, d_model: int, d_sae: int, l0: float) -> float:
    """Count what a search in slots costs at most besides one product of bounds: a second, as for the k largest, and
    candidates, slots that are left over included.
    """
    return product_flops(tokens, d_model, d_sae) + 2 * tokens * d_model * Rooms.head * WORTH * l0
