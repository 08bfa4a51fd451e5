"""A measure says what it measures: retention is read at equal forgetting, MU95 is missing where a
run never pays so much, and forget quality knows how fine it is and whose facts it counts."""
import contextlib, io, itertools, json
from pathlib import Path

import matplotlib; matplotlib.use("agg")
import numpy as np, pandas as pd, pytest
from scipy.stats import ks_2samp

from unloc.comparison import Margins, compare, spreads
from unloc.figures import label
from unloc.membership import membership
from unloc.metrics import forget_quality, privacy_leakage
from unloc.quality import clustered_floor, clustered_quality, quality_floor, quality_values
from unloc.register import find
from unloc.runs import Run, run_id
from unloc.steps.measure import scene_of
from unloc.stored import ATTACKS, MEASURED, also_measured, also_table, leakages
from unloc.study import Study
from unloc.tradeoff import NOT_REACHED, area_up_to, measures, mu95, retained_at, summaries

NBS = Path(__file__).resolve().parents[1] / "nbs"
POINTS = pd.DataFrame(
    {"FS": [.2, .6, .9], "RS": [.8, .7, .2], "MU": [.5, np.nan, .49], "FQ": [-20., np.nan, -5.]})
ASKED = {"rs_at_fs": {"level": .75}, "partial_area": {"level": .75}}

def one_line(call, *says):
    with pytest.raises(ValueError) as error: call()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in says), text

# --- summaries that are asked for

def test_they_are_measured_only_where_they_are_asked_for():
    usual, _ = measures(POINTS)
    values, why = measures(POINTS, ASKED)
    assert [*usual] == ["AUES", "MU95", "AUES step", "MU95 best"]
    assert {name: x for name, x in values.items() if name in usual} == usual and why == {}
    assert [*summaries(ASKED)] == ["AUES", "MU95", "rs_at_fs", "partial_area"]
    assert (values["rs_at_fs"], values["partial_area"]) == (
        retained_at(POINTS.FS, POINTS.RS, .75), area_up_to(POINTS.FS, POINTS.RS, .75))
    assert values["rs_at_fs"] == pytest.approx(.45)
    # FS 0 to .2 at RS .8, to .6 from .8 to .7, to .75 from .7 to .45
    assert values["partial_area"] == pytest.approx(
        (.2 * .8 + .4 * .75 + .15 * (.7 + .45) / 2) / .75)

def test_one_may_be_asked_for_at_several_levels():
    names = [f"rs_at_fs(level={level})" for level in (.6, .9, .95)]
    values, why = measures(POINTS, dict.fromkeys(names, {}))
    assert [values[name] for name in names[:2]] == [.7, .2] and why == {names[2]: NOT_REACHED}
    assert label("summary", names[0]) == "RS at equal FS (level 0.6)"
    assert [Margins()[name] for name in ("rs_at_fs", names[0], "partial_area")] == [.03, .03, .02]

def test_bad_levels_are_refused_before_anything_is_measured():
    for level in (0, 1.5, 80):
        one_line(lambda: measures(POINTS, {"rs_at_fs": {"level": level}}), "rs_at_fs: level must")
    one_line(lambda: measures(POINTS, {"rs_at": {}}), "unknown summary 'rs_at'; known: AUES, MU95, "
        "partial_area, rs_at_fs")

def test_distance_pays_in_aues_and_nowhere_else():
    fs = np.linspace(.1, .9, 9)
    curve = pd.DataFrame({"FS": fs, "RS": 1 - .3 * fs**4})
    for n in range(6, 9):
        stopped, whole = measures(curve[:n], ASKED | {"rs_at_fs": {"level": .55}, "partial_area": {
            "level": .55}})[0], measures(curve, {k: {"level": .55} for k in ASKED})[0]
        assert stopped["AUES"] < whole["AUES"]
        assert all(stopped[name] == whole[name] for name in ASKED)
    lossless = curve.assign(RS=1.)
    assert [measures(lossless[:n])[0]["AUES"] for n in (3, 9)] == pytest.approx([fs[2], fs[8]])

