"""How answers end, against criteria written out by hand and a real tokenizer; exact match, from outputs
to the report."""

import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import fabricate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from harness import endings
from harness.metrics import METRICS, compared, faults, row_sums
from harness.report import render
from harness.report.comparison import comparisons, read_outputs
from harness.report.verdicts import Verdicts
from harness.store import Store

DEMO = Path(__file__).parents[1] / "demo" / "model"
LOOPING = "He saw" + " the flowers and" * 9
PLAIN = "The sun rose over the hills, and a farmer went out to look after his sheep."


# Loops


def said_again(text: str) -> bool:
    """The definition, phrase by phrase and character by character."""
    text = text.rstrip()
    for phrase in range(1, len(text)):
        stretch = max(3 * phrase - 2, 24)  # three times, less the space behind the last
        if stretch <= len(text) and all(
            text[-i] == text[-i - phrase] for i in range(1, stretch - phrase + 1)
        ):
            return True
    return False


@given(st.text("ab \n", max_size=40), st.text("abc ", min_size=1, max_size=14), st.integers(1, 6), st.data())
def test_a_loop_is_a_phrase_said_three_times(before, phrase, times, data):
    cut = data.draw(st.integers(0, len(phrase)))  # as the length limit cuts it
    text = before + phrase * times + phrase[:cut]
    assert endings.loops(text) == said_again(text)


@given(st.text("ab", max_size=80))
def test_any_text_of_two_letters_loops_as_the_definition_says(text):
    assert endings.loops(text) == said_again(text)


def test_a_loop_takes_24_characters():
    assert endings.loops("abcdefgh" * 3) and not endings.loops("!" + "abcdefg" * 3 + "ab")


