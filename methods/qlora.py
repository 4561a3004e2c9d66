"""QLoRA: LoRA on a base whose linear layers are held in 4-bit NormalFloat.

    y = dequantise(NF4(W)) x + (alpha / rank) B A x        blocks of 64 weights, their scales quantised again

Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.

Performance: the adapters learn around the rounding of the base, close to LoRA on the 16-bit model.
Efficiency: 0.52 bytes a weight of the linear layers in place of 2; embeddings stay as they were, and each
step pays for dequantising. The paper's paged optimizer, which moves moments to the host where the card is
full, is absent: the adapters' are small.
Generalisation: as LoRA's, from a base that has lost a little; its own 4-bit row shows how much.
"""

from dataclasses import dataclass

from harness.method import Unsupported
from methods.lora import LoRA

BLOCK = 64  # weights that share a scale


@dataclass
class QLoRA(LoRA):
    baseline = "base_nf4"
    needs = ("bitsandbytes",)
    cannot = {
        "merging": "the sum would be rounded to 4 bits again, to other outputs: keep the adapter beside",
        "sharding": "4-bit weights and their scales do not come apart in even parts",
    }

    def load(self, load_base):
        return load_nf4(load_base)

    def merge(self, model):
        raise Unsupported(self.cannot["merging"])


def load_nf4(load_base, skip=()):
    """The base model with its linear layers, but the head and those named in skip, in NF4 with double
    quantisation."""
    import bitsandbytes
    import torch
    from transformers import BitsAndBytesConfig

    # On AVX512 CPUs the first evaluation repacks the weights, and every later gradient is silently
    # wrong (bitsandbytes 0.50): keep to the path that is differentiable.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*skip, "lm_head"] if skip else None,  # a list leaves the head out no more
    )
    model = load_base(quantization_config=config)
    model.config.quantization_config.bnb_4bit_compute_dtype = model.dtype  # for who loads a saved copy
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = model.dtype
            if model.device.type == "cpu" and module.in_features % BLOCK:
                raise Unsupported(
                    f"bitsandbytes 0.50 dequantises {name} wrongly on a CPU: {module.in_features} inputs are "
                    f"no multiple of {BLOCK}. Use a GPU, or a method without 4-bit weights"
                )
    return model
