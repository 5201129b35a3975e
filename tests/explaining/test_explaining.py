"""Texts that are shown and asked about, their form, the reading of answers, and the scores."""

import asyncio

import numpy as np
import pytest

from chat_server import perfect
from endwise.common.errors import ConfigError, DataError, FormatError, RunFolderError
from endwise.explaining.answers import read_choices, read_explanation
from endwise.explaining.asking import PURPOSES, Asking, CallStats, run_async
from endwise.explaining.cache import Answer, in_memory
from endwise.explaining.preparing import parse_features, prepare
from endwise.explaining.prompts import Places, read_prompts
from endwise.explaining.rendering import Writer, marks_of
from endwise.explaining.samples import Text, distinct
from endwise.explaining.scorers import SCORERS, balanced_accuracy, wrong_marks
from endwise.explaining.settings import Settings, parse_extra
from endwise.features.explanations import Explanation, Score, read_explanations, write_explanations
from endwise.features.harvest.results import TOP, read_harvest
from word_harvests import make_run


class Oracle:
    """Answers as it is asked to, without a network."""

    def __init__(self, answer=perfect):
        self.answer, self.stats, self.prompts = answer, CallStats(), []

    async def ask(self, call, cache):
        prompt = call.request["messages"][0]["content"]
        self.prompts.append(prompt)
        return Answer(self.answer(prompt))


def asked(run, answer=perfect, **settings):
    settings = Settings(model="m", **settings)
    (prepared,) = prepare([run], settings)
    oracle = Oracle(answer)
    with in_memory() as cache:
        return run_async(Asking(prepared, settings, oracle, cache).all()), oracle


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", 16, few=(3,), dead=(4,))


def test_a_perfect_explainer_scores_1_and_its_controls_do_not(run):
    found, oracle = asked(run)
    assert [each.feature for each in found.rows] == [f for f in range(16) if f not in (3, 4)]
    assert found.left_out == {3: "it has fewer than 13 texts that do not overlap"}
    assert all(each.text == f"the word word{each.feature}x" for each in found.rows)
    assert all(each.detection == each.fuzzing == 1 for each in found.rows)
    for control in ("detection.shuffled", "fuzzing.shuffled", "detection.random", "fuzzing.random"):
        values = [each.value(control) for each in found.rows]
        assert len(values) == 14 and 0.35 < np.mean(values) < 0.6, control
    assert all(score.answered == 20 and not score.failed for each in found.rows for score in each.scores.values())
    assert oracle.stats.unreadable == 0


def test_texts_that_are_asked_about_are_never_shown(run):
    (prepared,) = prepare([run], Settings(model="m", features="all"))
    harvest = read_harvest(run)
    for sample in prepared.samples:
        parts = (sample.shown, sample.active, sample.inactive)
        assert [len(part) for part in parts] == [20, 10, 10]
        texts = [text for part in parts for text in part]
        assert len(distinct(texts)) == len(texts)
        assert all(max(text.activations) > 0 for part in parts[:2] for text in part)
        sequences = {context.sequence for context in harvest.contexts(sample.feature)}
        assert {text.sequence for part in parts[:2] for text in part} <= sequences
        assert not sequences & {text.sequence for text in sample.inactive}
        assert all(sample.feature not in text.tokens for text in sample.inactive)
        group_of = {context.sequence: context.group for context in harvest.contexts(sample.feature)}
        held = [group_of[text.sequence] for text in sample.active]
        assert {group: held.count(group) for group in held} == {TOP: 2, 0: 2, 1: 2, 2: 2, 3: 2}
        shown = [group_of[text.sequence] for text in sample.shown]
        assert shown.count(TOP) == 8  # all that are left; the others come from every quantile
        assert set(shown) == {TOP, 0, 1, 2, 3}


def test_overlapping_and_equal_texts_are_one():
    def text(sequence, start, *tokens):
        return Text(0, sequence, start, tokens, (1.0,) * len(tokens))

    first = text(0, 10, 1, 2, 3)
    others = [text(0, 12, 3, 4, 5), text(0, 13, 4, 5, 6), text(1, 11, 7, 8, 9), text(2, 50, 1, 2, 3)]
    assert distinct([first, *others]) == [first, others[1], others[2]]


def test_the_seed_decides_and_nothing_else(run):
    settings = Settings(model="m", features="random:5", seed=3)
    (one,), (other,) = (prepare([run], settings) for _ in range(2))
    assert one.samples == other.samples and one.random == other.random
    (third,) = prepare([run], Settings(model="m", features="random:5", seed=4))
    assert third.samples != one.samples