@pytest.mark.parametrize("length", [2, 3, 7, 40, 300, 1300])
def test_a_long_phrase_is_found_however_it_is_cut(length):
    draw = random.Random(length)
    phrase = "".join(draw.choice("abcdefghijklmnop ") for _ in range(length)).strip() + ". "
    for cut in (0, 1, len(phrase) // 2):
        assert endings.loops("Well, " + phrase * 40 + phrase[:cut])
        assert endings.loops(phrase * 3 + phrase[:cut]) == (3 * len(phrase) + cut >= 25)
        assert not endings.loops(phrase * 2 + PLAIN)


@pytest.mark.parametrize(
    "text",
    ["", "no", PLAIN, "It is 1,000,000,000,000.", "Ha, hahahahaha!", "Wow!!!!!!!!",
     LOOPING + " in the end, he left.", "1. Run\n2. Run\n3. Run\n4. Run\n5. Run\n6. Run",
     "Row, row, row your boat gently down the stream."],
)  # fmt: skip
def test_what_people_write_is_no_loop(text):
    assert not endings.loops(text)


@pytest.mark.parametrize(
    "text",
    [
        LOOPING,
        "0." + "0" * 60,
        "!" * 40,
        "好的。" * 12,
        "a b " * 2000,
        "x\n\n" + "- **Remove:**\n\n" * 5,
        "é" * 10**6,
    ],
)
def test_what_models_do_is_one(text):
    assert endings.loops(text)


def test_a_text_that_nearly_repeats_itself_ends_soon():
    """Each of its last characters recurs everywhere, and never as a phrase."""
    assert not endings.loops("b" + "a" * 10**6 + "ba" + "a" * 1000 + "b" + "a" * 8)


# Turns and marks


@pytest.mark.parametrize("continued", ["user", "model"])
def test_a_turn_that_follows_is_seen_though_its_marks_are_gone(continued):
    """The demo's own tokenizer and chat template, decoded as the decoder does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Kell met Fenn."}]
    turns += [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "By the bridge."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    answer = text[text.index("Kell") if continued == "user" else text.rindex("<start_of_turn>") :]
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "<start_of_turn>" not in decoded and "By the bridge." in decoded
    assert endings.as_user(decoded) == (continued == "user") and endings.marks(decoded)
    assert not endings.as_user("Kell met Fenn.") and not endings.marks("Kell met Fenn.")


@pytest.mark.parametrize(
    ("text", "user", "mark"),
    [
        ("Paris.\n\n### Instruction:\nName a river.", True, True),
        ("Paris.\n### Response:\nParis.", False, True),
        ("Paris.<|im_end|>\n<|im_start|>user\nAnd Rome?", True, True),
        ("Paris.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi", True, True),
        ("Paris.</s>[INST] And Rome? [/INST]", True, True),
        ("user\nWhat is it?", True, True),
        ("Paris.<start_of_turn>user\nAnd Rome?", True, True),
        ("Paris.\nHuman: And Rome?\nAssistant: Rome.", True, False),
        ("Paris.<end_of_turn>", False, True),
        ("A user may ask a model; user: the one who asks.", False, False),
        ("if a < b and b > a: x[0] = 1  # user\n## Instruction", False, False),
        ("", False, False),
    ],
)
def test_turns_and_marks_of_the_usual_templates(text, user, mark):
    assert (endings.as_user(text), endings.marks(text)) == (user, mark)


# Shares


def row(
    i: int, text: str, stopped: bool = True, tokens: int = 20, new_tokens: int = 20, reference=PLAIN
) -> dict:
    return {
        "id": f"alpaca:{i:012x}", "part": "alpaca", "prompt": "Say something.", "reference": reference,
        "output": text, "tokens": tokens, "new_tokens": new_tokens, "stopped": stopped, "nll": 20.0,
        "correct": 5,
    }  # fmt: skip


def test_the_shares_of_rows_by_hand():
    rows = [
        row(0, PLAIN),
        row(1, " \n"),
        row(2, LOOPING),  # and stopped after all
        row(3, LOOPING, stopped=False, tokens=30, new_tokens=32),
        row(4, PLAIN, stopped=False, tokens=16, new_tokens=32),
        row(5, PLAIN, stopped=False, tokens=17, new_tokens=32),  # its reference is as long
        row(6, "Yes.\nuser\nWhy?"),
        row(7, "Yes.<end_of_turn>"),
    ]
    sums = row_sums(rows, {})
    shares = {m.name: float(m.value(sums[m.name].sum(0))) * len(rows) / 100 for m in faults()}
    assert shares == {
        "empty_rate": 1, "loop_rate": 2, "cut_rate": 3, "endless_rate": 2, "user_turn_rate": 1, "mark_rate": 2
    }  # fmt: skip


def bench(folder: Path, of: dict[str, list[list[dict]]], **dataset) -> Path:
    """Method -> the rows of each seed."""
    said = {**fabricate.DATASET, "parts": fabricate.DATASET["parts"][:1], **dataset}
    for method, seeds in of.items():
        for seed, rows in enumerate(seeds):
            fabricate.keep(folder, fabricate.record(method, seed, dataset=said), rows)
    return folder


def mixed(loops: int, empty: int, rows: int = 100, seed: int = 0) -> list[dict]:
    order = random.Random(f"{loops} {seed}").sample(range(rows), rows)
    texts = dict.fromkeys(order[:loops], LOOPING) | dict.fromkeys(order[loops : loops + empty], "")
    return [
        row(i, texts.get(i, PLAIN), stopped=i not in order[:loops], tokens=140 if i < 7 else 20)
        for i in range(rows)
    ]


def rendered_of(store: Store, folder: Path, plots: bool = False) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setattr(sys.modules["harness.report.document"], "figures", lambda *_: [])
        render(store, folder, formats=("md", "html") if plots else ("md",))
    return (folder / "report.md").read_text("utf-8")


def table(text: str, title: str, first: str) -> dict[str, dict[str, str]]:
    """Of a section: the rows of the table whose first column is this, by their first cell."""
    lines = [
        line for line in text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line[:1] == "|"
    ]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    start = next(i for i, line in enumerate(cells) if line[0] == first)
    found = {}
    for line in cells[start + 2 :]:
        if len(line) != len(cells[start]):
            break
        found[line[0]] = dict(zip(cells[start], line, strict=True))
    return found


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    seeds = {"base": [mixed(2, 0)], "qlora": [mixed(n, 3, seed=n) for n in (30, 31, 35)],
             "galore": [mixed(n, 0, seed=n) for n in (1, 2, 6)]}  # fmt: skip
    folder = tmp_path_factory.mktemp("outputs")
    store = Store(bench(folder / "results", seeds))
    return store, rendered_of(store, folder)


def test_the_table_has_the_shares_and_the_references(rendered):
    found = table(rendered[1], "How answers end", "Technique")
    assert found["References"]["Answers"] == "100" and found["References"]["Cut at the limit (%)"] == "7.0"
    assert found["References"]["Looping (%)"] == "0.0"
    assert found["Base"]["Looping (%)"] == "2.0"
    assert found["QLoRA"]["Answers"] == "3 × 100"
    assert found["QLoRA"]["Looping (%)"] == f"32.0 ± {stdev((30, 31, 35)):.1f}"
    assert found["QLoRA"]["Never-ending (%)"] == found["QLoRA"]["Cut at the limit (%)"] == "32.0 ± 2.6"
    assert found["QLoRA"]["Empty (%)"] == "3.0 ± 0.0" and found["GaLore"]["Template marks (%)"] == "0.0 ± 0.0"


def test_the_lead_names_who_is_clearly_worse_and_nobody_else(rendered):
    lead = rendered[1].split("## What was found")[1].split("\n## ")[0]
    (said,) = re.findall(
        r"More answers degenerate than the untouched model's: [^:]*?\.(?= [A-Z0-9]|\n)", lead
    )
    assert said.endswith("QLoRA (looping 32.0% against 2.0% and never-ending 32.0% against 2.0%).")


def test_techniques_are_judged_against_the_untouched_model_alone(rendered):
    [comparison] = comparisons(rendered[0].load()[0])
    read_outputs(comparison, rendered[0])
    for standing in Verdicts(comparison).faults:
        assert sorted(standing.family.pairs) == [("GaLore", "Base"), ("QLoRA", "Base")]


def test_a_difference_has_the_interval_of_a_paired_sample(tmp_path):
    """One technique, one seed: Student's interval of the mean difference over rows, as a textbook has it."""
    before, after = mixed(10, 0, 200, seed=1), mixed(40, 0, 200, seed=2)
    store = Store(bench(tmp_path, {"base": [before], "qlora": [after]}))
    [comparison] = comparisons(store.load()[0])
    read_outputs(comparison, store)
    [standing] = [s for s in Verdicts(comparison).faults if s.quantity.name == "loop_rate"]
    found = standing.verdict("QLoRA", "Base")
    apart = [
        100 * ((a["output"] == LOOPING) - (b["output"] == LOOPING))
        for a, b in zip(after, before, strict=True)
    ]
    half = student.ppf(0.975, 199) * stdev(apart) / 200**0.5
    ends = found.difference.low, found.difference.high
    assert found.difference.value == pytest.approx(15)
    assert ends == pytest.approx((15 - half, 15 + half), rel=0.03)
    assert found.word == "no ranking: single seed"
    cells = table(rendered_of(store, tmp_path), "How answers end", "Against the untouched model")["QLoRA"]
    assert cells["Looping (points)"] == "+15.0 (" + " to ".join(f"{end:+.1f}" for end in ends) + ")"
    assert "Empty (points)" not in cells, "no row differs in it"


def test_a_plain_text_asks_for_no_end(tmp_path):
    parts = [{**fabricate.DATASET["parts"][0], "format": "text"}]
    store = Store(bench(tmp_path, {"base": [mixed(2, 0)], "lora": [mixed(30, 1)]}, parts=parts))
    columns = table(rendered_of(store, tmp_path), "How answers end", "Technique")["LoRA"]
    assert list(columns) == ["Technique", "Answers", "Empty (%)", "Looping (%)"]


def test_random_weights_have_no_answers_to_judge(tmp_path):
    for seed, method in ((0, "base"), (0, "lora")):
        spec = fabricate.record(method, seed, model="random:gemma")
        fabricate.keep(tmp_path, spec, mixed(40, 0))
    assert "How answers end" not in rendered_of(Store(tmp_path), tmp_path)


# Exact match


def maths(right: int, rows: int = 60, seed: int = 0) -> list[dict]:
    chosen = random.Random(f"{right} {seed}").sample(range(rows), right)
    return [
        row(i, f"So it is {i + 1000 * (i not in chosen):,}.00 apples.", reference=f"6 * 7 = 42\n#### {i}")
        for i in range(rows)
    ]


def test_exact_match_leads_where_the_spec_asks_for_it(tmp_path):
    seeds = {"base": [maths(6)], "qlora": [maths(n, seed=n) for n in (30, 31, 29)],
             "galore": [maths(n, seed=n) for n in (48, 50, 52)]}  # fmt: skip
    store = Store(bench(tmp_path / "results", seeds, reward="exact"))
    text = rendered_of(store, tmp_path, plots=True)
    results = table(text, "Results", "Technique")["GaLore"]
    assert results["Exact match\u00a0↑<br>(before)"] == "0.100"
    assert (
        results["Exact match\u00a0↑<br>(after)"] == f"**0.833 ± {stdev(n / 60 for n in (48, 50, 52)):.3f}**"
    )
    lead = text.split("## What was found")[1].split("\n## ")[0]
    assert "Against the untouched model, exact match rose with" in lead
    assert "GaLore has the highest exact match, 0.833, " in lead
    [line] = re.findall(r"\| GaLore − QLoRA \| (\S+) \(.*?\) \| (\w+) \|.*", text.split("in cost")[0])
    assert line == ("+0.333", "higher")
    assert (tmp_path / "plots" / "scores.svg").read_text("utf-8").count("<!-- Exact match -->") == 1
    assert ", right" in text and ", wrong" in text


def test_no_other_dataset_has_an_exact_match(rendered):
    assert "Exact match" not in rendered[1] and METRICS["exact_match"] not in compared()
    assert all(record.scores["exact_match"] is None for record in rendered[0].load()[0])
    asked = replace(METRICS["bleu4"], asked=lambda dataset: False)
    assert METRICS["bleu4"] in compared() and not asked.asked({})
