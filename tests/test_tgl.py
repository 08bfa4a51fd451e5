"""Gradient localization: worked cases of the ratio, norms against plain autograd, frozen layers
that stay bit-identical, arms at one budget."""
import copy, math
from itertools import chain
import pytest, torch
from transformers import (
    GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM)
from unloc.layerwise import (
    PROBED, attention_of, compare_layer_training, dealt_anew, drift_sets, finetune_layers,
    layer_gradient_norms, layer_weights, mean_nll, on_words, random_layers, relative_norms,
    scaled_rates, standing_out, training_arms)
from unloc.models import blocks_of, tiny_model
from unloc.regions import Region
from unloc.register import find, methods
from unloc.relations import make_related_world
from unloc.scene import toy_facts
from unloc.scoring import answer_token_logprob
from unloc.tokens import Example, collate, encode, train_tokenizer
from unloc.training import finetune

def llama(): return tiny_model("llama", 60, d_model=16, n_layers=3, d_ff=24, n_heads=2)
def olmo2(): return tiny_model("olmo2", 60, d_model=16, n_layers=3, d_ff=24, n_heads=2)
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config).eval()
def neox():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, intermediate_size=24,
        num_attention_heads=2, max_position_embeddings=64)
    return GPTNeoXForCausalLM(config).eval()
def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, ffn_dim=24, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64)
    return OPTForCausalLM(config).eval()
MODELS = {"llama": llama, "olmo2": olmo2, "gpt2": gpt2, "neox": neox, "opt": opt}
FACTS, OTHERS = toy_facts(5, 1, 2), toy_facts(4, 3, 4)
R = torch.tensor([1.8, 1.5, 1.1, .9, .7, .6], dtype=torch.float64)

def plain(model, e): # the gradient of one text
    model.zero_grad()
    (-answer_token_logprob(model, collate([e])).mean()).backward()
    found = [[p.grad.double().clone() for p in block.parameters()] for block in blocks_of(model)]
    model.zero_grad()
    return found

# --- the ratio

def test_the_golden_case():
    assert standing_out(R).tolist() == [True, True, False, False, False, False]
    mean, most = scaled_rates(R).tolist(), scaled_rates(R, "max").tolist()
    assert [round(x, 4) for x in mean] == [1.6364, 1.3636, 1., .8182, .6364, .5455]
    assert [round(x, 4) for x in most] == [1., .8333, .6111, .5, .3889, .3333]
    assert scaled_rates(R).mean().item() == pytest.approx(1, abs=1e-12)

@pytest.mark.parametrize("c", [1e-6, .3, 7., 1e5])
def test_the_scale_of_the_probe_changes_every_ratio_and_no_choice(c):
    probe, usual = R * 2, torch.full((6,), 2., dtype=torch.float64)
    assert torch.allclose(relative_norms(c * probe, usual), c * R, rtol=1e-12)
    assert torch.equal(standing_out(c * R), standing_out(R))
    assert torch.allclose(scaled_rates(c * R), scaled_rates(R), rtol=1e-12)

def test_equal_sets_have_the_ratio_one_and_no_layer_stands_out():
    norms = layer_gradient_norms(llama(), FACTS)
    ratio = relative_norms(norms, norms)
    assert torch.equal(ratio, torch.ones(3, dtype=torch.float64))
    assert not standing_out(ratio).any()
    with pytest.raises(ValueError, match="^the ratio is the same in all layers"):
        training_arms(ratio, 2, 0)

@pytest.mark.parametrize("n", range(1, 40))
def test_a_layer_at_the_mean_is_frozen_however_sums_round(n):
    assert not standing_out(torch.full((n,), .1, dtype=torch.float64)).any()

def test_no_ratio_to_nothing():
    with pytest.raises(ValueError, match="gradient of norm 0 in layer 1"):
        relative_norms(torch.ones(2), torch.tensor([1., 0.]))
    with pytest.raises(ValueError, match="gradient of norm nan in layer 0"):
        relative_norms(torch.ones(2), torch.tensor([math.nan, 1.]))
    with pytest.raises(ValueError, match="cannot be compared"):
        relative_norms(torch.ones(2), torch.ones(3))

# --- the norms

