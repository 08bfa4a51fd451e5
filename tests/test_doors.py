"""Whatever a person hands to a documented entry point by mistake ends in one line that says what
was given and what was expected, raised by unloc itself: no bare exception of a library comes
out."""
import json, traceback
from pathlib import Path
import pandas as pd
import pytest, torch
from torch import nn
from unloc import (
    answers, checkpoints, decoding, evaluation, figures, invented, loading, locked, masked,
    membership, metrics, objectives, regions, saving, scoring, statistics, steps, tofu_files,
    tokens, tradeoff, training, unlearning_run)
from unloc import conformal
from unloc.asking import best_of, few_shot
from unloc.logits import answer_logits, hidden_after, logits_of, mlp_outputs
from unloc.methods.logit_lens import logit_lens
from unloc.methods.probing import linear_probe
from unloc.models import output_projections, region_shape, tiny_model, value_vectors
from unloc.quantization import quantized
from unloc.regions import Region
from unloc.register import methods
from unloc.relearn import recovery, relearn
from unloc.runs import Store, sweep
from unloc.tokens import Example, encode, train_tokenizer

PACKAGE = Path(tokens.__file__).parent
WORLD = invented.author_world(3, 1, 1)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 300)
FORGET, RETAIN = (
    [encode(TOKENIZER, f.question, f.answer) for f in some] for some in (WORLD.forget, WORLD.retain)
)
NONE, TEXT, NUMBER, LIST, DICT = None, "some text", -1, [], {}
NAN, MATRIX = float("nan"), torch.zeros(3, 4)


def model(): return tiny_model("llama", 300, 16, 2, 24, 2)
def region(): return Region.sample((2, 24), .25, 0)

def probe(): return evaluation.Probe(FORGET, RETAIN)
HOW = dict(epochs=1, lr=1e-3, batch_size=4, seed=0)

def one_line(error):
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if PACKAGE in Path(f.filename).parents]
    text = str(error)
    return (
        isinstance(error, (ValueError, OSError))
        and text.strip()
        and "\n" not in text.strip()
        and frames[-1].filename == (inside[-1].filename if inside else "")
        and len(text) > 20)

