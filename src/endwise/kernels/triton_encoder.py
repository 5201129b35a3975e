"""Three kernels in Triton that find an encoder's few large pre-activations, by bounds in bf16 that are never written.

The bounds are those of `screen`, computed tile by tile in registers. Of a tile one bit is kept for each number, set
where the number may be active; or the greatest of each block of neighbours. The third kernel makes of the bits the
places that they stand for. All is in the order of rows, then of features, whatever the card's timing.
"""

import triton
import triton.language as tl

from endwise.kernels.triton_vocabulary import products

_ONE, _EXACT = tl.constexpr(False), tl.constexpr("ieee")


@triton.jit
def bounds_of(
    x, weight, first_row, begin, n, d_sae, width, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`x·weightᵀ` of a tile, with its rows, and which of them and of its features there are."""
    first_row, begin = first_row.to(tl.int64), begin.to(tl.int64)
    rows = first_row + tl.arange(0, ROWS)
    here, inside = rows < n, begin + tl.arange(0, FEATURES) < d_sae
    x += first_row * width
    weight += begin * width
    bounds, _ = products(x, x, weight, here, inside, width, _ONE, _EXACT, ROWS, FEATURES, WIDTH)
    return bounds, rows, here, inside


@triton.jit
def _ones(word):
    """Count the set bits of each 32-bit word."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["n", "d_sae", "words"])
def candidate_bits(
    x, weight, above, bits, counts, n, d_sae, width, words,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Set a bit for each number that is above its row's `above`, or NaN.

    Args:
        bits: 32 features in a word, the first in the lowest bit, `[n words]`.
        counts: of a row's bits in each tile, `[n tiles]`.
    """
    bounds, rows, here, inside = bounds_of(
        x, weight, tl.program_id(0) * ROWS, tl.program_id(1) * FEATURES, n, d_sae, width, ROWS, FEATURES, WIDTH
    )
    least = tl.load(above + rows, here, 0.0)
    found = ((bounds <= least[:, None]) == 0) & inside[None, :]
    tl.store(counts + rows * tl.num_programs(1) + tl.program_id(1), tl.sum(found.to(tl.int32), 1), here)
    digits = tl.reshape(found.to(tl.uint32), (ROWS, FEATURES // 32, 32))
    digits <<= tl.arange(0, 32).to(tl.uint32)[None, None, :]
    own = tl.program_id(1) * (FEATURES // 32) + tl.arange(0, FEATURES // 32)
    place = bits + rows[:, None] * words + own[None, :]
    tl.store(place, tl.sum(digits, 2).to(tl.int32, bitcast=True), here[:, None] & (own < words)[None, :])


@triton.jit(do_not_specialize=["n", "d_sae", "blocks"])
def block_maxima(
    x, weight, out, n, d_sae, width, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Greatest number of each block of neighbouring features, NaN as infinity; `out` is `[n blocks]`."""
    bounds, rows, here, inside = bounds_of(
        x, weight, tl.program_id(0) * ROWS, tl.program_id(1) * FEATURES, n, d_sae, width, ROWS, FEATURES, WIDTH
    )
    bounds = tl.where(bounds == bounds, bounds, float("inf"))
    bounds = tl.where(inside[None, :], bounds, float("-inf"))
    own = tl.program_id(1) * (FEATURES // BLOCK) + tl.arange(0, FEATURES // BLOCK)
    place = out + rows[:, None] * blocks + own[None, :]
    greatest = tl.max(tl.reshape(bounds, (ROWS, FEATURES // BLOCK, BLOCK)), 2)
    tl.store(place, greatest, here[:, None] & (own < blocks)[None, :])


@triton.jit(do_not_specialize=["n", "words", "room"])
def places_of_bits(bits, begins, features, n, words, room, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Write the feature of each bit that is set, a row's from where it begins, as far as there is room."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < n
    begin = tl.load(begins + rows, here, 0)
    for start in range(0, words, WORDS):
        own = start + tl.arange(0, WORDS)
        place = bits + rows[:, None] * words + own[None, :]
        left = tl.load(place, here[:, None] & (own < words)[None, :], 0).to(tl.uint32, bitcast=True)
        count = _ones(left)
        spots = begin[:, None] + tl.cumsum(count, 1) - count
        while tl.max(tl.max(left, 1), 0) > 0:  # type: ignore[pyrefly:unsupported-operation]
            lower = (left ^ (left - 1)) >> 1  # the bits below the lowest that is set
            feature = (own[None, :] * 32 + _ones(lower)).to(features.dtype.element_ty)
            tl.store(features + spots, feature, (left > 0) & (spots < room))
            left &= left - 1
            spots += 1
        begin += tl.sum(count, 1)
