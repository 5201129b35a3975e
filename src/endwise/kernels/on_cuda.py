"""Kernels for NVIDIA cards: Triton where there is something to gain by it, PyTorch's own operations for the rest."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from endwise.kernels.encoder_on_cuda import Bounds, Search
from endwise.kernels.interface import CrossEntropy, Divergence, Found, HeldPairs, Pairs, PerPair, Room, Unembedding
from endwise.kernels.keeping import largest_of_rows
from endwise.kernels.triton_sparse import SparseInTriton
from endwise.kernels.triton_vocabulary import add_product, differences, statistics

LEAST_CAPABILITY = 8, 0
"""Compute capability (Ampere): older cards have no bf16, and no copies that run beside the arithmetic."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
HALF = {"ROWS": 64, "TOKENS": 128, "WIDTH": 32, **OPTIONS}
FULL = {"ROWS": 64, "TOKENS": 64, "WIDTH": 16, **OPTIONS}
"""Tiles of rows, tokens and width, the largest that no card spills (`tools/kernel_resources.py`): logits are held in
registers, for both passes."""
HALF_SUM = {"ROWS": 128, "TOKENS": 64, "WIDTH": 128, **OPTIONS}
FULL_SUM = {"ROWS": 64, "TOKENS": 32, "WIDTH": 64, **OPTIONS}
Launch = Callable[..., None]
"""Takes a kernel, its grid, its arguments in order, and its constants and options by name."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the card that its first argument is on."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def supports(device: torch.device) -> bool:
    """Return whether `TritonKernels` are for a device."""
    there = torch.version.cuda is not None and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


class TritonKernels(SparseInTriton):
    """Kernels in Triton; those of `EagerKernels` for what has none, and for float64.

    Args:
        launch: what starts a kernel, in place of the function of that name.
    """

    programs = 1024
    """Programs that keep a card busy: where rows are few, the vocabulary is shared out among so many."""
    slab, slab_elements = 4096, 1 << 26
    """Tokens of the vocabulary whose gradients are held at once, and at most so many numbers (128 MiB in bf16)."""

    bounds = Bounds
    worth = 4
    """Candidates that are worth their cost, as a multiple of the pairs that are."""

    def __init__(self, launch: Launch = launch) -> None:
        self.launch = launch

    holds = True

    def active(self, x: Tensor, weight: Tensor, bias: Tensor, limit: int, above: Tensor | None = None) -> Found | None:
        if x.dtype != torch.float32:
            return super().active(x, weight, bias, limit, above)
        return self._above(x, weight, bias, above).waiting(limit, self.worth)

    def largest(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, limit: int) -> Found | None:
        if x.dtype != torch.float32:
            return super().largest(x, weight, bias, k, limit)
        return self._largest(x, weight, bias, k).waiting(limit, self.worth)

    def active_held(
        self, x: Tensor, weight: Tensor, bias: Tensor, room: Room, above: Tensor | None = None
    ) -> HeldPairs | None:
        return self._above(x, weight, bias, above).held(room) if x.dtype == torch.float32 and len(x) else None

    def largest_held(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, room: Room) -> HeldPairs | None:
        return self._largest(x, weight, bias, k).held(room) if x.dtype == torch.float32 and len(x) else None

    def _above(self, x: Tensor, weight: Tensor, bias: Tensor, above: Tensor | None) -> Search:
        bounds = self.bounds(self.launch, x, weight, bias, above)

        def kept(pairs: Pairs, values: PerPair) -> Tensor:
            least = 0.0 if above is None else above if above.ndim == 0 else above[pairs.features]
            return (values <= least).logical_not_()

        return Search(self, bounds, bounds.reaching(), weight, bias, kept)

    def _largest(self, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Search:
        bounds = self.bounds(self.launch, x, weight, bias)
        candidates = bounds.reaching(bounds.reached_by(k))
        return Search(self, bounds, candidates, weight, bias, lambda pairs, values: largest_of_rows(pairs, values, k))

    def kl(self, clean: Tensor, spliced: Tensor, keep: Tensor, unembedding: Unembedding) -> Divergence:
        if spliced.dtype == torch.float64:
            return super().kl(clean, spliced, keep, unembedding)
        sweeps = _Sweeps(self, spliced, clean, None, keep, unembedding)
        q_top, q_total, p_top, p_total, cross = sweeps.statistics()
        losses = cross / p_total + (q_total.log() - p_total.log()) + (q_top - p_top)
        gradient = sweeps.gradient(torch.stack([q_top, q_total.log(), p_top, p_total.log()]))
        return Divergence(losses.where(keep, 0.0).sum(), gradient)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, keep: Tensor, unembedding: Unembedding, with_gradient: bool
    ) -> CrossEntropy:
        if hidden.dtype == torch.float64:
            return super().cross_entropy(hidden, targets, keep, unembedding, with_gradient)
        sweeps = _Sweeps(self, hidden, None, targets, keep, unembedding)
        top, total, _, _, of_target = sweeps.statistics()
        # The kernel finds no logit for a target that is no token of the vocabulary, and is asked for no wrong number.
        known = (targets >= 0) & (targets < len(unembedding.weight))
        losses = (total.log() + (top - of_target)).where(known, torch.nan).where(keep, 0.0)
        return CrossEntropy(losses, sweeps.gradient(torch.stack([top, total.log()])) if with_gradient else None)


class _Sweeps:
    """Both sweeps over the vocabulary (`triton_vocabulary`), with the hidden states of one pass or of two."""

    def __init__(
        self,
        kernels: TritonKernels,
        spliced: Tensor,
        clean: Tensor | None,
        targets: Tensor | None,
        keep: Tensor,
        unembedding: Unembedding,
    ) -> None:
        self.kernels, self.weight = kernels, unembedding.weight.contiguous()
        self.spliced, bias = spliced.contiguous(), unembedding.bias
        # A kernel does not read what its constants say is not there.
        optional = (self.spliced if each is None else each.contiguous() for each in (clean, targets, keep))
        self.inputs = self.spliced, *optional, self.weight, self.weight if bias is None else bias.contiguous()
        self.sizes = len(spliced), *self.weight.shape
        self.logits_by = float(unembedding.scale), float(unembedding.softcap or 1.0)
        self.is_half = spliced.dtype != torch.float32
        self.constants: dict[str, Any] = {
            "PAIR": clean is not None,
            "BIAS": bias is not None,
            "CAP": unembedding.softcap is not None,
            "PRECISION": self.precision,
            **(HALF if self.is_half else FULL),
        }

    @cached_property
    def precision(self) -> str:
        """Precision of fp32 products: three of tf32, a bit or two short, or one if PyTorch may do that."""
        if self.is_half:
            return "ieee"
        return "tf32" if _allows_tf32() else "tf32x3"

    def statistics(self) -> Tensor:
        """Maximum and total of the spliced pass's softmax and the clean one's, and the loss's own sum: `[5 n]`."""
        n, vocab, width = self.sizes
        rows, tokens = self.constants["ROWS"], self.constants["TOKENS"]
        share = tokens * _parts(_parts(vocab, tokens), max(1, self.kernels.programs // max(1, _parts(n, rows))))
        found = self.spliced.new_empty(5, _parts(vocab, share), n, dtype=torch.float32)
        if n:
            grid = _parts(n, rows), found.shape[1]
            arguments = *self.inputs, found, n, vocab, width, share, *self.logits_by
            self.kernels.launch(statistics, grid, *arguments, **self.constants)
        q_top, p_top = found[0].amax(0), found[2].amax(0)
        q_weights, p_weights = (found[0] - q_top).exp(), (found[2] - p_top).exp()
        q_total, p_total = (found[1] * q_weights).sum(0), (found[3] * p_weights).sum(0)
        own = (found[4] * p_weights if self.constants["PAIR"] else found[4]).sum(0)
        return torch.stack([q_top, q_total, p_top, p_total, own])

    def gradient(self, softmax: Tensor) -> Tensor:
        """Gradient of the losses by the hidden states, in their dtype.

        Args:
            softmax: maximum and logarithm of the total, of the spliced pass and of the clean one: `[4 n]`, or `[2 n]`.
        """
        n, vocab, width = self.sizes
        gradient = self.spliced.new_zeros(n, width, dtype=torch.float32)
        tile, sums = self.constants, HALF_SUM if self.is_half else FULL_SUM
        most = min(self.kernels.slab, self.kernels.slab_elements // max(1, n))
        size = tile["TOKENS"] * max(1, most // tile["TOKENS"])
        slab = self.spliced.new_empty(n, size)
        for first in range(0, vocab if n else 0, size):
            count = min(size, vocab - first)
            grid = _parts(n, tile["ROWS"]), _parts(count, tile["TOKENS"])
            arguments = *self.inputs, softmax, slab, first, size, n, vocab, width, *self.logits_by
            self.kernels.launch(differences, grid, *arguments, **tile)
            grid = _parts(n, sums["ROWS"]), _parts(width, sums["WIDTH"])
            arguments = slab, self.weight, gradient, first, size, n, vocab, width
            self.kernels.launch(add_product, grid, *arguments, PRECISION=self.precision, **sums)
        return gradient.to(self.spliced.dtype)


def _allows_tf32() -> bool:
    """Read PyTorch's setting, whichever of its two interfaces set it: from 2.9 on the older one refuses to be mixed."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


def _parts(whole: int, size: int) -> int:
    return -(-whole // size)
