"""Every recipe that ships loads and trains, and the paper's recipes say what the paper says."""

from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf

from endwise import LanguageModel, RunConfig, train
from endwise.common.errors import ConfigError
from endwise.config.recipes import find_recipe, recipe_names
from endwise.runs.folder import RunFolder

VOCAB, CONTEXT, WIDTH = 31, 16, 16
PAPER = {
    # layer: kind: (λ, β), table 2 and its settings
    2: {"local": (0.8, 0.0), "e2e": (0.5, 0.0), "e2e_ds": (10, 2.5)},
    6: {"local": (4, 0.0), "e2e": (3, 0.0), "e2e_ds": (50, 2.5)},
    10: {"local": (6, 0.0), "e2e": (1.5, 0.0), "e2e_ds": (1.75, 0.05)},
}


@cache
def shrunk(name: str) -> LanguageModel:
    """Random weights in the architecture of the model that a recipe names, with its number of layers."""
    torch.manual_seed(0)
    gpt2 = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": WIDTH, "n_head": 2}
    neo = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "hidden_size": WIDTH, "num_heads": 2}
    return LanguageModel(
        {
            "openai-community/gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=12, **gpt2)),
            "embedded": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=6, **gpt2)),
            "roneneldan/TinyStories-1M": lambda: hf.GPTNeoForCausalLM(
                hf.GPTNeoConfig(num_layers=8, attention_types=[[["global", "local"], 4]], **neo)
            ),
        }[name]()
    )


def often(name: str) -> bool:
    """One layer of GPT-2 stands for all three, whose recipes differ in weights."""
    return not name.startswith(("gpt2-small-layer2-", "gpt2-small-layer10-"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if often(name) else pytest.mark.slow) for name in recipe_names()]
)
@pytest.mark.usefixtures("fitted_on_little")
def test_two_steps(name, tmp_path):
    recipe = RunConfig.read(find_recipe(name))
    for side, count in (("train", 8192), ("heldout", 512)):
        np.save(tmp_path / f"{side}.npy", np.random.default_rng(0).integers(1, VOCAB, count).astype(np.uint16))
    values = recipe.model_dump()
    values["data"] |= {"source": str(tmp_path / "train.npy"), "heldout": str(tmp_path / "heldout.npy")}
    values["data"] |= {"column": None, "streaming": False, "context": CONTEXT}
    values["training"]["tokens"] = 2 * recipe.training.batch * CONTEXT
    values["evaluation"] |= {"tokens": 64, "during_training_tokens": 64}
    values["out"] = tmp_path / "run"
    run = train(values, model=shrunk(recipe.model.name), display=False)
    last = RunFolder.open(run.folder).metrics()[-1]
    assert last["step"] == 2
    assert last["heldout"]["l0"] > 0
    assert run.sae.d_sae == recipe.dictionary.ratio * WIDTH


@pytest.mark.parametrize("layer", PAPER)
@pytest.mark.parametrize("kind", ["local", "e2e", "e2e_ds"])
def test_gpt2_recipes_are_the_papers(layer, kind):
    recipe = RunConfig.read(find_recipe(f"gpt2-small-layer{layer}-{kind}"))
    coefficient, beta = PAPER[layer][kind]
    assert (recipe.site, recipe.objective.kind) == (f"blocks.{layer}.hook_resid_pre", kind)
    assert recipe.objective.sparsity.coefficient == coefficient
    assert recipe.objective.weights["downstream_mse"] == beta
    assert recipe.objective.weights["kl"] == {"local": 0, "e2e": 1, "e2e_ds": 0.5}[kind]
    training = recipe.training
    assert (training.tokens, training.batch * recipe.data.context) == (400_000 * 1024, 16 * 1024)
    assert (training.learning_rate, training.gradient_clip, training.floor) == (5e-4, 10, 0.1)
    assert training.warmup * 400_000 == pytest.approx(20_000)
    assert recipe.dictionary.ratio == 60


@pytest.mark.parametrize(
    ("kind", "samples", "rate"), [("local", 400_000, 1e-2), ("e2e", 450_000, 1e-3), ("e2e_ds", 250_000, 1e-3)]
)
def test_tinystories_recipes_are_the_papers(kind, samples, rate):
    recipe = RunConfig.read(find_recipe(f"tinystories-1m-layer4-{kind}"))
    training = recipe.training
    assert (training.tokens, training.batch) == (samples * 512, 20)
    assert (training.learning_rate, training.gradient_clip) == (rate, 1)
    assert training.warmup * samples == pytest.approx(20_000, rel=2e-3)
    assert recipe.objective.weights["downstream_mse"] == (1000 if kind == "e2e_ds" else 0)
    assert recipe.dictionary.ratio == 50


def test_names_and_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("site: blocks.0.hook_resid_pre")
    assert find_recipe(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    assert find_recipe("gpt2-small-layer6-e2e").name == "gpt2-small-layer6-e2e.yaml"
    with pytest.raises(ConfigError, match="did you mean embedded-layer3-e2e"):
        find_recipe("embeded-layer3-e2e")
    with pytest.raises(ConfigError, match="recipes that ship: embedded"):
        find_recipe("zzz")
