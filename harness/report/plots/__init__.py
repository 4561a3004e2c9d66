"""The plots of a comparison, each with a caption that says what is drawn."""

from harness.report import blocks as b
from harness.report import differences
from harness.report.comparison import Comparison
from harness.report.plots.cost import (
    NAMED,
    cost_alone,
    scores_by_cost,
    scores_on_paper,
)
from harness.report.plots.curves import by_learning_rate, criterion, loss_curves
from harness.report.plots.forecast import said_and_measured
from harness.report.plots.memory import memory_by_part
from harness.report.plots.style import NARROW, Images, draw, drawn, lay_out, looks
from harness.report.reaching import SHARE, cost_to_reach, goal_of
from harness.report.text import listed, number
from harness.report.verdicts import Verdicts

__all__ = [
    "NARROW", "Images", "cost_alone", "criterion", "draw", "drawn", "figures", "lay_out", "looks", "safe",
    "said_and_measured", "scores_on_paper",
]  # fmt: skip

BARS = " Markers are means over seeds, bars ± one sample standard deviation in both directions."
SCATTER = (
    " against peak memory and training time." + BARS + " The grey steps are the Pareto front as far as it is "
    "known: each technique on it is known to gain more than all that cost less. The dashed line is the "
    "untouched model, as far as it is near."
)
HOLLOW = " Hollow: with the shared hyperparameters; dotted: to the same method at its own best."
UNNAMED = f" Of more than {NAMED} the best in each score are named."
DASHED = " Dashed: with the shared hyperparameters."
STARRED = " *: a run was disturbed."
RATES = (
    "Against the learning rate: what the trials of each search were judged by, a run each (lines: at what "
    "was asked for; hollow: at another value of the further option; a cross: it broke; a ring: chosen), and "
    "the scores of all arms on the test rows (means over seeds; a number: over so many; hollow: other "
    "options)."
)
LOSS = (
    "Loss of the {} objective. Thick lines are means over seeds (training: also over neighbouring steps), "
    "thin lines, where there is room, single seeds. What is far above what comes later is beyond the frame."
)
PARTS = (
    "Peak memory by part and by phase, the least first. By part: means over seeds at the highest moment of "
    "the training. The number is what was live, the one in brackets what the training took of the card, with "
    "what the allocator held beside it and the card's context. By phase: the highest over seeds."
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
    if comparison.random_weights:
        add("cost", "Peak memory against training time." + BARS + starred, cost_alone(comparison))
        add("memory", PARTS, memory_by_part(comparison))
        return [b.Heading("Plots"), *found] if found else []
    labels = listed([metric.label for metric in comparison.metrics])
    tuned = any(comparison.untuned(t) for t in comparison.trained)
    many = UNNAMED * (len(comparison.trained) > NAMED)
    add("scores", labels + SCATTER + HOLLOW * tuned + many + starred, scores_by_cost(comparison, verdicts))
    if fronts := differences.fronts(comparison, verdicts):
        found += [b.Prose("Pareto fronts, as far as differences are verdicts:"), b.Listing(fronts)]
    add("memory", PARTS, memory_by_part(comparison))
    add("tuning", RATES, by_learning_rate(comparison))
    for objective, techniques in sorted(comparison.objectives.items()):
        caption = LOSS.format(objective) + DASHED * tuned
        add(f"loss-{safe(objective)}", caption, loss_curves(comparison, objective))
        if goal := goal_of(techniques):
            numbers = {name: number(getattr(goal, name), 3) for name in ("start", "best", "loss")}
            table = cost_to_reach(comparison, techniques, goal)
            table.notes = [REACHED.format(share=SHARE, **numbers) + starred]
            found += [b.Heading(f"Cost to come {SHARE:.0%} of the way"), table]
    return [b.Heading("Plots"), *found] if found else []


def safe(name: str) -> str:
    """As part of a file's name."""
    return "".join(c for c in name.lower() if c.isascii() and c.isalnum()) or "other"
