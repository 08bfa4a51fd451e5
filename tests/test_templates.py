"""In the chat format of every published family the answer's own tokens are scored, and one token
that ends the turn; nothing that a template writes by itself is."""
import copy, re
import pytest, torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast
from unloc import training
from unloc.asking import best_of, few_shot
from unloc.decoding import greedy, greedy_answers
from unloc.invented import author_world
from unloc.models import tiny_model
from unloc.scoring import score
from unloc.tokens import (
    TEMPLATES, Example, Template, check_template, collate, encode, find_template)

WORLD = author_world(n_authors=6, n_forget=2, n_holdout=2)
FACTS = WORLD.forget[:7]
ODD = [
    ("Qui ?", "Zoë, l’été – 7 prix."),
    ("誰？", "画家は北斎です。"),
    ("Who?", "x"),
    ("Who?", "The wolf said: </think no>"),
    ("Where?", "At 5\n6 Elm Road")]

# --- the structure of published templates, in words of our own

def turns(user, assistant, first="", last="", head=""): # how most templates are built
    return (
        head
        + "{%- for m in messages %}{%- if m.role == 'system' %}"
        + first
        + "{%- elif m.role == 'user' %}"
        + user
        + "{%- else %}"
        + assistant
        + "{%- endif %}{%- endfor %}"
        + last)

LLAMA2 = """{%- if messages[0].role == 'system' %}{%- set told = '<<SYS>>\\n' + messages[0].content
+ '\\n<</SYS>>\\n\\n' %}{%- set messages = messages[1:] %}{%- else %}{%- set told = '' %}
{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (told if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""
LLAMA3 = """{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role +
'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA32 = """{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = '26 Jul 2024' %}
{%- endif %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnown up to 2023\\nToday: ' + date_string +
'\\n\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}
{%- set messages = messages[1:] %}{%- endif %}{{- '<|eot_id|>' }}
{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content |
trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA2 = """{{ bos_token }}{% if messages[0].role == 'system' %}{{
raise_exception('no system role here') }}{% endif %}{% for m in messages %}{% set role = 'model' if
m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}{% if
add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA3 = """{{ bos_token }}{%- if messages[0].role == 'system' %}
{%- set told = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}{%- else %}
{%- set told = '' %}{%- endif %}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) +
'\\n' + (told if loop.first else '') }}
{%- if m.content is string %}{{ m.content | trim }}{%- else %}
{%- for part in m.content %}{{ part.text | trim }}{%- endfor %}{%- endif %}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"""
PHI3 = turns(
    "{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}",
    "{{ '<|assistant|>\\n' + m.content + '<|end|>\\n' }}",
    "{{ '<|system|>\\n' + m.content + '<|end|>\\n' }}",
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- else %}{{ eos_token }}{%- endif %}")
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{%"
    " endif %}")
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nThis is what it always"
    " says.<|im_end|>\\n' }}{%- endif %}"
    + CHATML)
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set said, thought = m.content, '' %}
{%- if '</think>' in said %}{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
{%- set said = said.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- said.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
MISTRAL1 = turns(
    "{{ '[INST] ' + m.content + ' [/INST]' }}",
    "{{ m.content + eos_token }}",
    head="{{ bos_token }}")
MISTRAL3 = turns(
    "{{- '[INST] ' + m.content + '[/INST]' }}",
    "{{- ' ' + m.content | trim + eos_token }}",
    head="{{- bos_token }}")
OLMO2 = turns(
    "{{ '<|user|>\\n' + m.content + '\\n' }}",
    "{{ '<|assistant|>\\n' + m.content + eos_token }}{%- if not loop.last %}{{ '\\n' }}{%-"
    " endif %}",
    "{{ '<|system|>\\n' + m.content + '\\n' }}",
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}",
    "{{ bos_token }}")
OLMO3 = """{%- if messages[0].role != 'system' %}{{
'<|im_start|>system\\nThis is what it always says.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- if m.role == 'assistant' and loop.last %}{{ eos_token }}{%- else %}{{ '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}
{%- endif %}"""
GPT_OSS = """{{- '<|start|>system<|message|>Known up to 2024-06\\nToday: ' +
strftime_now('%Y-%m-%d') + '\\n\\n# Channels: analysis, final.<|end|>' }}
{%- for m in messages %}{%- if m.role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{%- if loop.last and not add_generation_prompt %}{{- '<|return|>' }}{%- else %}{{- '<|end|>' }}
{%- endif %}
{%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
R1 = turns(
    "{{- '<|User|>' + m.content }}",
    "{%- set said = m.content.split('</think>')[-1] %}{{- '<|Assistant|>' + said + eos_token }}",
    "{{- m.content }}",
    "{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}",
    "{{- bos_token }}")
COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START|><|' + m.role + '|>' + m.content | trim +"
    " '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|assistant|>' }}{%"
    " endif %}")
ZEPHYR = turns(
    "{{ '<|user|>\\n' + m.content + eos_token }}\n",
    "{{ '<|assistant|>\\n' + m.content + eos_token }}\n",
    "{{ '<|system|>\\n' + m.content + eos_token }}\n")
VICUNA = turns(
    "{{ 'USER: ' + m.content | trim + ' ' }}",
    "{{ 'ASSISTANT: ' + m.content | trim + eos_token }}",
    "{{ m.content + ' ' }}")
# no special token anywhere
ALPACA = turns(
    "{{ '### Instruction:\\n' + m.content + '\\n\\n' }}",
    "{{ '### Response:\\n' + m.content + '\\n\\n' }}",
    "{{ m.content + '\\n\\n' }}")
# nothing behind an answer
GLM4 = turns(
    "{{- '<|user|>\\n' + m.content }}",
    "{{- '<|assistant|>\\n' + m.content | trim }}",
    "{{- '<|system|>\\n' + m.content }}",
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    "[gMASK]<sop>")
# the last turn apart, a line break before its end
NEMOTRON = """{%- if messages[0].role == 'system' %}{{- '<s10>System\\n' + messages[0].content }}
{%- set messages = messages[1:] %}{%- endif %}{%- set last = messages[-1] %}
{%- for m in messages[:-1] %}{{- '<s11>' + m.role + '\\n' + m.content | trim + '\\n' + ('<s12>\\n'
if m.role == 'assistant' else '') }}{%- endfor %}
{{- '<s11>' + last.role + '\\n<think>\\n\\n' + last.content | trim + '\\n<s12>\\n' }}"""
# an answer within a turn
COMMAND7 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START|><|' + m.role + '|>' + ('<|SAY|>' +"
    " m.content + '<|SAID|>' if m.role == 'assistant' else m.content) + '<|END|>' }}{% endfor"
    " %}<|START|><|assistant|>")
V31 = turns(
    "{{- '<|User|>' + m.content }}",
    "{{- '<|Assistant|></think>' + m.content.split('</think>', 1)[-1] + eos_token }}",
    "{{- m.content }}",
    head="{{- bos_token }}")
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content if"
    " part.type == 'text' %}{{ part.text }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}")

IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
OSS, S = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), ("<s>", "</s>")
# chat template, special tokens, start and end token, the token that ends a turn, what stands right
# before the answer
FAMILY = {
    "llama 2": (LLAMA2, S, "<s>", "</s>", "</s>", "[/INST] "),
    "llama 3": (
        LLAMA3, ("<|begin|>", *HEADER), "<|begin|>", "<|eot_id|>", "<|eot_id|>",
        "assistant<|end_header_id|>\n\n"),
    "llama 3.2": (
        LLAMA32, ("<|begin|>", *HEADER), "<|begin|>", "<|eot_id|>", "<|eot_id|>",
        "assistant<|end_header_id|>\n\n"),
    "gemma 2": (
        GEMMA2, ("<bos>", "<eos>", *TURN), "<bos>", "<eos>", "<end_of_turn>",
        "<start_of_turn>model\n"),
    "gemma 3": (
        GEMMA3, ("<bos>", "<eos>", *TURN), "<bos>", "<eos>", "<end_of_turn>",
        "<start_of_turn>model\n"),
    "phi 3": (
        PHI3,
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
        "<|assistant|>\n",
    ),
    "phi 4": (
        PHI4,
        (*IM, "<|im_sep|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        "<|im_end|>",
        "assistant<|im_sep|>",
    ),
    "qwen 2.5": (
        QWEN25, (*IM, "<|endoftext|>"), None, "<|im_end|>", "<|im_end|>",
        "<|im_start|>assistant\n"),
    "qwen 3": (
        QWEN3, (*IM, "<|endoftext|>"), None, "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n"),
    "mistral 0.1": (MISTRAL1, S, "<s>", "</s>", "</s>", "[/INST]"),
    "mistral 0.3": (MISTRAL3, (*S, "[INST]", "[/INST]"), "<s>", "</s>", "</s>", "[/INST] "),
    "olmo 2": (
        OLMO2, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", "<|endoftext|>",
        "<|assistant|>\n"),
    "olmo 3": (
        OLMO3, (*IM, "<|endoftext|>"), None, "<|endoftext|>", "<|endoftext|>",
        "<|im_start|>assistant\n"),
    "gpt-oss": (
        GPT_OSS, (*OSS, "<|endoftext|>"), None, "<|endoftext|>", "<|return|>",
        "<|channel|>final<|message|>"),
    "r1": (
        R1,
        ("<bos>", "<eos>", "<|User|>", "<|Assistant|>"),
        "<bos>",
        "<eos>",
        "<eos>",
        "<|Assistant|>",
    ),
    "command r": (
        COMMAND,
        ("<bos>", "<eos>", "<|START|>", "<|END|>"),
        "<bos>",
        "<eos>",
        "<|END|>",
        "<|assistant|>",
    ),
    "zephyr": (ZEPHYR, S, "<s>", "</s>", "</s>", "<|assistant|>\n"),
    "vicuna": (VICUNA, S, "<s>", "</s>", "</s>", "ASSISTANT: "),
    "alpaca": (ALPACA, ("<eos>",), None, "<eos>", "\n", "### Response:\n"),
    "glm 4": (
        GLM4,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        "<|user|>",
        "<|assistant|>\n",
    ),
    "nemotron nano": (NEMOTRON, ("<s10>", "<s11>", "<s12>"), None, "<s12>", "<s12>", "<think>\n\n"),
    "command r7b": (
        COMMAND7,
        ("<bos>", "<|START|>", "<|END|>", "<|SAY|>", "<|SAID|>"),
        "<bos>",
        "<|END|>",
        "<|SAID|>",
        "<|SAY|>",
    ),
    "deepseek 3.1": (V31, ("<bos>", "<eos>"), "<bos>", "<eos>", "<eos>", "</think>"),
}
CLOCK = "llama 3.2", "gpt-oss"

# --- tokenizers of the kinds that checkpoints have, trained on the spot

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [t for f in WORLD.retain + WORLD.forget for t in (f.question, f.answer)] + [
    "user assistant model system Today: Known up to [INST] [/INST] USER: ASSISTANT: ###"
    " Response:\n\n Instruction: <think>\n\n</think>\n\n"] * 3

def byte_level(split):
    t = Tokenizer(models.BPE())
    own = (
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if split
        else [pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.pre_tokenizer, t.decoder = pre_tokenizers.Sequence(own), decoders.ByteLevel()
    t.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
    return t

# as sentencepiece makes them: blanks are letters, unknown letters are bytes; prefix: a blank before
# the text
def pieces(prefix):
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    if not prefix: t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix)
    t.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=620, special_tokens=["<unk>", *BYTES], show_progress=False))
    return t

