"""Whether anything is lost: a bench of small runs while its processes are killed, its disk fills and its
files are cut, at moments that a seed draws, and the same command is given again and again.

    python benchmarks/soak.py                 # 40 runs, up to 40 blows; takes ten minutes on two cores

Then every run has to be ok or honestly marked, no process, lock or half-written file may be left, and the
report has to be that of an undisturbed bench to the digit, but for times, and the order of its rows, which is
that in which runs began. As root the disk is a small tmpfs that is filled; else it is not.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.forks import children  # noqa: E402

METHODS = ("lora", "galore", "qlora", "reft")
SETTINGS = ("data.train=48", "data.validation=4", "data.test=6", "hp.max_new_tokens=8", "hp.validations=2",
            "hp.batch_size=4", "hp.micro_batch_size=4")  # fmt: skip
DISK = "400m"
TIMES = {"seconds", "step_seconds", "tokens_per_second"}  # of a row of report.csv
SAME = ("training", "validation", "tokens", "memory", "sizes", "start", "status")  # of a record
HASHES = ("batches", "given", "learned", "outputs", "train", "test")
PAUSE = (1.0, 10.0)  # seconds between two blows: a start takes some, a run as well
LAST = 6  # times that the command is given when all blows have fallen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments and what happens at them")
    parser.add_argument("--runs", type=int, default=40, help="of the bench, beside the untouched models")
    parser.add_argument("--blows", type=int, default=40, help="kills, signals, cuts and full disks together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        calm, rough = Path(temporary, "calm"), Path(temporary, "rough")
        for folder in (calm, rough):
            folder.mkdir()
        command = bench(options.runs)
        started = time.monotonic()
        subprocess.run(command, cwd=calm, check=True, stdout=subprocess.DEVNULL)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        with small_disk(rough / "results") as fillable:
            soak = Soak(command, rough, random.Random(options.seed), fillable)
            soak.strike(options.blows)
            ended = soak.finish()
            print(f"disturbed: {time.monotonic() - started:.0f} s, {soak.starts} starts, {dict(soak.blows)}")
            faults = [*ended, *soak.left(), *differences(calm, rough)]
    print("\n".join(faults) or "nothing is lost, nothing is left, and the reports are equal")
    return bool(faults)


def bench(runs: int) -> list[str]:
    seeds = map(str, range(runs // len(METHODS)))
    return [sys.executable, str(ROOT / "run_bench.py"), "--methods", *METHODS, "--seeds", *seeds, "--set",
            *SETTINGS, "--checkpoints", "0.2s", "--format", "json", "csv"]  # fmt: skip


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Whether it is one: mounted, where that is permitted."""
    folder.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(asked, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class Soak:
    def __init__(self, command: list[str], folder: Path, draw: random.Random, fillable: bool):
        self.command, self.folder, self.draw = command, folder, draw
        self.results = folder / "results"
        self.blows, self.starts = Counter(), 0
        self.kinds = [self.kill_bench, self.kill_one, self.end_all, self.press, self.cut] + [
            self.fill
        ] * fillable
        self.seen: set[int] = set()  # benches of which no process may be left

    def start(self) -> subprocess.Popen:
        self.starts += 1
        log = (self.folder / "log").open("ab")
        process = subprocess.Popen(
            self.command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )
        self.seen.add(process.pid)
        return process

    def strike(self, count: int) -> None:
        process = self.start()
        while self.blows.total() < count:
            time.sleep(self.draw.uniform(*PAUSE))
            if (code := process.poll()) is not None:
                if code == 0:
                    return print("all runs are done: no more blows can fall")
                process = self.start()
                continue
            blow = self.draw.choice(self.kinds)
            self.blows[blow.__name__] += 1
            with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended, or was moved
                blow(process)
            print(f"{self.blows.total()} {blow.__name__}", flush=True)
        process.wait()

    def finish(self) -> list[str]:
        """The same command until all is done; what it said where that is never."""
        for _ in range(LAST):
            self.starts += 1
            done = subprocess.run(self.command, cwd=self.folder, capture_output=True, text=True)
            if done.returncode == 0:
                return []
        return [f"the command ends with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"]

    # Blows

    def kill_bench(self, process: subprocess.Popen) -> None:
        process.kill()
        process.wait()

    def kill_one(self, process: subprocess.Popen) -> None:
        if others := family(process.pid)[:-1]:
            os.kill(self.draw.choice(others), signal.SIGKILL)

    def end_all(self, process: subprocess.Popen) -> None:
        for one in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGTERM)

    def press(self, process: subprocess.Popen) -> None:
        for _ in range(self.draw.choice((1, 2))):
            process.send_signal(signal.SIGINT)
            time.sleep(self.draw.uniform(0, 1))

    def cut(self, process: subprocess.Popen) -> None:
        """A file to half its length, of those that a bench looks after."""
        kinds = ("record.json", "outputs.jsonl", "*.safetensors", "state.json", "complete.json",
                 "events.jsonl", "result.json", "spec.json")  # fmt: skip
        found = sorted(file for kind in kinds for file in self.results.rglob(kind))
        if found:
            file = self.draw.choice(found)
            os.truncate(file, file.stat().st_size // 2)

    def fill(self, process: subprocess.Popen) -> None:
        ballast = self.folder / "results" / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(2**20)):
                pass
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        time.sleep(self.draw.uniform(0.5, 4))
        ballast.unlink()

    # What may not be left

    def left(self) -> list[str]:
        time.sleep(1)
        found = [f"process {one} is left: {words}" for one, words in processes(self.seen)]
        hidden = [path for path in self.results.rglob(".*") if path.name != ".lock"]
        found += [f"{path.relative_to(self.folder)} is left" for path in hidden]
        found += [f"{path.relative_to(self.folder)} is left" for path in self.results.glob("*/checkpoints")]
        check = [sys.executable, str(ROOT / "run_bench.py"), "check", "results", "--json"]
        said = json.loads(subprocess.run(check, cwd=self.folder, capture_output=True, text=True).stdout)
        aside = [note for note in said["notes"] if "set aside" in note]
        print(f"{said['whole']} runs are whole, {len(aside)} that were cut are set aside")
        return found + said["wrong"] + [note for note in said["notes"] if note not in aside]


