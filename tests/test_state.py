"""Whatever state a model and the process are in, a public function that takes a model gives the
numbers of a clean model in evaluation mode, and leaves everything as it was, also after an
error."""
import contextlib, copy, importlib, inspect, pkgutil, random, warnings
from itertools import chain
import numpy, pytest, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
import unloc
from unloc import (
    answers, decoding, direct_supervision, evaluation, follows, heads, limits, loading,
    locked, logits, masked, membership, models, saving, scoring, streaming, training, undisturbed,
    unlearning_run)
from unloc.asking import best_of
from unloc.attributions import answer_attributions
from unloc.change import Change, compared, edited
from unloc.choosing import known_facts
from unloc.conformal import closed_probs, token_scores, token_sets
from unloc.deletion import first_spread, holding, judged, reset_values, taught_again
from unloc.edit_metrics import predicted_tokens
from unloc.editing import Edits, check_layers, editable, keys_and_values, second_moments
from unloc.faithfulness import answers_of
from unloc.inside import final_norm, hidden_states, patched_logprob
from unloc.invented import author_world
from unloc.layerwise import (
    attention_of, compare_layer_training, finetune_layers, layer_gradient_norms, layer_weights,
    mean_nll)
from unloc.methods.depth import depth_of_facts, unlearning_depth
from unloc.methods.gradient import gradient as scored_by_gradient
from unloc.methods.logit_lens import logit_lens
from unloc.methods.probing import linear_probe
from unloc.methods.reset import reset
from unloc.methods.restore import restore
from unloc.methods.zeroing import zeroing
from unloc.neurons import attribution
from unloc.quantization import library_quantized, quantized
from unloc.regions import Region
from unloc.register import methods, METHODS
from unloc.retaught import low_rank, relearn_low_rank
from unloc.relearn import relearn
from unloc.restoring import (
    CONTROLS, Restoring, check_alike, coefficient_weights, continued, drifts, krs_curves,
    logit_distance, suppressed, wholly_right)
from unloc.scene import Scene
from unloc.subjects import averaged, requests, variants
from unloc.tokens import collate, encode, train_tokenizer
from unloc.tracing import causal_trace, vocabulary_ranks
from unloc.unlearning_token import (
    TokenRow, spare_row, stages, teach_token, token_chain, token_of, token_rows)
from unloc.values import (
    Search, find_values, layers_for, stream_at, tune_layer, writes_plainly)

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts[:6]]
    for facts in (WORLD.forget, WORLD.retain))
WRONG = [encode(TOKENIZER, f.question, f.perturbed_answer[0]) for f in WORLD.forget[:6]]
SETS = {
    "forget": WORLD.forget,
    "retain": WORLD.retain,
    "real_authors": WORLD.real_authors,
    "world_facts": WORLD.world_facts}
PROBE = evaluation.Probe(
    GET,
    KEEP,
    KEEP[:2],
    {name: answers.choices(TOKENIZER, facts[:2]) for name, facts in SETS.items()},
    TOKENIZER,
    max_new_tokens=5)
REFUSALS = [e.ids[e.start:] for text in WORLD.refusals[:3] if (e := encode(TOKENIZER, "", text))]
BATCH, REGION = collate(GET), Region.sample((2, 64), .2, 0)
RATES = torch.tensor([1., .5]) # of the two layers

def small(): # every dropout of GPT-2, and strong
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=160, resid_pdrop=.4,
            embd_pdrop=.4, attn_pdrop=.4, bos_token_id=1, eos_token_id=1)).eval()

CLEAN = small()
WHERE = {0: (torch.arange(2), torch.ones(2, 16))} # two value vectors
def shifted(m): # a copy with one weight moved
    other = copy.deepcopy(m)
    with torch.no_grad(): next(other.parameters()).add_(1.)
    return other
SHIFTED = shifted(small())
STATES, TARGETS = hidden_states(CLEAN, GET), direct_supervision.mlp_targets(CLEAN, GET)
KNOWN, HIDDEN = scoring.score(CLEAN, GET).known, logits.answer_hidden(CLEAN, BATCH).detach()
def recipe(**more):
    return unlearning_run.Recipe(**dict(objective="npo", lr=1e-3, epochs=2, batch_size=3) | more)
def within(context, act=lambda m: scoring.score(m, GET)):
    def call(m):
        with context(m): return act(m)
    return call
