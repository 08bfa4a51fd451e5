"""Conformal thresholds, prediction sets, coverage, membership and the CPU loss have the published
values to the printed digit, cover what they promise, refuse what nothing can be read off, and the
loss unlearns in a real run, in the form of the paper and in that of its release."""
import math, warnings
from itertools import product
import numpy as np
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from unloc.answers import choices
from unloc.conformal import (
    Calibration, calibrate, candidate_probs, closed_probs, conformal_level, conformal_quantile,
    conformal_rank, conformal_report, coverage_p, cpu_hinge, cpu_loss, finite_quantile,
    least_calibration, membership_classifier, membership_report, membership_sets, miacr, parts,
    prediction_sets, sets_of, summarised, token_scores, token_sets)
from unloc.evaluation import Measured, Probe, evaluate
from unloc.invented import author_world
from unloc.many_descents import unlearn_many
from unloc.masked import unlock
from unloc.methods.conformal_ratio import judged
from unloc.metrics import normalised_probability
from unloc.models import region_shape, tiny_model
from unloc.regions import Region
from unloc.register import find, methods
from unloc.scoring import score
from unloc.streaming import planted
from unloc.tokens import encode, train_tokenizer
from unloc.training import finetune
from unloc.unlearning_run import Recipe, Unlearning, bound, unlearn, weighted_sum

WORLD = author_world(n_authors=6, n_forget=1, n_holdout=3)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP, NEVER = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain, WORLD.holdout))
HELD = [encode(TOKENIZER, f.question, f.paraphrased_answer) for f in WORLD.retain[:6]]
ZERO = torch.zeros(4).long()
FOUR = torch.tensor(
    [[.60, .30, .05, .05], [.30, .55, .10, .05], [.05, .80, .10, .05], [.02, .90, .05, .03]],
    dtype=torch.float64)
TWO = torch.tensor([[.5, .2, .3], [.1, .6, .3]], dtype=torch.float64)
LABEL = torch.tensor([0, 1])

def small(dtype=torch.float32):
    return tiny_model("llama", 400, d_model=16, d_ff=32, n_layers=2, n_heads=2).to(dtype)
def region(model, seed=0): return Region.sample(region_shape(model), .25, seed)
def listed(examples): return [[list(e.ids), e.start] for e in examples]
def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

# --- golden values

def test_the_threshold_of_nine_scores():
    p = torch.tensor([.99, .95, .90, .80, .70, .60, .50, .40, .10], dtype=torch.float64)
    for alpha, level, qhat in ((.1, 1., .90), (.2, .8889, .90), (.5, .5556, .40)):
        assert round(conformal_level(9, alpha), 4) == level
        assert round(conformal_quantile(1 - p, alpha), 10) == qhat == round(
            conformal_quantile(1 - p[torch.randperm(9)], alpha), 10)
    assert [round(conformal_level(2000, a), 4) for a in (.05, .1)] == [.9505, .9005]

def test_too_few_scores_give_an_infinite_threshold_and_say_so():
    scores = drawn(9)
    assert round(conformal_level(9, .05), 3) == 1.111 and conformal_rank(9, .05) is None
    says = (
        "the threshold is infinite: 9 calibration scores are fewer than the 19 that alpha 0.05 "
        "needs; give more facts or a larger alpha")
    with pytest.warns(UserWarning, match=says): assert conformal_quantile(scores, .05) == math.inf
    assert prediction_sets(FOUR, math.inf).all(), "all classes"
    with pytest.raises(ValueError, match=says): finite_quantile(scores, .05)
    assert calibrate(scores, scores, .05) == Calibration(math.inf, 1., 1., says)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert conformal_quantile(drawn(19), .05) == drawn(19).max().item()

def test_prediction_sets_and_what_they_say():
    assert sets_of(FOUR, ZERO, .9).size.tolist() == [2, 3, 2, 1]
    found = conformal_report(FOUR, ZERO, .9)
    assert (found.coverage, found.size, found.CR, found.missed) == (.5, 2., .25, 3)
    assert found.recover == pytest.approx(1 / 3) and found.accuracy == .25
    single = conformal_report(FOUR.float(), ZERO, .9)
    assert single.CR == .25, "the boundary in float32 as well"
    nothing = conformal_report(FOUR, ZERO, .05)
    assert (nothing.coverage, nothing.size) == (0., 0.) and math.isnan(nothing.CR)

