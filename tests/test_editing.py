"""Edits solve what they are to solve, leave alone what they are to leave alone, and every editor
gives a change that stays in its region, goes by shares and comes back from disk."""
import numpy as np
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, OlmoeConfig, OlmoeForCausalLM
from unloc.change import Change, LowRank, compared, edited
from unloc.data import data_description
from unloc.editing import (
    Edits, balanced, editable, floor_of, in_null_space, keys_and_values, null_projector, rank_one,
    ridge, second_moments)
from unloc.heads import Neurons
from unloc.invented import author_world
from unloc.loading import recompute
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import METHODS, find
from unloc.runs import Store
from unloc.scene import toy_facts
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.edit import editing
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.subjects import requests, subject_spans, variants
from unloc.tokens import Example, encode, train_tokenizer
from unloc.values import Search, find_values, layers_for, writes_plainly

NAMES = "alphaedit", "ft_l", "ft_m", "memit", "rome"

# --- golden cases: two keys of six entries, four outputs, three keys to be kept, in this order

@pytest.fixture
def golden():
    draw = np.random.default_rng(0).standard_normal
    return [torch.tensor(draw(shape)) for shape in ((6, 2), (4, 2), (6, 3))]

def error(edit, keys, wanted): # of the fit, relative
    return float((edit.left @ (edit.right @ keys) - wanted).norm() / wanted.norm())
def drift(edit, kept): return float((edit.left @ (edit.right @ kept)).norm())

@pytest.mark.parametrize("weight, fit", [(1e-6, "1.4e-06"), (1., "0.384"), (10., "0.803")])
def test_the_golden_edits_in_the_null_space(golden, weight, fit):
    keys, wanted, kept = golden
    projector = null_projector(kept @ kept.T, below=1e-9)
    edit = in_null_space(keys, wanted, projector, weight)
    digits = 2 if "e" in fit else 3
    assert f"{error(edit, keys, wanted):.{digits}g}" == fit
    assert drift(edit, kept) < 1e-9

@pytest.mark.parametrize("weight", [1., 15000.])
def test_the_golden_ridge_has_a_free_space(golden, weight):
    keys, wanted, kept = golden
    edit = ridge(keys, wanted, kept @ kept.T, weight, floor=1e-9)
    assert error(edit, keys, wanted) < 1.5e-9 and drift(edit, kept) < 3e-9

@pytest.mark.parametrize(
    "weight, fit, moved",
    [(1e-3, "0.0001", "0.208"), (1., "0.0985", "0.169"), (15000., "0.998", "0.00026")])
def test_the_golden_ridge_of_full_rank(golden, weight, fit, moved):
    keys, wanted, kept = golden
    whole = kept @ kept.T + .1 * torch.eye(6, dtype=torch.float64)
    edit = ridge(keys, wanted, whole, weight)
    found = error(edit, keys, wanted), drift(edit, kept)
    assert [f"{x:.{len(want.lstrip('0.'))}g}" for x, want in zip(found, (fit, moved))] == [
        fit, moved]

def test_the_golden_rank_one_edit(golden):
    keys, wanted, kept = golden
    weight, key, value = wanted @ keys.T, keys[:, 0], wanted[:, 1]
    for moment in (None, kept @ kept.T + torch.eye(6)):
        edit = rank_one(key, value - weight @ key, moment)
        new = edit.added_to(weight)
        assert float((new @ key - value).abs().max()) < 1e-14

# --- exact properties

def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

@pytest.mark.parametrize("how", [dict(below=1e-9), dict(share=.25), dict(share=.75)])
def test_a_projector_is_symmetric_idempotent_and_of_its_rank(how):
    kept = normal(20, 9)
    found = null_projector(kept @ kept.T, **how)
    assert torch.equal(found, found.T)
    assert float((found @ found - found).abs().max()) < 1e-14
    rank = 11 if "below" in how else 20 * how["share"]
    assert abs(float(found.trace()) - rank) < 1e-12

def test_kept_keys_are_untouched_and_the_fit_becomes_exact():
    keys, wanted, kept = normal(20, 5), normal(7, 5, seed=1), normal(20, 9, seed=2)
    projector, last = null_projector(kept @ kept.T, below=1e-9), 1.
    for weight in (10., 1e-2, 1e-5, 1e-8):
        edit = in_null_space(keys, wanted, projector, weight)
        assert drift(edit, kept) < 1e-12
        assert error(edit, keys, wanted) < last
        last = error(edit, keys, wanted)
    assert last < 1e-6

