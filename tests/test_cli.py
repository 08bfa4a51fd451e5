"""The command, as a person calls it: everything of the smoke profile comes out whole and offline, a
second call changes nothing, bad input is one line that destroys nothing, and Ctrl-C or a kill costs
no finished run."""
import csv, json, os, re, shutil, signal, subprocess, sys, time, uuid
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree
import pytest
from unloc.cli import artefacts

ROOT = Path(__file__).resolve().parents[1]
UNLOC = str(Path(sys.executable).with_name("unloc"))
NOTEBOOKS = [
    "20_injection_ratio", "21_oracle_random", "22_trajectories", "23_direct_supervision",
    "24_localization", "25_localizers", "26_region_share", "27_arms", "28_recovery",
    "29_reversal", "30_dose_response", "31_injection", "32_tuning",
    "33_study", "34_testbed"]
FIGURES = [
    "injection_ratio", "trajectories", "trajectories_utility", "figure1_direct_supervision",
    "localization", "region_share", "recovery", "reversal", "dose_response", "injection",
    "tuning_grid", "study_forest", "testbed_axes"]
TABLES = [
    "table2_oracle_random", "table1_localizers", "table1_own_units", "table3_recovery",
    "table4_arms", "table5_equal_retention", "table6_inside", "tuning", "tuning_attack",
    "study_excluded", "study_arms", "study_claims", "study_levels", "testbed"]
FILES = (
    {f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "pdf", "csv", "json")}
    | {f"{name}{suffix}" for name in TABLES for suffix in (".json", ".csv", ".tex", "_data.csv")}
    | {"machine.json"})


def files(*roots): # content of every file but locks and executed copies
    found = {}
    for f in chain.from_iterable(sorted(Path(root).rglob("*")) for root in roots):
        if f.is_file() and "locks" not in f.parts: found[str(f)] = f.read_bytes()
    return found

class Checkout:
    "A copy of the notebooks and profiles, with a store and an output folder of its own"
    def __init__(self, folder, env):
        self.root, self.out, self.store = folder / "checkout", folder / "out", folder / "store"
        self.env = {k: v for k, v in env.items() if k not in ("UNLOC_TOFU", "UNLOC_PROGRESS")} | {
            "UNLOC_TEST_MARK": uuid.uuid4().hex}
        shutil.copytree(
            ROOT / "nbs",
            self.root / "nbs",
            ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.py"))
        shutil.copy(ROOT / "settings.ini", self.root)

    def start(self, *words, out=None, store=None):
        place = {
            "reproduce": ["--out", str(out or self.out), "--store", str(store or self.store)],
            "plan": ["--store", str(store or self.store)]}.get(words[0], [])
        return subprocess.Popen(
            [UNLOC, *words, *place],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) # which a shell ignores in what it starts in the background

    def call(self, *words, **place):
        process = self.start(*words, **place)
        out, err = process.communicate(timeout=7200)
        return process.returncode, out, err

    def left(self): # processes of this checkout that still live
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                found += (
                    [folder.name]
                    if self.env["UNLOC_TEST_MARK"].encode() in (folder / "environ").read_bytes()
                    and (folder / "stat").read_text("utf-8").rsplit(")")[-1].split()[0] != "Z"
                    else [])
            except OSError: pass
        return found

@pytest.fixture(scope="module")
def checkout(tmp_path_factory, guarded, command):
    return Checkout(tmp_path_factory.mktemp("cli"), guarded)

@pytest.fixture(scope="module")
def smoke(checkout): # the whole profile, once
    code, out, err = checkout.call("reproduce", "--profile", "smoke", "--jobs", "1")
    assert code == 0, err
    checkout.said = out, err
    return checkout

def refused(checkout, *words, says, code=1, **place):
    before = files(checkout.out, checkout.store, checkout.root / "nbs")
    status, out, err = checkout.call(*words, **place)
    assert (
        status == code
        and err.count("\n") == 1
        and err.startswith("unloc: ")
        and "Traceback" not in out + err
        and re.search(says, err)), (status, out, err)
    assert (
        files(checkout.out, checkout.store, checkout.root / "nbs") == before
    ), "something was touched"

# --- what comes out

def test_list(checkout):
    code, out, err = checkout.call("list")
    assert code == 0 and err == ""
    for name in NOTEBOOKS + FIGURES + TABLES + ["smoke", "tiny"]:
        assert re.search(rf"^ +{name}\b", out, re.M), name
    assert "paper/unloc.pdf" in out
    assert all(f"{name}.{{svg,pdf,csv,json}}" in out for name in FIGURES)
    for name in NOTEBOOKS:
        promise = (
            "".join(
                json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text("utf-8"))["cells"][0][
                    "source"])
            .split("\n> ")[1]
            .split("\n")[0])
        assert promise in " ".join(out.split())
    for kind, name, label in (
        ("localizer", "wanda", "Wanda"), ("objective", "npo", "NPO"), ("retain", "nll", "NLL"),
        ("summary", "AUES", "AUES"), ("summary", "MU95", "MU95")):
        assert re.search(rf"^  {kind} +{name} +{label} +unloc\.methods\.\w+$", out, re.M), name
    assert max(map(len, out.splitlines())) <= 120

