"""Checkpoints: what is wrong is said in one line before a weight is read, weights are held once,
and saving and patching are exact to the bit."""
import copy, hashlib, json, os, pickle, re, shutil, subprocess, sys, threading, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from unloc import checkpoints, loading, saving
from unloc.checkpoints import inspect
from unloc.loading import check_device, free_memory, load_model, load_tokenizer, recompute
from unloc.masked import put_columns, unlock
from unloc.models import output_projections, region_shape, tiny_model, value_vectors
from unloc.regions import Region
from unloc.register import methods
from unloc.saving import apply_change, save_change, save_model, save_pretrained
from unloc.tokens import Example, train_tokenizer

SMALL = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1)
def build(name, **config):
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL | config))
MODELS = {
    "llama": lambda: build("Llama", intermediate_size=24),
    "olmo2": lambda: build("Olmo2", intermediate_size=24),
    "gemma2": lambda: build("Gemma2", intermediate_size=24, head_dim=8), # embeddings tied
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)
    ), # transposed and tied
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=60, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2,
            ffn_dim=24, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=None, eos_token_id=1)),
    "olmoe": lambda: build(
        "Olmoe", intermediate_size=12, num_experts=4, num_experts_per_tok=2
    ), # one file tensor per expert
}
WIDTH = {"gpt2": 64, "olmoe": 48}
IDS = torch.arange(2, 50).view(2, 24)

def make(name, dtype="float32", seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().to(getattr(torch, dtype)).eval()

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

def copied(model):
    again = type(model)(model.config).to(model.dtype).eval()
    again.load_state_dict(model.state_dict())
    return again

def train(model, region, steps=3, lr=1e-2):
    with unlock(model, region) as columns:
        optimizer = torch.optim.AdamW(columns.parameters(), lr=lr)
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

@pytest.fixture(scope="module")
def pieces(tmp_path_factory): # a llama in several files
    folder = tmp_path_factory.mktemp("pieces") / "llama"
    make("llama", "bfloat16").save_pretrained(folder, max_shard_size="4KB")
    return folder

@pytest.fixture
def folder(pieces, tmp_path): return Path(shutil.copytree(pieces, tmp_path / "llama"))

@pytest.fixture
def unread(monkeypatch): # reading weights is an error
    def refuse(*_, **__): raise AssertionError("the weights were read")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)

def complaint(call, *args, **more):
    with pytest.raises(ValueError) as error: call(*args, **more)
    assert "\n" not in str(error.value)
    return str(error.value)

def edit(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | entries), "utf-8")

# --- what a checkpoint holds

@pytest.mark.parametrize("shards", ["4KB", "5GB"])
@pytest.mark.parametrize("name", MODELS)
def test_inspect_says_what_loading_would(name, shards, tmp_path):
    model = make(name, "bfloat16")
    model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    found, n = inspect(tmp_path / "m"), sum(p.numel() for p in model.parameters())
    assert (found.n_layers, found.d_ff) == region_shape(model) == (2, WIDTH.get(name, 24))
    assert (found.d_model, found.vocab_size, found.dtype) == (16, 60, "bfloat16")
    assert found.n_weights == n
    assert found.weights_bytes == 2 * n
    assert found.bytes_in("float32") == 4 * n
    assert found.missing == ()
    assert found.commit == ""
    assert found.model_type == name
    assert set(found.files) == {f.name for f in (tmp_path / "m").glob("*.safetensors")}
    assert (len(found.files) > 1) == (shards == "4KB")

def test_the_digest_sees_every_byte(folder, pieces):
    first = inspect(folder).digest()
    assert first == inspect(pieces).digest() and len(first) == 64
    file = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert inspect(folder).digest() != first
    shutil.copy(pieces / file.name, file)
    assert inspect(folder).digest() == first
    edit(folder, rms_norm_eps=1e-4)
    assert inspect(folder).digest() != first

# --- what is wrong with it

def header_length(file): return int.from_bytes(file.read_bytes()[:8], "little")

@pytest.mark.parametrize("at", ["empty", "length", "header", "data", "last", "long"])
def test_a_file_of_the_wrong_length_is_named(folder, unread, at):
    file = sorted(folder.glob("*.safetensors"))[1]
    size = file.stat().st_size
    os.truncate(
        file,
        {
            "empty": 0,
            "length": 5,
            "header": 60,
            "data": 8 + header_length(file) + 1,
            "last": size - 1,
            "long": size + 1}[at])
    said = complaint(load_model, folder)
    assert said.startswith(str(file))
    assert {
        "empty": "not a safetensors file",
        "length": "not a safetensors file",
        "long": f"too long, {size + 1} bytes, {size} expected"}.get(at, "cut short") in said
    assert "fetch the file again" in said

