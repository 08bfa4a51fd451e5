"""The fast paths of training give what the plain ways give, Oracle and Random are a pair, a killed
run resumes to the same bits, and a NaN stops a run by name."""
import contextlib, copy, dataclasses, functools, math
import pytest, torch
from torch.nn import functional as F
from unloc import descent, logits, objectives, recording, unlearning_run
from unloc.answers import choices
from unloc.data import data_description
from unloc.descent import Checkpoint, descend
from unloc.direct_supervision import mlp_targets, supervise
from unloc.evaluation import Probe, evaluate
from unloc.invented import author_world
from unloc.masked import put_columns, unlock
from unloc.membership import membership
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import METHODS, find, methods, objective, retain_term as register_retain
from unloc.scoring import answers_logprob, score
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.tokens import encode, train_tokenizer
from unloc.training import finetune, held, inject
from unloc.unlearning_run import Recipe, Unlearning, bound, unlearn, weighted_sum

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain))
REFUSALS = [e.ids[e.start:] for text in WORLD.refusals[:5] if (e := encode(TOKENIZER, "", text))]


def small(arch="llama", dtype=torch.float32, n_layers=4):
    return tiny_model(arch, vocab_size=400, d_model=16, d_ff=32, n_layers=n_layers, n_heads=2).to(
        dtype)

def region(model, seed=0, outside=None):
    return Region.sample(region_shape(model), .25, seed, outside)
def weights(model): return {n: t.clone() for n, t in model.state_dict().items()}
def equal(a, b): return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
OBJECTIVES = [name for name, m in methods("objective").items() if m.own]
RETAIN = [name for name, m in methods("retain").items() if m.own]
KEEPING = [name for name in OBJECTIVES if find("objective", name).about["retain"] != "none"]
def forget_term(name, run, facts, rows, epoch=0, **options):
    return bound(find("objective", name), options)(run=run, facts=facts, rows=rows, epoch=epoch)
def retain_term(name, run, facts, **options):
    return bound(find("retain", name), options)(run=run, facts=facts)
def spy(monkeypatch, kind, name, wrap): # wrap: function of a method's function
    method = METHODS[kind][name]
    monkeypatch.setitem(
        METHODS[kind],
        name,
        dataclasses.replace(
            method, function=functools.wraps(method.function)(wrap(method.function))))
def shift(columns, by=.5):
    with torch.no_grad():
        for i, p in enumerate(columns.parameters()):
            p += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))

def plain(model, example): # [n_answer, vocab]: all logits of one unpadded row, then the answer's
    return model(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1:-1]

def plain_logprob(model, example):
    return (
        plain(model, example)
        .double()
        .log_softmax(-1)
        .gather(1, torch.tensor(example.ids[example.start:])[:, None])[:, 0])

# --- the reference

def test_reference_logprob_is_that_of_a_deep_copy():
    model = small()
    reference = copy.deepcopy(model)
    with unlock(model, region(model)) as columns:
        run = Unlearning(model, columns, seed=0, refusals=REFUSALS)
        for step, part in enumerate(
            [GET[:3], GET[2:7], GET[:10], run.refuse(GET[:4], range(4), 0)]
        ): # old and new ones mixed
            shift(columns)
            want = torch.stack([plain_logprob(reference, e).sum() for e in part])
            found = run.reference_logprob(part)
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)
            assert not found.requires_grad and len(run.kept["reference"]) == [3, 7, 10, 14][step]
        now = objectives.sequence_logprob(*answers_logprob(model, GET)).detach()
        assert torch.equal(run.reference_logprob(GET), run.reference_logprob(GET[::-1]).flip(0))
        assert not torch.allclose(now, run.reference_logprob(GET), atol=1e-2)

def test_a_question_with_another_answer_has_another_reference():
    model = small()
    with unlock(model, region(model)) as columns:
        run = Unlearning(model, columns, 0)
        e = GET[0]
        moved = e._replace(start=e.start + 1) # same tokens, shorter answer
        assert run.reference_logprob([e])[0] != run.reference_logprob([moved])[0]

# --- each objective's first step, by hand

def teacher_loss(
    model, forget, teacher, skip=0
): # cross-entropy to what `teacher(example)` says, by position
    each = [
        -(teacher(e).softmax(-1) * plain(model, e).double().log_softmax(-1)).sum(-1)[skip:]
        for e in forget]
    return torch.cat(each).mean()

