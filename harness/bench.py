"""The runs of a plan become records: cached ones are read, others run in a child each.

A process of its own for every run: allocator state, crashes and running out of memory stay in it, and
what ended it is a status in its record, never the end of the bench. Nothing else knows how many slots there
are, of which each holds one run at a time.
"""

import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from harness import machine, method
from harness.child import AGAIN, exhausted, out_of_memory
from harness.errors import BadRequest
from harness.nursery import Forked, Fresh, Nursery, how
from harness.plain import redacted
from harness.plan import Plan
from harness.record import RunRecord
from harness.shape import parse
from harness.spec import RunSpec
from harness.store import EVENTS, RESULT, SPEC, Store, save

LOG = "log.txt"
LOG_BYTES = 2**20  # kept of each end of what a child prints: a traceback is 10 KiB
PIECE_BYTES = 2**16  # read at once: as much as a pipe holds
POLL_SECONDS = 0.2  # often enough for a progress bar, seldom enough not to disturb the run
CHECKPOINT_SECONDS = 300  # between two of a training: so much is lost at most, for seconds of writing
GRACE_SECONDS = 60  # when asked to end, for a step, a checkpoint and a record, before the child is killed
READ_SECONDS = 10  # for what it still says, when it has ended
# Ctrl-C, a scheduler's end, a closed terminal, which not every system has.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
AT_ONCE = (
    2  # runs on a CPU, at most: they share its memory, and what more of them do to a step is not measured
)
RUN_BYTES = (
    3 * 2**30
)  # of a run on a CPU, beside what grows with the weights: libraries, activations, its data
WEIGHTS = (
    10  # times the model's files, at most: these in 16 bits; in 32 the weights, gradients and two moments
)


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


# Where runs go


@dataclass(frozen=True)
class Slot:
    """A place that holds one run at a time. `begin(folder)` starts its process; `cores`: those that it keeps
    to, none where it may use all; `of`: so many slots there are."""

    begin: Callable[[Path], Fresh | Forked] = Fresh
    cores: tuple[int, ...] = ()
    of: int = 1


def slots(nursery: Nursery, plan: Plan) -> list[Slot]:
    """One; on a CPU as many as have memory, and cores for all threads of a run, of their own."""
    folder = plan[0].locations.get("model")
    groups: list[tuple[int, ...]] = []
    if folder and nursery.threads and not nursery.card:
        files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        room = (machine.free_bytes() or 0) // (RUN_BYTES + WEIGHTS * files)
        threads = nursery.threads * max(spec.devices for spec in plan.methods())
        most = min(AT_ONCE, room, machine.quota() // threads)
        cores: list[int] = []
        for siblings in machine.physical_cores():
            cores += siblings
            if len(cores) >= threads and len(groups) < most:
                groups.append(tuple(cores))
                cores = []
    if len(groups) < 2:
        return [Slot(nursery.child)]
    return [Slot(nursery.child, cores, len(groups)) for cores in groups]


def needs(plan: Plan) -> dict[str, list[str]]:
    """Package beyond those of every run -> the methods that need it."""
    found: dict[str, list[str]] = {}
    own = (spec for spec in plan.methods() if not spec.members)
    for name, cls in {spec.method: method_of(spec) for spec in own}.items():
        for need in cls.needs:
            found.setdefault(need, []).append(name)
    return found


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


# One run


def run(
    spec: RunSpec,
    store: Store,
    command: str,
    progress,
    limit: float | None = None,
    slot: Slot = Slot(),
    signals: Sequence[int] = (),
    anew: bool = False,
    every: float = CHECKPOINT_SECONDS,
) -> RunRecord:
    """`signals`: those that ask the bench to end; it grows meanwhile. `anew`: from its first step, whatever
    an earlier attempt has left. `every`: seconds between two checkpoints of a training; 0: there are none."""
    # To the microsecond: a report has its rows in this order, and runs side by side start within a second.
    started = datetime.now(UTC).isoformat(timespec="microseconds")
    folder, kills = store.attempt(spec, anew), oom_kills()
    own = {"reason": spec.reason, "locations": spec.locations}
    job: dict = {"spec": spec.asked() | own, "command": command, "started": started}
    job |= {"cores": slot.cores, "at_once": slot.of, "checkpoint_seconds": every}
    save(folder / SPEC, json.dumps(job, indent=1))
    end = time.monotonic() + (limit or float("inf"))

    def asked() -> str | None:
        return "interrupted" if signals else "timeout" if time.monotonic() > end else None

    log = (folder / LOG).open("wb", buffering=0)
    child = slot.begin(folder)
    reader = threading.Thread(target=keep_log, args=(child.stdout, log), daemon=True)
    reader.start()
    try:
        reason = follow(child, folder / EVENTS, partial(progress.event, spec), asked)
        if reason:
            stop(child, signals)
    finally:
        code = child.clear()
        reader.join(READ_SECONDS)
    try:
        record = RunRecord.from_json(store.text(folder.name, RESULT))
        (folder / RESULT).unlink()
    except (OSError, ValueError) as fault:
        status, error = epitaph(code, folder / LOG, reason, oom_kills() > kills)
        if code == 0:
            error = f"it ended without a whole record ({RESULT} holds what it left): {fault}"
        record = RunRecord(spec, status, error, command=command, started=started)
    told(record, code, limit if reason == "timeout" else None)
    (folder / SPEC).unlink(missing_ok=True)  # its paths are this machine's alone
    store.keep(spec, record)
    return record


def told(record: RunRecord, code: int, limit: float | None) -> None:
    """Adds to a record what its process could not know: that it ended while saving, or took too long."""
    if record.ok and code:  # all was measured: it ended while its model was being saved
        record.warnings[-1] += f": {how(code)}"
    if limit and not record.ok:
        record.status = "timeout"
        record.error = (
            f"not done within the --time-limit of {limit:g} s: raise it, or lower data.train, hp.epochs, "
            "data.test or hp.max_new_tokens"
        )


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


# The life of a child


def follow(
    child, events: Path, tell: Callable[[dict], object], asked: Callable[[], str | None]
) -> str | None:
    """Passes the child's events on until it ends, or until `asked` gives a reason to end it: that reason."""
    position = 0
    while True:
        ended = child.poll() is not None
        whole = b""
        with suppress(OSError):
            if events.is_file():  # a method could have left a pipe there, which would keep us waiting
                with events.open("rb") as file:
                    file.seek(position)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                position += len(whole)
        for line in whole.splitlines():
            with suppress(Exception):  # half a line, a closed terminal: what is shown never ends a run
                tell(parse(line))
        if ended:
            return None
        if reason := asked():
            return reason
        child.rest(POLL_SECONDS)


def stop(child: Fresh | Forked, signals: Sequence[int]) -> None:
    """Asks a child for its record, and waits for it; not after another Ctrl-C."""
    presses, end = signals.count(signal.SIGINT), time.monotonic() + GRACE_SECONDS
    child.terminate()
    child.send_signal(signal.SIGCONT)  # one that is stopped hears nothing
    while child.poll() is None and signals.count(signal.SIGINT) == presses and time.monotonic() < end:
        child.rest(POLL_SECONDS)


OPEN_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?!.*-----END)", re.DOTALL)


