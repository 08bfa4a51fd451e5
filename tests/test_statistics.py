"""The tests agree with scipy and statsmodels, keep their size and coverage in simulation, and
refuse what is not a set of pairs."""
import dataclasses, itertools, json, subprocess, sys
import numpy as np, pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired
from unloc.statistics import (
    Paired, clustered_bootstrap, holm, mixed, paired, pairs_needed, partial_correlation,
    power_of_equivalence, smallest_detectable)


@pytest.fixture
def rng(): return np.random.default_rng(20)

def lone(d, margin=.02): return paired(d, np.zeros(len(d)), margin)


@pytest.mark.parametrize('n', [3, 5, 10, 30, 200])
@pytest.mark.parametrize('shift', [0., .015, -.05])
def test_agrees_with_scipy_and_statsmodels(rng, n, shift):
    a, b = rng.normal(.6, .03, (2, n)); a += shift
    found, t = paired(a, b, margin=.02), stats.ttest_rel(a, b)
    assert found.p_difference == pytest.approx(t.pvalue, rel=1e-10)
    assert found.p_equivalence == pytest.approx(ttost_paired(a, b, -.02, .02)[0], rel=1e-8)
    for level, interval in ((.95, found.interval95), (.90, found.interval90)):
        assert interval == pytest.approx(tuple(t.confidence_interval(level)), rel=1e-10)
    assert (found.n, found.margin) == (n, .02)
    assert found.difference == pytest.approx((a - b).mean(), abs=1e-15)
    for value, x in (
        (found.sd_a, a), (found.sd_b, b), (found.sd_difference, a - b),
        (found.sd_absolute, abs(a - b))):
        assert value == pytest.approx(x.std(ddof=1))
    assert (found.mean_a, found.mean_b, found.mean_absolute) == pytest.approx(
        (a.mean(), b.mean(), abs(a - b).mean()))


def test_the_margin_and_the_interval_say_the_same(rng):
    for _ in range(50):
        a, b = rng.normal(0, .02, (2, 8))
        edge = paired(a, b, .02).smallest_margin
        assert edge == max(map(abs, paired(a, b, .02).interval90))
        assert paired(a, b, edge).p_equivalence == pytest.approx(.05, rel=1e-9)
        assert (
            paired(a, b, edge * 1.001).p_equivalence
            < .05
            < paired(a, b, edge * .999).p_equivalence)


def test_swapping_the_arms_changes_signs_only(rng):
    a, b = rng.normal(.5, .1, (2, 9))
    x, y = paired(a, b, .05), paired(b, a, .05)
    assert (y.difference, y.interval95) == (-x.difference, (-x.interval95[1], -x.interval95[0]))
    for name in (
        'p_difference', 'p_sign_flip', 'p_equivalence', 'smallest_detectable', 'smallest_margin',
        'mean_absolute', 'verdict'):
        assert getattr(x, name) == getattr(y, name)


@pytest.mark.parametrize('n', [3, 4, 5, 7, 10, 13])
@pytest.mark.parametrize('kind', ['normal', 'ties'])
def test_sign_flip_equals_brute_force(rng, n, kind):
    # tenths do not add up exactly in floats
    d = rng.normal(.01, .02, n) if kind == 'normal' else rng.integers(-3, 5, n) / 10
    exact = d if kind == 'normal' else np.round(d * 10)
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    assert lone(d).p_sign_flip == np.mean(abs(signs @ exact) >= abs(exact.sum()) - 1e-12)


@pytest.mark.parametrize('n', [17, 30, 40])
def test_sign_flip_of_many_pairs_is_a_permutation_p(rng, n):
    d = rng.normal(.008, .02, n)
    flips = rng.choice([-1., 1.], (40_000, n)) @ d
    assert lone(d).p_sign_flip == pytest.approx(np.mean(abs(flips) >= abs(d.sum())), abs=.012)
    assert lone(abs(d) + .01).p_sign_flip == 2 / 2**n


