"""KLUE against finite differences and plain autograd, pairs that never match, facts that are
chosen anew in every epoch, and the sums of its benchmark."""
import pytest, torch
from unloc.attributions import POOLED, answer_attributions
from unloc.faithfulness import multi_hop, overall
from unloc.methods.klue import klue, mismatched_pairs
from unloc.models import output_projections, tiny_model
from unloc.neurons import attribution
from unloc.regions import Region
from unloc.register import methods
from unloc.tokens import Example

def facts(n, seed=0): # prompts of 1 to 6 tokens, answers of 1 to 6 and an end token
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, k=1: torch.randint(low, high, (k,), generator=g).tolist()
    return [Example(draw(2, 60, (p := draw(1, 7)[0]) + draw(1, 7)[0]) + [1], p) for _ in range(n)]

FACTS = facts(6)

def small(arch="llama", dtype=torch.float64):
    model = tiny_model(arch, vocab_size=60, d_model=16, d_ff=24, n_layers=2, n_heads=2).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p *= 3 if p.ndim == 2 else 1 # sharper than a fresh model
    return model

def probability(model, e, scale=None): # scale: of layer, position and vector -> coefficient's share
    hooks = []
    for layer, p in enumerate(output_projections(model)):
        def patch(module, x, layer=layer):
            return (x[0] if scale is None else x[0] * scale[layer][None, :x[0].shape[1]],)
        hooks.append(p.register_forward_pre_hook(patch))
    logits = model(input_ids=torch.tensor([e.ids[:-1]])).logits[0, e.start - 1:-1]
    for h in hooks: h.remove()
    return logits.softmax(-1).gather(1, torch.tensor(e.ids[e.start:-1])[:, None]).mean()

def by_autograd(model, e): # [n_layers, position, d_ff], positions before the last token
    n = len(e.ids) - 2
    scale = torch.ones(2, n, 24, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(probability(model, e, padded(scale)), scale)[0]

def padded(scale): # the input has one position more, whose prediction nobody reads
    return torch.cat([scale, torch.ones(2, 1, 24, dtype=scale.dtype)], 1)

# --- what a coefficient is worth

@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("over", POOLED)
def test_it_is_what_autograd_gives_a_fact_at_a_time(over, arch):
    model = small(arch)
    pool = {"max": lambda x: x.amax(1), "sum": lambda x: x.sum(1), "last": lambda x: x[:, -1]}
    want = sum(pool[over](by_autograd(model, e)) for e in FACTS) / len(FACTS)
    assert len({len(e.ids) for e in FACTS}) > 2 and want.abs().min() > 0, "padded batches"
    for max_tokens in (4096, 30, 1):
        got = answer_attributions(model, FACTS, over, max_tokens)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)

@torch.no_grad()
def test_it_is_the_finite_difference_of_the_probability(): # norms round to float32
    model, e, step = small(), FACTS[2], .02
    want = torch.zeros(2, 24, dtype=torch.float64)
    for layer in range(2):
        for i in range(24):
            shares = torch.ones(2, 2, len(e.ids), 24, dtype=torch.float64)
            shares[:, layer, :, i] += torch.tensor([[step], [-step]]) # at all positions
            more, less = (probability(model, e, share) for share in shares)
            want[layer, i] = (more - less) / (2 * step)
    got = answer_attributions(model, [e], "sum")
    assert (got - want).abs().max() < 1e-3 * want.abs().max() and want.abs().max() > 1e-4

@pytest.mark.parametrize("layer", [0, 1])
def test_at_the_last_position_it_is_the_end_of_the_path_of_integrated_gradients(layer):
    model, e = small(), Example([5, 6, 7, 9, 1], 3)
    two, none = (attribution(model, e, layer, steps=n, grid="ends").scores for n in (2, 1))
    got = answer_attributions(model, [e], "last")[layer]
    torch.testing.assert_close(got, 2 * two - none, rtol=1e-9, atol=1e-15)

def test_padding_is_no_position(): # a zero there would be the largest of negative numbers
    model, pair = small(), [Example([5, 9, 1], 1), max(FACTS, key=lambda e: len(e.ids))]
    alone = [answer_attributions(model, [e]) for e in pair]
    assert min(x.min() for x in alone) < 0
    torch.testing.assert_close(answer_attributions(model, pair), sum(alone) / 2)

