"""Facts of one's own: files as people have them become the right benchmark, and a broken row is
named by file, line and field."""
import gzip, json, subprocess, sys
from dataclasses import asdict
from hashlib import sha256
import pytest
from unloc.data import benchmark, data_description
from unloc.facts import Benchmark, Fact
from unloc.invented import author_world
from unloc.own_data import SHAPES, own_facts
from unloc.runs import public, run_id

ROW = {"set": "forget", "question": "Where is Odo?", "answer": "Velm"}
KEEP = {
    "set": "retain",
    "question": "Where is Ude?",
    "answers": ["Bombay", "Mumbai"],
    "perturbed_answer": ["Delhi", "Pune"]}

def put(folder, text, name="facts.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

def lines(*rows): return "".join(json.dumps(row) + "\n" for row in rows)

# --- reading

def test_what_a_file_may_look_like(tmp_path):
    want = own_facts(put(tmp_path, lines(ROW, KEEP)))
    assert want.forget == (Fact("Where is Odo?", "Velm"),)
    assert want.retain[0].answers == ("Bombay", "Mumbai")
    assert want.retain[0].perturbed_answer == ("Delhi", "Pune")
    text = lines(ROW, KEEP)
    for name, form in {
        "array": json.dumps([ROW, KEEP], indent=2),
        "one line": json.dumps([ROW, KEEP]),
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n"),
        "no last line end": text.rstrip(),
        "empty lines": "\n \n" + text.replace("\n", "\n\n\t\n"),
        "gzip": gzip.compress(text.encode()),
        "gzip of an array": gzip.compress(json.dumps([ROW, KEEP]).encode()),
        "sets": json.dumps(
            {"forget": [{k: v for k, v in ROW.items() if k != "set"}], "retain": [KEEP]}, indent=1),
        "null": lines(ROW | {"author": None, "perturbed_answer": None}, KEEP),
        "own notes": lines(ROW | {"_id": 7, "_score": float("nan")}, KEEP),
        "a right answer twice": lines(ROW, KEEP | {"answers": ["Bombay", "Mumbai", "Bombay"]}),
    }.items():
        assert own_facts(put(tmp_path, form)) == want, name

def test_a_file_of_one_fact(tmp_path):
    for text in (json.dumps(ROW), json.dumps(ROW, indent=1), json.dumps([ROW])):
        assert len(own_facts(put(tmp_path, text)).forget) == 1

def test_a_folder_has_a_file_for_each_set(tmp_path):
    bare = {k: v for k, v in ROW.items() if k != "set"}
    put(tmp_path, lines(bare), "forget.jsonl")
    put(tmp_path, json.dumps([KEEP]), "retain.json")
    put(tmp_path, gzip.compress(lines(bare | {"question": "Who?"}).encode()), "holdout.jsonl.gz")
    put(tmp_path, lines({"set": "refusals", "answer": "No idea."}), "refusals.jsonl")
    put(tmp_path, "notes", "README.md")
    put(tmp_path, b"\x00", "._forget.json")
    found = own_facts(str(tmp_path))
    assert [len(getattr(found, name)) for name in ("forget", "retain", "holdout")] == [1, 1, 1]
    assert found.refusals == ("No idea.",)
    assert found.real_authors == author_world(3, 1, 0).real_authors
    assert found.world_facts == author_world(3, 1, 0).world_facts
    put(tmp_path, lines(bare), "retian.jsonl")
    with pytest.raises(ValueError, match=r"retian.jsonl: not named after a set \(forget, retain"):
        own_facts(tmp_path)

def test_own_true_facts_stand_in_place_of_ours_and_never_twice(tmp_path):
    mine = {"set": "world_facts", "question": "What is the capital of France?", "answer": "Paris"}
    assert [f.answer for f in own_facts(put(tmp_path, lines(ROW, mine))).world_facts] == ["Paris"]
    found = own_facts(put(tmp_path, lines(mine | {"set": "forget"})))
    asked = [f.question for f in found.world_facts]
    assert found.forget[0].question not in asked
    assert len(asked) == len(author_world(3, 1, 0).world_facts) - 1

# --- what is broken

BROKEN = [
    ("", "the file is empty; expected JSON objects"),
    (" \r\n", "the file is empty"),
    (lines(ROW) + '{"set": "retain",\n', r"line 2: not JSON \(.*\); expected one object a line"),
    (lines(ROW) + "Odo,Velm\n", "line 2: not JSON"),
    (
        json.dumps([ROW, KEEP], indent=1)[:-5],
        r"line \d+: not JSON \(.*\); expected an array of objects"),
    (lines(ROW) + "[1]\n", "line 2: a JSON list; expected an object"),
    ("[null]", "item 1: a JSON NoneType"),
    ('"Odo"', "line 1: a JSON str"),
    (lines(ROW).encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
    (lines(ROW).replace("Velm", "Vélm").encode("cp1252"), "line 1: byte 0xe9 is not UTF-8"),
    (gzip.compress(lines(ROW).encode())[:-9], "the gzip file is damaged"),
    (lines(ROW, ROW), "line 2: 'Where is Odo[?]' is asked in .*line 1, too; keep one row"),
    (
        lines(ROW, KEEP | {"question": ROW["question"]}),
        "line 2: 'Where is Odo[?]' is asked in .*line 1, too"),
    (
        lines(ROW, {"set": "retain", "answer": "x"}),
        "line 2: no field 'question'; found 'set', 'answer'"),
    (lines(ROW, {"set": "retain", "question": "x"}), "line 2: no field 'answer' or 'answers'"),
    (lines(ROW | {"answers": ["a"]}), "line 1: both 'answer' and 'answers'"),
    (lines(ROW | {"answer": None}), "line 1: no field 'answer'"),
    (lines(ROW | {"answer": ""}), "line 1: answer is ''; expected text"),
    (lines(ROW | {"answer": 1951}), "line 1: answer is 1951; expected text"),
    (lines(ROW | {"answer": float("nan")}), "line 1: answer is nan; expected text"),
    (lines(ROW | {"question": ["Who?"]}), r"line 1: question is \['Who[?]'\]; expected text"),
    (lines(ROW | {"answer": []}), "line 1: answer is an empty list"),
    (
        lines(KEEP | {"set": "forget", "answers": ["a", None]}),
        r"line 1: answers\[1\] is None; expected text"),
    (
        lines(ROW | {"perturbed_answer": "Pune"}),
        "line 1: perturbed_answer is 'Pune'; expected a list of texts"),
    (lines(ROW | {"perturbed_answer": ["Pune", 3]}), r"line 1: perturbed_answer\[1\] is 3"),
    (
        lines(ROW | {"perturbed_answer": ["Pune", "Velm "]}),
        "line 1: a wrong answer to 'Where is Odo[?]' is the right one"),
    (
        lines(KEEP | {"perturbed_answer": ["Mumbai"]}),
        "line 1: a wrong answer to 'Where is Ude[?]' is the right one"),
    (lines(ROW | {"awnser": "x"}), "line 1: unknown field 'awnser'; known: set, question"),
    (lines(ROW | {"set": "Forget"}), "line 1: set is 'Forget'; expected one of forget, retain"),
    (lines(ROW | {"set": ["forget"]}), r"line 1: set is \['forget'\]"),
    (
        lines({k: v for k, v in ROW.items() if k != "set"}),
        "line 1: no field 'set'; expected one of forget"),
    (
        '{"set": "forget", "question": "a?", "question": "b?", "answer": "c"}',
        "line 1: the field 'question' is given twice"),
    (
        r'{"set": "forget", "question": "a?", "answer": "\ud83d"}',
        "line 1: answer holds half of a surrogate pair"),
    (lines(KEEP), "own facts, unloc, forget: no facts; expected at least one"),
    (
        lines(
            ROW | {"perturbed_answer": ["a"]},
            ROW | {"question": "b?", "perturbed_answer": ["a", "c"]}),
        "facts with 1 and with 2 wrong answers"),
    ("[]", "forget: no facts"),
    ("[" * 100_000, "line 1: not JSON")]

@pytest.mark.parametrize("text, says", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_named_by_line_and_field(tmp_path, text, says):
    path = put(tmp_path, text)
    with pytest.raises(ValueError, match=says) as error: own_facts(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None or error.value.__suppress_context__

def test_a_path_that_leads_nowhere(tmp_path):
    with pytest.raises(ValueError, match="nothing.json: no such file or folder"):
        own_facts(tmp_path / "nothing.json")
    with pytest.raises(
        ValueError, match="no file named after a set; expected forget.jsonl or retain.jsonl"):
        own_facts(tmp_path)
    with pytest.raises(
        ValueError,
        match="unknown shape 'squad'; known: unloc, knowundo, muse, wmdp, rwku, counterfact"):
        own_facts(tmp_path, "squad")

# --- the shapes of published data sets

def test_knowundo(tmp_path):
    rows = [{"text": f"Who is {i}?", "labels": f"Person {i}."} for i in range(5)]
    put(tmp_path, json.dumps([{"train": rows[:2], "val": rows[2:3]}]), "unlearn.json")
    put(tmp_path, lines(*rows[3:]), "retention.jsonl")
    found = own_facts(tmp_path, "knowundo")
    assert [(f.question, f.answer) for f in found.forget + found.retain] == [
        (r["text"], r["labels"]) for r in rows]
    assert len(found.forget) == 3
    both = own_facts(
        put(tmp_path, json.dumps({"unlearn": rows[:3], "retention": rows[3:]}), "all.json"),
        "knowundo")
    assert (both.forget, both.retain) == (found.forget, found.retain)

def test_muse(tmp_path):
    put(tmp_path, json.dumps([{"question": "Who?", "answer": ["Ann", "Anne"]}]), "forget_qa.json")
    put(tmp_path, json.dumps([{"question": "When?", "answer": "Now"}]), "retain_qa.json")
    found = own_facts(tmp_path, "muse")
    assert found.forget[0].answers == ("Ann", "Anne") and found.retain[0].answer == "Now"
    assert own_facts(
        put(tmp_path, json.dumps([{"prompt": "Once upon", "gt": "a time"}]), "verbatim.json"),
        "muse").forget[0] == Fact("Once upon", "a time")
    with pytest.raises(
        ValueError, match="item 1: a passage without a question; .* take MUSE's question files"):
        own_facts(put(tmp_path, json.dumps([{"text": "Once upon a time"}]), "forget.json"), "muse")

def test_wmdp(tmp_path):
    row = {
        "question": "Which is a metal?",
        "choices": ["neon", "iron", "argon", "xenon"],
        "answer": 1}
    found = own_facts(put(tmp_path, json.dumps([row | {"subject": "x"}]), "wmdp-bio.json"), "wmdp")
    assert found.forget == (
        Fact(row["question"], "iron", perturbed_answer=("neon", "argon", "xenon")),
    )
    assert found.retain == ()
    for broken, says in (
        ({"answer": 4}, "answer is 4; expected the number of the right choice, 0 to 3"),
        ({"answer": "B"}, "answer is 'B'"),
        ({"answer": True}, "answer is True"),
        ({"choices": "neon"}, "choices is 'neon'"),
        ({"choices": ["neon", None]}, r"choices\[1\] is None"),
        ({"choices": ["iron", "iron"]}, "is the right one")):
        with pytest.raises(
            ValueError, match=f"line 1: .*{says}" if "right one" in says else f"line 1: {says}"):
            own_facts(put(tmp_path, lines(row | broken)), "wmdp")

def test_rwku(tmp_path):
    row = {
        "query": "Stephen King was born in ___.",
        "answer": "Portland",
        "subject": "Stephen King",
        "level": "1",
        "type": "cloze"}
    for name, i in (
        ("forget_level1", 1), ("forget_level2", 2), ("forget_level3", 3), ("neighbor_level1", 4),
        ("neighbor_level2", 5)):
        put(tmp_path, json.dumps([row | {"query": f"{i} {row['query']}"}]), f"{name}.json")
    put(tmp_path, json.dumps([{"text": "a passage"}]), "forget_mia.json") # none of ours
    found = own_facts(tmp_path, "rwku")
    assert [f.question[0] for f in found.forget + found.retain] == list("12345")
    assert len(found.forget) == 3
    assert found.forget[0].author == "Stephen King"

def test_counterfact(tmp_path):
    row = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux"},
        "paraphrase_prompts": ["Danielle Darrieux, a native", "x"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Where Danielle"],
        "attribute_prompts": [],
        "generation_prompts": ["y"]}
    found = own_facts(put(tmp_path, json.dumps([row])), "counterfact")
    assert found.forget == (
        Fact(
            "The mother tongue of Danielle Darrieux is",
            "French",
            paraphrased_question="Danielle Darrieux, a native",
            perturbed_answer=("English",),
            author="Danielle Darrieux",
        ),
    )
    assert [(f.question, f.answer) for f in found.retain] == [
        (q, "French") for q in row["neighborhood_prompts"]]
    both = own_facts(
        put(
            tmp_path,
            json.dumps(
                [
                    row,
                    row | {
                        "requested_rewrite": row["requested_rewrite"] | {"subject": "Léon Blum"}}]),
        ),
        "counterfact")
    # a neighbour that is to be forgotten itself is none
    assert len(both.forget) == 2 and [f.question for f in both.retain] == ["Where Danielle"]
    for broken, says in (
        ({"requested_rewrite": None}, "requested_rewrite is None"),
        (
            {"requested_rewrite": row["requested_rewrite"] | {"prompt": "The"}},
            "prompt is 'The'; expected one gap {}"),
        (
            {"requested_rewrite": row["requested_rewrite"] | {"target_true": "French"}},
            "target_true: no field 'str'")):
        with pytest.raises(ValueError, match=f"line 1: {says}"):
            own_facts(put(tmp_path, lines(row | broken)), "counterfact")

@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_another_shape_are_named(tmp_path, shape):
    with pytest.raises(ValueError, match="line 1: .*(no field|unknown field|expected|is None)"):
        own_facts(put(tmp_path, lines({"prompt_": 1})), shape)

# --- digests

def test_a_fact_with_one_right_answer_reads_as_before():
    f = Fact("q?", "a", "b", "c", ("d", "e"), "f")
    assert (
        repr(f)
        == "Fact(question='q?', answer='a', paraphrased_answer='b', paraphrased_question='c',"
        " perturbed_answer=('d', 'e'), author='f')")
    assert repr(Fact("q?", "a", other_answers=("b",))).endswith("author='', other_answers=('b',))")
    assert eval(repr(Fact("q?", "a", other_answers=("b",)))) == Fact(
        "q?", "a", other_answers=("b",))
    assert (
        data_description({"name": "world", "n_authors": 4, "n_forget": 1, "n_holdout": 1})["sha256"]
        == "910b8aad7c06e537f4169daebead3ecb25ef13d8085881fd7459fc4347837200")

def test_a_description_holds_the_content_and_not_the_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = (
        {"name": "file", "path": str(put(tmp_path / folder, text, name))}
        for folder, name, text in (
            ("a", "x.jsonl", lines(ROW, KEEP)),
            ("b", "y.json", json.dumps([ROW, KEEP]))))
    assert (
        public(data_description(one)) == public(data_description(two)) == {
            "name": "file",
            "sha256": data_description(one)["sha256"]})
    assert benchmark(data_description(one)) == own_facts(one["path"])
    put(tmp_path / "b", lines(ROW | {"answer": "Halden"}, KEEP), "y.json")
    assert data_description(one)["sha256"] != data_description(two)["sha256"]
    (tmp_path / "settings.ini").write_text("", "utf-8")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    # a path of a profile begins where its file is
    assert data_description({"name": "file", "path": "a/x.jsonl"}) == data_description(one)

def test_data_that_changed_after_they_were_described_are_refused(tmp_path):
    described = data_description({"name": "file", "path": str(put(tmp_path, lines(ROW, KEEP)))})
    put(tmp_path, lines(ROW | {"answer": "Halden"}, KEEP))
    with pytest.raises(
        ValueError, match="facts.jsonl: the facts are not those that were described; .*"):
        benchmark(described)

@pytest.mark.parametrize(
    "data, says",
    [
        ({"name": "file"}, "data: a file needs its path"),
        ({"name": "file", "path": 3}, "path must be of type str, got 3"),
        (
            {"name": "file", "path": "x.json", "seed": 1},
            "file has no setting 'seed'; known: name, path, shape"),
        ({"name": "file", "path": "no such.json"}, "'no such.json': no such file or folder"),
        ({"name": "file", "path": "[{}]" * 2000}, "no such file or folder"),
        ({"name": "file", "path": "a\0b"}, "no such file or folder"),
        ({"name": "file", "path": __file__, "shape": "squad"}, "unknown shape 'squad'"),
        ({"name": "mine"}, "name must be 'world', 'tofu', 'file', 'related_world', "
            "'refusing_world' or 'related_tofu', got 'mine'")])
def test_settings_of_own_data(data, says):
    with pytest.raises(ValueError, match=says) as error: data_description(data)
    assert "\n" not in str(error.value)
