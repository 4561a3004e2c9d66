"""Training steps of Tuneoff beside those of HF Trainer + PEFT and TRL's SFTTrainer: checked, then timed.

    python benchmarks/train.py                                Gemma-3-1b's shape on a GPU, a tiny one on a CPU
    python benchmarks/train.py --methods lora qlora dora full galore --shapes 8x512 32x512
    python benchmarks/train.py --methods reft smt --contenders tuneoff eager         with and without kernels
    python benchmarks/train.py --real rows.jsonl --tokenizer FOLDER      rows of unequal length: padding shows
    python benchmarks/train.py --contenders trl --json b.json    a part; train_table.py puts parts together

All contenders train the same weights on the same rows in the same order under the same recipe (AdamW, a
constant rate, clipping at 1, rank 8 on all linear layers; trained weights held in fp32, bf16 by autocast),
each in a process of its own, one after the other, with caches of compiled code of its own. TRL trains the
adapters of 4-bit models in bf16, its way.

Correctness comes first: what is wrong has no speed (train_table.py says what is). That is judged once a
method's contenders are done; until then each stands on the screen, and in the JSON, as it was measured.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path

from peers import CONTENDERS, Contender
from train_table import CHECKED, WARMUP, about, below, comparable, ended, flops, measured, rows_of

from harness.child import ENDING, interrupt
from harness.data import Batches, collate
from harness.errors import BadRequest, Problems, unknown
from harness.method import find, known_methods, resolve
from harness.plan import find_dataset, find_sources
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.store import save

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300  # of a contender: on an H200 each took some 75, and a hang must not keep the card
ADAPTERS = ("lora", "qlora", "dora")  # methods that HF Trainer has with PEFT
PEERS = (*ADAPTERS, "full", "galore")  # and those that it has itself, or with galore-torch
EPSILON = {"galore": 1e-12}  # galore-torch adds it before AdamW's correction, torch after: next to none
WORDS = 2**15  # of the fixed rows, at most: the head's work is the model's vocabulary's all the same
GEMMA_3_1B = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "sliding_window": 512, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
TINY = GEMMA_3_1B | {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
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
    parser.add_argument("--json", type=Path, help="a new file, which keeps all that was measured")
    asked = parser.parse_args()
    for number in ENDING:
        signal.signal(number, interrupt)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(asked, Path(folder))
    except BadRequest as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: what was measured stands above")


def run(asked, folder: Path) -> None:
    """What was measured stands on the screen and in the JSON, whatever ends the call."""
    sources, problems = known_methods(), Problems()
    problems += [unknown("method", name, sources) for name in asked.methods if not find(name, sources)]
    problems.refuse()
    methods = {name: resolve(name, find(name, sources)) for name in asked.methods}
    if asked.json and asked.json.exists():
        raise BadRequest(f"--json: {asked.json} is there already. Name a new file")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
    call = Call(asked, folder)
    try:
        for shape in asked.shapes:
            call.measure(methods, shape)
    finally:
        if call.found["groups"]:
            print(*below(call.found), sep="\n", flush=True)


class Call:
    """What all contenders of a call share: a folder, the model in it, the ceiling of the device; and what was
    `found`, as the JSON has it."""

    def __init__(self, asked, folder: Path):
        self.asked, self.folder, self.number = asked, folder, 0
        self.model, own = folder / "model", Path(asked.model)
        self.model.mkdir()
        places = {"model": str(self.model)}
        self.blank = RunSpec("base", 0, "bench", {}, Hyperparams(), locations=places, search={})
        if asked.model in BUILT_IN:
            (self.model / "config.json").write_text(json.dumps(BUILT_IN[asked.model]))
        elif not (own / "config.json").is_file():
            raise BadRequest(f"--model {own} is no model's folder: name one, or {' or '.join(BUILT_IN)}")
        else:
            for file in own.iterdir():
                if not file.name.startswith(("tokenizer", "chat_template")):  # the rows bring theirs
                    (self.model / file.name).symlink_to(file.resolve())
        self.config = json.loads((self.model / "config.json").read_text("utf-8"))
        ground = Contender("weights, ceiling", "ground", {"draws": asked.model in BUILT_IN})
        ceiling = self.run(ground, self.blank)
        if "error" in ceiling:
            raise BadRequest(f"nothing can be trained here: {ceiling['error']}")
        self.found = {"ceiling": ceiling, "asked": vars(asked) | {"json": None}, "groups": []}
        self.keep()
        print(*about(self.found), f"weights, ceiling: {ended(ceiling)}", sep="\n", flush=True)

    def keep(self) -> None:
        """Whole, at any moment."""
        if self.asked.json:
            save(self.asked.json, json.dumps(self.found, indent=1))

    def run(self, contender: Contender, spec: RunSpec, name: str = "", steps: int = 0, **more) -> dict:
        """What it left, or its error; with either, the seconds that it `spent`. `name`: of its caches."""
        self.number += 1
        here = self.folder / str(self.number)
        here.mkdir()
        job = {"precision": self.asked.precision, **more, "steps": steps, "result": str(here / "result.json"),
               "contender": asdict(contender), "spec": asdict(spec), "parent": os.getpid(),
               "began": (began := time.time())}  # fmt: skip
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
        return found | {"spent": found.get("spent", {}) | {"process": time.time() - began}}

    def measure(self, methods: dict, shape: str) -> None:
        """The contenders of each method on the same rows."""
        rows, tokens = map(int, shape.split("x"))
        hp = Hyperparams(
            batch_size=rows, micro_batch_size=rows, max_length=tokens, max_steps=WARMUP + self.asked.steps,
            schedule="constant", warmup_ratio=0.0, validations=0, max_new_tokens=1,
            precision=self.asked.precision,
        )  # fmt: skip
        spec = self.with_rows(replace(self.blank, hp=hp))
        plan, lengths, targets = self.planned(spec)
        for name, cls in methods.items():
            epsilon, rate = EPSILON.get(name, hp.epsilon), cls.learning_rates[1]
            own = replace(spec, method=name, hp=replace(hp, learning_rate=rate, epsilon=epsilon))
            start = str(self.folder / f"start-{name}-{shape}") if name in ADAPTERS else ""
            more = {"plan": plan, "start": start}
            reference, by = self.reference(own, cls, more)
            if reference:
                print(f"{name} {shape}, eager fp32 reference: {ended(reference)}", flush=True)
            group = {"method": name, "shape": shape, "objective": cls.objective, "reference": reference,
                     "by": by, "rows": {}, "lengths": lengths, "targets": targets, "flops": None}  # fmt: skip
            self.found["groups"].append(group)
            try:
                if "error" not in reference:
                    self.compete(group, own, more)
            finally:
                self.keep()
                print("", *rows_of([group], self.found), "", sep="\n", flush=True)

    def compete(self, group: dict, spec: RunSpec, more: dict) -> None:
        """Fills the group's rows; each is kept and shown as it comes, not yet judged."""
        for key in self.asked.contenders:
            contender = CONTENDERS[key]
            if contender.door != "tuneoff" and spec.method not in PEERS:
                continue
            if "kernels" in contender.settings and not with_kernels():
                row = {"error": "this version has no hp.kernels"}
            elif contender.caches and contender.caches not in group["rows"]:
                row = {"error": f"it finds no caches: ask for {contender.caches} before it"}
            else:
                row = self.run(contender, spec, key, spec.hp.max_steps, **more)
            group["rows"][key] = row
            group["flops"] = group["flops"] or flops(self.model, group)
            self.keep()
            print(measured(key, group, self.found), flush=True)

    def reference(self, spec: RunSpec, cls, more: dict) -> tuple[dict, str]:
        """-> what the eager fp32 training left, or why there is none; whose it is."""
        fixed_text = self.asked.learned == "all" and not self.asked.real
        if not cls.trains or (fixed_text and "plain text" in cls.cannot):
            return {
                "error": "it needs answers: --learned half" if cls.trains else "it trains nothing"
            }, "nobody"
        if not comparable(cls.objective):
            return {}, "nobody"
        fp32 = replace(spec, hp=replace(spec.hp, precision="fp32"))
        label = "eager fp32 reference"
        if spec.method in PEERS:
            found = self.run(Contender(label, "trainer"), fp32, "", CHECKED, precision="fp32", **more)
            if "error" not in found:
                return found, "HF Trainer"
        eager = Contender(label, "tuneoff", {"kernels": "eager"} if with_kernels() else {})
        return self.run(eager, fp32, "", CHECKED, precision="fp32", **more), "Tuneoff"

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


def without_tokenizer(there: Path, model: Path) -> dict:
    """Makes the folder `model`, of links to what is there but for the tokenizer: rows of fixed lengths bring
    theirs. -> its configuration."""
    model.mkdir()
    for file in there.iterdir():
        if not file.name.startswith(("tokenizer", "chat_template")):
            (model / file.name).symlink_to(file.resolve())
    return json.loads((model / "config.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
