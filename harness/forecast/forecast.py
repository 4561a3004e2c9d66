"""Forecasts: of each run a trace, of a deep model at two depths and drawn out to its own, kept until code or
request change. Torch is imported only where something is traced."""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import ROOT, method
from harness.data import cache_folder
from harness.forecast.cards import Card, card_at_hand
from harness.record import TRAINING, Expected
from harness.spec import Hyperparams, RunSpec, digest, hashed
from harness.work import NOTHING, Work, seconds_of

DEPTHS = 4, 8  # layers that are traced, where there are more than SHALLOW
SHALLOW = 28
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "workspace")
MOVING = ("activations", "head")  # of them, what grows with the rows that are computed at once
GROWING = ("attach", "train")  # phases that compute hp.micro_batch_size rows at once
WITHIN = ("validate", "rollout")  # phases in which a training keeps what it has reserved
EVALUATING = ("validate", "evaluate", "generate")  # hp.eval_batch_size
CODE = ("work.py", "forecast/**/*", "training/**/*")  # whose change makes a forecast anew
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
# cuBLAS's workspace, which torch takes of its allocator for each handle and stream: of Hopper and Blackwell,
# as aten/src/ATen/cuda/CublasHandlePool.cpp has it; older cards take 8.1 MiB.
LIBRARY_BYTES = 32 * 2**20
LIBRARIES_PART = "workspace"
WORKSPACES = {"eager": 2, "graph": 4}  # of two threads, forward and backward, on each stream
UNSURE = {  # of its bytes
    "eager": 0.04, "fused": 0.06, "eager + graph": 0.06, "compiled": 0.1, "compiled + graph": 0.1,
}  # fmt: skip
UNSURE_BYTES = 96 * 2**20
UNSURE_TIME = 1.6  # a factor, both ways; rows that are not here widen it
MEASURED, MEASURED_BYTES, MEASURED_TIME = 0.01, 48 * 2**20, 1.1  # the same of what a probe has measured
START = 3.0  # seconds of a run before its first phase: its process, the card's context
LOADING = 1.0  # and with it the tokens of the rows: 0.7 to 1.7 on the H200 of results/reference/english-17m
DISK = 1e9  # bytes of weights a second, read and written: an assumption
COMPILING = {"compiled": 20.0, "graph": 2.0}  # seconds, where a rung has it in its name: 22 on an H200, cold
TWICE = 2  # a micro-batch is launched to be captured: in a warm-up, and while it is recorded
VALUES = (  # hyperparameters that change neither memory nor time
    "learning_rate", "schedule", "warmup_ratio", "weight_decay", "beta1", "beta2", "epsilon",
)  # fmt: skip
TRIAL = "compile"  # a phase that may run out of memory, and the run goes on
BESIDE = "compile beside graphs"  # its moment without whose room a run has none: it goes on without them


