"""What memory was held for, and in which phase: a row a technique."""

from collections.abc import Callable
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from harness.record import PHASES, TRAINING, RunRecord
from harness.report.comparison import GIB, Comparison, Technique
from harness.report.plots.style import FAINT, INK, SOFT, WIDTHS, drawn, lay_out, looks, name_of, short, sized
from harness.report.text import spread

PARTS = {  # of what is held at the highest moment of a training -> how it is filled; hatches are for print
    "weights": {"color": "#0072B2"},
    "optimizer state": {"color": "#E69F00", "hatch": "////"},
    "gradients": {"color": "#CC79A7", "hatch": "xxxx"},
    "activations": {"color": "#A9D8F2"},
    "gradients, activations": {"color": "#A9D8F2"},
    "allocator, context": {"color": "none"},
}
OF_PHASE = {  # phase -> marker and colour
    "load": (".", INK), "attach": ("<", "#CC79A7"), "compile": ("s", FAINT), "train": ("D", "#D55E00"),
    "rollout": (">", "#E69F00"), "validate": ("v", "#009E73"), "evaluate": ("^", "#56B4E9"),
    "generate": ("o", "#0072B2"), "save": ("x", INK), "checkpoint": ("+", INK),
}  # fmt: skip


def parts(record: RunRecord) -> dict[str, int]:
    """Bytes at the highest moment of a training, part by part; empty where that is not known. An allocator
    knows their sum: what is neither weights nor, once there are steps, the optimizer's is one part."""
    if memory := record.memory:
        return {"weights": memory.weights, "optimizer state": memory.moments, "gradients": memory.gradients,
                "activations": memory.activations}  # fmt: skip
    peaks = {name: record.peak("peak_allocated", (name,)) for name in TRAINING}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    sizes = record.sizes
    if not record.ok or not known or sizes.weight_bytes is None:
        return {}
    highest = max(known, key=lambda name: known[name])
    moments = 0 if highest == "attach" else sizes.optimizer_bytes or 0
    rest = known[highest] - sizes.weight_bytes - moments
    if rest < 0:
        return {}
    found = {"weights": sizes.weight_bytes, "optimizer state": moments, "gradients, activations": rest}
    device = record.peak("peak_device") or 0
    return found | {"allocator, context": max(device - known[highest], 0)}


def known(comparison: Comparison) -> tuple[dict[str, dict[str, float]], str]:
    """GiB of each technique's parts, and what the peaks of its phases are measured by; empty: not known."""
    of_parts = {t.label: mean_parts([parts(r) for r in t.done]) for t in comparison.trained}
    gauge = next((g for g in ("peak_allocated", "peak_host") if len(phases_known(comparison, g)) > 1), "")
    return of_parts, gauge


def any_known(comparison: Comparison) -> bool:
    of_parts, gauge = known(comparison)
    return bool(gauge) or any(of_parts.values())


@drawn(any_known)
def memory_by_part(comparison: Comparison, wide: bool = True) -> Figure:
    """Stacked bars of the parts, and a marker a phase. The least first; below, who has no result, and why."""
    of_parts, gauge = known(comparison)
    done = [t for t in comparison.trained if t.done]
    done.sort(key=lambda t: (t.mean(comparison.peak_memory) or 0.0, t.label))
    rows = [*done, *(t for t in comparison.trained if not t.done)]
    panels: list[Callable] = [lambda ax: draw_parts(ax, rows, of_parts, wide)] * any(of_parts.values())
    panels += [lambda ax: draw_phases(ax, rows, gauge, wide)] * bool(gauge)
    lines, columns = (1, len(panels)) if wide else (len(panels), 1)
    figure = Figure(figsize=(WIDTHS[wide], (1.5 + 0.2 * len(rows)) * lines), layout="constrained")
    axes: list = list(figure.subplots(lines, columns, sharey=wide, squeeze=False).flat)
    for ax, draw in zip(axes, panels, strict=True):
        draw(ax)
        ax.locator_params(axis="x", nbins=6 if wide else 4)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(left=0)
    for ax in axes[:1] if wide else axes:
        name_rows(ax, rows, comparison, wide)
    lay_out(figure)
    return figure


