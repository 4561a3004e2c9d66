"""A report as PDF, typeset by typst: a comparison on two pages, then all the rest of it as an appendix.

What is said stands in JSON that the template reads, so that no text of a stranger is ever read as markup.
"""

import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.forks import each
from harness.plain import plain, shorten
from harness.report.blocks import Block, Plot, Table

TEMPLATE = Path(__file__).with_name("templates") / "report.typ"
REMEDY = "pip install typst"
PAGES = 2  # that a person hands in
SIZES = (10.5, 10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5)  # pt: the largest at which the pages hold it all
WIDEST = 12  # columns of a table on a page
LONGEST = 4000  # characters of one text: most of a page
UNBROKEN = re.compile(r"\S{24}(?=\S)")  # in a digest or an address a line may end anywhere

ASKED: set[int] = set()  # processes that typst has left threads in, which copies of them would miss


class Unsettable(ValueError):
    """Why there is no PDF."""


def missing() -> str:
    """Why no PDF can be made here; empty where one can."""
    try:
        import typst  # noqa: F401
    except ImportError:
        return "a PDF is typeset by typst, which is not installed"
    return ""


def typeset_all(documents: list[tuple[list[Block], list[Block]]], now: str) -> list[bytes]:
    """Of each document's pages and appendix the PDF; several at once. Raises Unsettable."""
    if reason := missing():
        raise Unsettable(f"{reason}: {REMEDY}")

    def one(document: tuple[list[Block], list[Block]]) -> bytes:
        return typeset(*document, now)

    return [one(document) for document in documents] if os.getpid() in ASKED else each(one, documents)


def typeset(pages: list[Block], appendix: list[Block], now: str) -> bytes:
    """-> the PDF; of an index, which has no pages, its blocks alone. Raises Unsettable."""
    import typst

    ASKED.add(os.getpid())

    def made(by: Callable, size: float, whole: bool, **asked: Any) -> Any:
        report = {"title": title, "pages": first, "appendix": rest if whole else []}
        inputs = {"report": json.dumps(report), "now": now, "size": json.dumps(size)}
        try:
            return by(TEMPLATE, sys_inputs=inputs, **asked)
        except typst.TypstError as error:
            raise Unsettable(f"typst cannot set it: {plain(error)}") from error

    def holds(size: float) -> bool:
        [last] = json.loads(made(typst.query, size, whole=False, selector="<last>", field="value"))
        return last <= PAGES

    first, rest = written(pages), written(appendix)
    title = next(block["text"] for block in first + rest if block["kind"] == "title")
    place = bisect_left(SIZES, True, hi=len(SIZES) - 1, key=holds) if pages else 0
    return made(typst.compile, SIZES[place], whole=True, format="pdf")


def written(blocks: list[Block]) -> list[dict]:
    """The blocks as JSON values, wide tables in parts, and pictures as SVG."""
    found = []
    for block in blocks:
        for part in narrowed(block) if isinstance(block, Table) else [block]:
            value = dict(vars(part))
            if isinstance(part, Plot):
                value["images"] = part.images["svg"].decode()
            found.append({"kind": part.kind, **shown(value)})
    return found


def narrowed(table: Table) -> list[Table]:
    """Columns beyond a page's width in tables of their own, each with the first column."""
    last = len(table.columns)
    if last <= WIDEST:
        return [table]
    found = []
    for start in range(1, last, WIDEST - 1):
        chosen = [0, *range(start, min(start + WIDEST - 1, last))]
        at = {column: place for place, column in enumerate(chosen)}
        found.append(Table(
            [table.columns[i] for i in chosen],
            [[row[i] for i in chosen] for row in table.rows],
            words=tuple(at[i] for i in table.words if i in at),
            best=[(row, at[i]) for row, i in table.best if i in at],
        ))  # fmt: skip
    return [*found[:-1], replace(found[-1], notes=table.notes)]


def shown(value):
    """A value with its texts as a page can show them: a mean stays beside its ±."""
    if isinstance(value, dict):
        return {name: item if name == "images" else shown(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if not isinstance(value, str):
        return value
    text = plain(shorten(value, LONGEST))
    return UNBROKEN.sub(lambda found: found[0] + "\u200b", text).replace(" ± ", "\u00a0±\u00a0")
