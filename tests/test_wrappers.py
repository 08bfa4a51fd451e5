"""What may be scored and unlocked is decided by what a module computes: adapters, hooks, wrappers
and layers that are none are refused in one line with the remedy, and device hooks and a Trainer
work."""
import copy
import pytest, torch, transformers
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D
from unloc.checkpoints import inspect
from unloc.heads import Neurons
from unloc.loading import load_model, recompute
from unloc.locked import locked_digest
from unloc.logits import bend_of, logits_of
from unloc.masked import is_unlocked, put_columns, unlock
from unloc.methods.activations import activations
from unloc.methods.gradient import gradient
from unloc.methods.weight_norm import weight_norm
from unloc.models import check_linear, output_projections, region_shape, tiny_model
from unloc.quantization import library_quantized, quantized
from unloc.regions import Region
from unloc.register import methods
from unloc.saving import save_change, save_model, save_pretrained
from unloc.scoring import score
from unloc.tokens import Example

IDS = torch.arange(2, 26).view(2, 12)
FACTS = [Example([5, 9, 7, 8, 1], 2), Example([6, 4, 1], 1)]
FACTS_TO_KEEP = [Example([9, 5, 7, 8, 1], 2)]
REGION = Region.sample((2, 24), .3, seed=0)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)

def small(dtype=torch.float32): return tiny_model("llama", 60, 16, 2, 24, 4).to(dtype)
def loss(model): return model(input_ids=IDS, labels=IDS).loss
def state(model): return {name: x.clone() for name, x in model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(x, b[name]) for name, x in a.items())

def doors(region=REGION):
    return [
        region_shape,
        weight_norm,
        lambda m: gradient(m, FACTS),
        lambda m: activations(m, FACTS),
        lambda m: locked_digest(m, region),
        lambda m: unlock(m, region).__enter__(),
        lambda m: put_columns(m, {0: (torch.tensor([1]), torch.zeros(1, 16))})]

def refused(model, says, through=None):
    for door in through or doors():
        with pytest.raises(ValueError, match=says) as error: door(model)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500

# --- the comparison itself

@DTYPES
@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(700, 30), lambda: nn.Linear(700, 30, bias=False), lambda: Conv1D(30, 700)],
    ids=["linear", "without bias", "transposed"])
def test_a_plain_layer_passes_in_every_dtype_and_draws_nothing(layer, dtype):
    torch.manual_seed(0)
    made = layer().to(dtype)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_linear(made, "it")
    assert torch.equal(torch.random.get_rng_state(), before)

class Doubled(nn.Linear):
    def forward(self, h): return super().forward(2 * h)
class Rectified(nn.Linear):
    def forward(self, h): return super().forward(h).relu()
class Mixed(nn.Linear):
    def forward(self, h): return super().forward(h.roll(1, dims=1)) # of tokens
class Rotated(nn.Linear):
    def forward(self, h): return super().forward(h.roll(1, dims=-1))
class Noisy(nn.Linear):
    def forward(self, h): return F.dropout(super().forward(h), .5)
class Failing(nn.Linear):
    def forward(self, h): raise KeyError("no")
class Low(nn.Linear): # an adapter of one's own
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.a, self.b = nn.Linear(self.in_features, 2, bias=False), nn.Linear(
            2, self.out_features, bias=False)
    def forward(self, h): return super().forward(h) + self.b(self.a(h))

@DTYPES
@pytest.mark.parametrize("kind", [Doubled, Rectified, Mixed, Rotated, Noisy, Failing, Low])
def test_a_subclass_that_computes_something_else_is_refused(kind, dtype):
    model = small(dtype)
    model.model.layers[1].mlp.down_proj = kind(24, 16, bias=False).to(dtype)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    refused(
        model,
        f"the output projection of layer 1, a {kind.__name__}, does not compute the product of its"
        " weight and its input .*; merge an adapter first")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.requires_grad for p in model.parameters())

