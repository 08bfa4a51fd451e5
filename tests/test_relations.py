"""Facts that hang together: counts are exact, every answer follows from the graph, what is held out
is stated nowhere, and a world without structure comes through the same door."""
import hashlib, inspect, os, re, subprocess, sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
import pytest
from unloc.data import counts, data_description
from unloc.facts import Benchmark, Fact
from unloc.invented import author_world
from unloc.methods.related_world import related_world
from unloc.register import find
from unloc.relations import (
    ALIAS, CHAINS, OF_PEOPLE, OF_PLACES, SPLITS, WRONG, Chain, Cluster, RelatedBenchmark, Relation,
    as_related, closed_answers, follow, make_related_world, split_sizes, subject_span,
    with_closed_answers)
from unloc.tofu_files import tofu

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("UNLOC_SHARED", ROOT.parent / "shared"))
TOFU = SHARED / "data" / "tofu"
LISTS = "paraphrased", "two_hop", "same_answer", "alias", "backwards"
HELD_OUT = tuple(name for name in LISTS if name != "same_answer")
SMALL = dict(n_people=12, n_cities=4, n_countries=3, n_employers=3, n_new=2, forget=.2)

@pytest.fixture(scope="module")
def world(): return make_related_world()

@pytest.fixture(scope="module")
def small(): return make_related_world(**SMALL)

def said(cluster, *lists): return [fact for name in lists for fact in getattr(cluster, name)]
def every(world):
    own = chain(world.clusters, world.changed, world.new)
    return [f for c in own for f in (*c.trained, *said(c, *LISTS))]
def digest(value): return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

# --- the same everywhere

def test_the_author_world_is_untouched():
    assert type(author_world()) is Benchmark
    assert digest(author_world()) == "16785d7f2169ddf1"

def test_the_default_world_never_changes(world):
    assert digest(world) == "8aead938c59d1873"

def test_the_world_does_not_depend_on_the_process(small):
    code = (
        "from unloc.relations import make_related_world; import hashlib;"
        f" w = make_related_world(**{SMALL!r});"
        " print(hashlib.sha256(repr(w).encode()).hexdigest()[:16])")
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", cwd=ROOT)
        assert done.stdout.strip() == digest(small), done.stderr

def test_the_import_is_light():
    code = (
        "import sys, unloc.relations; print([m for m in ('torch', 'numpy', 'pandas',"
        " 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8",
        cwd=ROOT)
    assert done.stdout.strip() == "[]", done

def test_seeds_differ(small):
    others = [make_related_world(**SMALL, seed=s) for s in (1, 2)]
    assert len({w.forget for w in (small, *others)}) == 3
    assert len({w.world_facts for w in (small, *others)}) == 1

# --- counts

def test_the_default_world_has_exact_counts(world):
    assert {k: len(v) for k, v in world.things.items()} == dict(
        person=128, alias=128, newcomer=8, city=16, country=8, employer=16, language=8, pet=8,
        colour=8)
    assert len(world.clusters) == 5 * 128 + 64 == 704
    assert Counter(c.relation for c in world.clusters) == dict(
        born_in=128, works_for=128, speaks=128, pet=128, colour=128, spouse=64)
    assert {k: len(v) for k, v in world.splits.items()} == dict(
        forget=35, retain=70, test=492, unused=107)
    trained = 3 * 704 + 704 // 2 + 2 * 128 // 2 + 64 // 2
    assert sum(len(c.trained) for c in world.clusters) == trained == 2624
    grounds = 3 * (16 + 16) + 4 * 128
    assert len(world.forget) + len(world.retain) == trained + grounds == 3232
    assert len(world.forget) == sum(len(c.trained) for c in world.split("forget")) == 130
    assert len(world.holdout) == 8 * 5 * 3 == sum(len(c.trained) for c in world.new)
    assert len(world.changed) == int(.1 * (492 - 45)) == 44 and len(world.new) == 40

def test_held_out_questions_have_exact_counts(world):
    found = {name: sum(len(getattr(c, name)) for c in world.clusters) for name in LISTS}
    assert found == dict(
        paraphrased=704, two_hop=2 * 64, same_answer=found["same_answer"], alias=352, backwards=32)
    assert all(1 <= len(c.same_answer) <= 2 for c in world.clusters)
    assert all(len(c.paraphrased) == 1 for c in (*world.clusters, *world.changed, *world.new))

@pytest.mark.parametrize("n, sizes, unused", [
    (664, (33, 66, 464), 101), (100, (5, 10, 70), 15), (22, (1, 2, 15), 4), (3, (1, 0, 2), 0)])
def test_splits_are_rounded_down_as_faithuns_are(n, sizes, unused):
    assert tuple(split_sizes(n).values()) == sizes and n - sum(sizes) == unused

