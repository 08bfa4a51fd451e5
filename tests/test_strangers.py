"""Somebody who has never seen the package's code adds methods and facts of their own, one file
each, and finds them in plans, lists, runs and tables: with a checkout and from a wheel."""
import csv, json, os, re, shutil, subprocess, sys
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
        from unloc.training import Term

        @objective(label='Doubt', retain='softly')
        def doubt(run, facts, rows, epoch, beta:float=.5):
            "Ascend on the answers, a part of the way"
            return Term([facts], lambda answers: -beta * objectives.nll(*answers))
        """,
    "my_retain_term.py": """
        from unloc import objectives
        from unloc.register import retain_term
        from unloc.training import Term

        @retain_term(label='Soft NLL')
        def softly(run, facts):
            "Keep the answers of retain facts, less strictly"
            return Term([facts], lambda answers: .75 * objectives.nll(*answers))
        """}
PROFILE = """
[strange]
inherits = "smoke"
notebooks = ["24_localization", "25_localizers"]
plugins = ["my_localizer.py", "my_objective.py", "my_retain_term.py"]
data = {"name": "file", "path": "my_facts.jsonl"}
scored = ["random", "weight_norm", "shortest"]
localization_seeds = 1
localizers = ["shortest"]
localized_unlearn = {
    "wga": {"lr": 0.005, "epochs": 1},
    "doubt": {"lr": 0.005, "epochs": 1, "beta": 0.25}}
localizer_seeds = 3
own_units = {}
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
        folders = (f for f in (self.root / "_runs").iterdir() if f.name != "locks")
        return {f.name: described(f) for f in folders}

    def changed(self): # file of a run: when it was written
        files = (self.root / "_runs").glob("*/*")
        return {f: f.stat().st_mtime_ns for f in files if f.parent.name != "locks"}

    def csv(self, name): return self.root / "figures" / "strange" / f"{name}.csv"
    def rows(self, name):
        with self.csv(name).open(encoding="utf-8") as file: return list(csv.DictReader(file))

def described(folder):
    return json.loads((folder / "description.json").read_text("utf-8"))["description"]

def of(runs, **fields): # names of the runs whose descriptions have some fields
    return {name for name, d in runs.items() if all(d.get(k) == x for k, x in fields.items())}

@pytest.fixture(scope="module")
def project(tmp_path_factory, guarded, command):
    return Project(tmp_path_factory.mktemp("strangers"), [str(command)], guarded)

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
        ("localizer", "loudest", "Loudest", "my_methods.py"), # from unloc init
        ("localizer", "weight_norm", "Weight norm", "unloc.methods.weight_norm"),
    ): assert re.search(rf"^  {kind} +{name} +{label} +{re.escape(file)}$", said, re.M), name
    assert re.search(r"^  strange +notebooks: 24_localization, 25_localizers$", said, re.M)
    assert max(map(len, said.splitlines())) <= 120

def test_the_plan_counts_them_before_anything_is_there(project, planned):
    assert planned.startswith("profile strange: 2 notebooks, 23 runs, 23 to do, 2 at a time\n")
    assert re.search(r"^  localize +\d+/\d+ .*shortest", planned, re.M)
    assert re.search(r"^  unlearn +12/12 .*wga, doubt", planned, re.M)
    assert f"your own, from {project.root / 'my_facts.jsonl'}" in planned
    assert planned.endswith("everything is there and fits\n")

def test_runs_are_described_with_them(computed):
    assert len(computed) == 23 and len(of(computed, kind="base")) == 1
    assert len(of(computed, kind="unlearn", objective="doubt")) == 6
    for name in of(computed, kind="unlearn", objective="doubt"):
        code, recipe = computed[name]["code"], computed[name]["recipe"]
        assert {"objective doubt", "retain softly"} <= code.keys() and recipe["beta"] == .25
    for name in of(computed, kind="localize", localizer="shortest"):
        assert "localizer shortest" in computed[name]["code"]
    base = computed[of(computed, kind="base").pop()]
    assert base["data"]["name"] == "file" and len(base["data"]["sha256"]) == 64

