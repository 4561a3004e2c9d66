"""What a card has to do: products, bytes that are read and written, and launches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.forecast.cards import Card

VIEWS = {"view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
         "detach", "alias", "split", "unbind", "_unsafe_view", "as_strided", "unflatten", "diagonal", "chunk",
         "split_with_sizes", "lift_fresh", "empty", "empty_like", "empty_strided", "_reshape_alias",
         "new_empty", "is_same_size", "_local_scalar_dense"}  # fmt: skip


@dataclass
class Work:
    products: float = 0.0  # FLOP of matrix products and attention in 16 bits
    long_products: float = 0.0  # of those in 32 bits
    moved: float = 0.0  # bytes, of what is no product
    launches: float = 0.0  # kernels

    def add(self, func: Any, args: tuple, kwargs: dict, found: Any) -> None:
        import torch

        packet = func.overloadpacket
        if packet.__name__ in VIEWS:
            return
        self.launches += 1
        moved = sum(map(size, args)) + size(found)
        formula = formula_of(packet)
        flop = formula(*args, **kwargs, out_val=found) if formula else 0
        short = next((a.element_size() == 2 for a in args if isinstance(a, torch.Tensor)), False)
        if not flop or flop < (INTENSITY if short else LONG_INTENSITY) * moved:
            self.moved += moved
        elif short:
            self.products += flop
        else:
            self.long_products += flop

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


NOTHING = Work()
# FLOP for each byte that it moves, below which a product, as by a matrix of low rank, waits for memory: what
# cards compute by what they move, in 16 bits 125 (V100) to 420 (L40S), in 32 bits 10 (A100) to 106 (L40S)
INTENSITY, LONG_INTENSITY = 150, 20
FLOPS: dict[str, Any] = {  # of operations that are not torch's own
    "bitsandbytes.gemm_4bit": lambda x, *_, out_val, **__: 2 * out_val.numel() * x.shape[-1],
    "tuneoff.add_product": lambda total, left, *_, **__: 2 * total.numel() * left.shape[-1],
}
Shape = Sequence[int]


@cache
def flops() -> dict:
    """Operation -> its FLOP, by torch's formulas; before 2.13 they refuse a key head that several queries'
    heads share."""
    from torch.utils import flop_counter

    def forward(query: Shape, key: Shape, value: Shape) -> int:
        (rows, heads, queries, width), keys = query, key[2]
        return 2 * rows * heads * queries * keys * (width + value[3])

    def backward(
        gradient: Shape, query: Shape, key: Shape, value: Shape
    ) -> int:  # scores once more, and a product for each input
        (rows, heads, queries, width), keys = query, key[2]
        return 2 * rows * heads * queries * keys * (3 * width + 2 * value[3])

    flop_counter.sdpa_flop_count, flop_counter.sdpa_backward_flop_count = forward, backward
    return flop_counter.flop_registry


def formula_of(packet: Any) -> Any:
    """What counts the FLOP of an operation; null where it is no product."""
    return flops().get(packet) or FLOPS.get(str(packet))


def size(tree: Any) -> int:
    if isinstance(tree, (list, tuple)):
        return sum(map(size, tree))
    return tree.numel() * tree.element_size() if hasattr(tree, "element_size") else 0


# What a card reaches of what its datasheet says, and what kernels cost beside their work: fitted to 83 steps
# of 21 methods and three architectures on an H200 (captured, 12 of them compiled; rows of one length), LAUNCH
# to plain steps of three.
PRODUCTS, LONG_PRODUCTS, MOVED = 0.8, 0.6, 0.71
LAUNCH, GAP = 17e-6, 2.4e-6  # seconds: for Python to launch a kernel, and between two of them on the card


def seconds_of(launched: Work, card: "Card", replayed: Work = NOTHING) -> float:
    """On a card, of what the host launches and what a graph replays. It launches while the card computes: the
    longer of the two is what they take."""
    both, short = launched + replayed, card.short if card.bf16 else card.long
    busy = both.products / (short * PRODUCTS) + both.long_products / (card.long * LONG_PRODUCTS)
    busy += both.moved / (card.bandwidth * MOVED) + both.launches * GAP
    return max(busy, launched.launches * LAUNCH)
