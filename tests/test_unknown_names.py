"""A name that nobody registered is one line; one that a user registered is known in every process
and has the user's code in the name of its runs."""
import dataclasses, functools, importlib, inspect, os, subprocess, sys, textwrap, threading
import numpy as np, pytest, torch
from unloc import descent, identity, models, register, tokens, undisturbed
from unloc.data import benchmark, data_description
from unloc.identity import (REGISTERS, added, demand, digest_of, names,
    receive, shipment, written)
from unloc.level import at_level
from unloc.pages import sweep
from unloc.register import (METHODS, Method, architecture, find, localizer, objective,
    retain_term)
from unloc.runs import Store, run_id
from unloc.steps import compute
from unloc.steps.attack import attacking
from unloc.steps.base import base_models
from unloc.steps.inject import draw, injection
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.unlearn import localized_unlearning, unlearning

WORLD = {"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}
MODEL = {"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300}
HOW = {"epochs": 1, "lr": 4e-3, "batch_size": 64}
JUDGE = {"retain": 5, "utility": 2, "max_new_tokens": 4}
INJECT = {"fraction": .25, "epochs": 1, "lr": 1e-2, "batch_size": 8}
UNLEARN = {"lr": 5e-3, "epochs": 1}


def origin(arch="llama", **more):
    return injection(
        standard(base_models(data_description(WORLD), arch, MODEL, HOW, HOW, **more), JUDGE),
        0,
        INJECT)

@pytest.fixture(autouse=True)
def as_they_were(): # the registers, whatever a test does to them
    places = REGISTERS.values()
    tables = [getattr(importlib.import_module(f"unloc.{place}"), name) for place, name in places]
    tables += [register._executed, *METHODS.values()]
    register.load()
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)

def hold(name, function, kind="localizer"): # as a register may hold it, whatever it is
    METHODS[kind][name] = Method(kind, name, name, function, about=METHODS[kind][USUAL[kind]].about)
USUAL = {"localizer": "wagle", "objective": "npo", "retain": "kl"}

def backwards(model, forget, retain, seed): # this file's own localizer
    n_layers, d_ff = models.region_shape(model)
    return torch.arange(n_layers * d_ff).float().view(n_layers, d_ff).flip(1) + seed

# --- one truth

@pytest.mark.parametrize("what", REGISTERS)
def test_names_read_without_torch_are_those_registered(what):
    chapter, name = REGISTERS[what]
    assert sorted(written(chapter, name)) == sorted(getattr(identity._own(chapter), name))
    assert set(written(chapter, name)) <= set(names(what))

def test_nothing_of_the_package_is_taken_for_a_users():
    for what in (*REGISTERS, *METHODS):
        for name in names(what): assert added(what, name) == "", (what, name)

def test_names_and_their_code_need_no_torch():
    code = """if True:
        import sys
        from unloc.data import *
        from unloc.identity import *
        for what in REGISTERS:
            if what != 'finder': code_of(**{what: names(what)})
        print('torch' in sys.modules)
    """
    asked = [sys.executable, "-c", code]
    assert subprocess.run(asked, capture_output=True, encoding="utf-8").stdout == "False\n"

# --- a user's method names its runs

def four(one): # runs that no method of a user's is part of
    return [one, localization(one, "wagle"), localization(one, "random", 3),
        unlearning(one, "Oracle", "npo", UNLEARN)]

def test_a_users_localizer_is_in_the_name_and_no_other_run_is_renamed():
    one = origin()
    before = [run_id(d) for d in four(one)]
    hold("mine", backwards)
    described = localization(one, "mine", 3)
    assert set(described["code"]) == {"steps.localize", "localizer mine"}
    assert described["seed"] == 3, "it names the seed"
    assert [run_id(d) for d in four(origin())] == before
    hold("mine", lambda model, forget, retain, seed: -backwards(model, forget, retain, seed))
    assert run_id(localization(one, "mine", 3)) != run_id(described)

def test_a_method_behind_a_decorator_of_the_package_keeps_its_name_once_it_has_run():
    @undisturbed.measuring()
    def measured(model, power:float=1.): return backwards(model, (), (), 0) ** power
    hold("mine", measured)
    before = added("localizer", "mine")
    measured(models.tiny_model("llama", 40, 16, 2, 24, 2), power=2.)
    assert before and added("localizer", "mine") == before

def test_a_replaced_entry_of_the_package_gives_other_runs():
    one = origin()
    plain, fisher = localization(one, "wagle"), localization(one, "fisher")
    held = METHODS["localizer"]
    held["wagle"] = dataclasses.replace(held["fisher"], name="wagle")
    assert run_id(localization(one, "wagle")) != run_id(plain)
    assert localization(one, "fisher") == fisher and origin() == one
    unlearned, kept = unlearning(one, "Oracle", "npo", UNLEARN), METHODS["retain"]
    kept["nll"] = dataclasses.replace(kept["kl"], name="nll", function=lambda run, facts: None)
    again = unlearning(one, "Oracle", "npo", UNLEARN)
    assert run_id(again) != run_id(unlearned), "the usual retain term, not named by anybody"

@pytest.mark.parametrize("register, name, entry", [
    (descent.SCHEDULES, "one-cycle", lambda t: 1 - t),
    (tokens.TEMPLATES, "plain", tokens.Template(between=" ")),
    (models.PROJECTIONS, "llama", models.in_blocks("model.layers", "mlp.gate_proj"))])
def test_every_register_counts(register, name, entry):
    before = run_id(origin())
    register[name] = entry
    assert run_id(origin()) != before

def qwen2(vocab_size, seed, d_model:int=16, n_layers:int=1, d_ff:int=32, n_heads:int=2):
    "Build a small random Qwen 2"
    return models.random_model("Qwen2", vocab_size, seed, d_model, n_layers, d_ff, n_heads)

@pytest.mark.parametrize("kind, name", [("architecture", "llama"), ("dataset", "world")])
def test_another_architecture_or_data_set_of_the_same_name_counts(kind, name):
    before, held = run_id(origin()), METHODS[kind][name]
    def other(*given, **more): return held.function(*given, **more)
    other.__signature__ = inspect.signature(held.function)
    METHODS[kind][name] = dataclasses.replace(held, function=other)
    assert run_id(origin()) != before

def test_a_users_architecture_objective_retain_term_and_schedule():
    architecture(label="Qwen 2")(qwen2)
    one = origin("qwen2")
    named = {"steps.base", "dataset world", "architecture qwen2"}
    assert set(one["parent"]["parent"]["code"]) == named
    descent.SCHEDULES["flat"] = lambda t: .5
    assert "schedule flat" in injection(one["parent"], 0, INJECT | {"schedule": "flat"})["code"]
    @retain_term(label="Ours")
    def ours(run, facts): "Keep nothing"
    @objective(label="Mine", retain="ours")
    def mine(run, facts, rows, epoch): "Forget nothing"
    used = unlearning(one, "Oracle", "mine", UNLEARN)["code"]
    assert {"objective mine", "retain ours"} < set(used), "the usual term is the decorator's"
    named = unlearning(one, "Oracle", "mine", UNLEARN | {"retain": "kl"})["code"]
    assert {"objective mine", "retain kl"} < set(named) and "retain ours" not in named

def test_an_objective_with_an_unknown_usual_term_is_refused():
    @objective(label="Mine", retain="l2")
    def mine(run, facts, rows, epoch): "Forget nothing"
    with pytest.raises(ValueError, match="^unlearn: unknown retain term 'l2'; known: .*none$"):
        unlearning(origin(), "Oracle", "mine", UNLEARN)

# --- what an edit is

def f1(x, k=1): return helper(x) + k
def helper(x): return x * CONSTANT
CONSTANT = 2
SOURCE = (
    "import helpers_of_mine\nK = 2\ndef helper(x): return K * x\n"
    "def f(model, forget, retain, seed): return helper(helpers_of_mine.g(1))\n")

@pytest.mark.parametrize(
    "old, new, same",
    [
        ("K = 2", "K = 3", False),
        ("return K * x", "return K + x", False),
        ("def f(", "# told\ndef f(", True),
        ("return helper", "'told'\n    return helper", True)])
def test_an_imported_module_is_digested_whole(old, new, same, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helpers_of_mine.py").write_text("def g(x): return x\n", "utf-8")
    def load(text):
        (tmp_path / "methods_of_mine.py").write_text(
            text.replace(": return helper(h", ":\n    return helper(h"), "utf-8")
        for name in ("methods_of_mine", "helpers_of_mine"): sys.modules.pop(name, None)
        importlib.invalidate_caches(); sys.dont_write_bytecode = True
        return digest_of("localizer", "f", importlib.import_module("methods_of_mine").f)
    first = load(SOURCE)
    assert (
        load(SOURCE.replace(": return helper(h", ":\n    return helper(h").replace(old, new))
        == first) is same
    (tmp_path / "helpers_of_mine.py").write_text("def g(x): return x + 1\n", "utf-8")
    assert load(SOURCE) != first, "a file that the user's file imports"

def digest_in_a_script(text): # of f, in a program of its own
    code = (
        textwrap.dedent(text)
        + "\nfrom unloc.identity import digest_of\nprint(digest_of('localizer', 'f', f))")
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"PYTHONHASHSEED": str(len(text))}).stdout

