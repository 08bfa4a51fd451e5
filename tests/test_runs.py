"""A run is there whole or not at all: kill -9, two processes at once, damaged files and more jobs
change no byte of a store, and its name changes with code and description only."""
import errno, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from unloc import identity, runs, steps
from unloc.identity import APART, page_digest, pages_behind
from unloc.runs import DamagedRun, Store, check_run, public, run_id, stages, sweep

GRID = [
    {"kind": "leaf", "n": n, "parent": {"kind": "root", "n": n % 2, "_slow": .1}, "_slow": .1}
    for n in range(6)]
COMPUTE = '''
import json, os, sys, time
from pathlib import Path
from unloc.runs import Store, sweep
def compute(description, parent, folder, progress):
    log = Path(os.environ["CALLS"])
    with open(log, "a") as f: f.write(f"{description['kind']} {description['n']}\\n")
    (folder / "first.json").write_text(json.dumps({"n": description["n"]}))
    (folder / "deep").mkdir(exist_ok=True)
    calls = len(log.read_text("utf-8").splitlines())
    held = calls >= int(os.environ.get("HOLD", 99)) and not Path("held").exists()
    known = parent.json("first.json")["n"] if parent else 0
    for i in range(5): # half-written for most of the time
        progress(i / 5); time.sleep(description["_slow"] / 5)
        with open(folder / "deep" / "rows.csv", "a" if i else "w") as f:
            f.write(f"{i},{description['n'] + known}\\n")
        if held and i == 2: Path("held").touch(); time.sleep(3600) # until it is killed
    if os.environ.get("FAIL"): raise OSError(28, "No space left on device")
'''
SCRIPT = (
    "import json, sys, slow; slow.sweep(slow.Store(sys.argv[1]), json.loads(sys.argv[2]),"
    " int(sys.argv[3]), slow.compute)")


@pytest.fixture
def start(tmp_path, guarded): # a sweep in a process of its own
    (tmp_path / "slow.py").write_text(COMPUTE, "utf-8")
    env = guarded | {
        "PYTHONPATH": f"{tmp_path}:{guarded['PYTHONPATH']}",
        "CALLS": str(tmp_path / "calls")}
    def popen(store, jobs=1, grid=GRID, **more):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / store), json.dumps(grid), str(jobs)],
            env=env | more,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True)
    return popen

def calls(tmp_path):
    return (
        (tmp_path / "calls").read_text("utf-8").split("\n")[:-1]
        if (tmp_path / "calls").exists()
        else [])
def files(root):
    return {
        str(f.relative_to(root)): f.read_bytes()
        for f in sorted(Path(root).rglob("*"))
        if f.is_file() and f.relative_to(root).parts[0] != "locks"}
