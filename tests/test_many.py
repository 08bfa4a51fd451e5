"""Many runs in one pass give what each gives alone, whatever the objective, the architecture or the
dtype; one that diverges ends alone, and nothing else moves."""
import copy
import time
import pytest, torch
from unloc import evaluation, many, many_descents, training
from unloc.answers import choices
from unloc.evaluation import Probe, evaluate
from unloc.heads import Neurons
from unloc.invented import author_world
from unloc.many import evaluate_many, score_many, unlock_many
from unloc.many_descents import (
    bytes_of_a_run, inject_many, runs_at_once, runs_that_fit, unlearn_many)
from unloc.masked import put_columns, unlock
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import METHODS, methods, objective, retain_term
from unloc.scoring import Diverged, score
from unloc.tokens import collate, encode, train_tokenizer
from unloc.training import inject
from unloc.unlearning_run import Recipe, Term, unlearn

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts][:10]
    for facts in (WORLD.forget, WORLD.retain))
REFUSALS = [e.ids[e.start:] for text in WORLD.refusals[:5] if (e := encode(TOKENIZER, "", text))]
PROBE = Probe(GET[:6], KEEP[:4])
EVERY = pytest.mark.parametrize("arch", methods("architecture"))
OBJECTIVES, RETAIN = (
    [name for name, m in methods(kind).items() if m.own] for kind in ("objective", "retain"))
SLACK = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}


def small(arch="llama", dtype=torch.float64, seed=0):
    model = tiny_model(
        arch, vocab_size=400, d_model=16, d_ff=32, n_layers=4, n_heads=2, seed=seed).to(dtype)
    if dtype == torch.float64: # transformers' own norms round to float32, which would hide an error
        for m in model.modules():
            if type(m).__name__.endswith("RMSNorm"):
                m.forward = (
                    lambda x, m=m: m.weight
                    * x
                    * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt())
    return model

def regions(model, n=3, fraction=.2): # of different sizes in each layer
    found = [Region.sample(region_shape(model), fraction, seed) for seed in range(n)]
    assert len({tuple(map(len, r.index)) for r in found}) == n
    return found

def weights(model): return {n: t.clone() for n, t in model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
def recipe(objective="npo", **more):
    return Recipe(objective, **dict(lr=3e-3, epochs=2, batch_size=4) | more)

def values_close(got, want, slack):
    assert list(got) == list(want)
    for layer in want:
        assert torch.equal(got[layer][0], want[layer][0])
        assert got[layer][1].dtype == want[layer][1].dtype
        torch.testing.assert_close(got[layer][1], want[layer][1], rtol=slack, atol=slack)

def close(got, want, slack):
    assert [set(p) for p in got[0].points] == [set(p) for p in want[0].points]
    for a, b in zip(got[0].points, want[0].points):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=slack, abs=slack, nan_ok=True), name
    for name in want[0].facts:
        torch.testing.assert_close(
            got[0].facts[name], want[0].facts[name], rtol=slack, atol=slack, equal_nan=True)
    assert got[0].live_fraction == want[0].live_fraction
    assert got[0].locked_sha256 == want[0].locked_sha256
    values_close(got[1], want[1], slack)

def alone(model, region, how, seed, original={}, probe=PROBE):
    model = copy.deepcopy(model)
    put_columns(model, original)
    return unlearn(model, region, GET, KEEP, probe, how, seed, REFUSALS)

def together(model, chosen, how, seeds, probe=PROBE, **more):
    return unlearn_many(
        model,
        chosen,
        GET,
        KEEP,
        probe,
        how,
        seeds,
        REFUSALS,
        at_once=more.pop("at_once", len(chosen)),
        **more)

# --- unlearning

def test_a_changed_start_is_that_of_the_run_alone():
    model, how = small(), recipe(jitter=1e-3)
    chosen = regions(model)
    found, usual = (together(model, chosen, r, [3, 4, 5]) for r in (how, recipe()))
    for k, result in enumerate(found): close(result, alone(model, chosen[k], how, k + 3), 1e-10)
    for got, other in zip(found, usual):
        assert all((got[1][layer][1] != x).all() for layer, (_, x) in other[1].items())

