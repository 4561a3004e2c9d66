"""What can be concluded, in plain words and with its uncertainty; nothing that cannot."""

from math import inf, isfinite
from statistics import fmean

from harness.metrics import METRICS, Metric, compared
from harness.record import RunRecord
from harness.report.rows import UNTOUCHED, Comparison, Row, seconds
from harness.report.stats import CONFIDENCE, SEEDS_TO_RANK, Bootstrap
from harness.report.text import duration, listed, number, size

FAR = 2  # times the perplexity, or 1 / FAR of a score: no noise, and not what a training is for
FALL = 0.01  # of a metric's range, at the least: from 0.1 BLEU-4 to 0 is no loss of a skill
MANY = 0.1  # share of the test rows that the lead speaks of


def answer(comparison: Comparison, sample: Bootstrap | None) -> str:
    sentences = [opening(comparison), *worse(comparison, sample), unreached(comparison)]
    done = [row for row in comparison.trained if row.done]
    ranked = [row for row in done if row.ranked]
    if not comparison.trained:
        sentences.append("No technique has been run yet.")
    elif not done:
        sentences.append("None of them has a result.")
    elif comparison.random_weights:
        sentences.append("The weights were drawn at random, so that only the cost columns mean anything.")
    elif not sample:
        sentences.append("Without the test outputs of two rows there is no interval, and no ranking.")
    else:
        sentences += [*gains(comparison, sample, ranked), no_ranking(done, ranked)]
        for rows in comparison.objectives.values():
            equals = [row for row in ranked if row in rows]
            if len([row for row in equals if row.sums]) > 1:
                sentences += [ranking(sample, metric, equals) for metric in compared()]
    if len(ranked) > 1:
        if comparison.on_gpu:  # resident memory is Python's and its libraries' for the most part
            sentences.append(cheapest(ranked, comparison.peak_memory, "least memory", size))
        sentences.append(cheapest(ranked, seconds, "least training time", duration))
    for row in comparison.rows:
        if not row.done:
            sentences.append(f"{row.label} has no result: {row.status}.")
    others = [row for row in done if row.objective != "sft"]
    if others and not comparison.random_weights:
        sentences.append(f"Other objectives, not ranked with the rest: {listed(aims(comparison, others))}.")
    return " ".join(filter(None, sentences))


def opening(comparison: Comparison) -> str:
    spec, rows = comparison.spec, comparison.trained
    if not rows:
        return f"{spec.model}, untouched, on {data_title(comparison)}."
    seeds = sorted({len(row.records) for row in rows})
    ends = dict.fromkeys((seeds[0], seeds[-1]))
    tested = f"{len(comparison.parts):,} " if comparison.parts else ""
    scored = any(row.done for row in rows)
    return (
        f"{count(len(rows), 'technique')} fine-tuned {spec.model} on {data_title(comparison)}, "
        f"{' to '.join(map(str, ends))} seed{'s' * (seeds != [1])} each"
        + (f", and were scored on the same {tested}test rows." if scored else ".")
        if len(rows) > 1 else
        f"{rows[0].label} fine-tuned {spec.model} on {data_title(comparison)} with "
        f"{count(seeds[0], 'seed')}" + (f" and was scored on {tested}test rows." if scored else ".")
    )  # fmt: skip


def worse(comparison: Comparison, sample: Bootstrap | None) -> list[str]:
    """Who is worse than the untouched model by far, in any seed's perplexity or clearly in a score."""
    base = comparison.base(UNTOUCHED)
    if comparison.random_weights or not base or not base.done:
        return []
    found = []
    for row in comparison.trained:
        said = []
        before, values = base.values(perplexity), row.values(perplexity)
        if before and values and max(values) > FAR * max(before):
            most = number(max(values)) if max(values) < inf else "too large to write"
            said.append(f"perplexity {most} against {number(max(before))}")
        for metric in compared() if sample and row.sums and base.sums else ():
            value, level = (sample.point(metric.name, side.label) for side in (row, base))
            far = FAR * value < level and level - value >= FALL * metric.range[1]
            if far and sample.difference(metric.name, row.label, base.label).separable:
                shown = (number(score, metric.decimals) for score in (value, level))
                said.append(f"{metric.label} {' against '.join(shown)}")
        if said:
            found.append(f"{row.label} ({listed(said)})")
    return [f"Worse than the untouched model by far: {listed(found)}."] if found else []


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