SCRIPT = (
    "import functools\nclass C:\n    def __init__(self, n): self.n = n\n"
    "    def __call__(self, model): return self.n\n"
    "def g(x): return x if x in {'a', 'b', 'c'} else 2\ndef make(n): return lambda model: g(n)\n"
    "f = make(1)\n")
@pytest.mark.parametrize(
    "text, same",
    [
        (SCRIPT, True),
        ("#\n" + SCRIPT, True),
        (SCRIPT.replace("else 2", "else 3"), False),
        (SCRIPT.replace("make(1)", "make(2)"), False),
        (SCRIPT.replace("def g(x): return", "def g(x):\n    'says'\n    return"), True),
        (SCRIPT.replace("f = make(1)", "f = functools.partial(make, 1)"), False),
        (SCRIPT.replace("f = make(1)", "f = C(1)"), False)])
def test_a_function_of_a_program_is_digested_by_what_it_does(text, same):
    assert (digest_in_a_script(text) == digest_in_a_script(SCRIPT)) is same

def test_state_of_an_object_counts():
    one = SCRIPT.replace("f = make(1)", "f = C(1)")
    assert digest_in_a_script(one) != digest_in_a_script(one.replace("C(1)", "C(2)"))
    assert digest_in_a_script(one) != digest_in_a_script(
        one.replace("return self.n", "return -self.n"))
    a, b = (functools.partial(backwards, weight=torch.ones(3) * n) for n in (1, 2))
    assert (
        digest_of("localizer", "a", a)
        != digest_of("localizer", "a", b)
        == digest_of("localizer", "a", functools.partial(backwards, weight=torch.full((3,), 2.))))

