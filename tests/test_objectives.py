"""ORPO and GRPO: against TRL's trainers, formulas worked out by hand, and the answers they train on."""

import math
import os
import random
from collections import Counter
from dataclasses import dataclass, replace
from statistics import mean, stdev

import pytest
import tiny
import torch
from datasets import Dataset
from scipy.stats import chisquare
from tiny import fit, hyperparams, losses, trained_weights
from torch.utils.data import SequentialSampler

from harness.data import Template
from harness.data.batches import Batches
from harness.data.formats import Conversation
from harness.method import build
from harness.training import engine
from harness.training.decoder import left_padded
from harness.training.head import token_logps
from methods.grpo import GRPO, advantages
from methods.lora import LoRA
from methods.orpo import ORPO, odds_ratio_loss

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
ROWS = tiny.rows(16, seed=4)
HP = hyperparams(max_new_tokens=6)


def paired(rows, seed: int = 50):
    """Every row with an answer of random tokens that is worse."""
    worse = tiny.rows(len(rows), seed)
    return [replace(row, rejected_ids=w.response_ids) for row, w in zip(rows, worse, strict=True)]


PAIRS = paired(ROWS)
# Conversations: in each prompt that is long enough stand two earlier answers, which are learned as well.
CHATS = [replace(row, learned=tiny.array([2, 4, 6, 9] if len(row.prompt_ids) > 10 else [])) for row in PAIRS]


def untied():
    """With a head of its own: a random model with a tied one only says its last token again."""
    return tiny.model(tiny.gemma(tie_word_embeddings=False), seed=3)


def awake(model, seed: int = 0):
    """Adapters as after some training: they do something, and both of their factors have a gradient."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def started(method, rows=PAIRS, hp=HP, base=None):
    """-> the model that a training starts from, adapters awake, and its run."""
    model, run = tiny.attached(method, base, rows, hp)
    return awake(model).train(), run


def gradients(model, micro_batches, run):
    """-> the mean loss of a step and its gradients, as the loop takes them."""
    model.zero_grad()
    value = run.accumulate(model, micro_batches).item()
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def same(ours: dict, theirs: dict, tolerance: float = 1e-6):
    assert ours.keys() == theirs.keys()
    assert max(value.abs().max().item() for value in theirs.values()) > 100 * tolerance
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=1e-4)


def by_hand(model, prompt, response) -> torch.Tensor:
    """Log-probabilities of a response's tokens from the model's own logits: one row, no padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def greedy(model, row, stops) -> list[int]:
    """No cache, no padding, no batch."""
    ids = list(row.prompt_ids)
    with torch.no_grad():
        while len(ids) < len(row.prompt_ids) + HP.max_new_tokens:
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] in stops:
                break
    return ids[len(row.prompt_ids) :]


STOPS = list(range(5, tiny.VOCABULARY, 8))  # so that some answers end by themselves and others do not


def stopping(*args, **more):
    """A run whose answers end at these stops."""
    run = tiny.run(*args, **more)
    run.decoder.stops = STOPS
    return run


def trl_options(folder, **more) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


# ORPO's loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "log_sigmoid", "penalty"),
    [
        (-0.5, -1.0, -0.32029979, 0.03202998),
        (-1.0, -0.5, -1.29437677, 0.12943768),
        (-0.7, -0.7, -0.69314718, 0.06931472),
        (-2.3, -0.105, -4.40744853, 0.44074485),
    ],
)
def test_the_odds_ratio_has_the_known_values(chosen, rejected, log_sigmoid, penalty):
    found = odds_ratio_loss(torch.tensor([chosen]), torch.tensor([rejected]))
    assert found.item() == pytest.approx(-log_sigmoid, abs=1e-6)
    assert ORPO().weight * found.item() == pytest.approx(penalty, abs=1e-6)


def test_the_odds_ratio_is_its_formula_in_double_precision():
    values = [-1e-5, -1e-3, -0.1, -math.log(2), -3.0, -12.0, -60.0]
    for c in values:
        for r in values:
            odds = math.exp(c) / -math.expm1(c), math.exp(r) / -math.expm1(r)
            found = odds_ratio_loss(torch.tensor([c]), torch.tensor([r])).item()
            assert found == pytest.approx(math.log1p(odds[1] / odds[0]), rel=2e-5, abs=1e-7), (c, r)


