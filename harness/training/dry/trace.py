"""One run on a card that is not there: its load, its attach, two steps, its evaluation, by their own code."""

import gc
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import masking_utils

from harness.data import Example, batches_of
from harness.method import Method, Unsupported
from harness.record import EAGER, TIMED, Phase, RunRecord
from harness.spec import RunSpec
from harness.training import evaluation, head, kernels, loop, weights
from harness.training.devices import Devices
from harness.training.dry.ledger import Ledger, Moment
from harness.training.dry.model import drawn, params4bit, shallow
from harness.training.dry.programs import Programs
from harness.training.dry.run import (
    DryKernels,
    DryRun,
    WidestFirst,
    decoded,
    extent,
    few_forwards,
    padded,
    planned,
    width,
)  # fmt: skip
from harness.training.dry.world import CARD, Autocast, world
from harness.training.kernels import decoder_layers
from harness.training.loop import of_all_widths
from harness.work import Work


@dataclass
class Traced:
    """What a run holds and has to do with so many layers."""

    moments: dict[str, Moment]
    work: dict[str, Work]
    rung: str = EAGER
    reason: str | None = None
    saved_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # how often what was traced is done


def trace(
    spec: RunSpec, method: Method, config, rows: dict[str, list[Example]], bf16: bool, depth: int
) -> Traced:
    """Of a model with the first so many of its layers. Raises whatever the method's own hooks do."""
    ledger, layers = Ledger(), config.get_text_config().num_hidden_layers
    with world(), seen(ledger), ledger:
        run = opened(spec, method, shallow(config, depth), rows, bf16, ledger)
        run.programs = Programs(ledger)
        with ledger.entered("load"):
            model = method.load(run.loader)
            ledger.base = set(map(id, model.parameters()))
            parts(model, ledger)
        found = Traced({}, ledger.work, facts={"cannot": list(method.cannot)})
        if spec.trains:
            model = trained(model, run, layers / depth, found)
        else:
            model.requires_grad_(False)
        if not (spec.trial and spec.trains and method.objective == "sft"):
            found.facts |= evaluated(model, run)
        found.moments = ledger.moments()
    steps = run.record.kernels
    found.rung, found.reason = steps.rung or EAGER, steps.reason
    return found


