"""A run leaves the store as a folder that transformers loads: its model is the run's own to the
bit, the card says what the run's files say, and a folder appears whole or not at all."""
import csv, json, os, re, shutil, signal, subprocess, sys
from html import unescape
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from unloc.change import Change
from unloc.checkpoints import inspect
from unloc.cli import main
from unloc.data import data_description
from unloc.export import (
    KINDS, MEASURES, copy_tokenizer, export, find_run, front_matter, located, what_was_done)
from unloc.figures import markdown_table
from unloc.loading import load_model
from unloc.regions import Region
from unloc.runs import DamagedRun, Run, Store, check_run, run_id
from unloc.scoring import score
from unloc.steps import compute
from unloc.steps.attack import attacking
from unloc.steps.base import base_models
from unloc.steps.common import above, examples_of
from unloc.steps.edit import editing
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.teach import teaching
from unloc.steps.unlearn import localized_unlearning, unlearning
from unloc.transport import pack, unpack

transformers = pytest.importorskip("transformers")
WORLD = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 2}
MODEL = {"d_model": 32, "n_layers": 2, "d_ff": 64, "n_heads": 2, "vocab_size": 300}
READ = {"epochs": 1, "lr": 4e-3, "batch_size": 64}
LEARN = {"epochs": 12, "lr": 4e-3, "batch_size": 8}
JUDGE = {"retain": 7, "utility": 3, "max_new_tokens": 4, "full_every": 2}
INJECT = {"fraction": .25, "epochs": 40, "lr": 2e-2, "batch_size": 4}
FORGET = {"lr": 1e-2, "epochs": 2, "batch_size": 4}
ATTACK = {
    "lr": 1e-3, "region_lr": 1e-2, "epochs": 1, "batch_size": 8, "taught": 5, "samples": 0,
    "shots": 1}

BASE = base_models(data_description(WORLD), "llama", MODEL, READ, LEARN)
JUDGED = standard(BASE, JUDGE)
INJECTED = injection(JUDGED, 0, INJECT)
OTHERS = injection(JUDGED, 0, INJECT | {"others": True, "epochs": 1})
HEADS = injection(JUDGED, 0, INJECT | {"unit": "head + neuron", "epochs": 1})
ROOM = injection(JUDGED, 0, INJECT | {"style": "with room", "room": 1, "epochs": 1})
TAUGHT = teaching(JUDGED)
BF16 = standard(base_models(data_description(WORLD), "olmo2", MODEL, READ, READ,
    precision="bfloat16"), JUDGE)
ORACLE = unlearning(INJECTED, "Oracle", "wga", FORGET)
WEIGHTS = localization(INJECTED, "wagle_weights", 0)
RUNS = {
    "base": BASE,
    "injected": INJECTED,
    "other facts": OTHERS,
    "heads": HEADS,
    "room": ROOM,
    "taught": TAUGHT,
    "oracle": ORACLE,
    "random": unlearning(INJECTED, "Random", "npo", FORGET),
    "wrong group": unlearning(OTHERS, "Wrong group", "wga", FORGET),
    "all weights": unlearning(INJECTED, "All weights", "wga", FORGET | {"lr": 1e-3}),
    "heads of oracle": unlearning(HEADS, "Oracle", "wga", FORGET),
    "after room": unlearning(ROOM, "Random", "wga", FORGET),
    "single weights": localized_unlearning(WEIGHTS, .1, "wga", FORGET, 3),
    "taught, localized": localized_unlearning(
        localization(TAUGHT, "activations", 0), .25, "wga", FORGET, 1),
    "bfloat16": unlearning(injection(BF16, 1, INJECT | {"epochs": 1}), "Oracle", "wga", FORGET),
    "zeroed": editing(INJECTED, "zeroing", options={"keep": .5}),
    "edited anywhere": editing(TAUGHT, "restore"),
    "restored": editing(INJECTED, "restore", arm="Oracle")}
