"""Files of other packages' formats, made from formulas and written by endwise, opened by those packages themselves."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX, OURS = "index.json", "ours.safetensors"
TOLERANCE, FEATURES = 1e-5, 12
"""Largest difference, as a share of the root mean square of the numbers compared."""
HELPERS = Path(__file__).parents[2] / "tests" / "helpers"
WRITTEN = {
    "sparsify": ("topk",),
    "dictionary_learning": ("standard", "gated", "topk", "jumprelu", "batchtopk"),
    "gemma-scope": ("standard", "jumprelu"),
    "gemma-scope-2": ("standard", "jumprelu"),
}
"""Architectures that endwise writes in each format."""


def make(folder: Path) -> int:
    """Writes every kind of file, and endwise's latents and outputs of each."""
    sys.path.insert(0, str(HELPERS))
    from endwise import SAE
    from rival_packages.writing import finished

    kinds = importlib.import_module("made_formats")
    x = kinds.X
    given, index = {"inputs": x}, {}
    paths = {name: (kind.format, kind.made(folder / f"{n:02}")) for n, (name, kind) in enumerate(kinds.KINDS.items())}
    for form, architectures in WRITTEN.items():
        for name in architectures:
            path = folder / "written" / f"{form}-2b-pt-res_{name}"
            finished(name).save(
                path, {"hook_name": "blocks.3.hook_resid_post", "model_name": "google/gemma-3-1b-pt"}, format_name=form
            )
            paths[path.name] = (form, path)
    for name, (form, path) in paths.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SAE.load(path)
        given |= {f"{name}.latents": sae.encode(x).dense(), f"{name}.outputs": sae(x)}
        index[name] = {"format": form, "path": str(path.relative_to(folder))}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / OURS)
    (folder / INDEX).write_text(json.dumps(index))
    return 0


def read(folder: Path, package: str) -> int:
    """Opens what the package knows, and prints the largest differences; 1 if one is over the tolerance."""
    given, index = load_file(folder / OURS), json.loads((folder / INDEX).read_text())
    openers, worst, opened = PACKAGES[package], 0.0, 0
    for name, about in index.items():
        if about["format"] not in openers:
            continue
        with torch.no_grad():
            found = openers[about["format"]](folder / about["path"], given["inputs"])
        if found is None:
            sys.stdout.write(f"{name}: not a file of this version of the package\n")
            continue
        apart = [
            _apart(theirs, given[f"{name}.{what}"]) for what, theirs in zip(("latents", "outputs"), found, strict=True)
        ]
        sys.stdout.write(f"{name}: latents {apart[0]:.1e}, outputs {apart[1]:.1e}\n")
        worst, opened = max([worst, *apart], key=lambda each: (each != each, each)), opened + 1
    within = worst <= TOLERANCE and opened > 0
    sys.stdout.write(f"{opened} opened, largest difference {worst:.2g}: {'within' if within else 'OVER'} {TOLERANCE}\n")
    return int(not within)