# what a notebook's function may hold or call: code, and an edit of it that gives other scores
HELD = {
    "cached helper": (
        "import functools\n@functools.cache\ndef h(x): return x + 1\ndef f(m): return h(2)",
        "x + 1",
        "x + 2",
    ),
    "cached entry": (
        "import functools\n@functools.lru_cache\ndef f(x): return x + 1",
        "x + 1",
        "x + 2",
    ),
    "base class": (
        (
            "class B:\n  def go(self): return 1\nclass C(B):\n"
            "  def __call__(self, m): return self.go()\nf = C()"),
        "return 1",
        "return 2",
    ),
    "static method": (
        (
            "class C:\n  @staticmethod\n  def go(): return 1\n"
            "  def __call__(self, m): return self.go()\nf = C()"),
        "return 1",
        "return 2",
    ),
    "class method": (
        (
            "class C:\n  @classmethod\n  def go(cls): return 1\n"
            "  def __call__(self, m): return self.go()\nf = C()"),
        "return 1",
        "return 2",
    ),
    "property": (
        (
            "class C:\n  @property\n  def go(self): return 1\n"
            "  def __call__(self, m): return self.go\nf = C()"),
        "return 1",
        "return 2",
    ),
    "cached property": (
        (
            "import functools\nclass C:\n  @functools.cached_property\n"
            "  def go(self): return 1\n  def __call__(self, m): return self.go\nf = C()"),
        "return 1",
        "return 2",
    ),
    "slots": (
        "class C:\n  __slots__ = ('n',)\n  def __call__(self, m): return 1\nf = C()",
        "return 1",
        "return 2",
    ),
    "library's abstract class": (
        (
            "import collections\nclass C(collections.UserDict):\n"
            "  def __call__(self, m): return 1\nf = C()"),
        "return 1",
        "return 2",
    ),
    "dictionary's subclass": (
        "class D(dict):\n  def go(self): return 1\nd = D()\ndef f(m): return d.go()",
        "return 1",
        "return 2",
    ),
    "number's subclass": (
        "class I(int):\n  def go(self): return 1\nd = I(3)\ndef f(m): return d.go()",
        "return 1",
        "return 2",
    ),
    "named tuple": (
        (
            "from typing import NamedTuple\nclass D(NamedTuple):\n  n: int = 1\n"
            "  def go(self): return 1\nd = D()\ndef f(m): return d.go()"),
        "return 1",
        "return 2",
    ),
    "enum": (
        (
            "import enum\nclass E(str, enum.Enum):\n  A = 'a'\n  def go(self): return 1\n"
            "e = E.A\ndef f(m): return e.go()"),
        "return 1",
        "return 2",
    ),
    "default factory": (
        "import collections\nd = collections.defaultdict(lambda: 1)\ndef f(m): return d['a']",
        ": 1",
        ": 2",
    ),
    "table": (
        "def a(): return 1\ndef b(): return 2\nt = {1: a, 2: b, 3: a}\ndef f(m): return t[3]()",
        "3: a",
        "3: b",
    ),
    "bound method of a table": ("r = {'a': 1}.get\ndef f(m): return r('a')", "1}", "2}"),
    "view": (
        "import types\nr = types.MappingProxyType({'a': 1})\ndef f(m): return r['a']",
        "1}",
        "2}",
    ),
    "single dispatch": (
        (
            "import functools\n@functools.singledispatch\ndef h(x): return 1\n@h.register\n"
            "def _(x: int): return 2\ndef f(m): return h(m)"),
        "return 2",
        "return 3",
    ),
    "logger": (
        (
            "import logging\nlogging.basicConfig()\nL = logging.getLogger()\ndef f(m):\n"
            "  L.info('x')\n  return 1"),
        "return 1",
        "return 2",
    ),
    "data frame": (
        "import pandas as pd\nd = pd.DataFrame({'a': [1, 2]})\ndef f(m): return d.a[0]",
        "2]",
        "3]",
    ),
    "precision": (
        "import torch\nd = torch.ones(2)\ndef f(m): return d / 3",
        "ones(2)",
        "ones(2).double()",
    ),
    "large numbers": (
        "import torch\nd = torch.tensor([2**60])\ndef f(m): return d",
        "2**60",
        "2**60 + 1",
    ),
    "complex": ("import torch\nd = torch.ones(2) * 1j\ndef f(m): return d", "1j", "2j"),
    "sparse": (
        "import torch\nd = torch.eye(2).to_sparse()\ndef f(m): return d",
        "eye(2)",
        "eye(3)",
    ),
    "numpy's type": (
        "import numpy as np\nd = np.array([1], np.int32)\ndef f(m): return d",
        "int32",
        "uint32",
    ),
    "numpy's function": (
        "import numpy as np\nr = np.exp\ndef f(m): return r(m)",
        "np.exp",
        "np.log",
    ),
}
@pytest.mark.parametrize("text, old, new", HELD.values(), ids=HELD)
def test_whatever_a_function_holds_is_read(
    text, old, new
): # the same again is the same, an edit is another
    assert (
        digest_in_a_script(text)
        == digest_in_a_script(text + "\n#")
        != digest_in_a_script(text.replace(old, new)))

