"""The logits that are formed at the answers alone are those of the model itself, whatever it does
around its output layer; where that is unknown, it is refused; and the last layer of the lens is the
model."""
import pytest, torch, transformers
from torch import nn
# noqa: F401, the fixture registers the one unknown architecture
from test_architectures import BUILD, FORGET, KNOWN, build, registered
from unloc.inside import final_norm
from unloc.logits import Bend, answer_logits, bend_of, logits_of, mask_limit, over_logits
from unloc.methods.logit_lens import logit_lens
from unloc.models import PROJECTIONS, blocks_of, output_projections, tiny_model
from unloc.scoring import score
from unloc.tokens import collate

INF, BATCH = float("inf"), collate(FORGET)
SMALL = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, intermediate_size=24,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None,
    eos_token_id=1, max_position_embeddings=64)
MIXTURE = SMALL | dict(
    num_experts_per_tok=1, num_experts=2, num_local_experts=2, moe_intermediate_size=8)
NANO = SMALL | dict(num_key_value_heads=2)
BENDS = { # class, configuration, what it does
    "granite": (
        "Granite",
        SMALL | dict(logits_scaling=16., embedding_multiplier=12., residual_multiplier=.2),
        Bend(1, 1 / 16, INF)),
    "granite, odd": ("Granite", SMALL | dict(logits_scaling=6.), Bend(1, 1 / 6, INF)),
    "granitemoe": ("GraniteMoe", MIXTURE | dict(logits_scaling=8.), Bend(1, 1 / 8, INF)),
    "cohere": ("Cohere", SMALL | dict(logit_scale=.0625), Bend(1, .0625, INF)),
    "cohere2": (
        "Cohere2",
        SMALL | dict(logit_scale=.25, layer_types=["full_attention"] * 2),
        Bend(1, .25, INF)),
    "minicpm3": (
        "MiniCPM3",
        SMALL
        | dict(
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
            num_key_value_heads=2),
        None),
    "nanochat": ("NanoChat", NANO, Bend(1, 1, 15)),
    "gemma2": ("Gemma2", SMALL | dict(head_dim=8), Bend(1, 1, 30)),
    "gemma2, cap 2": (
        "Gemma2",
        SMALL | dict(head_dim=8, final_logit_softcapping=2.),
        Bend(1, 1, 2)),
    "gemma2, none": (
        "Gemma2",
        SMALL | dict(head_dim=8, final_logit_softcapping=None),
        Bend(1, 1, INF)),
    "vaultgemma": ("VaultGemma", SMALL | dict(head_dim=8), Bend(1, 1, 30)),
    "phimoe": ("Phimoe", MIXTURE, Bend(1, 1, INF)),
    "gpt_oss": ("GptOss", MIXTURE | dict(head_dim=8), Bend(1, 1, INF)),
    "qwen2_moe": ("Qwen2Moe", MIXTURE, Bend(1, 1, INF)),
    "bloom": ("Bloom", dict(vocab_size=60, hidden_size=16, n_layer=2, n_head=2), Bend(1, 1, INF)),
    "mpt": ("Mpt", dict(vocab_size=60, d_model=16, n_layers=2, n_heads=2), Bend(1, 1, INF)),
    "xglm": (
        "XGLM",
        dict(vocab_size=60, d_model=16, num_layers=2, attention_heads=2, ffn_dim=24),
        Bend(1, 1, INF))}

def made(prefix, config):
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "ForCausalLM")(
        getattr(transformers, prefix + "Config")(**config)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape) * .2)
    return model

def close(got, want, rtol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.detach().abs().max()))

@pytest.mark.parametrize("name", BENDS)
def test_logits_are_the_models_own(name):
    prefix, config, bend = BENDS[name]
    model = made(prefix, config)
    whole = model(input_ids=BATCH.ids).logits
    hidden = model.base_model(input_ids=BATCH.ids).last_hidden_state
    close(logits_of(model, hidden), whole)
    close(answer_logits(model, BATCH), whole[:, :-1][BATCH.answer[:, 1:]])
    close(
        over_logits(model, hidden[0], lambda logits: logits.logsumexp(-1)), whole[0].logsumexp(-1))
    assert bend_of(model) == (pytest.approx(bend) if bend else bend_of(model))
    assert bend or bend_of(model).before != 1

