"""How answers end: the shares of those that are empty, in a loop, cut, or go on as somebody else."""

import numpy as np

from harness.metrics import faults
from harness.report.blocks import Block, Heading, Prose, Table
from harness.report.comparison import Comparison
from harness.report.differences import interval
from harness.report.stats import CONFIDENCE
from harness.report.text import number, spread
from harness.report.verdicts import Verdicts
from harness.store import Store

HOW = (
    "What degenerates, and how a model keeps to the chat template: does it stop by itself, or go on as the "
    "user or in template marks? As far as the kept texts tell, which lack special tokens. The references, by "
    "the same criteria, show how often each finds what is no fault."
)
LITTLE = 1.0  # percentage points: a column in which nobody differs by so much is left out


def endings(comparison: Comparison, verdicts: Verdicts, store: Store) -> list[Block]:
    """None for random weights, and where no outputs are left."""
    if comparison.random_weights or not any(t.sums for t in comparison.techniques):
        return []
    found: list[Block] = [Heading("How answers end"), Prose(HOW), shares(comparison, store)]
    against = changes(comparison, verdicts)
    return found + ([against] if against else [])


def shares(comparison: Comparison, store: Store) -> Table:
    metrics, most = faults(comparison.spec.dataset), comparison.spec.hp.max_new_tokens
    rows = [["References", *references(comparison, store)]]
    for technique in comparison.techniques:
        if technique.sums:
            scores = ([float(m.value(seed[m.name].sum(0))) for seed in technique.sums] for m in metrics)
            seeds, answers = len(technique.sums), len(comparison.parts)
            asked = f"{answers:,}" if seeds == 1 else f"{seeds} × {answers:,}"
            rows.append([technique.label, asked, *(spread(s, 1) for s in scores)])
    notes = [f"{m.label}: {m.signature(comparison.spec.dataset)}." for m in metrics]
    if any(m.name == "cut_rate" for m in metrics):
        notes.append(
            f"References are not cut: theirs is the share that is longer than {most} tokens, the limit."
        )
    return Table(["Technique", "Answers", *(f"{m.label} (%)" for m in metrics)], rows, notes)


def references(comparison: Comparison, store: Store) -> list[str]:
    """How many, and the same shares of them, as if they were answers."""
    record = next(t.outputs_of for t in comparison.techniques if t.outputs_of)
    dataset, count = comparison.spec.dataset, len(comparison.parts)
    fitting = (
        np.asarray(comparison.reference_tokens) - 1 <= comparison.spec.hp.max_new_tokens
    )  # less the end mark
    said = [
        output | {"output": output["reference"], "stopped": bool(fits), "new_tokens": 0}
        for output, fits in zip(store.outputs(record, range(count)), fitting, strict=True)
    ]
    totals = (m.value(np.array([m.sums(row, dataset) for row in said]).sum(0)) for m in faults(dataset))
    return [f"{count:,}", *(number(float(total), 1) for total in totals)]


def changes(comparison: Comparison, verdicts: Verdicts) -> Table | None:
    """Against the untouched model, of the shares in which any technique is not nearly as it."""
    pairs = [
        (t, before)
        for t in (*comparison.trained, *comparison.ensembles)
        if t.sums and (before := comparison.before(t))
    ]
    columns, cells = [], [[technique.label] for technique, _ in pairs]
    for standing in verdicts.faults:
        found = [standing.verdict(t.label, before.label).difference for t, before in pairs]
        if any(abs(d.value) >= LITTLE for d in found):
            columns.append(f"{standing.quantity.label} (points)")
            for row, difference in zip(cells, found, strict=True):
                changed = difference.low or difference.high
                row.append(interval(difference, standing.quantity) if changed else number(0, 1))
    if not columns:
        return None
    note = (
        f"Percentage points, with intervals of {CONFIDENCE:.0%} that hold for all techniques of a column at "
        "once: one that excludes 0 is a difference. Of a single seed they speak of other test rows alone."
    )
    return Table(["Against the untouched model", *columns], cells, [note])