def test_the_command_starts_fast():
    heavy = ("torch", "transformers", "pandas", "papermill")
    code = f"import sys, unloc.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert found.stdout.strip() == "[]", found

def test_smoke_gives_every_artefact(smoke):
    assert {f.name for f in (smoke.out / "smoke").iterdir()} == FILES
    assert all(f.stat().st_size for f in (smoke.out / "smoke").iterdir())
    copies = list((smoke.root / "_out" / "smoke").glob("*.ipynb"))
    assert {f.stem for f in copies} == set(NOTEBOOKS)
    assert not [f.stem for f in copies if "IProgress not found" in f.read_text("utf-8")]
    assert not (smoke.root / "figures").exists()

@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_whole(smoke, name):
    path = smoke.out / "smoke" / name
    svg = ElementTree.parse(path.with_suffix(".svg")).getroot()
    pdf = path.with_suffix(".pdf").read_bytes()
    assert svg.tag.endswith("svg")
    assert len(list(svg.iter())) > 100
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert b"CreationDate" not in pdf
    rows = list(csv.DictReader(path.with_suffix(".csv").open(encoding="utf-8")))
    assert len(rows) >= 4 and all(None not in r and None not in r.values() for r in rows)
    about = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert about["profile"] == "smoke"
    assert about["caption"].endswith(".")
    assert about["models"]["llama"]["d_model"] == 48
    assert str(smoke.root.parent) not in json.dumps(about)

def test_the_table_is_whole_and_follows_from_its_data(smoke):
    path = smoke.out / "smoke" / TABLES[0]
    about = json.loads(path.with_suffix(".json").read_text("utf-8"))
    cells = list(csv.DictReader(path.with_suffix(".csv").open(encoding="utf-8")))
    data = list(csv.DictReader(Path(f"{path}_data.csv").open(encoding="utf-8")))
    assert about["rows"] == cells
    assert about["columns"] == list(cells[0])
    assert [(r["objective"], r["metric"]) for r in cells] == [
        (o, m) for o in ("WGA", "RMU") for m in ("AUES", "MU95")]
    assert len(data) == 2 * 3 * 2
    tex = path.with_suffix(".tex").read_text("utf-8")
    assert tex.count(r" \\") == 5
    assert r"\begin{tabular}" in tex
    assert not re.search(r"(?<!\\)[%&](?! )", tex.replace(" & ", ""))
    for row in cells:
        for arm in ("Oracle", "Random"):
            values = [
                float(d[row["metric"]])
                for d in data
                if d["objective"] == row["objective"].lower() and d["arm"] == arm]
            mean = sum(values) / 3
            digits = {"AUES": 3, "MU95": 2}[row["metric"]]
            assert (
                row[arm]
                == f"{mean:.{digits}f} ±"
                f" {(sum((v - mean) ** 2 for v in values) / 2) ** .5:.{digits}f}")
    assert all(d["locked_bit_equal"] == "True" for d in data)
    assert {d["live_fraction"] for d in data if d["objective"] == "wga"} == {"1.0"}
    assert about["inject"]["fraction"] == .1
    assert about["seeds"] == 3
    assert about["conventions"]["AUES rule"] == "trapezoid"

def test_the_localizers_table_follows_from_its_data(smoke):
    for name, regions in (
        ("table1_localizers", ["Random", "Activations", "WAGLE"]),
        ("table1_own_units", ["Random weights", "WAGLE weights"])):
        path = smoke.out / "smoke" / name
        about = json.loads(path.with_suffix(".json").read_text("utf-8"))
        data = list(csv.DictReader(Path(f"{path}_data.csv").open(encoding="utf-8")))
        assert [(r["metric"], r["region"]) for r in about["rows"]] == [
            (m, r) for m in ("AUES", "MU95") for r in regions]
        assert len(data) == len(regions) * 3
        assert all(d["locked_bit_equal"] == "True" for d in data)
        assert len({d["region"] for d in data}) == 1
        assert {float(d["FQ_start"]) for d in data} != {0.}
        for row in about["rows"]:
            values = [
                float(d[row["metric"]])
                for d in data
                if d["localizer"] == row["region"].lower().replace(" ", "_")]
            assert float(row["mean"]) == pytest.approx(sum(values) / len(values), abs=.006)
            assert (row["verdict"] == "–") == (row["region"].startswith("Random"))

