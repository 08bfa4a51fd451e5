"""What the pages of costs measure: each way leaves the model as it found it, the tables have the
columns and rows of the committed ones, the sentences say what the committed figures say, and what
measures needs no library of figures."""
import contextlib, copy, csv, json, re, statistics, subprocess, sys, weakref
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from unloc import measuring, ways
from unloc.ways import OURS_NPO, USUAL, USUAL_NPO, random_batches, step_ways

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SHAPE = dict(
    vocab_size=60, d_model=16, n_layers=2, d_ff=32, n_heads=4, kv_heads=2, length=16)

def page(name): # cells of code, and whether they hold the parameters
    cells = json.loads((NBS / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return [
        ("".join(c["source"]), "parameters" in c["metadata"].get("tags", []))
        for c in cells
        if c["cell_type"] == "code"]

def prose(name):
    cells = json.loads((NBS / f"{name}.ipynb").read_text("utf-8"))["cells"]
    found = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"<!--.*?-->", "", found) # what a finding is called

def rows(path):
    with open(ROOT / "figures" / path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))

def model():
    torch.manual_seed(0)
    return ways.random_llama(**SHAPE)

WAYS = list(step_ways(model(), 3, [.25], .25, 2))

# --- the ways

@pytest.mark.parametrize("way", WAYS)
def test_a_way_leaves_nothing_but_trained_weights(way):
    m = model()
    for i, p in enumerate(m.parameters()): p.requires_grad_(i % 3 > 0)
    flags, names = [p.requires_grad for p in m.parameters()], list(m.state_dict())
    before = [p.detach().clone() for p in m.parameters()]
    with step_ways(m, 3, [.25], .25, 2)[way](): pass # nothing is trained
    assert all(torch.equal(p, x) for p, x in zip(m.parameters(), before))
    assert [p.requires_grad for p in m.parameters()] == flags
    assert list(m.state_dict()) == names and not any(p.grad is not None for p in m.parameters())
    assert not any(x._forward_hooks or "forward" in vars(x) for x in m.modules())

@pytest.mark.parametrize(
    "ours, usual", [("ours, 25% of the value vectors", USUAL), (OURS_NPO, USUAL_NPO)])
def test_our_step_is_the_usual_one(ours, usual):
    batch, found = random_batches(60, 3, 16, 5)(), []
    for way in (ours, usual):
        m = model()
        if way == OURS_NPO: # asked once, before the region is trained
            with torch.no_grad(): known = ways._answer_sums(m, batch)
            def loss(m, batch): return ways._npo(m, batch, known)
            prepare = ways._through_columns(m, .25, loss)
        else: prepare = step_ways(m, 3, [.25], .25, 2)[way]()
        with prepare as step:
            for _ in range(3): step(batch)
        found.append(m.state_dict())
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], rtol=0, atol=2e-5)
    start = model().state_dict()
    moved = {name for name, x in found[0].items() if not torch.equal(x, start[name])}
    assert moved == {name for name in start if "down_proj" in name}

def test_without_peft_the_adapters_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert set(WAYS) - set(step_ways(model(), 3, [.25], .25, 2)) == {"adapters of rank 2"}

# --- the measuring

def test_what_needs_too_much_is_tried_once():
    tried = []
    @contextlib.contextmanager
    def large():
        def step(batch):
            tried.append(batch)
            raise torch.OutOfMemoryError("no room")
        yield step
    @contextlib.contextmanager
    def broken(): yield lambda batch: 1 / 0
    measured, too_large = [], []
    def take(ways): measuring.take_turns(ways, lambda: 0, 3, "cpu", measured, too_large)
    take({"large": large})
    assert too_large == ["large"] and len(tried) == 1 and not measured
    with pytest.raises(ZeroDivisionError): take({"broken": broken})

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_and_its_peak_is_counted():
    x = torch.ones(1024, 1024, device="cuda")
    found = measuring.timed(lambda: x @ x, "cuda")
    assert found.seconds > 0 and found.peak_bytes >= x.nbytes + found.result.nbytes
    assert measuring.device_text("cuda", 1) == torch.cuda.get_device_name("cuda")

def test_a_second_model_is_freed_before_the_next_way(): # of masked NPO
    m, alive = model(), []
    def watched(x):
        made = copy.deepcopy(x)
        alive.append(weakref.ref(made))
        return made
    @contextlib.contextmanager
    def after():
        assert [r() for r in alive] == [None]
        yield lambda batch: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "copy", SimpleNamespace(deepcopy=watched))
        turns = {"npo": step_ways(m, 3, [.25], .25, 2)[USUAL_NPO], "after": after}
        measured = []
        measuring.take_turns(turns, random_batches(60, 3, 16, 5), 1, "cpu", measured, [])
    assert [row["way"] for row in measured] == ["npo", "after"]