def test_more_facts_than_free_directions_cannot_all_fit():
    keys, wanted, kept = normal(8, 5), normal(7, 5, seed=1), normal(8, 5, seed=2)
    projector = null_projector(kept @ kept.T, below=1e-9)
    assert error(in_null_space(keys, wanted, projector, 1e-9), keys, wanted) > .1

def test_the_whole_space_is_ridge_regression_without_others():
    keys, wanted = normal(8, 3), normal(4, 3, seed=1)
    free = in_null_space(keys, wanted, torch.eye(8), .5)
    plain = ridge(keys, wanted, torch.eye(8), .5)
    assert torch.allclose(free.right, plain.right, rtol=0, atol=1e-14)

def test_ridge_is_a_least_squares_problem_with_one_row_for_each_kept_key():
    keys, wanted, kept = normal(8, 3), normal(4, 3, seed=1), normal(8, 30, seed=2)
    edit = ridge(keys, wanted, kept @ kept.T, .3)
    rows = torch.cat([keys, .3 ** .5 * kept], 1).T
    goal = torch.cat([wanted, torch.zeros(4, 30)], 1).T
    direct = torch.linalg.lstsq(rows, goal).solution.T
    assert torch.allclose(edit.left @ edit.right, direct, rtol=0, atol=1e-12)

def test_a_weight_in_units_of_the_traces_knows_no_scale():
    keys, wanted, kept = normal(8, 3), normal(4, 3, seed=1), normal(8, 30, seed=2)
    def solved(scale, moment): # keys, and moments, in other units
        weight = balanced(scale * keys, moment * kept @ kept.T, .2)
        return scale * ridge(scale * keys, wanted, moment * kept @ kept.T, weight).right
    assert torch.allclose(solved(1., 1.), solved(30., 1e-3), rtol=1e-9)

@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda k, v, c: null_projector(c, below=0.), "no direction is free"),
        (lambda k, v, c: null_projector(c, below=1e9), "all 8 directions are free"),
        (lambda k, v, c: null_projector(0 * c, below=.02), "all 8 directions are free"),
        (lambda k, v, c: null_projector(c, share=1.), "share must lie in (0, 1), got 1.0"),
        (lambda k, v, c: null_projector(c, share=.01), "no direction is free"),
        (lambda k, v, c: null_projector(c), "name either `below`"),
        (lambda k, v, c: null_projector(c[:3], share=.5), "the second moment must be [3, 3]"),
        (lambda k, v, c: ridge(k, v, 0 * c, 1.), "have no single solution; take a floor above 0"),
        (lambda k, v, c: ridge(k, v, c, -1.), "weight must be a finite number of at least 0"),
        (lambda k, v, c: ridge(k, v, c, float("nan")), "weight must be a finite number"),
        (lambda k, v, c: ridge(k[:, :2], v, c, 1.), "2 keys and 3 wanted"),
        (lambda k, v, c: ridge(k * float("nan"), v, c, 1.), "keys holds 24 numbers"),
        (lambda k, v, c: ridge(k, v, k @ normal(3, 8), 1.), "is not symmetric"),
        (lambda k, v, c: balanced(k, 0 * c, 1.), "the second moment has trace 0"),
        (lambda k, v, c: floor_of(0 * c), "the second moment is zero"),
        (lambda k, v, c: rank_one(k, v), "key must be one vector"),
        (lambda k, v, c: rank_one(0 * k[:, 0], v[:, 0]), "the key is zero"),
        (lambda k, v, c: in_null_space(k, v, c, 0.), "weight must be above 0")])
def test_what_cannot_be_solved_is_one_line(bad, says):
    keys, wanted, kept = normal(8, 3), normal(4, 3, seed=1), normal(8, 30, seed=2)
    with pytest.raises(ValueError) as error: bad(keys, wanted, kept @ kept.T)
    assert says in str(error.value) and "\n" not in str(error.value)

# --- models

def llama(): return tiny_model("llama", 60, d_model=32, n_layers=2, d_ff=48, n_heads=2)
def olmo2(): return tiny_model("olmo2", 60, d_model=32, n_layers=2, d_ff=48, n_heads=2)
def gpt2(): # its projection has a bias, and its weight lies on its side
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in output_projections(model): p.bias.normal_()
    return model