@pytest.mark.parametrize(
    "objective, retain",
    [(o, None) for o in OBJECTIVES] + [(o, r) for o in ("npo", "pdu") for r in (*RETAIN, "none")])
def test_many_runs_equal_each_run_alone(objective, retain):
    model, how = small(), recipe(objective, retain=retain)
    chosen, before = regions(model), weights(model)
    found = together(model, chosen, how, [3, 4, 5])
    assert same(before, weights(model))
    assert all("forward" not in vars(p) for p in output_projections(model))
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
        assert all(
            c.dtype == torch.promote_types(dtype, torch.float32) for _, c in result[1].values())

SETS = {
    "forget": WORLD.forget,
    "retain": WORLD.retain,
    "real_authors": WORLD.real_authors,
    "world_facts": WORLD.world_facts}
def full_probe(new=12):
    return Probe(
        GET[:4],
        KEEP[:4],
        KEEP[:3],
        {name: choices(TOKENIZER, facts[:3]) for name, facts in SETS.items()},
        TOKENIZER,
        max_new_tokens=new)

def test_the_whole_judgement_along_the_way():
    model, probe = taught(), full_probe()
    chosen, how = regions(model), recipe("grad_diff", lr=1e-2, epochs=3, full_every=2)
    found = together(model, chosen, how, [3, 4, 5], probe)
    for k, result in enumerate(found):
        close(result, alone(model, chosen[k], how, k + 3, probe=probe), 1e-9)
    assert any(
        r[0].points[-1]["MU"] != found[0][0].points[-1]["MU"] for r in found
    ), "three models, three judgements"

def test_runs_have_recipes_of_their_own():
    model = small()
    chosen = regions(model, 4)
    how = [
        recipe("ga", lr=1e-2, epochs=1),
        recipe("rmu", epochs=3),
        recipe("dpo", lr=2e-3),
        recipe("npo", retain="kl", every=2)]
    found = together(model, chosen, how, [9, 8, 7, 6])
    for k, result in enumerate(found): close(result, alone(model, chosen[k], how[k], 9 - k), 1e-10)
    assert [len(r[0].points) for r in found] == [2, 4, 3, 2]

@pytest.mark.parametrize("retain", RETAIN)
def test_the_weight_of_the_retain_term_is_each_runs_own(
    retain
): # the dual variable follows the run's own retain loss
    model = small()
    chosen = regions(model)
    how = [
        recipe(
            "pdu",
            retain=retain,
            epochs=3,
            alpha=1.,
            lr=lr,
            options=dict(warmup=0, eps=-1., step=1.))
        for lr in (1e-2, 3e-3, 1e-3)]
    found = together(model, chosen, how, [3, 4, 5])
    still = alone(model, chosen[0], recipe("pdu", retain=retain, epochs=3, alpha=1., lr=1e-2), 3)
    for k, result in enumerate(found): close(result, alone(model, chosen[k], how[k], k + 3), 1e-10)
    assert found[0][0].points[-1]["loss"] != pytest.approx(
        still[0].points[-1]["loss"], rel=1e-6), "the weight has changed"

def test_options_reach_the_twins():
    model = small()
    chosen = regions(model)
    how = [
        recipe("rmu", options=dict(layer=.5, coefficient=7.)),
        recipe("rmu(coefficient=7.)", options=dict(layer=.5)),
        recipe("rmu")]
    found = together(model, chosen[:1] * 3, how, [3, 3, 3])
    for k, result in enumerate(found): close(result, alone(model, chosen[0], how[k], 3), 1e-10)
    losses = [result[0].points[-1]["loss"] for result in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)

@pytest.fixture
def own_methods(): # the registers as they were are put back
    kept = {kind: dict(METHODS[kind]) for kind in ("objective", "retain")}
    yield
    for kind, known in kept.items():
        METHODS[kind].clear()
        METHODS[kind].update(known)

