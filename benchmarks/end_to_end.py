"""A whole comparison, from the command to the report, against the same job as one writes it with HF Trainer.

    python benchmarks/end_to_end.py                        # the README's first command
    python benchmarks/end_to_end.py --rounds 1 -- --methods lora full --seeds 0 --model DIR --dataset alpaca

What follows `--` goes to run_bench.py as it is. The other job is one script: one process that imports once
and goes through methods and seeds, with Trainer, PEFT, bitsandbytes, galore-torch, generate, sacrebleu and
rouge_score. It is given the same token ids in the same order with the same hyperparameters, and validates,
answers and scores as often; it writes no report, measures neither memory nor margins, and nothing outlives
it if it breaks. Both take turns. A run whose losses do not agree is marked wrong, and then there is no ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COMMAND = ["--methods", "qlora", "galore"]
INSIDE = {  # what a user wants done -> the phases that do it; all else is outside
    "attach": ["attach"],
    "steps": ["train", "rollout", "compile"],
    "validation": ["validate"],
    "evaluation": ["evaluate", "generate"],
}
EARLY, EARLY_TOLERANCE = 20, 0.01  # steps, each loss by so much at most: rounding and the order of sums alone
LATE_TOLERANCE = 0.1  # of the last quarter's mean and the test loss: roundings grow, bases are others
LOGITS = 2**28  # at once in a likelihood of the other job: 1 GiB in fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of both; medians are compared")
    parser.add_argument(
        "--alone", action="store_true", help="and the same runs one after another, for their steps"
    )
    parser.add_argument("command", nargs="*", default=COMMAND, help="arguments of run_bench.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(described(options.command)), "utf-8")
        ours, theirs = [], []
        for number in range(options.rounds):
            ours.append(tuneoff(options.command, Path(folder) / f"ours-{number}"))
            theirs.append(trainer(job, Path(folder) / f"theirs-{number}.json"))
            print(f"round {number + 1}: {ours[-1]['wall']:.1f} s, HF Trainer {theirs[-1]['wall']:.1f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
        alone = [tuneoff(options.command, Path(folder) / "alone", ours[0])] if options.alone else []
    show(ours, theirs)
    for job in alone:
        ratio = statistics.median(steps(ours[-1], run) / steps(job, run) for run in theirs[0]["runs"]
                                  if job["records"][run]["step_seconds"])  # fmt: skip
        print(f"one after another {job['wall']:.1f} s; side by side a step takes {ratio:.2f} times as long")
    from harness.nursery import Nursery

    with Nursery({}) as nursery:
        print(f"each run a fresh interpreter: {nursery.fresh}" if nursery.fresh else "each run a copy of one")


# The two jobs


def tuneoff(command: list[str], folder: Path, together: dict | None = None) -> dict:
    """Seconds of the command and its records, with an empty cache of tokens. After a job whose runs went
    side by side: on the cores that each of them had."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = allowed[: len(allowed) // at_once(together)] if together else allowed
    where = ["--results", str(folder / "results"), "--reports", str(folder / "reports")]
    started = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "run_bench.py"), *command, *where], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "TUNEOFF_CACHE": str(folder)},
                   preexec_fn=lambda: os.sched_setaffinity(0, cores))  # fmt: skip
    wall = time.perf_counter() - started
    found = {}
    for file in (folder / "results").glob("*/record.json"):
        record = json.loads(file.read_text("utf-8"))
        lines = (
            (file.parent / "outputs.jsonl").read_text("utf-8").splitlines()
            if record["status"] == "ok"
            else []
        )
        outputs = [json.loads(line) for line in lines]
        record["nll"] = sum(o["nll"] for o in outputs) / max(1, sum(o["tokens"] for o in outputs))
        found[name(record["spec"]["method"], record["spec"]["seed"])] = record
    return {"wall": wall, "records": found}


