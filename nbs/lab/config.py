"""What `make lab` sets. JupyterLab opens at the index with the checkout as its root, shows the
results that pages store, and writes into a page what is content, so that git stays clean."""
import json, os, platform, subprocess, sys
from pathlib import Path

from ipykernel.kernelspec import get_kernel_dict
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parents[2]

def in_git(path): # relative to the checkout
    command = ["git", "ls-files", "--error-unmatch", "--", f":(top,literal){path}"]
    try: return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    except OSError: return False # there is no git

# --- saving

def keep_results(page, stored): # page: as JupyterLab has it; stored: as its file has it
    "Give a result page the outputs of its file, which `make pages` takes from figures/"
    results = {cell["id"]: cell.get("outputs", []) for cell in stored["cells"]}
    for cell in page["cells"]:
        if "outputs" in cell: cell["outputs"] = results.get(cell["id"], [])

def drop_empty(page):
    "Drop the output that a bar of progress leaves behind, with nothing in it"
    for cell in page["cells"]:
        if "outputs" not in cell: continue
        cell["outputs"] = [one for one in cell["outputs"] if one.get("data", True)]

def is_result(page):
    return any("parameters" in cell["metadata"].get("tags", []) for cell in page["cells"])

def clean(model, path, **_):
    "Take from a page that git holds its counts, times and whatever names this machine's Python"
    if model["type"] != "notebook" or not in_git(path): return
    page = model["content"]
    # 'trusted' is what JupyterLab says of a cell, and is not written
    clean_nb(page, allowed_cell_metadata_keys=["tags", "trusted"])
    drop_empty(page)
    try: stored = json.loads((ROOT / path).read_text("utf-8"))
    except (OSError, ValueError): return # the file was deleted, or is torn
    page["metadata"] = stored["metadata"]
    if is_result(page): keep_results(page, stored)

# --- opening

def name_kernel(page):
    "Name the kernel as it names itself: else a page that is opened would count as changed"
    for part, key, value in (
            ("kernelspec", "display_name", get_kernel_dict()["display_name"]),
            ("language_info", "version", platform.python_version())):
        if part in page.metadata: page.metadata[part][key] = value

class Pages(AsyncLargeFileManager):
    "Show the results of pages that git holds or the command executed, and clean what is saved"
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.register_pre_save_hook(clean)

    def mark_trusted_cells(self, nb, path=""):
        if not (path.startswith("_out/") or in_git(path)):
            return super().mark_trusted_cells(nb, path)
        self.notary.mark_cells(nb, True) # an SVG of a cell without trust would not be drawn
        name_kernel(nb)

# kernels inherit it: tqdm misses ipywidgets, which nothing here needs
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

c = get_config() # noqa: F821, JupyterLab defines it
c.ServerApp.root_dir = str(ROOT)
c.ServerApp.contents_manager_class = Pages
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"
c.LabApp.app_settings_dir = str(Path(__file__).with_name("settings"))
# neither the tabs and settings of other projects, nor a question to another machine
c.LabApp.user_settings_dir = str(Path(sys.prefix, "lab-settings"))
c.LabApp.workspaces_dir = str(Path(sys.prefix, "lab-workspaces"))
c.LabApp.extension_manager = "readonly"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
