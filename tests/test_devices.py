"""A model on another device than the processor: every function that meets one mixes no tensors of
two devices, and gives what it gives on the processor. Most need no GPU: tensors only claim to be
elsewhere; where there is one, the same is asked of it."""
import math
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from unloc import models
from unloc.answers import choices
from unloc.asking import best_of
from unloc.change import Change
from unloc.descent import Checkpoint, descend
from unloc.direct_supervision import mlp_targets, supervise
from unloc.evaluation import Probe, evaluate
from unloc.heads import Neurons
from unloc.inside import hidden_states, patched_logprob
from unloc.invented import author_world
from unloc.locked import checksum, locked_checksum, locked_digest
from unloc.masked import in_float32, put_columns, unlock
from unloc.membership import membership
from unloc.methods.depth import unlearning_depth
from unloc.methods.logit_lens import logit_lens
from unloc.methods.probing import linear_probe
from unloc.models import region_shape, tiny_model
from unloc.quantization import quantized
from unloc.regions import Region
from unloc.register import methods
from unloc.relearn import relearn
from unloc.saving import apply_change, save_change
from unloc.scoring import score
from unloc.streaming import check_scores
from unloc.tokens import encode, train_tokenizer
from unloc.training import finetune, inject, make_room
from unloc.unlearning_run import Recipe, unlearn

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain))
REFUSALS = [encode(TOKENIZER, "", text) for text in WORLD.refusals[:5]]
REFUSALS = [e.ids[e.start:] for e in REFUSALS]
WRONG = [encode(TOKENIZER, f.question, f.perturbed_answer[0]) for f in WORLD.forget]
PROBE = Probe(GET, KEEP[:3])
AWAY = torch.device("cuda", 0)

# --- a second device, as CUDA treats its tensors

MOVING = "_to_copy", "copy_"
# an index may lie on the processor
INDEXING = "index", "index_put", "index_put_", "_index_put_impl_"

class Elsewhere(torch.Tensor):
    "A tensor that computes on the processor and says that it is on a GPU"
    @staticmethod
    def __new__(cls, here):
        shape = here.shape
        more = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        # autograd's threads know this device everywhere
        made = torch.Tensor._make_wrapper_subclass(cls, shape, device="meta", **more)
        made.here = here
        return made
    device, is_cuda, is_meta = (
        property(lambda self, value=value: value) for value in (AWAY, True, False))
    def data_ptr(self): return self.here.data_ptr()
    def tolist(self): return self.here.tolist()
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return computed(op, args, kwargs or {})

class Second(TorchDispatchMode):
    "Let tensors be made on the second device"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return computed(op, args, kwargs or {})

def computed(op, args, kwargs):
    name = op._schema.name.split("::")[1]
    asked = kwargs.get("device")
    generator = kwargs.get("generator")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    free = [i for i in args[1] if i is not None] if name in INDEXING else []
    # a number may lie anywhere
    home = [
        x
        for x in tensors
        if not isinstance(x, Elsewhere) and x.ndim and not any(x is i for i in free)]
    away = (
        any(isinstance(x, Elsewhere) for x in tensors)
        if asked is None
        else torch.device(asked).type in ("cuda", "meta"))
    if name == "copy_": away = isinstance(args[0], Elsewhere)
    elif name not in MOVING and away and home:
        raise RuntimeError(f"{name}: tensors on two devices, cuda:0 and cpu")
    if away and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: a generator of the cpu for a tensor on cuda")
    if away and asked is not None: kwargs = kwargs | {"device": torch.device("cpu")}
    found = op(*tree_map(inside, args), **tree_map(inside, kwargs))
    if name.endswith("_"): return args[0] if isinstance(args[0], torch.Tensor) else None # in place
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) and away else x, found)

def inside(x): return x.here if isinstance(x, Elsewhere) else x

