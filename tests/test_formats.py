"""Every shape that users bring is read to the same conversation, or refused by reason; nothing crashes."""

import json
import re
import subprocess
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import ROOT
from harness.data import formats, splits
from harness.data.rows import rows_of_file
from harness.data.spec import DatasetSpec, PartSpec, format_of, load_spec
from harness.errors import BadRequest

DATASET, PART = asdict(DatasetSpec()), asdict(PartSpec())

SAMPLES = ROOT.parent / "shared" / "data" / "schema_samples"  # real rows, where they lie beside the project
TURNS = [("system", "Be brief."), ("user", "Name a cat."), ("assistant", "Tom."),
         ("user", "And a dog?"), ("assistant", "Rex.")]  # fmt: skip
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


def read(row, format=None, **more):
    part = {**PART, "name": "tiny", "format": format or formats.detect(row), **more}
    return formats.read_row(row, part)


def told(row, **more) -> list[tuple[str, str]]:
    return [(m["role"], formats.said(m)) for m in read(row, **more)[0]]


def sharegpt(turns):
    return [{"from": SHAREGPT[role], "value": text} for role, text in turns]


def openai(turns):
    return [{"role": role, "content": text} for role, text in turns]


def weighted(weight):
    return {"role": "assistant", "content": "No.", "weight": weight}


def deep(depth):
    value = "a"
    for _ in range(depth):
        value = [value]
    return value


def pair_of(turns, worse):
    return [*openai(turns[:-1]), {"role": "assistant", "content": worse}]


