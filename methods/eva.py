"""EVA: LoRA whose A starts at the main directions of what each layer is given by the training data.

    A: top right singular vectors of the layer's inputs; B = 0; ranks go where they explain most

Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv:2410.07170.

Performance: starts at the base model exactly, and learns at once in directions that the data uses.
Efficiency: LoRA's rank is the mean of all layers'; some forward passes over training batches at the start.
Generalisation: as LoRA's; the directions are those of this training data, and may fit other data less.
"""

from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Annotated

from harness.method import Range, Unsupported
from methods.lora import LoRA, adapted_layers

BATCHES = 100  # of training data at most; they are gone through until the directions settle
PASSES = 1000  # batches after which directions that still turn are given up


@dataclass
class EVA(LoRA):
    """By PEFT: an incremental PCA, which takes the mean of the inputs off. Of all tokens but padding; PEFT's
    default leaves prompts out where it is given labels."""

    cannot = {"packing": "its directions are those of inputs that attend to their own row alone"}

    rho: Annotated[float, Range(least=1)] = 2.0  # a layer's rank over `rank`, at most; PEFT's default

    def config(self, **more):
        from peft import EvaConfig

        return super().config(init_lora_weights="eva", eva_config=EvaConfig(rho=self.rho), **more)

    def attach(self, model, run):
        from peft import initialize_lora_eva_weights

        passes = count(1)

        def forward(model, inputs):  # through the decoder alone: logits are not needed
            if next(passes) > PASSES:
                raise Unsupported(f"EVA's directions still turn after {PASSES} batches: use lora or pissa")
            model.get_base_model().get_decoder()(**inputs, use_cache=False)

        model = super().attach(model, run)
        initialize_lora_eva_weights(model, self.inputs(run), forward_fn=forward, show_progress_bar=False)
        ranks = [layer.r["default"] for layer in adapted_layers(model).values()]
        run.note("layers with an adapter, and their ranks", f"{len(ranks)}: {min(ranks)} to {max(ranks)}")
        return model

    def inputs(self, run) -> list[dict]:
        """Rows of the first batch one by one, as PEFT compares all inputs of its first forward number by
        number; then whole batches. PEFT's randomised SVD needs twice as many tokens as directions."""
        parts = chain.from_iterable(map(run.micro_batches, run.batches))
        first, *rest = map(run.collate, islice(parts, BATCHES))
        wanted = ("input_ids", "attention_mask")
        made = [{key: first[key][i : i + 1] for key in wanted} for i in range(len(first["input_ids"]))]
        made += [{key: batch[key] for key in wanted} for batch in rest]
        enough = 2 * round(self.rho * self.rank)
        if not (large := [inputs for inputs in made if inputs["attention_mask"].sum() >= enough]):
            raise Unsupported(f"EVA needs batches of {enough} tokens: raise hp.batch_size or lower the rank")
        return large
