"""Every localizer equals a plain autograd loop over single facts, whatever the batches, holds no
more than one set's gradients, and leaves the model as it was."""
import copy, gc, inspect, json, math, os, warnings
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unloc import streaming as S
from unloc.loading import recompute
from unloc.methods.activations import mean_coefficient
from unloc.methods.fisher_ratio import fisher_ratio_score
from unloc.methods.memflex import memflex_score
from unloc.methods.random import random_scores
from unloc.methods.wagle import POOLS, wagle_product
from unloc.methods.wanda import wanda_score
from unloc.models import output_projections, tiny_model
from unloc.register import METHODS, localizer, methods
from unloc.regions import Region, region_size
from unloc.tokens import Example

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
# they edit, or ask each fact alone, and have no batches: see test_editing_page.py
ALONE = "edit_size", "knowledge_neurons", "traced"
OWN = {name: m for name, m in methods("localizer").items() if m.own}
EVERY = {name: m for name, m in OWN.items() if name not in ALONE}
VECTORS = [name for name, m in EVERY.items() if m.about["unit"] == "value vectors"]
GRADIENTS = [name for name, m in EVERY.items() if m.about["gradients"]]
TWO = [name for name, m in EVERY.items() if m.takes("retain")]
ONE = [name for name, m in EVERY.items() if m.takes("forget") and not m.takes("retain")]
golden_only = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")


def facts(n, seed, vocab=60): # prompts of 1 to 6 tokens, answers of 1 to 6 and an end token
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, k=1: torch.randint(low, high, (k,), generator=g).tolist()
    return [
        Example(draw(2, vocab, (p := draw(1, 7)[0]) + draw(1, 7)[0]) + [1], p) for _ in range(n)]

FORGET, RETAIN = facts(6, 0), facts(5, 1)

def small(arch="llama", dtype=torch.float64, n_layers=2, d_model=16, d_ff=24, bias=False):
    model = tiny_model(
        arch, vocab_size=60, d_model=d_model, d_ff=d_ff, n_layers=n_layers, n_heads=2).to(dtype)
    # sharper than a fresh model, and in float64 not made of float32 numbers, which would hide a
    # loss of precision
    with torch.no_grad():
        for p in model.parameters():
            p *= (3 if p.ndim == 2 else 1) * (
                1
                + 1e-9
                * torch.rand(p.shape, dtype=dtype, generator=torch.Generator().manual_seed(2)))
    if bias:
        for p in output_projections(model):
            p.bias = nn.Parameter(
                torch.randn(d_model, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    return model

def scored(
    name, model, forget=None, retain=None, seed=0, progress=None, **options
): # by the localizer of a name, with what it takes
    sets = {
        "forget": FORGET if forget is None else forget,
        "retain": RETAIN if retain is None else retain}
    return EVERY[name](model=model, seed=seed, progress=progress, options=options, **sets)

def layers(scores): return scores if isinstance(scores, list) else [scores]
def alike(a, b):
    return len(layers(a)) == len(layers(b)) and all(map(torch.equal, layers(a), layers(b)))

def close(got, want, rtol=3e-7, atol=0.): # float32 rounds by 6e-8
    assert got.dtype == torch.float32 and got.device.type == "cpu"
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)

# --- the plain way, a fact at a time

def nll(model, e):
    logits = model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1]
    return F.cross_entropy(logits, torch.tensor(e.ids[e.start:]))

def gradients(model, e): # [n_layers, d_model, d_ff], by autograd on the weights
    model.zero_grad()
    nll(model, e).backward()
    found = torch.stack([p.weight.grad for p in output_projections(model)])
    model.zero_grad()
    return found

def coefficients(model, e): # [n_layers, n_answer, d_ff]
    found = []
    hooks = [
        p.register_forward_pre_hook(lambda m, x: found.append(x[0][0, e.start - 1:-1]))
        for p in output_projections(model)]
    with torch.no_grad(): model(input_ids=torch.tensor([e.ids]))
    for h in hooks: h.remove()
    return torch.stack(found)

def mean(xs): return sum(xs) / len(xs)
def mean_gradient(model, examples): return mean([gradients(model, e) for e in examples])
def weights(model): return torch.stack([p.weight.detach() for p in output_projections(model)])

def path(
    model, e, layer, t, steps
): # integrated gradients of the token after position t, on the truncated input
    projection, ids, total = output_projections(model)[layer], torch.tensor([e.ids[:t + 1]]), 0
    for alpha in torch.linspace(0, 1, steps, dtype=torch.float64):
        kept = []
        def patch(module, x):
            kept[:] = x[0][:, -1:].detach(), (alpha * x[0][:, -1:].detach()).requires_grad_()
            return torch.cat([x[0][:, :-1], kept[1]], 1),
        hook = projection.register_forward_pre_hook(patch)
        p = model(input_ids=ids).logits[0, -1].softmax(0)[e.ids[t + 1]]
        total = total + kept[0][0, 0] * torch.autograd.grad(p, kept[1])[0][0, 0]
        hook.remove()
    return total / steps

