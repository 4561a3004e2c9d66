"""The cache that a decoder writes its answers with: slots, each at a place of its own."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from harness.training.attention import Unfit, attend

NAME = "tuneoff_slots"  # of the attention while tokens are decoded


class Slots(Cache):
    """Keys and values of `count` texts of at most `length` tokens each, for every decoder layer.

    While `filling`, prompts are read by the model's own attention, padded on the right. Then each forward has
    one token a slot, at `place` (count,): a slot sees what the model's own masks let a token of that place
    see, and what stands behind it (padding, an earlier text) is never seen.
    """

    def __init__(self, config, count: int, length: int, device):
        self.place = torch.zeros(count, dtype=torch.long, device=device)
        self.every = torch.arange(count, device=device)
        self.seen = length  # places that are looked at: a host that knows better sets fewer
        self.reading: tuple[torch.Tensor, torch.Tensor] | None = None  # slots, and the row that each is given
        self.length, self.own, self.bounded = length, config._attn_implementation, False
        super().__init__(layers=[Layer(self) for _ in range(config.num_hidden_layers)])

    @contextmanager
    def filling(self, slots: torch.Tensor, rows: torch.Tensor):
        """Within, forwards read prompts: what they compute of rows[i] goes to slots[i]."""
        self.reading = slots, rows
        try:
            yield
        finally:
            self.reading = None

    @contextmanager
    def decoding(self, config):
        """Within, the model of this config attends to slots."""
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, self.mask)
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = self.own
            del AttentionMaskInterface._global_mapping[NAME]  # it holds this cache

    def mask(self, mask_function, kv_length, use_vmap=False, **_):
        """As transformers' mask functions, of one kind of layer. -> (count, 1, 1, kv_length) booleans; where
        attention is `bounded`, (count, 2), the first place that is seen and the one after the last."""
        if use_vmap:
            raise Unfit("its masks are more than places")
        places = torch.arange(kv_length, device=self.place.device)
        slots, own = self.every[:, None, None, None], self.place[:, None, None, None]
        seen = mask_function(slots, 0, own, places[None, None, None]).expand(len(slots), 1, 1, -1)
        if not self.bounded:
            return seen
        return torch.stack([seen[:, 0, 0].byte().argmax(-1), self.place + 1], 1).int()

    def keep(self, slots: torch.Tensor) -> None:
        """These alone, in this order."""
        self.place, self.every = self.place[slots], self.every[: len(slots)]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[slots], layer.values[slots]


class Layer(CacheLayerMixin):
    """One decoder layer's keys (count, key heads, length, D) and values."""

    is_sliding = False  # a window is a mask here

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states, value_states):
        device, count = key_states.device.type, len(self.slots.place)
        computed = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value_states.dtype
        )
        self.keys, self.values = (  # zeros, as what is masked must still be a number
            x.new_zeros(count, x.shape[1], self.slots.length, x.shape[3], dtype=computed)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states, value_states, *_, **__):
        """Writes what a forward computed. -> what its tokens are to look at: keys, values"""
        slots = self.slots
        if slots.reading is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            to, rows = slots.reading
            self.keys[to, :, : key_states.shape[2]] = key_states[rows].to(self.keys.dtype)
            self.values[to, :, : key_states.shape[2]] = value_states[rows].to(self.values.dtype)
            return key_states, value_states
        self.keys[slots.every, :, slots.place] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[slots.every, :, slots.place] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : slots.seen], self.values[:, :, : slots.seen]

    def get_seq_length(self) -> int:
        return (
            0 if self.slots.reading is not None else 1
        )  # that there is a past; its length is each slot's own

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.slots.reading is not None else self.slots.seen), 0

    def get_max_length(self) -> int:
        return self.slots.length

    get_max_cache_shape = get_max_length  # its name before transformers 5.20