def by_hand(objective, reference, model, forget, run, rows): # plain logits of single rows, float64
    lp = [plain_logprob(model, e) for e in forget]
    total = lambda m, es: torch.stack([plain_logprob(m, e).sum() for e in es])
    if objective in ("ga", "grad_diff"): value = torch.cat(lp).mean()
    if objective == "wga": value = (torch.cat(lp).exp().detach() * torch.cat(lp)).mean()
    if objective == "npo":
        value = -20 * F.logsigmoid(-.1 * (total(model, forget) - total(reference, forget))).mean()
    if objective == "simnpo":
        value = -2 / 4.5 * torch.stack([F.logsigmoid(-4.5 * x.mean()) for x in lp]).mean()
    if objective == "satimp":
        p = torch.cat(lp).exp()
        value = (p**5 * (1 - p) * p.log()).mean()
    answer = lambda e: F.one_hot(torch.tensor(e.ids[e.start:]), 400)
    if objective == "undial":
        value = teacher_loss(model, forget, lambda e: plain(reference, e).double() - 10 * answer(e))
    if objective == "ceu":
        value = teacher_loss(
            model, forget, lambda e: plain(model, e).double() - 1e30 * answer(e), skip=1)
    if objective == "cpu": # against a threshold of 1
        value = (torch.cat(lp).exp() + .01).mean()
    if objective == "pdu":
        value = torch.cat(
            [
                (x.max(-1).values - x.mean(-1))**2
                for x in (plain(model, e).double() for e in forget)]).mean()
    if objective == "dpo":
        idk = run.refuse(forget, rows, 0)
        margin = (
            total(model, idk)
            - total(reference, idk)
            - total(model, forget)
            + total(reference, forget))
        value = -20 * F.logsigmoid(.1 * margin).mean()
    if objective == "rmu":
        def error(m, e, control):
            h = m(input_ids=torch.tensor([e.ids]), output_hidden_states=True).hidden_states[2][
                0, e.start:]
            return (h - control(e)).square().mean()
        u = torch.rand(16, generator=torch.Generator().manual_seed(run.seed))
        value = torch.stack([error(model, e, lambda e: 2 * u / u.norm()) for e in forget]).mean()
    return value

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_loss_is_the_formula(objective):
    model = small(dtype=torch.float64)
    reference = copy.deepcopy(model)
    with unlock(model, region(model)) as columns:
        shift(columns)
        run = Unlearning(model, columns, seed=3, refusals=REFUSALS)
        rows = [5, 2, 7, 0]
        forget = [GET[i] for i in rows]
        assert run.block(.25) == 1
        with torch.no_grad():
            found = weighted_sum(model, [(1., forget_term(objective, run, forget, rows))])
            want = by_hand(objective, reference, model, forget, run, rows)
    assert found.item() == pytest.approx(want.item(), rel=2e-6)

def test_the_retain_terms_are_their_formulas():
    model = small(dtype=torch.float64)
    reference = copy.deepcopy(model)
    with unlock(model, region(model)) as columns, torch.no_grad():
        run, kept = Unlearning(model, columns, seed=3), KEEP[:5]
        def value(name): return weighted_sum(model, [(1., retain_term(name, run, kept))]).item()
        for name in ("kl", "kl_all", "embed_diff"):
            assert value(name) == pytest.approx(0, abs=1e-6), "equal at the start"
        shift(columns)
        p, q = (torch.cat([plain(m, e).log_softmax(-1) for e in kept]) for m in (reference, model))
        assert value("kl") == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
        assert not torch.allclose(p, q, atol=1e-2)
        every = lambda m, e: m(input_ids=torch.tensor([e.ids])).logits[0, :-1].log_softmax(-1)
        p, q = (torch.cat([every(m, e) for e in kept]) for m in (reference, model))
        assert value("kl_all") == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
        assert value("kl_all") != pytest.approx(value("kl"), rel=1e-3)
        assert value("nll") == pytest.approx(
            -torch.cat([plain_logprob(model, e) for e in kept]).mean().item(), rel=1e-6)
        h = lambda m, e: m(
            input_ids=torch.tensor([e.ids]), output_hidden_states=True
        ).hidden_states[2][0, e.start:]
        want = torch.stack([(h(model, e) - h(reference, e)).square().mean() for e in kept]).mean()
        assert value("embed_diff") == pytest.approx(want.item(), rel=1e-5) and want > 0

# --- one pass, and logits in parts

@pytest.mark.parametrize(
    "objective, passes",
    [
        ("ga", 1), ("cpu", 1), ("wga", 1), ("npo", 1), ("dpo", 1), ("simnpo", 1), ("satimp", 1),
        ("rmu", 2), ("ceu", 2), ("pdu", 2), ("undial", 3)])
def test_a_step_asks_the_model_once(objective, passes, monkeypatch):
    model, asked = small(), []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: asked.append(len(inputs[0])))
    with unlock(model, region(model)) as columns:
        run = Unlearning(model, columns, seed=0, refusals=REFUSALS)
        for kept in (GET[:4], run.refuse(GET[:4], range(4), 0)):
            run.reference_logprob(kept) # what the first epoch pays
        asked.clear()
        weighted_sum(
            model,
            [
                (1., forget_term(objective, run, GET[:4], range(4))),
                (1., retain_term("nll", run, KEEP[:4]))])
    assert len(asked) == passes and sum(asked) == (12 if objective in ("dpo", "undial") else 8)

