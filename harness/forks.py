"""Copies of a process: one that answers a question, some that share work out, and one that is looked after
to its end, Linux alone."""

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
MOST = 8  # copies that share work out: each takes memory of its own
SHARED: list = []  # in such a copy


def in_a_copy(answer: Callable[[], bytes], seconds: float) -> bytes:
    """What `answer` gives (at most 64 KiB) in a forked process; b"" if it raises or takes longer."""
    found = []

    def fork() -> None:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(theirs, answer())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # nothing of the run's own ending, and no output that it has not written yet
        os.close(theirs)
        try:
            if select.select([ours], [], [], seconds)[0]:
                found.append(os.read(ours, 2**16))
        finally:
            os.close(ours)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    # In a thread of its own: the OpenMP of one that has computed would wait for threads that are not copied.
    thread = threading.Thread(target=fork, daemon=True)
    thread.start()
    thread.join()
    return found[0] if found else b""


def each(work: Callable[[Any], Any], items: list) -> list:
    """What `work` gives of each item, in their order: on Linux from copies of this process, one a core. Not
    where it has other threads, as a copy would wait forever for what one of these holds; nor may the work
    ask libraries that compute in threads of their own, as torch and typst. What work raises is raised."""
    copies = min(len(os.sched_getaffinity(0)), len(items), MOST) if sys.platform == "linux" else 1
    if copies > 1 and threading.active_count() == 1:
        with (
            suppress(BrokenProcessPool),  # one was killed, as where memory is short
            ProcessPoolExecutor(copies, get_context("fork"), share, (work, items)) as pool,
        ):
            return list(pool.map(portion, range(len(items))))
    return [work(item) for item in items]


def share(work: Callable[[Any], Any], items: list) -> None:
    """In a copy: what it works on, which cannot be sent. Ctrl-C is its parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    SHARED[:] = [work, items]


def portion(place: int) -> Any:
    work, items = SHARED
    return work(items[place])


def die_with(parent: int) -> None:
    """Who is killed takes this process along: it must not keep the card. Exits where it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("its parent is gone")


def looked_after(work: Callable[[], object], line: socket.socket) -> None:
    """Forks a child that does the work, waits for its end, and ends all that it has started and left, in
    whichever group, session or environment. The line is told the child's number, and how it ended as
    subprocess has it; nobody else gets that number before the line's other side is closed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    here = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            line.close()
            die_with(here)
            work()
            os._exit(0)  # no thread that is left holds it up
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    line.send(str(child).encode())
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert found  # noqa: S101, as mypy has to know: without WNOHANG it has ended
    while left := [process for process in children(here) if process != child]:
        for process in left:
            os.kill(process, signal.SIGKILL)
        for process in left:
            os.waitpid(process, 0)
    line.send(str(found.si_status if found.si_code == os.CLD_EXITED else -found.si_status).encode())
    line.recv(1)
    os.waitpid(child, 0)


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found
