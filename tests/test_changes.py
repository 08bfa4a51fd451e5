"""A change passes through both of its ends to the bit, on disk as well; an editor stays in its
region; an attack that somebody adds stands in the same table."""
import json
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from unloc import register
from unloc.change import Change, LowRank, compared
from unloc.data import data_description
from unloc.heads import Neurons
from unloc.masked import AllWeights, unlock
from unloc.models import region_shape, tiny_model
from unloc.regions import Region, region_size
from unloc.runs import Store, run_id
from unloc.scene import ENDS
from unloc.steps import compute
from unloc.steps.attack import USUAL_ATTACKS, attacking
from unloc.steps.base import base_models
from unloc.steps.edit import editing
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.teach import teaching
from unloc.steps.unlearn import unlearning

def llama(): return tiny_model("llama", 60, d_model=32, n_layers=2, d_ff=48, n_heads=2)
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
def bits(model):
    return {
        name: x.detach().clone().flatten().view(torch.uint8)
        for name, x in model.state_dict().items()}
def same(model, before): return all(torch.equal(x, before[name]) for name, x in bits(model).items())

# --- every form, on every layout

def moved(model, region): # what training through a region ends with
    with unlock(model, region) as columns:
        return {place: (index, x - .5) for place, (index, x) in columns.values().items()}
def weights(model):
    return Region(
        torch.rand(
            (2, 32, 48 if model.config.model_type == "llama" else 128),
            generator=torch.Generator().manual_seed(0))
        < .1)
FORMS = {
    "columns": lambda m: moved(m, Region.sample(region_shape(m), .2, 0)),
    "single weights": lambda m: moved(m, weights(m)),
    "all weights": lambda m: {name: x + 1 for name, x in AllWeights(m).values().items()},
    "low rank": lambda m: {
        name: LowRank(torch.ones(p.shape[0], 2), torch.ones(2, p.shape[1]))
        for name, p in m.named_parameters()
        if p.ndim == 2 and "mlp" in name}}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32 bits", "16 bits"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("form", FORMS)
def test_both_ends_are_exact_and_come_back_from_disk(form, make, dtype, tmp_path):
    model = make().to(dtype)
    before, change = bits(model), Change.of(model, FORMS[form](model))
    change.at(1.)
    after = bits(model)
    assert not same(model, before)
    change.at(.5); assert not same(model, before) and not same(model, after)
    change.at(0.); assert same(model, before)
    change.save(tmp_path)
    Change.load(tmp_path).on(model).at(1); assert same(model, after)
    other = make().to(dtype)
    assert same(other, before)
    Change.between(other, model).at(1); assert same(other, after)

def test_neurons_and_heads_are_a_change_like_any_other(tmp_path):
    model = llama()
    before, neurons = bits(model), Neurons.sample(model, .1, 0, heads=True)
    change = Change.of(model, moved(model, neurons))
    change.at(1); after = bits(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} >= {
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    change.at(0); change.save(tmp_path); Change.load(tmp_path).on(model).at(1)
    assert same(model, after)

def test_a_zero_keeps_its_sign():
    model = llama()
    with torch.no_grad(): model.lm_head.weight[0] = -0.
    before = bits(model)
    change = Change.of(model, {"lm_head.weight": torch.ones_like(model.lm_head.weight)})
    change.at(1); change.at(0)
    assert same(model, before) and str(model.lm_head.weight[0, 0].item()) == "-0.0"

def test_a_second_change_replaces_the_first_on_disk(tmp_path):
    model = llama()
    Change.of(model, FORMS["columns"](model)).save(tmp_path)
    Change.of(model, FORMS["all weights"](model)).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["weights.safetensors"]

@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda m, c, p: c.at(-.1), "share must lie in [0, 1]"),
        (lambda m, c, p: c.at(float("nan")), "share must lie in [0, 1]"),
        (lambda m, c, p: c.at("half"), "share must lie in [0, 1]"),
        (lambda m, c, p: c.at(True), "share must lie in [0, 1]"),
        (
            lambda m, c, p: c.on(
                tiny_model("llama", 60, d_model=16, n_layers=2, d_ff=48, n_heads=2)),
            "do not fit its weight"),
        (lambda m, c, p: Change.between(m, gpt2()), "give two models of one kind"),
        (
            lambda m, c, p: Change.of(
                m, {"lm_head.weight": LowRank(torch.ones(60, 2), torch.ones(3, 32))}),
            "do not fit its weight"),
        (
            lambda m, c, p: (
                c.save(p),
                (p / "columns.safetensors").write_bytes(b"x"),
                Change.load(p)),
            "cannot be read"),
        (lambda m, c, p: compared(m, m, m), "nothing to reverse")])
def test_a_change_that_does_not_fit_is_one_line(bad, says, tmp_path):
    model = llama()
    change, before = Change.of(model, FORMS["columns"](model)), bits(model)
    with pytest.raises(ValueError) as error: bad(model, change, tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value) and same(model, before)

# --- as runs

