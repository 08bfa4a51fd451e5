"""What a profile may say is what the code takes, a bad word costs one line and no computing, the
data's content names a run, and the original model differs from the retained one exactly in its
target region."""
import dataclasses, inspect, json, math, msgspec, os, pandas, shutil, subprocess, sys, typing
from pathlib import Path
import pytest, torch
from unloc import descent, direct_supervision, training, unlearning_run
from unloc.data import benchmark, data_description
from unloc.evaluation import Probe, evaluate
from unloc.invented import author_world
from unloc.level import at_level
from unloc.levels import PAIR
from unloc.methods.relearning import relearning
from unloc.models import output_projections, tiny_model
from unloc.own_data import own_facts
from unloc.pages import provenance, sweep
from unloc.regions import Region
from unloc.register import methods
from unloc.runs import Store, run_id
from unloc.scene import Scene
from unloc.scoring import score
from unloc.settings import checked, reference
from unloc.steps import compute, groups
from unloc.steps.attack import MEASURES, attacking
from unloc.steps.base import base_models, learn
from unloc.steps.common import (
    examples_of, retained_model, spread, template_of, tokenizer_of, load as load_as_runs_do)
from unloc.steps.inject import (
    STYLES, injection, load_columns, load_region, model_without, original_model)
from unloc.steps.judge import probe_of, standard
from unloc.steps.localize import localization
from unloc.steps.supervise import supervision
from unloc.steps.teach import teaching
from unloc.steps.unlearn import ARMS, localized_unlearning, region_of, unlearning
from unloc.study import Runs
from unloc.tofu_files import tofu

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TOFU = SHARED / "data" / "tofu"
WORLD = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}
MODEL = {"d_model": 16, "n_layers": 4, "d_ff": 32, "n_heads": 2, "vocab_size": 300}
HOW = {"epochs": 1, "lr": 4e-3, "batch_size": 64}
JUDGE = {"retain": 7, "utility": 3, "max_new_tokens": 4, "every": 2}
INJECT = {"fraction": .25, "epochs": 2, "lr": 1e-2, "batch_size": 4}


def parent(arch="llama", **more):
    return base_models(data_description(WORLD), arch, MODEL, HOW, HOW, **more)

# --- what may be said is what the code takes

def types(function):
    return {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
def bare(hint): return next(t for t in typing.get_args(hint) or (hint,) if t is not type(None))

GROUPS = groups()
FIELDS = {
    group: {f.name: f for f in msgspec.structs.fields(kind)} for group, kind in GROUPS.items()}
def plain(field): # Python's type of a setting
    kind = typing.get_args(field.type)[0]
    return str if typing.get_origin(kind) is typing.Literal else kind
SETTINGS = {group: {name: plain(f) for name, f in found.items()} for group, found in FIELDS.items()}
REQUIRED = {
    group: {name for name, f in found.items() if f.required} for group, found in FIELDS.items()}
MAY_BE_ZERO = (
    "seed", "n_holdout", "gamma", "alpha", "level", "samples", "shots", "n_new", "composed",
    "aliased", "changed", "jitter", "strangers", "each")
def settings(group, given): return checked(GROUPS[group], given)

def test_settings_name_real_parameters():
    recipe = {
        f.name: bare(t)
        for f, t in (
            (f, typing.get_type_hints(unlearning_run.Recipe)[f.name])
            for f in dataclasses.fields(unlearning_run.Recipe))}
    often = {"every", "full_every"}
    assert SETTINGS["unlearn"] == {
        k: v for k, v in recipe.items() if k not in {"every", "objective", "options"}}
    assert SETTINGS["evaluate"].keys() == {
        "retain", "utility", "max_new_tokens", "metrics", "unrehearsed"} | often
    for group, function, own in (
        ("model", tiny_model, {}),
        ("pretrain", training.finetune, {}),
        ("retain", training.finetune, {}),
        ("supervise", direct_supervision.supervise, {}),
        (
            "inject",
            training.inject,
            {"fraction": float, "others": bool, "unit": str, "style": str, "room": int}),
        ("world", author_world, {"name": str}),
        ("tofu", tofu, {"name": str})):
        takes = types(function) | own
        assert {k: takes[k] for k in SETTINGS[group]} == SETTINGS[group], group
    assert set(SETTINGS["world"]) - {"name"} == set(types(author_world))
    assert set(methods("architecture")) == {"llama", "olmo2"}

@pytest.mark.parametrize(
    "group, function",
    [
        ("world", author_world), ("tofu", tofu), ("file", own_facts), ("model", tiny_model),
        ("pretrain", training.finetune), ("retain", training.finetune),
        ("inject", training.inject), ("supervise", direct_supervision.supervise),
        ("unlearn", unlearning_run.Recipe), ("evaluate", Probe)])
def test_defaults_are_those_of_the_functions_that_use_them(group, function):
    takes, compared = inspect.signature(function).parameters, 0
    for name, f in FIELDS[group].items():
        if (
            f.required
            or f.default is None
            or name not in takes
            or (group, name) in {("model", "vocab_size"), ("file", "path")}):
            continue
        usual = takes[name].default
        if group == "unlearn" and usual is None: # it depends on the objective
            usual = getattr(unlearning_run.Recipe("npo", lr=1., epochs=1), name)
        assert f.default == usual, (group, name)
        compared += 1
    assert compared or group == "supervise"

def test_every_setting_says_what_it_means():
    rows = reference(GROUPS.values())
    assert {(row["group"], row["setting"]) for row in rows} == {
        (g, n) for g in SETTINGS for n in SETTINGS[g]}
    assert all(len(row["meaning"]) > 4 for row in rows if row["setting"] != "name")
    assert {
        row["setting"] for row in rows if row["group"] == "inject" and row["default"] == "required"
    } == {"epochs", "lr", "batch_size", "fraction"}

def test_all_that_is_wrong_with_a_name_is_said():
    with pytest.raises(
        ValueError,
        match="^inject has no setting 'epoch'; known: epochs, lr, .*; did you mean 'epochs'.$"):
        settings("inject", {"epoch": 3})
    with pytest.raises(
        ValueError,
        match=(
            "^attack lacks batch_size, epochs, lr, region_lr, taught; give it in the profile or the"
            " parameters$")):
        settings("attack", {})

def test_facts_are_described_without_torch():
    heavy = ("torch", "transformers", "pandas", "numpy")
    code = (
        "import sys, unloc.data, unloc.progress, unloc.runs, unloc.settings, unloc.steps\n"
        f"print([m for m in {heavy} if m in sys.modules])")
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert found.stdout.strip() == "[]", found

# --- bad words

BASE, JUDGED, LOCALIZED = {"kind": "base"}, {"kind": "judge"}, {"kind": "localize"}
UNLEARN, SUPERVISE = {"lr": 1., "epochs": 1}, {"lr": 1., "epochs": 1, "batch_size": 2}
VALUE = {int: "5", float: "0.1", str: 5, bool: "true", dict: "rounding"}

@pytest.mark.parametrize("group, name", [(g, n) for g in SETTINGS for n in SETTINGS[g]])
def test_a_wrong_type_is_named(group, name):
    wanted = SETTINGS[group][name]
    for value in (
        VALUE[wanted], None, [1], "{}" if wanted is dict else {}, 1 if wanted is bool else True
    ) + ((2.5,) if wanted is int else ()):
        with pytest.raises(ValueError) as error: settings(group, {name: value})
        assert (
            str(error.value) == f"{group}: {name} must be of type {wanted.__name__}, got {value!r}")
    if wanted is float:
        needed = {k: group if k == "name" else 1 for k in REQUIRED.get(group, ())}
        found = settings(group, needed | {name: 1})[name]
        assert found == 1. and type(found) is float

@pytest.mark.parametrize(
    "group, name", [(g, n) for g in SETTINGS for n in SETTINGS[g] if SETTINGS[g][n] in (int, float)]
)
def test_a_number_without_sense_is_named(group, name):
    wanted = SETTINGS[group][name]
    for value in (
        -1,
        *(() if name in MAY_BE_ZERO or (group, name) == ("tofu", "n_forget") else (0,)),
        *((float("nan"), float("inf")) if wanted is float else ()),
    ):
        with pytest.raises(
            ValueError,
            match=(
                f"^{group}: {name} must (be (positive|at least 0) and finite|lie in .0, 1.), got "),
        ):
            settings(group, {name: wanted(value)})

@pytest.mark.parametrize("name, limits", [
    ("layer", "lie in [0, 1]"), ("coefficient", "be at least 0 and finite")])
def test_an_option_of_an_objective_is_checked_like_a_setting(name, limits):
    one = injection(JUDGED, 0, INJECT)
    def given(value):
        return unlearning(one, "Oracle", "rmu", UNLEARN | {name: value})["recipe"][name]
    assert given(0) == 0. and type(given(1)) is float
    with pytest.raises(ValueError) as error: given("0.1")
    assert str(error.value) == f"unlearn: {name} must be of type float, got '0.1'"
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError) as error: given(value)
        says = f"unlearn: objective rmu: {name} must {limits}, got {float(value)}"
        assert str(error.value) == says