def test_the_terminal_tells_what_happens(smoke):
    out, err = smoke.said
    for i, name in enumerate(NOTEBOOKS, 1):
        assert f"[{i}/{len(NOTEBOOKS)}] {name}" in out.split("\n")
    wrote = re.findall(r"^  wrote (.+)$", out, re.M)
    assert len(wrote) == len(FIGURES + TABLES)
    assert all(any(name in w for w in wrote) for name in FIGURES + TABLES)
    assert len(re.findall(r"^  done in \d+ s$", out, re.M)) == len(NOTEBOOKS)
    assert "Traceback" not in out + err and not re.search(r"warn", out + err, re.I), out + err
    assert re.search(r"base 1\.0 of 1 runs", out + err)
    assert re.search(r"unlearn 12\.0 of 12 runs", out + err)

def test_the_store_is_whole(smoke):
    from unloc.runs import check_run
    folders = [f for f in smoke.store.iterdir() if f.name != "locks"]
    for folder in folders: check_run(folder)
    kinds = [
        json.loads((f / "description.json").read_text("utf-8"))["description"]["kind"]
        for f in folders]
    assert {k: kinds.count(k) for k in set(kinds)} == KINDS
    assert str(smoke.root.parent).encode() not in b"".join(
        files(smoke.store).values()), "a run does not know where it lies"

def test_a_second_call_does_no_run_and_changes_no_byte(smoke):
    before = files(smoke.out, smoke.store)
    times = {
        f: f.stat().st_mtime_ns
        for f in smoke.store.rglob("*")
        if f.is_file() and "locks" not in f.parts}
    code, out, err = smoke.call("reproduce", "--profile", "smoke")
    assert code == 0
    assert files(smoke.out, smoke.store) == before
    assert {f: f.stat().st_mtime_ns for f in times} == times
    assert " runs" not in out + err
    assert len(re.findall(r"^  wrote ", out, re.M)) == len(FIGURES + TABLES) and err == ""

def test_names_work_without_their_number(smoke):
    before = files(smoke.out, smoke.store)
    code, out, err = smoke.call("reproduce", "--profile", "smoke", "--only", "trajectories")
    assert code == 0 and "[1/1] 22_trajectories" in out and files(smoke.out, smoke.store) == before

def only(*words): # the notebooks that the command line chooses
    from unloc.cli import order
    return [notebook.stem for notebook in order(ROOT, "smoke", list(words)).chosen]

def test_a_notebook_is_named_by_its_number_or_by_what_it_saves():
    for name in NOTEBOOKS:
        number, rest = name.split("_", 1)
        assert only(name) == only(number) == only(rest) == [name]
        saved = [one.partition(".")[0] for one in artefacts(ROOT / "nbs" / f"{name}.ipynb")]
        assert saved and all(only(one) == [name] for one in saved)
    assert only("21", "table2_oracle_random", "21_oracle_random", "20") == NOTEBOOKS[1::-1]
    assert only("paper", "table6_inside") == ["29_reversal"]

def test_every_committed_figure_and_table_is_one_that_a_notebook_saves():
    from unloc.project import pages_of
    saved = {one for notebook in pages_of(ROOT) for one in artefacts(notebook)}
    for file in (ROOT / "figures").glob("*/*.json"):
        if file.stem == "machine": continue
        suffix = "{svg,pdf,csv,json}" if file.with_suffix(".svg").exists() else "{json,csv,tex}"
        assert f"{file.stem}.{suffix}" in saved, file

@pytest.mark.parametrize("word, hint", [
    ("table2_oracle_randm", "table2_oracle_random"), ("21_oracle_randm", "21_oracle_random"),
    ("dose_respons", "dose_response"), ("2", ""), ("table2_oracle_random.csv", "table2_oracle"),
    ("99", ""), ("", "")])
def test_what_no_notebook_is_called_is_one_line_with_the_nearest(word, hint):
    from unloc.profiles import Problem
    with pytest.raises(Problem) as error: only(word)
    said = str(error.value)
    assert said.startswith(f"unknown notebook {word!r}") and "\n" not in said
    assert not hint or f"; did you mean '{hint}" in said
    assert "20_injection_ratio, 21_oracle_random" in said and ", paper; a number, or" in said

@pytest.mark.parametrize("file", sorted((ROOT / "figures").glob("*/*.tex")), ids=lambda f: f.stem)
def test_a_saved_table_is_printed_in_three_forms(file, capsys, monkeypatch):
    from unloc.cli import main
    monkeypatch.chdir(ROOT)
    def printed(form):
        words = file.stem, "--profile", file.parent.name, "--as", form
        assert main(["table", *words]) == 0
        return capsys.readouterr().out
    assert printed("latex") == file.read_text("utf-8")
    assert printed("csv") == file.with_suffix(".csv").read_text("utf-8")
    about = json.loads(file.with_suffix(".json").read_text("utf-8"))
    head, rule, *rows = printed("markdown").split("\n\n")[0].splitlines()
    assert len(rows) == len(about["rows"]) and rule == "|" + " --- |" * len(about["columns"])
    assert main(["table", f"{file.stem}x", "--profile", file.parent.name]) == 1
    assert f"did you mean '{file.stem}'?" in capsys.readouterr().err

