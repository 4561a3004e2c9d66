"""One run from its attempt's folder to its record in the store: a child begun, followed, ended."""

import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.child import AGAIN, WHERE, exhausted, out_of_memory
from harness.claims import Claim
from harness.forecast import expected
from harness.nursery import Forked, Fresh, how
from harness.plain import redacted
from harness.record import RunRecord
from harness.shape import parse
from harness.spec import RunSpec
from harness.store import EVENTS, RESULT, SPEC, Store, save
from harness.watchdog import STALL_SECONDS, End, watching

LOG = "log.txt"
LOG_BYTES = 2**20  # kept of each end of what a child prints: a traceback is 10 KiB
PIECE_BYTES = 2**16  # read at once: as much as a pipe holds
POLL_SECONDS = 0.2  # often enough for a progress bar, seldom enough not to disturb the run
CHECKPOINT_SECONDS = 300  # between two of a training: so much is lost at most, for seconds of writing
GRACE_SECONDS = 60  # when asked to end, for a step, a checkpoint and a record, before the child is killed
READ_SECONDS = 10  # for what it still says, when it has ended


@dataclass
class Terms:
    """What all runs of a bench share. `progress` is told of their `event`s; `limit`, `stall`: as the watchdog
    has them; `anew`: from its first step, whatever an earlier attempt has left; `every`: seconds between two
    checkpoints of a training; 0: there are none; `probe`: some of their steps alone."""

    store: Store
    command: str
    progress: Any
    limit: float | None = None
    anew: bool = False
    every: float = CHECKPOINT_SECONDS
    stall: float = STALL_SECONDS
    probe: bool = False


@dataclass(frozen=True)
class Slot:
    """A place that holds one run at a time. `begin(folder)` starts its process; `cores` and `cards`: those
    that it keeps to, none where it may use all; `of`: so many slots there are, as far as is known."""

    begin: Callable[[Path], Fresh | Forked] = Fresh
    cores: tuple[int, ...] = ()
    of: int | None = 1
    cards: tuple[str, ...] = ()


def alone(spec: RunSpec, terms: Terms, slot: Slot, signals: Sequence[int] = ()) -> RunRecord:
    """The run, while nobody else is at it: what another bench, or an engine's worker, is doing is awaited
    and, where it comes out well, taken."""

    def waiting(who: str) -> None:
        if signals:
            raise KeyboardInterrupt(*signals[:1])
        with suppress(Exception):  # as in `follow`
            terms.progress.event(spec, {"phase": f"waiting for {who}"})

    store = terms.store
    with Claim(store.folder, spec.folder, waiting) as claim:
        store.settle(spec.folder)  # what it had begun to keep, if it died
        if claim.waited and (found := store.find(spec)) and found.ok:
            return found
        return run(spec, terms, slot, signals, claim)


def run(
    spec: RunSpec, terms: Terms, slot: Slot = Slot(), signals: Sequence[int] = (), claim: Claim | None = None
) -> RunRecord:
    """`signals`: those that ask the bench to end; it grows meanwhile."""
    store = terms.store
    # To the microsecond: a report has its rows in this order, and runs side by side start within a second.
    started = datetime.now(UTC).isoformat(timespec="microseconds")
    folder, kills, said = store.attempt(spec, terms.anew), oom_kills(), expected(spec)
    own = {"reason": spec.reason, "locations": spec.locations}
    job: dict = {"spec": spec.asked() | own, "command": terms.command, "started": started}
    job |= {"cores": slot.cores, "at_once": slot.of, "cards": slot.cards, "checkpoint_seconds": terms.every}
    job |= {"probe": terms.probe}
    save(folder / SPEC, json.dumps(job, indent=1))
    log = (folder / LOG).open("wb", buffering=0)
    child = slot.begin(folder)
    reader = threading.Thread(target=keep_log, args=(child.stdout, log), daemon=True)
    reader.start()
    try:
        with watching(child.pid, terms.limit, terms.stall) as watchdog:

            def tell(values: dict) -> None:
                watchdog.heard()
                terms.progress.event(spec, values)

            def asked() -> End | None:
                if claim:
                    claim.beat()
                return End("interrupted", f"interrupted; {AGAIN}") if signals else watchdog.look()

            reason = follow(child, folder / EVENTS, tell, asked)
            if reason and reason.status == "timeout" and WHERE:
                child.send_signal(WHERE)
            if reason and reason.kindly:
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
        record = RunRecord(spec, status, error, command=terms.command, started=started)
    told(record, code, reason)
    record.forecast = said
    if claim:
        claim.beat(now=True)
        record.beside = sorted(claim.beside)
    (folder / SPEC).unlink(missing_ok=True)  # its paths are this machine's alone
    store.keep(spec, record)
    return record


def told(record: RunRecord, code: int, reason: End | None) -> None:
    """Adds to a record what its process could not know: that it ended while saving, or why it was ended."""
    if record.lacks_model and code:
        record.warnings[-1] += f": {how(code)}"
    if reason and not record.ok:
        record.status, record.error = reason.status, reason.error


# The life of a child


def follow(
    child, events: Path, tell: Callable[[dict], object], asked: Callable[[], End | None]
) -> End | None:
    """Passes the child's events on until it ends, or until `asked` gives a reason to end it: that reason."""
    position = 0
    while True:
        ended = child.poll() is not None
        whole = b""
        with suppress(OSError):
            if events.is_file():  # a method could have left a pipe there, which would keep us waiting
                with events.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < position:  # begun again, on another machine
                        position = 0
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


def epitaph(code: int, log: Path, reason: End | None, starved: bool) -> tuple[str, str]:
    """Status and error of a child that left no result. `starved`: the kernel killed for want of memory."""
    if reason:
        return reason.status, reason.error
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
