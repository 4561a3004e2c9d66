"""Forecasts held against a card: for each method, architecture and shape, what a run was said to take, and
what it does.

    python benchmarks/forecast.py --json forecast.json                       all methods, on a GPU
    python benchmarks/forecast.py --json forecast.json --methods lora qlora --models llama
    python benchmarks/forecast.py --json forecast.json --table               what is measured so far

A process a method and architecture, all shapes in it, some steps each; weights are drawn. Each row is kept as
it comes: the same command goes on where it was stopped, and --methods names what is next.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MODELS = {
    "gemma": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "sliding_window": 512, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "llama": {  # Llama 3.2 1B
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "qwen": {  # Qwen 2.5 0.5B
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip
SHAPES = ("8x512", "4x1024", "16x256", "2x2048", "8x512-ck", "8x512-compiled")  # rows x tokens, and how
STEPS = 4
LIMIT_SECONDS = 420  # of a process
TIMED = 2  # steps at the end, whose mean is the step time


def main() -> None:
    from harness.method import known_methods

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for name in known_methods() if name not in ("base", "base_nf4", "peft")]
    parser.add_argument("--methods", nargs="+", default=names)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--json", type=Path, required=True, help="what was measured; is added to")
    parser.add_argument("--tiny", action="store_true", help="two layers: tries the benchmark itself")
    parser.add_argument("--table", action="store_true", help="print what is there alone")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        return measure(json.loads(asked.job), asked.json)
    done = rows(asked.json)
    for model in [] if asked.table else asked.models:
        for name in asked.methods:
            there = {row["shape"] for row in done if (row["method"], row["model"]) == (name, model)}
            if left := [shape for shape in asked.shapes if shape not in there]:
                job = {"method": name, "model": model, "shapes": left, "tiny": asked.tiny}
                command = [sys.executable, __file__, "--json", str(asked.json), "--job", json.dumps(job)]
                began = time.time()
                try:
                    ended = subprocess.run(command, timeout=LIMIT_SECONDS, capture_output=True, text=True)
                    said = "" if not ended.returncode else ended.stderr.strip().splitlines()[-1:]
                except subprocess.TimeoutExpired:
                    said = "not done in time"
                print(f"{name} {model} {time.time() - began:.0f} s {said}", flush=True)
    print(table(rows(asked.json)))


def rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measure(job: dict, path: Path) -> None:
    """Of a method and an architecture, in this process: all forecasts first, then the shapes one by one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from harness import method
    from harness.forecast.cards import card_named

    cls = method.resolve(job["method"], method.find(job["method"], method.known_methods()))
    here = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if here else "cpu"
    card = card_named(name, torch.cuda.get_device_properties(0).total_memory if here else None)
    with tempfile.TemporaryDirectory() as folder:
        model = MODELS[job["model"]] | ({"num_hidden_layers": 2} if job["tiny"] else {})
        (Path(folder) / "config.json").write_text(json.dumps(model))
        for shape in job["shapes"]:
            row = {"method": job["method"], "model": job["model"], "shape": shape, "card": name}
            try:
                row |= one(cls, folder, shape, card, here)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def spec_of(cls, folder: str, shape: str):
    from harness import method
    from harness.spec import Hyperparams, RunSpec

    size, _, way = shape.partition("-")
    count, tokens = map(int, size.split("x"))
    hp = Hyperparams(
        batch_size=count, micro_batch_size=count, max_length=tokens, max_steps=STEPS, validations=0,
        kernels="compiled" if way == "compiled" else "auto", gradient_checkpointing=way == "ck",
        max_grad_norm=0.0 if "gradient clipping" in cls.cannot else 1.0, eval_batch_size=count,
    )  # fmt: skip
    options = method.options(method.build(cls, {}))
    dataset = {"name": "rows", "language": "en", "reward": "rouge_l", "parts": []}
    return RunSpec(cls.name, 0, "random:bench", dataset, hp, options, locations={"model": folder})