def keep_log(output, log) -> None:
    """What a child prints becomes its log: without secrets, and of very much the beginning and the end.

    Reads on whatever becomes of the log: a child whose output is not read would wait for ever.
    """
    written = kept = dropped = 0
    last: deque[bytes] = deque()
    rest = b""

    def write(text: bytes) -> None:
        with suppress(OSError):  # a full disk
            log.write(redacted(text.decode("utf-8", "replace")).encode())

    with output, log:
        for piece in iter(lambda: output.read1(PIECE_BYTES), b""):
            text = rest + piece
            key = OPEN_KEY.search(text)
            cut = key.start() if key else text.rfind(b"\n") + 1  # whole lines: no secret is cut in two
            if len(text) - cut > PIECE_BYTES:
                cut = len(text)
            lines, rest = text[:cut], text[cut:]
            if written < LOG_BYTES:
                write(lines)
                written += len(lines)
                continue
            last.append(lines)
            kept += len(lines)
            while kept > LOG_BYTES:
                size = len(last.popleft())
                kept, dropped = kept - size, dropped + size
        write(b"[... %d bytes are left out ...]\n" % dropped * bool(dropped) + b"".join(last) + rest)


def epitaph(code: int, log: Path, reason: str | None, starved: bool) -> tuple[str, str]:
    """Status and error of a child that left no result. `starved`: the kernel killed for want of memory."""
    if reason:
        return "interrupted", f"interrupted; {AGAIN}"
    if code == -signal.SIGKILL and not starved:
        return "interrupted", f"killed from outside, and not by the kernel for want of memory; {AGAIN}"
    said = log.read_text("utf-8", "replace") if log.is_file() else ""
    lines = [line for line in said.splitlines() if line.strip()]
    text = f"ended with {how(code)}: {lines[-1][:300] if lines else 'no output'}"
    status = "oom_host" if code == -signal.SIGKILL else exhausted("\n".join(lines[-20:]))
    return out_of_memory(status, text) if status else ("failed", text)


COUNTERS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def oom_kills() -> int:
    """How often the kernel has killed for want of memory, here or in this container, as far as it says."""
    found = 0
    for path in COUNTERS:
        with suppress(OSError):
            lines = (line.split() for line in Path(path).read_text().splitlines())
            found += sum(int(words[1]) for words in lines if words[0] == "oom_kill")
    return found


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