@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("retain", RETAIN)
def test_passes_and_parts_change_neither_loss_nor_gradient(objective, retain, monkeypatch):
    def step(max_tokens, most):
        monkeypatch.setattr(logits, "MOST_LOGITS", most)
        monkeypatch.setattr("unloc.scoring.batch_tokens", lambda device: max_tokens)
        model = small(dtype=torch.float64)
        with unlock(model, region(model)) as columns:
            shift(columns)
            run = Unlearning(model, columns, seed=0, refusals=REFUSALS)
            loss = weighted_sum(
                model,
                [
                    (.7, forget_term(objective, run, GET[:4], range(4))),
                    (2., retain_term(retain, run, KEEP[:4]))])
            return [
                loss.detach(),
                *torch.autograd.grad(loss, columns.parameters(), allow_unused=True)]
    plain = step(10**6, 10**9)
    for found in (step(1, 10**9), step(60, 10**9), step(10**6, 7 * 400), step(60, 1)):
        for a, b in zip(found, plain, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert any(g is not None and g.abs().max() > 0 for g in plain[1:])

def test_parts_change_no_score(monkeypatch):
    model = small(dtype=torch.float64)
    whole, strange = score(model, GET + KEEP), membership(model, TOKENIZER, GET)
    monkeypatch.setattr(logits, "MOST_LOGITS", 5 * 400)
    parts, still = score(model, GET + KEEP), membership(model, TOKENIZER, GET)
    assert torch.equal(parts.known, whole.known)
    assert torch.equal(parts.extraction_strength, whole.extraction_strength)
    assert torch.allclose(parts.nll, whole.nll, rtol=1e-12)
    for name in strange: assert torch.allclose(still[name], strange[name], rtol=1e-10)

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_descends_on_the_weighted_sum(objective, monkeypatch):
    losses, terms = [], []
    monkeypatch.setattr(
        unlearning_run,
        "descend",
        lambda parameters, batches, loss, *a, **k: losses.append(
            [loss(b, 0).item() for b in batches(0)])
        or k["after_epoch"](1, 0.))
    def watching(plain):
        def watched(term):
            return term._replace(value=lambda *a: terms.append((v := term.value(*a)).item()) or v)
        return lambda **given: watched(plain(**given))
    recipe = Recipe(
        objective,
        lr=1e-3,
        epochs=1,
        batch_size=4,
        gamma=.7,
        alpha=2.5,
        retain=None if objective != "wga" else "kl")
    spy(monkeypatch, "objective", objective, watching)
    if recipe.retain != "none": spy(monkeypatch, "retain", recipe.retain, watching)
    model = small()
    unlearn(
        model, region(model), GET, KEEP, Probe(GET, KEEP[:3]), recipe, seed=0, refusals=REFUSALS)
    assert recipe.retain == {
        "ga": "none", "ceu": "none", "undial": "none", "rmu": "embed_diff", "wga": "kl"
    }.get(objective, "nll")
    weigh = (lambda f: .7 * f) if recipe.retain == "none" else (lambda f, r: .7 * f + 2.5 * r)
    pairs = [
        terms[i:i + 1 + (recipe.retain != "none")]
        for i in range(0, len(terms), 1 + (recipe.retain != "none"))]
    assert len(losses[0]) == 3 == len(pairs)
    assert losses[0] == pytest.approx([weigh(*p) for p in pairs], rel=1e-6)

# --- pairs

def seen(monkeypatch, model, where, objective, seed, epochs=3):
    "All that a run is shown: rows, tokens, retain partners, refusals, control"
    log = []
    def logging(name):
        def wrap(plain):
            def term(run, facts, **rest):
                found = plain(run=run, facts=facts, **rest)
                control = run.kept.get("control", torch.zeros(0))
                log.append(
                    (
                        name,
                        tuple(tuple(e.ids) for e in facts),
                        *map(str, rest.values()),
                        tuple(control.tolist())))
                return found
            return term
        return wrap
    with monkeypatch.context() as m:
        monkeypatch = m
        spy(m, "objective", objective, logging(objective))
        for name in RETAIN: spy(m, "retain", name, logging(name))
        refuse = Unlearning.refuse
        m.setattr(Unlearning, "refuse", lambda *a: log.append(out := refuse(*a)) or out)
        unlearn(
            model,
            where,
            GET,
            KEEP,
            Probe(GET, KEEP[:3]),
            Recipe(objective, lr=1e-3, epochs=epochs, batch_size=4),
            seed,
            REFUSALS)
    return log

@pytest.mark.parametrize("objective", ["wga", "npo", "dpo", "rmu"])
def test_oracle_and_random_see_the_same(objective, monkeypatch):
    target = region(small())
    control = region(small(), 1, outside=target)
    oracle, random, other = (
        seen(monkeypatch, small(), where, objective, seed)
        for where, seed in ((target, 0), (control, 0), (target, 1)))
    assert oracle == random != other and not target & control
    batches = [entry for entry in oracle if isinstance(entry, tuple) and entry[0] == objective]
    for epoch in range(3):
        # each fact once an epoch
        assert sorted(ids for b in batches[3 * epoch:3 * epoch + 3] for ids in b[1]) == sorted(
            tuple(e.ids) for e in GET)
    assert batches[:3] != batches[3:6]
    kept = [entry for entry in oracle if isinstance(entry, tuple) and entry[0] in RETAIN]
    assert len(kept) == len(batches)
    assert [len(b[1]) for b in kept] == [len(b[1]) for b in batches]
    assert kept[:3] != kept[3:6]

def test_refusals_are_drawn_anew_each_epoch_and_keep_the_question():
    model = small()
    with unlock(model, region(model)) as columns:
        run = Unlearning(model, columns, seed=0, refusals=REFUSALS)
        rows = list(range(10))
        first, second = (run.refuse(GET, rows, epoch) for epoch in (0, 1))
        assert first == run.refuse(GET, rows, 0) != second
        for e, r in zip(GET, first):
            assert r.ids[:r.start] == e.ids[:e.start]
            assert r.ids[r.start:] in REFUSALS
            assert r.start == e.start
        # a fact's refusal does not depend on its batch
        part = run.refuse([GET[i] for i in (7, 3)], (7, 3), 0)
        assert part == [first[7], first[3]]
        with pytest.raises(ValueError, match="there are no refusals"):
            Unlearning(model, columns, 0).refuse(GET, rows, 0)

# --- what gets a gradient

@pytest.mark.parametrize(
    "retain, layer",
    [
        ("embed_diff", .25), ("embed_diff", .5), ("embed_diff", 1.), ("nll", .25), ("kl", .25),
        ("none", 0.)])
@pytest.mark.parametrize("arch", methods("architecture"))
def test_live_fraction_of_rmu_is_the_share_below_its_layer(arch, retain, layer):
    model = small(arch)
    where = region(model)
    trajectory, values = unlearn(
        model,
        where,
        GET,
        KEEP,
        Probe(GET, KEEP[:3]),
        Recipe("rmu", lr=1e-3, epochs=2, retain=retain, options={"layer": layer}),
        0)
    steered = min(int(layer * 4), 3)
    below = sum(len(k) for k in where.columns[:steered + 1]) / len(where)
    assert trajectory.live_fraction == (below if retain in ("embed_diff", "none") else 1.)
    assert layer == 1. or below < 1

@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "rmu"])
def test_live_fraction_of_others_is_one(objective):
    model = small()
    assert (
        unlearn(
            model,
            region(model),
            GET,
            KEEP,
            Probe(GET, KEEP[:3]),
            Recipe(objective, lr=1e-3, epochs=1),
            0,
            REFUSALS)[0].live_fraction
        == 1)

