"""The loop of a bench: which runs are cached, which go where, and what a signal does to them."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue

from harness import method
from harness.bench.attempt import CHECKPOINT_SECONDS, POLL_SECONDS, Terms
from harness.bench.places import Opens, Places, here, method_of
from harness.bench.remote import tidy
from harness.errors import BadRequest
from harness.plan import Plan, expected_seconds
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.store import Store
from harness.watchdog import STALL_SECONDS

THREADS = 10_000  # at most: one waits for each run that is to be done, and sleeps
# Ctrl-C, a scheduler's end, a closed terminal, which not every system has.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


@dataclass
class Done:
    """A run that stands in the store, and whether it stood there before."""

    record: RunRecord
    cached: bool


def stale(record: RunRecord) -> bool:
    """The method's code is no longer the one that made this record. An ensemble has none of its own."""
    return not record.spec.members and method.code_hash(method_of(record.spec)) != record.hashes.get(
        "method_code"
    )


class Busy(BadRequest):
    """Another bench writes into the same results."""


def bench(
    plan: Plan,
    store: Store,
    command: str,
    progress,
    force: bool = False,
    limit: float | None = None,
    every: float = CHECKPOINT_SECONDS,
    stall: float = STALL_SECONDS,
    where: Opens = here,
) -> Iterator[Done]:
    """Runs what is not cached. Only a run that ended ok counts as cached: others are tried again.

    `progress` is told `start(spec, number, total)`, `event(spec, values)` and `end(record, cached)`. A run
    that takes longer than `limit` seconds is ended, or that makes no progress for `stall`; `every` so many it
    leaves a checkpoint, to go on from after whatever ends it. `where` opens the places that runs go to. A
    signal that asks the bench to end reaches the runs under way, is recorded, and is raised again. Raises
    Missing before the first run.
    """
    store.recover()
    done: dict[str, RunRecord] = {}
    sent: set[str] = set()
    numbers, totals = count(1), [0]
    with ExitStack() as ends:
        crew: Crew | None = None

        def begun(spec: RunSpec) -> None:
            progress.start(spec, next(numbers), totals[-1])

        @cache
        def earlier() -> list[RunRecord]:
            return [record for record in store.records() if record.ok]

        def seconds(spec: RunSpec) -> float:
            return expected_seconds(spec, [*earlier(), *(r for r in list(done.values()) if r.ok)])

        while stage := plan.upcoming(done):
            totals.append(plan.total(done, stage))
            new = [spec for spec in stage if spec.digest not in sent]
            there = {spec.digest: None if force else cached(spec, plan, store) for spec in new}
            for spec in new:
                if found := there[spec.digest]:
                    record = done[spec.digest] = replace(found, spec=spec)
                    next(numbers)
                    tidy(store.folder, spec)
                    progress.end(record, True)
                    yield Done(record, True)
            pending = [located(spec, plan, store) for spec in new if not there[spec.digest]]
            if crew is None and pending:
                terms = Terms(store, command, progress, limit, force, every, stall)
                places = ends.enter_context(where(plan, terms, pending[0]))
                crew = ends.enter_context(Crew(places, begun, seconds))
            if crew:
                crew.add(pending)
            sent |= there.keys()
            if crew is None or len(pending) < len(new):  # what was cached may settle what a search tries next
                continue
            spec, record = crew.next()
            done[spec.digest] = record
            tidy(store.folder, spec)
            progress.end(record, False)
            yield Done(record, False)


