"""Runs of a sweep that share a model in one pass: the same results, each with its own end"""
import json, os, subprocess, sys, time

import pytest
import torch

from unloc.cluster import engine
from unloc.data import data_description
from unloc.joint import MOST, at_once, grouped, together
from unloc.profiles import project_root
from unloc.register import METHODS, execute_plugin
from unloc.runs import Store, on_this_machine, sweep
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.inject import injection, load_columns
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.teach import teaching
from unloc.steps.unlearn import localized_unlearning, unlearning

WORLD = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 2}
SHAPE = {"d_model": 48, "n_layers": 2, "d_ff": 256, "n_heads": 2, "vocab_size": 400}
LEARN = {"epochs": 2, "lr": 4e-3, "batch_size": 16}
INJECT = {"fraction": .1, "epochs": 40, "lr": 2e-2, "batch_size": 4}
HOW = {"lr": 2e-2, "epochs": 2}

@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("store"))

@pytest.fixture(scope="module")
def judged(store):
    shape = base_models(data_description(WORLD), "llama", SHAPE, LEARN, LEARN | {"epochs": 10})
    found = standard(shape, {"retain": 7, "utility": 3, "max_new_tokens": 4})
    store.do(found, compute)
    return found

def beside(store, folder): # a store with the same base, without what was built on it
    folder.mkdir()
    for run in store.root.iterdir():
        about = run / "description.json"
        if about.exists() and json.loads(about.read_text("utf-8"))["description"]["kind"] in (
            "base", "judge"):
            os.symlink(run, folder / run.name)
    return Store(folder)

def shared(run): # how many runs were computed with it
    return json.loads((run.path / "description.json").read_text("utf-8")).get("at_once", 1)

@pytest.fixture
def four(monkeypatch): monkeypatch.setenv("UNLOC_AT_ONCE", "4")

def near(a, b): # two runs of one description
    x, y = a.table(), b.table()
    assert list(x.columns) == list(y.columns) and len(x) == len(y)
    for name in x: assert x[name].tolist() == pytest.approx(
        y[name].tolist(), abs=.05 if name in ("MU", "FQ") else 5e-3, nan_ok=True), name
    assert a.json()["region"] == b.json()["region"]
    for layer, (index, columns) in load_columns(a).items():
        other, values = load_columns(b)[layer]
        assert torch.equal(index, other) and torch.allclose(columns, values, atol=2e-3)

def test_groups_give_what_runs_alone_give(store, judged, tmp_path, four):
    others = {"others": True}
    injected = [injection(judged, 0, INJECT), injection(judged, 1, INJECT | {"lr": 1e-2}),
        injection(judged, 2, INJECT | others)]
    asked = [unlearning(injected[0], "Oracle", "wga", HOW),
        unlearning(injected[1], "Random", "npo", HOW | {"epochs": 3}),
        unlearning(injected[2], "Wrong group", "rmu", HOW),
        unlearning(injected[2], "Oracle", "dpo", HOW),
        unlearning(injected[0], "All weights", "wga", HOW | {"lr": 1e-3})]
    taught = teaching(judged)
    asked += [localized_unlearning(localization(taught, name), .1, "wga", HOW, 0)
        for name in ("weight_norm", "activations")]
    asked += [localized_unlearning(localization(injected[0], "wanda"), .1, "wga", HOW, 0)]
    alone = sweep(store, asked, compute=compute)
    joint = sweep(beside(store, tmp_path / "joint"), asked, compute=together)
    for a, b in zip(alone, joint, strict=True):
        assert a.path.name == b.path.name
        near(a, b) if a.description.get("arm") != "All weights" else None
    assert [shared(run) for run in joint] == [4, 4, 4, 4, 1, 2, 2, 1]
    assert all(shared(run) == 1 for run in alone)
    sources = [json.loads((Store(tmp_path / "joint")[d].path / "result.json").read_text("utf-8"))
        for d in injected]
    for d, found in zip(injected, sources):
        usual = store[d].json()
        assert found["original"]["FS"] == pytest.approx(usual["original"]["FS"], abs=5e-3)
        assert found["locked_sha256"] == usual["locked_sha256"]
        assert found["membership"] == pytest.approx(usual["membership"], abs=.1)

