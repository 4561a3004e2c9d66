"""The report's order: the decision first, then the numbers, then why they can be believed."""

from collections.abc import Iterator
from math import isfinite

from harness.report import blocks as b
from harness.report import differences, tables
from harness.report.answer import answer
from harness.report.appendix import (
    cards,
    chat_template,
    fairness,
    local_copies,
    measuring,
    reproduction,
    setup,
)
from harness.report.attention import attended
from harness.report.budget import Budget
from harness.report.certificate import certificate
from harness.report.comparison import SEEDS_TO_RANK, STATUS, Comparison, score
from harness.report.decision import decision
from harness.report.ensembles import together
from harness.report.foretold import foretold
from harness.report.grades import graded
from harness.report.outputs import endings
from harness.report.plots import figures
from harness.report.results import results
from harness.report.stats import CONFIDENCE, POWER
from harness.report.tasks import tasks
from harness.report.text import UNKNOWN, duration, listed
from harness.report.tuning import tracks
from harness.report.unseen import unseen
from harness.report.verdicts import Verdicts, judged
from harness.store import Store

SEVERAL = (
    "Runs that differ in more than method, options and hyperparameters of their own are not compared with "
    "each other. Each comparison is a file of its own, the newest first."
)
CORRUPT = (
    "Nothing of these was used, and nothing was deleted. The command that made one of them runs it again and "
    "sets aside what stands there now."
)
RANKS = (
    "A rank is the places that the verdicts below leave to a technique: behind all that beat it, before all "
    "that it beats. Techniques that share a letter cannot be told apart."
)
FAMILY = (
    f"Intervals of {CONFIDENCE:.0%} that hold at once: of each score and cost, all pairs of techniques "
    "that are ranked with each other, each against the untouched models and a tuned one against itself with "
    "the shared hyperparameters are one family. Other test rows and other seeds are the chance; rows are "
    "shared by all, seeds as far as two techniques answer alike with each, and the seeds of a technique are "
    "taken to vary as they did or as those of all did, whichever is more. The verdict is a difference where "
    f"the interval excludes 0, else a tie, and takes {SEEDS_TO_RANK} seeds. Perplexity and costs are "
    "compared by their ratios, costs over seeds. Where one technique is far less steady than the others "
    "three seeds are few: the intervals then hold at about 90%."
)
SINGLE = " Where a technique has a single seed its intervals speak of other test rows alone."
NOISE = (
    "The noise floor: a run of this bench repeated unchanged, and how far apart it came out. A difference "
    "below it may have no reason."
)
UNREAD = "Records that could not be read: {}. They are listed at the end."
WENT_ON = (
    "From a checkpoint, in another process. Their times, energy and peaks are those of the steps that count; "
    "what was lost, and what it took to go on, stands here alone."
)


def documents(
    comparisons: list[Comparison], store: Store, corrupt: list[str], budget: Budget | None = None
) -> Iterator[tuple[str, list[b.Block]]]:
    """(file's name, without suffix, what it says): `report`, and of several comparisons one each."""
    if len(comparisons) == 1:
        yield "report", section(comparisons[0], store, "", corrupt, budget) + unreadable(corrupt)
        return
    yield "report", index(comparisons, [f"report-{c.name}" for c in comparisons], store, corrupt, budget)
    for c in comparisons:
        yield f"report-{c.name}", section(c, store, f"-{c.name}", [], budget, index="report")


def index(
    comparisons: list[Comparison],
    files: list[str],
    store: Store,
    corrupt: list[str],
    budget: Budget | None,
) -> list[b.Block]:
    """What differs between the comparisons, and what each one decided."""
    rows, apart = [], any(comparison.apart for comparison in comparisons)
    for comparison, name in zip(comparisons, files, strict=True):
        decided = decision(comparison, judged(comparison, store), budget)
        leads = [block.text for block in decided if isinstance(block, b.Lead)]
        rows.append([
            comparison.subject,
            *([comparison.apart or UNKNOWN] if apart else []),
            "\n".join(leads) or UNKNOWN,
            listed([t.label for t in comparison.trained]) or UNKNOWN,
            f"{sum(record.ok for record in comparison.records)} of {len(comparison.records)}",
            max(record.started for record in comparison.records)[:16].replace("T", " "),
            name,
        ])  # fmt: skip
    differs = ["What differs"] * apart
    columns = ["Comparison", *differs, "Decision", "Techniques", "Runs done", "Last run", "File"]
    words = tuple(i for i, column in enumerate(columns) if column != "Runs done")
    return [
        b.Title(f"{len(comparisons)} comparisons"),
        *[b.Notice(UNREAD.format(len(corrupt)))] * bool(corrupt),
        b.Prose(SEVERAL),
        b.Table(columns, rows, words=words, links=files),
        *unreadable(corrupt),
    ]


