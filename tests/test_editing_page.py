"What follows from an edit, single edits that are taken back, and localizers made of editors."

import math

import pandas as pd
import pytest
import torch

from unloc.change import edited
from unloc.follows import (Asking, all_vectors, edit_numbers, edited_clusters, other_answer,
    tokens_before, what_follows, what_stays)
from unloc.methods.single_edits import single_edits
from unloc.models import output_projections, tiny_model, value_vectors
from unloc.neurons import above_share, attribution
from unloc.register import find
from unloc.regions import Region
from unloc.related import correlation_cell, edit_table, success_against_trace
from unloc.relations import make_related_world
from unloc.scene import Scene, toy_facts, toy_model
from unloc.tokens import train_tokenizer

@pytest.fixture(scope="module")
def scene():
    facts = make_related_world(n_people=12, n_cities=4, n_countries=3, n_employers=4, n_new=0)
    known = facts.retain + facts.forget
    texts = (text for f in known for text in (f.question, f.answer))
    asking = Asking(train_tokenizer(texts, 512))
    model = tiny_model("llama", len(asking.tokenizer), d_model=32, n_layers=2, d_ff=48, n_heads=2)
    sets = {name: asking.encode(getattr(facts, name)) for name in ("forget", "retain")}
    return Scene.of(model.eval(), model, model, sets, facts=facts, tokenizer=asking.tokenizer)

@pytest.fixture(scope="module")
def toys():
    facts, others = toy_facts(6, 11, 12), toy_facts(12, 13, 14)
    return toy_model(facts, others), facts, others

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))

# --- what follows

def test_two_hops_lead_to_what_is_true_of_the_new_answer(scene):
    facts, found = scene.facts, 0
    for c in facts.clusters:
        new = other_answer(facts, c)
        assert new in facts.answers(c.relation) and new not in (c.answer, c.subject)
        for old, asked in what_follows(facts, c, new)["two_hop"]:
            chain = next(x for x in facts.chains if x.first.name == c.relation)
            said = {chain.second.trained[0].format(subject=new)}
            known = next(f.answer for f in facts.retain if f.question in said)
            ends = [a for a in facts.answers(chain.second.name)
                if chain.second.statement.format(subject=new, answer=a) == known]
            assert asked.answer == chain.statement.format(subject=c.subject, answer=ends[0])
            found += 1
    assert found

def test_a_couple_is_asked_from_the_other_side(scene):
    facts = scene.facts
    c = next(c for c in facts.clusters if c.relation == "spouse")
    new = other_answer(facts, c)
    (old, asked), = what_follows(facts, c, new)["reverse"]
    assert new in asked.question and c.subject in asked.answer and c.subject not in old.answer

def test_what_stays_is_about_nothing_that_is_edited(scene):
    facts = scene.facts
    for c in edited_clusters(facts, 5):
        stays = what_stays(facts, c, 4)
        assert all(f.author == c.subject and f != c.base for f in stays["same_subject"])
        assert len(stays["other"]) == 4 and not any(f.author == c.subject for f in stays["other"])

def test_a_sentence_in_place_of_an_answer_has_no_two_hops(scene):
    c = next(c for c in scene.facts.clusters if c.two_hop)
    follows = what_follows(scene.facts, c, "I don't know.", True)
    assert follows["two_hop"] == follows["reverse"] == []
    assert {new.answer for pairs in follows.values() for _, new in pairs} == {"I don't know."}

def test_locality_is_agreement_and_not_correctness(scene):
    asking, c = Asking(scene.tokenizer), edited_clusters(scene.facts, 1)[0]
    before = tokens_before(scene.attacked, asking, what_stays(scene.facts, c))
    found = edit_numbers(scene.attacked, asking, {}, before) # untrained: nothing is right
    assert found == {"same_subject": 1., "other": 1.}

# --- single edits

@pytest.mark.parametrize("editor", ["none", "ft_l", "ft_m", "rome", "memit", "alphaedit", "kn"])
def test_an_edit_is_taken_back(scene, editor):
    before = all_vectors(scene.attacked)
    options = {"steps": 2} | ({"contexts": 1} if editor in ("rome", "memit", "alphaedit") else {})
    rows = single_edits(scene, editor=editor, n=2, length=4,
        options={} if editor == "none" else options)
    assert same(before, all_vectors(scene.attacked)) and len(rows) == 2
    for row in rows:
        assert 0 <= row["success"] <= 1 and row["layer"] == -1 and row["fluency"] >= 0
        assert (editor == "none") == ("hit_before" not in row)

def test_an_edit_that_fails_to_be_measured_is_taken_back(scene, monkeypatch):
    import unloc.methods.single_edits as page
    before = all_vectors(scene.attacked)
    def fail(*_): raise RuntimeError("broken")
    monkeypatch.setattr(page, "continuation", fail)
    with pytest.raises(RuntimeError, match="broken"):
        single_edits(scene, editor="ft_m", n=1, options={"steps": 2})
    assert same(before, all_vectors(scene.attacked))

def test_a_named_layer_is_the_one_that_is_edited(scene):
    rows = single_edits(scene, editor="ft_m", n=1, layers=[1, 0], length=4, options={"steps": 1})
    assert [row["layer"] for row in rows] == [0, 1]

@pytest.mark.parametrize("how, message", [
    (dict(layers=[5]), "layer 5 is not in the model; its layers are 0 to 1"),
    (dict(n=0), "n must be at least 1, got 0"),
    (dict(editor="nobody"), "unknown editor 'nobody'"),
    (dict(options={"speed": 1}), "editor rome has no option 'speed'")],
    ids=["layer", "n", "editor", "option"])
def test_edits_that_cannot_be(scene, how, message):
    with pytest.raises(ValueError, match=message): single_edits(scene, **{"n": 1} | how)

