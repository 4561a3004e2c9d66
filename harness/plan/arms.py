"""Arms: what stands in one row of a comparison is a method with options and hyperparameters of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, get_type_hints

from harness import method
from harness.errors import Problem, Problems, unknown
from harness.shape import fitting
from harness.spec import EVALUATION, Hyperparams, RunSpec

HYPERPARAMS = get_type_hints(Hyperparams, include_extras=True)  # name -> kind


@dataclass(frozen=True)
class Arm:
    """`changes`: hyperparameters of its own, in place of the shared ones; `reason`: for these."""

    cls: type[method.Method]
    options: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def spec(self, blank: RunSpec, seed: int) -> RunSpec:
        """`blank`: what all runs of the request have in common."""
        spec = replace(blank, method=self.cls.name, seed=seed, options=self.options)
        if not self.cls.trains:  # no seed and no training hyperparameter acts on it: one run, shared
            return replace(spec, seed=0, hp=blank.hp.untrained())
        return replace(spec, changes=self.changes, reason=self.reason)


def sweep(asked: Arm, swept: dict[str, list], hp: Hyperparams, problems: Problems) -> list[Arm]:
    """Every combination of the swept values; what was asked for, where nothing is swept."""
    lists = [right_values(asked, name, values, problems) for name, values in swept.items()]
    reason = "swept: " + "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in swept.items())
    found = []
    for values in product(*lists):
        chosen = dict(zip(swept, values, strict=True))
        own = {name: value for name, value in chosen.items() if name in HYPERPARAMS}
        changes = {name: value for name, value in own.items() if value != getattr(hp, name)}
        options = {name: value for name, value in chosen.items() if name not in own}
        with problems.caught(f"--sweep {asked.cls.name}"):
            made = method.build(asked.cls, {**asked.options, **options})
            found.append(Arm(asked.cls, method.options(made), changes, reason if changes else ""))
    return found


def right_values(asked: Arm, name: str, values: list, problems: Problems) -> list:
    """Those that an arm can have, in the form that they are used in."""
    where, cls = f"--sweep {asked.cls.name}", asked.cls
    found: list = []
    if wrong := list(misnamed(cls, name)):
        problems += wrong
        return []
    for value in values:
        with problems.caught(where):
            if name in HYPERPARAMS:
                found += fitting({name: value}, HYPERPARAMS, "", f"{where}.", problems).values()
            else:
                found.append(getattr(method.build(cls, {**asked.options, name: value}), name))
    return found


def misnamed(cls: type[method.Method], name: str) -> Iterator[Problem]:
    """Why an arm of this method can have no value of its own of what has this name."""
    where, options = f"--sweep {cls.name}.{name}", {option.name for option in fields(cls)}  # type: ignore[arg-type]
    if not cls.trains:
        yield Problem(f"{cls.name} is not trained", where, remedy="sweep a method that is")
    elif name in options and name in HYPERPARAMS:
        yield Problem("is both an option and a hyperparameter", where, remedy="rename the option")
    elif name in EVALUATION:
        remedy = f"make it another comparison, with --set hp.{name}"
        yield Problem("changes how all are evaluated", where, remedy=remedy)
    elif name in cls.overrides:
        value, reason = cls.overrides[name]
        yield Problem(f"{cls.name} has it at {value}, as {reason}", where, remedy="leave it out")
    elif name not in options and name not in HYPERPARAMS:
        known = options | set(HYPERPARAMS) - set(EVALUATION)
        yield unknown(f"option of {cls.name} or hyperparameter in --sweep", name, known)


def untunable(cls: type[method.Method]) -> Iterator[Problem]:
    """Why no learning rate can be searched for a method."""
    if "learning_rate" in cls.overrides:
        value, reason = cls.overrides["learning_rate"]
        what = f"{cls.name} has a learning rate of {value}, as {reason}"
        yield Problem(what, "--track tuned", remedy="leave it out")
