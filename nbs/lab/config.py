"""What `make lab` sets: JupyterLab opens at the index, the checkout is its root, pages that git holds
show their stored results, and saving one leaves in its file what belongs to it."""
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

def kept_outputs(page, stored): # page: as it is saved; stored: as its file is
    "Give a result page the outputs of its file: `make pages` writes them, from figures/"
    results = {cell["id"]: cell["outputs"] for cell in stored["cells"] if "outputs" in cell}
    for cell in page["cells"]:
        if "outputs" in cell: cell["outputs"] = results.get(cell["id"], [])

def without_empty(page): # a bar of progress leaves an output with nothing in it
    for cell in page["cells"]:
        if "outputs" in cell: cell["outputs"] = [
            one for one in cell["outputs"] if one.get("data", True)]

def is_result(page):
    return any("parameters" in cell["metadata"].get("tags", []) for cell in page["cells"])

def cleaned(model, path, **_):
    "Write of a page that git holds what is content: no counts, no times, no other Python"
    if model["type"] != "notebook" or not in_git(path): return
    page, file = model["content"], ROOT / path
    # 'trusted' is Jupyter's, which takes it away before it writes
    clean_nb(page, allowed_cell_metadata_keys=["tags", "trusted"])
    without_empty(page)
    try: stored = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError): return # deleted or torn: there is nothing to go by
    page["metadata"] = stored["metadata"]
    if is_result(page): kept_outputs(page, stored)

def as_its_kernel(page): # or a page that is opened would count as changed
    for name, key, value in (
        ("kernelspec", "display_name", get_kernel_dict()["display_name"]),
        ("language_info", "version", platform.python_version())):
        if name in page.metadata: page.metadata[name][key] = value

class Pages(AsyncLargeFileManager):
    "Trust the results on pages that git holds, and on those that the command executed"
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.register_pre_save_hook(cleaned)

    def mark_trusted_cells(self, nb, path=""):
        as_its_kernel(nb)
        ours = path.startswith("_out/") or in_git(path)
        if ours: self.notary.mark_cells(nb, True)
        else: super().mark_trusted_cells(nb, path)

# tqdm asks for ipywidgets, which nothing here needs; kernels inherit this
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
c = get_config() # noqa: F821, Jupyter's
c.ServerApp.root_dir = str(ROOT)
c.ServerApp.contents_manager_class = Pages
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"
# nothing of a person's other projects, and no question to another machine
c.LabApp.app_settings_dir = str(Path(__file__).with_name("settings"))
c.LabApp.user_settings_dir = str(Path(sys.prefix, "lab-settings"))
c.LabApp.workspaces_dir = str(Path(sys.prefix, "lab-workspaces"))
c.LabApp.extension_manager = "readonly"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