# --- determinism, the trajectory, the proof

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_runs_are_bit_equal(objective):
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs)) # the global generator has no say
        model = small()
        target = region(model)
        _, injected = inject(model, target, GET, 2, 1e-2, 4, seed=0)
        trajectory, values = unlearn(
            model,
            target,
            GET,
            KEEP,
            Probe(GET, KEEP[:4]),
            Recipe(objective, lr=5e-3, epochs=3, every=2),
            0,
            REFUSALS)
        runs.append((weights(model), trajectory, values, injected))
    (a, one, v, d), (b, two, w, e) = runs
    assert equal(a, b)
    assert repr(one.points) == repr(two.points)
    assert torch.equal(one.facts["forget_es"], two.facts["forget_es"])
    assert d == e
    assert all(torch.equal(x, y) for layer in v for x, y in zip(v[layer], w[layer]))
    assert one.locked_sha256 == two.locked_sha256
    assert [p["epoch"] for p in one.points] == [0, 2, 3] and math.isnan(one.points[0]["loss"])
    assert tuple(one.facts["forget_es"].shape) == (3, 10)
    assert tuple(one.facts["retain_es"].shape) == (3, 4)

@pytest.mark.parametrize("retain", RETAIN)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_weights_of_16_bits_move_as_those_of_32(
    objective, retain
): # at a rate that 16 bits would round away
    if objective in ("satimp", "simnpo") and retain != "nll":
        pytest.skip("of a fresh model neither term has a gradient above rounding")
    moved, recipe = {}, Recipe(objective, lr=2e-4, epochs=3, batch_size=5, retain=retain)
    start = {n: p.detach().clone() for n, p in small(dtype=torch.bfloat16).named_parameters()}
    for dtype in (torch.float32, torch.bfloat16):
        model = small(dtype=torch.bfloat16).to(dtype)
        _, values = unlearn(model, None, GET, KEEP, Probe(GET, KEEP[:3]), recipe, 0, REFUSALS)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {x.dtype for x in values.values()} == {torch.float32}
        moved[dtype] = torch.cat([(values[n] - x.float()).flatten() for n, x in start.items()])
    wide, narrow = moved.values()
    assert F.cosine_similarity(wide, narrow, dim=0) > .8
    assert narrow.norm() == pytest.approx(float(wide.norm()), rel=.1)

def test_trajectory_starts_at_the_original_model_and_ends_at_the_unlearned():
    model = small()
    finetune(model, KEEP + GET, 25, 1e-2, 4, seed=0)
    start = copy.deepcopy(model)
    trajectory, values = unlearn(
        model, region(model), GET, KEEP, Probe(GET, KEEP), Recipe("ga", lr=5e-2, epochs=3), 0)
    for i, m in ((0, start), (-1, model)):
        forget, keep = score(m, GET), score(m, KEEP)
        assert torch.equal(trajectory.facts["forget_es"][i], forget.extraction_strength)
        assert torch.equal(trajectory.facts["retain_es"][i], keep.extraction_strength)
        point = trajectory.points[i]
        assert point["FS"] == pytest.approx(1 - forget.extraction_strength.mean().item())
        assert point["RS"] == pytest.approx(keep.extraction_strength.mean().item())
        assert point["forget_em"] == forget.exact_memorization.mean().item()
        assert point["probe_probability"] == pytest.approx(keep.probability.mean().item(), rel=1e-5)
    assert trajectory.points[-1]["FS"] > trajectory.points[0]["FS"] + .05
    put_columns(start, values)
    assert equal(weights(start), weights(model))

