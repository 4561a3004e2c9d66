"""Gradients become the sums of all devices', in buckets, beside the backward that makes them.

Nothing is reduced within a backward, as DDP does it: on a card it only marks when a bucket's gradients are
made, and the sums are queued behind it, on a stream that waits for these marks. A captured step marks anew at
each replay. So no graph holds what a device needs others for: each tries, compiles and captures for itself,
and all queue the same sums in the same order, whichever way their gradients were made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter

from harness.training.devices import Devices

# Of gradients that are exchanged at once: a layer's of a model of 1B. Each exchange takes processors from the
# backward beside it, and 100 MiB pass in half the time of four parts (H200).
BUCKET_BYTES = 128 * 2**20
SMALL_BYTES = 2**20  # below which gradients are copied together


class Reducer:
    """Of these parameters. `began()` before each backward; afterwards `made` are the buckets that it has
    marked, or that a graph of it marks when it is replayed; `add_up()` after the last one of a step."""

    def __init__(self, devices: Devices, parameters: list[Parameter]):
        self.devices = devices
        order = parameters[::-1]  # as a backward makes them,
        order.sort(key=lambda p: p.ndim < 2)  # and a layer's first norm comes last: no matrix waits for it
        self.buckets = [*buckets(order)] if devices.count > 1 else []
        self.number = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.made: set[int] = set()
        self.missing = [0] * len(self.buckets)
        self.stream: torch.cuda.Stream | None = None
        self.hooks: list[Any] = []
        if self.buckets and parameters[0].is_cuda:
            self.listen()

    def listen(self) -> None:
        self.stream = torch.cuda.Stream(priority=-1)  # its sums take the first processors that are free
        self.marks = [torch.cuda.Event(external=True) for _ in self.buckets]
        self.hooks = [p.register_post_accumulate_grad_hook(self.mark) for p in self.number]

    def began(self) -> None:
        self.made = set()
        for number, bucket in enumerate(self.buckets if self.hooks else ()):
            looked_at = any(others(self, p) for p in bucket)  # by a hook that may come after ours
            self.missing[number] = 0 if looked_at else sum(p.requires_grad for p in bucket)

    def mark(self, parameter: Parameter) -> None:
        """Its gradient is made. One that comes twice, or when nobody waits for it, unmakes its bucket."""
        number = self.number[parameter]
        self.missing[number] -= 1
        if self.missing[number] == 0:
            self.marks[number].record()
            self.made.add(number)
        elif self.missing[number] < 0:
            self.made.discard(number)

    def add_up(self) -> None:
        """Gradients become the sums of all devices'. One that no device has stays none. Hooks that look at a
        gradient as it grows, see it grow by those of the others."""
        if not self.devices.talking:
            return
        flags = self.devices.gathered([p.grad is not None for p in self.number])
        grown = {p for p, *there in zip(self.number, *flags, strict=True) if any(there)}
        for parameter in grown:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with self.beside() as wait_for:
            for number, bucket in enumerate(self.buckets):
                wait_for(number)
                self.sum([p.grad for p in bucket if p in grown])
        self.made = set()
        for parameter in self.number:
            for hook in others(self, parameter) if parameter in grown else ():
                hook(parameter)

    @contextmanager
    def beside(self) -> Iterator[Callable[[int], None]]:
        """Within, what is queued waits for the buckets that it names, and what follows waits for it."""
        if not (own := self.stream):
            yield lambda number: None
            return
        backward = torch.cuda.current_stream()

        def wait_for(number: int) -> None:
            if number in self.made:
                own.wait_event(self.marks[number])
            else:
                own.wait_stream(backward)

        with torch.cuda.stream(own):
            yield wait_for
        backward.wait_stream(own)

    def sum(self, gradients: list[torch.Tensor]) -> None:
        """In an order that all devices have, however a gradient lies on one of them."""
        small = [g for g in gradients if g.nbytes < SMALL_BYTES]
        large = [g for g in gradients if g.nbytes >= SMALL_BYTES]
        sent = [g.contiguous() for g in large]
        if small:
            sent.append(torch.cat([g.flatten() for g in small]))
        if sent:
            self.devices.sum(*sent)
        for gradient, found in zip(large, sent, strict=False):
            if found is not gradient:
                gradient.copy_(found)
        if small:
            parts = sent[-1].split([g.numel() for g in small])
            torch._foreach_copy_(small, [p.view_as(g) for p, g in zip(parts, small, strict=True)])

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def others(reducer: Reducer, parameter: Parameter) -> list:
    """Hooks that are told of its gradient beside ours."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return [hook for hook in hooks if hook != reducer.mark]


def buckets(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    """Neighbours of one type."""
    bucket: list[Parameter] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if bucket and (held + size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket
