"""One RunSpec becomes one RunRecord."""

import random
import shutil
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from harness import machine, metrics
from harness.data import COUNTED, Example, Template, answered, examples_hash, study, token_rows
from harness.errors import BadRequest
from harness.keeping import nameless
from harness.measuring import Meter, host_peak
from harness.method import Method
from harness.plain import redacted
from harness.record import Data, RunRecord, Sizes, answers_hash
from harness.spec import Hyperparams, RunSpec, content_hash
from harness.store import CHECKPOINTS, EVENTS, MODEL, OUTPUTS, UNSEEN, append, leave
from harness.training import evaluation, weights
from harness.training.checkpoint import Checkpoints
from harness.training.loop import rehearsed, train
from harness.training.model import (
    check_model,
    limit_hub,
    load_base,
    load_tokenizer,
    optimizer_bytes,
    resolve_precision,
    sizes,
    stop_tokens,
)  # fmt: skip
from harness.training.reading import tokens_read
from harness.training.run import Run


def execute(spec: RunSpec, method: Method, record: RunRecord, folder: Path, every: float = 0.0) -> None:
    """Fills the record as far as it comes, and leaves the outputs and the trained model in the folder, and
    checkpoints `every` so many seconds of a training."""
    model, run = opened(spec, method, record, folder)
    run.checkpoints = Checkpoints(folder / CHECKPOINTS, run, every)
    if spec.trains:
        model = trained(model, run)
    else:
        record.sizes = Sizes(**sizes(model.requires_grad_(False)))
    if record.judged_by_loss:
        return
    outputs = evaluation.test(model, run, run.scored)
    before = outputs if spec.method == "base" else evaluation.outputs_before(spec.locations.get("before"))
    if any(example.prompt and not example.rejected_ids for example in run.scored):
        record.hashes["before"] = answers_hash(before)
    evaluation.add_margins(model, outputs, before, run)
    for output in outputs:
        append(folder / OUTPUTS, output)
    record.hashes["outputs"] = content_hash(folder / OUTPUTS)
    if unseen := run.splits.get("unseen"):
        for output in evaluation.test(model, run, unseen):
            append(folder / UNSEEN, output)
        record.hashes["unseen_outputs"] = content_hash(folder / UNSEEN)
    if spec.leaves_model and not spec.trial:
        save_model(model, run, folder)


def opened(spec: RunSpec, method: Method, record: RunRecord, folder: Path):
    """-> the model as the method loads it, and the run that it is trained and evaluated in."""

    def report(**values):
        with suppress(OSError):  # a full disk: what is only shown does not end a run
            append(folder / EVENTS, values)

    hp = method.own(spec.own_hp)
    precision = resolve_precision(hp.precision)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],  # what a graph replays is cast anew
    )
    capped(hp.memory_cap)
    meter = Meter(accelerator.device, on_enter=lambda name: report(phase=name))
    if meter.card and meter.card.before and meter.card.before > machine.BUSY_BYTES:
        record.warnings.append(
            f"{meter.card.before / 2**30:.1f} GiB of the card were in use before the run: its times and "
            "device memory are not its own"
        )
    record.phases = meter.phases
    record.provenance = replace(machine.provenance(precision), at_once=record.provenance.at_once)
    seed_everything(spec.seed)
    # cuDNN's attention builds a plan for each new length, a tenth of a second: more than a small step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    limit_hub()
    load = partial(
        load_base, spec, torch.bfloat16 if precision == "bf16" else torch.float32, accelerator.device
    )
    with meter.phase("load"):
        template, splits = read_data(spec, hp, record)
        model = method.load(load)
        stops = stop_tokens(template, model, splits["train"])
        run = Run(
            method, hp, spec.seed, splits, dataset=spec.dataset, template=template, stops=stops,
            accelerator=accelerator, meter=meter, record=record, load_base=load, report=report,
        )  # fmt: skip
        record.signatures = {name: m.signature(spec.dataset) for name, m in metrics.METRICS.items()}
        record.provenance.attention = model.config._attn_implementation
        record.provenance.model_revision = getattr(model.config, "_commit_hash", None)
        check_model(model, run)
    return model, run


