"""LoReFT: the edit against its formula, and where it acts, however rows are padded."""

import copy
import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import GEMMA_3_1B, LLAMA_32_1B, fit, hyperparams, likelihoods, trained_weights
from torch.nn.utils.parametrizations import orthogonal
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
)

from harness.errors import BadRequest
from harness.method import Unsupported, build, known_methods, resolve
from harness.training import decoder, head
from harness.training.evaluation import mean_loss
from harness.training.model import sizes
from methods import reft
from methods.reft import LoReFT

ROWS = tiny.rows(22, seed=1)  # prompts of 4 to 25 tokens: shorter and longer than 7 + 7


def attached(method, config=None):
    return tiny.attached(method, tiny.model(config))[0].eval()


def edits(model) -> list:
    return [edit for layer in head.causal_lm(model).reft.values() for edit in layer]


def positions(n: int, first: int, last: int) -> tuple[set, set]:
    """By counting: the tokens of a prompt of n that each end takes."""
    first, last = min(first, n // 2), min(last, n // 2)
    return set(range(first)), set(range(n - last, n))


def left_padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts as generation reads them."""
    return decoder.left_padded(rows, tiny.PAD, torch.device("cpu"))


# The edit


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_edit_and_its_gradients_are_the_formulas(dropout):
    """In double precision. As in the authors' code (LoreftIntervention of pyreft 0.1.0), values are dropped
    of the edited state, not of the edit."""
    torch.manual_seed(0)
    edit, h = reft.intervention()(64, 4, dropout), torch.randn(10, 64, requires_grad=True)
    weight, bias, rotation = edit.source.weight, edit.source.bias, edit.rotation.weight.detach().double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4).double(), atol=1e-6, rtol=0)
    torch.manual_seed(2)
    out = edit(h)
    found = [out, *torch.autograd.grad((out**3).sum(), (h, weight, bias))]
    torch.manual_seed(2)  # the same values dropped: of 10 x 64
    kept = torch.nn.functional.dropout(torch.ones(10, 64), dropout)
    x, weight, bias = (t.detach().double().requires_grad_() for t in (h, weight, bias))
    out = kept * (x + (x @ weight.T + bias - x @ rotation.T) @ rotation)
    expected = [out, *torch.autograd.grad((out**3).sum(), (x, weight, bias))]
    for ours, formulas in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), formulas, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "first", "last", "expected"),
    [
        (40, 7, 7, [*range(7), *range(33, 40)]),  # f7+l7 of the paper
        (14, 7, 7, range(14)),
        (9, 7, 7, [0, 1, 2, 3, 5, 6, 7, 8]),  # half of a short prompt for each: the middle one for none
        (5, 0, 3, [3, 4]),
        (1, 7, 7, []),
    ],
)
def test_the_positions_are_those_of_the_authors_function(n, first, last, expected):
    """Of get_intervention_locations of pyreft 0.1.0, for these prompts."""
    a, b = positions(n, first, last)
    assert sorted(a | b) == list(expected)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_each_end_takes_its_tokens_wherever_the_padding_stands(padding):
    lengths = torch.arange(1, 24)
    starts = {"left": 30 - lengths, "right": 0 * lengths, "both": lengths % 5}[padding]
    for first, last in ((7, 7), (2, 9), (9, 2), (0, 3), (4, 0)):
        found = reft.first_and_last(starts, lengths, first, last)
        assert [places.shape for places, _ in found] == [(23, first), (23, last)]  # whatever the lengths
        for i, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            for (places, real), expected in zip(found, positions(n, first, last), strict=True):
                assert sorted((places[i] - start)[real[i]].tolist()) == sorted(expected)


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_r_and_its_gradient_are_those_of_torchs_own_reflections(rank):
    """What was saved with torch's orthogonal(orthogonal_map="householder") is read as it was meant."""
    torch.manual_seed(0)
    edit, theirs = reft.intervention()(16, rank, 0.0), torch.nn.Linear(16, rank, bias=False)
    ours = edit.rotation.coordinates
    orthogonal(theirs, orthogonal_map="householder", use_trivialization=False)
    held = theirs.parametrizations.weight.original
    with torch.no_grad():  # away from where geqrf put them, signs and all
        ours.copy_(ours + 0.3 * torch.randn_like(ours).triu(1))
        held.copy_(ours)
    weights = torch.randn(rank, 16)
    found, expected = (torch.autograd.grad((r * weights).sum(), p)[0]
                       for r, p in ((edit.rotation.weight, ours), (theirs.weight, held)))  # fmt: skip
    torch.testing.assert_close(edit.rotation.weight, theirs.weight, atol=2e-6, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edit_is_its_formula_also_under_autocast(dtype):
    """h + R^T (W h + b - R h), in double precision. In bf16 throughout it would be off by more than a bit."""
    torch.manual_seed(0)
    edit = reft.intervention()(64, 4, 0.0)
    rotation, weight, bias = (
        t.detach().double() for t in (edit.rotation.weight, edit.source.weight, edit.source.bias)
    )
    h = torch.randn(200, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = edit(h)
    assert found.dtype == dtype
    x = h.double()
    expected = torch.stack([v + rotation.T @ (weight @ v + bias - rotation @ v) for v in x])
    bits = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=bits)


def test_it_starts_as_far_from_the_identity_as_its_initialisation_says():
    """W is uniform in +-1/sqrt(d), R h the part of h in r of d directions: 4 r / 3 d of |h|^2 together."""
    torch.manual_seed(0)
    h, squares = torch.randn(50, 64), []
    for _ in range(40):
        change = reft.intervention()(64, 4, 0.0)(h) - h
        squares.append((change.norm() / h.norm()).square().item())
    assert sum(squares) / 40 == pytest.approx(4 * 4 / (3 * 64), rel=0.08)


def test_it_is_the_identity_if_w_is_r_and_b_is_zero_and_only_then():
    model = attached(LoReFT(rank=4))
    ids, mask = left_padded(ROWS[:6])
    before = tiny.model()(input_ids=ids, attention_mask=mask).logits
    for edit in edits(model):
        edit.source.weight.data = edit.rotation.weight.detach().clone()
        edit.source.bias.data.zero_()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, atol=1e-4, rtol=0)
    edits(model)[0].source.bias.data += 0.1
    assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits, before, atol=1e-2)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_chosen_positions_change_and_by_their_own_edit(tied, padding):
    method = LoReFT(rank=4, layers="0", first=3, last=5, tied=tied)
    base, seen = tiny.model(), {}
    base.model.layers[0].register_forward_hook(lambda block, args, out: seen.update(raw=out))
    base.model.layers[1].register_forward_pre_hook(lambda block, args: seen.update(edited=args[0]))
    model, _ = tiny.attached(method, base)
    rows = ROWS[:12]
    with torch.no_grad():
        if padding == "left":
            ids, mask = left_padded(rows)
            model(input_ids=ids, attention_mask=mask)
            starts = [ids.shape[1] - len(row.prompt_ids) for row in rows]
        else:
            head.token_logps(model, tiny.batch(rows))
            starts = [0] * len(rows)
        assert len(edits(model)) == (1 if tied else 2)
        expected = seen["raw"].clone()
        for i, row in enumerate(rows):
            ends = positions(len(row.prompt_ids), 3, 5)
            for edit, end in zip(edits(model) * (2 if tied else 1), ends, strict=True):
                for p in end:
                    expected[i, starts[i] + p] = edit(seen["raw"][i, starts[i] + p])
    touched = (seen["edited"] != seen["raw"]).any(-1)
    assert torch.equal(touched, (expected != seen["raw"]).any(-1))  # bit-equal at all others
    torch.testing.assert_close(seen["edited"], expected, atol=1e-5, rtol=1e-5)


