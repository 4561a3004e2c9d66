"""`Run`: what every hook of a method is handed, and asks for whatever it needs."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from harness import metrics
from harness.data import Batches, Example, Shapes, collate
from harness.errors import brief
from harness.plain import redacted, redacted_in
from harness.record import RunRecord, finite
from harness.shape import check, parse
from harness.spec import Dataset, Hyperparams
from harness.training import head, loop
from harness.training.checkpoint import Checkpoints
from harness.training.decoder import Decoder
from harness.training.devices import Devices
from harness.training.kernels import plain_gradients

AT_ONCE = 128  # sampled answers: a step of 16 rows asks for 8 of each


class Run:
    """One method, one seed, on one device, or on its share of several.

    For a method: `hp`, the shared hyperparameters with its declared differences; `seed`; `steps`, how many
    the training has; `device`; `batches`, the examples of each step, the same for every method, to be gone
    through as often as one likes; `rng`, a generator on the CPU that is this run's method's alone; `devices`,
    on how many it computes (`devices.count`), and which of them this one is (`devices.rank`); and
    `load_base(**kwargs)`, the untouched model once more, off the clock of what goes on.

    For the harness: `splits`, the examples of each, and those of them that are `scored`; what it computes,
    decodes, scores and measures with; the `record` that it fills; `report(**values)`, which is told what a
    bench shows.
    """

    def __init__(
        self, method, hp: Hyperparams, seed: int, splits: dict[str, list[Example]], *, dataset: Dataset,
        template, stops: list[int], accelerator, meter, record: RunRecord, load_base, report=lambda **_: None,
        devices: Devices | None = None,
    ):  # fmt: skip
        self.method, self.hp, self.seed, self.splits = method, hp, seed, splits
        self.dataset, self.accelerator, self.meter = dataset, accelerator, meter
        self.template, self.record, self.report = template, record, report
        self.devices = devices or Devices()
        self.decoder = Decoder(template.tokenizer, stops, hp, accelerator, self.devices)
        self.device, self.pad = accelerator.device, template.tokenizer.pad_token_id
        self.batches = Batches(splits["train"], hp, seed)
        self.steps = len(self.batches)
        self.rng = torch.Generator().manual_seed(seed)
        self.reading: Callable[[dict], None] | None = None  # is told what is read, while the loop trains
        self.shapes: Shapes | None = None  # of micro-batches, where steps need them fixed
        self.whole: Any = called  # calls what computes with the model, which may lie in parts
        self.fused = False  # what computes at the moment may use kernels of its own
        self.loader = load_base
        self.checkpoints: Checkpoints | None = None  # of a training that could be stopped

    @property
    def sharded(self) -> bool:
        """What is trained lies in parts, at the moment."""
        return self.whole is not called

    @property
    def scored(self) -> list[Example]:
        """The examples that it is evaluated on: the test's, or the validation's for a trial of a search."""
        return self.splits["validation" if self.record.spec.trial else "test"]

    def load_base(self, **more):
        """The untouched model. `more` goes to from_pretrained."""
        with self.meter.phase("load"):
            return self.loader(**more)

    def micro_batches(self, examples: list[Example]) -> list[list[Example]]:
        """A step in parts; of several devices, this one's share of it."""
        examples = self.devices.share(examples, lambda example: example.length)
        if self.shapes:
            return self.shapes.cut(examples)
        size = self.hp.micro_batch_size
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def collate(self, examples: list[Example], history: bool = True) -> dict:
        """-> a micro-batch, labels on every answer that is to be learned; without history, on the last."""
        if self.shapes:
            return collate(examples, self.pad, self.device, history, shaped=self.shapes.of)
        packed = self.hp.max_length if self.hp.packing else 0
        return collate(examples, self.pad, self.device, history, packed)

    def sample(
        self, model, examples: list[Example], new_tokens: int, copies: int = 1, temperature: float = 0.0
    ) -> list[list[list[int]]]:
        """-> for each example `copies` answers to its prompt, each at most so many new token ids, as long as
        hp.max_length leaves room for; greedy at temperature 0. Always as many at once: how an evaluation is
        batched must not change what is trained on. A phase of its own."""
        training = model.training
        with self.meter.phase("rollout"):
            drawn = self.decoder.continuations(model, examples, AT_ONCE, new_tokens, copies, temperature)
        model.train(training)
        answers = [
            [ids[: self.hp.max_length - len(example.prompt_ids)] for ids in group]
            for example, group in zip(examples, drawn, strict=True)
        ]
        tokens = self.record.tokens
        tokens.sampled = (tokens.sampled or 0) + sum(len(ids) for group in answers for ids in group)
        return answers

    def reward(self, example: Example, ids: list[int]) -> float:
        """What the dataset's spec says an answer to this prompt earns, 0 to 1."""
        earned, _ = metrics.reward(self.dataset)
        return earned(self.decoder.text_of(ids), example.reference)

    def token_logps(self, model, batch: dict) -> torch.Tensor:
        """(B, T-1): log p of each next token that is a target, see harness/training/head.py."""
        if self.reading and torch.is_grad_enabled():
            self.reading(batch)
        return head.token_logps(model, batch, self.fused)

    def accumulate(self, model, batches: list[dict]) -> torch.Tensor:
        """Adds the gradients of a step with these micro-batches, as the training has them; of several devices
        each adds those of its own, and `total` gives the whole. -> the step's loss."""
        loop.prepare_model(model.train(), self.hp)
        return self.total(loop.accumulate(batches, self, partial(plain_gradients, model, self)))

    def total(self, value: torch.Tensor | float) -> torch.Tensor:
        """What this device has of a step's number or tensor, and all others, added up."""
        return self.devices.total(value, self.device)

    def note(self, what: str, value: float | str) -> None:
        """Keeps something that this run found out about its method; the report prints it."""
        self.record.notes[redacted(str(what))] = redacted_in(recordable(value))


def called(what: Callable, *given):
    return what(*given)


def recordable(value):
    """As a record holds it: a tensor's number as one, what JSON has as it is, else a short text."""
    try:
        plain = parse(json.dumps(finite(value.item() if hasattr(value, "item") else value)))
        check(plain, Any)
        return plain
    except Exception:  # whatever a stranger's value does
        with suppress(Exception):
            return brief(value)
        return type(value).__name__
