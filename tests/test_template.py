"""Token ids whose labels are the answers alone, and whose prompt is what a model is asked, for every kind of
tokenizer. TUNEOFF_TOKENIZERS may name further folders, with colons between, to hold the same on."""

import os
from array import array
from copy import copy
from functools import cache
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.data import batches
from harness.data.formats import Conversation, said
from harness.data.study import marked, pieces, study, tokens_of
from harness.data.template import COUNTED, Template, tokenize
from harness.errors import BadRequest

ROOT = Path(__file__).parents[1]
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [{"role": "user", "content": "Name a cat."}, {"role": "assistant", "content": "Tom."}]
TURNS = [*PAIR, {"role": "user", "content": "And the dog?"},
         {"role": "assistant", "content": "Rex, the red one."}]  # fmt: skip
TOOL = [
    PAIR[0],
    {"role": "assistant", "content": "<call>"},
    {"role": "tool", "content": "found Tom"},
    PAIR[1],
]
CASES = [
    PAIR,
    TURNS,
    [SYSTEM, *TURNS],
    TOOL,
    [PAIR[0], {"role": "assistant", "content": "the cat\n\n### Response"}],
    [{**PAIR[0], "input": "Tom or Rex"}, PAIR[1]],
]
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# As Llama 2's: what is asked stands between marks that are text, and only users and assistants may speak.
INST = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}
{{- '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
# As Qwen 3's and others': an answer's thoughts are written for the last turn alone.
THINKING = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% else %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"""
WORDS = (
    "Name a cat. Tom And the dog? Rex, the red one. ### Instruction: Response: [INST] [/INST] system user "
)


def trained(parts: dict, special: list[str], normalizer=None, **more) -> PreTrainedTokenizerFast:
    """A BPE of 400 tokens. `parts`: pre_tokenizer, decoder, post_processor of the library."""
    bpe = Tokenizer(models.BPE(unk_token=None, byte_fallback=normalizer is not None))
    for name, part in parts.items():
        setattr(bpe, name, part)
    if normalizer:
        bpe.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_of = [f"<0x{i:02X}>" for i in range(256)] if normalizer else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + bytes_of, show_progress=False,
        initial_alphabet=[] if normalizer else alphabet,
    )  # fmt: skip
    bpe.train_from_iterator([WORDS * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **more)


@cache
def gpt2_like():
    """Words begin with their space, no <bos> is added, one token ends a text and begins it."""
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
             "decoder": decoders.ByteLevel(),
             "post_processor": processors.ByteLevel(trim_offsets=False)}  # fmt: skip
    end = "<|endoftext|>"
    return trained(parts, [end], bos_token=end, eos_token=end, unk_token=end)


@cache
def llama_like():
    """As Llama 2's and Mistral's: every text, and every piece after a special token, begins with a space."""
    bos = ("<s>", 0)
    parts = {
        "decoder": decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        "post_processor": processors.TemplateProcessing(single="<s> $A", special_tokens=[bos]),
    }
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = trained(parts, ["<s>", "</s>"], spaces, bos_token="<s>", eos_token="</s>")
    made.chat_template = INST
    return made


@cache
def chatml():
    made = copy(gpt2_like())
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@cache
def from_folder(path: str):
    return AutoTokenizer.from_pretrained(path)


FOLDERS = [str(ROOT / "demo/model"), *filter(None, os.environ.get("TUNEOFF_TOKENIZERS", "").split(":"))]
TOKENIZERS = {"gemma": tiny.tokenizer, "gpt2": gpt2_like, "llama": llama_like, "chatml": chatml}
TOKENIZERS |= {Path(folder).name: lambda folder=folder: from_folder(folder) for folder in FOLDERS}
FORMS = [
    (name, kind)
    for name, made in TOKENIZERS.items()
    for kind in ("chat", "instruction")
    if kind == "instruction" or made().chat_template
]
every_form = pytest.mark.parametrize(("name", "kind"), FORMS)


def rows(messages, tokenizer, kind="auto", loss="all", max_length=4096, rejected=None):
    conversation = Conversation("tiny:1", "tiny", messages, rejected)
    return tokenize([conversation], Template(tokenizer, kind, loss), max_length)


def row_of(messages, tokenizer, kind="auto", **more):
    [row], _ = rows(messages, tokenizer, kind, **more)
    return row


def texts_learned(tokenizer, row) -> list[str]:
    """The text of each run of learned tokens."""
    ids, learned = tokens_of(row)
    runs, before = [], False
    for text, now, _ in pieces(tokenizer, ids, learned):
        if now:
            runs = [*runs[:-1], runs[-1] + text] if before else [*runs, text]
        before = now
    return runs


# What both forms hold, on every tokenizer

TEXT = st.text(st.sampled_from("ab XY.\n#:é🙂字[]"), min_size=1, max_size=12).map(str.strip).filter(bool)


@st.composite
def conversations(draw):
    messages = [SYSTEM] if draw(st.booleans()) else []
    for question, answer in draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if draw(st.booleans()):
        messages[-2] = {**messages[-2], "input": draw(TEXT)}
    return messages


@every_form
@settings(max_examples=30)
@given(messages=conversations())
def test_training_begins_with_the_tokens_that_generation_starts_from(name, kind, messages):
    tokenizer = TOKENIZERS[name]()
    row = row_of(messages, tokenizer, kind)
    alone = tokenizer(row.prompt, add_special_tokens=kind == "instruction").input_ids
    assert list(row.prompt_ids) == alone
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert tokens_of(row)[0].count(tokenizer.bos_token_id) == 1  # never two
    text = row.prompt + Template(tokenizer, kind).render(messages)[1]
    whole = tokenizer(text, add_special_tokens=kind == "instruction").input_ids
    decode = tokenizer.decode
    assert decode(tokens_of(row)[0]) == decode(whole)
    assert row_of(messages, tokenizer, kind, loss="last").prompt_ids == row.prompt_ids


@every_form
@settings(max_examples=30)
@given(messages=conversations())
def test_the_mask_covers_exactly_the_answers_with_their_end_marks(name, kind, messages):
    tokenizer = TOKENIZERS[name]()
    row = row_of(messages, tokenizer, kind)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    end = marks(tokenizer, kind)
    found = texts_learned(tokenizer, row)
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        if name == "gemma":  # merges across lines: a token that begins before the answer is not learned
            assert (answer + end).endswith(text.strip()) and text.endswith(end)
        else:
            assert text.strip() == answer + end
    assert texts_learned(tokenizer, row_of(messages, tokenizer, kind, loss="last")) == found[-1:]


def marks(tokenizer, kind) -> str:
    if kind == "instruction":
        return tokenizer.eos_token
    return next(mark for mark in ("<end_of_turn>", "<|im_end|>", tokenizer.eos_token)
                if mark in tokenizer.chat_template or mark == tokenizer.eos_token)  # fmt: skip


@every_form
def test_labels_of_training_and_of_evaluation(name, kind):
    tokenizer = TOKENIZERS[name]()
    made = [row_of(messages, tokenizer, kind) for messages in CASES]
    pad = tokenizer.eos_token_id  # as where a tokenizer has none of its own: its place tells it from the mark
    for history in (False, True):
        batch = batches.collate(made, pad, "cpu", history=history)
        for i, row in enumerate(made):
            p, n = len(row.prompt_ids), row.length
            ids, labels, mask = (batch[k][i].tolist() for k in ("input_ids", "labels", "attention_mask"))
            learned = tokens_of(row)[1] if history else [False] * p + [True] * (n - p)
            assert labels == [t if flag else -100 for t, flag in zip(ids, learned, strict=False)] + [-100] * (
                len(ids) - n
            )
            assert mask == [1] * n + [0] * (len(ids) - n)
            assert batch["prompt_lengths"][i] == p


CODE = ["    return 3", "\treturn 3\n    # done", "  a\n    b", " one", "        pass"]


@every_form
@pytest.mark.parametrize("code", CODE)
def test_the_indentation_of_an_answer_reaches_the_tokens(name, kind, code):
    """Also of an earlier answer; but for a chat template that trims answers, which is the model's own way."""
    tokenizer = TOKENIZERS[name]()
    messages = [PAIR[0], {"role": "assistant", "content": code}] * 2
    row = row_of(messages, tokenizer, kind)
    trims = kind == "chat" and Template(tokenizer, kind).trims
    assert trims == (kind == "chat" and "trim" in tokenizer.chat_template)
    written = code.strip() if trims else code
    before = " " * (kind == "chat" and tokenizer.chat_template == INST)  # written by the template itself
    response = tokenizer.decode(tokens_of(row)[0]).removeprefix(tokenizer.decode(row.prompt_ids))
    assert response == before + written + marks(tokenizer, kind)
    assert written in row.prompt and len(row.learned) == 2
    if name != "gemma":  # there a token that begins before the answer is not learned
        assert texts_learned(tokenizer, row)[0].lstrip() == written.lstrip() + marks(tokenizer, kind)


@every_form
def test_an_answer_of_weight_0_is_read_and_not_learned(name, kind):
    tokenizer = TOKENIZERS[name]()
    masked = [TURNS[0], {**TURNS[1], "learned": False}, *TURNS[2:]]
    [row], counts = rows(masked, tokenizer, kind)
    plain = row_of(TURNS, tokenizer, kind)
    assert tokens_of(row)[0] == tokens_of(plain)[0]
    assert texts_learned(tokenizer, row) == texts_learned(tokenizer, plain)[1:]
    assert counts == dict.fromkeys(COUNTED, 0)


def test_a_conversation_is_not_shortened_to_an_answer_of_weight_0():
    tokenizer = tiny.tokenizer()
    masked = [*TURNS[:3], {**TURNS[3], "learned": False}, {"role": "user", "content": "a" * 400}, PAIR[1]]
    short = row_of(PAIR, tokenizer)
    [row], _ = rows(masked, tokenizer, max_length=row_of(TURNS, tokenizer).length)
    assert tokens_of(row)[0] == tokens_of(short)[0]


# The two forms as they are written


@pytest.mark.parametrize("messages", CASES[:3])
def test_the_chat_form_is_the_models_own_template(messages):
    row = row_of(messages, tiny.tokenizer(), "chat")
    own = tiny.tokenizer().apply_chat_template(messages, tokenize=False)
    prompt = tiny.tokenizer().apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert row.prompt == prompt
    assert tiny.tokenizer().decode(tokens_of(row)[0]) == own.rstrip("\n")


def test_the_instruction_form_is_written_out():
    messages = [SYSTEM, {**PAIR[0], "input": "Tom or Rex"}, PAIR[1], *TURNS[2:]]
    row = row_of(messages, tiny.tokenizer(), "instruction")
    assert tiny.tokenizer().decode(tokens_of(row)[0]) == (
        "<bos>### System:\nBe brief.\n\n### Instruction:\nName a cat.\n\n### Input:\nTom or Rex\n\n"
        "### Response:\nTom.<eos>\n\n### Instruction:\nAnd the dog?\n\n### Response:\nRex, the red one.<eos>"
    )
    assert row.reference == "Rex, the red one."


def test_the_border_of_prompt_and_response_is_where_tokens_would_have_merged():
    """Else the tests above could not tell that the two are tokenised apart."""
    for prompt in ("### Response:\n", "<start_of_turn>model\n"):
        apart = tiny.tokenizer()(prompt, add_special_tokens=False).input_ids
        ids = tiny.tokenizer()(prompt + "the cat", add_special_tokens=False).input_ids
        assert ids[: len(apart)] != apart


def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_before_an_answer():
    row = row_of(PAIR, llama_like(), "instruction")
    whole = llama_like()(row.prompt + "Tom.</s>").input_ids
    assert tokens_of(row)[0] == whole


@pytest.mark.parametrize(
    "messages", [[SYSTEM, *TURNS], [*PAIR, SYSTEM, *PAIR], TOOL], ids=["first", "later", "tool"]
)
def test_what_a_template_refuses_is_said_by_the_user(messages):
    row = row_of(messages, llama_like(), "chat")
    for message in messages[:-1]:
        assert message["content"] in row.prompt
    assert row.prompt.count("[INST]") == sum(m["role"] == "assistant" for m in messages)
    assert len(row.learned) == 2 * (row.prompt.count("[INST]") - 1)


def test_what_a_template_leaves_out_without_a_word_is_said_by_the_user():
    tokenizer = copy(chatml())
    tokenizer.chat_template = (
        "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + CHATML
    )
    assert "Be brief." not in tokenizer.apply_chat_template([SYSTEM, *PAIR], tokenize=False)
    assert "user\nBe brief.\n\nName a cat." in row_of([SYSTEM, *PAIR], tokenizer).prompt


def test_earlier_answers_that_generation_would_not_begin_so_are_not_learned():
    tokenizer = copy(chatml())
    tokenizer.chat_template = THINKING
    [row], counts = rows(TURNS, tokenizer)
    assert texts_learned(tokenizer, row) == ["</think>Rex, the red one.<|im_end|>"]
    assert counts["last_only"] == 1


def test_a_conversation_that_a_template_refuses_is_counted():
    tokenizer = copy(chatml())
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    found, counts = rows(PAIR, tokenizer)
    assert found == [] and counts["refused"] == 1


def test_auto_takes_the_chat_template_where_there_is_one():
    assert Template(tiny.tokenizer(), "auto").kind == "chat"
    assert Template(gpt2_like(), "auto").kind == "instruction"
    with pytest.raises(BadRequest, match="no chat template"):
        Template(gpt2_like(), "chat")


@pytest.mark.parametrize(
    "template", [CHATML, INST, "{{ messages", "{% for m in messages %}{{ m.nothing.at }}{% endfor %}"]
)
@given(messages=conversations())
@settings(max_examples=10)
def test_no_template_crashes(template, messages):
    tokenizer = copy(chatml())
    tokenizer.chat_template = template
    found, counts = rows(messages, tokenizer)
    assert len(found) + counts["refused"] == 1


# What max_length cuts


def test_a_long_response_is_cut_and_a_prompt_that_fills_all_is_left_out():
    whole = row_of(PAIR, tiny.tokenizer())
    p, n = len(whole.prompt_ids), whole.length
    for room, cut in ((n - 2, 2), (n, 0), (n + 1, 0), (p + 1, n - p - 1)):
        [row], counts = rows(PAIR, tiny.tokenizer(), max_length=room)
        assert (row.cut, counts["truncated"]) == (cut, cut > 0)
        assert row.prompt_ids == whole.prompt_ids
        assert row.response_ids == whole.response_ids[: n - p - cut]
    found, counts = rows(PAIR, tiny.tokenizer(), max_length=p)
    assert (found, counts["too_long"]) == ([], 1)


@every_form
def test_a_long_conversation_loses_its_last_turns(name, kind):
    tokenizer = TOKENIZERS[name]()
    long = [*TURNS, {"role": "user", "content": "a" * 400}, PAIR[1]]
    short = row_of(TURNS, tokenizer, kind)
    for loss in ("all", "last"):
        [row], counts = rows(long, tokenizer, kind, loss, max_length=short.length)
        assert tokens_of(row)[0] == tokens_of(short)[0]
        assert row.reference == TURNS[-1]["content"]
        assert counts == {**dict.fromkeys(COUNTED, 0), "shortened": 1}


def test_a_pair_is_never_shortened_as_its_worse_answer_is_of_the_last_turn():
    prompt = len(row_of(TURNS, tiny.tokenizer()).prompt_ids)
    found, counts = rows(TURNS, tiny.tokenizer(), max_length=prompt, rejected="Tom again")
    assert (found, counts["too_long"]) == ([], 1)
    row = row_of(TURNS, tiny.tokenizer(), rejected="Tom again")
    assert tiny.tokenizer().decode(row.rejected_ids) == "Tom again<end_of_turn>"


# Plain text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("max_length", [2, 7, 64, 4096])
def test_each_token_of_a_plain_text_is_learned_once(name, max_length):
    tokenizer = TOKENIZERS[name]()
    text = WORDS * 3
    found, counts = rows([{"role": "assistant", "content": text}], tokenizer, max_length=max_length)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert sum((row.response_ids for row in found), array("i")) == array("i", ids)
    assert counts["windows"] == len(found) - 1
    assert max(row.length for row in found) <= max_length
    assert {tuple(row.prompt_ids) for row in found} == {(tokenizer.bos_token_id,)}
    assert len({row.id for row in found}) == len(found)


def test_without_a_bos_the_first_token_of_a_text_is_given_and_each_window_sees_the_one_before():
    tokenizer = copy(gpt2_like())
    tokenizer.bos_token = None
    found, _ = rows([{"role": "assistant", "content": WORDS}], tokenizer, max_length=9)
    ids = tokenizer(WORDS).input_ids
    assert [t for row in found for t in row.response_ids] == ids[1:]
    assert [row.prompt_ids[0] for row in found] == ids[:-1][::8]


def test_a_plain_text_is_asked_with_its_beginning():
    template = Template(gpt2_like(), "auto")
    row = row_of([{"role": "assistant", "content": WORDS * 8}], gpt2_like())
    asked = template.question(row, 5)
    assert tokens_of(asked)[0] == tokens_of(row)[0]
    assert asked.prompt and (WORDS * 8).startswith(asked.prompt + " " + asked.reference)
    short = row_of([{"role": "assistant", "content": "Tom"}], gpt2_like())
    assert template.question(short, 5).response_ids
    chat = row_of(PAIR, gpt2_like())
    assert template.question(chat, 5) is chat


# Many at once


def test_a_row_is_the_same_alone_and_among_others_in_any_order():
    """So it does not depend on threads or on how many are tokenised at a time either."""
    conversations = [Conversation(f"tiny:{i}", "tiny", m) for i, m in enumerate(CASES * 3)]
    for tokenizer in (tiny.tokenizer(), llama_like()):
        template = Template(tokenizer, "auto")
        together, counts = tokenize(conversations, template, 40)
        alone = [tokenize([c], template, 40) for c in conversations]
        assert together == [row for made, _ in alone for row in made]
        assert counts == {name: sum(c[name] for _, c in alone) for name in COUNTED}
        assert [row.id for row in tokenize(conversations[::-1], template, 40)[0]] == [r.id for r in together][
            ::-1
        ]


# The study


def test_the_study_writes_one_conversation_in_each_form():
    conversations = [Conversation(f"tiny:{i}", "tiny", m) for i, m in enumerate(CASES)]
    found = study(tiny.tokenizer(), conversations)
    chosen = next(c for c in conversations if c.id == found["id"])
    assert list(found["forms"]) == ["raw text", "instruction form", "chat template"]
    for name, form in found["forms"].items():
        text = "".join(text for text, *_ in form["pieces"])
        assert all(said(m) in text for m in chosen.messages)
        assert (
            form["learned"] == form["tokens"] - 1 if name == "raw text" else form["learned"] < form["tokens"]
        )
    assert marked(found["forms"]["chat template"]["pieces"]).count("⟦") == sum(
        m["role"] == "assistant" for m in chosen.messages
    )
    assert found["forms"]["chat template"]["special"]["<bos>"] == 1
    assert study(gpt2_like(), conversations) == {}
    assert study(tiny.tokenizer(), [Conversation("a:1", "a", [PAIR[1]])]) == {}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_joined_are_the_whole_text(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(WORDS).input_ids
    found = pieces(tokenizer, ids, [i % 3 == 0 for i in range(len(ids))])
    assert "".join(text for text, *_ in found) == tokenizer.decode(ids)