@pytest.mark.parametrize("entry", [3, "wagle", None])
def test_what_cannot_be_called_is_refused_before_anything_runs(entry):
    says = f"^the localizer 'mine' is {entry!r}, which cannot be called; register a function$"
    with pytest.raises(ValueError, match=says):
        register.register("localizer", entry, "Mine", name="mine")
    assert "mine" not in METHODS["localizer"]
    with pytest.raises(ValueError, match=says): digest_of("localizer", "mine", entry)
    descent.SCHEDULES["mine"] = entry
    with pytest.raises(ValueError, match="^the schedule 'mine' is .*, which cannot be called"):
        injection(origin()["parent"], 0, INJECT | {"schedule": "mine"})

@pytest.mark.parametrize("entry", [len, torch.relu, "".join, np.exp, dict])
def test_what_has_no_python_code_is_refused_in_one_line(entry):
    says = ("^the localizer 'mine' is .* has no Python code to name its runs by; "
        "wrap it into a function of your own$")
    with pytest.raises(ValueError, match=says):
        register.register("localizer", entry, "Mine", name="mine")
    assert "mine" not in METHODS["localizer"]
    if entry in (np.exp, dict): return # a plain register may hold what pickle gives back
    with pytest.raises(ValueError, match=says): digest_of("localizer", "mine", entry)