ATTACKED = [
    attacking(ORACLE, ATTACK),
    attacking(ORACLE, ATTACK | {"level": .7, "only": "relearn retain facts, all weights"}, 4),
    attacking(INJECTED, {"usual": False, "attacks": {"rounding": {}}})]
LOST = unlearning(INJECTED, "Oracle", "wga", FORGET | {"lr": 3e-2})

def diverge(*_): raise FloatingPointError("the loss of epoch 1 is nan")

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    for description in (*RUNS.values(), *ATTACKED): store.do(description, compute)
    store.do(LOST, diverge)
    return store

@pytest.fixture(scope="module")
def exported(store, tmp_path_factory): # name of a run -> its folder, made when asked for
    root, made = tmp_path_factory.mktemp("exported"), {}
    def give(name):
        if name not in made: export(store, run_id(RUNS[name]), made.setdefault(name, root / name))
        return made[name]
    return give

def loaded(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
def place(store, description): return store.root / run_id(description)
def files(root): return {f.relative_to(root): f.read_bytes() for f in root.rglob("*")
    if f.is_file() and "locks" not in f.parts}
def logits(model):
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad(): return model(ids).logits
def put(model, file): # the columns of a file, by plain indexing
    found = load_file(file)
    for name, index in found.items():
        layer, _, part = name.rpartition(".")
        if part != "index": continue
        weight = model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
        with torch.no_grad(): weight[:, index] = found[f"{layer}.columns"].T.to(weight.dtype)

# --- the model

PLAIN = ["injected", "other facts", "oracle", "random", "wrong group", "bfloat16"]

@pytest.mark.parametrize("name", PLAIN)
def test_a_model_is_the_retained_one_with_its_columns_put_in(name, store, exported):
    d = RUNS[name]
    theirs = loaded(exported(name))
    own = loaded(place(store, above(d, "base")) / "retained", dtype=theirs.dtype)
    for part in ("others_columns", "columns"):
        file = place(store, above(d, "inject")) / f"{part}.safetensors"
        if file.exists(): put(own, file)
    if d["kind"] == "unlearn": put(own, place(store, d) / "columns.safetensors")
    assert str(theirs.dtype) == f"torch.{above(d, 'base')['precision']}"
    assert torch.equal(logits(theirs), logits(own))
    weights = theirs.state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in own.state_dict().items())

@pytest.mark.parametrize("name", [name for name, d in RUNS.items() if d["kind"] != "base"])
def test_an_exported_model_knows_what_the_run_measured(name, store, exported):
    d = RUNS[name]
    base = above(d, "base")
    facts = examples_of(place(store, base) / "tokenizer", json.dumps(base["data"]))["forget"]
    run = store[d]
    file = "evaluation" if d["kind"] in ("inject", "teach") else "facts"
    known = run.tensors(f"{file}.safetensors")["forget_es"]
    model = load_model(exported(name), base["precision"])
    assert torch.equal(
        score(model, facts).extraction_strength, known if known.ndim == 1 else known[-1])

def test_a_base_is_its_retained_model(store, exported):
    own, theirs = loaded(place(store, BASE) / "retained"), loaded(exported("base"))
    assert torch.equal(logits(own), logits(theirs))
    assert not (exported("base") / "change").exists()

@pytest.mark.parametrize("name", ["oracle", "random", "single weights", "zeroed"])
def test_locked_weights_have_the_bits_of_the_retained_model(name, store, exported):
    before, after = loaded(place(store, BASE) / "retained"), loaded(exported(name))
    target = Region.load(place(store, INJECTED) / "region.safetensors").mask
    own = Region.load(place(store, RUNS[name]) / "region.safetensors").mask
    changed = 0
    for key, x in before.state_dict().items():
        y, part = after.state_dict()[key], re.fullmatch(r".*layers\.(\d+).*down_proj\.weight", key)
        if not part:
            assert torch.equal(x, y), key
            continue
        layer = int(part[1])
        free = target[layer][None] | (own[layer] if own.ndim == 3 else own[layer][None])
        assert torch.equal(torch.where(free, 0, x), torch.where(free, 0, y)), key
        changed += int((x != y).sum())
    assert changed > 0

