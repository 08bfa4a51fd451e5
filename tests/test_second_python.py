"""The package works in another environment than the one it is developed in: used through
PYTHONPATH, not installed, with other versions and without the libraries of notebooks and paper.
UNLOC_SECOND_PYTHON names that environment's interpreter; UNLOC_SECOND_TESTS, words, the test files
that it runs (such as "masked training")."""
import os, subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SECOND = os.environ.get("UNLOC_SECOND_PYTHON")
# what depends most on versions, and on being installed
CHOSEN = os.environ.get(
    "UNLOC_SECOND_TESTS", "checkpoints runs masked training devices pages").split()

pytestmark = pytest.mark.skipif(not SECOND, reason="UNLOC_SECOND_PYTHON names no other interpreter")

def called(*words):
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "UNLOC_SECOND"))
    } | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [SECOND, *words], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr

def test_the_package_is_that_of_this_checkout_and_imports_no_notebook():
    code = (
        "import sys, unloc, unloc.cli, unloc.steps, unloc.study, unloc.plan; print(unloc.__file__,"
        " [m for m in ('papermill', 'nbclient', 'IPython', 'typst', 'nbdev') if m in sys.modules])")
    assert called("-c", code) == (0, f"{ROOT / 'unloc' / '__init__.py'} []\n")

@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_a_test_file_passes_there(name):
    code, said = called(
        "-m", "pytest", f"tests/test_{name}.py", "-q", "-x", "-p", "no:cacheprovider")
    assert code == 0 and " passed" in said, said[-3000:]
