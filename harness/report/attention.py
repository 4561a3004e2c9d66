"""What models attend to in one conversation, before and after: where somebody has asked for it."""

from typing import Any, TypedDict

import numpy as np
from matplotlib.figure import Figure

from harness.plain import plain
from harness.record import RunRecord
from harness.report.blocks import Block, Heading, Plot, Prose
from harness.report.comparison import Comparison
from harness.report.plots import drawn, lay_out, safe
from harness.shape import check, parse
from harness.store import ATTENTION, Store

HOW = (
    "One test conversation, each token a row, and how much of its attention goes to each token up to it: the "
    "mean over the heads and layers of a group. The first token takes what is not needed elsewhere, so "
    "colours show the square root of a share. Below, the difference: red where the trained model attends "
    "more, blue where less, to five percentage points and beyond. The answer begins at the line."
)
MOST_TOKENS = 128  # of a file that somebody may have changed
MOST = 0.05  # of a difference, at the end of its colours


class Maps(TypedDict):
    tokens: list[str]
    answer: int
    layers: list[list[int]]
    before: list[list[list[float]]]
    after: list[list[list[float]]]


def attended(comparison: Comparison, store: Store, suffix: str) -> list[Block]:
    """A plot for each run that has such maps. `suffix`: of the plots' names."""
    found: list[Block] = []
    for technique in comparison.trained:
        for record in technique.done:
            if maps := read(store, record):
                name = f"attention-{safe(record.folder)}{suffix}"
                caption = f"{technique.label}, seed {record.spec.seed}: what it attends to, before and after."
                found.append(Plot(name, caption, draw(maps)))
    return [Heading("Attention in one conversation"), Prose(HOW), *found] if found else []


def read(store: Store, record: RunRecord) -> Maps | None:
    """None where there are none, or what lies there are no maps."""
    try:
        maps = parse(store.text(record.folder, ATTENTION))
        check(maps, Maps, ATTENTION)
        size = len(maps["tokens"])
        shapes = {np.shape(maps[name]) for name in ("before", "after")}
        fine = 0 < size <= MOST_TOKENS and all(len(pair) == 2 for pair in maps["layers"])
        return maps if fine and shapes == {(len(maps["layers"]), size, size)} else None
    except (OSError, ValueError):
        return None


@drawn()
def draw(maps: Maps) -> Figure:
    tokens = [plain(token).strip()[:9] or "\u2423" for token in maps["tokens"]]
    before, after = (np.array(maps[name]) for name in ("before", "after"))
    groups, size = len(before), len(tokens)
    figure = Figure(figsize=(3.5 * groups + 1.2, 11.4), layout="constrained")
    axes: Any = figure.subplots(3, groups, sharex=True, sharey=True, squeeze=False)
    above: np.ndarray = np.triu(np.ones((size, size), dtype=bool), 1)  # what comes later nobody attends to
    rows = (("before", np.sqrt(before), "viridis", 0, 1), ("after", np.sqrt(after), "viridis", 0, 1),
            ("after less before", after - before, "RdBu_r", -MOST, MOST))  # fmt: skip
    for i, (name, values, colours, low, high) in enumerate(rows):
        for j, (first, last) in enumerate(maps["layers"]):
            ax = axes[i, j]
            ax.grid(False)
            shown = np.ma.masked_where(above, values[j])
            picture = ax.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            ax.axhline(maps["answer"] - 0.5, color="#d55e00", linewidth=0.8)
            if i == 0:
                ax.set_title(f"Layers {first} to {last}" if last > first else f"Layer {first}")
        axes[i, 0].set_ylabel(name)
        bar = figure.colorbar(picture, ax=axes[i], shrink=0.8, aspect=30)
        ticks = (0, 0.01, 0.05, 0.2, 0.5, 1) if i < 2 else (-MOST, 0, MOST)
        bar.set_ticks(np.sqrt(ticks) if i < 2 else ticks, labels=[f"{100 * tick:.0f}%" for tick in ticks])
    for ax in axes[:, 0]:
        ax.set_yticks(range(size), tokens, fontsize=min(6, 215 / size))
    for ax in axes[-1]:
        ax.set_xticks(range(size), tokens, fontsize=min(6, 215 / size), rotation=90)
    lay_out(figure)
    return figure