def test_extreme_probabilities_keep_loss_and_gradient_finite():
    values = [0.0, -1e-30, -1e-9, -1e-7, -1e-4, -80.0, -1e4, -1e30]
    chosen = torch.tensor([c for c in values for _ in values], requires_grad=True)
    rejected = torch.tensor(values * len(values), requires_grad=True)
    found = odds_ratio_loss(chosen, rejected)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    assert (chosen.grad <= 0).all()
    assert (rejected.grad >= 0).all()


def spans_of(learned) -> list[tuple[int, int]]:
    return list(zip(learned[::2], learned[1::2], strict=True))


def expected_orpo(model, rows, weight: float, prompt: bool) -> float:
    """Of a whole step: the likelihood is a mean over its tokens, the odds ratio over its rows."""
    chosen = [by_hand(model, row.prompt_ids, row.response_ids) for row in rows]
    rejected = [by_hand(model, row.prompt_ids, row.rejected_ids) for row in rows]
    whole = [by_hand(model, r.prompt_ids[:1], [*r.prompt_ids[1:], *r.response_ids]) for r in rows]
    learned = whole if prompt else [*chosen]
    if not prompt:
        for row, logps in zip(rows, whole, strict=True):
            learned += [logps[a - 1 : b - 1] for a, b in spans_of(row.learned)]
    odds = [[(p := math.exp(x.mean())) / (1 - p) for x in answers] for answers in (chosen, rejected)]
    ratios = [math.log1p(r / c) for c, r in zip(*odds, strict=True)]
    return -torch.cat(learned).mean().item() + weight * mean(ratios)


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "conversations"])
def test_the_loss_of_a_step_is_the_formula_by_hand(rows, prompt, micro):
    method = ORPO(weight=0.7, prompt_loss=prompt)
    model, run = started(method, rows, replace(HP, micro_batch_size=micro))
    for step in run.batches:
        found, _ = gradients(model, method.prepare(model, step, run), run)
        expected = expected_orpo(model, step, 0.7, prompt)
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("prompt", [False, True])
def test_a_steps_gradient_depends_on_neither_micro_batches_nor_the_order_of_rows(prompt):
    method = ORPO(weight=0.7, prompt_loss=prompt)
    model, run = started(method, CHATS, replace(HP, micro_batch_size=16))
    whole = gradients(model, method.prepare(model, CHATS, run), run)
    for size, order in ((16, 1), (5, 0), (5, 2), (1, 0)):
        rows = random.Random(order).sample(CHATS, len(CHATS)) if order else CHATS
        run.hp = replace(HP, micro_batch_size=size)
        value, found = gradients(model, method.prepare(model, rows, run), run)
        assert value == pytest.approx(whole[0], abs=1e-5)
        same(found, whole[1])


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "conversations"])
def test_without_the_odds_ratio_it_is_fine_tuning_on_the_chosen_answers(rows, micro):
    """On every answer of a conversation, as any other method learns them."""
    hp = replace(HP, micro_batch_size=micro)
    plain, _, expected = fit(LoRA(), hp, rows)
    found, _, measured = fit(ORPO(weight=0.0), hp, rows)
    assert losses(measured) == pytest.approx(losses(expected), abs=1e-5)
    same(trained_weights(found), trained_weights(plain), 1e-5)


def test_equal_answers_cost_ln_2_and_teach_no_preference():
    rows = [replace(row, rejected_ids=row.response_ids) for row in ROWS]
    method = ORPO(weight=0.5)
    model, run = started(method, rows)
    step = method.prepare(model, rows, run)
    found, both = gradients(model, step, run)
    method.weight = 0.0
    without, expected = gradients(model, step, run)
    assert found - without == pytest.approx(0.5 * math.log(2), abs=1e-5)
    same(both, expected)


