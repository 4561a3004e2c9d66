"""`reports/`: the records of a store as one document, in Markdown, HTML and PDF, with its plots, and as data.

A pure function of the store: rendered again it is the same bytes, but for the line with the time.
Torch is not needed; numpy, pandas, matplotlib and jinja2 are, and typst for a PDF.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from harness.plain import plain
from harness.record import RunRecord
from harness.report.answer import answer
from harness.report.blocks import Block, Heading, Lead, Listing, Plot, Prose, Title
from harness.report.comparison import Comparison, comparisons
from harness.report.decision import Budget, decision
from harness.report.document import documents, unreadable
from harness.report.embedded import embedded
from harness.report.export import write_csv, write_json, write_latex
from harness.report.grades import contestants
from harness.report.handin import pages
from harness.report.modelcard import Origin, card, form_of, metadata, title
from harness.report.page import template, write_html
from harness.report.pdf import REMEDY, Unsettable, missing, typeset
from harness.report.tables import brief
from harness.report.text import markdown
from harness.report.verdicts import Verdicts, judged
from harness.store import MODEL, Store, save

if TYPE_CHECKING:
    import pandas

__all__ = [
    "REMEDY", "Budget", "Unwritten", "brief_table", "conclusion", "contestants", "missing", "model_cards",
    "render",
]  # fmt: skip
USUAL = ("md", "html")


class Unwritten(ValueError):
    """Why some formats could not be written; `written` are the documents that were."""

    def __init__(self, reasons: list[str], written: list[Path]):
        super().__init__("; ".join(reasons))
        self.written = written


@dataclass(frozen=True)
class Report:
    """What the writers are handed; each part is made once, when the first asks for it."""

    comparisons: list[Comparison]
    store: Store
    corrupt: list[str]  # a line for each record that could not be read
    now: str
    budget: Budget | None = None

    @cached_property
    def judged(self) -> list[tuple[Comparison, Verdicts]]:
        return [(comparison, judged(comparison, self.store)) for comparison in self.comparisons]

    @cached_property
    def documents(self) -> dict[str, list[Block]]:
        """`report`, which is an index if there are several comparisons, then one for each of these."""
        return documents(self.comparisons, self.store, self.corrupt, self.budget)

    @property
    def sections(self) -> list[list[Block]]:
        """The documents without the index."""
        return list(self.documents.values())[-len(self.comparisons) :]


def render(
    store: Store,
    folder: Path,
    formats: tuple[str, ...] = USUAL,
    now: str | None = None,
    budget: Budget | None = None,
) -> list[Path]:
    """Writes report.md, .html, .pdf, .csv, .json, .tex, those that are asked for, into a folder, and beside a
    document plots: *.png for Markdown, *.svg for HTML and PDF. Of several comparisons report.md and
    report.html are an index of one file for each. -> the paths of the files that are called report.

    `now` stands in the one line that differs from one rendering to the next; null: this minute. `budget`:
    within which it decides.
    Raises ValueError for an unknown format and for a store without a readable record, and Unwritten, when all
    else is written, for a format that cannot be written here.
    """
    if unknown := set(formats) - set(WRITERS):
        raise ValueError(f"unknown format {', '.join(sorted(unknown))}. Available: {', '.join(WRITERS)}")
    records, corrupt = store.load()
    found = comparisons(records)
    if not found:
        unreadable = f": {len(corrupt)} could not be read, such as {corrupt[0]}" if corrupt else ""
        raise ValueError(f"no run to report in {store.folder}{unreadable}")
    now = now or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    report = Report(found, store, corrupt, now, budget)
    plots = folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for block in chain(*report.sections) if set(formats) & set(DRAWINGS) else []:
        if isinstance(block, Plot):
            plots.mkdir(exist_ok=True)
            for kind in {DRAWINGS[kind] for kind in formats if kind in DRAWINGS}:
                save(plots / f"{block.name}.{kind}", block.images[kind])
    written, reasons = [], []
    for kind in formats:
        file = folder / f"report.{kind}"
        try:
            for name, content in WRITERS[kind](report).items():
                save(folder / f"{name}.{kind}", content)
            written.append(file)
        except Unsettable as error:
            reasons.append(f"{file} is not written: {error}")
    if reasons:
        raise Unwritten(reasons, written)
    return written


def conclusion(
    store: Store, records: list[RunRecord] | None = None, budget: Budget | None = None, width: int = 80
) -> str:
    """What was found and the decision, for a terminal of this width: of the comparisons that any of these
    records is in, else of the newest; all runs of the store that belong to one count, as in its report."""
    found = comparisons(store.load()[0])
    if records is not None:
        asked = {record.spec.digest for record in records}
        found = [c for c in found if asked & {r.spec.digest for t in c.trained for r in t.records}]
    blocks: list[Block] = []
    for comparison in found if records is not None else found[:1]:
        verdicts = judged(comparison, store)
        blocks += [Title(comparison.title)] * (len(found) > 1)
        blocks += [Prose(paragraph) for paragraph in answer(comparison, verdicts)]
        blocks += decision(comparison, verdicts, budget)
    return write_terminal(blocks, width)


def model_cards(
    store: Store, folders: dict[str, Path], base: str | None = None, licence: str | None = None,
    address: str = "",
) -> dict[str, str]:  # fmt: skip
    """Run -> the README.md of its model in a folder, as the hub wants it. `base`: the id of a base that the
    records know as a folder alone; `licence`: the base's; `address`: the model's own on the hub."""
    made = {}
    for comparison in comparisons(store.load()[0]) if folders else []:
        for technique in comparison.trained:
            for record in technique.records + technique.repeats:
                if folder := folders.get(record.folder):
                    known = base or record.spec.hub_model, licence, address or "FOLDER", form_of(folder)
                    told = comparison, technique, record, Origin(*known, folder.name != MODEL)
                    text = write_markdown(card(*told, judged(comparison, store)), "")
                    head = markdown(title(technique, record))
                    made[record.folder] = f"{metadata(*told)}\n# {head}\n\n{text}"
    return made


def brief_table(records: list[RunRecord]) -> "pandas.DataFrame":
    """The brief's table as text, a row a technique; of several comparisons, the newest first. Its notes are
    `attrs["notes"]`."""
    import pandas  # which no report needs, and takes half a second

    tables = [brief(c, [*c.bases, *chain(*c.tables.values())]) for c in comparisons(records)]
    rows = [[plain(cell) for cell in row] for table in tables for row in table.rows]
    table = pandas.DataFrame(rows, columns=tables[0].columns if tables else None)
    table.attrs["notes"] = list(dict.fromkeys(note for table in tables for note in table.notes))
    return table


def write_markdown(blocks: list[Block], now: str) -> str:
    """GitHub-flavoured. `finalize` escapes every value that the template names."""

    def inline(value):
        return value if isinstance(value, Markup) else markdown(" ".join(str(value).split()))

    def cell(value):
        return Markup(markdown(str(value).strip()).replace("\n", "<br>"))

    def indented(value):
        return Markup("\n".join("    " + line for line in plain(value).split("\n")))

    return template("report.md.j2", inline, cell=cell, indented=indented).render(blocks=blocks, now=now)


def write_terminal(blocks: list[Block], width: int) -> str:
    """Paragraphs and lists, wrapped."""

    def wrapped(text: str, first: str = "", rest: str = "") -> str:
        return textwrap.fill(plain(text), width, initial_indent=first, subsequent_indent=rest)

    found = []
    for block in blocks:
        if isinstance(block, Listing):
            found += [wrapped(item, "  - ", "    ") for item in block.items]
        elif isinstance(block, Title | Heading | Lead | Prose):
            found += ["", wrapped(block.text)]
        if isinstance(block, Title | Heading):
            found.append("-" * min(len(block.text), width))
    return "\n".join(found)


def write_pages(report: Report) -> dict[str, str]:
    """Each document as HTML, with the data that its script shows; an index has none."""
    found: dict = dict.fromkeys(report.documents)
    for name, (comparison, verdicts) in zip(list(found)[-len(report.judged) :], report.judged, strict=True):
        found[name] = embedded(comparison, verdicts, report.store)
    return {name: write_html(report.documents[name], report.now, data) for name, data in found.items()}


def write_pdf(report: Report) -> bytes:
    """Each comparison's two pages, then its appendix: what the other documents have of it."""
    parts = report.sections
    if len(parts) > 1:
        parts[-1] = [*parts[-1], *unreadable(report.corrupt)]
    firsts = [pages(comparison, verdicts) for comparison, verdicts in report.judged]
    return typeset(list(zip(firsts, parts, strict=True)), report.now)


DRAWINGS = {"md": "png", "html": "svg", "pdf": "svg"}  # document -> the kind of its plots
WRITERS: dict[str, Callable[[Report], Mapping[str, str | bytes]]] = {  # -> a file's name and what it holds
    "md": lambda report: {n: write_markdown(blocks, report.now) for n, blocks in report.documents.items()},
    "html": write_pages,
    "pdf": lambda report: {"report": write_pdf(report)},
    "csv": lambda report: {"report": write_csv(report.judged)},
    "json": lambda report: {"report": write_json(report.judged, report.corrupt, report.now)},
    "tex": lambda report: {"report": write_latex(report.judged)},
}
