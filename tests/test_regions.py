"""Regions, of value vectors or of single weights, are sets: their algebra is that of Python's sets,
their draws are uniform, their size has one rule, and their file is theirs alone."""
import math, random
from fractions import Fraction
import pytest, torch
from unloc.regions import Region, average_precision, jaccard, recall, region_size


def members(region): return {(l, int(j)) for l, places in enumerate(region.index) for j in places}
def of(pairs, shape):
    mask = torch.zeros(shape[0], math.prod(shape[1:]), dtype=torch.bool)
    for l, j in pairs: mask[l, j] = True
    return Region(mask.view(shape))

@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("axes", [2, 3])
def test_algebra_is_that_of_sets(seed, axes):
    rng = random.Random(seed)
    shape = rng.randint(1, 5), *[rng.randint(1, 4) for _ in range(axes - 2)], rng.randint(1, 12)
    every = {(l, j) for l in range(shape[0]) for j in range(math.prod(shape[1:]))}
    for _ in range(10):
        x, y, z = (
            {p for p in every if rng.random() < share}
            for share in (rng.random(), rng.random(), rng.choice([0, 1, .5])))
        a, b, c = (of(s, shape) for s in (x, y, z))
        assert members(a | b) == x | y
        assert members(a & b) == x & y
        assert members(a - b) == x - y
        assert members(~a) == every - x
        assert members((a | b) - c & a) == ((x | y) - z & x)
        assert ~(a | b) == ~a & ~b
        assert ~(a & b) == ~a | ~b
        assert a - b == a & ~b
        assert len(a) == len(x)
        assert bool(a) == bool(x)
        assert a.fraction == len(x) / len(every)
        assert members(a) == x
        assert (a == b) == (x == y)
        assert hash(a) == hash(of(x, shape))
        assert len({a, of(x, shape), b}) == len({frozenset(x), frozenset(y)})
        assert (
            jaccard(a, b)
            == a.jaccard(b)
            == b.jaccard(a)
            == (len(x & y) / len(x | y) if x | y else 1))
        if y: assert recall(a, b) == a.recall(of=b) == len(x & y) / len(y)
        else:
            with pytest.raises(ValueError, match="recall of an empty region"): a.recall(of=b)

def test_a_region_is_no_list_and_keeps_its_own_shape():
    a = of({(0, 1)}, (2, 3))
    assert a != "region"
    assert a != of({(0, 1)}, (2, 4))
    assert a.shape == (2, 3)
    assert [k.dtype for k in a.columns] == [torch.int64] * 2
    for operation in ("__or__", "__and__", "__sub__", "jaccard"):
        with pytest.raises(
            ValueError,
            match="different models or units: 2 x 3 value vectors and 3 x 2 value vectors"):
            getattr(a, operation)(of(set(), (3, 2)))
    with pytest.raises(AttributeError): a.mask = None
    for bad in (
        torch.ones(2, 2),
        torch.ones(4, dtype=torch.bool),
        torch.ones(1, 2, 2, 2, dtype=torch.bool),
        torch.ones(1, 2, 2),
        torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"a region's mask is bool \[n_layers, d_ff\]"):
            Region(bad)

def test_units_do_not_mix():
    a, weights = of({(0, 1)}, (2, 3)), of({(0, 1)}, (2, 1, 3)) # as many members, the same places
    assert a != weights
    assert a.index[0].tolist() == weights.index[0].tolist() == a.columns[0].tolist() == [1]
    with pytest.raises(
        ValueError, match="a weight region has single weights, no columns; .* `index`"):
        weights.columns
    for operation in ("__or__", "__and__", "__sub__", "jaccard", "recall"):
        with pytest.raises(ValueError, match="units: 2 x 3 value vectors and 2 x 1 x 3 weights"):
            getattr(a, operation)(weights)
    assert repr(weights) == "Region(1 of 2 x 1 x 3 weights, 16.7%)"

# --- sizes

