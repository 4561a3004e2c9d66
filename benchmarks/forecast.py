"""Forecasts held against a card: what a run was said to take, what a probe of it said then, and what it took.

    python benchmarks/forecast.py measure rows.jsonl --seconds 440     a fair sample, on a GPU
    python benchmarks/forecast.py measure rows.jsonl --methods lora --models llama
    python benchmarks/forecast.py measure caps.jsonl --caps 8 12 15 22     each may take one of these, GiB
    python benchmarks/forecast.py judge rows.jsonl             forecasts of these rows, by this code: no GPU

Methods, architectures and shapes come in a random order (--seed), so that what there is when the seconds are
over is a fair sample. Each is measured in a process of its own, a copy of this one, which has imported what
they need; weights are drawn. Rows are kept as they come: the same command goes on where it was stopped. What
these processes print is in a .log beside the rows. A run here is its probe and then the steps of a training:
what these take more, the probe has not seen. Rewards are drawn, too: models without sense would earn none.
Forecasts are made afterwards, as a plan is before a card is rented.
Under a cap a run shows whether it fits a card of that size, and is held against the verdict of a plan.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import repeat
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
GEMMA = {  # Gemma 3 1B
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "sliding_window": 512, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "gemma": GEMMA,
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
# Rows x tokens, and how: mixed, rows of any length up to that; ck, gradient checkpointing.
SHAPES = ("8x512", "4x1024", "16x256-mixed", "2x2048", "8x512-ck", "8x768-mixed")
COMPILED, ONE_OF = "8x512-compiled", 6  # of so many pairs of method and architecture one is compiled, too
TINY = {
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
}
STEPS = 12  # of a training, after those of its probe
ROUNDS = 2  # times that these are made; the first, in which each shape comes for the first time, is not timed
RUN_SECONDS = 120  # of a process, at most
RECORDS = ("probe", "whole")  # of a run: after the steps of a probe, and after all
WHAT = ("peak", "device", "step")
Asked = tuple[str, str, str]  # method, architecture, shape


def main() -> None:
    from harness.method import known_methods

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for name in known_methods() if name not in ("base", "base_nf4", "peft")]
    parser.add_argument("what", choices=["measure", "judge"])
    parser.add_argument("rows", type=Path, help="JSON, a row a line; measure adds to it")
    parser.add_argument("--methods", nargs="+", default=names)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shapes", nargs="+", help="of each, in place of those that are drawn")
    parser.add_argument("--caps", nargs="+", type=int, help="GiB, of which each row draws one")
    parser.add_argument("--seconds", type=float, default=440, help="after which nothing more is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small models: tries the benchmark itself")
    asked = parser.parse_args()
    found = rows(asked.rows)
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            Path(folder, name).mkdir()
            config = config | (TINY if asked.tiny else {})
            Path(folder, name, "config.json").write_text(json.dumps(config))
        if asked.what == "judge":
            print(table(judged(found, folder)))
            return
        left = [one for one in drawn(asked) if one not in map(key_of, found)]
        with asked.rows.open("a", encoding="utf-8") as file:
            for row in measured(left, asked, folder):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(*key_of(row), row.get("error") or f"{row['spent']:.1f} s", flush=True)


def rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def key_of(row: dict) -> Asked:
    return row["method"], row["model"], row["shape"]


def drawn(asked) -> list[Asked]:
    """In the order of the seed."""
    draw, found = random.Random(asked.seed), []
    for model in asked.models:
        for name in asked.methods:
            own = asked.shapes or [*SHAPES, *[COMPILED] * (draw.random() * ONE_OF < 1)]
            found += [
                (name, model, f"{shape} in {draw.choice(asked.caps)}" if asked.caps else shape)
                for shape in own
            ]
    draw.shuffle(found)
    return found


# Who does it: copies of this process, which are made before anybody asks for the card


def measured(left: list[Asked], asked, folder: str) -> Iterator[dict]:
    """A row for each, until the seconds are over."""
    from harness import machine
    from harness.forks import in_a_copy
    from harness.nursery import card_is_asked_in_a_copy

    end, log = time.monotonic() + asked.seconds, asked.rows.with_suffix(".log")
    card = json.loads(in_a_copy(lambda: json.dumps(machine.card_described()).encode(), 60) or "null")
    with card_is_asked_in_a_copy():
        import_module("harness.training")
        for name in ("bitsandbytes", "peft", *["torch._inductor.compile_fx"] * bool(card)):
            with suppress(ImportError):
                import_module(name)
    print(f"{len(left)} to measure on {card[0] if card else 'no card'}; imported", flush=True)
    for one in left:
        began = time.monotonic()
        told = ended(Copy(partial(run, *one, folder), log), min(end, began + RUN_SECONDS))
        if time.monotonic() > end:
            break
        row = {**dict(zip(("method", "model", "shape"), one, strict=True)), "card": card}
        row["spent"] = time.monotonic() - began
        yield row | ({"error": told} if isinstance(told, str) else dict(zip(RECORDS, told, strict=True)))


def judged(found: list[dict], folder: str) -> list[dict]:
    """Each with its forecast, and with that corrected by its probe."""
    ones = [key_of(row) for row in found if "error" not in row or fitted(row) is not None]
    copies = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), copies) as pool:
        made = dict(zip(ones, pool.map(forecast_one, *zip(*ones, strict=True), repeat(folder)), strict=True))
    return [row_of(row, made[key_of(row)]) if key_of(row) in made else row for row in found]


class Copy:
    """A copy of this process that does some work and says what it finds, by `say(value)`."""

    def __init__(self, work: Callable[[Callable], object], log: Path):
        self.line, theirs = multiprocessing.Pipe(False)
        copies = multiprocessing.get_context("fork")
        self.process = copies.Process(target=self.do, args=(work, theirs, log))
        self.process.start()
        theirs.close()

    @staticmethod
    def do(work: Callable[[Callable], object], line: Connection, log: Path) -> None:
        os.setsid()
        with log.open("ab", buffering=0) as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        work(line.send)

    def heard(self, end: float) -> Any:
        """What it says next; null when it has ended, or the time is over."""
        try:
            return self.line.recv() if wait([self.line], max(0.0, end - time.monotonic())) else None
        except EOFError:
            return None

    def end(self) -> None:
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.line.close()


def ended(copy: Copy, end: float) -> Any:
    try:
        return copy.heard(end) or "it did not end in time, or died"
    finally:
        copy.end()


def failed(error: BaseException) -> str:
    from harness.child import diagnose

    return f"{diagnose(error)[0]}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fitted(row: dict) -> bool | None:
    """Whether a run under a cap had room; null where there is no cap, or it broke by something else."""
    if " in " not in row["shape"]:
        return None
    return True if "error" not in row else False if row["error"].startswith("oom") else None


# What is asked


def chosen(name: str):
    from harness import method

    return method.resolve(name, method.find(name, method.known_methods()))


def spec_of(name: str, model: str, shape: str, folder: str):
    from harness import method
    from harness.spec import Hyperparams, RunSpec

    cls, (form, _, cap) = chosen(name), shape.partition(" in ")
    size, _, way = form.partition("-")
    count, tokens = map(int, size.split("x"))
    hp = Hyperparams(
        batch_size=count, micro_batch_size=count, max_length=tokens, max_steps=STEPS, validations=0,
        kernels="compiled" if way == "compiled" else "auto", gradient_checkpointing=way == "ck",
        max_grad_norm=0.0 if "gradient clipping" in cls.cannot else 1.0, eval_batch_size=count,
        memory_cap=float(cap or 0),
    )  # fmt: skip
    dataset = {"name": "rows", "language": "en", "reward": "rouge_l", "parts": []}
    options = method.options(method.build(cls, {}))
    spec = RunSpec(
        cls.name, 0, "random:bench", dataset, hp, options, locations={"model": f"{folder}/{model}"}
    )
    return cls, spec, {"train": examples(hp, way == "mixed"), "validation": [], "test": []}


def examples(hp, mixed: bool) -> list:
    """Half of each is learned."""
    from array import array

    from harness.data import Example

    draw, found = random.Random(0), []
    for number in range(hp.batch_size * STEPS):
        half = (draw.randint(hp.max_length // 8, hp.max_length) if mixed else hp.max_length) // 2
        ids = array("i", range(5, 5 + half))
        found.append(Example(f"r:{number}", "r", "", "", ids, ids))
    return found


def forecast_one(name: str, model: str, shape: str, folder: str):
    """-> a forecast and the seconds that it took, or why there is none."""
    from transformers import AutoConfig

    from harness import method
    from harness.forecast.forecast import drawn_out

    began = time.monotonic()
    try:
        cls, spec, splits = spec_of(name, model, shape, folder)
        config = AutoConfig.from_pretrained(spec.locations["model"])
        made = drawn_out(spec, method.build(cls, spec.options), config, splits, True, True)
        return made, time.monotonic() - began
    except BaseException as error:
        return failed(error)


# What is measured


def run(name: str, model: str, shape: str, folder: str, say: Callable) -> None:
    """A load, an attach, the steps of a probe and those of a training, by the run's own code."""
    try:
        say([record.to_json() for record in steps(*spec_of(name, model, shape, folder))])
    except BaseException as error:
        say(failed(error))


