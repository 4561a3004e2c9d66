"""How many threads a run should have: seconds of LoRA steps of the demo, alone and beside a busy process.

    python benchmarks/threads.py

Idle threads of OpenMP wait by spinning. On a machine that is wholly theirs this is the fastest way to
wait; beside another process they wait for a core that is not there. Settings take turns within a round, so
that a machine that drifts does not favour one.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
SETTINGS = {  # name -> what the user sets, which the bench leaves as it is
    "a thread a core": {"OMP_NUM_THREADS": str(CORES)},
    "spin 3000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "3000"},
    "spin 300": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "300"},
    "spin 0": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "0"},
    "passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
    "all but one core": {"OMP_NUM_THREADS": str(max(1, CORES - 1))},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of all settings; the median is shown")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    seconds = {(name, n): [] for name in options.settings for n in (0, 1)}
    for _ in range(options.rounds):
        for neighbours in (0, 1):
            for name in options.settings:
                with busy(neighbours):
                    took = training(SETTINGS[name], options.steps)
                seconds[name, neighbours].append(took)
                print(f"{name}, {neighbours} neighbours: {took:.2f} s", file=sys.stderr, flush=True)
    print(f"{CORES} cores; seconds of {options.steps} steps, median of {options.rounds}\n")
    print("| setting | alone | beside a neighbour |\n|---|---|---|")
    for name in options.settings:
        alone, beside = (statistics.median(seconds[name, n]) for n in (0, 1))
        print(f"| {name} | {alone:.1f} | {beside:.1f} |")


def training(environment: dict, steps: int) -> float:
    """Seconds of the optimizer steps, as the run's own record has them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "run_bench.py"), "--methods", "lora", "--seeds", "0"),
            *("--results", folder, "--reports", folder),
            *("--set", f"hp.max_steps={steps}", "hp.validations=0", "hp.max_new_tokens=1"),
        ]
        subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
        record = json.loads(next(Path(folder).glob("lora-*/record.json")).read_text("utf-8"))
    return sum(record["step_seconds"])


@contextmanager
def busy(processes: int):
    """So many processes that never rest."""
    started = [multiprocessing.Process(target=spin, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()
