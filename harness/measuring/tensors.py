"""Bytes of live tensors in a training: how much of them is weights, gradients, moments and activations.

On a GPU the allocator counts them. On a CPU nothing does, and resident memory says little of a small model:
the libraries alone hold a hundred times as much. So a few steps are taken in a copy of the process, where
each storage is followed from its making to its end; of the run itself nothing is touched, nor timed.
"""

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain, count
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.forks import in_a_copy
from harness.record import Memory

LIMIT_SECONDS = 600  # a copy that hangs is given up: steps that a CPU can be asked for in numbers end sooner


class LiveTensors(TorchDispatchMode):
    """`with LiveTensors(model, optimizer) as live: step(); step()`, then `live.memory()`.

    What the steps find there already is counted from the beginning: the model's and the optimizer's tensors,
    and any other that an operation reads. Scratch space within one kernel is not seen. Two steps show all:
    the first makes the moments, and what a method makes but seldom; the second begins with the moments.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.numbers = count()
        self.followed: dict[int, tuple[int, weakref.ref]] = {}  # a live storage's address -> its number
        self.before: dict[int, int] = {}  # number -> bytes, of what was there
        self.changes: list[tuple[int, int]] = []  # number, bytes made (above 0) or freed (below), in order
        self.parts: dict[int, str] = {}  # number -> a field of Memory; of all others: activations

    def __enter__(self) -> Self:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.is_part("weights", tensor)
        self.find_gradients()
        self.find_moments()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Also as it arrives: a method may use and free a gradient before the optimizer's step.
        self.hooks = [p.register_hook(lambda gradient: self.is_part("gradients", gradient)) for p in trained]
        self.hooks.append(self.optimizer.register_step_pre_hook(lambda *_: self.find_gradients()))
        self.hooks.append(self.optimizer.register_step_post_hook(lambda *_: self.find_moments()))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.find_moments()
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # it is given a tensor that Python has just made
            for tensor in held((args, kwargs)):
                self.number(tensor, there=True)
        made = func(*args, **(kwargs or {}))
        for tensor in held(made):
            self.number(tensor)
        return made

    def number(self, tensor: torch.Tensor, there: bool = False) -> int:
        """Of its storage, which is followed from now on. `there`: it was, before the first step."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.followed:
            number, size = next(self.numbers), storage.nbytes()
            if there:
                self.before[number] = size
            else:
                self.changes.append((number, size))

            def freed(_: object) -> None:
                del self.followed[address]
                self.changes.append((number, -size))

            self.followed[address] = number, weakref.ref(storage, freed)
        return self.followed[address][0]

    def is_part(self, part: str, tensor: torch.Tensor) -> None:
        self.parts.setdefault(self.number(tensor, there=True), part)

    def find_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self.is_part("gradients", parameter.grad)

    def find_moments(self) -> None:
        for tensor in held(dict(self.optimizer.state)):
            self.is_part("moments", tensor)

    def memory(self) -> Memory:
        """At the moment of the highest sum. Added up last: what a storage was for shows only later."""
        held, highest = Memory(0, 0, 0, 0), Memory(0, 0, 0, 0)
        for number, change in chain(self.before.items(), self.changes):
            part = self.parts.get(number, "weights" if number in self.before else "activations")
            setattr(held, part, getattr(held, part) + change)
            if held.peak > highest.peak:
                highest = Memory(**asdict(held))
        return highest


def tensors(tree: object) -> Iterator[torch.Tensor]:
    """In lists, tuples, dicts. By hand: a library's walk over trees takes longer than a small operation."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def held(tree: object) -> Iterator[torch.Tensor]:
    """Those of them that hold bytes."""
    return (t for t in tensors(tree) if t.layout == torch.strided and t.device.type != "meta")


def rehearse(measure: Callable[[], Memory]) -> Memory | None:
    """-> what `measure` finds. It is called in a copy of this process, so that weights, random states and
    what a method remembers are left as they are: it may make an optimizer and take a few steps.

    Null on a GPU, on systems that cannot copy a process that has threads, and where the copy ended without
    an answer, as for want of memory.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return None
    told = in_a_copy(lambda: json.dumps(asdict(measure())).encode(), LIMIT_SECONDS)
    return Memory(**json.loads(told)) if told else None
