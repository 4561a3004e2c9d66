"""QLoRA + GaLore: the MLP frozen in 4 bits under adapters, the attention trained whole by GaLore.

    MLP:        y = dequantise(NF4(W)) x + (alpha / rank) B A x
    attention:  W' = W - lr * scale * AdamW(G V) V^T        V: top right singular vectors of G, or as U^T G

Proposed here, from Dettmers et al. 2023, arXiv:2305.14314, and Zhao et al. 2024, arXiv:2403.03507.

Performance: each method where it costs least: the projections of the attention, which decide what is read
from where, move without a limit on rank; the MLP, 89 % of Gemma 3 1B's linear weights, adapts at low rank.
Efficiency: Gemma 3 1B's weights, gradients and moments take 1.7 GiB by count; QLoRA takes 1.0, LoRA 2.0,
GaLore 10.4 (fp32 weights and gradients). The 4 bits pay for what is spent on the attention.
Generalisation: most knowledge is thought to lie in the MLP and stays frozen; but a trained attention can
not be taken off, and forgets more than adapters alone. An argument, which the measurement has to decide.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.method import Method, Natural, Positive, Unsupported, adam
from methods.galore import in_short, projected_adamw
from methods.lora import LoRA
from methods.qlora import QLoRA, load_nf4

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHTS = "attention.safetensors"  # beside the adapter that PEFT saves


@dataclass
class QLoRAGaLore(Method):
    """One learning rate for both: the attention's is lr * scale, a quarter of the adapters'. Embeddings,
    head and norms are frozen."""

    rank: Natural = 8  # of the MLP's adapters; lora's default
    alpha: Positive = 16.0  # their difference is scaled by alpha / rank; lora's default
    subspace: Natural = 128  # rank of the attention's projected gradients; galore's default
    gap: Natural = 200  # steps between two subspaces; galore's default
    scale: Positive = 0.25  # of the attention's update; galore's default

    axis = "parameterisation"
    learning_rates, tunes = QLoRA.learning_rates, QLoRA.tunes
    starts_at_base = False  # its attention is not rounded, as that of base_nf4 is
    needs = ("bitsandbytes",)
    hybrid = ("qlora", "galore")
    cannot, merge = QLoRA.cannot, QLoRA.merge

    def load(self, load_base):
        return load_nf4(load_base, skip=ATTENTION)

    def attach(self, model, run):
        from bitsandbytes.nn import Linear4bit

        mlp = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        attention = attention_weights(model)
        if not (mlp and attention):
            raise Unsupported(
                f"it needs attention layers named {', '.join(ATTENTION)} and linear layers beside them, "
                "as Gemma, Llama, Mistral and Qwen have them. Use qlora or galore"
            )
        model = LoRA(rank=self.rank, alpha=self.alpha, targets=",".join(sorted(mlp))).attach(model, run)
        for weight in attention.values():
            weight.requires_grad_(True)
        return model

    def optimizer(self, model, run):
        attention = list(attention_weights(model).values())
        chosen = set(attention)
        adapters = [p for p in model.parameters() if p.requires_grad and p not in chosen]
        projection = {"rank": self.subspace, "gap": self.gap, "scale": self.scale, "short": in_short(run)}
        groups = [{"params": adapters}, {"params": attention, **projection}]
        return projected_adamw()([{**g, "weight_decay": run.hp.weight_decay} for g in groups], **adam(run.hp))

    def renewed_every(self):
        return self.gap

    def save(self, model, folder: Path) -> None:
        from safetensors.torch import save_file

        model.save_pretrained(folder)
        # In the precision that the frozen weights have and autocast computes in: the same outputs.
        base = model.get_base_model()
        dtype, weights = base.get_input_embeddings().weight.dtype, attention_weights(base).items()
        save_file({name: w.detach().to(dtype).contiguous() for name, w in weights}, folder / WEIGHTS)

    def restore(self, load_base, folder: Path):
        from safetensors.torch import load_file

        model = super().restore(load_base, folder)
        model.get_base_model().load_state_dict(load_file(folder / WEIGHTS), strict=False)
        return model


def attention_weights(model) -> dict:
    """Name -> weight of each projection of the attention."""
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if n.endswith(ATTENTION)}
