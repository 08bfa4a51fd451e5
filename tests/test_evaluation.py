"""What a model knows and says is what the plain way finds: one row at a time, all logits, and
transformers' own greedy generate."""
import pytest, torch
from unloc import metrics
from unloc.answers import Choices, choices
from unloc.decoding import greedy, greedy_answers, rouge
from unloc.evaluation import KINDS, Probe, evaluate, forgetting, utility
from unloc.facts import Fact
from unloc.invented import author_world
from unloc.masked import unlock
from unloc.membership import membership
from unloc.models import region_shape, tiny_model
from unloc.regions import Region
from unloc.register import methods
from unloc.scoring import answer_logprob, answers_logprob, score
from unloc.tokens import collate, encode, train_tokenizer
from unloc.training import finetune
from unloc.unlearning_run import Recipe, unlearn

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain))
SETS = {
    "forget": WORLD.forget,
    "retain": WORLD.retain,
    "real_authors": WORLD.real_authors,
    "world_facts": WORLD.world_facts}


def small(arch="llama", dtype=torch.float32, n_layers=4):
    return tiny_model(arch, vocab_size=400, d_model=16, d_ff=32, n_layers=n_layers, n_heads=2).to(
        dtype)

def plain(model, example): # [n_answer, vocab]: all logits of one unpadded row, then the answer's
    return model(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1:-1]

def plain_logprob(model, example):
    return (
        plain(model, example)
        .double()
        .log_softmax(-1)
        .gather(1, torch.tensor(example.ids[example.start:])[:, None])[:, 0])

def taught(arch, dtype=torch.float32): # knows most of KEEP and little of GET
    model = tiny_model(arch, vocab_size=400, d_model=48, d_ff=96, n_layers=2, n_heads=2)
    finetune(model, KEEP, 30, 8e-3, 4, seed=0)
    return model.to(dtype)

@pytest.fixture(scope="module", params=methods("architecture"))
def model(request): return taught(request.param)

# --- one pass

@pytest.mark.parametrize("arch", methods("architecture"))
def test_answer_logprob_stands_at_the_token_itself(arch):
    model, batch = small(arch, torch.float64), collate(GET)
    found = answer_logprob(model, batch)
    for row, e in enumerate(GET):
        want = torch.zeros(batch.ids.shape[1], dtype=found.dtype)
        want[e.start:len(e.ids)] = plain_logprob(model, e)
        torch.testing.assert_close(found[row].double(), want.double(), rtol=1e-5, atol=1e-5)

def test_score_is_a_count_over_single_rows():
    model = small()
    finetune(model, KEEP, 8, 1e-2, 8, seed=0)
    found = score(model, KEEP, max_tokens=100)
    for i, e in enumerate(KEEP):
        # the end token does not count
        right = (plain(model, e).argmax(-1) == torch.tensor(e.ids[e.start:]))[:-1]
        # the floor: one token of any answer is counted
        tail = next((k for k in range(len(right)) if right[k:].all()), len(right) - 1)
        assert found.exact_memorization[i] == pytest.approx(right.double().mean().item())
        assert found.extraction_strength[i] == pytest.approx(1 - tail / len(right))
        assert found.probability[i].item() == pytest.approx(
            plain_logprob(model, e).mean().exp().item(), rel=1e-4)
    assert 0 < found.extraction_strength.mean() < 1

@pytest.mark.parametrize("arch", methods("architecture"))
def test_answers_behind_one_question_are_scored_as_if_alone(arch):
    model, asked = small(arch, torch.float64), choices(TOKENIZER, WORLD.retain)
    # answers of one question far apart
    mixed = [e for pair in zip(asked.wrong, asked.right * 5) for e in pair] + KEEP + GET
    for max_tokens in (1, 200, 10**6):
        found = score(model, mixed, max_tokens)
        for i in range(0, len(mixed), 7):
            logprob = plain_logprob(model, mixed[i])
            assert found.nll[i].item() == pytest.approx(-logprob.mean().item(), rel=1e-6)
    found, single = score(model, mixed), [score(model, [e]) for e in mixed]
    for name in ("extraction_strength", "exact_memorization", "known"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(s, name) for s in single]))

