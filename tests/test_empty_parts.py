"""An empty or undefined part gives its own cell a dash with a reason: it takes no table, no sweep
and no finished run with it; what leaves nothing to show is one line before anything runs."""
import ast, contextlib, io, json, os, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
import matplotlib; matplotlib.use("agg")
from unloc import pages, runs
from unloc.cli import SHARED, profiles
from unloc.data import benchmark
from unloc.plan import wanted
from unloc.runs import Store, check_run, finished, run_id, sweep
from unloc.statistics import (
    Paired, Undefined, adjusted, compare, comparison_cells, mean_sd, mixed, noted, paired)
from unloc.tradeoff import aues, measures, mu95

NBS = Path(__file__).resolve().parents[1] / "nbs"
PAGES = {p.stem[:2]: p for p in sorted(NBS.glob("[23][0-9]_*.ipynb"))}

def cells(path):
    return [
        (c["metadata"].get("tags", []), "".join(c["source"]))
        for c in json.loads(path.read_text("utf-8"))["cells"]
        if c["cell_type"] == "code"]
def defaults(path):
    return {
        node.target.id: ast.literal_eval(node.value)
        for tags, source in cells(path)
        if "parameters" in tags
        for node in ast.parse(source).body}
SMOKE = {name: value for name, value in profiles(NBS.parent)["smoke"].items() if name in SHARED} | {
    "jobs": 1}
FACTS = SMOKE.pop("attacked_data") # of the pages that teach held-out facts
def facts_of(n): return {"data": FACTS} if "27" <= n < "32" else {} # those that are attacked
PARAMETERS = {n: SMOKE | facts_of(n) | defaults(p) for n, p in PAGES.items()}

# --- what leaves nothing to show is refused before anything runs

COUNTS = [
    (n, name)
    for n, found in PARAMETERS.items()
    for name, value in found.items()
    if type(value) is int]
FILLED = [
    (n, name)
    for n, found in PARAMETERS.items()
    for name, value in found.items()
    if isinstance(value, (list, dict)) and name not in pages._MAY_BE_EMPTY]
MARGINS = [
    (n, name) for n, found in PARAMETERS.items() for name in found if name.startswith("margin")]

def refused(n, says, **values):
    with pytest.raises(ValueError) as error: wanted(PAGES[n], values)
    assert str(error.value).startswith(says) and "\n" not in str(error.value), error.value

@pytest.mark.parametrize("n, name", COUNTS)
def test_a_count_is_at_least_one(n, name):
    for value in (0, -1) if name != "jobs" else (0, -2):
        refused(n, f"parameter {name} must be at least 1", **{name: value})

@pytest.mark.parametrize("n, name", FILLED)
def test_what_must_be_named_is_named(n, name):
    refused(
        n, f"parameter {name} is empty; name at least one", **{name: type(PARAMETERS[n][name])()})

@pytest.mark.parametrize("n, name", MARGINS)
def test_a_margin_is_refused_before_its_runs(n, name):
    for value in (0., -.1, float("nan")):
        refused(
            n,
            f"parameter {name}: an equivalence margin must be above 0",
            **{name: {"lens": value} if name == "margins" else value})

