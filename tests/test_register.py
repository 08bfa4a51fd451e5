"""A method is what its decorator and signature say; a bad one, and a bad plugin, is one line that
leaves nothing behind."""
import functools, json, os, subprocess, sys, textwrap
import pytest, torch
from unloc import identity, register
from unloc.identity import check_name, code_of
from unloc.register import (METHODS, find, label, localizer, methods, objective, registered_name,
    retain_term)
from unloc.runs import run_id
from unloc.steps.localize import localization
from unloc.steps.teach import teaching
from unloc.unlearning_run import Recipe, bound


@pytest.fixture(autouse=True)
def as_they_were(): # the registers, whatever a test does to them
    register.load()
    tables = [register._executed, *METHODS.values()]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)

def state(): # all that a plugin may leave behind
    modules = {name for name in sys.modules if name.startswith("unloc_plugin_")}
    return {kind: dict(held) for kind, held in METHODS.items()}, register.executed(), modules

def one_line(call, *says, kind=ValueError):
    with pytest.raises(kind) as error: call()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in says), text

@pytest.fixture
def plugged(tmp_path, monkeypatch): # files named by the variable, by name: text
    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), "utf-8")
        named = os.pathsep.join(str(tmp_path / f"{name}.py") for name in files)
        monkeypatch.setenv("UNLOC_PLUGINS", named)
    return write

# --- options

def test_options_are_read_from_the_signature():
    @localizer(label="Mine", unit="weights", source="here")
    def mine(model, forget, seed, power:float=1., kinds:list[str]|None=None, n:"int"=2):
        "Score nothing"
        return model, seed, power, kinds, n
    found = find("localizer", "mine")
    assert {name: default for name, (_, default) in found.options.items()} == {
        "power": 1., "kinds": None, "n": 2}
    assert found.seeded and not found.takes("retain") and not found.own
    assert (found.about["unit"], found.source, found.label) == ("weights", "here", "Mine")
    given = dict(model=1, forget=2, retain=3, seed=4, progress=5)
    assert found(**given) == (1, 4, 1., None, 2)
    assert found(**given, options={"power": 2, "kinds": ["a"]}) == (1, 4, 2., ["a"], 2)
    assert type(found.checked({"power": 2})["power"]) is float

def test_every_method_of_the_package_has_a_label_and_says_where_it_is_from():
    for kind in METHODS:
        for name, method in methods(kind).items():
            assert method.own and method.label.strip() and method.function.__doc__, (kind, name)
            assert method.checked({k: v for k, (_, v) in method.options.items()}) is not None

@pytest.mark.parametrize("options, says", [
    ({"gama": 1}, "localizer wagle has no option 'gama'; known: gamma, pool, max_tokens"),
    ({"gamma": "1"}, "localizer wagle: gamma must be of type float, got '1'"),
    ({"gamma": True}, "localizer wagle: gamma must be of type float, got True"),
    ({"max_tokens": 2.5}, "localizer wagle: max_tokens must be of type int | None, got 2.5")])
def test_an_option_is_checked(options, says):
    with pytest.raises(ValueError) as error: find("localizer", "wagle").checked(options)
    assert str(error.value) == says

# --- options in a name

def test_a_name_may_set_options():
    found = find("localizer", "wagle(gamma=0.1, pool='abs_sum')")
    assert found.label == label("localizer", found.name) == "WAGLE (gamma 0.1, pool abs_sum)"
    assert found.bound == {"gamma": .1, "pool": "abs_sum"} and list(found.options) == ["max_tokens"]
    assert registered_name("localizer", found.name) == "wagle"
    assert find("localizer", "wagle").bound == {}, "the method itself is as it was"
    names = ["wagle", "wagle(gamma=0.1)", "wagle(gamma=1)", "wagle(pool='abs_sum')"]
    described = [localization(teaching({"kind": "judge"}), name) for name in names]
    assert len({run_id(d) for d in described}) == len(names)
    assert len({d["code"][f"localizer {name}"] for d, name in zip(described, names)}) == 1

