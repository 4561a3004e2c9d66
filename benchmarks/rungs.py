"""What each way of computing a method's steps costs: to compile, cold and warm, a step, and three peaks.

    python benchmarks/rungs.py                                 Gemma-3-1b's shape, 8 x 512; needs a GPU
    python benchmarks/rungs.py --methods lora full --ways cold warm

Each in a process of its own, a copy of this one, one after the other. `cold`: compiled and captured with
empty caches; `warm`: with those that it left. Then the same compiled layers without a graph, a graph without
them, and plain steps: allocated, reserved and device bytes with a graph are to be those without it.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

from forecast import GEMMA, Copy, ended, failed, spec_of, steps

from harness.nursery import card_is_asked_in_a_copy

WAYS = {  # -> what of a rung is left out
    "cold": [],
    "warm": [],
    "compiled": ["graphs"],
    "graph": ["compiling"],
    "eager": ["compiling", "graphs"],
}
LIMIT_SECONDS = 150  # of a process
HEADS = ["method", "asked", "steps", "compile s", "step ms", "allocated GiB", "reserved GiB", "device GiB",
         "why not others"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "galore"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--shape", default="8x512", help="rows x tokens; -ck: gradient checkpointing")
    asked = parser.parse_args()
    with card_is_asked_in_a_copy():
        for name in ("harness.training", "bitsandbytes", "peft", "torch._inductor.compile_fx"):
            import_module(name)
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "gemma").mkdir()
        Path(folder, "gemma", "config.json").write_text(json.dumps(GEMMA))
        for method in asked.methods:
            for way in asked.ways:
                copy = Copy(partial(measure, method, way, asked.shape, folder), Path(folder, "log"))
                print(ended(copy, time.monotonic() + LIMIT_SECONDS), flush=True)


def measure(method: str, way: str, shape: str, folder: str, say) -> None:
    caches = Path(folder, f"caches-{method}")
    os.environ |= {"TUNEOFF_CACHE": f"{caches}", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
                   "TRITON_CACHE_DIR": f"{caches}/triton"}  # fmt: skip
    try:
        cls, spec, splits = spec_of(method, "gemma", shape, folder)
        limits = cls.cannot | dict.fromkeys(WAYS[way], "not asked for")
        spec = replace(spec, hp=replace(spec.hp, kernels="compiled"))
        _, record = steps(type(cls.__name__, (cls,), {"cannot": limits}), spec, splits)
        compiling, train = record.phases.get("compile"), record.phases["train"]
        peaks = (train.peak_allocated, train.peak_reserved, train.peak_device)
        cells = [method, way, record.kernels.rung, f"{compiling.seconds:.1f}" if compiling else ""]
        cells += [f"{median(record.step_seconds) * 1e3:.1f}"]
        cells += [*(f"{peak / 2**30:.2f}" if peak else "" for peak in peaks), record.kernels.reason or ""]
    except BaseException as error:  # whatever ends it stands in its row
        cells = [method, way, failed(error)]
    say("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
