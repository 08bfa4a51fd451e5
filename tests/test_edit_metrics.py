"""The numbers of an edit are those of worked cases, and a trace puts back what it says it does."""
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from unloc.edit_metrics import (
    edit_success, fluency, forget_efficacy, harmonic_utility, locality, mean_locality,
    ngram_entropy, portability, predicted_tokens)
from unloc.models import output_projections, tiny_model, value_vectors
from unloc.neurons import above_share, attribution, in_common
from unloc.regions import Region
from unloc.scene import toy_facts
from unloc.tracing import (
    causal_trace, change_size, hit_at, mean_overlap, most_changed, rsim, target_overlap, top_layers,
    vocabulary_ranks)

def llama(): return tiny_model("llama", 60, d_model=32, n_layers=3, d_ff=48, n_heads=2)
def olmo2(): return tiny_model("olmo2", 60, d_model=32, n_layers=3, d_ff=48, n_heads=2)
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config).eval()
FACTS = toy_facts(6, 1, 2)

# --- pure functions

@pytest.mark.parametrize(
    "text, two, three, weighed",
    [
        ("a b c d e f g h", 2.8073549, 2.5849625, 2.6590933),
        ("a a a a a", 0., 0., 0.),
        ("the cat sat on the cat sat on the mat", 2.2810361, 2.25, 2.2603454)])
def test_the_golden_fluencies(text, two, three, weighed):
    words = text.split()
    found = ngram_entropy(words, 2), ngram_entropy(words, 3), fluency(words)
    assert [round(x, 7) for x in found] == [two, three, weighed]

def test_the_golden_locality():
    assert round(100 * locality([(29, 234, 334)], [(29, 234, 333)]), 2) == 66.67

@pytest.mark.parametrize("candidates, every, found", [(.7, .4, .5), (.3, .4, 0.), (1., 0., 1.)])
def test_the_golden_similarities(candidates, every, found):
    assert abs(rsim(candidates, every) - found) < 1e-12

# of a published run: five numbers of the forget set, six of the retain set, FE and utility
UNIERASE = {
    "8B before": (
        (.9858070381, .9869735095, .5217822991, .9946046070, .97),
        (.9903611910, .9849852087, .5341688282, .9665611272, .9935130134, .9833333333),
        .1081665092, .8626741006),
    "8B after": (
        (.0234620393, .4325985551, .4746342253, .0513941981, .0033333333),
        (.8706467613, .9419139878, .5243997327, .9651853901, .9176342028, .8),
        .8029155298, .8007461907),
    "1B after": (
        (.0001111111, .0040674267, .3522490703, .0498688229, 0),
        (.0104399172, .0226272580, .3069834910, .1940167592, .0693014581, .0033333333),
        .9187407138, .0129639447)}
MORE = ( # real authors, and the world, of "8B after"
    .958, .4443061169, .5634950941, .9845376277, .9389540512, .74,
    .9031339031, .5176208671, .6679759253, .9667055974, .9112362587, .6666666667)

@pytest.mark.parametrize("run", UNIERASE)
def test_the_golden_sums_of_unierase(run):
    forget, retain, efficacy, utility = UNIERASE[run]
    assert abs(forget_efficacy(forget) - efficacy) < 2e-10
    assert abs(harmonic_utility(retain) - utility) < 2e-10

def test_the_golden_utility_of_three_sets():
    assert abs(harmonic_utility(UNIERASE["8B after"][1] + MORE) - .7449607966) < 2e-10
    assert harmonic_utility([.5, 0.]) == 0

def test_an_overlap_is_compared_with_two_kinds_of_chance():
    size = torch.zeros(4, 100)
    size[1, :40] = torch.arange(40., 0., -1)
    found = target_overlap(size, Region(size > 0), range(20))
    assert found.recall == 1 and abs(found.by_layer - .4) < .1 and abs(found.anywhere - .1) < .05

