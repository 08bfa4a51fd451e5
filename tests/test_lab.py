"""`make lab` opens at the index with the checkout as its root and shows what pages store, and a
page that is saved there leaves git clean."""
import json, os, shlex, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("jupyterlab", reason="'make lab' installs JupyterLab")
pytest.importorskip("nbdev", reason="JupyterLab cleans pages by nbdev")
if not (shutil.which("git") and shutil.which("make")):
    pytest.skip("git and make are needed", allow_module_level=True)

SECONDS = 300 # a busy machine makes a test slow, not red
INDEX, RESULT, CHAPTER = "nbs/index.ipynb", "nbs/31_injection.ipynb", "nbs/08_metrics.ipynb"

def git(checkout, *words):
    done = subprocess.run(["git", "-C", checkout, *words], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout

@pytest.fixture(scope="session")
def checkout(tmp_path_factory): # the pages of this one, in a git of their own
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    skipped = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=skipped)
    for name in ("README.md", "Makefile", ".gitignore", ".gitattributes"):
        shutil.copy(ROOT / name, folder)
    (folder / "_out/tiny").mkdir(parents=True)
    shutil.copy(ROOT / RESULT, folder / "_out/tiny")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    return folder

def command(): # what `make lab` does at last, behind the program's name
    environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
    recipe = subprocess.run(["make", "-n", "--no-print-directory", "lab"], cwd=ROOT,
        env=environment, capture_output=True, encoding="utf-8").stdout
    program, first, *words = shlex.split(recipe.splitlines()[-1])
    assert (Path(program).name, first) == ("jupyter", "lab")
    return words

class Lab:
    "A server, and what one asks it"
    def __init__(self, url, token): self.url, self.token = url, token

    def ask(self, path, **body): # with a body: what is to be saved there
        request = urllib.request.Request(self.url + path, method="PUT" if body else "GET",
            data=json.dumps(body).encode() if body else None,
            headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.geturl(), answer.read()

    def answers(self):
        try: return bool(self.ask("api"))
        except OSError: return False

    def get(self, path): return json.loads(self.ask(f"api/contents/{path}")[1])
    def page(self, path): return self.get(path)["content"]
    def save(self, path, page):
        self.ask(f"api/contents/{path}", type="notebook", format="json", content=page)

@pytest.fixture(scope="session")
def lab(checkout, tmp_path_factory, guarded):
    own = tmp_path_factory.mktemp("jupyter")
    folders = {f"JUPYTER_{x}_DIR": str(own / x) for x in ("CONFIG", "DATA", "RUNTIME")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}/", "of-the-tests"
    words = [*command(), "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--LabApp.workspaces_dir={own}", f"--LabApp.user_settings_dir={own}"]
    with (own / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], cwd=checkout,
            env=guarded | folders, stdout=log, stderr=log)
    found, until = Lab(url, token), time.monotonic() + SECONDS
    try:
        while not found.answers():
            log = (own / "log").read_text("utf-8")
            assert process.poll() is None and time.monotonic() < until, log
            time.sleep(.2)
        yield found
        assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == "", "it left the machine"
        said = (own / "log").read_text("utf-8")
        assert "Pre-save hook" not in said and "UserWarning" not in said, said
    finally:
        process.terminate()
        process.wait(SECONDS)

# --- what it opens with

def test_it_opens_at_the_index(lab):
    assert lab.ask("")[0].partition("?")[0] == f"{lab.url}lab/tree/{INDEX}"

def test_its_root_is_the_checkout(lab):
    names = {one["name"] for one in lab.get("")["content"]}
    assert {"nbs", "_out", "README.md", "Makefile"} <= names

def trust(page): # of the cells that have outputs
    return [c["metadata"]["trusted"] for c in page["cells"] if c.get("outputs")]

def test_results_are_trusted_where_git_or_the_command_vouches_for_them(lab, checkout):
    assert all(trust(lab.page(RESULT))) and all(trust(lab.page("_out/tiny/31_injection.ipynb")))
    text = (checkout / RESULT).read_text("utf-8").replace("How the facts got in", "A stranger's")
    (checkout / "nbs/stranger.ipynb").write_text(text, "utf-8")
    assert not all(trust(lab.page("nbs/stranger.ipynb")))

# --- what it saves

