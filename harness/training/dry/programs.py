"""Compiled layers on a card that is not there: what torch's partitioner keeps for backward, and what fused
kernels leave in memory. Each kind of layer is traced once."""

from collections import defaultdict
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from harness.training.compiling import GRADED
from harness.training.dry.ledger import told
from harness.training.dry.world import CARD
from harness.work import VIEWS, Work

# What a compiler does not fuse: products, attention, and what other libraries bring.
EXTERN = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "attention",
    "_fused",
    "cumsum",
    "sort",
    "topk",
    "index_put",
)


class Traced(Exception):
    """Both graphs are there: nothing is to be run."""


class Programs:
    def __init__(self) -> None:
        self.known: dict[tuple, Program] = {}
        self.ledger: Any = None  # of the run that they are computed in

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
    own = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str)) and key not in ALIKE
    ]
    return type(layer), *own


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
            graphs[:] = min_cut_rematerialization_partition(joint, inputs, **settings)
            raise Traced

        def unused(graph, inputs):
            raise Traced

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with swapped(spots) as put, _disable_current_modes(), torch._functorch.config.patch(GRADED):
            apart = [fake.from_tensor(plain(x)).requires_grad_(x.requires_grad) for x in given]
            compiling = patch.object(torch.compiler, "_is_compiling_flag", True)  # as bitsandbytes asks
            with compiling, suppress(Traced):
                aot_function(flat, unused, unused, partition, decompositions=decompositions())(*apart)
        self.forward, self.backward = map(Steps, graphs)
        self.needs = [x.requires_grad for x in given]


class Steps:
    """A graph as kernels: what each makes, and what is needed no more after it."""

    def __init__(self, graph):
        nodes = list(graph.graph.nodes)
        outputs = nodes[-1].args[0]
        self.inputs = [n.name for n in nodes if n.op == "placeholder"]
        self.base: dict = {}  # node -> the buffer that it lies in
        stands = set()
        for node in reversed(nodes[:-1]):
            if node.op == "call_function" and (
                node in outputs or extern(node) or any(map(stops, node.users))
            ):
                stands.add(node)
        self.work, self.made = Work(), []
        reads: defaultdict = defaultdict(set)  # node -> buffers that its value is computed from
        last: dict = {}
        order = []
        for node in nodes[:-1]:
            value = node.meta.get("val")
            sources = (
                set().union(*(reads[n] for n in node.all_input_nodes)) if node.all_input_nodes else set()
            )
            if node.op in ("placeholder", "get_attr"):
                reads[node] = {node}
            elif view(node):
                first = node.all_input_nodes[0] if node.all_input_nodes else None
                reads[node] = reads[first] if first is not None else set()
            elif node in stands and tensors_of(value):
                reads[node] = {node}
                order.append((node, sources))
                self.work += work_of(node, sources)
            else:
                reads[node] = sources
        results = [next(iter(reads[n]), None) if hasattr(n, "name") and view(n) else n for n in outputs]
        self.results = [getattr(r, "name", None) for r in results]
        self.lies = {n.name: r for n, r in zip(outputs, self.results, strict=True) if hasattr(n, "name")}
        self.shapes = [n.meta.get("val") if hasattr(n, "meta") else None for n in outputs]
        for place, (node, sources) in enumerate(order):
            for source in (*sources, node):
                last[source.name] = place
        kept = set(self.results)
        for place, (node, _) in enumerate(order):
            ended = [name for name, at in last.items() if at == place and name not in kept]
            sizes = [nbytes(t) for t in tensors_of(node.meta["val"])]
            self.made.append((node.name, sizes, ended, not extern(node)))

    def run(self, held: dict, ledger) -> dict:
        """`held`: by name, what lies there; it is emptied as it is needed no more."""
        ledger.work[ledger.doing or ledger.phase] += self.work
        for name, sizes, ended, fused in self.made:
            if fused:  # it is written over what it is the last to read
                for gone in ended:
                    held.pop(gone, None)
            held[name] = [torch.empty(size, dtype=torch.uint8, device=CARD) for size in sizes]
            for gone in ended:
                held.pop(gone, None)
        return held


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


def view(node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", getattr(node.target, "__name__", "")) in (
        *VIEWS - {"empty", "empty_like"},
        "getitem",
    )


def extern(node) -> bool:
    if node.op != "call_function" or view(node):
        return False
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    foreign = getattr(node.target, "namespace", "aten") not in ("aten", "prims", "_operator")
    return foreign or any(name == e or (len(e) > 4 and e in name) for e in EXTERN)


def stops(user) -> bool:
    """What reads its inputs from memory: a value before it is written."""
    if view(user):
        return any(map(stops, user.users))
    name = getattr(getattr(user.target, "overloadpacket", None), "__name__", "")
    return user.op == "output" or extern(user) or name in ("sum", "mean", "amax", "var_mean", "cat")


def tensors_of(value) -> list:
    return [v for v in (value if isinstance(value, (tuple, list)) else [value]) if torch.is_tensor(v)]


def nbytes(value) -> int:
    return int(value.numel()) * value.element_size()


def work_of(node, sources) -> Work:
    from torch.utils.flop_counter import flop_registry

    value, made = node.meta["val"], Work(launches=1)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        made.products = flop_registry[packet](*args[0], **args[1], out_val=value)
    else:
        read = sum(nbytes(t) for s in sources for t in tensors_of(s.meta.get("val")))
        made.moved = read + sum(map(nbytes, tensors_of(value)))
    return made