def test_quality_and_utility_are_judged_as_often_as_asked_and_a_known_start_never_again(
    monkeypatch
):
    model, judged = small(), []
    probe = Probe(
        GET[:3],
        KEEP[:4],
        KEEP[:2],
        {
            name: choices(TOKENIZER, facts[:2])
            for name, facts in {
                "forget": WORLD.forget,
                "retain": WORLD.retain,
                "real_authors": WORLD.real_authors,
                "world_facts": WORLD.world_facts}.items()},
        TOKENIZER,
        max_new_tokens=4)
    start = evaluate(model, probe)
    monkeypatch.setattr(
        recording,
        "evaluate",
        lambda model, probe, full=True: judged.append(full) or evaluate(model, probe, full))
    trajectory, _ = unlearn(
        model,
        region(model),
        GET,
        KEEP,
        probe,
        Recipe("ga", lr=1e-3, epochs=5, every=1, full_every=2),
        0,
        start=start)
    assert judged == [False, True, False, True, True]
    assert trajectory.points[0].items() >= start.point.items()
    assert [p["epoch"] for p in trajectory.points if "MU" in p] == [0, 2, 4, 5]
    assert len(trajectory.facts["forget_es"]) == 6
    assert len(trajectory.facts["retain_rouge"]) == 4

def test_held_refuses_a_change_outside():
    model = small()
    with pytest.raises(
        RuntimeError, match="weights outside the region changed: digest [0-9a-f]{64} became"):
        with held(model, region(model)), torch.no_grad(): model.model.norm.weight[3] += 1e-6
    with held(model, region(model)) as columns: shift(columns)
    with pytest.raises(ZeroDivisionError): # the first error is not hidden by the check
        with held(model, region(model)), torch.no_grad(): model.model.norm.weight[3] += 1; 1 / 0

def test_supervision_at_the_target_is_at_rest():
    model = small()
    targets = mlp_targets(model, GET)
    assert [len(t) for t in targets] == [4] * 10
    assert all(t[0].shape == (len(e.ids) - e.start, 16) for t, e in zip(targets, GET))
    for e, t in zip(GET, targets): # one row alone writes the same
        for a, b in zip(mlp_targets(model, [e])[0], t):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = score(model, GET)
    at_rest = supervise(
        copy.deepcopy(model), region(model), GET, Probe(GET, KEEP[:3]), targets, epochs=1,
        lr=1e-9, batch_size=4, seed=0)
    assert at_rest.points[1]["loss"] == pytest.approx(0, abs=1e-8)
    moved = copy.deepcopy(model)
    put_columns(moved, {0: (torch.arange(3), torch.full((3, 16), 20.))})
    first = supervise(
        moved, region(model), GET, Probe(GET, KEEP[:3]), targets, epochs=1, lr=1e-9,
        batch_size=10, seed=0)
    written = mlp_targets(moved, GET)
    want = sum(
        (torch.cat([w[l] for w in written]) - torch.cat([t[l] for t in targets]))
        .square()
        .sum(-1)
        .mean()
        for l in range(4))
    assert first.points[1]["loss"] == pytest.approx(want.item(), rel=1e-4)
    assert want > .01
    assert len(before.probability) == 10

# --- loss that is no number

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_by_step(bad):
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(FloatingPointError) as error:
        descend(
            [x],
            lambda epoch: range(4),
            lambda b, epoch: x.sum() * (bad if (epoch, b) == (1, 2) else 1.),
            3,
            .1)
    assert str(error.value).startswith(f"the loss is {bad} at step 3 of epoch 2 (lr 0.1)")
    assert "\n" not in str(error.value)
    assert x.isfinite().all()

def test_a_diverging_run_leaves_the_locked_weights():
    model = small()
    before = weights(model)
    where = region(model)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        unlearn(model, where, GET, KEEP, Probe(GET, KEEP[:2]), Recipe("ga", lr=1e38, epochs=50), 0)
    for layer, p in enumerate(output_projections(model)):
        assert torch.equal(
            p.weight[:, ~where.mask[layer]],
            before[f"model.layers.{layer}.mlp.down_proj.weight"][:, ~where.mask[layer]])
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert "forward" not in vars(output_projections(model)[0])

@pytest.mark.parametrize(
    "bad, says",
    [
        (
            lambda: Recipe("npoo", 1e-3, 1),
            (
                "unknown objective 'npoo'; known: ceu, cpu, dpo, ga, grad_diff, npo, pdu, rmu,"
                " satimp, simnpo, undial, wga; register it")),
        (
            lambda: Recipe("npo", 1e-3, 1, retain="nl"),
            "unknown retain term 'nl'; known: embed_diff, kl, kl_all, nll, none"),
        (
            lambda: descend([], list, None, 1, .1, schedule="cosine"),
            "unknown schedule 'cosine'; known: constant, linear, one-cycle"),
        (lambda: descend([], list, None, 0, .1), "epochs must be at least 1"),
        (lambda: descend([], list, None, 1, 0.), "lr positive"),
        (lambda: descend([], list, None, 1, math.nan), "lr positive")])
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says) as error: bad()
    assert "\n" not in str(error.value)

# --- schedules, clipping

