"""What a report costs at scale: python benchmarks/report.py

Fabricates a store and prints seconds, those of them on a core (beside others a process waits), and peak
memory of some things, each a process of its own, from its start to its end:

    metrics    BLEU-4, ROUGE-L and the reward of the rows of one run, as its child computes them
    store      reading and checking all runs, as every command does that looks for what is there
    verdicts   the same, and what can be concluded from them
    markdown   the command, from the shell's prompt to report.md
    report     the same to report.md and report.html
    formats    the same to all formats that there are

The stores (--store), each with two untouched models and 3 seeds:

    usual    12 methods in one comparison, 6,000 test rows: the brief's
    sweep    one comparison of 333 techniques, 200 rows, as all those below: 1,001 runs
    tracks   70 methods in one comparison, with the shared hyperparameters and at their own best of 8 trials:
             982 runs
    many     30 comparisons of 11 methods: 992 runs

Texts are words of the README, as many as chat answers have; a word of an answer comes out right with a
chance that depends on method, row and seed.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METHODS = ("full", "lora", "qlora", "dora", "galore", "loftq", "reft", "smt", "lora_ggpo", "lisa", "pissa",
           "rslora")  # fmt: skip
BASES = ("base", "base_nf4")
SEEDS = 3
TYPICAL, LONGEST, CUT = 80, 400, 190  # words of a reference, and of an answer of 256 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", choices=STORES, default="usual")
    parser.add_argument("--rows", type=int, help="of the test set")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return measure(*options.stage)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        rows, made = STORES[options.store]
        rows = options.rows or rows
        fabricated(results, rows, made())
        size = sum(file.stat().st_size for file in results.rglob("*.jsonl")) / 2**20
        runs = len(list(results.glob("*/record.json")))
        print(f"{runs} runs of {rows:,} rows, {size:,.0f} MiB of outputs\n")
        print("| what | seconds | on a core | peak GiB |\n|---|---:|---:|---:|", flush=True)
        for stage in options.stages:
            command = [sys.executable, __file__, "--stage", stage, folder]
            started = time.perf_counter()
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            took = time.perf_counter() - started
            busy, peak = map(float, said.split()[-2:])
            print(f"| {stage} | {took:.1f} | {busy:.1f} | {peak:.2f} |", flush=True)


def measure(stage: str, folder: str) -> None:
    """One stage in this process; its last words are seconds on a core, those of its copies among them, and
    the most GiB of resident memory of any of them."""
    STAGES[stage](Path(folder))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    copies = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = time.process_time() + copies.ru_utime + copies.ru_stime
    print(busy, max(int(peak[1]), copies.ru_maxrss) / 2**20)


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


def fabricated(folder: Path, rows: int, runs: list) -> None:
    """Writes the records with their outputs; of a technique the skill is the same with each seed."""
    from fabricate import keep

    words = re.findall(r"[A-Za-z]{2,}", (ROOT / "README.md").read_text("utf-8"))
    vocabulary = np.array(list(dict.fromkeys(words)))
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(TYPICAL), 0.8, rows).astype(int).clip(5, LONGEST)
    references = [rng.integers(len(vocabulary), size=length) for length in lengths]
    ease = rng.normal(0, 0.1, rows)
    skills: dict[str, float] = {}
    for run in runs:
        spec = run.spec
        of = json.dumps([spec.method, spec.options, spec.changes])
        skill = skills.setdefault(of, rng.uniform(0.4, 0.7)) + ease + rng.normal(0, 0.01)
        tests = not run.judged_by_loss
        keep(folder, run, list(outputs(references, skill.clip(0.05, 0.95), vocabulary, rng)) if tests else [])


def usual() -> list:
    from fabricate import record

    return [*untouched(), *(record(method, seed) for method in METHODS for seed in range(SEEDS))]


def sweep() -> list:
    from fabricate import record

    ranks = range(1, 334)
    return [*untouched(), *(record("lora", s, options={"rank": r}) for r in ranks for s in range(SEEDS))]


def tracks() -> list:
    """Of each method the trials, and three seeds of the arm that they choose."""
    from fabricate import record

    from harness.tuning import Tuning, tuned

    found = untouched()
    for i in range(70):
        method, best = f"method_{i:02}", 10 ** (-5 + i % 5 / 2)
        trials: list = []

        def trial(spec, kept=trials, best=best):
            run = record(spec.method, seed=0)
            rate = spec.own_hp.learning_rate
            run.spec, run.card["learning_rates"], run.card["tunes"] = spec, [1e-4, 1e-3], ["rank", [8, 32]]
            run.validation = [{"step": 60, "loss": 2 + np.log10(rate / best) ** 2}]
            kept.append(run)
            return run

        asked = replace(record(method).spec, seed=10**6, search={"rank": 8})
        search, _ = Tuning(asked, (1e-4, 1e-3), ("rank", (8, 32))).walk(trial, 8)
        for arm in {asked.digest: asked, search.spec.digest: search.spec}.values():
            for seed in range(SEEDS):
                run = record(method, seed)
                run.spec = tuned(arm, seed, 8)
                found.append(run)
        found += trials
    return found


def many() -> list:
    from fabricate import record

    from harness.spec import Hyperparams

    asked = [(Hyperparams(learning_rate=1e-5 * n), method) for n in range(1, 31) for method in METHODS[:11]]
    return [*untouched(), *(record(m, seed, hp=hp) for hp, m in asked for seed in range(SEEDS))]


def untouched() -> list:
    from fabricate import record

    return [record(method) for method in BASES]


STORES = {"usual": (6000, usual), "sweep": (200, sweep), "tracks": (200, tracks), "many": (200, many)}


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
