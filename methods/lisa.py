"""LISA: AdamW on the embedding, the head and a few layers, which are drawn anew every `period` steps.

    A: a few of the decoder's layers, uniformly drawn; embedding, head and final norm besides
    W' = W - lr * (m / (sqrt(v) + eps) + wd * W)        for W in A; all others stay

Pan et al. 2024, LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning, arXiv:2403.17919.

Performance: every layer has its turn, at full rank; its authors find it above LoRA and near or above full
fine-tuning. A training of few periods never reaches some layers.
Efficiency: gradients and moments of the drawn layers alone; those of embedding and head stay, which is much
with a large vocabulary. All weights are held in fp32, frozen ones too, as any may be drawn.
Generalisation: most layers stand still at a time, but in a long training all of them move, so it can forget
as full fine-tuning does.
"""

from dataclasses import dataclass

from harness.method import Method, Natural, Unsupported


@dataclass
class LISA(Method):
    """As in LMFlow, the authors' code, what is outside the layers always trains, the final norm included.
    Otherwise than there (its callback of 2024 leaves the optimizer alone), moments of a layer that leaves are
    dropped, and it starts anew when drawn again: kept, those of all layers would be held in the end."""

    layers: Natural = 2  # of the decoder, trained at a time; LMFlow's default
    period: Natural = 20  # steps between two draws; LMFlow's default

    axis = "optimizer"
    cannot = {"sharding": "layers that are drawn later would have to be divided anew"}
    tunes = ("layers", (4, 8))  # twice and four times the default: as many more turns for each layer

    def optimizer(self, model, run):
        layers = getattr(model.get_decoder(), "layers", None)
        if layers is None:
            raise Unsupported("this architecture does not call its list of layers `layers`: use full")
        optimizer = super().optimizer(model, run)
        self.done = 0

        def after_step(*_) -> None:
            self.done += 1
            if self.done % self.period == 0 and self.done < run.steps:  # else the last period's is measured
                self.draw(layers, run.rng)
                for parameter in model.parameters():
                    if not parameter.requires_grad:
                        optimizer.state.pop(parameter, None)

        self.draw(layers, run.rng)
        optimizer.register_step_post_hook(after_step)
        active = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.note("parameters trained at a time", active)
        return optimizer

    def renewed_every(self):
        return self.period

    def draw(self, layers, rng) -> None:
        import torch

        self.train_only(layers, torch.randperm(len(layers), generator=rng)[: self.layers].tolist())

    def train_only(self, layers, drawn: list[int]) -> None:
        self.drawn = drawn
        for i, layer in enumerate(layers):
            layer.requires_grad_(i in drawn)

    def state(self):
        return {"done": self.done, "drawn": self.drawn}

    def restore_state(self, state, model, run):
        self.done = state["done"]
        self.train_only(model.get_decoder().layers, state["drawn"])