def family(process: int) -> list[int]:
    """A process and all that come from it, the youngest first."""
    return [one for child in children(process) for one in family(child)] + [process]


def processes(benches: set[int]) -> list[tuple[int, str]]:
    found, marks = [], {f"TUNEOFF_BENCH={one}".encode() for one in benches}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if marks & {*environ.read_bytes().split(b"\0")}:
                words = (environ.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((int(environ.parent.name), words))
    return found


def differences(calm: Path, rough: Path) -> list[str]:
    """Between the two reports, times apart, and between what the runs measured."""
    tables = [rows(folder / "reports" / "report.csv") for folder in (calm, rough)]
    found = [f"report.csv: {a} is now {b}" for a, b in zip(*tables, strict=False) if a != b]
    found += ["report.csv has another length"] * (len(tables[0]) != len(tables[1]))
    for path in sorted(calm.glob("results/*/record.json")):
        records = []
        for folder in (calm, rough):
            record = json.loads((folder / path.relative_to(calm)).read_text())
            records.append(
                {name: record[name] for name in SAME} | {n: record["hashes"].get(n) for n in HASHES}
            )
        found += [
            f"{path.parent.name}: another {name}"
            for name in records[0]
            if records[0][name] != records[1][name]
        ]
    return found


def rows(file: Path) -> list[dict]:
    with file.open(newline="") as opened:
        found = [row for row in csv.DictReader(opened) if row["quantity"] not in TIMES]
    found.sort(key=lambda row: (row["technique"], row["tuned"], row["quantity"]))
    return [{name: value for name, value in row.items() if name != "disturbed"} for row in found]


if __name__ == "__main__":
    sys.exit(main())
