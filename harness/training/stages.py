"""One RunSpec becomes one RunRecord."""

import random
import shutil
import time
import traceback
from collections.abc import Callable
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
from harness.ranks import ALONE, Place
from harness.record import EAGER, Data, Phase, RunRecord, Sizes, answers_hash
from harness.spec import Hyperparams, RunSpec, content_hash
from harness.store import (
    CHECKPOINTS,
    EVENTS,
    MODEL,
    OUTPUTS,
    UNSEEN,
    append,
    leave,
    weights_digest,
    weights_in,
)  # fmt: skip
from harness.training import evaluation, weights
from harness.training.checkpoint import Checkpoints
from harness.training.devices import Devices
from harness.training.graphs import workspaces
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
from harness.training.run import Run, called
from harness.training.sharding import shard, whole_again

FULL = "No space left"  # of a disk, in whichever library's words
LEAP = 3  # times the first loss: batches of one training are not so far apart


def execute(
    spec: RunSpec, method: Method, record: RunRecord, folder: Path, every: float = 0.0, place: Place = ALONE
) -> None:
    """Fills the record as far as it comes, and leaves the outputs and the trained model in the folder, and
    checkpoints `every` so many seconds of a training. Of several devices, that of rank 0 does; the others
    compute, and tell it what they have measured."""
    if place.rank or spec.own_hp.sharding == "full":  # a checkpoint is one device's, which has the whole
        every = 0.0
    model, run = opened(spec, method, record, folder, place)
    run.checkpoints = Checkpoints(folder / CHECKPOINTS, run, every)
    if spec.trains:
        model = trained(model, run)
    else:
        record.sizes = Sizes(**sizes(model.requires_grad_(False)))
    if not record.judged_by_loss:
        scored(model, run, folder)
    gather(run)
    if spec.leaves_model and not spec.trial and not place.rank:
        save_model(model, run, folder)


def scored(model, run: Run, folder: Path) -> None:
    """Leaves the outputs."""
    spec, record = run.record.spec, run.record
    outputs = evaluation.test(model, run, run.scored)
    before = outputs if spec.method == "base" else evaluation.outputs_before(spec.locations.get("before"))
    if any(example.prompt and not example.rejected_ids for example in run.scored):
        record.hashes["before"] = answers_hash(before)
    evaluation.add_margins(model, outputs, before, run)
    record.hashes["outputs"] = left(outputs, folder / OUTPUTS, run)
    if unseen := run.splits.get("unseen"):
        outputs = evaluation.test(model, run, unseen)
        record.hashes["unseen_outputs"] = left(outputs, folder / UNSEEN, run)


def left(outputs: list[dict], file: Path, run: Run) -> str | None:
    """The hash of the file, which is rank 0's."""
    if run.devices.rank:
        return None
    for output in outputs:
        append(file, output)
    return content_hash(file)


def gather(run: Run) -> None:
    """What each device has measured: seconds are those of rank 0, joules those of all, peaks the highest."""
    phases = run.record.phases
    run.record.ranks = run.devices.gathered(dict(phases)) if run.devices.count > 1 else []
    for others in run.record.ranks[1:]:
        for name in phases.keys() & others.keys():
            phases[name] = together(phases[name], others[name])


def together(first: Phase, other: Phase) -> Phase:
    def of(name: str, how: Callable):
        values = [value for one in (first, other) if (value := getattr(one, name)) is not None]
        return how(values) if values else None

    peaks = {name: of(name, max) for name in ("peak_allocated", "peak_reserved", "peak_device", "peak_host")}
    return replace(first, joules=of("joules", sum), **peaks)


def opened(spec: RunSpec, method: Method, record: RunRecord, folder: Path, place: Place = ALONE):
    """-> the model as the method loads it, and the run that it is trained and evaluated in."""

    def report(**values):
        if place.rank:
            return
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
    meter = Meter(accelerator.device, lambda name: report(phase=name), place.others)
    if meter.card and meter.card.before and meter.card.before > machine.BUSY_BYTES:
        record.warnings.append(
            f"{meter.card.before / 2**30:.1f} GiB of the card were in use before the run: its times and "
            "device memory are not its own"
        )
    devices = Devices.joined(place)  # what NCCL takes of the card is the run's
    workspaces()
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
            devices=devices,
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


def attached(model, run: Run):
    """-> the model with what the method trains, and the types that this was loaded in: by parameter, and by
    name of what lies in parts."""
    method, record = run.method, run.record
    record.hashes["batches"], record.tokens.sampled = run.batches.hashes, 0
    loaded: dict = {}
    with run.meter.phase("attach"), tokens_read(model, run.meter) as read:
        model = method.attach(model, run)
        run.devices.same(model)
        types = weights.loaded_types(model)
        weights.one_arithmetic(model, types)
        if run.hp.sharding == "full":
            loaded = {name: types[p] for name, p in model.named_parameters() if p in types}
            run.whole = shard(model, run.devices.count, record.provenance.precision)
            types = {p: loaded[name] for name, p in model.named_parameters() if name in loaded}
        record.weights = weights.master_weights(model, record.provenance.precision)
    torch.cuda.empty_cache()  # a start may have taken more than a step
    record.sizes = Sizes(**sizes(model))
    if not types:
        raise ValueError(f"{method.name} attached nothing to train")
    record.tokens.attach = sum(run.devices.gathered(int(sum(read))))
    return model, types, loaded