def moved(model):
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(
                    Elsewhere(p.detach()), requires_grad=p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None: m._buffers[name] = Elsewhere(b)
    return model

@pytest.fixture
def second(monkeypatch): # CUDA is never asked, as there may be none
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(models, "FakeTensor", Elsewhere) # a weight of this type is a weight
    # torch.tensor(..., device=...) makes it here, and moves it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Second(): yield
    finally: torch._C._set_only_lift_cpu_tensors(False)

def small(dtype=torch.float32, n_layers=2):
    model = tiny_model(
        "llama", vocab_size=400, d_model=16, d_ff=32, n_layers=n_layers, n_heads=2).to(dtype)
    model.set_attn_implementation("eager") # one way to compute it
    return model

def region(model, seed=0, outside=None):
    return Region.sample(region_shape(model), .25, seed, outside)
def weights(model): return {name: inside(p.detach()) for name, p in model.named_parameters()}
def plain(found): # numbers, wherever they lie
    return tree_map(
        lambda x: inside(x.detach()).clone() if isinstance(x, torch.Tensor) else x, found)
def same(a, b):
    a, b = tree_leaves(a), tree_leaves(b)
    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
        return x == y or isinstance(x, float) and math.isnan(x) and math.isnan(y)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))

# --- the stand-in refuses what CUDA refuses

def test_the_second_device_refuses_to_be_mixed(second):
    here, there = torch.ones(3), torch.ones(3, device=AWAY)
    assert there.device == AWAY
    assert there.cpu().device.type == "cpu"
    assert here.to(AWAY).is_cuda
    assert torch.tensor([1, 2], device=AWAY).is_cuda
    with pytest.raises(RuntimeError, match="two devices"): here + there
    with pytest.raises(RuntimeError, match="two devices"):
        there[torch.ones(3, dtype=torch.bool, device=AWAY)] @ here
    with pytest.raises(RuntimeError, match="two devices"): torch.where(there > 0, here, there)
    with pytest.raises(RuntimeError, match="two devices"): torch.cat([here, there])
    with pytest.raises(RuntimeError, match="two devices"): here[torch.tensor([0], device=AWAY)]
    with pytest.raises(RuntimeError, match="a generator of the cpu"):
        torch.rand(3, device=AWAY, generator=torch.Generator())
    assert same(
        plain([there[torch.tensor([0, 2])], there * torch.tensor(2.), there.tolist()]),
        [torch.ones(2), torch.full((3,), 2.), [1.] * 3],
    )

# --- everything that meets a model

def another(model): # of the same first weights, on the same device
    made = small(model.dtype)
    return moved(made) if isinstance(next(model.parameters()), Elsewhere) else made.to(model.device)

def proved(model, where, digest): # each device has its own proof
    assert digest == (locked_checksum if model.device == AWAY else locked_digest)(model, where)

def unlearned(objective, retain="nll"):
    def run(model):
        trajectory, values = unlearn(
            model,
            region(model),
            GET,
            KEEP,
            PROBE,
            Recipe(objective, lr=1e-3, epochs=2, batch_size=4, retain=retain),
            0,
            REFUSALS)
        proved(model, region(model), trajectory.locked_sha256)
        return trajectory.points, trajectory.facts, trajectory.live_fraction, values
    return run

def with_room(model):
    make_room(model, region(model), KEEP[:6], 1, 1e-3, 3, 0)

def neurons(model):
    chosen = Neurons.sample(model, .2, 0, heads=True)
    values, digest = inject(model, chosen, GET[:4], 2, 1e-3, 2, 0)
    proved(model, chosen, digest)
    return locked_digest(model, chosen), locked_checksum(model, chosen), values

def single_weights(model):
    n, d_ff = region_shape(model)
    chosen = Region.sample((n, 16, d_ff), .1, 0)
    values, digest = inject(model, chosen, GET[:4], 2, 1e-3, 2, 0)
    proved(model, chosen, digest)
    return values

def put(model):
    with unlock(model, region(model)) as columns: values = columns.values()
    put_columns(
        model, {layer: (index.cpu(), column.cpu() + 1) for layer, (index, column) in values.items()}
    )
    put_columns(model, {layer: (index, column) for layer, (index, column) in values.items()})
    changed = {layer: (index, column + 1) for layer, (index, column) in values.items()}
    Change.of(model, changed, values).at(.5)

def supervised(model):
    # targets of a model on the processor
    found = supervise(
        model, region(model), GET, PROBE, mlp_targets(small(model.dtype), GET), 1, 1e-3, 4, 0)
    return found.points, found.facts

def all_weights(model):
    with in_float32(model): finetune(model, GET[:4], 1, 1e-3, 2, 0)

def probed(model):
    states = hidden_states(model, GET)
    return [
        linear_probe(model, GET, WRONG),
        logit_lens(model, GET),
        patched_logprob(model, GET, 1, states[1])]

