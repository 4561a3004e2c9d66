"""The base model without values: of so many layers, and in 4 bits where a method asks for it."""

import copy
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from harness.training.dry.world import CARD


def shallow(config, depth: int):
    """With fewer layers."""
    config = copy.deepcopy(config)
    text, layers = config.get_text_config(), config.get_text_config().num_hidden_layers
    if depth == layers:
        return config
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:  # as the kind of each layer
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


def drawn(config, dtype, quantization_config=None, plain=lambda model: None, **_):
    """The base model, as it would be loaded. `plain(model)`: is told of it before it is quantised."""
    from transformers.initialization import no_init_weights

    with _disable_current_modes(), no_init_weights():  # it is tied before it is loaded
        with torch.device(CARD):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.tie_weights()
        plain(model)
        return model if quantization_config is None else quantised(model, quantization_config, dtype)


def quantised(model, config, dtype):
    """As transformers replaces linear layers by bitsandbytes' of 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.config.quantization_config = quantizer.quantization_config
    quantizer.preprocess_model(model=model, device_map={"": CARD}, dtype=dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            own = module.weight
            plain = torch.empty(module.out_features, module.in_features, dtype=dtype, device=CARD)
            settings = {
                n: getattr(own, n)
                for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            }
            module.weight = Params4bit(plain, requires_grad=False, module=module, **settings)._quantize(CARD)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = quantizer
    return model


@contextmanager
def params4bit():
    """Within, a 4-bit weight is quantised when it is moved to the card. What bitsandbytes keeps of that is of
    this card alone."""
    try:
        from bitsandbytes.functional import name2qmap
        from bitsandbytes.nn import Params4bit
    except ImportError:
        yield
        return
    own = Params4bit.to

    def to(self, *args, **kwargs):
        if not self.bnb_quantized and any(str(a) == "meta" for a in (*args, *kwargs.values())):
            return self._quantize(CARD)
        return own(self, *args, **kwargs)

    def copied(self, memo):
        settings = {**vars(self), "quant_state": self.quant_state}
        return Params4bit(self.data.clone(), self.requires_grad, **settings)

    with patch.multiple(Params4bit, to=to, __deepcopy__=copied), patch.dict(name2qmap, clear=True):
        yield