def test_sign_flip_has_a_floor_and_a_ceiling(rng):
    assert min(lone(d).p_sign_flip for d in rng.normal(1, 1, (200, 5))) == .0625
    assert lone([.1, -.1, .2, -.2]).p_sign_flip == 1.
    assert lone(rng.normal(size=41)).p_sign_flip is None


def test_size_and_coverage(rng):
    """Two-sided p below .05 in 5 % of true nulls; TOST in at most 5 % at the margin; the 95 and 90
    % intervals cover."""
    runs = [lone(d) for d in rng.normal(.02, .015, (1200, 8))]
    for level, name in ((.95, 'interval95'), (.90, 'interval90')):
        assert np.mean(
            [low <= .02 <= high for low, high in (getattr(r, name) for r in runs)]
        ) == pytest.approx(level, abs=.02)
    assert .03 < np.mean([r.p_equivalence < .05 for r in runs]) < .065
    nulls = [lone(d) for d in rng.normal(0, .015, (1200, 8))]
    assert np.mean([r.p_difference < .05 for r in nulls]) == pytest.approx(.05, abs=.015)
    assert .02 < np.mean([r.p_sign_flip <= .05 for r in nulls]) < .065


@pytest.mark.parametrize(
    'n,true,expected',
    [
        (5, 0., .30), (10, 0., .80), (15, 0., .96), (3, 0., None), (10, .01, None),
        (10, -.01, None), (30, .02, .05), (8, .03, None)])
def test_power_of_equivalence_is_the_simulated_one(rng, n, true, expected):
    exact = power_of_equivalence(.02, n, .02, true=true)
    d = rng.normal(true, .02, (20_000, n))
    reach = abs(d.mean(1)) + stats.t.ppf(.95, n - 1) * d.std(1, ddof=1) / np.sqrt(n)
    assert exact == pytest.approx((reach < .02).mean(), abs=.011)
    if expected: assert exact == pytest.approx(expected, abs=.01)


def test_power_of_equivalence_behaves_like_a_power():
    by_n = [power_of_equivalence(.03, n, .02) for n in range(3, 60, 8)]
    assert (np.diff(by_n) > 0).all() and by_n[-1] > .99
    assert power_of_equivalence(.03, 20, .02) == pytest.approx(.78, abs=.01)
    assert power_of_equivalence(.03, 30, .02) == pytest.approx(.94, abs=.01)
    assert power_of_equivalence(.02, 9, .02, true=.01) == pytest.approx(
        power_of_equivalence(.02, 9, .02, true=-.01), abs=1e-9)
    # free of units
    assert power_of_equivalence(2, 9, 2, true=1) == pytest.approx(
        power_of_equivalence(.02, 9, .02, true=.01), abs=1e-9)
    assert (
        power_of_equivalence(.02, 9, .02, alpha=.01)
        < power_of_equivalence(.02, 9, .02)
        < power_of_equivalence(.02, 9, .02, alpha=.1))
    assert all(
        power_of_equivalence(sd, n, .02, true=.02) <= .05 + 1e-9
        for sd in (.002, .02, .2)
        for n in (3, 10, 100))
    assert (power_of_equivalence(0, 5, .02), power_of_equivalence(0, 5, .02, true=.02)) == (1., 0.)
    assert power_of_equivalence(.02, 2000, .02) == pytest.approx(1.)
    assert power_of_equivalence(5., 3, .001) < 1e-6


@pytest.mark.parametrize('n', [3, 4, 5, 10, 30, 1000])
@pytest.mark.parametrize('alpha,power', [(.05, .8), (.05, .95), (.01, .8)])
def test_smallest_detectable_has_its_power(rng, n, alpha, power):
    shift = smallest_detectable(.02, n, alpha, power)
    if n > 3:
        # for 3 pairs statsmodels returns NaN
        assert TTestPower().power(shift / .02, n, alpha) == pytest.approx(power, abs=1e-6)
    if n <= 30:
        p = stats.ttest_1samp(rng.normal(shift, .02, (20_000, n)), 0, axis=1).pvalue
        assert (p < alpha).mean() == pytest.approx(power, abs=.011)
    if (alpha, power) == (.05, .8):
        d = rng.normal(.3, .02, n)
        assert lone(d).smallest_detectable == pytest.approx(
            smallest_detectable(d.std(ddof=1), n), rel=1e-12)


