"""`reports/`: the records of a store as one document, in Markdown, HTML and PDF, with its plots, and as data.

A pure function of the store: rendered again it is the same bytes, but for the line with the time.
Torch is not needed; numpy, matplotlib, jinja2 and rich are, and typst for a PDF.
"""

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path

from markupsafe import Markup

from harness.forks import each
from harness.plain import plain
from harness.record import RunRecord
from harness.report.answer import answer
from harness.report.blocks import Block, Heading, Lead, Listing, Plot, Prose, Title
from harness.report.budget import Budget
from harness.report.comparison import Comparison, comparisons
from harness.report.decision import decision
from harness.report.document import documents
from harness.report.embedded import embedded
from harness.report.export import write_csv, write_json, write_latex
from harness.report.grades import contestants
from harness.report.handin import pages
from harness.report.modelcard import Origin, card, form_of, metadata, title
from harness.report.page import template, write_html
from harness.report.pdf import REMEDY, Unsettable, missing, typeset_all
from harness.report.plots import NARROW, Images, draw
from harness.report.tasks import TaskScore, task_scores
from harness.report.terminal import results
from harness.report.text import markdown
from harness.report.verdicts import Verdicts, judged
from harness.store import MODEL, Store, save

__all__ = [
    "REMEDY", "Budget", "Report", "TaskScore", "Unwritten", "conclusion", "contestants", "earlier",
    "missing", "model_cards", "render", "task_scores", "write",
]  # fmt: skip
USUAL = ("md", "html")
READABLE = 100  # characters of a line of words
NAMED = re.compile(r"report(-[0-9a-f]{12})?")  # documents; what else lies beside them is not ours
Documents = dict[str, list[Block]]  # by their files' names, without suffix


class Unwritten(ValueError):
    """Why some formats could not be written; `written` are the documents that were."""

    def __init__(self, reasons: list[str], written: list[Path]):
        super().__init__("; ".join(reasons))
        self.written = written


@dataclass(frozen=True)
class Report:
    """The comparisons of a store, newest first; each part is made once, when somebody first asks for it."""

    comparisons: list[Comparison]
    store: Store
    corrupt: list[str]  # a line for each record that could not be read
    now: str
    budget: Budget | None = None

    @classmethod
    def of(cls, store: Store, budget: Budget | None = None, now: str | None = None) -> "Report":
        """`budget`: within which it decides. `now` stands in the one line that differs from one rendering to
        the next; null: this minute. Raises ValueError for a store without a readable record."""
        records, corrupt = store.load()
        if not (found := comparisons(records)):
            unreadable = f": {len(corrupt)} could not be read, such as {corrupt[0]}" if corrupt else ""
            raise ValueError(f"no run to report in {store.folder}{unreadable}")
        return cls(found, store, corrupt, now or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), budget)

    @cached_property
    def judged(self) -> list[tuple[Comparison, Verdicts]]:
        return [(comparison, judged(comparison, self.store)) for comparison in self.comparisons]

    def documents(self, kinds: set[str]) -> dict[str, list[Block]]:
        """`report`, which is an index if there are several comparisons, then one for each of these. Their
        plots are drawn as these kinds (svg, png, narrow)."""
        found = dict(documents(self.comparisons, self.store, self.corrupt, self.budget))
        draw(undrawn(*found.values()), kinds)
        return found


def undrawn(*documents: list[Block]) -> list[Images]:
    plots = (block for block in chain(*documents) if isinstance(block, Plot))
    return [plot.images for plot in plots if isinstance(plot.images, Images)]


def render(
    store: Store,
    folder: Path,
    formats: tuple[str, ...] = USUAL,
    now: str | None = None,
    budget: Budget | None = None,
) -> list[Path]:
    """The report of a store, written into a folder: see `Report.of` and `write`."""
    return write(Report.of(store, budget, now), folder, formats)


