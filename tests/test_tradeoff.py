"""AUES equals an independent area for every rule, MU95 a walk along the trajectory; both match the
golden cases and refuse what is not a trajectory."""
import itertools, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from unloc.tradeoff import AUES_RULES, MU95_RULES, aues, mu95, pareto

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GOLDEN = SHARED / "golden" / "localization_derived.json"
ENVELOPES = ['trapezoid', 'step', 'fs_axis'] # the rules that ignore the order of the checkpoints


def trajectories(n=60):
    "Random clouds, clouds on a coarse grid (many ties), and monotone runs"
    rng = np.random.default_rng(11)
    for i in range(n):
        size = int(rng.integers(1, 15))
        fs, rs = rng.random((2, size))
        if i % 3 == 1: fs, rs = np.round(fs * 4) / 4, np.round(rs * 4) / 4
        if i % 3 == 2: fs, rs = np.sort(fs), np.sort(rs)[::-1]
        yield fs, rs


def dominates(q, p): return q[0] >= p[0] and q[1] >= p[1] and q != p

def shoelace(x, y): return .5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))

def swept(points):
    "Area dominated by (RS, FS) points, by inclusion and exclusion of the rectangles of the front"
    cuts_x, cuts_y = sorted({0., *(p[0] for p in points)}), sorted({0., *(p[1] for p in points)})
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in itertools.pairwise(cuts_x)
        for y0, y1 in itertools.pairwise(cuts_y)
        if any(p[0] >= x1 and p[1] >= y1 for p in points))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_golden_cases():
    cases = json.loads(GOLDEN.read_text("utf-8"))['values']['aues']
    assert len(cases) == 3
    for c in cases:
        assert aues(c['FS'], c['RS']) == pytest.approx(c['trapz'], rel=1e-12)
        assert aues(c['FS'], c['RS'], 'step') == pytest.approx(c['step'], rel=1e-12)
        assert pareto(c['FS'], c['RS']).tolist() == c['pareto']


def test_pareto_equals_brute_force():
    for fs, rs in trajectories(150):
        points = set(zip(rs.tolist(), fs.tolist()))
        want = sorted(p for p in points if not any(dominates(q, p) for q in points))
        got = pareto(fs, rs)
        assert got.dtype == np.float64 and got.shape == (len(want), 2) and got.flags.c_contiguous
        assert list(map(tuple, got.tolist())) == want
        assert (np.diff(got[:, 0]) > 0).all() and (np.diff(got[:, 1]) < 0).all()
        assert pareto(got[:, 1], got[:, 0]).tolist() == got.tolist()


def test_rules_equal_an_independent_area():
    for fs, rs in trajectories():
        rim = pareto(fs, rs)
        x, y = np.r_[0, 0, rim[:, 0], rim[-1, 0]], np.r_[0, rim[0, 1], rim[:, 1], 0]
        assert aues(fs, rs) == pytest.approx(shoelace(x, y), abs=1e-12)
        assert aues(fs, rs, 'fs_axis') == pytest.approx(shoelace(x, y), abs=1e-12)
        assert aues(fs, rs, 'step') == pytest.approx(swept(list(zip(rs, fs))), abs=1e-12)
        assert aues(fs, rs, 'step') <= aues(fs, rs) + 1e-12


def test_raw_is_the_trapezoid_on_a_strictly_monotone_run_and_no_other():
    rng = np.random.default_rng(3)
    for _ in range(20):
        fs, rs = np.sort(rng.random((2, 9)))
        assert aues(fs, rs[::-1], 'raw') == pytest.approx(aues(fs, rs[::-1]), abs=1e-12)
    # .175 + .14 - .765 + .855
    assert aues([.2, .5, .9, .9], [.8, .3, .1, .95], 'raw') == pytest.approx(.405)
    assert aues([.2, .5, .9, .9], [.8, .3, .1, .95]) == pytest.approx(.855)


@pytest.mark.parametrize('rule', ENVELOPES)
def test_envelopes_ignore_order_repeats_and_dominated_points(rule):
    rng = np.random.default_rng(5)
    for fs, rs in trajectories(30):
        want, order = aues(fs, rs, rule), rng.permutation(len(fs))
        assert aues(fs[order], rs[order], rule) == want
        assert aues(np.tile(fs, 2), np.tile(rs, 2), rule) == want
        assert aues([*fs, fs[0] / 2], [*rs, rs[0] / 2], rule) == want


def test_a_further_checkpoint_never_lowers_the_step_rule():
    for fs, rs in trajectories():
        areas = [aues(fs[:i], rs[:i], 'step') for i in range(1, len(fs) + 1)]
        assert (np.diff(areas) >= -1e-12).all()
    assert aues([.2, .4, 1.], [.9, .3, 0.]) < aues([.2, 1.], [.9, 0.])


