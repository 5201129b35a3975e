"""delphi caches the same latents of an SAE of ours, which `endwise convert` wrote as sparsify's."""

import torch
from delphi.latents import LatentCache  # type: ignore[pyrefly:missing-import]
from delphi.sparse_coders.load_sparsify import load_sparsify_hooks  # type: ignore[pyrefly:missing-import]
from transformers import AutoModel

from meeting import compared, given


def main() -> None:
    case = given()
    (folder,) = (case.folder / "sparsify").iterdir()  # called as the module whose output the SAE reads
    model = AutoModel.from_pretrained(case.folder / "model").eval()
    encode, transcodes = load_sparsify_hooks(model, str(folder.parent), [folder.name])
    caching = LatentCache(model, encode, batch_size=len(case.tokens), transcode=transcodes)
    caching.run(case.tokens.numel(), case.tokens)
    latents = torch.zeros_like(case.tensors["latents"])
    where, values = caching.cache.latent_locations[folder.name], caching.cache.latent_activations[folder.name]
    latents[tuple(where.T)] = values.to(latents)
    compared(f"latents at {folder.name}", latents, case.tensors["latents"])


if __name__ == "__main__":
    main()
