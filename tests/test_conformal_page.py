"Prediction sets of stored models, MIACR from a profile, and the tables of page 50."

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from unloc.answers import choices, options
from unloc.conformal import closed_probs, conformal_quantile, conformal_report
from unloc.evaluation import Probe, evaluate
from unloc.figures import label
from unloc.methods.conformal_sets import _asked, _logprobs, _rows, conformal_sets
from unloc.models import tiny_model
from unloc.profiles import profiles
from unloc.related import conformal_rows, conformal_table, with_controls, with_miacr
from unloc.relations import make_related_world
from unloc.scene import Scene
from unloc.scoring import score
from unloc.study import Study
from unloc.tokens import encode, train_tokenizer

ROOT = Path(__file__).parents[1]
SIZES = dict(n_people=12, n_cities=4, n_countries=3, n_employers=4, n_new=2)

@pytest.fixture(scope="module")
def scene():
    facts = make_related_world(**SIZES)
    known = facts.retain + facts.forget
    tokenizer = train_tokenizer((text for f in known for text in (f.question, f.answer)), 512)
    model = tiny_model("llama", len(tokenizer), d_model=32, n_layers=2, d_ff=48, n_heads=2).eval()
    sets = {name: [encode(tokenizer, f.question, f.answer) for f in getattr(facts, name)]
        for name in ("forget", "retain", "holdout")}
    return Scene.of(model, model, model, sets, facts=facts, tokenizer=tokenizer)

# --- the measurement

def test_rows_are_those_of_the_published_definitions(scene):
    generator = torch.Generator().manual_seed(0)
    kept, lost = (torch.rand(n, 5, generator=generator).double().log() * 3 for n in (60, 20))
    rows = {row["set"]: row for row in _rows([*kept], [*lost], .2, 40, 0)}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    probs = kept.softmax(1)
    qhat = conformal_quantile(1 - probs[order[:40], 0], .2)
    for name, some in (("kept", probs[order[40:]]), ("forget", lost.softmax(1))):
        report = conformal_report(some, torch.zeros(len(some), dtype=torch.int64), qhat)
        assert {k: rows[name][k] for k in report._fields} == pytest.approx(
            report._asdict(), nan_ok=True)
        assert rows[name]["qhat"] == qhat

def test_every_answer_of_the_relation_is_a_class_and_wordings_are_held_out(scene):
    asked, facts = _asked(scene), scene.facts
    trained = {f.question for f in facts.retain + facts.forget}
    for name, some in asked.items():
        assert some and not trained & {f.question for f in some}
    sizes = {len(facts.answers(c.relation)) for c in facts.split("forget")}
    assert {1 + len(f.perturbed_answer) for f in asked["forget"]} <= sizes | {n - 1 for n in sizes}
    assert len(asked["kept"]) + len(asked["forget"]) == len(facts.clusters)

def test_the_units_are_means_and_sums(scene):
    fact = _asked(scene)["forget"][0]
    right = options(scene.tokenizer, [fact], scene.template).answers[0][0]
    asked = choices(scene.tokenizer, [fact])
    found = _logprobs(scene.attacked, scene, [fact])
    n, nll = len(right.ids) - right.start, float(score(scene.attacked, [right]).nll[0])
    assert float(found["token"][0][0]) == pytest.approx(-nll)
    assert float(found["total"][0][0]) == pytest.approx(-nll * n)
    for unit in found:
        own = found[unit][0].softmax(0)
        assert torch.allclose(own, closed_probs(scene.attacked, asked, unit)[0], atol=1e-9)

def test_a_low_threshold_leaves_nothing_to_recover():
    sure = torch.tensor([[9., 0, 0]]).double().log_softmax(1).repeat(60, 1)
    lost = torch.tensor([[0., 1, 0], [0, 0, 2]]).double()
    rows = _rows([*sure], [*lost], .2, 40, 0)
    assert rows[1]["one_answer"] and rows[1]["recover"] == 0 and rows[1]["missed"] == 2

