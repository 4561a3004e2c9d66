"""GaLore, layerwise: GaLore that updates each weight during the backward pass and frees its gradient at once.

    W' = W - lr * scale * (m_R / (sqrt(v_R) + eps)) V^T        as soon as the gradient G of W is known

Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv:2403.03507.

Performance: GaLore's, but for the gradient clipping that it has to go without.
Efficiency: one gradient lives at a time in place of one per weight. That lowers the peak where gradients
outweigh activations (small batches, gradient checkpointing), and nothing where activations make it.
Generalisation: GaLore's; without clipping a bad batch moves the weights further.
"""

from dataclasses import dataclass

from methods.galore import GaLore


@dataclass
class GaLoreLayerwise(GaLore):
    overrides = {
        "max_grad_norm": (0.0, "a gradient is used and freed before the norm over all of them is known")
    }
    cannot = GaLore.cannot | {
        "accumulation": "each micro-batch's gradient is used at once",
        "several cards": "each weight would move by the gradient of its own card's rows alone",
        "graphs": "the weights are updated within backward, by steps that are counted in Python",
    }

    def optimizer(self, model, run):
        import weakref

        import torch

        optimizer = super().optimizer(model, run)
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
