"""Every architecture is scored, unlocked, trained, saved and reloaded as transformers' own
untouched model says it should be, and an unknown one joins with one line."""
import copy
import pytest, torch, transformers
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from unloc.decoding import greedy
from unloc.experts import in_experts
from unloc.locked import locked_digest
from unloc.logits import answer_logits, hidden_after, logits_of, mask_limit, mlp_outputs
from unloc.masked import put_columns, unlock
from unloc.methods.activations import activations
from unloc.methods.fisher import fisher
from unloc.methods.gradient import gradient
from unloc.methods.integrated_gradients import integrated_gradients
from unloc.methods.wagle import wagle_weights
from unloc.methods.weight_norm import weight_norm
from unloc.models import PROJECTIONS, output_projections, region_shape, value_vectors
from unloc.regions import Region
from unloc.scoring import score
from unloc.tokens import Example, collate

# 32 value vectors a layer everywhere: experts are four of eight
VOCAB, D, FF, WINDOW = 60, 16, 32, 64
WIDTHS = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=2)
SPECIAL = dict(
    vocab_size=VOCAB, pad_token_id=0, bos_token_id=None, eos_token_id=1, max_position_embeddings=64)
GATED = WIDTHS | SPECIAL | dict(num_key_value_heads=1, intermediate_size=FF)
SLIDING = GATED | dict(layer_types=["sliding_attention", "full_attention"])
TEXT = SLIDING | dict(head_dim=8, query_pre_attn_scalar=8)
MIXTURE = GATED | dict(intermediate_size=FF // 4, num_experts_per_tok=2)
VISION = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14,
    patch_size=14)
