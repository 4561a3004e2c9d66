"""Low-rank adapters' products as one with those of the frozen weights beside them.

    y = W x + s B A x

As three products, an adapter's output is as large as its layer's: written, read again and added, forward and
backward. Here W and the adapter's matrix share a memory, so that one product gives both: [W | B] with
[x | s A x], or [W ; s A], whichever of a layer's two sides is the shorter. Layers that read the same,
as queries, keys and values do, are one layer. What is learned is what PEFT's own forward teaches.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's builds for a GPU
    triton = None

ALIKE = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # names of layers that read the same
ALIGNED = 8  # columns: 16 bytes, as fast products of 16 bits want their rows
BLOCK = 1024  # values that a program writes


class Adapters:
    """Those of layers that a faster forward computes, together what is `alike`, while `installed`. `write`
    brings their matrices up to date, from the parameters that an optimizer holds, in place."""

    def __init__(self, alike: list[list]):
        self.groups = [Group(layers) for layers in alike]
        self.places = [place for group in self.groups for place in group.places]
        self.factors = [factor.detach() for group in self.groups for factor in group.factors]
        self.scales = [scale for group in self.groups for scale in group.scales]
        self.table = None
        if (
            triton is not None
            and self.factors
            and all(f.is_cuda and f.dtype == torch.float32 for f in self.factors)
        ):
            pairs = zip(self.factors, self.places, strict=True)
            table = [(f.data_ptr(), p.data_ptr(), *f.shape, *f.stride(), p.stride(0)) for f, p in pairs]
            self.table = torch.tensor(table, device=self.factors[0].device)
            self.by = torch.tensor(self.scales, device=self.factors[0].device)

    def write(self) -> None:
        if self.table is not None:  # a launch, where there would be one a matrix
            most = max(factor.numel() for factor in self.factors)
            grid = len(self.table), triton.cdiv(most, BLOCK)
            _write[grid](self.table, self.by, self.places[0], BLOCK=BLOCK)
        elif self.places:
            torch._foreach_copy_(self.places, torch._foreach_mul(self.factors, self.scales))

    @contextmanager
    def installed(self):
        with ExitStack() as stack:
            for group in self.groups:
                for i, layer in enumerate(group.layers):
                    stack.callback(setattr, layer, "__class__", layer.__class__)
                    layer.__class__, layer.group, layer.place = grouped(layer.__class__), group, i
                    stack.callback(vars(layer).pop, "group")
                    stack.callback(vars(layer).pop, "place")
            yield

    def close(self) -> None:
        """Gives the weights memories of their own again."""
        for weight in (layer.get_base_layer().weight for group in self.groups for layer in group.layers):
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)


class Group:
    """Layers (m_i, n) that read the same, with adapters of rank r_i; M and R: the sums, R rounded up.

    `a` (R, n): s A of all. `both` (M, n + R): the weights and beside them `b`, each B in columns of its own;
    or, of a lone layer that hardly widens, (M + R, n): the weight and under it `a`.
    """

    def __init__(self, layers: list):
        self.layers = layers
        weights = [layer.get_base_layer().weight for layer in layers]
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
        self.factors = [factor for pair in pairs for factor in pair]
        self.scales = [scale for layer in layers for scale in (layer.scaling["default"], 1.0)]
        self.sizes = [(len(b), len(a)) for a, b in pairs]
        rows, n = sum(m for m, _ in self.sizes), weights[0].shape[1]
        rank = -(-sum(r for _, r in self.sizes) // ALIGNED) * ALIGNED
        self.narrows = len(layers) == 1 and rows < 2 * n
        zeros = weights[0].new_zeros
        self.both = zeros(rows + rank, n) if self.narrows else zeros(rows, n + rank)
        self.a = self.both[rows:] if self.narrows else zeros(rank, n)
        self.b = zeros(rows, rank) if self.narrows else self.both[:, n:]
        self.places = []
        for weight, (m, r) in zip(weights, blocks(self.sizes), strict=True):
            self.both[m, :n] = weight.data
            weight.data = self.both[m, :n]
            self.places += [self.a[r], self.b[m, r]]
        self.read: torch.Tensor | None = None
        self.made: tuple = ()

    def output(self, layer, x: torch.Tensor) -> torch.Tensor:
        """(..., n) -> (..., m) of a layer. The first that is asked computes all."""
        if self.read is not x:
            rows = x.to(self.both.dtype).flatten(0, -2)
            product, more = (Narrow, (self.b,)) if self.narrows else (Wide, ())
            self.made = product.apply(rows, self.a, self.both, *more, self.sizes, self.scales, *self.factors)
            self.read = x
        found, bias = self.made[layer.place].view(*x.shape[:-1], -1), layer.get_base_layer().bias
        if layer.place == len(self.layers) - 1:
            self.read, self.made = None, ()
        return found if bias is None else found + bias.to(found.dtype)


class Wide(torch.autograd.Function):
    """(T, n), (R, n), (M, n + R) -> each (T, m_i): [x | h] [W | B]^T with h = x a^T."""

    @staticmethod
    def forward(ctx, x, a, both, sizes, scales, *factors):
        joined = torch.cat([x, x @ a.T], 1)  # (T, n + R)
        ctx.save_for_backward(joined, a, both, *factors)
        ctx.sizes, ctx.scales = sizes, scales
        return (joined @ both.T).split([m for m, _ in sizes], 1)

    @staticmethod
    def backward(ctx, *grads):
        joined, a, both, *factors = ctx.saved_tensors
        n, places = a.shape[1], [*blocks(ctx.sizes)]
        to_b = [grad.T @ joined[:, n:][:, r] for grad, (_, r) in zip(grads, places, strict=True)]
        to_joined = grads[0] @ both[places[0][0]]  # (T, n + R)
        for grad, (m, _) in zip(grads[1:], places[1:], strict=True):  # joined, they would be copied
            add_product(to_joined, grad, both[m])
        to_x, to_h = to_joined[:, :n], to_joined[:, n:]
        given = shared(to_h.T @ joined[:, :n], to_b, ctx.sizes, ctx.scales, factors)
        add_product(to_x, to_h, a)
        return to_x, None, None, None, None, *given


class Narrow(torch.autograd.Function):
    """(T, n), (R, n), (M + R, n), (M, R) -> (T, M): y + h B^T with [y | h] = x [W ; a]^T."""

    @staticmethod
    def forward(ctx, x, a, both, b, sizes, scales, *factors):
        product = x @ both.T  # (T, M + R)
        y, h = product[:, : len(b)], product[:, len(b) :]
        ctx.save_for_backward(x, h, both, b, *factors)
        ctx.sizes, ctx.scales = sizes, scales
        add_product(y, h, b.T)
        return (y,)

    @staticmethod
    def backward(ctx, grad):
        x, h, both, b, *factors = ctx.saved_tensors
        to_h = grad @ b  # (T, R)
        to_b = [grad.T @ h[:, : ctx.sizes[0][1]]]
        given = shared(to_h.T @ x, to_b, ctx.sizes, ctx.scales, factors)
        return torch.cat([grad, to_h], 1) @ both, None, None, None, None, None, *given


@torch.library.custom_op("tuneoff::add_product", mutates_args={"total"})
def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """In place, also where layers are compiled: torch.addmm copies the total first."""
    total.addmm_(left, right)


def shared(to_a, to_b, sizes, scales, factors):
    """The gradients of `a` (R, n) and of each B as those of each layer's A and B, in their types."""
    found = [part for own, (_, r) in zip(to_b, blocks(sizes), strict=True) for part in (to_a[r], own)]
    return [(s * part).to(own.dtype) for s, part, own in zip(scales, found, factors, strict=True)]