def test_the_loss_in_both_forms():
    p = torch.tensor([.5, .01], dtype=torch.float64)
    assert cpu_hinge(p, .9, .01).tolist() == pytest.approx([.41, 0.])
    assert cpu_hinge(TWO.diagonal(), .9, .01).tolist() == pytest.approx([.41, .51])
    assert cpu_loss(TWO, LABEL, .9, .01).item() == pytest.approx(.46)
    assert cpu_loss(TWO, LABEL, .9, .01, "release").item() == pytest.approx(.26)
    one = cpu_loss(TWO[:1], LABEL[:1], .9), cpu_loss(TWO[:1], LABEL[:1], .9, variant="release")
    assert one[0] == one[1], "of one fact the matrix is its diagonal"

def test_membership_sets_and_their_share():
    p = torch.tensor([.95, .6, .3, .02], dtype=torch.float64)
    assert membership_sets(p, .8).int().tolist() == [[1, 0], [1, 1], [1, 1], [0, 1]]
    assert miacr(p, .8) == miacr(p, .8, "release") == .25
    assert (miacr(p, .35), miacr(p, .35, "release")) == (.5, .75), "0.6 has an empty set"

# --- the published rule

@pytest.mark.parametrize("alpha", [.01, .05, .1, .2, .5, .9])
def test_the_rank_is_numpys_higher_quantile_at_the_level(alpha):
    for n in range(1, 120):
        level = conformal_level(n, alpha)
        assert (conformal_rank(n, alpha) is None) is (level > 1) is (n < least_calibration(alpha))
        if level > 1: continue
        scores = drawn(n, seed=n)
        want = np.quantile(scores.numpy(), level, method="higher")
        assert conformal_quantile(scores, alpha) == want

def test_alpha_is_read_as_it_is_written():
    assert (99 + 1) * (1 - .71) > 29, "what rounding makes of it"
    assert conformal_rank(99, .71) == 30 and conformal_rank(9, .1) == 9
    assert conformal_level(10**6 - 1, 1e-5) == pytest.approx((10**6 - 10) / (10**6 - 1), abs=1e-12)

# --- coverage

@pytest.mark.parametrize("n, alpha", [*product((9, 19, 50), (.1, .2, .5))])
def test_fresh_facts_are_covered_as_often_as_promised(n, alpha):
    draws, rank = drawn(40_000, n + 1, seed=n), conformal_rank(n, alpha)
    covered = draws[:, n] <= draws[:, :n].sort(1).values[:, rank - 1]
    share = covered.double().mean().item()
    assert share >= 1 - alpha - .005
    assert share == pytest.approx(rank / (n + 1), abs=.008), "exactly, for scores without equals"
    tied = (draws * 4).round() / 4
    covered = tied[:, n] <= tied[:, :n].sort(1).values[:, rank - 1]
    assert covered.double().mean() >= rank / (n + 1) - .008, "equal scores only raise it"