def _apart(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        return float("nan")
    return float((theirs - ours).abs().max() / ours.square().mean().sqrt())


def _by_sparsify(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    coder: Any = importlib.import_module("sparsify").SparseCoder.load_from_disk(path)
    given = coder(x, x)
    latents = x.new_zeros(len(x), coder.num_latents).scatter(-1, given.latent_indices, given.latent_acts)
    return latents, given.sae_out


def _by_dictionary_learning(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from rival_packages.of_dictionary_learning import import_rival

    import_rival()
    dictionary, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(path), "cpu")
    latents = dictionary.encode(x)
    return latents, dictionary.decode(latents)


def _by_sae_lens(path: Path, x: Tensor, loader: str, repository: str, folder: str) -> tuple[Tensor, Tensor]:
    """Opens by one of SAELens's loaders of files that it would fetch from the hub."""
    loaders: Any = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    own = path.parent if path.is_file() else path

    def local(*args: str, filename: str = "", **_: Any) -> str:
        return str(own / Path(filename or args[-1]).name)

    def shapes(*_: str) -> dict[str, list[int]]:
        return {name: list(each.shape) for name, each in load_file(own / "params.safetensors").items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    sizes = {"d_in": x.shape[1], "d_sae": FEATURES, "dtype": "float32", "device": "cpu"}
    sizes |= {"d_out": x.shape[1]} if loader == "gemma_2_transcoder" else {}
    cfg, tensors, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](repository, folder, "cpu", False, sizes)
    sae = importlib.import_module("sae_lens").SAE.from_dict(loaders.handle_config_defaulting(cfg))
    sae.process_state_dict_for_loading(tensors)
    sae.load_state_dict(tensors)
    if cfg["hook_name"].endswith("hook_z"):  # which SAELens joins
        x = x.unflatten(-1, (2, -1))
    return sae.encode(x), sae(x).flatten(1)


def _gemma_scope(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    repository = next(part for part in path.parts if part.startswith("gemma-scope-"))
    loader = "gemma_2_transcoder" if repository.endswith("transcoders") else "gemma_2"
    return _by_sae_lens(path, x, loader, repository, "layer_3/width_16k/average_l0_71")


def _gemma_scope_2(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    config = json.loads((path / "config.json").read_text())
    kind = "transcoder" if "hf_hook_point_out" in config else "resid_post"
    return _by_sae_lens(path, x, "gemma_3", "google/gemma-scope-2-1b-pt", f"{kind}/layer_3_width_16k_l0_small")


def _goodfire(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    return _by_sae_lens(path, x, "goodfire", f"Goodfire/{path.stem}", path.name)


def _qwen_scope(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    return _by_sae_lens(path, x, "qwen_scope", "Qwen/SAE-Res-Qwen3-8B-Base-W0K-L0_3", path.name)


def _by_openai(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    autoencoder: Any = importlib.import_module("sparse_autoencoder.model").Autoencoder
    tensors = torch.load(path, weights_only=True)
    if "decoder.linear.weight" in tensors:  # which its `from_state_dict` does not open
        made = autoencoder(*tensors["encoder.weight"].shape, tied=True)
        made.load_state_dict(tensors, strict=False)
    else:
        made = autoencoder.from_state_dict(tensors, strict=False)
    latents, about = made.encode(x)
    return latents, made.decode(latents, about)


def _by_e2e_sae(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """On a model with centred writing weights, whose activations are those of the plain one less their means."""
    tensors = {name.partition(".")[2]: each for name, each in torch.load(path, weights_only=True).items()}
    sae = importlib.import_module("e2e_sae.models.sparsifiers").SAE(x.shape[1], FEATURES)
    sae.load_state_dict(tensors)
    mean = x.mean(-1, keepdim=True)
    output, latents = sae(x - mean)
    return latents, output + mean


def _by_llamascopium(path: Path, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """As it is trained: on activations brought to the norm √d. It no longer opens files from before its version 2."""
    if "encoder.weight" in load_file(path / "sae_weights.safetensors"):
        return None
    coder: Any = importlib.import_module("llamascopium.models.sae").SparseAutoEncoder
    sae = coder.from_pretrained(str(path), device="cpu", dtype=torch.float32)
    norms = getattr(sae, "dataset_average_activation_norm", None) or {}
    scale = x.shape[1] ** 0.5 / norms[sae.cfg.hook_point_in] if norms else 1.0
    latents = sae.encode(x * scale)
    output = sae.decode(latents) / scale
    # It chooses by latents of unit directions, and then divides by the directions' norms; endwise keeps the former.
    return (latents * sae.W_D.norm(dim=1) if sae.cfg.act_fn == "topk" else latents), output


def _by_lm_saes(path: Path, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """By the package of the release; the other readings that `gate` names are not its own."""
    if "gate" in json.loads((path / "hyperparams.json").read_text()):
        return None
    coder: Any = importlib.import_module("lm_saes.sae").SparseAutoEncoder
    sae = coder.from_pretrained(str(path), device="cpu", dtype=torch.float32)
    latents = sae.encode(x)
    return latents, sae.decode(latents)


PACKAGES: Mapping[str, Mapping[str, Callable[[Path, Tensor], tuple[Tensor, Tensor] | None]]] = {
    "eai-sparsify": {"sparsify": _by_sparsify},
    "lm-saes": {"llama-scope": _by_lm_saes},
    "llamascopium": {"llamascopium": _by_llamascopium},
    "openai": {"openai": _by_openai},
    "e2e-sae": {"e2e_sae": _by_e2e_sae},
    "dictionary-learning": {"dictionary_learning": _by_dictionary_learning},
    "sae-lens": {
        "gemma-scope": _gemma_scope,
        "gemma-scope-2": _gemma_scope_2,
        "goodfire": _goodfire,
        "qwen-scope": _qwen_scope,
    },
}
