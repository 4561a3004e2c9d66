"""Which technique to take, within a budget if there is one, and what would change the answer.

It only reads the verdicts: nothing is compared here that they do not tell apart.
"""

from collections.abc import Iterable

from harness.metrics import METRICS
from harness.report.answer import UNITS, count
from harness.report.blocks import Block, Heading, Lead, Listing, Prose
from harness.report.budget import Budget, gauge, measured, need
from harness.report.comparison import GIB, IDENTICAL, SEEDS_TO_RANK, UNTOUCHED, Comparison, Technique, arm
from harness.report.differences import inside
from harness.report.stats import CONFIDENCE
from harness.report.text import listed, number
from harness.report.tuning import title
from harness.report.verdicts import MEMORY, Standing, Verdicts
from harness.tuning import Found

CHANGES = "What would change this:"


def decision(comparison: Comparison, verdicts: Verdicts, budget: Budget | None = None) -> list[Block]:
    """A lead and its reasons, and what would change them, for each group; what a budget is measured by."""
    budget = budget or Budget()
    choices = choices_of(comparison, verdicts, budget)
    found: list[Block] = []
    for choice in choices:
        found.append(Lead(choice.lead()))
        if reasons := choice.reasons():
            found.append(Listing(reasons))
        if changes := choice.changes():
            found += [Prose(CHANGES), Listing(changes)]
    if found and budget and any(choice.done for choice in choices):
        found.append(Prose(measured(comparison, budget)))
    return [Heading("Decision"), *found] if found else []


def choices_of(comparison: Comparison, verdicts: Verdicts, budget: Budget | None) -> list["Choice"]:
    """One a group."""
    return [Choice(comparison, verdicts, budget or Budget(), group) for group in comparison.groups]


