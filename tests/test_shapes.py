"""Micro-batches have few shapes, hold every row once, and are read as if they were not padded."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, Qwen3Config

from harness.data import Batches, Shapes, collate
from harness.data.shapes import SIZES, few, fill
from harness.training import attention, head


def masked(module, query, key, value, mask, *, scaling=None, sliding_window=None, cu_seq_lens_q=None, **_):
    """What flash attention does on a GPU, with a mask: the CPU has no kernel for it."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))  # (heads, B * T, d)
    places = torch.arange(q.shape[1])
    row, apart = torch.searchsorted(cu_seq_lens_q, places, right=True), places[:, None] - places
    seen = (row[:, None] == row) & (apart >= 0) & (apart < (sliding_window or len(places)))
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    output = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    batch, heads, length, size = query.shape
    return output.transpose(0, 1).view(batch, length, heads, size), None


@pytest.fixture
def flash_on_a_cpu():
    AttentionInterface.register(attention.NAME, masked)
    yield
    AttentionInterface.register(attention.NAME, attention.rows_apart)


HP = tiny.hyperparams(batch_size=6, micro_batch_size=4, max_length=40)
ROWS = tiny.rows(32, prompt=(2, 20), response=(1, 12))
SMALL = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "gemma3, windows shorter than rows": tiny.gemma(),
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}


def shapes(packed: bool, rows=ROWS, hp=HP):
    batches = Batches(rows, hp, 0)
    return batches, Shapes(batches, hp, packed)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", MODELS)
def test_a_shaped_batch_is_read_as_its_rows_apart(config, packed, flash_on_a_cpu):
    model = tiny.model(MODELS[config]).train()
    batches, made = shapes(packed)
    for examples in list(batches)[:2]:
        for part in made.cut(examples):
            plain = collate(part, tiny.PAD, "cpu", history=True)
            shaped = collate(part, tiny.PAD, "cpu", history=True, shaped=made.of)
            found, expected = (
                head.token_logps(model, batch)[batch["labels"][:, 1:] != -100] for batch in (shaped, plain)
            )
            assert found.numel() == expected.numel() > 0
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert model.config._attn_implementation == "sdpa"
            assert (
                shaped["labels"][shaped["labels"] != -100].tolist()
                == plain["labels"][plain["labels"] != -100].tolist()
            )


def test_every_row_is_in_one_micro_batch_and_each_fits_its_shape():
    batches, made = shapes(True)
    used = set()
    for examples in batches:
        parts = made.cut(examples)
        assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in examples)
        for part in parts:
            shape = made.of(part, 10)
            assert sum(e.length for e in part) <= shape.tokens <= HP.micro_batch_size * HP.max_length + 32
            used.add(shape.tokens)
    assert len(used) <= SIZES


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.lists(st.integers(60, 300), min_size=1, max_size=4),
)
def test_rows_fill_sequences_without_running_over(lengths, sizes):
    lengths, sizes = sorted(lengths, reverse=True), sorted(sizes)
    bins = fill(lengths, sizes)
    assert sorted(i for _, rows in bins for i in rows) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in rows) <= size and size in sizes for size, rows in bins)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_few_sizes_pad_least(needs):
    def padded(sizes):
        return sum(min((s for s in sizes if s >= need), default=10**6) for need in needs)

    found = few(needs)
    values = sorted(set(needs))
    best = min(padded(c) for n in range(1, SIZES + 1) for c in combinations(values, min(n, len(values))))
    assert padded(found) == best and len(found) <= SIZES


def test_rows_as_long_as_instructions_are_leave_little_padding():
    """Lengths as Alpaca's have with a tokenizer of 32,000: mean 121, median 105, 99 % below 345."""
    draw = random.Random(0)
    lengths = [max(20, min(512, round(draw.lognormvariate(4.65, 0.55)))) for _ in range(1600)]
    rows = [replace(row, response_ids=tiny.array([7] * (n - 1)), prompt_ids=tiny.array([7]))
            for row, n in zip(tiny.rows(1600), lengths, strict=True)]  # fmt: skip
    batches, made = shapes(True, rows, replace(HP, batch_size=16, micro_batch_size=16, max_length=512))
    slots = sum(made.of(part, 0).tokens for step in batches for part in made.cut(step))
    apart = sum(len(step) * max(e.length for e in step) for step in batches)
    assert 1 - sum(batches.tokens) / slots < 0.08 < 1 - sum(batches.tokens) / apart


def test_what_is_no_target_points_to_the_last_token_and_padding_is_rows_of_its_own():
    _, made = shapes(True)
    batch = collate(ROWS[:2], tiny.PAD, "cpu", shaped=made.of)
    count, (_, length) = int((batch["labels"][:, 1:] != -100).sum()), batch["labels"].shape
    targets, borders = batch["targets"].tolist(), batch["cu_seq_lens"].tolist()
    assert targets[:count] == sorted(targets[:count]) and set(targets[count:]) <= {length - 1}
    assert borders[0] == 0 and borders[-1] == length and borders == sorted(borders)
    assert max(b - a for a, b in pairwise(borders)) <= batch["longest"]
    assert borders[1:3] == [ROWS[0].length, ROWS[0].length + ROWS[1].length]