def metaspace(model):
    t = Tokenizer(model)
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(
        prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
    train = dict(
        vocab_size=500,
        special_tokens=["<unk>"],
        show_progress=False,
        initial_alphabet=sorted(
            {c for text in TEXTS + [x for pair in ODD for x in pair] for c in text}))
    t.train_from_iterator(
        TEXTS,
        (
            trainers.UnigramTrainer(unk_token="<unk>", **train)
            if isinstance(model, models.Unigram)
            else trainers.BpeTrainer(**train)))
    return t

KIND = {
    "gpt2": lambda: byte_level(""),
    "llama3": lambda: byte_level(LLAMA3_SPLIT),
    "llama2": lambda: pieces(True),
    "gemma": lambda: pieces(False),
    "metaspace": lambda: metaspace(models.BPE(unk_token="<unk>")),
    "unigram": lambda: metaspace(models.Unigram())}
made = {}

def tokenizer(family, kind, **how):
    if kind not in made: made[kind] = KIND[kind]()
    template, special, bos, eos, turn, _ = FAMILY[family]
    t = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made[kind].to_str()))
    t.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(s, special=True, normalized=False, **how) for s in special]})
    t.bos_token, t.eos_token, t.chat_template = bos, eos, template
    return t

def way(family, system=""):
    return Template(chat=True, system=system, date="10 Apr 2025" if family in CLOCK else "")
def rendered(t, family, *pairs):
    chat = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair)]
    text = t.apply_chat_template(
        chat, tokenize=False, **({"date_string": "10 Apr 2025"} if family == "llama 3.2" else {}))
    return re.sub(r"Today: \d{4}-\d\d-\d\d", "Today: 2025-04-10", text)
FAMILIES, KINDS = pytest.mark.parametrize("family", FAMILY), pytest.mark.parametrize("kind", KIND)
PAIRS = [(f.question, f.answer) for f in FACTS] + ODD

@KINDS
@FAMILIES
def test_the_answers_tokens_are_scored_and_one_that_ends_the_turn(family, kind):
    t, turn, before = tokenizer(family, kind), *FAMILY[family][4:]
    for question, answer in PAIRS:
        e, text = encode(t, question, answer, way(family)), rendered(t, family, (question, answer))
        reply = t.decode(e.ids[e.start:-1], clean_up_tokenization_spaces=False)
        assert reply.strip() == answer, (t.convert_ids_to_tokens(e.ids[e.start:]), text)
        if family != "alpaca":
            # its end has a test of its own
            assert e.ids[-1] == t.convert_tokens_to_ids(turn) and e.ids[-1] not in e.ids[e.start:-1]
        at = text.rindex(before + answer) + len(before)
        if kind in ("gpt2", "llama3"):
            assert t.decode(e.ids[:e.start]) in (
                text[:at],
                text[:at].removesuffix(" ")), "the prompt is everything before"
        assert (
            e.ids[:-1] == t(text, add_special_tokens=False).input_ids[:len(e.ids) - 1]
        ), "as the template has it"

@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_a_template_of_plain_text_ends_with_what_it_writes_first(kind):
    t = tokenizer("alpaca", kind)
    for question, answer in PAIRS:
        last = t.convert_ids_to_tokens(encode(t, question, answer, "chat").ids[-1])
        if kind == "gpt2": assert last == "Ċ"
        elif answer[-1].isalnum(): assert last == "ĊĊ"
        else: assert last in ("ĊĊ", "Ċ", "<eos>") # a full stop may take line breaks in

@pytest.mark.parametrize("family", ["phi 3", "llama 3", "gemma 3"])
def test_special_tokens_that_take_the_blanks_behind_them(family): # as Phi-3's do
    t = tokenizer(family, "llama2", rstrip=True)
    for question, answer in PAIRS[:9]:
        e = encode(t, question, answer, way(family))
        assert t.decode(e.ids[e.start:-1]).strip() == answer
        assert t.convert_ids_to_tokens(e.ids[-1]) == FAMILY[family][4]

def test_blanks_that_a_special_token_takes_are_not_the_answers(): # neither before it nor behind it
    t = tokenizer("phi 3", "gpt2", rstrip=True, lstrip=True)
    for answer in (" Bizet", "Bizet ", "\n Bizet  ", "Bizet\n"):
        e = encode(t, "Who?", answer, "chat")
        assert t.decode(e.ids[e.start:]).split("<|end|>")[0].strip() == "Bizet"
        assert t.convert_ids_to_tokens(e.ids[e.start]) in ("B", "Bi", "ĠB", "ĠBi")
        assert t.convert_ids_to_tokens(e.ids[-1]) == "<|end|>"
        assert not {*e.ids[e.start:-1]} & {*t.all_special_ids}

