"""The one loop against HF's and TRL's trainers, a loop written by hand, and itself cut otherwise."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fit, hyperparams, losses, trained_weights
from torch.utils.data import SequentialSampler

from harness.data.batches import Batches
from harness.method import Method
from harness.record import Tokens
from harness.training.loop import validation_points
from harness.training.weights import PIECE, Diverged, check, fingerprints
from methods.dora import DoRA
from methods.full import Full
from methods.grpo import GRPO
from methods.lora import LoRA
from methods.orpo import ORPO

ROWS = tiny.rows(22, seed=1)  # three steps of 8 rows, one of them short
EVEN = tiny.rows(56, seed=2)  # seven steps, none short: another trainer would have its short one at the end


def same(ours: dict, theirs: dict, tolerance: float):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# Other trainers, on the very same rows in the same order


class InOrder:
    """What is added to a trainer: it reads the rows as they lie, and keeps each step's loss."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen[-1] += loss.item()
        if self.accelerator.sync_gradients:
            self.seen.append(0.0)
        return loss


def by_trainer(kind: str, method, hp, folder):
    """The training of `fit`, by another library's trainer. -> model, losses, learning rates, norms."""
    model, run = tiny.attached(method, examples=EVEN, hp=hp)
    order = [row for step in run.batches for row in step]
    dataset = Dataset.from_list([
        {
            "input_ids": [*row.prompt_ids, *row.response_ids],
            "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.response_ids),
        }
        for row in order
    ])  # fmt: skip
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": hp.micro_batch_size,
        "gradient_accumulation_steps": hp.batch_size // hp.micro_batch_size,
        "num_train_epochs": 1,
        "learning_rate": hp.learning_rate,
        "lr_scheduler_type": hp.schedule,
        "warmup_steps": math.ceil(hp.warmup_ratio * run.steps),
        "weight_decay": hp.weight_decay,
        "max_grad_norm": hp.max_grad_norm,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        class Ordered(InOrder, SFTTrainer):
            seen = [0.0]

        trainer = Ordered(
            model=model,
            args=SFTConfig(**common, completion_only_loss=True, max_length=None, packing=False),
            train_dataset=dataset,
            processing_class=tiny.tokenizer(),
        )
    else:
        from transformers import Trainer, TrainingArguments

        class Ordered(InOrder, Trainer):
            seen = [0.0]

        trainer = Ordered(
            model=model,
            args=TrainingArguments(**common, remove_unused_columns=False),
            train_dataset=dataset,
            data_collator=pad,
        )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    rates, norms = [e["learning_rate"] for e in logs], [e["grad_norm"] for e in logs]
    return model, trainer.seen[:-1], rates, norms


def pad(features):
    width = max(len(f["input_ids"]) for f in features)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for f in features:
        ids, mask = f["input_ids"], f["completion_mask"]
        more = width - len(ids)
        batch["input_ids"].append(ids + [tiny.PAD] * more)
        batch["attention_mask"].append([1] * len(ids) + [0] * more)
        batch["labels"].append([i if m else -100 for i, m in zip(ids, mask, strict=True)] + [-100] * more)
    return {name: torch.tensor(value) for name, value in batch.items()}