DOWN, EXPERTS = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.experts.down_proj"
BUILD = { # class, configuration with and without a window, name of layer {}'s output projection
    "llama": ("Llama", lambda w: GATED, DOWN),
    "olmo2": ("Olmo2", lambda w: GATED, DOWN),
    "olmo3": ("Olmo3", lambda w: SLIDING | dict(sliding_window=w), DOWN),
    "qwen2": ("Qwen2", lambda w: SLIDING | dict(sliding_window=w, use_sliding_window=True), DOWN),
    "qwen3": ("Qwen3", lambda w: GATED | dict(head_dim=8), DOWN),
    "mistral": ("Mistral", lambda w: GATED | dict(sliding_window=w), DOWN),
    "phi3": ("Phi3", lambda w: GATED | dict(sliding_window=w), DOWN),
    "gemma2": (
        "Gemma2",
        lambda w: TEXT
        | dict(sliding_window=w, final_logit_softcapping=2., attn_logit_softcapping=5.),
        DOWN),
    "gemma3_text": (
        "Gemma3",
        lambda w: TEXT | dict(sliding_window=w, final_logit_softcapping=2.),
        DOWN),
    "gemma3": (
        "Gemma3",
        lambda w: dict(
            text_config=TEXT | dict(sliding_window=w, model_type="gemma3_text"),
            vision_config=VISION,
            mm_tokens_per_image=1,
            image_token_index=59,
            boi_token_index=57,
            eoi_token_index=58,
            pad_token_id=0,
            eos_token_id=1),
        "model.language_model.layers.{}.mlp.down_proj.weight"),
    "gpt_neox": (
        "GPTNeoX",
        lambda w: WIDTHS
        | SPECIAL
        | dict(intermediate_size=FF, attention_dropout=.1, hidden_dropout=.1),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
    "gpt2": (
        "GPT2",
        lambda w: SPECIAL | dict(n_embd=D, n_layer=2, n_head=2, n_inner=FF),
        "transformer.h.{}.mlp.c_proj.weight"),
    "opt": (
        "OPT",
        lambda w: WIDTHS | SPECIAL | dict(ffn_dim=FF, word_embed_proj_dim=8),
        "model.decoder.layers.{}.fc2.weight"),
    "olmoe": ("Olmoe", lambda w: MIXTURE | dict(num_experts=4), EXPERTS),
    "mixtral": (
        "Mixtral",
        lambda w: MIXTURE | dict(num_local_experts=4, sliding_window=w),
        EXPERTS),
    "qwen3_moe": (
        "Qwen3Moe",
        lambda w: MIXTURE
        | dict(num_experts=4, moe_intermediate_size=FF // 4, head_dim=8, norm_topk_prob=True),
        EXPERTS),
    "gptj": (
        "GPTJ",
        lambda w: SPECIAL | dict(n_embd=D, n_layer=2, n_head=2, n_inner=FF, rotary_dim=4),
        "transformer.h.{}.mlp.fc_out.weight"),
    "phi": (
        "Phi",
        lambda w: GATED | dict(partial_rotary_factor=.5),
        "model.layers.{}.mlp.fc2.weight"),
    "gemma": ("Gemma", lambda w: GATED | dict(head_dim=8), DOWN),
    "olmo": ("Olmo", lambda w: GATED | dict(clip_qkv=8.), DOWN),
    "granite": (
        "Granite",
        lambda w: GATED
        | dict(
            logits_scaling=6., embedding_multiplier=3., residual_multiplier=.5,
            attention_multiplier=.3),
        DOWN),
    "cohere": ("Cohere", lambda w: GATED | dict(logit_scale=.3), DOWN),
    "cohere2": ("Cohere2", lambda w: SLIDING | dict(sliding_window=w, logit_scale=.3), DOWN),
    "stablelm": ("StableLm", lambda w: GATED, DOWN),
    "smollm3": ("SmolLM3", lambda w: GATED | dict(no_rope_layers=[1, 0]), DOWN),
    "glm": ("Glm", lambda w: GATED | dict(head_dim=8), DOWN),
    "glm4": ("Glm4", lambda w: GATED | dict(head_dim=8), DOWN),
    "nemotron": ("Nemotron", lambda w: GATED, DOWN),
    "exaone4": ("Exaone4", lambda w: SLIDING | dict(sliding_window=w), DOWN),
    "arcee": ("Arcee", lambda w: GATED, DOWN),
    "helium": ("Helium", lambda w: GATED | dict(head_dim=8), DOWN),
    "seed_oss": ("SeedOss", lambda w: GATED | dict(head_dim=8), DOWN),
    "ernie4_5": ("Ernie4_5", lambda w: GATED | dict(head_dim=8), DOWN),
    "hunyuan_v1_dense": ("HunYuanDenseV1", lambda w: GATED | dict(head_dim=8), DOWN),
    "ministral": ("Ministral", lambda w: SLIDING | dict(sliding_window=w, head_dim=8), DOWN),
    "ministral3": ("Ministral3", lambda w: GATED | dict(head_dim=8, sliding_window=w), DOWN),
    "apertus": ("Apertus", lambda w: GATED, DOWN),
    "starcoder2": (
        "Starcoder2",
        lambda w: GATED | dict(sliding_window=w),
        "model.layers.{}.mlp.c_proj.weight"),
    "gpt_neo": (
        "GPTNeo",
        lambda w: SPECIAL
        | dict(
            hidden_size=D,
            num_layers=2,
            num_heads=2,
            intermediate_size=FF,
            attention_types=[[["global", "local"], 1]],
            window_size=w),
        "transformer.h.{}.mlp.c_proj.weight"),
    "gpt_bigcode": (
        "GPTBigCode",
        lambda w: SPECIAL | dict(n_embd=D, n_layer=2, n_head=2, n_inner=FF),
        "transformer.h.{}.mlp.c_proj.weight"),
    "codegen": (
        "CodeGen",
        lambda w: SPECIAL | dict(n_embd=D * 2, n_layer=2, n_head=4, n_inner=FF, rotary_dim=4),
        "transformer.h.{}.mlp.fc_out.weight"),
    "persimmon": (
        "Persimmon",
        lambda w: WIDTHS | SPECIAL | dict(intermediate_size=FF),
        "model.layers.{}.mlp.dense_4h_to_h.weight")} # the one that is registered here
KNOWN = [name for name in BUILD if name != "persimmon"]
NAMES = pytest.mark.parametrize("name", BUILD)
# one of each: bent logits, transposed weight, flattened tokens, experts
KINDS = "gemma2", "gpt2", "opt", "olmoe"
SOME = pytest.mark.parametrize("name", KINDS)
REGION = {
    "columns": lambda ff: Region.sample((2, ff), .3, seed=0),
    "weights": lambda ff: Region.sample((2, D, ff), .1, seed=0)}
UNITS = pytest.mark.parametrize("unit", REGION)
GRID = pytest.mark.parametrize(
    "name, unit",
    [(name, unit) for name in BUILD for unit in REGION if unit == "columns" or name in KINDS])


@pytest.fixture(autouse=True)
def registered(monkeypatch): # one line
    monkeypatch.setitem(
        PROJECTIONS,
        "persimmon",
        lambda model: [block.mlp.dense_4h_to_h for block in model.model.layers])

def facts(n, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, k=1: torch.randint(low, high, (k,), generator=g).tolist()
    return [Example(draw(2, 57, (p := draw(1, 5)[0]) + draw(1, 6)[0]) + [1], p) for _ in range(n)]

FORGET, RETAIN = facts(5, 0), facts(3, 1)
BATCH = collate(FORGET)

def build(name, dtype=torch.float32, window=WINDOW, **more):
    prefix, settings, _ = BUILD[name]
    config = getattr(transformers, prefix + ("TextConfig" if name == "gemma3_text" else "Config"))(
        **settings(window) | more)
    config._experts_implementation = "eager" # transformers' default has no float64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad(): # sharper than a fresh model, and no bias or norm at its neutral value
        for p in model.parameters():
            p.copy_(
                p * 0
                + torch.randn(p.shape, generator=g, dtype=torch.float64)
                * (.3 if p.ndim > 1 else .1)
                + (p.ndim == 1 and float(p.mean()) > .5))
    assert model.config.model_type == name
    return model

def place(name, layer): return BUILD[name][2].format(layer)
def vectors(name, t): # a stored weight, or its gradient -> [d_model, d_ff], a copy for experts
    return t.T if name == "gpt2" else t.transpose(0, 1).flatten(1) if t.ndim == 3 else t
def slack(name): # these take their softmax in float32 in a float64 model, too
    return 2e-6 if name in ("gemma2", "gpt_neox", "gptj", "gpt_neo", "codegen") else 1e-12
def weights(name, model):
    return [
        vectors(name, dict(model.named_parameters())[place(name, layer)]).detach().clone()
        for layer in range(2)]
def nll(model, e):
    return F.cross_entropy(
        model(input_ids=torch.tensor([e.ids], device=model.device))
        .logits[0, e.start - 1:-1]
        .to(torch.promote_types(model.dtype, torch.float32)),
        torch.tensor(e.ids[e.start:], device=model.device))
def mean(xs): return sum(xs) / len(xs)

def gradients(name, model, e): # by autograd, of transformers' own model
    model.zero_grad()
    nll(model, e).backward()
    return torch.stack(
        [
            vectors(name, dict(model.named_parameters())[place(name, layer)].grad)
            for layer in range(2)])

def coefficients(name, model, e): # [2, n_answer, d_ff], seen inside transformers' own model
    found, hooks = [], []
    def see(module, inputs): found.append(inputs[0].view(len(e.ids), -1))
    def route(mixture, inputs):
        x = inputs[0][0]
        weight, chosen = mixture.gate(x)[1:]
        h = x.new_zeros(len(x), 4, FF // 4)
        for t in range(len(x)):
            for w, i in zip(weight[t], chosen[t]):
                gate, up = (mixture.experts.gate_up_proj[i] @ x[t]).chunk(2)
                h[t, i] = w * mixture.experts.act_fn(gate) * up
        found.append(h.flatten(1))
    for layer in range(2):
        module, hook = (
            (place(name, layer).removesuffix(".experts.down_proj"), route)
            if "experts" in place(name, 0)
            else (place(name, layer).removesuffix(".weight"), see))
        hooks.append(model.get_submodule(module).register_forward_pre_hook(hook))
    with torch.no_grad(): model(input_ids=torch.tensor([e.ids]))
    for h in hooks: h.remove()
    return torch.stack(found)[:, e.start - 1:-1]

def close(got, want, rtol=3e-7, atol=1e-12): # float32 rounds by 6e-8
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)
def bits(t): return t.detach().contiguous().flatten().view(torch.uint8)
def same(a, b):
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(bits(a[n]), bits(b[n]))
        for n in a)
def state(model):
    return {
        n: t.clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}

# --- finding

@NAMES
def test_the_finder_shows_the_weights_and_changes_none(name):
    model, plain = build(name, torch.float64, window=5), build(name, torch.float64, window=5)
    found = [value_vectors(p) for p in output_projections(model)]
    assert region_shape(model) == (2, FF)
    assert same(state(model), state(plain))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for layer, values in enumerate(found):
        parameter = dict(model.named_parameters())[place(name, layer)]
        assert torch.equal(values, weights(name, plain)[layer])
        assert values.data_ptr() == parameter.data_ptr()
        assert values.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    got, want = (m(input_ids=BATCH.ids).logits for m in (model, plain))
    (
        close(got, want, rtol=0)
        if "experts" in place(name, 0)
        else torch.testing.assert_close(got, want, rtol=0, atol=0))
    with torch.no_grad(): found[1][3, 5] += 1 # a write to the view is a write to the model
    assert not torch.equal(weights(name, model)[1], weights(name, plain)[1])
    assert [value_vectors(p).data_ptr() for p in output_projections(model)] == [
        v.data_ptr() for v in found]

@NAMES
def test_what_is_read_is_what_transformers_says(
    name
): # a window of five tokens: most facts are longer
    model, plain = build(name, torch.float64, window=5), build(name, torch.float64, window=5)
    rows = [plain(input_ids=torch.tensor([e.ids]), output_hidden_states=True) for e in FORGET]
    close(
        answer_logits(model, BATCH),
        torch.cat([r.logits[0, e.start - 1:-1] for r, e in zip(rows, FORGET)]),
        atol=10 * slack(name))
    for e, row in zip(FORGET, rows):
        alone, states = collate([e]), row.hidden_states
        close(hidden_after(model, alone, 0), states[1], rtol=0, atol=slack(name))
        last = [] # transformers gives the last one normed
        handle = plain.get_submodule(place(name, 1).split(".1.")[0] + ".1").register_forward_hook(
            lambda m, x, y: last.append(y[0] if isinstance(y, tuple) else y))
        plain(input_ids=alone.ids); handle.remove()
        close(hidden_after(model, alone, 1), last[0], rtol=0, atol=slack(name))
    read = [torch.stack(mlp_outputs(model, collate([e]))) for e in FORGET]
    close(torch.stack(mlp_outputs(model, BATCH)), torch.cat(read, 1), rtol=0, atol=slack(name))
    bias = [getattr(p, "bias", None) for p in output_projections(model)]
    for e, found in zip(FORGET, read):
        h = coefficients(name, plain, e)
        close(
            found,
            torch.stack(
                [
                    h[i] @ v.T + (0 if bias[i] is None else bias[i])
                    for i, v in enumerate(weights(name, plain))]),
            atol=slack(name))

@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_bent_in_float32(name, dtype):
    model = build(name, dtype)
    hidden = model.base_model(input_ids=BATCH.ids).last_hidden_state
    cap = getattr(model.config, "final_logit_softcapping", None)
    plain = model.lm_head(hidden).float()
    got = logits_of(model, hidden)
    assert got.dtype == torch.float32
    assert torch.equal(got, plain if cap is None else torch.tanh(plain / cap) * cap)
    if dtype == torch.float32: assert torch.equal(got, model(input_ids=BATCH.ids).logits)

# --- scoring

@NAMES
def test_scores_are_those_of_plain_autograd(name):
    model, plain = build(name, torch.float64, window=5), build(name, torch.float64, window=5)
    values = torch.stack(weights(name, plain))
    close(
        activations(model, FORGET),
        mean([coefficients(name, plain, e).mean(1).abs() for e in FORGET]) * values.norm(dim=1),
        atol=slack(name))
    each = {
        "forget": [gradients(name, plain, e) for e in FORGET],
        "retain": [gradients(name, plain, e) for e in RETAIN]}
    for max_tokens in (4096, 12):
        close(
            gradient(model, FORGET, max_tokens=max_tokens),
            mean(each["forget"]).abs().sum(1),
            atol=slack(name))
    close(
        fisher(model, FORGET),
        mean([g.square().sum(1) for g in each["forget"]]),
        atol=max(1e-9, slack(name)))
    close(
        torch.stack(wagle_weights(model, FORGET, RETAIN, .5)),
        ((values - mean(each["retain"]) / .5) * mean(each["forget"])).abs(),
        atol=max(1e-9, slack(name)))
    assert all(p.grad is None for p in model.parameters())

def plain_path(
    name, model, e, layer, steps=3
): # integrated gradients on truncated inputs, by transformers' own module where it is one
    projection, total = output_projections(model)[layer], 0
    for t in range(e.start - 1, len(e.ids) - 1):
        for alpha in torch.linspace(0, 1, steps, dtype=torch.float64):
            kept = []
            def patch(module, x):
                kept[:] = (
                    x[0][..., -1:, :].detach(),
                    (alpha * x[0][..., -1:, :].detach()).requires_grad_())
                return torch.cat([x[0][..., :-1, :], kept[1]], -2),
            hook = projection.register_forward_pre_hook(patch)
            p = (
                model(input_ids=torch.tensor([e.ids[:t + 1]]))
                .logits[0, -1]
                .softmax(0)[e.ids[t + 1]])
            total = total + (kept[0] * torch.autograd.grad(p, kept[1])[0]).flatten() / steps
            hook.remove()
    return total / (len(e.ids) - e.start)

@NAMES
def test_integrated_gradients_give_each_probe_its_own_positions_and_mask(name):
    model = build(name, torch.float64)
    close(
        integrated_gradients(model, [e := Example([7, 5, 9, 8, 1], 2)], steps=3),
        torch.stack([plain_path(name, model, e, layer) for layer in range(2)]),
        rtol=1e-6,
        atol=max(1e-10, slack(name)))

@pytest.mark.parametrize(
    "name, limit",
    [
        ("llama", float("inf")), ("gpt2", float("inf")), ("mistral", 5), ("olmo3", 5),
        ("gemma3", 5), ("qwen2", 5)])
def test_a_mask_of_ones_own_knows_its_limit(name, limit):
    model = build(name, window=5)
    assert mask_limit(model) == limit
    assert mask_limit(build("qwen2", window=5, use_sliding_window=False)) == float("inf")
    if limit == 5:
        with pytest.raises(
            ValueError,
            match=(
                "a fact of 9 tokens is longer than the 5 the model's sliding window looks back on"),
        ):
            integrated_gradients(model, [Example(list(range(2, 11)), 3)])
    assert integrated_gradients(model, [Example([5, 6, 7, 8, 1], 3)]).isfinite().all()

@NAMES
def test_evaluation_knows_every_architecture(
    name
): # right and wrong answers packed behind their question, and greedy decoding from padded rows
    model, plain = build(name, torch.float64, window=5), build(name, torch.float64, window=5)
    asked = [
        Example(p + a + [1], len(p))
        for p in ([7, 8], [9, 4, 5, 6, 7, 12])
        for a in ([5, 6, 9], [11, 12, 13, 14], [5])]
    close(
        score(model, asked).nll,
        torch.stack([nll(plain, e) for e in asked]).detach(),
        atol=slack(name))
    prompts, plain = [e.ids[:e.start] for e in asked[::3]], build(name, window=5)
    def continued(ids, n):
        new = []
        while (
            len(new) < n
            and (t := int(plain(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())) != 1):
            new.append(t)
        return new
    with torch.no_grad():
        # float32: a float64 mask overflows in Gemma 2's float32 softmax
        assert greedy(build(name, window=5), prompts, [4, 4], end=1) == [
            continued(ids, 4) for ids in prompts]

# --- training

def steps(model, columns, n=2):
    optimizer = torch.optim.AdamW(columns.parameters(), lr=1e-2, weight_decay=.5)
    for _ in range(n):
        mean([nll(model, e) for e in FORGET[:2]]).backward()
        nn.utils.clip_grad_norm_(columns.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad()

@GRID
def test_train_save_reload(name, unit, tmp_path, dtype=torch.float32):
    model, plain, region = build(name, dtype), build(name, dtype), REGION[unit](FF)
    before, first = state(plain), weights(name, plain)
    output_projections(model) # experts compute in another order from here on
    with torch.no_grad(): start = model(input_ids=BATCH.ids).logits
    digest = locked_digest(model, region)
    with unlock(model, region) as columns:
        steps(model, columns)
        with torch.no_grad(): trained = model(input_ids=BATCH.ids).logits
        with columns.reference():
            assert torch.equal(
                bits(model(input_ids=BATCH.ids).logits), bits(start)), "the old model"
        values = columns.values()
    assert locked_digest(model, region) == digest and not torch.equal(start, trained)
    with torch.no_grad(): assert torch.equal(bits(model(input_ids=BATCH.ids).logits), bits(trained))
    after = state(model)
    assert [n for n in before if not torch.equal(bits(before[n]), bits(after[n]))] == [
        place(name, layer) for layer in range(2)]
    assert list(before) == list(after)
    for layer, (old, new) in enumerate(zip(first, weights(name, model))):
        mask = region.mask[layer].expand(old.shape)
        assert torch.equal(bits(old[~mask]), bits(new[~mask]))
        assert (old != new)[mask].float().mean() > (.99 if dtype == torch.float32 else .6)
    put_columns(plain, values)
    assert same(state(plain), after)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model) and same(state(again), after) and not again.training
    with torch.no_grad():
        (
            torch.testing.assert_close(
                again(input_ids=BATCH.ids).logits, trained, rtol=1e-4, atol=1e-4)
            if dtype == torch.float32
            else None)
    output_projections(again)
    with torch.no_grad():
        assert torch.equal(
            bits(again(input_ids=BATCH.ids).logits), bits(trained)), "the very same model"

@UNITS
@SOME
def test_train_save_reload_in_bfloat16(name, unit, tmp_path):
    test_train_save_reload(name, unit, tmp_path, torch.bfloat16)

@GRID
def test_the_gradient_is_autograds(name, unit):
    model, plain, region = build(name, torch.float64), build(name, torch.float64), REGION[unit](FF)
    want = sum(gradients(name, plain, e) for e in FORGET[:3])
    with unlock(model, region) as columns:
        for e in FORGET[:3]: nll(model, e).backward()
        for p, index, g in zip(columns.parameters(), region.index, want):
            torch.testing.assert_close(
                p.grad,
                g[:, index].T if unit == "columns" else g.flatten()[index],
                rtol=1e-12,
                atol=1e-13)

@UNITS
@SOME
def test_the_trajectory_is_that_of_masked_full_weights(name, unit):
    model, plain, region = build(name, torch.float64), build(name, torch.float64), REGION[unit](FF)
    own = [dict(plain.named_parameters())[place(name, layer)] for layer in range(2)]
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.)
    for _ in range(4):
        plain.zero_grad()
        mean([nll(plain, e) for e in FORGET[:2]]).backward()
        for p, mask in zip(own, region.mask):
            mask = mask.expand(D, FF) # as value vectors lie; back to the way the weight lies
            p.grad *= (
                mask.T
                if name == "gpt2"
                else mask.view(D, 4, -1).transpose(0, 1) if p.ndim == 3 else mask)
        nn.utils.clip_grad_norm_(own, 1.)
        optimizer.step()
    with unlock(model, region) as columns:
        optimizer = torch.optim.AdamW(columns.parameters(), lr=1e-2, weight_decay=0.)
        for _ in range(4):
            mean([nll(model, e) for e in FORGET[:2]]).backward()
            nn.utils.clip_grad_norm_(columns.parameters(), 1.)
            optimizer.step(); optimizer.zero_grad()
    for got, want in zip(weights(name, model), weights(name, plain)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@UNITS
@SOME
def test_a_gpu_trains_the_same(name, unit):
    found = []
    # in float32 Adam makes whole steps of what rounding leaves
    for model in (build(name, torch.float64), build(name, torch.float64).cuda()):
        digest = locked_digest(model, REGION[unit](FF))
        with unlock(model, REGION[unit](FF)) as columns:
            steps(model, columns)
            found.append([values.cpu() for _, values in columns.values().values()])
        assert locked_digest(model, REGION[unit](FF)) == digest
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_dropout_sleeps(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    # with 10 % dropout in their configuration, and in evaluation mode
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    for model in (a, b):
        with unlock(model, REGION["columns"](FF)) as columns: steps(model, columns)
    assert same(state(a), state(b))
    a.train()
    assert not torch.equal(
        a(input_ids=BATCH.ids).logits, b(input_ids=BATCH.ids).logits), "dropout is there"
    for score_of in (activations, gradient):
        assert torch.equal(score_of(a, FORGET), score_of(b, FORGET))

# --- experts

@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_experts_live_as_any_module(name):
    model = build(name)
    output_projections(model)
    before, start = state(model), model(input_ids=BATCH.ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad(): value_vectors(output_projections(other)[0])[:, 3] += 1
    assert same(state(model), before)
    assert torch.equal(model(input_ids=BATCH.ids).logits, start)
    assert not torch.equal(other(input_ids=BATCH.ids).logits, start)
    other.load_state_dict(before, assign=True) # in transformers' order of memory again
    assert torch.equal(other(input_ids=BATCH.ids).logits, start)
    assert (
        value_vectors(output_projections(other)[0]).data_ptr()
        == other.get_parameter(place(name, 0)).data_ptr())
    assert same(state(other), before)
    model.double()
    view = value_vectors(output_projections(model)[1])
    assert view.dtype == torch.float64
    assert view.data_ptr() == model.get_parameter(place(name, 1)).data_ptr()
    assert view.is_contiguous()
    model.train().requires_grad_(True)
    nll(model, FORGET[0]).backward() # all weights train as before
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

def test_an_expert_nobody_asks_gets_no_gradient():
    model, plain = (build("olmoe", torch.float64, num_experts_per_tok=1) for _ in range(2))
    for m in (model, plain):
        with torch.no_grad():
            m.model.layers[0].mlp.gate.weight[1] = -m.model.layers[0].mlp.gate.weight[0]
            m.model.layers[0].mlp.gate.weight[2:] = 0 # one of the first two is above zero
    used = torch.stack([coefficients("olmoe", plain, e)[0].abs().sum(0) for e in FORGET]).sum(0) > 0
    assert used.view(4, -1).any(1).tolist() == [True, True, False, False]
    assert torch.equal(gradient(model, FORGET)[0] > 0, used)

def test_experts_of_another_layout_are_refused(monkeypatch):
    config = transformers.GptOssConfig(
        **GATED
        | dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            layer_types=["full_attention"] * 2))
    model = transformers.GptOssForCausalLM(config)
    monkeypatch.setitem(PROJECTIONS, "gpt_oss", in_experts("model.layers", "mlp"))
    with pytest.raises(
        ValueError,
        match=(
            r"a GptOssExperts is not laid out as .* without biases \(is_concatenated,"
            r" is_transposed, has_bias\)")) as error:
        region_shape(model)
    assert "\n" not in str(error.value)
    mixed = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**BUILD["qwen3_moe"][1](8) | dict(mlp_only_layers=[1])))
    with pytest.raises(
        ValueError,
        match=(
            "layer 1 of this Qwen3MoeForCausalLM is dense, a Qwen3MoeMLP without experts, .*; a"
            " region needs layers of one kind")):
        region_shape(mixed)

# --- at the door

DOORS = [
    lambda m: region_shape(m),
    lambda m: weight_norm(m),
    lambda m: gradient(m, FORGET),
    lambda m: locked_digest(m, REGION["columns"](FF)),
    lambda m: unlock(m, REGION["columns"](FF)).__enter__()]

def refused(model, says, doors=DOORS):
    flags = [p.requires_grad for p in model.parameters()]
    for door in doors:
        with pytest.raises(ValueError, match=says) as error: door(model)
        assert "\n" not in str(error.value)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())

def test_an_unknown_architecture_says_how_to_register_a_finder(monkeypatch):
    monkeypatch.delitem(PROJECTIONS, "persimmon")
    refused(
        build("persimmon"),
        r"no output projection is known for architecture 'persimmon'; known: llama, .*; register a"
        r" finder: unloc.models.PROJECTIONS\['persimmon'\] = lambda model: \[the output projection"
        r" of each layer\]$")
    assert set(PROJECTIONS) == set(KNOWN)

@pytest.mark.parametrize(
    "finder",
    [
        lambda model: [b.mlp.dense_h_to_4h for b in model.model.layers],
        lambda model: [nn.Linear(D, FF) for _ in range(2)]])
def test_a_finder_of_the_wrong_module_is_told(finder, monkeypatch):
    monkeypatch.setitem(PROJECTIONS, "persimmon", finder)
    refused(
        build("persimmon"),
        r"writes to the residual stream, 16 wide in this model; the one found is \[d_model, d_ff\]"
        r" \[32, 16\]; correct the finder of 'persimmon'")

class Packed(torch.Tensor):
    "A tensor that is not what it says it is, as quantization libraries make them"

@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: torch.zeros(192, 1, dtype=torch.uint8),
            (
                r"a Parameter of torch.uint8 \[192, 1\]; a quantized checkpoint has to be loaded in"
                r" bfloat16 or float32")),
        (lambda: torch.zeros(16, 32, dtype=torch.int8), r"torch.int8 \[16, 32\]"),
        (lambda: torch.zeros(16, 32, dtype=torch.int32), r"torch.int32"),
        (lambda: torch.zeros(16, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda: torch.zeros(16, 32).as_subclass(Packed), "a Packed of torch.float32"),
        (lambda: None, "a Linear has no weight")],
    ids=["4-bit", "8-bit", "integer", "8-bit float", "subclass", "none"])