@pytest.mark.parametrize(
    'mean,sd,verdict',
    [
        (0, .005, 'equivalent'), (.1, .005, 'different'), (.01, .002, 'both'),
        (-.01, .002, 'both'), (.01, .08, 'inconclusive')])
def test_four_verdicts(mean, sd, verdict):
    d = np.linspace(-1, 1, 10); d = d / d.std(ddof=1) * sd + mean
    assert lone(d).verdict == verdict


@pytest.mark.parametrize(
    'shift,p,flip,equivalence,verdict',
    [
        (0., 1., 1., 0., 'equivalent'),
        (.0125, 0., .125, 0., 'both'),
        (-.0125, 0., .125, 0., 'both'),
        (.03125, 0., .125, 1., 'different'),
        (.0625, 0., .125, 1., 'different')])
def test_pairs_without_spread_give_exact_answers(shift, p, flip, equivalence, verdict):
    b = np.array([.5, .625, .75, .9])
    found = paired(b + shift, b, margin=.03125)
    assert (found.p_difference, found.p_sign_flip, found.p_equivalence, found.verdict) == (
        p, flip, equivalence, verdict)
    assert (found.sd_difference, found.sd_absolute, found.smallest_detectable) == (0., 0., 0.)
    assert found.difference == pytest.approx(shift)
    assert found.interval90 == found.interval95 == (found.difference,) * 2
    assert found.smallest_margin == found.mean_absolute == abs(found.difference)
    assert not any(isinstance(v, float) and np.isnan(v) for v in dataclasses.astuple(found))


def test_rounding_is_not_an_effect():
    b = np.array([.3, .6, .7, .1])
    for a in (b + np.array([1, 1, 1, 1]) * 1e-16, np.nextafter(b, 1), b * 3 / 3):
        assert paired(a, b, .02).verdict == 'equivalent' and paired(a, b, .02).p_difference == 1
    # far above rounding: a real, trivial difference
    assert paired(b + [1e-9, 1.1e-9, 1.2e-9, .9e-9], b, .02).verdict == 'both'


def test_the_result_is_plain_and_frozen(rng):
    a, b = rng.normal(size=(2, 6))
    found = paired(a.tolist(), tuple(b), 1)
    assert paired(a, b, 1.) == found and isinstance(found, Paired)
    for v in dataclasses.astuple(found): assert type(v) in (int, float, str, tuple)
    assert json.loads(json.dumps(dataclasses.asdict(found)))['interval90'] == list(found.interval90)
    with pytest.raises(dataclasses.FrozenInstanceError): found.verdict = 'equivalent'
    a.flags.writeable = b.flags.writeable = False
    paired(a, a, 1.)


@pytest.mark.parametrize(
    'a,b,margin,message',
    [
        ([1, 2, 3], [1, 2], .02, 'a has 3 values and b 2: expected one of each per pair'),
        ([1, 2], [1, 2], .02, '2 pairs: expected at least 3'),
        ([], [], .02, '0 pairs'),
        ([1, 2, np.nan], [1, 2, 3], .02, r'a\[2\] is nan'),
        ([1, 2, 3], [np.inf, 2, 3], .02, r'b\[0\] is inf'),
        ([1, 2, 3], [[1], [2], [3]], .02, r'b: .*shape \(3, 1\)'),
        (['x', 'y', 'z'], [1, 2, 3], .02, 'a: expected a flat sequence of numbers, got list'),
        (1., 2., .02, r'a: .*shape \(\)'),
        ([1, 2, 3], [1, 2, 3], 0, 'margin is 0: expected a finite number above 0'),
        ([1, 2, 3], [1, 2, 3], -1, 'margin is -1'),
        ([1, 2, 3], [1, 2, 3], np.nan, 'margin is nan'),
        ([1, 2, 3], [1, 2, 3], np.inf, 'margin is inf'),
        ([1, 2, 3], [1, 2, 3], None, 'margin is None'),
        ([1, 2, 3], [1, 2, 3], 'small', "margin is 'small'")])
