"""Several right answers, multiple choice and ROUGE for every script: what a plain loop finds, and
what the libraries say."""
import json, math, random, unicodedata
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from rouge_score.rouge_scorer import RougeScorer
from unloc import metrics
from unloc.answers import (
    best_scores, choices, choose, letter_options, letter_question, options, other_answers)
from unloc.data import data_description
from unloc.decoding import best_recall, rouge
from unloc.evaluation import KINDS, Probe, evaluate, undefined
from unloc.facts import Fact
from unloc.invented import author_world
from unloc.membership import membership, membership_aucs
from unloc.metrics import (
    CHOICE_CONVENTIONS, multiple_choice, rouge_1, rouge_l, rouge_l_recall, rouge_tokenizer, words)
from unloc.models import region_shape, tiny_model
from unloc.pages import sweep
from unloc.regions import Region
from unloc.register import methods
from unloc.runs import Store
from unloc.scoring import score
from unloc.steps.attack import attacking
from unloc.steps.base import base_models
from unloc.steps.inject import injection
from unloc.steps.judge import standard
from unloc.steps.unlearn import unlearning
from unloc.tokens import encode, train_tokenizer
from unloc.training import finetune
from unloc.unlearning_run import Recipe, unlearn

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
WORLD = author_world(n_authors=3, n_forget=1, n_holdout=1)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain))

@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", vocab_size=400, d_model=48, d_ff=96, n_layers=2, n_heads=2)
    finetune(model, KEEP, 20, 8e-3, 4, seed=0)
    return model

# --- ROUGE

@needs_shared
def test_precision_recall_and_f1_are_the_librarys():
    for row in json.loads((SHARED / "golden/metrics.json").read_text("utf-8"))["rouge"]:
        found = rouge_l(row["generation"], row["reference"])
        assert (found.recall, found.f1) == pytest.approx(
            (row["rougeL_recall"], row["rougeL_f1"]), rel=1e-12)
        assert rouge_1(row["generation"], row["reference"]).recall == pytest.approx(
            row["rouge1_recall"], rel=1e-12)

@needs_shared
def test_no_number_of_tofu_changes():
    rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    texts = set()
    for line in (SHARED / "data/tofu/full.json").read_text("utf-8").split("\n"):
        if line: texts |= set(json.loads(line).values())
    texts = sorted(texts)
    assert {rouge_tokenizer(text) for text in texts} == {"rouge_score"}
    foreign = [text for text in texts if not text.isascii()]
    for text in foreign[:100] + rng.sample(texts, 100):
        assert rouge_l_recall(text[7:], text) == scorer.score(text, text[7:])["rougeL"].recall

@pytest.mark.parametrize("stem", [True, False])
def test_english_is_scored_by_the_library_alone(stem):
    scorer, rng = RougeScorer(["rougeL", "rouge1"], use_stemmer=stem), random.Random(1)
    pool = (
        "the novels of Lena Orwick were written in 1950 near caf\u00e9s and running rivers don't"
        .split())
    for _ in range(50):
        a, b = (" ".join(rng.choices(pool, k=rng.randint(1, 9))) for _ in range(2))
        want = scorer.score(a, b)
        for call, kind in ((rouge_l, "rougeL"), (rouge_1, "rouge1")):
            assert call(b, a, stem=stem) == (
                want[kind].precision,
                want[kind].recall,
                want[kind].fmeasure)

