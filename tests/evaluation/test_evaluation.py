"""Every metric against its definition, written out in float64 over full passes and whole logits."""

import json

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import GPT2LMHeadModel

from endwise import RunConfig, evaluate, measure, train_together
from endwise.common.errors import ConfigError, RunFolderError
from endwise.config.run import EvaluationConfig
from endwise.dictionaries import ReluSAE
from endwise.evaluation.evaluate import evaluations_csv, read_firings, read_sums
from endwise.evaluation.measure import METRICS
from endwise.runs.folder import RunFolder
from own_training import OwnCorpus
from small_gpt2 import CONTEXT, LAYERS, SITE, WIDTH, recipe

SEQUENCES = 6
SETTINGS = EvaluationConfig(tokens=SEQUENCES * CONTEXT + 3, batch=4, bootstrap=200)


@pytest.fixture(scope="module")
def sae(model):
    sae = ReluSAE(WIDTH, 40, seed=1).requires_grad_(False)
    sae.b_enc -= 0.3  # some features off
    return sae


class Slow:
    """The corpus's batch through a float64 copy of the model, with and without a replacement at the site."""

    def __init__(self, model, batch):
        self.gpt2 = GPT2LMHeadModel(model.model.config).double().eval()
        self.gpt2.load_state_dict({name: value.double() for name, value in model.model.state_dict().items()})
        self.tokens, self.mask = batch.tokens, batch.mask
        self.logits, self.residuals = self.run(lambda x: x)

    @torch.no_grad()
    def run(self, replace):
        seen = []

        def splice(block, arguments):
            return (torch.where(self.mask[..., None], replace(arguments[0]), arguments[0]), *arguments[1:])

        def keep(block, arguments):
            seen.append(arguments[0])

        blocks, norm = self.gpt2.transformer.h, self.gpt2.transformer.ln_f
        handles = [blocks[1].register_forward_pre_hook(splice)]
        handles += [module.register_forward_pre_hook(keep) for module in (*blocks, norm)]
        logits = self.gpt2(self.tokens).logits
        for handle in handles:
            handle.remove()
        return logits, seen

    def token_list(self):
        return [(b, t) for b in range(len(self.tokens)) for t in range(self.tokens.shape[1]) if self.mask[b, t]]

    def cross_entropy(self, logits):
        """Mean over the tokens that count and whose successor counts."""
        losses = [
            -logits[b, t].log_softmax(-1)[self.tokens[b, t + 1]]
            for b, t in self.token_list()
            if t + 1 < self.tokens.shape[1] and self.mask[b, t + 1]
        ]
        return float(torch.stack(losses).mean())

    def mean(self, function):
        return sum(float(function(b, t)) for b, t in self.token_list()) / len(self.token_list())


def expected_metrics(slow, sae):
    x = slow.residuals[1]
    rows = sae.decoder.double() / sae.decoder.double().norm(dim=-1, keepdim=True)
    c = torch.relu(x @ sae.encoder.double().T + sae.b_enc.double())
    y = c @ rows + sae.b_dec.double()
    logits, residuals = slow.run(lambda _: y)
    p, q = slow.logits.softmax(-1), logits.softmax(-1)
    expected = {
        "l0": slow.mean(lambda b, t: (c[b, t] != 0).sum()),
        "kl": slow.mean(lambda b, t: (p[b, t] * (p[b, t] / q[b, t]).log()).sum()),
        "ce_clean": slow.cross_entropy(slow.logits),
        "ce_spliced": slow.cross_entropy(logits),
        "ce_increase": slow.cross_entropy(logits) - slow.cross_entropy(slow.logits),
        "top1_agreement": slow.mean(lambda b, t: p[b, t].argmax() == q[b, t].argmax()),
        "statistical_distance": slow.mean(lambda b, t: (p[b, t] - q[b, t]).abs().sum() / 2),
    }
    for suffix, truth, guess in (("", x, y), ("_layernorm", layer_norm(x, (WIDTH,)), layer_norm(y, (WIDTH,)))):
        kept = [truth[b, t] for b, t in slow.token_list()]
        mean = torch.stack(kept).mean(0)
        errors = [(truth[b, t] - guess[b, t]).square().sum() for b, t in slow.token_list()]
        variances = [(value - mean).square().sum() for value in kept]
        shares = [1 - float(e / v) for e, v in zip(errors, variances, strict=True)]
        expected[f"explained_variance.per_token{suffix}"] = sum(shares) / len(shares)
        expected[f"explained_variance.pooled{suffix}"] = 1 - float(sum(errors) / sum(variances))
    names = [f"blocks.{k}.hook_resid_pre" for k in range(2, LAYERS)] + [f"blocks.{LAYERS - 1}.hook_resid_post"]
    for name, ours, theirs in zip(names, residuals[2:], slow.residuals[2:], strict=True):
        expected[f"downstream_mse.{name}"] = slow.mean(
            lambda b, t, ours=ours, theirs=theirs: (ours[b, t] - theirs[b, t]).square().mean()
        )
        expected[f"downstream_cosine.{name}"] = slow.mean(
            lambda b, t, ours=ours, theirs=theirs: (
                torch.dot(ours[b, t], theirs[b, t]) / (ours[b, t].norm() * theirs[b, t].norm())
            )
        )
    firings = [sum(int(c[b, t, j] != 0) for b, t in slow.token_list()) for j in range(c.shape[-1])]
    return expected, firings