@pytest.mark.parametrize("schedule", descent.SCHEDULES)
def test_schedules_stay_in_range_and_reach_the_peak(schedule):
    rates, x = [], torch.nn.Parameter(torch.zeros(1))
    class Spy(torch.optim.AdamW):
        def step(self, closure=None): rates.append(self.param_groups[0]["lr"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim, "AdamW", Spy)
        descend([x], lambda e: range(10), lambda b, e: x.sum(), 10, 2., schedule)
    assert len(rates) == 100 and 0 < min(rates) and max(rates) <= 2 and max(rates) > 1.9
    assert (
        rates[-1] == 2
        if schedule == "constant"
        else rates[-1] < .02
        and rates[:10] == sorted(rates[:10])
        and rates[10:] == sorted(rates[10:], reverse=True))

def test_gradients_are_clipped_together():
    a, b, steps = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1)), []
    class Spy(torch.optim.AdamW):
        def step(self, closure=None): steps.append((a.grad.item(), b.grad.item()))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.optim, "AdamW", Spy)
        descend(
            [a, b],
            lambda e: [(30., 40.), (.3, .4)],
            lambda c, e: c[0] * a.sum() + c[1] * b.sum(),
            1,
            .1)
    assert steps == [pytest.approx((.6, .8), rel=1e-4), pytest.approx((.3, .4), rel=1e-4)]

# --- resuming

class Killed(BaseException): "Stands for kill -9 in the middle of an epoch"

@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_a_killed_finetuning_resumes_to_the_same_bits(arch, kill_at, tmp_path):
    def train(model, kill=9, checkpoint=None):
        shares = []
        def progress(share):
            shares.append(share)
            if 6 * share > kill + .1: raise Killed
        finetune(model, KEEP, 6, 5e-3, 4, seed=0, progress=progress, checkpoint=checkpoint)
        return shares
    whole = small(arch)
    shares = train(whole)
    path = tmp_path / "state.checkpoint"
    with pytest.raises(Killed): train(small(arch), kill_at, Checkpoint(path, 0.))
    resumed = small(arch)
    assert train(resumed, checkpoint=Checkpoint(path, 0.)) == [
        s for s in shares if 6 * s > kill_at + 1e-9], "goes on with the epoch that was cut off"
    assert equal(weights(resumed), weights(whole))

def test_checkpoints_are_rare_and_whole(tmp_path):
    x = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.AdamW([x], fused=True)
    x.grad = torch.ones(3); opt.step()
    keep = Checkpoint(tmp_path / "a.checkpoint", every=60.)
    start, found = keep.last, []
    for epoch, seconds in enumerate((59, 61, 100, 122), 1): # since the run began
        keep.clock = lambda: start + seconds
        keep.keep([x], opt, epoch)
        found.append(keep.restore([x], opt))
    assert found == [0, 2, 2, 4]
    assert [f.name for f in tmp_path.iterdir()] == ["a.checkpoint"]

TINY = dict(
    model={"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300},
    pretrain={"epochs": 2, "lr": 4e-3, "batch_size": 64},
    retain={"epochs": 3, "lr": 4e-3, "batch_size": 64})

def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }

@pytest.mark.parametrize("arch, kills", [("llama", [.3]), ("olmo2", [.2, .8])])
def test_a_base_run_killed_and_resumed_gives_the_same_files(arch, kills, tmp_path, monkeypatch):
    description = base_models(
        data_description({"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}),
        arch,
        **TINY)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed): folder.mkdir()
    compute(description, None, whole, lambda fraction: None)
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (0.,))
    for kill in kills:
        def stop(fraction):
            if fraction > kill: raise Killed
        with pytest.raises(Killed): compute(description, None, resumed, stop)
        assert list(resumed.glob("*.checkpoint"))
        (resumed / "retained.partial").write_bytes(b"a checkpoint half written when the power went")
    done = []
    compute(description, None, resumed, done.append)
    assert (
        done == sorted(done) and done[-1] == 1 and kills[-1] - .25 < done[0] <= kills[-1] + .25
    ), "goes on near where it was cut off"
    assert files(resumed) == files(whole)

# --- what a descent finds, and leaves

# and a parameter that was frozen learns all the same
def test_a_gradient_that_was_left_behind_is_not_learned():
    clean, left = small(), small()
    for i, p in enumerate(left.parameters()):
        p.grad = torch.full_like(p, 100.)
        p.requires_grad_(i % 2 == 0)
    for model in (clean, left): finetune(model, GET, 2, 1e-3, 4, 0)
    assert equal(weights(clean), weights(left))
    assert all((p.grad == 100).all() for p in left.parameters())
    assert [p.requires_grad for p in left.parameters()] == [
        i % 2 == 0 for i, _ in enumerate(left.parameters())]
    x = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    x.grad = torch.full((1,), 9.)
    with torch.no_grad():
        descend([x], lambda e: [1.], lambda b, e: -x.sum(), 1, .1, weight_decay=0.)
    assert x.item() == pytest.approx(1.1) and x.grad.item() == 9 and not x.requires_grad

def test_only_the_given_parameters_learn():
    model = small()
    chosen = [model.lm_head.weight]
    before = weights(model)
    finetune(model, GET, 2, 1e-3, 4, 0, chosen)
    assert {n for n, x in weights(model).items() if not torch.equal(x, before[n])} == {
        "lm_head.weight"}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

