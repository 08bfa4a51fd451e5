"""Rank correlations of metrics: against scipy, with intervals that hold what they should"""
import math
from itertools import combinations
from pathlib import Path

import numpy as np, pandas, pytest
from scipy.stats import rankdata, spearmanr

from unloc.figures import label

from unloc.leagues import distance_left, rank_correlation, rank_correlations, sees_suppression

def metrics(seed=0, n_seeds=8, each=5):
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(n_seeds), each)
    truth = rng.normal(size=len(cluster)) + rng.normal(size=n_seeds)[cluster]
    return truth, truth + rng.normal(size=len(cluster)), cluster

def test_the_correlation_is_that_of_scipy_with_ties_and_missing_values():
    a, b, seeds = metrics()
    a = a.round()
    a[3] = math.nan
    found = rank_correlation(a, b, seeds)
    there = np.isfinite(a)
    assert found.n == there.sum()
    assert found.value == pytest.approx(spearmanr(a[there], b[there]).statistic, abs=1e-12)
    assert found.low < found.value < found.high

def test_an_interval_draws_whole_seeds():
    a, b, seeds = metrics()
    twice = rank_correlation(np.tile(a, 2), np.tile(b, 2), np.tile(seeds, 2))
    once = rank_correlation(a, b, seeds)
    assert twice.value == pytest.approx(once.value)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high)), "no new information"
    alone = rank_correlation(np.tile(a, 2), np.tile(b, 2), np.arange(2 * len(a)))
    assert alone.high - alone.low < once.high - once.low

def test_the_order_of_models_does_not_matter_and_a_seed_fixes_the_interval():
    a, b, seeds = metrics(1)
    assert rank_correlation(a, b, seeds) == rank_correlation(a, b, seeds)
    assert rank_correlation(a, b, seeds)[:4] == pytest.approx(rank_correlation(b, a, seeds)[:4])

def frame():
    truth, _, seeds = metrics(2)
    recovered = np.abs(truth)
    return pandas.DataFrame({"seed": seeds, "recovered": recovered, "m_start": 2., "m_end":
        1 + recovered / recovered.max(), "flat_start": 1., "flat_end": .5})

def test_what_is_left_is_a_share_of_the_originals_distance():
    left = distance_left(frame(), "m", 1.)
    assert left.max() == pytest.approx(1) and left.min() >= 0
    assert distance_left(frame(), "m", 2.).isna().all(), "original and retained are alike"

def test_a_metric_that_reads_what_comes_back_sees_it_and_a_constant_one_does_not():
    found = sees_suppression(frame(), {"m": 1., "flat": 0.}, {"m": "M", "flat": "Flat"})
    assert found.rho[0] == pytest.approx(1) and found.low[0] == pytest.approx(1)
    assert found.reason[1] == "one is constant"
    assert sees_suppression(frame(), {}, {"m": "M"}).reason[0], "no retained value"

def test_every_pair_once():
    found = rank_correlations(frame(), {"m_end": "M", "flat_end": "Flat", "recovered": "R"})
    assert found[["first", "second"]].values.tolist() == [["M", "Flat"], ["M", "R"], ["Flat", "R"]]

def one_pair(a, b, clusters, n_resamples=2000, seed=0):
    """The same interval, one pair and one resample at a time"""
    def spearman(x, y):
        x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
        size = np.linalg.norm(x) * np.linalg.norm(y)
        return np.clip(x @ y / size, -1, 1) if size else math.nan
    there = np.isfinite(a) & np.isfinite(b)
    a, b, clusters = a[there], b[there], clusters[there]
    known = np.unique(clusters)
    if len(known) < 3: return math.nan, math.nan, math.nan, len(a)
    if math.isnan(value := spearman(a, b)): return value, math.nan, math.nan, len(a)
    found = []
    for row in np.random.default_rng(seed).integers(0, len(known), (n_resamples, len(known))):
        drawn = np.concatenate([np.flatnonzero(clusters == known[i]) for i in row])
        found.append(spearman(a[drawn], b[drawn]))
    return value, *np.nanpercentile(found, (2.5, 97.5)), len(a)

@pytest.mark.parametrize("n_seeds", [3, 6])
def test_all_pairs_at_once_are_bit_identical_with_one_pair_at_a_time(n_seeds):
    rng = np.random.default_rng(n_seeds)
    seeds = rng.integers(0, n_seeds, 40) # clusters of different sizes, in no order
    a, b = metrics(3)[:2]
    columns = {"a": a, "b": b, "ties": a.round(), "constant": np.ones(40),
        "mostly": np.where(seeds > 0, 1., b), # constant in some resamples
        "missing": np.where(rng.uniform(size=40) < .3, np.nan, a + b),
        "few": np.where(seeds < 2, a, np.inf)}
    found = rank_correlations(pandas.DataFrame({"seed": seeds, **columns}), {c: c for c in columns})
    for row, (x, y) in zip(found.itertuples(), combinations(columns, 2), strict=True):
        assert (row.first, row.second) == (x, y)
        alone = one_pair(columns[x], columns[y], seeds)
        np.testing.assert_array_equal([row.rho, row.low, row.high, row.n], alone, f"{x}, {y}")
        np.testing.assert_array_equal(
            rank_correlation(columns[x], columns[y], seeds)[:4], alone, f"{x}, {y} alone")

def test_the_committed_league_is_what_its_models_give_bit_for_bit():
    folder = Path(__file__).parents[1] / "figures" / "related"
    models = pandas.read_csv(folder / "league_localizers_data.csv")
    stored = pandas.read_csv(folder / "league_judges.csv", keep_default_na=False,
        na_values={name: "" for name in ("rho", "low", "high")})
    called = {label("metric", c.removesuffix("_end")): c for c in models if c.endswith("_end")}
    names = {called[name]: name for name in dict.fromkeys([*stored["first"], *stored.second])}
    found = rank_correlations(models, names)
    pandas.testing.assert_frame_equal(found, stored, check_exact=True)

def test_equal_drawings_are_ranked_once(monkeypatch):
    calls = []
    def counted(x, **options):
        calls.append(x.shape)
        return rankdata(x, **options)
    monkeypatch.setattr("scipy.stats.rankdata", counted)
    rng = np.random.default_rng(0)
    columns = {f"m{i}": rng.normal(size=30) for i in range(12)}
    rank_correlations(pandas.DataFrame({"seed": np.arange(30) % 3, **columns}),
        {c: c for c in columns})
    assert calls == [(12, 30)] * 11, "10 drawings of three seeds, and the models themselves"