# a user's own loop: the forward pass under whatever autocast there is, the backward pass outside of
# it
def taught(m, columns):
    with torch.inference_mode(False), torch.enable_grad():
        loss = -scoring.answers_logprob(m, GET)[0].sum()
        with torch.autocast("cpu", enabled=False):
            return loss.detach(), *torch.autograd.grad(loss, columns.parameters())
def saved(m, folder):
    saving.save_change(m, REGION, folder / "change")
    return saving.apply_change(m, folder / "change")

def looked_at(stream, m):
    seen = []
    stream(m, GET, lambda layer, *x: seen.append((layer, x)))
    return seen
def scored_by(name):
    options = {
        "integrated_gradients": {"steps": 3},
        "memflex": {"copies": 2},
        "memflex_projections": {"copies": 1}}.get(name, {})
    return lambda m: methods("localizer")[name](
        model=m,
        forget=GET[:2] if name == "integrated_gradients" else GET,
        retain=KEEP,
        seed=0,
        options=options)
def place(method):
    return f"{method.function.__module__.removeprefix('unloc.')}.{method.function.__name__}"

ASKED = requests(GET, KEEP, "I don't know.", "last")
ROWS, PLACES = variants(ASKED, KEEP, 1), [e.start - 1 for e in GET]
def edited_by(name):
    options = {"steps": 2} | ({} if name[:3] == "ft_" else {"contexts": 1})
    return lambda m: METHODS["editor"][name](
        model=m, forget=GET, retain=KEEP, region=None, options=options).end
def token_taught(m):
    with TokenRow(m, 5) as rows:
        return teach_token(m, rows, stages(GET, ["No."], 5, [0], (1, 0, 1)))

