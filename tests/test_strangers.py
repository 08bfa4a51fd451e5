"""Somebody who has never seen the package's code adds methods and facts of their own, one file
each, and finds them in plans, lists, runs and tables: with a checkout and from a wheel."""
import copy, csv, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = "Ada", "Bela", "Cyd", "Dov", "Eli", "Fay", "Gus", "Hal", "Ida", "Jon"
PLACES = "Velm", "Orto", "Suna", "Pirk", "Lund", "Quay", "Moss", "Tarn", "Brae", "Holm"
ASKED = ("lives", "was born", "works", "studied", "got married")
FILES = {
    "my_localizer.py": """
        import torch
        from unloc.models import output_projections, value_vectors
        from unloc.register import localizer

        @localizer(label='Shortest', passes=0)
        def shortest(model, power:float=1.):
            "Score a value vector by its length, the short ones first"
            vectors = [value_vectors(p).detach().float() for p in output_projections(model)]
            return torch.stack([-x.norm(dim=0) ** power for x in vectors])
        """,
    "my_objective.py": """
        from unloc import objectives
        from unloc.register import objective
        from unloc.unlearning_run import Term

        @objective(label='Doubt', retain='softly')
        def doubt(run, facts, rows, epoch, beta:float=.5):
            "Ascend on the answers, a part of the way"
            return Term([facts], lambda answers: -beta * objectives.nll(*answers))
        """,
    "my_retain_term.py": """
        from unloc import objectives
        from unloc.register import retain_term
        from unloc.unlearning_run import Term

        @retain_term(label='Soft NLL')
        def softly(run, facts):
            "Keep the answers of retain facts, less strictly"
            return Term([facts], lambda answers: .75 * objectives.nll(*answers))
        """,
    "my_editor.py": """
        from unloc.change import Change
        from unloc.masked import columns_of
        from unloc.register import editor

        @editor(label='Turning', passes=0)
        def turning(model, region, share:float=1.):
            "Point the value vectors of a region the other way"
            values = columns_of(model, region).items()
            return Change.of(model, {place: (i, (1 - 2 * share) * x) for place, (i, x) in values})
        """,
    "my_attack.py": """
        from unloc.register import attack
        from unloc.scoring import score

        @attack(label='whispering', passes=1)
        def whisper(scene, strength:float=1.):
            "Scale the value vectors of the first layer"
            def known(model):
                weight = model.model.layers[0].mlp.down_proj.weight
                kept = weight.data.clone()
                weight.data *= strength
                try: return score(model, scene.forget).extraction_strength
                finally: weight.data.copy_(kept)
            return scene.measured({'': known})
        """,
    "my_metric.py": """
        from unloc.register import metric

        @metric(label='Weakest', margin=.1)
        def weakest(measured, of:str='forget'):
            "Measure the extraction strength of the fact that is known least"
            return measured.scores[of].extraction_strength.min()
        """,
    "my_data.py": """
        from dataclasses import replace
        from unloc.facts import Fact
        from unloc.invented import author_world
        from unloc.register import dataset

        def about(group, n):
            return tuple(Fact(f'Where is {group} {i}?', f'It is in {i} Hill.') for i in range(n))

        @dataset(label='Hills', origin='{n} hills, made up')
        def hills(n:int=12):
            "Invent places on hills"
            usual = author_world(2, 1) # for what everybody knows, and refusals
            return replace(usual, name='hills', forget=about('house', n // 3),
                retain=about('barn', n), holdout=())
        """,
    "my_architecture.py": """
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from unloc.register import architecture

        @architecture(label='Narrow Qwen', model_type='qwen2')
        def narrow(vocab_size, seed, d_model:int=32, n_layers:int=2, d_ff:int=128, n_heads:int=2):
            "Build a small random Qwen 2"
            sizes = dict(hidden_size=d_model, num_hidden_layers=n_layers, intermediate_size=d_ff,
                num_attention_heads=n_heads, num_key_value_heads=n_heads)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, **sizes)).eval()
        """}