@pytest.mark.parametrize(
    "n, values, says",
    [
        ("21", {"rule": "simpson"}, "parameter rule: unknown name 'simpson'; known: trapezoid"),
        ("25", {"rule_mu95": "last"}, "parameter rule_mu95: unknown name 'last'"),
        ("27", {"arms": ["oracle"]}, "parameter arms: unknown name 'oracle'; known: Oracle"),
        (
            "27",
            {"arm_rates": {"All weight": .1}},
            "parameter arm_rates: unknown name 'All weight'"),
        (
            "28",
            {"strongest": "ask nicely"},
            "parameter strongest: unknown name 'ask nicely'; known: relearn held-out facts"),
        ("28", {"retention": {"npo": [0]}}, "parameter retention: unknown name 'npo'; known: wga"),
        (
            "26",
            {"share_archs": ["olmo2"]},
            "parameter share_archs: unknown name 'olmo2'; known: llama"),
        ("26", {"share_objectives": ["npo"]}, "parameter share_objectives: unknown name 'npo'"),
        ("25", {"own_archs": ["olmo2"]}, "parameter own_archs: unknown name 'olmo2'"),
        (
            "31",
            {"injected_rates": {"neuron": .5}},
            "parameter injected_rates: unknown name 'neuron'"),
        ("29", {"margins": {"lens": .5}}, "parameter margins: unknown outcome 'lens'; known: AUES"),
        (
            "21",
            {"unlearn": "wga"},
            "parameter unlearn: expected a dict, or its JSON text, got 'wga'"),
        ("21", {"unlearn": "[1]"}, "parameter unlearn must be of type dict, got [1]"),
        ("21", {"seeds": 2.5}, "parameter seeds must be of type int, got 2.5"),
        ("21", {"seeds": True}, "parameter seeds must be of type int"),
        (
            "21",
            {"archs": "llama"},
            "parameter archs: expected a list, or its JSON text, got 'llama'"),
        (
            "27",
            {"data": {"name": "world", "n_authors": 6, "n_forget": 1, "n_holdout": 0}},
            "a second group of facts is taken from the held-out ones, and there are 0"),
        (
            "31",
            {"attack": PARAMETERS["31"]["attack"] | {"taught": 10}},
            "taught = 10 of 10 forgotten facts leaves none to be measured"),
        (
            "28",
            {
                "attack": PARAMETERS["28"]["attack"] | {"taught": 9},
                "data": {"name": "world", "n_authors": 6, "n_forget": 1, "n_holdout": 1}},
            "5 held-out facts are left to be taught, 9 expected")])
def test_what_no_run_could_use_is_one_line(n, values, says): refused(n, says, **values)

@pytest.mark.parametrize("n", PAGES)
def test_papermills_text_is_read_as_json(n):
    text = {
        name: json.dumps(value)
        for name, value in PARAMETERS[n].items()
        if isinstance(value, (list, dict))}
    assert [run_id(d) for d in wanted(PAGES[n], text)] == [run_id(d) for d in wanted(PAGES[n], {})]

# the ways of injection are attacked by forgotten facts alone
def test_facts_that_nobody_holds_out_are_needed_only_where_they_are_taught():
    assert wanted(
        PAGES["31"], {"data": {"name": "world", "n_authors": 6, "n_forget": 1, "n_holdout": 0}})

# --- pages, at the size of smoke

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    before = {name: os.environ.get(name) for name in ("UNLOC_PROGRESS",)}
    os.environ["UNLOC_PROGRESS"] = str(folder / "events") # no bars
    yield folder
    os.environ.pop("UNLOC_PROGRESS")

def page(place, n, out, **values):
    "Execute a page as papermill does, in this process"
    import matplotlib.pyplot as plt
    names = {"__name__": "__main__", "display": lambda *_: None}
    with contextlib.chdir(NBS), contextlib.redirect_stdout(said := io.StringIO()):
        for tags, source in cells(PAGES[n]):
            exec(compile(source, PAGES[n].name, "exec"), names)
            if "parameters" in tags:
                names |= values | {"store": str(place / "store"), "out": str(place / out)}
    plt.close("all")
    return said.getvalue(), place / out

def table(out, name): return json.loads((out / f"{name}.json").read_text("utf-8"))

@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_give_a_table_with_dashes(place, seeds):
    _, out = page(place, "21", f"few{seeds}", seeds=seeds)
    found = table(out, "table2_oracle_random")
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["verdict"] == row["p"] == row["difference [95 %]"] == "–"
        assert row["Oracle"] != "–"
        assert "nan" not in str(row)
        assert row["Oracle"].endswith("± –") is (seeds == 1)
    assert f"{seeds} of {seeds} pairs have both values, expected at least 3" in found["caption"]
    assert found["undefined"]

def test_few_seeds_on_the_other_pages(place):
    for n, count, name in (
        ("27", "attacked_seeds", "table4_arms"),
        ("25", "localizer_seeds", "table1_localizers"),
        ("29", "attacked_seeds", "table6_inside"),
        ("30", "attacked_seeds", "dose_response"),
        ("31", "injected_seeds", "injection"),
        ("28", "attacked_seeds", "table3_recovery")):
        _, out = page(place, n, "few", **{count: 1})
        found = table(out, name)
        assert found.get("rows") or found["slopes"], name
        assert "nan" not in json.dumps(
            {key: found[key] for key in ("rows", "slopes", "caption") if key in found}
        ), (name, found)