def finish(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out, err
def until(true, process):
    while not true(): time.sleep(.005); assert process.poll() is None, process.communicate()

def compute(description, parent, folder, progress):
    (folder / "result.json").write_text(json.dumps({"n": description["n"]}), "utf-8")

# --- at any moment, in any company

@pytest.mark.parametrize("jobs", [1, 2])
def test_kill_and_rerun_gives_the_same_bytes(start, tmp_path, jobs):
    finish(start("whole"))
    kills = 0
    for after in (1, 4): # kill in the middle of a root, then in the middle of a leaf
        (tmp_path / "calls").unlink()
        (tmp_path / "held").unlink(missing_ok=True)
        process = start("killed", jobs, HOLD=str(after))
        until((tmp_path / "held").exists, process)
        os.killpg(process.pid, signal.SIGKILL); process.wait()
        left = [f for f in (tmp_path / "killed").iterdir() if f.suffix == ".partial"]
        for folder in (tmp_path / "killed").iterdir():
            if folder not in left and folder.name != "locks":
                check_run(folder) # what has its name is whole
        kills += bool(left)
        process.communicate()
    assert kills == 2, "the kills came in the middle"
    finish(start("killed", jobs))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 8 * 4
    before = calls(tmp_path)
    finish(start("killed", jobs))
    assert calls(tmp_path) == before, "nothing was left to do"

def test_two_processes_compute_each_run_once(start, tmp_path):
    both = [start("shared"), start("shared")]
    for process in both: finish(process)
    assert sorted(calls(tmp_path)) == sorted([f"leaf {n}" for n in range(6)] + ["root 0", "root 1"])
    finish(start("alone"))
    assert files(tmp_path / "shared") == files(tmp_path / "alone")

def test_who_waits_takes_over_when_the_holder_is_killed(start, tmp_path):
    one = [{"kind": "root", "n": 0, "_slow": 1.}]
    holder = start("shared", grid=one, HOLD="1")
    until((tmp_path / "held").exists, holder)
    waiting = start("shared", grid=one)
    time.sleep(2)
    assert (
        calls(tmp_path) == ["root 0"] and waiting.poll() is None
    ), "it does not begin while another holds the run"
    os.killpg(holder.pid, signal.SIGKILL); holder.communicate()
    finish(waiting)
    assert calls(tmp_path) == ["root 0"] * 2
    finish(start("alone", grid=one))
    assert files(tmp_path / "shared") == files(tmp_path / "alone")

@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_named_and_nothing_is_computed(tmp_path, monkeypatch, code):
    import fcntl
    def flock(file, how): raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError) as error: Store(tmp_path).do({"kind": "a", "n": 1}, None)
    assert (
        str(error.value)
        == f"the file system of {tmp_path} has no locks ({os.strerror(getattr(errno, code))}), so"
        " two processes could write over each other; put the store on one that has them:"
        " --store")
    assert [f.name for f in tmp_path.iterdir()] == ["locks"]

@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_leaves_what_was_there(start, tmp_path, jobs):
    finish(start("store", grid=GRID[:2]))
    before = files(tmp_path / "store")
    process = start("store", jobs, FAIL="1")
    _, err = process.communicate(timeout=1200)
    assert process.returncode and "No space left on device" in err
    found = files(tmp_path / "store")
    assert {name: found[name] for name in before} == before
    assert all(".partial/" in name for name in set(found) - set(before))
    finish(start("store", jobs))
    finish(start("whole"))
    assert files(tmp_path / "store") == files(tmp_path / "whole")

# --- stores that others left

def store_of_two(tmp_path): # a child on its parent
    store, parent = Store(tmp_path / "s"), {"kind": "a", "n": 1}
    child = {"kind": "b", "n": 2, "parent": parent}
    sweep(store, [child], compute=compute)
    return store, child, store.root / run_id(parent)

@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"machine": ["x"]}', '{"machine": 3}', "<<<<<<< HEAD", None])
def test_a_description_that_names_no_machine_costs_no_finished_run(
    content, tmp_path
): # of an early version, or damaged
    store, child, parent = store_of_two(tmp_path)
    if content is None: (parent / "description.json").unlink()
    else: (parent / "description.json").write_text(content, "utf-8")
    assert [run.json() for run in sweep(store, [child], compute=compute)] == [{"n": 2}]

@pytest.mark.parametrize("content", ["", "[]", "{}", "half"])
def test_a_damaged_divergence_is_named(content, tmp_path):
    store, child, parent = store_of_two(tmp_path)
    shutil.rmtree(store.root / run_id(child))
    (parent / "diverged.json").write_text(content, "utf-8")
    with pytest.raises(
        DamagedRun, match=f"run {parent.name} has no readable diverged.json .*delete the folder"):
        sweep(store, [child], compute=compute)

@pytest.mark.skipif(os.name != "posix", reason="makes links as POSIX does")
def test_a_run_may_be_a_link_but_not_to_nowhere(tmp_path):
    store, child, parent = store_of_two(tmp_path)
    parent.rename(tmp_path / "elsewhere"); parent.symlink_to(tmp_path / "elsewhere")
    assert sweep(store, [child["parent"]], compute=compute)[0].json() == {"n": 1}
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    def never(*_): pytest.fail("it is computed, and then has no place")
    with pytest.raises(
        DamagedRun, match=f"run {parent.name} is a link to {tmp_path}/elsewhere, which is not there"
    ):
        sweep(store, [child["parent"]], compute=never)

