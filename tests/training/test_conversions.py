"""Finished dictionaries taken over by other architectures: the same function where it can be, measured where not."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import endwise
from endwise import SAE
from endwise.common.errors import ConfigError
from endwise.config.dictionary import ARCHITECTURES
from endwise.config.places import read_recipe
from endwise.config.recipes import find_recipe
from endwise.config.run import RunConfig
from endwise.dictionaries import DenseLatents, LinearSAE
from endwise.sweeps.points import Point, fingerprint, points_of
from endwise.sweeps.sweep_config import SweepConfig
from endwise.training.taking_over import TakenOver

D, F = 12, 60


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(**more):
    lengths = torch.linspace(0.2, 3, F)[:, None]
    shared = {"W_enc": drawn(D, F) / 3, "W_dec": drawn(F, D, seed=1) * lengths, "b_dec": drawn(D, seed=2)}
    return {**shared, "b_enc": drawn(F, seed=3) / 4, **more}


def finished(architecture):
    """One of directions of many norms, as a file gives it."""
    tensors = weights(threshold=drawn(F, seed=4).abs() / 2)
    if architecture == "gated":
        del tensors["b_enc"], tensors["threshold"]
        tensors |= {"b_gate": drawn(F, seed=5) / 3, "b_mag": drawn(F, seed=6) / 3, "r_mag": drawn(F, seed=7) / 3}
    settings = {"d_in": D, "d_sae": F, "k": 8}
    return ARCHITECTURES[architecture].from_tensors(tensors, settings).requires_grad_(False).eval()


def taken(sae, architecture, **settings):
    section = ARCHITECTURES[architecture].Config
    return ARCHITECTURES[architecture].continuing(sae, section(architecture=architecture, size=F, **settings))


def same(one, other):
    """To 1e-5 of the outputs' size."""
    x = drawn(500, D, seed=9)
    size = float(one(x).detach().square().mean().sqrt())
    torch.testing.assert_close(other(x).detach() / size, one(x).detach() / size, rtol=0, atol=1e-5)
    assert torch.equal(other.encode(x).dense() != 0, one.encode(x).dense() != 0)


KEPT = [
    ("standard", "standard"),
    ("standard", "jumprelu"),
    ("standard", "gated"),
    ("jumprelu", "jumprelu"),
    ("jumprelu", "gated"),
    ("gated", "gated"),
    ("gated", "jumprelu"),
]


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize(("source", "architecture"), KEPT)
def test_the_function_is_kept(source, architecture, norm):
    sae = finished(source)
    result = taken(sae, architecture, decoder_norm=norm)
    same(sae, result.eval())
    assert (
        all(parameter.requires_grad for parameter in result.parameters())
        and type(result) is ARCHITECTURES[architecture]
    )
    if norm == "unit":
        torch.testing.assert_close(result.W_dec.detach().norm(dim=1), torch.ones(F))
    with torch.no_grad():
        result.see_first(drawn(500, D, seed=9), drawn(500, D, seed=9))
    same(sae, result)


def test_a_chain_of_them_ends_where_it_began():
    sae = finished("gated")
    result = taken(taken(taken(sae, "jumprelu").eval(), "gated").eval(), "jumprelu")
    same(sae, result.eval())


def test_taken_over_again_after_it_was_saved(tmp_path):
    sae = finished("gated")
    taken(sae, "jumprelu").save(tmp_path)
    same(sae, SAE.load(tmp_path))
    assert "threshold" in load_file(tmp_path / "sae_weights.safetensors")


class KLargest(LinearSAE):
    """The 8 largest of each row, which no thresholds choose."""

    architecture = "k_largest"

    def encode(self, x, counted=None):
        z = self.before(x).relu()
        kept = z.topk(8, dim=-1)
        return DenseLatents(torch.zeros_like(z).scatter(-1, kept.indices, kept.values))


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_without_thresholds_one_is_fitted_at_which_as_many_are_active(architecture):
    sae = KLargest.from_tensors(weights(), {"d_in": D, "d_sae": F}).eval()
    x, other = drawn(2000, D, seed=9), drawn(2000, D, seed=10)
    result = taken(sae, architecture).eval()
    assert result.first_tokens >= 8192
    with torch.no_grad():
        result.see_first(x, x)
    assert float(result.encode(x).l0().mean()) == pytest.approx(float(sae.encode(x).l0().mean()), abs=1e-3)
    assert float(result.encode(other).l0().mean()) == pytest.approx(8, rel=0.05)
    threshold = result.as_thresholded()["threshold"]
    torch.testing.assert_close(threshold, threshold[:1].expand(F), rtol=1e-4, atol=1e-5)
    found = TakenOver.of(sae, result, x, x)
    assert not found.kept and found.l0_before == pytest.approx(found.l0, abs=1e-3) and found.error > 0
    assert "taken over from k_largest to" in str(found) and "L0 8 -> 8" in str(found)
    before = result.encode(x).dense()
    with torch.no_grad():
        result.see_first(other, other)  # once is enough
    assert torch.equal(result.encode(x).dense(), before)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("source", ["standard", "jumprelu", "gated", "topk"])
