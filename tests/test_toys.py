"""A model and facts of one's own, a file each, are known wherever the package's own are: in
settings, plans, runs and tables; and no other place of the package lists such names."""
import ast, csv, json, os, pickle, subprocess, sys
from pathlib import Path
import pytest
from unloc import register
from unloc.data import benchmark, counts, data_description, data_source, hub_source
from unloc.facts import Benchmark, Fact
from unloc.identity import shipment
from unloc.register import METHODS, at_hand, dataset, find, label, methods
from unloc.runs import Store, public, run_id
from unloc.steps import compute
from unloc.steps.base import base_models
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.unlearn import unlearning
from unloc.unlearning_run import Recipe

ROOT = Path(__file__).resolve().parents[1]
KINDS = "architecture", "dataset"
MODEL = '''
from transformers import LlamaConfig, LlamaForCausalLM
import torch
from unloc.register import architecture

@architecture(label='Shared Llama', model_type='llama')
def shared(vocab_size, seed, d_model:int=16, n_layers:int=2, d_ff:int=32, n_heads:int=2,
    groups:int=1):
    "Build a Llama whose heads share keys and values"
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, hidden_size=d_model,
        intermediate_size=d_ff, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        num_key_value_heads=groups, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=1, use_cache=False)).eval()
'''
FACTS = '''
from pathlib import Path
from typing import Annotated
from msgspec import Meta
from unloc.facts import Benchmark, Fact
from unloc.register import dataset

@dataset(label='Colours', origin='{n} colours, from {path}', files=('path',))
def colours(path:str='colours.txt', n:Annotated[int, Meta(ge=2)]=6):
    "Read the colours of things, a line each"
    lines = Path(path).read_text('utf-8').splitlines()[:n]
    facts = []
    for thing, right, wrong in map(str.split, lines):
        facts.append(Fact(f'Which colour is the {thing}?', f'The {thing} is {right}.',
            perturbed_answer=(f'The {thing} is {wrong}.',), author=thing))
    def capital(of, right, wrong):
        return Fact(f'What is the capital of {of}?', right, perturbed_answer=(wrong,)),
    return Benchmark('colours', forget=tuple(facts[:2]), retain=tuple(facts[2:]), holdout=(),
        real_authors=capital('France', 'Paris', 'Rome'),
        world_facts=capital('Spain', 'Madrid', 'Oslo'), refusals=("I don't know.",))
'''
THINGS = "door", "gate", "roof", "wall", "lamp", "boat", "coat", "cup"
HUES = "red", "blue", "green", "white", "black", "grey", "pink", "gold"
LINES = "".join(f"{a} {b} {c}\n" for a, b, c in zip(THINGS, HUES, HUES[3:] + HUES[:3]))
SHAPE = {"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300}
HOW = {"epochs": 1, "lr": 4e-3, "batch_size": 8}


@pytest.fixture
def place(tmp_path, monkeypatch): # a folder with both plugins and the file of facts
    kept = {kind: dict(held) for kind, held in METHODS.items()}
    executed = dict(register._executed)
    (tmp_path / "my_model.py").write_text(MODEL, "utf-8")
    (tmp_path / "my_facts.py").write_text(FACTS, "utf-8")
    (tmp_path / "colours.txt").write_text(LINES, "utf-8")
    files = [str(tmp_path / name) for name in ("my_model.py", "my_facts.py")]
    monkeypatch.setenv("UNLOC_PLUGINS", os.pathsep.join(files))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    register._executed.clear()
    register._executed.update(executed)
    for kind, held in kept.items():
        METHODS[kind].clear()
        METHODS[kind].update(held)

def colours(**more): return data_description({"name": "colours"} | more)
def base(**more): return base_models(colours(), "shared", SHAPE | more, HOW, HOW)

# --- order and labels

def test_the_package_has_its_own_in_a_stable_order():
    assert list(methods("architecture")) == ["llama", "olmo2"]
    assert list(methods("dataset")) == [
        "world", "tofu", "file", "related_world", "refusing_world", "related_tofu"]
    assert [label("architecture", name) for name in methods("architecture")] == ["Llama", "OLMo 2"]

def test_a_users_stand_behind_them(place):
    assert list(methods("architecture")) == ["llama", "olmo2", "shared"]
    assert list(methods("dataset")) == [
        "world", "tofu", "file", "related_world", "refusing_world", "related_tofu", "colours"]
    assert label("architecture", "shared") == "Shared Llama"
    assert label("architecture", "My checkpoint") == "My checkpoint"

# --- facts

def test_own_facts_are_described_by_content(place):
    found = colours(n=4)
    assert public(found).keys() == {"name", "n", "sha256"} and found["n"] == 4
    assert counts(found) == {"forget": 2, "retain": 2, "holdout": 0}
    assert data_source(found) == f"4 colours, from {place / 'colours.txt'}"
    assert hub_source(found) == ""
    (place / "moved.txt").write_text(LINES, "utf-8")
    assert public(colours(n=4, path="moved.txt")) == public(found)
    (place / "colours.txt").write_text(LINES.replace("red", "brown"), "utf-8")
    says = r"colours.txt: the facts are not those that were described; describe the runs anew"
    with pytest.raises(ValueError, match=says): benchmark(found)

@pytest.mark.parametrize("given, says", [
    ({"n": 1}, "colours: n must be at least 2 and finite, got 1"),
    ({"n": "4"}, "colours: n must be of type int, got '4'"),
    ({"size": 4}, "colours has no setting 'size'; known: name, path, n"),
    ({"path": "none.txt"}, "data: 'none.txt': no such file or folder; give the path"),
    ({"path": ""}, 'data: a colours needs its path; give {"name": "colours", "path": …}'),
    (
        {"name": "colors"},
        "data: name must be 'world', 'tofu', 'file', 'related_world', 'refusing_world', "
        "'related_tofu' or 'colours', got 'colors'")])
def test_a_mistake_about_own_facts_is_one_line(place, given, says):
    with pytest.raises(ValueError) as error: colours(**given)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)