LOOKING = {
    place(method): scored_by(name) for name, method in methods("localizer").items() if method.own
} | { # name: a call that leaves the weights
    "logits.logits_of": lambda m: logits.logits_of(m, HIDDEN),
    "logits.answer_hidden": lambda m: logits.answer_hidden(m, BATCH),
    "logits.answer_logits": lambda m: logits.answer_logits(m, BATCH),
    "logits.over_logits": lambda m: logits.over_logits(m, HIDDEN, lambda x: x.sum(1)),
    "logits.hidden_after": lambda m: logits.hidden_after(m, BATCH, 0),
    "logits.mlp_outputs": lambda m: logits.mlp_outputs(m, BATCH),
    "undisturbed.undisturbed": within(
        undisturbed.undisturbed, lambda m: m(input_ids=BATCH.ids).logits),
    "limits.check_limits": lambda m: limits.check_limits(m, GET, "asked"),
    "limits.vocabulary": limits.vocabulary,
    "limits.most_positions": limits.most_positions,
    "undisturbed.mixed_precision": within(lambda m: undisturbed.mixed_precision(m, torch.bfloat16)),
    "models.output_projections": lambda m: len(models.output_projections(m)),
    "models.region_shape": models.region_shape,
    "logits.mask_limit": logits.mask_limit,
    "logits.own_mask": lambda m: logits.own_mask(
        m, torch.ones(1, 3, 3, dtype=torch.bool, device="cpu")),
    "streaming.watched": within(lambda m: streaming.watched(m, lambda *_: None)),
    "streaming.zero_scores": streaming.zero_scores,
    "streaming.per_layer_coefficients": lambda m: looked_at(streaming.per_layer_coefficients, m),
    "streaming.output_gradients": lambda m: looked_at(streaming.output_gradients, m),
    "streaming.mean_gradients": lambda m: streaming.mean_gradients(m, GET),
    "streaming.mean_squares": lambda m: streaming.mean_squares(m, GET),
    "streaming.per_layer_gradients": lambda m: streaming.per_layer_gradients(
        m, GET, KEEP, lambda v, f, r: (v * f - r).sum(0)),
    "streaming.ordinary_tokens": lambda m: streaming.ordinary_tokens(m, GET),
    "streaming.corrupted_copies": lambda m: streaming.corrupted_copies(m, [GET, KEEP], 2, 0),
    "streaming.check_scores": lambda m: streaming.check_scores(
        [p.weight.T for p in models.output_projections(m)], m, "mine"),
    "scoring.answer_token_logprob": lambda m: scoring.answer_token_logprob(m, BATCH),
    "scoring.answer_logprob": lambda m: scoring.answer_logprob(m, BATCH),
    "scoring.answers_logprob": lambda m: scoring.answers_logprob(m, GET),
    "scoring.score": lambda m: scoring.score(m, GET),
    "decoding.greedy": lambda m: decoding.greedy(
        m, [e.ids[:e.start] for e in GET], [6] * 6, 1),
    "decoding.greedy_answers": lambda m: decoding.greedy_answers(m, GET, KNOWN, 6),
    "decoding.rouge": lambda m: decoding.rouge(m, TOKENIZER, GET, KNOWN, 6),
    "membership.membership": lambda m: membership.membership(m, TOKENIZER, GET),
    "evaluation.evaluate": lambda m: evaluation.evaluate(m, PROBE),
    "decoding.check_unseen": lambda m: decoding.check_unseen(m, TOKENIZER, "phi"),
    "answers.choose": lambda m: answers.choose(
        m,
        answers.Options(
            [GET[:2], GET[2:4]], [[True, False], [False, True]], [["a", "b"], ["c", "d"]]),
    ),
    "unlearning_run.weighted_sum": lambda m: unlearning_run.weighted_sum(
        m, [(1., unlearning_run.Term([GET, KEEP], lambda a, b: a[0].sum() - b[0].sum()))]),
    "direct_supervision.mlp_targets": lambda m: direct_supervision.mlp_targets(m, GET),
    "training.held": within(lambda m: training.held(m, REGION)),
    "unlearning_run.Unlearning": lambda m: unlearning_run.Unlearning(m, None, 0).block(.5),
    "retaught.low_rank": within(low_rank),
    "retaught.relearn_low_rank": lambda m: relearn_low_rank(m, KEEP, GET, 1e-3, 1, 4, 0, rank=2),
    "relearn.relearn": lambda m: relearn(m, KEEP, GET, 1e-3, 2, 3, 0),
    "quantization.quantized": within(lambda m: quantized(m, 4)),
    "quantization.library_quantized": within(lambda m: library_quantized(m, 8)),
    "evaluation.Measured": lambda m: [*evaluation.Measured(m, PROBE, {}, {}, {}, False).utility],
    "masked.columns_at": lambda m: masked.columns_at(m, WHERE),
    "masked.columns_of": lambda m: masked.columns_of(m, REGION),
    "change.Change": lambda m: len(Change(WHERE, WHERE, m).columns),
    "change.Change.of": lambda m: Change.of(m, WHERE).start,
    "change.Change.between": lambda m: Change.between(m, shifted(m)).end,
    "editing.check_layers": lambda m: check_layers(m, [0]),
    "editing.editable": lambda m: editable(m, REGION, [1]),
    "editing.Edits": lambda m: Edits(m, None, [0]).layers,
    "editing.keys_and_values": lambda m: keys_and_values(m, GET, PLACES, 1),
    "editing.second_moments": lambda m: second_moments(m, KEEP, [0, 1]),
    "subjects.averaged": lambda m: averaged(m, ROWS, 0),
    "values.find_values": lambda m: find_values(
        m, ASKED, ROWS, 0, torch.ones(6, device="cpu"), Search(steps=2)),
    "values.stream_at": lambda m: stream_at(m, GET, PLACES, 0),
    "values.writes_plainly": lambda m: writes_plainly(m, 0, GET[0]),
    "values.layers_for": lambda m: layers_for(m, [0, 1], 4, 8, GET[0]),
    "values.tune_layer": lambda m: tune_layer(
        m, GET, REGION, 1, lambda logits, batch, row: logits.square().mean(1), steps=2).end,
    "edit_metrics.predicted_tokens": lambda m: predicted_tokens(m, GET),
    "neurons.attribution": lambda m: attribution(m, GET[0], 1, steps=3),
    "tracing.causal_trace": lambda m: causal_trace(m, GET[0], (1, 3)),
    "tracing.vocabulary_ranks": lambda m: vocabulary_ranks(m, HIDDEN[:2].T, 5),
    "layerwise.attention_of": lambda m: len(attention_of(m)),
    "layerwise.layer_weights": lambda m: [len(ps) for ps in layer_weights(m, "mlp")],
    "layerwise.layer_gradient_norms": lambda m: layer_gradient_norms(m, GET),
    "layerwise.mean_nll": lambda m: mean_nll(m, GET),
    "layerwise.compare_layer_training": lambda m: compare_layer_training(
        m, GET, {"taught": GET}, {"one": RATES}, 1, 1e-3, 3, 0),
    "restoring.check_alike": lambda m: check_alike(m, shifted(m)),
    "restoring.Restoring": lambda m: restored(m),
    "restoring.logit_distance": lambda m: logit_distance(m, shifted(m), GET),
    "restoring.krs_curves": lambda m: krs_curves(m, shifted(m), GET).restored,
    "restoring.continued": lambda m: [e.ids for e in continued(m, GET, 4)],
    "restoring.coefficient_weights": lambda m: len(coefficient_weights(m, 1)),
    "restoring.suppressed": lambda m: weights(suppressed(m, GET, KEEP, CONTROLS[1], 1, 2)),
    "restoring.wholly_right": lambda m: wholly_right(m, GET),
    "restoring.drifts": lambda m: drifts(m, shifted(m), {"forget": GET}),
    "methods.rome.rome": edited_by("rome"),
    "methods.memit.memit": edited_by("memit"),
    "methods.alphaedit.alphaedit": edited_by("alphaedit"),
    "methods.unierase.unierase": edited_by("unierase"),
    "unlearning_token.spare_row": lambda m: spare_row(m, GET),
    "unlearning_token.TokenRow": lambda m: TokenRow(m, 5).change(),
    "unlearning_token.token_rows": lambda m: token_rows(None, m),
    "unlearning_token.token_of": lambda m: token_of(None, m),
    "unlearning_token.teach_token": token_taught,
    "unlearning_token.token_chain": lambda m: tuple(token_chain(m, GET, 5)),
    "methods.ft_l.ft_l": edited_by("ft_l"),
    "methods.knowledge_neurons.knowledge_neuron_edit": lambda m: METHODS["editor"]["kn"](
        model=m, forget=GET[:2], region=None, options={"steps": 2}).end,
    "attributions.answer_attributions": lambda m: answer_attributions(m, GET),
    "choosing.known_facts": lambda m: known_facts(m, PROBE.choices["forget"]),
    "follows.continuation": lambda m: follows.continuation(m, GET[0], 3),
    "follows.all_vectors": follows.all_vectors,
    "follows.hits": lambda m: follows.hits(
        m, follows.all_vectors(m), follows.all_vectors(shifted(m)), 5),
    "methods.ft_m.ft_m": edited_by("ft_m"),
    "change.compared": lambda m: compared(m, shifted(m), m),
    "scene.Scene": (
        lambda m: Scene(m, m, m, {"forget": GET}, *[torch.ones(len(GET))] * 2).share(
            torch.ones(len(GET)))),
    "scene.Scene.of": lambda m: Scene.of(m, m, m, {"forget": GET}).left,
    "methods.restore.restore": lambda m: restore(m, REGION, SHIFTED).end,
    "methods.zeroing.zeroing": lambda m: zeroing(m, REGION).end,
    "methods.reset.reset": lambda m: reset(m, KEEP, REGION, epochs=2).end,
    "deletion.first_spread": first_spread,
    "deletion.reset_values": lambda m: reset_values(m, REGION),
    "deletion.taught_again": lambda m: taught_again(m, REGION, KEEP, epochs=2),
    "deletion.holding": lambda m: within(lambda m: holding(m, reset_values(m, REGION)))(m),
    "deletion.judged": lambda m: judged(
        m, Scene(m, m, m, {"forget": GET, "retain": KEEP}, *[torch.ones(len(GET))] * 2)),
    "inside.final_norm": lambda m: type(final_norm(m)).__name__,
    "inside.hidden_states": lambda m: hidden_states(m, GET),
    "methods.logit_lens.logit_lens": lambda m: logit_lens(m, GET),
    "methods.probing.linear_probe": lambda m: linear_probe(m, GET, WRONG, folds=2),
    "inside.patched_logprob": lambda m: patched_logprob(m, GET, 1, STATES[1]),
    "methods.depth.unlearning_depth": lambda m: unlearning_depth(
        m, GET, STATES, [[2 * x for x in layer] for layer in STATES], least=-9.),
    "methods.depth.depth_of_facts": lambda m: depth_of_facts(
        m, GET, STATES, [[2 * x for x in layer] for layer in STATES], least=-9., each=True),
    "conformal.closed_probs": lambda m: closed_probs(m, PROBE.choices["forget"], "total"),
    "conformal.token_scores": lambda m: token_scores(m, GET),
    "conformal.token_sets": lambda m: tuple(token_sets(m, GET, .9)),
    "faithfulness.answers_of": lambda m: {
        name: found.right for name, found in answers_of(m, TOKENIZER, WORLD).items()},
    "asking.best_of": lambda m: best_of(m, TOKENIZER, GET, 2, max_new_tokens=5),
    "models.head_of": lambda m: models.head_of(m).weight,
    "logits.bend_of": lambda m: tuple(logits.bend_of(m)),
    "models.check_model": models.check_model,
    "models.check_wrapper": models.check_wrapper,
    "models.blocks_of": lambda m: len(models.blocks_of(m)),
    "masked.is_unlocked": masked.is_unlocked,
    "saving.save_pretrained": lambda m, folder: saving.save_pretrained(
        m, folder / "whole"),
    "masked.unlock": lambda m: unlocked(m),
    "locked.locked_digest": lambda m: locked.locked_digest(m, REGION),
    "locked.locked_checksum": lambda m: locked.locked_checksum(m, REGION),
    "masked.put_columns": lambda m: masked.put_columns(m, {}),
    "heads.Neurons.sample": lambda m: len(heads.Neurons.sample(m, .2, 0)),
    "masked.AllWeights": lambda m: len(masked.AllWeights(m).values()),
    "masked.in_float32": within(masked.in_float32),
    "loading.recompute": lambda m: (
        loading.recompute(m),
        scoring.score(m, GET),
        loading.recompute(m, False),
    )[1],
    "saving.save_model": lambda m, folder: saving.save_model(m, folder / "whole"),
    "saving.save_change": saved,
    "saving.apply_change": saved,
}
TRAINING = { # name: a call that changes weights
    "training.finetune": lambda m: training.finetune(m, GET, 2, 1e-3, 3, 0),
    "layerwise.finetune_layers": lambda m: finetune_layers(m, GET, RATES, 2, 1e-3, 3, 0),
    "training.inject": lambda m: training.inject(m, REGION, GET, 2, 1e-3, 3, 0),
    "training.make_room": lambda m: training.make_room(m, REGION, KEEP, 1, 1e-3, 3, 0),
    "unlearning_run.unlearn": lambda m: unlearning_run.unlearn(
        m, REGION, GET, KEEP, PROBE, recipe(), 0),
    "change.edited": lambda m: edited(METHODS["editor"]["zeroing"], m, REGION)[1],
    "direct_supervision.supervise": lambda m: direct_supervision.supervise(
        m, REGION, GET, PROBE, TARGETS, 2, 1e-3, 3, 0),
}
MORE = { # other ways of the same functions
    "unlearn through all weights": lambda m: unlearning_run.unlearn(
        m, None, GET, KEEP, evaluation.Probe(GET, KEEP), recipe(retain="kl"), 0),
    "unlearn by RMU": lambda m: unlearning_run.unlearn(
        m, REGION, GET, KEEP, evaluation.Probe(GET, KEEP), recipe(objective="rmu"), 0),
    "unlearn by DPO": lambda m: unlearning_run.unlearn(
        m, REGION, GET, KEEP, evaluation.Probe(GET, KEEP), recipe(objective="dpo"), 0, REFUSALS),
    "finetune some weights": lambda m: training.finetune(
        m, GET, 2, 1e-3, 3, 0, [m.transformer.wte.weight, m.transformer.h[1].mlp.c_fc.weight]),
}
def restored(m):
    with Restoring(m, shifted(m))("both", [1]): return scoring.score(m, GET)
