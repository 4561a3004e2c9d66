"""One contender of benchmarks/train.py in a process of its own: python benchmarks/peers.py JOB.json

It trains as a user of its front door would, on the rows that the job lists, and leaves JSON: the loss, the
gradient's norm and the seconds of each step, the tokens that it read, its peaks, and what it `spent`: the
seconds from its start to the end of its imports, the model, the first step, the last. Tuneoff goes its
product's way, HF Trainer and TRL's SFTTrainer theirs, and none waits for the device where it would not by
itself.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.child import chosen_method, diagnose
from harness.forks import die_with
from harness.record import RunRecord
from harness.spec import RunSpec

MICRO = 8  # rows at once of the fp32 reference, which holds all logits: 4 GiB at 512 tokens, 262,144 words
GALORE = {  # the defaults of methods/galore.py
    "optim": "galore_adamw",
    "optim_target_modules": [r".*\.(self_attn|mlp)\..*"],
    "optim_args": "rank=128,update_proj_gap=200,scale=0.25",
}


@dataclass(frozen=True)
class Contender:
    label: str
    door: str  # one of DOORS
    settings: dict = field(default_factory=dict)  # of the front door's own, where it is not left as it comes
    caches: str = ""  # the contender whose compiled code it finds; its own are empty


CONTENDERS = {
    "tuneoff": Contender("Tuneoff", "tuneoff", {"kernels": "compiled"}),
    "again": Contender("Tuneoff, once more with its caches", "tuneoff", {"kernels": "compiled"}, "tuneoff"),
    "eager": Contender("Tuneoff, kernels=eager", "tuneoff", {"kernels": "eager"}),
    "checkpointing": Contender("Tuneoff, checkpointing", "tuneoff",
                               {"kernels": "compiled", "gradient_checkpointing": True}),
    "trainer": Contender("HF Trainer + PEFT", "trainer"),
    "trainer-compile": Contender("HF Trainer + PEFT, torch_compile", "trainer", {"torch_compile": True}),
    "trl": Contender("TRL SFTTrainer, its defaults: checkpointing", "trl"),
    "trl-compile": Contender("TRL SFTTrainer, torch_compile, no checkpointing", "trl",
                             {"torch_compile": True, "gradient_checkpointing": False}),
    "trl-liger": Contender("TRL SFTTrainer, Liger, no checkpointing", "trl",
                           {"use_liger_kernel": True, "gradient_checkpointing": False}),
}  # fmt: skip


def main(path: Path) -> None:
    job = json.loads(path.read_text("utf-8")) | {"spent": {}}
    contender = Contender(**job["contender"])
    die_with(job["parent"])
    try:
        mark_first_step(job)
        found = DOORS[contender.door](job, contender.settings)
    except BaseException as error:  # whatever ends it stands in its row
        traceback.print_exc()
        found = {"error": diagnose(error)[1]}
    Path(job["result"]).write_text(json.dumps(found | {"spent": job["spent"]}), "utf-8")


def mark(job: dict, name: str) -> None:
    """Keeps how many seconds after the process was asked for this first came."""
    job["spent"].setdefault(name, time.time() - job["began"])


def mark_first_step(job: dict) -> None:
    from harness.measuring import StepClock

    step = StepClock.step

    def marked(clock):
        mark(job, "setup")
        return step(clock)

    StepClock.step = marked


# Tuneoff


def tuneoff(job: dict, settings: dict) -> dict:
    from harness.training import stages

    mark(job, "imports")
    asked = job["spec"]
    spec = RunSpec.from_json({**asked, "hp": {**asked["hp"], **settings}})
    record = RunRecord(spec, "failed")
    method = chosen_method(spec, record)
    if job["start"]:
        attach = method.attach
        vars(method)["attach"] = lambda model, run: started(attach(model, run), job["start"])
    with tempfile.TemporaryDirectory() as folder:
        model, run = stages.opened(spec, method, record, Path(folder))
        mark(job, "model")
        run.report = until(job["steps"], run.report)
        with suppress(Enough):
            stages.trained(model, run)  # without what `execute` does then: scores, an answer, a saved model
        mark(job, "steps")
        told = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text("utf-8").splitlines()]
    compiling, steps, before = record.phases.get("compile"), ("train", "rollout"), ("attach", "compile")
    busy = [warning for warning in record.warnings if "in use before the run" in warning]
    return {
        "losses": [step["loss"] for step in record.training],
        "norms": [step["grad_norm"] for step in record.training],
        "seconds": record.step_seconds,
        "ends": [event["seconds"] for event in told if "step" in event and "seconds" in event],
        "compile": compiling.seconds if compiling else 0.0,
        "tokens": record.tokens.trained,
        "padded": record.tokens.padded,
        # On a CPU it is rehearsed, not allocated.
        "allocated": record.peak("peak_allocated", steps) if record.peak("peak_reserved", steps) else None,
        "device": record.peak("peak_device", steps),
        "resident": record.peak("peak_host", steps),
        "before": {kind: record.peak(f"peak_{kind}", before) for kind in ("allocated", "device")},
        "parameters": record.sizes.parameters,
        "trainable": record.sizes.trainable,
        "disturbed": [*(record.disturbed or []), *busy],
        "kernels": ", ".join(f"{name}: {value}" for name, value in asdict(record.kernels).items() if value),
    }


class Enough(Exception):
    """A reference has made the steps that are compared."""


def until(steps: int, report):
    """The report of a training that ends after so many of its steps."""

    def told(**values):
        report(**values)
        if values.get("step") == steps < values.get("steps", 0):
            raise Enough

    return told


def started(model, path: str):
    """With the adapters' random halves as the first contender drew them, who leaves them: curves can then be
    compared step by step. All else of a start is the same by itself: B is 0, DoRA's magnitude that of W."""
    import torch
    from safetensors.torch import load_file, save_file

    drawn = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    if not Path(path).exists():
        save_file({name: p.detach().float().cpu().contiguous() for name, p in drawn.items()}, path)
        return model
    start = load_file(path)
    if start.keys() != drawn.keys():
        apart = sorted(start.keys() ^ drawn.keys())[:2]
        raise ValueError(f"its adapters are not the reference's: {', '.join(apart)} on one side alone")
    with torch.no_grad():
        for name, p in drawn.items():
            p.copy_(start[name])
    return model


