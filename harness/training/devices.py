"""The devices of a run, one a process: each holds the whole model and reads its share of every step's rows.

A loss is weighed by the tokens, or rows, of the whole step, so that the sum of the devices' gradients is the
gradient that one device would have: the same batches, the same losses, the same weights, up to rounding.

By torch.distributed itself. DDP, and accelerate by way of it, follow the forward of the model they wrap,
which the one LM head passes by (harness/training/head.py), and reduce within backward, which a step's graph
has recorded; here what a step has added up is reduced once (harness/training/reducer.py), whichever way it
was computed.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from harness.ranks import Place

T = TypeVar("T")
# A rank that is gone is seen by rank 0 (harness/ranks.py); one that compiles or decodes is waited for.
PATIENCE = timedelta(days=1)


class Devices:
    """This process computes on that of number `rank` of `count`. Alone, it shares and adds up nothing."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count, self.talking = rank, count, count > 1
        self.host: dist.ProcessGroup | None = None  # by which the processes talk beside their cards

    @classmethod
    def joined(cls, place: Place) -> "Devices":
        """All of a place's ranks have called this when it returns."""
        if place.count == 1:
            return cls()
        for library in ("GLOO", "NCCL"):  # they find one another on this host, whatever else there is
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        # Else NCCL would abort rank 0 for another that is gone, before its record says why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        cuda = torch.cuda.is_available()
        port = 0 if place.rank == 0 else int(place.hear())
        store = dist.TCPStore("127.0.0.1", port, place.count, place.rank == 0, PATIENCE, False)
        if place.rank == 0:
            place.tell(str(store.port))
        if not cuda:
            torch.set_num_threads(max(1, torch.get_num_threads() // place.count))
        own = torch.device("cuda", 0) if cuda else None  # which is another card in each: harness/ranks.py
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=place.rank, world_size=place.count,
            timeout=PATIENCE, device_id=own,
        )  # fmt: skip
        made = cls(place.rank, place.count)
        made.host = dist.new_group(backend="gloo", timeout=PATIENCE) if cuda else dist.group.WORLD
        return made

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, it keeps to its share, but adds nothing up: in a copy of the process, which is not one of
        them."""
        before, self.talking = self.talking, False
        try:
            yield
        finally:
            self.talking = before

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, it is the only one, and reads all."""
        own = self.rank, self.count, self.talking
        self.rank, self.count, self.talking = 0, 1, False
        try:
            yield
        finally:
            self.rank, self.count, self.talking = own

    # What each is given

    def share(self, items: list[T], size: Callable[[T], int]) -> list[T]:
        """This device's, in their order: as many as any other's, up to one, and about as much."""
        if self.count == 1:
            return items
        mine = set()
        largest_first = sorted(range(len(items)), key=lambda i: size(items[i]), reverse=True)
        for place, i in enumerate(largest_first):
            turn, seat = divmod(place, self.count)
            if (seat if turn % 2 == 0 else self.count - 1 - seat) == self.rank:  # there and back again
                mine.add(i)
        return [item for i, item in enumerate(items) if i in mine]

    # What all of them know

    def sum(self, *tensors: torch.Tensor) -> None:
        """In place; all of one type, as one exchange."""
        if not self.talking:
            return
        own = None if tensors[0].is_cuda else self.host
        with dist._coalescing_manager(own):
            for tensor in tensors:
                dist.all_reduce(tensor, group=own)

    def total(self, value, device) -> torch.Tensor:
        """A number, or a tensor, of all devices together."""
        if not self.talking:
            return value
        found = value.clone() if isinstance(value, torch.Tensor) else torch.as_tensor(value, device=device)
        self.sum(found)
        return found

    def gathered(self, value: T) -> list[T]:
        """That of each device."""
        if not self.talking:
            return [value]
        found: list = [None] * self.count
        dist.all_gather_object(found, value, group=self.host)
        return found

    def merged(self, found: dict) -> dict:
        """What each has found of its share."""
        return {key: value for one in self.gathered(found) for key, value in one.items()}

    def same(self, model) -> None:
        """What was loaded and attached is that of rank 0 to the bit: what it was computed with may round
        otherwise from card to card. Raises RuntimeError where it is not of one form."""
        if not self.talking:
            return
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        forms = self.gathered(
            {name: (*t.shape, str(t.dtype), t.requires_grad) for name, t in tensors.items()}
        )
        if any(form != forms[0] for form in forms):
            raise RuntimeError("attach has made another model on another device: its draws are not run.rng's")
        for tensor in tensors.values():
            whole = tensor.data.contiguous()
            dist.broadcast(whole, 0, group=None if whole.is_cuda else self.host)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(whole)
