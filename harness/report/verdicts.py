"""One set of verdicts a comparison: who is told apart from whom, in each metric, in memory and in time.

Computed once. Lead, tables, ranks, fronts and plots only read it, so that no two of them can disagree.
"""

from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import expm1, inf

import numpy as np

from harness.metrics import Metric, faults
from harness.record import RunRecord
from harness.report.comparison import SEEDS_TO_RANK, Comparison, Technique, read_outputs, seconds
from harness.report.stats import DRAWS, Difference, Family, Sample
from harness.report.text import number
from harness.store import Store


@dataclass(frozen=True)
class Quantity:
    """What techniques are compared in. `ratio`: judged by ratios, as costs are: a load makes all slower by a
    share."""

    name: str
    label: str
    better: str = "higher"
    decimals: int = 3
    ratio: bool = False

    @classmethod
    def of(cls, metric: Metric) -> "Quantity":
        return cls(metric.name, metric.label, metric.better, metric.decimals, metric.ratio)

    def amounts(self, *ends: float, signed: bool = False) -> list[str]:
        """Of differences, in words: in percent where ratios count, with so many decimals that no end reads as
        0 which is not; unknown where no number holds the percents."""
        shown = [100 * expm1(end) if end < 700 else inf for end in ends] if self.ratio else ends
        decimals = 1 if self.ratio else self.decimals
        while decimals < 9 and any(end and not round(end, decimals) for end in shown):
            decimals += 1
        return [number(end, decimals, signed) + "%" * self.ratio for end in shown]


MEMORY = Quantity("peak_memory", "Peak memory", "lower", ratio=True)
TIME = Quantity("seconds", "Training time", "lower", ratio=True)
COSTS = (MEMORY, TIME)
ROWS_TO_RANK = 20  # test rows: over fewer the intervals hold less often than they say (of 10 in 89 %)


@dataclass(frozen=True)
class Entrant:
    """Who is compared in a quantity. `groups`: all of one are compared with each other. `against`: with whom
    else it is compared: untouched models, itself before it was tuned. `unranked`: why it gets no verdict;
    empty where it does."""

    label: str
    sample: Sample
    groups: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    unranked: str = ""

    def meets(self, other: "Entrant") -> bool:
        return not set(self.groups).isdisjoint(other.groups)


@dataclass(frozen=True)
class Verdict:
    """`word`: higher, lower, tied, or why there is none. The first two where the interval excludes 0."""

    difference: Difference
    word: str

    @property
    def sign(self) -> int:
        """1 for higher, -1 for lower, 0 for all else."""
        return {"higher": 1, "lower": -1}.get(self.word, 0)


