"""The methods that a request names, each with its options."""

from collections.abc import Iterator
from dataclasses import replace

from harness import method, trial
from harness.errors import Problem, Problems, unknown
from harness.plan.arms import Arm, sweep
from harness.plan.request import Wanted
from harness.spec import Hyperparams


def find_methods(
    wanted: Wanted, plugins: list[str], dataset: dict | None, problems: Problems
) -> tuple[list[Arm], list[Arm]]:
    """-> each method, and the untouched row that it starts from, with all its options; and the same with
    those of a sweep in their places."""
    sources: dict = {}  # name -> where it is defined
    chosen: dict[str, tuple[Arm, list[Arm]] | None] = {}  # None: it is wrong
    with problems.caught():
        sources = method.known_methods(plugins)
        if not wanted.methods:
            known = ", ".join(sorted(sources))
            problems.add("", f"no methods: name some with --methods. Available: {known}")

    def choose(name: str) -> None:
        source = method.find(name, sources)
        if source is None:
            problems.append(unknown("method", name, sources))
        if source is None or name in chosen:
            return
        chosen[name] = None
        cls = trial.find(name, sources, plugins, problems)
        if cls is None:
            return
        if cls.baseline != name and cls.trains:
            choose("base")
            choose(cls.baseline)
        with trial.blamed(name, source, problems):
            options = {**wanted.preset_options.get(name, {}), **wanted.options.get(name, {})}
            asked = Arm(cls, method.options(method.build(cls, options)))
            arms = sweep(asked, wanted.sweeps.get(name, {}), wanted.hp, problems)
            for arm in arms:
                made, hp = method.build(cls, arm.options), replace(wanted.hp, **arm.changes)
                problems.extend(beyond(made, hp, dataset or {"parts": []}))
            chosen[name] = (asked, arms)

    if not sources:
        return [], []
    for name in wanted.methods:
        choose(name)
    spelt = [it[0].cls.name for name in wanted.methods if (it := chosen.get(name))]  # peft.VERA is peft.vera
    for name in sorted({name for name in spelt if spelt.count(name) > 1}):
        problems.add("--methods", f"{name} is named twice")
    misplaced_options(wanted, sources, chosen, problems)
    found = list(filter(None, chosen.values()))
    return [asked for asked, _ in found], [arm for _, arms in found for arm in arms]


def beyond(made: method.Method, hp: Hyperparams, dataset: dict) -> Iterator[Problem]:
    """What the hyperparameters or the data ask of a method that it cannot do."""
    own = made.own(hp)
    for limit, reason in made.cannot.items():
        if method.LIMITS[limit].asked(own, dataset):
            remedy = "leave it out, or " + method.LIMITS[limit].remedy.format(hp=own)
            yield Problem(f"method {made.name} cannot do {limit}: {reason}", remedy=remedy)


def misplaced_options(wanted: Wanted, sources: dict, chosen: dict, problems: Problems) -> None:
    """Adds the options of what is not asked for, and the preset's of what is no method."""
    for argument, said in (("--set", wanted.options), ("--sweep", wanted.sweeps)):
        for name in sorted(set(said) - set(chosen)):
            if method.find(name, sources):
                methods = " ".join(wanted.methods)
                problems.add(f"{argument} {name}.…", f"{name} is not among --methods {methods}")
            else:
                groups = {"hp", "data"} if argument == "--set" else set()
                problems.append(unknown(f"group in {argument}", name, groups | set(chosen)))
    for name in sorted(wanted.preset_options):
        if not method.find(name, sources):
            problems.append(unknown("method in the preset's options", name, sources))
