"""A dashboard's data: what a script may hold, shards that say what the harvest says, nearest features, the index."""

import base64
import json
import re
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bad_input import HOSTILE, ran, refused
from endwise.common.errors import ConfigError, FormatError, RunFolderError
from endwise.common.text import printable
from endwise.config.objective import KINDS
from endwise.dashboard import write_dashboard
from endwise.dashboard.nearest import Dictionary, all_neighbours
from endwise.dashboard.run_data import ACTIVE, BOOSTED, PEAK, REASONS, SHARD
from endwise.dashboard.run_data import TOKENS_OF_A_FILE as TOKENS_OF_SHARD
from endwise.dashboard.scripts import packed, script, short
from endwise.dashboard.site import assets
from endwise.dashboard.sources import read_sources
from endwise.dictionaries import SAE
from endwise.features.harvest.results import TOP, read_harvest
from endwise.figures.style import COLOURS
from made_dictionaries import directions, write_run
from made_harvests import write_harvested_run, write_predicted, write_said

FEATURES = 2 * SHARD + 20


def received(path):
    """Content that a data file hands to the page."""
    content = path.read_bytes().decode("ascii")
    call = re.fullmatch(r"endwise\.receive\((.*)\);\n", content)
    key, value = json.loads(f"[{call[1]}]")
    assert path.stem in (key, key.rpartition("/")[2])
    return value


