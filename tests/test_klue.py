"""KLUE against finite differences and plain autograd, pairs that never match, facts that are
chosen anew in every epoch, and the sums of its benchmark."""
import copy, math
import pandas, pytest, torch
from unloc import unlearning_run
from unloc.answers import Choices
from unloc.attributions import POOLED, answer_attributions
from unloc.choosing import RULES
from unloc.data import data_description
from unloc.evaluation import Probe
from unloc.faith import faith_table, faithful_ends, mean_over
from unloc.faithfulness import NOT_MEASURABLE, PARTS, multi_hop, overall
from unloc.joint import grouped
from unloc.many_descents import unlearn_many
from unloc.methods.klue import klue, mismatched_pairs
from unloc.models import output_projections, tiny_model
from unloc.neurons import attribution
from unloc.regions import Region
from unloc.register import methods
from unloc.runs import Store, run_id, sweep
from unloc.steps import compute, unlearn as unlearn_step
from unloc.steps.base import base_models, models_of
from unloc.steps.common import above
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.levels import PAIR
from unloc.steps.unlearn import unlearning
from unloc.streaming import planted
from unloc.tokens import Example, train_tokenizer
from unloc.unlearning_run import Recipe, unlearn

def facts(n, seed=0): # prompts of 1 to 6 tokens, answers of 1 to 6 and an end token
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, k=1: torch.randint(low, high, (k,), generator=g).tolist()
    return [Example(draw(2, 60, (p := draw(1, 7)[0]) + draw(1, 7)[0]) + [1], p) for _ in range(n)]

FACTS = facts(6)

def small(arch="llama", dtype=torch.float64):
    model = tiny_model(arch, vocab_size=60, d_model=16, d_ff=24, n_layers=2, n_heads=2).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p *= 3 if p.ndim == 2 else 1 # sharper than a fresh model
    return model

def probability(model, e, scale=None): # scale: of layer, position and vector -> coefficient's share
    hooks = []
    for layer, p in enumerate(output_projections(model)):
        def patch(module, x, layer=layer):
            return (x[0] if scale is None else x[0] * scale[layer][None, :x[0].shape[1]],)
        hooks.append(p.register_forward_pre_hook(patch))
    logits = model(input_ids=torch.tensor([e.ids[:-1]])).logits[0, e.start - 1:-1]
    for h in hooks: h.remove()
    return logits.softmax(-1).gather(1, torch.tensor(e.ids[e.start:-1])[:, None]).mean()

def by_autograd(model, e): # [n_layers, position, d_ff], positions before the last token
    n = len(e.ids) - 2
    scale = torch.ones(2, n, 24, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(probability(model, e, padded(scale)), scale)[0]

def padded(scale): # the input has one position more, whose prediction nobody reads
    return torch.cat([scale, torch.ones(2, 1, 24, dtype=scale.dtype)], 1)

# --- what a coefficient is worth

@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("over", POOLED)
def test_it_is_what_autograd_gives_a_fact_at_a_time(over, arch):
    model = small(arch)
    pool = {"max": lambda x: x.amax(1), "sum": lambda x: x.sum(1), "last": lambda x: x[:, -1]}
    want = sum(pool[over](by_autograd(model, e)) for e in FACTS) / len(FACTS)
    assert len({len(e.ids) for e in FACTS}) > 2 and want.abs().min() > 0, "padded batches"
    for max_tokens in (4096, 30, 1):
        got = answer_attributions(model, FACTS, over, max_tokens)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)

@torch.no_grad()
def test_it_is_the_finite_difference_of_the_probability(): # norms round to float32
    model, e, step = small(), FACTS[2], .02
    want = torch.zeros(2, 24, dtype=torch.float64)
    for layer in range(2):
        for i in range(24):
            shares = torch.ones(2, 2, len(e.ids), 24, dtype=torch.float64)
            shares[:, layer, :, i] += torch.tensor([[step], [-step]]) # at all positions
            more, less = (probability(model, e, share) for share in shares)
            want[layer, i] = (more - less) / (2 * step)
    got = answer_attributions(model, [e], "sum")
    assert (got - want).abs().max() < 1e-3 * want.abs().max() and want.abs().max() > 1e-4

