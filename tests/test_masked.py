"""Locked weights stay bit-identical under every optimizer, dtype and architecture we support, and
the region's columns or single weights move exactly as the plain way would move them."""
import shutil, subprocess, sys
import copy
from collections import Counter
from contextlib import nullcontext
import pytest, torch, transformers
from unloc import unlocked
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from unloc.heads import Neurons
from unloc.locked import locked_digest
from unloc.masked import in_float32, put_columns, unlock
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
from unloc.register import methods
from unloc.unlocked import still

IDS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(0))
REGION = Region.sample((2, 24), .3, seed=0)
WEIGHTS = Region.sample((2, 16, 24), .3, seed=0)
WHOLE = Region(REGION.mask[:, None].expand(2, 16, 24)) # every weight of REGION's columns
both = pytest.mark.parametrize("region", [REGION, WEIGHTS], ids=["columns", "weights"])
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, weight_decay=.1),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=.5, fused=True)}


def small(arch="llama", dtype=torch.float32, bias=False):
    model = tiny_model(arch, vocab_size=60, d_model=16, d_ff=24, n_layers=2, n_heads=2).to(dtype)
    if dtype == torch.float64: # made of float32 numbers, it would hide a loss of precision
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-9 * torch.rand(
                    p.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    if bias:
        for p in output_projections(model):
            p.bias = nn.Parameter(
                torch.randn(16, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    return model

def loss(model): return model(input_ids=IDS, labels=IDS).loss.double()
def logits(model): return model(input_ids=IDS).logits
def state(model): return {name: t.clone() for name, t in model.state_dict().items()}
def bits(t): return t.contiguous().flatten().view(torch.uint8)
def same(a, b):
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)
def chosen(weight, region, layer): # as the parameters lie
    return (
        weight[:, region.columns[layer]].T
        if len(region.shape) == 2
        else weight.flatten()[region.index[layer]])
def clean(model): return not any("forward" in vars(m) for m in model.modules())

def train(model, columns, steps=3, optimizer=OPTIMIZERS["adamw"], norm=.1):
    opt = optimizer(columns.parameters())
    for _ in range(steps):
        loss(model).backward()
        nn.utils.clip_grad_norm_(columns.parameters(), norm)
        opt.step(); opt.zero_grad()

# --- nothing else moves

@both
@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_locked_weights_keep_their_bits(region, arch, dtype, name):
    model = small(arch, dtype)
    before, digest = state(model), locked_digest(model, region)
    with unlock(model, region) as columns: train(model, columns, optimizer=OPTIMIZERS[name])
    after = model.state_dict()
    projections = {f"model.layers.{i}.mlp.down_proj.weight": i for i in range(2)}
    for key, old in before.items():
        locked = ~region.mask[projections[key]] if key in projections else slice(None)
        assert torch.equal(bits(old[..., locked]), bits(after[key][..., locked])), key
        if key in projections:
            moved = chosen(old != after[key], region, projections[key])
            assert (
                moved.any(1) if moved.ndim == 2 else moved.float().mean() > .5
            ).all(), "what is chosen moves"
    assert locked_digest(model, region) == digest and clean(model)

@pytest.mark.parametrize("where", ["weight", "norm", "locked column", "sign of zero"])
def test_the_digest_sees_the_smallest_change(where):
    model = small()
    with torch.no_grad():
        p = output_projections(model)[0].weight
        p[0, int((~REGION.mask[0]).nonzero()[0])] = 0.
        digest = locked_digest(model, REGION)
        if where == "weight":
            w = model.model.embed_tokens.weight
            w[5, 3] = w[5, 3].nextafter(torch.tensor(9.))
        if where == "norm": w = model.model.norm.weight; w[0] = w[0].nextafter(torch.tensor(9.))
        if where == "locked column": p[1, int((~REGION.mask[0]).nonzero()[-1])] += 1e-6
        if where == "sign of zero": p[0, int((~REGION.mask[0]).nonzero()[0])] = -0.
    assert locked_digest(model, REGION) != digest

def test_the_digest_ignores_the_region_only_on_its_model():
    model = small()
    digest = locked_digest(model, REGION)
    with torch.no_grad():
        for p, index in zip(output_projections(model), REGION.columns): p.weight[:, index] = 7.
    assert (
        locked_digest(model, REGION)
        == digest
        != locked_digest(model, REGION - Region.sample((2, 24), .5, seed=1)))
    assert locked_digest(model.bfloat16(), REGION) != digest

def test_the_digest_of_single_weights_sees_their_neighbours():
    model = small()
    digest, weights = locked_digest(model, WEIGHTS), [p.weight for p in output_projections(model)]
    for layer, mask in enumerate(WEIGHTS.mask):
        with torch.no_grad(): weights[layer][mask] = 7.
        for row, column in (~mask).nonzero().tolist()[::17]:
            old = weights[layer][row, column].item()
            with torch.no_grad(): weights[layer][row, column] += 1e-6
            assert locked_digest(model, WEIGHTS) != digest
            with torch.no_grad(): weights[layer][row, column] = old
    assert locked_digest(model, WEIGHTS) == digest

# --- what moves, moves as it should

@both
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", methods("architecture"))
def test_gradient_is_autograds(region, arch, bias):
    model = small(arch, torch.float64, bias)
    loss(model).backward()
    plain = [
        chosen(p.weight.grad, region, layer) for layer, p in enumerate(output_projections(model))]
    with unlock(model, region) as columns:
        loss(model).backward()
        for p, want in zip(columns.parameters(), plain):
            torch.testing.assert_close(p.grad.double(), want, rtol=1e-12, atol=1e-14)
    assert clean(model)

@both
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", methods("architecture"))
def test_trajectory_is_that_of_masked_full_weights(region, arch, bias, steps=8):
    ours, plain = small(arch, torch.float64, bias), small(arch, torch.float64, bias)
    optimizer = lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.)
    weights = [p.weight for p in output_projections(plain)]
    opt, losses = optimizer(weights), ([], [])
    for _ in range(steps):
        opt.zero_grad()
        (value := loss(plain)).backward()
        for w, mask in zip(weights, region.mask): w.grad *= mask
        nn.utils.clip_grad_norm_(weights, .1)
        opt.step()
        losses[0].append(value.item())
    with unlock(ours, region) as columns:
        opt = optimizer(columns.parameters())
        for _ in range(steps):
            opt.zero_grad()
            (value := loss(ours)).backward()
            nn.utils.clip_grad_norm_(columns.parameters(), .1)
            opt.step()
            losses[1].append(value.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-12, rel=0) and losses[0][-1] < losses[0][0]
    for a, b in zip(output_projections(ours), weights):
        torch.testing.assert_close(a.weight, b, rtol=0, atol=1e-12)

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", methods("architecture"))
def test_all_weights_of_columns_train_as_the_columns(arch, bias):
    def trained(region):
        model, losses = small(arch, torch.float64, bias), []
        with unlock(model, region) as columns:
            opt = torch.optim.AdamW(columns.parameters(), lr=3e-3, weight_decay=.1)
            for _ in range(8):
                (value := loss(model)).backward()
                nn.utils.clip_grad_norm_(columns.parameters(), .1)
                opt.step(); opt.zero_grad()
                losses.append(value.item())
        return model, losses
    (a, found), (b, wanted) = trained(WHOLE), trained(REGION)
    assert found == pytest.approx(wanted, abs=1e-13, rel=0) and found[-1] < found[0]
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)