def unlocked(m):
    with masked.unlock(m, REGION) as columns: return taught(m, columns)
def everything(): return LOOKING | TRAINING | MORE

# --- no function is forgotten

def takes_a_model(f):
    parameters = list(inspect.signature(f).parameters.values())
    return any(
        p.annotation is nn.Module or p.name in ("model", "original") and p.annotation is not dict
        for p in parameters)

# chapter.name of every public function, class and method of a class itself that takes a model
def public():
    for info in pkgutil.walk_packages(unloc.__path__, "unloc."):
        # what is timed takes the model as it is: tests/test_costs.py
        if info.name.startswith(("unloc.ways", "unloc.measuring")): continue
        if info.name.startswith(("unloc._", "unloc.steps", "unloc.many")):
            # tests/test_many.py compares the latter with runs alone; steps take runs and
            # descriptions, and call what stands here
            continue
        chapter = importlib.import_module(info.name)
        for name, thing in (
            (name, getattr(chapter, name)) for name in getattr(chapter, "__all__", ())):
            if getattr(thing, "__module__", "") != chapter.__name__: continue
            if inspect.isclass(thing):
                for part, method in vars(thing).items():
                    if isinstance(method, (staticmethod, classmethod)) and takes_a_model(
                        method.__func__):
                        yield f"{chapter.__name__.removeprefix('unloc.')}.{name}.{part}"
                thing = vars(thing).get("__init__")
            if inspect.isfunction(thing) and takes_a_model(thing):
                yield f"{chapter.__name__.removeprefix('unloc.')}.{name}"

