"""Activations of training text on the disk: the same bits without the model."""

import json
from collections import namedtuple

import pytest

import endwise
from endwise.common import machine
from endwise.common.errors import ConfigError
from endwise.config.run import RunConfig
from endwise.models.language_model import LanguageModel
from endwise.tokens import Corpora, Corpus, corpora_for
from endwise.training.kept_activations import KeptActivations
from on_embedded import recipe

SITE = "blocks.4.hook_resid_pre"
NAMES = ("metrics.jsonl", "sae/sae_weights.safetensors")


class Counting(LanguageModel):
    """A model that counts its clean passes of whole training batches."""

    passes = 0

    def clean(self, tokens, record=(), final=False):
        self.passes += len(tokens) == 4 and not final
        return super().clean(tokens, record, final)


@pytest.fixture(scope="module")
def model():
    model = endwise.load_model("embedded")
    model.__class__ = Counting
    return model


def local(out, kept=None, **changes):
    values = recipe(out)
    values["objective"] |= {"kind": "local"} | changes.pop("objective", {})
    values["data"] |= {"activations": kept and str(kept)} | changes.pop("data", {})
    values["training"] |= {"tokens": 8 * 4 * 32, **changes}
    return RunConfig.build(values)


def trained(config, model, **options):
    before = model.passes
    run = endwise.train(config, model=model, display=False, **options)
    return [(run.folder / name).read_bytes() for name in NAMES], model.passes - before


def only_folder(kept):
    (folder,) = kept.iterdir()
    return folder


def test_a_second_run_has_the_same_bits_without_the_model(model, tmp_path):
    """8 steps of 4 sequences; a run with another penalty reads what the first kept."""
    plain, passes = trained(local(tmp_path / "plain"), model)
    kept, first = trained(local(tmp_path / "first", tmp_path / "kept"), model)
    assert kept == plain and first == passes >= 8
    folder = only_folder(tmp_path / "kept")
    assert (folder / "rows.bin").stat().st_size == 32 * 32 * model.d_model * 4
    again, second = trained(local(tmp_path / "second", tmp_path / "kept"), model)
    assert again == plain and second == first - 8
    other = {"sparsity": {"coefficient": 2.0}}
    expected, _ = trained(local(tmp_path / "other", objective=other), model)
    assert trained(local(tmp_path / "other-kept", tmp_path / "kept", objective=other), model) == (expected, second)


def test_a_second_epoch_does_without_the_model(model, tmp_path):
    """12 sequences are met in 3 steps, of 8."""
    corpora = corpora_for(model, local("x").data, training_tokens=2048, evaluation_tokens=512)
    small = Corpus(corpora.train.documents, corpora.train.layout, "some", 12)
    corpora = Corpora(small, corpora.heldout)
    plain, passes = trained(local(tmp_path / "plain", data={"epochs": 3}), model, corpora=corpora)
    kept = local(tmp_path / "kept-run", tmp_path / "kept", data={"epochs": 3})
    assert trained(kept, model, corpora=corpora) == (plain, passes - 5)


def test_what_is_damaged_is_computed_again(model, tmp_path):
    plain, passes = trained(local(tmp_path / "first", tmp_path / "kept"), model)
    rows, index = (only_folder(tmp_path / "kept") / name for name in ("rows.bin", "index.bin"))
    content = bytearray(rows.read_bytes())
    content[5] ^= 1
    rows.write_bytes(content)
    assert trained(local(tmp_path / "second", tmp_path / "kept"), model) == (plain, passes - 7)
    assert trained(local(tmp_path / "third", tmp_path / "kept"), model) == (plain, passes - 8)
    index.write_bytes(index.read_bytes()[:-30])  # the entry that was added, and half of one before
    rows.write_bytes(rows.read_bytes()[:-7])
    assert trained(local(tmp_path / "fourth", tmp_path / "kept"), model)[0] == plain
    assert trained(local(tmp_path / "fifth", tmp_path / "kept"), model) == (plain, passes - 8)


def test_each_model_site_and_shape_has_a_folder_of_its_own(model, tmp_path):
    sites = [model.place(name).writes for name in (SITE, "blocks.2.hook_resid_pre")]
    made = [
        KeptActivations(tmp_path, model, chosen, context, size, about)
        for chosen, context, size, about in (
            (sites[:1], 32, 4, None),
            (sites[1:], 32, 4, None),
            (sites, 32, 4, None),
            (sites[:1], 16, 4, None),
            (sites[:1], 32, 2, None),
            (sites[:1], 32, 4, 0),
        )
    ]
    assert len({each.folder for each in made}) == 6
    other = endwise.load_model("embedded")
    next(other.model.parameters()).data[0, 0] += 1
    other.stored = None
    assert KeptActivations(tmp_path, other, sites[:1], 32, 4, None).folder not in {each.folder for each in made}


def test_a_disk_without_room_is_told_of_before_training(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(2**18))
    told = r"32 sequences of 32 tokens at blocks\.4\.hook_resid_pre take 512 KiB, and .* has 256 KiB free"
    with pytest.raises(ConfigError, match=told):
        trained(local(tmp_path / "run", tmp_path / "kept"), model)


def test_one_process_adds_and_others_read(model, tmp_path):
    sites = {model.place(SITE).writes}
    first, second = (KeptActivations(tmp_path, model, sites, 32, 4, None) for _ in range(2))
    tokens = corpora_for(model, local("x").data, training_tokens=2048, evaluation_tokens=512).train.batch([0, 1])
    second.clean(tokens.tokens)
    assert (len(first), len(second)) == (0, 0)
    first.clean(tokens.tokens)
    assert len(first) == 2
    assert json.loads((first.folder / "key.json").read_text())["context"] == 32
    first.close()


def test_it_is_said_where_it_is_of_no_use(model, tmp_path, capsys):
    endwise.train(local(tmp_path / "run", tmp_path / "kept", objective={"kind": "e2e"}), model=model)
    assert "data.activations is not used: every phase has a term that reads a spliced pass" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
