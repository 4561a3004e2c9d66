"""The first table: what the brief asks for, best first, with what is best or tied with it marked."""

from collections.abc import Sequence

from harness.metrics import METRICS
from harness.report import blocks as b
from harness.report import tables
from harness.report.answer import too_long
from harness.report.comparison import Comparison, Technique
from harness.report.stats import CONFIDENCE
from harness.report.text import UNKNOWN, listed
from harness.report.verdicts import MEMORY, TIME, Verdicts
from harness.tuning import found_by

ARROW = {"higher": "\u00a0↑", "lower": "\u00a0↓"}
LIVE = (
    "Peak memory: the highest bytes of live tensors while attaching and training (allocated): the method's "
    "own demand, which depends least on the machine. On a GPU reserved adds what the allocator held, device "
    "adds the GPU's context: what must fit on the card. On a CPU live tensors are counted in repeated steps "
    "off the clock; host is the resident memory of the process, Python and its libraries included."
)
RESIDENT = (
    "Peak memory: the highest resident memory of the run's process while attaching and training, as live "
    "tensors were not counted. Python, its libraries and the loaded model are in it."
)
OWN = (
    " The data hold no pairs: the rejected answer is the untouched model's own, which most fine-tuning "
    "comes to like less than the reference."
)
TWINS = "{} score the same in every test row and with every seed, as one and the same method would."


def results(comparison: Comparison, verdicts: Verdicts) -> list[b.Block]:
    """A table an objective; the untouched models once, in the first."""
    found: list[b.Block] = [b.Heading("Results")]
    bases: Sequence[Technique] = comparison.bases
    rows = [t for members in comparison.tables.values() for t in ordered(comparison, verdicts, members)[0]]
    marks, notes = deviations(comparison, [*bases, *rows])
    for name, members in comparison.tables.items() or [("", [])]:
        if name not in ("sft", ""):
            own = members[0].aim == "preference_accuracy" and not comparison.pairs
            aim = METRICS[members[0].aim].label.lower()
            said = f"Techniques with the {name} objective. It aims at {aim}, not at"
            said += " the likelihood of references, so they are not ranked with the others."
            found.append(b.Prose(said + own * OWN))
        if bases or not found[1:]:
            found.append(b.Prose(legend(comparison, verdicts)))
        last = table(comparison, verdicts, members, bases, marks)
        found.append(last)
        bases = ()
    last.notes += [LIVE if comparison.counted else RESIDENT, *notes]
    if beyond := comparison.out_of_reach:
        last.notes.append(
            f"{beyond:,} of {len(comparison.parts):,} {too_long(comparison)}; no answer can equal them."
        )
    return found


def table(
    comparison: Comparison,
    verdicts: Verdicts,
    members: list[Technique],
    bases: Sequence[Technique] = (),
    marks: dict[str, str] | None = None,
) -> b.Table:
    """Of one objective: untouched models, then each track, best first. `marks`: label -> footnote mark."""
    order, best = ordered(comparison, verdicts, members, bases)
    aim = members[0].aim if members else ""
    aim = "" if aim in {m.name for m in comparison.metrics} else aim
    made = tables.brief(comparison, order, marks, aim)
    measured = [*([METRICS[aim]] if aim else []), *comparison.metrics]
    names = [name for metric in measured for name in ("", metric.name)] + [MEMORY.name, TIME.name]
    better = [metric.better for metric in measured for _ in range(2)] + ["lower", "lower"]
    heads = [name.partition(" (") for name in made.columns[1:]]  # in two lines, as columns are many
    columns = [f"{name}{ARROW[side]}\n{'(' * bool(unit)}{unit}"
               for (name, _, unit), side in zip(heads, better, strict=True)]  # fmt: skip
    rows = [[row[0], str(len(t.done)), *row[1:]] for t, row in zip(order, made.rows, strict=True)]
    marked = [
        (i, j + 2)
        for i, technique in enumerate(order)
        for j, name in enumerate(names)
        if technique.label in best.get(name, ())
    ]
    return b.Table([made.columns[0], "n", *columns], rows, made.notes, best=marked)


def ordered(
    comparison: Comparison, verdicts: Verdicts, members: list[Technique], bases: Sequence[Technique] = ()
) -> tuple[list[Technique], dict[str, set[str]]]:
    """The rows of a table; and by quantity who is best of its track, or tied with the best."""
    order: list[Technique] = []
    best: dict[str, set[str]] = {}
    for group in comparison.groups:
        inside = [t for t in members if group in comparison.groups_of(t) and t not in order]
        standings = [s for s in (*verdicts.metrics, *verdicts.costs) if len(s.ranked(group)) > 1]
        places = standings[0].ranked(group) if standings else []
        order += sorted(inside, key=lambda t: places.index(t.label) if t.label in places else len(places))
        for s in standings:
            first = s.ranked(group)[0]
            best.setdefault(s.quantity.name, set()).update([first, *s.tied(first, group)])
    return [*bases, *order, *(t for t in members if t not in order)], best


def legend(comparison: Comparison, verdicts: Verdicts) -> str:
    """What stands in the cells: unit, direction, n and ±."""
    rows = f"scores of {len(comparison.parts):,} test rows" if comparison.parts else "scores of the test rows"
    said = [f"Means over n seeds ± their sample standard deviation; {rows}. ↑ higher, ↓ lower is better."]
    if verdicts.standings:
        track = " of its track" * bool(comparison.searches)
        said.append(
            f"Bold: best{track}, or tied with the best by intervals of {CONFIDENCE:.0%} that hold at once."
        )
    said.append("Before: the untouched model.")
    return " ".join(said)


def deviations(comparison: Comparison, chosen: Sequence[Technique]) -> tuple[dict[str, str], list[str]]:
    """Label -> footnote mark, and the footnotes, in the order of the chosen: what a method has left of what
    was asked for."""
    marks: dict[str, str] = {}
    notes: list[str] = []
    for technique in chosen:
        for reason, changed in left(comparison, technique).items():
            mark = str(len(notes) + 1).translate(tables.SUPERSCRIPT)
            marks[technique.label] = f"{marks.get(technique.label, '')} {mark}"
            notes.append(f"{mark} {technique.label}: {', '.join(changed)}: {reason}")
    notes += [TWINS.format(listed([t.label for t in same], len(same))) for same in comparison.twins]
    return marks, notes


def left(comparison: Comparison, technique: Technique) -> dict[str, list[str]]:
    """Reason -> the hyperparameters, and options of a tuned one, that are others than was asked for."""
    found: dict[str, list[str]] = {}
    for name, (value, reason) in sorted(technique.newest.overrides.items()):
        shared = getattr(comparison.spec.hp, name, UNKNOWN)
        found.setdefault(reason, []).append(f"{words(name)} {value} instead of {shared}")
    if search := comparison.search_of(technique):
        asked = search.tuning.identical.options
        for name, value in technique.spec.options.items():
            if value != asked.get(name):
                reason = found_by(len(search.trials))
                found.setdefault(reason, []).append(f"{words(name)} {value} instead of {asked.get(name)}")
    return found


def words(name: str) -> str:
    return name.replace("_", " ")