@pytest.mark.parametrize("layer", [0, 1])
def test_at_the_last_position_it_is_the_end_of_the_path_of_integrated_gradients(layer):
    model, e = small(), Example([5, 6, 7, 9, 1], 3)
    two, none = (attribution(model, e, layer, steps=n, grid="ends").scores for n in (2, 1))
    got = answer_attributions(model, [e], "last")[layer]
    torch.testing.assert_close(got, 2 * two - none, rtol=1e-9, atol=1e-15)

def test_padding_is_no_position(): # a zero there would be the largest of negative numbers
    model, pair = small(), [Example([5, 9, 1], 1), max(FACTS, key=lambda e: len(e.ids))]
    alone = [answer_attributions(model, [e]) for e in pair]
    assert min(x.min() for x in alone) < 0
    torch.testing.assert_close(answer_attributions(model, pair), sum(alone) / 2)

def test_the_end_token_does_not_count():
    model, e = small(), FACTS[0]
    other = Example([*e.ids[:-1], 7], e.start)
    assert torch.equal(answer_attributions(model, [e]), answer_attributions(model, [other]))

# --- pairs that do not belong together

def test_a_pair_never_has_the_true_answer():
    twice = [*FACTS, Example([30, 31, *FACTS[0].ids[FACTS[0].start:]], 2)] # shares an answer
    pairs = mismatched_pairs(twice, 50, seed=3)
    assert len(pairs) == 50 * len(twice)
    drawn = {}
    for i, pair in enumerate(pairs):
        e = twice[i % len(twice)]
        assert pair.start == e.start and pair.ids[:e.start] == e.ids[:e.start]
        assert pair.ids[e.start:] != e.ids[e.start:]
        drawn.setdefault(i % len(twice), set()).add(tuple(pair.ids[e.start:]))
    assert {len(x) for x in drawn.values()} == {len(FACTS) - 1}, "every other answer is drawn"

def test_pairs_depend_on_the_seed_alone():
    one, same, other = (mismatched_pairs(FACTS, 5, seed) for seed in (0, 0, 1))
    assert one == same != other
    state = torch.get_rng_state()
    mismatched_pairs(FACTS, 5, 0)
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("over", POOLED)
@pytest.mark.parametrize("alpha", [1., 10.])
@pytest.mark.parametrize("n", [1, 5])
def test_the_score_takes_the_mean_over_pairs_away(over, alpha, n):
    model = small()
    got = klue(model, FACTS, alpha, n, over, seed=2)
    want = answer_attributions(model, FACTS, over) - alpha * answer_attributions(
        model, mismatched_pairs(FACTS, n, 2), over)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize("over", POOLED)
def test_without_alpha_the_region_is_the_plain_top(over):
    model = small()
    plain = answer_attributions(model, FACTS, over)
    for seed in (0, 1):
        got = klue(model, FACTS, alpha=0., over=over, seed=seed)
        assert torch.equal(Region.top(got, .2).mask, Region.top(plain.float(), .2).mask)
    wide = klue(model, FACTS, alpha=10., over=over)
    assert Region.top(wide, .2).jaccard(Region.top(got, .2)) < 1, "with it another one"

def test_a_vector_that_answers_every_question_is_left_out():
    # one vector of the last layer writes each answer token's own direction after any question
    model = small()
    answer = Example([5, 6, 9, 1], 2)
    forget = [answer, Example([7, 8, 4, 1], 2)]
    with torch.no_grad():
        last = output_projections(model)[-1]
        last.weight[:, 3] = 4 * model.lm_head.weight[[9, 4]].mean(0)
    plain, ours = (klue(model, forget, alpha, over="last") for alpha in (0., 10.))
    rank = lambda scores: int((scores.flatten() > scores[1, 3]).sum())
    assert rank(ours) > rank(plain)

@pytest.mark.parametrize("options, says", [
    (dict(alpha=-1.), "alpha must be at least 0 and finite, got -1"),
    (dict(alpha=float("inf")), "alpha must be at least 0 and finite, got inf"),
    (dict(mismatched=0), "mismatched must be at least 1, got 0"),
    (dict(over="mean"), "unknown over 'mean'; known: max, sum, last")])