LORA = {"lora": {"taught": 4, "epochs": 1, "lr": .001}}

@pytest.mark.parametrize("tried", [{}, LORA | {"benign": {"taught": 8}}])
def test_further_attacks_are_rows_of_the_tuning_table(place, tried):
    _, out = page(place, "32", f"tried{len(tried)}", tried=tried, rate_factors=[1.])
    rows = table(out, "tuning_attack")["rows"]
    names = [row["attack"].partition(" (")[0] for row in rows]
    more = ["relearn by low rank", "relearn benign text"] if tried else []
    assert names == ["relearn forgotten facts, all weights", *more]
    assert [row["learning rate"] for row in rows] == ["0.0002", *(["0.001", "–"] if tried else [])]

def test_without_utility_mu95_is_a_dash_and_aues_stays(place):
    _, out = page(
        place,
        "21",
        "useless",
        seeds=3,
        evaluate=PARAMETERS["21"]["evaluate"] | {"max_new_tokens": 1})
    found = table(out, "table2_oracle_random")
    for row in found["rows"]:
        assert (row["verdict"] == "–") is (row["metric"] == "MU95") and (row["Oracle"] == "–") is (
            row["metric"] == "MU95"), row
    assert "the original model has no utility (MU 0)" in found["caption"]
    assert any(
        "llama wga" in where and "seed 0" in where
        for where in found["undefined"]["the original model has no utility (MU 0)"])
    data = pd.read_csv(out / "table2_oracle_random_data.csv")
    assert data.MU95.isna().all() and data.AUES.notna().all()
    for n, name in (("25", "table1_localizers"), ("27", "table4_arms")):
        _, out = page(
            place, n, "useless", evaluate=PARAMETERS[n]["evaluate"] | {"max_new_tokens": 1})
        assert "no utility (MU 0)" in table(out, name)["caption"]
        assert len(table(out, name)["rows"]) >= 6
    page(place, "22", "useless", evaluate=PARAMETERS["22"]["evaluate"] | {"max_new_tokens": 1})

def own_file(folder, name, wrong=(), keep=True):
    "Write the author world as own facts, wrong answers only of some sets"
    world = benchmark({"name": "world", "n_authors": 6, "n_forget": 1, "n_holdout": 2})
    own = ("forget", "retain", "holdout")
    sets = {s: getattr(world, s) for s in own if keep or s != "retain"} | {
        s: getattr(world, s)[:4] for s in ("real_authors", "world_facts")}
    rows = [
        {"set": s, "question": f.question, "answer": f.answer}
        | ({"perturbed_answer": f.perturbed_answer} if s in wrong else {})
        for s, facts in sets.items()
        for f in facts]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"name": "file", "path": str(folder / f"{name}.jsonl")}

SETS = "forget", "retain", "real_authors", "world_facts"
@pytest.mark.parametrize(
    "name, given, says, aues",
    [
        ("no wrong answers", {}, ("FQ", "no facts with wrong answers"), True),
        ("none to forget", {"wrong": SETS[1:]}, ("FQ: no wrong answers to the forget set",), True),
        ("none to retain", {"wrong": (SETS[0], *SETS[2:])}, ("without retain_truth_ratio",), True),
        (
            "no retain set",
            {"wrong": SETS, "keep": False},
            ("RS: no retain facts", "MU: without retain_probability"),
            False,
        ),
    ],
)
def test_own_facts_of_which_a_set_or_its_wrong_answers_are_missing(place, name, given, says, aues):
    alone = {"lr": 5e-3, "epochs": 1, "retain": "none"}
    more = {
        "data": own_file(place, name, **given),
        "localizers": ["fisher"],
        "own_units": {},
        "seeds": 1,
        "localizer_seeds": 1,
        "attacked_seeds": 1,
        "supervision_seeds": 1,
        "random_regions": 1,
        "arms": ["Oracle", "Random"]}
    more |= dict.fromkeys(("unlearn", "localized_unlearn", "attacked_unlearn"), {"wga": alone})
    for n, what in (
        ("21", "table2_oracle_random"),
        ("22", "trajectories"),
        ("22", "trajectories_utility"),
        ("23", "figure1_direct_supervision"),
        ("25", "table1_localizers"),
        ("27", "table4_arms")):
        _, out = page(
            place, n, name, **{key: value for key, value in more.items() if key in PARAMETERS[n]})
        found = table(out, what)
        assert what == "trajectories" or all(
            some in found["caption"] for some in says[what == "trajectories_utility":] or says
        ), (n, found["caption"])
        assert "NaN" not in json.dumps(found)
        assert "nan" not in str(found.get("rows")) + str(found.get("ends"))
        for row in found.get("rows", []):
            cell = row.get("Oracle", row.get("WGA", row.get("value")))
            assert (cell == "–") is (row["metric"] == "MU95" or not aues), (n, row)

