"""Compiled kernels that read back what they have stored wait for it."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen import triton as generator

from harness.training.compiling import compiling

STORED = re.compile(r"tl\.store\((\w+) \+")
LOADED = re.compile(r"tl\.load\((\w+) \+")


def test_what_a_kernel_stored_is_loaded_behind_a_barrier(monkeypatch):
    own, lines = generator.TritonKernel.load, []
    monkeypatch.setattr(generator.TritonKernel, "load", lambda kernel, name, index: lines.append(name))
    outside = generator.TritonKernel.load
    kernel = SimpleNamespace(
        cse=SimpleNamespace(invalidated_stores={"stored"}), body=SimpleNamespace(writeline=lines.append)
    )
    with compiling(recompile_limit=3):
        assert torch._dynamo.config.recompile_limit == 3
        for name in ("given", "stored"):
            generator.TritonKernel.load(kernel, name, 0)
    assert lines == ["given", "tl.debug_barrier()", "stored"]
    assert generator.TritonKernel.load is outside is not own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize("size", [256, 1152, 3000])
def test_of_a_norm_and_a_rotation(size):
    """The backward of a query's norm and rotation, where gradients were wrong by 1e6."""
    from torch._inductor.utils import run_and_get_code

    def backward(grad, cos, sin, weight, x):
        half, sines = size // 2, grad * sin
        turned = grad * cos + torch.cat((sines[..., half:], -sines[..., :half]), -1)
        turned, x = turned.float() * (1 + weight), x.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        shared = (turned * x).sum(-1, keepdim=True) * inverse.pow(3) / size
        return turned.float(), (turned * inverse - shared * x).bfloat16()

    draw = torch.Generator("cuda").manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    given = new(4096, 4, size), new(4096, 1, size), new(4096, 1, size), new(size).float(), new(4096, 4, size)
    with compiling(), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        found, codes = run_and_get_code(torch.compile(backward), *given)
    for a, b in zip(found, backward(*given), strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()  # of bf16, rounded at other places
    for kernel in "".join(codes).split("@triton.jit")[1:]:
        stored, waits = set(), True
        for line in kernel.splitlines():
            waits = waits or "tl.debug_barrier()" in line
            if name := STORED.search(line):
                stored.add(name[1])
                waits = False
            if (name := LOADED.search(line)) and name[1] in stored:
                assert waits, kernel
