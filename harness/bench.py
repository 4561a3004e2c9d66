"""The runs of a plan become records: cached ones are read, others run in a child each.

A fresh process for every run: allocator state, crashes and running out of memory stay in it, and
what ended it is a status in its record, never the end of the bench.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness import ROOT, machine, method
from harness.child import AGAIN, exhausted, out_of_memory
from harness.errors import BadRequest
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
GRACE_SECONDS = 10  # to write a record when asked to end, before the child is killed
IMPORT_SECONDS = 600  # for torch and its like from a cold network disk
# Ctrl-C, a scheduler's end, a closed terminal, which not every system has.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
MARK = "TUNEOFF_BENCH"  # in the environment of a child and of all that it starts: this bench's process


@dataclass
class Done:
    """A run that stands in the store, and whether it stood there before."""

    record: RunRecord
    cached: bool


def stale(record: RunRecord) -> bool:
    """The method's code is no longer the one that made this record."""
    return method.code_hash(method_of(record.spec)) != record.hashes.get("method_code")


def method_of(spec: RunSpec) -> type[method.Method]:
    source = method.find(spec.method, method.known_methods(spec.locations.get("plugins", [])))
    return method.resolve(spec.method, source)


class Busy(BadRequest):
    """Another bench writes into the same results."""


class Missing(BadRequest):
    """What the runs need cannot be imported."""


def bench(
    plan: Plan,
    store: Store,
    command: str,
    progress,
    force: bool = False,
    limit: float | None = None,
) -> Iterator[Done]:
    """Runs what is not cached. Only a run that ended ok counts as cached: others are tried again.

    `progress` is told `start(spec, number, total)`, `event(values)` and `end(record, cached)`. A run
    that takes longer than `limit` seconds is ended. A signal that asks the bench to end reaches the
    child, is recorded, and is raised again. Raises Missing before the first run.
    """
    store.recover()
    tried = False
    done: dict[str, RunRecord] = {}
    while stage := plan.upcoming(done):
        total = plan.total(done, stage)
        for spec in stage:
            earlier = None if force else cached(spec, plan, store)
            if earlier:
                record = replace(earlier, spec=spec)
            else:
                if not tried:
                    try_imports(plan.methods())
                    tried = True
                if before := base_of(spec, plan):
                    spec = replace(spec, locations={**spec.locations, "before": str(store.path(before))})
                progress.start(spec, len(done) + 1, total)
                record = run(spec, store, command, progress, limit)
            done[spec.digest] = record
            progress.end(record, bool(earlier))
            yield Done(record, bool(earlier))


def cached(spec: RunSpec, plan: Plan, store: Store) -> RunRecord | None:
    """The record of a run that need not be run again. That a trial diverged is what the search asked for."""
    record = store.find(spec)
    if record is None or lacks(record, plan, store):
        return None
    return record if record.ok or (spec.trial and record.status == "diverged") else None


def lacks(record: RunRecord, plan: Plan, store: Store) -> bool:
    """A run that found no answers of the untouched model, where there are some now."""
    if record.hashes.get("before", "") is not None:
        return False
    before = base_of(record.spec, plan)
    return bool(before and (found := store.find(before)) and found.ok)


def base_of(spec: RunSpec, plan: Plan) -> RunSpec | None:
    """The run of the untouched model that is evaluated as this one is."""
    bases = (base for base in plan if base.method == "base" and base.trial == spec.trial)
    return next((base for base in bases if base.evaluation == spec.evaluation), None)


