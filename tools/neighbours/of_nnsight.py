"""nnsight runs a model with an SAE of ours in place of a block's input."""

import torch
from nnsight import NNsight  # type: ignore[pyrefly:missing-import]
from transformers import AutoModelForCausalLM

from meeting import compared, cross_entropy, given


def main() -> None:
    case = given()
    layer = int(case.site.split(".")[1])
    sae, hf = case.reconstruct(), AutoModelForCausalLM.from_pretrained(case.folder / "model").eval()
    model = NNsight(hf)
    with torch.no_grad(), model.trace(case.tokens):
        block = model.transformer.h[layer]
        met = block.input.save()
        block.input = sae(block.input)
        logits = model.output.logits.save()
    compared("activations", met, case.tensors["activations"])
    compared("cross-entropy with the SAE in place", cross_entropy(logits, case.tokens), case.spliced)


if __name__ == "__main__":
    main()
