"""Faithful forgetting in numbers: golden sums, intervals from clusters, a word in place of what
cannot be measured, and models that know, never knew, or cannot compose."""
from math import isnan, nan
import numpy as np
import pandas as pd
import pytest, torch
from unloc.answers import choices
from unloc.data import data_description
from unloc.evaluation import USUAL_METRICS, Probe, evaluate, undefined
from unloc.facts import Benchmark, Fact
from unloc.faithfulness import (
    CHANCE, COMBINED, LABELS, MULTI_HOP, NOT_MEASURABLE, PARTS, Answers, Estimate, along_run,
    answers_of, faith_cells, faithfulness, measured_text, multi_hop, overall, percent,
    question_lists)
from unloc.invented import author_world
from unloc.methods.faithun import ASKED
from unloc.models import tiny_model
from unloc.register import METHODS, methods
from unloc.relations import make_related_world
from unloc.runs import Store
from unloc.statistics import clustered_bootstrap
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.unlearn import unlearning
from unloc.tokens import encode, train_tokenizer
from unloc.training import finetune

SIZES = dict(n_people=12, n_cities=4, n_countries=3, n_employers=3, n_new=0, forget=.2)
WORLD = make_related_world(**SIZES)
DATA = {"name": "related_world"} | SIZES
EVERY = "two_hop", *PARTS, *COMBINED

def answers(right, clusters=None, first=0): # each of its own cluster, unless said otherwise
    right = torch.tensor(right, dtype=torch.float64)
    return Answers(right, tuple(clusters or range(first, first + len(right))))
def share(x, n=20): return [1.] * round(x * n) + [0.] * (n - round(x * n))
def told(two_hop=.9, **shares):
    shares = dict(UA=.3, UA_paraphrased=.4, TA=.8, SA=.7, MA_f=.2, MA_t=.9) | shares
    first = {name: 100 if PARTS[name][0] == "test" else 0 for name in PARTS}
    own = {name: answers(share(x), first=first[name]) for name, x in shares.items()}
    return own | {"two_hop": answers(share(two_hop))}

# --- golden

def test_the_sums():
    assert multi_hop(20., 90.) == 85. and overall(40., 80., 70., 85.) == 73.75
    assert (multi_hop(100., 0.), multi_hop(0., 100.)) == (0., 100.)
    assert overall(0., 100., 100., 100.) == 100. and overall(100., 0., 0., 0.) == 0.
    assert isnan(multi_hop(nan, 50.)) and isnan(overall(10., 10., 10., nan))

def test_the_sums_of_answers():
    found = faithfulness(told(), told(), n=100)
    assert tuple(found) == EVERY
    values = {name: x.value for name, x in found.items()}
    assert values == pytest.approx(dict(
        two_hop=90., UA=30., UA_paraphrased=40., TA=80., SA=70., MA_f=20., MA_t=90., MA=85.,
        Score=73.75))
    assert all(found.values()) and found["Score"].n == 20 * 5

def test_chance_is_one_of_three():
    assert round(CHANCE, 1) == 33.3
    for rows in question_lists(WORLD).values():
        assert {len(f.perturbed_answer) for _, f in rows} == {2}

def test_every_list_is_of_its_split():
    lists = question_lists(WORLD)
    for name, (split, kind) in PARTS.items():
        numbers = {i for i, _ in lists[name]}
        assert numbers <= set(WORLD.splits[split]), name
        for i, f in lists[name]:
            c = WORLD.clusters[i]
            assert f in ((c.base,) if kind == "base" else getattr(c, kind))
    assert len(lists["UA"]) == len(lists["UA_paraphrased"]) == 13 and len(lists["TA"]) == 46
    assert len(lists["two_hop"]) == 12

# --- not measurable

@pytest.mark.parametrize("two_hop, measurable", [(.55, False), (.6, True), (0., False), (1., True)])
def test_below_sixty_percent_multi_hop_is_a_word(two_hop, measurable):
    found = faithfulness(told(), told(two_hop), n=100)
    cells = faith_cells(found)
    words = {name for name, text in cells.items() if text == "not measurable"}
    assert words == (set() if measurable else {"MA_f", "MA_t", "MA", "Score"})
    assert next(iter(cells)) == "two-hop, original", "reported first"
    assert cells["two-hop, original"].startswith(f"{100 * two_hop:.1f} [")
    for name in MULTI_HOP:
        assert bool(found[name]) == measurable and isnan(found[name].value) != measurable
        assert measurable or f"{100 * two_hop:.1f} % of two-hop questions" in found[name].why
    assert "UA‡" in cells and cells["UA‡"].startswith("40.0 [")