def run(spec: RunSpec, store: Store, command: str, progress, limit: float | None = None) -> RunRecord:
    with held() as signals:
        folder = store.attempt(spec)
        started, kills = datetime.now(UTC).isoformat(timespec="seconds"), oom_kills()
        own = {"reason": spec.reason, "locations": spec.locations}
        job = {"spec": spec.asked() | own, "command": command}
        save(folder / SPEC, json.dumps(job, indent=1))
        end = time.monotonic() + (limit or float("inf"))

        def asked() -> str | None:
            return "interrupted" if signals else "timeout" if time.monotonic() > end else None

        log = (folder / LOG).open("wb", buffering=0)
        child = subprocess.Popen(
            [*PYTHON, "harness.child", str(folder.resolve())],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=keep_log, args=(child.stdout, log), daemon=True)
        reader.start()
        try:
            reason = follow(child, folder / EVENTS, progress, asked)
            if reason:
                stop(child, signals)
        finally:
            clear(child)
            reader.join(GRACE_SECONDS)
        try:
            record = RunRecord.from_json(store.text(folder.name, RESULT))
            (folder / RESULT).unlink()
        except (OSError, ValueError) as fault:
            status, error = epitaph(child.returncode, folder / LOG, reason, oom_kills() > kills)
            if child.returncode == 0:
                error = f"it ended without a whole record ({RESULT} holds what it left): {fault}"
            record = RunRecord(spec, status, error, command=command, started=started)
        told(record, child.returncode, limit if reason == "timeout" else None)
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


# The child, and what it finds

PYTHON = [sys.executable, "-P", "-m"]  # -P: nothing is imported from the working directory
ENVIRONMENT = {  # quiet libraries, and no thread pools beside torch's own
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
}
CORES = len(machine.cores())
# A thread that waits spins, beside a busy neighbour for a core that is not there: one is left to it.
THREADS = {"OMP_NUM_THREADS": str(max(1, CORES - 1))}


def environment() -> dict[str, str]:
    """For a child: the user's first."""
    return THREADS | os.environ | ENVIRONMENT | {"PYTHONPATH": python_path(), MARK: str(os.getpid())}


def python_path() -> str:
    """What the user has added, but for the working directory, which an empty entry means as well."""
    added = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(map(str, [ROOT, *(path for path in added if path != Path.cwd())]))


def try_imports(specs: list[RunSpec]) -> None:
    """Imports, in a process of its own, what these runs will: it costs seconds, a run that breaks hours."""
    needs: dict[str, list[str]] = {}
    for name, cls in {spec.method: method_of(spec) for spec in specs}.items():
        for need in cls.needs:
            needs.setdefault(need, []).append(name)
    try:
        child = subprocess.run(
            [*PYTHON, "harness.packages", *needs],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_SECONDS,
        )
        reasons = json.loads([line for line in child.stdout.splitlines() if line.startswith("{")][-1])
    except subprocess.TimeoutExpired:
        raise Missing(f"the packages of a run were not imported within {IMPORT_SECONDS} s") from None
    except (IndexError, ValueError):  # it died of an import
        last = child.stderr.strip().splitlines()[-1:] or ["no output"]
        raise Missing(f"the packages of a run: {how(child.returncode)} on import: {last[0]}") from None
    if reasons:
        raise Missing(*(
            f"{', '.join(needs[name])}: {reason}, or leave {'it' if len(needs[name]) == 1 else 'them'} out"
            if name in needs else f"every run: {reason}"
            for name, reason in reasons.items()
        ))  # fmt: skip


# The life of a child


def follow(child: subprocess.Popen, events: Path, progress, asked: Callable[[], str | None]) -> str | None:
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
                progress.event(parse(line))
        if ended:
            return None
        if reason := asked():
            return reason
        time.sleep(POLL_SECONDS)


def stop(child: subprocess.Popen, signals: list[int]) -> None:
    """Asks a child for its record, and waits for it; not after another Ctrl-C."""
    presses, end = signals.count(signal.SIGINT), time.monotonic() + GRACE_SECONDS
    child.terminate()
    child.send_signal(signal.SIGCONT)  # one that is stopped hears nothing
    while child.poll() is None and signals.count(signal.SIGINT) == presses and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def clear(child: subprocess.Popen) -> None:
    """Ends a child with all that it started, also what has left its group: the mark is inherited."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    mark = f"{MARK}={os.getpid()}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):  # Linux; elsewhere the group is all that is known
        with suppress(OSError):  # it has ended, or is another user's
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
    child.wait()


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


def how(code: int) -> str:
    """How a process ended. Real-time signals have no name."""
    names = {number.value: number.name for number in signal.Signals}
    return f"signal {names.get(-code, -code)}" if code < 0 else f"exit status {code}"


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