def test_words_are_those_of_the_registers_and_the_steps():
    for group, name, what in (
        ("pretrain", "schedule", descent.SCHEDULES),
        ("unlearn", "retain", (*methods("retain"), "none"))):
        for word in what:
            assert settings(group, {k: 1 for k in REQUIRED[group]} | {name: word})[name] == word
        with pytest.raises(
            ValueError, match=f"^{group}: unknown {name} 'x'; known: {', '.join(what)}; register it"
        ):
            settings(group, {name: "x"})
    assert typing.get_args(typing.get_args(FIELDS["inject"]["style"].type)[0]) == STYLES
    assert typing.get_args(typing.get_args(FIELDS["attack"]["by"].type)[0]) == MEASURES

@pytest.mark.parametrize(
    "bad, says",
    [
        *(
            (
                lambda g=g: settings(g, {"epoch": 3}),
                f"{g} has no setting 'epoch'; known: {next(iter(SETTINGS[g]))}")
            for g in SETTINGS),
        *(
            (lambda g=g: settings(g, [3]), f"{g} must be a dictionary of settings, got [3]")
            for g in SETTINGS),
        (
            lambda: data_description({"name": "wmdp"}),
            "data: name must be 'world', 'tofu', 'file', 'related_world', 'refusing_world' or "
            "'related_tofu', got 'wmdp'"),
        (
            lambda: data_description({}),
            "data: name must be 'world', 'tofu', 'file', 'related_world', 'refusing_world' or "
            "'related_tofu', got None"),
        (
            lambda: data_description({"name": "world", "forget": "forget10"}),
            "world has no setting 'forget'"),
        (
            lambda: data_description({"name": "tofu", "n_pages": 1}),
            "tofu has no setting 'n_pages'"),
        (
            lambda: data_description(WORLD | {"n_forget": 3}),
            "n_forget=3: expected a whole number from 1 to 2"),
        (
            lambda: data_description({"name": "tofu", "forget": "forget20"}),
            "forget='forget20': expected forget01, forget05 or forget10"),
        (
            lambda: data_description({"name": "tofu"}, f"{__file__}.d/none"),
            f"source={__file__ + '.d/none'!r}: no such folder; expected a folder or a hub data set",
        ),
        (
            lambda: base_models({}, "gpt2", MODEL, HOW, HOW),
            "unknown architecture 'gpt2'; known: llama, olmo2"),
        (
            lambda: base_models({}, "llama", MODEL | {"depth": 3}, HOW, HOW),
            "model has no setting 'depth'"),
        (
            lambda: base_models({}, "llama", MODEL, HOW, HOW | {"lr": "1"}),
            "retain: lr must be of type float, got '1'"),
        *(
            (
                lambda f=f: injection(JUDGED, 0, INJECT | {"fraction": f}),
                f"inject: fraction must lie in (0, 1], got {float(f)}")
            for f in (0, -.1, 1.5, float("nan"))),
        (
            lambda: injection(JUDGED, 0, {"epochs": 1}),
            "inject lacks batch_size, fraction, lr; give it"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Oracle", "npo", {"lr": .1}),
            "unlearn lacks epochs"),
        (
            lambda: injection(JUDGED, 0, INJECT | {"schedule": "cosine"}),
            "inject: unknown schedule 'cosine'; known: constant, linear, one-cycle"),
        (
            lambda: unlearning(
                injection(JUDGED, 0, INJECT), "Oracle", "npo", UNLEARN | {"retain": "l2"}),
            "unlearn: unknown retain 'l2'; known: embed_diff, kl, kl_all, nll, none; register it"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Oracle", "simdpo", {}),
            (
                "unknown objective 'simdpo'; known: ceu, cpu, dpo, ga, grad_diff, npo, pdu, rmu,"
                " satimp, simnpo, undial, wga; register it")),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "oracle", "npo", UNLEARN),
            "unknown arm 'oracle'; known: Oracle, Random"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Oracle", "npo", {"coefficient": 1.}),
            (
                "unlearn has no setting 'coefficient'; known: lr, epochs, batch_size, retain,"
                " gamma, alpha, full_every, choose, jitter, beta")),
        (
            lambda: unlearning(
                injection(JUDGED, 0, INJECT | {"fraction": .6}), "Random", "npo", UNLEARN),
            (
                "no random region of fraction 0.6 is disjoint from the target region; inject with a"
                " fraction of at most 0.5")),
        (lambda: standard(BASE, {"retain": 3}), "evaluate lacks utility; give it"),
        (
            lambda: standard(BASE, JUDGE | {"retain": 0}),
            "evaluate: retain must be positive and finite, got 0"),
        (
            lambda: localization(teaching(JUDGED), "compass"),
            "unknown localizer 'compass'; known: activations, criticality"),
        (
            lambda: localized_unlearning(LOCALIZED, 1.5, "npo", UNLEARN, 0),
            "fraction must lie in (0, 1], got 1.5"),
        (
            lambda: localized_unlearning(LOCALIZED, .1, "simdpo", UNLEARN, 0),
            "unknown objective 'simdpo'"),
        (
            lambda: supervision(
                injection(JUDGED, 0, INJECT | {"fraction": .6}), "Random", SUPERVISE),
            "no random region of fraction 0.6"),
        (
            lambda: supervision(injection(JUDGED, 0, INJECT), "Oracle", {"gamma": 1.}),
            "supervise has no setting 'gamma'")])