def test_a_forward_put_into_one_module_is_seen_whenever_it_is_put_there():
    model = small()
    assert region_shape(model) == (2, 24)
    down = model.model.layers[0].mlp.down_proj
    plain, down.forward = down.forward, lambda h: 1.5 * F.linear(h, down.weight)
    refused(model, "layer 0, a Linear, does not compute the product .*differs by 50.0%")
    down.forward = plain # put there, and the same
    assert region_shape(model) == (2, 24)

def test_weights_that_are_not_finite_are_another_fault():
    model = small()
    with torch.no_grad(): output_projections(model)[0].weight[0, 0] = float("nan")
    assert region_shape(model) == (2, 24)

def test_neither_meta_nor_rehearsal_has_values_to_compare():
    with torch.device("meta"): model = transformers.LlamaForCausalLM(small().config)
    assert region_shape(model) == (2, 24)
    for door in (
        lambda: unlock(model, REGION).__enter__(),
        lambda: locked_digest(model, REGION),
        lambda: save_model(model, "nowhere")):
        with pytest.raises(
            ValueError,
            match=(
                "on the meta device: not loaded yet, or offloaded by device_map.; load the whole"
                " model on one device")):
            door()
    with FakeTensorMode():
        rehearsed = tiny_model("llama", 60, 16, 2, 24, 4)
        assert region_shape(rehearsed) == (2, 24)
        assert bend_of(rehearsed).slope == 1
        assert logits_of(rehearsed, torch.empty(3, 16)).shape == (3, 60)

@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: prune.random_unstructured(m, "weight", .5)],
    ids=["weight norm", "spectral norm", "pruning"])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_computed_is_refused(change):
    model = small()
    change(model.model.layers[1].mlp.down_proj)
    refused(
        model, "has a weight that is computed from other parameters .*; make it one parameter first"
    )

def test_parts_of_a_weight_are_refused():
    model = small()
    # as DeepSpeed and FSDP leave it
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.empty(0))
    refused(model, "of which other processes hold parts .*; load the whole model in one process")

def test_weights_of_inference_mode_are_refused():
    with torch.inference_mode(): model = small()
    refused(
        model,
        "was made inside torch.inference_mode, .*; load the model outside of it",
        doors()[4:6])
    model = small()
    with torch.inference_mode(), pytest.raises(
        ValueError, match="nothing can be trained inside torch.inference_mode"):
        unlock(model, REGION).__enter__()

@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"])
def test_what_neurons_and_heads_are_made_of_is_compared_too(name):
    model = small()
    parent = (
        model.model.layers[1].mlp
        if name in ("gate_proj", "up_proj")
        else model.model.layers[1].self_attn)
    own = getattr(parent, name)
    setattr(parent, name, Doubled(own.in_features, own.out_features, bias=False))
    chosen = Neurons(REGION, Region(torch.ones(2, 4, dtype=torch.bool)))
    for door in (lambda: unlock(model, chosen).__enter__(), lambda: locked_digest(model, chosen)):
        with pytest.raises(
            ValueError, match=f"model.layers.1.*{name}, a Doubled, does not compute the product"):
            door()
    setattr(parent, name, own)
    # tied to the other layer
    model.model.layers[0].get_submodule(
        "mlp" if parent is model.model.layers[1].mlp else "self_attn"
    ).get_submodule(name).weight = own.weight
    with pytest.raises(ValueError, match=f"model.layers.0.*{name} is tied"):
        locked_digest(model, chosen)
    # value vectors alone are not concerned
    assert region_shape(model) == (2, 24) and locked_digest(model, REGION)

def test_a_column_is_what_writes_by_its_place_not_by_its_name():
    # the rows of a gate are named by the gate, whatever the output projection is called
    model = small()
    model.model.layers[0].mlp.gate_proj.register_module("o_proj", nn.Identity())
    chosen = Neurons(REGION)
    start = state(model)
    with unlock(model, chosen) as columns:
        loss(model).backward()
        torch.optim.AdamW(columns.parameters(), lr=1e-2).step()
    moved = (
        (start["model.layers.0.mlp.gate_proj.weight"] != model.model.layers[0].mlp.gate_proj.weight)
        .any(1)
        .nonzero()
        .flatten())
    assert moved.tolist() == REGION.columns[0].tolist()

# --- rounding