def test_known_counts_the_tokens_before_the_first_mistake(model):
    found = score(model, KEEP + GET).known.tolist()
    for e, known in zip(KEEP + GET, found):
        right = (plain(model, e).argmax(-1) == torch.tensor(e.ids[e.start:])).tolist()
        assert known == (right.index(False) if False in right else len(right))
    assert 0 in found and any(k == len(e.ids) - e.start for e, k in zip(KEEP, found))

# --- greedy answers

def generated(model, example, n): # transformers alone: one row, the bare prompt
    ids = torch.tensor([example.ids[:example.start]])
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=n,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=0,
        use_cache=True)[0, example.start:].tolist()
    return new[:new.index(TOKENIZER.eos_token_id)] if TOKENIZER.eos_token_id in new else new

@pytest.mark.parametrize("limit", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_are_those_of_plain_generate(model, dtype, limit):
    model = model.to(dtype)
    every = KEEP + GET
    want = [generated(model, e, limit) for e in every]
    assert greedy_answers(model, every, score(model, every).known, limit) == want
    assert (
        greedy(
            model, [e.ids[:e.start] for e in every], [limit] * len(every), TOKENIZER.eos_token_id,
            max_rows=7)
        == want)
    model.to(torch.float32)

def test_what_is_settled_is_not_decoded(model, monkeypatch):
    every, asked = KEEP + GET, []
    known = score(model, every).known
    plain_generate = type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, ids, **more: asked.append(len(ids)) or plain_generate(self, ids, **more))
    greedy_answers(model, every, known, 20)
    assert (
        sum(asked)
        == sum(e.start + k < len(e.ids) for e, k in zip(every, known.tolist()))
        < len(every))

def test_answers_through_an_unlocked_region(model):
    every = KEEP[:3] + GET[:3]
    want = greedy_answers(model, every, score(model, every).known, 12)
    with unlock(model, Region.sample(region_shape(model), .2, 0)):
        assert greedy_answers(model, every, score(model, every).known, 12) == want

def test_rouge_is_recall_of_the_decoded_text(model):
    known = score(model, KEEP).known
    found = rouge(model, TOKENIZER, KEEP, known, 30)
    right = [i for i, e in enumerate(KEEP) if e.start + known[i] == len(e.ids)]
    assert right
    assert all(found[i] == 1 for i in right)
    assert ((found >= 0) & (found <= 1)).all()
    assert rouge(model, TOKENIZER, GET, score(model, GET).known, 30).mean() < found.mean()

# --- membership

def test_membership_is_that_of_single_tokens(model):
    found = membership(model, TOKENIZER, KEEP, k=.4, max_tokens=100)
    for i, e in enumerate(KEEP):
        logits = plain(model, e).double().log_softmax(-1)
        logprob = plain_logprob(model, e)
        mean = (logits.exp() * logits).sum(-1)
        variance = (logits.exp() * (logits - mean[:, None]).square()).sum(-1)
        z = (logprob - mean) / variance.clamp(min=1e-6).sqrt()
        lowest = lambda x: -x[:-1].sort().values[:max(1, int(.4 * (len(x) - 1)))].mean().item()
        assert found["loss"][i].item() == pytest.approx(-logprob.mean().item(), rel=1e-4)
        assert found["min_k"][i].item() == pytest.approx(lowest(logprob), rel=1e-4)
        assert found["min_k_plus_plus"][i].item() == pytest.approx(lowest(z), rel=1e-3, abs=1e-4)
        assert found["zlib"][i] == metrics.zlib_score(
            found["loss"][i].item(), WORLD.retain[i].answer)
    stranger = membership(model, TOKENIZER, GET)
    assert metrics.membership_auc(found["loss"], stranger["loss"]) > .7

# --- choices and the whole judgement

