"""The one loop: every method's optimizer steps, under the same batches, schedule, clipping and clock."""

import math

import torch
from transformers import get_scheduler

from harness.batches import Batches
from harness.meter import StepClock
from harness.spec import Hyperparams

WARMUP_STEPS = 5  # first steps pay for lazy initialisation; a quarter of the steps if there are few


class Diverged(Exception):
    """A loss was not a finite number."""


def train(method, model, batches: Batches, hp: Hyperparams, accelerator, meter, record, report, validate):
    """Trains in place. -> the optimizer.

    Writes training, validation, step_seconds, warmup_steps and tokens of a RunRecord as it goes, so
    that a run that breaks keeps its curves. `report(**values)` is told of each step; `validate()` -> mean
    loss on the validation rows, off the training's clock. Raises Diverged at a loss that is not
    finite.
    """
    with meter.phase("train"):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = method.optimizer(model, hp)
        total = len(batches)
        warmup = min(math.ceil(hp.warmup_ratio * total), total - 1)  # a lone step is no warm-up
        scheduler = get_scheduler(hp.schedule, optimizer, warmup, total)
        clock = StepClock(accelerator.device)
        points = validation_points(total, hp.validations)
        record.warmup_steps = min(WARMUP_STEPS, total // 4)
        read = []
        pending = None  # a step is settled one late, so that the device never waits for the host

        def settle() -> None:
            nonlocal pending
            if pending:
                entry, pending = floats(pending), None
                record.training.append(entry)
                report(step=entry["step"], steps=total, loss=entry["loss"])
                if not math.isfinite(entry["loss"]):
                    raise Diverged(f"the loss was {entry['loss']} at step {entry['step']} of {total}")

        model.train()
        for step, micro_batches in enumerate(batches, 1):
            with clock.step():
                learning_rate = scheduler.get_last_lr()[0]
                micro_batches = method.prepare(model, micro_batches)
                read.append(tokens_of(micro_batches))
                loss = accumulate(method, model, micro_batches, accelerator)
                norm = None
                if hp.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(parameters, hp.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            settle()
            pending = {"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm}
            if step in points:
                settle()
                record.validation.append({"step": step, "loss": validate()})
                model.train()
        settle()
        record.step_seconds = clock.read()
        counts = torch.stack(read).sum(0).tolist()
        record.tokens |= dict(zip(("trained", "supervised", "padded"), counts, strict=True))
    return optimizer


def accumulate(method, model, micro_batches: list[dict], accelerator) -> torch.Tensor:
    """Gradients of the mean loss over all target tokens of the step (or its rows, if the method's
    loss is a mean over rows), however it is cut into micro-batches. -> that mean, detached."""
    weights = [targets(b) if method.mean_over == "tokens" else len(b["labels"]) for b in micro_batches]
    total = sum(weights)
    mean = 0.0
    for batch, weight in zip(micro_batches, weights, strict=True):
        with accelerator.autocast():
            loss = method.loss(model, batch) * (weight / total)
        accelerator.backward(loss)
        mean = mean + loss.detach()
    return mean


def targets(batch: dict) -> torch.Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def tokens_of(micro_batches: list[dict]) -> torch.Tensor:
    """(3,): tokens read by the model, those that carry loss, and the padding read for nothing."""
    read = sum(batch["attention_mask"].sum() for batch in micro_batches)
    slots = sum(batch["attention_mask"].numel() for batch in micro_batches)
    return torch.stack([read, sum(map(targets, micro_batches)), slots - read])


def floats(entry: dict) -> dict:
    """The numbers of a step, fetched from the device."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in entry.items()}


def validation_points(total: int, points: int) -> set[int]:
    """Evenly spaced steps, the last one included."""
    return {math.ceil(total * i / points) for i in range(1, points + 1)} if points else set()
