"""Ensembles beside their members: what averaging gains, and what it costs to answer."""

from collections.abc import Iterator

from harness.record import RunRecord
from harness.report.blocks import Block, Heading, Listing, Prose, Table
from harness.report.comparison import GIB, Comparison
from harness.report.differences import difference_table, inside
from harness.report.tables import without_unknown
from harness.report.text import UNKNOWN, listed, spread
from harness.report.verdicts import Verdicts
from harness.spec import OUTPUTS, WEIGHTS

ANSWERING = ("evaluate", "generate")  # what everybody does who uses a model
WHAT = (
    "The finished runs of several techniques, those of each seed together; nothing is trained once more. "
    "Outputs averaged: tokens are chosen and scored by the mean of the members' log-probabilities, made a "
    "distribution again. Weights averaged: the mean of the members' changes is added to the untouched "
    "weights; this is one model again. Both are compared by the same intervals; they are not ranked, as "
    "they cost what all their members cost."
)
COST = (
    "Scoring: the likelihoods of all test rows; answering: all answers to them. Times compare where answers "
    "were decoded alike. Peak memory, of both: {}."
)
GAUGES = {
    "peak_allocated": "live tensors",
    "peak_host": "the whole process, which in a member's run has trained before",
}


def together(comparison: Comparison, verdicts: Verdicts) -> list[Block]:
    """None where no ensemble was asked for."""
    if not comparison.ensembles:
        return []
    found: list[Block] = [Heading("Ensembles"), Prose(WHAT)]
    pairs = [
        (ensemble, other)
        for ensemble in comparison.ensembles
        for other in (comparison.before(ensemble), *comparison.members(ensemble))
    ]
    table = difference_table("Against the members", verdicts.metrics, pairs)
    found += [table] if table.rows else []
    found.append(answering(comparison))
    return found + ([Listing(reasons)] if (reasons := list(undefined(comparison))) else [])


def answering(comparison: Comparison) -> Table:
    """What it costs to use an ensemble, and each of its members."""
    techniques = [t for e in comparison.ensembles for t in (e, *comparison.members(e))]
    records = [record for technique in techniques for record in technique.done]
    gauge = next((g for g in GAUGES if any(r.peak(g, ANSWERING) is not None for r in records)), "peak_host")

    def seconds(phase: str):
        return lambda r: r.phases[phase].seconds if phase in r.phases else None

    def gibibytes(record: RunRecord) -> float | None:
        peak = record.peak(gauge, ANSWERING)
        return None if peak is None else peak / GIB

    def weights(record: RunRecord) -> float | None:
        return None if record.sizes.weight_bytes is None else record.sizes.weight_bytes / GIB

    rows = [
        [
            technique.label,
            spread(technique.values(weights)[:1]),  # the same with each seed
            spread(technique.values(gibibytes)),
            *(spread(technique.values(seconds(phase))) for phase in ANSWERING),
            listed(sorted({r.kernels.decoding for r in technique.done if r.kernels.decoding})) or UNKNOWN,
        ]
        for technique in dict.fromkeys(techniques)
    ]
    columns = [
        "To answer with",
        "Weights (GiB)",
        "Peak memory (GiB)",
        "Scoring (s)",
        "Answering (s)",
        "Decoding",
    ]
    return without_unknown(Table(columns, rows, [COST.format(GAUGES[gauge])], words=(0, 5)))


def undefined(comparison: Comparison) -> Iterator[str]:
    """Why the weights of an ensemble's members were not averaged too."""
    averaged = [
        e.spec.options["members"] for e in comparison.ensembles if e.spec.options["average"] == WEIGHTS
    ]
    for ensemble in comparison.ensembles:
        if ensemble.spec.options["average"] == OUTPUTS and ensemble.spec.options["members"] not in averaged:
            cannot = {
                m.label: (m.card.get("cannot") or {}).get("merging") for m in comparison.members(ensemble)
            }
            if reasons := [f"{label} has no plain weights ({why})" for label, why in cannot.items() if why]:
                names = " + ".join(cannot)
                yield f"{names}, weights averaged: unsupported, as {listed(reasons)}."


def against_members(comparison: Comparison, verdicts: Verdicts) -> str:
    """In the metric that leads, in a sentence."""
    if not (comparison.ensembles and verdicts.metrics):
        return ""
    standing, said = verdicts.metrics[0], []
    for ensemble in comparison.ensembles:
        words: dict[str, list[str]] = {}
        for member in comparison.members(ensemble):
            word = standing.verdict(ensemble.label, member.label).word
            if word in LINKS:
                words.setdefault(LINKS[word], []).append(member.label)
        told = [f"{word} {listed(names)}" for word, names in words.items()]
        said += [f"{ensemble.label} is {listed(told)}"] if told else []
    label = inside(standing.quantity.label)
    return f"Ensembles against their members in {label}: {'; '.join(said)}." if said else ""


LINKS = {"higher": "higher than", "lower": "lower than", "tied": "tied with"}
