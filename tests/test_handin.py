"""What a person hands in: the PDF as pypdf reads it, CSV and JSON against the records, LaTeX read back."""

import csv
import io
import json
import re
import subprocess
import sys
from math import isclose, prod
from pathlib import Path
from statistics import fmean, stdev

import fabricate
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pypdf")
pytest.importorskip("typst")

import pypdf

from harness.cli import main
from harness.cli.arguments import FORMATS
from harness.report import WRITERS, Unwritten, handin, plots, render
from harness.report.budget import Budget
from harness.report.comparison import comparisons
from harness.report.decision import decision
from harness.report.handin import pages
from harness.report.text import latex, spreadsheet
from harness.report.verdicts import judged
from harness.store import Store

ROOT = Path(__file__).parents[1]

SECTIONS = [
    "Introduction", "Techniques, and why", "Data and their mapping", "Setup", "Results", "Hybrid",
    "Challenges met", "Conclusion",
]  # fmt: skip
TWELVE = (
    "full", "lora", "qlora", "dora", "galore", "loftq", "reft", "smt", "lora_ggpo", "lisa", "orpo", "pissa",
)  # fmt: skip
NASTY = "#strong[x] *b* _i_ $y$ `r` <l> @ref \\ // http://evil.example = + - ~ { } 'a' -- "
REASON = (
    "It trains where the gradients of the task are large, which its authors found in the projections of "
    "values; they report it above all others, and without a plateau as more is trained. "
)
WHY = dict.fromkeys(("performance", "efficiency", "generalisation"), REASON * 3)
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="400"><path d="M0 0L9 9"/></svg>'


def sketch(monkeypatch) -> None:
    """The appendix's plots take seconds; the one of the pages is drawn as it is."""
    for name in ("scores_by_cost", "cost_alone", "memory_by_part", "by_learning_rate", "loss_curves"):
        monkeypatch.setattr(plots, name, lambda *arguments: {"svg": DRAWING, "png": b""})


@pytest.fixture(autouse=True)
def sketched(monkeypatch):
    sketch(monkeypatch)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    return fabricate.results(tmp_path_factory.mktemp("usual"))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    """12 methods with long reasons, 3 seeds, one out of memory, one diverged, one of a stranger."""
    folder = fabricate.results(tmp_path_factory.mktemp("twelve"), methods=())
    for method in TWELVE:
        for seed in (0, 1, 2):
            run = fabricate.record(method, seed)
            run.card |= {"why": WHY, "summary": REASON}
            if method == "lisa":
                run.card |= {"title": NASTY + "a name that has no end " * 9, "paper": "x" * 5000}
            if method == "smt" and seed == 1:
                run.status, run.error = "oom_gpu", "CUDA out of memory: " + "y" * 1_000_000
            if method == "dora" and seed == 2:
                run.status, run.error = "diverged", "the loss was NaN at step 37"
            if method == "pissa":
                run.warnings = [f"warning {i} {NASTY}" for i in range(20)]
                run.card |= {"objective": "preference", "aim": "preference_accuracy"}
            fabricate.keep(folder, run)
    return folder


def one(results: Path):
    store = Store(results)
    [comparison] = comparisons(store.load()[0])
    return comparison, judged(comparison, store)


@pytest.fixture(scope="module")
def printed(twelve, tmp_path_factory):
    """The PDF of the twelve, its bookmarks, and the text of each page."""
    folder = tmp_path_factory.mktemp("printed")
    with pytest.MonkeyPatch.context() as patch:
        sketch(patch)
        render(Store(twelve), folder, ("pdf",), now="noon")
    pdf, marks = read(folder)
    return pdf, marks, [page.extract_text() for page in pdf.pages]


def read(folder: Path):
    """-> the PDF, and the page (from 1) of each bookmark in its order."""
    pdf = pypdf.PdfReader(folder / "report.pdf")

    def flat(items):
        for item in items:
            yield from flat(item) if isinstance(item, list) else [item]

    return pdf, [(item.title, pdf.get_destination_page_number(item) + 1) for item in flat(pdf.outline)]


def challenges(results: Path) -> str:
    return words(handin.challenges(one(results)[0]))


def hybrid(results: Path) -> str:
    return words(handin.hybrid(*one(results)))