def test_steps_below_the_weights_precision_add_up():
    model = small(dtype=torch.bfloat16)
    with unlock(model, REGION) as columns:
        opt = torch.optim.SGD(columns.parameters(), lr=1.)
        start = [p.detach().clone() for p in columns.parameters()]
        for step in range(400):
            for p, s in zip(columns.parameters(), start):
                # a bf16 weight of 0.02 cannot move by this: its spacing is 1e-4
                p.grad = -1e-5 * s.sign()
            opt.step()
            if step == 0:
                assert sum(
                    int((p != s).sum()) for p, s in zip(columns.parameters(), start)
                ) > .99 * sum(s.numel() for s in start)
                logits(model)
            if step == 0:
                stuck = [
                    p.weight[:, i].T.clone()
                    for p, i in zip(output_projections(model), REGION.columns)]
    rounded = sum(int((w != s.bfloat16()).sum()) for w, s in zip(stuck, start)) / sum(
        s.numel() for s in start)
    moved = torch.cat(
        [
            (p.weight[:, i].T.float() - s).flatten() * s.sign().flatten()
            for p, i, s in zip(output_projections(model), REGION.columns, start)])
    assert rounded < .3 and moved.mean().item() == pytest.approx(4e-3, rel=.02)

# --- the model as it was, and afterwards

