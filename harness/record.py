"""What was measured: the record of one run, JSON in and out.

Bytes, seconds and joules only. Unknown is null: never 0, never NaN.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Never, Required, TypedDict

from harness import migrate
from harness.metrics import METRICS
from harness.shape import Amount, Annotated, Count, check, parse
from harness.spec import RunSpec, digest, folder_name

SCHEMA = 2
STATUSES = ("ok", "oom_gpu", "oom_host", "diverged", "failed", "timeout", "interrupted", "unsupported")
PHASES = (
    "load", "attach", "compile", "train", "checkpoint", "rollout", "validate", "evaluate", "generate", "save",
)  # fmt: skip
TRAINING = ("attach", "train", "rollout")  # what a method's training time is made of
# What a card must have room for: compiled steps are compared with plain ones only where there is.
NEEDED = tuple(phase for phase in PHASES if phase != "compile")
TIMED = 4  # steps of a probe, its last, of which its seconds are taken
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}(\.\w{1,64})?", re.ASCII)  # of a method, or of a family's variant


@dataclass
class Phase:
    """The cost of one phase. Peaks are the highest over the phase, not the growth in it."""

    seconds: Amount = 0.0
    peak_allocated: Count | None = None  # bytes of live tensors: the method's own demand
    peak_reserved: Count | None = None  # bytes the allocator held, fragmentation included
    peak_device: Count | None = None  # bytes the card lost to this process, context included
    peak_host: Count | None = None  # bytes of resident memory of this process
    joules: Amount | None = None  # energy of the whole card


@dataclass
class Tokens:
    """What a training read; null where nothing was trained."""

    trained: Count | None = None  # by the model, in steps; padding is not in it
    attach: Count | None = None  # by the model, before the first step
    padded: Count | None = None
    supervised: Count | None = None  # those that carried loss
    sampled: Count | None = None  # made by the model, to be trained on
    rows: Count | None = None  # distinct ones


@dataclass
class Data:
    """What the dataset came to for this model."""

    rows: dict[str, Count] = field(default_factory=dict)  # split -> how many
    left_out: dict[str, Count] = field(default_factory=dict)  # why -> rows that were left out or cut
    refused: list[Any] = field(default_factory=list)  # some rows that could not be read, and why
    answered: dict[str, Count] = field(
        default_factory=dict
    )  # split -> rows whose prompt a training row answers
    unused: dict[str, list[str]] = field(default_factory=dict)  # part -> its columns that were not read
    revisions: dict[str, Any] = field(default_factory=dict)  # part -> of its source on the hub
    origins: dict[str, dict[str, str]] = field(default_factory=dict)  # part -> our split -> its source's
    template: str | None = None  # how a conversation was written
    loss: Literal["all", "last"] | None = None  # the answers of a conversation that carry loss
    plain_text: bool = False  # no row asks anything


@dataclass
class Sizes:
    """Of the model in training. Bytes are as they lie in memory."""

    parameters: Count | None = None  # a 4-bit weight counts its values
    trainable: Count | None = None
    weight_bytes: Count | None = None
    trainable_bytes: Count | None = None
    optimizer_bytes: Count | None = None
    saved_bytes: Count | None = None  # of the weights on disk; null where they were not saved


@dataclass
class Provenance:
    """With what a run was made: the code, the packages, the machine. By an allow-list."""

    version: str | None = None  # of Tuneoff
    commit: str | None = None  # of Tuneoff's own repository; null where it runs from no such
    dirty: bool | None = None  # the code was changed since that commit
    model_revision: str | None = None  # the hub's commit
    precision: str | None = None
    attention: str | None = None
    device: str | None = None
    device_bytes: Count | None = None
    driver: str | None = None
    cuda: str | None = None
    cpu: str | None = None
    threads: Count | None = None
    at_once: Count | None = None  # runs of its bench that were under way, each on cores of its own
    waiting: str | None = None  # how OpenMP's idle threads wait
    allocator: str | None = None  # settings of torch's allocator
    platform: str | None = None
    python: str | None = None
    packages: dict[str, str] = field(default_factory=dict)  # name -> version

    @property
    def code(self) -> str | None:
        """The commit, with a + where it was changed since; where it is unknown, the version."""
        return self.commit + "+" * bool(self.dirty) if self.commit else self.version


EAGER = "eager"


@dataclass
class Steps:
    """How the steps of a training were computed."""

    rung: str | None = None  # of the ladder in harness/training/kernels.py; null: before there was one
    reason: str | None = None  # why no higher one
    packed: bool | None = None  # rows lay one behind another, attention apart
    shapes: Count | None = None  # graphs that were captured
    apart: Amount | None = None  # after the last step: share by which gradients differ from plain ones
    decoding: str | None = None  # how answers to the test rows were decoded: a rung, or generate


@dataclass
class Resumption:
    """A training went on after it was stopped. Its own costs go on as well; these are beside them."""

    step: Count  # after which
    lost: Amount | None  # seconds of steps that were made once more; null where it did not tell
    spent: Amount  # seconds until it went on: loading and attaching once more


@dataclass
class Memory:
    """Bytes of live tensors at the highest moment of a training."""

    weights: Count  # the model's, frozen ones and buffers too, and what a method holds beside them
    gradients: Count
    moments: Count  # the optimizer's state
    activations: Count  # all others

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations


@dataclass
class Expected:
    """What a run was said to take before it began: each the least, the likely and the most."""

    peak: tuple[Amount, Amount, Amount]  # bytes of live tensors in its training
    device: tuple[Amount, Amount, Amount]  # bytes that the card loses to it
    seconds: tuple[Amount, Amount, Amount]  # of all its phases
    rung: str = EAGER  # by which its steps were thought to be computed
    probed: bool = False  # steps of it had been measured


# What stands in a record's lists and dicts, as far as anybody relies on it


class Card(TypedDict, total=False):
    name: str
    title: str
    axis: str
    objective: str
    aim: str
    baseline: str
    summary: str
    formula: str
    paper: str
    cannot: dict[str, str]
    hybrid: list[str]
    why: dict[str, str]
    learning_rates: tuple[float, float]
    tunes: tuple[str, list[Any]]


class Hashes(TypedDict, total=False):
    method_code: str
    batches: list[str]
    given: list[str]
    learned: list[str]
    before: str | None
    members: list[str | None]
    outputs: str | None
    unseen_outputs: str


class Form(TypedDict):
    tokens: Count
    learned: Count
    mean_tokens: Amount
    mean_learned: Amount
    special: dict[str, Count]
    pieces: list[tuple[str, bool, bool]]


class Study(TypedDict):
    id: str
    rows: Count
    forms: dict[str, Form]


class Point(TypedDict, total=False):
    step: Required[Count]
    loss: Annotated[float, (-1e100, 1e100)] | None  # far beyond fp32; no plot has an axis beyond 1e300


class Output(TypedDict, total=False):
    """A line of outputs.jsonl: one test row, the answer to it, and what every score is made of. `sums`: by
    metric, the numbers that are slow to compute."""

    id: Required[str]
    part: Required[str]
    prompt: Required[str]
    reference: Required[str]
    output: Required[str]
    stopped: Required[bool]
    tokens: Required[Count]  # of the reference, end mark included
    nll: Required[Annotated[float, (-1.0, 1e300)] | None]  # of them all; rounding can leave it below 0
    correct: Required[Count]
    margin: float | None
    sums: dict[str, list[float]]


@dataclass
class RunRecord:
    """One run, whole. Lists are raw: means, intervals and GiB are made by the report.

    `card` is what the method says of itself (see harness.method.Method.card).
    `overrides`: hyperparameter -> [value, reason], each a declared difference.
    `hashes`: of the method's code, of each split's rows; a step each: `batches`, as planned for all methods,
    `given`, what the model truly read, and `learned`, what of it carried loss; `before`: the untouched
    outputs that rejected answers were taken from (null: none were there; absent: none were needed);
    `outputs`, `unseen_outputs`: of outputs.jsonl and unseen.jsonl, as the run left them; `members`: of an
    ensemble, `outputs` of each of its members.
    `arithmetic`: of the training and of the scoring, the types of the residual stream and of products.
    `notes`: what the run found out about its method.
    `study`: a test conversation in each form it could be written in, see harness.data.study.
    `training`: {step, loss, learning_rate, grad_norm} a step; `validation`: {step, loss}.
    `signatures`: how each metric was computed. `start`: the sums over the test rows of a method's own start,
    by metric, where it starts at no baseline.
    `scores`: metric -> value, which the store derives from the outputs; null: it is not finite, or not known.
    """

    spec: RunSpec
    status: Literal[STATUSES]
    error: str | None = None
    schema: int = SCHEMA
    command: str = ""
    started: str = ""  # UTC, ISO 8601
    card: Card = field(default_factory=dict)
    overrides: dict[str, tuple[Any, str]] = field(default_factory=dict)
    weights: str = ""  # the master-weight policy as it was applied
    hashes: Hashes = field(default_factory=dict)
    arithmetic: dict[str, dict[str, str | None]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    phases: dict[Literal[PHASES], Phase] = field(default_factory=dict)
    memory: Memory | None = None  # null on a GPU, whose allocator knows the sum alone
    disturbed: list[str] | None = None  # by whom or what the training was; null where nothing is known of it
    beside: list[str] | None = None  # folders of runs that were under way on its host meanwhile
    kernels: Steps = field(default_factory=Steps)
    forecast: Expected | None = None  # null where there was none
    step_seconds: list[Amount] = field(default_factory=list)
    warmup_steps: Count = 0  # the first steps: in the training time, not in the steady step time
    tokens: Tokens = field(default_factory=Tokens)
    data: Data = field(default_factory=Data)
    study: Study | dict[str, Never] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    resumed: list[Resumption] = field(default_factory=list)
    training: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)
    start: dict[str, list[float | None]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    # On several devices: the phases of each, that of rank 0 first; `phases` are then its seconds, all joules,
    # and the highest peaks.
    ranks: list[dict[Literal[PHASES], Phase]] = field(default_factory=list)
    # DERIVED from the outputs and from what was asked
    scores: dict[str, float | None] = field(default_factory=dict, compare=False)
    folder: str = field(default="", compare=False)  # in which it is kept
    # As read: its file has a digest of itself, so that an edit would be seen. Earlier versions wrote none.
    sealed: bool = field(default=False, compare=False)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def lacks_model(self) -> bool:
        """All was measured, and the model that it was to leave is not there: no room, or a kill."""
        leaves = self.spec.leaves_model and not self.spec.trial
        return self.ok and leaves and self.sizes.saved_bytes is None

    @property
    def judged_by_loss(self) -> bool:
        """A trial of the likelihood objective: it answers nothing. Any other is judged by the metric that its
        objective aims at, over its answers to the validation rows."""
        return self.spec.trial and self.spec.trains and self.card.get("objective", "sft") == "sft"

    @property
    def loss_of_trial(self) -> float | None:
        """What a search makes low: null where the trial broke."""
        if not self.ok:
            return None
        if self.judged_by_loss:
            return self.validation[-1]["loss"]
        aim = self.card["aim"]
        value = self.scores.get(aim)
        return -value if value is not None and METRICS[aim].better == "higher" else value

    @property
    def train_seconds(self) -> float | None:
        """Attach, optimizer steps and the answers sampled for them; null where the training did not end."""
        if not self.ok:
            return None
        return sum(self.phases[name].seconds for name in TRAINING if name in self.phases)

    def peak(self, gauge: str, phases: tuple[str, ...] = TRAINING) -> int | None:
        """The highest bytes of a gauge (peak_allocated, ...) over some phases; null if unknown."""
        values = [getattr(self.phases[name], gauge) for name in phases if name in self.phases]
        return max((value for value in values if value is not None), default=None)

    def to_json(self) -> str:
        value = asdict(self)
        for name in DERIVED:
            del value[name]
        value["spec"] = self.spec.asked()
        return json.dumps(with_seal(finite(value)), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ValueError, with the reason, for what is no record of this schema."""
        value = parse(text)
        if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
            raise ValueError("not a run record")
        if not 1 <= value["schema"] <= SCHEMA:
            raise ValueError(f"schema {value['schema']}, this version reads 1 to {SCHEMA}: upgrade tuneoff")
        if (sealed := SEAL in value) and value.pop(SEAL) != digest(value):
            raise ValueError("record.json was changed since the run")
        try:
            value = migrate.record(value)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"not a record of schema {value['schema']}: {error!r}") from error
        value = {name: item for name, item in value.items() if name not in DERIVED}
        check(value, cls, "record")
        if (aim := value.get("card", {}).get("aim")) not in (None, *METRICS):
            raise ValueError(f"record.card.aim must be one of {', '.join(METRICS)}, not {aim[:60]!r}")
        asked = value["spec"]
        if not NAME.fullmatch(asked["method"]):
            raise ValueError(f"{asked['method']!r} is no method's name")
        value["sealed"] = sealed
        value["folder"] = folder_name(asked)  # of what was asked then: a later version may ask for more
        try:
            value["spec"] = RunSpec.from_json(asked)
        except TypeError as error:
            raise ValueError(f"not a run record: {error}") from error
        value["phases"] = {name: made(Phase, phase) for name, phase in value.get("phases", {}).items()}
        parts = {"tokens": Tokens, "data": Data, "sizes": Sizes, "provenance": Provenance}
        parts |= {"memory": Memory, "kernels": Steps, "forecast": Expected}
        said = {name: value[name] for name in parts if value.get(name) is not None}
        value |= {name: made(parts[name], part) for name, part in said.items()}
        value["ranks"] = [
            {name: made(Phase, phase) for name, phase in phases.items()} for phases in value.get("ranks", [])
        ]
        value["resumed"] = [made(Resumption, one) for one in value.get("resumed", [])]
        return made(cls, value)


DERIVED = ("scores", "folder", "sealed")  # of a record: not in its JSON
SEAL = "digest"  # in its JSON: of all the rest of it, however that is set out


def with_seal(value: dict) -> dict:
    return value | {SEAL: digest(json.loads(json.dumps(value)))}  # keys are texts there, as whoever reads has


def made(kind, value: dict):
    """A dataclass of what it knows: a later version may have written more."""
    return kind(**{f.name: value[f.name] for f in fields(kind) if f.name in value})


def answers_hash(outputs: list[dict]) -> str | None:
    """Of an untouched model's test outputs, from which rejected answers are taken. Null: there are none."""
    return digest([[o["id"], o["output"], o["stopped"]] for o in outputs]) if outputs else None


def finite(value):
    """The same value with null for what is not a finite number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
