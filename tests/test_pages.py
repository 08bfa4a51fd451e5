"The notebooks stay pages that one can read: prose before code, short exported cells, outputs without paths, times or warnings; and the package is what they export."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERY = sorted((ROOT / "nbs").glob("*.ipynb"))
PAGES = [p for p in EVERY if p.stem[:2] < "20"]
FIGURES = [p for p in EVERY if "20" <= p.stem[:2] <= "99"]
def each(paths): return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])

def read(path): return json.loads(path.read_text("utf-8"))
def cells(path): return [(c["cell_type"], "".join(c["source"]), c) for c in read(path)["cells"]]
def exported(source): return re.match(r"#\|\s*(export|exporti|exports)\b", source) is not None
def body(source): return [line for line in source.split("\n") if line.strip() and not line.startswith("#|")]


def test_there_are_pages_of_both_kinds(): assert len(PAGES) >= 14 and len(FIGURES) >= 4

@each(EVERY)
def test_every_notebook_names_its_kernel(path):
    metadata = read(path)["metadata"]
    assert metadata["kernelspec"] == {"display_name": "python3", "language": "python", "name": "python3"} and not {"widgets", "papermill"} & set(metadata)
    ids = [c["id"] for _, _, c in cells(path)]
    assert len(set(ids)) == len(ids) and all(set(c["metadata"]) <= {"tags"} and c.get("execution_count") is None for *_, c in cells(path)), "run nbdev-clean"

@each(EVERY)
def test_a_page_opens_with_its_promise(path):
    kind, text, _ = cells(path)[0]
    lines = [line for line in text.split("\n") if line]
    assert kind == "markdown" and re.fullmatch(r"# \S.*", lines[0]) and re.fullmatch(r"> \S.*", lines[1]) and not "".join(lines[2:3]).startswith(">")
    assert sum(bool(re.match(r"# \S", line)) for k, s, _ in cells(path) if k == "markdown" for line in s.split("\n") if "#| export" not in s) == 1, "one title"

# --- module pages

@each(PAGES)
def test_a_module_page_exports_its_module(path):
    code = [s for k, s, _ in cells(path) if k == "code"]
    names = [m[1] for s in code if (m := re.search(r"^#\|\s*default_exp (\w+)", s, re.M))]
    assert names == [path.stem[3:]] and code[0].startswith("#| default_exp")
    convention = [s for k, s, _ in cells(path) if k == "markdown" and s.startswith("#| export")]
    assert len(convention) == 1 and len(convention[0].split()) > 15, "one exported markdown cell states the convention"
    module = ast.parse((ROOT / "unloc" / f"{path.stem[3:]}.py").read_text("utf-8"))
    assert convention[0].split("\n")[1] in ast.get_docstring(module)

@each(PAGES)
def test_exported_cells_are_short_and_stand_in_a_section_with_prose(path):
    section, prose = None, ""
    for kind, source, _ in cells(path):
        if kind == "markdown" and not source.startswith("#| export"):
            if heading := re.match(r"#{2,} (.+)", source): section, prose = heading[1], source[heading.end():]
            else: prose += source
        if kind == "code" and exported(source):
            lines = body(source)
            assert len(lines) <= 40, f"{len(lines)} lines exported at once under {section!r}"
            if all(re.match(r"(import|from)\s|    |\)", line) for line in lines): assert section is None; continue
            assert section and len(prose.split()) >= 8, f"no prose before the exported cell under {section!r}: {lines[0]}"

@each(PAGES)
def test_directives_are_first_and_known(path):
    for kind, source, _ in cells(path):
        if "#|" not in source: continue
        found = re.findall(r"^(#\|.*)$", source, re.M)
        assert source.startswith("#|") and all(re.fullmatch(r"#\|\s*(default_exp \w+|exporti?|hide)", line) for line in found), found
        if kind == "code" and exported(source): assert "fastcore" not in source

