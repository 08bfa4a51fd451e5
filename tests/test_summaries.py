"""A summary that a user registers stands in the tables that compare arms, with its own margin; a
table says which devices and versions computed its runs, wherever it is rendered."""
import contextlib, hashlib, io, json, re, warnings
from pathlib import Path

import matplotlib; matplotlib.use("agg")
import numpy as np, pandas as pd, pytest

from unloc import register, runs
from unloc.figures import Shown
from unloc.comparison import Margins, compare, compare_each, compare_slopes
from unloc.register import METHODS, attack, methods, summary
from unloc.statistics import Paired
from unloc.study import Study
from unloc.tradeoff import aues, measures, mu95, summaries

NBS = Path(__file__).resolve().parents[1] / "nbs"
PLUGIN = '''
from unloc.register import summary

@summary(label='deepest FS', margin=.3, digits=1, needs=('FS',), source='this test')
def a_deepest(points, share:float=1.):
    "Read the largest FS of a run"
    return share * points.FS.max()

@summary(label='loss', margin=1., needs=('loss_of_nobody',))
def nothing(points):
    "Read what no run has"
    return points.loss_of_nobody.max()
'''

@pytest.fixture(autouse=True)
def as_they_were(): # the registers, whatever a test does to them
    register.load()
    tables = [register._executed, *METHODS.values()]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)

@pytest.fixture
def plugged(tmp_path, monkeypatch):
    (file := tmp_path / "mine.py").write_text(PLUGIN, "utf-8")
    monkeypatch.setenv("UNLOC_PLUGINS", str(file))

def one_line(call, *says):
    with pytest.raises(ValueError) as error: call()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in says), text

POINTS = pd.DataFrame(
    {"FS": [.2, .6, .9], "RS": [.8, .7, .2], "MU": [.5, np.nan, .3], "FQ": [-20., np.nan, -5.]})

# --- what a trajectory is boiled down to

def test_the_packages_summaries_come_first_and_are_the_pure_functions(plugged):
    assert [*summaries()] == ["AUES", "MU95", "a_deepest", "nothing"]
    values, why = measures(POINTS)
    assert values | {"nothing": 0} == {
        "AUES": aues(POINTS.FS, POINTS.RS), "MU95": mu95([.5, .3], [-20., -5.]), "a_deepest": .9,
        "nothing": 0, "AUES step": aues(POINTS.FS, POINTS.RS, "step"),
        "MU95 best": mu95([.5, .3], [-20., -5.], "best")}
    assert [*values] == ["AUES", "MU95", "a_deepest", "nothing", "AUES step", "MU95 best"]
    assert np.isnan(values["nothing"]) and why == {"nothing": "no checkpoint has loss_of_nobody"}
    assert measures(POINTS, {"a_deepest": {"share": .5}})[0]["a_deepest"] == .45

def test_options_of_a_summary_are_refused_in_one_line():
    one_line(lambda: measures(POINTS, {"AUES": {"rule": "simpson"}}),
        "summary AUES: rule must be one of trapezoid, step, raw, fs_axis, got 'simpson'")
    one_line(lambda: measures(POINTS, {"MU90": {}}), "unknown summary 'MU90'; known: AUES, MU95")
    one_line(lambda: summary(label="Free", margin=float("nan")), "'Free' has the margin nan")

@pytest.mark.parametrize("value, says", [
    (None, "the summary odd gave None"), ([1.], "gave [1.0]"), (float("nan"), "")])
def test_what_is_no_number_is_said(value, says):
    @summary(label="Odd", margin=1.)
    def odd(points):
        "Give what was asked for"
        return value
    if says: return one_line(lambda: measures(POINTS), says)
    values, why = measures(POINTS)
    assert np.isnan(values["odd"]) and why == {"odd": "odd gives NaN"}

def test_the_list_names_them(plugged, tmp_path):
    from unloc.cli import _methods_shown
    lines = [line.split() for line in _methods_shown(tmp_path)]
    assert ["summary", "a_deepest", "deepest", "FS", "mine.py"] in lines
    assert ["summary", "MU95", "MU95", "unloc.methods.mu95"] in lines

# --- margins

def pairs(**outcomes):
    seeds = dict(arch="llama", seed=[*range(5)] * 2, arm=["Oracle"] * 5 + ["Random"] * 5)
    return pd.DataFrame(seeds | outcomes)

VALUES = [.31, .42, .53, .64, .6, .30, .40, .50, .60, .6]

@pytest.mark.parametrize("outcome, margin", [
    ("AUES", .02), ("MU95", 1.), ("AUES step", .02), ("MU95 best", 1.), ("FS", .02), ("FQ", 1.),
    ("FS_end", .02), ("FQ_start", 1.), ("recovered", .05), ("area", .05), ("logit_lens", .5),
    ("probing", .05)])
