"""Is a training that was killed and continued the training that was not? What does a checkpoint cost?

    python benchmarks/checkpoints.py                   Gemma-3-1b's shape on a GPU, a tiny one on a CPU
    python benchmarks/checkpoints.py --methods lora full --model FOLDER --json checkpoints.json

Each method trains four times, each time in a process of its own: undisturbed; so again; killed (SIGKILL) at
a step that the seed draws, one to three after its checkpoint; continued from there. How far the others are
from the first: losses, in nats a token, at the step where they are farthest; weights in the end, as a share
of the way that they were moved. Done again that is 0 on a CPU; on a GPU, whose atomic sums come in any
order, it is the noise floor, and the continued one may be three times as far.

Then the continued one writes another checkpoint, and trains on until that is on the disk. Steps wait for it
(blocked), and are slower beside its writing; both together, over what so many steps take otherwise, is the
stall: 2 % of the five minutes between two is what it may take. Weights are random without a folder.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts no threads, which copies of this process would lack

from train import BUILT_IN, fixed_rows, without_tokenizer

from harness import machine
from harness.bench.attempt import CHECKPOINT_SECONDS
from harness.child import chosen_method, diagnose
from harness.errors import Problems
from harness.forks import die_with, in_a_copy
from harness.method import find, known_methods, resolve
from harness.nursery import ENVIRONMENT, card_is_asked_in_a_copy
from harness.plan import find_dataset
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.store import save

METHODS = ("lora", "qlora", "full_8bit", "galore")
OPTIONS = {
    name: {"gap": 10} for name in ("galore", "galore_layerwise")
}  # steps between two of its bases: some before the kill, some after
LOST = 3  # steps that are made twice, at most
USUAL = 6  # steps before the last that is compared: what one takes beside no checkpoint
LEAST_STEPS = LOST + USUAL + 2
FLOORS = 3  # times as far apart as two undisturbed ones
SHARE = 0.02  # of the time between two checkpoints
LIMIT_SECONDS = 90  # of a training
LEAST_SECONDS = 5  # that one takes, at least: none begins with less
COLUMNS = "{:10} {:>6} {:>4} {:>9} {:>9} {:>9} {:>9} {:8} {:>6} {:>9} {:>8} {:>7}  {}"
HEADS = ("method", "killed", "from", "losses", "again", "weights", "again", "", "GiB", "blocked s", "stall s",
         "share", "how")  # fmt: skip


def main() -> None:
    told = in_a_copy(lambda: json.dumps([machine.cards(), machine.card_described()]).encode(), LIMIT_SECONDS)
    cards, card = json.loads(told)  # asked in a copy: trainings are copies of this process
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gemma-3-1b" if cards else "tiny", help="tiny, or a local folder")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--shape", default="8x512" if cards else "4x64", help="rows x tokens of a step")
    parser.add_argument("--steps", type=int, default=24, help=f"that are compared, {LEAST_STEPS} at least")
    parser.add_argument(
        "--beside", type=int, default=200 if cards else 20, help="further ones, at most, beside a checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which it is killed")
    parser.add_argument("--seconds", type=float, default=290, help="of the call; the rest is left out")
    parser.add_argument("--json", type=Path, help="what was measured, whole at any moment")
    asked = parser.parse_args()
    if asked.steps < LEAST_STEPS:
        parser.error(f"--steps {asked.steps}: {LEAST_STEPS} or more, of which some come after the kill")
    os.environ |= {**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("TUNEOFF_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = f"{folder}/{name}"
        with card_is_asked_in_a_copy():  # who has asked for it cannot be copied any more
            call = Call(asked, Path(folder), bool(cards), card[0] if card else "CPU")
            import harness.training  # noqa: F401
        print(
            f"{call.card}, {asked.shape}; imports: {call.spent():.0f} s\n{COLUMNS.format(*HEADS)}", flush=True
        )
        for name in asked.methods:
            call.measure(name)
        print(f"{call.spent():.0f} s in all")


class Call:
    def __init__(self, asked, folder: Path, cuda: bool, card: str):
        self.began, self.asked, self.folder, self.rows = time.monotonic(), asked, folder, []
        self.card = card
        rows, tokens = map(int, asked.shape.split("x"))
        hp = Hyperparams(
            batch_size=rows, micro_batch_size=rows, max_length=tokens, max_steps=asked.steps + asked.beside,
            schedule="constant", warmup_ratio=0.0, validations=0, max_new_tokens=1,
            precision="bf16" if cuda else "fp32",
        )  # fmt: skip
        drawn, model = asked.model in BUILT_IN, folder / "model"
        if drawn:
            model.mkdir()
            (model / "config.json").write_text(json.dumps(config := BUILT_IN[asked.model]))
        else:
            config = without_tokenizer(Path(asked.model), model)
        file = fixed_rows(model, hp, config["vocab_size"], "all")
        some = {"train": hp.max_steps * rows, "validation": 1, "test": 1, "near_duplicates": "off",
                "template": "instruction"}  # fmt: skip
        dataset = find_dataset(str(file), some, Problems())
        places = {"model": str(model), "sources": {dataset["parts"][0]["name"]: str(file)}}
        name = "random:bench" if drawn else "bench"
        self.blank = RunSpec("", 0, name, dataset, hp, locations=places, search={})

    def spent(self) -> float:
        return time.monotonic() - self.began

    def measure(self, name: str) -> None:
        """A method's row, on the screen and in the JSON."""
        row = {"method": name}
        try:
            row |= self.compared(name)
        except Broken as error:
            row["error"] = str(error)
        self.rows.append(row)
        print(COLUMNS.format(*cells(row)), flush=True)
        if self.asked.json:
            asked = vars(self.asked) | {"json": None}
            save(
                self.asked.json, json.dumps({"card": self.card, "asked": asked, "rows": self.rows}, indent=1)
            )

    def compared(self, name: str) -> dict:
        """Raises Broken."""
        cls, steps = resolve(name, find(name, known_methods())), self.asked.steps
        hp = replace(self.blank.hp, learning_rate=cls.learning_rates[1])
        spec = replace(self.blank, method=name, hp=hp, options=OPTIONS.get(name, {}))
        draw, own = random.Random(f"{self.asked.seed} {name}"), self.folder / name
        killed = draw.randint(LOST + 1, steps - USUAL - 1)
        job = Job(spec, own, os.getpid(), steps, own / "first.safetensors")
        own.mkdir()
        try:
            first = self.trained(job)
            again = self.trained(job)
            job = replace(job, written=killed - draw.randint(1, LOST), killed=killed)
            self.copy(job)  # which leaves nothing but its checkpoint
            last = self.trained(replace(job, written=steps, killed=0))
        finally:
            shutil.rmtree(own)
        if last["resumed"] != [job.written]:
            raise Broken(f"it did not go on from step {job.written}: {last['warnings']}")
        row = {"killed": killed, "from": job.written, **last["checkpoint"], "how": first["how"]}
        row |= {f"losses {what}": apart(first["losses"], one["losses"]) for what, one in both(again, last)}
        row |= {f"weights {what}": one["far"] for what, one in both(again, last)}
        same = all(
            row[f"{what} continued"] <= FLOORS * row[f"{what} again"] for what in ("losses", "weights")
        )
        share = row["stall"] / CHECKPOINT_SECONDS
        return row | {"same": same, "share": share, "curves": [one["losses"] for one in (first, again, last)]}

    def trained(self, job: "Job") -> dict:
        found = self.copy(job)
        if "error" in found:
            raise Broken(found["error"])
        return found

    def copy(self, job: "Job") -> dict:
        """What the training found, in a copy of this process."""
        left = self.asked.seconds - self.spent()
        if left < LEAST_SECONDS:
            raise Broken(f"left out: {self.asked.seconds:.0f} s are over")
        told = in_a_copy(lambda: json.dumps(training(job)).encode(), min(left, LIMIT_SECONDS))
        return json.loads(told) if told else {"error": "it was killed, or took too long"}