def test_choices_keep_their_order():
    asked = choices(TOKENIZER, WORLD.retain[:2])
    assert len(asked.right) == 2 and len(asked.wrong) == 10
    assert asked.right[1] == encode(
        TOKENIZER, WORLD.retain[1].question, WORLD.retain[1].paraphrased_answer)
    assert asked.wrong[5] == encode(
        TOKENIZER, WORLD.retain[1].question, WORLD.retain[1].perturbed_answer[0])
    true = choices(TOKENIZER, WORLD.world_facts[:1])
    assert true.right[0] == encode(
        TOKENIZER, WORLD.world_facts[0].question, WORLD.world_facts[0].answer)
    assert len(true.wrong) == 3

@pytest.mark.parametrize(
    "facts",
    [[], [Fact("Q?", "A.")], [WORLD.retain[0], WORLD.world_facts[0]]],
    ids=["none", "without wrong answers", "five and three"])
def test_choices_refuse_uneven_facts(facts):
    with pytest.raises(ValueError, match="same number of wrong answers"): choices(TOKENIZER, facts)

def test_an_answer_without_a_token_is_refused():
    with pytest.raises(ValueError, match="has no token"):
        choices(TOKENIZER, [Fact("Q?", "", perturbed_answer=("B.",))])

def test_evaluate_is_the_sum_of_its_parts(model):
    probe = Probe(
        GET,
        KEEP,
        KEEP[:6],
        {
            name: choices(TOKENIZER, facts[:10 if name == "forget" else 6])
            for name, facts in SETS.items()},
        TOKENIZER,
        max_new_tokens=20)
    start = evaluate(small(), probe)
    retained = start.facts["forget_right_nll"], start.facts["forget_wrong_nll"]
    point, facts = evaluate(
        model, Probe(GET, KEEP, KEEP[:6], probe.choices, TOKENIZER, retained, 20))
    short = evaluate(model, probe, full=False)
    assert all(point[key] == pytest.approx(value, rel=1e-5) for key, value in short.point.items())
    assert torch.equal(facts["forget_es"], score(model, GET).extraction_strength)
    nll = {
        name: (score(model, c.right).nll, score(model, c.wrong).nll.view(len(c.right), -1))
        for name, c in probe.choices.items()}
    ratio = metrics.truth_ratio(*nll["forget"])
    assert point["FQ"] == pytest.approx(
        metrics.forget_quality(ratio, metrics.truth_ratio(*retained)), rel=1e-6)
    assert point["forget_truth_ratio"] == pytest.approx(
        float(metrics.forget_truth_ratio(ratio)), rel=1e-4)
    want = {}
    for name, examples in (
        {"retain": KEEP[:6]} | {name: probe.choices[name].right for name in KINDS[1:]}).items():
        s = score(model, examples)
        want[f"{name}_probability"] = (
            (s.probability if name == "retain" else metrics.normalised_probability(*nll[name]))
            .mean()
            .item())
        want[f"{name}_rouge"] = rouge(model, TOKENIZER, examples, s.known, 20).mean().item()
        want[f"{name}_truth_ratio"] = float(
            metrics.retain_truth_ratio(metrics.truth_ratio(*nll[name])))
    for key, value in want.items(): assert point[key] == pytest.approx(value, rel=1e-4), key
    assert point["MU"] == pytest.approx(
        len(want) / sum(1 / v for v in want.values()) if all(want.values()) else 0, rel=1e-3)

@pytest.mark.parametrize(
    "convention", ["tofu-paper", "open-unlearning", "tofu-aggregate", "probability"])
def test_any_convention_follows_from_the_stored_likelihoods(model, convention):
    probe = Probe(
        GET,
        KEEP,
        KEEP[:4],
        {name: choices(TOKENIZER, facts[:4]) for name, facts in SETS.items()},
        TOKENIZER,
        max_new_tokens=10)
    point, facts = evaluate(model, probe)
    nll = {name: (facts[f"{name}_right_nll"], facts[f"{name}_wrong_nll"]) for name in SETS}
    found = utility(nll, score(model, KEEP[:4]).probability, facts, convention) | forgetting(
        nll["forget"], nll["forget"], convention)
    assert found["FQ"] == 0 and 0 <= found["MU"] <= 1
    for name in KINDS:
        assert found[f"{name}_truth_ratio"] == metrics.retain_truth_ratio(
            metrics.truth_ratio(*nll[name], convention), convention)
    assert found["forget_truth_ratio"] == metrics.forget_truth_ratio(
        metrics.truth_ratio(*nll["forget"], convention), convention)
    if convention == "open-unlearning":
        # the answers' own probability comes from another batch
        assert found["MU"] == pytest.approx(point["MU"], rel=1e-4)

