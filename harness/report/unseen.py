"""Parts of the data that no technique was trained on: what it learned for them, and what it forgot."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from harness.metrics import METRICS, Metric
from harness.report.blocks import Block, Heading, Prose, Table
from harness.report.comparison import Comparison, Technique
from harness.report.differences import interval
from harness.report.stats import CONFIDENCE
from harness.report.text import spread
from harness.report.verdicts import Quantity, Standing, entrant, sample_of
from harness.store import UNSEEN, Store, Tested

HOW = (
    "Parts that are only tested: no row of them was trained or validated on, and rows that ask the same, or "
    "texts and answers that hold the same passages, were left out of the training. A gain here generalises "
    "beyond the data; a perplexity of general text that rises is what was forgotten."
)
NOTE = (
    f"Change: against the untouched model, with intervals of {CONFIDENCE:.0%} that hold for all of a "
    "column at once: one that excludes 0 is a difference. Of a single seed they speak of other rows alone."
)
Seeds = list[dict[str, np.ndarray]]  # of each seed, by metric (rows, width)


def unseen(comparison: Comparison, store: Store) -> list[Block]:
    """None where every part was trained on, and for random weights."""
    read = {} if comparison.random_weights else tested(comparison, store)
    if not read:
        return []
    found: list[Block] = [Heading("On data that nothing was trained on"), Prose(HOW)]
    described = {part["name"]: part for part in comparison.spec.dataset["parts"]}
    parts = next(iter(read.values()))[0].parts
    for name in dict.fromkeys(parts):
        rows, part = np.array(parts) == name, described[name]
        of_part = {
            technique: [{metric: sums[rows] for metric, sums in seed.sums.items()} for seed in seeds]
            for technique, seeds in read.items()
        }
        asked = [METRICS["perplexity"]] if part["format"] == "text" else comparison.metrics
        titled = f" ({part['title']})" if part.get("title") not in (None, "", name) else ""
        found += [Prose(f"{name}{titled}, {rows.sum():,} rows:"), scores(comparison, of_part, asked)]
    return found


def tested(comparison: Comparison, store: Store) -> dict[Technique, list[Tested]]:
    """Of those that were tested on them with every seed, on the same rows."""
    found = {t: [store.tested(record, UNSEEN) for record in t.done] for t in comparison.techniques}
    whole = {t: [s for s in seeds if s] for t, seeds in found.items() if seeds and all(seeds)}
    rows = {seed.rows for seeds in whole.values() for seed in seeds}
    return whole if len(rows) == 1 else {}


def scores(comparison: Comparison, read: dict[Technique, Seeds], metrics: list[Metric]) -> Table:
    columns, cells = ["Technique"], [[technique.label] for technique in read]
    for metric in metrics:
        standing = against_untouched(comparison, read, metric)
        columns += [metric.label, f"{metric.label}, change"]
        for row, (technique, seeds) in zip(cells, read.items(), strict=True):
            values = [float(metric.value(seed[metric.name].sum(0))) for seed in seeds]
            before: Any = comparison.before(technique)
            row += [spread(values, metric.decimals), ""]
            if before in read and before is not technique:
                row[-1] = interval(
                    standing.verdict(technique.label, before.label).difference, standing.quantity
                )
    return Table(columns, cells, [NOTE])


def against_untouched(comparison: Comparison, read: dict[Technique, Seeds], metric: Metric) -> Standing:
    """Each technique against the untouched model alone."""
    of = partial(entrant, comparison)
    entrants = [
        of(t, sample_of(metric, [seed[metric.name] for seed in seeds]), (comparison.before(t),))
        for t, seeds in read.items()
    ]
    return Standing(Quantity.of(metric), [replace(one, groups=()) for one in entrants])
