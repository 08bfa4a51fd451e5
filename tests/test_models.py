"""What we read inside the tiny models is what transformers itself reports, in float64, on both
architectures; and hooks never stay behind."""
import pytest, torch, transformers
from unloc.logits import answer_logits, hidden_after, mlp_outputs
from unloc.models import PROJECTIONS, output_projections, region_shape, tiny_model, value_vectors
from unloc.register import methods
from unloc.tokens import Example, collate

ROWS = [
    Example([5, 9, 7, 8, 1], 2),
    Example([6, 4, 1], 1),
    Example([3, 3, 9, 12, 40, 2, 1], 5),
    Example([8, 7, 6, 1], 3)]
BATCH = collate(ROWS)


@pytest.fixture(scope="module", params=methods("architecture"))
def model(request):
    return tiny_model(
        request.param, vocab_size=50, d_model=16, d_ff=24, n_layers=3, n_heads=2).double()

def exact(a, b): # answer_logits come in float32
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=2e-7)
def predicts(values):
    return torch.cat([values[i, e.start - 1:len(e.ids) - 1] for i, e in enumerate(ROWS)])

def test_answer_logits_are_the_plain_ones(model):
    found = answer_logits(model, BATCH)
    assert found.dtype == torch.promote_types(model.dtype, torch.float32)
    assert tuple(found.shape) == (int(BATCH.answer.sum()), 50)
    exact(found, predicts(model(input_ids=BATCH.ids).logits))
    exact(
        found,
        torch.cat(
            [model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1] for e in ROWS]))

def test_answer_logits_give_the_plain_gradient(model):
    def gradient(logits):
        loss = torch.nn.functional.cross_entropy(logits.float(), BATCH.ids[BATCH.answer])
        return torch.autograd.grad(loss, [p.weight for p in output_projections(model)])
    for a, b in zip(
        gradient(answer_logits(model, BATCH)), gradient(predicts(model(input_ids=BATCH.ids).logits))
    ):
        exact(a, b)

def test_the_unembedding_sees_answers_only(model):
    sizes = []
    handle = model.lm_head.register_forward_pre_hook(lambda m, x: sizes.append(tuple(x[0].shape)))
    answer_logits(model, BATCH); handle.remove()
    assert sizes == [(int(BATCH.answer.sum()), 16)]

@pytest.mark.parametrize("layer", range(3))
def test_hidden_after_is_transformers_hidden_state(model, layer):
    below = model(input_ids=BATCH.ids, output_hidden_states=True).hidden_states
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.model.layers)]
    found = hidden_after(model, BATCH, layer)
    for h in handles: h.remove()
    assert ran == list(range(layer + 1)), "no block above it runs"
    # transformers gives the last one normed
    exact(model.model.norm(found) if layer == 2 else found, below[layer + 1])
    assert found.dtype == torch.float64 and found.requires_grad

def test_mlp_outputs_are_what_the_projections_write(model):
    written, handles = [], [
        p.register_forward_hook(lambda m, x, y: written.append((x[0], y)))
        for p in output_projections(model)]
    model(input_ids=BATCH.ids)
    for h in handles: h.remove()
    found = mlp_outputs(model, BATCH)
    assert len(found) == 3
    for got, (x, y), p in zip(found, written, output_projections(model)):
        exact(got, predicts(y))
        # value vectors, each times its coefficient
        exact(got, (predicts(x)[:, None, :] * p.weight).sum(-1))

def test_hooks_never_stay(model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before, bad = hooks(), BATCH._replace(ids=BATCH.ids + 1000) # beyond the vocabulary
    for read in (mlp_outputs, lambda m, b: hidden_after(m, b, 1), answer_logits):
        read(model, BATCH)
        assert hooks() == before
        with pytest.raises(ValueError, match="the batch has the token 1"): read(model, bad)
        broken = (
            model.lm_head.register_forward_hook(lambda *_: 1 / 0)
            if read is answer_logits
            else output_projections(model)[1].register_forward_pre_hook(lambda *_: 1 / 0))
        with pytest.raises(ZeroDivisionError): read(model, BATCH)
        broken.remove()
        assert hooks() == before
    with pytest.raises(ValueError, match="layer must be 0 to 2, got 3"):
        hidden_after(model, BATCH, 3)

def test_places_and_shapes(model):
    assert region_shape(model) == (3, 24)
    assert [tuple(p.weight.shape) for p in output_projections(model)] == [(16, 24)] * 3
    assert all(
        p is block.mlp.down_proj
        for p, block in zip(output_projections(model), model.model.layers, strict=True))
    assert (
        type(model).__name__
        == {"llama": "LlamaForCausalLM", "olmo2": "Olmo2ForCausalLM"}[model.config.model_type])
    assert not model.training
    assert set(methods("architecture")) < set(PROJECTIONS)
    assert all(
        torch.equal(value_vectors(p), p.weight)
        and value_vectors(p).data_ptr() == p.weight.data_ptr()
        for p in output_projections(model))

@pytest.mark.parametrize("arch", methods("architecture"))
def test_a_seed_fixes_the_weights_and_leaves_the_generator(arch, tmp_path):
    def build(seed):
        return tiny_model(arch, 30, d_model=8, n_layers=1, d_ff=12, n_heads=2, seed=seed)
    torch.manual_seed(5); want = torch.rand(1); torch.manual_seed(5)
    a, b, c = (build(seed).state_dict() for seed in (0, 0, 1))
    assert torch.rand(1) == want
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert not torch.equal(a["lm_head.weight"], a["model.embed_tokens.weight"])
    assert a["lm_head.weight"].dtype == torch.float32
    model = build(0); model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert region_shape(loaded) == (1, 12)
    assert all(torch.equal(a[k], t) for k, t in loaded.state_dict().items())

def test_bad_models_are_named():
    with pytest.raises(ValueError, match="unknown architecture 'gpt2'; known: llama, olmo2"):
        tiny_model("gpt2", 30)
    with pytest.raises(ValueError, match="d_model 30 is not a multiple of n_heads 4"):
        tiny_model("llama", 30, d_model=30)
    other = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=60, hidden_size=8, num_hidden_layers=1, state_size=4, bos_token_id=1,
            eos_token_id=1))
    for door in (
        region_shape,
        output_projections,
        lambda m: hidden_after(m, BATCH, 0),
        lambda m: mlp_outputs(m, BATCH)):
        with pytest.raises(
            ValueError,
            match=(
                "no output projection is known for architecture 'mamba'; known: llama, .*"
                " unloc.models.PROJECTIONS")):
            door(other)
    with pytest.raises(
        ValueError,
        match=(
            "this LlamaModel are not where those of 'llama' are: .*; give transformers' own causal"
            " language model")):
        region_shape(tiny_model("llama", 30, d_model=8, n_heads=1).model)