def test_rounding_is_of_plain_layers_and_experts_alike():
    model = small()
    model.model.layers[0].self_attn.q_proj = Low(16, 16, bias=False)
    with pytest.raises(ValueError, match="self_attn.q_proj, a Low, does not compute"), quantized(
        model, 4):
        pass
    with unlock(model := small(), REGION), pytest.raises(
        ValueError,
        match="is unlocked, and each forward pass would write its columns over rounded ones",
    ), quantized(model, 4):
        pass
    config = transformers.OlmoeConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, intermediate_size=8, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1)
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config).eval()
    before = state(model)
    with quantized(model, 4):
        for name in ("gate_up_proj", "down_proj"):
            w = getattr(model.model.layers[0].mlp.experts, name)
            old = before[f"model.layers.0.mlp.experts.{name}"]
            assert max(len(row.unique()) for row in w.flatten(0, 1)) <= 16
            assert (w - old).abs().max() < .01
            assert not torch.equal(w, old)
    assert same(before, state(model))
    with pytest.raises(
        ValueError,
        match="experts.* holds the weights of experts, which bitsandbytes has no layer for",
    ), library_quantized(model, 8):
        pass

# --- hooks

def test_hooks_of_ones_own_are_part_of_the_model():
    plain, model = small(torch.float64), small(torch.float64)
    seen = []
    # one that changes the output, one that changes the input, one that looks
    for m in (plain, model):
        down = m.model.layers[0].mlp.down_proj
        down.register_forward_hook(lambda module, x, y: 3 * y)
        down.register_forward_pre_hook(lambda module, x: (x[0] * .5,))
        if m is model: down.register_forward_pre_hook(lambda module, x: seen.append(1))
    region_shape(model)
    assert not seen, "comparing calls no hook"
    loss(plain).backward()
    with unlock(model, REGION) as columns:
        loss(model).backward()
        for p, index, layer in zip(columns.parameters(), REGION.columns, plain.model.layers):
            torch.testing.assert_close(
                p.grad, layer.mlp.down_proj.weight.grad[:, index].T, rtol=1e-10, atol=1e-13)
    plain.zero_grad()
    for e in FACTS:
        (
            F.cross_entropy(
                plain(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1],
                torch.tensor(e.ids[e.start:]))
            / len(FACTS)).backward()
    want = torch.stack(
        [layer.mlp.down_proj.weight.grad.abs().sum(0) for layer in plain.model.layers])
    torch.testing.assert_close(gradient(model, FACTS).double(), want, rtol=1e-5, atol=1e-9)