def plain_path(model, examples, steps):
    return mean(
        [
            mean(
                [
                    torch.stack([path(model, e, layer, t, steps) for layer in range(2)])
                    for t in range(e.start - 1, len(e.ids) - 1)])
            for e in examples])

def plain_wagle(model, gamma):
    return (weights(model) - mean_gradient(model, RETAIN) / gamma) * mean_gradient(model, FORGET)

def plain_memflex(model, copies=None, seed=0, dims=1): # cosine and mean size
    sets = FORGET, RETAIN
    if copies:
        g, tokens = torch.Generator().manual_seed(seed), torch.arange(2, 60)
        sets = [[S.corrupted(e, tokens, g) for e in x for _ in range(copies)] for x in sets]
    f, r = (mean_gradient(model, x) for x in sets)
    if dims == 2: f, r = f.flatten(1)[..., None], r.flatten(1)[..., None]
    return F.cosine_similarity(f, r, dim=1, eps=0), f.abs().mean(1)

CASES = { # name: ours (model, max_tokens), the plain way (model)
    "weight_norm": (lambda m, k: scored("weight_norm", m), lambda m: weights(m).norm(dim=1)),
    "activations": (
        lambda m, k: scored("activations", m, max_tokens=k),
        lambda m: mean([coefficients(m, e).mean(1).abs() for e in FORGET]) * weights(m).norm(dim=1),
    ),
    "activations abs_first": (
        lambda m, k: scored("activations", m, abs_first=True, max_tokens=k),
        lambda m: mean([coefficients(m, e).abs().mean(1) for e in FORGET]) * weights(m).norm(dim=1),
    ),
    "wanda": (
        lambda m, k: scored("wanda", m, max_tokens=k),
        lambda m: (
            weights(m).abs()
            * torch.cat([coefficients(m, e) for e in FORGET], 1).square().mean(1).sqrt()[:, None]
        ).sum(1)),
    "gradient": (
        lambda m, k: scored("gradient", m, max_tokens=k),
        lambda m: mean_gradient(m, FORGET).abs().sum(1)),
    "fisher": (
        lambda m, k: scored("fisher", m, max_tokens=k),
        lambda m: mean([gradients(m, e).square().sum(1) for e in FORGET])),
    "fisher_ratio": (
        lambda m, k: scored("fisher_ratio", m, max_tokens=k),
        lambda m: mean([gradients(m, e).square().sum(1) for e in FORGET])
        / mean([gradients(m, e).square().sum(1) for e in RETAIN])),
    "wagle": (
        lambda m, k: scored("wagle", m, max_tokens=k),
        lambda m: plain_wagle(m, 1e-3).abs().sum(1)),
    "wagle abs_sum": (
        lambda m, k: scored("wagle", m, gamma=.5, pool="abs_sum", max_tokens=k),
        lambda m: plain_wagle(m, .5).sum(1).abs()),
    "wagle_weights": (
        lambda m, k: torch.stack(scored("wagle_weights", m, gamma=.5, max_tokens=k)),
        lambda m: plain_wagle(m, .5).abs()),
    "memflex product": (
        lambda m, k: scored("memflex", m, variant="product", corrupt=False, max_tokens=k),
        lambda m: (lambda c, s: s * (1 - c))(*plain_memflex(m))),
    "memflex corrupted": (
        lambda m, k: scored("memflex", m, variant="product", copies=2, seed=3, max_tokens=k),
        lambda m: (lambda c, s: s * (1 - c))(*plain_memflex(m, 2, 3))),
    "memflex_projections": (
        lambda m, k: scored("memflex_projections", m, variant="product", copies=2, max_tokens=k),
        lambda m: (lambda c, s: (s * (1 - c))[:, 0])(*plain_memflex(m, 2, dims=2))),
    "criticality": (
        lambda m, k: scored("criticality", m, max_tokens=k),
        lambda m: (weights(m) * mean_gradient(m, FORGET)).abs().mean(1)),
    "criticality top quarter": (
        lambda m, k: scored("criticality", m, criterion="gradient", top=.25, max_tokens=k),
        lambda m: mean_gradient(m, FORGET).abs().topk(4, dim=1).values.mean(1)),
    "criticality_weights": (
        lambda m, k: torch.stack(scored("criticality_weights", m, max_tokens=k)),
        lambda m: (weights(m) * mean_gradient(m, FORGET)).abs()),
    "integrated_gradients": (
        lambda m, k: scored("integrated_gradients", m, steps=5, max_tokens=k),
        lambda m: plain_path(m, FORGET, 5))}

@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_autograd_gives_a_fact_at_a_time(name, arch):
    ours, plain = CASES[name]
    want = plain(model := small(arch, bias=arch == "llama")).detach()
    assert want.abs().min() > 0 and len({len(e.ids) for e in FORGET}) > 2 # padded batches
    for max_tokens in (4096, 30, 1):
        close(ours(model, max_tokens), want, atol=1e-12 if "integrated" in name else 0)

@pytest.mark.parametrize("name", VECTORS)
def test_float32_gives_the_same_scores(name):
    wide = small(dtype=torch.float32).double()
    got, want = (scored(name, m) for m in (copy.deepcopy(wide).float(), wide))
    (
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4 * float(want.abs().max()))
        if name != "memflex"
        else None)
    assert Region.top(got, .25).recall(of=Region.top(want, .25)) == 1