SAME = {  # one conversation in every shape that can hold it
    "openai": {"messages": openai(TURNS)},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in TURNS]},
    "sharegpt": {"conversations": sharegpt(TURNS)},
    "history": {"instruction": TURNS[3][1], "input": "", "output": TURNS[4][1], "system": TURNS[0][1],
                "history": [[TURNS[1][1], TURNS[2][1]]]},
    "prompt and completion": {"prompt": openai(TURNS[:4]), "completion": openai(TURNS[4:])},
    "system beside messages": {"system": TURNS[0][1], "messages": openai(TURNS[1:])},
    "system beside sharegpt": {"system": TURNS[0][1], "conversations": sharegpt(TURNS[1:])},
    "system twice": {"system": TURNS[0][1], "messages": openai(TURNS)},
    "system beside a prompt": {"system_prompt": TURNS[0][1], "prompt": openai(TURNS[1:4]),
                               "response": TURNS[4][1]},
    "ends with an answer of weight 0": {"messages": [*openai([*TURNS, ("user", "Sure?")]), weighted(0)]},
    "no tools": {"messages": openai(TURNS), "tools": "null"},
    "null beside it": {"messages": None, "conversations": sharegpt(TURNS)},
    "ends with a question": {"messages": openai([*TURNS, ("user", "Thanks")])},
    "a turn in two": {"messages": openai([TURNS[0], ("user", "Name a"), ("user", "cat."), *TURNS[2:]])},
    "more columns": {"id": 1, "source": "x", "prompt": "Name a cat.", "messages": openai(TURNS)},
}  # fmt: skip
PAIRS = {
    "conversations": {"prompt": TURNS[3][1], "chosen": openai(TURNS), "rejected": pair_of(TURNS, "Fido.")},
    "answers": {"prompt": openai(TURNS[:4]), "chosen": "Rex.", "rejected": "Fido."},
    "turns": {"prompt": openai(TURNS[:4]), "chosen": openai(TURNS[4:]),
              "rejected": [{"role": "assistant", "content": "Fido."}]},
    "sharegpt": {"conversations": sharegpt(TURNS[:4]), "chosen": {"from": "gpt", "value": "Rex."},
                 "rejected": {"from": "gpt", "value": "Fido."}},
    "system": {"system": TURNS[0][1], "conversations": sharegpt(TURNS[1:4]), "chosen": "Rex.",
               "rejected": "Fido."},
    "more columns": {"prompt": "And a dog?", "chosen": openai(TURNS), "rejected": pair_of(TURNS, "Fido."),
                     "messages": openai(TURNS), "score_chosen": 9.0},
}  # fmt: skip


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_a_conversation_is_the_same_in_every_shape(row):
    joined = [(role, text.replace("Name a\n\ncat.", "Name a cat.")) for role, text in told(row)]
    assert joined == TURNS


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_the_same_in_every_shape(row):
    assert read(row) == (MESSAGES, "Fido.")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3", "text": "..."}, ["Add.\n\n1 2", "3"]),
        ({"instruction": "", "input": "1 + 2", "output": "3"}, ["1 + 2", "3"]),
        ({"prompt": "1 + 2", "completion": "3"}, ["1 + 2", "3"]),
        ({"prompt": "1 + 2", "response": 3}, ["1 + 2", "3"]),
        ({"prompt": "1 + 2", "completion": "3", "label": True}, ["1 + 2", "3"]),
        ({"question": "1 + 2", "answer": "So 3.\n#### 3"}, ["1 + 2", "So 3.\n#### 3"]),
        ({"messages": openai([("user", "1 + 2")]), "ground_truth": "3"}, ["1 + 2", "3"]),
        ({"text": "    return 3\n\n"}, ["    return 3"]),
        ({"content": "def f(): ...", "lang": "python"}, ["def f(): ..."]),
        # Dolly, SQuAD and others: a question and what it is about
        (
            {"instruction": "Who?", "context": "Ann ran.", "response": "Ann", "category": "qa"},
            ["Who?\n\nAnn ran.", "Ann"],
        ),
        (
            {
                "id": "1",
                "title": "t",
                "context": "Ann ran.",
                "question": "Who?",
                "answers": {"text": ["Ann", "it was Ann"], "answer_start": [0, 0]},
            },
            ["Ann ran.\n\nWho?", "Ann"],
        ),
        ({"prompt": "Who?", "response": "Ann", "context": "Ann ran."}, ["Ann ran.\n\nWho?", "Ann"]),
        (
            {"prompt": openai([("user", "Who?")]), "completion": "Ann", "context": "Ann ran."},
            ["Ann ran.\n\nWho?", "Ann"],
        ),
        ({"prompt": "Ann ran. Who?", "response": "Ann", "context": "Ann ran."}, ["Ann ran. Who?", "Ann"]),
        ({"system_prompt": "Be brief.", "question": "Who?", "response": "Ann"}, ["Be brief.", "Who?", "Ann"]),
        # MMLU, ARC, C-Eval, RACE: choices, and which of them is right
        (
            {"question": "1 + 1?", "subject": "sums", "choices": ["1", "2"], "answer": 1},
            ["1 + 1?\n\nA. 1\nB. 2", "B. 2"],
        ),
        (
            {"question": "1 + 1?", "choices": {"text": ["1", "2"], "label": ["1", "2"]}, "answerKey": "2"},
            ["1 + 1?\n\n1. 1\n2. 2", "2. 2"],
        ),
        (
            {"question": "1 + 1?", "A": "one", "B": "two", "answer": "B"},
            ["1 + 1?\n\nA. one\nB. two", "B. two"],
        ),
        (
            {
                "article": "One and one is two.",
                "question": "1 + 1?",
                "options": ["one", "two"],
                "answer": "two",
            },
            ["One and one is two.\n\n1 + 1?\n\nA. one\nB. two", "B. two"],
        ),
        # code
        ({"prompt": "  def f():", "completion": "\r\n\n    return 3  \n"}, ["def f():", "    return 3"]),
    ],
)
def test_formats_of_one_question(row, turns):
    assert [text for _, text in told(row)] == turns


def test_a_context_is_the_input_of_an_instruction():
    row = {"instruction": "Who?", "context": "Ann ran.", "input": "In one word.", "output": "Ann"}
    asked, _ = read(row)[0]
    assert (asked["content"], asked["input"]) == ("Who?", "Ann ran.\n\nIn one word.")


@pytest.mark.parametrize("row", [
    {"instruction": "Loop.", "input": "", "output": "    for i in x:\n        y\n"},
    {"messages": openai([("user", "Loop."), ("assistant", "\n    for i in x:\n        y\n")])},
    {"conversations": sharegpt([("user", "Loop."), ("assistant", "    for i in x:\n        y")])},
    {"question": " Loop. ", "answer": "    for i in x:\n        y"},
    {"prompt": "Loop.", "chosen": "    for i in x:\n        y", "rejected": "  y"},
    {"text": "    for i in x:\n        y\n\n"},
])  # fmt: skip
def test_an_answer_keeps_its_indentation(row):
    messages, rejected = read(row)
    assert messages[-1]["content"] == "    for i in x:\n        y"
    assert rejected in (None, "  y")


