"""Geometry of dictionaries where it is known; intervals against slow resamples; verdicts both ways."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy.stats import spearmanr
from torch.nn.functional import normalize
from typer.testing import CliRunner

import endwise
from endwise.analysis import over_features
from endwise.analysis.correlations import spearman
from endwise.analysis.geometry import figures as geometry_figures
from endwise.analysis.geometry.geometry import Similarity
from endwise.analysis.geometry.geometry_claims import claims, differences
from endwise.analysis.geometry.page import print_geometry, write_geometry
from endwise.analysis.geometry.similarity import (
    QUANTILES,
    MeanSimilarity,
    across_kinds,
    across_seeds,
    mean_over_seeds,
    quantiles,
    within,
)
from endwise.analysis.geometry.stability import THRESHOLDS, recurrence, stability, stable_function
from endwise.analysis.geometry.tables import recurrences
from endwise.cli import app
from endwise.common.errors import ConfigError, FormatError, RunFolderError
from endwise.common.statistics import interval_with_seeds
from endwise.evaluation.evaluate import read_firings
from made_dictionaries import directions, near, write_run
from made_runs import make_run

COUNT = 60


def bundle(count, spread, seed):
    """Directions about one of them: the smaller the spread, the nearer each lies to the next."""
    middle = directions(1, seed=99)
    return normalize(middle + spread * directions(count, seed=seed), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three kinds, three seeds, as the paper finds them: e2e spread out and never the same twice, e2e+ds much alike
    from seed to seed and near local.
    """
    path = tmp_path_factory.mktemp("runs")
    local, ds = bundle(COUNT, 0.8, 1), directions(COUNT, seed=2)
    ds[:20] = near(local, 0.2, 3)[0][:20]
    dead = np.where(np.arange(COUNT) < 5, 0, 3)
    for seed in range(3):
        rows = {
            "local": near(local, 0.5, 10 + seed)[0],
            "e2e": torch.cat([near(ds[20 + 13 * seed :][:13], 0.3, 5)[0], directions(COUNT - 13, seed=20 + seed)]),
            "e2e_ds": near(ds, 0.2, 30 + seed)[0],
        }
        for kind, each in rows.items():
            write_run(path / f"{kind}-{seed}", each, kind=kind, seed=seed, firings=np.roll(dead, seed))
    return path


@pytest.fixture(scope="module")
def found(folder):
    (one,) = endwise.geometry([folder])
    return one


def alive_rows(run):
    """Directions of the features that fired, in float64, and their numbers."""
    sae, firings = endwise.SAE.load(run.folder), read_firings(run_path(run))
    kept = np.flatnonzero(firings > 0)
    rows = sae.W_dec.double().numpy()[kept]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), kept


def run_path(run):
    return Path(run.folder)


def run_of(found, kind, seed=0):
    return next(run for run in found.runs if (run.kind, run.seed) == (kind, seed))


def test_every_cosine_is_that_of_all_pairs_of_alive_features(found):
    assert len(found.within) == 9
    for run in found.runs:
        rows, kept = alive_rows(run)
        assert len(rows) == COUNT - 5
        cosines = rows @ rows.T
        np.fill_diagonal(cosines, -np.inf)
        similarity = found.within[run.folder]
        assert (similarity.features == kept).all() and similarity.candidates == len(kept) - 1
        np.testing.assert_allclose(similarity.cosine, cosines.max(1), atol=1e-6)
        assert (similarity.nearest == kept[cosines.argmax(1)]).all()
    for a, b in ((run_of(found, "e2e", 0), run_of(found, "e2e", 2)), (run_of(found, "e2e"), run_of(found, "local"))):
        (rows, kept), (others, other_kept) = alive_rows(a), alive_rows(b)
        for one, two, similarity in ((rows, others, found.between(a, b)), (others, rows, found.between(b, a))):
            np.testing.assert_allclose(similarity.cosine, (one @ two.T).max(1), atol=1e-6)
        assert (found.between(a, b).nearest == other_kept[(rows @ others.T).argmax(1)]).all()
        assert (found.between(a, b).features == kept).all()


