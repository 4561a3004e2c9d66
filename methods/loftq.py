"""LoftQ: QLoRA whose 4-bit base and adapters start together as near to the base model as they can.

    min ||W - Q - s B A||_F        s = alpha / rank; in turns:
    Q = NF4(W - s B A)             s B A = truncation of W - Q to the rank

Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv:2310.08659.

Performance: starts nearer to the base model than QLoRA; the gain is small at 4 bits, and grows with the rank.
Efficiency: trains as QLoRA does; only the start holds the base in 16 bits once more, and decomposes every
matrix five times, by orthogonal iteration: at most 0.1 % above the SVD's error. What is saved holds its
4-bit base, as that is no longer the one of the base model alone.
Generalisation: as QLoRA's; the adapters can not be taken off without loss, they hold part of the base.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.method import Natural
from methods.galore import bounded, top_singular_vectors
from methods.lora import adapted_layers, check_rank
from methods.qlora import QLoRA, load_nf4

BASE = "base"  # folder of the 4-bit base, beside the adapter
TOGETHER = 2**25  # weights that are decomposed at once, 128 MiB in fp32; a few such are held for it


@dataclass
class LoftQ(QLoRA):
    """PEFT's loftq fits B A and forgets s, so that it is right for alpha = rank alone; here s B A is
    fitted. Q is NF4 with double quantisation, as QLoRA's; the authors' scales are not quantised again."""

    iterations: Natural = 5  # of quantising and truncating; the paper's. 0 would be qlora

    starts_at_base = False  # but nearer to the model than the 4-bit one is

    def attach(self, model, run):
        """With the base model beside it: reading that is no part of the training, but it is there."""
        import torch

        originals = run.load_base()
        model = super().attach(model, run)
        check_rank(model, self.rank)
        squares = torch.zeros(3, device=run.device)
        layers = {n: m for n, m in adapted_layers(model).items() if hasattr(m.weight, "quant_state")}
        for part in bounded(
            layers.items(), TOGETHER, lambda item: item[1].in_features * item[1].out_features
        ):
            weights = []
            for name, _ in part:
                original = originals.get_submodule(name)
                weights.append(original.weight.detach().float())
                original.weight = None  # freed as soon as it is used
            squares += self.start([layer for _, layer in part], weights)
        before, after = (squares[:2] / squares[2]).sqrt().tolist()
        run.note("relative error of the 4-bit weights, ||W - Q|| / ||W|| with plain NF4", before)
        run.note("relative error of the start, ||W - Q - s B A|| / ||W||", after)
        return model

    def start(self, layers, weights):
        """Puts Q, A and B into layers. -> (3,): squares of errors before, of those after, of the weights."""
        import torch

        differences, errors = [torch.zeros(()).to(weight) for weight in weights], []
        for _ in range(self.iterations):
            residuals = []
            for layer, weight, difference in zip(layers, weights, differences, strict=True):
                base = layer.base_layer
                base.weight = quantise(weight - difference, base.weight)
                residuals.append(weight - dequantise(base.weight))
            factors = truncate(residuals, self.rank)
            differences = [left @ right for left, right in factors]
            left_over = torch._foreach_sub(residuals, differences)
            errors += [torch.stack(torch._foreach_norm(tensors)) for tensors in (residuals, left_over)]
        for layer, (left, right) in zip(layers, factors, strict=True):
            put(layer, left, right)
        sizes = torch.stack(torch._foreach_norm(weights))
        return torch.stack([norms.square().sum() for norms in (errors[0], errors[-1], sizes)])

    def save(self, model, folder: Path) -> None:
        """The adapter and the base that it fits, as any user loads them: to find Q again would take the
        original base and minutes, and another device's rounding could find another Q."""
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(folder, save_embedding_layers=False)  # the base that is saved has them
        base, layers = model.get_base_model(), adapted_layers(model)
        try:
            for name, layer in layers.items():
                base.set_submodule(name, layer.base_layer)
            base.save_pretrained(folder / BASE)
        finally:
            for name, layer in layers.items():
                base.set_submodule(name, layer)

    def restore(self, load_base, folder: Path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = load_nf4(lambda **_: AutoModelForCausalLM.from_pretrained(folder / BASE, use_safetensors=True))
        return PeftModel.from_pretrained(base, folder).eval()


def quantise(weight, like):
    """-> a 4-bit parameter with the settings, and in the layer, of another one."""
    from bitsandbytes.nn import Params4bit

    settings = {**vars(like), "quant_state": None, "bnb_quantized": False}
    return Params4bit(weight.to(like.quant_state.dtype), requires_grad=False, **settings).to(weight.device)


def dequantise(weight):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def truncate(matrices, rank) -> list[tuple]:
    """-> (m, rank), (rank, n) of each: their product is the best approximation of that rank, and each holds
    the square roots of the singular values."""
    factors = []
    for matrix, basis in zip(matrices, top_singular_vectors(matrices, rank), strict=True):
        tall = matrix.shape[0] >= matrix.shape[1]
        strong = matrix @ basis if tall else matrix.T @ basis  # singular vectors times singular values
        roots = strong.norm(dim=0).clamp(min=1e-30).sqrt()
        pair = strong / roots, roots * basis
        left, right = pair if tall else pair[::-1]
        factors.append((left.contiguous(), right.T.contiguous()))
    return factors


def put(layer, left, right) -> None:
    """Makes left @ right what the adapter of a layer adds to its weight."""
    scaling = layer.scaling["default"]
    layer.lora_A["default"].weight.data = right / scaling**0.5
    layer.lora_B["default"].weight.data = left / scaling**0.5