def test_random_texts_are_the_same_whatever_they_are_called(run):
    (prepared,) = prepare([run], Settings(model="m", features="all", random=4))
    assert [each.feature for each in prepared.random] == [0, 1, 2, 5]
    for sample in prepared.random:
        texts = [*sample.shown, *sample.active, *sample.inactive]
        assert len(distinct(texts)) == len(texts) == 40
        owners = {text.owner for text in texts}
        assert len(owners) > 5


def test_several_runs_have_equally_many_features(tmp_path):
    runs = [make_run(tmp_path / "a", 12), make_run(tmp_path / "b", 12, few=(0, 1, 2, 3))]
    said = []
    first, second = prepare(runs, Settings(model="m", features="random:10"), said.append)
    assert len(first.samples) == len(second.samples) == 8
    assert {each.feature for each in first.random} <= {each.feature for each in first.samples}
    assert said == ["8 features of each run are explained, not 10: no more have enough texts."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("top:3", [15, 14, 13]), ("1,5-7,5", [1, 5, 6, 7]), ("all", [f for f in range(16) if f != 4])],
)
def test_features_are_chosen_as_asked(run, text, expected):
    candidates = parse_features(text).candidates(read_harvest(run), 0)
    assert candidates[: len(expected)] == expected


def test_random_features_are_a_permutation_of_those_that_fire(run):
    candidates = parse_features("random:3").candidates(read_harvest(run), 0)
    assert sorted(candidates) == [f for f in range(16) if f != 4] != candidates


@pytest.mark.parametrize("text", ["", "random", "random:0", "top:-1", "some", "3-1", "1,,2", "0-999999999"])
def test_other_choices_are_refused(text):
    with pytest.raises(ConfigError, match="--features"):
        parse_features(text)


def test_what_cannot_be_explained_is_said(tmp_path):
    bare = make_run(tmp_path / "bare", 12, importance=False)
    with pytest.raises(ConfigError, match="endwise importance"):
        prepare([bare], Settings(model="m", features="top:3"))
    with pytest.raises(ConfigError, match="12 features"):
        prepare([bare], Settings(model="m", features="12"))
    with pytest.raises(DataError, match="fewer than 53 texts"):
        prepare([bare], Settings(model="m", features="all", scored=100))
    (tmp_path / "unharvested").mkdir()
    (tmp_path / "unharvested" / "config.yaml").write_text("site: x")
    with pytest.raises(RunFolderError, match="endwise harvest"):
        prepare([tmp_path / "unharvested"], Settings(model="m"))
    with pytest.raises(RunFolderError, match="not a run folder"):
        prepare([tmp_path], Settings(model="m"))


def test_marks_and_lines():
    writer = Writer(["a", " b", "\n", " <<", "\x1b[31m"])
    text = Text(0, 0, 0, (0, 1, 2, 3, 4, 9), (0.0, 10.0, 4.0, 2.0, 0.0, 5.0))
    assert marks_of(text) == (False, True, True, False, False, True)
    assert writer.marked(text, marks_of(text)) == "a<< b\\n>> <<\\x1b[31m<<[token 9]>>"
    assert writer.shown(text, 20.0).splitlines()[1] == '   active at: " b" 5, "\\n" 2, "[token 9]" 2'
    assert "\n" not in writer.plain(text)


def test_wrong_marks_are_as_many_at_other_tokens():
    generator = np.random.default_rng(0)
    text = Text(0, 0, 0, tuple(range(8)), (0.0, 3.0, 2.0, 0.0, 0.0, 0.1, 0.0, 0.0))
    seen = set()
    for _ in range(50):
        marks = wrong_marks(text, generator)
        assert sum(marks) == 2 and not any(marks[place] for place in (1, 2, 5))
        seen.add(marks)
    assert len(seen) > 5
    assert not any(wrong_marks(Text(0, 0, 0, (1, 2), (1.0, 2.0)), generator))


def test_fuzzing_asks_about_each_text_both_ways_in_different_calls(run):
    (prepared,) = prepare([run], Settings(model="m", features="0"))
    questions = SCORERS["fuzzing"].questions(prepared.samples[0], prepared.writer, 5, np.random.default_rng(0))
    plain = [[item.replace("<<", "").replace(">>", "") for item in question.items] for question in questions]
    assert all(len(set(items)) == len(items) == 5 for items in plain)
    items = [
        (text, truth)
        for texts, q in zip(plain, questions, strict=True)
        for text, truth in zip(texts, q.truth, strict=True)
    ]
    assert len(set(items)) == len(items) == 20 and sum(truth for _, truth in items) == 10
    assert {sum(question.truth) for question in questions} != {5}


