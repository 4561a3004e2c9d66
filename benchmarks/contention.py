"""Whether a bench notices that it is disturbed: with a busy process started in its middle, and without.

    python benchmarks/contention.py

Every run of a disturbed bench that was training beside the busy processes should be marked, and no run of an
undisturbed one. Nothing else may run on the machine meanwhile. Both kinds take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from threads import CORES, ROOT, busy

# For half of a training: a twentieth of the cores' time is noticed. A run that keeps to one of two cores
# leaves the other to a single neighbour.
NEIGHBOURS = max(2, CORES // 4)
POLL_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="of a bench with and one without")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    options = parser.parse_args()
    marked = {0: 0, NEIGHBOURS: 0}
    for number in range(options.rounds):
        for neighbours in marked:
            reasons = disturbed(neighbours, options.steps)
            marked[neighbours] += bool(reasons)
            print(f"{number + 1}, {neighbours} busy processes: {reasons}", file=sys.stderr, flush=True)
    print(
        f"{CORES} cores, {options.steps} steps\n\n| busy processes from the middle on | marked |\n|---|---|"
    )
    for neighbours, count in marked.items():
        print(f"| {neighbours} | {count} of {options.rounds} |")


def disturbed(neighbours: int, steps: int) -> list[str]:
    """What the record of a training says of a bench beside whose second half so many others were busy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "run_bench.py"), "--methods", "lora", "--seeds", "0"),
            *("--results", folder, "--reports", folder),
            *("--set", f"hp.max_steps={steps}", "hp.validations=0", "hp.max_new_tokens=1"),
        ]
        bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
        wait_for_step(Path(folder), steps // 2, bench)
        with busy(neighbours):
            bench.wait()
        (record,) = Path(folder).glob("lora-*/record.json")
        return json.loads(record.read_text("utf-8"))["disturbed"]


def wait_for_step(folder: Path, step: int, bench: subprocess.Popen) -> None:
    while bench.poll() is None:
        for events in folder.glob(".lora-*/events.jsonl"):
            if f'"step": {step},' in events.read_text("utf-8"):
                return
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