def words(blocks) -> str:
    return "\n".join("\n".join(getattr(block, "items", None) or [block.text]) for block in blocks)


def test_the_main_part_has_the_briefs_sections_on_two_pages_for_twelve_methods(printed):
    _, marks, texts = printed
    first, *sections = marks[:9]
    assert first == ("google/gemma-3-1b-it on Alpaca + Tulu v2 + UltraChat", 1)
    assert [re.sub(r"^\d ", "", title) for title, _ in sections] == SECTIONS
    assert {page for _, page in sections} == {1, 2}
    assert marks[9][0].startswith("Appendix") and marks[9][1] == 3
    assert "Answers side by side" in [title for title, _ in marks[10:]]
    texts = [" ".join(text.split()) for text in texts]
    assert all("Tuneoff, rendered noon" in text for text in texts)
    main_part = " ".join(texts[:2])
    for title in ("Full fine-tuning", "LoRA", "QLoRA", "DoRA", "GaLore", "ReFT", "loftq", "smt", "orpo"):
        assert f"{title} (" in main_part  # the reasons, with their source
    assert len(texts) < 30  # a megabyte of a stranger is no book
    assert "Before: the untouched model" in main_part and "NaN at step 37" in main_part
    assert "more, in the appendix" in main_part and "Decision. " in main_part
    examples = re.findall(r"(\d+)\. (?:alpaca|tulu|ultrachat):0", " ".join(texts[2:]))
    assert examples == [str(i + 1) for i in range(10)]


def test_the_conclusion_begins_with_the_decision_within_its_budget(usual):
    for budget in (None, Budget(9 * 2**30)):
        comparison, verdicts = one(usual)
        first = pages(comparison, verdicts, budget)[-1].items[0]
        assert first.startswith(
            f"Decision. {decision(comparison, verdicts, budget)[1].text} What would change"
        )
        assert ("Within 9 GiB: QLoRA" in first) == bool(budget)


def test_what_is_read_is_never_tiny(printed):
    letters: dict[float, int] = {}

    def count(text, matrix, of_text, _, size):
        height = round(abs(size * of_text[3] * matrix[3]), 1)
        letters[height] = letters.get(height, 0) + len(text.strip())

    for page in printed[0].pages[:2]:
        page.extract_text(visitor_text=count)
    assert min(height for height, n in letters.items() if n) >= 5
    assert sum(n for height, n in letters.items() if height >= 6.5) > 0.7 * sum(letters.values())


@pytest.mark.fault(22)
def test_its_figures_are_drawn_not_painted_and_strangers_texts_are_no_markup(printed):
    pdf, _, texts = printed
    assert not [image for page in pdf.pages for image in page.images]
    notes = [note.get_object() for page in pdf.pages for note in page.get("/Annots", [])]
    assert "/URI" not in [note.get("/A", {}).get("/S") for note in notes]
    said = "".join("".join(texts).split()).replace("\u200b", "")
    assert "#strong[x]*b*_i_$y$`r`<l>@ref\\//http://evil.example" in said


def test_rendered_twice_it_is_the_same_bytes(usual, tmp_path):
    for name in ("a", "b"):
        render(Store(usual), tmp_path / name, FORMATS, now="noon")
    for kind in FORMATS:
        one, two = ((tmp_path / name / f"report.{kind}").read_bytes() for name in ("a", "b"))
        assert one == two, kind


def test_several_are_set_also_after_one_was_set_in_this_process():
    """A copy of a process that has asked typst would wait for its threads forever."""
    told = """
from harness.report.blocks import Prose, Title
from harness.report.pdf import typeset_all
documents = [([], [Title(str(i)), Prose("word " * 2000)]) for i in range(3)]
first, *_ = several = typeset_all(documents, "now")
assert typeset_all(documents[:1], "now") == [first], "set here"
assert typeset_all(documents, "now") == several
"""
    subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=True, timeout=60)


