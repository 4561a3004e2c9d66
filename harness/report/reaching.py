"""What it costs to reach a stated share of the best validation loss, from records alone."""

from dataclasses import dataclass

import numpy as np

from harness.record import TRAINING, RunRecord
from harness.report.blocks import Table
from harness.report.comparison import Comparison, Technique, scale_of_time
from harness.report.tables import without_unknown
from harness.report.text import number, spread

SHARE = 0.95  # of the way from the start to the best of all


@dataclass(frozen=True)
class Goal:
    """A validation loss: `SHARE` of the way from `start`, the median of the losses before the first step, to
    `best`, the lowest that any technique of the objective has on the mean over its seeds."""

    start: float
    best: float

    @property
    def loss(self) -> float:
        return self.start - SHARE * (self.start - self.best)

    def way(self, loss: float) -> float:
        """The share of the way that a loss is."""
        return (self.start - loss) / (self.start - self.best)


@dataclass(frozen=True)
class Spent:
    """By a run until a step. `step` lies between two where the loss was reached between two evaluations."""

    step: float
    seconds: float
    joules: float | None
    tokens: float | None


def goal_of(techniques: list[Technique]) -> Goal | None:
    """Of the techniques of one objective. None where it is not what this loss measures, the likelihood of
    references, or where no loss fell."""
    if any(t.objective != "sft" for t in techniques):
        return None
    curves = [[series(r.validation) for r in t.done] for t in techniques]
    starts = [s[0, 1] for seeds in curves for s in seeds if len(s) and s[0, 0] == 0]
    means = [mean_curve(seeds)[1] for seeds in curves if seeds]
    losses = np.concatenate([np.asarray(starts), *means])
    if not np.isfinite(starts).any() or not np.isfinite(losses).any():
        return None
    goal = Goal(float(np.nanmedian(starts)), float(np.nanmin(losses)))
    return goal if goal.best < goal.start else None


def reached(record: RunRecord, loss: float) -> Spent | None:
    """What a run had spent when its validation loss first was no higher, on a straight line between the two
    evaluations around it; None: it never was."""
    points = series(record.validation)
    there = np.flatnonzero(points[:, 1] <= loss)
    if not len(there):
        return None
    (last, before), (step, after) = points[max(there[0] - 1, 0)], points[there[0]]
    if before > after:  # else it starts there, or comes from a loss that is no number
        step = last + (before - loss) / (before - after) * (step - last)
    return spent(record, float(step))


def spent(record: RunRecord, step: float) -> Spent:
    """Attaching, and of the steps' seconds those until this one; of their energy the same share as of their
    time, of their tokens as of their number."""
    clock = np.cumsum([0.0, *record.step_seconds])
    steps = len(record.step_seconds) or max((p["step"] for p in record.training), default=0)
    by_step = min(step / steps, 1.0) if steps else 0.0
    by_time = float(np.interp(step, range(len(clock)), clock) / clock[-1]) if clock[-1] else by_step
    shares = {name: 1.0 if name == "attach" else by_time for name in TRAINING if name in record.phases}
    joules = [j * share for name, share in shares.items() if (j := record.phases[name].joules) is not None]
    tokens = record.tokens
    return Spent(
        step=step,
        seconds=sum(record.phases[name].seconds * share for name, share in shares.items()),
        joules=sum(joules) if len(joules) == len(shares) else None,
        tokens=tokens.trained * by_step + (tokens.attach or 0) if tokens.trained is not None else None,
    )


def cost_to_reach(comparison: Comparison, techniques: list[Technique], goal: Goal) -> Table:
    """A row a technique: the quickest first, then those that with some seeds reach it, then those that never
    do, by how far they come."""
    unit, scale = scale_of_time(comparison)
    rows = []
    for technique in techniques:
        runs = [(record, series(record.validation)) for record in technique.done]
        runs = [(record, points) for record, points in runs if len(points)]
        if not runs:
            continue
        found = [there for record, _ in runs if (there := reached(record, goal.loss))]
        seconds, joules, tokens = (
            [value for there in found if (value := getattr(there, name)) is not None]
            for name in ("seconds", "joules", "tokens")
        )
        far = float(np.mean([goal.way(float(points[-1, 1])) for _, points in runs]))
        order = (-len(found) / len(runs), float(np.mean(seconds)) if seconds else 0.0, -far)
        cells = [
            technique.label,
            f"{len(found)} of {len(runs)}" if found else "never",
            spread([there.step for there in found], 0),
            spread([s / scale for s in seconds]) + "*" * (technique.disturbed and bool(found)),
            spread([j / 3600 for j in joules]),
            spread([n / 1e6 for n in tokens]),
            number(100 * far, 1),
        ]
        rows.append((order, cells))
    rows.sort(key=lambda row: row[0])
    columns = ["Technique", "Seeds that reach it", "Optimizer steps", f"Training time ({unit})",
               "Energy (Wh)", "Tokens (millions)", "At the end (% of the way)"]  # fmt: skip
    return without_unknown(Table(columns, [cells for _, cells in rows]))


def series(points: list) -> np.ndarray:
    """-> (points, 2): step and loss, NaN where the loss is null so that a line breaks there."""
    pairs = [(p.get("step"), p.get("loss")) for p in points]
    return np.array([p for p in pairs if p[0] is not None], dtype=float).reshape(-1, 2)


def mean_curve(seeds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds at the steps that all of them have."""
    by_step = [dict(s) for s in seeds]
    steps = sorted(set.intersection(*map(set, by_step)))
    return np.array(steps), np.array([np.mean([s[step] for s in by_step]) for step in steps])