@pytest.mark.parametrize("arch", methods("architecture"))
def test_sums_of_a_float64_model_are_float64(arch):
    model = small(arch)
    want = {
        "gradient": mean_gradient(model, FORGET),
        "fisher": mean([gradients(model, e).square().sum(1) for e in FORGET])}
    for got, name in (
        (torch.stack(S.mean_gradients(model, FORGET, 40)), "gradient"),
        (S.mean_squares(model, FORGET, 40), "fisher")):
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-16)

def test_a_square_is_never_negative(): # two tokens that cancel to rounding
    h = torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(0))
    g = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1))
    assert S.fisher_score(torch.cat([h, -h / 3], 1), torch.cat([g, 3 * g], 1)).min() == 0

@pytest.mark.parametrize("name", ["gradient", "activations"])
def test_sums_outgrow_a_bfloat16(name): # 300 equal summands: a bfloat16 sum stops at 256
    model, e = small(dtype=torch.bfloat16), max(FORGET, key=lambda e: len(e.ids))
    close(scored(name, model, [e] * 300, max_tokens=20), scored(name, model, [e]), rtol=1e-3)

def test_integrated_gradients_know_both_attentions(arch="olmo2"):
    model = small(arch, torch.float32)
    want = scored("integrated_gradients", model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(
        scored("integrated_gradients", model), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError,
        match="unknown attention for integrated gradients 'flash_attention_2'; known: eager, sdpa"):
        scored("integrated_gradients", model)

@pytest.mark.parametrize("limit, calls", [(1024, 1), (60, 3), (1, 7)])
def test_rows_of_copies_keep_to_their_limit(limit, calls):
    model, e, rows = small(), Example([5, 6, 7, 8, 9, 10, 11, 12, 13, 1], 3), []
    model.model.embed_tokens.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    scored("integrated_gradients", model, [e], steps=15, max_tokens=limit)
    assert len(rows) == 2 * calls and max(rows) <= max(limit, len(e.ids) + 15)

def test_grouped_key_value_heads():
    import transformers
    config = tiny_model("llama", 60, d_model=16, d_ff=24, n_layers=2).config
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for name in ("wagle", "integrated_gradients"):
        ours, plain = CASES[name]
        close(
            ours(model, 40),
            plain(model).detach(),
            atol=1e-12 if "integrated" in name else 0,
            rtol=1e-6)

# --- the golden numbers

@golden_only
def test_golden_values():
    case = json.loads((SHARED / "golden/localization_derived.json").read_text("utf-8"))
    d, j, t = (torch.arange(case[n], dtype=torch.float64) for n in "DIT")
    W = torch.sin(.5 * d[:, None] + .3 * j)
    h = torch.cos(.2 * t[:, None] + .9 * j) + .1 * torch.sin(t[:, None] * j)
    f, r = .01 * torch.sin(.7 * d[:, None] - .4 * j + .1), .01 * torch.cos(.3 * d[:, None] + .5 * j)
    every = torch.ones(1, case["T"], dtype=torch.bool)
    one = torch.eye(case["D"], dtype=torch.float64)[None]
    cosine, size = S.cosine_and_size(S.gradient_moments(f, r), case["D"])
    # as many tokens as dimensions, each with a gradient along its own: the product is g itself
    fisher = [S.fisher_score(g[None], one) for g in (f, r)]
    found = {
        "activations_abs_of_mean": mean_coefficient(h[None], every)[0] * S.column_norm(W),
        "activations_mean_of_abs": mean_coefficient(h[None], every, True)[0] * S.column_norm(W),
        "memflex_cos": cosine,
        "memflex_mean_abs_grad": size,
        "salun_sum_abs": S.column_norm(f, 1),
        "fisher_forget_sum": fisher[0],
        "ssd_ratio": fisher_ratio_score(*fisher),
        "weight_norm": S.column_norm(W),
        "wanda_col": wanda_score(W, h.square().mean(0))}
    want = case["values"]
    for name, got in found.items():
        assert got.tolist() == pytest.approx(want[name], rel=1e-9, abs=0), name
    chosen = (cosine < .2) & (size > .006)
    assert chosen.nonzero().flatten().tolist() == want["memflex_selected_mu0.2_sigma0.006"]
    assert set(memflex_score(cosine, size, mu=.2).topk(3).indices.tolist()) == {2, 3, 4}
    for gamma in (.001, .1, 1.):
        for pool, function in POOLS.items():
            got, golden = function(wagle_product(W, f, r, gamma)), want[f"wagle_gamma{gamma}"]
            assert got.tolist() == pytest.approx(golden[pool], rel=1e-9, abs=0)
            assert got.argsort(descending=True).tolist() == golden[f"rank_{pool}"]
    untested = set(want) - set(found) - {"aues", "mu95", "memflex_selected_mu0.2_sigma0.006"}
    assert untested == {f"wagle_gamma{g}" for g in (.001, .1, 1.)}

# --- memory

class Alive(TorchDispatchMode):
    """Counts the elements alive in tensors at least as large as one projection, the model's own
    apart"""
    def __init__(self, model):
        super().__init__()
        self.unit = output_projections(model)[0].weight.numel()
        self.own, self.alive, self.peak = (
            {p.untyped_storage()._cdata for p in model.parameters()},
            {},
            0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):
            if (
                isinstance(t, torch.Tensor)
                and (s := t.untyped_storage()).nbytes() >= 4 * self.unit
                and s._cdata not in self.own):
                self.alive[s._cdata] = StorageWeakRef(s), s.nbytes() // 4
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out

    @property
    def layers(self): return self.peak / self.unit

def plainly(model, forget, retain): # what the streamed code avoids
    sums = []
    for examples in (forget, retain):
        sums.append([mean([gradients(model, e)[layer] for e in examples]) for layer in range(3)])
    return [((p.weight - r) * f).abs().sum(0) for p, f, r in zip(output_projections(model), *sums)]

# layers of gradients in memory at most: none, those of a weight and its copy, one set's, or one
# set's and one layer
HELD = {"gradient": 3, "criticality": 3, "criticality_weights": 4}
HELD |= {name: 4 for name in TWO} | {"fisher_ratio": 0} | {"tgl": 2, "tgl_projections": 2}

@pytest.mark.parametrize("name", ["weight_norm", *ONE, *TWO])
def test_what_is_held_in_memory(name):
    model = small(dtype=torch.float32, n_layers=3, d_model=8, d_ff=2048)
    few = [Example([5, 9, 7, 1], 2), Example([6, 8, 4, 1], 2)]
    other = [Example([7, 9, 7, 1], 2), Example([8, 8, 4, 1], 2)]
    more = {
        "integrated_gradients": {"steps": 2},
        "memflex": {"copies": 2},
        "memflex_projections": {"copies": 2}}.get(name, {})
    if "max_tokens" in EVERY[name].options: more = more | {"max_tokens": 1}
    gc.collect(); gc.disable()
    try:
        with Alive(model) as tracker: scored(name, model, few, other, **more)
    finally: gc.enable()
    held = HELD.get(name, 0)
    assert min(held, 3) <= tracker.layers <= held + .01

def test_the_count_sees_the_plain_way():
    model = small(dtype=torch.float32, n_layers=3, d_model=8, d_ff=2048)
    with Alive(model) as tracker:
        plainly(model, [Example([5, 9, 7, 1], 2)], [Example([6, 8, 4, 1], 2)])
    assert tracker.layers >= 6

def test_nothing_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen, model = [], small()
    def progress(share): seen.append(len(list(tmp_path.rglob("*.safetensors")))); seen[5:] and 1 / 0
    with pytest.raises(ZeroDivisionError): scored("wagle", model, max_tokens=10, progress=progress)
    assert seen[0] == 0 and not list(tmp_path.iterdir())
    seen.clear()
    scored(
        "wagle",
        model,
        max_tokens=100,
        progress=lambda share: seen.append(len(list(tmp_path.rglob("*.safetensors")))))
    assert seen == [0, 2] and not list(tmp_path.iterdir())

def test_sums_of_a_model_on_a_gpu_live_on_the_cpu(
    monkeypatch
): # no GPU needed: tensors that know their device alone
    disk, products = {}, []
    with FakeTensorMode():
        values = [torch.empty(16, 24, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        def backward(model, examples, consume, max_tokens, progress):
            for layer in (1, 0, 1, 0):
                consume(
                    layer, torch.ones(2, 5, 24, device="cuda"), torch.ones(2, 5, 16, device="cuda"))
        monkeypatch.setattr(S, "output_projections", lambda model: values)
        monkeypatch.setattr(S, "value_vectors", lambda projection: projection)
        monkeypatch.setattr(S, "output_gradients", backward)
        monkeypatch.setattr(S, "save_file", lambda tensors, path: disk.update({path: tensors}))
        monkeypatch.setattr(S, "load_file", disk.__getitem__)
        matmul = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: products.append((a.device.type, b.device.type)) or matmul(a, b))
        assert [
            (g.device.type, g.dtype, g.shape)
            for g in inspect.unwrap(S.mean_gradients)(None, FORGET)
        ] == [("cpu", torch.float32, (16, 24))] * 2
        assert products == [("cuda", "cuda")] * 4, "the GPU multiplies"
        monkeypatch.setattr(S, "mean_gradients", inspect.unwrap(S.mean_gradients))
        combine = lambda *layer: [(x.device.type, x.shape) for x in layer]
        assert (
            inspect.unwrap(S.per_layer_gradients)(None, FORGET, RETAIN, combine)
            == [[("cpu", (16, 24))] * 3] * 2)
        assert [t["gradient"].device.type for t in disk.values()] == ["cpu"] * 2

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_a_model_on_the_cpu_are_added_in_place(
    dtype
): # the bits that committed results have
    model = small(dtype=dtype)
    sums = [torch.zeros(16, 24, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    S.output_gradients(
        model,
        FORGET,
        lambda layer, h, g: sums[layer].addmm_(g.flatten(0, 1).T, h.flatten(0, 1)),
        40)
    assert all(
        map(torch.equal, S.mean_gradients(model, FORGET, 40), [x.div_(len(FORGET)) for x in sums]))

# --- the model is left as it was

def state(model):
    return (
        [
            (n, p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
            for n, p in model.named_parameters()],
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled())

def same(a, b):
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return (
        all(all(map(equal, x, y)) for x, y in zip(a[0], b[0], strict=True))
        and a[1] == b[1]
        and torch.equal(a[2], b[2])
        and a[3] == b[3])

@pytest.fixture
def lived(): # a model in the middle of someone's work
    model = small(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
    model.train().model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    output_projections(model)[1].register_forward_hook(lambda m, x, y: None)
    for layer in model.model.layers: layer.self_attn.attention_dropout = .5
    nll(model, FORGET[0]).backward()
    return model

@pytest.mark.parametrize("name", EVERY)
def test_the_model_is_left_as_it_was(name, lived):
    before, fresh = state(lived), scored(name, small(dtype=torch.float32))
    assert alike(scored(name, lived), fresh) and same(state(lived), before)
    with torch.no_grad(): assert alike(scored(name, lived), fresh)
    assert same(state(lived), before)

@pytest.mark.parametrize("name", [name for name, m in EVERY.items() if m.takes("progress")])
def test_also_when_it_fails_half_way(name, lived):
    before = state(lived)
    def progress(share):
        if share > .6: raise KeyError
    with pytest.raises(KeyError): scored(name, lived, max_tokens=30, progress=progress)
    assert same(state(lived), before)

@pytest.mark.parametrize("name", [name for name, m in EVERY.items() if m.takes("progress")])
def test_progress_ends_at_one(name):
    seen = []
    scored(name, small(), max_tokens=20, progress=seen.append)
    assert len(seen) > 3 and seen == sorted(set(seen)) and 0 < seen[0] < .5 and seen[-1] == 1

@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", EVERY)
def test_it_takes_the_passes_that_it_says(
    name
): # of the plan: forward passes over the facts, and whether gradients are taken
    model, passes, facts, about = small(), [], FORGET[:2], EVERY[name].about
    model.model.layers[0].register_forward_hook(
        lambda m, x, y: passes.append(x[0].shape[0] if isinstance(x, tuple) else 1))
    backward = []
    model.model.layers[1].register_full_backward_hook(lambda m, x, y: backward.append(1))
    options = {"max_tokens": 1} if "max_tokens" in EVERY[name].options else {}
    scored(name, model, facts, RETAIN[:2], **options)
    assert about["unit"] in S.UNITS and bool(about["gradients"]) == bool(backward)
    if not about["per_layer"]: assert sum(passes) == about["passes"] * len(facts)

@pytest.mark.parametrize("name", EVERY)
def test_a_block_that_is_computed_once_more_gives_the_same_scores(name):
    again = small()
    recompute(again)
    assert alike(scored(name, again), scored(name, small()))

# --- what a score is good for

@pytest.mark.parametrize("name", EVERY)
def test_every_localizer_scores_each_unit_once(name):
    model = small(dtype=torch.float32)
    scores = scored(name, model)
    shapes = {"value vectors": [(2, 24)], "projections": [(2,)], "weights": [(16, 24)] * 2}
    assert S.check_scores(scores, model, name) == EVERY[name].about["unit"]
    assert [tuple(x.shape) for x in layers(scores)] == shapes[EVERY[name].about["unit"]]
    assert all(
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.isfinite().all()
        and not x.requires_grad
        for x in layers(scores))
    if name in VECTORS: assert len(Region.top(scores, .1)) == region_size(scores.shape, .1)
    assert alike(scores, scored(name, model)), "one seed, one answer"
    if not EVERY[name].seeded: assert alike(scores, scored(name, model, seed=1))
    elif name != "memflex_projections":
        # whose order of two layers may be the same
        assert not alike(scores, scored(name, model, seed=1))

@pytest.mark.parametrize("name", EVERY)
def test_every_localizer_says_how_tables_call_it(name):
    method = EVERY[name]
    assert method.label[0].isupper()
    assert method.function.__module__.startswith("unloc.methods.")
    assert method.takes("model")
    assert (
        method.source or name.startswith("random") or name in ("weight_norm", "memflex_projections")
    )
    assert all(
        type(default) in (bool, int, float, str, type(None))
        for _, default in method.options.values())

def test_random_scores_are_a_fair_order_of_their_own():
    draws = [random_scores((3, 40), seed) for seed in range(400)]
    assert torch.equal(scored("random", small(), seed=5), random_scores((2, 24), 5))
    assert all(sorted(s.flatten().tolist()) == list(range(120)) for s in draws)
    taken = mean([Region.top(s, .1).mask.double() for s in draws])
    assert (taken - .1).abs().max() < 4.5 * math.sqrt(.09 / 400)
    found = mean(
        [
            Region.top(s, .1).recall(of=Region.sample((3, 40), .1, seed))
            for seed, s in enumerate(draws)])
    assert abs(found - .1) < 4.5 * math.sqrt(
        .09 / 12 / 400), "unrelated to a region drawn with the same seed"

@pytest.mark.parametrize("seed", range(5))
def test_layer_matched_scores_keep_the_counts(seed):
    uneven = Region(
        torch.rand(5, 40, generator=torch.Generator().manual_seed(seed))
        < torch.tensor([0., .05, .2, .9, 1.])[:, None])
    top = Region.top(random_scores((5, 40), seed, like=uneven), uneven.fraction)
    assert [len(k) for k in top.columns] == [len(k) for k in uneven.columns] and top != uneven
    others = [
        Region.top(random_scores((5, 40), s, like=uneven), uneven.fraction).mask[2].double()
        for s in range(300)]
    share = len(uneven.columns[2]) / 40
    assert (mean(others) - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 300)

@pytest.mark.parametrize(
    "shape, like, most",
    [
        ((1, 2**24 + 1), None, 2**24),
        ((2, 2**23 + 1), None, 2**24),
        ((2, 2**22 + 1), Region.sample((2, 4), .5, 0), 2**23)])
def test_more_vectors_than_float32_can_order_are_refused(shape, like, most, monkeypatch):
    monkeypatch.setattr(torch, "randperm", None) # before any work
    with pytest.raises(
        ValueError,
        match=(
            rf"{shape[0] * shape[1]} value vectors are more than the {most} whose order fits into"
            r" float32 scores; rank parts of them")):
        random_scores(shape, 0, like)
    many = torch.zeros(()).expand(shape[0] * shape[1])
    if like is None:
        with pytest.raises(ValueError, match="value vectors are more than"):
            memflex_score(many, many, mu=0.)

# --- MemFlex

def test_corruption_touches_half_of_the_answer_at_most():
    e = Example([5, 6, 7, 10, 11, 12, 13, 14, 1], 3)
    g = torch.Generator().manual_seed(0)
    changed = []
    for _ in range(300):
        ids, start = S.corrupted(e, torch.tensor([70, 71]), g)
        assert start == 3 and len(ids) == 9 and ids[:3] == e.ids[:3] and ids[-1] == 1
        changed.append([i for i, (a, b) in enumerate(zip(ids, e.ids)) if a != b])
        assert all(ids[i] in (70, 71) for i in changed[-1])
    assert {len(c) for c in changed} == {1, 2}
    assert {i for c in changed for i in c} == {3, 4, 5, 6, 7}
    assert e.ids[3] == 10
    assert .7 < mean([len(c) == 2 for c in changed]) < .9 # two draws meet with chance 1/5
    for short in (Example([5, 6, 1], 1), Example([5, 1], 1)):
        assert S.corrupted(short, torch.tensor([70]), g) == short

@pytest.mark.parametrize("special, missing", [(None, {0, 1, 7}), ([3, 4], {3, 4}), ([], set())])
def test_special_tokens_are_not_drawn(special, missing, monkeypatch):
    model, seen, plain = small(), [], S.corrupted
    model.config.eos_token_id = [1, 7]
    monkeypatch.setattr(
        S, "corrupted", lambda e, tokens, g: seen.append(tokens) or plain(e, tokens, g))
    scored("memflex", model, copies=2, special=special)
    assert len(seen) == 2 * (len(FORGET) + len(RETAIN))
    assert all(set(t.tolist()) == set(range(60)) - missing for t in seen)

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mu", [None, -.3, .5, 2., -2.])
def test_the_ranking_loses_nothing(seed, mu):
    g = torch.Generator().manual_seed(seed)
    cosine = 2 * torch.rand(3, 50, generator=g) - 1
    size = 10. ** torch.randint(-38, 30, (3, 50), generator=g)
    # neighbours among float32 numbers
    size[1] = torch.tensor([1.5 + i * 2. ** -23 for i in range(50)])
    size[2, :9] = 0; size[2, 9:20] = size[2, 9]; cosine[2, :9] = 0
    scores = memflex_score(cosine, size, mu=mu)
    threshold = sorted(cosine.flatten().tolist())[74:76] if mu is None else (mu, mu)
    key = [
        (c < sum(threshold) / 2, s)
        for c, s in zip(cosine.flatten().tolist(), size.flatten().tolist())]
    assert scores.isfinite().all()
    assert scores.min() == 0
    assert scores.flatten().tolist() == [sorted(set(key)).index(k) for k in key]

BAD = [math.nan, math.inf, -math.inf]
@pytest.mark.parametrize("variant, mu", [("ranking", None), ("ranking", .2), ("product", None)])
@pytest.mark.parametrize("name", ["cosine", "size"])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_number_is_not_ranked(bad, name, variant, mu):
    x = {"cosine": torch.tensor([.1, .2, .3, .4]), "size": torch.tensor([1., 2., 3., 4.])}
    x[name][[1, 3]] = bad
    with pytest.raises(
        ValueError,
        match=f"the {name} of 2 vectors is NaN or infinite and has no place in a ranking") as error:
        memflex_score(**x, variant=variant, mu=mu)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize(
    "options, says",
    [
        ({"variant": "foo"}, "unknown variant 'foo'; known: ranking, product"),
        ({"variant": "Ranking"}, "unknown variant 'Ranking'"),
        ({"variant": ""}, "unknown variant ''"),
        ({"mu": math.nan}, "mu must be a cosine or None, got nan"),
        ({"mu": torch.tensor(math.nan), "variant": "product"}, "mu must be a cosine or None")])
def test_a_ranking_that_nobody_defined_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        memflex_score(torch.zeros(3), torch.ones(3), **options)

def test_zero_gradients():
    f, r = torch.tensor([[0., 1., 0.], [0., 2., 0.]]), torch.tensor([[3., 0., 0.], [4., 0., 0.]])
    cosine, size = S.cosine_and_size(S.gradient_moments(f, r), 2)
    assert cosine.tolist() == [0, 0, 0] and size.tolist() == [0, 1.5, 0]
    assert memflex_score(cosine, size, "product").tolist() == [0, 1.5, 0]
    assert memflex_score(cosine, size, mu=-.5).tolist() == [0, 1, 0]

def test_fisher_ratio_without_a_denominator():
    largest = torch.finfo(torch.float32).max
    f, r = torch.tensor([2., 0., 3., 1e30, 0.]), torch.tensor([4., 0., 0., 1e-30, 5.])
    for dtype in (torch.float32, torch.float64):
        assert fisher_ratio_score(f.to(dtype), r.to(dtype)).float().tolist() == [
            .5, 0, largest, largest, 0]
    model = small(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0 # its coefficient is always 0
    assert scored("fisher_ratio", model)[0, 5] == 0

# --- at the door

@pytest.mark.parametrize("name", ONE + TWO)
def test_sets_of_facts_are_checked(name):
    model = small()
    def refused(f, r, says):
        with pytest.raises(ValueError, match=says) as error: scored(name, model, f, r)
        assert "\n" not in str(error.value)
    refused([], RETAIN, "the forget set is empty")
    for start in (-1, 0, 2, 3, 4):
        refused(
            [*FORGET, Example([5, 6, 1], start)],
            RETAIN,
            r"fact 6 of the forget set has no answer token between its prompt and its end token"
            rf" \(start {start} of 3 tokens\)")
    if name in TWO:
        refused(FORGET, [], "the retain set is empty")
        for start in (0, 2, 3):
            refused(
                FORGET,
                [*RETAIN, Example([5, 6, 1], start)],
                r"fact 5 of the retain set has no answer token between its prompt and its end"
                rf" token \(start {start} of 3 tokens\)")
        ids, start = FORGET[2]
        for answer in (ids[start:], [9, 1], [9, 8, 7, 1]):
            refused(
                FORGET,
                RETAIN + [Example(ids[:start] + answer, start)],
                "fact 2 of the forget set asks what fact 5 of the retain set asks; keep it in one"
                " of them")
    # a fact may count twice in its own set
    scored(name, model, FORGET + FORGET[:1], RETAIN + RETAIN[:1])

@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: scored("wagle", m, pool="mean"), "unknown pool 'mean'; known: sum_abs, abs_sum"),
        (lambda m: scored("wagle", m, gamma=0.), "gamma must be positive, got 0.0"),
        (lambda m: scored("wagle_weights", m, gamma=math.nan), "gamma must be positive, got nan"),
        (
            lambda m: scored("memflex", m, variant="threshold"),
            "unknown variant 'threshold'; known: ranking, product"),
        (lambda m: scored("memflex_projections", m, variant="sum"), "unknown variant 'sum'"),
        (lambda m: scored("memflex", m, mu=math.nan), "mu must be a cosine or None, got nan"),
        (
            lambda m: scored("memflex", m, special=list(range(60))),
            "`special` leaves none of the 60 tokens to be drawn; name fewer"),
        (
            lambda m: scored("memflex_projections", m, special=list(range(-3, 99))),
            "`special` leaves none of the 60 tokens"),
        (lambda m: scored("memflex", m, copies=0), "copies must be at least 1, got 0"),
        (lambda m: scored("integrated_gradients", m, steps=1), "steps must be at least 2"),
        (
            lambda m: random_scores((3, 24), 0, like=Region.sample((2, 24), .1, 0)),
            r"`like` is a region of shape \(2, 24\), the scores have \(3, 24\)")])
def test_variants_are_checked_before_any_work(call, says, monkeypatch):
    model = small()
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(S, "watched", None)
    with pytest.raises(ValueError, match=says) as error: call(model)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("random")])
@pytest.mark.parametrize("place", ["projection", "lm_head"])
def test_a_score_that_is_no_number_names_its_layer(name, place):
    model = small(dtype=torch.float32)
    with torch.no_grad():
        (
            output_projections(model)[1] if place == "projection" else model.get_output_embeddings()
        ).weight[3, 4] = math.nan
    if place == "lm_head" and name not in GRADIENTS:
        assert scored(name, model).isfinite().all()
        return # they do not look at it
    with pytest.raises(
        ValueError,
        match=(
            r"layer [01] has \d+ scores that are NaN or infinite; check the model's weights, or"
            r" load it in float32 if it overflows")) as error:
        scored(name, model)
    assert (
        1
        <= int(str(error.value).split()[3])
        <= (24 if EVERY[name].about["unit"] != "weights" else 16 * 24)
    ), "as many as the layer has units at most"

def test_an_overflow_names_its_layer():
    model = small(dtype=torch.float16)
    with torch.no_grad():
        output_projections(model)[1].weight[:] = 6e4
        model.model.layers[1].mlp.up_proj.weight[:] = 6e4
    assert scored("weight_norm", model)[1].min() > 2e5, "more than float16 can hold"
    with pytest.raises(
        ValueError,
        match=(
            r"layer 1 has \d+ scores that are NaN or infinite; check the model's weights, or load"
            r" it in float32 if it overflows")):
        scored("wanda", model)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores():
    for name in VECTORS:
        want, got = (scored(name, m) for m in (small(), small().cuda()))
        close(got, want, rtol=1e-5, atol=1e-9)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["gradient", "wagle", "wagle_weights", "memflex"])
def test_a_gpu_holds_one_layers_gradient(name):
    model = small(dtype=torch.bfloat16, n_layers=32, d_model=512, d_ff=4096).cuda()
    every = 32 * 512 * 4096 * 4 # bytes of all gradients
    # a fact at a time, so that the activations of all layers are few
    call = lambda: scored(name, model, max_tokens=13)
    call() # what the libraries keep for themselves
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    assert torch.cuda.max_memory_allocated() - before < every / 4

def test_a_full_folder_of_temporary_files_is_named(monkeypatch, tmp_path):
    model = tiny_model("llama", 60, d_model=16, n_layers=2, d_ff=24, n_heads=2)
    some = [Example([5, 6, 7, 8 + i, 1], 3 - i) for i in range(2)]
    monkeypatch.setattr(S.tempfile, "tempdir", str(tmp_path))
    # a byte too few for two layers
    monkeypatch.setattr(
        S.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2 * 16 * 24 * 4 - 1}))
    for name in set(TWO) - {"fisher_ratio", "tgl", "tgl_projections"}:
        with pytest.raises(
            OSError,
            match=(
                "the gradients of the forget set take .* GiB, the folder of temporary files, .*"
                " free; free some, or set TMPDIR")):
            scored(name, model, some[:1], some[1:])
    monkeypatch.undo()
    assert scored("wagle", model, some[:1], some[1:]).isfinite().all()
    assert not list(tmp_path.iterdir())