def test_challenges_are_of_the_records_and_of_nothing_else(twelve, usual):
    said = challenges(twelve)
    assert "Out of GPU memory: CUDA out of memory" in said and "smt (seed 1)" in said
    assert "Diverged: the loss was NaN at step 37" in said and "DoRA (seed 2)" in said
    assert challenges(usual) == "None is on record: 8 runs, all of them ok, without a warning."


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: setattr(run, "disturbed", ["another program"]), "busy with something else"),
        (
            lambda run: vars(run.kernels).update(rung="eager", reason="they did not agree"),
            "they did not agree",
        ),
        (lambda run: setattr(run.data, "left_out", {"empty_answer": 41}), "empty answer 41"),
        (lambda run: run.warnings.append("no pad token"), "No pad token (QLoRA (seed 0))."),
    ],
)
def test_each_kind_of_challenge_is_told_with_its_run(tmp_path, change, told):
    results = fabricate.results(tmp_path, bases=("base",))
    run = fabricate.record("qlora", 0)
    change(run)
    fabricate.keep(results, run)
    said = challenges(results)
    assert told in said and said.count("\n") == 0


def test_a_hybrid_that_was_run_is_told_and_another_is_a_proposal_of_different_kinds(usual, tmp_path):
    said = hybrid(usual)
    assert said.startswith("Proposed, not run: GaLore and QLoRA in one training.")
    alike = fabricate.results(tmp_path / "alike", methods=("lora", "dora"))
    assert hybrid(alike).startswith("Proposed, not run: an ensemble of ")
    joined = fabricate.results(tmp_path / "joined")
    for seed in (0, 1, 2):
        run = fabricate.record("both", seed)
        run.card |= {"title": "QLoRA + GaLore", "hybrid": ["qlora", "galore"]}
        fabricate.keep(joined, run)
    assert hybrid(joined).startswith("QLoRA + GaLore, which was run:")
    alone = fabricate.results(tmp_path / "alone", methods=("lora",))
    assert "none is proposed" in hybrid(alone)


def test_the_answer_and_its_picture_stand_before_all_else(usual):
    comparison, verdicts = one(usual)
    _, first, picture, *rest = pages(comparison, verdicts)
    assert (
        first.text.startswith(decision(comparison, verdicts)[1].text) and "Least memory: QLoRA" in first.text
    )
    drawn = picture.images["svg"].decode()  # text as paths, in comments as it is
    assert [drawn.count(f"<!-- {name} -->") for name in ("QLoRA", "GaLore")] == [2, 2]
    assert all(f"<!-- {name} " in drawn for name in ("Peak memory", "Training time", "BLEU-4"))
    assert rest[0].text == "Introduction"
    [other] = [block for block in rest if block.kind == "plot"]
    assert other.caption.startswith("ROUGE-L and Perplexity against peak memory")


def test_what_is_marked_as_best_is_what_no_verdict_beats(usual):
    comparison, verdicts = one(usual)
    [table] = [block for block in pages(comparison, verdicts) if block.kind == "table"]
    marked = {(table.rows[i][0], table.columns[j].split("\n")[0].rstrip(" \u00a0↑↓")) for i, j in table.best}
    assert [row[0] for row in table.rows] == ["GaLore", "QLoRA"]
    assert {("GaLore", "BLEU-4"), ("GaLore", "ROUGE-L"), ("QLoRA", "Peak memory")} <= marked
    assert ("QLoRA", "BLEU-4") not in marked and ("GaLore", "Peak memory") not in marked
    assert all("before" not in table.columns[j] for _, j in table.best)
    assert [c[-1] for c in (name.split("\n")[0] for name in table.columns[2:])] == list("↑↑↑↑↓↓↓↓")


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_a_bench_without_scores_or_results_still_has_its_pages(tmp_path, status):
    for seed in (0, 1):
        run = fabricate.record("lora", seed, model="random:x" if status == "ok" else "x")
        run.status = status
        fabricate.keep(tmp_path / "r", run)
    render(Store(tmp_path / "r"), tmp_path, FORMATS, now="noon")
    assert read(tmp_path)[1][8] in [("8 Conclusion", 1), ("8 Conclusion", 2)]
    assert ("random" in handin.introduction(one(tmp_path / "r")[0])) == (status == "ok")


# Data


def rows_of(folder: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO((folder / "report.csv").read_text("utf-8"), newline="")))


