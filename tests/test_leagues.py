"""Rank correlations of metrics: against scipy, with intervals that hold what they should"""
import math

import numpy as np, pandas, pytest
from scipy.stats import spearmanr

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
