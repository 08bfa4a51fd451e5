"""Deletion by example localization gives the printed scores of a worked case, resets what was
chosen and nothing else, and has a control with as many members in each layer."""
import copy, json, math
from dataclasses import replace
from pathlib import Path
import pandas, pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from unloc.change import edited
from unloc.data import data_description
from unloc.deletion import (
    CRITERIA, STARTS, WAYS, ablation, channel_scores, first_spread, from_retained, holding, judged,
    region_label, region_named, relabelled, reset_values, shuffled, taught_again, unlearned_by)
from unloc.heads import Neurons
from unloc.invented import author_world
from unloc.locked import locked_digest
from unloc.masked import columns_of, put_columns
from unloc.methods.criticality import criticality, criticality_weights
from unloc.models import output_projections, region_shape, tiny_model, value_vectors
from unloc.regions import Region
from unloc.register import METHODS, find
from unloc.runs import Store
from unloc.scene import Scene, toy_facts
from unloc.scoring import score
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.edit import editing
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.measure import measuring
from unloc.streaming import check_scores, planted
from unloc.tokens import encode, train_tokenizer

def exact(rows): return torch.tensor(rows, dtype=torch.float64)

# rows are channels in the worked case, columns in the package
VALUES = exact([[1, -2, .5, 0], [.1, .1, .1, .1], [3, -1, 0, 2]]).T
GRADIENT = exact([[.2, .1, -.4, 9], [5, -5, 5, -5], [.1, .1, .7, -.05]]).T
PRODUCT, SIZE = (CRITERIA[name](VALUES, GRADIENT) for name in ("product", "gradient"))

def small(arch="llama", **shape):
    return tiny_model(arch, 60, **{"d_model": 16, "n_layers": 2, "d_ff": 24, "n_heads": 2} | shape)

@pytest.fixture(scope="module")
def toy(): return planted()