@pytest.mark.parametrize(
    "shape, fraction, size",
    [
        # Llama 3.1 8B and OLMo 2 7B in the paper's experiment
        ((32, 14336), .10, 45875),
        ((32, 11008), .10, 35225),
        ((32, 14336), .01, 4587),
        ((32, 14336), .50, 229376),
        ((32, 14336), 1., 458752),
        ((16, 8192), .10, 13107),
        ((2, 2048), .10, 409),
        ((1, 100), .29, 29),
        ((1, 100), .57, 57),
        ((1, 1), 1, 1)])
def test_sizes_of_the_papers_models(shape, fraction, size):
    assert (
        region_size(shape, fraction)
        == size
        == len(Region.sample(shape, fraction, 0))
        == len(Region.top(torch.rand(shape), fraction)))

def test_every_exact_share_has_its_exact_size():
    for n in range(1, 60):
        for k in range(1, n + 1): assert region_size((1, n), k / n) == k

@pytest.mark.parametrize(
    "fraction", [0, -.1, 1.0001, 2, math.nan, math.inf, -math.inf, None, "10 %"])
@pytest.mark.parametrize(
    "make",
    [
        lambda f: region_size((4, 8), f),
        lambda f: Region.sample((4, 8), f, 0),
        lambda f: Region.top(torch.rand(4, 8), f)])