def opened(spec, method, config, rows, bf16, ledger) -> DryRun:
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

    def plain(model):
        """Weights that are drawn lie on the card first, the head's apart from those that it will share."""
        if spec.model.startswith("random:"):
            first, last = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            beside = [torch.empty_like(last)] * (first is last)
            ledger.is_part("workspace", [*model.parameters(), *model.buffers(), *beside])

    def load(**more):
        model = drawn(config, torch.bfloat16 if bf16 else torch.float32, plain=plain, **more)
        ledger.is_part("workspace", [*model.parameters(), *model.buffers()])  # until it is the model at hand
        ledger.empty_cache()
        return model

    run = DryRun(
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


def trained(model, run: DryRun, deeper: float, found: Traced):
    """-> the model as it is kept. `deeper`: how many times as many layers the whole model has, which decides
    whether compiling pays."""
    method, ledger = run.method, run.ledger
    steps = list(run.batches)
    first = WidestFirst(run.batches, max(range(len(steps)), key=lambda i: width(steps[i], run)))
    with ledger.entered("attach"), patch.object(run, "batches", first), few_forwards(model, run):
        model = method.attach(model, run)
        types = weights.loaded_types(model)
        weights.master_weights(model, "bf16" if run.accelerator.mixed_precision == "bf16" else "fp32")
        weights.one_arithmetic(model, types)
        ledger.empty_cache()
    if not types:
        raise Unsupported("it attached nothing to train")
    parts(model, ledger)
    before = run.rollouts
    inner = {id(p) for layer in decoder_layers(head.causal_lm(model)) for p in layer.parameters()}
    counts = [(kernels.numel(p), id(p) in inner) for p in model.parameters()]
    shallow, whole = sum(n for n, _ in counts), sum(n * (deeper if of else 1) for n, of in counts)
    with ledger.entered("train"), patch.object(kernels, "WORTH", kernels.WORTH * shallow / whole):
        attached = [p.requires_grad for p in model.parameters()]
        made = loop.Loop(model, run)
        drawn = attached != [p.requires_grad for p in model.parameters()]
        order = sorted(steps, key=lambda step: width(step, run))
        within = made.kernels.within
        if within:  # what its first step has to do is in the backward
            order = order[-1:]
        # The first makes the moments, the second begins with them; what grows with tokens, two widths tell.
        for name, step in {"first step": order[0], "step": order[-1]}.items():
            ledger.work.pop("other", None)
            narrow = ledger.work.pop("micro-batch", Work()), run.traced
            run.widest = step is order[-1]
            with ledger.counted(name):
                made.step(step)
            for state in made.optimizer.state.values():
                ledger.is_part("optimizer", state)
        if within:
            ledger.work["first step"] += narrow[0] + ledger.work["micro-batch"] * -1
        elif 0 < narrow[1] < run.traced:
            ledger.work["narrow micro-batch"], found.facts["narrow_tokens"] = narrow
        found.facts |= often(model, run, order[-1], before) | {"renewed_every": method.renewed_every()}
        if "graph" in made.kernels.rung and (drawn or within):  # graphs are of what trains, and of no renewal
            found.facts["captured_again"] = len(made.kernels.shapes.sizes)
        if "graph" in made.kernels.rung:
            found.facts["shapes"] = len(made.kernels.shapes.sizes)
            sizes = sorted(size.tokens * size.sequences for size in made.kernels.shapes.sizes)
            ledger.beside_graphs(sizes[-2] / sizes[-1] if len(sizes) > 1 else 0)
        if run.splits["validation"] and run.hp.validations:
            with run.meter.phase("validate"):
                evaluation.likelihoods(model, largest(run.splits["validation"], run), run)
    made.kernels.close()
    del made
    model.zero_grad()
    weights.put_back(types)
    found.saved_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    try:
        return method.keep(model, run)
    except Exception:  # what it is kept as goes through files, which tensors without values have not
        return model


def often(model, run: DryRun, step: list[Example], before: tuple[int, int]) -> dict[str, Any]:
    """How much of what the traced step did the training does, and of the decoder's rollouts. `before`: those
    that a method's start has made."""
    again = [(now - start) / 2 * run.steps for now, start in zip(run.rollouts, before, strict=True)]
    reads, tokens = (start + more for start, more in zip(before, again, strict=True))
    some = of_all_widths(run)
    rows = [sum(counts) for counts in zip(*(padded(one, run) for one in some), strict=True)]
    made = [now / one for now, one in zip(run.prepared, padded(step, run), strict=True)]
    if not any(again):  # what it draws is all as long; rows may be longer than those that they are made of
        with run.ledger.counted("other"), suppress(Exception):  # a plugin's, who plans no more steps than are
            prepared = [extent(copy(run.method).prepare(model, one, run)) for one in some]
            made = [sum(counts) / one for counts, one in zip(zip(*prepared, strict=True), rows, strict=True)]
    batches, held = (of * whole for of, whole in zip(made, planned(run), strict=True))
    return {
        "steps": run.steps, "traced_tokens": run.traced, "micro_batches": batches, "micro_tokens": held,
        "timed": [of * one / TIMED for of, one in zip(made, rows, strict=True)],
        "rollout_reads": reads, "rollout_tokens": tokens, "rolls_out": any(again),
    }  # fmt: skip


def parts(model, ledger) -> None:
    """What is trained and was not there before is an adapter."""
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.is_part("weights" if id(tensor) in ledger.base else "adapters", tensor)
        if tensor.requires_grad and ledger.phase != "load":
            tensor.register_hook(lambda gradient: ledger.is_part("gradients", gradient))
        if getattr(tensor, "quant_state", None):
            ledger.is_part("weights", list(tensor.quant_state.as_dict(packed=True).values()))


def evaluated(model, run: DryRun) -> dict[str, float]:
    """The largest batch of the likelihoods, and the first prompts and a step of the decoder. -> how often."""
    validation, hp = run.splits["validation"], run.hp
    asked = [split for split in (run.scored or validation, run.splits.get("unseen")) if split]
    if not asked:
        return {}
    if run.record.spec.trains and not run.method.starts_at_base and not run.record.spec.trial:
        asked.insert(0, asked[0])  # its own start is scored, too
    model.eval()
    gc.collect()  # as a meter does between phases
    batch = max((largest(rows, run) for rows in asked), key=evaluation.cells)
    with run.meter.phase("evaluate"):
        evaluation.likelihoods(model, batch, run)
    read = [*asked, *[validation] * (hp.validations + 1) * run.record.spec.trains]
    cells = sum(evaluation.cells(b) for rows in read for b in batches_of(rows, hp.eval_batch_size))
    with run.meter.phase("generate"):
        found = [decoded(model, run, rows, hp.eval_batch_size, hp.max_new_tokens) for rows in asked]
    for name in ("generate read", "generate token"):
        run.ledger.work[name] *= 1 / max(1, sum(reads > 0 for reads, _ in found))  # of one of them
    reads, tokens = (sum(counts) for counts in zip(*found, strict=True))
    share = cells / run.devices.count
    return {"evaluated": share / evaluation.cells(batch), "reads": reads, "tokens_written": tokens}


def largest(examples: list[Example], run: DryRun) -> list[Example]:
    """Of the batches of an evaluation."""
    return max(batches_of(examples, run.hp.eval_batch_size), key=evaluation.cells)


@contextmanager
def seen(ledger):
    """Within, the one loop computes by `DryKernels`, and the ledger sees head and optimizer apart."""
    own, masked = head.LogProbabilities.forward, masking_utils._ignore_causal_mask_sdpa

    def unmasked(mask, *args, **kwargs):  # a card is asked for its values
        return masked(None if mask is not None and ledger.filled.get(mask.shape) else mask, *args, **kwargs)

    def forward(ctx, *args):
        with ledger.making("head", "head"):
            return own(ctx, *args)

    back = head.LogProbabilities.backward

    def backwards(ctx, grad):
        with ledger.making("head"):
            return back(ctx, grad)

    with (
        patch.object(loop, "Kernels", DryKernels),
        patch.object(head.LogProbabilities, "forward", staticmethod(forward)),
        patch.object(head.LogProbabilities, "backward", staticmethod(backwards)),
        patch.object(torch.cuda, "empty_cache", ledger.empty_cache),
        patch.object(masking_utils, "_ignore_causal_mask_sdpa", unmasked),
        params4bit(),
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
