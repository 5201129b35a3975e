"""Every way to name a model, every option, and every refusal; nothing here has a network."""

import json
import shutil
import socket

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from endwise import LanguageModel, Site, load_model
from endwise.errors import ConfigError, ModelError
from endwise.sites import Part
from tiny_models import FAMILIES, HEADS, LAYERS, VOCAB, WIDTH, build, tokens


def make_tokenizer():
    """Word `w7` has id 7."""
    vocabulary = {f"w{i}": i for i in range(VOCAB - 1)} | {"<eos>": VOCAB - 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<eos>")


@pytest.fixture(scope="module")
def llama():
    return build("llama").eval()


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """The same folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def logits_of(hugging):
    with torch.no_grad():
        return hugging(input_ids=tokens(), use_cache=False).logits


# What loads


def test_the_embedded_model_is_the_default():
    model = load_model()
    assert model.name == "embedded"
    ids = model.tokenizer("The river was", return_tensors="pt").input_ids
    assert torch.equal(load_model("embedded").logits(ids), model.logits(ids))
    assert model.dtype == torch.float32
    assert len(model.sites()) == 4 * model.n_layers > 0
    site = Site(model.n_layers // 2, Part.RESID_PRE)
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(model.clean(ids, [site]).activations[site], hidden[site.layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_gives_back_the_model(family, tmp_path):
    hugging = build(family).eval()
    hugging.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert type(model.model) is type(hugging)
    assert model.tokenizer is None
    assert model.name == str(tmp_path)
    # GPT-Neo's attention and the GELU of three families are computed in one operation, and so round differently.
    tolerance = {"rtol": 1e-4, "atol": 2e-6} if family in ("gpt2", "gpt_neo", "gptj") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(model.logits(tokens()), logits_of(hugging), **tolerance)


def test_a_folders_tokenizer_comes_with_it(saved):
    assert load_model(str(saved)).tokenizer("w3 w1 w30 <eos>")["input_ids"] == [3, 1, 30, VOCAB - 1]


def test_a_loaded_model_is_frozen_and_off_training(saved):
    model = load_model(str(saved)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_in_several_files(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load_model(str(tmp_path)).logits(tokens()), logits_of(llama))


# Options


def test_a_bfloat16_checkpoint_loads_as_float32_unless_asked(tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    model = load_model(str(tmp_path))
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    rounded = build("llama").eval()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(model.logits(tokens()), logits_of(rounded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_honoured(saved, dtype):
    model = load_model(str(saved), dtype=dtype)
    assert {parameter.dtype for parameter in model.model.parameters()} == {getattr(torch, dtype)}
    assert model.dtype == getattr(torch, dtype)
    # The rotary frequencies, for one, stay in full precision, as in the model that transformers loads.
    plain = hf.AutoModelForCausalLM.from_pretrained(saved, dtype=getattr(torch, dtype))
    for (name, ours), (_, theirs) in zip(model.model.named_buffers(), plain.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
    assert torch.equal(model.logits(tokens()), logits_of(plain.eval()))


@pytest.mark.parametrize("dtype", ["fp32", "int8", "nn", "float64", ""])
def test_another_dtype_is_refused_with_those_there_are(saved, dtype):
    with pytest.raises(ConfigError, match=r"float32, bfloat16, float16.*" + repr(dtype)):
        load_model(str(saved), dtype=dtype)


@pytest.mark.parametrize(("asked", "used"), [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_attention_implementation_is_honoured(saved, llama, asked, used):
    model = load_model(str(saved), attention=asked)
    assert model.model.config._attn_implementation == used
    torch.testing.assert_close(model.logits(tokens()), logits_of(llama), rtol=1e-4, atol=1e-4)


def test_a_model_that_has_only_eager_attention_gets_it(saved, monkeypatch):
    monkeypatch.setattr(hf.LlamaForCausalLM, "_supports_sdpa", False)
    monkeypatch.setattr(hf.LlamaModel, "_supports_sdpa", False)
    assert load_model(str(saved)).model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        load_model(str(saved), attention="sdpa")


def test_an_unknown_attention_implementation_is_refused(saved):
    with pytest.raises(ModelError, match="thinking_hard"):
        load_model(str(saved), attention="thinking_hard")


@pytest.mark.skipif(hf.utils.is_flash_attn_2_available(), reason="flash attention is installed")
def test_an_attention_implementation_that_is_not_installed_is_refused(saved):
    with pytest.raises(ModelError, match=r"needs a package that is not installed.*FlashAttention2"):
        load_model(str(saved), attention="flash_attention_2")


def test_the_device_is_honoured(saved):
    assert load_model(str(saved), device="cpu").device == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_model(str(saved), device="auto").device.type == expected


@pytest.mark.parametrize("device", ["banana", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(saved, device):
    with pytest.raises(ConfigError, match=rf"model\.device '{device}'.*auto, cpu, cuda"):
        load_model(str(saved), device=device)


# What is refused


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no-such-folder", "somebody/model", "gpt2", "not a name", "a/b/c"]
)
def test_a_model_that_is_not_there_is_one_error_that_says_what_was_tried(name):
    with pytest.raises(ModelError) as error:
        load_model(name)
    message = str(error.value)
    assert message.startswith(f"{name!r} is neither 'embedded', nor a local folder, nor a model the Hugging Face hub")
    assert "\n" not in message
    assert len(message) < 600


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ModelError, match=r"somebody/some-model' is neither .* Check the spelling and the connection"):
        load_model("somebody/some-model")


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy holds no \*\.safetensors weights\. For a GGUF file"):
        load_model(str(copy))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(copy, file):
    (copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(copy / "exploded")}, copy / file)
    with pytest.raises(ModelError, match=rf"only as a pickle \({file}\).*save_pretrained"):
        load_model(str(copy))
    assert not (copy / "exploded").exists()


def test_a_pickle_beside_safetensors_is_not_read(copy, llama):
    torch.save({"lm_head.weight": Bomb(copy / "exploded")}, copy / "pytorch_model.bin")
    assert torch.equal(load_model(str(copy)).logits(tokens()), logits_of(llama))
    assert not (copy / "exploded").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("model.safetensors", lambda path: path.write_text("<html>moved</html>")),
        ("config.json", lambda path: path.unlink()),
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text("[]")),
        ("config.json", lambda path: change_config(path.parent, model_type="of-the-future")),
        ("config.json", lambda path: change_config(path.parent, hidden_size="wide")),
        ("config.json", lambda path: change_config(path.parent, hidden_size=2 * WIDTH)),
        ("config.json", lambda path: change_config(path.parent, model_type="t5")),
    ],
)
def test_a_damaged_folder_is_a_model_error_that_names_it(copy, file, damage):
    damage(copy / file)
    with pytest.raises(ModelError, match="copy cannot be loaded as a causal language model"):
        load_model(str(copy))


def test_a_checkpoint_that_lacks_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(copy))


def test_an_encoder_without_a_language_modelling_head_is_refused(tmp_path):
    config = hf.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=VOCAB
    )
    hf.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cls\.predictions"):
        load_model(str(tmp_path))


# Code that ships with a model

CODE = """
from pathlib import Path
import torch
import transformers as hf

Path({witness!r}).touch()

class OwnConfig(hf.PretrainedConfig):
    model_type = "its-own"

class OwnModel(hf.PreTrainedModel):
    config_class = OwnConfig
"""


def test_code_that_ships_with_a_model_is_refused_and_not_run(copy):
    witness = copy / "ran"
    (copy / "own.py").write_text(CODE.format(witness=str(witness)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_config(copy, model_type="its-own", auto_map=auto_map)
    with pytest.raises(ModelError, match=r"ships Python code of its own.*unless model\.trust_remote_code is true"):
        load_model(str(copy))
    assert not witness.exists()
    with pytest.raises(ModelError) as error:  # with leave to run it, what fails is that this code makes no real model
        load_model(str(copy), trust_remote_code=True)
    assert "trust_remote_code" not in str(error.value)
    assert witness.exists()


def test_a_tokenizers_code_is_not_run_either(copy):
    witness = copy / "ran"
    (copy / "own.py").write_text(CODE.format(witness=str(witness)))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    load_model(str(copy))
    assert not witness.exists()


# GGUF


def as_llama_cpp_orders(weight):
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(HEADS, 2, rows // HEADS // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, llama, half=False):
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    config = llama.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, "Ġ", "Ġa", *(f"<{i}>" for i in range(VOCAB - 29)), "<eos>"]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCAB - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(VOCAB - 1)
    writer.add_eos_token_id(VOCAB - 1)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layers = {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(LAYERS) for a, b in NAMES.items()}
    for ours, theirs in (top | layers).items():
        weight = llama.get_submodule(ours).weight.detach().numpy()
        if theirs.endswith(("attn_q", "attn_k")):
            weight = as_llama_cpp_orders(weight)
        writer.add_tensor(f"{theirs}.weight", weight.astype("float16") if half and weight.ndim == 2 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_written_from(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama)
    model = load_model(str(tmp_path), gguf_file="tiny.gguf")
    assert model.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model.logits(tokens()), logits_of(llama), rtol=1e-5, atol=1e-5)
    assert model.tokenizer.decode(model.tokenizer("b a")["input_ids"][-2:]) == "b a"
    assert model.sites() == LanguageModel(build("llama")).sites()


def test_half_precision_in_a_gguf_file_becomes_the_dtype_asked_for(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, half=True)
    model = load_model(str(tmp_path), gguf_file="tiny.gguf")
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.logits(tokens()), logits_of(llama), rtol=2e-2, atol=2e-2)
    assert load_model(str(tmp_path), gguf_file="tiny.gguf", dtype="bfloat16").dtype == torch.bfloat16


def test_a_gguf_file_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"holds no file c\.gguf; its GGUF files: a\.gguf, b\.gguf\."):
        load_model(str(tmp_path), gguf_file="c.gguf")


def test_a_file_that_is_no_gguf_is_refused(saved, tmp_path):
    pytest.importorskip("gguf", reason="needs the extra gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"not at all" * 20)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(str(tmp_path), gguf_file="tiny.gguf")


def test_a_cut_gguf_file_is_refused(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama)
    cut(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(str(tmp_path), gguf_file="tiny.gguf")