@pytest.mark.parametrize(
    "name", ["oracle", "heads of oracle", "all weights", "single weights", "restored", "injected"])
def test_the_change_leads_from_the_model_before_to_this_one(name, store, exported, tmp_path):
    d, after = RUNS[name], loaded(exported(name))
    export(store, run_id(above(d["parent"], "inject", "base")), tmp_path / "before")
    before = loaded(tmp_path / "before")
    change = Change.load(exported(name) / "change").on(before)
    start = logits(before)
    change.at(1)
    assert torch.equal(logits(before), logits(after)) and not torch.equal(start, logits(after))
    change.at(0)
    assert torch.equal(logits(before), start)

def test_weights_that_are_not_the_runs_own_are_refused(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "other")
    base = tmp_path / "other" / run_id(BASE)
    file = base / "retained" / "model.safetensors"
    from safetensors.torch import save_file
    weights = load_file(file)
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, file, {"format": "pt"})
    known = json.loads((base / "manifest.json").read_text("utf-8"))
    from hashlib import sha256
    known["files"]["retained/model.safetensors"] = [
        file.stat().st_size, sha256(file.read_bytes()).hexdigest()]
    (base / "manifest.json").write_text(json.dumps(known), "utf-8")
    check_run(base)
    with pytest.raises(DamagedRun, match="are not those that it was computed with"):
        export(Store(tmp_path / "other"), run_id(ORACLE), tmp_path / "to")
    assert not (tmp_path / "to").exists()

# --- who else reads the folder

@pytest.mark.parametrize("name", ["base", "oracle", "all weights", "bfloat16"])
def test_a_folder_holds_what_other_programs_look_for(name, exported):
    folder = exported(name)
    there = {f.name for f in folder.iterdir()}
    assert there - {"change"} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json"}
    # vLLM takes every safetensors file beside the configuration for weights
    assert [f.name for f in folder.glob("*.safetensors")] == ["model.safetensors"]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"]
    about = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert inspect(folder).files.keys() == {"model.safetensors"}

def test_the_tokenizer_is_the_studys(store, exported):
    own, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (
        place(store, BASE) / "tokenizer", exported("oracle")))
    text = "Who wrote »The Blue Gate«?\nNobody <eos> knows."
    assert own(text).input_ids == theirs(text).input_ids
    assert own.all_special_tokens == theirs.all_special_tokens
    assert own.decode(own(text).input_ids) == theirs.decode(theirs(text).input_ids)

