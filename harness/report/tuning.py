"""Both tracks side by side: every method with the shared hyperparameters, and at its own best."""

from itertools import combinations

from harness.record import TRAINING, Phase
from harness.report.blocks import Block, Heading, Listing, Prose, Table
from harness.report.comparison import Comparison, Technique, arm, scale
from harness.report.differences import interval, place
from harness.report.plots import criterion
from harness.report.tables import without_unknown
from harness.report.text import UNKNOWN, listed, number, spread
from harness.report.verdicts import Standing, Verdicts
from harness.tuning import Found

HOW = (
    "Each method with the shared hyperparameters (identical) and at its own best (tuned). For each, the same "
    "number of trials: the shared learning rate and, by factors of √10 from it, those that the method's card "
    "declares, moved on until the best is bracketed; then its further option at the best rate; then finer "
    "steps. A trial is a whole training on the same rows with a seed of its own, judged on the "
    "validation rows alone, "
)
EDGE = "best at the edge: no rate was tried beyond it, and a better one may lie there"
SAME = "the same runs"


def tracks(comparison: Comparison, verdicts: Verdicts) -> list[Block]:
    if not comparison.searches:
        return []
    judged = {criterion(found) for found in comparison.searches}
    found: list[Block] = [
        Heading("Tuned and identical"),
        Prose(HOW + f"by the {listed(sorted(judged))}. Test rows were scored for the chosen alone."),
    ]
    counts = {len(search.trials) for search in comparison.searches}
    if len(counts) > 1:
        each = [f"{title(comparison, s)} {len(s.trials)}" for s in comparison.searches]
        found.append(Prose(f"Not the same number of trials: {listed(each, len(each))}."))
    pairs = both(comparison)
    for standing in verdicts.metrics if pairs else ():
        found.append(side_by_side(comparison, standing, pairs))
    over = turned(comparison, verdicts)
    if over:
        found.append(Prose(f"Verdicts that turn over between the tracks: {len(over)}."))
        found.append(Listing([f"{verdict}." for verdict in over]))
    elif over is not None:
        found.append(Prose("No verdict turns over between the tracks."))
    return [*found, searched(comparison)]


def both(comparison: Comparison) -> list[tuple[str, Technique, Technique]]:
    """(title, identical, tuned) of each method that was run in both tracks."""
    found = []
    for search in comparison.searches:
        identical = arm(comparison.techniques, search.tuning.identical)
        tuned = arm(comparison.techniques, search.spec)
        if identical and tuned:
            found.append((title(comparison, search), identical, tuned))
    return found


def title(comparison: Comparison, found: Found) -> str:
    """Of the method; its technique's label, where that was run."""
    technique = arm(comparison.techniques, found.tuning.identical)
    spec, card = found.tuning.trial, found.records[-1].card
    return technique.label if technique else card.get("title") or spec.method


def side_by_side(
    comparison: Comparison, standing: Standing, pairs: list[tuple[str, Technique, Technique]]
) -> Table:
    quantity, rows = standing.quantity, []
    for name, identical, tuned in pairs:
        verdict = standing.verdict(tuned.label, identical.label) if tuned is not identical else None
        rows.append([
            name,
            *(number(standing.point(t.label), quantity.decimals) for t in (identical, tuned)),
            interval(verdict.difference, quantity) if verdict else SAME,
            (verdict.word if verdict else "") or UNKNOWN,
            place(standing, identical.label, comparison.groups_of(identical)[0]),
            place(standing, tuned.label, comparison.groups_of(tuned)[-1]),
        ])  # fmt: skip
    columns = [quantity.label, "Identical", "Tuned", "Tuned − identical", "Verdict",
               "Rank (identical)", "Rank (tuned)"]  # fmt: skip
    return Table(columns, rows, words=(0, 4, 5, 6))