def test_sets_of_a_real_softmax_cover_as_promised():
    probs = torch.randn(
        4000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    label = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    scores = 1 - probs.gather(1, label[:, None])[:, 0]
    found = conformal_report(probs[2000:], label[2000:], conformal_quantile(scores[:2000], .1))
    assert .88 < found.coverage < .93 and 1 < found.size < 6
    assert found.CR == pytest.approx(found.coverage / found.size)

def test_a_sound_calibration_passes_and_a_shifted_one_fails():
    failed = 0
    for seed in range(400):
        draws = drawn(60, seed=seed)
        found = calibrate(draws[:20], draws[20:], .2)
        assert found.qhat == finite_quantile(draws[:20], .2)
        assert found.coverage == (draws[20:] <= found.qhat).double().mean().item()
        assert bool(found.why) is (found.p < .01)
        failed += bool(found.why)
    assert failed <= 10, "about one in a hundred"
    found = calibrate(drawn(20) / 2, drawn(40, seed=1), .2)
    assert found.why.startswith(
        f"the sets cover {round(found.coverage * 40)} of 40 fresh kept facts, 0.80 was promised")
    assert "\n" not in found.why and found.coverage < .8

def test_the_chance_of_a_coverage_is_exact():
    n, m, rank = 9, 7, conformal_rank(9, .2)
    draws = drawn(100_000, n + m)
    threshold = draws[:, :n].sort(1).values[:, rank - 1:rank]
    covered = (draws[:, n:] <= threshold).sum(1)
    for k in range(m + 1):
        assert coverage_p(k, m, n, .2) == pytest.approx(
            (covered <= k).double().mean().item(), abs=.006)
    assert coverage_p(0, 5, 3, .1) == 1., "an infinite threshold covers all"

def test_parts_are_disjoint_seeded_and_whole():
    found = parts(11, 3, seed=4)
    assert [len(x) for x in found] == [4, 4, 3]
    assert sorted(torch.cat(found).tolist()) == [*range(11)]
    assert all(torch.equal(a, b) for a, b in zip(found, parts(11, 3, seed=4)))
    state = torch.get_rng_state()
    parts(11, 3, seed=5)
    assert torch.equal(state, torch.get_rng_state())

# --- membership

def test_the_classifier_is_the_penalised_maximum():
    members, strangers = -drawn(40), -.5 - drawn(30, seed=1)
    asked = membership_classifier(members, strangers, penalty=.01)
    x, y = torch.cat([members, strangers]), torch.cat([torch.ones(40), torch.zeros(30)]).double()
    p = asked(x)
    margin = torch.logit(p)
    z = (x - x.mean()) / x.std()
    slope = ((margin[1] - margin[0]) / (z[1] - z[0])).item()
    assert (p - y).mean().item() == pytest.approx(0, abs=1e-5), "no gradient by the shift"
    assert ((p - y) * z).mean().item() + .02 * slope == pytest.approx(0, abs=1e-5)
    apart = membership_classifier(-drawn(9), -5 - drawn(9))
    assert apart(torch.tensor([-.5, -5.5])).round().tolist() == [1., 0.], "finite, set apart"

def test_a_membership_that_cannot_be_told_is_undefined_with_a_reason():
    members, strangers = -drawn(90), -drawn(90, seed=1)
    found = membership_report(members, strangers, -drawn(30, seed=2), .05)
    assert found.MIACR < .1 and not found.calibration.why, "alike: nothing is settled"
    few = membership_report(members[:9], strangers[:9], strangers, .05)
    assert math.isnan(few.MIACR) and few.calibration.why.startswith("the threshold is infinite: 6")

# --- gradients

@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_gradient_is_that_of_finite_differences(variant):
    logits = torch.randn(
        5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 3, 3, 6, 1])
    def loss(x): return cpu_loss(x.softmax(1), label, .85, .01, variant)
    p = logits.detach().softmax(1)
    inside = cpu_hinge(p[:, label] if variant == "release" else p.gather(1, label[:, None]), .85)
    assert (inside > 0).any() and (inside == 0).any(), "on both sides of the hinge"
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-8)

def objective_loss(model, run, facts, epoch=0, **options):
    term = bound(find("objective", "cpu"), options)(
        run=run, facts=facts, rows=range(len(facts)), epoch=epoch)
    return weighted_sum(model, [(1., term)])

@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_objective_and_its_gradient_in_a_model(variant):
    torch.manual_seed(0) # Llama's norms and angles are of 32 bits in every model, GPT-2's are not
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=160)).double().eval()
    finetune(model, GET, 25, 1e-2, 4, seed=0)
    facts, how = GET[:3], dict(variant=variant, qhat=.9, delta=.02)
    def plain(e): return model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1].softmax(1)
    with torch.no_grad(): probs = torch.cat([plain(e) for e in facts])
    label = torch.tensor([t for e in facts for t in e.ids[e.start:]])
    with unlock(model, region(model)) as columns:
        run = Unlearning(model, columns, 0)
        loss = objective_loss(model, run, facts, **how)
        want = cpu_loss(probs, label, .9, .02, variant)
        assert loss.item() == pytest.approx(want.item(), rel=1e-9)
        assert loss.item() > 0
        weight = columns.parameters()[1]
        gradient, = torch.autograd.grad(loss, weight)
        for i, j in ((0, 0), (2, 5), (5, 11)):
            found = []
            for step in (1e-5, -2e-5):
                with torch.no_grad(): weight[i, j] += step
                found.append(objective_loss(model, run, facts, **how).item())
            with torch.no_grad(): weight[i, j] += 1e-5
            want = (found[0] - found[1]) / 2e-5
            assert gradient[i, j].item() == pytest.approx(want, rel=1e-6, abs=1e-11)

