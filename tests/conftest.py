"""Every test runs offline, on one thread, without a display; a socket to another machine is an
error in this process and, with GUARD on its path, in a subprocess."""
import importlib.util, os, sys
from pathlib import Path
from shutil import which
import pytest

# a busy machine makes a test slow, not red
os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "UNLOC_RAY_SECONDS": "600"}
GUARD = Path(__file__).parent / "guard"
_spec = importlib.util.spec_from_file_location("unloc_test_guard", GUARD / "sitecustomize.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))


@pytest.fixture(autouse=True)
def one_thread(): # never imports torch: a file that does not need it stays fast
    if torch := sys.modules.get("torch"): torch.set_num_threads(1)


@pytest.fixture(autouse=True)
# what a test leaves behind would meet the tests that this process runs next, in an order that
# changes from machine to machine
def nothing_left_behind():
    def found(): return {k: v for k, v in os.environ.items() if k.startswith("UNLOC_")}
    before, folder = found(), os.getcwd()
    yield
    left, stands = found(), os.getcwd()
    for name in left.keys() - before.keys(): del os.environ[name]
    os.environ.update(before)
    os.chdir(folder)
    assert (left, stands) == (before, folder), "the test changed the environment of the next ones"


@pytest.fixture(scope="session")
# environment of a subprocess whose attempts to leave the machine land in the file
# UNLOC_TEST_SOCKETS
def guarded(tmp_path_factory):
    attempts = tmp_path_factory.mktemp("guard") / "sockets.txt"
    attempts.touch()
    kept = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} # a kernel shows figures
    # where the package is not installed, its place is handed on
    path = [str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "UNLOC_TEST_SOCKETS": str(attempts)}


def beside(
    name
): # the path of a command of this interpreter's environment; a machine that only computes has none
    found = Path(sys.executable).with_name(name)
    if not which(found):
        pytest.skip(
            f"there is no {name} beside {Path(sys.executable).name}: the package is used through"
            " PYTHONPATH, without its notebooks' libraries")
    return found

@pytest.fixture(scope="session")
def command(): return beside("unloc")

@pytest.fixture(scope="session")
def nbdev(): return beside("nbdev-export")
