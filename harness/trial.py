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
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_type_hints

from harness import ROOT, method
from harness.errors import brief, misfit, unknown
from harness.metrics import METRICS
from harness.spec import Hyperparams, out_of_range

SECONDS = 60  # for a plugin's import, which may be torch's and its kin's: ten where the disk is slow
NEARLY = 0.87  # alike, by difflib's measure: optimiser (0.89), but not load_nf4 beside load (0.67)
DECLARED = {  # what a class says of itself; texts and truth values are as their defaults
    "needs": list[str], "hybrid": list[str], "cannot": dict[str, str], "overrides": dict,
}  # fmt: skip
CHILD = """
import os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
from harness import trial
trial.answer(answer, *sys.argv[2:])
"""


def find(name: str, sources: dict, plugins: list[str], errors: list[str]) -> type[method.Method] | None:
    """The class of a method, or None and a line for each thing that is wrong with it. `plugins`: the files
    that `sources` were made of."""
    source = method.find(name, sources)
    if strange(source) and (wrong := tried(name, source, plugins)):
        errors += wrong
        return None
    return examined(name, sources, errors)


def examined(name: str, sources: dict, errors: list[str]) -> type[method.Method] | None:
    source = method.find(name, sources)
    with blamed(name, source, errors):
        cls = method.resolve(name, source)
        wrong = [f"method {name} ({place(source)}): {line}" for line in faults(cls, sources)]
        errors += wrong
        return None if wrong else cls


@contextmanager
def blamed(name: str, source: Path | EntryPoint, errors: list[str]):
    """A stranger's code runs in here: whatever it raises is its fault, named; what it prints is no answer;
    where it goes, it goes alone."""
    with redirect_stdout(sys.stderr), chdir("."):
        try:
            yield
        except (Exception, SystemExit) as error:
            if type(error) is ValueError and not strange(source):  # ours, which says itself what is wrong
                errors.append(f"method {name}: {error}")
                return
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(place(source))]
            line = f", line {lines[-1]}" if lines else ""
            errors.append(f"method {name} ({place(source)}{line}): {type(error).__name__}: {error}")


def strange(source: Path | EntryPoint) -> bool:
    return isinstance(source, EntryPoint) or source.parent != method.FOLDER


def place(source: Path | EntryPoint) -> str:
    return source.value if isinstance(source, EntryPoint) else str(source)


# In a process of its own


def tried(name: str, source: Path | EntryPoint, plugins: list[str]) -> list[str]:
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
        return json.loads(answer)
    code = child.returncode
    ended = ended or "ended the process that imported it, with " + (
        f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    )
    return [f"method {name} ({place(source)}): {ended}" + (f": {last[:300]}" if last else "")]


def answer(out, name: str, *plugins: str) -> None:
    errors: list[str] = []
    examined(name, method.available(plugins), errors)
    json.dump(errors, out)
    out.close()


# What a class declares


def faults(cls: type[method.Method], sources: dict) -> list[str]:
    """A line for each declaration that a plan, a run or a report could not use."""
    known = {name for name in vars(method.Method) if not name.startswith("_")}
    wrong = []
    for name in sorted(known):
        default = getattr(method.Method, name)
        kind = DECLARED.get(name, type(default) if isinstance(default, str | bool) else Any)
        if kind is not Any and (reason := misfit(getattr(cls, name), kind)):
            wrong.append(f"{name} {reason}")
    if wrong:
        return wrong
    for name, choices in (("axis", method.AXES), ("aim", METRICS), ("mean_over", ("tokens", "rows"))):
        if getattr(cls, name) not in choices:
            wrong.append(unknown(name, getattr(cls, name), choices))
    for limit, reason in cls.cannot.items():
        if limit not in method.LIMITS:
            wrong.append(unknown("limit in cannot", limit, method.LIMITS))
        if not reason.strip():
            wrong.append(f"cannot: {limit} has no reason")
    for name in cls.hybrid:
        if not method.find(name, sources):
            wrong.append(unknown("method in hybrid", name, sources))
    if not method.find(cls.baseline, sources):
        wrong.append(unknown("baseline", cls.baseline, sources))
    elif cls.trains and method.resolve(cls.baseline, method.find(cls.baseline, sources)).trains:
        wrong.append(f"baseline: {cls.baseline} trains; it must be an untouched row, as base is")
    return wrong + overridden(cls) + options(cls, known) + hooks(cls) + misspelt(cls, known)


def overridden(cls) -> list[str]:
    kinds, wrong = {f.name: f.type for f in fields(Hyperparams)}, []
    for name, pair in cls.overrides.items():
        if name not in kinds:
            wrong.append(unknown("hyperparameter in overrides", name, kinds))
        elif misfit(pair, list) or len(pair) != 2 or not isinstance(pair[1], str) or not pair[1].strip():
            wrong.append(f'overrides: {name} must be (value, "reason"), not {brief(pair)}')
        elif reason := misfit(pair[0], kinds[name]) or out_of_range(name, pair[0]):
            wrong.append(f"overrides: {name} {reason}")
    return wrong


def options(cls, known: set[str]) -> list[str]:
    kinds, wrong = get_type_hints(cls), []
    for option in fields(cls):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in known or option.name == "name":
            wrong.append(f"{option.name} is no option: declare it without a type")
        elif default is MISSING:
            wrong.append(f"option {option.name} has no default")
        elif default is not None and (reason := misfit(default, kinds[option.name])):
            wrong.append(f"the default of option {option.name} {reason}")
    return wrong


def hooks(cls) -> list[str]:
    """Those that cannot be called as the harness calls them: with as many arguments as Method's own."""
    wrong = []
    for name, own in inspect.getmembers(method.Method, callable):
        if name.startswith("_"):
            continue
        given, hook = list(inspect.signature(own).parameters), getattr(cls, name)
        bound = isinstance(inspect.getattr_static(cls, name), classmethod | staticmethod)
        if bound and given[:1] == ["self"]:
            given = given[1:]
        try:
            inspect.signature(hook).bind(*given)
        except TypeError as error:
            wrong.append(f"{name} is called as {name}({', '.join(given)}): {error}")
    return wrong


def misspelt(cls, known: set[str]) -> list[str]:
    """`atach`, `optimiser`, `overides`: what is nearly a hook's name would be left uncalled in silence."""
    own = {n for c in cls.__mro__ if c not in (method.Method, object) for n in vars(c)}
    own -= known | {option.name for option in fields(cls)}
    near = {name: difflib.get_close_matches(name, known, 1, NEARLY) for name in sorted(own)}
    return [f"{name} is no hook or declaration: did you mean {near[name][0]}?" for name in near if near[name]]
