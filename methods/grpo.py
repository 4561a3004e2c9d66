"""GRPO: reinforcement learning on groups of the model's own answers, each judged against its group.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        r: rewards of the answers to one prompt
    L = -mean_i mean_t [ min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) - kl * (e^d - d - 1) ]
    rho = p / p_old,  d = log p_base - log p

Shao et al. 2024, DeepSeekMath, arXiv:2402.03300.

Performance: learns from a reward in place of references, so it needs answers that are sometimes right.
Efficiency: LoRA's memory for weights and moments, but generating the answers dominates the time.
Generalisation: the KL term holds it near the base; what no sampled answer does cannot be learned.
"""

from array import array
from dataclasses import dataclass, replace
from statistics import fmean as mean
from typing import Annotated

from harness.method import Natural, NotNegative, Positive, Range
from methods.lora import LoRA


@dataclass
class GRPO(LoRA):
    """With LoRA's adapters, so that the base is the model without them. Answers are drawn at temperature
    1, as the probabilities that are trained are those. A micro-batch holds as many answers as it would
    rows, so that its memory is comparable; a step has `group` times as many of them."""

    group: Annotated[int, Range(least=2)] = 8  # answers to each prompt: TRL's default; the paper draws 64
    clip: Positive = 0.2  # of the probability ratio, which is 1 unless `updates` is above 1
    kl: NotNegative = 0.04  # weight of the distance to the base model, the paper's; 0: no base model is read
    updates: Natural = 1  # optimizer steps on each draw, the paper's; the steps between read no rows
    answer_tokens: Natural = 128  # of a drawn answer, at most; hp.max_new_tokens' default, the paper has 1024

    axis = "objective"
    learning_rates = (1e-5, 1e-4)  # ten times the paper's 1e-6 and more, as LoRA's weights want
    tunes = ("kl", (0.0, 0.001))  # TRL's default, and DeepSeek-R1's
    objective = "reward"
    aim = "reward"
    mean_over = "rows"
    cannot = {
        "packing": "it trains on answers of its own, a row a sequence",
        "sharding": "it draws answers from the model at each step, which no device holds whole",
        "plain text": "a text asks nothing and has no reference, so that no answer earns anything",
    }

    def attach(self, model, run):
        self.done, self.drawn, self.rewards, self.flat = 0, [], [], []
        self.devices = run.devices.count
        return super().attach(model, run)

    def prepare(self, model, examples, run):
        if self.done % self.updates == 0:
            self.drawn = self.draw(model, examples, run)
        self.done += 1
        return self.drawn

    def draw(self, model, examples, run) -> list[dict]:
        """Answers to the prompt of every example, as micro-batches with `advantages` (B,)."""
        import torch

        groups = run.sample(model, examples, self.answer_tokens, copies=self.group, temperature=1.0)
        rewards = torch.tensor(
            [[run.reward(e, ids) for ids in group] for e, group in zip(examples, groups, strict=True)],
            dtype=torch.float32,
        )  # (examples, group)
        self.tell(rewards, run)
        answers = [
            replace(example, response_ids=array("i", ids))
            for example, group in zip(examples, groups, strict=True)
            for ids in group
        ]
        earned = dict(zip(map(id, answers), advantages(rewards).flatten(), strict=True))
        batches = [run.collate(part, history=False) for part in run.micro_batches(answers)]
        return [
            {**batch, "advantages": torch.stack([earned[id(e)] for e in batch["examples"]]).to(run.device)}
            for batch in batches
        ]

    def tell(self, rewards, run) -> None:
        self.rewards.append(rewards.mean().item())
        self.flat.append((rewards == rewards[:, :1]).all(1).float().mean().item())
        tenth = max(1, len(self.rewards) // 10)
        run.note("mean reward of drawn answers, first tenth of the draws", mean(self.rewards[:tenth]))
        run.note("mean reward of drawn answers, last tenth of the draws", mean(self.rewards[-tenth:]))
        run.note("share of groups with equal rewards: nothing to learn", mean(self.flat))

    def loss(self, model, batch, run):
        import torch

        logps = run.token_logps(model, batch)  # (B, T-1)
        batch.setdefault("old", logps.detach())  # of the first update on this draw
        if self.kl and "base" not in batch:
            with torch.no_grad(), model.disable_adapter():
                batch["base"] = run.token_logps(model, batch)
        answers = batch["labels"][:, 1:] != -100
        return self.objective_of(logps, batch["old"], batch.get("base"), batch["advantages"], answers)

    def state(self):
        """Of the draw at hand only while further updates go on it; its examples but as ids, to be counted."""
        open_draw = self.drawn if self.done % self.updates else []
        if open_draw and self.devices > 1:
            raise ValueError("the draw at hand is spread over devices, and updates on it are due")
        drawn = [{**batch, "examples": [example.id for example in batch["examples"]]} for batch in open_draw]
        return {"done": self.done, "rewards": self.rewards, "flat": self.flat, "drawn": drawn}

    def restore_state(self, state, model, run):
        known = {example.id: example for step in run.batches for example in step}
        self.done, self.rewards, self.flat = state["done"], state["rewards"], state["flat"]
        self.drawn = [{**b, "examples": [known[id] for id in b["examples"]]} for b in state["drawn"]]

    def objective_of(self, logps, old, base, advantages, answers):
        """All (B, T-1) but advantages (B,); base may be None. -> scalar, the mean over answers of the
        means over their tokens."""
        import torch

        ratio = torch.exp(logps - old)
        advantages = advantages[:, None]
        gain = torch.min(ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages)
        if self.kl:
            distance = base - logps
            gain = gain - self.kl * (torch.exp(distance) - distance - 1)
        return -((gain * answers).sum(1) / answers.sum(1)).mean()


def advantages(rewards):
    """(rows, group) -> the same shape: how much better than the group's mean, in its deviations."""
    rewards = rewards - rewards[:, :1]  # equal ones become 0, where their mean would be rounded
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