def state(model): return {name: x.clone() for name, x in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def known(model, examples): return float(score(model, examples).extraction_strength.mean())

# --- the worked case

def test_products_of_weights_and_gradients():
    want = exact([[.2, .2, .2, 0], [.5, .5, .5, .5], [.3, .1, 0, .1]])
    torch.testing.assert_close(PRODUCT.T, want, rtol=0, atol=1e-15)

@pytest.mark.parametrize("h, want", [
    (1, [.2, .5, .3]), (2, [.2, .5, .2]), (4, [.15, .5, .125])])
def test_channel_scores(h, want):
    torch.testing.assert_close(channel_scores(PRODUCT, h / 4), exact(want), rtol=0, atol=1e-15)

def test_the_size_of_the_gradient_orders_two_channels_the_other_way():
    plain = channel_scores(SIZE)
    torch.testing.assert_close(plain, exact([2.425, 5, .2375]), rtol=0, atol=1e-15)
    assert plain[0] > plain[2] and channel_scores(PRODUCT, .25)[0] < channel_scores(PRODUCT, .25)[2]

@pytest.mark.parametrize("h, two", [(1, {1, 2}), (4, {0, 1})])
def test_how_many_scores_count_decides_the_second_channel(h, two):
    scores = channel_scores(PRODUCT, h / 4)
    assert Region.top(scores[None], 1 / 3).columns[0].tolist() == [1]
    assert set(Region.top(scores[None], 2 / 3).columns[0].tolist()) == two

@pytest.mark.parametrize("h", [1, 2, 4])
def test_a_third_of_the_weights_is_one_channel(h): # a channel's score, given to all its weights
    spread = channel_scores(PRODUCT, h / 4).expand(4, 3)
    assert Region.top(spread[None], 1 / 3).mask[0].all(0).tolist() == [False, True, False]

def test_the_last_channel_may_be_cut_midway_where_weights_are_counted():
    spread = channel_scores(PRODUCT, .25).expand(4, 3)
    counts = Region.top(spread[None], .5).mask[0].sum(0).tolist()
    assert counts == [0, 4, 2] # six of twelve weights
    assert len(Region.top(channel_scores(PRODUCT, .25)[None], .5)) == 1 # whole channels

@pytest.mark.parametrize("top", [0, -1., 1.5, math.nan])
def test_a_share_of_no_weights_is_refused(top):
    with pytest.raises(ValueError, match=r"top is .*; expected a share .* in \(0, 1\]"):
        channel_scores(PRODUCT, top)

# --- the localizers

def test_signed_products_are_summed_before_the_absolute_value(toy):
    model, half = toy.model, len(toy.forget) // 2
    parts = [torch.stack(criticality_weights(model, some)) for some in
        (toy.forget[:half], toy.forget[half:])]
    whole = torch.stack(criticality_weights(model, toy.forget))
    assert (whole <= sum(parts) / 2 + 1e-9).all() and (whole < sum(parts) / 2 - 1e-6).any()

def test_a_channel_is_the_mean_of_its_weights(toy):
    whole = torch.stack(criticality_weights(toy.model, toy.forget))
    close = dict(rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(criticality(toy.model, toy.forget), whole.mean(1), **close)
    few = criticality(toy.model, toy.forget, top=.25)
    torch.testing.assert_close(few, whole.topk(16, dim=1).values.mean(1), **close)

def test_the_sign_of_the_loss_and_its_size_do_not_matter(toy):
    twice = [*toy.forget, *toy.forget]
    torch.testing.assert_close(
        criticality(toy.model, twice), criticality(toy.model, toy.forget), rtol=1e-5, atol=1e-9)

def test_it_finds_a_planted_region_the_gradient_misses(toy):
    assert toy.recall("criticality") > .5 > 2 * toy.recall("criticality", criterion="gradient")
    assert toy.recall("weight_norm") >= toy.recall("criticality") # length alone is a rival

def test_the_units_are_checked():
    model, facts = small(), toy_facts(3, 1, 2)
    for name in ("criticality", "criticality_weights"):
        method = find("localizer", name)
        found = method(model=model, forget=facts)
        assert check_scores(found, model, name) == method.about["unit"]
    with pytest.raises(ValueError, match="unknown criterion 'size'; known: product, gradient"):
        criticality_weights(model, facts, "size")

# --- a fresh start

@pytest.mark.parametrize("arch", ["llama", "olmo2"])
def test_a_fresh_start_is_as_large_as_first_weights(arch):
    model = small(arch, d_model=64, d_ff=512)
    every = Region.sample(region_shape(model), 1, 0)
    for layer, (index, drawn) in reset_values(model, every, seed=3).items():
        first = value_vectors(output_projections(model)[layer]).detach().T[index]
        assert abs(float(drawn.std() / first.std()) - 1) < .02 and abs(float(drawn.mean())) < 1e-3
        assert not torch.equal(drawn, first)

def test_no_region_changes_nothing_and_the_whole_one_becomes_the_draw():
    model = small()
    before, none = state(model), Region(torch.zeros(2, 24, dtype=torch.bool))
    assert reset_values(model, none) == {}
    with holding(model, reset_values(model, none)): assert same(state(model), before)
    every = reset_values(model, ~none)
    with holding(model, every):
        for layer, (index, drawn) in every.items():
            now = value_vectors(output_projections(model)[layer]).T[index]
            assert torch.equal(now, drawn)
    assert same(state(model), before)

def test_what_each_start_gives():
    model = small()
    region = Region.sample((2, 24), .5, 0)
    old = columns_of(model, region)
    found = {name: reset_values(model, region, name) for name in STARTS}
    for layer, (index, values) in old.items():
        got = {name: x[layer][1] for name, x in found.items()}
        assert all(torch.equal(x[layer][0], index) for x in found.values())
        assert torch.equal(got["kept"], values) and not got["zero"].any()
        assert torch.equal(got["mean"], values.mean(0).expand_as(values))
        assert .8 < float(got["noise"].norm() / values.norm()) < 1.25
    again = reset_values(model, region, seed=0)
    assert all(torch.equal(again[k][1], found["fresh"][k][1]) for k in again)
    assert not torch.equal(reset_values(model, region, seed=1)[0][1], again[0][1])

def test_single_weights_and_neurons_are_reset_as_well():
    model = small()
    for region in (Region.sample((2, 16, 24), .2, 0), Neurons.sample(model, .2, 0, heads=True)):
        before = locked_digest(model, region)
        new = reset_values(model, region, "zero")
        with holding(model, new):
            assert locked_digest(model, region) == before
            assert not any(x.any() for _, x in columns_of(model, region).values())

def test_a_configuration_without_a_spread_is_refused():
    model = small()
    model.config.initializer_range = 0.
    with pytest.raises(ValueError, match="names no spread of first weights .* take start='mean'"):
        reset_values(model, Region.sample((2, 24), .5, 0))
    assert reset_values(model, Region.sample((2, 24), .5, 0), "zero")
    assert first_spread(GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=8))) == .02