@pytest.mark.parametrize(
    "data, why",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a pointer of Git LFS"),
        (b"\x00" * 200, "does not list tensors"),
        (b"\xff" * 200, "no header of plausible length"),
        ((4).to_bytes(8, "little") + b"[1]\n", "does not list tensors"),
        ((8).to_bytes(8, "little") + b'{"a":{}}', "does not list tensors"),
        ((4).to_bytes(8, "little") + b"\xff\xfe{}", "does not list tensors")])
def test_a_file_of_another_kind_is_named(folder, unread, data, why):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(data)
    assert complaint(load_model, folder).startswith(str(file))
    assert why in complaint(load_model, folder)

def test_a_missing_shard_is_named(folder, unread):
    file = sorted(folder.glob("*.safetensors"))[2]
    file.unlink()
    assert f"{file.name} is missing" in complaint(load_model, folder)

def test_a_tensor_that_the_index_promises_is_missed(folder, unread):
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    index["weight_map"]["ghost.weight"] = sorted(folder.glob("*.safetensors"))[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "ghost.weight is not in it (1 of" in complaint(load_model, folder)

@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(folder, unread, text):
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")
    assert "model.safetensors.index.json: not an index of weight files" in complaint(
        load_model, folder)

@pytest.mark.parametrize(
    "entries, why",
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantized weights \(bitsandbytes, 4-bit\)"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            r"quantized weights \(bitsandbytes, 8-bit\)"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            r"quantized weights \(gptq, 3-bit\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized weights \(fp8\)"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}},
            r"quantized weights \(awq, 4-bit\)"),
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.Config"}},
            "'mystery' needs code that the checkpoint brings along, which is never run"),
        ({"model_type": "mystery"}, "has no causal language model 'mystery'"),
        ({"model_type": "bert-generation-x"}, "has no causal language model"),
        ({"model_type": None}, "no configuration of a model"),
        (
            {"intermediate_size": 48},
            (
                r"is \[24, 16\] in the weight files and \[48, 16\] by config.json|is \[16, 24\] in"
                r" the weight files and \[16, 48\] by config.json")),
        ({"hidden_act": "none such"}, "cannot build a model from config.json")])
def test_a_configuration_that_cannot_be_loaded(folder, unread, entries, why):
    edit(folder, **entries)
    assert re.search(why, complaint(load_model, folder))

def test_an_architecture_without_a_finder_is_named_before_it_is_loaded(tmp_path, unread):
    transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=40, hidden_size=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)
    ).save_pretrained(tmp_path / "m")
    assert "no output projection is known for architecture 'bloom'" in complaint(
        load_model, tmp_path / "m")