def test_the_original_models_two_hops_decide_and_not_the_unlearned_ones():
    assert faithfulness(told(0.), told(.9), n=10)["MA"]
    assert not faithfulness(told(.9), told(0.), n=10)["MA"]

def test_a_list_without_questions_is_not_measurable():
    empty = told() | {"MA_f": answers([])}
    found = faithfulness(empty, told(), n=100)
    assert [name for name, x in found.items() if not x] == ["MA_f", "MA", "Score"]
    assert {found[name].why for name in ("MA_f", "MA", "Score")} == {
        "there is no question of this kind"}
    none = told() | {"two_hop": answers([])}
    found = faithfulness(none, none, n=100)
    assert found["two_hop"].text() == NOT_MEASURABLE == found["MA_t"].text()

def test_numbers_as_text():
    assert Estimate(12.3456, 1., 20.).text(2) == "12.35 [1.00, 20.00]"
    assert Estimate(50.).text() == "50.0 [–, –]", "two clusters have no interval"
    assert [measured_text(x) for x in (nan, 0., 100.)] == ["not measurable", "0.0", "100.0"]

# --- intervals

def test_an_interval_is_that_of_the_clustered_bootstrap():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 3)
    right = (rng.random(120) < .2 + .6 * (clusters % 2)).astype(float)
    own = told() | {"UA": answers(list(right), clusters.tolist())}
    found = faithfulness(own, told())["UA"]
    low, high = clustered_bootstrap(100 * right, clusters)
    assert found.value == pytest.approx(100 * right.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.5)
    assert (found.n, found.clusters) == (120, 40)