@dataclass
class Forecast:
    """Of one run, on no particular card. Bytes and seconds.

    `moments`: by phase and what goes on in it, the highest bytes allocated and reserved and, of those
    allocated, what they are for. `work`: by what is done. `error`: why there is none. `tried`: how a probe
    of it ended, whose measurements then stand in place of what was forecast; "": there was none.
    """

    rung: str = "eager"
    reason: str | None = None
    bf16: bool = True
    moments: dict[str, dict] = field(default_factory=dict)
    work: dict[str, dict] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    saved_bytes: float = 0
    own_rows: bool = True  # else as long as they may be
    error: str | None = None
    tried: str = ""

    @property
    def peak(self) -> float:
        """Bytes allocated at the highest moment of the training, as a report compares them."""
        return self.highest.get("allocated", 0)

    @property
    def highest(self) -> dict:
        training = [m for name, m in self.moments.items() if phase_of(name) in TRAINING]
        return max(training or self.moments.values(), key=lambda m: m["allocated"], default={})

    @property
    def parts(self) -> dict[str, float]:
        """Of the peak, what it is made of: these add up to it."""
        own = self.highest.get("parts", {})
        return {name: own.get(name, 0) for name in PARTS}

    def device(self, card: Card) -> float:
        """Bytes that a card must have: what torch's allocator holds, and the process beside it."""
        return self.most("reserved") + self.context(card)

    def device_at_least(self, card: Card) -> float:
        """As it is when the allocator gives back what is free."""
        return self.most("allocated") + self.context(card)

    @property
    def needed(self) -> list[dict]:
        """The moments that must have room."""
        return [moment for name, moment in self.moments.items() if phase_of(name) != TRIAL]

    def most(self, gauge: str) -> float:
        return max((moment[gauge] for moment in self.needed), default=0)

    def context(self, card: Card) -> float:
        """What a process takes of a card beside torch's memory."""
        return self.facts.get("context") or card.context

    def unsure(self, size: float, moment: dict | None = None) -> float:
        """By how much so many bytes may be off: at this moment, or at the highest."""
        moment = moment or max(self.needed, key=lambda m: m["allocated"], default={})
        if moment.get("measured"):
            return size * MEASURED + MEASURED_BYTES
        return size * UNSURE[self.rung] + UNSURE_BYTES

    def needs(self, card: Card) -> float:
        """Bytes that are enough at each moment, also where that is off by as much as it may be, and for the
        graphs of all shapes."""
        context = self.context(card)
        moments = [m for name, m in self.moments.items() if phase_of(name) != TRIAL or name == BESIDE]
        found = (m["reserved"] + context + self.unsure(m["allocated"] + context, m) for m in moments)
        return max(found, default=0)

    def scaled(self, rows: float = 1.0, evaluated: float = 1.0) -> "Forecast":
        """As a straight line says it of micro-batches so many times as large, and of evaluations' batches."""
        moving = {name: sum(m["parts"].get(part, 0) for part in MOVING) for name, m in self.moments.items()}
        training = max((size for name, size in moving.items() if phase_of(name) in GROWING), default=0)
        moments = {}
        for name, moment in self.moments.items():
            growing, evaluating = (phase_of(name) in phases for phases in (GROWING, EVALUATING))
            more = moving[name] * ((rows - 1) * growing + (evaluated - 1) * evaluating)
            held = training * (rows - 1) if growing or phase_of(name) in WITHIN else more
            allocated = moment["allocated"] + more
            reserved = max(allocated, moment["reserved"] + held)
            moments[name] = moment | {"allocated": allocated, "reserved": reserved}
        if BESIDE in moments:
            more = max(0, self.moments[BESIDE]["reserved"] - most_in("train", self.moments))
            moments[BESIDE]["reserved"] = most_in("train", moments) + more * rows
        return replace(self, moments=moments, tried="")

    def verdict(self, card: Card) -> str:
        """fits, tight or too large; of a probe that ended otherwise, how."""
        if self.error or self.tried not in ("", "ok"):
            return "too large" if self.tried.startswith("oom") else self.tried or "unknown"
        least = self.device_at_least(card)
        if least - self.unsure(least) > card.bytes:
            return "too large"
        return "fits" if self.needs(card) <= card.bytes else "tight"

    def seconds(self, card: Card) -> dict[str, float]:
        """Of each phase, as measured where a probe has."""
        facts, made, steps = self.facts, self.works, self.facts.get("steps", 0)

        def of(name: str, times: float = 1.0, graph: bool = False) -> float:
            work = made.get(name, NOTHING)
            return times * (seconds_of(NOTHING, card, work) if graph else seconds_of(work, card))

        found = {"start": START, "load": LOADING + facts.get("weight_bytes", 0) / DISK}
        found |= {"attach": of("attach"), "save": self.saved_bytes / DISK}
        if steps:
            found["compile"] = sum(time for what, time in COMPILING.items() if what in self.rung)
            found["train"] = self.training(card, facts["micro_batches"], facts["micro_tokens"], steps)
            found["first step"] = max(0.0, of("first step") - of("step"))
            renewals = (steps - 1) // every if (every := facts.get("renewed_every")) else 0
            again = of("micro-batch", TWICE * facts.get("captured_again", 0))
            found["renewals"] = renewals * (found["first step"] + again)
            reads, tokens = facts.get("rollout_reads", 0), facts.get("rollout_tokens", 0)
            found["rollout"] = of("rollout read", reads) + of("rollout token", tokens, True)
        if facts.get("evaluated"):
            found["evaluate"] = of("evaluate", facts["evaluated"], False)
            reads, tokens = facts["reads"], facts["tokens_written"]  # by the decoder, with a graph of its own
            found["generate"] = of("generate read", reads) + of("generate token", tokens, True)
        return found | facts.get("seconds", {})

    @property
    def works(self) -> dict[str, Work]:
        return {name: Work(**work) for name, work in self.work.items()}

    def training(self, card: Card, micro_batches: float, tokens: float, steps: float) -> float:
        """Seconds that such steps take. Two micro-batches tell what each has to do and what grows with its
        tokens; of one, all grows but launches."""
        made, facts = self.works, self.facts
        batch, traced = made.get("micro-batch", NOTHING), max(1, facts["traced_tokens"])
        if narrow := made.get("narrow micro-batch"):
            each = (batch + narrow * -1) * (1 / (traced - facts["narrow_tokens"]))
            whole = (batch + each * -traced) * micro_batches + each * tokens
        else:
            whole = replace(batch * (tokens / traced), launches=batch.launches * micro_batches)
        between = made.get("step", NOTHING) * steps
        launched, replayed = (between, whole) if "graph" in self.rung else (whole + between, NOTHING)
        return seconds_of(launched, card, replayed)

    def total_seconds(self, card: Card) -> tuple[float, float, float]:
        """The least, the likely and the most."""
        known = sum(self.facts.get("seconds", {}).values())
        rest = sum(self.seconds(card).values()) - known
        wide = UNSURE_TIME * (1 if self.own_rows else 2) * (1 if card.known else 2)
        most = UNSURE_TIME if card.known else 2 * UNSURE_TIME
        return known / MEASURED_TIME + rest / wide, known + rest, known * MEASURED_TIME + rest * most


