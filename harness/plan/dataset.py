"""The dataset that a request names, and where the rows of its parts lie."""

import os
from collections.abc import Sequence
from pathlib import Path

from harness import ROOT
from harness.data import dataset_names, load_spec, own_rows, rows_of_part
from harness.errors import Problems, absent, shown, unknown
from harness.plan.hub import unreachable_dataset


def find_dataset(name: str, settings: dict, problems: Problems) -> dict | None:
    """Its whole spec, if that is right."""
    if not name:
        known = ", ".join(dataset_names())
        problems.add("", f"no dataset: name one with --dataset ({known}, or a file)")
        return None
    with problems.caught():
        return load_spec(name, settings)


def find_sources(
    texts: Sequence[str], asked: str, dataset: dict | None, problems: Problems
) -> dict[str, str]:
    """Part of the dataset -> where its rows lie: in rows of one's own, as `NAME=PATH` says, or as its spec
    does (from here or from the project's folder); the rest come from the hub."""
    own = own_rows(asked) if dataset else None
    found = {own.stem: str(own.resolve())} if own else {}
    named = typed_sources(texts, dataset, found, problems)
    for name, part in parts_of(dataset).items():
        if name in found or name in named:
            continue
        places = [Path(part["path"]), ROOT / part["path"]] if part["path"] else []
        if local := next((place for place in places if not absent(place)), None):
            found[name] = str(local.resolve())
        elif part["hub"]:
            problems.add(f"dataset {part['hub']}", unreachable_dataset(part["hub"], name))
        else:
            remedy = f"say where with --source {name}=PATH"
            problems.add(f"dataset {asked}", f"no rows of part {name}", remedy)
    return found


def parts_of(dataset: dict | None) -> dict[str, dict]:
    return {part["name"]: part for part in dataset["parts"]} if dataset else {}


def typed_sources(texts: Sequence[str], dataset: dict | None, found: dict, problems: Problems) -> set[str]:
    """Adds to `found` where the typed parts lie. -> the names that were typed, right or wrong."""
    parts, named = parts_of(dataset), set()
    for text in texts:
        name, _, place = text.partition("=")
        path, where = Path(os.path.expanduser(place)), f"--source {shown(name)}"
        if not (name and place):
            problems.add(f"--source {shown(text)}", "write it as NAME=PATH")
        elif dataset and name not in parts:
            problems.append(unknown(f"part of dataset {dataset['name']}", name, parts))
        elif problems.add(where, absent(path)):
            named.add(name)
        elif found.setdefault(name, str(path.resolve())) != str(path.resolve()):
            problems.add(where, f"has two places, {found[name]} and {shown(path)}")
        elif dataset:
            with problems.caught(where):  # what is no data at all is named beside all other problems
                next(rows_of_part(parts[name], found[name], parts[name]["split"], {}))
    return named