def test_integrated_gradients_need_room_for_a_copy():
    model = tiny_model("llama", 60, d_model=16, n_layers=2, d_ff=24, n_heads=2)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        scored("integrated_gradients", model, [Example([5, 6, 7, 1], 2)], max_tokens=0)

# --- what the register and the study refuse

@pytest.mark.parametrize(
    "gives, says",
    [
        (
            lambda: torch.ones(3, 24),
            (
                r"gave scores of shape \(3, 24\), the model's value vectors have \(2, 24\); give"
                r" one score for each")),
        (
            lambda: torch.ones(3),
            r"gave scores of shape \(3,\), the model's projections have \(2,\)"),
        (lambda: [torch.ones(16, 24)], "the model's weights have"),
        (
            lambda: torch.full((2, 24), math.nan),
            "gave 48 scores that are NaN or infinite; every unit needs a finite one"),
        (lambda: torch.ones(2, 24) > 0, "gave scores of torch.bool; a ranking needs real numbers"),
        (lambda: None, r"scores must be \[n_layers, d_ff\], \[n_layers\], or a list")])
def test_scores_of_no_unit_are_refused(gives, says):
    with pytest.raises(ValueError, match=f"^localizer 'mine'.*{says}") as error:
        S.check_scores(gives(), small(), "mine")
    assert "\n" not in str(error.value)