IN_PARTS = (
    "weights in parts (hp.sharding=full): how much of them is whole at once is FSDP's own, which no dry run "
    "has; a short run says it (--set hp.max_steps=5)"
)


def phase_of(moment: str) -> str:
    return moment.partition(" ")[0]


def most_in(phase: str, moments: dict[str, dict]) -> float:
    """Reserved bytes."""
    return max((m["reserved"] for name, m in moments.items() if phase_of(name) == phase), default=0)


def foreseen(specs: Iterable[RunSpec], bf16: bool, told: Callable[[int, int], object] = lambda *_: None,
             card: Card | None = None) -> dict[str, Forecast]:  # fmt: skip
    """By digest of the spec. Seeds and learning rates of a method share one. `told(done, of)`: as they come.
    `card`: of a probe on it, what that found."""
    wanted = {spec.digest: (key_of(spec, bf16), spec) for spec in specs if not spec.members}
    found: dict[str, Forecast] = {}
    missing: dict[str, RunSpec] = {}
    for key, spec in wanted.values():
        if spec.own_hp.sharding == "full":
            found[key] = Forecast(error=IN_PARTS)
        elif key not in found and (known := read(key, card)):
            found[key] = known
        elif key not in found:
            missing.setdefault(key, spec)
    if missing:
        for key, made in traced(missing, bf16):
            found[key] = made
            told(len(found), len(found) + len(missing))
            if not made.error:
                keep(key, made)
    return {name: found[key] for name, (key, _) in wanted.items() if key in found}


def expected(spec: RunSpec) -> Expected | None:
    """What is known of a run before it begins on the card that is here, from what a plan or a bench has
    kept."""
    card, made = None if spec.members else card_at_hand(), None
    if card:
        with suppress(Exception):  # a method's file that is gone: the run itself says so
            made = read(key_of(spec, computes_bf16(spec.hp, card)), card)
    if card is None or made is None or made.error or made.tried not in ("", "ok"):
        return None
    peak, device, least = made.peak, made.device(card), made.device_at_least(card)
    off, (soon, likely, late) = made.unsure(least), made.total_seconds(card)
    return Expected(
        peak=(max(0.0, peak - made.unsure(peak)), peak, peak + made.unsure(peak)),
        device=(max(0.0, least - off), device, device + off),
        seconds=(max(0.0, soon - START), likely - START, late - START),  # of its phases alone
        rung=made.rung,
        probed=bool(made.tried),
    )


def computes_bf16(hp: Hyperparams, card: Card | None) -> bool:
    """In a run on such a card; without one, on any that has it."""
    return hp.precision == "bf16" or (hp.precision == "auto" and (card is None or card.bf16))


# What is known already


def key_of(spec: RunSpec, bf16: bool) -> str:
    cls = method.resolve(spec.method, source(spec))
    hp = replace(spec.own_hp, **{name: getattr(Hyperparams(), name) for name in VALUES})
    asked = [spec.method, spec.model, spec.dataset, hashed(hp), spec.options, spec.fingerprints]
    kind = [spec.untouched, spec.trial, bf16]
    return digest([asked, kind, method.code_hash(cls), code(), [known(p) for p in LIBRARIES]])


def source(spec: RunSpec) -> Any:
    return method.find(spec.method, method.known_methods(spec.locations.get("plugins", ())))