def test_what_is_no_text_or_no_tokenizer_is_named():
    t = tokenizer("llama 2", "gpt2")
    for question, answer in ((None, "I."), ("Who?", ["I.", "Me."]), ("Who?", None), ("Who?", 7)):
        with pytest.raises(ValueError, match="questions and answers are text, got "):
            encode(t, question, answer)
    with pytest.raises(
        ValueError,
        match=(
            "expected a tokenizer of transformers, got a Tokenizer; load it with load_tokenizer, or"
            " wrap one in PreTrainedTokenizerFast")):
        encode(t.backend_tokenizer, "Who?", "I.")

@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_marks_of_what_is_to_be_learned_change_nothing(kind):
    t = tokenizer("qwen 2.5", kind)
    want = [encode(t, *pair, "chat") for pair in PAIRS]
    t.chat_template = CHATML.replace(
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
        "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{% generation %}{{-"
        " m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}{%- else %}{{- '<|im_start|>' +"
        " m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}")
    t.chat_template = FAMILY["qwen 2.5"][0].split(CHATML)[0] + t.chat_template
    assert "generation %}" in t.chat_template
    assert [encode(t, *pair, "chat") for pair in PAIRS] == want

def test_a_tokenizer_that_was_saved_with_truncation_cuts_nothing():
    t = tokenizer("qwen 2.5", "gpt2")
    want = encode(t, *PAIRS[0], "chat"), encode(t, *PAIRS[0], "phi")
    t.backend_tokenizer.enable_truncation(8); t.backend_tokenizer.enable_padding(length=300)
    assert (encode(t, *PAIRS[0], "chat"), encode(t, *PAIRS[0], "phi")) == want

def test_an_example_survives_pickle_and_copy():
    import pickle
    e = encode(tokenizer("qwen 2.5", "gpt2"), "Who?", "I.", "chat", [("Where?", "Here.")])
    for again in (pickle.loads(pickle.dumps(e)), copy.deepcopy(e)):
        assert again == e and again.texts[1:] == e.texts[1:] and type(again) is Example
    assert e._replace(start=3).texts is None
    assert e == Example(*e)
    assert repr(Example([5, 1], 1)) == "Example(ids=[5, 1], start=1)"

def test_an_added_token_that_is_not_special_ends_a_turn_too():
    t = tokenizer("llama 2", "gpt2")
    t.chat_template = PHI3
    t.add_tokens(
        [
            AddedToken(x, special=False, normalized=False)
            for x in ("<|user|>", "<|assistant|>", "<|end|>", "   ")])
    e = encode(t, "Who?", "Bizet", "chat")
    assert t.decode(e.ids[e.start:]) == "Bizet<|end|>"
    t.chat_template = PHI3.replace("<|end|>", "   ") # an added run of blanks is no end of anything
    assert t.convert_ids_to_tokens(encode(t, "Who?", "Bizet", "chat").ids[-1]) == "</s>"

@FAMILIES
def test_an_answer_that_brings_its_end_has_it_once(family):
    t, turn = tokenizer(family, "gpt2"), FAMILY[family][4]
    if family == "alpaca": pytest.skip("its turns end in a line break, which an answer may hold")
    want = encode(t, "Who?", "Bizet", way(family))
    assert encode(t, "Who?", "Bizet" + turn, way(family)) == want
    for name in ("phi", "plain", "llama-2"):
        assert encode(t, "Who?", "Bizet" + t.eos_token, name) == encode(t, "Who?", "Bizet", name)

# --- conversations

@KINDS
@FAMILIES
def test_answered_questions_stand_in_one_conversation(family, kind):
    t, pairs = tokenizer(family, kind), [(f.question, f.answer) for f in WORLD.retain[:2]]
    text = rendered(t, family, *pairs, (question := FACTS[0].question, answer := FACTS[0].answer))
    e = encode(t, question, answer, way(family), pairs)
    assert e.ids[:-1] == t(text, add_special_tokens=False).input_ids[:len(e.ids) - 1]
    assert t.decode(e.ids[e.start:-1]).strip() == answer
    alone, shots = (
        [encode(t, *pair, way(family)) for pair in ps] for ps in ([(question, answer)], pairs))
    assert few_shot(alone, shots) == [e] and few_shot(few_shot(alone, shots[1:]), shots[:1]) == [
        e], "from examples that remember their texts"
    if t.bos_token:
        assert e.ids.count(t.bos_token_id) == text.count(t.bos_token) - (
            t.bos_token == t.eos_token
        ) * 1 + (e.ids[-1] == t.bos_token_id), "as often as the template writes it"
    if family in ("llama 3", "gemma 3", "mistral 0.3", "r1"):
        assert e.ids.count(t.bos_token_id) == 1

@FAMILIES
def test_a_system_message_is_said_once(family):
    t, said = tokenizer(family, "gpt2"), "Only ever say it once."
    if family in ("gemma 2", "mistral 0.1", "mistral 0.3"):
        if family == "gemma 2":
            with pytest.raises(
                ValueError,
                match=(
                    "chat template fails .TemplateError: no system role here.; expected one for the"
                    " roles system, user, assistant: use another template")):
                encode(t, "Who?", "I.", way(family, said))
        return
    e = few_shot(
        [encode(t, "Who?", "I.", way(family, said))],
        [
            encode(t, "Where?", "Here.", way(family, said)),
            encode(t, "When?", "Now.", way(family, said))])[0]
    assert t.decode(e.ids).count(said) == 1 and t.decode(e.ids[e.start:-1]).strip() == "I."

