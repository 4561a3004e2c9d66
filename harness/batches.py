"""Rows of token ids become batches, in an order that is the same for every method."""

import random
from math import ceil

from harness.spec import Hyperparams
from harness.template import Row, rows_hash

WINDOW = 16  # batches sorted by length together: most of the padding gone, the order still random


class Batches:
    """The optimizer steps of a training, each a list of micro-batches; can be iterated again.

    The order comes from the seed alone, never from the global random state, so that it is the same
    for every method whatever a method draws. `decoder` is the harness's own, for a method that
    trains on answers of the model.
    """

    def __init__(self, rows: list[Row], hp: Hyperparams, seed: int, pad_id: int, device, decoder=None):
        self.rows, self.hp, self.pad_id, self.device = rows, hp, pad_id, device
        self.decoder = decoder
        self.steps = list(order([row.length for row in rows], hp, seed))  # row indices of each
        self.hashes = [rows_hash([rows[i] for i in step]) for step in self.steps]
        self.tokens = [sum(rows[i].length for i in step) for step in self.steps]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        size = self.hp.micro_batch_size
        for step in self.steps:
            chosen = [self.rows[i] for i in step]
            yield [self.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def collate(self, rows: list[Row]) -> dict:
        return collate(rows, self.pad_id, self.device)


def order(lengths: list[int], hp: Hyperparams, seed: int):
    """Row indices of each optimizer step, a fresh order every epoch.

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


def collate(rows: list[Row], pad_id: int, device) -> dict:
    """Right-padded input_ids, attention_mask and labels, each (B, T), labels only on the response;
    prompt_lengths (B,); and the rows themselves."""
    import torch

    longest = max(row.length for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        p, n = len(row.prompt_ids), row.length
        ids[i, :n] = torch.tensor(list(row.prompt_ids) + list(row.response_ids))
        labels[i, p:n] = ids[i, p:n]
        mask[i, :n] = 1
    lengths = torch.tensor([len(row.prompt_ids) for row in rows])
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_lengths": lengths}
    return {
        "rows": rows, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    }  # fmt: skip


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Longest first, so that a batch has little padding and the largest comes at the start."""
    by_length = sorted(rows, key=lambda row: row.length, reverse=True)
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]