@pytest.mark.parametrize('rule', AUES_RULES)
def test_corners_and_bounds(rule):
    assert aues([.19] * 5, [.82] * 5, rule) == pytest.approx(.1558)
    assert aues([1.], [1.], rule) == 1.
    assert aues([0.], [1.], rule) == 0.
    assert aues([1.], [0.], rule) == 0.
    assert aues(np.ones(1000), np.linspace(1, 0, 1000), rule) == pytest.approx(1.)
    for fs, rs in trajectories():
        if rule in ENVELOPES or (np.diff(rs) <= 0).all():
            assert 0 <= aues(fs, rs, rule) <= 1 and type(aues(fs, rs, rule)) is float


@pytest.mark.parametrize(
    'fs,rs,area',
    [
        ([1., .9, .2], [.1, .5, .9], '-0.42'),
        ([.1, .9, .9, .1] * 9, [.9, .9, .1, .1] * 9, '5.85')])
def test_raw_refuses_an_area_that_is_no_fraction(fs, rs, area):
    with pytest.raises(ValueError, match=f"signed area of {area}.*use rule='trapezoid'"):
        aues(fs, rs, 'raw')
    assert 0 < aues(fs, rs) < 1


def test_any_sequence_is_read_and_none_is_changed():
    fs, rs = [.25, .5, .75], [.75, .5, .125]
    want = aues(fs, rs)
    for kind in (
        tuple,
        np.array,
        torch.tensor,
        lambda x: np.array(x, dtype=np.float32),
        lambda x: [torch.tensor(v) for v in x]):
        assert aues(kind(fs), kind(rs)) == want
    frozen = np.array(fs); frozen.flags.writeable = False
    assert aues(frozen, np.array(rs)) == want
    front = pareto(fs, rs); front[:] = 0
    assert aues(fs, rs) == want and fs == [.25, .5, .75]


@pytest.mark.parametrize(
    'fs,rs,message',
    [
        ([], [], 'forget_strength: expected a flat sequence of at least one number'),
        ([.5], [], 'retain_strength: expected a flat sequence of at least one number'),
        (.5, .5, r'got shape \(\)'),
        ([[.5, .6]], [[.5, .6]], r'got shape \(1, 2\)'),
        ([.5, .6], [.5], 'forget_strength has 2 values and retain_strength 1'),
        (
            [.5, 1.01],
            [.5, .5],
            r'forget_strength\[1\] is 1.01: expected a finite value in \[0, 1\]',
        ),
        ([.5, .5], [-1e-6, .5], r'retain_strength\[0\] is -1e-06'),
        ([.5, float('nan')], [.5, .5], r'forget_strength\[1\] is nan'),
        ([.5, .5], [.5, float('inf')], r'retain_strength\[1\] is inf'),
        ([.5, None], [.5, .5], r'forget_strength\[1\] is nan'),
        (['high'], [.5], 'forget_strength: expected a flat sequence of numbers, got list'),
        ([.5], [[.5], [.5, .5]], 'retain_strength: expected a flat sequence of numbers'),
        ((x for x in [.5]), [.5], 'got generator'),
        (
            torch.tensor([.5], requires_grad=True),
            [.5],
            (
                'forget_strength: expected a flat sequence of numbers, got Tensor .*; pass one'
                ' plain number per checkpoint'),
        ),
        (
            [.5],
            torch.tensor([[.5, .5]] * 2, requires_grad=True),
            'retain_strength: expected a flat sequence of numbers, got Tensor',
        ),
        (
            [torch.tensor(.5, requires_grad=True) * 1],
            [.5],
            'forget_strength: expected a flat sequence of numbers, got list',
        ),
    ],
)
@pytest.mark.parametrize('function', [aues, pareto])
def test_bad_input_is_named_in_one_line(function, fs, rs, message):
    with pytest.raises(ValueError, match=message) as caught: function(fs, rs)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('rule', ['trapz', '', None, ['step']])
def test_unknown_rule_lists_the_rules(rule):
    with pytest.raises(
        ValueError, match='unknown AUES rule .*expected one of trapezoid, step, raw, fs_axis'):
        aues([.5], [.5], rule)


def test_importing_needs_numpy_only():
    code = (
        "import sys, unloc.tradeoff; print([m for m in ('torch', 'scipy', 'pandas', 'matplotlib')"
        " if m in sys.modules])")
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
        == '[]')


# MU95

RUNS = [
    ([.60, .585, .50], [-26.8, -20., -10.]),
    ([.60, .61, .59], [-26.8, -15., -16.]),
    ([.60, .58, .56, .59], [-26.8, -12., -18., -3.])]

@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_golden_mu95():
    cases = json.loads(GOLDEN.read_text("utf-8"))['values']['mu95']
    assert [(c['MU'], c['FQ']) for c in cases] == RUNS
    for c in cases:
        for rule, key in (('first_crossing', 'first_crossing'), ('best', 'best_before_crossing')):
            assert mu95(c['MU'], c['FQ'], rule) == pytest.approx(c[key], rel=1e-14)