def test_pairs_are_those_across_seeds_and_across_kinds_of_one_seed(found):
    names = {tuple(sorted(run_path(run).name for run in map(found_run(found), pair))) for pair in found.pairs}
    kinds = ("e2e", "e2e_ds", "local")
    seeds = {(f"{kind}-{a}", f"{kind}-{b}") for kind in kinds for a, b in ((0, 1), (0, 2), (1, 2))}
    across = {(f"{a}-{seed}", f"{b}-{seed}") for a, b in (kinds[:2], kinds[1:], kinds[::2]) for seed in range(3)}
    assert names == seeds | across


def found_run(found):
    by_folder = {run.folder: run for run in found.runs}
    return by_folder.__getitem__


def test_a_dictionary_that_is_another_permuted_is_found_again(tmp_path):
    rows = directions(40)
    other, gone = near(rows, 0.1, seed=4)
    a, b = write_run(tmp_path / "a", rows), write_run(tmp_path / "b", other, seed=1)
    (one,) = endwise.geometry([a, b])
    pair = one.pairs[str(a), str(b)]
    assert (pair.there.nearest == gone).all() and (pair.matching.b == gone).all()
    of = stability(one, one.runs[0])
    assert of.recurrence(0.9).min() == 1.0 and of.stable(0.9).all() and not of.stable(0.999999).any()


def test_across_seeds_is_the_mean_over_other_seeds_then_features_then_seeds(found):
    means = []
    for seed in range(3):
        rows = alive_rows(run_of(found, "e2e_ds", seed))[0]
        others = [alive_rows(run_of(found, "e2e_ds", other))[0] for other in range(3) if other != seed]
        best = np.mean([(rows @ other.T).max(1) for other in others], axis=0)
        means.append(best.mean())
    measure = across_seeds(found, run_of(found, "e2e_ds"))
    assert list(measure.by_seed.values()) == pytest.approx(means, abs=1e-6)
    assert measure.interval.estimate == pytest.approx(np.mean(means), abs=1e-6)


def test_recurrence_is_the_share_of_seeds_at_each_threshold(found):
    run = run_of(found, "local")
    shares = []
    for seed in range(3):
        rows = alive_rows(run_of(found, "local", seed))[0]
        others = [alive_rows(run_of(found, "local", other))[0] for other in range(3) if other != seed]
        best = np.stack([(rows @ other.T).max(1) for other in others])
        shares.append([(best >= threshold).mean() for threshold in THRESHOLDS])
    of = recurrence(found, run)
    assert [each.seed for each in of.runs] == [0, 1, 2]
    assert [share.estimate for share in of.share] == pytest.approx(np.mean(shares, axis=0))
    assert all(share.low <= share.estimate + 1e-12 and share.estimate - 1e-12 <= share.high for share in of.share)


def test_a_share_of_features_is_drawn_within_0_and_100_percent(found):
    """Cut off Student's t where it is wider than a share can be."""
    shares = [share for of in recurrences(found) for share in of.share]
    assert min(share.low for share in shares) < 0 or max(share.high for share in shares) > 1
    (panel,) = geometry_figures.threshold_curves(found, "name").panels
    assert all(min(series.band.low) >= 0 and max(series.band.high) <= 100 for series in panel.series)


def slow_draws(statistic, run, size, resamples=over_features.RESAMPLES):
    """Each resample drawn feature by feature."""
    draws = []
    for drawn in over_features.counts(size, over_features.stream(run), resamples):
        assert (drawn.sum(1) == size).all()
        draws += [statistic(np.repeat(np.arange(size), row.astype(int))) for row in drawn]
    return np.array(draws)