def trainer(job: Path, result: Path) -> dict:
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0))))}  # as torch would by itself
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--job", str(job), str(result)], check=True,
                   stdout=subprocess.DEVNULL, env=threads | os.environ)  # fmt: skip
    wall = time.perf_counter() - started
    return {"wall": wall, "runs": json.loads(result.read_text("utf-8"))}


def name(method: str, seed: int) -> str:
    return f"{method}, seed {seed}"


def described(command: list[str]) -> dict:
    """The runs of a command with their rows as token ids, for the other job."""
    from harness.cli.arguments import parse_arguments
    from harness.cli.commands import planned
    from harness.data import Batches, collate
    from harness.record import RunRecord
    from harness.training import read_data

    _, options = parse_arguments(command)
    specs = planned(options)
    template, splits = read_data(specs[0], specs[-1].own_hp, RunRecord(specs[0], "failed"))
    pad = template.tokenizer.pad_token_id

    def told(example, split: str) -> dict:
        batch = collate([example], pad, "cpu", history=split == "train")  # scores are of the last answer
        return {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}

    runs = []
    for spec in specs:
        if spec.changes or spec.repeat or spec.own_hp.packing:
            raise SystemExit("the other job knows neither sweeps, repeats nor packing")
        hp = spec.own_hp
        order = Batches(splits["train"], hp, spec.seed).steps if spec.trains else []
        if any(len(step) != hp.batch_size or len(step) % hp.micro_batch_size for step in order) and (
            hp.micro_batch_size < hp.batch_size
        ):
            raise SystemExit("the other job accumulates equal steps alone: choose data.train accordingly")
        runs.append({"method": spec.method, "seed": spec.seed, "hp": vars(hp), "options": spec.options,
                     "order": order})  # fmt: skip
    ends = {example.response_ids[-1] for example in splits["train"]} & {*template.tokenizer.all_special_ids}
    questions = [list(template.question(e, specs[-1].hp.max_new_tokens).prompt_ids) for e in splits["test"]]
    return {
        "model": str(specs[0].locations["model"]), "runs": runs, "pad": pad,
        "stops": sorted(ends | {template.tokenizer.eos_token_id}),
        "rows": {split: [told(example, split) for example in rows] for split, rows in splits.items()},
        "questions": questions, "references": [example.reference for example in splits["test"]],
    }  # fmt: skip


# The other job, in a process of its own


def job(path: Path, result: Path) -> None:
    asked = json.loads(path.read_text("utf-8"))
    found = {}
    for run in asked["runs"]:
        found[name(run["method"], run["seed"])] = one(run, asked)
    result.write_text(json.dumps(found), "utf-8")


