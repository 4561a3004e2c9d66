"""What changes with the steps of a training, and with its learning rate."""

from statistics import mode

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.metrics import Metric
from harness.plain import plain
from harness.report.comparison import Comparison, Technique, score
from harness.report.plots.labels import name_ends, settle_ends
from harness.report.plots.style import (
    BRIEF,
    INK,
    NAME,
    WIDTHS,
    drawn,
    lay_out,
    logarithmic,
    looks,
    name_of,
    short,
    sized,
)
from harness.report.reaching import SHARE, goal_of, mean_curve, series
from harness.spec import digest
from harness.tuning import Found

CROWD = 6  # techniques in a plot of curves: single seeds of more hide the means
POINTS = 200  # of a line, at most: a smooth one shows no more


def judged_by(comparison: Comparison) -> list[str]:
    return sorted({criterion(found) for found in comparison.searches})


def varied(comparison: Comparison) -> list[Metric]:
    """What is drawn against the learning rate: nothing where no method has two."""
    rates = {(t.spec.method, learning_rate(t)) for t in comparison.trained if t.done}
    several = len(rates) > len({method for method, _ in rates})
    return comparison.metrics if several and not comparison.random_weights else []


@drawn(lambda comparison: judged_by(comparison) or varied(comparison))
def by_learning_rate(comparison: Comparison, wide: bool = True) -> Figure:
    """What the trials of each search were judged by, and the scores of all arms, against the rate."""
    judged, metrics = judged_by(comparison), varied(comparison)
    trained = [t for t in comparison.trained if t.done]
    titles = {f.tuning.trial.method: f.tuning.trial.method for f in comparison.searches}
    titles |= {t.spec.method: t.card.get("title") or t.spec.method for t in comparison.trained}
    look = looks(comparison)
    panels, columns = len(judged) + len(metrics), 2 if wide else 1
    lines = -(-panels // columns)
    figure = Figure(figsize=(WIDTHS[wide], 3.3 * lines + 0.4), layout="constrained")
    axes: list = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, name in zip(axes, judged, strict=False):
        ax.set_ylabel(name.capitalize())
        for found in comparison.searches:
            if criterion(found) == name:
                draw_search(ax, found, look[found.tuning.trial.method])
    for ax, metric in zip(axes[len(judged) :], metrics, strict=False):
        counts = [len(t.done) for t in trained]
        usual = mode(counts)
        ax.set_ylabel(f"{metric.label} of the test rows{f', {usual} seeds' * (max(counts) > 1)}")
        draw_arms(ax, trained, lambda r, m=metric.name: score(r, m), look, usual)
    for i, ax in enumerate(axes):
        low, high = ax.dataLim.intervalx
        logarithmic(ax, (1,) if high > 100 * low else (1, 2, 5))
        ax.set_xlabel("Learning rate")
        ax.locator_params(axis="y", nbins=6)
        ax.margins(0.08, 0.12)
        ax.set_visible(i < panels)
    there = {t.spec.method for t in trained} | {found.tuning.trial.method for found in comparison.searches}
    handles = [
        Line2D([], [], **sized(look[m], 5), label=short(titles[m], NAME if wide else BRIEF))
        for m in look
        if m in there
    ]
    most = max(1, (140 if wide else 56) // (max(len(str(handle.get_label())) for handle in handles) + 8))
    columns = -(-len(handles) // -(-len(handles) // most))  # rows that are equally long
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)
    lay_out(figure)
    return figure


def draw_search(ax, found: Found, style: dict) -> None:
    points = list(zip(found.trials, found.values, strict=True))
    asked = found.tuning.search.values[0]
    line = sorted((t.rate, value) for t, value in points if t.option == asked and value is not None)
    style = sized(style, 5)
    ax.plot(*zip(*line, strict=True) if line else ([], []), linewidth=1.4, **style)
    others = [(t.rate, value) for t, value in points if t.option != asked and value is not None]
    for rate, value in others:
        ax.plot(rate, value, linestyle="", markerfacecolor="white", **style)
    for trial, judged in points:
        if judged is None:
            ax.plot(trial.rate, 0.97, "x", color=style["color"], transform=ax.get_xaxis_transform())
        elif trial is found.best:
            ax.plot(trial.rate, judged, "o", markersize=11, markerfacecolor="none", color=style["color"])


def draw_arms(ax, techniques: list[Technique], of, look: dict[str, dict], usual: int) -> None:
    """A line through the arms of a method that differ in the rate alone, hollow where options are others than
    its first one's. Each a mean over seeds: as many as `usual`, or as it says."""
    lines: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for technique in techniques:
        if values := technique.values(of):
            point = (learning_rate(technique), float(np.mean(values)), len(values))
            lines.setdefault((technique.spec.method, digest(technique.spec.options)), []).append(point)
    drawn = set()
    for (method, _), points in lines.items():
        face = {"markerfacecolor": "white"} if method in drawn else {}
        drawn.add(method)
        rates, means, _ = zip(*sorted(points), strict=True)
        ax.plot(rates, means, linewidth=1.4, **sized(look[method], 5), **face)
        for rate, mean, seeds in points:
            if seeds != usual:
                ax.annotate(str(seeds), (rate, mean), xytext=(4, 3), textcoords="offset points", fontsize=7)


def learning_rate(technique: Technique) -> float:
    """Declared, its own or the shared one."""
    return technique.newest.overrides.get("learning_rate", [technique.spec.own_hp.learning_rate])[0]


def criterion(found: Found) -> str:
    """What the trials of a search are judged by, in words."""
    return found.criterion.label.lower() if found.criterion else "validation loss"


def of_objective(comparison: Comparison, objective: str) -> list[Technique]:
    return [t for t in comparison.trained if t.objective == objective and t.done]


def with_losses(comparison: Comparison, objective: str) -> bool:
    techniques = of_objective(comparison, objective)
    return any(r.training or r.validation for technique in techniques for r in technique.done)


@drawn(with_losses)
def loss_curves(comparison: Comparison, objective: str, wide: bool = True) -> Figure:
    """Training and validation loss of the methods of one objective: mean line, thin line a seed."""
    techniques = of_objective(comparison, objective)
    look, goal, crowd = looks(comparison), goal_of(techniques), len(techniques) > CROWD
    tall, panels = max(3.7, 0.9 + 0.15 * len(techniques)), (1, 2) if wide else (2, 1)
    figure = Figure(figsize=(WIDTHS[wide], tall * panels[0]), layout="constrained")
    left, right = figure.subplots(*panels)
    ends: dict[str, list[tuple[float, float, str, dict]]] = {"training": [], "validation": []}
    for ax, curve in ((left, "training"), (right, "validation")):
        lines = []
        for technique in techniques:
            style = look[technique.spec.method]
            line = {"color": style["color"], "linestyle": "--" if comparison.untuned(technique) else "-"}
            seeds = [series(getattr(record, curve)) for record in technique.done]
            seeds = [s for s in seeds if len(s)]
            if not seeds:
                continue
            for s in seeds if len(seeds) > 1 and not crowd else []:
                ax.plot(*s.T, **line, linewidth=0.6, alpha=0.35)
            steps, losses = mean_curve(seeds)
            losses = smooth(losses, len(steps) // (20 if crowd else 50) if curve == "training" else 0)
            shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).astype(int))
            steps, losses = steps[shown], losses[shown]
            every = max(1, len(steps) // 6) if curve == "training" else 1
            ax.plot(steps, losses, linewidth=1.2 if crowd else 1.6,
                    markevery=(every // 2, every), **sized(style, 4.5) | line,
                    markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
            lines.append(np.array([steps, losses]))
            if known := np.flatnonzero(np.isfinite(losses)).tolist():
                end = float(steps[known[-1]]), float(losses[known[-1]])
                ends[curve].append((*end, name_of(technique, wide), style))
        ax.set_title(f"{curve.capitalize()} loss")
        ax.locator_params(nbins=6)
        ax.set_xlabel("Optimizer step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        focus(ax, lines)
    left.set_ylabel(f"Loss ({plain(objective)}, lower is better)")
    validated = len(ends["validation"]) >= len(ends["training"])
    named = right if validated else left
    name_ends(named, ends["validation" if validated else "training"])
    if goal:
        right.axhline(goal.loss, color=INK, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
        right.annotate(f"{SHARE:.0%} of the way", (0.01, goal.loss), xycoords=("axes fraction", "data"),
                         xytext=(0, -2), textcoords="offset points", va="top", fontsize=7.5)  # fmt: skip
    lay_out(figure)
    settle_ends(named)
    return figure


def focus(ax, lines: list[np.ndarray]) -> None:
    """Where most of what falls falls at once, on what comes after: the first fifth may leave the frame."""
    if not lines:
        return
    steps, losses = np.concatenate(lines, axis=1)
    late = losses[(steps >= 0.2 * steps.max()) & np.isfinite(losses)]
    if len(late) and np.ptp(late) and np.nanmax(losses) - late.max() > np.ptp(late):
        ax.set_ylim(late.min() - 0.06 * np.ptp(late), late.max() + 0.06 * np.ptp(late))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and `window` neighbours on each side, fewer at the ends."""
    if window < 1:
        return values
    around = [values[max(0, i - window) : i + window + 1] for i in range(len(values))]
    return np.array([np.mean(near) for near in around])