@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": float("nan")}, "plain values, finite numbers"),
        ({"x": {1}}, "plain values.*set is not JSON"),
        ({"x": {3: 4}}, "names are texts"),
        ({"x": Path("a")}, "plain values.*Path"),
        ({"parent": None}, "must be a dictionary")])
def test_a_description_that_cannot_be_named_is_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        sweep(Store(tmp_path), [{"kind": "a", "n": 1} | change], compute=compute)
    with pytest.raises(ValueError, match="must be a dictionary whose names are texts, got 'kind'"):
        sweep(Store(tmp_path), {"kind": "a"}, compute=compute)

@pytest.mark.parametrize("jobs", [0, -2, 2.5, None, True, "2"])
def test_a_number_of_jobs_that_is_none_is_refused(jobs, tmp_path):
    with pytest.raises(ValueError, match="jobs must be a whole number of at least 1, or -1"):
        sweep(Store(tmp_path), [{"kind": "a", "n": 1}], jobs, compute)

# --- reading

def damaged(run, how):
    data, manifest = run.file("result.json"), run.file("manifest.json")
    text = json.loads(manifest.read_text("utf-8"))
    match how:
        case "truncated": data.write_bytes(data.read_bytes()[:-1])
        case "longer": data.write_bytes(data.read_bytes() + b" ")
        case "altered": data.write_bytes(data.read_bytes().replace(b"1", b"2"))
        case "missing": data.unlink()
        case "description": run.file("description.json").write_text("{}", "utf-8")
        case "no manifest": manifest.unlink()
        case "empty manifest": manifest.write_text("", "utf-8")
        case "half manifest": manifest.write_text(manifest.read_text("utf-8")[:-9], "utf-8")
        case "other manifest": manifest.write_text("[]", "utf-8")
        case "manifest of other files":
            manifest.write_text(json.dumps({"filez": text["files"]}), "utf-8")
        case "wrong size":
            text["files"]["result.json"][0] += 1
            manifest.write_text(json.dumps(text), "utf-8")
        case "odd entry":
            text["files"]["result.json"] = 7
            manifest.write_text(json.dumps(text), "utf-8")
        case "files is a list": manifest.write_text('{"files": ["result.json"]}', "utf-8")
        case "not UTF-8": manifest.write_bytes(b"\xff\xfe")
        case "file is a folder": data.unlink(); data.mkdir()
        case "empty folder": shutil.rmtree(run.path); run.path.mkdir()
        case "run is a file": shutil.rmtree(run.path); run.path.write_text("", "utf-8")

@pytest.mark.parametrize(
    "how, says",
    [
        ("truncated", "result.json has 7 bytes, 8 expected"),
        ("longer", "result.json has 9 bytes, 8 expected"),
        ("altered", "result.json was altered"),
        ("missing", "lacks result.json, 8 bytes expected"),
        ("description", "description.json has 2 bytes"),
        ("wrong size", "result.json has 8 bytes, 9 expected"),
        ("file is a folder", "result.json"),
        *(
            (how, "no readable manifest.json")
            for how in (
                "no manifest", "empty manifest", "half manifest", "other manifest",
                "manifest of other files", "odd entry", "files is a list", "not UTF-8",
                "empty folder", "run is a file"))])
def test_damage_is_named_and_nothing_is_deleted(tmp_path, how, says):
    store, one = Store(tmp_path), {"kind": "a", "n": 1}
    run = store.do(one, compute)
    damaged(run, how)
    before = files(tmp_path)
    for read in (
        lambda: store[one],
        lambda: sweep(store, [one], compute=compute),
        lambda: sweep(store, [{"kind": "b", "n": 2, "parent": one}], compute=compute)):
        with pytest.raises(DamagedRun) as error: read()
        text = str(error.value)
        assert "\n" not in text
        assert run.path.name in text
        assert says in text
        assert f"delete the folder {run.path}" in text
    assert files(tmp_path) == before

