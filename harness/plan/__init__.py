"""Names become specs: a request is checked whole, and is a list of RunSpec or all that is wrong with it.

Nothing is created and no model is loaded here, so that a wrong request costs a second, not an hour.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness import machine
from harness.data import splits_of
from harness.errors import BadRequest, Problem, Problems
from harness.plan.arms import Arm, untunable
from harness.plan.dataset import find_dataset, find_sources
from harness.plan.ensembles import find_ensembles
from harness.plan.methods import find_methods
from harness.plan.model import DRAWN, find_model, local_folder, unreachable
from harness.plan.request import Request, find_plugins, load_preset, preset_names, read_request
from harness.plan.schedule import Plan, expected_seconds
from harness.spec import ENSEMBLE, Hyperparams, RunSpec, fingerprint
from harness.tuning import SEED, Tuning

__all__ = [
    "DRAWN", "Plan", "Request", "expected_seconds", "find_dataset", "find_plugins", "find_sources",
    "load_preset", "local_folder", "plan", "preset_names", "read_request", "unreachable",
]  # fmt: skip

MOST_STEPS = 10**6  # a fine-tuning takes thousands; the order of its rows is held in memory


def plan(request: Request, keep: bool = False) -> Plan:
    """The runs of a request. Raises BadRequest. `keep`: the rows that were read are kept for the runs."""
    problems = Problems()
    wanted = read_request(request, problems)
    model = find_model(wanted.model, problems)
    dataset = find_dataset(wanted.dataset, wanted.data, problems)
    sources = find_sources(request.sources, wanted.dataset, dataset, problems)
    plugins = find_plugins(request.plugins, problems)
    methods, arms = find_methods(wanted, plugins, dataset, problems)
    if "tuned" in request.tracks and dataset:
        problems.extend(unsearchable(methods, wanted.hp, dataset))
    for hp in dict.fromkeys(replace(wanted.hp, **arm.changes) for arm in arms if arm.cls.trains):
        problems.extend(misplaced(hp, request.elsewhere))
    for arm in arms if dataset and not problems else ():
        problems.add("", endless(replace(wanted.hp, **arm.changes), dataset["train"]))
    if "identical" not in request.tracks:
        arms = [arm for arm in arms if not arm.cls.trains or arm.cls.name in wanted.sweeps]
        if request.repeat and not any(arm.cls.trains for arm in arms):
            problems.add("--repeat", "what is run first is a search", "add --track identical tuned")
    together = ensembles(request, arms, problems) if arms else []
    problems.refuse()
    unused, prints = {}, {}
    try:
        if len(sources) == len(dataset["parts"]):  # what is on the hub is not downloaded for a plan
            unused = splits_of(dataset, sources, keep).unused
        prints = {"model": fingerprint(model.folder)} if model.folder else {}
        prints |= {name: fingerprint(path) for name, path in sources.items()}
    except OSError as error:  # a file in a folder of rows or weights that may not be read
        raise BadRequest(f"{error.filename}: {error.strerror}") from error
    locations = {"sources": sources, "plugins": [str(Path(plugin).resolve()) for plugin in plugins]}
    locations |= {"model": str(model.folder)} if model.folder else {}
    blank = RunSpec("", 0, model.name, dataset, wanted.hp, {}, prints, locations)
    specs = [arm.spec(blank, seed) for seed in wanted.seeds for arm in arms]
    first = next((spec for spec in specs if spec.trains), None)
    specs += [replace(first, repeat=number) for number in range(1, request.repeat + 1) if first]
    specs += [replace(blank, method=ENSEMBLE, seed=n, options=it) for it in together for n in wanted.seeds]
    searches = tunings(methods, blank, wanted.seeds) if "tuned" in request.tracks else []
    if searches and any(arm.cls.aim == "preference_accuracy" for arm in methods):
        base = next(spec for spec in specs if spec.method == "base")
        specs.append(replace(base, search={}))  # to its answers the trials prefer references
    found = Plan(specs, wanted.seeds, searches, request.trials)
    found.unused = unused
    return found


def ensembles(request: Request, arms: list[Arm], problems: Problems) -> list[dict]:
    if request.ensembles and "identical" not in request.tracks:
        problems.add("--ensemble", "its members are of the identical track", "add --track identical tuned")
        return []
    return find_ensembles(request.ensembles, arms, problems)


def misplaced(hp: Hyperparams, elsewhere: bool = False) -> Iterator[Problem]:
    """Why a run cannot be on so many devices."""
    if hp.devices > hp.batch_size:
        what = f"{hp.devices} devices share the {hp.batch_size} rows of a step"
        yield Problem(what, "hp.devices", remedy=f"raise hp.batch_size, or set hp.devices={hp.batch_size}")
    elif hp.devices > 1 and not elsewhere and hp.devices > (there := machine.devices()):
        remedy = f"set it to {there}; of another machine, plan --memory says what fits each of its cards"
        yield Problem(f"there are {there} here, not {hp.devices}", "hp.devices", remedy=remedy)
    if hp.sharding == "full" and hp.devices == 1:
        yield Problem(
            "one device has nobody to share with", "hp.sharding=full", remedy="set hp.devices to 2 or more"
        )


def unsearchable(methods: list[Arm], hp: Hyperparams, dataset: dict) -> Iterator[Problem]:
    """Why nothing could be chosen on the validation rows."""
    if not dataset["validation"]:
        yield Problem(
            "there are no validation rows to choose by", "--track tuned", remedy="raise data.validation"
        )
    if not hp.validations:
        yield Problem("nothing is validated", "--track tuned", remedy="set hp.validations to 1 or more")
    for arm in methods:
        yield from untunable(arm.cls)


def tunings(methods: list[Arm], blank: RunSpec, seeds: list[int]) -> list[Tuning]:
    """A search for each method that is trained, with a seed that is none of the report's."""
    seed = next(seed for seed in range(SEED, SEED + len(seeds) + 1) if seed not in seeds)
    trained = [arm for arm in methods if arm.cls.trains]
    return [
        Tuning(replace(arm.spec(blank, seed), search=arm.options), arm.cls.learning_rates, arm.cls.tunes)
        for arm in trained
    ]


def endless(hp: Hyperparams, rows: int) -> Problem | None:
    """Why a training would never end; None if it will."""
    steps = hp.max_steps or hp.epochs * max(1, rows / hp.batch_size)
    if steps <= MOST_STEPS:
        return None
    what = f"hp.max_steps={hp.max_steps}" if hp.max_steps else f"hp.epochs={hp.epochs:g} of {rows} rows"
    return Problem(f"{what} is more steps than could ever run: at most {MOST_STEPS:,}")
