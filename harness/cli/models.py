"""The commands on the models that runs have left: merge, push and attention."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import OK, program
from harness.errors import BadRequest, Problem, Problems, absent, shown, unwritable
from harness.keeping import CARD, MERGED, kept_run, licence_of, listed, nameless, place, taken, upload
from harness.plain import plain
from harness.record import RunRecord
from harness.spec import fingerprint
from harness.store import ATTENTION, MODEL, Store, save

if TYPE_CHECKING:
    from harness.method import Method
    from harness.training import Trial

ROWS = 200  # test rows among which a short conversation is looked for


def merge(options) -> int:
    store, record = meant(options)
    to = options.to or store.folder / record.folder / MERGED
    problems = Problems()
    problems.add("--to", taken(to))
    problems.refuse()
    found = merged(store, record, options, to)
    if options.json:
        print(json.dumps({"run": record.folder, "folder": str(to), **vars(found)}, indent=1))
    else:
        print(plain(f"merged: {to}\n{found}"))
    return OK


def push(options) -> int:
    store, record = meant(options)
    source, base = base_of(record, options.model)
    to, told = place(options.repo, options.public), sys.stderr if options.json else sys.stdout
    folder = store.folder / record.folder / (MERGED if options.merged else MODEL)
    if options.merged and not folder.is_dir():
        print(plain(f"merged: {folder}\n{merged(store, record, options, folder)}"), file=told)
    describe(store, {record.folder: folder}, source, base, to.repo)
    files = listed(folder)
    kind = "private" if to.private else "public: everybody can see it"
    state = "a new repository" if to.new else "a repository that is there"
    print(plain(f"{record.folder} goes to {to.address}, {state}, {kind}"), file=told)
    for name, size in files.items():
        print(plain(f"{size / 1000:14,.1f} kB  {name}"), file=told)
    commit = upload(folder, files, to, f"{record.folder}, by Tuneoff")
    if options.json:
        value = {"run": record.folder, "address": to.address, "private": to.private, "files": files}
        print(json.dumps({**value, "commit": commit}, indent=1))
    else:
        print(plain(f"uploaded: {commit}"))
    return OK


def opened(options, writes: bool = False) -> Store:
    problems = Problems()
    missing = absent(options.results, "folder")
    problems.add("--results", missing or (unwritable(options.results) if writes else None))
    problems.refuse()
    return Store(options.results)


def meant(options) -> tuple[Store, RunRecord]:
    store = opened(options)
    record = kept_run(store, options.run)
    if record.spec.model.startswith("random:"):
        raise BadRequest(f"{record.folder} began with weights drawn at random: there is no model to keep")
    return store, record


def base_of(record: RunRecord, given: str | None) -> tuple[str | None, str | None]:
    """Where the base of a run is to be had, a folder or an id of the hub, and its id; each null where it is
    not known. `given`: what --model says. Raises BadRequest for what is not the base."""
    from harness.plan import local_folder, unreachable

    spec, problems = record.spec, Problems()
    own = spec.fingerprints.get("model")
    folder = local_folder(given or ("" if spec.hub_model else spec.model))
    if folder is None:
        base = given or spec.hub_model
        problems.add("--model", unreachable(given, None) if given else None)
        problems.refuse()
        return base, base
    if own and fingerprint(folder) != own:
        if not given:
            return None, None
        what = f"its files are not those that {record.folder} was trained from (fingerprint {own})"
        raise BadRequest(Problem(what, f"--model {given}"))
    return str(folder), spec.hub_model


def merged(store: Store, record: RunRecord, options, to: Path) -> "Trial":
    """Raises BadRequest with the reason where the base is not here, or the method cannot merge."""
    from harness import method

    problems = Problems()
    cls, source, base = restorable(record, options, problems)
    if why := cls.cannot.get("merging"):
        problems.append(unmergeable(record, why))
    problems.refuse()
    hush()
    from harness.training import PROMPTS
    from harness.training import merge as write

    outputs = store.outputs(record)
    prompts = [output["prompt"] for output in outputs[:: max(1, len(outputs) // PROMPTS)]][:PROMPTS]
    try:
        return write(
            replace(record.spec, locations={"model": source}), record,
            lambda: method.build(cls, record.spec.options), store.folder / record.folder / MODEL, prompts, to,
            lambda folder: describe(store, {record.folder: folder}, source, base),
        )  # fmt: skip
    except method.Unsupported as error:
        raise BadRequest(unmergeable(record, str(error))) from error
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(Problem(str(error), record.folder)) from error


def restorable(
    record: RunRecord, options, problems: Problems
) -> tuple[type["Method"], str | None, str | None]:
    """-> the method of a run, where its base is to be had, and that one's id on the hub."""
    from harness import method
    from harness.plan import find_plugins

    plugins, name = find_plugins(options.plugins, problems), record.spec.method
    source, base = base_of(record, options.model)
    if source is None:
        what = f"its base {shown(record.spec.model)} was a folder, and is not here as it was"
        problems.add(record.folder, what, "say where it lies with --model DIR")
    cls = method.Method
    try:
        cls = method.resolve(name, method.find(name, method.known_methods(plugins)))
    except ValueError as error:
        problems.add(record.folder, str(error), "name its file with --plugins FILE")
    return cls, source, base


