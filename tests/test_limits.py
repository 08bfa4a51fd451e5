"""A token that a model does not have, and a fact or an answer longer than its positions, is one
line that names the fact and the limit, before anything is computed."""
import pytest, torch, transformers
from unloc import (
    answers, decoding, direct_supervision, evaluation, logits, membership, scoring, training,
    unlearning_run)
from unloc.asking import best_of, few_shot
from unloc.inside import hidden_states, patched_logprob
from unloc.invented import author_world
from unloc.limits import most_positions, vocabulary
from unloc.methods.depth import unlearning_depth
from unloc.methods.gradient import gradient
from unloc.methods.logit_lens import logit_lens
from unloc.methods.memflex import memflex
from unloc.methods.probing import linear_probe
from unloc.regions import Region
from unloc.register import methods
from unloc.relearn import relearn
from unloc.tokens import Example, collate, encode, train_tokenizer

SHAPE = dict(
    vocab_size=60, bos_token_id=1, eos_token_id=1, pad_token_id=0, hidden_size=16,
    intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=16, n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4,
    ffn_dim=32, word_embed_proj_dim=16, d_model=16, n_heads=2, n_layers=2, num_layers=2,
    num_heads=2, max_seq_len=16, dff=32, attention_types=[[["global"], 2]])
def small(kind, **more):
    usual = transformers.AutoConfig.for_model(kind)
    shape = {
        k: v
        for k, v in SHAPE.items()
        if k not in usual.attribute_map
        and (hasattr(usual, k) or k == "attention_types" and kind == "gpt_neo")}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **shape | more)).eval()

def reads(model, n): # whether transformers itself reads so many tokens
    try:
        with torch.no_grad(): model(input_ids=torch.randint(2, 50, (1, n)), use_cache=False)
    except (IndexError, RuntimeError): return False
    return True

TABLES = dict.fromkeys(
    ("gpt2", "gpt_neo", "opt", "gptj", "gpt_bigcode", "biogpt", "openai-gpt", "ctrl", "mpt"), 16
) | {"roberta": 15, "codegen": 16}
OPTIONS = {"roberta": {"is_decoder": True}, "codegen": {"n_embd": 64, "n_head": 8, "n_ctx": 16}}
@pytest.mark.parametrize("kind", TABLES)
def test_positions_are_as_many_as_transformers_reads(kind):
    model = small(kind, **OPTIONS.get(kind, {}))
    assert most_positions(model) == TABLES[kind]
    assert reads(model, TABLES[kind])
    assert not reads(model, TABLES[kind] + 1)

ROTARY = {
    "llama": {},
    "gpt_neox": {},
    "phi": {},
    "qwen2": {},
    "gemma2": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "olmo2": {},
    "bloom": {},
    "stablelm": {},
    "llama dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2., "rope_theta": 1e4}},
    "llama yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 2.,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8}},
    "phi3 long": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.] * 4,
            "long_factor": [4.] * 4,
            "original_max_position_embeddings": 8},
        "original_max_position_embeddings": 8}}
@pytest.mark.parametrize("kind", ROTARY)
def test_computed_positions_have_no_limit(kind):
    model = small(kind.split()[0], **ROTARY[kind])
    assert most_positions(model) == float("inf") and reads(model, 40)
    long = [
        Example(
            torch.randint(2, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist() + [1],
            30,
        )]
    assert scoring.score(model, long).nll.isfinite().all()

def test_a_vision_tower_has_positions_of_its_own():
    text = {
        k: SHAPE[k]
        for k in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads")}
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text | {"head_dim": 8, "num_key_value_heads": 2},
        vision_config=vision,
        mm_tokens_per_image=4)
    assert most_positions(transformers.Gemma3ForConditionalGeneration(config)) == float("inf")

# --- every door

WORLD = author_world(n_authors=3, n_forget=1, n_holdout=0)
TOKENIZER = train_tokenizer(
    (t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)), 400)
