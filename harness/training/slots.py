"""The cache that a decoder writes its answers with: slots, each at a place of its own."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from harness.training.slot_attention import Unfit, attend

NAME = "tuneoff_slots"  # of the attention while tokens are decoded


@dataclass
class State:
    """What all layers of a cache share, so that they need not know it: memory that no cycle holds is free at
    once, and is not charged to whoever allocates next."""

    length: int  # places of a slot
    place: torch.Tensor  # (S,): of the token of each slot that is read next
    every: torch.Tensor  # (S,): 0, 1, ...
    seen: int  # places that are looked at; all of them, where the host knows no fewer
    reading: tuple[torch.Tensor, torch.Tensor] | None = None  # prompts: to these slots, of these rows


class Slots(Cache):
    """Keys and values of `count` texts of at most `length` tokens each, for every decoder layer.

    While `filling`, prompts are read by the model's own attention, padded on the right. Then each forward has
    one token a slot, at its `place`: a slot sees what the model's own masks let a token of that place see;
    what stands behind it (padding, an earlier text) is never seen.
    """

    def __init__(self, config, count: int, length: int, device):
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        self.state = State(length, zeros, torch.arange(count, device=device), length)
        self.own, self.bounded = config._attn_implementation, False
        super().__init__(layers=[Layer(self.state) for _ in range(config.num_hidden_layers)])

    @contextmanager
    def filling(self, slots: torch.Tensor, rows: torch.Tensor):
        """Within, forwards read prompts: what they compute of rows[i] goes to slots[i]."""
        self.state.reading = slots, rows
        try:
            yield
        finally:
            self.state.reading = None

    @contextmanager
    def decoding(self, configs):
        """Within, the models of these configs attend to slots."""
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, self.mask)
        for config in configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config in configs:
                config._attn_implementation = self.own
            del AttentionMaskInterface._global_mapping[NAME]  # it holds this cache

    def mask(self, mask_function, kv_length, use_vmap=False, **_):
        """As transformers' mask functions, of one kind of layer. -> (S, 1, 1, kv_length) booleans; where
        attention is `bounded`, (S, 2), the first place that is seen and the one after the last."""
        if use_vmap:
            raise Unfit("its masks are more than places")
        state = self.state
        slots, own = state.every[:, None, None, None], state.place[:, None, None, None]
        places = torch.arange(kv_length, device=own.device)[None, None, None]
        seen = mask_function(slots, 0, own, places).expand(len(slots), 1, 1, -1)
        if not self.bounded:
            return seen
        return torch.stack([seen[:, 0, 0].byte().argmax(-1), state.place + 1], 1).int()

    def keep(self, slots: torch.Tensor) -> None:
        """These alone, in this order."""
        self.state.place, self.state.every = self.state.place[slots], self.state.every[: len(slots)]
        for layer in self.held:
            layer.keys, layer.values = layer.keys[slots], layer.values[slots]

    @property
    def held(self) -> list["Layer"]:
        """Those with keys, once prompts are read: a layer that attends to another's has none."""
        return [layer for layer in self.layers if layer.is_initialized]


class Layer(CacheLayerMixin):
    """One decoder layer's keys (S, key heads, length, D) and values."""

    is_sliding = False  # a window is a mask here

    def __init__(self, state: State):
        super().__init__()
        self.state = state

    def lazy_initialization(self, key_states, value_states):
        count, computed = len(self.state.place), computed_in(value_states)
        self.keys, self.values = (  # zeros, as what is masked must still be a number
            x.new_zeros(count, x.shape[1], self.state.length, x.shape[3], dtype=computed)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states, value_states, *_, **__):
        """Writes what a forward computed. -> what its tokens are to look at: keys, values"""
        state = self.state
        if state.reading is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            to, rows = state.reading
            self.keys[to, :, : key_states.shape[2]] = key_states[rows].to(self.keys.dtype)
            self.values[to, :, : key_states.shape[2]] = value_states[rows].to(self.values.dtype)
            return key_states, value_states
        self.keys[state.every, :, state.place] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[state.every, :, state.place] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : state.seen], self.values[:, :, : state.seen]

    def get_seq_length(self) -> int:
        return 0 if self.state.reading is not None else 1  # that there is a past; how long, each slot knows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.state.reading is not None else self.state.seen), 0

    def get_max_length(self) -> int:
        return self.state.length


def computed_in(of) -> torch.dtype:
    """The type that products with a tensor, or of a model, have here."""
    device = of.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else of.dtype


def slot_bytes(model, length: int) -> int:
    """Keys and values of one text of so many tokens; those that layers share count for each."""
    config, values = model.config.get_text_config(), 0
    for layer in config.per_layer_config:  # heads may differ
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        values += 2 * heads * size * length
    return values * computed_in(model).itemsize