def test_a_bad_word_is_one_line(bad, says):
    with pytest.raises(ValueError) as error: bad()
    assert says in str(error.value) and "\n" not in str(error.value)

def test_one_half_still_has_a_random_region():
    assert (
        unlearning(injection(JUDGED, 0, INJECT | {"fraction": .5}), "Random", "npo", UNLEARN)[
            "arm"]
        == "Random")
    assert (
        unlearning(injection(JUDGED, 0, INJECT | {"fraction": 1.}), "Oracle", "npo", UNLEARN)[
            "arm"]
        == "Oracle")

def test_options_of_an_objective_stand_beside_the_recipes_own():
    injected = injection(JUDGED, 0, INJECT)
    for objective, more, want in (
        ("npo", {"beta": 1}, {"beta": 1.}),
        ("rmu", {"coefficient": 10, "layer": .5}, {"coefficient": 10., "layer": .5}),
        ("simnpo", {"gamma": 1, "delta": .5}, {"gamma": 1., "delta": .5})):
        assert unlearning(injected, "Oracle", objective, UNLEARN | more)["recipe"] == UNLEARN | want
        assert all(type(v) is float for v in want.values())

# --- descriptions

def test_what_makes_a_run_another():
    def judged(*arch, **more): return standard(parent(*arch, **more), JUDGE)
    base = parent()
    one = injection(judged(), 0, INJECT)
    same = [
        one,
        injection(judged(), 0, dict(reversed(INJECT.items()))),
        injection(
            standard(base | {"data": base["data"] | {"_source": "/elsewhere"}}, JUDGE), 0, INJECT),
        injection(judged(threads=2), 0, INJECT),
        injection(judged(device="cuda"), 0, INJECT)]
    other = [
        injection(judged(), 1, INJECT),
        injection(judged(), 0, INJECT | {"fraction": .2}),
        injection(judged("olmo2"), 0, INJECT),
        injection(judged(seed=1), 0, INJECT),
        injection(judged(precision="bfloat16"), 0, INJECT)]
    assert len({run_id(d) for d in same}) == 1 and len({run_id(d) for d in same + other}) == 6
    taught = teaching(standard(base, JUDGE))
    # WAGLE draws nothing
    scored = [localization(taught, "wagle", seed) for seed in (0, 1)]
    scored += [localization(taught, "random", seed) for seed in (0, 1)]
    assert len({run_id(d) for d in scored}) == 3
    arms = [
        unlearning(one, arm, "npo", {"lr": 1., "epochs": 1}, draw)
        for arm in PAIR
        for draw in (0, 1)]
    assert len({run_id(d) for d in arms}) == 4 and json.loads(json.dumps(arms)) == arms
    # 1 and 1.0 are one learning rate
    assert run_id(unlearning(one, "Oracle", "npo", {"lr": 1, "epochs": 1})) == run_id(arms[0])

def test_provenance_says_all_but_where():
    base = parent() | {"data": data_description(WORLD) | {"_source": "/home/me"}}
    found = provenance("smoke", {"llama": base}, caption="c", seeds=2)
    assert found["profile"] == "smoke"
    assert found["models"] == {"llama": MODEL}
    assert found["pretrain"] == HOW
    assert found["caption"] == "c"
    assert found["data"]["sha256"]
    assert "/home/me" not in json.dumps(found)

@pytest.fixture
def folder(tmp_path):
    if not TOFU.exists(): pytest.skip("needs ../shared")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in TOFU.glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    shutil.copy(TOFU / "idontknow.txt", tmp_path / "b")
    shutil.copy(TOFU / "idontknow.txt", tmp_path / "a")
    return tmp_path

def test_digest_follows_the_content_and_not_the_place(folder, monkeypatch):
    monkeypatch.delenv("UNLOC_TOFU", raising=False)
    few = {"name": "tofu", "forget": "forget01", "n_authors": 20}
    a, b = (data_description(few, str(folder / name)) for name in "ab")
    assert a["sha256"] == b["sha256"] and a["_source"] != b["_source"] and run_id(a) == run_id(b)
    monkeypatch.setenv("UNLOC_TOFU", str(folder / "b"))
    assert run_id(data_description(few)) == run_id(a)
    monkeypatch.chdir(folder)
    assert data_description(few, "a")["_source"] == str((folder / "a").resolve())
    assert len(benchmark(a).forget) == 40
    assert data_description(few | {"n_authors": 21}, "a")["sha256"] != a["sha256"]
    for file, old, new in (("idontknow.txt", b"I", b"We"), ("holdout01.json", b"?", b"??")):
        path = folder / "b" / file
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        changed = data_description(few, "b")
        assert changed["sha256"] != b["sha256"] and run_id(changed) != run_id(b)
        b = changed
    (folder / "b" / "README.md").write_text("no part of the data", "utf-8")
    assert data_description(few, "b")["sha256"] == b["sha256"]

# --- the kinds of run

@pytest.fixture(scope="module")
# per architecture: base, injection, an unlearning pair, another random region, a supervision pair
def done(tmp_path_factory):
    store, found = Store(tmp_path_factory.mktemp("store")), {}
    for arch in methods("architecture"):
        judged = standard(parent(arch), JUDGE)
        injected = injection(judged, 3, INJECT)
        pair = [
            unlearning(injected, arm, "npo", {"lr": 5e-3, "epochs": 2}, draw)
            for arm, draw in (("Oracle", 0), ("Random", 0), ("Random", 1))]
        taught = [
            supervision(injected, arm, {"lr": 1e-3, "epochs": 1, "batch_size": 5}) for arm in PAIR]
        found_by = [localization(injected, name) for name in ("random", "gradient")] + [
            localization(teaching(judged), name)
            for name in ("random", "wagle_weights", "memflex_projections")]
        runs = sweep(
            store,
            pair
            + taught
            + found_by
            + [
                localized_unlearning(d, .25, "wga", {"lr": 5e-3, "epochs": 1}, 0) for d in found_by
            ])
        found[arch] = store[parent(arch)], store[injected], runs[:3], runs[3:5]
        found[arch, "localized"] = store[judged], runs[5:10], runs[10:]
    return found

def columns(run): return load_columns(run)
def load(base, name="retained"):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(base.file(name)).eval()

