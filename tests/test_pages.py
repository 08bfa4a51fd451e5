"""The notebooks stay pages that one can read: prose before code, short exported cells, outputs
without paths, times or warnings; and the package is what they export."""
import ast, graphlib, json, re, shutil, subprocess, sys
from itertools import chain
from pathlib import Path
import pytest

from unloc.cli import artefacts

ROOT = Path(__file__).resolve().parents[1]
EVERY = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs").glob("[a-z]*/*.ipynb"))
TUTORIALS = [p for p in EVERY if p.parent.name == "tutorials"] # tests/test_tutorials.py runs them
MODULES = [p for p in EVERY if p not in TUTORIALS]
PAGES = [p for p in MODULES if p.stem[:2] < "20" or p.parent.name != "nbs"]
FIGURES = [p for p in MODULES if "20" <= p.stem[:2] <= "99"]
def name(path): # of a page or a test: 02_models, steps/base, tests/test_pages
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("nbs/")
def each(paths): return pytest.mark.parametrize("path", paths, ids=map(name, paths))
def module(
    path
): # of a page: a chapter's, or one of a folder, whose page of its own name is the folder's
    if path.parent.name == "nbs": return path.stem[3:]
    return f"{path.parent.name}.{'__init__' if path.stem == path.parent.name else path.stem}"
def source(path):
    return (ROOT / "unloc" / f"{module(path).replace('.', '/')}.py").read_text("utf-8")
METHODS = sorted((ROOT / "nbs" / "methods").glob("*.ipynb"))
SHARED_BY_METHODS = "streaming", "level" # rooms of what several methods take

def read(path): return json.loads(path.read_text("utf-8"))
def cells(path): return [(c["cell_type"], "".join(c["source"]), c) for c in read(path)["cells"]]
def exported(source): return re.match(r"#\|\s*(export|exporti|exports)\b", source) is not None
def body(source):
    return [line for line in source.split("\n") if line.strip() and not line.startswith("#|")]


def test_there_are_pages_of_both_kinds():
    assert len(PAGES) >= 14 and len(METHODS) >= 10 and len(FIGURES) >= 4

@each(EVERY)
def test_every_notebook_names_its_kernel(path):
    metadata = read(path)["metadata"]
    assert metadata["kernelspec"] == {
        "display_name": "python3",
        "language": "python",
        "name": "python3"}
    assert not {"widgets", "papermill"} & set(metadata)
    ids = [c["id"] for _, _, c in cells(path)]
    assert len(set(ids)) == len(ids) and all(
        set(c["metadata"]) <= {"tags"} and c.get("execution_count") is None for *_, c in cells(path)
    ), "run nbdev-clean"

@each(EVERY)
def test_a_page_opens_with_its_promise(path):
    kind, text, _ = cells(path)[0]
    lines = [line for line in text.split("\n") if line]
    assert kind == "markdown"
    assert re.fullmatch(r"# \S.*", lines[0])
    assert re.fullmatch(r"> \S.*", lines[1])
    assert not "".join(lines[2:3]).startswith(">")
    assert (
        sum(
            bool(re.match(r"# \S", line))
            for k, s, _ in cells(path)
            if k == "markdown"
            for line in s.split("\n")
            if "#| export" not in s
        )
        == 1), "one title"

# --- module pages

@each(PAGES)
def test_a_module_page_exports_its_module(path):
    code = [s for k, s, _ in cells(path) if k == "code"]
    names = [m[1] for s in code if (m := re.search(r"^#\|\s*default_exp ([\w.]+)", s, re.M))]
    assert names == [module(path)] and code[0].startswith("#| default_exp")
    convention = [s for k, s, _ in cells(path) if k == "markdown" and s.startswith("#| export")]
    assert (
        len(convention) == 1 and len(convention[0].split()) > 15
    ), "one exported markdown cell states the convention"
    assert convention[0].split("\n")[1] in ast.get_docstring(ast.parse(source(path)))

@each(PAGES)
def test_exported_cells_are_short_and_stand_in_a_section_with_prose(path):
    section, prose = None, ""
    for kind, source, _ in cells(path):
        if kind == "markdown" and not source.startswith("#| export"):
            if heading := re.match(r"#{2,} (.+)", source):
                section, prose = heading[1], source[heading.end():]
            else: prose += source
        if kind == "code" and exported(source):
            lines = body(source)
            assert len(lines) <= 40, f"{len(lines)} lines exported at once under {section!r}"
            if all(re.match(r"(import|from)\s|    |\)", line) for line in lines):
                assert section is None
                continue
            assert (
                section and len(prose.split()) >= 8
            ), f"no prose before the exported cell under {section!r}: {lines[0]}"

@each(PAGES)
def test_directives_are_first_and_known(path):
    for kind, source, _ in cells(path):
        if "#|" not in source: continue
        found = re.findall(r"^(#\|.*)$", source, re.M)
        assert source.startswith("#|") and all(
            re.fullmatch(r"#\|\s*(default_exp [\w.]+|exporti?|hide)", line) for line in found
        ), found
        if kind == "code" and exported(source): assert "fastcore" not in source

@each(PAGES)
def test_a_page_teaches_by_asserting(path):
    lessons = [s for k, s, _ in cells(path) if k == "code" and not s.startswith("#|")]
    assert any(re.search(r"\b(test_\w+|assert)\b", s) for s in lessons) and any(
        "expect_fail" in s or "Problem" in s or "test_eq(main" in s for s in lessons
    ), "success and failure"

def imports(path): # modules of the package that a page imports
    home = f"unloc.{module(path)}".split(".")
    for node in ast.walk(ast.parse(source(path))):
        if not isinstance(node, ast.ImportFrom) or not (
            node.level or (node.module or "").startswith("unloc")):
            continue
        place = (
            ".".join(
                [
                    *(home[:-node.level] if node.level else []),
                    *([node.module] if node.module else [])])
            .removeprefix("unloc")
            .removeprefix("."))
        for alias in node.names:
            yield from (name for name in (place, f"{place}.{alias.name}".removeprefix(".")) if name)

FLOOR = "15" # of the folders: their pages come after the chapters below it, and before those above

def test_chapters_import_only_chapters_before_them():
    place = {
        module(p).removesuffix(".__init__"): p.stem if p.parent.name == "nbs" else FLOOR
        for p in PAGES}
    for page in PAGES:
        own = module(page).removesuffix(".__init__")
        for name in imports(page):
            if name not in place or name == own or FLOOR == place[own] == place[name]: continue
            assert place[name] < place[own], f"{own} imports {name}"

def test_the_index_lists_every_chapter_once_by_subject():
    index = (ROOT / "nbs" / "index.ipynb").read_text("utf-8")
    table = index[index.index("| subject | chapters |"):index.index("To test [a method]")]
    named = re.findall(r"\]\((\w+)\.ipynb\)", table)
    assert sorted(named) == sorted(p.stem for p in PAGES if p.parent.name == "nbs")

def test_pages_of_a_folder_import_each_other_without_a_circle():
    folder = {
        module(p): {n for n in imports(p)}
        for p in PAGES
        if p.parent.name != "nbs" and p.stem != p.parent.name}
    graphlib.TopologicalSorter(
        {name: found & folder.keys() for name, found in folder.items()}).prepare()

@each(METHODS)
def test_a_method_imports_chapters_and_no_other_method(path):
    known = {module(p) for p in PAGES}
    for name in imports(path):
        if name in known and "." in name:
            assert name.removeprefix("methods.") in SHARED_BY_METHODS, f"{path.stem} imports {name}"

@each(METHODS)
def test_a_method_fits_on_its_page(path):
    code = [body(s) for k, s, _ in cells(path) if k == "code" and exported(s)]
    lines = [line for cell in code for line in cell if not re.match(r"(import|from)\s", cell[0])]
    assert len(lines) <= 60, f"{len(lines)} exported lines"

# --- width

WIDTH = 100

def sources(path): # the code of a page, and so of its module, or of a file
    if path.suffix == ".py": return [path.read_text("utf-8")]
    return [source for kind, source, _ in cells(path) if kind == "code"]

def wide(path):
    lines = chain.from_iterable(source.split("\n") for source in sources(path))
    return [line for line in lines if len(line) > WIDTH]

def too_long(path): # exported cells of more than 40 lines as black writes them, blank ones aside
    black = pytest.importorskip("black")
    found = []
    for source in sources(path):
        if path.suffix == ".py" or not exported(source): continue
        text = black.format_str("\n".join(body(source)), mode=black.Mode(line_length=WIDTH))
        n = len(body(text))
        if n > 40: found.append(f"{n} lines: {body(source)[0]}")
    return found

BESIDE = [*ROOT.glob("nbs/site/*.py"), *ROOT.glob("nbs/lab/*.py")] # what no notebook exports
TESTS = sorted((ROOT / "tests").glob("**/*.py")) + sorted(BESIDE)