def test_an_absent_run_is_named(tmp_path):
    with pytest.raises(KeyError, match=f"no run {run_id(GRID[0])}"): Store(tmp_path)[GRID[0]]

def test_store_gives_what_was_written(tmp_path):
    def write(description, parent, folder, progress):
        import pandas, torch
        from safetensors.torch import save_file
        pandas.DataFrame({"x": [.1 + .2, 1 / 3]}).to_csv(folder / "trajectory.csv", index=False)
        save_file({"a": torch.tensor([1., 2.])}, folder / "t.safetensors")
        compute(description, parent, folder, progress)
    code = {"steps.base": page_digest("steps.base")}
    run = Store(tmp_path).do({"kind": "a", "n": 1, "_where": "here", "code": code}, write)
    assert run.json() == {"n": 1}
    assert run.table().x.tolist() == [.1 + .2, 1 / 3]
    assert run.tensors("t.safetensors")["a"].tolist() == [1, 2]
    whole = json.loads(run.file("description.json").read_text("utf-8"))
    assert whole["description"] == {"kind": "a", "n": 1, "code": code}
    assert set(whole["libraries"]) == set(runs.LIBRARIES)
    assert set(json.loads(run.file("manifest.json").read_text("utf-8"))["files"]) == {
        "trajectory.csv", "t.safetensors", "result.json", "description.json"}

# --- names

def test_private_entries_are_no_part_of_a_name(tmp_path):
    deep = {
        "kind": "a",
        "n": 1,
        "data": {"name": "x", "_source": "/here"},
        "_jobs": 2,
        "parent": {"n": 1, "kind": "r", "_x": 0}}
    bare = {"parent": {"kind": "r", "n": 1}, "n": 1, "data": {"name": "x"}, "kind": "a"}
    assert public(deep) == bare and run_id(deep) == run_id(bare) and deep["_jobs"] == 2
    others = [bare | {"n": n} for n in (2, 1., True, "1")]
    others += [bare | {"parent": {"kind": "r", "n": 2}}, bare | {"m": None}]
    assert len({run_id(d) for d in (bare, *others)}) == 7
    store = Store(tmp_path)
    # the second finds the first and computes nothing
    assert store.do(deep, compute).path == store.do(bare, None).path
    with pytest.raises(ValueError): run_id({"lr": float("nan")})

EDITS = {
    "comment": ("x + 1 # one more", "x + 1 # two more"),
    "docstring": ('"Add one"', '"Add one to x"'),
    "module docstring": ('"A module"', '"The module"'),
    "spaces": ("def f(x):", "def  f( x ):"),
    "class docstring": ('"Nothing"', '"Really nothing"'),
    "blank lines": ("class", "\n\n\nclass"),
    "prose": ("# a comment line", "# %% ../nbs/05_masked.ipynb #766bb073"),
}
CHANGES = {
    "number": ("x + 1", "x + 2"),
    "operator": ("x + 1", "x - 1"),
    "name": ("def f", "def g"),
    "default": ("y=0", "y=1"),
    "text": ("'told'", "'said'"),
    "order": ("a, b = 1, 2", "b, a = 1, 2")}
MODULE = (
    '"A module"\n# a comment line\na, b = 1, 2\ndef f(x):\n    "Add one"\n    return x + 1 # one'
    ' more\nclass C:\n    "Nothing"\n    def m(self, y=0): return \'told\'\n')

@pytest.fixture
def pages(tmp_path, monkeypatch): # a copy of the package's modules, to be edited
    copy = tmp_path / "unloc"
    shutil.copytree(identity._ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "_ROOT", copy)
    forget()
    yield copy
    forget()