class Choice:
    """Of one group. `fit`: the labels of those that remain; `standing`: the verdicts in what leads, if there
    are any; `ranked`: who of `fit` has one, from the best mean on; `top`: the first and all that are tied
    with it; `beaten`: who is dominated, and by whom; `best_of_both`: who of the top is not.
    """

    def __init__(self, comparison: Comparison, verdicts: Verdicts, budget: Budget, group: str):
        self.comparison, self.verdicts, self.budget, self.group = comparison, verdicts, budget, group
        self.techniques = comparison.groups[group]
        self.done = [t for t in self.techniques if t.done]
        self.needs = {t.label: need(comparison, t) for t in self.done}
        self.over = {name: over for name, takes in self.needs.items() if (over := takes.over(budget))}
        self.nearest = sorted(self.over, key=lambda name: self.needs[name].times(budget))
        self.unknown = {name: found for name, takes in self.needs.items()
                        if name not in self.over and (found := takes.unknown(budget))}  # fmt: skip
        self.fit = [name for name in self.needs if name not in self.over and name not in self.unknown]
        self.standing = leading(comparison, verdicts)
        self.ranked = self.among(self.standing)
        self.top = first_of(self.standing, self.ranked)
        order = self.ranked + [name for name in self.fit if name not in self.ranked]
        pairs = verdicts.dominating(group)
        self.beaten = {n: by for n in order if (by := [o for o in order if (o, n) in pairs])}
        self.best_of_both = [name for name in self.top if name not in self.beaten] or self.top

    def among(self, standing: Standing | None) -> list[str]:
        """Who remains and has verdicts in a quantity, from the best on."""
        return [name for name in standing.ranked(self.group) if name in self.fit] if standing else []

    # Who to take

    @property
    def take(self) -> list[str]:
        """Any of these; none where nothing decides, or where all are worse than the untouched model."""
        found = self.fit if len(self.fit) < 2 else self.best_of_both if len(self.ranked) > 1 else []
        return [] if self.harmed(found) else found

    def harmed(self, labels: list[str]) -> bool:
        return bool(labels) and self.worse(labels) == labels

    def lead(self) -> str:
        """`first`, and what it is of."""
        scope = ", ".join(filter(None, (self.group[1:], f"within {self.budget}" if self.budget else "")))
        text = f"{scope}: {self.first()}." if scope else f"{self.first()}."
        return text if not scope and text.startswith(tuple(self.fit)) else text[0].upper() + text[1:]

    def first(self) -> str:
        if not self.done:
            return "no technique has a result, and there is nothing to choose"
        if not self.fit:
            return f"none of {count(len(self.done), 'technique')} is known to fit"
        if len(self.fit) == 1:
            what = "alone fits" if len(self.done) > 1 else "alone has a result, so there is no choice"
            return f"{self.fit[0]} {what}{self.caveat(self.fit)}"
        if len(self.ranked) < 2 or not self.standing:
            return f"no choice by scores ({self.silent(self.fit)})"
        most = f"the {extreme(self.standing)} {inside(self.standing.quantity.label)}"
        most += " of those that can be ranked" * (len(self.ranked) < len(self.fit))
        if len(self.top) == 1:
            return f"{self.top[0]}, with {most}{self.caveat(self.top)}"
        others = len(self.top) - len(self.best_of_both)
        rest = f"; {count(others, 'other')} so tied {'is' if others == 1 else 'are'} dominated" * bool(others)
        return f"{either(self.best_of_both)}, tied for {most}{rest}{self.caveat(self.best_of_both)}"

    def silent(self, labels: list[str]) -> str:
        """Why scores decide nothing among these."""
        if self.comparison.random_weights:
            return "the weights were drawn at random"
        entrants = self.standing.entrants if self.standing else {}
        why = dict.fromkeys(entrants[name].unranked for name in labels if name in entrants)
        return listed(list(filter(None, why))) or "test outputs are missing"

    def caveat(self, labels: list[str]) -> str:
        """Where a training is not known to have helped at all, or is known to have harmed."""
        if not self.standing:
            return ""
        worse, unproven = self.worse(labels), self.unproven(labels)
        found, what = (worse, "worse") if worse else (unproven, "not known to be better")
        who = "" if len(found) == len(labels) else f"{listed(found)} {'is' if len(found) == 1 else 'are'} "
        text = f", but {who}{what} than the untouched model in {inside(self.standing.quantity.label)}"
        return (text + ": keep that" * self.harmed(labels)) if found else ""

    def worse(self, labels: list[str]) -> list[str]:
        """Who is known to be worse than the untouched model in what leads."""
        before = self.comparison.base(UNTOUCHED)
        standing = self.standing
        return [n for n in labels if before and standing and standing.beats(before.label, n)]

    def unproven(self, labels: list[str]) -> list[str]:
        """Who is not known to be better than the untouched model in what leads, nor to be worse; of those
        without a verdict who did not come out better."""
        before, standing = self.comparison.base(UNTOUCHED), self.standing
        if not before or not standing:
            return []
        sign = 1 if standing.quantity.better == "higher" else -1

        def no_better(name: str) -> bool:
            verdict = standing.verdict(name, before.label)
            return verdict.word == "tied" or (
                verdict.word.startswith("no ranking") and not sign * verdict.difference.value > 0
            )

        return [name for name in labels if no_better(name)]

    # Why

    def reasons(self) -> list[str]:
        found = []
        if self.budget and self.done:
            found.append(f"Fits: {listed(self.fit, len(self.fit)) or 'none'}, of {len(self.done)}.")
        found += self.merits()
        if over := [f"{name} ({'; '.join(self.over[name])})" for name in self.nearest]:
            found.append(f"Does not fit: {listed(over, len(over))}.")
        if lost := [f"{name} ({' and '.join(said)})" for name, said in self.unknown.items()]:
            found.append(f"Not measured, and not known to fit: {listed(lost, len(lost))}.")
        if broke := self.broken():
            found.append(broke)
        return found

    def merits(self) -> list[str]:
        """Of those that fit."""
        found = []
        aim = self.techniques[0].aim
        if self.techniques[0].objective != "sft" and aim not in self.verdicts.standings and self.standing:
            label = METRICS[aim].label.lower()
            found.append(f"What they aim at, {label}, has no verdicts: it is in the table alone.")
        if self.standing and len(self.ranked) > 1:
            known = self.verdicts.costs and not self.harmed(self.best_of_both)
            found += [self.both()] * bool(known) + [self.best(self.standing)]
        found += [self.least(cost) for cost in self.verdicts.costs if len(self.among(cost)) > 1]
        if self.beaten:
            why = "by one that is known to be better in a score or a cost, and to be worse in none"
            found.append(f"Dominated, {why}: {self.dominated()}.")
        return found

    def broken(self) -> str:
        named = [f"{t.label} ({t.status}{self.card(t)})" for t in self.techniques if t.status]
        return f"Without a result: {listed(named, len(named))}." if named else ""

    def best(self, standing: Standing) -> str:
        first = self.top[0]
        value = number(standing.point(first), standing.quantity.decimals)
        text = f"Best {inside(standing.quantity.label)}: {first}, {value}{tied(self.top)}"
        behind = next((name for name in self.ranked if name not in self.top), None)
        return text + (f"; the next, {behind}, is {apart(standing, behind, first)}." if behind else ".")

    def least(self, cost: Standing) -> str:
        names = first_of(cost, self.among(cost))
        what = cost.quantity.label.lower().removeprefix("peak ")
        unit = UNITS[cost.quantity.name]
        said = f"Least {what}: {names[0]}, {unit(cost.point(names[0]))}{tied(names)}"
        takes = {name: need for name in self.among(cost) if (need := self.needs[name].memory)}
        least = min(takes, key=takes.__getitem__, default=names[0])
        on_card = cost.quantity == MEMORY and gauge(self.comparison) == "peak_device"
        if on_card and least not in names:
            said += f", of live tensors; of the card {least}, {unit(takes[least] / GIB)}"
        return f"{said}."

    def both(self) -> str:
        """And what each of them has over the others."""
        chosen, said = self.best_of_both, []
        for standing in (*self.verdicts.costs, *self.verdicts.metrics):
            names = [name for name in self.among(standing) if name in chosen]
            if len(first := first_of(standing, names)) < len(names):
                said.append(f"{either(first)} has the {extreme(standing)} {inside(standing.quantity.label)}")
        which = chosen[0] if len(chosen) == 1 else f"these {len(chosen)}"
        return f"Best of both, score and cost: {'; '.join((which, *said))}."

    def dominated(self) -> str:
        """`DoRA by GaLore`: by the best that is not dominated itself."""
        by: dict[str, list[str]] = {}
        for name, others in self.beaten.items():
            free = [other for other in others if other not in self.beaten]
            by.setdefault((free or others)[0], []).append(name)
        return "; ".join(f"{listed(names)} by {other}" for other, names in by.items())

    def card(self, technique: Technique) -> str:
        """On which a run was out of memory."""
        sizes = [r.provenance.device_bytes for r in technique.records if r.status == "oom_gpu"]
        known = [size for size in sizes if size]
        return f" on a card of {self.budget.bytes(max(known))}" if known else ""

    # What would change it

    def changes(self) -> list[str]:
        return list(filter(None, (self.dearer(), *self.other_changes())))

    def other_changes(self) -> list[str]:
        """Than of the budget."""
        return list(filter(None, (self.more_data(), *self.gaps(), self.untuned())))

    def dearer(self) -> str:
        """The cheapest that does not fit and is known to be better, and the budget that it needs."""
        over = self.nearest
        if over and not self.fit:
            return f"The budget: {over[0]} needs least, {self.takes(over[0])}."
        if not over or not self.top or not self.standing:
            return ""
        for name in over:
            if gain := self.gain(name):
                return f"{gain} {self.takes(name)}."
        if not set(over) & set(self.standing.ranked(self.group)):
            return ""
        what = inside(self.standing.quantity.label)
        return (
            f"No larger budget: in {what} nothing that does not fit is known to be better than {self.top[0]}."
        )

    def gain(self, label: str) -> str:
        """Where it is known to be better than the first of those that fit: how a larger budget is told."""
        if not self.standing or not self.top or not self.standing.beats(label, self.top[0]):
            return ""
        gain = apart(self.standing, label, self.top[0], "better")
        return f"The budget: {label}, {gain} than {self.top[0]}, takes"

    def takes(self, label: str) -> str:
        return self.budget.told(self.needs[label].memory, self.needs[label].seconds)

    def more_data(self) -> str:
        """Ties that are no equality."""
        if len(self.top) < 2 or not self.standing:
            return ""
        first, quantity = self.top[0], self.standing.quantity
        twins = ([t.label for t in same] for same in self.comparison.twins)
        same = next((labels for labels in twins if first in labels), [first])
        if not (open_ := [name for name in self.top if name not in same]):
            return ""
        least = quantity.amounts(self.standing.detectable())[0]
        return (
            f"More test rows or seeds: they could break the tie of {first} with {listed(open_)}; of two "
            f"techniques this bench could have told apart {least} {inside(quantity.label)}."
        )

    def gaps(self) -> Iterable[str]:
        """What the bench lacks."""
        unranked = [f"{t.label} ({t.unranked_because})" for t in self.done if not t.ranked]
        if unranked and not self.comparison.random_weights:
            yield f"{SEEDS_TO_RANK} seeds that all stay finite: they would rank {listed(unranked)}."
        if busy := [t.label for t in self.done if t.disturbed]:
            less = "disturbed ones are not ranked in time, and may take less when they are alone"
            yield f"Undisturbed runs of {listed(busy)}: {less}."
        if edges := [title(self.comparison, s) for s in self.comparison.searches if s.edge and self.has(s)]:
            yield f"A wider search: the best of {listed(edges)} is at the edge of what was tried."
        if broke := [t.label for t in self.techniques if not t.done]:
            yield f"A result of {listed(broke)}, where there is none yet."

    def has(self, search: Found) -> bool:
        return arm(self.techniques, search.spec) is not None

    def untuned(self) -> str:
        """Whether each could be better than with what was asked for."""
        if self.comparison.searches or self.comparison.random_weights or not self.done:
            return "Tuning: below, each is at its own best." if self.group.endswith(IDENTICAL) else ""
        return "Tuning: each at its own best (--track tuned) may rank otherwise."


def leading(comparison: Comparison, verdicts: Verdicts) -> Standing | None:
    """The verdicts in what decides: of plain text, which asks nothing, the perplexity."""
    first = next(iter(verdicts.metrics), None)
    return verdicts.standings.get("perplexity", first) if comparison.plain_text else first


def first_of(standing: Standing | None, names: list[str]) -> list[str]:
    """Of names from the best on: the first and all that are tied with it."""
    return [n for n in names if standing and (n == names[0] or standing.verdict(names[0], n).word == "tied")]


def apart(standing: Standing, one: str, other: str, word: str = "worse") -> str:
    """`0.81 worse (95% CI 0.01 to 1.62)`: `one` than the other, as a verdict says."""
    d = standing.verdict(one, other).difference
    ends = sorted((d.low, d.high), key=abs)
    value, low, high = (end.lstrip("−") for end in standing.quantity.amounts(d.value, *ends))
    return f"{value} {word} ({CONFIDENCE:.0%} CI {low} to {high})"


def extreme(standing: Standing) -> str:
    return "highest" if standing.quantity.better == "higher" else "lowest"


def tied(names: list[str]) -> str:
    """Whom the first is tied with."""
    return f", tied with {listed(names[1:])}" if names[1:] else ""


def either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