def test_options_of_a_name_reach_the_function():
    @localizer(label="Mine")
    def mine(model, power:float=1., n:int=2):
        "Give the options"
        return power, n
    given = dict(model=1, forget=2, retain=3, seed=4)
    assert find("localizer", "mine(power=3)")(**given) == (3., 2)
    assert find("localizer", "mine(power=3)")(**given, options={"n": 5}) == (3., 5)
    one_line(lambda: find("localizer", "mine(power=3)").checked({"power": 1}),
        "localizer mine(power=3) has no option 'power'; known: n")

def test_options_of_a_name_reach_an_objective():
    @objective(label="Mine", limits={"power": (0, None)})
    def mine(run, facts, rows, epoch, power:float=1.):
        "Give the option"
        return power
    given = dict(run=None, facts=[], rows=[], epoch=0)
    assert bound(find("objective", "mine(power=3)"), {})(**given) == 3.
    assert Recipe("mine(power=3)", 1e-3, 1).methods()[0].bound == {"power": 3.}
    one_line(lambda: Recipe("mine(power=-3)", 1e-3, 1),
        "objective mine(power=-3): power must be at least 0 and finite, got -3.0")

@pytest.mark.parametrize("name, says", [
    ("wagle(gama=1)", "localizer wagle has no option 'gama'; known: gamma"),
    ("wagle(gamma='x')", "localizer wagle: gamma must be of type float, got 'x'"),
    *((f"wagle({inside})", f"unknown localizer {f'wagle({inside})'!r}; known: ") for inside in (
        "", "0.1", "gamma=x", "gamma=1, gamma=2", "**{'gamma': 1}", "gamma=__import__('os')")),
    ("compass(gamma=1)", "unknown localizer 'compass(gamma=1)'; known: activations"),
    ("wagle (gamma", "unknown localizer 'wagle (gamma'")])
def test_options_in_a_name_that_make_no_sense_are_one_line(name, says):
    one_line(lambda: find("localizer", name), says)
    one_line(lambda: code_of(localizer=name), says)

def test_a_setting_may_name_a_method_with_options():
    @retain_term(label="Ours")
    def ours(run, facts, power:float=1.): "Keep nothing"
    assert check_name("retain", "ours(power=2)") is None
    one_line(lambda: check_name("retain", "ours(size=2)"), "retain ours has no option 'size'")
    one_line(lambda: check_name("retain", "theirs"), "unknown retain 'theirs'; known: ",
        "register it, @unloc.register.retain_term(label='…'), before runs are described")

# --- what is refused where it is registered

def fine(model, forget): "Score nothing"
def unsaid(model, forget): return 0
def bare(model, forget, power:float): "Score nothing"
def untyped(model, forget, power=1.): "Score nothing"
def odd(model, forget, device:torch.device=None): "Score nothing"
def starred(model, *more): "Score nothing"
def by_place(model, /): "Score nothing"
def lost(model, power:"Nowhere"=1.): "Score nothing" # noqa: F821

@pytest.mark.parametrize("function, more, says", [
    (fine, {"label": " "}, "the localizer 'fine' lacks a label; name how tables call it"),
    (fine, {"label": None}, "the localizer 'fine' lacks a label"),
    (unsaid, {}, "the localizer 'unsaid' lacks a docstring; say in one line what it does"),
    (lambda model: model, {"name": "mine"}, "the localizer '<lambda>' lacks a docstring"),
    (bare, {}, "the localizer 'bare' has an option without a default: power"),
    (untyped, {}, "the localizer 'untyped' has an option without a type: power"),
    (odd, {}, "has an option whose type a profile cannot write: device; take bool, int"),
    (starred, {}, "the localizer 'starred' takes *more; name each option"),
    (by_place, {}, "the localizer 'by_place' takes model without its name; leave out the /"),
    (lost, {}, "has types that cannot be read, NameError: name 'Nowhere' is not defined"),
    (fine, {"name": "a b"}, "cannot be called 'a b'; give it a name of letters, digits and _"),
    (fine, {"name": "f(x=1)"}, "cannot be called 'f(x=1)'"),
    (fine, {"name": 3}, "cannot be called 3"),
    (functools.partial(fine, forget=1), {}, "the localizer 'partial' cannot be called ''"),
    (3, {}, "the localizer is 3, which cannot be called; register a function"),
    (len, {}, "has no Python code to name its runs by; wrap it into a function of your own"),
    (fine, {"name": "wagle"}, "the localizer 'wagle' (test_register.py, line ")])
