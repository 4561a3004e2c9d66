"""Rows and files that nobody would write: a conversation comes of them, or a reason; never a traceback.

TUNEOFF_FUZZ=10000 tries so many inputs of each kind; the default is what a test run can spare.
"""

import copy
import csv
import gzip
import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.data import formats, splits
from harness.data.rows import rows_of_file
from harness.data.spec import DatasetSpec, PartSpec, load_spec
from harness.data.template import COUNTED, Template, tokenize
from harness.errors import BadRequest

DATASET, PART = asdict(DatasetSpec()), asdict(PartSpec())

TRIES = int(os.environ.get("TUNEOFF_FUZZ", 300))
fuzzed = settings(max_examples=TRIES, suppress_health_check=list(HealthCheck))

USER, ANSWER = {"role": "user", "content": "Name a cat."}, {"role": "assistant", "content": "Tom."}
SHAPES = {  # rows as they are met, every column of them
    "openai": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER,
                            {"role": "user", "content": "A dog?"}, {"role": "assistant", "content": "Rex."}]},
    "weights": {"messages": [USER, {**ANSWER, "weight": 0}, {"role": "user", "content": "A dog?"},
                             {"role": "assistant", "content": "Rex.", "weight": 1}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a cat."}]}, ANSWER]},
    "tools": {"tools": '[{"name": "f"}]', "conversations": [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": "true"}, {"from": "gpt", "value": "Yes."}], "system": "Be kind."},
    "calls": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "3", "name": "f"}, ANSWER]},
    "kto": {"messages": [USER, ANSWER], "label": True},
    "rlvr": {"messages": [USER], "ground_truth": "Tom.", "dataset": "x"},
    "alpaca": {"instruction": "Name one.", "input": "cats", "output": "    Tom", "system": "Be brief.",
               "history": [["Hi", "Hello"]], "text": "..."},
    "dolly": {"instruction": "Who?", "context": "Ann ran.", "response": "Ann", "category": "qa"},
    "squad": {"id": "1", "title": "t", "context": "Ann ran.", "question": "Who?",
              "answers": {"text": ["Ann"], "answer_start": [0]}},
    "mmlu": {"question": "1 + 1?", "subject": "sums", "choices": ["one", "two", "three"], "answer": 1},
    "arc": {"id": "a", "question": "1 + 1?", "choices": {"text": ["one", "two"], "label": ["A", "B"]},
            "answerKey": "B"},
    "ceval": {"id": 0, "question": "1 + 1?", "A": "one", "B": "two", "answer": "B", "explanation": ""},
    "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
    "prompt": {"prompt": "Name a cat.", "completion": "Tom.", "system": "Be brief.", "context": "Ann ran."},
    "pairs": {"prompt": "Name a cat.", "chosen": "Tom.", "rejected": "Rex.", "score_chosen": 9.5},
    "pairs of turns": {"prompt": "Name a cat.", "prompt_id": "x", "chosen": [USER, ANSWER],
                       "rejected": [USER, {"role": "assistant", "content": "Rex."}]},
    "sharegpt pairs": {"conversations": [{"from": "human", "value": "Name a cat."}],
                       "chosen": {"from": "gpt", "value": "Tom."},
                       "rejected": {"from": "gpt", "value": "Rex."}},
    "text": {"text": "Name a cat.", "label": 1},
}  # fmt: skip
TEXTS = st.sampled_from(
    ["", " ", "\n", "    x\n", "\x00", "\ud83d", "\ue000", "\ue001\ue000", "<image>", "<end_of_turn>", "NaN",
     "[]", "{", '{"name": 1e999}', "user", "assistant", "system", "tool", "A", "B", "1", "é" * 300, "\u2028",
     "🙂", "\ufeff"]
) | st.text(max_size=8)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
    | st.sampled_from([10**400, b"x", 1e308, -0.0, (1, 2), {1: 2}, {None: "a"}]).map(copy.deepcopy),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def places(value, path=()):
    """The way to each value within a row, the inner ones too."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(row, path, value):
    row = inner = copy.deepcopy(row)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


@st.composite
def rows(draw):
    """A row of a known shape with some of its values, keys or columns gone wrong."""
    row = copy.deepcopy(draw(st.sampled_from(list(SHAPES.values()))))
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(places(row)) or [()]))
        what = draw(st.sampled_from(["value", "value", "value", "gone", "key", "twice", "other"]))
        inner = row
        for key in path[:-1]:
            inner = inner[key]
        if not path:
            break
        if what == "value":
            inner[path[-1]] = draw(VALUES)
        elif what == "gone":
            del inner[path[-1]]
        elif what == "other":  # a value from elsewhere
            other = draw(st.sampled_from(list(SHAPES.values())))
            inner[path[-1]] = copy.deepcopy(draw(st.sampled_from(list(other.values()))))
        elif isinstance(inner, list):
            inner.insert(0, copy.deepcopy(inner[path[-1]]))
        else:
            names = sorted({c for fields in formats.FORMATS.values() for cs in fields.values() for c in cs})
            name = draw(TEXTS | st.sampled_from([*names, "image", "images", "role", "weight", "A", "B"]))
            inner[name] = inner.pop(path[-1]) if what == "key" else copy.deepcopy(inner[path[-1]])
    return row


def part_of(format, fields=()):
    return {**PART, "name": "fuzz", "format": format, "fields": dict(fields)}


FORMATS = st.none() | st.sampled_from(list(formats.FORMATS))  # none: as its columns say


@fuzzed
@given(
    row=rows() | VALUES,
    format=FORMATS,
    kind=st.sampled_from(["chat", "instruction"]),
    depth=st.sampled_from([0] * 8 + [1, 2000]),
    place=st.integers(0, 4),
)
def test_a_row_is_learned_or_refused(row, format, kind, depth, place):
    if isinstance(row, dict) and row:
        column = list(row)[place % len(row)]
        for _ in range(depth):  # too deep for Python's recursion
            row[column] = [row[column]]
    part = part_of(format or (formats.detect(row) if isinstance(row, dict) else None) or "question")
    if isinstance(row, dict):
        formats.nearest(row)
    try:
        messages, rejected = formats.read_row(row, part)
    except formats.Refused as refusal:
        assert 0 < len(refusal.reason) < 40 and str(refusal).isprintable()
        return
    names = formats.unused(row, part)
    order = "".join(m["role"][0] for m in messages)
    assert order == "a" or (order.removeprefix("s").startswith("ua") and order.endswith("a"))
    assert all(isinstance(m["content"], str) and (m["content"] or m["role"] == "tool") for m in messages)
    assert formats.learned(messages[-1])
    json.dumps([messages, rejected, sorted(names)], ensure_ascii=False).encode()
    conversation = formats.Conversation("fuzz:1", "fuzz", messages, rejected)
    made, counts = tokenize([conversation], Template(tiny.tokenizer(), kind), 64)
    assert set(counts) == set(COUNTED) and all(0 < row.length <= 64 for row in made)
    assert made or counts["too_long"] or counts["refused"]
    for row in made:
        assert row.response_ids and (rejected is None) == (row.rejected_ids is None)


LEAVES = [(name, path) for name, row in SHAPES.items() for path in places(row)]
OTHERS = st.sampled_from(["quite another", 77, 2.5, float("nan"), [], {}, ["other"], False, True, "B"])


@fuzzed
@given(leaf=st.sampled_from(LEAVES), other=OTHERS)
def test_a_changed_value_changes_what_is_learned_or_is_refused_or_named(leaf, other):
    """The oracle of wrong successes: nothing that a row holds may vanish without a word."""
    name, path = leaf
    row = SHAPES[name]
    part = part_of(formats.detect(row))
    before = formats.read_row(row, part)
    after = changed(row, path, other)
    try:
        if formats.read_row(after, part) != before:
            return
    except formats.Refused:
        return
    old = row
    for key in path:
        old = old[key]
    keys = [key for key in path if isinstance(key, str)]
    named = ".".join([keys[0], keys[-1]]) if len(keys) > 1 else keys[0]
    unused = formats.unused(after, part) | formats.unused(row, part)
    same = formats.empty(old) and formats.empty(other)
    meant = [  # another way to say the same
        keys[-1] in ("weight", "label") and bool(old) == bool(other),
        keys[-1] in ("answer", "answerKey") and name in ("mmlu", "arc", "ceval") and other == "B",
        keys[-1] in ("id", "type") and "tool_calls" in keys,
        keys[-1] == "type" and "content" in keys,
        path[-1] in ("tools", "system", "label", "input", "history", "weight") and formats.empty(other),
    ]
    assert same or any(meant) or {named, keys[0]} & unused, (path, old, other)


NAMES = sorted({name for fields in formats.FORMATS.values() for names in fields.values() for name in names})
COLUMNS = st.sampled_from([*NAMES, "image", "A", "B", "weight", "role", "score", "a column"])


@fuzzed
@given(shape=st.sampled_from(sorted(SHAPES)), column=COLUMNS, value=OTHERS, instead=st.booleans())
def test_a_column_more_or_of_another_name_is_read_refused_or_named(shape, column, value, instead):
    row = dict(SHAPES[shape])
    part = part_of(formats.detect(row))
    before = formats.read_row(row, part)
    if instead:
        value = row.pop(next(iter(row)))
    if column in row or formats.empty(value):
        return
    try:
        found = formats.read_row({**row, column: value}, part)
    except formats.Refused:
        return
    named = formats.unused({**row, column: value}, part) - formats.unused(row, part)  # or what it replaces
    good = column in ("label", "kto_tag") and formats.judged(value)  # says nothing but that it may be learned
    renamed = instead and column in NAMES  # to another name of its field
    there = column in formats.CONTEXT and str(value) in str(before[0])  # in the question itself
    assert found != before or named or good or renamed or there


# Files


def files(rows: list[dict]) -> dict[str, bytes]:
    """The same rows in every kind of file that can hold them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    made = {"rows.jsonl": lines, "rows.JSON": json.dumps(rows).encode()}
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    made["rows.parquet"] = table.getvalue()
    for name, delimiter in {"rows.csv": ",", "semicolons.csv": ";", "rows.tsv": "\t"}.items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        made[name] = text.getvalue().encode()
    return made | {f"{name}.gz": gzip.compress(content) for name, content in made.items()}


