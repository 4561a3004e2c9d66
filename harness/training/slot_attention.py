"""Attention of one new token a slot to the keys and values of its slot.

The query heads that share a key head are rows of one product: no key is repeated for them.
"""

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's builds for a GPU
    triton = None

BLOCK = 32  # keys at a time: so that two programs of heads of 256 values fit a processor's memory
ROWS = 16  # query heads of a key head at most: the fewest rows that a matrix unit multiplies


class Unfit(Exception):
    """Why the engine cannot decode a model."""


def attend(
    module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **more
):
    """As transformers' attention functions. query: (S, heads, 1, D); key, value: (S, key heads, L, D).
    attention_mask: (S, 1, 1, L) booleans of the keys that each slot sees; or (S, 2), the first of them and
    the one behind the last, and no other is even read. -> (S, 1, heads, D), None"""
    unknown = [k for k, v in more.items() if isinstance(v, torch.Tensor) and not k.endswith("position_ids")]
    if unknown or query.shape[2] != 1:
        raise Unfit(
            f"its attention is given {', '.join(unknown) or 'several tokens'}, which is not known here"
        )
    heads, groups = query.shape[1], key.shape[1]
    query = query.to(key.dtype).view(len(query), groups, heads // groups, -1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask.ndim == 2:
        out = live(query, key, value, attention_mask, scaling, softcap or 0.0)
    elif softcap:
        scores = (query @ key.mT).float() * scaling
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~attention_mask, -torch.inf)
        out = scores.softmax(-1).to(value.dtype) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(query), 1, heads, -1), None


def fits(query_heads: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `live` computes such heads; keys, values: (S, key heads, L, D)."""
    groups, width = keys.shape[1], keys.shape[3]
    power = width & (width - 1) == 0 and 16 <= width <= 256
    return triton is not None and power and keys.shape == values.shape and query_heads <= ROWS * groups


@torch.library.custom_op("tuneoff::live", mutates_args=())
def live(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor,
    scaling: float, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """(S, key heads, query heads of each, D), twice (S, key heads, L, D), (S, 2) -> as query."""
    slots, groups, heads, width = query.shape
    query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    _live[(slots, groups)](
        query, key, value, bounds, out, scaling, softcap, key.stride(0), key.stride(1),
        HEADS=heads, WIDTH=width, CAPPED=softcap > 0, ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@live.register_fake
def _(query, key, value, bounds, scaling, softcap):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


if triton is not None:

    @triton.jit
    def _live(
        query, key, value, bounds, out, scaling, softcap, slot_stride, head_stride,
        HEADS: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a slot and key head: softmax of its scores, block by block."""
        slot, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)
        own = ((slot * tl.num_programs(1) + group) * HEADS + rows) * WIDTH + columns[None, :]
        q = tl.load(query + own, mask=rows < HEADS, other=0.0)  # (ROWS, WIDTH)
        first, end = tl.load(bounds + 2 * slot), tl.load(bounds + 2 * slot + 1)
        start = slot * slot_stride + group * head_stride
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        found = tl.zeros((ROWS, WIDTH), tl.float32)
        for begin in range(first, end, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            seen = places < end
            where = start + places[:, None] * WIDTH + columns[None, :]
            k = tl.load(key + where, mask=seen[:, None], other=0.0)  # (BLOCK, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            if CAPPED:
                scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))  # tanh
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            weights, kept = tl.exp(scores - higher[:, None]), tl.exp(best - higher)
            v = tl.load(value + where, mask=seen[:, None], other=0.0)
            found = found * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total, best = total * kept + tl.sum(weights, 1), higher
        tl.store(out + own, (found / total[:, None]).to(out.dtype.element_ty), mask=rows < HEADS)