def utilities(n=80):
    "Random walks of MU and FQ from a healthy start, some of which never cross"
    rng = np.random.default_rng(23)
    for i in range(n):
        size = int(rng.integers(1, 12))
        yield np.clip(
            .6 + np.cumsum(np.r_[0, rng.normal(-.01, .02, size)]), 0, 1), -30 * rng.random(size + 1)


def test_mu95_equals_a_fine_walk_along_the_segments():
    """Two thousand evenly spaced points of every segment, in order, up to the first one below the
    threshold"""
    crossed = 0
    for mu, fq in utilities():
        t = np.linspace(0, 1, 2001)
        line = [
            np.concatenate([a + t * (b - a) for a, b in itertools.pairwise(x)]) for x in (mu, fq)]
        below = np.flatnonzero(line[0] < .95 * mu[0])
        end = below[0] + 1 if below.size else len(line[0])
        crossed += bool(below.size)
        tolerance = 2 * np.abs(np.diff(fq)).max() / 2000 + 1e-12
        assert mu95(mu, fq) == pytest.approx(line[1][end - 1], abs=tolerance)
        assert mu95(mu, fq, 'best') == pytest.approx(line[1][:end].max(), abs=tolerance)
    assert 20 < crossed < 75


@pytest.mark.parametrize('rule', MU95_RULES)
def test_mu95_properties(rule):
    missing = 0
    for mu, fq in utilities():
        below = np.flatnonzero(mu < .95 * mu[0])
        if rule == 'crossing': # no value without a crossing, also for the original model alone
            with pytest.raises(ValueError, match='^not reached: '): mu95(mu[:1], fq[:1], rule)
            if not below.size:
                with pytest.raises(ValueError, match='^not reached: '): mu95(mu, fq, rule)
                missing += 1
                continue
            assert mu95(mu, fq, rule) == mu95(mu, fq)
        else: assert mu95(mu[:1], fq[:1], rule) == fq[0]
        found = mu95(mu, fq, rule)
        assert type(found) is float
        assert fq.min() - 1e-12 <= found <= fq.max() + 1e-12
        assert found <= mu95(mu, fq, 'best')
        if below.size:
            # nothing beyond the crossing counts
            assert mu95(mu[:below[0] + 1], fq[:below[0] + 1], rule) == found
        # only relative utility counts
        assert mu95(mu / 2, fq, rule) == pytest.approx(found, abs=1e-9)
    assert (missing > 5) == (rule == 'crossing')
    # a checkpoint on the threshold has not crossed it
    assert mu95([.6, .57, .2], [-9., -5., -1.], rule, share=.57 / .6) == pytest.approx(-5)
    touched = [.6, .3, .5], [-9., -5., -1.], rule, .5
    if rule != 'crossing': assert mu95(*touched) == -1
    else:
        with pytest.raises(ValueError, match='^not reached: .*below 50%'): mu95(*touched)
    assert mu95([.6, .6, .5], [-9., -5., -1.], rule, share=1) == -5


@pytest.mark.parametrize(
    'mu, fq, message',
    [
        ([], [], 'model_utility: expected a flat sequence of at least one number'),
        ([.5], [], 'forget_quality: expected a flat sequence of at least one number'),
        (
            [.6, .5],
            [-1.],
            'model_utility has 2 values and forget_quality 1: expected one of each per checkpoint',
        ),
        ([0., .5], [-1., -2.], 'model_utility\\[0\\] is 0: expected the original model first'),
        ([.6, float('nan')], [-1., -2.], r'model_utility\[1\] is nan'),
        (
            [.6, 1.2],
            [-1., -2.],
            r'model_utility\[1\] is 1.2: expected a finite value in \[0, 1\]',
        ),
        (
            [.6, .5],
            [-1., float('nan')],
            r'forget_quality\[1\] is nan: expected a finite log10 p',
        ),
        (
            [.6, .5],
            [-1., .05],
            r'forget_quality\[1\] is 0.05: expected a finite log10 p, at most 0',
        ),
        ([.6, .5], [float('-inf'), -1.], r'forget_quality\[0\] is -inf'),
        ([.6, None], [-1., -2.], r'model_utility\[1\] is nan'),
        (.6, -1., r'got shape \(\)'),
        (['all'], [-1.], 'model_utility: expected a flat sequence of numbers, got list'),
    ],
)
def test_bad_mu95_input_is_named_in_one_line(mu, fq, message):
    with pytest.raises(ValueError, match=message) as caught: mu95(mu, fq)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'options, message',
    [
        (
            {'rule': 'last'},
            "unknown MU95 rule 'last': expected one of first_crossing, best, crossing"),
        ({'rule': ['best']}, 'unknown MU95 rule'),
        ({'share': 0}, r'share must lie in \(0, 1\], got 0'),
        ({'share': 95}, 'got 95'),
        ({'share': float('nan')}, 'got nan'),
        ({'share': None}, r'share must lie in \(0, 1\], got None'),
        ({'share': '95 %'}, "got '95 %'")])
def test_bad_mu95_options(options, message):
    with pytest.raises(ValueError, match=message): mu95(*RUNS[0], **options)
