"""SMT: AdamW on those square blocks of the weight matrices whose gradients are largest.

    s(block) = mean |sum_t G_t|        over its entries; G_t: gradient of warm-up step t
    W' = W + M * (AdamW's change)      M: 1 on the n blocks of the highest s, else 0

He et al. 2024, Sparse Matrix in Large Language Model Fine-tuning, arXiv:2405.15525.

Performance: trains where the task's gradients are large, which its authors found in the value projections;
they report it above LoRA, and without its plateau as more is trained.
Efficiency: gradients and moments of the blocks alone, and only the inputs that meet them are kept. The
warm-up costs up to 100 steps that update nothing, and memory for the sums of the gradients: on the device, or
where they are more than the model itself, on the host.
Generalisation: all other weights stay as they were, bit for bit; a small set of places can still move far.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from math import gcd
from typing import Annotated, Literal

from harness.method import Count, Method, Natural, Range

FILE = "blocks.safetensors"
LARGEST = 256  # the authors' side of a block


@dataclass
class SMT(Method):
    """Otherwise than in the authors' code, the warm-up does not move the weights, and `share` is of the
    decoder's linear layers alone: theirs counts the embedding and the head too."""

    share: Annotated[float, Range(above=0, most=1)] = 0.0084  # of the decoder's linear weights; the authors'
    warmup: Natural = 100  # steps whose gradients choose the blocks; the authors' default
    targets: str = "q_proj,k_proj,v_proj"  # names of layers, or all-linear; the authors' default
    block: Count = 0  # side, in weights; 0: the largest up to 256 that tiles every target
    score: Literal["abs_mean", "mean_abs"] = "abs_mean"  # mean |sum G|: the paper's; |mean sum G|: the code's

    axis = "parameterisation"
    learning_rates = (1e-5, 1e-4)  # the paper's 1e-5, and the 1e-4 that its code says can improve on it
    tunes = ("share", (0.02, 0.05))  # it claims no plateau as more is trained
    cannot = {
        "4-bit base": "trained blocks are written into the weights, which 4-bit codes cannot hold",
        "sharding": "its blocks are written into whole weights, of which each device would hold a part",
    }

    def attach(self, model, run):
        import torch

        linear = decoder_linears(model)
        targets = self.targeted(linear)
        side = self.side(targets)
        count = max(1, int(self.share * sum(m.weight.numel() for m in linear.values()) / side**2))
        sums = self.gradient_sums(model, targets, run)
        chosen = top_blocks({name: self.scores(total, side).cpu() for name, total in sums.items()}, count)
        put(model, {name: torch.tensor(places) for name, places in chosen.items()}, side)
        self.describe(targets, chosen, side, run)
        return model

    def targeted(self, linear: dict) -> dict:
        """The layers that may have blocks, by name."""
        if self.targets == "all-linear":
            return linear
        wanted = {target.strip() for target in self.targets.split(",")}
        if unknown := wanted - {last(name) for name in linear}:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"targets: the decoder has no linear layer named {names}")
        return {name: module for name, module in linear.items() if last(name) in wanted}

    def side(self, targets: dict) -> int:
        """Of a block. Raises ValueError for one that does not tile every target."""
        common = gcd(*(length for module in targets.values() for length in module.weight.shape))
        if not self.block:
            return max(side for side in range(1, min(common, LARGEST) + 1) if common % side == 0)
        for name, module in targets.items():
            rows, columns = module.weight.shape
            if rows % self.block or columns % self.block:
                raise ValueError(
                    f"block: {self.block} does not tile {name}, which is {rows} x {columns}; "
                    f"{common} and its divisors tile every target"
                )
        return self.block

    def gradient_sums(self, model, targets: dict, run) -> dict:
        """Name -> the sum of a target's gradients over the warm-up, at the weights of the base, in fp32.

        On the device, where they take no more than the model itself, so that no step waits for a copy: the
        activations and moments of a training take more. Else in host memory, as the authors have them.
        """
        import torch

        def take(total, weight):
            total += weight.grad.to(total)
            weight.grad = None

        needed = 4 * sum(module.weight.numel() for module in targets.values())
        fits = needed <= sum(p.numel() * p.element_size() for p in model.parameters())
        model.requires_grad_(False)
        sums, hooks = {}, []
        for name, module in targets.items():
            where = module.weight.device if fits else "cpu"
            sums[name] = torch.zeros(module.weight.shape, device=where)
            weight = module.weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(take, sums[name])))
        steps = [*islice(run.batches, self.warmup)]
        for examples in sorted(steps, key=longest, reverse=True):  # shorter ones fit into its memory
            run.accumulate(model, self.prepare(model, examples, run))
        for hook in hooks:
            hook.remove()
        run.devices.sum(*sums.values())
        model.requires_grad_(False)
        run.note("warm-up, steps of gradients before the training", min(self.warmup, run.steps))
        return sums

    def scores(self, total, side: int):
        """(rows, columns) of blocks, from the summed gradient of a weight."""
        blocks = tiles(total, side)
        return blocks.abs().mean((2, 3)) if self.score == "abs_mean" else blocks.mean((2, 3)).abs()

    def describe(self, targets: dict, chosen: dict, side: int, run) -> None:
        spread = dict.fromkeys(map(last, targets), 0)
        for name, places in chosen.items():
            spread[last(name)] += len(places)
        run.note("side of a block, in weights", side)
        run.note("trained blocks", sum(spread.values()))
        run.note("trained blocks by layer", ", ".join(f"{name} {n}" for name, n in spread.items()))

    def optimizer(self, model, run):
        """AdamW over the blocks. The weights take them over after each step, not at every forward."""
        optimizer = super().optimizer(model, run)
        layers = sparse_layers(model).values()
        optimizer.register_step_post_hook(lambda *_: write(layers))
        return optimizer

    def restore_state(self, state, model, run):
        write(sparse_layers(model).values())

    def save(self, model, folder):
        """The blocks as the model computes with them, and their places, as (row, column) of blocks."""
        from safetensors.torch import save_file

        tensors = {}
        for name, layer in sparse_layers(model).items():
            tensors[f"{name}.blocks"], tensors[f"{name}.places"] = layer.read(), layer.places
        save_file(tensors, folder / FILE)

    def restore(self, load_base, folder):
        import torch
        from safetensors.torch import load_file

        model, tensors = self.load(load_base).requires_grad_(False), load_file(folder / FILE)
        names = sorted({key.rpartition(".")[0] for key in tensors})
        side = tensors[f"{names[0]}.blocks"].shape[-1]
        layers = put(model, {name: tensors[f"{name}.places"] for name in names}, side)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.blocks.copy_(tensors[f"{name}.blocks"])
        write(layers.values())
        return model.eval()

    def merge(self, model):
        """The weights hold their blocks already."""
        from torch import nn

        for name, layer in sparse_layers(model).items():
            rows, columns = layer.weight.shape
            plain = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(name, plain)
        return model


