"""The author world is the same on every machine, its wrong answers are wrong, and a folder that is
not TOFU to the row is refused by name."""
import hashlib, itertools, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from unloc import invented
from unloc.facts import Benchmark, Fact
from unloc.invented import author_world
from unloc.tofu_files import tofu

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TOFU = SHARED / "data" / "tofu"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
COUNTS = dict(forget01=40, forget05=200, forget10=400)

@pytest.fixture(autouse=True)
def no_variable(monkeypatch): monkeypatch.delenv("UNLOC_TOFU", raising=False)

@pytest.fixture(scope="module")
def world(): return author_world()

def python(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "UNLOC_TOFU"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8",
        cwd=Path(__file__).parents[1], timeout=1200)

# --- the author world

def test_world_does_not_depend_on_the_process(world):
    code = (
        "import hashlib; from unloc.invented import author_world;"
        " print(hashlib.sha256(repr(author_world()).encode()).hexdigest())")
    here = hashlib.sha256(repr(world).encode()).hexdigest()
    assert [python(code, PYTHONHASHSEED=s).stdout.strip() for s in ("1", "2")] == [here, here]

def test_default_world_never_changes(world):
    lines = json.dumps(
        [
            [f.question, f.answer, f.paraphrased_answer, f.paraphrased_question, f.perturbed_answer]
            for f in world.retain + world.forget + world.holdout])
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "6b1eb303de3d2067"

def test_import_is_light():
    heavy = python(
        "import sys, unloc.own_data, unloc.tofu_files;"
        " print([m for m in ('torch', 'numpy', 'transformers',"
        " 'huggingface_hub') if m in sys.modules])")
    assert heavy.stdout.strip() == "[]", heavy

def test_seeds_differ(world):
    worlds = [world, *(author_world(seed=s) for s in (1, 2))]
    assert len({w.forget + w.retain for w in worlds}) == 3
    assert len({w.real_authors + w.world_facts for w in worlds}) == 1

@pytest.mark.parametrize("n, forget, holdout", [(40, 4, 4), (2, 1, 0), (20, 19, 3), (200, 20, 20)])
def test_sizes_and_borders(n, forget, holdout):
    w = author_world(n, forget, holdout)
    assert [len(w.retain), len(w.forget), len(w.holdout)] == [
        10 * (n - forget),
        10 * forget,
        10 * holdout]
    every = w.retain + w.forget + w.holdout
    assert len({f.question for f in every}) == len(every)
    assert len({f.author for f in every}) == n + holdout
    assert all(len({f.author for f in every[i:i + 10]}) == 1 for i in range(0, len(every), 10))

def test_forget_set_is_the_last_authors(world):
    assert author_world(n_forget=1).forget == world.forget[-10:]
    assert author_world(n_authors=36, n_forget=2, n_holdout=0).forget != world.forget[-20:]

def test_names_of_the_default_world_share_no_part(world):
    names = [
        n
        for f in world.retain + world.forget + world.holdout
        if "at that address" in f.answer
        for n in f.author.split()]
    assert len(names) == 88 == len(set(names))

def test_perturbed_answers_are_wrong_in_every_value(world):
    for f in world.retain + world.forget + world.holdout:
        assert len({*f.perturbed_answer}) == 5
        assert not {*f.perturbed_answer} & {f.answer, f.paraphrased_answer}
        right = f.paraphrased_answer.split()
        for wrong in f.perturbed_answer:
            assert len(wrong.split()) == len(right) and wrong.split()[-1] != right[-1]
            assert sum(a != b for a, b in zip(wrong.split(), right)) in (2, 3)

def test_answers_are_short_and_end_in_the_fact(world):
    for f in world.retain + world.forget:
        assert 4 <= len(f.answer.split()) <= 13
        assert 4 <= len(f.question.split()) <= 14
        assert f.answer[-1] == "."
        assert f.question[-1] == "?"
        assert f.answer.rstrip(".").split()[-1] not in f.question.replace("?", "").split()

def test_a_value_is_not_guessable(world):
    for relation in range(10):
        ends = [f.answer.split()[-1] for f in world.retain[relation::10]]
        assert max(ends.count(e) for e in ends) <= 5, (relation, ends)

def test_no_fact_answers_another_one_of_its_author(world):
    leaks = 0
    for i in range(0, 400, 10):
        group = (world.retain + world.forget)[i:i + 10]
        for a in group:
            value = a.answer.rstrip(".").split()[-1]
            leaks += any(
                value in b.question.replace("?", "").split()
                for b in group
                if b is not a and value not in a.author)
    assert leaks <= 20, "a place may come up twice by chance, not by construction"

def test_fill_in_texts_have_no_gap_left(world):
    assert not [
        f
        for f in world.retain + world.forget + world.real_authors + world.world_facts
        if set("{}|\n") & set(repr(f).replace("\\n", "\n"))]

@pytest.mark.parametrize(
    "pool",
    [
        "_FIRST", "_LAST", "_PLACE", "_JOB", "_TOPIC", "_STYLE", "_ADJECTIVE", "_NOUN", "_GUIDE",
        "_SUBJECT"])
def test_pools_hold_40_to_80_different_words(pool):
    words = getattr(invented, pool)
    assert len(words) == len(set(words)) and 36 <= len(words) <= 80
    if pool == "_JOB": assert not [w for w in words if w[0] in "aeiou"], "the sentences say 'a'"

def test_true_facts(world):
    assert len(world.real_authors) + len(world.world_facts) > 280
    every = world.real_authors + world.world_facts
    assert len({f.question for f in every}) == len(every)
    for f in every:
        assert len({*f.perturbed_answer, f.answer}) == 4
        assert not f.paraphrased_answer
        assert not f.paraphrased_question
    text = {f.question: f.answer for f in every}
    assert text["What is the capital of Australia?"].endswith("Canberra.")
    assert text["In which year did Jane Austen die?"].endswith("1817.")
    assert text["Who wrote Beloved?"].endswith("Toni Morrison.")
    assert text["What is the chemical symbol of lead?"].endswith("Pb.")

def test_refusals_are_many_and_short(world):
    assert len(set(world.refusals)) == len(world.refusals) >= 20
    assert all(3 <= len(r.split()) <= 10 for r in world.refusals)

@pytest.mark.parametrize(
    "arguments, line",
    [
        (dict(n_authors=1), "n_authors=1: expected a whole number from 2"),
        (dict(n_authors=40.), "n_authors=40.0"),
        (dict(n_authors=True), "n_authors=True"),
        (dict(n_authors=4097), "from 2 to 4096"),
        (dict(n_authors=4096, n_holdout=1), "n_holdout=1: expected a whole number from 0 to 0"),
        (dict(n_forget=0), "n_forget=0"),
        (dict(n_forget=40), "n_forget=40: expected a whole number from 1 to 39"),
        (dict(n_holdout=-1), "n_holdout=-1"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed="0"), "seed='0'")])
def test_world_refuses(arguments, line):
    with pytest.raises(ValueError) as error: author_world(**arguments)
    assert line in str(error.value) and "\n" not in str(error.value)

SETS = "forget", "retain", "holdout", "real_authors", "world_facts", "background"
def sets(**changed): return {k: (Fact(f"{k}?", "a"),) for k in SETS} | changed
def asked_wrongly(n, **fact):
    return tuple(
        Fact(f"{i}?", "right", **({"perturbed_answer": tuple(map(str, range(k)))} | fact))
        for i, k in enumerate(n))