@pytest.mark.parametrize("text", ["", "not json", "[]", "3", "\xff"])
def test_a_broken_config_is_named(folder, unread, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json: no configuration of a model" in complaint(load_model, folder)

def test_folders_that_hold_no_checkpoint(folder, tmp_path, unread):
    assert "no config.json in the folder" in complaint(load_model, tmp_path)
    for file in folder.glob("*.safetensors*"): file.unlink()
    assert "no weights; expected model.safetensors" in complaint(load_model, folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps(1))
    assert (
        "only pickled weights (pytorch_model-00001-of-00002.bin), which can run any code"
        in complaint(load_model, folder))
    for nowhere in ("nowhere at all", "", "~nobody", tmp_path / "gone", "a/b/c"):
        assert "no such folder; expected a folder" in complaint(load_model, nowhere)
    assert "which has no revisions" in complaint(load_model, folder, revision="main")

def test_code_beside_a_known_architecture_is_not_run(folder):
    edit(folder, auto_map={"AutoConfig": "bad.C", "AutoModelForCausalLM": "bad.M"})
    (folder / "bad.py").write_text("raise SystemExit('code of a checkpoint was run')", "utf-8")
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"

def test_a_weight_without_a_file_is_never_made_up(tmp_path):
    make("llama").save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    assert "no weights for lm_head.weight (2 in all)" in complaint(
        load_model, tmp_path / "m", "float32")

def test_integer_weights_are_refused(tmp_path, unread):
    make("llama").save_pretrained(tmp_path / "m")
    save_file(
        {k: v.to(torch.int8) for k, v in load_file(tmp_path / "m/model.safetensors").items()},
        tmp_path / "m/model.safetensors",
        {"format": "pt"})
    assert "most weights are of type I8; expected float64, float32, float16, bfloat16" in complaint(
        load_model, tmp_path / "m")

# --- the device

@pytest.mark.parametrize(
    "dtype, device, why",
    [
        ("int4", "cpu", "unknown dtype 'int4'"),
        ("float8_e4m3fn", "cpu", "unknown dtype"),
        ("float32", "abacus", "unknown device 'abacus'"),
        ("float32", "meta", "unknown device 'meta'"),
        ("float32", "cuda:64", "torch sees .* CUDA devices here"),
        ("float32", "", "unknown device ''")])
def test_a_device_or_dtype_that_is_not_there(folder, unread, dtype, device, why):
    assert re.search(why, complaint(load_model, folder, dtype, device))

def test_a_dtype_that_the_device_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    for able, fine in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 1), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, able=able: able)
        assert (
            check_device("float16", "cuda").type == check_device("float32", "cuda:0").type == "cuda"
        )
        if fine: assert check_device("bfloat16", "cuda").type == "cuda"
        else:
            assert (
                "bfloat16 needs a GPU of compute capability 8.0, Tesla V100 has"
                f" {able[0]}.{able[1]}; use float32"
                in complaint(check_device, "bfloat16", "cuda"))
    assert "torch sees 1 CUDA devices here" in complaint(check_device, "float32", "cuda:1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert check_device("float32", "mps").type == "mps"
    assert "float64 does not exist on mps" in complaint(check_device, "float64", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "torch sees no Apple GPU" in complaint(check_device, "float32", "mps")

def test_too_little_memory_is_said_before_loading(pieces, unread, monkeypatch):
    free, n = {}, inspect(pieces).n_weights
    monkeypatch.setattr(loading, "free_memory", lambda where: free[str(where)])
    monkeypatch.setattr(loading, "check_device", lambda dtype, device: torch.device(device))
    def tried(dtype, device, **memory):
        free.clear(); free.update({k.replace("_", ":"): v for k, v in memory.items()})
        try: load_model(pieces, dtype, device)
        except AssertionError: return "read"
        except ValueError as error: return str(error)
    assert tried("bfloat16", "cpu", cpu=2 * n) == "read"
    assert "in bfloat16, cpu has" in tried("bfloat16", "cpu", cpu=2 * n - 1)
    assert (
        tried("bfloat16", "cuda:1", cuda_1=2 * n) == "read"
    ), "no conversion, so nothing of the processor's memory"
    assert "in bfloat16, cuda:1 has" in tried("bfloat16", "cuda:1", cuda_1=2 * n - 1)
    assert "in float32, cpu has" in tried("float32", "cuda:1", cuda_1=9 * n, cpu=4 * n - 1)
    assert tried("float32", "cuda:1", cuda_1=4 * n, cpu=4 * n) == "read"
    assert "or load it in bfloat16 (" in tried("float32", "cpu", cpu=0)
    assert "or load" not in tried("float16", "cpu", cpu=0)

def test_sizes_are_readable_and_free_memory_is_what_is_left():
    assert loading.readable_size(3 * 2**30) == "3 GiB"
    assert loading.readable_size(2**20) == "1 MiB"
    assert loading.readable_size(16_060_522_496) == "15 GiB"
    import psutil
    assert abs(free_memory("cpu") - psutil.virtual_memory().available) < 2**29

@pytest.mark.parametrize(
    "attention, expected", [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention(pieces, attention, expected):
    assert load_model(pieces, attention=attention).config._attn_implementation == expected

def test_flash_attention_is_asked_for_in_vain(pieces, unread, monkeypatch):
    assert "unknown attention 'fast'; expected sdpa, eager or flash" in complaint(
        load_model, pieces, attention="fast")
    assert "flash attention needs a CUDA device; use attention='sdpa'" in complaint(
        load_model, pieces, attention="flash")
    monkeypatch.setattr(loading, "check_device", lambda dtype, device: torch.device(device))
    monkeypatch.setattr(loading, "free_memory", lambda where: 2**40)
    assert "flash attention needs float16 or bfloat16" in complaint(
        load_model, pieces, "float32", "cuda", attention="flash")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert "flash attention needs the package flash-attn" in complaint(
        load_model, pieces, "bfloat16", "cuda", attention="flash")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(AssertionError, match="were read"):
        load_model(pieces, "bfloat16", "cuda", attention="flash")

# --- gradient checkpointing

def gradients(model):
    kept = {}
    def pack(x): kept[x.untyped_storage().data_ptr()] = x.nbytes; return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, sum(kept.values())

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_memory_and_no_gradient(
    name
): # also where a model keeps a cache, as it does unless told otherwise
    model = make(name)
    output_projections(model) # puts the experts side by side
    expected, plain = gradients(model)
    for _ in range(2): recompute(model) # twice is once
    found, less = gradients(model)
    assert equal(found, expected) and less < .7 * plain and not model.training
    region = Region.sample(region_shape(model), .3, seed=1)
    a, b = copied(model), copied(model)
    recompute(b)
    train(a, region), train(b, region)
    assert same(a, b), "training a region is the same to the bit"
    assert model.state_dict().keys() == make(name).state_dict().keys()
    logits = model(input_ids=IDS).logits
    with torch.no_grad():
        said = model.generate(
            IDS[:, :5], max_new_tokens=6, do_sample=False, attention_mask=torch.ones(2, 5))
    recompute(model, on=False)
    assert not any("forward" in vars(m) for m in model.modules())
    assert gradients(model)[1] == plain
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert torch.equal(
        model.generate(
            IDS[:, :5], max_new_tokens=6, do_sample=False, attention_mask=torch.ones(2, 5)),
        said)

def test_transformers_own_switch_does_nothing_in_evaluation_mode():
    model = make("llama")
    plain = gradients(model)[1]
    with warnings.catch_warnings(action="ignore"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert gradients(model)[1] == plain

def test_a_model_is_loaded_with_recomputing(pieces):
    model = load_model(pieces, gradient_checkpointing=True)
    assert all("forward" in vars(layer) for layer in model.model.layers)
    assert equal(gradients(model)[0], gradients(load_model(pieces))[0])

# these run a model with other states in its middle, which recomputing does not repeat
PATCHED = {"edit_size", "knowledge_neurons"}

@pytest.mark.parametrize("name", sorted(methods("localizer").keys() - PATCHED))
def test_localizers_see_no_difference(name):
    plain, model = make("llama"), make("llama")
    recompute(model)
    forget, retain = (
        [
            Example(
                torch.randint(2, 60, (9,), generator=torch.Generator().manual_seed(s)).tolist(), 4)
            for s in range(k, k + 3)]
        for k in (0, 9))
    found = [
        methods("localizer")[name](model=m, forget=forget, retain=retain, seed=0)
        for m in (plain, model)]
    a, b = (x if isinstance(x, list) else [x] for x in found)
    assert all(map(torch.equal, a, b))

# --- saving a model

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_reloads_to_the_bit(name, dtype, tmp_path):
    model = make(name, dtype)
    model.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype)
    assert same(model, make(name, dtype))
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    train(model, Region.sample(region_shape(model), .3, seed=0))
    assert not same(model, make(name, dtype))
    save_model(model, tmp_path / "deeper" / "trained", max_shard_size="6KB")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "deeper" / "trained"), model)
    assert same(load_model(tmp_path / "deeper" / "trained", dtype), model)
    assert inspect(tmp_path / "deeper" / "trained").dtype == dtype
    assert [f.name for f in (tmp_path / "deeper").iterdir()] == ["trained"]

@pytest.mark.parametrize(
    "source, dtype",
    [
        ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16"),
        ("float32", "float64")])
def test_loading_in_another_dtype_rounds_once(source, dtype, tmp_path):
    make("llama", source).save_pretrained(tmp_path / "m")
    assert same(load_model(tmp_path / "m", dtype), make("llama", source).to(getattr(torch, dtype)))

def test_the_tokenizer_goes_along(tmp_path):
    tokenizer = train_tokenizer(["some words to merge, some more words"], 280)
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_model(make("llama"), tmp_path / "m", tokenizer)
    again = load_tokenizer(tmp_path / "m")
    assert again.encode("some words") == tokenizer.encode("some words")
    assert (again.eos_token, again.chat_template) == ("<eos>", tokenizer.chat_template)
    save_model(make("llama"), tmp_path / "bare")
    assert "no tokenizer that transformers can load" in complaint(load_tokenizer, tmp_path / "bare")
    assert "no such folder" in complaint(load_tokenizer, tmp_path / "gone")

def test_saving_leaves_all_or_nothing(tmp_path, monkeypatch):
    model = make("llama")
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "rest").write_text("of a process that was killed", "utf-8")
    save_model(model, tmp_path / "m")
    before = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    assert "rest" not in before
    assert f"{tmp_path / 'm'} exists already and stays as it is" in complaint(
        save_model, make("llama", seed=1), tmp_path / "m")
    def torn(folder, **_):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")
    for error in (OSError, KeyboardInterrupt):
        monkeypatch.setattr(
            model,
            "save_pretrained",
            torn if error is OSError else lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(error): save_model(model, tmp_path / "other")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "the disk has 0.000954 MiB left" in complaint(save_model, model, tmp_path / "other")
    assert {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["m"]

def test_an_unlocked_model_is_not_saved(tmp_path):
    model = make("gpt2")
    region = Region.sample(region_shape(model), .3, seed=0)
    save_change(model, region, tmp_path / "c")
    with unlock(model, region):
        for call, args in (
            (save_model, (model, tmp_path / "m")),
            (save_change, (model, region, tmp_path / "d")),
            (apply_change, (model, tmp_path / "c"))):
            assert "the model is unlocked" in complaint(call, *args)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c"]
    recompute(model)
    save_model(model, tmp_path / "m") # a recomputing block is not an unlocked one
    assert same(load_model(tmp_path / "m", "float32"), make("gpt2"))

def test_a_configuration_of_sampling_does_not_stop_saving(tmp_path, pieces):
    model = make("llama")
    model.save_pretrained(tmp_path / "m")
    # as Llama 2 came
    (tmp_path / "m" / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": .6, "top_p": .9, "eos_token_id": 1}),
        "utf-8")
    save_model(load_model(tmp_path / "m", "float32"), tmp_path / "again")
    assert same(load_model(tmp_path / "again", "float32"), model)

# --- saving a change

def regions(model): # of value vectors, also without one layer; of single weights
    n, d = region_shape(model)
    half = torch.zeros(n, d, dtype=torch.bool)
    half[1, ::3] = True
    return {
        "vectors": Region.sample((n, d), .3, seed=2),
        "layer": Region(half),
        "weights": Region.sample((n, 16, d), .1, seed=3)}

@pytest.mark.parametrize("kind", ["vectors", "layer", "weights"])
@pytest.mark.parametrize(
    "name, dtype",
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "bfloat16"), ("olmoe", "float16")])
def test_a_change_is_exact_and_comes_off_again(name, dtype, kind, tmp_path):
    base, file = make(name, dtype), tmp_path / "change.safetensors"
    region = regions(base)[kind]
    trained = copied(base)
    train(trained, region)
    save_change(trained, region, file, base="tiny")
    assert file.stat().st_size < 2000 + len(region) * (
        8 + getattr(torch, dtype).itemsize * (1 if kind == "weights" else 16))
    model = copied(base)
    replaced = apply_change(model, file)
    assert same(model, trained) and not same(model, base)
    put_columns(model, replaced)
    assert same(model, base)
    put_columns(
        model, {layer: (index, columns + 1) for layer, (index, columns) in replaced.items()})
    apply_change(model, file), apply_change(model, file)
    assert same(model, trained), "what the region held before does not matter"
    save_model(model, tmp_path / "m")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), trained)