def test_each_number_of_the_csv_is_that_of_the_records(usual, tmp_path):
    render(Store(usual), tmp_path, ("csv", "json"), now="noon")
    records, rows = Store(usual).load()[0], rows_of(tmp_path)
    assert not (tmp_path / "plots").exists()
    [base] = [r for r in records if r.spec.method == "base"]
    for method in ("qlora", "galore"):
        runs = [r for r in records if r.spec.method == method]
        of = {row["quantity"]: row for row in rows if row["method"] == method}
        train = [sum(r.phases[name].seconds for name in ("attach", "train")) for r in runs]
        joules = [sum(r.phases[name].joules for name in ("attach", "train")) for r in runs]
        wanted = {name: [r.scores[name] for r in runs] for name in ("bleu4", "rouge_l", "perplexity")}
        wanted |= {"seconds": train, "peak_memory": [r.phases["train"].peak_allocated for r in runs],
                   "energy": joules}  # fmt: skip
        for name, values in wanted.items():
            row = of[name]
            assert row["n"] == "3" and isclose(float(row["mean"]), fmean(values), rel_tol=1e-9)
            assert isclose(float(row["sd"]), stdev(values), rel_tol=1e-6)
            scored = name in base.scores
            assert row["before_mean"] == (repr(base.scores[name]) if scored else "") and not row["before_sd"]
        assert (of["seconds"]["unit"], of["seconds"]["better"]) == ("seconds", "lower")
        assert (of["peak_memory"]["unit"], of["peak_memory"]["better"]) == ("bytes", "lower")
        assert (of["bleu4"]["better"], of["perplexity"]["better"]) == ("higher", "lower")
    assert len({(row["technique"], row["quantity"]) for row in rows}) == len(rows)
    assert all(row["unit"] and row["n"] and row["test_rows"] == "90" for row in rows)


def test_the_json_has_the_same_numbers_and_verdicts_that_follow_from_their_intervals(usual, tmp_path):
    render(Store(usual), tmp_path, ("csv", "json"), now="noon")
    text = (tmp_path / "report.json").read_text("utf-8")
    value = json.loads(text, parse_constant=pytest.fail)
    assert value["schema"] == 1 and text.isascii() and value["rendered"] == "noon" and value["corrupt"] == []
    [comparison] = value["comparisons"]
    flat = [
        (t["technique"], q["quantity"], q["mean"]) for t in comparison["techniques"] for q in t["quantities"]
    ]
    assert flat == [(r["technique"], r["quantity"], float(r["mean"])) for r in rows_of(tmp_path)]
    [choice] = comparison["decision"]
    [told] = decision(*one(usual))[1:2]
    assert (choice["lead"], choice["budget"]) == (told.text, {"memory": None, "seconds": None})
    beaten = {v[side] for v in comparison["verdicts"] for side, word in (("a", "lower"), ("b", "higher"))
              if v["quantity"] == "bleu4" and v["verdict"] == word}  # fmt: skip
    assert {*choice["take"]} == {"QLoRA", "GaLore"} - beaten != set()
    for verdict in comparison["verdicts"]:
        none = 1 if verdict["ratio"] else 0
        assert verdict["low"] <= verdict["difference"] <= verdict["high"]
        word = "higher" if verdict["low"] > none else "lower" if verdict["high"] < none else "tied"
        assert verdict["verdict"] == word
    [pair] = [v for v in comparison["verdicts"] if v["quantity"] == "peak_memory"]
    peaks = {m: [r.phases["train"].peak_allocated for r in Store(usual).load()[0] if r.spec.method == m]
             for m in ("qlora", "galore")}  # fmt: skip
    sides = {"QLoRA": peaks["qlora"], "GaLore": peaks["galore"]}
    ratio = prod(a / b for a, b in zip(sides[pair["a"]], sides[pair["b"]], strict=True)) ** (1 / 3)
    assert isclose(pair["difference"], ratio, rel_tol=1e-6)


def test_what_is_not_known_is_empty_and_null_and_never_0(tmp_path):
    for method in ("base", "lora"):
        run = fabricate.record(method)
        for phase in run.phases.values():
            phase.joules = None
        fabricate.keep(tmp_path / "r", run)
    render(Store(tmp_path / "r"), tmp_path, ("csv", "json"))
    rows = rows_of(tmp_path)
    assert not [row for row in rows if row["quantity"] == "energy"]
    assert all(row["n"] == "1" and row["sd"] == "" for row in rows)
    assert "NaN" not in (tmp_path / "report.json").read_text("utf-8")