# --- a level that no run reaches

def test_a_level_that_no_run_reaches_is_told(smoke, tmp_path):
    shutil.copytree(smoke.store, tmp_path / "runs")
    attack = {
        "level": .99, "by": "RS", "lr": 1e-3, "region_lr": 1e-2, "epochs": 1, "batch_size": 8,
        "taught": 5, "samples": 0, "shots": 1}
    for name in ("28_recovery", "29_reversal"):
        words = "reproduce", "--profile", "smoke", "--only", name
        less = *changed(attack=attack), *changed(arms=["Oracle", "Random"])
        code, out, err = smoke.call(
            *words, *less, out=tmp_path / "out", store=tmp_path / "runs")
        assert code == 0, err
    of = {
        name: json.loads((tmp_path / "out" / "smoke" / f"{name}.json").read_text("utf-8"))
        for name in ("table3_recovery", "reversal")}
    assert {r["verdict"].split(";")[0] for r in of["table3_recovery"]["rows"]} == {
        "fewer than three pairs at the level"}
    assert set(of["reversal"]["correlation"].values()) == {"not estimated (0 runs)"}

# --- the plan

KINDS = {
    "base": 2 + 2 + 1,
    "judge": 2 + 2 + 1,
    "inject": 3 * 2 + 3 + 3 + 3 * 4 + 2 + 1,
    "teach": 1,
    "localize": 3 * 2 + 3 + 1 + 1 + 3 + 1 + 3 * 2,
    "unlearn": 12 + 5 * 3 + 2 + 3 * 7 + 3 * 2 + 3 * 8 + 8 + 12,
    "supervise": 6,
    "attack": 3 * 8 + 3 * 4 + 3 * 2 + 3 * 8 + 1,
    "measure": 3}

def test_a_measure_whose_ends_are_alike_is_not_tested(smoke):
    about = json.loads((smoke.out / "smoke" / "table6_inside.json").read_text("utf-8"))
    margin = {
        "logit lens": about["margins"]["lens"],
        "the answer itself": about["margins"]["lens"],
        "probe": about["margins"]["probe"]}
    alike = {
        r["inside"]: (
            abs(float(r["Original"].split()[0]) - float(r["Retained"].split()[0]))
            < margin[r["inside"].split(",")[0]])
        for r in about["rows"]
        if r["inside"].split(",")[0] in margin}
    assert {
        r["inside"]: r["verdict"] == "ends alike" for r in about["rows"] if r["inside"] in alike
    } == alike
    assert any(alike.values())
    assert {r["difference [95 %]"] for r in about["rows"] if r["verdict"] == "ends alike"} == {"–"}

def test_the_plan_counts_what_reproduce_then_does(smoke, tmp_path):
    before = files(smoke.out, smoke.store, smoke.root / "nbs")
    code, out, err = smoke.call(
        "plan", "--profile", "smoke", "--jobs", "1", store=tmp_path / "runs")
    assert (
        code == 0
        and err == ""
        and out.startswith("profile smoke: 15 notebooks, 235 runs, 235 to do, 1 at a time\n")
        and out.endswith("everything is there and fits\n")), (out, err)
    assert {
        kind: re.search(rf"^  {kind} +(\d+)/(\d+) +\d+ MiB +< 1 min +\d+ MiB  \w", out, re.M)[1]
        for kind in KINDS} == {kind: str(n) for kind, n in KINDS.items()}
    kinds = [
        json.loads((f / "description.json").read_text("utf-8"))["description"]["kind"]
        for f in smoke.store.iterdir()
        if f.name != "locks"]
    assert {k: kinds.count(k) for k in set(kinds)} == KINDS
    assert not (tmp_path / "runs").exists()
    assert files(smoke.out, smoke.store, smoke.root / "nbs") == before

def test_the_plan_of_what_is_done(smoke):
    before = files(smoke.out, smoke.store)
    code, out, err = smoke.call("plan", "--profile", "smoke", "--set", 'margins={"AUES": 0.05}')
    assert code == 0
    assert err == ""
    assert out.split("\n")[0] == "profile smoke: 15 notebooks, 235 runs, 0 to do"
    assert out.endswith("everything is there\n")
    assert files(smoke.out, smoke.store) == before
    code, out, err = smoke.call("plan", "--profile", "cost", "--only", "40_cost")
    assert code == 0 and out == "profile cost: 1 notebooks, 0 runs, 0 to do\neverything is there\n"