@pytest.mark.parametrize("key", ["weight", "train"])
def test_an_answer_of_weight_0_is_not_learned(key):
    weighted = [{**m, key: m["content"] != "Tom."} for m in openai(TURNS)]
    assert read({"messages": weighted})[0] == [
        {**m, "learned": False} if m["content"] == "Tom." else m for m in MESSAGES
    ]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"text": "a", "label": 3, "score": 0.0}, {"label", "score"}),
        ({"question": "a", "answer": "b", "level": "5", "note": None, "tags": [], "by": " "}, {"level"}),
        ({"question": "a", "context": "b", "answers": {"text": ["c", "d"], "answer_start": [0]}},
         {"answers.answer_start", "answers.text after the first"}),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"},
                       {"role": "assistant", "content": "b", "thinking": "c", "refusal": None}]},
         {"messages.name", "messages.thinking"}),
        ({"messages": openai(TURNS), "ground_truth": "Rex.", "label": "pets"}, {"ground_truth", "label"}),
        ({"prompt": "a", "completion": "b", "label": True}, set()),
        ({"prompt": "a", "completion": "b", "label": deep(2000)}, {"label"}),
        (PAIRS["more columns"], {"prompt", "messages", "score_chosen"}),
        ({"prompt": "a", "completion": "b", "half \ud83d": 1}, {"half \\ud83d"}),
    ],
)  # fmt: skip
def test_every_column_that_is_not_used_is_named(row, names):
    assert formats.unused(row, {**PART, "format": formats.detect(row)}) == names
    assert read(row)


CALL = {"name": "weather", "arguments": {"city": "Łódź", "days": [1, 2]}}
WRITTEN = {**CALL, "arguments": json.dumps(CALL["arguments"])}  # as OpenAI sends it
TOOLS = [{"name": "weather", "parameters": {"type": "object"}}]


