"""Where the processes of runs come from: a nursery, which has imported once what all of them need, and is
copied for each; or, where a process cannot be copied, a fresh interpreter for each.

A copy is as fresh as a run needs: nothing has computed, drawn a number or asked for the card in the nursery.
A signal that a scheduler sends to all of them is for the bench and the run alone: the others would die, and
take along a run that is writing its checkpoint.

    bench -- nursery -- keeper of a run -- the run, leader of its own session
                     -- keeper of a run -- the run ...

Each dies with the one to its left. `python -m harness.nursery NEED ...` is one, its bench at file 0.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from harness import ROOT, child, machine, packages
from harness.errors import BadRequest
from harness.forks import die_with, in_a_copy, looked_after
from harness.preflight import unfit

IMPORT_SECONDS = 600  # for torch and its like from a cold network disk
ASK_SECONDS = 120  # for a card that wakes up
MESSAGE_BYTES = 2**16  # a folder's name, or what could not be imported
BENCH = "TUNEOFF_BENCH"  # in the environment of a run and of all that it starts: its bench's process,
RUN = "TUNEOFF_RUN"  # and, of a fresh one, its folder
ASKING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # to end
PYTHON = [sys.executable, "-P", "-m"]  # -P: nothing is imported from the working directory
ENVIRONMENT = {  # quiet libraries, and no thread pools beside torch's own
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",  # it starts them on import, as pyarrow does one:
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
}
CORES = len(machine.cores())
# A thread that waits spins, beside a busy neighbour for a core that is not there: one is left to it.
THREADS = {"OMP_NUM_THREADS": str(max(1, CORES - 1))}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, children have so many, where the user has not said how many."""
    earlier = dict(THREADS)
    THREADS["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        THREADS.update(earlier)


class Missing(BadRequest):
    """What the runs need cannot be imported or opened."""


def environment() -> dict[str, str]:
    """For a child: the user's first."""
    return THREADS | os.environ | ENVIRONMENT | {"PYTHONPATH": python_path(), BENCH: str(os.getpid())}


def python_path() -> str:
    """What the user has added, but for the working directory, which an empty entry means as well."""
    added = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.pathsep.join(map(str, [ROOT, *(path for path in added if path != Path.cwd())]))


def how(code: int) -> str:
    """How a process ended. Real-time signals have no name."""
    names = {number.value: number.name for number in signal.Signals}
    return f"signal {names.get(-code, -code)}" if code < 0 else f"exit status {code}"


# The bench's side


class Fresh(subprocess.Popen):
    """The process of a run, in an interpreter of its own."""

    def __init__(self, folder: Path):
        super().__init__(
            [*PYTHON, "harness.child", str(folder.resolve())],
            env=environment() | {RUN: str(folder.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.mark = f"{RUN}={folder.resolve()}".encode()

    def rest(self, seconds: float) -> None:
        """Waits so long at most, for its end."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(seconds)

    def clear(self) -> int:
        """Ends it with all that it started, also what has left its group: the mark is inherited. -> how it
        ended, as subprocess has it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for environ in Path("/proc").glob("[0-9]*/environ"):  # Linux alone: elsewhere it is the group
            with suppress(OSError):  # it has ended, or is another user's
                if self.mark in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
        return self.wait()


class Forked:
    """The process of a run, copied from the nursery: as much of a Popen as a bench needs."""

    def __init__(self, pid: int, keeper: socket.socket, stdout: BinaryIO):
        self.pid, self.keeper, self.stdout = pid, keeper, stdout
        self.returncode: int | None = None

    def rest(self, seconds: float | None) -> None:
        """Waits so long at most, for its end."""
        if self.returncode is None and select.select([self.keeper], [], [], seconds)[0]:
            told = self.keeper.recv(MESSAGE_BYTES)
            self.returncode = int(told) if told else -signal.SIGKILL  # its keeper was killed, and it as well

    def poll(self) -> int | None:
        self.rest(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def clear(self) -> int:
        """Ends it; its keeper ends all that it started. -> as Fresh has it."""
        self.send_signal(signal.SIGKILL)
        while self.returncode is None:
            self.rest(None)
        self.keeper.close()
        return self.returncode


class Nursery:
    """`with Nursery(needs) as nursery: nursery.child(folder)`. `needs`: a further package -> the methods that
    need it; `first`: the spec of a run, whose model and precision are tried where there is a card; `cards`:
    those that it sees, none where it may see all. Raises Missing where something cannot be imported or
    opened."""

    def __init__(self, needs: dict[str, list[str]], first: dict | None = None, cards: Sequence[str] = ()):
        self.turn = threading.Lock()
        self.bench, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as said:
            self.process = subprocess.Popen(
                [*PYTHON, "harness.nursery", *needs],
                env=environment() | ({"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards else {}),
                stdin=theirs.fileno(), stdout=said, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self.bench.settimeout(IMPORT_SECONDS)
            try:
                with suppress(OSError):  # it is gone already, and what it has said is told
                    self.bench.send(json.dumps(first).encode())
                told = self.bench.recv(MESSAGE_BYTES)
            except TimeoutError:
                self.close()
                raise Missing(f"the packages of a run were not imported within {IMPORT_SECONDS} s") from None
            except BaseException:
                self.close()
                raise
            if not told:  # it died of an import
                code = self.process.wait()
                said.seek(0)
                last = said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
                self.close()
                raise Missing(f"the packages of a run: {how(code)} on import: {last[0]}")
        self.bench.settimeout(None)
        found = json.loads(told)
        self.fresh: str | None = found["fresh"]  # why each run gets a fresh interpreter; null: it is a copy
        self.card, self.threads = found["card"], found["threads"]
        if found["reasons"]:
            self.close()
            raise Missing(*(
                f"{', '.join(needs[name])}: {reason}, or leave "
                f"{'it' if len(needs[name]) == 1 else 'them'} out"
                if name in needs else f"every run: {reason}"
                for name, reason in found["reasons"].items()
            ))  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self.bench.close()
        self.process.kill()
        self.process.wait()

    def child(self, folder: Path) -> Fresh | Forked:
        """The process of a run, begun. Where the nursery was killed, a fresh one."""
        if not self.fresh:
            with suppress(OSError, ValueError):
                return self.copy(folder)
        return Fresh(folder)

    def copy(self, folder: Path) -> Forked:
        ours, keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output, log = os.pipe()
        stdout = open(output, "rb")
        try:
            with keepers, open(log, "wb", buffering=0), self.turn:
                path = os.fsencode(folder.resolve())
                socket.send_fds(self.bench, [path], [keepers.fileno(), log])
            return Forked(int(ours.recv(MESSAGE_BYTES)), ours, stdout)
        except BaseException:
            ours.close()
            stdout.close()
            raise


# The nursery's side


def serve(needs: list[str]) -> None:
    heard = {number: signal.getsignal(number) for number in ASKING}
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    bench = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    first = json.loads(bench.recv(MESSAGE_BYTES))
    with card_is_asked_in_a_copy() as card:
        reasons = packages.unimportable(needs)
        with suppress(Exception):  # what is wrong here is found by the run, and stands in its record
            import harness.training  # noqa: F401

            if card:
                import torch._inductor.compile_fx  # noqa: F401
    fresh, threads = uncopyable(), None
    if not fresh:
        threads = json.loads(in_a_copy(number_of_threads, ASK_SECONDS) or "null")
    if card and first and not fresh and not reasons:  # on a CPU a run that cannot begin costs nothing
        tried = in_a_copy(lambda: json.dumps(unfit(first)).encode(), ASK_SECONDS)
        reasons |= {f"model {number}": reason for number, reason in enumerate(json.loads(tried or "[]"))}
    told = {"reasons": reasons, "fresh": fresh, "card": bool(card), "threads": threads}
    bench.send(json.dumps(told).encode()[:MESSAGE_BYTES])
    gc.collect()
    gc.freeze()  # what all runs share is never looked at again, nor copied for its marks
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    here = os.getpid()
    while True:
        folder, files, _, _ = socket.recv_fds(bench, MESSAGE_BYTES, 2)
        if not folder:  # the bench has ended
            return
        if os.fork() == 0:
            bench.close()
            keep(os.fsdecode(folder), here, heard, *files)
        for file in files:
            os.close(file)


def keep(folder: str, nursery: int, heard: dict, line: int, log: int) -> None:
    """The keeper of a run, which ends with it. `heard`: how the run hears signals."""

    def work() -> None:
        os.setsid()
        for number, handler in heard.items():
            signal.signal(number, handler)
        for number in (1, 2):
            os.dup2(log, number)
        os.close(log)
        sys.argv[1:] = [folder]
        child.main(Path(folder))

    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with(nursery)
        looked_after(work, socket.socket(fileno=line))
    finally:
        os._exit(0)


def number_of_threads() -> bytes:
    import torch

    return str(torch.get_num_threads()).encode()


def uncopyable() -> str | None:
    """Why a copy of this process would not be as good as a fresh one."""
    if sys.platform != "linux":
        return f"{sys.platform} copies no process that has loaded so much"
    tasks = [Path(path, "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    if len(tasks) > 1:
        return f"an import has started threads: {', '.join(tasks)}"
    import torch

    def computes() -> bytes:
        if torch.cuda.is_available() or torch.cuda._is_in_bad_fork():
            torch.ones(1, device="cuda").add(1).item()
        return b"yes"

    if in_a_copy(computes, ASK_SECONDS) != b"yes":
        return "a copy of it cannot use the card: an import has asked for that"
    return None


@contextmanager
def card_is_asked_in_a_copy() -> Iterator[list[tuple[int, int]]]:
    """While packages are imported: who has asked the card itself, as bitsandbytes does on import, cannot be
    copied any more. -> compute capability of each card."""
    found: list[tuple[int, int]] = []
    try:
        import torch.cuda as cuda
    except Exception:  # told by whoever imports it next
        yield found
        return
    if sys.platform != "linux":
        yield [(0, 0)] * cuda.is_available()
        return

    def capabilities() -> bytes:
        count = cuda.device_count() if cuda.is_available() else 0
        return json.dumps([cuda.get_device_capability(index) for index in range(count)]).encode()

    def capability(device: Any = None) -> tuple[int, int]:
        index = getattr(device, "idx", getattr(device, "index", device))
        return found[index if isinstance(index, int) else 0]

    found += map(tuple, json.loads(in_a_copy(capabilities, ASK_SECONDS) or "[]"))
    answers: dict[str, Callable] = {
        "is_available": lambda: bool(found),
        "device_count": lambda: len(found),
        "get_device_capability": capability,
    }
    own = {name: getattr(cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(cuda, name, function)


if __name__ == "__main__":
    serve(sys.argv[1:])
