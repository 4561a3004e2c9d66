"""How long a bench will still take, from the runs that have ended: a range, or what it takes at the least."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable

from harness.plan import Plan
from harness.record import RunRecord
from harness.spec import RunSpec

UNITS = ((1, "s"), (60, "min"), (3600, "h"))
Kind = tuple[str, bool]  # a method, and whether it is a trial of it


def kind(spec: RunSpec) -> Kind:
    return spec.method, spec.trial


class Remaining:
    """A run of a kind that has ended takes as long as one of those did, or longer by as much as one that is
    under way already has: the machine is busier now. One of a kind that has not ended may take any time;
    before a training has ended here, nothing is said."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.left = Counter(map(kind, plan))
        for tuning in plan.tunings:
            self.left[tuning.trial.method, True] += plan.trials
            self.left[tuning.trial.method, False] += len(plan.seeds)
        self.done, self.total, self.slots = 0, self.left.total(), 1
        self.begun: dict[str, tuple[Kind, float]] = {}  # of the runs under way
        self.took: dict[Kind, list[float]] = defaultdict(list)  # seconds
        self.cached: list[RunRecord] = []
        self.phases = self.walls = 0.0  # seconds of those that ended here, as measured and by the clock
        self.devices: set[str | None] = set()  # on which a training has ended here

    def start(self, spec: RunSpec, total: int) -> None:
        """`total`: so many runs there are, at most."""
        self.total = total
        self.begun[spec.digest] = kind(spec), self.clock()
        self.slots = max(self.slots, len(self.begun))  # that many run side by side

    def went_on(self, spec: RunSpec, earlier: float) -> None:
        """A run under way had taken so many seconds before it was stopped."""
        of, began = self.begun[spec.digest]
        self.begun[spec.digest] = of, began - earlier

    def end(self, record: RunRecord, cached: bool) -> None:
        self.done += 1
        self.left[kind(record.spec)] -= 1
        of, began = self.begun.pop(record.spec.digest, (None, 0.0))
        if cached:
            self.cached.append(record)
        elif of:
            self.took[of].append(self.clock() - began)
            self.walls += self.took[of][-1]
            self.phases += measured(record)
            self.devices |= {record.provenance.device} if record.spec.trains and record.ok else set()

    def __str__(self) -> str:
        said = f"{self.done} of {self.total} runs done"
        return ", ".join(filter(None, (said, self.time())))

    def time(self) -> str:
        if not self.devices or self.done >= self.total:
            return ""
        took = {of: own for of, own in self.took.items() if own}
        beside = max(1.0, self.walls / self.phases) if self.phases else 1.0  # a process starts, and waits
        for record in self.cached:  # as fast as here, on a device of the same name
            if record.provenance.device in self.devices and kind(record.spec) not in self.took:
                took.setdefault(kind(record.spec), []).append(beside * measured(record))
        known = [(of, n) for of, n in self.left.items() if n > 0 and of in took]
        waiting = self.total - self.done
        low = sorted(min(took[of]) for of, n in known for _ in range(n))[:waiting]
        high = sorted(max(took[of]) for of, n in known for _ in range(n))[-waiting:]
        past = [(took[of], self.clock() - began) for of, began in self.begun.values() if of in took]
        slower = max([1.0, *(seconds / max(own) for own, seconds in past if max(own))])
        high = [slower * seconds for seconds in high]
        least = sum(low) - sum(min(seconds, min(own)) for own, seconds in past)
        most = sum(high) - sum(min(seconds, slower * max(own)) for own, seconds in past)
        # Places side by side are never idle while a run waits, and the longest may come last (Graham 1966).
        least, most = least / self.slots, most / self.slots + (1 - 1 / self.slots) * max(high, default=0)
        if len(low) < waiting:
            return f"at least {amount(least, least)} left" if least > 0 else ""
        return f"{amount(least, most)} left"


def measured(record: RunRecord) -> float:
    return sum(phase.seconds for phase in record.phases.values())


def amount(low: float, high: float) -> str:
    """`8 to 12 min`, to two digits, and no fraction of a second."""
    size, unit = next((u for u in UNITS if high < 100 * u[0]), UNITS[-1])
    ends = dict.fromkeys(f"{float(f'{round(value) / size:.2g}'):g}" for value in (low, high))
    return f"{' to '.join(ends)} {unit}"