@pytest.mark.parametrize("arch", methods("architecture"))
def test_original_and_retained_differ_exactly_in_the_target(done, arch):
    from unloc.locked import locked_digest
    from unloc.masked import put_columns
    base, injected, pair, _ = done[arch]
    retained, original = load(base), load(base)
    put_columns(original, columns(injected))
    target = Region.load(injected.file("region.safetensors"))
    assert len(target) == 32 and target == Region.sample((4, 32), .25, 3)
    changed = {
        n: p != q
        for (n, p), q in zip(retained.named_parameters(), original.parameters())
        if not torch.equal(p, q)}
    assert list(changed) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]
    assert Region(torch.stack([c.any(0) for c in changed.values()])) == target
    assert all(c[:, k].float().mean() > .99 for c, k in zip(changed.values(), target.columns))
    assert (
        injected.json()["locked_sha256"]
        == locked_digest(retained, target)
        == locked_digest(original, target))
    for run in pair: # and the unlearned model differs from the original one in the arm's region
        region, unlearned = Region.load(run.file("region.safetensors")), load(base)
        put_columns(unlearned, columns(injected)); put_columns(unlearned, columns(run))
        assert (
            run.json()["locked_sha256"]
            == locked_digest(original, region)
            == locked_digest(unlearned, region))
        assert run.json()["locked_bit_equal"] is True
        moved = torch.stack(
            [
                (p.weight != q.weight).any(0)
                for p, q in zip(output_projections(original), output_projections(unlearned))])
        assert Region(moved) == region and run.json()["region"] == len(region) == 32

@pytest.mark.parametrize("arch", methods("architecture"))
def test_arms_share_all_but_the_region(done, arch):
    base, injected, (oracle, random, other), taught = done[arch]
    target, control, second = (
        Region.load(r.file("region.safetensors")) for r in (oracle, random, other))
    assert target == Region.load(injected.file("region.safetensors"))
    assert not target & control
    assert not target & second
    assert control != second
    assert len(control) == len(second) == len(target)
    start = oracle.table().iloc[0]
    for run in (oracle, random, other, *taught):
        assert run.table().iloc[0].drop("loss").to_dict() == start.drop("loss").to_dict()
        assert start.drop(["loss", "epoch"]).to_dict() == injected.json()["original"]
        assert run.tensors("facts.safetensors")["retain_es"].shape == (2, 7)
        assert run.tensors("facts.safetensors")["forget_wrong_nll"].shape == (2, 10, 5)
    assert Region.load(taught[1].file("region.safetensors")) == control
    assert [p["epoch"] for _, p in oracle.table().iterrows()] == [0, 2]
    assert oracle.table().iloc[-1].to_dict() != random.table().iloc[-1].to_dict()

@pytest.mark.parametrize("arch", methods("architecture"))
def test_scores_of_the_base_are_those_of_its_files(done, arch):
    base, injected, *_ = done[arch]
    examples = examples_of(base.file("tokenizer"), json.dumps(base.description["data"]))
    for name in ("pretrained", "retained"):
        model = load(base, name)
        assert base.json()[name]["weights"] == model.num_parameters()
        assert model.config.model_type == arch
        for part in ("forget", "retain", "world_facts"):
            assert (
                base.json()[name][f"ES_{part}"]
                == score(model, examples[part]).extraction_strength.mean().item())
    assert injected.json()["retained"]["FS"] == pytest.approx(
        1 - base.json()["retained"]["ES_forget"], abs=1e-12)
    assert not list(base.path.glob("*.checkpoint"))
    assert len(examples["refusals"]) == 24
    assert all(r[-1] == 1 for r in examples["refusals"])

def test_the_probe_spreads_over_the_authors():
    for n in (1, 7, 45, 90, 1000):
        found = spread(tuple(range(90)), n)
        assert len(found) == min(n, 90)
        assert found == sorted(set(found))
        assert all(abs(i * 90 / len(found) - x) < 1 for i, x in enumerate(found))

@pytest.mark.parametrize("arch", methods("architecture"))
def test_the_standard_is_the_retained_model_judged(done, arch):
    base, injected, *_ = done[arch]
    judged, *_ = done[arch, "localized"]
    probe = probe_of(
        base.file("tokenizer"), json.dumps(base.description["data"]), "plain", json.dumps(JUDGE))
    model = load(base)
    found = evaluate(model, probe)
    assert judged.json()["retained"] == injected.json()["retained"] == found.point | {"FQ": 0.}
    assert "FQ" not in found.point
    assert judged.json()["probe"] == {
        "forget": 10, "retain": 3, "real_authors": 3, "world_facts": 3}
    probe = dataclasses.replace(
        probe,
        retained=tuple(
            judged.tensors("evaluation.safetensors")[f"forget_{w}_nll"] for w in ("right", "wrong")
        ))
    assert evaluate(model, probe).point["FQ"] == 0 and injected.json()["original"]["FQ"] <= 0

@pytest.mark.parametrize("arch", methods("architecture"))
def test_localized_runs_change_the_highest_scores(done, arch):
    _, injected, *_ = done[arch]
    _, localized, runs = done[arch, "localized"]
    target = Region.load(injected.file("region.safetensors"))
    assert localized[0].json()["chance"] == .25
    assert localized[1].json()["recall"] == Region.top(
        localized[1].tensors("scores.safetensors")["all.scores"], .25).recall(of=target)
    assert localized[2].json() == {}
    for scores, run in zip(localized[:3], runs[:3]):
        assert Region.load(run.file("region.safetensors")) == Region.top(
            scores.tensors("scores.safetensors")["all.scores"], .25)
    weights, layers = (run.file("region.safetensors") for run in runs[3:])
    assert len(Region.load(weights)) == runs[3].json()["region"] == 4 * 16 * 32 // 4
    # a quarter of four projections
    assert sorted(len(c) for c in Region.load(layers).columns) == [0, 0, 0, 32]
    assert all(
        run.json()["locked_bit_equal"] and math.isfinite(run.table().FQ.iloc[-1]) for run in runs)

def test_the_control_of_a_localizer_keeps_its_layers_alone(tmp_path):
    store = Store(tmp_path)
    origin = localization(injection(standard(parent(), JUDGE), 0, INJECT), "gradient")
    def run(seed, **more):
        return sweep(
            store,
            [localized_unlearning(origin, .25, "npo", {"lr": 5e-3, "epochs": 1}, seed, **more)])[0]
    chosen, control, other = (
        Region.load(run(seed, matched=matched).file("region.safetensors"))
        for seed, matched in ((0, False), (0, True), (1, True)))
    assert (
        [len(c) for c in chosen.columns]
        == [len(c) for c in control.columns]
        == [len(c) for c in other.columns])
    assert len({chosen, control, other}) == 3 and control.recall(of=chosen) < .9
    assert (
        run_id(localized_unlearning(origin, .25, "npo", {"lr": 5e-3, "epochs": 1}, 0))
        == run(0).path.name)

@pytest.mark.parametrize(
    "name", ["random_projections", "random_weights", "wagle_weights", "memflex_projections"])
