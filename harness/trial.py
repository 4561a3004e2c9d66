"""A method is tried before it is planned: a stranger's file in a process of its own, and any class by what
it declares, so that what is wrong with it is named before anything starts.
"""

import difflib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import MISSING, asdict, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, get_type_hints

from harness import ROOT, method
from harness.errors import BadRequest, Problem, Problems, brief, unknown
from harness.metrics import METRICS
from harness.shape import Positive, misfits
from harness.spec import Hyperparams

SECONDS = 60  # for a plugin's import, which may be torch's and its kin's: ten where the disk is slow
NEARLY = 0.87  # alike, by difflib's measure: optimiser (0.89), but not load_nf4 beside load (0.67)
AIMS = tuple(name for name, metric in METRICS.items() if not metric.fault)
DECLARED = {  # what a class says of itself; texts and truth values are as their defaults
    "axis": Literal[method.AXES], "aim": Literal[AIMS], "mean_over": Literal["tokens", "rows"],
    "needs": list[str], "hybrid": list[str],
    "learning_rates": tuple[Positive, Positive], "tunes": tuple[str, list],
    "cannot": dict[Literal[tuple(method.LIMITS)], str], "overrides": dict,
}  # fmt: skip
CHILD = """
import os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
from harness import trial
trial.answer(answer, *sys.argv[2:])
"""


def find(name: str, sources: dict, plugins: list[str], problems: Problems) -> type[method.Method] | None:
    """The class of a method, or None and a problem for each thing that is wrong with it. `plugins`: the
    files that `sources` were made of."""
    source = method.find(name, sources)
    if strange(source) and (wrong := tried(name, source, plugins)):
        problems += wrong
        return None
    return examined(name, sources, problems)


def examined(name: str, sources: dict, problems: Problems) -> type[method.Method] | None:
    source, known = method.find(name, sources), len(problems)
    with blamed(name, source, problems):
        cls = method.resolve(name, source)
        for problem in faults(cls, sources):
            problems.add(f"method {name} ({place(source)})", problem)
        return cls if len(problems) == known else None


@contextmanager
def blamed(name: str, source: Path | EntryPoint, problems: Problems):
    """A stranger's code runs in here: whatever it raises is its fault, named; what it prints is no answer;
    where it goes, it goes alone."""
    with redirect_stdout(sys.stderr), chdir("."):
        try:
            yield
        except BadRequest as error:  # ours, which says itself what is wrong
            problems += error.problems
        except (Exception, SystemExit) as error:
            if type(error) is ValueError and not strange(source):
                problems.add(f"method {name}", str(error))
                return
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(place(source))]
            line = f", line {lines[-1]}" if lines else ""
            problems.add(f"method {name} ({place(source)}{line})", f"{type(error).__name__}: {error}")


def strange(source: Path | EntryPoint) -> bool:
    return isinstance(source, EntryPoint) or source.parent != method.FOLDER


def place(source: Path | EntryPoint) -> str:
    return source.value if isinstance(source, EntryPoint) else str(source)


# In a process of its own


def tried(name: str, source: Path | EntryPoint, plugins: list[str]) -> list[Problem]:
    """What is wrong with a stranger's method, found where its import may end, hang or crash the process."""
    # Files, as a pipe would stay open for as long as a process that the plugin started.
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as cried:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(ROOT), name, *plugins],
            stdin=subprocess.DEVNULL, stdout=said, stderr=cried, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(SECONDS)
            ended = None
        except subprocess.TimeoutExpired:
            ended = f"is still running {SECONDS:g} s after its import began"
        finally:
            try:  # whatever it started ends with it
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        said.seek(0)
        answer = said.read()
        cried.seek(0)
        last = cried.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    if answer and not ended:
        return [Problem(**problem) for problem in json.loads(answer)]
    code = child.returncode
    ended = ended or "ended the process that imported it, with " + (
        f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    )
    return [Problem(f"{ended}: {last[:300]}" if last else ended, f"method {name} ({place(source)})")]