# two named tuples, and answers of an original model; two that ask by edit_metrics; the others take
# a part of a model, and read its weights
KNOWN_BY_NAME = {
    "follows.edit_numbers", "follows.tokens_before",
    "faithfulness.faithfulness", "export.Exported.__new__", "streaming.Planted.__new__",
    "models.check_linear",
    "models.value_vectors", "experts.ExpertProjection", "experts.Experts"}
def test_every_public_function_that_takes_a_model_is_tested_here():
    assert set(public()) - KNOWN_BY_NAME == set(LOOKING | TRAINING)

# --- odd surroundings

def odd(m): # a model as somebody may have left it
    m.train()
    m.transformer.h[0].attn.eval()
    m.transformer.wpe.eval()
    for i, p in enumerate(m.parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.full_like(p, 5.) if i % 2 else None
    m.config.return_dict = False
    m.config.use_cache = False
    m.generation_config.update(
        repetition_penalty=9., do_sample=True, temperature=3., suppress_tokens=[5, 6], num_beams=2)
    m.transformer.h[1].register_forward_hook(lambda module, inputs, output: None)
    m.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda module, inputs: None)
    m.register_forward_hook(lambda module, inputs, output: None)
    return m

SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "nothing": contextlib.nullcontext,
    "meta": lambda: torch.device("meta")}