def test_one_threshold_is_kept_and_others_become_one(source, architecture):
    sae = finished(source)
    if source == "jumprelu":
        sae.threshold.fill_(0.3)
    x = drawn(2000, D, seed=9)
    result = taken(sae, architecture, k=8, decoder_norm="free").eval()
    with torch.no_grad():
        result.see_first(x, x)
    found = TakenOver.of(sae, result, x, x)
    assert found.kept == (source in ("standard", "jumprelu"))
    assert source != "topk" or found.l0 == pytest.approx(found.l0_before, abs=0.01)


def test_what_no_architecture_knows_is_one_clear_error():
    import counting_sae

    other = counting_sae.CountingSAE(D, F, 0.1, 0.5)
    for architecture in ("standard", "jumprelu", "gated"):
        with pytest.raises(
            ConfigError, match=r"a counting SAE cannot be trained on as .*dictionary\.architecture=counting"
        ):
            taken(other, architecture)


SHIPPED = ("embedded-layer3-local", "embedded-layer3-e2e_ds", "gpt2-small-layer6-e2e")


def overridden(name, *overrides):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = RunConfig.read(find_recipe(name), list(overrides))
    return config, [str(each.message) for each in caught]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("architecture", ["gated", "jumprelu", "relu"])
def test_any_recipe_becomes_any_architecture_by_overrides(name, architecture):
    config, said = overridden(name, f"dictionary.architecture={architecture}")
    assert config.dictionary.architecture == ARCHITECTURES[architecture].architecture and not said


def test_keys_of_the_old_architecture_are_left_out_in_one_line(tmp_path):
    jump = tmp_path / "jump.yaml"
    own = {"bandwidth": 0.3, "penalty": "quadratic", "target_l0": 5.0}
    jump.write_text(RunConfig.build(recipe("x", "jumprelu", dictionary=own)).to_yaml())
    config, said = overridden(str(jump), "dictionary.architecture=gated", "dictionary.gate_reconstruction=0.5")
    assert (
        config.dictionary == RunConfig.build(recipe("x", "gated", dictionary={"gate_reconstruction": 0.5})).dictionary
    )
    (line,) = said
    assert all(f"dictionary.{key}" in line for key in own) and "a gated dictionary does not have" in line
    same, said = overridden(str(jump), "dictionary.architecture=jumprelu", "dictionary.bandwidth=0.2")
    assert same.dictionary.bandwidth == 0.2 and not said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["dictionary.architecture=gated", "dictionary.bandwidth=0.2"], r"dictionary\.bandwidth: there is no such key"),
        (["dictionary.architecture=gated", "dictionary.bandwith=0.2"], r"dictionary\.bandwith: there is no such key"),
        (["dictionary.bandwith=0.2"], "did you mean 'bandwidth'"),
        (["dictionary.architecture=quantum"], "quantum"),
    ],
)
def test_a_key_that_nothing_has_is_still_refused(tmp_path, overrides, says):
    jump = tmp_path / "jump.yaml"
    jump.write_text(RunConfig.build(recipe("x", "jumprelu")).to_yaml())
    with pytest.raises(ConfigError, match=says):
        overridden(str(jump), *overrides)
    jump.write_text(jump.read_text().replace("bandwidth", "bandwith"))
    with pytest.raises(ConfigError, match="bandwith: there is no such key"):
        overridden(str(jump), "dictionary.architecture=gated")


@pytest.mark.parametrize("read", [RunConfig.read, read_recipe])
def test_a_recipe_is_overridden_alike_whoever_reads_it(tmp_path, read):
    jump = tmp_path / "jump.yaml"
    jump.write_text(RunConfig.build(recipe("x", "jumprelu", dictionary={"bandwidth": 0.3})).to_yaml())
    with pytest.warns(UserWarning, match=r"dictionary\.bandwidth.* left out, which a gated dictionary"):
        config = read(jump, ["dictionary.architecture=gated", "dictionary.ratio=2"])
    assert (config.dictionary.architecture, config.dictionary.size, config.dictionary.ratio) == ("gated", None, 2)
    assert read(find_recipe(SHIPPED[0]), ["dictionary.size=64"]).dictionary.features(128) == 64
    for both in (["dictionary.ratio=2", "dictionary.size=64"], ["dictionary.size=null"]):
        with pytest.raises(ConfigError, match="give exactly one of size"):
            read(jump, both)


def test_what_stands_for_every_place_is_overridden_alike(tmp_path):
    values = recipe("x", "jumprelu", dictionary={"bandwidth": 0.3})
    values["places"] = [{"site": values.pop("site")}, {"site": "blocks.2.hook_resid_pre", "dictionary": {"size": 9}}]
    (tmp_path / "two.yaml").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"dictionary\.bandwidth.* left out"):
        config = read_recipe(tmp_path / "two.yaml", ["dictionary.architecture=gated", "dictionary.ratio=2"])
    assert [type(each.dictionary).__name__ for each in config.places] == ["GatedConfig"] * 2
    assert [each.dictionary.features(128) for each in config.places] == [256, 9]


