"""Every kind of file that endwise writes in SAELens's layout, beside what SAELens made of it, which is stored."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file

from endwise import SAE
from places import TOOLS
from rivals import FOLDER

with pytest.MonkeyPatch.context() as _patch:  # `tools/` is no package and not installed
    _patch.syspath_prepend(TOOLS)
    writing = importlib.import_module("rival_packages.writing")

ABOUT = json.loads((FOLDER / "opened.json").read_text())
CLASSES = {
    "standard": "StandardSAE",
    "gated": "GatedSAE",
    "topk": "TopKSAE",
    "jumprelu": "JumpReLUSAE",
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}
"""SAELens's class of each architecture that a file names."""


def saved(name, folder):
    """A kind's dictionary, and what its file says."""
    kind = writing.kinds()[name]
    sae = kind.make()
    sae.save(folder, kind.metadata)
    return sae, json.loads((folder / "cfg.json").read_text())


def test_every_kind_was_tried():
    assert sorted(writing.kinds()) == sorted([*ABOUT["opened"], *ABOUT["refused"]])


@pytest.mark.parametrize("name", ABOUT["opened"])
def test_saelens_opens_it_as_what_it_is(name, tmp_path):
    sae, cfg = saved(name, tmp_path)
    assert CLASSES[cfg["architecture"]] == ABOUT["opened"][name]
    stored, place = load_file(FOLDER / "opened.safetensors"), list(ABOUT["opened"]).index(name)
    latents, outputs = stored["latents"][place], stored["outputs"][place][:, : sae.d_out]
    x = writing.inputs()[: len(latents)]
    for ours in (sae, SAE.load(tmp_path)):
        torch.testing.assert_close(ours.encode(x).dense(), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), outputs, rtol=1e-5, atol=1e-5)
    assert latents.any(1).all() and not latents.all()


@pytest.mark.parametrize("name", ABOUT["refused"])
def test_what_saelens_has_no_class_for_has_a_name_that_it_does_not_know(name, tmp_path):
    sae, cfg = saved(name, tmp_path)
    assert cfg["architecture"] not in CLASSES and ABOUT["refused"][name] == f"KeyError: '{cfg['architecture']}'"
    x = writing.inputs()
    torch.testing.assert_close(SAE.load(tmp_path)(x), sae(x), rtol=1e-5, atol=1e-5)