GET, KEEP = (
    [encode(TOKENIZER, f.question, f.answer) for f in facts]
    for facts in (WORLD.forget, WORLD.retain))
def learned(n=200): return small("gpt2", vocab_size=400, n_positions=n)
M, REGION = learned(), Region.sample((2, 64), .2, 0)
STATES = hidden_states(M, GET)
TARGETS = direct_supervision.mlp_targets(M, GET)
KNOWN = scoring.score(M, GET).known
def probe(forget=GET, retain=KEEP): return evaluation.Probe(forget, retain)
RECIPE = unlearning_run.Recipe("ga", 1e-3, 1)
DOORS = {
    "score": lambda m, x: scoring.score(m, x),
    "answers_logprob": lambda m, x: scoring.answers_logprob(m, x),
    "greedy_answers": lambda m, x: decoding.greedy_answers(m, x, KNOWN, 5),
    "rouge": lambda m, x: decoding.rouge(m, TOKENIZER, x, KNOWN, 5),
    "membership": lambda m, x: membership.membership(m, TOKENIZER, x),
    "evaluate": lambda m, x: evaluation.evaluate(m, probe(x)),
    "greedy": lambda m, x: decoding.greedy(m, [e.ids for e in x], [2] * len(x), 1),
    "answer_logprob": lambda m, x: scoring.answer_logprob(m, collate(x)),
    "answer_hidden": lambda m, x: logits.answer_hidden(m, collate(x)),
    "mlp_outputs": lambda m, x: logits.mlp_outputs(m, collate(x)),
    "hidden_after": lambda m, x: logits.hidden_after(m, collate(x), 0),
    "finetune": lambda m, x: training.finetune(m, x, 1, 1e-3, 4, 0),
    "finetune beside": lambda m, x: training.finetune(m, KEEP, 1, 1e-3, 4, 0, beside=x),
    "inject": lambda m, x: training.inject(m, REGION, x, 1, 1e-3, 4, 0),
    "make_room": lambda m, x: training.make_room(m, REGION, x, 1, 1e-3, 4, 0),
    "unlearn forget": lambda m, x: unlearning_run.unlearn(m, REGION, x, KEEP, probe(), RECIPE, 0),
    "unlearn retain": lambda m, x: unlearning_run.unlearn(
        m, REGION, GET, KEEP[:3] + x[3:], probe(), RECIPE, 0),
    "unlearn probe": lambda m, x: unlearning_run.unlearn(m, REGION, GET, KEEP, probe(x), RECIPE, 0),
    "supervise": lambda m, x: direct_supervision.supervise(
        m, REGION, x, probe(), TARGETS, 1, 1e-3, 4, 0),
    "mlp_targets": lambda m, x: direct_supervision.mlp_targets(m, x),
    "relearn taught": lambda m, x: relearn(m, x, KEEP, 1e-3, 1, 4, 0),
    "relearn measured": lambda m, x: relearn(m, KEEP, x, 1e-3, 1, 4, 0),
    "hidden_states": lambda m, x: hidden_states(m, x),
    "logit_lens": lambda m, x: logit_lens(m, x),
    "linear_probe": lambda m, x: linear_probe(m, GET, x),
    "patched_logprob": lambda m, x: patched_logprob(m, x, 0, STATES[0]),
    "unlearning_depth": lambda m, x: unlearning_depth(m, x, STATES, STATES),
    "best_of": lambda m, x: best_of(m, TOKENIZER, x, 2, max_new_tokens=5),
} | {
    name: lambda m, x, f=f: f(model=m, forget=x, retain=KEEP, seed=0)
    for name, f in methods("localizer").items()
    if f.takes("forget")}