@pytest.mark.parametrize("name", KNOWN)
def test_logits_of_every_known_architecture_are_the_models_own(name):
    model = build(name)
    close(
        logits_of(model, model.base_model(input_ids=BATCH.ids).last_hidden_state),
        model(input_ids=BATCH.ids).logits)

@pytest.mark.parametrize("name", ["granite", "cohere", "minicpm3", "nanochat"])
def test_in_16_bits_they_are_bent_in_float32(name):
    model = made(*BENDS[name][:2]).bfloat16()
    hidden = model.base_model(input_ids=BATCH.ids).last_hidden_state
    got = logits_of(model, hidden)
    assert got.dtype == torch.float32
    close(got, model(input_ids=BATCH.ids).logits.float(), rtol=2e-2)

def test_finding_the_bend_uses_no_weight_and_leaves_nothing():
    with torch.device("meta"):
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**BENDS["granite"][1]))
    torch.manual_seed(0)
    before, calls = torch.random.get_rng_state(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules(): module.register_forward_pre_hook(lambda *_: calls.append(1))
    held = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert bend_of(model) == Bend(1, 1 / 16, INF)
    assert not calls
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == held

def test_a_setting_that_changes_is_seen():
    model = made("Gemma2", BENDS["gemma2"][1])
    hidden = model.base_model(input_ids=BATCH.ids).last_hidden_state
    for cap in (30., 2., None, 5.):
        model.config.final_logit_softcapping = cap
        close(logits_of(model, hidden), model(input_ids=BATCH.ids).logits)

class Biased(transformers.LlamaForCausalLM): # tokens that it never says
    def forward(self, *args, **more):
        found = super().forward(*args, **more)
        found.logits = found.logits.index_fill(-1, torch.tensor([3, 4]), -1e9)
        return found
class Shifted(transformers.LlamaForCausalLM):
    def forward(self, *args, **more):
        found = super().forward(*args, **more)
        found.logits = found.logits + 1.5
        return found
class Normed(transformers.LlamaForCausalLM): # something between the base model and the output layer
    def forward(self, input_ids, **more):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.lm_head(hidden / hidden.norm(dim=-1, keepdim=True)))
class Elsewhere(transformers.LlamaForCausalLM): # not by the output layer that it names
    def forward(self, input_ids, **more):
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.model(input_ids=input_ids).last_hidden_state @ self.lm_head.weight.T)

@pytest.mark.parametrize("kind", [Biased, Shifted, Normed, Elsewhere])
def test_an_unknown_way_to_logits_is_refused(kind):
    model = kind(transformers.LlamaConfig(**SMALL))
    for door in (lambda: answer_logits(model, BATCH), lambda: score(model, FORGET)):
        with pytest.raises(
            ValueError,
            match=(
                f"{kind.__name__} (makes its logits of its output layer in a way that is not"
                " known|cannot be told)")) as error:
            door()
        assert "\n" not in str(error.value)

def test_an_output_layer_inside_another_part_is_refused():
    model = transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, is_decoder=True))
    with pytest.raises(
        ValueError,
        match=(
            "the output layer of this RobertaForCausalLM cannot be told from the rest of the model"
            " .*it does not stand next to the base model")):
        logits_of(model, torch.zeros(1, 16))

# --- the finder that the error for an unknown architecture advises

@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_the_advised_finder_gives_right_scores(name, monkeypatch):
    model = made(*BENDS[name][:2])
    monkeypatch.delitem(PROJECTIONS, name)
    with pytest.raises(
        ValueError, match=f"register a finder: unloc.models.PROJECTIONS\\['{name}'\\]"):
        output_projections(model)
    monkeypatch.setitem(
        PROJECTIONS, name, lambda model: [block.mlp.down_proj for block in model.model.layers])
    want = [
        nn.functional.cross_entropy(
            model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1],
            torch.tensor(e.ids[e.start:])).item()
        for e in FORGET]
    assert score(model, FORGET).nll.tolist() == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize(
    "finder, says",
    [
        (
            lambda model: [block.mlp.fc9 for block in model.model.layers],
            (
                "no attribute 'fc9'; give transformers' own causal language model, or correct the"
                " finder of 'llama'")),
        (lambda model: [model.model.layers[7]], "correct the finder of 'llama'"),
        (lambda model: [], "finds no output projection in this LlamaForCausalLM"),
        (lambda model: None, "correct the finder of 'llama'")],
    ids=["name", "index", "empty", "none"])
