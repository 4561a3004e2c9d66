"""A report for programs: tidy CSV, JSON with the verdicts, and the brief's table in LaTeX.

Numbers are raw: bytes, seconds, joules, full precision. What is not known is empty in CSV and null in JSON.
`SCHEMA` is raised when a name or a meaning changes, not when something is added.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

import numpy as np

from harness import __version__
from harness.metrics import METRICS
from harness.record import NEEDED, RunRecord, finite
from harness.report.answer import answer
from harness.report.budget import Budget
from harness.report.comparison import (
    GIB,
    Comparison,
    Technique,
    seconds,
    step_seconds,
    tokens_per_second,
    watt_hours,
)
from harness.report.decision import Choice, choices_of
from harness.report.results import ordered
from harness.report.tables import brief
from harness.report.tasks import asked_of
from harness.report.text import latex, spreadsheet
from harness.report.verdicts import Verdicts
from harness.store import Store

SCHEMA = 1
COLUMNS = (
    "comparison", "model", "dataset", "technique", "method", "objective", "tuned", "status", "quantity",
    "label", "unit", "better", "n", "mean", "sd", "before_n", "before_mean", "before_sd", "test_rows",
    "disturbed",
)  # fmt: skip
Judged = list[tuple[Comparison, Verdicts]]  # `judged` before


@dataclass(frozen=True)
class Cost:
    """What a run took: `of` a record, null where it is not known."""

    name: str
    label: str
    unit: str
    better: str  # empty: neither
    of: Callable[[RunRecord], float | None]
    together: Callable[[list], float] | None = None  # of an ensemble's members; none: it has its own


def joules(record: RunRecord) -> float | None:
    hours = watt_hours(record)
    return None if hours is None else hours * 3600


def trainable(record: RunRecord) -> float | None:
    return record.sizes.trainable if record.spec.trains else None


def costs(comparison: Comparison) -> list[Cost]:
    """The first two are what the brief's table shows."""

    def peak(record: RunRecord) -> float | None:
        gibibytes = comparison.peak_memory(record)
        return None if gibibytes is None else gibibytes * GIB

    def device(record: RunRecord) -> float | None:
        return record.peak("peak_device", NEEDED) if record.spec.trains else None

    return [
        Cost("peak_memory", comparison.gauge.partition(" (")[0], "bytes", "lower", peak, max),
        Cost("seconds", "Training time", "seconds", "lower", seconds, sum),
        Cost("device_memory", "Device memory, highest phase", "bytes", "lower", device, max),
        Cost("energy", "Energy of the card while training", "joules", "lower", joules, sum),
        Cost("step_seconds", "Step, median", "seconds", "lower", step_seconds),
        Cost("tokens_per_second", "Tokens per second", "tokens/second", "higher", tokens_per_second),
        Cost("trainable", "Trainable parameters", "parameters", "", trainable),
        Cost("saved", "Saved", "bytes", "lower", lambda record: record.sizes.saved_bytes),
    ]


def summary(values: list[float]) -> dict[str, Any]:
    """Over seeds: how many, their mean, and their sample standard deviation, unknown for a single one."""
    known = [float(value) for value in values if np.isfinite(value)]
    return {
        "n": len(known),
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
    }


def quantities(comparison: Comparison, technique: Technique) -> list[dict[str, Any]]:
    """All that was measured of a technique, each with its unit and direction; scores with those before."""
    found = []
    before = comparison.before(technique)
    for metric in () if comparison.random_weights else METRICS.values():

        def of(record: RunRecord, name: str = metric.name) -> float | None:
            return comparison.score(record, name)

        said = {"quantity": metric.name, "label": metric.label, "unit": metric.unit, "better": metric.better}
        after, was = technique.values(of), before.values(of) if before else []
        if after or was:
            found.append({**said, **summary(after), "before": summary(was)})
    for cost in costs(comparison):
        values = (
            comparison.spent(technique, cost.of, cost.together)
            if cost.together
            else technique.values(cost.of)
        )
        if values:
            told = {name: getattr(cost, name) or None for name in ("label", "unit", "better")}
            found.append({"quantity": cost.name, **told, **summary(values), "before": None})
    return found


