"""Attacks recover what is only hidden and nothing that was never there; they leave every weight as
it was, on every layout of weights."""
import copy, logging, math, sys
import bitsandbytes, pytest, torch
from bitsandbytes import functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from unloc import objectives, training
from unloc.asking import best_of
from unloc.change import Change
from unloc.inside import hidden_states, patched_logprob
from unloc.level import to_level
from unloc.logits import answer_logits
from unloc.masked import unlock
from unloc.methods.depth import depth_of_facts, unlearning_depth
from unloc.methods.logit_lens import logit_lens
from unloc.methods.probing import linear_probe
from unloc.models import region_shape, tiny_model
from unloc.quantization import library_quantized, quantized, rounded
from unloc.regions import Region
from unloc.relearn import relearn, Recovery, recovery
from unloc.scoring import score
from unloc.tokens import Example, collate, train_tokenizer

def facts(n, seed, vocab=60):
    g = torch.Generator().manual_seed(seed)
    return [
        Example(torch.randint(4, vocab, (k,), generator=g).tolist() + [1], 3)
        for k in torch.randint(5, 9, (n,), generator=g).tolist()]

def small(arch="llama", seed=0):
    return tiny_model(arch, 60, d_model=64, n_layers=3, d_ff=64, n_heads=2, seed=seed)
def bits(model): return {name: x.clone() for name, x in model.state_dict().items()}
def same(model, before):
    return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=64, n_layer=3, n_head=2, n_positions=64)).eval()