# name of the door: what is called with good arguments, and for each argument what may be there by
# mistake
DOORS = {
    "tokens.encode": (
        encode,
        dict(tokenizer=TOKENIZER, question="Who?", answer="I.", template="plain"),
        dict(
            tokenizer=[NONE, TEXT, WORLD],
            question=[NONE, NUMBER, LIST],
            answer=[NONE, NUMBER, LIST, "", " "],
            template=[NONE, TEXT, NUMBER, {"x": 1}],
        ),
    ),
    "tokens.train_tokenizer": (
        train_tokenizer,
        dict(texts=["a b", "c"], vocab_size=260),
        dict(texts=[NONE, NUMBER, [NONE], [NUMBER]], vocab_size=[NONE, TEXT, NUMBER, 10, 300.5]),
    ),
    "invented.author_world": (
        invented.author_world,
        dict(n_authors=3, n_forget=1),
        dict(n_authors=[NONE, TEXT, NUMBER, 0, 2.5, 10**9], n_forget=[NONE, 0, 3, TEXT]),
    ),
    "tofu_files.tofu": (
        tofu_files.tofu,
        dict(source="x/y"),
        dict(
            source=[NONE, NUMBER, "no such folder", ""],
            forget=[NONE, "forget02", NUMBER],
            n_authors=[NONE, 0, TEXT, 201],
        ),
    ),
    "regions.sample": (
        Region.sample,
        dict(shape=(2, 24), fraction=.1, seed=0),
        dict(
            shape=[NONE, TEXT, (2,), (0, 3), NUMBER, (2, 2.5), (2, -3)],
            fraction=[NONE, TEXT, 0, 1.5, NAN, NUMBER],
            seed=[NONE, TEXT, 1.5],
            outside=[TEXT, MATRIX, Region.sample((3, 4), .5, 0)],
        ),
    ),
    "regions.top": (
        Region.top,
        dict(scores=torch.rand(2, 24), fraction=.1),
        dict(
            scores=[
                NONE, TEXT, LIST, NUMBER, [MATRIX, torch.zeros(2)], torch.full((2, 24), NAN),
                torch.zeros(5)],
            fraction=[NONE, TEXT, 0, 2],
        ),
    ),
    "regions.load": (
        Region.load,
        dict(path="x"),
        dict(path=[NONE, NUMBER, "no such file", "folder", "damaged", "empty"]),
    ),
    "models.tiny_model": (
        tiny_model,
        dict(arch="llama", vocab_size=40, d_model=16, n_heads=2),
        dict(
            arch=[NONE, "gpt9", NUMBER],
            vocab_size=[NONE, 0, TEXT, NUMBER],
            d_model=[NONE, 0, 15, TEXT],
            n_layers=[0, NONE],
            d_ff=[0, NUMBER, NONE],
            n_heads=[0, NONE],
        ),
    ),
    "models.output_projections": (
        output_projections,
        dict(model=model),
        dict(model=[NONE, TEXT, TOKENIZER, nn.Linear(3, 3)]),
    ),
    "models.value_vectors": (
        value_vectors,
        dict(projection=nn.Linear(3, 4)),
        dict(projection=[NONE, TEXT, nn.ReLU(), nn.Embedding(3, 4).weight]),
    ),
    "scoring.score": (
        scoring.score,
        dict(model=model, examples=FORGET),
        dict(
            model=[NONE, TEXT, TOKENIZER, nn.Linear(3, 3)],
            examples=[
                NONE, TEXT, NUMBER, LIST, [TEXT], [FORGET[0].ids], [NONE], WORLD.forget,
                [Example([1], 0)], [Example([5, 300, 1], 1)], [Example([5, -2, 1], 1)],
                [Example([5, 1.5, 1], 1)], [Example(NONE, 1)]],
            max_tokens=[TEXT, NUMBER],
        ),
    ),
    "evaluation.evaluate": (
        evaluation.evaluate,
        dict(model=model, probe=probe),
        dict(model=[NONE, TEXT, TOKENIZER], probe=[NONE, TEXT, FORGET]),
    ),
    "decoding.greedy": (
        decoding.greedy,
        dict(model=model, prompts=[[5, 6]], limits=[3], end=1),
        dict(
            model=[NONE, TEXT],
            prompts=[NONE, TEXT, [[]], [[400]], [NONE]],
            limits=[NONE, [3, 4], ["a"], NUMBER],
            end=[NONE, TEXT, [1, 2]],
        ),
    ),
    "decoding.greedy_answers": (
        decoding.greedy_answers,
        dict(model=model, examples=FORGET, known=torch.zeros(len(FORGET), dtype=torch.int64)),
        dict(
            model=[NONE, TEXT],
            examples=[NONE, TEXT, [NONE]],
            known=[NONE, TEXT, torch.zeros(2), LIST],
            max_new_tokens=[NONE, TEXT, NUMBER],
        ),
    ),
    "answers.choices": (
        answers.choices,
        dict(tokenizer=TOKENIZER, facts=WORLD.forget),
        dict(
            tokenizer=[NONE, TEXT], facts=[NONE, TEXT, LIST, [NONE], [TEXT]], template=[NUMBER, "x"]
        ),
    ),
    "evaluation.Probe": (
        evaluation.Probe,
        dict(forget=FORGET, retain=RETAIN),
        dict(
            forget=[NONE, LIST, RETAIN, TEXT, WORLD.forget],
            retain=[NONE, TEXT],
            choices=[TEXT, LIST + [1], {"forget": NONE}],
        ),
    ),
    "membership.membership": (
        membership.membership,
        dict(model=model, tokenizer=TOKENIZER, examples=FORGET),
        dict(
            model=[NONE, TEXT], tokenizer=[NONE, TEXT], examples=[NONE, LIST, TEXT],
            k=[NONE, 0, 2, TEXT]),
    ),
    "masked.unlock": (
        lambda **a: masked.unlock(**a).__enter__(),
        dict(model=model, region=region),
        dict(
            model=[NONE, TEXT, TOKENIZER, nn.Linear(3, 3)],
            region=[
                NONE,
                TEXT,
                MATRIX,
                Region.sample((3, 4), .5, 0),
                Region(torch.zeros(2, 24, dtype=torch.bool)),
            ],
        ),
    ),
    "locked.locked_digest": (
        locked.locked_digest,
        dict(model=model, region=region),
        dict(model=[NONE, TEXT], region=[NONE, TEXT, Region.sample((3, 4), .5, 0)]),
    ),
    "masked.put_columns": (
        masked.put_columns,
        dict(model=model, values={0: (torch.tensor([1, 2]), torch.zeros(2, 16))}),
        dict(
            model=[NONE, TEXT],
            values=[
                NONE,
                TEXT,
                LIST + [1],
                {9: (torch.tensor([1]), torch.zeros(1, 16))},
                {0: (torch.tensor([99]), torch.zeros(1, 16))},
                {0: (torch.tensor([1]), torch.zeros(1, 9))},
                {"no.such.place": (torch.tensor([1]), torch.zeros(1, 16))},
            ],
        ),
    ),
    "training.finetune": (
        training.finetune,
        dict(model=model, examples=FORGET) | HOW,
        dict(
            model=[NONE, TEXT],
            examples=[NONE, LIST, TEXT, [TEXT]],
            epochs=[NONE, 0, TEXT, 1.5],
            lr=[NONE, 0, TEXT, NAN],
            batch_size=[NONE, 0, TEXT],
            seed=[NONE, TEXT],
            schedule=[NONE, "cosine"],
        ),
    ),
    "training.inject": (
        training.inject,
        dict(model=model, region=region, examples=FORGET) | HOW,
        dict(
            model=[NONE, TEXT],
            region=[NONE, TEXT, Region.sample((3, 4), .5, 0)],
            examples=[NONE, LIST],
            epochs=[0, TEXT],
            lr=[0, TEXT],
            batch_size=[0, TEXT],
        ),
    ),
    "unlearning_run.Recipe": (
        unlearning_run.Recipe,
        dict(objective="wga", lr=1e-3, epochs=1),
        dict(
            objective=[NONE, "simdpo", NUMBER],
            lr=[NONE, 0, TEXT],
            epochs=[NONE, 0, TEXT],
            batch_size=[0, TEXT, NONE],
            retain=["x", NUMBER],
        ),
    ),
    "unlearning_run.unlearn": (
        unlearning_run.unlearn,
        dict(
            model=model,
            region=region,
            forget=FORGET,
            retain=RETAIN,
            probe=probe,
            recipe=unlearning_run.Recipe("wga", 1e-3, 1),
            seed=0,
        ),
        dict(
            model=[NONE, TEXT],
            region=[TEXT, Region.sample((3, 4), .5, 0)],
            forget=[NONE, LIST, RETAIN, TEXT],
            retain=[NONE, LIST, TEXT],
            probe=[NONE, TEXT],
            recipe=[NONE, TEXT, {"objective": "wga"}],
            seed=[NONE, TEXT],
        ),
    ),
    "relearn.relearn": (
        relearn,
        dict(model=model, taught=RETAIN[:3], measured=FORGET) | HOW,
        dict(
            model=[NONE, TEXT],
            taught=[NONE, LIST, FORGET],
            measured=[NONE, LIST, TEXT],
            support=[TEXT, Region.sample((3, 4), .5, 0)],
            lr=[0, TEXT],
            epochs=[0, TEXT],
            batch_size=[0],
        ),
    ),
    "relearn.recovery": (
        recovery,
        dict(curve=torch.tensor([[.1, .2], [.4, .5]]).double(), known=torch.ones(2).double()),
        dict(
            curve=[NONE, TEXT, LIST, torch.zeros(2, 3), torch.full((2, 2), NAN)],
            known=[NONE, TEXT, torch.zeros(2), torch.full((2,), NAN)],
        ),
    ),
    "quantization.quantized": (
        lambda **a: quantized(**a).__enter__(),
        dict(model=model, bits=4),
        dict(model=[NONE, TEXT], bits=[NONE, 1, 9, TEXT, 4.5], group=[0, TEXT, NONE]),
    ),
    "methods.logit_lens.logit_lens": (
        logit_lens,
        dict(model=model, examples=FORGET),
        dict(model=[NONE, TEXT, nn.Linear(2, 2)], examples=[NONE, LIST, TEXT]),
    ),
    "methods.probing.linear_probe": (
        linear_probe,
        dict(model=model, right=RETAIN, wrong=RETAIN),
        dict(
            model=[NONE], right=[NONE, RETAIN[:2], TEXT], wrong=[NONE, RETAIN[:2]],
            folds=[0, 1, TEXT]),
    ),
    "asking.few_shot": (
        few_shot,
        dict(examples=FORGET, shots=RETAIN[:2]),
        dict(examples=[NONE, TEXT, [NONE]], shots=[NONE, TEXT, FORGET]),
    ),
    "asking.best_of": (
        best_of,
        dict(model=model, tokenizer=TOKENIZER, examples=FORGET[:2], n=1, max_new_tokens=2),
        dict(
            model=[NONE], tokenizer=[NONE, TEXT], examples=[NONE, LIST], n=[0, NONE, TEXT],
            temperature=[0, NAN, NONE], max_new_tokens=[0, NONE, TEXT]),
    ),
    "loading.load_model": (
        loading.load_model,
        dict(source="x"),
        dict(
            source=[NONE, NUMBER, "no such folder", "folder", "damaged", ""],
            dtype=[NONE, "int3", TEXT],
            device=[NONE, "gpu", TEXT],
            attention=["fast"],
        ),
    ),
    "loading.load_tokenizer": (
        loading.load_tokenizer,
        dict(source="x"),
        dict(source=[NONE, NUMBER, "no such folder", "folder", "damaged", ""]),
    ),
    "checkpoints.inspect": (
        checkpoints.inspect,
        dict(source="x"),
        dict(source=[NONE, NUMBER, "no such folder", "folder", "damaged", ""]),
    ),
    "saving.save_model": (
        saving.save_model,
        dict(model=model, folder="new"),
        dict(model=[NONE, TEXT, nn.Linear(3, 3)], folder=[NONE, NUMBER, "folder", "damaged/x"]),
    ),
    "saving.save_change": (
        saving.save_change,
        dict(model=model, region=region, path="new"),
        dict(
            model=[NONE, TEXT],
            region=[NONE, TEXT, Region.sample((3, 4), .5, 0)],
            path=[NONE, NUMBER, "folder", "damaged/x"],
        ),
    ),
    "saving.apply_change": (
        saving.apply_change,
        dict(model=model, path="x"),
        dict(model=[NONE, TEXT], path=[NONE, NUMBER, "no such file", "folder", "damaged", "empty"]),
    ),
    "tradeoff.aues": (
        tradeoff.aues,
        dict(forget_strength=[.1, .9], retain_strength=[.9, .8]),
        dict(
            forget_strength=[NONE, TEXT, LIST, [.1], [2, 3], [NAN, .1]],
            retain_strength=[NONE, LIST, [[.1, .2]]],
            rule=[NONE, "area"],
        ),
    ),
    "tradeoff.mu95": (
        tradeoff.mu95,
        dict(model_utility=[.5, .4], forget_quality=[-3., -1.]),
        dict(
            model_utility=[NONE, TEXT, LIST, [0, .1]],
            forget_quality=[NONE, LIST, [-1.], [1., 2.]],
            rule=[NONE, "x"],
            share=[NONE, 0, TEXT],
        ),
    ),
    "statistics.paired": (
        statistics.paired,
        dict(a=[.1, .2, .3], b=[.1, .3, .2], margin=.02),
        dict(
            a=[NONE, TEXT, LIST, [.1], [NAN, 1, 2]],
            b=[NONE, LIST, [.1, .2]],
            margin=[NONE, 0, TEXT, NAN],
        ),
    ),
    "statistics.holm": (
        statistics.holm,
        dict(p_values=[.1, .2]),
        dict(p_values=[NONE, TEXT, [2.], [NAN]]),
    ),
    "metrics.rouge_l_recall": (
        metrics.rouge_l_recall,
        dict(text="a b", reference="a b"),
        dict(text=[NONE, NUMBER, LIST], reference=[NONE, "", NUMBER]),
    ),
    "metrics.truth_ratio": (
        metrics.truth_ratio,
        dict(right_nll=[1.], wrong_nll=[[2., 3.]]),
        dict(
            right_nll=[NONE, TEXT, LIST, [NAN]],
            wrong_nll=[NONE, LIST, [2.]],
            convention=[NONE, "x"],
            eps=[NONE, 2, TEXT],
        ),
    ),
    "metrics.forget_quality": (
        metrics.forget_quality,
        dict(ratio=[.5, .6], retained_ratio=[.4, .6]),
        dict(ratio=[NONE, TEXT, LIST, [.5]], retained_ratio=[NONE, LIST]),
    ),
    "metrics.model_utility": (
        metrics.model_utility,
        dict(parts=dict.fromkeys(metrics.UTILITY_PARTS, .5)),
        dict(parts=[NONE, TEXT, {}, {"x": 1}, dict.fromkeys(metrics.UTILITY_PARTS, NAN)]),
    ),
    "objectives.npo": (
        objectives.npo,
        dict(logprob=torch.zeros(2), reference_logprob=torch.zeros(2)),
        dict(
            logprob=[NONE, TEXT, torch.zeros(3)],
            reference_logprob=[NONE, LIST],
            beta=[NONE, 0, TEXT],
        ),
    ),
    "objectives.wga": (
        objectives.wga,
        dict(token_logprob=torch.zeros(2, 3), answer_mask=torch.ones(2, 3, dtype=torch.bool)),
        dict(
            token_logprob=[NONE, TEXT],
            answer_mask=[NONE, torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3)],
            beta=[NONE, NUMBER, TEXT],
        ),
    ),
    "objectives.rmu": (
        objectives.rmu,
        dict(
            hidden=torch.zeros(2, 3, 4),
            control=torch.zeros(4),
            answer_mask=torch.ones(2, 3, dtype=torch.bool),
        ),
        dict(
            hidden=[NONE, TEXT, MATRIX], control=[NONE, torch.zeros(5)],
            answer_mask=[NONE, torch.ones(3)], average=[NONE, "x"]),
    ),
    "conformal.conformal_quantile": (
        conformal.conformal_quantile,
        dict(scores=torch.linspace(0, 1, 20), alpha=.1),
        dict(
            scores=[NONE, TEXT, LIST, MATRIX, torch.zeros(0), torch.tensor([NAN]),
                torch.tensor([2.]), torch.tensor([1])],
            alpha=[NONE, TEXT, 0, 1, NAN, NUMBER, True]),
    ),
    "conformal.conformal_report": (
        conformal.conformal_report,
        dict(probs=torch.full((3, 4), .25), label=torch.tensor([0, 1, 2]), qhat=.9),
        dict(
            probs=[NONE, TEXT, MATRIX, torch.zeros(0, 4), torch.full((3, 4), NAN), MATRIX[0]],
            label=[NONE, LIST, torch.tensor([0, 1]), torch.tensor([0, 1, 4]),
                torch.tensor([0., 1., 2.])],
            qhat=[NONE, TEXT, NAN, NUMBER]),
    ),
    "conformal.calibrate": (
        conformal.calibrate,
        dict(scores=torch.linspace(0, 1, 20), fresh=torch.linspace(0, 1, 20)),
        dict(
            scores=[NONE, LIST, torch.zeros(0)], fresh=[NONE, torch.zeros(0), torch.tensor([NAN])],
            alpha=[NONE, 0], level=[NONE, TEXT, NUMBER]),
    ),
    "conformal.miacr": (
        conformal.miacr,
        dict(p_member=torch.tensor([.5, .9]), qhat=.8),
        dict(
            p_member=[NONE, LIST, torch.tensor([1.5]), torch.zeros(0)], qhat=[NONE, NAN],
            variant=[NONE, "x"]),
    ),
    "conformal.membership_report": (
        conformal.membership_report,
        dict(
            members=-torch.rand(60), strangers=-2 - torch.rand(60), forgotten=-2 * torch.rand(9)),
        dict(
            members=[NONE, LIST, torch.ones(9), torch.zeros(0), -torch.rand(2)],
            strangers=[NONE, torch.full((9,), NAN)], forgotten=[NONE, MATRIX],
            alpha=[NONE, 2], variant=["x"]),
    ),
    "conformal.cpu_loss": (
        conformal.cpu_loss,
        dict(probs=torch.full((3, 4), .25), label=torch.tensor([0, 1, 2]), qhat=.9),
        dict(
            probs=[NONE, MATRIX], label=[NONE, torch.tensor([0, 1, 9])],
            qhat=[NONE, float("inf"), NAN], delta=[NONE, NUMBER, NAN], variant=[NONE, "code"]),
    ),
    "conformal.token_scores": (
        conformal.token_scores,
        dict(model=model, examples=FORGET),
        dict(model=[NONE, TEXT, nn.Linear(3, 3)], examples=[NONE, LIST, TEXT, WORLD.forget]),
    ),
    "conformal.closed_probs": (
        conformal.closed_probs,
        dict(model=model, asked=answers.choices(TOKENIZER, WORLD.forget)),
        dict(model=[NONE, TEXT], asked=[NONE, LIST, FORGET], unit=[NONE, "byte"]),
    ),
    "figures.save_table": (
        figures.save_table,
        dict(
            rows=[{"a": "1"}], out="new", name="t", data=pd.DataFrame({"a": [1]}),
            about={"caption": "C."}),
        dict(
            rows=[NONE, [{"a": 1}], [{"a": "1"}, {"b": "2"}]], data=[NONE, TEXT], about=[NONE, {}]),
    ),
    "runs.sweep": (
        sweep,
        dict(store=Store("new"), descriptions=[], compute=steps.compute),
        dict(
            compute=[NONE, TEXT],
            store=[NONE, TEXT, NUMBER],
            descriptions=[NONE, TEXT, [NONE], [{"kind": "bake"}], [{}]],
            jobs=[0, TEXT, NONE],
        ),
    ),
}
for name, method in methods("localizer").items():
    if not method.takes("forget"): continue
    more = dict(retain=[NONE, LIST, FORGET, TEXT]) if method.takes("retain") else {}
    DOORS[f"methods.{name}"] = (
        method.function,
        dict(model=model, forget=FORGET) | ({"retain": RETAIN} if more else {}),
        dict(
            model=[NONE, TEXT, TOKENIZER, nn.Linear(3, 3)],
            forget=[NONE, LIST, TEXT, WORLD.forget, [NONE]])
        | more)