def test_splits_hold_their_share_of_every_relation_and_of_two_hops(world):
    whole = Counter(c.relation for c in world.clusters)
    for name in SPLITS:
        share = len(world.splits[name]) / len(world.clusters)
        own = Counter(c.relation for c in world.split(name))
        assert all(abs(own[r] - share * n) < 2 for r, n in whole.items()), (name, own)
        hops = sum(len(c.two_hop) for c in world.split(name))
        assert abs(hops - share * 128) < 2, (name, hops)

@pytest.mark.parametrize("share, two_hop, backwards", [(0., 24, 6), (.5, 12, 3), (1., 0, 0)])
def test_what_is_composed_is_no_question(share, two_hop, backwards):
    world = make_related_world(**SMALL, composed=share)
    assert sum(len(c.two_hop) for c in world.clusters) == two_hop
    assert sum(len(c.backwards) for c in world.clusters) == backwards

@pytest.mark.parametrize("share", [0., .25, 1.])
def test_other_names_are_trained_in_a_share(share):
    world = make_related_world(**SMALL, aliased=share)
    assert sum(len(c.alias) for c in world.clusters) == 66 - int(66 * share)

# --- what is true

def graph_of(world): # read from the facts to keep and the clusters
    graph = {(c.relation, c.subject): c.answer for c in (*world.clusters, *world.new)}
    for relation in (*OF_PLACES, ALIAS):
        for subject in world.things[relation.subjects]:
            asked = relation.questions[0].format(subject=subject)
            fact = next(f for f in world.retain if f.question == asked)
            right = [a for a in world.answers(relation.name)
                     if fact.answer == relation.statement.format(subject=subject, answer=a)]
            graph[relation.name, subject], = right
    return graph

def test_every_answer_follows_from_the_graph(small):
    graph = graph_of(small)
    for c in (*small.clusters, *small.new):
        r = small.relation(c.relation)
        right = r.statement.format(subject=c.subject, answer=graph[r.name, c.subject])
        assert {f.answer for f in (*c.trained[:3], *c.paraphrased)} == {right}
        assert [f.question for f in (*c.trained[:3], *c.paraphrased)] == [
            q.format(subject=c.subject) for q in r.questions]
        chains = [x for x in CHAINS if x.first.name == r.name]
        for x, f in zip(chains, c.two_hop):
            final = graph[x.second.name, graph[x.first.name, c.subject]]
            assert f.answer == x.statement.format(subject=c.subject, answer=final)
            assert final in small.answers(x.second.name)
        for f in c.backwards:
            assert (f.author, f.answer) == (c.answer, f"{c.answer} is married to {c.subject}.")
        for f in c.alias:
            assert f.author == graph["alias", c.subject]
            assert f.answer == right.replace(c.subject, f.author)

def test_answers_are_dealt_evenly(world):
    for r in (*OF_PEOPLE[:-1], *OF_PLACES):
        graph = graph_of(world)
        of = [a for (name, who), a in graph.items() if name == r.name and who not in
              world.things["newcomer"]]
        counted = Counter(of)
        assert set(counted) <= set(world.answers(r.name))
        assert max(counted.values()) - min(counted.values()) <= 1
    couples = [(c.subject, c.answer) for c in world.clusters if c.relation == "spouse"]
    assert sorted(chain.from_iterable(couples)) == sorted(world.things["person"])

def test_wrong_answers_are_wrong_and_of_one_kind(small):
    graph = graph_of(small)
    for f in every(small):
        assert len({f.answer, *f.perturbed_answer}) == WRONG + 1
    for c in small.clusters:
        r = small.relation(c.relation)
        possible = {r.statement.format(subject=c.subject, answer=a) for a in small.answers(r.name)}
        assert set(c.base.perturbed_answer) < possible
        right = graph[r.name, c.subject]
        assert c.base.answer == r.statement.format(subject=c.subject, answer=right)

def test_the_same_answer_is_another_fact_that_is_kept(world):
    kept = set(world.retain)
    other = 0
    for c in world.clusters:
        for f in c.same_answer:
            assert f in kept and f.author != c.subject
            assert f.answer.endswith(f" {c.answer}.")
            other += f.question not in {x.base.question for x in world.clusters}
    assert other == 128 + 64, "for every city a company there; for every spouse the other name"

def test_what_changes_gets_another_answer_and_consequences(world):
    before = {(c.relation, c.subject): c for c in world.split("test")}
    graph, moved = graph_of(world), 0
    for c in world.changed:
        old, r = before[c.relation, c.subject], world.relation(c.relation)
        assert c.answer != old.answer and c.answer in world.answers(r.name)
        assert c.base.question == old.base.question and c.base.answer != old.base.answer
        for x, f in zip([x for x in CHAINS if x.first.name == r.name], c.two_hop):
            final = graph[x.second.name, c.answer]
            assert f.answer == x.statement.format(subject=c.subject, answer=final)
            moved += f.answer != old.two_hop[0].answer
    assert moved, "some second hops end elsewhere"
    assert not {f.answer for c in world.changed for f in c.trained} & {
        f.answer for f in (*world.forget, *world.retain)}