@pytest.mark.parametrize(
    ("truth", "chosen", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0.0),
        ([1, 1, 1, 0], [1, 1, 1, 1], 0.5),
        ([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1], 0.625),
        ([1, 1], [1, 0], None),
        ([0], [0], None),
        ([], [], None),
    ],
)
def test_balanced_accuracy(truth, chosen, expected):
    assert balanced_accuracy(list(map(bool, truth)), list(map(bool, chosen))) == expected


def test_items_without_an_answer_count_neither_way(run):
    (prepared,) = prepare([run], Settings(model="m", features="0"))
    scorer = SCORERS["detection"]
    questions = scorer.questions(prepared.samples[0], prepared.writer, 5, np.random.default_rng(0))
    answers = [(question, question.truth if index else None) for index, question in enumerate(questions)]
    assert scorer.score(answers) == Score(1.0, 15, 5)
    assert scorer.score([(question, None) for question in questions]) == Score(None, 0, 20)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"explanation": "verbs of motion"}', "verbs of motion"),
        ('```json\n{"explanation": "verbs\\nof motion"}\n```', "verbs of motion"),
        ('<think>{"explanation": "no"} …</think>{"explanation": "yes"}', "yes"),
        ("Here it is.\n**Explanation:** verbs of motion", "verbs of motion"),
        ("verbs of motion", "verbs of motion"),
        ('{"explanation": "verbs of mo', None),
        ('{"explanation": 3}', None),
        ('{"explanation": "  "}', None),
        ('["verbs"]' + "\n\n" + "x", None),
        ("<think>so what do", None),
        ("", None),
        ('{"explanation": "\\ud800"}', "?"),
    ],
)
def test_explanations_are_read(answer, expected):
    assert read_explanation(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"answers": [1, 0, 1]}', [True, False, True]),
        ("[1, 0, 1]", [True, False, True]),
        ('{"answers": [true, false, true]}', [True, False, True]),
        ("```\n[1,0,1]\n```", [True, False, True]),
        ("Text 1 and 3 fit: [0, 0, 0]? No: [1, 0, 1].", [True, False, True]),
        ("<think>[0, 0, 0]</think>[1, 0, 1]", [True, False, True]),
        ('{"answers": [1, 0]}', None),
        ('{"answers": [1, 0, 2]}', None),
        ('{"answers": [1, 0, 0.5]}', None),
        ('{"answers": [1, 0, "1"]}', None),
        ('{"answers": [1, 0, 1', None),
        ("1, 0, 1", None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_choices_are_read(answer, expected):
    assert read_choices(answer, 3) == expected


def test_an_answer_that_cannot_be_read_is_asked_for_once_more_and_never_scored(run):
    def stubborn(prompt):
        return "I cannot say." if "numbered texts" in prompt else perfect(prompt)

    found, oracle = asked(run, stubborn, features="0,1", random=0, shuffled=False)
    assert [each.scores for each in found.rows] == [
        {"detection": Score(None, 0, 20), "fuzzing": Score(None, 0, 20)} for _ in range(2)
    ]
    assert oracle.stats.unreadable == 16 and len(oracle.prompts) == 2 + 2 * 16
    assert sum("must be the JSON alone" in prompt for prompt in oracle.prompts) == 16

    def improves(prompt):
        return perfect(prompt) if "must be the JSON alone" in prompt else "Well …\n\nwell."

    found, oracle = asked(run, improves, features="0,1", random=0)
    assert all(each.detection == 1 for each in found.rows) and oracle.stats.unreadable == 0


def test_features_without_an_explanation_are_left_out(run):
    found, oracle = asked(
        run, lambda prompt: "{" if " word5x>>" in prompt and "20 texts" in prompt else perfect(prompt)
    )
    assert 5 not in {each.feature for each in found.rows} and found.left_out[5] == "no explanation was obtained"
    assert oracle.stats.unreadable >= 1


def test_prompts_can_be_replaced_one_by_one(tmp_path, run):
    (tmp_path / "explain.txt").write_text("{{ examples }} {{count}} {braces} {{not a place}} {{examples}}")
    prompts = read_prompts(PURPOSES, tmp_path)
    assert prompts["explain"].filled(examples="{{count}}", count=2) == (
        "{{count}} 2 {braces} {{not a place}} {{count}}"
    )
    assert prompts["detection"].text == read_prompts(PURPOSES)["detection"].text
    _, oracle = asked(run, lambda prompt: "it", features="0", prompts=tmp_path, random=0)
    assert any(prompt.startswith("1.  filler") for prompt in oracle.prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{examples}} {{exemples}}", r"has \{\{exemples\}\}; it may have \{\{examples\}\}, \{\{count\}\}"),
        ("nothing", r"lacks \{\{examples\}\}"),
        (b"\xff\xfe{{examples}}", "cannot be read as UTF-8"),
        ("x" * (1 << 21), "more than"),
    ],
)
def test_a_prompt_that_is_wrong_is_refused_before_any_call(tmp_path, text, message):
    (tmp_path / "explain.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_prompts({"explain": Places(("examples",))}, tmp_path)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"detection\.txt"):
        read_prompts(PURPOSES, tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": " "},
        {"scorers": ("simulation",)},
        {"scorers": ()},
        {"scored": 3},
        {"shown": 2},
        {"per_call": 0},
        {"random": -1},
        {"temperature": float("nan")},
        {"extra": {"messages": []}},
    ],
)
def test_settings_that_break_a_rule_are_refused(changed):
    with pytest.raises(ConfigError):
        Settings(**{"model": "m", **changed})


