"""The processes of a run on several devices: the run's own, of rank 0, and a copy for each other device.

    bench -- nursery -- keeper -- the run, rank 0 -- rank 1
                                                  -- rank 2 ...

They are copied before anything is loaded. Rank 0 alone hears signals and leaves a record; the others tell it
what ended them, and end when it ends.
"""

import json
import os
import select
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.forks import die_with

TELLING_SECONDS = 2  # a rank tells why it ends before it goes: what others find broken then follows from it
STUCK_SECONDS = 10  # that rank 0 has to notice; it may wait for ever on the card for a rank that is gone
WORD_BYTES = 2**16
Ending = tuple[str, str]  # status and error of a record


@dataclass(frozen=True)
class Place:
    """Which of the processes this is: of number `rank` of `count`."""

    rank: int = 0
    count: int = 1
    lines: tuple[socket.socket, ...] = field(default=(), repr=False)  # of rank 0 to all others, or to rank 0
    others: tuple[int, ...] = ()  # the processes that rank 0 has begun

    def tell(self, word: str) -> None:
        """To all others, from rank 0."""
        for line in self.lines:
            line.send(word.encode())

    def hear(self) -> str:
        return self.lines[0].recv(WORD_BYTES).decode()


ALONE = Place()


def see_alone(rank: int) -> None:
    """Its card is the only one that this process sees, as rank 0's is the first: it is what libraries mean by
    "cuda". By NVLink cards still reach one another."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else None
    if names is None or len(names) > rank:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[rank] if names else str(rank)


class Ranks:
    """Of one run. `begin` copies this process; then `first_to_fail` says what has ended another rank."""

    def __init__(self) -> None:
        self.failed: Ending | None = None
        self.pids: list[int] = []
        self.told = threading.Event()
        self.writing = threading.Lock()  # of the record, by whoever comes first

    def begin(
        self, count: int, work: Callable[[Place], Ending | None], stuck: Callable[[Ending], object]
    ) -> Place:
        """-> rank 0's place. Each other does the `work`, which gives how it failed, or nothing. `stuck` is
        called, and must end this process, where another rank has failed and nobody has noticed."""
        here = os.getpid()
        lines: list[socket.socket] = []
        pids: list[int] = []
        for rank in range(1, count):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                for line in [ours, *lines]:
                    line.close()
                self.serve(Place(rank, count, (theirs,)), here, work)
            theirs.close()
            lines.append(ours)
            pids.append(pid)
        self.pids = pids
        if pids:
            threading.Thread(target=self.watch, args=(lines, stuck), daemon=True).start()
        return Place(0, count, tuple(lines), tuple(pids))

    def serve(self, place: Place, first: int, work: Callable[[Place], Ending | None]) -> None:
        """The whole life of a further rank."""
        ending: Ending | None = "failed", "it was not begun"
        try:
            die_with(first)
            see_alone(place.rank)
            for number in (signal.SIGINT, signal.SIGTERM):  # for rank 0 to decide
                signal.signal(number, signal.SIG_IGN)
            ending = work(place)
        except BaseException:
            traceback.print_exc()
        finally:
            place.lines[0].send(json.dumps(ending).encode()[:WORD_BYTES])
            os._exit(0)

    def watch(self, lines: list[socket.socket], stuck: Callable[[Ending], object]) -> None:
        count, ranks = len(lines) + 1, {line: rank for rank, line in enumerate(lines, 1)}
        while ranks and not self.failed:
            for line in select.select(list(ranks), [], [])[0]:
                rank = ranks.pop(line)
                try:
                    word = line.recv(WORD_BYTES)
                except OSError:
                    word = b""
                if ending := json.loads(word) if word else self.epitaph(rank):
                    status, error = ending
                    self.failed = self.failed or (status, f"device {rank + 1} of {count}: {error}")
        if self.failed:
            self.told.set()
            threading.Event().wait(STUCK_SECONDS)
            with self.writing:
                stuck(self.failed)

    def epitaph(self, rank: int) -> Ending:
        """Of one that has ended without a word."""
        _, status = os.waitpid(self.pids[rank - 1], 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            return "interrupted", "its process was killed from outside, or for want of memory of the host"
        return "failed", f"its process ended with {signal.Signals(-code).name if code < 0 else code}"

    def first_to_fail(self) -> Ending | None:
        """What has ended another rank, for rank 0, which an error has ended: it may follow from that one.
        From here on rank 0 writes the record."""
        if self.pids:
            self.told.wait(TELLING_SECONDS)
        self.writing.acquire()
        return self.failed