AWAY = """
import sys
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "seaborn", "papermill", "nbdev"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Away())
import unloc.measuring
names = {}
for source in sys.argv[1:]: exec(source, names)
print(len(names["measured"]), int(names["needed"]) > 0)
"""

def test_what_measures_needs_no_library_of_figures():
    sources = []
    for source, tagged in page("40_cost"):
        sources.append(source + ("\nrepeats, fractions = 1, [.1]" if tagged else ""))
        if "needed" in source: break
    done = subprocess.run(
        [sys.executable, "-c", AWAY, *sources], cwd=NBS, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(WAYS)), "True"]

# --- the pages

SMALL = {
    "40_cost": ({"repeats": 1}, "cost", "cost/cost"),
    "41_evaluation_cost": (
        {"repeats": 1, "epochs": 1}, "evaluation_cost", "cost/evaluation_cost"),
    "42_many": (
        {"repeats": 1, "compared": 1, "epochs": 1, "at_once": [2]}, "many", "many/many")}

@pytest.mark.parametrize("name", SMALL)
def test_a_page_gives_the_columns_and_rows_of_the_committed_figure(name, tmp_path, monkeypatch):
    pytest.importorskip("seaborn", reason="pages draw")
    if name == "40_cost": pytest.importorskip("peft", reason="the committed figure has adapters")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(NBS)
    threads, names = torch.get_num_threads(), {"__name__": "__main__"}
    chosen, artefact, committed = SMALL[name]
    try:
        for source, tagged in page(name):
            exec(compile(source, name, "exec"), names)
            if tagged: names |= chosen | {"out": str(tmp_path)}
    finally: torch.set_num_threads(threads)
    with open(tmp_path / f"{artefact}.csv", encoding="utf-8", newline="") as f:
        made = list(csv.DictReader(f))
    known = rows(f"{committed}.csv")
    assert list(made[0]) == list(known[0])
    about, before = (
        json.loads(path.read_text("utf-8"))
        for path in (tmp_path / f"{artefact}.json", ROOT / "figures" / f"{committed}.json"))
    assert set(about) <= set(before) and list(about)[-1] == "caption"
    if name == "40_cost":
        assert list(dict.fromkeys(row["way"] for row in made)) == list(
            dict.fromkeys(row["way"] for row in known))
        assert list(about) == list(before)
    if name == "41_evaluation_cost":
        def done(rows): return list(dict.fromkeys(row["what"].split(",")[0] for row in rows))
        assert done(made) == done(known) and list(about) == list(before)
    assert all(float(row.get("seconds") or row["seconds_a_run"]) > 0 for row in made)

# --- the sentences

def medians(path, column="seconds"):
    found = {}
    for row in rows(path): found.setdefault(row["way"], []).append(float(row[column]))
    return {way: statistics.median(values) for way, values in found.items()}

TENTH = "ours, 10% of the value vectors"

def test_the_page_of_steps_says_what_its_figures_say():
    text = prose("40_cost")
    seconds = medians("cost-8b/cost.csv")
    bytes_ = medians("cost-8b/cost.csv", "peak_bytes")
    assert f"{seconds[TENTH] / seconds[USUAL]:.2f} of the usual step's time" in text
    assert f"{bytes_[TENTH] / bytes_[USUAL]:.2f} of its memory" in text
    for found, unit, form in ((seconds, "s", ".3f"), (bytes_, "GB", ".1f")):
        scale = 1e9 if unit == "GB" else 1
        ours, usual = (f"{found[way] / scale:{form}} {unit}" for way in (TENTH, USUAL))
        assert f"{ours} next to {usual}" in text
    assert medians("cost-8b-recompute/cost.csv", "peak_bytes")[TENTH] < 24e9
    assert seconds[TENTH] < 1.05 * seconds["forward pass and input gradients"], "near the floor"

def test_the_page_of_judgements_says_what_its_figure_says():
    found = {}
    for row in rows("cost/evaluation_cost.csv"):
        found.setdefault(row["what"], {}).setdefault(row["way"], []).append(float(row["seconds"]))
    ratio = {
        what: statistics.median(both["ours"]) / statistics.median(both["plain"])
        for what, both in found.items()}
    greedy = ratio.pop("greedy answers, 90% settled")
    assert f"{greedy:.2f} of the time that generation takes" in prose("41_evaluation_cost")
    assert all(abs(x - 1) < .03 for x in ratio.values()), ratio

def test_the_page_of_company_says_what_its_figure_says():
    text = prose("42_many")
    found = json.loads((ROOT / "figures" / "many" / "many.json").read_text("utf-8"))["rows"]
    gain = {(row["batch_size"], row["at_once"]): float(row["gain"]) for row in found}
    said = f"{gain['8', '16']:.1f} runs", f"{gain['16', '16']:.1f} where it has 16"
    for words in (*said, f"a pass of 32 regions {gain['8', '32']:.1f}"): assert words in text
    apart = max(float(row.get("apart", 0)) for row in found)
    assert f"at most {apart:.1%}".replace("%", " %") in text