def trained(model, run: Run):
    """-> the model as the method keeps it."""
    method, record = run.method, run.record
    model, types, loaded = attached(model, run)
    start = weights.fingerprints(types)
    kept = run.checkpoints.newest(model) if run.checkpoints else None
    went_on = kept is not None
    if len(set(run.devices.gathered(kept and kept["done"]))) > 1:
        raise RuntimeError("not every device could read the same checkpoint: the same command tries again")
    if not went_on:
        if not method.starts_at_base and not record.spec.trial:
            record.start = metrics.total(evaluation.test(model, run, run.scored), run.dataset)
        record.validation = [{"step": 0, "loss": evaluation.validate(model, run)}]
        record.memory = rehearsed(model, run)
    if run.device.type == "cpu" and not (went_on or record.memory):
        record.warnings.append("live tensors could not be counted here: peak memory is unknown")
    if kept:
        run.report(earlier=sum(phase.seconds for phase in kept["record"].phases.values()))
    run.report = with_progress(run, sum(kept["steps"]["seconds"]) if kept else 0.0)
    loop = train(model, run, kept)
    if record.memory:  # where no allocator counts
        record.phases["train"].peak_allocated = record.memory.peak
    alike = [] if record.tokens.sampled else record.step_seconds[record.warmup_steps :]
    record.disturbed = run.meter.contention.reasons(alike)
    record.warnings += leaps(record)
    end = weights.fingerprints(types)
    weights.check(start, end, record.training)
    if not run.sharded and any(other != end for other in run.devices.gathered(end)):
        record.warnings.append("the devices' weights are not the same to the bit after the last step")
    if len(ways := dict.fromkeys(run.devices.gathered(record.kernels.rung or EAGER))) > 1:
        record.warnings.append(f"its devices computed steps in different ways: {', '.join(ways)}")
    record.sizes.optimizer_bytes = optimizer_bytes(loop.optimizer)
    del loop
    model.zero_grad()
    if run.sharded:
        model, run.whole = whole_again(run.whole, loaded), called
    else:
        weights.put_back(types)
    return method.keep(model, run)  # what is kept is what is scored


def leaps(record: RunRecord) -> list[str]:
    """Whether the loss was once far above its first; of other objectives a loss has no such scale."""
    losses = [point["loss"] for point in record.training]
    if record.card.get("objective", "sft") != "sft" or not losses or not 0 < LEAP * losses[0] < max(losses):
        return []
    times, step = max(losses) / losses[0], losses.index(max(losses)) + 1
    return [f"the loss was {times:.1f} times its first at step {step} of {len(losses)}: a lower "
            "hp.learning_rate, or a longer hp.warmup_ratio, may be steadier"]  # fmt: skip


def with_progress(run: Run, earlier: float = 0.0):
    """Adds to a step's event what progress shows: tokens so far, seconds, peak bytes. `earlier`: seconds of
    the steps that were made before the training was stopped, whose tokens count as well."""
    report, started, tokens = run.report, time.perf_counter() - earlier, [*accumulate(run.batches.tokens)]

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
    record.warnings.append(
        f"the trained model of {record.spec.folder} was not saved, so the same command runs it again"
    )
    leave(record, folder)

    def write() -> None:
        (folder / MODEL).mkdir()
        run.method.save(model, folder / MODEL)
        run.template.tokenizer.save_pretrained(folder / MODEL)
        nameless(folder / MODEL, record.spec.hub_model)

    try:
        with run.meter.phase("save"):
            try:
                write()
            except Exception as error:
                if FULL not in str(error) or not (folder / CHECKPOINTS).is_dir():
                    raise
                # Its checkpoints, larger than a model and done with, make room for it.
                for taken in (MODEL, CHECKPOINTS):
                    shutil.rmtree(folder / taken, ignore_errors=True)
                write()
            sizes = [file.stat().st_size for file in weights_in(folder / MODEL)]
            record.hashes["model"] = weights_digest(folder / MODEL)
        if sizes:
            record.sizes.saved_bytes = sum(sizes)
            record.warnings.pop()
        else:
            record.warnings[-1] += ": it wrote no weights"
    except BaseException as error:
        traceback.print_exc()
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # half a model is none, and fills the disk
        said = f"{type(error).__name__}: {redacted(' '.join(str(error).split()))[:300]}"
        record.warnings[-1] += ": the disk is full" if FULL in said else f": {said}"


def capped(gib: float) -> None:
    """Lets torch's allocator take so much of the card and no more; 0: all."""
    if gib and torch.cuda.is_available():
        share = gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
