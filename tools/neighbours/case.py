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
    _transcoders(case / "transcoders", model)
    about = {"site": config.site, "clean": clean, "spliced": spliced, "endwise": endwise.__version__}
    (case / "case.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{case}: cross-entropy {clean:.5f} clean, {spliced:.5f} with the SAE at {config.site}")


def _transcoders(folder: Path, model: endwise.LanguageModel) -> None:
    """A set of transcoders with skip connections, with what each makes of some inputs."""
    tensors = {}
    for layer in range(model.n_layers):
        place = model.place(f"blocks.{layer}.mlp_in -> blocks.{layer}.hook_mlp_out")
        width = model.width(place.reads)
        sae = endwise.ReluSAE(width, 2 * width, seed=layer, skip=True).requires_grad_(False)
        assert sae.W_skip is not None
        torch.nn.init.normal_(sae.W_skip, generator=torch.Generator().manual_seed(layer))
        about = {"hook_name": place.reads.name, "hook_name_out": place.writes.name, "model_name": model.name}
        sae.save(folder / f"layer_{layer}.safetensors", about, format_name="circuit-tracer")
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(layer))
        tensors |= {f"{layer}.x": x, f"{layer}.latents": sae.encode(x).dense(), f"{layer}.outputs": sae(x)}
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder.parent / "transcoders.safetensors")


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean over all predictions, nats."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