class Standing:
    """The verdicts in one quantity: one family of all pairs of a group, and of each with those that it is
    against."""

    def __init__(self, quantity: Quantity, entrants: list[Entrant], draws: int = DRAWS):
        self.quantity = quantity
        self.entrants = {e.label: e for e in entrants if e.sample.known}
        known = list(self.entrants.values())
        pairs = [(a.label, b.label) for a, b in combinations(known, 2) if a.meets(b)]
        pairs += [(e.label, b) for e in known for b in dict.fromkeys(e.against) if b in self.entrants]
        self.family = Family({e.label: e.sample for e in known}, pairs, draws)
        self.pairs = set(pairs)
        self.won = self.wins()
        self.orders: dict[str, list[str]] = {}  # group -> what `ranked` has found
        self.sets: dict[str, list[list[str]]] = {}  # group -> what `alike` has found

    def point(self, label: str) -> float:
        """The mean over seeds, in the quantity's own unit."""
        if label not in self.entrants:
            return np.nan
        values = self.entrants[label].sample.values
        return float((np.exp(values) if self.quantity.ratio else values).mean())

    def verdict(self, one: str, other: str) -> Verdict:
        """Of `one` against `other`; a ratio's difference is of logarithms."""
        difference = self.family.difference(one, other)
        if not np.isfinite(difference.value):
            return Verdict(difference, "")
        reasons = [self.entrants[label].unranked for label in (one, other)]
        if reason := next(filter(None, reasons), ""):
            return Verdict(difference, f"no ranking: {reason}")
        return Verdict(difference, {1: "higher", -1: "lower", 0: "tied"}[difference.sign])

    def wins(self) -> set[tuple[str, str]]:
        """(one, other): the verdict says that the one is better. Of all at once, as there may be a hundred
        thousand."""
        values, width, pairs = self.family.values, self.family.width, self.family.pairs
        ranked = {label for label, entrant in self.entrants.items() if not entrant.unranked}
        told = np.flatnonzero(np.isfinite(values) & (np.abs(values) > width)).tolist()
        higher = {pairs[i] if values[i] > 0 else pairs[i][::-1] for i in told if ranked.issuperset(pairs[i])}
        return higher if self.quantity.better == "higher" else {(low, high) for high, low in higher}

    def beats(self, one: str, other: str) -> bool:
        """Whether a verdict says so; looked up, as it is asked of all pairs again and again."""
        return (one, other) in self.won

    def ranked(self, group: str) -> list[str]:
        """From the best on, by what was measured."""
        if group not in self.orders:
            sign = -1 if self.quantity.better == "higher" else 1
            members = [e for e in self.entrants.values() if group in e.groups and not e.unranked]
            self.orders[group] = [e.label for e in sorted(members, key=lambda e: sign * e.sample.point)]
        return self.orders[group]

    def rank(self, label: str, group: str) -> tuple[int, int, int]:
        """(first, last, of how many): the places that its verdicts leave to it."""
        others = [other for other in self.ranked(group) if other != label]
        ahead = sum(self.beats(other, label) for other in others)
        behind = sum(self.beats(label, other) for other in others)
        return 1 + ahead, 1 + len(others) - behind, 1 + len(others)

    def tied(self, label: str, group: str) -> list[str]:
        """The others of its group that cannot be told from it."""
        others = [other for other in self.ranked(group) if other != label]
        return [other for other in others if not (self.beats(label, other) or self.beats(other, label))]

    def alike(self, group: str) -> list[list[str]]:
        """The largest sets of which no two can be told apart, best first; one may be in several."""
        if group in self.sets:
            return self.sets[group]
        names = self.ranked(group)
        ties = {name: set(self.tied(name, group)) for name in names}
        found = []

        def grow(inside: set, open_: set, closed: set) -> None:  # Bron and Kerbosch 1973, Tomita's pivot
            if not open_ and not closed:
                found.append([name for name in names if name in inside])
                return
            pivot = max(open_ | closed, key=lambda name: len(ties[name] & open_))
            for name in open_ - ties[pivot]:
                grow(inside | {name}, open_ & ties[name], closed & ties[name])
                open_, closed = open_ - {name}, closed | {name}

        grow(set(), set(names), set())
        self.sets[group] = sorted(found, key=lambda members: [names.index(name) for name in members])
        return self.sets[group]

    def detectable(self) -> float:
        """The true difference of two ranked techniques that such a bench would have told apart in 8 of 10
        repetitions: the median of their pairs. NaN without such a pair."""
        both = [(self.entrants[a], self.entrants[b]) for a, b in self.family.pairs]
        chosen = [a.meets(b) and not (a.unranked or b.unranked) for a, b in both]
        known = np.array(chosen, dtype=bool) & (self.family.width > 0)
        return self.family.detectable(known) if known.any() else np.nan