@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reference_is_the_start_to_the_bit(region, dtype):
    model = small(dtype=dtype)
    start = state(model)
    with torch.no_grad(): first = logits(model)
    with unlock(model, region) as columns:
        train(model, columns)
        with torch.no_grad(): trained = logits(model)
        with columns.reference():
            found = logits(model)
            assert torch.equal(bits(found), bits(first))
            assert not found.requires_grad
            assert same(model.state_dict(), start)
        with torch.no_grad():
            assert torch.equal(bits(logits(model)), bits(trained))
            assert not torch.equal(trained, first)
        with pytest.raises(KeyError), columns.reference(): raise KeyError
        with torch.no_grad(): assert torch.equal(bits(logits(model)), bits(trained))
        train(model, columns) # and training goes on

@both
def test_reference_between_forward_and_backward(region):
    model = small(dtype=torch.float64)
    with unlock(model, region) as columns:
        train(model, columns, 1)
        loss(model).backward()
        plain = [p.grad.clone() for p in columns.parameters()]
        for p in columns.parameters(): p.grad = None
        value = loss(model)
        with columns.reference(): logits(model)
        value.backward() # the trained columns are back, so this is right
        assert all(torch.equal(p.grad, g) for p, g in zip(columns.parameters(), plain))
        value = loss(model)
        with columns.reference(), pytest.raises(RuntimeError, match="outside columns.reference"):
            value.backward()
        value = loss(model)
        torch.optim.SGD(columns.parameters(), lr=.1).step()
        with pytest.raises(RuntimeError, match="before optimizer.step"): value.backward()

