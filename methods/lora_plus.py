"""LoRA+: LoRA whose matrices B learn faster than its matrices A.

    A' = A - lr * AdamW(A)        B' = B - ratio * lr * AdamW(B)

Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.

Performance: both matrices move as wide layers need it; the paper reports 1 to 2 % and half of the steps.
Efficiency: LoRA's.
Generalisation: LoRA's; B moves `ratio` times as fast, so the best learning rate is often a lower one.
"""

from dataclasses import dataclass

from harness.method import Positive, adam
from methods.lora import LoRA


@dataclass
class LoRAPlus(LoRA):
    """Weight decay is the run's; the authors' code has none of its own unless asked."""

    ratio: Positive = 16.0  # learning rate of B over that of A; the authors' default

    learning_rates = (1e-5, 1e-4)  # of A: B's are LoRA's own
    tunes = ("ratio", (4.0, 64.0))  # four times the default, and a quarter of it

    def optimizer(self, model, run):
        """A first: its learning rate is the one that the run reports."""
        from torch.optim import AdamW

        fast = {p for name, p in model.named_parameters() if ".lora_B." in name}
        groups = self.parameter_groups(model, run)
        slow = [{**g, "params": [p for p in g["params"] if p not in fast]} for g in groups]
        groups = slow + [
            {**g, "params": [p for p in g["params"] if p in fast], "lr": run.hp.learning_rate * self.ratio}
            for g in groups
        ]
        return AdamW([g for g in groups if g["params"]], fused=True, **adam(run.hp))
