"""GaLore: AdamW in a low-rank subspace of each gradient, which moves as the training goes on.

    R = G V (or U^T G)        V: the top right singular vectors of G, found again every `gap` steps
    W' = W - lr * scale * (m_R / (sqrt(v_R) + eps)) V^T

Zhao et al. 2024, GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv:2403.03507.

Performance: every weight is trained, and the subspace changes, so the sum of the updates is not low-rank.
Efficiency: the moments of a matrix shrink to its rank; weights and gradients stay whole, embeddings keep
full moments. A new subspace is found by orthogonal iteration (the authors: an SVD): directions 1.25 times as
strong as what is left out, to 1 degree; 99 % of the squares that the SVD's would hold, even of noise.
Generalisation: between full fine-tuning and LoRA; the weak directions of a gradient are left out.
"""

from contextlib import contextmanager
from dataclasses import dataclass

from harness.method import Method, Natural, Positive, adam

PROJECTED = 2**24  # values of projected gradients at once, 64 MiB: what a step holds beside its state, twice
GRAM = 2**28  # values of Gram matrices at once, 2 GiB in fp64: Gemma 3 1B's are 1.2 together
SMALL = 192  # columns up to which LAPACK's routine is taken: it takes no longer than an iteration
BATCHED = 32  # columns up to which torch's eigenvalue routine takes a GPU's matrices all at once
SPARE = 16  # columns that an iteration has beyond the rank, at least; half of the rank if that is more
OUTSIDE, INSIDE = 12, 16  # its steps in the whole space and in the columns' own: see tests/test_optimizers.py
FLOOR = 1e-8  # of the sum of the eigenvalues: what is weaker is rounding in a gradient of bf16 products


@dataclass
class GaLore(Method):
    rank: Natural = 128  # of the projected gradient; the authors' default
    gap: Natural = 200  # steps between two subspaces; the authors' default
    scale: Positive = 0.25  # of the projected update, so lr * scale is its learning rate; authors' default

    axis = "optimizer"
    cannot = {"sharding": "its subspaces are of whole gradients, of which each device would hold a part"}
    learning_rates = (4e-5, 4e-4)  # full fine-tuning's, over the default scale
    tunes = ("scale", (1.0, 4.0))  # the matrices' step against that of the rest; the authors take 4 for GLUE

    def optimizer(self, model, run):
        """The linear layers of the decoder are projected; embeddings, head and norms are not."""
        from torch import nn

        head = model.get_output_embeddings()
        linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        own = {"rank": self.rank, "gap": self.gap, "scale": self.scale, "short": in_short(run)}
        groups = []
        for group in self.parameter_groups(model, run):
            projected = [p for p in group["params"] if p in linear]
            whole = [p for p in group["params"] if p not in linear]
            groups += [{**group, "params": projected, **own}, {**group, "params": whole}]
        return projected_adamw()([group for group in groups if group["params"]], **adam(run.hp))

    def renewed_every(self):
        return self.gap


def in_short(run) -> bool:
    """Gradients come from products in bf16, of 8 bits: TF32's 11 hold them."""
    return run.device.type == "cuda" and run.accelerator.mixed_precision == "bf16"