@pytest.mark.fault(23)
@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =cmd|'/c calc'!A0", "\t=1"])
def test_no_spreadsheet_computes_what_a_stranger_wrote(text, tmp_path):
    assert spreadsheet(text).startswith("'") and spreadsheet(f"a{text}") == f"a{text}"
    run = fabricate.record("lora")
    run.card |= {"title": text}
    fabricate.keep(tmp_path / "r", run)
    render(Store(tmp_path / "r"), tmp_path, ("csv",))
    assert {row["technique"] for row in rows_of(tmp_path)} == {"'" + text}


def of_tex(text: str) -> str:
    """What TeX would print of a text, by the meaning of each command; whatever else acts is an error."""
    named = {"textbackslash": "\\", "textasciicircum": "^", "textasciitilde": "~", "textless": "<",
             "textgreater": ">", "textbar": "|", "textasteriskcentered": "*", "dots": "…"}  # fmt: skip
    math = {"$\\pm$": "±", "$-$": "−", "$\\langle$": "⟨", "$\\rangle$": "⟩"}
    found, at = [], 0
    parts = re.compile(r"\\([a-z]+)\{\}|\\([{}$&#%_])|(\$[^$]+\$)|\{([][])\}|(--)|([^\\{}$&#%_^~<>|\[\]*])")
    while at < len(text):
        part = parts.match(text, at)
        assert part, text[at : at + 20]
        command, escaped, formula, bracket, dash, plain = part.groups()
        found.append(named[command] if command else math[formula] if formula else "–" if dash
                     else escaped or bracket or plain)  # fmt: skip
        at = part.end()
    return "".join(found)


@pytest.mark.parametrize(
    "text", ["a\\b{c}$d$&#%_^~<>|[x]*", "[6pt]", "\\input{/etc/passwd}", "±−–…⟨⟩ 12 % & 3"]
)
def test_latex_prints_what_was_written(text):
    assert of_tex(latex(text)) == text


def test_the_latex_table_has_the_briefs_columns_and_as_many_cells_a_row(twelve, tmp_path):
    render(Store(twelve), tmp_path, ("tex",), now="noon")
    first, *others = (tmp_path / "report.tex").read_text("utf-8").split("\\begin{table}")[1:]
    assert len(others) == 1  # of the other objective
    assert "\\toprule" in first and "\\midrule" in first and "\\bottomrule" in first
    body = first.partition("\\midrule\n")[2].partition("\\bottomrule")[0].strip().split("\n")
    cells = [re.split(r"(?<!\\) & ", line.removesuffix(" \\\\")) for line in body]
    assert {len(row) for row in cells} == {9} and len(cells) == 13
    names = [of_tex(row[0]) for row in cells]
    assert names[0] == "Base" and any(name.startswith("#strong[x] *b* _i_ $y$") for name in names)
    for head in ("BLEU-4 $\\uparrow$", "ROUGE-L $\\uparrow$", "Peak memory $\\downarrow$", "Training time"):
        assert head in first
    assert "over $2$ to $3$ seeds" in first
    ranked = [float(of_tex(row[2]).split()[0]) for row in cells[2:-2]]  # the last two are not ranked
    assert ranked == sorted(ranked, reverse=True) and "seeds" in names[-1] + names[-2]


# Where typst is missing


def test_without_typst_all_else_is_written_and_the_remedy_told(usual, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(Unwritten, match="pip install typst") as caught:
        render(Store(usual), tmp_path, ("pdf", "csv", "md"))
    assert [file.name for file in caught.value.written] == ["report.csv", "report.md"]
    where = ["--results", str(usual), "--reports", str(tmp_path / "cli")]
    assert main(["report", *where, "--format", "pdf", "tex"]) == 1
    said = capsys.readouterr()
    assert "pip install typst" in said.err and "report.tex" in said.out
    assert not (tmp_path / "cli" / "report.pdf").exists()
    assert main(["run", "--seeds", "0", "--format", "pdf", "--results", str(tmp_path / "none")]) == 2
    assert "pip install typst" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_what_can_be_asked_for_is_what_is_written():
    assert list(FORMATS) == list(WRITERS)