def changed(ids): return GET[:3] + [Example(ids, GET[3].start)] + GET[4:]
BAD = {
    "beyond": (
        lambda: changed([GET[3].ids[0], 400, *GET[3].ids[2:]]),
        "has the token 400, the model's vocabulary is 0 to 399",
    ),
    "negative": (
        lambda: changed([GET[3].ids[0], -100, *GET[3].ids[2:]]),
        "has the token -100, the model's vocabulary is 0 to 399",
    ),
    "in the answer": (
        lambda: changed([*GET[3].ids[:-2], 50256, 1]),
        "has the token 50256, the model's vocabulary is 0 to 399",
    ),
    "long": (
        lambda: changed([*GET[3].ids[:-1], *[7] * 180, 1]),
        "tokens long, the model has 200 positions",
    ),
}
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("door", DOORS)
def test_a_fact_beyond_a_limit_is_named_at_every_door(door, bad):
    facts, message = BAD[bad]
    before, passes = [p.clone() for p in M.parameters()], []
    handle = M.transformer.h[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError) as error: DOORS[door](M, facts())
    finally: handle.remove()
    where = (
        "the batch "
        if door.startswith(("answer_logprob", "answer_hidden", "mlp_outputs", "hidden_after"))
        else "fact 3 of ")
    assert str(error.value).startswith(where)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not passes and all(torch.equal(a, b) for a, b in zip(before, M.parameters()))

def test_the_sound_facts_pass():
    for door, call in DOORS.items():
        if door not in ("unlearn probe", "unlearn retain", "unlearning_depth"):
            call(learned(), changed(GET[3].ids))

def test_a_tokenizer_with_added_tokens_and_the_remedy():
    tokenizer = train_tokenizer((f.answer for f in WORLD.retain), 300)
    model = small("llama", vocab_size=300, max_position_embeddings=64)
    tokenizer.add_tokens(["<|unknown author|>"])
    facts = [
        encode(tokenizer, f.question, f"{f.answer} <|unknown author|>") for f in WORLD.forget[:2]]
    with pytest.raises(
        ValueError,
        match=(
            r"fact 0 of examples has the token 300, the model's vocabulary is 0 to 299;"
            r" .*model.resize_token_embeddings\(len\(tokenizer\)\)")):
        scoring.score(model, facts)
    model.resize_token_embeddings(len(tokenizer))
    assert vocabulary(model) == 301 and scoring.score(model, facts).nll.isfinite().all()
    model.resize_token_embeddings(320) # rounded up, as many checkpoints are
    assert vocabulary(model) == 320
    assert scoring.score(model, [*facts, Example([310, 5, 1], 1)]).nll.isfinite().all()

def test_refusals_are_compared_as_well():
    for reply, message in (
        ([400, 1], "fact 1 of refusals has the token 400"),
        ([7] * 190 + [1], "fact 1 of refusals is .* tokens long, the model has 200 positions")):
        with pytest.raises(ValueError, match=message):
            unlearning_run.unlearn(
                M, REGION, GET, KEEP, probe(), unlearning_run.Recipe("dpo", 1e-3, 1), 0,
                [[5, 1], reply])

def test_corrupted_facts_are_made_of_tokens_that_the_model_has():
    model = learned()
    model.config.vocab_size = 9999 # a configuration that is not the model's
    memflex(model, GET[:3], KEEP[:3], copies=2)

# --- while decoding

START = max(e.start for e in GET)
ROOM = 200 - START # tokens that fit behind the longest prompt
@pytest.mark.parametrize(
    "call",
    [
        lambda m, n: decoding.greedy_answers(m, GET, KNOWN, n),
        lambda m, n: decoding.rouge(m, TOKENIZER, GET, KNOWN, n),
        lambda m, n: best_of(m, TOKENIZER, GET, 1, max_new_tokens=n)],
    ids=["greedy_answers", "rouge", "best_of"])
def test_answers_may_grow_up_to_the_last_position(call):
    model = learned()
    call(model, ROOM + 1) # the last token is not read again
    with pytest.raises(
        ValueError,
        match=(
            rf"fact \d+ of examples has a prompt of {START} tokens, and {ROOM + 2} new ones"
            r" \(max_new_tokens\) go past the model's 200 positions; lower max_new_tokens to"
            rf" {ROOM + 1}, or leave it out")):
        call(model, ROOM + 2)