@both
def test_an_exception_leaves_a_clean_model(region):
    model = small()
    for p in model.model.embed_tokens.parameters(): p.requires_grad_(False)
    flags, names = [p.requires_grad for p in model.parameters()], list(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        with unlock(model, region) as columns:
            assert not any(p.requires_grad for p in model.parameters())
            train(model, columns)
            values = columns.values()
            with columns.reference(): 1 / 0
    assert clean(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.state_dict()) == names
    for layer, (_, trained) in values.items():
        assert torch.equal(chosen(output_projections(model)[layer].weight, region, layer), trained)
    loss(model).backward() # and it trains as before
    assert output_projections(model)[0].weight.grad is not None
    assert model.model.embed_tokens.weight.grad is None

@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unlocking_without_training_changes_nothing(region, dtype):
    model = small(dtype=dtype)
    before = state(model)
    with unlock(model, region) as columns:
        logits(model)
        assert not any(change.any() for _, change in columns.delta().values())
    assert same(model.state_dict(), before)

@both
@pytest.mark.parametrize("arch", methods("architecture"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_columns_carry_the_trained_model(region, arch, dtype):
    model = small(arch, dtype)
    with unlock(model, region) as columns:
        train(model, columns)
        values, delta = columns.values(), columns.delta()
    fresh = small(arch, dtype)
    weights = [p.weight.detach().clone() for p in output_projections(fresh)]
    put_columns(fresh, values)
    assert same(fresh.state_dict(), model.state_dict())
    for layer, (index, change) in delta.items():
        assert torch.equal(change, values[layer][1] - chosen(weights[layer], region, layer))
        assert torch.equal(index, region.index[layer])
        assert torch.equal(index, values[layer][0])

def test_a_layer_without_columns_is_left_alone():
    only = Region(torch.zeros(2, 24, dtype=torch.bool)) | Region(torch.arange(48).view(2, 24) >= 40)
    model = small()
    before = state(model)
    with unlock(model, only) as columns:
        assert [tuple(p.shape) for p in columns.parameters()] == [(8, 16)]
        assert "forward" not in vars(output_projections(model)[0])
        train(model, columns)
    assert torch.equal(
        before["model.layers.0.mlp.down_proj.weight"], output_projections(model)[0].weight)
    assert list(columns.delta()) == [1]

# --- memory, hooks, checkpointing

def saved(model, region=None):
    "Shapes and places of what autograd keeps, and the inputs of the projections"
    kept, inputs = [], []
    def pack(t): kept.append(t); return t
    hooks = [
        p.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
        for p in output_projections(model)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss(model)
    for h in hooks: h.remove()
    parameters = {p.data_ptr() for p in model.parameters()}
    return [t for t in kept if t.data_ptr() not in parameters], inputs

@pytest.mark.parametrize("arch", methods("architecture"))
def test_backward_keeps_only_the_chosen_inputs(arch):
    model = small(arch)
    keeps_input = lambda kept, inputs: [
        any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)
        for x in inputs]
    kept, inputs = saved(model)
    # the plain way keeps all inputs: the check can fail
    assert keeps_input(kept, inputs) == [True, True]
    def size(kept):
        return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in kept}.values())
    # the same graph without the projections' weights
    model.requires_grad_(False).model.embed_tokens.requires_grad_(True)
    frozen, _ = saved(model)
    with unlock(model, REGION) as columns:
        model.model.embed_tokens.requires_grad_(True)
        kept, inputs = saved(model)
    assert keeps_input(kept, inputs) == [False, False]
    more = Counter(tuple(t.shape) for t in kept) - Counter(tuple(t.shape) for t in frozen)
    assert more == Counter((*IDS.shape, len(index)) for index in REGION.columns)
    assert size(kept) - size(frozen) == IDS.numel() * len(REGION) * 4

def test_single_weights_keep_the_inputs_of_their_columns_alone():
    few = Region(torch.zeros(2, 16, 24, dtype=torch.bool))
    few.mask[0, 3, 5] = few.mask[0, 9, 5] = few.mask[1, 0, 23] = True
    model = small()
    loss(model).backward()
    wanted = [
        chosen(p.weight.grad, few, layer) for layer, p in enumerate(output_projections(model))]
    model.requires_grad_(False).model.embed_tokens.requires_grad_(True)
    frozen, _ = saved(model)
    with unlock(model, few) as columns:
        model.model.embed_tokens.requires_grad_(True)
        kept, _ = saved(model)
        assert Counter(tuple(t.shape) for t in kept) - Counter(
            tuple(t.shape) for t in frozen) == Counter({(*IDS.shape, 1): 2})
        loss(model).backward()
        for p, g in zip(columns.parameters(), wanted): torch.testing.assert_close(p.grad, g)

@both
def test_hooks_and_names_stay(region):
    model, seen = small(), []
    p = output_projections(model)[1]
    p.register_forward_pre_hook(lambda m, x: seen.append(("before", tuple(x[0].shape))))
    p.register_forward_hook(lambda m, x, y: seen.append(("after", tuple(y.shape))))
    p.register_full_backward_hook(
        lambda m, gx, gy: seen.append(("back", tuple(gx[0].shape), tuple(gy[0].shape))))
    names = [list(model.state_dict()), [n for n, _ in model.named_modules()]]
    with unlock(model, region):
        assert [list(model.state_dict()), [n for n, _ in model.named_modules()]] == names
        assert p is output_projections(model)[1]
        loss(model).backward()
    assert seen == [("before", (3, 9, 24)), ("after", (3, 9, 16)), ("back", (3, 9, 24), (3, 9, 16))]

@both
@pytest.mark.parametrize("arch", methods("architecture"))
def test_gradient_checkpointing_gives_the_same_gradients(region, arch):
    model = small(arch)
    def gradients():
        with unlock(model, region) as columns:
            loss(model).backward()
            return [p.grad for p in columns.parameters()]
    plain, calls = gradients(), []
    for layer in model.model.layers:
        def forward(*args, plain=layer.forward, **more):
            calls.append(1)
            return checkpoint(plain, *args, use_reentrant=False, **more)
        layer.forward = forward
    inner = Counter()
    for i, p in enumerate(output_projections(model)):
        p.register_forward_pre_hook(lambda m, x, i=i: inner.update([i]))
    ours = gradients()
    assert len(calls) == 2 and inner == {0: 2, 1: 2} # each layer ran again in backward
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))