def test_what_is_missing_is_an_exit_status(smoke, tmp_path):
    smoke.env["UNLOC_TOFU"] = none = str(tmp_path / "none")
    try: code, out, err = smoke.call("plan", "--profile", "tofu-20")
    finally: del smoke.env["UNLOC_TOFU"]
    says = rf"^! UNLOC_TOFU='{none}': no such folder; .*"
    says += r"\(for 20_injection_ratio, 21_oracle_random, .*\)$"
    assert (code, err) == (1, ""), (out, err)
    assert re.search(says, out, re.M), out
    for words, says in (
        (["--profile", "tinny"], "unknown profile 'tinny'"),
        (["--set", "seed=3"], "unknown parameter in --set 'seed'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0")):
        refused(smoke, "plan", *words, says=says)

# --- bad input, found before anything starts

EARLY = {
    "profile": (
        ["--profile", "tinny"],
        r"unknown profile 'tinny'; did you mean 'tiny'\? \(known: smoke, tiny"),
    "notebook": (["--only", "tabel2"], "unknown notebook 'tabel2'"),
    "notebook of a module": (["--only", "10_training"], "unknown notebook '10_training'"),
    "one of two notebooks": (["--only", "trajectories", "curves"], "unknown notebook 'curves'"),
    "parameter": (["--set", "seed=3"], "unknown parameter in --set 'seed'; did you mean 'seeds'"),
    "type": (["--set", 'seeds="3"'], "parameter seeds of .* must be of type int, got '3'"),
    "float for int": (["--set", "seeds=2.5"], "must be of type int, got 2.5"),
    "bool for int": (["--set", "seeds=true"], "must be of type int, got True"),
    "null": (["--set", "swapped=null"], "must be of type float, got None"),
    "list for dict": (
        ["--set", 'unlearn=["wga"]'],
        r"unlearn of .* must be of type dict, got \['wga'\]"),
    "text": (["--set", "device=cpu"], "--set: device is not JSON"),
    "not a pair": (["--set", "seeds"], "--set takes NAME=JSON, got 'seeds'"),
    "no jobs": (["--only", "22_trajectories", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    "less than no jobs": (["--jobs", "-2"], "--jobs must be at least 1, got -2")}

@pytest.mark.parametrize("words, says", EARLY.values(), ids=EARLY)
def test_a_bad_word_is_one_line(smoke, words, says):
    refused(
        smoke,
        "reproduce",
        *([] if "--profile" in words else ["--profile", "smoke"]),
        *words,
        says=says)

@pytest.mark.parametrize("which", ["out", "store"])
def test_a_place_that_cannot_be_written_is_named(smoke, which, tmp_path):
    (tmp_path / "file").write_text("not a folder", "utf-8")
    refused(
        smoke,
        "reproduce",
        "--profile",
        "smoke",
        says=rf"cannot write to {tmp_path}/file/x\S*: Not a directory; .* --out or --store",
        **{which: tmp_path / "file" / "x"})
    assert (tmp_path / "file").read_text("utf-8") == "not a folder"
    if os.geteuid(): # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        refused(
            smoke,
            "reproduce",
            "--profile",
            "smoke",
            says="cannot write to .*Permission denied",
            **{which: tmp_path / "locked" / "x"})

SETTINGS = {
    "no section": (b"seeds = 3\n", "settings.ini cannot be read: .*no section"),
    "no value": (b"[smoke]\nseeds\n", "settings.ini cannot be read"),
    "twice": (b"[smoke]\n[smoke]\n", "settings.ini cannot be read: .*already exists"),
    "value twice": (
        b"[smoke]\nseeds = 1\nseeds = 2\n",
        "settings.ini cannot be read: .*already exists"),
    "not JSON": (b"[smoke]\nseeds = three\n", r"settings.ini \[smoke\]: seeds is not JSON"),
    "half JSON": (b'[smoke]\nunlearn = {"wga":\n', r"settings.ini \[smoke\]: unlearn is not JSON"),
    "unknown parameter": (
        b"[smoke]\nseedz = 3\n",
        r"unknown parameter in settings.ini \[smoke\] 'seedz'"),
    "wrong type": (
        b'[smoke]\nseeds = "3"\n',
        r"settings.ini \[smoke\]: parameter seeds .* must be of type int"),
    "unknown notebook": (
        b'[smoke]\nnotebooks = ["20_ratio"]\n',
        r"unknown notebook in settings.ini \[smoke\] '20_ratio'"),
    "notebooks no list": (b"[smoke]\nnotebooks = 3\n", r"settings.ini \[smoke\].*notebooks"),
    "empty": (b"", "unknown profile 'smoke'"),
    "not text": (b"[smoke]\n\xff\xfe = 3\n", "settings.ini cannot be read")}

@pytest.mark.parametrize("content, says", SETTINGS.values(), ids=SETTINGS)
def test_a_malformed_profile_is_one_line(smoke, content, says):
    path = smoke.root / "settings.ini"
    whole = path.read_bytes()
    path.write_bytes(content)
    try: refused(smoke, "reproduce", "--profile", "smoke", says=says)
    finally: path.write_bytes(whole)

# --- bad input, found by a notebook

def changed(**values):
    return ["--set", *(f"{name}={json.dumps(value)}" for name, value in values.items())]
INJECT = {"fraction": .1, "epochs": 6, "lr": 1e-2, "batch_size": 4}
LATE = {
    "objective": (
        "21_oracle_random",
        changed(unlearn={"simdpo": {"lr": 1e-3, "epochs": 1}}),
        "ValueError: unknown objective 'simdpo'; known: ceu, cpu, dpo, ga, grad_diff"),
    "setting": (
        "21_oracle_random",
        changed(unlearn={"wga": {"coefficient": 1.}}),
        "unlearn has no setting 'coefficient'; known: lr, .*, beta"),
    "fraction 0": (
        "21_oracle_random",
        changed(inject=INJECT | {"fraction": 0}),
        r"inject: fraction must lie in \(0, 1\], got 0"),
    "fraction 1.5": (
        "21_oracle_random",
        changed(inject=INJECT | {"fraction": 1.5}),
        r"fraction must lie in \(0, 1\], got 1.5"),
    "no disjoint region": (
        "21_oracle_random",
        changed(inject=INJECT | {"fraction": .6}),
        "no random region of fraction 0.6 is disjoint .* at most 0.5"),
    "ratio": (
        "20_injection_ratio",
        changed(ratios=[.1, 2]),
        r"fraction must lie in \(0, 1\], got 2"),
    "no TOFU folder": (
        "21_oracle_random",
        changed(
            data={"name": "tofu", "forget": "forget01", "n_authors": 20},
            source=f"{__file__}.d/none"),
        rf"source='{__file__}.d/none': no such folder; expected a folder"),
    "architecture": (
        "22_trajectories",
        changed(archs=["gpt2"]),
        "unknown architecture 'gpt2'; known: llama, olmo2")}

@pytest.mark.parametrize("notebook, words, says", LATE.values(), ids=LATE)
def test_a_bad_value_is_one_line(smoke, notebook, words, says):
    refused(
        smoke,
        "reproduce",
        "--profile",
        "smoke",
        "--only",
        notebook,
        *words,
        says=rf"{notebook}.ipynb failed: .*{says}")

def test_a_damaged_run_is_named_and_kept(smoke):
    # one that this notebook reads
    def through_an_arm(f):
        if not (f / "trajectory.csv").exists(): return False
        text = (f / "description.json").read_text("utf-8")
        run = json.loads(text)["description"]
        origin, base = run["parent"], run
        while "parent" in base: base = base["parent"]
        usual = origin["kind"] == "inject" and not origin.keys() & {"others", "unit", "style"}
        pair = run.get("objective") == "rmu" and run.get("arm") in ("Oracle", "Random")
        return usual and pair and base["seed"] == 0
    run = next(filter(through_an_arm, smoke.store.iterdir()))
    path = run / "trajectory.csv"
    whole = path.read_bytes()
    for bytes, says in (
        (whole[:-9], rf"trajectory.csv has {len(whole) - 9} bytes, {len(whole)} expected"),
        (whole.replace(b"0", b"1", 1), "trajectory.csv was altered")):
        path.write_bytes(bytes)
        try:
            refused(
                smoke,
                "reproduce",
                "--profile",
                "smoke",
                "--only",
                "22_trajectories",
                says=(
                    f"DamagedRun: run {run.name}: {says}.* delete the folder {run} and start again"
                ))
        finally: path.write_bytes(whole)

# --- stopping

@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for left processes in /proc")
@pytest.mark.parametrize(
    "how, jobs", [(signal.SIGINT, 2), (signal.SIGKILL, 1)], ids=["Ctrl-C", "kill -9"])
def test_a_stopped_command_goes_on_and_gives_the_same_bytes(smoke, how, jobs, tmp_path, guarded):
    from unloc import runs
    from unloc.plan import wanted
    again = Checkout(tmp_path, guarded)
    for run in smoke.store.iterdir(): # base models and injections are there, the unlearning is not
        if run.name != "locks" and json.loads((run / "description.json").read_text("utf-8"))[
            "description"]["kind"] in ("base", "judge", "inject"):
            shutil.copytree(run, again.store / run.name)
    words = ["reproduce", "--profile", "smoke", "--only", "21_oracle_random", "--jobs"]
    start = len(list(again.store.iterdir()))
    last = runs.run_id(wanted(again.root / "nbs" / "21_oracle_random.ipynb", {})[-1])
    (again.store / "locks").mkdir()
    # a run that it waits for: however slow this process is, the command is in the middle
    with runs._locked(again.store / "locks" / last):
        process = again.start(*words, str(jobs))
        while (
            len([f for f in again.store.iterdir() if f.suffix != ".partial" and f.name != "locks"])
            <= start):
            time.sleep(.005); assert process.poll() is None, process.communicate()
        os.killpg(process.pid, how)
        out, err = process.communicate(timeout=1200)
    assert not (again.out / "smoke" / "table2_oracle_random.csv").exists(), "stopped in the middle"
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        kept = "finished runs are kept, and the same command goes on from there"
        assert err == f"unloc: interrupted; {kept}\n"
    end = time.monotonic() + 600 # if they go on, they do so for ever
    while again.left() and time.monotonic() < end: time.sleep(.1)
    assert not again.left(), "processes of the stopped command go on"
    code, out, err = again.call(*words, "1")
    assert code == 0, err
    expected = {f.name: f.read_bytes() for f in (smoke.out / "smoke").glob("table2*")}
    assert {
        f.name: f.read_bytes() for f in (again.out / "smoke").iterdir() if f.name != "machine.json"
    } == expected
    assert {f.name for f in again.store.iterdir()} <= {f.name for f in smoke.store.iterdir()}
    assert all(
        files(f) == {
            p.replace(str(smoke.store), str(again.store)): b
            for p, b in files(smoke.store / f.name).items()}
        for f in again.store.iterdir())

# --- the network, last

def test_no_socket_left_the_machine(smoke, guarded):
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""

@pytest.mark.parametrize(
    "attempt, said",
    [
        ("socket.create_connection(('192.0.2.1', 80), 1)", "192.0.2.1"),
        ("socket.getaddrinfo('huggingface.co', 443)", "huggingface.co"),
        ("urllib.request.urlopen('http://192.0.2.1', timeout=1)", "192.0.2.1"),
        ("socket.socket().connect_ex(('192.0.2.1', 80))", "connect_ex ('192.0.2.1', 80)"),
        (
            (
                "from huggingface_hub.utils import get_session;"
                " get_session().get('https://huggingface.co')"),
            "huggingface.co")])
def test_the_guard_sees_an_attempt(attempt, said, guarded, tmp_path):
    env = guarded | {"UNLOC_TEST_SOCKETS": str(tmp_path / "seen"), "HF_HUB_OFFLINE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", f"import socket, urllib.request\n{attempt}"],
        env=env,
        capture_output=True,
        encoding="utf-8")
    assert found.returncode and said in (tmp_path / "seen").read_text("utf-8")
    code = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(s.getsockname())\nsocket.getaddrinfo('localhost', 80)")
    quiet = subprocess.run([sys.executable, "-c", code], env=guarded)
    assert quiet.returncode == 0