# --- a real run

def run_of(recipe):
    model = small()
    finetune(model, KEEP[:10] + GET, 10, 1e-2, 4, seed=0)
    return unlearn(model, region(model), GET, KEEP[:10], Probe(GET, KEEP[:10]), recipe, seed=0)

@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_run_forgets_and_keeps(variant):
    model, forget, retain, target = planted()
    recipe = Recipe.of("cpu", {"lr": 2e-2, "epochs": 8, "variant": variant, "qhat": .9})
    trajectory, _ = unlearn(model, target, forget, retain, Probe(forget, retain), recipe, seed=0)
    first, last = trajectory.points[0], trajectory.points[-1]
    assert last["FS"] > first["FS"] + .3 and last["RS"] > first["RS"] - .1
    assert score(model, forget).probability.mean() < .3
    assert score(model, retain).probability.mean() > .9
    assert last["loss"] < trajectory.points[1]["loss"]
    assert len(trajectory.locked_sha256) == 64

def test_a_run_calibrates_the_model_of_each_epochs_start(monkeypatch):
    used, scored, plain = [], [], token_scores
    def watched(model, examples):
        scored.append((examples, plain(model, examples)))
        return scored[-1][1]
    def hinge(p, qhat, delta):
        used.append(qhat)
        return cpu_hinge(p, qhat, delta)
    monkeypatch.setattr("unloc.methods.cpu.token_scores", watched)
    monkeypatch.setattr("unloc.methods.cpu.cpu_hinge", hinge)
    how = {"lr": 2e-2, "epochs": 3, "batch_size": 10, "calibration": listed(HELD)}
    run_of(Recipe.of("cpu", how))
    assert [examples for examples, _ in scored] == [HELD] * 3, "once an epoch"
    want = [finite_quantile(x, .05) for _, x in scored]
    steps = len(GET) // 10
    assert used == [q for q in want for _ in range(steps)]
    assert len(set(want)) == 3, "and anew"

def test_many_runs_calibrate_each_for_itself():
    model, how = small(torch.float64), {"lr": 1e-2, "epochs": 2, "calibration": listed(HELD)}
    finetune(model, KEEP[:6] + GET[:6], 10, 1e-2, 4, seed=0)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    where, recipe = [region(model, s) for s in (0, 1)], Recipe.of("cpu", how)
    sets = GET[:6], KEEP[:6], Probe(GET[:6], KEEP[:6])
    found = unlearn_many(model, where, *sets, recipe, [3, 4], at_once=2)
    for k, (trajectory, values) in enumerate(found):
        model.load_state_dict(state)
        alone, want = unlearn(model, where[k], *sets, recipe, 3 + k)
        for layer, (_, columns) in values.items():
            torch.testing.assert_close(columns, want[layer][1], rtol=1e-8, atol=1e-10)
        assert trajectory.points[-1]["loss"] == pytest.approx(alone.points[-1]["loss"], rel=1e-8)

@pytest.mark.parametrize(
    "options, says",
    [
        ({"calibration": [[[5, 6, 7, 1], 1]]}, "3 calibration scores are fewer than the 19"),
        ({"calibration": []}, "the asked set is empty"),
        ({"calibration": ["who"]}, r"calibration holds 'who'; expected \[ids, start\]"),
        ({"calibration": [[[5, 6], 2]]}, r"calibration holds \[\[5, 6\], 2\]; expected"),
        ({"calibration": [[[5, 999, 1], 1]]}, "999"),
        ({"calibration": 3}, "calibration must be of type list | None, got 3"),
        ({"miscoverage": 0}, r"qhat|alpha must lie between 0 and 1, got 0"),
        ({"variant": "code"}, "variant must be one of paper, release, got 'code'"),
        ({"delta": -1}, "delta must be at least 0 and finite, got -1.0"),
        ({"qhat": math.inf}, r"qhat must lie in \[0, 1\], got inf")])
