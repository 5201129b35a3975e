"""GPT-2's GELU in one operation.

transformers writes the tanh approximation out as eight elementwise operations, each of which passes over the widest
tensor of the block and saves another for the backward pass. PyTorch has the same function as one.
"""

from torch import nn
from transformers.activations import NewGELUActivation


def fuse_gelu(model: nn.Module) -> None:
    """Put `nn.GELU(approximate="tanh")` in the place of every activation that is the same function."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
