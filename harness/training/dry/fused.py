"""A graph as fused kernels: which values they write to memory, and until when these lie there."""

from collections import defaultdict

import torch

from harness.training.dry.world import CARD
from harness.work import VIEWS, Work, formula_of

# What a compiler does not fuse: products, attention, and what other libraries bring.
EXTERN = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention", "_fused", "cumsum", "sort", "topk",
          "index_put")  # fmt: skip


class Steps:
    """A graph as kernels: what each makes, and what is needed no more after it."""

    def __init__(self, graph):
        nodes = list(graph.graph.nodes)
        outputs = nodes[-1].args[0]
        self.inputs = [n.name for n in nodes if n.op == "placeholder"]
        stands = {  # in memory: what is given, and what is read from there
            node for node in nodes[:-1] if node.op == "call_function"
            and (node in outputs or extern(node) or any(map(stops, node.users)))
        }  # fmt: skip
        self.work, self.made = Work(), []
        reads: defaultdict = defaultdict(set)  # node -> buffers that its value is computed from
        last: dict = {}
        order = []
        for node in nodes[:-1]:
            sources = set().union(*(reads[n] for n in node.all_input_nodes))
            if node.op in ("placeholder", "get_attr"):
                reads[node] = {node}
            elif view(node):
                reads[node] = reads[node.all_input_nodes[0]] if node.all_input_nodes else set()
            elif node in stands and tensors_of(node.meta.get("val")):
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
    value, made = node.meta["val"], Work()
    if formula_of(getattr(node.target, "overloadpacket", None)):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        made.add(node.target, args, kwargs, value)
        return made
    read = sum(nbytes(t) for s in sources for t in tensors_of(s.meta.get("val")))
    return Work(moved=read + sum(map(nbytes, tensors_of(value))), launches=1)
