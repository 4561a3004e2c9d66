"""What a report costs at scale: python benchmarks/report.py

Fabricates the results of 12 methods with 3 seeds and two untouched models, 6,000 test rows each, and prints
seconds, those of them on a core (beside others a process waits), and peak memory of some things, each a
process of its own, from its start to its end:

    metrics    BLEU-4, ROUGE-L and the reward of the rows of one run, as its child computes them
    store      reading and checking all runs, as every command does that looks for what is there
    verdicts   the same, and what can be concluded from them
    markdown   the command, from the shell's prompt to report.md
    report     the same to report.md and report.html
    formats    the same to all formats that there are

Texts are words of the README, as many as chat answers have; a word of an answer comes out right with a
chance that depends on method, row and seed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METHODS = ("full", "lora", "qlora", "dora", "galore", "loftq", "reft", "smt", "lora_ggpo", "lisa", "pissa",
           "rslora")  # fmt: skip
BASES = ("base", "base_nf4")
TYPICAL, LONGEST, CUT = 80, 400, 190  # words of a reference, and of an answer of 256 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--methods", type=int, default=len(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return measure(*options.stage)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        fabricated(results, options.rows, METHODS[: options.methods], options.seeds)
        size = sum(file.stat().st_size for file in results.rglob("*.jsonl")) / 2**20
        runs = len(list(results.glob("*/record.json")))
        print(f"{runs} runs of {options.rows:,} rows, {size:,.0f} MiB of outputs\n")
        print("| what | seconds | on a core | peak GiB |\n|---|---:|---:|---:|", flush=True)
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, folder]
            started = time.perf_counter()
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            took = time.perf_counter() - started
            busy, peak = map(float, said.split()[-2:])
            print(f"| {stage} | {took:.1f} | {busy:.1f} | {peak:.2f} |", flush=True)


def measure(stage: str, folder: str) -> None:
    """One stage in this process; its last words are seconds on a core and the most GiB of resident memory."""
    STAGES[stage](Path(folder))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    print(time.process_time(), int(peak[1]) / 2**20)


def metrics(folder: Path) -> None:
    from harness.metrics import kept_sums

    run = next((folder / "results").glob("lora-s0-*"))
    for line in (run / "outputs.jsonl").read_text("utf-8").splitlines():
        kept_sums(json.loads(line), {})


def store(folder: Path) -> None:
    from harness.store import Store

    records, corrupt = Store(folder / "results").load()
    if corrupt or not records:
        sys.exit(f"no whole store: {corrupt[:1]}")


def verdicts(folder: Path) -> None:
    from harness.report.comparison import comparisons, read_outputs
    from harness.report.verdicts import Verdicts
    from harness.store import Store

    results = Store(folder / "results")
    for comparison in comparisons(results.load()[0]):
        read_outputs(comparison, results)
        Verdicts(comparison)


def report(folder: Path, formats: tuple[str, ...] = ("md", "html")) -> None:
    from harness.cli import main as command

    where = ["--results", str(folder / "results"), "--reports", str(folder / "reports")]
    if command(["report", *where, "--format", *formats]):
        sys.exit("no report")


def markdown(folder: Path) -> None:
    report(folder, ("md",))


def formats(folder: Path) -> None:
    from harness.cli.arguments import FORMATS

    report(folder, FORMATS)


STAGES = {"metrics": metrics, "store": store, "verdicts": verdicts, "markdown": markdown, "report": report,
          "formats": formats}  # fmt: skip


def fabricated(folder: Path, rows: int, methods: tuple[str, ...], seeds: int) -> None:
    from fabricate import keep, record

    words = re.findall(r"[A-Za-z]{2,}", (ROOT / "README.md").read_text("utf-8"))
    vocabulary = np.array(list(dict.fromkeys(words)))
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(TYPICAL), 0.8, rows).astype(int).clip(5, LONGEST)
    references = [rng.integers(len(vocabulary), size=length) for length in lengths]
    ease = rng.normal(0, 0.1, rows)
    for number, method in enumerate((*BASES, *methods)):
        for seed in range(seeds if method in methods else 1):
            skill = 0.4 + 0.02 * number + ease + rng.normal(0, 0.01)
            made = outputs(references, skill.clip(0.05, 0.95), vocabulary, rng)
            keep(folder, record(method, seed), list(made))


def outputs(references: list, skill: np.ndarray, vocabulary: np.ndarray, rng) -> Iterator[dict]:
    """The lines of a run. Its sums are of words in their places: what else matches by chance is little."""
    for i, (reference, chance) in enumerate(zip(references, skill, strict=True)):
        right = rng.random(len(reference)) < chance
        answer = np.where(right, reference, rng.integers(len(vocabulary), size=len(reference)))[:CUT]
        grams, matches = right[:CUT], []
        for n in range(1, 5):
            matches.append(int(grams.sum()))
            grams = grams[:-1] & right[n:CUT]
        words, f1 = len(answer), 2 * matches[0] / (len(answer) + len(reference))
        totals = [max(words - n, 0) for n in range(4)]
        tokens = len(reference) * 4 // 3
        part = ("alpaca", "tulu", "ultrachat")[i % 3]
        yield {
            "id": f"{part}:{i:012x}", "part": part,
            "prompt": f"<bos><start_of_turn>user\nWrite about {' '.join(vocabulary[reference[:20]])}."
                      "<end_of_turn>\n<start_of_turn>model\n",
            "reference": " ".join(vocabulary[reference]), "output": " ".join(vocabulary[answer]),
            "new_tokens": words * 4 // 3, "stopped": len(reference) <= CUT, "tokens": tokens,
            "nll": tokens * (2.2 - float(chance)), "correct": int(tokens * chance),
            "margin": float(chance) - 0.5,
            "sums": {"bleu4": [words, len(reference), *matches, *totals], "rouge_l": [f1, 1],
                     "reward": [f1, 1]},
        }  # fmt: skip


if __name__ == "__main__":
    main()
