"""The machine and the packages of a run, by an allow-list."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from harness import ROOT, __version__
from harness.doctor import installed
from harness.record import Provenance

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP's threads
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "sacrebleu", "rouge-score")


def provenance(device, precision: str) -> Provenance:
    """By an allow-list: never the whole of os.environ."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return Provenance(
        device=properties.name if cuda else "cpu",
        device_bytes=properties.total_memory if cuda else None,
        driver=driver() if cuda else None,
        cuda=torch.version.cuda,
        precision=precision,
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        waiting=", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
        or "as the library does",
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES if installed(name)},
        allocator=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        **source(),
    )


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


def source() -> dict:
    """Of Tuneoff's own code: its version; the commit and whether it was changed since, where its files belong
    to a repository: one that merely lies around an installation is another's."""
    git = ["git", "-C", str(ROOT)]

    def ask(*command: str) -> str | None:
        done = subprocess.run([*git, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        own = ask("ls-files", "--error-unmatch", "harness/__init__.py") is not None
        commit = ask("rev-parse", "--short=12", "HEAD") if own else None
        dirty = bool(ask("status", "--porcelain", "-uno", ".")) if commit else None
    except OSError:  # no git
        commit = dirty = None
    return {"version": __version__, "commit": commit, "dirty": dirty}