def blocks(sizes):
    """For (m_i, r_i): the rows and the columns of each layer's B among all."""
    row = column = 0
    for m, r in sizes:
        yield slice(row, row + m), slice(column, column + r)
        row, column = row + m, column + r


# Which layers those are


def alike(model) -> list[list]:
    """Layers with a plain adapter on a plain frozen matrix, those together that read the same. All are of one
    type, which most have: what is computed in one memory, and written by one launch, has one."""
    types = Counter(type_of(layer) for layer in model.modules() if simple(layer))
    usual, found = max(types, key=types.__getitem__, default=None), []
    for parent in model.modules():
        children = parent.named_children()
        plain = {name: layer for name, layer in children if simple(layer) and type_of(layer) == usual}
        for names in ALIKE:
            if len(together := [name for name in plain if name in names]) > 1:
                found.append([plain.pop(name) for name in together])
        found += [[layer] for layer in plain.values()]
    return found


def type_of(layer) -> torch.dtype:
    return layer.get_base_layer().weight.dtype


def simple(layer) -> bool:
    """Nothing but W x + s B A x, of a matrix in floating point."""
    kind = type(layer)
    if not (
        kind.__module__.startswith("peft.") and kind.__name__ == "Linear" and hasattr(layer, "lora_variant")
    ):
        return False
    base, own = layer.get_base_layer(), [*layer.lora_A.values(), *layer.lora_B.values()]
    plain = [
        type(m) is torch.nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in [base, *own]
    ]
    return (
        list(layer.lora_A) == ["default"] == list(layer.active_adapters)
        and not (layer.lora_variant or layer.merged)
        and all(plain)
        and all(m.bias is None for m in own)
        and base.weight.is_floating_point()
        and not base.weight.requires_grad
    )


@cache
def grouped(kind: type) -> type:
    """PEFT's own layer, but for its forward."""

    class Grouped(kind):
        def forward(self, x, *args, **kwargs):
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            return self.group.output(self, x)

    return Grouped


if triton is not None:

    @triton.jit
    def _write(table, scales, typed, BLOCK: tl.constexpr):
        """Of each matrix in the table (from, to, rows, columns, their strides where it is read, that of rows
        where it goes), values times its scale."""
        entry = table + 7 * tl.program_id(0)
        rows, columns = tl.load(entry + 2), tl.load(entry + 3)
        down, right, stride = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
        values = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        held = values < rows * columns
        source = tl.load(entry).to(tl.pointer_type(tl.float32))
        target = tl.load(entry + 1).to(tl.pointer_type(typed.dtype.element_ty))
        row, column = values // columns, values % columns
        found = tl.load(source + row * down + column * right, mask=held) * tl.load(scales + tl.program_id(0))
        tl.store(target + row * stride + column, found.to(typed.dtype.element_ty), mask=held)