def test_bad_pairs_are_named_in_one_line(a, b, margin, message):
    with pytest.raises(ValueError, match=message) as error: paired(a, b, margin)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: smallest_detectable(-1, 5), 'sd is -1: expected a finite number of at least 0'),
        (lambda: smallest_detectable(1, 2), 'n is 2: expected a whole number of at least 3'),
        (lambda: smallest_detectable(1, 5.5), 'n is 5.5: expected a whole number'),
        (lambda: smallest_detectable(1, 5, 0), 'alpha is 0'),
        (lambda: smallest_detectable(1, 5, power=1), 'power is 1'),
        (
            lambda: smallest_detectable(1, 5, power=.05),
            'power is 0.05: expected a finite number above 0.05 and below 1'),
        (lambda: power_of_equivalence(np.nan, 5, .02), 'sd is nan'),
        (lambda: power_of_equivalence(.1, 2, .02), 'n is 2'),
        (lambda: power_of_equivalence(.1, 5, 0), 'margin is 0'),
        (lambda: power_of_equivalence(.1, 5, .02, alpha=.5), 'alpha is 0.5'),
        (
            lambda: power_of_equivalence(.1, 5, .02, true=np.inf),
            'true is inf: expected a finite number'),
        (lambda: holm([]), 'at least one number'),
        (lambda: holm([.1, np.nan]), r'p_values\[1\] is nan'),
        (lambda: holm([.1, 1.5]), r'p_values\[1\] is 1.5: expected a p-value in \[0, 1\]'),
        (lambda: holm([[.1]]), r'shape \(1, 1\)'),
        (lambda: holm('p'), 'got str'),
        (lambda: holm(.05), r'shape \(\)')])
def test_bad_designs_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error: call()
    assert '\n' not in str(error.value)


def test_holm_is_the_step_down_of_its_definition(rng):
    for p in (*rng.uniform(size=(3, 8)), *rng.integers(0, 4, (3, 6)) / 40):
        order, want, worst = np.argsort(p, kind='stable'), np.empty(len(p)), 0.
        for rank, i in enumerate(order):
            want[i] = worst = max(worst, min(1., p[i] * (len(p) - rank)))
        assert holm(p) == pytest.approx(want) and (holm(p) >= p).all()
    assert holm([.2]) == [.2] and holm((.01, .04, .03)) == pytest.approx([.03, .06, .06])


def test_pairs_needed_is_the_first_that_reaches_the_power():
    for sd, margin, power in ((.02, .02, .8), (.03, .02, .94), (.01, .05, .5), (.034, .02, .9)):
        n = pairs_needed(sd, margin, power)
        assert power_of_equivalence(sd, n, margin) >= power
        assert n == 3 or power_of_equivalence(sd, n - 1, margin) < power
    n = pairs_needed(.05, .02)
    assert pairs_needed(.05, .02, most=n) == n == 55
    with pytest.raises(ValueError, match='more than 54 pairs'): pairs_needed(.05, .02, most=n - 1)
    with pytest.raises(ValueError, match='more than 50 pairs: a margin of 0.001'):
        pairs_needed(.1, .001, most=50)


def test_the_clustered_interval_covers_and_the_naive_one_does_not(rng):
    cover = {'authors': 0, 'facts': 0}
    for seed in range(200): # true mean 0; 30 authors of 5 facts that share most of their spread
        x = (rng.normal(size=(30, 1)) + .5 * rng.normal(size=(30, 5))).ravel()
        for name, clusters in (('authors', np.repeat(np.arange(30), 5)), ('facts', np.arange(150))):
            low, high = clustered_bootstrap(x, clusters, seed, n=400)
            cover[name] += low <= 0 <= high
    # 0.95 less a percentile interval's shortness at 30 clusters, within 3 standard errors
    assert .885 <= cover['authors'] / 200 <= .99 and cover['facts'] / 200 < .75, cover

