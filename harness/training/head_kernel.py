"""Log-probabilities of labels, and the slopes in place of the logits: a pass to sum up, a pass to replace."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's builds for a GPU
    triton = None

BLOCK = 8192  # logits at a time
WARPS = 8  # of a program: 32 logits a thread


def serves(device: str) -> bool:
    return device == "cuda" and triton is not None


def log_probabilities(logits, labels, softcap: float | None = None, weights=None, replace: bool = True):
    """(N, V), (N,) -> (N,) in fp32: log-probabilities of the labels, 0 at -100. With `replace`, logits become
    the slopes of their row's log-probability, times its weight (N,); 0 at -100."""
    rows, columns = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    weighted = weights is not None
    _log_probabilities[(rows,)](
        logits, labels, weights if weighted else logits, found, columns, logits.stride(0), softcap or 0.0,
        CAPPED=bool(softcap), WEIGHTED=weighted, REPLACE=replace, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return found


if triton is not None:

    @triton.jit
    def _log_probabilities(
        logits, labels, weights, found, columns, stride, softcap,
        CAPPED: tl.constexpr, WEIGHTED: tl.constexpr, REPLACE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row."""
        row = tl.program_id(0).to(tl.int64)
        own, label = logits + row * stride, tl.load(labels + row)
        chosen = tl.load(own + tl.maximum(label, 0)).to(tl.float32)  # before any thread replaces it
        best, total = float("-inf"), 0.0
        for begin in range(0, columns, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            x = tl.load(own + places, mask=places < columns, other=float("-inf")).to(tl.float32)
            if CAPPED:
                x = tl.where(places < columns, softcap * (1 - 2 / (1 + tl.exp(2 * x / softcap))), x)  # tanh
            higher = tl.maximum(best, tl.max(x, 0))
            total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), 0)
            best = higher
        whole = best + tl.log(total)
        if CAPPED:
            chosen = softcap * (1 - 2 / (1 + tl.exp(2 * chosen / softcap)))
        tl.store(found + row, tl.where(label >= 0, chosen - whole, 0.0))
        if REPLACE:
            weight = 1.0
            if WEIGHTED:
                weight = tl.load(weights + row).to(tl.float32)
            weight = tl.where(label >= 0, weight, 0.0)
            for begin in range(0, columns, BLOCK):
                places = begin + tl.arange(0, BLOCK)
                x = tl.load(own + places, mask=places < columns, other=0.0).to(tl.float32)
                bend = 1.0
                if CAPPED:
                    x = softcap * (1 - 2 / (1 + tl.exp(2 * x / softcap)))
                    bend = 1 - (x / softcap) * (x / softcap)
                slope = (tl.where(places == label, 1.0, 0.0) - tl.exp(x - whole)) * bend * weight
                tl.store(own + places, slope.to(logits.dtype.element_ty), mask=places < columns)