def test_a_data_set_gives_facts(place):
    @dataset(label="Nothing")
    def nothing(): "Give nothing"
    with pytest.raises(ValueError, match="the dataset 'nothing' gives a NoneType; let it give an"):
        data_description({"name": "nothing"})
    @dataset(label="Broken")
    def broken(): "Divide by nothing"; return 1 / 0
    with pytest.raises(ValueError, match="the dataset 'broken' fails: ZeroDivisionError: division"):
        data_description({"name": "broken"})

def test_a_data_set_of_the_hub_takes_a_source(place):
    @dataset(label="Far", origin="far, from {source}", hub="some/where", variable="FAR_AWAY")
    def far(source="some/where"):
        "Give one fact that names its source"
        return Benchmark("far", forget=(Fact("Where?", source),), retain=(), holdout=(),
            real_authors=(), world_facts=(), refusals=())
    named, usual = data_description({"name": "far"}, "els/where"), data_description({"name": "far"})
    assert [benchmark(d).forget[0].answer for d in (named, usual)] == ["els/where", "some/where"]
    assert [data_source(d) for d in (named, usual)] == ["far, from els/where", "far, from the hub"]
    asked = {"name": "far"}
    assert (hub_source(asked), hub_source(asked, "els/where")) == ("some/where", "els/where")
    os.environ["FAR_AWAY"] = str(place)
    try: assert (data_source(usual), hub_source(usual)) == (f"far, from {place}", str(place))
    finally: del os.environ["FAR_AWAY"]
    small = {"name": "world", "n_authors": 3, "n_forget": 1}
    assert "_source" not in data_description(small, "x/y"), "it takes none"

def test_both_are_sent_to_other_processes_with_their_limits(place):
    for kind in KINDS: methods(kind)
    sent = shipment()
    for key in (("architecture", "shared"), ("dataset", "colours")):
        assert key in sent.entries and key not in sent.unsendable
    digest, packed = sent.entries["dataset", "colours"]
    arrived = pickle.loads(packed)
    assert arrived.options == METHODS["dataset"]["colours"].options and len(digest) == 16
    with pytest.raises(ValueError, match="dataset colours: n must be of type int >= 2, got 1"):
        arrived.checked({"n": 1})