def olmoe(): # the value vectors of its experts lie side by side
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    experts = dict(intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    config = OlmoeConfig(
        vocab_size=60, hidden_size=32, pad_token_id=0, eos_token_id=1, **sizes, **experts)
    return OlmoeForCausalLM(config).eval()

def bits(model): return {name: x.detach().clone() for name, x in model.state_dict().items()}
def same(model, before):
    return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
FORGET, RETAIN = toy_facts(6, 1, 2), toy_facts(8, 3, 4)

@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_an_edit_gives_a_model_the_values_that_were_wanted(make):
    model = make()
    before, places = bits(model), [2] * 6
    keys, values = keys_and_values(model, FORGET, places, 1)
    moment = second_moments(model, RETAIN, [1])[1]
    with Edits(model, None, [1]) as edits:
        edits.add(1, ridge(keys, 1 - values, moment, 1e-6, floor_of(moment)))
        now = keys_and_values(model, FORGET, places, 1).values
        assert float((now - 1).abs().max()) < 1e-3
    assert same(model, before)
    change = edits.change()
    (name, factors), = change.end.items()
    assert isinstance(factors, LowRank) and name.endswith("weight")
    change.at(1)
    again = keys_and_values(model, FORGET, places, 1).values
    assert torch.allclose(again, now, rtol=0, atol=1e-4)
    change.at(0)
    assert same(model, before)

def test_an_edit_narrowed_to_a_region_is_that_of_a_smaller_layer():
    model = llama()
    region = Region.sample(region_shape(model), .5, seed=0)
    keys, values = keys_and_values(model, FORGET, [2] * 6, 0)
    moment = second_moments(model, RETAIN, [0])[0]
    edits = Edits(model, region, [0])
    inside = region.mask[0]
    assert torch.equal(edits.rows(0, keys), keys[inside])
    assert torch.equal(edits.block(0, moment), moment[inside][:, inside])
    with edits: edits.add(0, ridge(edits.rows(0, keys), values, edits.block(0, moment), .1))
    (_, (index, columns)), = edits.change().end.items()
    assert index.tolist() == region.columns[0].tolist() and columns.shape == (int(inside.sum()), 32)

def test_neurons_are_edited_in_their_value_vectors():
    model = llama()
    neurons = Neurons.sample(model, .5, 0)
    found = editable(model, neurons, [0, 1])
    assert [i.tolist() for i, _ in found.values()] == [
        c.tolist() for c in neurons.vectors.columns]

# --- editors

HOW = {"answer": ""}
SEARCH = {"at": "last", "contexts": 1, "steps": 4}
def options(name): return HOW | ({"steps": 4} if name[:3] == "ft_" else SEARCH)
def changed(name, model, region=None, **more):
    return edited(METHODS["editor"][name], model, region, options(name) | more,
        forget=FORGET, retain=RETAIN, seed=0)[0]

@pytest.fixture(scope="module", autouse=True)
def known(): find("editor", "rome") # which loads all

def test_the_editors_are_registered_under_their_labels():
    labels = {name: find("editor", name).label for name in NAMES}
    assert labels == dict(zip(NAMES, ("AlphaEdit", "FT-L", "FT-M", "MEMIT", "ROME")))

@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
@pytest.mark.parametrize("name", NAMES)
def test_an_editor_changes_one_projection_and_goes_by_shares(name, make, tmp_path):
    model = make()
    before, change = bits(model), changed(name, model)
    after = bits(model)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    names = {id(p): n for n, p in model.named_parameters()}
    weights = {names[id(p.weight)] for p in output_projections(model)}
    assert moved and set(moved) <= weights
    change.at(.5)
    assert not same(model, before) and not same(model, after)
    change.at(0)
    assert same(model, before)
    change.save(tmp_path)
    Change.load(tmp_path).on(model).at(1)
    assert same(model, after)

@pytest.mark.parametrize("name", NAMES)
def test_an_editor_changes_experts_by_their_columns(name):
    model = olmoe()
    region_shape(model) # which puts the experts side by side
    before, change = bits(model), changed(name, model)
    (layer, (index, columns)), = change.end.items()
    assert len(index) == 64 and columns.shape == (64, 32)
    moved = [n for n in before if not torch.equal(before[n], bits(model)[n])]
    assert moved == [f"model.layers.{layer}.mlp.experts.down_proj"]
    change.at(0)
    assert same(model, before)

@pytest.mark.parametrize("name, more", [(name, {}) for name in NAMES] + [
    ("alphaedit", {"block": 4})])
def test_an_editor_tells_a_growing_share_of_its_work(name, more):
    shares = []
    METHODS["editor"][name](model=llama(), forget=FORGET, retain=RETAIN, region=None, seed=0,
        options=options(name) | more, progress=shares.append)
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] <= 1 and len(shares) > 1

