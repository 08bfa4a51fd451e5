"""On a Ray cluster a sweep gives the bytes of one machine, though a node is killed in the middle;
what is wrong with a run, a node or a cluster is one line that costs no finished run."""
import contextlib, json, os, platform, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import pytest
pytest.importorskip("ray")
from unloc import cli, runs
from unloc import steps
from unloc.cluster import cluster
from unloc.pages import sweep
from unloc.runs import Store, run_id

ROOT = Path(__file__).resolve().parents[1]
NODE = f"node {platform.node()}: "
# Two nodes of one CPU each, in a process that ends them when its input ends: however the tests end.
NODES = r'''
import os, shutil, sys, tempfile
from ray.cluster_utils import Cluster
# the names of sockets are short
folder = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="unloc-", dir="/tmp")
# for the address of the cluster, which it writes into a folder that only `ray start` makes
os.mkdir(f"{folder}/ray")
small = dict(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False)
nodes = Cluster(initialize_head=True, head_node_args=small | {"temp_dir": folder})
try:
    second = nodes.add_node(**small)
    print("ready", nodes.address, flush=True)
    for line in sys.stdin:
        if line == "kill\n": nodes.remove_node(second, allow_graceful=False)
        if line == "add\n": second = nodes.add_node(**small)
        if line == "add GPUs\n": nodes.add_node(**small | {"num_cpus": 2, "num_gpus": 2})
        print("ready", second.node_id, flush=True)
finally:
    nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
'''

class Nodes:
    def __init__(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("UNLOC_", "RAY_"))} | {
            "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True)
        self.address = self.ready()
    def ready(self):
        return next(
            line.split()[1]
            for line in iter(self.process.stdout.readline, "")
            if line.startswith("ready "))
    def do(self, word):
        self.process.stdin.write(f"{word}\n"); self.process.stdin.flush()
        return self.ready() # the second node's id

@pytest.fixture(scope="module")
def nodes():
    import ray
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__]) # workers do not find this file
    started = Nodes()
    try: yield started
    finally:
        ray.shutdown()
        try: started.process.communicate(timeout=72000)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.process.pid, signal.SIGKILL) # should it not have ended them

@pytest.fixture
def on_ray(nodes, monkeypatch):
    monkeypatch.setenv("UNLOC_ENGINE", "ray"); monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    return nodes

def files(root):
    return {
        str(f.relative_to(root)): f.read_bytes()
        for f in sorted(Path(root).rglob("*"))
        if f.is_file() and f.relative_to(root).parts[0] != "locks"}
def lines(path): return Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []
def numbered(*ns, **more): return [{"kind": "number", "n": n} | more for n in ns]

def logging(path, do, seconds=.2): # a compute whose calls are lines: name, node, process
    def compute(description, parent, folder, progress):
        import ray, unloc.runs
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        with open(path, "a", encoding="utf-8") as f:
            f.write(f"{unloc.runs.run_id(description)} {node} {os.getpid()}\n")
        time.sleep(seconds)
        do(description, parent, folder, progress)
    return compute

def write(description, parent, folder, progress):
    progress(.5)
    (folder / "result.json").write_text(
        json.dumps(
            {
                "n": description["n"],
                "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "told": os.environ.get("UNLOC_PROGRESS"),
                "ended": time.monotonic()}),
        "utf-8")

# --- every run finishes, with the bytes of one machine

def real(description, parent, folder, progress):
    steps.compute(description, parent, folder, progress)

# a compute that stands still on the second node, until that is killed; the first waits for it with
# the last stage
def stuck_on(second, held):
    def compute(description, parent, folder, progress):
        import ray, unloc.runs
        if not ray.is_initialized(): return real(description, parent, folder, progress)
        if ray.get_runtime_context().get_node_id() == second and not Path(held).exists():
            Path(held + ".new").write_text(unloc.runs.run_id(description), "utf-8")
            os.replace(held + ".new", held)
            time.sleep(3600)
        while description["kind"] == "unlearn" and not Path(held).exists(): time.sleep(.02)
        real(description, parent, folder, progress)
    return compute

