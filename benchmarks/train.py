"""Training steps of Tuneoff beside those of HF Trainer + PEFT and TRL's SFTTrainer: checked, then timed.

    python benchmarks/train.py                                   Gemma-3-1b's shape on a GPU, a tiny one on a CPU
    python benchmarks/train.py --methods lora qlora dora full galore --shapes 8x512 32x512
    python benchmarks/train.py --methods reft smt --contenders tuneoff eager
    python benchmarks/train.py --real rows.jsonl --tokenizer FOLDER       rows of unequal length: padding shows

All contenders train the same weights on the same rows in the same order under the same recipe (AdamW, a
constant rate, clipping at 1, rank 8 on all linear layers; trained weights held in fp32, bf16 by autocast),
each in a process of its own, one after the other, with caches of compiled code of its own. TRL trains 4-bit
models' adapters in bf16, its way.

Correctness comes first. The first losses, and the first gradient's norm, are compared with an eager fp32
reference: HF Trainer's where the method has one there, else Tuneoff's plain loop. A row that is off by more
than is allowed is WRONG and has no speed. Allowed is a share of how far the reference has learned in these
steps (TOLERANCE), or in bf16 twice what plain eager bf16 is off by, if that itself stays below MOST.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path
from statistics import median

from peers import CONTENDERS, Contender

from harness.data import Batches, collate
from harness.errors import Problems
from harness.method import find, known_methods, resolve
from harness.plan import find_dataset, find_sources
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
WARMUP = 8  # steps before those that are timed: compiling, capturing, lazy initialisation
CHECKED = 8  # steps whose losses are compared; their errors grow with each
LIMIT_SECONDS = 400  # of a contender: none should take a tenth of it, and a hang must not keep the card
TOLERANCE = {"fp32": 0.002, "bf16": 0.02}  # of what the reference has learned; GPUs add up in another order
MOST = 0.1  # likewise: plain bf16 that is off by more says nothing of what bf16 costs
GRADIENT = {"fp32": 0.002, "bf16": 0.05}  # relative, of the first gradient's norm: its loss's scale shows in it
UNEVEN = 0.05  # of the steps' time: what passes between them beyond this is told
PEERS = ("lora", "qlora", "dora", "full", "galore")  # methods that HF Trainer has, with PEFT and galore-torch
WORDS = 2**15  # of the rows' own tokenizer, at most: the head's work is the model's vocabulary's all the same
GEMMA_3_1B = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "sliding_window": 512, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
TINY = GEMMA_3_1B | {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
    "head_dim": 64, "query_pre_attn_scalar": 64,
}  # fmt: skip
BUILT_IN = {"gemma-3-1b": GEMMA_3_1B, "tiny": TINY}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "###", "Instruction:", "Response:"]  # ids as Gemma's


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gemma-3-1b" if cuda else "tiny", help="or a local folder")
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--shapes", nargs="+", default=["8x512" if cuda else "4x64"], help="rows x tokens")
    parser.add_argument("--learned", choices=["all", "half"], default="all", help="tokens of fixed rows")
    parser.add_argument("--real", help="a dataset of datasets_spec/, or rows, in place of fixed rows")
    parser.add_argument("--source", nargs="+", default=[], help="NAME=PATH, as run_bench.py has it")
    parser.add_argument("--tokenizer", default=str(ROOT / "demo" / "model"), help="of real rows, a folder")
    parser.add_argument("--steps", type=int, default=20, help=f"that are timed, after {WARMUP}")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--json", type=Path, help="keeps all that was measured")
    asked = parser.parse_args()
    sources = known_methods()
    methods = {name: resolve(name, find(name, sources)) for name in asked.methods}
    with tempfile.TemporaryDirectory() as folder:
        call = Call(asked, Path(folder), cuda)
        groups = [group for shape in asked.shapes for group in call.groups(methods, shape)]
        groups = [g | {"flops": flops(call.model, g)} for g in groups]
        found = {"ceiling": call.ceiling, "asked": {**vars(asked), "json": None}, "groups": groups}
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), "utf-8")
    print(table(found))


class Call:
    """What all contenders of a call share: a folder, the model in it, and the ceiling of the device."""

    def __init__(self, asked, folder: Path, cuda: bool):
        self.asked, self.folder, self.cuda = asked, folder, cuda
        self.model, self.number = folder / "model", 0
        self.model.mkdir()
        self.blank = RunSpec("base", 0, "bench", {}, Hyperparams(), locations={"model": str(self.model)}, search={})
        own = Path(asked.model)
        for file in own.glob("*") if asked.model not in BUILT_IN else ():
            if not (file.name.startswith("tokenizer") or file.name == "chat_template.jinja"):
                (self.model / file.name).symlink_to(file.resolve())
        if asked.model in BUILT_IN:
            (self.model / "config.json").write_text(json.dumps(BUILT_IN[asked.model]))
            self.run(Contender("the weights", "weights"), self.blank)
        elif not (own / "config.json").is_file():
            sys.exit(f"--model {own}: no model's folder; name one, or {' or '.join(BUILT_IN)}")
        self.config = json.loads((self.model / "config.json").read_text("utf-8"))
        self.ceiling = self.run(Contender("the ceiling", "ceiling"), self.blank)

    def run(self, contender: Contender, spec: RunSpec, name: str = "", plan: str = "", start: str = "",
            precision: str = "", steps: int = 0) -> dict:  # fmt: skip
        """What it left, or its error."""
        self.number += 1
        here = self.folder / f"{self.number}"
        here.mkdir()
        job = {
            "contender": asdict(contender), "spec": asdict(spec), "plan": plan, "start": start,
            "precision": precision or self.asked.precision, "steps": steps, "result": str(here / "result.json"),
        }  # fmt: skip
        (here / "job.json").write_text(json.dumps(job))
        caches = self.folder / f"caches-{spec.digest}-{contender.caches or name or self.number}"
        environment = os.environ | {
            "TUNEOFF_CACHE": f"{caches}", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), str(here / "job.json")]
        with (here / "log").open("wb") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=LIMIT_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                return {"error": f"not done within {LIMIT_SECONDS} s"}
        try:
            found = json.loads((here / "result.json").read_text("utf-8"))
        except (OSError, ValueError):
            last = (here / "log").read_text("utf-8", "replace").strip().splitlines()[-1:]
            found = {"error": f"it died: {' '.join(last)}"}
        said = found.get("error") or "done"
        print(f"{spec.method}, {contender.label}: {said}", file=sys.stderr, flush=True)
        if found.get("error") and os.environ.get("BENCHMARK_LOGS"):
            print((here / "log").read_text("utf-8", "replace"), file=sys.stderr)
        return found

    def groups(self, methods: dict, shape: str):
        """The contenders of each method at a shape, on the same rows: not yet judged."""
        rows, tokens = map(int, shape.split("x"))
        steps = WARMUP + self.asked.steps
        hp = Hyperparams(
            batch_size=rows, micro_batch_size=rows, max_length=tokens, max_steps=steps, schedule="constant",
            warmup_ratio=0.0, validations=0, max_new_tokens=1, precision=self.asked.precision,
        )  # fmt: skip
        spec = self.with_rows(replace(self.blank, hp=hp))
        plan, lengths, targets = self.planned(spec)
        for name, cls in methods.items():
            own = replace(spec, method=name, hp=replace(hp, learning_rate=cls.learning_rates[1]))
            start = str(self.folder / f"start-{name}-{shape}") if name in ("lora", "qlora", "dora") else ""
            more = {"plan": plan, "start": start}
            reference, by = self.reference(own, more)
            found = {}
            for key in self.asked.contenders:
                contender = CONTENDERS[key]
                if contender.door != "tuneoff" and name not in PEERS:
                    continue
                if "kernels" in contender.settings and not with_kernels():
                    found[key] = {"error": "this version has no hp.kernels: its only rung is the row above"}
                    continue
                found[key] = self.run(contender, own, key, **more, steps=steps)
            yield {
                "method": name, "shape": "real rows, %s" % shape if self.asked.real else shape,
                "objective": cls.objective, "samples": cls.objective == "reward", "reference": reference,
                "by": by, "rows": found, "lengths": lengths, "targets": targets,
            }  # fmt: skip

    def reference(self, spec: RunSpec, more: dict) -> tuple[dict, str]:
        fp32 = replace(spec, hp=replace(spec.hp, precision="fp32"))
        if spec.method in PEERS:
            found = self.run(Contender("fp32 reference", "trainer"), fp32, precision="fp32", steps=CHECKED, **more)
            if "error" not in found:
                return found, "HF Trainer"
        eager = {"kernels": "eager"} if with_kernels() else {}
        return self.run(Contender("fp32 reference", "tuneoff", eager), fp32, precision="fp32", **more), "Tuneoff"

    def with_rows(self, spec: RunSpec) -> RunSpec:
        """With the dataset that is asked for, and its tokenizer beside the model."""
        from transformers import AutoTokenizer

        hp, problems = spec.hp, Problems()
        some = {"train": hp.max_steps * hp.batch_size, "validation": 1, "test": 1, "near_duplicates": "off"}
        name = self.asked.real
        if name:
            AutoTokenizer.from_pretrained(self.asked.tokenizer).save_pretrained(self.model)
        else:
            name = str(fixed_rows(self.model, hp, self.config["vocab_size"], self.asked.learned))
            some["template"] = "instruction"
        dataset = find_dataset(name, some, problems)
        sources = find_sources(self.asked.source, name, dataset, problems)
        problems.refuse()
        return replace(spec, dataset=dataset, locations={**spec.locations, "sources": sources})

    def planned(self, spec: RunSpec) -> tuple[str, list, list]:
        """-> a file with the rows of each step; their lengths; how many tokens a step learns."""
        from harness.training import read_data

        template, splits = read_data(spec, spec.hp, RunRecord(spec, "failed"))
        steps = list(Batches(splits["train"], spec.hp, spec.seed))
        if any(len(step) != spec.hp.batch_size for step in steps):
            sys.exit(f"{len(splits['train'])} rows are left, no multiple of {spec.hp.batch_size}: peers would step on")
        if max(template.tokenizer.get_vocab().values()) >= self.config["vocab_size"]:
            sys.exit("--tokenizer: it has more tokens than the model")
        plan = [[planned_row(example, template.tokenizer.pad_token_id) for example in step] for step in steps]
        path = self.folder / f"rows-{spec.digest}.json"
        path.write_text(json.dumps(plan))
        targets = [sum(label != -100 for row in step for label in row["labels"][1:]) for step in plan]
        return str(path), [[len(row["input_ids"]) for row in step] for step in plan], targets


def with_kernels() -> bool:
    return "kernels" in {field.name for field in fields(Hyperparams)}


def planned_row(example, pad: int) -> dict:
    batch = collate([example], pad, "cpu", history=True)
    return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}


def fixed_rows(folder: Path, hp: Hyperparams, vocabulary: int, learned: str) -> Path:
    """-> a file of rows that are hp.max_length tokens each, of which all or half are learned; in the folder, a
    tokenizer to which every word is a token. Words are as unequally frequent as a language's (Zipf): so there
    is something to learn from the first step on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(min(vocabulary, WORDS) - len(SPECIAL))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    draw, odds = random.Random(0), list(accumulate(1 / (i + 3) for i in range(len(words))))

    def text(count: int) -> str:
        return " ".join(draw.choices(words, cum_weights=odds, k=count))

    def row() -> dict:
        n = hp.max_length
        if learned == "all":
            return {"text": text(n - 1)}  # <bos> stands before
        return {"prompt": text(n // 2 - 4), "chosen": text(n), "rejected": text(n)}  # the answers are cut to fit

    path = folder / f"rows-{hp.batch_size}-{hp.max_length}.jsonl"
    rows = (json.dumps(row()) for _ in range(hp.batch_size * hp.max_steps + 2))  # two that are held out
    path.write_text("\n".join(rows), "utf-8")
    return path


# What is computed from what was measured


def flops(folder: Path, group: dict) -> list[float] | None:
    """Of the model in each step, without what is computed again: 2 a weight and token forward and 2 for the
    gradients of activations, 2 more for those of trained weights; the head where something is learned; the
    scores of causal attention within its window. Null for an objective that reads more than the rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = next((row for row in group["rows"].values() if row.get("parameters")), None)
    if group["objective"] != "sft" or not sizes:
        return None
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    within = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    body = sum(m.weight.numel() for m in within if m is not head and not isinstance(m, torch.nn.Embedding))
    added = max(0, sizes["parameters"] - sum(p.numel() for p in model.parameters()))
    changed = min(sizes["trainable"] - min(added, sizes["trainable"]), body + head.weight.numel())
    wide = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    found = []
    for lengths, targets in zip(group["lengths"], group["targets"], strict=True):
        products = 4 * (body * sum(lengths) + head.weight.numel() * targets)
        products += (6 * added + 2 * changed) * sum(lengths)
        found.append(products + 12 * wide * sum(attended(n, w) for n in lengths for w in windows))
    return found


def attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def off(row: dict, reference: dict) -> float:
    """The greatest difference of the losses that are compared, in nats a token; infinite where one is no
    number."""
    pairs = list(zip(row["losses"], reference["losses"][:CHECKED], strict=False))
    differences = [abs(a - b) for a, b in pairs]
    return max(differences) if len(pairs) == CHECKED and all(d == d for d in differences) else float("inf")


def wrongs(group: dict, precision: str) -> dict[str, str]:
    """Contender -> what is wrong with it, of those that ran."""
    reference, rows = group["reference"], {k: r for k, r in group["rows"].items() if "error" not in r}
    if "error" in reference:
        return dict.fromkeys(rows, f"no reference: {reference['error']}")
    if group["samples"]:
        return {}
    losses = reference["losses"][:CHECKED]
    learned = max(losses) - min(losses)
    allowed = TOLERANCE[precision] * learned
    plain = rows.get("trainer") or rows.get("eager") or rows.get("tuneoff")
    if precision == "bf16" and plain and off(plain, reference) <= MOST * learned:
        allowed = max(allowed, 2 * off(plain, reference))
    found = {}
    for key, row in rows.items():
        norm, expected = (side["norms"][0] if side["norms"] else None for side in (row, reference))
        if off(row, reference) > allowed:
            found[key] = f"its losses are off by up to {off(row, reference):.2g} nats, allowed are {allowed:.2g}"
        elif norm is not None and expected and abs(norm / expected - 1) > GRADIENT[precision]:
            found[key] = f"its first gradient's norm is {norm:.4g}, the reference's {expected:.4g}"
        elif group["objective"] == "sft" and row["tokens"] != sum(map(sum, group["lengths"])):
            found[key] = f"it read {row['tokens']:,} tokens, not {sum(map(sum, group['lengths'])):,}"
    return found


def speed(row: dict, group: dict) -> float:
    """Real tokens a second, over the timed steps; where a method reads more than its rows, of what it read."""
    planned = [sum(step) for step in group["lengths"]]
    more = row["tokens"] / sum(planned)
    return more * sum(planned[WARMUP:]) / sum(row["seconds"][WARMUP:])


def first(row: dict) -> float:
    """Seconds that the steps before the timed ones took beyond as many usual ones: compiling, capturing,
    initialising, a first decomposition. Compiling may have a phase of its own, or be within a step."""
    beyond = sum(row["seconds"][:WARMUP]) - WARMUP * median(row["seconds"][WARMUP:])
    return max(0.0, beyond, row["compile"])


def table(found: dict) -> str:
    ceiling, asked = found["ceiling"], found["asked"]
    memory = {"allocated GiB": "allocated", "device GiB": "device"}
    if ceiling["device"].startswith("CPU"):
        memory = {"resident GiB": "resident"}
    what = f"real rows of {asked['real']}" if asked["real"] else f"fixed rows, learned: {asked['learned']}"
    heads = ["method", "rows x tokens", "contender", "tokens/s", "step ms", *memory, "MFU", "Tuneoff is", "first s",
             "padding", "loss off by", "notes"]  # fmt: skip
    lines = [
        f"{asked['model']}, {asked['precision']}, {what}; median of {asked['steps']} steps after {WARMUP}; "
        f"{ceiling['device']}, torch {ceiling['torch']}, {ceiling['flops'] / 1e12:.3g} TFLOP/s in a large product",
        "",
        f"| {' | '.join(heads)} |",
        "|" + " --- |" * 3 + " ---: |" * (len(heads) - 4) + " --- |",
    ]
    for group in found["groups"]:
        bad = wrongs(group, asked["precision"])
        ours = group["rows"].get("tuneoff")
        base = speed(ours, group) if ours and "error" not in ours and "tuneoff" not in bad else None
        for key, row in group["rows"].items():
            cells = [group["method"], group["shape"], CONTENDERS[key].label]
            if key in bad or "error" in row:
                blank = ["–"] * (len(heads) - 4)
                note = f"**WRONG**: {bad[key]}" if key in bad else row["error"]
            else:
                blank, note = measured(row, group, ceiling, memory.values(), base), "; ".join(notes(row, group))
            lines.append(f"| {' | '.join([*cells, *blank, note.replace('|', '/')])} |")
    lines += ["", "Tuneoff is: its speed over the row's. First s: beyond as many usual steps. Loss off by: at most, in "
              f"nats, of the first {CHECKED} losses against the fp32 reference ({references(found)})."]  # fmt: skip
    return "\n".join(lines)


def measured(row: dict, group: dict, ceiling: dict, memory, base: float | None) -> list[str]:
    timed, work = row["seconds"][WARMUP:], group["flops"]
    mfu = f"{sum(work[WARMUP:]) / sum(timed) / ceiling['flops']:.0%}" if work else "–"
    compared = "error" not in group["reference"] and not group["samples"]
    return [
        f"{speed(row, group):,.0f}",
        f"{1000 * median(timed):,.1f}",
        *(f"{row[kind] / GIB:.1f}" if row[kind] is not None else "–" for kind in memory),
        mfu,
        f"{base / speed(row, group):.2f} x" if base else "–",
        f"{first(row):.1f}",
        f"{row['padded'] / max(1, row['padded'] + row['tokens']):.1%}",
        f"{off(row, group['reference']):.1g}" if compared else "not compared",
    ]


def notes(row: dict, group: dict) -> list[str]:
    found = list(row["disturbed"])
    if row["kernels"]:
        found.append(f"kernels: {row['kernels']}")
    if group["samples"]:
        found.append("trains on answers that it draws: no two runs are alike")
    timed = sum(row["seconds"][WARMUP:])
    if len(row["ends"]) == len(row["seconds"]):
        between = (row["ends"][-1] - row["ends"][WARMUP - 1]) / timed - 1
        found += [f"{between:+.0%} of time between steps"] if between > UNEVEN else []
    return found


def references(found: dict) -> str:
    return ", ".join(sorted({f"{group['method']}: {group['by']}" for group in found["groups"]}))


if __name__ == "__main__":
    main()
