"""Seconds, bytes and joules of a phase.

Phases may nest: entering an inner one (a validation within the training) stops the outer one's
clock and keeps its peaks apart. Counters are read at the borders of phases only, so that measuring
does not slow what is measured; the card's own gauge alone is sampled, ten times a second.
"""

import ctypes
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness import machine
from harness.measuring.contention import Contention
from harness.record import TRAINING, Phase

SAMPLE_SECONDS = 0.1  # NVML answers within 10 ms; a phase's level lasts far longer


class Meter:
    """`with meter.phase("train"): ...`, then `meter.phases["train"]` is its cost.

    `on_enter(name)` is called at each border, for progress; `others` are the processes of the same run.
    """

    def __init__(
        self, device: torch.device, on_enter: Callable[[str], object] = lambda name: None,
        others: tuple[int, ...] = (),
    ):  # fmt: skip
        self.phases: dict[str, Phase] = {}
        self.on_enter = on_enter
        self.stack: list[str] = []
        self.replayed = 0  # bytes that a step's graph holds while it is replayed, which no counter shows
        self.contention = Contention(cuda := device.type == "cuda", others)
        self.card = Card(self.contention.look) if cuda else None

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        if self.stack:
            self.close(self.stack[-1])
        self.stack.append(name)
        if name not in self.phases:  # not at every return to it: that takes a quarter of a second
            release()
            self.phases[name] = Phase()
        self.on_enter(name)
        self.open()
        try:
            yield self.phases[name]
        finally:
            self.close(name)
            self.stack.pop()
            if self.stack:
                self.on_enter(self.stack[-1])
                self.open()

    def open(self) -> None:
        if self.card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.card.reset()
            self.joules = machine.card_joules()
        reset_host_peak()
        if self.stack[-1] in TRAINING:
            self.contention.open()
        self.start = time.perf_counter()

    def close(self, name: str) -> None:
        phase = self.phases[name]
        if self.card:
            torch.cuda.synchronize()
        phase.seconds += time.perf_counter() - self.start
        self.contention.close()
        phase.peak_host = highest(phase.peak_host, host_peak())
        self.keep_peaks(name)
        if self.card:
            after = machine.card_joules()
            if after is not None and self.joules is not None:
                phase.joules = (phase.joules or 0.0) + after - self.joules

    def keep_peaks(self, name: str) -> None:
        """Those of the card so far are this phase's; torch's begin anew."""
        if self.card:
            phase, reserved = self.phases[name], torch.cuda.max_memory_reserved()
            phase.peak_allocated = highest(phase.peak_allocated, self.allocated(name))
            phase.peak_reserved = highest(phase.peak_reserved, reserved)
            phase.peak_device = highest(phase.peak_device, self.card.peak(reserved))
            torch.cuda.reset_peak_memory_stats()

    def allocated(self, name: str = "train") -> int:
        """Bytes of live tensors at the highest moment of a phase, so far."""
        inside = self.replayed if name == "train" else 0
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + inside)


class StepClock:
    """Seconds between ticks. On a GPU by events in its stream, so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.pairs.append((start, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds.append(time.perf_counter() - start)

    def read(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in self.pairs]
        return self.seconds


class Card:
    """The most that the whole card has held beyond what was used at the start. Null where NVML is missing.

    `each_second` is called as often.
    """

    def __init__(self, each_second: Callable[[], None]):
        self.before = self.highest = machine.card_bytes_used()
        self.looking = threading.Lock()  # what was read before a reset is not kept after it
        if self.before is not None:
            threading.Thread(target=self.watch, args=(each_second,), daemon=True).start()

    def watch(self, each_second: Callable[[], None]) -> None:
        for look in itertools.count():
            with self.looking:
                self.highest = highest(self.highest, machine.card_bytes_used())
            if look % round(1 / SAMPLE_SECONDS) == 0:
                each_second()
            time.sleep(SAMPLE_SECONDS)

    def reset(self) -> None:
        with self.looking:
            self.highest = machine.card_bytes_used()

    def peak(self, reserved: int) -> int | None:
        """Bytes; unknown where it is below what this process holds: then another has left the card since."""
        most = highest(self.highest, machine.card_bytes_used())
        if self.before is None or most is None:
            return None
        return most - self.before if most - self.before >= reserved else None


def highest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def release() -> None:
    """Gives what an earlier phase freed back to the system, or it would count as the next one's."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # a libc without it
        pass


def reset_host_peak() -> None:
    """Linux forgets a process's peak when 5 is written here; elsewhere host peaks stay unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def host_peak() -> int | None:
    """Bytes. VmHWM, not ru_maxrss: that one is inherited from the parent process."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
