"""A plan tells the truth: predicted memory is what a process takes within 15 %, counts and disk are
those of the runs, and what is missing or does not fit is one line whose remedy helps."""
import ctypes, gc, json, math, os, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from torch import nn
from unloc import models, training
from unloc.cost import Memory, _gradients, _score, of_all_weights, rehearse, through_region
from unloc.data import benchmark, data_description
from unloc.masked import unlock
from unloc.plan import Machine, _code_of, machine, plan, problems_of, rows_of, text_of, wanted
from unloc.regions import Region
from unloc.register import METHODS, localizer, methods
from unloc.runs import Store, run_id
from unloc.scoring import score
from unloc.steps import compute, cost as cost_of, kinds, step
from unloc.steps.attack import attacking
from unloc.steps.base import base_models, models_of
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.localize import localization
from unloc.steps.supervise import supervision
from unloc.steps.teach import teaching
from unloc.steps.unlearn import unlearning
from unloc.tokens import Example, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
LARGE = Machine("cpu", 2, 8 * 2**30, 2**40, 2**28, 1e11, 1e-4)

# --- memory: what the real functions of a run take

def build(): return models.tiny_model("llama", 8192, 512, 4, 8192, 8)
ROWS, WIDTH, START = 8, 128, 64
def facts(seed):
    g = torch.Generator().manual_seed(seed)
    return [
        Example(torch.randint(2, 8192, (WIDTH,), generator=g).tolist(), START) for _ in range(ROWS)]

def through(model, fraction): # two steps of WGA
    with unlock(model, Region.sample(models.region_shape(model), fraction, 0)) as columns:
        training.finetune(model, facts(0), 2, 1e-4, ROWS, 0, columns.parameters())

REAL = {
    "all": lambda model: training.finetune(model, facts(0), 2, 1e-4, ROWS, 0),
    "score": lambda model: score(model, facts(0)),
    "region": lambda model: through(model, .1),
    "whole region": lambda model: through(model, 1.)}
ACTS = {
    "all": of_all_weights("float32"),
    "score": _score,
    "region": through_region(819),
    "whole region": through_region(8192)}

def measure(): # in a process of its own: the most resident memory during each piece
    def status(key):
        return next(
            int(line.split()[1]) * 1024
            for line in open("/proc/self/status", encoding="utf-8")
            if line.startswith(key))
    torch.set_num_threads(1)
    process, peaks = machine("cpu", Path.cwd()).process, {}
    for name, act in REAL.items():
        gc.collect(); ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "utf-8") # the peak starts anew
        act(model := build()); del model
        peaks[name] = status("VmHWM")
    print(json.dumps([process, peaks]))

@pytest.fixture(scope="module")
def measured():
    found = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])

@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure a peak")
@pytest.mark.parametrize("name", REAL)
def test_predicted_memory_is_what_a_process_takes(measured, name):
    process, peaks = measured
    peak = rehearse(build, lambda model: ACTS[name](model, ROWS, WIDTH, ROWS * (WIDTH - START)))
    assert peak > 150e6, "the tensors are no trifle"
    assert replace(LARGE, process=process).memory_of(peak) == pytest.approx(peaks[name], rel=.15)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", REAL)
def test_predicted_memory_is_what_a_gpu_allocates(name):
    # what the library of products keeps for itself
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    REAL[name](build().cuda())
    peak = rehearse(build, lambda model: ACTS[name](model, ROWS, WIDTH, ROWS * (WIDTH - START)))
    assert start <= 2**27, "what is added for the libraries is enough"
    assert replace(LARGE, device="gpu").memory_of(peak) - 2**27 == pytest.approx(
        torch.cuda.max_memory_allocated() - start, rel=.15)

@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2)])
def test_a_pass_is_counted_though_heads_share_keys(heads, kv_heads): # by the page of costs
    d_model, d_ff, n_layers, vocab, rows, length, answer = 64, 96, 3, 128, 3, 16, 5
    chosen = dict(
        d_model=d_model, d_ff=d_ff, n_layers=n_layers, n_heads=heads, kv_heads=kv_heads,
        vocab_size=vocab, batch_size=rows, length=length, answer=answer, repeats=1, fractions=[.1])
    cells, names = _code_of(NBS / "40_cost.ipynb"), {}
    for source, tagged in cells:
        exec(source, names)
        if tagged: names |= chosen
        if "needed" in names: break # before the figure
    tokens, head = rows * length, d_model // heads
    # projections; scores and their means
    layer = (
        2 * tokens * d_model * (2 * d_model + 2 * kv_heads * head + 3 * d_ff)
        + 2 * 2 * rows * heads * length**2 * head)
    # of the rotary embedding, which transformers 5.17 forms by a product
    angles = 2 * head // 2 * length
    assert names["needed"] / 2 - n_layers * layer - 2 * rows * answer * d_model * vocab in (
        0,
        angles)
    assert names["model"].config._attn_implementation == "sdpa"

