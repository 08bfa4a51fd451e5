"""Every objective equals the published code's value on a toy language model to nine digits, has the
gradient it claims, and refuses input that would broadcast or divide by zero."""
import json, os
from pathlib import Path
import pytest, torch
from unloc.methods.ceu import ceu
from unloc.methods.pdu import peak
from unloc.methods.satimp import satimp
from unloc.methods.simnpo import simnpo
from unloc.methods.undial import undial
from unloc.objectives import (
    dpo, ga, grad_diff, kl, nll, npo, rmu, rmu_control, sequence_logprob, token_logprob, wga)

SHARED = Path(os.environ.get("UNLOC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
golden_only = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")


def close(got, want): return float(got) == pytest.approx(want, rel=1e-9, abs=0)


class Toy:
    "The golden file's bigram language model, in float64"
    def __init__(self):
        self.case = json.loads((SHARED / "golden/losses.json").read_text("utf-8"))
        self.values = self.case["values"]

    def tokens(self, name):
        rows, prompt = self.case[name]["rows"], self.case[name]["prompt_len"]
        ids = torch.full((len(rows), max(map(len, rows))), self.case["pad_id"])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, p) in enumerate(zip(rows, prompt)):
            ids[i, :len(row)], mask[i, p:len(row)] = torch.tensor(row), True
        return ids, mask

    def logits(self, ids, phase=0.):
        x, j = ids.double()[..., None], torch.arange(self.case["V"], dtype=torch.float64)
        t = torch.arange(ids.shape[1], dtype=torch.float64)[None, :, None]
        return 2 * torch.sin(.37 * x + .91 * j + .13 * x * j + phase) + .3 * torch.cos(
            .5 * t + .7 * j)

    def logprob(self, name, phase=0.):
        "token_logprob [batch, seq] with NaN at position 0, and the answer mask"
        ids, mask = self.tokens(name)
        lp = token_logprob(self.logits(ids, phase)[:, :-1], ids[:, 1:])
        return torch.cat([torch.full_like(lp[:, :1], float("nan")), lp], 1), mask

    def predicting(self, name, phase=0.):
        """Logits [n, vocab] that predict the answer tokens, the tokens [n], and whether each is the
        first of its answer"""
        ids, mask = self.tokens(name)
        later, first = mask[:, 1:], mask[:, 1:] & ~mask[:, :-1]
        return self.logits(ids, phase)[:, :-1][later], ids[:, 1:][later], first[later]

    def sums(self, name, phase=0.): return sequence_logprob(*self.logprob(name, phase))

    def states(self, phase=0.):
        mask, d = self.tokens("forget")[1], self.case["rmu"]["D"]
        b, t, k = (torch.arange(n, dtype=torch.float64) for n in (*mask.shape, d))
        return torch.sin(.3 * b[:, None, None] + .7 * t[:, None] + 1.1 * k + phase), mask

    def control(self):
        u = torch.tensor(self.case["rmu"]["control_u"], dtype=torch.float64)
        return 2 * u / u.norm()


@pytest.fixture(scope="module")
def toy(): return Toy()


def broadcast(hidden, control, mask):
    """The published reduction: sums [batch] over counts [batch, 1], rebuilt from our value of each
    row alone"""
    count = mask.sum(1)
    rows = [
        rmu(
            hidden[i:i+1], control if control.ndim == 1 else control[i:i+1], mask[i:i+1])
        for i in range(len(mask))]
    return ((torch.stack(rows) * count) / count[:, None]).mean()


def undial_everywhere(t, beta):
    """The published reduction: over prompt and padding too, where the label -100 takes the place of
    an entry of the vocabulary"""
    ids, mask = t.tokens("forget")
    target = torch.where(mask, ids, t.case["V"] - 100)[:, 1:].flatten()
    return undial(
        *(t.logits(ids, phase)[:, :-1].flatten(0, 1) for phase in (0., .5)), target, beta).mean()


GOLDEN = {
    "forget_mean_token_nll_model": lambda t: nll(*t.logprob("forget")),
    "forget_mean_token_nll_ref": lambda t: nll(*t.logprob("forget", .5)),
    "retain_mean_token_nll_model": lambda t: nll(*t.logprob("retain")),
    "GradDiff_gamma1_alpha1": lambda t: grad_diff(*t.logprob("forget"), *t.logprob("retain")),
    "WGA_beta1.0": lambda t: wga(*t.logprob("forget"), beta=1.),
    "NPO_beta0.1": lambda t: npo(t.sums("forget"), t.sums("forget", .5), beta=.1),
    "DPO_beta0.1": lambda t: dpo(
        t.sums("alternate"), t.sums("forget"), t.sums("alternate", .5), t.sums("forget", .5),
        beta=.1),
    "SimNPO_beta4.5_delta0.0": lambda t: simnpo(*t.logprob("forget"), beta=4.5, delta=0.),
    "SimNPO_beta1.0_delta0.5": lambda t: simnpo(*t.logprob("forget"), beta=1., delta=.5),
    "SatImp_1.0_1.0": lambda t: satimp(*t.logprob("forget"), beta1=1., beta2=1.),
    "UNDIAL_answer_tokens_only_beta10.0": (
        lambda t: undial(
            t.predicting("forget")[0], t.predicting("forget", .5)[0], t.predicting("forget")[1],
            beta=10.).mean()),
    "CEU_skip0": lambda t: ceu(*t.predicting("forget")[:2]).mean(),
    "CEU_skip1": lambda t: (lambda x, y, first: ceu(x[~first], y[~first]).mean())(
        *t.predicting("forget")),
    "UNDIAL_asis_beta3.0": lambda t: undial_everywhere(t, 3.),
    "UNDIAL_asis_beta10.0": lambda t: undial_everywhere(t, 10.),
    "UNDIAL_asis_beta30.0": lambda t: undial_everywhere(t, 30.),
    "PDU_forget": (
        lambda t: peak(t.logits(t.tokens("forget")[0])[t.tokens("forget")[1]]).mean()
    ), # at the answer tokens themselves
    "RMU_activation_loss_per_sequence_mean": lambda t: rmu(
        t.states()[0], t.states(.4)[0], t.states()[1]),
    "RMU_activation_loss_token_mean": lambda t: rmu(
        t.states()[0], t.states(.4)[0], t.states()[1], average="token"),
    "RMU_activation_loss_asis_broadcast": lambda t: broadcast(
        t.states()[0], t.states(.4)[0], t.states()[1]),
    "RMU_forget_to_control_asis": lambda t: broadcast(t.states()[0], t.control(), t.states()[1]),
}


@golden_only
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(toy, name):
    assert close(GOLDEN[name](toy), toy.values[name])


@golden_only
@pytest.mark.parametrize("name, key", [("forget", "forget"), ("alternate", "alt")])
@pytest.mark.parametrize("who, phase", [("model", 0.), ("ref", .5)])
def test_golden_sequence_sums(toy, name, key, who, phase):
    got = -toy.sums(name, phase)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(toy.values[f"{key}_sum_nll_{who}"], rel=1e-9)


@golden_only
@pytest.mark.parametrize("positions, name", [("all", "KL_retain_asis_batchmean_over_all_positions"),
                                             ("answer", "KL_retain_shifted_answer_positions_only")])
def test_golden_kl(toy, positions, name):
    ids, mask = toy.tokens("retain")
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = mask[:, 1:]
    where = torch.ones_like(mask) if positions == "all" else predicts
    current, reference = toy.logits(ids), toy.logits(ids, .5)
    assert close(kl(current, reference, where), toy.values[name])
    assert close(
        kl(current[where], reference[where], torch.ones(int(where.sum()), dtype=torch.bool)),
        toy.values[name])
    assert not close(kl(reference, current, where), toy.values[name])


# gradients

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GRADIENTS = {
    "token_logprob": (
        lambda x: token_logprob(x, torch.tensor([[0, 4, 2], [1, 3, 3]])),
        [(2, 3, 5)],
    ),
    "sequence_logprob": (lambda x: sequence_logprob(x, MASK), [(2, 4)]),
    "nll": (lambda x: nll(x, MASK), [(2, 4)]),
    "ga": (lambda x: ga(x, MASK), [(2, 4)]),
    "grad_diff": (
        lambda x, y: grad_diff(x, MASK, y, ~MASK, gamma=.3, alpha=2.),
        [(2, 4), (2, 4)],
    ),
    "npo": (lambda x, y: npo(x, y, beta=.7), [(3,), (3,)]),
    "dpo": (lambda *x: dpo(*x, beta=.7), [(3,)] * 4),
    "simnpo": (lambda x: simnpo(x, MASK, beta=.7, delta=.2), [(2, 4)]),
    "undial": (lambda x: undial(x, draw(2, 5, seed=9), torch.tensor([3, 0]), 2.), [(2, 5)]),
    "pdu": (peak, [(3, 5)]),
    "rmu_vector": (lambda x, c: rmu(x, c, MASK), [(2, 4, 3), (3,)]),
    "rmu_reference": (lambda x, c: rmu(x, c, MASK, average="token"), [(2, 4, 3), (2, 4, 3)]),
    "kl": (lambda x, y: kl(x, y, MASK), [(2, 4, 5), (2, 4, 5)]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name):
    f, shapes = GRADIENTS[name]
    assert torch.autograd.gradcheck(
        f, [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)])


@pytest.mark.parametrize("beta", [0., .5, 1., 5.])
def test_wga_weight_is_a_constant(beta):
    lp = -draw(2, 4).abs()
    x = lp.clone().requires_grad_()
    wga(x, MASK, beta).backward()
    torch.testing.assert_close(x.grad, MASK * (beta * lp).exp() / MASK.sum(), rtol=1e-12, atol=0)
    # a weight that lets the gradient through has another gradient: finite differences see it
    if beta:
        assert not torch.autograd.gradcheck(
            lambda x: wga(x, MASK, beta), [x], raise_exception=False)


@pytest.mark.parametrize("beta1, beta2", [(1., 1.), (5., 1.), (0., 2.)])
def test_satimp_weights_are_constants(beta1, beta2):
    lp = -draw(2, 4).abs() - .1
    x, p = lp.clone().requires_grad_(), lp.exp()
    satimp(x, MASK, beta1, beta2).backward()
    torch.testing.assert_close(
        x.grad, MASK * p**beta1 * (1 - p)**beta2 / MASK.sum(), rtol=1e-12, atol=0)
    assert not torch.autograd.gradcheck(
        lambda x: satimp(x, MASK, beta1, beta2), [x], raise_exception=False)


def test_a_self_made_teacher_is_a_constant(): # d loss / d logits = softmax(logits) - teacher
    x, target = draw(3, 6).requires_grad_(), torch.tensor([2, 0, 5])
    p = x.detach().softmax(-1)
    without = p.scatter(1, target[:, None], 0.)
    teacher = without / without.sum(1, keepdim=True)
    torch.testing.assert_close(
        torch.autograd.grad(ceu(x, target).sum(), x)[0], p - teacher, rtol=1e-10, atol=1e-14)
    reference = draw(3, 6, seed=4)
    less = (reference - 3. * torch.nn.functional.one_hot(target, 6)).exp()
    torch.testing.assert_close(
        torch.autograd.grad(undial(x, reference, target, 3.).sum(), x)[0],
        p - less / less.sum(1, keepdim=True),
        rtol=1e-10,
        atol=1e-14)


@pytest.mark.parametrize("drop", [-40., 0., 1., 40., 400.])
@pytest.mark.parametrize("beta", [.05, .1, 1.])
def test_npo_and_dpo_pull(drop, beta):
    reference = torch.tensor([-50., -7.], dtype=torch.float64)
    x = (reference - drop).requires_grad_()
    # the weight, averaged over two sequences
    want = 2 / (1 + torch.tensor(beta * drop, dtype=torch.float64).exp()) / 2
    torch.testing.assert_close(
        torch.autograd.grad(npo(x, reference, beta), x)[0], want.expand(2), rtol=1e-9, atol=1e-30)
    chosen = reference.clone().requires_grad_()
    up, down = torch.autograd.grad(dpo(chosen, x, reference, reference, beta), (chosen, x))
    torch.testing.assert_close(down, want.expand(2), rtol=1e-9, atol=1e-30)
    assert torch.equal(up, -down)


# what lies outside the mask

@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nothing_outside_the_mask_is_read(junk):
    lp, hidden, logits = -draw(2, 4).abs(), draw(2, 4, 3), draw(2, 4, 5)
    cases = [
        (f, lp) for f in (nll, ga, wga, satimp, simnpo, lambda x, m: sequence_logprob(x, m).sum())]
    cases += [
        (lambda h, m, a=a, c=c: rmu(h, c, m, average=a), hidden)
        for a in ("sequence", "token")
        for c in (draw(3), hidden.flip(0))]
    cases += [(lambda x, m: kl(x, logits.flip(0), m), logits)]
    for f, clean in cases:
        dirty = clean.clone()
        dirty[~MASK] = junk
        a, b = clean.clone().requires_grad_(), dirty.requires_grad_()
        (fa := f(a, MASK)).backward(); (fb := f(b, MASK)).backward()
        assert torch.equal(fa, fb) and torch.equal(a.grad, b.grad)
        assert b.grad[~MASK].eq(0).all() and b.grad[MASK].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_lifted(dtype):
    logits = draw(2, 4, 50).mul(5).to(dtype)
    other = draw(2, 4, 50, seed=1).mul(5).to(dtype)
    target = torch.arange(8).view(2, 4)
    for f in (
        lambda x, y: token_logprob(x, target),
        lambda x, y: kl(x, y, MASK),
        lambda x, y: rmu(x, y, MASK),
        lambda x, y: rmu(x, y[0, 0], MASK)):
        got = f(logits, other)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), f(logits.double(), other.double()), rtol=1e-5, atol=1e-5)
    assert token_logprob(logits.double(), target).dtype == torch.float64


