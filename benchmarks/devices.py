"""One run on several cards: how much faster it is, whether it is the same run, what sharding makes room for.

    python benchmarks/devices.py                    all cards of this host, Gemma-3-1b's shape, 8 x 512 a card
    python benchmarks/devices.py --cards 2 --json devices.json
    python benchmarks/devices.py --parts sharding      or speed, same

On a CPU, processes stand for cards and a tiny model for Gemma: that shows that it works, not how fast it is.

speed: the rows of a card stay (weak scaling); efficiency is the step of one card over the step of several.
same: some steps with the rows of all cards on one: how far the losses are apart, in nats a token.
sharding: twice the layers, under a limit of memory that weights, gradients and moments alone exceed on one
card: who trains, and how far the losses are from those of one card without that limit.
Runs are those of a bench, copied from one process that has imported what they need; weights are random.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import GEMMA_3_1B, TINY, fixed_rows

from harness import machine
from harness.bench.attempt import Slot, Terms, run
from harness.errors import Problems
from harness.nursery import Nursery
from harness.plan import find_dataset
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.store import Store, save

WARMUP = 5  # steps that are not timed
COMPARED = 8  # steps whose losses are
LIMIT_SECONDS = 120  # of a run: a hang must not keep the cards
LEAST_SECONDS = 10  # that a run takes, at least: none begins with less
RATES = {"full": 1e-5}  # of others 1e-4
HELD = 16  # bytes of a weight that is trained, with its gradient and two moments
CAP = 0.9  # of what these take on one card
PARTS = ("speed", "same", "sharding")
COLUMNS = "{:22} {:6} {:>5} {:>5} {:>8} {:>9} {:>10} {:>9} {:>8}  {}"
HEADS = ("part", "method", "cards", "rows", "step ms", "tokens/s", "efficiency", "peak GiB", "apart", "how")


def main() -> None:
    cards = machine.cards()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=int, default=len(cards) or 2, help="at most, of 1, 2, 4 and 8")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="8x512" if cards else "4x64", help="rows x tokens of a card")
    parser.add_argument("--steps", type=int, default=20 if cards else 5, help=f"timed, after {WARMUP} others")
    parser.add_argument(
        "--seconds", type=float, default=240, help="of the call; what would not end is left out"
    )
    parser.add_argument("--json", type=Path, help="what was measured, whole at any moment")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        os.environ |= {
            "TUNEOFF_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # not every host lets its cards multicast
        call = Call(asked, Path(folder), bool(cards))
        call.begin = ends.enter_context(Nursery({})).child
        print(f"imports: {call.spent():.0f} s\n{COLUMNS.format(*HEADS)}", flush=True)
        call.measure()
        print(f"{call.spent():.0f} s in all")


class Call:
    def __init__(self, asked, folder: Path, cuda: bool):
        self.began = time.monotonic()
        self.asked, self.folder, self.cuda, self.rows = asked, folder, cuda, []
        self.per_card, self.tokens = map(int, asked.shape.split("x"))
        self.counts = [n for n in (1, 2, 4, 8) if n <= asked.cards]
        self.most = self.counts[-1]
        self.store = Store(folder / "results")
        config = GEMMA_3_1B if cuda else TINY
        model, deep = folder / "model", folder / "deep"
        model.mkdir()
        longest = self.hp(1, self.most)
        rows = fixed_rows(model, longest, config["vocab_size"], "all")
        shutil.copytree(model, deep)
        for place, layers in ((model, 1), (deep, 2)):
            more = {"num_hidden_layers": layers * config["num_hidden_layers"]}
            (place / "config.json").write_text(json.dumps(config | more))
        some = {"train": longest.max_steps * longest.batch_size, "validation": 1, "test": 1}
        dataset = find_dataset(
            str(rows), some | {"near_duplicates": "off", "template": "instruction"}, Problems()
        )
        places = {"model": str(model), "sources": {dataset["parts"][0]["name"]: str(rows)}}
        # A trial is neither saved nor asked for answers.
        self.blank = RunSpec("", 0, "random:bench", dataset, longest, locations=places, search={})
        self.deep = replace(self.blank, model="random:deep", locations=places | {"model": str(deep)})
        self.card = (machine.card_described() or (f"CPU, {len(machine.cores())} cores",))[0]
        print(f"{self.card}, {asked.shape} a card, {asked.steps} steps after {WARMUP}", flush=True)

    def spent(self) -> float:
        return time.monotonic() - self.began

    def hp(self, devices: int, shares: int, steps: int = 0, **more) -> Hyperparams:
        """Of steps with the rows of so many cards."""
        return Hyperparams(
            batch_size=self.per_card * shares, micro_batch_size=self.per_card, max_length=self.tokens,
            max_steps=steps or WARMUP + self.asked.steps, schedule="constant", warmup_ratio=0.0,
            validations=0, max_new_tokens=1, precision="bf16" if self.cuda else "fp32", devices=devices,
            **{"kernels": "compiled", **more},
        )  # fmt: skip

    def measure(self) -> None:
        for method in self.asked.methods:
            several = None
            if "speed" in self.asked.parts:
                alone = self.run("speed", method, self.hp(1, 1))
                for n in self.counts[1:]:
                    several = self.run("speed", method, self.hp(n, n), alone=alone)
            if "same" in self.asked.parts and self.most > 1:
                n = self.most
                if not several:
                    several = self.run("several", method, self.hp(n, n, COMPARED))
                self.run(f"{n} cards' rows on 1", method, self.hp(1, n, COMPARED), beside=several)
        if "sharding" in self.asked.parts and self.most > 1:
            self.sharding()

    def sharding(self) -> None:
        n, how = self.most, {"kernels": "eager", "gradient_checkpointing": True}
        one = self.run("no limit", "full", self.hp(1, n, COMPARED, **how), self.deep)
        cap = round(CAP * HELD * one["parameters"] / 2**30, 1) if self.cuda and "seconds" in one else 0.0
        part = f"at most {cap} GiB" if cap else "no allocator, no limit"
        how |= {"memory_cap": cap}
        parts = self.hp(n, n, COMPARED, **how, sharding="full")
        self.run(f"{part}, in parts", "full", parts, self.deep, beside=one)
        if cap:
            self.run(part, "full", self.hp(1, n, COMPARED, **how), self.deep)

    def run(self, part: str, method: str, hp: Hyperparams, blank=None, alone=None, beside=None) -> dict:
        """What it came to; on the screen, and in the JSON. `alone`: that of one card, of which it is to be as
        fast; `beside`: that whose losses are to be its own."""
        row = {"part": part, "method": method, "cards": hp.devices, "rows": hp.batch_size}
        left, start = self.asked.seconds - self.spent(), time.monotonic()
        if left < LEAST_SECONDS:
            row["error"] = f"left out: {self.asked.seconds:.0f} s are over"
        else:
            spec = replace(
                blank or self.blank, method=method, hp=replace(hp, learning_rate=RATES.get(method, 1e-4))
            )
            terms = Terms(self.store, "", Quiet(), limit=min(LIMIT_SECONDS, left), every=0)
            row |= measured(run(spec, terms, Slot(self.begin)))
        if alone and "seconds" in row and "seconds" in alone:
            row["efficiency"] = alone["seconds"] / row["seconds"]
        if beside and "losses" in row and "losses" in beside:
            pairs = [*zip(row["losses"], beside["losses"], strict=False)]
            row["apart"] = max(abs(a - b) for a, b in pairs)
            if row["given"][: len(pairs)] != beside["given"][: len(pairs)]:
                row["error"] = "WRONG: it has read other rows"
        row["spent"] = time.monotonic() - start
        self.rows.append(row)
        self.tell(row)
        return row

    def tell(self, row: dict) -> None:
        def shown(name: str, form: str, factor: float = 1.0) -> str:
            return format(row[name] * factor, form) if row.get(name) is not None else "–"

        cells = (
            row["part"], row["method"], row["cards"], row["rows"], shown("seconds", ".1f", 1000),
            shown("tokens_per_second", ",.0f"), shown("efficiency", ".1%"),
            shown("allocated", ".1f", 2**-30), shown("apart", ".1e"),
        )  # fmt: skip
        how = " · ".join([row.get("error") or row["how"], *row.get("warnings", []), f"{row['spent']:.0f} s"])
        print(COLUMNS.format(*cells, how), flush=True)
        if self.asked.json:
            asked = {**vars(self.asked), "json": None}
            save(
                self.asked.json, json.dumps({"card": self.card, "asked": asked, "rows": self.rows}, indent=1)
            )


class Quiet:
    """Of a run's events nothing is shown."""

    def event(self, spec: RunSpec, values: dict) -> None:
        pass


def measured(record: RunRecord) -> dict:
    if not record.ok:
        return {"error": f"{record.status}: {(record.error or '')[:200]}"}
    seconds, kernels = statistics.median(record.step_seconds[WARMUP:]), record.kernels
    why = f": {kernels.reason[:200]}" if kernels.reason else ""
    return {
        "seconds": seconds, "step_seconds": record.step_seconds,
        "losses": [step["loss"] for step in record.training],
        "norms": [step["grad_norm"] for step in record.training],
        "given": record.hashes["given"],
        "tokens_per_second": record.tokens.trained / len(record.step_seconds) / seconds,
        "allocated": record.peak("peak_allocated"), "reserved": record.peak("peak_reserved"),
        "parameters": record.sizes.parameters,
        "phases": {name: vars(phase) for name, phase in record.phases.items()},
        "ranks": [{name: vars(phase) for name, phase in rank.items()} for rank in record.ranks],
        "how": (kernels.rung or "eager") + why, "disturbed": record.disturbed, "warnings": record.warnings,
    }  # fmt: skip


if __name__ == "__main__":
    main()
