"""The one loop: every method's optimizer steps, under the same batches, schedule, clipping and clock."""

import math

import torch
from transformers import get_scheduler

from harness.data import Batches
from harness.meter import StepClock
from harness.spec import Hyperparams

WARMUP_STEPS = 5  # first steps pay for lazy initialisation; a quarter of the steps if there are few


class Diverged(Exception):
    """A loss was not a finite number."""


def train(method, model, batches: Batches, hp: Hyperparams, accelerator, meter, report, validate):
    """Trains in place. -> (optimizer, what was measured: fields of a RunRecord).

    `report(**values)` is told of each step; `validate()` -> mean loss on the validation rows, off the
    training's clock. Raises Diverged at a loss that is not finite.
    """
    with meter.phase("train"):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = method.optimizer(model, hp)
        total = len(batches)
        scheduler = get_scheduler(hp.schedule, optimizer, math.ceil(hp.warmup_ratio * total), total)
        clock = StepClock(accelerator.device)
        points = validation_points(total, hp.validations)
        training, validation = [], []
        model.train()
        for step, micro_batches in enumerate(batches, 1):
            with clock.step():
                learning_rate = scheduler.get_last_lr()[0]
                loss = accumulate(method, model, micro_batches, accelerator)
                norm = None
                if hp.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(parameters, hp.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            training.append({"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm})
            if step > 1:  # one step late, so that the device never waits for the host
                settle(training[-2], report, total)
            if step in points:
                settle(training[-1], report, total)
                validation.append({"step": step, "loss": validate()})
                model.train()
        settle(training[-1], report, total)
    return optimizer, {
        "training": training,
        "validation": validation,
        "step_seconds": clock.read(),
        "warmup_steps": min(WARMUP_STEPS, total // 4),
    }


def accumulate(method, model, micro_batches: list[dict], accelerator) -> torch.Tensor:
    """Gradients of the mean loss over all target tokens of the step, however it is cut into
    micro-batches. -> that mean, detached."""
    targets = [(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]
    total = sum(targets)
    mean = 0.0
    for batch, count in zip(micro_batches, targets, strict=True):
        with accelerator.autocast():
            loss = method.loss(model, batch) * (count / total)
        accelerator.backward(loss)
        mean = mean + loss.detach()
    return mean


def settle(entry: dict, report, total: int) -> None:
    """Fetches a step's numbers from the device, once, and looks at the loss."""
    if isinstance(entry["loss"], float):
        return
    entry["loss"] = float(entry["loss"])
    entry["grad_norm"] = None if entry["grad_norm"] is None else float(entry["grad_norm"])
    report(step=entry["step"], steps=total, loss=entry["loss"])
    if not math.isfinite(entry["loss"]):
        raise Diverged(f"the loss was {entry['loss']} at step {entry['step']} of {total}")


def validation_points(total: int, points: int) -> set[int]:
    """After the first step's tenth, then evenly, the last step included."""
    return {math.ceil(total * i / points) for i in range(1, points + 1)} if points else set()
