"""What can be concluded, in plain words and with its uncertainty; nothing that cannot."""

from math import inf

from harness.metrics import METRICS
from harness.record import RunRecord
from harness.report.comparison import SEEDS_TO_RANK, UNTOUCHED, Comparison, Technique
from harness.report.differences import inside
from harness.report.ensembles import against_members
from harness.report.stats import CONFIDENCE
from harness.report.text import duration, listed, number, size
from harness.report.tuning import title, turned
from harness.report.verdicts import MEMORY, ROWS_TO_RANK, TIME, Standing, Verdicts

FAR = 2  # times the perplexity, or 1 / FAR of a score: no noise, and not what a training is for
FALL = 0.01  # of a metric's range, at the least: from 0.1 BLEU-4 to 0 is no loss of a skill
MOST = 2  # overturned verdicts that the lead names
MUCH = 5.0  # percentage points of the answers that degenerate: so many more are seen by any reader
MANY = 0.1  # share of the test rows that the lead speaks of
UNITS = {MEMORY.name: size, TIME.name: duration}


def answer(comparison: Comparison, verdicts: Verdicts) -> list[str]:
    """In paragraphs: what was asked and gained; who is best, a paragraph a group; what else must be known."""
    first = [opening(comparison), *worse(comparison, verdicts), degenerate(comparison, verdicts)]
    first.append(unreached(comparison))
    done = [t for t in comparison.trained if t.done]
    if not comparison.trained:
        first.append("No technique has been run yet.")
    elif not done:
        first.append("None of them has a result.")
    elif comparison.random_weights:
        first.append("The weights were drawn at random, so that only the cost columns mean anything.")
    elif not verdicts.metrics:
        first.append("Without the test outputs of two runs there is no interval, and no ranking.")
    else:
        first += [gains(comparison, verdicts.metrics[0]), no_ranking(comparison, done)]
        if (rows := len(comparison.parts)) < ROWS_TO_RANK:
            first.append(f"{count(rows, 'test row')}: no ranking by scores, which takes {ROWS_TO_RANK}.")
    last = [overturned(comparison, verdicts), edges(comparison), disturbed(comparison)]
    last.append(against_members(comparison, verdicts))
    last += [f"{t.label} has no result: {t.status}." for t in comparison.techniques if not t.done]
    others = [t for t in done if t.objective != "sft"]
    if others and not comparison.random_weights:
        last.append(f"Other objectives, not ranked with the rest: {listed(aims(comparison, others))}.")
    paragraphs = [first, *(within(group, verdicts) for group in comparison.groups), last]
    return list(filter(None, (" ".join(filter(None, sentences)) for sentences in paragraphs)))


def opening(comparison: Comparison) -> str:
    spec, identical = comparison.spec, [t for t in comparison.trained if not t.tuned]
    techniques = identical or comparison.trained
    untuned = any(comparison.untuned(technique) for technique in identical)
    both = ", with the shared hyperparameters and each at its own best" * untuned
    if not techniques:
        return f"{spec.model}, untouched, on {data_title(comparison)}."
    seeds = sorted({len(t.records) for t in techniques})
    ends = dict.fromkeys((seeds[0], seeds[-1]))
    tested = f"{len(comparison.parts):,} " if comparison.parts else ""
    scored = sum(bool(t.done) for t in techniques)
    those = f"{scored} of them " * (scored < len(techniques))
    return (
        f"{count(len(techniques), 'technique')} fine-tuned {spec.model} on {data_title(comparison)}{both}, "
        f"{' to '.join(map(str, ends))} seed{'s' * (seeds != [1])} each"
        + (f", and {those}were scored on the same {tested}test rows." if scored else ".")
        if len(techniques) > 1 else
        f"{techniques[0].label} fine-tuned {spec.model} on {data_title(comparison)}{both} with "
        f"{count(seeds[0], 'seed')}" + (f" and was scored on {tested}test rows." if scored else ".")
    )  # fmt: skip