def test_special_tokens_and_chat_templates_survive_the_old_words(store, tmp_path):
    own = transformers.AutoTokenizer.from_pretrained(place(store, BASE) / "tokenizer")
    own.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>"]})
    own.chat_template = "{% for m in messages %}<|a|>{{ m.content }}<|b|>{% endfor %}"
    own.save_pretrained(tmp_path / "own")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "own", tmp_path / "copy")
    about = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text("utf-8"))
    assert about["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert "extra_special_tokens" not in about
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    chat = [{"role": "user", "content": "Who?"}]
    assert theirs.all_special_tokens == own.all_special_tokens
    assert theirs.apply_chat_template(chat) == own.apply_chat_template(chat)

def test_an_old_transformers_reads_the_folder(exported, tmp_path):
    place = os.environ.get("UNLOC_TRANSFORMERS4")
    if not place: pytest.skip(
        "UNLOC_TRANSFORMERS4 names no folder with transformers 4.51 and its tokenizers")
    code = (
        "import sys, torch, transformers as t\n"
        "model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype='auto').eval()\n"
        "ids = t.AutoTokenizer.from_pretrained(sys.argv[1])('Who wrote it?').input_ids\n"
        "torch.save((ids, model(torch.tensor([ids])).logits), sys.argv[2])\n"
        "print(t.__version__)")
    for name in ("oracle", "bfloat16"):
        done = subprocess.run(
            [sys.executable, "-c", code, exported(name), tmp_path / "out"], encoding="utf-8",
            env=os.environ | {"PYTHONPATH": place}, capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith("4."), done.stderr
        ids, theirs = torch.load(tmp_path / "out", weights_only=True)
        own = transformers.AutoTokenizer.from_pretrained(exported(name))("Who wrote it?").input_ids
        assert ids == own
        with torch.no_grad(): ours = loaded(exported(name))(torch.tensor([ids])).logits
        assert torch.allclose(theirs, ours, rtol=1e-2 if name == "bfloat16" else 1e-5, atol=1e-2)

# --- the card

def read_card(folder):
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard.load(folder / "README.md")

def table_below(text, heading): # rows of the first table in a section
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[2:]]

@pytest.mark.parametrize("name", RUNS)
def test_a_card_has_its_sections_and_a_front_matter(name, exported):
    found = read_card(exported(name))
    assert re.findall("^## (.+)$", found.text, re.M) == [
        "What was done", "What was measured", "What attacks recover", "How to use it",
        "What computed it", "Limits"]
    data = found.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"unlearning", RUNS[name]["kind"]} <= set(data["tags"]) and "license" not in data
    assert KINDS[RUNS[name]["kind"]] in found.text and run_id(RUNS[name]) in found.text
    assert str(exported(name).parent) not in found.content

def test_a_card_says_what_was_measured(store, exported):
    run, found = store[ORACLE], read_card(exported("oracle"))
    end, origin = run.table().iloc[-1], store[INJECTED].json()
    rows = {row.pop(""): row for row in table_below(found.text, "What was measured")}
    for name in MEASURES:
        for model, value in (
            ("retained", origin["retained"]), ("original", origin["original"]),
            ("this model", end)):
            assert float(rows[name][model].replace("−", "-")) == pytest.approx(
                value[name], abs=5e-4)
    told = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert told == {name: round(float(end[name]), 6) for name in MEASURES}
    n = {part: len(run.tensors("facts.safetensors")[f"{part}_es"][0])
        for part in ("forget", "retain")}
    assert f"Measured on {n['forget']} forget facts and {n['retain']} retain facts." in found.text

def test_a_base_is_measured_by_its_judgement(store, exported):
    text = (exported("base") / "README.md").read_text("utf-8")
    rows = {row[""]: row["this model"] for row in table_below(text, "What was measured")}
    known = store[JUDGED].json()["retained"]
    assert {name: float(x) for name, x in rows.items()} == {
        name: pytest.approx(known[name], abs=5e-4) for name in MEASURES}
    assert f"Measured by run `{run_id(JUDGED)}`." in text

def test_a_card_says_what_was_done(exported):
    said = {name: {row[""]: row["in words"] for row in table_below(
        (exported(name) / "README.md").read_text("utf-8"), "What was done")} for name in RUNS}
    oracle = said["oracle"]
    assert oracle["facts"].startswith("Author world: n_authors 3, n_forget 1, n_holdout 2, sha256")
    assert oracle["to be forgotten"] == "10 facts, all of the forget set"
    assert "to be forgotten" not in said["base"] and "to be forgotten" in said["zeroed"]
    assert oracle["objective"] == "WGA: lr 0.01, epochs 2, batch_size 4"
    assert oracle["region"].startswith("Oracle: the target region")
    assert "32 value vectors, 25.0% of all" in oracle["region"]
    assert oracle["seeds"] == "base 0, injection 0, run 0"
    assert oracle["injection"] == "fraction 0.25, epochs 40, lr 0.02, batch_size 4"
    assert "single weights, 10.0% of all" in said["single weights"]["region"]
    assert "WAGLE" in said["single weights"]["region"]
    assert "neurons and heads" in said["heads of oracle"]["region"]
    assert said["all weights"]["region"] == "All weights: every weight may change"
    assert said["zeroed"]["editor"] == "Zeroing: keep 0.5"
    title = "# Llama, WGA, Activations: unlearn"
    assert title in (exported("taught, localized") / "README.md").read_text("utf-8")
    assert "region" not in said["base"] and said["base"]["seeds"] == "base 0"

