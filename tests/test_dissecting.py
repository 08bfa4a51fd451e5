"""Restoring parts of the original model: worked cases of the score, what must come back and what
must not, on every layout of weights; no weight is touched."""
import copy, math, warnings
from functools import cache
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from unloc.models import output_projections, tiny_model, value_vectors
from unloc.register import find, methods
from unloc.restoring import (
    CONTROLS, KINDS, Restoring, coefficient_weights, continued, drifts, krs, krs_curves,
    layers_around, logit_distance, suppressed, window_of, wholly_right)
from unloc.scene import run_attacks, toy_facts, toy_scene
from unloc.scoring import score

def llama(seed=0, **shape):
    shape = {"d_model": 16, "n_layers": 3, "d_ff": 24, "n_heads": 2} | shape
    return tiny_model("llama", 60, seed=seed, **shape)
def olmo2(seed=0): return tiny_model("olmo2", 60, 16, 3, 24, 2, seed)
def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=64, n_inner=24)
    return GPT2LMHeadModel(config).eval()
def neox(seed=0):
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, intermediate_size=24,
        num_attention_heads=2, max_position_embeddings=64)
    return GPTNeoXForCausalLM(config).eval()
MODELS = {"llama": llama, "olmo2": olmo2, "gpt2": gpt2, "neox": neox}
FACTS = toy_facts(5, 1, 2)
IN_MLP = "down_proj", "mlp.c_proj", "dense_4h_to_h" # output projections
OUTSIDE = "embed", "wte", "wpe", "lm_head", "embed_out", "model.norm", "ln_f", "final_layer_norm"

def changed(name, unless): # noise in every weight whose name holds none of some words
    original = MODELS[name]()
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    for place, p in model.named_parameters():
        if any(word in place for word in unless): continue
        with torch.no_grad(): p += .2 * torch.randn(p.shape, generator=generator)
    return model, original

def bits(model): return {name: x.clone() for name, x in model.state_dict().items()}
def same(model, before):
    return all(torch.equal(x, before[n]) for n, x in model.state_dict().items())

# --- the score

@pytest.mark.parametrize("lost, restored, found", [(4, 1, .75), (4, 5, -.25), (3, 3, 0), (3, 0, 1)])
def test_the_golden_scores(lost, restored, found):
    assert krs(torch.tensor(float(lost)), torch.tensor(float(restored))).item() == found

def test_where_nothing_was_lost_there_is_no_score_and_one_line_says_so():
    with pytest.warns(UserWarning, match="^1 of 2 answers have the same logits in both") as said:
        found = krs(torch.tensor([0., 2.]), torch.tensor([0., 1.]))
    assert math.isnan(found[0]) and found[1] == .5
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        krs(torch.ones(2), torch.ones(3, 2))

def test_a_distance_below_zero_is_refused():
    with pytest.raises(ValueError, match="below 0"): krs(torch.tensor(-1.), torch.tensor(1.))

@pytest.mark.parametrize(
    "layer, n, window, found",
    [
        (0, 8, 5, [0, 1, 2]), (4, 8, 5, [2, 3, 4, 5, 6]), (7, 8, 5, [5, 6, 7]), (3, 8, 1, [3]),
        (3, 8, 2, [3, 4]), (1, 3, 99, [0, 1, 2])])
def test_windows_are_clipped_at_both_ends(layer, n, window, found):
    assert layers_around(layer, n, window) == found

def test_the_window_is_that_of_the_paper_at_its_depth():
    assert [window_of(n) for n in (2, 6, 10, 16, 32, 64)] == [1, 1, 2, 2, 5, 10]

# --- what must come back

@pytest.mark.parametrize("name", MODELS)
def test_all_coefficients_and_attention_bring_everything_back(name):
    model, original = changed(name, (*OUTSIDE, *IN_MLP)) # queries, keys, gates, inner norms
    curves = krs_curves(model, original, FACTS, window=9)
    assert (curves.lost > 1e-3).all()
    if name == "olmo2": return # whose norms stand behind what is restored
    assert torch.allclose(curves.krs()["both"], torch.ones(3, 5).double(), atol=1e-6)

def test_all_coefficients_and_attention_bring_everything_back_before_equal_norms():
    model, original = changed("olmo2", (*OUTSIDE, *IN_MLP, "layernorm"))
    found = krs_curves(model, original, FACTS, ["both"], window=9).krs()["both"]
    assert torch.allclose(found, torch.ones(3, 5).double(), atol=1e-6)