def nothing(model): "Score nothing"
def unwritten(model): pass
def without_default(model, k:int): "Take an option without a default"
def without_type(model, k=1): "Take an option without a type"
def of_tensors(model, k:torch.Tensor=None): "Take an option that a profile cannot write"
def several(model, **options): "Take any options"

@pytest.mark.parametrize(
    "function, how, says",
    [
        (nothing, {"label": ""}, "the localizer 'nothing' lacks a label; name how tables call it"),
        (unwritten, {"label": "Mine"}, "the localizer 'unwritten' lacks a docstring"),
        (
            without_default,
            {"label": "Mine"},
            "the localizer 'without_default' has an option without a default: k"),
        (without_type, {"label": "Mine"}, "has an option without a type: k"),
        (of_tensors, {"label": "Mine"}, "has an option whose type a profile cannot write: k"),
        (several, {"label": "Mine"}, r"takes \*\*options; name each option"),
        (
            nothing,
            {"label": "Mine", "name": "wagle"},
            r"has the name of the package's own \(unloc.methods.wagle\); give yours another name")])
def test_a_method_that_does_not_say_what_it_is_is_refused(function, how, says):
    before = dict(METHODS["localizer"])
    with pytest.raises(ValueError, match=says) as error: localizer(**how)(function)
    assert "\n" not in str(error.value) and METHODS["localizer"] == before

@pytest.mark.parametrize(
    "options, says",
    [
        ({"gama": 1.}, "localizer wagle has no option 'gama'; known: gamma, pool, max_tokens"),
        ({"gamma": "1"}, "localizer wagle: gamma must be of type float, got '1'")])
def test_options_are_those_of_the_signature(options, says):
    with pytest.raises(ValueError, match=says): scored("wagle", small(), **options)