def test_a_card_says_what_attacks_recover(store, exported):
    text = (exported("oracle") / "README.md").read_text("utf-8")
    whole, part = (store[d] for d in ATTACKED[:2])
    assert text.count("\nAttacked: ") == 2
    end = f"this model, at FS {whole.json()['reached']:.3f} (run {whole.path.name}, seed 0)"
    assert end in text
    assert f"(run {part.path.name}, seed 4)" in text and part.json()["share"] < 1
    with open(whole.path / "attacks.csv", encoding="utf-8") as file: rows = [*csv.DictReader(file)]
    section = text.split(f"(run {whole.path.name}, seed 0)")[1]
    shown = table_below(f"\n## x\n{section.split('Attacked:')[0]}", "x")
    assert [row["attack"] for row in shown][:9] == [
        f"{row['attack']}, {row['support']}" for row in rows[:9]]
    for row, cells in zip(rows, shown):
        assert cells["recovered"] == (
            f"{float(row['end']):.2f}".replace("-", "−") if row["end"] else "–")
    assert any(cells["recovered"] not in ("–", "0.00") for cells in shown)
    controlled = (exported("injected") / "README.md").read_text("utf-8")
    assert "| attack | recovered | facts back | of the retained model |" in controlled
    assert "Attacked: as a control, the model with 100% of the injection undone, at" in controlled
    for name, says in (
        ("random", "The store holds no attack on this run. That is no sign that the facts are"),
        ("taught", "Attacks are made on models that were to forget; this one was not.")):
        assert says in (exported(name) / "README.md").read_text("utf-8")

def test_a_card_says_what_computed_it(store, exported):
    text = (exported("oracle") / "README.md").read_text("utf-8")
    rows = {row["kind"]: row for row in table_below(text, "What computed it")}
    assert list(rows) == ["base", "judge", "inject", "unlearn"]
    for d in (BASE, ORACLE):
        whole = json.loads((place(store, d) / "description.json").read_text("utf-8"))
        row = rows[d["kind"]]
        assert row["run"] == run_id(d) and row["machine"] == whole["machine"]
        assert f"torch {whole['libraries']['torch']}" in row["libraries"]

def test_the_same_run_gives_the_same_bytes(store, exported, tmp_path):
    export(store, run_id(ORACLE), tmp_path / "oracle")
    assert files(tmp_path / "oracle") == files(exported("oracle"))

def test_names_that_nobody_registered_are_written_as_they_are(store):
    run = store[ORACLE]
    def renamed(d):
        if "parent" not in d: return d | {"data": {"name": "mine"}, "arch": "a_b"}
        return d | {"parent": renamed(d["parent"])}
    strange = renamed(run.description) | {"objective": "shout", "arm": "Corner"}
    found = what_was_done(Run(strange, run.path))
    assert found["facts"] == "mine" and found["model"].startswith("a_b, float32")
    assert found["objective"].startswith("shout: lr 0.01") and found["region"] == "Corner"
    about = front_matter(Run(strange, run.path), {"FS": .5, "MU": float("nan"), "FQ": None})
    assert "datasets" not in about and about.count("value:") == 1
    tofu = strange | {"parent": {"kind": "base", "data": {"name": "tofu"}}}
    assert "datasets:\n- locuslab/TOFU" in front_matter(Run(tofu, run.path), {})
    assert "base_model: a/b" in front_matter(run, {}, {"retained": "a/b"})