def test_the_dropout_that_is_asked_for_is_every_edits_and_acts_in_training_alone():
    model = attached(LoReFT(rank=4, dropout=0.25, tied=False))
    for edit in edits(model):
        h = torch.ones(500, 64)
        assert (edit.train()(h) == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
        assert not (edit.eval()(h) == 0).any()


# Sizes


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("method", "count"),
    [({}, 2), ({"tied": False}, 4), ({"layers": "1"}, 1), ({"tied": False, "first": 0}, 2)],
)
def test_an_edit_holds_2rd_and_r_parameters(method, count, rank):
    trained, _, _ = fit(LoReFT(rank=rank, **method), hyperparams(max_steps=1), ROWS)
    assert sizes(trained)["trainable"] == count * (2 * rank * 64 + rank)
    assert not list(trained.reft.buffers())  # what is trained is all that is held


@pytest.mark.parametrize(
    ("config", "rank", "tied", "count"),
    [
        (GEMMA_3_1B, 4, True, 239_720),
        (GEMMA_3_1B, 4, False, 479_440),
        (GEMMA_3_1B, 8, True, 479_440),
        (GEMMA_3_1B, 8, False, 958_880),
        (LLAMA_32_1B, 8, True, 524_416),
        (LLAMA_32_1B, 8, False, 1_048_832),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_trainable_counts_of_published_architectures(config, rank, tied, count):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model, _ = tiny.attached(LoReFT(rank=rank, tied=tied), model)
    assert sizes(model)["trainable"] == count


# Training


def test_training_turns_r_within_its_manifold_and_touches_no_frozen_weight():
    """With weight decay too, which would take R to zero."""
    base = tiny.model()
    frozen = {name: (p, p.detach().clone()) for name, p in base.named_parameters()}
    before = trained_weights(attached(LoReFT(rank=4, tied=False)))
    hp = hyperparams(epochs=3.0, learning_rate=1e-2, weight_decay=0.1)
    trained, _, _ = fit(LoReFT(rank=4, tied=False), hp, ROWS, base=base)
    for model in (attached(LoReFT(rank=4, tied=False)), trained):
        for edit in edits(model):
            r = edit.rotation.weight
            assert r.shape == (4, 64)
            torch.testing.assert_close(r @ r.T, torch.eye(4), atol=1e-5, rtol=0)
    for name, (p, value) in frozen.items():
        assert torch.equal(p, value), name
        assert p.grad is None
    after = trained_weights(trained)
    assert before.keys() == after.keys() and len(after) == 2 * 2 * 3
    # What changes at a prompt's start after the last layer, no later token reads: only decay moves its W.
    still = {"reft.1.0.rotation.coordinates", "reft.1.0.source.bias"}
    assert {name for name in before if torch.equal(before[name], after[name])} == still


def test_weight_decay_reaches_w_alone():
    model, run = tiny.attached(LoReFT(), hp=hyperparams(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)]: group["weight_decay"]
        for group in LoReFT().optimizer(model, run).param_groups
        for p in group["params"]
    }
    assert decayed == {name: 0.1 * name.endswith("source.weight") for name in trained_weights(model)}


@pytest.mark.parametrize("tied", [True, False])
def test_it_learns(tied):
    """Random answers to eight prompts, through the prompts' tokens alone: better than guessing."""
    hp = hyperparams(epochs=80.0, learning_rate=2e-2)
    trained, _, _ = fit(LoReFT(tied=tied), hp, ROWS[:8])
    before, after = (mean_loss(scored(model, ROWS[:8], 8)) for model in (tiny.model(), trained))
    assert after < before - 1.5
    assert after < math.log(tiny.VOCABULARY) - 1


@pytest.mark.parametrize("inside", [False, True], ids=["hooks outside", "hooks inside"])
def test_recomputed_activations_give_the_same_gradients(inside):
    """Whether the recomputation runs the layers' hooks again depends on the version of transformers."""

    def gradients(checkpointing: bool):
        model, run = tiny.attached(LoReFT(rank=4, tied=False))
        model.train()
        if checkpointing and not inside:  # as the loop does
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if checkpointing and inside:
            for block in model.model.layers:
                call = type(block).__call__
                block.__class__ = type("Recomputed", (type(block),), {"__call__": recomputed(call)})
        LoReFT().loss(model, tiny.batch(ROWS[:8]), run).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        # After the last layer, no later token reads what changes at a prompt's start.
        assert gradient.any() != name.startswith("reft.1.0.")
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def recomputed(call):
    def forward(block, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(call, block, *args, use_reentrant=False, **kwargs)

    return forward


# Scoring and generation


def answered(model, rows, batch_size):
    """-> the rows with the model's own greedy answers as their responses."""
    found = tiny.decoder(hyperparams()).continuations(model, rows, batch_size, new_tokens=10)
    return [replace(row, response_ids=tiny.array(ids)) for row, [ids] in zip(rows, found, strict=True)]


def scored(model, rows, batch_size):
    return likelihoods(model, rows, hyperparams(eval_batch_size=batch_size))


@pytest.mark.parametrize("epochs", [0, 6])
@pytest.mark.parametrize("tied", [True, False])
def test_teacher_forcing_gives_the_tokens_that_were_generated(tied, epochs):
    """Left-padded, cached and batched it is the same model as right-padded in one forward."""
    method = LoReFT(rank=4, tied=tied)
    model = attached(method)
    if epochs:
        model, _, _ = fit(method, hyperparams(epochs=epochs, learning_rate=1e-2), ROWS)
    rows = answered(model, ROWS[:12], 12)
    assert len({tuple(row.response_ids) for row in rows}) > 6  # the answers depend on the prompts
    assert answered(tiny.model(), ROWS[:12], 12) != rows  # and on the edits
    for size in (12, 1):
        for score in scored(model, rows, size):
            assert score["correct"] == score["tokens"]
    assert answered(model, ROWS[:12], 1) == rows


def test_a_prompt_is_edited_once_and_a_decoding_step_never():
    model = attached(LoReFT(rank=4, tied=False))
    calls = []
    for edit in edits(model):
        edit.register_forward_hook(lambda *_: calls.append(1))
    made = tiny.decoder(hyperparams())
    made.continuations(model, ROWS[:2], 8, new_tokens=2)  # the first time, the model is tried
    calls.clear()
    found = made.continuations(model, ROWS[:8], 8, new_tokens=10)
    assert max(len(ids) for [ids] in found) > 1
    assert len(calls) == len(edits(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_bf16_is_trained_by_edits_in_fp32(checkpointing):
    model, run = tiny.attached(LoReFT(rank=4), tiny.model().bfloat16())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LoReFT().loss(model, tiny.batch(ROWS[:8]), run).backward()
        answered(model.eval(), ROWS[:4], 4)
    assert {p.dtype for p in trained_weights(model).values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any())) == p.requires_grad, (
            name
        )


def test_a_batch_of_one_equals_a_batch_of_many():
    model = attached(LoReFT(rank=4))
    one, many = ([s["nll"] for s in scored(model, ROWS, size)] for size in (1, len(ROWS)))
    assert one == pytest.approx(many, abs=1e-3, rel=1e-5)


def test_a_prompt_without_a_mask_is_all_prompt():
    model = attached(LoReFT(rank=4))
    ids = left_padded(ROWS[:1])[0]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_what_cannot_be_told_apart_is_refused():
    model = attached(LoReFT(rank=4))
    ids, mask = left_padded(ROWS[:2])
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, use_cache=False)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask).past_key_values
        with pytest.raises(ValueError, match="whole"):
            model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ValueError, match="attention mask"):
            model(input_ids=ids, attention_mask=mask[:, None, None].bool())


