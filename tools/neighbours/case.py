"""Write what a neighbour's tool must give for an SAE of ours: `python tools/neighbours/case.py RUN CASE`.

The folder CASE then holds the model, the SAE as its run wrote it, some held-out tokens, and what endwise computes of
them: the site's activations, latents, reconstructions, and the cross-entropy with the reconstruction in place. The
scripts beside this one, each run in an environment of its own, compare with that (README.md).
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import endwise
from endwise import embedded
from endwise.runs.folder import RunFolder
from endwise.tokens import corpora_for

SEQUENCES, CONTEXT = 4, 64


def main(run: Path, case: Path) -> None:
    config = RunFolder.open(run).config()
    model, sae = endwise.load_model(config.model.name), endwise.SAE.load(run)
    case.mkdir(parents=True)
    source = embedded.folder() if config.model.name == "embedded" else Path(config.model.name)
    shutil.copytree(source, case / "model", ignore=shutil.ignore_patterns("*.npy", "*.md"))
    shutil.copytree(run / "sae", case / "sae")
    data = config.data.model_copy(update={"context": CONTEXT})
    heldout = corpora_for(model, data, training_tokens=1, evaluation_tokens=SEQUENCES * CONTEXT).heldout
    tokens, site = heldout.batch(range(SEQUENCES)).tokens, model.site(config.site)
    with torch.no_grad():
        activations = model.clean(tokens, record=[site]).activations[site]
        latents, outputs = sae.encode(activations).dense(), sae(activations)
        clean = _cross_entropy(model.model(tokens).logits, tokens)
        with endwise.spliced(model, {config.site: sae}):
            spliced = _cross_entropy(model.model(tokens).logits, tokens)
    tensors = {"tokens": tokens, "activations": activations, "latents": latents, "outputs": outputs}
    save_file({name: each.contiguous() for name, each in tensors.items()}, case / "case.safetensors")
    about = {"site": config.site, "clean": clean, "spliced": spliced, "endwise": endwise.__version__}
    (case / "case.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{case}: cross-entropy {clean:.5f} clean, {spliced:.5f} with the SAE at {config.site}")


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean over all predictions, nats."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