def known(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def code() -> str:
    found = (file for pattern in CODE for file in sorted((ROOT / "harness").glob(pattern)))
    files = [file for file in found if file.suffix in (".py", ".toml")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def place(key: str, card: Card | None = None) -> Path:
    """Of a forecast; with a card, of what a probe on it has made of that."""
    probed = f"-{digest([card.name, card.bytes])}" if card else ""
    return cache_folder() / "forecasts" / f"{key}{probed}.json"


def read(key: str, card: Card | None = None) -> Forecast | None:
    for path in (place(key, card), place(key)):
        with suppress(OSError, TypeError, ValueError):
            return Forecast(**json.loads(path.read_text("utf-8")))
    return None


def keep(key: str, made: Forecast, card: Card | None = None) -> None:
    path = place(key, card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(made)), "utf-8")
        part.replace(path)
    except OSError:  # done without
        pass


# What is not


def traced(missing: dict[str, RunSpec], bf16: bool) -> Iterable[tuple[str, Forecast]]:
    """In copies of this process, which has imported what they need, so that nothing of it is changed."""
    import torch

    from harness.training import dry

    torch.set_num_threads(1)
    shared: dict = {}
    jobs = []
    for key, spec in missing.items():
        hp = spec.own_hp
        same = digest([spec.dataset, spec.model, hp.max_length])
        if same not in shared:
            shared[same] = dry.rows_of(spec)
        jobs.append((key, spec, bf16, same))
    Jobs.rows = shared
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if not hasattr(os, "fork") or workers < 1:
        yield from map(job, jobs)
        return
    copies = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, copies, quiet) as pool:
        running = {pool.submit(job, one): one[0] for one in jobs}
        try:
            for done in as_completed(running):
                try:
                    yield done.result()
                except BrokenProcessPool:  # what ends a copy ends no plan
                    yield running[done], Forecast(error="its dry run ended without a word", bf16=bf16)
        finally:  # waits: who is still at work when Python ends breaks a pipe, and says so
            pool.shutdown(cancel_futures=True)


def quiet() -> None:
    """A copy ends without a word, and collects no garbage of its parent's."""
    gc.freeze()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Jobs:
    rows: dict = {}


def job(asked: tuple) -> tuple[str, Forecast]:
    key, spec, bf16, same = asked
    try:
        return key, made(spec, bf16, *Jobs.rows[same])
    except BaseException as error:  # a method's hooks are a stranger's
        from harness.plain import redacted

        text = redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return key, Forecast(error=text, bf16=bf16)


def made(spec: RunSpec, bf16: bool, rows: dict, own_rows: bool) -> Forecast:
    """Of one run, here and now."""
    import io
    import warnings
    from contextlib import redirect_stderr, redirect_stdout

    from transformers import AutoConfig

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(
            spec.locations.get("model") or spec.model.removeprefix("random:"), trust_remote_code=False
        )
        built = method.build(method.resolve(spec.method, source(spec)), spec.options)
        return drawn_out(spec, built, config, rows, own_rows, bf16)


def drawn_out(spec: RunSpec, built: Any, config: Any, rows: dict, own_rows: bool, bf16: bool) -> Forecast:
    """Of a run, from dry runs of some of its layers."""
    from harness.training import dry

    layers = config.get_text_config().num_hidden_layers
    depths = (layers,) if layers <= SHALLOW else DEPTHS
    try:
        traces = [dry.trace(spec, rebuilt(built), config, rows, bf16, depth) for depth in depths]
    except (AttributeError, IndexError, KeyError, ValueError):
        if len(depths) == 1:
            raise
        depths = (layers,)  # an option names a layer that is not among the first
        traces = [dry.trace(spec, rebuilt(built), config, rows, bf16, layers)]
    first, last = traces[0], traces[-1]
    line = Line(depths, layers)
    moments: dict[str, dict] = {
        name: {
            "allocated": line(first.moments.get(name, moment).allocated, moment.allocated),
            "reserved": line(first.moments.get(name, moment).reserved, moment.reserved),
            "parts": {
                part: line(first.moments.get(name, moment).parts.get(part, 0), size)
                for part, size in moment.parts.items()
            },
        }
        for name, moment in last.moments.items()
    }
    for name, moment in moments.items():
        own = libraries(name, last.rung)
        moment["parts"][LIBRARIES_PART] = moment["parts"].get(LIBRARIES_PART, 0) + own
        moment["reserved"] = max(moment["reserved"], moment["allocated"]) + own
        moment["allocated"] += own
    work = {
        name: {
            key: line(asdict(first.work.get(name, done))[key], value) for key, value in asdict(done).items()
        }
        for name, done in last.work.items()
    }
    saved = line(first.saved_bytes, last.saved_bytes)
    return Forecast(last.rung, last.reason, bf16, moments, work, last.facts, saved, own_rows)


def libraries(moment: str, rung: str) -> int:
    """Bytes of their workspaces by then."""
    captured = moment == BESIDE or phase_of(moment) not in ("load", "attach", TRIAL)
    return LIBRARY_BYTES * WORKSPACES["graph" if captured and "graph" in rung else "eager"]


def rebuilt(built: Any) -> Any:
    return method.build(type(built), method.options(built))


@dataclass
class Line:
    """Through the values at two depths, to that of the whole model."""

    depths: tuple[int, ...]
    layers: int

    def __call__(self, first: float, last: float) -> float:
        if len(self.depths) == 1:
            return last
        a, b = self.depths
        return max(0.0, last + (last - first) / (b - a) * (self.layers - b))
