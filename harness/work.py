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
        if packet in (formulas := flops()):
            flop = formulas[packet](*args, **kwargs, out_val=found)
            first = next((a for a in args if isinstance(a, torch.Tensor)), None)
            if first is not None and first.element_size() == 2:
                self.products += flop
            else:
                self.long_products += flop
        else:
            self.moved += sum(map(size, args)) + size(found)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


NOTHING = Work()
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


def size(tree: Any) -> int:
    if isinstance(tree, (list, tuple)):
        return sum(map(size, tree))
    return tree.numel() * tree.element_size() if hasattr(tree, "element_size") else 0


# What a card reaches of what its datasheet says, and what kernels cost beside their work: fitted to steps of
# ten methods on an H200 (compiled and captured, Gemma-3-1b's shape, 8 x 512), the worst of them 13 % off.
PRODUCTS, LONG_PRODUCTS, MOVED = 0.72, 0.6, 0.75
LAUNCH, GAP = 9e-6, 2e-6  # seconds: for Python to launch a kernel, and between two of them on the card


def seconds_of(launched: Work, card: "Card", replayed: Work = NOTHING) -> float:
    """On a card, of what the host launches and what a graph replays. It launches while the card computes: the
    longer of the two is what they take."""
    both, short = launched + replayed, card.short if card.bf16 else card.long
    busy = both.products / (short * PRODUCTS) + both.long_products / (card.long * LONG_PRODUCTS)
    busy += both.moved / (card.bandwidth * MOVED) + both.launches * GAP
    return max(busy, launched.launches * LAUNCH)