SCRIPTS = {
    "Пушкин родился в Москве в 1799 году.": "Пушкин родился в 1799 году",
    "鲁迅出生于绍兴。": "鲁迅生于绍兴",
    "夏目漱石は東京で生まれた。": "夏目漱石は東京で",
    "ولد نجيب محفوظ في القاهرة": "ولد في القاهرة",
    "रवीन्द्रनाथ का जन्म कोलकाता में हुआ": "जन्म कोलकाता में हुआ",
    "สุนทรภู่เกิดที่กรุงเทพ": "เกิดที่กรุงเทพ",
    "한강은 광주에서 태어났다": "한강은 태어났다",
    "Ο Καβάφης γεννήθηκε στην Αλεξάνδρεια": "γεννήθηκε στην αλεξάνδρεια",
    "עמוס עוז נולד בירושלים": "נולד בירושלים",
    "ბათუმი ქალაქია": "ბათუმი",
    "Հովհաննես Թումանյան": "Թումանյան",
    "তিনি কলকাতায় জন্মগ্রহণ করেন": "কলকাতায় জন্মগ্রহণ",
    "அவர் சென்னையில் பிறந்தார்": "சென்னையில் பிறந்தார்",
    "አዲስ አበባ": "አበባ"}

@pytest.mark.parametrize("reference", SCRIPTS)
def test_every_script_has_words(reference):
    """What rouge-score's own tokenizer gives 0 for, a longest common subsequence of words gives its
    share"""
    assert rouge_tokenizer(reference) == "words"
    assert rouge_l_recall(reference, reference) == 1
    assert rouge_l_recall("the sea", reference) == 0
    a, b = words(SCRIPTS[reference]), words(reference)
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j]))
    found = rouge_l(SCRIPTS[reference], reference)
    assert 0 < found.recall < 1
    assert found == pytest.approx(
        (table[-1, -1] / len(a), table[-1, -1] / len(b), 2 * table[-1, -1] / (len(a) + len(b))))
    assert (
        found
        == rouge_l(unicodedata.normalize("NFD", SCRIPTS[reference]), reference)
        == rouge_l(SCRIPTS[reference].upper(), reference)), "one text, however it is encoded"