def run(page, count=7): # a page as it is when all of its cells were run, elsewhere
    page["metadata"] |= {"kernelspec": {"name": "python3", "display_name": "Another"}}
    page["metadata"]["language_info"] = {"name": "python", "version": "3.99.0"}
    empty = {"output_type": "display_data", "data": {}, "metadata": {}}
    for cell in page["cells"]:
        cell["metadata"] |= {"scrolled": True, "execution": {"iopub.status.busy": "2026"}}
        if cell["cell_type"] != "code": continue
        cell["execution_count"] = count
        cell["outputs"].append(dict(empty))
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result": output["execution_count"] = count
    return page

def test_pages_that_were_run_and_saved_leave_git_clean(lab, checkout):
    paths = git(checkout, "ls-files", "*.ipynb").split()
    chosen = {INDEX, CHAPTER, "nbs/glossary.ipynb", "nbs/steps/base.ipynb", *paths[::12]}
    assert len(paths) > 150 and {p for p in chosen if p.startswith("nbs/methods/")}
    for path in chosen: lab.save(path, run(lab.page(path)))
    assert git(checkout, "diff") == ""

def test_a_result_page_keeps_the_results_of_its_profile(lab, checkout):
    page = run(lab.page(RESULT))
    smoke = {"output_type": "stream", "name": "stdout", "text": "only of smoke size"}
    for cell in page["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = [dict(smoke)]
    lab.save(RESULT, page)
    assert git(checkout, "diff") == ""
    lab.save("nbs/31_mine.ipynb", page) # under another name they are kept
    assert (checkout / "nbs/31_mine.ipynb").read_text("utf-8").count("only of smoke size") > 3

def test_an_edit_is_saved_and_is_all_that_differs(lab, checkout):
    page = run(lab.page(CHAPTER))
    code = next(cell for cell in page["cells"] if cell["cell_type"] == "code")
    code["source"] += "\n# a word more"
    code["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "and an output"}]
    lab.save(CHAPTER, page)
    lines = git(checkout, "diff", "-U0", CHAPTER).splitlines()
    git(checkout, "checkout", "--", CHAPTER)
    added = [line for line in lines if line[0] == "+" and line[:3] != "+++"]
    assert any("# a word more" in x for x in added) and any("and an output" in x for x in added)
    assert len(added) < 12 and not any('"metadata": {' == x[1:].strip() for x in added)

# --- in a browser

OPENED = """() => ({
    dirty: document.querySelectorAll('.lm-TabBar-tab.jp-mod-dirty').length,
    blank: [...document.querySelectorAll('.jp-Notebook img')].filter(i => !i.naturalWidth).length,
    drawn: document.querySelectorAll('.jp-OutputArea-output[data-mime-type^=image] img').length,
    asked: [...document.querySelectorAll('.Toastify__toast')].map(x => x.textContent)})"""
LIGHT = """() => {
    const color = getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor;
    return color.match(/[\\d.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 765}"""

def test_a_browser_shows_index_and_figure_by_day_and_by_night(lab, tmp_path):
    driver = pytest.importorskip("playwright.sync_api", reason="'make site' installs playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program: pytest.skip("no Chromium: install Debian's package chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-sync"]
    elsewhere = []
    with driver.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(tmp_path, timeout=SECONDS * 1000,
            executable_path=program, headless=True, args=flags, color_scheme="dark")
        context.set_default_timeout(SECONDS * 1000)
        page = context.new_page()
        page.on("request", lambda r: None if r.url.startswith((lab.url, "data:", "blob:", "ws"))
            else elsewhere.append(r.url))
        page.goto(f"{lab.url}?token={lab.token}")
        page.wait_for_selector(".jp-RenderedMarkdown h1:has-text('unloc')")
        page.wait_for_selector(".jp-Notebook img")
        assert page.evaluate(LIGHT) < .2
        page.emulate_media(color_scheme="light")
        page.wait_for_function(f"({LIGHT})() > .9")
        page.goto(f"{lab.url}lab/tree/{RESULT}")
        page.wait_for_selector(".jp-OutputArea-output[data-mime-type^=image] img")
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) [title*='Idle'], "
            "[data-status=idle]", state="attached")
        found = page.evaluate(OPENED)
        context.close()
    assert found["drawn"] == 1 and (found["blank"], found["dirty"], found["asked"]) == (0, 0, [])
    assert elsewhere == []