class InOrder:
    """What is added to a trainer: it reads the rows as they lie, and keeps each step's loss."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        return loss


def tokenized(row) -> dict:
    """A row as TRL's ORPO trainer would have made it, of the very same tokens."""
    prompt, found = list(row.prompt_ids), {}
    for name, ids in (("chosen", list(row.response_ids)), ("rejected", list(row.rejected_ids))):
        found[f"{name}_input_ids"] = prompt + ids
        found[f"{name}_attention_mask"] = [1] * len(prompt + ids)
        found[f"{name}_labels"] = [-100] * len(prompt) + ids
    return found


@pytest.mark.parametrize("micro", [8, 3])
def test_orpo_equals_trls_trainer_step_by_step(micro, tmp_path):
    """TRL in one batch a step: of micro-batches it takes the mean of means, where the loop weighs tokens."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Ordered(InOrder, ORPOTrainer):
        seen = []

    rows = paired(tiny.rows(40, seed=8))
    hp = hyperparams(micro_batch_size=micro)
    method = ORPO(weight=0.5, prompt_loss=True)
    trained, _, record = fit(method, hp, rows)
    theirs, run = tiny.attached(method, examples=rows, hp=hp)
    options = trl_options(
        tmp_path, beta=0.5, per_device_train_batch_size=8, learning_rate=hp.learning_rate, warmup_steps=2,
        lr_scheduler_type="cosine", max_grad_norm=1.0, optim="adamw_torch", logging_steps=1, max_length=512,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = Ordered(
        theirs, ORPOConfig(**options, num_train_epochs=1), train_dataset=text,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train_dataset = Dataset.from_list([tokenized(row) for step in run.batches for row in step])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == run.steps == 5
    assert losses(record) == pytest.approx(trainer.seen, abs=1e-5)
    norms = [step["grad_norm"] for step in record.training]
    assert norms == pytest.approx([entry["grad_norm"] for entry in logs], rel=1e-4)
    same(trained_weights(trained), trained_weights(theirs), 1e-5)


# ORPO's answers


def test_without_pairs_the_rejected_answers_are_the_untouched_models_own():
    """From before the training: after it the model says other things."""
    method = ORPO(answer_tokens=6)
    method.attach(untied(), stopping(ROWS, HP))
    expected = {row.id: greedy(untied(), row, STOPS) for row in ROWS}
    assert {name: list(ids) for name, ids in method.answers.items()} == expected
    assert len({ids[-1] in STOPS for ids in expected.values()}) == 2  # some ended, some did not

    hp = replace(HP, learning_rate=3e-2, epochs=4.0)
    method = ORPO(answer_tokens=6)
    trained, _, _ = fit(method, hp, ROWS, base=untied())
    expected = {row.id: greedy(untied(), row, [tiny.EOS, tiny.END]) for row in ROWS}
    assert {name: list(ids) for name, ids in method.answers.items()} == expected
    assert any(greedy(trained.eval(), row, [tiny.EOS, tiny.END]) != expected[row.id] for row in ROWS)


def test_a_pass_reads_every_chosen_answer_and_every_rejected_one():
    rows = CHATS[:10] + ROWS[10:]
    hp = replace(HP, micro_batch_size=3)
    method = ORPO(answer_tokens=6)
    model, run = tiny.attached(method, examples=rows, hp=hp)
    worse = {row.id: list(row.rejected_ids or method.answers[row.id]) for row in rows}
    for step in run.batches:
        prepared = method.prepare(model, step, run)
        assert [len(batch["labels"]) for batch in prepared] == [6, 6, 4]
        for part, batch in zip((step[:3], step[3:6], step[6:]), prepared, strict=True):
            expected = [[*row.prompt_ids, *row.response_ids] for row in part]
            expected += [[*row.prompt_ids, *worse[row.id]] for row in part]
            read = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
            earlier = [row.learned for row in part] + [[]] * len(part)  # chosen alone
            for ids, (tokens, mask, labels), length, spans in zip(
                expected, read, batch["prompt_lengths"].tolist(), earlier, strict=True
            ):
                assert tokens[mask.bool()].tolist() == ids
                learned = {*range(length, len(ids)), *(i for a, b in spans_of(spans) for i in range(a, b))}
                assert labels[mask.bool()].tolist() == [
                    token if i in learned else -100 for i, token in enumerate(ids)
                ]
                assert (labels[~mask.bool()] == -100).all()
    total = sum(row.length + len(row.prompt_ids) + len(worse[row.id]) for row in rows)
    assert fit(ORPO(answer_tokens=6), hp, rows)[2].tokens.trained == total


def test_pairs_in_the_data_are_used_as_they_are_and_only_rows_that_are_read_are_answered():
    method = ORPO(answer_tokens=6)
    _, run = tiny.attached(method, examples=PAIRS, hp=HP)
    assert method.answers == {}
    assert run.record.tokens.sampled is None

    _, run = tiny.attached(method, examples=PAIRS[:10] + ROWS[10:], hp=replace(HP, max_steps=1))
    asked = {row.id for row in next(iter(run.batches)) if not row.rejected_ids}
    assert set(method.answers) == asked
    assert 0 < len(asked) < 6
    assert run.record.tokens.sampled == sum(map(len, method.answers.values()))
    assert run.record.notes["rejected answers generated by the model itself"] == len(asked)


def test_own_answers_that_equal_the_chosen_ones_are_counted():
    says = [replace(r, response_ids=tiny.array(greedy(untied(), r, STOPS))) for r in ROWS[:3]]
    run = stopping(says + ROWS[3:], HP)
    ORPO(answer_tokens=6).attach(untied(), run)
    assert run.record.notes["of these, equal to the chosen answer: nothing to prefer"] == 3


# GRPO's loss


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 1], [0.8659, -0.8659, -0.8659, 0.8659]),
        ([1, 0, 0, 0], [1.4997, -0.4999, -0.4999, -0.4999]),
        ([0, 0], [0, 0]),
    ],
)
def test_advantages_have_the_known_values(rewards, expected):
    """Beside another group, which must not count."""
    both = torch.tensor([[5.0] + [2.0] * (len(rewards) - 1), [float(r) for r in rewards]])
    assert advantages(both)[1].tolist() == pytest.approx(expected, abs=1e-4)


def test_equal_rewards_are_no_advantage_whatever_they_are():
    """A mean may be rounded: 0.1 is not what seven times 0.1 divided by 7 is."""
    for count in range(2, 17):
        equal = torch.arange(101)[:, None].div(100).expand(-1, count)
        assert (advantages(equal) == 0).all()


@dataclass
class Judged(GRPO):
    """GRPO with a reward of our own; what it drew, and the ratios of each step, are kept."""

    answer_tokens: int = HP.max_new_tokens

    def attach(self, model, run):
        run.reward = self.reward
        self.read, self.groups, self.ratios = [], [], []
        return super().attach(model, run)

    def reward(self, row, ids):
        return sum(ids) % 7 / 7

    def draw(self, model, examples, run):
        self.read.append([row.id for row in examples])
        self.groups.append(super().draw(model, examples, run))
        return self.groups[-1]

    def objective_of(self, logps, old, base, advantages, answers):
        ratios = torch.exp(logps - old)[answers].detach()
        self.ratios.append((self.done, ratios.min().item(), ratios.max().item()))
        return super().objective_of(logps, old, base, advantages, answers)


def first_draw(model, run) -> list[dict]:
    """The micro-batches of its first step."""
    return run.method.prepare(model, next(iter(run.batches)), run)


class Even(Judged):
    def reward(self, row, ids):
        return 0.01  # in single precision the mean of seven is another number, and so they deviate


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["step", "row"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_equal_rewards_move_nothing(kl, rows):
    """With a KL term too, as long as the model is still the base."""
    method = Even(group=7, kl=kl)
    model, run = tiny.attached(method, examples=rows, hp=HP)
    value, found = gradients(model, first_draw(model, run), run)
    assert value == 0
    assert all((gradient == 0).all() for gradient in found.values())
    assert run.record.notes["share of groups with equal rewards: nothing to learn"] == 1.0


def test_the_first_step_is_on_policy_and_at_the_base():
    """Ratio 1 and KL 0: the loss is minus the mean advantage, which is 0, and yet there is a gradient."""
    method = Judged()
    model, run = tiny.attached(method, examples=ROWS, hp=HP)
    drawn = first_draw(model, run)
    value, found = gradients(model, drawn, run)
    assert value == pytest.approx(0.0, abs=1e-6)
    assert all(low == high == 1.0 for _, low, high in method.ratios)
    assert all(torch.equal(batch["base"], batch["old"]) for batch in drawn)
    assert max(value.abs().max() for value in found.values()) > 1e-3
    assert run.record.notes["share of groups with equal rewards: nothing to learn"] < 0.5


def test_every_loss_is_zero_where_every_step_is_on_policy_and_nothing_holds_to_the_base():
    _, _, record = fit(Judged(group=4, kl=0.0), replace(HP, learning_rate=1e-2), ROWS)
    assert losses(record) == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("kl", [0.04, 0.0])
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["on policy", "clipped"])
def test_grpo_equals_trls_loss_and_gradient(noise, kl, tmp_path):
    """On the same tokens, advantages, and log-probabilities of the old policy and of the base."""
    from trl import GRPOConfig, GRPOTrainer

    model, run = started(GRPO(kl=kl), ROWS)
    options = trl_options(
        tmp_path, loss_type="grpo", beta=kl, epsilon=0.2, use_bias_correction_kl=False, num_generations=8
    )
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), GRPOConfig(**options),
        Dataset.from_list([{"prompt": "a"}] * 8), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    draw = torch.Generator().manual_seed(1)

    def disturbed(values):
        return values + noise * torch.randn(values.shape, generator=draw)

    earned = torch.randn(len(ROWS), generator=draw)
    batch = {**run.collate(ROWS), "advantages": earned}
    prompts, prompt_mask = left_padded(ROWS, tiny.PAD, "cpu")
    width = max(len(row.response_ids) for row in ROWS)
    ids, mask = torch.full((16, width), tiny.PAD), torch.zeros(16, width, dtype=torch.long)
    theirs = {"old": torch.zeros(16, width), "base": torch.zeros(16, width)}
    ours = {name: torch.full((16, batch["labels"].shape[1] - 1), 7.0) for name in theirs}  # masked: any
    for i, row in enumerate(ROWS):
        p, r = len(row.prompt_ids), len(row.response_ids)
        ids[i, :r], mask[i, :r] = torch.tensor(list(row.response_ids)), 1
        old = by_hand(model, row.prompt_ids, row.response_ids).float()
        for name, values in (("old", disturbed(old)), ("base", old + 0.3 * torch.randn(r, generator=draw))):
            theirs[name][i, :r] = ours[name][i, p - 1 : p - 1 + r] = values
    model.zero_grad()
    expected = trainer._compute_loss(model, {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": earned, "old_per_token_logps": theirs["old"], "ref_per_token_logps": theirs["base"],
    })  # fmt: skip
    expected.backward()
    by_trl = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    found, own = gradients(model, [{**batch, **ours}], run)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    same(own, by_trl, 1e-5)
    clipped = [trainer._metrics["train"][f"clip_ratio/{side}_mean"][0] for side in ("low", "high")]
    assert min(clipped) > 0.05 if noise else max(clipped) == 0


def test_the_base_is_the_model_without_adapters_to_the_bit():
    model, run = started(Judged(group=4), ROWS)
    drawn = first_draw(model, run)
    gradients(model, drawn, run)
    for batch in drawn:
        assert torch.equal(batch["base"], token_logps(tiny.model(), batch))
        assert not torch.equal(batch["base"], batch["old"])
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


@pytest.mark.parametrize(("kl", "expected"), [(0.04, [2, 1]), (0.0, [1, 1])])
def test_the_base_is_read_once_a_draw_and_only_for_the_kl_term(kl, expected):
    method, passes = Judged(group=2, kl=kl, updates=2), []
    model, run = started(method, ROWS)
    for step in run.batches:
        drawn, calls = method.prepare(model, step, run), []
        hook = model.get_base_model().get_decoder().register_forward_hook(lambda *_, c=calls: c.append(1))
        gradients(model, drawn, run)
        hook.remove()
        passes.append(len(calls) // len(drawn))
    assert passes == expected


def test_micro_batches_of_unequal_size_are_as_one():
    """On the policy that drew, and off it, where the ratios are clipped."""
    method = Judged(group=5, clip=0.02)
    model, run = started(method, ROWS, replace(HP, micro_batch_size=3), untied())
    run.decoder.stops = STOPS
    drawn = first_draw(model, run)
    assert [len(batch["labels"]) for batch in drawn] == [3] * 13 + [1]
    assert len({(batch["labels"] != -100).sum() / len(batch["labels"]) for batch in drawn}) > 5
    whole = [run.collate([row for batch in drawn for row in batch["examples"]])]
    whole[0]["advantages"] = torch.cat([batch["advantages"] for batch in drawn])
    for nudge in (0.0, 1.03):
        for parameter in model.parameters():
            if parameter.requires_grad and nudge:
                parameter.data *= nudge
        (value, found), (expected, one) = (gradients(model, step, run) for step in (drawn, whole))
        assert value == pytest.approx(expected, abs=1e-6)
        same(found, one)
    assert method.ratios[-1][1] < 0.98 < 1.02 < method.ratios[-1][2]


# GRPO's answers


@pytest.fixture(scope="module")
def policy():
    """A model with awake adapters, dropout on, and generation settings of its own that must not count."""
    model, _ = tiny.attached(GRPO(dropout=0.5), untied())
    config = model.get_base_model().generation_config
    config.temperature, config.top_k, config.top_p, config.repetition_penalty = 0.3, 4, 0.5, 3.0
    return awake(model).train()


def test_first_tokens_are_as_frequent_as_the_model_says(policy):
    """For a short prompt and a long one at once, so that padding would show."""
    count, by_length = 2000, sorted(ROWS, key=lambda row: len(row.prompt_ids))
    hp = hyperparams(max_new_tokens=1, batch_size=2 * count)
    rows = [by_length[0], by_length[-1]]
    torch.manual_seed(0)
    drawn = tiny.run(hp=hp).sample(policy, rows, 1, copies=count, temperature=1.0)
    policy.eval()
    for row, answers in zip(rows, drawn, strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([list(row.prompt_ids)])).logits[0, -1].double()
        observed = torch.bincount(torch.tensor(answers)[:, 0], minlength=tiny.VOCABULARY)
        assert chi_squared(observed, count * logits.softmax(-1)) > 1e-3
    policy.train()


def chi_squared(observed, expected) -> float:
    """The p-value, with the rare tokens together."""
    often = expected >= 5
    assert often.sum() > 50
    pooled = [torch.cat([x[often], x[~often].sum()[None]]).tolist() for x in (observed, expected)]
    return chisquare(*pooled).pvalue


def test_what_is_trained_on_is_drawn_by_the_models_own_probabilities(monkeypatch):
    """At temperature 1, through the method: the ratios of its loss are of those probabilities."""
    seen, draw = [], engine.drawn

    def drawn(probabilities, numbers):
        seen.append(probabilities)
        return draw(probabilities, numbers)

    monkeypatch.setattr(engine, "drawn", drawn)
    first_draw(*tiny.attached(Judged(group=4, answer_tokens=1), untied(), ROWS[:1], HP))
    with torch.no_grad():
        logits = untied()(input_ids=torch.tensor([list(ROWS[0].prompt_ids)])).logits[0, -1]
    torch.testing.assert_close(seen[0], logits.softmax(-1).expand(4, -1), atol=1e-6, rtol=1e-4)


def test_drawn_answers_end_with_a_stop_or_at_the_limit_and_are_counted(policy):
    run = stopping(hp=HP)
    groups = run.sample(policy, ROWS, HP.max_new_tokens, copies=4, temperature=1.0)
    assert [len(group) for group in groups] == [4] * len(ROWS)
    answers = [ids for group in groups for ids in group]
    for ids in answers:
        assert ids[-1] in STOPS or len(ids) == HP.max_new_tokens
        assert not any(token in STOPS for token in ids[:-1])
    assert {ids[-1] in STOPS for ids in answers} == {True, False}
    assert all(len({tuple(ids) for ids in group}) > 1 for group in groups)
    assert run.record.tokens.sampled == sum(map(len, answers))


def test_answers_are_drawn_without_dropout_and_training_mode_comes_back(policy):
    found = []
    for training in (True, False):
        policy.train(training)
        torch.manual_seed(3)
        found.append(tiny.run(hp=HP).sample(policy, ROWS, 6, copies=2, temperature=1.0))
        assert all(module.training == training for module in policy.modules())
    assert found[0] == found[1]
    policy.train()


@pytest.mark.parametrize("size", [1, 5, 32])
def test_greedy_samples_are_the_answers_of_the_evaluation(size):
    run = stopping(hp=replace(HP, eval_batch_size=size, batch_size=7))
    found = [ids for [ids] in run.sample(untied(), ROWS, HP.max_new_tokens)]
    assert found == [greedy(untied(), row, STOPS) for row in ROWS]
    for ids, answer in zip(found, run.decoder.answers(untied(), ROWS), strict=True):
        assert answer["new_tokens"] == len(ids)
        assert answer["stopped"] == (ids[-1] in STOPS)
        assert answer["output"] == run.decoder.text_of(ids)


def test_how_an_evaluation_is_batched_changes_no_draw(policy):
    found = []
    for size in (1, 32):
        torch.manual_seed(0)
        run = tiny.run(hp=replace(HP, eval_batch_size=size))
        found.append(run.sample(policy, ROWS, 6, copies=2, temperature=1.0))
    assert found[0] == found[1]


@pytest.mark.parametrize("scored", [1, 50])
def test_the_evaluations_limit_cuts_no_answer_to_train_on(scored):
    hp = replace(HP, max_new_tokens=scored)
    method = ORPO(answer_tokens=9)
    tiny.attached(method, untied(), ROWS, hp)
    assert max(map(len, method.answers.values())) == 9
    drawn = first_draw(*tiny.attached(Judged(group=2, answer_tokens=9), untied(), ROWS, hp))
    assert max(len(row.response_ids) for batch in drawn for row in batch["examples"]) == 9


def test_copies_of_a_greedy_answer_are_equal():
    run = tiny.run(hp=HP)
    alone = run.sample(untied(), ROWS, 6)
    assert run.sample(untied(), ROWS, 6, copies=3) == [group * 3 for group in alone]


def test_a_sampled_answer_leaves_no_row_longer_than_max_length():
    hp = replace(HP, max_length=max(len(row.prompt_ids) for row in ROWS) + 2)
    found = tiny.run(hp=hp).sample(untied(), ROWS, 6, copies=2, temperature=1.0)
    lengths = [
        len(row.prompt_ids) + len(ids) for row, group in zip(ROWS, found, strict=True) for ids in group
    ]
    assert max(lengths) == hp.max_length


def test_every_answer_carries_the_advantage_that_it_earned():
    """Worked out again from the tokens in the micro-batches; each as large as the step's own were."""
    method, hp = Judged(group=4), replace(HP, micro_batch_size=3)
    model, run = tiny.attached(method, untied(), ROWS, hp)
    for step in run.batches:
        drawn = method.prepare(model, step, run)
        assert [len(batch["labels"]) for batch in drawn] == [3] * 10 + [2]
        assert all(len(b["advantages"]) == len(b["examples"]) == len(b["labels"]) for b in drawn)
        answers, earned = (
            [row for b in drawn for row in b["examples"]],
            torch.cat([b["advantages"] for b in drawn]),
        )
        labels = [x[x != -100].tolist() for b in drawn for x in b["labels"]]
        assert labels == [list(row.response_ids) for row in answers]
        assert [row.id for row in answers] == [row.id for row in step for _ in range(4)]
        for start, row in enumerate(step):
            group = answers[4 * start : 4 * start + 4]
            assert all(answer.prompt_ids == row.prompt_ids for answer in group)
            rewards = [sum(answer.response_ids) % 7 / 7 for answer in group]
            expected = [(r - mean(rewards)) / (stdev(rewards) + 1e-4) for r in rewards]
            assert earned[4 * start : 4 * start + 4].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_order_of_the_data_is_every_methods():
    hp = replace(HP, epochs=2.0, micro_batch_size=4)
    plain, method = Batches(ROWS, hp, 0), Judged(group=2)
    model, run = tiny.attached(method, examples=ROWS, hp=hp)
    for step in run.batches:
        method.prepare(model, step, run)
    assert method.read == [[row.id for row in step] for step in plain]
    assert run.batches.hashes == plain.hashes