def of(config, model, **more):
    import transformers
    torch.manual_seed(0)
    shape = {
        "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0} | more
    return getattr(transformers, model)(getattr(transformers, config)(**shape)).eval()

MODELS = {
    "llama": small,
    "olmo2": lambda: small("olmo2"),
    "gpt2": gpt2,
    "neox": lambda: of("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "qwen3": lambda: of("Qwen3Config", "Qwen3ForCausalLM", head_dim=32),
    "opt": lambda: of("OPTConfig", "OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=64),
    "gemma2": lambda: of("Gemma2Config", "Gemma2ForCausalLM", head_dim=32)}

# --- looking inside, on every layout

@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_of_the_lens_is_the_model(name):
    model, examples = MODELS[name](), facts(5, 0)
    before, lens = bits(model), logit_lens(model, examples)
    assert lens.shape == (3, 5)
    assert lens[-1] == pytest.approx(-score(model, examples).nll, abs=2e-5)
    assert same(model, before)
    assert not any(m._forward_hooks for m in model.modules())

@pytest.mark.parametrize("name", MODELS)
def test_a_model_patched_with_itself_is_itself(name):
    model, examples = MODELS[name](), facts(5, 0)
    states = hidden_states(model, examples)
    for layer in range(3):
        assert patched_logprob(model, examples, layer, states[layer]) == pytest.approx(
            -score(model, examples).nll, abs=2e-5)
    other = [[torch.randn_like(h) for h in layer] for layer in states]
    assert (
        patched_logprob(model, examples, 1, other[1])
        - patched_logprob(model, examples, 1, states[1])).abs().min() > 1e-4

def test_hidden_states_are_those_of_transformers():
    model, examples = small(), facts(4, 3)
    batch = collate(examples)
    with torch.no_grad():
        whole = model.base_model(input_ids=batch.ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.allclose(
            torch.cat(hidden_states(model, examples)[layer]),
            whole[layer + 1][:, :-1][batch.answer[:, 1:]],
            atol=1e-6)

def test_depth_is_ordered_by_where_knowledge_goes(): # a model that differs from one layer on
    original, retained, examples = small(), small(seed=1), facts(6, 0)
    training.finetune(original, examples, 40, 4e-3, 6, 0)
    depths = []
    for first in (0, 1, 2):
        mixed = copy.deepcopy(original)
        for layer in range(first, 3):
            mixed.model.layers[layer].load_state_dict(retained.model.layers[layer].state_dict())
        depths.append(
            unlearning_depth(
                original, examples, hidden_states(mixed, examples),
                hidden_states(retained, examples)))
    assert depths[0] > depths[1] > depths[2] > 0
    assert unlearning_depth(
        original, examples, hidden_states(original, examples), hidden_states(retained, examples)
    ) == pytest.approx(0, abs=1e-6)

# --- rounding

@pytest.mark.parametrize("bits_", [2, 3, 4, 8])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits_):
    w = (
        torch.randn(5, 96, generator=torch.Generator().manual_seed(bits_))
        * torch.logspace(-3, 1, 5)[:, None])
    r = rounded(w, bits_, 32)
    step = (w.view(5, 3, 32).amax(-1).clamp(min=0) - w.view(5, 3, 32).amin(-1).clamp(max=0)) / (
        2**bits_ - 1)
    # the zero point is rounded, too
    assert (
        (w - r).view(5, 3, 32).abs()
        <= step[..., None] * (1 + 1e-4) * .5 + step[..., None] * .5 * (bits_ < 8)).all()
    assert max(len(r.view(5, 3, 32)[i, j].unique()) for i in range(5) for j in range(3)) <= 2**bits_
    assert torch.equal(rounded(torch.zeros(2, 64), bits_), torch.zeros(2, 64))
    assert rounded(w.bfloat16(), bits_).dtype == torch.bfloat16

@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_after_rounding(name):
    model, examples = MODELS[name](), facts(5, 0)
    before = bits(model)
    nll = score(model, examples).nll
    head = model.get_output_embeddings().weight.clone()
    with quantized(model, 4):
        assert not same(model, before)
        assert not torch.equal(score(model, examples).nll, nll)
        assert torch.equal(model.get_output_embeddings().weight, head)
    assert same(model, before)
    with pytest.raises(KeyError), quantized(model, 8): raise KeyError
    assert same(model, before)
    with quantized(model, 8): assert (score(model, examples).nll - nll).abs().max() < .1

# --- rounding by a library's kernels

def linears(model):
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not model.get_output_embeddings()}
def of_nf4(weight):
    return F.dequantize_4bit(*F.quantize_4bit(weight.detach().contiguous(), quant_type="nf4"))
def of_int8(x): return F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(x.detach().half())[:2])
def logits(model, examples):
    with torch.no_grad(): return answer_logits(model, collate(examples).to(model.device)).cpu()

@pytest.mark.parametrize("name", MODELS)
def test_a_library_computes_and_no_weight_moves(name):
    model, examples = MODELS[name](), facts(5, 0)
    before = bits(model)
    modules = dict(model.named_modules())
    plain = logits(model, examples)
    error = {}
    seen = score(model, examples).nll
    for n in (8, 4):
        with library_quantized(model, n):
            assert same(model, before) and dict(model.named_modules()) == modules
            made = {type(m.forward.__self__).__name__ for m in linears(model).values()}
            assert made == {8: {"Linear8bitLt"}, 4: {"LinearNF4"}}[n]
            assert "forward" not in vars(model.get_output_embeddings())
            error[n] = (logits(model, examples) - plain).norm() / plain.norm()
            nll = score(model, examples).nll
            # a last digit may turn one of the kernel's own roundings, which is a part of this
            moved = (nll - seen).abs().max()
            assert (
                logit_lens(model, examples)[-1] + nll
            ).abs().max() < moved / 4, "what looks inside sees the same model, not the plain one"
        assert not any("forward" in vars(m) for m in model.modules())
        assert torch.equal(logits(model, examples), plain)
        with pytest.raises(KeyError), library_quantized(model, n): raise KeyError
        assert not any("forward" in vars(m) for m in model.modules())
        assert torch.equal(logits(model, examples), plain)
        assert same(model, before)
    assert 0 < error[8] < error[4] / 2 < .2

@pytest.mark.parametrize("name", MODELS)
def test_four_bits_are_the_librarys_dequantized_weights(name):
    model, examples = MODELS[name](), facts(5, 0)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for m in linears(by_hand).values():
            m.weight.copy_(of_nf4(m.weight.T).T if isinstance(m, Conv1D) else of_nf4(m.weight))
    with library_quantized(model, 4):
        torch.testing.assert_close(
            logits(model, examples), logits(by_hand, examples), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_round_weights_and_inputs_but_large_columns(name):
    model, seen = MODELS[name](), 0
    with library_quantized(model, 8):
        for m in linears(model).values():
            weight = (m.weight.T if isinstance(m, Conv1D) else m.weight).detach()
            bias = 0 if m.bias is None else m.bias.detach()
            x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(seen))
            seen += 1
            torch.testing.assert_close(
                m(x).detach(), of_int8(x) @ of_int8(weight).T + bias, rtol=1e-4, atol=1e-4)
            x[2, 5] = 0; rounded_x = of_int8(x); rounded_x[:, 5] = 0
            x[2, 5] = 40. # sets no grid, and its column stays float for every token
            rounded_x[:, 5] = x[:, 5]
            torch.testing.assert_close(
                m(x[None])[0].detach(), rounded_x @ of_int8(weight).T + bias, rtol=1e-4, atol=2e-4)
    assert seen >= 12

@pytest.mark.parametrize("n", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_library_computes_in_the_models_own_floats(n, dtype):
    model, examples = small().to(dtype), facts(5, 0)
    before, wide = bits(model), logits(small(), examples)
    with library_quantized(model, n): found = logits(model, examples)
    assert (found - wide).norm() / wide.norm() < .4
    assert same(model, before)
    assert all(p.dtype == dtype for p in model.parameters())

def test_a_library_is_quiet(caplog):
    model = small()
    with caplog.at_level(logging.DEBUG, "transformers"), library_quantized(model, 8):
        score(model, facts(3, 0))
    assert not caplog.records and logging.getLogger("bitsandbytes").level == logging.NOTSET

def test_a_library_says_what_it_cannot_do(monkeypatch):
    def enter(model, n=4):
        with library_quantized(model, n): pass
    model = small(); before = bits(model)
    with pytest.raises(
        ValueError, match="layers of 8 and of 4 bits, got 2; `quantized` simulates 2 to 8"):
        enter(model, 2)
    with pytest.raises(
        ValueError,
        match=(
            r"q_proj is no plain linear layer of 16 or 32 bit floats but a Linear of torch.float64"
        )):
        enter(small().double())
    with library_quantized(model, 8):
        with pytest.raises(
            ValueError,
            match=(
                "q_proj is no plain .* or computes something else already; take an unquantized"
                " model")):
            enter(model)
        assert all("forward" in vars(m) for m in linears(model).values()), "the first block goes on"
    with unlock(model, Region.sample(region_shape(model), .2, 0)), pytest.raises(
        ValueError, match="layers.0.mlp.down_proj is no plain"):
        enter(model)
    with pytest.raises(
        ValueError, match="q_proj has rows of 48 weights; bitsandbytes' 4 bits take multiples of 64"
    ):
        enter(tiny_model("llama", 60, d_model=48, n_layers=1, d_ff=64, n_heads=2))
    loaded = small()
    loaded.model.layers[1].mlp.up_proj = bitsandbytes.nn.LinearNF4(64, 64, bias=False)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj is no plain .* but a LinearNF4 of"):
        enter(loaded)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ImportError,
        match=(
            r"bitsandbytes is not installed; install it with: pip install 'unloc\[quantization\]'"),
    ):
        enter(model)
    assert same(model, before)
    assert not any("forward" in vars(m) for m in model.modules())
    assert logging.getLogger("bitsandbytes").level == logging.NOTSET

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_runs_the_same_bits(n, dtype):
    here, there, examples = small().to(dtype), small().to(dtype).cuda(), facts(5, 0)
    before, plain = bits(there), logits(there, examples)
    with library_quantized(here, n): want = logits(here, examples)
    with library_quantized(there, n):
        assert all(m.forward.__self__.weight.is_cuda for m in linears(there).values())
        got = logits(there, examples)
    assert (got - want).norm() / want.norm() < {torch.bfloat16: .05, torch.float32: .01}[dtype]
    assert not torch.equal(got, plain)
    assert same(there, before) and torch.equal(logits(there, examples), plain)

# --- relearning, and its summary

def test_a_support_bounds_what_is_taught():
    model, seen = small(), []
    region, before = Region.sample(region_shape(model), .2, 0), bits(model)
    finetune = training.finetune
    def watch(m, *args, **how):
        finetune(m, *args, **how)
        seen.append({name: (x != before[name]).any().item() for name, x in m.state_dict().items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "finetune", watch)
        for support in (region, None):
            curve = relearn(model, facts(6, 1), facts(4, 2), 1e-2, 3, 3, 0, support)
            assert curve.shape == (4, 4)
            assert same(model, before)
            assert all(p.requires_grad for p in model.parameters())
    assert {name for name, changed in seen[0].items() if changed} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert sum(seen[1].values()) > 20

def test_a_failed_attack_leaves_the_model_whole():
    model = small(); before = bits(model)
    for support in (None, Region.sample(region_shape(model), .5, 0)):
        with pytest.raises((FloatingPointError, ValueError)):
            relearn(model, facts(6, 1), facts(4, 2), 1e30, 5, 3, 0, support) # diverged
        assert same(model, before)

def test_an_attack_that_cannot_start_says_why():
    model = small(); before = bits(model)
    with pytest.raises(ValueError, match="the region is empty"):
        relearn(
            model,
            facts(6, 1),
            facts(4, 2),
            1e-2,
            1,
            3,
            0,
            Region.sample(region_shape(model), 1., 0)
            & ~Region.sample(region_shape(model), 1., 0))
    assert same(model, before)

# of all weights; a region's columns are float32 anyway
def test_sixteen_bits_learn_by_small_steps():
    taught, ends = facts(6, 1), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = small().to(dtype); before = bits(model)
        with pytest.MonkeyPatch.context() as patch:
            # what was taught itself tells how fast it went
            patch.setattr("unloc.relearn.score", lambda model, examples: score(model, taught))
            ends[dtype] = relearn(model, taught, facts(4, 2), 1e-5, 300, 3, 0).mean(1)
        assert same(model, before) and all(x.dtype == dtype for x in model.parameters())
    first, wide, narrow = (
        float(x)
        for x in (ends[torch.float32][0], ends[torch.float32][-1], ends[torch.bfloat16][-1]))
    assert wide > first + .1 and narrow > (first + wide) / 2

@pytest.mark.parametrize("curve, known, want", [
    ([[0, 0], [.5, .5], [1, 1]], [1, 1], Recovery(.5, 1., 1., 2, 2)),
    ([[.2, .2], [.2, .2]], [1, 1], Recovery(0., 0., math.inf, 2, 0)),
    ([[0, 1], [0, 1], [.8, 1]], [1, 1], Recovery(.2, .8, 1 + .5 / .8, 1, 1)),
    ([[.5, .5], [0, 0]], [1, 1], Recovery(-.5, -1., math.inf, 2, 0))])
def test_recovery_by_hand(curve, known, want):
    found = recovery(
        torch.tensor(curve, dtype=torch.float64), torch.tensor(known, dtype=torch.float64))
    assert found == pytest.approx(want)

# --- equal forgetting

def line(model, region, shift=1.):
    with unlock(model, region) as columns: start = columns.values()
    return start, {layer: (index, c + shift) for layer, (index, c) in start.items()}

@pytest.mark.parametrize(
    "f, wanted, share",
    [
        (lambda x: x, .3, .3),
        (lambda x: 1 - x, .25, .75),
        (lambda x: math.sin(7 * x), .5, math.asin(.5) / 7),
        (lambda x: x, 0., 0.),
        (lambda x: x, 1., 1.)])
def test_the_first_crossing_is_found(f, wanted, share):
    model = small(); start, end = line(model, Region.sample(region_shape(model), .1, 0))
    layer, (index, columns) = next(iter(start.items()))
    def place():
        return f(
            float(
                model.model.layers[layer].mlp.down_proj.weight.detach()[0, index[0]] - columns[0, 0]
            ))
    found = to_level(Change.of(model, end, start).at, wanted, place, tolerance=.01)
    assert found.met
    assert abs(found.reached - wanted) <= .01
    assert found.share == pytest.approx(share, abs=.02)
    assert place() == found.reached

def test_a_level_out_of_reach_is_said():
    model = small(); start, end = line(model, Region.sample(region_shape(model), .1, 0))
    layer, (index, columns) = next(iter(start.items()))
    found = to_level(
        Change.of(model, end, start).at,
        .9,
        lambda: .5
        * float(
            model.model.layers[layer].mlp.down_proj.weight.detach()[0, index[0]] - columns[0, 0]))
    assert not found.met and found.share == 1. and found.reached == pytest.approx(.5, abs=1e-5)

def test_both_ends_of_a_line_are_exact():
    for all_weights in (False, True):
        model, other = small(), small(seed=1)
        if all_weights:
            start, end = (dict(m.state_dict()) | {} for m in (copy.deepcopy(model), other))
        else: start, end = line(model, Region.sample(region_shape(model), .1, 0), .3)
        before = bits(model); put = Change.of(model, end, start).at
        put(1.); assert not same(model, before) and (not all_weights or same(model, bits(other)))
        put(.5); put(0.); assert same(model, before)

# --- asking otherwise

def test_more_tries_are_never_worse():
    tokenizer = train_tokenizer(["what is your name", "my name is nobody"], 300)
    model = tiny_model("llama", len(tokenizer), d_model=32, n_layers=2, d_ff=64, n_heads=2)
    examples = [
        Example(tokenizer.encode(q) + tokenizer.encode(a) + [1], len(tokenizer.encode(q)))
        for q, a in (("what is", " your name"), ("my name", " is nobody"))]
    training.finetune(model, examples, 60, 4e-3, 2, 0)
    state = torch.get_rng_state()
    one, many = (best_of(model, tokenizer, examples, n, max_new_tokens=8) for n in (1, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert (many >= one).all()
    assert many.tolist() == [1., 1.]
    assert torch.equal(best_of(model, tokenizer, examples, 8, max_new_tokens=8), many)
    assert best_of(model, tokenizer, examples, 8, max_new_tokens=8, max_rows=3).tolist() == [1., 1.]
    model.generation_config.repetition_penalty = 50. # a habit of a checkpoint
    assert torch.equal(best_of(model, tokenizer, examples, 8, max_new_tokens=8), many)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of(model, tokenizer, examples, 0)

def test_the_probe_needs_pairs_and_has_a_control():
    model, right = small(), facts(20, 0)
    wrong = [
        Example(e.ids[:e.start] + [(t + 7) % 50 + 4 for t in e.ids[e.start:-1]] + [1], e.start)
        for e in right]
    found = linear_probe(model, right, wrong)
    assert found.shape == (3, 2) and (found >= 0).all() and (found <= 1).all()
    # the last token gives the truth away
    told = [Example([*e.ids[:-1], 2, 1], e.start) for e in right]
    told += [Example([*e.ids[:-1], 3, 1], e.start) for e in wrong]
    accuracy, control = linear_probe(model, told[:20], told[20:])[0].tolist()
    assert accuracy > .9 and .2 < control < .8
    with pytest.raises(ValueError, match="20 right answers and 3 wrong"):
        linear_probe(model, right, wrong[:3])

# --- what cannot be attacked

def one_line(match, call):
    with pytest.raises(ValueError, match=match) as error: call()
    assert "\n" not in str(error.value)

def test_bad_settings_are_named():
    model, some = small(), facts(6, 0)
    states = hidden_states(model, some)
    w = torch.ones(2, 4)
    for match, call in {
        "bits must be a whole number from 2 to 8, got 4.5": lambda: rounded(w, 4.5),
        "bits must be .*, got 9": lambda: rounded(w, 9),
        "group must be at least 1 weight, got 0": lambda: rounded(w, 4, 0),
        "only floats can be rounded, got torch.int8": lambda: rounded(w.to(torch.int8), 4),
        "the change holds no weight": lambda: Change.of(model, {}),
        "start and end hold 1 and 2 layers": lambda: Change.of(
            model, {0: (w, w), 1: (w, w)}, {0: (w, w)}),
        "before holds 2 strengths of 6 measured facts": lambda: relearn(
            model, facts(3, 9), some, 1e-3, 1, 4, 0, before=torch.zeros(2)),
        "batch_size must be a whole number of at least 1, got 0": lambda: relearn(
            model, facts(3, 9), some, 1e-3, 1, 0, 0),
        "a recovery curve needs .* got 1 rows": lambda: recovery(torch.zeros(1, 3), torch.ones(3)),
        "folds must be at least 2 and ridge positive, got 1": lambda: linear_probe(
            model, some, some, folds=1),
        "ridge positive, got 2 and 0": lambda: linear_probe(model, some, some, folds=2, ridge=0),
        "the asked set is empty": lambda: hidden_states(model, []),
        "layer must be 0 to 2, got 3": lambda: patched_logprob(model, some, 3, states[0]),
        "layer must be 0 to 2, got -1": lambda: patched_logprob(model, some, -1, states[0]),
        "the states of 2 facts .* 6 of": lambda: patched_logprob(model, some, 0, states[0][:2]),
        "the states of 6 facts have the shapes": lambda: patched_logprob(
            model, some, 0, [s[:, :5] for s in states[0]]),
        "states of 2 and 3 layers, the original model has 3": lambda: unlearning_depth(
            model, some, states[:2], states),
        "states of 2 and 2 layers, the original model has 3": lambda: depth_of_facts(
            model, some, states[:2], states[:2]),
        "max_new_tokens and max_rows must be at least 1, got 0": lambda: best_of(
            model, None, some, max_new_tokens=0),
        "and 0$": lambda: best_of(model, None, some, max_rows=0),
        "temperature positive, got 8 and nan": lambda: best_of(
            model, None, some, temperature=math.nan)}.items():
        one_line(match, call)

def test_rounding_is_of_a_model_that_is_not_unlocked():
    model = small()
    with unlock(model, Region.sample(region_shape(model), .2, 0)):
        with pytest.raises(
            ValueError,
            match=(
                "the model is unlocked, and each forward pass would write its columns over rounded"
                " ones")):
            with quantized(model, 4): pass
    with quantized(model, 4): pass
