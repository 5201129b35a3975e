"""Three kernels in Triton for KL and cross-entropy from hidden states, with their gradients.

Logits live in registers, tile by tile, and are computed twice. The first sweep keeps for each row the maximum and the
total of its softmax, online (Milakov & Gimelshein, https://arxiv.org/abs/1805.02867), and the sum that the loss needs.
The second writes the loss's gradient by the products of hidden states and unembedding for a few thousand tokens of the
vocabulary, which a third kernel multiplies with the unembedding and adds to the gradient by the hidden states. So
`[n vocab]` never exists, in no precision; products, sums and the gradient are added up in fp32. Every sum has one
order, whatever the card's timing: two runs on one kind of card agree in their bits.
"""

import triton
import triton.language as tl


@triton.jit
def products(
    spliced, clean, weight, kept, inside, width, PAIR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of the rows, of one pass or of both, with a tile of the unembedding, which is read once.

    The pointers are those of the tile's first row and token: offsets within it take half of the registers.
    """
    q = tl.zeros((ROWS, TOKENS), tl.float32)
    p = tl.zeros((ROWS, TOKENS), tl.float32)
    columns = tl.arange(0, WIDTH)
    states = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    entries = tl.arange(0, TOKENS)[None, :] * width + columns[:, None]
    for start in range(0, width, WIDTH):
        here = columns < width - start
        w = tl.load(weight + start + entries, inside[None, :] & here[:, None], 0.0)
        mask = kept[:, None] & here[None, :]
        q = tl.dot(tl.load(spliced + start + states, mask, 0.0), w, q, input_precision=PRECISION)
        if PAIR:
            p = tl.dot(tl.load(clean + start + states, mask, 0.0), w, p, input_precision=PRECISION)
    return q, p


@triton.jit
def _logits(product, bias, tokens, inside, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits of a product, and their derivative by it."""
    if BIAS:
        product += tl.load(bias + tokens, inside, 0.0).to(tl.float32)[None, :]
    product *= scale
    slope = tl.zeros_like(product) + scale
    if CAP:
        size = tl.abs(product / cap)
        fallen = tl.exp(-2.0 * size)
        # The quotient loses the digits of small numbers; of the series the next term is 1.3e-9 of the sum at most.
        square = size * size
        near = size * (1 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
        tanh = tl.where(size < 0.125, near, (1 - fallen) / (1 + fallen))
        product = tl.where(product < 0, -tanh, tanh) * cap
        slope = scale * 4 * fallen / ((1 + fallen) * (1 + fallen))
    return product, slope


@triton.jit
def _softmax_step(logits, inside, top, total):
    """Go one tile further: weights by the new maximum, which, the new total, and what sums by the old one fall to."""
    logits = tl.where(inside[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    fallen = tl.exp(top - new)
    weights = tl.exp(logits - new[:, None])
    return weights, new, total * fallen + tl.sum(weights, 1), fallen


@triton.jit
def _own_rows(keep, n, ROWS: tl.constexpr):
    """First row of a program, all of them, which there are, and which count."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    here = rows < n
    return first_row, rows, here, tl.load(keep + rows, here, 0) != 0


@triton.jit(do_not_specialize=["n", "vocab", "share"])
def statistics(
    spliced, clean, targets, keep, weight, bias, out, n, vocab, width, share, scale, cap,
    PAIR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per row, over a share of the vocabulary: maximum and total of the spliced pass's softmax, of the clean one's, and
    Σ e^(z_P − max)·(z_P − z_Q), or with one pass the target's logit; `out` is `[5 shares n]`.
    """
    first_row, rows, here, kept = _own_rows(keep, n, ROWS)
    spliced += first_row * width
    clean += first_row * width
    q_top = tl.full((ROWS,), float("-inf"), tl.float32)
    p_top = tl.full((ROWS,), float("-inf"), tl.float32)
    q_total = tl.zeros((ROWS,), tl.float32)
    p_total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS,), tl.float32)
    begin = tl.program_id(1) * share
    weight += begin.to(tl.int64) * width
    for start in range(begin, min(begin + share, vocab), TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = tokens < vocab
        q, p = products(spliced, clean, weight, kept, inside, width, PAIR, PRECISION, ROWS, TOKENS, WIDTH)
        q, _ = _logits(q, bias, tokens, inside, scale, cap, BIAS, CAP)
        if PAIR:
            p, _ = _logits(p, bias, tokens, inside, scale, cap, BIAS, CAP)
            weights, p_top, p_total, fallen = _softmax_step(p, inside, p_top, p_total)
            found = found * fallen + tl.sum(weights * (p - q), 1)
        else:
            target = tl.load(targets + rows, here, -1)
            found += tl.sum(tl.where(tokens[None, :] == target[:, None], q, 0.0), 1)
        weights, q_top, q_total, fallen = _softmax_step(q, inside, q_top, q_total)
        weight += TOKENS * width
    shares = tl.num_programs(1).to(tl.int64)
    place = out + tl.program_id(1) * n.to(tl.int64) + rows
    tl.store(place, q_top, here)
    tl.store(place + shares * n, q_total, here)
    tl.store(place + 2 * shares * n, p_top, here)
    tl.store(place + 3 * shares * n, p_total, here)
    tl.store(place + 4 * shares * n, found, here)


@triton.jit(do_not_specialize=["n", "vocab", "first"])
def differences(
    spliced, clean, targets, keep, weight, bias, softmax, out, first, slab, n, vocab, width, scale, cap,
    PAIR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Q − P, or Q − 1 at the target, times the slope, for the `slab` tokens from `first`; `out` is `[n slab]`.

    Args:
        softmax: maximum and logarithm of the total, of the spliced pass and of the clean one: `[4 n]`.
    """
    first_row, rows, here, kept = _own_rows(keep, n, ROWS)
    spliced += first_row * width
    clean += first_row * width
    begin = tl.program_id(1) * TOKENS
    columns = begin + tl.arange(0, TOKENS)
    tokens = first + columns
    inside = (columns < slab) & (tokens < vocab)
    weight += (first + begin).to(tl.int64) * width
    q, p = products(spliced, clean, weight, kept, inside, width, PAIR, PRECISION, ROWS, TOKENS, WIDTH)
    long = n.to(tl.int64)
    # Both sides round alike: no product that the subtraction could be fused with, so that equal states have no gradient
    # at all. The clean side first: there are registers for three tiles.
    if PAIR:
        p, _ = _logits(p, bias, tokens, inside, scale, cap, BIAS, CAP)
        top, log = tl.load(softmax + 2 * long + rows, here, 0.0), tl.load(softmax + 3 * long + rows, here, 0.0)
        less = tl.exp(p - top[:, None] - log[:, None])
    else:
        target = tl.load(targets + rows, here, -1)
        less = tl.where(tokens[None, :] == target[:, None], 1.0, 0.0)
    q, slope = _logits(q, bias, tokens, inside, scale, cap, BIAS, CAP)
    top, log = tl.load(softmax + rows, here, 0.0), tl.load(softmax + long + rows, here, 0.0)
    difference = tl.exp(q - top[:, None] - log[:, None]) - less
    difference = tl.where(kept[:, None], difference * slope, 0.0)
    place = out + first_row * slab + begin + tl.arange(0, ROWS)[:, None] * slab + tl.arange(0, TOKENS)[None, :]
    tl.store(place, difference.to(out.dtype.element_ty), here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n", "vocab", "first"])
def add_product(
    d_logits, weight, gradient, first, slab, n, vocab, width, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add `d_logits [n slab] · weight[first : first + slab]` to the gradient `[n width]`, in fp32."""
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * WIDTH
    rows, slots, columns = tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    here, valid = first_row + rows < n, first_column + columns < width
    d_logits += first_row * slab
    weight += first.to(tl.int64) * width + first_column
    place = gradient + first_row * width + first_column + rows[:, None] * width + columns[None, :]
    entries, table = rows[:, None] * slab + slots[None, :], slots[:, None] * width + columns[None, :]
    total = tl.load(place, here[:, None] & valid[None, :], 0.0)
    count = min(slab, vocab - first)
    for start in range(0, count, TOKENS):
        inside = slots < count - start
        d = tl.load(d_logits + start + entries, here[:, None] & inside[None, :], 0.0)
        w = tl.load(weight + table, inside[:, None] & valid[None, :], 0.0)
        total = tl.dot(d, w, total, input_precision=PRECISION)
        weight += TOKENS * width
    tl.store(place, total, here[:, None] & valid[None, :])
