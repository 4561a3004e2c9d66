"""Seconds, bytes and joules of a phase.

Phases may nest: entering an inner one (a validation within the training) stops the outer one's
clock and keeps its peaks apart. Counters are read at the borders of phases only, so that measuring
does not slow what is measured; the card's own gauge alone is sampled, ten times a second.
"""

import ctypes
import gc
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.record import Phase

SAMPLE_SECONDS = 0.1  # NVML answers within 10 ms; a phase's level lasts far longer


class Meter:
    """`with meter.phase("train"): ...`, then `meter.phases["train"]` is its cost.

    `on_enter(name)` is called at each border, for progress.
    """

    def __init__(self, device: torch.device, on_enter=lambda name: None):
        self.cuda = device.type == "cuda"
        self.phases: dict[str, Phase] = {}
        self.on_enter = on_enter
        self.stack: list[str] = []
        self.card = Card() if self.cuda else None

    @contextmanager
    def phase(self, name: str):
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
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.card.reset()
            self.joules = self.card.joules()
        reset_host_peak()
        self.start = time.perf_counter()

    def close(self, name: str) -> None:
        phase = self.phases[name]
        if self.cuda:
            torch.cuda.synchronize()
        phase.seconds += time.perf_counter() - self.start
        phase.peak_host = highest(phase.peak_host, host_peak())
        if self.cuda:
            phase.peak_allocated = highest(phase.peak_allocated, torch.cuda.max_memory_allocated())
            reserved = torch.cuda.max_memory_reserved()
            phase.peak_reserved = highest(phase.peak_reserved, reserved)
            phase.peak_device = highest(phase.peak_device, self.card.peak(reserved))
            after = self.card.joules()
            if after is not None and self.joules is not None:
                phase.joules = (phase.joules or 0.0) + after - self.joules


class StepClock:
    """Seconds between ticks. On a GPU by events in its stream, so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.pairs = []

    @contextmanager
    def step(self):
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
    """What the whole card says through NVML: bytes used beyond what was used at the start, joules.

    All of it is None where NVML or its counter is missing (virtual or partitioned cards).
    """

    def __init__(self):
        self.handle, self.highest, self.before = None, None, None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.before = self.used()
        except Exception:  # NVML raises many kinds; whichever it is, the gauge is unknown
            self.handle = None
            return
        threading.Thread(target=self.watch, daemon=True).start()

    def used(self) -> int:
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used

    def watch(self) -> None:
        while True:
            self.highest = highest(self.highest, self.used())
            time.sleep(SAMPLE_SECONDS)

    def reset(self) -> None:
        if self.handle:
            self.highest = self.used()

    def peak(self, reserved: int) -> int | None:
        """Unknown where it is below what this process holds: then another one has left the card since."""
        if not self.handle:
            return None
        taken = highest(self.highest, self.used()) - self.before
        return taken if taken >= reserved else None

    def joules(self) -> float | None:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except Exception:  # not counted on this card
            return None


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
