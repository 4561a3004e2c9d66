"""What is asked: the hyperparameters of a comparison and the spec of one run, with its digest.

Standard library only: a spec can be made, compared and hashed where nothing else is installed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Required, TypedDict

from harness.shape import Count, Fraction, Natural, NotNegative, Positive, check


@dataclass(frozen=True)
class Hyperparams:
    """Shared by every method of a comparison. A method that must differ declares an override."""

    learning_rate: Positive = 2e-4  # peak, per step; QLoRA's value for 7B models
    epochs: NotNegative = 1.0  # passes over the training rows; 0 leaves the model untouched
    max_steps: Count = 0  # optimizer steps; 0: as many as the epochs hold
    batch_size: Natural = 16  # rows per optimizer step; QLoRA's value
    micro_batch_size: Natural = 16  # rows per forward; less than batch_size accumulates
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the rate after the warm-up, down to 0
    warmup_ratio: Fraction = 0.03  # share of the steps with a rising learning rate
    weight_decay: NotNegative = 0.0  # decoupled, per step, times the learning rate
    beta1: Fraction = 0.9  # AdamW's own defaults, as in torch
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    max_grad_norm: NotNegative = 1.0  # clips the norm over all trained parameters; 0: never
    gradient_checkpointing: bool = False  # recompute activations: less memory, about 4/3 the time
    packing: bool = False  # several rows share a sequence of max_length: less padding, the same steps
    validations: Count = 4  # points of the validation curve after the first
    # Of the steps on a GPU; auto: captured as graphs where they can be, and compiled where that pays.
    kernels: Literal["auto", "compiled", "eager"] = "auto"
    devices: Natural = 1  # that one run computes on: each reads its share of every step's rows
    # Of what is trained, with gradients and moments; full: each device holds a part of it, else all of it.
    sharding: Literal["none", "full"] = "none"
    memory_cap: NotNegative = 0.0  # GiB of the card that torch may take, as of a smaller one; 0: all
    # What follows also holds for an untouched model: it decides how a run is evaluated.
    # Of the arithmetic; auto: bf16 where the device truly has it, else fp32.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    max_length: Natural = 512  # tokens of a row, prompt and response; the rest is cut and counted
    max_new_tokens: Natural = 128  # tokens of a generated answer
    eval_batch_size: Natural = 32  # rows per evaluation batch; the same for all, as it can change text

    def untrained(self) -> "Hyperparams":
        """The same evaluation with no training at all: what a base row is asked."""
        kept = {name: getattr(self, name) for name in (*EVALUATION, "kernels", "devices")}
        return replace(Hyperparams(epochs=0.0), **kept)


def hashed(hp: Hyperparams) -> dict:
    """As a spec is hashed: without what came later and is as it was before."""
    return {name: value for name, value in asdict(hp).items() if name not in LATER or value != LATER[name]}


LATER = {"kernels": "auto", "devices": 1, "sharding": "none", "memory_cap": 0.0}


EVALUATION = ("precision", "max_length", "max_new_tokens", "eval_batch_size")


class Part(TypedDict, total=False):
    """Where the rows of a part come from, as far as a reader of records relies on it."""

    name: Required[str]
    title: str
    hub: str
    licence: str
    format: str
    mapping: str


class Dataset(TypedDict, total=False):
    name: str
    title: str
    notice: str
    template: str
    language: str
    reward: str
    train: int
    validation: int
    test: int
    parts: list[Part]


ENSEMBLE = "ensemble"  # in the place of a method's name: finished runs, together
OUTPUTS, WEIGHTS = "outputs", "weights"  # what of them is averaged: log-probabilities, or changes of weights


class Member(TypedDict):
    """What tells a member of an ensemble from the others."""

    method: Required[str]
    options: Required[dict[str, Any]]
    changes: Required[dict[str, Any]]


class Averaged(TypedDict):
    """The options of an ensemble."""

    members: Required[list[Member]]
    average: Required[Literal["outputs", "weights"]]


@dataclass(frozen=True)
class RunSpec:
    """One method, one seed: everything that decides the result, and nothing else.

    `changes`: hyperparameters of this arm's own, in place of the shared ones; `reason`, which is not hashed,
    says why. `search`: of a trial, which sees the validation rows alone, the options that its search began
    with. `locations` says where things lie on this machine; it is neither hashed nor kept in a record.
    """

    method: str
    seed: Count
    model: str  # a hub id, or a local folder's name; "random:" before it: weights drawn, not trained
    dataset: Dataset  # its spec, whole
    hp: Hyperparams
    options: dict[str, Any] = field(default_factory=dict)  # the method's own options, defaults included
    fingerprints: dict[str, str] = field(default_factory=dict)  # of local files: model, sources
    locations: dict = field(default_factory=dict, compare=False)
    changes: dict[str, Any] = field(default_factory=dict)
    repeat: Count = 0  # above 0: the same run once more, to see what comes out apart without a reason
    search: dict[str, Any] | None = None
    reason: str = field(default="", compare=False)

    @property
    def untouched(self) -> bool:
        """The model as it is: no training stands behind it."""
        return not self.hp.epochs

    @property
    def members(self) -> list["RunSpec"]:
        """Of an ensemble, the runs that it is made of."""
        own = self.options["members"] if self.method == ENSEMBLE else []
        return [replace(self, **member) for member in own]

    @property
    def trains(self) -> bool:
        return not (self.untouched or self.method == ENSEMBLE)

    @property
    def devices(self) -> int:
        """That it computes on. An ensemble is held by one."""
        return 1 if self.method == ENSEMBLE else self.own_hp.devices

    @property
    def leaves_model(self) -> bool:
        """What is saved is new: averaged outputs are those of models that are saved already."""
        return self.trains or (self.method, self.options.get("average")) == (ENSEMBLE, WEIGHTS)

    @property
    def trial(self) -> bool:
        return self.search is not None

    @property
    def hub_model(self) -> str | None:
        """The model's id on the hub; null of a local folder, whose name could be another model's id."""
        return None if "model" in self.fingerprints or self.model.startswith("random:") else self.model

    @property
    def own_hp(self) -> Hyperparams:
        """The shared hyperparameters with this arm's changes."""
        return replace(self.hp, **self.changes)

    def asked(self) -> dict:
        """The spec as JSON values, without this machine's paths. What an arm may change is left out where it
        changes nothing, as before there were arms."""
        asked = asdict(self)
        asked["hp"] = hashed(self.hp)
        del asked["locations"], asked["reason"]
        if not self.changes:
            del asked["changes"]
        if not self.repeat:
            del asked["repeat"]
        if not self.trial:
            del asked["search"]
        return asked

    @property
    def digest(self) -> str:
        return digest(self.asked())

    @property
    def evaluation(self) -> str:
        """Equal for runs that are evaluated alike: what a base row shares with trained rows."""
        hp = {name: getattr(self.hp, name) for name in EVALUATION}
        return digest([self.model, self.dataset, self.fingerprints, hp])

    @property
    def comparison(self) -> str:
        """Equal for runs that belong in one table: all but seed, method, and its options and changes."""
        return digest([self.evaluation, hashed(self.hp)])

    @property
    def folder(self) -> str:
        return folder_name(self.asked())

    @classmethod
    def from_json(cls, value: dict) -> "RunSpec":
        known = {f.name for f in fields(Hyperparams)}
        if unknown := (set(value["hp"]) | set(value.get("changes", {}))) - known:
            raise ValueError(f"unknown hyperparameter {', '.join(sorted(unknown))}")
        if value["method"] == ENSEMBLE:
            check(value["options"], Averaged, "spec.options")
        return cls(**{**value, "hp": Hyperparams(**value["hp"])})


def folder_name(asked: dict) -> str:
    """Where the run of a spec is kept: two specs never share a folder, whatever they differ in."""
    return f"{asked['method']}-s{asked['seed']}-{digest(asked)}"


def digest(value) -> str:
    """12 hex digits of the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


WHOLE_BYTES = 2**26  # a file up to 64 MiB is hashed whole: well below a tenth of a second
BLOCKS = 64  # of a mebibyte, evenly over a larger file: its header and every few layers of a model


def fingerprint(path: str | Path) -> str:
    """Tells one local file or folder from another by names, sizes and content.

    Of a file above 64 MiB only evenly spaced blocks are read, as a large model would take a minute.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = []
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        found.append([name, file.stat().st_size, content_hash(file)])
    return digest(found)


def content_hash(file: Path) -> str:
    size, total = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            total.update(opened.read())
        else:
            for block in range(BLOCKS):
                opened.seek((size - 2**20) * block // (BLOCKS - 1))
                total.update(opened.read(2**20))
    return total.hexdigest()