@pytest.mark.parametrize(
    "n, more, says",
    [
        (
            "21",
            {},
            (
                "unlearn: the retain term of wga needs retain facts, and the data have none; name"
                " retain = 'none'")),
        (
            "24",
            {"scored": ["wagle"]},
            "the localizer 'wagle' needs retain facts, and the data have none; leave it out"),
        (
            "28",
            {"attacked_unlearn": {"ga": {"lr": 5e-3, "epochs": 1}}, "retention": {"ga": [.1]}},
            "attack: by RS needs retain facts, and the data have none; attack by FS")])
def test_what_needs_retain_facts_is_refused_before_anything_runs(tmp_path, n, more, says):
    refused(n, says, data=own_file(tmp_path, "alone", SETS, keep=False), **more)

def test_a_run_that_diverges_costs_its_own_row(place):
    wild = PARAMETERS["21"]["unlearn"] | {"ga": {"lr": 1e30, "epochs": 2}}
    said, out = page(place, "21", "wild", unlearn=wild)
    assert said.count(") diverged: ") == 6
    assert said.count("\n") == 6
    assert "(unlearn, llama, ga, Oracle, 0)" in said
    found = table(out, "table2_oracle_random")
    rows = {(row["objective"], row["metric"]): row for row in found["rows"]}
    calm = {
        (row["objective"], row["metric"]): row
        for row in table(page(place, "21", "calm")[1], "table2_oracle_random")["rows"]}
    assert set(rows) == {*calm, ("GA", "AUES"), ("GA", "MU95")}
    for key, row in rows.items():
        if key[0] == "GA":
            assert {row[name] for name in row if name not in ("model", "objective", "metric")} == {
                "–",
                "– → –"}
        else:
            assert {k: v for k, v in row.items() if k != "p Holm"} == {
                k: v for k, v in calm[key].items() if k != "p Holm"}
    assert "lower the learning rate" in found["caption"]
    page(place, "22", "wild", unlearn=wild)
    for n, name in (
        ("27", "attacked_unlearn"), ("28", "attacked_unlearn"), ("29", "attacked_unlearn"),
        ("30", "attacked_unlearn"), ("31", "injected_unlearn"), ("25", "localized_unlearn")):
        _, out = page(
            place, n, "wild", **{name: PARAMETERS[n][name] | {"ga": {"lr": 1e30, "epochs": 2}}})
        for file in out.glob("*.json"):
            assert "nan" not in json.dumps(
                {
                    key: x
                    for key, x in json.loads(file.read_text("utf-8")).items()
                    if key in ("rows", "slopes", "means", "begun", "reached")}), file

def test_where_all_runs_diverge_the_page_says_so_in_one_line(place):
    with pytest.raises(
        ValueError,
        match=(
            "^none of the 6 runs has a result, the first of them since .*lower the learning rate.*$"
        )):
        page(place, "21", "none", unlearn={"ga": {"lr": 1e30, "epochs": 2}})