class Broken(Exception):
    """A method has no row."""


def both(again: dict, last: dict):
    return ("again", again), ("continued", last)


def apart(losses: list[float], others: list[float]) -> float:
    """Nats a token, of the step that is most so. Raises Broken where they are not of as many steps."""
    if len(losses) != len(others):
        raise Broken(f"one training has {len(losses)} losses, another {len(others)}")
    gaps = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.nan


def cells(row: dict) -> list[str]:
    def shown(name: str, form: str) -> str:
        return format(row[name], form) if name in row else "–"

    apart = [
        shown(f"{what} {which}", ".1e") for what in ("losses", "weights") for which in ("continued", "again")
    ]
    how = [row.get("error") or row["how"]]
    how += [f"stall above {SHARE:.0%}"] * (row.get("share", 0) > SHARE)
    how += ["not yet on the disk at the last step"] * (not row.get("whole", True))
    verdict = {True: "the same", False: "OTHER", None: ""}[row.get("same")]
    cost = [shown("gib", ".2f"), shown("blocked", ".2f"), shown("stall", ".2f"), shown("share", ".1%")]
    return [row["method"], shown("killed", "d"), shown("from", "d"), *apart, verdict, *cost, " · ".join(how)]


# In the copy


@dataclass(frozen=True)
class Job:
    """A training of so many `steps` that are compared, in its `folder`, with a checkpoint after the step
    `written`, and `killed` after another; 0: never. The first leaves its weights in the file `first`."""

    spec: RunSpec
    folder: Path
    parent: int
    steps: int
    first: Path
    written: int = 0
    killed: int = 0