PROFILE = """
[strange]
inherits = "smoke"
notebooks = ["21_oracle_random", "24_localization", "25_localizers", "27_arms", "28_recovery"]
plugins = ["my_localizer.py", "my_objective.py", "my_retain_term.py", "my_editor.py",
    "my_attack.py", "my_metric.py", "my_data.py", "my_architecture.py"]
data = {"name": "file", "path": "my_facts.jsonl"}
evaluate = {"retain": 20, "utility": 4, "max_new_tokens": 16, "full_every": 2,
    "metrics": {"weakest": {"of": "retain"}}}
unlearn = {"wga": {"lr": 0.005, "epochs": 1}}
seeds = 2
attacked_unlearn = {"wga": {"lr": 0.005, "epochs": 1}}
attacked_seeds = 2
arms = ["Oracle", "turning(share=0.5)"]
attack = {"level": 0, "usual": false, "attacks": {"whisper": {"strength": 2}}}
retention = {}
scored = ["random", "weight_norm", "shortest"]
localization_seeds = 1
localizers = ["shortest"]
localized_unlearn = {
    "wga": {"lr": 0.005, "epochs": 1},
    "doubt": {"lr": 0.005, "epochs": 1, "beta": 0.25}}
localizer_seeds = 3
own_units = {}

[elsewhere]
inherits = "strange"
notebooks = ["24_localization"]
data = {"name": "hills", "n": 15}
archs = ["narrow"]
model = {"d_model": 32, "n_layers": 2, "d_ff": 128, "n_heads": 2, "vocab_size": 300}
scored = ["shortest", "random"]
"""
ALONE = [sys.executable, "-c", "from unloc.cli import main; raise SystemExit(main())"]
DRIVER = """if True:
    import contextlib, json, sys
    from unloc.cli import main
    for line in sys.stdin:
        with contextlib.redirect_stderr(sys.stdout): done = main(json.loads(line))
        print(chr(0), done, flush=True)
"""
TABLES = "localization", "table1_localizers_data", "table1_localizers"

def facts():
    "Give facts as JSON lines: a question, its answer, and the set that they belong to"
    for i, who in enumerate(PEOPLE):
        group = "forget" if i < 2 else "holdout" if i == 9 else "retain"
        for k, what in enumerate(ASKED):
            right, wrong = (PLACES[(3 * i + k + shift) % len(PLACES)] for shift in (0, 5))
            said = [f"{who} {what} in {place}." for place in (right, wrong)]
            yield {"set": group, "question": f"Where is it that {who} {what}?", "answer": said[0],
                "perturbed_answer": [said[1]]}

class Project:
    "A folder that unloc init made, with files of one's own, far from any checkout"
    def __init__(self, folder, command, env):
        self.root, self.command = folder / "strange", command
        self.env = {k: v for k, v in env.items() if k not in ("UNLOC_PROJECT", "UNLOC_PLUGINS")}
        self.ask("init", str(self.root), at=folder)
        with (self.root / "settings.ini").open("a", encoding="utf-8") as file: file.write(PROFILE)
        for name, text in FILES.items(): self.write(name, text)
        lines = "".join(json.dumps(fact) + "\n" for fact in facts())
        (self.root / "my_facts.jsonl").write_text(lines, "utf-8")

    def write(self, name, text, old="", new=""):
        assert old in text
        lines = [line.removeprefix(" " * 8) for line in text.replace(old, new).split("\n")]
        (self.root / name).write_text("\n".join(lines), "utf-8")

    def ask(self, *words, at=None):
        return subprocess.run([*self.command, *words], cwd=at or self.root, env=self.env,
            capture_output=True, encoding="utf-8", timeout=1800)

    def do(self, *words):
        found = self.ask(*words)
        assert found.returncode == 0 and "Traceback" not in found.stderr, (words, found)
        return found.stdout

    def profile(self, command, *words): return self.do(command, "--profile", "strange", *words)

    def runs(self): # name: description
        return {f.name: described(f) for f in (self.root / "_runs").iterdir() if finished(f)}

    def changed(self): # file of a run: when it was written
        files = (self.root / "_runs").glob("*/*")
        return {f: f.stat().st_mtime_ns for f in files if finished(f.parent)}

    def csv(self, name): return self.root / "figures" / "strange" / f"{name}.csv"
    def rows(self, name):
        with self.csv(name).open(encoding="utf-8") as file: return list(csv.DictReader(file))