# --- bad input

PROBE = dict(
    forget=GET,
    retain=KEEP,
    useful=KEEP[:3],
    choices={name: choices(TOKENIZER, facts[:3]) for name, facts in SETS.items()},
    tokenizer=TOKENIZER)
OURS, OTHERS = PROBE["choices"]["forget"], PROBE["choices"]["retain"]
def with_forget(right, wrong):
    return {"choices": PROBE["choices"] | {"forget": Choices(right, wrong)}}

@pytest.mark.parametrize(
    "change, message",
    [
        (
            with_forget(OURS.right, OURS.wrong[:9]),
            (
                "fact 3 of the wrong answers of forget asks another question than fact 3 of the"
                " right ones, 3 times each")),
        (
            with_forget(OURS.right, OURS.wrong[::-1]),
            "fact 0 of the wrong answers of forget asks another question"),
        (
            with_forget(OURS.right, OTHERS.wrong),
            "fact 0 of the wrong answers of forget asks another question"),
        (
            with_forget(OURS.right, OURS.wrong[:-1]),
            r"have \d+ wrong answers to 3 questions; every question needs the same number"),
        (with_forget(OURS.right[:3], OURS.wrong[:2]), "have 2 wrong answers to 3 questions"),
        (with_forget([], []), "the forget right-answer set is empty"),
        (
            with_forget(OTHERS.right, OTHERS.wrong),
            "fact 0 of the choices of forget is not in the forget set"),
        ({"useful": KEEP[:2]}, "useful has 2 facts, the right answers of retain 3"),
        ({"useful": KEEP[1:4]}, "fact 0 of useful asks another question"),
        ({"useful": ()}, "useful has 0 facts"),
        ({"retain": GET[:2]}, "fact 0 of the forget set asks what fact 0 of the retain set asks"),
        ({"forget": []}, "the forget set is empty"),
        ({"tokenizer": None}, "greedy answers need the tokenizer"),
        (
            {"choices": {"forget": OURS, "world": OURS}},
            "choices must be of forget, retain, real_authors, world_facts, got forget, world"),
        (
            {"retained": torch.ones(3)},
            "retained must be the retained model's nll of the 3 right and 15 wrong answers"),
        ({"retained": (torch.ones(3), torch.ones(3, 2))}, "retained must be"),
        ({"retained": (torch.ones(2), torch.ones(2, 5))}, "retained must be"),
        (
            {"forget": GET + [GET[0]._replace(start=0)]},
            r"fact 10 of the forget set has no answer token .* \(start 0 of")])
def test_a_probe_of_rows_that_do_not_match_is_refused(change, message):
    Probe(**PROBE)
    with pytest.raises(ValueError, match=message) as error: Probe(**PROBE | change)
    assert "\n" not in str(error.value)

E, M = GET[0], small()
@pytest.mark.parametrize(
    "bad",
    [
        E._replace(start=0), E._replace(start=len(E.ids) - 1), E._replace(start=len(E.ids)),
        E._replace(start=len(E.ids) + 3)])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: score(M, x),
        lambda x: answers_logprob(M, x),
        lambda x: membership(M, TOKENIZER, x),
        lambda x: finetune(M, x, 1, 1e-3, 4, 0),
        lambda x: unlearn(
            M,
            Region.sample(region_shape(M), .2, 0),
            x,
            KEEP,
            Probe(GET, KEEP),
            Recipe("ga", 1e-3, 1),
            0),
        lambda x: unlearn(
            M,
            Region.sample(region_shape(M), .2, 0),
            GET,
            x,
            Probe(GET, KEEP),
            Recipe("npo", 1e-3, 1),
            0)],
    ids=["score", "answers_logprob", "membership", "finetune", "forget", "retain"])