@pytest.mark.parametrize(
    "row",
    [
        {"tools": TOOLS, "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": WRITTEN}]},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"rain": true}'},
            {"role": "assistant", "content": "Yes.", "tool_calls": None}]},
        {"tools": json.dumps(TOOLS), "conversations": [
            {"from": "human", "value": "Rain?"}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": '{"rain": true}'}, {"from": "gpt", "value": "Yes."}]},
    ],
    ids=["openai", "sharegpt"],
)  # fmt: skip
def test_a_call_and_its_result_are_turns(row):
    system, *turns = read(row)[0]
    assert [m["role"] for m in (system, *turns)] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(re.fullmatch(r"<tools>\n(.*)\n</tools>", system["content"])[1]) == TOOLS
    assert json.loads(re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", turns[1]["content"])[1]) == CALL
    assert turns[2]["content"] == '{"rain": true}'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({"prompt": "a"}, "missing field"),
        ({"instruction": "a", "output": " "}, "empty answer"),
        ({"instruction": None, "output": "a"}, "empty prompt"),
        ({"instruction": {"a": 1}, "output": "a"}, "not a text"),
        ({"instruction": "a", "output": "half \ud83d"}, "not a text"),
        ({"instruction": "a", "output": "b", "history": "c"}, "unreadable history"),
        ({"messages": "hello"}, "not a list of messages"),
        ({"messages": openai([("user", "a")])}, "no assistant turn"),
        ({"messages": openai([("user", "a")]), "ground_truth": '{"func_name": "f"}'}, "no assistant turn"),
        ({"messages": openai([("assistant", "a")])}, "roles out of order"),
        ({"messages": openai([*TURNS[1:3], TURNS[0], *TURNS[1:3]])}, "roles out of order"),
        ({"messages": openai([("user", "a"), ("tool", "b"), ("assistant", "c")])}, "roles out of order"),
        ({"messages": openai([("narrator", "a"), ("assistant", "b")])}, "unknown role"),
        ({"messages": [*openai(TURNS[:2]), weighted(0)]}, "no answer to learn"),
        ({"messages": [*openai(TURNS[:2]), weighted(0.5)]}, "unreadable weight"),
        ({"messages": [*openai(TURNS[:2]), weighted(0), *openai(TURNS[2:])]}, "two weights in one turn"),
        ({"system": "Be long.", "messages": openai(TURNS)}, "two system turns"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "the answer is no choice"),
        ({"question": "a", "choices": ["b", "c"], "answer": -1}, "the answer is no choice"),
        ({"question": "a", "choices": ["B", "A"], "answer": "A"}, "the answer is two choices"),
        ({"question": "a", "choices": "b, c", "answer": "b"}, "unreadable choices"),
        ({"question": "a", "context": {"sentences": ["b"]}, "answer": "c"}, "not a text"),
        ({"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}}, "empty answer"),
        ({"question": "a", "answer": float("nan")}, "not a text"),
        ({"question": "a", "answer": float("inf")}, "not a text"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "not a text"),
        ({"question": "Is it?", "answer": True}, "not a text"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": NaN}}'},
                ]
            },
            "not a text",
        ),
        ({"prompt": "a", "completion": "b", "image": "cat.png"}, "not text alone"),
        ({"messages": openai(TURNS), "images": [{"bytes": "x"}]}, "not text alone"),
        ({"messages": openai([("user", "<image>\nWhat is it?"), ("assistant", "A cat.")])}, "not text alone"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is it?"},
                            {"type": "image_url", "image_url": {"url": "x"}},
                        ],
                    },
                    {"role": "assistant", "content": "A cat."},
                ]
            },
            "not text alone",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"text": "What is it?", "image": "x"}]}],
                "completion": "A cat.",
            },
            "not text alone",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "What is it?", "images": ["x"]},
                    {"role": "assistant", "content": "A cat."},
                ]
            },
            "not text alone",
        ),
        ({"question": "a", "answer": "b", None: ["c"]}, "more cells than columns"),
        ({"messages": [{"role": deep(2000), "content": "a"}]}, "nested too deep"),
        ({"messages": openai(TURNS), "tools": False}, "unreadable tools"),
        ({"messages": openai(TURNS), "label": False}, "labelled as bad"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "labelled as bad"),
        ({"prompt": "a", "completion": "b", "label": 0}, "labelled as bad"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "empty answer"),
        ({"chosen": openai(TURNS), "rejected": openai(TURNS[1:])}, "two prompts"),
        ({"chosen": "b", "rejected": "c"}, "missing field"),
        ({"text": " \n"}, "empty text"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(row, reason):
    with pytest.raises(formats.Refused) as caught:
        read(row, formats.detect(row) or "pairs" if isinstance(row, dict) else "text")
    assert caught.value.reason == reason


# Any row

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(formats.ROLES)) | st.sampled_from(["narrator", "", None, 3])
SAID = st.text(max_size=6) | st.sampled_from(['{"name": "f", "arguments": "{}"}', "[1]", "null"]) | JSON
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": NAMES,
        "from": NAMES,
        "content": SAID,
        "value": SAID,
        "tool_calls": st.lists(SAID, max_size=2),
    },
)
REAL = st.lists(st.sampled_from(openai(TURNS) + sharegpt(TURNS)) | MESSAGE, max_size=6)
COLUMN = SAID | REAL | MESSAGE


@pytest.mark.parametrize("format", formats.FORMATS)
@given(drawn=st.data())
def test_any_row_is_a_conversation_or_refused(format, drawn):
    names = {column for columns in formats.FORMATS[format].values() for column in columns}
    row = drawn.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(names), COLUMN)) | JSON)
    try:
        messages, rejected = read(row, format)
    except formats.Refused as refusal:
        assert refusal.reason and len(refusal.reason) < 30
        return
    order = "".join(message["role"][0] for message in messages)
    assert re.fullmatch("a" if format == "text" else r"s?ua([ut]a)*", order)
    assert all(isinstance(m["content"], str) and (m["content"] or m["role"] == "tool") for m in messages)
    json.dumps([messages, rejected], ensure_ascii=False).encode()
    assert (rejected is not None) == (format == "pairs")


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real rows are not beside the project")
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_odd_real_row_is_read_or_refused_by_name(path):
    rows = list(rows_of_file(path))
    part = {**PART, "name": path.stem, "format": format_of(path)}
    spec = {**DATASET, "train": 1, "validation": 0, "test": 1, "parts": [part]}
    found = splits.make_splits(spec, {path.stem: str(path)})
    refused = [i for i, row in enumerate(rows, 1) if row.get("label") is False]
    assert [r["row"] for r in found.refused] == refused[: splits.SHOWN]
    assert all(r["part"] == path.stem and r["reason"] == "labelled as bad" for r in found.refused)
    assert found.left_out.get("labelled as bad", 0) == len(refused)


