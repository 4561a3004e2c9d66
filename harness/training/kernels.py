"""The gradients of a micro-batch, as fast as this machine and this method allow, and which way that was.

A ladder: decoder layers compiled one by one, and forward and backward captured as a CUDA graph that is
replayed; the same without the graph; the graph alone; neither; plain. All but the last have flash attention,
and adapters as one product. A run takes the highest rung that gives, on its first micro-batch, the loss and
the gradients of the plain one. Where graphs have no room it goes on as it is, without them: plain steps would
take more. After the last step both are compared again.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from harness.data import Shapes
from harness.plain import redacted
from harness.record import EAGER
from harness.training import head
from harness.training.adapters import Adapters, alike
from harness.training.attention import flash
from harness.training.compiling import compiling
from harness.training.graphs import recorded
from harness.training.reducer import Reducer

if TYPE_CHECKING:
    from harness.training.run import Run

FUSED = "fused"
RUNGS = {  # name -> what a method says that it cannot
    "compiled + graph": ("compiling", "graphs"),
    "compiled": ("compiling",),
    "eager + graph": ("graphs",),
    FUSED: (),
}
WORTH = 1e15  # parameters times tokens read, for each kind of layer: below, compiling outlasts what it saves
GRADIENTS = 0.1  # of their length, between two ways: rounding to bf16 alone gives some hundredths
KIND, COUNTED = 0.5, 0.01  # as much, of a kind of weight in all layers, of those that are a hundredth of all
LOSS = 0.02  # nats a token, as much
MOST = 1e6  # of GRADIENTS, when they are of another world or no numbers
COMPARED = 2**26  # values of the gradients, at most: 256 MiB
OFTEN = 4  # steps between two captures, up to which these take longer than replays save
CAPTURED = 16  # graphs of a run, at most; a shape beyond is computed as it comes
TRACED = {
    "recompile_limit": 64,  # programs of one kind of layer: its windows, its modes and the shapes
    "skip_nnmodule_hook_guards": False,
    "specialize_float": True,  # else those of shapes of any size are tensors of the CPU, in C++ of their own
}


@dataclass
class Captured:
    """A graph, and the tensors that it reads and writes at each replay."""

    graph: torch.cuda.CUDAGraph
    given: dict[str, torch.Tensor]
    share: torch.Tensor
    loss: torch.Tensor
    added: dict[str, torch.Tensor]  # what the loss put into its batch
    read: bool  # the loss read the batch it was given
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]  # to which it adds
    made: frozenset[int]  # buckets of them, which it marks


class Kernels:
    """`ready(batches, step)` before a step, then `gradients(batch, share)` adds those of a micro-batch's loss
    times its share of the step, and gives that product. `seconds`: of compiling and capturing."""

    def __init__(self, model, run: "Run", reducer: Reducer, optimizer: torch.optim.Optimizer):
        self.model, self.run, self.causal = model, run, head.causal_lm(model)
        self.reducer = reducer
        self.parameters = list(model.parameters())  # a walk through all modules outlasts a small step
        self.windowed = [m for m in model.modules() if isinstance(getattr(m, "sliding_window", None), int)]
        self.found = run.record.kernels
        self.within = "accumulation" in run.method.cannot  # gradients are used within backward
        self.rung, self.found.reason = EAGER, self.refusal()
        self.graphs: dict[tuple, Captured | None] = {}  # none: it could not be captured
        self.pool, self.seconds, self.seen = None, 0.0, Seen()
        self.latest: dict = {}  # micro-batch
        self.forwards: dict[torch.nn.Module, Callable] = {}
        self.adapters = Adapters([])
        cannot = {limit: why for limit, why in run.method.cannot.items() if limit in ("compiling", "graphs")}
        if self.within and not capturable(optimizer):
            cannot.setdefault("graphs", "an optimizer that is not capturable uses gradients within backward")
        if self.within and min(run.method.renewed_every() or run.steps, run.steps) <= OFTEN:
            cannot.setdefault("graphs", "it would be captured for too few steps")
        work = sum(run.batches.tokens) * sum(map(numel, self.parameters))
        if run.hp.kernels == "auto" and work < WORTH * kinds(decoder_layers(self.causal)):
            cannot["compiling"] = "takes longer than it would save in so short a training"
        self.untried = []
        if not self.found.reason:
            self.untried = [rung for rung, needs in RUNGS.items() if not {*needs} & {*cannot}]
            self.found.reason = "; ".join(f"{limit}: {why}" for limit, why in cannot.items()) or None
        if not self.untried:
            return
        share = [run.devices.share(step, lambda example: example.length) for step in run.batches]
        self.steps = [step for step in share if step]  # those that this device reads
        with run.meter.phase("compile"):
            together = None if "packing" in run.method.cannot else self.packed()
            self.shapes = together or Shapes(self.steps, run.hp, packed=False)
        run.shapes, self.found.packed = self.shapes, self.shapes.packed

    @property
    def rung(self) -> str:
        return self.found.rung or EAGER

    @rung.setter
    def rung(self, name: str) -> None:
        self.found.rung = name

    def refusal(self) -> str | None:
        """Why there are only plain steps."""
        if self.run.hp.kernels == EAGER:
            return "as hp.kernels asks"
        if self.run.device.type not in ("cuda", "meta"):  # meta: a forecast of a GPU
            return "there is no GPU"
        if self.run.sharded:
            return "weights are gathered from several devices within the step"
        if self.run.accelerator.mixed_precision != "bf16":
            return "attention without a mask computes in bf16 alone"
        own = vars(self.causal.config.get_text_config())
        drawn = [v for k, v in own.items() if "drop" in k and not k.startswith(("classifier", "summary"))]
        modules = [m.p for m in self.model.modules() if isinstance(m, torch.nn.Dropout)]
        if any(isinstance(p, (int, float)) and p for p in (*drawn, *modules)):
            return "compiled layers would draw another dropout"
        if not decoder_layers(self.causal):
            return "this architecture has no one list of decoder layers"
        if self.within and not any(p._post_accumulate_grad_hooks for p in self.parameters):
            return "gradients are used within backward, by no hooks that a trial could leave out"
        return None

    def packed(self) -> Shapes | None:
        """Of rows that share a sequence, where this model reads them as it reads them apart."""
        run, rows = self.run, self.run.batches.examples[:4]
        shapes = Shapes(self.steps, run.hp, packed=True, whole=self.within)
        try:
            with torch.no_grad(), run.accelerator.autocast():
                apart = run.collate(rows)
                run.shapes = shapes
                together = run.collate(rows)
                self.model.eval()
                ways = (together, plainly(together))  # by row borders, and as plain steps read it
                reason = next(filter(None, (head.unpackable(self.model, apart, way) for way in ways)), None)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture says to rows without a mask
            reason = first_of(error)
        finally:
            run.shapes = None
            self.model.train()
        self.also(reason and reason.partition(": use ")[0])  # nobody has asked for packing
        return None if reason else shapes

    def also(self, reason: str | None) -> None:
        self.found.reason = "; ".join(filter(None, [self.found.reason, reason])) or None

    def ready(self, batches: list[dict], step: int) -> None:
        """Compiles and captures what these micro-batches need, and, before the first, chooses the rung.
        `step`: of the training, from 0."""
        if self.rung == EAGER and not self.untried:
            return
        if (live := self.live(step)) and self.graphs:
            self.drop()
            self.clear()
        new = {key: batch for batch in batches if (key := self.key(batch)) not in self.graphs}
        if not new or (not self.untried and (live or "graph" not in self.rung)):
            return
        if any(key[0] != self.trained() for key in self.graphs):
            self.drop()  # other weights train now
        meter, spent = self.run.meter, self.spent()
        own, self.run.reading = self.run.reading, self.seen
        with meter.phase("compile"):
            trying = bool(self.untried)
            while self.untried and self.choose(min(new.values(), key=tokens)):
                pass
            if trying and len(new) > 1:
                self.drop()  # the smallest: it fits into what the largest holds, not the other way round
            if trying and self.within:
                self.drop()  # in it are a trial's hooks
            if self.within:
                self.clear()  # of what a live step has left
            for key, batch in sorted(new.items(), key=lambda item: -tokens(item[1])):
                if live or "graph" not in self.rung:
                    break
                if key not in self.graphs and len(self.graphs) < CAPTURED:
                    try:
                        self.graphs[key] = self.capture(batch)
                    except torch.cuda.OutOfMemoryError:  # nor would it have room without one, beside others
                        self.also(f"no room for a graph of {tokens(batch)} tokens")
                        self.drop()
                        self.rung, meter.replayed = "compiled" if "compiled" in self.rung else FUSED, 0
                    except Exception as error:
                        self.also(f"no graph of {tokens(batch)} tokens: {first_of(error)}")
                        self.graphs[key] = None
            self.clear()
        self.run.reading = own
        self.seconds += self.spent() - spent
        most = max(self.found.shapes or 0, len(self.graphs))
        self.found.shapes = (most or None) if "graph" in self.rung else None

    def live(self, step: int) -> bool:
        """Whether who uses gradients within backward does so in Python now: its state is made in the first
        step, and anew in those of a renewal. Others are replayed with it."""
        every = self.run.method.renewed_every()
        return self.within and (step == 0 or (every > 0 and step % every == 0))

    def spent(self) -> float:
        phase = self.run.meter.phases.get("compile")
        return phase.seconds if phase else 0.0

    def choose(self, batch: dict) -> bool:
        """Tries the next rung against a plain step. -> whether this micro-batch could tell."""
        reason = None
        batch = dict(batch)  # what a loss adds to it is the trial's
        try:
            with head.arithmetic(self.model) as types:  # who listens would be compiled, too
                step = partial(plain_gradients, self.model, self.run)
                expected = self.outcome(partial(step, plainly(batch), 1.0))
            self.run.record.arithmetic["training"] = types
        except torch.cuda.OutOfMemoryError:
            expected, reason = None, "not compared with a plain step, which does not fit this card"
        if expected and not any(g is not None and g.any() for g in expected[1]):
            return False  # no gradients to compare
        self.clear()
        self.rung = rung = self.untried.pop(0)
        try:
            self.forwards = {layer: self.fast(layer) for layer in decoder_layers(self.causal)}
            if not self.adapters.groups:
                self.adapters = Adapters(alike(self.model))
            found = self.outcome(partial(self.tried, batch))
            wrong = expected and difference(expected, found, self.kinds())
        except torch.cuda.OutOfMemoryError:
            if not expected:  # nor did the plain step fit
                raise
            wrong = "out of memory"
        except Exception as error:  # whatever tracing or capturing says
            wrong = first_of(error)
        if not wrong:
            self.untried = []
            self.also(reason)
            return True
        self.also(f"{rung}: {wrong}")
        self.drop()
        self.clear()
        self.rung, self.forwards, self.run.meter.replayed = EAGER, {}, 0
        if not self.untried:
            self.run.shapes, self.found.packed = None, None
            self.close()
        return True

    def fast(self, layer) -> Callable:
        forward = layer.forward
        if "compiled" in self.rung:
            several = len(self.shapes.sizes) > 1  # one program for all of them, or one that knows its own
            forward = torch.compile(forward, fullgraph=True, dynamic=several)
        if self.run.hp.gradient_checkpointing:  # without random states, which a graph cannot keep: no dropout
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        return forward

    @contextmanager
    def installed(self, longest: int | None):
        """Within, the decoder's layers are the fast ones, for rows of at most so many tokens; whoever else
        calls them finds them as they were."""
        layers = list(self.forwards)
        unfilled = [m for m in self.windowed if longest and longest <= m.sliding_window]
        with ExitStack() as stack:
            if "compiled" in self.rung:
                stack.enter_context(compiling(**TRACED))
            stack.enter_context(self.adapters.installed())
            asking = self.causal.get_input_embeddings().register_forward_hook(asked_for_gradient)
            stack.callback(asking.remove)
            for attention in unfilled:  # so that layers with a window and those without are one program
                stack.callback(setattr, attention, "sliding_window", attention.sliding_window)
                attention.sliding_window = None
            for layer in layers:
                stack.callback(restored, layer, vars(layer).get("forward"))
                layer.forward = self.forwards[layer]
                if self.run.hp.gradient_checkpointing:
                    layer.gradient_checkpointing = False
                    stack.callback(setattr, layer, "gradient_checkpointing", True)
            self.run.fused = True
            stack.callback(setattr, self.run, "fused", False)
            yield

    # One micro-batch

    def gradients(self, batch: dict, share) -> torch.Tensor:
        if self.rung == EAGER:
            for name in head.ROWS:  # the model's own attention has a mask
                batch.pop(name, None)
            self.reducer.began()
            return plain_gradients(self.model, self.run, batch, share)
        self.latest = dict(batch)  # to which a loss adds nothing
        if captured := self.graphs.get(self.key(batch)):
            if captured.read and self.run.reading:
                self.run.reading(batch)
            return self.replay(captured, batch, share)
        return self.quick(batch, share)

    def quick(self, batch: dict, share) -> torch.Tensor:
        with self.installed(batch.get("longest")), flash(self.causal):  # also while backward computes again
            self.adapters.write()
            self.reducer.began()
            return plain_gradients(self.model, self.run, batch, share)

    def replay(self, captured: Captured, batch: dict, share) -> torch.Tensor:
        for name, tensor in captured.given.items():
            tensor.copy_(batch[name], non_blocking=True)
        captured.share.fill_(share) if isinstance(share, float) else captured.share.copy_(share)
        for parameter, gradient in captured.gradients:
            if parameter.grad is not gradient:  # as who has set it to none
                parameter.grad = gradient.zero_()
        captured.graph.replay()
        self.reducer.made = set(captured.made)
        batch.update({name: tensor.clone() for name, tensor in captured.added.items()})
        return captured.loss.clone()

    def capture(self, batch: dict) -> Captured:
        given = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
        share = torch.ones((), device=self.run.device)
        rest = {name: value for name, value in batch.items() if name not in given}
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None and not self.within:
                parameter.grad = torch.zeros_like(parameter)  # a graph adds to what lies there
        self.pool = self.pool or torch.cuda.graph_pool_handle()

        def step() -> tuple[torch.Tensor, dict]:
            inner = {**rest, **given}
            return self.quick(inner, share), inner

        def warm_up() -> None:  # which trains nothing
            with hooked(trained, forgotten) if self.within else nullcontext():
                step()

        meter = self.run.meter
        graph, (loss, inner), held = recorded(step, self.pool, partial(meter.keep_peaks, "compile"), warm_up)
        meter.replayed = max(meter.replayed, held)
        added = {name: value for name, value in inner.items() if name not in batch}
        gradients = [(p, p.grad) for p in trained if p.grad is not None]
        read, made = self.seen.batches > 0, frozenset(self.reducer.made)
        return Captured(graph, given, share, loss, added, read, gradients, made)

    def tried(self, batch: dict) -> torch.Tensor:
        """By a graph with the trial's hooks in it, where there are hooks."""
        if "graph" in self.rung and (self.within or not self.graphs):
            self.drop()
            self.clear()
            held = self.run.meter.replayed
            self.graphs[self.key(batch)] = self.capture(batch)
            if self.within:
                self.run.meter.replayed = held  # what its hooks keep is in no step
            self.zero_gradients()
        return self.gradients(batch, 1.0)

    def outcome(self, way: Callable) -> tuple[float, list[torch.Tensor | None]]:
        """Loss and, as far as they are compared, gradients: some values from everywhere in each. Who would
        use them within backward is not asked."""
        self.zero_gradients()
        trained = [p for p in self.parameters if p.requires_grad]
        most = COMPARED // max(1, len(trained))
        found: dict[torch.nn.Parameter, torch.Tensor] = {}

        def take(p: torch.nn.Parameter) -> None:
            if p.grad is not None:
                found[p] = p.grad.flatten()[:: max(1, -(-p.numel() // most))].clone()

        def moved(p: torch.nn.Parameter) -> None:
            take(p)
            p.grad = None

        with hooked(trained, moved) if self.within else nullcontext():
            loss = way().item()
        for p in trained:
            take(p)
        self.zero_gradients()
        return loss, [found.get(p) for p in trained]

    def kinds(self) -> list[str]:
        """Of the gradients of an outcome: a weight's name, of whichever layer."""
        return [re.sub(r"\d+", "*", name) for name, p in self.model.named_parameters() if p.requires_grad]

    def verify(self) -> None:
        """How far the gradients of the latest micro-batch are from plain ones stands in the record."""
        if self.untried and self.seconds:
            self.also("no step had gradients to compare with faster ones")
        if self.rung == EAGER or not self.latest:
            return
        own, self.run.reading, batch = self.run.reading, self.seen, self.latest
        with self.run.meter.phase("compile"):
            try:
                _, found = self.outcome(partial(self.tried, batch))
                plain = partial(plain_gradients, self.model, self.run, plainly(batch), 1.0)
                self.found.apart, kind = farthest(self.outcome(plain)[1], found, self.kinds())
                self.also(kind and f"after the last step, gradients of {kind} were others")
            except Exception as error:  # as where a plain step has no room: the training itself is done
                self.also(f"not compared after the last step: {first_of(error)}")
            self.clear()  # what this took is no peak of the training
        self.run.reading = own

    def zero_gradients(self) -> None:
        """In place where a graph adds to them."""
        kept = []
        for parameter in self.parameters:
            if "graph" not in self.rung or not parameter.requires_grad:
                parameter.grad = None
            elif parameter.grad is not None:
                kept.append(parameter.grad)
        if kept:
            torch._foreach_zero_(kept)

    def drop(self) -> None:
        """Frees what graphs hold; their pool is not used again."""
        for captured in filter(None, self.graphs.values()):
            captured.graph.reset()
        self.graphs.clear()
        self.pool = None

    def close(self) -> None:
        self.drop()
        self.forwards.clear()
        self.adapters.close()
        for parameter in self.parameters:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def clear(self) -> None:
        self.zero_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def trained(self) -> tuple[bool, ...]:
        return tuple(parameter.requires_grad for parameter in self.parameters)

    def key(self, batch: dict) -> tuple:
        """Equal for what one graph can compute."""
        shapes = [(name, value.shape if torch.is_tensor(value) else value) for name, value in batch.items()]
        return self.trained(), *(shape for shape in shapes if shape[0] != "examples")


def plain_gradients(model, run: "Run", batch: dict, share) -> torch.Tensor:
    """Adds the gradients of a loss times its share of the step. -> that product."""
    with run.accelerator.autocast():
        loss = run.whole(run.method.loss, model, batch, run) * share
    run.accelerator.backward(loss)
    return loss.detach()


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps can be captured: what differs from one to the next lies on the device."""
    return all(
        group.get("capturable")
        and torch.is_tensor(group["lr"])
        and all(group["lr"].device == p.device for p in group["params"])
        for group in optimizer.param_groups
    )


@contextmanager
def hooked(parameters: list, hook: Callable):
    """Within, this is done with each gradient as soon as it is there, and nothing else."""
    kept = [(p, p._post_accumulate_grad_hooks) for p in parameters]
    for p in parameters:
        p._post_accumulate_grad_hooks = None
        p.register_post_accumulate_grad_hook(hook)
    try:
        yield
    finally:
        for p, hooks in kept:
            p._post_accumulate_grad_hooks = hooks


def forgotten(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def asked_for_gradient(embedding, given, output: torch.Tensor) -> torch.Tensor:
    """So that the first layer is the same program as the others, also where embeddings are frozen."""
    return output if output.requires_grad else output.requires_grad_()


class Seen:
    """Stands for the reading of batches while they are tried."""

    def __init__(self):
        self.batches = 0

    def __call__(self, batch: dict) -> None:
        self.batches += 1


def first_of(error: BaseException) -> str:
    """What a failed capture was broken by, not what that broke."""
    while error.__context__ is not None:
        error = error.__context__
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def plainly(batch: dict) -> dict:
    """The same micro-batch, for the model's own attention."""
    return {name: value for name, value in batch.items() if name not in head.ROWS}


def numel(parameter) -> int:
    """Values; those of a 4-bit weight, not the bytes that hold them."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()


def tokens(batch: dict) -> int:
    return batch["input_ids"].numel()


def decoder_layers(causal) -> list:
    """The decoder's list of layers, whatever it is called; none where there is not one."""
    decoder, count = causal.get_decoder(), causal.config.get_text_config().num_hidden_layers
    lists = [m for m in decoder.children() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0]) if len(lists) == 1 else []


def kinds(layers: list) -> int:
    """How many programs layers are, by the shapes of their weights: those that EVA gives ranks of their own
    are one each. What else a method trains, as SMT its blocks, is of any number in one program."""

    def weights(layer) -> tuple:
        return tuple(p.shape for name, p in layer.named_parameters() if name.endswith("weight"))

    return len(set(map(weights, layers)))


def difference(expected: Any, found: Any, kinds: list[str]) -> str | None:
    """What tells two outcomes of one micro-batch apart, beyond rounding."""
    if not abs(expected[0] - found[0]) <= LOSS:
        return f"loss {found[0]:.4f}, not {expected[0]:.4f}"
    far, kind = farthest(expected[1], found[1], kinds)
    of = f" of {kind}" if kind else ""
    return f"gradients{of} {far:.1%} apart" if far > GRADIENTS else None


def farthest(expected: list, found: list, kinds: list[str]) -> tuple[float, str | None]:
    """How long the difference of two lists of gradients is, as a share of those expected, MOST at most; or,
    where those of one kind are wrong, as they are few of all, theirs, and which that is."""
    squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind, a, b in zip(kinds, expected, found, strict=True):
        if a is not None:
            squares[kind][0] += (
                ((b if b is not None else torch.zeros_like(a)) - a).float().square().sum().item()
            )
            squares[kind][1] += a.float().square().sum().item()
    far, length = (sum(both[i] for both in squares.values()) for i in (0, 1))
    counted = [(ratio(*both), kind) for kind, both in squares.items() if both[1] > COUNTED**2 * length]
    whole, worst = ratio(far, length), max(counted, default=(0.0, ""))
    return worst if worst[0] > max(KIND, whole) else (whole, None)


def ratio(far: float, length: float) -> float:
    found = (far / length) ** 0.5 if length else MOST * bool(far)
    return found if found <= MOST else MOST


def restored(layer, forward: Callable | None) -> None:
    """With the forward that was its own, or that of its class."""
    if forward is None:
        vars(layer).pop("forward")
    else:
        layer.forward = forward