def test_what_is_rewarded_becomes_likelier():
    rows = ROWS[:4]

    def first_token(model):
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([list(r.prompt_ids)])).logits[0, -1] for r in rows]
        return torch.stack(logits).softmax(-1).mean(0)

    before = first_token(untied())
    token = before.argmax().item()

    class Wants(Judged):
        def reward(self, row, ids):
            return float(ids[0] == token)

    hp = hyperparams(
        batch_size=4, micro_batch_size=4, max_steps=12, learning_rate=1e-2,
        schedule="constant", warmup_ratio=0.0,
    )  # fmt: skip
    method = Wants(group=8, answer_tokens=2)
    trained, _, record = fit(method, hp, rows, base=untied())
    assert first_token(trained.eval())[token] > 3 * before[token]
    first, last = (
        record.notes[f"mean reward of drawn answers, {part} tenth of the draws"] for part in ("first", "last")
    )
    assert last > first
    assert (first, last) == (pytest.approx(method.rewards[0]), pytest.approx(method.rewards[-1]))


@pytest.mark.parametrize(
    ("kind", "reference", "other"),
    [("rouge_l", "the cat sat on the mat", "the dog ran"), ("exact", "2 and 2: #### 4", "2 and 2: #### 5")],
)
def test_a_tokenised_reference_earns_all_and_another_answer_less(kind, reference, other):
    def example(answer):
        turns = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": answer}]
        [made] = template.examples([Conversation("a:0", "a", turns)], 128, Counter())
        return made

    template = Template(tiny.tokenizer(), "chat")
    run, asked = tiny.run(reward=kind), example(reference)
    assert asked.response_ids[-1] in run.decoder.stops
    for ids in (asked.response_ids, asked.response_ids[:-1]):  # with the stop token, and cut before it
        assert run.reward(asked, list(ids)) == 1.0
    assert run.reward(asked, list(example(other).response_ids)) < 1.0