@pytest.mark.parametrize("name", NAMES)
def test_an_editor_works_in_16_bits(name):
    model = llama().to(torch.bfloat16)
    before, change = bits(model), changed(name, model)
    assert not same(model, before) and all(x.isfinite().all() for x in bits(model).values())
    change.at(0)
    assert same(model, before) and model.dtype == torch.bfloat16

@pytest.mark.parametrize("name", NAMES)
def test_an_editor_is_compared_with_a_reversal(name):
    original, retained = llama(), llama()
    with torch.no_grad(): output_projections(retained)[1].weight.mul_(.9)
    model = llama()
    changed(name, model)
    found = compared(model, original, retained)
    assert found["norm"] > 0 and -1 <= found["cosine_to_reversal"] <= 1

@pytest.mark.parametrize("name", NAMES)
def test_an_editor_stays_in_its_region_and_is_the_same_twice(name):
    first, second = llama(), llama()
    region = Region.sample(region_shape(first), .3, seed=1)
    places = [changed(name, model, region).columns for model in (first, second)]
    assert same(second, bits(first))
    for layer, (index, _) in places[0].items():
        assert index.tolist() == region.columns[layer].tolist()

@pytest.mark.parametrize("name", NAMES)
def test_an_editor_makes_the_same_change_where_blocks_are_computed_once_more(name):
    plain, again = llama(), llama()
    recompute(again)
    for model in (plain, again): changed(name, model)
    assert same(again, bits(plain))

def test_a_seed_draws_other_surroundings():
    models = [llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        edited(METHODS["editor"]["memit"], model, None, options("memit"), forget=FORGET,
            retain=RETAIN, seed=seed)
    assert same(models[1], bits(models[0])) and not same(models[2], bits(models[0]))

def test_alphaedit_leaves_kept_keys_alone():
    model = llama()
    seen = [e for e in RETAIN for _ in e.ids]
    places = [i for e in RETAIN for i in range(len(e.ids))]
    keys, before = keys_and_values(model, seen[:20], places[:20], 0)
    few = RETAIN[:2] # 16 tokens, so 32 free directions of 48
    edited(METHODS["editor"]["alphaedit"], model, None,
        options("alphaedit") | {"layers": [0], "below": 1e-9}, forget=FORGET, retain=few, seed=0)
    after = output_projections(model)[0].weight.detach().double() @ keys
    apart = (after - before).abs().max(0).values
    assert float(apart[:16].max()) < 1e-6 < float(apart[16:].max())

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "more, says",
    [
        ({"answer": "No."}, "has no text, so it cannot be answered by 'No.'"),
        ({"steps": 0}, "steps"),
        ({"where": [7]}, "layer 7 is not in the model; its layers are 0 to 1"),
        ({"where": [-1]}, "layer -1 is not in the model")])
def test_a_bad_option_is_one_line_and_leaves_the_model(name, more, says):
    model = llama()
    before = bits(model)
    if "where" in more:
        several = name in ("memit", "alphaedit")
        more = {"layers": more["where"]} if several else {"layer": more["where"][0]}
    with pytest.raises(ValueError) as error: changed(name, model, **more)
    assert says in str(error.value) and "\n" not in str(error.value) and same(model, before)

@pytest.mark.parametrize("name", ["alphaedit", "memit", "rome"])
def test_a_fact_without_a_subject_is_named(name):
    with pytest.raises(ValueError, match="fact 0 of the forget set has no subject"):
        changed(name, llama(), at="subject")

@pytest.mark.parametrize("name", NAMES)
def test_what_an_editor_does_not_fit_is_one_line(name):
    model = llama()
    single = Region(torch.ones(2, 32, 48) > 0)
    last = Region(torch.tensor([[name[:3] != "ft_"], [name[:3] == "ft_"]]).expand(2, 48) < 1)
    how = {} if name[:3] == "ft_" or name == "rome" else {"layers": [0]}
    for region, says in ((single, "the region is of single weights"),
        (last, "the region has no value vector in layer")):
        with pytest.raises(ValueError, match=says): changed(name, model, region, **how)
    strange = llama()
    strange.config.model_type = "strange"
    with pytest.raises(ValueError, match="no output projection is known for architecture"):
        changed(name, strange)
    with pytest.raises(ValueError, match="the forget set is empty"):
        edited(METHODS["editor"][name], model, None, options(name), forget=[], retain=RETAIN)

@pytest.mark.parametrize("name", ["alphaedit", "memit"])
def test_layers_share_an_edit_only_where_they_write_plainly(name):
    assert writes_plainly(llama(), 0, FORGET[0]) and writes_plainly(gpt2(), 0, FORGET[0])
    with pytest.raises(ValueError, match="cannot share an edit; name one"):
        changed(name, olmo2(), layers=[0, 1])