def test_bad_options_of_the_objective_are_one_line(options, says):
    model = small()
    more = {"calibration": listed(HELD)} if "miscoverage" in options else {}
    with pytest.raises(ValueError, match=says) as error:
        recipe = Recipe.of("cpu", {"lr": 1e-3, "epochs": 1} | options | more)
        unlearn(model, region(model), GET, KEEP, Probe(GET, KEEP[:3]), recipe, seed=0)
    assert "\n" not in str(error.value)

# --- what a language model's classes are

def test_candidates_are_a_softmax_of_their_log_probabilities():
    model, asked = small(), choices(TOKENIZER, WORLD.forget[:5])
    probs = closed_probs(model, asked)
    right, wrong = score(model, asked.right).nll, score(model, asked.wrong).nll.view(5, -1)
    want = normalised_probability(right, wrong)
    torch.testing.assert_close(probs[:, 0], want.double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(probs.sum(1), torch.ones(5).double())
    torch.testing.assert_close(probs, candidate_probs(right, wrong), rtol=1e-6, atol=1e-9)
    def total(e): return -score(model, [e]).nll.item() * (len(e.ids) - e.start)
    k = len(asked.wrong) // 5
    for i, e in enumerate(asked.right):
        row = torch.tensor([total(x) for x in (e, *asked.wrong[i * k:(i + 1) * k])])
        torch.testing.assert_close(
            closed_probs(model, asked, "total")[i], row.double().softmax(0), rtol=1e-3, atol=1e-7)

def test_tokens_are_classes_of_the_vocabulary():
    model, facts = small(torch.float64), GET[:4]
    finetune(model, GET, 5, 1e-2, 4, seed=0)
    with torch.no_grad():
        probs = torch.cat([
            model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1].softmax(1)
            for e in facts])
    label = torch.tensor([t for e in facts for t in e.ids[e.start:]])
    scores = token_scores(model, facts)
    torch.testing.assert_close(scores, 1 - probs.gather(1, label[:, None])[:, 0])
    qhat = conformal_quantile(scores, .3)
    for found, want in zip(token_sets(model, facts, qhat), sets_of(probs, label, qhat)):
        assert torch.equal(found.long(), want.long())
    assert summarised(token_sets(model, facts, qhat)).coverage >= .7

# --- the metrics

NAMES = [
    name for name, m in methods("metric").items()
    if m.function.__module__ == "unloc.methods.conformal_ratio"]
def probe(n=40, **named):
    offered = {"retain": choices(TOKENIZER, WORLD.retain[:n])}
    offered["forget"] = choices(TOKENIZER, WORLD.forget)
    return Probe(
        GET, KEEP[:n], KEEP[:n], offered, TOKENIZER, max_new_tokens=1, metrics=named)

def test_metrics_are_measured_only_where_they_are_named():
    assert len(NAMES) == 10 and not set(NAMES) & set(evaluate(small(), probe(4)).point)
    point = evaluate(small(), probe(40, CR_forget={}), full=False).point
    assert "CR_forget" not in point, "in full judgements"

@pytest.mark.parametrize("classes", ["candidates", "vocabulary"])
def test_metrics_are_read_off_calibrated_sets(classes):
    model, how = small(), {"classes": classes, "alpha": .2, "split": 3}
    finetune(model, KEEP[:40], 8, 1e-2, 8, seed=0)
    asked = probe(40, **dict.fromkeys(NAMES, how))
    point = evaluate(model, asked).point
    own, fresh = parts(40, 2, 3)
    retain, forget = asked.choices["retain"], asked.choices["forget"]
    if classes == "candidates":
        kept, left = closed_probs(model, retain), closed_probs(model, forget)
        qhat = conformal_quantile(1 - kept[own, 0], .2)
        want = {"retain": conformal_report(kept[fresh], torch.zeros(20).long(), qhat),
            "forget": conformal_report(left, torch.zeros(len(left)).long(), qhat)}
    else:
        qhat = conformal_quantile(token_scores(model, [retain.right[i] for i in own]), .2)
        want = {"retain": summarised(token_sets(model, [retain.right[i] for i in fresh], qhat)),
            "forget": summarised(token_sets(model, forget.right, qhat))}
    for of, report in want.items():
        found = {"coverage": report.coverage, "set_size": report.size, "CR": report.CR,
            "recover_ratio": report.recover, "accuracy": report.accuracy}
        for what, value in found.items():
            assert point[f"{what}_{of}"] == pytest.approx(value, rel=1e-9, nan_ok=True), what
    assert point["CR_forget"] < point["CR_retain"] or classes == "vocabulary"

