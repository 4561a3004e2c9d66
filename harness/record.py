"""What was measured: the record of one run, JSON in and out.

Bytes, seconds and joules only. Unknown is null: never 0, never NaN.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields

from harness.spec import RunSpec

SCHEMA = 1
STATUSES = ("ok", "oom_gpu", "oom_host", "diverged", "failed", "timeout", "interrupted", "unsupported")
PHASES = ("load", "attach", "train", "rollout", "validate", "evaluate", "generate", "save")
TRAINING = ("attach", "train", "rollout")  # what a method's training time is made of


@dataclass
class Phase:
    """The cost of one phase. Peaks are the highest over the phase, not the growth in it."""

    seconds: float = 0.0
    peak_allocated: int | None = None  # bytes of live tensors on the GPU: the method's own demand
    peak_reserved: int | None = None  # bytes the allocator held, fragmentation included
    peak_device: int | None = None  # bytes the card lost to this process, context included
    peak_host: int | None = None  # bytes of resident memory of this process
    joules: float | None = None  # energy of the whole card


@dataclass
class RunRecord:
    """One run, whole. Lists are raw: means, intervals and GiB are made by the report.

    `card` is what the method says of itself (see harness.method.Method.card).
    `overrides`: hyperparameter -> [value, reason], each a declared difference.
    `tokens`: trained (read by the model), padded, supervised (carrying loss), sampled (made by the
    model while training); left_out counts rows. `notes`: what the run found out about its method.
    `study`: a test conversation in each form it could be written in, see harness.study.
    `sizes`: parameters and trainable (counts); weight, trainable, optimizer, saved (bytes).
    `training`: {step, loss, learning_rate, grad_norm} a step; `validation`: {step, loss}.
    `scores`: metric -> {value, signature}; what an unknown value means is said in `warnings`.
    """

    spec: RunSpec
    status: str
    error: str | None = None
    schema: int = SCHEMA
    command: str = ""
    started: str = ""  # UTC, ISO 8601
    card: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    weights: str = ""  # the master-weight policy as it was applied
    hashes: dict = field(default_factory=dict)  # method_code, rows of each split, batches (a list)
    environment: dict = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    warmup_steps: int = 0  # the first steps: in the training time, not in the steady step time
    tokens: dict = field(default_factory=dict)
    study: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    training: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    scores: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
        value["spec"] = self.spec.asked()
        return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ValueError, with the reason, for what is no record of this schema."""
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
            raise ValueError("not a run record")
        if value["schema"] != SCHEMA:
            newer = value["schema"] > SCHEMA
            raise ValueError(
                f"schema {value['schema']}, this version reads {SCHEMA}: "
                + ("upgrade tuneoff" if newer else "run it again")
            )
        known = {f.name for f in fields(cls)}
        try:
            value = {name: value[name] for name in value if name in known}
            value["spec"] = RunSpec.from_json(value["spec"])
            value["phases"] = {name: Phase(**phase) for name, phase in value["phases"].items()}
            record = cls(**value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a run record: {error}") from error
        if record.status not in STATUSES:
            raise ValueError(f"unknown status {record.status!r}")
        return record


def finite(value):
    """The same value with null for what is not a finite number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
