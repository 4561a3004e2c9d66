"""One run on several cards: how much faster it is, whether it is the same run, what sharding makes room for.

    python benchmarks/devices.py                    all cards of this host, Gemma-3-1b's shape, 8 x 512 a card
    python benchmarks/devices.py --cards 2 --json devices.json
    python benchmarks/devices.py --parts sharding      or speed, same

On a CPU, processes stand for cards and a tiny model for Gemma: that shows that it works, not how fast it is.

speed: the rows of a card stay (weak scaling); efficiency is the step of one card over the step of several.
same: as many rows in a step, on one card and on all: how far the losses are apart.
sharding: under a limit of memory that lies between what one card and what each of all needs, who trains.
Each training is a process of its own, and its ranks; weights are random, and the same everywhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import GEMMA_3_1B, TINY, fixed_rows

from harness import machine
from harness.child import chosen_method, diagnose, ending_of
from harness.errors import Problems
from harness.plan import find_dataset
from harness.ranks import Place, Ranks
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.store import save

WARMUP = 5  # steps that are not timed
LIMIT_SECONDS = 150  # of a training: a hang must not keep the cards
PARTS = ("speed", "same", "sharding")


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else 2
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cards", type=int, default=there, help="at most; all powers of two up to it are tried"
    )
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="8x512" if cuda else "4x64", help="rows x tokens of a card")
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help=f"timed, after {WARMUP} others")
    parser.add_argument("--json", type=Path, help="what was measured, whole at any moment")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        return train(asked.job)
    with tempfile.TemporaryDirectory() as folder:
        Call(asked, Path(folder), cuda).measure()


class Call:
    def __init__(self, asked, folder: Path, cuda: bool):
        self.asked, self.folder, self.cuda, self.rows = asked, folder, cuda, []
        self.per_card, self.tokens = map(int, asked.shape.split("x"))
        self.counts = [n for n in (1, 2, 4, 8) if n <= asked.cards]
        config = GEMMA_3_1B if cuda else TINY
        (folder / "config.json").write_text(json.dumps(config))
        longest = self.hp(self.counts[-1], self.per_card)
        rows = fixed_rows(folder, longest, config["vocab_size"], "all")
        some = {"train": longest.max_steps * longest.batch_size, "validation": 1, "test": 1}
        more = {"near_duplicates": "off", "template": "instruction"}
        dataset = find_dataset(str(rows), some | more, Problems())
        places = {"model": str(folder), "sources": {dataset["parts"][0]["name"]: str(rows)}}
        self.blank = RunSpec("", 0, "random:bench", dataset, longest, locations=places, search={})
        print(f"{self.card()}, {asked.shape} a card, {asked.steps} steps after {WARMUP}", flush=True)

    def card(self) -> str:
        return getattr(machine.card_properties(), "name", f"CPU, {len(machine.cores())} cores")

    def hp(self, cards: int, rows: int, **more) -> Hyperparams:
        """Of a step with so many rows for each of so many cards, computed on one."""
        return Hyperparams(
            batch_size=rows * cards, micro_batch_size=rows, max_length=self.tokens, schedule="constant",
            max_steps=WARMUP + self.asked.steps, warmup_ratio=0.0, validations=0, max_new_tokens=1,
            precision="bf16" if self.cuda else "fp32", **{"kernels": "compiled", **more},
        )  # fmt: skip

    def measure(self) -> None:
        began = time.monotonic()
        for method in self.asked.methods:
            if "speed" in self.asked.parts:
                for n in self.counts:
                    row = self.run("speed", method, n, self.hp(n, self.per_card, devices=n))
                    if "seconds" in row:
                        alone = next((r for r in self.of("speed", method) if r["cards"] == 1), {}).get(
                            "seconds"
                        )
                        row["efficiency"] = alone / row["seconds"] if alone else None
                    self.tell(row)
            if "same" in self.asked.parts:
                self.same(method)
        if "sharding" in self.asked.parts and self.counts[-1] > 1:
            self.sharding()
        print(f"{time.monotonic() - began:.0f} s in all")

    def of(self, part: str, method: str) -> list[dict]:
        return [row for row in self.rows if (row["part"], row["method"]) == (part, method)]

    def same(self, method: str) -> None:
        """The training of all cards, which `speed` has run if it was asked for, once more on one."""
        cards = self.counts[-1]
        found = [row for row in self.of("speed", method) if row["cards"] == cards]
        several = (
            found[0]
            if found
            else self.run("same", method, cards, self.hp(cards, self.per_card, devices=cards))
        )
        one = self.run("same", method, 1, self.hp(cards, self.per_card))
        if "losses" in one and "losses" in several:
            apart = [abs(a - b) for a, b in zip(one["losses"], several["losses"], strict=True)]
            one["apart"], one["cards"] = max(apart), f"1 beside {cards}"
        self.tell(one)

    def sharding(self) -> None:
        cards, rows = self.counts[-1], max(1, self.per_card // 4)
        one = self.hp(1, rows, kernels="eager", gradient_checkpointing=True)
        parts = self.hp(
            cards, rows, kernels="eager", gradient_checkpointing=True, devices=cards, sharding="full"
        )
        free = [self.run("sharding", "full", n, hp) for n, hp in ((1, one), (cards, parts))]
        for row in free:
            self.tell(row)
        peaks = [row.get("reserved") for row in free]
        if None in peaks:
            return print("no allocator, no limit of memory: sharding was computed, not put to the test")
        limit = sum(peaks) / 2
        for n, hp in ((1, one), (cards, parts)):
            self.tell(self.run(f"at most {limit / 2**30:.1f} GiB", "full", n, hp, limit))

    def run(self, part: str, method: str, cards: int, hp: Hyperparams, limit: float = 0.0) -> dict:
        rate = {"full": 1e-5}.get(method, 1e-4)
        spec = replace(self.blank, method=method, hp=replace(hp, learning_rate=rate))
        here = self.folder / f"{len(self.rows)}-{time.monotonic_ns()}"
        here.mkdir()
        job = {"spec": asdict(spec), "limit": limit, "result": str(here / "result.json"), "folder": str(here)}
        (here / "job.json").write_text(json.dumps(job))
        environment = os.environ | {
            "TUNEOFF_CACHE": f"{self.folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{self.folder}/inductor",
            "TRITON_CACHE_DIR": f"{self.folder}/triton", "TOKENIZERS_PARALLELISM": "false",
            "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }  # fmt: skip
        command, log = [sys.executable, __file__, "--job", str(here / "job.json")], here / "log"
        began = time.monotonic()
        with log.open("wb") as output:
            try:
                subprocess.run(command, stdout=output, stderr=output, env=environment, timeout=LIMIT_SECONDS)
                found = json.loads((here / "result.json").read_text("utf-8"))
            except subprocess.TimeoutExpired:
                found = {"error": f"not done within {LIMIT_SECONDS} s"}
            except (OSError, ValueError):
                last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
                found = {"error": f"it died: {' '.join(last)}"}
        row = {"part": part, "method": method, "cards": cards, "rows": hp.batch_size, **found}
        row["spent"] = time.monotonic() - began
        self.rows.append(row)
        return row

    def tell(self, row: dict) -> None:
        def shown(name: str, form: str, factor: float = 1.0) -> str:
            return format(row[name] * factor, form) if row.get(name) is not None else "–"

        if len([r for r in self.rows if r.get("told")]) == 0:
            heads = (
                "part",
                "method",
                "cards",
                "rows",
                "step ms",
                "tokens/s",
                "efficiency",
                "peak GiB",
                "apart",
            )
            print("{:18} {:6} {:>11} {:>5} {:>8} {:>9} {:>10} {:>9} {:>8}  how".format(*heads))
        row["told"] = True
        print(
            f"{row['part']:18} {row['method']:6} {row['cards']!s:>11} {row['rows']:>5} "
            f"{shown('seconds', '.1f', 1000):>8} {shown('tokens_per_second', ',.0f'):>9} "
            f"{shown('efficiency', '.1%'):>10} {shown('allocated', '.1f', 2**-30):>9} "
            f"{shown('apart', '.1e'):>8}  {row.get('error') or row['how']} ({row['spent']:.0f} s)",
            flush=True,
        )
        if self.asked.json:
            kept = {"card": self.card(), "asked": {**vars(self.asked), "json": None, "job": None}}
            save(self.asked.json, json.dumps(kept | {"rows": self.rows}, indent=1))


# One training, in a process of its own


def train(path: Path) -> None:
    job = json.loads(path.read_text("utf-8"))
    spec = RunSpec.from_json(job["spec"])
    record = RunRecord(spec, "failed")
    method, ranks = chosen_method(spec, record), Ranks()

    def leave(found: dict) -> None:
        Path(job["result"]).write_text(json.dumps(found), "utf-8")
        os._exit(0)

    def compute(place: Place) -> None:
        import torch

        from harness.training import execute

        if job["limit"]:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(job["limit"] / total, 0)
        execute(spec, method, record, Path(job["folder"]), 0.0, place)

    def stuck(ending) -> None:
        leave({"error": f"{ending[0]}: {ending[1]}"})

    try:
        compute(ranks.begin(spec.devices, lambda place: ending_of(compute, place), stuck))
    except BaseException as error:
        status, what = ranks.first_to_fail() or diagnose(error)
        leave({"error": f"{status}: {what[:200]}"})
    seconds = statistics.median(record.step_seconds[WARMUP:])
    kernels, steps = record.kernels, len(record.step_seconds)
    leave({
        "seconds": seconds, "all_seconds": record.step_seconds,
        "losses": [s["loss"] for s in record.training],
        "norms": [s["grad_norm"] for s in record.training],
        "tokens_per_second": record.tokens.trained / steps / seconds,
        "allocated": record.peak("peak_allocated"), "reserved": record.peak("peak_reserved"),
        "ranks": [{name: asdict(phase) for name, phase in phases.items()} for phases in record.ranks],
        "how": kernels.rung or "eager", "reason": kernels.reason, "warnings": record.warnings,
    })  # fmt: skip


if __name__ == "__main__":
    main()
