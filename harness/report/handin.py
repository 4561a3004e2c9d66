"""What a person hands in: one comparison on two pages, in the order that a paper has.

From the records alone, as all of a report: what is said to have been met on the way is in a record, and a
hybrid that was not run is called a proposal. What has no room here stands in the appendix.
"""

import re
from dataclasses import asdict
from itertools import combinations

from harness.metrics import METRICS, Metric
from harness.record import EAGER
from harness.report import blocks as b
from harness.report import differences, plots
from harness.report.answer import answer, count, data_title, too_long
from harness.report.appendix import setup
from harness.report.budget import Budget
from harness.report.certificate import facts
from harness.report.comparison import STATUS, Comparison, Technique
from harness.report.decision import choices_of, leading
from harness.report.differences import inside
from harness.report.results import left, legend, table, words
from harness.report.text import listed, shorten
from harness.report.verdicts import MEMORY, TIME, Standing, Verdicts

ALL = 12  # techniques whose reasons have room
CLAUSE, SENTENCE, PARAGRAPH = 170, 330, 1500  # characters that one of many may take
MOST = 8  # challenges
CHANGES = {  # axis -> what a method of it changes, in a sentence
    "parameterisation": "how the change of the weights is held",
    "optimizer": "how gradients become a step",
    "objective": "what is learned from",
    "perturbation": "the weights while they are trained",
}


def pages(comparison: Comparison, verdicts: Verdicts, budget: Budget | None = None) -> list[b.Block]:
    """The two pages, `judged` before. Texts of strangers are shortened, so that none fills a page."""
    return [
        b.Title(shorten(comparison.title, CLAUSE)),
        *first(comparison, verdicts, budget),
        b.Heading("Introduction"),
        b.Prose(introduction(comparison)),
        b.Heading("Techniques, and why"),
        *techniques(comparison),
        b.Heading("Data and their mapping"),
        dataset(comparison),
        b.Heading("Setup"),
        *training(comparison),
        b.Heading("Results"),
        *results(comparison, verdicts),
        b.Heading("Hybrid"),
        *hybrid(comparison, verdicts),
        b.Heading("Challenges met"),
        *challenges(comparison),
        b.Heading("Conclusion"),
        *conclusion(comparison, verdicts, budget),
    ]


def first(comparison: Comparison, verdicts: Verdicts, budget: Budget | None) -> list[b.Block]:
    """The answer, for who reads nothing else: which to take, what costs least, and a picture of it."""
    found: list[b.Block] = []
    for choice in choices_of(comparison, verdicts, budget):
        least = [choice.least(cost) for cost in verdicts.costs if len(choice.among(cost)) > 1]
        found.append(b.Lead(shorten(" ".join((choice.lead(), *least)), PARAGRAPH)))
    if notice := comparison.spec.dataset.get("notice"):
        found.append(b.Prose(notice))
    metric = leading_metric(comparison, verdicts)
    if not shown(comparison) or not metric:
        images = plots.cost_alone(comparison) if comparison.random_weights else None
        return found + picture("Peak memory against training time", comparison, images)
    panels = [(metric, MEMORY), (metric, TIME)]
    images = plots.scores_on_paper(comparison, verdicts, panels)
    front = plots.stepped(comparison, verdicts, panels)
    return found + picture(f"{metric.label} against peak memory and training time", comparison, images, front)


def leading_metric(comparison: Comparison, verdicts: Verdicts) -> Metric | None:
    standing = leading(comparison, verdicts)
    return METRICS[standing.quantity.name] if standing else next(iter(comparison.metrics), None)


def picture(what: str, comparison: Comparison, images: dict | None, front: bool = False) -> list[b.Block]:
    if images is None:
        return []
    tuned = any(comparison.untuned(technique) for technique in comparison.trained)
    hollow = " Hollow: with the shared hyperparameters, filled: at its own best." * tuned
    steps = " Grey steps: the Pareto front, as far as it is known." * front
    scored = not comparison.random_weights
    before = " Before: the untouched model." * (scored and any(map(comparison.before, comparison.trained)))
    several = any(len(technique.done) > 1 for technique in comparison.trained)
    bars = "Means over seeds, bars ± their standard deviation." if several else "A marker is a single run."
    return [b.Plot("pages", f"{what}. {bars}{hollow}{steps}{before}", images)]