def one(run: dict, asked: dict) -> dict:
    """As its documentation has it, on the rows in the order of the job."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

    method, hp, chosen = run["method"], run["hp"], run["options"]
    if method not in KNOWN:
        raise SystemExit(f"the other job has {', '.join(KNOWN)}, not {method}: leave it out")
    card = torch.cuda.is_available()
    half = hp["precision"] == "bf16" or (hp["precision"] == "auto" and card)
    dtype = torch.bfloat16 if half else torch.float32
    set_seed(run["seed"])
    more = {}
    if method in ("qlora", "base_nf4"):
        import bitsandbytes

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # else gradients on such CPUs are wrong
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=dtype, device_map={"": "cuda" if card else "cpu"}, **more
    )
    losses = []
    if method in ("lora", "qlora", "dora"):
        model = get_peft_model(model, LoraConfig(
            r=chosen["rank"], lora_alpha=chosen["alpha"], lora_dropout=chosen["dropout"],
            target_modules="all-linear", task_type="CAUSAL_LM", use_dora=method == "dora",
        ))  # fmt: skip
    if run["order"]:
        if not more:
            for parameter in model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        losses = trained(model, run, asked, half)
    model.eval().to(dtype) if not more else model.eval()
    nll, tokens = likelihood(model, asked, asked["rows"]["test"], hp)
    answers = answered(model, asked, hp, AutoTokenizer.from_pretrained(asked["model"]))
    if run["order"]:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
    return {"losses": losses, "nll": nll / tokens, **scored(answers, asked["references"])}


KNOWN = ("base", "base_nf4", "full", "lora", "qlora", "dora", "galore")


def trained(model, run: dict, asked: dict, half: bool) -> list[float]:
    """The loss of each step."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    hp, order, rows = run["hp"], run["order"], asked["rows"]
    collator = DataCollatorForSeq2Seq(padder(asked), label_pad_token_id=-100)
    micro = hp["micro_batch_size"]

    class Ordered(Trainer):
        def get_train_dataloader(self):
            parts = [step[i : i + micro] for step in order for i in range(0, len(step), micro)]
            return torch.utils.data.DataLoader(rows["train"], batch_sampler=parts, collate_fn=collator)

        def create_optimizer(self, *args, **kwargs):
            made = super().create_optimizer(*args, **kwargs)
            for group in made.param_groups:  # Trainer leaves galore-torch its own, 1e-6
                group["eps"] = hp["epsilon"]
            return made

    more = {}
    if run["method"] == "galore":
        from torch import nn

        head = model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        of = run["options"]
        settings = f"rank={of['rank']},update_proj_gap={of['gap']},scale={of['scale']}"
        more = {"optim": "galore_adamw", "optim_target_modules": linear, "optim_args": settings}
    with tempfile.TemporaryDirectory() as folder:
        loop = Ordered(
            model=model, train_dataset=rows["train"], eval_dataset=rows["validation"], data_collator=collator,
            args=TrainingArguments(
                folder, max_steps=len(order), per_device_train_batch_size=micro, seed=run["seed"],
                per_device_eval_batch_size=rows_at_once(model, hp), learning_rate=hp["learning_rate"],
                gradient_accumulation_steps=max(1, hp["batch_size"] // micro), bf16=half,
                lr_scheduler_type=hp["schedule"], warmup_steps=warmup(hp, len(order)),
                weight_decay=hp["weight_decay"], adam_beta1=hp["beta1"], adam_beta2=hp["beta2"],
                adam_epsilon=hp["epsilon"], max_grad_norm=hp["max_grad_norm"],
                gradient_checkpointing=hp["gradient_checkpointing"], logging_steps=1, save_strategy="no",
                eval_strategy="steps" if hp["validations"] else "no", eval_on_start=bool(hp["validations"]),
                eval_steps=-(-len(order) // max(1, hp["validations"])), prediction_loss_only=True,
                report_to="none", disable_tqdm=True, remove_unused_columns=False, **more,
            ),
        )  # fmt: skip
        loop.train()
    return [entry["loss"] for entry in loop.state.log_history if "loss" in entry]


def warmup(hp: dict, steps: int) -> int:
    return min(-int(-hp["warmup_ratio"] * steps // 1), steps - 1)


def padder(asked: dict):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    tokenizer.pad_token_id = asked["pad"]
    return tokenizer


def rows_at_once(model, hp: dict) -> int:
    """Of a forward that holds all logits."""
    logits = model.get_output_embeddings().weight.shape[0] * hp["max_length"]
    return max(1, min(hp["eval_batch_size"], LOGITS // logits))


def likelihood(model, asked: dict, rows: list[dict], hp: dict) -> tuple[float, int]:
    """Negative log-likelihood of all responses, and their tokens."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    collator = DataCollatorForSeq2Seq(padder(asked), label_pad_token_id=-100, return_tensors="pt")
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))
    size, total, count = rows_at_once(model, hp), 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            batch = collator(by_length[start : start + size]).to(model.device)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels != -100).sum())
    return total, count


def answered(model, asked: dict, hp: dict, tokenizer) -> list[str]:
    """Greedy answers in the order of the questions."""
    import torch

    questions = asked["questions"]
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i]))
    texts = {}
    for start in range(0, len(order), hp["eval_batch_size"]):
        some = order[start : start + hp["eval_batch_size"]]
        width = max(len(questions[i]) for i in some)
        ids = torch.tensor([[asked["pad"]] * (width - len(questions[i])) + questions[i] for i in some])
        mask = torch.tensor([[0] * (width - len(questions[i])) + [1] * len(questions[i]) for i in some])
        whole = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=hp["max_new_tokens"], eos_token_id=asked["stops"],
            pad_token_id=asked["pad"],
        )  # fmt: skip
        said = tokenizer.batch_decode(whole[:, width:], skip_special_tokens=True)
        texts |= {i: text.strip() for i, text in zip(some, said, strict=True)}
    return [texts[i] for i in range(len(questions))]


def scored(answers: list[str], references: list[str]) -> dict:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
    return {"bleu4": corpus_bleu(answers, [references]).score, "rouge_l": sum(rouge) / len(rouge)}


# What is shown


def show(ours: list[dict], theirs: list[dict]) -> None:
    print(
        "| run | first losses apart | last losses apart | test losses | apart | |\n|---|---|---|---|---|---|"
    )
    right = True
    for run, other in theirs[0]["runs"].items():
        record = ours[0]["records"][run]
        early, late = apart([step["loss"] for step in record["training"]], other["losses"])
        test = abs(record["nll"] - other["nll"]) / other["nll"]
        agrees = record["status"] == "ok" and early <= EARLY_TOLERANCE and max(late, test) <= LATE_TOLERANCE
        right = right and agrees
        print(f"| {run} | {early:.2%} | {late:.2%} | {record['nll']:.4f}, {other['nll']:.4f} | {test:.2%} | "
              f"{'' if agrees else 'WRONG'} |")  # fmt: skip
    print("\n| round | Tuneoff s | HF Trainer s |" + "".join(f" {what} |" for what in INSIDE)
          + " outside | at once |\n|" + "---|" * (len(INSIDE) + 5))  # fmt: skip
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        parts = " | ".join(f"{share:.0%}" for share in shares(mine).values())
        print(f"| {number} | {mine['wall']:.1f} | {other['wall']:.1f} | {parts} | {at_once(mine)} |")
    if right:
        walls = [statistics.median(job["wall"] for job in jobs) for jobs in (ours, theirs)]
        print(
            f"\nmedians: {walls[0]:.1f} s, HF Trainer {walls[1]:.1f} s: {walls[1] / walls[0]:.2f} x as fast"
        )
    else:
        print("\nwrong: the losses do not agree, and there is no ratio")


def apart(mine: list[float], other: list[float]) -> tuple[float, float]:
    """-> the largest share by which an early loss differs, and that of the mean of the last quarter."""
    if not mine or len(mine) != len(other):
        return (float("nan"), float("nan")) if mine or other else (0.0, 0.0)
    early = max(abs(a - b) / abs(a) for a, b in list(zip(mine, other, strict=True))[:EARLY])
    means = [statistics.mean(losses[-max(1, len(losses) // 4) :]) for losses in (mine, other)]
    return early, abs(means[0] - means[1]) / means[0]


def shares(job: dict) -> dict[str, float]:
    """Of the time of all slots: what each kind of work took, and what is outside of all of them."""
    whole = job["wall"] * at_once(job)
    seconds = {
        what: sum(
            r["phases"][p]["seconds"] for r in job["records"].values() for p in phases if p in r["phases"]
        )
        for what, phases in INSIDE.items()
    }
    found = {what: taken / whole for what, taken in seconds.items()}
    return {**found, "outside": 1 - sum(found.values())}


def steps(job: dict, run: str) -> float:
    """Seconds of a step, the median."""
    return statistics.median(job["records"][run]["step_seconds"])


def at_once(job: dict) -> int:
    return max(record["provenance"].get("at_once") or 1 for record in job["records"].values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