@each(PAGES)
def test_a_page_teaches_by_asserting(path):
    lessons = [s for k, s, _ in cells(path) if k == "code" and not s.startswith("#|")]
    assert any(re.search(r"\b(test_\w+|assert)\b", s) for s in lessons) and any("expect_fail" in s or "Problem" in s or "test_eq(main" in s for s in lessons), "success and failure"

def test_chapters_import_only_chapters_before_them():
    place = {p.stem[3:]: p.stem for p in PAGES}
    for page in PAGES:
        for node in ast.walk(ast.parse((ROOT / "unloc" / f"{page.stem[3:]}.py").read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("unloc")): continue
            names = [node.module.removeprefix("unloc.")] if node.module not in (None, "unloc") else [a.name for a in node.names]
            for name in names: assert name not in place or place[name] < page.stem, f"{page.stem} imports {name}"

# --- figure pages

@each(FIGURES)
def test_a_figure_page_has_one_cell_of_literal_parameters(path):
    tagged = [s for k, s, c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and not any("#|" in s for _, s, _ in cells(path)), "papermill runs every cell: no nbdev directive"
    assert next(s for k, s, _ in cells(path) if k == "code") == tagged[0]
    for line, node in zip(tagged[0].split("\n"), ast.parse(tagged[0]).body, strict=True):
        assert isinstance(node, ast.AnnAssign) and node.annotation.id in ("str", "int", "float", "bool", "list", "dict"), line
        value = ast.literal_eval(node.value)
        assert type(value).__name__ == node.annotation.id, f"a literal of its type: {line}"

@each(FIGURES)
def test_a_figure_page_has_prose_and_saves_what_it_shows(path):
    found = cells(path)
    assert sum(len(s.split()) for k, s, _ in found if k == "markdown") > 60
    assert re.search(r"save_(figure|table)\(\w+, out, '\w+'", "".join(s for k, s, _ in found if k == "code"))

# --- what is stored

def texts(path):
    for _, _, cell in cells(path):
        for out in cell.get("outputs", []):
            yield out["output_type"], "".join(out.get("text", "")) + "".join("".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/") or k == "image/svg+xml")

@each(EVERY)
def test_stored_outputs_hold_nothing_of_one_machine(path):
    for kind, text in texts(path):
        assert kind != "error" and "Traceback" not in text and not re.search(r"warn", text, re.I), text
        assert not re.search(r"(?<![\w.)])/(\w[\w.-]*/)+\w|[A-Z]:\\|site-packages|\.ipynb_check", re.sub(r"https?://\S+|xmlns\S*|<[^>]*>", "", text)), text
        assert not re.search(r"\d+%\||it/s|s/it|\r|█|\b\d+:\d\d\b|0x[0-9a-f]{8,}|\d\d\d\d-\d\d-\d\dT", text), text

# --- the package

@pytest.fixture(scope="module")
def fresh(tmp_path_factory, nbdev):
    copy = tmp_path_factory.mktemp("export")
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy / "unloc").mkdir()
    shutil.copy(ROOT / "unloc" / "__init__.py", copy / "unloc")
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=copy, check=True, capture_output=True, timeout=1200)
    return copy

def test_the_package_is_what_the_notebooks_export(fresh):
    made, kept = ({f.name: f.read_bytes() for f in (root / "unloc").glob("*.py")} for root in (fresh, ROOT))
    assert set(made) == set(kept), "run make export"
    assert [name for name in made if made[name] != kept[name]] == [], "run make export"
    assert {p.name: p.read_bytes() for p in (fresh / "nbs").glob("*.ipynb")} == {p.name: p.read_bytes() for p in EVERY}, "export edits no notebook"

def test_cleaning_the_notebooks_changes_nothing(fresh):
    subprocess.run([Path(sys.executable).with_name("nbdev-clean")], cwd=fresh, check=True, capture_output=True, timeout=1200)
    assert [p.name for p in EVERY if p.read_bytes() != (fresh / "nbs" / p.name).read_bytes()] == []