# HF Trainer and TRL


def trainer(job: dict, settings: dict) -> dict:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    mark(job, "imports")
    more = {"data_collator": DataCollatorForSeq2Seq(tokenizer(job), label_pad_token_id=-100)}
    if job["spec"]["method"] == "qlora" and job["precision"] == "bf16" and not settings:
        more |= {"prepare": True}  # the recipe of PEFT's documentation
        settings = {"gradient_checkpointing": True}
    return trained(job, Trainer, TrainingArguments, settings, **more)


def trl(job: dict, settings: dict) -> dict:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    mark(job, "imports")
    settings = {"max_length": job["spec"]["hp"]["max_length"], **settings}
    return trained(job, SFTTrainer, SFTConfig, settings, Dataset.from_list, processing_class=tokenizer(job))


def tokenizer(job: dict):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["spec"]["locations"]["model"])


def trained(job: dict, base, arguments, settings: dict, rows=list, prepare: bool = False, **more) -> dict:
    import torch
    import transformers
    from accelerate import PartialState
    from torch.utils.data import SequentialSampler

    from harness.measuring import Meter, StepClock

    if not settings.get("torch_compile"):  # where it would copy every layer's keys and values at all widths
        import harness.training.attention  # noqa: F401  repairs transformers' own (pytorch#191937)

    cuda, spec, hp = torch.cuda.is_available(), job["spec"], job["spec"]["hp"]
    device = PartialState(cpu=not cuda).device  # taken before the card's level is read, as Tuneoff does
    meter, clock = Meter(device), StepClock(device)
    plan = [row for step in json.loads(Path(job["plan"]).read_text("utf-8")) for row in step]
    size = hp["batch_size"]
    parts = size // MICRO if job["precision"] == "fp32" and size % MICRO == 0 else 1
    losses, norms, ends, read = [], [], [], []

    class Timed(base):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args, **kwargs):
            made = super().create_optimizer(*args, **kwargs)
            for group in made.param_groups:  # Trainer leaves galore-torch its own, 1e-6
                group["eps"] = hp["epsilon"]
            return made

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.step = clock.step()
            self.step.__enter__()

        def on_step_end(self, *_, **__):
            self.step.__exit__(None, None, None)
            ends.append(time.perf_counter())

    with meter.phase("load"), tempfile.TemporaryDirectory() as folder:
        transformers.set_seed(spec["seed"])
        model = adapted(job, device, prepare)
        options = arguments(
            output_dir=folder, seed=spec["seed"], max_steps=job["steps"], use_cpu=not cuda,
            per_device_train_batch_size=size // parts, gradient_accumulation_steps=parts,
            learning_rate=hp["learning_rate"], lr_scheduler_type="constant",
            adam_epsilon=hp["epsilon"], max_grad_norm=hp["max_grad_norm"], bf16=job["precision"] == "bf16",
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would wait for the device at each step, and hide what is NaN
            **GALORE if spec["method"] == "galore" else {}, **settings,
        )  # fmt: skip
        trainer = Timed(model, options, train_dataset=rows(plan), callbacks=[Clock()], **more)
        trainer.data_collator = partial(counted, trainer.data_collator, read)
        trainer.accelerator.clip_grad_norm_ = partial(kept, trainer.accelerator.clip_grad_norm_, norms)
    mark(job, "model")
    with meter.phase("train"):
        trainer.train()
    mark(job, "steps")
    seconds, read = clock.read(), read[: len(losses)]  # the loader may be ahead
    phase = meter.phases["train"]
    return {
        "losses": torch.stack(losses).view(-1, parts).sum(1).tolist(),
        "norms": [float(norm) for norm in norms],
        "seconds": seconds,
        "ends": ends,
        "compile": 0.0,
        "tokens": sum(real for real, _ in read),
        "padded": sum(held - real for real, held in read),
        "allocated": phase.peak_allocated,
        "device": phase.peak_device,
        "resident": phase.peak_host,
        "disturbed": meter.contention.reasons(seconds[len(seconds) // 3 :]) or [],
        "kernels": "prepare_model_for_kbit_training, checkpointing" if prepare else None,
    }


def counted(collate, read: list, rows: list) -> dict:
    """A batch, of which `read` takes the tokens that are no padding, and all that are held."""
    batch = collate(rows)
    read.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
    return batch


def kept(clip, norms: list, *args, **kwargs):
    norm = clip(*args, **kwargs)
    norms.append(norm)
    return norm


def adapted(job: dict, device, prepare: bool):
    """The model of a peer, with the adapters that methods/ have by default: rank 8, alpha 16, all linear."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    method, folder = job["spec"]["method"], job["spec"]["locations"]["model"]
    whole = method in ("full", "galore")
    # What is trained is held in fp32 under autocast, as Tuneoff's: of these, all.
    dtype = torch.float32 if whole or job["precision"] == "fp32" else torch.bfloat16
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=dtype, device_map={"": device})
    if whole:
        return load()
    if method == "qlora":
        from methods.qlora import load_nf4

        model = load_nf4(load)  # from_pretrained with bitsandbytes' configuration
    else:
        model = load()
    if prepare:
        model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    return started(peft.get_peft_model(model, config), job["start"])


# What all contenders of a call share


def ground(job: dict, settings: dict) -> dict:
    """-> the ceiling of the device. Leaves the weights, where they are to be drawn."""
    if settings["draws"]:
        draw(job["spec"]["locations"]["model"])
        mark(job, "model")
    return ceiling(job["precision"])


def draw(folder: str) -> None:
    """A model of the folder's architecture with random weights, drawn once: all types are cast from them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def ceiling(precision: str) -> dict:
    """FLOP/s of a large matrix product in the contenders' precision, on this very device."""
    import torch

    cuda = torch.cuda.is_available()
    n = 8192 if cuda else 1024  # side of the matrices
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu").to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if cuda else int
    seconds = []
    for _ in range(10):  # of five products each, so that launching is nothing
        wait()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        wait()
        seconds.append((time.perf_counter() - start) / 5)
    name = torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}"
    return {"flops": 2 * n**3 / median(seconds[5:]), "device": name, "torch": torch.__version__}


DOORS = {"tuneoff": tuneoff, "trainer": trainer, "trl": trl, "ground": ground}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # no thread that a library has left holds up the next