def write(report: Report, folder: Path, formats: tuple[str, ...] = USUAL) -> list[Path]:
    """Writes report.md, .html, .pdf, .csv, .json, .tex, those that are asked for, into a folder, and beside a
    document plots: *.png for Markdown, *.svg for HTML and PDF. Of several comparisons report.md, .html and
    .pdf are an index of one file for each. -> the paths of the files that are called report.

    Raises ValueError for an unknown format, and Unwritten, when all else is written, for one that cannot be
    written here.
    """
    if unknown := set(formats) - set(WRITERS):
        raise ValueError(f"unknown format {', '.join(sorted(unknown))}. Available: {', '.join(WRITERS)}")
    plots = folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {DRAWINGS[kind] for kind in formats if kind in DRAWINGS}
    made = report.documents(kinds | {NARROW} if "html" in formats else kinds) if kinds else {}
    for block in chain(*made.values()):
        if isinstance(block, Plot):
            plots.mkdir(exist_ok=True)
            for kind in kinds:
                save(plots / f"{block.name}.{kind}", block.images[kind])
    written, reasons = [], []
    for kind in formats:
        file = folder / f"report.{kind}"
        try:
            for name, content in WRITERS[kind](report, made).items():
                save(folder / f"{name}.{kind}", content)
            written.append(file)
        except Unsettable as error:
            reasons.append(f"{file} is not written: {error}")
    if reasons:
        raise Unwritten(reasons, written)
    return written


def earlier(report: Report, folder: Path, written: list[Path]) -> list[Path]:
    """The documents in a folder that an earlier rendering wrote and this one, whose `written` have come back
    from `write`, did not: they may be of other runs."""
    several = len(report.comparisons) > 1
    names = ["report", *(f"report-{c.name}" for c in report.comparisons if several)]
    new = {folder / f"{name}{file.suffix}" for name in names for file in written}
    documents = (file for kind in WRITERS for file in folder.glob(f"report*.{kind}"))
    return sorted(file for file in documents if file not in new and NAMED.fullmatch(file.stem))


def conclusion(report: Report, records: list[RunRecord] | None = None, width: int = 80) -> str:
    """Table, what was found and the decision, for a terminal of this width: of the comparisons that any of
    these records trained in, else of the newest; all runs of the store that belong to one count."""
    found = report.judged[:1]
    if records is not None:
        asked = {record.spec.digest for record in records}
        found = [
            pair for pair in report.judged
            if asked & {r.spec.digest for t in pair[0].trained or pair[0].bases for r in t.records}
        ]  # fmt: skip
    said = []
    for comparison, verdicts in found:
        blocks: list[Block] = [Prose(paragraph) for paragraph in answer(comparison, verdicts)]
        blocks += decision(comparison, verdicts, report.budget)
        said += [write_terminal([Title(comparison.title)], width)] * (len(report.comparisons) > 1)
        said += ["", results(comparison, width), write_terminal(blocks, min(width, READABLE))]
    return "\n".join(said)


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


def write_markdown(blocks: list[Block], now: str) -> str:
    """GitHub-flavoured. `finalize` escapes every value that the template names."""

    def inline(value):
        return value if isinstance(value, Markup) else markdown(" ".join(str(value).split()))

    def cell(value):
        return Markup(markdown(str(value).strip()).replace("\n", "<br>"))  # noqa: S704, escaped

    def indented(value):
        return Markup("\n".join("    " + line for line in plain(value).split("\n")))  # noqa: S704, code

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


def write_pages(report: Report, made: Documents) -> dict[str, str]:
    """Each document as HTML, with the data that its script shows; an index has none."""
    of = named(report, made)

    def page(name: str) -> str:
        data = embedded(*of[name], report.store, report.budget) if name in of else None
        return write_html(made[name], report.now, data)

    return dict(zip(made, each(page, list(made)), strict=True))


def write_pdf(report: Report, made: Documents) -> dict[str, bytes]:
    """Each comparison's two pages, then its appendix: what the other documents have of it; and the index."""
    first = {name: pages(*judged, report.budget) for name, judged in named(report, made).items()}
    draw(undrawn(*first.values()), {"svg"})

    both = [(first.get(name, []), made[name]) for name in made]
    return dict(zip(made, typeset_all(both, report.now), strict=True))


def named(report: Report, made: Documents) -> dict[str, tuple[Comparison, Verdicts]]:
    """By the documents' names, of which an index is none."""
    return dict(zip(list(made)[-len(report.judged) :], report.judged, strict=True))


DRAWINGS = {"md": "png", "html": "svg", "pdf": "svg"}  # document -> the kind of its plots
WRITERS: dict[str, Callable[[Report, Documents], Mapping[str, str | bytes]]] = {  # -> files' names, content
    "md": lambda report, made: {n: write_markdown(blocks, report.now) for n, blocks in made.items()},
    "html": write_pages,
    "pdf": write_pdf,
    "csv": lambda report, _: {"report": write_csv(report.judged, report.store)},
    "json": lambda report, _: {
        "report": write_json(report.judged, report.store, report.corrupt, report.now, report.budget)
    },
    "tex": lambda report, _: {"report": write_latex(report.judged)},
}