def unreadable(corrupt: list[str]) -> list[b.Block]:
    if not corrupt:
        return []
    return [b.Heading("Records that could not be read"), b.Prose(CORRUPT), b.Listing(corrupt)]


def section(
    comparison: Comparison,
    store: Store,
    suffix: str,
    corrupt: list[str],
    budget: Budget | None = None,
    index: str = "",
) -> list[b.Block]:
    """One comparison, whole. `suffix`: of its plots' names; `index`: the document that lists it."""
    verdicts = judged(comparison, store)
    checks = certificate(comparison)
    first = [
        b.Title(comparison.title, index),
        *decision(comparison, verdicts, budget),
        *notices(comparison, checks, corrupt),
        *results(comparison, verdicts),
        *figures(comparison, verdicts, suffix),
        *significance(comparison, verdicts),
        b.Heading("What was found"),
        *(b.Prose(paragraph) for paragraph in answer(comparison, verdicts)),
    ]
    rest = [
        *tracks(comparison, verdicts),
        *hybrids(comparison),
        *together(comparison, verdicts),
        *more(comparison),
        *unseen(comparison, store),
        *tasks(comparison, store),
        *endings(comparison, verdicts, store),
        b.Heading("Cost of each phase"),
        phases(comparison),
        *foretold(comparison, suffix),
        *graded(comparison, store),
        *attended(comparison, store, suffix),
        *generations(comparison, store),
        *setup(comparison),
        *chat_template(comparison),
        *cards(comparison),
        *fairness(comparison, checks),
        *measuring(comparison),
        *reproduction(comparison),
    ]
    return [*first, *(b.Heading(x.text, folded=True) if isinstance(x, b.Heading) else x for x in rest)]


def notices(comparison: Comparison, checks: list, corrupt: list[str]) -> list[b.Notice]:
    found = []
    if notice := comparison.spec.dataset.get("notice"):
        found.append(notice)
    if comparison.random_weights:
        found.append(
            "The model's weights were drawn at random: only the cost columns mean anything. "
            "Scores are left out."
        )
    if comparison.trained and not comparison.before(comparison.trained[0]):
        found.append("The untouched model has not been evaluated: there is no score before.")
    if differing := [f"{what} ({details})" for what, fine, details in checks if fine is False]:
        found.append("Not everything was the same for all rows. " + ". ".join(differing) + ".")
    if copies := local_copies(comparison.spec):
        found.append(
            f"The rows of {listed(copies)} were read from local copies (--source) in place of the hub. Their "
            "source and licence are as the dataset's spec names them, and hold if the copies are those."
        )
    found += comparison.warnings + preferences(comparison)
    if corrupt:
        found.append(UNREAD.format(len(corrupt)))
    return [b.Notice(text) for text in found]


def preferences(comparison: Comparison) -> list[str]:
    """What keeps preference accuracies from being compared."""
    found, again = [], "run again with --force"
    if len(sides := comparison.preferred_to) > 1:
        named = " against ".join(listed(runs, 4) for runs in sides.values())
        found.append(
            f"Preference accuracy is left out: the untouched model had other answers for {named}; {again}."
        )
    without = [
        f"{t.label} (seed {r.spec.seed})"
        for t in comparison.techniques for r in t.done if score(r, "preference_accuracy") is None
    ]  # fmt: skip
    if without and len(without) < sum(len(t.done) for t in comparison.techniques):
        found.append(
            f"{listed(without, 4)} had no answers of the untouched model to prefer references to; {again}."
        )
    return found