def hooked(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        if not list(module.children()):
            hooks.add_hook_to_module(
                module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for block in model.model.layers:
        hooks.add_hook_to_module(
            block, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model

@pytest.mark.parametrize(
    "region",
    [
        REGION,
        Region.sample((2, 16, 24), .2, seed=0),
        Neurons(REGION, Region(torch.arange(8).view(2, 4) % 3 == 0))],
    ids=["columns", "weights", "neurons"])
def test_device_hooks_are_no_mark_of_ours_and_stay(region, tmp_path):
    plain, model = small(), hooked(small())
    forwards = {
        name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)}
    assert len(forwards) > 10
    assert not is_unlocked(model)
    assert locked_digest(model, region) == locked_digest(plain, region)
    def trained(m):
        with unlock(m, region) as columns:
            assert is_unlocked(m)
            with pytest.raises(ValueError, match="unlocked already"), unlock(m, region): pass
            with pytest.raises(ValueError, match="leave the `with unlock"):
                save_model(m, tmp_path / "no")
            optimizer = torch.optim.AdamW(columns.parameters(), lr=1e-2)
            for _ in range(3): loss(m).backward(); optimizer.step(); optimizer.zero_grad()
    for m in (plain, model): trained(m)
    assert same(state(plain), state(model))
    assert {
        name: vars(m)["forward"] for name, m in model.named_modules() if "forward" in vars(m)
    } == forwards
    torch.testing.assert_close(gradient(model, FACTS), gradient(plain, FACTS), rtol=0, atol=0)
    save_model(model, tmp_path / "m")
    assert same(state(load_model(tmp_path / "m", "float32")), state(plain))

def test_recomputing_knows_its_own_mark():
    model = hooked(small())
    before = [vars(block)["forward"] for block in model.model.layers]
    plain = torch.autograd.grad(loss(model), output_projections(model)[0].weight)[0]
    calls = []
    handle = output_projections(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2): recompute(model)
    assert (
        torch.equal(torch.autograd.grad(loss(model), output_projections(model)[0].weight)[0], plain)
        and len(calls) == 2), "each block runs once more, and once only"
    for _ in range(2): recompute(model, False)
    assert [vars(block)["forward"] for block in model.model.layers] == before
    handle.remove()

def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(small(), execution_device=torch.device("cpu"))
    refused(
        model,
        "is offloaded by device_map, its weights are not in memory; load the whole model on one"
        " device")

# --- wrappers

def test_wrappers_name_the_model_inside():
    model = small()
    refused(
        nn.DataParallel(model),
        "a DataParallel is no transformers model; give the model inside it: model.module")
    refused(
        nn.Sequential(model),
        "a Sequential is no transformers model; give transformers' own causal language model")
    refused(
        model.lm_head,
        "a Linear is no transformers model; give transformers' own causal language model")
    refused(model.model, "give transformers' own causal language model", [region_shape])
    assert region_shape(torch.compile(model)) == (2, 24)

@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_models_of_several_processes_are_refused(one_process):
    refused(
        nn.parallel.DistributedDataParallel(small()),
        "a DistributedDataParallel is no transformers model; give the model inside it:"
        " model.module")
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    model = small()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    refused(
        model,
        "a DTensor of torch.float32 .*, of which other processes hold parts .*; load the whole"
        " model in one process")

# --- adapters

@pytest.fixture
def peft(): return pytest.importorskip("peft")

def adapted(peft, target, **more):
    model = small()
    model.add_adapter(peft.LoraConfig(target_modules=target, init_lora_weights=False, **more))
    return model

@pytest.mark.parametrize(
    "target", [["down_proj"], ["q_proj"], ["gate_proj", "v_proj"], ["lm_head"]], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_anywhere_is_refused(peft, target, tmp_path):
    model = adapted(peft, target)
    refused(
        model,
        r"holds an adapter .*; merge the adapter first .*merge_and_unload.*, or load the model"
        r" without it")
    for save in (save_model, save_pretrained, lambda m, path: save_change(m, REGION, path)):
        with pytest.raises(ValueError, match="merge the adapter first"): save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="merge the adapter first"), quantized(model, 4): pass
    assert not (tmp_path / "m").exists()

@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_does_nothing_yet_is_one(peft): # zeros: it computes the plain product
    model = small()
    model.add_adapter(peft.LoraConfig(target_modules=["down_proj"]))
    refused(model, "merge the adapter first")
    model.disable_adapters()
    refused(model, "merge the adapter first")

@pytest.mark.filterwarnings("ignore")
def test_a_peft_model_is_refused_and_merged_it_trains(peft):
    wrapped = peft.get_peft_model(
        small(torch.float64),
        peft.LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False))
    refused(
        wrapped,
        r"a PeftModel wraps the model and changes what it computes; merge the adapter first: model"
        r" = model.merge_and_unload\(\)")
    refused(wrapped.base_model.model, "holds an adapter") # the wrapped model holds it, too
    want = wrapped(input_ids=IDS).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, want)
    loss(plain := copy.deepcopy(merged).requires_grad_(True)).backward()
    with unlock(merged, REGION) as columns:
        loss(merged).backward()
        for p, index, layer in zip(columns.parameters(), REGION.columns, plain.model.layers):
            torch.testing.assert_close(
                p.grad, layer.mlp.down_proj.weight.grad[:, index].T, rtol=1e-10, atol=1e-13)