def test_new_people_are_in_no_set_that_is_trained(world):
    names = set(world.things["newcomer"])
    assert {c.subject for c in world.new} == names
    for f in (*world.forget, *world.retain): assert not names & set(f.answer.rstrip(".").split())

# --- what is held out

def test_what_is_held_out_is_trained_nowhere(world):
    trained = {f.question for f in (*world.forget, *world.retain, *world.holdout)}
    asked = [f.question for c in (*world.clusters, *world.new) for f in said(c, *HELD_OUT)]
    assert len(set(asked)) == len(asked) and not trained & set(asked)

def test_no_kept_fact_states_what_is_to_be_forgotten(world):
    kept = {(f.author, f.answer) for f in world.retain}
    for c in world.split("forget"):
        stated = {(f.author, f.answer) for f in (*c.trained, *said(c, *HELD_OUT))}
        assert not stated & kept, c.base

def test_trained_questions_are_asked_once(world):
    asked = [f.question for f in (*world.forget, *world.retain, *world.holdout)]
    assert len(set(asked)) == len(asked)

def test_names_are_words_that_no_other_text_has(world):
    invented = [n for kind in ("person", "alias", "newcomer", "city", "country", "employer")
                for n in world.things[kind]]
    assert len(set(invented)) == len(invented) == 304
    other = world.real_authors + world.world_facts
    words = set(re.findall(r"\w+", " ".join(t for f in other for t in (f.question, f.answer))))
    assert not words & set(invented)

def test_every_fact_has_the_span_of_its_subject(small):
    for f in every(small):
        start, end = subject_span(f)
        assert f.question[start:end] == f.author

# --- closed answers

def test_closed_answers_hold_every_option(world):
    for c in world.clusters[::31]:
        fact = with_closed_answers(world, c)
        n = len(world.answers(c.relation)) - (c.relation == "spouse")
        assert len({fact.answer, *fact.perturbed_answer}) == n
        assert {*c.base.perturbed_answer} <= {*fact.perturbed_answer}

# --- through the same door

def test_a_data_set_without_structure_keeps_its_sets():
    plain = author_world(3, 1, 1)
    found = as_related(plain)
    assert all(getattr(found, n) == getattr(plain, n) for n in Benchmark.__dataclass_fields__)
    assert [len(found.split(name)) for name in SPLITS] == [10, 0, 20, 0]
    c = found.split("forget")[0]
    assert (c.base.question, c.paraphrased[0].question) == (
        plain.forget[0].question, plain.forget[0].paraphrased_question)
    assert c.base.perturbed_answer == plain.forget[0].perturbed_answer[:2]

@pytest.mark.skipif(not TOFU.exists(), reason="needs ../shared")
def test_tofu_comes_through_the_same_door(monkeypatch):
    monkeypatch.delenv("UNLOC_TOFU", raising=False)
    plain = tofu(str(TOFU), "forget01", 20)
    found = as_related(plain)
    assert found.forget == plain.forget and len(found.split("forget")) == 40
    assert len(found.split("test")) == 360
    asked = [f for c in found.clusters for f in (c.base, *c.paraphrased)]
    assert {len(f.perturbed_answer) for f in asked} == {2}
    assert not [c for c in found.clusters if c.two_hop or c.same_answer or c.alias or c.backwards]

def test_the_data_set_is_described_and_counted():
    given = {"name": "related_world"} | SMALL
    found = data_description(given)
    facts = make_related_world(**SMALL)
    assert found["sha256"] == hashlib.sha256(repr(facts).encode()).hexdigest()
    assert counts(found) == {
        "forget": len(facts.forget), "retain": len(facts.retain), "holdout": 30}
    assert data_description(given | {"seed": 1})["sha256"] != found["sha256"]

def test_the_defaults_of_the_data_set_are_those_of_the_function():
    a, b = (inspect.signature(f).parameters for f in (related_world, make_related_world))
    assert {n: p.default for n, p in a.items()} == {n: p.default for n, p in b.items()}
    assert find("dataset", "related_world").label == "Related world"

# --- what is refused

FACT = Fact("Who is it?", "It is Ada.")
ONE = Cluster("pet", "Ada", "gecko", (FACT,))
EMPTY = dict.fromkeys(("retain", "holdout", "real_authors", "world_facts", "refusals"), ())
BORN, WORKS, CITY = OF_PEOPLE[0], OF_PEOPLE[1], OF_PLACES[0]