def more(comparison: Comparison) -> list[b.Block]:
    """What the brief's table leaves out: other scores, what it cost, what has no result."""
    found: list[b.Block] = []
    if not comparison.random_weights:
        quality = tables.quality(comparison)
        if "BLEU-4 (own base)" in quality.columns:
            own = {comparison.own_base(t).label for t in comparison.techniques if comparison.own_base(t)}
            if started := [t.label for t in comparison.techniques if any(r.start for r in t.done)]:
                own.add(f"of {listed(started)} its own start, scored before the first step")
            quality.notes = [
                f"Own base: the model that a method starts from where that is not the untouched one "
                f"({'; '.join(sorted(own))}), so that what rounding or a start of its own costs or gains is "
                "seen apart from the training."
            ]
        found += [b.Heading("More on quality"), quality]
        if by_part := tables.by_part(comparison):
            found += [b.Heading("Scores on each part of the data"), by_part]
    found += [b.Heading("More on cost"), tables.cost(comparison)]
    lost = [
        f"{technique.label} (seed {r.spec.seed}): {r.error or STATUS[r.status]}"
        for technique in comparison.techniques
        for r in technique.records
        if not r.ok
    ]
    went_on = [
        f"{technique.label} (seed {r.spec.seed}): after step {one.step:,}, "
        f"{'an unknown time' if one.lost is None else duration(one.lost)} of steps lost, "
        f"{duration(one.spent)} until it went on"
        for technique in comparison.techniques
        for r in technique.done
        for one in r.resumed
    ]
    found += [b.Heading("Runs without a result"), b.Listing(lost)] if lost else []
    return found + ([b.Heading("Runs that were stopped, and went on"), b.Prose(WENT_ON), b.Listing(went_on)]
                    if went_on else [])  # fmt: skip


def significance(comparison: Comparison, verdicts: Verdicts) -> list[b.Block]:
    if not verdicts.standings:
        return []
    found: list[b.Block] = []
    if ranks := differences.ranks(comparison, verdicts):
        found += [b.Heading("Ranks"), b.Prose(RANKS), *ranks]
    single = any(len(t.done) == 1 for t in comparison.trained)
    found += [
        b.Heading("Differences"),
        b.Prose(FAMILY + SINGLE * single + smallest(verdicts)),
        *differences.differences(comparison, verdicts),
    ]
    if floor := differences.noise_floor(comparison):
        found += [b.Prose(NOISE), floor]
    return found


def smallest(verdicts: Verdicts) -> str:
    """The true differences that the bench could have seen."""
    found = []
    for standing in verdicts.standings.values():
        quantity, least = standing.quantity, standing.detectable()
        if isfinite(least):
            found.append(f"{quantity.amounts(least)[0]} {differences.inside(quantity.label)}")
    told = "Between two techniques, the smallest difference that this bench could have seen (with a power of"
    return f" {told} {POWER:.0%}, the median of all pairs) is {listed(found)}." if found else ""


def phases(comparison: Comparison) -> b.Table:
    table = tables.phases(comparison)
    table.notes = ["Median seconds and highest peaks over seeds, each peak that of the phase alone."]
    return table


def generations(comparison: Comparison, store: Store) -> list[b.Block]:
    found = [] if comparison.random_weights else tables.examples(comparison, store)
    if not found:
        return []
    how = (
        "The same test rows for all, spread over the parts of the data and, within each, from the worst "
        "to the best mean ROUGE-L. Each technique answers with its lowest seed."
    )
    return [b.Heading("Answers side by side"), b.Prose(how), *found]


def hybrids(comparison: Comparison) -> list[b.Block]:
    """Each hybrid beside the techniques that it joins: why it should be good, and what was measured."""
    found = []
    for technique in comparison.trained:
        parents = [r for r in comparison.trained if r.spec.method in (technique.card.get("hybrid") or ())]
        if technique.card.get("hybrid"):
            aim = technique.aim
            why = technique.card.get("why") or {}
            found += [
                b.Prose(
                    f"{technique.label}: {technique.card.get('summary')} Why it should be good, before any "
                    "measurement:"
                ),
                b.Listing([f"{name.capitalize()}: {text}" for name, text in why.items()]),
                b.Prose("What was measured, beside the techniques that it joins and that were run:"),
                tables.brief(comparison, [*parents, technique], aim="" if aim == "bleu4" else aim),
            ]
    return [b.Heading("Hybrids"), *found] if found else []
