"""Some steps of a run, really made: the widest, which says what memory a training takes, and some of all
widths, which say what time. By the run's own code; nothing is validated, evaluated or kept."""

from pathlib import Path

from harness.measuring import StepClock
from harness.method import Method
from harness.ranks import ALONE, Place
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.training.loop import Loop, of_all_widths, rehearsed, widest
from harness.training.model import optimizer_bytes
from harness.training.run import Run
from harness.training.stages import attached, gather, opened


def probe(spec: RunSpec, method: Method, record: RunRecord, folder: Path, place: Place = ALONE) -> None:
    """Fills the record: phases, sizes, kernels, and step_seconds, the last TIMED of them of steps of all
    widths."""
    model, run = opened(spec, method, record, folder, place)
    if spec.trains:
        tried(model, run)
    gather(run)


def tried(model, run: Run) -> Loop:
    """As `probe`, of a model that is loaded."""
    model, *_ = attached(model, run)
    record, meter = run.record, run.meter
    record.memory = rehearsed(model, run)
    with meter.phase("train"):
        loop, clock, compiling = Loop(model, run), StepClock(run.device), []
        first, some = widest(run), of_all_widths(run)
        kinds = {lengths(examples): examples for examples in some}
        kinds.pop(lengths(first), None)
        for examples in [first, first, *kinds.values(), *some]:  # what comes for the first time is not timed
            before = loop.kernels.seconds
            with clock.step():
                loop.step(examples)
            compiling.append(loop.kernels.seconds - before)
        record.step_seconds = [max(0.0, s - c) for s, c in zip(clock.read(), compiling, strict=True)]
    if record.memory:  # where no allocator counts
        record.phases["train"].peak_allocated = record.memory.peak
    record.sizes.optimizer_bytes = optimizer_bytes(loop.optimizer)
    return loop


def lengths(examples: list) -> tuple[int, ...]:
    """Of a step's rows, which its shapes follow from."""
    return tuple(sorted(example.length for example in examples))