def answer(out, name: str, *plugins: str) -> None:
    problems = Problems()
    examined(name, method.known_methods(plugins), problems)
    json.dump([asdict(problem) for problem in problems], out)
    out.close()


# What a class declares


def faults(cls: type[method.Method], sources: dict) -> list[Problem]:
    """Each declaration that a plan, a run or a report could not use."""
    known = {name for name in vars(method.Method) if not name.startswith("_")}
    wrong = []
    for name in sorted(known):
        default = getattr(method.Method, name)
        kind = DECLARED.get(name, type(default) if isinstance(default, str | bool) else None)
        if kind:
            wrong += misfits(getattr(cls, name), kind, name)
    return wrong or [
        *related(cls, sources), *excused(cls), *options(cls, known), *searched(cls), *hooks(cls),
        *misspelt(cls, known),
    ]  # fmt: skip


def related(cls, sources: dict) -> Iterator[Problem]:
    """Other methods that it names."""
    yield from (unknown("method in hybrid", name, sources) for name in cls.hybrid
                if not method.find(name, sources))  # fmt: skip
    if not (source := method.find(cls.baseline, sources)):
        yield unknown("baseline", cls.baseline, sources)
    elif cls.trains and method.resolve(cls.baseline, source).trains:
        yield Problem(f"{cls.baseline} trains; it must be an untouched row, as base is", "baseline")


def excused(cls) -> Iterator[Problem]:
    """What it cannot do or does otherwise, with the reason."""
    for limit, reason in cls.cannot.items():
        if not reason.strip():
            yield Problem("has no reason", f"cannot.{limit}")
    kinds = get_type_hints(Hyperparams, include_extras=True)
    for name, pair in cls.overrides.items():
        if name not in kinds:
            yield unknown("hyperparameter in overrides", name, kinds)
        elif list(misfits(pair, tuple[Any, str])) or not pair[1].strip():
            yield Problem(f'must be (value, "reason"), not {brief(pair)}', f"overrides.{name}")
        else:
            yield from misfits(pair[0], kinds[name], f"overrides.{name}")


def options(cls, known: set[str]) -> Iterator[Problem]:
    kinds = get_type_hints(cls, include_extras=True)
    for option in fields(cls):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in known or option.name == "name":
            yield Problem(f"{option.name} is no option", remedy="declare it without a type")
        elif default is MISSING:
            yield Problem("has no default", f"option {option.name}")
        elif default is not None:
            yield from misfits(default, kinds[option.name], f"the default of option {option.name}")


def searched(cls) -> Iterator[Problem]:
    """What a search for its best values begins with, and could not try."""
    low, high = cls.learning_rates
    if low > high:
        yield Problem("must be (lowest, highest)", "learning_rates")
    option, values = cls.tunes
    if option:
        known, said = [f.name for f in fields(cls)], Problems()
        if option not in known:
            yield unknown("option in tunes", option, known)
        for value in values if option in known else ():
            with said.caught("tunes"):
                method.build(cls, {option: value})
        yield from said


def hooks(cls) -> Iterator[Problem]:
    """Those that cannot be called as the harness calls them: with as many arguments as Method's own."""
    for name, own in inspect.getmembers(method.Method, callable):
        if name.startswith("_"):
            continue
        given, hook = list(inspect.signature(own).parameters), getattr(cls, name)
        call = f"{name} is called as {name}({', '.join(given)})"
        bound = isinstance(inspect.getattr_static(cls, name), classmethod | staticmethod)
        if bound and given[:1] == ["self"]:
            given = given[1:]
        try:
            inspect.signature(hook).bind(*given)
        except TypeError as error:
            yield Problem(f"{call}: {error}")


def misspelt(cls, known: set[str]) -> Iterator[Problem]:
    """`atach`, `optimiser`, `overides`: what is nearly a hook's name would be left uncalled in silence."""
    own = {n for c in cls.__mro__ if c not in (method.Method, object) for n in vars(c)}
    own -= known | {option.name for option in fields(cls)}
    for name in sorted(own):
        if near := difflib.get_close_matches(name, known, 1, NEARLY):
            yield Problem(f"{name} is no hook or declaration", nearest=near[0])