NARROW = {
    "vocab_size": tiny.VOCABULARY,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "bos_token_id": 2,
}
OTHERS = [
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, **NARROW,
    ),
    GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        initializer_range=0.1, **NARROW,
    ),
    GPT2Config(n_embd=64, n_layer=2, n_head=4, initializer_range=0.1, **NARROW),
    OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64,
        init_std=0.1, **NARROW,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_other_architectures_are_edited_alike(config):
    model = attached(LoReFT(rank=4), config)
    assert len(reft.blocks(model)) == 2
    rows = answered(model, ROWS[:8], 8)
    assert all(score["correct"] == score["tokens"] for score in scored(model, rows, 8))
    assert [s["nll"] for s in scored(tiny.model(config), rows, 8)] != [
        s["nll"] for s in scored(model, rows, 8)
    ]


def test_a_model_without_one_list_of_layers_is_refused():
    model = tiny.model()
    model.config.num_hidden_layers = 5
    with pytest.raises(Unsupported, match="5 layers"):
        tiny.attached(LoReFT(), model)


# Keeping


def test_what_is_saved_is_restored_and_is_only_what_was_trained(tmp_path):
    method = LoReFT(rank=3, layers="1", first=2, last=4, tied=False)
    trained, _, _ = fit(method, hyperparams(epochs=2.0), ROWS)
    method.save(trained, tmp_path)
    assert json.loads((tmp_path / "interventions.json").read_text())["layers"] == "1"
    saved = load_file(tmp_path / "interventions.safetensors")
    assert sum(value.numel() for value in saved.values()) == sizes(trained)["trainable"]
    again = LoReFT().restore(lambda **_: tiny.model(), tmp_path)  # the saved options, not the default ones
    assert not again.training
    assert scored(again, ROWS, 4) == scored(trained, ROWS, 4)
    assert answered(again, ROWS[:6], 6) == answered(trained, ROWS[:6], 6)


def test_a_copy_of_the_model_is_its_own():
    model = attached(LoReFT(rank=4))
    rows = answered(model, ROWS[:4], 4)
    again = copy.deepcopy(model)
    edits(model)[0].source.bias.data += 10
    assert answered(again, ROWS[:4], 4) == rows != answered(model, ROWS[:4], 4)


def test_merging_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="place in the prompt"):
        LoReFT().merge(attached(LoReFT()))


def test_impossible_options_are_refused():
    refused = (
        {"rank": 0}, {"dropout": 1.0}, {"first": -1}, {"first": 0, "last": 0},
        {"layers": ""}, {"layers": "1;2"},
    )  # fmt: skip
    cls = resolve("reft", known_methods()["reft"])
    assert cls is LoReFT and build(cls, {"layers": "3, 9,18", "tied": False})
    for options in refused:
        with pytest.raises(BadRequest):
            build(LoReFT, options)
    for method, reason in ((LoReFT(layers="0,2"), "layers: 2"), (LoReFT(rank=65), "64 values")):
        with pytest.raises(ValueError, match=reason):
            tiny.attached(method)
