"""Scores against cost, with the Pareto front; memory against time where scores mean nothing."""

from functools import partial
from itertools import product
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.metrics import Metric
from harness.report.comparison import Comparison, Technique, scale_of_time, score, seconds
from harness.report.plots.labels import place_labels
from harness.report.plots.style import (
    FAINT,
    INK,
    SOFT,
    WIDTHS,
    drawn,
    lay_out,
    logarithmic,
    looks,
    name_of,
    short,
    sized,
)
from harness.report.verdicts import MEMORY, TIME, Quantity, Verdicts

NAMED = 80  # points of a panel: more names have no room
WIDE = 3  # times the least: costs further apart are on a logarithmic axis, or all but one would be one spot


def with_scores(comparison: Comparison, *_) -> list[Technique]:
    names = [metric.name for metric in comparison.metrics]
    return [t for t in comparison.trained if any(t.values(partial(score, metric=name)) for name in names)]


@drawn(with_scores)
def scores_by_cost(comparison: Comparison, verdicts: Verdicts, wide: bool = True) -> Figure:
    """Each compared metric against memory and training time: `wide`, beside each other."""
    metrics, techniques = comparison.metrics, with_scores(comparison)
    tall = 3.2 + 0.05 * min(len(techniques), 2 * NAMED)
    lines, columns = (len(metrics), 2) if wide else (2 * len(metrics), 1)
    figure = Figure(figsize=(WIDTHS[wide], tall * lines), layout="constrained")
    shared: dict[str, Any] = {"sharex": "col", "sharey": "row"} if wide else {}
    axes: list = list(figure.subplots(lines, columns, squeeze=False, **shared).flat)
    for ax, (metric, quantity) in zip(axes, product(metrics, (MEMORY, TIME)), strict=True):
        unit = panel(ax, comparison, verdicts, metric, quantity)
        if quantity is MEMORY or not wide:
            ax.set_ylabel(f"{metric.label}{' (lower is better)' * (metric.better == 'lower')}")
        if metric is metrics[-1] or not wide:
            ax.set_xlabel(unit)
    name_missing(figure, comparison, 120 if wide else 50)
    finish(figure)
    return figure


@drawn(lambda comparison, verdicts, chosen: chosen and with_scores(comparison))
def scores_on_paper(
    comparison: Comparison, verdicts: Verdicts, chosen: list[tuple[Metric, Quantity]]
) -> Figure:
    """A panel each, side by side, as wide as a page's text."""
    figure = Figure(figsize=(7.4, 2.6), layout="constrained")
    for ax, (metric, quantity) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        ax.set_xlabel(panel(ax, comparison, verdicts, metric, quantity))
        ax.set_title(f"{metric.label} ({metric.better} is better)", fontsize=9, pad=12)
    finish(figure)
    return figure


def panel(ax, comparison: Comparison, verdicts: Verdicts, metric: Metric, quantity: Quantity) -> str:
    """-> what is across, with its unit."""
    unit, cost = {MEMORY: (comparison.gauge, comparison.peak_memory),
                  TIME: (time_unit(comparison), scaled_time(comparison))}[quantity]  # fmt: skip
    techniques = with_scores(comparison)
    before, gain = comparison.before(techniques[0]), partial(score, metric=metric.name)
    place = scatter(ax, comparison, techniques, cost, gain, starred=quantity is TIME)
    for group in comparison.groups:
        draw_front(ax, place, verdicts.steps(quantity.name, metric.name, group))
    draw_level(ax, before.mean(gain) if before else None, metric.decimals)
    point_to_better(ax, metric.better)
    name_best(ax, metric.better)
    return unit


def with_memory(comparison: Comparison) -> list[Technique]:
    return [t for t in comparison.trained if t.values(comparison.peak_memory)]


@drawn(with_memory)
def cost_alone(comparison: Comparison, wide: bool = True) -> Figure:
    """Memory against time, for weights whose scores mean nothing."""
    techniques = with_memory(comparison)
    figure = Figure(
        figsize=(6.4 if wide else WIDTHS[wide], 3.8 + 0.05 * len(techniques)), layout="constrained"
    )
    ax = figure.subplots()
    scatter(ax, comparison, techniques, scaled_time(comparison), comparison.peak_memory)
    point_to_better(ax, "lower")
    ax.set_xlabel(time_unit(comparison))
    ax.set_ylabel(comparison.gauge)
    name_missing(figure, comparison, 120 if wide else 50)
    finish(figure)
    return figure


def finish(figure: Figure) -> None:
    """Labels come last: their places depend on the layout."""
    for ax in figure.axes:
        ax.margins(x=0.16, y=0.16)
        ax.autoscale_view()
        ax.locator_params(axis="y", nbins=6)
    lay_out(figure)
    for ax in figure.axes:
        place_labels(ax)


