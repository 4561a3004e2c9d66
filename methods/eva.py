"""EVA: LoRA whose A starts at the main directions of what each layer is given by the training data.

    A: top right singular vectors of the layer's inputs; B = 0; ranks go where they explain most

Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv:2410.07170.

Performance: starts at the base model exactly, and learns at once in directions that the data uses.
Efficiency: LoRA's rank is the mean of all layers'; some forward passes over training batches at the start.
Generalisation: as LoRA's; the directions are those of this training data, and may fit other data less.
"""

from dataclasses import dataclass
from typing import Annotated

from harness.method import Range, Unsupported
from methods.galore import FLOOR, OUTSIDE, columns, orthonormal
from methods.lora import LoRA, adapted_layers

TOKENS = 2**16  # of training data, in whole batches: 57 for each input of a layer of Gemma 3 1B, 9 in its MLP


@dataclass
class EVA(LoRA):
    """The incremental PCA is our own, as PEFT's takes one layer's SVD after the other until none turns; both
    take the mean of the inputs off. Of all tokens but padding; PEFT's default leaves prompts out where it is
    given labels."""

    cannot = {"packing": "its directions are those of inputs that attend to their own row alone"}

    rho: Annotated[float, Range(least=1)] = 2.0  # a layer's rank over `rank`, at most; PEFT's default

    def config(self, **more):
        from peft import EvaConfig

        return super().config(init_lora_weights="eva", eva_config=EvaConfig(rho=self.rho), **more)

    def attach(self, model, run):
        from peft import initialize_lora_eva_weights

        model = super().attach(model, run)
        start = self.start(model, self.inputs(run))
        initialize_lora_eva_weights(model, eva_state_dict=start)
        ranks = [layer.r["default"] for layer in adapted_layers(model).values()]
        run.note("layers with an adapter, and their ranks", f"{len(ranks)}: {min(ranks)} to {max(ranks)}")
        return model

    def inputs(self, run) -> list[dict]:
        """The first rows of the training, up to TOKENS; of several devices each reads all of them."""
        made, tokens, size = [], 0, run.hp.micro_batch_size
        for examples in (step[i : i + size] for step in run.batches for i in range(0, len(step), size)):
            batch = run.collate(examples)
            made.append({key: batch[key] for key in ("input_ids", "attention_mask")})
            tokens += sum(example.length for example in examples)
            if tokens >= TOKENS:
                break
        if tokens < (enough := 2 * self.most):
            raise Unsupported(f"EVA needs {enough} tokens of training data, not {tokens}: lower the rank")
        return made

    @property
    def most(self) -> int:
        """The rank that a layer can have."""
        return round(self.rho * self.rank)

    def start(self, model, batches) -> dict:
        """Name of a layer -> its A, (rank, in): of all layers' directions those that explain most, as many
        as the layers have ranks together."""
        import torch

        found = principal_inputs(model, batches, self.most)
        shares = torch.cat([shares for _, shares in found.values()]).cpu()
        layers = [name for name, (_, shares) in found.items() for _ in shares]
        kept = shares.argsort(descending=True, stable=True)[: self.rank * len(found)].tolist()
        ranks = dict.fromkeys(found, 0)
        for place in kept:
            ranks[layers[place]] += 1
        return {name: found[name][0][:rank] for name, rank in ranks.items()}


def principal_inputs(model, batches, most: int) -> dict:
    """Name of an adapted layer -> the main directions of its inputs, (most, in), and the share of the
    variance in each, (most,), falling. Layers that are given the same tensor are computed once."""
    import torch

    layers = {f"base_model.model.{name}": layer for name, layer in adapted_layers(model).items()}
    spreads: dict = {}
    last = mask = None  # what the layer before was given, and its spread

    def read(name):
        def hook(layer, args):
            nonlocal last
            if last and last[0] is args[0]:
                spreads[name] = last[1]
                return
            spread = spreads.get(name) or Spread(layer.in_features, columns(most), args[0].device)
            spread.add(args[0].flatten(0, -2).float(), mask)
            spreads[name] = spread
            last = args[0], spread

        return hook

    hooks = [layer.register_forward_pre_hook(read(name)) for name, layer in layers.items()]
    training = model.training
    try:
        with torch.no_grad(), model.disable_adapter():
            for batch in batches:
                mask = batch["attention_mask"].flatten().bool()
                model.eval().get_base_model().get_decoder()(**batch, use_cache=False)
                last = None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    directions = {spread: spread.directions(most) for spread in dict.fromkeys(spreads.values())}
    return {name: directions[spreads[name]] for name in layers if name in spreads}


class Spread:
    """An incremental PCA: the mean of vectors, their squares about it, and their covariance in the space of
    a few columns, which turn with each batch."""

    def __init__(self, size: int, width: int, device):
        import torch

        draw = torch.Generator().manual_seed(0)
        start = torch.randn(size, min(size, width), generator=draw, dtype=torch.float64)
        self.block = orthonormal(start.to(device))
        self.core = self.block.new_zeros(self.block.shape[1], self.block.shape[1])
        self.mean, self.squares, self.count = self.block.new_zeros(size), 0.0, 0.0

    def add(self, vectors, mask) -> None:
        """(T, size) in fp32, those of them where the mask (T,) holds. Nobody waits for the device."""
        count = mask.sum().double()
        mean = (vectors * mask[:, None]).sum(0) / count
        centred = (vectors - mean) * mask[:, None]
        moved = (mean - self.mean) * (self.count * count / (self.count + count)) ** 0.5
        self.squares = self.squares + centred.square().sum().double() + moved.square().sum()
        block, core = self.block, self.core

        def covariance(columns):
            """Of all vectors so far, times their number, times (size, k)."""
            new = (centred.T @ (centred @ columns.float())).double()
            return block @ (core @ (block.T @ columns)) + new + moved[:, None] * (moved @ columns)

        for _ in range(OUTSIDE):
            self.block = orthonormal(covariance(self.block) + FLOOR * self.squares * self.block)
        self.core = self.block.T @ covariance(self.block)
        self.count = self.count + count
        self.mean = self.mean + (mean - self.mean) * (count / self.count)

    def directions(self, most: int):
        """-> (most, size) orthonormal rows, and their shares of the squares."""
        import torch

        values, vectors = torch.linalg.eigh(self.core)
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
        return (self.block @ vectors).T.float(), (values / self.squares).float()