def decoder_linears(model) -> dict:
    """Name -> linear layer, without the head."""
    from torch import nn

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def last(name: str) -> str:
    return name.rpartition(".")[2]


def longest(examples: list) -> int:
    return max(example.length for example in examples)


def tiles(weight, side: int):
    """(rows, columns, side, side): a view of a weight as blocks."""
    return weight.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)


def top_blocks(scores: dict, count: int) -> dict[str, list[tuple[int, int]]]:
    """Name -> (row, column) of its blocks among the `count` highest scores of all matrices together."""
    import torch

    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(min(count, len(flat))).indices] = True
    masks = mask.split([score.numel() for score in scores.values()])
    chosen = {}
    for (name, score), own in zip(scores.items(), masks, strict=True):
        if own.any():
            chosen[name] = [tuple(place) for place in own.view(score.shape).nonzero().tolist()]
    return chosen


def sparse_layers(model) -> dict:
    return {name: m for name, m in model.named_modules() if isinstance(m, sparse_linear())}


def put(model, places: dict, side: int) -> dict:
    """Trained blocks into the layers of these names; places: (n, 2), row and column of each. -> the layers.

    Layers of the same last name get room for as many blocks and columns as the one with most: one program
    computes all of them."""
    ordered, room = {}, {}
    for name, own in places.items():
        ordered[name] = own[(own[:, 1] * (own[:, 0].max() + 1) + own[:, 0]).argsort()]  # by column, then row
        found = len(own), len(own[:, 1].unique())
        room[last(name)] = tuple(map(max, found, room.get(last(name), found)))
    layers = {}
    for name, own in ordered.items():
        layers[name] = sparse_linear()(model.get_submodule(name), own, side, *room[last(name)])
        model.set_submodule(name, layers[name])
    model.get_decoder().register_forward_pre_hook(open_all)
    return layers


