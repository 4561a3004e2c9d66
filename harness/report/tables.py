"""The tables of a comparison: what was measured, as cells of text."""

import numpy as np

from harness.metrics import METRICS, Metric
from harness.record import PHASES, Sizes
from harness.report.blocks import Example, Table
from harness.report.comparison import (
    GIB,
    Comparison,
    Technique,
    seconds,
    step_seconds,
    tokens_per_second,
    watt_hours,
)
from harness.report.prompts import asked
from harness.report.text import UNKNOWN, number, shorten, spread
from harness.store import Store

EXAMPLES = 10  # test rows shown side by side; the brief asks for 5 to 10
LONGEST = 700  # characters of a shown text
TOGETHER = (
    "An ensemble's training time is the sum of its members', its peak memory the highest; it is not ranked."
)
DISTURBED = "* With a run that was disturbed; times of such runs are not ranked."
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def brief(
    comparison: Comparison, chosen: list[Technique], marks: dict[str, str] | None = None, aim: str = ""
) -> Table:
    """The table that the brief asks for, of some rows. `marks`: label -> footnote mark. `aim`: the
    metric of another objective, shown first."""
    metrics = [*([METRICS[aim]] if aim else []), *comparison.metrics]
    rows = []
    for technique in chosen:
        name = technique.label + (marks or {}).get(technique.label, "")
        cells = [f"{name} – {technique.status}" if technique.status else name]
        for metric in metrics:
            cells += before_and_after(comparison, technique, metric)
        cells += [
            spread(comparison.spent(technique, comparison.peak_memory, max)),
            hours(comparison.spent(technique, seconds)) + "*" * disturbed(comparison, technique),
        ]
        rows.append(cells)
    scores = [f"{metric.label} ({when})" for metric in metrics for when in ("before", "after")]
    notes = [DISTURBED] * any(disturbed(comparison, t) for t in chosen)
    notes += [TOGETHER] * any(t.spec.members for t in chosen)
    return Table(["Technique", *scores, comparison.gauge, "Training time (h)"], rows, notes)


def disturbed(comparison: Comparison, technique: Technique) -> bool:
    """An ensemble's time is that of its members."""
    return any(t.disturbed for t in (technique, *comparison.members(technique)) if technique.done)


def before_and_after(comparison: Comparison, technique: Technique, metric: Metric) -> list[str]:
    """Two cells; random weights have no scores worth showing."""
    if comparison.random_weights:
        return [UNKNOWN, UNKNOWN]
    before = comparison.before(technique)
    values = (
        side.values(lambda r: comparison.score(r, metric.name)) if side else []
        for side in (before, technique)
    )
    return [spread(v, metric.decimals) for v in values]


def hours(times: list[float]) -> str:
    """Hours as the brief asks for; in seconds too where hours are too long a unit to read."""
    in_hours = [t / 3600 for t in times]
    if max(in_hours, default=1) >= 0.1:
        return spread(in_hours)
    return f"{spread([float(np.mean(in_hours))])} ({spread(times, 1)} s)"


def quality(comparison: Comparison) -> Table:
    """Scores that are in no difference, and those of the own base of a method that has another one."""
    metrics = [metric for metric in METRICS.values() if not (metric.compared or metric.fault)]
    metrics.remove(METRICS["reward"])  # whichever it is, it is in the first table
    columns = ["Technique", *(f"{m.label} ({when})" for m in metrics for when in ("before", "after"))]
    own = comparison.metrics
    with_own = any(comparison.own_scores(t, m.name) for t in comparison.techniques for m in own)
    if with_own:
        columns += [f"{m.label} (own base)" for m in own]
    rows = []
    for technique in comparison.techniques:
        cells = [technique.label, *(c for m in metrics for c in before_and_after(comparison, technique, m))]
        if with_own:
            cells += [spread(comparison.own_scores(technique, m.name), m.decimals) for m in own]
        rows.append(cells)
    return without_unknown(Table(columns, rows))


def cost(comparison: Comparison) -> Table:
    columns = ["Technique", "Status", "Seeds", "Trainable parameters", "Trainable (%)",
               "Weights (GiB)", "Optimizer state (GiB)", "Saved (GiB)", "Step, median (ms)",
               "Tokens/s", "Energy (Wh)"]  # fmt: skip
    rows = []
    for technique in comparison.techniques:
        sizes = technique.done[0].sizes if technique.done else Sizes()
        parameters, trainable = sizes.parameters, sizes.trainable if technique.spec.trains else None
        held = [sizes.weight_bytes, sizes.optimizer_bytes, sizes.saved_bytes]
        steps = [1000 * s for s in technique.values(step_seconds)] if technique.spec.trains else []
        rows.append([
            technique.label,
            technique.status or "ok",
            f"{len(technique.done)} of {len(technique.records)}",
            number(trainable, 0),
            number(100 * trainable / parameters if trainable and parameters else None, 3),
            *(spread([] if size is None else [size / GIB]) for size in held),
            spread(steps),
            spread(technique.values(tokens_per_second)),
            spread(technique.values(watt_hours)),
        ])  # fmt: skip
    return without_unknown(Table(columns, rows, words=(0, 1)))


