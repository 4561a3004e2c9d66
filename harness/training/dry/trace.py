"""One run on a card that is not there: its load, its attach, two steps, its evaluation, by their own code."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from harness.data import Batches, Example, Shapes, batches_of, learned_tokens
from harness.method import Method, Unsupported
from harness.record import EAGER, Phase, RunRecord
from harness.spec import RunSpec
from harness.training import evaluation, head, kernels, loop, weights
from harness.training.adapters import Adapters, alike
from harness.training.devices import Devices
from harness.training.dry.ledger import Ledger, Moment
from harness.training.dry.programs import Programs
from harness.training.dry.world import CARD, Autocast, world
from harness.training.engine import Engine
from harness.training.kernels import Kernels, decoder_layers, tokens
from harness.training.model import optimizer_bytes, sizes
from harness.training.run import Run
from harness.work import Work

FEW = 4  # steps that are read before the first
ALONE = 2  # micro-batches of a step that are computed: more hold no more
READ = 2**14  # prompt tokens that are read at once, as harness/training/decoder.py has it


@dataclass
class Traced:
    """What a run holds and has to do with so many layers."""

    moments: dict[str, Moment]
    work: dict[str, Work]
    rung: str = EAGER
    reason: str | None = None
    saved_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Forecasted(Run):
    """A run whose model answers nothing: what it would be asked is made up, as long as it may be."""

    sampled = tokens = 0
    ledger: Ledger
    programs: Programs

    def sample(self, model, examples, new_tokens, copies=1, temperature=0.0):
        self.sampled += len(examples) * copies * new_tokens // self.devices.count
        return [
            [list(e.response_ids[:1]) * min(new_tokens, max(1, self.hp.max_length - len(e.prompt_ids)))]
            * copies
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


class Few:
    """The widest step of a training and the first ones: a method that reads many before it begins holds no
    more for the rest."""

    def __init__(self, batches: Batches, widest: list[Example]):
        self.batches, self.widest = batches, widest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Example]]:
        return chain([self.widest], islice(iter(self.batches), FEW))


class Foreseen(Kernels):
    """The ladder without a trial: the highest rung that the method and the machine allow."""

    run: Forecasted

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
            self.run.record.arithmetic["training"] = {}  # a trial has found it out
            with self.run.meter.phase("compile"):
                self.forwards = {layer: self.fast(layer) for layer in decoder_layers(self.causal)}
                self.adapters = Adapters(alike(self.model))
                for group in self.adapters.groups:
                    self.run.ledger.is_part("weights", [group.both, group.a, group.b])
        if "graph" in self.rung:
            for parameter in self.parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                    self.run.ledger.is_part("gradients", parameter.grad)
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


def trace(
    spec: RunSpec, method: Method, config, rows: dict[str, list[Example]], bf16: bool, depth: int,
    programs: Programs | None = None,
) -> Traced:  # fmt: skip
    """Of a model with the first so many of its layers, whose compiled programs another depth may have made.
    Raises whatever the method's own hooks do."""
    ledger, layers = Ledger(), config.get_text_config().num_hidden_layers
    with world(), seen(ledger), ledger:
        run = opened(spec, method, shallow(config, depth), rows, bf16, ledger)
        run.programs = programs or Programs()
        run.programs.ledger = ledger
        with ledger.entered("load"):
            model = method.load(run.loader)
            ledger.base = set(map(id, model.parameters()))
            parts(model, ledger)
        if spec.trains:
            model, facts = trained(model, run, layers / depth)
        else:
            facts = sizes(model.requires_grad_(False))
        if not (spec.trial and spec.trains and method.objective == "sft"):
            facts |= evaluated(model, run)
        moments = ledger.moments()
    steps = run.record.kernels
    saved, facts["cannot"] = facts.pop("saved_bytes", 0), list(method.cannot)
    return Traced(moments, dict(ledger.work), steps.rung or EAGER, steps.reason, saved, facts)


def shallow(config, depth: int):
    """With fewer layers."""
    config = copy.deepcopy(config)
    text, layers = config.get_text_config(), config.get_text_config().num_hidden_layers
    if depth == layers:
        return config
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:  # as the kind of each layer
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


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
        devices=Devices(0, spec.devices),
    )  # fmt: skip
    run.devices.talking = False  # with the first one's share, alone
    run.ledger = ledger
    return run


def backward(loss, ledger) -> None:
    ledger.mark("backward")
    loss.backward()
    ledger.mark("forward")