def test_two_updates_on_a_draw_read_every_second_step_and_are_clipped():
    hp = replace(HP, epochs=2.0, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)

    def run(clip, steps=4):
        method = Judged(group=4, clip=clip, updates=2)
        return trained_weights(fit(method, replace(hp, max_steps=steps), ROWS)[0]), method

    tight, method = run(0.05)
    first, _, third, _ = Batches(ROWS, hp, 0)
    assert method.read == [[row.id for row in step] for step in (first, third)]
    for step, low, high in method.ratios:
        assert (low == high == 1.0) if step % 2 else (low < 0.95 and high > 1.05)
    wide, _ = run(1e9)
    assert any(not torch.equal(tight[name], wide[name]) for name in tight)
    same(run(0.05, 1)[0], run(1e9, 1)[0], 1e-9)  # the first update is on policy: no ratio to clip


@pytest.mark.parametrize("wrong", [{"group": 1}, {"updates": 0}, {"clip": 0.0}, {"kl": -0.1}, {"rank": 0},
                                   {"answer_tokens": 0}])  # fmt: skip
def test_options_that_cannot_be_are_refused_by_grpo(wrong):
    with pytest.raises(ValueError, match="must"):
        build(GRPO, wrong)


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"answer_tokens": 0}])
def test_options_that_cannot_be_are_refused_by_orpo(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: must be at least"):
        build(ORPO, wrong)