class Verdicts:
    """Of a comparison. `standings`: by name of metric, and of what each technique cost. `faults`: of how
    answers end, each technique against the untouched models alone."""

    def __init__(self, comparison: Comparison):
        found = []
        known = not comparison.random_weights
        for m in comparison.metrics if known else ():
            found.append(Standing(Quantity.of(m), scored(comparison, m)))
        if comparison.counted:  # resident memory is Python's and its libraries' for the most part
            found.append(Standing(MEMORY, paid(comparison, comparison.peak_memory)))
        found.append(Standing(TIME, paid(comparison, undisturbed_seconds)))
        self.standings = {s.quantity.name: s for s in found if s.family.pairs}
        self.metrics = [s for s in self.standings.values() if s.quantity not in COSTS]
        self.costs = [s for s in self.standings.values() if s.quantity in COSTS]
        self.fronts: dict[tuple[str, str, str], list[str]] = {}  # what `front` has found
        self.pairs: dict[str, set[tuple[str, str]]] = {}  # what `dominating` has found
        self.faults = [
            Standing(Quantity.of(m), [replace(e, groups=()) for e in scored(comparison, m)])
            for m in (faults(comparison.spec.dataset) if known else ())
        ]

    def front(self, cost: str, gain: str, group: str) -> list[str]:
        """From the cheapest on: those of which each is known to gain more than all that cost less, and
        to cost less than all that gain more."""
        both = [self.standings[name] for name in (cost, gain) if name in self.standings]
        if len(both) < 2:
            return []
        if (cost, gain, group) not in self.fronts:
            names = [name for name in both[0].ranked(group) if name in both[1].ranked(group)]
            members = set(names)
            better = {pair for pair in both[0].won | both[1].won if members.issuperset(pair)}
            beaten = {other for one, other in better if (other, one) not in better}
            self.fronts[cost, gain, group] = [name for name in names if name not in beaten]
        return self.fronts[cost, gain, group]

    def dominating(self, group: str) -> set[tuple[str, str]]:
        """(by, whom): known to be better in some score or cost, and to be worse in none. Who lacks a verdict
        in one of them neither dominates nor is dominated: it may be the better one there."""
        if group not in self.pairs:
            standings = [standing for standing in self.standings.values() if standing.ranked(group)]
            ranked = [set(standing.ranked(group)) for standing in standings]
            names = set.intersection(*ranked) if ranked else set()
            better = {pair for standing in standings for pair in standing.won if names.issuperset(pair)}
            self.pairs[group] = {(by, name) for by, name in better if (name, by) not in better}
        return self.pairs[group]

    def steps(self, cost: str, gain: str, group: str) -> list[tuple[str, str]]:
        """Neighbours on the front of which the second is known to cost more, and to gain more."""
        return [
            (a, b)
            for a, b in pairwise(self.front(cost, gain, group))
            if self.standings[cost].beats(a, b) and self.standings[gain].beats(b, a)
        ]


def judged(comparison: Comparison, store: Store) -> Verdicts:
    """The verdicts of a comparison whose test rows are read first; computed once for all who write of it."""
    if comparison.verdicts is None:
        if not comparison.random_weights:
            read_outputs(comparison, store)
        comparison.verdicts = Verdicts(comparison)
    return comparison.verdicts


def sample_of(metric: Metric, seeds: list[np.ndarray]) -> Sample:
    """From the sums of each test row, (rows, width) a seed. Where ratios count, in logarithms."""
    if metric.ratio:
        return Sample.of_rows(seeds, lambda sums: np.log(metric.value(sums)))
    return Sample.of_rows(seeds, metric.value)


def scored(comparison: Comparison, metric: Metric) -> list[Entrant]:
    """All whose test outputs are there."""
    found = []
    for technique in comparison.techniques:
        if technique.sums:
            sample = sample_of(metric, [seed[metric.name] for seed in technique.sums])
            befores = comparison.before(technique), comparison.own_base(technique)
            one = entrant(comparison, technique, sample, befores)
            rows = sample.pulls.shape[1]
            few = f"{rows} test row{'s' * (rows != 1)}" if rows < ROWS_TO_RANK else ""
            found.append(replace(one, unranked=one.unranked or few))
    return found


def undisturbed_seconds(record: RunRecord) -> float | None:
    """A run that was disturbed says nothing of its method's time."""
    return None if record.disturbed else seconds(record)


def paid(comparison: Comparison, of) -> list[Entrant]:
    """Those that can be ranked in a cost, whose sample are the seeds alone. `of`: record -> cost."""
    found = []
    for technique in comparison.trained:
        values = [value for value in technique.values(of) if value > 0]
        if technique.ranked and len(values) >= SEEDS_TO_RANK:
            found.append(entrant(comparison, technique, Sample.of_seeds(np.log(values))))
    return found


def entrant(comparison: Comparison, technique: Technique, sample: Sample, befores: tuple = ()) -> Entrant:
    if technique.spec.untouched:
        return Entrant(technique.label, sample)  # it has no seeds to vary, and is ranked with nothing
    unranked = "" if technique.ranked else technique.unranked_because
    against = tuple(
        t.label for t in (*befores, comparison.asked_for(technique), *comparison.members(technique)) if t
    )
    return Entrant(technique.label, sample, tuple(comparison.groups_of(technique)), against, unranked)
