"""The machine and the packages of a run, by an allow-list."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness import ROOT

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP's threads
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "sacrebleu", "rouge-score")


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def environment(device, precision: str) -> dict:
    """By an allow-list: never the whole of os.environ."""
    import torch

    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": properties.name if cuda else "cpu",
        "device_bytes": properties.total_memory if cuda else None,
        "driver": driver() if cuda else None,
        "cuda": torch.version.cuda,
        "precision": precision,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "waiting": ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
        or "as the library does",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if installed(name)},
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "commit": commit(),
    }


def driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVML raises many kinds; whichever it is, the driver is unknown
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def commit() -> str | None:
    """Of this code, with a + where it was changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else None