# --- knowledge neurons

def neurons(model, e, **how):
    scores = torch.stack([attribution(model, e, i, 3).scores for i in range(4)])
    return above_share(scores, **how)

def test_erasing_sets_the_neurons_of_a_fact_to_zero_and_nothing_else(toys):
    model, facts, _ = toys
    kept, before = neurons(model, facts[0], share=.3), all_vectors(model)
    change, _ = edited(find("editor", "kn"), model, None, {"steps": 3, "threshold": .3},
        forget=facts[:1])
    after = all_vectors(model)
    change.at(0)
    for layer, mask in enumerate(kept.mask):
        assert bool((after[layer][:, mask] == 0).all())
        assert torch.equal(after[layer][:, ~mask], before[layer][:, ~mask])
    assert same(before, all_vectors(model))

def test_a_region_bounds_the_erasure(toys):
    model, facts, _ = toys
    region = Region.sample((4, 192), .3, 0)
    before = all_vectors(model)
    change, digest = edited(find("editor", "kn"), model, region, {"steps": 3}, forget=facts[:2])
    after = all_vectors(model)
    change.at(0)
    moved = torch.stack([(a != b).any(0) for a, b in zip(before, after)])
    assert digest and moved.any() and not (moved & ~region.mask).any()

@pytest.mark.parametrize("threshold", [1., -.1])
def test_thresholds_that_cannot_be(toys, threshold):
    model, facts, _ = toys
    with pytest.raises(ValueError, match="share must lie in"):
        edited(find("editor", "kn"), model, None, {"steps": 1, "threshold": threshold},
            forget=facts[:1])

# --- localizers made of editors and traces

@pytest.mark.parametrize("name", ["knowledge_neurons", "edit_size", "traced"])
def test_scores_are_one_a_value_vector_and_leave_the_model_alone(toys, name):
    model, facts, others = toys
    before = all_vectors(model)
    scores = find("localizer", name)(model=model, forget=facts[:2], retain=others, seed=0,
        options={} if name == "traced" else {"steps": 2})
    assert scores.shape == (4, 192) and scores.dtype == torch.float32
    assert bool(scores.isfinite().all()) and same(before, all_vectors(model))
    assert len(value_vectors(output_projections(model)[0])) == before[0].shape[0]

ALONE = {"edit_size": {"steps": 2}, "knowledge_neurons": {"steps": 2}, "traced": {}}

@pytest.mark.parametrize("name", ALONE)
def test_progress_rises_to_one_and_an_empty_set_is_refused(toys, name):
    (model, facts, others), seen = toys, []
    given = dict(model=model, retain=others, seed=0, options=ALONE[name])
    find("localizer", name)(forget=facts[:3], progress=seen.append, **given)
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) >= 3
    with pytest.raises(ValueError, match="the forget set is empty"):
        find("localizer", name)(forget=[], **given)

@pytest.mark.parametrize("name", ALONE)
def test_training_mode_and_gradients_are_left_as_they_were(toys, name):
    model, facts, others = toys
    given = dict(forget=facts[:2], retain=others, seed=0, options=ALONE[name])
    want = find("localizer", name)(model=model, **given)
    model.train()
    try:
        with torch.no_grad(): got = find("localizer", name)(model=model, **given)
        assert model.training and all(p.grad is None and p.requires_grad for p in
            model.parameters())
    finally: model.eval()
    assert torch.equal(got, want) and not got.requires_grad

@pytest.mark.parametrize("name", ALONE)
def test_a_score_that_is_no_number_is_refused(name):
    model = tiny_model("llama", 60, d_model=16, n_layers=2, d_ff=24, n_heads=2)
    facts, others = toy_facts(2, 11, 12), toy_facts(6, 13, 14)
    with torch.no_grad(): output_projections(model)[1].weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN|no number"):
        find("localizer", name)(model=model, forget=facts, retain=others, seed=0,
            options=ALONE[name])

def test_a_trace_needs_a_subject(toys):
    model, facts, others = toys
    with pytest.raises(ValueError, match="has no subject"):
        find("localizer", "traced")(model=model, forget=facts[:1], retain=others[:1], seed=0,
            options={"at": "subject"})

# --- the tables

def edits():
    return pd.DataFrame({"arch": "llama", "editor": "rome", "subject": [*"abcdef"],
        "fact": range(6), "layer": [0] * 6, "success": [1., 1, 0, 1, 0, 0],
        "two_hop": [1.] + [math.nan] * 5})

def test_a_part_that_no_fact_has_is_a_dash_and_two_hops_may_not_be_measurable():
    row = edit_table(edits().assign(alias=math.nan)).iloc[0]
    assert row["success"].startswith("0.50 [") and row["alias"] == "–"
    assert row["two-hop"] == "1.00 (n 1)"
    assert edit_table(edits(), False).iloc[0]["two-hop"] == "not measurable"

def test_means_of_layers_are_no_evidence():
    two = pd.concat([edits(), edits().assign(layer=1, success=1.)])
    effect = [.5, .4, .5, .4, .4, .4] # as large where the edit succeeds as where it does not
    two = two.assign(effect=effect + [x + .4 for x in effect])
    found = success_against_trace(two, two[["arch", "fact", "subject", "layer", "effect"]])
    whole = float(correlation_cell(found, "effect", "success", 100)["correlation"])
    within = float(correlation_cell(found, "effect in layer", "success in layer",
        100)["correlation"])
    assert whole > .4 and abs(within) < .01
    with pytest.raises(ValueError, match="6 of 12 edits have no trace"):
        success_against_trace(two, two[two.layer == 0][["arch", "fact", "subject", "layer",
            "effect"]])