def test_intervals_are_those_of_a_slow_resample(found):
    run = found.runs[0]
    similarity = found.within[run.folder]
    values = similarity.cosine.astype(np.float64)
    means = slow_draws(lambda drawn: values[drawn].mean(), run, len(values))
    measure = MeanSimilarity.of(run, {(0, 0): (run, values)})
    assert (measure.interval.low, measure.interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    drawn = slow_draws(lambda drawn: np.quantile(values[drawn], QUANTILES), run, len(values))
    for i, interval in enumerate(quantiles(similarity)):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn[:, i], [0.025, 0.975])))
        assert interval.estimate == pytest.approx(np.quantile(values, QUANTILES[i]))


def test_the_bootstrap_covers_a_known_mean():
    """Count the intervals that hold the mean, 1, of the distribution: about 95 % of 200 samples."""
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.exponential(size=200)
        draws = over_features.resampled_means(values, np.random.default_rng(trial), 200)
        low, high = np.quantile(draws, [0.025, 0.975])
        held += low <= 1 <= high
    assert 180 <= held <= 199


def test_streams_are_the_runs_own(monkeypatch):
    a, b = make_run("e2e", 1, 0.1, 10), make_run("e2e", 1, 0.1, 10, seed=1)
    first, again, other = (next(over_features.counts(50, over_features.stream(run), 4)) for run in (a, a, b))
    assert (first == again).all() and (first != other).any()
    monkeypatch.setattr(over_features, "_CHUNK", 60)
    # More than are held at a time come in parts.
    one_by_one = [*over_features.counts(50, over_features.stream(a), 4)]
    assert [len(part) for part in one_by_one] == [1] * 4 and (np.concatenate(one_by_one) == first).all()
    in_parts = np.concatenate(list(over_features.counts(80, over_features.stream(a), 3)))
    assert in_parts.shape == (3, 80) and (in_parts.sum(1) == 80).all()


def test_spearman_is_ranked_again_in_each_resample():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, 40).astype(float), rng.normal(size=40)
    run = make_run("local", 1, 0.1, 10)
    slow = slow_draws(lambda drawn: spearmanr(x[drawn], y[drawn]).statistic, run, 40, 50)
    draws = over_features.resampled_spearman(x, y, over_features.stream(run), 50)
    assert draws == pytest.approx(slow, abs=1e-9)
    assert spearman(x, y)[0] == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(40), y)[0])


def test_stable_features_carry_what_they_carry(found):
    run = run_of(found, "e2e_ds")
    of = stability(found, run)
    stable = of.stable(0.7)
    assert stable.any()
    importance = np.full(COUNT, 1e6)  # of dead features, which do not count
    importance[of.features] = np.where(stable, -3.0, 1.0)
    made = stable_function(of, importance, 0.7)
    assert made.of_features.estimate == pytest.approx(stable.mean())
    assert made.of_importance.estimate == pytest.approx(3 * stable.sum() / (3 * stable.sum() + (~stable).sum()))
    weight = np.abs(importance[of.features])
    slow = slow_draws(lambda i: weight[i][stable[i]].sum() / weight[i].sum(), run, len(weight))
    ends = (made.of_importance.low, made.of_importance.high)
    assert ends == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    importance[of.features] = -(of.mean_cosine**3)
    assert stable_function(of, importance, 0.7).correlation.estimate == pytest.approx(1.0)
    assert stable_function(of, np.zeros(COUNT), 0.7) is None


def test_thinning_is_the_mean_over_random_subsets():
    rows = directions(30, seed=5).double().numpy()
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    ranked = -np.sort(-cosines, axis=1)[:, :16]
    run = make_run("local", 1, 0.1, 10)
    similarity = Similarity(run, None, np.arange(30), np.zeros(30, int), ranked.astype(np.float32), 29)
    rng, sums, seen = np.random.default_rng(0), np.zeros(30), np.zeros(30)
    for _ in range(4000):
        kept = rng.random(30) < 0.5
        best = np.where(kept, cosines, -np.inf).max(1)
        known = np.isfinite(best)
        sums[known] += best[known]
        seen += known
    assert similarity.among(14.5) == pytest.approx(sums / seen, abs=0.02)
    assert similarity.among(29.0) == pytest.approx(ranked[:, 0], abs=1e-6)
    assert similarity.among(50.0) == pytest.approx(ranked[:, 0], abs=1e-6)