def depth(model):
    retained, other = another(model), small(model.dtype)
    finetune(retained, KEEP[:4], 1, 1e-2, 2, 0)
    with unlock(retained, region(retained)) as columns, torch.no_grad():
        for p in columns.parameters(): p += .5
    states = [hidden_states(m, GET[:4]) for m in (other, retained)]
    return unlearning_depth(model, GET[:4], *states, least=-math.inf)

def rounded(model):
    with quantized(model, 4): return score(model, GET).nll

def taught_again(support):
    return lambda model: relearn(
        model, GET[:5], GET[5:], 1e-3, 2, 2, 0, region(model) if support else None)

def judged(model):
    facts = {
        "forget": WORLD.forget,
        "retain": WORLD.retain,
        "real_authors": WORLD.real_authors,
        "world_facts": WORLD.world_facts}
    probe = Probe(
        GET[:3],
        KEEP[:4],
        KEEP[:2],
        {name: choices(TOKENIZER, some[:2]) for name, some in facts.items()},
        TOKENIZER,
        max_new_tokens=4)
    found = evaluate(model, probe)
    return found.point, found.facts, membership(model, TOKENIZER, GET)

def sampled(model): return best_of(model, TOKENIZER, GET[:3], n=2, max_new_tokens=4)

KINDS = "localizer", "objective", "retain"
OWN = {kind: {name: m for name, m in methods(kind).items() if m.own} for kind in KINDS}
DOORS = (
    {f"unlearn {o}": unlearned(o) for o in OWN["objective"]}
    | {f"retain {r}": unlearned("wga", r) for r in OWN["retain"]}
    | {
        "make_room": with_room,
        "neurons": neurons,
        "single weights": single_weights,
        "put_columns": put,
        "supervise": supervised,
        "all weights": all_weights,
        "probes": probed,
        "depth": depth,
        "quantized": rounded,
        "relearn region": taught_again(True),
        "relearn": taught_again(False),
        "evaluate": judged,
        "best_of": sampled})

def scored(name, model):
    some = {"forget": GET[:4], "retain": KEEP[:4]}
    return OWN["localizer"][name](model=model, seed=0, **some)

@pytest.mark.parametrize("door", DOORS)
def test_a_model_elsewhere_gives_the_same(door, second):
    here, there = small(), moved(small())
    want, got = plain(DOORS[door](here)), plain(DOORS[door](there))
    assert same(want, got)
    assert same(weights(here), weights(there)) and all(p.device == AWAY for p in there.parameters())

# edit_size searches for values, as editors do, which no test does on a second device yet
@pytest.mark.parametrize("name", [name for name in OWN["localizer"] if name != "edit_size"])
def test_scores_of_a_model_elsewhere_are_the_same_and_here(name, second):
    def scores(model): return scored(name, model)
    # in float32 klue rounds otherwise, since pairs are batched as suits the device
    dtype = torch.float64 if name == "klue" else torch.float32
    want, got = scores(small(dtype)), scores(moved(small(dtype)))
    assert not any(isinstance(x, Elsewhere) for x in tree_leaves(got)) and same(want, got)
    check_scores(got, small(), name)

def test_a_checkpoint_goes_back_to_the_device(second, tmp_path):
    whole, resumed = moved(small()), moved(small())
    def train(model, epochs, *more):
        finetune(
            model,
            GET,
            epochs,
            1e-3,
            4,
            0,
            schedule="constant",
            checkpoint=Checkpoint(tmp_path / "state", *more))
    train(whole, 3, 1e9)
    train(resumed, 2, 0.)
    train(resumed, 3, 1e9)
    assert same(weights(whole), weights(resumed))

def test_a_change_travels_between_devices(second, tmp_path):
    base, trained = small(), moved(small())
    inject(trained, region(base), GET[:4], 2, 1e-3, 2, 0)
    save_change(trained, region(base), tmp_path / "change.safetensors")
    apply_change(base, tmp_path / "change.safetensors")
    assert same(weights(base), weights(trained))

