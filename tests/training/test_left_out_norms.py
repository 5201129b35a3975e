"""Positions of outlying norm are left out as if the text's own mask left them out: by everything, by one number."""

import copy
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from endwise import LanguageModel, RunConfig, evaluate, harvest, train, train_places, train_together
from endwise.analysis.directions.measure import measure_directions
from endwise.analysis.importance.measure import measure_importance
from endwise.common.errors import ConfigError, FormatError
from endwise.common.remarks import remarks_on
from endwise.config.places import PlacesConfig
from endwise.dashboard.text import TextReader
from endwise.dictionaries import SAE, ReluSAE
from endwise.evaluation.counting import Counting
from endwise.models.language_model import Clean
from endwise.models.sites import Place, Site
from endwise.runs.folder import RunFolder
from endwise.tokens import Corpora, Corpus
from endwise.training.making import new_trainee
from endwise.training.outliers import Outliers
from endwise.training.step import take_step
from own_training import OwnModel, reading
from small_gpt2 import CONTEXT, LAYERS, SITE, VOCAB, WIDTH, recipe
from spread import launch
from word_tokenizer import word_tokenizer

SINK, MULTIPLE = 7, 10.0
"""A token whose embedding is so large that the residual stream has no other such norm."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""Rounding of gradients that are divided by the number of tokens at another place of the sum."""
ARCHITECTURES = {
    "standard": {"size": 40},
    "batchtopk": {"architecture": "batchtopk", "size": 40, "k": 3},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    gpt2 = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(5)
        gpt2.transformer.wte.weight[SINK] *= 1000
    return LanguageModel(gpt2, None)


@pytest.fixture(scope="module")
def named(corpora):
    """The same text, whose own mask leaves the token out."""

    def without(corpus):
        return Corpus(corpus.documents, replace(corpus.layout, left_out=((SINK, 0),)), corpus.name, len(corpus))

    return Corpora(without(corpora.train), without(corpora.heldout))


def a_recipe(out, kind="e2e_ds", architecture="standard", multiple: float | None = MULTIPLE, **training):
    values = recipe(out, kind, **{"checkpoint_every": 5, "log_every": 1, **training}).model_dump(mode="json")
    values["dictionary"] = ARCHITECTURES[architecture]
    values["evaluation"]["bootstrap"] = 5
    if architecture != "standard":
        values["objective"].pop("sparsity")
    return RunConfig.build(values | {"data": values["data"] | {"leave_out_norms": multiple}})


def start(model, corpora, config, **how):
    return train(config, model=model, corpora=corpora, display=False, **how)


@pytest.fixture(scope="module")
def run(model, corpora, tmp_path_factory):
    run = start(model, corpora, a_recipe(tmp_path_factory.mktemp("norms") / "run"))
    evaluate([run.folder], model=model, corpora=corpora)
    return run


@pytest.fixture(scope="module")
def twin(run, model, named, tmp_path_factory):
    """The same weights without a limit, for a text whose mask leaves out what the limit does."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    shutil.copytree(run.folder, folder)
    config = a_recipe(folder, multiple=None)
    (folder / "config.yaml").write_text(config.to_yaml())
    cfg = json.loads((folder / "sae/cfg.json").read_text())
    del cfg["metadata"]["endwise"]["norm_limit"]
    (folder / "sae/cfg.json").write_text(json.dumps(cfg))
    evaluate([folder], model=model, corpora=named)
    return folder


def assert_close(ours, theirs, where=""):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5, nan_ok=True), where
    else:
        assert ours == theirs, where


# The definition


def test_the_limit_is_a_multiple_of_the_median():
    norms = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 100.0, 31.0])
    found = Outliers.of(Place.of(Site.parse(SITE)), 8.0, norms)
    assert (found.median_norm, found.limit, found.share, found.tokens) == (4.0, 32.0, pytest.approx(1 / 7), 7)
    assert found.many and "14.29%" in str(found)
    for norms in (torch.tensor([0.0, 0.0, 3.0]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ConfigError, match=r"data\.leave_out_norms is 8, .* on [23] training tokens"):
            Outliers.of(Place.of(Site.parse(SITE)), 8.0, norms)


@pytest.mark.parametrize("multiple", [1, 0.5, -3, math.nan, math.inf])
def test_other_multiples_are_refused(multiple, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.leave_out_norms"):
        a_recipe(tmp_path, multiple=multiple)


def test_rows_within_the_limit():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.1], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
    sae, counted = ReluSAE(2, 4, seed=0), torch.tensor([True, True, True, True, False])
    assert sae.within_limit(x, counted) is counted
    sae.leave_out_above(math.nan)
    assert torch.equal(sae.within_limit(x, counted), counted)
    sae.leave_out_above(5.0)
    assert sae.within_limit(x, counted).tolist() == [True, False, True, False, False]  # NaN is not hidden


def test_of_a_transcoder_the_norm_of_what_is_read_counts():
    reads, writes = Site.parse("blocks.1.mlp_in"), Site.parse("blocks.1.hook_mlp_out")
    sae, mask = ReluSAE(2, 4, seed=0), torch.ones(1, 3, dtype=torch.bool)
    sae.leave_out_above(2.0)
    place = Place(reads, writes)
    clean = Clean(
        torch.zeros(1, 3, dtype=torch.int64),
        {reads: torch.tensor([[[1.0], [9], [1]]]), writes: torch.ones(1, 3, 1)},
        None,
    )
    counting = Counting.of([(place, sae)])
    assert counting.limits == ((reads, 2.0),) and counting.sites == {reads}
    assert counting.of_these(clean, mask).tolist() == [[True, False, True]]
    assert Counting.of([(place, ReluSAE(2, 4, seed=0))]).of_these(clean, mask) is mask


# A step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "accumulation"), [("local", 1), ("e2e_ds", 1), ("e2e_ds", 2)])
def test_a_step_is_that_of_a_masked_text(kind, accumulation, architecture, model, corpora, named, tmp_path):
    if architecture == "batchtopk" and accumulation > 1:
        with pytest.raises(ConfigError, match="accumulation"):
            a_recipe(tmp_path, kind, architecture, accumulation=accumulation)
        return
    found = []
    for text, limit in ((corpora, 100.0), (named, None)):
        trainee = new_trainee(a_recipe(tmp_path, kind, architecture, multiple=limit and MULTIPLE), model, 10)
        trainee.sae.leave_out_above(limit)
        for step in range(3):
            batch = text.train.batch(range(4 * step, 4 * step + 4))
            take_step(model, [trainee], batch, accumulation)
        found.append((trainee.report(), trainee.sae.state_dict()))
    (report, weights), (expected, expected_weights) = found
    tokens = corpora.train.batch(range(8, 12)).tokens
    assert report.pop("left_out") == pytest.approx(float((tokens == SINK).float().mean())) and report
    assert_close(report, expected)
    if architecture == "batchtopk":
        assert report["l0"] == pytest.approx(3)
    weights.pop("norm_limit")
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, **TOLERANCE)


def test_what_left_out_positions_hold_changes_nothing(model, corpora, tmp_path):
    """At a site after which nothing mixes positions, whatever is above the limit gives the same loss and gradient."""
    last = f"blocks.{LAYERS - 1}.hook_resid_post"
    batch, found = corpora.train.batch(range(4)), []
    for held in (1e4, 1e6, math.inf):

        def holding(clean, tokens, held=held, **asked):
            seen = clean(tokens, **asked)
            sinks = (tokens == SINK)[..., None]
            at = {site: value.masked_fill(sinks, held) for site, value in seen.activations.items()}
            return Clean(tokens, at, seen.final)

        config = a_recipe(tmp_path, "e2e").model_copy(update={"site": last})
        trainee = new_trainee(config, model, 10)
        trainee.sae.leave_out_above(100.0)
        take_step(OwnModel(model, holding), [trainee], batch)
        found.append((trainee.report(), trainee.sae.W_dec.clone()))
    for report, weights in found[1:]:
        assert report == found[0][0] and torch.equal(weights, found[0][1])


# A run


def test_a_run_is_that_of_a_masked_text(run, model, named, tmp_path):
    other = start(model, named, a_recipe(tmp_path / "named", multiple=None))
    ours, theirs = RunFolder(run.folder).metrics(), RunFolder(other.folder).metrics()
    shares = []
    for line, expected in zip(ours, theirs, strict=True):
        shares.append(line.pop("left_out"))
        assert_close(line, expected)
    assert np.mean(shares) == pytest.approx(1 / (VOCAB - 1), rel=0.5)
    mine, its = (load_file(each.folder / "sae/sae_weights.safetensors") for each in (run, other))
    for name, tensor in its.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-5)


def test_one_number_is_kept(run, model, corpora):
    text = corpora.train.batch(range(len(corpora.train)))
    norms = model.clean(text.tokens, record=[model.site(SITE)]).activations[model.site(SITE)].norm(dim=-1)
    told = json.loads((run.folder / "start.json").read_text())["left_out_norms"]
    assert told["multiple"] == MULTIPLE and told["limit"] == MULTIPLE * told["median_norm"]
    assert told["median_norm"] == pytest.approx(float(norms.median()), rel=0.1)
    assert told["share"] == pytest.approx(float((text.tokens == SINK).float().mean()), rel=0.3)
    sae = SAE.load(run.folder)
    assert sae.norm_limit is not None and float(sae.norm_limit) == told["limit"]
    about = json.loads((run.folder / "evaluation.json").read_text())
    heldout = corpora.heldout.batch(range(256 // CONTEXT)).tokens
    assert about["left_out"] == pytest.approx(float((heldout == SINK).float().mean()))
    assert about["tokens"] == int((heldout != SINK).sum())


def test_resumed_it_ends_in_the_same_bits_by_the_number_that_is_kept(run, model, corpora, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    read = []
    start(model, reading(corpora, read.append), a_recipe(tmp_path / "run"), resume=True, from_step=15)
    assert len(read) == 5  # the batches of the steps to come: nothing was measured again
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "metrics.jsonl", "start.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run.folder / name).read_bytes()
    start(model, corpora, a_recipe(tmp_path / "run"), resume=True, from_step=0)
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "metrics.jsonl", "start.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run.folder / name).read_bytes()


def test_a_file_that_has_lost_its_limit_is_refused(run, model, corpora, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    file = tmp_path / "run/sae/cfg.json"
    cfg = json.loads(file.read_text())
    for limit, message in ((None, "does not say above which norm"), ("9", "no number above 0"), (-1.0, "no number")):
        cfg["metadata"]["endwise"]["norm_limit"] = limit
        file.write_text(json.dumps(cfg))
        with pytest.raises(FormatError, match=message):
            evaluate([tmp_path / "run"], model=model, corpora=corpora)


def test_what_starts_from_it_has_a_limit_of_its_own(run, model, corpora, tmp_path):
    for multiple in (None, 5.0):
        config = a_recipe(tmp_path / str(multiple), multiple=multiple, tokens=64).model_copy(
            update={"init_from": run.folder}
        )
        limit = start(model, corpora, config).sae.norm_limit
        told = json.loads((tmp_path / str(multiple) / "start.json").read_text())
        assert told["kept"] is True
        if multiple is None:
            assert limit is None and "left_out_norms" not in told
        else:
            assert (
                limit is not None
                and float(limit) == told["left_out_norms"]["limit"] == 5 * told["left_out_norms"]["median_norm"]
            )


def test_many_are_told_of(model, corpora, tmp_path, capsys):
    train(a_recipe(tmp_path / "few", multiple=10.0, tokens=64), model=model, corpora=corpora)
    assert "leave_out_norms" not in capsys.readouterr().err
    train(a_recipe(tmp_path / "many", multiple=1.1, tokens=64), model=model, corpora=corpora)
    told = " ".join(capsys.readouterr().err.split())
    assert "! data.leave_out_norms 1.1 leaves out" in told and "Raise data.leave_out_norms, or unset it." in told
    assert any("12.0% of the held-out" in each for each in remarks_on({"left_out": 0.12}))
    assert not remarks_on({"left_out": 0.04})


# What measures it


def test_every_metric_is_that_of_a_masked_text(run, twin):
    ours, theirs = (json.loads((each / "evaluation.json").read_text()) for each in (run.folder, twin))
    assert ours.pop("left_out") > 0
    for each in (ours, theirs):
        each.pop("text")
    assert ours == theirs


def test_importance_harvest_directions_and_the_dashboard_too(run, twin, model, corpora, named):
    texts = {run.folder: corpora, twin: named}
    harvests = [harvest([p], model=model, corpora=t)[p] for p, t in texts.items()]
    assert [each.about["attributed_predictions"] > 0 for each in harvests] == [True, True]
    assert harvests[0].about["tokens"] == harvests[1].about["tokens"]
    for name in harvests[0].features.column_names:
        one, other = (each.features[name].to_pylist() for each in harvests)
        assert str(one) == str(other), name
    importance = [measure_importance([p], ablate=3, model=model, corpora=t)[p] for p, t in texts.items()]
    for name in ("ce", "firings", "ce_second", "predictions_blocks", "tokens_blocks"):
        assert np.array_equal(*(getattr(each.importance, name) for each in importance)), name
    for name in ("ce", "kl", "sequences"):
        assert np.array_equal(*(getattr(each.ablations, name) for each in importance)), name
    for name in ("ce", "clean", "mean_ablated", "predictions"):
        assert np.array_equal(*(getattr(each.faithfulness, name) for each in importance)), name
    found = [measure_directions([p], tokens=256, directions=2, model=model, corpora=t)[p] for p, t in texts.items()]
    assert found[0].norms == found[1].norms and np.array_equal(found[0].variance, found[1].variance)
    assert np.array_equal(found[0].kl.estimate, found[1].kl.estimate, equal_nan=True)


def test_a_text_that_is_read_says_which_positions_count(run, model):
    own = LanguageModel(model.model, word_tokenizer([f"w{token}" for token in range(2, VOCAB)]))
    reader = TextReader(own, SAE.load(run.folder), model.site(SITE), run.config.data)
    assert reader.read(f"w3 w{SINK} w5 w6")["counts"] == [True, False, True, True]


# Several places


def test_each_of_several_has_a_mask_of_its_own(model, corpora, tmp_path):
    """At one site the token is an outlier; the other is an attention's output, where it is none."""
    sites = (SITE, "blocks.1.hook_attn_out")
    together = [
        a_recipe(tmp_path / f"{n}", "e2e", tokens=160).model_copy(update={"site": site}) for n, site in enumerate(sites)
    ]
    runs = train_together(together, model=model, corpora=corpora, display=False)
    shares = [sum(line["left_out"] for line in RunFolder(run.folder).metrics()) for run in runs]
    assert shares[0] > 0 and shares[1] == 0
    for number, run in enumerate(runs):
        alone = start(model, corpora, together[number].model_copy(update={"out": tmp_path / f"alone{number}"}))
        one, other = (each.folder / "sae/sae_weights.safetensors" for each in (run, alone))
        assert one.read_bytes() == other.read_bytes()
    measured = evaluate([run.folder for run in runs], model=model, corpora=corpora)
    for run in runs:
        (own,) = evaluate([run.folder], model=model, corpora=corpora).values()
        assert own.metrics == measured[run.folder].metrics
        assert own.baselines == measured[run.folder].baselines
    importance = measure_importance([run.folder for run in runs], ablate=2, model=model, corpora=corpora)
    for run in runs:
        (own,) = measure_importance([run.folder], ablate=2, model=model, corpora=corpora, again=True).values()
        assert np.array_equal(own.importance.ce, importance[run.folder].importance.ce)


def joint(out, multiple):
    values = a_recipe(out, multiple=multiple, tokens=192).model_dump(
        mode="json", exclude={"site", "writes", "init_from"}
    )
    places = [{"site": site} for site in (SITE, "blocks.2.hook_attn_out", "blocks.3.hook_resid_pre")]
    return PlacesConfig.build(values | {"places": places, "out": str(out)})


@pytest.fixture(scope="module")
def joint_runs(model, corpora, named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    runs = []
    for name, text, multiple in (("norms", corpora, MULTIPLE), ("named", named, None)):
        runs.append(train_places(joint(folder / name, multiple), model=model, corpora=text, display=False))
    return runs


def test_what_is_spliced_jointly_has_one_mask(joint_runs, model, corpora, named):
    ours, theirs = (RunFolder(run.folder).metrics() for run in joint_runs)
    shares = []
    for line, expected in zip(ours, theirs, strict=True):
        (share,) = {place.pop("left_out") for place in line["places"].values()}
        shares.append(share)
        assert_close(line, expected)
    assert np.mean(shares) == pytest.approx(1 / (VOCAB - 1), rel=0.5)
    measured = [
        evaluate([r.folder], model=model, corpora=t)[r.folder]
        for r, t in zip(joint_runs, (corpora, named), strict=True)
    ]
    assert measured[0].tokens == measured[1].tokens and measured[0].facts["left_out"] > 0
    assert_close(measured[0]["ce_increase"], measured[1]["ce_increase"])
    assert measured[0].baselines.mean_ablated == pytest.approx(measured[1].baselines.mean_ablated, rel=1e-6)


def test_a_resumed_joint_run_ends_in_the_same_bits(joint_runs, model, corpora, tmp_path):
    shutil.copytree(joint_runs[0].folder, tmp_path / "run")
    again = train_places(
        joint(tmp_path / "run", MULTIPLE), model=model, corpora=corpora, resume=True, from_step=5, display=False
    )
    for place, folder in again.folders.items():
        name = "sae/sae_weights.safetensors"
        assert (folder / name).read_bytes() == (joint_runs[0].folders[place] / name).read_bytes()
    assert len(again.folders) == 3


# Several processes


def test_two_processes_leave_out_what_one_does(model, made, tmp_path):
    gpt2 = copy.deepcopy(model.model)
    gpt2.save_pretrained(tmp_path / "model")
    found = []
    for processes in (1, 2):
        values = a_recipe(tmp_path / f"of{processes}", batch=5, accumulation=5, tokens=200, log_every=1).model_dump(
            mode="json"
        )
        values["model"] |= {"name": str(tmp_path / "model"), "device": "cpu"}
        values["data"] |= {"source": str(made / "train.npy"), "heldout": str(made / "heldout.npy"), "context": CONTEXT}
        values["evaluation"] |= {"tokens": 208, "during_training_tokens": 104, "batch": 3}
        file = tmp_path / f"{processes}.yaml"
        file.write_text(RunConfig.build(values).to_yaml())
        code, _, errors = launch(processes, "train", file, "--quiet")
        assert code == 0, errors
        code, _, errors = launch(processes, "evaluate", tmp_path / f"of{processes}")
        assert code == 0, errors
        found.append(RunFolder(tmp_path / f"of{processes}"))
    one, two = found
    assert json.loads(one.start_file.read_text()) == json.loads(two.start_file.read_text())
    for ours, theirs in zip(two.metrics(), one.metrics(), strict=True):
        assert ours["left_out"] == theirs["left_out"]
        assert_close(ours, theirs)
    ours, theirs = (json.loads(each.evaluation_file.read_text()) for each in (two, one))
    assert ours["left_out"] == theirs["left_out"] > 0 and ours["tokens"] == theirs["tokens"]