def test_differences_are_paired_only_for_the_same_features(found):
    by_name = {(each.name, each.a.key, each.b.key): each for each in differences(found)}
    paired = by_name["local's features, nearest in", "e2e_ds", "e2e"]
    assert paired.paired and not by_name["nearest in local", "e2e_ds", "e2e"].paired
    values = []
    for seed in range(3):
        local, e2e, ds = (run_of(found, kind, seed) for kind in ("local", "e2e", "e2e_ds"))
        gaps = found.between(local, ds).cosine.astype(float) - found.between(local, e2e).cosine.astype(float)
        values.append((local, gaps))
    drawn = np.mean([slow_draws(lambda i, of=of: of[i].mean(), run, len(of)) for run, of in values], axis=0)
    means = [of.mean() for _, of in values]
    expected = interval_with_seeds(float(np.mean(means)), means, float(drawn.std(ddof=1)))
    found = paired.interval
    assert (found.low, found.estimate, found.high) == pytest.approx((expected.low, expected.estimate, expected.high))
    assert [run.seed for run in paired.runs] == [0, 1, 2]


def test_across_seeds_the_variance_is_the_jackknifes():
    """Compare with the known variance of cosines that are sums of one number per seed: that of twice their mean."""
    own = np.array([0.1, 0.25, 0.3, 0.6])
    cosines = own[:, None] + own
    by_seed = [np.delete(row, i).mean() for i, row in enumerate(cosines)]
    still = np.zeros((4, 50))
    found = mean_over_seeds(by_seed, still, of_pairs=True)
    expected = interval_with_seeds(2 * own.mean(), 2 * own, 0.0)
    assert (found.low, found.estimate, found.high) == pytest.approx((expected.low, expected.estimate, expected.high))
    apart = mean_over_seeds(by_seed, still, of_pairs=False)
    assert apart.high - apart.low == pytest.approx((found.high - found.low) / 3)


def test_kinds_are_compared_seed_by_seed(folder, tmp_path):
    """Those of one seed alone, and none where no seed has both."""
    for kind, seeds in (("local", (0, 1, 2)), ("e2e", (1, 2, 3))):
        for seed in seeds:
            write_run(tmp_path / f"{kind}-{seed}", directions(20, seed=40 + seed), kind=kind, seed=seed)
    (one,) = endwise.geometry([tmp_path])
    within_kinds = next(
        each for each in differences(one) if (each.name, each.a.key, each.b.key) == ("within", "e2e", "local")
    )
    expected = [
        within(one, run_of(one, "e2e", seed)).by_seed[seed, 0] - within(one, run_of(one, "local", 1)).by_seed[seed, 0]
        for seed in (1, 2)
    ]
    assert within_kinds.interval.estimate == pytest.approx(np.mean(expected))
    assert [run.seed for run in within_kinds.runs] == [1, 2]
    assert {(each.a.key, each.b.key) for each in differences(one)} == {("e2e", "local")}  # of kinds that are there
    made = claims(one)[0]
    assert made.verdict == "not testable here" and "over features alone, two seeds (initialisation)" in made.ours
    assert across_kinds(one, run_of(one, "e2e", 3), run_of(one, "local", 1)).by_seed.keys() == {(1, 0), (2, 0)}