# A user's own file


@pytest.mark.parametrize(
    "row", [*SAME.values(), *PAIRS.values(), {"text": "a"}, {"question": "a", "answer": "b"}]
)
def test_the_format_of_a_file_is_seen_in_its_columns(row, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row))
    part = load_spec(str(path), {})["parts"][0]
    assert formats.read_row(row, part)


def test_a_file_whose_name_no_record_could_hold_is_refused(tmp_path):
    path = tmp_path / "half \udcff.jsonl"
    path.write_text(json.dumps(SAME["openai"]))
    with pytest.raises(BadRequest, match="rename it"):
        load_spec(str(path), {})


def test_a_field_that_its_format_does_not_have_is_named(tmp_path):
    spec = tmp_path / "own.toml"
    spec.write_text('[part]\nname = "own"\npath = "x"\nformat = "question"\nfields = {anser = "Antwort"}\n')
    with pytest.raises(BadRequest, match="'anser': did you mean answer"):
        load_spec(str(spec), {})


@pytest.mark.parametrize(
    ("row", "near", "lacks"),
    [
        ({"prompt": "a", "reply": "b"}, "prompt", "completion"),
        ({"instruction": "a", "answer": "b"}, "instruction", "output"),
        ({"Question": "a", "Answer": "b"}, "question", "answer"),
        ({"Frage": "a", "Antwort": "b"}, "question", "answer"),
        ({"id": 1, "Promt": "a", "Completion": "b"}, "prompt", "completion"),
        ({"Satz": "a"}, "text", "text"),
        ({"chosen": "a", "worse": "b"}, "pairs", "rejected"),
    ],
)
def test_columns_that_fit_no_format_are_named_with_the_nearest(row, near, lacks, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadRequest) as caught:
        load_spec(str(path), {})
    text = str(caught.value)
    assert f"The nearest is {near}, without" in text and lacks in text
    assert all(repr(column) in text for column in row)
    # What it says to write is a spec that reads the row.
    spec = tmp_path / "own.toml"
    fields = re.search(r"fields = \{.*?\}", text)[0]
    spec.write_text(f'[part]\nname = "own"\npath = "own.jsonl"\nformat = "{near}"\n{fields}\n')
    part = load_spec(str(spec), {})["parts"][0]
    if near != "pairs":
        found = [m["content"] for m in formats.read_row(row, part)[0]]
        assert found == [text for text in row.values() if isinstance(text, str)]


# What must not be learned without a word


@pytest.mark.parametrize(
    ("answers", "learned", "names"),
    [
        ([{"text": "Denver"}, {"text": "Denver Broncos"}], "Denver", {"answers after the first"}),
        (["Denver", "Denver Broncos"], "Denver", {"answers after the first"}),
        (["Denver"], "Denver", set()),
        ([{"type": "text", "text": "Den"}, {"type": "text", "text": "ver"}], "Denver", {"answers.type"}),
    ],
)
def test_the_first_of_several_answers_is_learned_and_the_rest_named(answers, learned, names):
    row = {"question": "Who won?", "answers": answers}
    assert told(row)[-1] == ("assistant", learned)
    assert formats.unused(row, {**PART, "format": "question"}) == names


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"ctx": "He sits and", "endings": ["stands.", "sings."], "label": ...},
         {"question": "ctx", "answer": "label"}),
        ({"question": "He sits and", "endings": ["stands.", "sings."], "answer": ...}, {}),
        ({"premise": "He sits and", "choice1": "stands.", "choice2": "sings.", "label": ...},
         {"question": "premise", "answer": "label"}),
    ],
)  # fmt: skip
def test_endings_and_numbered_choices_are_choices(row, fields, place):
    row = {column: place if value is ... else value for column, value in row.items()}
    asked, learned = (text for _, text in told(row, format="question", fields=fields))
    assert asked == "He sits and\n\nA. stands.\nB. sings."
    assert learned == ("A. stands.", "B. sings.")[place]


def test_a_place_in_a_list_that_is_not_read_is_no_answer():
    with pytest.raises(formats.Refused, match=r"an answer by its place .*'candidates'"):
        read({"question": "a", "candidates": ["b", "c"], "answer": 1})
    assert told({"question": "How many?", "tags": ["sums"], "answer": 12})[-1] == ("assistant", "12")