@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)

# all that a call could leave behind; transformers writes architectures and dtype into a
# configuration that it saves
def state(m):
    return dict(
        modes=[x.training for x in m.modules()],
        flags=[p.requires_grad for p in m.parameters()],
        grads=[
            None if p.grad is None else (id(p.grad), p.grad.sum().item()) for p in m.parameters()],
        hooks=[
            (list(x._forward_hooks), list(x._forward_pre_hooks), list(x._backward_hooks))
            for x in m.modules()],
        own=[sorted(set(vars(x)) - {"_cache"}) for x in m.modules()],
        config={k: v for k, v in m.config.to_dict().items() if k not in ("architectures", "dtype")}
        | {"return_dict": m.config.return_dict, "use_cache": m.config.use_cache},
        generation=(id(m.generation_config), m.generation_config.to_dict()),
        dtypes=[p.dtype for p in m.parameters()],
        process=(
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads()),
        random=(
            random.getstate(),
            torch.get_rng_state().tolist(),
            numpy.random.get_state()[1].tolist(),
            numpy.random.get_state()[2]))
def weights(m): return [p.detach().clone() for p in m.state_dict().values()]

def several(values): return list(chain.from_iterable(map(flat, values)))
def flat(x): # the numbers of a result, in order
    if isinstance(x, torch.Tensor): return [x.detach().double().flatten().tolist()]
    if isinstance(x, dict): return [x.keys(), *several(x.values())]
    if isinstance(x, (list, tuple)): return several(x)
    if not hasattr(x, "__dict__"): return [repr(x)]
    if not hasattr(x, "__dataclass_fields__"): return [repr(vars(x))]
    return several(vars(x).values())

def run(name, m, folder):
    call = everything()[name]
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flat(
            call(m, folder) if "folder" in inspect.signature(call).parameters else call(m)
        ), flat(weights(m))

# what is trained inside them needs gradients
NOT_WITHOUT_GRADIENTS = "masked.unlock", "training.held"
# they, or the lines of the test, make their own tensors
ON_THE_DEVICE_OF_NEW_TENSORS = (
    "scene.Scene", "saving.save_change", "saving.apply_change", "heads.Neurons.sample")

@pytest.fixture(scope="module")
def clean(tmp_path_factory): # what a model in evaluation mode gives, by name
    found = {}
    def of(name):
        if name not in found:
            found[name] = run(name, small(), tmp_path_factory.mktemp("clean") / "x")
        return found[name]
    return of

@pytest.mark.parametrize("name", everything())
def test_state_neither_enters_nor_changes(name, clean, tmp_path):
    want = clean(name)
    for where, surroundings in SURROUNDINGS.items():
        if where == "meta" and name in ON_THE_DEVICE_OF_NEW_TENSORS: continue
        if where == "inference_mode" and name in NOT_WITHOUT_GRADIENTS:
            m = small()
            with surroundings(), pytest.raises(
                ValueError, match="nothing can be trained inside torch.inference_mode"):
                run(name, m, tmp_path / where)
            continue
        m = odd(small())
        torch.manual_seed(len(where)); random.seed(len(where)); numpy.random.seed(len(where))
        with surroundings():
            before = state(m)
            got = run(name, m, tmp_path / where)
            after = state(m)
        for key in before: assert after[key] == before[key], (where, key)
        assert got == want, where
        if name in LOOKING: assert got[1] == flat(weights(small())), where

