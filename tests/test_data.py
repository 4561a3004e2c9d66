"""Rows of every kind of file, splits that hold still, and token ids whose labels are the response alone."""

import csv
import gzip
import json
import os
import random
import re
from dataclasses import asdict

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from harness.data import formats
from harness.data.rows import READERS, rows_of_file
from harness.data.spec import DatasetSpec, PartSpec
from harness.data.splits import make_splits
from harness.data.template import Template, tokenize
from harness.errors import BadRequest

DATASET, PART = asdict(DatasetSpec()), asdict(PartSpec())

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a cat."},
    {"role": "assistant", "content": "Tom."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "  Rex, the red one.\n"},
]
PAIR = CONVERSATION[1:3]


def asked(train=4, validation=2, test=3, parts=None, **more) -> dict:
    parts = parts or [{"name": "tiny", "format": "instruction"}]
    return {**DATASET, "train": train, "validation": validation, "test": test, **more,
            "parts": [{**PART, **part} for part in parts]}  # fmt: skip


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def split(folder, rows, **more):
    found = make_splits(asked(**more), {"tiny": str(written(folder, rows))})
    return found.rows, found.left_out


def instructions(count, start=0) -> list[dict]:
    return [
        {"instruction": f"Add one to {i}.", "input": "", "output": str(i + 1)} for i in range(start, count)
    ]


def texts(conversations) -> list[str]:
    return [conversation.messages[0]["content"] for conversation in conversations]


# Token ids


def read_row(row, format="messages", **more):
    """-> its messages, or None where it is refused."""
    try:
        return formats.read_row(row, {**PART, "format": format, **more})[0]
    except formats.Refused as refusal:
        assert str(refusal)


def messages_of(messages):
    return read_row({"messages": messages})


# Splits


def test_splits_are_disjoint_and_of_the_size_asked(tmp_path):
    found, _ = split(tmp_path, instructions(30))
    assert {name: len(found[name]) for name in found} == {"train": 4, "validation": 2, "test": 3}
    drawn = [text for name in found for text in texts(found[name])]
    assert len(set(drawn)) == 9


def test_the_order_of_the_source_does_not_matter(tmp_path):
    rows = [*instructions(30), {"instruction": "Add one to 3.", "input": "", "output": "four"}]
    first, counts = split(tmp_path, rows)
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert split(tmp_path, rows) == (first, counts)


def test_more_training_rows_leave_test_and_validation_as_they_are(tmp_path):
    few, _ = split(tmp_path, instructions(40), train=4)
    many, _ = split(tmp_path, instructions(40), train=30)
    assert many["test"] == few["test"]
    assert many["validation"] == few["validation"]
    assert set(texts(few["train"])) < set(texts(many["train"]))


def test_another_seed_draws_other_rows(tmp_path):
    assert split(tmp_path, instructions(40), seed=0) != split(tmp_path, instructions(40), seed=1)


def test_of_rows_with_one_prompt_one_is_kept_and_the_others_counted(tmp_path):
    again = [{"instruction": f"  ADD one to {i}! ", "output": "another answer"} for i in range(5)]
    found, counts = split(tmp_path, [*instructions(12), *again], train=7)
    assert counts == {"duplicates": 5}
    numbers = [re.search(r"\d+", text)[0] for name in found for text in texts(found[name])]
    assert len(set(numbers)) == len(numbers) == 12


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("Is x < y?", "Is x > y?"),
        ("What does a[1] say?", "What does a(1) say?"),
        ("🙂", "🙁"),
        ("की", "के"),
    ],
)
def test_prompts_that_differ_in_a_sign_are_not_duplicates(one, other, tmp_path):
    rows = [{"instruction": text, "output": "yes"} for text in (one, other)]
    _, counts = split(tmp_path, [*rows, *instructions(12)])
    assert counts == {}


def test_a_prompt_in_two_parts_is_kept_in_one(tmp_path):
    first, second = instructions(12), instructions(20, start=6)
    locations = {
        "one": str(written(tmp_path, first, "1.jsonl")),
        "two": str(written(tmp_path, second, "2.jsonl")),
    }
    spec = asked(3, 1, 2, parts=[{"name": "one"}, {"name": "two"}])
    drawn = make_splits(spec, locations)
    found = drawn.rows
    assert drawn.left_out["duplicates"] == 6
    assert {name: len(rows) for name, rows in found.items()} == {"train": 6, "validation": 2, "test": 4}
    drawn = [text for rows in found.values() for text in texts(rows)]
    assert len(set(drawn)) == len(drawn)
    assert {row.part for row in found["test"]} == {"one", "two"}


