"""PiSSA: LoRA that trains the principal directions of each weight, and freezes what is left of it.

    y = (W - s B0 A0) x + s B A x        s = alpha / rank; s B0 A0: truncated SVD of W, the start

Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv:2404.02948.

Performance: large gradients from the first step on, as the adapters hold the strongest directions; often
converges faster than LoRA.
Efficiency: LoRA's, and a decomposition of every weight at the start. Saved, its adapter has twice the rank.
Generalisation: moves the directions that matter most to the base, so it may forget more than LoRA.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from methods.galore import bounded
from methods.loftq import TOGETHER, put, truncate
from methods.lora import LoRA, adapted_layers, check_rank

START = "start"  # name of the adapter as it was before training


@dataclass
class PiSSA(LoRA):
    """The SVD by orthogonal iteration, whose error is at most 0.1 % above the exact one's; the authors
    recommend a randomised one. In bf16 what is left of W is rounded: the start is the base as far as bf16
    goes."""

    learning_rates = (2e-5, 2e-4)  # from the authors' 2e-5 on: its factors begin large
    cannot = {"4-bit base": "what is left of a weight would be rounded again: loftq starts a 4-bit base so"}

    def attach(self, model, run):
        model = super().attach(model, run)
        check_rank(model, self.rank)
        layers = adapted_layers(model).values()
        for part in bounded(layers, TOGETHER, lambda layer: layer.in_features * layer.out_features):
            self.start(part)
        self.folder = TemporaryDirectory()  # removed with the method
        model.save_pretrained(Path(self.folder.name) / START)
        return model

    def start(self, layers) -> None:
        from peft.utils.other import transpose

        bases = [layer.get_base_layer().weight for layer in layers]
        weights = [
            transpose(base.detach().float(), layer.fan_in_fan_out)
            for base, layer in zip(bases, layers, strict=True)
        ]
        for layer, base, weight, factors in zip(
            layers, bases, weights, truncate(weights, self.rank), strict=True
        ):
            put(layer, *factors)
            base.data = transpose((weight - factors[0] @ factors[1]).to(base.dtype), layer.fan_in_fan_out)

    def keep(self, model, run):
        """Converted before it is scored: W and what is left of it are rounded otherwise."""
        with TemporaryDirectory() as folder:
            self.save(model, Path(folder))
            self.folder = None
            return self.restore(run.load_base, Path(folder))

    def save(self, model, folder: Path) -> None:
        """As B A - B0 A0, a plain LoRA of twice the rank on the untouched base: no loader has to find the
        same SVD again."""
        start = self.folder and str(Path(self.folder.name) / START)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