def test_clusters_stand_and_fall_together():
    alone = told(UA=.5)
    together = alone | {"UA": answers(share(.5), [i // 4 for i in range(20)])}
    a, b = (faithfulness(x, told())["UA"] for x in (alone, together))
    assert a.value == b.value == 50. and b.high - b.low > 1.3 * (a.high - a.low)

def test_parts_of_one_cluster_are_drawn_together():
    mixed = [1., 0.] * 10
    one = told() | {"UA_paraphrased": answers(mixed), "SA": answers(mixed)}
    opposite = one | {"SA": answers([1. - x for x in mixed])}
    a, b = (faithfulness(x, told())["Score"] for x in (one, opposite))
    assert a.value == b.value
    assert a.high - a.low < b.high - b.low, "the same sign cancels, opposite ones add up"

def test_intervals_are_seeded():
    a, b, c = (faithfulness(told(), told(), seed=s, n=150) for s in (0, 0, 1))
    assert a == b and a != c
    assert {k: x.value for k, x in a.items()} == {k: x.value for k, x in c.items()}

def test_fewer_than_three_clusters_have_no_interval():
    few = told() | {"UA": answers([1., 0., 1., 1.], [1, 1, 2, 2])}
    found = faithfulness(few, told(), n=100)
    assert found["UA"].value == 75. and isnan(found["UA"].low) and found["UA"].clusters == 2
    assert found["UA"].text() == "75.0 [–, –]" and not isnan(found["Score"].low)

def test_a_draw_without_the_questions_is_left_out():
    sparse = told() | {"MA_f": answers([1., 0., 1.], [0, 1, 2])}
    found = faithfulness(sparse, told(), n=2000)["MA_f"]
    assert found.value == pytest.approx(200 / 3) and 0 <= found.low <= found.high <= 100

# --- models

TOKENIZER = train_tokenizer(
    [t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)], 600)
def encoded(facts): return [encode(TOKENIZER, f.question, f.answer) for f in facts]
def untaught():
    return tiny_model("llama", len(TOKENIZER), d_model=48, n_layers=2, d_ff=96, n_heads=2)
def taught(facts):
    model = untaught()
    finetune(model, encoded(facts), epochs=30, lr=5e-3, batch_size=16, seed=0)
    return model

HELD = [f for c in WORLD.clusters for f in (*c.paraphrased, *c.two_hop)]
def stated(c): return (*c.trained, *c.paraphrased, *c.two_hop)
LOST = {f for c in WORLD.split("forget") for f in stated(c)}

@pytest.fixture(scope="module")
def knows(): return taught([*WORLD.retain, *WORLD.forget, *HELD])

@pytest.fixture(scope="module")
def never_knew(): return taught([f for f in (*WORLD.retain, *WORLD.forget, *HELD) if f not in LOST])

def test_a_model_that_never_knew_is_faithful_and_one_that_knows_is_not(knows, never_knew):
    original, retained = (answers_of(m, TOKENIZER, WORLD) for m in (knows, never_knew))
    before = faithfulness(original, original, n=200)
    after = faithfulness(retained, original, n=200)
    assert before["two_hop"].value >= 60 and all(after.values())
    assert min(before[name].value for name in ("UA", "UA_paraphrased", "TA", "SA")) > 90
    assert max(after[name].value for name in ("UA", "UA_paraphrased")) < 70
    assert min(after[name].value for name in ("TA", "SA")) > 90
    assert after["Score"].value > before["Score"].value + 5

def test_a_model_that_guesses_is_not_measurable():
    own = answers_of(untaught(), TOKENIZER, WORLD)
    found = faithfulness(own, own, n=100)
    assert found["two_hop"].value < 60 and found["Score"].text() == NOT_MEASURABLE
    assert found["UA"] and found["TA"]

def test_the_choice_is_the_highest_mean_without_the_end_token(never_knew):
    own = answers_of(never_knew, TOKENIZER, WORLD)["UA"]
    for (_, f), right in zip(question_lists(WORLD)["UA"], own.right.tolist(), strict=True):
        means = []
        for text in (f.answer, *f.perturbed_answer):
            e = encode(TOKENIZER, f.question, text)
            logprob = never_knew(torch.tensor([e.ids])).logits[0].detach().log_softmax(-1)
            means.append(sum(
                logprob[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids) - 1)
            ) / (len(e.ids) - 1 - e.start))
        assert right == (means[0] > max(means[1:]))

def test_the_size_of_a_batch_changes_no_answer(never_knew):
    own, batched = (
        answers_of(never_knew, TOKENIZER, WORLD, max_tokens=n) for n in (None, 64))
    for name in own: assert torch.equal(own[name].right, batched[name].right), name

def test_a_data_set_without_structure_is_measured_as_far_as_it_goes():
    plain = author_world(3, 1, 0)
    texts = [t for f in plain.retain + plain.forget for t in (f.question, f.answer)]
    tokenizer = train_tokenizer(texts, 400)
    model = tiny_model("llama", len(tokenizer), d_model=16, n_layers=2, d_ff=32, n_heads=2)
    own = answers_of(model, tokenizer, plain)
    assert {name: len(a.right) for name, a in own.items()} == dict(
        UA=10, UA_paraphrased=10, TA=20, SA=0, MA_f=0, MA_t=0, two_hop=0)
    found = faithfulness(own, own, n=100)
    assert [name for name, x in found.items() if not x] == [
        "two_hop", "SA", "MA_f", "MA_t", "MA", "Score"]

# --- along a run

POINTS = pd.DataFrame(
    [[70., 100., 90., 95., 95., 80., 75.], [10., 30., 40., 80., 70., 20., 90.]],
    columns=["two_hop", *PARTS], index=[0, 4])

def test_columns_are_combined_and_taken_back():
    found = along_run(POINTS.assign(FS=.5))
    assert list(found) == ["two_hop", *PARTS, "MA", "Score"] and list(found.index) == [0, 4]
    assert found.loc[4, ["MA", "Score"]].tolist() == [85., 73.75]
    low = POINTS.copy()
    low.loc[0, "two_hop"] = 59.9
    found = along_run(low)
    assert found[list(MULTI_HOP)].isna().all(axis=None)
    kept = ["two_hop", "UA", "UA_paraphrased", "TA", "SA"]
    assert found[kept].equals(low[kept])
    assert found.loc[4].map(measured_text)["MA_t"] == "not measurable"

# --- as metrics of a study

def probe(data, facts=WORLD, **more):
    return Probe(
        encoded(facts.forget), encoded(facts.retain[:4]), encoded(facts.retain[:2]),
        {"forget": choices(TOKENIZER, facts.forget[:4])}, TOKENIZER, max_new_tokens=2,
        metrics={name: {"data": data} for name in ASKED}, **more)

def test_they_are_registered_and_not_usual():
    assert set(ASKED) == {"two_hop", *PARTS} <= set(methods("metric"))
    assert not set(ASKED) & set(USUAL_METRICS)
    for name in ASKED:
        about = METHODS["metric"][name].about
        assert about["full"] and about["margin"] == 2.
    assert LABELS["UA_paraphrased"] == "UA‡"
    assert METHODS["metric"]["UA_paraphrased"].label == "UA‡ [%]"
    assert not set(COMBINED) & set(methods("metric")), "one checkpoint does not know the original"

def test_a_judgement_gives_what_the_questions_give(never_knew):
    point = evaluate(never_knew, probe(DATA)).point
    own = answers_of(never_knew, TOKENIZER, WORLD)
    assert {name: point[name] for name in ASKED} == {name: percent(own[name]) for name in ASKED}
    short = evaluate(never_knew, probe(DATA), full=False).point
    assert not ASKED.keys() & short.keys()

def test_two_judgements_do_not_share_answers(never_knew):
    one, other = (evaluate(m, probe(DATA)).point for m in (never_knew, untaught()))
    assert one["TA"] > other["TA"]

def test_a_usual_judgement_asks_nothing_more():
    plain = Probe(encoded(WORLD.forget), encoded(WORLD.retain[:4]))
    assert not ASKED.keys() & evaluate(untaught(), plain).point.keys()

def test_a_part_without_questions_is_undefined():
    # without chains that are held out
    data = DATA | {"composed": 1.}
    facts = make_related_world(**SIZES, composed=1.)
    own = probe(data, facts)
    point = evaluate(untaught(), own).point
    assert isnan(point["two_hop"]) and not isnan(point["UA"])
    assert undefined(point, own)["two_hop"] == "a metric without a value here"

# --- what is refused

EMPTY = dict.fromkeys(("retain", "holdout", "real_authors", "world_facts", "refusals"), ())
def without_texts():
    own = probe(DATA)
    for e in own.forget: e.texts = None
    return own

@pytest.mark.parametrize("call, says", [
    (lambda: multi_hop(-1., 50.), "MA_f is -1.0; expected percent, from 0 to 100"),
    (lambda: multi_hop(50., np.array([1., 101.])), "MA_t is array("),
    (lambda: overall(40., 80., 170., 85.), "SA is 170.0; expected percent, from 0 to 100"),
    (lambda: faithfulness({}, told()), "the answers of the unlearned model have no list 'UA'"),
    (lambda: faithfulness(told(), {k: x for k, x in told().items() if k != "two_hop"}), (
        "the answers of the original model have no list 'two_hop'; expected UA, ")),
    (lambda: faithfulness(told() | {"SA": answers([1.], [1, 2])}, told()), (
        "SA of the unlearned model has 1 answers and 2 clusters; expected a cluster for each")),
    (lambda: faithfulness(told() | {"SA": answers([2.])}, told()), (
        "SA of the unlearned model has the answer 2.0; expected 0 to 1")),
    (lambda: faithfulness(told() | {"SA": answers([nan])}, told()), "has the answer nan"),
    (lambda: along_run(POINTS.drop(columns="MA_t")), "the trajectory has no MA_t; expected"),
    (lambda: along_run(POINTS.iloc[:0]), "the trajectory has no checkpoint; expected"),
    (lambda: question_lists(Benchmark("x", (Fact("Who?", "Ada."),), **EMPTY)), (
        "x: no fact to forget has 2 wrong answers; questions with three options need them")),
    (lambda: evaluate(untaught(), probe(DATA | {"seed": 1})), (
        "the judgement forgets other facts than related world, 12 people, seed 1; expected one")),
    (lambda: evaluate(untaught(), probe(None)), (
        "the judgement forgets other facts than related world, 128 people, seed 0; expected")),
    (lambda: evaluate(untaught(), without_texts()), "the judgement forgets other facts than"),
    (lambda: evaluate(untaught(), probe({"name": "nowhere"})), "unknown benchmark 'nowhere'"),
    (lambda: evaluate(untaught(), probe(DATA | {"n_people": 5})), "n_people=5: expected an even"),
    (lambda: METHODS["metric"]["UA"].checked({"data": "world"}), (
        "metric UA: data must be of type dict | None, got 'world'")),
])
def test_what_makes_no_sense_is_one_line(call, says):
    with pytest.raises(ValueError) as error: call()
    assert says in str(error.value) and "\n" not in str(error.value)

def test_a_study_measures_them_along_a_run(tmp_path):
    small = DATA | {"n_people": 4}
    how = {"epochs": 1, "lr": 2e-3, "batch_size": 32}
    shape = {"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 400}
    base = base_models(data_description(small), "llama", shape, how, how)
    judging = {"retain": 4, "utility": 2, "max_new_tokens": 2}
    metrics = {name: {"data": small} for name in ASKED}
    judged = standard(base, judging | {"metrics": metrics})
    plain = standard(base, judging)
    injected = injection(judged, 0, how | {"fraction": .5})
    run = unlearning(injected, "Oracle", "wga", how)
    store = Store(tmp_path)
    for described in (base, judged, injected): store.do(described, compute)
    points = store.do(run, compute).table()
    assert set(ASKED) < set(points) and along_run(points).shape == (len(points), 9)
    assert judged["code"].keys() - plain["code"].keys() == {f"metric {name}" for name in ASKED}
    text = along_run(points).iloc[-1].map(measured_text)
    assert (text["MA"] == "not measurable") == (points.two_hop.iloc[0] < 60)
    assert text["UA"] != "not measurable"
