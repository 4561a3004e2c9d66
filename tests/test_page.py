"""The HTML report: what its data may hold, its files, and the page driven in a browser without a network."""

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import fabricate
import pytest

from harness.report import Budget, missing, page, render
from harness.report.blocks import Heading
from harness.report.budget import need
from harness.report.comparison import comparisons
from harness.report.decision import Choice
from harness.report.distinctions import distinctions
from harness.report.embedded import embedded
from harness.report.prompts import asked
from harness.report.verdicts import judged
from harness.spec import Hyperparams
from harness.store import Store

pytestmark = pytest.mark.usefixtures("undrawn")

METHODS = ("qlora", "galore", "lora", "dora", "full")
HOSTILE = "</script><script>window.hit = 1</script><!-- <img src=x onerror='window.hit = 1'> \u2028\u202e\x1b"
GEMMA = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Five techniques and the untouched model on 90 rows, whose prompts have marks. One row is hostile."""
    folder, dataset = tmp_path_factory.mktemp("page"), fabricate.DATASET | {"notice": "It is made up."}
    for method, seeds in {"base": 1, **dict.fromkeys(METHODS, 3)}.items():
        for seed in range(seeds):
            rows = [row | {"prompt": GEMMA.format(row["prompt"])} for row in fabricate.outputs(method, seed)]
            rows[0] |= {"prompt": GEMMA.format(HOSTILE), "output": HOSTILE, "reference": HOSTILE}
            rows[7] |= {"prompt": GEMMA.format("Where is the zebra?"), "output": f"the {method} says so"}
            fabricate.keep(folder, fabricate.record(method, seed, dataset=dataset), rows)
    return Store(folder)


@pytest.fixture(scope="module")
def judgement(store):
    [comparison] = comparisons(store.load()[0])
    return comparison, judged(comparison, store)


@pytest.fixture(scope="module")
def report(store, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.document.figures", lambda *_: [Heading("Plots")])
        return render(store, tmp_path_factory.mktemp("out"), ("html",), now="noon")[0]


# What is embedded


def test_no_text_can_end_the_script_that_holds_it():
    value = [HOSTILE, "<!--<script>", "]]>", "&lt;", "\u2028"]
    said = page.as_json(value)
    assert json.loads(said) == value
    assert not set(said) & set("<>&\u2028\u2029")


@pytest.mark.parametrize("most", [100_000, 300_000, 400_000])
def test_a_large_store_fills_a_page_no_further_than_is_said(most, store, judgement, monkeypatch):
    rows = fabricate.outputs("qlora")
    luck = random.Random(most)
    long = {row["id"]: " word" * luck.choice((10, 300, 2000)) for row in rows}

    def outputs(record, chosen):
        found = Store.outputs(store, record, chosen)
        return [row | {"output": row["output"] + long[row["id"]]} for row in found]

    monkeypatch.setattr(store, "outputs", outputs)
    monkeypatch.setattr(sys.modules["harness.report.embedded"], "SAMPLES", most)
    monkeypatch.setattr(sys.modules["harness.report.embedded"], "TRIED", 5)  # which say little of the others
    samples = embedded(*judgement, store)["samples"]
    size = len(page.as_json(samples["rows"]).encode())
    assert 0.4 * most < size <= most
    assert samples["total"] == len(rows) > len(samples["rows"])
    assert len({row["part"] for row in samples["rows"]}) == 3
    assert all(len(row["answers"]) == 1 + len(METHODS) for row in samples["rows"])


PROMPTS = {
    GEMMA.format("Hello\n\nyou"): "Hello\n\nyou",
    "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n": "Add.\n\n1, 2",
    "### Instruction:\nA?\n\n### Response:\nB</s>\n\n### Instruction:\nC?\n\n### Response:\n":
        "User: A?\n\nAssistant: B\n\nUser: C?",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n":
        "System: Be kind.\n\nUser: Hi",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n": "Hi",
    "<s>[INST] Hi [/INST] Yes</s>[INST] Why? [/INST]": "User: Hi\n\nAssistant: Yes\n\nUser: Why?",
    "The tag <start_of_turn>user\n opens a turn": "The tag <start_of_turn>user\n opens a turn",
    "no marks at all": "no marks at all",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_shown_without_the_marks_of_its_template(prompt):
    assert asked(prompt) == PROMPTS[prompt]


# Several comparisons


def test_what_differs_stands_in_the_titles():
    spec = fabricate.record("qlora").spec
    other = replace(spec, hp=replace(spec.hp, learning_rate=1e-4, max_steps=9))
    alone = replace(spec, model="another")
    assert distinctions(["a", "a", "b"], [spec, other, alone]) == [
        "learning rate 0.0002, max steps 0", "learning rate 0.0001, max steps 9", ""
    ]  # fmt: skip
    assert distinctions(["a", "a"], [spec, spec]) == ["number 2", "number 1"]


def test_several_comparisons_are_several_files_and_an_index(tmp_path):
    fabricate.keep(tmp_path / "r", fabricate.record("base"))
    for rate in (1e-4, 2e-4):
        for method in ("qlora", "galore"):
            fabricate.keep(tmp_path / "r", fabricate.record(method, hp=Hyperparams(learning_rate=rate)))
    (tmp_path / "r" / "lost-s0-0123456789ab").mkdir()
    written = render(Store(tmp_path / "r"), tmp_path / "out", now="noon")
    assert [path.name for path in written] == ["report.md", "report.html"]
    for kind in ("md", "html"):
        index, *pages = sorted((tmp_path / "out").glob(f"*.{kind}"), key=lambda path: len(path.name))
        text = index.read_text("utf-8")
        assert sorted(re.findall(rf"report-\w+\.{kind}", text)) == sorted(path.name for path in pages)
        assert "learning rate 0.0001" in text and "lost-s0-0123456789ab" in text.replace("\\", "")
        titles = {re.search(r"^(?:# |<h1>)(.*)$", p.read_text("utf-8"), re.M)[1] for p in pages}
        assert len(titles) == 2 == sum("learning rate 0.000" in title for title in titles)
        assert all(f"report.{kind}" in path.read_text("utf-8") for path in pages)
        plots = [set(re.findall(r"plots/[\w-]+", path.read_text("utf-8"))) for path in pages]
        assert not set.intersection(*plots)
    pypdf = pytest.importorskip("pypdf")
    if not missing():
        [written] = render(Store(tmp_path / "r"), tmp_path / "out", ("pdf",))
        read = {path: pypdf.PdfReader(path) for path in (tmp_path / "out").glob("*.pdf")}
        said = {path: " ".join(page.extract_text() for page in pdf.pages) for path, pdf in read.items()}
        assert len(said) == 3 and said.pop(written).startswith("2 comparisons")
        for text in said.values():  # its pages, and its appendix
            assert text.count(re.search(r"learning rate 0\.000[12]", text)[0]) > 1
            assert "Cost of each phase" in text


# In a browser


def opened(browser, report: Path, **options):
    page = browser.new_context(offline=True, **options).new_page()
    page.complaints = []
    for event in ("pageerror", "dialog", "request", "console"):
        page.on(
            event, lambda said, event=event: page.complaints.append(f"{event}: {getattr(said, 'text', said)}")
        )
    page.goto(report.as_uri())
    page.complaints.pop(0)  # the page itself
    return page


COLUMN = """name => {
  const table = document.querySelector("#results table"), heads = [...table.tHead.rows[0].cells];
  const at = heads.findIndex((head) => head.innerText.replace(/\\s+/g, " ").includes(name));
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  return rows.map((row) => row.cells[at].innerText);
}"""
HIDDEN = """[...document.querySelectorAll(".wide")].filter((box) =>
  box.checkVisibility() && box.scrollWidth > box.clientWidth).length"""
PLACES = """Object.fromEntries([...document.querySelectorAll("#scatter g")].map((g) => {
  const { e, f } = g.querySelector("path[transform]").getCTM();
  return [g.querySelector("title").textContent.split("\\n")[0], [e, f]];
}))"""


def column(page, name: str) -> list[str]:
    """Of the first table, as it stands there."""
    return page.evaluate(COLUMN, name)


def test_tables_are_sorted_and_filtered(browser, report):
    page = opened(browser, report, viewport={"width": 1400, "height": 900})
    as_it_was, head = (
        column(page, "Technique"),
        page.get_by_role("button", name=re.compile(r"Perplexity.*\(after\)")),
    )
    scores = [float(text.split()[0]) for text in column(page, "Perplexity ↓ (after)")]
    values = dict(zip(as_it_was, scores, strict=True))
    for wanted in (sorted(values, key=values.get), sorted(values, key=values.get, reverse=True), as_it_was):
        head.first.focus()
        page.keyboard.press("Enter")
        assert column(page, "Technique") == wanted
    page.get_by_role("button", name=re.compile("Peak memory")).first.click()
    assert column(page, "Technique")[-1] == "Base", "what is not known is last"
    page.get_by_label("Show techniques with").fill("LORA")
    assert sorted(column(page, "Technique")) == ["LoRA", "QLoRA"]
    names = page.locator("#scatter .chart text.name").all_text_contents()
    assert sorted(names) == ["LoRA", "QLoRA"] and page.locator("#curves .line").count() == 2
    page.get_by_role("button", name="Open all sections").click()
    assert page.evaluate(HIDDEN) == 0, "no table hides columns at 1400 px"
    assert not page.complaints


def test_two_quantities_are_chosen_and_curves_are_switched_off(browser, report, judgement):
    page = opened(browser, report)
    page.get_by_label("Up", exact=True).select_option(label="ROUGE-L")
    page.get_by_label("Across").select_option(label="Training time")
    comparison, _ = judgement
    said = page.locator("#scatter svg").get_attribute("aria-label")
    assert said.startswith("ROUGE-L (F1, 0 to 1) ↑ against Training time (min) ↓. ")
    for technique in comparison.trained:
        minutes = technique.mean(lambda record: record.train_seconds / 60)
        score = technique.mean(lambda record: record.scores["rouge_l"])
        x, y = re.search(rf"\. .*?\b{technique.label}: ([\d.]+), ([\d.]+)", said).groups()
        assert float(x) == pytest.approx(minutes, rel=1e-3) and float(y) == pytest.approx(score, rel=1e-3)
    places = page.evaluate(PLACES)
    of = {
        t.label: (t.mean(lambda r: r.train_seconds), -t.mean(lambda r: r.scores["rouge_l"]))
        for t in comparison.trained
    }
    for axis in (0, 1):
        assert sorted(places, key=lambda name: places[name][axis]) == sorted(
            of, key=lambda name: of[name][axis]
        )
    assert page.locator("#curves .line").count() == len(METHODS)
    page.locator("#curves").get_by_role("checkbox", name="GaLore").uncheck()
    assert "GaLore" not in page.locator("#curves svg[role=img]").get_attribute("aria-label")
    page.locator("#curves").get_by_role("checkbox", name="GaLore").check()
    assert page.locator("#curves .line").count() == len(METHODS)
    page.locator("#curves").get_by_role("button", name="None").click()
    assert page.locator("#curves .line").count() == 0
    assert not page.complaints


def test_within_a_budget_the_page_decides_as_the_command_does(browser, report, judgement):
    page = opened(browser, report)
    comparison, verdicts = judgement
    memories = sorted(need(comparison, technique).memory / 2**30 for technique in comparison.trained)
    budgets = [(f"{memory + 0.01:.3f}GiB", "") for memory in memories[1:]]
    budgets += [("1 GiB", ""), ("", "1h"), ("9.5GB", "80 min"), ("30", "2")]
    for memory, hours in budgets:
        page.get_by_label("Memory of the card").fill(memory)
        page.get_by_label("Time for a run").fill(hours)
        size = float(re.match(r"[\d.]*", memory)[0] or "inf") * (2**30 if "GiB" in memory else 10**9)
        time = float(re.match(r"[\d.]*", hours)[0] or "inf") * (60 if "min" in hours else 3600)
        choice = Choice(comparison, verdicts, Budget(size, time, "GiB" in memory), "")
        assert page.locator(".within .lead").text_content() == choice.lead()
        items = page.locator(".within li").all_text_contents()
        assert items == choice.reasons() + choice.changes()
        assert sorted(column(page, "Technique")) == sorted(["Base", *choice.fit])
        assert page.locator("#decision > .lead").is_hidden()
        assert page.locator("#decision > .notice").first.is_visible(), "what must be known stays"
    page.get_by_label("Memory of the card").fill("lots")
    assert "such as 24GB" in page.locator("#decision").text_content()
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#decision > .lead").first.is_visible() and len(column(page, "Technique")) == 6
    assert not page.complaints


def test_the_page_begins_with_the_budget_that_the_report_was_made_with(browser, store, judgement, tmp_path):
    budget = Budget(7 * 2**30, 4500.0)
    render(store, tmp_path, ("html",), budget=budget)
    page = opened(browser, tmp_path / "report.html")
    fields = [page.get_by_label(label) for label in ("Memory of the card", "Time for a run")]
    assert [field.input_value() for field in fields] == ["7 GiB", "1.25 h"]
    within, alone = Choice(*judgement, budget, ""), Choice(*judgement, Budget(), "")
    assert page.locator(".within .lead").text_content() == within.lead()
    assert sorted(column(page, "Technique")) == sorted(["Base", *within.fit])
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".within .lead").text_content() == alone.lead()
    items = page.locator(".within li").all_text_contents()
    assert items == alone.reasons() + alone.changes(), "and not what it was made with"
    assert page.locator("#decision > .lead").is_hidden() and not page.complaints


def test_every_test_row_can_be_found_and_two_answers_compared(browser, report):
    page = opened(browser, report)
    page.locator("summary", has_text=re.compile("^Answers side by side")).click()
    samples = page.locator("#samples")
    assert "1 to 10 of 90 rows" in samples.text_content()
    samples.get_by_role("button", name="Next").click()
    assert "11 to 20 of 90 rows" in samples.text_content() and samples.locator(".example").count() == 10
    samples.get_by_label("Search").fill("ZEBRA")
    assert samples.locator(".example").count() == 1
    assert samples.locator(".given").first.text_content() == "Where is the zebra?"
    samples.get_by_label("prompts with template marks").check()
    assert samples.locator(".given").first.text_content() == GEMMA.format("Where is the zebra?")
    samples.get_by_label("Left").select_option(label="LoRA")
    samples.get_by_label("Right").select_option(label="GaLore")
    answers = samples.locator(".answer", has=page.locator(".remark:not(:empty)"))
    assert [answers.nth(i).locator("p").text_content() for i in (0, 1)] == [
        "the lora says so",
        "the galore says so",
    ]
    assert [text.strip() for text in samples.locator("mark").all_text_contents()] == ["lora", "galore"]
    samples.get_by_label("Search").fill("window.hit")
    shown = samples.locator("p.said").last.text_content()
    assert shown == HOSTILE.replace("\u2028", "⟨U+2028⟩").replace("\u202e", "⟨U+202E⟩").replace(
        "\x1b", "⟨U+001B⟩"
    )
    samples.get_by_label("only where they differ").check()
    assert "No row has this." in samples.text_content(), "all gave the same hostile answer"
    assert page.evaluate("window.hit") is None and page.locator("main img:not(.plot img)").count() == 0
    assert not page.complaints


def test_without_a_script_all_is_there_and_a_link_opens_its_section(browser, report):
    page = opened(browser, report, java_script_enabled=False)
    assert not page.locator("#more-on-cost").is_visible()
    page.goto(report.as_uri() + "#more-on-cost")
    assert page.locator("#more-on-cost table").is_visible() and page.locator("#results table").is_visible()
    page.emulate_media(media="print")
    assert page.locator("#answers-side-by-side .example").first.is_visible(), "printing opens what is folded"
    examples = page.locator("#answers-side-by-side .example").all_text_contents()
    assert len(examples) == 10 and all("Say something about" in text for text in examples)
    assert "start_of_turn" not in "".join(examples)