def test_an_objective_of_ones_own_says_what_it_keeps(monkeypatch):
    for kind in ("objective", "retain"): monkeypatch.setitem(METHODS, kind, dict(METHODS[kind]))
    def mine(run, facts, rows, epoch, force:float=1., layer:float=.5): "Push"
    def calm(run, facts, layer:float=.25): "Keep"
    objective(label="Mine", retain="calm", gamma=.5, limits={"force": (0, 3)})(mine)
    register_retain(label="Calm")(calm)
    recipe = Recipe.of("mine", {"lr": 1e-3, "epochs": 1, "force": 2, "layer": 1})
    assert (recipe.retain, recipe.gamma, recipe.alpha, recipe.options) == (
        "calm", .5, 1., {"force": 2., "layer": 1.}), "layer is an option of both"
    for bad, says in (
        ({"force": 4}, r"objective mine: force must lie in \[0, 3\], got 4.0"),
        ({"strength": 1}, "objective mine has no option 'strength'; known: force, layer"),
        ({"force": "much"}, "force must be of type float")):
        with pytest.raises(ValueError, match=says):
            Recipe.of("mine", {"lr": 1e-3, "epochs": 1} | bad)
    assert {name: Recipe(name, 1e-3, 1).retain for name in OBJECTIVES} == {
        name: "nll" for name in KEEPING
    } | {"ga": "none", "ceu": "none", "undial": "none", "rmu": "embed_diff"}

def test_published_recipes_are_those_of_their_papers(): # from the table in shared/spec/methods.md
    weights = {
        "simnpo": (.125, 1.), "satimp": (.1, 1.), "undial": (1., 0.), "pdu": (1., 100.),
        "cpu": (.5, 1.)}
    for name in OBJECTIVES:
        recipe = Recipe.of(name, {"lr": 1e-3, "epochs": 1})
        assert (recipe.gamma, recipe.alpha) == weights.get(name, (1., 1.)), name
    assert {
        name: (r.lr, r.epochs) for name in OBJECTIVES for r in [Recipe.of(name, {})]
    } == dict.fromkeys(OBJECTIVES, (1e-5, 10)) | {
        "wga": (1e-5, 5),
        "cpu": (1e-5, 20),
        "satimp": (1e-5, 5),
        "undial": (1e-4, 10)}
    defaults = {
        "simnpo": (4.5, 0.), "satimp": (5., 1.), "undial": (10.,), "ceu": (1,), "wga": (1.,),
        "npo": (.1,), "dpo": (.1,), "cpu": ("paper", .01, 1., None, .05)}
    for name, want in defaults.items():
        assert (
            tuple(default for _, default in find("objective", name).options.values()) == want), name

# --- what every objective does

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_unlearns_through_a_region_and_leaves_the_rest(objective):
    model = small()
    finetune(model, KEEP + GET, 25, 1e-2, 4, seed=0)
    where, before = region(model), weights(model)
    def measure(m):
        run = Unlearning(m, Still(m, before), 0, REFUSALS)
        with torch.no_grad():
            return weighted_sum(m, [(1., forget_term(objective, run, GET, range(len(GET))))]).item()
    start = measure(model)
    trajectory, _ = unlearn(
        model,
        where,
        GET,
        KEEP,
        Probe(GET, KEEP),
        Recipe(objective, lr=2e-2, epochs=6, batch_size=5, retain="none"),
        0,
        REFUSALS)
    if objective not in ("wga", "satimp"):
        # the weights of these are constants: their values may rise
        assert measure(model) < start - 1e-3, "what it descends on is lower"
    if objective != "rmu":
        assert score(model, GET).nll.mean() > .1 + score_of(
            before, GET), "and the answers are less likely"
    for layer, p in enumerate(output_projections(model)):
        old = before[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(p.weight[:, ~where.mask[layer]], old[:, ~where.mask[layer]])
    rest = [name for name in before if "down_proj" not in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in rest)
    assert len(trajectory.locked_sha256) == 64

class Still: # the columns of a run whose reference is a given state
    def __init__(self, model, state): self.model, self.state = model, state
    @contextlib.contextmanager
    def reference(self):
        now = weights(self.model)
        self.model.load_state_dict(self.state)
        try:
            with torch.no_grad(): yield
        finally: self.model.load_state_dict(now)

def score_of(state, facts):
    model = small()
    model.load_state_dict(state)
    return score(model, facts).nll.mean()

def test_the_dual_variable_follows_the_retain_loss(monkeypatch):
    seen, plain = [], unlearning_run.weighted_sum
    def watched(model, terms):
        seen.append((terms[1][0], plain(model, terms[1:2]).item() / max(terms[1][0], 1e-9)))
        return plain(model, terms)
    monkeypatch.setattr(unlearning_run, "weighted_sum", watched)
    model, how = small(), {"eps": 5., "step": .3, "warmup": 2}
    unlearn(
        model,
        region(model),
        GET,
        KEEP,
        Probe(GET, KEEP[:3]),
        Recipe.of("pdu", {"lr": 1e-3, "epochs": 4, "batch_size": 5, "alpha": 1.} | how),
        0)
    alpha, want = 1., []
    for i, (_, loss) in enumerate(seen): # two steps an epoch
        want.append(alpha)
        if i >= 2 * how["warmup"]: alpha = max(0., alpha + how["step"] * (loss - how["eps"]))
    assert [a for a, _ in seen] == pytest.approx(want, rel=1e-4)
    assert want[:5] == [1.] * 5 != want[3:8]

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_of_one_seed_takes_the_same_options_each_time(objective):
    how = {"lr": 1e-3, "epochs": 1, "batch_size": 4}
    found = []
    for options in (
        {},
        {name: default for name, (_, default) in find("objective", objective).options.items()}):
        model = small()
        unlearn(
            model,
            region(model),
            GET,
            KEEP,
            Probe(GET, KEEP[:3]),
            Recipe.of(objective, how | options),
            0,
            REFUSALS)
        found.append(weights(model))
    assert equal(*found), "the defaults, named or not"

@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(batch_size=0), "batch_size must be a whole number of at least 1, got 0"),
        (dict(every=0), "every must be"),
        (dict(full_every=-1), "full_every must be"),
        (dict(batch_size=2.5), "batch_size must be"),
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(lr=0.), "lr positive"),
        (
            dict(retain="embed_diff", options={"layer": -.5}),
            r"retain embed_diff: layer must lie in \[0, 1\], got -0.5"),
        (dict(objective="rmu", options={"layer": 2}), "layer must lie in"),
        (
            dict(options={"beta": math.nan}),
            "objective npo: beta must be at least 0 and finite, got nan")])