class Broken(Exception): "Comes from a hook of the user's, in the middle"

@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("name", everything())
def test_an_error_in_the_middle_leaves_nothing_behind(name, at, tmp_path):
    m, seen = odd(small()), []
    def hook(module, inputs, output):
        seen.append(1)
        if len(seen) == at: raise Broken
    m.transformer.h[1].register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        before = state(m)
        try: run(name, m, tmp_path / "x")
        except Broken: pass
        after = state(m)
    if name == "loading.recompute" and seen: return # which is not a block
    for key in before: assert after[key] == before[key], key
    if name in LOOKING: assert flat(weights(m)) == flat(weights(small()))

# --- precision

LLAMA = models.tiny_model("llama", 400, d_model=16, d_ff=64, n_layers=2, n_heads=2)
PARTS = {
    "value vectors": REGION,
    "single weights": Region(
        torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(0)) < .1),
    "neurons": heads.Neurons.sample(LLAMA, .2, 0, heads=True)}
@pytest.mark.parametrize("weights_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", PARTS)
def test_a_loop_with_autocast_around_the_forward_pass_alone(
    part, weights_in
): # a user's own, as torch's manual has it
    found = {}
    for name, over in {
        "none": (),
        "forward": ("forward",),
        "both": ("forward", "backward"),
    }.items():
        model = copy.deepcopy(LLAMA).to(weights_in)
        with masked.unlock(model, PARTS[part]) as columns:
            with torch.autocast("cpu", torch.bfloat16, enabled="forward" in over):
                loss = model(input_ids=BATCH.ids, labels=BATCH.ids).loss
            with torch.autocast("cpu", torch.bfloat16, enabled="backward" in over): loss.backward()
            found[name] = torch.cat([p.grad.flatten() for p in columns.parameters()])
            assert all(p.grad.dtype == p.dtype == torch.float32 for p in columns.parameters())
    plain, once, twice = found.values()
    assert torch.nn.functional.cosine_similarity(plain, once, dim=0) > .97
    assert weights_in != torch.float32 or not torch.equal(plain, once)
    torch.testing.assert_close(once, twice, rtol=.05, atol=float(once.abs().max()) * .05)

def test_mixed_precision_trains_as_autocast_around_a_plain_loop():
    a, b = copy.deepcopy(LLAMA), copy.deepcopy(LLAMA)
    with undisturbed.mixed_precision(a, torch.bfloat16):
        training.finetune(a, GET, 3, 1e-2, len(GET), 0, schedule="constant")
    optimizer = torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=.01, fused=True)
    for epoch in range(3):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rows = unlearning_run.shuffled(GET, len(GET), 0, epoch)[0]
            batch = collate([GET[i] for i in rows])
            logits = b.lm_head(
                b.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1][
                    batch.answer[:, 1:]]).float()
            nn.functional.cross_entropy(
                logits, batch.ids[batch.answer], reduction="none").mean().backward()
        nn.utils.clip_grad_norm_(b.parameters(), 1.)
        optimizer.step(); optimizer.zero_grad()
    assert flat(weights(a)) == flat(weights(b)) != flat(weights(LLAMA))

def test_mixed_precision_is_of_one_model_and_ends():
    other, plain = small(), scoring.score(LLAMA, GET).nll
    with undisturbed.mixed_precision(LLAMA, torch.bfloat16):
        mixed, theirs = scoring.score(LLAMA, GET).nll, scoring.score(other, GET).nll
        with undisturbed.mixed_precision(LLAMA, None):
            assert torch.equal(scoring.score(LLAMA, GET).nll, plain)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(scoring.score(LLAMA, GET).nll, mixed)
        assert torch.equal(scoring.score(LLAMA, GET).nll, mixed)
    assert not torch.equal(mixed, plain)
    assert torch.equal(scoring.score(LLAMA, GET).nll, plain)
    assert torch.equal(theirs, scoring.score(other, GET).nll)
    with pytest.raises(Broken):
        with undisturbed.mixed_precision(LLAMA, torch.bfloat16): raise Broken
    assert torch.equal(scoring.score(LLAMA, GET).nll, plain)
    assert not torch.is_autocast_enabled("cpu")

