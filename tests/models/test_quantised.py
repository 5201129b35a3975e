"""Models that a quantiser of transformers' packed are loaded, spliced, trained on and evaluated as they are."""

import copy
import json
import warnings

import pytest
import torch
import transformers as hf

from endwise import LanguageModel, RunConfig, Site, evaluate, load_model, train
from endwise.common.digests import tensor_parts
from endwise.common.errors import ConfigError, ModelError
from endwise.models.plain_weights import QUANTISERS as OF_RECIPES
from endwise.models.plain_weights import keep_differentiable, quantisation, refuse_unpacked
from endwise.models.sites import Part
from endwise.training.planning.plan import plan
from small_gpt2 import recipe
from tiny_models import VOCAB, randomize, relative, tokens

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"vocab_size": VOCAB, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return hf.TorchAoConfig(Int8WeightOnlyConfig())


QUANTISERS = {
    "bitsandbytes 8-bit": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4-bit": lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao 8-bit": torchao,
    "optimum.quanto 8-bit": lambda: hf.QuantoConfig(weights="int8"),
}
SAVED = ["bitsandbytes 8-bit", "bitsandbytes 4-bit", "torchao 8-bit"]
"""Those whose packed weights transformers writes."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("models") / "plain", hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def packed(folder, quantiser):
    pytest.importorskip(quantiser.partition(" ")[0])
    settings = {"quantization_config": QUANTISERS[quantiser](), "device_map": {"": "cpu"}, "dtype": torch.float32}
    return hf.AutoModelForCausalLM.from_pretrained(folder, **settings)


def gradient(model, site, ids):
    clean = model.clean(ids, [site])
    value = clean.activations[site].clone().requires_grad_()
    model.replay(clean, {site: value}).final.square().sum().backward()
    return value.grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_it_is_spliced_and_gradients_go_through(plain, quantiser):
    hugging, ids = packed(plain, quantiser), tokens()
    model, original = LanguageModel(hugging, name="packed"), load_model(str(plain))
    assert model.sites() == original.sites()
    with torch.no_grad():
        assert torch.equal(model.logits(ids), hugging(input_ids=ids).logits)
    site = Site(1, Part.RESID_PRE)
    clean = model.clean(ids, [site], final=True)
    assert relative(model.replay(clean, {site: clean.activations[site]}).final, clean.final) < 1e-3
    assert relative(model.logits(ids), original.logits(ids)) < 0.5
    assert relative(gradient(model, site, ids), gradient(original, site, ids)) < 1
    assert not any(parameter.requires_grad for parameter in hugging.parameters())
    assert model.weights_digest() != original.weights_digest()
    with pytest.raises(ModelError, match=r"packed is quantised and cannot be copied in bf16.*model\.dtype bfloat16"):
        model.in_bfloat16()


def unpacked(hugging):
    """A plain model with the values that the quantiser made of the weights."""
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))
    if hugging.config.quantization_config.quant_method == "bitsandbytes":
        weights = copy.deepcopy(hugging).dequantize().state_dict()
    else:
        weights = {
            name: getattr(each, "dequantize", lambda each=each: each)() for name, each in hugging.state_dict().items()
        }
    plain.load_state_dict({name: each.float() for name, each in weights.items()})
    return plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantiser", SAVED[1:])
def test_the_gradient_is_that_of_the_unpacked_weights(plain, quantiser):
    """Also after passes without gradients, for which bitsandbytes repacks 4-bit weights on some CPUs. LLM.int8 packs
    what its layers are given too, and has no such twin.
    """
    hugging, site = packed(plain, quantiser), Site(1, Part.RESID_PRE)
    theirs = gradient(LanguageModel(unpacked(hugging), name="unpacked"), site, tokens())
    ours = gradient(LanguageModel(hugging, name="packed"), site, tokens())
    assert relative(ours, theirs) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantiser", SAVED)
def test_a_folder_of_one_is_trained_on_and_evaluated(plain, made, tmp_path, quantiser):
    hugging, ids = packed(plain, quantiser), tokens()
    hugging.save_pretrained(tmp_path / "packed")
    model = load_model(str(tmp_path / "packed"))
    keep_differentiable(hugging)  # or a pass of its own would take another kernel
    with torch.no_grad():
        assert torch.equal(model.logits(ids), hugging(input_ids=ids).logits)
    config = recipe(tmp_path / "run", tokens=64).model_dump()
    config["model"]["name"] = str(tmp_path / "packed")
    config["data"] |= {"source": str(made / "train.npy"), "heldout": str(made / "heldout.npy"), "context": 8}
    run = train(config, display=False)
    assert torch.isfinite(run.sae.W_enc).all()
    assert 0 < evaluate(run.folder)[run.folder]["ce_clean"] < 20
    assert json.loads((run.folder / "digests.json").read_text())["model"].startswith("files:")
    with pytest.raises(ModelError, match=r"is quantised by .*Plan with the checkpoint that it was made from"):
        plan(type(recipe(tmp_path / "run")).build(config))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OF_RECIPES)
def test_a_recipe_packs_a_checkpoint_as_it_is_loaded(plain, kind):
    theirs, ids = packed(plain, kind.replace("-", " ").removesuffix("bit") + "-bit"), tokens()
    keep_differentiable(theirs)
    model, original = load_model(str(plain), quantization=kind), load_model(str(plain))
    with torch.no_grad():
        assert relative(model.logits(ids), theirs(input_ids=ids).logits) < 1e-5
    sizes = [
        sum(part.nbytes for name, each in of.model.named_parameters() for _, part in tensor_parts(name, each))
        for of in (model, original)
    ]
    assert sizes[0] < sizes[1]


def test_what_cannot_be_packed_is_refused(plain):
    with pytest.raises(ConfigError, match=r"model\.quantization is one of bitsandbytes-8bit, .*given '3bit'"):
        load_model(str(plain), quantization="3bit")
    config = hf.LlamaConfig(**SHAPE, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"it is quantised by gptq .*already\. Unset model\.quantization"):
        quantisation("torchao-8bit", config, torch.float32, "it")
    with pytest.raises(ModelError, match="none of it's weights were packed"):
        refuse_unpacked(hf.AutoModelForCausalLM.from_pretrained(plain), "torchao-8bit", "it")
    values = RunConfig.changed(recipe(plain).model_dump(), {"model.quantization": "torchao-8bit"})
    with pytest.raises(ModelError, match=r"is quantised by torchao-8bit \(model\.quantization\).*Plan with"):
        plan(RunConfig.build(values))


class Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("there is no backward kernel")


class Packed(torch.nn.Linear):
    """As a quantiser's whose kernel has no gradient."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = like.weight
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))

    def forward(self, x):
        return Blocked.apply(super().forward(x))