# --- at the door

@pytest.mark.parametrize(
    "region, says",
    [
        (Region.sample((3, 24), .3, seed=0), "3 x 24 value vectors, the model has 2 x 24"),
        (Region.sample((2, 23), .3, seed=0), "2 x 23 value vectors"),
        (
            Region.sample((2, 24, 16), .3, seed=0),
            "2 x 24 x 16 weights, the model has 2 x 16 x 24 weights"),
        (Region.sample((1, 16, 24), .3, seed=0), "1 x 16 x 24 weights"),
        (WEIGHTS - WEIGHTS, "the region is empty"),
        (REGION - REGION, "the region is empty")])
def test_a_wrong_region_is_refused_and_nothing_is_touched(region, says):
    model = small()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=says) as error:
        with unlock(model, region): pass
    assert "\n" not in str(error.value)
    assert same(model.state_dict(), before)
    assert clean(model)
    assert [p.requires_grad for p in model.parameters()] == flags

@pytest.mark.parametrize("first, second", [(REGION, ~REGION), (REGION, WEIGHTS), (WEIGHTS, REGION)])
def test_a_second_unlock_is_refused_and_the_first_goes_on(first, second):
    model = small()
    with unlock(model, first) as columns:
        with pytest.raises(ValueError, match="unlocked already"):
            with unlock(model, second): pass
        train(model, columns)
    assert region_shape(copy.deepcopy(model)) == (2, 24) and clean(model)

def holding(shape, dtype):
    p = nn.Linear(24, 16, bias=False)
    p.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    return p

@both
@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: Conv1D(24, 16),
            r"layer 0 are \[d_model, d_ff\] \[16, 24\], those of layer 1 \[24, 16\]"),
        (lambda: nn.Linear(20, 16), r"those of layer 1 \[16, 20\]"),
        (
            lambda: holding((192, 1), torch.uint8),
            r"a Linear has a Parameter of torch.uint8 \[192, 1\]; a quantized"),
        (
            lambda: holding((16, 24), torch.int8),
            r"a Linear has a Parameter of torch.int8 \[16, 24\]")],
    ids=["turned", "narrower", "packed", "rounded"])
def test_a_projection_of_another_kind_is_refused(region, make, says):
    model = small()
    model.model.layers[1].mlp.down_proj = make()
    flags = [p.requires_grad for p in model.parameters()]
    for door in (lambda: unlock(model, region).__enter__(), lambda: locked_digest(model, region)):
        with pytest.raises(ValueError, match=says) as error: door()
        assert "\n" not in str(error.value)
        assert clean(model)
        assert [p.requires_grad for p in model.parameters()] == flags

@both
def test_a_transposed_weight_trains_as_the_straight_one(region):
    straight, turned = small(dtype=torch.float64), small(dtype=torch.float64)
    for block in turned.model.layers:
        values, block.mlp.down_proj = block.mlp.down_proj.weight.data, Conv1D(16, 24).double()
        block.mlp.down_proj.weight.data = values.T.contiguous()
    for model in (straight, turned):
        with unlock(model, region) as columns: train(model, columns)
    for a, b in zip(output_projections(straight), output_projections(turned)):
        torch.testing.assert_close(a.weight, b.weight.T, rtol=0, atol=1e-13)

@both
def test_a_tied_projection_is_refused(region):
    for tie in (
        lambda m: setattr(m.model.layers[1].mlp, "down_proj", m.model.layers[0].mlp.down_proj),
        lambda m: setattr(
            m.lm_head,
            "weight",
            nn.Parameter(m.model.layers[0].mlp.down_proj.weight.data.view(24, 16)))):
        model = small()
        tie(model)
        for door in (
            lambda: unlock(model, region).__enter__(),
            lambda: locked_digest(model, region)):
            with pytest.raises(
                ValueError,
                match=(
                    "layer 0 is tied: model.layers.0.mlp.down_proj.weight and .* share one memory"),
            ) as error:
                door()
            assert "\n" not in str(error.value) and clean(model)