WORLD = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 2}
LEARN = {"epochs": 2, "lr": 4e-3, "batch_size": 16}
ATTACK = {
    "lr": 1e-3, "region_lr": 1e-2, "epochs": 1, "batch_size": 8, "taught": 5, "samples": 0,
    "shots": 1}
ONE = "relearn forgotten facts, all weights"

@pytest.fixture(scope="module")
def study(tmp_path_factory):
    base = base_models(
        data_description(WORLD),
        "llama",
        {"d_model": 48, "n_layers": 2, "d_ff": 256, "n_heads": 2, "vocab_size": 400},
        LEARN,
        LEARN | {"epochs": 10})
    judged = standard(base, {"retain": 7, "utility": 3, "max_new_tokens": 4})
    return (
        Store(tmp_path_factory.mktemp("store")),
        judged,
        injection(judged, 0, {"fraction": .1, "epochs": 40, "lr": 2e-2, "batch_size": 4}))

def test_restoring_as_an_editor_is_the_arm_of_that_name(
    study
): # the arm attacks the injection itself
    store, judged, injected = study
    edited = store.do(editing(injected, "restore"), compute)
    assert torch.equal(
        edited.tensors("columns.safetensors")["0.index"],
        store[injected].tensors("columns.safetensors")["0.index"])
    assert (
        store[injected].json()["original"]["FS"] < store[judged].json()["retained"]["FS"]
    ), "the facts were learned"
    table = edited.table()
    points = [store[injected].json()["original"], store[judged].json()["retained"]]
    for i, point in enumerate(points):
        assert table.iloc[i][["FS", "RS", "MU"]].to_dict() == {
            name: point[name] for name in ("FS", "RS", "MU")}
    how = ATTACK | {"only": ONE, "level": .6}
    mine, arm = (
        store.do(attacking(d, how), compute) for d in (editing(injected, "restore"), injected))
    for file in ("attacks.csv", "result.json", "facts.safetensors"):
        assert mine.file(file).read_bytes() == arm.file(file).read_bytes()

def test_an_editor_goes_where_arms_and_localizers_say(study):
    store, judged, injected = study
    random, all_weights = (
        store.do(editing(injected, "restore", arm), compute) for arm in ("Random", "All weights"))
    start = store[injected].json()["original"]
    assert random.table().FS.tolist() == [start["FS"]] * 2
    assert random.json()["locked_bit_equal"]
    assert all_weights.json()["region"] is None
    assert (all_weights.path / "weights.safetensors").exists()
    assert all_weights.table().FS[1] == store[judged].json()["retained"]["FS"]
    found = store.do(
        editing(
            localization(teaching(judged), "weight_norm"),
            "zeroing",
            options={"keep": .5},
            fraction=.1),
        compute)
    assert found.json()["region"] == region_size((2, 256), .1)
    assert found.table().FS[1] != found.table().FS[0]
    with pytest.raises(ValueError, match="zeroing needs a region"):
        store.do(editing(teaching(judged), "zeroing"), compute)

@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda d: editing(d, "erase"), "unknown editor 'erase'; known: "),
        (
            lambda d: editing(d, "zeroing", options={"keep": "much"}),
            "editor zeroing: keep must be of type float"),
        (
            lambda d: editing(d, "zeroing", options={"left": 1}),
            "editor zeroing has no option 'left'"),
        (lambda d: editing(d, "restore", arm="Corrupt"), "unknown arm 'Corrupt'"),
        (lambda d: editing(d, "restore", options=[1]), "options are a dictionary"),
        (
            lambda d: editing(editing(d, "restore"), "restore"),
            "built on one of kind inject or teach or localize"),
        (
            lambda d: attacking(d, ATTACK | {"attacks": ["rounding"]}),
            "attack: attacks must be of type dict, got ['rounding']"),
        (
            lambda d: attacking(d, ATTACK | {"attacks": {"shout": {}}}),
            "unknown attack 'shout'; known: "),
        (
            lambda d: attacking(d, ATTACK | {"attacks": {"rounding": {"bit": 4}}}),
            "attack rounding has no option 'bit'; known: bits, kernels"),
        (lambda d: attacking(d, ATTACK | {"attacks": {"rounding": 4}}), "options are a dictionary"),
        (lambda d: attacking(d, {"usual": False}), "usual is false and attacks names none"),
        (
            lambda d: attacking(d, {"usual": False, "only": ONE}),
            "attack lacks batch_size, epochs, lr, region_lr, taught")])
def test_a_bad_editor_or_attack_is_one_line(study, bad, says):
    with pytest.raises(ValueError) as error: bad(study[2])
    assert says in str(error.value) and "\n" not in str(error.value)

PLUGIN = '''
from unloc.register import attack
from unloc.scoring import score

@attack(label='whispering', passes=1)
def whisper(scene, strength:float=1.):
    "Scale the first layer's value vectors"
    def known(model):
        weight = model.model.layers[0].mlp.down_proj.weight
        kept = weight.data.clone()
        weight.data *= strength
        try: return score(model, scene.forget).extraction_strength
        finally: weight.data.copy_(kept)
    return scene.measured({'': known})
'''