PROSE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
ROWS = st.lists(st.fixed_dictionaries({"question": PROSE, "answer": PROSE}), min_size=1, max_size=4)


@settings(fuzzed, max_examples=max(10, TRIES // 10))
@given(rows=ROWS)
def test_every_kind_of_file_holds_the_same_rows(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for name, content in files(rows).items():
        (folder / name).write_bytes(content)
        assert list(rows_of_file(folder / name)) == rows, name


@fuzzed
@given(drawn=st.data())
def test_a_broken_file_is_named_or_read(drawn, tmp_path_factory):
    rows = [{"question": f"What is {i}?", "answer": 'é, "so"\nthere'} for i in range(12)]
    whole = MADE.setdefault("files", files(rows))
    name = drawn.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    for _ in range(drawn.draw(st.integers(1, 3))):
        at = drawn.draw(st.integers(0, len(content)))
        what = drawn.draw(st.sampled_from(["cut", "byte", "more", "gone"]))
        if what == "cut":
            del content[at:]
        elif what == "byte" and at < len(content):
            content[at] = drawn.draw(st.integers(0, 255))
        elif what == "more":
            odd = st.sampled_from([b'"', b"\xff\xfe", b"\n", b"{", b"["])
            content[at:at] = drawn.draw(st.binary(max_size=4) | odd)
        else:
            del content[at : at + drawn.draw(st.integers(1, 30))]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    spec = {**DATASET, "train": 1, "validation": 0, "test": 1, "parts": [part_of("question")]}
    try:
        load_spec(str(path), {})
        found = splits.make_splits(spec, {"fuzz": str(path)})
    except BadRequest as error:
        assert Path(name).stem in str(error) or "fuzz" in str(error)
    else:
        assert {len(rows) for rows in found.rows.values()} <= {0, 1}


MADE: dict = {}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet", "rows.JSON", "rows.csv.gz"])
def test_half_a_file_is_never_read_as_a_whole_one(name, tmp_path):
    """What is cut within a row; a .csv or .jsonl that ends with a line's end is a shorter file."""
    content = files([{"question": f"What is {i}?", "answer": "so"} for i in range(50)])[name]
    for share in (0.2, 0.5, 0.9):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(BadRequest, match="rows"):
            list(rows_of_file(tmp_path / name))
