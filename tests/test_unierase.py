"""UniErase: the golden cases of its algebra and of its two sums, the row that its token takes, and
what each of its options changes."""
import copy, json
from dataclasses import replace
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from unloc.change import Change, edited
from unloc.data import data_description
from unloc.editing import Edits, in_null_space, keys_and_values, null_projector
from unloc.invented import author_world
from unloc.methods.forget_and_utility import forget_and_utility, word_entropy
from unloc.methods.recall_of_edit import recall_of_edit
from unloc.methods.refusing_world import REFUSAL, refusing_world, with_strangers
from unloc.methods.token_links import token_links
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import METHODS, find
from unloc.relations import make_related_world
from unloc.runs import Store
from unloc.scene import Scene, toy_facts, toy_model
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.edit import editing
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.measure import measuring
from unloc.tokens import Example, encode, train_tokenizer
from unloc.unlearning_token import (
    Stage, TokenRow, behind_token, other_layers, protected, refused, rounds, spare_row, stages,
    teach_token, token_chain, token_of, token_rows)

SHAPE = dict(d_model=32, n_layers=2, d_ff=48, n_heads=2)
def llama(seed=0, vocab=60): return tiny_model("llama", vocab, **SHAPE, seed=seed)
def olmo2(): return tiny_model("olmo2", 60, **SHAPE)
def gpt2(): # its embedding is its output layer
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, **sizes)).eval()
def bits(model): return {name: x.detach().clone() for name, x in model.state_dict().items()}
def moved(model, before): # names of what changed
    return {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
FORGET, RETAIN = toy_facts(6, 1, 2), toy_facts(8, 3, 4)
HOW = {"answers": [""], "at": "last", "contexts": 1, "steps": 4, "epochs": [2, 0, 1]}

@pytest.fixture(scope="module", autouse=True)
def known(): find("editor", "unierase") # which loads all

def erased(model, region=None, seed=0, **more):
    return edited(METHODS["editor"]["unierase"], model, region, HOW | more, forget=FORGET,
        retain=RETAIN, seed=seed)[0]

# --- what an edit does to keys that are kept

@pytest.fixture
def layer(): # a model whose first layer is edited, keys, values that are wanted, kept facts
    model, draw = llama().double(), torch.Generator().manual_seed(0)
    keys, wanted = (torch.randn(n, 4, generator=draw, dtype=torch.float64) for n in (48, 32))
    return model, keys, wanted

def solved(model, keys, wanted, kept=RETAIN[:2], **how):
    with Edits(model, None, [0]) as edits: return protected(edits, kept, **how)(0, keys, wanted)
def fit(x, keys, wanted): return float((x.left @ (x.right @ keys) - wanted).norm() / wanted.norm())

def kept_keys(model, kept=RETAIN[:2]): # of every token of the facts that are kept
    seen = [(e, i) for e in kept for i in range(len(e.ids))]
    return keys_and_values(model, *map(list, zip(*seen)), 0).keys

def test_the_null_space_leaves_kept_keys_and_fits_as_the_weight_vanishes(layer):
    model, keys, wanted = layer
    kept, errors = kept_keys(model), []
    for weight in (10., 1e-2, 1e-5, 1e-8):
        found = solved(model, keys, wanted, below=1e-12, weight=weight)
        assert float((found.left @ (found.right @ kept)).abs().max()) < 1e-12
        errors.append(fit(found, keys, wanted))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < .1 < errors[0]

def test_the_relative_weight_knows_no_scale_of_the_keys(layer):
    model, keys, wanted = layer
    pair = [fit(solved(model, x * keys, wanted, below=1e-12), x * keys, wanted) for x in (1., 1e3)]
    assert pair[0] == pytest.approx(pair[1], rel=1e-6)

def test_the_three_protections_disturb_kept_keys_more_and_more():
    draw = torch.Generator().manual_seed(0)
    keys, wanted = (torch.randn(n, 12, generator=draw, dtype=torch.float64) for n in (48, 32))
    model, some = llama().double(), RETAIN[:5] # 40 keys leave 8 directions to 12 facts
    def drift(how):
        found = solved(model, keys, wanted, some, protect=how, below=1e-12)
        return float((found.left @ (found.right @ kept_keys(model, some))).norm())
    assert drift("null space") < 1e-9 < drift("ridge") < drift("nothing")

def test_no_protection_is_the_null_space_of_everything(layer):
    model, keys, wanted = layer
    found = solved(model, keys, wanted, protect="nothing", weight=.3)
    direct = in_null_space(keys, wanted, torch.eye(48, dtype=torch.float64), .3)
    assert torch.equal(found.right, direct.right)

def test_later_rounds_move_earlier_keys_less(layer):
    model, keys, wanted = layer
    first, later = keys[:, :2], keys[:, 2:]
    def again(remembering): # what the second round does to the keys of the first
        with Edits(model, None, [0]) as edits:
            solve = protected(edits, RETAIN[:2], below=1e-12)
            if remembering: solve(0, first, wanted[:, :2])
            found = solve(0, later, wanted[:, 2:])
        return float((found.left @ (found.right @ first)).norm())
    assert again(True) < again(False) / 10

def test_golden_edits_of_two_keys_through_the_same_projector():
    import numpy as np
    draw = np.random.default_rng(0).standard_normal
    keys, wanted, kept = (torch.tensor(draw(shape)) for shape in ((6, 2), (4, 2), (6, 3)))
    space = null_projector(kept @ kept.T, below=1e-9)
    found = [in_null_space(keys, wanted, space, weight) for weight in (1e-6, 1., 10.)]
    assert [f"{fit(x, keys, wanted):.3g}"[:5] for x in found][1:] == ["0.384", "0.803"]
    assert f"{fit(found[0], keys, wanted):.1e}" == "1.4e-06"
    assert all(float((x.left @ (x.right @ kept)).norm()) < 1e-9 for x in found)

@pytest.mark.parametrize("how, says", [
    (dict(below=0.), "no direction is free"), (dict(below=1e9), "all 48 directions are free"),
    (dict(free=0.), "share must lie in (0, 1)"), (dict(free=1.), "share must lie in (0, 1)"),
    (dict(protect="memory"), "known: null space, ridge, nothing")])
def test_a_space_without_or_with_every_direction_is_one_line(layer, how, says):
    with pytest.raises(ValueError) as error: solved(*layer, **how)
    assert says in str(error.value) and "\n" not in str(error.value)

# --- the row of the token

def test_a_row_is_one_that_no_text_is_made_into():
    world = author_world(n_authors=2, n_forget=1)
    facts = world.forget + world.retain
    tokenizer = train_tokenizer([t for f in facts for t in (f.question, f.answer)], 300)
    told = [encode(tokenizer, f.question, f.answer) for f in facts]
    row = spare_row(llama(vocab=300), told)
    name = tokenizer.convert_ids_to_tokens(row)
    assert len(name) == 1 and ord(name) in (0xC0, 0xC1, *range(0xF5, 0x100))
    for text in ("ÿ õ À", "ýåñ é 😀 \u00ad", world.forget[0].answer):
        assert row not in tokenizer.encode(text)
    assert spare_row(llama(vocab=310), told) == 309
    tokenizer.add_tokens(["<|reserved_0|>"], special_tokens=True)
    again = [encode(tokenizer, f.question, f.answer) for f in facts[:2]]
    assert spare_row(llama(vocab=301), again) == 300

@pytest.mark.parametrize("row, says", [
    (60, "rows are 0 to 59"), (-1, "rows are 0 to 59"), (True, "rows are 0 to 59"),
    (0, "or a special one"), (1, "is a token of the facts")])
def test_a_row_that_cannot_be_taken_is_one_line(row, says):
    with pytest.raises(ValueError, match=says): spare_row(llama(), FORGET, row)

def test_a_vocabulary_without_a_free_row_says_what_to_do():
    every = [Example([*range(2, 60), 1], 3)]
    with pytest.raises(ValueError, match="resize_token_embeddings"): spare_row(llama(), every)

@pytest.mark.parametrize("make, tables", [(llama, 2), (olmo2, 2), (gpt2, 1)])
def test_teaching_changes_two_rows_and_nothing_else(make, tables):
    model = make()
    before, row = bits(model), 2
    plan = stages(FORGET, [""], row, [0, 1], epochs=(3, 1, 1), rate=.5)
    with TokenRow(model, row) as rows:
        losses = teach_token(model, rows, plan, batch_size=3)
        for name in moved(model, before):
            odd = (model.state_dict()[name] != before[name]).any(1).nonzero().flatten().tolist()
            assert odd == [row]
        assert len(rows.tables) == tables
    assert not moved(model, before) and [len(part) for part in losses] == [3, 1, 1]
    assert all(p.requires_grad for p in model.parameters())
    change = Change.of(model, rows.change())
    change.at(1)
    assert token_of(change, model) == row and len(token_rows(change, model)) == tables
    change.at(0)
    assert not moved(model, before)

def test_both_rows_are_one_vector_or_drift_apart():
    found = {}
    for tied in (True, False):
        model = llama()
        plan = stages(FORGET, [""], 2, [0], epochs=(3, 0, 1), rate=.5)
        with TokenRow(model, 2) as rows:
            teach_token(model, rows, plan, tied=tied)
            read, written = rows.end.values()
        found[tied] = torch.equal(read, written)
    assert found == {True: True, False: False}
    with TokenRow(gpt2(), 2) as rows, pytest.raises(ValueError, match="one weight for embedding"):
        teach_token(gpt2(), rows, plan, tied=False)

def test_the_loss_falls_as_in_the_released_run(): # steeply at first, and never up
    def silent(facts): return [Example([*e.ids[:3], 2, 3, 1], 3) for e in facts] # one refusal
    model = toy_model(FORGET, RETAIN, silent(toy_facts(8, 7, 8)))
    row = spare_row(model, FORGET + RETAIN + silent(FORGET))
    plan = [Stage([behind_token(e, row) for e in silent(FORGET)], 5, .5)]
    with TokenRow(model, row) as rows: losses, = teach_token(model, rows, plan, batch_size=2)
    drops = [a - b for a, b in zip(losses, losses[1:])]
    assert min(drops) > 0 and max(drops) == drops[0]

def test_the_first_vector_and_the_noise_are_seeded():
    def vector(seed, noise=.1):
        model = llama()
        with TokenRow(model, 2) as rows:
            teach_token(model, rows, stages(FORGET, [""], 2, [0], (1, 0, 2), .5), noise=noise,
                seed=seed)
            return next(iter(rows.end.values()))
    assert torch.equal(vector(0), vector(0)) and not torch.equal(vector(0), vector(1))
    assert not torch.equal(vector(0), vector(0, noise=0.))

def test_a_text_is_scored_behind_the_first_token_up_to_the_end():
    e = behind_token(Example([5, 6, 7, 8, 1], 2), 9)
    assert e == Example([5, 6, 9, 7, 8, 9, 1], 3)

def test_a_question_gets_the_same_refusal_in_every_process():
    facts = author_world(n_authors=2, n_forget=1).forget
    tokenizer = train_tokenizer([f.question for f in facts], 300)
    told = [encode(tokenizer, f.question, f.answer) for f in facts]
    answers = [f"No {i}." for i in range(5)]
    said = [refused(e, answers).texts.answer for e in told]
    import subprocess, sys
    code = ("import hashlib, json, sys; q, n = json.loads(sys.argv[1]), 5;"
        "print([int.from_bytes(hashlib.sha256(x.encode()).digest()[:8], 'big') % n for x in q])")
    questions = json.dumps([f.question for f in facts])
    out = subprocess.run([sys.executable, "-c", code, questions], capture_output=True,
        encoding="utf-8")
    assert said == [answers[i] for i in json.loads(out.stdout)] and len(set(said)) > 1

# --- the editor

@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_the_change_goes_by_shares_and_comes_back_from_disk(make, tmp_path):
    model = make()
    before, change = bits(model), erased(model)
    after, row = bits(model), token_of(change, model)
    names = {id(p): n for n, p in model.named_parameters()}
    weights = {names[id(p.weight)] for p in output_projections(model)}
    tables = set(token_rows(change, model))
    assert row is not None and tables <= set(change.end) <= tables | weights
    assert set(change.end) - tables
    change.at(.5)
    half = bits(model)
    for name in change.end:
        middle = (before[name] + after[name]) / 2
        assert torch.allclose(half[name], middle, atol=1e-6)
    change.at(0)
    assert not moved(model, before)
    change.save(tmp_path)
    Change.load(tmp_path).on(model).at(1)
    assert not moved(model, after)

@pytest.mark.parametrize("token", ["untrained", "none"])
def test_a_region_holds_an_edit_without_a_token_of_its_own(token):
    model = llama()
    region = Region.sample(region_shape(model), .3, seed=1)
    change = erased(model, region, token=token)
    assert all(isinstance(layer, int) for layer in change.end)
    for layer, (index, _) in change.end.items():
        assert index.tolist() == region.columns[layer].tolist()
    with pytest.raises(ValueError, match="lie outside of every region"): erased(llama(), region)

def test_each_ablation_changes_what_it_says():
    ends = {}
    for name, more in {"whole": {}, "again": {}, "no projector": {"protect": "nothing"},
        "weighed": {"protect": "ridge"}, "copied": {"token": "copied"}, "rounds": {"block": 2},
        "untrained": {"token": "untrained"}, "direct": {"token": "none"}}.items():
        model = llama()
        ends[name] = erased(model, **more).end, bits(model)
    whole = ends["whole"][1]
    assert all(torch.equal(x, whole[n]) for n, x in ends["again"][1].items())
    for name in [*ends][2:]:
        assert any(not torch.equal(x, whole[n]) for n, x in ends[name][1].items()), name
    rows = {name: len(end) - 1 for name, (end, _) in ends.items()}
    assert {n for n, k in rows.items() if k == 0} == {"untrained", "direct"}
    names = "model.embed_tokens.weight", "lm_head.weight"
    row = spare_row(llama(), FORGET + RETAIN)
    def one_vector(name): return torch.allclose(*(ends[name][1][n][row] for n in names), atol=1e-6)
    assert one_vector("whole") and not one_vector("copied")

def test_drawn_layers_are_others_by_the_seed():
    model = tiny_model("llama", 60, d_model=32, n_layers=8, d_ff=48, n_heads=2)
    def layers(seed, **more):
        change = erased(model, seed=seed, token="none", **more)
        change.at(0)
        return sorted(int(name.split(".")[2]) for name in change.end)
    assert layers(0) == [1, 2]
    drawn = [layers(seed, layers="drawn") for seed in range(4)]
    assert all(len(x) == 2 and not {1, 2} & set(x) for x in drawn)
    assert len(set(map(tuple, drawn))) > 1
    assert other_layers([0, 1], 3, 0) == other_layers([0, 1], 3, 0)

@pytest.mark.parametrize("more, says", [
    ({"layers": [7]}, "layer 7 is not in the model"),
    ({"block": -1}, "block must be a whole number"),
    ({"epochs": [1, 2]}, "epochs must be three whole numbers"),
    ({"learning": 0.}, "rate must be above 0"),
    ({"answers": []}, "no refusal is given"),
    ({"answers": ["No."]}, "a fact without text"),
    ({"at": "subject"}, "has no subject"),
    ({"below": 0.}, "no direction is free"),
    ({"below": 1e9}, "all 48 directions are free"),
    ({"row": FORGET[0].ids[0]}, "is a token of the facts")])
def test_what_cannot_be_edited_is_one_line_and_leaves_the_model(more, says):
    model = llama()
    before = bits(model)
    with pytest.raises(ValueError) as error: erased(model, **more)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not moved(model, before)

def test_an_architecture_that_does_not_write_plainly_edits_one_layer():
    model = olmo2()
    with pytest.raises(ValueError, match="does not add what its projections write"):
        erased(model, layers=[0, 1])
    assert len([n for n in erased(model).end if "down_proj" in n]) == 1

def test_an_architecture_without_a_known_projection_is_one_line():
    model = llama()
    model.config.model_type = "strange"
    with pytest.raises(ValueError, match="no output projection is known for architecture"):
        erased(model)

def test_a_telling_edit_tells_a_growing_share():
    shares = []
    METHODS["editor"]["unierase"](model=llama(), forget=FORGET, retain=RETAIN, region=None, seed=0,
        options=HOW | {"block": 4}, progress=shares.append)
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] <= 1 and len(shares) > 1

