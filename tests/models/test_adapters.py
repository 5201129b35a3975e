"""Adapters of peft's are merged into their base as it is loaded; what cannot be is one line."""

import json
import shutil
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from endwise import LanguageModel, load_model
from endwise.common.errors import ModelError
from tiny_models import VOCAB, build, make_tokenizer, relative, tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A LoRA of attention and MLPs, and the logits of the model with it."""
    peft = pytest.importorskip("peft")
    return adapted(peft, hf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


def adapted(peft, hugging, folder, **settings):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], lora_alpha=16, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(hugging, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        logits = model.eval()(input_ids=tokens()).logits
    model.save_pretrained(folder)
    return folder, logits


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_folder_of_an_adapter_is_the_model_with_it(base, adapter):
    folder, expected = adapter
    model, plain = load_model(str(folder)), load_model(str(base))
    assert relative(model.logits(tokens()), expected) < 1e-5
    assert relative(plain.logits(tokens()), expected) > 0.1
    assert model.sites() == plain.sites() and model.name == str(folder)
    assert model.tokenizer is not None and model.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    digest = model.weights_digest()
    assert digest.startswith("files:") and digest not in (plain.weights_digest(), "files:")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert load_model(str(folder)).weights_digest() != digest


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tokens_that_were_added_with_an_adapter_come_along(base, tmp_path):
    peft = pytest.importorskip("peft")
    hugging, tokenizer = hf.AutoModelForCausalLM.from_pretrained(base), make_tokenizer()
    tokenizer.add_tokens(["<turn>", "<end>"])
    hugging.resize_token_embeddings(len(tokenizer))
    folder, expected = adapted(peft, hugging, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder))
    assert model.vocab_size == VOCAB + 2 and model.tokenizer.convert_tokens_to_ids("<end>") == VOCAB + 1
    assert relative(model.logits(tokens()), expected) < 1e-5


def test_one_that_is_not_of_this_base_is_refused(base, adapter, tmp_path):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be merged into .*do not agree in 1 tensors .*trained on"):
        load_model(str(folder))
    save_file(
        weights | {"base_model.model.elsewhere.lora_A.weight": torch.zeros(4, 16)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match=r"do not agree in 1 tensors"):
        load_model(str(folder))
    save_file({name: value[:2, :3].clone() for name, value in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"The adapter .* cannot be merged into .*: RuntimeError"):
        load_model(str(folder))


def test_one_of_another_adapter_is_refused(adapter, tmp_path):
    folder, _ = adapter
    shutil.copytree(folder, tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match=r"is an adapter of an adapter, .*adapter\. Merge that one first"):
        load_model(str(tmp_path / "second"))


def made_up(folder, base, weights="adapter_model.safetensors"):
    """An adapter whose files nobody reads."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    save_file({"a": torch.zeros(1)}, folder / weights)
    return str(folder)


def test_without_peft_it_says_how_to_get_it(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r'is an adapter of .*pip install "endwise\[peft\]".*merge_and_unload'):
        load_model(made_up(tmp_path / "adapter", base))


def test_a_base_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"^'somebody/base' is neither"):
        load_model(made_up(tmp_path / "adapter", "somebody/base"))


def test_a_pickle_of_an_adapter_is_not_read(base, tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors; pickles can run any code"):
        load_model(made_up(tmp_path / "adapter", base, "adapter_model.bin"))


def test_one_in_a_model_made_in_python_is_still_refused(base):
    peft = pytest.importorskip("peft")
    hugging = hf.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match="holds an adapter that is not merged"):
        LanguageModel(peft.get_peft_model(hugging, peft.LoraConfig(r=4, target_modules=["q_proj"])).base_model.model)
