"""LoRA-GGPO: LoRA trained under small shifts of the frozen weights, so that it settles in flat minima.

    y = (W + s B A + E) x        E only while training; s = alpha / rank
    ggpo: E_ij = N(0, 1) (sigma ||W'_i|| + beta ||G_i||^2) / sqrt(rows)      W' = W + s B A
    mgpo: E = -rho V / ||V|| min(1 / g, 10)      V = s (m_B A + B m_A), g: running mean of ||G||
    G = s (g_B A + B g_A): the gradients of the factors, carried over to the weight

Chang et al. 2025, LoRA-GGPO (now LoRA-MGPO): Mitigating Double Descent in LoRA Fine-Tuning, arXiv:2502.14538.

Performance: the authors report gains over LoRA in understanding and generation; we know of no confirmation
by others, and with perturbations this small a run stays close to LoRA's. At ggpo's defaults the gradients do
not guide: clipped to norm 1, they make 0.05 % of the noise on the demo's model, and 1 % unclipped. The rest
is noise in proportion to the weights; a beta of 1 or more would be felt.
Efficiency: memory of LoRA and no second gradient, unlike SAM; ggpo draws a matrix as large as W in each
layer's forward, mgpo adds one product of twice the rank.
Generalisation: what stays good under such shifts lies in a flatter minimum, which is hoped to overfit less.
"""

from dataclasses import dataclass
from typing import Literal

from harness.method import Fraction, NotNegative
from methods.lora import LoRA, adapted_layers, changed_squares, own_squares, product_with, row_squares


@dataclass
class LoRAGGPO(LoRA):
    """ggpo is the paper's first version, whose code is kohya-ss/sd-scripts PR 1974 (its authors published
    none): here the row norms are exact, where the PR takes one mean for ||W_i|| and leaves s out. mgpo is the
    second and third version, after the authors' trainer: here E is not rounded to the weights' precision, g
    is updated once a step and not once a micro-batch, and the momentum's decay is the shared hp.beta1."""

    variant: Literal["ggpo", "mgpo"] = "ggpo"
    sigma: NotNegative = 0.03  # ggpo: noise per length of the weight's row; the PR's recommendation
    beta: NotNegative = 0.01  # ggpo: noise per squared length of the gradient's row; the PR's recommendation
    rho: NotNegative = 0.01  # mgpo: length of the shift, before 1 / g; the authors' for generation
    decay: Fraction = 0.8  # mgpo: of the running mean g, per step; the authors' for generation

    axis = "perturbation"
    cannot = {"sharding": "its shifts are measured on whole weights, of which each device would hold a part"}

    def attach(self, model, run):
        import torch

        model = super().attach(model, run)
        layers = adapted_layers(model).values()
        self.forwards, kind = 0, Noise if self.variant == "ggpo" else Momentum
        self.seeds = torch.randint(-(2**31), 2**31, (2,), generator=run.rng, dtype=torch.int32).to(run.device)
        self.keys = self.seeds.new_zeros(len(layers), 2)  # of each layer's noise, anew in each forward
        self.perturbations = [kind(self, layer, keys) for layer, keys in zip(layers, self.keys, strict=True)]
        return model

    def prepare(self, model, examples, run):
        """Each micro-batch with its number, `draw` (), from which its noise follows: a captured step reads
        tensors alone. A layer that is computed again in backward draws the same noise again."""
        import torch

        batches = super().prepare(model, examples, run)
        first, self.forwards = self.forwards, self.forwards + len(batches)
        own = range(first, self.forwards)  # each device's, none of which is another's
        numbers = [run.devices.count * number + run.devices.rank for number in own]
        numbers = torch.tensor(numbers, dtype=torch.int32).to(run.device)
        return [{**batch, "draw": number} for batch, number in zip(batches, numbers, strict=True)]

    def loss(self, model, batch, run):
        import torch

        numbers = torch.arange(self.keys.numel(), dtype=torch.int32, device=self.keys.device)
        keys = hashed(hashed(numbers, *self.seeds), batch["draw"], self.seeds[0])
        self.keys.copy_(keys.view_as(self.keys))
        return super().loss(model, batch, run)

    def optimizer(self, model, run):
        optimizer, alike = super().optimizer(model, run), {}
        for one in self.perturbations:
            alike.setdefault((one.a.shape, one.b.shape, one.s), []).append(one)
        for group in alike.values():  # measured together, in as many launches as one
            type(group[0]).follow(group, optimizer)
        return optimizer

    def state(self):
        return {"forwards": self.forwards, "layers": [p.state() for p in self.perturbations]}

    def restore_state(self, state, model, run):
        self.forwards = state["forwards"]
        for perturbation, kept in zip(self.perturbations, state["layers"], strict=True):
            for name, value in kept.items():
                getattr(perturbation, name).copy_(value)


class Perturbation:
    """Of one adapted layer, which it shifts while that is training. What it reads then are tensors that
    change in place, zeros up to the first step."""

    held: tuple[str, ...] = ()  # names of what goes from one step to the next

    def __init__(self, method, layer, keys):
        self.method, self.keys, self.base = method, keys, layer.get_base_layer()
        self.a, self.b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (r, n), (m, r)
        self.s = layer.scaling["default"]
        layer.register_forward_hook(self.shift)

    def state(self):
        return {name: getattr(self, name) for name in self.held}