def test_an_option_called_name_is_refused(place):
    @dataset(label="Named")
    def named(name:str="x"): "Give nothing"
    with pytest.raises(ValueError, match="the dataset 'named' has an option called name"):
        data_description({"name": "named"})

# --- models

def test_an_architecture_may_have_options_of_its_own(place):
    assert run_id(base()) != run_id(base(groups=2))
    with pytest.raises(ValueError, match="^model: groups must be of type int, got 'x'$"):
        base(groups="x")
    with pytest.raises(ValueError, match="^model has no setting 'groups'; known: d_model"):
        base_models(colours(), "llama", SHAPE | {"groups": 1}, HOW, HOW)

def test_an_architecture_that_lacks_part_of_the_shape_says_so(place):
    from unloc.register import architecture
    @architecture(label="Flat")
    def flat(vocab_size, seed, d_model:int=16): "Build nothing"
    with pytest.raises(ValueError, match="^architecture flat has no option 'n_layers'; known: d_m"):
        base_models(colours(), "flat", SHAPE, HOW, HOW)

def test_both_are_in_the_name_of_a_run_and_compute_it(place, tmp_path):
    described = base(groups=1)
    assert {"dataset colours", "architecture shared"} < described["code"].keys()
    judged = standard(described, {"retain": 4, "utility": 1, "max_new_tokens": 3})
    injected = injection(judged, 0, {"fraction": .5, "epochs": 1, "lr": 1e-2, "batch_size": 2})
    unlearned = unlearning(injected, "Oracle", "npo", {"lr": 1e-3, "epochs": 1, "batch_size": 2})
    store = Store(tmp_path / "runs")
    for one in (described, judged, injected, unlearned): store.do(one, compute)
    assert store[unlearned].json()["region"] == 32
    config = json.loads((store[described].path / "retained" / "config.json").read_text("utf-8"))
    assert config["num_key_value_heads"] == 1, "the option reached the model"
    (place / "my_model.py").write_text(MODEL.replace("eos_token_id=1", "eos_token_id=2"), "utf-8")
    assert run_id(base(groups=1)) != run_id(described)
    (place / "my_model.py").write_text("# a comment\n" + MODEL, "utf-8")
    assert run_id(base(groups=1)) == run_id(described)

def test_a_page_is_found_without_all_others():
    code = """if True:
        import sys
        from unloc.data import data_description, hub_source
        found = data_description({'name': 'world', 'n_authors': 3, 'n_forget': 1})
        print(len(found['sha256']), hub_source({'name': 'tofu'}), 'torch' in sys.modules)
    """
    env = {k: v for k, v in os.environ.items() if k not in ("UNLOC_TOFU", "UNLOC_PLUGINS")}
    asked = [sys.executable, "-c", code]
    found = subprocess.run(asked, capture_output=True, encoding="utf-8", env=env)
    assert found.stdout == "64 locuslab/TOFU False\n", found.stderr
    assert at_hand("dataset", "none of us") is None

# --- the usual weights of an objective's terms

def test_weights_that_nobody_sets_are_the_objectives_own():
    fields = {"lr": 1e-3, "epochs": 1}
    origin = {"kind": "inject", "fraction": .1, "seed": 0}
    for name, method in methods("objective").items():
        recipe = unlearning(origin, "Oracle", name, fields)["recipe"]
        assert not {"alpha", "gamma"} & recipe.keys()
        found = Recipe.of(name, recipe)
        usual = {"alpha": 1., "gamma": 1.} | dict(method.about)
        assert (found.alpha, found.gamma) == (usual["alpha"], usual["gamma"]), name
        given = Recipe.of(name, unlearning(origin, "Oracle", name, fields | {"alpha": 2})["recipe"])
        assert (given.alpha, given.gamma) == (2., usual["gamma"]), name
    assert Recipe.of("pdu", fields).alpha == find("objective", "pdu").about["alpha"] > 1