def test_nothing_is_read_off_a_calibration_that_does_not_hold():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(80, generator=generator) # as the measurement draws
    kept = torch.zeros(80, 4).double()
    kept[order[:40], 0] = 9. # those that calibrate are easy, the others are not
    rows = _rows([*kept], [*kept[:3]], .1, 40, 0)
    for row in rows:
        assert "calibration and fresh facts are not alike" in row["why"]
        assert all(math.isnan(row[name]) for name in ("coverage", "CR", "recover", "accuracy"))

@pytest.mark.parametrize("how, message", [
    (dict(calibration=900), "kept facts cannot be parted into 900"),
    (dict(alpha=1.5, calibration=30), "alpha must lie between 0 and 1"),
], ids=["too many", "alpha"])
def test_options_that_cannot_be(scene, how, message):
    with pytest.raises(ValueError, match=message): conformal_sets(scene, **how)

def test_facts_without_relations_are_refused(scene):
    with pytest.raises(ValueError, match="no closed relations"):
        conformal_sets(replace(scene, facts=None))

# --- MIACR from a profile

def test_strangers_of_a_data_set_are_those_given_as_tokens(scene):
    data = {"name": "related_world", **SIZES}
    tokens = [[list(e.ids), e.start] for e in scene.examples["holdout"]]
    def judged(**options):
        probe = Probe(scene.examples["forget"], scene.examples["retain"][:40],
            tokenizer=scene.tokenizer, metrics={"MIACR": {"alpha": .2} | options})
        return evaluate(scene.attacked, probe).point["MIACR"]
    assert judged(data=data) == pytest.approx(judged(holdout=tokens), nan_ok=True)
    with pytest.raises(ValueError, match="expected one data set for both"):
        judged(data=data | {"n_people": 8})

@pytest.mark.parametrize("name", ["related", "related-smoke"])
def test_profiles_of_the_related_world_name_one_data_set(name):
    found = profiles(ROOT)[name]
    assert found["evaluate"]["metrics"]["MIACR"]["data"] == found["data"]

def test_a_profile_judges_by_it_and_others_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    study = Study("related-smoke", store=str(tmp_path), jobs=1)
    assert "metric MIACR" in study.judged("llama")["code"]
    assert "metric MIACR" not in Study("smoke").judged("llama")["code"]
    study.sweep([study.judged("llama")])
    assert "MIACR" in study.retained["llama"]

# --- the tables

def frame():
    names = ["model", "set", "accuracy", "coverage", "CR", "recover"]
    rows = [("original", "forget", 1., 1., .5, math.nan), ("original", "kept", 1., .9, .45, 0.),
        ("retained", "forget", .25, .5, .2, .4), ("retained", "kept", 1., .9, .45, 0.)]
    found = pd.DataFrame(rows, columns=names).assign(arch="llama", unit="token", size=2.)
    return pd.concat([found.assign(seed=seed) for seed in (0, 1)], ignore_index=True)

def test_distance_is_paired_by_seed():
    origins = frame()
    origins.loc[(origins.model == "retained") & (origins.seed == 1), "CR"] = .4
    run = origins[origins.model == "original"]
    run = run.assign(model="measured", objective="ga", arm="Oracle")
    found = conformal_rows(with_controls(run, origins))
    own = found[found.objective == "ga"]
    assert own.distance.tolist() == pytest.approx([.3, .1])
    assert (found[found.objective == "retained"].distance == 0).all()
    table = conformal_table(found).set_index("objective")
    assert table.loc[label("objective", "ga"), "|CR − retained|"].startswith("0.20 ±")
    assert len(table) == 3

def test_miacr_of_each_model():
    found = conformal_rows(with_controls(
        frame()[:2].assign(model="measured", objective="ga", arm="Oracle"), frame()[:4]))
    curves = pd.DataFrame({"arch": "llama", "objective": "ga", "arm": "Oracle", "seed": 0,
        "epoch": [0, 1, 2], "MIACR": [.1, np.nan, .6], "MU": [.5, np.nan, .4], "FQ": np.nan})
    more = with_miacr(found, curves, {"llama": .9}).set_index("objective").MIACR
    assert (more["original"], more["retained"], more["ga"]) == (.1, .9, .6)
