"""Where runs go: to the slots of this machine, a card or some cores each, or to an engine that has others."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from harness import machine, method, packages
from harness.bench.attempt import Slot, Terms, alone
from harness.errors import BadRequest, Problem, Problems, brief
from harness.nursery import Nursery, threads
from harness.plan import Plan
from harness.record import RunRecord
from harness.spec import RunSpec

# Runs on a CPU, at most: they share its memory, and what more of them do to a step is not measured.
AT_ONCE = 2
RUN_BYTES = 3 * 2**30  # of a run on a CPU, beside its weights: libraries, activations, its data
WEIGHTS = 10  # times the model's files, at most: these in 16 bits; in 32 weights, gradients, two moments


PACKAGES = {"ray": "ray", "slurm": "submitit"}  # of each engine


class Places(Protocol):
    """What a bench gives its runs to."""

    def more(self, specs: list[RunSpec]) -> list[Any]:
        """As many places as have become free, now that these runs are to be done too."""

    def run(self, spec: RunSpec, place: Any, signals: Sequence[int], begun: Callable) -> RunRecord:
        """Ends when the run in such a place has; sooner for `signals`, which grow meanwhile. `begun()` is
        called when it begins."""


Opens = Callable[
    [Plan, Terms, RunSpec], AbstractContextManager[Places]
]  # for runs, of which that is the first


class Here:
    """The slots of this machine."""

    def __init__(self, slots: list[Slot], terms: Terms):
        self.free, self.terms = slots, terms

    def more(self, specs: list[RunSpec]) -> list[Slot]:
        new, self.free = self.free, []
        return new

    def run(self, spec: RunSpec, place: Slot, signals: Sequence[int], begun: Callable) -> RunRecord:
        begun()
        return alone(spec, self.terms, place, signals)


@contextmanager
def here(plan: Plan, terms: Terms, first: RunSpec, cards: Sequence[str] = ()) -> Iterator[Here]:
    """`first`: whose model and precision are tried where there is a card. `cards`: names, as
    CUDA_VISIBLE_DEVICES takes them, one or hp.devices for each run at once; none: one run at a time, on
    whichever card it finds."""
    shares = sharing(cards, plan)
    with ExitStack() as ends:
        if len(shares) > 1:  # the same for all runs; and one core is left, as where there is one run
            ends.enter_context(threads(max(1, len(shares[0].cores) - 1)))
        asked = first.asked() | {"locations": first.locations}
        nursery = ends.enter_context(Nursery(needs(plan), asked, cards))
        yield Here([replace(slot, begin=nursery.child) for slot in shares] or slots(nursery, plan), terms)


def sharing(cards: Sequence[str], plan: Plan) -> list[Slot]:
    """A slot for each card, or for as many as a run takes, with its share of the cores."""
    each = devices(plan)
    count, physical = len(cards) // each, machine.physical_cores()
    if cards and not count:
        raise BadRequest(f"--gpus: hp.devices={each} takes more cards than {len(cards)}")
    size = len(physical) // count if count > 1 else 0  # of fewer cores than cards, all use all
    return [
        Slot(
            cores=tuple(chain(*physical[i * size : (i + 1) * size])),
            of=count,
            cards=tuple(cards[i * each : (i + 1) * each]),
        )
        for i in range(count)
    ]


def slots(nursery: Nursery, plan: Plan) -> list[Slot]:
    """One; on a CPU as many as have memory, and cores for all threads of a run, of their own."""
    folder = plan[0].locations.get("model")
    groups: list[tuple[int, ...]] = []
    if folder and nursery.threads and not nursery.card:
        files = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        room = (machine.free_bytes() or 0) // (RUN_BYTES + WEIGHTS * files)
        each = nursery.threads * devices(plan)
        most = min(AT_ONCE, room, machine.quota() // each)
        cores: list[int] = []
        for siblings in machine.physical_cores():
            cores += siblings
            if len(cores) >= each and len(groups) < most:
                groups.append(tuple(cores))
                cores = []
    if len(groups) < 2:
        return [Slot(nursery.child)]
    return [Slot(nursery.child, cores, len(groups)) for cores in groups]


def chosen(on: str | None, gpus: Sequence[str]) -> Opens:
    """Of `--on` and `--gpus`. Raises BadRequest."""
    engine, _, address = (on or "").partition(":")
    if not engine:
        return partial(here, cards=chosen_cards(gpus) if gpus else ())
    if engine not in PACKAGES or (address and engine != "ray"):
        raise BadRequest(
            Problem(f"unknown engine {brief(on)}", "--on", available=("ray", "ray:ADDRESS", "slurm"))
        )
    if gpus:
        raise BadRequest(f"--gpus: cards of this machine are named, but runs go to {engine}: leave it out")
    if not packages.found(PACKAGES[engine]):
        raise BadRequest(f"--on {engine}: it needs {PACKAGES[engine]}: pip install 'tuneoff[{engine}]'")
    if engine == "slurm" and not shutil.which("sbatch"):
        raise BadRequest("--on slurm: there is no sbatch here: start the bench where jobs are submitted from")

    def elsewhere(plan: Plan, terms: Terms, first: RunSpec) -> AbstractContextManager[Places]:
        module = import_module(f"harness.bench.{engine}")  # of no interest otherwise
        return module.opened(terms, devices(plan), *[address] * (engine == "ray"))

    return elsewhere


def devices(plan: Plan) -> int:
    """Cards that a run takes."""
    return max((spec.devices for spec in plan.methods()), default=1)


def chosen_cards(names: Sequence[str]) -> list[str]:
    """Of `--gpus`: all, numbers or beginnings of names. Raises BadRequest."""
    there = machine.cards()
    if not there:
        raise BadRequest(
            "--gpus: no NVIDIA card answers here (nvidia-smi shows whether there is one): leave it out"
        )
    if list(names) == ["all"]:
        return there
    problems, found = Problems(), []
    available = tuple(f"{number} ({card})" for number, card in enumerate(there))
    for name in names:
        number = int(name) if name.isdecimal() else None  # no card's name is one
        same = [
            card for n, card in enumerate(there) if n == number or (number is None and card.startswith(name))
        ]
        if len(same) != 1:
            what = "is no card" if not same else "is the beginning of several cards' names"
            problems.add("--gpus", Problem(f"{brief(name)} {what}", available=("all", *available)))
        elif same[0] in found:
            problems.add("--gpus", f"{brief(name)} is named twice")
        found += same if len(same) == 1 else []
    problems.refuse()
    return found


def needs(plan: Plan) -> dict[str, list[str]]:
    """Package beyond those of every run -> the methods that need it."""
    found: dict[str, list[str]] = {}
    own = (spec for spec in plan.methods() if not spec.members)
    for name, cls in {spec.method: method_of(spec) for spec in own}.items():
        for need in cls.needs:
            found.setdefault(need, []).append(name)
    return found


def method_of(spec: RunSpec) -> type[method.Method]:
    source = method.find(spec.method, method.known_methods(spec.locations.get("plugins", [])))
    return method.resolve(spec.method, source)