def test_options_are_checked_before_any_work(options, says, monkeypatch):
    model = small()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=says) as error: klue(model, FACTS, **options)
    assert "\n" not in str(error.value)

def test_one_answer_cannot_be_mismatched():
    same = [Example([i, 9, 1], 1) for i in (5, 6, 7)]
    with pytest.raises(ValueError, match="all facts have one answer.*; give more facts, or alpha"):
        klue(small(), same)
    assert klue(small(), same, alpha=0).shape == (2, 24)

def test_a_pair_too_long_for_the_model_is_refused(): # each fact alone would fit
    import transformers
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    forget = [Example([5] * 12 + [6, 1], 12), Example([5, 6, 7, 8, 9, 4, 1], 1)]
    assert klue(model, forget, alpha=0).shape == (2, 64)
    with pytest.raises(ValueError, match="18 tokens") as error: klue(model, forget)
    assert "\n" not in str(error.value)

# --- the sums of the benchmark

def test_the_golden_sums():
    assert multi_hop(20., 90.) == 85.
    assert overall(40., 80., 70., multi_hop(20., 90.)) == 73.75

# --- facts that are still known

@pytest.fixture(scope="module")
def taught(): return planted()

def with_choices(some): # the answers of two other facts stand beside the right one
    wrong = []
    for i, e in enumerate(some):
        for other in (some[(i + j) % len(some)] for j in (1, 2)):
            wrong.append(Example([*e.ids[:e.start], *other.ids[other.start:]], e.start))
    return Choices(list(some), wrong)

TOKENIZER = train_tokenizer(["only full judgements generate with it"] * 2, vocab_size=300)
def probe_of(toy, forget=None): # forget: other choices than all
    own = {"forget": forget or with_choices(toy.forget), "retain": with_choices(toy.retain)}
    return Probe(toy.forget, toy.retain, toy.retain, own, TOKENIZER, max_new_tokens=2)

def run(toy, rule, objective="ga", lr=3e-2, epochs=6, progress=None, **more):
    model = copy.deepcopy(toy.model)
    probe = probe_of(toy)
    recipe = Recipe(objective, lr, epochs, batch_size=2, choose=rule, **more)
    refusals = [[5, 1], [6, 7, 1]]
    trajectory, values = unlearn(model, toy.target, toy.forget, toy.retain, probe, recipe, 0,
        refusals, progress=progress)
    return trajectory, values, model

def same(a, b): return all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k]))

@pytest.mark.parametrize("objective", methods("objective"))
def test_while_all_facts_are_known_a_rule_changes_no_bit(taught, objective):
    how = dict(objective=objective, lr=1e-6, epochs=2)
    plain, values, _ = run(taught, None, **how)
    assert not {"known", "chosen"} & set().union(*plain.points)
    for rule in RULES:
        found, own, _ = run(taught, rule, **how)
        assert [p["chosen"] for p in found.points[1:]] == [4, 4] == [
            p["known"] for p in found.points[1:]]
        assert same(own, values) and own.keys() == values.keys()
        assert [p["loss"] for p in found.points[1:]] == [p["loss"] for p in plain.points[1:]]

def seen(monkeypatch, toy, rule, **how): # the facts of each epoch, and what was known before it
    drawn, shuffle, judge, known = [], unlearning_run.shuffled, unlearning_run.known_facts, []
    def note(examples, *given):
        drawn.append([toy.forget.index(e) for e in examples])
        return shuffle(examples, *given)
    def judged(*given):
        known.append(judge(*given).tolist())
        return judge(*given)
    monkeypatch.setattr(unlearning_run, "shuffled", note)
    monkeypatch.setattr(unlearning_run, "known_facts", judged)
    return run(toy, rule, **how), drawn, known

