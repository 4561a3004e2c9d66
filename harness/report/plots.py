"""Plots: scores against cost with the Pareto front, and loss curves. The same bytes each time."""

import io
import logging
from itertools import pairwise, product

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from harness.plain import plain
from harness.report.comparison import Comparison, Technique, score, seconds
from harness.report.text import shorten
from harness.report.verdicts import MEMORY, TIME, Verdicts
from harness.spec import digest
from harness.tuning import Found

# Okabe and Ito's colours, which colour-blind readers can tell apart, with Tol's wine in place of the yellow
# that is faint on white; the marker tells apart those beyond eight.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
CROWD = 6  # techniques in a plot of curves: single seeds of more hide the means
INK, FAINT = "#333333", "#8a8a8a"
WIDE = 8  # costs further apart than this share a logarithmic axis, or all but one would be one spot
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "tuneoff",  # ids in the SVG are otherwise random
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}


def images(figure: Figure) -> dict[str, bytes]:
    """-> {"svg": ..., "png": ...} without time, program name or random ids in them."""
    files = {}
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=160, transparent=kind == "svg", metadata=metadata)
        files[kind] = file.getvalue()
    return files


def drawn(draw):
    """Runs a drawing function in the report's style; its figure as images, or None for none."""

    def wrapped(*args):
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        with matplotlib.rc_context(STYLE):
            figure = draw(*args)
            return images(figure) if figure else None

    return wrapped


def looks(comparison: Comparison) -> dict[str, dict]:
    """Method -> colour and marker: the same in every plot of a comparison."""
    methods = [t.spec.method for t in comparison.trained]
    methods += [found.tuning.trial.method for found in comparison.searches]
    return {
        method: {"color": COLOURS[i % 8], "marker": MARKERS[i % 7]}
        for i, method in enumerate(dict.fromkeys(methods))
    }