class Noise(Perturbation):
    """ggpo: noise of each row's own size. It is a constant to the gradient, as in the PR."""

    held = ("size",)

    def __init__(self, method, layer, keys):
        super().__init__(method, layer, keys)
        self.squares = own_squares(self.base)
        self.size = self.squares.new_zeros(self.squares.shape)  # (m,)

    @staticmethod
    def follow(group, optimizer):
        """Before the step, after the clipping: where the PR measures."""
        optimizer.register_step_pre_hook(lambda *_: Noise.measure(group))

    @staticmethod
    def measure(group):
        """The sizes of layers of one shape."""
        import torch

        method, s = group[0].method, group[0].s
        with torch.no_grad():
            a, b = factors(group)
            product = torch.stack([product_with(one.base, one.a) for one in group])  # W A^T
            squares = changed_squares(stacked(group, "squares"), product, b, a, s)
            gradient = row_squares(*carried(group, *factors(group, lambda p: p.grad)))
            sizes = (method.sigma * squares.sqrt() + method.beta * gradient) / b.shape[-2] ** 0.5
            torch._foreach_copy_([one.size for one in group], list(sizes))

    def shift(self, layer, args, y):
        import torch

        if not layer.training:
            return y
        with torch.no_grad():
            noise = normal(self.keys, self.b.shape[0], self.a.shape[1]).to(y.dtype)
            shift = torch.nn.functional.linear(args[0].to(y.dtype), noise) * self.size.to(y.dtype)
        return y + shift


class Momentum(Perturbation):
    """mgpo: a step up the slope that the momentum shows, which the gradient is taken through.

    The authors add E to W and subtract it again. As a product of rank 2r it is applied as it stands: W is
    never touched, may be in 4 bits, and backward keeps no matrix of its size."""

    held = ("left", "right", "mean")

    def __init__(self, method, layer, keys):
        super().__init__(method, layer, keys)
        (r, n), m = self.a.shape, len(self.b)
        self.left, self.right = self.b.new_zeros(m, 2 * r), self.a.new_zeros(2 * r, n)
        self.norm, self.mean = self.a.new_zeros(()), self.a.new_full((), -1)  # below 0: of no step yet
        self.half = False
        for factor in (self.a, self.b):
            factor.register_post_accumulate_grad_hook(self.seen)

    def seen(self, _):
        """Of the step's gradient as it grows, once both factors have it, before the clipping: where the
        authors measure."""
        self.half = not self.half
        if not self.half:
            left, right = carried([self], self.a.grad[None], self.b.grad[None])
            self.norm.copy_(row_squares(left, right).sum().sqrt())

    @staticmethod
    def follow(group, optimizer):
        optimizer.register_step_post_hook(lambda *_: Momentum.measure(group, optimizer.state))

    @staticmethod
    def measure(group, state):
        """The shifts of layers of one shape."""
        import torch

        method = group[0].method
        norm, mean = stacked(group, "norm"), stacked(group, "mean")
        mean = torch.where(mean < 0, norm, mean.lerp(norm, 1 - method.decay))
        left, right = carried(group, *factors(group, lambda p: state[p]["exp_avg"]))
        length = row_squares(left, right).sum(-1).sqrt()
        scale = -method.rho / (length + 1e-12) * (mean + 1e-12).reciprocal().clamp(max=10)
        found = [*(scale[:, None, None] * left), *right, *mean]
        torch._foreach_copy_([getattr(one, name) for name in Momentum.held for one in group], found)

    def shift(self, layer, args, y):
        from torch.nn.functional import linear

        if not layer.training:
            return y
        return y + linear(linear(args[0].to(y.dtype), self.right.to(y.dtype)), self.left.to(y.dtype))


def stacked(group, name):
    import torch

    return torch.stack([getattr(one, name) for one in group])


def factors(group, of=lambda parameter: parameter):
    """(layers, r, n) and (layers, m, r): A and B of layers of one shape, or what belongs to them."""
    import torch

    return torch.stack([of(one.a) for one in group]).detach(), torch.stack(
        [of(one.b) for one in group]
    ).detach()


def carried(group, of_a, of_b):
    """s (of_b A + B of_a), as two factors: (layers, m, 2r) and (layers, 2r, n). Never formed, as it is
    low-rank."""
    import torch

    a, b = factors(group)
    return group[0].s * torch.cat([of_b, b], -1), torch.cat([a, of_a], -2)


# Noise that is a function of tensors alone: no generator's state, which a captured step could not advance


def hashed(numbers, key, other):
    """int32 -> int32: every bit of numbers and keys into every other one (triple32, C. Wellons 2018, with a
    key before each of its first two rounds)."""

    def folded(x, by):
        return x ^ (x >> by & 2 ** (32 - by) - 1)  # >> would fill up with the sign

    x = folded(numbers ^ key, 17) * (0xED5AD4BB - 2**32)
    x = folded(x ^ other, 11) * (0xAC4C1B51 - 2**32)
    return folded(folded(x, 15) * 0x31848BAB, 14)


def normal(keys, rows, columns):
    """(rows, columns): standard normal numbers of their own for every two keys, by the inverse of the normal
    distribution at 2^24 midpoints: exact in fp32, and up to 5.4."""
    import torch

    numbers = torch.arange(rows * columns, dtype=torch.int32, device=keys.device)
    middle = ((hashed(numbers, *keys) >> 8) + 0.5) * 2**-23  # above -1 and below 1
    return (torch.erfinv(middle) * 2**0.5).view(rows, columns)
