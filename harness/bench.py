"""A list of specs becomes a list of records: cached ones are read, others run in a child each.

A fresh process for every run: allocator state, crashes and running out of memory stay in it, and
what ended it is a status in its record, never the end of the bench.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness import ROOT, method
from harness.record import RunRecord
from harness.shape import parse
from harness.spec import RunSpec
from harness.store import EVENTS, Store, save

POLL_SECONDS = 0.2  # often enough for a progress bar, seldom enough not to disturb the run
GRACE_SECONDS = 10  # to write a record after an interrupt, before the child is killed


@dataclass
class Done:
    """A run that stands in the store, and whether it stood there before."""

    record: RunRecord
    cached: bool


def stale(record: RunRecord) -> bool:
    """The method's code is no longer the one that made this record."""
    name = record.spec.method
    source = method.find(name, method.available(record.spec.locations.get("plugins", [])))
    return method.code_hash(method.resolve(name, source)) != record.hashes.get("method_code")


class Busy(Exception):
    """Another bench writes into the same results."""


def bench(specs: list[RunSpec], store: Store, command: str, progress, force: bool = False) -> Iterator[Done]:
    """Runs what is not cached. Only a run that ended ok counts as cached: others are tried again.

    `progress` is told `start(spec, number, total)`, `event(values)` and `end(record, cached)`. An
    interrupt reaches the child, is recorded, and is raised again.
    """
    store.recover()
    for number, spec in enumerate(specs, 1):
        earlier = None if force else store.find(spec)
        before = next((s for s in specs if untouched(s) and s.evaluation == spec.evaluation), None)
        cached = bool(earlier and earlier.ok and not lacks(earlier, before, store))
        if cached:
            record = replace(earlier, spec=spec)
        else:
            if before:
                spec.locations["before"] = str(store.path(before))
            progress.start(spec, number, len(specs))
            record = run(spec, store, command, progress)
        progress.end(record, cached)
        yield Done(record, cached)


def lacks(record: RunRecord, before: RunSpec | None, store: Store) -> bool:
    """A run that found no answers of the untouched model, which are there now."""
    if record.hashes.get("before", "") is not None or not before or untouched(record.spec):
        return False
    found = store.find(before)
    return bool(found and found.ok)


def untouched(spec: RunSpec) -> bool:
    return spec.method == "base"


def run(spec: RunSpec, store: Store, command: str, progress) -> RunRecord:
    from harness.run import RESULT, SPEC

    folder = store.attempt(spec)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    job = {"spec": {**spec.asked(), "locations": spec.locations}, "command": command}
    save(folder / SPEC, json.dumps(job, indent=1))
    interrupted = False
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "harness.run", str(folder.resolve())],
            env={
                **os.environ,
                **ENVIRONMENT,
                "PYTHONPATH": python_path(),
                "TUNEOFF_BENCH": str(os.getpid()),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            follow(child, folder / EVENTS, progress)
        except KeyboardInterrupt:
            interrupted = True
            stop(child)
    try:
        record = RunRecord.from_json((folder / RESULT).read_text("utf-8"))
        (folder / RESULT).unlink()
    except (OSError, ValueError) as reason:
        status, error = epitaph(child.returncode, folder / "log.txt", interrupted)
        if child.returncode == 0:
            error = f"it ended without a whole record: {reason}"
        record = RunRecord(spec, status, error, command=command, started=started)
    (folder / SPEC).unlink()  # its paths are this machine's alone
    store.keep(spec, record)
    if interrupted:
        raise KeyboardInterrupt
    return record


ENVIRONMENT = {  # for the child: quiet libraries, and no thread pools beside torch's own
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
}


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def follow(child: subprocess.Popen, events: Path, progress) -> None:
    """Passes the child's events on until it ends."""
    position = 0
    while True:
        ended = child.poll() is not None
        if events.exists():
            with events.open("rb") as file:
                file.seek(position)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            position += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError, TypeError, LookupError, ArithmeticError):  # a full disk cuts lines
                    progress.event(parse(line))
        if ended:
            return
        time.sleep(POLL_SECONDS)


def stop(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def epitaph(code: int, log: Path, interrupted: bool) -> tuple[str, str]:
    """Status and error of a child that left no result."""
    if interrupted:
        return "interrupted", "interrupted; the same command runs it again"
    if code == -signal.SIGKILL:
        return "oom_host", "killed from outside, most likely for want of host memory: see dmesg"
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return "failed", f"ended with {how}: {lines[-1][:300] if lines else 'no output'}"


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
