"""As jobs of a batch system a sweep gives the files of one process; what is wrong with a run, a
job or the place is one line that costs no finished run. The jobs are submitit's own, on this
machine."""
import json, os, platform, stat, sys, time
from pathlib import Path
import pytest

from unloc import cli
from unloc.cluster import slurm
from unloc.pages import sweep
from unloc.runs import Store, run_id

NODE = f"node {platform.node()}: "

@pytest.fixture
def jobs(monkeypatch):
    pytest.importorskip("submitit", reason="pip install -e '.[slurm]'")
    import cloudpickle
    from submitit.core.core import Job
    cloudpickle.register_pickle_by_value(sys.modules[__name__]) # a job does not find this file
    monkeypatch.setattr(Job, "_results_timeout_s", .5, raising=False) # of a slow file system
    monkeypatch.setenv("UNLOC_ENGINE", "slurm")
    monkeypatch.setenv("UNLOC_SLURM", '{"cluster": "local", "timeout_min": 5}')
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

def numbered(*ns): return [{"kind": "number", "n": n} for n in ns]

def write(description, parent, folder, progress):
    progress(.5)
    n = description["n"] if description["kind"] == "number" else parent.json()["n"] ** 2
    (folder / "result.json").write_text(json.dumps({"n": n}), "utf-8")

def logging(path, do): # a compute whose calls are lines: name, process, what it is told
    def compute(description, parent, folder, progress):
        told = os.environ.get("UNLOC_PROGRESS")
        with open(path, "a", encoding="utf-8") as f:
            f.write(f"{run_id(description)} {os.getpid()} {told}\n")
        do(description, parent, folder, progress)
    return compute

def lines(path): return Path(path).read_text("utf-8").splitlines()

def files(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(Path(root).rglob("*"))
        if f.is_file() and f.relative_to(root).parts[0] != "locks"}

def test_a_sweep_gives_the_files_of_one_process(jobs, tmp_path, monkeypatch):
    squares = [{"kind": "square", "parent": d} for d in numbered(2, 3)]
    monkeypatch.setenv("UNLOC_PROGRESS", str(tmp_path / "events"))
    sweep(Store(tmp_path / "far"), squares, -1, logging(str(tmp_path / "log"), write))
    events = [json.loads(line) for line in lines(tmp_path / "events")]
    monkeypatch.setenv("UNLOC_ENGINE", "local")
    sweep(Store(tmp_path / "near"), squares, 1, write)
    assert files(tmp_path / "far") == files(tmp_path / "near")
    said = [line.split() for line in lines(tmp_path / "log")]
    assert len({process for _, process, _ in said} - {str(os.getpid())}) == 4, "a job for each"
    assert {told for *_, told in said} == {"None"}
    done = [event["run"] for event in events if "run" in event]
    assert sorted(done) == sorted(name for name, *_ in said)
    left = [f for f in (tmp_path / "far" / "locks").iterdir() if f.name.startswith("sweep-")]
    assert left == [], "no script or message is left of jobs that ended well"

def test_the_error_of_a_run_is_that_of_one_machine(jobs, tmp_path):
    def bad(description, parent, folder, progress):
        if description["n"] == 1: raise ValueError("unlearn has no setting 'beta'; known: lr")
        write(description, parent, folder, progress)
    store = Store(tmp_path / "s")
    with pytest.raises(ValueError) as error: sweep(store, numbered(1), 1, bad)
    assert str(error.value) == f"{NODE}unlearn has no setting 'beta'; known: lr"
    sweep(store, numbered(0), 1, bad)
    assert numbered(0)[0] in store and numbered(1)[0] not in store

def test_a_run_that_takes_its_jobs_with_it_is_given_up(jobs, tmp_path):
    def crash(description, parent, folder, progress):
        if description["n"]: os._exit(1)
        write(description, parent, folder, progress)
    store, log = Store(tmp_path / "s"), tmp_path / "log"
    with pytest.raises(RuntimeError, match="^1 runs were lost with their workers in three rounds"):
        sweep(store, numbered(0, 1), -1, logging(str(log), crash))
    calls = [line.split()[0] for line in lines(log)]
    assert numbered(0)[0] in store
    assert [calls.count(run_id(d)) for d in numbered(0, 1)] == [1, 4]

def test_a_sweep_that_ends_takes_its_jobs_back(jobs, tmp_path):
    def slow(description, parent, folder, progress):
        if not description["n"]: raise ValueError("no")
        time.sleep(120)
    began = time.monotonic()
    with pytest.raises(ValueError): sweep(Store(tmp_path / "s"), numbered(0, 1), -1, slow)
    log = [f.read_text("utf-8") for f in (tmp_path / "s" / "locks").rglob("*_log.err")]
    assert time.monotonic() - began < 110 and len(log) == 2

# --- a place without Slurm

@pytest.mark.parametrize("value, says", [
    ("gpu", "UNLOC_SLURM must be an object in JSON, such as"),
    ('["gpu"]', "UNLOC_SLURM must be an object in JSON, such as"),
    ('{"slurm_partition": "gpu"}', "there is no srun here; start the command where jobs are")])
def test_a_place_where_no_job_can_be_submitted_is_one_line(
    value, says, jobs, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("UNLOC_SLURM", value)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = "--engine", "slurm", "--store", str(tmp_path / "s"), "--out", str(tmp_path / "o")
    assert cli.main(["reproduce", "--profile", "smoke", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"unloc: {says}") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []

def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("unloc.cluster.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"submitit; .*pip install -e '\.\[slurm\]'"):
        slurm()

def test_a_persons_settings_come_over_ours(jobs, tmp_path, monkeypatch):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n", "utf-8")
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("UNLOC_SLURM", '{"slurm_partition": "gpu", "timeout_min": 60}')
    assert slurm() == {
        "cluster": "slurm", "timeout_min": 60, "cpus_per_task": 1, "slurm_partition": "gpu"}