def test_one_that_diverges_ends_alone(store, judged, tmp_path, four):
    injected = injection(judged, 0, INJECT)
    asked = [unlearning(injected, "Oracle", "wga", HOW | {"lr": lr}) for lr in (2e-2, 1e30)]
    first, second = sweep(beside(store, tmp_path / "s"), asked, compute=together)
    assert not first.diverged and "lower the learning rate" in second.diverged
    assert [shared(run) for run in (first, second)] == [2, 2]
    assert sorted(f.name for f in second.path.iterdir()) == [
        "description.json", "diverged.json", "manifest.json"]

def test_a_group_leaves_out_what_is_there(store, judged, tmp_path, four):
    injected = injection(judged, 0, INJECT)
    asked = [unlearning(injected, "Random", "wga", HOW, draw) for draw in range(3)]
    place = beside(store, tmp_path / "s")
    kept = place.do(asked[1], compute)
    stamp = (kept.path / "manifest.json").read_bytes()
    found = sweep(place, asked, compute=together)
    assert [shared(run) for run in found] == [2, 1, 2]
    assert (kept.path / "manifest.json").read_bytes() == stamp
    assert not list(place.root.glob("*.partial"))

def test_groups_travel_to_worker_processes(store, judged, tmp_path, four):
    injected = injection(judged, 0, INJECT)
    asked = [unlearning(injected, "Random", "wga", HOW, draw) for draw in range(6)]
    found = sweep(beside(store, tmp_path / "s"), asked, 2, together)
    assert [shared(run) for run in found] == [3] * 6 and engine() is on_this_machine

def test_an_objective_of_your_own_shares_passes(store, judged, tmp_path, four):
    source = tmp_path / "mine.py"
    source.write_text('''
from unloc.register import objective
from unloc.unlearning_run import Term
@objective(label="Softened", sets=2)
def softened(run, facts, power:float=.5):
    "Lower the likelihood of answers, by a power of it"
    return Term([facts], lambda answers: (power * answers[0] * answers[1]).exp().mean())
''', "utf-8")
    kept = dict(METHODS["objective"])
    try:
        execute_plugin(str(source), source.read_bytes())
        injected = injection(judged, 0, INJECT)
        asked = [unlearning(injected, arm, "softened", HOW | {"power": power})
            for arm, power in (("Oracle", .5), ("Random", .25))]
        joint = sweep(beside(store, tmp_path / "s"), asked, compute=together)
        for a, b in zip(sweep(store, asked, compute=compute), joint): near(a, b)
        assert [shared(run) for run in joint] == [2, 2]
    finally:
        METHODS["objective"].clear()
        METHODS["objective"].update(kept)

KILLED = """
import json, os, sys
from unloc.joint import together
from unloc.runs import Store, sweep
sweep(Store(sys.argv[1]), json.loads(open(sys.argv[2], encoding="utf-8").read()), compute=together)
"""