@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_plain_autograd(name):
    model = MODELS[name]()
    every = [plain(model, e) for e in FACTS]
    def norm(ps): return torch.cat([g.flatten() for g in ps]).norm().item()
    want = [sum(norm(g[layer]) for g in every) / len(FACTS) for layer in range(3)]
    assert layer_gradient_norms(model, FACTS).tolist() == pytest.approx(want, rel=1e-5)
    mean = [[sum(parts) / len(FACTS) for parts in zip(*(g[k] for g in every))] for k in range(3)]
    found = layer_gradient_norms(model, FACTS, reduce="mean gradient").tolist()
    assert found == pytest.approx([norm(g) for g in mean], rel=1e-5)

@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_block_are_apart(name):
    model = MODELS[name]()
    for mlp, attention, block in zip(*(layer_weights(model, p) for p in
            ("mlp", "attention", "block"))):
        a, b, c = ({id(p) for p in ps} for ps in (mlp, attention, block))
        assert a and b and not a & b and a | b <= c
        assert all(p.ndim == 1 for p in block if id(p) in c - a - b), "norms and biases are left"
    assert len(attention_of(model)) == 3

def test_a_model_without_attention_is_named():
    model = llama()
    for block in model.model.layers:
        block.mixer = block.self_attn
        del block.self_attn
    with pytest.raises(ValueError, match="^layer 0 of this LlamaForCausalLM has no attention"):
        attention_of(model)

def test_flags_and_gradients_are_put_back():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = kept = torch.ones(16)
    layer_gradient_norms(model, FACTS)
    assert model.model.norm.weight.grad is kept and not model.lm_head.weight.requires_grad
    assert all(p.grad is None for b in blocks_of(model) for p in b.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

# --- training by layers

def fit(model, rates, **how):
    how = {"epochs": 2, "lr": 1e-2, "batch_size": 2, "seed": 0} | how
    finetune_layers(model, FACTS, torch.tensor(rates), **how)
    return model

@pytest.mark.parametrize("name", MODELS)
def test_frozen_layers_and_all_else_stay_bit_identical(name):
    before, model = MODELS[name](), fit(MODELS[name](), [0., 1., 0.])
    inside = {id(p) for p in blocks_of(model)[1].parameters()}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved and moved <= {n for n, p in model.named_parameters() if id(p) in inside}

@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_all_rates_one_it_is_finetune(name):
    model, other = fit(MODELS[name](), [1., 1., 1.]), MODELS[name]()
    blocks = [*chain.from_iterable(layer_weights(other))]
    finetune(other, FACTS, 2, 1e-2, 2, 0, parameters=blocks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))

def test_a_smaller_rate_is_a_smaller_step():
    start = llama()
    def moved(rates):
        model = fit(llama(), rates, epochs=1, batch_size=5)
        return [sum((p - q).norm().item() for p, q in zip(a.parameters(), b.parameters()))
            for a, b in zip(blocks_of(model), blocks_of(start))]
    whole, scaled = moved([1., 1., 1.]), moved([1., .5, .25])
    assert [b / a for a, b in zip(whole, scaled)] == pytest.approx([1, .5, .25], rel=.02)

@pytest.mark.parametrize(
    "rates, says",
    [
        ([1., 1.], "2 learning rates for a model of 3 layers; give one for each, of layers 0 to 2"),
        ([0., 0., 0.], "every layer is frozen"), ([1., -1., 1.], "must be finite and at least 0"),
        ([1., math.nan, 1.], "must be finite and at least 0")])
def test_wrong_rates_are_one_line(rates, says):
    with pytest.raises(ValueError, match=says) as error: fit(llama(), rates)
    assert "\n" not in str(error.value)

def test_a_model_that_diverges_is_named():
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(llama(), [1., 1., 1.], lr=1e30, epochs=5)

# --- controls

@pytest.mark.parametrize("k", [1, 2, 5])
def test_random_layers_are_as_many_all_different_and_not_the_chosen(k):
    chosen = torch.arange(6) < k
    found = random_layers(chosen, 4, 0)
    assert len(found) == 4 and all(int(x.sum()) == k for x in found)
    assert len({tuple(x.tolist()) for x in [chosen, *found]}) == 5
    assert all(map(torch.equal, found, random_layers(chosen, 4, 0)))
    assert not random_layers(torch.ones(3, dtype=torch.bool), 4, 0), "there is no other choice"

def test_dealt_rates_are_the_same_rates():
    found = [dealt_anew(R, seed) for seed in range(6)]
    assert all(sorted(x.tolist()) == sorted(R.tolist()) for x in found)
    assert len({tuple(x.tolist()) for x in found}) > 1

