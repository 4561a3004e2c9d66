"""What this machine is and how it fares: each fact one function, which a run's record, its meter and the
doctor all ask. Unknown is null.

Torch and NVML are imported where they are asked: the doctor works where they are missing.
"""

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from harness import packages
from harness.record import Provenance

BUSY_BYTES = 2**30  # of a card: a driver, a desktop and an idle program hold less
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP's threads
GROUPS = Path("/sys/fs/cgroup")  # what Linux allows a container, in its second version or its first
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of the kernel's counters, a second


def provenance(precision: str) -> Provenance:
    """With what a run is made, by an allow-list: never the whole of os.environ."""
    import torch

    card = card_properties()
    return Provenance(
        device=card.name if card else "cpu",
        device_bytes=card.total_memory if card else None,
        driver=driver() if card else None,
        cuda=torch.version.cuda,
        precision=precision,
        cpu=cpu(),
        threads=torch.get_num_threads(),
        waiting=waiting(),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages.recorded(),
        allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        **packages.source(),
    )


# The processor


def cpu() -> str:
    """Its name, and how many threads all of it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def cores() -> set[int]:
    """The numbers of those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> list[list[int]]:
    """The numbers of those that this process may use; threads of one core, which share its arithmetic,
    together."""
    found: dict[str, list[int]] = {}
    for core in sorted(cores()):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(core)
        found.setdefault(siblings, []).append(core)
    return list(found.values())


def free_bytes() -> float | None:
    """Of main memory, as far as others leave it and a container is allowed it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min(free, *(left_in(group) for group in memory_groups()))


def memory_groups() -> Iterator[Path]:
    """Those that this process is in, as Slurm, systemd and containers make them: each may have a limit."""
    yield GROUPS
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind in ("", "memory"):
                own = GROUPS / kind / path.lstrip("/")
                yield from (group for group in (own, *own.parents) if group.is_relative_to(GROUPS / kind))


def left_in(group: Path) -> float:
    """Bytes; infinite without a limit. Files that were read count as free: they make room."""
    for most, held, files in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
        with suppress(OSError, ValueError):  # "max" is no number
            left = int((group / f"memory.{most}").read_text()) - int((group / f"memory.{held}").read_text())
            with suppress(OSError, ValueError):
                words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                kept = (f"{files}active_file", f"{files}inactive_file")
                left += sum(int(size) for name, size in words if name in kept)
            return left
    return math.inf


def resident_bytes(process: int) -> int:
    """Of a process; 0 where there is none such."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def quota() -> float:
    """Cores' worth of time that a container may use; infinite where none is set."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # "max" is no number
            most, period = (int(n) for n in " ".join((GROUPS / file).read_text() for file in files).split())
            return most / period if most > 0 else math.inf
    return math.inf


def waiting() -> str:
    """How idle threads wait: spinning ones take a core from others."""
    return ", ".join(f"{n}={os.environ[n]}" for n in WAITING if n in os.environ) or "as the library does"


def busy_seconds() -> tuple[float, float] | None:
    """Since the start of the machine, summed over the cores that this process may use: CPU seconds that
    anybody has worked, and those that a hypervisor gave to other machines."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ours = {f"cpu{core}" for core in cores()}
        times = [[int(ticks) for ticks in rest[:8]] for name, *rest in lines if name in ours]
        columns = [sum(column) / TICK for column in zip(*times, strict=True)]
        user, nice, system, _, _, interrupts, soft, stolen = columns
    except (OSError, ValueError):
        return None
    return user + nice + system + interrupts + soft, stolen


def seconds_of(process: int) -> float:
    """CPU seconds of a process so far, all its threads together; 0 where there is none such."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


# The card


def cards() -> list[str]:
    """The names of those that this process may use, in the order of nvidia-smi and as CUDA_VISIBLE_DEVICES
    takes them: UUIDs, of a card that is divided (MIG) those of its parts. None of them is woken up."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        there = [parts(pynvml, card) or [pynvml.nvmlDeviceGetUUID(card)] for card in handles]
        every = list(chain(*there))
    except Exception:  # NVML raises many kinds; whichever it is, there is no card for us
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return every
    chosen: list[str] = []
    for name in map(str.strip, visible.split(",")):  # numbers, or beginnings of names
        number = int(name) if name.isdecimal() else len(there)
        said = there[number] if number < len(there) else []
        said = said or [card for card in every if name and card.startswith(name)]
        if not said:  # as CUDA has it: the first that is none ends the list
            break
        chosen += said
    return chosen