# --- reset, and learn again

@pytest.mark.parametrize("start", STARTS)
def test_weights_outside_the_region_are_bit_identical(start):
    model = small()
    region, before = Region.sample((2, 24), .3, 0), state(model)
    new = taught_again(model, region, toy_facts(6, 1, 2), start, epochs=3, lr=.05)
    assert same(state(model), before), "the model is left as it was"
    locked = locked_digest(model, region)
    put_columns(model, new)
    assert locked_digest(model, region) == locked
    moved = columns_of(model, region)
    assert all(torch.equal(moved[k][1], new[k][1]) for k in new)

def test_the_model_is_put_back_after_an_error():
    model = small()
    before = state(model)
    def stop(share): raise KeyError
    with pytest.raises(KeyError):
        taught_again(model, Region.sample((2, 24), .3, 0), toy_facts(6, 1, 2), progress=stop)
    assert same(state(model), before)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = small().to(dtype)
    before, region = state(model), Region.sample((2, 24), .3, 0)
    new = taught_again(model, region, toy_facts(6, 1, 2), epochs=2)
    assert same(state(model), before)
    assert {x.dtype for _, x in new.values()} == {torch.promote_types(dtype, torch.float32)}

def test_the_editor_forgets_through_the_right_region_alone(toy):
    other = Region.sample(toy.target.shape, .10, seed=1, outside=toy.target)
    start, found = known(toy.model, toy.forget), {}
    how = {"epochs": 20, "batch_size": 4}
    for name, region, kept in (("target", toy.target, {}), ("other", other, {}),
        ("not reset", toy.target, {"start": "kept"})):
        change, locked = edited(METHODS["editor"]["reset"], toy.model, region, how | kept,
            retain=toy.retain, seed=0)
        found[name] = known(toy.model, toy.forget), known(toy.model, toy.retain)
        assert locked and change.end.keys() == {0, 1}
        change.at(0)
    assert found["target"][0] < .5 * found["other"][0] and found["target"][1] > .9
    assert found["not reset"][0] == start == known(toy.model, toy.forget)

@pytest.mark.parametrize("given, says", [
    ({"region": None}, "reset needs a region, and there is none"),
    ({"region": Region(torch.zeros(2, 24, dtype=torch.bool))}, "the region is empty, so nothing"),
    ({"retain": []}, "the retain set is empty"),
    ({"options": {"start": "old"}}, "start must be one of fresh, mean, zero, noise, kept"),
    ({"options": {"epochs": 0}}, "epochs must be at least 1")])
def test_what_the_editor_refuses(given, says):
    region = Region.sample((2, 24), .3, 0)
    usual = {"model": small(), "region": region, "retain": toy_facts(4, 1, 2)}
    with pytest.raises(ValueError, match=says) as error:
        METHODS["editor"]["reset"](**usual | given)
    assert "\n" not in str(error.value)

# --- the ablation

WORLD = author_world(n_authors=4, n_forget=1, n_holdout=1)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)

@pytest.fixture(scope="module")
def scene():
    sets = {name: [encode(TOKENIZER, f.question, f.answer) for f in getattr(WORLD, name)]
        for name in ("forget", "retain", "holdout")}
    models = [tiny_model("llama", len(TOKENIZER), 32, 2, 40, 2, seed=s) for s in (0, 1)]
    return Scene.of(copy.deepcopy(models[0]), *models, sets, target=Region.sample((2, 40), .1, 0),
        facts=WORLD, tokenizer=TOKENIZER)

def counts(region): return [len(row) for row in region.index]

