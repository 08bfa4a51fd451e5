"""The site is built offline from the notebooks and their stored results, and its pages work in a
browser: without errors, dead links or anything from another machine, also on a narrow screen."""
import ast, functools, html, http.server, json, re, resource, shutil, subprocess, sys, threading
from pathlib import Path
from urllib.parse import unquote, urljoin
import pytest

from unloc.profiles import profiles

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
    pytest.importorskip(name, reason=f"the site needs {name}; 'make site' installs it")

NOTEBOOKS = {
    p.relative_to(NBS).with_suffix("").as_posix(): p
    for p in [*NBS.glob("*.ipynb"), *NBS.glob("[a-z]*/*.ipynb")]}
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SECONDS = 180 # of a processor, for the whole build

def markdown(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]

@pytest.fixture(scope="session")
def built(tmp_path_factory, guarded): # guarded: an attempt to leave the machine is an error
    "Build the site"
    folder = tmp_path_factory.mktemp("site") / "pages"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, NBS / "site" / "build.py", folder],
        env=guarded, capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder, done.stderr, spent

@pytest.fixture(scope="session")
def site(built): return built[0]

@pytest.fixture(scope="session")
def pages(site): # name: text
    found = {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in site.rglob("*.html")}
    return {name: text for name, text in found.items() if not name.startswith("_")}

# --- what is built

def test_the_site_is_built_without_a_warning_in_three_minutes(built):
    _, said, spent = built
    assert "WARNING" not in said and "ERROR" not in said, said
    assert spent < SECONDS

def test_nothing_but_the_site_is_left_behind(site):
    assert [p.name for p in site.parent.iterdir()] == [site.name]

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_is_a_page_to_read_and_to_download(site, pages, name):
    title = re.search(r"^# (.+)", markdown(NOTEBOOKS[name])[0], re.M)[1]
    text = pages[f"{name}.html"]
    heading = re.search(r"<h1>(.*?)<a class=\"headerlink\"", text, re.S)[1]
    assert html.unescape(re.sub(r"<[^>]+>", "", heading)) == title.replace("`", "")
    place, = re.findall(rf'href="([^"]*_downloads/[^"]*/{NOTEBOOKS[name].name})"', text)
    file = site / unquote(urljoin(f"{name}.html", place))
    assert file.read_bytes() == NOTEBOOKS[name].read_bytes()

def command(pages, name): # that a page shows at its top
    shown = re.search(r'class="page-tools.*?<pre>(.*?)</pre>', pages[f"{name}.html"], re.S)[1]
    return html.unescape(re.sub(r"<[^>]+>", "", shown)).strip()

def has_code(name): return '"cell_type": "code"' in NOTEBOOKS[name].read_text("utf-8")

@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if has_code(name)])
def test_every_page_says_how_to_reproduce_it(pages, name):
    program, *words = command(pages, name).split()
    if not re.match(r"[2-9]\d_", name):
        assert (program, words) == (".venv/bin/nbdev-test", [f"nbs/{name}.ipynb"])
        return
    profile = words.pop(2)
    assert [program, *words] == [".venv/bin/unloc", "reproduce", "--profile", "--only", name]
    assert name in profiles(ROOT)[profile]["notebooks"]

