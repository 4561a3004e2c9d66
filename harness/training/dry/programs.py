"""Compiled layers on a card that is not there: what torch's partitioner keeps for backward. Each kind of
layer is traced once."""

from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from harness.training.compiling import GRADED
from harness.training.dry.fused import Steps
from harness.training.dry.ledger import told
from harness.training.dry.world import CARD, Autocast, aten


class Partitioned(Exception):
    """Both graphs are there: nothing is to be run."""


class Programs:
    known: dict[tuple, "Program"] = {}  # of this process: many methods have the same layers

    def __init__(self, ledger) -> None:
        self.ledger = ledger  # of the run that they are computed in

    def of(self, layer, checkpointed: bool):
        """A forward in the place of the layer's own."""
        own = type(layer).forward.__get__(layer)

        def forward(*args, **kwargs):
            if not torch.is_grad_enabled():
                return own(*args, **kwargs)
            spots = list(places(layer))
            leaves, tree = tree_flatten((args, kwargs))
            given = [leaf for leaf in leaves if torch.is_tensor(leaf)]
            lifted = [box[key] for box, key in spots]
            key = (
                kind(layer),
                Autocast.now[-1],
                tree,
                *((told(x), x.requires_grad) if torch.is_tensor(x) else x for x in (*leaves, *lifted)),
            )
            if key not in self.known:
                self.known[key] = Program(own, leaves, tree, spots)
            program = self.known[key]
            outputs = Replay.apply(program, self.ledger, checkpointed, *given, *lifted)
            return tree_unflatten(list(outputs), program.made)

        return forward


# What layers differ in and hold as much: attention without a mask takes no more for a window.
ALIKE = ("layer_idx", "place", "training", "is_sliding", "sliding_window", "layer_type", "attention_type")


def kind(layer) -> tuple:
    """What tells layers of a model apart, but for the shapes of their tensors."""
    own: list[tuple] = []
    for name, module in layer.named_modules():
        own.append((name, type(module), *map(told_of, hooks(module))))
        own += [
            (name, key, value)
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str)) and key not in ALIKE
        ]
    return tuple(own)


def hooks(module) -> list:
    """What computes in the place of the module's class, or beside it."""
    beside = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [*beside, *filter(None, [vars(module).get("forward")])]


def told_of(function) -> tuple[str, str]:
    """A function is told by where it is written."""
    while isinstance(function, partial):
        function = function.func
    of = function if hasattr(function, "__qualname__") else type(function)
    return of.__module__, of.__qualname__


def places(layer):
    """Where its tensors lie: (a dict or list, key)."""
    groups = []
    for module in layer.modules():
        for box in (module._parameters, module._buffers, vars(module)):
            for key, value in list(box.items()):
                if torch.is_tensor(value):
                    yield box, key
                state = getattr(value, "quant_state", None) if torch.is_tensor(value) else None
                while state is not None:
                    yield from (
                        (vars(state), name) for name, x in list(vars(state).items()) if torch.is_tensor(x)
                    )
                    state = state.state2
        group = vars(module).get("group")
        if group is not None and group not in groups:
            groups.append(group)
            yield from ((vars(group), name) for name in ("both", "a", "b"))
            yield from ((group.factors, i) for i in range(len(group.factors)))


@contextmanager
def swapped(spots: list):
    """-> what puts other tensors there, for as long as this lasts: a backward reads them, too."""
    before = [box[key] for box, key in spots]

    def put(tensors) -> None:
        for (box, key), tensor, own in zip(spots, tensors, before, strict=True):
            box[key] = tensor
            if hasattr(own, "quant_state") and tensor is not own:  # of 4 bits
                tensor.quant_state = own.quant_state

    try:
        yield put
    finally:
        put(before)


@cache
def decompositions() -> dict:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def without_copies(graph) -> None:
    """As inductor does before it divides a graph: what is then made twice of the same is made once."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten.alias.default):
            source = node.args[0]
            if told(source.meta["val"]) == told(node.meta["val"]):
                node.replace_all_uses_with(source)
                graph.erase_node(node)


class Program:
    """Forward and backward of a layer as kernels that each make some buffers."""

    def __init__(self, forward, leaves: list, tree, spots: list):
        where = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        given = [leaves[i] for i in where] + [box[key] for box, key in spots]

        def flat(*tensors):
            filled = list(leaves)
            for i, tensor in zip(where, tensors, strict=False):
                filled[i] = tensor
            args, kwargs = tree_unflatten(filled, tree)
            put(tensors[len(where) :])
            found, self.made = tree_flatten(forward(*args, **kwargs))
            return found

        graphs: list[Any] = []

        def partition(joint, inputs, **settings):
            without_copies(joint.graph)
            graphs[:] = min_cut_rematerialization_partition(joint, inputs, **settings)
            raise Partitioned

        def unused(graph, inputs):
            raise Partitioned

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with swapped(spots) as put, _disable_current_modes(), torch._functorch.config.patch(GRADED):
            apart = [fake.from_tensor(plain(x)).requires_grad_(x.requires_grad) for x in given]
            compiling = patch.object(torch.compiler, "_is_compiling_flag", True)  # as bitsandbytes asks
            with compiling, suppress(Partitioned):
                aot_function(flat, unused, unused, partition, decompositions=decompositions())(*apart)
        self.forward, self.backward = map(Steps, graphs)
        self.needs = [x.requires_grad for x in given]


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, program, ledger, checkpointed, *given):
        steps = program.forward
        held = steps.run(dict(zip(steps.inputs, given, strict=False)), ledger)
        count = program.made.num_leaves
        outputs = tuple(torch.empty_strided(s.size(), s.stride(), dtype=s.dtype, device=CARD)
                        for s in steps.shapes[:count])  # fmt: skip
        names = program.backward.inputs
        own = dict(zip(steps.inputs, given, strict=False))
        ctx.saved = {name: own.get(at, held.get(at)) for name in names if (at := steps.lies.get(name, name))}
        ctx.given, ctx.program, ctx.again = (given if checkpointed else ()), program, checkpointed
        ctx.ledger = ledger
        if checkpointed:
            ctx.saved = {}
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        program, held = ctx.program, ctx.saved
        ctx.saved = {}
        if ctx.again:
            steps = program.forward
            before = steps.run(dict(zip(steps.inputs, ctx.given, strict=False)), ctx.ledger)
            held = {name: before.get(steps.lies.get(name, name)) for name in program.backward.inputs}
            del before
        tangents = program.backward.inputs[-len(grads) :]
        held |= dict(zip(tangents, grads, strict=True))
        del grads
        steps = program.backward
        found = steps.run(held, ctx.ledger)
        made: list[torch.Tensor | None] = []
        for name, shape, needs in zip(steps.results, steps.shapes, program.needs, strict=False):
            if not needs or shape is None:
                made.append(None)
                continue
            found.pop(name, None)
            made.append(torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device=CARD))
        return None, None, None, *made


def plain(tensor) -> torch.Tensor:
    """The same on `meta`, of no class of its own."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CARD)