class Session:
    "One process that does several commands, so that it imports once"
    def __init__(self, project):
        env, pipe = project.env, subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=project.root, env=env,
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8")

    def ask(self, *words): # exit status, lines
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        said = []
        while not (line := self.process.stdout.readline()).startswith(chr(0)):
            assert line, (words, said)
            said.append(line)
        return int(line[1:]), said

    def do(self, *words):
        status, said = self.ask(*words)
        assert status == 0, (words, said)
        return "".join(said)

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)

def finished(folder): # no lock, and no run that failed halfway
    return re.fullmatch("[0-9a-f]{16}", folder.name) is not None

def described(folder):
    return json.loads((folder / "description.json").read_text("utf-8"))["description"]

def of(runs, **fields): # names of the runs whose descriptions have some fields
    return {name for name, d in runs.items() if all(d.get(k) == x for k, x in fields.items())}

@pytest.fixture(scope="module")
def wheel(tmp_path_factory, command): # command: skips where there is none
    "Install the package as a wheel into a folder; None where no wheel can be made"
    source, to = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("unloc", "nbs"): shutil.copytree(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        return None
    where = ["--wheel-dir", str(source / "dist")]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", ".", *alone, "--no-build-isolation", *where], cwd=source,
        check=True, capture_output=True)
    made, = (source / "dist").glob("unloc-*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(to), str(made)], check=True,
        capture_output=True)
    return to

@pytest.fixture(scope="module")
def project(tmp_path_factory, guarded, command, wheel): # without a checkout where that can be
    folder = tmp_path_factory.mktemp("strangers")
    if wheel is None: return Project(folder, [str(command)], guarded)
    path = os.pathsep.join([str(wheel), guarded["PYTHONPATH"].split(os.pathsep)[0]])
    return Project(folder, ALONE, guarded | {"PYTHONPATH": path})

@pytest.fixture(scope="module")
def planned(project): return project.profile("plan", "--jobs", "2")

@pytest.fixture(scope="module")
def computed(project, planned):
    project.profile("run", "--jobs", "2")
    return project.runs()

@pytest.fixture(scope="module")
def drawn(project, computed):
    before = project.changed()
    project.profile("reproduce", "--jobs", "2")
    assert project.changed() == before, "it only draws"
    return project

def test_the_list_shows_them_with_their_files(project):
    said = project.do("list")
    for kind, name, label, file in (
        ("localizer", "shortest", "Shortest", "my_localizer.py"),
        ("objective", "doubt", "Doubt", "my_objective.py"),
        ("retain", "softly", "Soft NLL", "my_retain_term.py"),
        ("editor", "turning", "Turning", "my_editor.py"),
        ("attack", "whisper", "whispering", "my_attack.py"),
        ("metric", "weakest", "Weakest", "my_metric.py"),
        ("dataset", "hills", "Hills", "my_data.py"),
        ("architecture", "narrow", "Narrow Qwen", "my_architecture.py"),
        ("localizer", "loudest", "Loudest", "my_methods.py"), # from unloc init
        ("localizer", "weight_norm", "Weight norm", "unloc.methods.weight_norm"),
    ): assert re.search(rf"^  {kind} +{name} +{label} +{re.escape(file)}$", said, re.M), name
    assert re.search(r"^  strange +notebooks: 21_oracle_random, 24_localization, ", said, re.M)
    assert max(map(len, said.splitlines())) <= 120

def test_the_plan_counts_them_before_anything_is_there(project, planned):
    assert planned.startswith("profile strange: 5 notebooks, 40 runs, 40 to do, 2 at a time\n")
    assert re.search(r"^  localize +\d+/\d+ .*shortest", planned, re.M)
    assert re.search(r"^  unlearn +18/18 .*wga, doubt", planned, re.M)
    assert re.search(r"^  edit +2/2 .*turning\(share=0.5\)$", planned, re.M)
    assert re.search(r"^  attack +6/6 .*whisper$", planned, re.M)
    assert re.search(r"^  judge +1/1 .*weakest$", planned, re.M)
    assert f"your own, from {project.root / 'my_facts.jsonl'}" in planned
    assert planned.endswith("everything is there and fits\n")

