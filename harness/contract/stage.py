"""What a method is tried with: a small model, some rows, and a training of some steps."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness import method as methods
from harness.child import chosen_method
from harness.data import Example, Template
from harness.errors import brief
from harness.measuring import Meter
from harness.method import Method
from harness.record import RunRecord
from harness.spec import Dataset, RunSpec
from harness.training import (
    Loop,
    Run,
    likelihoods,
    load_base,
    loaded_types,
    master_weights,
    one_arithmetic,
    put_back,
    read_data,
    seed_everything,
    stop_tokens,
)

STEPS = 4  # of a training: enough to stop in it, and to move what moves slowly
ROWS: Dataset = {"train": 64, "validation": 0, "test": 4}  # of the dataset
ANSWER = 8  # tokens of a greedy answer, at most: where two models part, they do so early
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Wrong(Exception):
    """What a hook gave that cannot be used; the text says what to change."""


class NotTried(Exception):
    """Why a check can say nothing."""


def once(make: Callable) -> Callable:
    """What several checks look at is made once; where it fails, it fails for all of them."""

    @wraps(make)
    def made(stage):
        if make not in stage.made:
            try:
                stage.made[make] = make(stage), None
            except (Exception, SystemExit) as failure:
                stage.made[make] = None, failure
        value, error = stage.made[make]
        if error:
            raise error
        return value

    return made


@dataclass
class Training:
    """A training, from after its `attach`."""

    loop: Loop
    types: dict  # trained parameter -> the type that it was loaded in
    before: dict  # name -> value of each parameter
    leaves: list = field(default_factory=list)  # the tensors that the first loss has gradients for
    entries: list[dict] = field(default_factory=list)  # what each step gave
    after: dict = field(default_factory=dict)  # as before, after the last step
    moved: set = field(default_factory=set)  # names of what differed from before after some step

    def go(self, steps: int) -> "Training":
        """On, until so many are done."""
        examples = list(self.loop.run.batches)
        while self.loop.done < steps:
            entry = self.loop.step(examples[self.loop.done])
            self.entries.append({n: v.item() if hasattr(v, "item") else v for n, v in entry.items()})
            self.after = values(self.loop.model)
            self.moved |= {n for n, value in self.after.items() if not torch.equal(value, self.before[n])}
        return self

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.entries]


class Stage:
    """The method of a spec, and what it is tried with: a small model and its rows, always on the CPU, where
    the same sums have the same bits."""

    accelerator: Accelerator  # of the precision that is tried at the time

    def __init__(self, spec: RunSpec, template: Template, splits: dict[str, list[Example]]):
        hp = replace(spec.hp, max_steps=STEPS, validations=0, max_new_tokens=ANSWER)
        self.spec, self.template, self.splits = replace(spec, hp=hp), template, splits
        self.sources = methods.known_methods(spec.locations.get("plugins", []))
        self.cls = methods.resolve(spec.method, methods.find(spec.method, self.sources))
        self.made: dict = {}

    @classmethod
    def of(cls, spec: RunSpec) -> "Stage":
        """Of a plan's spec, with some of its rows."""
        spec = replace(spec, dataset={**spec.dataset, **ROWS})
        record = RunRecord(spec, "failed")
        hp = chosen_method(spec, record).own(spec.hp)  # raises Unsupported where a package is missing
        return cls(spec, *read_data(spec, hp, record))

    def method(self) -> Method:
        return methods.build(self.cls, self.spec.options)

    def load_base(self, **more):
        bf16 = self.accelerator.mixed_precision == "bf16"
        return load_base(self.spec, torch.bfloat16 if bf16 else torch.float32, torch.device("cpu"), **more)

    def begun(self) -> Training:
        """A training before its first step, always from the same random state."""
        seed_everything(self.spec.seed)
        method = self.method()
        model = a_model(method.load(self.load_base), "load")
        run = self.run(method, model)
        model = a_model(method.attach(model, run), "attach")
        types = loaded_types(model)
        if not types:
            raise Wrong(
                "attach left nothing to train: no parameter of the model has requires_grad. Register what is "
                "to be trained as parameters of the model, and set their requires_grad"
            )
        master_weights(model, run.accelerator.mixed_precision)
        one_arithmetic(model, types)
        before, leaves = values(model), watch(method)
        return Training(Loop(model, run), types, before, leaves)

    def run(self, method: Method, model) -> Run:
        return Run(
            method, method.own(self.spec.hp), self.spec.seed, self.splits,
            dataset=self.spec.dataset, template=self.template,
            stops=stop_tokens(self.template, model, self.splits["train"]),
            accelerator=self.accelerator, meter=Meter(torch.device("cpu")), load_base=self.load_base,
            record=RunRecord(self.spec, "failed"),
        )  # fmt: skip

    @once
    def trained(self) -> Training:
        return self.begun().go(STEPS)

    @once
    def kept(self):
        """-> the trained model as it is kept, and its outputs."""
        training = self.trained()
        run = training.loop.run
        training.loop.model.zero_grad()
        put_back(training.types)
        model = a_model(run.method.keep(training.loop.model, run), "keep")
        return model, outputs(model, run)

    @once
    def restored(self):
        """-> a method and the model that it made of what was saved."""
        model, _ = self.kept()
        with TemporaryDirectory() as folder:
            self.trained().loop.run.method.save(model, Path(folder))
            files = [p for p in Path(folder).rglob("*") if p.is_file()]
            pickled = [p.name for p in files if p.suffix in PICKLED]
            if pickled or not any(p.suffix == ".safetensors" for p in files):
                found = ", ".join(pickled or sorted(p.name for p in files)) or "nothing"
                raise Wrong(f"save wrote {found}: write tensors with safetensors.torch.save_file alone")
            method = self.method()
            return method, a_model(method.restore(self.load_base, Path(folder)), "restore")


def a_model(value, hook: str):
    if not isinstance(value, torch.nn.Module):
        raise Wrong(f"{hook} gave {brief(value)}: it must return the model")
    return value


def watch(method: Method) -> list[torch.Tensor]:
    """Looks at a method's loss, from outside. -> what the first one will have gradients for."""
    loss = method.loss
    leaves: list[torch.Tensor] = []

    def watched(model, batch, run):
        value = loss(model, batch, run)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            given = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else brief(value)
            raise Wrong(
                f"loss gave {given}: it must return a scalar tensor that has gradients, the batch's mean"
            )
        leaves.extend([] if leaves else leaves_of(value))
        return value

    vars(method)["loss"] = watched
    return leaves


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """What a loss has gradients for, whoever holds it."""
    found, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead += [before for before, _ in node.next_functions]
    return found


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def log_probabilities(model, run: Run) -> torch.Tensor:
    """Of the answers of some training rows."""
    with torch.no_grad(), run.accelerator.autocast():
        return run.token_logps(model.eval(), run.collate(run.splits["train"][:4], history=False))


def outputs(model, run: Run) -> dict:
    some = run.splits["train"][:4]
    return {
        "log-probabilities": log_probabilities(model, run),
        "likelihoods": likelihoods(model, some, run),
        "greedy answers": run.decoder.answers(model, some),
    }


@contextmanager
def computing(precision: str):
    """-> an accelerator that computes in `no` (fp32) or `bf16`: accelerate has one precision a process."""
    AcceleratorState._reset_state(True)
    try:
        yield Accelerator(cpu=True, mixed_precision=precision)
    finally:
        AcceleratorState._reset_state(True)