def test_a_fact_without_an_answer_is_named(call, bad):
    with pytest.raises(
        ValueError,
        match=(
            r"fact 1 of the \w+ set has no answer token between its prompt and its end token"
            rf" \(start {bad.start} of {len(E.ids)} tokens\)")):
        call([KEEP[5], bad])
    with pytest.raises(ValueError, match=r"the \w+ set is empty"): call([])

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_named_and_no_score_made_of_it(value):
    model = small()
    model.lm_head.weight.data[3] = value
    for call in (
        lambda: score(model, GET),
        lambda: membership(model, TOKENIZER, GET),
        lambda: evaluate(model, Probe(GET, KEEP)),
        lambda: evaluate(model, Probe(**PROBE))):
        with pytest.raises(
            ValueError,
            match=(
                "log-probabilities of fact 0 are NaN or infinite; it has diverged: lower the"
                " learning rate")):
            call()

def test_a_run_that_diverges_in_its_last_step_gives_no_trajectory():
    model = small()
    with pytest.raises((ValueError, FloatingPointError), match="diverged|lower the learning rate"):
        unlearn(
            model,
            Region.sample(region_shape(model), .2, 0),
            GET[:4],
            KEEP,
            Probe(GET, KEEP),
            Recipe("ga", 1e38, 1, batch_size=4),
            0)

@pytest.mark.parametrize(
    "habit",
    [{"repetition_penalty": 1.9}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": "what it says"}])
def test_greedy_is_plain_whatever_the_checkpoint_is_used_to(habit):
    model = taught("llama")
    prompts, limits, end = [e.ids[:e.start] for e in GET], [12] * len(GET), TOKENIZER.eos_token_id
    plain = greedy(model, prompts, limits, end)
    for name, value in habit.items():
        setattr(model.generation_config, name, plain[0] if value == "what it says" else value)
    kept = model.generation_config
    assert (
        model.generate(
            torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=end)[0, len(prompts[0]):].tolist()
        != (plain[0] + [end])[:12]), "the habit shows"
    assert greedy(model, prompts, limits, end) == plain and model.generation_config is kept
    assert greedy_answers(model, GET, score(model, GET).known, 12) == plain

def test_greedy_demands_prompts_and_limits_that_fit():
    for prompts, limits in (([[1]], []), ([[1]], [2, 3]), ([[1], []], [2, 2])):
        with pytest.raises(
            ValueError, match="greedy needs a token in every prompt and a limit for each"):
            greedy(M, prompts, limits, 1)
    for k in (-1, 99):
        with pytest.raises(ValueError, match=f"known says {k} of the .* answer tokens of fact 0"):
            greedy_answers(M, GET[:1], torch.tensor([k]))

@pytest.mark.parametrize("arch", methods("architecture"))
# near ties may fall either way there: each token is nearly the likeliest
def test_greedy_answers_in_bfloat16_are_greedy(arch):
    model = taught(arch, torch.bfloat16)
    answers = greedy_answers(model, KEEP[:6], score(model, KEEP[:6]).known, 20)
    for e, answer in zip(KEEP, answers):
        logits = (
            model(input_ids=torch.tensor([e.ids[:e.start] + answer + [TOKENIZER.eos_token_id]]))
            .logits[0, e.start - 1:-1]
            .float())
        for token, row in zip(answer, logits): assert row[token] > row.max() - .2

@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: Probe(GET, KEEP, max_new_tokens=0),
            "max_new_tokens must be a whole number of at least 1, got 0"),
        (lambda: Probe(GET, KEEP, max_new_tokens=2.5), "max_new_tokens must be a whole number"),
        (
            lambda: greedy_answers(M, GET, torch.zeros(len(GET)).long(), 0),
            "max_new_tokens must be at least 1, got 0"),
        (lambda: greedy(M, [[5]], [3], 1, max_rows=0), "max_rows must be at least 1, got 0"),
        (lambda: membership(M, TOKENIZER, GET, k=0), r"k must lie in \(0, 1\]")])
def test_settings_that_decode_or_look_at_nothing_are_named(call, says):
    with pytest.raises(ValueError, match=says) as error: call()
    assert "\n" not in str(error.value)