def test_a_method_that_changes_what_it_holds_is_told_so(tmp_path):
    seen = {}
    @localizer(label="Mine")
    def mine(model, forget, retain, seed):
        "Count the calls"
        seen[seed] = 1
        return backwards(model, forget, retain, seed)
    wanted = [localization(origin(), "mine", seed) for seed in (0, 1)]
    says = "describe the run again, and let a method change nothing that it holds$"
    with pytest.raises(ValueError, match=says): sweep(Store(tmp_path), wanted, 1)

# --- workers

def scores(run): return run.tensors("scores.safetensors")["all.scores"]

def test_workers_know_a_users_localizer_and_finder(tmp_path):
    hold("mine", backwards)
    models.PROJECTIONS["llama"] = models.in_blocks("model.layers", "mlp.down_proj")
    wanted = [localization(origin(), "mine", seed) for seed in (0, 1)]
    found = sweep(
        Store(tmp_path),
        wanted + [localized_unlearning(d, .25, "wga", UNLEARN, 0) for d in wanted],
        2)
    for seed, run in enumerate(found[:2]):
        assert torch.equal(scores(run), torch.arange(64.).view(2, 32).flip(1) + seed)
    before = [scores(run) for run in found[:2]]
    hold("mine", lambda model, forget, retain, seed: -backwards(model, forget, retain, seed))
    # edited: workers that served before get the new one
    for old, run in zip(
        before, sweep(Store(tmp_path), [localization(origin(), "mine", seed) for seed in (0, 1)], 2)
    ):
        assert torch.equal(scores(run), -old)

def test_workers_know_options_in_a_name(tmp_path): # of the package's, and of a user's
    @localizer(label="Mine")
    def mine(model, forget, seed, times:float=1.):
        "Score by number"
        return backwards(model, forget, None, seed) * times
    names = ["mine", "mine(times=2)", "random", "wanda"]
    names += [name for name in ("wagle", "wagle(gamma=0.1)")]
    found = sweep(Store(tmp_path), [localization(origin(), name) for name in names], 2)
    plain, twice, *_, usual, other = map(scores, found)
    assert torch.equal(twice, 2 * plain) and not torch.equal(usual, other)

def test_a_worker_takes_back_what_it_was_sent():
    held = METHODS["localizer"]
    hold("mine", backwards)
    hold("wagle", backwards)
    sent = shipment()
    del held["mine"]
    hold("wagle", lambda model, forget, retain, seed: None)
    own = held["wagle"]
    receive(identity.Shipment(("elsewhere",), sent.plugins, sent.entries))
    given = dict(model=models.tiny_model("llama", 8, 8, 1, 4, 2), forget=[], retain=[], seed=0)
    assert held["mine"](**given).tolist() == [[3., 2., 1., 0.]]
    receive(identity.Shipment(("elsewhere",)))
    assert "mine" not in held and held["wagle"] is own

def test_what_cannot_be_sent_is_named_where_it_is_needed(tmp_path):
    @localizer(label="Mine")
    def mine(model, forget, power:float=1.): "Score nothing"
    described = [localization(origin(), name) for name in ("mine", "mine(power=2)")]
    stays = {("localizer", "mine"): "cannot pickle a lock"}
    receive(identity.Shipment(("elsewhere",), (), {}, stays))
    says = ("^the localizer 'mine' cannot be sent to a worker .cannot pickle a lock.; register it, "
        ".*--plugin.*UNLOC_PLUGINS, or let runs happen one at a time$")
    for one in described:
        with pytest.raises(ValueError, match=says): demand(one)
    receive(identity.Shipment(("elsewhere",)))
    for one in described: demand(one)
    del METHODS["localizer"]["mine"]
    says = (
        "^this process does not know the localizer 'mine'; register it, @unloc.register.localizer")
    for one in described:
        with pytest.raises(ValueError, match=says): Store(tmp_path).do(one, compute)