def test_tables_show_them(drawn):
    assert {row["localizer"] for row in drawn.rows("localization")} == {
        "random", "weight_norm", "shortest"}
    data = drawn.rows("table1_localizers_data")
    assert {(row["localizer"], row["objective"]) for row in data} == {
        (where, how) for where in ("random", "shortest") for how in ("wga", "doubt")}
    table = drawn.rows("table1_localizers")
    assert {row["region"] for row in table} == {"Random", "Shortest"} and "DOUBT" in table[0]
    assert all(re.match(r"-?\d", row["DOUBT"]) for row in table if row["metric"] == "AUES")
    of_norm = {row["localizer"]: row for row in drawn.rows("localization")}
    precision = {name: float(row["average_precision"]) for name, row in of_norm.items()}
    assert precision["shortest"] < precision["weight_norm"], "each is the other, upside down"

@pytest.mark.parametrize("file, old, new, again", [
    ("my_localizer.py", "return torch.stack([-x.norm", "return torch.stack([-2 * x.norm",
        dict(localize=2, unlearn=6)),
    ("my_objective.py", "lambda answers: -beta", "lambda answers: -2 * beta", dict(unlearn=6)),
    ("my_retain_term.py", ".75 *", ".5 *", dict(unlearn=6))])
def test_an_edited_method_renames_its_own_runs_and_no_other(drawn, file, old, new, again):
    before, times = drawn.runs(), drawn.changed()
    drawn.write(file, FILES[file], old, new)
    try:
        planned = drawn.profile("plan", "--jobs", "2")
        assert f"23 runs, {sum(again.values())} to do" in planned
        drawn.profile("run", "--jobs", "2")
    finally: drawn.write(file, FILES[file])
    now = drawn.runs()
    assert now.keys() > before.keys() and drawn.changed().items() >= times.items()
    fresh = {name: d for name, d in now.items() if name not in before}
    assert {kind: len(of(fresh, kind=kind)) for kind in again} == again
    assert len(fresh) == sum(again.values()), "nothing else, and the base not"
    assert ", 0 to do" in drawn.profile("plan"), "as it was, all is there"

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
    ("my_retain_term.py", "unloc.training", "unloc.taining", "No module named 'unloc.taining'")])
def test_a_mistake_is_one_line_that_names_the_file(drawn, file, old, new, says):
    drawn.write(file, FILES[file], old, new)
    try: found, listed = drawn.ask("run", "--profile", "strange"), drawn.do("list")
    finally: drawn.write(file, FILES[file])
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found
    assert file in found.stderr and says in found.stderr and "Traceback" not in found.stderr
    assert says in " ".join(listed.split()) and "weight_norm" in listed, "the others are shown"

# --- without a checkout

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Install the package as a wheel into a folder"
    source, to = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("unloc", "nbs"): shutil.copytree(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip("there is no pip beside this interpreter")
    where = ["--wheel-dir", str(source / "dist")]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", ".", *alone, "--no-build-isolation", *where], cwd=source,
        check=True, capture_output=True)
    made, = (source / "dist").glob("unloc-*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(to), str(made)], check=True,
        capture_output=True)
    return to

def test_the_same_from_a_wheel(drawn, wheel, tmp_path, guarded):
    path = os.pathsep.join([str(wheel), guarded["PYTHONPATH"].split(os.pathsep)[0]])
    command = [sys.executable, "-c", "from unloc.cli import main; raise SystemExit(main())"]
    other = Project(tmp_path, command, guarded | {"PYTHONPATH": path})
    where = [sys.executable, "-c", "import unloc; print(unloc.__file__)"]
    found = subprocess.run(
        where, cwd=other.root, env=other.env, capture_output=True, encoding="utf-8")
    assert Path(found.stdout.strip()).is_relative_to(wheel), found
    assert " my_localizer.py\n" in other.do("list")
    other.profile("run", "--jobs", "2")
    other.profile("reproduce", "--jobs", "2")
    runs = other.runs()
    assert len(runs) == 23 and runs.keys() <= drawn.runs().keys(), "the same names"
    for name in TABLES: assert other.csv(name).read_bytes() == drawn.csv(name).read_bytes(), name

def test_nobody_asked_the_network(drawn, guarded):
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""
