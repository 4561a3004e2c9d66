"""Where the names of points and lines stand: near what they name, and not on each other."""

from itertools import pairwise, product

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.font_manager import FontProperties

from harness.report.plots.style import FAINT, sized

SIZE = 8  # points
TEXT, POINT, LINE = 6, 3, 1  # how bad it is to cover one, an area each
ALONG = np.linspace(0.1, 1, 8)[:, None]  # places along a hairline
DISTANCE, ANGLE = np.array([*product((7, 12, 20, 30, 44, 60, 80, 105), np.arange(24) * np.pi / 12)]).T
HAIR = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}


def place_labels(ax) -> None:
    """Each of `ax.to_label` (x, y, name, its bars) at the nearest free place around its point, tied to it by
    a hairline when far. The axes are laid out already."""
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    scale = ax.figure.dpi / 72
    frame, to_pixels, font = ax.get_window_extent(renderer), ax.transData.transform, FontProperties(size=SIZE)
    fixed = [(TEXT, *text.get_window_extent(renderer).extents) for text in ax.texts]
    for line in ax.lines:  # the front and the level before
        path = line.get_transform().transform(line.get_xydata())
        fixed += [(LINE, *around(a, b, scale)) for a, b in pairwise(path)]
    for x, y, _, bars in ax.to_label:
        point = to_pixels((x, y))
        fixed.append((POINT, *around(point, point, 5 * scale)))
        fixed += [(LINE, *around(a, b, scale)) for a, b in map(to_pixels, bars)]
    boxes = np.array(fixed).reshape(-1, 5)

    def size(name: str) -> tuple[float, float]:
        width, *_ = renderer.get_text_width_height_descent(name, font, False)
        _, height, _ = renderer.get_text_width_height_descent("lp" + name, font, False)  # as a line is set
        return width + 2 * scale, height

    named = sorted((item for item in ax.to_label if item[2]), key=lambda item: (item[1], item[0]))
    labels = [Label(to_pixels((x, y)), *size(name), frame, scale) for x, y, name, _ in named]
    for (x, y, name, _), label in zip(named, labels, strict=True):
        boxes = np.concatenate([boxes, label.settle(boxes)])
        text = ax.annotate(name, (x, y), xytext=label.offset, textcoords="offset points", fontsize=SIZE,
                           zorder=5, ha="left", va="bottom")  # fmt: skip
        text.set_in_layout(False)  # the axes stay where the places were chosen
    hairs = [np.array([label.hair[0], label.hair[-1]]) / ax.figure.dpi for label in labels if label.far]
    ax.add_artist(LineCollection(hairs, colors=FAINT, linewidths=0.6, zorder=5,
                                 transform=ax.figure.dpi_scale_trans)).set_in_layout(False)  # fmt: skip


class Label:
    """One name, and all places that it could have around its point; in pixels."""

    def __init__(self, point, width: float, height: float, frame, scale: float):
        self.point, self.scale = point, scale
        (px, py), along, up = point, np.cos(ANGLE), np.sin(ANGLE)
        left = px + along * DISTANCE * scale - width * (1 - along) / 2
        low = py + up * DISTANCE * scale - height * (1 - up) / 2
        self.spots = np.stack([left, low, left + width, low + height], 1)  # the nearest first
        near = np.stack([np.clip(px, left, left + width), np.clip(py, low, low + height)], 1)
        self.hairs = point + (near - point)[:, None] * ALONG  # (spots, points of a hairline, 2)
        outside = [frame.x0 - left, left + width - frame.x1, frame.y0 - low, low + height - frame.y1]
        self.outside = 1e3 * np.clip(outside, 0, None).sum(0)

    def settle(self, taken: np.ndarray) -> np.ndarray:
        """Where it covers least. `taken`: (boxes, 5: weight, left, low, right, high). -> what it takes."""
        # What is out of reach covers nothing
        low, high = self.spots[:, :2].min(0), self.spots[:, 2:].max(0)
        taken = taken[(taken[:, 1:3] < high).all(1) & (taken[:, 3:] > low).all(1)]
        covered = overlap(self.spots[:, None], taken[:, 1:]) @ taken[:, 0] + self.outside
        texts = taken[taken[:, 0] == TEXT][:, 1:][:, None, None]
        crossed = ((self.hairs >= texts[..., :2]) & (self.hairs <= texts[..., 2:])).all(-1).sum((0, 2))
        best = int((covered + self.scale**2 * (40 * crossed + DISTANCE / 4)).argmin())
        spot, self.hair = self.spots[best], self.hairs[best]
        self.far = bool(DISTANCE[best] > 12)
        self.offset = (spot[:2] - self.point) / self.scale
        boxes = [(TEXT, *spot), *((LINE, *around(at, at, self.scale)) for at in self.hair if self.far)]
        return np.array(boxes)


def around(a: np.ndarray, b: np.ndarray, room: float) -> tuple[float, ...]:
    """The box (left, low, right, high) of two points, and some room."""
    return (*np.minimum(a, b) - room, *np.maximum(a, b) + room)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The areas that boxes (..., 4: left, low, right, high) share."""
    wide, high = (np.minimum(a[..., i + 2], b[..., i + 2]) - np.maximum(a[..., i], b[..., i]) for i in (0, 1))
    return np.maximum(wide, 0) * np.maximum(high, 0)


def name_ends(ax, ends: list[tuple[float, float, str, dict]]) -> None:
    """Names lines at the right of a frame, as near to their ends as they leave each other room. `ends`: (x,
    y, name, look). To be called before the layout, which makes the room; `settle_ends` puts them in place."""
    ends = sorted(ends, key=lambda end: end[1])
    ax.ends = [
        (ax.annotate(name, (x, y), xytext=(1.08, y), textcoords=("axes fraction", "data"), fontsize=SIZE,
                     va="center", ha="left", annotation_clip=False), look)
        for x, y, name, look in ends
    ]  # fmt: skip


def settle_ends(ax) -> None:
    """Gives each its height, its marker and a hairline to its line. The axes are laid out already."""
    frame, gap = ax.get_window_extent(), 1.25 * SIZE * ax.figure.dpi / 72
    low, high = ax.get_ylim()
    heights = [float(ax.transData.transform((0, text.xy[1]))[1]) for text, _ in ax.ends]
    places = apart(heights, gap, frame.y0, frame.y1)
    in_frame = ax.transAxes.inverted()
    for (text, look), place in zip(ax.ends, places, strict=True):
        height = float(in_frame.transform((0, place))[1])
        text.set_anncoords("axes fraction")
        text.xyann = (1.08, height)
        ax.plot([1.055], [height], transform=ax.transAxes, clip_on=False, **sized(look, 4.5))
        ax.annotate("", (text.xy[0], min(max(text.xy[1], low), high)), xytext=(1.035, height),
                    textcoords="axes fraction", annotation_clip=False,
                    arrowprops={**HAIR, "color": look["color"], "shrinkB": 2})  # fmt: skip


def apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as may be (least squares) until neighbours are a gap apart and all
    are within bounds: an isotonic regression of what is left when the gaps are taken out."""
    blocks: list[list[float]] = []  # each shares a place
    for i, place in enumerate(places):
        blocks.append([place - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    highest = max(low, high - (len(places) - 1) * gap)
    return [min(max(at, low), highest) + i * gap for i, at in enumerate(level)]