def test_memory_counts_storages_once_and_until_the_last_view_is_gone():
    x = []
    def act(model):
        x.append(torch.empty(1000)); x.append(x[0][:10]); x.pop(0)
        torch.empty(500)
    assert rehearse(lambda: nn.Linear(10, 10, bias=False), act) == 400 + 4000 + 2000
    with Memory() as memory:
        y = torch.empty(8)
        z = y.view(2, 4)
        del y
        assert memory.live == 32
        del z
        assert (memory.live, memory.most) == (0, 32)

def test_an_8b_model_fits_a_small_card(): # of its shape: never allocated
    from transformers import LlamaConfig, LlamaForCausalLM
    from unloc.loading import recompute
    def llama():
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, num_hidden_layers=32,
                intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                use_cache=False))
    weights = rehearse(llama, lambda model: None, torch.bfloat16)
    assert weights == pytest.approx(16.06e9, rel=.001)
    def step(model): recompute(model); through_region(1433)(model, 32, 128, 4096)
    assert (
        rehearse(llama, step, torch.bfloat16) < 24e9
    ), "a step of 4,096 answer tokens, 10 % of the value vectors, blocks computed again"
    assert (
        rehearse(llama, lambda model: _gradients(model, 4, 128, 512), torch.bfloat16)
        < weights + 4e9), "WAGLE, 512 tokens at a time"

# --- a small study, done

@pytest.fixture(scope="module")
def study(tmp_path_factory): # descriptions by name, their store, what is known of their models
    folder = tmp_path_factory.mktemp("plan")
    data = data_description({"name": "world", "n_authors": 4, "n_forget": 1, "n_holdout": 1})
    learn = {"epochs": 1, "lr": 1e-3, "batch_size": 32}
    base = base_models(
        data,
        "llama",
        {"d_model": 32, "n_layers": 2, "d_ff": 256, "n_heads": 2, "vocab_size": 400},
        learn,
        learn)
    judged = standard(base, {"retain": 10, "utility": 4, "max_new_tokens": 4, "full_every": 2})
    injected, taught = injection(judged, 0, {"fraction": .25} | learn), teaching(judged)
    found = {
        "base": base,
        "judge": judged,
        "inject": injected,
        "teach": taught,
        "wagle": localization(taught, "wagle"),
        "weights": localization(taught, "wagle_weights"),
        "unlearn": unlearning(injected, "Oracle", "wga", {"lr": 1e-3, "epochs": 3}),
        "projections": unlearning(injected, "Projections", "wga", {"lr": 1e-3, "epochs": 3}),
        "all": unlearning(injected, "All weights", "wga", {"lr": 1e-3, "epochs": 3}),
        "supervise": supervision(injected, "Oracle", {"lr": 1e-3, "epochs": 2, "batch_size": 8})}
    return found, Store(folder / "runs"), models_of(base, folder / "tokenizer")

@pytest.mark.parametrize(
    "name",
    [
        "base", "judge", "inject", "teach", "wagle", "weights", "unlearn", "projections", "all",
        "supervise"])
def test_predicted_disk_is_what_a_run_keeps(study, name):
    found, store, known = study
    run = store.do(found[name], compute)
    size = sum(f.stat().st_size for f in run.path.rglob("*.safetensors"))
    assert cost_of(known, found[name]).disk == pytest.approx(size, rel=.1, abs=8000)

def test_every_kind_of_run_has_a_cost(study):
    found, _, known = study
    costs = {name: cost_of(known, d) for name, d in found.items()}
    assert all(
        math.isfinite(c.peak) and c.peak > 4 * known.weights and c.layers > 0
        for c in costs.values())
    assert costs["base"].peak > 16 * known.weights, "weights, gradients, two moments"
    assert (
        costs["all"].peak > 20 * known.weights
        and costs["all"].flops > costs["projections"].flops
        and costs["projections"].peak > costs["unlearn"].peak), "and the weights at the start"
    for localizer in methods("localizer"):
        assert cost_of(known, localization(found["teach"], localizer)).peak > 4 * known.weights
    dpo, rmu = (
        cost_of(known, unlearning(found["inject"], "Random", objective, {"lr": 1e-3, "epochs": 3}))
        for objective in ("dpo", "rmu"))
    assert dpo.flops > costs["unlearn"].flops > rmu.flops