def turned(comparison: Comparison, verdicts: Verdicts) -> list[str] | None:
    """The verdicts on two methods that are another one where both are tuned, those that are turned round
    first; None where none is ranked."""
    found, ranked = [], False
    for standing in verdicts.metrics:
        for (one, *a), (other, *b) in combinations(both(comparison), 2):
            words = [standing.verdict(x.label, y.label).word for x, y in zip(a, b, strict=True)]
            known = set(words) <= {"higher", "lower", "tied"} and a[0].objective == b[0].objective
            ranked |= known
            if known and words[0] != words[1]:
                said = (f"{standing.quantity.label}, {one} against {other}: {words[0]} with the shared "
                        f"hyperparameters, {words[1]} with each at its own best")  # fmt: skip
                found.append((("tied" in words), said))
    return [said for _, said in sorted(found, key=lambda pair: pair[0])] if ranked else None


def searched(comparison: Comparison) -> Table:
    """What was chosen, of what, and what it took."""
    unit, one = scale(max((trained_for(found) for found in comparison.searches), default=0))
    rows = [[title(comparison, found), *chosen(found), *cost(found, one)] for found in comparison.searches]
    columns = ["The searches", "Learning rate", "Tried", "Further option", "Judged by", "Trials",
               f"Tuning cost ({unit})", "Tokens", "Energy (Wh)"]  # fmt: skip
    table = without_unknown(Table(columns, rows, words=(0, 1, 2, 3, 4, 5)))
    table.notes = [
        "Tuning cost: attaching and training in all trials; it is in no technique's training time. Declared: "
        "the rates that the search began with."
    ]
    if any(record.disturbed for found in comparison.searches for record in found.records):
        table.notes.append("† Trials were disturbed, as by each other: alone they take less time.")
    if (
        len({sum(record.tokens.trained or 0 for record in found.records) for found in comparison.searches})
        == 1
    ):
        table.notes.append("Tokens: the same in the steps of all; what a method reads before them is added.")
    if any(found.edge for found in comparison.searches):
        table.notes.append(f"* {EDGE}.")
    return table


def chosen(found: Found) -> list[str]:
    low, high = found.tuning.rates
    rates, options = ([getattr(t, name) for t in found.trials] for name in ("rate", "option"))
    tried = f"{min(rates):g} to {max(rates):g}; declared {low:g} to {high:g}"
    broke = sum(trial.loss is None for trial in found.trials)
    count = f"{len(found.trials)}" + f", of which {broke} broke" * bool(broke)
    if not found.best:
        return [UNKNOWN, tried, UNKNOWN, UNKNOWN, count]
    option, _ = found.tuning.tunes
    values = listed([str(value) for value in found.tuning.search.values if value in options], len(options))
    shared = found.best.rate == found.tuning.trial.hp.learning_rate
    rate = f"{found.best.rate:g}" + ", the shared one" * shared + "*" * found.edge
    further = f"{option.replace('_', ' ')} {found.best.option} (tried: {values})"
    value = found.values[found.trials.index(found.best)]
    return [rate, tried, further if option else UNKNOWN, f"{criterion(found)} {number(value, 3)}", count]


def phases_of(found: Found) -> list[Phase]:
    """Of the trainings of all trials."""
    return [record.phases[name] for record in found.records for name in TRAINING if name in record.phases]


def trained_for(found: Found) -> float:
    return sum(phase.seconds for phase in phases_of(found))


def cost(found: Found, one: int) -> list[str]:
    """`one`: seconds of a unit of time."""
    phases = phases_of(found)
    tokens = [(r.tokens.trained or 0) + (r.tokens.attach or 0) for r in found.records]
    joules = [phase.joules for phase in phases if phase.joules is not None]
    energy = sum(joules) / 3600 if joules and len(joules) == len(phases) else None
    busy = any(record.disturbed for record in found.records)  # and the card's energy is not theirs alone
    time = spread([trained_for(found) / one]) + "†" * busy
    return [time, number(sum(tokens), 0), number(None if busy else energy)]
