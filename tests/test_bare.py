"`unloc run` does runs where neither notebooks, figures nor the paper could be made."
import json, subprocess, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import sys
AWAY = {"matplotlib", "seaborn", "papermill", "nbclient", "IPython", "ipykernel",
    "jupyter_client", "typst", "nbdev"}
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in AWAY: raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Away())
from unloc.cli import main
sys.exit(main(sys.argv[1:]))
"""

def bare(*words):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *words], cwd=ROOT, capture_output=True, encoding="utf-8")

def test_runs_need_no_notebook_figure_or_paper_library(tmp_path):
    words = "--profile", "smoke", "--only", "21_oracle_random", "--jobs", "1"
    done = bare("run", *words, "--store", str(tmp_path))
    assert done.returncode == 0, done.stderr
    folders = list(tmp_path.glob("*/description.json"))
    kinds = {json.loads(f.read_text("utf-8"))["description"]["kind"] for f in folders}
    assert kinds == {"base", "judge", "inject", "unlearn"} and len(folders) == 17

def test_the_libraries_are_really_away(tmp_path):
    done = bare(
        "reproduce", "--profile", "smoke", "--only", "21_oracle_random", "--store",
        str(tmp_path / "s"), "--out", str(tmp_path / "o"))
    assert done.returncode == 1 and "No module named 'papermill'" in done.stderr

def test_a_page_that_measures_needs_matplotlib_alone(tmp_path):
    done = bare("run", "--profile", "smoke", "--only", "40_cost", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "40_cost draws what it measures: No module named 'matplotlib'" in done.stderr
    away = WITHOUT.replace('"matplotlib", "seaborn", ', "")
    done = subprocess.run(
        [sys.executable, "-c", away, "run", "--profile", "smoke", "--only", "40_cost", "--out",
            str(tmp_path)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "smoke").iterdir()} >= {"cost.csv", "cost.svg"}

# --- a visit to a GPU machine, rehearsed on a CPU: small, and with the runs of a base in one pass

SMALL = {
    "data": {"name": "world", "n_authors": 4, "n_forget": 1, "n_holdout": 1},
    "model": {"d_model": 48, "n_layers": 2, "d_ff": 160, "n_heads": 2, "vocab_size": 400},
    "device": "cpu", "precision": "float32",
    "pretrain": {"epochs": 1, "lr": .004, "batch_size": 128},
    "retain": {"epochs": 4, "lr": .004, "batch_size": 16},
    "evaluate": {"retain": 8, "utility": 2, "max_new_tokens": 4, "full_every": 2},
    "inject": {
        "fraction": .1, "epochs": 6, "lr": .01, "batch_size": 8, "style": "mixed"},
    "unlearn": {name: {"lr": .005, "epochs": 2, "batch_size": 8} for name in ("npo", "wga")},
    "localizers": ["activations"],
    "attack": {
        "level": .95, "lr": .0002, "region_lr": .002, "epochs": 1, "batch_size": 8, "taught": 5},
    "base_seeds": 3, "injections": 1, "tuning_base": 3, "rate_factors": [.5, 1],
    "relearning_rates": [.0002]}

def test_a_visit_to_a_gpu_machine_rehearsed(tmp_path, command):
    there, back, archive = tmp_path / "there", tmp_path / "back", tmp_path / "runs.zip"
    smaller = [f"{name}={json.dumps(value)}" for name, value in SMALL.items()]
    words = "--profile", "study", "--jobs", "2", "--set", *smaller
    done = bare("run", "--at-once", "16", "--store", str(there), *words)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(f.read_text("utf-8")) for f in there.glob("*/description.json")]
    shared = [run.get("at_once", 1) for run in runs if run["description"]["kind"] == "unlearn"]
    counts = Counter(shared)
    assert counts == {8: 40, 4: 12}, "of each base the pairs, and the localized runs, share passes"
    for step in (("pack", there, "--to", archive), ("unpack", archive, "--store", back)):
        done = bare(*map(str, step))
        assert done.returncode == 0, done.stderr
    found = {f.name for f in back.iterdir() if (f / "manifest.json").exists()}
    stamps = {name: (back / name / "manifest.json").stat().st_mtime_ns for name in found}
    assert len(found) == len(runs)
    done = subprocess.run(
        [command, "reproduce", "--store", back, "--out", tmp_path / "figures", *words], cwd=ROOT,
        capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    after = {f.name for f in back.iterdir() if (f / "manifest.json").exists()}
    assert after == found, "nothing was computed at home"
    assert stamps == {name: (back / name / "manifest.json").stat().st_mtime_ns for name in found}
    assert (tmp_path / "figures" / "study" / "study_forest.svg").exists()

def test_the_command_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "unloc.cli", "plan", "--profile", "tinny"],
        cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "unknown profile 'tinny'" in done.stderr
    done = bare("run", "--profile", "smoke", "--at-once", "0")
    assert done.returncode == 1 and done.stderr == (
        "unloc: --at-once must be a whole number from 1 to 1024, got 0\n")
