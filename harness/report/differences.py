"""The tables of the verdicts: ranks, differences, and what the same run again makes of them."""

import string
from itertools import chain, combinations, product

import numpy as np

from harness.report.blocks import Table
from harness.report.comparison import Comparison, seconds
from harness.report.stats import Difference
from harness.report.tables import without_unknown
from harness.report.text import UNKNOWN, listed, number
from harness.report.verdicts import MEMORY, TIME, Quantity, Standing, Verdicts

ALL_PAIRS = 6  # techniques of which every pair is shown: 15 lines


def ranks(comparison: Comparison, verdicts: Verdicts) -> list[Table]:
    """The places that the verdicts leave to each technique, a table a group."""
    found = []
    for group, techniques in comparison.groups.items():
        standings = [s for s in (*verdicts.metrics, *verdicts.costs) if len(s.ranked(group)) > 1]
        cells = [[t.label, *(place(s, t.label, group) for s in standings)] for t in techniques]
        columns = [f"Technique{group}", *(f"Rank in {inside(s.quantity.label)}" for s in standings)]
        if standings:
            found.append(Table(columns, cells, words=tuple(range(len(columns)))))
    return found


def inside(label: str) -> str:
    """A label within a sentence: a name stays as it is, a word is small."""
    return label.lower() if label[1:].islower() else label


def place(standing: Standing, label: str, group: str) -> str:
    """`2 to 4 of 9, bc`: techniques that share a letter cannot be told apart."""
    if label not in standing.ranked(group) or standing.ranked(group) == [label]:
        return UNKNOWN
    first, last, of = standing.rank(label, group)
    letters = [letter(i) for i, members in enumerate(standing.alike(group)) if label in members]
    return f"{first}{f' to {last}' * (last > first)} of {of}, {''.join(letters)}"


def letter(i: int) -> str:
    """a to z, then A to Z, then a number."""
    return (string.ascii_letters[i : i + 1]) or f"({i + 1})"


def differences(comparison: Comparison, verdicts: Verdicts) -> list[Table]:
    """Against the untouched model, against each method's own base, and against each other: those of one
    group, and where they are many, all against the first."""
    first = next(iter(verdicts.metrics + verdicts.costs))
    shown = [t for t in comparison.trained if any(t.label in s.entrants for s in verdicts.standings.values())]
    shown.sort(key=lambda t: (not t.ranked, -np.nan_to_num(first.point(t.label), nan=-np.inf)))
    equals = [[t for t in shown if t in group] for group in comparison.groups.values()]
    few = all(len(group) <= ALL_PAIRS for group in equals)
    pairs = [pair for group in equals for pair in combinations(group, 2) if few or pair[0] is group[0]]
    others = list({(a.label, b.label): (a, b) for a, b in pairs}.values())
    title = "Against each other" if few else f"The highest {first.quantity.label} against the others"
    tables = [
        difference_table("Against the untouched model", verdicts.metrics,
                         [(t, comparison.before(t)) for t in shown]),
        difference_table("Against the technique's own base", verdicts.metrics,
                         [(t, comparison.own_base(t)) for t in shown]),
        difference_table(title, verdicts.metrics, others),
        difference_table(f"{title}, in cost", verdicts.costs, others),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def difference_table(title: str, standings: list[Standing], pairs: list[tuple]) -> Table:
    """The pairs of techniques of which any of the standings holds a difference."""
    columns, rows = [title], []
    for standing in standings:
        columns += [standing.quantity.label, "Verdict"]
    for a, b in pairs:
        found = [s.verdict(a.label, b.label) for s in standings] if b else []
        if any(verdict.word for verdict in found):
            cells = [[interval(v.difference, s.quantity), v.word or UNKNOWN]
                     for v, s in zip(found, standings, strict=True)]  # fmt: skip
            rows.append([f"{a.label} − {b.label}", *chain(*cells)])
    return Table(columns, rows, words=tuple(range(0, len(columns), 2)))


def interval(difference: Difference, quantity: Quantity) -> str:
    ends = [difference.value, difference.low, difference.high]
    if not np.isfinite(ends).all():
        return UNKNOWN
    value, low, high = quantity.amounts(*ends, signed=True)
    return f"{value} ({low} to {high})"


def fronts(comparison: Comparison, verdicts: Verdicts) -> list[str]:
    """What is on the front of each score and cost, from the cheapest on; none where no two techniques are
    known to trade one for the other."""
    found = []
    for group, gain, cost in product(comparison.groups, verdicts.metrics, verdicts.costs):
        names = [standing.quantity.name for standing in (cost, gain)]
        if min(len(standing.ranked(group)) for standing in (cost, gain)) < 2:
            continue
        if verdicts.steps(*names, group) and (on := verdicts.front(*names, group)):
            label = f"{gain.quantity.label} against {inside(cost.quantity.label)}{group}"
            found.append(f"{label}: {listed(on)}.")
    return found


def noise_floor(comparison: Comparison) -> Table | None:
    """How far the same run came out apart when it was repeated unchanged."""
    rows = []
    for technique in comparison.techniques:
        for seed in sorted({record.spec.seed for record in technique.repeats}):
            runs = [r for r in technique.done + technique.repeats if r.ok and r.spec.seed == seed]
            if len(runs) > 1:
                cells = [number(apart([comparison.score(r, m.name) for r in runs]), m.decimals)
                         for m in comparison.metrics]  # fmt: skip
                for of in (comparison.peak_memory, seconds):
                    costs = [of(r) for r in runs]
                    share = apart(costs) / min(costs) if all(costs) else None
                    cells.append(UNKNOWN if share is None else f"{share:.1%}")
                rows.append([f"{technique.label} (seed {seed})", str(len(runs)), *cells])
    columns = ["The same run again", "Runs", *(m.label for m in comparison.metrics), MEMORY.label, TIME.label]
    return without_unknown(Table(columns, rows)) if rows else None


def apart(values: list[float | None]) -> float | None:
    """The highest less the lowest."""
    return None if None in values else max(values) - min(values)