# --- MU95 without a crossing

def test_the_rule_crossing_gives_no_value_without_one():
    values, why = measures(POINTS, {"MU95": {"rule": "crossing"}})
    assert np.isnan(values["MU95"]) and why == {"MU95": NOT_REACHED}
    assert values["MU95 best"] == measures(POINTS)[0]["MU95"] == -5.
    deep = POINTS.assign(MU=[.5, np.nan, .45])
    assert measures(deep, {"MU95": {"rule": "crossing"}}) == measures(deep)
    assert measures(deep)[0]["MU95"] == mu95([.5, .45], [-20., -5.]) == pytest.approx(-12.5)

def test_an_arm_that_never_got_there_is_told_apart_from_one_without_runs():
    frame = pd.DataFrame({"objective": "wga", "arm": ["Oracle", "Random"] * 3,
        "seed": [0, 0, 1, 1, 2, 2], "MU95": [-1., None, -2., None, None, None], "AUES": np.nan})
    frame.attrs["without"] = {"MU95": NOT_REACHED}
    row = compare(frame, ["objective"], "MU95").table(2).iloc[0]
    assert (row.Oracle, row.Random, row["|difference|"]) == ("-1.50 ± 0.71", NOT_REACHED, "–")
    assert compare(frame, ["objective"], "AUES").table(2).iloc[0].Oracle == "–"
    arms = {arm: arm for arm in ("Oracle", "Random")}
    assert [*spreads(frame, "MU95", "arm", arms, 2).values()] == ["-1.50 ± 0.71", NOT_REACHED]
    assert [*spreads(frame, "AUES", "arm", arms, 2).values()] == ["–", "–"]

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: # no bars
        folder = tmp_path_factory.mktemp("pages")
        patch.setenv("UNLOC_PROGRESS", str(folder / "events"))
        yield folder

def page(place, n, out, **values): # gives the page's names
    "Execute a page as papermill does, in this process"
    import matplotlib.pyplot as plt
    path, = NBS.glob(f"{n}_*.ipynb")
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    names = {"__name__": "__main__", "display": lambda *_: None}
    with contextlib.chdir(NBS), contextlib.redirect_stdout(io.StringIO()):
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= values | {"store": str(place / "store"), "out": str(place / out)}
    plt.close("all")
    return names

SLOW = {"unlearn": {"wga": {"lr": 1e-7, "epochs": 1}}} # it forgets nothing, and loses nothing

def test_a_page_prints_not_reached_and_counts_such_runs(place):
    names = page(place, "21", "mine", rule_mu95="crossing", **SLOW)
    told = json.loads((place / "mine" / "table2_oracle_random.json").read_text("utf-8"))
    row, = (row for row in told["rows"] if row["metric"] == "MU95")
    assert (row["Oracle"], row["Random"], row["|difference|"]) == (NOT_REACHED, NOT_REACHED, "–")
    n = len(names["runs"])
    assert n >= 4 and f"{NOT_REACHED} in {n} of {n} runs" in told["caption"]
    assert told["conventions"]["MU95 rule"] == "crossing"
    usual = page(place, "21", "usual", **SLOW)["measured"]
    before = json.loads((place / "usual" / "table2_oracle_random.json").read_text("utf-8"))
    row, = (row for row in before["rows"] if row["metric"] == "MU95")
    assert usual.MU95.eq(usual.FQ_end).all() and NOT_REACHED not in before["caption"]
    assert row["Oracle"] != NOT_REACHED