@each([*EVERY, *TESTS])
def test_code_is_narrow_and_cells_are_short_once_reflowed(path):
    assert (wide(path) or too_long(path)) == []

# --- tutorials

@each(TUTORIALS)
def test_a_tutorial_exports_nothing_and_hides_only_what_prepares_it(path):
    found = [re.findall(r"^(#\|.*)$", s, re.M) for k, s, _ in cells(path) if k == "code"]
    assert {line for lines in found for line in lines} <= {"#| hide"}
    assert not (ROOT / "unloc" / "tutorials").exists()

# --- figure pages

@each(FIGURES)
def test_a_figure_page_has_one_cell_of_literal_parameters(path):
    tagged = [s for k, s, c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and not any(
        "#|" in s for _, s, _ in cells(path)
    ), "papermill runs every cell: no nbdev directive"
    assert next(s for k, s, _ in cells(path) if k == "code") == tagged[0]
    lines, taken = tagged[0].split("\n"), []
    for node in ast.parse(tagged[0]).body: # a value may span lines
        line = lines[node.lineno - 1]
        assert isinstance(node, ast.AnnAssign) and node.annotation.id in (
            "str", "int", "float", "bool", "list", "dict"), line
        value = ast.literal_eval(node.value)
        assert type(value).__name__ == node.annotation.id, f"a literal of its type: {line}"
        taken += range(node.lineno, node.end_lineno + 1)
    assert taken == [*range(1, len(lines) + 1)], "a line holds one parameter, and nothing else"

@each(FIGURES)
def test_a_figure_page_has_prose_and_saves_what_it_shows(path):
    found = cells(path)
    assert sum(len(s.split()) for k, s, _ in found if k == "markdown") > 60
    assert artefacts(path), "it saves a figure or a table"

RESULTS = [p for p in FIGURES if p.stem[:2] < "50"] # pages of results, before the findings

def statements(path): # lines of code, without blank ones and comments that stand alone
    lines = chain.from_iterable(source.split("\n") for source in sources(path))
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

@each(RESULTS)
def test_a_result_page_has_at_most_60_lines_of_code(path):
    n = len(statements(path))
    assert n <= 60, f"{n} lines: move what is general"

def test_there_are_result_pages(): assert len(RESULTS) >= 16

# --- what is stored

def texts(path):
    for _, _, cell in cells(path):
        for out in cell.get("outputs", []):
            yield out["output_type"], "".join(out.get("text", "")) + "".join(
                "".join(v)
                for k, v in out.get("data", {}).items()
                if k.startswith("text/") or k == "image/svg+xml")

@each(EVERY)
def test_stored_outputs_hold_nothing_of_one_machine(path):
    for kind, text in texts(path):
        assert (
            kind != "error" and "Traceback" not in text and not re.search(r"warn", text, re.I)
        ), text
        assert not re.search(
            r"(?<![\w.)])/(\w[\w.-]*/)+\w|[A-Z]:\\|site-packages|\.ipynb_check",
            re.sub(r"https?://\S+|xmlns\S*|<[^>]*>", "", text)), text
        assert not re.search(
            r"\d+%\||it/s|s/it|\r|█|\b\d+:\d\d\b|0x[0-9a-f]{8,}|\d\d\d\d-\d\d-\d\dT", text), text

# --- the package

@pytest.fixture(scope="module")
def fresh(tmp_path_factory, nbdev):
    copy = tmp_path_factory.mktemp("export")
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy / "unloc").mkdir()
    shutil.copy(ROOT / "unloc" / "__init__.py", copy / "unloc")
    subprocess.run(
        [Path(sys.executable).with_name("nbdev-export")],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=1200)
    return copy

def test_the_package_is_what_the_notebooks_export(fresh):
    made, kept = (
        {f.relative_to(root).as_posix(): f.read_bytes() for f in (root / "unloc").rglob("*.py")}
        for root in (fresh, ROOT))
    assert set(made) == set(kept), "run make export"
    assert [name for name in made if made[name] != kept[name]] == [], "run make export"
    assert {p.relative_to(fresh): p.read_bytes() for p in (fresh / "nbs").rglob("*.ipynb")} == {
        p.relative_to(ROOT): p.read_bytes() for p in EVERY}, "export edits no notebook"

def test_cleaning_the_notebooks_changes_nothing(fresh):
    subprocess.run(
        [Path(sys.executable).with_name("nbdev-clean")],
        cwd=fresh,
        check=True,
        capture_output=True,
        timeout=1200)
    assert [
        p.name for p in EVERY if p.read_bytes() != (fresh / p.relative_to(ROOT)).read_bytes()] == []
