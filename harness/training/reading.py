"""What the model was given in each step of a training, and what of it carried loss."""

from contextlib import contextmanager

import torch

from harness.training.devices import Devices


class Reading:
    """As the loss read it, whatever was planned.

    A row's hash is of its tokens and their places, a step's the sum over its rows, so that padding, packing
    and micro-batches change nothing. All is made on the device, which never waits for it.
    """

    def __init__(self, devices: Devices | None = None, device: torch.device | str = "cpu"):
        self.devices, self.device = devices or Devices(), device
        self.steps: list[torch.Tensor] = []
        self.now: list[torch.Tensor] = []
        self.rows: set[str] = set()
        self.fresh: set[str] = set()  # of the step at hand
        self.seen = True

    def __call__(self, batch: dict) -> None:
        """Is told of each batch that is read for its gradients."""
        mask, labels = batch["attention_mask"], batch["labels"]
        places = batch["position_ids"] + 1 if "position_ids" in batch else mask.cumsum(1)  # (B, T), from 1
        carries = labels != -100
        carries[:, 0] = False  # nothing stands before it that could foretell it
        tokens, chosen = torch.stack([batch["input_ids"], labels]), torch.stack([mask.bool(), carries])
        hashes = mixed(by_row(mixed((places << 32) + tokens + 1) * chosen, batch)).sum(1)
        counts = chosen.sum((1, 2))
        self.now.append(torch.cat([hashes, counts, mask.numel() - counts[:1]]))
        self.fresh |= {example.id for example in batch.get("examples", ())}

    def state(self) -> dict:
        """Of the steps that are done."""
        return {"steps": torch.stack(self.steps), "rows": sorted(self.rows), "seen": self.seen}

    def restore(self, state: dict) -> None:
        self.steps, self.rows, self.seen = [*state["steps"]], {*state["rows"]}, state["seen"]

    def end_step(self, micro_batches: list[dict]) -> None:
        """Of all devices together. A loss that goes its own way past Run.token_logps is taken to read what it
        was handed: that is counted, but not certified."""
        if micro_batches and not self.now:
            self.seen = False
            for batch in micro_batches:
                self(batch)
        none = torch.zeros(5, dtype=torch.long, device=self.device)
        self.steps.append(self.devices.total(sum(self.now, none), self.device))
        self.rows.update(*self.devices.gathered(self.fresh))
        self.now, self.fresh = [], set()

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


@contextmanager
def tokens_read(model, meter):
    """-> a list that takes the tokens of each forward of the phase at hand: in attach, those of a warm-up.
    What the decoder reads has a phase of its own. Without a mask, packed padding counts too."""
    phase, read = meter.stack[-1], []

    def count(decoder, args, kwargs):
        if meter.stack[-1] == phase:
            mask = kwargs.get("attention_mask")
            read.append(kwargs["input_ids"].numel() if mask is None else mask.sum())

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()