def grid():
    from unloc.data import data_description
    from unloc.steps.base import base_models
    from unloc.steps.inject import injection
    from unloc.steps.judge import standard
    from unloc.levels import PAIR
    from unloc.steps.unlearn import unlearning
    base = base_models(
        data_description({"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}),
        "llama",
        model={"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300},
        pretrain={"epochs": 1, "lr": 4e-3, "batch_size": 64},
        retain={"epochs": 2, "lr": 4e-3, "batch_size": 32})
    injected = [
        injection(
            standard(base, {"retain": 5, "utility": 2, "max_new_tokens": 4}),
            seed,
            {"fraction": .25, "epochs": 2, "lr": 1e-2, "batch_size": 4})
        for seed in (0, 1)]
    return [
        unlearning(parent, arm, objective, {"lr": 5e-3, "epochs": 2})
        for parent, objective in zip(injected, ("npo", "rmu"))
        for arm in PAIR]

def test_a_killed_node_costs_no_run_and_no_byte(on_ray, tmp_path):
    log, second, held = tmp_path / "log", on_ray.do("which"), tmp_path / "held"
    here = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, test_ray; test_ray.sweep(test_ray.Store(sys.argv[1]), test_ray.grid())",
            tmp_path / "here"],
        env=os.environ | {"UNLOC_ENGINE": "local"},
        cwd=Path(__file__).parent)
    def kill(): # when the second node is in the middle of a run
        while not held.exists(): time.sleep(.02)
        on_ray.do("kill")
    killer = threading.Thread(target=kill, daemon=True); killer.start()
    try:
        done = sweep(
            Store(tmp_path / "ray"), grid(), -1, logging(str(log), stuck_on(second, str(held)), 0))
    finally: held.touch(); killer.join(); on_ray.do("add"); here.wait(1200)
    calls = [line.split()[0] for line in lines(log)]
    killed = held.read_text("utf-8")
    assert [name for name in set(calls) if calls.count(name) > 1] == [killed] and calls.count(
        killed) == 2, "what the node was doing was done again, and nothing else"
    assert here.returncode == 0 and [run.path.name for run in done] == [run_id(d) for d in grid()]
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    assert len(list((tmp_path / "ray").iterdir())) == 1 + 1 + 2 + 4 + 1

def together(log): # two runs, each of which waits for the other
    def compute(description, parent, folder, progress):
        end = time.monotonic() + 1200
        while len(lines(log)) < 2: time.sleep(.05); assert time.monotonic() < end, "alone"
        write(description, parent, folder, progress)
    return logging(str(log), compute)

def test_two_nodes_work_at_once(on_ray, tmp_path):
    log = tmp_path / "log"
    sweep(Store(tmp_path / "s"), numbered(0, 1), -1, together(log))
    assert len({line.split()[1] for line in lines(log)}) == 2

def test_jobs_are_a_limit_and_workers_do_the_work(on_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLOC_PROGRESS", str(tmp_path / "events"))
    def timed(description, parent, folder, progress):
        began = time.monotonic(); time.sleep(.4); write(description, parent, folder, progress)
        (folder / "began.json").write_text(json.dumps(began), "utf-8")
    found = sweep(
        Store(tmp_path / "s"), numbered(*range(4)), 1, logging(str(tmp_path / "log"), timed, 0))
    spans = sorted((run.json("began.json"), run.json()["ended"]) for run in found)
    assert all(
        ended <= began for (_, ended), (began, _) in zip(spans, spans[1:])), "one after the other"
    assert len(lines(tmp_path / "log")) == 4
    assert str(os.getpid()) not in {line.split()[2] for line in lines(tmp_path / "log")}
    # the driver's alone: a node has no such file
    events = [json.loads(line) for line in lines(tmp_path / "events")]
    assert events[0]["of"] == 4
    assert sorted(e["run"] for e in events[1:]) == sorted(events[0]["ids"])
    assert {e["fraction"] for e in events[1:]} == {1.}
    assert {run.json()["told"] for run in found} == {None}
    assert [
        f.name for f in (tmp_path / "s" / "locks").iterdir() if f.name.startswith("sweep-")] == []

def test_a_runner_beside_does_no_run_twice(on_ray, tmp_path):
    one = numbered(1)[0]
    store = Store(tmp_path / "s")
    compute = logging(str(tmp_path / "log"), write, 2.)
    beside = threading.Thread(target=store.do, args=(one, compute)); beside.start()
    while not lines(tmp_path / "log"): time.sleep(.01)
    sweep(store, [one], -1, compute)
    beside.join()
    assert (
        len(lines(tmp_path / "log")) == 1
    ), "the cluster waited for the lock, and then found the run"

# --- what is wrong is one line

def fails(kind, says, *args):
    with pytest.raises(kind) as error: sweep(*args)
    text = str(error.value)
    assert says in text and "\n" not in text and type(error.value) is kind, text

def test_the_error_of_a_run_ends_the_sweep_as_on_one_machine(on_ray, tmp_path):
    def bad(description, parent, folder, progress):
        if description["n"] == 1: raise ValueError("unlearn has no setting 'beta'; known: lr")
        write(description, parent, folder, progress)
    store = Store(tmp_path / "s")
    fails(
        ValueError,
        f"{NODE}unlearn has no setting 'beta'; known: lr",
        store,
        numbered(0, 1),
        1,
        logging(str(tmp_path / "log"), bad))
    assert (
        [line.split()[0] for line in lines(tmp_path / "log")] == [run_id(d) for d in numbered(0, 1)]
        and numbered(0)[0] in store
        and numbered(1)[0] not in store), "not tried again, and what was finished is kept"
    def full(description, parent, folder, progress): raise OSError(28, "No space left on device")
    fails(OSError, f"{NODE}[Errno 28] No space left on device", store, numbered(2), -1, full)

def test_a_run_that_takes_its_workers_with_it_is_given_up(on_ray, tmp_path):
    def crash(description, parent, folder, progress):
        if description["n"]: os._exit(1)
        write(description, parent, folder, progress)
    store = Store(tmp_path / "s")
    fails(
        RuntimeError,
        "1 runs were lost with their workers in three rounds without a finished run, lastly by"
        " WorkerCrashedError",
        store,
        numbered(0, 1),
        -1,
        logging(str(tmp_path / "log"), crash))
    calls = [line.split()[0] for line in lines(tmp_path / "log")]
    assert numbered(0)[0] in store
    assert calls.count(run_id(numbered(0)[0])) == 1
    assert calls.count(run_id(numbered(1)[0])) == 4

def test_a_node_without_the_store_is_named(on_ray, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, 777); os.close(folder)
    try:
        # there in this process only
        fails(
            FileNotFoundError,
            f"{NODE}this node does not see the folder /proc/self/fd/777 of the sweep; put the store"
            " on a folder that all nodes share: --store",
            Store("/proc/self/fd/777"),
            numbered(1),
            -1,
            write)
    finally: os.close(777)
    assert files(tmp_path) == {}

def test_a_store_whose_locks_end_at_the_node_is_named(on_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["unloc.cluster"], "_locked", lambda path: contextlib.nullcontext())
    fails(
        OSError,
        f"{NODE}locks on {tmp_path} do not reach from node to node",
        Store(tmp_path),
        numbered(1),
        -1,
        write)

def test_a_node_with_other_code_is_named(on_ray, tmp_path):
    described = numbered(1, code={"steps.base": "0" * 16}) # as a driver with another page says
    fails(
        RuntimeError,
        f"{NODE}this process has other code of unloc (steps.base) than the run was described with;"
        " install the same on every node",
        Store(tmp_path),
        described,
        -1,
        write)
    assert lines(tmp_path / "log") == [] and described[0] not in Store(tmp_path)

def test_a_node_without_the_package_is_named(on_ray, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def compute(*_): pass", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here
    fails(
        RuntimeError,
        " cannot begin a run: System error: No module named 'only_here'; install unloc and its"
        " libraries on every node",
        Store(tmp_path / "s"),
        numbered(1),
        -1,
        only_here.compute)

@pytest.mark.parametrize("variable", [False, True])
def test_a_node_without_the_data_is_named(on_ray, tmp_path, monkeypatch, variable):
    none = str(tmp_path / "none")
    data = {"name": "tofu", "forget": "forget01", "n_authors": 20, "sha256": "0"} | (
        {} if variable else {"_source": none})
    if variable: monkeypatch.setenv("UNLOC_TOFU", none) # travels with the runs
    base = grid()[0]["parent"]["parent"]["parent"]
    fails(
        ValueError,
        f"{NODE}{'UNLOC_TOFU' if variable else 'source'}={none!r}: no such folder",
        Store(tmp_path / "s"),
        [base | {"data": data}],
        -1)

def test_a_gpu_is_one_tasks_own(on_ray, tmp_path):
    cuda = numbered(0, 1, _device="cuda")
    fails(
        ValueError,
        f"the Ray cluster at RAY_ADDRESS={on_ray.address!r} has no GPU; add a node that has one"
        " (ray start --address=HOST:6379), or compute on CPUs: --set 'device=\"cpu\"'",
        Store(tmp_path),
        cuda,
        -1,
        write)
    on_ray.do("add GPUs")
    log = tmp_path / "log"
    found = sweep(Store(tmp_path), cuda, -1, together(log))
    assert {run.json()["gpu"] for run in found} == {"0", "1"} and len(
        {line.split()[1] for line in lines(log)}) == 1, "one each, on the node that has them"

# --- clusters that are not there

@pytest.fixture
def silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"

def test_a_silent_address_is_given_up_in_time(silent, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(
        ConnectionError,
        match=(
            f"no Ray cluster answers at RAY_ADDRESS='{silent}': nothing was heard for 2 seconds;"
            " start one .ray start --head")):
        cluster(2.)

@pytest.mark.parametrize(
    "words, change, says",
    [
        (
            ["--engine", "rey"],
            None,
            "unknown engine 'rey'; did you mean 'ray'? (known: local, ray, slurm)"),
        (
            ["--engine", "ray"],
            ("RAY_ADDRESS", "nonsense"),
            (
                "no Ray cluster answers at RAY_ADDRESS='nonsense': Invalid address format:"
                " nonsense; start one (ray start --head")),
        (
            ["--engine", "ray"],
            "no ray",
            (
                "the engine ray needs the package ray; install it in the checkout: pip install -e"
                " '.[ray]'")),
        ([], ("UNLOC_ENGINE", "rey"), "unknown engine 'rey'")],
    ids=["engine", "address", "not installed", "variable"])
def test_a_command_without_a_cluster_is_one_line(
    words, change, says, tmp_path, monkeypatch, capsys
):
    if change == "no ray": monkeypatch.setattr("unloc.cluster.find_spec", lambda name: None)
    elif change: monkeypatch.setenv(*change)
    before = os.environ.get("UNLOC_ENGINE")
    assert (
        cli.main(
            [
                "reproduce", "--profile", "smoke", *words, "--store", str(tmp_path / "s"),
                "--out", str(tmp_path / "o")])
        == 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"unloc: {says}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert os.environ.get("UNLOC_ENGINE") == before

# --- the command

SMALL = [
    "--set",
    "ratios=[0.5]",
    'data={"name": "world", "n_authors": 3, "n_forget": 1, "n_holdout": 0}',
    'evaluate={"retain": 5, "utility": 2, "max_new_tokens": 4}']

def test_the_command_gives_the_bytes_of_one_machine(nodes, tmp_path):
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("UNLOC_PROGRESS", "UNLOC_ENGINE", "MPLBACKEND")
    } | {"RAY_ADDRESS": nodes.address}
    def start(engine, *words):
        shutil.copytree(
            ROOT / "nbs",
            tmp_path / engine / "nbs",
            ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copy(ROOT / "settings.ini", tmp_path / engine)
        return subprocess.Popen(
            [
                Path(sys.executable).with_name("unloc"),
                "reproduce",
                "--engine",
                engine,
                *words,
                "--profile",
                "smoke",
                "--only",
                "20_injection_ratio",
                *SMALL,
                "--store",
                tmp_path / engine / "s",
                "--out",
                tmp_path / engine / "o"],
            cwd=tmp_path / engine,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8")
    both = [start("ray"), start("local", "--jobs", "1")]
    try:
        for process in both:
            out, err = process.communicate(timeout=7200)
            assert (
                process.returncode == 0
                and "inject 2.0 of 2 runs" in out + err
                and not any(word in (out + err).lower() for word in ("warn", "raylet", "gcs"))
            ), (out, err)
    finally:
        for process in both: process.kill()
    assert files(tmp_path / "ray" / "s") == files(tmp_path / "local" / "s")
    assert files(tmp_path / "ray" / "o") == files(tmp_path / "local" / "o")
    assert len(files(tmp_path / "ray" / "o")) == 5

# --- a user's own methods

OWN = """from unloc.register import localizer
@localizer(label='Plugged')
def plugged(model, forget, word:str='plugged'):
    'Say a word'
    return word
"""

def test_a_users_method_and_plugin_reach_the_nodes(on_ray, tmp_path, monkeypatch):
    from unloc import register
    from unloc.identity import code_of
    held = register.METHODS["localizer"]
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    monkeypatch.setenv("UNLOC_PLUGINS", str(tmp_path / "own.py"))
    monkeypatch.setitem(
        held, "mine", register.Method("localizer", "mine", "Mine", lambda model, forget: "mine"))
    names = ["mine", "plugged", "plugged(word='other')"]
    described = [
        {"kind": "number", "n": n, "name": name, "code": code_of(localizer=name)}
        for n, name in enumerate(names)]
    (tmp_path / "own.py").rename(tmp_path / "gone"); monkeypatch.delenv("UNLOC_PLUGINS")
    def compute(description, parent, folder, progress):
        from unloc.register import find
        found = find("localizer", description["name"])(model=None, forget=None, retain=None, seed=0)
        (folder / "result.json").write_text(json.dumps(found), "utf-8")
    assert [run.json() for run in sweep(Store(tmp_path / "s"), described, -1, compute)] == [
        "mine",
        "plugged",
        "other"]
    held.pop("plugged")

def test_a_run_that_diverges_on_a_node_costs_no_other(on_ray, tmp_path):
    def compute(description, parent, folder, progress):
        if description["n"] == 1: raise FloatingPointError("the loss is nan")
        write(description, parent, folder, progress)
    assert [
        run.diverged for run in sweep(Store(tmp_path / "s"), numbered(0, 1, 2), -1, compute)
    ] == ["", "the loss is nan", ""]