def test_prompts_that_are_trained_are_refused(peft):
    wrapped = peft.get_peft_model(
        small(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(wrapped, "a PeftModelForCausalLM wraps the model")

@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_folder_with_an_adapter_is_refused(installed, tmp_path, monkeypatch):
    if installed:
        adapted(pytest.importorskip("peft"), ["down_proj"]).save_pretrained(tmp_path / "a")
    else:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "base_model_name_or_path": "some/model"}', "utf-8")
        monkeypatch.setattr(transformers.utils.import_utils, "is_peft_available", lambda: False)
    # alone, and next to a whole model, which transformers would change with it
    for both in (False, True):
        if both: small().save_pretrained(tmp_path / "a")
        for door in (inspect, load_model):
            with pytest.raises(
                ValueError,
                match=(
                    r"a: an adapter \(LORA, of .*\), not a whole model; merge it first:"
                    r" .*merge_and_unload")) as error:
                door(tmp_path / "a")
            assert "\n" not in str(error.value)
    (tmp_path / "a" / "adapter_config.json").write_text("[", "utf-8")
    with pytest.raises(ValueError, match="an adapter .of unknown kind"): inspect(tmp_path / "a")

# --- an optimizer that holds nothing

@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters()),
        lambda m: torch.optim.SGD([{"params": []}], lr=.1),
        lambda m: torch.optim.Adam(m.lm_head.parameters())],
    ids=["all", "none", "some"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_an_optimizer_without_columns_is_stopped(make, when):
    model = small()
    if when == "before": optimizer = make(model)
    with unlock(model, REGION) as columns:
        if when == "inside": optimizer = make(model)
        loss(model).backward()
        with pytest.raises(
            RuntimeError,
            match=r"holds none of the unlocked columns, .*AdamW\(columns.parameters\(\)\)",
        ) as error:
            optimizer.step()
        assert "\n" not in str(error.value)
        # these hold them, or have nothing to do with the model
        torch.optim.AdamW(columns.parameters()).step()
        torch.optim.AdamW([*columns.parameters(), *model.parameters()]).step()
        (other := nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=.1).step()
    optimizer.step()
    assert "zero_grad" not in vars(model)

def test_clearing_the_model_clears_the_columns():
    model = small()
    with unlock(model, REGION) as columns:
        loss(model).backward()
        model.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in columns.parameters())
        model.zero_grad()
        assert all(p.grad is None for p in columns.parameters())

def trainer_of(model, folder, columns=None, steps=4):
    pytest.importorskip("accelerate")
    how = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, logging_strategy="no", seed=0)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    optimizer = None if columns is None else torch.optim.SGD(columns.parameters(), lr=.1)
    return transformers.Trainer(model, how, train_dataset=rows, optimizers=(optimizer, None))

def test_a_trainer_trains_the_columns_it_is_given_and_stops_without(tmp_path):
    model, plain = small(), small()
    before = state(model)
    with unlock(model, REGION):
        with pytest.raises(
            RuntimeError,
            match=r"of a Trainer: optimizers=\(AdamW\(columns.parameters\(\)\), None\)"):
            trainer_of(model, tmp_path).train()
    assert same(state(model), before)
    with unlock(model, REGION) as columns: trainer_of(model, tmp_path, columns).train()
    with unlock(plain, REGION) as columns: # the same steps by hand, each from its own gradient
        optimizer = torch.optim.SGD(columns.parameters(), lr=.1)
        for _ in range(4): loss(plain).backward(); optimizer.step(); optimizer.zero_grad()
    for a, b, old in zip(
        output_projections(model),
        output_projections(plain),
        (before[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2))):
        assert not torch.equal(a.weight, old)
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-7)
    assert locked_digest(model, REGION) == locked_digest(small(), REGION)

# --- values of another model

@pytest.mark.parametrize(
    "values, says",
    [
        (
            {7: (torch.tensor([1]), torch.zeros(1, 16))},
            "values for layer 7, the model has 2 layers"),
        (
            {0: (torch.tensor([30]), torch.zeros(1, 16))},
            r"layer 0: 1 places up to 30 with values \[1, 16\] do not fit its weight \[16, 24\]"),
        ({1: (torch.tensor([3]), torch.zeros(1, 8))}, "layer 1: 1 places"),
        ({1: (torch.tensor([500]), torch.zeros(1))}, "layer 1: 1 places up to 500"),
        (
            {"model.layers.0.mlp.fc1": (torch.tensor([1]), torch.zeros(1, 16))},
            "values for model.layers.0.mlp.fc1, which this LlamaForCausalLM does not have")])