@pytest.mark.parametrize("micro_batch_size", [8, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("kind", "method"), [("hf", LoRA()), ("trl", LoRA()), ("hf", Full()), ("trl", DoRA())],
    ids=["lora-hf", "lora-trl", "full-hf", "dora-trl"],
)  # fmt: skip
def test_training_equals_another_trainer_step_by_step(kind, method, micro_batch_size, tmp_path):
    decay = 0.0 if isinstance(method, DoRA) else 0.1  # HF decays DoRA's magnitudes, the loop no vector
    hp = hyperparams(micro_batch_size=micro_batch_size, weight_decay=decay)
    trained, _, measured = fit(method, hp, EVEN)
    theirs, their_losses, rates, norms = by_trainer(kind, method, hp, tmp_path)
    assert len(losses(measured)) == 7
    assert losses(measured) == pytest.approx(their_losses, abs=5e-6)
    assert [step["grad_norm"] for step in measured.training] == pytest.approx(norms, rel=1e-5)
    assert [step["learning_rate"] for step in measured.training] == pytest.approx(rates)
    # A hundredth of one step at the peak rate: Adam turns the rounding of a tiny gradient into a move.
    same(trained_weights(trained), trained_weights(theirs), 1e-5)


def test_those_micro_batches_carry_unequal_loss():
    """Else the comparison above could not tell token-weighted accumulation from a plain mean."""
    for step in tiny.steps(EVEN, hyperparams(micro_batch_size=4)):
        counts = [int((batch["labels"] != -100).sum()) for batch in step]
        assert len(set(counts)) == len(counts) == 2


# A loop by hand


def by_hand(hp, steps: int):
    """Full fine-tuning with the loss of HF's model, AdamW by the formula, clipping and cosine by hand."""
    model = tiny.model().train()
    parameters = list(model.parameters())
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    norms, warmup = [], math.ceil(hp.warmup_ratio * steps)
    for t, (batch,) in enumerate(tiny.steps(ROWS, hp), 1):
        model.zero_grad()
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
        norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in parameters))
        norms.append(norm)
        shrink = min(1.0, hp.max_grad_norm / (norm + 1e-6)) if hp.max_grad_norm else 1.0
        rate = hp.learning_rate * cosine(t, steps, warmup)
        with torch.no_grad():
            for p, m_, v_ in zip(parameters, m, v, strict=True):
                g = p.grad * shrink
                m_.mul_(hp.beta1).add_(g, alpha=1 - hp.beta1)
                v_.mul_(hp.beta2).add_(g * g, alpha=1 - hp.beta2)
                if p.ndim >= 2:
                    p.mul_(1 - rate * hp.weight_decay)
                p.sub_(rate * (m_ / (1 - hp.beta1**t)) / ((v_ / (1 - hp.beta2**t)).sqrt() + hp.epsilon))
    return model, norms


def cosine(step: int, steps: int, warmup: int) -> float:
    """Of the peak, at the step counted from 1: linear from 0, then half a cosine towards 0."""
    done = step - 1
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0, 1e3], ids=["clipped", "never", "not reached"])
def test_training_equals_a_loop_by_hand(max_grad_norm):
    hp = hyperparams(max_grad_norm=max_grad_norm, weight_decay=0.1, epsilon=1e-3, beta2=0.9, epochs=2.0)
    trained, _, measured = fit(Full(), hp, ROWS)
    theirs, norms = by_hand(hp, 6)
    found = [step["grad_norm"] for step in measured.training]
    assert found == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.5  # the norm reported is the one before clipping
    same(trained_weights(trained), trained_weights(theirs), 2e-6)


@pytest.mark.parametrize(("count", "ratio"), [(20, 0.03), (20, 0.25), (7, 0.0), (1, 0.0)])
def test_the_learning_rate_is_the_cosine_formula(count, ratio):
    hp = hyperparams(max_steps=count, warmup_ratio=ratio, learning_rate=3e-4)
    _, _, measured = fit(LoRA(), hp, ROWS)
    expected = [3e-4 * cosine(step, count, math.ceil(ratio * count)) for step in range(1, count + 1)]
    assert [step["learning_rate"] for step in measured.training] == pytest.approx(expected, abs=1e-12)
    assert [step["step"] for step in measured.training] == list(range(1, count + 1))


def test_no_step_of_a_short_training_is_lost():
    """With a warm-up from 0 the first step moves nothing; a training of one step must still train."""
    hp = hyperparams(max_steps=1, warmup_ratio=0.03)
    before = trained_weights(tiny.model())
    trained, _, _ = fit(Full(), hp, ROWS)
    assert any(not torch.equal(before[n], p) for n, p in trained_weights(trained).items())


# Micro-batches


