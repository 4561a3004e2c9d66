"""Plots: scores against cost with the Pareto front, and loss curves. The same bytes each time."""

import io
import logging
from itertools import pairwise, product

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from harness.metrics import compared
from harness.plain import plain
from harness.report.rows import Comparison, Row, score, seconds
from harness.report.stats import pareto
from harness.report.text import shorten

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the yellow that is
# faint on white; the marker tells apart those beyond seven.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
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
    """Label -> colour and marker: the same in every plot of a comparison."""
    return {
        row.label: {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7]}
        for i, row in enumerate(comparison.trained)
    }


@drawn
def scores_by_cost(comparison: Comparison) -> Figure | None:
    """Each compared metric (rows) against memory and training time (columns)."""
    metrics = compared()
    costs = {comparison.gauge: comparison.peak_memory, time_unit(comparison): scaled_time(comparison)}
    rows = [
        row for row in comparison.trained if any(row.values(lambda r, m=m: score(r, m.name)) for m in metrics)
    ]
    if not rows:
        return None
    figure = Figure(figsize=(9.4, 3.6 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    for (i, metric), (j, (unit, cost)) in product(enumerate(metrics), enumerate(costs.items())):
        before = comparison.before(rows[0])
        level = before.mean(lambda r, m=metric.name: score(r, m)) if before else None
        scatter(axes[i, j], rows, cost, lambda r, m=metric.name: score(r, m), looks(comparison), level)
        if j == 0:
            axes[i, j].set_ylabel(metric.label)
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
    rows = [row for row in comparison.trained if row.values(comparison.peak_memory)]
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    scatter(ax, rows, scaled_time(comparison), comparison.peak_memory, looks(comparison), None, front=False)
    ax.set_xlabel(time_unit(comparison))
    ax.set_ylabel(comparison.gauge)
    ax.margins(x=0.16, y=0.16)
    figure.draw_without_rendering()
    place_labels(ax)
    return figure


def scatter(ax, rows: list[Row], cost, gain, look, level: float | None, front: bool = True) -> None:
    """A dot a seed, a marker at the mean, the front through the means, a line at the level before."""
    ax.to_label = []
    for row in rows:
        points = [(cost(r), gain(r)) for r in row.done]
        points = np.array([p for p in points if None not in p], dtype=float)
        if not len(points):
            continue
        style = look[row.label]
        x, y = points.mean(0)
        if len(points) > 1:
            ax.scatter(*points.T, s=14, color=style["color"], alpha=0.45, linewidths=0, zorder=3)
        ax.scatter(x, y, s=52, **style, edgecolors="white", linewidths=0.8, zorder=4)
        ax.to_label.append((x, y, shorten(plain(row.label), 32), points))
    costs = [x for x, *_ in ax.to_label]
    if costs and max(costs) > WIDE * min(costs) > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    if front and len(ax.to_label) > 1:
        means = np.array([(x, y) for x, y, _, _ in ax.to_label])
        best = means[pareto(means[:, 0], means[:, 1])]
        best = best[np.argsort(best[:, 0])]
        corners = np.stack([best[1:, 0], best[:-1, 1]], axis=1)
        steps = np.insert(best, range(1, len(best)), corners, axis=0)
        ax.plot(*steps.T, color=FAINT, linewidth=1, zorder=2)
    if level is not None:
        ax.axhline(level, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        ax.annotate("before", (0.995, level), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", ha="right", va="bottom", fontsize=7.5)  # fmt: skip


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
        probe = ax.annotate(label, (x, y), fontsize=8)
        box = probe.get_window_extent(renderer)
        probe.remove()
        width, height = box.width, box.height
        px, py = to_pixels((x, y))
        places = []
        for distance, angle in product((7, 12, 20, 30, 44, 60, 80), np.arange(24) * np.pi / 12):
            dx, dy = np.cos(angle) * distance * scale, np.sin(angle) * distance * scale
            left = px + dx - width * (1 - np.cos(angle)) / 2
            low = py + dy - height * (1 - np.sin(angle)) / 2
            spot = (left, low, left + width, low + height)
            outside = sum(max(0, a) for a in (frame.x0 - left, left + width - frame.x1,
                                              frame.y0 - low, low + height - frame.y1))  # fmt: skip
            places.append((sum(overlap(spot, other) for other in taken) + 1e3 * outside, distance, spot))
        _, distance, spot = min(places, key=lambda place: place[:2])
        taken.append(spot)
        corner = ((spot[0] - px) / scale, (spot[1] - py) / scale)
        hair = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        nearest = ((np.clip((px - spot[0]) / width, 0, 1)), (np.clip((py - spot[1]) / height, 0, 1)))
        text = ax.annotate(label, (x, y), xytext=corner, textcoords="offset points", fontsize=8,
                           zorder=5, ha="left", va="bottom",
                           arrowprops={**hair, "relpos": nearest} if distance > 12 else None)  # fmt: skip
        text.set_in_layout(False)  # the axes stay where the places were chosen


def overlap(a, b) -> float:
    """The area that two boxes (left, low, right, high) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


@drawn
def loss_curves(comparison: Comparison, objective: str) -> Figure | None:
    """Training and validation loss of the methods of one objective: mean line, thin line a seed."""
    rows = [row for row in comparison.trained if row.objective == objective and row.done]
    if not any(r.training or r.validation for row in rows for r in row.done):
        return None
    look = looks(comparison)
    figure = Figure(figsize=(9.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, curve, title in ((left, "training", "Training loss"), (right, "validation", "Validation loss")):
        for row in rows:
            colour = look[row.label]["color"]
            seeds = [series(getattr(record, curve)) for record in row.done]
            seeds = [s for s in seeds if len(s)]
            if not seeds:
                continue
            for s in seeds if len(seeds) > 1 else []:
                ax.plot(*s.T, color=colour, linewidth=0.6, alpha=0.35)
            steps, losses = mean_curve(seeds)
            mark = {"marker": look[row.label]["marker"], "markersize": 4} if curve == "validation" else {}
            window = len(steps) // 50 if curve == "training" else 0
            ax.plot(steps, smooth(losses, window), color=colour, linewidth=1.8, **mark,
                    label=shorten(plain(row.label), 32))  # fmt: skip
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
