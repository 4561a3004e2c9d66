"""`reports/`: the records of a store as one document, in Markdown and in HTML, with its plots.

A pure function of the store: rendered again it is the same bytes, but for the line with the time.
Torch is not needed; numpy, pandas, matplotlib and jinja2 are.
"""

import base64
import textwrap
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.plain import plain
from harness.record import RunRecord
from harness.report.answer import answer
from harness.report.blocks import Block, Heading, Lead, Listing, Plot, Prose, Title
from harness.report.comparison import comparisons, read_outputs
from harness.report.decision import Budget, decision
from harness.report.document import document
from harness.report.grades import contestants
from harness.report.tables import brief
from harness.report.text import markdown
from harness.report.verdicts import Verdicts
from harness.store import Store, save

if TYPE_CHECKING:
    import pandas

__all__ = ["Budget", "brief_table", "conclusion", "contestants", "render"]
FORMATS = ("md", "html")


def render(
    store: Store,
    folder: Path,
    formats: tuple[str, ...] = FORMATS,
    now: str | None = None,
    budget: Budget | None = None,
) -> list[Path]:
    """Writes report.md, report.html and plots/*.png, *.svg into a folder. -> the documents' paths.

    `now` stands in the one line that differs from one rendering to the next; null: this minute. `budget`:
    within which it decides.
    Raises ValueError for an unknown format and for a store without a readable record.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"unknown format {', '.join(sorted(unknown))}. Available: {', '.join(FORMATS)}")
    records, corrupt = store.load()
    found = comparisons(records)
    if not found:
        unreadable = f": {len(corrupt)} could not be read, such as {corrupt[0]}" if corrupt else ""
        raise ValueError(f"no run to report in {store.folder}{unreadable}")
    blocks = document(found, store, corrupt, budget)
    now = now or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Plot):
            for kind, image in block.images.items():
                save(plots / f"{block.name}.{kind}", image)
    written = []
    for kind in formats:
        written.append(folder / f"report.{kind}")
        save(written[-1], WRITERS[kind](blocks, now))
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
        if not comparison.random_weights:
            read_outputs(comparison, store)
        verdicts = Verdicts(comparison)
        blocks += [Title(comparison.title)] * (len(found) > 1)
        blocks += [Prose(paragraph) for paragraph in answer(comparison, verdicts)]
        blocks += decision(comparison, verdicts, budget)
    return write_terminal(blocks, width)


def brief_table(records: list[RunRecord]) -> "pandas.DataFrame":
    """The brief's table as text, a row a technique; of several comparisons, the newest first. Its notes are
    `attrs["notes"]`."""
    import pandas  # which no report needs, and takes half a second

    tables = [brief(c, [*c.bases, *chain(*c.objectives.values())]) for c in comparisons(records)]
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


def write_html(blocks: list[Block], now: str) -> str:
    """One file that loads nothing. Jinja escapes every value that the template names."""

    def data(image: bytes) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(image).decode()

    def inline(value):
        return value if isinstance(value, Markup) else plain(value)

    title = next(block.text for block in blocks if isinstance(block, Title))
    made = template("report.html.j2", inline, data=data)
    return made.render(blocks=blocks, now=now, title=title)


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


WRITERS = {"md": write_markdown, "html": write_html}


def template(name: str, finalize, **filters):
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=name.endswith(".html.j2"),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
