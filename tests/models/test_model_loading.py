"""Every way to name a model, every option, and every refusal; nothing here has a network."""

import base64
import errno
import json
import os
import re
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from bad_input import ran
from endwise import LanguageModel, Site, load_model
from endwise.common.errors import ConfigError, DataError, ModelError
from endwise.config.run import DataConfig
from endwise.models.loading import explained
from endwise.models.sites import Part
from endwise.tokens.loading import corpora_for
from hub_server import asked, hub_server
from places import TOOLS
from tiny_models import (
    ALTERNATING,
    FAMILIES,
    FUSED,
    GROUPED,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    assert_as_exact,
    build,
    make_tokenizer,
    tokens,
)

models_tried = SimpleNamespace(**runpy.run_path(str(TOOLS / "models_tried.py")))


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
    assert len(model.sites()) == 7 * model.n_layers > 0
    site = Site(model.n_layers // 2, Part.RESID_PRE)
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(model.clean(ids, [site]).activations[site], hidden[site.layer])


# With an operation of ours in place of theirs; with weights that are tied, as they are, or of several experts.
OFTEN = ("gpt2", "gpt_neo", "gptj", "llama_grouped_tied", "gemma2", "mixtral")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FAMILIES])
def test_a_local_folder_gives_back_the_model(family, tmp_path):
    hugging = build(family).eval()
    hugging.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert type(model.model) is type(hugging)
    assert model.tokenizer is None
    assert model.name == str(tmp_path)
    # GPT-Neo's attention and the GELU of three families are computed in one operation, and so round differently.
    ours, theirs = model.logits(tokens()), logits_of(hugging)
    if family in ("gpt2", "gpt_neo", "gptj"):
        assert_as_exact(ours, theirs, logits_of(hugging.double()), FUSED if family == "gpt_neo" else 3)
    else:
        assert torch.equal(ours, theirs)


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
    with pytest.raises(ConfigError) as error:
        load_model(str(saved), device=device)
    there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
    alone = "" if torch.version.cuda else ", with a build of torch for the CPU alone"
    assert str(error.value) == (
        f"model.device '{device}' cannot be used. This machine has {there}{alone}. Give one of these, or auto."
    )


# What is refused


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./no-such-folder", "somebody/model", "gpt2", "not a name", "a/b/c"]
)
def test_a_model_that_is_not_there_is_one_error_that_says_what_was_tried(name):
    with pytest.raises(ModelError) as error:
        load_model(name)
    message = str(error.value)
    assert message.startswith(f"{name!r} is neither 'embedded', nor a local folder, nor a model found on the Hugging")
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("status", [None, 503])
def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_read(saved, tmp_path, monkeypatch, status):
    with hub_server() as hub, asked(hub, tmp_path / "cache"):
        commit = hub.put("someone/llama", saved)
        snapshot_download("someone/llama")
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
        if status is None:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        else:
            hub.misbehave = lambda handler: handler.refuse(status) or True
        asked_before = len(hub.requests)
        found = load_model("someone/llama")
        assert found.commit == commit and torch.equal(found.logits(tokens()), load_model(str(saved)).logits(tokens()))
        with pytest.raises(ModelError, match=r"someone/other' is neither .* Check the spelling and the connection"):
            load_model("someone/other")
        assert len(hub.requests) <= asked_before + 2


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy holds no \*\.safetensors weights\. Save them"):
        load_model(str(copy))
    (copy / "tiny.gguf").touch()
    with pytest.raises(ModelError, match=r"weights\. Name the GGUF file in it: .*copy/tiny\.gguf"):
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


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_of_a_model_that_sees_images_the_text_part_is_taken(tmp_path, kind):
    hugging = models_tried.made(kind, {})
    hugging.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    ids = tokens()
    assert type(model.model) is type(hugging) and len(model.sites()) == 4 * len(Part)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), hugging.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    site = Site(1, Part.MLP_OUT)
    clean = model.clean(ids, [site], final=True)
    assert torch.equal(model.replay(clean, {site: clean.activations[site]}).final, clean.final)


