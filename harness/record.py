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
PHASES = ("load", "attach", "train", "rollout", "validate", "evaluate", "generate", "save")
TRAINING = ("attach", "train", "rollout")  # what a method's training time is made of
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}(\.\w{1,64})?", re.ASCII)  # of a method, or of a family's variant


@dataclass
class Phase:
    """The cost of one phase. Peaks are the highest over the phase, not the growth in it."""

    seconds: Amount = 0.0
    peak_allocated: Count | None = None  # bytes of live tensors on the GPU: the method's own demand
    peak_reserved: Count | None = None  # bytes the allocator held, fragmentation included
    peak_device: Count | None = None  # bytes the card lost to this process, context included
    peak_host: Count | None = None  # bytes of resident memory of this process
    joules: Amount | None = None  # energy of the whole card


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


class Hashes(TypedDict, total=False):
    method_code: str
    batches: list[str]
    given: list[str]
    learned: list[str]
    before: str | None
    outputs: str | None


class Tokens(TypedDict, total=False):
    trained: Count
    attach: Count
    padded: Count
    supervised: Count
    sampled: Count
    rows: Count
    left_out: dict[str, Count]
    unused: dict[str, list[str]]
    origins: dict[str, dict[str, str]]
    splits: dict[str, Count]
    answered: dict[str, Count]
    template: str
    loss: Literal["all", "last"]
    plain_text: bool


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
    `outputs`: of outputs.jsonl, as the run left it.
    `arithmetic`: of the training and of the scoring, the types of the residual stream and of products.
    `tokens`: trained (read by the model in steps), attach (read before the first), padded, supervised
    (carrying loss), rows (distinct ones read), sampled (made by the model while training); left_out and
    splits count rows; answered, the held-out rows whose prompt a training row answers; unused names the
    columns of a part that were not read. `notes`: what the run found out about its method.
    `study`: a test conversation in each form it could be written in, see harness.data.study.
    `sizes`: parameters and trainable (counts); weight, trainable, optimizer, saved (bytes).
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
    environment: dict[str, Any] = field(default_factory=dict)
    phases: dict[Literal[PHASES], Phase] = field(default_factory=dict)
    step_seconds: list[Amount] = field(default_factory=list)
    warmup_steps: Count = 0  # the first steps: in the training time, not in the steady step time
    tokens: Tokens = field(default_factory=dict)
    study: Study | dict[str, Never] = field(default_factory=dict)
    sizes: dict[str, Count | None] = field(default_factory=dict)
    training: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)
    start: dict[str, list[float | None]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    # Not in the JSON, as they follow from the outputs and from what was asked
    scores: dict[str, float | None] = field(default_factory=dict, compare=False)
    folder: str = field(default="", compare=False)  # in which it is kept

    @property
    def ok(self) -> bool:
        return self.status == "ok"

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
        del value["scores"], value["folder"]
        value["spec"] = self.spec.asked()
        return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ValueError, with the reason, for what is no record of this schema."""
        value = parse(text)
        if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
            raise ValueError("not a run record")
        if not 1 <= value["schema"] <= SCHEMA:
            raise ValueError(f"schema {value['schema']}, this version reads 1 to {SCHEMA}: upgrade tuneoff")
        try:
            value = migrate.record(value)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"not a record of schema {value['schema']}: {error!r}") from error
        value = {f.name: value[f.name] for f in fields(cls) if f.compare and f.name in value}
        check(value, cls, "record")
        if (aim := value.get("card", {}).get("aim")) not in (None, *METRICS):
            raise ValueError(f"record.card.aim must be one of {', '.join(METRICS)}, not {aim[:60]!r}")
        asked = value["spec"]
        if not NAME.fullmatch(asked["method"]):
            raise ValueError(f"{asked['method']!r} is no method's name")
        value["folder"] = folder_name(asked)  # of what was asked then: a later version may ask for more
        try:
            value["spec"] = RunSpec.from_json(asked)
            value["phases"] = {name: Phase(**phase) for name, phase in value.get("phases", {}).items()}
        except TypeError as error:
            raise ValueError(f"not a run record: {error}") from error
        return cls(**value)


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