def trained(model, run, deeper: float):
    """-> the model as it is kept, and what is known of it. `deeper`: how many times as many layers the whole
    model has, which decides whether compiling pays."""
    method, ledger = run.method, run.ledger
    few = Few(run.batches, max(run.batches, key=lambda examples: width(examples, run)))
    with ledger.entered("attach"), patch.object(run, "batches", few):
        model = method.attach(model, run)
        types = weights.loaded_types(model)
        weights.master_weights(model, "bf16" if run.accelerator.mixed_precision == "bf16" else "fp32")
        weights.one_arithmetic(model, types)
    if not types:
        raise Unsupported("it attached nothing to train")
    parts(model, ledger)
    facts = sizes(model)
    inner = {id(p) for layer in decoder_layers(head.causal_lm(model)) for p in layer.parameters()}
    counts = [(kernels.numel(p), id(p) in inner) for p in model.parameters()]
    shallow, whole = sum(n for n, _ in counts), sum(n * (deeper if of else 1) for n, of in counts)
    with ledger.entered("train"), patch.object(kernels, "WORTH", kernels.WORTH * shallow / whole):
        made = loop.Loop(model, run)
        facts |= planned(run)
        widest = max(run.batches, key=lambda examples: width(examples, run))
        for _ in range(2):  # the first makes the moments, the second begins with them
            for done in ("step", "micro-batch", "token"):
                ledger.work.pop(done, None)
            run.sampled, ledger.doing = 0, "step"
            made.step(widest)
            for state in made.optimizer.state.values():
                ledger.is_part("optimizer", state)
        ledger.doing = ""
        facts |= {"optimizer_bytes": optimizer_bytes(made.optimizer), "traced_tokens": run.tokens}
        facts["sampled"] = run.sampled * run.steps
        if run.splits["validation"] and run.hp.validations:
            first = next(iter(batches_of(run.splits["validation"], run.hp.eval_batch_size)))
            with run.meter.phase("validate"):
                ledger.doing = "validate"
                evaluation.likelihoods(model, first, run)
                ledger.doing = ""
    made.kernels.close()
    del made
    model.zero_grad()
    weights.put_back(types)
    facts["saved_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    try:
        return method.keep(model, run), facts
    except Exception:  # what it is kept as goes through files, which tensors without values have not
        return model, facts


def planned(run) -> dict[str, int]:
    """How many micro-batches the training has, and tokens in them, padding included."""
    key = (*same(run), bool(run.shapes and run.shapes.packed), "planned")
    if key not in KNOWN:
        count = held = 0
        for step in run.batches:
            for part in run.micro_batches(step):
                longest = max(e.length for e in part)
                if run.shapes:
                    shape = run.shapes.of(part, sum(learned_tokens(e, True) for e in part))
                    held += shape.tokens * (1 if shape.rows else len(part))
                else:
                    held += longest * len(part)
                count += 1
        KNOWN[key] = {"steps": run.steps, "micro_batches": count, "micro_tokens": held}
    return KNOWN[key]


def parts(model, ledger) -> None:
    """What is trained and was not there before is an adapter."""
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.is_part("weights" if id(tensor) in ledger.base else "adapters", tensor)
        if tensor.requires_grad and ledger.phase != "load":
            tensor.register_hook(lambda gradient: ledger.is_part("gradients", gradient))
        if getattr(tensor, "quant_state", None):
            ledger.is_part("weights", list(tensor.quant_state.as_dict(packed=True).values()))


def width(examples: list[Example], run) -> tuple[int, int]:
    """By which a step is the widest: the tokens of its largest micro-batch."""
    parts = run.micro_batches(examples)
    if run.shapes and run.shapes.packed:
        return max(sum(e.length for e in part) for part in parts), len(parts)
    return max(len(part) * max(e.length for e in part) for part in parts), len(parts)


def evaluated(model, run) -> dict:
    """The first batch of the likelihoods, and the first prompts and a step of the decoder. -> how often."""
    scored, ledger, hp = run.scored or run.splits["validation"], run.ledger, run.hp
    if not scored:
        return {}
    first = next(iter(batches_of(scored, hp.eval_batch_size)))
    model.eval()
    gc.collect()  # as a meter does between phases
    with run.meter.phase("evaluate"):
        ledger.doing = "evaluate"
        evaluation.likelihoods(model, first, run)
        ledger.doing = ""
    read = sum(e.length for e in scored) + (hp.validations + 1) * sum(
        e.length for e in run.splits["validation"]
    )
    devices = run.devices.count
    facts = {"evaluated": read / devices / sum(e.length for e in first), "reads": 0, "tokens_written": 0}
    lengths = sorted((len(e.prompt_ids) for e in scored if e.prompt_ids), reverse=True)[::devices]
    if not lengths:
        return facts
    count, longest = min(hp.eval_batch_size, len(lengths)), lengths[0]
    most = min(count, max(1, READ // longest))
    with run.meter.phase("generate"), torch.inference_mode(), run.accelerator.autocast():
        try:
            engine = Engine(model, count, longest, hp.max_new_tokens, [0])
            ledger.doing = "read"
            engine.read([[0] * length for length in lengths[:most]], [*range(most)], [*range(most)])
            ledger.doing = "token"
            engine.step()
        except Exception as error:  # what the engine cannot decode is generated otherwise
            facts["undecoded"] = f"{type(error).__name__}: {error}"[:200]
        ledger.doing = ""
    facts["reads"] = -(-len(lengths) // most)
    facts["tokens_written"] = -(-len(lengths) // count) * hp.max_new_tokens
    return facts


def drawn(config, dtype, quantization_config=None, **_):
    """The base model, as it would be loaded."""
    from transformers.initialization import no_init_weights

    with _disable_current_modes(), no_init_weights():  # it is tied before it is loaded
        with torch.device(CARD):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.tie_weights()
        return model if quantization_config is None else quantised(model, quantization_config, dtype)


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
            settings = {
                n: getattr(own, n)
                for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            }
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

    def copied(self, memo):
        settings = {**vars(self), "quant_state": self.quant_state}
        return Params4bit(self.data.clone(), self.requires_grad, **settings)

    return patch.multiple(Params4bit, to=to, __deepcopy__=copied)


def shapes_of(run, packed: bool) -> Shapes:
    """As they will be cut: the same for all methods of a comparison."""
    key = *same(run), packed, "shapes"
    if key not in KNOWN:
        steps = [run.devices.share(step, lambda example: example.length) for step in run.batches]
        KNOWN[key] = Shapes([step for step in steps if step], run.hp, packed=packed)
    return KNOWN[key]


def same(run) -> tuple:
    hp = run.hp
    return id(run.batches.examples), run.seed, *(getattr(hp, name) for name in SHAPING)


SHAPING = ("batch_size", "micro_batch_size", "max_length", "max_steps", "epochs", "packing", "devices")
KNOWN: dict[tuple, Any] = {}