@pytest.mark.parametrize(
    "n, values, says, gives",
    [
        ("24", {"scored": []}, "no localizer is scored", set()),
        ("26", {"share_localizers": []}, "no localizer is asked for", set()),
        ("25", {"localizers": []}, "", {"table1_localizers", "table1_own_units"}),
        ("25", {"own_units": {}}, "no localizer in a unit of its own", {"table1_localizers"}),
        ("25", {"own_archs": []}, "no localizer in a unit of its own", {"table1_localizers"}),
        ("30", {"graded": [], "graded_localizers": []}, "", {"dose_response"}),
        ("28", {"retention": {}}, "no retention is named", {"table3_recovery", "recovery"}),
        ("27", {"arms": ["Random"]}, "", {"table4_arms"}),
        ("23", {"random_regions": 11}, "", {"figure1_direct_supervision"})])
def test_none_of_these_leaves_only_its_own_artefact_out(place, n, values, says, gives):
    out = "empty" + n + "".join(values)
    said, folder = page(place, n, out, **values)
    assert says in said and {f.stem for f in folder.glob("*.json")} - {"machine"} == gives
    if "random_regions" in values:
        assert list(table(folder, "figure1_direct_supervision")["ends"]["llama"])[-1] == "Random K"

# --- a sweep in which something diverges

GRID = [{"kind": "leaf", "n": n, "parent": {"kind": "root", "n": n % 2}} for n in range(4)]

def compute(description, parent, folder, progress):
    (folder / "deep").mkdir(); (folder / "deep" / "half.json").write_text("{", "utf-8")
    if description == {"kind": "root", "n": 1} or description.get("n") == 2:
        raise FloatingPointError("the loss is nan\n at step 3; lower the learning rate")
    (folder / "result.json").write_text(json.dumps(description["n"]), "utf-8")

@pytest.mark.parametrize("jobs", [1, 2])
def test_independent_runs_go_on(tmp_path, jobs, capsys):
    import sys
    # noqa: F401 workers get this file's functions by value
    from joblib.externals.loky import cloudpickle_wrapper
    import cloudpickle
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store, why = Store(tmp_path), "the loss is nan at step 3; lower the learning rate"
    found = sweep(store, GRID, jobs, compute)
    assert [run.diverged for run in found] == ["", why, why, why] and found[0].json() == 0
    assert [line.split(" diverged: ")[1] for line in capsys.readouterr().out.splitlines()] == [
        why,
        why], "each run that diverged, once, and none of those built on it"
    assert GRID[2] in store
    assert GRID[1] not in store
    assert GRID[3] not in store
    assert store[GRID[3]].diverged == store.lost(GRID[3]) == why
    check_run(store[GRID[2]].path)
    assert sorted(f.name for f in store[GRID[2]].path.iterdir()) == [
        "description.json",
        "diverged.json",
        "manifest.json"]
    assert not list(tmp_path.glob("*.partial"))
    def never(*_): raise AssertionError
    assert sweep(store, GRID, 1, never) == found, "nothing is tried again"
    assert store.do(GRID[1], never).diverged == why
    with pytest.raises(ValueError, match=f"^run {run_id(GRID[1])} has no trajectory.csv: {why}$"):
        found[1].table()
    whole, lost = finished(dict(zip("abcd", found)))
    assert list(whole) == ["a"] and lost == dict.fromkeys("bcd", why)
    with pytest.raises(
        ValueError,
        match="^none of the 3 runs has a result, the first of them since the loss is nan"):
        finished(dict(zip("bcd", found[1:])))

def test_other_errors_end_a_sweep_and_are_tried_again(tmp_path):
    def bad(description, parent, folder, progress): raise ValueError("a bad setting")
    with pytest.raises(ValueError, match="a bad setting"): sweep(Store(tmp_path), GRID[:1], 1, bad)
    assert (
        sweep(
            Store(tmp_path),
            GRID[:1],
            1,
            lambda d, p, folder, _: (folder / "result.json").write_text("1", "utf-8"))[0].json()
        == 1)

def test_a_model_that_diverges_in_its_last_step_has_diverged(tmp_path):
    import torch
    from unloc.scoring import Diverged, check_finite
    with pytest.raises(FloatingPointError, match="fact 1 are NaN or infinite; it has diverged"):
        check_finite(torch.tensor([0., float("nan")]))
    assert issubclass(Diverged, ValueError)

# --- what cannot be measured or compared

