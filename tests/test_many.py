"Many runs in one pass give what each gives alone, whatever the objective, the architecture or the dtype; one that diverges ends alone, and nothing else moves."
import copy, hashlib, math
import pytest, torch
from unloc import many, training
from unloc.evaluation import Diverged, Probe, choices, evaluate, score
from unloc.facts import author_world
from unloc.many import (
    bytes_of_a_run, evaluate_many, inject_many, runs_at_once, runs_that_fit, score_many, unlearn_many,
    unlock_many)
from unloc.masked import Neurons, locked_digest, put_columns, unlock
from unloc.models import ARCHITECTURES, output_projections, region_shape, tiny_model, value_vectors
from unloc.regions import Region
from unloc.tokens import collate, encode, train_tokenizer
from unloc.training import FORGET, RETAIN, Recipe, Term, inject, unlearn

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer((t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = ([encode(TOKENIZER, f.question, f.answer) for f in facts][:10] for facts in (WORLD.forget, WORLD.retain))
REFUSALS = [e.ids[e.start:] for text in WORLD.refusals[:5] if (e := encode(TOKENIZER, "", text))]
PROBE = Probe(GET[:6], KEEP[:4])
EVERY = pytest.mark.parametrize("arch", ARCHITECTURES)
SLACK = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}


def small(arch="llama", dtype=torch.float64, seed=0):
    model = tiny_model(arch, vocab_size=400, d_model=16, d_ff=32, n_layers=4, n_heads=2, seed=seed).to(dtype)
    if dtype == torch.float64: # transformers' own norms round to float32, which would hide an error
        for m in model.modules():
            if type(m).__name__.endswith("RMSNorm"): m.forward = lambda x, m=m: m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
    return model

def regions(model, n=3, fraction=.2): # of different sizes in each layer
    found = [Region.sample(region_shape(model), fraction, seed) for seed in range(n)]
    assert len({tuple(map(len, r.index)) for r in found}) == n
    return found

def weights(model): return {n: t.clone() for n, t in model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
def recipe(objective="npo", **more): return Recipe(objective, **dict(lr=3e-3, epochs=2, batch_size=4) | more)

def values_close(got, want, slack):
    assert list(got) == list(want)
    for layer in want:
        assert torch.equal(got[layer][0], want[layer][0]) and got[layer][1].dtype == want[layer][1].dtype
        torch.testing.assert_close(got[layer][1], want[layer][1], rtol=slack, atol=slack)

def close(got, want, slack):
    assert [set(p) for p in got[0].points] == [set(p) for p in want[0].points]
    for a, b in zip(got[0].points, want[0].points):
        for name in b: assert a[name] == pytest.approx(b[name], rel=slack, abs=slack, nan_ok=True), name
    for name in want[0].facts: torch.testing.assert_close(got[0].facts[name], want[0].facts[name], rtol=slack, atol=slack, equal_nan=True)
    assert got[0].live_fraction == want[0].live_fraction and got[0].locked_sha256 == want[0].locked_sha256
    values_close(got[1], want[1], slack)

def alone(model, region, how, seed, original={}, probe=PROBE):
    model = copy.deepcopy(model)
    put_columns(model, original)
    return unlearn(model, region, GET, KEEP, probe, how, seed, REFUSALS)

def together(model, chosen, how, seeds, probe=PROBE, **more):
    return unlearn_many(model, chosen, GET, KEEP, probe, how, seeds, REFUSALS, at_once=more.pop("at_once", len(chosen)), **more)

# --- unlearning

@pytest.mark.parametrize("objective, retain", [(o, None) for o in FORGET] + [("npo", r) for r in (*RETAIN, "none")])
def test_many_runs_equal_each_run_alone(objective, retain):
    model, how = small(), recipe(objective, retain=retain)
    chosen, before = regions(model), weights(model)
    found = together(model, chosen, how, [3, 4, 5])
    assert same(before, weights(model)) and all("forward" not in vars(p) for p in output_projections(model))
    for k, result in enumerate(found): close(result, alone(model, chosen[k], how, k + 3), 1e-10)

@EVERY
@pytest.mark.parametrize("dtype", SLACK)
def test_architectures_and_dtypes(arch, dtype):
    model, how = small(arch, dtype), recipe(epochs=1)
    chosen = regions(model)
    found = together(model, chosen, how, [3, 4, 5])
    for k, result in enumerate(found):
        want = alone(model, chosen[k], how, k + 3)
        close(result, want, SLACK[dtype])
        assert all(c.dtype == torch.promote_types(dtype, torch.float32) for _, c in result[1].values())