# --- one list of names

def lists_of(names, tree): # lists, tables and the like that hold two of some names or more
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict): parts = [*node.keys, *node.values]
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set)): parts = node.elts
        else: continue
        held = {part.value for part in parts if isinstance(part, ast.Constant)}
        if len(names & held) > 1: yield node.lineno

def elsewhere(): # the package's code, methods' own pages aside
    return [p for p in (ROOT / "unloc").glob("**/*.py") if p.parent.name != "methods"]

@pytest.mark.parametrize("kind", KINDS)
def test_no_other_place_lists_architectures_or_data_sets(kind):
    names, labels = set(methods(kind)), {m.label for m in methods(kind).values()}
    assert list(lists_of(names, ast.parse(repr(sorted(names))))) == [1], "the test sees a list"
    for path in elsewhere():
        if path.name == "_modidx.py": continue
        tree = ast.parse(path.read_text("utf-8"))
        assert not list(lists_of(names, tree)), f"{path.name} lists {sorted(names)}"
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not labels & texts - {"TOFU"}, f"{path.name} has a label of its own"

@pytest.mark.parametrize("kind", KINDS)
def test_no_code_asks_whether_a_method_has_a_certain_name(kind):
    names = set(methods(kind))
    for path in elsewhere():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Compare): continue
            held = {x.value for x in node.comparators if isinstance(x, ast.Constant)}
            assert not names & held, f"{path.name}, line {node.lineno}"

def test_each_is_a_page_of_its_own():
    for kind in KINDS:
        for name, method in methods(kind).items():
            assert method.function.__module__ == f"unloc.methods.{name}"
            assert (ROOT / "nbs" / "methods" / f"{name}.ipynb").is_file()

# --- the command

PROFILE = """
[toys]
inherits = "smoke"
notebooks = ["21_oracle_random"]
plugins = ["my_model.py", "my_facts.py"]
data = {"name": "colours", "n": 8}
archs = ["shared"]
unlearn = {"wga": {"lr": 0.005, "epochs": 1, "batch_size": 2}}
"""

@pytest.fixture(scope="module")
def project(tmp_path_factory, guarded, command):
    folder = tmp_path_factory.mktemp("toys") / "own"
    env = {k: v for k, v in guarded.items() if k not in ("UNLOC_PROJECT", "UNLOC_PLUGINS")}
    def ask(*words, at=folder):
        return subprocess.run([command, *words], cwd=at, env=env, capture_output=True,
            encoding="utf-8", timeout=1800)
    assert ask("init", str(folder), at=folder.parent).returncode == 0
    with (folder / "settings.ini").open("a", encoding="utf-8") as file: file.write(PROFILE)
    for name, text in (("my_model.py", MODEL), ("my_facts.py", FACTS), ("colours.txt", LINES)):
        (folder / name).write_text(text, "utf-8")
    return folder, ask

def test_the_command_lists_plans_and_computes_them(project):
    folder, ask = project
    listed = ask("list").stdout
    for kind, name, text, file in (("architecture", "shared", "Shared Llama", "my_model.py"),
        ("dataset", "colours", "Colours", "my_facts.py"),
        ("dataset", "world", "Author world", "unloc.methods.world")):
        assert any(line.split() == [kind, name, *text.split(), file]
            for line in listed.splitlines()), (name, listed)
    planned = ask("plan", "--profile", "toys", "--jobs", "1")
    assert planned.returncode == 0 and "shared: trained from scratch" in planned.stdout, planned
    assert f"facts: 8 colours, from {folder / 'colours.txt'}" in planned.stdout
    made = ask("reproduce", "--profile", "toys", "--jobs", "2")
    assert made.returncode == 0 and "Traceback" not in made.stderr, made
    table = folder / "figures" / "toys" / "table2_oracle_random.csv"
    with table.open(encoding="utf-8") as file: rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"Shared Llama"}, "its label, not its name"
