"""rsLoRA: LoRA scaled by the root of its rank, so that a higher rank learns as strongly as a low one.

    y = W x + (alpha / sqrt(rank)) B A x

Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732.

Performance: LoRA's at rank 1; with higher ranks gradients do not fade, so that the rank can pay.
Efficiency: LoRA's.
Generalisation: LoRA's; at one alpha and learning rate its steps are sqrt(rank) times as large, and may
forget more.
"""

from dataclasses import dataclass

from methods.lora import LoRA


@dataclass
class RsLoRA(LoRA):
    def config(self, **more):
        return super().config(use_rslora=True, **more)
