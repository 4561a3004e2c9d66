"""LoRA: a trained low-rank difference beside every frozen linear layer.

    y = W x + (alpha / rank) B A x        A: rank x in, random; B: out x rank, zero; W frozen

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

Performance: starts at the base model exactly; on all linear layers it reaches full fine-tuning on most
instruction data, at about ten times its learning rate.
Efficiency: gradients and moments only for the adapters, under 1 % of the weights; the base stays in 16 bits.
Generalisation: a low-rank change forgets less of the base than full fine-tuning, and can be taken off again.
"""

from dataclasses import dataclass

from harness.method import Fraction, Method, Natural, Positive


@dataclass
class LoRA(Method):
    rank: Natural = 8  # of the difference; the paper finds 4 to 8 enough
    alpha: Positive = 16.0  # the difference is scaled by alpha / rank: 2, a common choice
    dropout: Fraction = 0.0  # share of the adapters' inputs left out while training
    targets: str = "all-linear"  # or names of layers with commas between: q_proj,v_proj

    axis = "parameterisation"
    learning_rates = (1e-4, 1e-3)  # ten times full fine-tuning's (LoRA Without Regret, 2025); QLoRA's is 2e-4
    tunes = ("rank", (4, 16, 64))  # bounds what it can express; the paper tries 1 to 64

    def attach(self, model, run):
        from peft import get_peft_model

        names = {name.rpartition(".")[2] for name, _ in model.named_modules()} | {"all-linear"}
        if unknown := [target for target in self.target_names() if target not in names]:
            raise ValueError(f"targets: this model has no layer named {', '.join(unknown)}")
        return get_peft_model(model, self.config())

    def target_names(self) -> list[str]:
        return [target.strip() for target in self.targets.split(",")]

    def config(self, **more):
        """The adapter's configuration for PEFT; a variant adds to it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.targets == "all-linear" else self.target_names(),
            task_type="CAUSAL_LM",
            **more,
        )


def adapted_layers(model) -> dict:
    """Name in the base model -> PEFT's layer, of those with an adapter."""
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def check_rank(model, rank: int) -> None:
    """Refuses a rank for which a layer has too few singular vectors to start at."""
    for name, layer in adapted_layers(model).items():
        if rank > (most := min(layer.in_features, layer.out_features)):
            raise ValueError(f"rank: {name} has only {most} singular vectors, not {rank}")


def dense(layer):
    """The weight of a linear layer, dequantised where it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)


def by_rows(layer):
    """The same as (rows of outputs, inputs), which GPT-2's layers hold the other way round."""
    return dense(layer).T if type(layer).__name__ == "Conv1D" else dense(layer)


def row_squares(left, right):
    """(..., m): squared lengths of the rows of left @ right, from factors as thin as an adapter."""
    return (left @ (right @ right.mT) * left).sum(-1).clamp(min=0)


def changed_squares(squares, product, b, a, scaling):
    """(..., m): squared lengths of the rows of W + s B A, from those of W and its product W A^T, (..., m, r):
    the square of a sum, without a matrix of the size of W."""
    cross = (b * product).sum(-1)
    return (squares + 2 * scaling * cross + scaling**2 * row_squares(b, a)).clamp(min=0)


def own_squares(layer):
    """(m,): squared lengths of the rows of a linear layer's weight, in fp32 or better."""
    import torch

    weight = by_rows(layer)
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()


def product_with(layer, a):
    """(m, r): W A^T, multiplied in the type of W, in the type of A. Of 4 bits nothing dequantised is left:
    a compiled layer would keep it for its backward."""
    if state := getattr(layer.weight, "quant_state", None):
        from bitsandbytes import matmul_4bit

        return matmul_4bit(a.to(state.dtype), layer.weight, state).T.to(a.dtype)
    weight = by_rows(layer)
    return (weight @ a.T.to(weight.dtype)).to(a.dtype)
