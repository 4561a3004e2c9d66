"""DoRA: LoRA that trains the length of each weight row apart from its direction.

    W' = m * (W + s B A) / ||W + s B A||        per output row; m starts at ||W||, the norm has no gradient

Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.

Performance: learns length and direction apart, as full fine-tuning does; often LoRA's quality at half the
rank.
Efficiency: as many trained parameters as LoRA and one a row, more activations, and a little time for the
lengths, which are summed from W A^T and never from W + s B A itself.
Generalisation: like LoRA's, the base stays frozen and can be restored.
"""

from dataclasses import dataclass
from functools import cache

from methods.lora import LoRA, adapted_layers, changed_squares, own_squares, product_with


@dataclass
class DoRA(LoRA):
    """PEFT's adapter, whose forward forms W + s B A for its lengths, in bf16 under autocast: here they are
    ||W||^2 + 2 s B . (W A^T) + s^2 ||B A||^2, row by row, in fp32."""

    def config(self, **more):
        return super().config(use_dora=True, **more)

    def attach(self, model, run):
        return closed_form(super().attach(model, run))

    def restore(self, load_base, folder):
        return closed_form(super().restore(load_base, folder)).eval()


def closed_form(model):
    """-> the model with its lengths computed so, and those of W measured as it is now."""
    from peft.tuners.lora.dora import DoraLinearLayer

    for layer in adapted_layers(model).values():
        own = layer.lora_magnitude_vector["default"]
        if isinstance(own, DoraLinearLayer):  # an embedding's is PEFT's
            layer.lora_magnitude_vector["default"] = magnitude()(own, layer.get_base_layer())
    return model


@cache
def magnitude():
    """The class of what PEFT adds to a layer; made here, as plans are read where torch is not installed."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    class Magnitude(DoraLinearLayer):
        def __init__(self, own, base):
            super().__init__(own.fan_in_fan_out)
            self.weight = own.weight
            self.register_buffer("squares", own_squares(base), persistent=False)

        def forward(
            self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"
        ):
            """-> what is added to W x + b: s B A x, and m / ||W + s B A|| - 1 times W x + s B A x.

            base_result: W x + b; None where x is not the layer's own input, but with values dropped."""
            scale = self.weight / self.lengths(base_layer, lora_B.weight, lora_A.weight, scaling)
            change = lora_B(lora_A(x)) * scaling
            turned = base_layer(x) if base_result is None else base_result
            if base_layer.bias is not None:
                turned = turned - base_layer.bias
            turned = turned + change
            return torch.addcmul(change, turned, (scale - 1).to(turned.dtype))

        def lengths(self, base, b, a, scaling):
            """(m,): of the rows of W + s B A, in fp32; a constant to the gradient (section 4.3)."""
            with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
                return changed_squares(self.squares, product_with(base, a), b, a, scaling).sqrt()

    return Magnitude