def test_a_run_elsewhere_that_diverges_is_named_by_step_and_keeps_its_parameters(
    second
): # its losses are read when the epoch ends
    found = []
    for x in (torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device=AWAY))):
        def loss(batch, epoch):
            return (x * torch.tensor([1., -2.], device=x.device)).sum() * (
                math.nan if (epoch, batch) == (1, 2) else 1. + batch)
        with pytest.raises(FloatingPointError) as error:
            descend([x], lambda epoch: range(5), loss, 3, .1)
        found.append((str(error.value), plain(x)))
    assert (
        found[0][0]
        == found[1][0]
        == "the loss is nan at step 3 of epoch 2 (lr 0.1); lower the learning rate")
    assert torch.equal(found[0][1], found[1][1])

@pytest.mark.parametrize("device", ["cpu", AWAY], ids=str)
def test_losses_elsewhere_are_read_once_an_epoch(device, second, monkeypatch):
    reads, means, x = [], [], torch.nn.Parameter(torch.ones(2, device=device))
    for name in ("tolist", "item"):
        plainly = getattr(Elsewhere, name)
        monkeypatch.setattr(
            Elsewhere, name, lambda self, plainly=plainly: reads.append(len(means)) or plainly(self)
        )
    descend(
        [x],
        lambda epoch: range(7),
        lambda batch, epoch: x.square().sum() / 3,
        4,
        .01,
        after_epoch=lambda epoch, mean: means.append(mean))
    assert reads == ([] if device == "cpu" else [0, 1, 2, 3])
    assert means == sorted(means, reverse=True)
    assert len(means) == 4

# --- the proof that needs no copy

@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int8], ids=str)
def test_a_checksum_sees_each_bit_its_place_and_the_length(dtype):
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    x = x > 0 if dtype == torch.bool else (x * 9).to(dtype)
    sums = {
        int(checksum(x)),
        int(checksum(x.T)),
        int(checksum(x[:-1])),
        int(checksum(torch.cat([x, x[:1] * 0])))}
    bits = x.flatten().view(torch.uint8)
    places = torch.arange(0, bits.numel(), 5)
    for place in places.tolist():
        bits[place] ^= 1
        sums.add(int(checksum(x)))
        bits[place] ^= 1
    assert len(sums) == 4 + len(places)
    assert {int(checksum(x, words=n)) for n in (1, 3, 2**22)} == {int(checksum(x))}

# as they would in a sum of words times odd numbers
def test_two_signs_that_flip_together_do_not_cancel():
    x = torch.ones(64, dtype=torch.float64)
    found = {int(checksum(x))}
    for i in range(1, 64):
        y = x.clone()
        y[[0, i]] = -1.
        found.add(int(checksum(y)))
    assert len(found) == 64

@pytest.mark.parametrize("unit", ["columns", "weights", "neurons"])
def test_a_locked_checksum_covers_what_the_digest_covers(unit):
    model, (n, d_ff) = small(), (2, 32)
    where = {
        "columns": region(model),
        "weights": Region.sample((n, 16, d_ff), .2, 0),
        "neurons": Neurons.sample(model, .2, 0, heads=True)}[unit]
    first = locked_digest(model, where), locked_checksum(model, where)
    differ = {True: 0, False: 0}
    for p in model.parameters():
        for k in range(0, p.numel(), 19):
            with torch.no_grad():
                old = p.view(-1)[k].item()
                p.view(-1)[k] = old + 1
                now = [
                    a != b
                    for a, b in zip(
                        (locked_digest(model, where), locked_checksum(model, where)), first)]
                p.view(-1)[k] = old
            assert now[0] == now[1]
            differ[now[0]] += 1
    assert min(differ.values()) > 5

# --- a GPU that is there

def gpu(test):
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))

def near(a, b, **limits):
    a, b = tree_leaves(a), tree_leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        if isinstance(x, (torch.Tensor, float)):
            torch.testing.assert_close(
                torch.as_tensor(y).cpu(), torch.as_tensor(x).cpu(), equal_nan=True, **limits)
        else: assert x == y

def held_by(found): # without the proofs, which differ by device
    return [x for x in tree_leaves(found) if not isinstance(x, str)]

@gpu
# which draws from the device's own generator
@pytest.mark.parametrize("door", [door for door in DOORS if door != "best_of"])
def test_a_gpu_gives_what_the_processor_gives(door):
    here, there = small(torch.float64), small(torch.float64).cuda()
    near(held_by(DOORS[door](here)), held_by(DOORS[door](there)), rtol=1e-3, atol=1e-4)
    near([*here.parameters()], [*there.parameters()], rtol=1e-3, atol=1e-4)
    assert all(p.is_cuda for p in there.parameters())

