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
from methods.lora import LoRA


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

    def attach(self, model, run):
        from peft.tuners.lora import LoraLayer

        model = super().attach(model, run)
        kind = Noise if self.variant == "ggpo" else Momentum
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.seed, self.forwards = run.seed, 0
        self.perturbations = [kind(self, layer, index) for index, layer in enumerate(layers)]
        return model

    def loss(self, model, batch, run):
        self.forwards += 1  # a checkpointed layer that is computed again draws the same noise again
        return super().loss(model, batch, run)

    def optimizer(self, model, run):
        optimizer = super().optimizer(model, run)
        for perturbation in self.perturbations:
            perturbation.follow(optimizer)
        return optimizer

    def state(self):
        return {"forwards": self.forwards, "layers": [p.state() for p in self.perturbations]}

    def restore_state(self, state, model, run):
        self.forwards = state["forwards"]
        for perturbation, kept in zip(self.perturbations, state["layers"], strict=True):
            vars(perturbation).update(kept)


class Perturbation:
    """Of one adapted layer, which it shifts while that is training."""

    held = ()  # names of what goes from one step to the next

    def __init__(self, method, layer, index):
        self.method, self.index = method, index
        self.a, self.b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (r, n), (m, r)
        self.s = layer.scaling["default"]
        layer.register_forward_hook(self.shift)

    def carried(self, of_a, of_b):
        """s (of_b A + B of_a), as two factors: (m, 2r) and (2r, n). Never formed, as it is low-rank."""
        import torch

        left, right = torch.cat([of_b, self.b], 1), torch.cat([self.a, of_a])
        return self.s * left.detach(), right.detach()

    def state(self):
        return {name: getattr(self, name) for name in self.held}


class Noise(Perturbation):
    """ggpo: noise of each row's own size. It is a constant to the gradient, as in the PR."""

    held = ("size",)

    def __init__(self, method, layer, index):
        import torch

        super().__init__(method, layer, index)
        self.base, self.size = layer.get_base_layer(), None
        self.base_norms = torch.linalg.vector_norm(dense(self.base), dim=1, dtype=torch.float32)

    def follow(self, optimizer):
        """Before the step, after the clipping: where the PR measures."""
        optimizer.register_step_pre_hook(lambda *_: self.measure())

    def measure(self):
        import torch

        with torch.no_grad():
            weight = dense(self.base)
            cross = (self.b * (weight @ self.a.T.to(weight.dtype)).float()).sum(1)  # B_i . (W A^T)_i
            squares = self.base_norms**2 + 2 * self.s * cross + row_squares(self.s * self.b, self.a)
            gradient = row_squares(*self.carried(self.a.grad, self.b.grad))
            size = self.method.sigma * squares.clamp(min=0).sqrt() + self.method.beta * gradient
            self.size = size / len(size) ** 0.5

    def shift(self, layer, args, y):
        import torch

        if not layer.training or self.size is None:
            return y
        with torch.no_grad():
            draw = torch.Generator(y.device)  # our own: dropout and the order of the data stay as they are
            draw.manual_seed(hash((self.method.seed, self.method.forwards, self.index)))
            shape = len(self.size), self.a.shape[1]
            noise = torch.randn(shape, generator=draw, device=y.device, dtype=y.dtype)
            shift = torch.nn.functional.linear(args[0].to(y.dtype), noise) * self.size.to(y.dtype)
        return y + shift


class Momentum(Perturbation):
    """mgpo: a step up the slope that the momentum shows, which the gradient is taken through.

    The authors add E to W and subtract it again. As a product of rank 2r it is applied as it stands: W is
    never touched, may be in 4 bits, and backward keeps no matrix of its size."""

    factors = mean = None
    held = ("factors", "mean")

    def __init__(self, method, layer, index):
        super().__init__(method, layer, index)
        self.a.register_post_accumulate_grad_hook(lambda a: self.seen())  # B's is there before A's

    def seen(self):
        """Of the step's gradient as it grows, before the clipping: where the authors measure."""
        self.norm = row_squares(*self.carried(self.a.grad, self.b.grad)).sum().sqrt()

    def follow(self, optimizer):
        optimizer.register_step_post_hook(lambda *_: self.measure(optimizer.state))

    def measure(self, state):
        self.mean = self.norm if self.mean is None else self.mean.lerp(self.norm, 1 - self.method.decay)
        left, right = self.carried(state[self.a]["exp_avg"], state[self.b]["exp_avg"])
        length = row_squares(left, right).sum().sqrt()
        scale = -self.method.rho / (length + 1e-12) * (self.mean + 1e-12).reciprocal().clamp(max=10)
        self.factors = scale * left, right

    def shift(self, layer, args, y):
        from torch.nn.functional import linear

        if not layer.training or self.factors is None:
            return y
        left, right = (factor.to(y.dtype) for factor in self.factors)
        return y + linear(linear(args[0].to(y.dtype), right), left)


def row_squares(left, right):
    """Squared lengths of the rows of left @ right, from factors as thin as the adapter."""
    return (left @ (right @ right.T) * left).sum(1).clamp(min=0)


def dense(layer):
    """The weight of a linear layer, dequantised where it is in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()
