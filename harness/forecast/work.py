"""What a card has to do: products, bytes that are read and written, and launches."""

from dataclasses import dataclass, field, fields

import torch
from torch.utils.flop_counter import flop_registry

VIEWS = {"view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
         "detach", "alias", "split", "unbind", "_unsafe_view", "as_strided", "unflatten", "diagonal", "chunk",
         "split_with_sizes", "lift_fresh", "empty", "empty_like", "empty_strided", "_reshape_alias", "new_empty",
         "is_same_size", "_local_scalar_dense"}  # fmt: skip


@dataclass
class Work:
    products: float = 0.0  # FLOP of matrix products and attention in 16 bits
    long_products: float = 0.0  # of those in 32 bits
    moved: float = 0.0  # bytes, of what is no product
    launches: float = 0.0  # kernels

    def add(self, func, args, kwargs, found) -> None:
        packet = func.overloadpacket
        if packet.__name__ in VIEWS:
            return
        self.launches += 1
        if packet in flop_registry:
            flop = flop_registry[packet](*args, **kwargs, out_val=found)
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


def size(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, (list, tuple)):
        return sum(map(size, tree))
    return 0