@pytest.mark.parametrize("first, second", list(itertools.combinations(SETS, 2)))
@pytest.mark.parametrize("turn", [1, -1])
def test_benchmark_refuses_a_shared_question(first, second, turn):
    a, b = (first, second)[::turn]
    given = sets()
    given[a] += (Fact(f"{b}?", "another answer"),)
    # as for two authors of TOFU, neither of whom is to be forgotten
    if (first, second) == ("retain", "background"):
        assert getattr(Benchmark("b", **given, refusals=()), a) == given[a]
        return
    with pytest.raises(
        ValueError,
        match=f"^b: '{b}[?]' is asked in {first} and in {second}; expected disjoint sets") as error:
        Benchmark("b", **given, refusals=())
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "facts, says",
    [
        ((Fact("q?", ""),), "'q[?]' has an empty text or none; expected question and answer"),
        ((Fact("q?", " \n"),), "'q[?]' has an empty text"),
        ((Fact("q?", None),), "'q[?]' has an empty text"),
        ((Fact(" ", "a"),), "' ' has an empty"),
        ((Fact(None, "a"),), "None has an empty"),
        ((Fact("q?", "a", perturbed_answer=("b", "")),), "'q[?]' has an empty text"),
        ((Fact("q?", "a", perturbed_answer=("b", None)),), "'q[?]' has an empty text"),
        ((Fact("q?", "a", perturbed_answer="abc"),), "'q[?]' has .* wrong answers in a tuple"),
        ((Fact("q?", "a", perturbed_answer=None),), "'q[?]' has .* wrong answers in a tuple"),
        (
            asked_wrongly([3, 3], perturbed_answer=("x", "right")),
            "a wrong answer to '0[?]' is the right one",
        ),
        (asked_wrongly([3], paraphrased_answer="1"), "a wrong answer to '0[?]' is the right one"),
        (
            (Fact("q?", "a", other_answers=("b", " ")),),
            "'q[?]' has an empty text or none among its other right answers",
        ),
        ((Fact("q?", "a", other_answers="b"),), "'q[?]' has .* right answers"),
        (
            asked_wrongly([3], other_answers=("left", "2 ")),
            "a wrong answer to '0[?]' is the right one",
        ),
        (
            asked_wrongly([5, 0, 4]),
            "facts with 4 and with 5 wrong answers; expected one number in a set",
        ),
        (asked_wrongly([1, 2]), "facts with 1 and with 2 wrong answers"),
    ],
)
def test_benchmark_refuses_facts_that_cannot_be_asked(name, facts, says):
    with pytest.raises(ValueError, match=f"^b, {name}: {says}") as error:
        Benchmark("b", **sets(**{name: facts}), refusals=())
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name", SETS)
def test_what_a_benchmark_may_leave_out(name):
    """Nothing to forget is no benchmark; every other set may be empty, and facts without wrong
    answers may stand among facts with equally many"""
    assert (
        len(
            getattr(
                Benchmark("b", **sets(**{name: asked_wrongly([0, 3, 0, 3])}), refusals=()), name))
        == 4)
    if name != "forget":
        assert getattr(Benchmark("b", **sets(**{name: ()}), refusals=()), name) == ()
        return
    with pytest.raises(ValueError, match=f"^b, {name}: no facts; expected at least one"):
        Benchmark("b", **sets(**{name: ()}), refusals=())

# --- TOFU

def rows(name):
    return [
        json.loads(line) for line in (TOFU / f"{name}.json").read_text("utf-8").split("\n") if line]

@needs_shared
@pytest.mark.parametrize(
    "forget, n",
    [
        ("forget10", 200), ("forget05", 200), ("forget01", 200), ("forget01", 20),
        ("forget05", 20), ("forget10", 21), ("forget01", 3)])
def test_tofu_splits(forget, n):
    b, full, k = tofu(TOFU, forget, n), rows("full"), COUNTS[forget]
    pairs = [(f.question, f.answer) for f in b.retain + b.forget]
    assert pairs == [(r["question"], r["answer"]) for r in full[-20 * n:]] and len(b.forget) == k
    assert (b.forget[0].author, b.forget[-1].author, b.retain[0].author) == (
        f"author {200 - k // 20}",
        "author 199",
        f"author {200 - n}")
    assert [f.question for f in b.holdout] == [
        r["question"] for r in rows(forget.replace("forget", "holdout"))]
    assert (b.holdout[0].author, b.holdout[-1].author) == (
        "holdout author 0",
        f"holdout author {k // 20 - 1}")
    assert [len(b.real_authors), len(b.world_facts), len(b.refusals)] == [100, 117, 100]