@pytest.mark.parametrize("size", [4, 3, 2, 1])
def test_accumulation_changes_nothing(size):
    whole, _, expected = fit(LoRA(), hyperparams(max_steps=6), ROWS)
    cut, _, found = fit(LoRA(), hyperparams(max_steps=6, micro_batch_size=size), ROWS)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    norms = [[s["grad_norm"] for s in measured.training] for measured in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    same(trained_weights(cut), trained_weights(whole), 1e-5)


# What is not finite


class Breaks(Method):
    """Full fine-tuning whose loss is broken at one step."""

    def __init__(self, at: int, value: float):
        self.at, self.value, self.calls = at, value, 0

    def loss(self, model, batch, run):
        self.calls += 1
        return super().loss(model, batch, run) + (self.value if self.calls == self.at else 0.0)


@pytest.mark.fault(6)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_loss_that_is_not_finite_ends_the_training(at, value):
    told = []
    with pytest.raises(Diverged, match=f"at step {at} of 6"):
        hp = hyperparams(max_steps=6)
        fit(Breaks(at, value), hp, ROWS, on_step=lambda **values: told.append(values["step"]))
    assert told == list(range(1, at + 1))


class Explodes(Method):
    """Full fine-tuning with a loss of the same value whose gradient is not finite, at one step."""

    def __init__(self, at: int, size: float):
        self.at, self.size, self.calls = at, size, 0

    def loss(self, model, batch, run):
        self.calls += 1
        moved = sum((p - p.detach()).sum() for p in model.parameters())
        return super().loss(model, batch, run) + moved * (self.size if self.calls == self.at else 0.0)


@pytest.mark.fault(7)
@pytest.mark.parametrize(("size", "norm"), [(1e30, "inf"), (math.nan, "nan")])
def test_a_gradient_that_is_not_finite_ends_the_training(size, norm):
    """Clipping would turn it to zeros in silence where its squares overflow."""
    with pytest.raises(Diverged, match=r"the (loss|gradient norm) was .* at step 2 of 6") as caught:
        fit(Explodes(2, size), hyperparams(max_steps=6), ROWS)
    assert norm in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_the_last_step_broke_are_found(value):
    large = torch.zeros(3 * PIECE + 1)
    tensors = [torch.ones(3), large, torch.ones(2, 2)]
    before = fingerprints(dict.fromkeys(tensors, torch.float32))
    large[-1] = value  # in the last piece of it
    with pytest.raises(Diverged, match="1 of 3 trained tensors were not finite"):
        check(before, fingerprints(dict.fromkeys(tensors, torch.float32)), [])


@settings(max_examples=10)
@given(drawn=st.data())
def test_any_change_of_any_weight_is_seen(drawn):
    tensors = [torch.randn(5), torch.randn(2 * PIECE + 3)]
    before = fingerprints(dict.fromkeys(tensors, torch.float32))
    tensor = drawn.draw(st.sampled_from(tensors))
    at = drawn.draw(st.integers(0, tensor.numel() - 1))
    tensor[at] = torch.nextafter(tensor[at], torch.tensor(9.0))
    check(before, fingerprints(dict.fromkeys(tensors, torch.float32)), [{"grad_norm": 1.0}])
    with pytest.raises(ValueError, match="nothing was trained: no weight moved in 1 steps"):
        check(before, before, [{"grad_norm": None}])


def test_one_gradient_is_enough_to_have_trained():
    """LISA's and LoRA's may be zero at some steps; one that is not clipped has no norm."""
    moved = [[1, 0]], [[2, 0]]
    check(*moved, [{"grad_norm": 0.0}, {"grad_norm": 1e-9}])
    check(*moved, [{"grad_norm": None}])
    with pytest.raises(ValueError, match="the gradient was zero in all 2 steps"):
        check(*moved, [{"grad_norm": 0.0}, {"grad_norm": 0.0}])  # weight decay alone


def test_a_learning_rate_far_too_high_diverges_for_real():
    with pytest.raises(Diverged):
        fit(Full(), hyperparams(max_steps=6, learning_rate=1e30), ROWS)


# Validation


def test_validation_changes_no_step_even_with_dropout():
    held_out = tiny.rows(5, seed=9)

    def run(points, dropout):
        hp = hyperparams(max_steps=6, validations=points, eval_batch_size=2)
        return fit(LoRA(dropout=dropout), hp, ROWS, validation=held_out)[2]

    with_it, without = run(3, 0.3), run(0, 0.3)
    assert losses(with_it) == losses(without)
    assert [v["step"] for v in with_it.validation] == [2, 4, 6]
    assert all(math.isfinite(v["loss"]) for v in with_it.validation)
    assert not without.validation
    assert losses(run(0, 0.0)) != losses(without)  # the dropout was on


def test_the_model_is_put_back_to_training_after_a_validation():
    states = []

    class Watches(LoRA):
        def loss(self, model, batch, run):
            states.append(model.training)
            return super().loss(model, batch, run)

    hp = hyperparams(max_steps=6, validations=3)
    fit(Watches(), hp, ROWS, validation=ROWS[:2])
    assert states == [True] * 6


@pytest.mark.parametrize(("steps", "points"), [(1, 4), (3, 4), (10, 4), (100, 4), (5, 0), (5, 1)])
def test_validation_points_are_few_and_end_at_the_last_step(steps, points):
    found = validation_points(steps, points)
    assert len(found) == min(steps, points)
    assert all(1 <= point <= steps for point in found)
    assert not points or steps in found


# Seeds, order, hashes


def test_the_same_seed_is_bit_equal_and_another_is_not():
    hp = hyperparams(max_steps=6)
    first, again, other = (fit(LoRA(dropout=0.1), hp, ROWS, seed=seed) for seed in (0, 0, 1))
    assert losses(first[2]) == losses(again[2])
    same(trained_weights(first[0]), trained_weights(again[0]), 0.0)
    assert losses(first[2]) != losses(other[2])


def test_the_order_of_the_rows_depends_on_the_seed_alone():
    hp = hyperparams(epochs=2.0)
    torch.manual_seed(1)
    first = Batches(ROWS, hp, seed=0)
    torch.manual_seed(2)
    again = Batches(ROWS, replace(hp, micro_batch_size=3), seed=0)
    assert first.steps == again.steps
    assert first.hashes == again.hashes
    assert first.steps != Batches(ROWS, hp, seed=1).steps
    assert first.hashes != Batches(ROWS, hp, seed=1).hashes


@pytest.mark.parametrize("micro_batch_size", [8, 3])
@pytest.mark.parametrize("count", [24, 22, 20, 17])
def test_every_row_is_read_once_an_epoch(count, micro_batch_size):
    hp = hyperparams(epochs=2.0, micro_batch_size=micro_batch_size)
    made, steps = Batches(EVEN[:count], hp, 0), tiny.steps(EVEN[:count], hp)
    assert len(steps) == len(made) == len(made.hashes) == 6
    assert sorted(map(len, made.steps), reverse=True) == [8] * 4 + [count - 16] * 2
    whole = sorted((*row.prompt_ids, *row.response_ids) for row in EVEN[:count])
    for epoch in (steps[:3], steps[3:]):
        read = [
            tuple(ids[mask.bool()].tolist())
            for step in epoch
            for batch in step
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert sorted(read) == whole
    assert made.steps[:3] != made.steps[3:]


def test_a_part_of_an_epoch_and_a_number_of_steps_are_kept():
    assert tiny.run(ROWS, hyperparams(epochs=0.5)).steps == 2
    assert tiny.run(ROWS, hyperparams(max_steps=7)).steps == 7
    assert tiny.run(ROWS, hyperparams(max_steps=2, epochs=5.0)).steps == 2


def test_the_batches_of_a_training_are_read_alike_by_every_method():
    """And twice alike, as a method may look at them while it attaches."""
    read = {}

    class Notes(LoRA):
        def loss(self, model, batch, run):
            read.setdefault(type(self).__name__, []).append(batch["input_ids"].tolist())
            return super().loss(model, batch, run)

    class NotesFull(Notes):
        def attach(self, model, run):
            for _ in run.batches:
                torch.rand(3)  # a method that draws numbers must not shift the order
            return model.requires_grad_(True)

    hp = hyperparams(epochs=2.0)
    fit(Notes(), hp, ROWS)
    fit(NotesFull(), hp, ROWS)
    assert read["Notes"] == read["NotesFull"]
    assert read["Notes"] == [batch["input_ids"].tolist() for (batch,) in tiny.steps(ROWS, hp)]


def test_tokens_are_counted_as_the_tensors_have_them():
    hp = hyperparams(epochs=2.0, micro_batch_size=3)
    read = [batch for step in tiny.steps(ROWS, hp) for batch in step]
    trained = sum(int(b["attention_mask"].sum()) for b in read)
    _, _, measured = fit(Full(), hp, ROWS)
    assert measured.tokens == Tokens(
        trained=trained,
        supervised=sum(int((b["labels"] != -100).sum()) for b in read),
        padded=sum(b["input_ids"].numel() for b in read) - trained,
        rows=len(ROWS),
    )
    assert sum(Batches(ROWS, hp, 0).tokens) == trained


def test_a_step_hash_tells_where_the_response_begins():
    hp = hyperparams()
    row = next(row for row in ROWS if len(row.response_ids) > 1)
    ids = [*row.prompt_ids, *row.response_ids]
    moved = replace(row, prompt_ids=tiny.array(ids[:-1]), response_ids=tiny.array(ids[-1:]))
    assert Batches([row], hp, 0).hashes != Batches([moved], hp, 0).hashes


# What was read, as it was read


def given_by_hand(step, learned=False) -> str:
    """The hash of a step's rows, in whole numbers of Python: no tensors, no padding."""

    def mixed(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            signed = x - 2**64 if x >> 63 else x  # a signed number is shifted with its sign
            x = (x ^ (signed >> shift) % 2**64) * factor % 2**64
        signed = x - 2**64 if x >> 63 else x
        return x ^ (signed >> 31) % 2**64

    total = 0
    for row in step:
        tokens = list(enumerate([*row.prompt_ids, *row.response_ids], 1))
        tokens = tokens[len(row.prompt_ids) :] if learned else tokens
        total += mixed(sum(mixed((place << 32) + token + 1) for place, token in tokens) % 2**64)
    return f"{total % 2**64:016x}"


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}, {"packing": True, "max_length": 64}],
                         ids=["whole", "accumulated", "packed"])  # fmt: skip
