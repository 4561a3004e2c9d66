"""Who writes a run: one process at a time, on whichever host.

A claim is a file beside the run. On its own host its process is asked for; elsewhere a number means nothing,
and its owner is alive as long as it touches the file. Clocks of hosts are never compared.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

BEAT_SECONDS = 5.0
DEAD_SECONDS = 120.0  # without a touch, as far as who waits has seen: a run that is asked to end has a minute
POLL_SECONDS = 0.2
CLAIM = ".{}.claim"  # of a run, by the name of its folder


class Superseded(OSError):
    """Another process has taken the run over, as this one was silent for so long."""


def here() -> dict[str, str]:
    """This host, until it is started again."""
    with suppress(OSError):
        return {
            "host": socket.gethostname(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        }
    return {"host": socket.gethostname(), "boot": ""}


def began(process: int) -> str | None:
    """When a process of this host did, in the kernel's ticks: its number may be another's by now."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


class Claim:
    """`with Claim(folder, run, waiting) as claim`: this process alone writes that run. Until whoever does now
    has ended, `waiting(who)` is called again and again; what it raises ends the waiting."""

    def __init__(self, folder: Path, run: str, waiting: Callable[[str], object] = lambda who: None):
        self.path, self.run, self.waiting = folder / CLAIM.format(run), run, waiting
        self.own: dict = {**here(), "process": os.getpid(), "began": began(os.getpid()), "token": uuid4().hex}
        self.waited = False
        self.beside: set[str] = set()  # runs that were under way on this host at the same time
        self.beaten = 0.0

    def __enter__(self) -> "Claim":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        seen, since = None, time.monotonic()
        while not self.taken():
            self.waited = True
            if (now := look(self.path)) != seen:
                seen, since = now, time.monotonic()
            who = owner(self.path)
            if dead(who) or time.monotonic() - since > DEAD_SECONDS:
                self.path.unlink(missing_ok=True)
                continue
            self.waiting(f"process {who['process']} on {who['host']}" if who else "another process")
            time.sleep(POLL_SECONDS)
        self.beat()
        return self

    def taken(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                json.dump(self.own, file)
        except FileExistsError:
            return False
        return True

    def beat(self, now: bool = False) -> None:
        """Says that this process is alive, and looks who else is; seldom, unless it is to be `now`. Raises
        Superseded."""
        if not now and time.monotonic() - self.beaten < BEAT_SECONDS:
            return
        self.check()
        with suppress(OSError):  # a file system that is away for a moment
            os.utime(self.path)
            self.beside |= neighbours(self.path.parent) - {self.run}
        self.beaten = time.monotonic()

    def check(self) -> None:
        """Raises Superseded. A claim that cannot be read now is still ours."""
        who = owner(self.path)
        if (who and who["token"] != self.own["token"]) or not os.path.lexists(self.path):
            raise Superseded(
                f"{self.run} was taken over by another process, after {DEAD_SECONDS:g} s without a word"
            )

    def __exit__(self, *raised: object) -> None:
        with suppress(OSError):
            if (who := owner(self.path)) and who["token"] == self.own["token"]:
                self.path.unlink()


def owner(path: Path) -> dict | None:
    """Null where it is not there, or not written yet."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return found if {"host", "boot", "process", "began", "token"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def look(path: Path) -> object:
    """What changes with each touch; by the open file, as a network's file system knows it."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except OSError:
        return None


def dead(who: dict | None) -> bool:
    """Surely: a process of this host that has ended."""
    at_home = who is not None and who["boot"] and {name: who[name] for name in ("host", "boot")} == here()
    return bool(who and at_home and began(who["process"]) != who["began"])


def under_way(folder: Path, run: str) -> bool:
    """As far as is known: one of another host may have died. The claim of who surely has is removed."""
    path = folder / CLAIM.format(run)
    if dead(owner(path)):
        path.unlink(missing_ok=True)
    return os.path.lexists(path)


def neighbours(folder: Path) -> set[str]:
    """The runs that processes of this host have claimed."""
    found, home = set(), here()
    for path in folder.glob(CLAIM.format("*")):
        who = owner(path)
        if who and {name: who[name] for name in home} == home and not dead(who):
            found.add(re.sub(r"^\.|\.claim$", "", path.name))
    return found