def test_this_process_is_guarded():
    import socket
    with pytest.raises(OSError, match="the tests forbid connect"):
        socket.socket().connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="the tests forbid getaddrinfo"):
        socket.create_connection(("example.org", 80))

@pytest.mark.parametrize("words, jobs", [([], 4), (["--jobs", "2"], 2)])
def test_a_profile_says_how_many_runs_at_once_and_every_set_counts(
    monkeypatch, tmp_path, words, jobs
): # sixteen models of one GPU's size would not fit on it
    from unloc import cli
    given = []
    monkeypatch.setattr(cli, "_execute", lambda notebook, copy, values: given.append(values))
    place = ["--out", str(tmp_path / "o"), "--store", str(tmp_path / "s")]
    assert (
        cli.main(
            [
                "reproduce", "--profile", "tofu", "--only", "21_oracle_random", "--set",
                "seeds=7", "--set", 'margins={"MU95": 0.5}', *words, *place])
        == 0)
    assert [(v["jobs"], v["seeds"], v["margins"]) for v in given] == [(jobs, 7, {"MU95": .5})]

# --- a user's own methods, and what leaves nothing to show

PLUGIN = (
    "import torch\nfrom unloc import models\nfrom unloc.register import localizer\n"
    "@localizer(label='Mine')\ndef mine(model, forget, seed):\n    'Rank by place'\n"
    "    n_layers, d_ff = models.region_shape(model)\n"
    "    return torch.arange(float(n_layers * d_ff)).view(n_layers, d_ff)\n")