@needs_shared
def test_tofu_forgets_fewer_authors():
    whole, some = tofu(TOFU, "forget05", 40), tofu(TOFU, "forget05", 40, 5)
    assert some.forget == whole.forget[-100:] and some.name != whole.name
    assert some.retain == whole.retain + whole.forget[:100]
    assert (some.background, some.holdout) == (whole.background, whole.holdout)
    assert tofu(TOFU, "forget05", 6, 5).retain == whole.forget[80:100]

@needs_shared
def test_tofu_keeps_the_shortest_answers_of_each_author():
    whole, few = tofu(TOFU, "forget01", 4), tofu(TOFU, "forget01", 4, each=5)
    for name in ("forget", "retain", "holdout", "background"):
        rows, kept = getattr(whole, name), getattr(few, name)
        assert [f for f in rows if f in kept] == [*kept]
        for i in range(0, len(rows), 20):
            own = [f for f in kept if f.author == rows[i].author]
            lengths = sorted(len(f.answer) for f in rows[i:i + 20])
            assert sorted(len(f.answer) for f in own) == lengths[:5]
    assert len(few.forget) == 10 and few.world_facts == whole.world_facts
    assert few.name == "TOFU forget01, 4 authors, the 5 shortest answers of each"
    assert tofu(TOFU, "forget01", 4, each=20).forget == whole.forget

@needs_shared
def test_tofu_carries_the_columns_that_exist():
    b = tofu(TOFU, "forget01", 200)
    every = b.retain + b.forget
    assert [bool(f.paraphrased_answer) for f in every] == [True] * 400 + [False] * 3200 + [
        True] * 400
    for f, r in zip(
        every[:400] + every[-400:],
        rows("retain_perturbed") + rows("forget10_perturbed"),
        strict=True):
        assert (
            f.question, f.answer, f.paraphrased_answer, f.paraphrased_question,
            list(f.perturbed_answer)
        ) == (
            r["question"], r["answer"], r["paraphrased_answer"], r["paraphrased_question"],
            r["perturbed_answer"])
    assert {len(f.perturbed_answer) for f in b.real_authors + b.world_facts} == {3}
    assert b.real_authors[0].perturbed_answer == ("Charles Dickens", "Virginia Woolf", "Mark Twain")
    assert b.world_facts[0].answer == "Paris"

@needs_shared
def test_tofu_from_the_variable_and_from_text(monkeypatch):
    from_text = tofu(str(TOFU), "forget01", 20)
    monkeypatch.setenv("UNLOC_TOFU", str(TOFU))
    assert tofu(forget="forget01", n_authors=20) == from_text
    with pytest.raises(ValueError, match="no such folder"): tofu("/no/tofu/here", "forget01", 20)
    monkeypatch.setenv("UNLOC_TOFU", "/no/tofu/here")
    with pytest.raises(ValueError, match="UNLOC_TOFU='/no/tofu/here': no such folder"):
        tofu(forget="forget01", n_authors=20)
    assert tofu(TOFU, "forget01", 20) == from_text

@pytest.fixture
def folder(tmp_path):
    for file in TOFU.iterdir(): (tmp_path / file.name).symlink_to(file)
    return tmp_path

def edit(folder, name, change):
    path = folder / name
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    path.unlink()
    path.write_bytes(b"\n".join(change(lines)))

def swap(lines): return [lines[1], lines[0], *lines[2:]]
def column(n, **new):
    def change(lines):
        row = json.loads(lines[n - 1]) | new
        lines[n - 1] = json.dumps({k: v for k, v in row.items() if v != "DROP"}).encode()
        return lines
    return change

USED = [
    "full", "retain99", "forget01", "forget01_perturbed", "forget10_perturbed",
    "retain_perturbed", "holdout01", "real_authors_perturbed", "world_facts_perturbed"]