def test_token_logprob_of_one_position_and_of_none():
    logits = draw(5)
    torch.testing.assert_close(token_logprob(logits, torch.tensor(3)), logits.log_softmax(-1)[3])
    assert token_logprob(draw(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("length", [1, 3])
def test_averages_agree_when_answers_are_equally_long(length):
    hidden, control = draw(3, 5, 4), draw(4, seed=1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for i in range(3): mask[i, i:i + length] = True
    a = rmu(hidden, control, mask)
    b = rmu(hidden, control, mask, average="token")
    c = broadcast(hidden, control, mask)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(a, c, rtol=1e-12, atol=0)
    assert a > 0


def test_control_leaves_the_global_generator_alone():
    torch.manual_seed(3); want = torch.rand(4)
    torch.manual_seed(3)
    control = rmu_control(7, torch.Generator().manual_seed(0), coefficient=20.)
    assert torch.equal(torch.rand(4), want)
    assert control.norm().item() == pytest.approx(20, rel=1e-6)
    assert (control >= 0).all()
    assert control.dtype == torch.float32


def test_long_answers_stay_finite():
    low, zero = torch.tensor([-1e4], requires_grad=True), torch.zeros(1)
    loss = dpo(low, zero, zero, zero) + npo(zero, low)
    loss.backward()
    assert loss.isfinite() and low.grad.item() == pytest.approx(-4)


# bad input

LP, S, H = torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 4, 3)
NONE, ONE_ROW = torch.zeros_like(MASK), MASK & torch.tensor([[True], [False]])
BAD = [
    (lambda: nll(LP, NONE), "no answer token"),
    (lambda: ga(LP, NONE), "no answer token"),
    (lambda: wga(LP, NONE), "no answer token"),
    (lambda: grad_diff(LP, MASK, LP, NONE), "no answer token"),
    (lambda: kl(H, H, NONE), "no answer token"),
    (lambda: satimp(LP, NONE), "no answer token"),
    (lambda: simnpo(LP, ONE_ROW), "no answer token in row 1"),
    (lambda: simnpo(LP, MASK, beta=0.), "beta must be positive"),
    (lambda: satimp(LP, MASK, beta2=-1.), "beta2 must be at least 0"),
    (lambda: undial(LP, LP, torch.tensor([0, 1]), beta=-1.), "beta must be at least 0"),
    (lambda: rmu(H, H, NONE), "no answer token"),
    (lambda: rmu(H, H, ONE_ROW), "no answer token in row 1"),
    (lambda: nll(LP, MASK.long()), "torch.bool"),
    (lambda: nll(LP, MASK[:1]), r"shape \(2, 4\)"),
    (lambda: sequence_logprob(LP, MASK[:, :3]), r"shape \(2, 4\)"),
    (lambda: rmu(H, H[:1], MASK), r"control \[d\]"),
    (lambda: rmu(H[0], H[0], MASK[0]), r"\[batch, seq, d\]"),
    (lambda: rmu(H, H, MASK, average="mean"), "'sequence' or 'token'"),
    (lambda: rmu_control(0, torch.Generator()), "at least 1"),
    (lambda: kl(H, H[:1], MASK), "one shape"),
    (lambda: npo(S, S[:, None]), "one shape"),
    (lambda: npo(LP, LP), "one shape"),
    (lambda: npo(S[:0], S[:0]), "batch >= 1"),
    (lambda: dpo(S, S, S, S[:1]), "one shape"),
    (lambda: npo(S, S, beta=0), "beta must be positive"),
    (lambda: dpo(S, S, S, S, beta=float("nan")), "beta must be positive"),
    (lambda: wga(LP, MASK, beta=-1.), "beta must be at least 0"),
    (lambda: token_logprob(H, torch.full((2, 4), -100)), "0 to 2, got -100"),
    (lambda: token_logprob(H, torch.full((2, 4), 3)), "0 to 2, got 3"),
    (lambda: token_logprob(H, torch.zeros(2, 3, dtype=torch.int64)), r"shape \(2, 4\)"),
    (lambda: token_logprob(H, LP), "torch.int64"),
    (lambda: nll(LP.tolist(), MASK), "values must be a torch.Tensor, got list"),
    (lambda: ga(LP.numpy(), MASK), "values must be a torch.Tensor, got ndarray"),
    (lambda: wga(LP, MASK.tolist()), "mask must be a torch.Tensor"),
    (lambda: sequence_logprob(None, MASK), "token_logprob must be a torch.Tensor, got NoneType"),
    (lambda: token_logprob(torch.tensor(1.), torch.tensor(0)), r"at least 1 axis, got shape \(\)"),
    (lambda: token_logprob(H, [[0] * 4] * 2), "target must be a torch.Tensor"),
    (lambda: npo([0.], S), "logprob must be a torch.Tensor"),
    (lambda: kl(H, H.tolist(), MASK), "reference_logits must be a torch.Tensor"),
    (lambda: rmu(H, [0.] * 3, MASK), "control must be"),
    (lambda: npo(S, S, beta=None), "beta must be positive, got None"),
    (lambda: dpo(S, S, S, S, beta="0.1"), "beta must be positive, got '0.1'"),
    (lambda: wga(LP, MASK, beta=float("inf")), "beta must be"),
    (lambda: rmu_control(2.5, torch.Generator()), "whole number, got 2.5"),
    (lambda: rmu_control(2, 0), "generator must be"),
    (lambda: rmu_control(2, torch.Generator(), float("nan")), "coefficient must be"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error: call()
    assert "\n" not in str(error.value)


def test_a_row_without_answer_adds_nothing():
    "Token means weigh tokens, so only an empty batch is an error; sums of an empty answer are 0"
    lp = -draw(2, 4).abs()
    assert torch.equal(nll(lp, ONE_ROW), nll(lp[:1], MASK[:1]))
    assert sequence_logprob(lp, ONE_ROW)[1] == 0
    assert torch.equal(rmu(H + 1, H, ONE_ROW, average="token"), torch.tensor(1.))