@pytest.mark.parametrize("name", MODELS)
def test_from_an_equal_model_nothing_comes_back(name):
    model, original = changed(name, OUTSIDE)
    back = Restoring(model, copy.deepcopy(model))
    want = score(model, FACTS).nll
    for kind in KINDS:
        with back(kind, range(3)): assert score(model, FACTS).nll == pytest.approx(want, abs=1e-5)
    curves = krs_curves(model, copy.deepcopy(model), FACTS)
    assert not curves.lost.any()
    with pytest.warns(UserWarning, match="5 of 5 answers"):
        assert all(x.isnan().all() for x in curves.krs().values())
    lost = logit_distance(model, original, FACTS)
    assert torch.equal(krs(lost, lost), torch.zeros(5).double())

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 2])
def test_one_changed_output_projection_is_told_by_value_vectors(name, layer):
    original = MODELS[name]()
    model = copy.deepcopy(original)
    with torch.no_grad(): value_vectors(output_projections(model)[layer]).mul_(-1)
    found = krs_curves(model, original, FACTS, window=1).krs()
    assert torch.allclose(found["value vectors"][layer], torch.ones(5).double(), atol=1e-6)
    assert found["value vectors"][1].abs().max() < 1e-6, "another layer has the same ones"
    for kind in ("coefficients", "attention", "both"): assert found[kind][layer].max() < .9

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 2])
def test_changed_rows_before_one_layer_are_told_by_its_coefficients(name, layer):
    original = MODELS[name]()
    model = copy.deepcopy(original)
    with torch.no_grad():
        for p in coefficient_weights(model, layer): p.mul_(-2.)
    found = krs_curves(model, original, FACTS, window=1).krs()
    if (krs_curves(model, original, FACTS, ["both"]).lost < 1e-9).any(): return
    for kind in ("coefficients", "both"):
        assert torch.allclose(found[kind][layer], torch.ones(5).double(), atol=1e-5)
    assert found["value vectors"].abs().max() < 1e-5
    assert found["attention"][layer].abs().max() < 1e-5 or name == "neox"

def test_a_window_holds_all_its_layers():
    model, original = changed("llama", (*OUTSIDE, "self_attn", "norm", "gate", "up"))
    curves = {w: krs_curves(model, original, FACTS, ["value vectors"], w).krs() for w in (1, 9)}
    assert torch.allclose(curves[9]["value vectors"], torch.ones(3, 5).double(), atol=1e-6)
    assert curves[1]["value vectors"].mean(1).max() < .9

# --- what stays as it was

@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_touched_and_no_hook_stays(kind):
    model, original = changed("llama", OUTSIDE)
    before = bits(model), bits(original)
    original.train()
    want = score(model, FACTS).nll
    with Restoring(model, original)(kind, [0, 2]):
        assert not torch.allclose(score(model, FACTS).nll, want)
    with pytest.raises(KeyError):
        with Restoring(model, original)(kind, [1]): raise KeyError
    assert torch.equal(score(model, FACTS).nll, want)
    assert same(model, before[0]) and same(original, before[1]) and original.training
    for m in (*model.modules(), *original.modules()):
        assert not m._forward_hooks and not m._forward_pre_hooks

def test_batches_do_not_matter():
    model, original = changed("llama", OUTSIDE)
    facts = FACTS + toy_facts(60, 5, 6)
    every = krs_curves(model, original, facts)
    for i in (0, 33, 64):
        alone = krs_curves(model, original, [facts[i]])
        assert alone.lost.item() == pytest.approx(every.lost[i].item(), rel=1e-4)
        for kind in KINDS:
            assert alone.restored[kind][:, 0].tolist() == pytest.approx(
                every.restored[kind][:, i].tolist(), rel=1e-3, abs=1e-6)

def test_distances_are_those_of_the_logits():
    model, original = changed("llama", OUTSIDE)
    e, found = FACTS[0], logit_distance(model, original, FACTS)
    with torch.no_grad(): a, b = (m(torch.tensor([e.ids])).logits[0] for m in (model, original))
    at = slice(e.start - 1, len(e.ids) - 2) # the end is left out
    assert found[0].item() == pytest.approx((a - b)[at].square().mean().item(), rel=1e-5)

# --- what is refused