def test_methods_of_your_own(own_methods):
    @objective(label="Steered", sets=1)
    def steered(run, facts, rows, epoch, way:float=1.):
        "Call the model twice, once before the loss is formed"
        batch = run.batch(facts)
        with run.columns.reference(): start = run.model(input_ids=batch.ids).logits
        return Term(
            [], lambda: -(run.model(input_ids=batch.ids).logits - start - way).square().mean())
    @objective(label="Flipped", reference="once", sets=4)
    def flipped(run, facts):
        "Use answers, references and the number of the step"
        run.kept["step"] = run.kept.get("step", 0) + 1
        return Term(
            [facts, facts[:1]],
            lambda answers, first: (answers[0].sin() * answers[1]).sum() / run.kept["step"]
            + first[0].sum()
            + run.reference_logprob(facts).mean())
    @retain_term(label="Near")
    def near(run, facts, scale:float=30.):
        "Stay near the columns at the start"
        before = (
            [columns for _, columns in run.columns.values().values()]
            if "before" not in run.kept
            else run.kept["before"])
        run.kept["before"] = before
        def value():
            assert all(change.abs().max() < 1 for _, change in run.columns.delta().values())
            return scale * sum(
                (p - b).square().sum()
                for p, b in zip(run.columns.parameters(), before, strict=True))
        return Term([], value)
    model = small()
    chosen = regions(model, 4)
    how = [
        recipe("steered", retain="near", options={"way": 2.}),
        recipe("flipped", retain="none"),
        recipe("ga", retain="near"),
        recipe("npo", retain="near", alpha=.5)]
    assert [len(many_descents._check_recipes(model, GET, KEEP, [r], ())) for r in how] == [
        2 * 4, 3 * 4, 2 * 4, 2 * 4], "rows of a step"
    for k, result in enumerate(together(model, chosen, how, [3, 4, 5, 6])):
        close(result, alone(model, chosen[k], how[k], k + 3), 1e-10)

def test_a_term_of_columns_alone_leaves_other_runs_alone(
    own_methods
): # no loss reaches a layer through the model
    @objective(label="Shrink", retain="none")
    def shrink(run):
        "Shrink the columns of the first layer"
        return Term([], lambda: run.columns.parameters()[0].square().sum())
    model = small()
    # rmu reaches the first blocks only
    chosen = regions(model)
    how = [recipe("shrink"), recipe("rmu", retain="none"), recipe("shrink", lr=1e-2)]
    for k, result in enumerate(together(model, chosen, how, [3, 4, 5])):
        close(result, alone(model, chosen[k], how[k], k + 3), 1e-10)

def test_the_reference_is_computed_once_for_all(monkeypatch):
    model, asked = small(), []
    monkeypatch.setattr(
        many_descents,
        "_answers",
        lambda model, columns, asked_for, home, f=many_descents._answers: (
            asked.append({k: len(v) for k, v in asked_for.items()}),
            f(model, columns, asked_for, home))[1])
    together(model, regions(model), recipe(epochs=1, batch_size=5), [3, 4, 5])
    first = asked[0]
    assert len(first) == 1 and 5 <= sum(first.values()) <= 10, "one run asks for all"
    assert sum(len(a) == 1 for a in asked) <= 2 and sum(len(a) == 3 for a in asked) == 2

@EVERY
def test_runs_that_start_from_models_of_their_own(arch):
    model, how = small(arch), recipe("npo")
    targets = regions(model)
    injected = inject_many(model, targets, GET, 2, 1e-2, 4, [1, 2, 3], at_once=3)
    originals = [values for values, _ in injected]
    # its own, another, one that overlaps
    chosen = [targets[0], ~targets[1], Region.sample(region_shape(model), .2, 77)]
    assert chosen[2] & targets[2] and chosen[2] - targets[2]
    found = together(model, chosen, how, [3, 4, 5], originals=originals)
    for k, result in enumerate(found):
        close(result, alone(model, chosen[k], how, k + 3, originals[k]), 1e-10)
    one_by_one = together(model, chosen, how, [3, 4, 5], originals=originals, at_once=1)
    for a, b in zip(found, one_by_one): close(a, b, 1e-10)

def test_groups_of_runs_and_progress():
    model, how, told = small(), recipe("ga", epochs=1), []
    chosen = regions(model, 5)
    found = together(model, chosen, how, range(5), at_once=2, progress=told.append)
    for k, result in enumerate(found): close(result, alone(model, chosen[k], how, k), 1e-10)
    assert told == sorted(told) and told[-1] == 1 and len(told) == 3 * 3

