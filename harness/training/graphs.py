"""CUDA graphs, for training steps and for decoding."""

from contextlib import contextmanager, suppress

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool):
    """What is launched within is captured, its memory from a pool (torch.cuda.graph_pool_handle). A capture
    that fails would leave torch on its stream, allocating into the pool and drawing for it: all is put
    back."""
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    draws = torch.cuda.default_generators[device]
    state = draws.clone_state()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # where the capture's end came so far
            torch._C._cuda_endAllocateToPool(device, pool)
        draws.graphsafe_set_state(state)
        raise