def test_a_finder_that_fails_is_told(finder, says, monkeypatch):
    monkeypatch.setitem(PROJECTIONS, "llama", finder)
    with pytest.raises(ValueError, match=says) as error:
        output_projections(tiny_model("llama", 30, 8, 1, 12, 2))
    assert "\n" not in str(error.value)

@pytest.mark.parametrize(
    "model, layer",
    [
        (
            lambda: transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(**MIXTURE | dict(mlp_only_layers=[0], head_dim=8))),
            0),
        (
            lambda: transformers.Qwen3MoeForCausalLM(
                transformers.Qwen3MoeConfig(**MIXTURE | dict(decoder_sparse_step=2, head_dim=8))),
            0)],
    ids=["first", "every other"])
def test_a_dense_layer_among_mixtures_is_the_cause(model, layer):
    with pytest.raises(
        ValueError,
        match=(
            f"layer {layer} of this Qwen3MoeForCausalLM is dense, a Qwen3MoeMLP without experts, .*"
            " take a checkpoint whose layers are alike")):
        output_projections(model())

def test_a_block_without_a_projection_is_the_cause():
    model = tiny_model("llama", 30, 8, 2, 12, 2)
    model.model.layers[1].mlp = nn.Identity() # as where layers were pruned
    with pytest.raises(
        ValueError,
        match=(
            r"layer 1 of this LlamaForCausalLM has no mlp.down_proj \(.*\); a region needs layers"
            r" of one kind")):
        output_projections(model)

# --- what else is read of a model

@pytest.mark.parametrize("name", KNOWN)
def test_blocks_and_the_last_norm_are_found_everywhere(name):
    model = build(name)
    assert len(blocks_of(model)) == 2
    assert all(
        any(m is p for m in b.modules())
        for b, p in zip(blocks_of(model), output_projections(model)))
    assert isinstance(final_norm(model), nn.Module)
    if name == "opt": return # whose hidden states are projected behind the norm
    assert logit_lens(model, FORGET)[-1].tolist() == pytest.approx(
        (-score(model, FORGET).nll).tolist(), rel=1e-4, abs=2e-5
    ), "the last layer is the model itself"

def test_a_row_that_measures_distances_stands_alone():
    for name in ("bloom", "mpt"):
        model = made(*BENDS[name][:2])
        want = [
            nn.functional.cross_entropy(
                model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1],
                torch.tensor(e.ids[e.start:])).item()
            for e in FORGET]
        assert mask_limit(model) == 0
        assert score(model, FORGET).nll.tolist() == pytest.approx(want, rel=1e-5)
    assert (
        mask_limit(
            transformers.FalconForCausalLM(
                transformers.FalconConfig(
                    vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    alibi=True)))
        == 0)
    assert mask_limit(build("gpt_neo", window=7)) == 7

STATEFUL = { # class, configuration: layers in which a token reaches others past a mask
    "jamba": (
        "Jamba",
        MIXTURE | dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1)),
    "lfm2": ("Lfm2", SMALL | dict(layer_types=["conv", "full_attention"])),
    "minimax": (
        "MiniMax",
        MIXTURE | dict(layer_types=["linear_attention", "full_attention"], head_dim=8)),
    "recurrent_gemma": (
        "RecurrentGemma",
        SMALL | dict(lru_width=16, attention_window_size=8, block_types=("recurrent", "attention")),
    )}

@pytest.mark.parametrize("name", [*STATEFUL, "openai-gpt", "llama"])
def test_answers_to_one_question_do_not_see_each_other(name):
    from unloc.tokens import Example
    if name == "openai-gpt": # whose masks are of padding alone
        model = transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2)).eval()
    else: model = made(*STATEFUL.get(name, ("Llama", SMALL)))
    assert (mask_limit(model) == 0) == (name != "llama")
    facts = [Example([5, 9, 7, 8, 1], 2), Example([5, 9, 3, 4, 1], 2), Example([5, 9, 44, 1], 2)]
    alone = torch.cat([score(model, [e]).nll for e in facts])
    torch.testing.assert_close(score(model, facts).nll, alone, rtol=1e-5, atol=1e-6)

def test_known_architectures_keep_answers_behind_one_question():
    assert {name for name in KNOWN if mask_limit(build(name)) == 0} <= {"bloom", "mpt"}