def test_a_bad_method_is_one_line_and_is_not_registered(function, more, says):
    before = state()
    one_line(lambda: localizer(**{"label": "Mine"} | more)(function), says)
    assert state() == before

@pytest.mark.parametrize("kind", ["locator", "", None, ["localizer"]])
def test_a_kind_that_there_is_not_is_one_line(kind):
    says = f"unknown kind of method {kind!r}; known: localizer, objective"
    one_line(lambda: register.register(kind, fine, "Mine"), says)
    one_line(lambda: methods(kind), says)

def test_a_partial_and_an_object_may_be_methods():
    class Scorer:
        "Score by a number"
        def __init__(self, n): self.n = n
        def __call__(self, model, power:float=1.): return self.n * power
    register.register("localizer", Scorer(3), "Scorer", name="scorer")
    register.register("localizer", functools.partial(fine, forget=1), "Partial", name="part")
    assert find("localizer", "scorer(power=2)")(model=1, forget=2) == 6.
    first = code_of(localizer=("scorer", "part"))
    register.register("localizer", Scorer(4), "Scorer", name="scorer")
    again = code_of(localizer=("scorer", "part"))
    assert {k: first[k] == again[k] for k in first} == {
        "localizer scorer": False, "localizer part": True}

def test_a_cell_that_is_run_again_replaces_its_method():
    for value in (1, 2):
        @localizer(label="Mine")
        def mine(model):
            "Give a number"
            return value
    assert find("localizer", "mine")(model=None) == 2

# --- plugins