@pytest.mark.parametrize(
    "text, want",
    [
        ("ﬁne Ｌatin ½", ["fine", "latin", "1", "2"]),
        ("naïve_snake-case", ["naïve", "snake", "case"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("co\u00adop", ["coop"]),
        ("a\u200bb", ["a", "b"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("東京2020年", ["東", "京", "2020", "年"]),
        ("\u0301a", ["a"]),
        ("์", []),
        ("😀 ok 👍🏽", ["ok"]),
        ("が", ["が"]),
        ("か\u3099", ["が"]),
        ("", [])])
def test_words(text, want): assert words(text) == want

def test_mixed_texts_go_to_the_script_of_most_letters():
    assert rouge_tokenizer("Her father is Лукас.") == "rouge_score"
    assert rouge_tokenizer("Пушкин (Pushkin) родился") == "words"
    assert rouge_tokenizer("1799") == "rouge_score"
    assert rouge_tokenizer("١٩٩٠") == "words"
    assert rouge_tokenizer("Ở") == "words"
    assert rouge_tokenizer("Jos\u00e9") == "rouge_score"
    assert rouge_tokenizer("\u2014 \u00ab\u00bb") is None

def test_rouge_of_a_model_leaves_out_what_has_no_words(model):
    facts = [WORLD.retain[0], Fact(WORLD.retain[1].question, "\u2026 !")]
    examples = [encode(TOKENIZER, f.question, f.answer) for f in facts]
    found = rouge(model, TOKENIZER, examples, score(model, examples).known, 12)
    assert (
        found[0] == rouge(model, TOKENIZER, examples[:1], score(model, examples[:1]).known, 12)[0])
    assert found[1].isnan()
    assert math.isnan(best_recall("x", []))
    assert best_recall("Mumbai", ["\u2026", "Bombay", "Mumbai"]) == 1

# --- several right answers

def test_the_best_right_answer_counts(model):
    facts = [
        replace(f, answer="Nobody knows.", other_answers=(f.answer, "Ask again.")[:k])
        for f, k in zip(WORLD.retain[:6], (1, 0, 2, 0, 1, 2))]
    first = [encode(TOKENIZER, f.question, f.answer) for f in facts]
    rows = other_answers(TOKENIZER, facts)
    assert [len(row) for row in rows] == [1, 0, 2, 0, 1, 2]
    one, more = score(model, first), score(model, sum(rows, []))
    best = best_scores(one, more, [len(row) for row in rows])
    for i, row in enumerate(rows):
        each = [score(model, [e]) for e in (first[i], *row)]
        assert best.extraction_strength[i] == max(s.extraction_strength[0] for s in each)
        assert best.exact_memorization[i] == max(s.exact_memorization[0] for s in each)
        assert best.nll[i].item() == pytest.approx(min(s.nll.item() for s in each), rel=1e-4)
        assert best.known[i] == each[0].known[0]
    said = rouge(model, TOKENIZER, first, one.known, 24, rows)
    text = TOKENIZER.batch_decode([e.ids[e.start:-1] for e in KEEP[:6]])
    assert said[0] > .9 and said[1] == rouge(model, TOKENIZER, first, one.known, 24)[1], text

SETS = {
    "forget": WORLD.forget,
    "retain": WORLD.retain,
    "real_authors": WORLD.real_authors,
    "world_facts": WORLD.world_facts}
PROBE = dict(
    forget=GET,
    retain=KEEP[:5],
    useful=KEEP[:3],
    choices={name: choices(TOKENIZER, facts[:3]) for name, facts in SETS.items()},
    tokenizer=TOKENIZER,
    max_new_tokens=8)

def test_a_judgement_of_several_right_answers(model):
    plain = evaluate(model, Probe(**PROBE))
    assert (
        undefined(plain.point, Probe(**PROBE)) == {}
        and evaluate(model, Probe(**PROBE, others={"forget": [[]] * len(GET)})).point == plain.point
    ), "none, none in a list: bit-identical"
    # taught otherwise, so that only the further answer is known
    wrong = [encode(TOKENIZER, f.question, "Nobody knows.") for f in WORLD.retain[:5]]
    others = {"retain": [[e] for e in KEEP[:5]], "useful": [[e] for e in KEEP[:3]]}
    found = evaluate(
        model, Probe(**PROBE | {"retain": wrong, "useful": wrong[:3]}, others=others)).point
    assert found["RS"] == pytest.approx(plain.point["RS"])
    assert found["retain_probability"] == pytest.approx(plain.point["retain_probability"], rel=1e-4)
    assert found["retain_rouge"] == pytest.approx(plain.point["retain_rouge"])
    assert (
        evaluate(model, Probe(**PROBE | {"retain": wrong, "useful": wrong[:3]})).point["RS"]
        < found["RS"])

@pytest.mark.parametrize(
    "others, says",
    [
        ({"kept": []}, "others has no set 'kept'; known: forget, retain, useful, forget right"),
        ({"retain": [[]]}, "others of retain has 1 rows for 5 facts"),
        (
            {"retain": [[GET[0]], *[[]] * 4]},
            "fact 0 of the other answers of retain asks another question"),
        ({"retain": [[KEEP[0]._replace(start=0)], *[[]] * 4]}, "no answer token")])
def test_further_answers_that_do_not_belong_are_refused(others, says):
    with pytest.raises(ValueError, match=says): Probe(**PROBE, others=others)

# --- parts that are missing

def test_a_part_that_is_missing_takes_nothing_with_it(model):
    whole = evaluate(model, Probe(**PROBE)).point
    for name in ("forget", *KINDS):
        less = Probe(
            **PROBE | {"choices": {k: v for k, v in PROBE["choices"].items() if k != name}})
        point = evaluate(model, less).point
        gone = {key for key, value in point.items() if math.isnan(value)}
        parts = {f"{name}_truth_ratio", "MU"} | (
            {f"{name}_probability", f"{name}_rouge"} if name in KINDS[1:] else set())
        assert (
            gone
            == ({"forget_truth_ratio", "FQ"} if name == "forget" else parts)
            == set(undefined(point, less)))
        assert all(
            point[key] == pytest.approx(value, rel=1e-4)
            for key, value in whole.items()
            if key not in gone)
    point = evaluate(model, less := Probe(**PROBE | {"retain": ()})).point
    assert (
        {key for key, value in point.items() if math.isnan(value)}
        == {"RS", "probe_em", "probe_probability"}
        == set(undefined(point, less)))
    assert point["MU"] == pytest.approx(whole["MU"], rel=1e-4)

def test_membership_leaves_out_what_has_no_score(model):
    # decodes to no text
    special = [
        KEEP[0]._replace(
            ids=KEEP[0].ids[:KEEP[0].start] + [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id]),
        *KEEP[1:4]]
    found, strange = membership(model, TOKENIZER, special), membership(model, TOKENIZER, GET)
    assert found["zlib"].isnan().tolist() == [True, False, False, False]
    assert all(found[name].isfinite().all() for name in found if name != "zlib")
    aucs = membership_aucs(found, strange)
    assert aucs["zlib"] == (metrics.membership_auc(found["zlib"][1:], strange["zlib"]), 3, len(GET))
    assert aucs["loss"] == (metrics.membership_auc(found["loss"], strange["loss"]), 4, len(GET))

# --- nothing to retain

@pytest.mark.parametrize("objective", ["ga", "npo", "wga", "rmu"])
def test_unlearning_without_a_retain_set(model, objective):
    import copy
    region = Region.sample(region_shape(model), .3, 0)
    recipe = Recipe(objective, 1e-2, 2, retain="none")
    ends = []
    for retain in ([], KEEP): # what is not asked for changes nothing
        trajectory, values = unlearn(
            copy.deepcopy(model),
            region,
            KEEP[:4] if not retain else KEEP[:4],
            retain and KEEP[4:],
            Probe(KEEP[:4], ()),
            recipe,
            0)
        ends.append(values)
        assert math.isnan(trajectory.points[-1]["RS"])
        assert trajectory.points[-1]["FS"] >= trajectory.points[0]["FS"]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(ends[0].values(), ends[1].values()))

@pytest.mark.parametrize("retain", methods("retain"))
def test_a_retain_term_without_facts_is_one_line(model, retain):
    with pytest.raises(
        ValueError,
        match=(
            f"^the retain set is empty, and the retain term '{retain}' of ga needs facts; give"
            " retain facts, or the recipe retain='none'$")):
        unlearn(
            model,
            Region.sample(region_shape(model), .3, 0),
            GET,
            [],
            Probe(GET, ()),
            Recipe("ga", 1e-2, 1, retain=retain),
            0)
    with pytest.raises(ValueError, match="the forget set is empty"):
        unlearn(
            model,
            Region.sample(region_shape(model), .3, 0),
            [],
            [],
            Probe(GET, ()),
            Recipe("ga", 1e-2, 1),
            0)

@pytest.mark.parametrize("wrong", [[], ["in Cork", "in Ghent"]], ids=["bare", "with wrong answers"])
def test_a_study_of_own_data_without_a_retain_set(tmp_path, wrong):
    rows = [
        {
            "set": "forget",
            "question": f"Where is {who}?",
            "answers": [f"{who} lives {where}.", where],
            "perturbed_answer": wrong or None}
        for who, where in (
            ("Mira", "in Velm"), ("Odo", "in Halden"), ("Анна", "в Киеве"), ("李", "北京"))]
    rows += [
        {"set": "holdout", "question": f"Who is {i}?", "answer": "\u2026" if i else "Ada"}
        for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data = data_description({"name": "file", "path": str(tmp_path / "mine.jsonl")})
    base = base_models(
        data,
        "llama",
        {"d_model": 16, "n_layers": 2, "d_ff": 32, "n_heads": 2, "vocab_size": 300},
        *({"epochs": 1, "lr": 4e-3, "batch_size": 64},) * 2)
    judged = standard(base, {"retain": 4, "utility": 2, "max_new_tokens": 4})
    injected = injection(judged, 0, {"fraction": .25, "epochs": 2, "lr": 1e-2, "batch_size": 4})
    run = unlearning(injected, "Oracle", "ga", {"lr": 1e-2, "epochs": 1})
    attacked = attacking(
        run,
        {
            "lr": 1e-3, "region_lr": 1e-3, "epochs": 1, "batch_size": 4, "taught": 2,
            "samples": 1, "shots": 1})
    sweep(
        store := Store(tmp_path / "runs"),
        [
            attacked,
            unlearning(injected, "Random", "npo", {"lr": 1e-2, "epochs": 1, "retain": "none"})],
        1)
    told = store[judged].json()
    assert math.isnan(told["retained"]["MU"])
    assert told["undefined"]["MU"].startswith("without retain_")
    assert ("FQ" in told["undefined"]) == (not wrong)
    assert told["retained"]["FQ"] == 0 if wrong else math.isnan(told["retained"]["FQ"])
    with pytest.raises(
        Exception,
        match=(
            "the retain term of npo needs retain facts, and the data have none; name retain ="
            " 'none'")):
        sweep(store, [unlearning(injected, "Oracle", "npo", {"lr": 1e-2, "epochs": 1})], 1)

# --- multiple choice

def plain_choice(
    model, row
): # [k]: total log-probability of each answer alone, without its end token
    totals = []
    for e in row:
        logits = model(input_ids=torch.tensor([e.ids])).logits[0].double().log_softmax(-1)
        totals.append(
            sum(logits[place - 1, e.ids[place]].item() for place in range(e.start, len(e.ids) - 1)))
    return totals

@pytest.mark.parametrize("convention", CHOICE_CONVENTIONS)
def test_choices_are_those_of_a_plain_loop(model, convention):
    asked = options(TOKENIZER, WORLD.retain[:6] + WORLD.forget)
    correct = []
    with torch.no_grad():
        for row, texts in zip(asked.answers, asked.texts):
            divide = {
                "total": lambda e, text: 1,
                "token": lambda e, text: len(e.ids) - e.start - 1,
                "byte": lambda e, text: len(text.encode("utf-8")),
                "character": lambda e, text: len(text)}[convention]
            # the right one stands first
            correct.append(
                float(
                    np.argmax(
                        [
                            total / divide(e, text)
                            for total, e, text in zip(plain_choice(model, row), row, texts)])
                    == 0))
    found = choose(model, asked, convention, max_tokens=90)
    assert found.correct.tolist() == correct
    assert found.accuracy == pytest.approx(np.mean(correct))
    assert found.chance == pytest.approx(1 / 6)
    assert 0 < found.accuracy < 1

def test_any_right_choice_will_do(model):
    fact = replace(
        WORLD.retain[0],
        paraphrased_answer="",
        answer="Nobody knows.",
        other_answers=(WORLD.retain[0].answer,),
    )
    asked = options(TOKENIZER, [fact, WORLD.retain[1]])
    # as many as there are
    assert asked.right[0] == [True, True] + [False] * 5 and asked.right[1] == [True] + [False] * 5
    found = choose(model, asked, "token")
    assert found.correct.tolist() == [1, 1] and found.chance == pytest.approx((2 / 7 + 1 / 6) / 2)

def test_letters(model):
    questions = ["Which is a metal? ", "Which is a gas?"]
    offered = [["neon", "iron", "argon", "xenon"], ["lead", "neon", "argon"]]
    right = [[1], [1, 2]]
    asked = letter_options(TOKENIZER, questions, offered, right, before="About chemistry.\n\n")
    assert (
        letter_question(questions[0], offered[0])
        == "Which is a metal?\nA. neon\nB. iron\nC. argon\nD. xenon\nAnswer:")
    assert (
        TOKENIZER.decode(asked.answers[0][1].ids[:-1])
        == "About chemistry.\n\nWhich is a metal?\nA. neon\nB. iron\nC. argon\nD. xenon\nAnswer: B")
    assert asked.right == [[False, True, False, False], [False, True, True]]
    assert asked.texts == [list("ABCD"), list("ABC")]
    with torch.no_grad():
        want = [
            row[int(np.argmax(plain_choice(model, answers)))]
            for row, answers in zip(asked.right, asked.answers)]
    for convention in CHOICE_CONVENTIONS:
        assert choose(model, asked, convention).correct.tolist() == want
    assert choose(model, asked).chance == pytest.approx((1 / 4 + 2 / 3) / 2)

def test_a_tie_is_shared_and_never_goes_to_the_first():
    assert (
        multiple_choice([[-1., -1., -1., -1.]], [[True, False, False, False]]).accuracy
        == multiple_choice([[-1., -1., -1., -1.]], [[False, False, False, True]]).accuracy
        == .25)
    assert multiple_choice([[-2., -2., -3.]], [[True, False, False]]).correct.tolist() == [.5]
    assert multiple_choice([[-2., -2., -3.]], [[True, True, False]]).correct.tolist() == [1]
    model = tiny_model("llama", vocab_size=400, d_model=16, d_ff=32, n_layers=1, n_heads=2)
    with torch.no_grad(): model.lm_head.weight.zero_() # says nothing of anything
    asked = letter_options(TOKENIZER, ["Which?"] * 5, [["a", "b", "c", "d"]] * 5, [[0]] * 5)
    assert choose(model, asked) [:2] == (.25, .25)

@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: multiple_choice([], []), "expected the same in each, at least one question"),
        (lambda: multiple_choice([[-1., -2.]], [[True]]), "have .* choices: expected the same"),
        (lambda: multiple_choice([[-1.]], [[True]]), "question 0 has 1 right choices of 1"),
        (lambda: multiple_choice([[-1., .5]], [[True, False]]), r"logprob\[0\]\[1\] is 0.5"),
        (
            lambda: multiple_choice([[-1., -2.]], [[True, False]], [[1, 0]]),
            r"length\[0\]\[1\] is 0"),
        (
            lambda: metrics.choice_length("a", 1, "acc_norm"),
            (
                "unknown multiple-choice convention 'acc_norm': expected one of total, token, byte,"
                " character")),
        (lambda: multiple_choice([-1., -2.], [True, False]), "must be lists of rows"),
        (lambda: multiple_choice(None, None), "must be lists of rows"),
        (lambda: metrics.choice_length(None, 1, "byte"), "text must be a string, got NoneType"),
        (lambda: words(None), "text must be a string"),
        (lambda: rouge_tokenizer(b"a"), "reference must be a string, got bytes"),
        (lambda: rouge_l("a", None), "got str and NoneType"),
        (lambda: rouge_1("a", "a", "bert"), "unknown ROUGE tokenizer 'bert': expected one of auto"),
        (lambda: options(TOKENIZER, [Fact("q?", "a")]), "'q[?]' has no list of wrong answers"),
        (
            lambda: options(TOKENIZER, [Fact("q?", "a", perturbed_answer="b")]),
            "no list of wrong answers"),
        (
            lambda: letter_options(TOKENIZER, ["q?"], [["a", "b"]], [1]),
            r"right\[0\] is 1; expected a list"),
        (
            lambda: letter_options(TOKENIZER, ["q?"], [["a", "b"]], [[True]]),
            r"right\[0\] is \[True\]"),
        (lambda: letter_options(TOKENIZER, ["q?"], [], [[0]]), "1 questions, 0 lists of choices"),
        (lambda: letter_options(TOKENIZER, ["q?"], [["a"]], [[0]]), "1 choices; expected 2 to 26"),
        (lambda: letter_options(TOKENIZER, ["q?"], [["a"] * 27], [[0]]), "27 choices")])
def test_choices_that_are_none_are_refused(call, says):
    with pytest.raises(ValueError, match=says) as error: call()
    assert "\n" not in str(error.value)
