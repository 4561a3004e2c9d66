"""GaLore: AdamW in a low-rank subspace of each gradient, which moves as the training goes on.

    R = G V (or U^T G)        V: the top right singular vectors of G, found again every `gap` steps
    W' = W - lr * scale * (m_R / (sqrt(v_R) + eps)) V^T

Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv:2403.03507.

Performance: every weight is trained, and the subspace changes, so the sum of the updates is not low-rank.
Efficiency: the moments of a matrix shrink to its rank; weights and gradients stay whole, embeddings keep
full moments, and a new subspace costs a decomposition of every gradient.
Generalisation: between full fine-tuning and LoRA; the weak directions of a gradient are left out.
"""

from dataclasses import dataclass

from harness.method import Method, Natural, Positive, adam


@dataclass
class GaLore(Method):
    rank: Natural = 128  # of the projected gradient; the authors' default
    gap: Natural = 200  # steps between two subspaces; the authors' default
    scale: Positive = 0.25  # of the projected update, so lr * scale is its learning rate; authors' default

    axis = "optimizer"
    learning_rates = (4e-5, 4e-4)  # full fine-tuning's, over the default scale
    tunes = ("scale", (1.0, 4.0))  # the matrices' step against that of the rest; the authors take 4 for GLUE

    def optimizer(self, model, run):
        """The linear layers of the decoder are projected; embeddings, head and norms are not."""
        from torch import nn

        head = model.get_output_embeddings()
        linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        groups = []
        for group in self.parameter_groups(model, run):
            projected = [p for p in group["params"] if p in linear]
            whole = [p for p in group["params"] if p not in linear]
            groups += [
                {**group, "params": projected, "rank": self.rank, "gap": self.gap, "scale": self.scale}
            ]
            groups += [{**group, "params": whole}]
        return projected_adamw()([group for group in groups if group["params"]], **adam(run.hp))


def projected_adamw():
    """The optimizer's class: AdamW as torch's, with the moments of groups that have a `rank` in the
    subspace. Its state is tensors only: it is saved and loaded as any optimizer's.

    Made here because a method's file is read before torch is needed.
    """
    import torch

    class ProjectedAdamW(torch.optim.Optimizer):
        def __init__(self, params, lr, betas, eps):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.update(p, group)

        def update(self, p, group):
            state, grad = self.state[p], p.grad
            t = state["step"] = state.get("step", torch.tensor(0.0)) + 1
            if "rank" in group:
                if (t - 1) % group["gap"] == 0:
                    state["basis"] = top_singular_vectors(grad, group["rank"])
                grad = project(grad, state["basis"])
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            beta1, beta2 = group["betas"]
            m = state["exp_avg"].lerp_(grad, 1 - beta1)
            v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = v.sqrt().div_((1 - beta2 ** t.item()) ** 0.5).add_(group["eps"])
            change = m.div(denominator).div_(1 - beta1 ** t.item())
            if "rank" in group:
                change = project_back(change, state["basis"], p.shape).mul_(group["scale"])
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    return ProjectedAdamW


def top_singular_vectors(grad, rank):
    """(m, n) -> (min(m, n), rank): the right singular vectors if m >= n, else the left ones.

    From the eigenvectors of the smaller Gram matrix, several times as fast as the SVD. In fp64, as
    squaring the singular values would lose the weak ones in fp32.
    """
    import torch

    tall = (grad if grad.shape[0] >= grad.shape[1] else grad.T).double()
    return torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].flip(1).to(grad.dtype)


def project(grad, basis):
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.T @ grad


def project_back(change, basis, shape):
    return change @ basis.T if shape[0] >= shape[1] else basis @ change