SCORED = [
    "reproduce", "--profile", "smoke", "--only", "24_localization", "--jobs", "2", "--set",
    'scored=["mine"]', "localization_seeds=2"]

@pytest.mark.parametrize(
    "change, says",
    [
        ("seeds=0", "ValueError: parameter seeds must be at least 1, got 0"),
        ("seeds=-1", "parameter seeds must be at least 1, got -1"),
        ("archs=[]", "parameter archs is empty; name at least one"),
        ("unlearn={}", "parameter unlearn is empty; name at least one")])
def test_nothing_to_show_is_one_line_before_anything_runs(checkout, change, says):
    refused(
        checkout, "reproduce", "--profile", "smoke", "--only", "21_oracle_random", "--set",
        change, says=says)

def test_methods_of_a_plugin_reach_kernel_and_workers(tmp_path, guarded, command):
    own, plugin, found = Checkout(tmp_path, guarded), tmp_path / "my methods.py", []
    plugin.write_text(PLUGIN, "utf-8")
    refused(
        own,
        *SCORED,
        says=(
            r"unknown localizer 'mine'; known: activations, .*; register it in a file named by"
            r" --plugin, a profile's plugins or UNLOC_PLUGINS"))
    refused(
        own,
        *SCORED,
        "--plugin",
        str(tmp_path / "none.py"),
        says="no plugin .*none.py; name a Python file with --plugin")
    def recall():
        found.append((own.out / "smoke" / "localization.csv").read_bytes())
        return {run.name for run in own.store.iterdir() if run.name != "locks"}
    code, out, err = own.call(*SCORED, "--plugin", str(plugin))
    assert code == 0, err
    runs = recall()
    (own.root / "plugins").mkdir(); shutil.copy(plugin, own.root / "plugins" / "same.py")
    settings = (own.root / "settings.ini").read_text("utf-8")
    (own.root / "settings.ini").write_text(
        settings.replace("[smoke]\n", '[smoke]\nplugins = ["plugins/same.py"]\n'), "utf-8")
    assert (
        own.call(*SCORED)[0] == 0 and recall() == runs
    ), "by the profile: the same content, the same runs"
    (own.root / "settings.ini").write_text(
        settings.replace("[smoke]\n", '[smoke]\nplugins = "plugins/same.py"\n'), "utf-8")
    refused(
        own,
        *SCORED,
        says=(
            r"settings.ini \[smoke\]: plugins must be a list of Python files, got 'plugins/same.py'"
        ))
    (own.root / "settings.ini").write_text(settings, "utf-8")
    own.env["UNLOC_PLUGINS"] = str(plugin)
    assert own.call(*SCORED)[0] == 0 and recall() == runs, "by the environment"
    assert ", 0 to do" in own.call("plan", *SCORED[1:])[1], "all is there"
    plugin.write_text(
        PLUGIN.replace("float(n_layers * d_ff)", "float(n_layers * d_ff)").replace(
            ").view", ").flip(0).view"),
        "utf-8")
    said = own.call("plan", *SCORED[1:])[1]
    assert "2 to do" in said and re.search(r"^  localize +2/2 .*  mine$", said, re.M), said
    assert (
        own.call(*SCORED)[0] == 0 and len(recall() - runs) == 2
    ), "an edited method gives other runs, and renames no other"
    assert found[0] == found[1] == found[2] != found[3]