@pytest.mark.parametrize("shape", [
    {"instruction": "a", "output": "b"}, {"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"},
    {"messages": openai([("user", "a"), ("assistant", "b")])},
    {"question": "a", "choices": ["b", "c"], "answer": "b"},
])  # fmt: skip
def test_a_bad_answer_is_refused_in_every_shape(shape):
    for good in ({"label": True}, {"label": "pets"}, {"kto_tag": "true"}):
        assert read({**shape, **good})
    with pytest.raises(formats.Refused, match="labelled as bad"):
        read({**shape, "label": False})


def test_the_label_of_a_choice_is_no_verdict():
    row = {"question": "a", "choices": ["b", "c"], "answer": "b", "label": 0}
    assert told(row)[-1] == ("assistant", "A. b")
    for format, answer in (("question", "answer"), ("instruction", "output"), ("prompt", "completion")):
        assert told({format: "Is it?", "label": "0"}, format=format, fields={answer: "label"})[-1][1] == "0"


@pytest.mark.parametrize("answer", ["c", {"from": "gpt", "value": "c"}, [{"from": "gpt", "value": "c"}]])
def test_an_answer_in_the_prompt_is_not_joined_to_the_one_that_follows(answer):
    said = sharegpt([("user", "a"), ("assistant", "b")])
    pair = {"conversations": said, "chosen": answer, "rejected": "d"}
    for row in (pair, {"prompt": said, "completion": answer}):
        with pytest.raises(formats.Refused, match="two answers"):
            read(row)


@pytest.mark.parametrize("field", ["system", "input", "history", "label"])
def test_an_optional_field_that_is_mapped_is_there(field):
    row = {"instruction": "a", "output": "b"}
    with pytest.raises(formats.Refused, match="no field 'nope' for format 'instruction'"):
        read(row, fields={field: "nope"})
    assert read({**row, "nope": None}, fields={field: "nope"}) == read(row)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("kind", ["<image>", "<video>", "<audio>", "<|image|>"])
def test_what_stands_for_no_text_is_refused_in_every_turn(role, kind):
    turns = [(name, f"{kind}\n{text}" if name == role else text) for name, text in TURNS]
    for row in ({"messages": openai(turns)}, {"conversations": sharegpt(turns)}):
        with pytest.raises(formats.Refused, match="not text alone"):
            read(row)
    text = f"An {kind[:-1]} src='a'> is no placeholder."
    assert told({"instruction": "a", "output": text})[-1][1] == text


def test_what_a_file_of_columns_is_told_makes_rows_of_it(tmp_path):
    columns = {"instruction": ["a", "ü"], "output": ["c", {"text": "d"}]}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    with pytest.raises(BadRequest, match="one of columns") as caught:
        list(rows_of_file(tmp_path / "columns.json"))
    subprocess.run(str(caught.value).partition("of them: ")[2], shell=True, check=True, cwd=tmp_path)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    assert list(rows_of_file(tmp_path / "rows-columns.json")) == rows
    for other in ("5", "{}", '{"a": 1}', '{"a": [1], "b": [1, 2]}'):
        (tmp_path / "columns.json").write_text(other)
        with pytest.raises(BadRequest, match=r"is not a list of rows$"):
            list(rows_of_file(tmp_path / "columns.json"))


@pytest.mark.parametrize("text", ["a“b", "éa\n€b"])
def test_windows_own_letters_are_not_taken_for_latin_1(text, tmp_path):
    (tmp_path / "rows.csv").write_bytes(f"question,answer\n{text},c\n".encode("cp1252"))
    with pytest.raises(BadRequest, match=r"Windows-1252: .*-f WINDOWS-1252 ") as caught:
        list(rows_of_file(tmp_path / "rows.csv"))
    subprocess.run(str(caught.value).partition("Convert it: ")[2], shell=True, check=True, cwd=tmp_path)
    assert text in (tmp_path / "utf8-rows.csv").read_text("utf-8")


def test_a_mapped_column_is_not_one_of_the_choices():
    row = {"question": "a", "choice1": "b", "choice2": "c"}
    assert told(row, format="question", fields={"answer": "choice1"})[-1] == ("assistant", "b")