def test_a_killed_group_is_computed_again(store, judged, tmp_path, four):
    injected = injection(judged, 0, INJECT)
    asked = [unlearning(injected, arm, "wga", HOW | {"epochs": 200}) for arm in (
        "Oracle", "Random")]
    place, file = beside(store, tmp_path / "s"), tmp_path / "asked.json"
    place.do(injected, compute)
    file.write_text(json.dumps(asked), "utf-8")
    process = subprocess.Popen([sys.executable, "-c", KILLED, place.root, file])
    while process.poll() is None and len(list(place.root.glob("*.partial"))) < 2: time.sleep(.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert not any(d in place for d in asked)
    short = [unlearning(injected, arm, "wga", HOW) for arm in ("Oracle", "Random")]
    assert [shared(run) for run in sweep(place, short, compute=together)] == [2, 2]

@pytest.mark.parametrize("given", ["0", "many", "-3", "2.5", "5000"])
def test_a_number_that_is_none_is_one_line(monkeypatch, given):
    monkeypatch.setenv("UNLOC_AT_ONCE", given)
    with pytest.raises(ValueError, match="UNLOC_AT_ONCE must be a whole number from 1 to 1024"):
        at_once({"kind": "base", "_device": "cpu"})

def test_the_device_decides(monkeypatch):
    monkeypatch.delenv("UNLOC_AT_ONCE", raising=False)
    assert [at_once({"kind": "base", "_device": d}) for d in ("cpu", "cuda", "cuda:1")] == [
        1, MOST, MOST]

def test_runs_that_cannot_share_a_pass_stay_alone(judged, four):
    injected = injection(judged, 0, INJECT)
    assert [len(g) for g in grouped([judged, injected, injection(judged, 1, INJECT)])] == [1, 2]
    odd = [injection(judged, seed, INJECT | more) for seed in (0, 1) for more in (
        {"unit": "neuron"}, {"others": True})]
    assert [len(g) for g in grouped(odd)] == [1] * 4
    sizes = [unlearning(injected, "Oracle", "wga", HOW | {"batch_size": n}) for n in (2, 4, 4)]
    assert sorted(len(g) for g in grouped(sizes)) == [1, 2]
    whole = [unlearning(injected, arm, "wga", HOW) for arm in ("Projections", "All weights")]
    assert [len(g) for g in grouped(whole)] == [1, 1]
    weights = localization(teaching(judged), "wagle_weights")
    found = [localized_unlearning(weights, .1, "wga", HOW, seed) for seed in (0, 1)]
    assert [len(g) for g in grouped(found)] == [1, 1]

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_shares_passes_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("UNLOC_AT_ONCE", raising=False)
    base = base_models(
        data_description(WORLD), "llama", SHAPE, LEARN, LEARN | {"epochs": 10}, device="cuda")
    judged = standard(base, {"retain": 7, "utility": 3, "max_new_tokens": 4})
    asked = [unlearning(injection(judged, seed, INJECT), arm, "wga", HOW)
        for seed in range(2) for arm in ("Oracle", "Random")]
    assert [shared(run) for run in sweep(Store(tmp_path), asked, compute=together)] == [4] * 4


# --- what fits is said before anything is loaded

def small_plan(monkeypatch, tmp_path, memory, at_once="8"):
    from unloc import plan
    monkeypatch.setenv("UNLOC_AT_ONCE", at_once)
    here = plan.Machine("cpu", 2, memory, 2**40, 2**28, 1e11, 1e-4)
    page = next(project_root().glob("nbs/21_*.ipynb"))
    values = {"profile": "smoke", "seeds": 4}
    found = plan.plan("smoke", {page: values}, tmp_path / "runs", here=here)
    return {row.kind: row for row in found.rows}, here, plan.text_of(found)

def test_a_plan_says_how_many_regions_fit_into_one_pass(monkeypatch, tmp_path):
    from unloc import plan
    rows, here, text = small_plan(monkeypatch, tmp_path, 2**36)
    assert "unlearn: 8 runs in one pass need" in text and "fit, so" not in text
    row = rows["unlearn"]
    model, beside = plan._shares(row, here)
    assert model + beside == pytest.approx(row.peak)
    rows, here, text = small_plan(monkeypatch, tmp_path, model + 3.5 * beside)
    line = next(line for line in text.splitlines() if line.startswith("unlearn: 8 runs"))
    assert line.endswith("are free; 3 fit, so a pass holds 3")

def test_too_little_memory_for_one_run_stops_the_command_at_once(monkeypatch, tmp_path, capsys):
    from unloc import cli, plan
    monkeypatch.setenv("UNLOC_AT_ONCE", "8")
    monkeypatch.setattr(plan, "free_memory", lambda device: 2.**20)
    place = ["--store", str(tmp_path / "runs")]
    assert cli.main(["run", "--profile", "smoke", "--only", "21", *place]) == 1
    said = capsys.readouterr().err
    assert "a run needs" in said and "1 MiB are free" in said
    assert not [*(tmp_path / "runs").glob("*")], "nothing was begun"
