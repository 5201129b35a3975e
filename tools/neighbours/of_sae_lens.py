"""SAELens opens an SAE of ours, and evaluates it with its own metrics."""

import sae_lens  # type: ignore[pyrefly:missing-import]
import torch

from meeting import compared, cross_entropy, given


def main() -> None:
    case = given()
    sae = sae_lens.SAE.load_from_disk(str(case.folder / "sae"))
    with torch.no_grad():
        latents = sae.encode(case.tensors["activations"])
        compared("latents", latents, case.tensors["latents"])
        compared("outputs", sae(case.tensors["activations"]), case.tensors["outputs"])
        model = sae_lens.SAETransformerBridge.boot_transformers(str(case.folder / "model"), device="cpu")
        logits = model.run_with_saes(case.tokens, saes=[sae])
    compared("cross-entropy with SAELens's splicing", cross_entropy(logits, case.tokens), case.spliced)


if __name__ == "__main__":
    main()