def examples(count: int, tokens: int) -> list:
    """Half of each is learned."""
    from array import array

    from harness.data import Example

    half = array("i", range(5, 5 + tokens // 2))
    return [Example(f"r:{i}", "r", "", "", half, half) for i in range(count)]


def one(cls, folder: str, shape: str, card, here: bool) -> dict:
    from transformers import AutoConfig

    from harness import method
    from harness.forecast.forecast import drawn_out

    spec = spec_of(cls, folder, shape)
    train = examples(spec.hp.batch_size * STEPS, spec.hp.max_length)
    splits = {"train": train, "validation": [], "test": []}
    began, built = time.time(), method.build(cls, spec.options)
    made = drawn_out(spec, built, AutoConfig.from_pretrained(folder), splits, True, True)
    found = {
        "rung": made.rung, "peak": made.peak, "device": made.device(card), "parts": made.parts,
        "step": made.seconds(card)["train"] / STEPS, "spent": time.time() - began,
        "unsure": made.unsure(made.peak),
    }  # fmt: skip
    return {"forecast": found} | ({"measured": truth(cls, spec, splits)} if here else {})


def truth(cls, spec, splits: dict) -> dict:
    """A load, an attach and some steps, by the run's own code."""
    import gc

    import torch
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    from harness import method
    from harness.data import Template
    from harness.measuring import Meter
    from harness.record import RunRecord
    from harness.training import (
        Loop,
        Run,
        load_base,
        loaded_types,
        master_weights,
        one_arithmetic,
        put_back,
    )  # fmt: skip

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(cache_enabled=False)])
    meter, record = Meter(accelerator.device), RunRecord(spec, "ok")
    record.phases = meter.phases
    built = method.build(cls, spec.options)

    def load(**more):
        return load_base(spec, torch.bfloat16, accelerator.device, **more)

    class Words:
        pad_token_id = eos_token_id = 0
        bos_token_id = 1

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    template = Template.__new__(Template)
    template.tokenizer = Words()
    with meter.phase("load"):
        model = built.load(load)
    run = Run(
        built, built.own(spec.own_hp), 0, splits, dataset=spec.dataset, template=template, stops=[0],
        accelerator=accelerator, meter=meter, record=record, load_base=load,
    )  # fmt: skip
    with meter.phase("attach"):
        model = built.attach(model, run)
        types = loaded_types(model)
        master_weights(model, "bf16")
        one_arithmetic(model, types)
    seconds = []
    with meter.phase("train"):
        loop = Loop(model, run)
        for step in run.batches:
            torch.cuda.synchronize()
            began, compiling = time.perf_counter(), loop.kernels.seconds
            loop.step(step)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began - (loop.kernels.seconds - compiling))
        loop.kernels.close()
    phases = {name: asdict(phase) for name, phase in meter.phases.items()}
    peaks = [phases[name]["peak_allocated"] or 0 for name in ("attach", "train")]
    found = {"rung": record.kernels.rung, "reason": record.kernels.reason, "peak": max(peaks) - before,
             "device": max(p["peak_device"] or 0 for p in phases.values()) or None,
             "reserved": max(p["peak_reserved"] or 0 for p in phases.values()),
             "step": sum(seconds[-TIMED:]) / TIMED, "phases": phases}  # fmt: skip
    put_back(types)
    return found


def table(found: list[dict]) -> str:
    """A line a row, then the median and the worst error of peak memory, device memory and step time."""
    heads = (
        "method", "model", "shape", "rung", "peak GiB, said", "is", "error", "device error", "step ms, said",
        "is", "error",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    errors: dict[str, list[float]] = {"peak": [], "device": [], "step": []}
    for row in found:
        said, measured = row.get("forecast"), row.get("measured")
        place = f"| {row['method']} | {row['model']} | {row['shape']} |"
        if not (said and measured):
            lines.append(f"{place} {row.get('error') or (said and said['rung'])} |")
            continue
        off = {name: said[name] / measured[name] - 1 for name in errors if measured.get(name)}
        for name, error in off.items():
            errors[name].append(abs(error))
        rung = said["rung"] if said["rung"] == measured["rung"] else f"{said['rung']}, was {measured['rung']}"
        lines.append(
            f"{place} {rung} | {said['peak'] / 2**30:.2f} | {measured['peak'] / 2**30:.2f} | "
            f"{off['peak']:+.1%} | {off.get('device', float('nan')):+.1%} | {said['step'] * 1e3:.0f} | "
            f"{measured['step'] * 1e3:.0f} | {off['step']:+.0%} |"
        )
    for name, values in errors.items():
        if values:
            lines.append(
                f"{name}: median error {median(values):.1%}, worst {max(values):.1%}, of {len(values)}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