class Silent(torch.autograd.Function):
    """As a kernel of which PyTorch only warns that it has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        warnings.warn("mine: an autograd kernel was not registered to the Autograd key(s)", stacklevel=2)
        return torch.zeros_like(gradient)


def test_one_with_silently_wrong_gradients_is_refused(plain, monkeypatch):
    hugging = hf.AutoModelForCausalLM.from_pretrained(plain)
    hugging.hf_quantizer = object()
    hugging.model.layers[1].mlp.up_proj = Packed(hugging.model.layers[1].mlp.up_proj)
    monkeypatch.setattr(Blocked, "apply", Silent.apply)
    with pytest.raises(ModelError, match=r"mine is quantised, and no gradient goes .*an autograd kernel was not"):
        LanguageModel(hugging, name="mine")


def test_one_without_gradients_is_refused(plain):
    hugging = hf.AutoModelForCausalLM.from_pretrained(plain)
    hugging.hf_quantizer = object()
    hugging.model.layers[1].mlp.up_proj = Packed(hugging.model.layers[1].mlp.up_proj)
    with pytest.raises(ModelError, match=r"mine is quantised, and no gradient goes through .*no backward kernel"):
        LanguageModel(hugging, name="mine")


def test_a_packed_unembedding_is_refused(plain):
    hugging = hf.AutoModelForCausalLM.from_pretrained(plain)
    hugging.hf_quantizer = object()
    hugging.lm_head.weight = torch.nn.Parameter(hugging.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"mine: its unembedding is quantised .*int8.*modules_to_not_convert"):
        LanguageModel(hugging, name="mine")