@pytest.mark.parametrize("call, says", [
    (lambda: closed_answers(BORN, {"city": ("Rome",)}), (
        "relation born_in: 1 closed answers of kind 'city'; expected at least two: add things")),
    (lambda: closed_answers(BORN, {}), "relation born_in: 0 closed answers of kind 'city'"),
    (lambda: closed_answers(BORN, {"city": ("Rome", "Rome")}), "relation born_in: 1 closed"),
    (lambda: Chain(BORN, WORKS, "{subject}?", "{subject} {answer}."), (
        "no chain: born_in is answered with a city, and works_for is asked about a person; "
        "a two-hop question needs relations that meet: choose others")),
    (lambda: Chain(BORN, CITY, "Where?", "{subject} {answer}."), "'Where?' has 0 gaps {subject}"),
    (lambda: follow({}, "Ada", BORN, CITY), (
        "no chain from 'Ada': its born_in is not known; a two-hop question needs every step")),
    (lambda: follow({("born_in", "Ada"): "Rome"}, "Ada", BORN, CITY), (
        "no chain from 'Rome': its city_in is not known")),
    (lambda: subject_span(FACT), (
        "'Who is it?' has no span of its subject ''; expected the question to name it")),
    (lambda: subject_span(FACT, "Ada"), "'Who is it?' has no span of its subject 'Ada'"),
    (lambda: subject_span(replace(FACT, question="Adam?"), "Ada"), "has no span of its subject"),
    (lambda: Relation("x", "a", "b", ("{subject}?",), "{subject} {answer}"), (
        "relation x: 1 question forms; expected at least two")),
    (lambda: replace(BORN, questions=("Who?", "{subject}?")), "'Who?' has 0 gaps {subject}"),
    (lambda: replace(BORN, statement="{subject}."), "'{subject}.' has 0 gaps {answer}"),
    (lambda: replace(BORN, backwards=("{subject}?",)), "backwards has 1 texts; expected"),
    (lambda: Cluster("pet", "Ada", "gecko", ()), "the pet of 'Ada' has no trained fact"),
    (lambda: RelatedBenchmark("x", (FACT,), **EMPTY, clusters=(ONE,)), (
        "x: the splits hold 0 numbers for 1 clusters; expected each number from 0 once")),
    (lambda: RelatedBenchmark("x", (FACT,), **EMPTY, splits={"train": ()}), (
        "unknown split 'train'; known: forget, retain, test, unused")),
    (lambda: RelatedBenchmark("x", (), **EMPTY), "x, forget: no facts; expected at least one"),
    (lambda: make_related_world(**SMALL).answers("age"), "unknown relation 'age'; known: born_in"),
    (lambda: as_related(Benchmark("x", (FACT,), **EMPTY)), (
        "x: no fact to forget has 2 wrong answers; questions with three options need them")),
    *((lambda given=given: make_related_world(**given), says) for given, says in (
        ({"n_people": 3}, "n_people=3: expected an even number from 4 to 4096"),
        ({"n_people": 7}, "n_people=7: expected an even number from 4 to 4096"),
        ({"n_people": True}, "n_people=True: expected an even number"),
        ({"n_people": "8"}, "n_people='8': expected an even number"),
        ({"n_cities": 2}, "n_cities=2: expected a whole number from 3 to 1024"),
        ({"n_cities": 4}, "n_countries=8: expected a whole number from 3 to 4"),
        ({"n_employers": 2}, "n_employers=2: expected a whole number from 3 to 1024"),
        ({"n_new": -1}, "n_new=-1: expected a whole number from 0 to 1024"),
        ({"forget": .5}, "forget=0.5: expected a number from 0 to 0.2"),
        ({"composed": 2}, "composed=2: expected a number from 0 to 1"),
        ({"aliased": "x"}, "aliased='x': expected a number from 0 to 1"),
        ({"changed": float("nan")}, "changed=nan: expected a number from 0 to 1"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"))),
])
def test_what_makes_no_sense_is_one_line(call, says):
    with pytest.raises(ValueError) as error: call()
    assert says in str(error.value) and "\n" not in str(error.value)

@pytest.mark.parametrize("more", [
    dict(n_people=4, n_cities=3, n_countries=3, n_employers=3, n_new=0),
    dict(n_people=40, n_cities=60, n_countries=60, n_employers=100, n_new=1),
    dict(n_people=200, forget=.2, composed=1, aliased=0, changed=1)])
def test_unusual_sizes_make_a_world(more):
    world = make_related_world(**more)
    n = len(world.clusters)
    assert n == 5 * more["n_people"] + more["n_people"] // 2
    assert sum(map(len, world.splits.values())) == n and world.forget
    assert {f.author for f in every(world)} and len(world.new) == 5 * len(world.things["newcomer"])