def test_a_grid_over_architectures_gives_each_its_own_keys():
    grid = {
        "dictionary.architecture": ["standard", "jumprelu", "gated"],
        "dictionary.bandwidth": [0.3, 0.6],
        "dictionary.gate_reconstruction": 0.5,
        "objective.sparsity.coefficient": [1.0, 2.0],
    }
    sweep = SweepConfig.build({"recipe": recipe("x", "jumprelu"), "grids": [grid]})
    points = [point.config for point in points_of(sweep)]
    counts = {name: [each.dictionary.architecture for each in points].count(name) for name in ("standard", "gated")}
    assert len(points) == 2 + 4 + 2 and counts == {"standard": 2, "gated": 2}
    assert {each.dictionary.gate_reconstruction for each in points if each.dictionary.architecture == "gated"} == {0.5}
    with pytest.raises(ConfigError, match="bandwith"):
        points_of(SweepConfig.build({"recipe": recipe("x", "jumprelu"), "grids": [grid | {"dictionary.bandwith": 1}]}))


def test_architectures_at_their_defaults_are_different_points():
    """Each section's default is its own name."""
    names = ["standard", "jumprelu", "gated"]
    configs = [RunConfig.build(recipe("x", name)) for name in names]
    assert len({fingerprint(config) for config in configs}) == len({Point(config).key for config in configs}) == 3
    assert all(RunConfig.build(config.model_dump(mode="json")) == config for config in configs)
    sweep = SweepConfig.build({"recipe": recipe("x", "standard"), "grids": [{"dictionary.architecture": names}]})
    assert [point.config.dictionary.architecture for point in points_of(sweep)] == names


def recipe(out, architecture, **more):
    dictionary = {"architecture": architecture, "size": 200, **more.pop("dictionary", {})}
    return {
        "site": "blocks.4.hook_resid_pre",
        "dictionary": dictionary,
        "objective": {"kind": "local", "sparsity": {"coefficient": 0.3}},
        "data": {"context": 32},
        "training": {"tokens": 512, "batch": 4, "learning_rate": 1e-3, "log_every": 1},
        "evaluation": {"tokens": 512, "during_training_tokens": 128, "bootstrap": 20},
        "out": str(out),
        **more,
    }


@pytest.fixture(scope="module")
def model():
    return endwise.load_model("embedded")


@pytest.fixture(scope="module")
def jump(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "run"
    dictionary = {"threshold_init": 1.0}
    return endwise.train(recipe(out, "jumprelu", dictionary=dictionary), model=model, display=False)


@pytest.mark.parametrize("architecture", ["gated", "standard"])
def test_a_run_says_what_its_start_changed(model, jump, architecture, tmp_path, capsys):
    """Without thresholds more features are active than were; with gates, none more."""
    config = recipe(tmp_path / "run", architecture, init_from=str(jump.folder))
    run = endwise.train(config, model=model)
    record = json.loads((run.folder / "start.json").read_text())
    said = [line for line in capsys.readouterr().err.splitlines() if "init_from: taken over" in line]
    assert record["source"] == "jumprelu" and record["architecture"] == architecture
    if architecture == "gated":
        assert record["kept"] and not said and record["l0"] == pytest.approx(record["l0_before"], abs=0.01)
        assert record["error"] == pytest.approx(record["error_before"], rel=1e-4)
    else:
        assert not record["kept"] and record["l0"] > record["l0_before"] + 1 and len(said) == 1
        assert f"L0 {record['l0_before']:.4g} -> {record['l0']:.4g}" in said[0]


def test_what_a_start_changed_is_what_both_compute(model, jump, tmp_path):
    run = endwise.train(recipe(tmp_path / "run", "standard", init_from=str(jump.folder)), model=model, display=False)
    record = json.loads((run.folder / "start.json").read_text())
    config = RunConfig.build(recipe("x", "standard"))
    corpora = endwise.corpora_for(model, config.data, training_tokens=512, evaluation_tokens=512)
    order = endwise.tokens.BatchOrder(corpora.train, 4, 0, 1)
    site = model.site("blocks.4.hook_resid_pre")
    batches = [corpora.train.batch(order[step]) for step in range(min(len(order), 4096 // 128))]
    x = torch.cat([model.clean(batch.tokens, [site]).activations[site][batch.mask] for batch in batches])[
        :4096
    ].double()
    w = {key: t.double() for key, t in load_file(jump.folder / "sae" / "sae_weights.safetensors").items()}
    z = x @ w["W_enc"] + w["b_enc"]
    for name, f in (("l0_before", z * (z > w["threshold"])), ("l0", z.clamp(min=0))):
        assert record[name] == pytest.approx(float((f > 0).sum(1).double().mean()), rel=1e-3)
        error = (f @ w["W_dec"] + w["b_dec"] - x).square().sum() / (x - x.mean(0)).square().sum()
        assert record[name.replace("l0", "error")] == pytest.approx(float(error), rel=1e-3)
    assert record["tokens"] == len(x)