def test_an_outcome_brings_its_margin(outcome, margin):
    frame = pairs(**{outcome: VALUES})
    found = compare(frame, ["arch"], outcome).tests
    assert found == compare(frame, ["arch"], outcome, margin).tests
    assert found["llama",].margin == margin and isinstance(found["llama",], Paired)
    each = compare_each(frame, ["arch"], outcome, None, {"Random": "Oracle"}).tests
    assert each["llama", "Random"].margin == margin
    slopes = compare_slopes(frame.assign(x=frame.arm == "Oracle"), ["arch"], "x", outcome).tests
    assert slopes["llama",].margin == margin
    named = compare(frame, ["arch"], outcome, Margins({outcome: .7})).tests
    assert named["llama",].margin == .7

def test_a_users_summary_and_attack_bring_theirs(plugged):
    frame = pairs(a_deepest=VALUES, recovered=VALUES)
    assert compare(frame, ["arch"], "a_deepest").tests["llama",].margin == .3
    @attack(label="whispering", margin=.2)
    def whisper(scene): "Attack nothing"
    both = pd.concat([frame.assign(attack=name) for name in ("8 bits", "whispering")])
    found = compare(both, ["arch", "attack"], "recovered").tests
    assert [found["llama", name].margin for name in ("8 bits", "whispering")] == [.05, .2]
    assert Margins().of_attacks(["8 bits", "whispering"]) == "±0.05, whispering ±0.2"
    named = Margins(recovered=.1)
    found = compare(both, ["arch", "attack"], "recovered", named).tests
    assert {t.margin for t in found.values()} == {.1}

def test_an_outcome_of_nobody_is_one_line():
    one_line(lambda: compare(pairs(loss=VALUES), ["arch"], "loss"),
        "no margin is known for 'loss'; name one, or register it as a summary, a metric or an "
        "attack; known: AUES, MU95, ")
    assert compare(pairs(loss=VALUES), ["arch"], "loss", .1).tests["llama",].margin == .1
    page = {"__annotations__": {"margins": dict}, "margins": {"AUE": .1}}
    one_line(lambda: Study.of_page(page), "parameter margins: unknown outcome 'AUE'; known: AUES")
    found = Study.of_page(page | {"margins": '{"AUES": 1}'}).margins
    assert (found["AUES"], found["MU95"], found.text("AUES", "MU95")) == (1, 1., "±1 AUES, ±1 MU95")

def test_no_page_repeats_a_margin():
    for path in NBS.glob("[23][0-9]_*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        own, = (c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))
        lines = [line for line in "".join(own).split("\n") if line.startswith("margin")]
        assert not [line for line in lines if not line.startswith("margins: dict = {}")], path.stem
    summaries_of = {name: m.about["margin"] for name, m in methods("summary").items()}
    assert summaries_of == {"AUES": .02, "MU95": 1., "partial_area": .02, "rs_at_fs": .03}

# --- pages

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: # no bars
        folder = tmp_path_factory.mktemp("pages")
        patch.setenv("UNLOC_PROGRESS", str(folder / "events"))
        yield folder

def page(place, n, out, store="store", **values):
    "Execute a page as papermill does, in this process"
    import matplotlib.pyplot as plt
    path, = NBS.glob(f"{n}_*.ipynb")
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    names = {"__name__": "__main__", "display": lambda *_: None}
    with contextlib.chdir(NBS), contextlib.redirect_stdout(said := io.StringIO()):
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= values | {"store": str(place / store), "out": str(place / out)}
    plt.close("all")
    return said.getvalue(), place / out

def about(out, name): return json.loads((out / f"{name}.json").read_text("utf-8"))

SMALL = {"unlearn": {"wga": {"lr": 5e-3, "epochs": 1}}}

def test_a_users_summary_stands_in_the_table_of_pairs(place, plugged):
    _, out = page(place, "21", "mine", **SMALL)
    found = about(out, "table2_oracle_random")
    rows = {row["metric"]: row for row in found["rows"]}
    assert [*rows] == ["AUES", "MU95", "deepest FS", "loss"]
    data = pd.read_csv(out / "table2_oracle_random_data.csv")
    told = compare(data, ["arch", "objective"], "a_deepest", .3).table(1).iloc[0]
    shown = rows["deepest FS"]
    assert {name: shown[name] for name in told.index if name in shown and name != "arch"} == {
        name: told[name] for name in told.index if name in shown and name != "arch"} | {
        "objective": "WGA"}
    assert re.fullmatch(r"\d\.\d ± \d\.\d", shown["Oracle"]) and shown["p TOST"] == told["p TOST"]
    assert rows["loss"]["Oracle"] == "–" and "no checkpoint has loss_of_nobody" in found["caption"]
    assert found["conventions"]["a_deepest"] == (
        "deepest FS (this test); TOST, margin 0.3, alpha 0.05")
    assert "±0.02 AUES, ±1 MU95, ±0.3 a_deepest" in found["caption"] and found["margin"] == .02

def test_a_users_summary_stands_in_the_other_tables(place, plugged):
    few = {"localized_unlearn": SMALL["unlearn"], "localizer_seeds": 1, "own_units": {}}
    _, out = page(place, "25", "mine", localizers=["activations"], **few)
    _, out = page(place, "27", "mine", attacked_unlearn=SMALL["unlearn"], attacked_seeds=1,
        arms=["Oracle", "Random"])
    for name in ("table1_localizers", "table4_arms"):
        rows = about(out, name)["rows"]
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        assert metrics == ["AUES", "MU95", "deepest FS", "loss"]
        own = [row for row in rows if row["metric"] == "deepest FS"]
        cells = [row.get("WGA", row.get("value")) for row in own]
        assert len(own) == 2 and all(re.match(r"\d\.\d", cell) for cell in cells)

def test_a_margin_of_ones_own_goes_before(place):
    _, out = page(place, "21", "wide", margins={"AUES": .9}, **SMALL)
    found = about(out, "table2_oracle_random")
    assert found["conventions"]["equivalence"] == "TOST, margin 0.9, alpha 0.05"
    assert found["conventions"]["equivalence MU95"] == "TOST, margin 1, alpha 0.05"
    row, = (row for row in found["rows"] if row["metric"] == "AUES")
    assert row["verdict"] in ("equivalent", "both")

# --- what computed the runs

def claim(folder, **said):
    "Let a run say that it was computed elsewhere"
    path, manifest = folder / "description.json", folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | said), "utf-8")
    listed = json.loads(manifest.read_text("utf-8"))
    content = path.read_bytes()
    assert len(listed["files"]["description.json"]) == 2
    digest = hashlib.sha256(content).hexdigest()
    listed["files"]["description.json"] = [len(content), digest]
    manifest.write_text(json.dumps(listed), "utf-8")

