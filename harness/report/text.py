"""Text that strangers wrote made safe to show, and numbers made easy to read.

What a model or a plug-in wrote is shown, never obeyed: no markup, link, mention or control
character of it becomes active in HTML, Markdown or a terminal.
"""

import re
from math import floor, log10
from statistics import fmean, stdev

from harness.plain import listed as listed
from harness.plain import plain as plain
from harness.plain import shorten as shorten

UNKNOWN = "–"  # an en dash: null in a record is never 0

MARKDOWN = re.compile(r"[\\`*_\[\]<>|~$&#]")
BLOCK_START = re.compile(r"^(\s*\d*)([-+=.)])(?=[-+=\s]|$)", re.MULTILINE)  # lists and rules
# GitHub makes links of these even where they are escaped; an invisible word joiner keeps it from it.
LINKS = re.compile(r"@|#(?=\w)|:(?=//)|www(?=\.)", re.IGNORECASE)


def markdown(value) -> str:
    """Text that GitHub-flavoured Markdown shows as it is, anywhere but in code."""
    text = LINKS.sub(lambda found: found[0] + "\u2060", plain(value))
    text = MARKDOWN.sub(lambda found: "\\" + found[0], text)
    return BLOCK_START.sub(r"\1\\\2", text)


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with one of these a cell begins that a spreadsheet computes
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": r"\textasteriskcentered{}",
    "±": r"$\pm$", "−": r"$-$", "–": "--", "…": r"\dots{}", "⟨": r"$\langle$", "⟩": r"$\rangle$",
    "\n": " ", "\t": " ",
}  # fmt: skip


def spreadsheet(value) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe before it says so to them all."""
    text = plain(value)
    return "'" + text if text.lstrip().startswith(FORMULA) else text


def latex(value) -> str:
    """Text that LaTeX sets as it is, outside of mathematics."""
    return "".join(LATEX.get(c, c) for c in plain(value))


def number(value: float | None, decimals: int = 2, signed: bool = False) -> str:
    """With a true minus sign; groups of thousands where decimals no longer say anything, and powers of ten
    where no reader counts digits."""
    if value is None or value != value or abs(value) == float("inf"):
        return UNKNOWN
    decimals = 0 if abs(value) >= 10_000 else decimals
    if abs(value) >= 1e12:
        return f"{value:{'+' if signed else ''}.3g}".replace("-", "−")
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    return text.replace("-", "−")


def spread(values: list[float], decimals: int | None = None) -> str:
    """Mean ± sample standard deviation over seeds; the value alone for a single seed.

    Without `decimals`, three significant digits, and at most four decimals.
    """
    if decimals is None:
        largest = max(map(abs, values), default=0) or 1
        decimals = min(max(2 - floor(log10(largest)), 0), 4)
    if len(values) < 2:
        return number(values[0] if values else None, decimals)
    return f"{number(fmean(values), decimals)} ± {number(stdev(values), decimals)}"


def duration(seconds: float) -> str:
    for limit, unit in ((100, "s"), (6000, "min")):
        if seconds < limit:
            return f"{seconds / (limit / 100):.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def size(gibibytes: float) -> str:
    return f"{gibibytes:.3g} GiB" if gibibytes >= 1 else f"{gibibytes * 1024:.3g} MiB"
