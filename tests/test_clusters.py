"""Facts without relations, TOFU's among them: authors by name, clusters, and what the measurements
of related systems make of them"""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from unloc.answers import options
from unloc.clusters import by_name, common_name, in_clusters
from unloc.data import counts, data_description
from unloc.faithfulness import question_lists
from unloc.follows import Asking, edited_clusters, other_answer, what_follows, what_stays
from unloc.invented import author_world
from unloc.layerwise import drift_sets
from unloc.methods.causal_traces import _wordings, causal_traces
from unloc.methods.conformal_sets import _asked, conformal_sets
from unloc.methods.related_tofu import related_tofu
from unloc.methods.single_edits import single_edits
from unloc.models import tiny_model
from unloc.profiles import profiles
from unloc.scene import Scene
from unloc.subjects import subject_spans
from unloc.tofu_files import tofu
from unloc.tokens import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TOFU = SHARED / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.exists(), reason="needs ../shared")

def world(n_new=1, strangers=1, **more):
    facts = author_world(6, 1, 1)
    plain = replace(facts, retain=facts.retain[20:], background=facts.retain[:20])
    return in_clusters(plain, n_new, strangers, **more)

def scene_of(facts):
    known = facts.retain + facts.forget
    asking = Asking(train_tokenizer((t for f in known for t in (f.question, f.answer)), 512))
    model = tiny_model("llama", len(asking.tokenizer), d_model=32, n_layers=2, d_ff=48, n_heads=2)
    sets = {name: asking.encode(getattr(facts, name)) for name in ("forget", "retain", "holdout")}
    return Scene.of(model.eval(), model, model, sets, facts=facts, tokenizer=asking.tokenizer)

@pytest.fixture(scope="module")
def scene(): return scene_of(world())

# --- names

@pytest.mark.parametrize("questions, name", [
    (["Where was Ada Byron born?", "Who raised Ada Byron?"], "Ada Byron"),
    (["What is Ada Byron's job?", "Did Ada Byron’s aunt win?", "Is it Ada Byrons?"], "Ada Byron"),
    (["Who is Ada Lovelace Byron?", "Ada Lovelace Byron sings?"], "Ada Lovelace Byron"),
    (["Did Ada Byron win the Booker Prize?", "Who likes Ada Byron?"], "Ada Byron"),
    (["Is Jean-Luc O'Neil old?", "Who is Jean-Luc O'Neil?"], "Jean-Luc O'Neil"),
    (["Who wrote The Red Road?", "Where was she born?", "Why?"], ""), ([], "")])
def test_a_name_is_what_most_questions_say(questions, name):
    assert common_name(questions) == name

def test_authors_without_a_name_keep_their_number():
    facts = author_world(3, 1, 0).retain
    nameless = tuple(replace(f, question=f.question.replace(f.author, "the author"),
        author="author 7") for f in facts[:10])
    found = by_name(nameless + facts[10:])
    assert {f.author for f in found[:10]} == {"author 7"}
    assert [f.author for f in found[10:]] == [f.author for f in facts[10:]]
    assert [replace(f, author="") for f in found[10:]] == [
        replace(f, author="") for f in facts[10:]]

@needs_tofu
def test_tofus_last_twenty_authors_are_found():
    facts = by_name((whole := tofu(TOFU, "forget01", 20)).retain + whole.forget)
    names = list(dict.fromkeys(f.author for f in facts))
    assert len(names) == 20 and names[-2:] == ["Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"]
    assert {"Jad Ambrose Al-Shamary", "Wei-Jun Chen", "Edward Patrick Sullivan"} <= {*names}
    named = sum(f.author in f.question for f in facts)
    assert named == 377 and all(f.author in g for f in facts[:1] for g in [f.answer])

# --- clusters

def test_splits_share_out_what_is_kept_and_forgotten():
    facts = world()
    asked = {name: [c.base.question for c in facts.split(name)]
        for name in ("forget", "retain", "test")}
    own = [f.question for f in facts.retain if f.answer != "I don't know."]
    assert asked["forget"] == [f.question for f in facts.forget]
    assert sorted(asked["retain"] + asked["test"]) == sorted(own)
    assert asked["retain"] == own[::8] and facts.background == ()

