"""A training step as a function of fixed shapes: compiled it computes what it computes in eager mode, and
recorded once it can be replayed on other rows, as a CUDA graph is. For every method there is."""

from dataclasses import replace
from types import MethodType

import pytest
import test_contract
import tiny
import torch
from test_shapes import flash_on_a_cpu  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from harness.method import build, find, known_methods, resolve
from harness.spec import RunSpec
from harness.training import head, kernels
from harness.training.graphs import aside, workspaces
from harness.training.model import load_base
from harness.training.run import Run
from methods import smt
from methods.galore_layerwise import GaLoreLayerwise
from methods.lora import LoRA

ROWS = tiny.rows(12, seed=1)
UNEVEN = tiny.rows(12, seed=3, prompt=(30, 120), response=(10, 60))  # a step of them may be packed in parts
HP = tiny.hyperparams(learning_rate=5e-3, batch_size=6, micro_batch_size=6, max_steps=4, warmup_ratio=0.0)
OPTIONS = test_contract.OPTIONS | {
    "smt": {"share": 0.2, "block": 8, "warmup": 1},
    "lora_ggpo": {"sigma": 0.3, "beta": 0.1},
    "peft.adalora": test_contract.PERIODS["peft.adalora"],
}
UNTOUCHED = ("base", "base_nf4", "peft")
NAMES = sorted({*known_methods(), "peft.vera", "peft.ia3", "peft.adalora"} - {*UNTOUCHED})
CASES = [(name, {}) for name in NAMES] + [
    ("lora_ggpo", {"variant": "mgpo", "rho": 0.5}),
    ("reft", {"tied": False}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}".strip("-") for name, options in CASES]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model(tiny.gemma(num_hidden_layers=1, layer_types=["full_attention"])).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    monkeypatch.setattr(Run, "reward", lambda self, row, ids: len(set(ids)) / len(ids) + ids[0] / 1000)


def static_logps(run, model, batch):
    """As Run.token_logps, in fixed shapes and without a mask: no real token sees the padding behind it."""
    causal = head.causal_lm(model)
    decoder = causal.get_decoder()
    read = {name: batch[name] for name in getattr(decoder, "reads", ())}
    read["attention_mask"] = {"full_attention": None}  # else transformers looks into the positions for one
    hidden = decoder(input_ids=batch["input_ids"], use_cache=False, **read).last_hidden_state
    logps = causal.get_output_embeddings()(hidden[:, :-1]).float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


class Steps:
    """A method attached, its optimizer, and the micro-batches of some steps."""

    def __init__(self, name, options, folder, steps=3):
        cls = resolve(name, find(name, known_methods()))
        self.method = build(cls, {**OPTIONS.get(name, {}), **options})
        spec = RunSpec("any", 0, folder.name, {}, HP, locations={"model": str(folder)})
        base = self.method.load(lambda **more: load_base(spec, torch.float32, torch.device("cpu"), **more))
        self.model, self.run = tiny.attached(self.method, base, ROWS, self.method.own(HP))
        self.optimizer = self.method.optimizer(self.model, self.run)
        self.run.token_logps = MethodType(static_logps, self.run)
        made = [self.method.prepare(self.model, ROWS[:6], self.run) for _ in range(steps)]
        self.batches = [{k: v for k, v in step[0].items() if k != "examples"} for step in made]
        self.model.train()

    def backward(self, batch):
        """-> the loss of one micro-batch and the gradients by name, of what is trained."""
        loss = self.method.loss(self.model, batch, self.run)
        loss.backward()
        return loss.detach(), self.gradients()

    def gradients(self):
        return {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad and p.grad is not None}

    def put(self, gradients):
        """As a replay leaves them, where the step was recorded."""
        for name, gradient in gradients.items():
            self.model.get_parameter(name).grad = gradient

    def take(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self):
        return tiny.trained_weights(self.model)


def close(found, expected, atol, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


# Programs are kept from one method for the next, but for what hooks change.
@torch._dynamo.config.patch(recompile_limit=1000, skip_nnmodule_hook_guards=False)
@EACH
def test_compiled_it_computes_what_it_does_in_eager_mode(name, options, folder):
    """Each decoder layer whole, traced and cut into forward and backward as for any compiler."""
    plain, compiled = (Steps(name, options, folder, steps=2) for _ in range(2))
    if reason := plain.method.cannot.get("compiling"):
        pytest.skip(reason)
    for layer in head.causal_lm(compiled.model).get_decoder().layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for mine, batch in zip(plain.batches, compiled.batches, strict=True):
        (loss, gradients), (found, own) = plain.backward(mine), compiled.backward(batch)
        torch.testing.assert_close(found, loss, atol=1e-6, rtol=1e-5)
        close(own, gradients, atol=1e-5, rtol=1e-3)
        plain.take(), compiled.take()
    # A fifth of a step: Adam's are as long where a gradient is rounding alone.
    close(compiled.weights(), plain.weights(), atol=HP.learning_rate / 5, rtol=0)


class Tape(TorchDispatchMode):
    """What a CUDA graph is of a step: its operations on the memory that they had, without any Python. They
    are computed again where they were; what waits for a value is refused."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.kept, self.before = [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        assert name not in self.WAITS and not masked, f"{name} waits for the device"
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for t in tensors(value):
                    self.before.setdefault(id(t), (t, t.detach().clone()))
        made = operation(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        new = [t.untyped_storage().data_ptr() not in given for t in tensors(made)]
        if operation._schema.is_mutable or any(new):
            self.kept.append((operation, args, kwargs, made, new))
        return made

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, made, new in self.kept:
            again = operation(*args, **kwargs)
            for place, value, own in zip(tensors(made), tensors(again), new, strict=True):
                if own:
                    place.copy_(value)

    def undo(self):
        """A graph that is captured has computed nothing yet."""
        for tensor, value in reversed(self.before.values()):
            tensor.detach().copy_(value)

    def reset(self):
        self.kept.clear()


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@EACH
def test_recorded_once_it_is_replayed_on_other_rows(name, options, folder):
    """After steps of the optimizer: what a step reads are tensors, which change in place."""
    plain, taped = (Steps(name, options, folder) for _ in range(2))
    if reason := plain.method.cannot.get("graphs"):
        pytest.skip(reason)
    for steps in (plain, taped):
        steps.backward(steps.batches[0])
        steps.take()
    first, *others = others_of(taped.batches[1:])
    static = tree_map_only(torch.Tensor, torch.clone, first)
    tape = Tape()
    with tape:
        loss, gradients = taped.backward(dict(static))
    expected = plain.backward(dict(first))
    torch.testing.assert_close(loss, expected[0], atol=0, rtol=0)
    for other in others:
        plain.take(), taped.take()
        for key, value in other.items():
            static[key].copy_(value)
        tape.replay()
        taped.put(gradients)
        expected = plain.backward(dict(other))
        torch.testing.assert_close(loss, expected[0], atol=1e-6, rtol=1e-5)
        close(gradients, expected[1], atol=1e-6, rtol=1e-4)


def others_of(batches):
    """The first, and after it others of its shapes, the rows the other way round: they differ in each row."""

    def shapes(batch):
        return {key: value.shape for key, value in batch.items() if isinstance(value, torch.Tensor)}

    def flip(tensor):
        return tensor.flip(0) if tensor.ndim else tensor

    first, *others = batches
    others = [batch if shapes(batch) == shapes(first) else first for batch in others]
    return [first, *(tree_map_only(torch.Tensor, flip, batch) for batch in others)]


def test_a_second_update_on_a_draw_is_replayed_too(folder):
    """What GRPO's loss adds to its batch, the log-probabilities before the draw's first update and of the
    base, is handed from the first step's recording to the second's: nothing more goes between them."""
    plain, taped = (Steps("grpo", {"updates": 2}, folder, steps=1) for _ in range(2))
    tapes = []
    for draw in others_of(taped.batches * 2):
        theirs, mine = dict(draw), dict(draw)
        for update in range(2):
            expected = plain.backward(theirs)
            if len(tapes) <= update:
                static = tree_map_only(torch.Tensor, torch.clone, mine)
                given, tape = dict(static), Tape()
                with tape:
                    made = taped.backward(given)
                tapes.append((tape, static, given, made))
            else:
                tape, static, given, made = tapes[update]
                for key, value in static.items():
                    value.copy_(mine[key])
                tape.replay()
            mine |= {key: given[key].clone() for key in given.keys() - mine.keys()}
            loss, gradients = made
            torch.testing.assert_close(loss, expected[0], atol=1e-6, rtol=1e-5)
            close(gradients, expected[1], atol=1e-6, rtol=1e-4)
            taped.put(gradients)
            plain.take(), taped.take()
    assert mine.keys() - draw.keys() == {"old", "base"}


def test_the_largest_shape_is_captured_first_and_no_trial_keeps_memory(folder, taped, monkeypatch):
    """Graphs that share memory fit into what the largest held."""
    begun, own = [], kernels.Kernels.capture

    def capture(self, batch):
        begun.append((kernels.tokens(batch), len(self.graphs)))
        return own(self, batch)

    monkeypatch.setattr(kernels.Kernels, "capture", capture)
    short, long = tiny.rows(2, response=(3, 3)), tiny.rows(2, seed=1, response=(40, 40))
    rows = [replace(row, id=f"tiny:{n}") for n, row in enumerate(short + long)]
    hp = replace(HP, batch_size=4, micro_batch_size=1, max_steps=2)
    monkeypatch.setattr(LoRA, "cannot", {"packing": "its rows are padded"})
    _, _, record = tiny.fit(LoRA(), hp, rows)
    (small, _), (large, held), *others = begun
    assert small < large and held == 0 and record.kernels.shapes == 1 + len(others) > 1
    assert [size for size, _ in others] == sorted((size for size, _ in others), reverse=True)


def test_where_graphs_have_no_room_a_training_goes_on_without_any(folder, taped, monkeypatch):
    """A step beside the memory of other graphs has no more room than one that is captured there. Nor has a
    plain one, whose adapters' outputs lie apart: steps stay as they were captured."""
    own = kernels.Kernels.capture

    def capture(self, batch):
        if self.graphs:
            raise torch.cuda.OutOfMemoryError("no room")
        return own(self, batch)

    hp = replace(HP, batch_size=4, micro_batch_size=1, max_steps=3)
    rows = [
        replace(row, id=f"tiny:{n}") for n, row in enumerate(tiny.rows(4) + tiny.rows(4, response=(40, 40)))
    ]
    expected = tiny.losses(tiny.fit(LoRA(), replace(hp, kernels="eager"), rows)[2])
    monkeypatch.setattr(LoRA, "cannot", {"packing": "its rows are padded"})
    monkeypatch.setattr(kernels.Kernels, "capture", capture)
    quick, made = kernels.Kernels.quick, []
    monkeypatch.setattr(
        kernels.Kernels, "quick", lambda self, *more: made.append(self.rung) or quick(self, *more)
    )
    _, _, record = tiny.fit(LoRA(), hp, rows)
    assert record.kernels.rung == kernels.FUSED and record.kernels.shapes is None
    assert made.count(kernels.FUSED) >= 3 * 4  # each micro-batch of the training
    assert "no room for a graph of" in record.kernels.reason
    torch.testing.assert_close(tiny.losses(record), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def taped(monkeypatch, flash_on_a_cpu):  # noqa: F811
    """A tape stands for each graph."""

    def recorded(step, pool, forget, warm_up):
        warm_up()
        tape = Tape()
        with tape:
            found = step()
        tape.undo()
        return tape, found, 0

    monkeypatch.setattr(kernels, "recorded", recorded)
    monkeypatch.setattr(kernels, "RUNGS", {"eager + graph": ("graphs",)})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    refusal = kernels.Kernels.refusal
    monkeypatch.setattr(
        kernels.Kernels, "refusal", lambda self: refusal(self) if self.run.hp.kernels == "eager" else None
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {}),
        ("orpo", {}),
        ("grpo", {}),
        ("grpo", {"updates": 2}),
        ("smt", {}),
        ("lora_ggpo", {}),
        ("galore_layerwise", {"gap": 5}),
        ("galore_layerwise", {"gap": 200}),
    ],
)
def test_a_training_by_graphs_learns_what_one_without_does(name, options, folder, taped):
    """From the choice of the rung to the last step, with rows of unequal lengths."""
    found = []
    for way in ("eager", "auto"):
        cls = resolve(name, find(name, known_methods()))
        method = build(cls, {**OPTIONS.get(name, {}), **options})
        spec = RunSpec("any", 0, folder.name, {}, HP, locations={"model": str(folder)})
        base = method.load(lambda **more: load_base(spec, torch.float32, torch.device("cpu"), **more))  # noqa: B023
        hp = replace(method.own(HP), kernels=way, weight_decay=0.1, max_steps=8, max_length=200)
        rows = UNEVEN if "accumulation" in method.cannot else ROWS
        model, _, record = tiny.fit(method, hp, rows, base=base)
        found.append((tiny.trained_weights(model), tiny.losses(record), record))
    (weights, losses, plain), (own, mine, record) = found
    assert record.kernels.rung == "eager + graph" and "no graph" not in record.kernels.reason
    assert record.kernels.apart < 1e-3
    assert record.hashes == plain.hashes and record.tokens.trained == plain.tokens.trained
    torch.testing.assert_close(mine, losses, atol=1e-4, rtol=1e-4)
    close(own, weights, atol=HP.learning_rate / 5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "gap", "reason"),
    [({"capturable": False}, 200, "not capturable"), ({"lr": 1e-3}, 200, "not capturable"),
     ({}, 4, "too few steps"), ({}, 5, "")],
)  # fmt: skip
def test_updates_within_backward_that_no_graph_can_replay_are_not_captured(changes, gap, reason, taped):
    """torch's own AdamW calls itself capturable with a rate that is a number."""

    class Other(GaLoreLayerwise):
        def optimizer(self, model, run):
            optimizer = super().optimizer(model, run)
            for group in optimizer.param_groups:
                group |= changes
            return optimizer

    method = Other(rank=4, gap=gap)
    _, _, record = tiny.fit(method, replace(method.own(HP), max_steps=8), ROWS)
    assert record.kernels.rung == ("eager" if reason else "eager + graph")
    assert reason in record.kernels.reason and not (reason and record.kernels.shapes)