@pytest.mark.parametrize("kind", ["jamba", "mamba", "mixtral", "gemma3"])
def test_the_table_of_models_tried_is_what_the_tool_writes(kind):
    known = {kind: values for families in models_tried.FAMILIES.values() for kind, values in families.items()}
    page = models_tried.PAGE.read_text(encoding="utf-8")
    assert models_tried.row(kind, known[kind]) in page.splitlines()
    table = page[page.index(models_tried.BEGIN) : page.index(models_tried.END)]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(known)


def test_an_encoder_without_a_language_modelling_head_is_refused(tmp_path):
    config = hf.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=VOCAB
    )
    hf.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cls\.predictions"):
        load_model(str(tmp_path))


# Weights that are no plain floats

PACKED = "model.layers.1.mlp.up_proj"


def int8(weight):
    """As bitsandbytes writes it: rows scaled to whole numbers."""
    scale = weight.abs().amax(1)
    return {"weight": (weight / scale[:, None] * 127).round().to(torch.int8), "SCB": scale}


def nf4(weight):
    size = weight.numel()
    return {
        "weight": torch.zeros(size // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(size // 64),
        "weight.quant_map": torch.zeros(16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


def gptq(weight):
    rows, columns = weight.shape
    return {
        "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        "scales": torch.ones(1, rows, dtype=torch.float16),
        "g_idx": torch.zeros(columns, dtype=torch.int32),
    }


LAYOUTS = {
    "bitsandbytes": int8,
    "bitsandbytes 4-bit": nf4,
    "gptq": gptq,
    "fp8": lambda weight: {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": lambda weight: {
        "weight_packed": torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32),
        "weight_scale": torch.ones(weight.shape[0], 1),
    },
    "hqq": lambda weight: {"W_q": weight.to(torch.uint8), "scale": torch.ones(1), "zero": torch.ones(1)},
    "quanto 4-bit": lambda weight: {
        "weight._data._data": torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8),
        "weight._scale": torch.ones(weight.shape[0], 1),
        "weight._shift": torch.zeros(weight.shape[0], 1),
    },
    "quanto": lambda weight: {"weight._data": weight.to(torch.int8), "weight._scale": torch.ones(1)},
    "mxfp4": lambda weight: {
        "weight_blocks": torch.zeros(weight.shape[0], 1, 16, dtype=torch.uint8),
        "weight_scales": torch.zeros(weight.shape[0], 1, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_weights_that_no_quantiser_of_transformers_reads_are_refused(copy, layout, told):
    weights = load_file(copy / "model.safetensors")
    packed = LAYOUTS[layout](weights.pop(f"{PACKED}.weight"))
    weights |= {f"{PACKED}.{name}": value for name, value in packed.items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    if told:
        change_config(copy, quantization_config={"quant_method": f"{layout} of nobody's"})
    refused = r"copy is quantised.*lose their scales.*dequantize"
    unread = "|copy cannot be loaded .*ignore_mismatched_sizes" if told else ""  # where the shapes are others too
    with pytest.raises(ModelError, match=refused + unread) as error:
        load_model(str(copy))
    words = [f"by {layout} of nobody's (quantization_config", "mismatched"] if told else [PACKED]
    assert any(word in str(error.value) for word in words)


def test_quantised_weights_in_several_files_are_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size=8000)
    last = max(tmp_path.glob("*.safetensors"))
    weights = load_file(last)
    name = next(name for name in weights if weights[name].dim() == 2)
    save_file(weights | {name: weights[name].to(torch.int8)}, last, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"is quantised: {last.name} stores {name} as I8"):
        load_model(str(tmp_path))


def test_whole_numbers_that_are_no_weights_do_not_matter(copy, llama):
    weights = load_file(copy / "model.safetensors")
    weights |= {"model.layers.0.self_attn.masked_bias": torch.ones(4, 4, dtype=torch.bool)}
    weights |= {"model.position_ids": torch.arange(16)[None]}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(str(copy)).logits(tokens()), logits_of(llama))


class Scaled(torch.Tensor):
    """A tensor with arithmetic of its own, as torchao and quanto make them."""


def whole_numbers(module):
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)


def packed_buffer(module):
    module.register_buffer("qweight", torch.zeros(2, 16, dtype=torch.int32))


def own_arithmetic(module):
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Scaled), requires_grad=False)


