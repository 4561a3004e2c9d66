"""APOLLO: the plain gradient, each channel scaled as AdamW in a small random subspace would scale it.

    R = G P^T (or P^T G)        P: random, never stored, another one every `gap` steps
    W' = W - lr * sqrt(scale) * G diag(||AdamW(R)_j|| / ||R_j||)        per channel j, or one factor for all

Zhu et al. 2024, APOLLO: SGD-like Memory, AdamW-level Performance, arXiv:2412.05270.

Performance: every weight moves along its whole gradient; the authors report AdamW's quality in
pre-training and GaLore's in fine-tuning.
Efficiency: two moments of rank times the longer side and no basis; no decomposition, unlike GaLore. With
rank 1 (scaling=tensor, scale=128) almost no state. Weights and gradients stay whole, embeddings keep full
moments.
Generalisation: close to full fine-tuning's, as the weights are as free; scaling by channel is coarser than
AdamW's by weight.
"""

from dataclasses import dataclass
from typing import Literal

from harness.method import Natural, Positive, adam
from methods.galore import GaLore, project, projected_adamw

GROWTH = 1.01  # of the update's norm from one step to the next, at most: Fira's limiter


@dataclass
class APOLLO(GaLore):
    """After apollo-torch 1.0.3, but epsilon and weight decay act as in torch's AdamW, and P is drawn again
    at each step, not kept."""

    rank: Natural = 256  # of the subspace; the authors' default
    gap: Natural = 200  # steps between two subspaces; the authors' default
    scale: Positive = 1.0  # the update is multiplied by its root, as in the authors' code; 128 for rank 1
    scaling: Literal["channel", "tensor"] = "channel"  # tensor: one for a matrix, APOLLO-Mini's

    learning_rates = (1e-5, 1e-4)  # full fine-tuning's, as its steps are about as long as AdamW's
    tunes = ("rank", (16, 64))  # it claims to need less than GaLore

    def optimizer(self, model, run):
        """The groups are GaLore's: the linear layers of the decoder, and the rest as AdamW has it."""
        groups = super().optimizer(model, run).param_groups
        for group in groups:
            group["scaling"] = self.scaling
        return apollo_adamw()(groups, seed=run.seed, **adam(run.hp))


def apollo_adamw():
    """The optimizer's class, made here as a method's file is read before torch is needed."""
    import torch

    class ApolloAdamW(projected_adamw()):
        def __init__(self, params, lr, betas, eps, seed):
            super().__init__(params, lr, betas, eps)
            everything = (p for group in self.param_groups for p in group["params"])
            self.numbers = {p: number for number, p in enumerate(everything)}  # each has its own subspaces
            self.seed = seed

        def update(self, p, group):
            if "rank" not in group:
                return super().update(p, group)
            state, grad = self.state[p], p.grad
            t = state["step"] = state.get("step", torch.tensor(0.0)) + 1
            period = int((t.item() - 1) // group["gap"])
            r = project(grad, random_basis(grad, group["rank"], hash((self.seed, self.numbers[p], period))))
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(r), torch.zeros_like(r)
            beta1, beta2 = group["betas"]
            m = state["exp_avg"].lerp_(r, 1 - beta1)
            v = state["exp_avg_sq"].mul_(beta2).addcmul_(r, r, value=1 - beta2)
            unbias = (1 - beta2 ** t.item()) ** 0.5
            adam = m / v.sqrt().add_(group["eps"] * unbias)
            # A channel is a row of a tall matrix, a column of a wide one: what the projection leaves whole.
            tall = grad.shape[0] >= grad.shape[1]
            dims = (0, 1) if group["scaling"] == "tensor" else int(tall)
            change = grad * (adam.norm(dim=dims, keepdim=True) / (r.norm(dim=dims, keepdim=True) + 1e-8))
            norm = change.norm()
            if "norm" in state:  # of the last update, which this one may exceed by little
                limiter = (norm / (state["norm"] + 1e-8)).clamp(min=GROWTH) / GROWTH
                change, norm = change / limiter, norm / limiter
            state["norm"] = norm
            rate = group["lr"] * group["scale"] ** 0.5 * unbias / (1 - beta1 ** t.item())
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=rate)

    return ApolloAdamW


def random_basis(grad, rank, seed):
    """(min(m, n), rank) of variance 1 / rank: its projection keeps lengths in the mean."""
    import torch

    draw = torch.Generator(grad.device).manual_seed(seed)
    shape = min(grad.shape), rank
    return torch.randn(shape, generator=draw, device=grad.device, dtype=grad.dtype) / rank**0.5