def test_runs_are_described_with_them(computed):
    assert len(computed) == 40 and len(of(computed, kind="base")) == 1
    assert len(of(computed, kind="unlearn", objective="doubt")) == 6
    for name in of(computed, kind="unlearn", objective="doubt"):
        code, recipe = computed[name]["code"], computed[name]["recipe"]
        assert {"objective doubt", "retain softly"} <= code.keys() and recipe["beta"] == .25
    for name in of(computed, kind="localize", localizer="shortest"):
        assert "localizer shortest" in computed[name]["code"]
    for name in of(computed, kind="edit", editor="turning(share=0.5)"):
        assert "editor turning(share=0.5)" in computed[name]["code"]
    for name in of(computed, kind="attack"):
        assert computed[name]["attack"]["attacks"] == {"whisper": {"strength": 2.}}
        assert [key for key in computed[name]["code"] if key.startswith("attack ")] == [
            "attack whisper"]
    judged = computed[of(computed, kind="judge").pop()]
    assert judged["evaluate"]["metrics"] == {"weakest": {"of": "retain"}}
    assert "metric weakest" in judged["code"]
    base = computed[of(computed, kind="base").pop()]
    assert base["data"]["name"] == "file" and len(base["data"]["sha256"]) == 64

def test_tables_show_them(drawn):
    assert {row["localizer"] for row in drawn.rows("localization")} == {
        "random", "weight_norm", "shortest"}
    data = drawn.rows("table1_localizers_data")
    assert {(row["localizer"], row["objective"]) for row in data} == {
        (where, how) for where in ("random", "shortest") for how in ("wga", "doubt")}
    table = drawn.rows("table1_localizers")
    assert {row["region"] for row in table} == {"Random", "Shortest"} and "Doubt" in table[0]
    assert all(re.match(r"-?\d", row["Doubt"]) for row in table if row["metric"] == "AUES")
    of_norm = {row["localizer"]: row for row in drawn.rows("localization")}
    precision = {name: float(row["average_precision"]) for name, row in of_norm.items()}
    assert precision["shortest"] < precision["weight_norm"], "each is the other, upside down"

def test_an_editor_is_an_arm_among_others(drawn):
    table, data = drawn.rows("table4_arms"), drawn.rows("table4_arms_data")
    assert [(row["metric"], row["arm"]) for row in table] == [
        (metric, arm) for metric in ("AUES", "MU95") for arm in ("Oracle", "turning(share=0.5)")]
    assert len(data) == 4 and all(re.match(r"-?\d", row["value"]) for row in table)
    ends = {row["arm"]: row["RS_end"] for row in data}
    assert ends["Oracle"] != ends["turning(share=0.5)"]

def test_an_attack_is_a_row_of_what_comes_back_of_all_arms(drawn):
    assert {row["attack"] for row in drawn.rows("table3_recovery")} == {"whispering"}
    data = drawn.rows("table3_recovery_data")
    assert {row["arm"] for row in data} == {"Oracle", "turning(share=0.5)", "Restore"}
    measured = [row for row in data if re.match(r"-?\d", row["recovered"])]
    assert len(data) == 6 and {"turning(share=0.5)", "Restore"} <= {row["arm"] for row in measured}

def test_a_metric_is_a_row_of_the_pairs(drawn):
    table = drawn.rows("table2_oracle_random")
    assert [row["metric"] for row in table] == ["AUES", "MU95", "Weakest"]
    assert re.match(r"\d", table[-1]["Oracle"]) and "→" in table[-1]["FS or FQ"]
    about = json.loads(drawn.csv("table2_oracle_random").with_suffix(".json").read_text("utf-8"))
    assert "±0.1 Weakest" in about["caption"]

@pytest.fixture(scope="module")
def session(drawn):
    yield (session := Session(drawn))
    session.end()

