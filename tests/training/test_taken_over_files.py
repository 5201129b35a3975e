"""Files of rivals and files in other precisions as a start: trained on as the same function, behind every norm."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from endwise import SAE
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.dictionaries import NormedSAE
from endwise.dictionaries.normed import taken_over
from endwise.dictionaries.topk import SAME_NORM
from endwise.formats import format_at
from endwise.training.taking_over import SAME, TakenOver
from finished_dictionaries import NAMES, ONE_THRESHOLD, SIZE, finished, x_of
from rivals import rival, rivals

PER_TOKEN = ("layer_norm", "constant_norm_rescale")
THEIRS = [
    name
    for package in ("sae_lens", "eai_sparsify", "dictionary_learning")
    for name in rivals(package, "inference")
    if format_at(rival(name).folder) is not None and "expected_average" not in name  # which no file tells whole
]


def continues(sae, x, target=None, architecture=None, **settings):
    """Return the dictionary that a run starts with, and how it differs."""
    architecture = architecture or sae.architecture
    section = ARCHITECTURES[architecture].Config
    norm = sae.norm.kind if isinstance(sae, NormedSAE) else "none"
    k = {} if section.penalised else {"k": 6}
    skip = {"skip": True} if getattr(getattr(sae, "inner", sae), "W_skip", None) is not None else {}
    values = {"architecture": architecture, "size": sae.d_sae, "normalize": norm, **k, **skip, **settings}
    after = taken_over(sae, section.model_validate(values), seed=0)
    target = x if target is None else target
    with torch.no_grad():
        if after.first_tokens:
            after.see_first(x, target)
    assert all(parameter.requires_grad for parameter in after.parameters())
    return TakenOver.of(sae, after.eval(), x, target)


@pytest.mark.parametrize("free", ["free", "unit"])
@pytest.mark.parametrize("norm", PER_TOKEN)
@pytest.mark.parametrize("architecture", NAMES)
def test_every_architecture_continues_behind_a_norm_of_each_token(tmp_path, architecture, norm, free):
    NormedSAE(finished(architecture), norm).save(tmp_path)
    sae = SAE.load(tmp_path)
    assert isinstance(sae, NormedSAE) and sae.norm.kind == norm
    found = continues(sae, x_of(), architecture=architecture, decoder_norm=free)
    assert found.kept and found.change <= SAME and found.l0 == pytest.approx(found.l0_before, rel=1e-3), found
    for other in ("jumprelu", "gated") if architecture != "topk" else ():
        assert continues(sae, x_of(), architecture=other, decoder_norm=free).kept


def test_there_are_files_of_rivals():
    assert len(THEIRS) > 10 and {name.partition("/")[0] for name in THEIRS} >= {"sae_lens"}


@pytest.mark.parametrize("free", ["free", "unit"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_rivals_file_continues_as_it_is(name, free):
    """Its norm included; a file without one, behind a scale and a whitening too, where unit norms change no choice."""
    sae, x = SAE.load(rival(name).folder), rival(name).tensors["inputs"]
    target = x if sae.d_out == sae.d_in else torch.randn(len(x), sae.d_out, generator=torch.Generator().manual_seed(0))
    x, target = x.reshape(-1, sae.d_in), target.reshape(-1, sae.d_out)
    k = {} if ARCHITECTURES[sae.architecture].Config.penalised else {"k": max(1, int(sae.encode(x).l0().max()))}
    lengths = sae.W_dec.norm(dim=1)
    if sae.architecture == "topk" and free == "unit" and float(lengths.max() - lengths.min()) > SAME_NORM:
        with pytest.raises(ConfigError, match=r"its directions have norms from .* Set dictionary\.decoder_norm=free"):
            continues(sae, x, target, decoder_norm=free, **k)
        return
    found = continues(sae, x, target, decoder_norm=free, **k)
    assert found.kept, found
    if not isinstance(sae, NormedSAE) and sae.architecture in ("standard", "gated", "jumprelu"):
        for norm in ("scalar", "whitening"):
            assert continues(sae, x, target, decoder_norm=free, normalize=norm).kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("architecture", NAMES)
def test_a_file_in_another_precision_continues_as_it_reads(tmp_path, architecture, dtype):
    finished(architecture).save(tmp_path / "exact")
    shutil.copytree(tmp_path / "exact", tmp_path / "other")
    weights = tmp_path / "other" / "sae_weights.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    cfg = tmp_path / "other" / "cfg.json"
    values = json.loads(cfg.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    cfg.write_text(json.dumps(values))
    sae, exact = SAE.load(tmp_path / "other"), SAE.load(tmp_path / "exact")
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32} and sae.d_sae == SIZE
    architecture = architecture if architecture not in ONE_THRESHOLD else "jumprelu"
    found = continues(sae, x_of(), architecture=architecture, decoder_norm="free")  # rounded, unit norms are others
    assert found.kept, found
    changed = TakenOver.of(exact, sae, x_of(), x_of()).change
    assert changed <= SAME if dtype == torch.float64 else 0 < changed < 0.2