def hush() -> None:
    """The libraries' own warnings and bars, on what the harness calls."""
    import warnings

    from transformers.utils import logging as hints

    warnings.simplefilter("ignore")
    hints.set_verbosity_error()
    hints.disable_progress_bar()


def attention(options) -> int:
    """Leaves beside each run what its model attends to in one test conversation, before and after."""
    from harness import method

    store, problems, found = opened(options, writes=True), Problems(), []
    for record in [kept_run(store, text) for text in dict.fromkeys(options.runs)]:
        cls, source, _ = restorable(record, options, problems)
        found.append((record, cls, source))
    problems.refuse()
    hush()
    from harness.training import attention_maps

    written = []
    for record, cls, source in found:
        outputs = store.outputs(record)[:ROWS]
        conversations = [(output["prompt"], output["reference"]) for output in outputs]
        spec, folder = replace(record.spec, locations={"model": source}), store.folder / record.folder
        try:
            value = attention_maps(
                spec, record, method.build(cls, spec.options), folder / MODEL, conversations
            )
        except (ValueError, method.Unsupported) as error:
            raise BadRequest(Problem(str(error), record.folder)) from error
        save(folder / ATTENTION, json.dumps(value, ensure_ascii=False))
        written.append(str(folder / ATTENTION))
        if not options.json:
            print(plain(f"attention: {written[-1]}"), flush=True)
    print(json.dumps({"files": written}) if options.json else f"{program()} report shows them")
    return OK


def unmergeable(record: RunRecord, why: str) -> Problem:
    keep = f"use {record.folder}/{MODEL} as it is: its README.md says how, and push uploads it"
    return Problem(f"{record.folder} cannot be merged: {why}", remedy=keep)


def describe(
    store: Store, folders: dict[str, Path], source: str | None, base: str | None = None, address: str = ""
) -> None:
    """Writes the card of each run's model into its folder, and takes this machine's names out of it. `base`:
    its id, where the run knows a folder alone; `source`: where it is to be had; `address`: of the model."""
    from harness.report import model_cards

    for name, text in model_cards(store, folders, base, licence_of(source), address).items():
        nameless(folders[name], base)
        save(folders[name] / CARD, text)


def describe_all(store: Store, plan, done: list) -> None:
    """Writes the cards of what the runs of a bench have saved, with the intervals of their comparison; again
    where a run of it is new."""
    saved = [store.path(ended.record.spec) for ended in done if ended.record.sizes.saved_bytes]
    folders = {run.name: run / MODEL for run in saved if (run / MODEL).is_dir()}
    if all(ended.cached for ended in done) and all((f / CARD).is_file() for f in folders.values()):
        return
    describe(store, folders, plan[0].locations.get("model") or plan[0].model, plan[0].hub_model)