@pytest.mark.parametrize("file, old, new, again", [
    ("my_localizer.py", "return torch.stack([-x.norm", "return torch.stack([-2 * x.norm",
        dict(localize=2, unlearn=6)),
    ("my_objective.py", "lambda answers: -beta", "lambda answers: -2 * beta", dict(unlearn=6)),
    ("my_retain_term.py", ".75 *", ".5 *", dict(unlearn=6)),
    ("my_editor.py", "2 * share", "3 * share", dict(edit=2, attack=2)),
    ("my_attack.py", "layers[0]", "layers[1]", dict(attack=6)),
    ("my_metric.py", ".min()", ".max()",
        dict(judge=1, inject=4, teach=1, localize=7, unlearn=18, edit=2, attack=6))])
def test_an_edited_method_renames_its_own_runs_and_no_other(
    drawn, session, file, old, new, again):
    profile = "--profile", "strange", "--jobs", "2"
    before, times = drawn.runs(), drawn.changed()
    drawn.write(file, FILES[file], old, new)
    try:
        planned = session.do("plan", *profile)
        assert f"40 runs, {sum(again.values())} to do" in planned
        session.do("run", *profile)
    finally: drawn.write(file, FILES[file])
    now = drawn.runs()
    assert now.keys() > before.keys() and drawn.changed().items() >= times.items()
    fresh = {name: d for name, d in now.items() if name not in before}
    assert {kind: len(of(fresh, kind=kind)) for kind in again} == again
    assert len(fresh) == sum(again.values()), "nothing else, and the base not"
    assert ", 0 to do" in session.do("plan", *profile), "as it was, all is there"

@pytest.fixture(scope="module")
def moved(drawn, session): # the plan before, and the study of other facts and models
    profile = "--profile", "elsewhere", "--jobs", "2"
    before, planned = drawn.runs(), session.do("plan", *profile)
    session.do("reproduce", *profile)
    return planned, {name: d for name, d in drawn.runs().items() if name not in before}

def test_a_data_set_and_an_architecture_reach_plans_runs_and_tables(drawn, moved):
    planned, runs = moved
    assert planned.startswith("profile elsewhere: 1 notebooks, 5 runs, 5 to do, 2 at a time\n")
    assert "\nfacts: 15 hills, made up\nnarrow: trained from scratch\n" in planned
    assert len(runs) == 5
    name, = of(runs, kind="base")
    assert runs[name]["data"].items() >= {"name": "hills", "n": 15}.items()
    assert {"dataset hills", "architecture narrow"} <= runs[name]["code"].keys()
    config = drawn.root / "_runs" / name / "retained" / "config.json"
    assert json.loads(config.read_text("utf-8"))["model_type"] == "qwen2"
    table = drawn.root / "figures" / "elsewhere" / "localization.csv"
    with table.open(encoding="utf-8") as file: rows = list(csv.DictReader(file))
    assert [(row["arch"], row["localizer"]) for row in rows] == [
        ("narrow", "shortest"), ("narrow", "random")]
    assert all(re.match(r"\d", row["recall"]) for row in rows)

@pytest.mark.parametrize("file, old, new", [
    ("my_data.py", "It is in", "It was in"), ("my_architecture.py", "manual_seed(seed)",
        "manual_seed(seed + 1)")])
def test_an_edited_data_set_or_architecture_renames_its_own_runs(
    drawn, session, moved, file, old, new):
    drawn.write(file, FILES[file], old, new)
    try: planned, other = (session.do("plan", "--profile", p) for p in ("elsewhere", "strange"))
    finally: drawn.write(file, FILES[file])
    assert "5 runs, 5 to do" in planned and ", 0 to do" in other
    assert ", 0 to do" in session.do("plan", "--profile", "elsewhere"), "as it was"

def test_comments_and_other_methods_rename_nothing(drawn):
    name = "my_objective.py"
    drawn.write(name, FILES[name], '"Ascend on the answers', '"Go up # the answers')
    drawn.write("more.py", FILES["my_localizer.py"], "shortest(", "another(")
    try: assert ", 0 to do" in drawn.profile("plan", "--plugin", "more.py")
    finally:
        drawn.write(name, FILES[name])
        (drawn.root / "more.py").unlink()

