"Extraction strength, memorization and probability equal the published code's values, and the batch forms equal the definition on every pattern of mistakes."
import itertools, json, os
from pathlib import Path
import pytest, torch
from unloc.metrics import (answer_probability, exact_memorization, exact_memorizations, extraction_strength, extraction_strengths,
    forget_strength, retain_strength, without_end)
from unloc.objectives import token_logprob

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
golden_only = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
FLOORS = ["open-unlearning", "strict"]


@pytest.fixture(scope="module")
def toy():
    "The golden file's language model in float64: ids, predictions and log-probabilities aligned with the tokens, answer mask, and the file"
    case = json.loads((SHARED / "golden/metrics.json").read_text())
    ids = torch.full((len(case["rows"]), max(map(len, case["rows"]))), case["pad_id"])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, p) in enumerate(zip(case["rows"], case["prompt_len"])): ids[i, :len(row)], mask[i, p:len(row)] = torch.tensor(row), True
    x, j, t = ids.double()[..., None], torch.arange(120, dtype=torch.float64), torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
    logits = 6 * torch.sin(.37 * x + .91 * j + .13 * x * j) + .3 * torch.cos(.5 * t + .7 * j)
    predicted, lp = torch.full_like(ids, -1), torch.full(ids.shape, float("nan"), dtype=torch.float64)
    predicted[:, 1:], lp[:, 1:] = logits[:, :-1].argmax(-1), token_logprob(logits[:, :-1], ids[:, 1:])
    return ids, predicted, lp, mask, case


def answers(ids, predicted, mask):
    "Each row's predicted and true answer without the end token"
    return [(p[m], y[m]) for p, y, m in zip(predicted, ids, without_end(mask))]


@golden_only
def test_golden_matches(toy):
    ids, predicted, _, mask, case = toy
    assert [(p == y).int().tolist() for p, y in answers(ids, predicted, mask)] == case["es"]["match_without_last_label"]
    assert (ids[mask & ~without_end(mask)] == case["eos"]).all()


@golden_only
@pytest.mark.parametrize("floor, key", list(zip(FLOORS, ["asis", "strict"])))
def test_golden_extraction_strength(toy, floor, key):
    ids, predicted, _, mask, case = toy
    want = pytest.approx(case["es"][key], rel=1e-9, abs=0)
    batch = extraction_strengths(predicted == ids, without_end(mask), floor)
    assert batch.dtype == torch.float64 and batch.tolist() == want
    assert [extraction_strength(p, y, floor) for p, y in answers(ids, predicted, mask)] == want
    assert retain_strength(batch) == pytest.approx(case["es"][key + "_mean"], rel=1e-9)
    assert forget_strength(batch.tolist()) == pytest.approx(1 - case["es"][key + "_mean"], rel=1e-9)


@golden_only
def test_golden_exact_memorization(toy):
    ids, predicted, _, mask, case = toy
    batch = exact_memorizations(predicted == ids, without_end(mask))
    assert batch.tolist() == pytest.approx(case["em"], rel=1e-9) and batch.mean().item() == pytest.approx(case["em_mean"], rel=1e-9)
    assert [exact_memorization(p, y) for p, y in answers(ids, predicted, mask)] == batch.tolist()


@golden_only
def test_golden_probability(toy):
    _, _, lp, mask, case = toy
    got = answer_probability(lp, mask)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx([p["prob"] for p in case["prob"]], rel=1e-9)
    assert (-got.log()).tolist() == pytest.approx([p["avg_loss"] for p in case["prob"]], rel=1e-9)
    assert got.tolist() != pytest.approx(answer_probability(lp, without_end(mask)).tolist(), rel=1e-2)


@golden_only
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_published_logs_of_the_8b_model(model):
    "400 published extraction strengths: the pooled mean is the published aggregate, and the floor keeps every one above 0"
    log = json.loads((SHARED / "golden/tofu_llama31_8b_forget10.json").read_text())[model]
    es, want = log["extraction_strength"], log["agg"]["extraction_strength"]
    assert len(es) == 400 and min(es) > 0
    assert retain_strength(es) == pytest.approx(want, rel=1e-12) and forget_strength(es) == pytest.approx(1 - want, rel=1e-12)


# the definition

def smallest_k(match):
    "The definition by search: the fewest given tokens after which everything is right"
    return next(k for k in range(len(match) + 1) if all(match[k:]))


PATTERNS = [m for n in range(1, 8) for m in itertools.product([False, True], repeat=n)]


