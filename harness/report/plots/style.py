"""How plots look: one style, a look for each method's name, pictures that are the same bytes each time."""

import io
import logging
import re
from collections.abc import Callable, Collection
from functools import partial, wraps
from inspect import signature
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from harness.forks import each
from harness.plain import plain
from harness.report.comparison import Comparison, Technique
from harness.spec import digest

# Okabe and Ito's colours, which colour-blind readers can tell apart, with Tol's wine in place of the yellow
# that is faint on white. A marker tells apart those of one colour, and stands alone in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "<", ">", "P", "X", "*", "d")
PLACES = len(COLOURS) * len(MARKERS)
SALT = 236155  # with it no two of the methods that come with Tuneoff look the same: tests/test_plots.py
INK, SOFT, FAINT = "#333333", "#666666", "#8a8a8a"
NAME = 32  # characters of a label
BRIEF = 20  # on a phone
WIDTHS = {True: 9.4, False: 4.4}  # inches: beside a page's text, and on a phone
NARROW = "narrow"  # of a phone
PLACES_IN_SVG = re.compile(rb' (?:d|x|y)="[^"]*"')
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "tuneoff",  # ids in the SVG are otherwise random
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}


class Images(dict):
    """A picture as {"svg": ..., "png": ...}, each made when it is first asked for: without time, program name
    or random ids in it. `narrow`, as SVG: the same with its panels below each other, as a phone has room
    for; a picture without panels beside each other has none."""

    def __init__(self, make: Callable[[], Figure], narrow: Callable[[], Figure] | None = None):
        self.make, self.make_narrow = make, narrow

    def __missing__(self, kind: str) -> bytes:
        self |= self.made([kind])
        return self[kind]

    @property
    def figure(self) -> Figure:
        return self.make()

    def made(self, kinds: Collection[str]) -> dict[str, bytes]:
        """The kinds that there are; no figure, which takes megabytes, is kept."""
        found, wide = {}, [kind for kind in kinds if kind != NARROW]
        if wide:
            figure = self.make()  # once for all of them
            found = {kind: saved(figure, kind) for kind in wide}
        if NARROW in kinds and self.make_narrow:
            found[NARROW] = saved(self.make_narrow(), "svg")
        return found


def draw(pictures: list[Images], kinds: Collection[str]) -> None:
    """All pictures as these kinds, several at once: they share nothing."""
    for picture, found in zip(pictures, each(lambda one: one.made(kinds), pictures), strict=True):
        picture |= found


def saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None, "Creator": None}, "transparent": True}
    if kind == "png":
        options = {"metadata": {"Software": None}, "dpi": 160, "pil_kwargs": {"compress_level": 3}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, **options)
    return file.getvalue() if kind == "png" else slim(file.getvalue())


def slim(svg: bytes) -> bytes:
    """Without indentation, and places to a hundredth of a point, which nobody sees."""

    def rounded(places: re.Match[bytes]) -> bytes:
        return re.sub(rb"(\.\d\d)\d+", rb"\1", places[0])

    return PLACES_IN_SVG.sub(rounded, re.sub(rb"\n +<", b"\n<", svg))


def drawn(there: Callable[..., Any] = lambda *_: True):
    """A drawing function in the report's style: its figure as images, or None where `there`, of the same
    arguments, finds nothing to draw. One that takes `wide` draws a narrow figure too."""

    def decorated(draw: Callable[..., Figure]):
        two = "wide" in signature(draw).parameters

        def styled(*args, **options) -> Figure:
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
            with matplotlib.rc_context(STYLE):
                return draw(*args, **options)

        @wraps(draw)
        def wrapped(*args) -> Images | None:
            narrow = partial(styled, *args, wide=False) if two else None
            return Images(partial(styled, *args), narrow) if there(*args) else None

        return wrapped

    return decorated


def lay_out(figure: Figure) -> None:
    """Once, before what depends on the places of axes. They stay, and so do their labels, which matplotlib
    would place anew each time that it draws."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine(None)  # which would draw all of it once more for each kind
    lefts: dict[float, float] = {}  # of the labels of a column of axes: they are aligned
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            x, y = axis.label.get_transform().transform(axis.label.get_position())
            if axis is ax.yaxis and axis.label.get_text():
                lefts[ax.bbox.x0] = min(x, lefts.get(ax.bbox.x0, x))
            x, y = ax.transAxes.inverted().transform((x, y)).tolist()
            axis.set_label_coords(x, y)
    for ax in figure.axes:
        if ax.bbox.x0 in lefts:
            left = ax.transAxes.inverted().transform((lefts[ax.bbox.x0], 0)).tolist()[0]
            ax.yaxis.set_label_coords(left, 0.5)


def looks(comparison: Comparison) -> dict[str, dict]:
    """Method -> colour and marker, by its name: the same in all plots of all comparisons. Only where two of
    one comparison would look the same, the later by name has the next that is free."""
    methods = {t.spec.method for t in comparison.trained}
    methods |= {found.tuning.trial.method for found in comparison.searches}
    places: dict[str, int] = {}
    for method in sorted(methods):
        place = int(digest([SALT, method]), 16) % PLACES
        while place in places.values() and len(places) < PLACES:
            place = (place + 13) % PLACES  # another colour, another marker
        places[method] = place
    by_place = {m: divmod(place, len(COLOURS)) for m, place in places.items()}
    return {m: {"color": COLOURS[colour], "marker": MARKERS[mark]} for m, (mark, colour) in by_place.items()}


def sized(look: dict, points: float) -> dict:
    """With a marker of a size that looks as large as the others'."""
    return {**look, "markersize": points * (1.35 if look["marker"] == "*" else 1)}


def short(text: str, most: int = NAME) -> str:
    """A name that fits beside a point. Both ends are kept: marks of a track and of options are last."""
    text, last = " ".join(plain(text).split()), 3 * most // 8
    return text if len(text) <= most else f"{text[: most - 1 - last].rstrip()}…{text[-last:].lstrip()}"


def name_of(technique: Technique, wide: bool = True) -> str:
    return short(technique.label, NAME if wide else BRIEF)


def logarithmic(ax, steps: tuple[int, ...]) -> None:
    """`steps`: of a decade, that are labelled."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