def test_quantized_weights_are_refused(make, says):
    model = build("llama")
    values, down = make(), model.model.layers[1].mlp.down_proj
    del down.weight
    if type(values) is torch.Tensor: down.weight = nn.Parameter(values, requires_grad=False)
    elif values is not None: down.__dict__["weight"] = values
    refused(model, says)

def test_layers_of_unequal_width_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(20, D)
    refused(
        model,
        r"the value vectors of layer 0 are \[d_model, d_ff\] \[16, 32\], those of layer 1 \[16,"
        r" 20\]")
    # transposed beside the others: the shape is what counts
    model.model.layers[1].mlp.down_proj = Conv1D(D, FF)
    assert region_shape(model) == (2, FF)

def tie_layers(m): m.transformer.h[1].mlp.c_proj = m.transformer.h[0].mlp.c_proj
def tie_weights(m): m.transformer.h[1].mlp.c_proj.weight = m.transformer.h[0].mlp.c_proj.weight
def tie_part(m): m.transformer.extra = nn.Parameter(m.transformer.h[1].mlp.c_proj.weight.data[3:5])

@pytest.mark.parametrize(
    "tie, names",
    [
        (tie_layers, "transformer.h.0.mlp.c_proj.weight and transformer.h.1.mlp.c_proj.weight"),
        (tie_weights, "transformer.h.0.mlp.c_proj.weight and transformer.h.1.mlp.c_proj.weight"),
        (tie_part, "transformer.extra and transformer.h.1.mlp.c_proj.weight")],
    ids=["one module", "one weight", "overlap"])
def test_a_tied_projection_is_refused(tie, names):
    model = build("gpt2")
    tie(model)
    layer = 1 if tie is tie_part else 0
    refused(
        model,
        f"the output projection of layer {layer} is tied: {names} share one memory, so one would"
        " change with the other",
        DOORS[3:])
    with unlock(build("gpt2"), REGION["columns"](FF)):
        pass # tied embeddings are none of its business