# --- words, and a world that moves on

WORLD = make_related_world(n_people=8, n_cities=4, n_countries=4, n_employers=4, n_new=2)
TOKENIZER = train_tokenizer(
    [t for f in WORLD.forget + WORLD.retain for t in (f.question, f.answer)], 400)

def test_the_words_that_carry_the_knowledge_are_scored_alone():
    model = tiny_model("llama", 400, d_model=16, n_layers=2, d_ff=24, n_heads=2)
    for c in (*WORLD.changed, *WORLD.new, *WORLD.clusters):
        whole = encode(TOKENIZER, c.base.question, c.base.answer)
        short = on_words(whole, c.answer)
        assert TOKENIZER.decode(short.ids[short.start:]).strip() == c.answer
        assert short.ids == whole.ids[:len(short.ids)] and short.start >= whole.start
    logprob = answer_token_logprob(model, collate([whole]))[short.start - whole.start:]
    n = len(short.ids) - short.start
    assert mean_nll(model, [short]) == pytest.approx(-logprob[:n].mean().item(), rel=1e-5)

def test_what_a_model_reads_and_is_measured_on():
    sets = drift_sets(WORLD, TOKENIZER)
    moved = {(c.relation, c.subject) for c in WORLD.changed}
    same = [c for c in WORLD.split("test") if (c.relation, c.subject) not in moved]
    assert len(sets["probe untouched"]) == len(same) and len(sets["probe new"]) == len(WORLD.new)
    read = {tuple(e.ids) for e in sets["corpus"]}
    for c in (*same, *WORLD.split("forget")):
        for f in c.trained: assert tuple(encode(TOKENIZER, f.question, f.answer).ids) not in read
    asked = {tuple(e.ids[:e.start]) for e in sets["corpus"]}
    for name in PROBED:
        questions = [e.texts.question for e in sets[f"held-out {name}"]]
        held_out = {tuple(encode(TOKENIZER, q, "x").ids[:-2]) for q in questions}
        assert not held_out & asked, "the question form is held out"
    assert len(drift_sets(WORLD, TOKENIZER, most=3)["probe new"]) == 3

def test_facts_that_did_not_change_are_refused():
    still = make_related_world(n_people=8, n_cities=4, n_countries=4, n_employers=4, n_new=0)
    with pytest.raises(ValueError, match="take the data set related_world"):
        drift_sets(still, TOKENIZER)

def test_arms_start_alike_and_leave_the_model():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    arms = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.tensor([1., 0., 0.])}
    sets = {"taught": FACTS, "others": OTHERS}
    rows = compare_layer_training(model, FACTS, sets, arms, 2, 1e-2, 2, 0)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    a, b, c = ([row["nll"] for row in rows if row["arm"] == name] for name in "abc")
    assert a == b and a != c and all(r["perplexity"] == math.exp(r["nll"]) for r in rows)
    assert {row["set"]: row["before"] for row in rows} == {
        name: mean_nll(model, x) for name, x in sets.items()}

def test_a_text_that_scores_nothing_is_refused():
    with pytest.raises(ValueError, match="^text 1 of the measured set scores no token"):
        layer_gradient_norms(llama(), [FACTS[0], Example([5, 6], 2)])

# --- the localizer

def test_the_localizer_ranks_the_vectors_of_chosen_layers_first():
    model, sets = llama(), {"forget": FACTS, "retain": OTHERS}
    ratio = relative_norms(*(layer_gradient_norms(model, x) for x in sets.values()))
    scores = find("localizer", "tgl")(model=model, seed=0, **sets)
    chosen = standing_out(ratio)
    assert 0 < chosen.sum() < 3
    assert scores[chosen].min() > scores[~chosen].max()
    assert len(set(scores.flatten().tolist())) == 72, "no ties"
    share = int(chosen.sum()) / 3
    assert torch.equal(Region.top(scores, share).mask.all(1), chosen)
    own = find("localizer", "tgl_projections")(model=model, **sets)
    assert own.tolist() == pytest.approx(ratio.tolist(), rel=1e-6)
    mlp = find("localizer", "tgl_projections")(model=model, options={"part": "mlp"}, **sets)
    assert not torch.allclose(mlp, own)

def test_the_measurements_are_registered():
    known = methods("measurement")
    assert known["layer_training"].seeded and not known["layer_gradients"].seeded
    assert all(known[n].source and known[n].own for n in ("layer_training", "layer_gradients"))