def test_a_run_that_diverges_is_named_and_the_table_comes(tmp_path, guarded, command):
    own = Checkout(tmp_path, guarded)
    words = [
        "reproduce",
        "--profile",
        "smoke",
        "--only",
        "21_oracle_random",
        "--jobs",
        "2",
        "--set",
        "seeds=3",
        'unlearn={"wga": {"lr": 0.005, "epochs": 1}, "ga": {"lr": 1e30, "epochs": 1}}']
    code, out, err = own.call(*words)
    line = r"^  run \w{16} .unlearn, llama, ga, (Oracle|Random), [012]. diverged: "
    assert (code, err) == (0, ""), (out, err)
    assert len(re.findall(line, out, re.M)) == 6, out
    rows = json.loads((own.out / "smoke" / "table2_oracle_random.json").read_text("utf-8"))["rows"]
    assert [(row["objective"], row["verdict"] == "–") for row in rows] == [
        ("WGA", False), ("WGA", False), ("GA", True), ("GA", True)]


# --- a change that reaches into a parameter

def test_set_reaches_into_a_parameter_and_keeps_the_rest(capsys):
    from unloc import cli
    root = cli.project_root()
    plain = cli.order(root, "tiny", ["21_oracle_random"])
    changed = cli.order(root, "tiny", ["21_oracle_random"],
        changes={"unlearn.npo.beta": .2, "seeds": 4})
    [(page, before)], [(_, after)] = plain.chosen.items(), changed.chosen.items()
    assert after["unlearn"]["npo"] == before["unlearn"]["npo"] | {"beta": .2}
    assert {k: v for k, v in after["unlearn"].items() if k != "npo"} == {
        k: v for k, v in before["unlearn"].items() if k != "npo"}
    assert after["seeds"] == 4

@pytest.mark.parametrize("change, says", [
    ("unlearn.nop.beta=0.2", "no entry 'nop'; known: wga, npo, dpo, rmu"),
    ("seeds.first=1", "nothing to reach into before 'first'"),
    ("unlern.npo.beta=1", "unknown parameter in --set 'unlern.npo.beta'"),
])
def test_a_change_that_reaches_nowhere_is_one_line(change, says, capsys):
    from unloc import cli
    assert cli.main(["plan", "--profile", "tiny", "--only", "21", "--set", change]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