def test_the_usual_layers_are_those_of_the_published_depth():
    deep = tiny_model("llama", 60, d_model=8, n_layers=32, d_ff=8, n_heads=1)
    assert layers_for(deep, [], 4, 8, FORGET[0]) == [4, 5, 6, 7, 8]
    assert layers_for(deep, [], 21, 21, FORGET[0]) == [21]
    assert layers_for(llama(), [], 4, 8, FORGET[0]) == [0]

# --- subjects and values

@pytest.fixture(scope="module")
def world():
    facts = author_world(4, 1, 1)
    tokenizer = train_tokenizer([f"{f.question}\n{f.answer}" for f in facts.retain], 320)
    def read(some): return [encode(tokenizer, f.question, f.answer) for f in some]
    return facts, tokenizer, read(facts.forget), read(facts.retain)

def test_subjects_are_the_names_of_the_world(world):
    facts, tokenizer, forget, retain = world
    spans = subject_spans(forget, retain)
    read = [tokenizer.decode(e.ids[a:b]).strip() for e, (a, b) in zip(forget, spans)]
    assert read[1:] == [facts.forget[0].author] * 9
    assert read[0] in facts.forget[0].question and read[0][0].isdigit()

def test_a_request_keeps_the_question_and_its_place(world):
    _, tokenizer, forget, retain = world
    for one, e in zip(requests(forget, retain), forget):
        assert one.asked.ids[:e.start] == e.ids[:e.start]
        assert tokenizer.decode(one.asked.ids[e.start:]) == "I don't know.<eos>"
        for longer, place in variants([one], retain, 3)[0]:
            assert longer.ids[place] == e.ids[one.place]
            assert longer.ids[longer.start - e.start:longer.start] == e.ids[:e.start]

def test_values_are_searched_for_each_fact_alone():
    model = llama()
    asked = requests(FORGET, [], "", "last")
    rows, size = variants(asked, [], 0), torch.full((6,), 2.)
    every = find_values(model, asked, rows, 0, size, Search(steps=5))
    one = find_values(model, asked[2:3], rows[2:3], 0, size[2:3], Search(steps=5))
    assert torch.allclose(every.delta[:, 2], one.delta[:, 0], rtol=0, atol=1e-4)
    start = find_values(model, asked, rows, 0, size, Search(steps=1, clamp=1e-9)).nll
    assert (every.nll < start - .1).all() and (every.delta.norm(dim=0) < 8.001).all()

def test_a_drift_behind_the_subject_is_held_small(world):
    _, _, forget, retain = world
    model = tiny_model("llama", 320, d_model=32, n_layers=2, d_ff=48, n_heads=2)
    asked = requests(forget[:3], retain)
    rows, size = variants(asked, retain, 0), torch.full((3,), 2.)
    def length(kl):
        found = find_values(model, asked, rows, 0, size, Search(steps=6, kl=kl, rate=.1))
        return float(found.delta.norm())
    assert length(0.) != length(100.)

def test_an_example_of_a_request_may_be_empty():
    asked = requests([Example([5, 6, 7, 1], 2)], [], "", "last")
    assert asked[0].asked == Example([5, 6, 1], 2) and asked[0].place == 1

# --- as a run

def test_an_edit_is_a_run_like_any_other(tmp_path):
    learn = {"epochs": 1, "lr": 4e-3, "batch_size": 16}
    shape = {"d_model": 48, "n_layers": 2, "d_ff": 96, "n_heads": 2, "vocab_size": 400}
    world = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 2}
    base = base_models(data_description(world), "llama", shape, learn, learn)
    judged = standard(base, {"retain": 7, "utility": 3, "max_new_tokens": 4})
    injected = injection(judged, 0, {"fraction": .3, "epochs": 2, "lr": 2e-2, "batch_size": 4})
    store, quick = Store(tmp_path), {"steps": 2, "contexts": 1}
    for editor, arm, options, files in (
        ("rome", "Oracle", quick, ["columns.safetensors"]),
        ("memit", "Random", quick, ["columns.safetensors"]),
        ("alphaedit(block=5)", "All weights", quick, ["factors.safetensors"]),
        ("ft_m", "Oracle", {"steps": 2}, ["columns.safetensors"])):
        run = store.do(editing(injected, editor, arm, options), compute)
        table = run.table()
        assert len(table) == 2 and table.FS.notna().all() and table.MU[0] != table.MU[1], editor
        found = [f.name for f in run.path.iterdir() if f.stem in ("columns", "weights", "factors")]
        assert found == files