@pytest.mark.parametrize(
    "other", [dict(n_layers=2), dict(d_ff=32), dict(d_model=32)])
def test_models_of_different_shapes_are_one_line(other):
    with pytest.raises(ValueError, match="cannot be restored from one of llama with") as error:
        Restoring(llama(), llama(**other))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unlearned from"): krs_curves(llama(), gpt2(), FACTS)
    with pytest.raises(ValueError, match="unlearned from"): drifts(llama(), olmo2(), {"a": FACTS})

@pytest.mark.parametrize("layer", [-1, 3, True, 1.])
def test_a_layer_outside_the_model_is_one_line(layer):
    says = "is not in the model; its layers are 0 to 2"
    with pytest.raises(ValueError, match=says):
        with Restoring(llama(), llama(1))("both", [layer]): pass
    with pytest.raises(ValueError, match=f"{says}|layer must be a whole number") as error:
        suppressed(llama(), FACTS, FACTS, CONTROLS[0], layer)
    assert "\n" not in str(error.value)

def test_unknown_kinds_and_controls_are_named():
    with pytest.raises(ValueError, match="unknown kind 'norms'; known: coefficients, attention"):
        with Restoring(llama(), llama(1))("norms", [0]): pass
    with pytest.raises(ValueError, match="unknown control 'all'"):
        suppressed(llama(), FACTS, FACTS, "all", 0)

# --- controls, and the registered

@cache
def scene(): return toy_scene()

@pytest.mark.parametrize("layer", [0, 3])
def test_the_controls_come_out_either_way(layer):
    before = bits(scene().original)
    for control, kind in zip(CONTROLS, ("value vectors", "coefficients")):
        sets = scene().forget, scene().examples["retain"]
        model = suppressed(scene().original, *sets, control, layer, epochs=8)
        moved = [n for n, x in model.state_dict().items() if not torch.equal(x, before[n])]
        assert moved and all(f"layers.{layer}.mlp" in n for n in moved)
        assert all(("down_proj" in n) == (kind == "value vectors") for n in moved)
        found = krs_curves(model, scene().original, scene().forget, window=1).krs()
        assert found[kind][layer].min() > 1 - 1e-5
        if kind == "coefficients": assert found["value vectors"].abs().max() < 1e-5
    assert same(scene().original, before)

def test_the_attack_recovers_what_one_layer_hides_and_nothing_that_was_never_there():
    before = [bits(m) for m in (scene().attacked, scene().original, scene().retained)]
    rows = {row["attack"]: row for row in run_attacks(scene(), {"restoring": {}}).rows}
    assert rows["restored value vectors"]["end"] == pytest.approx(1)
    assert rows["restored both"]["end"] < .05
    assert all(row["end without"] < .05 and row["end at first"] == 1 for row in rows.values())
    assert all(map(same, (scene().attacked, scene().original, scene().retained), before))

def test_the_measured_curves_are_those_of_the_chapter():
    rows = find("measurement", "krs")(
        scene=scene(), options={"most": 6, "max_new_tokens": 8, "window": 2})
    examples = continued(scene().original, scene().some("forget", 6), 8)
    for name, model in (("attacked", scene().attacked), ("retained", scene().retained)):
        curves = krs_curves(model, scene().original, examples, window=2)
        for row in (row for row in rows if row["model"] == name):
            own = curves.krs()[row["restored"]][row["layer"]]
            assert row["KRS"] == pytest.approx(own.mean().item()) and row["n"] == 6
            apart = curves.restored[row["restored"]][row["layer"]].sum() / curves.lost.sum()
            assert row["pooled"] == pytest.approx(1 - apart.item()) and row["window"] == 2
    assert len(rows) == 2 * 4 * 4

def test_drift_counts_whole_answers():
    rows = find("measurement", "answer_drift")(scene=scene(), options={"most": 10})
    assert [row["set"] for row in rows] == ["forget", "retain", "holdout"]
    for row in rows:
        some = scene().some(row["set"], 10)
        assert row["right after"] == wholly_right(scene().attacked, some)
        for e, known in zip(some, score(scene().attacked, some).known.tolist()):
            assert 0 <= known <= len(e.ids) - e.start
    assert rows[1]["right before"] == 1 and rows[0]["right after"] < .3

def test_the_measurements_are_registered():
    known = methods("measurement")
    assert all(known[n].source and known[n].own for n in ("krs", "krs_controls", "answer_drift"))