@pytest.mark.parametrize("change", [whole_numbers, packed_buffer, own_arithmetic])
def test_a_model_in_memory_with_quantised_weights_is_refused_and_left_alone(change):
    hugging = build("llama")
    change(hugging.get_submodule(PACKED))
    before = {name: (type(value.data), value.dtype) for name, value in hugging.state_dict(keep_vars=True).items()}
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM is quantised: {PACKED}\.q?weight is"):
        LanguageModel(hugging, name="LlamaForCausalLM")
    assert before == {
        name: (type(value.data), value.dtype) for name, value in hugging.state_dict(keep_vars=True).items()
    }


def of_package(base, module):
    """A class as that package makes them, which need not be installed."""
    return type(base.__name__, (base,), {"__module__": module})


@pytest.mark.parametrize("package", ["optimum.quanto.nn.qlinear", "bitsandbytes.nn.modules", "torch.ao.nn.quantized"])
def test_modules_that_quantise_as_they_compute_are_refused(package):
    """Such as quanto's before they are frozen, whose parameters still are plain floats."""
    hugging = build("llama")
    hugging.get_submodule(PACKED).__class__ = of_package(torch.nn.Linear, package)
    with pytest.raises(ModelError, match=rf"mine is quantised: {PACKED} is a {package}\.Linear"):
        LanguageModel(hugging, name="mine")


def test_a_model_that_says_it_is_quantised_is_refused():
    hugging = build("llama")
    hugging.is_quantized = True
    with pytest.raises(ModelError, match="mine is quantised"):
        LanguageModel(hugging, name="mine")


# Adapters


@pytest.mark.parametrize("installed", [True, False])
def test_an_adapter_beside_a_model_is_refused_whether_or_not_peft_is_installed(copy, monkeypatch, installed):
    for place in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{place}.is_peft_available", lambda: installed)
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/base"}))
    save_file({"lora_A.weight": torch.zeros(1)}, copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds an adapter of 'somebody/base'.*beside.*merge_and_unload"):
        load_model(str(copy))


@pytest.mark.parametrize("config", [{}, [], {"base_model_name_or_path": 1}])
def test_an_adapter_that_names_no_base_is_refused(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"is an adapter.*not a model.*does not say of which.*merge_and_unload"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("package", ["peft.tuners.lora.layer", "adapters.methods.lora"])
@pytest.mark.parametrize("derived", [False, True])
def test_a_model_in_memory_with_an_adapter_in_it_is_refused(package, derived):
    """peft puts a module of its own in the place of each that it adapts, whether one is switched on or not."""
    hugging = build("llama")
    kind = of_package(torch.nn.Linear, package)
    hugging.get_submodule(PACKED).__class__ = of_package(kind, "somebody.elses") if derived else kind
    with pytest.raises(
        ModelError, match=rf"mine holds an adapter.*Linear at {PACKED}\).*load it again.*merge_and_unload"
    ):
        LanguageModel(hugging, name="mine")


def test_a_model_in_memory_that_an_adapter_wraps_is_refused():
    """peft wraps the whole model for adapters of prompts and prefixes, and leaves its modules as they are."""
    hugging = build("llama")
    hugging.__class__ = of_package(type(hugging), "peft.peft_model")
    with pytest.raises(ModelError, match=r"mine holds an adapter.*\(peft\.peft_model\.\w+\).*Prompts and prefixes"):
        LanguageModel(hugging, name="mine")


# Sites that are not offered


def test_the_command_that_lists_sites_says_which_are_not_offered_and_why(tmp_path):
    shared = {"num_kv_shared_layers": 2, "layer_types": ALTERNATING, "head_dim": 8}
    shared |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB}
    build(hf.Gemma4TextConfig(**GROUPED | shared, global_head_dim=8)).save_pretrained(tmp_path)
    result = ran("sites", tmp_path)
    assert "blocks.0.hook_resid_pre" in result.stdout and "blocks.1.hook_resid_pre" not in result.stdout
    assert re.search(r"blocks\.1\.hook_resid_pre: not offered: .*residual stream", result.stderr)


# Why there is no tokenizer


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({}, "holds no file of one"),
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "only its special tokens"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}}}, "as Python code"),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, "tokenizer.model": "?"}, "not installed"),
        ({"tokenizer_config.json": {}, "tokenizer.json": "{"}, "cannot be read"),
    ],
    ids=["none", "special tokens", "code", "package", "damaged"],
)
def test_why_a_model_has_no_tokenizer_is_told(llama, tmp_path, files, cause, monkeypatch):
    if cause == "not installed":  # whatever is installed here
        monkeypatch.setattr("endwise.models.loading.AutoTokenizer.from_pretrained", needs_sentencepiece)
    llama.save_pretrained(tmp_path / "model")
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    model = load_model(str(tmp_path / "model"))
    assert model.tokenizer is None
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 30)
    with pytest.raises(DataError) as error:
        corpora_for(model, DataConfig(source=str(tmp_path / "a.jsonl")), training_tokens=16, evaluation_tokens=16)
    assert re.search(f"no tokenizer.*There is none because .*{cause}", str(error.value))