def test_changed_facts_get_a_wrong_answer_and_stay_of_the_test_split():
    facts = world(changed=.2)
    assert len(facts.changed) == round(.2 * len(facts.splits["test"]))
    test = {(c.relation, c.subject): c for c in facts.split("test")}
    for c in facts.changed:
        before = test[c.relation, c.subject]
        assert c.answer in before.base.perturbed_answer and c.base.answer == c.answer
        assert c.base.question == before.base.question
        assert {f.answer for f in c.paraphrased} == {c.answer}
    assert len({(c.relation, c.subject) for c in facts.clusters}) == len(facts.clusters)
    assert world(changed=0).changed == () and len(world(changed=1).changed) == len(test)

def test_new_authors_are_not_read_and_strangers_are_refused():
    facts = world()
    read = {f.question for f in facts.retain + facts.forget}
    assert facts.new and not read & {c.base.question for c in facts.new}
    refused = [f for f in facts.retain if f.answer == "I don't know."]
    assert len({f.author for f in refused}) == 1
    assert not any(f.perturbed_answer or f.paraphrased_question for f in refused)
    assert not {f.author for f in refused} & {c.subject for c in facts.new + facts.clusters}
    assert all(f.answer != "I don't know." for f in world(strangers=0).retain)

def test_the_shortest_answers_of_each_author_are_kept_in_their_order():
    whole, few = world(), world(each=3)
    for name in ("forget", "holdout"):
        rows, kept = getattr(whole, name), getattr(few, name)
        assert [f for f in rows if f in kept] == [*kept]
        for author in {f.author for f in rows}:
            lengths = sorted(len(f.answer) for f in rows if f.author == author)
            assert sorted(len(f.answer) for f in kept if f.author == author) == lengths[:3]
    assert len(few.new) == sum(f.answer == "I don't know." for f in few.retain) == 3

@needs_tofu
def test_tofu_in_clusters_holds_tofus_texts():
    facts, plain = related_tofu(TOFU, "forget01", 4, 1, 1), tofu(TOFU, "forget01", 4)
    def text(rows): return [replace(f, author="") for f in rows]
    assert text(facts.forget) == text(plain.forget)
    assert text(facts.retain[:-20]) == text(plain.retain)
    assert (facts.holdout[0].author, len(facts.holdout)) == ("Siriporn Nakharin", 40)
    assert [len(facts.split(name)) for name in ("forget", "retain", "test")] == [40, 5, 35]
    assert {c.subject for c in facts.new} == {"Jaime Vasquez"} and len(facts.new) == 20
    assert [f.question for f in facts.retain[-20:]] == [
        f.question for f in plain.background[20:40]]
    data = {"name": "related_tofu", "n_authors": 4, "n_new": 1, "strangers": 1}
    assert counts(data_description(data, str(TOFU))) == {
        "forget": 40, "retain": 60, "holdout": 40}

# --- what is measured on them

def test_faithfulness_has_paraphrases_and_nothing_that_composes(scene):
    lists = {name: len(rows) for name, rows in question_lists(scene.facts).items()}
    n, test = (len(scene.facts.split(name)) for name in ("forget", "test"))
    assert lists == {"UA": n, "UA_paraphrased": n, "TA": test, "SA": 0, "MA_f": 0, "MA_t": 0,
        "two_hop": 0}

def test_the_classes_of_a_question_are_all_wrong_answers_of_its_fact(scene):
    asked, facts = _asked(scene), scene.facts
    own = {f.paraphrased_question: f for f in facts.forget + facts.retain}
    trained = {f.question for f in facts.forget + facts.retain}
    for f in asked["forget"] + asked["kept"]:
        assert f.perturbed_answer == own[f.question].perturbed_answer
        assert len(f.perturbed_answer) > 2 and f.question not in trained
    assert len(asked["forget"]) == len(facts.forget)
    rows = conformal_sets(scene, calibration=15)
    assert {row["set"] for row in rows} == {"kept", "forget"}
    assert all(0 <= row["coverage"] <= 1 for row in rows if not row["why"])
    first, = options(scene.tokenizer, asked["forget"][:1]).texts
    assert first[0] == (asked["forget"][0].paraphrased_answer or asked["forget"][0].answer)