def test_clusters_of_unequal_size_weigh_by_their_facts():
    low, high = clustered_bootstrap([1.] * 8 + [0.] * 4, ['a'] * 6 + ['b'] * 2 + ['c'] * 4)
    assert 0 <= low < 8 / 12 < high <= 1
    assert clustered_bootstrap([1., 2., 4.], [0, 1, 2], seed=1) == clustered_bootstrap(
        [1., 2., 4.], [0, 1, 2], seed=1)


def crossed(rng, effect, spreads=(.05, .02), n=(8, 6), noise=.01): # injections, draws, two arms
    i, d, arm = (
        x.ravel() for x in np.meshgrid(np.arange(n[0]), np.arange(n[1]), [0, 1], indexing='ij'))
    return (
        effect * arm
        + rng.normal(0, spreads[0], n[0])[i]
        + rng.normal(0, spreads[1], n[1])[d]
        + rng.normal(0, noise, len(arm)),
        arm,
        {'injection': i, 'draw': d})

def test_a_balanced_mixed_model_is_the_analysis_of_variance(rng):
    value, arm, by = crossed(rng, .03)
    found = mixed(value, arm, by)
    cells = value.reshape(8, 6, 2)
    assert found.effect == pytest.approx(cells[..., 1].mean() - cells[..., 0].mean(), abs=1e-9)
    rest = (
        cells
        - cells.mean((1, 2), keepdims=True)
        - cells.mean((0, 2), keepdims=True)
        - cells.mean((0, 1), keepdims=True)
        + 2 * cells.mean())
    variance = (rest**2).sum() / (96 - 8 - 6 - 2 + 2)
    assert found.spread['rest'] == pytest.approx(variance**.5, rel=1e-3)
    assert found.error == pytest.approx((variance / 24)**.5, rel=1e-3)
    for name, axes, k in (('injection', (1, 2), 12), ('draw', (0, 2), 16)):
        assert found.spread[name]**2 == pytest.approx(
            cells.mean(axes).var(ddof=1) - variance / k, rel=.02)

def test_the_mixed_model_keeps_its_size(rng):
    low = sum(mixed(*crossed(rng, 0.)).p < .05 for _ in range(300))
    # a balanced design has a t statistic of 82 degrees of freedom, read as normal: 0.053
    expected = 2 * stats.t.sf(stats.norm.ppf(.975), 96 - 8 - 6)
    # near its size, and far from that of slopes that differ by 0.15
    assert (
        stats.binomtest(low, 300, expected).pvalue > .001 > stats.binomtest(low, 300, .145).pvalue
    ), low

def test_slopes_that_differ_are_witnesses_by_injection(rng): # for which the mixed model is too sure
    dose, group = (
        x.ravel() for x in np.meshgrid(np.linspace(0, 1, 4), np.arange(10), indexing='ij'))
    found = []
    for _ in range(200):
        value = (
            rng.normal(0, .1, 10)[group]
            + rng.normal(0, .3, 10)[group] * dose
            + rng.normal(0, .1, 40))
        slopes = [np.polyfit(dose[group == g], value[group == g], 1)[0] for g in range(10)]
        found.append(
            (
                mixed(value, dose, {'injection': group}).p < .05,
                paired(slopes, np.zeros(10), .05).p_difference < .05))
    many, few = np.sum(found, 0)
    assert stats.binomtest(int(few), 200, .05).pvalue > .001
    assert stats.binomtest(int(many), 200, .05, alternative='greater').pvalue < 1e-4