def test_a_method_of_ones_own_costs_what_its_decorator_says(study):
    found, _, known = study
    def cost(localizer): return cost_of(known, localization(found["teach"], localizer))
    def own(**about):
        def mine(model): "Rank by place"
        localizer(label="Mine", **about)(mine)
        try: return cost("mine")
        finally: METHODS["localizer"].pop("mine")
    assert own(passes=1) == cost("activations"), "the same passes, the same unit"
    assert own(passes=3).flops == 3 * own(passes=1).flops
    assert own(passes=3).layers == 3 * own(passes=1).layers
    assert own(gradients=True).flops >= 2 * own(passes=1).flops
    assert own(gradients=True).peak > 2 * own(passes=1).peak
    assert own(per_layer=True).flops == 2 * own(passes=1).flops, "of two layers"
    assert own(unit="weights").disk == 32 * own().disk, "one score for each of its entries"

@pytest.mark.parametrize("kind", kinds())
def test_a_page_of_a_kind_of_run_describes_computes_and_counts(kind):
    import ast, inspect
    page = step(kind)
    assert list(inspect.signature(page.compute).parameters) == [
        "description", "parent", "folder", "progress"]
    assert list(inspect.signature(page.cost).parameters) == ["models", "description"]
    assert page.compute.__module__ == page.cost.__module__ == f"unloc.steps.{kind}"
    def describes(node):
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        made = [call for call in calls if getattr(call.func, "id", "") == "described"]
        return any(call.args[0].value == kind for call in made)
    functions = [
        node for node in ast.parse(inspect.getsource(page)).body
        if isinstance(node, ast.FunctionDef)]
    found = {node.name for node in functions if describes(node)}
    assert found, "a function describes a run of this kind"
    assert found <= set(page.__all__), "and it is public"

def test_the_kinds_of_run_are_pages():
    assert {"base", "judge", "inject", "teach", "localize", "unlearn", "attack"} <= set(kinds())

def test_an_attack_has_a_cost(study):
    found, _, known = study
    attack = ATTACK | {"epochs": 2, "batch_size": 4}
    one, more = (
        cost_of(known, attacking(found["unlearn"], attack | {"epochs": n})) for n in (2, 4))
    assert one.peak > 3 * 4 * known.weights and more.flops > one.flops
    mute = cost_of(known, attacking(found["unlearn"], attack | {"epochs": 2, "samples": 0}))
    assert mute.flops < one.flops and mute.layers < one.layers, "no answers are sampled"
    region, wide = (
        cost_of(
            known,
            attacking(found["unlearn"], attack | {"only": f"relearn retain facts, {support}"}))
        for support in ("target region", "all weights"))
    assert 0 < region.flops < wide.flops < one.flops

def test_arms_that_train_more_are_asked_for_by_themselves(study, tmp_path):
    found, _, known = study
    arms = [found[name] for name in ("unlearn", "projections", "all")]
    costs = [cost_of(known, d) for d in arms]
    rows = {
        row.kind: row
        for row in rows_of(
            arms + [attacking(d, ATTACK) for d in arms],
            Store(tmp_path),
            LARGE,
            {run_id(found["base"]): known})}
    assert (
        rows["unlearn"].peak
        == LARGE.memory_of(costs[2].peak)
        > LARGE.memory_of(costs[1].peak)
        > LARGE.memory_of(costs[0].peak))
    assert rows["unlearn"].disk == sum(cost.disk for cost in costs)
    assert rows["attack"].largest[1]["parent"]["arm"] == "All weights"

