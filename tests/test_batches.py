"""Batches in one order for all, and rows packed into one sequence that do not see each other."""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

from harness import method
from harness.data.batches import Batches, collate, height, order, pack
from harness.data.template import Example
from harness.training import head
from methods.full import Full

SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
         "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": tiny.BOS}  # fmt: skip
MODELS = {
    "gemma3": tiny.gemma,  # its sliding window, 16, is shorter than the rows
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
}
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=24)


def of_lengths(lengths) -> list[Example]:
    return [
        Example(f"tiny:{i:012x}", "tiny", "", "", tiny.array([tiny.BOS]), tiny.array([9] * (length - 1)))
        for i, length in enumerate(lengths)
    ]


# Order


def steps(hp, rows=None, seed=0):
    rows = rows or tiny.rows(50)
    read = [[row.id for batch in step for row in batch["examples"]] for step in tiny.steps(rows, hp, seed)]
    return Batches(rows, hp, seed).hashes, read


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"packing": True}, {"learning_rate": 1.0}])
def test_order_and_hashes_depend_on_rows_and_seed_alone(changes):
    hp = tiny.hyperparams(max_steps=9)
    expected = steps(hp)
    torch.manual_seed(9)  # a method may draw from the global state what it likes
    assert steps(replace(hp, **changes)) == expected
    assert steps(hp, seed=1) != expected


def test_what_is_learned_is_part_of_the_hash():
    row = tiny.rows(1)[0]
    hp = tiny.hyperparams(max_steps=1)
    assert steps(hp, [row])[0] != steps(hp, [replace(row, learned=tiny.array([1, 2]))])[0]


@given(lengths=LENGTHS, batch=st.integers(1, 9))
def test_each_row_is_read_once_an_epoch(lengths, batch):
    hp = tiny.hyperparams(batch_size=batch, micro_batch_size=batch, epochs=2)
    found = list(order(lengths, hp, 0))
    half = len(found) // 2
    for epoch in (found[:half], found[half:]):
        assert sorted(i for step in epoch for i in step) == list(range(len(lengths)))


# Packing


@given(lengths=LENGTHS, width=st.integers(2, 80))
def test_packing_loses_no_row_and_never_reads_more(lengths, width):
    rows = of_lengths(lengths)
    sequences = pack(rows, width)
    assert sorted(row.id for sequence in sequences for row in sequence) == sorted(row.id for row in rows)
    assert height(sequences) <= max(width, *lengths)
    assert len(sequences) * height(sequences) <= len(rows) * max(lengths)


def packed_and_apart(seed=0):
    """The same rows in the same order, both with an earlier answer to learn."""
    rows = [replace(row, learned=tiny.array([2, 4])) for row in tiny.rows(7, seed, (20, 30), (3, 12))]
    sequences = pack(rows, 120)
    assert max(map(len, sequences)) > 1
    rows = [row for sequence in sequences for row in sequence]
    apart = collate(rows, tiny.PAD, "cpu", history=True)
    return apart, collate(rows, tiny.PAD, "cpu", history=True, packed=120)


def by_row(values, batch):
    return values[batch["labels"][:, 1:] != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_log_probabilities_that_they_have_apart(name, attention):
    model = tiny.model(MODELS[name]())
    model.set_attn_implementation(attention)
    apart, packed = packed_and_apart()
    expected = by_row(head.token_logps(model, apart), apart)
    found = by_row(head.token_logps(model, packed), packed)
    assert len(expected) == (apart["labels"] != -100).sum() == (packed["labels"] != -100).sum()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert head.unpackable(model, apart, packed) is None
    seen = {k: v for k, v in packed.items() if k != "position_ids"}  # would the test notice a leak?
    assert (by_row(head.token_logps(model, seen), packed) - expected).abs().max() > 0.01


@pytest.mark.parametrize("config", [
    BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1),
    GPTNeoConfig(vocab_size=300, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]],
                 num_heads=4, window_size=8, max_position_embeddings=256, initializer_range=0.1),
    MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, state_size=4, initializer_range=0.1),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_model_is_packed_rightly_or_refused_by_name(config):
    model = tiny.model(config)
    apart, packed = packed_and_apart()
    reason = head.unpackable(model, apart, packed)
    if reason is None:
        expected = by_row(head.token_logps(model, apart), apart)
        torch.testing.assert_close(
            by_row(head.token_logps(model, packed), packed), expected, atol=1e-4, rtol=1e-4
        )
    else:
        assert type(model).__name__ in reason and "hp.packing=false" in reason


@pytest.mark.parametrize("micro", [8, 3])
def test_a_training_with_packing_has_the_losses_of_one_without(micro):
    rows = tiny.rows(40)
    hp = tiny.hyperparams(micro_batch_size=micro, max_length=64)
    found = [tiny.fit(Full(), h, rows)[2] for h in (hp, replace(hp, packing=True))]
    assert tiny.losses(found[1]) == pytest.approx(tiny.losses(found[0]), rel=1e-4)
    apart, packed = (record.tokens for record in found)
    assert packed.trained == apart.trained and packed.supervised == apart.supervised
    assert packed.padded <= apart.padded


@pytest.mark.parametrize("name", ["orpo", "grpo"])
def test_a_method_that_makes_its_own_rows_cannot_be_packed(name):
    from harness.plan.methods import beyond

    cls = method.resolve(name, method.FOLDER / f"{name}.py")
    limits = beyond(method.build(cls, {}), tiny.hyperparams(packing=True), {"parts": []})
    [reason] = map(str, limits)
    assert name in reason and "hp.packing=false" in reason
