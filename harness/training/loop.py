"""The one loop: every method's optimizer steps, under the same batches, schedule, clipping and clock."""

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import get_scheduler

from harness.measuring import LiveTensors, StepClock, rehearse
from harness.record import TIMED, Memory
from harness.spec import Hyperparams
from harness.training import evaluation, head
from harness.training.checkpoint import resume, take_record, to
from harness.training.kernels import Kernels
from harness.training.reading import Reading
from harness.training.reducer import Reducer
from harness.training.sharding import in_full
from harness.training.weights import Diverged

if TYPE_CHECKING:
    from harness.training.run import Run

WARMUP_STEPS = 5  # first steps pay for lazy initialisation; a quarter of the steps if there are few


def train(model, run: "Run", kept: dict | None = None) -> "Loop":
    """Trains in place, from its first step on or from what a checkpoint has `kept`. Fills the record as it
    goes, so that a run that breaks keeps its curves: training, validation, step_seconds, warmup_steps,
    arithmetic, tokens and hashes. Raises Diverged at a loss or a gradient norm that is not finite."""
    record = run.record
    record.warmup_steps = min(WARMUP_STEPS, run.steps // 4)
    points = validation_points(run.steps, run.hp.validations)
    checkpoints = run.checkpoints
    with run.meter.phase("train"), checkpoints.waiting() if checkpoints else nullcontext():
        loop, clock = Loop(model, run), StepClock(run.device)
        earlier = []  # seconds of steps that were made before it was stopped
        compiling = []  # seconds of it in each step
        unsettled = None  # a step is settled one late, so that the device never waits for the host

        def validated() -> None:
            """Of a point of the curve, unless it stands there: a stopped training may lack its last."""
            if loop.done not in points or any(point["step"] == loop.done for point in record.validation):
                return
            with checkpoints.between_steps() if checkpoints else nullcontext():
                record.validation.append({"step": loop.done, "loss": evaluation.validate(model, run)})
            model.train()

        def seconds() -> list[float]:
            return earlier + [max(0.0, s - c) for s, c in zip(clock.read(), compiling, strict=True)]

        if kept:
            with run.meter.phase("checkpoint"):
                try:
                    resume(loop, kept)
                    loop.reading.restore(to(kept["steps"]["reading"], run.device))
                except Exception as error:
                    shutil.rmtree(kept["path"], ignore_errors=True)  # else no run would ever begin again
                    what = f"its checkpoint of step {kept['done']} cannot be gone on from, and was removed"
                    raise RuntimeError(f"{what}. The same command goes on without it: {error}") from error
                take_record(run, kept)
            validated()
            earlier = kept["steps"]["seconds"]
            kept.clear()  # its copies of the weights
        if run.devices.rank and run.device.type == "cuda":
            torch.cuda.manual_seed(run.seed + run.devices.rank)  # other rows, another dropout
        for examples in islice(run.batches, loop.done, None):
            before = loop.kernels.seconds
            with clock.step():
                entry = loop.step(examples)
            compiling.append(loop.kernels.seconds - before)
            settle(unsettled, run)
            unsettled = Entry(entry)
            if loop.done in points:
                settle(unsettled, run)
                unsettled = None
                validated()
            if checkpoints and checkpoints.due(loop.done):
                settle(unsettled, run)
                unsettled = None
                checkpoints.write(loop, {"seconds": seconds(), "reading": loop.reading.state()})
        settle(unsettled, run)
        loop.kernels.verify()
        record.step_seconds = seconds()
        record.tokens = replace(record.tokens, **loop.reading.tokens())
        record.hashes |= loop.reading.hashes()
        run.reading, run.shapes = None, None
    loop.kernels.close()
    loop.reducer.close()
    return loop


class Loop:
    """The optimizer, its schedule, and how many steps are `done`."""

    def __init__(self, model, run: "Run"):
        hp, self.model, self.run, self.done = run.hp, model, run, 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Of weights in parts, sums are a part of each backward.
        self.reducer = Reducer(run.devices, [] if run.sharded else self.parameters)
        self.optimizer = run.method.optimizer(model, run)
        warmup = min(math.ceil(hp.warmup_ratio * run.steps), run.steps - 1)  # a lone step is no warm-up
        self.scheduler = get_scheduler(hp.schedule, self.optimizer, warmup, run.steps)
        self.reading = run.reading = Reading(run.devices, run.device)
        prepare_model(model.train(), hp)
        self.kernels = Kernels(model, run, self.reducer, self.optimizer)

    def step(self, examples: list) -> dict:
        """One optimizer step. -> its loss and the like, as tensors that nobody has waited for."""
        run, rate = self.run, self.scheduler.get_last_lr()[0]
        with run.decoder.asked(run.steps):
            batches = run.method.prepare(self.model, examples, run)
        self.kernels.ready(batches, self.done)
        known = self.done or "training" in run.record.arithmetic
        with nullcontext({}) if known else head.arithmetic(self.model) as types:
            loss = accumulate(batches, run, self.kernels.gradients, self.idle(len(batches), examples))
        run.record.arithmetic |= {"training": types} if types else {}
        self.reducer.add_up()  # before the loss is: its sum waits for the whole backward
        loss = run.total(loss)
        self.reading.end_step(batches)
        if run.hp.max_grad_norm:
            norm = run.accelerator.clip_grad_norm_(self.parameters, run.hp.max_grad_norm)
        else:
            norm = gradient_norm(self.parameters)
        norm = in_full(norm)
        self.optimizer.step()
        self.scheduler.step()
        self.kernels.zero_gradients()
        self.done += 1
        return {"step": self.done, "loss": loss, "learning_rate": rate, "grad_norm": norm}

    def idle(self, own: int, examples: list) -> list[dict]:
        """Weights in parts are gathered by all devices together: who has fewer micro-batches than others
        computes these for nothing."""
        missing = max(self.run.devices.gathered(own)) - own if self.run.sharded else 0
        if not missing:
            return []
        with self.run.devices.alone():
            return self.run.method.prepare(self.model, examples[:1], self.run)[:1] * missing


def rehearsed(model, run: "Run") -> Memory | None:
    """What two steps on the widest examples hold in live tensors; null where that cannot be rehearsed."""
    if run.sharded:
        return None

    def measure() -> Memory:
        run.report = run.meter.on_enter = lambda *_, **__: None  # a rehearsal is shown to nobody
        loop = Loop(model, run)
        examples = widest(run)
        with run.devices.silent(), LiveTensors(model, loop.optimizer) as live:
            loop.step(examples)
            loop.step(examples)
        return live.memory()

    return rehearse(measure)


def widest(run: "Run") -> list:
    """The examples of the step whose largest micro-batch has the most tokens, padding included."""

    def width(examples: list) -> int:
        parts, together = run.micro_batches(examples), run.shapes and run.shapes.packed
        lengths = ([row.length for row in rows] for rows in parts)
        return max((sum(n) if together else len(n) * max(n) for n in lengths), default=0)

    return max(run.batches, key=width)


def of_all_widths(run: "Run") -> list[list]:
    """The examples of TIMED steps, spread evenly over how many tokens steps have."""
    steps = sorted(zip(run.batches.tokens, run.batches, strict=True), key=lambda step: step[0])
    return [steps[(2 * i + 1) * run.steps // (2 * TIMED)][1] for i in range(TIMED)]


class Entry:
    """What a step gave, on its way from the device: nobody waits for later steps to know it."""

    def __init__(self, values: dict):
        self.values, self.arrived = values, None
        if any(torch.is_tensor(v) and v.is_cuda for v in values.values()):
            self.values = {
                name: v.to("cpu", non_blocking=True) if torch.is_tensor(v) else v
                for name, v in values.items()
            }
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict:
        if self.arrived:
            self.arrived.synchronize()
        return {name: v.item() if torch.is_tensor(v) else v for name, v in self.values.items()}


def settle(entry: Entry | None, run: "Run") -> None:
    """Takes a step into the record. Raises Diverged where it is not finite."""
    if entry is None:
        return
    values = entry.read()
    run.record.training.append(values)
    run.report(step=values["step"], steps=run.steps, loss=values["loss"])
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name] or 0.0):
            what = f"the {name.replace('grad', 'gradient').replace('_', ' ')} was {values[name]}"
            raise Diverged(f"{what} at step {values['step']} of {run.steps}")


def prepare_model(model, hp: Hyperparams) -> None:
    """What a model needs to be trained, whoever asks for its gradients."""
    if hp.gradient_checkpointing:
        head.causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})