def worse(comparison: Comparison, verdicts: Verdicts) -> list[str]:
    """Who is worse than the untouched model by far, in any seed's perplexity or clearly in a score."""
    base = comparison.base(UNTOUCHED)
    if comparison.random_weights or not base or not base.done:
        return []
    found = []
    for technique in comparison.trained:
        said = []
        before, values = base.values(perplexity), technique.values(perplexity)
        if before and values and max(values) > FAR * max(before):
            most = number(max(values)) if max(values) < inf else "too large to write"
            said.append(f"perplexity {most} against {number(max(before))}")
        for standing in verdicts.metrics:
            metric = METRICS[standing.quantity.name]
            if metric.better == "lower":
                continue
            value, level = (standing.point(side.label) for side in (technique, base))
            far = FAR * value < level and level - value >= FALL * metric.range[1]
            if far and standing.verdict(technique.label, base.label).difference.sign < 0:
                shown = (number(score, metric.decimals) for score in (value, level))
                said.append(f"{metric.label} {' against '.join(shown)}")
        if said:
            found.append(f"{technique.label} ({listed(said)})")
    return [f"Worse than the untouched model by far: {listed(found)}."] if found else []


def degenerate(comparison: Comparison, verdicts: Verdicts) -> str:
    """Whose answers clearly end worse than the untouched model's. Whether to be cut is a fault depends on the
    reference: never-ending says it."""
    base, found = comparison.base(UNTOUCHED), []
    for technique in comparison.trained if base else ():
        said = []
        for standing in (s for s in verdicts.faults if s.quantity.name != "cut_rate"):
            difference = standing.verdict(technique.label, base.label).difference
            if difference.sign > 0 and difference.value >= MUCH:
                shares = (number(standing.point(side.label), 1) for side in (technique, base))
                said.append(f"{inside(standing.quantity.label)} {'% against '.join(shares)}%")
        if said:
            found.append(f"{technique.label} ({listed(said)})")
    return f"More answers degenerate than the untouched model's: {listed(found)}." if found else ""


def perplexity(record: RunRecord) -> float | None:
    """Infinite where it was measured and is null: no float holds it."""
    if "perplexity" not in record.scores:
        return None
    value = record.scores["perplexity"]
    return inf if value is None else value


def unreached(comparison: Comparison) -> str:
    beyond, rows = comparison.out_of_reach, len(comparison.parts)
    if beyond < MANY * rows or not beyond:
        return ""
    return f"{beyond:,} of {rows:,} {too_long(comparison)}: their scores are lower than they could be."


def too_long(comparison: Comparison) -> str:
    most = comparison.spec.hp.max_new_tokens
    return f"references are longer than an answer may be (hp.max_new_tokens, {most} tokens)"


def data_title(comparison: Comparison) -> str:
    dataset = comparison.spec.dataset
    return dataset.get("title") or dataset.get("name") or "its data"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def no_ranking(comparison: Comparison, done: list[Technique]) -> str:
    """Who is not ranked, why, and what was measured."""
    rest = [t for t in done if not t.ranked]
    if not rest:
        return ""
    if len(rest) == len(done) and {t.unranked_because for t in rest} == {"single seed"}:
        named = listed([f"{t.label} ({measured(comparison, t)})" for t in rest], len(rest))
        return f"Single seed: no ranking, which takes {SEEDS_TO_RANK}. Measured were {named}."
    facts = {t.label: filter(None, (t.unranked_because, measured(comparison, t))) for t in rest}
    named = listed([f"{label} ({'; '.join(known)})" for label, known in facts.items()], len(rest))
    return f"Not ranked, as that takes {SEEDS_TO_RANK} seeds that all stayed finite: {named}."


def measured(comparison: Comparison, technique: Technique) -> str:
    """Nothing of what diverged: its other seeds say too much good of it."""
    if technique.diverged:
        return ""
    means = {m: technique.mean(lambda r, m=m: comparison.score(r, m.name)) for m in comparison.metrics}
    return ", ".join(f"{m.label} {number(mean, m.decimals)}" for m, mean in means.items())


def gains(comparison: Comparison, standing: Standing) -> str:
    """Against the untouched model, which needs no other method to be compared with."""
    groups = {"rose with": [], "fell with": [], "did not measurably change with": []}
    verbs = dict(zip((1, -1, 0), groups, strict=True))
    for technique in comparison.trained:
        before = comparison.before(technique)
        if technique.ranked and before and technique.label in standing.entrants:
            verdict = standing.verdict(technique.label, before.label)
            if verdict.word in ("higher", "lower", "tied"):
                change = number(verdict.difference.value, standing.quantity.decimals, signed=True)
                groups[verbs[verdict.sign]].append(f"{technique.label} ({change})")
    told = [f"{verb} {listed(names)}" for verb, names in groups.items() if names]
    return f"Against the untouched model, {inside(standing.quantity.label)} {listed(told)}." if told else ""


