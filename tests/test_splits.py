"""Splits that share nothing: planted leaks are found, counted and removed, and the sample stays full."""

import json
import random
from itertools import product
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub import errors as hub
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import data, plan
from harness.data import DATASET, PART, splits
from harness.duplicates import Asked, Seen
from harness.formats import said

THRESHOLD = 0.8
WORDS = [f"{a}{b}{c}" for a, b, c in product("bdgklmnprst", "aeiou", "nrst")]  # 220, of no language


def asked(train=40, validation=5, test=20, parts=({},), **more) -> dict:
    parts = [{**PART, "name": "tiny", **part} for part in parts]
    return {**DATASET, "train": train, "validation": validation, "test": test, **more, "parts": parts}


def written(folder, rows, name="rows.jsonl") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def row(text: str, answer: str = "yes") -> dict:
    return {"instruction": text, "output": answer}


def sentences(count: int, seed: int = 0, length: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def prompts(conversations) -> list[str]:
    return [said(c.messages[-2]) for c in conversations]


def bag(text: str) -> dict:
    found = {}
    for word in text.casefold().split():
        word = word.strip(".,!?")
        found[word] = found.get(word, 0) + 1
    return found


def jaccard(one: str, other: str) -> float:
    """Of two bags of words, by counting: the oracle of what MinHash proposes."""
    one, other = bag(one), bag(other)
    least = sum(min(one.get(w, 0), other.get(w, 0)) for w in {**one, **other})
    return least / (sum(one.values()) + sum(other.values()) - least)


def reordered(text: str, seed: int = 0) -> str:
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


LEAKS = {
    "exact": lambda text: text,
    "case": str.upper,
    "spacing": lambda text: f"  {text.replace(' ', '   ')}\n",
    "punctuation": lambda text: text.replace(" ", ", ", 2) + "!",
    "reordered": reordered,
    "reordered in capitals": lambda text: reordered(text).title(),
    "a word more": lambda text: f"please {text}",
    "a word less": lambda text: text.rpartition(" ")[0],
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("format", ["instruction", "text"])
def test_planted_leaks_are_found_counted_and_removed(leak, format, tmp_path):
    texts = sentences(100)
    made = row if format == "instruction" else (lambda text, answer="": {"text": text})
    spec = asked(parts=[{"format": format}])
    clean = splits(spec, {"tiny": written(tmp_path, map(made, texts))})
    content = lambda c: said(c.messages[0])  # noqa: E731
    held = [content(c) for split in ("test", "validation") for c in clean.rows[split]]
    # Leaks of what is held out, a few times as many as a training set could do without.
    rows = [made(text) for text in texts] + [made(leak(text), "another answer") for text in held]
    found = splits(spec, {"tiny": written(tmp_path, rows)})
    assert {split: len(drawn) for split, drawn in found.rows.items()} == {s: spec[s] for s in found.rows}
    train = [content(c) for c in found.rows["train"]]
    later = [content(c) for split in ("test", "validation") for c in found.rows[split]]
    assert not [(one, other) for one in train for other in later if jaccard(one, other) >= THRESHOLD]
    if leak in (LEAKS["exact"], LEAKS["case"], LEAKS["spacing"]):
        assert found.left_out["duplicates"] == len(held)
    else:
        assert found.left_out["near_duplicates"] > 0


def test_every_leak_is_counted_where_all_rows_are_drawn(tmp_path):
    texts = sentences(65)
    near = [row(reordered(text)) for text in texts[:30]]
    rows = [row(text) for text in texts] + near
    found = splits(asked(train=30), {"tiny": written(tmp_path, rows)})
    held = prompts(found.rows["test"] + found.rows["validation"])
    drawn = prompts(found.rows["train"])
    twins = {text: {text, reordered(text)} for text in texts[:30]}
    leaks = sum(len(twin & set(held)) == 1 for twin in twins.values())
    assert 0 < found.left_out["near_duplicates"] <= leaks
    assert not [twin for twin in twins.values() if twin & set(held) and twin & set(drawn)]


def test_a_test_row_is_the_same_with_and_without_its_leaks(tmp_path):
    texts = sentences(200)
    clean = splits(asked(), {"tiny": written(tmp_path, map(row, texts))})
    leaks = [row(f"please {text}") for text in prompts(clean.rows["test"])]
    again = splits(asked(), {"tiny": written(tmp_path, [*map(row, texts), *leaks])})
    assert set(prompts(again.rows["test"])) <= set(prompts(clean.rows["test"])) | {
        r["instruction"] for r in leaks
    }


def test_another_number_is_another_question(tmp_path):
    text = "how many apples are left of {} apples if seven of them were eaten by the tall man"
    found = splits(asked(), {"tiny": written(tmp_path, [row(text.format(i)) for i in range(65)])})
    assert found.left_out == {}


def test_a_conversation_that_leads_through_a_held_out_prompt_is_a_leak(tmp_path):
    texts = sentences(60)

    def conversation(*said):
        roles = ["user", "assistant"] * 3
        return {"messages": [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]}

    short = [conversation(text, "yes") for text in texts]
    long = [
        conversation(text, "no", *more, "well")
        for text, more in zip(texts, zip(sentences(60, 1, 30)), strict=True)
    ]
    spec = asked(train=20, validation=0, test=30, parts=[{"format": "messages"}])
    found = splits(spec, {"tiny": written(tmp_path, short + long)})
    tested = {c.messages[0]["content"] for c in found.rows["test"] if len(c.messages) == 2}
    trained = {c.messages[0]["content"] for c in found.rows["train"] if len(c.messages) == 4}
    assert tested and trained and not tested & trained
    assert found.left_out["shared_turns"] > 0


def test_a_long_system_turn_does_not_make_rows_alike(tmp_path):
    system = " ".join(sentences(20))
    rows = [{"messages": [{"role": "system", "content": system}, {"role": "user", "content": text},
                          {"role": "assistant", "content": "yes"}]} for text in sentences(65)]  # fmt: skip
    found = splits(asked(parts=[{"format": "messages"}]), {"tiny": written(tmp_path, rows)})
    assert found.left_out["near_duplicates"] == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 40), changed=st.integers(0, 12))
