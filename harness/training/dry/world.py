"""A card that is not there: a training's own code runs on tensors of the device `meta`, which have shapes
and types and hold nothing, as if that were a GPU.

What a GPU would do otherwise than `meta` is said here: autocast, the attention that torch takes, a few fused
kernels. What a card tells its host (a number, a list, a copy) is made up, evenly spread: memory hardly
depends on it. The host's own tensors are real.
"""

import math
from contextlib import ExitStack, contextmanager
from itertools import count
from unittest.mock import patch

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from harness.training import head_kernel

CARD = torch.device("meta")
GENERATOR = torch.Generator
TRIFLE = 1e-6
aten = torch.ops.aten
# As torch's CUDA backend has them (aten/src/ATen/autocast_mode.h): what autocast computes in 16 bits, and
# what in 32. Functions, methods and operators by name.
SHORT = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv",
    "chain_matmul", "multi_dot", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention", "einsum",
    "multi_head_attention_forward",
}  # fmt: skip
LONG = {
    "layer_norm", "group_norm", "norm", "pow", "__pow__", "__rpow__", "rpow", "rsqrt", "reciprocal", "exp",
    "log", "log2", "log10", "log1p", "expm1", "softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum",
    "logsumexp", "cross_entropy", "nll_loss", "mse_loss", "kl_div", "smooth_l1_loss", "softplus", "cdist",
    "cosine_similarity", "dist", "tan", "acos", "asin", "cosh", "sinh", "erfinv",
}  # fmt: skip


class Autocast:
    """Stands for torch.autocast, for every kind of device: the innermost one holds."""

    now: list[torch.dtype | None] = [None]  # the type of products, of those that are entered

    def __init__(self, device_type=None, dtype=None, enabled=True, cache_enabled=None, **_):
        self.dtype = (dtype or torch.bfloat16) if enabled else None

    def __enter__(self):
        Autocast.now.append(self.dtype)
        return self

    def __exit__(self, *_):
        Autocast.now.pop()

    def __call__(self, function):
        def within(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return within


class Card(TorchFunctionMode):
    """What Python asks of torch, as a GPU would be asked."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = CARD
        if kwargs.get("generator") is not None and str(kwargs.get("device")) == CARD.type:
            del kwargs["generator"]
        if name in ("to", "cuda"):
            args = [CARD if is_cuda(arg) else arg for arg in args]
            if name == "cuda":
                return args[0].to(CARD)
        if function is torch.Tensor.backward:  # which would leave this mode behind
            gradient, kept = kwargs.get("gradient"), bool(kwargs.get("retain_graph"))
            with self:
                roots = (args[0],), (torch.ones_like(args[0]) if gradient is None else gradient,)
                return _engine_run_backward(
                    *roots, kept, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if (dtype := Autocast.now[-1]) is not None and any(map(on_card, args)):
            if name in SHORT:
                args, kwargs = cast(args, dtype), cast(kwargs, dtype)
            elif name in LONG and "dtype" not in kwargs:
                args, kwargs = cast(args, torch.float32), cast(kwargs, torch.float32)
        if function is F.scaled_dot_product_attention and on_card(args[0]):
            return attention(*args, **kwargs)
        return function(*args, **kwargs)


def is_cuda(value) -> bool:
    return str(value).partition(":")[0] == "cuda" if isinstance(value, str | torch.device) else False


def on_card(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device == CARD


def cast(tree, dtype):
    """Tensors in floating point, up to 32 bits, in another type."""
    if isinstance(tree, torch.Tensor):
        fits = tree.is_floating_point() and tree.dtype != torch.float64 and on_card(tree)
        return tree.to(dtype) if fits else tree
    if isinstance(tree, dict):
        return {name: cast(value, dtype) for name, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(cast(value, dtype) for value in tree)
    return tree


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The kernel that a GPU takes: flash attention; with a mask, or in fp32, the memory-efficient one, which
    has as many keys as queries: else products and a softmax, as torch's documentation has it."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    learned = any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, learned, dropout_p, is_causal, scale=scale
    )[0]


class Told:
    count = count()  # tensors that the host was told of


def made_up(tensor: torch.Tensor) -> torch.Tensor:
    """What a card would tell the host: fractions, or counts from 0. The same for tensors of one size, so that
    layers stay alike, but for a trifle: of equals the first is the largest, as of layers the lowest, above
    which a backward must cross all."""
    size = tensor.numel()
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        found = evenly(size) * (1 - TRIFLE * next(Told.count))
    else:
        found = torch.arange(size, device="cpu")
    return found.to(tensor.dtype).view(tensor.shape)


def evenly(size: int) -> torch.Tensor:
    """Fractions as van der Corput has them: each 2, 4, 8, ... of them in order are spread evenly, too."""
    bits = max(0, size - 1).bit_length()
    left, found = (
        torch.arange(size, device="cpu"),
        torch.full((size,), 0.5 ** (bits + 1), dtype=torch.float64),
    )
    for bit in range(bits):
        found += (left >> bit & 1) * 0.5 ** (bit + 1)
    return found


def answered(func, args, kwargs):
    """What a card's operation gives, where `meta` has none of its own."""
    if func is aten._local_scalar_dense.default:
        return made_up(args[0]).item() if args[0].device == CARD else NotImplemented
    if func.overloadpacket in IN_PLACE:
        return None
    if func is aten._to_copy.default and args[0].device == CARD:
        to = kwargs.get("device")
        if to is not None and to.type == "cpu":
            return made_up(args[0]).to(kwargs.get("dtype") or args[0].dtype)
    if func is aten.copy_.default and on_card(args[1]) and not on_card(args[0]):
        return args[0].copy_(made_up(args[1]))
    if func is aten.nonzero.default and on_card(args[0]):
        return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
    return NotImplemented


IN_PLACE = {aten._fused_adamw_, aten._fused_adam_, aten._fused_sgd_}


def log_probabilities(logits, labels, softcap=None, weights=None, replace=True):
    """As harness/training/head_kernel.py has it."""
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)


@contextmanager
def world():
    """Within, `CARD` is a GPU that computes nothing."""
    from torch.optim import adam, adamw, optimizer

    Told.count = count()
    devices = [*optimizer._get_fused_kernels_supported_devices(), CARD.type]
    with ExitStack() as stack:
        for where, name, value in (
            (torch, "Generator", lambda device="cpu": GENERATOR()),
            (torch, "autocast", Autocast), (torch.amp, "autocast", Autocast),
            (torch.amp.autocast_mode, "autocast", Autocast),
            (torch, "is_autocast_enabled", lambda *_: Autocast.now[-1] is not None),
            (torch, "get_autocast_dtype", lambda *_: Autocast.now[-1] or torch.bfloat16),
            (torch.amp.autocast_mode, "is_autocast_available", lambda *_: True),
            (torch.amp, "is_autocast_available", lambda *_: True),
            (head_kernel, "serves", lambda device: True),
            (head_kernel, "log_probabilities", log_probabilities),
        ):  # fmt: skip
            stack.enter_context(patch.object(where, name, value))
        for where in (optimizer, adam, adamw):
            if hasattr(where, "_get_fused_kernels_supported_devices"):
                known = "_get_fused_kernels_supported_devices"
                stack.enter_context(patch.object(where, known, lambda: devices))
        stack.enter_context(Card())
        yield