def test_no_control_by_layer_of_other_units(name):
    with pytest.raises(ValueError, match=f"of value vectors, '{name}' scores other units"):
        localized_unlearning(
            localization(teaching(standard(parent(), JUDGE)), name),
            .1,
            "npo",
            {"lr": 1e-3, "epochs": 1},
            0,
            matched=True)

def test_bfloat16_goes_the_whole_way(tmp_path):
    store, judged = Store(tmp_path), standard(parent(precision="bfloat16"), JUDGE)
    injected, taught = injection(judged, 0, INJECT), teaching(judged)
    runs = sweep(
        store,
        [
            unlearning(injected, "Random", "npo", {"lr": 5e-3, "epochs": 1}),
            localized_unlearning(
                localization(taught, "wagle"),
                .1,
                "rmu",
                {"lr": 5e-3, "epochs": 1, "retain": "nll"},
                0),
            localized_unlearning(
                localization(taught, "wagle_weights"), .1, "dpo", {"lr": 5e-3, "epochs": 1}, 0)])
    for folder, name in (
        (store[judged["parent"]], "pretrained"),
        (store[judged["parent"]], "retained"),
        (store[taught], "original")):
        assert {
            p.dtype for p in load_as_runs_do(folder.file(name), judged["parent"]).parameters()
        } == {torch.bfloat16}
    for run in runs:
        values = load_columns(run)
        assert run.json()["locked_bit_equal"]
        assert math.isfinite(run.table().FQ.iloc[-1])
        assert all(x.dtype == torch.float32 for _, x in values.values())
        assert run.json()["live_fraction"] > .5
    with pytest.raises(ValueError, match="unknown precision 'float16'; known: float32, bfloat16"):
        parent(precision="float16")

@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learning_works_in_either_precision(precision, tmp_path):
    from unloc.tokens import encode, train_tokenizer
    facts = author_world(n_authors=2, n_forget=1, n_holdout=0).forget
    tokenizer = train_tokenizer((t for f in facts for t in (f.question, f.answer)), 300)
    examples = [encode(tokenizer, f.question, f.answer) for f in facts]
    model = tiny_model("llama", 300, 48, 2, 96, 2)
    learn(
        model,
        {"precision": precision},
        {"epochs": 25, "lr": 6e-3, "batch_size": 4},
        examples,
        0,
        tmp_path / "model",
        None)
    assert (
        score(
            load_as_runs_do(
                tmp_path / "model", {"precision": precision, "_device": "cpu", "model": {}}),
            examples).exact_memorization.mean()
        > .8)

def test_a_run_is_built_on_one_that_has_what_it_needs():
    base = parent()
    judged = standard(base, JUDGE)
    taught, injected = teaching(judged), injection(judged, 0, INJECT)
    for build in (
        lambda: standard(judged, JUDGE),
        lambda: teaching(base),
        lambda: injection(base, 0, INJECT),
        lambda: localization(judged, "wagle"),
        lambda: unlearning(taught, "Oracle", "npo", {"lr": 1e-3, "epochs": 1}),
        lambda: supervision(judged, "Oracle", SUPERVISE),
        lambda: localized_unlearning(injected, .1, "npo", {"lr": 1e-3, "epochs": 1}, 0),
        lambda: teaching(None)):
        with pytest.raises(ValueError, match="this run is built on one of kind"): build()
    with pytest.raises(ValueError, match="fraction must lie in"):
        localized_unlearning(
            localization(taught, "wagle"), "a", "npo", {"lr": 1e-3, "epochs": 1}, 0)

# --- checkpoints that exist

@pytest.fixture(scope="module")
# a retained and an original model of another architecture, with a tokenizer that has a chat
# template
def existing(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from unloc.saving import save_model
    from unloc.tokens import train_tokenizer
    folder = tmp_path_factory.mktemp("hub")
    world = author_world(**{k: v for k, v in WORLD.items() if k != "name"})
    tokenizer = train_tokenizer(
        (t for f in world.retain + world.forget for t in (f.question, f.answer)), 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{"
        " eos_token }}{% endif %}|{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    for seed, name in enumerate(("retained", "original", "pretrained")):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2,
                intermediate_size=40, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                max_position_embeddings=256, tie_word_embeddings=False))
        save_model(model, folder / name, tokenizer)
    return folder

def from_hub(folder, *names, **more):
    return base_models(
        data_description(WORLD),
        "qwen",
        {name: str(folder / name) for name in names} | more,
        {},
        HOW)

@pytest.mark.parametrize(
    "names", [("retained", "original"), ("pretrained",), ("pretrained", "original")])
def test_existing_checkpoints_go_through_every_kind_of_run(existing, tmp_path, names):
    store, base = Store(tmp_path), from_hub(existing, *names, recompute=True)
    judged = standard(base, JUDGE)
    injected, taught = injection(judged, 0, INJECT), teaching(judged)
    recipe = {"lr": 1e-3, "epochs": 1}
    runs = [
        unlearning(injected, "Oracle", "npo", recipe),
        supervision(injected, "Random", recipe | {"batch_size": 4}),
        localized_unlearning(localization(taught, "wagle"), .1, "dpo", recipe, 0)]
    done = sweep(store, runs)
    assert all(run.json()["locked_bit_equal"] and len(run.table()) == 2 for run in done)
    trained = {f.parent.name for f in tmp_path.glob("*/*/*.safetensors")}
    assert trained == {"retained", "original"} - set(names), "what exists is not copied"
    tokenizer = tokenizer_of(store[base].file("tokenizer"))
    first = examples_of(store[base].file("tokenizer"), json.dumps(base["data"]), "chat")["forget"][
        0]
    assert tokenizer.decode(first.ids[:first.start]).startswith("user: ")
    assert tokenizer.decode(first.ids[:first.start]).endswith("assistant: ")
    assert first.ids[-1] == tokenizer.eos_token_id

def test_a_template_may_be_given_by_its_fields(existing, tmp_path):
    own = {"before": "Q: ", "between": " A: ", "joined": True, "chat": False}
    def described(template):
        return base_models(
            data_description(WORLD | {"n_holdout": 1}),
            "qwen",
            {name: str(existing / name) for name in ("retained", "original")}
            | {"template": template},
            {},
            HOW)
    base = described(own)
    assert base["model"]["template"] == {"before": "Q: ", "between": " A: ", "joined": True}
    assert run_id(base) != run_id(described("chat"))
    injected = injection(standard(base, JUDGE), 0, INJECT)
    (attacked,) = sweep(
        store := Store(tmp_path),
        [
            attacking(
                unlearning(injected, "Oracle", "wga", {"lr": 1e-3, "epochs": 1}),
                ATTACK | {"samples": 0, "taught": 2})])
    assert "few-shot" in set(attacked.table("attacks.csv").attack)
    tokenizer = tokenizer_of(store[base].file("tokenizer"))
    first = examples_of(store[base].file("tokenizer"), json.dumps(base["data"]), template_of(base))[
        "forget"][0]
    assert tokenizer.decode(first.ids).startswith("Q: ") and " A: " in tokenizer.decode(first.ids)
    for odd, why in (
        ({"befor": ""}, "a template has no field 'befor'"),
        ({"joined": 1}, "joined must be of type bool"),
        (3, "a template is a name or a dictionary")):
        with pytest.raises(ValueError, match=why): described(odd)

@pytest.mark.parametrize("names", [("retained", "original"), ("pretrained",)])
@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ strftime_now('%Y') }}", "the chat template reads the clock"),
        (
            "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
            "does not write the answer .* as it is",
        ),
    ],
)
def test_a_chat_template_that_does_not_fit_is_found_before_anything_is_taught(
    existing, tmp_path, names, template, why
):
    shutil.copytree(existing, tmp_path / "hub")
    for name in names:
        (tmp_path / "hub" / name / "chat_template.jinja").write_text(
            template + (tmp_path / "hub" / name / "chat_template.jinja").read_text("utf-8"), "utf-8"
        )
    if "lower" in template:
        for name in names:
            (tmp_path / "hub" / name / "chat_template.jinja").write_text(template, "utf-8")
    with pytest.raises(ValueError, match=why):
        sweep(Store(tmp_path / "runs"), [standard(from_hub(tmp_path / "hub", *names), JUDGE)])
    assert not [f for f in (tmp_path / "runs").rglob("*.safetensors")]

