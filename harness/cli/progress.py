"""What a bench shows while it runs: a live line with rich on a terminal, plain lines elsewhere."""

from contextlib import suppress
from typing import TYPE_CHECKING

from harness.cli.remaining import Remaining, amount
from harness.metrics import compared
from harness.plain import plain
from harness.plan import Plan

if TYPE_CHECKING:
    from rich.progress import TaskID

GIB = 2**30
WIDE = 110  # columns, at which bars, rates and peaks have room


def make(stream, plan: Plan):
    """The progress of a plan's runs for a stream: live if it is a terminal."""
    return (Live if stream.isatty() else Lines)(Steady(stream), Remaining(plan))


class Steady:
    """A stream that may go away, as a terminal or a pipe's reader does: what is shown is lost, no run is."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed, or a letter that it does not have
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def describe(spec) -> str:
    chosen = {
        name: value for name, value in spec.options.items() if spec.trial and value != spec.search.get(name)
    }
    changed = spec.changes | chosen
    own = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())
    name = "+".join(member.method for member in spec.members) or spec.method
    own = f"{spec.options['average']} averaged" if spec.members else own
    method = f"{name} ({own})" if own else name
    if spec.trial:
        return f"trial of {method}"
    return f"{method}, seed {spec.seed}{', again' * bool(spec.repeat)}" if not spec.untouched else method


def outcome(record, cached: bool) -> str:
    """One line of a finished run."""
    if not record.ok:
        return f"{record.status}: {record.error}"
    if record.judged_by_loss:
        return ("cached: " if cached else "") + f"validation loss {record.loss_of_trial:.3f}"
    parts = [
        f"{metric.label} {value:.{metric.decimals}f}"
        for metric in compared(record.spec.dataset)
        if (value := record.scores.get(metric.name)) is not None
    ]
    if record.spec.trains:
        peak = record.peak("peak_allocated") or record.peak("peak_host")
        parts.append(f"trained in {record.train_seconds:.1f} s")
        parts += [f"peak {peak / GIB:.2f} GiB"] if peak else []
    return ("cached: " if cached else "") + ", ".join(parts)


class Lines:
    """A line at each start, phase, tenth of the steps, and end, and what is left."""

    def __init__(self, stream, remaining: Remaining):
        self.stream, self.remaining = stream, remaining
        self.names: dict[str, str] = {}  # of the runs under way
        self.shown: dict[str, int] = {}

    def say(self, text: str) -> None:
        self.stream.write(plain(text) + "\n")  # at once: runs side by side never mix within a line
        self.stream.flush()

    def start(self, spec, number: int, total: int) -> None:
        self.remaining.start(spec, total)
        self.names[spec.digest], self.shown[spec.digest] = f"[{number}/{total}] {describe(spec)}", 0
        self.say(f"{self.names[spec.digest]}: started")

    def event(self, spec, values: dict) -> None:
        if "earlier" in values:
            self.remaining.went_on(spec, values["earlier"])
        if "step" in values and (tenth := values["step"] * 10 // values["steps"]) > self.shown[spec.digest]:
            self.shown[spec.digest] = tenth
            self.say(f"{self.names[spec.digest]}: {step_text(values)}")

    def end(self, record, cached: bool) -> None:
        self.remaining.end(record, cached)
        self.say(f"{describe(record.spec)}: {outcome(record, cached)}")
        if not cached:
            self.say(str(self.remaining))

    def close(self) -> None:
        pass


class Live:
    """A bar for each run under way and one for the bench, and a line for each that ended."""

    def __init__(self, stream, remaining: Remaining):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=stream)
        self.wide = console.width >= WIDE
        self.progress = Progress(
            TextColumn("{task.description}"),
            *[BarColumn(bar_width=20)] * self.wide,
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self.remaining = remaining
        self.bench = self.progress.add_task("bench", total=None, text="")
        self.progress.start()
        self.names: dict[str, str] = {}  # of the runs under way
        self.tasks: dict[str, TaskID] = {}

    def start(self, spec, number: int, total: int) -> None:
        self.remaining.start(spec, total)
        name = self.names[spec.digest] = rf"\[{number}/{total}] {describe(spec)}"
        self.tasks[spec.digest] = self.progress.add_task(name, total=None, text="starting")

    def event(self, spec, values: dict) -> None:
        self.show()
        task = self.tasks[spec.digest]
        if "earlier" in values:
            self.remaining.went_on(spec, values["earlier"])
        if "phase" in values:
            self.progress.update(task, description=f"{self.names[spec.digest]}: {values['phase']}")
        elif "step" in values:
            self.progress.update(
                task, total=values["steps"], completed=values["step"], text=step_text(values, self.wide)
            )
        elif "answered" in values:
            text = f"{values['answered']} of {values['rows']} answers"
            self.progress.update(task, total=values["rows"], completed=values["answered"], text=text)

    def end(self, record, cached: bool) -> None:
        from rich.markup import escape

        self.remaining.end(record, cached)
        self.show()
        if (task := self.tasks.pop(record.spec.digest, None)) is not None:
            self.progress.remove_task(task)
        mark = "[green]ok[/]" if record.ok else "[red]--[/]"
        self.progress.console.print(
            f"{mark} {describe(record.spec)}: {escape(plain(outcome(record, cached)))}", highlight=False
        )

    def show(self) -> None:
        self.progress.update(
            self.bench, total=self.remaining.total, completed=self.remaining.done, text=str(self.remaining)
        )

    def close(self) -> None:
        self.progress.stop()


def step_text(values: dict, whole: bool = True) -> str:
    """`whole`: with rate and peak, for which a narrow terminal has no room."""
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.3f}"
    text = f"step {values['step']}/{values['steps']}, loss {loss}"
    if values.get("seconds"):
        rate = values["tokens"] / values["seconds"]
        left = values["seconds"] / values["step"] * (values["steps"] - values["step"])
        text += f", {rate:,.0f} tokens/s" * whole + f", {amount(left, left)} left"
    if values.get("peak") and whole:
        text += f", peak {values['peak'] / GIB:.2f} GiB"
    return text