def test_the_command_of_a_page_works(pages, nbdev):
    program, *words = command(pages, "methods/weight_norm").split()
    program = nbdev.with_name(Path(program).name)
    done = subprocess.run([program, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr

def ids(text): return set(re.findall(r'\bid="([^"]+)"', text))

def test_every_link_and_image_resolves(site, pages):
    anchors = {name: ids(text) for name, text in pages.items()}
    dead = []
    for name, text in pages.items():
        for link in set(re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            link = unquote(html.unescape(link))
            if re.match(r"(https?|mailto|data):", link): continue
            place, _, anchor = urljoin(name, link).partition("#")
            place = place.partition("?")[0] or name
            if place.endswith("/"): place += "index.html"
            known = anchors.get(place)
            if not (site / place).is_file() or (anchor and known is not None
                    and anchor not in known | {"top"}): dead.append(f"{name}: {link}")
    assert dead == []

def test_nothing_is_loaded_from_another_machine(site, pages):
    loaded = {
        (name, tag) for name, text in pages.items()
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text)
        if re.search(r'(?:src|href)="(?:https?:)?//', tag)}
    assert loaded == set()
    styles = {p.name: re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+",
        p.read_text("utf-8")) for p in site.rglob("*.css")}
    assert styles and not any(styles.values()), styles

PUBLIC = sorted((ROOT / "unloc").rglob("*.py"))

@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_reference_has_every_public_name(pages, path):
    tree = ast.parse(path.read_text("utf-8"))
    names = [x.value for x in tree.body if isinstance(x, ast.Assign)
        and ast.unparse(x.targets[0]) == "__all__"]
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    if not names or not (page := pages.get(f"api/{module}.html")): return
    module = module.removesuffix(".__init__")
    missing = {f"{module}.{name}" for name in ast.literal_eval(names[0])} - ids(page)
    assert missing == set()

def test_the_reference_puts_comments_next_to_parameters(pages):
    text = re.sub(r"<[^>]+>", "", pages["api/unloc.regions.html"])
    text = " ".join(html.unescape(text).split())
    sample = text[text.index("static sample"):]
    assert re.search(r"outside \(Region \| None\) – members to avoid", sample)
    assert "number of value vectors or weights" in text
    changed = pages["api/unloc.change.html"]
    assert {"unloc.change.Change.at", "unloc.change.Change.load"} <= ids(changed)

def test_every_figure_and_table_of_pages_20_to_31_is_shown(pages):
    saved, tiny = ROOT / "figures" / "tofu-20", ROOT / "figures" / "tiny"
    def linked(folder, name): return f"{folder.name}/{name}.json" in pages["gallery.html"]
    def names(folder): return {p.stem for p in folder.glob("*.json")} - {"machine"}
    assert names(saved) and [name for name in names(saved) if not linked(saved, name)] == []
    only = names(tiny) - names(saved) # a demonstration is shown where there is nothing else
    assert only and [name for name in only if not linked(tiny, name)] == []
    table = json.loads((saved / "table2_oracle_random.json").read_text("utf-8"))
    # as Markdown, or as the page itself stores it
    cells = re.findall(r"<td>(?:<p>)?(.*?)(?:</p>)?</td>", pages["21_oracle_random.html"])
    shown = {html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in cells}
    assert {value for row in table["rows"] for value in row.values()} <= shown

# --- in a browser

@pytest.fixture(scope="session")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    driver = pytest.importorskip("playwright.sync_api", reason="'make site' installs playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program: pytest.skip("no Chromium: install Debian's package chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with driver.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=program, headless=True, args=flags, viewport=LAPTOP)
        context.set_default_timeout(60_000)
        yield context
        context.close()

@pytest.fixture
def tab(browser, served): # a page of the browser, what it complained about, and what it asked for
    page, errors = browser.new_page(), []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda r: None if "ABORTED" in r.failure else errors.append(
        f"{r.failure}: {r.url}")) # a page that is left stops loading its icon
    page.on("request", lambda r: None if r.url.startswith((served, "data:")) else errors.append(
        f"another machine: {r.url}"))
    yield page, errors
    page.close()

STATE = """() => ({
    wide: Math.max(...['html', '.page', '.main', '.content'].map(
        name => document.querySelector(name)).map(e => e ? e.scrollWidth - e.clientWidth : 0)),
    blank: [...document.images].filter(i => !i.naturalWidth).map(i => i.src)})"""

def test_every_page_is_whole_on_a_phone(tab, served, pages):
    page, errors = tab
    page.set_viewport_size(PHONE)
    bad = {}
    for name in pages:
        errors.clear()
        page.goto(f"{served}/{name}")
        state = page.evaluate(STATE)
        if errors or state["blank"] or state["wide"] > 0: bad[name] = [*errors, state]
    assert bad == {}

def test_search_finds_a_method(tab, served):
    page, errors = tab
    page.goto(f"{served}/search.html?q=WAGLE")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any("methods/wagle.html" in link for link in found) and errors == []
    page.goto(f"{served}/search.html?q=xyzzyplugh")
    page.wait_for_function("document.querySelector('#search-results p')?.textContent.length > 9")
    assert page.query_selector("#search-results li a") is None

WIDE = """box => {
    box.scrollLeft = 120;
    return [box.scrollWidth > box.clientWidth, box.scrollLeft, box.clientWidth]}"""

def test_a_wide_table_scrolls_in_its_box(tab, served):
    page, _ = tab
    page.set_viewport_size(PHONE)
    page.goto(f"{served}/21_oracle_random.html")
    wide, left, shown = page.eval_on_selector("[style*='overflow-x']", WIDE)
    assert wide and left == 120 and 200 < shown <= PHONE["width"]
    assert page.evaluate(STATE)["wide"] == 0

FORMULAS = r"\$\$[^$]+\$\$|(?<!\\)\$[^$\n]+\$"
SHAPES = """all => all.map(m => [m.getBoundingClientRect().width > 0, m.textContent])"""
STACKED = """all => all.map(f => f.children[1].getBoundingClientRect().top >=
    f.children[0].getBoundingClientRect().bottom - 1)"""

def formulas(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", "\n\n".join(markdown(path)), flags=re.S)
    return re.findall(FORMULAS, text)

@pytest.mark.parametrize("name", [n for n, p in NOTEBOOKS.items() if formulas(p)])
def test_formulas_are_drawn_without_a_script(tab, served, name):
    page, errors = tab
    page.goto(f"{served}/{name}.html")
    shapes = page.eval_on_selector_all("math", SHAPES)
    assert len(shapes) == len(formulas(NOTEBOOKS[name])) and all(wide for wide, _ in shapes)
    assert not any(re.search(r"[$\\]", text) for _, text in shapes)
    assert all(page.eval_on_selector_all("mfrac", STACKED))
    assert page.query_selector("script[src*=athjax]") is None and errors == []

def test_some_formulas_have_fractions(tab, served):
    page, _ = tab
    page.goto(f"{served}/08_metrics.html")
    assert len(page.query_selector_all("mfrac")) > 0

LIGHT = """element => {
    const [r, g, b] = getComputedStyle(element).backgroundColor.match(/[\\d.]+/g).map(Number);
    return (r + g + b) / 765}"""

def test_a_page_is_dark_where_the_reader_wants_it(tab, served):
    page, _ = tab
    found = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{served}/index.html")
        found[scheme] = [page.eval_on_selector(x, LIGHT) for x in ("body", "article img")]
    assert found["light"][0] > .9 and found["dark"][0] < .2
    assert found["dark"][1] > .9, "figures are drawn on white"