GOOD = """
    from unloc.register import localizer
    @localizer(label='Plugged')
    def plugged(model, forget, n:int=1):
        'Give a number'
        return n
"""
BAD = {
    "an import": ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
    "an assertion": ("assert False", "AssertionError"),
    "an exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "a syntax error": ("def f(:", "SyntaxError"),
    "null bytes": ("x = '\0'", "fails: "),
    "a name twice": (GOOD, "the localizer 'plugged' is registered twice, here and in bad.py, line"),
    "a name of the package": ("localizer(label='x', name='wagle')(plugged)",
        "the localizer 'wagle' (bad.py, line 3) has the name of the package's own "
            "(unloc.methods.wagle); give yours another name"),
    "no docstring": ("@localizer(label='x')\n    def f(model): return 1", "lacks a docstring"),
    "no label": ("localizer(label='', name='g')(plugged)", "lacks a label"),
    "forgotten label": ("localizer()", "missing 1 required positional argument: 'label'"),
    "no default": ("@localizer(label='x')\n    def f(model, n:int): 'Say'", "without a default: n"),
    "no type": ("@localizer(label='x')\n    def f(model, n=1): 'Say'", "without a type: n")}

@pytest.mark.parametrize("more, says", BAD.values(), ids=BAD)
def test_a_bad_plugin_is_one_line_and_leaves_nothing_behind(more, says, plugged):
    before = state()
    text = f"{GOOD}    {more.strip() if more != GOOD else GOOD.strip()}\n"
    plugged(bad=text)
    for _ in range(2):
        one_line(register.load, "the plugin ", "bad.py fails: ", says, "; correct the file")
    assert state() == before

def test_a_bad_plugin_leaves_what_a_good_one_did(plugged):
    plugged(mine=GOOD)
    register.load()
    before = state()
    plugged(mine=GOOD + "    import no_such_thing\n")
    one_line(register.load, "ModuleNotFoundError")
    assert state() == before and METHODS["localizer"]["plugged"](model=1, forget=2) == 1

def test_an_edit_that_is_taken_back_is_taken_back(plugged):
    found = []
    for n in (1, 2, 1):
        plugged(mine=GOOD.replace("n:int=1", f"n:int={n}"))
        given = find("localizer", "plugged")(model=1, forget=2)
        found.append((given, *code_of(localizer="plugged").values()))
    assert [n for n, _ in found] == [1, 2, 1] and found[0] == found[2] != found[1]

def test_plugins_of_one_text_are_two(plugged):
    plugged(a=GOOD, b=GOOD)
    one_line(register.load, "b.py fails", "'plugged' is registered twice, here and in a.py, line 3")

def test_two_plugins_register_two_names(plugged):
    plugged(a=GOOD, b=GOOD.replace("plugged", "other"))
    assert {"plugged", "other"} <= set(methods("localizer"))
    sent = [os.path.basename(file) for file, _ in identity.shipment().plugins]
    assert sent[-2:] == ["a.py", "b.py"], "workers execute them in this order"

# --- entry points

ASK = """if True:
    from unloc.identity import code_of
    from unloc.register import find
    found = find('localizer', 'offered')
    print(found.label, found.own, list(code_of(localizer='offered')))
"""

def offered(folder, text, guarded): # ask in a process that has another package installed
    info = folder / "offering-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[unloc.methods]\nmine = offering\n", "utf-8")
    (folder / "offering.py").write_text(textwrap.dedent(text), "utf-8")
    env = guarded | {"PYTHONPATH": f"{folder}{os.pathsep}{guarded['PYTHONPATH']}"}
    asked = [sys.executable, "-c", ASK]
    return subprocess.run(asked, env=env, capture_output=True, encoding="utf-8")

def test_an_installed_package_offers_methods(tmp_path, guarded):
    done = offered(tmp_path, GOOD.replace("plugged", "offered"), guarded)
    assert done.stdout == "Plugged False ['localizer offered']\n", done.stderr

def test_an_installed_package_that_fails_is_named(tmp_path, guarded):
    done = offered(tmp_path, GOOD + "    import no_such_thing\n", guarded)
    last = done.stderr.splitlines()[-1]
    assert last == ("ValueError: the entry point mine = offering of the group unloc.methods fails: "
        "ModuleNotFoundError: No module named 'no_such_thing'; mend or remove that package")

PACKAGE = { # of somebody else: file: text
    "__init__.py": "",
    "all.py": "from . import compass, needle",
    "compass.py": """
        from .numbers import RATE
        from unloc.register import localizer
        from . import lengths

        @localizer(label='Compass')
        def compass(model):
            'Score value vectors by where they point'
            from offering import late
            return [late.last(lengths.length(x)) * RATE for x in model]
    """,
    "needle.py": GOOD.replace("plugged", "needle"),
    "numbers.py": "RATE = 2 # a comment",
    "lengths.py": "from .deeper import twice\ndef length(x): return twice(x)",
    "deeper.py": "def twice(x): return 2 * x",
    "late.py": "def last(x): return x",
    "apart.py": "def nobody(): return 1"}

NAMED = """if True:
    import json
    from unloc.identity import code_of, shipment
    from unloc.register import find
    used = code_of(localizer=('compass', 'needle'))
    sent = [name for what, name in shipment().entries]
    print(json.dumps([used, find('localizer', 'compass')(model=[1, 2]), sent]))
"""