def without_unknown(table: Table) -> Table:
    """Less the columns of which nothing is known: a CPU has no allocator, few cards no energy."""
    kept = [i for i in range(len(table.columns)) if any(row[i] != UNKNOWN for row in table.rows)]
    table.columns = [table.columns[i] for i in kept]
    table.rows = [[row[i] for i in kept] for row in table.rows]
    return table


def phases(comparison: Comparison) -> Table:
    """Median seconds and highest peaks over seeds. Also of runs that failed, as far as they came."""
    gauges = {"peak_allocated": "Allocated", "peak_reserved": "Reserved",
              "peak_device": "Device", "peak_host": "Host"}  # fmt: skip
    rows = []
    for technique in comparison.techniques:
        label = technique.label
        for name in PHASES:
            measured = [r.phases[name] for r in technique.records if name in r.phases]
            if not measured:
                continue
            cells = [label, name, number(float(np.median([p.seconds for p in measured])), 2)]
            for gauge in gauges:
                peak = max((p for m in measured if (p := getattr(m, gauge)) is not None), default=None)
                cells.append(number(peak / GIB if peak is not None else None, 3))
            rows.append(cells)
            label = ""
    columns = ["Technique", "Phase", "Seconds", *(f"{name} (GiB)" for name in gauges.values())]
    return without_unknown(Table(columns, rows, words=(0, 1)))


def by_part(comparison: Comparison) -> Table | None:
    """The compared metrics on each part of the test rows, mean over seeds; none for a single part."""
    parts = list(dict.fromkeys(comparison.parts))
    techniques = [t for t in comparison.techniques if t.sums]
    if len(parts) < 2 or not techniques:
        return None
    of_part = {part: np.array(comparison.parts) == part for part in parts}
    cells = []
    for technique in techniques:
        cells.append([technique.label])
        for metric in comparison.metrics:
            for part in parts:
                with np.errstate(over="ignore"):  # a perplexity that no float holds is shown as unknown
                    scores = [
                        float(metric.value(s[metric.name][of_part[part]].sum(0))) for s in technique.sums
                    ]
                cells[-1].append(spread(scores, metric.decimals))
    parts = [f"{part} ({sum(of_part[part])} rows)" for part in parts]
    return Table(["Technique", *(f"{m.label}, {p}" for m in comparison.metrics for p in parts)], cells)


def examples(comparison: Comparison, store: Store) -> list[Example]:
    """The same test rows for all, each method's lowest seed."""
    techniques = [t for t in comparison.techniques if t.outputs_of and t.sums]
    if not techniques:
        return []
    judged = [t for t in techniques if t.spec.trains] or techniques
    rouge = {t.label: METRICS["rouge_l"].value(t.sums[0]["rouge_l"]) for t in techniques}
    quality = np.mean([rouge[t.label] for t in judged], axis=0)
    chosen = choose(comparison.parts, quality, EXAMPLES)
    exact = METRICS["exact_match"] in comparison.metrics
    texts = {technique.label: store.outputs(technique.outputs_of, chosen) for technique in techniques}
    found = []
    for k, i in enumerate(chosen):
        first = texts[techniques[0].label][k]
        answers = [
            (technique.label, f"ROUGE-L {number(rouge[technique.label][i], 3)}"
             + exact * (", right" if technique.sums[0]["exact_match"][i, 0] else ", wrong")
             + ("" if texts[technique.label][k].get("stopped", True) else ", cut at the length limit"),
             shorten(str(texts[technique.label][k].get("output") or ""), LONGEST))
            for technique in techniques
        ]  # fmt: skip
        found.append(
            Example(
                f"{k + 1}. {first.get('id')}",
                shorten(asked(str(first.get("prompt") or "")), LONGEST),
                shorten(str(first.get("reference") or ""), LONGEST),
                answers,
            )
        )
    return found


def choose(parts: list[str], quality: np.ndarray, count: int) -> list[int]:
    """Row indices, equally many of each part, at even quantiles of its quality from low to high."""
    names = list(dict.fromkeys(parts))
    chosen = []
    for place, name in enumerate(names):
        inside = [i for i, part in enumerate(parts) if part == name]
        inside.sort(key=lambda i: (np.nan_to_num(quality[i]), i))
        share = min(len(inside), count // len(names) + (place < count % len(names)))
        chosen += [inside[int((k + 0.5) * len(inside) / share)] for k in range(share)]
    return chosen
