"""sae-dashboard gathers the same activations of an SAE of ours, which SAELens opens, and writes a page of features."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis  # type: ignore[pyrefly:missing-import]
from sae_dashboard.sae_vis_data import SaeVisConfig  # type: ignore[pyrefly:missing-import]
from sae_dashboard.sae_vis_runner import (  # type: ignore[pyrefly:missing-import]
    FeatureDataGeneratorFactory,
    SaeVisRunner,
)
from sae_lens import SAE, HookedSAETransformer  # type: ignore[pyrefly:missing-import]
from transformer_lens import loading_from_pretrained as loading  # type: ignore[pyrefly:missing-import]
from transformers import PreTrainedTokenizerFast

from meeting import compared, given

FEATURES = 8
"""Those that fire most have a page."""


def main() -> None:
    case = given()
    model, sae = hooked(case.folder / "model"), SAE.load_from_disk(str(case.folder / "sae"))
    latents = case.tensors["latents"]
    everything = SaeVisConfig(hook_point=case.site, features=list(range(latents.shape[-1])))
    found = FeatureDataGeneratorFactory.create(everything, model, sae, case.tokens).get_feature_data(
        everything.features
    )
    compared("latents of all features", found[0], latents)
    shown = latents.flatten(0, 1).count_nonzero(0).topk(FEATURES).indices.tolist()
    data = SaeVisRunner(SaeVisConfig(hook_point=case.site, features=shown)).run(sae, model, case.tokens)
    most = latents.flatten(0, 1).amax(0)[shown]
    compared("greatest activations on its page", torch.tensor(data.feature_stats.max), most)
    with tempfile.TemporaryDirectory() as folder:
        save_feature_centric_vis(data, Path(folder) / "page.html")
        print(f"a page of {(Path(folder) / 'page.html').stat().st_size:,} bytes")


def hooked(folder: Path) -> Any:
    """The model as TransformerLens 2 has it, which opens folders if their configuration holds GPT-2's old key."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(shutil.copytree(folder, Path(scratch) / "model"))
        config = json.loads((plain / "config.json").read_text())
        (plain / "config.json").write_text(json.dumps({"n_ctx": config.get("n_positions"), **config}))
        hooked = loading.get_pretrained_model_config(str(plain), device="cpu")
        hooked.tokenizer_name = None
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        file = str(plain / "tokenizer.json")  # whose class transformers 4 does not know
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, name_or_path="model", add_bos_token=True, **special)
        model = HookedSAETransformer(hooked, tokenizer=tokenizer)
        weights = loading.get_pretrained_state_dict(str(plain), hooked)
    kept = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(kept, False))
    return model


if __name__ == "__main__":
    main()