@pytest.mark.parametrize("method", [Full(), LoRA()], ids=["full", "lora"])
def test_what_a_step_was_given_is_hashed_however_it_is_cut(method, changes):
    hp = hyperparams(epochs=2.0, **changes)
    steps = Batches(ROWS, hp, 0)
    hashes = fit(method, hp, ROWS)[2].hashes
    assert hashes["given"] == [given_by_hand(step) for step in steps]
    assert hashes["learned"] == [given_by_hand(step, learned=True) for step in steps]


def read_by(method, rows=ROWS, **changes):
    measured = fit(method, hyperparams(**{"max_steps": 3, "max_new_tokens": 4, **changes}), rows)[2]
    return measured.hashes, vars(measured.tokens)


def changed(rows, **changes):
    """The same rows, but the first, whose tokens or labels are others."""
    return [replace(rows[0], **{name: change(rows[0]) for name, change in changes.items()}), *rows[1:]]


def test_one_token_more_or_less_that_is_given_or_learned_is_another_hash():
    rows = tiny.rows(8, seed=4, prompt=(5, 9), response=(3, 6))
    expected, _ = read_by(Full(), rows)
    found, _ = read_by(Full(), changed(rows, prompt_ids=lambda r: r.prompt_ids[:2] + r.prompt_ids[:1:-1]))
    assert found["given"] != expected["given"] and found["learned"] == expected["learned"]
    found, _ = read_by(Full(), changed(rows, learned=lambda r: tiny.array([1, 3])))
    assert found["given"] == expected["given"] and found["learned"] != expected["learned"]
    # Two rows exchange their ends: the same tokens at the same places, in other rows.
    a, b = rows[0], replace(rows[1], prompt_ids=rows[0].prompt_ids[:-1] + rows[1].prompt_ids[:1])
    c, d = replace(a, response_ids=b.response_ids), replace(b, response_ids=a.response_ids)
    ends, exchanged = (read_by(Full(), pair)[0] for pair in ([a, b], [c, d]))
    assert ends["given"] != exchanged["given"] and ends["learned"] == exchanged["learned"]


