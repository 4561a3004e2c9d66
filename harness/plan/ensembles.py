"""Ensembles: finished runs of some methods that answer together, `qlora+galore`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness import method
from harness.errors import Problems, shown, unknown
from harness.plan.arms import Arm
from harness.spec import ENSEMBLE, OUTPUTS, WEIGHTS


def find_ensembles(texts: Sequence[str], arms: list[Arm], problems: Problems) -> list[dict]:
    """The options of each: log-probabilities are averaged, and weights too where those of all members can be
    merged. `arms`: the rows of the identical track."""
    found: list[dict] = []
    seen: dict[frozenset, str] = {}
    for text in texts:
        where, names = f"--{ENSEMBLE} {shown(text)}", text.split("+")
        if len(names) < 2 or not all(names):
            problems.add(where, "write it as METHOD+METHOD")
        elif len(set(names)) < len(names):
            problems.add(where, "has a member twice")
        elif earlier := seen.setdefault(frozenset(names), text) if frozenset(names) in seen else None:
            problems.add(where, f"is the same as {shown(earlier)}")
        else:
            seen[frozenset(names)] = text
            members = [arm for name in names for arm in member(name, arms, where, problems)]
            if len(members) == len(names):
                found += averages(members)
    return found


def member(name: str, arms: list[Arm], where: str, problems: Problems) -> list[Arm]:
    """The one arm of a name; none where something is wrong with it."""
    own = [arm for arm in arms if arm.cls.name == name]
    if not own:
        names = {arm.cls.name for arm in arms if arm.cls.trains}
        problems.add(where, replace(unknown("member", name, names), remedy="name it in --methods too"))
    elif not own[0].cls.trains:
        problems.add(where, f"{name} is not trained", "name methods that are")
    elif len(own) > 1:
        problems.add(where, f"{name} is swept, and has {len(own)} rows", "leave it out of --sweep")
    else:
        return own
    return []


def averages(members: list[Arm]) -> Iterator[dict]:
    named = [{"method": arm.cls.name, "options": arm.options, "changes": arm.changes} for arm in members]
    yield {"members": named, "average": OUTPUTS}
    if not any("merging" in method.build(arm.cls, arm.options).cannot for arm in members):
        yield {"members": named, "average": WEIGHTS}