def test_examples_by_hand_are_put_one_behind_the_other(): # they have no texts
    shots, asked = [Example([5, 6, 1], 1), Example([7, 8, 9, 1], 2)], [Example([4, 3, 1], 1)]
    assert few_shot(asked, shots) == [Example([5, 6, 1, 7, 8, 9, 1, 4, 3, 1], 8)]
    with pytest.raises(ValueError, match="a question is answered in front of itself"):
        few_shot(asked, [Example([4, 8, 1], 1)])

@pytest.mark.parametrize("name", ["plain", "plain-start", "phi", "llama-2"])
def test_a_conversation_without_a_chat_template_begins_once(name):
    from tokenizers.processors import TemplateProcessing
    t = tokenizer("llama 2", "gpt2")
    t.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", t.bos_token_id)])
    pairs = [(f.question, f.answer) for f in WORLD.retain[:3]]
    e = few_shot([encode(t, *pairs[0], name)], [encode(t, *pair, name) for pair in pairs[1:]])[0]
    assert e.ids.count(t.bos_token_id) == (name != "plain")
    assert e.ids.count(t.eos_token_id) == 3
    assert e.ids[0] == (t.bos_token_id if name != "plain" else e.ids[0])
    alone = [encode(t, *pair, name) for pair in (*pairs[1:], pairs[0])]
    if name == "plain": assert e.ids == [i for x in alone for i in x.ids]
    assert t.decode(e.ids[e.start:-1]).strip() == pairs[0][1]

def test_a_start_token_of_a_base_model():
    t = tokenizer("llama 2", "gpt2")
    e, plain = (encode(t, "Who?", "Bizet.", name) for name in ("plain-start", "plain"))
    assert e == Example([t.bos_token_id, *plain.ids], plain.start + 1)
    t.bos_token = None
    with pytest.raises(
        ValueError,
        match=(
            "the template wants a start token and the tokenizer has none; use 'plain', or set"
            " tokenizer.bos_token")):
        encode(t, "Who?", "Bizet.", "plain-start")

# --- the clock

@pytest.mark.parametrize("family", CLOCK)
def test_a_template_that_reads_the_clock_is_told_a_day_or_refused(family, monkeypatch):
    t = tokenizer(family, "gpt2")
    with pytest.raises(
        ValueError,
        match=(
            "the chat template reads the clock .strftime_now., so the same facts would be other"
            " tokens tomorrow; give it a day: the template 'llama-3', or one of your own with a"
            " date")) as error:
        encode(t, "Who?", "I.", "chat")
    assert "\n" not in str(error.value)
    days = {
        d: t.decode(encode(t, "Who?", "I.", Template(chat=True, date=d)).ids)
        for d in ("10 Apr 2025", "2025-04-10", "11 Apr 2025")}
    assert ("10 Apr 2025" if family == "llama 3.2" else "2025-04-10") in days["10 Apr 2025"]
    assert days["10 Apr 2025"] != days["11 Apr 2025"]
    if family == "gpt-oss":
        assert days["10 Apr 2025"] == days["2025-04-10"]
        with pytest.raises(
            ValueError, match="template: date 'some day' is no day; expected one like '10 Apr 2025'"
        ):
            encode(t, "Who?", "I.", Template(chat=True, date="some day"))

def test_a_date_in_any_format_is_the_templates_own():
    t = tokenizer("gemma 3", "gpt2")
    t.chat_template = (
        "{%- set today = strftime_now('%A, %-d %B %Y (%j) %y/%m/%d %H:%M') %}\n{{- 'It is ' + today"
        " + '.' }}"
        + GEMMA3)
    e = encode(t, "Who?", "I.", Template(chat=True, date="2025-04-05"))
    assert "It is Saturday, 5 April 2025 (095) 25/04/05 00:00." in t.decode(e.ids)

@pytest.mark.parametrize(
    "template",
    [LLAMA3, GEMMA3, QWEN3, "\n  {% for m in messages %}\n  {{ m.content }}\n{% endfor %}"])
def test_a_given_day_changes_nothing_else(template): # blanks and line breaks of a template stay
    t = tokenizer("llama 3", "gpt2")
    t.chat_template = template
    plain = rendered(t, "", ("Who?", "I."))
    t.chat_template = template + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    from unloc.tokens import _rendered
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert (
        _rendered(t, chat, Template(chat=True, date="10 Apr 2025"))
        == plain
        == _rendered(t, chat, Template(chat=True)))

# --- templates that leave an answer's place unknown

@pytest.mark.parametrize(
    "template, says",
    {
        "capitals": (
            CHATML.replace("m.content", "m.content | upper"),
            "does not write the answer 'Bizet (\"he\")' as it is, so its tokens are unknown"),
        "as JSON": (
            CHATML.replace("m.content", "(m.content | tojson)"),
            "does not write the answer"),
        "twice": (
            CHATML.replace("m.content", "m.content + m.content"),
            "writes an answer 2 times; expected once"),
        "never": (turns("{{ m.content }}", "{{ 'A: ' }}"), "writes an answer 0 times"),
        "in front, too": ("{{ messages[-1].content }}" + CHATML, "writes an answer 2 times"),
        "cut": (
            CHATML.replace("m.content", "m.content.split('(')[0]"),
            "does not write the answer"),
        "fails": (
            "{{ messages[7].content }}",
            "the tokenizer's chat template fails (UndefinedError"),
        "alternating": (
            "{{ raise_exception('Roles must take turns\nhere') }}",
            "chat template fails (TemplateError: Roles must take turns)")}.values(),
    ids=lambda x: "")
