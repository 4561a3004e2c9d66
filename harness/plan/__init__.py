"""Names become specs: a request is checked whole, and is a list of RunSpec or all that is wrong with it.

Nothing is created and no model is loaded here, so that a wrong request costs a second, not an hour.
"""

from dataclasses import replace
from pathlib import Path

from harness.data import splits_of
from harness.errors import BadRequest, Problem, Problems
from harness.plan.dataset import find_dataset, find_sources
from harness.plan.methods import find_methods
from harness.plan.model import DRAWN, find_model, local_folder, unreachable
from harness.plan.request import Request, find_plugins, load_preset, preset_names, read_request
from harness.spec import Hyperparams, RunSpec, fingerprint

__all__ = [
    "DRAWN", "Plan", "Request", "find_dataset", "find_plugins", "find_sources", "load_preset", "local_folder",
    "plan", "preset_names", "read_request", "unreachable",
]  # fmt: skip

MOST_STEPS = 10**6  # a fine-tuning takes thousands; the order of its rows is held in memory


class Plan(list):
    """Of RunSpec, and what was seen of the rows on the way."""

    unused: dict[str, list[str]] = {}  # part -> its columns that no row is made of, where all parts lie here


def plan(request: Request, keep: bool = False) -> Plan:
    """The runs of a request, base rows first, then seed by seed, so that drift of the machine hits
    every method alike. Raises BadRequest. `keep`: the rows that were read are kept for the runs."""
    problems = Problems()
    wanted = read_request(request, problems)
    model = find_model(wanted.model, problems)
    dataset = find_dataset(wanted.dataset, wanted.data, problems)
    sources = find_sources(request.sources, wanted.dataset, dataset, problems)
    plugins = find_plugins(request.plugins, problems)
    methods = find_methods(wanted, plugins, dataset, problems)
    if dataset and not problems:
        problems.add("", endless(wanted.hp, dataset["train"]))
    problems.refuse()
    found, prints = Plan(), {}
    try:
        if len(sources) == len(dataset["parts"]):  # what is on the hub is not downloaded for a plan
            found.unused = splits_of(dataset, sources, keep).unused
        prints = {"model": fingerprint(model.folder)} if model.folder else {}
        prints |= {name: fingerprint(path) for name, path in sources.items()}
    except OSError as error:  # a file in a folder of rows or weights that may not be read
        raise BadRequest(f"{error.filename}: {error.strerror}") from error
    locations = {"sources": sources, "plugins": [str(Path(plugin).resolve()) for plugin in plugins]}
    locations |= {"model": str(model.folder)} if model.folder else {}
    for seed in wanted.seeds:
        for cls, options in methods:
            spec = RunSpec(cls.name, seed, model.name, dataset, wanted.hp, options, prints, locations)
            if not cls.trains:  # no seed and no training hyperparameter acts on it: one run, shared
                spec = replace(spec, seed=0, hp=wanted.hp.untrained())
            if spec not in found:
                found.append(spec)
    found.sort(key=lambda spec: spec.trains)
    return found


def endless(hp: Hyperparams, rows: int) -> Problem | None:
    """Why a training would never end; None if it will."""
    steps = hp.max_steps or hp.epochs * max(1, rows / hp.batch_size)
    if steps <= MOST_STEPS:
        return None
    what = f"hp.max_steps={hp.max_steps}" if hp.max_steps else f"hp.epochs={hp.epochs:g} of {rows} rows"
    return Problem(f"{what} is more steps than could ever run: at most {MOST_STEPS:,}")
