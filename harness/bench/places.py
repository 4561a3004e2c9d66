"""Where a run's process is: a slot of this machine, of which each holds one run at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import machine
from harness.nursery import Forked, Fresh, Nursery
from harness.plan import Plan

# Runs on a CPU, at most: they share its memory, and what more of them do to a step is not measured.
AT_ONCE = 2
RUN_BYTES = 3 * 2**30  # of a run on a CPU, beside its weights: libraries, activations, its data
WEIGHTS = 10  # times the model's files, at most: these in 16 bits; in 32 weights, gradients, two moments


@dataclass(frozen=True)
class Slot:
    """A place that holds one run at a time. `begin(folder)` starts its process; `cores`: those that it keeps
    to, none where it may use all; `of`: so many slots there are."""

    begin: Callable[[Path], Fresh | Forked] = Fresh
    cores: tuple[int, ...] = ()
    of: int = 1


HERE = Slot()


def slots(nursery: Nursery, plan: Plan) -> list[Slot]:
    """One; on a CPU as many as have memory, and cores for all threads of a run, of their own."""
    folder = plan[0].locations.get("model")
    groups: list[tuple[int, ...]] = []
    if folder and nursery.threads and not nursery.card:
        files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        room = (machine.free_bytes() or 0) // (RUN_BYTES + WEIGHTS * files)
        most = min(AT_ONCE, room, machine.quota() // nursery.threads)
        cores: list[int] = []
        for siblings in machine.physical_cores():
            cores += siblings
            if len(cores) >= nursery.threads and len(groups) < most:
                groups.append(tuple(cores))
                cores = []
    if len(groups) < 2:
        return [Slot(nursery.child)]
    return [Slot(nursery.child, cores, len(groups)) for cores in groups]