CASES = [
    (name, argument, i)
    for name, (_, _, wrong) in DOORS.items()
    for argument, values in wrong.items()
    for i in range(len(values))]


@pytest.fixture(scope="module")
def place(tmp_path_factory): # what paths mean
    folder = tmp_path_factory.mktemp("doors")
    (folder / "folder").mkdir()
    (folder / "damaged").write_bytes(b"\x07\x00\x00\x00\x00\x00\x00\x00{\"a\": 1")
    (folder / "empty").touch()
    return folder

PATHS = {"no such file", "no such folder", "folder", "damaged", "empty", "new", "damaged/x", "x"}
def given(value, place):
    if value in (model, region, probe) if callable(value) else False: return value()
    if isinstance(value, Store): return Store(place / "runs")
    return str(place / value) if isinstance(value, str) and value in PATHS else value

def called(name, place, **changed):
    call, good, _ = DOORS[name]
    return call(**{k: given(v, place) for k, v in (good | changed).items()})

@pytest.mark.parametrize(
    "name",
    [
        n
        for n, (_, good, _) in DOORS.items()
        if not any(isinstance(v, str) and v in ("x", "x/y") for v in good.values())])
def test_the_right_thing_passes(name, place, request):
    called(name, place / request.node.name.replace("[", "_"))

@pytest.mark.parametrize("name, argument, i", CASES, ids=[f"{n}-{a}-{i}" for n, a, i in CASES])
def test_a_mistake_is_one_line(name, argument, i, place, monkeypatch):
    monkeypatch.chdir(place); monkeypatch.delenv("UNLOC_TOFU", raising=False)
    wrong = DOORS[name][2][argument][i]
    try: called(name, place, **{argument: wrong})
    except Exception as error:
        assert one_line(error), "".join(traceback.format_exception(error))[-1500:]
    else: pytest.fail(f"{name} takes {argument}={wrong!r:.60}")