def mean_parts(seeds: list[dict[str, int]]) -> dict[str, float]:
    """GiB; empty unless all seeds know the same parts."""
    if not seeds or len({tuple(seed) for seed in seeds}) > 1:
        return {}
    return {name: fmean(seed[name] for seed in seeds) / GIB for name in seeds[0]}


def phases_known(comparison: Comparison, gauge: str) -> set[str]:
    return {name for t in comparison.trained for r in t.records for name, phase in r.phases.items()
            if getattr(phase, gauge) is not None}  # fmt: skip


def draw_parts(ax, rows: list[Technique], of_parts: dict[str, dict[str, float]], wide: bool) -> None:
    left = [0.0] * len(rows)
    for name, style in PARTS.items():
        widths = [of_parts[t.label].get(name, 0.0) for t in rows]
        if any(widths):
            bare = style["color"] == "none"
            ax.barh(range(len(rows)), widths, left=left, height=0.66, label=name, zorder=2, **style,
                    edgecolor=FAINT if bare else "white", linewidth=0.6)  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, technique in enumerate(rows):
        own = of_parts[technique.label]
        beside = own.get("allocator, context", 0.0)
        said = spread([left[i] - beside]) + f" ({spread([left[i]])})" * bool(beside)
        ax.annotate(said if own else "" if technique.done else short(technique.status), (left[i], i),
                    xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
    ax.set_xlabel("Memory of the training (GiB, lower is better)")
    ax.set_xlim(right=1.25 * max(left))
    explain(ax, "By part, at the highest moment", 2, wide)


def draw_phases(ax, rows: list[Technique], gauge: str, wide: bool) -> None:
    for name in PHASES:
        marker, colour = OF_PHASE[name]
        peaks = [max((p for r in t.records if (p := r.peak(gauge, (name,))) is not None), default=None)
                 for t in rows]  # fmt: skip
        points = [(peak / GIB, i) for i, peak in enumerate(peaks) if peak is not None]
        if points:
            ax.plot(*zip(*points, strict=True), marker, color=colour, markersize=5.5, label=name, zorder=3,
                    markeredgecolor=colour if marker == "x" else "white", markeredgewidth=0.9 if marker == "x"
                    else 0.5)  # fmt: skip
    held = "live tensors" if gauge == "peak_allocated" else "resident memory of the process"
    ax.set_xlabel(f"Memory (GiB, {held})")
    explain(ax, "By phase, the peak of each", 4, wide)


def explain(ax, title: str, columns: int, wide: bool) -> None:
    """A title, and under it the key: over the names, too, where there is less room."""
    across, left = (ax.transAxes, -0.03) if wide else (ax.figure.transFigure, 0.0)
    there = blended_transform_factory(across, ax.transAxes)
    ax.legend(loc="lower left", bbox_to_anchor=(left, 1.0), bbox_transform=there, ncols=columns,
              frameon=False, fontsize=7.5, title=title, alignment="left", handlelength=1.6,
              title_fontproperties={"weight": "bold", "size": 10}, columnspacing=1.2)  # fmt: skip


def name_rows(ax, rows: list[Technique], comparison: Comparison, wide: bool) -> None:
    """The names at the left, each with its marker."""
    look = looks(comparison)
    ax.set_yticks(range(len(rows)), [name_of(t, wide) for t in rows], fontsize=8)
    ax.tick_params(axis="y", pad=14)
    for i, technique in enumerate(rows):
        hollow = {"markerfacecolor": "white"} if comparison.untuned(technique) else {}
        ax.plot(-0.025, i, linestyle="", transform=ax.get_yaxis_transform(), clip_on=False,
                **sized(look[technique.spec.method], 5.5), **hollow)  # fmt: skip
        if not technique.done:
            ax.get_yticklabels()[i].set_color(SOFT)
    ax.set_ylim(len(rows) - 0.4, -0.6)