class Crew:
    """Those who do runs, one a place at a time, the longest first where there are several. After a signal or
    a fault no other run begins, and those under way are awaited."""

    def __init__(
        self, where: Places, begun: Callable[[RunSpec], object], seconds: Callable[[RunSpec], float]
    ):
        self.where, self.begun, self.seconds = where, begun, seconds
        self.waiting: list[RunSpec] = []
        self.free: SimpleQueue = SimpleQueue()  # places
        self.ended: SimpleQueue[Future] = SimpleQueue()
        self.places = self.under_way = 0
        self.faults: list[BaseException] = []
        self.turn, self.halted = threading.Lock(), threading.Event()

    def __enter__(self) -> "Crew":
        self.ends = ExitStack()
        self.signals = self.ends.enter_context(held())
        self.pool = self.ends.enter_context(ThreadPoolExecutor(THREADS))
        self.ends.callback(self.halted.set)
        return self

    def __exit__(self, *raised) -> bool | None:
        return self.ends.__exit__(*raised)

    def add(self, specs: list[RunSpec]) -> None:
        if not specs or self.halted.is_set() or self.signals:
            return
        self.waiting += specs
        for place in self.where.more(specs):
            self.places += 1
            self.free.put(place)
        for _ in specs:
            self.under_way += 1
            self.pool.submit(self.one).add_done_callback(self.ended.put)

    def one(self) -> tuple[RunSpec, RunRecord]:
        place = self.free.get()
        try:
            if self.signals or self.halted.is_set():
                raise KeyboardInterrupt(*self.signals[:1])
            with self.turn:
                spec = self.waiting.pop(self.longest() if self.places > 1 else 0)
            return spec, self.where.run(spec, place, self.signals, partial(self.begun, spec))
        except BaseException:
            self.halted.set()
            raise
        finally:
            self.free.put(place)

    def longest(self) -> int:
        """Of several that are expected to take as long, the first."""
        times = [self.seconds(spec) for spec in self.waiting]
        return times.index(max(times))

    def next(self) -> tuple[RunSpec, RunRecord]:
        """The next run that has ended. Raises what has gone wrong, when all have."""
        while self.under_way:
            with suppress(Empty):
                future = self.ended.get(timeout=POLL_SECONDS)  # a signal that comes just before is seen after
                self.under_way -= 1
                if fault := future.exception():
                    self.faults.append(fault)
                else:
                    return future.result()
        raise self.faults[0] if self.faults else KeyboardInterrupt(*self.signals[:1])


def located(spec: RunSpec, plan: Plan, store: Store) -> RunSpec:
    """With the places of the runs that it reads: the untouched model's, and an ensemble's members."""
    places = {"before": str(store.path(before))} if (before := base_of(spec, plan)) else {}
    members = {"members": [str(store.path(member)) for member in spec.members]} if spec.members else {}
    return replace(spec, locations=spec.locations | places | members)


@contextmanager
def held():
    """Signals that ask the bench to end wait until the block has ended. -> those that came so far."""
    came: list[int] = []
    earlier = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in earlier.items():
        if handler is not signal.SIG_IGN:  # as nohup and a script's & have it
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if came:  # also where the block has raised, as on a full disk
            raise KeyboardInterrupt(came[0])


@contextmanager
def lock(folder: Path):
    """Two benches never write into one results folder. Raises Busy, naming the other's process."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    file, holder = folder / ".lock", folder / ".holder"
    for path in (file, holder):
        if path.is_symlink():  # what it leads to would be written over
            raise BadRequest(f"{path} is a link: remove it")
    try:
        with FileLock(file, timeout=0):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        who = holder.read_text() if holder.exists() else "an unknown process"
        raise Busy(f"another bench ({who}) is writing into {folder}: wait, or use --results") from None


# Which runs there are already


def cached(spec: RunSpec, plan: Plan, store: Store) -> RunRecord | None:
    """The record of a run that need not be run again. That a trial diverged is what the search asked for."""
    record = store.find(spec)
    if record is None or lacks(record, plan, store):
        return None
    return record if record.ok or (spec.trial and record.status == "diverged") else None


def lacks(record: RunRecord, plan: Plan, store: Store) -> bool:
    """A run that found no answers of the untouched model, where there are some now; an ensemble of members
    that have been run again since."""
    members = [store.find(member) for member in record.spec.members]
    if [m.hashes.get("outputs") if m else None for m in members] != record.hashes.get("members", []):
        return True
    if record.hashes.get("before", "") is not None:
        return False
    before = base_of(record.spec, plan)
    return bool(before and (found := store.find(before)) and found.ok)


def base_of(spec: RunSpec, plan: Plan) -> RunSpec | None:
    """The run of the untouched model that is evaluated as this one is."""
    bases = (base for base in plan if base.method == "base" and base.trial == spec.trial)
    return next((base for base in bases if base.evaluation == spec.evaluation), None)