def test_the_end_token_does_not_count():
    model, e = small(), FACTS[0]
    other = Example([*e.ids[:-1], 7], e.start)
    assert torch.equal(answer_attributions(model, [e]), answer_attributions(model, [other]))

# --- pairs that do not belong together

def test_a_pair_never_has_the_true_answer():
    twice = [*FACTS, Example([30, 31, *FACTS[0].ids[FACTS[0].start:]], 2)] # shares an answer
    pairs = mismatched_pairs(twice, 50, seed=3)
    assert len(pairs) == 50 * len(twice)
    drawn = {}
    for i, pair in enumerate(pairs):
        e = twice[i % len(twice)]
        assert pair.start == e.start and pair.ids[:e.start] == e.ids[:e.start]
        assert pair.ids[e.start:] != e.ids[e.start:]
        drawn.setdefault(i % len(twice), set()).add(tuple(pair.ids[e.start:]))
    assert {len(x) for x in drawn.values()} == {len(FACTS) - 1}, "every other answer is drawn"

def test_pairs_depend_on_the_seed_alone():
    one, same, other = (mismatched_pairs(FACTS, 5, seed) for seed in (0, 0, 1))
    assert one == same != other
    state = torch.get_rng_state()
    mismatched_pairs(FACTS, 5, 0)
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("over", POOLED)
@pytest.mark.parametrize("alpha", [1., 10.])
@pytest.mark.parametrize("n", [1, 5])
def test_the_score_takes_the_mean_over_pairs_away(over, alpha, n):
    model = small()
    got = klue(model, FACTS, alpha, n, over, seed=2)
    want = answer_attributions(model, FACTS, over) - alpha * answer_attributions(
        model, mismatched_pairs(FACTS, n, 2), over)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize("over", POOLED)
def test_without_alpha_the_region_is_the_plain_top(over):
    model = small()
    plain = answer_attributions(model, FACTS, over)
    for seed in (0, 1):
        got = klue(model, FACTS, alpha=0., over=over, seed=seed)
        assert torch.equal(Region.top(got, .2).mask, Region.top(plain.float(), .2).mask)
    wide = klue(model, FACTS, alpha=10., over=over)
    assert Region.top(wide, .2).jaccard(Region.top(got, .2)) < 1, "with it another one"

def test_a_vector_that_answers_every_question_is_left_out():
    # one vector of the last layer writes each answer token's own direction after any question
    model = small()
    answer = Example([5, 6, 9, 1], 2)
    forget = [answer, Example([7, 8, 4, 1], 2)]
    with torch.no_grad():
        last = output_projections(model)[-1]
        last.weight[:, 3] = 4 * model.lm_head.weight[[9, 4]].mean(0)
    plain, ours = (klue(model, forget, alpha, over="last") for alpha in (0., 10.))
    rank = lambda scores: int((scores.flatten() > scores[1, 3]).sum())
    assert rank(ours) > rank(plain)

@pytest.mark.parametrize("options, says", [
    (dict(alpha=-1.), "alpha must be at least 0 and finite, got -1"),
    (dict(alpha=float("inf")), "alpha must be at least 0 and finite, got inf"),
    (dict(mismatched=0), "mismatched must be at least 1, got 0"),
    (dict(over="mean"), "unknown over 'mean'; known: max, sum, last")])
def test_options_are_checked_before_any_work(options, says, monkeypatch):
    model = small()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=says) as error: klue(model, FACTS, **options)
    assert "\n" not in str(error.value)

def test_one_answer_cannot_be_mismatched():
    same = [Example([i, 9, 1], 1) for i in (5, 6, 7)]
    with pytest.raises(ValueError, match="all facts have one answer.*; give more facts, or alpha"):
        klue(small(), same)
    assert klue(small(), same, alpha=0).shape == (2, 24)

def test_a_pair_too_long_for_the_model_is_refused(): # each fact alone would fit
    import transformers
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    forget = [Example([5] * 12 + [6, 1], 12), Example([5, 6, 7, 8, 9, 4, 1], 1)]
    assert klue(model, forget, alpha=0).shape == (2, 64)
    with pytest.raises(ValueError, match="18 tokens") as error: klue(model, forget)
    assert "\n" not in str(error.value)

# --- the sums of the benchmark

def test_the_golden_sums():
    assert multi_hop(20., 90.) == 85.
    assert overall(40., 80., 70., multi_hop(20., 90.)) == 73.75
