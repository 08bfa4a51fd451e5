"""What a package brings along: a wheel with types and metadata, and files that say how to cite it,
what changed and how to take part."""
import email, re, shutil, subprocess, sys, sysconfig, tomllib, zipfile
from pathlib import Path
import pytest
import unloc
from unloc.cli import main

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory, command): # command: skips where there is none
    "Build the wheel"
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "unloc", source / "unloc")
    (source / "nbs").mkdir()
    for page in (ROOT / "nbs").glob("[2-9][0-9]_*.ipynb"): shutil.copy(page, source / "nbs")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip("no wheel can be made beside this interpreter: it has no pip")
    alone = "--no-deps", "--no-index", "--no-build-isolation"
    done = subprocess.run([*pip, "wheel", ".", *alone, "--wheel-dir", "dist"], cwd=source,
        capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    made, = (source / "dist").glob("*.whl")
    return made

@pytest.fixture(scope="module")
def wheel(wheel_file): # name: content
    with zipfile.ZipFile(wheel_file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}

@pytest.fixture(scope="module")
def metadata(wheel):
    text, = (text for name, text in wheel.items() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(text)

def test_a_wheel_is_typed_and_holds_every_module(wheel):
    assert wheel["unloc/py.typed"] == b""
    modules = {f.relative_to(ROOT).as_posix() for f in (ROOT / "unloc").rglob("*.py")}
    assert modules <= wheel.keys()
    assert all(wheel[name] == (ROOT / name).read_bytes() for name in modules)
    pages = {page.name for page in (ROOT / "nbs").glob("[2-9][0-9]_*.ipynb")}
    assert {f"unloc/project/nbs/{page}" for page in pages} <= wheel.keys()

def test_a_wheel_says_what_it_is(metadata):
    assert metadata["Name"] == "unloc" and metadata["Version"] == unloc.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Author"]
    kinds = metadata.get_all("Classifier")
    assert "Typing :: Typed" in kinds and "Intended Audience :: Science/Research" in kinds
    assert {f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13)} <= {*kinds}
    assert not [kind for kind in kinds if kind.startswith("License ::")], "it has an expression"
    assert metadata.get_payload().startswith("# unloc")

def test_every_address_stands_in_the_readme_too(metadata):
    readme = (ROOT / "README.md").read_text("utf-8")
    urls = [line.partition(", ")[2] for line in metadata.get_all("Project-URL")]
    assert urls and all(url in readme for url in urls)

@pytest.mark.slow
def test_a_wheel_works_in_an_environment_of_its_own(wheel_file, tmp_path, guarded):
    "Nothing of the checkout is reached; libraries are those of this environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "own"], check=True)
    here = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    python = tmp_path / "own" / "bin" / "python"
    shelf = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, encoding="utf-8").stdout.strip()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel_file)],
        check=True)
    # behind its own; what these folders would add by .pth files, such as a checkout, is not read
    Path(shelf, "libraries.pth").write_text("\n".join({*here.values()}) + "\n", "utf-8")
    env = {k: v for k, v in guarded.items() if not k.startswith("UNLOC_P")}
    def call(*words, cwd=tmp_path):
        done = subprocess.run([tmp_path / "own" / "bin" / "unloc", *words], cwd=cwd, env=env,
            capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout
    where = subprocess.run([python, "-c", "import unloc; print(unloc.__file__)"], cwd=tmp_path,
        check=True, capture_output=True, encoding="utf-8", env=env).stdout
    assert where.startswith(str(tmp_path / "own"))
    assert call("--version") == f"unloc {unloc.__version__}\n"
    assert re.search(r"^  21_oracle_random +\S", call("list"), re.M)
    call("init", "mine")
    planned = call("plan", "--profile", "mine", cwd=tmp_path / "mine")
    assert "profile mine: " in planned and planned.endswith("everything is there and fits\n")

def citation():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))

def test_the_citation_is_of_this_version_and_names_the_paper():
    found = citation()
    assert found["cff-version"] == "1.2.0" and found["version"] == unloc.__version__
    assert {"message", "title", "authors"} <= found.keys()
    with open(ROOT / "pyproject.toml", "rb") as file: project = tomllib.load(file)["project"]
    assert found["license"] == project["license"]
    assert [one["name"] for one in found["authors"]] == [one["name"] for one in project["authors"]]
    paper, = found["references"]
    entry = (ROOT / "paper" / "references.bib").read_text("utf-8").split("@")[1]
    for one in paper["authors"]: assert f"{one['family-names']}, {one['given-names']}" in entry
    assert paper["title"] in entry.replace("{", "").replace("}", "") and str(paper["year"]) in entry
    assert paper["url"].rpartition("/")[2] in entry

def test_the_changelog_has_one_section_that_is_not_released():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (.+)$", text, re.M) == ["[Unreleased]"]
    assert re.findall(r"^### (.+)$", text, re.M) == ["Added", "Changed", "Fixed"]

@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_and_pages_that_are_named_exist(name, capsys):
    text = (ROOT / name).read_text("utf-8")
    for path in re.findall(r"`((?:nbs|unloc|tests|paper|figures)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links: assert (ROOT / link).exists(), link
    known = "reproduce|plan|run|list|pack|unpack|init|export|table"
    commands = set(re.findall(rf"\bunloc ({known})\b", text))
    for command in commands:
        with pytest.raises(SystemExit) as stopped: main([command, "--help"])
        assert stopped.value.code == 0 and "usage: unloc" in capsys.readouterr().out