def test_a_recipe_of_no_steps_is_named(bad, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**dict(objective="npo", lr=1e-3, epochs=1) | bad)

def test_supervision_is_by_targets_of_the_same_facts_and_shape():
    model = small()
    targets = mlp_targets(model, GET)
    def by(targets, **more):
        return supervise(
            model,
            region(model),
            GET,
            Probe(GET, KEEP[:3]),
            targets,
            **dict(epochs=1, lr=1e-3, batch_size=4, seed=0) | more)
    for bad, says in (
        (targets[:3], "3 targets for 10 facts"),
        ([t[:2] for t in targets], "the targets of fact 0 have 2 layers"),
        (
            targets[:4] + [[x[:1] for x in targets[4]]] + targets[5:],
            "the targets of fact 4 have 4 layers")):
        with pytest.raises(ValueError, match=says): by(bad)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got 0"):
        by(targets, every=0)
    with pytest.raises(ValueError, match="batch_size must be"): finetune(model, GET, 1, 1e-3, 0, 0)
    with pytest.raises(ValueError, match="the asked set is empty"): mlp_targets(model, [])

def test_a_checkpoint_of_another_run_or_a_damaged_one_is_named(tmp_path):
    one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    checkpoint = Checkpoint(tmp_path / "state.checkpoint", every=0.)
    def learn(*parameters):
        descend(
            parameters,
            lambda e: [0],
            lambda b, e: sum(p.sum() for p in parameters),
            1,
            .1,
            checkpoint=checkpoint)
    learn(one)
    for parameters in ((other,), (one, other), ()):
        with pytest.raises(
            ValueError,
            match=(
                "state.checkpoint is the checkpoint of another run, its parameters have other"
                " shapes; remove it")) as error:
            checkpoint.restore(parameters, None)
    (tmp_path / "state.checkpoint").write_bytes(b"half of it")
    with pytest.raises(
        ValueError, match="state.checkpoint cannot be read as a checkpoint") as error:
        learn(one)
    assert "\n" not in str(error.value)

def test_a_run_over_weights_in_another_memory_order_resumes_to_the_same_bits(
    tmp_path
): # as experts are laid out
    def train(epochs, checkpoint=None):
        x = torch.nn.Parameter(torch.arange(6.).view(2, 3).T)
        descend(
            [x],
            lambda e: [1., 2.],
            lambda b, e: b * (x * torch.tensor([1., -3.])).square().sum(),
            epochs,
            .1,
            checkpoint=checkpoint)
        return x.detach()
    assert not torch.arange(6.).view(2, 3).T.is_contiguous()
    train(2, Checkpoint(tmp_path / "a", every=0.))
    assert torch.equal(train(4, Checkpoint(tmp_path / "a", every=0.)), train(4))

def test_a_quantized_model_is_not_taught_as_a_whole():
    model = small()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(48, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match="a parameter of torch.int8 cannot be trained; load the model unquantized"
    ):
        finetune(model, GET, 1, 1e-3, 4, 0)

def test_no_hook_stays_on_the_weights(): # of a run that trains them all
    model = small()
    unlearn(model, None, GET, KEEP, Probe(GET, KEEP[:3]), Recipe("ga", lr=1e-3, epochs=1), 0)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

def test_gradients_are_watched_until_every_column_has_had_one(monkeypatch):
    asked, looked, plain = [], [], recording.evaluate
    register = torch.Tensor.register_post_accumulate_grad_hook
    monkeypatch.setattr(
        torch.Tensor,
        "register_post_accumulate_grad_hook",
        lambda p, note: register(p, lambda p: looked.append(len(asked)) or note(p)))
    monkeypatch.setattr(recording, "evaluate", lambda *a, **k: asked.append(1) or plain(*a, **k))
    model = small()
    trajectory, _ = unlearn(
        model,
        region(model),
        GET,
        KEEP,
        Probe(GET, KEEP[:3]),
        Recipe("ga", lr=1e-3, epochs=3, batch_size=5),
        0)
    assert (
        trajectory.live_fraction == 1 and looked == [1] * 8
    ), "two steps, four layers, the first epoch alone"