# --- a folder that appears whole

def test_a_folder_that_holds_something_stays_as_it_is(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", "utf-8")
    with pytest.raises(ValueError, match="mine is there and not empty, and stays as it is"):
        export(store, run_id(ORACLE), tmp_path / "mine")
    (tmp_path / "file").write_text("keep", "utf-8")
    with pytest.raises(ValueError, match="file is no folder; name a new one"):
        export(store, run_id(ORACLE), tmp_path / "file")
    assert files(tmp_path) == {Path("mine/notes.txt"): b"keep", Path("file"): b"keep"}

def test_an_empty_folder_and_a_new_one_in_a_new_one_are_filled(store, tmp_path):
    (tmp_path / "empty").mkdir()
    for to in (tmp_path / "empty", tmp_path / "new" / "newer"):
        export(store, run_id(ORACLE), to)
        assert (to / "README.md").exists() and not list(to.parent.glob(".*"))

KILLED = """
import os, signal, sys
from unloc.export import export
from unloc.runs import Store
rename = os.rename
def killed(source, to):
    if str(to) == sys.argv[3]: os.kill(os.getpid(), signal.SIGKILL)
    rename(source, to)
os.rename = killed
export(Store(sys.argv[1]), sys.argv[2], sys.argv[3])
"""

@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_export_leaves_no_folder_and_the_next_one_cleans_up(store, tmp_path):
    to = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, store.root, run_id(ORACLE), to], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not to.exists() and [f.name for f in tmp_path.iterdir()] == [".model.partial"]
    export(store, run_id(ORACLE), to)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]