def test_verdicts_where_it_is_as_the_paper_finds(found):
    made = claims(found)
    assert [claim.verdict for claim in made] == ["shown"] * 5, [claim.ours for claim in made]
    assert re.search(
        r"within, e2e less local: −0\.\d+ \[−0\.\d+, −0\.\d+\] over features and 3 seeds \(initialisation\)",
        made[0].ours,
    )
    assert "among equally many" in made[0].ours and "−0.166" in made[0].published


def test_verdicts_where_it_is_the_other_way(found, folder, tmp_path):
    swapped = {"local": "e2e", "e2e": "local", "e2e_ds": "e2e_ds"}
    for run in found.runs:
        rows = endwise.SAE.load(run.folder).W_dec.clone()
        kind = swapped[run.kind]
        if kind == "e2e_ds":
            rows = directions(COUNT, seed=70 + run.seed)
        write_run(tmp_path / f"{kind}-{run.seed}", rows, kind=kind, seed=run.seed)
    (other,) = endwise.geometry([tmp_path])
    made = claims(other)
    assert made[0].verdict == made[2].verdict == made[4].verdict == "not shown"
    assert "less local: +" in made[0].ours


def test_without_seeds_or_kinds_there_is_nothing_to_say(tmp_path, undrawn):
    write_run(tmp_path / "local", directions(20))
    write_run(tmp_path / "e2e", directions(20, seed=1), kind="e2e")
    write_run(tmp_path / "dead", directions(20), kind="e2e_ds", firings=np.zeros(20))
    (one,) = endwise.geometry([tmp_path])
    made = claims(one)
    assert [claim.verdict for claim in made] == ["not testable here"] * 5
    assert re.search(r"less local: [+−]0\.\d+ \[.*\] over features alone, one seed", made[0].ours)
    assert "there is no run of e2e+ds with two alive features" in made[1].ours
    assert "with several seeds" in made[2].ours
    assert recurrence(one, one.runs[0]) is None and across_seeds(one, one.runs[0]) is None
    assert within(one, run_of(one, "e2e_ds")) is None
    page = write_geometry([one], tmp_path / "out").read_text()
    assert 'colspan="4">there is no run of e2e+ds with two alive features, of a seed of the others<' in page


def test_only_what_may_be_compared_is_compared(folder, tmp_path):
    write_run(tmp_path / "longer", directions(COUNT), tokens=512)
    write_run(tmp_path / "site", directions(COUNT), site="blocks.2.hook_resid_pre", seed=1)
    write_run(tmp_path / "rate", directions(COUNT), seed=1, learning_rate=2e-3)
    found = endwise.geometry([folder, tmp_path])
    assert [len(one.runs) for one in found] == [10, 1, 1] or [len(one.runs) for one in found] == [1, 10, 1]
    ten = next(one for one in found if len(one.runs) == 10)
    assert len(ten.twins(run_of(ten, "local"))) == 3
    for name, rule in (("longer", "number of held-out tokens"), ("site", "one site")):
        with pytest.raises(ConfigError, match=rule):
            endwise.geometry([folder], pairs=[(folder / "local-0", tmp_path / name)])


def test_of_one_kind_with_seeds_that_run_stands_which_is_nearest_in_ce(tmp_path):
    write_run(tmp_path / "e2e", directions(20), kind="e2e", ce_increase=0.5)
    for coefficient, ce_increase in ((1.0, 0.1), (2.0, 0.5), (3.0, 0.9)):
        for seed in range(2):
            place = tmp_path / f"{coefficient}-{seed}"
            write_run(place, directions(20, seed), coefficient=coefficient, seed=seed, ce_increase=ce_increase)
    write_run(tmp_path / "tuned", directions(20), coefficient=9.0, ce_increase=0.5, learning_rate=1.0)
    (one,) = endwise.geometry([tmp_path])
    assert [(run.kind, run.coefficient) for run in one.similar] == [("local", 2.0), ("e2e", 1.0)]
    assert [(run.kind, run.coefficient) for run in one.seeded] == [("local", 2.0)]