def test_values_without_a_rest_give_exact_answers():
    found = mixed([.5] * 12, [0, 1] * 6, {'injection': np.arange(12) // 4})
    assert (found.effect, found.error, found.p, found.spread) == (
        0., 0., 1., {'injection': 0., 'rest': 0.})
    assert holm([found.p]).tolist() == [1.]
    # .1 + .2 is not .3 in floats
    assert mixed([.3, .1 + .2] * 6, [0, 1] * 6, {'injection': np.arange(12) // 4}).p == 1.
    assert mixed([0.] * 12, [0, 1] * 6, {'injection': np.arange(12) // 4}).p == 1.
    for low, high in ((0, 1), (.1, .2)):
        found = mixed([low, high] * 6, [1e6, 1e6 + 1] * 6, {'injection': np.arange(12) // 4})
        assert found.effect == pytest.approx(high - low)
        assert (found.error, found.interval95, found.p) == (0., (found.effect,) * 2, 0.)
    # only the injections differ
    found = mixed([0., .5] * 6 + np.arange(12) // 4, [0, 1] * 6, {'injection': np.arange(12) // 4})
    assert found.effect == pytest.approx(.5) and found.p < .001


def test_partial_correlation_is_that_of_the_residuals(rng):
    z = rng.normal(size=(30, 2))
    x, y = z @ [1, 2] + rng.normal(size=30), z @ [3, -1] + rng.normal(size=30)
    residual = [
        v
        - np.column_stack([np.ones(30), z])
        @ np.linalg.lstsq(np.column_stack([np.ones(30), z]), v, rcond=None)[0]
        for v in (x, y)]
    r, p = partial_correlation(x, y, z)
    assert r == pytest.approx(np.corrcoef(residual)[0, 1])
    assert p == pytest.approx(2 * stats.t.sf(abs(r) * np.sqrt(26 / (1 - r * r)), 26))
    r, p = partial_correlation(x, y, np.zeros(30)) # nothing held fixed but the mean
    assert (r, p) == pytest.approx(tuple(stats.pearsonr(x, y)))
    assert partial_correlation(z[:, 0], y, z) == (0., 1.)


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: clustered_bootstrap([1, 2], [1]), r'values has shape \(2,\) and clusters \(1,\)'),
        (lambda: clustered_bootstrap([1, 2], [1, 2]), '2 clusters: expected at least 3'),
        (lambda: clustered_bootstrap([1, np.nan, 2], [1, 2, 3]), r'values\[1\] is not finite'),
        (
            lambda: mixed([1, 2, 3, 4], [1, 1, 1, 1], {'a': [1, 2, 3, 4]}),
            'the effect is 1.0 throughout'),
        (
            lambda: mixed([1, 2, 3, 4], [0, 1, 0, 1], {'a': [1, 1, 2, 2]}),
            'a has fewer than 3 labels'),
        (lambda: mixed([1, 2, 3, np.inf], [0, 1, 0, 1], {'a': [1, 2, 3, 4]}), 'finite numbers'),
        (lambda: mixed([1, 2, 3, 4], [0, 1, 0, 1], {}), 'crossed has fewer'),
        (
            lambda: partial_correlation([1, 2, 3], [1, 2, 3], [1, 0, 1]),
            '3 runs: expected at least 4'),
        (lambda: partial_correlation([1, 2], [1, 2], [1, 0]), '2 runs: expected at least'),
        (lambda: partial_correlation([1, 2, 3], [1, 2], [1, 2, 3]), 'one row for each run'),
        (lambda: partial_correlation([1, 2, 3, 4], [1, 2, 3, 4], [1, 0]), 'one row for each run'),
        (
            lambda: partial_correlation([1, 2, np.nan, 4], [1, 2, 3, 4], [1, 0, 1, 0]),
            'x has values that are not finite'),
        (
            lambda: partial_correlation([1, 2, 3, 4], [1, 2, 3, 4], [1, 0, np.inf, 0]),
            'given has values that are not finite'),
        (lambda: partial_correlation(1, 2, 3), 'one row for each run'),
        (
            lambda: pairs_needed(.02, .02, most=2),
            'most is 2: expected a whole number of at least 3'),
        (lambda: pairs_needed(.05, .02, most=50), 'more than 50 pairs')])
def test_bad_questions_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error: call()
    assert '\n' not in str(error.value)


def test_importing_needs_numpy_only():
    code = (
        "import sys, unloc.statistics; print([m for m in ('torch', 'scipy', 'pandas',"
        " 'statsmodels') if m in sys.modules])")
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
        == '[]')