@gpu
@pytest.mark.parametrize("name", OWN["localizer"])
def test_scores_of_a_model_on_a_gpu_are_the_same_and_here(name):
    want, got = (scored(name, small(torch.float64).to(device)) for device in ("cpu", "cuda"))
    assert not any(x.is_cuda for x in tree_leaves(got))
    near(want, got, rtol=1e-4, atol=1e-8)

@gpu
@pytest.mark.parametrize("unit", ["columns", "weights", "neurons"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_locked_weights_on_a_gpu_keep_their_bits(dtype, unit):
    model = small(dtype).cuda()
    where = {
        "columns": region(model),
        "weights": Region.sample((2, 16, 32), .2, 0),
        "neurons": Neurons.sample(model, .2, 0, heads=True)}[unit]
    start, both = small(dtype).cuda(), lambda m: (
        locked_digest(m, where),
        locked_checksum(m, where))
    assert both(model) == both(small(dtype)), "bits are the same everywhere"
    before = both(model)
    trajectory, values = unlearn(
        model, where, GET, KEEP, PROBE, Recipe("npo", lr=1e-2, epochs=3, batch_size=4), 0)
    assert both(model) == before
    assert trajectory.locked_sha256 == before[1]
    assert trajectory.live_fraction == 1
    moved_weights = sum(int((p != q).sum()) for p, q in zip(model.parameters(), start.parameters()))
    assert 0 < moved_weights <= sum(column.numel() for _, column in values.values())
    put_columns(start, values)
    assert all(
        torch.equal(p.view(torch.uint8), q.view(torch.uint8))
        for p, q in zip(model.parameters(), start.parameters())), "the values are the whole change"

@gpu
def test_two_runs_on_a_gpu_are_bit_equal():
    found = []
    for _ in range(2):
        model = small().cuda()
        trajectory, values = unlearn(
            model,
            region(model),
            GET,
            KEEP,
            PROBE,
            Recipe("dpo", lr=5e-3, epochs=2, batch_size=4),
            0,
            REFUSALS)
        found.append((trajectory.points, plain(values)))
    assert same(*found)

@gpu
def test_a_gpu_is_not_waited_for_between_the_steps_of_an_epoch():
    x = torch.nn.Parameter(torch.ones(3, device="cuda"))
    def loss(batch, epoch):
        # the last one ends the epoch
        torch.cuda.set_sync_debug_mode("error" if batch < 4 else "default")
        return x.square().sum()
    means = []
    try:
        descend(
            [x],
            lambda epoch: range(5),
            loss,
            3,
            .01,
            after_epoch=lambda epoch, mean: means.append(mean))
    finally: torch.cuda.set_sync_debug_mode("default")
    assert means == sorted(means, reverse=True) and len(means) == 3 and x.isfinite().all()

@gpu
def test_a_run_on_a_gpu_that_diverges_is_named_by_step_and_keeps_its_parameters():
    kept = []
    for device in ("cpu", "cuda"):
        x = torch.nn.Parameter(torch.ones(2, device=device))
        with pytest.raises(
            FloatingPointError, match="the loss is inf at step 3 of epoch 2 .lr 0.1."):
            descend(
                [x],
                lambda epoch: range(5),
                lambda batch, epoch: x.sum() * (math.inf if (epoch, batch) == (1, 2) else 1.),
                3,
                .1)
        kept.append(x.detach())
    near(*kept, rtol=1e-6, atol=1e-6)

@gpu
def test_samples_of_a_gpu_depend_on_the_seed_alone():
    model = small().cuda()
    before, here = torch.cuda.get_rng_state(), torch.get_rng_state()
    first, again = (
        best_of(model, TOKENIZER, GET[:4], n=3, temperature=2., max_new_tokens=8, seed=1)
        for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), here)

@gpu
def test_a_proof_takes_a_gpu_no_second_model():
    model = (
        tiny_model("llama", 8000, d_model=512, n_layers=8, d_ff=4096, n_heads=8).bfloat16().cuda())
    where, size = region(model), sum(p.nbytes for p in model.parameters())
    locked_checksum(model, where)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    locked_checksum(model, where)
    assert torch.cuda.max_memory_allocated() - start < max(
        size / 4, 6 * 8 * 2**22), "blocks of words at a time"