def introduction(comparison: Comparison) -> str:
    trained = [t for t in comparison.trained if not t.tuned] or comparison.trained
    found = [
        f"Which way to fine-tune {cut(comparison.spec.model)} on {cut(data_title(comparison))} gains most "
        "over the untouched model, and what does it cost in memory and time?"
    ]
    if trained:
        of_each = " and, beside it, with the best that a search found for each" * bool(comparison.searches)
        found.append(
            f"{count(len(trained), 'technique')} {'is' if len(trained) == 1 else 'are'} compared with the "
            f"same hyperparameters{of_each}, on the same rows in the same order."
        )
    found.append(
        "Measured are the overlap of answers with references, the likelihood of references, peak memory and "
        "training time. How helpful answers are to a person these do not say."
        if not comparison.random_weights
        else "The weights were drawn at random, so that memory and time alone mean anything."
    )
    return " ".join(found)


def techniques(comparison: Comparison) -> list[b.Block]:
    """Each with its reasons, as its card has them: expected before any run."""
    cards = {t.spec.method: t.card for t in comparison.trained}
    if len(cards) > ALL:
        named = listed([card.get("title") or name for name, card in cards.items()], len(cards))
        return [b.Prose(shorten(f"{named}. The reasons for each are in the appendix.", PARAGRAPH))]
    found: list[b.Block] = []
    room = min(3, ALL // max(len(cards), 1)) * CLAUSE
    for name, card in cards.items():
        why = card.get("why") or {}
        reasons = [
            (part.capitalize(), sentence(why[part], room))
            for part in ("performance", "efficiency", "generalisation")
            if why.get(part)
        ]
        source = shorten(str(card.get("paper") or "").partition(",")[0], CLAUSE)
        what = sentence(card.get("summary") or "", room)
        title = cut(card.get("title") or name) + f" ({source})" * bool(source)
        found.append(b.Card(title, "", [("", what), *reasons] if what else reasons))
    return found or [b.Prose("None has been run yet.")]


def sentence(text: str, limit: int = CLAUSE) -> str:
    """With a capital and a full stop; of more characters than the limit, what of it is whole sentences."""
    text = " ".join(str(text).split())
    if len(text) > limit:
        parts = re.findall(r".*?[.;](?= )", text[: limit + 1])
        text = "".join(parts).rstrip(";") or text[:limit].rpartition(" ")[0].rstrip(",;:") + "…"
    return text[:1].upper() + text[1:] + "." * (bool(text) and text[-1] not in ".!?…")


def dataset(comparison: Comparison) -> b.Block:
    """The setting's table less the hyperparameters and what the title says."""
    hidden = hyperparameters(comparison) | {"Model", "Data", "Padding"}
    return b.Card("", "", [row for row in settings(comparison) if row[0] not in hidden])


def settings(comparison: Comparison) -> list[tuple[str, str]]:
    tables_ = [block for block in setup(comparison) if isinstance(block, b.Table)]
    return [(name, shorten(value, SENTENCE)) for name, value in tables_[0].rows]


def hyperparameters(comparison: Comparison) -> set[str]:
    """As the setting's table names them."""
    return {words(name).capitalize() for name in asdict(comparison.spec.hp)}


def training(comparison: Comparison) -> list[b.Block]:
    named = hyperparameters(comparison)
    shared = ", ".join(f"{name.lower()} {value}" for name, value in settings(comparison) if name in named)
    made = [facts(record) for record in comparison.records]

    def known(*names: str) -> str:
        """The values of some facts; of what differs between runs, all."""
        said = {name: list(dict.fromkeys(str(f[name]) for f in made if f.get(name))) for name in names}
        return "; ".join(
            f"{words(name.removeprefix('packages.'))} {listed(values, 3)}"
            for name, values in said.items()
            if values
        )

    packages = sorted({name for each in made for name in each if name.startswith("packages.")})
    rows = [
        ("Loop", "one for all techniques, AdamW unless a technique has its own optimizer; greedy answers "
         "from one decoder; each run a process of its own."),
        ("Shared hyperparameters", shared),
        ("Left by", shorten("; ".join(departures(comparison)), PARAGRAPH)),
        ("Machine", known("device", "precision", "attention", "driver")),
        ("Software", known("code", "python", *packages)),
        ("Metrics", "; ".join(signatures(comparison))),
    ]  # fmt: skip
    return [b.Card("", "", [(name, shorten(text, PARAGRAPH)) for name, text in rows if text])]


def departures(comparison: Comparison) -> list[str]:
    """What of the shared hyperparameters each technique has left, and why; the reason once."""
    reasons: dict[str, list[str]] = {}
    for technique in comparison.trained:
        for reason, changed in left(comparison, technique).items():
            reasons.setdefault(reason, []).append(f"{short(technique)} {', '.join(changed)}")
    return [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]


def signatures(comparison: Comparison) -> list[str]:
    """How each compared metric was computed."""
    found = {}
    for metric in shown(comparison):
        said = dict.fromkeys(
            r.signatures[metric.name] for r in comparison.records if r.signatures.get(metric.name)
        )
        if said:
            found[metric.label] = f"{metric.label} {listed(list(said), 2)}"
    return list(found.values())


def shown(comparison: Comparison) -> list[Metric]:
    return [] if comparison.random_weights else comparison.metrics


def short(technique: Technique) -> str:
    return cut(technique.label)


def cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


# Results


def results(comparison: Comparison, verdicts: Verdicts) -> list[b.Block]:
    found: list[b.Block] = [b.Prose(shorten(text, PARAGRAPH)) for text in answer(comparison, verdicts)]
    found += [short_table(comparison, verdicts, *members) for members in comparison.tables.items()]
    lead = leading_metric(comparison, verdicts)
    others = [metric for metric in shown(comparison) if metric is not lead]
    panels = [(metric, MEMORY) for metric in others]
    images = plots.scores_on_paper(comparison, verdicts, panels)
    labels, front = listed([metric.label for metric in others]), plots.stepped(comparison, verdicts, panels)
    return found + picture(f"{labels} against peak memory", comparison, images, front)


def short_table(
    comparison: Comparison, verdicts: Verdicts, objective: str, members: list[Technique]
) -> b.Table:
    made = table(comparison, verdicts, members)
    made.rows = [[cut(row[0], 70), *row[1:]] for row in made.rows]
    apart = f"Techniques of the {objective} objective. " * (len(comparison.objectives) > 1)
    gauge = "live tensors" if comparison.counted else "the process"
    scales = (
        f"BLEU-4 0 to 100, ROUGE-L F1 0 to 1. Peak memory: of {gauge} while training; 1 GiB is 2^30 bytes."
    )
    made.notes = [f"{apart}{legend(comparison, verdicts)} {scales}", *made.notes]
    return made


# Hybrid


def hybrid(comparison: Comparison, verdicts: Verdicts) -> list[b.Block]:
    """Those that were run, in their table above; else one to try, of two that were."""
    cards = {t.spec.method: t.card for t in comparison.trained if t.card.get("hybrid")}
    found: list[b.Block] = []
    for name, card in cards.items():
        why = [f"{k.capitalize()}: {sentence(text)}" for k, text in (card.get("why") or {}).items()]
        said = [
            f"{cut(card.get('title') or name)}, which was run:",
            sentence(card.get("summary") or ""),
            *why,
        ]
        found.append(b.Prose(f"{shorten(' '.join(said), PARAGRAPH)} What it reached is in the table."))
    if ensembles := comparison.ensembles:
        why = [f"{k.capitalize()}: {sentence(v)}" for k, v in (ensembles[0].card.get("why") or {}).items()]
        names = listed([short(ensemble) for ensemble in ensembles], 4)
        text = " ".join([f"{names}, ensemble{'s' * (len(ensembles) > 1)} of finished runs.", *why])
        found.append(b.Prose(f"{shorten(text, PARAGRAPH)} What was reached is in the table."))
    return found[:2] or [b.Prose(proposal(comparison, verdicts))]


def proposal(comparison: Comparison, verdicts: Verdicts) -> str:
    """Two that change different things can be one training; of any two the answers can be averaged."""
    done = [t for t in comparison.trained if t.done and not comparison.untuned(t)]
    if len(done) < 2:
        return "A hybrid takes two techniques with a result; here there are fewer, so that none is proposed."
    by_score = sorted(done, key=lambda t: place(verdicts.metrics[:1], t))
    by_memory = sorted(done, key=lambda t: t.mean(comparison.peak_memory) or 0.0)
    alone = [t for t in by_score if t.card.get("axis") in CHANGES and not t.card.get("hybrid")]
    pairs = [p for p in combinations(alone, 2) if p[0].card["axis"] != p[1].card["axis"]]
    if not pairs:
        one, other = by_score[:2]
        return (
            f"Proposed, not run: an ensemble of {short(one)} and {short(other)}, the two that scored best, "
            "by averaging their log-probabilities at each token. Performance: errors that only one makes are "
            "outvoted. Resources: both are trained, and answering holds and runs two models. Generalisation: "
            "an average follows no single training's accidents."
        )
    one, other = min(pairs, key=lambda pair: sum(by_score.index(t) + by_memory.index(t) for t in pair))

    def why(technique: Technique, what: str) -> str:
        text = (technique.card.get("why") or {}).get(what)
        return sentence(text) if text else "Not known."

    changed, also = (CHANGES[technique.card["axis"]] for technique in (one, other))
    return (
        f"Proposed, not run: {short(one)} and {short(other)} in one training. The one changes {changed}, "
        f"the other {also}, so that each can keep what it is good for. Performance, from {short(one)}: "
        f"{why(one, 'performance')} Resources, from {short(other)}: {why(other, 'efficiency')} "
        f"Generalisation: {why(one, 'generalisation')} Of the pairs that change different things, these two "
        "are best placed in score and memory together. Whether both gains add up, a run would have to show."
    )


def place(standings: list[Standing], technique: Technique) -> float:
    """In the first of some standings, best first; last where it has no score."""
    if not standings:
        return 0.0
    quantity, value = standings[0].quantity, standings[0].point(technique.label)
    return float("inf") if value != value else value * (-1 if quantity.better == "higher" else 1)


# Challenges


def challenges(comparison: Comparison) -> list[b.Block]:
    """What went otherwise than hoped, of what the records know, and what became of it. Most weighty first."""
    runs = [
        (short(t) + f" (seed {r.spec.seed})" * (not t.spec.untouched), r)
        for t in comparison.techniques
        for r in t.records
    ]
    found: dict[str, list[str]] = {}  # what -> whose
    for name, r in runs:
        if not r.ok:
            reason = f": {shorten(r.error.splitlines()[0], CLAUSE)}" if r.error else ""
            found.setdefault(f"{STATUS[r.status]}{reason}. The row stays, without this score", []).append(
                name
            )
    for name, r in runs:
        if r.disturbed:
            what = "the machine was busy with something else; times are marked and not ranked"
            found.setdefault(what, []).append(name)
    for name, r in runs:
        if r.kernels.reason:
            what = f"steps were computed as {r.kernels.rung or EAGER}: {shorten(r.kernels.reason, CLAUSE)}"
            found.setdefault(what, []).append(name)
    for name, r in runs:
        for warning in r.warnings:
            found.setdefault(shorten(" ".join(warning.split()), CLAUSE), []).append(name)
    said = [f"{what[:1].upper()}{what[1:]} ({listed(whose, 3)})." for what, whose in found.items()]
    if beyond := comparison.out_of_reach:
        said.append(
            f"{beyond:,} of {len(comparison.parts):,} {too_long(comparison)}: their rows stay, for all alike."
        )
    lost = next((r.data.left_out for _, r in runs if r.data.left_out), {})
    if lost:
        named = ", ".join(f"{words(why)} {n:,}" for why, n in lost.items())
        said.append(f"Rows were left out or cut, the same for all: {shorten(named, SENTENCE)}.")
    said += [sentence(shorten(warning, CLAUSE)) for warning in comparison.warnings]
    trials = [r for search in comparison.searches for r in search.records if not r.ok]
    if trials:
        said.append(f"{count(len(trials), 'trial')} of the searches broke; a search goes on without them.")
    if not said:
        return [b.Prose(f"None is on record: {count(len(runs), 'run')}, all of them ok, without a warning.")]
    more = [f"{len(said) - MOST + 1} more, in the appendix."] if len(said) > MOST else []
    return [b.Listing([*said[: MOST - bool(more)], *more])]


# Conclusion


def conclusion(comparison: Comparison, verdicts: Verdicts, budget: Budget | None = None) -> list[b.Block]:
    """Which to take and what would change it, the best of each quantity, what trades one for the other, and
    what it does not say."""
    said = []
    for choice in choices_of(comparison, verdicts, budget):
        changes = [f"What would change it: {change}" for change in choice.changes()[:1]]
        said.append(" ".join((f"Decision. {choice.lead()}", *changes)))
    for group in comparison.groups:
        best = []
        for s in (*verdicts.metrics, *verdicts.costs):
            names = s.ranked(group)
            if len(names) > 1:
                tied = s.tied(names[0], group)
                among = "no difference" if len(tied) == len(names) - 1 else names[0]
                tie = f" (tied with {listed(tied, 4)})" if tied and among != "no difference" else ""
                best.append(f"{inside(s.quantity.label)}: {among}{tie}")
        if best:
            said.append(f"Best{group}. {'; '.join(best)}.")
    traded = [text.rstrip(".") for text in differences.fronts(comparison, verdicts)]
    if traded:
        said.append(f"What trades score for cost, from the cheapest on: {'; '.join(traded)}.")
    rests = []
    if comparison.parts:
        rests.append(f"{len(comparison.parts):,} test rows of these data, and one model")
    if single := [short(t) for t in comparison.trained if t.done and not t.ranked]:
        rests.append(f"too few seeds, or one that diverged, to rank {listed(single, 4)}")
    if any(t.done for t in comparison.trained):
        said.append(
            f"What this rests on: {'; '.join(rests) or 'the runs above'}. A tie is what so many rows and "
            "seeds cannot tell apart, no proof of being equal."
        )
    said = said or ["There is no result yet."]
    return [b.Listing([shorten(text, PARAGRAPH) for text in said])]
