"""QLoRA + ORPO: preference learning with adapters on a 4-bit base.

    y = dequantise(NF4(W)) x + (alpha / rank) B A x,  trained on ORPO's loss

Dettmers et al. 2023, arXiv:2305.14314, with Hong et al. 2024, arXiv:2403.07691.

Performance: ORPO needs no second model, and its adapters learn around the rounding as QLoRA's do, so little
should be lost against ORPO on the 16-bit base.
Efficiency: ORPO reads two answers a row, so activations, not weights, grow; the 4-bit base frees the room
for them. Each step pays for dequantising twice as many tokens.
Generalisation: as ORPO's, from a base that has lost a little; the weak penalty keeps it near that base.
"""

from dataclasses import dataclass

from methods.orpo import ORPO
from methods.qlora import QLoRA


@dataclass
class QLoRAORPO(QLoRA, ORPO):
    hybrid = ("qlora", "orpo")
    cannot = {**QLoRA.cannot, **ORPO.cannot}
