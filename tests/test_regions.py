"Regions are sets: their algebra is that of Python's sets, their draws are uniform, their size has one rule, and their file is theirs alone."
import math, random
import pytest, torch
from unloc.regions import Region, jaccard, recall, region_size


def members(region): return {(l, int(j)) for l, row in enumerate(region.columns) for j in row}
def of(pairs, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for l, j in pairs: mask[l, j] = True
    return Region(mask)

@pytest.mark.parametrize("seed", range(8))
def test_algebra_is_that_of_sets(seed):
    rng = random.Random(seed)
    shape = rng.randint(1, 5), rng.randint(1, 12)
    every = {(l, j) for l in range(shape[0]) for j in range(shape[1])}
    for _ in range(10):
        x, y, z = ({p for p in every if rng.random() < share} for share in (rng.random(), rng.random(), rng.choice([0, 1, .5])))
        a, b, c = (of(s, shape) for s in (x, y, z))
        assert members(a | b) == x | y and members(a & b) == x & y and members(a - b) == x - y and members(~a) == every - x
        assert members((a | b) - c & a) == ((x | y) - z & x) and ~(a | b) == ~a & ~b and ~(a & b) == ~a | ~b and a - b == a & ~b
        assert len(a) == len(x) and bool(a) == bool(x) and a.fraction == len(x) / len(every) and members(a) == x
        assert (a == b) == (x == y) and (hash(a) == hash(of(x, shape))) and len({a, of(x, shape), b}) == len({frozenset(x), frozenset(y)})
        assert jaccard(a, b) == a.jaccard(b) == b.jaccard(a) == (len(x & y) / len(x | y) if x | y else 1)
        if y: assert recall(a, b) == a.recall(of=b) == len(x & y) / len(y)
        else:
            with pytest.raises(ValueError, match="recall of an empty region"): a.recall(of=b)

def test_a_region_is_no_list_and_keeps_its_own_shape():
    a = of({(0, 1)}, (2, 3))
    assert a != "region" and a != of({(0, 1)}, (2, 4)) and a.shape == (2, 3) and [k.dtype for k in a.columns] == [torch.int64] * 2
    for operation in ("__or__", "__and__", "__sub__", "jaccard"):
        with pytest.raises(ValueError, match="different models: 2 x 3 and 3 x 2"): getattr(a, operation)(of(set(), (3, 2)))
    with pytest.raises(AttributeError): a.mask = None
    for bad in (torch.ones(2, 2), torch.ones(4, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"a region's mask is bool \[n_layers, d_ff\]"): Region(bad)

# --- sizes

@pytest.mark.parametrize("shape, fraction, size", [
    ((32, 14336), .10, 45875), ((32, 11008), .10, 35225), # Llama 3.1 8B and OLMo 2 7B in the paper's experiment
    ((32, 14336), .01, 4587), ((32, 14336), .50, 229376), ((32, 14336), 1., 458752), ((16, 8192), .10, 13107), ((2, 2048), .10, 409), ((1, 100), .29, 29), ((1, 100), .57, 57), ((1, 1), 1, 1)])
def test_sizes_of_the_papers_models(shape, fraction, size):
    assert region_size(shape, fraction) == size == len(Region.sample(shape, fraction, 0)) == len(Region.top(torch.rand(shape), fraction))

def test_every_exact_share_has_its_exact_size():
    for n in range(1, 60):
        for k in range(1, n + 1): assert region_size((1, n), k / n) == k

@pytest.mark.parametrize("fraction", [0, -.1, 1.0001, 2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [lambda f: region_size((4, 8), f), lambda f: Region.sample((4, 8), f, 0), lambda f: Region.top(torch.rand(4, 8), f)])
def test_fractions_outside_are_refused(make, fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got") as error: make(fraction)
    assert "\n" not in str(error.value)

def test_less_than_one_vector_is_refused_with_the_least_share():
    with pytest.raises(ValueError, match="less than one vector; use at least 0.031"): region_size((4, 8), .03)
    assert region_size((4, 8), 1 / 32) == 1

# --- draws

@pytest.mark.parametrize("outside", [None, of({(0, j) for j in range(6)} | {(2, 1), (2, 3)}, (3, 6))])
def test_draws_are_uniform(outside, draws=2000):
    counts, layers = torch.zeros(3, 6), torch.zeros(draws)
    for seed in range(draws):
        region = Region.sample((3, 6), 1 / 3, seed, outside)
        assert len(region) == 6 and (outside is None or not region & outside)
        counts += region.mask
        layers[seed] = len(region.columns[1])
    free = torch.ones(3, 6, dtype=torch.bool) if outside is None else ~outside.mask
    n, p = int(free.sum()), 6 / int(free.sum())
    # an inclusion has variance p(1-p); the counts sum to a constant, which leaves n - 1 degrees of freedom
    chi2 = ((counts[free] - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
    assert chi2 < n - 1 + 4.5 * math.sqrt(2 * (n - 1)) and counts[~free].sum() == 0
    inside, variance = 6 * p, 6 * (6 / n) * (1 - 6 / n) * (n - 6) / (n - 1) # of the count in the middle layer: hypergeometric, six draws, six of n
    assert abs(layers.mean() - inside) < 4.5 * math.sqrt(variance / draws) and abs(layers.var() / variance - 1) < .2

def test_a_draw_depends_on_its_seed_alone():
    target = Region.sample((4, 64), .25, 0)
    torch.manual_seed(7); before = torch.rand(1); torch.manual_seed(7)
    again, other, apart = Region.sample((4, 64), .25, 0), Region.sample((4, 64), .25, 1), Region.sample((4, 64), .25, 0, outside=target)
    assert torch.rand(1) == before and again == target != other and not apart & target and len(apart) == len(target)
    assert abs(target.jaccard(other) - 1 / 7) < .12 # two draws of a quarter share a sixteenth

def test_the_other_half_is_all_that_is_left():
    half = Region.sample((4, 8), .5, 0)
    assert Region.sample((4, 8), .5, 1, outside=half) == ~half
    with pytest.raises(ValueError, match=r"cannot draw 17 value vectors \(fraction 0.54\) outside a region of 16: 16 are left of 32; .* at most 0.5"): Region.sample((4, 8), .54, 1, outside=half)
    with pytest.raises(ValueError, match="different models"): Region.sample((4, 8), .1, 0, outside=Region.sample((8, 4), .1, 0))

# --- the top

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_top_takes_the_highest_and_breaks_ties_by_place(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, (4, 11), generator=g).to(dtype) # many ties
    order = sorted(((-scores[l, j].item(), l, j) for l in range(4) for j in range(11)))
    for n in (1, 7, 20, 44): assert members(Region.top(scores, n / 44)) == {(l, j) for _, l, j in order[:n]}
    assert Region.top(scores.T.contiguous().T, .3) == Region.top(scores, .3) # whatever the strides

def test_top_orders_infinities_and_zeros():
    scores = torch.tensor([[-math.inf, 0., -0.], [math.inf, 5., -1.]])
    assert [members(Region.top(scores, k / 6)) for k in (1, 2, 3, 5)] == [{(1, 0)}, {(1, 0), (1, 1)}, {(1, 0), (1, 1), (0, 1)}, {(1, 0), (1, 1), (0, 1), (0, 2), (1, 2)}]
    with pytest.raises(ValueError, match="scores hold 2 NaN"): Region.top(torch.tensor([[1., math.nan], [math.nan, 0.]]), .5)

# --- the file

def test_a_file_gives_the_region_back(tmp_path):
    for seed in range(5):
        region = Region.sample((3, 17), .2, seed)
        region.save(tmp_path / "a"); region.save(str(tmp_path / "b"))
        assert Region.load(tmp_path / "a") == region and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

def test_every_truncation_is_named(tmp_path):
    path = tmp_path / "region.safetensors"
    Region.sample((3, 5), .4, 0).save(path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="region.safetensors is not a region file") as error: Region.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError): Region.load(tmp_path / "absent")

@pytest.mark.parametrize("tensors", [{"mask": torch.ones(2, 2, dtype=torch.bool)}, {"region": torch.ones(2, 2)}, {"region": torch.ones(4, dtype=torch.bool)}, {}])
def test_other_tensors_are_named(tensors, tmp_path):
    from safetensors.torch import save_file
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not a region file"): Region.load(tmp_path / "other.safetensors")