def plugged(monkeypatch, path, text):
    path.write_text(text, "utf-8")
    monkeypatch.setenv("UNLOC_PLUGINS", str(path))
    register.METHODS["attack"].pop("whisper", None)

def test_an_attack_of_a_plugin_stands_in_the_same_table(study, monkeypatch, tmp_path):
    store, _, injected = study
    plain = store.do(attacking(injected, ATTACK), compute)
    plugged(monkeypatch, tmp_path / "mine.py", PLUGIN)
    try:
        described = attacking(injected, ATTACK | {"attacks": {"whisper": {"strength": 2}}})
        assert described["attack"]["attacks"] == {"whisper": {"strength": 2.}}
        assert len(described["code"]["attack whisper"]) == 16
        run = store.do(described, compute)
        table, usual = run.table("attacks.csv"), plain.table("attacks.csv")
        assert table.attack.tolist() == [*usual.attack, "whispering"]
        assert table.iloc[:-1].equals(usual)
        assert table.iloc[-1][["end", "end at first", "end without"]].notna().all()
        facts, before = run.tensors("facts.safetensors"), plain.tensors("facts.safetensors")
        assert set(facts) - set(before) == {f"whispering{when}" for when in ("", *ENDS)}
        assert all(torch.equal(facts[name], x) for name, x in before.items())
        assert run.file("result.json").read_bytes() == plain.file("result.json").read_bytes()
        alone = store.do(
            attacking(injected, ATTACK | {"usual": False, "attacks": {"whisper": {}}}), compute)
        assert alone.table("attacks.csv").attack.tolist() == ["whispering"]
        name = run_id(described)
        plugged(monkeypatch, tmp_path / "other.py", PLUGIN.replace("layers[0]", "layers[1]"))
        again = attacking(injected, ATTACK | {"attacks": {"whisper": {"strength": 2}}})
        assert (
            run_id(again) != name and run_id(attacking(injected, ATTACK)) == plain.path.name
        ), "a run is named by a user's code, and no other run by it"
        with pytest.raises(
            ValueError, match="the attack 'whisper' is not the one that the run was described with"
        ):
            Store(tmp_path / "new").do(described, compute)
    finally: register.METHODS["attack"].pop("whisper", None)

def test_a_usual_attack_takes_options_of_its_own(study):
    store, _, injected = study
    # nothing is relearned, so no setting of it is needed
    run = store.do(
        attacking(injected, {"usual": False, "attacks": {"rounding": {"bits": [3]}, "depth": {}}}),
        compute)
    assert run.table("attacks.csv").attack.tolist() == ["3 bits"] and "depth" in run.json()
    assert set(USUAL_ATTACKS) <= set(register.methods("attack"))
    assert json.loads(json.dumps(run.description)) == run.description

# --- along a run

METRIC = '''
from unloc.register import metric

@metric(label='shortest', needs=('retain',), margin=.1)
def shortest(measured, of:str='forget'):
    "Measure the extraction strength of the fact that is known least"
    return measured.scores[of].extraction_strength.min()

@metric(label='length of the output layer', full=True)
def head_norm(measured):
    "Measure a number of the model itself"
    return measured.model.lm_head.weight.detach().norm()
'''

def test_a_metric_of_a_plugin_is_measured_along_a_run(study, monkeypatch, tmp_path):
    store, judged, injected = study
    how = {"lr": 5e-3, "epochs": 3, "full_every": 2}
    plain = store.do(unlearning(injected, "Oracle", "wga", how), compute)
    plugged(monkeypatch, tmp_path / "metrics.py", METRIC)
    try:
        named = standard(
            judged["parent"],
            judged["evaluate"] | {"metrics": {"shortest": {"of": "retain"}, "head_norm": {}}})
        run = store.do(
            unlearning(
                injection(
                    named, 0, {k: v for k, v in injected.items() if k in ("fraction", *LEARN)}),
                "Oracle",
                "wga",
                how),
            compute)
        points, usual = run.table(), plain.table()
        assert points.columns.tolist() == [*usual.columns, "shortest", "head_norm"]
        assert points[usual.columns].equals(usual)
        assert (
            points.shortest.tolist()
            == run.tensors("facts.safetensors")["retain_es"].min(1).values.tolist())
        assert points.head_norm.notna().tolist() == [True, False, True, True]
        assert store[named].json()["retained"].keys() - store[judged].json()["retained"].keys() == {
            "shortest",
            "head_norm"}
        assert named["code"].keys() - judged["code"].keys() == {
            "metric shortest",
            "metric head_norm"}
        with pytest.raises(ValueError, match="metric shortest: of must be of type str"):
            standard(judged["parent"], judged["evaluate"] | {"metrics": {"shortest": {"of": 1}}})
        with pytest.raises(ValueError, match="unknown metric 'longest'; known: "):
            standard(judged["parent"], judged["evaluate"] | {"metrics": {"longest": {}}})
    finally:
        for name in ("shortest", "head_norm"): register.METHODS["metric"].pop(name, None)