def test_values_that_do_not_fit_name_their_layer_and_change_nothing(values, says):
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match=says):
        put_columns(model, {0: (torch.tensor([1]), torch.ones(1, 16))} | values)
    assert same(state(model), before)

# --- measuring

def test_what_measures_names_its_cause_too(tmp_path):
    from unloc.logits import answer_logits
    from unloc.tokens import collate
    model = small()
    for door in (
        lambda m: answer_logits(m, collate(FACTS)),
        lambda m: logits_of(m, torch.zeros(1, 16))):
        refused(nn.DataParallel(model), "give the model inside it: model.module", [door])
    for door in (lambda m: logits_of(m, torch.zeros(1, 16)), lambda m: score(m, FACTS)):
        refused(
            transformers.LlamaForSequenceClassification(model.config),
            "a LlamaForSequenceClassification has no output layer; give transformers' own causal"
            " language model",
            [door])

@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_is_measured_as_it_is(
    peft
): # gradients and weights are not concerned
    model = adapted(peft, ["down_proj", "q_proj"])
    want = [
        F.cross_entropy(
            model(input_ids=torch.tensor([e.ids])).logits[0, e.start - 1:-1],
            torch.tensor(e.ids[e.start:])).item()
        for e in FACTS]
    assert score(model, FACTS).nll.tolist() == pytest.approx(want, rel=1e-5)
    assert score(small(), FACTS).nll.tolist() != pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_layers_of_a_quantization_library_are_refused(kind):
    layers = pytest.importorskip("bitsandbytes").nn
    model = small()
    made = (
        layers.Linear8bitLt(24, 16, bias=False, has_fp16_weights=False)
        if kind == "Linear8bitLt"
        else layers.Linear4bit(24, 16, bias=False))
    model.model.layers[0].mlp.down_proj = made.to("cpu")
    refused(
        model,
        "a quantized checkpoint has to be loaded in bfloat16 or float32|does not compute the"
        " product")

def test_a_trained_prompt_has_a_remedy_of_its_own(peft):
    wrapped = peft.get_peft_model(
        small(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(
        wrapped, r"a prompt cannot be merged; give the model without it: model.get_base_model\(\)")
    assert region_shape(wrapped.get_base_model()) == (2, 24)

@pytest.mark.filterwarnings("ignore")
def test_an_output_layer_of_integers_is_named():
    model = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
    with pytest.raises(
        ValueError,
        match=(
            "the output layer, a Linear of torch.ao.*, has no weight of floats; load the model"
            " unquantized")):
        score(model, FACTS)

def test_gradients_of_before_do_not_move_locked_weights():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model).backward()
    before = locked_digest(model, REGION)
    with unlock(model, REGION) as columns:
        optimizer.add_param_group({"params": columns.parameters()})
        loss(model).backward()
        with pytest.raises(
            RuntimeError,
            match=(
                "holds weights outside of the region that have a gradient, so its step would move"
                " them; make it of the columns alone")):
            optimizer.step()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert locked_digest(model, REGION) == before

# --- a weight that is used past its layer

# an MLP that takes the weight of its output projection and leaves the layer out
class Past(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn)
    def forward(self, x):
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

def test_a_projection_that_is_never_called_is_named():
    from unloc import training
    model = small()
    model.model.layers[0].mlp = Past(model.model.layers[0].mlp)
    for method in methods("localizer").values():
        # those of layers take gradients of the weights themselves, however they are used
        if not method.takes("forget") or method.name.startswith("tgl"): continue
        with pytest.raises(
            ValueError,
            match=(
                "the model does not call the output projection of layer 0, it uses the weight in"
                " another way")):
            method(model=model, forget=FACTS, retain=FACTS_TO_KEEP)
    model.model.layers[1].mlp = Past(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match="the loss does not depend on what is to be trained"):
        training.inject(
            model, Region.sample((2, 24), .25, 0), FACTS, epochs=1, lr=1e-2, batch_size=2, seed=0)
