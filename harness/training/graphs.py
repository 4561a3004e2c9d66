"""CUDA graphs, for training steps and for decoding."""

from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch


@cache
def aside() -> torch.cuda.Stream:
    """Where all graphs are tried and captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        workspaces()
    return stream


def workspaces() -> None:
    """Has cuBLAS take its memory now. It takes some for each stream, here and in the thread of backwards, at
    the first product there, and keeps it: within a step that is of a block of hundreds of MiB, which stays
    reserved with it."""
    if torch.cuda.is_available():
        with torch.inference_mode(False), torch.enable_grad():  # a decoder may be the first to ask
            one = torch.ones(1, 1, device="cuda", requires_grad=True)
            (one @ one).square().backward()  # whose thread has a context by the time of its product


def recorded(
    step: Callable[[], Any],
    pool,
    forget: Callable[[], object] | None = None,
    warm_up: Callable[[], object] | None = None,
) -> tuple[torch.cuda.CUDAGraph, Any, int]:
    """A step as a graph, its memory from a pool (torch.cuda.graph_pool_handle). It is run once before, or its
    `warm_up`, on a stream of its own: that compiles, and makes what libraries make once. -> the graph; what
    the step gave, whose tensors each replay writes anew; if there is a way to `forget` the peak so far, the
    bytes that a replay holds beside what is there already."""
    side = aside()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (warm_up or step)()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if forget:
        forget()
    before, graph = torch.cuda.memory_allocated(), torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        found = step()
    return graph, found, torch.cuda.max_memory_allocated() - before if forget else 0


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool):
    """What is launched within is captured. A capture that fails would leave torch on its stream, allocating
    into the pool and drawing for it: all is put back."""
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    draws = torch.cuda.default_generators[device]
    state = draws.clone_state()
    # Of several devices, a thread of NCCL's asks the card meanwhile.
    errors = "thread_local" if torch.distributed.is_initialized() else "global"
    try:
        with torch.cuda.graph(graph, pool=pool, stream=aside(), capture_error_mode=errors):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # where the capture's end came so far
            torch._C._cuda_endAllocateToPool(device, pool)
        draws.graphsafe_set_state(state)
        raise
