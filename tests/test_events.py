"""Trajectories for TensorBoard: what is written while a sweep goes on is what the store holds, read
back from the records by their checksums."""
import json, os, struct, subprocess, sys
from collections import defaultdict
from pathlib import Path
import pytest

from unloc.events import event_name, events, points, write_events
from unloc.runs import Store, sweep

ROOT = Path(__file__).resolve().parents[1]

def compute(description, parent, folder, progress):
    (folder / "result.json").write_text("{}", "utf-8")
    if description["kind"] == "first": return
    lines = ["epoch,metric,value", "0,loss,"]
    lines += [f"{epoch},FS,{epoch / 3}" for epoch in range(4)] + ["2,loss,1.5"]
    (folder / "trajectory.csv").write_text("\n".join(lines) + "\n", "utf-8")

RUNS = [
    {"kind": "unlearn", "objective": "wga", "arm": arm, "seed": 1, "parent": {"kind": "first"}}
    for arm in ("Oracle", "All weights")]

def records(file): # each event of a file, whose checksums are compared
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    from tensorboardX.record_writer import masked_crc32c
    data = file.read_bytes()
    while data:
        size, = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        body, check = data[12:12 + size], data[12 + size:16 + size]
        assert struct.unpack("<I", check) == (masked_crc32c(body),)
        yield proto.Event.FromString(body)
        data = data[16 + size:]

def read(folder): # tag: its points; and the texts
    found, texts = defaultdict(list), []
    file, = folder.iterdir()
    for event in records(file):
        for value in event.summary.value:
            point = event.step, value.simple_value
            if value.HasField("simple_value"): found[value.tag].append(point)
            else: texts += value.tensor.string_val
    return dict(found), texts

@pytest.fixture
def board(tmp_path, monkeypatch): # where events go
    pytest.importorskip("tensorboardX", reason="pip install -e '.[tensorboard]'")
    monkeypatch.setenv("UNLOC_TENSORBOARD", str(tmp_path / "board"))
    return tmp_path / "board"

def test_a_sweep_writes_what_its_runs_went_through(board, tmp_path):
    done = sweep(Store(tmp_path / "runs"), RUNS, compute=compute)
    assert {f.name for f in board.iterdir()} == {
        f"unlearn-wga-{arm}-seed_1-{run.path.name}"
        for arm, run in zip(("Oracle", "All_weights"), done)}
    for run in done:
        found, (text,) = read(board / event_name(run.description, run.path.name))
        fs = [(epoch, pytest.approx(epoch / 3)) for epoch in range(4)]
        assert found == {"trajectory/FS": fs, "trajectory/loss": [(2, 1.5)]}
        told = json.loads(text.decode().removeprefix("```json\n").removesuffix("\n```"))
        assert told["arm"] == run.description["arm"] and told["parent"] == {"kind": "first"}

def test_each_run_is_there_before_the_next_begins(board, tmp_path):
    seen = []
    def looking(description, parent, folder, progress):
        seen.append(len(list(board.iterdir())))
        compute(description, parent, folder, progress)
    sweep(Store(tmp_path / "runs"), RUNS, compute=looking)
    assert seen == [0, 0, 1]

def test_runs_that_are_there_already_are_shown_once(board, tmp_path, monkeypatch):
    monkeypatch.delenv("UNLOC_TENSORBOARD")
    done = sweep(Store(tmp_path / "runs"), RUNS, compute=compute)
    assert not board.exists()
    monkeypatch.setenv("UNLOC_TENSORBOARD", str(board))
    for _ in range(2): sweep(Store(tmp_path / "runs"), RUNS, compute=compute)
    assert [len(list(folder.iterdir())) for folder in board.iterdir()] == [1, 1]
    assert write_events(done[0].path, board) is None, "it is there"
    assert write_events(tmp_path, board) is None and points(tmp_path) == []

def test_the_command_takes_a_folder_from_where_the_person_stands(board, tmp_path, monkeypatch):
    from unloc import cli
    monkeypatch.delenv("UNLOC_PROJECT", raising=False)
    monkeypatch.setenv("UNLOC_TENSORBOARD", "board")
    monkeypatch.chdir(tmp_path)
    seen, before = [], dict(os.environ)
    monkeypatch.setattr(cli, "show", lambda root: seen.append(dict(os.environ)))
    assert cli.main(["list"]) == 0
    own = {"UNLOC_PROJECT": str(ROOT), "UNLOC_TENSORBOARD": str(board)}
    assert seen == [before | own]
    assert dict(os.environ) == before, "a call leaves the environment as it was"

def test_a_place_that_cannot_be_is_one_line_before_anything_runs(board, tmp_path, monkeypatch):
    board.write_text("", "utf-8")
    with pytest.raises(ValueError, match="UNLOC_TENSORBOARD=.*; name a folder that can be made"):
        sweep(Store(tmp_path / "runs"), RUNS, compute=compute)
    assert not (tmp_path / "runs").exists()

def test_a_missing_writer_is_one_line_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLOC_TENSORBOARD", str(tmp_path / "board"))
    monkeypatch.setattr("unloc.events.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"tensorboardX; .*pip install -e '\.\[tens"):
        sweep(Store(tmp_path / "runs"), RUNS, compute=compute)
    assert list(tmp_path.iterdir()) == []

def test_nobody_needs_the_writer_who_did_not_ask(tmp_path, monkeypatch):
    monkeypatch.delenv("UNLOC_TENSORBOARD", raising=False)
    code = "import sys, unloc.runs; print('tensorboardX' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout == "False\n" and events()(tmp_path) is None
