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
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.bench.attempt import GRACE_SECONDS, Slot, Terms, alone, follow
from harness.child import AGAIN
from harness.claims import Claim, here
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
LAG_SECONDS = 60.0  # until a network's file system shows what another machine has written (NFS: acdirmax)


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


def given_up(spec: RunSpec, terms: Terms, why: str, signals: Sequence[int] = ()) -> RunRecord:
    """The record of a run that left none. Its machine may be alive and out of reach: its claim is awaited."""
    record = RunRecord(spec, "interrupted", f"{why}; {AGAIN}", command=terms.command)
    record.started = datetime.now(UTC).isoformat(timespec="microseconds")

    def waiting(who: str) -> None:
        if signals:
            raise KeyboardInterrupt(*signals[:1])

    with Claim(terms.store.folder, spec.folder, waiting):
        terms.store.attempt(spec)
        terms.store.keep(spec, record)
    return record


# In the task


@dataclass
class Job:
    """What a task does, wherever it is begun and however often: the run, once."""

    spec: RunSpec
    terms: Terms

    def __call__(self, signals: list[int] | None = None) -> None:
        """`signals`: those that ask it to end now and to be begun again, as where a machine is taken away."""
        results, signals = self.terms.store.folder, [] if signals is None else signals
        sent, told = (results / name.format(self.spec.folder) for name in (SENT, TOLD))
        if not results.is_dir():
            raise FileNotFoundError(f"{here()['host']} does not see {results}: all machines must")
        said = read(told)
        if not sent.exists() or said.get("record"):  # it was called off, or is done
            return
        begun, record = said.get("begun", 0), None
        save(told, json.dumps({"begun": begun + 1}))
        if begun > LOSSES:
            why = f"its machine was lost {begun} times, or ran out of memory: the engine's log may say"
            record = given_up(self.spec, self.terms, why)
        else:
            terms = replace(self.terms, anew=self.terms.anew and not said)  # once begun, it goes on
            with suppress(KeyboardInterrupt):  # it was asked while another process was still at it
                record = self.done(terms, sent, signals)
            if signals and sent.exists() and (record is None or record.status == "interrupted"):
                save(told, json.dumps({"begun": begun}))  # it was no loss
                return
        if record:
            save(told, json.dumps({"begun": begun + 1, "record": json.loads(record.to_json())}))

    def done(self, terms: Terms, sent: Path, signals: list[int]) -> RunRecord:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                with suppress(OSError):  # a file system that is away for a moment calls nothing off
                    if terms.store.folder.is_dir() and not sent.exists():
                        signals.append(signal.SIGTERM)
                        return

        threading.Thread(target=watch, daemon=True).start()
        try:
            return alone(self.spec, terms, Slot(of=None), signals)
        finally:
            over.set()


class Silent:
    """Nobody looks on: the bench reads the events of the store."""

    def event(self, spec: RunSpec, values: dict) -> None: ...


# In the bench


@dataclass
class Engine:
    """Places are tasks of an engine. What each has: `send` begins tasks, `look` names those that wait or
    work, `cancel` ends one; `log` is where their output is."""

    terms: Terms
    name = log = ""
    look_seconds = LOOK_SECONDS
    tasks: dict[str, str] = field(default_factory=dict)  # by run: its folder
    looked: float = 0.0
    there: set[str] = field(default_factory=set)
    turn: threading.Lock = field(default_factory=threading.Lock)
    silent: bool = False  # a task has ended without a word

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
            task, done = earlier.get("task", ""), read(self.file(TOLD, spec)).get("record")
            if earlier.get("on") == self.name and (done or self.holds(task)):
                self.tasks[spec.folder] = task
            else:
                new.append(spec)
        for spec in new:
            self.file(TOLD, spec).unlink(missing_ok=True)
            self.note(spec, "")  # before it begins: without it, it was called off
        if new:
            terms = replace(self.terms, store=Store(self.terms.store.folder.resolve()), progress=Silent())
            tasks = self.send([Job(spec, terms) for spec in new])
            for spec, task in zip(new, tasks, strict=True):
                self.note(spec, task)
            with self.turn:
                self.there = self.there | set(tasks)
        return [None] * len(specs)

    def note(self, spec: RunSpec, task: str) -> None:
        self.tasks[spec.folder] = task
        save(self.file(SENT, spec), json.dumps({"on": self.name, "task": task}))

    def run(self, spec: RunSpec, place: None, signals: Sequence[int], begun: Callable) -> RunRecord:
        """After Ctrl-C the run is asked to end, as one here would be; other signals end the bench alone."""
        started: list[bool] = []

        def tell(values: dict) -> None:
            if not started:
                if not read(self.file(TOLD, spec)).get("begun"):  # an earlier attempt's event
                    return
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
        return self.result(task, signals)

    def call_off(self, task: "Task", signals: Sequence[int]) -> None:
        """Has the run leave a checkpoint and its record, and waits for it; not after another Ctrl-C."""
        presses, end = signals.count(signal.SIGINT), time.monotonic() + ENDING_SECONDS
        if not read(self.file(TOLD, task.spec)).get("begun"):  # it has not, or waits to go on
            self.cancel(task.name)
        self.file(SENT, task.spec).unlink(missing_ok=True)
        while task.poll() is None and signals.count(signal.SIGINT) == presses and time.monotonic() < end:
            task.rest(LOOK_SECONDS)
        self.cancel(task.name)

    def result(self, task: "Task", signals: Sequence[int]) -> RunRecord:
        """As it stands in the store, with its scores, where it took its place there."""
        end = time.monotonic() + LAG_SECONDS
        while (told := task.record()) is None and not signals and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        if told is None:
            self.silent = True
            why = (
                f"its task on {self.name} ended without a record: do all machines see the results? {self.log}"
            )
            told = given_up(task.spec, self.terms, why, signals)
        found, _ = self.terms.store.standing(task.spec.folder)
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