GPU = dict(machine="x86-64 AVX2 + NVIDIA H100", libraries={"torch": "2.99", "transformers": "9.0"})

@pytest.fixture
def elsewhere(place, monkeypatch): # a store that another machine has filled
    import shutil
    monkeypatch.setattr(runs, "_met", set())
    page(place, "21", "here", **SMALL)
    shutil.rmtree(place / "elsewhere", ignore_errors=True)
    shutil.copytree(place / "store", place / "elsewhere")
    folders = [f for f in (place / "elsewhere").iterdir() if (f / "description.json").exists()]
    for folder in folders: claim(folder, **GPU)
    monkeypatch.setattr(runs, "_met", set())
    return folders

LINE = r"runs: (\d+) on x86-64 AVX2 \+ NVIDIA H100 with torch 2.99, transformers 9.0"

def test_a_page_names_the_machine_of_its_runs_not_its_own(place, elsewhere):
    said, out = page(place, "21", "drawn", store="elsewhere", **SMALL)
    here = about(place / "here", "table2_oracle_random")
    there = about(out, "table2_oracle_random")
    n, = re.findall(LINE + r"\.$", Shown(out, "table2_oracle_random").told)
    assert said == "" and 10 < int(n) <= len(elsewhere)
    assert there["device"] == "NVIDIA H100" and here["device"] == "cpu"
    assert there["computed"] == [
        {"machine": GPU["machine"], "libraries": "torch 2.99, transformers 9.0", "runs": int(n)}]
    assert here["computed"][0]["machine"] == runs.processor()
    assert json.loads((out / "machine.json").read_text("utf-8")) == {
        "table2_oracle_random": GPU["machine"]}
    apart = "device", "computed"
    assert {k: x for k, x in here.items() if k not in apart} == {
        k: x for k, x in there.items() if k not in apart}

def test_several_kinds_are_all_named_with_their_runs(place, elsewhere):
    study = Study.of_page({"__annotations__": {}} | SMALL)
    chosen = runs.run_id(study.unlearning(study.injection("llama", 0), "Oracle", "wga"))
    claim(place / "elsewhere" / chosen, machine="arm64")
    one_line(lambda: page(place, "21", "two", store="elsewhere", **SMALL), "--set mixed=true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said, out = page(place, "21", "two", store="elsewhere", mixed=True, **SMALL)
    told = Shown(out, "table2_oracle_random").told
    assert re.search(LINE + r"; 1 on arm64 with torch 2.99, transformers 9.0\.$", told), told
    found = about(out, "table2_oracle_random")
    assert found["device"] == "NVIDIA H100 and cpu"
    assert [one["runs"] for one in found["computed"]][1:] == [1]
