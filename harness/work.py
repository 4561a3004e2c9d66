"""What a card has to do: products, bytes that are read and written, values that lie apart, and launches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import ceil
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
    scattered: float = 0.0  # values of them, each of which is looked for: not all tensors lie alike
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
            one_by_one = torch.Tag.pointwise in func.tags or packet.__name__ in COPIES
            if one_by_one and isinstance(found, torch.Tensor) and not alike(args, found):
                self.scattered += found.numel()
        elif short:
            self.products += flop
        else:
            self.long_products += flop

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


NOTHING = Work()
COPIES = {"copy_", "clone", "_to_copy"}
# FLOP for each byte that it moves, below which a product, as by a matrix of low rank, waits for memory: what
# cards compute by what they move, in 16 bits 125 (V100) to 420 (L40S), in 32 bits 10 (A100) to 106 (L40S)
INTENSITY, LONG_INTENSITY = 150, 20
# Of operations whose work torch does not know, or which are far from a product's speed: the FLOP of products
# that take an H200 as long. Flash attention reaches a fifth of their speed, its backward 0.3; where a mask is
# read, both an eighth, in wide heads 1 / 5.5 and 1 / 31.
FLASH, MASKED, MASKED_WIDE = (5, 3.4), (8, 8), (5.5, 31)
WIDE, BLOCK = 128, 128  # of a head, in values; of the keys that are read for one query, beyond those it sees
FLOPS: dict[str, Any] = {
    "bitsandbytes.gemm_4bit": lambda x, *_, out_val, **__: 2 * out_val.numel() * x.shape[-1],
    "tuneoff.add_product": lambda total, left, *_, **__: 2 * total.numel() * left.shape[-1],
    # its search for codes, 30 ps a weight
    "bitsandbytes.optimizer_update_8bit_blockwise": lambda _, gradient, *more, **__: 1200 * gradient.numel(),
    "aten._flash_attention_forward": lambda *args, **own: in_rows(args[0], args[3], args[5], False, **own),
    "aten._flash_attention_backward": lambda *args, **own: in_rows(args[1], args[6], args[8], True, **own),
    "aten._scaled_dot_product_flash_attention": lambda query, key, value, drop=0.0, causal=False, *_, **__: (
        attended(query, seen(key.shape[2], causal), FLASH, False)
    ),
    "aten._scaled_dot_product_flash_attention_backward": lambda *args, **_: attended(
        args[1], seen(args[2].shape[2], args[11]), FLASH, True
    ),
    "aten._scaled_dot_product_efficient_attention": lambda *own, **_: masked(own[0], own[1], False),
    "aten._scaled_dot_product_efficient_attention_backward": lambda *args, **_: masked(
        args[1], args[2], True
    ),
}


def masked(query: Any, key: Any, back: bool) -> float:
    slower = MASKED_WIDE if query.shape[-1] > WIDE else MASKED
    return attended(query, key.shape[2], slower if query.element_size() == 2 else (1, 1), back)


def in_rows(
    query: Any, rows: Any, longest: int, back: bool, window_size_left: int | None = None, **_: Any
) -> float:
    """Of (tokens, heads, width), rows one behind another: so many, or as many as there are borders but for
    those of rows that only fill up."""
    count = getattr(rows, "count", len(rows) - 1 - ceil(len(query) / longest))
    length = min(longest, len(query) / max(1, count))
    return attended(query, seen(length, True, window_size_left or 0), FLASH, back)


def seen(length: float, causal: bool, window: int = 0) -> float:
    """Keys that are read for a query, on average."""
    if not causal:
        return length
    if 0 < window < length:
        return min(length, window * (1 - window / (2 * length)) + BLOCK)
    return min(length, (length + BLOCK) / 2)


def attended(query: Any, keys: float, slower: tuple[float, float], back: bool) -> float:
    """A product forward for scores and one for values; backward scores once more, and one for each input."""
    return 2 * query.numel() * keys * (5 if back else 2) * slower[back]


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
    return FLOPS.get(str(packet)) or flops().get(packet)


def alike(args: tuple, found: Any) -> bool:
    """Whether one row of values is computed from others, each at the same place."""

    def order(x: Any) -> list[tuple[int, int]]:
        return [(n, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]

    return all(order(x) == order(found) for x in args if hasattr(x, "stride") and x.dim())


def size(tree: Any) -> int:
    if isinstance(tree, (list, tuple)):
        return sum(map(size, tree))
    return tree.numel() * tree.element_size() if hasattr(tree, "element_size") else 0


# What a card reaches of what its datasheet says, and what kernels cost beside their work: fitted to 165
# trainings of 21 methods and three architectures on an H200 (17 compiled, 20 of uneven rows), LAUNCH to
# seven of them whose steps are plain; before rows that only fill up were left out of attention.
PRODUCTS, LONG_PRODUCTS, MOVED = 0.69, 0.6, 0.88
LAUNCH, GAP = 22e-6, 2.2e-6  # seconds: for Python to launch a kernel, and between two of them on the card
SEARCHED = 61  # operations in 32 bits that find a scattered value


def seconds_of(launched: Work, card: "Card", replayed: Work = NOTHING) -> float:
    """On a card, of what the host launches and what a graph replays. It launches while the card computes: the
    longer of the two is what they take."""
    both, short = launched + replayed, card.short if card.bf16 else card.long
    busy = both.products / (short * PRODUCTS) + both.long_products / (card.long * LONG_PRODUCTS)
    busy += both.scattered * SEARCHED / (card.long * LONG_PRODUCTS)
    busy += both.moved / (card.bandwidth * MOVED) + both.launches * GAP
    return max(busy, launched.launches * LAUNCH)