def test_gradients_of_16_bit_weights_are_put_back():
    model = small().to(torch.bfloat16)
    for p in model.parameters(): p.grad = torch.full_like(p, 3.)
    kept = [p.grad for p in model.parameters()]
    with masked.in_float32(model): training.finetune(model, GET, 1, 1e-3, 3, 0)
    relearn(model, KEEP, GET, 1e-3, 1, 3, 0)
    unlearning_run.unlearn(model, None, GET, KEEP, evaluation.Probe(GET, KEEP), recipe(), 0)
    assert all(p.grad is g and (g == 3).all() for p, g in zip(model.parameters(), kept))

# --- what a model remembers

def test_a_backward_pass_recomputes_in_the_mode_of_the_forward_pass():
    def gradient(m):
        loss = -scoring.answers_logprob(m, GET)[0].sum()
        # the model is in training mode again
        return torch.autograd.grad(loss, m.transformer.wte.weight)[0]
    want, m = gradient(small()), small().train()
    loading.recompute(m)
    assert torch.equal(gradient(m), want)
    assert torch.equal(gradient(m), want)
    assert all(x.training for x in m.modules())

def test_rotations_that_stretch_do_not_remember_a_longer_row():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    m = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            rope_parameters={"rope_type": "dynamic", "factor": 4., "rope_theta": 1e4})).eval()
    first = scoring.score(m, GET).nll
    with torch.no_grad(): m(input_ids=torch.randint(2, 300, (1, 120)))
    stretched = m.model.rotary_emb.inv_freq.clone()
    assert max(len(e.ids) for e in GET) > 20 and torch.equal(scoring.score(m, GET).nll, first)
    assert torch.equal(m.model.rotary_emb.inv_freq, stretched)
    assert m.model.rotary_emb.max_seq_len_cached == 120

def test_a_callback_that_wakes_the_dropout_changes_nothing():
    def train(after):
        training.finetune(m := small(), GET, 3, 1e-3, 3, 0, after_epoch=lambda *_: after(m))
        return weights(m)
    assert flat(train(lambda m: m.train())) == flat(train(lambda m: None))

# --- what is no model to measure

class Wrapper(nn.Module):
    def __init__(self, model): super().__init__(); self.module = model
WRONG_KINDS = {
    "wrapper": (
        lambda: Wrapper(small()),
        "a Wrapper is no transformers model; give the model inside it: model.module"),
    "data parallel": (
        lambda: nn.DataParallel(small()),
        "a DataParallel is no transformers model; give the model inside it: model.module"),
    "no head": (
        lambda: small().transformer,
        "a GPT2Model has no output layer; give transformers' own causal language model"),
    "not of transformers": (
        lambda: nn.Linear(2, 2),
        "a Linear is no transformers model; give transformers' own causal language model"),
    "a folder": (
        lambda: "here",
        "expected a causal language model of transformers, got 'here' .a str.; load one")}
@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_what_is_not_a_causal_language_model_is_named(kind):
    make, message = WRONG_KINDS[kind]
    for call in (
        lambda m: scoring.score(m, GET),
        lambda m: scored_by_gradient(m, GET),
        lambda m: training.finetune(m, GET, 1, 1e-3, 3, 0),
        lambda m: relearn(m, KEEP, GET, 1e-3, 1, 3, 0)):
        with pytest.raises(ValueError, match=message): call(make())

def test_an_adapter_is_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        small(),
        peft.LoraConfig(target_modules=["c_proj"], init_lora_weights=False, fan_in_fan_out=True))
    with pytest.raises(
        ValueError,
        match=(
            r"a PeftModel wraps the model and changes what it computes; merge the adapter first:"
            r" model = model.merge_and_unload\(\)")):
        scoring.score(model, GET)
    assert scoring.score(model.merge_and_unload(), GET).nll.isfinite().all()

def test_a_compiled_model_is_the_model():
    model = small()
    with torch._dynamo.config.patch(suppress_errors=True):
        assert torch.equal(
            scoring.score(torch.compile(model, backend="eager"), GET).nll,
            scoring.score(model, GET).nll)

def test_a_model_made_for_inference_alone_forms_no_gradients():
    with torch.inference_mode(): model = small()
    assert torch.equal(scoring.score(model, GET).nll, scoring.score(small(), GET).nll)
    with pytest.raises(ValueError, match="made inside torch.inference_mode"):
        scored_by_gradient(model, GET)

def test_an_unknown_way_to_form_gradients_is_named():
    with pytest.raises(ValueError, match="unknown gradient 'maybe'; known: off, on, as called"):
        with undisturbed.undisturbed(small(), "maybe"): pass

def test_a_call_that_python_refuses_is_refused_by_python():
    with pytest.raises(
        TypeError, match=r"score\(\) missing 1 required positional argument: 'examples'"):
        scoring.score(CLEAN)