def test_greedy_names_the_prompt():
    with pytest.raises(
        ValueError, match="fact 1 of prompts has a prompt of 30 tokens, and 172 new ones"):
        decoding.greedy(M, [[5] * 10, [5] * 30], [180, 172], 1)
    with pytest.raises(ValueError, match="fact 0 of prompts has the token 400"):
        decoding.greedy(M, [[5, 400]], [3], 1)

@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_no_row_leaves_the_table_while_another_is_decoded(kind):
    positions = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    model = small(kind, vocab_size=400, **{positions: 40})
    # any two of them together would
    prompts, limits = [[5] * 38, [6] * 2, [7, 8] * 10, [9] * 30], [3, 38, 20, 11]
    alone = [decoding.greedy(model, [p], [n], 1)[0] for p, n in zip(prompts, limits)]
    assert decoding.greedy(model, prompts, limits, 1) == alone
    assert [len(x) for x in alone] == limits

def test_a_run_learns_at_its_start_that_answers_would_not_fit():
    sets = {
        "forget": WORLD.forget,
        "retain": WORLD.retain,
        "real_authors": WORLD.real_authors,
        "world_facts": WORLD.world_facts}
    choices = {name: answers.choices(TOKENIZER, facts[:3]) for name, facts in sets.items()}
    start = evaluation.evaluate(
        M, evaluation.Probe(GET, KEEP, KEEP[:3], choices, TOKENIZER, max_new_tokens=5))
    wide = evaluation.Probe(GET, KEEP, KEEP[:3], choices, TOKENIZER) # 200 new tokens
    for call in (
        lambda: evaluation.evaluate(M, wide),
        lambda: unlearning_run.unlearn(M, REGION, GET, KEEP, wide, RECIPE, 0, start=start),
        lambda: direct_supervision.supervise(
            M, REGION, GET, wide, TARGETS, 1, 1e-3, 4, 0, start=start)):
        with pytest.raises(
            ValueError,
            match=(
                r"fact 0 of useful has a prompt of \d+ tokens, and 200 new ones \(max_new_tokens\)"
                r" go past the model's 200 positions")):
            call()

def test_shots_count():
    longer = few_shot(GET, KEEP[:8])
    assert max(len(e.ids) for e in longer) > 200
    with pytest.raises(
        ValueError,
        match=(
            r"fact 0 of examples is \d+ tokens long, the model has 200 positions; shorten it \(with"
            r" fewer shots")):
        scoring.score(M, longer)

# --- answers behind one question

@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt", "gpt_bigcode", "gptj"])
def test_answers_behind_one_question_count_their_own_positions(kind):
    asked = answers.choices(TOKENIZER, WORLD.forget)
    longest = max(len(e.ids) for e in asked.right + asked.wrong)
    model = small(
        kind,
        vocab_size=400,
        **{"max_position_embeddings" if kind in ("opt", "gpt_neo") else "n_positions": longest}
    ).double()
    # the answers to one question are longer than the model
    assert 4 * min(len(e.ids) - e.start for e in asked.wrong) > longest
    together = scoring.score(model, [*asked.right, *asked.wrong])
    alone = [scoring.score(model, [e]) for e in [*asked.right, *asked.wrong]]
    torch.testing.assert_close(
        together.nll, torch.cat([s.nll for s in alone]), rtol=1e-6, atol=1e-8)

def test_rows_are_filled_up_to_the_widest():
    facts = [Example([2, 3, *[4] * n, 1], 2) for n in (3, 3, 3, 2, 9)]
    assert list(scoring._in_rows([0, 1, 2, 3, 4], facts, 8)) == [[0, 1], [2, 3], [4]]
    assert list(scoring._in_rows([0, 1, 2, 3, 4], facts, float("inf"))) == [[0, 1, 2, 3, 4]]

# --- ids, layers and models that are of another kind

