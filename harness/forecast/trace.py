"""One run on a card that is not there: its load, its attach, two steps, its evaluation, by their own code."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from harness.data import Example, Shapes, batches_of
from harness.forecast.ledger import Ledger, Moment
from harness.forecast.programs import Programs
from harness.forecast.work import Work
from harness.forecast.world import CARD, Autocast, world
from harness.method import Method, Unsupported
from harness.record import EAGER, Phase, RunRecord
from harness.spec import RunSpec
from harness.training import evaluation, head, loop, weights
from harness.training.adapters import Adapters, alike
from harness.training.engine import Engine
from harness.training.kernels import Kernels, decoder_layers, plain_gradients, plainly, tokens
from harness.training.model import optimizer_bytes, sizes
from harness.training.run import Run

ALONE = 2  # micro-batches of a step that are computed: more hold no more
READ = 2**14  # prompt tokens that are read at once, as harness/training/decoder.py has it


@dataclass
class Traced:
    """What a run holds and has to do with so many layers."""

    moments: dict[str, Moment]
    work: dict[str, Work]
    rung: str = EAGER
    reason: str | None = None
    tokens: int = 0  # of the micro-batch whose work it is
    saved_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Forecasted(Run):
    """A run whose model answers nothing: what it would be asked is made up, as long as it may be."""

    def sample(self, model, examples, new_tokens, copies=1, temperature=0.0):
        self.sampled = getattr(self, "sampled", 0) + len(examples) * copies * new_tokens
        self.record.tokens.sampled = self.sampled
        return [
            [list(e.response_ids[:1]) * min(new_tokens, max(1, self.hp.max_length - len(e.prompt_ids)))] * copies
            for e in examples
        ]

    def reward(self, example, ids):
        return 0.5

    def accumulate(self, model, batches):
        """As often as it is asked, but computed twice: a third time holds no more."""
        self.accumulated = getattr(self, "accumulated", 0) + 1
        if self.accumulated > 2:
            return torch.zeros((), device=CARD)
        with self.ledger.making("activations"):
            return super().accumulate(model, batches[:ALONE])


class Foreseen(Kernels):
    """The ladder without a trial: the highest rung that the method and the machine allow."""

    def packed(self) -> Shapes | None:
        run, rows = self.run, self.run.batches.examples[:4]
        if "packing" in run.method.cannot:
            return None
        shapes = shapes_of(run, packed=True)
        try:
            with torch.no_grad(), run.accelerator.autocast():
                run.shapes = shapes
                head.token_logps(self.model, run.collate(rows))
        except Exception as error:  # as an architecture whose attention flash attention is not
            self.also(f"{type(error).__name__}: {error}")
            return None
        finally:
            run.shapes = None
        return shapes

    def ready(self, batches: list[dict]) -> None:
        if self.untried:
            self.rung, self.untried = self.untried[0], []
            with self.run.meter.phase("compile"):
                smallest = min(batches, key=tokens)
                self.outcome(lambda: plain_gradients(self.model, self.run, plainly(dict(smallest)), 1.0))
                self.forwards = {layer: self.fast(layer) for layer in decoder_layers(self.causal)}
                self.adapters = Adapters(alike(self.model))
                for group in self.adapters.groups:
                    self.run.ledger.is_part("weights", [group.both, group.a, group.b])
        if "graph" in self.rung:
            for parameter in self.parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        largest = sorted(batches, key=tokens)[-ALONE:]
        self.computed = [id(batch) for batch in largest]
        self.run.tokens = tokens(largest[-1])

    def fast(self, layer):
        if "compiled" not in self.rung:
            return super().fast(layer)
        return self.run.programs.of(layer, self.run.hp.gradient_checkpointing)

    def gradients(self, batch: dict, share) -> torch.Tensor:
        if id(batch) not in self.computed:
            return torch.zeros((), device=CARD)
        ledger, whole = self.run.ledger, self.computed[-1] == id(batch)
        ledger.doing = "micro-batch" if whole else "other"
        try:
            return super().gradients(batch, 1.0)
        finally:
            ledger.doing = "step"

    def outcome(self, way):
        self.zero_gradients()
        way()
        self.zero_gradients()


def trace(spec: RunSpec, method: Method, config, rows: dict[str, list[Example]], bf16: bool,
          evaluates: bool = True) -> Traced:  # fmt: skip
    """Raises whatever the method's own hooks do."""
    ledger = Ledger()
    with world(), seen(ledger), ledger:
        run = opened(spec, method, config, rows, bf16, ledger)
        with ledger.entered("load"):
            model = method.load(run.loader)
            ledger.base = set(map(id, model.parameters()))
        if not spec.trains:
            model.requires_grad_(False)
            sized = sizes(model)
            kept = None
        else:
            model, sized, kept = trained(model, run)
        if evaluates and not (spec.trial and method.objective == "sft"):
            evaluated(model, run)
        moments = ledger.moments()
    steps = run.record.kernels
    made = Traced(moments, dict(ledger.work), steps.rung or EAGER, steps.reason, getattr(run, "tokens", 0))
    made.saved_bytes = kept if kept is not None else 0
    made.facts = {**sized, "sampled": getattr(run, "sampled", 0), "accumulated": getattr(run, "accumulated", 0)}
    return made