def test_a_study_measures_what_it_is_asked_for(place):
    runs = page(place, "21", "asked", **SLOW)["runs"]
    frame = runs.tradeoff(more={"rs_at_fs": {"level": 1e-6}, "partial_area": {"level": 1.}})
    assert frame.rs_at_fs.equals(frame.RS_start.rename("rs_at_fs"))
    assert frame.partial_area.isna().all()
    assert {*runs.undefined.values()} == {f"{NOT_REACHED} in {len(runs)} of {len(runs)} runs"}
    assert frame.attrs["without"] == {"partial_area": NOT_REACHED}
    assert runs.tradeoff().attrs == {} and "rs_at_fs" not in runs.tradeoff()

# --- how fine forget quality is, and whose facts it counts

@pytest.mark.filterwarnings("ignore:ks_2samp") # where p is 1
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_quality_takes_the_values_that_scipy_finds(n):
    found = quality_values(n)
    assert len(found) == n + 1
    assert found[0] == 0
    for k, value in enumerate(found[1:], 1):
        exact = ks_2samp(np.arange(n), np.arange(n) + k, method="exact").pvalue
        assert value == pytest.approx(min(0., np.log10(exact)), abs=1e-9)
    assert found[-1] == pytest.approx(quality_floor(n)) and (np.diff(found) <= 0).all()
    drawn = np.random.default_rng(n)
    for _ in range(50): # no sample gives another
        value = forget_quality(drawn.lognormal(size=n), drawn.lognormal(.5, size=n))
        assert np.abs(found - value).min() < 1e-12

def test_the_values_on_twenty_facts_are_those_of_the_table_by_hand():
    assert quality_values(20)[4:13].round(2).tolist() == [
        -.08, -.24, -.47, -.76, -1.09, -1.47, -1.91, -2.40, -2.95]
    for n in (0, 2.5, True, "20"): one_line(lambda: quality_values(n), "n must be a whole number")

def by_hand(a, b, names): # every swap of whole clusters, distances by scipy
    clusters = sorted(set(names))
    def distance(swapped):
        turn = np.isin(names, swapped)
        return ks_2samp(np.where(turn, b, a), np.where(turn, a, b)).statistic
    every = [distance([c for c, one in zip(clusters, flags) if one])
        for flags in itertools.product((0, 1), repeat=len(clusters))]
    return np.log10(np.mean([one >= every[0] - 1e-12 for one in every]))

@pytest.mark.parametrize("seed", range(12))
def test_authors_are_swapped_as_by_hand(seed):
    rng = np.random.default_rng(seed)
    names = rng.choice(["a", "b", "c", "d", "e", "f"], 24)
    a = rng.normal(size=24).round(seed % 3) # with ties
    b = rng.normal(.4 * (seed % 4), size=24).round(seed % 3)
    assert clustered_quality(a, b, names) == pytest.approx(by_hand(a, b, names), abs=1e-12)

def test_the_floor_is_reached_and_drawn_swaps_agree_with_all():
    for n in (1, 2, 8, 14):
        names = np.repeat(range(n), 3)
        apart = clustered_quality(np.arange(3 * n), 100 + np.arange(3 * n), names)
        assert apart == pytest.approx(clustered_floor(n), abs=1e-12)
    names = np.repeat(range(40), 2)
    apart = clustered_quality(np.arange(80), 100 + np.arange(80), names)
    assert apart == clustered_floor(40) == pytest.approx(-4.)
    rng = np.random.default_rng(0)
    few = np.repeat(range(12), 4)
    a, b = rng.normal(size=48), rng.normal(.6, size=48)
    exact, drawn = clustered_quality(a, b, few), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unloc.quality.EVERY_SWAP", 5)
        drawn = clustered_quality(a, b, few)
        assert drawn == clustered_quality(a, b, few) != clustered_quality(a, b, few, seed=1)
    assert 10**drawn == pytest.approx(10**exact, abs=.02) and .01 < 10**exact < .9