class Installed:
    "A package among others on the path, with the metadata that an installation writes"
    def __init__(self, folder, guarded):
        self.folder = folder
        info = folder / "offering-1.0.dist-info"
        info.mkdir(parents=True)
        about = "Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n"
        (info / "METADATA").write_text(about, "utf-8")
        (info / "entry_points.txt").write_text("[unloc.methods]\nall = offering.all\n", "utf-8")
        (folder / "offering").mkdir()
        for name, text in PACKAGE.items(): self.write(name, text)
        path = f"{folder}{os.pathsep}{guarded['PYTHONPATH']}"
        self.env = guarded | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def write(self, name, text):
        (self.folder / "offering" / name).write_text(textwrap.dedent(text), "utf-8")

    def ask(self, text=NAMED, *words):
        return subprocess.run([sys.executable, "-c", text, *words], env=self.env,
            capture_output=True, encoding="utf-8")

    def named(self): # digests by name, what the method gives, what is sent to workers
        done = self.ask()
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

@pytest.fixture(scope="module")
def installed(tmp_path_factory, guarded):
    return Installed(tmp_path_factory.mktemp("other") / "site-packages", guarded)

@pytest.fixture(scope="module")
def first(installed): return installed.named()

@pytest.mark.parametrize("file, old, new", [
    ("compass.py", "length(x))", "length(x) + 1)"), ("numbers.py", "= 2", "= 3"),
    ("lengths.py", "return twice(x)", "return -twice(x)"), ("deeper.py", "2 *", "3 *"),
    ("late.py", "return x", "return -x")])
def test_a_helper_of_an_installed_method_is_part_of_its_name(installed, first, file, old, new):
    assert old in PACKAGE[file] and first[1] == [4, 8]
    installed.write(file, PACKAGE[file].replace(old, new))
    try: used, given, _ = installed.named()
    finally: installed.write(file, PACKAGE[file])
    assert given != first[1] and used["localizer compass"] != first[0]["localizer compass"]
    assert used["localizer needle"] == first[0]["localizer needle"], "another method of the package"

def test_what_an_installed_method_does_not_import_is_no_part_of_its_name(installed, first):
    installed.write("apart.py", "def nobody(): return 2")
    installed.write("numbers.py", "'Numbers'\nRATE = 2")
    installed.write("__init__.py", "VERSION = 2")
    try: assert installed.named() == first
    finally:
        for name in ("apart.py", "numbers.py", "__init__.py"): installed.write(name, PACKAGE[name])

DEMAND = """if True:
    import json, sys
    from unloc.identity import demand
    demand({'kind': 'localize', 'code': json.loads(sys.argv[1])})
"""

def test_a_worker_finds_an_installed_method_by_itself_and_refuses_another(installed, first):
    used = json.dumps(first[0])
    assert first[2] == [] and installed.ask(DEMAND, used).returncode == 0
    installed.write("deeper.py", "def twice(x): return 3 * x")
    try: done = installed.ask(DEMAND, used)
    finally: installed.write("deeper.py", PACKAGE["deeper.py"])
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: the localizer 'compass' of an installed package is not the one that the run "
        "was described with; install the same on every node")
    (installed.folder / "offering-1.0.dist-info").rename(installed.folder / "gone")
    try: done = installed.ask(DEMAND, used)
    finally: (installed.folder / "gone").rename(installed.folder / "offering-1.0.dist-info")
    assert "this process does not know the localizer 'compass'" in done.stderr.splitlines()[-1]

def test_a_plugin_is_named_by_the_constants_of_its_other_files(plugged, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for n in (1, 2):
        (tmp_path / "unloc_test_rates.py").write_text(f"RATE = {n}\n", "utf-8")
        sys.modules.pop("unloc_test_rates", None)
        plugged(mine=f"from unloc_test_rates import RATE # {n}\n" + textwrap.dedent(GOOD))
        found.append(code_of(localizer="plugged"))
    sys.modules.pop("unloc_test_rates", None)
    assert found[0] != found[1]