@pytest.mark.parametrize("masked", [False, True])
def test_metrics_equal_their_slow_definitions(model, corpora, sae, masked):
    heldout = corpora.heldout
    if masked:

        def with_mask(batch, rows):
            batch = batch(rows)
            batch.mask[:, 0] = False
            batch.mask[0, 5:] = False
            return batch

        heldout = OwnCorpus(heldout, with_mask)
        # every batch of the evaluation masks its own first row's end, so the oracle must see the same batches
        parts = [heldout.batch(range(4)), heldout.batch(range(4, SEQUENCES))]
    else:
        parts = [heldout.batch(range(SEQUENCES))]
    whole = type(parts[0])(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask")))
    evaluation = measure(model, {"sae": (model.site(SITE), sae)}, heldout, SETTINGS)["sae"]
    slow = Slow(model, whole)
    expected, firings = expected_metrics(slow, sae)
    assert set(evaluation.metrics) == set(expected) >= set(METRICS)
    for name, value in expected.items():
        assert evaluation[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        interval = evaluation.metrics[name]
        assert interval.low <= interval.estimate <= interval.high, name
    assert evaluation.firings.tolist() == firings
    assert evaluation.alive == sum(n > 0 for n in firings) < 40
    assert evaluation.tokens == int(whole.mask.sum())


def test_baselines_equal_full_passes_with_a_constant_at_the_site(model, corpora, sae):
    evaluation = measure(model, {"sae": (model.site(SITE), sae)}, corpora.heldout, SETTINGS)["sae"]
    slow = Slow(model, corpora.heldout.batch(range(SEQUENCES)))
    mean = slow.residuals[1].mean((0, 1))
    assert evaluation.baselines.clean == pytest.approx(slow.cross_entropy(slow.logits), rel=1e-5)
    mean_ablated, _ = slow.run(lambda x: mean.expand_as(x))
    zero_ablated, _ = slow.run(torch.zeros_like)
    assert evaluation.baselines.mean_ablated == pytest.approx(slow.cross_entropy(mean_ablated), rel=1e-5)
    assert evaluation.baselines.zero_ablated == pytest.approx(slow.cross_entropy(zero_ablated), rel=1e-5)


def test_a_perfect_dictionary_costs_nothing(model, corpora):
    """Encoder and decoder that copy: [I, −I] and its transpose, whose reconstruction is the activation."""
    sae = ReluSAE(WIDTH, 2 * WIDTH).requires_grad_(False)
    signs = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    sae.encoder.copy_(signs)
    sae.decoder.copy_(signs)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    evaluation = measure(model, {"sae": (model.site(SITE), sae)}, corpora.heldout, SETTINGS)["sae"]
    assert evaluation["kl"] == pytest.approx(0, abs=1e-6)
    assert evaluation["ce_increase"] == pytest.approx(0, abs=1e-6)
    assert evaluation["explained_variance.per_token"] == pytest.approx(1, abs=1e-6)
    assert evaluation["top1_agreement"] == 1
    assert evaluation["l0"] == WIDTH


def test_several_saes_are_measured_as_if_alone(model, corpora, sae):
    site, other = model.site(SITE), ReluSAE(WIDTH, 24, seed=2)
    later = model.site("blocks.2.hook_mlp_out")
    together = measure(model, {"a": (site, sae), "b": (later, other)}, corpora.heldout, SETTINGS)
    for name, pair in {"a": (site, sae), "b": (later, other)}.items():
        alone = measure(model, {name: pair}, corpora.heldout, SETTINGS)[name]
        assert alone.metrics == together[name].metrics
        assert alone.baselines == together[name].baselines
    assert "downstream_mse.blocks.2.hook_resid_post" not in together["b"].metrics
    assert "downstream_mse.blocks.3.hook_resid_pre" in together["b"].metrics


def test_fewer_tokens_than_one_sequence_are_refused(model, corpora, sae):
    with pytest.raises(ConfigError, match=r"evaluation\.tokens is 7"):
        measure(model, {"sae": (model.site(SITE), sae)}, corpora.heldout, EvaluationConfig(tokens=7))


def test_text_that_is_skipped_is_measured_by_no_one(model, corpora, sae):
    """Two halves of the text, measured apart, are the whole: what `skip` leaves out is what the other half reads."""
    place, half = {"sae": (model.site(SITE), sae)}, SEQUENCES // 2 * CONTEXT
    first, second, whole = (
        measure(model, place, corpora.heldout, EvaluationConfig(tokens=tokens, skip=skip, batch=2), baselines=False)
        for tokens, skip in ((half, 0), (half, half + 3), (2 * half, 0))
    )
    for name in ("ce_clean", "l0", "kl"):
        apart = [each["sae"].sums[name] for each in (first, second)]
        assert [*apart[0], *apart[1]] == pytest.approx([*whole["sae"].sums[name]], rel=1e-5)
    with pytest.raises(ConfigError, match=r"evaluation\.skip .* ask for more held-out text than"):
        measure(model, place, corpora.heldout, EvaluationConfig(tokens=half, skip=corpora.heldout.tokens))


# Run folders


@pytest.fixture(scope="module")
def runs(model, corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    configs = [recipe(folder / kind, kind, seed) for seed, kind in enumerate(("local", "e2e_ds"))]
    return train_together(configs, model=model, corpora=corpora, display=False)


def test_evaluate_writes_what_it_returns(model, corpora, runs):
    evaluations = evaluate([run.folder for run in runs], model=model, corpora=corpora)
    for run in runs:
        evaluation = evaluations[run.folder]
        written = json.loads((run.folder / "evaluation.json").read_text())
        assert written == RunFolder.open(run.folder).evaluation()
        assert written["kind"] == run.config.objective.kind
        assert written["ce_increase"] == evaluation["ce_increase"]
        last = f"blocks.{LAYERS - 1}.hook_resid_post"
        assert written["downstream_cosine"][last] == evaluation[f"downstream_cosine.{last}"]
        assert written["explained_variance"]["pooled"] == evaluation["explained_variance.pooled"]
        assert (written["alive"], written["alive_tokens"]) == (evaluation.alive, 256)
        assert written["intervals"]["l0"] == [evaluation.metrics["l0"].low, evaluation.metrics["l0"].high]
        assert read_firings(run.folder).tolist() == evaluation.firings.tolist()
        sums = read_sums(run.folder)
        assert sums["kl"].sum() / sums["tokens"].sum() == pytest.approx(evaluation["kl"])
    directly = measure(model, {"x": (model.site(SITE), runs[0].sae)}, corpora.heldout, runs[0].config.evaluation)["x"]
    assert directly["kl"] == pytest.approx(evaluations[runs[0].folder]["kl"], rel=1e-5)


def test_csv_has_a_line_per_run_and_every_metric(model, corpora, runs):
    import csv
    import io

    paths = [run.folder for run in runs]
    evaluations = evaluate(paths, model=model, corpora=corpora, tokens=64)
    table = list(csv.DictReader(io.StringIO(evaluations_csv({run.folder: run.config for run in runs}, evaluations))))
    assert [row["run"] for row in table] == [str(path) for path in paths]
    for row, path in zip(table, paths, strict=True):
        assert float(row["ce_increase.low"]) == evaluations[path].metrics["ce_increase"].low
        assert float(row["clean_ce"]) == evaluations[path].baselines.clean
        assert set(METRICS) <= set(row)
        assert row["tokens"] == "64"


def test_folders_without_a_trained_sae_are_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is an empty folder, and a run folder is needed here"):
        evaluate(tmp_path)
    (tmp_path / "config.yaml").write_text(RunConfig.build(recipe(tmp_path).model_dump()).to_yaml())
    with pytest.raises(RunFolderError, match=r"no trained SAE yet.*--resume"):
        evaluate(tmp_path)
