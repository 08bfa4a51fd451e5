"A packed store comes out as it went in, and a cut or altered archive leaves nothing half unpacked."
import json, zipfile
import pytest, torch
from safetensors.torch import save_file
from unloc.runs import DamagedRun, Store, run_id
from unloc.transport import is_weights, pack, unpack


def compute(description, parent, folder, progress):
    (folder / "result.json").write_text(json.dumps({"n": description["n"]}), "utf-8")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", "utf-8")
    save_file({"w": torch.full((64,), float(description["n"]))}, folder / "model" / "m.safetensors")
    save_file({"region": torch.ones(4, dtype=torch.bool)}, folder / "region.safetensors")

def diverge(description, parent, folder, progress): raise FloatingPointError("the loss is nan")

FIRST = {"kind": "base", "n": 1}
SECOND = {"kind": "unlearn", "n": 2, "parent": FIRST}

@pytest.fixture
def there(tmp_path):
    store = Store(tmp_path / "there")
    store.do(SECOND, compute)
    return store

def content(root):
    files = [f for f in root.rglob("*") if f.is_file() and "locks" not in f.parts]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files}

def test_with_weights_a_store_comes_out_as_it_went_in(there, tmp_path):
    packed = pack(there, tmp_path / "all.zip", weights=True)
    here = Store(tmp_path / "here")
    assert sorted(unpack(tmp_path / "all.zip", here).new) == sorted(packed.runs)
    assert content(here.root) == content(there.root)
    assert here[SECOND].json() == {"n": 2}

def test_without_weights_results_are_read_and_weights_are_missed_by_name(there, tmp_path):
    pack(there, tmp_path / "some.zip")
    here = Store(tmp_path / "here")
    unpack(tmp_path / "some.zip", here)
    assert SECOND in here and here[SECOND].tensors("region.safetensors")["region"].all()
    with pytest.raises(
        ValueError, match="came without model/m.safetensors; pack it with its weights"):
        here[FIRST].file("model/m.safetensors")
    name = run_id(FIRST)
    (here.root / name / "result.json").write_text("{}", "utf-8")
    with pytest.raises(DamagedRun, match=f"run {name}: result.json has 2 bytes"): here[FIRST]

def test_the_same_runs_give_the_same_bytes_and_come_back_whole(there, tmp_path):
    for name in "ab": pack(there, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    here = Store(tmp_path / "here")
    unpack(tmp_path / "a", here)
    before = content(here.root)
    assert unpack(tmp_path / "a", here).new == [] and content(here.root) == before

def test_a_run_that_diverged_travels_as_such(tmp_path):
    store = Store(tmp_path / "there")
    store.do(FIRST, diverge)
    pack(store, tmp_path / "x")
    here = Store(tmp_path / "here")
    unpack(tmp_path / "x", here)
    assert here[FIRST].diverged == "the loss is nan"

@pytest.mark.parametrize("share", [0, .01, .3, .9, .999])
def test_an_archive_that_was_cut_short_is_refused_and_writes_nothing(share, there, tmp_path):
    pack(there, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(ValueError, match="cut is no archive of runs, or was cut short"):
        unpack(tmp_path / "cut", Store(tmp_path / "here"))
    assert not (tmp_path / "here").exists()

def altered(source, to, edit): # the archive made anew, so its own checksums agree
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            for n, text in edit(name, old.read(name)): new.writestr(n, text)

def test_a_file_that_was_altered_is_named_and_its_run_does_not_appear(there, tmp_path):
    pack(there, tmp_path / "whole")
    name = run_id(SECOND)
    def edit(n, text):
        return [(n, text.replace(b"2", b"3") if n == f"{name}/result.json" else text)]
    altered(tmp_path / "whole", tmp_path / "bad", edit)
    here = Store(tmp_path / "here")
    with pytest.raises(
        DamagedRun, match=f"run {name}: result.json was altered .* in the archive; unpack a whole"):
        unpack(tmp_path / "bad", here)
    assert SECOND not in here and not list(here.root.glob("*.partial"))
    unpack(tmp_path / "whole", here)
    assert here[SECOND].json() == {"n": 2}

def test_flipped_bytes_of_the_archive_are_noticed(there, tmp_path):
    pack(there, tmp_path / "whole", weights=True)
    whole = bytearray((tmp_path / "whole").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole") as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("m.safetensors"))
    at = entry.header_offset + 30 + len(entry.filename) + entry.file_size // 2
    whole[at] ^= 255
    (tmp_path / "flipped").write_bytes(whole)
    with pytest.raises(DamagedRun, match="is damaged in the archive"):
        unpack(tmp_path / "flipped", Store(tmp_path / "here"))

@pytest.mark.parametrize(
    "name",
    ["../escape", "/root", "0123456789abcdef/../../x", "notes.txt", "0123456789abcdef/a\\..\\b"])
def test_an_archive_of_something_else_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive: archive.writestr(name, "x")
    with pytest.raises(ValueError, match="holds an entry of another kind"):
        unpack(tmp_path / "z", Store(tmp_path / "here"))
    assert not (tmp_path / "here").exists()

def test_a_run_under_another_name_is_refused(there, tmp_path):
    pack(there, tmp_path / "whole")
    name = run_id(SECOND)
    def edit(n, text): return [(n.replace(name, "0123456789abcdef"), text)]
    altered(tmp_path / "whole", tmp_path / "bad", edit)
    with pytest.raises(DamagedRun, match=f"run 0123456789abcdef has the description of {name}"):
        unpack(tmp_path / "bad", Store(tmp_path / "here"))

def test_wrong_places_are_one_line(there, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such store"):
        pack(Store(tmp_path / "no"), tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no finished run"):
        pack(Store(tmp_path / "empty"), tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        unpack(tmp_path / "no.zip", there)
    (there.root / run_id(SECOND) / "result.json").unlink()
    with pytest.raises(DamagedRun, match="lacks result.json"): pack(there, tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))

def test_models_are_known_by_their_folder():
    files = ["a/config.json", "a/x.safetensors", "b/x.safetensors", "others_columns.safetensors"]
    assert [is_weights(f, files) for f in files] == [False, True, False, True]
