"""Training steps of Tuneoff beside those of HF Trainer + PEFT and TRL's SFTTrainer: checked, then timed.

    python benchmarks/train.py                                Gemma-3-1b's shape on a GPU, a tiny one on a CPU
    python benchmarks/train.py --methods lora qlora dora full galore --shapes 8x512 32x512
    python benchmarks/train.py --methods reft smt --contenders tuneoff eager         with and without kernels
    python benchmarks/train.py --real rows.jsonl --tokenizer FOLDER      rows of unequal length: padding shows

All contenders train the same weights on the same rows in the same order under the same recipe (AdamW, a
constant rate, clipping at 1, rank 8 on all linear layers; trained weights held in fp32, bf16 by autocast),
each in a process of its own, one after the other, with caches of compiled code of its own. TRL trains the
adapters of 4-bit models in bf16, its way.

Correctness comes first. The first losses, and the first gradient's norm, are compared with an eager fp32
reference: HF Trainer's where it has the method, else Tuneoff's plain loop. A row that is off by more than is
allowed is WRONG and has no speed. Allowed is a share of how far the reference's losses are apart (TOLERANCE),
or in bf16 twice what plain eager bf16 is off by, if that itself stays below MOST of it.
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
from math import inf
from pathlib import Path
from statistics import median

from peers import CONTENDERS, Contender

from harness.data import Batches, collate
from harness.errors import BadRequest, Problems, unknown
from harness.method import find, known_methods, resolve
from harness.plan import find_dataset, find_sources
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
WARMUP = 8  # steps before those that are timed: compiling, capturing, lazy initialisation
CHECKED = 8  # steps whose losses are compared; what differs grows from step to step
LIMIT_SECONDS = 300  # of a contender: none should take a fifth of it, and a hang must not keep the card
TOLERANCE = {"fp32": 0.002, "bf16": 0.02}  # of the reference's range; sums are taken in another order
MOST = 0.1  # likewise: plain bf16 that is off by more says nothing of what bf16 costs
GRADIENT = {"fp32": 0.002, "bf16": 0.05}  # relative, of the first gradient's norm: AdamW hides its scale
UNEVEN = 0.05  # of the steps' time: what passes between them beyond this is told
ADAPTERS = ("lora", "qlora", "dora")  # methods that HF Trainer has with PEFT
PEERS = (*ADAPTERS, "full", "galore")  # and those that it has itself, or with galore-torch
WORDS = 2**15  # of the fixed rows, at most: the head's work is the model's vocabulary's all the same
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
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "###", "Instruction:", "Response:"]  # the first as Gemma's


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gemma-3-1b" if cuda else "tiny", help="tiny, or a local folder")
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--shapes", nargs="+", default=["8x512" if cuda else "4x64"], help="rows x tokens")
    parser.add_argument("--learned", choices=["all", "half"], default="all", help="tokens of fixed rows")
    parser.add_argument("--real", help="a dataset of datasets_spec/, or rows, in place of fixed rows")
    parser.add_argument("--source", nargs="+", default=[], help="NAME=PATH, as run_bench.py has it")
    parser.add_argument("--tokenizer", default=str(ROOT / "demo" / "model"), help="of real rows, a folder")
    parser.add_argument("--steps", type=int, default=20, help=f"that are timed, after {WARMUP} that are not")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cuda else "fp32")
    parser.add_argument("--json", type=Path, help="keeps all that was measured")
    asked = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measured_in(Path(folder), asked)
    except BadRequest as error:
        sys.exit(str(error))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), "utf-8")
    print(table(found))


def measured_in(folder: Path, asked) -> dict:
    sources, problems = known_methods(), Problems()
    problems += [unknown("method", name, sources) for name in asked.methods if not find(name, sources)]
    problems.refuse()
    methods = {name: resolve(name, find(name, sources)) for name in asked.methods}
    call = Call(asked, folder)
    groups = [group for shape in asked.shapes for group in call.groups(methods, shape)]
    return {"ceiling": call.ceiling, "asked": vars(asked) | {"json": None}, "groups": groups}


class Call:
    """What all contenders of a call share: a folder, the model in it, and the ceiling of the device."""

    def __init__(self, asked, folder: Path):
        self.asked, self.folder, self.number = asked, folder, 0
        self.model, own = folder / "model", Path(asked.model)
        self.model.mkdir()
        places = {"model": str(self.model)}
        self.blank = RunSpec("base", 0, "bench", {}, Hyperparams(), locations=places, search={})
        if asked.model in BUILT_IN:
            (self.model / "config.json").write_text(json.dumps(BUILT_IN[asked.model]))
            if error := self.run(Contender("weights", "weights"), self.blank).get("error"):
                raise BadRequest(f"the weights could not be drawn: {error}")
        elif not (own / "config.json").is_file():
            raise BadRequest(f"--model {own} is no model's folder: name one, or {' or '.join(BUILT_IN)}")
        else:
            for file in own.iterdir():
                if not file.name.startswith(("tokenizer", "chat_template")):  # the rows bring theirs
                    (self.model / file.name).symlink_to(file.resolve())
        self.config = json.loads((self.model / "config.json").read_text("utf-8"))
        self.ceiling = self.run(Contender("ceiling", "ceiling"), self.blank)

    def run(self, contender: Contender, spec: RunSpec, name: str = "", steps: int = 0, **more) -> dict:
        """What it left, or its error. `name`: of its caches."""
        self.number += 1
        here = self.folder / str(self.number)
        here.mkdir()
        job = {"precision": self.asked.precision, **more, "steps": steps, "result": str(here / "result.json"),
               "contender": asdict(contender), "spec": asdict(spec)}  # fmt: skip
        (here / "job.json").write_text(json.dumps(job))
        caches = self.folder / f"caches-{spec.digest}-{contender.caches or name or self.number}"
        environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {  # HF Trainer would split over all
            "TUNEOFF_CACHE": f"{caches}", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), str(here / "job.json")]
        with (here / "log").open("wb") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=LIMIT_SECONDS)
                found = json.loads((here / "result.json").read_text("utf-8"))
            except subprocess.TimeoutExpired:
                found = {"error": f"not done within {LIMIT_SECONDS} s"}
            except (OSError, ValueError):
                last = (here / "log").read_text("utf-8", "replace").strip().splitlines()[-1:]
                found = {"error": f"it died: {' '.join(last)}"}
        print(f"{spec.method}, {contender.label}: {found.get('error', 'done')}", file=sys.stderr, flush=True)
        return found

    def groups(self, methods: dict, shape: str):
        """The contenders of each method on the same rows, not yet judged."""
        rows, tokens = map(int, shape.split("x"))
        hp = Hyperparams(
            batch_size=rows, micro_batch_size=rows, max_length=tokens, max_steps=WARMUP + self.asked.steps,
            schedule="constant", warmup_ratio=0.0, validations=0, max_new_tokens=1,
            precision=self.asked.precision,
        )  # fmt: skip
        spec = self.with_rows(replace(self.blank, hp=hp))
        plan, lengths, targets = self.planned(spec)
        for name, cls in methods.items():
            own = replace(spec, method=name, hp=replace(hp, learning_rate=cls.learning_rates[1]))
            start = str(self.folder / f"start-{name}-{shape}") if name in ADAPTERS else ""
            more = {"plan": plan, "start": start}
            reference, by = self.reference(own, cls, more)
            rows = {}
            for key in self.asked.contenders if "error" not in reference else ():
                contender = CONTENDERS[key]
                if contender.door == "tuneoff" or name in PEERS:
                    lacks = "kernels" in contender.settings and not with_kernels()
                    none = {"error": "this version has no hp.kernels"}
                    rows[key] = none if lacks else self.run(contender, own, key, hp.max_steps, **more)
            group = {"method": name, "shape": shape, "objective": cls.objective, "reference": reference,
                     "by": by, "rows": rows, "lengths": lengths, "targets": targets}  # fmt: skip
            yield group | {"flops": flops(self.model, group)}

    def reference(self, spec: RunSpec, cls, more: dict) -> tuple[dict, str]:
        """-> what the eager fp32 training left, or why there is none; whose it is."""
        fixed_text = self.asked.learned == "all" and not self.asked.real
        if not cls.trains or (fixed_text and "plain text" in cls.cannot):
            return {
                "error": "it needs answers: --learned half" if cls.trains else "it trains nothing"
            }, "nobody"
        fp32 = replace(spec, hp=replace(spec.hp, precision="fp32"))
        label = "eager fp32 reference"
        if spec.method in PEERS:
            found = self.run(Contender(label, "trainer"), fp32, "", CHECKED, precision="fp32", **more)
            if "error" not in found:
                return found, "HF Trainer"
        eager = Contender(label, "tuneoff", {"kernels": "eager"} if with_kernels() else {})
        return self.run(eager, fp32, precision="fp32", **more), "Tuneoff"

    def with_rows(self, spec: RunSpec) -> RunSpec:
        """With the dataset that is asked for; its tokenizer lies with the model."""
        from transformers import AutoTokenizer

        hp, problems, name = spec.hp, Problems(), self.asked.real
        some = {"train": hp.max_steps * hp.batch_size, "validation": 1, "test": 1, "near_duplicates": "off"}
        if name:
            AutoTokenizer.from_pretrained(self.asked.tokenizer).save_pretrained(self.model)
        else:
            name = str(fixed_rows(self.model, hp, self.config["vocab_size"], self.asked.learned))
            some["template"] = "instruction"
        dataset = find_dataset(name, some, problems)
        sources = find_sources(self.asked.source, name, dataset, problems)
        problems.refuse()
        return replace(spec, dataset=dataset, locations={**spec.locations, "sources": sources})

    def planned(self, spec: RunSpec) -> tuple[str, list[list[int]], list[int]]:
        """-> a file with the rows of each step; their lengths; how many tokens a step learns."""
        from harness.training import read_data

        template, splits = read_data(spec, spec.hp, RunRecord(spec, "failed"))
        if max(template.tokenizer.get_vocab().values()) >= self.config["vocab_size"]:
            raise BadRequest("--tokenizer: it knows more tokens than the model. Name the model's own")
        steps = list(Batches(splits["train"], spec.hp, spec.seed))
        if any(len(step) < spec.hp.batch_size for step in steps):
            raise BadRequest(
                f"--real: {len(splits['train'])} rows are left, which are not whole steps: lower --steps"
            )
        plan = [[planned_row(example, template.tokenizer.pad_token_id) for example in step] for step in steps]
        path = self.folder / f"rows-{spec.digest}.json"
        path.write_text(json.dumps(plan))
        targets = [sum(label != -100 for row in step for label in row["labels"][1:]) for step in plan]
        return str(path), [[len(row["input_ids"]) for row in step] for step in plan], targets


def with_kernels() -> bool:
    return "kernels" in {field.name for field in fields(Hyperparams)}


def planned_row(example, pad: int) -> dict[str, list[int]]:
    batch = collate([example], pad, "cpu", history=True)
    return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}


def fixed_rows(folder: Path, hp: Hyperparams, vocabulary: int, learned: str) -> Path:
    """-> a file of rows that are hp.max_length tokens each, all or half of them learned; beside it a
    tokenizer to which a word is a token. Words are as unequally frequent as a language's (Zipf), so that
    there is something to learn from the first step on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(min(vocabulary, WORDS) - len(SPECIAL))]
    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    draw, odds = random.Random(0), list(accumulate(1 / (i + 3) for i in range(len(words))))

    def text(count: int) -> str:
        return " ".join(draw.choices(words, cum_weights=odds, k=count))

    def row(n: int) -> dict[str, str]:
        if learned == "all":
            return {"text": text(n - 1)}  # <bos> stands before it
        # The form's own four words are in the first half; what is too long of an answer is cut.
        return {"prompt": text(n // 2 - 4), "chosen": text(n), "rejected": text(n)}

    path = folder / f"rows-{hp.batch_size}-{hp.max_length}.jsonl"
    rows = (json.dumps(row(hp.max_length)) for _ in range(hp.batch_size * hp.max_steps + 2))  # two held out
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
    output = model.get_output_embeddings()
    matrices = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    head, body = output.weight.numel(), sum(
        m.weight.numel() for m in matrices if m is not output and not isinstance(m, torch.nn.Embedding)
    )  # fmt: skip
    added = min(sizes["trainable"], sizes["parameters"] - sum(p.numel() for p in model.parameters()))
    changed = min(sizes["trainable"] - added, body + head)  # of the model's own
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    wide = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return [
        (4 * head + 2 * max(0, changed - body)) * learned
        + (4 * body + 2 * min(changed, body) + 6 * added) * sum(lengths)
        + 12 * wide * sum(attended(n, window) for n in lengths for window in windows)
        for lengths, learned in zip(group["lengths"], group["targets"], strict=True)
    ]


def attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def off(row: dict, reference: dict) -> float:
    """The greatest difference of the losses that are compared, in nats; infinite where one is no number."""
    pairs = list(zip(row["losses"], reference["losses"][:CHECKED], strict=False))
    differences = [abs(a - b) if a is not None and a == a else inf for a, b in pairs]
    return max(differences) if len(pairs) == CHECKED else inf


def wrongs(group: dict, precision: str) -> dict[str, str]:
    """Contender -> what is wrong with it, of those that ran."""
    reference, rows = group["reference"], {k: r for k, r in group["rows"].items() if "error" not in r}
    if not rows or not compared(group):
        return {}
    losses, planned = reference["losses"][:CHECKED], sum(map(sum, group["lengths"]))
    moved = max(losses) - min(losses)
    allowed = TOLERANCE[precision] * moved
    plain = rows.get("trainer") or rows.get("eager")
    if precision == "bf16" and plain and off(plain, reference) <= MOST * moved:
        allowed = max(allowed, 2 * off(plain, reference))
    found = {}
    for key, row in rows.items():
        norm, expected = ((side["norms"] or [None])[0] for side in (row, reference))
        if (by := off(row, reference)) > allowed:
            found[key] = f"its losses are off by up to {by:.2g} nats, {allowed:.2g} are allowed"
        elif norm and expected and abs(norm / expected - 1) > GRADIENT[precision]:
            found[key] = f"its first gradient's norm is {norm:.4g}, the reference's {expected:.4g}"
        elif group["objective"] == "sft" and row["tokens"] != planned:
            found[key] = f"it read {row['tokens']:,} tokens of {planned:,}"
    return found


def compared(group: dict) -> bool:
    """Answers that a method draws itself are other ones in every precision."""
    return group["objective"] != "reward"


def speed(row: dict, group: dict) -> float:
    """Real tokens a second of the timed steps: of the rows, and what a method reads beyond them."""
    planned = [sum(step) for step in group["lengths"]]
    return row["tokens"] / sum(planned) * sum(planned[WARMUP:]) / sum(row["seconds"][WARMUP:])


def first(row: dict) -> float:
    """Seconds that the steps before the timed ones took beyond as many usual ones: compiling, capturing,
    initialising, a first decomposition. Compiling may be a phase of its own, or within a step."""
    beyond = sum(row["seconds"][:WARMUP]) - WARMUP * median(row["seconds"][WARMUP:])
    return max(0.0, beyond, row["compile"])


MEMORY = {"allocated GiB": "allocated", "device GiB": "device"}
HEADS = ("method", "rows x tokens", "contender", "tokens/s", "step ms", *MEMORY, "MFU", "Tuneoff is",
         "first s", "padding", "loss off by", "notes")  # fmt: skip
UNDER = """
Tuneoff is: its speed over the row's. MFU: of the model's FLOPs, none counted twice, against the large
product. First s: what the first {warmup} steps took beyond as many usual ones. Loss off by: at most, in
nats, over the first {checked} steps, from the eager fp32 reference ({by}). On a CPU, memory is what is
resident."""


def table(found: dict) -> str:
    ceiling, asked = found["ceiling"], found["asked"]
    rows = f"real rows of {asked['real']}" if asked["real"] else f"fixed rows, learned: {asked['learned']}"
    product = f"{ceiling['flops'] / 1e12:.3g} TFLOP/s in a large product" if "flops" in ceiling else "unknown"
    lines = [
        f"{asked['model']}, {asked['precision']}, {rows}; median of {asked['steps']} steps after {WARMUP}; "
        f"{ceiling.get('device')}, torch {ceiling.get('torch')}, {product}",
        "",
        f"| {' | '.join(HEADS)} |",
        "|" + " --- |" * 3 + " ---: |" * (len(HEADS) - 4) + " --- |",
    ]
    for group in found["groups"]:
        lines += [f"| {' | '.join(cells)} |" for cells in lines_of(group, asked["precision"], ceiling)]
    by = ", ".join(f"{group['method']}: {group['by']}'s" for group in found["groups"])
    return "\n".join([*lines, UNDER.format(warmup=WARMUP, checked=CHECKED, by=by)])


def lines_of(group: dict, precision: str, ceiling: dict):
    about, nothing = [group["method"], group["shape"]], ["–"] * (len(HEADS) - 4)
    if error := group["reference"].get("error"):
        yield [*about, "reference", *nothing, error.replace("|", "/")]
        return
    bad, ours = wrongs(group, precision), group["rows"].get("tuneoff", {"error": "not asked for"})
    base = speed(ours, group) if "error" not in ours and "tuneoff" not in bad else None
    for key, row in group["rows"].items():
        cells, note = nothing, row.get("error") or f"**WRONG**: {bad.get(key)}"
        if key not in bad and "error" not in row:
            cells, note = numbers(row, group, ceiling, base), "; ".join(notes(row, group))
        yield [*about, CONTENDERS[key].label, *cells, note.replace("|", "/")]


def numbers(row: dict, group: dict, ceiling: dict, base: float | None) -> list[str]:
    timed, work = row["seconds"][WARMUP:], group["flops"]
    known = work and "flops" in ceiling
    held = [row[kind] for kind in MEMORY.values()]
    if not any(held):
        held = [row["resident"], None]
    return [
        f"{speed(row, group):,.0f}",
        f"{1000 * median(timed):,.1f}",
        *(f"{size / GIB:.1f}" if size is not None else "–" for size in held),
        f"{sum(work[WARMUP:]) / sum(timed) / ceiling['flops']:.0%}" if known else "–",
        f"{base / speed(row, group):.2f} x" if base else "–",
        f"{first(row):.1f}",
        f"{row['padded'] / (row['padded'] + row['tokens']):.1%}",
        f"{off(row, group['reference']):.1g}" if compared(group) else "not compared",
    ]


def notes(row: dict, group: dict) -> list[str]:
    found = [*row["disturbed"], *([f"{row['kernels']}"] if row["kernels"] else [])]
    if not compared(group):
        found.append("it trains on answers that it draws")
    if len(row["ends"]) == len(row["seconds"]):
        passed = row["ends"][-1] - row["ends"][WARMUP - 1]
        between = passed / sum(row["seconds"][WARMUP:]) - 1
        found += [f"{between:+.0%} of time between steps"] if between > UNEVEN else []
    return found


if __name__ == "__main__":
    main()