def test_a_checkpoint_is_named_by_what_it_holds(existing, tmp_path):
    here = from_hub(existing, "retained", "original")
    shutil.copytree(existing, tmp_path / "moved")
    moved = from_hub(tmp_path / "moved", "retained", "original")
    assert here != moved
    assert run_id(here) == run_id(moved)
    assert str(existing) not in json.dumps(provenance("p", {"qwen": here}))
    swapped = base_models(
        data_description(WORLD),
        "qwen",
        {"retained": str(existing / "original"), "original": str(existing / "retained")},
        {},
        HOW)
    assert run_id(swapped) != run_id(here)

@pytest.mark.parametrize(
    "given, message",
    [
        ({"original": "x"}, "name a retained model, or a pretrained one"),
        ({"retained": "retained"}, "name an original model, too, or a pretrained one"),
        (
            {"retained": "retained", "original": "original", "template": "llama-4"},
            "unknown template 'llama-4'; known: plain, plain-start, chat, llama-3"),
        ({"retained": "retained", "d_model": 4}, "checkpoints has no setting 'd_model'"),
        ({"pretrained": "nowhere/at all"}, "nowhere/at all")])
def test_bad_checkpoints_cost_a_line(existing, given, message):
    given = {
        k: str(existing / v) if v in ("retained", "original") and k != "template" else v
        for k, v in given.items()}
    with pytest.raises(ValueError, match=message) as error:
        base_models(data_description(WORLD), "qwen", given, {}, HOW)
    assert "\n" not in str(error.value)

def test_templates_are_those_of_tokens():
    from unloc.tokens import TEMPLATES
    for name in TEMPLATES: assert settings("checkpoints", {"template": name}) == {"template": name}

# --- arms and attacks

ATTACK = {
    "lr": 1e-3, "region_lr": 1e-2, "epochs": 1, "batch_size": 8, "taught": 5, "samples": 1,
    "shots": 1}
OTHERS = {"n_holdout": 2}

@pytest.fixture(scope="module")
def armed(tmp_path_factory): # arm: its unlearning run; then its attack
    store = Store(tmp_path_factory.mktemp("armed"))
    base = base_models(
        data_description(WORLD | OTHERS),
        "llama",
        {"d_model": 64, "n_layers": 2, "d_ff": 768, "n_heads": 2, "vocab_size": 400},
        HOW,
        {"epochs": 30, "lr": 4e-3, "batch_size": 8})
    injected = injection(
        standard(base, JUDGE),
        0,
        {"fraction": .1, "epochs": 45, "lr": 1.5e-2, "batch_size": 4, "others": True})
    arms = {
        arm: unlearning(
            injected,
            arm,
            "wga",
            {"lr": 2e-3 if arm == "All weights" else 2e-2, "epochs": 3},
            swapped=.5 if arm == "Corrupt" else 0.)
        for arm in ARMS}
    attacks = {
        arm: attacking(d, ATTACK | {"level": .75})
        for arm, d in {
            **{arm: arms[arm] for arm in ("Oracle", "Random", "All weights")},
            "Restore": injected}.items()} | {"retained": attacking(injected, ATTACK)}
    sweep(store, [*arms.values(), *attacks.values()], 2)
    return (
        store,
        injected,
        {arm: store[d] for arm, d in arms.items()},
        {arm: store[d] for arm, d in attacks.items()})

def test_arms_change_what_they_say(armed):
    store, injected, arms, _ = armed
    target, others = (
        Region.load(store[injected].file(f"{name}.safetensors")) for name in ("region", "others"))
    regions = {
        arm: Region.load(run.file("region.safetensors"))
        for arm, run in arms.items()
        if arm != "All weights"}
    assert len(target & others) == 0
    assert len(target) == len(others)
    assert regions["Oracle"] == target
    assert regions["Wrong group"] == others
    assert len(regions["Random"] & target) == 0
    outside = regions["Random, outside both"]
    assert len(outside & target) == len(outside & others) == 0 < len(regions["Random"] & others)
    assert 0 < len(regions["Uniform"] & target) < len(target)
    assert {len(regions[arm]) for arm in ("Random", "Uniform", "Corrupt")} == {len(target)}
    assert len(outside) == len(target)
    assert len(regions["Corrupt"] & target) == pytest.approx(len(target) / 2, abs=1)
    assert regions["Projections"].fraction == 1
    assert arms["All weights"].json()["region"] is None
    model = original_model(store[injected], store[injected["parent"]["parent"]])
    foreign = regions["Corrupt"] - target
    assert len(foreign - regions["Random"]) == 0, "of one draw, it is a part of Random"
    again = region_of(arms["Corrupt"].description | {"draw": 1}, store[injected], model) - target
    assert len(again) == len(foreign) and 0 < len(again - regions["Random"]), "another draw is not"
    start = model.state_dict()
    moved = {
        name
        for name, x in arms["All weights"].tensors("weights.safetensors").items()
        if not torch.equal(x, start[name])}
    assert len(moved) > 20

def test_the_second_group_is_known_and_stays(armed):
    store, injected, arms, _ = armed
    from unloc.scoring import score
    base = store[injected["parent"]["parent"]]
    examples = examples_of(base.file("tokenizer"), json.dumps(base.description["data"]))
    original, without = original_model(store[injected], base), model_without(store[injected], base)
    other = examples["holdout"][:len(examples["forget"])]
    known = {
        name: [
            float(score(model, e).extraction_strength.mean()) for e in (examples["forget"], other)]
        for name, model in (("original", original), ("without", without), ("retained", load(base)))}
    assert (
        known["without"][1] > known["retained"][1] + .1
        and known["original"][0] > known["without"][0] + .1), known