def test_too_few_rows_are_an_error_that_says_how_many(tmp_path):
    with pytest.raises(BadRequest, match=r"9 rows are asked for .* 5 distinct usable ones"):
        split(tmp_path, instructions(5))


# Conversations


def test_a_conversation_ends_with_its_last_answer():
    assert messages_of([*PAIR, {"role": "user", "content": "Thanks"}]) == PAIR
    assert messages_of(CONVERSATION)[:-1] == CONVERSATION[:-1]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        PAIR[:1],
        PAIR[1:],
        [PAIR[0], {"role": "assistant", "content": ""}],
        [PAIR[0], {"role": "assistant", "content": None}],
        [{"role": "user", "content": " "}, PAIR[1]],
        [{"role": "tool", "content": "x"}, *PAIR],
        [{"content": "x"}, PAIR[1]],
        [{}, {}],
        [CONVERSATION[0], CONVERSATION[0]],
    ],
)
def test_a_conversation_with_unusable_roles_or_no_answer_is_none(messages):
    assert messages_of(messages) is None


def test_unusable_rows_are_counted(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Say {i}"}, PAIR[1]]} for i in range(12)]
    rows += [{"messages": PAIR[::-1]}, {"messages": []}, {"messages": None}]
    _, counts = split(tmp_path, rows, parts=[{"name": "tiny", "format": "messages"}])
    reasons = {"no assistant turn": 1, "not a list of messages": 1, "roles out of order": 1}
    assert counts == reasons


def test_an_instruction_joins_its_input():
    found = read_row({"instruction": "Add.", "input": "1 2", "output": "3 "}, "instruction")
    assert [formats.said(message) for message in found] == ["Add.\n\n1 2", "3"]
    assert read_row({"instruction": "Add.", "output": "3"}, "instruction")[0]["content"] == "Add."
    assert read_row({"instruction": "Add.", "input": None, "output": ""}, "instruction") is None


def test_an_answer_of_zero_is_an_answer():
    found = read_row({"instruction": "1 - 1?", "output": 0}, "instruction")
    assert found and found[1]["content"] == "0"


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Tom."}], {"text": "Tom."}, ["Tom."]])
def test_content_that_is_no_text_is_never_learned_as_pythons_notation(content):
    """Chat data often hold a message as a list of parts."""
    for messages in (
        messages_of([PAIR[0], {"role": "assistant", "content": content}]),
        messages_of([{"role": "user", "content": content}, PAIR[1]]),
        read_row({"instruction": "a", "output": content}, "instruction"),
    ):
        assert messages is None or str(content) not in [message["content"] for message in messages]


def test_columns_are_mapped():
    fields = {"instruction": "question", "output": "answer"}
    assert read_row({"question": "a?", "answer": "b"}, "instruction", fields=fields)[1]["content"] == "b"


@pytest.mark.parametrize(
    ("format", "row", "field"),
    [
        ("instruction", {"instruction": "a", "text": "b"}, "output"),
        ("instruction", {"prompt": "a", "output": "b"}, "instruction"),
        ("messages", {"dialogue": []}, "messages"),
    ],
)
def test_a_missing_field_is_named_with_those_there_are(format, row, field, tmp_path):
    with pytest.raises(BadRequest) as caught:
        split(tmp_path, [row], parts=[{"name": "tiny", "format": format}])
    assert f"no field {field!r}" in str(caught.value)
    for name in row:
        assert repr(name) in str(caught.value)


# Rows of any kind

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", None, 1])
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES | JSON, "content": st.text(max_size=8) | JSON}) | JSON,
    max_size=5,
)
TEXTS = st.text(min_size=1, max_size=8)
TURNS = st.lists(  # turn and answer, with messages of any role strewn in
    st.tuples(TEXTS, TEXTS).map(
        lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    )
    | st.builds(lambda role, content: [{"role": role, "content": content}], ROLES | st.just("system"), TEXTS),
    max_size=4,
).map(lambda turns: [message for turn in turns for message in turn])
ROWS = {
    "messages": st.fixed_dictionaries({"messages": TURNS | MESSAGES | JSON}) | JSON,
    "instruction": st.fixed_dictionaries({"instruction": JSON, "output": JSON}, optional={"input": JSON})
    | JSON,
}