def needs_sentencepiece(*_, **__):
    raise ImportError("LlamaTokenizer requires the SentencePiece library")


# Numbers that are none


def test_a_tokenizer_in_python_reads_text_too(tmp_path):
    """One that no file of the tokenizers library stands for, as ByT5's bytes."""
    build(hf.LlamaConfig(**GROUPED | {"vocab_size": 400})).save_pretrained(tmp_path / "model")
    hf.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    assert_reads_text(tmp_path)


def test_a_tiktoken_file_is_read(tmp_path):
    pytest.importorskip("tiktoken")
    build(hf.LlamaConfig(**GROUPED | {"vocab_size": 400})).save_pretrained(tmp_path / "model")
    pieces = [bytes([byte]) for byte in range(256)] + [b" a", b"te", b"xt", b"text"]
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (tmp_path / "model" / "tiktoken.model").write_text("\n".join(lines))
    end = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    config["added_tokens_decoder"] = {"270": {**end, "normalized": False}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    assert_reads_text(tmp_path)


def assert_reads_text(folder):
    text = [f"a small text, number {number}" for number in range(30)]
    (folder / "text.txt").write_text("\n\n".join(text))
    model = load_model(str(folder / "model"))
    data = DataConfig(source=str(folder / "text.txt"), context=8, cache=folder / "cache")
    ids = corpora_for(model, data, training_tokens=64, evaluation_tokens=8).train.documents.tokens.tolist()
    expected = [
        [*model.tokenizer(each, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id] for each in text
    ]
    assert ids == [token for each in expected for token in each] and len(ids) > 200


def test_weights_that_hold_nan_are_told_as_such(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold NaN or infinity \(model\.layers\.2\.mlp\.up_proj\.weight\)"):
        load_model(str(copy))


def test_an_overflow_in_float16_is_told_as_such(copy):
    weights = load_file(copy / "model.safetensors")
    for part in ("up_proj", "down_proj"):
        weights[f"model.layers.2.mlp.{part}.weight"] *= 3000
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    load_model(str(copy))
    with pytest.raises(ModelError, match=r"blocks\.2\.hook_mlp_out overflows float16.*bfloat16 or float32"):
        load_model(str(copy), dtype="float16")


# Threads


def test_threads_load_at_once(saved, llama):
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: load_model(str(saved)), range(4)))
    for model in models:
        assert torch.equal(model.logits(tokens()), logits_of(llama))


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
    rounded = deepcopy(llama)
    for parameter in rounded.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half().float()
    assert_as_exact(model.logits(tokens()), logits_of(rounded), logits_of(rounded.double()))
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


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.EACCES, "Give this user permission"), (errno.EIO, "disk, which reports"), (errno.ENOSPC, "Free space")],
)
@pytest.mark.parametrize("there", [True, False], ids=["folder", "hub"])
def test_what_the_system_refuses_is_told_with_its_own_remedy(tmp_path, code, told, there):
    said = explained(str(tmp_path) if there else "org/model", OSError(code, os.strerror(code), "config.json"))
    assert told in said and os.strerror(code) in said and "spelling" not in said