def forget(): # what was read
    for read in (identity._read, page_digest): read.cache_clear()

def digests():
    forget()
    return {module: page_digest(module) for module in every()}

def every(): # each module that a run is computed by
    methods = [f"methods.{f.stem}" for f in sorted((identity._ROOT / "methods").glob("[a-z]*.py"))]
    return [f"steps.{kind}" for kind in steps.kinds()] + methods

@pytest.mark.parametrize(
    "edit, same", [*((e, True) for e in EDITS), *((e, False) for e in CHANGES)])
def test_a_digest_sees_code_and_only_code(edit, same, pages):
    old, new = (EDITS if same else CHANGES)[edit]
    def digest(text):
        (pages / "module.py").write_text(text, "utf-8")
        forget()
        return page_digest("module")
    assert old in MODULE
    assert (digest(MODULE) == digest(MODULE.replace(old, new, 1))) is same

def renamed(pages, file): # modules whose digests change with a statement more in a file
    before = digests()
    with open(pages / file, "a", encoding="utf-8") as f: f.write("\nNEW = 1\n")
    return {module for module, digest in digests().items() if digest != before[module]}

def test_an_edited_page_renames_its_own_runs_and_no_others(pages):
    assert renamed(pages, "steps/unlearn.py") == {"steps.unlearn"} | {
        m for m in every() if "steps.unlearn" in pages_behind(m)}
    assert "steps.base" not in renamed(pages, "steps/attack.py")
    assert renamed(pages, "methods/wagle.py") == {"methods.wagle"}

def test_a_page_that_all_import_renames_all_and_one_apart_none(pages):
    assert {f"steps.{kind}" for kind in ("base", "inject", "unlearn")} <= renamed(
        pages, "models.py")
    for module in APART: assert renamed(pages, f"{module}.py") == set(), module

def test_another_method_page_renames_nothing(pages):
    before = digests()
    (pages / "methods" / "another.py").write_text("def another(): return 1\n", "utf-8")
    after = digests()
    assert {m: after[m] for m in before} == before
    assert set(after) - set(before) == {"methods.another"}

def test_what_is_built_on_an_edited_page_has_another_name(pages):
    from unloc.steps.common import described
    def line(): # a base, a run on it, and one on that
        forget()
        base = described("base", None)
        injected = described("inject", base)
        return [run_id(d) for d in (base, injected, described("unlearn", injected))]
    before = line()
    with open(pages / "steps" / "inject.py", "a", encoding="utf-8") as f: f.write("\nNEW = 1\n")
    same = [old == new for old, new in zip(before, line())]
    assert same == [True, False, False]