def unpacked(text, kind="f4"):
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two kinds with their site, and one that has no importance."""
    folder = tmp_path_factory.mktemp("dashboard")
    runs = [
        write_harvested_run(folder / "local", FEATURES, kind="local", seed=0),
        write_harvested_run(folder / "e2e", FEATURES, kind="e2e", seed=1, measured=False),
    ]
    write_said(runs[0], {0: (f"the end of a text {HOSTILE}", 0.9, 0.7), 3: ("threes", None, None)})
    write_predicted(runs[0], {0: [frozenset({5}), None, frozenset(range(20, 32))], 3: [frozenset({7})]})
    page = write_dashboard(runs)
    site = received(page.parent / "data" / "site.js")
    return runs, page.parent, [page.parent / site["data"] / str(number) for number in range(2)], site


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_script_holds_any_text_and_lets_none_of_it_out(value):
    written = script("key", value).decode("ascii")
    assert "<" not in written and not set(written[:-1]) & set("\r\n\u2028\u2029")
    assert json.loads(written.removeprefix('endwise.receive("key",').removesuffix(");\n")) == value


def test_numbers_that_json_cannot_say_are_refused_or_packed():
    with pytest.raises(ValueError, match="JSON"):
        script("key", [float("nan")])
    values = np.array([1.5, np.nan, -np.inf, 0.1])
    np.testing.assert_array_equal(unpacked(packed(values)), values.astype(np.float32))
    np.testing.assert_array_equal(unpacked(packed(values, "f8"), "f8"), values)


def test_short_numbers_keep_their_digits():
    assert short([0.0, 1 / 3, -12345.678, 2.0, 1e-9 / 3, float("nan"), float("inf")]) == [
        0, 0.3333, -12350, 2, 3.333e-10, None, None,
    ]  # fmt: skip
    assert json.dumps(short([2.0, 0.0])) == "[2, 0]"


def test_shards_say_what_the_harvest_says(place):
    runs, _, data, _ = place
    harvest = read_harvest(runs[0])
    vocabulary = [printable(text) for text in harvest.vocabulary]
    shards = [received(data[0] / f"features-{number}.js") for number in range(3)]
    assert [len(shard["features"]) for shard in shards] == [SHARD, SHARD, 20]
    assert not (data[0] / "features-3.js").exists()
    rows = harvest.features.to_pylist()
    for feature in (0, 1, 2, 77, SHARD - 1, SHARD, FEATURES - 1):
        shard = shards[feature // SHARD]
        page, texts, row = shard["features"][feature % SHARD], shard["texts"], rows[feature]
        assert page["h"] == row["histogram"] and page["c"] == row["co_firing"]
        np.testing.assert_allclose(page["e"], row["histogram_edges"], rtol=1e-3)
        for places, values, name in (("b", "bl", "boosted"), ("s", "sl", "suppressed")):
            assert [texts[at] for at in page[places]] == [vocabulary[token] for token in row[name]]
            np.testing.assert_allclose(page[values], row[f"{name}_logits"], rtol=1e-3)
        contexts = harvest.contexts(feature)
        assert len(page["x"]) == len(contexts) == (0 if row["firings"] == 0 else 22)
        for (group, sequence, position, peak, tokens, activations), context in zip(page["x"], contexts, strict=True):
            assert (group, sequence, position) == (context.group, context.sequence, context.position)
            assert peak == context.peak and activations[peak] == pytest.approx(context.activation, rel=1e-2)
            assert [texts[at] for at in tokens] == [vocabulary[token] for token in context.tokens]
            np.testing.assert_allclose(activations, context.activations, rtol=1e-2)


def test_the_overview_has_every_feature(place):
    runs, _, data, site = place
    for run, folder in zip(runs, data, strict=True):
        harvest, overview = read_harvest(run), received(folder / "overview.js")
        np.testing.assert_array_equal(unpacked(overview["firings"], "f8"), harvest.firings)
        for name, column in (("mean", "mean_active"), ("max", "max_active"), ("importance", "ce_second"), ("ce", "ce")):
            np.testing.assert_array_equal(unpacked(overview[name]), harvest.column(column).astype(np.float32))
        tops = [None if at < 0 else overview["texts"][at] for at in unpacked(overview["top"], "i4")]
        sums = defaultdict(lambda: defaultdict(float))
        for feature, contexts in harvest.all_contexts():
            for context in contexts:
                if context.group == TOP:
                    sums[feature][context.tokens[context.peak]] += context.activation
        assert [top is None for top in tops] == [firings == 0 for firings in harvest.firings]
        for feature, found in sums.items():
            assert tops[feature] == printable(harvest.vocabulary[max(found, key=found.get)])
    assert [run["alive"] for run in site["runs"]] == [int((read_harvest(run).firings > 0).sum()) for run in runs]


def test_patterns_are_those_that_were_made(place):
    runs, _, data, _ = place
    vocabulary = [printable(text) for text in read_harvest(runs[0]).vocabulary]
    shard = received(data[0] / "features-0.js")
    page, texts = shard["features"][0], shard["texts"]
    ((places, activation, contexts),) = page["p"]["l"]
    assert (activation, contexts, page["p"]["n"], page["p"]["s"]) == (1.25, 7, 1, [0.8, 0.9, 0.7, 0.6])
    assert places[1] == 0 and [texts[at] for at in places[0][0]] == [vocabulary[5]] and places[0][1] == 0
    assert [texts[at] for at in places[2][0]] == vocabulary[20:28] and places[2][1] == 4
    assert shard["features"][1]["p"] == {"s": [None] * 4, "l": [], "n": 0}
    assert "p" not in received(data[1] / "features-0.js")["features"][0]


def test_explanations_are_those_that_were_given(place):
    _, _, data, site = place
    first, second = (received(folder / "overview.js") for folder in data)
    assert (
        first["explanations"][0] == printable(f"the end of a text {HOSTILE}") and first["explanations"][3] == "threes"
    )
    assert first["explanations"][1] == ""
    np.testing.assert_allclose(unpacked(first["detection"])[[0, 1, 3]], [0.9, np.nan, np.nan], rtol=1e-6)
    assert second["explanations"] is None and second["detection"] is None
    assert [run["explained"] for run in site["runs"]] == [True, False]


def test_the_index_of_tokens_against_every_context(place):
    runs, _, data, _ = place
    harvest = read_harvest(runs[0])
    expected = defaultdict(lambda: defaultdict(int))
    for row in harvest.features.to_pylist():
        for token in row["boosted"]:
            expected[token][row["feature"]] |= BOOSTED
    for feature, contexts in harvest.all_contexts():
        for context in contexts:
            expected[context.tokens[context.peak]][feature] |= PEAK
            for token, activation in zip(context.tokens, context.activations, strict=True):
                if activation >= context.activation / 2:
                    expected[token][feature] |= ACTIVE
    directory = received(data[0] / "tokens.js")
    assert directory["shard"] == TOKENS_OF_SHARD
    assert directory["texts"] == [printable(harvest.vocabulary[token]) for token in sorted(expected)]
    assert unpacked(directory["counts"], "i4").tolist() == [len(expected[token]) for token in sorted(expected)]
    found = []
    for number in range(-(-len(expected) // TOKENS_OF_SHARD)):
        shard = received(data[0] / f"tokens-{number}.js")
        starts, entries = unpacked(shard["starts"], "i4"), unpacked(shard["entries"], "i4")
        for start, end in pairwise(starts):
            found.append({int(entry) // REASONS: int(entry) % REASONS for entry in entries[start:end]})
    assert found == [dict(expected[token]) for token in sorted(expected)]


def test_nearest_features_against_all_cosines(place):
    runs, _, data, _ = place
    rows = [SAE.load(run).W_dec for run in runs]
    alive = [torch.from_numpy(read_harvest(run).firings > 0) for run in runs]
    for i, folder in enumerate(data):
        for feature in (0, 1, 2, 200, FEATURES - 1):
            shard = received(folder / f"features-{feature // SHARD}.js")
            listed = {other: (found, cosines) for other, found, cosines in shard["features"][feature % SHARD]["n"]}
            assert set(listed) == {0, 1}
            for j, (found, cosines) in listed.items():
                if not alive[i][feature]:
                    assert found == []
                    continue
                all_cosines = rows[j].double() @ rows[i][feature].double() / rows[i][feature].double().norm()
                all_cosines = all_cosines.where(alive[j], torch.tensor(-9.0))
                if i == j:
                    all_cosines[feature] = -9
                best = all_cosines.topk(5)
                np.testing.assert_allclose(cosines, best.values.numpy(), rtol=2e-3)
                np.testing.assert_allclose(all_cosines[found].numpy(), best.values.numpy(), rtol=1e-4)


def test_directions_of_two_sites_are_not_compared():
    firings = np.array([3, 0, 1, 1])
    a, b, c, empty = (
        Dictionary.of(directions(4, seed), count, ("model", site))
        for seed, (site, count) in enumerate([("x", firings), ("x", firings), ("y", firings), ("x", firings * 0)])
    )
    found = all_neighbours([a, b, c, empty])
    assert [sorted(each) for each in found] == [[0, 1], [0, 1], [2], []]
    assert found[0][1].feature.shape == (4, 5) and set(found[0][1].feature[1]) == {-1}
    assert sorted(found[0][1].feature[0]) == [-1, -1, 0, 2, 3] and sorted(found[0][0].feature[0]) == [-1, -1, -1, 2, 3]


def test_a_direction_of_length_0_is_near_none():
    rows = directions(4)
    rows[2] = 0
    (found,) = all_neighbours([Dictionary.of(rows, np.ones(4, dtype=np.int64), ("model", "x"))])
    assert set(found[0].feature[2]) == {-1} and 2 not in found[0].feature


def test_a_run_without_a_harvest_is_told_how_to_get_one(tmp_path):
    run = write_run(tmp_path / "a run", directions(20))
    with pytest.raises(RunFolderError, match=r"endwise harvest '.*a run'"):
        write_dashboard([run])
    assert "endwise harvest" in refused("dashboard", run, code=RunFolderError.exit_code)
    assert not (run / "dashboard").exists()


def test_a_harvest_of_other_weights_is_refused(tmp_path):
    run = write_harvested_run(tmp_path / "run", 20, groups=())
    about = json.loads((run / "harvest" / "harvest.json").read_text())
    (run / "harvest" / "harvest.json").write_text(json.dumps(about | {"weights": "0" * 64}))
    with pytest.raises(FormatError, match=r"other weights .* endwise harvest --again"):
        write_dashboard([run])
    del about["weights"]
    (run / "harvest" / "harvest.json").write_text(json.dumps(about))
    with pytest.raises(FormatError, match="weights"):
        write_dashboard([run])


def test_runs_are_given_once_and_called_apart(tmp_path):
    runs = [write_harvested_run(tmp_path / seed / "e2e", 20, groups=()) for seed in ("0", "1")]
    with pytest.raises(ConfigError, match="given twice"):
        write_dashboard([runs[0], tmp_path / "0" / ".." / "0" / "e2e"])
    with pytest.raises(ConfigError, match="one run or more"):
        write_dashboard([])
    page = write_dashboard(runs, tmp_path / "out")
    assert [run["name"] for run in received(tmp_path / "out" / "data" / "site.js")["runs"]] == ["0/e2e", "1/e2e"]
    assert page == tmp_path / "out" / "index.html"


def test_runs_with_long_names_are_called_by_what_they_are(tmp_path):
    folder = tmp_path / "objective.kind=e2e,objective.sparsity.coefficient=2"
    runs = [write_harvested_run(folder / f"seed={seed}", 20, groups=(), seed=seed) for seed in (0, 1)]
    assert [source.name for source in read_sources(runs)] == ["seed=0", "seed=1"]
    long = [run.rename(folder / f"{run.name},dictionary.size=4096,training.tokens=1000") for run in runs]
    assert [source.name for source in read_sources(long)] == [f"e2e λ 1 seed {seed}" for seed in (0, 1)]
    assert [source.name for source in read_sources([long[0]])] == ["e2e λ 1 seed 0"]


def test_written_again_it_is_the_same_and_what_it_was_goes(tmp_path):
    run = write_harvested_run(tmp_path / "run", 20)
    assert ran("dashboard", run, "--quiet").output == f"Open it: {run}/dashboard/index.html\n"
    before = {file: file.read_bytes() for file in (run / "dashboard").rglob("*.*") if file.is_file()}
    write_dashboard([run])
    assert {file: file.read_bytes() for file in (run / "dashboard").rglob("*.*") if file.is_file()} == before
    write_said(run, {0: ("new", 0.81, None)})
    write_dashboard([run])
    assert len(list((run / "dashboard" / "data").iterdir())) == 2  # site.js, and one folder


def test_a_site_stays_as_it_was_when_a_new_one_fails(tmp_path):
    run = write_harvested_run(tmp_path / "run", 20)
    write_dashboard([run])
    before = {file: file.read_bytes() for file in (run / "dashboard").rglob("*.*") if file.is_file()}
    (run / "harvest" / "contexts.parquet").write_bytes(b"no parquet")
    with pytest.raises(FormatError, match=r"contexts\.parquet"):
        write_dashboard([run])
    assert {file: file.read_bytes() for file in (run / "dashboard").rglob("*.*") if file.is_file()} == before


def test_the_pages_colours_are_those_of_all_figures():
    css = assets()["dashboard.css"].decode()
    for kind in KINDS:
        assert f"--{kind}: {COLOURS[kind].lower()};" in css


def test_the_page_makes_no_markup_of_text():
    for name, content in assets().items():
        code = content.decode("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", code
        ), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", code), name
