"""The one loop: every method's optimizer steps, under the same batches, schedule, clipping and clock."""

import math
from contextlib import nullcontext

import torch
from transformers import get_scheduler

from harness.data import Batches
from harness.measuring.meter import StepClock
from harness.spec import Hyperparams
from harness.training import head

PIECE = 2**22  # values of a tensor looked at together: 32 MiB as sums of 64 bits
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> what reads them as a number
WARMUP_STEPS = 5  # first steps pay for lazy initialisation; a quarter of the steps if there are few


class Diverged(Exception):
    """What training computes, or what it left, is not a finite number."""


def train(method, model, batches: Batches, hp: Hyperparams, accelerator, meter, record, report, validate):
    """Trains in place. -> the optimizer.

    Writes training, validation, step_seconds, warmup_steps, arithmetic, tokens and hashes of a RunRecord
    as it goes, so that a run that breaks keeps its curves. `report(**values)` is told of each step;
    `validate()` -> mean loss on the validation rows, off the training's clock. Raises Diverged at a loss or
    a gradient norm that is not finite.
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
        reading = head.causal_lm(model).reading = Reading()
        pending = None  # a step is settled one late, so that the device never waits for the host

        def settle() -> None:
            nonlocal pending
            if pending:
                entry, pending = floats(pending), None
                record.training.append(entry)
                report(step=entry["step"], steps=total, loss=entry["loss"])
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(entry[name] or 0.0):
                        what = f"the {name.replace('grad', 'gradient').replace('_', ' ')} was {entry[name]}"
                        raise Diverged(f"{what} at step {entry['step']} of {total}")

        model.train()
        for step, micro_batches in enumerate(batches, 1):
            with clock.step():
                learning_rate = scheduler.get_last_lr()[0]
                micro_batches = method.prepare(model, micro_batches)
                with head.arithmetic(model) if step == 1 else nullcontext({}) as types:
                    loss = accumulate(method, model, micro_batches, accelerator)
                record.arithmetic |= {"training": types} if types else {}
                reading.end_step(micro_batches)
                if hp.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(parameters, hp.max_grad_norm)
                else:
                    norm = gradient_norm(parameters)
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
        head.causal_lm(model).reading = None
        record.tokens |= reading.tokens()
        record.hashes |= reading.hashes()
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


def gradient_norm(parameters: list) -> torch.Tensor | None:
    """Over all trained parameters; null where a method has used and freed its gradients already."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


class Reading:
    """What the model was given in each step of a training, and what of it carried loss: as the loss read
    it, whatever was planned.

    A row's hash is of its tokens and their places, a step's the sum over its rows, so that padding, packing
    and micro-batches change nothing. All is made on the device, which never waits for it.
    """

    def __init__(self):
        self.steps, self.now = [], []
        self.rows, self.seen = set(), True

    def __call__(self, batch: dict) -> None:
        """Is told by harness/head.py of each batch that is read for its gradients."""
        mask, labels = batch["attention_mask"], batch["labels"]
        places = batch["position_ids"] + 1 if "position_ids" in batch else mask.cumsum(1)  # (B, T), from 1
        carries = labels != -100
        carries[:, 0] = False  # nothing stands before it that could foretell it
        tokens, chosen = torch.stack([batch["input_ids"], labels]), torch.stack([mask.bool(), carries])
        hashes = mixed(by_row(mixed((places << 32) + tokens + 1) * chosen, batch)).sum(1)
        counts = chosen.sum((1, 2))
        self.now.append(torch.cat([hashes, counts, mask.numel() - counts[:1]]))
        self.rows |= {row.id for row in batch.get("rows", ())}

    def end_step(self, micro_batches: list[dict]) -> None:
        """A loss that goes its own way past harness/head.py is taken to read what it was handed: that is
        counted, but not certified."""
        if not self.now:
            self.seen = False
            for batch in micro_batches:
                self(batch)
        self.steps.append(torch.stack(self.now).sum(0))
        self.now = []

    def tokens(self) -> dict:
        counts = torch.stack(self.steps)[:, 2:].sum(0).tolist()
        return dict(zip(("trained", "supervised", "padded"), counts, strict=True)) | {"rows": len(self.rows)}

    def hashes(self) -> dict:
        """A hash a step, of what was given and of what was learned."""
        if not self.seen:
            return {}
        given, learned = torch.stack(self.steps)[:, :2].T.tolist()
        return {"given": list(map(digits, given)), "learned": list(map(digits, learned))}


def by_row(values: torch.Tensor, batch: dict) -> torch.Tensor:
    """(2, B, T) -> (2, rows): sums over rows; where they are packed, a new one begins at each place 0."""
    if "position_ids" not in batch:
        return values.sum(2)
    values, row = values.flatten(1), (batch["position_ids"] == 0).flatten().cumsum(0)
    return values.new_zeros(2, len(row) + 1).index_add(1, row, values)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Every bit of x into every other one, as splitmix64 does it: sums of such tell sets apart. 0 stays 0."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * (factor - 2**64)  # as a signed number
    return x ^ x >> 31


def digits(number: int) -> str:
    return f"{number % 2**64:016x}"


# What the training left


def fingerprints(types: dict) -> list[list[int]]:
    """Of each tensor, in the type that it will be kept in, the sum of its bits, which a change changes, and
    how many values are not finite."""

    def fingerprint(tensor, kept):
        pieces = [p.to(kept) for p in tensor.detach().flatten().split(PIECE)]
        return torch.stack([sum(p.view(BITS[p.element_size()]).sum() for p in pieces),
                            sum(p.isfinite().logical_not().sum() for p in pieces)])  # fmt: skip

    return torch.stack([fingerprint(parameter, kept) for parameter, kept in types.items()]).tolist()


def check(before: list, after: list, training: list[dict]) -> None:
    """Of the fingerprints of what was trained. Raises Diverged where it is not finite, ValueError where
    nothing was trained."""
    if broken := sum(bad > 0 for _, bad in after):
        raise Diverged(f"{broken} of {len(after)} trained tensors were not finite after the last step")
    norms = [step["grad_norm"] for step in training if step["grad_norm"] is not None]
    if norms and not any(norms):
        raise ValueError(
            f"nothing was trained: the gradient was zero in all {len(norms)} steps, as nothing that is "
            "trained acts on this loss. Other data, or other options of the method, may help"
        )
    if before == after:
        raise ValueError(
            f"nothing was trained: no weight moved in {len(training)} steps, as far as the type that it is "
            "kept in can tell. Raise hp.learning_rate"
        )


def floats(entry: dict) -> dict:
    """The numbers of a step, fetched from the device."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in entry.items()}


def validation_points(total: int, points: int) -> set[int]:
    """Evenly spaced steps, the last one included."""
    points = min(points, total)
    return {math.ceil(total * i / points) for i in range(1, points + 1)} if points else set()
