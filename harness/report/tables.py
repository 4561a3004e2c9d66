"""The tables of a comparison: what was measured, as cells of text."""

from itertools import combinations

import numpy as np

from harness.metrics import METRICS, Metric, compared
from harness.record import PHASES, Sizes
from harness.report.blocks import Example, Table
from harness.report.rows import (
    GIB,
    Comparison,
    Row,
    seconds,
    step_seconds,
    tokens_per_second,
    watt_hours,
)
from harness.report.stats import Bootstrap, Difference
from harness.report.text import UNKNOWN, number, shorten, spread
from harness.store import Store

EXAMPLES = 10  # test rows shown side by side; the brief asks for 5 to 10
ALL_PAIRS = 6  # techniques of which every pair is shown: 15 lines
LONGEST = 700  # characters of a shown text
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def brief(
    comparison: Comparison, chosen: list[Row], marks: dict[str, str] | None = None, aim: str = ""
) -> Table:
    """The table that the brief asks for, of some rows. `marks`: label -> footnote mark. `aim`: the
    metric of another objective, shown first."""
    metrics = [*([METRICS[aim]] if aim else []), *compared()]
    rows = []
    for row in chosen:
        name = row.label + (marks or {}).get(row.label, "")
        cells = [f"{name} – {row.status}" if row.status else name]
        for metric in metrics:
            cells += before_and_after(comparison, row, metric)
        cells += [spread(row.values(comparison.peak_memory)), hours(row.values(seconds))]
        rows.append(cells)
    scores = [f"{metric.label} ({when})" for metric in metrics for when in ("before", "after")]
    return Table(["Technique", *scores, comparison.gauge, "Training time (h)"], rows)


def before_and_after(comparison: Comparison, row: Row, metric: Metric) -> list[str]:
    """Two cells; random weights have no scores worth showing."""
    if comparison.random_weights:
        return [UNKNOWN, UNKNOWN]
    before = comparison.before(row)
    values = (
        side.values(lambda r: comparison.score(r, metric.name)) if side else [] for side in (before, row)
    )
    return [spread(v, metric.decimals) for v in values]


def hours(times: list[float]) -> str:
    """Hours as the brief asks for; seconds too where hours are too long a unit to read."""
    in_hours = [t / 3600 for t in times]
    if max(in_hours, default=1) >= 0.1:
        return spread(in_hours)
    return f"{spread(in_hours)} ({number(float(np.mean(times)), 1)} s)"


def quality(comparison: Comparison) -> Table:
    """Scores that are in no difference, and those of the own base of a method that has another one."""
    metrics = [metric for metric in METRICS.values() if not metric.compared]
    if comparison.spec.dataset.get("reward", "rouge_l") == "rouge_l":  # it is in the first table
        metrics.remove(METRICS["reward"])
    columns = ["Technique", *(f"{m.label} ({when})" for m in metrics for when in ("before", "after"))]
    own = [*compared(), METRICS["perplexity"]]
    with_own = any(comparison.own_scores(row, m.name) for row in comparison.rows for m in own)
    if with_own:
        columns += [f"{m.label} (own base)" for m in own]
    rows = []
    for row in comparison.rows:
        cells = [row.label, *(c for m in metrics for c in before_and_after(comparison, row, m))]
        if with_own:
            cells += [spread(comparison.own_scores(row, m.name), m.decimals) for m in own]
        rows.append(cells)
    return without_unknown(Table(columns, rows))


