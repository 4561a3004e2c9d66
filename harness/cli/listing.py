"""What `list` prints: names with what they are, and what each run of a store was, as wide as the terminal."""

import shutil
import textwrap
from dataclasses import asdict
from io import StringIO

from harness.cli.progress import describe
from harness.metrics import compared
from harness.plain import plain, shorten
from harness.record import RunRecord
from harness.spec import RunSpec

NAMES = 18  # characters of a line that names have
ERROR = 300  # characters of why a run has no result; its record has the rest


def width() -> int:
    return max(shutil.get_terminal_size().columns, 2 * NAMES)


def names(what: str, items: dict[str, str], of_family: dict[str, list[str]]) -> str:
    """A paragraph each, and below it the names that a family has."""
    lines = [f"{what}:"]
    for name, text in items.items():
        lines.append(paragraph(f"  {name:{NAMES}} {text}"))
        if own := of_family.get(name):
            lines.append(paragraph(f"  {'':{NAMES}} {', '.join(own)}"))
    return "\n".join(lines if items else [*lines, "  none"])


def paragraph(text: str, indent: int = NAMES + 3) -> str:
    return textwrap.fill(plain(text), width(), subsequent_indent=" " * indent)


def run(record: RunRecord) -> dict:
    """As JSON values."""
    spec = record.spec
    return {
        "method": spec.method, "options": spec.options, "own_hyperparameters": spec.changes,
        "model": spec.model, "dataset": spec.dataset["name"], "seed": spec.seed, "trial": spec.trial,
        "started": record.started, "status": record.status, "error": record.error, "scores": record.scores,
    }  # fmt: skip


def results(records: list[RunRecord]) -> str:
    """A table of the runs that were tested alike, in the order of their start; below it why some failed."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.spec.evaluation, []).append(record)
    lines = ["results:" if records else "results:\n  none"]
    for group in groups.values():
        dataset = group[0].spec.dataset
        lines += [
            "",
            paragraph(f"{group[0].spec.model} on {dataset.get('title') or dataset['name']}"),
            table(group),
        ]
        for record in group:
            if not record.ok:
                said = f"{record.folder}: {record.status}: {shorten(record.error or '', ERROR)}"
                lines.append(paragraph(said, 4))
    return "\n".join(lines)


def table(group: list[RunRecord]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lead = compared(group[0].spec.dataset)[0]
    varied = differing([record.spec for record in group])
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    made.add_column("Method", overflow="fold")
    for head in ("Seed", "Started", "Status", lead.label, "Id"):
        made.add_column(head, no_wrap=True, justify="right" if head in ("Seed", lead.label) else "left")
    for record in group:
        score = record.scores.get(lead.name)
        value = "" if score is None else f"{score:.{lead.decimals}f}"
        if record.ok and record.judged_by_loss:
            value = f"loss {record.loss_of_trial:.3f}"
        spec = record.spec
        seed = "trial" if spec.trial else f"{spec.seed}" + ", again" * bool(spec.repeat)
        cells = [
            named(spec, varied[spec.method]),
            seed,
            record.started[:10],
            record.status,
            value,
            record.folder[-12:],
        ]
        made.add_row(*(Text(plain(cell)) for cell in cells))
    console = Console(file=StringIO(), width=width(), color_system=None, legacy_windows=False)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def named(spec: RunSpec, varied: set[str]) -> str:
    """`lora (rank 8)`: with what the runs of the method differ in; an ensemble by its members."""
    if spec.members:
        return describe(spec).partition(", seed")[0]
    chosen = {name: value for name, value in values(spec).items() if name in varied}
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())
    return f"{spec.method} ({told})" if told else spec.method


def values(spec: RunSpec) -> dict:
    return spec.options | asdict(spec.own_hp)


def differing(specs: list[RunSpec]) -> dict[str, set[str]]:
    """Method -> the options and hyperparameters in which its runs differ."""
    seen: dict[tuple[str, str], set[str]] = {}
    for spec in specs:
        for name, value in values(spec).items():
            seen.setdefault((spec.method, name), set()).add(repr(value))
    found: dict[str, set[str]] = {spec.method: set() for spec in specs}
    for (method, name), shown in seen.items():
        found[method] |= {name} if len(shown) > 1 else set()
    return found
