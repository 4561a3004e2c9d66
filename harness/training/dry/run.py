"""The run that hooks are handed in a trace. What takes long is computed as often as shows what it holds, and
counted as often as a run would compute it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from harness.data import Batches, Example, Shapes, height, learned_tokens, pack
from harness.training import head
from harness.training.adapters import Adapters, alike
from harness.training.decoder import READ
from harness.training.dry.ledger import Ledger
from harness.training.dry.programs import Programs
from harness.training.dry.world import CARD
from harness.training.engine import Engine
from harness.training.kernels import Kernels, decoder_layers, tokens
from harness.training.run import AT_ONCE, Run
from harness.work import Work

TWICE = 2  # computed: the first time makes what is kept, the second begins with it
SHAPING = ("batch_size", "micro_batch_size", "max_length", "packing", "devices")  # what shapes depend on
KNOWN: dict[tuple, Any] = {}  # shapes and plans: the same for all methods of a comparison


class DryRun(Run):
    """Its model answers nothing: what it would be asked is made up, as long as it may be."""

    ledger: Ledger
    programs: Programs
    warmed = 0  # steps of gradients so far that a method has asked for
    prepared = (0, 0)  # micro-batches of the step at hand, and the tokens in them, padding included
    traced = 0  # tokens of the largest of them
    widest = True  # whether that is the largest of all
    rollouts = (0, 0)  # reads of prompts so far, and steps of the decoder

    def collate(self, examples, history=True):
        batch = super().collate(examples, history)
        size = batch["attention_mask"].shape
        filled = all(example.length == size[1] for example in examples)
        self.ledger.filled[size] = filled and self.ledger.filled.get(size, True)
        if "cu_seq_lens" in batch:
            batch["cu_seq_lens"].count = len(examples)
        return batch

    def sample(self, model, examples, new_tokens, copies=1, temperature=0.0):
        training = model.training
        for name in ("rollout read", "rollout token"):  # what counts how often they are, counts all
            self.ledger.work.pop(name, None)
        with self.meter.phase("rollout"):
            found = decoded(model.eval(), self, examples, AT_ONCE, new_tokens, copies, temperature)
        model.train(training)
        self.rollouts = self.rollouts[0] + found[0], self.rollouts[1] + found[1]
        room = [min(new_tokens, max(1, self.hp.max_length - len(e.prompt_ids))) for e in examples]
        return [[[self.pad] * most] * copies for most in room]

    def reward(self, example, ids):
        return 0.5

    def accumulate(self, model, batches):
        self.warmed += 1
        made, few = self.ledger, telling(batches)
        if self.warmed <= TWICE:
            with made.making("activations"), made.counted("warm-up"):
                loss = super().accumulate(model, few)
            self.each = made.work.pop("warm-up") * (1 / sum(map(tokens, few)))
        else:
            loss = torch.zeros((), device=CARD)
        made.work[made.phase] += self.each * sum(map(tokens, batches))
        return loss


class WidestFirst:
    """The steps of a training, for who reads but the first of them: one of these will be the widest."""

    def __init__(self, batches: Batches, widest: int):
        self.batches, self.widest = batches, widest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Example]]:
        steps = list(self.batches)
        yield steps.pop(self.widest)
        yield from steps


@contextmanager
def few_forwards(model, run: DryRun):
    """Within, of a method's own forwards without gradients some are computed, the others are counted."""
    decoder, ledger = head.causal_lm(model).get_decoder(), run.ledger
    own, width = decoder.forward, decoder.config.get_text_config().hidden_size
    made: list[Work] = []  # of a token

    def forward(*args, **kwargs):
        ids = kwargs.get("input_ids")
        alone = ledger.phase == "attach" and kwargs.get("use_cache") is False
        if ids is None or not alone or torch.is_grad_enabled():
            return own(*args, **kwargs)
        if len(made) < TWICE:
            with ledger.counted("warm-up"):
                output = own(*args, **kwargs)
            made.append(ledger.work.pop("warm-up") * (1 / ids.numel()))
        else:
            states = torch.empty(*ids.shape, width, dtype=model.dtype, device=CARD)
            output = BaseModelOutputWithPast(last_hidden_state=states)
        ledger.work[ledger.phase] += made[-1] * ids.numel()
        return output

    with patch.object(decoder, "forward", forward):
        yield


