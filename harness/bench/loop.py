"""The loop of a bench: which runs are cached, which go where, and what a signal does to them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from harness import method
from harness.bench.attempt import CHECKPOINT_SECONDS, POLL_SECONDS, run
from harness.bench.places import Slot, slots
from harness.errors import BadRequest
from harness.nursery import Nursery
from harness.plan import Plan
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.store import Store

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


def method_of(spec: RunSpec) -> type[method.Method]:
    source = method.find(spec.method, method.known_methods(spec.locations.get("plugins", [])))
    return method.resolve(spec.method, source)


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
) -> Iterator[Done]:
    """Runs what is not cached. Only a run that ended ok counts as cached: others are tried again.

    `progress` is told `start(spec, number, total)`, `event(spec, values)` and `end(record, cached)`. A run
    that takes longer than `limit` seconds is ended; `every` so many it leaves a checkpoint, to go on from
    after whatever ends it. A signal that asks the bench to end reaches the runs under way, is recorded, and
    is raised again. Raises Missing before the first run.
    """
    store.recover()
    done: dict[str, RunRecord] = {}
    with ExitStack() as ends:
        places: list[Slot] = []
        while stage := plan.upcoming(done):
            total, pending = plan.total(done, stage), []
            for spec in stage:
                if earlier := None if force else cached(spec, plan, store):
                    record = done[spec.digest] = replace(earlier, spec=spec)
                    progress.end(record, True)
                    yield Done(record, True)
                else:
                    pending.append(located(spec, plan, store))
            if pending and not places:
                places = slots(ends.enter_context(Nursery(needs(plan))), plan)
            numbers = {spec.digest: number for number, spec in enumerate(pending, len(done) + 1)}

            def one(spec: RunSpec, slot: Slot, signals: Sequence[int], numbers=numbers, total=total):
                progress.start(spec, numbers[spec.digest], total)
                return run(spec, store, command, progress, limit, slot, signals, force, every)

            for spec, record in together(pending, places, one):
                done[spec.digest] = record
                progress.end(record, False)
                yield Done(record, False)


def together(
    specs: list[RunSpec], places: list["Slot"], one: Callable
) -> Iterator[tuple[RunSpec, RunRecord]]:
    """`one(spec, slot, signals)` of each, in their order, one a slot at a time. -> each with its record, in
    the order of their ends. After a signal or a fault no other begins."""
    ended: SimpleQueue[Future] = SimpleQueue()
    halted = threading.Event()
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in places:
        free.put(slot)

    def begun(spec: RunSpec) -> tuple[RunSpec, RunRecord]:
        if signals or halted.is_set():
            raise KeyboardInterrupt(*signals[:1])
        slot = free.get()
        try:
            return spec, one(spec, slot, signals)
        except BaseException:
            halted.set()
            raise
        finally:
            free.put(slot)

    with held() as signals, ThreadPoolExecutor(max(1, len(places))) as pool:
        for spec in specs:
            pool.submit(begun, spec).add_done_callback(ended.put)
        faults: list[BaseException] = []
        waiting = len(specs)
        try:
            while waiting:
                with suppress(Empty):
                    future = ended.get(timeout=POLL_SECONDS)  # a signal that comes just before is seen after
                    waiting -= 1
                    if fault := future.exception():
                        faults.append(fault)
                    else:
                        yield future.result()
        finally:
            halted.set()
        if faults:
            raise faults[0]


def located(spec: RunSpec, plan: Plan, store: Store) -> RunSpec:
    """With the places of the runs that it reads: the untouched model's, and an ensemble's members."""
    places = {"before": str(store.path(before))} if (before := base_of(spec, plan)) else {}
    members = {"members": [str(store.path(member)) for member in spec.members]} if spec.members else {}
    return replace(spec, locations=spec.locations | places | members)


def needs(plan: Plan) -> dict[str, list[str]]:
    """Package beyond those of every run -> the methods that need it."""
    found: dict[str, list[str]] = {}
    own = (spec for spec in plan.methods() if not spec.members)
    for name, cls in {spec.method: method_of(spec) for spec in own}.items():
        for need in cls.needs:
            found.setdefault(need, []).append(name)
    return found


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
    holder = folder / ".holder"
    try:
        with FileLock(folder / ".lock", timeout=0):
            holder.write_text(str(os.getpid()))
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise Busy(
            f"another bench (process {pid}) is writing into {folder}: wait, or use --results"
        ) from None


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
