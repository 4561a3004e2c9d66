"""Parts that are only tested: nothing of them is trained on, and what they show is what their outputs say."""

import json
import random
from math import exp

import fabricate
import pytest
from test_run import files, run  # noqa: F401

from harness.data import load_spec
from harness.data.splits import make_splits
from harness.errors import BadRequest
from harness.report.comparison import comparisons
from harness.report.unseen import unseen
from harness.store import OUTPUTS, UNSEEN, Store, content_hash

PARTS = '[[parts]]\nname = "{0}"\npath = "{0}.jsonl"\nformat = "prompt"\n'


@pytest.fixture
def two(tmp_path):
    """A dataset of two parts, whose questions differ in a word, and where its rows lie."""
    words = [f"word{i}" for i in range(500)]
    asked = [random.Random(i).sample(words, 14) for i in range(60)]
    for name in ("home", "abroad"):
        rows = [
            {"prompt": " ".join([*question, name]), "completion": f"{i}"} for i, question in enumerate(asked)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = tmp_path / "two.toml"
    spec.write_text("train = 30\nvalidation = 4\ntest = 6\n" + PARTS.format("home") + PARTS.format("abroad"))
    return spec, {name: str(tmp_path / f"{name}.jsonl") for name in ("home", "abroad")}


def test_an_unseen_part_is_only_tested_and_what_asks_nearly_the_same_is_not_trained_on(two):
    spec, places = two
    found = make_splits(load_spec(str(spec), {"unseen": ["abroad"]}), places)
    parts = {split: {row.part for row in rows} for split, rows in found.rows.items()}
    assert parts == {"test": {"home"}, "unseen": {"abroad"}, "validation": {"home"}, "train": {"home"}}
    assert {split: len(rows) for split, rows in found.rows.items()} == {
        "test": 6, "unseen": 6, "validation": 4, "train": 30,
    }  # fmt: skip
    asked = {split: {row.messages[0]["content"].rpartition(" ")[0] for row in rows}
             for split, rows in found.rows.items()}  # fmt: skip
    assert not asked["unseen"] & (asked["train"] | asked["validation"])
    assert found.left_out["near_duplicates"]  # it was asked there, too


def test_a_dataset_without_such_is_what_it_was(two):
    seen = load_spec(str(two[0]), {"near_duplicates": "off", "train": 10})
    assert not any("unseen" in part for part in seen["parts"])  # earlier runs are found by what they asked
    assert set(make_splits(seen, two[1]).rows) == {"test", "validation", "train"}


@pytest.mark.parametrize(
    ("named", "said"),
    [("abroda", "did you mean abroad?"), ("home, abroad", "nothing is left to train on")],
)  # fmt: skip
def test_what_cannot_be_unseen_is_told(two, named, said):
    with pytest.raises(BadRequest, match=said.replace("?", r"\?")):
        load_spec(str(two[0]), {"unseen": named})


def test_a_run_leaves_an_answer_to_each_unseen_row(run, tmp_path):  # noqa: F811
    record, folder = run("base", "data.unseen=demo")
    lines = [json.loads(line) for line in (folder / UNSEEN).read_text().splitlines()]
    assert {line["part"] for line in lines} == {"alpaca", "tulu", "ultrachat"}
    assert len(lines) == record.data.rows["unseen"] == 3 * 8
    assert not {line["id"] for line in lines} & {
        json.loads(line)["id"] for line in (folder / OUTPUTS).read_text().splitlines()
    }


@pytest.fixture
def store(tmp_path):
    """Two techniques of three seeds; on text that nobody trained on one forgets 0.2 nats a token."""
    text = {"name": "text", "title": "", "format": "text", "unseen": True}
    dataset = fabricate.DATASET | {"parts": [*fabricate.DATASET["parts"], text]}
    for method, nats in (("base", 2.0), ("lora", 2.2), ("galore", 2.0)):
        for seed in (0,) if method == "base" else (0, 1, 2):
            record = fabricate.record(method, seed, dataset=dataset)
            place = tmp_path / record.spec.folder
            place.mkdir()
            lines = [
                row | {"part": "text", "id": f"text:{i}", "nll": row["tokens"] * (nats + 0.1 * (-1) ** i)}
                for i, row in enumerate(fabricate.outputs(method, seed, 40))
            ]
            (place / UNSEEN).write_text("".join(json.dumps(line) + "\n" for line in lines))
            record.hashes["unseen_outputs"] = content_hash(place / UNSEEN)
            fabricate.keep(tmp_path, record)
    return Store(tmp_path)


def test_the_report_says_what_was_forgotten(store):
    (found,) = comparisons(store.load()[0])
    table = unseen(found, store)[-1]
    assert table.columns == ["Technique", "Perplexity", "Perplexity, change"]
    rows = {label: cells for label, *cells in table.rows}
    lines = [
        json.loads(line)
        for line in next(store.folder.glob("lora-*")).joinpath(UNSEEN).read_text().splitlines()
    ]
    nats = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    assert rows["LoRA"][0] == f"{exp(nats):.2f} ± 0.00"
    change = rows["LoRA"][1]
    assert change.startswith(f"+{100 * (exp(0.2) - 1):.1f}%") and "(+" in change  # all rows alike: no doubt
    assert rows["GaLore"][1].startswith("+0.0% (")
    assert rows["Base"][1] == ""


def test_changed_unseen_outputs_are_no_whole_run(store):
    folder = next(store.folder.glob("lora-*"))
    text = (folder / UNSEEN).read_text()
    (folder / UNSEEN).write_text(text.replace('"correct": ', '"correct": 0', 1))
    _, corrupt = store.load()
    assert len(corrupt) == 1 and UNSEEN in corrupt[0]