def projected_adamw():
    """The optimizer's class: AdamW as torch's, with the moments of groups that have a `rank` in the
    subspace. Its state is tensors only: it is saved and loaded as any optimizer's.

    Made here because a method's file is read before torch is needed.
    """
    import torch

    class ProjectedAdamW(torch.optim.Optimizer):
        def __init__(self, params, lr, betas, eps):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "short": False})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                if params := [p for p in group["params"] if p.grad is not None]:
                    self.take(params, group)

        def take(self, params, group) -> None:
            """A step of some of a group's parameters, each of which has a gradient."""
            if "rank" not in group:
                return self.adamw(params, params, [p.grad for p in params], group)
            due = [p for p in params if "basis" not in self.state[p] or self.taken(p) % group["gap"] == 0]
            for part in bounded(due, GRAM, lambda p: min(p.shape) ** 2):
                bases = top_singular_vectors([p.grad for p in part], group["rank"])
                for p, basis in zip(part, bases, strict=True):
                    self.state[p]["basis"] = basis
            for part in bounded(params, PROJECTED // group["rank"], lambda p: max(p.shape)):
                self.take_projected(part, group)

        def take_projected(self, params, group) -> None:
            bases = [self.state[p]["basis"] for p in params]
            with products(group["short"]):
                low = [project(p.grad, basis) for p, basis in zip(params, bases, strict=True)]
                changes = self.changes(params, low, group)
                torch._foreach_mul_(changes, group["lr"] * group["scale"])
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                for p, change, basis in zip(params, changes, bases, strict=True):
                    p.addmm_(*((change, basis.T) if p.shape[0] >= p.shape[1] else (basis, change)))

        def changes(self, params, low, group) -> list:
            """What AdamW at a rate of 1 makes of projected gradients."""
            changes = [torch.empty_like(r) for r in low]
            torch._foreach_zero_(changes)
            self.adamw(params, changes, low, {**group, "lr": 1.0, "weight_decay": 0.0})
            return changes

        def taken(self, p) -> int:
            """Steps so far. Counted on the host: to ask the device would be to wait for it."""
            return int(self.state[p].get("step", 0))

        def counts(self, params) -> list:
            """Steps with this one, on the parameters' device."""
            for p in params:  # a state that was loaded may have put it elsewhere
                self.state[p]["step"] = self.state[p]["step"].cpu() + 1
            counts = [self.taken(p) for p in params]
            steps = {t: torch.full((), float(t), device=params[0].device) for t in set(counts)}
            return [steps[t] for t in counts]

        def adamw(self, params, targets, grads, group) -> None:
            """torch's fused AdamW moves the targets, by the moments of params."""
            states = [self.state[p] for p in params]
            for state in states:
                state.setdefault("step", torch.tensor(0.0))
            counts = self.counts(params)
            for state, grad in zip(states, grads, strict=True):
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            torch._fused_adamw_(
                targets, grads, first, second, [], counts, lr=group["lr"],
                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

    return ProjectedAdamW


def bounded(items, limit: int, size) -> list[list]:
    """In order, in lists whose sizes add up to the limit at most; what is larger is alone."""
    lists, held = [], 0
    for item in items:
        if not lists or held + size(item) > limit:
            lists.append([])
            held = 0
        lists[-1].append(item)
        held += size(item)
    return lists


@contextmanager
def products(short: bool):
    """Within, where `short`, a GPU multiplies matrices in fp32 by TF32; what it sums up stays in fp32."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if short else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def project(grad, basis):
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.T @ grad


def top_singular_vectors(matrices, rank) -> list:
    """(m, n) each -> (min(m, n), rank) each: the right singular vectors if m >= n, else the left ones;
    strongest first, each of a sum of at least 0; all of them if the rank is above their number.

    From the smaller Gram matrices in fp64: squaring the singular values would lose the weak ones in fp32.
    """
    import torch

    found, alike = {}, {}
    for number, matrix in enumerate(matrices):
        if (n := min(matrix.shape)) > max(SMALL, columns(rank)):
            alike.setdefault(n, []).append(number)
        else:
            found[number] = torch.linalg.eigh(gram_of(matrix)).eigenvectors[:, -rank:].flip(1)
    grams = []
    for n, members in alike.items():
        grams.append(matrices[0].new_empty(len(members), n, n, dtype=torch.float64))
        for gram, number in zip(grams[-1], members, strict=True):
            gram.copy_(gram_of(matrices[number]))
    for members, bases in zip(alike.values(), top_eigenvectors(grams, rank), strict=True):
        found |= dict(zip(members, bases, strict=True))
    # Moments outlive a basis: signs that rounding decided would make trainings differ by far more than it.
    return [
        torch.where(found[number].sum(0) < 0, -found[number], found[number]).to(matrix.dtype)
        for number, matrix in enumerate(matrices)
    ]


def gram_of(matrix):
    """(m, n) -> (k, k) in fp64, k the smaller of the two."""
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T).double()
    return tall.T @ tall


def columns(rank: int) -> int:
    """That an iteration has: what is beyond the rank makes it converge, also where singular values decay
    slowly."""
    return rank + max(rank // 2, SPARE)


def top_eigenvectors(grams: list, rank: int) -> list:
    """(b, n, n) each, n above columns(rank), symmetric, no eigenvalue below 0, fp64, overwritten
    -> (b, n, rank) each, orthonormal, strongest first.

    By orthogonal iteration, then once more inside of what its columns span: matrix products for all at once,
    where a GPU's eigenvalue routines take one matrix after the other. The start is the same for any seed: the
    result is a function of the matrices alone.
    """
    import torch

    width, blocks, cores = columns(rank), [], []
    for gram in grams:
        gram /= gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)[:, None, None]
        gram.diagonal(dim1=-2, dim2=-1).add_(FLOOR)
        start = torch.randn(gram.shape[-1], width, generator=torch.Generator().manual_seed(0)).to(gram)
        blocks.append(iterated(gram, start.expand(len(gram), -1, -1), OUTSIDE))
        cores.append(blocks[-1].mT @ gram @ blocks[-1])
    if not grams:
        return []
    inner = torch.cat(cores)
    if width <= BATCHED:
        turns = torch.linalg.eigh(inner).eigenvectors.flip(-1)[..., :rank]
    else:
        turns = iterated(inner, torch.eye(width).to(inner).expand_as(inner), INSIDE)[..., :rank]
    turned = zip(blocks, turns.split([len(gram) for gram in grams]), strict=True)
    return [orthonormal(orthonormal(block @ turn)) for block, turn in turned]


def iterated(gram, block, times: int):
    for _ in range(times):
        block = orthonormal(gram @ block)
    return block


def orthonormal(block):
    """(b, n, k) -> (b, n, k): the Q of a QR decomposition, by Cholesky of the scaled Gram matrix, as
    Householder's reflections would take a GPU one matrix after the other."""
    import torch

    gram = block.mT @ block
    scale = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
    gram = gram * scale[..., None] * scale[..., None, :]
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-14)  # nearly dependent columns are left for the next time
    lower, _ = torch.linalg.cholesky_ex(gram)
    return block @ torch.linalg.solve_triangular(lower, scale.diag_embed(), upper=False).mT