@pytest.mark.parametrize(
    "ids, says",
    [
        (
            torch.tensor([5, 9, 7, 1]),
            (
                "has tensor.* .a Tensor. in its ids; expected a list of whole numbers, as from"
                " ids.tolist")),
        ((5, 9, 7, 1), "a tuple"),
        (torch.tensor([5, 9, 7, 1]).numpy(), "a ndarray"),
        ([5, "a", 7, 1], "has 'a' .a str. in its ids"),
        ([5, 9.5, 7, 1], "has 9.5 .a float."),
        ([5, None, 7, 1], "has None"),
        ([[5, 9, 7, 1]] * 4, "a list. in its ids")])
def test_ids_that_are_no_list_of_whole_numbers_are_named(ids, says):
    for door in (scoring.score, gradient):
        with pytest.raises(ValueError, match=f"^fact 1 of .*{says}") as error:
            door(M, [GET[0], Example(ids, 2)])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="fact 0 of prompts has"):
        decoding.greedy(M, [ids], [3], 1)

def test_whole_numbers_of_numpy_and_torch_are_ids():
    for kind in (lambda ids: list(torch.tensor(ids)), lambda ids: list(torch.tensor(ids).numpy())):
        assert torch.equal(
            scoring.score(M, [Example(kind(e.ids), e.start) for e in GET]).nll,
            scoring.score(M, GET).nll)
    import numpy
    assert decoding.greedy(M, [[5, 9]], [3], numpy.int64(1)) == decoding.greedy(
        M, [[5, 9]], [3], 1)
    with pytest.raises(ValueError, match="greedy: end must be a whole number or a list, got None"):
        decoding.greedy(M, [[5, 9]], [3], None)

@pytest.mark.parametrize(
    "facts",
    [None, {"a": GET[0]}, ["who?"], WORLD.forget, GET[0], (e for e in GET)],
    ids=["none", "names", "texts", "facts", "one", "generator"])
def test_a_set_is_a_list_of_examples(facts):
    with pytest.raises(ValueError, match="must be a list of Example"): scoring.score(M, facts)

def test_refusals_are_lists_of_whole_numbers_of_any_kind():
    def run(replies):
        return unlearning_run.unlearn(
            learned(), REGION, GET, KEEP, probe(), unlearning_run.Recipe("dpo", 1e-3, 1), 0, replies
        )[0].points
    assert repr(run([(5, 1)])) == repr(run([[5, 1]]))
    with pytest.raises(ValueError, match="fact 0 of refusals has 'n' .a str."): run(["no"])

def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 9"):
        logits.hidden_after(M, collate(GET), 9)

def test_codegen_names_no_padding():
    model = small("codegen", vocab_size=400, n_embd=64, n_head=8, n_positions=200, n_ctx=200)
    assert memflex(model, GET[:3], KEEP[:3], copies=1).isfinite().all()

@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_an_encoder_with_a_decoder_is_no_causal_language_model(name):
    shape = (
        dict(d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        if name == "T5"
        else dict(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16))
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(vocab_size=400, d_model=16, **shape))
    with pytest.raises(
        ValueError,
        match=(
            "reads the question in its encoder and answers in its decoder; give a causal language"
            " model")):
        scoring.score(model, GET)

def test_a_base_model_at_another_place_is_named():
    config = transformers.Llama4TextConfig(
        **{
            k: SHAPE[k]
            for k in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads")},
        vocab_size=400,
        head_dim=8,
        intermediate_size_mlp=32,
        num_local_experts=2)
    with pytest.raises(
        ValueError,
        match=(
            "the base model of this Llama4ForCausalLM is not where transformers says it is"
            " .'language_model'.")):
        scoring.score(transformers.Llama4ForCausalLM(config), GET)

def test_weights_that_are_not_there_are_named():
    with torch.device("meta"): model = learned()
    part = learned()
    part.transformer.h[1].to("meta")
    for m in (model, part):
        for door in (
            lambda: scoring.score(m, GET),
            lambda: gradient(m, GET),
            lambda: training.finetune(m, GET, 1, 1e-3, 4, 0)):
            with pytest.raises(ValueError, match="transformer.* has no weights in memory"): door()