@pytest.fixture(scope="module")
def counted(
    tmp_path_factory
): # bytes of tensors of whole runs: as planned, and as the same counter finds them in the run
    folder, data = tmp_path_factory.mktemp("counted"), data_description(MODEL["data"])
    world = benchmark(data)
    tokenizer = train_tokenizer(
        (text for f in world.retain + world.forget for text in (f.question, f.answer)), 400)
    for what in models.tiny_model("llama", len(tokenizer), 256, 2, 512, 4).bfloat16(), tokenizer:
        what.save_pretrained(folder / "model")
    base = base_models(
        data,
        "mine",
        {"retained": str(folder / "model"), "original": str(folder / "model"), "template": "plain"},
        {},
        {},
        precision="bfloat16")
    injected = injection(
        standard(base, {"retain": 4, "utility": 2, "max_new_tokens": 4}),
        0,
        {"fraction": .1, "epochs": 1, "lr": 1e-4, "batch_size": 8})
    arms = {
        arm: unlearning(injected, arm, "wga", {"lr": 1e-4, "epochs": 1, "batch_size": 2})
        for arm in ("Oracle", "Projections", "All weights")}
    found = (
        {"inject": injected}
        | arms
        | {
            f"attack on {arm}": attacking(
                d, ATTACK | {"only": "relearn held-out facts, all weights"})
            for arm, d in arms.items()})
    store, known, bytes_of = Store(folder / "runs"), models_of(base, folder / "tokenizer"), {}
    store.do(injected["parent"], compute)
    for name, d in found.items():
        with Memory() as memory: store.do(d, compute)
        bytes_of[name] = cost_of(known, d).peak, memory.most
    return bytes_of

THROUGH = "Oracle", "Projections", "All weights"
@pytest.mark.parametrize(
    "name", ["inject", *THROUGH, *(f"attack on {arm}" for arm in THROUGH)])
def test_predicted_memory_is_what_a_run_holds(counted, name):
    planned, held = counted[name]
    assert planned == pytest.approx(held, rel=.15)

# --- what will run

ATTACK = {"lr": 1e-4, "region_lr": 1e-4, "epochs": 1, "batch_size": 2, "taught": 4}
MODEL = {
    "data": {"name": "world", "n_authors": 4, "n_forget": 1, "n_holdout": 1},
    "model": {"d_model": 16, "n_layers": 2, "d_ff": 64, "n_heads": 2, "vocab_size": 300}}
TABLE2 = NBS / "21_oracle_random.ipynb"