@pytest.mark.parametrize("format", ROWS)
@given(rows=st.data())
def test_no_row_raises_anything_but_a_data_error(format, rows, tmp_path_factory):
    drawn = rows.draw(st.lists(ROWS[format], min_size=1, max_size=3))
    folder = tmp_path_factory.getbasetemp()
    try:
        _, counts = split(
            folder, drawn, train=1, validation=0, test=0, parts=[{"name": "tiny", "format": format}]
        )
    except BadRequest as error:
        assert str(error)
    else:
        assert sum(counts.values()) < len(drawn)


@pytest.mark.parametrize("kind", ["chat", "instruction"])
def test_half_a_character_is_counted_or_refused_by_name(kind, tmp_path):
    """JSON can hold one half of a surrogate pair, which no tokenizer reads."""
    rows = [{"instruction": f"Say {i} \ud83d", "output": "a \ud83d"} for i in range(12)]
    try:
        found, _ = split(tmp_path, rows)
        tokenize(found["train"], Template(tiny.tokenizer(), kind), 512)
    except BadRequest as error:
        assert "tiny" in str(error)


# Files


def read(path) -> list:
    return list(rows_of_file(path))


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"instruction": 'Say «да»,\n"yes"', "input": "", "output": "да\u2028"}, *instructions(3)]
    written(tmp_path, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with (tmp_path / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    for suffix in READERS:
        assert read(tmp_path / f"rows{suffix}") == rows
    assert len(read(tmp_path)) == 5 * len(rows)  # a folder: all of them
    for suffix in READERS:
        (tmp_path / f"packed{suffix.upper()}.gz").write_bytes(
            gzip.compress((tmp_path / f"rows{suffix}").read_bytes())
        )
        assert read(tmp_path / f"packed{suffix.upper()}.gz") == rows


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(suffix, tmp_path):
    """As Excel and Windows write it."""
    path = tmp_path / f"rows{suffix}"
    text = {".csv": "instruction,output\na,b\n", ".json": '[{"instruction": "a", "output": "b"}]',
            ".jsonl": '{"instruction": "a", "output": "b"}\n'}[suffix]  # fmt: skip
    path.write_text(text, "utf-8-sig")
    assert read(path) == [{"instruction": "a", "output": "b"}]


@pytest.mark.parametrize("suffix", READERS)
def test_a_file_that_is_not_there_is_named(suffix, tmp_path):
    with pytest.raises(BadRequest, match=f"gone\\{suffix}"):
        read(tmp_path / f"gone{suffix}")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_file_of_bytes_is_named(suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"\xff\xfe\x00\x01PAR1" * 50)
    with pytest.raises(BadRequest, match=f"broken\\{suffix}"):
        read(path)


@pytest.mark.parametrize("suffix", READERS)
def test_an_empty_file_is_named(suffix, tmp_path):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(b"")
    with pytest.raises(BadRequest, match="empty"):
        make_splits(asked(parts=[{"name": "tiny"}]), {"tiny": str(path)})


@pytest.mark.parametrize("text", ["3", "null", "true", '"a"', "{", "[1, 2", '{"a": 1}', "[1]"])
def test_json_that_is_no_list_of_objects_is_a_data_error(text, tmp_path):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(BadRequest, match=r"odd|tiny"):
        make_splits(asked(), {"tiny": str(tmp_path / "odd.json")})


def test_the_line_of_broken_json_is_named(tmp_path):
    path = written(tmp_path, instructions(3))
    path.write_text(path.read_text() + '\n{"instruction": \n' + path.read_text())
    with pytest.raises(BadRequest, match=r"rows\.jsonl, line 5"):
        read(path)


def test_the_line_of_broken_utf_8_is_named(tmp_path):
    path = written(tmp_path, instructions(1000))
    path.write_bytes(path.read_bytes() + b'{"instruction": "\xff", "output": "a"}\n')
    with pytest.raises(BadRequest, match=r"rows\.jsonl, line 1001\b"):
        read(path)


def test_brackets_without_end_are_a_data_error(tmp_path):
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"deep{suffix}"
        path.write_text("[" * 200_000)
        with pytest.raises(BadRequest, match="deep"):
            read(path)


def test_a_number_too_long_for_python_is_a_data_error(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"instruction": "a", "output": ' + "9" * 5000 + "}\n")
    with pytest.raises(BadRequest, match=r"long\.jsonl, line 1"):
        read(path)


def test_a_cut_parquet_file_is_named(tmp_path):
    path = tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(instructions(1000)), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100] + bytes(200) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(BadRequest, match=r"cut\.parquet"):
            read(path)


def test_a_large_cell_of_csv_is_read_or_named(tmp_path):
    """Python's csv refuses more than 131,072 characters, with an error of its own kind."""
    path = tmp_path / "large.csv"
    path.write_text(f"instruction,output\n{'a' * 200_000},b\n")
    try:
        assert len(read(path)[0]["instruction"]) == 200_000
    except BadRequest as error:
        assert "large.csv" in str(error)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named_with_its_remedy(suffix, encoding, tmp_path):
    """And the remedy is one: what iconv makes of the file is read."""
    rows = [{"instruction": f"Sag {i}", "output": "zwölf"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = "instruction,output\n" + "".join(f"Sag {i},zwölf\n" for i in range(3))
    text = {".json": json.dumps(rows, ensure_ascii=False), ".csv": table}.get(suffix, text)
    path = tmp_path / f"rows{suffix}"
    packed = gzip.compress if suffix.endswith(".gz") else bytes
    path.write_bytes(packed(text.encode(encoding)))
    with pytest.raises(BadRequest, match=f"rows{suffix}.*UTF-8") as caught:
        read(path)
    if encoding == "latin-1":
        assert "0xF6" in str(caught.value) and (suffix == ".json" or "line " in str(caught.value))
    source = re.search(r"iconv -f (\S+) -t UTF-8", str(caught.value))[1]
    path.write_bytes(packed(text.encode(encoding).decode(source).encode()))
    assert read(path) == rows


def test_a_table_parted_by_semicolons_is_read_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "rows.csv").write_text('instruction;output\n"a;b, c";d\n')
    assert read(tmp_path / "rows.csv") == [{"instruction": "a;b, c", "output": "d"}]


@pytest.mark.parametrize(("text", "said"), [
    ('instruction,output\na,"b\nc,d\n', "line 3"),  # a quote that never closes would swallow the rest
    ("instruction,output,output\na,b,c\n", "two columns are named 'output'"),
])  # fmt: skip
def test_a_table_that_cannot_be_told_apart_is_named(text, said, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(BadRequest, match=said):
        read(tmp_path / "rows.csv")


def test_a_row_with_more_cells_than_columns_is_refused_by_name(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\nWhy, though?,so\n")
    with pytest.raises(BadRequest, match="row 1: more cells than columns"):
        make_splits(asked(), {"tiny": str(tmp_path / "rows.csv")})


def test_what_the_hub_keeps_beside_the_rows_is_not_read(tmp_path):
    written(tmp_path, instructions(3))
    for name in ("dataset_infos.json", ".cache/huggingface/rows.json", ".hidden.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert read(tmp_path) == instructions(3)


@pytest.mark.parametrize(("name", "said"), [
    ("rows.jsonl.zst", "zst file, only .*Unpack it"), ("rows.txt", "cannot read a .txt file"),
    ("rows", "nameless"), ("rows.gz", "cannot read a .gz file"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadRequest, match=said):
        read(tmp_path / name)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(BadRequest, match="neither a file nor a folder"):
        read(tmp_path / "rows.jsonl")


def test_a_list_within_an_object_is_named(tmp_path):
    (tmp_path / "rows.json").write_text('{"version": 1, "data": [{"text": "a"}]}')
    with pytest.raises(BadRequest, match="save what stands under 'data'"):
        read(tmp_path / "rows.json")


def test_a_models_folder_is_named(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadRequest, match="a model's folder"):
        read(tmp_path)


def test_another_kind_of_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(BadRequest, match="holds no"):
        read(tmp_path)
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(BadRequest, match=r"rows\.xlsx"):
        read(tmp_path / "rows.xlsx")


def test_a_row_that_is_no_object_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('["a"]\n')
    with pytest.raises(BadRequest, match=r"part tiny.*row 1: not an object \(a row is list\)"):
        make_splits(asked(), {"tiny": str(tmp_path / "rows.jsonl")})
