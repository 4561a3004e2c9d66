"""A results folder without any training: records and test outputs as a run would leave them."""

import json
import random
from collections import Counter
from pathlib import Path

from harness.metrics import METRICS, scores, total
from harness.record import Data, Phase, Provenance, RunRecord, Sizes, Tokens
from harness.spec import Hyperparams, RunSpec, content_hash
from harness.store import OUTPUTS, RECORD

TEXT = "the a cat dog sat ran on under mat tree and then saw nothing but rain all day long"
WORDS = TEXT.split()
DATASET = {
    "name": "mixture",
    "title": "Alpaca + Tulu v2 + UltraChat",
    "notice": "",
    "parts": [
        {"name": n, "title": n.title(), "licence": "MIT", "format": "messages", "mapping": "as it is"}
        for n in ("alpaca", "tulu", "ultrachat")
    ],
    "train": 5000,
    "validation": 100,
    "test": 2000,
    "template": "chat",
}
METHODS = {  # name -> title, axis, skill, GiB, seconds, own base
    "base": ("Base", "none", 0.35, None, None, "base"),
    "base_nf4": ("Base, 4 bits", "none", 0.33, None, None, "base"),
    "qlora": ("QLoRA", "parameterisation", 0.52, 5.1, 3900, "base_nf4"),
    "galore": ("GaLore", "optimizer", 0.60, 9.3, 5400, "base"),
    "lora": ("LoRA", "parameterisation", 0.53, 6.4, 2800, "base"),
    "dora": ("DoRA", "parameterisation", 0.54, 6.6, 4100, "base"),
    "full": ("Full fine-tuning", "none", 0.60, 18.2, 5200, "base"),
    "reft": ("ReFT", "parameterisation", 0.45, 4.9, 2300, "base"),
}
GIB = 2**30