def test_a_difference_would_not_be_exact(): # why the file holds columns
    base, trained = make("llama", "bfloat16"), make("llama", "bfloat16")
    train(trained, Region.sample((2, 24), 1., seed=0), lr=1e-3)
    a, b = (value_vectors(output_projections(m)[0]) for m in (base, trained))
    assert (a + (b - a) != b).any() and (a != b).all(0).any()

@pytest.mark.parametrize(
    "where",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.weight"])
def test_one_bit_outside_the_region_is_another_base(where, tmp_path):
    base, file = make("llama", "bfloat16"), tmp_path / "change"
    region = regions(base)["vectors"]
    trained = copied(base)
    train(trained, region)
    save_change(trained, region, file, base="tiny llama")
    with torch.no_grad():
        weight = base.get_parameter(where)
        place = (0,) if weight.ndim == 1 else (3, int((~region.mask[1]).nonzero()[0]))
        weight.view(torch.int16)[place] ^= 1
    before = copied(base)
    said = complaint(apply_change, base, file)
    assert (
        "the change belongs to another base model, tiny llama: outside the region its weights have"
        " the SHA-256"
        in said)
    assert "nothing was changed" in said
    assert same(base, before)

def test_a_change_of_another_shape_dtype_or_kind_is_refused(tmp_path):
    model, file = make("llama", "bfloat16"), tmp_path / "change"
    save_change(model, regions(model)["weights"], file)
    for other, why in (
        (
            make("gpt2", "bfloat16"),
            (
                "another base model, which it does not name, of 2 x 16 x 24 weights; this model has"
                " 2 x 16 x 64 weights")),
        (make("llama"), "the change is bfloat16, the model float32"),
        (
            tiny_model("llama", 60, d_model=16, d_ff=24, n_layers=3, n_heads=2).bfloat16(),
            "this model has 3 x 16 x 24 weights")):
        before = copied(other)
        assert why in complaint(apply_change, other, file) and same(other, before)
    assert "exists already and stays as it is" in complaint(
        save_change, model, regions(model)["vectors"], file)
    assert "the region is empty" in complaint(
        save_change, model, Region(torch.zeros(2, 24, dtype=torch.bool)), tmp_path / "none")
    assert "the region is of 3 x 24 value vectors" in complaint(
        save_change, model, Region.sample((3, 24), .1, seed=0), tmp_path / "none")
    with pytest.raises(FileNotFoundError): apply_change(model, tmp_path / "gone")
    assert [f.name for f in tmp_path.iterdir()] == ["change"]

@pytest.mark.parametrize("damage", ["cut", "text", "region", "index", "columns", "shape", "about"])
def test_a_damaged_change_is_named(damage, tmp_path):
    from safetensors import safe_open
    model, file = make("llama"), tmp_path / "change"
    region = regions(model)["vectors"]
    save_change(model, region, file)
    with safe_open(file, "pt") as f:
        about, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    if damage == "cut": os.truncate(file, file.stat().st_size - 3)
    if damage == "text": file.write_text("hello", "utf-8")
    if damage == "region": region.save(file)
    if damage == "index": save_file(tensors | {"0.index": tensors["0.index"] + 99}, file, about)
    if damage == "columns":
        save_file(tensors | {"0.columns": tensors["0.columns"][:-1].contiguous()}, file, about)
    if damage == "shape": save_file(tensors, file, about | {"shape": "[2]"})
    if damage == "about": save_file(tensors, file, {k: v for k, v in about.items() if k != "shape"})
    before = copied(model)
    assert f"{file} is not a saved change, or is damaged" in complaint(apply_change, model, file)
    assert same(model, before)

# --- weights are held once

MEMORY = """
import sys, torch
from pathlib import Path
from unloc.loading import load_model
from unloc.saving import save_model
def now(name):
    line = next(line for line in open('/proc/self/status') if line.startswith(name))
    return int(line.split()[1]) * 1024
def restart(): Path('/proc/self/clear_refs').write_text('5') # the peak is counted from here
folder = Path(sys.argv[1])
for dtype in ('bfloat16', 'float32'):
    load_model(folder / 'tiny', dtype) # whatever loading needs once
    restart()
    start, own = now('VmRSS'), now('RssAnon')
    model = load_model(folder / 'large', dtype)
    loaded, own = now('VmHWM') - start, now('RssAnon') - own
    for p in model.parameters(): # touch every page
        p.detach().view(torch.int8).view(-1)[::1024].sum()
    save_model(model, folder / dtype, max_shard_size='40MB')
    print(sum(p.nbytes for p in model.parameters()), own, loaded, now('VmHWM') - start)
    del model
"""

@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory by Linux's /proc")
def test_loading_and_saving_hold_the_weights_once(tmp_path):
    build("Llama", intermediate_size=24).bfloat16().save_pretrained(tmp_path / "tiny")
    with torch.device("meta"):
        model = build(
            "Llama", vocab_size=8000, hidden_size=512, num_attention_heads=8,
            num_key_value_heads=8, num_hidden_layers=10, intermediate_size=2048)
    model = model.bfloat16().to_empty(device="cpu")
    for p in model.parameters(): p.data.zero_()
    model.save_pretrained(tmp_path / "large", max_shard_size="30MB")
    said = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=1200).stdout
    (size, own, loaded, saved), (wide, converted, both, after) = (
        [int(x) for x in line.split()] for line in said.splitlines())
    # mapped, not copied
    assert size > 95e6 and own < .15 * size and max(loaded, saved) < 1.2 * size, said
    assert wide == 2 * size and .95 * wide < converted < 1.1 * wide, said # one converted copy,
    # beside the files' pages, half as large, which the system drops when it likes
    assert max(both, after) < 1.7 * wide, said

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_a_gpu_gets_the_weights_once(source, tmp_path):
    torch.manual_seed(0)
    model = build(
        "Llama", vocab_size=20000, hidden_size=512, num_attention_heads=8, num_key_value_heads=8,
        num_hidden_layers=8, intermediate_size=2048).to(getattr(torch, source))
    model.save_pretrained(tmp_path / "m", max_shard_size="60MB")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    loaded = load_model(tmp_path / "m", "bfloat16", "cuda")
    size = sum(p.nbytes for p in loaded.parameters())
    assert torch.cuda.max_memory_allocated() - start < 1.1 * size
    assert all(
        torch.equal(a.cpu(), b.bfloat16()) for a, b in zip(loaded.parameters(), model.parameters()))
    region = Region.sample(region_shape(loaded), .1, seed=0)
    with torch.no_grad():
        put_columns(
            loaded,
            {
                layer: (index, torch.randn(len(index), 512))
                for layer, index in enumerate(region.index)})
    save_change(loaded, region, tmp_path / "change")
    save_model(loaded, tmp_path / "again")
    assert torch.cuda.max_memory_allocated() - start < 1.3 * size
    base = load_model(tmp_path / "m", "bfloat16", "cuda")
    apply_change(base, tmp_path / "change")
    assert same(base, loaded)
    assert same(base.cpu(), AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    assert free_memory("cuda") > 0
    assert "cuda has" in complaint(
        loading._fits,
        SimpleNamespace(source="x", dtype="bfloat16", bytes_in=lambda _: 2**50),
        "bfloat16",
        torch.device("cuda"))

# --- the hub

COMMIT = "c0ffee" + "0" * 34

def serve(root, asked): # the part of the hub that a client needs for one model, some/model
    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_):
            asked.append(
                (self.command, self.path.split("?")[0].split("/")[-1], self.headers.get("range")))
        def do_HEAD(self): self.do_GET()
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET": self.wfile.write(body)
        def do_GET(self):
            path = self.path.split("?")[0]
            if path == "/stop":
                server.shutdown(), server.socket.close() # whoever comes now is refused
                self.close_connection = True
                return self.answer(200)
            if path == "/api/models/some/model/revision/main":
                return self.answer(
                    200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
            if path == f"/api/models/some/model/tree/{COMMIT}":
                return self.answer(
                    200,
                    json.dumps(
                        [
                            {
                                "type": "file",
                                "path": f.name,
                                "size": f.stat().st_size,
                                "oid": hashlib.sha1(f.read_bytes()).hexdigest()}
                            for f in root.iterdir()]).encode())
            file = root / path.split("/")[-1]
            if not path.startswith(f"/some/model/resolve/{COMMIT}/") or not file.exists():
                return self.answer(
                    404,
                    b"{}",
                    X_Error_Code=(
                        "EntryNotFound"
                        if "/resolve/" in path
                        else "RevisionNotFound" if "some/model" in path else "RepoNotFound"))
            data, found = file.read_bytes(), self.headers.get("range")
            about = dict(ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            if not found: return self.answer(200, data, **about)
            first, last = (int(x) for x in found.removeprefix("bytes=").split("-"))
            self.answer(
                206,
                data[first:last + 1],
                **about,
                Content_Range=f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

CLIENT = """
import os, urllib.request, huggingface_hub
from unloc.checkpoints import inspect
from unloc.loading import load_model, load_tokenizer
def weights(): return sum(p.double().sum().item() for p in load_model('some/model').parameters())
found = inspect('some/model')
print(len(found.missing), found.weights_bytes, found.commit, found.d_ff)
for call in (found.digest, lambda: inspect('other/model'),
        lambda: inspect('some/model', revision='v9')):
    try: call()
    except ValueError as error: print(error)
print(weights(), inspect('some/model').missing, inspect('some/model').digest(),
    load_tokenizer('some/model').eos_token)
urllib.request.urlopen(os.environ['HF_ENDPOINT'] + '/stop').read()
huggingface_hub.close_session() # the client keeps its connections
print(weights())
try: load_model('other/model')
except ValueError as error: print(error)
"""

def test_a_hub_checkpoint_from_first_look_to_offline(folder, tmp_path, guarded, monkeypatch):
    train_tokenizer(["words"], 270).save_pretrained(folder)
    server = serve(folder, asked := [])
    environment = {k: v for k, v in guarded.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1"}
    client = subprocess.run(
        [sys.executable, "-c", CLIENT], capture_output=True, encoding="utf-8", timeout=1200,
        env=environment)
    assert client.returncode == 0, client.stderr
    said = client.stdout.splitlines()
    weights = sorted(f.name for f in folder.glob("*.safetensors"))
    total = sum(p.double().sum().item() for p in load_model(folder).parameters())
    digest = inspect(folder).digest()
    refused = (
        r"other/model: config.json, model.safetensors.index.json not fetched from the hub \({}:"
        r" .*\); connect to the hub \(a gated model needs `hf auth login`\), or give a folder")
    assert said[0] == f"{len(weights)} {inspect(folder).weights_bytes} {COMMIT} 24"
    assert said[1] == f"some/model: {weights[0]} is still on the hub; load the checkpoint first"
    assert re.fullmatch(refused.format("RepositoryNotFoundError"), said[2])
    assert "RevisionNotFoundError" in said[3]
    assert said[4] == f"{total} () {digest} <eos>"
    for name in weights:
        assert [r for c, n, r in asked if n == name and c == "GET"] == [
            "bytes=0-100000",
            "bytes=0-100000",
            None], "headers at each look, the whole file once"
    assert said[5] == str(total) and re.fullmatch(
        refused.format("LocalEntryNotFoundError"), said[6]), "the hub is gone"
    # as everywhere in these tests, HF_HUB_OFFLINE is set
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert sum(p.double().sum().item() for p in load_model("some/model").parameters()) == total
    assert load_model("some/model", revision=COMMIT).dtype == torch.bfloat16
    assert re.fullmatch(
        refused.format("LocalEntryNotFoundError"), complaint(load_model, "other/model"))
    (tmp_path / "home/hub/models--some--model/snapshots" / COMMIT / weights[1]).unlink()
    assert f"some/model: {weights[1]} not fetched from the hub (OfflineModeIsEnabled" in complaint(
        load_model, "some/model")
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""

# --- read by transformers 5 and by the versions before it

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.,
    "low_freq_factor": 1.,
    "high_freq_factor": 4.,
    "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.] * 4, "long_factor": [2.] * 4}
OLD_NAMES = { # class, settings, what transformers before 5 reads
    "llama 3": (
        "Llama",
        dict(rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=131072),
        dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama 2": ("Llama", {}, dict(rope_theta=1e4, rope_scaling=None)),
    "olmo2": ("Olmo2", dict(rope_theta=5e5), dict(rope_theta=5e5, rope_scaling=None)),
    "qwen3": ("Qwen3", dict(rope_theta=1e6, head_dim=8), dict(rope_theta=1e6)),
    "mistral": ("Mistral", dict(rope_theta=1e6), dict(rope_theta=1e6)),
    "phi": (
        "Phi",
        dict(rope_theta=3e4, partial_rotary_factor=.5),
        dict(rope_theta=3e4, partial_rotary_factor=.5)),
    "phi3": (
        "Phi3",
        dict(
            rope_theta=2e4,
            rope_scaling={"type": "longrope"} | LONG,
            original_max_position_embeddings=32,
            max_position_embeddings=64),
        dict(rope_theta=2e4, rope_scaling={"type": "longrope"} | LONG)),
    "gpt_neox": (
        "GPTNeoX",
        dict(rotary_emb_base=30000, rotary_pct=.5),
        dict(rotary_emb_base=30000, rotary_pct=.5)),
    "olmo3": (
        "Olmo3",
        dict(rope_theta=4e5, layer_types=["sliding_attention", "full_attention"]),
        dict(rope_theta=4e5)),
    "cohere2": (
        "Cohere2",
        dict(rope_theta=3e4, layer_types=["sliding_attention", "full_attention"]),
        dict(rope_theta=3e4, sliding_window_pattern=2)),
    "gemma2": ("Gemma2", dict(head_dim=8), dict(rope_theta=1e4))}

@pytest.mark.parametrize("name", OLD_NAMES)
def test_rotary_settings_are_saved_under_both_names(name, tmp_path):
    kind, settings, old = OLD_NAMES[name]
    model = build(kind, intermediate_size=24, **copy.deepcopy(settings)).eval()
    want = {"torch_dtype": "float32"} | old
    save_model(model, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    assert {key: saved.get(key) for key in want} == want
    assert saved["rope_parameters"]
    assert saved["dtype"] == "float32"
    again = load_model(tmp_path / "m", "float32")
    assert same(again, model) and again.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    save_model(again, tmp_path / "once more")
    assert (
        json.loads((tmp_path / "once more" / "config.json").read_text("utf-8")) == saved
    ), "saving once more adds nothing"

def test_settings_of_two_kinds_of_layers_and_of_a_part_are_saved_under_both_names(tmp_path):
    text = SMALL | dict(
        intermediate_size=24,
        head_dim=8,
        rope_theta=7e5,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.},
        layer_types=["sliding_attention", "full_attention"])
    old = {
        "rope_theta": 7e5,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.},
        "sliding_window_pattern": 2}
    vision = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=14, patch_size=14)
    whole = dict(
        text_config=text | dict(model_type="gemma3_text"),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=59,
        boi_token_index=57,
        eoi_token_index=58,
        pad_token_id=0,
        eos_token_id=1)
    for name, model, part in (
        (
            "text",
            transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text)),
            lambda c: c),
        (
            "both",
            transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**whole)),
            lambda c: c["text_config"])):
        save_model(model.eval(), tmp_path / name)
        saved = part(json.loads((tmp_path / name / "config.json").read_text("utf-8")))
        assert {key: saved.get(key) for key in old} == old, name
        with torch.no_grad():
            assert torch.equal(
                load_model(tmp_path / name, "float32")(input_ids=IDS).logits,
                model(input_ids=IDS).logits)

def test_a_model_without_rotary_settings_is_saved_as_it_is(tmp_path):
    save_pretrained(make("gpt2"), tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    assert not [key for key in saved if "rope" in key or "rotary" in key]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), make("gpt2"))

def test_every_model_of_the_package_is_saved_by_one_function():
    places = [
        (file.name, line.strip())
        for file in Path(checkpoints.__file__).parent.glob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if re.search(r"\w*model\w*\.save_pretrained\(", line)]
    line = "with _habits_aside(model, Path(folder)): model.save_pretrained(folder, **options)"
    assert places == [("saving.py", line)]