def within(group: str, verdicts: Verdicts) -> list[str]:
    """Who is best in what, of those that are ranked with each other: the first sentence says who they are."""
    found = [highest(standing, group) for standing in verdicts.metrics]
    found += [cheapest(standing, group) for standing in verdicts.costs]
    first, *rest = list(filter(None, found)) or [""]
    if group and first:
        first = first[0].lower() + first[1:] if first.startswith(("In ", "No ")) else first
        first = f"{group[1].upper()}{group[2:]}, {first}"
    return [first, *rest]


def overturned(comparison: Comparison, verdicts: Verdicts) -> str:
    over = turned(comparison, verdicts) if comparison.searches else None
    if not over:
        return ""
    more = f"; and {len(over) - MOST} more" * (len(over) > MOST)
    turns = f"{count(len(over), 'verdict')} turn{'s' * (len(over) == 1)} over between the tracks"
    return f"{turns}: {'; '.join(over[:MOST])}{more}."


def edges(comparison: Comparison) -> str:
    """Whose best may not be its best."""
    found = [title(comparison, search) for search in comparison.searches if search.edge]
    return f"Best at the edge of what was tried, and perhaps better beyond: {listed(found)}." if found else ""


def highest(standing: Standing, group: str) -> str:
    names = standing.ranked(group)
    if len(names) < 2:
        return ""
    best, quantity, tied = names[0], standing.quantity, standing.tied(names[0], group)
    label = inside(quantity.label)
    if standing.alike(group) == [names]:
        return f"In {label}, {listed(names)} are tied: test rows and seeds cannot tell them apart."
    most = "highest" if quantity.better == "higher" else "lowest"
    value = number(standing.point(best), quantity.decimals)
    text = f"{best} has the {most} {label}, {value}"
    text += f", but is tied with {listed(tied)}" if tied else ""
    behind = next((name for name in names if name not in (best, *tied)), None)
    if not behind:
        return text + "."
    d = standing.verdict(best, behind).difference
    ends = sorted((d.low, d.high), key=abs)
    ahead, low, high = (end.lstrip("−") for end in quantity.amounts(d.value, *ends))
    link, side = "; it is" if tied else ",", "ahead of" if quantity.better == "higher" else "below"
    return f"{text}{link} {ahead} {side} {behind} ({CONFIDENCE:.0%} CI {low} to {high})."


def cheapest(standing: Standing, group: str) -> str:
    """Who took least, and who cannot be told from it."""
    names, quantity = standing.ranked(group), standing.quantity
    if len(names) < 2:
        return ""
    tied = standing.tied(names[0], group)
    if len(tied) == len(names) - 1:
        return f"No technique took clearly less {quantity.label.lower()} than all others."
    least, most = standing.point(names[0]), standing.point(names[-1])
    what = quantity.label.lower().removeprefix("peak ")
    text = f"{names[0]} took the least {what}, {UNITS[quantity.name](least)}"
    text += f", but is tied with {listed(tied)}" if tied else ""
    if names[-1] in tied:
        return text + "."
    ratio = most / least
    more = f"{ratio:.2g} times as much" if ratio >= 1.1 else f"{ratio - 1:.0%} more"
    return f"{text}; the highest mean, of {names[-1]}, is {more}."


def disturbed(comparison: Comparison) -> str:
    named = [
        f"{t.label} ({count(sum(bool(r.disturbed) for r in t.done), 'run')})"
        for t in comparison.trained if any(r.disturbed for r in t.done)
    ]  # fmt: skip
    return f"Times of disturbed runs are not ranked: {listed(named)}." if named else ""


def aims(comparison: Comparison, techniques: list[Technique]) -> list[str]:
    """`ORPO (preference accuracy 0.012 to 0.950)`: before and after, of what each aims at."""
    found = []
    for technique in techniques:
        metric, sides = METRICS[technique.aim], (comparison.before(technique), technique)
        values = [s.mean(lambda r, m=metric: comparison.score(r, m.name)) if s else None for s in sides]
        known = [number(v, metric.decimals) for v in values if v is not None]
        said = f"{technique.label} ({metric.label.lower()} {' to '.join(known)})"
        found.append(said if known else technique.label)
    return found
