"""What there is for a run, memory and time, and what a technique takes of it."""

from dataclasses import dataclass
from math import ceil, floor, inf, log10

from harness.record import NEEDED, RunRecord
from harness.report.comparison import Comparison, Technique
from harness.report.text import listed

DECIMAL = ((10**6, "MB"), (10**9, "GB"), (10**12, "TB"))
BINARY = ((2**20, "MiB"), (2**30, "GiB"), (2**40, "TiB"))
TIMES = ((1, "s"), (60, "min"), (3600, "h"))
GAUGES = {  # of what must fit, the first that is known; and what it is
    "peak_device": "what a run took of the card (device)",
    "peak_reserved": "what the allocator held of the card (reserved; its context is not in it)",
    "peak_host": "a run's resident memory, which says nothing of a GPU's",
}
SPACE = (
    "Memory: {}, in its highest phase, evaluation included; the peak memory of the tables is less, as it is "
    "of live tensors in training. A smaller card may do with less, as an allocator returns what it need not "
    "hold."
)
RESIDENT = "Memory: {}, in its highest phase, evaluation included."
TIME = (
    "Time: of a whole run, from loading to saving, evaluation included. Another machine takes another time."
)
SEARCHES = "The trials of a search are not in it."
WORST = "Of several seeds the worst counts, without disturbed ones where there are others; measured on {}."


@dataclass(frozen=True)
class Budget:
    """What there is for a run; infinite: no limit. `binary`: memory is told in GiB, else in GB."""

    memory: float = inf  # bytes
    seconds: float = inf
    binary: bool = True

    def __bool__(self) -> bool:
        return min(self.memory, self.seconds) < inf

    def __str__(self) -> str:
        return self.told(self.memory, self.seconds)

    def bytes(self, amount: float) -> str:
        return rounded_up(amount, BINARY if self.binary else DECIMAL)

    def told(self, memory: float | None, seconds: float | None) -> str:
        """Both, as far as they are known and limited."""
        found = [self.bytes(memory)] if memory is not None and self.memory < inf else []
        found += [rounded_up(seconds, TIMES)] if seconds is not None and self.seconds < inf else []
        return " and ".join(found)


def rounded_up(amount: float, units: tuple[tuple[int, str], ...]) -> str:
    """To three digits: who has so much has enough."""
    size, unit = next((u for u in reversed(units) if amount >= u[0]), units[0])
    value = amount / size
    step = 10.0 ** (floor(log10(max(value, 1e-9))) - 2)
    return f"{min(ceil(value / step - 1e-6) * step, value * 1.01):,.6g} {unit}"


@dataclass(frozen=True)
class Need:
    """What a technique takes of a budget. None: it was not measured."""

    memory: float | None = None  # bytes
    seconds: float | None = None

    def over(self, budget: Budget) -> list[str]:
        """`26 GB, 2 GB too much`, of each limit that does not hold."""
        memory, seconds, found = self.memory or 0, self.seconds or 0, []
        if memory > budget.memory:
            found.append(f"{budget.bytes(memory)}, {budget.bytes(memory - budget.memory)} too much")
        if seconds > budget.seconds:
            more = rounded_up(seconds - budget.seconds, TIMES)
            found.append(f"{rounded_up(seconds, TIMES)}, {more} too long")
        return found

    def unknown(self, budget: Budget) -> list[str]:
        found = (("its memory", self.memory, budget.memory), ("its time", self.seconds, budget.seconds))
        return [what for what, takes, limit in found if takes is None and limit < inf]

    def times(self, budget: Budget) -> float:
        """The budget that it needs, as a multiple of this one."""
        return max((self.memory or 0) / budget.memory, (self.seconds or 0) / budget.seconds)


def measured(comparison: Comparison, budget: Budget) -> str:
    """What a budget is held against."""
    devices = {r.provenance.device or "cpu" for t in comparison.trained for r in t.done}
    where = listed(sorted("a CPU" if name == "cpu" else name for name in devices))
    name = gauge(comparison)
    space = (RESIDENT if name == "peak_host" else SPACE).format(GAUGES[name])
    found = [space] if budget.memory < inf else []
    found += [TIME, *[SEARCHES] * bool(comparison.searches)] if budget.seconds < inf else []
    return " ".join([*found, WORST.format(where)])


def gauge(comparison: Comparison) -> str:
    """What the memory of all is told by: resident memory and a card's do not compare."""
    done = [r for t in comparison.trained for r in t.done]
    known = (name for name in GAUGES if any(r.peak(name, tuple(r.phases)) is not None for r in done))
    return next(known, "peak_host")


def need(comparison: Comparison, technique: Technique) -> Need:
    """Of its worst seed; unknown where a seed ran out of it. Other programs on the card, or a busy machine,
    are in what a disturbed run took."""
    name, ends = gauge(comparison), {record.status for record in technique.records}

    def worst(of) -> float | None:
        return max((value for r in done if (value := of(r)) is not None), default=None)

    done = [record for record in technique.done if not record.disturbed] or technique.done
    memory, seconds = worst(lambda r: whole_memory(r, name)), worst(whole_seconds)
    return Need(None if ends & {"oom_gpu", "oom_host"} else memory, None if "timeout" in ends else seconds)


def whole_memory(record: RunRecord, name: str) -> int | None:
    """Bytes. A card's gauge that fails in some phase, and so is below the allocator's, is unknown."""
    most, held = (record.peak(of, NEEDED) for of in (name, "peak_reserved"))
    return None if name == "peak_device" and most is not None and most < (held or 0) else most


def whole_seconds(record: RunRecord) -> float | None:
    return sum(phase.seconds for phase in record.phases.values()) or None