def test_what_a_method_adds_changes_or_leaves_out_is_in_its_hash():
    """Rejected answers beside the chosen ones; the prompt's tokens learned too; rows never read, as their
    steps train on the draw of the step before."""
    plain, counts = read_by(LoRA())
    orpo, pairs = read_by(ORPO())
    assert all(a != b for a, b in zip(plain["given"], orpo["given"], strict=True))
    assert pairs["trained"] > 1.5 * counts["trained"] and pairs["rows"] == counts["rows"]
    prompts, more = read_by(ORPO(prompt_loss=True))
    assert prompts["given"] == orpo["given"] and prompts["learned"] != orpo["learned"]
    asked = sum(len(row.prompt_ids) - 1 for row in ROWS)  # of the rejected rows, which are not learned
    assert more["supervised"] == more["trained"] - 2 * len(ROWS) - asked  # all but the first token of a row
    _, half = read_by(GRPO(group=2, updates=2), tiny.rows(16), max_steps=2)
    assert half["rows"] == 8


def test_what_goes_past_the_one_head_is_counted_but_not_certified():
    class Own(Method):
        def loss(self, model, batch, run):
            return model(**{k: v for k, v in batch.items() if k in ("input_ids", "labels")}).loss

    class Twice(Method):
        def loss(self, model, batch, run):
            return (super().loss(model, batch, run) + super().loss(model, batch, run)) / 2

    hashes, tokens = read_by(Own())
    expected, counts = read_by(Full())
    assert hashes == {} and tokens == counts
    twice, double = read_by(Twice())
    assert twice["given"] != expected["given"] and double["trained"] == 2 * counts["trained"]