def scatter(
    ax, comparison: Comparison, techniques: list[Technique], cost, gain, starred: bool = True
) -> dict[str, tuple[float, float]]:
    """A marker at the mean with bars of ± one standard deviation over seeds in both directions, and a dotted
    line to it from the same method before it was tuned, which then has no label. `starred`: where runs were
    disturbed. -> label -> where its marker is."""
    look, means = looks(comparison), {}
    tuned_from = [comparison.asked_for(technique) for technique in techniques]
    bars: list[tuple] = []  # each two points
    colours: list[str] = []
    ax.to_label = []
    for technique in techniques:
        points = [(cost(r), gain(r)) for r in technique.done]
        points = np.array([p for p in points if None not in p], dtype=float)
        if not len(points):
            continue
        style = look[technique.spec.method]
        x, y = means[technique.label] = tuple(points.mean(0))
        sides = points.std(0, ddof=1) if len(points) > 1 else np.zeros(2)
        own = [((x - sides[0], y), (x + sides[0], y)), ((x, y - sides[1]), (x, y + sides[1]))]
        bars, colours = bars + own, [*colours, style["color"], style["color"]]
        hollow = {"markerfacecolor": "white", "markeredgewidth": 1.4} if comparison.untuned(technique) else {}
        edge = {"markeredgecolor": style["color"] if hollow else "white", "markeredgewidth": 0.8}
        ax.plot(x, y, linestyle="", zorder=4, **sized(style, 7), **edge | hollow)
        named = "" if technique in tuned_from else name_of(comparison.asked_for(technique) or technique)
        named += "*" * (starred and technique.disturbed and bool(named))
        ax.to_label.append((x, y, named, own))
    ax.add_collection(LineCollection(bars, colors=colours, linewidths=1, alpha=0.7, zorder=3))
    for technique, asked in zip(techniques, tuned_from, strict=True):
        if asked and {asked.label, technique.label} <= set(means):
            ends = zip(means[asked.label], means[technique.label], strict=True)
            ax.plot(*ends, color=look[technique.spec.method]["color"], linewidth=1,
                    linestyle=(0, (1, 1.5)), zorder=2)  # fmt: skip
    costs = [x for x, *_ in ax.to_label]
    if costs and max(costs) > WIDE * min(costs) > 0:
        logarithmic(ax, (1, 2, 5) if max(costs) > 10 * min(costs) else (1, 2, 3, 4, 5, 7))
    else:
        ax.locator_params(axis="x", nbins=6)  # more would run into each other
    return means


def draw_front(ax, place: dict[str, tuple[float, float]], steps: list[tuple[str, str]]) -> None:
    """From each technique on the front to the next, by way of what the next costs."""
    for (x, y), (next_x, next_y) in ((place[a], place[b]) for a, b in steps if a in place and b in place):
        ax.plot([x, next_x, next_x], [y, y, next_y], color=FAINT, linewidth=1, zorder=2)


def draw_level(ax, level: float | None, decimals: int) -> None:
    """The untouched model's score: a line, but for one so far away that the techniques would be one spot."""
    if level is None:
        return
    low, high = ax.dataLim.intervaly
    if max(level - high, low - level) <= high - low or low == high:
        ax.axhline(level, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        ax.annotate("before", (0.995, level), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", ha="right", va="bottom", fontsize=7.5)  # fmt: skip
        return
    arrow, place, edge = ("↑", 0.985, "top") if level > high else ("↓", 0.015, "bottom")
    ax.annotate(f"{arrow} before: {level:.{decimals}f}", (0.995, place), xycoords="axes fraction",
                ha="right", va=edge, fontsize=7.5)  # fmt: skip


def point_to_better(ax, better: str) -> None:
    """Above the frame, where no point is: costs are better where they are lower."""
    arrow = "↖" if better == "higher" else "↙"
    ax.annotate(f"{arrow} better", (0, 1), xycoords="axes fraction", xytext=(2, 2),
                textcoords="offset points", ha="left", va="bottom", fontsize=7.5, color=SOFT)  # fmt: skip


def name_best(ax, better: str) -> None:
    """Alone, of more points than names have room."""
    named = [item for item in ax.to_label if item[2]]
    named.sort(key=lambda item: item[1], reverse=better == "higher")
    bare = {id(item) for item in named[NAMED:]}
    ax.to_label = [(x, y, "" if id(item) in bare else name, bars)
                   for item in ax.to_label for x, y, name, bars in [item]]  # fmt: skip


def name_missing(figure: Figure, comparison: Comparison, most: int) -> None:
    """Below the panels, `most` characters a line: who is not in them, or with fewer seeds, and why."""
    look = looks(comparison)
    said = [(t, f"{name_of(t)}: {short(t.status)}") for t in comparison.trained if t.status]
    keys = [Line2D([], [], linestyle="", markerfacecolor="none", label=text,
                   **sized(look[t.spec.method], 6))
            for t, text in said]  # fmt: skip
    if keys:
        longest = max(len(text) for _, text in said)
        figure.legend(handles=keys, loc="outside lower left", frameon=False, fontsize=8, alignment="left",
                      ncols=max(1, most // (longest + 6)), title="Runs without a result", title_fontsize=8,
                      handletextpad=0.2)  # fmt: skip


def time_unit(comparison: Comparison) -> str:
    return f"Training time ({scale_of_time(comparison)[0]})"


def scaled_time(comparison: Comparison):
    scale = scale_of_time(comparison)[1]
    return lambda record: None if (took := seconds(record)) is None else took / scale