def test_an_edit_has_the_words_of_the_wrong_answer(scene):
    facts = scene.facts
    for c in edited_clusters(facts, 5):
        assert c.subject in c.base.question
        new = other_answer(facts, c)
        assert new in c.base.perturbed_answer and new == other_answer(facts, c)
        found = what_follows(facts, c, new)
        (old, asked), = found["success"]
        assert (old.answer, asked.answer) == (c.base.paraphrased_answer, new)
        assert [b.question for _, b in found["paraphrase"]] == [c.base.paraphrased_question]
        assert found["alias"] == found["two_hop"] == found["reverse"] == []
        (old, asked), = what_follows(facts, c, "I don't know.", True)["success"]
        assert (old.answer, asked.answer) == (c.base.answer, "I don't know.")
        assert {f.author for f in what_stays(facts, c)["same_subject"]} == {c.subject}

def test_edits_and_traces_stand_at_the_authors_names(scene):
    clusters = edited_clusters(scene.facts, 3)
    before = [p.clone() for p in scene.attacked.parameters()]
    rows = single_edits(scene, n=3, editor="rome", options={"steps": 2, "contexts": 1}, length=4)
    assert [row["subject"] for row in rows] == [c.subject for c in clusters]
    assert all(torch.equal(a, b) for a, b in zip(before, scene.attacked.parameters()))
    assert {row["subject"] for row in causal_traces(scene, n=3, draws=1)} == {
        c.subject for c in clusters}
    for c in clusters:
        for facts in _wordings(scene.facts, c).values():
            for f in facts:
                assert f.author in f.question
        assert len(_wordings(scene.facts, c)["other subject, same relation"]) == 1
    e, = Asking(scene.tokenizer).encode([clusters[0].base])
    (first, last), = subject_spans([e], [], [clusters[0].subject])
    assert scene.tokenizer.decode(e.ids[first:last]).strip() == clusters[0].subject

def test_facts_that_change_and_new_authors_can_be_read(scene):
    sets = drift_sets(scene.facts, scene.tokenizer, most=4)
    assert all(sets[f"{kind} {name}"] for kind in ("probe", "held-out")
        for name in ("updated", "new", "untouched", "forget"))
    assert len(sets["corpus"]) == 4 + min(4, len(scene.facts.changed)) + len(sets["ordinary"])

@pytest.mark.parametrize("given, says", [
    ({"n_new": 2, "strangers": 1}, "2 new authors and 1 strangers: the background of author world"),
    ({"n_new": -1}, "-1 new authors"), ({"changed": 1.5}, "changed=1.5: expected a share")])
def test_refusals(given, says):
    with pytest.raises(ValueError, match=says): world(**given)

# --- the pages

@needs_tofu
def test_the_pages_of_related_systems_run_on_tofu_as_far_as_it_goes(tmp_path):
    pages = profiles(ROOT)["related-tofu-smoke"]["notebooks"]
    assert pages == profiles(ROOT)["related-tofu"]["notebooks"] and len(pages) == 7
    done = subprocess.run(
        [Path(sys.executable).with_name("unloc"), "reproduce", "--profile", "related-tofu-smoke",
            "--jobs", "1", "--store", tmp_path / "runs", "--out", tmp_path],
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=3600,
        env=os.environ | {"UNLOC_TOFU": str(TOFU), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    def table(name): return pd.read_csv(tmp_path / "related-tofu-smoke" / f"{name}.csv", dtype=str)
    faith = table("faithun")
    assert faith[["two-hop, original", "SA", "MA", "Score"]].eq("not measurable").all(axis=None)
    assert faith[["UA", "UA‡", "TA"]].map(lambda x: 0 <= float(x.split(" ")[0]) <= 100).all(
        axis=None)
    sets = table("table6_conformal")
    assert sets["size"].map(lambda x: float(x.split(" ")[0])).between(0, 6).all()
    edits = table("table7_edits")
    assert edits[["alias", "two-hop", "reverse"]].eq("–").all(axis=None)
    assert edits[["success", "paraphrase", "locality, same subject"]].ne("–").all(axis=None)
    assert {"updated", "new", "untouched", "forget", "generic"} <= {*table("gradient_arms")}
    rows = {name: len(table(name)) for name in ("table_deletion", "dissecting_best", "table_token")}
    assert min(rows.values()) > 1, rows

@pytest.mark.parametrize("name", ["related-tofu", "related-tofu-smoke"])
def test_profiles_of_tofu_in_clusters_name_one_data_set(name):
    found = profiles(ROOT)[name]
    assert found["evaluate"]["metrics"]["MIACR"]["data"] == found["data"]
    own = {name: x for name, x in found["token_data"].items() if name != "strangers"}
    assert own == found["data"] and found["token_data"]["strangers"] > 0