def test_a_pair_that_is_asked_for(folder):
    a, b = folder / "local-0", folder / "e2e-1"
    (one,) = endwise.geometry([folder / "local-0"], pairs=[(a, b)])
    assert one.given == ((str(a), str(b)),) and one.pairs[str(a), str(b)].there.other.seed == 1
    with pytest.raises(ConfigError, match="takes two runs"):
        endwise.geometry([folder], pairs=[(a, a)])
    with pytest.raises(RunFolderError, match="not a run folder"):
        endwise.geometry([folder], pairs=[(a, folder)])


def test_what_does_not_belong_together_is_refused(tmp_path):
    a = write_run(tmp_path / "a", directions(20))
    b = write_run(tmp_path / "b", directions(20, width=12), seed=1)
    with pytest.raises(FormatError, match=r"width 16, .* of 12"):
        endwise.geometry([a, b])
    endwise.SAE.load(a).save(b / "sae")
    (b / "evaluation_firings.safetensors").unlink()
    with pytest.raises(FormatError, match="Measure the run again: endwise evaluate"):
        endwise.geometry([a, b])
    values = json.loads((a / "evaluation.json").read_text())
    (a / "evaluation.json").write_text(json.dumps(values | {"alive": 19}))
    with pytest.raises(FormatError, match="19 of them alive"):
        endwise.geometry([a])
    (a / "evaluation.json").unlink()
    with pytest.raises(RunFolderError, match="was not measured"):
        endwise.geometry([a])
    rows = directions(20)
    rows[3] = 0
    with pytest.raises(FormatError, match="length 0"):
        endwise.geometry([write_run(tmp_path / "c", rows)])


def test_the_command_writes_tables_figures_and_a_page(folder, tmp_path):
    hostile = folder / "e2e-0"
    result = CliRunner().invoke(
        app, ["geometry", str(folder), "--out", str(tmp_path / "out"), "--pair", f"{hostile},{folder / 'local-1'}"]
    )
    assert result.exit_code == 0, result.output
    assert "shown: e2e dictionaries are more orthogonal" in result.output.replace("\n", " ")
    out = tmp_path / "out"
    for name in ("within", "pairs", "differences", "seeds", "recurrence", "features"):
        rows = parquet.read_table(out / f"{name}.parquet").to_pylist()
        assert len(list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))) == len(rows) > 0
    features = parquet.read_table(out / "features.parquet").to_pandas()
    assert len(features) == 9 * (COUNT - 5) and features["density"].max() == pytest.approx(3 / 256)
    for name in ("cosines-1", "kinds-1", "within-1", "recurrence-1"):
        assert (out / f"{name}.pdf").stat().st_size > 0 and (out / f"{name}.png").stat().st_size > 0
    page = (out / "geometry.html").read_text()
    assert page.index("more orthogonal") < page.index('id="cosines-1"')
    assert "http" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL).replace("http-equiv", "")
    bad = CliRunner().invoke(app, ["geometry", str(folder), "--pair", str(hostile)])
    assert bad.exit_code == 2 and "comma between them" in bad.stderr


def test_importance_reaches_table_and_page(folder, tmp_path, undrawn):
    importance = np.linspace(-1, 1, COUNT)
    found = endwise.geometry([folder], importance=lambda run: importance if "local" in run.name else None)
    page = write_geometry(found, tmp_path).read_text()
    rows = parquet.read_table(tmp_path / "stable_function.parquet").to_pylist()
    assert [row["kind"] for row in rows] == ["local"] * 3
    assert "What stable features carry" in page
    features = parquet.read_table(tmp_path / "features.parquet").to_pandas()
    known = features[features["kind"] == "local"]
    assert known["importance"].to_numpy() == pytest.approx(np.linspace(-1, 1, COUNT)[known["feature"]])
    assert features[features["kind"] == "e2e"]["importance"].isna().all()
    print_geometry(found)