def test_what_a_method_holds_may_not_be_sendable(tmp_path): # and it is needed, or not
    lock = threading.Lock()
    hold("mine", lambda model, forget, retain, seed: lock)
    assert ("localizer", "mine") in shipment().unsendable
    with pytest.raises(ValueError, match="the localizer 'mine' cannot be named: it holds a lock"):
        localization(origin(), "mine")
    wanted = [localization(origin(), "random", seed) for seed in (0, 1)]
    assert all(not run.diverged for run in sweep(Store(tmp_path), wanted, 2))

def test_a_method_edited_after_the_description_is_refused(tmp_path):
    hold("mine", backwards)
    described = localization(origin(), "mine")
    hold("mine", lambda model, forget, retain, seed: None)
    says = ("the localizer 'mine' is not the one that the run was described with; "
        "describe the run again")
    with pytest.raises(ValueError, match=says): Store(tmp_path).do(described, compute)

@pytest.mark.parametrize(
    "gives, says",
    [
        ("None", "scores must be"),
        ("torch.ones(3, 3)", "gave scores of shape"),
        ("torch.full((2, 32), float('nan'))", "gave 64 scores that are NaN or infinite"),
        ("[torch.ones(3)]", "scores must be"),
        ("torch.ones(2, 32) > 0", "gave scores of torch.bool; a ranking needs real numbers")])
def test_scores_of_no_unit_are_refused(gives, says, tmp_path):
    hold("my_weights", eval(f"lambda model, forget, retain, seed: {gives}", {"torch": torch}))
    with pytest.raises(ValueError, match=f"localizer 'my_weights'.*{says}"):
        Store(tmp_path).do(localization(origin(), "my_weights"), compute)

def test_a_name_says_nothing_about_the_unit(
    tmp_path
): # 'my_weights' scores value vectors, 'rows' single weights
    def rows(model): return [p.weight.detach().clone() for p in models.output_projections(model)]
    hold("my_weights", backwards)
    hold("rows", rows)
    store, one = Store(tmp_path), origin()
    vectors, weights = (
        store.do(localized_unlearning(localization(one, name), .25, "wga", UNLEARN, 0), compute)
        for name in ("my_weights", "rows"))
    assert vectors.json()["region"] == 16 and weights.json()["region"] == 2 * 16 * 32 // 4
    assert store[localization(one, "my_weights")].json()["recall"] >= 0
    assert store[localization(one, "rows")].json() == {}

# --- plugins

PLUGIN = """import torch
from unloc import models, undisturbed
from unloc.register import localizer
@localizer(label='Plugged')
def plugged(model, forget, retain, seed):
    'Score by number'
    return torch.ones(models.region_shape(model)).cumsum(1) * VALUE
VALUE = 2.
"""

def test_a_plugin_is_executed_once_where_runs_are_described_and_in_workers(tmp_path, monkeypatch):
    (tmp_path / "my plugin.py").write_text(
        PLUGIN
        + f"open({str(tmp_path / 'pids')!r}, 'a').write(str(__import__('os').getpid()) + '\\n')\n",
        "utf-8")
    monkeypatch.setenv("UNLOC_PLUGINS", str(tmp_path / "my plugin.py"))
    wanted = [localization(origin(), "plugged", seed) for seed in (0, 1, 2)]
    (tmp_path / "my plugin.py").rename(tmp_path / "gone")
    monkeypatch.delenv("UNLOC_PLUGINS") # workers get its content
    for run in sweep(Store(tmp_path / "s"), wanted, 2):
        assert torch.equal(scores(run), torch.arange(1., 33.).expand(2, 32) * 2)
    pids = (tmp_path / "pids").read_text("utf-8").split()
    assert len(set(pids)) == len(pids) and str(os.getpid()) in pids and len(pids) in (2, 3)

def test_an_edited_plugin_gives_other_runs(tmp_path, monkeypatch):
    plugin = tmp_path / "edited.py"
    monkeypatch.setenv("UNLOC_PLUGINS", os.pathsep.join(["", str(plugin)]))
    found = []
    for text in (PLUGIN, PLUGIN + "# a comment\n", PLUGIN.replace("2.", "3.")):
        plugin.write_text(text, "utf-8")
        found.append(run_id(localization(origin(), "plugged")))
    assert found[0] == found[1] != found[2]

@pytest.mark.parametrize(
    "text, says",
    [
        (None, "cannot be read: No such file or directory"),
        ("def f(:\n", "fails: SyntaxError"),
        ("import sys; sys.exit(3)", "fails: SystemExit: 3"),
        (
            "import no_such_thing_at_all",
            "fails: ModuleNotFoundError: No module named 'no_such_thing_at_all'")])