class Enough(Exception):
    """What was asked for is known."""


def training(job: Job) -> dict:
    die_with(job.parent)
    try:
        from harness.training import stages

        record = RunRecord(job.spec, "failed")
        method = chosen_method(job.spec, record)
        model, run = stages.opened(job.spec, method, record, job.folder)
        run.checkpoints = watched = watching(job, run)
        with suppress(Enough):
            stages.trained(model, run)
        return watched.found
    except BaseException as error:  # whatever ends it stands in its row
        traceback.print_exc()
        return {"error": diagnose(error)[1]}


def watching(job: Job, run):
    """The training's checkpoints: at the steps that the job names, and not after so many minutes."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from harness.training.checkpoint import Checkpoints, trained

    class Watched(Checkpoints):
        found: dict = {}
        begun = 0.0  # when the checkpoint was that is watched
        times: dict[int, float] = {}  # of each step, when it was queued and the one before had ended

        def newest(self, model):
            own = [p for p in model.parameters() if p.requires_grad]
            self.start = {name: p.detach().clone() for name, p in trained(model, own)}
            return super().newest(model)

        def due(self, step: int) -> bool:
            self.times[step] = time.perf_counter()
            over = not (self.writer and self.writer.is_alive())
            if self.begun and (over or step == run.steps):
                self.judge(step, over)
            return step in (job.written, job.killed, job.steps)

        def write(self, loop, steps: dict) -> None:
            if loop.done == job.killed:
                self.settle()  # minutes have passed
                os.kill(os.getpid(), signal.SIGKILL)
            if loop.done == job.steps:
                self.compare(loop)
            if loop.done != job.written:
                raise Enough
            self.begun = time.perf_counter() if loop.done == job.steps else 0.0
            super().write(loop, steps)
            self.blocked = time.perf_counter() - self.begun

        def compare(self, loop) -> None:
            """Leaves the weights, or tells how far they are from those that the first has left."""
            record, weights = (
                run.record,
                {name: p.detach() for name, p in trained(loop.model, loop.parameters)},
            )
            kernels = record.kernels.rung or "eager"
            self.found |= {"losses": [step["loss"] for step in record.training], "how": kernels, "far": 0.0}
            self.found |= {"resumed": [one.step for one in record.resumed], "warnings": record.warnings}
            if not job.first.exists():
                return save_file({name: w.contiguous() for name, w in weights.items()}, job.first)
            with safe_open(job.first, "pt", device=str(run.device)) as first:
                far = length(weights[name] - first.get_tensor(name) for name in weights)
            self.found["far"] = far / length(w - self.start[name] for name, w in weights.items())
            self.start.clear()

        def judge(self, step: int, over: bool) -> None:
            """After the last step beside the writing."""
            end, times = job.steps, self.times
            usual = statistics.median(times[n] - times[n - 1] for n in range(end - USUAL + 1, end + 1))
            stall = times[step] - self.begun - (step - end) * usual
            size = sum(file.stat().st_size for file in (self.folder / f"{end:09}").glob("*"))
            self.found["checkpoint"] = {
                "blocked": self.blocked, "stall": stall, "whole": over, "gib": size / 2**30,
                "usual": usual, "beside": step - end,
            }  # fmt: skip
            raise Enough

    def length(differences) -> float:
        return math.sqrt(
            sum(torch.linalg.vector_norm(one, dtype=torch.float64).item() ** 2 for one in differences)
        )

    return Watched(job.folder / "checkpoints", run, CHECKPOINT_SECONDS)


if __name__ == "__main__":
    main()
