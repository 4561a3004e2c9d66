"""The arms of a plan, each with its runs and what is forecast of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.bench import cached, stale
from harness.cli import listing
from harness.cli.arguments import RUNS_AGAIN
from harness.forecast import Card, Forecast
from harness.spec import RunSpec

GIB = 2**30


@dataclass
class Arm:
    """The runs of a method with one set of options."""

    name: str
    runs: list[RunSpec]
    states: list[str]
    forecast: Forecast
    watts: float | None = None  # of the card in such runs, where records say

    @property
    def due(self) -> int:
        return sum(not state.startswith("cached") for state in self.states)

    def verdict(self, card: Card) -> str:
        return self.forecast.verdict(self.share(card))

    def goes(self, card: Card) -> bool:
        """Whether it is known to have room, or may have."""
        return self.verdict(card) in ("fits", "tight")

    def share(self, card: Card) -> Card:
        """As much of it as its runs may take."""
        cap = self.runs[0].own_hp.memory_cap * GIB
        return card.of(min(card.bytes, cap + card.context)) if cap else card

    def seconds(self, card: Card) -> float:
        """Of a run, the likeliest."""
        return self.forecast.total_seconds(card)[1]

    def joules(self, card: Card) -> float | None:
        return self.watts * self.seconds(card) if self.watts else None


def arms_of(specs, runs: list, found: dict[str, Forecast]) -> Iterator[Arm]:
    varied = listing.differing([spec for spec, _ in runs])
    groups: dict[str, list[tuple[RunSpec, str]]] = {}
    for spec, said in runs:
        if not spec.members and not spec.trial:
            groups.setdefault(listing.named(spec, varied[spec.method]), []).append((spec, said))
    for tuning in specs.tunings:  # a trial evaluates less than the runs of what was found
        for what, spec, count in (
            ("trials", tuning.trial, specs.trials), ("tuned", tuning.identical, len(specs.seeds)),
        ):  # fmt: skip
            several = [(spec, "will run")] * count
            groups.setdefault(f"{spec.method}, {what}", []).extend(several)
    for name, members in groups.items():
        own = [spec for spec, _ in members]
        missing = Forecast(error="not asked for, or torch is not installed")
        yield Arm(name, own, [said for _, said in members], found.get(own[0].digest, missing))


def known(specs, store, force: bool) -> list[RunSpec]:
    """The runs that can be named: as far as those trials lead that are cached, and all that wait for none."""
    found: list = []
    done: dict = {}
    while stage := specs.upcoming(done):
        found += stage
        done |= {spec.digest: None if force else cached(spec, specs, store) for spec in stage}
        if any(spec.trial and done[spec.digest] is None for spec in stage):
            break
    return found + [spec for spec in specs if spec not in found]


def state(spec: RunSpec, specs, store, force: bool) -> str:
    """What a bench would do with a run."""
    earlier = store.find(spec)
    if earlier is None or force:
        return "will run"
    if cached(spec, specs, store):
        return "cached" + f" ({RUNS_AGAIN})" * stale(replace(earlier, spec=spec))
    if not earlier.ok:
        return f"will run again ({earlier.status})"
    if spec.members:
        return "will run again (a member has other answers now)"
    return "will run again (the untouched model has answers now)"


def about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def energy(joules: float | None) -> str:
    if joules is None:
        return "–"
    hours = joules / 3600
    return (
        f"{hours / 1000:.1f} kWh"
        if hours >= 1000
        else f"{hours:.0f} Wh"
        if hours >= 10
        else f"{hours:.1f} Wh"
    )
