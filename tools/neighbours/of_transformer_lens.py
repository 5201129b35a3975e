"""TransformerLens's bridge runs a model with an SAE of ours in place, by the name of the site that both use."""

import torch
from transformer_lens.model_bridge import TransformerBridge  # type: ignore[pyrefly:missing-import]

from meeting import compared, cross_entropy, given


def main() -> None:
    case = given()
    sae, model = case.reconstruct(), TransformerBridge.boot_transformers(str(case.folder / "model"), device="cpu")
    with torch.no_grad():
        _, cache = model.run_with_cache(case.tokens)
        compared("activations", cache[case.site], case.tensors["activations"])
        logits = model.run_with_hooks(case.tokens, fwd_hooks=[(case.site, lambda x, **_: sae(x))])
    compared("cross-entropy with the SAE in place", cross_entropy(logits, case.tokens), case.spliced)


if __name__ == "__main__":
    main()
