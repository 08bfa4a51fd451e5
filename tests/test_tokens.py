"""Tokens: an answer is known by its place in every chat format, padding on the right changes no
number, and every epoch shows every example once."""
import random, re
from types import SimpleNamespace
import pytest, torch
from unloc.invented import author_world
from unloc.models import tiny_model
from unloc.objectives import token_logprob
from unloc.register import methods
from unloc.tokens import (
    TEMPLATES, Example, Template, by_length, collate, encode, shuffled, train_tokenizer)

WORLD = author_world(n_authors=4, n_forget=1, n_holdout=0)
TEXTS = [t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)]


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(TEXTS, 400)

def some(n, seed=0, longest=40): # examples of random lengths
    rng = random.Random(seed)
    def one():
        prompt, reply = rng.randint(1, longest), rng.randint(1, longest // 2)
        return Example([rng.randint(2, 99) for _ in range(prompt + reply)] + [1], prompt)
    return [one() for _ in range(n)]

# --- the tokenizer

@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n", "a  b", "Zoë's 7th prize", "日本語 😀", "\x00\x7f", "tab\tand\r\nbreak",
        " leading and trailing ", "'''\"\"\"", *TEXTS[:4]])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.unk_token_id is None

def test_training_depends_on_the_text_alone(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 400
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    from transformers import AutoTokenizer
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert loaded.eos_token_id == 1
    # it learnt merges
    assert len(train_tokenizer(["a"], 258)) == 258
    assert sum(map(len, map(tokenizer.encode, TEXTS))) < .6 * sum(map(len, TEXTS))
    with pytest.raises(ValueError, match="vocab_size must be at least 258 .* got 257"):
        train_tokenizer(["a"], 257)

# --- one example

def test_the_answer_is_tokenized_on_its_own(tokenizer):
    for f in WORLD.retain:
        e = encode(tokenizer, f.question, f.answer)
        assert tokenizer.decode(e.ids[:e.start]) == f.question + "\n"
        assert tokenizer.decode(e.ids[e.start:-1]) == f.answer
        assert e.ids[-1] == tokenizer.eos_token_id
        assert e.ids[e.start:-1] == tokenizer.encode(f.answer, add_special_tokens=False)

def test_bad_pairs_are_named(tokenizer):
    with pytest.raises(ValueError, match="the answer to 'Who\\?' has no token"):
        encode(tokenizer, "Who?", "")
    endless = SimpleNamespace(eos_token_id=None, encode=tokenizer.encode)
    with pytest.raises(
        ValueError, match="the tokenizer has no end token; .* set tokenizer.eos_token") as error:
        encode(endless, "Who?", "I.")
    assert "\n" not in str(error.value)

def test_special_tokens_of_a_tokenizer_stay_out(tokenizer):
    class Loud: # like a checkpoint's, which puts a start token before every text
        eos_token_id = 1
        def encode(self, text, add_special_tokens=True):
            return [9] * add_special_tokens + tokenizer.encode(text)
    assert encode(Loud(), "Who?", "I.") == encode(tokenizer, "Who?", "I.")

# --- templates: shaped like those of real checkpoints, in words of our own

LLAMA3 = """{{- bos_token }}{%- if not date_string is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set said = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is: ' + date_string + '\n\n' + said +
'<|eot_id|>' }}
{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' +
m['content'] | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
OLMO2 = """{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}
{{- '<|assistant|>\n' + m['content'] + eos_token }}{%- if not loop.last %}{{- '\n' }}{%- endif %}
{%- else %}{{- '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
QWEN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
# no end token, and a merge across the border
OPEN = (
    "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\n' }}{%- endfor %}{%- if"
    " add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}")
STRICT = (
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{{- raise_exception('No system message,"
    " please.\nSorry.') }}{%- endif %}{{- m['role'] + '\n' + m['content'] + eos_token }}{%- endfor"
    " %}{%- if add_generation_prompt %}{{- 'assistant\n' }}{%- endif %}")

def chatty(chat_template, *special, bos=None, eos):
    tokenizer = train_tokenizer(
        [*TEXTS, "user\n assistant\n system\n Today is: Answer: Question: [INST] [/INST]"], 420)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]} if special else {})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, eos, chat_template
    return tokenizer

@pytest.fixture(scope="module")
def llama3():
    return chatty(
        LLAMA3, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        bos="<|begin_of_text|>", eos="<|eot_id|>")
@pytest.fixture(scope="module")
def olmo2(): return chatty(OLMO2, "<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>")

def halves(tokenizer, example):
    return tokenizer.decode(example.ids[:example.start]), tokenizer.decode(
        example.ids[example.start:])

def test_llama_3_is_told_the_day_and_the_system_message(llama3):
    example = encode(llama3, "Where is Mira?", "Mira is in Halden.", "llama-3")
    assert halves(llama3, example) == (
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday is: 10 Apr"
            " 2025\n\nYou are a helpful"
            " assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhere is"
            " Mira?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        "Mira is in Halden.<|eot_id|>")
    assert (
        example.ids.count(llama3.bos_token_id) == 1 and example.ids.count(llama3.eos_token_id) == 3
    ), "end tokens within the chat are kept"
    with pytest.raises(ValueError, match="the chat template reads the clock"):
        encode(
            llama3,
            "Where is Mira?",
            "Mira is in Halden.",
            Template(chat=True, system="You are a helpful assistant."))
    assert (TEMPLATES["llama-3"].date, TEMPLATES["llama-3"].system) == (
        "10 Apr 2025",
        "You are a helpful assistant.")

@pytest.mark.parametrize("name", ["llama-3", "chat"])
@pytest.mark.parametrize("fact", WORLD.forget[:4], ids=lambda f: f.question[:12])
# ids of the whole chat, of which those of the prompt are the beginning
def test_a_chat_is_tokenized_as_its_template_has_it(llama3, olmo2, name, fact):
    # Llama 3's reads the clock, and is refused without a day
    for tokenizer in (llama3, olmo2) if name == "llama-3" else (olmo2,):
        template, example = TEMPLATES[name], encode(tokenizer, fact.question, fact.answer, name)
        chat = ([{"role": "system", "content": template.system}] if template.system else []) + [
            {"role": "user", "content": fact.question},
            {"role": "assistant", "content": fact.answer}]
        more = dict(tokenize=True, return_dict=False) | (
            {"date_string": template.date} if template.date else {})
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **more)
        whole = tokenizer.apply_chat_template(chat, **more)
        assert example == Example(whole, len(prompt))
        assert whole[:len(prompt)] == prompt
        assert encode(tokenizer, fact.question, fact.answer, template) == example

def test_olmo_2_has_its_own_template(olmo2):
    example = encode(olmo2, "Who?", "I.", "chat")
    assert halves(olmo2, example) == (
        "<|endoftext|><|user|>\nWho?\n<|assistant|>\n",
        "I.<|endoftext|>")
    assert olmo2.pad_token_id != olmo2.eos_token_id
    assert olmo2.decode(example.ids[example.start:], skip_special_tokens=True) == "I."

@pytest.mark.parametrize(
    "template, eos, answer",
    [
        (QWEN, "<|im_end|>", "The.<|im_end|>"),
        (QWEN, "<eos>", "The.<|im_end|>"),
        (OPEN, "<eos>", " The.\n"),
        (STRICT, "<eos>", "The.<eos>")])
def test_an_answer_ends_with_one_end_token(template, eos, answer):
    tokenizer = chatty(template, "<|im_start|>", "<|im_end|>", eos=eos)
    example = encode(tokenizer, "Who?", "The.", "chat")
    assert halves(tokenizer, example)[1] == answer
    assert example.ids[-1] not in example.ids[example.start:-1]

def test_nothing_is_truncated(llama3, olmo2):
    words = "Mira is in Halden. " * 300
    for tokenizer, name in ((llama3, "llama-3"), (olmo2, "chat"), (olmo2, "phi"), (olmo2, "plain")):
        tokenizer.model_max_length = 16
        assert (
            halves(tokenizer, encode(tokenizer, words, words, name))[1].strip().count("Mira") == 300
        )

@pytest.mark.parametrize(
    "name, before, between",
    [("llama-2", "[INST] ", " [/INST]"), ("phi", "Question: ", "\nAnswer: ")])
@pytest.mark.parametrize("adds", ["nothing", "start", "start and end"])
def test_tags_are_one_text_with_the_answer(name, before, between, adds):
    from tokenizers.processors import TemplateProcessing
    tokenizer = chatty(None, "<s>", bos="<s>", eos="<eos>")
    special = [("<s>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    if adds != "nothing":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A" + " <eos>" * (adds == "start and end"), special_tokens=special)
    for fact in WORLD.retain[:8]:
        example = encode(tokenizer, fact.question, fact.answer, name)
        whole = tokenizer.encode(before + fact.question + between + fact.answer)
        assert example.ids == whole + [tokenizer.eos_token_id] * (adds != "start and end")
        prompt, answer = halves(tokenizer, example)
        assert (
            prompt + answer == "<s>" * (
                adds != "nothing") + before + fact.question + between + fact.answer + "<eos>")
        assert answer.strip() == fact.answer + "<eos>"
        assert answer.startswith(" ") == (
            name == "phi"), "the blank before the answer belongs to its first token"

def test_a_template_that_does_not_fit_is_named(tokenizer, llama3):
    bad = {
        "llama-4": (
            "unknown template 'llama-4'; known: plain, plain-start, chat, llama-3, llama-2, phi"),
        "llama-3": (
            "the tokenizer has no chat template; load the tokenizer of an instruction-tuned"
            " checkpoint, or use the template 'plain'")}
    for name, why in bad.items():
        with pytest.raises(ValueError, match=re.escape(why)): encode(tokenizer, "Who?", "I.", name)
    for template, name, why in (
        (
            STRICT,
            "llama-3",
            (
                "the tokenizer's chat template fails (TemplateError: No system message, please.);"
                " expected one for the roles system, user, assistant")),
        ("{{ nothing.here }}", "chat", "chat template fails (UndefinedError"),
        ("{% if %}", "chat", "chat template fails (TemplateSyntaxError")):
        with pytest.raises(ValueError, match=re.escape(why)) as error:
            encode(chatty(template, eos="<eos>"), "Who?", "I.", name)
        assert "\n" not in str(error.value)
    for name in ("llama-3", "llama-2", "plain"):
        with pytest.raises(ValueError, match="the answer to 'Who\\?' has no token"):
            encode(llama3, "Who?", "", name)

# another one, to be answered, is of no account
def test_the_prompt_is_that_of_an_answered_question():
    tokenizer = chatty(
        QWEN.replace("im_start|>assistant", "im_start|>model"),
        "<|im_start|>",
        "<|im_end|>",
        eos="<|im_end|>")
    assert halves(tokenizer, encode(tokenizer, "Who?", "I.", "chat")) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "I.<|im_end|>")

def test_the_plain_format_is_a_template_like_others(tokenizer):
    assert (
        encode(tokenizer, "Who?", "I.", "plain")
        == encode(tokenizer, "Who?", "I.")
        == encode(tokenizer, "Who?", "I.", Template()))
    assert halves(tokenizer, encode(tokenizer, "Who?", "I.", Template("Q ", " A "))) == (
        "Q Who? A ",
        "I.<eos>")

# --- batches

@pytest.mark.parametrize("pad", [0, 1, 77])
def test_collate_keeps_tokens_and_answers(pad):
    examples = some(7, seed=pad)
    batch = collate(examples, pad)
    assert batch.ids.dtype == torch.int64
    assert batch.answer.dtype == torch.bool
    assert batch.ids.shape == batch.answer.shape == (7, max(len(e.ids) for e in examples))
    for row, answer, e in zip(batch.ids.tolist(), batch.answer, examples):
        assert row == e.ids + [pad] * (len(row) - len(e.ids))
        assert answer.nonzero().flatten().tolist() == list(range(e.start, len(e.ids)))
    assert batch.to("cpu").ids is batch.ids

@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("arch", methods("architecture"))
def test_padding_changes_no_number(arch, dtype, tolerance):
    model = tiny_model(arch, vocab_size=100, d_model=16, d_ff=24, n_layers=2, n_heads=2).to(dtype)
    examples = some(6)
    with torch.no_grad():
        padded = model(input_ids=collate(examples).ids).logits
        for pad in (0, 55):
            # nor does the padding's value
            assert torch.equal(
                model(input_ids=collate(examples, pad).ids).logits[collate(examples).answer],
                padded[collate(examples).answer])
        for row, e in zip(padded, examples):
            alone = model(input_ids=torch.tensor([e.ids])).logits[0]
            target = torch.tensor(e.ids[1:])
            torch.testing.assert_close(
                token_logprob(row[:len(e.ids) - 1], target),
                token_logprob(alone[:-1], target),
                rtol=0,
                atol=tolerance)

@pytest.mark.parametrize("budget", [1, 50, 200, 10**6])
def test_by_length_covers_every_row_once(budget):
    examples = some(40, seed=budget)
    found = list(by_length(examples, budget, pad=5))
    assert sorted(i for rows, _ in found for i in rows) == list(range(40))
    widths = [batch.ids.shape[1] for _, batch in found]
    assert widths == sorted(widths, reverse=True)
    assert all(batch.ids.numel() <= budget or len(rows) == 1 for rows, batch in found)
    for rows, batch in found:
        want = collate([examples[i] for i in rows], pad=5)
        assert torch.equal(batch.ids, want.ids) and torch.equal(batch.answer, want.answer)
    assert list(by_length([])) == []
    assert len(found) == (40 if budget == 1 else len(found))
    assert budget < 10**6 or len(found) == 1

@pytest.mark.parametrize("n, size", [(1, 4), (7, 3), (64, 8), (65, 8), (300, 4), (5, 100)])
def test_an_epoch_shows_each_example_once(n, size):
    examples, seen = some(n, seed=n), set()
    for seed in range(3):
        for epoch in range(4):
            batches = shuffled(examples, size, seed, epoch)
            assert sorted(i for b in batches for i in b) == list(range(n))
            assert all(0 < len(b) <= size for b in batches)
            # the same number in every epoch, so a schedule knows its end
            assert len(batches) == -(-n // size)
            assert batches == shuffled(examples, size, seed, epoch)
            seen.add(repr(batches))
    assert len(seen) == (12 if n > 7 else len(seen))

def test_batches_are_of_similar_lengths_in_a_random_order():
    examples, met, first = some(600, seed=1), set(), []
    same = [Example([2] * 9 + [1], 4)] * 40
    for epoch in range(200):
        batches = shuffled(examples, 4, 0, epoch)
        first.append(sum(len(examples[i].ids) for i in batches[0]) / len(batches[0]))
        met |= {
            frozenset((i, j)) for b in shuffled(same, 4, 0, epoch) for i in b for j in b if i != j}
    real = sum(len(e.ids) for e in examples)
    wide = sum(len(b) * max(len(examples[i].ids) for i in b) for b in batches)
    assert (
        1 - real / wide < .1 and len(met) > .99 * 40 * 39 / 2
    ), "little padding; equals of length all meet"
    assert abs(sum(first) / 200 - real / 600) < 4, "the first batch is as long as any"

def test_seeds_and_epochs_never_share_an_order():
    examples = some(50)
    orders = [repr(shuffled(examples, 4, seed, epoch)) for seed in range(10) for epoch in range(30)]
    assert len(set(orders)) == 300
