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
from methods.galore import PROJECTED, GaLore, bounded, products, project, projected_adamw

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
    from torch.linalg import vector_norm

    class ApolloAdamW(projected_adamw()):
        def __init__(self, params, lr, betas, eps, seed):
            super().__init__(params, lr, betas, eps)
            self.seed = seed
            self.parts, self.place = [], {}  # those that draw together, of one shape; where each one is
            for group in self.param_groups:
                shapes = dict.fromkeys(p.shape for p in group["params"]) if "rank" in group else ()
                for shape in shapes:
                    alike = [p for p in group["params"] if p.shape == shape]
                    for part in bounded(alike, PROJECTED // group["rank"], lambda p: max(p.shape)):
                        self.place |= {p: (len(self.parts), i) for i, p in enumerate(part)}
                        self.parts.append(part)

        def take(self, params, group) -> None:
            if "rank" not in group:
                return super().take(params, group)
            alike: dict = {}  # by part and steps: one draw serves them all
            for p in params:
                alike.setdefault((self.place[p][0], self.taken(p)), []).append(p)
            for (number, taken), members in alike.items():
                seed = hash((self.seed, number, taken // group["gap"]))
                bases = random_bases(self.parts[number], group["rank"], seed)
                self.scaled(members, [bases[self.place[p][1]] for p in members], taken, group)

        def scaled(self, params, bases, taken: int, group) -> None:
            """A step of parameters of one shape that have taken as many."""
            grads, states = [p.grad for p in params], [self.state[p] for p in params]
            with products(group["short"]):
                low = [project(grad, basis) for grad, basis in zip(grads, bases, strict=True)]
            changes = self.changes(params, low, group)
            beta1, beta2 = group["betas"]
            unbiased = (1 - beta2 ** (taken + 1)) ** 0.5 / (1 - beta1 ** (taken + 1))  # is in changes already
            # A channel is a row of a tall matrix, a column of a wide one: what the projection leaves whole.
            dim = -1 if params[0].shape[0] >= params[0].shape[1] else -2
            lengths = [vector_norm(grad, dim=dim, keepdim=True) for grad in grads]
            adam, r, lengths = torch.stack(changes), torch.stack(low), torch.stack(lengths)
            dims = (-1, -2) if group["scaling"] == "tensor" else dim
            adam, r = (vector_norm(x, dim=dims, keepdim=True) for x in (adam, r))
            factors = adam / unbiased / (r + 1e-8)
            norms = vector_norm(factors * lengths, dim=(-1, -2), keepdim=True)  # of the updates
            if taken:  # which may exceed the last ones by little
                last = torch.stack([state["norm"] for state in states]).view_as(norms)
                limiter = (norms / (last + 1e-8)).clamp(min=GROWTH) / GROWTH
                factors, norms = factors / limiter, norms / limiter
            rate = group["lr"] * group["scale"] ** 0.5 * unbiased
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, grad, factor, norm, state in zip(params, grads, factors, norms, states, strict=True):
                p.addcmul_(grad, factor, value=-rate)
                state["norm"] = norm.squeeze()

    return ApolloAdamW


def random_bases(alike, rank, seed):
    """For n tensors of one shape (n, min(shape), rank) of variance 1 / rank: a projection keeps lengths in
    the mean."""
    import torch

    first, draw = alike[0], torch.Generator(alike[0].device).manual_seed(seed)
    shape = len(alike), min(first.shape), rank
    return torch.randn(shape, generator=draw, device=first.device, dtype=first.dtype) / rank**0.5
