"""Imports libraries before the package: all that is imported while its modules are, is compiled again for jaxtyping."""

from importlib import import_module

LIBRARIES = (
    "beartype.vale",
    "openai",
    "pyarrow.parquet",
    "rich.progress",
    "scipy.stats",
    "torch._inductor",
    "torch.distributed.fsdp",
    "transformers.modeling_utils",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.tokenization_utils_tokenizers",
)

for library in LIBRARIES:
    import_module(library)