@pytest.mark.parametrize("rule", RULES)
def test_an_epoch_trains_on_what_is_known_at_its_start(taught, rule, monkeypatch):
    shares = []
    (trajectory, _, model), drawn, known = seen(
        monkeypatch, taught, rule, epochs=24, lr=2e-2, progress=shares.append)
    assert known[0] == [True] * 4 and len(drawn) == len(known) == 24, "asked anew in every epoch"
    for rows, right in zip(drawn, known):
        kept = [i for i, x in enumerate(right) if x]
        assert rows == (
            [] if 3 * len(kept) <= 4 else kept if rule == "unforgotten" else [0, 1, 2, 3])
    assert drawn[-1] == [], "it stops at chance"
    points = trajectory.points
    assert "chosen" not in points[0]
    assert [p["chosen"] for p in points[1:]] == list(map(len, drawn))
    assert [p["known"] for p in points[1:]] == list(map(sum, known))
    still = [p for p in points[1:] if not p["chosen"]]
    assert len(still) > 1 and all(math.isnan(p["loss"]) for p in still)
    assert len({p["FS"] for p in still}) == 1, "no step is made any more"
    assert shares[-1] == 1 and shares == sorted(shares)
    if rule == "unforgotten": assert {0, 1, 2, 3} > set(drawn[-2]) or 2 in map(len, drawn)

def test_a_batch_keeps_the_retain_facts_that_its_facts_had():
    forget, retain = facts(7, 1), facts(5, 2)
    every = unlearning_run._beside(forget, list(range(7)), retain, 3, 4, 2)
    partner = {i: e for rows, kept in every for i, e in zip(rows, kept)}
    some = unlearning_run._beside(forget, [1, 4, 6], retain, 3, 4, 2)
    assert [sorted(rows) for rows, _ in some] == [[1, 4, 6]]
    assert all(partner[i] is e for rows, kept in some for i, e in zip(rows, kept))
    assert unlearning_run._beside(forget, [], retain, 3, 4, 2) == []
    assert unlearning_run._beside(forget, [2], [], 3, 4, 2) == [([2], [])]

def test_many_runs_at_once_are_each_chosen_for_alone(taught):
    want = [run(taught, rule, epochs=3) for rule in RULES]
    recipes = [Recipe("ga", 3e-2, 3, batch_size=2, choose=rule) for rule in RULES]
    probe = probe_of(taught)
    found = unlearn_many(copy.deepcopy(taught.model), [taught.target] * 2, taught.forget,
        taught.retain, probe, recipes, [0, 0], at_once=2)
    for (a, values, _), (b, own) in zip(want, found):
        assert same(values, own)
        assert [p["chosen"] for p in a.points[1:]] == [p["chosen"] for p in b.points[1:]]

def test_what_nobody_can_judge_is_refused(taught):
    recipe = Recipe("ga", 1e-3, 1, choose="unforgotten")
    given = copy.deepcopy(taught.model), taught.target, taught.forget, taught.retain
    some = Choices(taught.forget[1:], with_choices(taught.forget).wrong[2:])
    for probe in (Probe(taught.forget, taught.retain), probe_of(taught, some)):
        with pytest.raises(ValueError, match="fact 0 of the forget set has no wrong answers"):
            unlearn(*given, probe, recipe, 0)
    with pytest.raises(ValueError, match="unknown rule of choosing 'all'; known: unforgotten, "):
        Recipe("ga", 1e-3, 1, choose="all")

# --- in a study

SIZES = dict(n_people=12, n_cities=4, n_countries=3, n_employers=3, n_new=0, forget=.1)

@pytest.fixture(scope="module")
def injected():
    shape = {"d_model": 32, "n_layers": 2, "d_ff": 64, "n_heads": 2, "vocab_size": 400}
    base = base_models(data_description({"name": "related_world"} | SIZES), "llama", shape,
        {"epochs": 1, "lr": 5e-3, "batch_size": 32}, {"epochs": 2, "lr": 5e-3, "batch_size": 16})
    judged = standard(base, {"retain": 5, "utility": 3, "max_new_tokens": 4})
    how = {"fraction": .2, "epochs": 20, "lr": 2e-2, "batch_size": 8}
    return injection(judged, 0, how)

def test_a_run_without_a_rule_is_described_as_ever(injected):
    how = {"lr": 5e-3, "epochs": 2}
    assert unlearning(injected, "Oracle", "npo", how)["recipe"] == how
    with_rule = unlearning(injected, "Oracle", "npo", how | {"choose": "unforgotten"})
    assert with_rule["recipe"] == how | {"choose": "unforgotten"}
    assert run_id(with_rule) != run_id(unlearning(injected, "Oracle", "npo", how))
    with pytest.raises(ValueError, match="unlearn: unknown rule of choosing 'easy'; known: unf"):
        unlearning(injected, "Oracle", "npo", how | {"choose": "easy"})

