"""What was said of memory and time, against what was measured: a row a technique."""

from typing import Any

from matplotlib.figure import Figure

from harness.report.comparison import Comparison, Technique
from harness.report.plots.memory import name_rows
from harness.report.plots.style import FAINT, INK, WIDTHS, drawn, lay_out, looks


@drawn(lambda comparison, rows, sides, unit: any(one.measured for both in sides.values() for one in both))
def said_and_measured(
    comparison: Comparison, rows: list[Technique], sides: dict[str, Any], unit: str, wide: bool = True
) -> Figure:
    """`sides`: label -> memory (GiB) and time (unit), each with `said` (least, likely, most) and
    `measured`."""
    lines, columns = (1, 2) if wide else (2, 1)
    height = (1.1 + 0.24 * len(rows)) * lines
    figure = Figure(figsize=(WIDTHS[wide], height), layout="constrained")
    axes: list = list(figure.subplots(lines, columns, sharey=wide, squeeze=False).flat)
    look = looks(comparison)
    for place, (ax, title) in enumerate(
        zip(axes, ("Peak memory (GiB)", f"Time of a run ({unit})"), strict=True)
    ):
        for row, technique in enumerate(rows):
            one, own = sides[technique.label][place], look[technique.spec.method]
            least, likely, most = one.said
            ax.hlines(row, least, most, color=FAINT, linewidth=5, alpha=0.45, zorder=1)
            ax.plot([likely], [row], "|", color=INK, markersize=10, zorder=2)
            ax.plot(one.measured, [row] * len(one.measured), linestyle="", zorder=3, markersize=5, **own)
        ax.set_xlabel(title)
        ax.set_xlim(left=0)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
    for ax in axes[:1] if wide else axes:
        name_rows(ax, rows, comparison, wide)
    lay_out(figure)
    return figure
