"""The checks, in the order of a run.

Each says in its docstring what it holds. It returns None where that is so, else what is wrong, with its
numbers and names, and what to change.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch

from harness import ROOT
from harness import method as methods
from harness.contract.stage import STEPS, NotTried, Stage, Wrong, a_model, log_probabilities, outputs
from harness.method import Unsupported
from harness.training import Reading, packed, prepare_model, resume, snapshot, unpacked

STOP = 3  # steps before a stop: in the middle of what goes by twos
SAME = 1e-4  # in fp32, of log-probabilities and losses: what differs by less, differs by rounding alone
SAVED = 1e-5  # in fp32, of log-probabilities: weights that were saved are the same, and hardly round
NAMED = 3  # names that a finding has room for


def card(stage: Stage) -> str | None:
    """its card has what the report prints"""
    said: Mapping = methods.card(stage.cls)
    lacks = [f"`{n.capitalize()}:`" for n in ("performance", "efficiency", "generalisation")
             if n not in said["why"]]  # fmt: skip
    lacks += [what for name, what in (("summary", "a first line `Title: one line`"),
                                      ("formula", "a formula, indented by four spaces"),
                                      ("paper", "a line that cites its paper, with the year"))
              if not said[name]]  # fmt: skip
    return f"the docstring of the file lacks {', '.join(lacks)}: see a file of methods/" if lacks else None


WITHOUT_TORCH = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(torch=None, transformers=None)
from harness import method
name, *plugins = sys.argv[2:]
method.resolve(name, method.find(name, method.known_methods(plugins)))
"""


def without_torch(stage: Stage) -> str | None:
    """its file can be read where torch is not installed"""
    name = stage.spec.method.partition(".")[0]  # a family's file; its variants are its library's
    plugins = stage.spec.locations.get("plugins", [])
    child = subprocess.run([sys.executable, "-P", "-c", WITHOUT_TORCH, str(ROOT), name, *plugins],
                           capture_output=True, text=True)  # fmt: skip
    if not child.returncode:
        return None
    lines = re.findall(r'"([^"]+)", line (\d+)', child.stderr)
    own = [n for file, n in lines if file in map(os.path.abspath, plugins)]
    where = f", line {own[-1]}" if own else ""
    return (
        f"its import fails{where}: {child.stderr.strip().rpartition(chr(10))[2]}. Import torch and other "
        "libraries inside of the hooks: plan and report read the file without them"
    )


def start(stage: Stage) -> str | None:
    """it starts at its baseline, or says that it does not"""
    training = stage.begun()
    run, claims = training.loop.run, training.loop.run.method.starts_at_base
    baseline = methods.resolve(stage.cls.baseline, methods.find(stage.cls.baseline, stage.sources))()
    untouched = log_probabilities(baseline.load(stage.load_base), run)
    difference = apart(log_probabilities(training.loop.model, run), untouched)
    if (difference < SAME) == claims:
        return None
    if claims:
        return (
            f"attached, its log-probabilities are up to {difference:.3g} from those of {stage.cls.baseline}. "
            "Start what is trained so that it changes nothing (zeros), or declare starts_at_base = False: "
            "then its own start is scored before the first step"
        )
    return f"it starts at {stage.cls.baseline} (to {difference:.1g}): delete starts_at_base = False"


def frozen(stage: Stage) -> str | None:
    """what is frozen stays as it was, to the bit"""
    training = stage.trained()
    model = training.loop.model
    # A module may write what it trains into its own frozen weight, as sparse tuning does.
    writes = {n for n, m in model.named_modules()
              if any(p in training.types for p in m.parameters(recurse=False))}  # fmt: skip
    moved = [n for n, p in model.named_parameters()
             if p not in training.types and n in training.before and n.rpartition(".")[0] not in writes
             and not torch.equal(training.before[n], training.after[n])]  # fmt: skip
    if moved:
        most = max(apart(training.before[n].float(), training.after[n].float()) for n in moved)
        return (
            f"{len(moved)} parameters that attach left frozen have moved, by up to {most:.3g}: {some(moved)}"
            ". Set requires_grad in attach on all that trains, and write into no other weight"
        )


def moves(stage: Stage) -> str | None:
    """what is trained moves"""
    training = stage.trained()
    named = training.loop.model.named_parameters()
    trained = {n for n, p in named if p in training.types and p.requires_grad}
    still = trained - training.moved
    if still:
        return (
            f"{len(still)} of {len(trained)} trained parameters did not move in {STEPS} steps: {some(still)}"
            ". Freeze in attach what the loss does not reach, or give it to the optimizer"
        )


