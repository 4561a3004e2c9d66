"""Splits that share nothing: planted leaks are found, counted and removed, and the sample stays full."""

import json
import random
import re
import textwrap
import time
from dataclasses import asdict
from itertools import chain, product
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub import errors as hub
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import splits
from harness.data.duplicates import Asked, Seen
from harness.data.formats import Conversation, said
from harness.data.leaks import Held
from harness.data.spec import DatasetSpec, PartSpec, dataset_names, load_spec, own_rows
from harness.data.splits import make_splits
from harness.errors import BadRequest, Problems
from harness.plan import find_sources

DATASET, PART = asdict(DatasetSpec()), asdict(PartSpec())

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


@pytest.mark.fault(26)
@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("format", ["instruction", "text"])
def test_planted_leaks_are_found_counted_and_removed(leak, format, tmp_path):
    texts = sentences(100)
    made = row if format == "instruction" else (lambda text, answer="": {"text": text})
    spec = asked(parts=[{"format": format}])
    clean = make_splits(spec, {"tiny": written(tmp_path, map(made, texts))})
    content = lambda c: said(c.messages[0])  # noqa: E731
    held = [content(c) for split in ("test", "validation") for c in clean.rows[split]]
    # Leaks of what is held out, a few times as many as a training set could do without.
    rows = [made(text) for text in texts] + [made(leak(text), "another answer") for text in held]
    found = make_splits(spec, {"tiny": written(tmp_path, rows)})
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
    found = make_splits(asked(train=30), {"tiny": written(tmp_path, rows)})
    held = prompts(found.rows["test"] + found.rows["validation"])
    drawn = prompts(found.rows["train"])
    twins = {text: {text, reordered(text)} for text in texts[:30]}
    leaks = sum(len(twin & set(held)) == 1 for twin in twins.values())
    assert 0 < found.left_out["near_duplicates"] <= leaks
    assert not [twin for twin in twins.values() if twin & set(held) and twin & set(drawn)]


def test_a_test_row_is_the_same_with_and_without_its_leaks(tmp_path):
    texts = sentences(200)
    clean = make_splits(asked(), {"tiny": written(tmp_path, map(row, texts))})
    leaks = [row(f"please {text}") for text in prompts(clean.rows["test"])]
    again = make_splits(asked(), {"tiny": written(tmp_path, [*map(row, texts), *leaks])})
    assert set(prompts(again.rows["test"])) <= set(prompts(clean.rows["test"])) | {
        r["instruction"] for r in leaks
    }


def test_another_number_is_another_question(tmp_path):
    text = "how many apples are left of {} apples if seven of them were eaten by the tall man"
    found = make_splits(asked(), {"tiny": written(tmp_path, [row(text.format(i)) for i in range(65)])})
    assert found.left_out == {}


def test_a_conversation_that_leads_through_a_held_out_prompt_is_a_leak(tmp_path):
    texts = sentences(60)

    short = [turns(text, "yes") for text in texts]
    long = [turns(text, "no", more, "well") for text, more in zip(texts, sentences(60, 1, 30), strict=True)]
    spec = asked(train=20, validation=0, test=30, parts=[{"format": "messages"}])
    found = make_splits(spec, {"tiny": written(tmp_path, short + long)})
    tested = {c.messages[0]["content"] for c in found.rows["test"] if len(c.messages) == 2}
    trained = {c.messages[0]["content"] for c in found.rows["train"] if len(c.messages) == 4}
    assert tested and trained and not tested & trained
    assert found.left_out["shared_turns"] > 0


def test_a_long_system_turn_does_not_make_rows_alike(tmp_path):
    system = " ".join(sentences(20))
    rows = [turns(text, "yes", system=system) for text in sentences(65)]
    found = make_splits(asked(parts=[{"format": "messages"}]), {"tiny": written(tmp_path, rows)})
    assert found.left_out["near_duplicates"] == 0


# Leaks within conversations


def turns(*said: str, system: str = "") -> dict:
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": "system", "content": system}] * bool(system)
    return {"messages": messages + [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]}


def asks(conversation) -> set[str]:
    return {said(m) for m in conversation.messages if m["role"] == "user"}


PLACES = {  # a held-out question and its answer, two other questions with theirs -> a row to learn
    "after a system turn": lambda asked, one, other: turns(*asked, system="You are a pirate."),
    "opening": lambda asked, one, other: turns(*asked, *one, *other),
    "in the middle": lambda asked, one, other: turns(*one, *asked, *other),
    "last of several": lambda asked, one, other: turns(*one, *other, *asked),
    "last of several, after a system turn": lambda asked, one, other: turns(*one, *asked, system="Be kind."),
    "in capitals": lambda asked, one, other: turns(*one, asked[0].upper() + "!", asked[1]),
}