POINTS = pd.DataFrame(
    {
        "FS": [.2, .6, .9], "RS": [.8, .7, .2], "MU": [.5, np.nan, .3], "FQ": [-20., np.nan, -5.]})

@pytest.mark.parametrize(
    "change, name, says",
    [
        ({"MU": [0., np.nan, .3]}, "MU95", "the original model has no utility (MU 0)"),
        ({"MU": [np.nan] * 3}, "MU95", "no checkpoint has MU"),
        ({"FQ": [np.nan] * 3}, "MU95", "no checkpoint has FQ"),
        ({"RS": [np.nan] * 3}, "AUES", "no checkpoint has RS"),
        ({"FQ": [-20., np.nan, -np.inf]}, "MU95", "forget_quality[1] is -inf"),
        ({"FS": [.2, np.nan, .9]}, "AUES", "forget_strength[1] is nan")])
def test_an_undefined_measure_has_its_reason_and_leaves_the_other(change, name, says):
    values, why = measures(POINTS.assign(**change))
    other = {"AUES": "MU95", "MU95": "AUES"}[name]
    assert np.isnan(values[name]) and why[name] == says or why[name].startswith(says)
    assert values[other] == measures(POINTS)[0][other] and other not in why

def test_measures_are_the_pure_functions():
    values, why = measures(POINTS, {"AUES": {"rule": "step"}, "MU95": {"rule": "best"}})
    assert not why
    assert values == {
        "AUES": aues(POINTS.FS, POINTS.RS, "step"),
        "MU95": mu95([.5, .3], [-20., -5.], "best"),
        "AUES step": aues(POINTS.FS, POINTS.RS, "step"),
        "MU95 best": mu95([.5, .3], [-20., -5.], "best")}
    with pytest.raises(ValueError, match="model_utility.0. is 0"): mu95([0.], [-1.])
    values, why = measures(
        pd.DataFrame(
            {"FS": [1., .9, .2], "RS": [.1, .5, .9], "MU": [.5] * 3, "FQ": [-1.] * 3}),
        {"AUES": {"rule": "raw"}})
    assert list(why) == ["AUES"] and "RS rises" not in values

def test_a_comparison_uses_the_pairs_there_are():
    a, b = [.1, .2, None, .4, .5, float("inf")], [.2, .1, .3, None, .3, .1]
    assert compare(a, b, .02) == paired([.1, .2, .5], [.2, .1, .3], .02)
    assert compare(a, b, .02).n == 3
    few = compare(a[:3], b[:3], .02)
    assert few == Undefined(2, "2 of 3 pairs have both values, expected at least 3")
    assert not few
    assert compare([], [], .02).n == 0
    tests = {"a": compare(a, b, .02), "few": few}
    assert adjusted(tests) == {"a": tests["a"].p_difference}
    assert adjusted({}) == adjusted({"few": few}) == {}
    assert (
        set(comparison_cells(few, 2).values()) == set(comparison_cells(None, 2).values()) == {"–"})
    assert isinstance(tests["a"], Paired)
    assert [mean_sd(x, 2) for x in ([], [np.nan], [1.], [1., None, 3.])] == [
        "–", "–", "1.00 ± –", "2.00 ± 1.41"]

def test_a_caption_says_why_and_stays_as_it_is_where_nothing_is_undefined():
    about = {"caption": "c."}
    assert noted(about, {}, {("a",): ""}, {("b",): compare([1, 2, 3], [1, 2, 4], 1)}) is about
    assert noted(about, {("a", 1): "x"}, {("b", 2): Undefined(1, "y")}) == {
        "caption": "c. –: a 1: x; b 2: y.",
        "undefined": {"x": ["a 1"], "y": ["b 2"]}}

def test_a_mixed_model_without_an_estimate_is_one_line(monkeypatch):
    from statsmodels.regression.mixed_linear_model import MixedLM
    def fit(self, **_): raise np.linalg.LinAlgError("Singular matrix")
    monkeypatch.setattr(MixedLM, "fit", fit)
    rng = np.random.default_rng(0)
    with pytest.raises(
        ValueError,
        match="the mixed model of 12 values cannot be fitted: Singular matrix; run more seeds"):
        mixed(rng.random(12), [0, 1] * 6, {"injection": np.arange(12) // 4})