def test_a_bad_plugin_is_one_line(text, says, tmp_path, monkeypatch):
    if text is not None: (tmp_path / "bad.py").write_text(text, "utf-8")
    monkeypatch.setenv("UNLOC_PLUGINS", str(tmp_path / "bad.py"))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^the plugin .*bad.py {says}.*$") as error: origin()
        assert "\n" not in str(error.value)

def plugins(monkeypatch, *files): # named by the variable
    monkeypatch.setenv("UNLOC_PLUGINS", os.pathsep.join(map(str, files)))

def test_two_plugins_may_not_register_one_name(tmp_path, monkeypatch):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(PLUGIN, "utf-8")
    b.write_text(PLUGIN.replace("2.", "4."), "utf-8")
    plugins(monkeypatch, a, b)
    says = (r"^the plugin .*b.py fails: ValueError: the localizer 'plugged' is registered twice, "
        r"here and in a.py, line 4; rename one of them \(b.py, line 4\); correct the file$")
    for _ in range(2):
        with pytest.raises(ValueError, match=says): origin()
    found = []
    for file in (b, a, b): # one after the other is another matter: an edit
        plugins(monkeypatch, file)
        found.append(run_id(localization(origin(), "plugged")))
    assert found[0] == found[2] != found[1]

def test_two_plugins_may_not_register_one_finder(tmp_path, monkeypatch):
    text = "from unloc import models\nmodels.PROJECTIONS['mine'] = lambda model: NUMBER\n"
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for n, file in enumerate(files): file.write_text(text.replace("NUMBER", str(n)), "utf-8")
    plugins(monkeypatch, *files)
    says = "^the plugins .*a.py and .*b.py both register the finder 'mine'; rename one of them$"
    for _ in range(2):
        with pytest.raises(ValueError, match=says): origin()

# --- no else that stands for an unknown name

def test_an_unknown_name_is_one_line_wherever_it_comes_from(tmp_path):
    one, shape = origin(), models.tiny_model("llama", 300, 16, 2, 32, 2)
    parent = type("R", (), {"description": one, "file": lambda self, name: None})()
    with pytest.raises(ValueError, match="unknown benchmark 'wmdp'; known: world, tofu"):
        benchmark({"name": "wmdp"})
    with pytest.raises(ValueError, match="unknown unit 'head'; known: neuron, head . neuron"):
        draw(shape, one | {"unit": "head"}, 0)
    with pytest.raises(
        ValueError, match="unknown style 'quick'; known: fine-tuned, mixed, with room"):
        compute(one | {"style": "quick"}, None, None, None)
    with pytest.raises(ValueError, match="unknown localizer 'compass'; known: "):
        find("localizer", "compass")
    with pytest.raises(ValueError, match="unknown measure to compare by 'MU'; known: FS, RS"):
        at_level(None, .5, None, "MU")
    with pytest.raises(
        ValueError, match="unknown attack 'shout'; known: relearn held-out facts, target region"):
        attacking(
            one,
            {
                "level": .7, "lr": .1, "region_lr": .1, "epochs": 1, "batch_size": 1, "taught": 1,
                "only": "shout"})
    with pytest.raises(ValueError, match="unknown device 'gpu'; known: cpu"): origin(device="gpu")
    with pytest.raises(
        ValueError, match="unknown kind of run 'settings'; known: attack, base, edit, inject"):
        Store(tmp_path).do({"kind": "settings"}, compute)
    with pytest.raises(
        ValueError,
        match=(
            "unknown localizer 'mine'; known: .*; register it in a file named by"
            " --plugin.*@localizer.label='…'.$")):
        localization(one, "mine")


def test_a_method_keeps_its_digest_when_the_package_was_called():
    code = """if True:
        from unloc.identity import digest_of
        from unloc.models import tiny_model
        from unloc.scoring import score
        from unloc.tokens import Example
        def mine(model, forget): return score(model, forget).extraction_strength
        before = digest_of('localizer', 'mine', mine)
        model = tiny_model('llama', 60, d_model=16, n_layers=1, d_ff=16, n_heads=1)
        mine(model, [Example([4, 5, 6, 1], 2)])
        print(digest_of('localizer', 'mine', mine) == before)"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert found.stdout.strip() == "True"
