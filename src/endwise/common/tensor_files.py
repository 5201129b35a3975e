"""Writing tensors to a file, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from endwise.common.files import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written straight from the tensors' memory; one that is not contiguous, or not on the CPU, is
    copied first.
    """
    own = laid_out(tensors)
    with replacing(path) as partial:
        try:
            save_file(own, partial, metadata=dict(metadata))
        except SafetensorError as error:  # of a disk that is full, among others
            raise OSError(str(error)) from error


def laid_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in one piece; copied only where they are not."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
