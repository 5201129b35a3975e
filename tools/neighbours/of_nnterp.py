"""nnterp, whose names are the same for all architectures, runs a model with an SAE of ours after a block."""

import torch
from nnterp import StandardizedTransformer  # type: ignore[pyrefly:missing-import]

from meeting import compared, cross_entropy, given


def main() -> None:
    case = given()
    layer = int(case.site.split(".")[1])
    sae, model = case.reconstruct(), StandardizedTransformer(str(case.folder / "model"))
    with torch.no_grad(), model.trace(case.tokens):
        met = model.layers_output[layer - 1].save()
        model.layers_output[layer - 1] = sae(model.layers_output[layer - 1])
        logits = model.logits.save()
    compared("activations", met, case.tensors["activations"])
    compared("cross-entropy with the SAE in place", cross_entropy(logits, case.tokens), case.spliced)


if __name__ == "__main__":
    main()
