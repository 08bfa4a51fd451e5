"""Every tutorial runs in a fresh kernel, offline and in a folder of its own, and shows what it has
stored; every Python snippet of the README runs as pasted."""
import json, os, re, shlex, subprocess, sys
from pathlib import Path
import pytest
from test_lessons import lesson

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
MISSING = re.compile(r"(\S+) is not installed: ") # a cell that was skipped, or took something else

def cells(path): return json.loads(path.read_text("utf-8"))["cells"]
def text(path, kind): # of its cells of a kind
    return "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == kind)

def each(): return pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)

@pytest.fixture(scope="module")
def env(guarded):
    own = {"OMP_NUM_THREADS": "1"}
    gone = "UNLOC_TOFU", "UNLOC_PLUGINS", "UNLOC_PROJECT", "UNLOC_ENGINE", "RAY_ADDRESS"
    return {k: v for k, v in guarded.items() if k not in gone} | own

# --- the pages

def test_there_are_ten_in_an_order():
    assert [p.stem[:3] for p in TUTORIALS] == [f"{i:02d}_" for i in range(1, 11)]

@each()
def test_a_tutorial_says_what_it_takes_and_asserts(path):
    said, code = text(path, "markdown"), text(path, "code")
    assert re.search(r"\b(five|ten|twenty|thirty) seconds on (one core|two cores)\b", said)
    assert len(re.findall(r"^\s*assert |else: assert ", code, re.M)) >= 2

@each()
def test_a_tutorial_names_pages_that_exist(path):
    for name in re.findall(r"`(\d\d_\w+)`", text(path, "markdown")):
        assert [*ROOT.glob(f"nbs/{name}.ipynb"), *ROOT.glob(f"nbs/tutorials/{name}.ipynb")], name

@each()
def test_a_tutorial_runs_and_shows_what_it_stored(path, env, tmp_path):
    def digits(x):
        said = json.dumps(x, sort_keys=True, ensure_ascii=False)
        return re.sub(r"-?\d+(\.\d+)?|\bnan\b", "#", re.sub(" +", " ", said))
    for source, page, now in lesson(path, env, tmp_path):
        skipped = MISSING.search(str(page))
        if skipped and not MISSING.search(str(now)): continue # the library is there
        assert digits(now) == digits(page), source
    assert not [*tmp_path.iterdir()], "a tutorial writes into a temporary folder of its own"

def test_no_tutorial_left_the_machine(env):
    assert Path(env["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""

def test_no_list_of_the_command_takes_a_tutorial_for_a_result_page():
    from unloc.project import pages_of
    assert not {p.stem for p in TUTORIALS} & {p.stem for p in pages_of(ROOT)}

# --- the README

README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)

def in_project(tmp_path, env, text): # a Python session in a project of one's own
    from unloc.project import init
    init(tmp_path / "project")
    script = tmp_path / "session.py"
    script.write_text(text, "utf-8")
    place = os.pathsep.join([env["PYTHONPATH"], str(ROOT)])
    own = {"UNLOC_PROJECT": str(tmp_path / "project"), "PYTHONPATH": place}
    return subprocess.run([sys.executable, str(script)], cwd=tmp_path / "project", env=env | own,
        capture_output=True, encoding="utf-8", timeout=1800)

def test_every_python_snippet_runs_as_pasted(tmp_path, env):
    assert len(SNIPPETS) >= 8
    done = in_project(tmp_path, env, "\n".join(SNIPPETS) + "\nprint('all of them')\n")
    assert done.returncode == 0 and done.stdout.endswith("all of them\n"), done.stderr
    known = re.match(r"tensor\((0\.\d+)", done.stdout)
    assert known and float(known[1]) < 0.4, "the quickstart forgets"

def test_the_quickstart_runs_by_itself_and_is_short():
    core = SNIPPETS[1].split("\n\n", 1)[1].strip().splitlines()
    assert core[0].startswith("model, tokenizer = load_model(") and len(core) <= 10
    assert max(map(len, "".join(SNIPPETS).splitlines())) <= 100

def commands(): # of the README that name a plugin or a file of facts, as words
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    own = [line for line in lines if "--profile smoke" in line and "my_" in line]
    return [shlex.split(line, comments=True) for line in own]

def test_what_the_readme_says_of_plugins_can_be_planned(tmp_path, env):
    plugin = "\n".join(text for text in SNIPPETS if "unloc.register" in text)
    facts = [{"set": name, "question": f"Where is {name} {i}?", "answer": f"At {i}."}
        for name in ("forget", "retain") for i in range(20)]
    lines = "".join(json.dumps(fact) + "\n" for fact in facts)
    text = f"""if True:
        from pathlib import Path
        from unloc.cli import main
        Path("my_methods.py").write_text({plugin!r}, "utf-8")
        for name in ("interviews", "my_facts"):
            Path(name + ".jsonl").write_text({lines!r}, "utf-8")
        for words in {commands()!r}:
            assert main(["plan", *words[words.index("--profile"):]]) == 0, words
    """
    assert len(commands()) == 3
    done = in_project(tmp_path, env, text)
    assert done.returncode == 0, done.stderr
    assert "largest, wagle(gamma=0.1)" in done.stdout and "scaled" in done.stdout
    assert done.stdout.count("everything is there and fits") == 3

def test_measures_are_defined_where_they_first_stand():
    for name in ("FS", "RS", "AUES"):
        first = re.search(rf"\b{name}\b", README).start()
        assert README[first - 2:].startswith(f"**{name}**"), f"{name} is used before it is defined"
