"""What every method must hold, tried on a small model: for the command `check`, and for our own tests."""

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.contract.checks import CHECKS, NEEDS
from harness.contract.stage import NotTried, Stage, Wrong, computing
from harness.method import Method

__all__ = ["CHECKS", "Finding", "Stage", "examine"]


@dataclass(frozen=True)
class Finding:
    holds: str  # what was looked at
    ok: bool | None  # None: not tried
    says: str = ""  # what to change, or why it was not tried


def examine(stage: Stage) -> Iterator[Finding]:
    """All checks, whatever one of them comes to."""
    failed: dict[Callable | str, str] = {}  # check or text of a crash -> what was looked at
    for precision, checks in CHECKS.items():
        stage.made.clear()
        with computing(precision) as stage.accelerator:
            for check in checks:
                yield found_by(check, stage, failed)


def found_by(check: Callable, stage: Stage, failed: dict) -> Finding:
    """A stranger's code runs in here: a check that it breaks has found that. A fault is told once."""
    holds = check.__doc__ or ""
    if earlier := failed.get(NEEDS.get(check)):
        return Finding(holds, None, f"not tried, as this fails: {earlier}")
    try:
        wrong = check(stage)
    except NotTried as why:
        return Finding(holds, None, f"not tried: {why}")
    except (Exception, SystemExit) as error:
        wrong = crash(error, stage.cls)
        if earlier := failed.get(wrong):
            return Finding(holds, None, f"not tried, as it fails with the same error: {earlier}")
        failed[wrong] = holds
    if wrong:
        failed[check] = holds
    return Finding(holds, not wrong, wrong or "")


def crash(error: BaseException, cls: type[Method]) -> str:
    """The hook, the file and line, and the error."""
    if isinstance(error, Wrong):
        return str(error)
    files = {inspect.getsourcefile(c) for c in cls.__mro__ if c not in (Method, object)}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in files] or frames[-1:]
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return f"{own[0].name} fails in {own[-1].filename}, line {own[-1].lineno}: {what}"