def inside(stage: Stage) -> str | None:
    """what is trained is part of the model"""
    training = stage.trained()
    given = [p for group in training.loop.optimizer.param_groups for p in group["params"]]
    own = {id(p) for p in training.loop.model.parameters()}
    strange = {id(t): str(tuple(t.shape)) for t in [*training.leaves, *given] if id(t) not in own}
    if strange:
        return (
            f"tensors are trained that are no parameters of the model ({len(strange)}, of shape "
            f"{some(strange.values())}): they are not counted, clipped, held in fp32 or saved. "
            "Put them into the model in attach, as model.NAME = nn.ParameterList(...), and let a hook read "
            "them there"
        )


def repeats(stage: Stage) -> str | None:
    """the same seed gives the same curve, of finite numbers"""
    first = stage.trained().losses
    for step, loss in enumerate(first, 1):
        if not abs(loss) < float("inf"):
            return f"the loss of step {step} is {loss}: look for a division by 0 or a log of it in the loss"
    for step, pair in enumerate(zip(first, stage.begun().go(STEPS).losses, strict=True), 1):
        if pair[0] != pair[1]:
            return (
                f"the loss of step {step} was {pair[0]:.8g}, then {pair[1]:.8g}. Draw with torch or "
                "run.rng, which are seeded, and keep nothing on the class or the module from run to run"
            )


def reads(stage: Stage) -> str | None:
    """it reads and learns the tokens that were planned, and is seen to"""
    loop = stage.trained().loop
    if not loop.reading.hashes():
        return (
            "its loss goes past run.token_logps, so that what it read is not certified. Write it over "
            "run.token_logps(model, batch), the log-probability of each target"
        )
    if stage.cls.objective != "sft":
        return None
    planned = Reading()
    for examples in loop.run.batches:
        batches = [loop.run.collate(part) for part in loop.run.micro_batches(examples)]
        for batch in batches:
            planned(batch)
        planned.end_step(batches)
    expected, found = planned.hashes(), loop.reading.hashes()
    for i, (what, said) in enumerate({"given": "was given", "learned": "learned"}.items()):
        differ = [
            n for n, pair in enumerate(zip(expected[what], found[what], strict=True)) if len(set(pair)) > 1
        ]
        if differ:
            wanted, read = (int(reading.steps[differ[0]][2 + i]) for reading in (planned, loop.reading))
            other = "others than" if read == wanted else "not"
            return (
                f"in step {differ[0] + 1} the model {said} {read} tokens, {other} the {wanted} of the plan. "
                "Read each batch as run.collate made it, once a step; a method that learns from other text "
                "than the references declares another objective"
            )