@pytest.mark.parametrize("name", ["criticality", "criticality_weights", "gradient", "deepest"])
def test_a_control_has_as_many_members_in_each_layer(scene, name):
    own = region_named(scene, name, .3)
    drawn = [region_named(scene, f"{name}, matched", .3, seed) for seed in (0, 1)]
    assert counts(drawn[0]) == counts(drawn[1]) == counts(own) and own.shape == drawn[0].shape
    assert drawn[0] != drawn[1] and drawn[0] == shuffled(own, 0)

def test_a_control_is_drawn_fairly():
    region = Region(torch.tensor([[True, False, False, False], [True, True, False, False]]))
    hits = sum(shuffled(region, seed).mask.double() for seed in range(2000)) / 2000
    assert (hits - torch.tensor([[.25] * 4, [.5] * 4])).abs().max() < .05

def test_regions_that_no_localizer_gives(scene):
    assert region_named(scene, "target", .5) is scene.target
    assert len(region_named(scene, "all", .1)) == 80
    assert counts(region_named(scene, "deepest", .6)) == [8, 40]
    assert counts(region_named(scene, "shallowest", .6)) == [40, 8]
    own, blind = (region_named(scene, name, .2) for name in ("criticality", "criticality, retain"))
    assert own != blind and len(own) == len(blind)

@pytest.mark.parametrize("name, says", [
    ("nowhere", "unknown localizer 'nowhere'"), ("wagle, retain", "cannot be shown retain facts"),
    ("nowhere, matched", "unknown localizer 'nowhere'")])
def test_unknown_regions_are_refused(scene, name, says):
    with pytest.raises(ValueError, match=says): region_named(scene, name, .1)

def test_a_target_that_is_not_known_is_refused(scene):
    with pytest.raises(ValueError, match="'target' is not known, since all weights learned"):
        region_named(replace(scene, target=None), "target", .1)

def test_relabelled_facts_are_the_same_questions_with_wrong_answers(scene):
    wrong = relabelled(scene)
    for e, right, fact in zip(wrong, scene.forget, WORLD.forget, strict=True):
        assert e.ids[:e.start] == right.ids[:right.start]
        assert TOKENIZER.decode(e.ids[e.start:-1]).strip() in fact.perturbed_answer
    assert any(a.ids != b.ids for a, b in zip(wrong, relabelled(scene, 1)))
    with pytest.raises(ValueError, match="no wrong answers, which relabelling teaches"):
        relabelled(replace(scene, facts=None))

def test_every_way_takes_as_many_steps(scene):
    steps = {}
    for way in WAYS:
        seen = []
        unlearned_by(scene, way, scene.target, epochs=2, facts=12, batch_size=4,
            progress=seen.append)
        steps[way] = len(seen)
    assert steps["reset"] == steps["fine-tune"] == 6
    assert 6 <= steps["relabel"] < 6 + math.ceil(len(scene.forget) / 2) # whole epochs

def test_the_judgement_covers_what_there_is(scene):
    found = judged(scene.attacked, scene, most=6)
    assert list(found) == ["forget", "retain", "member", "accuracy", "paraphrased", "test"]
    few = replace(scene, examples={"forget": scene.forget}, facts=None)
    assert list(judged(scene.attacked, few)) == ["forget"]

def test_the_table_has_a_row_for_each_cell_and_both_ends(scene):
    before, seen = state(scene.attacked), []
    names = ["criticality", "criticality, matched", "criticality_weights", "target", "all"]
    rows = ablation(scene, names, ["reset", "fine-tune"], [.2, .4], most=6, epochs=1, facts=8,
        progress=seen.append)
    assert same(state(scene.attacked), before)
    assert [r["region"] for r in rows[:2]] == ["original", "retained"]
    assert len(rows) == 2 + 2 * (2 * 3 + 2) and seen[-1] == 1 and seen == sorted(seen)
    assert len({tuple(r) for r in rows}) == 1, "the same columns"
    by = {(r["region"], r["way"], round(r["share"], 2)): r for r in rows[2:]}
    assert by["criticality", "reset", .2]["members"] == (
        by["criticality, matched", "reset", .2]["members"])
    assert by["target", "reset", .1]["recall"] == 1 == by["all", "reset", 1.]["recall"]
    assert math.isnan(by["criticality_weights", "reset", .2]["recall"])
    with pytest.raises(ValueError, match="unknown way 'prune'"): ablation(scene, names, ["prune"])

def test_the_measurement_is_the_ablation(scene):
    options = {"regions": ["criticality"], "ways": ["reset"], "shares": [.2], "epochs": 1,
        "facts": 8, "most": 6}
    got = METHODS["measurement"]["deletion"](scene=scene, options=options)
    want = ablation(scene, ["criticality"], ["reset"], [.2], most=6, epochs=1, facts=8)
    assert str(got) == str(want)

# --- distances from retraining

def test_differences_are_retained_less_measured():
    rows = []
    for seed in (0, 1):
        ends = ("original", math.nan, 90.), ("retained", "", 80. + seed), ("all", "reset", 70.)
        rows += [{"region": r, "way": w, "share": .1, "test": x, "seed": seed} for r, w, x in ends]
    found = from_retained(pandas.DataFrame(rows), ["seed"])
    assert found["Δ test"].tolist() == [-10, 10, -9, 11]
    assert found.way.tolist() == ["", "reset"] * 2 and "Δ share" not in found
    with pytest.raises(ValueError, match="way names several retained models together"):
        from_retained(pandas.DataFrame(rows), ["way"])

@pytest.mark.parametrize("name, want", [
    ("criticality", "Criticality"), ("criticality, matched", "Criticality, matched"),
    ("criticality(criterion='gradient'), retain", "Criticality (criterion gradient), retain"),
    ("deepest", "Deepest"), ("retained", "Retained")])
def test_regions_have_names(name, want): assert region_label(name) == want

# --- as runs

def test_the_localizer_the_editor_and_the_measurement_are_steps_of_a_study(tmp_path):
    world = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 1}
    model = {"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300}
    how = {"epochs": 1, "lr": 4e-3, "batch_size": 64}
    base = base_models(data_description(world), "llama", model, how, how)
    judge = standard(base, {"retain": 5, "utility": 2, "max_new_tokens": 4})
    injected = injection(judge, 0, {"fraction": .25, "epochs": 1, "lr": 1e-2, "batch_size": 8})
    options = {"epochs": 1, "batch_size": 32}
    found = localization(injected, "criticality")
    edits = [editing(injected, "reset", options=options),
        editing(found, "reset", options=options, fraction=.25)]
    asked = {"regions": ["criticality", "target"], "ways": ["reset"], "shares": [.25], **options}
    store = Store(tmp_path)
    for description in edits:
        run = store.do(description, compute)
        assert run.json()["locked_bit_equal"] and run.json()["region"] == 16
    table = store.do(measuring(injected, "deletion", asked), compute).table("measures.csv")
    assert table.region.tolist() == ["original", "retained", "criticality", "target"]
    assert table.recall.iloc[3] == 1 and table.members.iloc[2].count(" ") == 1

# --- what the page says it finds

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "figures" / "related"
TABLE = HERE / "table_deletion_data.csv"
saved = pytest.mark.skipif(not TABLE.exists(), reason="no figure of the profile is saved")

@saved
def test_the_page_says_what_its_tables_hold():
    cells = json.loads((ROOT / "nbs/53_deletion.ipynb").read_text("utf-8"))["cells"]
    assert "".join(cells[-1]["source"]).startswith("## What we find")
    data = pandas.read_csv(HERE / "table_deletion_data.csv").fillna({"way": ""})
    far = data.assign(distance=data["Δ accuracy"].abs()).groupby(["region", "way"]).distance.mean()
    assert (
        far["target", "reset"] < far["criticality", "reset"]
        < far["criticality, matched", "reset"] < far["original", ""])
    assert far["target", "fine-tune"] > 2 * far["target", "reset"]
    assert data[data.region.eq("all") & data.way.eq("relabel")]["Δ accuracy"].mean() > 0
    assert far["criticality, retain", "reset"] < far["criticality, matched", "reset"]
    about = json.loads((HERE / "table_deletion_pairs.json").read_text("utf-8"))
    pairs = pandas.DataFrame(about["rows"])
    tests = pairs.set_index(["way", "region"])
    assert tests.loc["reset", "Criticality, retain"]["difference [95 %]"][0] in "-−"