def test_questions_count_alike_whatever_the_length_of_their_answers():
    assert edit_success([[1], [2, 3, 4, 0]], [[0], [2, 3, 4, 5]]) == .375
    assert portability({"reasoning": 1., "logical generalization": 0.}) == .5
    assert mean_locality({"forgetfulness": .25, "relation specificity": .75}) == .5
    assert mean_overlap([{0}, {1}]) == 0 and mean_overlap([{0, 1}, {0, 1}]) == 1

@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda: locality([], []), "0 and 0 questions"),
        (lambda: locality([[1]], [[1], [2]]), "1 and 2 questions"),
        (lambda: locality([[]], [[]]), "rows of 0 and 0 tokens"),
        (lambda: edit_success([[1, 2]], [[1]]), "rows of 2 and 1 tokens"),
        (lambda: portability({}), "no part is given"),
        (lambda: mean_locality({"reasoning": 1.}), "unknown part 'reasoning'"),
        (lambda: fluency(["a", "b"]), "a text of 2 tokens has no 3-gram"),
        (lambda: ngram_entropy([1, 2], 0), "n must be at least 1, got 0"),
        (lambda: rsim(.5, 1.), "all facts have the same layers"),
        (lambda: rsim(-.1, .5), "candidates must lie in [0, 1]"),
        (lambda: forget_efficacy([]), "no number is given"),
        (lambda: harmonic_utility([.5, float("nan")]), "must lie in [0, 1], got nan"),
        (lambda: mean_overlap([{1}]), "1 sets have no pair"),
        (lambda: top_layers(torch.ones(3, 2), 0), "k must be 1 to 3"),
        (lambda: hit_at(torch.ones(0), 5), "no rank is given"),
        (lambda: change_size([], []), "of 0 and 0 layers"),
        (lambda: predicted_tokens(llama(), []), "the asked set is empty"),
        (lambda: vocabulary_ranks(llama(), torch.ones(32, 2), -1), "token -1 is not in"),
        (lambda: causal_trace(llama(), FACTS[0], (0, 0)), "the subject (0, 0) does not lie"),
        (lambda: causal_trace(llama(), FACTS[0], (0, 1), of="heads"), "unknown 'heads'"),
        (lambda: causal_trace(llama(), FACTS[0], (0, 1), draws=0), "window and draws must be")])
def test_what_has_no_number_is_one_line(bad, says):
    with pytest.raises(ValueError) as error: bad()
    assert says in str(error.value) and "\n" not in str(error.value)

# --- models

@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_predictions_are_those_of_the_model_itself(make):
    model = make()
    for e, found in zip(FACTS, predicted_tokens(model, FACTS)):
        with torch.no_grad(): logits = model(torch.tensor([e.ids])).logits[0]
        assert found == logits[e.start - 1:-1].argmax(-1).tolist()