def test_attacks_tell_how_far_and_what_came_back(armed):
    _, _, _, attacks = armed
    found = {arm: run.json() for arm, run in attacks.items()}
    tables = {arm: run.table("attacks.csv") for arm, run in attacks.items()}
    for arm, r in found.items():
        if r["met"]: assert abs(r["reached"] - r["level"]) <= .03 or arm == "retained"
        assert 0 <= r["share"] <= 1
        assert set(tables[arm].support.dropna()) == {"target region", "outside it", "all weights"}
        assert {"8 bits", "4 bits", "paraphrased", "few-shot", "sampled answers"} <= set(
            tables[arm].attack)
    assert found["retained"]["reversed"] == pytest.approx(1)
    assert found["retained"]["cosine_to_reversal"] == pytest.approx(1)
    assert found["retained"]["distance_to_retained"] == 0
    assert found["Random"]["cosine_to_reversal"] == 0
    assert found["Restore"]["cosine_to_reversal"] == pytest.approx(1)
    assert found["Restore"]["reversed"] == pytest.approx(found["Restore"]["share"])
    facts = attacks["Oracle"].tensors("facts.safetensors")
    assert facts["relearn forgotten facts, target region"].shape == (2, len(facts["known"]) - 5)
    assert torch.equal(
        facts["relearn held-out facts, all weights"][0], facts["left"][facts["measured"]])

def test_an_attack_that_only_measures_has_a_row_without_an_attack(armed):
    store, injected, *_ = armed
    run, = sweep(store, [attacking(injected, {"usual": False, "attacks": {"depth": {}}})], 1)
    runs = Runs(("seed",), {(0,): run})
    found = runs.attacks()
    assert len(found) == 1 and found.attack.isna().all() and found.recovered.isna().all()
    assert found.depth[0] == run.json()["depth"] and 0 <= found.depth[0] <= 1
    assert len(runs.attacks("relearn forgotten facts, all weights")) == 0

def test_both_ends_are_told_once_beside_what_is_asked_and_seen(
    armed
): # by the injection taken back, for all arms
    _, _, _, attacks = armed
    asked = attacks["Restore"].table("attacks.csv").set_index("attack")
    inside = attacks["Restore"].json()
    for bits in ("8 bits", "4 bits"):
        assert asked["end at first"][bits] > .5
        assert asked["end without"][bits] < 0 < asked["end at first"][bits] - asked["end"][bits]
    # relearning, and sampled answers
    assert asked["end at first"]["paraphrased"] >= asked["end without"]["paraphrased"]
    assert asked["end at first"].isna().sum() == 10
    assert inside["lens_last without"] < inside["lens_last"] < inside["lens_last at first"]
    assert {
        f"{name}{when}"
        for name in ("lens", "probe", "probe_control")
        for when in ("", " at first", " without")} <= inside.keys()
    for arm in ("Oracle", "Random", "All weights"):
        assert not any(
            " " in name
            for name in [*attacks[arm].json(), *attacks[arm].table("attacks.csv").columns])
        assert {"lens", "probe", "depth"} <= attacks[arm].json().keys()

def test_luck_is_no_recovery(
    armed
): # the retained model, asked often, says some words of any answer
    _, _, _, attacks = armed
    facts = attacks["retained"].tensors("facts.safetensors")
    table = attacks["retained"].table("attacks.csv")
    assert facts["sampled"].max() > 0
    assert (facts["sampled"] != facts["said"]).any()
    assert not torch.equal(facts["sampled at first"], facts["sampled without"])
    assert table.end[table.attack == "sampled answers"].tolist() == [0.]

@pytest.mark.parametrize(
    "bad, says",
    [
        (
            lambda: attacking(injection(JUDGED, 0, INJECT), ATTACK | {"level": 1.5}),
            "attack: level must lie in [0, 1], got 1.5"),
        (
            lambda: attacking(
                localized_unlearning(
                    localization(teaching(JUDGED), "wagle"), .1, "npo", UNLEARN, 0),
                ATTACK),
            "an attack is measured between the original and the retained model"),
        (
            lambda: attacking(JUDGED, ATTACK),
            "this run is built on one of kind unlearn or inject or edit, got judge"),
        (
            lambda: attacking(injection(JUDGED, 0, INJECT), {"lr": 1.}),
            "attack lacks batch_size, epochs, region_lr, taught"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Wrong group", "npo", UNLEARN),
            "no other facts were injected"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Corrupt", "npo", UNLEARN),
            "swapped must lie between 0 and 1 for the arm Corrupt"),
        (
            lambda: unlearning(injection(JUDGED, 0, INJECT), "Oracle", "npo", UNLEARN, swapped=.5),
            "be 0 for all others, got 0.5 for Oracle"),
        (
            lambda: supervision(injection(JUDGED, 0, INJECT), "All weights", SUPERVISE),
            "unknown arm 'All weights'; known: Oracle, Random")])
def test_a_bad_arm_or_attack_is_one_line(bad, says):
    with pytest.raises(ValueError) as error: bad()
    assert says in str(error.value) and "\n" not in str(error.value)

def unmodelled(examples): return Scene(None, None, None, examples, None, None)

@pytest.mark.parametrize(
    "how, says",
    [
        (
            {"taught": 10},
            "taught = 10 of 10 forgotten facts leaves none to be measured; teach fewer"),
        (
            {"taught": 9, "others": 2},
            "9 expected; choose data with more (n_holdout), or teach fewer")])
def test_an_attack_without_facts_says_what_it_needs(how, says):
    examples = {"forget": list(range(10)), "holdout": list(range(10)), "retain": list(range(10))}
    with pytest.raises(ValueError) as error:
        relearning(
            unmodelled(examples | {"holdout": examples["holdout"][how.get("others", 0):]}),
            taught=how["taught"])
    assert says in str(error.value)

# --- ways of injecting

@pytest.fixture(scope="module")
def ways(tmp_path_factory): # way: its injection, and the unlearning runs of both arms
    store = Store(tmp_path_factory.mktemp("ways"))
    judged = standard(
        base_models(
            data_description(WORLD | OTHERS),
            "llama",
            {"d_model": 32, "n_layers": 2, "d_ff": 128, "n_heads": 2, "vocab_size": 400},
            HOW,
            {"epochs": 4, "lr": 4e-3, "batch_size": 8}),
        JUDGE)
    how = {"fraction": .1, "epochs": 4, "lr": 1.5e-2, "batch_size": 4}
    injected = {
        way: injection(judged, 0, how | more)
        for way, more in {
            "usual": {},
            "neuron": {"unit": "neuron"},
            "head": {"unit": "head + neuron"},
            "mixed": {"style": "mixed"},
            "room": {"style": "with room", "room": 1}}.items()}
    arms = {
        (way, arm): unlearning(d, arm, "npo", {"lr": 5e-3, "epochs": 1, "full_every": 1})
        for way, d in injected.items()
        for arm in PAIR}
    attacks = {
        (way, arm): attacking(d, ATTACK | {"only": "relearn forgotten facts, all weights"})
        for (way, arm), d in arms.items()
        if way in ("head", "room")}
    attacks |= {
        (way, "Restore"): attacking(
            injected[way], ATTACK | {"only": "relearn retain facts, all weights"})
        for way in ("neuron", "room")}
    sweep(store, [*arms.values(), *attacks.values()], 2)
    return (
        store,
        {way: store[d] for way, d in injected.items()},
        {key: store[d] for key, d in arms.items()},
        {key: store[d] for key, d in attacks.items()})