def test_a_known_start_is_not_judged_again():
    model, how = small(), recipe("ga", epochs=1)
    start = evaluate(model, PROBE)._replace(point={"FS": .125, "RS": .25})
    for result in together(model, regions(model), how, [1, 2, 3], start=start):
        assert result[0].points[0]["FS"] == .125
    many_starts = [start._replace(point={"FS": k / 8, "RS": 0.}) for k in range(3)]
    assert [
        r[0].points[0]["FS"]
        for r in together(model, regions(model), how, [1, 2, 3], start=many_starts)
    ] == [0, .125, .25]

# --- injection

def test_injections_equal_each_alone():
    model = small()
    chosen, before = regions(model), weights(model)
    for more in ({}, {"beside": KEEP, "schedule": "linear"}):
        found = inject_many(
            model, chosen, GET, 2, [1e-2, 3e-3, 1e-3], 4, [1, 2, 3], at_once=3, **more)
        for k, (values, digest) in enumerate(found):
            want, proof = inject(
                copy.deepcopy(model), chosen[k], GET, 2, [1e-2, 3e-3, 1e-3][k], 4, k + 1, **more)
            values_close(values, want, 1e-10)
            assert digest == proof
    assert same(before, weights(model))

# --- divergence

@pytest.mark.parametrize("at_once", [1, 3])
def test_a_run_that_diverges_ends_alone(at_once):
    model, how = small(), [recipe("ga"), recipe("ga", lr=1e300), recipe("ga")]
    chosen, before = regions(model), weights(model)
    found = together(model, chosen, how, [3, 4, 5], at_once=at_once)
    assert isinstance(found[1], Diverged)
    assert "lr 1e+300" in str(found[1])
    assert same(before, weights(model))
    with pytest.raises(FloatingPointError) as error: alone(model, chosen[1], how[1], 4)
    assert str(found[1]) == str(error.value)
    for k in (0, 2): close(found[k], alone(model, chosen[k], how[k], k + 3), 1e-10)

def test_a_model_that_is_judged_as_diverged_ends_alone():
    # its only step is the last before it is judged
    model = small()
    how = [recipe("ga", batch_size=10, epochs=2), recipe("ga", batch_size=10, epochs=2, lr=1e300)]
    chosen = regions(model, 2)
    found = together(model, chosen, how, [3, 4])
    assert isinstance(found[1], Diverged) and "NaN or infinite" in str(found[1])
    close(found[0], alone(model, chosen[0], how[0], 3), 1e-10)

def test_injections_that_diverge_end_alone():
    model = small()
    found = inject_many(model, regions(model), GET, 2, [1e-2, 1e300, 1e-2], 4, [1, 2, 3], at_once=3)
    assert isinstance(found[1], Diverged)
    assert not isinstance(found[0], Diverged)
    assert not isinstance(found[2], Diverged)

# --- evaluation

def taught(arch="llama"):
    model = small(arch)
    training.finetune(model, GET + KEEP, 20, 1e-2, 8, seed=0)
    return model

@EVERY
def test_models_are_judged_as_one_by_one(arch):
    model, probe = taught(arch), full_probe()
    with unlock_many(model, regions(model)) as columns:
        with torch.no_grad():
            for i, p in enumerate(columns.parameters()):
                p += (
                    .3
                    * torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
                    * torch.tensor([0., 1., 2.])[:, None, None])
        scores = score_many(model, columns, GET + KEEP, max_tokens=200)
        found = evaluate_many(model, columns, probe)
        with columns.only([2, 0]): swapped = evaluate_many(model, columns, probe, full=False)
        values = [columns.values(k) for k in range(3)]
    for k in range(3):
        own = copy.deepcopy(model)
        put_columns(own, values[k])
        want, plain = evaluate(own, probe), score(own, GET + KEEP)
        assert found[k].point == pytest.approx(want.point, rel=1e-9, nan_ok=True)
        for name in want.facts:
            torch.testing.assert_close(
                found[k].facts[name], want.facts[name], rtol=1e-9, atol=1e-12, equal_nan=True)
        for name in ("extraction_strength", "exact_memorization", "known"):
            assert torch.equal(getattr(scores[k], name), getattr(plain, name))
        torch.testing.assert_close(scores[k].nll, plain.nll, rtol=1e-10, atol=1e-12)
    assert len({s.nll.sum().item() for s in scores}) == 3 and any(s.known.any() for s in scores)
    for got, k in zip(swapped, (2, 0)):
        assert got.point["FS"] == found[k].point["FS"] and "MU" not in got.point

