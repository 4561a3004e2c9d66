"""What lies on a card at each moment: every storage from its making to its end, by what it is for."""

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from harness.measuring import tensors
from harness.training.dry.allocator import Allocator
from harness.training.dry.world import CARD, answered
from harness.work import Work

ENGINE = _engine_run_backward.__code__
NONE = -1  # number of no storage
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "workspace")


@dataclass
class Moment:
    """A stretch of a run: its highest sum of live bytes, of what this was made, and the most that torch's
    allocator had reserved."""

    allocated: int = 0
    reserved: int = 0
    parts: dict[str, float] = field(default_factory=dict)


def told(tree):
    """What an operation can tell of what it is given."""
    if isinstance(tree, torch.Tensor):
        return tree.size(), tree.stride(), tree.dtype, tree.device
    if isinstance(tree, (list, tuple)):
        return tuple(map(told, tree))
    if isinstance(tree, dict):
        return tuple((name, told(value)) for name, value in tree.items())
    return type(tree), tree


def accumulates(func, args) -> bool:
    """Whether autograd's engine adds up two gradients of one value: into the first, where nobody looks on."""
    if func is not torch.ops.aten.add.Tensor or not (torch.is_tensor(args[1]) and alike(*args[:2])):
        return False
    frame: FrameType | None = sys._getframe(3)  # who asked the mode
    while frame and frame.f_code is not ENGINE and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_code is ENGINE


def alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """And the first lies alone in its memory."""
    whole = first.untyped_storage().nbytes() == first.nbytes
    return whole and first.size() == second.size() and first.dtype == second.dtype


