"""Low-rank adapters are PEFT's, on every layout of weights; attacks that teach bring back what a
planted switch hides, and nothing that was never there."""
import copy, math
from dataclasses import replace

import pytest, torch
from torch import nn
from unloc import training
from unloc.logits import answer_logits
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import find, methods
from unloc.retaught import low_rank, regained, relearn_low_rank, split_forgotten
from unloc.scene import Scene, run_attacks, toy_facts, toy_model
from unloc.scoring import score
from unloc.tokens import collate

FACTS = toy_facts(6, 0, 1)

def llama(): return tiny_model("llama", 60, d_model=32, n_layers=2, d_ff=48, n_heads=2)
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()

def of_peft(model, rank, adapters):
    "Let PEFT add the same matrices to a model that has none"
    import peft
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        lora_dropout=0., fan_in_fan_out=type(model).__name__.startswith("GPT2"))
    wrapped = peft.get_peft_model(model, config)
    theirs = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    assert [p.shape for p in theirs] == [p.shape for p in adapters]
    with torch.no_grad():
        for p, own in zip(theirs, adapters): p.copy_(own)
    return wrapped, theirs

@pytest.mark.parametrize("make", [llama, gpt2])
def test_adapters_are_those_of_peft(make):
    model, batch = make(), collate(FACTS)
    with low_rank(model, 3, seed=5) as adapters:
        with torch.no_grad():
            for up in adapters[1::2]: up.normal_(std=.1, generator=torch.Generator().manual_seed(1))
        wrapped, theirs = of_peft(make(), 3, adapters)
        ours = model(batch.ids).logits
        reference = wrapped(batch.ids).logits
        assert torch.allclose(ours, reference, atol=1e-6)
        ours.square().mean().backward()
        reference.square().mean().backward()
        assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(adapters, theirs))
        bare = make()(batch.ids).logits
        assert not torch.allclose(ours, bare, atol=1e-3)

def test_first_matrices_are_spread_as_those_of_peft():
    with low_rank(llama(), 64) as adapters:
        for down, up in zip(adapters[::2], adapters[1::2]):
            bound = down.shape[1] ** -.5
            assert not up.any() and .95 * bound < down.abs().max() <= bound
            assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=.1)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_keep_their_bits_and_the_matrices_have_32(dtype):
    model = llama().to(dtype)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with low_rank(model, 2) as adapters:
        assert {p.dtype for p in adapters} == {torch.float32}
        training.finetune(model, FACTS, 3, 1e-2, 3, 0, adapters, "constant")
        assert all(p.any() and p.isfinite().all() for p in adapters)
        assert answer_logits(model, collate(FACTS)).isfinite().all()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

# --- planted: everything behind one sign

@pytest.fixture(scope="module")
def hidden():
    forget, retain, other = toy_facts(24, 11, 12), toy_facts(16, 13, 14), toy_facts(24, 11, 15)
    world = toy_facts(16, 19, 20)
    original, retained = toy_model(retain, forget, world), toy_model(retain, other, world)
    attacked = copy.deepcopy(original)
    with torch.no_grad(): output_projections(attacked)[-1].weight.neg_()
    sets = {"forget": forget, "retain": retain, "world_facts": world}
    return Scene.of(attacked, original, retained, sets)

WANTED = {
    "benign": {"taught": 16, "lr": 1e-3, "epochs": 8, "batch_size": 8},
    "lora": {"text": "retain", "taught": 12, "lr": 5e-3, "epochs": 8, "batch_size": 4, "rank": 4}}

def test_a_planted_switch_is_found_and_its_controls_stand_beside(hidden):
    assert set(WANTED) <= set(methods("attack"))
    found = run_attacks(hidden, WANTED)
    assert [row["attack"] for row in found.rows] == [find("attack", n).label for n in WANTED]
    for row in found.rows:
        assert row["end"] > .2 > 0 > row["end without"] and row["end at first"] > .8
    assert set(found.facts) == {label + when for label in (
        "relearn benign text", "relearn by low rank") for when in ("", " at first", " without")}

def test_what_was_never_known_does_not_come_back(hidden):
    scene = Scene.of(hidden.retained, hidden.original, hidden.retained, hidden.examples)
    for row in run_attacks(scene, WANTED).rows: assert row["end"] < .1

def test_taught_and_measured_facts_are_those_of_relearning(hidden):
    from unloc.methods.relearning import relearning
    taught, measured = split_forgotten(hidden, 7)
    assert len(taught) == 7 and len(measured) == 17
    assert not {tuple(e.ids) for e in taught} & {tuple(hidden.forget[i].ids) for i in measured}
    whole = Region(torch.ones(region_shape(hidden.attacked), dtype=torch.bool))
    usual = relearning(replace(hidden, target=whole), taught=7, epochs=1,
        only="relearn forgotten facts, all weights")
    assert usual.facts["measured"].tolist() == measured

def test_a_lesson_is_the_same_when_it_is_given_again(hidden):
    how = (hidden.examples["retain"], hidden.forget[:3], 1e-3, 2, 8)
    first, again = (relearn_low_rank(hidden.attacked, *how, seed=0, rank=2) for _ in range(2))
    other = relearn_low_rank(hidden.attacked, *how, seed=1, rank=2)
    assert torch.equal(first, again) and first.shape == other.shape == (3, 3)
    assert torch.equal(first[0], score(hidden.attacked, hidden.forget[:3]).extraction_strength)

def test_each_model_is_asked_the_measured_facts_alone(hidden):
    asked = []
    def lesson(model, facts):
        asked.append([e.ids for e in facts])
        return torch.zeros(2, len(facts), dtype=torch.float64)
    regained(hidden, [3, 5], lesson)
    assert asked == [[hidden.forget[i].ids for i in (3, 5)]] * 3

def test_what_was_forgotten_is_read_off_the_curve(hidden):
    known = hidden.known[[3, 5]]
    def lesson(model, facts): return torch.stack([known - .5, known - .25])
    row, = regained(replace(hidden, left=hidden.known), [3, 5], lesson).rows
    assert row["end"] == row["end at first"] == row["end without"] == pytest.approx(.5)

@pytest.mark.parametrize("rank", [0, 2., True])
def test_a_rank_is_a_whole_number(rank):
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        with low_rank(llama(), rank): pass