def test_an_injection_moves_its_unit_and_nothing_else(ways):
    store, injected, arms, _ = ways
    base = store[injected["usual"].description["parent"]["parent"]]
    moved = {}
    for way, run in injected.items():
        without = model_without(run, base).state_dict()
        original = original_model(run, base).state_dict()
        moved[way] = {
            name.split(".", 3)[3].removesuffix(".weight")
            for name, x in original.items()
            if not torch.equal(x, without[name])}
    assert moved["usual"] == moved["mixed"] == moved["room"] == {"mlp.down_proj"}
    assert moved["neuron"] == {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert moved["head"] == moved["neuron"] | {f"self_attn.{name}_proj" for name in "qkvo"}
    for way in ("neuron", "head"):
        target, drawn = (
            load_region(run, injected[way].description)
            for run in (injected[way], arms[way, "Random"]))
        assert len(target) == len(drawn)
        assert len(target.vectors & drawn.vectors) == 0
        assert load_region(arms[way, "Oracle"], injected[way].description) == target
        assert (
            target.heads is None or len(target.heads & drawn.heads) == 0 and len(target.heads) == 1)

def test_room_was_made_before_the_facts_came(ways):
    from unloc.masked import value_vectors
    from unloc.models import output_projections
    store, injected, arms, attacks = ways
    run, base = injected["room"], store[injected["usual"].description["parent"]["parent"]]
    without, target = model_without(run, base), Region.load(run.file("region.safetensors"))
    assert not any(
        value_vectors(p)[:, k].any() for p, k in zip(output_projections(without), target.columns))
    assert all(value_vectors(p).any() for p in output_projections(without))
    restored = attacks["room", "Restore"].json()
    assert restored["distance_to_retained"] == 0
    assert restored["reversed"] == pytest.approx(1)
    assert attacks["room", "Random"].json()["cosine_to_reversal"] == 0
    assert attacks["neuron", "Restore"].json()["distance_to_retained"] == 0
    assert attacks["head", "Oracle"].json()["cosine_to_reversal"] != 0

def test_one_attack_alone_is_the_one_of_many(ways, armed):
    store, injected, arms, attacks = armed
    only = store.do(
        attacking(
            arms["Oracle"].description | {"parent": injected},
            ATTACK | {"level": .75, "only": "relearn forgotten facts, all weights"}),
        compute)
    table, whole = only.table("attacks.csv"), attacks["Oracle"].table("attacks.csv")
    same = whole[
        (whole.attack == "relearn forgotten facts") & (whole.support == "all weights")
    ].reset_index(drop=True)
    # of a run that left nothing to recover, nothing twice
    pandas.testing.assert_frame_equal(table, same, check_exact=True, check_dtype=False)
    curves = [
        run.tensors("facts.safetensors")["relearn forgotten facts, all weights"]
        for run in (only, attacks["Oracle"])]
    assert torch.equal(*curves) and len(curves[0]) > 1

def test_equal_retention_is_the_last_point_that_cost_no_more():
    at = []
    def put(share): at.append(share)
    # rises to .9 half way, falls to .7 at the end
    cost = lambda: 1 - .2 * (1 - at[-1]) if at[-1] < .5 else .9 - .4 * (at[-1] - .5)
    level = at_level(put, .8, cost, "RS")
    assert level.met
    assert level.share > .5
    assert abs(level.reached - .8) <= .03
    assert at[-1] == level.share
    # never so costly: shown as not met
    assert at_level(put, .5, cost, "RS") == (1., pytest.approx(.7), False)
    assert at_level(put, 0, lambda: .6) == (1., .6, True)

@pytest.mark.parametrize(
    "more, says",
    [
        (
            {"style": "frozen"},
            "inject: unknown style 'frozen'; known: fine-tuned, mixed, with room"),
        ({"unit": "layer"}, "unknown unit 'layer'"),
        ({"style": "with room"}, "style 'with room' takes room, its epochs"),
        ({"style": "mixed", "others": True}, "others and style are studied one at a time")])
def test_a_bad_way_of_injecting_is_one_line(more, says):
    with pytest.raises(ValueError) as error: injection(JUDGED, 0, INJECT | more)
    assert says in str(error.value) and "\n" not in str(error.value)

def test_retain_facts_are_mixed_in_with_any_unit(tmp_path):
    store, base = Store(tmp_path), parent()
    judged = standard(base, JUDGE)
    alone = injection(judged, 0, INJECT | {"unit": "neuron"})
    mixed = injection(judged, 0, INJECT | {"style": "mixed", "unit": "neuron"})
    assert (mixed["style"], mixed["unit"]) == ("mixed", "neuron")
    both, one = sweep(store, [base, judged, mixed, alone], 1)[-2:]
    assert both.json()["locked_bit_equal"] and both.json()["region"] == one.json()["region"]
    assert both.json()["original"] != one.json()["original"]

def test_the_usual_way_needs_no_word():
    assert run_id(
        injection(JUDGED, 0, INJECT | {"style": "fine-tuned", "unit": "value vector"})
    ) == run_id(injection(JUDGED, 0, INJECT))
    with pytest.raises(ValueError, match="the arm Corrupt is made of value vectors"):
        unlearning(
            injection(JUDGED, 0, INJECT | {"unit": "neuron"}),
            "Corrupt",
            "npo",
            UNLEARN,
            swapped=.5)
    with pytest.raises(ValueError, match="unknown attack 'shout'"):
        relearning(
            unmodelled(
                {"forget": list(range(10)), "holdout": list(range(10)), "retain": list(range(10))}),
            taught=5,
            only="shout")

def test_room_is_made_in_wide_weights(tmp_path):
    store, judged = Store(tmp_path), standard(parent(precision="bfloat16"), JUDGE)
    run = store.do(injection(judged, 0, INJECT | {"style": "with room", "room": 1}), compute)
    base = store[judged["parent"]]
    without = model_without(run, base)
    original = original_model(run, base)
    target = Region.load(run.file("region.safetensors"))
    assert {p.dtype for p in (*without.parameters(), *original.parameters())} == {torch.bfloat16}
    assert run.json()["locked_bit_equal"]
    assert not any(
        p.weight[:, k].any() for p, k in zip(output_projections(without), target.columns))
    assert all(p.weight[:, k].any() for p, k in zip(output_projections(original), target.columns))
    retained = retained_model(base)
    # all else learned once more
    assert not torch.equal(without.lm_head.weight, retained.lm_head.weight)
