"""DoRA + LoftQ: DoRA on a 4-bit base, both started together as near to the base model as they can.

    W' = m * (Q + s B A) / ||Q + s B A||        per output row; Q, A, B: LoftQ's; m starts at the norm

Proposed here, from Liu et al. 2024, arXiv:2402.09353, and Li et al. 2023, arXiv:2310.08659.

Performance: LoftQ takes away part of the rounding that DoRA would have to learn around; what DoRA adds to
LoRA stays.
Efficiency: the weights of QLoRA and the slower step of DoRA, which reads every 4-bit matrix once more for the
lengths of its rows.
Generalisation: as LoftQ's; the adapters hold part of the base and can not be taken off without loss.
"""

from dataclasses import dataclass

from methods.dora import DoRA, closed_form
from methods.loftq import LoftQ
from methods.lora import adapted_layers


@dataclass
class DoRALoftQ(LoftQ, DoRA):
    hybrid = ("dora", "loftq")

    def attach(self, model, run):
        """The lengths of the rows were taken before LoftQ changed them: they are taken again."""
        model = closed_form(super().attach(model, run))
        for layer in adapted_layers(model).values():
            own = layer.lora_magnitude_vector["default"]
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            own.weight.data = own.lengths(layer.get_base_layer(), b, a, layer.scaling["default"])
        return model

    def restore(self, load_base, folder):
        return closed_form(super().restore(load_base, folder)).eval()