def parts(library: Any, card: Any) -> list[str]:
    """The names of the parts of a divided card."""
    found = []
    with suppress(library.NVMLError):  # it cannot be divided
        for index in range(library.nvmlDeviceGetMaxMigDeviceCount(card)):
            with suppress(library.NVMLError):  # there is no part of this number
                part = library.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
                found.append(library.nvmlDeviceGetUUID(part))
    return found


def card_properties() -> Any:
    """Torch's, of the card that this process uses: its name, total_memory (bytes), uuid; null where there is
    none."""
    import torch

    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    )


def devices() -> int:
    """On how many a run can compute: cards; where there is none, cores. Without torch: a plan asks, too."""
    try:
        import pynvml

        pynvml.nvmlInit()
        cards = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()  # a run copies its process behind this
    except Exception:  # NVML raises many kinds
        cards = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        cards = len(named[: named.index("-1") if "-1" in named else None]) if visible.strip() and cards else 0
    return cards or len(cores())


def card_described() -> tuple[str, int] | None:
    """The name and the bytes of the first card that this process may see, without torch."""
    try:
        import pynvml

        pynvml.nvmlInit()
        seen = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        by_number = pynvml.nvmlDeviceGetHandleByIndex
        handle = by_number(int(seen)) if seen.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(seen)
        return pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except Exception:  # NVML raises many kinds; whichever it is, the answer is unknown
        return None


def computes_bf16() -> bool:
    """Truly: a T4 only emulates it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def nvml() -> tuple[Any, Any]:
    """-> the driver's own library, and its handle of this card: by UUID, as it counts cards otherwise than
    CUDA does. Raises what NVML likes where it is missing, or the card is virtual or a part of one."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{card_properties().uuid}")


def ask(question: str, *more: int) -> Any:
    """What NVML answers of this card; null where it does not know."""
    try:
        library, card = nvml()
        return getattr(library, question)(card, *more)
    except Exception:  # NVML raises many kinds; whichever it is, the answer is unknown
        return None


def driver() -> str | None:
    try:
        return nvml()[0].nvmlSystemGetDriverVersion()
    except Exception:  # as above
        return None


def card_bytes_used() -> int | None:
    """Of the whole card, by whomever."""
    answer = ask("nvmlDeviceGetMemoryInfo")
    return answer and answer.used


def card_joules() -> float | None:
    """Of the whole card, since its driver was loaded."""
    answer = ask("nvmlDeviceGetTotalEnergyConsumption")
    return answer and answer / 1000


def card_bytes_of_others() -> int | None:
    """What other computing processes hold. In a container ours has another number there: it is taken for the
    largest."""
    answer = ask("nvmlDeviceGetComputeRunningProcesses")
    if answer is None:
        return None
    held = {process.pid: process.usedGpuMemory or 0 for process in answer}
    ours = os.getpid() if os.getpid() in held else max(held, key=lambda p: held[p], default=None)
    return sum(size for process, size in held.items() if process != ours)


def card_clock() -> tuple[int, int] | None:
    """MHz of its processors now, and at most."""
    now, most = ask("nvmlDeviceGetClockInfo", 1), ask("nvmlDeviceGetMaxClockInfo", 1)  # 1: NVML_CLOCK_SM
    return (now, most) if now and most else None


SLOWED = {0x08: "the hardware", 0x20: "heat", 0x40: "heat", 0x80: "the power supply"}  # NVML's bits


def card_slowed_by() -> set[str]:
    """What holds its clocks down. Its power limit is not named: a busy card's ordinary pace."""
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return {name for bit, name in SLOWED.items() if reasons & bit}