def test_every_module_that_a_result_depends_on_is_behind_its_page():
    import ast
    folder = identity._ROOT
    def file(module): return folder / f"{module.replace('.', '/')}.py"
    def absolute(module, node): # of an import that may be relative
        above = f"unloc.{module}".split(".")[:-node.level] if node.level else []
        return ".".join([*above, node.module] if node.module else above)
    def imported(module):
        tree = ast.parse(file(module).read_text("utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = [(absolute(module, n), a.name) for n in nodes for a in n.names]
        ours = [(place, name) for place, name in names if place.split(".")[0] == "unloc"]
        both = [x for place, name in ours for x in (place, f"{place}.{name}")]
        return {x.removeprefix("unloc.") for x in both}
    for page in every():
        seen, todo = set(), [page]
        while todo:
            seen |= {module := todo.pop()}
            found = imported(module) - seen - set(APART)
            todo += [name for name in found if file(name).exists()]
        assert seen == set(pages_behind(page)), page
    behind = {kind: set(pages_behind(f"steps.{kind}")) for kind in steps.kinds()}
    assert {"masked", "metrics", "tokens", "training"} <= behind["unlearn"]
    assert "scene" in behind["attack"] and "scene" not in behind["inject"]

def test_what_is_apart_only_stores_reports_counts_and_checks():
    used = {"steps", "methods"} # folders of pages
    modules = {f.stem for f in identity._ROOT.glob("[a-z]*.py")} - set(APART)
    behind = set().union(*(pages_behind(page) for page in every()))
    assert modules - used - behind <= {
        "statistics", "tradeoff", "many", "many_descents", "ways", "measuring", "edit_metrics",
        "tracing", "neurons", "related", "faith", "leagues", "results", "levels", "fronts",
        "stored", "findings", "replicated", "recomputed", "manuscript"
    }, "nothing computes with them"

# --- the order of work

def test_stages_put_parents_first_and_nothing_twice():
    root, lone = {"kind": "root"}, {"kind": "lone"}
    kids = [{"kind": "kid", "n": n, "parent": root} for n in (0, 1)]
    grand = [
        {"kind": "grand", "m": m, "parent": kids[n], "_x": n} for m in range(2) for n in (0, 1)]
    found = stages([*grand, grand[0] | {"_x": "other"}, lone, kids[1]])
    assert [[d["kind"] for d in s] for s in found] == [["root", "lone"], ["kid"] * 2, ["grand"] * 4]
    assert stages([]) == []

def test_a_deleted_parent_is_computed_anew(tmp_path): # as the message of a damaged run advises
    store, root = Store(tmp_path), {"kind": "root", "n": 1}
    child = {"kind": "kid", "n": 2, "parent": root}
    sweep(store, [child], compute=compute)
    before = files(tmp_path)
    shutil.rmtree(store[root].path)
    sweep(store, [child], compute=compute)
    assert files(tmp_path) == before

def test_progress_reaches_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLOC_PROGRESS", str(tmp_path / "events"))
    def steps(description, parent, folder, progress):
        for i in range(100): progress(i / 100)
        compute(description, parent, folder, progress)
    sweep(Store(tmp_path / "s"), [{"kind": "progress", "n": n} for n in range(2)], compute=steps)
    events = [json.loads(line) for line in (tmp_path / "events").read_text("utf-8").splitlines()]
    assert events[0]["stage"] == "progress"
    assert events[0]["of"] == 2 == len(set(events[0]["ids"])) and events[0]["before"] == 0
    for name in events[0]["ids"]:
        # of 100 within a second, the first; and the end
        assert [e["fraction"] for e in events if e.get("run") == name] == [0., 1.]

# --- a real experiment

def test_jobs_change_no_byte(tmp_path):
    from unloc.data import data_description
    from unloc.steps.base import base_models
    from unloc.steps.inject import injection
    from unloc.steps.judge import standard
    from unloc.levels import PAIR
    from unloc.steps.unlearn import unlearning
    base = base_models(
        data_description({"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}),
        "llama",
        model={"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300},
        pretrain={"epochs": 1, "lr": 4e-3, "batch_size": 64},
        retain={"epochs": 2, "lr": 4e-3, "batch_size": 32})
    judged = standard(base, {"retain": 5, "utility": 2, "max_new_tokens": 4})
    inject = {"fraction": .25, "epochs": 2, "lr": 1e-2, "batch_size": 4}
    grid = []
    for seed, objective in (0, "npo"), (1, "rmu"):
        injected = injection(judged, seed, inject)
        grid += [unlearning(injected, arm, objective, {"lr": 5e-3, "epochs": 2}) for arm in PAIR]
    done = [
        sweep(Store(tmp_path / str(jobs)), grid if jobs == 1 else grid[::-1], jobs, steps.compute)
        for jobs in (1, 2)]
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert len(list((tmp_path / "1").iterdir())) == 1 + 1 + 2 + 4 + 1
    assert (
        [r.path.name for r in done[0]]
        == [r.path.name for r in done[1][::-1]]
        == [run_id(d) for d in grid])
    arms = [
        {
            name: store.file(name).read_bytes()
            for name in ("columns.safetensors", "region.safetensors", "trajectory.csv")}
        for store in done[0][:2]]
    assert all(arms[0][name] != arms[1][name] for name in arms[0])
