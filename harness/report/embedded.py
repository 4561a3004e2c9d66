"""What the script of an HTML report shows, as JSON values: scores and costs, who fits a budget, learning
curves and test rows with their answers. It decides nothing: verdicts and needs come from here.
"""

import json
from itertools import product
from math import inf
from typing import Any

import numpy as np

from harness.metrics import METRICS
from harness.plain import plain, shorten
from harness.report import plots
from harness.report.budget import Budget, measured
from harness.report.comparison import Comparison, Technique
from harness.report.decision import Choice, leading
from harness.report.export import quantities
from harness.report.prompts import asked
from harness.report.tables import choose
from harness.report.verdicts import Verdicts
from harness.store import Store

SAMPLES = 300_000  # bytes of test rows in a page
LONGEST = 4_000  # characters of a shown text
TRIED = 50  # rows, whose size says how many there is room for
POINTS = 200  # of a learning curve
LEAST = 1e-9  # bytes, or seconds, into which nothing fits
BUDGETS = 2000  # that are decided beforehand, of each group: of some forty techniques


def embedded(
    comparison: Comparison, verdicts: Verdicts, store: Store, budget: Budget | None = None
) -> dict[str, Any]:
    """Texts of strangers are made plain, as those of the page itself. `budget`: that the page begins with."""
    value = {
        "techniques": [technique(comparison, t) for t in comparison.techniques],
        "groups": [group(comparison, verdicts, name) for name in comparison.groups],
        "budget": typed(budget or Budget()),
        "measured": measured(comparison, Budget(LEAST, LEAST)),
        "leading": first.quantity.name if (first := leading(comparison, verdicts)) else None,
        "curves": curves(comparison),
        "samples": None if comparison.random_weights else samples(comparison, store),
    }
    return shown(value)


def shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain(name): shown(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return plain(value) if isinstance(value, str) else value


def technique(comparison: Comparison, which: Technique) -> dict[str, Any]:
    """Means and sample standard deviations over seeds, in the units that report.json has."""
    look = plots.looks(comparison).get(which.spec.method, {})
    return {
        "label": which.label,
        "method": which.spec.method,
        "status": which.status or "ok",
        "color": look.get("color", ""),
        "marker": look.get("marker", ""),
        "hollow": comparison.untuned(which),
        "base": not which.spec.trains,
        "quantities": quantities(comparison, which),
    }


def group(comparison: Comparison, verdicts: Verdicts, name: str) -> dict[str, Any]:
    """`needs`: bytes and seconds of a run, null where they were not measured. `within`: what the decision
    says, by who of `done` fits, as `0,2,3`: `gains`, how a larger budget for another one is told. Empty where
    there would be more of these than a page has room for."""
    choice = Choice(comparison, verdicts, Budget(), name)
    needs = list(choice.needs.values())
    limits = [sorted({getattr(n, of) for n in needs} - {None}) for of in ("memory", "seconds")]
    within: dict[str, Any] = {}
    if (len(limits[0]) + 2) * (len(limits[1]) + 2) <= BUDGETS:
        for memory, seconds in product(*([LEAST, *known, inf] for known in limits)):
            budget = Budget(memory, seconds)
            fits = [str(i) for i, n in enumerate(needs) if not (n.over(budget) or n.unknown(budget))]
            if (key := ",".join(fits)) not in within:
                within[key] = told(Choice(comparison, verdicts, budget, name))
    return {
        "name": name,
        "done": list(choice.needs),
        "broken": choice.broken(),
        "within": within,
        "needs": {label: {"memory": n.memory, "seconds": n.seconds} for label, n in choice.needs.items()},
    }


def told(choice: Choice) -> dict[str, Any]:
    return {
        "first": choice.first(),
        "merits": choice.merits(),
        "gains": {name: gain for name in choice.over if (gain := choice.gain(name))},
        "none": choice.dearer() if choice.fit and not any(map(choice.gain, choice.over)) else "",
        "changes": choice.other_changes(),
    }


def typed(budget: Budget) -> dict[str, str]:
    """As somebody would type it into the page."""
    size, unit = (2**30, "GiB") if budget.binary else (10**9, "GB")
    return {
        "memory": f"{budget.memory / size:.9g} {unit}" if budget.memory < inf else "",
        "seconds": f"{budget.seconds / 3600:.9g} h" if budget.seconds < inf else "",
    }


def curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Means over seeds at the steps that all of them have. -> [{objective, kind, label, steps, losses}]"""
    found = []
    for technique in comparison.trained:
        for kind in ("training", "validation"):
            seeds = [
                {p["step"]: p["loss"] for p in getattr(r, kind) if p.get("loss") is not None}
                for r in technique.done
            ]
            steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
            if steps:
                losses = [float(np.mean([seed[step] for seed in seeds])) for step in steps]
                parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
                found.append({
                    "objective": technique.objective,
                    "kind": kind,
                    "label": technique.label,
                    "steps": [float(np.mean([steps[i] for i in part])) for part in parts],
                    "losses": [float(np.mean([losses[i] for i in part])) for part in parts],
                })  # fmt: skip
    return found


def samples(comparison: Comparison, store: Store) -> dict[str, Any] | None:
    """As many test rows as there is room for, spread over parts and quality as the examples are; each answer
    with its ROUGE-L and whether it ended by itself."""
    techniques = [t for t in comparison.techniques if t.outputs_of and t.sums]
    if not techniques:
        return None
    rouge = {t.label: METRICS["rouge_l"].value(t.sums[0]["rouge_l"]) for t in techniques}
    quality = np.mean(list(rouge.values()), axis=0)
    total = len(comparison.parts)

    def rows(chosen: list[int]) -> list[dict[str, Any]]:
        outputs = [store.outputs(t.outputs_of, chosen) for t in techniques if t.outputs_of]
        return [
            {
                **question(outputs[0][k]),
                "answers": [
                    [shorten(str(own[k].get("output") or ""), LONGEST), round(float(rouge[t.label][i]), 3),
                     bool(own[k].get("stopped", True))]
                    for t, own in zip(techniques, outputs, strict=True)
                ],
            }
            for k, i in enumerate(chosen)
        ]  # fmt: skip

    def size(row: dict[str, Any]) -> int:
        return len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))

    found = rows(choose(comparison.parts, quality, min(total, TRIED)))
    if found and len(found) < total:
        room = int(SAMPLES * len(found) / sum(map(size, found)))
        found = rows(sorted(choose(comparison.parts, quality, min(total, room))))
    sizes = list(map(size, found))
    while sum(sizes) > SAMPLES:
        found.pop(len(found) // 2)
        sizes.pop(len(sizes) // 2)
    return {"labels": [t.label for t in techniques], "total": total, "rows": found}


def question(output: dict) -> dict[str, Any]:
    """`raw`: the prompt as the model was given it, where that is not what is shown."""
    prompt = str(output.get("prompt") or "")
    raw = {} if asked(prompt) == prompt else {"raw": shorten(prompt, LONGEST)}
    return {
        "id": str(output.get("id")),
        "part": str(output.get("part")),
        "prompt": shorten(asked(prompt), LONGEST),
        **raw,
        "reference": shorten(str(output.get("reference") or ""), LONGEST),
    }