def cost(comparison: Comparison) -> Table:
    columns = ["Technique", "Status", "Seeds", "Trainable parameters", "Trainable (%)",
               "Weights (GiB)", "Optimizer state (GiB)", "Saved (GiB)", "Step, median (ms)",
               "Tokens/s", "Energy (Wh)"]  # fmt: skip
    rows = []
    for row in comparison.rows:
        sizes = row.done[0].sizes if row.done else Sizes()
        parameters, trainable = sizes.parameters, sizes.trainable if row.spec.trains else None
        held = [sizes.weight_bytes, sizes.optimizer_bytes, sizes.saved_bytes]
        steps = [1000 * s for s in row.values(step_seconds)] if row.spec.trains else []
        rows.append([
            row.label,
            row.status or "ok",
            f"{len(row.done)} of {len(row.records)}",
            number(trainable, 0),
            number(100 * trainable / parameters if trainable and parameters else None, 3),
            *(spread([] if size is None else [size / GIB]) for size in held),
            spread(steps),
            spread(row.values(tokens_per_second)),
            spread(row.values(watt_hours)),
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
    for row in comparison.rows:
        label = row.label
        for name in PHASES:
            measured = [r.phases[name] for r in row.records if name in r.phases]
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


def bootstrap(comparison: Comparison) -> Bootstrap | None:
    """Over all rows whose test outputs are there; none where fewer than two are."""
    runs = {row.label: row.sums for row in comparison.rows if row.sums}
    return Bootstrap(runs) if len(runs) > 1 and not comparison.random_weights else None


def differences(comparison: Comparison, sample: Bootstrap) -> list[Table]:
    """Against the untouched model, against each method's own base, and against each other: those of one
    objective, and where they are many, all against the first."""
    rows = [row for row in comparison.trained if row.sums]
    first = compared()[0]
    rows.sort(key=lambda row: -sample.point(first.name, row.label))
    equals = [[row for row in rows if row in group] for group in comparison.objectives.values()]
    few = all(len(group) <= ALL_PAIRS for group in equals)
    others = [pair for group in equals for pair in combinations(group, 2) if few or pair[0] is group[0]]
    sides = {
        "Against the untouched model": [(row, comparison.before(row)) for row in rows],
        "Against the technique's own base": [(row, comparison.own_base(row)) for row in rows],
        "Against each other" if few else f"The highest {first.label} against the others": others,
    }
    return [
        difference_table(title, sample, known)
        for title, pairs in sides.items()
        if (known := [(a, b) for a, b in pairs if b and b.sums])
    ]


def difference_table(title: str, sample: Bootstrap, pairs: list[tuple[Row, Row]]) -> Table:
    """Only what may be ranked has a verdict, and counts among the verdicts to correct for."""
    ranked = [pair for pair in pairs if not unranked(*pair)]
    columns, cells = [title], [[f"{a.label} − {b.label}"] for a, b in pairs]
    for metric in compared():
        columns += [metric.label, "Verdict"]
        verdicts = sample.differences(metric.name, [(a.label, b.label) for a, b in ranked])
        verdicts = {id(pair): d for pair, d in zip(ranked, verdicts, strict=True)}
        for pair, row in zip(pairs, cells, strict=True):
            found = verdicts.get(id(pair)) or sample.difference(metric.name, *(r.label for r in pair))
            row += [interval(found, metric.decimals), unranked(*pair) or verdict(found)]
    return Table(columns, cells, words=tuple(range(0, len(columns), 2)))


def unranked(a: Row, b: Row) -> str:
    """Why a pair is not ranked, or nothing. An untouched model has no seeds to vary."""
    for row in (a, b):
        if row.spec.trains and not row.ranked:
            return f"no ranking: {row.unranked_because}"
    return ""


def verdict(difference: Difference) -> str:
    if difference.p != difference.p:
        return UNKNOWN
    word = ("higher" if difference.value > 0 else "lower") if difference.separable else "tied"
    return f"{word}, {'p < 0.001' if difference.p < 0.001 else f'p = {difference.p:.3f}'}"


def interval(difference: Difference, decimals: int) -> str:
    value, low, high = (
        number(v, decimals, signed=True) for v in (difference.value, difference.low, difference.high)
    )
    return f"{value} ({low} to {high})" if value != UNKNOWN else UNKNOWN


def by_part(comparison: Comparison) -> Table | None:
    """The compared metrics on each part of the test rows, mean over seeds; none for a single part."""
    parts = list(dict.fromkeys(comparison.parts))
    rows = [row for row in comparison.rows if row.sums]
    if len(parts) < 2 or not rows:
        return None
    of_part = {part: np.array(comparison.parts) == part for part in parts}
    cells = []
    for row in rows:
        cells.append([row.label])
        for metric in compared():
            for part in parts:
                scores = [float(metric.value(s[metric.name][of_part[part]].sum(0))) for s in row.sums]
                cells[-1].append(spread(scores, metric.decimals))
    parts = [f"{part} ({sum(of_part[part])} rows)" for part in parts]
    return Table(["Technique", *(f"{m.label}, {p}" for m in compared() for p in parts)], cells)


def examples(comparison: Comparison, store: Store) -> list[Example]:
    """The same test rows for all, each method's lowest seed."""
    rows = [row for row in comparison.rows if row.outputs_of and row.sums]
    if not rows:
        return []
    judged = [row for row in rows if row.spec.trains] or rows
    rouge = {row.label: METRICS["rouge_l"].value(row.sums[0]["rouge_l"]) for row in rows}
    quality = np.mean([rouge[row.label] for row in judged], axis=0)
    chosen = choose(comparison.parts, quality, EXAMPLES)
    texts = {}
    for row in rows:
        outputs = store.outputs(row.outputs_of)
        texts[row.label] = [outputs[i] for i in chosen]
    found = []
    for k, i in enumerate(chosen):
        first = texts[rows[0].label][k]
        answers = [
            (row.label, f"ROUGE-L {number(rouge[row.label][i], 3)}"
             + ("" if texts[row.label][k].get("stopped", True) else ", cut at the length limit"),
             shorten(str(texts[row.label][k].get("output") or ""), LONGEST))
            for row in rows
        ]  # fmt: skip
        found.append(
            Example(
                f"{k + 1}. {first.get('id')}",
                shorten(str(first.get("prompt") or ""), LONGEST),
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