def test_fractions_outside_are_refused(make, fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got") as error:
        make(fraction)
    assert "\n" not in str(error.value)

def test_less_than_one_vector_is_refused_with_the_least_share():
    with pytest.raises(
        ValueError, match="4 x 8 value vectors is less than one; use at least 0.031"):
        region_size((4, 8), .03)
    assert region_size((4, 8), 1 / 32) == 1

@pytest.mark.parametrize(
    "shape", [(32, 4096, 14336), (1, 100, 10**6), (16, 2048, 8192), (2, 16, 24)])
@pytest.mark.parametrize("fraction", ["0.01", "0.05", "0.1", "0.29", "0.57", "0.8", "0.95", "1"])
def test_sizes_of_single_weights(shape, fraction):
    assert region_size(shape, float(fraction)) == int(Fraction(fraction) * math.prod(shape))

@pytest.mark.parametrize(
    "make",
    [
        lambda shape: region_size(shape, .5),
        lambda shape: Region.sample(shape, .5, 0),
        lambda shape: Region.top(torch.rand(shape), .5),
    ],
)
@pytest.mark.parametrize("shape", [(8,), (2, 2, 2, 2), (2, 0), (2, 0, 3), (2, 3, 0)])
def test_other_shapes_are_refused(make, shape):
    with pytest.raises(
        ValueError, match=r"n_layers x d_model x d_ff weights, got the shape \[") as error:
        make(shape)
    assert "\n" not in str(error.value)

# --- draws

@pytest.mark.parametrize(
    "outside", [None, of({(0, j) for j in range(6)} | {(2, 1), (2, 3)}, (3, 6))])
def test_draws_are_uniform(outside, draws=2000):
    counts, layers = torch.zeros(3, 6), torch.zeros(draws)
    for seed in range(draws):
        region = Region.sample((3, 6), 1 / 3, seed, outside)
        assert len(region) == 6 and (outside is None or not region & outside)
        counts += region.mask
        layers[seed] = len(region.columns[1])
    free = torch.ones(3, 6, dtype=torch.bool) if outside is None else ~outside.mask
    n, p = int(free.sum()), 6 / int(free.sum())
    # # an inclusion has variance p(1-p); the counts sum to a constant, which leaves n - 1 degrees
    # of freedom
    chi2 = ((counts[free] - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
    assert chi2 < n - 1 + 4.5 * math.sqrt(2 * (n - 1)) and counts[~free].sum() == 0
    # of the count in the middle layer: hypergeometric, six draws, six of n
    inside, variance = 6 * p, 6 * (6 / n) * (1 - 6 / n) * (n - 6) / (n - 1)
    assert abs(layers.mean() - inside) < 4.5 * math.sqrt(variance / draws)
    assert abs(layers.var() / variance - 1) < .2

def test_a_draw_depends_on_its_seed_alone():
    target = Region.sample((4, 64), .25, 0)
    torch.manual_seed(7); before = torch.rand(1); torch.manual_seed(7)
    again = Region.sample((4, 64), .25, 0)
    other = Region.sample((4, 64), .25, 1)
    apart = Region.sample((4, 64), .25, 0, outside=target)
    assert torch.rand(1) == before
    assert again == target != other
    assert not apart & target
    assert len(apart) == len(target)
    assert abs(target.jaccard(other) - 1 / 7) < .12 # two draws of a quarter share a sixteenth

def test_the_other_half_is_all_that_is_left():
    half = Region.sample((4, 8), .5, 0)
    assert Region.sample((4, 8), .5, 1, outside=half) == ~half
    with pytest.raises(
        ValueError,
        match=(
            r"cannot draw 17 of 4 x 8 value vectors \(fraction 0.54\) outside a region of 16: 16"
            r" are left; .* at most 0.5")):
        Region.sample((4, 8), .54, 1, outside=half)
    with pytest.raises(ValueError, match="different models"):
        Region.sample((4, 8), .1, 0, outside=Region.sample((8, 4), .1, 0))

def test_single_weights_are_drawn_as_value_vectors_are():
    flat, target = Region.sample((3, 30), .2, 5), Region.sample((3, 6, 5), .2, 5)
    assert torch.equal(target.mask.view(3, 30), flat.mask) and len(target) == 18
    assert torch.equal(
        Region.sample((3, 6, 5), .2, 6, outside=target).mask.view(3, 30),
        Region.sample((3, 30), .2, 6, outside=flat).mask)
    with pytest.raises(ValueError, match="cannot draw 81 of 3 x 6 x 5 weights"):
        Region.sample((3, 6, 5), .9, 0, outside=target)

# --- the top

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_top_takes_the_highest_and_breaks_ties_by_place(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, (4, 11), generator=g).to(dtype) # many ties
    order = sorted(((-scores[l, j].item(), l, j) for l in range(4) for j in range(11)))
    for n in (1, 7, 20, 44):
        assert members(Region.top(scores, n / 44)) == {(l, j) for _, l, j in order[:n]}
    assert Region.top(scores.T.contiguous().T, .3) == Region.top(scores, .3) # whatever the strides

def test_top_orders_infinities_and_zeros():
    scores = torch.tensor([[-math.inf, 0., -0.], [math.inf, 5., -1.]])
    assert [members(Region.top(scores, k / 6)) for k in (1, 2, 3, 5)] == [
        {(1, 0)},
        {(1, 0), (1, 1)},
        {(1, 0), (1, 1), (0, 1)},
        {(1, 0), (1, 1), (0, 1), (0, 2), (1, 2)}]
    with pytest.raises(ValueError, match="scores hold 2 NaN"):
        Region.top(torch.tensor([[1., math.nan], [math.nan, 0.]]), .5)

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_top_weights_break_ties_by_layer_row_and_column(seed, dtype):
    scores = torch.randint(-3, 3, (3, 4, 5), generator=torch.Generator().manual_seed(seed)).to(
        dtype)
    order = sorted(
        (-scores[l, r, c].item(), l, r, c) for l in range(3) for r in range(4) for c in range(5))
    for n in (1, 7, 31, 60):
        region = Region.top(list(scores), n / 60)
        assert members(region) == {(l, r * 5 + c) for _, l, r, c in order[:n]}
        assert region == Region.top(scores, n / 60)

@pytest.mark.parametrize(
    "scores, says",
    [
        (
            [torch.ones(2, 3), torch.ones(2, 4)],
            r"scores need layers of one shape, got 2 layers of \[\(2, 3\), \(2, 4\)\]"),
        ([], "got 0 layers"),
        ([torch.ones(2, 3), torch.tensor([[1., math.nan, 1.]] * 2)], "scores hold 2 NaN"),
        (
            None,
            r"scores must be a tensor \[n_layers, d_ff\] .* or a list of its layers, got NoneType"),
        (torch.tensor(1.), "or a list of its layers, got Tensor"),
        (.5, "got float"),
        ("abc", "got str"),
        ([[1., None]], "got list"),
        (torch.ones(2, 3, dtype=torch.bool), "scores are torch.bool; a ranking needs real numbers"),
        (torch.ones(2, 3, dtype=torch.complex64), "scores are torch.complex64"),
        ([None, None], "got list")])
@pytest.mark.parametrize(
    "judge",
    [
        lambda scores: Region.top(scores, .5),
        lambda scores: average_precision(scores, Region.sample((2, 3), .5, 0))])
def test_scores_that_are_no_ranking_are_refused(judge, scores, says):
    with pytest.raises(ValueError, match=says) as error: judge(scores)
    assert "\n" not in str(error.value)

# --- the file

def test_a_file_gives_the_region_back(tmp_path):
    for seed in range(5):
        region = Region.sample((3, 17) if seed % 2 else (3, 4, 5), .2, seed)
        region.save(tmp_path / "a"); region.save(str(tmp_path / "b"))
        assert Region.load(tmp_path / "a") == region
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

def test_a_mask_with_strides_is_kept_as_it_reads(tmp_path):
    for mask in (
        torch.tensor([[True, False, True]]).expand(2, 3),
        torch.tensor([[True, False], [False, False], [True, True]]).T,
        torch.tensor([[True, False, True]])[:, None].expand(1, 4, 3)):
        Region(mask).save(tmp_path / "a")
        assert Region.load(tmp_path / "a") == Region(mask) and torch.equal(Region(mask).mask, mask)

def test_every_truncation_is_named(tmp_path):
    path = tmp_path / "region.safetensors"
    Region.sample((3, 5), .4, 0).save(path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="region.safetensors is not a region file") as error:
            Region.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError): Region.load(tmp_path / "absent")

@pytest.mark.parametrize(
    "tensors",
    [
        {"mask": torch.ones(2, 2, dtype=torch.bool)},
        {"region": torch.ones(2, 2)},
        {"region": torch.ones(4, dtype=torch.bool)},
        {"region": torch.ones(1, 2, 2, 2, dtype=torch.bool)},
        {}])
def test_other_tensors_are_named(tensors, tmp_path):
    from safetensors.torch import save_file
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not a region file"):
        Region.load(tmp_path / "other.safetensors")

@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_the_mean_precision_at_the_members(seed):
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed))
    truth = Region.sample((3, 20), .25, seed)
    order, found, precisions = sorted(range(60), key=lambda i: -scores.flatten()[i].item()), 0, []
    for rank, i in enumerate(order, 1):
        if truth.mask.flatten()[i]: found += 1; precisions.append(found / rank)
    assert average_precision(scores, truth) == pytest.approx(sum(precisions) / len(truth))
    weights = Region(truth.mask.view(3, 4, 5))
    assert (
        average_precision(list(scores), truth)
        == average_precision(list(scores.view(3, 4, 5)), weights)
        == average_precision(scores.view(3, 4, 5), weights)
        == average_precision(scores, truth))

def test_equal_scores_rank_by_place():
    "As in Region.top: all-equal scores find a truth at the first places and nothing else"
    for places in ([0, 1, 2], [3, 4, 5]):
        truth = of({divmod(p, 3) for p in places}, (2, 3))
        assert average_precision(torch.zeros(2, 3), truth) == pytest.approx(
            sum((i + 1) / (p + 1) for i, p in enumerate(places)) / 3)
        assert (average_precision(torch.zeros(2, 3), truth) == 1) == (
            Region.top(torch.zeros(2, 3), .5) == truth)

def test_average_precision_refuses_what_it_cannot_rank():
    truth = Region.sample((3, 20), .25, 0)
    weights = Region.sample((3, 4, 5), .25, 0)
    for scores, region, says in (
        (torch.zeros(3, 19), truth, "the region is of 3 x 20 value vectors"),
        (torch.zeros(3, 20), weights, r"scores are \[3, 20\], the region is of 3 x 4 x 5 weights"),
        (torch.full((3, 20), torch.nan), truth, "60 NaN"),
        (torch.zeros(3, 20), Region(torch.zeros(3, 20, dtype=torch.bool)), "empty region")):
        with pytest.raises(ValueError, match=says): average_precision(scores, region)