def test_minhash_finds_what_counting_finds(seed, length, changed):
    draw = random.Random(seed)
    held = sentences(30, seed, length)
    others = []
    for text in held:
        words = text.split()
        for _ in range(min(changed, length)):
            words[draw.randrange(length)] = draw.choice(WORDS)
        draw.shuffle(words)
        others.append(" ".join(words))
    seen = Seen(list(map(Asked, held)))
    counted = [any(jaccard(a, b) >= THRESHOLD for b in held) for a in others]
    assert seen.like(list(map(Asked, others))) == counted


@settings(max_examples=25)
@given(order=st.randoms(use_true_random=False), train=st.integers(1, 60))
def test_the_order_of_the_source_does_not_matter(order, train, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    texts = sentences(100)
    rows = (
        [row(t) for t in texts]
        + [row(f"well, {t}", "no") for t in texts]
        + [row(t.upper(), "no") for t in texts]
    )
    first = splits(asked(train=train), {"tiny": written(folder, rows)})
    order.shuffle(rows)
    again = splits(asked(train=train), {"tiny": written(folder, rows)})
    assert (again.rows, again.left_out) == (first.rows, first.left_out)


def test_memory_is_bounded_and_nothing_else_changes(tmp_path):
    texts = sentences(600)
    rows = (
        [row(t) for t in texts] + [row(t.upper(), "no") for t in texts[:300]] + [row("x " + t) for t in texts]
    )
    few = asked(train=10, validation=2, test=5)
    source = {"tiny": written(tmp_path, rows)}
    bounded, whole = splits(few, source), splits(few, source, room=1000)
    assert (bounded.rows, bounded.left_out) == (whole.rows, whole.left_out)


def test_a_bound_that_near_duplicates_use_up_is_raised(tmp_path):
    one = sentences(1, length=20)[0]
    rows = [row(reordered(one, seed)) for seed in range(1600)]  # all near each other
    rows += [row(text) for text in sentences(40, seed=3)]
    found = splits(asked(train=15, validation=0, test=1), {"tiny": written(tmp_path, rows)})
    assert len(found.rows["train"]) == 15
    assert found.left_out["near_duplicates"] > 100


# Sources with splits of their own


@pytest.mark.parametrize("names", [("train", "test"), ("train-00000-of-00002", "test-00000-of-00001")])
@pytest.mark.parametrize("config", ["", "main"])
def test_a_source_with_its_own_test_split_is_tested_on_that(names, config, tmp_path):
    train, test = sentences(60), sentences(30, seed=1)
    for name, texts in zip(names, (train + test[:10], test), strict=True):
        written(tmp_path / config, map(row, texts), f"{name}.jsonl")
    written(tmp_path / "other", map(row, sentences(5, seed=2)), "other-00000-of-00001.jsonl")
    part = {"config": config, "test_split": "test"}
    found = splits(asked(train=50, parts=[part]), {"tiny": str(tmp_path)})
    assert set(prompts(found.rows["test"])) <= set(test)
    assert set(prompts(found.rows["train"] + found.rows["validation"])) <= set(train)
    assert found.left_out["duplicates"] == 10  # out of training: a test row stays


def test_a_copy_without_the_splits_of_the_spec_is_one_source(tmp_path):
    path = written(tmp_path, map(row, sentences(65)), "test.jsonl")
    for location in (path, str(tmp_path)):
        found = splits(
            asked(parts=[{"test_split": "test", "validation_split": "validation"}]), {"tiny": location}
        )
        assert sum(map(len, found.rows.values())) == 65


def test_a_folder_of_save_to_disk_is_a_source(tmp_path):
    train, test = sentences(60), sentences(25, seed=1)
    made = {
        n: datasets.Dataset.from_list([row(t) for t in texts])
        for n, texts in (("train", train), ("test", test))
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "dict")
    found = splits(asked(parts=[{"test_split": "test"}]), {"tiny": str(tmp_path / "dict")})
    assert set(prompts(found.rows["test"])) <= set(test)
    assert set(prompts(found.rows["train"])) <= set(train)
    made["train"].select(range(50)).save_to_disk(tmp_path / "one")  # with indices of its own
    found = splits(asked(train=30, validation=0), {"tiny": str(tmp_path / "one")})
    assert set(prompts(found.rows["train"] + found.rows["test"])) == set(train[:50])


# The hub


@pytest.fixture
def on_the_hub(monkeypatch, tmp_path):
    """A stand-in for load_dataset, whose files lie in a folder named by the commit, as its own do."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "someone___rows" / "main" / "0.0.0" / commit
    datasets.Dataset.from_list([row(t) for t in sentences(100)]).save_to_disk(folder)
    calls = []

    def load_dataset(name, config, split, revision):
        calls.append((name, config, split, revision))
        if split != "train":
            raise ValueError(f'Unknown split "{split}". Should be one of ["train"].')
        return datasets.load_from_disk(folder)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data.from_hub.cache_clear()
    yield SimpleNamespace(commit=commit, calls=calls)
    data.from_hub.cache_clear()


def test_the_commit_that_was_read_is_told(on_the_hub):
    part = {"hub": "someone/rows", "config": "main"}
    found = splits(asked(parts=[part]), {})
    assert found.revisions == {"tiny": on_the_hub.commit}
    assert on_the_hub.calls == [("someone/rows", "main", "train", None)]
    assert data.hub_identity({**PART, **part})[0][0] == on_the_hub.commit


def test_a_split_that_the_hub_lacks_is_an_error_with_a_remedy(on_the_hub):
    with pytest.raises(data.DataError, match=r"someone/rows.*'test'.*Unknown split.*--source"):
        splits(asked(parts=[{"hub": "someone/rows", "test_split": "test"}]), {})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub.GatedRepoError, "is gated: accept its terms at https://huggingface.co/datasets/someone/rows"),
        (hub.RepositoryNotFoundError, "is not on the hub, or is private"),
        (hub.OfflineModeIsEnabled, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_failures_of_the_hub_are_told_apart(error, said, monkeypatch, tmp_path):
    def fail(*args, **more):
        raise error.__new__(error)  # their constructors want a response

    monkeypatch.setattr(HfApi, "auth_check", fail)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    errors = []
    found = plan.find_sources([], asked(parts=[{"hub": "someone/rows"}]), errors)
    assert not found and said in errors[0] and "--source tiny=PATH" in errors[0]
    (tmp_path / "someone___rows").mkdir()
    errors = []
    plan.find_sources([], asked(parts=[{"hub": "someone/rows"}]), errors)
    assert bool(errors) == issubclass(error, hub.RepositoryNotFoundError)  # a cached copy does offline


@pytest.mark.parametrize("name", data.available())
def test_every_spec_says_what_it_is(name):
    for part in data.load_spec(name, {})["parts"]:
        assert all(part[key] for key in ("name", "title", "licence", "mapping"))
        assert bool(part["hub"]) != bool(part["path"])
        assert not part["revision"] or len(part["revision"]) == 40
