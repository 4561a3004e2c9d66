"""What ends a run that would not end by itself, or would take the machine along: a limit of time, no sign of
progress for long, main memory near its end. The bench goes on with the next.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from harness import machine

START_SECONDS = 600  # until a run is first heard of: imports from a cold network disk take minutes
STALL_SECONDS = 3600  # after that; the longest silence of a sound run is a large model's download
NEAR_BYTES = 2**28  # of main memory that are left: a run fills as much between two looks
LOOK_SECONDS = 1  # between two looks at the memory
GAP_SECONDS = (
    30  # between two looks at a run, a fifth of a second apart, in which the machine must have slept
)
UNDER_WAY: set[int] = set()  # the processes of the runs that are watched, of which the largest is ended


class End(NamedTuple):
    """Why a run is to end. `kindly`: it is asked, and has time for a checkpoint and its record."""

    status: str
    error: str
    kindly: bool = True


class Watchdog:
    """Of the run in a process; `limit`: its seconds, `stall`: those without a sign of progress; 0: any.
    `heard()` at each such sign; `look()`, often, gives why it is to end, or nothing."""

    def __init__(self, process: int, limit: float | None, stall: float):
        self.process, self.limit, self.stall = process, limit, stall
        self.began = self.seen = self.looked = time.monotonic()
        self.silent, self.started = 0.0, False

    def heard(self) -> None:
        self.silent, self.started = 0.0, True

    def look(self) -> End | None:
        now = time.monotonic()
        passed, self.seen = now - self.seen, now
        self.silent += passed if passed < GAP_SECONDS else 0.0
        if self.limit and now - self.began > self.limit:
            return End("timeout", f"not done within the --time-limit of {self.limit:g} s: raise it, or lower "
                       "data.train, hp.epochs, data.test or hp.max_new_tokens")  # fmt: skip
        limit = self.stall if self.started else min(self.stall, START_SECONDS)
        if self.stall and self.silent > limit:
            what = f"no progress for {limit:g} s" if self.started else f"not heard of within {limit:g} s"
            hint = "raise --stall-limit if it was at work" if self.started else "an import may hang"
            return End("timeout", f"{what}: log.txt ends with where it was; {hint}")
        if now - self.looked > LOOK_SECONDS:
            self.looked = now
            return self.starved()
        return None

    def starved(self) -> End | None:
        free = machine.free_bytes()
        if free is None or free > NEAR_BYTES:
            return None
        held = {process: machine.resident_bytes(process) for process in [*UNDER_WAY]}
        own = held.get(self.process, 0)
        if own <= NEAR_BYTES or own < max(held.values()):  # it is not the one that would be missed
            return None
        return End("oom_host", f"ended at {own / 2**30:.1f} GiB, as main memory was down to "
                   f"{free / 2**20:.0f} MiB: lower hp.micro_batch_size or end other programs",
                   kindly=False)  # fmt: skip


@contextmanager
def watching(process: int, limit: float | None, stall: float) -> Iterator[Watchdog]:
    UNDER_WAY.add(process)
    try:
        yield Watchdog(process, limit, stall)
    finally:
        UNDER_WAY.discard(process)