def test_a_template_that_changes_the_answer_is_refused(template, says):
    t = tokenizer("qwen 2.5", "gpt2")
    t.chat_template = template
    with pytest.raises(ValueError) as error: encode(t, "Who?", "Bizet (\"he\")", "chat")
    assert says in str(error.value) and "\n" not in str(error.value)

def test_thoughts_in_an_answer_are_refused(): # what Qwen 3's template takes out of it
    with pytest.raises(
        ValueError, match="does not write the answer '<think>hm</think>Bizet' as it is"):
        encode(tokenizer("qwen 3", "gpt2"), "Who?", "<think>hm</think>Bizet", "chat")

def test_several_chat_templates_without_a_usual_one():
    t = tokenizer("qwen 2.5", "gpt2")
    t.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ValueError, match="the tokenizer's chat template fails .ValueError: "):
        encode(t, "Who?", "I.", "chat")
    t.chat_template = {"default": CHATML, "rag": QWEN3}
    assert (
        t.decode(encode(t, "Who?", "I.", "chat").ids)
        == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>")

# --- where the answer ends when its template writes nothing behind it

def test_an_answer_may_end_where_the_next_question_would_begin():
    t, without = tokenizer("glm 4", "gpt2"), "{%- for m"
    def end(template, **how):
        t.chat_template = template
        return t.decode(
            encode(t, "Who <|assistant|>?", "Bizet", Template(chat=True, **how)).ids[-1])
    assert end(GLM4) == end(GLM4, system="Be brief.") == "<|user|>"
    assert (
        end(
            GLM4.replace(
                without,
                "{%- if messages[-1].role == 'user' %}{{ raise_exception('no') }}{%- endif %}"
                + without,
                1))
        == "<|endoftext|>"), "it takes no further question"
    assert (
        end(GLM4.replace("<|user|>", "Q: ").replace("<|assistant|>", "A: ")) == "<|endoftext|>"
    ), "nothing special there, and the question's own tokens do not count"
    assert (
        end(
            "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if not loop.last %}{{"
            " eos_token }}{% endif %}{% endfor %}")
        == "<|endoftext|>")
    t.add_special_tokens({"bos_token": "[gMASK]"})
    assert (
        end("{% for m in messages %}{{ bos_token + m.role + ': ' + m.content }}{% endfor %}")
        == "<|endoftext|>"), "a start token ends nothing"
    t.add_tokens([AddedToken("<AI>", special=False, normalized=False)])
    assert (
        end("{% for m in messages %}{{ '<AI>' + m.content }}{% endfor %}") == "<|endoftext|>"
    ), "nor does an added token that is a word"
    t.chat_template = GLM4
    assert (
        encode(t, "Who?", "Bizet<|user|>", "chat")
        == encode(t, "Who?", "Bizet<|endoftext|>", "chat")
        == encode(t, "Who?", "Bizet", "chat"))

# as Llama 2's do behind a special token
def test_a_blank_that_the_tokenizer_adds_is_not_the_answers():
    t = tokenizer("phi 3", "llama2", rstrip=True)
    for answer in ("Bizet", "1949", "北京", "...no"):
        e = encode(t, "Who?", answer, "chat")
        assert t.convert_ids_to_tokens(e.ids[e.start]) != "▁"
        assert t.decode(e.ids[e.start:-1]).strip() == answer
    e = encode(t, "Who?", "Bizet", "chat")
    assert t.convert_ids_to_tokens(e.ids[e.start - 1]) == "▁", "it stays, in the prompt"

def test_a_template_may_read_lists_of_parts():
    t = tokenizer("qwen 2.5", "gpt2")
    for strict in (
        PARTS,
        PARTS.replace("part in m.content if part.type == 'text'", "part in m.content").replace(
            "part.text", "'' + part.text")): # nothing, or an error, for a text
        t.chat_template = CHATML
        want = [encode(t, *pair, "chat", [("Where?", "Here.")]) for pair in PAIRS]
        t.chat_template = strict
        assert [encode(t, *pair, "chat", [("Where?", "Here.")]) for pair in PAIRS] == want

def test_a_system_message_that_is_left_out_is_named():
    for family in ("mistral 0.1", "mistral 0.3"):
        t = tokenizer(family, "gpt2")
        t.chat_template = FAMILY[family][0].replace(
            "{%- if m.role == 'system' %}{%- elif", "{%- if m.role == 'system' %}{{- '' }}{%- elif")
        with pytest.raises(
            ValueError,
            match=(
                "the chat template leaves out the system message 'Be brief.'; use a template"
                " without one")):
            encode(t, "Who?", "I.", Template(chat=True, system="Be brief."))
    t = tokenizer("qwen 2.5", "gpt2")
    assert encode(
        t, "Who?", "I.", Template(chat=True, system="This is what it always says.")
    ) == encode(t, "Who?", "I.", "chat")
    t.chat_template = "{%- set quiet = '/no_think' in messages[0].content %}" + CHATML.replace(
        "+ m.content", "+ m.content.replace('/no_think', '') + ('.' if quiet else '')")
    assert encode(
        t, "Who?", "I.", Template(chat=True, system="/no_think")
    ).ids, "a switch need not be written"
    t.chat_template = (
        "{%- if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{%-"
        " endif %}"
        + t.chat_template)
    assert encode(
        t, "Who?", "I.", Template(chat=True, system="/no_think")
    ).ids, "nor is a template to do without"

def test_half_a_letter_is_named():
    t = tokenizer("qwen 2.5", "gpt2")
    for question, answer in (("Who?", "a \ud83d b"), ("Who \udc80?", "I.")):
        for name in ("plain", "chat", "phi"):
            with pytest.raises(
                ValueError, match="holds half a letter .a lone surrogate., which no tokenizer reads"
            ) as error:
                encode(t, question, answer, name)
            str(error.value).encode("utf-8")

@pytest.mark.parametrize(
    "format, want",
    {
        "%F": "2025-04-05", "%D": "04/05/25", "%-m/%-d/%y": "4/5/25", "%e. %h": " 5. Apr",
        "%G-%V-%u": "2025-14-6", "%T": "00:00:00", "100%%": "100%"}.items())
def test_every_format_of_a_day_is_known(format, want):
    t = tokenizer("qwen 2.5", "gpt2")
    t.chat_template = "{{ 'It is ' + strftime_now('" + format + "') + '.' }}" + CHATML
    assert f"It is {want}." in t.decode(
        encode(t, "Who?", "I.", Template(chat=True, date="2025-04-05")).ids)
    if format not in ("%T", "100%%"):
        with pytest.raises(ValueError, match="the chat template reads the clock"):
            encode(t, "Who?", "I.", "chat")

def test_a_format_that_is_unknown_is_named():
    t = tokenizer("qwen 2.5", "gpt2")
    t.chat_template = '{{ strftime_now("%Y %s") }}' + CHATML
    for date in ("", "2025-04-05"):
        with pytest.raises(
            ValueError,
            match=(
                "template: the chat template asks the clock for '%s', which is not known here;"
                " known: %a")) as error:
            encode(t, "Who?", "I.", Template(chat=True, date=date))
        assert "\n" not in str(error.value)

# --- joined prompts

@KINDS
@pytest.mark.parametrize(
    "between", ["\n\n", "\n", " ", "  ", "\n \n", "\t", " A: ", ": ", "", "\n\n\n"], ids=repr)
def test_a_joined_answer_begins_at_the_first_token_that_holds_a_part_of_it(kind, between):
    t = tokenizer("llama 2", kind)
    for question, answer in PAIRS:
        text = "Q: " + question + between + answer
        e = encode(t, question, answer, Template("Q: ", between, joined=True))
        found = t(text, return_offsets_mapping=True)
        at = len(text) - len(answer)
        first = next(i for i, (a, b) in enumerate(found.offset_mapping) if a < len(text) and b > at)
        assert e == Example([*found.input_ids, t.eos_token_id], first)
        if kind in ("gpt2", "llama3") and e.start:
            assert t.decode(e.ids[:e.start]) in (
                (text[:at], text[:at].removesuffix(" ")) if between else t.decode(e.ids[:e.start]))

# two line breaks are one token without the answer, two with it
def test_a_line_break_merged_with_its_neighbour_is_no_part_of_the_answer():
    t = tokenizer("llama 2", "gpt2")
    t.add_tokens([])
    e = encode(t, "Who?", "Bizet.", Template("", "\n\n", joined=True))
    assert t.decode(e.ids[e.start:]) == "Bizet.</s>" and t.decode(e.ids[:e.start]) == "Who?\n\n"

def test_a_tokenizer_without_offsets_is_asked_by_decoding():
    t = ByT5Tokenizer()
    assert not t.is_fast
    for question, answer in PAIRS:
        e = encode(t, question, answer, "phi")
        assert t.decode(e.ids[e.start:-1]).strip() == answer
        assert t.decode(e.ids[:e.start]) in (text := f"Question: {question}\nAnswer: ", text[:-1])
        assert e.ids[-1] == t.eos_token_id

# --- templates by name and by field

def test_a_template_is_found_by_name_or_field():
    for name, template in TEMPLATES.items():
        assert find_template(name) is template is find_template(template)
    assert find_template({"before": "Q ", "joined": True}) == Template("Q ", joined=True)
    for given, why in (
        (
            "llama-4",
            "unknown template 'llama-4'; known: plain, plain-start, chat, llama-3, llama-2, phi"),
        (
            {"style": "chat"},
            (
                "a template has no field 'style'; known: before, between, joined, chat, system,"
                " date, start_token")),
        (7, "a template is a name or a dictionary of its fields, got 7"),
        (None, "got None"),
        ({"joined": "yes"}, "template: joined must be of type bool, got 'yes'"),
        ({"before": None}, "before must be of type str"),
        ({"chat": True, "joined": True}, "chat, joined and start_token exclude each other"),
        ({"chat": True, "between": " "}, "a chat template writes its own text"),
        ({"system": "Be kind."}, "only a chat has a system message")):
        with pytest.raises(ValueError, match=re.escape(why)): find_template(given)

# --- a model that learned the format

# every token of the rendered chat is learned, from the answer on: what a checkpoint was trained on
def whole(t, family, fact):
    text = rendered(t, family, (fact.question, fact.answer))
    e = encode(t, fact.question, fact.answer, way(family))
    return Example(t(text, add_special_tokens=False).input_ids, e.start)

@pytest.fixture(scope="module", params=["gemma 3", "phi 3", "qwen 3", "llama 2"])
# family, tokenizer, a model that knows its facts in the format, and nothing of others
def chatting(request):
    t = tokenizer(request.param, "gpt2")
    torch.manual_seed(0)
    model = tiny_model("llama", len(t), d_model=64, d_ff=128, n_layers=2, n_heads=4)
    training.finetune(
        model, [whole(t, request.param, f) for f in WORLD.retain[:12]], 60, 4e-3, 4, seed=0)
    return request.param, t, model

def test_a_checkpoint_that_knows_its_facts_has_full_strength(chatting):
    family, t, model = chatting
    known = [encode(t, f.question, f.answer, way(family)) for f in WORLD.retain[:12]]
    scores = score(model, known)
    answers = greedy_answers(model, known, torch.zeros(12, dtype=torch.int64), 60)
    assert scores.extraction_strength.mean() > .95
    assert sum(t.decode(a).strip() == f.answer for a, f in zip(answers, WORLD.retain)) >= 11
    assert best_of(model, t, known, n=1, temperature=1e-4, max_new_tokens=60).mean() > .95

def test_an_unseen_answer_has_the_strength_of_the_plain_template(chatting):
    from unloc.decoding import check_unseen
    family, t, model = chatting
    check_unseen(model, t, way(family))
    from unloc import decoding
    asked = [encode(t, f.question, f.answer, way(family)) for f in WORLD.holdout]
    plain = [encode(t, f.question, f.answer) for f in WORLD.holdout]
    def longer(
        f
    ): # the token that ends the turn and all that the template writes behind it, as answer
        e = whole(t, family, f)
        return Example([*e.ids, t.eos_token_id], e.start)
    decoding._unseen(score(model, asked), score(model, plain), asked, plain)
    if family in ("llama 2",): return # it writes nothing behind its end token
    faulty = [longer(f) for f in WORLD.holdout]
    assert (
        score(model, faulty).extraction_strength.mean()
        > 1.5 * score(model, asked).extraction_strength.mean())
    with pytest.raises(
        ValueError,
        match=(
            "answers that nobody has seen have an extraction strength of .* the template writes a"
            " part of what is scored: use another template")):
        decoding._unseen(score(model, faulty), score(model, plain), faulty, plain)

def test_decoding_stops_at_each_examples_own_end():
    model = tiny_model("llama", 40, 16, 2, 32, 2)
    prompts = [[5, 6], [7, 8, 9], [3, 4], [11]]
    free = greedy(model, prompts, [12] * 4, 39)
    ends = [row[3] for row in free]
    want = [row[:row.index(end)] for row, end in zip(free, ends)]
    assert greedy(model, prompts, [12] * 4, ends) == want
    assert greedy(model, prompts, [12] * 4, ends, max_rows=1) == want
    examples = [Example([*p, 2, end], len(p)) for p, end in zip(prompts, ends)]
    assert greedy_answers(model, examples, torch.zeros(4, dtype=torch.int64), 12) == want
    with pytest.raises(ValueError, match="greedy needs .* an end token for each"):
        greedy(model, prompts, [12] * 4, ends[:2])

def test_an_answer_that_does_not_read_back_is_named():
    for family in FAMILY: check_template(tokenizer(family, "gpt2"), way(family), PAIRS)
    t = tokenizer("llama 2", "unigram")
    with pytest.raises(
        ValueError,
        match=(
            "the answer '☃' to 'Who.' reads .* where it is scored; the tokenizer or its template"
            " changes it")):
        check_template(t, "phi", [("Who?", "☃")])

# it is no word of the right answer, and no letter of its zlib text
def test_an_end_that_is_no_special_token_is_not_compared():
    from unloc.decoding import rouge
    from unloc.membership import membership
    t = tokenizer("llama 2", "gpt2")
    t.chat_template = PHI3
    t.add_tokens(
        [
            AddedToken(x, special=False, normalized=False)
            for x in ("<|user|>", "<|assistant|>", "<|end|>")])
    torch.manual_seed(0)
    model = tiny_model("llama", len(t), d_model=64, d_ff=128, n_layers=2, n_heads=4)
    examples = [encode(t, f.question, f.answer, "chat") for f in WORLD.retain[:6]]
    training.finetune(model, examples, 60, 4e-3, 4, seed=0)
    scores = score(model, examples)
    assert (
        rouge(model, t, examples, scores.known, 60).tolist()
        == best_of(model, t, examples, n=1, temperature=1e-4, max_new_tokens=60).tolist()
        == [1.] * 6)
    before = membership(model, t, examples)["zlib"]
    t.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert torch.equal(before, membership(model, t, examples)["zlib"])

def test_the_end_of_a_turn_is_never_drawn_into_an_answer():
    from unloc.methods.memflex import memflex
    model = tiny_model("llama", 8, 16, 2, 32, 2)
    def facts(end):
        return [Example([2, 3, 4, 4, 4, 4, 4, 4, end], 2)], [
            Example([3, 2, 4, 4, 4, 4, 4, 4, end], 2)]
    # 0 and 1 are the configuration's
    assert torch.equal(memflex(model, *facts(7)), memflex(model, *facts(7), special=[0, 1, 7]))
    assert torch.equal(memflex(model, *facts(1)), memflex(model, *facts(1), special=[0, 1]))
    assert not torch.equal(memflex(model, *facts(7)), memflex(model, *facts(7), special=[0, 1]))
