"""torch.compile with what it makes kept between runs, and without two faults of the code that it writes."""

from contextlib import ExitStack, contextmanager

import torch

GRADED = {
    "autograd_cache_allow_custom_autograd_functions": True,  # the adapters' own are in the cache's key
}
GENERATED = {
    # Leaves a part of some gradients unwritten from torch 2.10 on: github.com/pytorch/pytorch/issues/193061
    "triton.mix_order_reduction": False,
}
KEPT = {"cache_key_tag": "read back behind a barrier"}  # apart from what was compiled without


@contextmanager
def compiling(**dynamo):
    """Within, functions that torch.compile has wrapped may be called, with these settings of dynamo. Kernels
    wait for all of their threads before they read back what they have stored.

    Else a loop over a reduced dimension may read what another warp has yet to write, as it does with some of
    the block sizes that are tried for the fastest: github.com/pytorch/pytorch/issues/190517
    """
    from torch._inductor.codegen.triton import TritonKernel  # takes seconds, where nothing is compiled too

    load = TritonKernel.load

    def behind_barrier(kernel, name, index):
        if name in kernel.cse.invalidated_stores:
            kernel.body.writeline("tl.debug_barrier()")
        return load(kernel, name, index)

    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(dynamo))
        stack.enter_context(torch._functorch.config.patch(GRADED))
        stack.enter_context(torch._inductor.config.patch(GENERATED))
        stack.enter_context(torch.compiler.config.patch(KEPT))
        TritonKernel.load = behind_barrier
        stack.callback(setattr, TritonKernel, "load", load)
        yield