def accumulates(stage: Stage) -> str | None:
    """a step that is cut into micro-batches is the same step, or it cannot accumulate and says so"""
    rows = stage.spec.hp.batch_size
    if rows < 2:
        raise NotTried("a step of one row cannot be cut: set hp.batch_size to 2 or more")
    if "accumulation" in stage.cls.cannot:
        return None
    if difference := first_step_differs(stage, micro_batch_size=rows // 2):
        if drawn_at_random(stage):
            raise NotTried("its loss is drawn at random, anew for each micro-batch")
        return (
            f"in two micro-batches {difference}. Let loss be a mean over what mean_over says (now "
            f"{stage.cls.mean_over}: tokens or rows) and change no weight before the step, or declare "
            'cannot = {"accumulation": "why"}'
        )


def recomputes(stage: Stage) -> str | None:
    """gradient checkpointing changes no step, or it cannot do that and says so"""
    if "gradient checkpointing" in stage.cls.cannot:
        return None
    if difference := first_step_differs(stage, gradient_checkpointing=True):
        return (
            f"with gradient checkpointing {difference}. A layer is run twice then: let its hooks do the same "
            'both times, or declare cannot = {"gradient checkpointing": "why"}'
        )


def first_step_differs(stage: Stage, **changes) -> str | None:
    """Of two steps from the same attached model, the second one with these hyperparameters."""
    other = stage.begun()
    run = other.loop.run
    run.hp = replace(run.hp, **changes)
    prepare_model(other.loop.model, run.hp)
    expected, (found,) = stage.trained().entries[0], other.go(1).entries
    for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
        if None in (expected[name], found[name]):
            continue
        if not abs(expected[name] - found[name]) <= SAME * max(1, abs(expected[name])):
            return f"{what} of the first step is {found[name]:.6g}, not {expected[name]:.6g}"


def drawn_at_random(stage: Stage) -> bool:
    """Whether the same model has another loss on the same batch."""
    loop = stage.begun().loop
    batch = loop.run.method.prepare(loop.model, next(iter(loop.run.batches)), loop.run)[0]
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(loop.run.method.loss(loop.model, batch, loop.run).item())
    return losses[0] != losses[1]


def continues(stage: Stage) -> str | None:
    """stopped and continued in fresh objects, it has the same losses and weights, to the bit"""
    whole, stopped = stage.trained(), stage.begun().go(STOP)
    kept = carried(snapshot(stopped.loop))
    fresh = stage.begun()
    resume(fresh.loop, kept)
    loss = fresh.go(STEPS).losses[-1]
    remedy = (
        "Give in state() what the method keeps from one step to the next (counters, draws, averages) and "
        "take it in restore_state; what the optimizer keeps lies in its state; run.rng is kept for you"
    )
    if loss != whole.losses[-1]:
        return f"stopped after step {STOP}, its next loss is {loss:.8g}, not {whole.losses[-1]:.8g}. {remedy}"
    moved = [n for n, value in whole.after.items() if not torch.equal(value, fresh.after[n])]
    if moved:
        return f"stopped after step {STOP}, the next step moves {some(moved)} otherwise. {remedy}"


NAMES = {"method": "state()"}  # of what a method is asked for itself


def carried(state: dict) -> dict:
    """As safetensors and JSON give a state back."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        text = json.dumps({"dict": [[k, packed(v, tensors, NAMES.get(k, k))] for k, v in state.items()]})
    except TypeError as error:
        raise Wrong(f"{error}. Give tensors, texts, numbers, and lists and dicts of them") from error
    return unpacked(json.loads(text), tensors)


def saved(stage: Stage) -> str | None:
    """saved as safetensors and restored, it has the same outputs"""
    (_, expected), (_, model) = stage.kept(), stage.restored()
    difference = apart(log_probabilities(model, stage.trained().loop.run), expected["log-probabilities"])
    if not difference <= SAVED:
        return f"restored, its log-probabilities are up to {difference:.3g} from the saved model's. {AGAIN}"


AGAIN = (
    "Let save write all that was trained, and restore do again what attach did to the model, hooks included, "
    "and read it"
)


def merged(stage: Stage) -> str | None:
    """merged, a plain model has the same outputs, or it cannot merge and says so"""
    method, model = stage.restored()
    run, declared = stage.trained().loop.run, "merging" in method.cannot
    expected = log_probabilities(model, run)
    try:
        model = a_model(method.merge(model), "merge")
    except Unsupported:
        return None if declared else 'merge raises Unsupported: declare it as cannot = {"merging": "why"}'
    if declared:
        return 'merge works: delete cannot["merging"], or let merge raise Unsupported with its reason'
    refuse = 'or let it raise Unsupported("why") and declare cannot = {"merging": "why"}'
    plain = stage.load_base()
    names, own = set(plain.state_dict()), set(model.state_dict())
    if names != own:
        what = f"still has {some(own - names)}" if own - names else f"lacks {some(names - own)}"
        return f"the merged model {what}: let merge put all into the weights of a plain model, {refuse}"
    plain.load_state_dict(model.state_dict())
    if not (difference := apart(log_probabilities(plain, run), expected)) <= SAME:
        return f"merged, its log-probabilities change by up to {difference:.3g}: let merge be exact, {refuse}"


def kept_in_bf16(stage: Stage) -> str | None:
    """in bf16 the model that is scored is the one that is kept, to the bit"""
    (_, expected), (_, model) = stage.kept(), stage.restored()
    found = outputs(model, stage.trained().loop.run)
    if torch.equal(found["log-probabilities"], expected["log-probabilities"]) and all(
        found[name] == expected[name] for name in ("likelihoods", "greedy answers")
    ):
        return None
    difference = apart(found["log-probabilities"], expected["log-probabilities"])
    other = [name for name in ("likelihoods", "greedy answers") if found[name] != expected[name]]
    return (
        f"in bf16 the restored model has other {' and '.join(other) or 'log-probabilities'} (by up to "
        f"{difference:.3g}). {AGAIN}, in the types that it was scored in; what changes the model's form for "
        "good belongs into keep, before it is scored"
    )


BF16 = {"residual stream": "bfloat16", "products": "bfloat16"}


def computed_in_bf16(stage: Stage) -> str | None:
    """in bf16 it is trained in the same arithmetic as all others"""
    found = stage.trained().loop.run.record.arithmetic["training"]
    other = [f"{what}: {found[what]}" for what in BF16 if found[what] != BF16[what]]
    if other:
        return (
            f"in bf16 the types of the {'; '.join(other)}. Give what a hook adds to a state the type of the "
            "state, as .to(h.dtype)"
        )


CHECKS = {  # by what is computed in
    "no": (
        card, without_torch, start, frozen, moves, inside, repeats, reads, accumulates, recomputes,
        continues, saved, merged,
    ),
    "bf16": (computed_in_bf16, kept_in_bf16),
}  # fmt: skip


NEEDS = {  # what says nothing of a method that another check has found wrong
    accumulates: repeats, recomputes: repeats, continues: repeats, merged: saved, kept_in_bf16: saved,
}  # fmt: skip


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def some(names) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