@pytest.mark.parametrize("name", ["smt", "lora_ggpo"])
def test_layers_share_one_program(name, tmp_path):
    """But the first, which need not give its input a gradient: for layers of its own each, a compiler would
    take as long as there are layers, and give up at the eighth."""
    config = tiny.gemma(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    tiny.model(config).save_pretrained(tmp_path)
    steps = Steps(name, {"smt": {"targets": "v_proj", "share": 0.04}}.get(name, {}), tmp_path, steps=2)
    if name == "smt":
        assert len({len(layer.blocks) for layer in smt.sparse_layers(steps.model).values()}) > 1
    assert kernels.kinds(head.causal_lm(steps.model).get_decoder().layers) == 1
    programs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for layer in head.causal_lm(steps.model).get_decoder().layers:
        layer.compile(backend=programs, fullgraph=True, dynamic=False)
    for batch in steps.batches:
        steps.backward(batch)
        steps.take()
    assert programs.frame_count == (4 if name == "reft" else 2)  # its edit is one beside the layer's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_no_step_takes_memory_for_products():
    """It would hold on to what lies around it: all there will be is taken before, forward and backward."""
    workspaces()
    streams = [torch.cuda.current_stream(), aside()]
    held = torch.cuda.memory_allocated()
    for stream in streams:
        with torch.cuda.stream(stream):
            weight = torch.ones(64, 64, device="cuda", requires_grad=True)
            (weight @ weight).sum().backward()
            del weight
    assert torch.cuda.memory_allocated() == held


def test_a_decoder_may_be_the_first_to_ask_for_the_stream_of_graphs(monkeypatch):
    """It asks where nothing learns."""
    taken, own = [], torch.ones

    def ones(*size, device, **more):
        taken.append(own(*size, **more))
        return taken[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with torch.inference_mode():
        workspaces()
    assert [one.grad.item() for one in taken] == [4.0]  # of the square of a product of ones
