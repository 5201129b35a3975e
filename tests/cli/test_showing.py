"""Representations of results: a line that says what they are, and a card of self-contained, escaped HTML."""

import re
from dataclasses import fields, is_dataclass, replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

import endwise
from endwise import SAE, EvaluationConfig, ReluSAE, Site, measure, pareto, read_harvest
from endwise.common.errors import ConfigError
from endwise.common.text import minus
from endwise.config.run import RunConfig
from endwise.dictionaries import NormedSAE
from endwise.features.harvest.results import TOP, Context
from endwise.runs.folder import RunFolder
from endwise.training.members import Run
from made_harvests import write_harvested_run, write_said
from made_runs import measured as measured_run
from small_gpt2 import SITE, recipe

ATTACK = "<img src=x onerror=alert(1)>"


class Cards(HTMLParser):
    """Checks that tags are closed in turn and that nothing asks for a network or runs; keeps the text."""

    VOID = ("br", "line", "rect")

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "link", "iframe", "object", "foreignobject"), tag
        for name, value in attributes:
            assert not name.startswith("on"), (name, value)
            assert name.startswith("xmlns") or "//" not in (value or ""), (name, value)
            assert name not in ("src", "href"), (name, value)
        self.tags.append(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def shown(result):
    html = result._repr_html_()
    assert not re.search(r"url\((?!#)|@import", html)
    return Cards(html).words


def one_line(result, *words):
    said = repr(result)
    assert "\n" not in said and len(said) < 350, said
    for word in words:
        assert word in said, (word, said)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_harvested_run(tmp_path_factory.mktemp("shown") / "run", 60, texts={7: ATTACK, 9: "a\u202eb"})
    write_said(folder, {0: (f"cakes {ATTACK}", 0.9, None)})
    return folder


def test_a_harvest_and_its_features(run):
    harvest = read_harvest(str(run))
    alive = int((harvest.firings > 0).sum())
    one_line(harvest, "Harvest(", f"alive {alive} of 60", "tokens 400,000", SITE)
    words = shown(harvest)
    importance = harvest.column("ce_second")
    first = int(np.argmax(np.where(harvest.firings > 0, importance, -np.inf)))
    row = harvest.features.slice(first, 1).to_pylist()[0]
    assert re.search(
        rf"raises most {first} {row['density']:.3%} {row['max_active']:.3g} {row['ce_second']:.3g} ", words
    )
    found = harvest.feature(0)
    one_line(found, "Feature 0(", "firings 1,200 of 400,000 tokens")
    words = shown(found)
    assert f"cakes {ATTACK}" in words  # as text
    top = [each for each in harvest.contexts(0) if each.group == TOP]
    assert len(top) > 8
    for context in top[:8]:
        assert "".join("".join(harvest.written(context.tokens)).split()) in "".join(words.split())
    for name in ("boosted", "suppressed"):
        token, logit = (found.row[key][0] for key in (name, f"{name}_logits"))
        assert minus(f"{logit:+.3f}") in words and harvest.vocabulary[token].strip() in words
    assert "dead" in shown(harvest.feature(2))
    for number in (60, -1):
        with pytest.raises(ConfigError, match="no feature"):
            harvest.feature(number)


def test_texts_of_others_are_text(run):
    """Every token that is written as markup, wherever it shows."""
    harvest = read_harvest(run)
    context = Context(0, TOP, 0, 1, 5, 1.0, 4, (7, 9), (0.0, 1.0), written=lambda tokens: [ATTACK, "a\u202eb"])
    marked = ATTACK + "«a\u202eb»"
    assert repr(context) == f"Context(feature 0: 1 at sequence 1, position 5: {marked!r})"
    assert "\u202e" not in repr(context)
    features = harvest.features.set_column(
        harvest.features.schema.get_field_index("boosted"), "boosted", [[[7, 9] * 5] * harvest.d_sae]
    )
    html = replace(harvest, features=features).feature(0)._repr_html_() + harvest._repr_html_()
    assert ATTACK not in html and "\u202e" not in html
    assert ATTACK.replace(" ", "␣") in unescape(html)
    Cards(html)


def test_a_context_shows_its_text_and_one_without_words_its_ids(run):
    harvest = read_harvest(run)
    context = harvest.contexts(0)[0]
    texts = harvest.written(context.tokens)
    assert context.texts == texts
    assert f"«{texts[context.peak]}»" in repr(context).replace("\\'", "'")
    assert replace(context, written=None) == context
    assert "«7 »" in repr(Context(0, TOP, 0, 1, 5, 1.0, 4, (6, 7), (0.0, 1.0)))


def test_dictionaries(run):
    sae = ReluSAE(16, 48)
    assert repr(sae) == "ReluSAE(architecture standard, features 48, width 16)"
    sae.leave_out_above(12.5)
    normed = NormedSAE(ReluSAE(16, 48, 8), "layer_norm")
    assert "input norm layer_norm" in repr(normed) and "16 to 8" in repr(normed)
    assert "leaves out norms above 12.5" in shown(sae)
    assert "input norm layer_norm" in shown(normed) and "cpu, torch.float32" in shown(normed)
    assert "features 60" in shown(SAE.load(run))


def test_a_run_before_and_after_it_is_measured(run, tmp_path):
    sae, config = SAE.load(run), RunFolder.open(run).config()
    result = Run(config, sae, run, 1.0)
    one_line(result, "Run(", "e2e", SITE, "training tokens 640", str(run))
    measured = RunFolder(run).measured()
    for each in (result, RunFolder(run)):
        words = shown(each)
        assert f"L0 {measured['l0']:.1f}, CE increase {measured['ce_increase']:+.4f}" in words
        assert "endwise harvest" not in words
    other = tmp_path / ATTACK.replace("/", "")
    other.mkdir()
    (other / "config.yaml").write_text(RunConfig.model_copy(config).to_yaml())
    assert f"endwise evaluate '{other}'" in shown(RunFolder(other))
    assert ATTACK not in RunFolder(other)._repr_html_()
    assert "nothing" in shown(RunFolder(tmp_path / "nothing"))


def test_pareto_curves_and_what_lists_and_dicts_hold(tmp_path):
    for kind, l0 in (("local", 50), ("e2e", 30)):
        for coefficient in (1, 2):
            measured_run(tmp_path / f"{kind}-{coefficient}", kind, coefficient, l0 / coefficient)
    found = pareto([tmp_path])
    one_line(found[0], "Pareto(", "local", "e2e")
    words = shown(found)
    for run_ in found[0].runs:
        assert f"{run_.l0:.1f}" in words and f"{run_.kl:.3f}" in words
    cards = Cards(found[0]._repr_html_())
    assert cards.tags.count("svg") == 1 and cards.tags.count("style") == 1
    assert all(verdict in words for verdict in found[0].summary.verdicts)


def test_an_evaluation(corpora, model, token_files):
    config = EvaluationConfig(tokens=128, during_training_tokens=64)
    found = measure(model, {"it": (Site.parse(SITE), ReluSAE(16, 48))}, corpora.heldout, config)["it"]
    one_line(found, "Evaluation(", f"L0 {found['l0']:.1f}", f"alive {found.alive} of 48", "tokens 128")
    words = shown(found)
    for name, interval in found.metrics.items():
        assert minus(f"{name} {interval.estimate:.4g} {interval.low:.4g} {interval.high:.4g}") in words
    assert f"CE, clean {found.baselines.clean:.4g}" in words
    assert all(remark in words for remark in found.remarks)


HOLDS_MUCH = re.compile(r"Tensor|Array|Float\[|Floats|Counts|Table|Mapping|Corpus|list\[")
CLASSES = sorted(name for name in endwise.__all__ if isinstance(getattr(endwise, name), type))


@pytest.mark.parametrize("name", CLASSES)
def test_no_public_class_is_shown_by_its_address_or_by_all_that_it_holds(name):
    cls = getattr(endwise, name)
    assert cls.__repr__ is not object.__repr__
    if is_dataclass(cls) and hasattr(cls.__repr__, "__wrapped__"):  # the one that dataclass makes, of every field whole
        assert not [each.name for each in fields(cls) if each.repr and HOLDS_MUCH.search(str(each.type))]


def test_models_texts_and_passes(model, corpora):
    sizes = "blocks 4, width 16, vocabulary 31, in float32, on cpu"
    one_line(model, f"LanguageModel({model.name}, GPT2LMHeadModel, {sizes})")
    one_line(corpora.train, f"tokens {corpora.train.tokens:,}", f"{len(corpora.train)} sequences of")
    one_line(corpora, "train Corpus(", "heldout Corpus(", "dropped 0")
    batch = corpora.train.batch([0, 1])
    one_line(batch, f"tokens int64[2 {corpora.train.context}]")
    one_line(model.clean(batch.tokens, [SITE], final=True), "activations (1 in all)", "final float32[2 ")
    one_line(endwise.Keep(range(500)), "Keep(feature (500 in all))")
    one_line(endwise.Steer([7, 9], by=2.5), "Steer(feature [7, 9], by 2.5)")
    one_line(recipe("run", "e2e"), f"RunConfig(site='{SITE}', dictionary=LinearConfig(size=40)")