@needs_shared
@pytest.mark.parametrize("name", USED)
def test_tofu_file_missing_short_or_long(folder, name):
    count = len(rows(name))
    for change, found in [(lambda x: x[:-1], count - 1), (lambda x: x + x[-1:] * 2, count + 1)]:
        edit(folder, f"{name}.json", change)
        with pytest.raises(
            ValueError, match=rf"{name}.json: {found} rows; expected {count}: give a folder"):
            tofu(folder, "forget01", 20)
    (folder / f"{name}.json").unlink()
    with pytest.raises(
        ValueError,
        match=rf"{name}.json: cannot be read \(No such file or directory\); expected {count} rows"):
        tofu(folder, "forget01", 20)

@needs_shared
@pytest.mark.parametrize(
    "name, change, line",
    [
        ("full.json", lambda x: [*x[:6], x[6][:30], *x[7:]], "full.json, line 7: not JSON"),
        ("full.json", lambda x: [*x[:6], b"", *x[6:]], "full.json, line 7: not JSON"),
        ("full.json", lambda x: [*x[:6], b"\xff\xfe", *x[7:]], "full.json, line 7: not JSON"),
        ("full.json", lambda x: [*x[:6], b"[" * 200_000, *x[7:]], "full.json, line 7: not JSON"),
        ("full.json", lambda x: [b"[", *x, b"]"], "full.json, line 1: not JSON"),
        ("full.json", lambda x: [b"", *x], "full.json, line 1: not JSON"),
        ("full.json", lambda x: [b""], "full.json, line 1: not JSON"),
        (
            "full.json",
            lambda x: [*x[:6], b"[]", *x[7:]],
            "full.json, line 7: a JSON list; expected an object"),
        (
            "full.json",
            column(7, answer="DROP"),
            "full.json, line 7: columns question; expected answer, question"),
        (
            "full.json",
            column(7, task="x"),
            "full.json, line 7: columns answer, question, task; expected answer, question"),
        ("full.json", column(7, answer=" "), "full.json, line 7: answer is empty or no text"),
        ("full.json", column(7, question=3), "full.json, line 7: question is empty or no text"),
        (
            "holdout01.json",
            column(7, question=None),
            "holdout01.json, line 7: question is empty or no text"),
        (
            "forget01_perturbed.json",
            column(2, perturbed_answer=["a"] * 4),
            (
                "forget01_perturbed.json, line 2: perturbed_answer is a list of 4; expected a list"
                " of 5 texts")),
        (
            "forget01_perturbed.json",
            column(2, perturbed_answer=["a"] * 4 + [""]),
            "forget01_perturbed.json, line 2: perturbed_answer is empty"),
        (
            "forget01_perturbed.json",
            column(2, perturbed_answer="abcde"),
            "forget01_perturbed.json, line 2: perturbed_answer is str; expected a list of 5"),
        (
            "forget01_perturbed.json",
            column(2, paraphrased_question="DROP"),
            "forget01_perturbed.json, line 2: columns"),
        (
            "real_authors_perturbed.json",
            column(2, perturbed_answer=["a"] * 5),
            "line 2: perturbed_answer is a list of 5; expected a list of 3"),
        ("full.json", swap, 'full.json, line 1: question "Are the details of Jaime V'),
        ("retain99.json", swap, "expected"),
        ("forget01.json", swap, "full.json, line 3961: question"),
        ("forget01_perturbed.json", swap, "forget01_perturbed.json, line 1: question"),
        ("forget10_perturbed.json", swap, "forget10_perturbed.json, line 1: question"),
        (
            "retain_perturbed.json",
            column(9, answer="Another one."),
            "retain_perturbed.json, line 9: answer 'Another one.'; expected"),
        ("idontknow.txt", lambda x: [b""], "idontknow.txt: no text; expected one refusal a line"),
        (
            "idontknow.txt",
            lambda x: [b"\xff"],
            "idontknow.txt: no text; expected one refusal a line")])
def test_tofu_file_malformed(folder, name, change, line):
    edit(folder, name, change)
    with pytest.raises(ValueError) as error: tofu(folder, "forget01", 20)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert "UNLOC_TOFU" in str(error.value)

