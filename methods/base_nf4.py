"""Base, 4 bits: the untouched model with its linear layers in 4-bit NormalFloat.

    y = dequantise(NF4(W)) x

Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.

Performance: the base less what rounding to 4 bits takes; shows how much of a gain is the adapter's.
Efficiency: costs nothing to train.
Generalisation: that of the base, with small losses.
"""

from methods.base import Base
from methods.qlora import load_nf4


class BaseNF4(Base):
    needs = ("bitsandbytes",)

    def load(self, load_base):
        return load_nf4(load_base)
