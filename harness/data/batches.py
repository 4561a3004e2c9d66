"""Rows of token ids become batches, in an order that is the same for every method."""

import heapq
import random
from math import ceil

from harness.data.template import Example, examples_hash
from harness.spec import Hyperparams

WINDOW = 16  # batches sorted by length together: most of the padding gone, the order still random


class Batches:
    """The examples of each optimizer step of a training; can be gone through again.

    The order comes from the seed alone, never from the global random state, so that it is the same for
    every method whatever a method draws.
    """

    def __init__(self, examples: list[Example], hp: Hyperparams, seed: int):
        self.examples = examples
        self.steps = list(order([example.length for example in examples], hp, seed))  # indices of each
        self.hashes = [examples_hash(step) for step in self]
        self.tokens = [sum(example.length for example in step) for step in self]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        return ([self.examples[i] for i in step] for step in self.steps)


def order(lengths: list[int], hp: Hyperparams, seed: int):
    """Example indices of each optimizer step, a fresh order every epoch.

    Rows are shuffled, sorted by length within windows of some batches, and the batches shuffled
    again: rows of a batch are about as long, and little is padded. The epoch's last rows, too few
    for a batch, are a step of their own.
    """
    steps = hp.max_steps or ceil(hp.epochs * ceil(len(lengths) / hp.batch_size))
    epoch = 0
    while steps > 0 and lengths:
        draw = random.Random(f"data order, seed {seed}, epoch {epoch}")
        indices = list(range(len(lengths)))
        draw.shuffle(indices)
        window = WINDOW * hp.batch_size
        grouped = []
        for start in range(0, len(indices), window):
            grouped += sorted(indices[start : start + window], key=lambda i: lengths[i])
        batches = [grouped[i : i + hp.batch_size] for i in range(0, len(grouped), hp.batch_size)]
        draw.shuffle(batches)
        yield from batches[:steps]
        steps -= len(batches)
        epoch += 1


def collate(
    examples: list[Example], pad_id: int, device, history: bool = False, packed: int = 0, shaped=None
) -> dict:
    """Right-padded input_ids, attention_mask and labels, each (B, T), labels only on the response, and
    with `history` on the earlier answers that an example says; prompt_lengths (B,); and the examples.
    `targets` (N,): the places in the B * T tokens whose next token has a label, in order.

    `packed`: examples share sequences of up to so many tokens. Then position_ids (B, T) begin anew with each
    example, which keeps attention within it, and there are no prompt_lengths.

    `shaped(examples, targets)` gives a Shape that is filled up to: targets by places of the last token. If it
    has rows, all examples share one sequence. cu_seq_lens (rows + 1,) says between which of the B * T tokens
    each row lies, `longest` how many it has at most.
    """
    import torch

    sequences = pack(examples, packed) if packed else [[example] for example in examples]
    shape = None
    if shaped:
        shape = shaped(examples, sum(learned_tokens(example, history) for example in examples))
        sequences = [examples] if shape.rows else sequences
    together = packed or (shape and shape.rows)
    size = len(sequences), shape.tokens if shape else height(sequences)
    ids, labels = torch.full(size, pad_id), torch.full(size, -100)
    mask, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    borders = [0]
    for i, sequence in enumerate(sequences):
        start = 0
        for example in sequence:
            stop = start + example.length
            ids[i, start:stop] = torch.tensor(list(example.prompt_ids) + list(example.response_ids))
            for a, b in learned_spans(example, history):
                labels[i, start + a : start + b] = ids[i, start + a : start + b]
            mask[i, start:stop] = 1
            positions[i, start:stop] = torch.arange(example.length)
            borders.append(start := stop)
        positions[i, start:] = torch.arange(size[1] - start)  # padding is a row of its own
    followed = labels[:, 1:] != -100
    targets = torch.nn.functional.pad(followed, (0, 1)).flatten().nonzero()[:, 0]
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "targets": targets}
    if shape:
        filling = torch.full((shape.targets - len(targets),), ids.numel() - 1)
        tensors["targets"] = torch.cat([targets, filling])
        every = [*range(0, ids.numel() + 1, size[1])]
        rows = shape.borders(borders) if shape.rows else every
        tensors["cu_seq_lens"] = torch.tensor(rows, dtype=torch.int32)
    if together:
        tensors["position_ids"] = positions
    else:
        tensors["prompt_lengths"] = torch.tensor([len(example.prompt_ids) for example in examples])
    if torch.device(device).type == "cuda":  # else each copy would wait for all that was launched before
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {"examples": examples, **moved, **({"longest": shape.longest} if shape else {})}


def learned_spans(example: Example, history: bool) -> list[tuple[int, int]]:
    """From and to which of its tokens an example is learned."""
    spans = [(len(example.prompt_ids), example.length)]
    if history:
        spans += zip(example.learned[::2], example.learned[1::2], strict=True)
    return spans


def learned_tokens(example: Example, history: bool) -> int:
    return sum(b - a for a, b in learned_spans(example, history))


def pack(examples: list[Example], width: int) -> list[list[Example]]:
    """Rows in the sequences of at most `width` tokens that have the fewest slots, padding included; never
    more than an example a sequence would have."""
    longest_first = sorted(examples, key=lambda example: example.length, reverse=True)
    choices = [dealt(longest_first, count) for count in range(1, len(examples) + 1)]
    fitting = [c for c in choices if height(c) <= max(width, longest_first[0].length)]
    return min(fitting, key=lambda sequences: len(sequences) * height(sequences))


def dealt(examples: list[Example], count: int) -> list[list[Example]]:
    """Each example to the sequence that is the shortest so far."""
    heap: list[tuple[int, int]] = [(0, i) for i in range(count)]
    sequences: list[list[Example]] = [[] for _ in range(count)]
    for example in examples:
        length, i = heap[0]
        sequences[i].append(example)
        heapq.heapreplace(heap, (length + example.length, i))
    return sequences


def height(sequences: list[list[Example]]) -> int:
    return max(sum(example.length for example in sequence) for sequence in sequences)


def batches_of(examples: list[Example], size: int) -> list[list[Example]]:
    """At most so many rows, none shorter than three quarters of the longest: little padding. The largest
    comes first."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: example.length, reverse=True):
        if not batches or len(batches[-1]) == size or 4 * example.length < 3 * batches[-1][0].length:
            batches.append([])
        batches[-1].append(example)
    return batches
