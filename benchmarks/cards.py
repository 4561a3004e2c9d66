"""Twelve runs on all cards of a host, beside as many of them alone: does `--gpus all` cost anybody anything?

    python benchmarks/cards.py                       english-17m's shape, 4 methods with 3 seeds, all cards
    python benchmarks/cards.py --gpus 0 1 --model FOLDER --json cards.json

alone: the first seed of each method, one run at a time, on one card with its share of the cores; then all of
them, as `--gpus all` does it. Makespan is from the first run's start to the last one's end; no order of runs
could be shorter than their seconds over the cards, nor than the longest of them. Without --model weights are
random. On a CPU runs of a tiny model have some cores each, as a bench has it there.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import GEMMA_3_1B, TINY, fixed_rows, without_tokenizer

from harness import machine
from harness.bench import bench, chosen
from harness.bench.attempt import Slot
from harness.bench.places import Here
from harness.plan import Plan, Request, plan
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.store import Store, save

ENGLISH_17M = GEMMA_3_1B | {
    "vocab_size": 16384, "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8,
    "num_attention_heads": 5, "head_dim": 64, "query_pre_attn_scalar": 64, "max_position_embeddings": 2048,
}  # fmt: skip
METHODS = ("lora", "full", "dora", "galore")
ROWS = 16  # of a step
HELD_OUT = 64  # rows that each run answers
LIMIT_SECONDS = 60  # of a run


def main() -> None:
    there = machine.cards()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", nargs="+", default=["all"] if there else [], help="as run_bench.py has it")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150 if there else 12)
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--json", type=Path, help="what was measured")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        os.environ |= {"TUNEOFF_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        specs, places = asked_for(asked, Path(folder)), shared(chosen(None, asked.gpus), ends)
        first = [spec for spec in specs if spec.seed == 0]
        alone = Watched(first, asked.seeds, Store(Path(folder, "alone")), places(1))
        print(f"{'run':12} {'began':>6} {'seconds':>8} {'alone':>8} {'step ms':>8} {'alone':>8} {'ratio':>7}")
        beside = Watched(specs, asked.seeds, Store(Path(folder, "beside")), places(), alone)
    found = together(alone, beside)
    print(
        "{slots} at once: makespan {makespan:.1f} s, {over:.2f} times the {least:.1f} s that the runs allow; "
        "one after another {one_by_one:.0f} s; a step took {slower:+.1%} at most".format(**found)
    )
    if asked.json:
        save(
            asked.json, json.dumps({"asked": vars(asked) | {"json": None, "model": str(asked.model)}} | found)
        )


def asked_for(asked, folder: Path) -> list[RunSpec]:
    """Seed by seed, as a plan has them; the untouched model is left out, which runs before all others."""
    config, long, new = (ENGLISH_17M, 256, 64) if asked.gpus else (TINY, 64, 4)
    rows = asked.steps * ROWS
    hp = Hyperparams(batch_size=ROWS, max_steps=asked.steps + 2 * HELD_OUT // ROWS, max_length=long)
    model = folder / "model"
    if asked.model:
        config = without_tokenizer(asked.model, model)
    else:
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
    file = fixed_rows(model, hp, config["vocab_size"], "half")
    data = {"train": rows, "validation": HELD_OUT, "test": HELD_OUT, "near_duplicates": "off",
            "template": "instruction"}  # fmt: skip
    own = {"batch_size": ROWS, "micro_batch_size": ROWS, "max_steps": asked.steps, "max_length": long,
           "max_new_tokens": new, "eval_batch_size": HELD_OUT, "validations": 2}  # fmt: skip
    settings = [f"data.{k}={v}" for k, v in data.items()] + [f"hp.{k}={v}" for k, v in own.items()]
    request = Request(
        [*asked.methods], model=f"{'' if asked.model else 'random:'}{model}", dataset=str(file),
        seeds=[*range(asked.seeds)], settings=settings,
    )  # fmt: skip
    return sorted((spec for spec in plan(request) if spec.trains), key=lambda spec: spec.seed)


def shared(places, ends: ExitStack):
    """-> what opens so many of those places; they are the same each time, and so are the imports."""
    found: list[Slot] = []

    def some(count: int | None = None):
        @contextmanager
        def opened(plan, terms, first) -> Iterator[Here]:
            if not found:
                found.extend(ends.enter_context(places(plan, terms, first)).free)
            yield Here(found[:count], terms)

        return opened

    return some


class Watched:
    """A bench of these runs, when each began and ended, in seconds, and what it left, by its folder; where it
    is compared with another, a line for each as it ends."""

    def __init__(
        self, specs: list[RunSpec], seeds: int, store: Store, places, alone: "Watched | None" = None
    ):
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.records: dict[str, RunRecord] = {}
        self.alone = alone
        for _ in bench(Plan(specs, [*range(seeds)]), store, "", self, limit=LIMIT_SECONDS, every=0.0,
                       where=places):  # fmt: skip
            pass

    def start(self, spec: RunSpec, number: int, total: int) -> None:
        self.began[spec.folder] = time.monotonic()

    def event(self, spec: RunSpec, values: dict) -> None:
        pass

    def end(self, record: RunRecord, cached: bool) -> None:
        """Told by the bench's own thread: soon after the run's end."""
        own = record.spec.folder
        self.ended[own], self.records[own] = time.monotonic(), record
        name = f"{record.spec.method} {record.spec.seed}"
        if not record.ok:
            print(f"{name:12} {record.status}: {record.error}", flush=True)
        elif self.alone:
            began = self.began[own] - min(self.began.values())
            print(f"{name:12} {began:6.1f} {self.seconds(own):8.1f} {self.alone.like(record)[0]:8.1f} "
                  f"{1000 * step(record):8.2f} {1000 * self.alone.like(record)[1]:8.2f} "
                  f"{step(record) / self.alone.like(record)[1]:7.3f} {' · '.join(record.disturbed or [])}",
                  flush=True)  # fmt: skip

    def seconds(self, own: str) -> float:
        return self.ended[own] - self.began[own]

    def like(self, record: RunRecord) -> tuple[float, float]:
        """Seconds and a step's seconds of the method's own run."""
        for own, one in self.records.items():
            if one.ok and one.spec.method == record.spec.method:
                return self.seconds(own), step(one)
        return nan, nan


def step(record: RunRecord) -> float:
    return statistics.median(record.step_seconds[record.warmup_steps :])


def together(alone: Watched, beside: Watched) -> dict:
    """What it came to."""
    fine = [record for record in beside.records.values() if record.ok]
    if not fine:
        sys.exit("no run has ended well")
    seconds = [beside.seconds(record.spec.folder) for record in fine]
    slots = max((record.provenance.at_once or 1 for record in fine), default=1)
    least = max(sum(seconds) / slots, *seconds)
    makespan = max(beside.ended.values()) - min(beside.began.values())
    return {
        "slots": slots, "makespan": makespan, "least": least, "over": makespan / least,
        "one_by_one": sum(alone.like(record)[0] for record in fine),
        "slower": max(step(record) / alone.like(record)[1] for record in fine) - 1,
        "runs": [{"run": f"{r.spec.method} {r.spec.seed}", "began": beside.began[r.spec.folder],
                  "seconds": beside.seconds(r.spec.folder), "step": step(r), "alone": alone.like(r),
                  "how": r.kernels.rung, "disturbed": r.disturbed} for r in fine],
    }  # fmt: skip


if __name__ == "__main__":
    main()
