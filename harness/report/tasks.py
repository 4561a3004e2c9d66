"""What lm-evaluation-harness has measured of the models that runs have kept: where somebody has asked it."""

from collections.abc import Iterator
from typing import TypedDict

from harness.plain import shorten
from harness.record import RunRecord
from harness.report.blocks import Block, Heading, Notice, Prose, Table
from harness.report.comparison import Comparison, Technique
from harness.report.text import listed, number, spread
from harness.shape import Annotated, Count, check, parse
from harness.store import LM_EVAL, Store

HOW = (
    "Asked by lm-evaluation-harness of the models as they were kept, with its own prompts and rows. These "
    "scores rank nothing here: no verdict and no decision reads them."
)
NOTE = (
    "↑: higher is better, ↓: lower. ± is the standard deviation over seeds. SE, of one run, is lm_eval's "
    "standard error: it speaks of other rows alone, not of other seeds."
)
WIDE = 4  # scores beside each other, which a page has room for
NAME = 60  # characters
Value = Annotated[float, (-1e100, 1e100)]


class TaskScore(TypedDict):
    """`asked`: the task or group that was typed, with `num_fewshot` and `limit` where these were; `content`:
    a hash of what it asks; `shots`, `samples`: as it was done."""

    asked: str
    num_fewshot: Count | None
    limit: Count | None
    content: str
    lm_eval: str  # its version
    task: str
    metric: str
    filter: str
    value: Value
    stderr: Annotated[float, (0.0, 1e100)] | None
    higher_is_better: bool | None
    samples: Count
    shots: Count | None
    version: str  # the task's own


Seeds = list[TaskScore]


def task_scores(store: Store, record: RunRecord) -> list[TaskScore]:
    """None where nobody has asked. Raises ValueError, OSError for what are no scores."""
    if not (store.folder / record.folder / LM_EVAL).exists():
        return []
    found = parse(store.text(record.folder, LM_EVAL))
    check(found, list[TaskScore], LM_EVAL)
    return found


def tasks(comparison: Comparison, store: Store) -> list[Block]:
    read, corrupt = scores_by_task(comparison, store)
    columns = list(read)
    parts = [columns[i : i + WIDE] for i in range(0, len(columns), WIDE)]
    found: list[Block] = [table(comparison, {column: read[column] for column in part}) for part in parts]
    if corrupt:
        found.append(Notice(f"Scores of lm-evaluation-harness that could not be read: {listed(corrupt)}."))
    return [Heading("Tasks of lm-evaluation-harness"), Prose(HOW), *found] if found else []


def scores_by_task(
    comparison: Comparison, store: Store
) -> tuple[dict[tuple, dict[Technique, Seeds]], list[str]]:
    """-> what was asked, by `key`, of whom; and the runs whose scores could not be read. Nothing where the
    untouched model alone was asked, which other comparisons share."""
    read: dict[tuple, dict[Technique, Seeds]] = {}
    corrupt = []
    for technique in comparison.techniques if not comparison.random_weights else []:
        for record in technique.done:
            try:
                once = {key(score): score for score in task_scores(store, record)}  # asked in two ways
                for column, score in once.items():
                    read.setdefault(column, {}).setdefault(technique, []).append(score)
            except (OSError, ValueError) as error:
                corrupt.append(f"{record.folder} ({error})")
    trained = any(technique.spec.trains for by in read.values() for technique in by)
    return (dict(sorted(read.items())) if trained or not comparison.trained else {}), corrupt


def asked_of(
    comparison: Comparison, store: Store
) -> Iterator[tuple[str, str, TaskScore, dict[Technique, Seeds]]]:
    """(label, name, one of its scores, those of each technique) of each task and metric, for programs. The
    name is as unlike any other as what was asked."""
    for column, by in scores_by_task(comparison, store)[0].items():
        first = next(iter(by.values()))[0]
        yield asked(first) + f": {first['metric']}", "/".join(("lm_eval", *column)), first, by


def key(score: TaskScore) -> tuple:
    """Equal for scores that can be compared."""
    names = ("task", "shots", "samples", "metric", "filter", "version", "lm_eval", "content")
    return tuple(str(score[name]) for name in names)  # type: ignore[literal-required]


def table(comparison: Comparison, read: dict[tuple, dict[Technique, Seeds]]) -> Table:
    firsts = {column: next(iter(by.values()))[0] for column, by in read.items()}
    heads = [head(score) for score in firsts.values()]
    told = [f"{text} [lm_eval {s['lm_eval'][:12]}, {s['content'][:12]}]" if heads.count(text) > 1 else text
            for text, s in zip(heads, firsts.values(), strict=True)]  # fmt: skip
    rows = []
    for technique in comparison.techniques:
        if any(technique in by for by in read.values()):
            cells = [cell(by.get(technique, []), len(technique.done)) for by in read.values()]
            rows.append([technique.label, *cells])
    which = dict.fromkeys(described(score) for score in firsts.values())
    return Table(["Technique", *told], rows, [NOTE, *which])


def head(score: TaskScore) -> str:
    """`hellaswag, 0-shot: acc_norm ↑`."""
    name = score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"
    arrow = {True: " ↑", False: " ↓", None: ""}[score["higher_is_better"]]
    return f"{asked(score)}: {shorten(name, NAME)}{arrow}"


def asked(score: TaskScore) -> str:
    few = "" if score["shots"] is None else f", {score['shots']}-shot"
    first = "" if score["limit"] is None else f", first {score['samples']:,} rows"
    return f"{shorten(score['task'], NAME)}{few}{first}"


def described(score: TaskScore) -> str:
    """What tells two columns of one head apart, and what to ask for to have the same again."""
    own, program, content = (shorten(score[name], NAME) for name in ("version", "lm_eval", "content"))
    return f"{asked(score)}: {score['samples']:,} rows, version {own}, lm_eval {program}, hash {content}."


def cell(seeds: Seeds, done: int) -> str:
    """Of several seeds their mean ± standard deviation; of one its value, with lm_eval's standard error."""
    if not seeds:
        return number(None)
    values = [score["value"] for score in seeds]
    decimals = 4 if max(map(abs, values)) < 10 else 2
    text, [error] = spread(values, decimals), [score["stderr"] for score in seeds[:1]]
    if len(seeds) == 1 and error is not None:
        text += f" (SE {number(error, decimals)})"
    return text if len(seeds) == done else f"{text}, {len(seeds)} of {done} seeds"