def steps(cls, spec, splits: dict) -> tuple:
    """-> the record after the probe, and that after the training, step_seconds its own."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    from harness import method
    from harness.data import Template
    from harness.measuring import Meter, StepClock
    from harness.record import RunRecord
    from harness.training import Run, load_base, resolve_precision, seed_everything, tried
    from harness.training.graphs import workspaces
    from harness.training.stages import capped

    precision = resolve_precision("auto")
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    capped(spec.own_hp.memory_cap)
    meter, record = Meter(accelerator.device), RunRecord(spec, "ok")
    workspaces()
    record.phases, record.provenance.precision = meter.phases, precision
    seed_everything(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    built = method.build(cls, spec.options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    load = partial(load_base, spec, dtype, accelerator.device)
    template = Template.__new__(Template)
    template.tokenizer = Words()
    with meter.phase("load"):
        model = built.load(load)
        training = Run(
            built, built.own(spec.own_hp), 0, splits, dataset=spec.dataset, template=template, stops=[0],
            accelerator=accelerator, meter=meter, record=record, load_base=load,
        )  # fmt: skip
    training.reward = lambda example, ids: (sum(ids) % 97) / 97  # type: ignore[method-assign]
    loop = tried(model, training)
    probe, clock, compiling = deepcopy(record), StepClock(training.device), []
    with meter.phase("train"):
        for step in [*training.batches] * ROUNDS:
            before = loop.kernels.seconds
            with clock.step():
                loop.step(step)
            compiling.append(loop.kernels.seconds - before)
        seconds = clock.read()
    own = [s - c for s, c in zip(seconds, compiling, strict=True)]
    return probe, replace(deepcopy(record), step_seconds=own[-STEPS:])


class Words:
    """A tokenizer of numbers."""

    pad_token_id = eos_token_id = 0
    bos_token_id = 1

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


# What is said of it


def row_of(row: dict, made: Any) -> dict:
    from harness.forecast import CARDS, card_named, corrected
    from harness.record import RunRecord

    if isinstance(made, str):
        return row | {"error": f"forecast: {made}"}
    forecast, spent = made
    known = card_named(*row["card"]) if row["card"] else CARDS["H200"]
    found: dict = {name: row[name] for name in ("method", "model", "shape")}
    if (room := fitted(row)) is not None:
        cap = int(row["shape"].rpartition(" ")[2]) * 2**30 + known.context
        return found | {"fitted": room, "said": forecast.verdict(known.of(cap))}
    probe, whole = (RunRecord.from_json(row[name]) for name in RECORDS)
    early, late = (r.phases["rollout"].seconds if "rollout" in r.phases else 0.0 for r in (probe, whole))
    parts = ("train", *["rollout"] * (late > early))  # else they were made before the first step
    for name, said in (("forecast", forecast), ("probe", corrected(forecast, probe, known))):
        seconds = said.seconds(known)
        found[name] = {
            "rung": said.rung, "peak": said.peak, "device": said.device(known), "parts": said.parts,
            "step": sum(seconds.get(part, 0.0) for part in parts) / STEPS, "unsure": said.unsure(said.peak),
        }  # fmt: skip
    found["forecast"]["spent"] = spent
    found["measured"] = {
        "rung": whole.kernels.rung, "peak": whole.peak("peak_allocated"),
        "device": whole.peak("peak_device", ("load", "attach", "train", "rollout")),
        "step": fmean(whole.step_seconds),
    }  # fmt: skip
    return found


def errors(row: dict, of: str) -> dict[str, float]:
    if "measured" not in row:
        return {}
    return {what: row[of][what] / row["measured"][what] - 1 for what in WHAT if row["measured"].get(what)}


def line(row: dict) -> str:
    place = f"| {row['method']} | {row['model']} | {row['shape']} |"
    if "error" in row:
        return f"{place} {row['error']} |"
    if "fitted" in row:
        return f"{place} said to be {row['said']}, {'had' if row['fitted'] else 'had no'} room |"
    said, found = row["forecast"], row["measured"]
    off = {of: errors(row, of) for of in ("forecast", "probe")}
    rung = said["rung"] if said["rung"] == found["rung"] else f"{said['rung']}, was {found['rung']}"
    cells = [rung, f"{found['peak'] / 2**30:.2f}", f"{found['step'] * 1e3:.0f}"]
    cells += [f"{off[of][what]:+.1%}" if what in off[of] else "–" for of in off for what in WHAT]
    return f"{place} {' | '.join(cells)} |"


def table(found: list[dict]) -> str:
    """A line a row, then the median and the worst error of each figure, of forecasts and of probes."""
    heads = ["method", "model", "shape", "steps", "peak GiB", "step ms"]
    heads += [f"{of}: {what}" for of in ("forecast", "probe") for what in WHAT]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [line(row) for row in sorted(found, key=key_of)] + [""]
    whole = [row for row in found if "measured" in row]
    capped = [row for row in found if "fitted" in row]
    for room, said, what in ((False, "fits", "that had no room"), (True, "too large", "that had room")):
        those = [row for row in capped if row["fitted"] is room]
        wrong = [" ".join(key_of(row)) for row in those if row["said"] == said]
        if those:
            tight = sum(row["said"] == "tight" for row in those)
            lines.append(f"caps, of {len(those)} {what}: {len(wrong)} said to be {said}, {tight} tight")
            lines += wrong
    for of in ("forecast", "probe"):
        for what in WHAT:
            off = [(abs(value), row) for row in whole if (value := errors(row, of).get(what)) is not None]
            if off:
                worst, row = max(off, key=lambda item: item[0])
                lines.append(f"{of}, {what}: median error {median(e for e, _ in off):.1%}, worst {worst:.1%} "
                             f"({' '.join(key_of(row))}), of {len(off)}")  # fmt: skip
        if not whole:
            continue
        beyond = [r for r in whole if abs(r[of]["peak"] - r["measured"]["peak"]) > r[of]["unsure"]]
        lines.append(f"{of}: peak off by more than its range in {len(beyond)} of {len(whole)}")
    lines.append(f"no figures of {len(found) - len(whole) - len(capped)} of {len(found)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
