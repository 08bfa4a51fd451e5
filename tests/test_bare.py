"`unloc run` does runs where neither notebooks, figures nor the paper could be made."
import json, subprocess, sys
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