def open_all(decoder, args) -> None:
    """Before a forward, and outside of what is compiled: layers differ in how many blocks they have."""
    for layer in sparse_layers(decoder).values():
        layer.open()


def write(layers) -> None:
    """The blocks into the weights that the layers compute with."""
    import torch

    with torch.no_grad():
        for layer in layers:
            tiles(layer.weight, layer.side)[layer.places.unbind(1)] = layer.blocks.to(layer.weight.dtype)


@cache
def sparse_linear():
    """The layer's class. Made here because a method's file is read before torch is needed."""
    import torch
    from torch import nn
    from torch.nn.functional import linear, pad

    class SparseLinear(nn.Module):
        """A frozen linear layer with some trained blocks, which `write` puts into its weight. Its forward
        computes with the weight alone; the gradients of the blocks come by way of `slots`, as many as the
        layer has room for, which `open` makes before each forward of the decoder."""

        def __init__(self, plain: nn.Linear, places, side: int, blocks: int, columns: int):
            super().__init__()
            self.weight, self.bias, self.side = plain.weight, plain.bias, side
            used, kept = places[:, 1].unique(return_inverse=True)
            self.whole = columns * side == plain.in_features
            if self.whole:
                used, kept = torch.arange(columns), places[:, 1]
            for name, values, size in (
                ("used", used, columns),  # columns of blocks whose inputs are kept
                ("kept", kept, blocks),  # of each block, its column among those
                ("rows", places[:, 0], blocks),  # and its row in the weight
            ):  # a block that is not there is as good as the first; its gradient is dropped
                values = pad(values, (0, size - len(values))).to(plain.weight.device)
                self.register_buffer(name, values, persistent=False)
            self.register_buffer("places", places.to(plain.weight.device), persistent=False)
            self.blocks = nn.Parameter(self.read())
            self.slots = None

        def open(self):
            self.slots = (
                None  # with which the gradients' way of the last forward, and its stream, would live on
            )
            self.slots = Slots.apply(self.blocks, len(self.rows))

        def __getstate__(self):
            return {**vars(self), "slots": None}  # a copy is not part of the forward at hand

        def read(self):
            """(n, side, side): the blocks as they lie in the weight."""
            return tiles(self.weight.detach(), self.side)[self.places.unbind(1)]

        def forward(self, x):
            if not torch.is_grad_enabled():
                return linear(x, self.weight, self.bias)
            # Autocast does not reach into a Function's backward: the types are made equal before it.
            device, dtype = x.device.type, self.weight.dtype
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            bias = None if self.bias is None else self.bias.to(dtype)
            used = None if self.whole else self.used
            return BlockLinear.apply(
                x.to(dtype), self.slots, self.weight.to(dtype), bias, used, self.kept, self.rows
            )

    class Slots(torch.autograd.Function):
        """Zeros that take no memory, for the gradients that they are given: the first are the blocks'."""

        @staticmethod
        def forward(ctx, blocks, room):
            ctx.count = len(blocks)
            return blocks.new_zeros(()).expand(room, *blocks.shape[1:])

        @staticmethod
        def backward(ctx, grad):
            return grad[: ctx.count].clone(), None

    class BlockLinear(torch.autograd.Function):
        """y = W x + b, which keeps of x what meets a trained block, and gives the blocks their gradients."""

        @staticmethod
        def forward(ctx, x, slots, weight, bias, used, kept, rows):
            if used is not None:
                inputs = x.unflatten(-1, (-1, slots.shape[-1]))[..., used, :].flatten(-2)
            ctx.save_for_backward(x if used is None else inputs, weight, kept, rows)
            ctx.side, ctx.dtype = slots.shape[-1], slots.dtype
            return linear(x, weight, bias)

        @staticmethod
        def backward(ctx, grad):
            inputs, weight, kept, rows = ctx.saved_tensors

            def of(values, blocks):  # (N, width) -> (n, N, side), those of each block
                return values.reshape(-1, values.shape[-1] // ctx.side, ctx.side)[:, blocks].transpose(0, 1)

            blocks = torch.bmm(of(grad, rows).mT, of(inputs, kept)).to(ctx.dtype)
            return grad @ weight if ctx.needs_input_grad[0] else None, blocks, *[None] * 5

    return SparseLinear