@pytest.mark.parametrize("notebook", sorted(NBS.glob("2*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_says_what_it_wants(notebook, tmp_path):
    found = wanted(
        notebook, MODEL | {"store": str(tmp_path / "runs"), "out": str(tmp_path / "out")})
    assert found
    assert all({"kind", "parent"} <= d.keys() for d in found)
    assert not list(tmp_path.iterdir())

def counts(found): return {row.kind: (row.missing, row.n) for row in found.rows}

def test_counts_are_those_of_the_sweep(tmp_path):
    learn, store = {"epochs": 1, "lr": 1e-3, "batch_size": 32}, tmp_path / "runs"
    values = MODEL | {
        "seeds": 2,
        "pretrain": learn,
        "retain": learn,
        "inject": learn | {"fraction": .1},
        "evaluate": {"retain": 4, "utility": 2, "max_new_tokens": 2},
        "unlearn": {"wga": {"lr": 1e-3, "epochs": 1}}}
    before = plan("p", {TABLE2: values}, store, here=LARGE)
    assert counts(before) == {"base": (1, 1), "judge": (1, 1), "inject": (2, 2), "unlearn": (4, 4)}
    assert not store.exists()
    for d in wanted(TABLE2, values)[:2]: Store(store).do(d, compute) # both arms of the first pair
    assert counts(plan("p", {TABLE2: values}, store, here=LARGE)) == {
        "base": (0, 1), "judge": (0, 1), "inject": (1, 2), "unlearn": (2, 4)}
    for d in wanted(TABLE2, values)[2:]: Store(store).do(d, compute)
    done = plan("p", {TABLE2: values}, store)
    assert done.here is None
    assert not done.problems
    assert text_of(done).splitlines() == [
        "profile p: 1 notebooks, 8 runs, 0 to do",
        "everything is there"]

# --- what stands in the way

def small(here=LARGE, jobs=1, notebook=TABLE2, **values):
    return plan(
        "p",
        {notebook: MODEL | {"seeds": 2, "unlearn": {"wga": {"lr": 1e-3, "epochs": 1}}} | values},
        Path("none"),
        jobs,
        here)

def test_missing_data_is_a_line_of_the_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("UNLOC_TOFU", str(tmp_path / "nowhere"))
    found = plan(
        "tofu",
        {
            notebook: {"data": {"name": "tofu", "forget": "forget10", "n_authors": 200}}
            for notebook in (TABLE2, NBS / "22_trajectories.ipynb")},
        tmp_path,
        here=LARGE)
    assert len(found.problems) == 1
    assert "UNLOC_TOFU=" in found.problems[0]
    assert found.problems[0].endswith("(for 21_oracle_random, 22_trajectories)")
    assert not found.rows
    assert text_of(found).splitlines()[-1].startswith("! UNLOC_TOFU=")

@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_data_that_are_there_are_named(monkeypatch):
    monkeypatch.setenv("UNLOC_TOFU", str(SHARED / "data" / "tofu"))
    found = small(
        notebook=NBS / "20_injection_ratio.ipynb",
        data={"name": "tofu", "forget": "forget01", "n_authors": 4},
        ratios=[.1],
        ratio_seeds=1)
    assert not found.problems
    assert found.needs[0] == f"facts: TOFU, from {SHARED / 'data' / 'tofu'}"
    assert counts(found)["inject"] == (1, 1)

def test_a_bad_setting_is_a_line_of_the_plan():
    line, = small(unlearn={"wga": {"rate": 1}}).problems
    assert line.startswith("unlearn has no setting 'rate'")
    assert line.endswith("(for 21_oracle_random)")

@pytest.mark.parametrize(
    "less, values, says",
    [
        (
            {"disk": 1000},
            {},
            "the disk of the store has 0 MiB free; free some, or choose another place with --store",
        ),
        (
            {"device": ""},
            {"device": "cuda"},
            "the profile asks for a GPU, and torch sees none here"),
        (
            {"memory": 1000},
            {},
            "no smaller batch or region fits; take a smaller model or a larger machine")])
def test_what_a_machine_lacks_is_a_line_of_the_plan(less, values, says):
    found = small(replace(LARGE, **less), **values)
    assert found.problems
    assert all(says in line for line in found.problems)
    assert text_of(found).splitlines()[-1] == f"! {found.problems[-1]}"

def test_what_is_said_to_fit_fits():
    rows = small().rows
    one = max(row.peak for row in rows)
    tight = replace(LARGE, memory=one)
    assert problems_of(rows, tight, 1) == []
    assert {line.split(":")[0] for line in problems_of(rows, tight, 2)} == {"inject", "unlearn"}
    assert all(
        "2 runs at once need" in line and line.endswith("--jobs 1 fits")
        for line in problems_of(rows, tight, 2))
    tight = replace(LARGE, memory=one - 2**19)
    line, = problems_of(rows, tight, 1)
    assert line.startswith("base: a run needs")
    size = int(line.split("batch_size ")[1].split()[0])
    learn = {"epochs": 1, "lr": 4e-3, "batch_size": size}
    assert size < 32
    assert small(tight, pretrain=learn, retain=learn).problems == []
    assert small(tight, pretrain=learn | {"batch_size": 2 * size}).problems != []

# --- existing checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    world = benchmark(MODEL["data"])
    tokenizer = train_tokenizer(
        (text for f in world.retain for text in (f.question, f.answer)), 300)
    models.tiny_model("llama", len(tokenizer), 32, 8, 2048, 2).bfloat16().save_pretrained(
        folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)
    return folder

def test_checkpoints_are_planned_from_their_headers(checkpoint):
    def rows(**model):
        found = small(
            model={"retained": str(checkpoint), "original": str(checkpoint), "template": "plain"}
            | model,
            archs=["mine"],
            precision="bfloat16",
            seeds=1,
            inject={"fraction": .1, "epochs": 1, "lr": 1e-3, "batch_size": 16})
        assert not found.problems
        assert found.needs[1:] == [
            f"mine: {name} model {checkpoint}, there" for name in ("retained", "original")]
        return {row.kind: row for row in found.rows}
    plain, recomputed = rows(), rows(recompute=True)
    assert {kind: row.n for kind, row in plain.items()} == {
        "base": 1, "judge": 1, "inject": 1, "unlearn": 2}
    assert recomputed["inject"].peak < plain["inject"].peak and plain["base"].disk == 0

def test_a_missing_shard_is_a_line_of_the_plan(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "half")
    next(folder.glob("model-00002*")).unlink()
    (line,) = small(
        model={"retained": str(folder), "original": str(checkpoint), "template": "plain"},
        archs=["mine"]).problems
    assert "model-00002" in line
    assert "is missing" in line
    assert line.endswith("(for 21_oracle_random)")


if __name__ == "__main__": measure()