def tasks(comparison: Comparison, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Label -> what lm-evaluation-harness has measured of a technique, as `quantities` are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for label, name, score, by in asked_of(comparison, store):
        better = {True: "higher", False: "lower", None: None}[score["higher_is_better"]]
        told = {"quantity": name, "label": label, "unit": None, "better": better}
        of = {technique.label: summary([one["value"] for one in seeds]) for technique, seeds in by.items()}
        for technique in by:
            base = comparison.before(technique)
            said = {**told, **of[technique.label], "before": of.get(base.label) if base else None}
            found.setdefault(technique.label, []).append(said)
    return found


def write_csv(judged: Judged, store: Store) -> str:
    """A row a technique and quantity: RFC 4180, with a header."""
    file = io.StringIO()
    rows = csv.DictWriter(file, COLUMNS, lineterminator="\r\n")
    rows.writeheader()
    for number, (comparison, _) in enumerate(judged, 1):
        asked = tasks(comparison, store)
        for technique in comparison.techniques:
            shared: dict[str, Any] = {
                "comparison": number,
                "model": comparison.spec.model,
                "dataset": comparison.spec.dataset.get("name"),
                "test_rows": len(comparison.parts) or None,
                **about(technique),
            }
            for found in [*quantities(comparison, technique), *asked.get(technique.label, [])]:
                was = found.pop("before") or {}
                row = shared | found | {f"before_{name}": value for name, value in was.items()}
                rows.writerow({name: cell(value) for name, value in row.items()})
    return file.getvalue()


def cell(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return spreadsheet(value)
    return "" if value is None else repr(value)


def about(technique: Technique) -> dict[str, Any]:
    return {
        "technique": technique.label,
        "method": technique.spec.method,
        "objective": technique.objective if technique.spec.trains else None,
        "tuned": technique.tuned,
        "status": technique.status or "ok",
        "disturbed": technique.disturbed,
    }


def write_json(
    judged: Judged, store: Store, corrupt: list[str], now: str, budget: Budget | None = None
) -> str:
    """ASCII alone, so that no character of it acts on a terminal."""
    value = {
        "schema": SCHEMA,
        "tuneoff": __version__,
        "rendered": now,
        "comparisons": [as_json(comparison, verdicts, store, budget) for comparison, verdicts in judged],
        "corrupt": corrupt,
    }
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def as_json(
    comparison: Comparison, verdicts: Verdicts, store: Store, budget: Budget | None
) -> dict[str, Any]:
    spec, asked = comparison.spec, tasks(comparison, store)
    return {
        "title": comparison.title,
        "model": spec.model,
        "dataset": spec.dataset,
        "hyperparameters": asdict(spec.hp),
        "test_rows": len(comparison.parts) or None,
        "answer": answer(comparison, verdicts),
        "decision": [decided(choice) for choice in choices_of(comparison, verdicts, budget)],
        "warnings": comparison.warnings,
        "techniques": [
            {
                **about(t),
                "title": t.card.get("title"),
                "paper": t.card.get("paper"),
                "options": t.spec.options,
                "own_hyperparameters": t.spec.changes,
                "overrides": t.newest.overrides,
                "groups": [name.strip() for name in comparison.groups_of(t)],
                "runs": [
                    {"run": r.spec.folder, "seed": r.spec.seed, "status": r.status, "error": r.error,
                     "scores": r.scores} for r in t.records
                ],
                "quantities": [*quantities(comparison, t), *asked.get(t.label, [])],
            }
            for t in comparison.techniques
        ],
        "verdicts": [verdict for standing in verdicts.standings.values() for verdict in pairs(standing)],
    }  # fmt: skip


def decided(choice: Choice) -> dict[str, Any]:
    """Of one group; `take`: any of these is the answer, `tied`: for the best score. Bytes and seconds, null:
    no limit."""
    budget = choice.budget
    return {
        "group": choice.group.strip(),
        "budget": {"memory": budget.memory, "seconds": budget.seconds},
        "lead": choice.lead(),
        "take": choice.take,
        "tied": choice.top,
        "dominated": choice.beaten,
        "does_not_fit": choice.over,
        "not_measured": choice.unknown,
        "reasons": choice.reasons(),
        "changes": choice.changes(),
    }


def pairs(standing) -> list[dict[str, Any]]:
    """Of each pair: `difference` and its interval are of a less b; where `ratio`, a over b."""
    found, quantity = [], standing.quantity
    for one, other in sorted(standing.pairs):
        verdict = standing.verdict(one, other)
        d = verdict.difference
        ends = [d.value, d.low, d.high]
        value, low, high = np.exp(np.clip(ends, -700, 700)).tolist() if quantity.ratio else map(float, ends)
        found.append({
            "quantity": quantity.name, "better": quantity.better, "a": one, "b": other,
            "ratio": quantity.ratio, "difference": value, "low": low, "high": high,
            "verdict": verdict.word or None,
        })  # fmt: skip
    return found


def write_latex(judged: Judged) -> str:
    """A `table` an objective, to be read with `\\input`; it takes the packages booktabs
    and graphicx."""
    found = [
        "% Made by Tuneoff. Needs \\usepackage{booktabs,graphicx}; \\input it where the table shall stand."
    ]
    for number, (comparison, verdicts) in enumerate(judged, 1):
        for objective, members in comparison.tables.items() or [("", [])]:
            label = f"tab:tuneoff-{number}" + f"-{objective}" * (objective not in ("", "sft"))
            found.append(tabular(comparison, verdicts, members, label))
    return "\n".join(found)


def tabular(comparison: Comparison, verdicts: Verdicts, members: list[Technique], label: str) -> str:
    """With the brief's columns, best first, direction in the head, n and ± in the caption."""
    aim = members[0].aim if members else ""
    aim = "" if aim in {metric.name for metric in comparison.metrics} else aim
    made = brief(comparison, ordered(comparison, verdicts, members, comparison.bases)[0], aim=aim)
    seeds = sorted({len(t.done) for t in members})
    n = f"${seeds[0]}$" + f" to ${seeds[-1]}$" * (seeds[-1:] != seeds[:1]) if seeds else "$0$"
    rows = f" on {len(comparison.parts):,} test rows" if comparison.parts else ""
    caption = (
        f"{latex(comparison.title + rows)}: means $\\pm$ sample standard deviation over {n} seeds. Arrows "
        "point to the better side. Before: the untouched model. 1 GiB is $2^{30}$ bytes."
    )
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{' '.join([caption, *map(latex, made.notes)])}}}",
        f"\\label{{{''.join(c for c in label if c.isascii() and (c.isalnum() or c in ':-'))}}}",
        "\\resizebox{\\linewidth}{!}{%",
        f"\\begin{{tabular}}{{l{'r' * (len(made.columns) - 1)}}}",
        "\\toprule",
        *heads(made.columns),
        "\\midrule",
        *(" & ".join(map(latex, row)) + " \\\\" for row in made.rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table}",
        "",
    ]
    return "\n".join(lines)


def heads(columns: list[str]) -> list[str]:
    """Two lines: what a column is with the better side, above its unit or `before` and `after`."""
    better = {m.label: m.better for m in METRICS.values()}
    arrows = {"higher": " $\\uparrow$", "lower": " $\\downarrow$"}
    named = [column.rstrip(")").partition(" (") for column in columns[1:]]
    upper, rules, place = [""], [], 2
    for name, same in groupby(name for name, _, _ in named):
        wide = len(list(same))
        title = latex(name) + arrows[better.get(name, "lower")]
        upper.append(f"\\multicolumn{{{wide}}}{{{'c' if wide > 1 else 'r'}}}{{{title}}}")
        rules += [f"\\cmidrule(lr){{{place}-{place + wide - 1}}}"] * (wide > 1)
        place += wide
    lower = [latex(columns[0]), *(latex(unit) for _, _, unit in named)]
    return [" & ".join(upper) + " \\\\", " ".join(rules), " & ".join(lower) + " \\\\"]
