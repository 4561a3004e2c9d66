"""Who else was at work while a training was timed: other processes on its cores, other programs and heat on
its card.

Counters are read at the borders of the phases that are timed, the card once a second: it costs nothing that
could be measured. What is found is told in words, with its numbers: a time that was disturbed is not ranked.
"""

import os
import time
from dataclasses import dataclass, fields
from math import sqrt
from statistics import median

from harness import machine

SHARE = 0.05  # of what the run may use, or of the seconds: what takes more may slow a step by as much
LEAST_SECONDS = 0.3  # of others' work: the kernel counts in hundredths of a second, on each core
LAUNCHING_CORES = 2  # that a run on a GPU can use: one thread gives the card its work, one in the backward
DRIFT = 0.25  # of a step: thirds of trainings that nobody disturbed were seen 16 % apart
CHANCE = 3.3  # standard errors: thirds of an even training differ so far in one of a thousand


@dataclass
class Counters:
    """Seconds; since the machine's start, or between two moments."""

    passed: float = 0.0
    busy: float = 0.0  # CPU seconds of anybody on the cores that this process may use
    stolen: float = 0.0  # CPU seconds that a hypervisor gave to other machines
    own: float = 0.0  # CPU seconds of this process, of the children that it waited for, and of its bench

    @classmethod
    def now(cls, *others: int) -> "Counters | None":
        """Null where the system does not count. `others`: processes whose seconds are our own, too."""
        if (counted := machine.busy_seconds()) is None:
            return None
        times = os.times()  # of this process with all its threads: those that wait by spinning are its own
        bench = int(os.environ.get("TUNEOFF_BENCH", 0))
        own = time.process_time() + times.children_user + times.children_system
        own += sum(map(machine.seconds_of, (bench, *others)))
        return cls(time.perf_counter(), *counted, own)

    def add(self, start: "Counters", end: "Counters") -> None:
        for field in fields(self):
            passed = getattr(end, field.name) - getattr(start, field.name)
            setattr(self, field.name, getattr(self, field.name) + passed)


@dataclass
class Glance:
    """At the card."""

    others: int  # bytes that other programs hold
    slowed_by: set[str]
    clock: tuple[int, int] | None  # MHz, now and at most

    @classmethod
    def now(cls) -> "Glance":
        return cls(machine.card_bytes_of_others() or 0, machine.card_slowed_by(), machine.card_clock())


class Contention:
    """`open()` and `close()` at the borders of what is timed; `look()` once a second, where there is a card;
    then `reasons()`."""

    def __init__(self, cuda: bool, others: tuple[int, ...] = ()):
        self.others = others  # processes of the same run, on further devices
        launching = LAUNCHING_CORES * (1 + len(others)) if cuda else float("inf")
        self.cores = min(len(machine.cores()), machine.quota(), launching)
        self.spare = len(machine.cores()) - self.cores  # that others may use without taking from this run
        self.total = Counters()
        self.glances: list[Glance] = []
        self.start: Counters | None = None
        self.known = False  # whether the system counts at all
        self.earlier: list[str] = []  # of attempts that were stopped, and whose steps count on

    def open(self) -> None:
        self.start = Counters.now(*self.others)

    def close(self) -> None:
        if self.start and (end := Counters.now(*self.others)):
            self.total.add(self.start, end)
            self.known = True
        self.start = None

    def look(self) -> None:
        if self.start:
            self.glances.append(Glance.now())

    def reasons(self, step_seconds: list[float]) -> list[str] | None:
        """What disturbed the training whose steps took so long; null where nothing is known of it.

        Steps are to be alike: of a method whose work differs from step to step, none are given.
        """
        if not self.known:
            return None
        return [*self.earlier, *self.of_cores(), *self.of_card(), *drifting(step_seconds)]

    def of_cores(self) -> list[str]:
        total = self.total
        might = self.cores * total.passed
        taken = total.busy - total.own - self.spare * total.passed
        shares = {"other processes": taken, "other machines on this host": total.stolen}
        return [
            f"{who} took {seconds / might:.0%} of the processor time that the run could use "
            f"({seconds:.1f} of {might:.1f} s)"
            for who, seconds in shares.items()
            if seconds > max(SHARE * might, LEAST_SECONDS)
        ]

    def of_card(self) -> list[str]:
        found = []
        among = [glance for glance in self.glances if glance.others > machine.BUSY_BYTES]
        if len(among) > SHARE * len(self.glances):
            most = max(glance.others for glance in among)
            found.append(
                f"other programs held up to {most / 2**30:.1f} GiB of the card in {self.share(among)}"
            )
        slow = [glance for glance in self.glances if glance.slowed_by]
        if len(slow) > SHARE * len(self.glances):
            who = " and ".join(sorted(set.union(*(glance.slowed_by for glance in slow))))
            clocks = [glance.clock for glance in slow if glance.clock]
            pace = (
                f", down to {min(clocks)[0]:,} of {max(most for _, most in clocks):,} MHz" if clocks else ""
            )
            found.append(f"{who} slowed the card in {self.share(slow)}{pace}")
        return found

    def share(self, glances: list[Glance]) -> str:
        return f"{len(glances) / len(self.glances):.0%} of the seconds"


def drifting(step_seconds: list[float]) -> list[str]:
    """Whether the last third of the steps took longer or shorter than the first, by more than DRIFT and by
    more than chance: by the ranks of their seconds (Mann and Whitney), which a few long steps do not move."""
    third = len(step_seconds) // 3
    first, last = step_seconds[:third], step_seconds[-third:]
    if third < 2 or median(first) <= 0:
        return []
    ratio = median(last) / median(first)
    wins = sum((b > a) + (b == a) / 2 for a in first for b in last)
    deviation = (wins - third**2 / 2) / sqrt(third**2 * (2 * third + 1) / 12)
    if abs(ratio - 1) <= DRIFT or abs(deviation) <= CHANCE:
        return []
    return [f"its last third of steps took {ratio:.2f} times as long as its first, by the median"]
