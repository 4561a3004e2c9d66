"""What runs were said to take before they began, against what they took, from records alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from statistics import fmean

from harness.record import Expected, RunRecord
from harness.report import blocks as b
from harness.report.budget import whole_seconds
from harness.report.comparison import GIB, Comparison, Technique
from harness.report.plots import said_and_measured
from harness.report.text import UNKNOWN, listed, number, spread

HOW = (
    "What each run was said to take before it began, with the range that was said, against what it took. "
    "Peak memory is that of live tensors in training, time that of a whole run. An error is how far the "
    "forecast was above (+) or below (−) what was measured, the mean over seeds."
)
PLOT = (
    "What was said (a bar from the least to the most, a line at the likely) and what each seed took (marker)."
)
NONE = "Nothing was forecast of these runs before they began: a bench does so where it has a GPU of its own."


@dataclass(frozen=True)
class Side:
    """A technique's memory or time: what was said (least, likely, most) and what each seed took."""

    said: tuple[float, float, float]
    measured: list[float]

    @property
    def error(self) -> float | None:
        """As a share of what was measured."""
        return self.said[1] / fmean(self.measured) - 1 if self.measured and fmean(self.measured) else None

    @property
    def beyond(self) -> bool:
        """A seed took less or more than the range that was said."""
        return any(not self.said[0] <= value <= self.said[2] for value in self.measured)


def foretold(comparison: Comparison, suffix: str) -> list[b.Block]:
    """A table and a plot; one line where nothing was said."""
    heading = b.Heading("Forecast against measured")
    known = [t for t in comparison.trained if expected(t)]
    if not known:
        return [heading, b.Prose(NONE)] if comparison.trained else []
    unit, scale = unit_of([side(t, "seconds") for t in known])
    sides = {t.label: (side(t, "peak", GIB), side(t, "seconds", scale)) for t in known}
    rows = [[name_of(t), *(cell for one in sides[t.label] for cell in cells(one))] for t in known]
    heads = (("Memory", "GiB"), ("Time", unit))
    columns = ["Technique", *(f"{what}, {kind}" for what, unit in heads for kind in (
        f"forecast ({unit})", f"measured ({unit})", "error (%)"))]  # fmt: skip
    found: list[b.Block] = [heading, b.Prose(HOW), b.Table(columns, rows, notes(known, sides.values()))]
    if beyond := misses(known, sides):
        found.append(b.Prose(beyond))
    images = said_and_measured(comparison, known, sides, unit)
    if images is not None:
        found.append(b.Plot(f"forecast{suffix}", PLOT, images))
    return found


def expected(technique: Technique) -> Expected | None:
    """Of its first run that has a forecast: seeds share one."""
    return next((record.forecast for record in technique.records if record.forecast), None)


def side(technique: Technique, what: str, scale: float = 1) -> Side:
    least, likely, most = getattr(expected(technique), what)
    measured = [value / scale for value in technique.values(MEASURED[what])]
    return Side((least / scale, likely / scale, most / scale), measured)


def peak(record: RunRecord) -> float | None:
    return record.peak("peak_allocated")


def seconds(record: RunRecord) -> float | None:
    """Not of one that went on from a checkpoint: part of its time was spent before."""
    return None if record.resumed else whole_seconds(record)


MEASURED = {"peak": peak, "seconds": seconds}


def unit_of(sides: list[Side]) -> tuple[str, int]:
    longest = max(value for one in sides for value in (*one.said, *one.measured))
    return ("h", 3600) if longest >= 7200 else ("min", 60) if longest >= 120 else ("s", 1)


def name_of(technique: Technique) -> str:
    return f"{technique.label} – {technique.status}" if technique.status else technique.label


def cells(one: Side) -> list[str]:
    least, likely, most = (spread([value]) for value in one.said)
    error = number(100 * one.error, 1, signed=True) if one.error is not None else UNKNOWN
    return [f"{likely} ({least} to {most})", spread(one.measured), error + "†" * one.beyond]


def notes(known: list[Technique], sides: Iterable[tuple[Side, Side]]) -> list[str]:
    found = ["† Beyond the range that was said."] * any(one.beyond for both in sides for one in both)
    if probed := [t.label for t in known if (said := expected(t)) and said.probed]:
        found.append(f"After a probe of some steps: {listed(probed)}.")
    return found


def misses(known: list[Technique], sides: dict[str, tuple[Side, Side]]) -> str:
    """How many, and what explains some; which they are, the table marks. A run that had no room where some
    was forecast is one, too."""
    sums = [sum(one.beyond for one in both) for both in zip(*sides.values(), strict=True)]
    said = [f"{what} of {n}" for what, n in zip(("memory", "time"), sums, strict=True) if n]
    found = [f"Off by more than its range: {listed(said)} of {len(known)} techniques."] * bool(said)
    wrong = [t for t in known if any(one.beyond for one in sides[t.label])]
    if others := [t.label for t in wrong if stepped_otherwise(t)]:
        found.append(f"Steps were computed in another way than was thought: {listed(others, 4)}.")
    if full := [t.label for t in known if any(map(unforeseen, t.records))]:
        found.append(f"No room on the card where some was forecast: {listed(full, 4)}.")
    return " ".join(found)


def stepped_otherwise(technique: Technique) -> bool:
    said = expected(technique)
    return bool({r.kernels.rung for r in technique.done if r.kernels.rung} - {said.rung if said else None})


def unforeseen(record: RunRecord) -> bool:
    """It ran out of a card's memory, and what it was said to take was not more than that at the least."""
    size, cap = record.provenance.device_bytes or inf, record.spec.own_hp.memory_cap * GIB or inf
    said = record.forecast
    return record.status == "oom_gpu" and said is not None and said.device[0] <= min(size, cap)