def test_prompts_at_the_end_of_the_positions_are_decoded_run_by_run(monkeypatch):
    model, probe = taught(), full_probe()
    with unlock_many(model, regions(model)) as columns:
        want, calls = evaluate_many(model, columns, probe), []
        monkeypatch.setattr(many, "most_positions", lambda model: 30)
        monkeypatch.setattr(
            many,
            "_decode_alone",
            lambda *given, f=many._decode_alone: (calls.append(1), f(*given))[1])
        found = evaluate_many(model, columns, probe)
    assert calls and [e.point for e in found] == [pytest.approx(e.point, rel=1e-9) for e in want]

def test_a_judgement_that_calls_the_model_calls_the_runs_own(monkeypatch):
    def asking(probe, full, f=evaluation._sets_of):
        seen.append(now[-1](input_ids=collate(GET[:2]).ids).logits.square().mean().item())
        return f(probe, full)
    monkeypatch.setattr(evaluation, "_sets_of", asking)
    model, now, seen = taught(), [], []
    now.append(model)
    with unlock_many(model, regions(model)) as columns:
        with torch.no_grad():
            for p in columns.parameters(): p += torch.tensor([0., .1, .2])[:, None, None]
        evaluate_many(model, columns, PROBE)
        values = [columns.values(k) for k in range(3)]
    together, seen = seen, []
    for columns in values:
        now.append(copy.deepcopy(model))
        put_columns(now[-1], columns)
        evaluate(now[-1], PROBE)
    assert together == pytest.approx(seen, rel=1e-9) and len(set(seen)) == 3

# --- what an unlocked model does

def test_columns_are_trained_by_any_optimizer():
    model = small()
    before = weights(model)
    with unlock_many(model, regions(model)) as columns:
        optimizer = torch.optim.AdamW(columns.parameters(), lr=1e-2, weight_decay=.5)
        start = [columns.values(k) for k in range(3)]
        for _ in range(3):
            loss = model(input_ids=collate(GET[:2] * 3).ids).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        together = model(input_ids=collate(GET[:2] * 3).ids).logits.chunk(3)
        values = [columns.values(k) for k in range(3)]
    assert same(before, weights(model))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for k in range(3):
        own = copy.deepcopy(model)
        put_columns(own, values[k])
        torch.testing.assert_close(
            own(input_ids=collate(GET[:2]).ids).logits, together[k], rtol=1e-10, atol=1e-12)
        assert all(
            (values[k][layer][1] != start[k][layer][1]).any(1).all() for layer in values[k]
        ), "every column has moved"

def test_a_step_between_forward_and_backward_is_refused():
    model = small()
    with unlock_many(model, regions(model)) as columns:
        loss = model(input_ids=collate(GET[:3]).ids).logits.mean()
        with torch.no_grad(): columns.parameters()[0].add_(1)
        with pytest.raises(RuntimeError, match="the columns changed between forward and backward"):
            loss.backward()

def test_leaving_by_an_error_leaves_the_model_whole():
    model = small()
    before = weights(model)
    with pytest.raises(KeyError), unlock_many(model, regions(model)): raise KeyError
    assert same(before, weights(model))
    assert all("forward" not in vars(p) for p in output_projections(model))
    with unlock(model, regions(model)[0]), pytest.raises(ValueError, match="unlocked already"):
        with unlock_many(model, regions(model)): pass
    with unlock_many(model, regions(model)), pytest.raises(ValueError, match="unlocked already"):
        with unlock(model, regions(model)[0]): pass

def test_a_moved_weight_is_noticed(monkeypatch):
    digest = many_descents._digest
    def late(*what): # another thread may begin at any time
        time.sleep(.05)
        return digest(*what)
    monkeypatch.setattr(many_descents, "_digest", late)
    model = small()
    with pytest.raises(RuntimeError, match="the shared weights changed"), many_descents._held_many(
        model, regions(model), [{}] * 3):
        with torch.no_grad(): model.lm_head.weight[3, 3] += 1