@pytest.mark.parametrize("floor", FLOORS)
def test_every_pattern_of_up_to_seven_tokens(floor):
    "Plain form, batch form (at a random place in its row, with noise around it) and search agree exactly"
    g = torch.Generator().manual_seed(0)
    width = 12
    correct = torch.rand(len(PATTERNS), width, generator=g) < .5
    mask = torch.zeros_like(correct)
    for i, m in enumerate(PATTERNS):
        start = torch.randint(0, width - len(m) + 1, (), generator=g).item()
        correct[i, start:start + len(m)], mask[i, start:start + len(m)] = torch.tensor(m), True
    got, memorized = extraction_strengths(correct, mask, floor).tolist(), exact_memorizations(correct, mask).tolist()
    for m, batch, em in zip(PATTERNS, got, memorized):
        n, target = len(m), torch.arange(len(m))
        predicted = torch.where(torch.tensor(m), target, target + 1)
        k = smallest_k(m) if floor == "strict" else min(smallest_k(m), n - 1)
        assert extraction_strength(predicted, target, floor) == batch == pytest.approx(1 - k / n, abs=1e-15)
        assert exact_memorization(predicted, target) == em == sum(m) / n


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("seed", range(5))
def test_batch_equals_plain_on_random_ids(seed, floor):
    "Few ids, so that long suffixes occur; lengths from 0; left- and right-aligned answers"
    g = torch.Generator().manual_seed(seed)
    target, predicted = (torch.randint(0, 2, (200, 17), generator=g) for _ in range(2))
    length, at = torch.randint(0, 18, (200, 1), generator=g), torch.arange(17)
    mask = at < length if seed % 2 else at >= 17 - length
    rows = list(zip(predicted, target, mask))
    es, em = extraction_strengths(predicted == target, mask, floor), exact_memorizations(predicted == target, mask)
    assert es.tolist() == [extraction_strength(p[m], y[m], floor) for p, y, m in rows]
    assert em.tolist() == [exact_memorization(p[m], y[m]) for p, y, m in rows]
    n = mask.sum(1)
    assert (es[n == 0] == 0).all() and (n == 0).any()
    assert (es <= torch.maximum(em, 1 / n.clamp(min=1))).all()
    assert (es[n > 0] * n[n > 0] >= (1 - 1e-9 if floor == "open-unlearning" else 0)).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape):
    none = torch.zeros(shape, dtype=torch.bool)
    assert torch.equal(extraction_strengths(none, none), torch.zeros(shape[0], dtype=torch.float64))
    assert torch.equal(exact_memorizations(none, none), torch.zeros(shape[0], dtype=torch.float64))
    assert without_end(none).shape == shape


def test_greedy_decoding_agrees_with_teacher_forcing():
    "For 200 random models of the whole prefix: greedy decoding from k writes the answer exactly when k tokens are enough"
    partial = 0
    for seed in range(200):
        step = lambda prefix: hash((seed, *prefix)) % 3 # integers hash the same in every process
        answer = [1]
        while len(answer) < 8: answer.append(step(answer) if hash((seed, len(answer))) % 5 else (step(answer) + 1) % 3)
        predicted = [step(answer[:t]) for t in range(8)]
        enough = []
        for k in range(9):
            text = answer[:k]
            while len(text) < 8: text.append(step(text))
            enough.append(text == answer)
        es = extraction_strength(torch.tensor(predicted), torch.tensor(answer), "strict")
        assert es == 1 - enough.index(True) / 8 and enough == sorted(enough)
        partial += 0 < es < 1
    assert partial > 50


def test_without_end_drops_exactly_the_last_answer_token():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 9, generator=g) < .4
    for row, kept in zip(mask, without_end(mask)):
        assert kept.nonzero().flatten().tolist() == row.nonzero().flatten().tolist()[:-1]


def test_probability_ignores_what_is_not_answer():
    lp, mask = torch.tensor([[-1., -3., float("nan")], [float("-inf"), -2., -2.]]), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    torch.testing.assert_close(answer_probability(lp, mask), torch.tensor([-2., -2.]).exp())


# bad input

IDS, BOOL = torch.arange(4), torch.ones(2, 4, dtype=torch.bool)
BAD = [
    (lambda: extraction_strength(IDS, IDS, "ou"), "'open-unlearning' or 'strict', got 'ou'"), (lambda: extraction_strength(IDS[:0], IDS[:0], None), "got None"),
    (lambda: extraction_strengths(BOOL, BOOL, "none"), "got 'none'"), (lambda: extraction_strength(IDS, IDS[:3]), r"\(4,\) and \(3,\)"),
    (lambda: exact_memorization(IDS[None], IDS[None]), r"\[n\]"), (lambda: exact_memorizations(BOOL, BOOL[:1]), "one shape"),
    (lambda: extraction_strengths(BOOL.long(), BOOL), "torch.bool"), (lambda: extraction_strengths(BOOL[0], BOOL[0]), r"\[batch, seq\]"),
    (lambda: without_end(BOOL.int()), "torch.bool"), (lambda: without_end(BOOL[0]), r"\[batch, seq\]"),
    (lambda: answer_probability(torch.zeros(2, 4), ~BOOL), "no answer token in row 0"), (lambda: answer_probability(torch.zeros(2, 3), BOOL), r"shape \(2, 3\)"),
    (lambda: forget_strength([]), "one extraction strength per example"), (lambda: retain_strength(torch.zeros(2, 2)), "one extraction strength per example"),
    (lambda: forget_strength([.1, 1.1]), r"\[0, 1\]"), (lambda: retain_strength([float("nan")]), r"\[0, 1\]"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error: call()
    assert "\n" not in str(error.value)
