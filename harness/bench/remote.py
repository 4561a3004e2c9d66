"""Runs on other machines: the same attempt in a task of an engine, as Ray or Slurm, and the same store.

The engine says where and when; the store, which all machines see, is where bench and tasks meet. So a bench
may die: its tasks go on, and the next one finds them.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from harness.bench.attempt import GRACE_SECONDS, Slot, Terms, alone, follow
from harness.child import AGAIN
from harness.claims import here
from harness.record import RunRecord
from harness.shape import parse
from harness.spec import RunSpec
from harness.store import ATTEMPT, EVENTS, Store, save
from harness.watchdog import End

SENT = ".{}.sent"  # the bench: which task a run was given to; who takes it away calls the run off
TOLD = ".{}.told"  # the task: how often it has begun, and at last its record
LOSSES = 2  # of a run's machine, after which it is begun again: more, and it may be the run that does it
LOOK_SECONDS = 1.0  # between two looks at a file of the store, which may lie across a network
ENDING_SECONDS = GRACE_SECONDS + 30


def read(path: Path) -> dict:
    """What the other side has left; nothing where there is nothing."""
    try:
        found = parse(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def tidy(folder: Path, spec: RunSpec) -> None:
    """Of a run that has ended, also where it was sent by a bench that died."""
    for kind in (SENT, TOLD):
        (folder / kind.format(spec.folder)).unlink(missing_ok=True)


# In the task


@dataclass
class Job:
    """What a task does, wherever it is begun and however often: the run, once."""

    spec: RunSpec
    results: Path
    command: str
    limit: float | None
    every: float
    stall: float

    def __call__(self, signals: list[int] | None = None) -> None:
        """`signals`: those that ask it to end now and to be begun again, as where a machine is taken away."""
        sent, told = (self.results / name.format(self.spec.folder) for name in (SENT, TOLD))
        if not self.results.is_dir():
            raise FileNotFoundError(f"{here()['host']} does not see {self.results}: all machines must")
        begun = read(told).get("begun", 0)
        if not sent.exists() or read(told).get("record"):  # it was called off, or is done
            return
        save(told, json.dumps({"begun": begun + 1}))
        if begun > LOSSES:
            record = self.lost(begun)
        else:
            record = self.done(sent, signals := [] if signals is None else signals)
            if signals and sent.exists():  # it was no loss
                save(told, json.dumps({"begun": begun}))
                return
        save(told, json.dumps({"begun": begun + 1, "record": json.loads(record.to_json())}))

    def done(self, sent: Path, signals: list[int]) -> RunRecord:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                if not sent.exists():
                    signals.append(signal.SIGTERM)
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            terms = Terms(
                Store(self.results), self.command, Silent(), self.limit, False, self.every, self.stall
            )
            return alone(self.spec, terms, Slot(of=None), signals)
        finally:
            over.set()

    def lost(self, times: int) -> RunRecord:
        """A run whose machines did not survive it."""
        store, started = Store(self.results), datetime.now(UTC).isoformat(timespec="microseconds")
        why = f"its machine was lost {times} times, or ran out of memory: the engine's log may say; {AGAIN}"
        record = RunRecord(self.spec, "interrupted", why, command=self.command, started=started)
        store.attempt(self.spec)
        store.keep(self.spec, record)
        return record


class Silent:
    """Nobody looks on: the bench reads the events of the store."""

    def event(self, spec: RunSpec, values: dict) -> None: ...


# In the bench


@dataclass
class Engine:
    """Places are tasks of an engine. What each has: `send` begins tasks, `look` names those that wait or
    work, `cancel` ends one."""

    terms: Terms
    name = ""
    look_seconds = LOOK_SECONDS
    tasks: dict[str, str] = field(default_factory=dict)  # by run: its folder
    looked: float = 0.0
    there: set[str] = field(default_factory=set)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def send(self, jobs: list[Job]) -> list[str]:
        """-> the name of each one's task, in their order."""
        raise NotImplementedError

    def look(self) -> set[str]:
        raise NotImplementedError

    def cancel(self, task: str) -> None:
        raise NotImplementedError

    def holds(self, task: str) -> bool:
        with self.turn:
            if time.monotonic() - self.looked > self.look_seconds:
                self.there, self.looked = self.look(), time.monotonic()
            return task in self.there

    def file(self, kind: str, spec: RunSpec) -> Path:
        return self.terms.store.folder.resolve() / kind.format(spec.folder)

    def more(self, specs: list[RunSpec]) -> list[None]:
        """Sends those that no bench before this one has sent; a place for each."""
        new = []
        for spec in specs:
            earlier = read(self.file(SENT, spec))
            done = read(self.file(TOLD, spec)).get("record")
            if earlier.get("on") == self.name and (done or self.holds(earlier["task"])):
                self.tasks[spec.folder] = earlier["task"]
            else:
                new.append(spec)
        for spec in new:
            if self.terms.anew:
                self.terms.store.attempt(spec, anew=True)
            self.file(TOLD, spec).unlink(missing_ok=True)
            self.note(spec, "")  # before it begins: without it, it was called off
        if new:
            folder = self.terms.store.folder.resolve()
            terms = self.terms
            shared = folder, terms.command, terms.limit, terms.every, terms.stall
            for spec, task in zip(new, self.send([Job(spec, *shared) for spec in new]), strict=True):
                self.note(spec, task)
            with self.turn:
                self.looked = 0.0
        return [None] * len(specs)

    def note(self, spec: RunSpec, task: str) -> None:
        self.tasks[spec.folder] = task
        save(self.file(SENT, spec), json.dumps({"on": self.name, "task": task}))

    def run(self, spec: RunSpec, place: None, signals: Sequence[int], begun: Callable) -> RunRecord:
        """After Ctrl-C the run is asked to end, as one here would be; other signals end the bench alone."""
        started: list[bool] = []

        def tell(values: dict) -> None:
            if not started:
                started.append(True)
                begun()
            self.terms.progress.event(spec, values)

        task = Task(self, spec)
        events = self.file(ATTEMPT, spec) / EVENTS
        if follow(task, events, tell, lambda: End("interrupted", AGAIN) if signals else None):
            if signal.SIGINT not in signals:
                raise KeyboardInterrupt(*signals[:1])
            self.call_off(task, signals)
            if task.record() is None:  # it had not begun
                raise KeyboardInterrupt(signal.SIGINT)
        return self.result(task)

    def call_off(self, task: "Task", signals: Sequence[int]) -> None:
        """Has the run leave a checkpoint and its record, and waits for it; not after another Ctrl-C."""
        presses, end = signals.count(signal.SIGINT), time.monotonic() + ENDING_SECONDS
        if not read(self.file(TOLD, task.spec)):  # it has not begun
            self.cancel(task.name)
        self.file(SENT, task.spec).unlink(missing_ok=True)
        while task.poll() is None and signals.count(signal.SIGINT) == presses and time.monotonic() < end:
            task.rest(LOOK_SECONDS)
        self.cancel(task.name)

    def result(self, task: "Task") -> RunRecord:
        """As it stands in the store, with its scores, where it took its place there."""
        found, told = self.terms.store.find(task.spec), task.record()
        if told is None:
            why = f"its task on {self.name} ended without a record: do all machines see the results? {AGAIN}"
            told = RunRecord(task.spec, "interrupted", why, command=self.terms.command)
            told.started = datetime.now(UTC).isoformat(timespec="microseconds")
            if not found:
                self.terms.store.attempt(task.spec)
                self.terms.store.keep(task.spec, told)
        return found if found and found.started == told.started else told


class Task:
    """A run that was sent, as much of a process as `follow` needs."""

    def __init__(self, engine: Engine, spec: RunSpec):
        self.engine, self.spec, self.name = engine, spec, engine.tasks[spec.folder]

    def record(self) -> RunRecord | None:
        said = read(self.engine.file(TOLD, self.spec)).get("record")
        with suppress(ValueError):
            return RunRecord.from_json(json.dumps(said)) if said else None
        return None

    def poll(self) -> int | None:
        return 0 if read(self.engine.file(TOLD, self.spec)).get("record") or not self.held() else None

    def held(self) -> bool:
        return self.engine.holds(self.name)

    def rest(self, seconds: float) -> None:
        time.sleep(max(seconds, LOOK_SECONDS))