def no_ranking(done: list[Row], ranked: list[Row]) -> str:
    """Says who is not ranked, and why."""
    rest = [row for row in done if not row.ranked]
    if not rest:
        return ""
    reasons = {row.unranked_because for row in rest}
    if not ranked and reasons == {"single seed"}:
        return f"Single seed: no ranking, which takes {SEEDS_TO_RANK}."
    named = listed([f"{row.label} ({row.unranked_because})" for row in rest])
    return f"Not ranked, as that takes {SEEDS_TO_RANK} seeds that all stayed finite: {named}."


def gains(comparison: Comparison, sample: Bootstrap, ranked: list[Row]) -> list[str]:
    """Against the untouched model, which needs no other method to be compared with."""
    rows = [row for row in ranked if row.sums]
    base = comparison.before(rows[0]) if rows else None
    if not base or not base.sums:
        return []
    found = sample.differences("bleu4", [(row.label, base.label) for row in rows])
    groups = {"rose with": [], "fell with": [], "did not measurably change with": []}
    for row, d in zip(rows, found, strict=True):
        change = f"{row.label} ({number(d.value, 2, signed=True)})"
        verb = ("rose with" if d.value > 0 else "fell with") if d.separable else list(groups)[2]
        groups[verb].append(change)
    told = [f"{verb} {listed(names)}" for verb, names in groups.items() if names]
    return [f"Against the untouched model, BLEU-4 {listed(told)}."]


def ranking(sample: Bootstrap, metric: Metric, ranked: list[Row]) -> str:
    names = [row.label for row in ranked if row.sums]
    names = [name for name in names if isfinite(sample.point(metric.name, name))]
    if len(names) < 2:
        return ""
    best, tied = sample.ties(metric.name, names)
    value = number(sample.point(metric.name, best), metric.decimals)
    behind = sorted(set(names) - {best, *tied}, key=lambda name: -sample.point(metric.name, name))
    if not behind:
        everyone = listed([best, *tied])
        return f"In {metric.label}, {everyone} are tied: test rows and seeds cannot tell them apart."
    d = sample.difference(metric.name, best, behind[0])
    lead = (
        f"{number(d.value, metric.decimals)} ahead of {behind[0]} ({CONFIDENCE:.0%} CI "
        f"{number(d.low, metric.decimals)} to {number(d.high, metric.decimals)})"
    )
    if tied:
        return (
            f"{best} has the highest {metric.label}, {value}, but is tied with {listed(tied)}; it is {lead}."
        )
    return f"{best} has the highest {metric.label}, {value}, {lead}."


def aims(comparison: Comparison, rows: list[Row]) -> list[str]:
    """`ORPO (preference accuracy 0.012 to 0.950)`: before and after, of what each aims at."""
    found = []
    for row in rows:
        before, metric = comparison.before(row), METRICS[row.aim]
        values = [r.mean(lambda r, m=row.aim: comparison.score(r, m)) if r else None for r in (before, row)]
        known = [number(v, metric.decimals) for v in values if v is not None]
        found.append(f"{row.label} ({metric.label.lower()} {' to '.join(known)})" if known else row.label)
    return found


def cheapest(ranked: list[Row], of, what: str, unit) -> str:
    """Methods whose ranges over seeds meet share the place."""
    values = {row.label: row.values(of) for row in ranked}
    values = {name: v for name, v in values.items() if v}
    if len(values) < 2:
        return ""
    order = sorted(values, key=lambda name: fmean(values[name]))
    first = [name for name in order if min(values[name]) <= max(values[order[0]])]
    least, most = fmean(values[order[0]]), fmean(values[order[-1]])
    text = f"{listed(first)} took the {what} ({unit(least)})"
    if order[-1] in first:
        return f"No technique took clearly less {what.partition(' ')[2]} than all others."
    if not least:
        return text + "."
    ratio = most / least
    more = f"{ratio:.2g} times as much" if ratio >= 1.1 else f"{ratio - 1:.0%} more"
    return f"{text}, {order[-1]} the most, {more}."