def test_only_the_test_over_authors_holds_its_level():
    names, wrong = np.repeat(range(8), 12), np.zeros(2)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        a, b = (rng.normal(size=8)[names] + rng.normal(0, .3, 96) for _ in range(2))
        wrong += [forget_quality(np.exp(a), np.exp(b)) < np.log10(.05),
            clustered_quality(a, b, names) < np.log10(.05)]
    assert wrong[0] > 75 and wrong[1] <= 15 # of 150; 7.5 are expected

def test_bad_clusters_are_named_in_one_line():
    one_line(lambda: clustered_quality([1., 2.], [1.], [0, 1]), "shapes (2,), (1,) and (2,)")
    one_line(lambda: clustered_quality([], [], []), "expected one value of each for each fact")
    one_line(lambda: clustered_quality([np.nan], [1.], [0]), "a truth ratio is not finite")
    one_line(lambda: clustered_quality(range(20), range(20), range(20), draws=0), "n must be")

def test_quality_over_authors_is_a_metric_with_an_option():
    found = find("metric", "FQ_authors(each=20)")
    assert found.about["full"] and found.about["margin"] == 1. == Margins()["FQ_authors_end"]
    assert found.label == "FQ over authors (each 20)"
    one_line(lambda: found.checked({"each": 10}), "no option 'each'")
    one_line(lambda: find("metric", "FQ_authors").checked({"each": -1}), "each must be")

# --- what runs store and no other table shows

@pytest.mark.parametrize("auc, retained, leakage", [ # by hand, (retained - auc) / (1 - retained)
    (1., .5, -100.), (.5, .5, 0.), (.25, .5, 50.), (.9, .6, -75.), (0., .2, 25.)])
def test_leakage_is_counted_from_the_retained_model(auc, retained, leakage):
    found = leakages({"retained": retained, "original": auc}, "loss")
    assert [*found] == ["AUC loss retained", "AUC loss original", "leakage loss original"]
    assert found["leakage loss original"] == pytest.approx(leakage, abs=1e-6)
    for aucs in ({"original": auc}, {"retained": np.nan, "original": auc},
            {"retained": retained, "original": np.nan}):
        assert np.isnan(leakages(aucs, "loss")["leakage loss original"])

@pytest.fixture(scope="module")
def both(place): # the runs of a page, and the measurement of each
    names = page(place, "21", "stored", **SLOW)
    study, unlearned = names["study"], names["unlearned"]
    def measured(**run): return study.measuring(unlearned(**run), "privacy")
    return names["runs"], study.sweep(study.grid(measured, **names["axes"]))

def test_every_number_is_that_of_the_files_of_its_run(both):
    runs, privacy = both
    frame = also_measured(runs, privacy)
    assert [*frame][:len(runs.names)] == [*runs.names] and len(frame) == len(runs)
    for (_, row), run in zip(frame.iterrows(), runs.done.values()):
        points, line, store = run.table(), run.description, run.path.parent
        for name in MEASURED:
            assert (row[f"{name}_start"], row[f"{name}_end"]) == (
                points[name].iloc[0], points[name].iloc[-1])
        found = {}
        while line: # up to the base
            result = store / run_id(line) / "result.json"
            found[line["kind"]] = json.loads(result.read_text("utf-8")).get("membership", {})
            line = line.get("parent")
        for attack in ATTACKS:
            retained, original = found["judge"][attack], found["inject"][attack]
            assert row[f"AUC {attack} retained"] == retained
            assert row[f"AUC {attack} original"] == original
            assert row[f"leakage {attack} original"] == privacy_leakage(original, retained)
            assert row[f"leakage {attack} unlearned"] == privacy_leakage(
                row[f"AUC {attack} unlearned"], retained)

