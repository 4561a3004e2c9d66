"""Attention over rows that lie one behind another, each by itself: no mask, no padding between. And a repair
of the one that transformers has."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import repeat_kv

NAME = "tuneoff"
BLOCK = 32  # queries that torch's memory-efficient attention takes at a time, or twice as many


def repeated(keys: torch.Tensor, times: int) -> torch.Tensor:
    """(B, key heads, T, d) -> (B, key heads * times, T, d), as transformers' repeat_kv, but copied where that
    gives one head again and again and the last block of T queries has one: torch misreads its mask on a GPU
    (pytorch#191937), so that an answer to such a prompt began with a wrong token."""
    found, length = repeat_kv(keys, times), keys.shape[2]
    # A compiled program would be another one for such lengths.
    misread = keys.shape[1] == 1 and (torch.compiler.is_compiling() or length % BLOCK == 1)
    return found.contiguous() if misread else found


sdpa_attention.repeat_kv = repeated


def rows_apart(
    module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, sliding_window=None,
    cu_seq_lens_q=None, max_length_q=None, softcap=None, s_aux=None, **_,
):  # fmt: skip
    """(B, heads, T, d) and (B, key-value heads, T, d) -> (B, T, heads, d), by flash attention.

    `cu_seq_lens_q` (rows + 1,) and `max_length_q` say where the rows of the B * T tokens lie, and how long
    they are at most. Raises TypeError for what flash attention does not do.
    """
    if attention_mask is not None or dropout or softcap or s_aux is not None:
        raise TypeError("flash attention knows no mask, dropout, softcap or sinks")
    device, (batch, heads, length, size) = query.device.type, query.shape
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    windowed = sliding_window and sliding_window < max_length_q
    before = sliding_window - 1 if windowed else -1
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, 0.0, True, False,
        scale=scaling, window_size_left=before, window_size_right=0 if windowed else -1,
    )  # fmt: skip
    return output.view(batch, length, heads, size), None


AttentionInterface.register(NAME, rows_apart)  # for which transformers builds no masks


@contextmanager
def flash(causal):
    """Within, the model's attention is this one."""
    configs = {
        id(c): c for c in (causal.config, causal.config.get_text_config(), causal.get_decoder().config)
    }
    own = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = own[key]