# --- how many fit, and what is refused

def test_what_a_run_needs_grows_with_its_rows_and_columns():
    model = small(dtype=torch.float32)
    few, more = (
        bytes_of_a_run(model, Region.sample(region_shape(model), f, 0), GET[:n])
        for f, n in ((.1, 4), (.1, 8)))
    wide = bytes_of_a_run(model, Region.sample(region_shape(model), .5, 0), GET[:4])
    columns = 4 * 6 * 16 * int(.1 * 4 * 32)
    longest = max(GET[:4], key=lambda e: len(e.ids))
    assert few - columns == pytest.approx((more - columns) / 2, rel=.2)
    assert wide > few
    assert few - columns > 4 * len(longest.ids) * 4 * 4 * (16 + 3 * 32)

def test_too_little_memory_is_one_line():
    model = small()
    need = bytes_of_a_run(model, regions(model)[0], GET[:4])
    with pytest.raises(
        ValueError,
        match=r"3 runs at once do not fit into .* MiB that cpu has free, 2 do; give at_once=2",
    ) as error:
        runs_at_once(model, regions(model), GET[:4], 3, free=2.5 * need)
    assert "\n" not in str(error.value)
    assert runs_that_fit(model, regions(model), GET[:4], free=100 * need) == 3

def test_at_once_is_decided_by_memory_before_anything_is_trained(monkeypatch):
    model, how = small(), recipe("ga", epochs=1)
    need = bytes_of_a_run(model, regions(model)[0], GET[:4])
    monkeypatch.setattr(many_descents, "_free_bytes", lambda device: 2.5 * need)
    before = weights(model)
    with pytest.raises(ValueError, match="give at_once=2"):
        together(model, regions(model), how, [1, 2, 3])
    assert same(before, weights(model))

@pytest.mark.parametrize(
    "found, device, message",
    [
        (0, "cuda", "torch finds no CUDA device;"),
        (1, "cuda:1", "torch finds 1 CUDA device;"),
        (2, "cuda:5", "torch finds 2 CUDA devices;")])
def test_a_device_that_is_not_there(monkeypatch, found, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=message): many_descents.check_device(device)

def test_a_device_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    with pytest.raises(
        ValueError, match=r"cuda \(Old\) does not compute in bfloat16; load the model in float32"):
        many_descents.check_device("cuda")
    assert many_descents.check_device("cuda", torch.float32) == torch.device("cuda")
    assert many_descents.check_device("cpu") == torch.device("cpu")

def test_wrong_inputs():
    model, how = small(), recipe("ga")
    chosen = regions(model)
    def run(match, regions=chosen, recipes=how, seeds=(1, 2, 3), **more):
        with pytest.raises(ValueError, match=match):
            together(model, regions, recipes, seeds, **more)
    run(
        "region 1 is of 4 x 33 value vectors, the model has 4 x 32 value vectors",
        [chosen[0], Region.sample((4, 33), .2, 0), chosen[2]])
    run(
        "region 0 is .*train other units one at a time",
        [Region.sample((4, 16, 32), .2, 0), *chosen[1:]])
    run("region 2 is .*train other units one at a time", [*chosen[:2], Neurons(chosen[2])])
    run("region 1 is empty", [chosen[0], Region(torch.zeros(4, 32, dtype=torch.bool)), chosen[2]])
    run("there is no region to unlock", [], seeds=[])
    run("2 seeds for 3 regions", seeds=[1, 2])
    run("2 recipes for 3 regions", recipes=[how] * 2)
    run("2 original models for 3 regions", originals=[{}] * 2)
    run(r"batch sizes \[4, 5\]", recipes=[how, how, recipe("ga", batch_size=5)])
    run("at_once must be a whole number of at least 1, got 0", at_once=0)
    with pytest.raises(ValueError, match="unknown schedule 'x'"):
        inject_many(model, chosen, GET, 1, 1e-3, 4, [1, 2, 3], "x")
    with unlock_many(model, chosen), pytest.raises(
        ValueError, match="a pass of 4 rows cannot be shared out among 3 runs"):
        model(input_ids=collate(GET[:4]).ids)
