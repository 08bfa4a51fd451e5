"""Nothing of the machine enters a result or ends the command: not its system, its encoding, the
folder it stands in, its settings, kernels, fonts or network; and what is wrong with it is one
line."""
import ast, codecs, json, os, re, shutil, socket, subprocess, sys, threading, warnings
from pathlib import Path
import pytest
from unloc import cli, cluster, figures, identity, progress, runs, steps
from unloc.identity import page_digest, pages_behind
from unloc.project import in_checkout
from unloc.runs import Store, cores, libraries, machines, processor, sweep

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
UNLOC = str(Path(sys.executable).with_name("unloc"))
SMALL = [
    "--set",
    "ratios=[0.5]",
    "ratio_seeds=1",
    'data={"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}',
    'evaluate={"retain": 5, "utility": 2, "max_new_tokens": 4}']
ONE = ["reproduce", "--profile", "smoke", "--only", "injection_ratio", "--jobs", "1", *SMALL]

def files(root):
    return {
        f.relative_to(root).as_posix(): f.read_bytes()
        for f in sorted(Path(root).rglob("*"))
        if f.is_file() and "locks" not in f.parts}

class Project:
    "A copy of the notebooks and profiles, called with a changed environment"
    def __init__(self, folder, env):
        self.root, self.env = folder / "checkout", {
            k: v for k, v in env.items() if not k.startswith("UNLOC_") or k == "UNLOC_TEST_SOCKETS"}
        shutil.copytree(
            ROOT / "nbs",
            self.root / "nbs",
            ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.py"))
        shutil.copy(ROOT / "settings.ini", self.root)

    def call(self, *words, place=None, cwd=None, **env):
        put = ["--store", str(place / "store")] if place else []
        if place and words[0] == "reproduce": put += ["--out", str(place / "out")]
        done = subprocess.run(
            [UNLOC, *words, *put], cwd=cwd or self.root, env=self.env | env, capture_output=True,
            encoding="utf-8", errors="replace")
        return done.returncode, done.stdout, done.stderr

@pytest.fixture
def project(tmp_path, guarded, command): return Project(tmp_path, guarded)

@pytest.fixture(scope="module")
def usual(tmp_path_factory, guarded, command): # one figure, on this machine as it is
    folder = tmp_path_factory.mktemp("usual")
    status, out, err = Project(folder, guarded).call(*ONE, place=folder)
    assert status == 0, err
    return folder

def same_as(usual, place):
    assert files(place / "out") == files(usual / "out")
    assert {f.name for f in (place / "store").iterdir()} == {
        f.name for f in (usual / "store").iterdir()}
    runs_of = {
        name: content
        for name, content in files(usual / "store").items()
        if not name.startswith("locks")}
    assert {name: files(place / "store")[name] for name in runs_of} == runs_of

def one_line(found, says, status=1):
    code, out, err = found
    assert (
        code == status
        and err.startswith("unloc: ")
        and err.count("\n") == 1
        and "Traceback" not in out + err
        and re.search(says, err)), found

# --- other systems

LINUX = """
import os, sys
AWAY = (
    "sched_getaffinity", "sched_setaffinity", "sched_getscheduler", "posix_fadvise",
    "posix_fallocate", "memfd_create", "pidfd_open", "eventfd", "splice", "copy_file_range",
    "getrandom", "unshare", "setns")
for name in AWAY:
    if hasattr(os, name): delattr(os, name)
OURS = (os.sep + "unloc" + os.sep, "ipykernel_")
def ask(event, args):
    if event != "open" or not str(args[0]).startswith(("/proc", "/sys")): return
    caller = sys._getframe(1).f_code.co_filename
    if not any(mark in caller for mark in OURS): return
    raise FileNotFoundError(2, "this system has no such folder", args[0])
sys.addaudithook(ask)
"""

@pytest.fixture
def no_linux(tmp_path, guarded): # a variable that takes from every Python what Linux alone has
    (tmp_path / "bare").mkdir()
    guard = (Path(guarded["PYTHONPATH"].split(os.pathsep)[0]) / "sitecustomize.py").read_text(
        "utf-8")
    (tmp_path / "bare" / "sitecustomize.py").write_text(guard + LINUX, "utf-8")
    return {"PYTHONPATH": str(tmp_path / "bare")}

def test_the_command_works_without_what_linux_alone_has(project, no_linux, usual, tmp_path):
    probe = subprocess.run(
        [PYTHON, "-c", "import os; os.sched_getaffinity(0)"],
        env=project.env | no_linux,
        capture_output=True,
        encoding="utf-8")
    assert probe.returncode and "AttributeError" in probe.stderr, "it is taken away"
    assert project.call("list", **no_linux)[0] == 0
    for profile in ("smoke", "tiny"):
        status, out, err = project.call(
            "plan", "--profile", profile, "--only", "injection_ratio", place=tmp_path, **no_linux)
        assert (
            status == 0 and "everything is there and fits" in out and f"{cores()} at a time" in out
        ), (out, err)
    # as many jobs as there are cores
    status, out, err = project.call(*ONE[:-len(SMALL)-2], *SMALL, place=tmp_path, **no_linux)
    assert status == 0, err
    same_as(usual, tmp_path)

def test_cores_are_counted_within_the_limits_of_a_container(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert cores() == 1 and cli.order(ROOT, "smoke").jobs == 1

UNIX = {
    "os": (
        "sched_getaffinity sched_setaffinity killpg getpgid setsid setpgid fork forkpty getuid"
        " geteuid getgid getloadavg nice mkfifo mknod wait wait3 wait4 chown uname ttyname statvfs"
        " sysconf confstr getrusage".split()),
    "signal": (
        "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGCHLD alarm pause setitimer pthread_kill".split()
    ),
    "time": ["tzset", "clock_gettime", "pthread_getcpuclockid"],
    "socket": ["AF_UNIX"]}
MODULES = "fcntl resource pwd grp termios tty pty syslog posix".split()

def sources(): # every module and every page
    for path in sorted((ROOT / "unloc").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
    for path in sorted((ROOT / "nbs").glob("[2-9][0-9]_*.ipynb")):
        yield path.name, "\n".join(
            "".join(c["source"])
            for c in json.loads(path.read_text("utf-8"))["cells"]
            if c["cell_type"] == "code")

def unportable(source):
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr in UNIX.get(node.value.id, [])):
            yield f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES: yield node.module
        if isinstance(node, ast.keyword) and node.arg in ("preexec_fn", "start_new_session"):
            yield node.arg

def test_no_module_and_no_page_needs_one_system():
    assert {
        name: found for name, source in sources() if (found := sorted(set(unportable(source))))
    } == {}
    assert list(unportable("import fcntl, os\nos.killpg(1, 9)")) == [
        "fcntl",
        "os.killpg"], "the test sees them"

def test_a_worker_leaves_when_its_parent_is_gone_though_the_system_goes_on_naming_it(
    tmp_path
): # as Windows does
    code = """if True:
        import os, sys, time
        from unloc import runs
        parent = int(sys.argv[1])
        os.getppid = lambda: parent
        runs._leave_with(parent)
        print('there', flush=True)
        sys.stdin.read() # for as long as nobody ends it
    """
    parent = subprocess.Popen([PYTHON, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    worker = subprocess.Popen(
        [PYTHON, "-c", code, str(parent.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert worker.stdout.readline() == b"there\n" and worker.poll() is None
        parent.communicate()
        assert worker.wait() == 1
    finally:
        for process in (worker, parent): process.kill(); process.wait(); process.stdin.close()
        worker.stdout.close()

def test_names_in_a_manifest_are_those_of_every_system(tmp_path):
    def compute(description, parent, folder, progress):
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "rows.csv").write_text("1\n", "utf-8", newline="\n")
    run = Store(tmp_path).do({"kind": "a"}, compute)
    assert set(run.json("manifest.json")["files"]) == {"deep/er/rows.csv", "description.json"}
    assert not any(
        set(f.name) & set('<>:"\\|?*') for f in tmp_path.rglob("*")), "no sign that Windows forbids"

@pytest.mark.parametrize("name", ["a:b", "a/b", "a\\b", "..", "a*", "con?", ".hidden", ""])
def test_a_profile_that_cannot_be_a_folder_everywhere_is_refused(name, project):
    (project.root / "settings.ini").write_text(f"[{name}]\n" if name else "[ ]\n", "utf-8")
    one_line(
        project.call("plan", "--profile", name or " "),
        r"a profile|figures go to a folder|cannot be read|unknown profile")

@pytest.mark.parametrize("name", ["con", "NUL", "Com1", "aux.tiny", "a.", "tiny.."])
def test_a_profile_that_windows_cannot_have_as_a_folder_is_refused(name):
    with pytest.raises(
        cli.Problem, match=rf"settings.ini \[{re.escape(name)}\]: figures go to a folder"):
        cli._folder_name(name)

@pytest.mark.parametrize("name", ["größe", "llama3.1-8b", "a", "con-8b", "console", "多", "a b"])
def test_a_profile_may_have_a_name_of_any_language(name): cli._folder_name(name)

VALUES = {
    "a comment behind": (
        "seeds = 3 # three",
        "seeds is not JSON .*a comment takes a line of its own",
    ),
    "a comment behind a list": (
        "ratios = [0.5] ; half",
        "ratios is not JSON .*a comment takes a line of its own",
    ),
    "a name twice": (
        'evaluate = {"retain": 5, "retain": 6}',
        "evaluate is not JSON .the name 'retain' stands twice in it",
    ),
    "a name twice inside": (
        'unlearn = {"wga": {"lr": 1, "lr": 2}}',
        "the name 'lr' stands twice in it",
    ),
    "NaN": ("margin = NaN", "margin is not JSON .NaN is no finite number"),
    "infinity": ("ratios = [-Infinity]", "-Infinity is no finite number"),
    "too large": ('inject = {"lr": 1e999}', "1e999 is no finite number"),
    "no jobs": ("jobs = 0", r"settings.ini \[smoke\]: jobs must be at least 1, got 0"),
    "less than none": ("jobs = -3", r"settings.ini \[smoke\]: jobs must be at least 1, got -3"),
    "notebooks by number": ("notebooks = [21]", r"notebooks must be a list of names, got \[21\]"),
}

@pytest.mark.parametrize("line, says", VALUES.values(), ids=VALUES)
def test_a_value_of_a_profile_has_its_own_cause(line, says, tmp_path):
    (tmp_path / "nbs").mkdir()
    for notebook in cli.notebooks(ROOT): shutil.copy(notebook, tmp_path / "nbs")
    (tmp_path / "settings.ini").write_text(f"[smoke]\n{line}\n", "utf-8")
    with pytest.raises(cli.Problem, match=says): cli.order(tmp_path, "smoke")

INHERIT = {
    "itself": ('[a]\ninherits = "a"', "a from a"),
    "in a circle": (
        '[a]\ninherits = "b"\n[b]\ninherits = "c"\n[c]\ninherits = "a"',
        "a from b from c from a")}

@pytest.mark.parametrize("text, line", INHERIT.values(), ids=INHERIT)
def test_a_profile_that_inherits_from_itself_is_one_line(text, line, project):
    (project.root / "settings.ini").write_text(text + "\n", "utf-8")
    one_line(
        project.call("plan", "--profile", "a"),
        rf"settings.ini \[\w\]: a profile cannot inherit from itself \({line}\); let one of them"
        r" name all its values")

def test_a_percent_sign_and_an_umlaut_are_plain_text(tmp_path):
    (tmp_path / "settings.ini").write_text('[smoke]\nsource = "100 %/größe # 3"\n', "utf-8")
    assert cli.profiles(tmp_path)["smoke"] == {"source": "100 %/größe # 3"}

@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_store_that_is_a_file_is_named_by_a_plan(below, project, tmp_path):
    (tmp_path / "file").touch()
    one_line(
        project.call("plan", "--profile", "smoke", "--store", f"{tmp_path}/file{below}"),
        f"no runs can be kept in {tmp_path}/file{below}: {tmp_path}/file is a file; choose another"
        " folder with --store")

@pytest.mark.skipif(os.name != "posix", reason="removes the current folder as POSIX allows")
def test_a_current_folder_that_is_gone_is_named(project, tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD"; exec "$0" list', UNLOC],
        cwd=tmp_path / "gone",
        env=project.env,
        capture_output=True,
        encoding="utf-8")
    one_line(
        (done.returncode, done.stdout, done.stderr),
        "the current folder is gone; change to another one")

@pytest.mark.parametrize("given", ["many", "0", "-1"])
def test_a_number_of_cores_that_is_none_is_named(given, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", given)
    if given != "many": assert cores() >= 1; return
    with pytest.raises(
        ValueError, match="LOKY_MAX_CPU_COUNT must be a whole number of at least 1, got 'many'"):
        cores()

def test_executed_notebooks_have_a_place_where_the_checkout_is_read_only(tmp_path, monkeypatch):
    assert cli._copies(tmp_path, "smoke", tmp_path / "out") == tmp_path / "_out" / "smoke"
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != tmp_path)
    assert cli._copies(tmp_path, "smoke", tmp_path / "out") == tmp_path / "out" / "_out" / "smoke"
    assert cli._copies(tmp_path, "smoke", None) == tmp_path / "_out" / "smoke", "it says what to do"

# --- encodings and line ends

@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: codecs.BOM_UTF8 + b,
        lambda b: codecs.BOM_UTF8 + b.replace(b"\n", b"\r\n")],
    ids=["CRLF", "BOM", "both"])
def test_the_name_of_a_run_does_not_see_line_ends_or_marks(change, tmp_path, monkeypatch):
    pages = [f"steps.{kind}" for kind in steps.kinds()]
    before = {page: page_digest(page) for page in pages}
    for module in {name for page in pages for name in pages_behind(page)}:
        file = identity._file(module)
        copy = tmp_path / file.relative_to(identity._ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(change(file.read_bytes()))
    monkeypatch.setattr(identity, "_ROOT", tmp_path)
    assert {page: fresh(page) for page in pages} == before

def fresh(page): # as a process reads it that has read nothing
    identity._read.cache_clear()
    try: return page_digest.__wrapped__(page)
    finally: identity._read.cache_clear()

LOCALES = {
    "ASCII": {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}}

DIGESTS = """
import sys
from unloc.identity import page_digest
print(*(page_digest(page) for page in sys.argv[1:]))
"""
PYTHONS = [PYTHON, *(f"python3.{minor}" for minor in range(11, 16))]

def digests_of(python, folder, pages, env): # in a process of its own; digests need no library
    names = "UnsetType", "Meta"
    (folder / "msgspec.py").write_text("".join(f"class {x}: pass\n" for x in names), "utf-8")
    path = os.pathsep.join([str(ROOT), *([] if python == PYTHON else [str(folder)])])
    asked = subprocess.run([python, "-c", DIGESTS, *pages], env=env | {"PYTHONPATH": path},
        capture_output=True, encoding="utf-8")
    assert asked.returncode == 0, asked.stderr
    return asked.stdout.split()

@pytest.mark.parametrize("python", PYTHONS, ids=lambda name: Path(name).name)
def test_every_python_and_locale_gives_the_same_digests(python, tmp_path, guarded):
    there = shutil.which(python) and not subprocess.run([python, "-c", ""]).returncode
    if not there: pytest.skip(f"there is no {python}")
    pages = [f"steps.{kind}" for kind in steps.kinds()]
    wanted = [page_digest(page) for page in pages]
    for env in LOCALES.values(): assert digests_of(python, tmp_path, pages, guarded | env) == wanted

@pytest.mark.parametrize("locale", LOCALES)
def test_an_encoding_changes_no_byte_and_ends_no_command(locale, project, usual, tmp_path):
    status, out, err = project.call(*ONE, place=tmp_path, **LOCALES[locale])
    assert status == 0 and "Traceback" not in out + err, err
    same_as(usual, tmp_path)
    status, out, err = project.call("list", **LOCALES[locale])
    assert status == 0 and err == "" and "table2_oracle_random" in out

STRICT = r"""
import sys, warnings
OURS = r'unloc(\.|$)|__main__$'
warnings.filterwarnings('error', category=EncodingWarning, module=OURS)
"""

# the interpreter itself looks
def test_no_text_is_read_or_written_in_the_encoding_of_the_machine(project, usual, tmp_path):
    (tmp_path / "strict").mkdir()
    guard = (Path(project.env["PYTHONPATH"].split(os.pathsep)[0]) / "sitecustomize.py").read_text(
        "utf-8")
    (tmp_path / "strict" / "sitecustomize.py").write_text(STRICT + guard, "utf-8")
    strict = {"PYTHONPATH": str(tmp_path / "strict"), "PYTHONWARNDEFAULTENCODING": "1"}
    probe = subprocess.run(
        [PYTHON, "-c", "from pathlib import Path; Path('x').write_text('x')"],
        cwd=tmp_path,
        env=project.env | strict,
        capture_output=True,
        encoding="utf-8")
    assert "EncodingWarning" in probe.stderr, "the interpreter looks"
    status, out, err = project.call(*ONE, place=tmp_path, **strict)
    assert status == 0, err
    same_as(usual, tmp_path)
    status, out, err = project.call(
        "plan", "--profile", "smoke", "--only", "injection_ratio", place=tmp_path, **strict)
    assert status == 0, (out, err)

def unencoded(source): # calls that read or write text, and name no encoding
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {k.arg for k in node.keywords}
        if "encoding" in given: continue
        binary = any(
            isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value
            for a in node.args[1:2])
        if name == "read_text" and not node.args or name == "write_text" and len(node.args) < 2:
            yield node.lineno, name
        if name == "open" and (isinstance(node.func, ast.Name) or not node.args) and not binary:
            yield node.lineno, name
        if name in ("run", "Popen", "check_output") and given & {"text", "universal_newlines"}:
            yield node.lineno, name

def test_every_text_file_has_its_encoding_named():
    assert {name: found for name, source in sources() if (found := list(unencoded(source)))} == {}
    lessons = {
        p.name: "\n".join(
            "".join(c["source"])
            for c in json.loads(p.read_text("utf-8"))["cells"]
            if c["cell_type"] == "code")
        for p in sorted((ROOT / "nbs").glob("[01]*.ipynb"))}
    tests = {p.name: p.read_text("utf-8") for p in sorted((ROOT / "tests").rglob("*.py"))}
    assert {
        name: found
        for name, source in (lessons | tests).items()
        if (found := list(unencoded(source)))} == {}
    assert [
        name
        for _, name in unencoded(
            "open('x'); open('x', 'rb'); p.read_text(); p.read_text('utf-8'); p.write_text('x')")
    ] == ["open", "read_text", "write_text"], "the test sees them"

@pytest.mark.parametrize(
    "change",
    [
        lambda b: codecs.BOM_UTF8 + b,
        lambda b: b.replace(b"\n", b"\r\n"),
        lambda b: codecs.BOM_UTF8 + b.replace(b"\n", b"\r\n")],
    ids=["BOM", "CRLF", "both"])
def test_settings_may_come_from_any_editor(change, project):
    path = project.root / "settings.ini"
    whole, before = path.read_bytes(), cli.profiles(project.root)
    path.write_bytes(change(whole))
    assert cli.profiles(project.root) == before and len(before) > 5

def test_settings_in_another_encoding_are_named(project):
    (project.root / "settings.ini").write_bytes("[smoke]\nseeds = 3\n".encode("utf-16"))
    one_line(
        project.call("plan", "--profile", "smoke"),
        "settings.ini cannot be read: byte 0 is not UTF-8 .*save it as UTF-8")

def test_tables_have_the_line_ends_of_every_system(tmp_path, monkeypatch):
    import pandas
    monkeypatch.setattr(os, "linesep", "\r\n")
    data = pandas.DataFrame({"x": [1, 2]})
    assert b"\r" in data.to_csv(index=False).encode(), "pandas asks the system"
    figures.save_table([{"a": "1 ± 2"}], tmp_path, "t", data, {"caption": "One."})
    assert not any(b"\r" in content for content in files(tmp_path).values())
    assert (tmp_path / "t_data.csv").read_bytes() == b"x\n1\n2\n"

# --- the folder a kernel stands in

@pytest.mark.parametrize("where", ["root", "nbs", "elsewhere in it"])
def test_a_page_run_by_papermill_writes_into_its_checkout(where, project, tmp_path):
    (project.root / "notes" / "deep").mkdir(parents=True)
    cwd = {
        "root": project.root,
        "nbs": project.root / "nbs",
        "elsewhere in it": project.root / "notes" / "deep"}[where]
    page, copy = project.root / "nbs" / "20_injection_ratio.ipynb", tmp_path / "out.ipynb"
    words = [PYTHON, "-m", "papermill", str(page), str(copy)]
    for pair in SMALL[1:]:
        name, _, value = pair.partition("=")
        words += ["-y", "{%s: %s}" % (json.dumps(name), value)]
    done = subprocess.run(
        [*words, "--no-progress-bar"],
        cwd=cwd,
        env=project.env,
        capture_output=True,
        encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (project.root / "_out" / "smoke" / "injection_ratio.svg").exists()
    assert len(list((project.root / "_runs").iterdir())) > 2
    assert {f.name for f in tmp_path.iterdir()} == {"checkout", "out.ipynb"}, "nothing lies outside"

def test_a_path_of_a_page_counts_from_the_notebooks(tmp_path, monkeypatch):
    checkout = tmp_path / "mine"
    (checkout / "nbs").mkdir(parents=True); (checkout / "settings.ini").touch()
    for folder in (checkout, checkout / "nbs"):
        monkeypatch.chdir(folder)
        assert in_checkout("../_runs") == str(checkout / "_runs")
        assert in_checkout("x") == str(checkout / "nbs" / "x")
    monkeypatch.chdir(tmp_path) # outside: the checkout of the package
    assert in_checkout("../_runs") == str(ROOT / "_runs")
    assert in_checkout(tmp_path / "y") == str(tmp_path / "y")

def test_folders_count_from_where_a_person_stands(tmp_path, monkeypatch):
    (tmp_path / "tofu").mkdir(); (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = cli.order(
        ROOT,
        "tofu",
        ["oracle_random"],
        changes={
            "source": "tofu",
            "model": {"retained": "mine", "original": "some/hub-id", "template": "mine"}})
    given, = asked.chosen.values()
    assert given["source"] == str(tmp_path / "tofu")
    assert given["model"] == {
        "retained": str(tmp_path / "mine"),
        "original": "some/hub-id",
        "template": "mine"}
    monkeypatch.setenv("UNLOC_TOFU", "tofu")
    seen = []
    monkeypatch.setattr(cli, "show", lambda root: seen.append(os.environ["UNLOC_TOFU"]))
    cli.main(["list"])
    assert seen == [str(tmp_path / "tofu")] and os.environ["UNLOC_TOFU"] == "tofu"

# --- what a person has set up

RC = """backend: TkAgg
text.usetex: True
svg.fonttype: none
savefig.bbox: tight
savefig.pad_inches: 1
savefig.facecolor: red
savefig.transparent: True
mathtext.fontset: stix
axes.titleweight: bold
font.family: serif
pdf.fonttype: 42
pdf.compression: 0
lines.linewidth: 9
axes.formatter.use_locale: True
path.sketch: 1, 100, 2
date.autoformatter.day: %d
"""

def test_what_a_person_has_set_up_changes_no_byte(project, usual, tmp_path):
    home = tmp_path / "home"
    startup = home / "ipython" / "profile_default" / "startup"
    kernels = home / "jupyter" / "kernels" / "python3"
    for folder in (startup, kernels): folder.mkdir(parents=True)
    (home / "matplotlibrc").write_text(RC, "utf-8")
    (startup / "00.py").write_text("raise SystemExit('a start-up file was run')", "utf-8")
    (home / "startup.py").write_text("raise SystemExit('PYTHONSTARTUP was run')", "utf-8")
    (kernels / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [
                    str(tmp_path / "gone" / "python"), "-m", "ipykernel_launcher", "-f",
                    "{connection_file}"],
                "display_name": "python3",
                "language": "python"}),
        "utf-8")
    mine = {
        "MATPLOTLIBRC": str(home / "matplotlibrc"),
        "MPLBACKEND": "TkAgg",
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONSTARTUP": str(home / "startup.py"),
        "JUPYTER_PATH": str(home / "jupyter"),
        "HOME": str(tmp_path / "file"),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "OMP_NUM_THREADS": "2"}
    (tmp_path / "file").touch() # a home that is no folder
    status, out, err = project.call(*ONE, place=tmp_path, **mine)
    assert status == 0, err
    same_as(usual, tmp_path)

def test_the_kernel_of_another_environment_is_not_taken(project, usual, tmp_path):
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    # a Python without our packages
    other = [PYTHON, "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(
        json.dumps({"argv": other, "display_name": "python3", "language": "python"}), "utf-8")
    status, out, err = project.call(*ONE, place=tmp_path, JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert status == 0, err
    same_as(usual, tmp_path)

def test_a_figure_saved_among_others_leaves_their_settings(tmp_path):
    import matplotlib, pandas
    from matplotlib import colors
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    def draw(folder, rc):
        with matplotlib.rc_context(rc), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before, blue = dict(matplotlib.rcParams), colors.to_rgb("b")
            with figures.look():
                figure, axes = plt.subplots(figsize=(2, 2))
                axes.plot([1, 2], [3, 4], "b", label="$x_1$ µ")
                axes.set_title("a title")
                axes.legend()
            figures.save_figure(
                figure, folder, "f", pandas.DataFrame({"x": [1]}), {"caption": "One."})
            plt.close(figure)
            assert dict(matplotlib.rcParams) == before and colors.to_rgb("b") == blue
        return files(folder)
    plain = draw(tmp_path / "plain", {})
    given = {
        "savefig.bbox": "tight", "svg.fonttype": "none", "mathtext.fontset": "stix",
        "axes.titleweight": "bold", "font.size": 30, "text.usetex": True, "pdf.fonttype": 42,
        "svg.hashsalt": "x", "axes.facecolor": "red", "font.sans-serif": ["Arial"]}
    assert draw(tmp_path / "mine", given) == plain and b"<text" not in plain["f.svg"]

# --- another kind of processor

def test_processor_is_named_by_kind():
    assert re.fullmatch(r"(x86-64|arm64|\S+)( AVX2| AVX-512)?", processor())
    assert (
        not processor().startswith("x86-64")
        or "86" in __import__("platform").machine().lower()
        or "amd64" in __import__("platform").machine().lower())

@pytest.mark.parametrize(
    "machine, baseline, found, kind",
    [
        ("x86_64", ["X86_V2"], ["X86_V3", "X86_V4", "AVX512_ICL"], "x86-64 AVX-512"),
        ("AMD64", ["SSE", "SSE2"], ["AVX2", "FMA3"], "x86-64 AVX2"),
        ("x86_64", ["SSE2"], ["AVX2", "AVX512F", "AVX512_SKX"], "x86-64 AVX-512"),
        ("x86_64", ["X86_V2"], [], "x86-64"),
        ("aarch64", ["NEON"], ["ASIMDHP"], "arm64"),
        ("arm64", ["NEON"], ["ASIMDFHM"], "arm64"),
        ("ppc64le", [], [], "ppc64le")])
def test_kinds_of_processor(machine, baseline, found, kind, monkeypatch):
    import numpy, platform
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(
        numpy,
        "show_config",
        lambda mode: {"SIMD Extensions": {"baseline": baseline, "found": found}})
    assert processor() == kind

def compute(description, parent, folder, progress):
    (folder / "result.json").write_text(json.dumps({"n": description["n"]}), "utf-8")

def test_a_run_says_what_computed_it_outside_its_name(tmp_path, monkeypatch):
    one = {"kind": "a", "n": 1}
    here = Store(tmp_path / "here").do(one, compute)
    monkeypatch.setattr(runs, "processor", lambda: "arm64")
    there = Store(tmp_path / "there").do(one, compute)
    assert here.path.name == there.path.name
    assert (
        here.json("description.json")["machine"],
        there.json("description.json")["machine"]) == (processor(), "arm64")

@pytest.fixture
def two_kinds(tmp_path, monkeypatch): # a store with a run of another processor, and its grid
    monkeypatch.setattr(runs, "_met", set())
    store, grid = Store(tmp_path / "s"), [{"kind": "a", "n": n} for n in range(2)]
    monkeypatch.setattr(runs, "processor", lambda: "x86-64 AVX2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(store, grid[:1], compute=compute)
    assert machines() == ["x86-64 AVX2"]
    monkeypatch.setattr(runs, "processor", lambda: "arm64")
    return store, grid

SEVERAL = r"several kinds of machine or library versions \(arm64 with .*; x86-64 AVX2 with .*\)"

def test_runs_of_two_kinds_are_refused_before_anything_is_computed(two_kinds):
    store, grid = two_kinds
    before = files(store.root)
    says = f"^these runs come from {SEVERAL}.*; compute them anew in a store.*--set mixed=true$"
    for _ in range(2):
        with pytest.raises(ValueError, match=says): sweep(store, grid, compute=compute)
    assert files(store.root) == before and machines() == ["x86-64 AVX2"]

def test_runs_of_two_kinds_are_told_where_allowed_and_so_is_their_table(
    two_kinds, tmp_path, monkeypatch
):
    import pandas
    store, grid = two_kinds
    with pytest.warns(UserWarning, match=SEVERAL): sweep(store, grid, compute=compute, mixed=True)
    figures.save_table(
        [{"a": "1"}], tmp_path / "out", "t", pandas.DataFrame({"x": [1]}), {"caption": "One."})
    assert json.loads((tmp_path / "out" / "machine.json").read_text("utf-8")) == {
        "t": "arm64 and x86-64 AVX2"}
    monkeypatch.setenv("UNLOC_PROGRESS", str(tmp_path / "events"))
    sweep(store, grid, compute=compute, mixed=True)
    assert [
        progress._lines(json.loads(line), tmp_path)
        for line in (tmp_path / "events").read_text("utf-8").splitlines()
    ][-1][0].startswith("  note: these runs come from several kinds")

def test_a_store_of_another_kind_is_found_whole(two_kinds): # nothing of it is computed here
    store, grid = two_kinds
    def never(*_): pytest.fail("it is there")
    assert [run.json() for run in sweep(store, grid[:1], compute=never)] == [{"n": 0}]
    assert machines() == ["x86-64 AVX2"]

def test_runs_of_other_versions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_met", set())
    store, grid = Store(tmp_path / "s"), [{"kind": "a", "n": n} for n in range(2)]
    sweep(store, grid[:1], compute=compute)
    here = runs._versions()
    monkeypatch.setattr(runs, "_versions", lambda: here | {"torch": "0.1"})
    assert sweep(store, grid[:1], compute=compute)[0].json() == {"n": 0}, "it has its name still"
    says = (
        r"several kinds of machine or library versions \(.*torch 0.1, .*; .*torch"
        rf" {re.escape(here['torch'])}, ")
    with pytest.raises(ValueError, match=says): sweep(store, grid, compute=compute)
    with pytest.warns(UserWarning, match=says): sweep(store, grid, compute=compute, mixed=True)
    assert len(libraries()) == 2 and any("torch 0.1" in versions for versions in libraries())

def test_runs_of_another_device_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_met", set())
    store, grid = Store(tmp_path / "s"), [{"kind": "a", "n": n} for n in range(2)]
    with monkeypatch.context() as there: # as a machine with a GPU says it
        there.setattr(runs, "_computed_on", lambda description: f"{processor()} + H100")
        sweep(store, grid[:1], compute=compute)
    says = (
        rf"several kinds of machine or library versions \({processor()} \+ H100 with .*;"
        rf" {processor()} with ")
    with pytest.raises(ValueError, match=says) as error: sweep(store, grid, compute=compute)
    assert "\n" not in str(error.value) and grid[1] not in store

def test_a_run_on_one_of_another_kind_is_refused(two_kinds): # what it builds on counts
    store, grid = two_kinds
    with pytest.raises(ValueError, match=SEVERAL):
        sweep(store, [{"kind": "b", "n": 2, "parent": grid[0]}], compute=compute)

def test_machine_json_keeps_what_other_pages_wrote(tmp_path):
    import pandas
    (tmp_path / "machine.json").write_text('{"other": "arm64"}', "utf-8")
    figures.save_table(
        [{"a": "1"}], tmp_path, "t", pandas.DataFrame({"x": [1]}), {"caption": "One."})
    assert json.loads((tmp_path / "machine.json").read_text("utf-8")) == {
        "other": "arm64",
        "t": " and ".join(machines())}

def test_reproduce_says_where_stored_figures_come_from(project, usual, tmp_path):
    shutil.copytree(usual / "out", tmp_path / "out")
    shutil.copytree(usual / "store", tmp_path / "store")
    assert "another kind" not in project.call(*ONE, place=tmp_path)[1]
    path = tmp_path / "out" / "smoke" / "machine.json"
    path.write_text(
        json.dumps({"injection_ratio": "pdp11 AVX-1", "trajectories": "of no concern here"}),
        "utf-8")
    status, out, err = project.call(*ONE, place=tmp_path)
    lines = [line for line in out.splitlines() if "another kind of processor" in line]
    assert status == 0
    assert len(lines) == 1
    assert out.startswith(lines[0])
    assert f"(pdp11 AVX-1; this one is {processor()})" in lines[0]
    assert json.loads(path.read_text("utf-8"))["injection_ratio"] == processor()

def test_every_stored_figure_has_its_machine():
    for folder in (ROOT / "figures" / "tiny", ROOT / "figures" / "tofu-20"):
        known = json.loads((folder / "machine.json").read_text("utf-8"))
        assert set(known) == {f.stem for f in folder.glob("*.json")} - {"machine"}
        assert all(re.fullmatch(r"x86-64 AVX(2|-512)", kind) for kind in known.values())

# --- what is wrong with the machine is one line

def test_a_reader_that_has_heard_enough_is_no_error(project):
    for words in ("list", "plan --profile smoke --only injection_ratio"):
        process = subprocess.Popen(
            [UNLOC, *words.split()],
            cwd=project.root,
            env=project.env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        process.stdout.close() # before the first line
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait() == 1 and err == "", (words, err)

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_that_is_full_is_one_line(project):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [UNLOC, "list"], cwd=project.root, env=project.env, stdout=full, stderr=subprocess.PIPE)
    assert (
        done.returncode == 1
        and done.stderr.startswith(b"unloc: No space left on device")
        and done.stderr.count(b"\n") == 1), done.stderr

@pytest.mark.skipif(os.name != "posix", reason="closes streams as a POSIX shell does")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_ends_nothing(closed, project):
    done = subprocess.run(
        ["sh", "-c", f'"$0" list {closed}', UNLOC],
        cwd=project.root,
        env=project.env,
        capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr

DAMAGE = {
    "half": lambda text: text[:-99],
    "no JSON": lambda text: "<<<<<<< HEAD\n" + text,
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "other JSON": lambda text: '{"worksheets": []}',
    "no cells": lambda text: '{"cells": 3}',
    "odd cells": lambda text: '{"cells": [3]}',
    "BOM": lambda text: "\ufeff" + text}

@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("word", ["list", "plan", "reproduce"])
def test_a_damaged_notebook_is_named(word, how, project, tmp_path):
    path = project.root / "nbs" / "22_trajectories.ipynb"
    path.write_text(DAMAGE[how](path.read_text("utf-8")), "utf-8")
    one_line(
        project.call(
            word, *([] if word == "list" else ["--profile", "smoke", "--only", "injection_ratio"])),
        r"22_trajectories.ipynb is no whole notebook \(.*\); restore it with git checkout")

@pytest.mark.parametrize(
    "line, says",
    [
        ("x = 1", "AttributeError|'Assign'"),
        ("x: int = f()", "malformed"),
        ("x: Path = 1", "KeyError"),
        ("x: int = ", "SyntaxError"),
        ("print(1)", "AttributeError")])
def test_a_parameters_cell_that_cannot_be_read_is_named(line, says, project):
    path = project.root / "nbs" / "20_injection_ratio.ipynb"
    page = json.loads(path.read_text("utf-8"))
    next(c for c in page["cells"] if "parameters" in c["metadata"].get("tags", []))["source"] = [
        line]
    path.write_text(json.dumps(page), "utf-8")
    one_line(
        project.call("plan", "--profile", "smoke"),
        "20_injection_ratio.ipynb: a line of its parameters cell must be name: type ="
        f" literal.*({says})")

def test_a_page_without_a_promise_is_listed(project):
    (project.root / "nbs" / "50_mine.ipynb").write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "source": ["x: int = 1"],
                        "metadata": {"tags": ["parameters"]}}],
                "metadata": {},
                "nbformat": 4,
                "nbformat_minor": 5}),
        "utf-8")
    status, out, err = project.call("list")
    assert status == 0 and "50_mine" in out and err == ""

CELLS = {
    "a syntax error": ("for", r"SyntaxError: "),
    "no memory": (
        "raise MemoryError('no room')",
        r"MemoryError: no room; where memory ran out, --jobs 1 needs less"),
    "a full disk": (
        "raise OSError(28, 'No space left on device')",
        "No space left on device; free space.* and start again, finished runs are kept"),
    "a kernel that dies": (
        "import os; os._exit(1)",
        (
            r"DeadKernelError: Kernel died; where memory ran out, --jobs 1 needs less, and unloc"
            r" plan says how much \(messages: .*stderr.log\)")),
    "a kernel that exits": ("raise SystemExit(3)", "SystemExit: 3|failed")}

@pytest.mark.parametrize("what", CELLS)
def test_what_ends_a_notebook_is_one_line(what, project, tmp_path):
    code, says = CELLS[what]
    path = project.root / "nbs" / "20_injection_ratio.ipynb"
    page = json.loads(path.read_text("utf-8"))
    place = next(
        i for i, c in enumerate(page["cells"]) if "parameters" in c["metadata"].get("tags", []))
    page["cells"] = page["cells"][:place + 1] + [
        {
            "cell_type": "code", "id": "0badc0de", "source": [code], "metadata": {},
            "outputs": [], "execution_count": None}]
    path.write_text(json.dumps(page), "utf-8")
    status, out, err = project.call(*ONE, place=tmp_path)
    assert status == 1 and "Traceback" not in err, err
    line = rf"^unloc: .*20_injection_ratio.ipynb failed: .*({says}).*\n\Z"
    assert re.search(line, err, re.M), err

def test_folders_that_cannot_be_used_are_named(project, tmp_path):
    (tmp_path / "file").touch()
    for word in ("plan", "reproduce"):
        why = "No usable temporary directory found in [...]"
        code = (
            f"import sys, tempfile\ndef none(*_): raise FileNotFoundError(2, {why!r})\n"
            "tempfile._get_default_tempdir = none\n"
            "from unloc.cli import main\nsys.exit(main(sys.argv[1:]))")
        done = subprocess.run(
            [PYTHON, "-c", code, word, "--profile", "smoke", "--only", "injection_ratio"],
            cwd=project.root,
            env=project.env,
            capture_output=True,
            encoding="utf-8")
        one_line(
            (done.returncode, done.stdout, done.stderr),
            "there is no folder for temporary files: No usable temporary directory found in .*; "
            "let TMPDIR name one")
    settings = project.root / "settings.ini"
    settings.unlink(); settings.mkdir()
    one_line(
        project.call("plan"), "settings.ini cannot be read: .*(Is a directory|Permission denied)")

@pytest.mark.skipif(os.name != "posix", reason="limits files as POSIX does")
def test_a_full_temporary_folder_is_named(project, tmp_path):
    # as full: a file may not grow beyond some bytes
    (tmp_path / "tmp").mkdir()
    code = (
        "import resource, signal, sys\nfrom unloc.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(main(sys.argv[1:]))")
    done = subprocess.run(
        [PYTHON, "-c", code, "plan", "--profile", "smoke", "--only", "injection_ratio"],
        cwd=project.root,
        env=project.env | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        encoding="utf-8")
    one_line(
        (done.returncode, done.stdout, done.stderr),
        f"cannot write to {tmp_path}/tmp: File too large; free space or let TMPDIR name another"
        " folder")

def test_a_file_that_another_program_holds_is_named(tmp_path, monkeypatch):
    def held(*_):
        raise PermissionError(
            13, "The process cannot access the file because it is being used by another process")
    monkeypatch.setattr(os, "replace", held) # as on Windows
    (tmp_path / "f.svg").write_text("old", "utf-8")
    with pytest.raises(
        PermissionError,
        match=(
            rf"cannot write {tmp_path}/f.svg: The process cannot access .*; free space, or close"
            r" the program that has the file open")):
        figures.write_whole(tmp_path / "f.svg", "new")
    assert files(tmp_path) == {"f.svg": b"old"}

def test_facts_in_a_file_are_no_missing_folder(tmp_path, project):
    (tmp_path / "tofu.json").touch()
    status, out, err = project.call(
        "plan",
        "--profile",
        "tofu-20",
        "--only",
        "injection_ratio",
        UNLOC_TOFU=str(tmp_path / "tofu.json"))
    assert (
        status == 1
        and err == ""
        and f"! UNLOC_TOFU='{tmp_path}/tofu.json': a file; expected a folder" in out), (out, err)

def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def broken(*_): raise LookupError("something\nodd")
    monkeypatch.setattr(cli, "show", broken)
    assert cli.main(["list"]) == 1
    assert (
        capsys.readouterr().err
        == "unloc: LookupError: something odd (UNLOC_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("UNLOC_TRACEBACK", "1")
    with pytest.raises(LookupError): cli.main(["list"])

# --- the network

def test_a_hub_that_does_not_answer_is_asked_once(
    project, tmp_path
): # it takes calls and says nothing
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def take():
            while True:
                try: calls.append(server.accept()[0])
                except OSError: return
        threading.Thread(target=take, daemon=True).start()
        hub = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {
            "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HOME": str(tmp_path / "hf")}
        status, out, err = project.call("plan", "--profile", "tofu-20", **env)
        server.shutdown(socket.SHUT_RDWR)
    for call in calls: call.close()
    assert status == 1 and err.splitlines() == [
        f"asking {hub} for locuslab/TOFU",
        f"{hub} does not answer (ReadTimeout); only what lies on this machine is used"], (out, err)
    assert len(calls) == 1 and re.search(
        r"^! full.json: not fetched from the hub data set locuslab/TOFU .*\(for 20_injection_ratio,"
        r" .*31_injection\)$",
        out,
        re.M), (calls, out)

@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"UNLOC_TOFU": "there"}])
def test_a_hub_that_is_not_needed_is_not_asked(env, project):
    (project.root / "there").mkdir()
    status, out, err = project.call(
        "plan", "--profile", "tofu-20", "--only", "injection_ratio", **env)
    assert status == 1 and err == "" and "\n! " in out

def test_nobody_at_an_address_is_noticed_without_ray(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server: port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}") # closed by now
    monkeypatch.setattr(cluster, "_ask", lambda seconds: pytest.fail("Ray would try for minutes"))
    monkeypatch.setattr(cluster, "find_spec", lambda name: True)
    with pytest.raises(
        ConnectionError,
        match=(
            rf"no Ray cluster answers at RAY_ADDRESS='127.0.0.1:{port}': Connection refused;"
            r" start one")):
        cluster.cluster()

@pytest.mark.parametrize(
    "given, seconds",
    [(None, 60), ("5", 5), ("0.5", .5), ("0", None), ("-1", None), ("soon", None), ("nan", None)])
def test_patience_is_a_setting(given, seconds, monkeypatch):
    monkeypatch.delenv("UNLOC_RAY_SECONDS", raising=False)
    if given is not None: monkeypatch.setenv("UNLOC_RAY_SECONDS", given)
    if seconds is not None: assert cluster._patience() == seconds; return
    with pytest.raises(
        ValueError, match="UNLOC_RAY_SECONDS must be a positive number of seconds, got"):
        cluster._patience()

def test_no_socket_left_the_machine(usual, guarded):
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""
