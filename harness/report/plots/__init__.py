"""The plots of a comparison, each with a caption that says what is drawn."""

from itertools import product

from harness.metrics import Metric
from harness.report import blocks as b
from harness.report import differences
from harness.report.comparison import Comparison
from harness.report.plots.cost import (
    NAMED,
    cost_alone,
    scores_by_cost,
    scores_on_paper,
)
from harness.report.plots.curves import (
    CROWD,
    by_learning_rate,
    criterion,
    loss_curves,
    of_objective,
    varied,
)
from harness.report.plots.forecast import said_and_measured
from harness.report.plots.memory import known, memory_by_part
from harness.report.plots.style import NARROW, Images, draw, drawn, lay_out, looks
from harness.report.reaching import SHARE, cost_to_reach, goal_of
from harness.report.text import listed, number
from harness.report.verdicts import MEMORY, TIME, Quantity, Verdicts
from harness.spec import digest

__all__ = [
    "NARROW", "Images", "cost_alone", "criterion", "draw", "drawn", "figures", "lay_out", "looks", "safe",
    "said_and_measured", "scores_on_paper", "stepped",
]  # fmt: skip

SCATTER = " against peak memory and training time."
MARKERS = " Markers are means over seeds, bars ± one sample standard deviation in both directions."
SINGLE = " A marker is a single run."
FRONT = (
    " The grey steps are the Pareto front as far as it is known: each technique on it is known to gain more "
    "than all that cost less."
)
BEFORE = " Before: the untouched model."
HOLLOW = " Hollow: with the shared hyperparameters; dotted: to the same method at its own best."
UNNAMED = f" Of more than {NAMED} the best in each score are named."
DASHED = " Dashed: with the shared hyperparameters."
STARRED = " *: a run was disturbed."
THIN = ", thin lines single seeds"
BY_PART = " By part: means over seeds at the highest moment of the training. The number is what was live"
BESIDE = (
    ", the one in brackets what the training took of the card, with what the allocator held beside it and "
    "the card's context"
)
REACHED = (
    "What it took until the validation loss was {share:.0%} of the way from {start}, the median before the "
    "first step, to {best}, the lowest mean over seeds of any technique: {loss}. Between two evaluations the "
    "loss is taken to fall on a straight line, which is late rather than early. Training time as above; "
    "energy is shared out by time, tokens by steps. Means ± standard deviations over the seeds that reach it."
)


def figures(comparison: Comparison, verdicts: Verdicts, suffix: str) -> list[b.Block]:
    """`suffix`: of the plots' names."""
    found: list[b.Block] = []

    def add(name: str, caption: str, images: Images | None) -> None:
        if images is not None:
            found.append(b.Plot(name + suffix, caption, images))

    starred = STARRED * any(t.disturbed for t in comparison.trained)
    bars = MARKERS if any(len(t.done) > 1 for t in comparison.trained) else SINGLE
    if comparison.random_weights:
        add("cost", "Peak memory against training time." + bars + starred, cost_alone(comparison))
        add("memory", parts(comparison), memory_by_part(comparison))
        return [b.Heading("Plots"), *found] if found else []
    labels = listed([metric.label for metric in comparison.metrics])
    tuned = any(comparison.untuned(t) for t in comparison.trained)
    many = UNNAMED * (len(comparison.trained) > NAMED)
    front = FRONT * stepped(comparison, verdicts, [*product(comparison.metrics, (MEMORY, TIME))])
    before = BEFORE * any(map(comparison.before, comparison.trained))
    said = labels + SCATTER + bars + front + before + HOLLOW * tuned + many + starred
    add("scores", said, scores_by_cost(comparison, verdicts))
    if fronts := differences.fronts(comparison, verdicts):
        found += [b.Prose("Pareto fronts, as far as differences are verdicts:"), b.Listing(fronts)]
    elif len(comparison.trained) > 1:
        found.append(b.Prose("No Pareto front: no two techniques are known to trade a score for a cost."))
    add("memory", parts(comparison), memory_by_part(comparison))
    add("tuning", rates(comparison), by_learning_rate(comparison))
    for objective, techniques in sorted(comparison.objectives.items()):
        caption = losses(comparison, objective) + DASHED * any(map(comparison.untuned, techniques))
        add(f"loss-{safe(objective)}", caption, loss_curves(comparison, objective))
        if goal := goal_of(techniques):
            numbers = {name: number(getattr(goal, name), 3) for name in ("start", "best", "loss")}
            table = cost_to_reach(comparison, techniques, goal)
            table.notes = [REACHED.format(share=SHARE, **numbers) + starred]
            found += [b.Heading(f"Cost to come {SHARE:.0%} of the way"), table]
    return [b.Heading("Plots"), *found] if found else []


# Captions, of what is drawn alone


def stepped(comparison: Comparison, verdicts: Verdicts, panels: list[tuple[Metric, Quantity]]) -> bool:
    """Whether any of these panels has a front."""
    return any(
        verdicts.steps(cost.name, metric.name, group)
        for (metric, cost), group in product(panels, comparison.groups)
    )


def parts(comparison: Comparison) -> str:
    of_parts, gauge = known(comparison)
    said = "Peak memory, the least first."
    if any(of_parts.values()):
        said += BY_PART + BESIDE * any(own.get("allocator, context") for own in of_parts.values()) + "."
    return said + " By phase: the highest over seeds." * bool(gauge)


def rates(comparison: Comparison) -> str:
    said = []
    if searches := comparison.searches:
        trials = [(s, *both) for s in searches for both in zip(s.trials, s.values, strict=True)]
        others = any(t.option != s.tuning.search.values[0] for s, t, value in trials if value is not None)
        said.append(
            "what the trials of each search were judged by, a run each (lines: at what was asked for; "
            + "hollow: at another value of the further option; " * others
            + "a cross: it broke; " * any(value is None for *_, value in trials)
            + "a ring: chosen)"
        )
    if varied(comparison):
        done = [t for t in comparison.trained if t.done]
        options = {(t.spec.method, digest(t.spec.options)) for t in done}
        said.append(
            "the scores of all arms on the test rows (means over seeds"
            + "; a number: over so many" * (len({len(t.done) for t in done}) > 1)
            + "; hollow: other options" * (len(options) > len({method for method, _ in options}))
            + ")"
        )
    return f"Against the learning rate: {', and '.join(said)}."


def losses(comparison: Comparison, objective: str) -> str:
    techniques = of_objective(comparison, objective)
    said = f"Loss of the {objective} objective."
    if any(len(t.done) > 1 for t in techniques):
        thin = THIN * (len(techniques) <= CROWD)
        said += f" Thick lines are means over seeds (training: also over neighbouring steps){thin}."
    else:
        said += " Single seeds; in training, means over neighbouring steps."
    return said + " What is far above what comes later is beyond the frame."


def safe(name: str) -> str:
    """As part of a file's name."""
    return "".join(c for c in name.lower() if c.isascii() and c.isalnum()) or "other"