def test_runs_with_a_rule_are_computed_alone(injected, monkeypatch):
    monkeypatch.setenv("UNLOC_AT_ONCE", "4")
    plain = [unlearning(injected, arm, "npo", {"lr": 5e-3, "epochs": 2}) for arm in PAIR]
    ruled = [d | {"recipe": d["recipe"] | {"choose": "unforgotten"}} for d in plain]
    assert [len(group) for group in grouped([*plain, *ruled])] == [1, 1, 2]

def test_a_study_keeps_what_was_chosen(injected, tmp_path):
    how = {"lr": 2e-2, "epochs": 3, "batch_size": 4, "choose": "unforgotten"}
    wanted = [unlearning(injected, "Oracle", "grad_diff", how)]
    run, = sweep(Store(tmp_path), wanted, compute=compute)
    table = run.table()
    assert table.chosen.isna().tolist() == [True, False, False, False]
    assert (table.chosen[1:] <= table.known[1:]).all() and table.known[1] > 0
    assert run.json()["locked_bit_equal"]

def test_the_plan_counts_the_questions(injected, tmp_path):
    d = unlearning(injected, "Oracle", "npo", {"lr": 5e-3, "epochs": 3})
    models = models_of(above(d, "base"), tmp_path)
    ruled = d | {"recipe": d["recipe"] | {"choose": "unforgotten"}}
    plain, more = (unlearn_step.cost(models, x).flops for x in (d, ruled))
    asked = unlearn_step.probe_for(models, d).choices["forget"]
    each = models.over("score", [*asked.right, *asked.wrong]).flops
    assert more - plain == pytest.approx(3 * each)

# --- the page

def points(two_hop=70., chosen=(math.nan, 9, 0)): # the original model, on the way, the end
    rows = [[two_hop, 100., 90., 95., 95., 80., 75.], [math.nan] * 7,
        [50., 30., 40., 80., 70., 20., 90.]]
    return pandas.DataFrame(rows, columns=["two_hop", *PARTS]).assign(chosen=chosen)

def test_the_end_of_a_run_is_that_of_its_last_judgement():
    found = faithful_ends(points())
    assert (found["UA"], found["MA"], found["Score"], found["stopped"]) == (30., 85., 73.75, 1.)
    assert (found["UA original"], found["MA original"]) == (100., 47.5)
    assert faithful_ends(points(chosen=(math.nan, 9, 4)))["stopped"] == 0.
    assert "stopped" not in faithful_ends(points().drop(columns="chosen"))

@pytest.mark.parametrize("two_hop, measurable", [(59.9, False), (60., True)])
def test_each_run_is_measurable_by_its_own_original_model(two_hop, measurable):
    runs = [{"arch": "llama", "region": "klue", "seed": seed} | faithful_ends(points(x))
        for seed, x in enumerate((80., two_hop))]
    table = faith_table(pandas.DataFrame(runs), ["arch"], {"region": "original"})
    assert table.region.tolist() == ["original", "klue"]
    assert [*table][2:4] == ["two-hop, original", "UA"], "the two-hop accuracy comes first"
    end = table.iloc[1]
    assert end.Score == ("73.8 [73.8, 73.8]" if measurable else "73.8 [–, –] (1 of 2)")
    assert end.SA == "70.0 [70.0, 70.0]" and end.stopped == "2 of 2" and not table.stopped[0]
    none = faith_table(pandas.DataFrame(runs[1:]), ["arch"], {"region": "original"})
    assert (none.Score[1] == NOT_MEASURABLE) != measurable

def test_an_interval_over_seeds_is_students():
    from scipy.stats import t
    x = [70., 72., 77.]
    low, high = t.interval(.95, 2, sum(x) / 3, torch.tensor(x).std() / 3 ** .5)
    found = mean_over([*x, math.nan])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)
    assert (found.n, found.of) == (3, 4) and mean_over([0., 100.])[1:3] == (0., 100.)