@pytest.mark.parametrize("of", ["states", "mlp"])
@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_without_noise_nothing_is_hidden_and_nothing_comes_back(make, of):
    model = make()
    before = {n: p.clone() for n, p in model.named_parameters()}
    trace = causal_trace(model, FACTS[0], (0, 2), of, noise=0.)
    assert abs(trace.hidden - trace.clean) < 1e-6
    assert float(trace.effect.abs().max()) < 1e-6 and trace.effect.shape == (3, 3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    hooks = [m for m in model.modules() if m._forward_hooks]
    assert not hooks

@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_tokens_before_the_subject_carry_nothing(make):
    trace = causal_trace(make(), FACTS[0], (1, 3), noise=20.)
    assert abs(trace.hidden - trace.clean) > 1e-5
    assert float(trace.effect[:, 0].abs().max()) < 1e-7 < float(trace.effect[:, 1:].abs().max())

def test_a_state_at_the_only_hidden_token_brings_all_back_after_the_embedding():
    model = llama() # the hidden token is the last one of the prompt, and answers look at it
    with torch.no_grad(): # the first block reads nothing of other tokens
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    trace = causal_trace(model, FACTS[0], (2, 3), noise=20.)
    assert abs(float(trace.restored[0, 2]) - trace.clean) < 1e-7

def test_a_window_holds_the_layers_around_its_own():
    model = llama()
    whole = causal_trace(model, FACTS[0], (1, 3), "mlp", window=9, noise=20.).restored
    assert torch.allclose(whole[0], whole[2], rtol=0, atol=1e-9) # all layers in both
    narrow = causal_trace(model, FACTS[0], (1, 3), "mlp", window=1, noise=20.).restored
    assert not torch.allclose(narrow, whole, rtol=0, atol=1e-9)

def test_a_seed_draws_the_noise():
    traces = [causal_trace(llama(), FACTS[0], (1, 3), noise=20., seed=s).hidden for s in (0, 0, 1)]
    assert traces[0] == traces[1] != traces[2]

@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_most_changed_value_vectors_are_found_and_read(make):
    model = make()
    def values(): return [value_vectors(p).detach().clone() for p in output_projections(model)]
    before = values()
    with torch.no_grad():
        value_vectors(output_projections(model)[1])[:, 5] += 3.
        value_vectors(output_projections(model)[2])[:, 7] += 1.
    size = change_size(before, values())
    assert most_changed(size, 9) == [(1, 5), (2, 7)] and most_changed(size, 1) == [(1, 5)]
    assert abs(float(size[1, 5]) - 3 * 32 ** .5) < 1e-4
    head = model.get_output_embeddings().weight.detach()
    ranks = vocabulary_ranks(model, head[[4, 9]].T, 4)
    assert ranks[0] == 1 and ranks.shape == (2,) and hit_at(ranks, 60) == 1

# --- knowledge neurons

@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("make", [llama, olmo2, gpt2])
def test_the_worth_of_neurons_adds_up_to_that_of_their_layer(make, layer):
    model = make().double()
    found = attribution(model, FACTS[0], layer, steps=200)
    assert abs(float(found.scores.sum()) - found.whole) <= .01 * abs(found.whole)

def test_one_step_is_the_gradient_in_the_middle_and_of_the_other_grid_at_zero():
    model, e = llama().double(), FACTS[1]
    layer, neuron, small = 1, 7, 1e-2 # norms are computed in 32 bits
    ids = torch.tensor([e.ids[:e.start]])
    own = []
    def read(module, inputs): own.append(inputs[0][0, -1].clone())
    projection = output_projections(model)[layer]
    handle = projection.register_forward_pre_hook(read)
    with torch.no_grad(): model(ids)
    handle.remove()
    def likely(share, more): # probability of the first token of the answer
        def put(module, inputs):
            new = inputs[0].clone()
            new[0, -1] = share * own[0]
            new[0, -1, neuron] += more
            return (new,)
        handle = projection.register_forward_pre_hook(put)
        with torch.no_grad(): found = model(ids).logits[0, -1].softmax(-1)[e.ids[e.start]]
        handle.remove()
        return float(found)
    short = type(e)([*e.ids[:e.start + 1], 1], e.start) # an answer of one token
    for grid, share in (("midpoint", .5), ("ends", 0.)):
        slope = (likely(share, small) - likely(share, -small)) / (2 * small)
        found = attribution(model, short, layer, 1, grid).scores[neuron]
        assert abs(float(found) - slope * float(own[0][neuron])) < 1e-8

@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda: attribution(llama(), FACTS[0], 3), "layer 3 is not in the model"),
        (lambda: attribution(llama(), FACTS[0], 0, steps=0), "steps must be a whole number"),
        (lambda: attribution(llama(), FACTS[0], 0, grid="even"), "unknown grid 'even'"),
        (lambda: above_share(torch.zeros(2, 3)), "no score is above 0"),
        (lambda: above_share(torch.full((2, 3), float("nan"))), "NaN or infinite"),
        (lambda: in_common([Region(torch.ones(1, 2) > 0)], 0.), "share must lie in (0, 1]")])
def test_neurons_that_cannot_be_chosen_are_one_line(bad, says):
    with pytest.raises(ValueError) as error: bad()
    assert says in str(error.value) and "\n" not in str(error.value)