def opened(spec, method, config, rows, bf16, ledger) -> Forecasted:
    hp = method.own(spec.own_hp)

    @contextmanager
    def phase(name):
        with ledger.entered(name):
            yield Phase()

    accelerator = SimpleNamespace(
        device=CARD, mixed_precision="bf16" if bf16 else "no",
        autocast=lambda: Autocast("meta", torch.bfloat16, enabled=bf16),
        backward=lambda loss: backward(loss, ledger), clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )  # fmt: skip
    pad = next(id for id in (getattr(config, "pad_token_id", None), 0) if id is not None)
    template = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=pad))
    meter = SimpleNamespace(phase=phase, phases={}, replayed=0)

    def load(**more):
        return drawn(config, torch.bfloat16 if bf16 else torch.float32, **more)

    run = Forecasted(
        method, hp, spec.seed, rows, dataset=spec.dataset, template=template, stops=[pad],
        accelerator=accelerator, meter=meter, record=RunRecord(spec, "ok"), load_base=load,
    )  # fmt: skip
    run.ledger, run.programs = ledger, Programs()
    return run


def backward(loss, ledger) -> None:
    ledger.mark("backward")
    loss.backward()
    ledger.mark("forward")


def trained(model, run):
    method, ledger = run.method, run.ledger
    with ledger.entered("attach"):
        model = method.attach(model, run)
        types = weights.loaded_types(model)
        weights.master_weights(model, run.accelerator.mixed_precision)
        weights.one_arithmetic(model, types)
    parts(model, ledger)
    sized = sizes(model)
    if not types:
        raise Unsupported("it attached nothing to train")
    with ledger.entered("train"):
        made = loop.Loop(model, run)
        widest = max(run.batches, key=lambda examples: width(examples, run))
        for _ in range(2):
            ledger.work.pop("step", None), ledger.work.pop("micro-batch", None)
            ledger.doing = "step"
            made.step(widest)
            for state in made.optimizer.state.values():
                ledger.is_part("optimizer", state)
        ledger.doing = ""
        sized["optimizer_bytes"] = optimizer_bytes(made.optimizer)
    made.kernels.close()
    del made
    model.zero_grad()
    weights.put_back(types)
    saved = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return method.keep(model, run), sized, saved


def parts(model, ledger) -> None:
    """What is trained and was not there before is an adapter."""
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.is_part("weights" if id(tensor) in ledger.base else "adapters", tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: ledger.is_part("gradients", gradient))
        if getattr(tensor, "quant_state", None):
            ledger.is_part("weights", list(tensor.quant_state.as_dict(packed=True).values()))


def width(examples: list[Example], run) -> tuple[int, int]:
    """By which a step is the widest: the tokens of its largest micro-batch."""
    parts = run.micro_batches(examples)
    if run.shapes and run.shapes.packed:
        return max(sum(e.length for e in part) for part in parts), len(parts)
    return max(len(part) * max(e.length for e in part) for part in parts), len(parts)