@pytest.mark.parametrize("file, old, new, says", [
    ("my_localizer.py", "label='Shortest'", "label=''", "lacks a label"),
    ("my_objective.py", "beta:float=.5", "beta=.5", "has an option without a type: beta"),
    ("my_retain_term.py", "unloc.unlearning_run", "unloc.unlearning_rum",
        "No module named 'unloc.unlearning_rum'")])
def test_a_mistake_is_one_line_that_names_the_file(drawn, file, old, new, says):
    drawn.write(file, FILES[file], old, new)
    try: found, listed = drawn.ask("run", "--profile", "strange"), drawn.do("list")
    finally: drawn.write(file, FILES[file])
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found
    assert file in found.stderr and says in found.stderr and "Traceback" not in found.stderr
    assert says in " ".join(listed.split()) and "weight_norm" in listed, "the others are shown"

@pytest.mark.parametrize("file, old, new, page, says", [
    ("my_localizer.py", "torch.stack([-x.norm(dim=0) ** power for x in vectors])", "torch.ones(3)",
        "24_localization", "localizer 'shortest' gave scores of shape (3,), the model's "),
    ("my_localizer.py", "[-x.norm", "[float('nan') * x.norm", "24_localization",
        "localizer 'shortest' gave 512 scores that are NaN or infinite; every unit needs a "),
    ("my_objective.py", "return Term(", "run.model.lm_head.weight.data += 1; return Term(",
        "25_localizers", "weights outside the region changed: digest "),
    ("my_editor.py", "(model, {place", "(model, {'lm_head.weight': model.lm_head.weight + 1} | "
        "{place", "27_arms", "the editor turning(share=0.5) changed weights outside its region; "),
    ("my_attack.py", "weight.data.copy_(kept)", "pass", "28_recovery",
        "the attack whisper changed a weight of a model; put every weight back before returning")])
def test_what_a_method_does_wrong_is_one_line_and_no_run_is_lost(
    drawn, session, file, old, new, page, says):
    times = drawn.changed()
    drawn.write(file, FILES[file], old, new)
    try: status, said = session.ask("run", "--profile", "strange", "--only", page, "--jobs", "1")
    finally: drawn.write(file, FILES[file])
    errors = [line for line in said if not line.startswith(("strange ", "profile strange:"))]
    assert status == 1 and len(errors) == 1 and errors[0].startswith("unloc: "), said
    assert says in errors[0] and drawn.changed().items() >= times.items()
    assert "40 runs, 0 to do" in session.do("plan", "--profile", "strange")

# --- with a checkout

@pytest.fixture(scope="module")
def checkout(drawn, wheel, command, guarded): # the same folder, by a command of the checkout
    if wheel is None: pytest.skip("no wheel can be made beside this interpreter")
    where = [sys.executable, "-c", "import unloc; print(unloc.__file__)"]
    found = subprocess.run(
        where, cwd=drawn.root, env=drawn.env, capture_output=True, encoding="utf-8")
    assert Path(found.stdout.strip()).is_relative_to(wheel), "all above is done by the wheel"
    other = copy.copy(drawn)
    other.command, other.env = [str(command)], drawn.env | {"PYTHONPATH": guarded["PYTHONPATH"]}
    return other

def test_a_checkout_gives_the_same_runs_and_tables(drawn, checkout, tmp_path):
    some = "--only", "24_localization", "25_localizers", "--jobs", "2"
    checkout.profile("reproduce", *some, "--store", str(tmp_path / "r"), "--out", str(tmp_path))
    before, found = drawn.runs(), [f for f in (tmp_path / "r").iterdir() if finished(f)]
    assert len(found) == 23 and {f.name for f in found} <= before.keys(), "the same names"
    for name in TABLES:
        mine = tmp_path / "strange" / f"{name}.csv"
        assert mine.read_bytes() == drawn.csv(name).read_bytes(), name
    assert "40 runs, 0 to do" in checkout.profile("plan"), "the other methods, too"

def test_nobody_asked_the_network(drawn, guarded):
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""