def test_the_measurement_counts_pairs_of_facts(both):
    _, privacy = both
    run = next(iter(privacy.done.values()))
    rows, above = run.table("measures.csv"), run.description["parent"]
    scene = scene_of(run.description, Run(above, run.path.parent / run_id(above)))
    assert rows.model.tolist() == [m for m in ("unlearned", "original", "retained") for _ in "1234"]
    for name, model in {"unlearned": scene.attacked, "retained": scene.retained}.items():
        scores = [membership(model, scene.tokenizer, scene.examples[kind])
            for kind in ("forget", "holdout")]
        for attack in ATTACKS:
            pairs = [(a < b) + .5 * (a == b)
                for a, b in itertools.product(*(x[attack].tolist() for x in scores))]
            row, = rows[(rows.model == name) & (rows.attack == attack)].itertuples()
            assert row.AUC == pytest.approx(np.mean(pairs), abs=1e-12)
            assert (row.facts, row.strangers) == (len(scores[0]["loss"]), len(scores[1]["loss"]))
    assert rows[rows.model == "retained"].leakage.eq(0).all()

def test_a_page_can_save_the_table(both, place):
    from unloc.figures import save
    runs, privacy = both
    study = page(place, "21", "stored", **SLOW)["study"]
    for frame, columns in ((also_measured(runs), 7), (also_measured(runs, privacy), 9)):
        table = also_table(frame, ["arch", "objective", "arm"], "loss")
        assert table.shape[1] == 3 + columns and "AUC (loss), original" in table
        save(table, study, "also_measured", frame, "Measured beside FS and RS.")
        told = json.loads((place / "stored" / "also_measured.json").read_text("utf-8"))
        assert [row["arm"] for row in told["rows"]] == table.arm.tolist()
    own = frame[(frame.arm == "Oracle") & (frame.arch == table.arch[0])]
    assert table["AUC (loss), original"][0] == (
        f"{own['AUC loss original'].mean():.2f} ± {own['AUC loss original'].std():.2f}")
    one_line(lambda: also_table(frame, ["arm"], "recall"), "unknown membership attack 'recall'")

# --- a profile asks for summaries

def test_a_study_refuses_summaries_that_cannot_be_measured():
    for asked, says in (({"rs_at": {}}, "unknown summary 'rs_at'"),
            ({"rs_at_fs": {"level": 2.}}, "summary rs_at_fs: level must be"),
            ({"rs_at_fs": {"rule": "step"}}, "summary rs_at_fs has no option 'rule'")):
        one_line(lambda: Study(summarised=asked), says)
    assert Study().summarised == {} and Study(summarised=ASKED).summarised == ASKED

@pytest.mark.parametrize("n, table, own", [
    ("21", "table2_oracle_random", {}),
    ("25", "table1_localizers", {"localizers": ["activations"], "localizer_seeds": 1,
        "own_units": {}, "localized_unlearn": SLOW["unlearn"]}),
    ("27", "table4_arms", {"arms": ["Oracle", "Random"], "attacked_seeds": 1,
        "attacked_unlearn": SLOW["unlearn"]})])
def test_what_a_study_asks_for_stands_in_its_tables(place, n, table, own):
    asked = {"rs_at_fs": {"level": 1e-6}, "partial_area": {"level": 1.}}
    page(place, n, f"plain{n}", **SLOW | own)
    names = page(place, n, f"asked{n}", summarised=asked, **SLOW | own)
    plain, told = (json.loads((place / f"{kind}{n}" / f"{table}.json").read_text("utf-8"))
        for kind in ("plain", "asked"))
    new = "RS at equal FS", "partial area"
    rows = [row for row in told["rows"] if row["metric"] not in new]
    assert rows == plain["rows"] and len(told["rows"]) == 2 * len(rows)
    assert {row["metric"] for row in told["rows"]} == {"AUES", "MU95", *new}
    late = [row for row in told["rows"] if row["metric"] == "partial area"]
    assert all(NOT_REACHED in row.values() for row in late)
    assert f"{NOT_REACHED} in" in told["caption"]
    assert "±0.03 rs_at_fs" in told["caption"]
    assert told["conventions"]["partial_area"].startswith("partial area, level 1.0 (")
    assert names["measured"].rs_at_fs.notna().all()