@pytest.mark.parametrize("shape", ["vectors", "weights"])
def test_a_region_trains_where_only_deterministic_operations_are_allowed(
    shape
): # as in every run on the CPU
    script = f"""
import torch; torch.use_deterministic_algorithms(True)
from unloc.masked import put_columns, unlock
from unloc.models import output_projections, region_shape, tiny_model
from unloc.regions import Region
m = tiny_model('llama', 40, d_model=8, n_layers=2, d_ff=12, n_heads=2)
if {shape!r} == 'vectors': r = Region.sample(region_shape(m), .3, 0)
else: r = Region.top(torch.rand(2, 8, 12), .3)
with unlock(m, r) as columns:
    m(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    torch.optim.AdamW(columns.parameters()).step()
    with columns.reference(): m(input_ids=torch.tensor([[2]]))
put_columns(m, columns.values())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_a_compiled_model_learns_the_same():
    from unloc.tokens import Example
    from unloc.training import finetune
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(2, 60, (12,), generator=generator).tolist(), 4) for _ in range(4)]
    found = []
    for compiled in (False, True):
        model = tiny_model("llama", 60, 16, 1, 32, 2)
        region = Region.sample((1, 32), .25, 0)
        before = locked_digest(model, region)
        if compiled: model.base_model.compile()
        with unlock(model, region) as columns:
            finetune(model, examples, 3, 1e-2, 4, 0, columns.parameters())
            found.append(columns.values()[0][1])
        assert locked_digest(model, region) == before
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.equal(found[0], torch.zeros_like(found[0]))

# --- whole neurons, and heads

@pytest.mark.parametrize("arch", ["llama", "olmo2"])
@pytest.mark.parametrize("heads", [False, True])
def test_neurons_move_their_rows_and_columns_as_autograd_says(arch, heads):
    plain, model = (tiny_model(arch, 40, 16, 2, 32, 4).double() for _ in range(2))
    chosen = Neurons.sample(model, .1, seed=1, heads=heads)
    ids, kept = torch.arange(24).view(2, 12), locked_digest(model, chosen)
    def loss(model): return model(input_ids=ids, labels=ids).loss
    loss(plain).backward()
    with unlock(model, chosen) as columns:
        loss(model).backward()
        places = columns.values()
        for (place, (index, _)), p in zip(places.items(), columns.parameters()):
            whole = plain.get_submodule(place).weight.grad
            torch.testing.assert_close(
                p.grad,
                whole[:, index].T if place.endswith(("down_proj", "o_proj")) else whole[index],
                rtol=1e-10,
                atol=1e-12)
        optimizer = torch.optim.AdamW(columns.parameters(), lr=1e-2, weight_decay=.1)
        optimizer.step()
        with columns.reference():
            torch.testing.assert_close(loss(model), loss(plain), rtol=0, atol=0)
        trained = columns.values()
    assert locked_digest(model, chosen) == kept
    assert any("gate_proj" in place for place in trained)
    assert any("o_proj" in place for place in trained) == heads
    fresh = tiny_model(arch, 40, 16, 2, 32, 4).double()
    put_columns(fresh, trained)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), model.parameters()))
    assert not torch.equal(loss(fresh), loss(plain))
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[
            ~torch.isin(
                torch.arange(16),
                trained.get("model.layers.0.self_attn.q_proj", [torch.empty(0)])[0])] += 1e-9
    assert locked_digest(model, chosen) != kept

def test_neurons_are_kept_in_a_file_that_is_a_region_too(tmp_path):
    model = tiny_model("llama", 40, 16, 2, 32, 4)
    for heads in (False, True):
        (chosen := Neurons.sample(model, .25, 3, heads)).save(tmp_path / "n.safetensors")
        assert Neurons.load(tmp_path / "n.safetensors") == chosen
        assert Region.load(tmp_path / "n.safetensors") == chosen.vectors
        assert len(chosen) == 16 + 2 * heads

# --- heads that share keys and values

def grouped(
    kind="Llama", n_heads=4, shared=2, head_dim=6, **more
): # heads as wide as they like, not hidden_size / heads
    config = getattr(transformers, kind + "Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=n_heads,
        num_key_value_heads=shared,
        head_dim=head_dim,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attn_implementation="eager",
        **more)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p += .2 * torch.randn(p.shape, dtype=p.dtype)
    return model

def of_heads(*chosen, n_heads=4): # in the first of two layers
    mask = torch.zeros(2, n_heads, dtype=torch.bool)
    mask[0, list(chosen)] = True
    return Neurons(Region.sample((2, 32), .1, seed=0), Region(mask))

@pytest.mark.parametrize(
    "kind, shared, more",
    [
        ("Llama", 2, {}),
        ("Llama", 1, {}),
        ("Llama", 4, {}),
        ("Qwen3", 2, {}),
        ("Gemma", 2, {}),
        ("Gemma2", 2, {}),
        ("Mistral", 2, {"sliding_window": 8}),
        ("Qwen2", 2, {}),
        ("Olmo2", 2, {}),
        ("Granite", 2, {}),
    ],
)
@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 1), (0, 1, 2, 3)])
def test_heads_of_groups_move_as_autograd_says(kind, shared, more, heads):
    head_dim = 4 if kind in ("Qwen2", "Olmo2", "Granite", "Mistral") else 6
    plain, model = (grouped(kind, shared=shared, head_dim=head_dim, **more) for _ in range(2))
    chosen, ids = of_heads(*heads), torch.arange(2, 26).view(2, 12)
    def loss(model): return model(input_ids=ids, labels=ids).loss
    loss(plain).backward()
    kept, start = locked_digest(model, chosen), state(model)
    with unlock(model, chosen) as columns:
        loss(model).backward()
        for (place, (index, _)), p in zip(columns.values().items(), columns.parameters()):
            whole = plain.get_submodule(place).weight.grad
            torch.testing.assert_close(
                p.grad,
                whole[:, index].T if place.endswith(("down_proj", "o_proj")) else whole[index],
                rtol=1e-9,
                atol=1e-11)
        torch.optim.AdamW(columns.parameters(), lr=1e-2, weight_decay=.1).step()
        trained = columns.values()
    assert locked_digest(model, chosen) == kept
    # groups that are chosen as a whole
    whole = {
        g for g in range(shared) if set(range(g * 4 // shared, (g + 1) * 4 // shared)) <= set(heads)
    }
    for name, axis, own in (
        ("q", 0, set(heads)), ("k", 0, whole), ("v", 0, whole), ("o", 1, set(heads))):
        before, after = (
            s[f"model.layers.0.self_attn.{name}_proj.weight"] for s in (start, model.state_dict()))
        moved = (before != after).any(1 - axis).view(-1, head_dim)
        assert {h for h in range(len(moved)) if moved[h].any()} == own and all(
            moved[h].all() for h in own), name
    assert all(
        torch.equal(start[name], x)
        for name, x in model.state_dict().items()
        if "layers.1.self_attn" in name or "norm" in name)
    fresh = grouped(kind, shared=shared, head_dim=head_dim, **more)
    put_columns(fresh, trained)
    assert same(fresh.state_dict(), model.state_dict())

# though its neighbour of the same group was trained
def test_a_head_that_is_not_chosen_computes_what_it_did():
    model, seen = grouped(), []
    def look(module, inputs): # what each head gives to the output projection
        seen.append(inputs[0].view(1, 12, 4, 6))
    ids, chosen = torch.arange(2, 14)[None], of_heads(0)
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(look)
    model(input_ids=ids)
    with unlock(model, chosen) as columns:
        for p in columns.parameters(): p.data += .5
    model(input_ids=ids); handle.remove()
    assert torch.equal(seen[0][:, :, 1:], seen[1][:, :, 1:])
    assert not torch.equal(seen[0][:, :, 0], seen[1][:, :, 0])

def test_heads_are_drawn_and_kept_where_keys_are_shared(tmp_path):
    model = grouped()
    (chosen := Neurons.sample(model, .25, 3, heads=True)).save(tmp_path / "n.safetensors")
    assert Neurons.load(tmp_path / "n.safetensors") == chosen and len(chosen.heads) == 2
    with pytest.raises(
        ValueError,
        match=(
            "the heads are of 2 x 3 .layers, heads., the model has 2 x 4; draw them for this model"
        )):
        locked_digest(model, of_heads(0, n_heads=3))
    model.config.num_attention_heads = 5 # says something else than its layers
    with pytest.raises(
        ValueError,
        match=(
            "model.layers.0.self_attn: 5 heads with 2 keys and values need layers of .*; choose"
            " neurons without heads")):
        locked_digest(model, of_heads(0, n_heads=5))

@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: transformers.Phi3ForCausalLM(
                transformers.Phi3Config(
                    vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=32,
                    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)),
            "Phi3"),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_inner=32)),
            "GPT2"),
        (
            lambda: transformers.PhiForCausalLM(
                transformers.PhiConfig(
                    vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=32,
                    num_attention_heads=4, pad_token_id=0)),
            "Phi")],
    ids=["phi3", "gpt2", "phi"])
def test_fused_layers_are_refused_for_neurons(make, says):
    model = make()
    for heads in (None, of_heads(0).heads):
        with pytest.raises(
            ValueError,
            match=(
                f"is built otherwise, its layers are fused or called by other names: {says}.* has"
                " no attribute .*; choose value vectors")) as error:
            locked_digest(model, Neurons(of_heads(0).vectors, heads))
        assert "\n" not in str(error.value)

# --- every weight

# and a buffer that was float32 stays, whatever happens
def test_weights_of_16_bits_are_float32_for_the_block_alone():
    model = small(dtype=torch.bfloat16)
    buffers = {n: (b.dtype, b.clone()) for n, b in model.named_buffers()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    whole = model(input_ids=IDS).logits
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert (model(input_ids=IDS).logits - whole).norm() < .02 * whole.norm()
        model(input_ids=IDS).logits.logsumexp(-1).mean().backward()
    assert all(
        torch.equal(p, before[n]) and p.dtype == torch.bfloat16 and p.grad is None
        for n, p in model.named_parameters())
    assert all(
        b.dtype == buffers[n][0] and torch.equal(b, buffers[n][1]) for n, b in model.named_buffers()
    )
    with pytest.raises(KeyError), in_float32(model): raise KeyError
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_left_alone(dtype):
    model = small(dtype=dtype)
    memory = [p.data_ptr() for p in model.parameters()]
    with in_float32(model):
        assert [p.data_ptr() for p in model.parameters()] == memory
        assert not torch.is_autocast_enabled("cpu")

# --- columns that stay are written once

@pytest.fixture
def writes(monkeypatch):
    done = []
    for kind in (unlocked.Unlocked, unlocked.UnlockedWeights):
        plain = kind.write
        monkeypatch.setattr(
            kind, "write", lambda self, plain=plain: done.append(self) or plain(self))
    return done

@both
def test_columns_that_stay_are_written_once(region, writes):
    model = small()
    def written(block):
        writes.clear()
        block()
        return len(writes)
    with unlock(model, region) as columns, torch.no_grad():
        for p in columns.parameters(): p += 1
        def asked(times=3):
            for _ in range(times): logits(model)
        assert written(asked) == 6, "without a promise, before every product of both layers"
        with still():
            assert written(asked) == 2 and written(asked) == 0
            with still(): assert written(asked) == 0, "a promise inside is the same one"
            def reference():
                with columns.reference(): asked()
            assert written(reference) == 4 and written(asked) == 0, "the start, and back again"
        for p in columns.parameters(): p.data += 1 # leaves no trace
        with still(): assert written(asked) == 2
    assert not torch.equal(logits(model), logits(small()))

def test_a_promise_changes_no_generated_token():
    tokens = []
    for promise in (still, nullcontext):
        model = small()
        with unlock(model, REGION) as columns:
            train(model, columns)
            with promise(): tokens.append(model.generate(IDS, max_new_tokens=5, do_sample=False))
    assert torch.equal(*tokens)