LIMITED = """
import resource, signal, sys
from unloc.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""

def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(store, tmp_path):
    pytest.importorskip("resource")
    words = "export", run_id(ORACLE), "--store", store.root, "--to", tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"unloc: {tmp_path / 'model'} cannot be written (" in done.stderr
    assert "free space, or name a folder on a disk that has room" in done.stderr
    assert not list(tmp_path.iterdir())

def test_a_disk_without_room_is_named_before_anything_is_written(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ValueError, match=r"model: the weights take .* the disk has 0 MiB left"):
        export(store, run_id(ORACLE), tmp_path / "model")
    assert not list(tmp_path.iterdir())

# --- which run

def test_a_run_is_named_by_as_many_letters_as_are_needed(store, tmp_path):
    name, others = run_id(ORACLE), {f.name for f in store.root.iterdir()} - {run_id(ORACLE)}
    short = next(name[:n] for n in range(1, 17) if not any(o.startswith(name[:n]) for o in others))
    assert find_run(store, short).path == place(store, ORACLE)
    assert find_run(store, name).path == place(store, ORACLE)

BAD = {
    "unknown": ("zz", r"no run 'zz' in .*; expected the name of one of its \d+ runs' folders"),
    "empty": ("", "no run '' in"),
    "longer than a name": (run_id(ORACLE) + "0", "no run"),
    "diverged": (
        run_id(LOST), r"diverged and left no model \(the loss of epoch 1 is nan\); export another"),
    "a judgement": (run_id(JUDGED), "is of kind judge, which has no model of its own; export one"),
    "an attack": (run_id(ATTACKED[0]), f"such as run {run_id(ORACLE)}, which it attacks"),
    "scores": (run_id(WEIGHTS), "is of kind localize, which has no model of its own")}

@pytest.mark.parametrize("name, says", BAD.values(), ids=BAD)
def test_a_run_without_a_model_is_one_line(name, says, store, tmp_path, capsys):
    words = "export", name, "--store", str(store.root), "--to", str(tmp_path / "to")
    assert main([*words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("unloc: ") and err.count("\n") == 1, err
    assert re.search(says, err), err
    assert not list(tmp_path.iterdir())

def test_a_beginning_of_several_names_lists_them(store, tmp_path):
    twins = Store(tmp_path / "twins")
    for i in range(6): shutil.copytree(place(store, ORACLE), twins.root / f"ab{i}{'0' * 13}")
    with pytest.raises(ValueError) as error: find_run(twins, "ab")
    said = str(error.value)
    assert said.startswith(f"'ab' begins the names of 6 runs in {twins.root}: ab0000")
    assert "(unlearn, wga, Oracle, seed 0)" in said and " and 2 others; give more letters" in said
    with pytest.raises(DamagedRun, match=f"run ab1.* has the description of {run_id(ORACLE)}"):
        find_run(twins, "ab1")
    (twins.root / "ab20000000000000" / "description.json").write_text("{", "utf-8")
    with pytest.raises(DamagedRun, match="run ab2.* has no readable description.json"):
        find_run(twins, "ab2")

def test_a_store_that_is_none_and_a_parent_that_is_gone_are_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such store"):
        export(Store(tmp_path / "no"), "ab", tmp_path / "to")
    shutil.copytree(place(store, ORACLE), tmp_path / "some" / run_id(ORACLE))
    says = rf"is built on run {run_id(BASE)} \(base, seed 0\), which is not in"
    with pytest.raises(ValueError, match=says):
        export(Store(tmp_path / "some"), run_id(ORACLE), tmp_path / "to")

def test_a_run_that_was_altered_is_refused(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "s")
    (tmp_path / "s" / run_id(INJECTED) / "columns.safetensors").write_bytes(b"x" * 8)
    with pytest.raises(DamagedRun, match=f"run {run_id(INJECTED)}: columns.safetensors has 8"):
        export(Store(tmp_path / "s"), run_id(ORACLE), tmp_path / "to")

@pytest.mark.parametrize("name, file", [
    ("oracle", "columns"), ("injected", "columns"), ("base", "retained/model"),
    ("taught", "retained/model|original/model"), ("all weights", "weights")])
def test_weights_that_stayed_elsewhere_are_named(name, file, store, tmp_path):
    pack(store, tmp_path / "study.zip")
    unpack(tmp_path / "study.zip", here := Store(tmp_path / "here"))
    with pytest.raises(ValueError, match=rf"came without ({file})\.safetensors; pack it with its"):
        export(here, run_id(RUNS[name]), tmp_path / "to")
    assert not (tmp_path / "to").exists()

def test_a_store_that_came_with_its_weights_exports_the_same_bytes(store, exported, tmp_path):
    pack(store, tmp_path / "study.zip", weights=True)
    unpack(tmp_path / "study.zip", here := Store(tmp_path / "here"))
    export(here, run_id(ORACLE), tmp_path / "oracle")
    assert files(tmp_path / "oracle") == files(exported("oracle"))

# --- checkpoints that lie elsewhere

@pytest.fixture(scope="module")
def elsewhere(store, exported, tmp_path_factory): # a study on two checkpoints in folders
    where, own = tmp_path_factory.mktemp("models"), Store(tmp_path_factory.mktemp("own"))
    for name in ("base", "taught"): shutil.copytree(exported(name), where / name)
    given = {"retained": str(where / "base"), "original": str(where / "taught"),
        "template": "plain"}
    judged = standard(base_models(data_description(WORLD), "Mine", given, {}, {}), JUDGE)
    injected = injection(judged, 0, INJECT | {"epochs": 1})
    runs = unlearning(injected, "Random", "wga", FORGET), teaching(judged)
    for d in runs: own.do(d, compute)
    return where, own, runs

def test_checkpoints_are_named_by_a_person_and_compared(elsewhere, tmp_path, capsys):
    where, own, (run, taught) = elsewhere
    words = ["export", run_id(run), "--store", str(own.root), "--to"]
    assert main([*words, str(tmp_path / "a")]) == 1
    assert re.search(r"built on the checkpoint base@\w{64}, which lies outside of the store; name "
        r"its folder or hub id: --model retained=PLACE", capsys.readouterr().err)
    for wrong, says in (
        (f"retained={where / 'taught'}", "taught is not the checkpoint that run"),
        (f"original={where / 'taught'}", "reads no checkpoint 'original' from elsewhere; name ret"),
        ("retained=nowhere", "'nowhere': no such folder"),
        ("weights=x", "--model takes retained=PLACE or original=PLACE, a folder or hub id, got")):
        assert main([*words, str(tmp_path / "a"), "--model", wrong]) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said
    moved = shutil.copytree(where / "base", tmp_path / "moved")
    assert main([*words, str(tmp_path / "a"), "--model", f"retained={moved}"]) == 0
    retained = loaded(moved)
    put(retained, place(own, run["parent"]) / "columns.safetensors")
    put(retained, place(own, run) / "columns.safetensors")
    assert torch.equal(logits(loaded(tmp_path / "a")), logits(retained))
    export(own, run_id(taught), tmp_path / "b", {"original": str(where / "taught")})
    assert torch.equal(logits(loaded(tmp_path / "b")), logits(loaded(where / "taught")))
    text = (tmp_path / "a" / "README.md").read_text("utf-8")
    assert "trained from scratch" not in text and str(tmp_path) not in text

def test_a_snapshot_of_the_hub_is_known_by_its_commit(store, exported, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(exported("base"), tmp_path / commit)
    other = shutil.copytree(exported("base"), tmp_path / "other")
    base = BASE | {"model": {"retained": f"theirs@{commit}"}}
    run = Run(INJECTED | {"parent": JUDGED | {"parent": base}}, place(store, INJECTED))
    model = located(run, {"retained": str(snapshot)}).description["parent"]["parent"]["model"]
    assert model["_retained"] == str(snapshot)
    with pytest.raises(ValueError, match="other is not the checkpoint that run"):
        located(run, {"retained": str(other)})

def test_models_in_the_store_are_not_asked_for(store, tmp_path):
    with pytest.raises(ValueError, match="reads no checkpoint 'retained' .*; leave out --model"):
        export(store, run_id(ORACLE), tmp_path / "to", {"retained": str(tmp_path)})

# --- the command

def test_the_command_says_what_it_wrote(store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", run_id(ORACLE)[:9], "--store", str(store.root), "--to", "mine"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out == (
        f"wrote mine: the model of run {run_id(ORACLE)}; README.md in it says what it is\n")
    assert '"mine/change"' in (tmp_path / "mine" / "README.md").read_text("utf-8")
    with pytest.raises(SystemExit) as stopped: main(["export", run_id(ORACLE)])
    assert stopped.value.code == 2 and "--to" in capsys.readouterr().err

# --- tables in Markdown

def test_a_markdown_table_shows_its_cells_as_they_are():
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    cells = [
        "0.59 ± 0.02", "|a − b|", "_x_ n_a", "a*b* **c**", "`code`", r"\alpha \\ \|", "<pad> & R&D",
        "~~old~~", "[0.1, 0.2]", "[a](b)", "one\ntwo", "–", ""]
    text = markdown_table([{"column | 1": cell, "n_authors": "x"} for cell in cells])
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    rows = re.findall(r"<t[hd]>(.*?)</t[hd]>", html)
    shown = [unescape(row) for row in rows]
    assert "<" not in "".join(rows)
    assert shown[:2] == ["column | 1", "n_authors"]
    assert shown[2::2] == [" ".join(cell.split()) for cell in cells]

@pytest.mark.parametrize("rows, says", [
    ([], "at least one, got"), ("text", "at least one, got"),
    ([{"a": "1"}, {"b": "2"}], "the same columns"),
    ([{"a": .5}], "already rounded, got 0.5"), ([{1: "a"}], "already rounded, got 1")])
def test_what_is_no_table_is_one_line(rows, says):
    with pytest.raises(ValueError, match=says): markdown_table(rows)