def accumulate(
    batches: list[dict], run: "Run", gradients: Callable, idle: list[dict] | None = None
) -> torch.Tensor:
    """Gradients of the mean loss over all target tokens of the step (or its rows, if the method's
    loss is a mean over rows), however it is cut into micro-batches and these are spread over devices, whose
    gradients are then to be added up. -> this one's share of that mean, detached.
    `gradients(batch, share)` adds those of a micro-batch; of `idle` ones, nothing."""
    by_tokens = run.method.mean_over == "tokens"
    weights = [targets(batch) if by_tokens else len(batch["labels"]) for batch in batches]
    total = run.total(sum(weights))
    losses = (gradients(batch, weight / total) for batch, weight in zip(batches, weights, strict=True))
    loss = sum(losses, torch.zeros((), device=run.device))
    own, run.reading = run.reading, None if idle else run.reading
    for batch in idle or []:
        gradients(dict(batch), 0.0)
    run.reading = own
    return loss


def targets(batch: dict) -> torch.Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def gradient_norm(parameters: list) -> torch.Tensor | None:
    """Over all trained parameters; null where a method has used and freed its gradients already."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def validation_points(total: int, points: int) -> set[int]:
    """Evenly spaced steps, the last one included."""
    points = min(points, total)
    return {math.ceil(total * i / points) for i in range(1, points + 1)} if points else set()