class Ledger(TorchDispatchMode):
    """`with Ledger() as ledger: ...`; `at(moment, part)` says where the run is and what is made there.

    Halves of a backward are told apart, so that in each the highest sum is a straight line in the number of
    layers: it lies at one of its ends.
    """

    known: dict = {}  # operation and what it is given -> sizes, strides and types of what it gives

    def __init__(self) -> None:
        super().__init__()
        self.whole: set = set()  # operations that are made of no others
        self.fresh: dict = {}  # operation -> whether what it gives is new
        self.live: dict[int, tuple[int, weakref.ref]] = {}  # a live storage's address -> its number
        self.part: dict[int, str] = {NONE: "workspace"}  # number of a storage -> what it is for
        self.changes: list[tuple[int, int, int]] = []  # number, bytes made or freed, bytes reserved after it
        self.marks: list[tuple[int, str]] = [(0, "")]  # from which change on which moment it is
        self.phase, self.now = "", "weights"
        self.doing = ""  # whose work it is, where that is not the phase's
        self.count = 0
        self.base: set[int] = set()  # the parameters of the base model
        self.filled: dict[torch.Size, bool] = {}  # size -> whether no batch of it is padded
        self.allocator, self.graphs = Allocator(), Allocator()  # a graph's tensors have a pool of their own
        self.pool, self.replayed = self.allocator, True  # whether there still are graphs
        self.work: defaultdict[str, Work] = defaultdict(Work)  # of each phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what operations are made of is no question to a card
            found = self.computed(func, args, kwargs)
        return found

    def computed(self, func, args, kwargs):
        if func not in self.whole:  # in inference mode operations come that are made of others
            if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):  # nor has a GPU one
                with self:
                    if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
                        return found
            self.whole.add(func)
        found = args[0] if accumulates(func, args) else answered(func, args, kwargs)
        if found is NotImplemented:
            found = self.given(func, args, kwargs)
        for tensor in of_card(found):
            self.number(tensor)
        self.work[self.doing or self.phase].add(func, args, kwargs, found)
        return found

    def given(self, func, args, kwargs):
        """The same for the same shapes: torch's own way to it takes a hundred times as long."""
        if (fresh := self.fresh.get(func)) is None:
            some = [*func._schema.arguments, *func._schema.returns]
            fresh = self.fresh[func] = not any(value.alias_info for value in some)
        if not fresh:
            return func(*args, **kwargs)
        key = func, told(args), told(kwargs)
        try:
            known = self.known.get(key)
        except TypeError:  # what cannot be told apart
            return func(*args, **kwargs)
        if known is None:
            found = func(*args, **kwargs)
            outputs = found if isinstance(found, (tuple, list)) else (found,)
            if all(isinstance(x, torch.Tensor) and x.device == CARD for x in outputs):
                self.known[key] = type(found), [(x.size(), x.stride(), x.dtype) for x in outputs]
            return found
        kind, metas = known
        made = [torch.empty_strided(size, stride, dtype=dtype, device=CARD) for size, stride, dtype in metas]
        return made[0] if kind not in (tuple, list) else kind(made)

    def number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.live:
            size, number = storage.nbytes(), self.count
            self.count += 1
            self.part[number] = self.now
            pool = self.pool
            block = pool.take(size)
            held = block.size
            self.changes.append((number, held, self.reserved))

            def freed(_: object) -> None:
                del self.live[address]
                pool.free(block)
                self.changes.append((number, -held, self.reserved))

            self.live[address] = number, weakref.ref(storage, freed)
        return self.live[address][0]

    @property
    def reserved(self) -> int:
        return self.allocator.reserved + self.graphs.reserved

    @contextmanager
    def captured(self, largest: bool) -> Iterator[None]:
        """Within, what is made is a graph's, in memory that nothing else is given while there are graphs. The
        largest is captured first; others, and its replays, take no more."""
        first = largest and not self.graphs.reserved
        before, self.pool = self.pool, self.graphs if first else Allocator()
        try:
            yield
        finally:
            self.pool = before

    def beside_graphs(self, share: float) -> None:
        """A step that is tried before it is captured, of so much as the largest, beside what that keeps."""
        with self.entered("compile"):
            self.mark("beside graphs")
            self.changes.append((NONE, 0, self.reserved + int(share * self.graphs.reserved)))
            self.mark("")
            self.changes.append((NONE, 0, self.reserved))

    def empty_cache(self) -> None:
        self.allocator.empty_cache()
        if not self.replayed:
            self.graphs.empty_cache()
        self.changes.append((NONE, 0, self.reserved))

    def is_part(self, part: str, tree: object) -> None:
        for tensor in of_card(tree):
            self.part[self.number(tensor)] = part

    def mark(self, moment: str) -> None:
        self.marks.append((len(self.changes), f"{self.phase} {moment}".rstrip()))

    @contextmanager
    def making(self, part: str, moment: str = "") -> Iterator[None]:
        """Within, what is made is for this."""
        before, marked = self.now, self.marks[-1][1]
        self.now = part
        if moment:
            self.mark(moment)
        try:
            yield
        finally:
            self.now = before
            if moment:
                self.marks.append((len(self.changes), marked))

    @contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """Within, work is of this, not of the phase."""
        before, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = before

    @contextmanager
    def entered(self, phase: str) -> Iterator[None]:
        before, self.phase = (self.phase, self.now), phase
        self.now = {"load": "weights", "attach": "workspace"}.get(phase, "activations")
        self.mark("")
        try:
            with self.counted(""):
                yield
        finally:
            self.phase, self.now = before
            self.mark("")

    def moments(self) -> dict[str, Moment]:
        """By name, the highest of each."""
        found: dict[str, Moment] = defaultdict(Moment)
        held, total = dict.fromkeys(PARTS, 0), 0
        ends = [start for start, _ in self.marks[1:]] + [len(self.changes)]
        reserved = 0
        for (start, name), end in zip(self.marks, ends, strict=True):
            for place in range(start, end + 1):
                half = " end" * (name.endswith("backward") and place - start > (end - start) / 2)
                moment = found[name + half]
                moment.reserved = max(moment.reserved, reserved)
                if total > moment.allocated:  # at first what was there before
                    moment.allocated, moment.parts = total, dict(held)
                if place < end:
                    number, size, reserved = self.changes[place]
                    held[self.part[number]] += size
                    total += size
        return {name: moment for name, moment in found.items() if name}


def of_card(tree: object) -> Iterator[torch.Tensor]:
    """The tensors of the card."""
    return (tensor for tensor in tensors(tree) if tensor.device == CARD)
