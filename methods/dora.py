"""DoRA: LoRA that trains the length of each weight row apart from its direction.

    W' = m * (W + s B A) / ||W + s B A||        per output row; m starts at ||W||, the norm has no gradient

Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.

Performance: learns length and direction apart, as full fine-tuning does; often LoRA's quality at half the
rank.
Efficiency: as many trained parameters as LoRA and one a row, but more activations and a slower step.
Generalisation: like LoRA's, the base stays frozen and can be restored.
"""

from dataclasses import dataclass

from methods.lora import LoRA


@dataclass
class DoRA(LoRA):
    def config(self, **more):
        return super().config(use_dora=True, **more)
