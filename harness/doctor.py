"""What this machine has, what is wrong with it, and the remedy."""

import importlib
import json
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version

FLOORS = {  # the oldest that the code is known to run on
    "torch": "2.11",
    "transformers": "5.17",
    "peft": "0.21",
    "accelerate": "1.10",
    "bitsandbytes": "0.50",
    "datasets": "4.7",
    "huggingface_hub": "1.30",
    "safetensors": "0.5",
    "sacrebleu": "2.4",
    "rouge-score": "0.1.2",
    "numpy": "2",
    "pyarrow": "16",
    "matplotlib": "3.8",
    "pandas": "2.2",
    "jinja2": "3.1.6",
    "tabulate": "0.9",
    "filelock": "3.13",
    "packaging": "23",
    "rich": "13",
    "nvidia-ml-py": "12",
}
IMPORTED = (  # by every run; rouge_scorer imports nltk
    "torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "jinja2", "sacrebleu",
    "rouge_score.rouge_scorer",
)  # fmt: skip
DISK_BYTES = 5 * 2**30  # room for one 1B model's weights and its results
BUSY_BYTES = 500 * 2**20  # more than a desktop shows; another program would disturb every number


def examine() -> list[dict]:
    """-> findings: what, state (ok, note, wrong) and the remedy, if any is needed."""
    findings = []
    for probe in (packages, device, disk, token):
        try:
            findings.extend(probe())
        except Exception as error:  # what is broken here is a finding too, and the others are still wanted
            what = f"{probe.__name__}: {type(error).__name__}: {error}"
            findings.append(finding("wrong", what, "pip install -r requirements.txt"))
    return findings


def finding(state: str, what: str, remedy: str = "") -> dict:
    return {"what": what, "state": state, "remedy": remedy}


def packages():
    good = sys.version_info >= (3, 11)
    yield finding(
        "ok" if good else "wrong",
        f"Python {platform.python_version()}",
        "" if good else "use Python 3.11 or newer",
    )
    for name, floor in FLOORS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if not found:  # or what an installation that was broken off has left
            yield finding("wrong", f"{name} is missing", "pip install -r requirements.txt")
        elif older(found, floor):
            yield finding("wrong", f"{name} {found} is older than {floor}", "pip install -r requirements.txt")
        else:
            yield finding("ok", f"{name} {found}")
    try:
        version("pynvml")
        yield finding(
            "note", "the deprecated package pynvml is installed beside nvidia-ml-py", "pip uninstall pynvml"
        )
    except PackageNotFoundError:
        pass


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def older(found: str, floor: str) -> bool:
    """By the leading numbers of each part: where packages are missing, packaging may be one of them."""
    first, second = (
        [int(number) for number in re.findall(r"(?:^|\.)(\d+)", text.partition("+")[0])]
        for text in (found, floor)
    )
    return first < second


def device():
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and others
        yield finding("wrong", f"torch cannot be imported: {error}", "pip install -r requirements.txt")
        return
    if not torch.cuda.is_available():
        yield finding(
            "note",
            "no CUDA GPU: runs use the CPU in fp32",
            "enough for the demo and small models; nvidia-smi shows whether there is a card",
        )
        return
    card = torch.cuda.get_device_properties(0)
    yield finding("ok", f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield finding("ok", "bf16 arithmetic is real on this card: hp.precision=auto uses it")
    else:
        yield finding("note", "this card only emulates bf16: hp.precision=auto computes in fp32")
    free, total = torch.cuda.mem_get_info()
    if total - free > BUSY_BYTES + 600 * 2**20:  # this process's own context is up to 600 MiB
        yield finding(
            "wrong",
            f"{(total - free) / 2**30:.1f} GiB of the card are in use",
            "end other programs (nvidia-smi names them): they would disturb every number",
        )
    try:
        import pynvml

        pynvml.nvmlInit()
        yield finding(
            "ok", f"driver {pynvml.nvmlSystemGetDriverVersion()}: device memory and energy are measured"
        )
    except Exception as error:  # NVML raises many kinds; the gauge is missing all the same
        yield finding("note", f"NVML does not answer ({error}): device memory and energy stay unknown")


def disk():
    free = shutil.disk_usage(".").free
    yield finding(
        "ok" if free > DISK_BYTES else "note",
        f"{free / 2**30:.0f} GiB of disk free here",
        "" if free > DISK_BYTES else "a 1B model needs about 5 GiB: use --results on another disk",
    )


def token():
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield finding("note", "HF_HUB_OFFLINE=1: only cached and local models and datasets")
    there = get_token() is not None
    yield finding(
        "ok" if there else "note",
        f"hub token {'present' if there else 'absent'}",
        "" if there else "only gated models such as google/gemma-3-1b-it need one: hf auth login",
    )


def unimportable(needs: list[str]) -> dict[str, str]:
    """Package or module -> why it cannot be imported, with the remedy: of those that every run imports,
    and of the packages that some methods need beyond them."""
    sources = packages_distributions()
    reasons = {}
    for name in [*IMPORTED, *needs]:
        modules = [name] if name in IMPORTED else [m for m, found in sources.items() if name in found]
        try:
            for module in modules or [name]:
                importlib.import_module(module)
        except Exception as error:  # a package that is broken raises what it likes
            missing = isinstance(error, ModuleNotFoundError) and error.name
            remedy = f"pip install {error.name.partition('.')[0]}" if missing else "install it again with pip"
            reasons[name] = f"{name} cannot be imported, {type(error).__name__}: {error}: {remedy}"
    return reasons


if __name__ == "__main__":  # a bench tries, in a process of its own, what its runs will import
    print(json.dumps(unimportable(sys.argv[1:])))