def read_data(spec: RunSpec, hp: Hyperparams, record: RunRecord) -> tuple[Template, dict[str, list[Example]]]:
    """-> the template of this model, and the examples of each split."""
    template = Template(load_tokenizer(spec), spec.dataset["template"], spec.dataset.get("loss", "all"))
    read = token_rows(spec.dataset, spec.locations.get("sources", {}), template, hp.max_length)
    for split, rows in read.rows.items():
        record.hashes[split] = examples_hash(rows)
        if spec.dataset.get(split, True) and not rows:
            why = {what: read.left_out.get(f"{split}_{what}", 0) for what in COUNTED}
            raise BadRequest(
                f"no {split} row is left: {why['too_long']} prompts fill "
                f"hp.max_length={hp.max_length} tokens, {why['refused']} the chat template refuses"
                + (f", {why['answered']} are answered in training" if why["answered"] else "")
            )
    train = read.rows["train"]
    record.data = Data(
        rows={split: len(rows) for split, rows in read.rows.items()},
        left_out={what: count for what, count in read.left_out.items() if count},
        refused=read.refused,
        answered={split: answered(rows, train) for split, rows in read.rows.items() if split != "train"},
        unused=read.unused,
        revisions=read.revisions,
        origins=read.origins,
        template=template.kind,
        loss=template.loss,
        plain_text=all(not example.prompt for example in train),
    )
    record.study = study(template.tokenizer, read.sample, template.loss)
    shown = ("train", "validation") if spec.trial else read.rows  # to a search
    return template, {split: read.rows[split] if split in shown else [] for split in read.rows}


def trained(model, run: Run):
    """-> the model as the method keeps it."""
    method, record = run.method, run.record
    record.hashes["batches"], record.tokens.sampled = run.batches.hashes, 0
    with run.meter.phase("attach"), tokens_read(model, run.meter) as read:
        model = method.attach(model, run)
        types = weights.loaded_types(model)
        record.weights = weights.master_weights(model, record.provenance.precision)
        weights.one_arithmetic(model, types)
    record.sizes = Sizes(**sizes(model))
    if not types:
        raise ValueError(f"{method.name} attached nothing to train")
    record.tokens.attach = int(sum(read))
    start = weights.fingerprints(types)
    kept = run.checkpoints.newest(model) if run.checkpoints else None
    went_on = kept is not None
    if not went_on:
        if not method.starts_at_base and not record.spec.trial:
            record.start = metrics.total(evaluation.test(model, run, run.scored), run.dataset)
        record.validation = [{"step": 0, "loss": evaluation.validate(model, run)}]
        record.memory = rehearsed(model, run)
    if run.device.type == "cpu" and not (went_on or record.memory):
        record.warnings.append("live tensors could not be counted here: peak memory is unknown")
    run.report = with_progress(run)
    loop = train(model, run, kept)
    if record.memory:  # where no allocator counts
        record.phases["train"].peak_allocated = record.memory.peak
    alike = [] if record.tokens.sampled else record.step_seconds[record.warmup_steps :]
    record.disturbed = run.meter.contention.reasons(alike)
    weights.check(start, weights.fingerprints(types), record.training)
    record.sizes.optimizer_bytes = optimizer_bytes(loop.optimizer)
    del loop
    model.zero_grad()
    weights.put_back(types)
    return method.keep(model, run)  # what is kept is what is scored


def with_progress(run: Run):
    """Adds to a step's event what progress shows: tokens so far, seconds, peak bytes."""
    report, started, tokens = run.report, time.perf_counter(), list(accumulate(run.batches.tokens))

    def told(**values):
        if "step" in values:
            cuda, rehearsed = torch.cuda.is_available(), run.record.memory
            peak = run.meter.allocated() if cuda else rehearsed.peak if rehearsed else host_peak()
            seconds = time.perf_counter() - started
            values |= {"tokens": tokens[values["step"] - 1], "seconds": seconds, "peak": peak}
        report(**values)

    return told


def save_model(model, run: Run, folder: Path) -> None:
    """Writes the trained model after what was measured: a full disk, a fault of the method's or a kill
    costs the model alone."""
    record = run.record
    record.status = "ok"
    record.warnings.append(f"the trained model of {record.spec.folder} was not saved")
    leave(record, folder)
    try:
        with run.meter.phase("save"):
            (folder / MODEL).mkdir()
            run.method.save(model, folder / MODEL)
            run.template.tokenizer.save_pretrained(folder / MODEL)
            nameless(folder / MODEL, record.spec.hub_model)
        sizes = [file.stat().st_size for file in (folder / MODEL).rglob("*.safetensors")]
        if sizes:
            record.sizes.saved_bytes = sum(sizes)
            record.warnings.pop()
        else:
            record.warnings[-1] += ": it wrote no weights"
    except BaseException as error:
        traceback.print_exc()
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # half a model is none, and fills the disk
        record.warnings[-1] += f": {type(error).__name__}: {redacted(' '.join(str(error).split()))[:300]}"


def capped(gib: float) -> None:
    """Lets torch's allocator take so much of the card and no more; 0: all."""
    if gib and torch.cuda.is_available():
        share = gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
