"""Setup of Triton's interpreter."""

import torch

from endwise.kernels.on_cuda import launch


def in_fp32(kernel, grid, *arguments, **constants):
    """Launch on fp32 copies of what is in bf16, whose products the interpreter would take of the bits."""
    copies = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in arguments]
    launch(kernel, grid, *copies, **constants)
    for own, copy in zip(arguments, copies, strict=True):
        if copy is not own:
            own.copy_(copy)
