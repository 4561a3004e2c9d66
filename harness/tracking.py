"""Trackers (TensorBoard, Weights & Biases, MLflow and others) are told of each run, by accelerate's own.

From its record, when it has ended: its steps wait for nobody, and nothing of a tracker is in the process that
is measured. In a process of their own, `python -m harness.tracking RESULTS RUN FOLDER TRACKER ...`: one that
asks, hangs or fails costs no run.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path

from harness import ROOT, packages
from harness.errors import Problem
from harness.record import RunRecord
from harness.store import Store

PROJECT = "tuneoff"
SECONDS = 120  # for all that is still being told after the last run: a server may be far away
PEAKS = ("peak_allocated", "peak_reserved", "peak_device", "peak_host")


def missing(names: Iterable[str]) -> Iterator[Problem]:
    """Of trackers, by accelerate's names, which are pip's."""
    for name in names:
        if not packages.found(name):
            yield Problem("it is not installed", f"--track-with {name}", remedy=f"pip install {name}")


class Tracking:
    """Tells the trackers of runs while others go on. `results`: where these are; `folder`: for what trackers
    keep on this machine."""

    def __init__(self, names: list[str], results: Path, folder: Path):
        self.names, self.results, self.folder = list(dict.fromkeys(names)), results, folder
        self.telling: dict[str, subprocess.Popen] = {}
        self.notes: list[str] = []

    def tell(self, run: str) -> None:
        if self.names:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            places = [str(place.absolute()) for place in (self.results, self.folder)]
            command = [sys.executable, "-P", "-m", "harness.tracking", places[0], run, places[1], *self.names]
            try:
                self.telling[run] = subprocess.Popen(
                    command, env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
            except OSError as error:  # no process is to be had
                self.notes.append(f"{run} is not tracked: {error}")

    def close(self) -> list[str]:
        """Waits until they have been told. -> a line for each that could not be."""
        end = time.monotonic() + SECONDS
        for run, process in self.telling.items():
            try:
                said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
                lines = said.splitlines() or [f"exit status {process.returncode}"] * bool(process.returncode)
            except subprocess.TimeoutExpired:
                lines = [f"no end within {SECONDS} s"]
            finally:
                process.kill()
            self.notes += [f"{run} is not tracked whole: {line}" for line in lines]
        return self.notes


# In a process of its own


def main(results: Path, run: str, folder: Path, names: list[str]) -> None:
    """Prints a line for each tracker that fails, and nothing else."""
    notes = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)  # what trackers print
    record = Store(results).read(run)
    for name in names:
        try:
            log(name, record, folder)
        except (Exception, SystemExit) as error:  # whatever a tracker raises
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=notes)
    notes.flush()


def log(name: str, record: RunRecord, folder: Path) -> None:
    from accelerate import Accelerator

    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    os.chdir(own)  # where some of them leave what they keep
    # A folder or a run of its own for each run, as the tracker has it.
    named = {"tensorboard", "aim"}
    keywords = {
        "wandb": {"name": record.folder, "group": record.spec.comparison, "dir": str(own)},
        "mlflow": {"run_name": record.folder},
        "trackio": {"name": record.folder},
        "swanlab": {"experiment_name": record.folder},
        "clearml": {"task_name": record.folder},
        "dvclive": {"dir": str(own / record.folder)},
    }
    accelerator = Accelerator(cpu=True, log_with=name, project_dir=own)
    accelerator.init_trackers(
        record.folder if name in named else PROJECT, config(record), {name: keywords.get(name, {})}
    )
    for step, values in points(record).items():
        accelerator.log(values, step=step)
    accelerator.end_training()


def config(record: RunRecord) -> dict[str, str | int | float | bool]:
    """What the run was asked: texts, numbers and booleans alone, as trackers take no others."""
    spec = record.spec
    asked = {
        "method": spec.method, "seed": spec.seed, "model": spec.model, "status": record.status,
        "dataset": spec.dataset.get("name"), "comparison": spec.comparison, **asdict(spec.own_hp),
        **{f"{spec.method}.{name}": value for name, value in spec.options.items()},
    }  # fmt: skip
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in asked.items()
        if value is not None
    }


def points(record: RunRecord) -> dict[int, dict[str, float]]:
    """Step -> what was measured at it, in the order of steps; at the last one also what the whole run cost,
    phase by phase, and its scores. Bytes, seconds, joules; what is not known is left out."""
    found: dict[int, dict[str, float | None]] = {}

    def add(step: int, kind: str, values: dict) -> None:
        found.setdefault(step, {}).update({f"{kind}/{name}": value for name, value in values.items()})

    for point, seconds in zip(record.training, chain(record.step_seconds, repeat(None)), strict=False):
        values = {**point, "seconds": seconds}
        add(int(point["step"]), "train", {name: value for name, value in values.items() if name != "step"})
    for point in record.validation:
        add(int(point["step"]), "validation", {"loss": point.get("loss")})
    last = max(found, default=0)
    for name, phase in record.phases.items():
        gauges = {gauge: getattr(phase, gauge) for gauge in PEAKS}
        add(last, f"phase/{name}", {"seconds": phase.seconds, "joules": phase.joules, **gauges})
    add(last, "score", record.scores)
    return {
        step: {name: float(value) for name, value in found[step].items() if value is not None}
        for step in sorted(found)
    }


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the bench is gone
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