def evaluated(model, run) -> None:
    """The first batch of the likelihoods, and the first prompts and two steps of the decoder."""
    scored = run.scored or run.splits["validation"]
    if not scored:
        return
    first, ledger, hp = next(iter(batches_of(scored, run.hp.eval_batch_size))), run.ledger, run.hp
    model.eval()
    with run.meter.phase("evaluate"):
        ledger.doing = "evaluate"
        evaluation.likelihoods(model, first, run)
    if not any(e.prompt_ids for e in scored):
        return
    by_length = sorted((len(e.prompt_ids) for e in scored), reverse=True)
    count, longest = min(hp.eval_batch_size, len(by_length)), by_length[0]
    prompts = [[0] * length for length in by_length[:count]]
    with run.meter.phase("generate"), torch.inference_mode(), run.accelerator.autocast():
        ledger.doing = "read"
        try:
            engine = Engine(model, count, longest, hp.max_new_tokens, [0])
            most = max(1, READ // longest)
            engine.read(prompts, list(range(count))[:most], list(range(count))[:most])
            ledger.doing = "token"
            engine.step()
        except Exception as error:  # what the engine cannot decode is generated otherwise
            run.record.warnings.append(f"{type(error).__name__}: {error}")
    ledger.doing = ""


def drawn(config, dtype, quantization_config=None, **_):
    """The base model, as it would be loaded."""
    from transformers.initialization import no_init_weights

    with torch.device(CARD), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        if quantization_config is not None:
            model = quantised(model, quantization_config, dtype)
    return model


def quantised(model, config, dtype):
    """As transformers replaces linear layers by bitsandbytes' of 4 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.config.quantization_config = quantizer.quantization_config
    quantizer.preprocess_model(model=model, device_map={"": CARD}, dtype=dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            own = module.weight
            plain = torch.empty(module.out_features, module.in_features, dtype=dtype, device=CARD)
            settings = {n: getattr(own, n) for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
            module.weight = Params4bit(plain, requires_grad=False, module=module, **settings)._quantize(CARD)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = quantizer
    return model


@contextmanager
def seen(ledger):
    """Within, the one loop computes by `Foreseen`, and the ledger sees head and optimizer apart."""
    own = head.LogProbabilities.forward

    def forward(ctx, *args):
        with ledger.making("head", "head"):
            return own(ctx, *args)

    back = head.LogProbabilities.backward

    def backwards(ctx, grad):
        with ledger.making("head"):
            return back(ctx, grad)

    with (
        patch.object(loop, "Kernels", Foreseen),
        patch.object(head.LogProbabilities, "forward", staticmethod(forward)),
        patch.object(head.LogProbabilities, "backward", staticmethod(backwards)),
        patch.object(torch.cuda, "empty_cache", ledger.allocator.empty_cache),
        params4bit() or nullcontext(),
    ):
        hook = register_optimizer_step_pre_hook(lambda *_: optimizing(ledger, True))
        end = register_optimizer_step_post_hook(lambda *_: optimizing(ledger, False))
        try:
            yield
        finally:
            hook.remove(), end.remove()


def optimizing(ledger, begins: bool) -> None:
    ledger.now = "workspace" if begins else "activations"
    ledger.mark("optimizer" if begins else "forward")


def params4bit():
    """A 4-bit weight is quantised when it is moved to a card."""
    try:
        from bitsandbytes.nn import Params4bit
    except ImportError:
        return None
    own = Params4bit.to

    def to(self, *args, **kwargs):
        if not self.bnb_quantized and any(str(a) == "meta" for a in (*args, *kwargs.values())):
            return self._quantize(CARD)
        return own(self, *args, **kwargs)

    return patch.object(Params4bit, "to", to)


def shapes_of(run, packed: bool) -> Shapes:
    """As they will be cut; the same for all methods of a comparison."""
    key = (id(run.batches.examples), replace(run.hp), run.seed, packed)
    if key not in KNOWN:
        KNOWN[key] = Shapes(run.batches, run.hp, packed=packed)
    return KNOWN[key]


KNOWN: dict[tuple, Shapes] = {}
