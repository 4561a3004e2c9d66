"""GaLore, layerwise: GaLore that updates each weight during the backward pass and frees its gradient at once.

    W' = W - lr * scale * (m_R / (sqrt(v_R) + eps)) V^T        as soon as the gradient G of W is known

Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv:2403.03507.

Performance: GaLore's, but for the gradient clipping that it has to go without.
Efficiency: one gradient lives at a time in place of one per weight. That lowers the peak where gradients
outweigh activations (small batches, gradient checkpointing), and nothing where activations make it.
Generalisation: GaLore's; without clipping a bad batch moves the weights further.
"""

from dataclasses import dataclass

from harness.method import adam
from methods.galore import GaLore, projected_adamw


@dataclass
class GaLoreLayerwise(GaLore):
    overrides = {
        "max_grad_norm": (0.0, "a gradient is used and freed before the norm over all of them is known")
    }
    cannot = GaLore.cannot | {
        "accumulation": "each micro-batch's gradient is used at once",
        "several cards": "each weight would move by the gradient of its own card's rows alone",
    }

    def optimizer(self, model, run):
        import weakref

        import torch

        groups = super().optimizer(model, run).param_groups
        optimizer = capturable_adamw()(groups, **adam(run.hp))
        alive = weakref.ref(optimizer)  # the weights outlive it, and must not keep its moments

        def updater(group: int):
            @torch.no_grad()
            def update(p):
                if owner := alive():
                    owner.take([p], owner.param_groups[group])
                    p.grad = None

            return update

        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(updater(number))
        return optimizer


def capturable_adamw():
    """The optimizer's class, made here as a method's file is read before torch is needed."""
    import torch

    class CapturableAdamW(projected_adamw()):
        """What differs from step to step lies on the device, where a CUDA graph with its steps reads it."""

        def __init__(self, params, lr, betas, eps):
            super().__init__(params, lr, betas, eps)
            for group in self.param_groups:
                group["capturable"] = True
            self.param_groups[0]["taken"] = 0  # steps, counted on the host: a part of the state
            self.place_rates()

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.place_rates()

        def place_rates(self) -> None:
            for group in self.param_groups:
                rate = torch.as_tensor(group["lr"], dtype=torch.float64)  # as exact as a number
                group["lr"] = rate.to(group["params"][0].device)

        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["taken"] += 1

        def taken(self, p) -> int:
            return self.param_groups[0]["taken"]

        def adamw(self, params, targets, grads, group):
            if torch.is_tensor(rate := group["lr"]) and rate.is_cuda:  # whose kernel reads a float
                group = {**group, "lr": rate.float()}
            super().adamw(params, targets, grads, group)

        def counts(self, params):
            for p in params:
                self.state[p]["step"] = self.state[p]["step"].to(p.device)
            counts = [self.state[p]["step"] for p in params]
            torch._foreach_add_(counts, 1)
            return counts

    return CapturableAdamW
