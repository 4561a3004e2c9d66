"""What this machine has, what is wrong with it, and the remedy."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator

from harness import machine, packages

Finding = dict[str, str]
DISK_BYTES = 5 * 2**30  # room for one 1B model's weights and its results


def examine() -> list[Finding]:
    """-> findings: what, state (ok, note, wrong) and the remedy, if any is needed."""
    findings: list[Finding] = []
    for probe in (installed, device, disk, token):
        try:
            findings.extend(probe())
        except Exception as error:  # what is broken here is a finding too, and the others are still wanted
            what = f"{probe.__name__}: {type(error).__name__}: {error}"
            findings.append(finding("wrong", what, "pip install -r requirements.txt"))
    return findings


def finding(state: str, what: str, remedy: str = "") -> Finding:
    return {"what": what, "state": state, "remedy": remedy}


def installed() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield finding(
        "ok" if good else "wrong",
        f"Python {platform.python_version()}",
        "" if good else "use Python 3.11 or newer",
    )
    for name, floor in packages.floors().items():
        found = packages.found(name)
        if not found:
            yield finding("wrong", f"{name} is missing", "pip install -r requirements.txt")
        elif packages.older(found, floor):
            yield finding("wrong", f"{name} {found} is older than {floor}", "pip install -r requirements.txt")
        else:
            yield finding("ok", f"{name} {found}")
    if packages.found("pynvml"):
        yield finding(
            "note", "the deprecated package pynvml is installed beside nvidia-ml-py", "pip uninstall pynvml"
        )


def device() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and others
        yield finding("wrong", f"torch cannot be imported: {error}", "pip install -r requirements.txt")
        return
    card = machine.card_properties()
    if card is None:
        yield finding(
            "note",
            f"no CUDA GPU: runs use the CPU in fp32 ({machine.cpu()})",
            "enough for the demo and small models; nvidia-smi shows whether there is a card",
        )
        return
    yield finding("ok", f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
    if (count := len(machine.cards())) > 1:
        yield finding("note", f"{count} cards", "--gpus all does as many runs at once")
    if machine.computes_bf16():
        yield finding("ok", "bf16 arithmetic is real on this card: hp.precision=auto uses it")
    else:
        yield finding("note", "this card only emulates bf16: hp.precision=auto computes in fp32")
    try:
        machine.nvml()
    except Exception as error:  # NVML raises many kinds; the gauges are missing all the same
        yield finding("note", f"NVML does not answer ({error}): device memory and energy stay unknown")
        return
    yield finding("ok", f"driver {machine.driver()}: device memory and energy are measured")
    if (used := machine.card_bytes_used() or 0) > machine.BUSY_BYTES:
        yield finding(
            "wrong",
            f"{used / 2**30:.1f} GiB of the card are in use",
            "end other programs (nvidia-smi names them): they would disturb every number",
        )


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    yield finding(
        "ok" if free > DISK_BYTES else "note",
        f"{free / 2**30:.0f} GiB of disk free here",
        "" if free > DISK_BYTES else "a 1B model needs about 5 GiB: use --results on another disk",
    )


def token() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield finding("note", "HF_HUB_OFFLINE=1: only cached and local models and datasets")
    there = get_token() is not None
    yield finding(
        "ok" if there else "note",
        f"hub token {'present' if there else 'absent'}",
        "" if there else "only gated models such as google/gemma-3-1b-it need one: hf auth login",
    )