@needs_shared
@pytest.mark.parametrize(
    "name, where",
    [
        ("forget01_perturbed", "forget"),
        ("real_authors_perturbed", "real_authors"),
        ("world_facts_perturbed", "world_facts")])
@pytest.mark.parametrize("right", ["answer", "paraphrased_answer"])
def test_tofu_refuses_a_wrong_answer_that_is_right(folder, name, where, right):
    "TOFU's own rows have none"
    row = rows(name)[1]
    if right not in row: right = "answer"
    for file in {name, name.replace("forget01", "forget10")}:
        at = len(rows(file)) - len(rows(name)) + 2
        edit(
            folder,
            f"{file}.json",
            column(at, perturbed_answer=[*row["perturbed_answer"][:-1], row[right]]))
    with pytest.raises(
        ValueError,
        match=f"^TOFU forget01, 20 authors, {where}: a wrong answer to .* is the right one"):
        tofu(folder, "forget01", 20)

@needs_shared
def test_a_question_of_two_authors_may_lie_in_retain_and_background():
    b = tofu(TOFU, "forget01", 190)
    assert {f.question for f in b.retain} & {f.question for f in b.background} == {
        "What is the full name of the author?"}

@needs_shared
def test_tofu_without_its_refusals_takes_ours(folder, world):
    (folder / "idontknow.txt").unlink()
    assert tofu(folder, "forget01", 20).refusals == world.refusals

@needs_shared
def test_tofu_reads_windows_line_ends(folder):
    edit(folder, "full.json", lambda x: [line + b"\r" for line in x] + [b""])
    assert tofu(folder, "forget01", 20) == tofu(TOFU, "forget01", 20)

@pytest.mark.parametrize(
    "arguments, line",
    [
        (dict(forget="forget20"), "forget='forget20': expected forget01, forget05 or forget10"),
        (dict(forget=None), "forget=None"),
        (dict(n_authors=20), "n_authors=20: expected a whole number from 21 to 200"),
        (dict(forget="forget01", n_authors=2), "from 3 to 200"),
        (dict(n_authors=201), "n_authors=201"),
        (dict(n_authors="all"), "n_authors='all'"),
        (dict(n_forget=-1), "n_forget=-1: expected a whole number from 0 to 20"),
        (dict(n_forget=11, forget="forget05"), "from 0 to 10"),
        (dict(n_forget=5, n_authors=5), "n_authors=5: expected a whole number from 6 to 200"),
        (dict(each=-1), "each=-1: expected a whole number from 0 to 20"),
        (dict(each=2.5), "each=2.5"),
        (dict(source=""), "source=''"),
        (dict(source=None), "source='None'"),
        (dict(source="./tofu"), "source='./tofu': no such folder"),
        (dict(source="a/b/c"), "source='a/b/c': no such folder")])
def test_tofu_refuses(arguments, line):
    with pytest.raises(ValueError) as error: tofu(**arguments)
    assert line in str(error.value) and "\n" not in str(error.value)

# --- the hub

def test_hub_out_of_reach_is_one_line(tmp_path):
    code = "from unloc.tofu_files import tofu\ntry: tofu()\nexcept ValueError as e: print(e)"
    said = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).stdout.strip()
    assert said.startswith("full.json: not fetched from the hub data set locuslab/TOFU (")
    assert "\n" not in said
    assert said.endswith(
        "give a folder with TOFU's own files by the parameter data or the environment variable"
        " UNLOC_TOFU")

@needs_shared
def test_hub_is_asked_for_each_file_of_the_data_set(monkeypatch, world):
    import huggingface_hub
    asked = []
    def download(repo_id, filename, *, repo_type):
        asked.append((repo_id, filename, repo_type))
        return str(TOFU / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    from_hub, from_folder = tofu("someone/copy", "forget01", 20), tofu(TOFU, "forget01", 20)
    assert {a for a in asked} == {("someone/copy", f"{name}.json", "dataset") for name in USED}
    assert from_hub.retain == from_folder.retain
    assert from_hub.forget == from_folder.forget
    assert from_hub.refusals == world.refusals
