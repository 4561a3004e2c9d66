"""The results of a comparison as a terminal shows them: as many columns as fit its width.

What has no room is named below the table, and stands in the report. Numbers are never wrapped, names are.
"""

import textwrap
from collections.abc import Iterator
from io import StringIO
from math import inf

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from harness.metrics import METRICS, Metric
from harness.report.comparison import Comparison, Technique, seconds
from harness.report.tables import DISTURBED, TOGETHER, before_and_after, disturbed
from harness.report.text import UNKNOWN, listed, plain, spread

NARROWEST = 22  # characters of a name in a line: of fewer, words are broken
WIDEST = 10**4  # more than any table takes
SPACE = ((2**-10, "MiB"), (1, "GiB"))  # GiB of each
TIMES = ((1, "s"), (60, "min"), (3600, "h"))
ARROW = {"higher": " ↑", "lower": " ↓"}
Column = tuple[str, list[str]]  # its head, a cell each row


def results(comparison: Comparison, width: int) -> str:
    """A row a technique: the untouched models, then those of each objective, the best mean first."""
    rows = ordered(comparison)
    names = [plain(t.label + f" – {t.status}" * bool(t.status)) for t in rows]
    console = Console(file=StringIO(), width=width, color_system=None, legacy_windows=False)
    room = console.options.update(max_width=WIDEST)
    made = [(drawn(names, columns), left_out) for columns, left_out in layouts(comparison, rows)]
    needs = [Measurement.get(console, room, table).minimum for table, _ in made]
    chosen = next((i for i, least in enumerate(needs) if least <= width), -1)
    table, left_out = made[chosen]
    console.width = max(width, needs[chosen])
    console.print(table)
    notes = ["↑ higher, ↓ lower is better. Memory is the peak of training."] * (len(table.columns) > 1)
    notes += [f"No room here, but in the report: {listed(left_out, 99)}."] * bool(left_out)
    notes += [TOGETHER] * any(t.spec.members for t in rows)
    notes += [DISTURBED] * any(disturbed(comparison, t) for t in rows)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join([*lines, *[""] * bool(notes), *(textwrap.fill(note, width) for note in notes)])


def drawn(names: list[str], columns: list[Column]) -> Table:
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    made.add_column("Technique", overflow="fold", min_width=min(NARROWEST, max(map(len, names))))
    for head, own in columns:
        wide = max(map(len, [*head.split("\n"), *own]))
        made.add_column(Text(head), justify="right", min_width=wide)
    for cells in zip(names, *(own for _, own in columns), strict=True):
        made.add_row(*map(Text, cells))
    return made


def ordered(comparison: Comparison) -> list[Technique]:
    found = list(comparison.bases)
    for members in comparison.tables.values():
        lead = comparison.metrics[0] if members[0].objective == "sft" else METRICS[members[0].aim]
        sign = -1 if lead.better == "higher" else 1

        def place(technique: Technique, lead: Metric = lead, sign: int = sign) -> float:
            mean = technique.mean(lambda r: comparison.score(r, lead.name))
            return inf if mean is None else sign * mean

        found += sorted(members, key=place)
    return found


def layouts(comparison: Comparison, rows: list[Technique]) -> Iterator[tuple[list[Column], list[str]]]:
    """From the widest to the narrowest: the columns, and what is not in them."""
    aims = dict.fromkeys(METRICS[t.aim] for t in comparison.trained if t.objective != "sft")
    pairs = {
        m.name: [before_and_after(comparison, t, m) for t in rows]
        for m in dict.fromkeys([*comparison.metrics, *aims])
    }
    metrics = [METRICS[name] for name, cells in pairs.items() if any(now != UNKNOWN for _, now in cells)]
    before = [(f"{m.label}\nbefore", [was for was, _ in pairs[m.name]]) for m in metrics]
    after = [(m.label + ARROW[m.better], [now for _, now in pairs[m.name]]) for m in metrics]
    both = [(f"{head}\nafter", cells) for head, cells in after]
    spreads, means = costs(comparison, rows), [bare(column) for column in costs(comparison, rows)]
    yield [column for pair in zip(before, both, strict=True) for column in pair] + spreads, []
    yield after + spreads, []  # before: the untouched model's row
    yield after + means, ["± of memory and time"] * (means != spreads)
    for n in range(len(after), min(len(after), 1) - 1, -1):
        lost = ["±"] + [m.label for m in metrics[n:]]
        yield [bare(column) for column in after[:n]] + means, lost


def bare(column: Column) -> Column:
    head, cells = column
    return head, [cell.partition(" ±")[0] for cell in cells]


def costs(comparison: Comparison, rows: list[Technique]) -> list[Column]:
    """Peak memory and training time, each in the unit that suits most of them."""
    found = []
    of: dict[str, tuple] = {
        "Memory": (comparison.peak_memory, max, SPACE), "Time": (seconds, sum, TIMES)
    }  # fmt: skip
    for name, (gauge, together, units) in of.items():
        values = [comparison.spent(technique, gauge, together) for technique in rows]
        most = max((value for own in values for value in own), default=0)
        size, unit = next((u for u in reversed(units) if most >= u[0]), units[0])
        cells = [spread([value / size for value in own]) for own in values]
        if name == "Time":
            marks = ["*" * disturbed(comparison, t) for t in rows]
            cells = [mark + cell for mark, cell in zip(marks, cells, strict=True)]
        found += [(f"{name} ↓\n({unit})", cells)] * (most > 0)
    return found