def test_requests_can_be_extended_and_cut():
    settings = Settings(model="m", extra=parse_extra('{"max_tokens": null, "top_p": 0.5}'))
    request = settings.request("m", "p")
    assert request == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "temperature": 0.0,
        "top_p": 0.5,
    }
    for text in ("[]", "{", '{"a": NaN}'):
        with pytest.raises(ConfigError, match="--extra"):
            parse_extra(text)


def test_explanations_are_read_as_they_were_written(tmp_path):
    assert read_explanations(tmp_path) is None
    hostile = '<script>\x1b[31m\u202e"\n'
    rows = [
        Explanation(7, hostile, "m", "n", {"detection": Score(None, 0, 20), "fuzzing": Score(0.75, 18, 2)}),
        Explanation(
            2, "verbs", "m", "n", {"detection": Score(0.5, 20, 0), "detection.random": Score(0.4, 20, 0)}, "no"
        ),
    ]
    write_explanations(tmp_path, rows, {"settings": {}})
    found = read_explanations(tmp_path)
    assert found.rows == (rows[1], rows[0]) and found.names == ("detection", "detection.random", "fuzzing")
    assert found.of(7) == rows[0] and found.of(3) is None
    assert (found.of(7).detection, found.of(7).fuzzing, found.of(2).fuzzing) == (None, 0.75, None)
    assert found.of(2).random_text == "no" and found.about["settings"] == {}
    for damage in (b"", b"PAR1 nothing"):
        (tmp_path / "explanations" / "explanations.parquet").write_bytes(damage)
        with pytest.raises(FormatError, match="Explain again"):
            read_explanations(tmp_path)
    (tmp_path / "explanations" / "explanations.json").write_text('{"format": 99}')
    with pytest.raises(FormatError, match="99"):
        read_explanations(tmp_path)


def test_explanations_and_harvests_of_other_weights_are_refused(tmp_path):
    run = make_run(tmp_path / "run", 4)
    about = {"settings": {}, "weights": read_harvest(run).about["weights"]}
    write_explanations(run, [Explanation(2, "verbs", "m", "m")], about)
    assert read_explanations(run).of(2).text == "verbs"
    (run / "sae" / "sae_weights.safetensors").write_bytes(b"trained on")
    with pytest.raises(FormatError, match="explained with other weights than its SAE has now"):
        read_explanations(run)
    with pytest.raises(FormatError, match="endwise harvest --again"):
        prepare([run], Settings(model="m"))
    (run / "sae" / "sae_weights.safetensors").unlink()
    with pytest.raises(FormatError, match="endwise train --resume"):
        prepare([run], Settings(model="m"))


def test_only_so_many_features_are_under_way_at_a_time(run):
    (prepared,) = prepare([run], Settings(model="m", scorers=("detection",), shuffled=False, random=0))
    calls_of_a_feature = 4  # 20 items, 5 in each
    most, now = 0, 0

    class Slow(Oracle):
        async def ask(self, call, cache):
            nonlocal most, now
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1
            return await super().ask(call, cache)

    with in_memory() as cache:
        settings = Settings(model="m", scorers=("detection",), shuffled=False, random=0)
        run_async(Asking(prepared, settings, Slow(), cache, underway=3).all())
    assert 3 <= most <= 3 * calls_of_a_feature