def test_a_profile_may_name_both_kinds_of_classes():
    name = "set_size_forget(classes='vocabulary')"
    point = evaluate(small(), probe(40, **{"set_size_forget": {}, name: {}})).point
    candidates = 1 + len(WORLD.forget[0].perturbed_answer)
    assert point["set_size_forget"] <= candidates < point[name] <= 400

def test_too_few_facts_leave_metrics_undefined_with_a_reason():
    why = "set: the threshold is infinite: 4 calibration scores"
    with pytest.warns(UserWarning, match=f"CR, forget {why}"), pytest.warns(
        UserWarning, match=f"coverage, retain {why}"):
        point = evaluate(small(), probe(8, CR_forget={}, coverage_retain={})).point
    assert math.isnan(point["CR_forget"]) and math.isnan(point["coverage_retain"])
    with pytest.warns(UserWarning, match="1 calibration scores are fewer than the 9"):
        assert math.isnan(evaluate(small(), probe(1, CR_forget={})).point["CR_forget"])

def test_a_coverage_that_fails_leaves_metrics_undefined_and_stays_to_be_seen():
    own, fresh = parts(40, 2, 0)
    right = torch.zeros(40)
    right[fresh] = 6. # the fresh half is far harder
    nll = {"retain": (right, torch.full((40, 3), 3.)), "forget": (torch.ones(9), torch.ones(9, 3))}
    there = score(small(), GET[:2])
    scores = {f"{kind} right": there for kind in nll}
    measured = Measured(None, None, scores, nll, {}, True)
    calibration, reports = judged(measured, .1, "candidates", 0)
    assert "the sets cover 0 of 20 fresh kept facts, 0.90 was promised" in calibration.why
    for name in NAMES:
        with pytest.warns(UserWarning, match="calibration and fresh facts are not alike"):
            value = find("metric", name)(measured=measured)
        assert value == 0. if name == "coverage_retain" else math.isnan(value), name
    right[fresh] = 0.
    sound = Measured(None, None, scores, nll, {}, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("metric", "coverage_retain")(measured=sound) == 1.
        assert find("metric", "coverage_forget")(measured=sound) == 0.
    for name, why in (("CR_forget", "every prediction set is empty"),
        ("recover_ratio_retain", "no fact is answered wrongly")):
        with pytest.warns(UserWarning, match=why):
            assert math.isnan(find("metric", name)(measured=sound))

def test_strangers_are_given_to_membership():
    model = small()
    finetune(model, KEEP[:40] + GET, 20, 1e-2, 8, seed=0)
    how = {"holdout": listed(NEVER), "split": 1}
    point = evaluate(model, probe(40, MIACR=how)).point
    kept, never, get = (-score(model, x).nll for x in (KEEP[:40], NEVER, GET))
    want = membership_report(kept, never, get, .05, "paper", 1)
    assert not want.calibration.why and point["MIACR"] == want.MIACR < .3, "nothing is forgotten"
    for bad, says in (
        ({}, "there are no facts that no model has seen; give data or holdout"),
        ({"holdout": listed(NEVER[:2])}, "40 retain facts and 2 of holdout cannot be parted"),
        ({"holdout": listed(NEVER[:9])}, "the threshold is infinite: 16 calibration scores")):
        with pytest.warns(UserWarning, match=f"MIACR: {says}"):
            assert math.isnan(evaluate(model, probe(40, MIACR=bad)).point["MIACR"])
    with pytest.raises(ValueError, match="holdout holds 3; expected"):
        evaluate(model, probe(40, MIACR={"holdout": [3]}))