def record(method: str, seed: int = 0, model: str = "google/gemma-3-1b-it", **changes) -> RunRecord:
    """A finished run. `changes` replace the record's own fields, or `hp`, `options`, `dataset`."""
    title, axis, _, gib, seconds, own = METHODS.get(method, (method, "none", 0.5, 6.0, 3000, "base"))
    trains = gib is not None
    hp = changes.pop("hp", Hyperparams())
    options = changes.pop("options", {"rank": 8} if trains else {})
    dataset = changes.pop("dataset", DATASET)
    hp = hp if trains else hp.untrained()
    spec = RunSpec(method, seed, model, dataset, hp, options, repeat=changes.pop("repeat", 0))
    luck = random.Random(f"{method} {seed}")
    order = list(METHODS).index(method) if method in METHODS else 99
    found = RunRecord(spec, "ok", command="python run_bench.py --preset gemma", card={
        "name": method, "title": title, "axis": axis, "objective": "sft", "baseline": own,
        "paper": "Dettmers et al. 2023, arXiv:2305.14314", "formula": "y = W x + s B A x",
        "summary": "low-rank updates beside frozen weights",
        "why": {"performance": "It fits well.", "efficiency": "Few parameters.",
                "generalisation": "Little is forgotten."},
    })  # fmt: skip
    found.signatures = dict.fromkeys(METRICS, "") | {"bleu4": "nrefs:1|case:mixed|tok:13a"}
    found.started = f"2025-11-20T1{seed}:{order:02}:00+00:00"
    found.hashes = {"method_code": "c0de", "train": "7a", "validation": "7b", "test": "7c"}
    found.provenance = Provenance(
        device="NVIDIA H200", precision="bf16", attention="sdpa", driver="570.1", python="3.11.7",
        packages={"torch": "2.13.0", "transformers": "5.3.0"}, commit="0123456789ab", dirty=False,
    )  # fmt: skip
    found.sizes = Sizes(parameters=10**9, trainable=6_500_000 if trains else 0, weight_bytes=2 * GIB)
    found.phases = {name: Phase(12.0, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB, 900.0)
                    for name in ("load", "evaluate", "generate")}  # fmt: skip
    if trains:
        found.hashes["batches"] = [f"{seed}.{i}" for i in range(60)]
        found.sizes.optimizer_bytes, found.sizes.saved_bytes = GIB // 20, GIB // 40
        seconds *= luck.uniform(0.98, 1.02)
        peak = int(gib * GIB * luck.uniform(0.999, 1.001))
        found.phases |= {
            "attach": Phase(3.0, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB, 400.0),
            "train": Phase(seconds, peak, int(peak * 1.2), int(peak * 1.3), 5 * GIB, 400 * seconds),
            "validate": Phase(9.0, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB, 800.0),
            "save": Phase(0.4, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB, 20.0),
        }
        found.step_seconds = [seconds / 60 * luck.uniform(0.9, 1.1) for _ in range(60)]
        found.warmup_steps = 5
        found.tokens = Tokens(trained=6_000_000, padded=400_000, supervised=3_000_000)
        found.data = Data(template="chat")
        floor = 1.9 - METHODS[method][2] if method in METHODS else 1.5
        found.training = [{"step": i + 1, "loss": floor + 1.2 / (1 + i / 6) + luck.gauss(0, 0.06),
                           "learning_rate": 2e-4, "grad_norm": 1.0} for i in range(60)]  # fmt: skip
        found.validation = [{"step": i, "loss": floor + 0.05 + 1.2 / (1 + i / 6) + luck.gauss(0, 0.01)}
                            for i in (0, 6, 15, 30, 45, 60)]  # fmt: skip
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def outputs(method: str, seed: int = 0, rows: int = 90) -> list[dict]:
    """References in which a method gets each word right as often as its skill says."""
    skill = METHODS[method][2] if method in METHODS else 0.5
    given, luck = random.Random(0), random.Random(f"{method} {seed}")
    skill += luck.gauss(0, 0.01)
    found = []
    for i in range(rows):
        part = DATASET["parts"][i % 3]["name"]
        reference = [given.choice(WORDS) for _ in range(given.randint(8, 20))]
        output = [w if luck.random() < skill else luck.choice(WORDS) for w in reference]
        tokens = len(reference)
        hits = sum(map(str.__eq__, output, reference))
        found.append({
            "id": f"{part}:{i:012x}", "part": part, "prompt": f"Say something about {reference[0]}.",
            "reference": " ".join(reference), "output": " ".join(output), "tokens": tokens,
            "nll": tokens * (2.2 - skill), "correct": hits, "margin": skill - 0.5,
            "sums": {"bleu4": counts(output, reference), "rouge_l": [hits / tokens, 1],
                     "reward": [hits / tokens, 1]},
            "new_tokens": tokens, "stopped": luck.random() < 0.9,
        })  # fmt: skip
    return found


def counts(output: list[str], reference: list[str]) -> list[int]:
    grams = [[Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (output, reference)]
             for n in (1, 2, 3, 4)]  # fmt: skip
    matches = [sum((a & b).values()) for a, b in grams]
    return [len(output), len(reference), *matches, *(sum(a.values()) for a, _ in grams)]


def keep(folder: Path, found: RunRecord, test: list[dict] | None = None) -> RunRecord:
    """Writes one run. A finished one gets outputs, and the scores that they have."""
    place = folder / found.spec.folder
    place.mkdir(parents=True, exist_ok=True)
    if found.ok:
        test = outputs(found.spec.method, found.spec.seed) if test is None else test
        (place / OUTPUTS).write_text("".join(json.dumps(o) + "\n" for o in test), "utf-8")
        found.hashes = {**found.hashes, "outputs": content_hash(place / OUTPUTS)}
        found.scores = scores(total(test, DATASET)) if test else {}
    (place / RECORD).write_text(found.to_json(), "utf-8")
    return found


def results(folder: Path, methods=("qlora", "galore"), seeds=(0, 1, 2), bases=("base", "base_nf4")) -> Path:
    for method in bases:
        keep(folder, record(method))
    for seed in seeds:
        for method in methods:
            keep(folder, record(method, seed))
    return folder