@drawn
def scores_by_cost(comparison: Comparison, verdicts: Verdicts) -> Figure | None:
    """Each compared metric (rows) against memory and training time (columns)."""
    metrics = comparison.metrics
    costs = {MEMORY: (comparison.gauge, comparison.peak_memory),
             TIME: (time_unit(comparison), scaled_time(comparison))}  # fmt: skip
    techniques = [
        t for t in comparison.trained if any(t.values(lambda r, m=m: score(r, m.name)) for m in metrics)
    ]
    if not techniques:
        return None
    figure = Figure(figsize=(9.4, 3.6 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    for (i, metric), (j, (quantity, (unit, cost))) in product(enumerate(metrics), enumerate(costs.items())):
        before = comparison.before(techniques[0])
        level = before.mean(lambda r, m=metric.name: score(r, m)) if before else None
        place = scatter(axes[i, j], comparison, techniques, cost, lambda r, m=metric.name: score(r, m),
                        starred=quantity is TIME)  # fmt: skip
        for group in comparison.groups:
            draw_front(axes[i, j], place, verdicts.steps(quantity.name, metric.name, group))
        draw_level(axes[i, j], level, metric.decimals)
        if j == 0:
            axes[i, j].set_ylabel(f"{metric.label}{' (lower is better)' * (metric.better == 'lower')}")
        if i == len(metrics) - 1:
            axes[i, j].set_xlabel(unit)
    for ax in axes.flat:
        ax.margins(x=0.16, y=0.16)
    figure.align_ylabels()
    figure.draw_without_rendering()  # label places depend on the final layout
    for ax in axes.flat:
        place_labels(ax)
    return figure


@drawn
def cost_alone(comparison: Comparison) -> Figure | None:
    """Memory against time, for weights whose scores mean nothing."""
    techniques = [t for t in comparison.trained if t.values(comparison.peak_memory)]
    if not techniques:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    scatter(ax, comparison, techniques, scaled_time(comparison), comparison.peak_memory)
    ax.set_xlabel(time_unit(comparison))
    ax.set_ylabel(comparison.gauge)
    ax.margins(x=0.16, y=0.16)
    figure.draw_without_rendering()
    place_labels(ax)
    return figure


def scatter(
    ax, comparison: Comparison, techniques: list[Technique], cost, gain, starred: bool = True
) -> dict[str, tuple[float, float]]:
    """A dot a seed, a marker at the mean, and a line to it from the same method before it was tuned, which
    then has no label. `starred`: where runs were disturbed. -> label -> where its marker is."""
    look, means = looks(comparison), {}
    tuned_from = [comparison.asked_for(technique) for technique in techniques]
    ax.to_label = []
    for technique in techniques:
        points = [(cost(r), gain(r)) for r in technique.done]
        points = np.array([p for p in points if None not in p], dtype=float)
        if not len(points):
            continue
        style = look[technique.spec.method]
        x, y = means[technique.label] = tuple(points.mean(0))
        if len(points) > 1:
            ax.scatter(*points.T, s=14, color=style["color"], alpha=0.45, linewidths=0, zorder=3)
        hollow = comparison.untuned(technique)
        ax.scatter(x, y, s=44 if hollow else 52, marker=style["marker"], zorder=4,
                   facecolors="white" if hollow else style["color"], linewidths=1.4 if hollow else 0.8,
                   edgecolors=style["color"] if hollow else "white")  # fmt: skip
        named = "" if technique in tuned_from else (comparison.asked_for(technique) or technique).label
        named += "*" * (starred and technique.disturbed and bool(named))
        ax.to_label.append((x, y, shorten(plain(named), 32), points))
    for technique, asked in zip(techniques, tuned_from, strict=True):
        if asked and {asked.label, technique.label} <= set(means):
            ends = zip(means[asked.label], means[technique.label], strict=True)
            ax.plot(*ends, color=look[technique.spec.method]["color"], linewidth=0.9, alpha=0.6, zorder=2)
    costs = [x for x, *_ in ax.to_label]
    if costs and max(costs) > WIDE * min(costs) > 0:
        logarithmic(ax, (1, 2, 5))
    else:
        ax.locator_params(axis="x", nbins=6)  # more would run into each other
    return means


def logarithmic(ax, steps: tuple[int, ...]) -> None:
    """`steps`: of a decade, that are labelled."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


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


def place_labels(ax) -> None:
    """Each label at the nearest free place around its point, tied to it by a hairline when far."""
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    scale = ax.figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    to_pixels = ax.transData.transform
    taken = [text.get_window_extent(renderer).extents for text in ax.texts]
    for line in ax.lines:  # the front and the level before
        path = line.get_transform().transform(line.get_xydata())
        taken += [(*np.minimum(a, b) - scale, *np.maximum(a, b) + scale) for a, b in pairwise(path)]
    for x, y, _, seeds in ax.to_label:
        for centre, half in [((x, y), 5 * scale), *((seed, 2.5 * scale) for seed in seeds)]:
            px, py = to_pixels(centre)
            taken.append((px - half, py - half, px + half, py + half))
    for x, y, label, _ in sorted(ax.to_label, key=lambda item: (item[1], item[0])):
        if not label:
            continue
        probe = ax.annotate(label, (x, y), fontsize=8)
        box = probe.get_window_extent(renderer)
        probe.remove()
        width, height = box.width, box.height
        px, py = to_pixels((x, y))
        distance, angle = np.array([*product((7, 12, 20, 30, 44, 60, 80), np.arange(24) * np.pi / 12)]).T
        left = px + np.cos(angle) * distance * scale - width * (1 - np.cos(angle)) / 2
        low = py + np.sin(angle) * distance * scale - height * (1 - np.sin(angle)) / 2
        spots = np.stack([left, low, left + width, low + height], 1)  # the nearest first
        outside = np.stack([frame.x0 - left, spots[:, 2] - frame.x1, frame.y0 - low, spots[:, 3] - frame.y1])
        crowded = overlap(spots[:, None], np.array(taken)).sum(1) + 1e3 * outside.clip(0).sum(0)
        best = int(crowded.argmin())
        distance, spot = distance[best], tuple(spots[best])
        taken.append(spot)
        corner = ((spot[0] - px) / scale, (spot[1] - py) / scale)
        hair = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        nearest = ((np.clip((px - spot[0]) / width, 0, 1)), (np.clip((py - spot[1]) / height, 0, 1)))
        text = ax.annotate(label, (x, y), xytext=corner, textcoords="offset points", fontsize=8,
                           zorder=5, ha="left", va="bottom",
                           arrowprops={**hair, "relpos": nearest} if distance > 12 else None)  # fmt: skip
        text.set_in_layout(False)  # the axes stay where the places were chosen


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The areas that boxes (..., 4: left, low, right, high) share."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return sides.clip(0).prod(-1)


@drawn
def by_learning_rate(comparison: Comparison) -> Figure | None:
    """What the trials of each search were judged by, and the scores of all arms, against the learning rate.
    None where no method has two."""
    judged = sorted({criterion(found) for found in comparison.searches})
    trained = [t for t in comparison.trained if t.done]
    rates = {(t.spec.method, learning_rate(t)) for t in trained}
    varied = len(rates) > len({method for method, _ in rates})
    metrics = comparison.metrics if varied and not comparison.random_weights else []
    if not judged and not metrics:
        return None
    titles = {f.tuning.trial.method: f.tuning.trial.method for f in comparison.searches}
    titles |= {t.spec.method: t.card.get("title") or t.spec.method for t in comparison.trained}
    look = looks(comparison)
    lines = -(-(len(judged) + len(metrics)) // 2)  # of two panels each
    figure = Figure(figsize=(9.4, 3.3 * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, 2, squeeze=False).flat)
    for ax, name in zip(axes, judged, strict=False):
        ax.set_ylabel(name.capitalize())
        for found in comparison.searches:
            if criterion(found) == name:
                draw_search(ax, found, look[found.tuning.trial.method])
    for ax, metric in zip(axes[len(judged) :], metrics, strict=False):
        counts = {len(t.done) for t in trained}
        seeds = f", {counts.pop()} seeds each" if len(counts) == 1 and counts != {1} else ""
        ax.set_ylabel(f"{metric.label} of the test rows{seeds}")
        draw_arms(ax, trained, lambda r, m=metric.name: score(r, m), look, numbered=len(counts) > 1)
    for i, ax in enumerate(axes):
        low, high = ax.dataLim.intervalx
        logarithmic(ax, (1,) if high > 100 * low else (1, 2, 5))
        ax.set_xlabel("Learning rate")
        ax.margins(0.08, 0.12)
        ax.set_visible(i < len(judged) + len(metrics))
    handles = [Line2D([], [], **look[m], label=shorten(plain(titles[m]), 32)) for m in look]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    return figure


def draw_search(ax, found: Found, style: dict) -> None:
    points = list(zip(found.trials, found.values, strict=True))
    asked = found.tuning.search.values[0]
    line = sorted((t.rate, value) for t, value in points if t.option == asked and value is not None)
    ax.plot(*zip(*line, strict=True) if line else ([], []), linewidth=1.4, markersize=5, **style)
    others = [(t.rate, value) for t, value in points if t.option != asked and value is not None]
    for rate, value in others:
        ax.plot(rate, value, linestyle="", markersize=5, markerfacecolor="white", **style)
    for trial, value in points:
        if value is None:
            ax.plot(trial.rate, 0.97, "x", color=style["color"], transform=ax.get_xaxis_transform())
        elif trial is found.best:
            ax.plot(trial.rate, value, "o", markersize=11, markerfacecolor="none", color=style["color"])


def draw_arms(ax, techniques: list[Technique], of, look: dict[str, dict], numbered: bool) -> None:
    """A line through the arms of a method that differ in the rate alone, hollow where options are others than
    its first one's. Each a mean over seeds: if `numbered`, of as many as it says."""
    lines: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for technique in techniques:
        if values := technique.values(of):
            point = (learning_rate(technique), float(np.mean(values)), len(values))
            lines.setdefault((technique.spec.method, digest(technique.spec.options)), []).append(point)
    drawn = set()
    for (method, _), points in lines.items():
        face = {"markerfacecolor": "white"} if method in drawn else {}
        drawn.add(method)
        ax.plot(*zip(*(point[:2] for point in sorted(points)), strict=True), linewidth=1.4, markersize=5,
                **look[method], **face)  # fmt: skip
        for rate, mean, seeds in points if numbered else ():
            ax.annotate(str(seeds), (rate, mean), xytext=(4, 3), textcoords="offset points", fontsize=7)


def learning_rate(technique: Technique) -> float:
    """Declared, its own or the shared one."""
    return technique.newest.overrides.get("learning_rate", [technique.spec.own_hp.learning_rate])[0]


def criterion(found: Found) -> str:
    """What the trials of a search are judged by, in words."""
    return found.criterion.label.lower() if found.criterion else "validation loss"


@drawn
def loss_curves(comparison: Comparison, objective: str) -> Figure | None:
    """Training and validation loss of the methods of one objective: mean line, thin line a seed."""
    techniques = [t for t in comparison.trained if t.objective == objective and t.done]
    if not any(r.training or r.validation for technique in techniques for r in technique.done):
        return None
    look = looks(comparison)
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, curve, title in ((left, "training", "Training loss"), (right, "validation", "Validation loss")):
        for technique in techniques:
            style = look[technique.spec.method]
            line = {"color": style["color"], "linestyle": "--" if comparison.untuned(technique) else "-"}
            seeds = [series(getattr(record, curve)) for record in technique.done]
            seeds = [s for s in seeds if len(s)]
            if not seeds:
                continue
            for s in seeds if len(seeds) > 1 and len(techniques) <= CROWD else []:
                ax.plot(*s.T, **line, linewidth=0.6, alpha=0.35)
            steps, losses = mean_curve(seeds)
            mark = {"marker": style["marker"], "markersize": 4} if curve == "validation" else {}
            window = len(steps) // 50 if curve == "training" else 0
            ax.plot(steps, smooth(losses, window), **line, linewidth=1.8, **mark,
                    label=shorten(plain(technique.label), 32))  # fmt: skip
        ax.set_title(title)
        ax.set_xlabel("Optimizer step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel(f"Loss ({plain(objective)})")
    handles, labels = max((ax.get_legend_handles_labels() for ax in (right, left)), key=lambda hl: len(hl[1]))
    columns = -(-len(labels) // -(-len(labels) // 6))  # rows of at most six, equally long
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def series(points: list[dict]) -> np.ndarray:
    """-> (points, 2): step and loss, NaN where the loss is null so that the line breaks there."""
    pairs = [(p.get("step"), p.get("loss")) for p in points]
    return np.array([p for p in pairs if p[0] is not None], dtype=float).reshape(-1, 2)


def mean_curve(seeds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds at the steps that all of them have."""
    by_step = [dict(s) for s in seeds]
    steps = sorted(set.intersection(*map(set, by_step)))
    return np.array(steps), np.array([np.mean([s[step] for s in by_step]) for step in steps])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and `window` neighbours on each side, fewer at the ends."""
    if window < 1:
        return values
    around = [values[max(0, i - window) : i + window + 1] for i in range(len(values))]
    return np.array([np.mean(near) for near in around])


def time_unit(comparison: Comparison) -> str:
    return f"Training time ({scale_of_time(comparison)[0]})"


def scaled_time(comparison: Comparison):
    scale = scale_of_time(comparison)[1]
    return lambda record: None if seconds(record) is None else seconds(record) / scale


def scale_of_time(comparison: Comparison) -> tuple[str, int]:
    longest = max((t for r in comparison.records if (t := seconds(r)) is not None), default=0)
    return ("h", 3600) if longest >= 3600 else ("min", 60) if longest >= 120 else ("s", 1)