class DryKernels(Kernels):
    """The ladder without a trial: the highest rung that the method and the machine allow."""

    run: DryRun

    def packed(self) -> Shapes | None:
        run, rows = self.run, self.run.batches.examples[:4]
        key = shaping(run), "shapes", self.within
        if key not in KNOWN:
            KNOWN[key] = Shapes(self.steps, run.hp, packed=True, whole=self.within)
        try:
            with torch.no_grad(), run.accelerator.autocast():
                run.shapes = KNOWN[key]
                head.token_logps(self.model, run.collate(rows))
        except Exception as error:  # as an architecture whose attention flash attention is not
            self.also(f"{type(error).__name__}: {error}")
            return None
        finally:
            run.shapes = None
        return KNOWN[key]

    def ready(self, batches: list[dict], step: int) -> None:
        if self.untried:
            self.rung, self.untried = self.untried[0], []
            self.run.record.arithmetic["training"] = {}  # a trial has found it out
            with self.run.meter.phase("compile"):
                self.run.ledger.empty_cache()  # as after a plain step, with which others are compared
                self.forwards = {layer: self.fast(layer) for layer in decoder_layers(self.causal)}
                self.adapters = Adapters(alike(self.model))
                for group in self.adapters.groups:
                    self.run.ledger.is_part("weights", [group.both, group.a, group.b])
                self.run.ledger.empty_cache()
        self.replays = "graph" in self.rung and not self.live(step)
        if self.within and self.replays:
            self.run.ledger.empty_cache()
        elif self.replays:
            for parameter in self.parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                    self.run.ledger.is_part("gradients", parameter.grad)
        few = [max(batches, key=tokens)] if self.replays else telling(batches)
        self.computed, self.largest = list(map(id, few)), id(max(reversed(few), key=tokens))
        self.run.prepared = extent(batches)
        self.run.traced = max(map(tokens, few))

    def fast(self, layer):
        if "compiled" not in self.rung:
            return super().fast(layer)
        return self.run.programs.of(layer, self.run.hp.gradient_checkpointing)

    def gradients(self, batch: dict, share) -> torch.Tensor:
        if id(batch) not in self.computed:
            return torch.zeros((), device=CARD)
        ledger, largest = self.run.ledger, id(batch) == self.largest
        pool = ledger.captured(largest and self.run.widest) if self.replays else nullcontext()
        with pool, ledger.counted("micro-batch" if largest else "other"):
            return super().gradients(batch, 1.0)

    def close(self) -> None:
        super().close()
        self.run.ledger.replayed = False
        self.run.ledger.empty_cache()  # as where there is a GPU


def extent(batches: list[dict]) -> tuple[int, int]:
    """Micro-batches of a step, and the tokens in them, padding included."""
    return len(batches), sum(map(tokens, batches))


def telling(batches: list[dict]) -> list[dict]:
    """Of a step: the first micro-batch, before there are gradients, and the largest beside them."""
    return [*batches[:1], max(batches[1:], key=tokens)] if batches[1:] else batches


def decoded(model, run: DryRun, examples, at_once: int, new_tokens: int, copies=1, temperature=0.0):
    """A read of the longest prompts and a step of the decoder, as harness/training/decoder.py has them.
    -> (how many such reads, how many such steps) all answers take; none where the engine cannot decode it."""
    lengths = sorted((len(e.prompt_ids) for e in examples if e.prompt_ids), reverse=True)
    lengths = lengths[:: run.devices.count]  # this one's share
    if not lengths:
        return 0, 0
    asked = len(lengths) * copies
    count = min(max(1, at_once // copies) * copies, asked)
    most, ledger = min(count, max(1, READ // lengths[0])), run.ledger
    numbers = torch.zeros(most, new_tokens) if temperature else None
    with torch.inference_mode(), run.accelerator.autocast():
        try:
            engine = Engine(model, count, lengths[0], new_tokens, run.decoder.stops, temperature)
            with ledger.counted(f"{ledger.phase} read"):
                engine.read(
                    [[0] * n for n in lengths], [*range(most)], [i // copies for i in range(most)], numbers
                )
            with ledger.counted(f"{ledger.phase} token"):
                engine.step()
        except Exception:  # whatever an architecture does otherwise
            return 0, 0
    return -(-asked // most), -(-asked // count) * new_tokens


def width(step: list[Example], run: Run) -> tuple[int, int]:
    """By which a step is the widest: the tokens of its largest micro-batch."""
    parts = run.micro_batches(step)
    if run.shapes and run.shapes.packed:
        return max(sum(e.length for e in part) for part in parts), len(parts)
    return max(len(part) * max(e.length for e in part) for part in parts), len(parts)


def padded(step: list[Example], run: Run) -> tuple[int, int]:
    """The same of rows as they are planned, before a method makes others of them."""
    parts, held = run.micro_batches(step), 0
    for part in parts:
        sequences = pack(part, run.hp.max_length) if run.hp.packing else [[example] for example in part]
        long, count = height(sequences), len(sequences)
        if run.shapes:
            shape = run.shapes.of(part, sum(learned_tokens(e, True) for e in part))
            long, count = shape.tokens, 1 if shape.rows else len(part)
        held += long * count
    return len(parts), held


def planned(run: Run) -> tuple[int, int]:
    """And of the whole training."""
    key = shaping(run), run.shapes and (run.shapes.packed, run.shapes.whole)
    if key not in KNOWN:
        counts = [padded(step, run) for step in run.batches]
        KNOWN[key] = sum(n for n, _ in counts), sum(held for _, held in counts)
    return KNOWN[key]


def shaping(run: Run) -> tuple:
    return tuple(run.batches.hashes), *(getattr(run.hp, name) for name in SHAPING)