@pytest.mark.parametrize("answer", ["the same", "another"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_held_out_question_stands_nowhere_in_training(place, answer, tmp_path):
    draw = random.Random(0)
    texts = [" ".join(t.split()[: draw.randint(4, 30)]) for t in sentences(100, length=30)]
    answers = dict(zip(texts, sentences(100, seed=1), strict=True))
    others = zip(sentences(200, seed=2), sentences(200, seed=3), strict=True)
    spec = asked(parts=[{"format": "messages"}])
    rows = [turns(*pair) for pair in answers.items()]
    clean = make_splits(spec, {"tiny": written(tmp_path, rows)})
    held = {q for split in ("test", "validation") for c in clean.rows[split] for q in asks(c)}
    for text in held:
        said = answers[text] if answer == "the same" else "nobody knows"
        rows.append(place((text, said), next(others), next(others)))
    found = make_splits(spec, {"tiny": written(tmp_path, rows)})
    assert {split: len(drawn) for split, drawn in found.rows.items()} == {s: spec[s] for s in found.rows}
    held = (c for split in ("test", "validation") for c in found.rows[split] if len(asks(c)) == 1)
    held = {q.casefold().strip("!") for c in held for q in asks(c)}
    assert not [c for c in found.rows["train"] if held & {q.casefold().strip("!") for q in asks(c)}]
    assert found.left_out["shared_turns"] + found.left_out["shared_questions"] > 0


def test_a_short_question_with_its_long_answer_is_a_leak(tmp_path):
    answers = sentences(100, seed=1)
    rows = [turns(q, "well", "and why so?", why) for q, why in zip(sentences(100), answers, strict=True)]
    spec = asked(train=30, validation=0, test=20, parts=[{"format": "messages"}])
    clean = make_splits(spec, {"tiny": written(tmp_path, rows)})
    held = [c.messages[-1]["content"] for c in clean.rows["test"]]
    leaks = [turns(q, "well", "and why so?", why) for q, why in zip(sentences(20, seed=5), held, strict=True)]
    found = make_splits({**spec, "train": 85}, {"tiny": written(tmp_path, rows + leaks)})
    held = {c.messages[-1]["content"] for c in found.rows["test"]}
    assert not [c for c in found.rows["train"] if held & {m["content"] for m in c.messages}]
    assert found.left_out["shared_questions"] > 5


def test_greetings_and_thanks_are_no_leak(tmp_path):
    greeted = ("Hi", "Hello, how can I help you today? Ask me whatever you would like to know.")
    thanked = ("Thanks a lot!", "You're welcome! Is there anything else that I can do for you today?")
    rows = [turns(*greeted, text, text[::-1], "Yes, that sounds good.", "Fine.") for text in sentences(60)]
    rows += [turns(text, text[::-1], *thanked) for text in sentences(60, seed=1)]
    found = make_splits(asked(train=95, parts=[{"format": "messages"}]), {"tiny": written(tmp_path, rows)})
    assert found.left_out == {}


def test_a_form_that_many_rows_ask_is_no_leak(tmp_path):
    for ask in ("Please answer the question that stands above, as well as you can.", "Begin now."):
        rows = [turns(ask, text[::-1], system=text) for text in sentences(65)]
        found = make_splits(asked(parts=[{"format": "messages"}]), {"tiny": written(tmp_path, rows)})
        assert found.left_out == {}


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("ways", [2, 12, 40])
def test_no_number_of_answers_makes_a_form_of_a_held_out_question(ways, system, tmp_path):
    texts, others = sentences(10, length=25), sentences(400, seed=1, length=25)
    told = [(text, f"{i} {text[::-1]}", f"Be {WORDS[i]}.") for text in texts for i in range(ways)]
    leaks = [turns(text, answer, system=persona) for text, answer, persona in told]
    leaks += [turns(other, "yes", text, f"{text[::-1]} {other}") for text in texts for other in others[:ways]]
    written(tmp_path, [turns(text, "yes", system=system) for text in texts], "test.jsonl")
    written(tmp_path, leaks + [turns(text, "no") for text in others], "train.jsonl")
    spec = asked(train=400, validation=0, test=10, near_duplicates=0.0, parts=[{"format": "messages"}])
    found = make_splits(spec, {"tiny": str(tmp_path)})
    assert not [c for c in found.rows["train"] if set(texts) & asks(c)]


def test_a_line_of_a_held_out_text_stands_in_no_longer_one(tmp_path):
    lines = sentences(60, length=30)
    more = sentences(180, seed=1, length=30)
    whole = ["\n".join([*more[3 * i : 3 * i + 3], line]) for i, line in enumerate(lines)]
    folder = tmp_path / "rows"
    written(folder, [{"text": line} for line in lines[:30]], "test.jsonl")
    written(folder, [{"text": text} for text in whole], "train.jsonl")
    spec = asked(train=20, validation=0, test=30, parts=[{"format": "text"}])
    found = make_splits(spec, {"tiny": str(folder)})
    assert not [c for c in found.rows["train"] if set(lines[:30]) & {*c.messages[0]["content"].splitlines()}]
    assert found.left_out["shared_passages"] > 5


INSIDE = {  # a held-out text, one before it and one after -> a text to learn
    "wrapped": lambda text, one, other: textwrap.fill(f"{one} {text} {other}", 72),
    "code": lambda text, one, other: f"{one}\n" + text.replace("bar ", "bar\n    ") + f"\n{other}",
    "one line": lambda text, one, other: f"{one} {text} {other}",
}


@pytest.mark.parametrize("copies", [1, 12])
@pytest.mark.parametrize("place", INSIDE.values(), ids=INSIDE)
def test_a_held_out_text_stands_whole_in_no_longer_one(place, copies, tmp_path):
    texts, more = sentences(30, length=30), iter(sentences(1000, seed=1, length=30))
    longer = [place(text, next(more), next(more)) for text in texts for _ in range(copies)]
    written(tmp_path, [{"text": text} for text in texts], "test.jsonl")
    written(tmp_path, [{"text": text} for text in longer + list(more)[-200:]], "train.jsonl")
    spec = asked(train=200, validation=0, test=30, parts=[{"format": "text"}])
    found = make_splits(spec, {"tiny": str(tmp_path)})
    learned = [" ".join(c.messages[0]["content"].split()) for c in found.rows["train"]]
    assert not [text for text in texts if any(text in one for one in learned)]


QUOTED = {  # a question and its answer -> a text that holds them
    "both": lambda asks, answers, other: f"{other}\n\nQ: {asks}\n\nA: {answers}\n\n{other[::-1]}",
    "the question": lambda asks, answers, other: f"{other} {asks.upper()}, {other[::-1]}",
    "the answer": lambda asks, answers, other: f"{other}: “{answers}” {other[::-1]}",
    "the borders": lambda asks, answers, other: f"{other} {asks[-40:]} {answers[:48]} {other[::-1]}",
}


@pytest.mark.parametrize("copies", [1, 12])
@pytest.mark.parametrize("held", ["text", "instruction"])
@pytest.mark.parametrize("quoted", QUOTED)
def test_a_text_and_a_conversation_do_not_leak_into_each_other(quoted, held, copies):
    """However often; but what many conversations begin with leaks nothing."""
    pairs = list(zip(sentences(4, length=24), sentences(4, seed=1, length=24), strict=True))
    others = iter(sentences(150, seed=2, length=24))

    def text(said: str) -> Conversation:
        return Conversation("", "", [{"role": "assistant", "content": said}])

    def conversation(asks: str, answers: str) -> Conversation:
        return Conversation("", "", turns(asks, answers)["messages"])

    texts = [[text(QUOTED[quoted](*pair, next(others))) for _ in range(copies)] for pair in pairs]
    asked = [[conversation(*pair) for _ in range(copies)] for pair in pairs]
    rows, learned = (texts, asked) if held == "text" else (asked, texts)
    free = [text(next(others)) for _ in range(30)]
    free += [conversation(f"{next(others)} {asks}", next(others)) for asks, _ in pairs if held != "text"]
    form = next(others)
    free += [conversation(f"{form} {next(others)}", next(others)) for _ in range(12)]
    free += [text(f"{form} {next(others)}")]
    later = [*chain(*learned), *free]
    held_out = [own[0] for own in rows] + [conversation(f"{form} {next(others)}", next(others))]
    leaks = Held(held_out, later, 0.0).leaks(later)
    assert leaks == ["shared_passages"] * (4 * copies) + [None] * len(free)


# Nearness


@pytest.mark.parametrize("shape", ["instruction", "question below", "a wrapper in two halves"])
def test_what_many_rows_share_does_not_make_them_near(shape, tmp_path):
    shared, texts = sentences(1, seed=9, length=98)[0], sentences(1200, length=8)
    halves = shared[: len(shared) // 2], shared[len(shared) // 2 :]
    form = {"instruction": "{0} {1} {2}", "question below": "{2} {0} {1}",
            "a wrapper in two halves": "{0} {2} {1}"}[shape]  # fmt: skip
    rows = [row(form.format(*halves, text), ("yes", "no")[i % 2]) for i, text in enumerate(texts)]
    near = [row(form.format(*halves, reordered(text, 1)), "yes") for text in texts]
    spec = asked(train=800, validation=50, test=300)
    found = make_splits(spec, {"tiny": written(tmp_path, rows)})
    assert found.left_out == {}
    held = {c.messages[0]["content"] for split in ("test", "validation") for c in found.rows[split]}
    place = {text: i for i, text in enumerate(form.format(*halves, t) for t in texts)}
    leaks = [near[place[text]] for text in held]
    found = make_splits(spec, {"tiny": written(tmp_path, rows + leaks)})
    words = {split: {frozenset(bag(c.messages[0]["content"]).items()) for c in found.rows[split]}
             for split in found.rows}  # fmt: skip
    assert not words["train"] & (words["test"] | words["validation"])
    assert found.left_out["near_duplicates"] > 100


@pytest.mark.parametrize("copies", [10, 12, 20, 40])
def test_many_near_duplicates_are_no_form(copies, tmp_path):
    def changed(words):
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        return row(" ".join(words))

    draw, texts = random.Random(0), sentences(60, length=20)
    copied = [changed(text.split()) for text in texts for _ in range(copies)]
    others = [row(text) for text in sentences(900, seed=1, length=20)]
    written(tmp_path, map(row, texts), "test.jsonl")
    written(tmp_path, copied + others, "train.jsonl")
    found = make_splits(asked(train=800, validation=0, test=60), {"tiny": str(tmp_path)})
    held, learned = (prompts(found.rows[split]) for split in ("test", "train"))
    assert not [one for one in learned for other in held if jaccard(one, other) >= THRESHOLD]


def test_rows_under_one_instruction_cost_no_more_than_others(tmp_path):
    shared = sentences(1, seed=9, length=98)[0]
    rows = [{**row(shared), "input": text} for text in sentences(3500)]
    source = {"tiny": written(tmp_path, rows)}
    started = time.process_time()
    make_splits(asked(train=3000, validation=0, test=500), source)
    assert time.process_time() - started < 10  # 0.6 seconds; a minute, where each was held against all


def test_a_word_that_makes_another_question_makes_no_leak():
    ask, other = "Can you write a sentence about the topic {}, please, for my sister?", "The skier falls."
    seen = Seen([Asked(ask.format("bouquets"), "A bouquet of yellow flowers.")])
    assert seen.like([Asked(ask.format("slopes"), other)]) == [False]
    assert seen.like([Asked(ask.format("bunches"), "a bouquet of yellow flowers")]) == [True]
    assert seen.like([Asked(ask.format("bouquets") + " Now!", other)]) == [True]  # nothing else is asked


SPACELESS = {
    "Chinese": (
        "请介绍一下人工智能在医疗领域的主要应用以及未来的发展方向。",
        "中国古代四大发明对世界文明的影响有哪些？",
        "如何在北京的春天里种植番茄和黄瓜才能获得好收成？",
    ),
    "Japanese": (
        "日本の伝統的な祭りについて、その歴史と意味を説明してください。",
        "東京から京都まで新幹線で行く方法と料金を教えて。",
        "健康的な朝食の作り方を三つ紹介してください。",
    ),
    "Thai": (
        "ช่วยอธิบายประวัติศาสตร์ของกรุงเทพมหานครให้เข้าใจง่ายๆ",
        "วิธีทำต้มยำกุ้งให้อร่อยเหมือนร้านอาหารต้องทำอย่างไร",
        "เขียนจดหมายขอบคุณคุณครูที่ช่วยสอนหนังสือให้ฉันตลอดปี",
    ),
}
EDITS = {
    "no punctuation": lambda text: text.strip("。？").replace("、", "").replace("，", ""),
    "narrow punctuation": lambda text: text.replace("。", ".").replace("？", "?").replace("、", ","),
    "spaces": lambda text: f"{text[:9]} {text[9:]}",
    "a letter more": lambda text: text[:5] + text[5] + text[5:],
    "a letter less": lambda text: text[:7] + text[8:],
    "another letter": lambda text: text[:-4] + text[0] + text[-3:],
    "halves turned": lambda text: text[len(text) // 2 :] + text[: len(text) // 2],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("language", SPACELESS)
def test_text_without_spaces_has_near_duplicates(language, edit):
    for text in SPACELESS[language]:
        seen = Seen([Asked(text, "是")])
        others = [Asked(other, "是") for other in SPACELESS[language] if other != text]
        assert seen.like([Asked(edit(text), "是"), *others]) == [True, False, False]


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
    first = make_splits(asked(train=train), {"tiny": written(folder, rows)})
    order.shuffle(rows)
    again = make_splits(asked(train=train), {"tiny": written(folder, rows)})
    assert (again.rows, again.left_out) == (first.rows, first.left_out)


def test_memory_is_bounded_and_nothing_else_changes(tmp_path):
    texts = sentences(600)
    rows = (
        [row(t) for t in texts] + [row(t.upper(), "no") for t in texts[:300]] + [row("x " + t) for t in texts]
    )
    few = asked(train=10, validation=2, test=5)
    source = {"tiny": written(tmp_path, rows)}
    bounded, whole = make_splits(few, source), make_splits(few, source, room=1000)
    assert (bounded.rows, bounded.left_out) == (whole.rows, whole.left_out)


def test_a_bound_that_near_duplicates_use_up_is_raised(tmp_path):
    one = sentences(1, length=20)[0]
    rows = [row(reordered(one, seed)) for seed in range(1600)]  # all near each other
    rows += [row(text) for text in sentences(40, seed=3)]
    found = make_splits(asked(train=15, validation=0, test=1), {"tiny": written(tmp_path, rows)})
    assert len(found.rows["train"]) == 15
    assert found.left_out["near_duplicates"] > 100


@pytest.mark.parametrize(("asked_for", "kept"), [
    ("off", 0.0), ("Off", 0.0), (False, 0.0), (0, 0.0), (0.9, 0.9), (1, 1.0),
])  # fmt: skip
def test_nearness_can_be_set_and_switched_off(asked_for, kept, tmp_path):
    texts = sentences(60)
    rows = [*map(row, texts), *(row(reordered(text)) for text in texts)]
    source = {"tiny": written(tmp_path, rows)}
    sizes = {"train": 60, "validation": 0, "test": 25}
    spec = load_spec(source["tiny"], {"near_duplicates": asked_for, **sizes})
    assert spec["near_duplicates"] == kept
    found = make_splits(spec, {spec["parts"][0]["name"]: source["tiny"]})
    assert bool(found.left_out["near_duplicates"]) == bool(kept)


@pytest.mark.parametrize("wrong", [0.3, 1.5, -0.8, float("nan"), True, "on", [0.8]])
def test_another_nearness_is_refused(wrong, tmp_path):
    with pytest.raises(BadRequest, match=r"data\.near_duplicates: must be off"):
        load_spec(written(tmp_path, [row("a")]), {"near_duplicates": wrong})


def test_the_remedies_of_an_error_are_remedies(tmp_path):
    texts = sentences(60)
    source = {"tiny": written(tmp_path, [row(text) for t in texts for text in (t, reordered(t))])}
    spec = asked(train=90, validation=0, test=20)
    with pytest.raises(BadRequest) as caught:
        make_splits(spec, source)
    text = str(caught.value)
    fewer = int(re.search(r"--set data\.train=(\d+)", text)[1])
    assert "near_duplicates=off" in text and "duplicates" in text
    assert len(make_splits({**spec, "train": fewer}, source).rows["train"]) == fewer
    assert len(make_splits({**spec, "near_duplicates": 0.0}, source).rows["train"]) == 90


@pytest.mark.parametrize("sizes", [(40, 5, 60), (40, 0, 64), (1, 0, 60), (8, 9, 50), (900, 9, 90)])
def test_the_numbers_that_an_error_names_do_for_all_splits(sizes, tmp_path):
    source = {"tiny": written(tmp_path, map(row, sentences(60)))}
    spec = asked(*sizes)
    with pytest.raises(BadRequest) as caught:
        make_splits(spec, source)
    found = {key: int(n) for key, n in re.findall(r"data\.(\w+)=(\d+)", str(caught.value))}
    assert found and all(0 < n <= spec[key] for key, n in found.items())
    assert sum(map(len, make_splits({**spec, **found}, source).rows.values())) == 60


def test_a_part_that_is_a_copy_of_another_is_told_so(tmp_path):
    path = written(tmp_path, map(row, sentences(70)))
    with pytest.raises(BadRequest, match=r"part two: .*70 duplicates \(70 of them of part one\)"):
        make_splits(asked(parts=[{"name": "one"}, {"name": "two"}]), {"one": path, "two": path})


def test_a_part_is_blamed_for_its_own_rows_alone(tmp_path):
    good, bad = [row(t) for t in sentences(70)], [row("the same")] * 30 + [row(t) for t in sentences(9, 1)]
    spec = asked(parts=[{"name": "good"}, {"name": "bad"}])
    with pytest.raises(BadRequest, match=r"part bad: .* 10 distinct .* 29 duplicates"):
        make_splits(
            spec, {"good": written(tmp_path, good, "1.jsonl"), "bad": written(tmp_path, bad, "2.jsonl")}
        )
    with pytest.raises(BadRequest) as caught:
        make_splits({**spec, "test": 70}, {"good": written(tmp_path, bad * 2 + good, "1.jsonl"),
                                      "bad": written(tmp_path, [row("b")], "2.jsonl")})  # fmt: skip
    assert "39 duplicates" not in str(caught.value).partition("part bad")[2]


# Preference pairs


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_pairs_are_the_same_only_if_all_of_them_is(tmp_path):
    rows = [pair(text, f"good {i}", f"bad {i}") for text in sentences(40) for i in range(3)]
    again = [pair(text.upper(), "good 0", "bad 0") for text in sentences(40)[:7]]
    spec = asked(train=70, validation=5, test=20, parts=[{"format": "pairs"}])
    found = make_splits(spec, {"tiny": written(tmp_path, rows + again)})
    assert found.left_out["duplicates"] == 7
    assert {split: len(drawn) for split, drawn in found.rows.items()} == {s: spec[s] for s in found.rows}
    assert len({c.id for drawn in found.rows.values() for c in drawn}) == 95
    texts = {split: set(prompts(drawn)) for split, drawn in found.rows.items()}
    assert not texts["test"] & texts["train"] and not texts["validation"] & (texts["test"] | texts["train"])
    assert len(texts["test"]) <= 8  # the pairs of a prompt stand together
    assert found.left_out["shared_turns"] <= 4  # of the prompts at two borders


def test_pairs_differ_where_an_answer_does_in_a_space_or_a_sign(tmp_path):
    better = ("if a:\n    b", "if a:\n  b", "Yes", "yes", "yes!")
    answers = [(text, "if a:\nb") for text in better]
    rows = [pair(text, *answer) for text in sentences(20) for answer in answers]
    spec = asked(train=60, validation=0, test=20, parts=[{"format": "pairs"}])
    assert "duplicates" not in make_splits(spec, {"tiny": written(tmp_path, rows)}).left_out


# Sources with splits of their own


@pytest.mark.parametrize("names", [("train", "test"), ("train-00000-of-00002", "test-00000-of-00001")])
@pytest.mark.parametrize("config", ["", "main"])
def test_a_source_with_its_own_test_split_is_tested_on_that(names, config, tmp_path):
    train, test = sentences(60), sentences(30, seed=1)
    for name, texts in zip(names, (train + test[:10], test), strict=True):
        written(tmp_path / config, map(row, texts), f"{name}.jsonl")
    written(tmp_path / "other", map(row, sentences(5, seed=2)), "other-00000-of-00001.jsonl")
    part = {"config": config, "test_split": "test"}
    found = make_splits(asked(train=50, parts=[part]), {"tiny": str(tmp_path)})
    assert set(prompts(found.rows["test"])) <= set(test)
    assert set(prompts(found.rows["train"] + found.rows["validation"])) <= set(train)
    assert found.left_out["duplicates"] == 10  # out of training: a test row stays


FILES = {  # the files of a folder -> of each of our splits the one that it comes from
    "no validation": (("train", "test"), "train train test"),
    "no test": (("train", "validation"), "train validation train"),
    "all": (("train", "validation", "test"), "train validation test"),
    "as the hub names them": (
        ("data/train-00000-of-00001", "data/test-00000-of-00001"),
        "data/train-00000-of-00001 data/train-00000-of-00001 data/test-00000-of-00001",
    ),
    "other names": (("training", "dev", "Eval"), "training dev Eval"),
    "folders": (("train/rows", "test/rows"), "train/rows train/rows test/rows"),
    "the rest": (("rows", "test"), "rows rows test"),
    "a file more": (("train", "test", "notes"), "train train test"),
}


@pytest.mark.parametrize(("files", "expected"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("said", [{}, {"test_split": "test", "validation_split": "validation"}])
def test_what_a_folder_holds_out_is_held_out(files, expected, said, tmp_path):
    texts = {name: sentences(70, seed) for seed, name in enumerate(files)}
    for name, some in texts.items():
        written(tmp_path, map(row, some), f"{name}.jsonl")
    found = make_splits(asked(parts=[said]), {"tiny": str(tmp_path)})
    for split, name in zip(("train", "validation", "test"), expected.split(), strict=True):
        assert set(prompts(found.rows[split])) <= set(texts[name])
    assert len(set(found.origins["tiny"].values())) == len(set(expected.split()))


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_what_save_to_disk_holds_out_is_held_out(missing, tmp_path):
    texts = {name: sentences(70, seed) for seed, name in enumerate(("train", "validation", "test"))}
    made = {name: datasets.Dataset.from_list([row(t) for t in some]) for name, some in texts.items()}
    del made[missing]
    datasets.DatasetDict(made).save_to_disk(tmp_path / "dict")
    found = make_splits(asked(), {"tiny": str(tmp_path / "dict")})
    for split in texts:
        assert set(prompts(found.rows[split])) <= set(texts["train" if split == missing else split])


@pytest.mark.parametrize("key", ["split", "test_split", "validation_split"])
def test_a_split_that_ones_own_rows_lack_is_an_error(key, tmp_path):
    for seed, name in enumerate(("training", "test")):
        written(tmp_path, map(row, sentences(70, seed)), f"{name}.jsonl")
    for path in (tmp_path, tmp_path / "test.jsonl"):
        with pytest.raises(BadRequest, match=r"part tiny: .*no split 'nope'. There are: (te|no)"):
            make_splits(asked(parts=[{"path": path.name, key: "nope"}]), {"tiny": str(path)})


def test_a_folder_is_a_dataset_of_its_own(tmp_path, monkeypatch):
    train, test = sentences(60), sentences(25, seed=1)
    written(tmp_path / "mine", map(row, train), "train.jsonl")
    written(tmp_path / "mine", map(row, test), "test.jsonl")
    written(tmp_path / "demo", map(row, test), "train.jsonl")
    monkeypatch.chdir(tmp_path / "mine")
    for name in ("../mine", ".", str(tmp_path / "mine"), "../mine/"):
        spec = load_spec(name, {"train": 50, "validation": 5, "test": 20})
        (place,) = find_sources([], name, spec, Problems()).values()
        found = make_splits(spec, {"mine": place})
        assert set(prompts(found.rows["test"])) <= set(test)
        assert set(prompts(found.rows["train"])) <= set(train)
    monkeypatch.chdir(tmp_path)
    assert own_rows("demo") is None and own_rows("./demo")  # a spec's name is the spec's


def test_too_small_a_test_file_is_named(tmp_path):
    written(tmp_path, map(row, sentences(60)), "train.jsonl")
    written(tmp_path, map(row, sentences(12, seed=1)), "test.jsonl")
    with pytest.raises(BadRequest, match=r"its split 'test' has 12 .*--set data\.test=12$"):
        make_splits(asked(), {"tiny": str(tmp_path)})
    assert make_splits(asked(test=12), {"tiny": str(tmp_path)}).rows["test"]


def test_a_copy_without_the_splits_of_the_spec_is_one_source(tmp_path):
    path = written(tmp_path, map(row, sentences(65)), "test.jsonl")
    for location in (path, str(tmp_path)):
        found = make_splits(
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
    found = make_splits(asked(parts=[{"test_split": "test"}]), {"tiny": str(tmp_path / "dict")})
    assert set(prompts(found.rows["test"])) <= set(test)
    assert set(prompts(found.rows["train"])) <= set(train)
    made["train"].select(range(50)).save_to_disk(tmp_path / "one")  # with indices of its own
    found = make_splits(asked(train=30, validation=0), {"tiny": str(tmp_path / "one")})
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
    splits.from_hub.cache_clear()
    yield SimpleNamespace(commit=commit, calls=calls)
    splits.from_hub.cache_clear()


def test_the_commit_that_was_read_is_told(on_the_hub):
    part = {"hub": "someone/rows", "config": "main"}
    found = make_splits(asked(parts=[part]), {})
    assert found.revisions == {"tiny": on_the_hub.commit}
    assert on_the_hub.calls == [("someone/rows", "main", "train", None)]
    assert splits.hub_identity({**PART, **part})[0][0] == on_the_hub.commit


def test_what_the_hub_holds_out_is_held_out(monkeypatch):
    texts = {"train": sentences(60), "test": sentences(25, seed=1)}

    def load_dataset(name, config, split, revision):
        found = datasets.Dataset.from_list([row(t) for t in texts[split]])
        found.info.splits = datasets.SplitDict.from_split_dict([{"name": name} for name in texts])
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits.from_hub.cache_clear()
    found = make_splits(asked(parts=[{"hub": "someone/rows"}]), {})
    splits.from_hub.cache_clear()
    assert found.origins == {"tiny": {"test": "test", "validation": "train", "train": "train"}}
    assert set(prompts(found.rows["test"])) <= set(texts["test"])


def test_a_split_that_the_hub_lacks_is_an_error_with_a_remedy(on_the_hub):
    with pytest.raises(BadRequest, match=r"someone/rows.*'test'.*Unknown split.*--source"):
        make_splits(asked(parts=[{"hub": "someone/rows", "test_split": "test"}]), {})


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
    problems = Problems()
    found = find_sources([], "tiny", asked(parts=[{"hub": "someone/rows"}]), problems)
    assert not found and said in str(problems[0]) and "--source tiny=PATH" in str(problems[0])
    (tmp_path / "someone___rows").mkdir()
    problems = Problems()
    find_sources([], "tiny", asked(parts=[{"hub": "someone/rows"}]), problems)
    assert bool(problems) == issubclass(error, hub.RepositoryNotFoundError)  # a cached copy does offline


@pytest.mark.parametrize("name", dataset_names())
def test_every_spec_says_what_it_is(name):
    for part in load_spec(name, {})["parts"]:
        assert all(part[key] for key in ("name", "title", "licence", "mapping"))
        assert bool(part["hub"]) != bool(part["path"])
        assert not part["revision"] or len(part["revision"]) == 40


NAMES = {  # the files of a folder -> those that are trained on, validated on, tested on
    "train_sft test_sft": "train_sft train_sft test_sft",
    "train_prefs-00000-of-00001 test_prefs-00000-of-00001":
        "train_prefs-00000-of-00001 train_prefs-00000-of-00001 test_prefs-00000-of-00001",
    "gsm8k_train gsm8k_test": "gsm8k_train gsm8k_train gsm8k_test",
    "mydata.train mydata.test": "mydata.train mydata.train mydata.test",
    "my-train my-test": "my-train my-train my-test",
    "train_set test_set": "train_set train_set test_set",
    "TrainSet Testset": "TrainSet TrainSet Testset",
    "train2 test2": "train2 train2 test2",
    "train(1) test(1)": "train(1) train(1) test(1)",
    "rows my-test": "rows rows my-test",
    "train holdout": "train train holdout",
    "train train-test": "train train train-test",
    "train my_val dev eval test": "train dev test",
    "train train_old test test_old": "train train test",
    "training train_old eval my_test": "training training eval",
    "test/train test/test": "test/train test/train test/test",
    "train/gsm8k_test train/rows": "train/rows train/rows train/gsm8k_test",
    "attested contest test": "attested,contest attested,contest test",
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), NAMES.items())
def test_no_test_file_is_trained_on_by_the_way_it_is_named(files, expected, tmp_path):
    texts = {name: sentences(70, seed) for seed, name in enumerate(files.split())}
    for name, some in texts.items():
        written(tmp_path, map(row, some), f"{name}.jsonl")
    found = make_splits(asked(), {"tiny": str(tmp_path)})
    for split, names in zip(("train", "validation", "test"), expected.split(), strict=True):
        from_files = {text for name in names.split(",") for text in texts[name]}
        assert set(prompts(found.rows[split])) <= from_files


def test_a_split_that_the_spec_names_is_taken_before_a_usual_one(tmp_path):
    names = ("train", "test", "train_sft", "test_sft", "train_gen", "test_gen")
    texts = {name: sentences(70, seed) for seed, name in enumerate(names)}
    for name, some in texts.items():
        written(tmp_path, map(row, some), f"{name}-00000-of-00001.jsonl")
    found = make_splits(
        asked(parts=[{"split": "train_sft", "test_split": "test_gen"}]), {"tiny": str(tmp_path)}
    )
    assert found.origins["tiny"] == {"test": "test_gen", "validation": "train_sft", "train": "train_sft"}
    assert set(prompts(found.rows["train"])) <= set(texts["train_sft"])
    assert set(prompts(found.rows["test"])) <= set(texts["test_gen"])


def test_a_file_that_may_be_held_out_is_not_mixed_with_one_that_is(tmp_path):
    written(tmp_path, map(row, sentences(70)), "train_test.jsonl")
    written(tmp_path, map(row, sentences(30, 1)), "test.jsonl")
    with pytest.raises(BadRequest, match=r"is train_test\.jsonl held out or .*Rename it"):
        make_splits(asked(), {"tiny": str(tmp_path)})
    with pytest.raises(BadRequest, match=r"is train_test\.jsonl held out or .*Rename it"):
        load_spec(str(tmp_path), {})
    found = make_splits(asked(parts=[{"split": "train_test"}]), {"tiny": str(tmp_path)})
    assert found.origins["tiny"] == {"test": "test", "validation": "train_test", "train": "train_test"}
    assert not set(prompts(found.rows["train"])) & set(sentences(30, 1))