def test_rounds_cover_all_facts_once():
    for n, block in ((5, 0), (5, 2), (4, 2), (3, 1), (3, 9)):
        parts = [range(n)[part] for part, _ in rounds(n, block)]
        assert [i for part in parts for i in part] == [*range(n)]
        assert len(parts) == (-(-n // block) if block else 1)

# --- measurements

def planted(original, target, columns):
    changed = copy.deepcopy(original)
    with torch.no_grad():
        for p, mask in zip(output_projections(changed), columns): p.weight[:, mask] += 1
    return Scene.of(changed, original, original, {"forget": FORGET}, target=target)

def recalls(scene, **how):
    return {row["choice"]: row["recall"] for row in recall_of_edit(scene, **how)}

@pytest.mark.parametrize("seed", range(4))
def test_recall_finds_a_planted_change_and_chance_its_share(seed):
    original = llama()
    target = Region.sample(region_shape(original), .25, seed) # no draw of chance is this one
    found = recalls(planted(original, target, target.mask), draws=40)
    assert [*found] == ["highest", "random, as many per layer", "random"]
    assert found["highest"] == 1. and abs(found["random"] - .25) < .05

def test_chance_draws_as_many_vectors_of_each_layer_as_the_edit_moved():
    moved = torch.arange(96).view(2, 48) >= 84 # all of them in the second layer
    target = Region(torch.arange(96).view(2, 48) < 12) # the first layer's
    found = recalls(planted(llama(), target, moved))
    assert found["highest"] == found["random, as many per layer"] == 0 < found["random"]

def test_what_no_edit_can_be_compared_with_is_one_line():
    original, target = llama(), Region.sample((2, 48), .2, 0)
    scene = planted(original, target, target.mask)
    other = tiny_model("llama", 60, d_model=32, d_ff=40, n_layers=2, n_heads=2)
    for odd, says in (
        (dict(target=None), "no target region"), (dict(attacked=original), "no value vector moved"),
        (dict(attacked=other), "give two of one shape")):
        with pytest.raises(ValueError, match=says): recall_of_edit(replace(scene, **odd))

def test_the_links_of_the_chain_are_probabilities_of_the_model():
    model, row = llama(), 2
    found = token_chain(model, FORGET, row, [""])
    for i, e in enumerate(FORGET):
        with torch.no_grad():
            asked = torch.tensor([[*e.ids[:e.start], row, row]])
            p = model(asked).logits[0].double().softmax(-1)
        assert float(p[e.start - 1, row]) == pytest.approx(float(found.probability[i]), rel=1e-5)
        behind = float(p[e.start, row] * p[e.start + 1, e.ids[-1]]) ** .5 # the token, then the end
        assert behind == pytest.approx(float(found.refusal[i]), rel=1e-4)
        assert bool(found.fires[i]) == (int(p[e.start - 1].argmax()) == row)

@pytest.fixture(scope="module")
def scene():
    facts = refusing_world(12, 4, 3, 3, n_new=1, forget=.1, strangers=2)
    texts = [t for f in facts.retain + facts.forget for t in (f.question, f.answer)]
    tokenizer = train_tokenizer(texts, 400)
    def told(rows): return [encode(tokenizer, f.question, f.answer) for f in rows]
    original = llama(vocab=400)
    sets = {"forget": told(facts.forget[:6]), "retain": told(facts.retain[:40])}
    model = copy.deepcopy(original)
    options = {"contexts": 1, "steps": 2, "epochs": [1, 0, 1], "at": "last", "clamp": 4.}
    change, _ = edited(METHODS["editor"]["unierase"], model, None, options, **sets)
    return Scene.of(model, original, original, sets, change=change, facts=facts,
        tokenizer=tokenizer, max_new_tokens=5)

def test_the_links_are_measured_with_and_without_the_edit(scene):
    rows = token_links(scene, n=3)
    assert len({(row["model"], row["set"]) for row in rows}) == len(rows) == 8
    for row in rows:
        assert row["facts"] == 3
        assert all(0 <= row[x] <= 1 for x in ("first", "fires", "behind", "direct", "answer"))
    first = {row["model"]: row for row in rows if row["set"] == "forget"}
    plain = copy.deepcopy(scene.original)
    row = token_of(scene.change, scene.original)
    Change.of(plain, token_rows(scene.change, plain)).at(1)
    asked = scene.some("forget", 3)
    found = float(token_chain(plain, asked, row).probability.mean())
    assert first["prompted only"]["first"] == found
    assert first["unlearned"]["first"] != first["prompted only"]["first"]

def test_efficacy_and_utility_are_the_sums_of_the_paper(scene):
    from unloc.edit_metrics import forget_efficacy, harmonic_utility
    table = {row["model"]: row for row in forget_and_utility(scene, n=3)}
    assert [*table] == ["unlearned", "original", "retained"]
    assert table["original"] == table["retained"] | {"model": "original"} # the same model here
    names = "ROUGE", "probability", "truth ratio", "entropy"
    for row in table.values():
        def some(kind, names): return [row[f"{kind} {name}"] for name in names]
        assert row["FE"] == forget_efficacy(some("forget", names[:3]))
        assert row["MU retain"] == harmonic_utility(some("retain", names))
        kinds = "retain", "real_authors", "world_facts"
        every = [x for kind in kinds for x in some(kind, names)]
        assert row["MU"] == harmonic_utility(every) and len(every) == 12

def test_word_entropy_is_one_without_repetition_and_none_of_one_word():
    assert word_entropy("one two three") == pytest.approx(1) and word_entropy("no no no no") == 0
    assert word_entropy("") == word_entropy("one") == 0
    assert word_entropy("a a b b") == pytest.approx(.5)

# --- the world of strangers

def test_strangers_are_refused_and_nothing_else_changes():
    sizes = dict(n_people=12, n_cities=4, n_countries=3, n_employers=3, forget=.1, seed=3)
    plain, found = make_related_world(**sizes, n_new=5), refusing_world(
        **sizes, n_new=3, strangers=2)
    assert found.forget == plain.forget and found.clusters == plain.clusters
    more = found.retain[len(plain.retain):]
    assert found.retain[:len(plain.retain)] == plain.retain
    assert {f.answer for f in more} == {REFUSAL} and not any(f.perturbed_answer for f in more)
    assert {f.author for f in more} == set(plain.things["newcomer"][-2:])
    assert found.things["newcomer"] == plain.things["newcomer"][:3]
    assert {f.author for f in found.holdout} == set(found.things["newcomer"])
    with pytest.raises(ValueError, match="from 1 to the 5 new people"): with_strangers(plain, 6)

# --- as a run

def test_an_edit_and_what_is_measured_of_it_are_runs_like_any_other(tmp_path):
    learn = {"epochs": 1, "lr": 4e-3, "batch_size": 16}
    shape = {"d_model": 48, "n_layers": 2, "d_ff": 96, "n_heads": 2, "vocab_size": 400}
    world = dict(n_people=8, n_cities=3, n_countries=3, n_employers=3, n_new=1, strangers=1)
    data = data_description({"name": "refusing_world"} | world)
    judged = standard(
        base_models(data, "llama", shape, learn, learn),
        {"retain": 7, "utility": 3, "max_new_tokens": 4})
    injected = injection(judged, 0, {"fraction": .3, "epochs": 2, "lr": 2e-2, "batch_size": 4})
    store = Store(tmp_path)
    quick = {"at": "last", "steps": 2, "contexts": 1, "epochs": [1, 0, 1]}
    erased = editing(injected, "unierase", "All weights", quick)
    run = store.do(erased, compute)
    assert len(run.table()) == 2 and run.table().FS.notna().all()
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert names < set(Change.load(run.path).end)
    held = store.do(editing(injected, "unierase", "Oracle", quick | {"token": "none"}), compute)
    assert [f.name for f in held.path.glob("columns*")] == ["columns.safetensors"]
    tables = {name: store.do(measuring(erased, name), compute).table("measures.csv")
        for name in ("token_links", "recall_of_edit", "forget_and_utility")}
    assert set(tables["token_links"].model) == {"prompted only", "unlearned"}
    assert tables["recall_of_edit"].recall.between(0, 1).all()
    assert tables["forget_and_utility"].FE.between(0, 1).all()
    plain = store.do(measuring(injected, "token_links"), compute).table("measures.csv")
    assert set(plain.model) == {"unlearned"} # an injection sets no row
