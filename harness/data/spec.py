"""What a dataset is: a spec of `datasets_spec/`, a TOML file of one's own, or a file or folder of rows."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from harness import ROOT
from harness.data.formats import FORMATS, detect, nearest, required
from harness.data.rows import KINDS, is_rows, labelled, rows_of_file
from harness.errors import BadRequest, Problems, absent, read_toml, shown, unknown, writable
from harness.metrics import LANGUAGES, REWARDS
from harness.shape import Count, Natural, Range, fitting

FOLDER = ROOT / "datasets_spec"
LEAST = 0.7  # of near_duplicates: below, too many are missed


@dataclass
class PartSpec:
    """What a part of a dataset says, and what holds where it is silent."""

    name: str = ""
    title: str = ""
    hub: str = ""  # the id of its repository there
    config: str = ""
    path: str = ""  # from here or from the project's folder
    revision: str = ""
    licence: str = ""
    split: str = "train"  # of the source, as the next two
    validation_split: str = ""  # empty: a usual name, else cut from `split`
    test_split: str = ""
    format: Literal[tuple(FORMATS)] = "instruction"
    fields: dict[str, str] = field(default_factory=dict)  # the format's field -> the source's column
    mapping: str = ""  # in words
    unseen: bool = False  # only tested: no row of it is trained on, nor validated


@dataclass
class DatasetSpec:
    """What a dataset says beside its parts, and what holds where it is silent."""

    name: str = ""
    title: str = ""
    notice: str = ""
    template: Literal["auto", "chat", "instruction"] = "auto"  # auto: the model's own, where it has one
    seed: int = 0  # of the draw of the splits, the same for all runs
    language: Literal[tuple(LANGUAGES.split())] = "en"
    reward: Literal[tuple(REWARDS)] = "rouge_l"  # of an answer; exact: it is the leading metric as well
    loss: Literal["all", "last"] = "all"  # of a conversation's answers
    # Share of their words in which two prompts are near (Jaccard); off: none is.
    near_duplicates: Literal["off"] | Annotated[float, Range(LEAST, 1)] = 0.8
    train: Natural = 1000  # rows of each part, as the next two
    validation: Count = 64
    test: Natural = 200


OF_PART = get_type_hints(PartSpec, include_extras=True)
OF_DATASET = get_type_hints(DatasetSpec, include_extras=True)
UNSEEN = {"unseen": str | list[str]}  # parts of it, or other datasets, that are only tested
OF_FILE = {**OF_DATASET, **UNSEEN, "part": dict, "parts": list[dict], "mixture": list[str]}
SETTABLE = {name: kind for name, kind in OF_DATASET.items() if name not in ("name", "title", "notice")}
SETTABLE |= UNSEEN


def dataset_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_spec(name: str, settings: dict) -> dict:
    """The whole spec of a dataset: `name` is one of `dataset_names()`, a TOML file, or a file or folder of
    rows. `settings` replace values of SETTABLE. Raises BadRequest with everything that is wrong."""
    return load(name, settings, ())


def load(name: str, settings: dict, within: tuple[str, ...]) -> dict:
    """`within`: the mixtures on the way here."""
    path, what, problems = own_rows(name), f"dataset {shown(name)}", Problems()
    file = with_off(spec_of_rows(path) if path else read_spec(name))
    said = fitting(file, OF_FILE, f"key in {what}", f"{what}: ", problems)
    said |= fitting(with_off(settings), SETTABLE, "data option", "data.", problems)
    listed, mixture, unseen = said.pop("parts", []), said.pop("mixture", []), said.pop("unseen", [])
    listed = [*listed, said.pop("part")] if "part" in said else listed
    parts = [part_spec(part, f"part {n} of {what}", problems) for n, part in enumerate(listed, 1)]
    for mixed in mixture:
        if mixed in (name, *within):
            problems.add(what, "it is in its own mixture")
        else:
            with problems.caught():
                parts += load(mixed, {}, (name, *within))["parts"]
    parts = with_unseen(parts, unseen.split(",") if isinstance(unseen, str) else unseen, problems)
    names = [part["name"] for part in parts if part["name"]]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        problems.add(what, f"two parts are named {shown(twice)}")
    if not parts and not problems:
        problems.add(what, "it has no part", "write [part] or mixture = [...]")
    elif not problems and all(part.get("unseen") for part in parts):
        problems.add(what, "all of its parts are unseen: nothing is left to train on")
    problems.refuse()
    spec = asdict(DatasetSpec(**{"name": name if path is None else path.stem, **said}))
    near = spec["near_duplicates"]
    return {**spec, "near_duplicates": 0.0 if near == "off" else float(near), "parts": parts}


def with_unseen(parts: list[dict], names: list[str], problems: Problems) -> list[dict]:
    """The parts, of which those named are only tested; so are those of other datasets that are named."""
    own, names = {part["name"] for part in parts}, [name.strip() for name in names]
    for name in names:
        if name not in own and name not in dataset_names():
            problems.append(unknown("unseen part or dataset", name, sorted({*own, *dataset_names()})))
        elif name not in own:
            parts = parts + [part | {"unseen": True} for part in load(name, {}, ())["parts"]]
    return [part | {"unseen": True} if part["name"] in names else part for part in parts]


def with_off(values: dict) -> dict:
    """Off, false and 0 mean the same of near_duplicates."""
    off = str(values.get("near_duplicates")).lower() in ("off", "false", "0", "0.0")
    return values | {"near_duplicates": "off"} if off else values


def part_spec(part: dict, what: str, problems: Problems) -> dict:
    known = len(problems)
    said = asdict(PartSpec(**fitting(part, OF_PART, f"key in {what}", f"{what}: ", problems)))
    if not said["unseen"]:  # as earlier versions had it, whose runs are found by what they asked
        del said["unseen"]
    if not said["name"] and len(problems) == known:
        problems.add(what, "it has no name")
    fields = FORMATS[said["format"]]
    problems += [unknown(f"field of format {said['format']}", f, fields) for f in said["fields"]
                 if f not in fields]  # fmt: skip
    return said


def read_spec(name: str) -> dict:
    """The TOML of a spec. Raises BadRequest."""
    path = Path(os.path.expanduser(name))
    if name in dataset_names():
        path = FOLDER / f"{name}.toml"
    elif path.suffix != ".toml":
        others = f"or a .toml or {KINDS} file"
        if os.path.isdir(path):
            raise BadRequest(f"dataset {shown(name)} is a folder: name a spec, and --source PART=FOLDER")
        if os.path.exists(path):
            known = ", ".join(dataset_names())
            raise BadRequest(f"{shown(name)} is no dataset. Available: {known}, {others}")
        raise BadRequest(unknown("dataset", name, dataset_names(), others))
    return read_toml(path)


# Of rows alone


def own_rows(name: str) -> Path | None:
    """The file or folder of rows that a dataset's name is."""
    path = Path(os.path.expanduser(name))
    folder = name not in dataset_names() and not absent(path, "folder") and labelled(path)
    return Path(os.path.abspath(path)) if folder else path if is_rows(path) else None


def spec_of_rows(path: Path) -> dict:
    """Raises BadRequest for rows that cannot be read, or of no format."""
    if problem := absent(path):
        raise BadRequest(f"dataset: {problem}")
    if not writable(path.name):
        raise BadRequest(f"dataset {shown(path)}: its name is not UTF-8, as a record's must be: rename it")
    part = {"name": path.stem, "title": path.stem, "path": path.name, "format": format_of(path)}
    return {"title": path.name, "parts": [part]}


def format_of(path: Path) -> str:
    """Of a user's own file, by the columns of its first row."""
    row = next(rows_of_file(path))
    if not isinstance(row, dict):
        raise BadRequest(f"{path}: a row is {type(row).__name__}, not an object")
    if found := detect(row):
        return found
    near, lacks = nearest(row)
    fields = ", ".join(f"{field} = {json.dumps(column)}" for field, column in lacks.items())
    formats = "; ".join(f"{name}: {', '.join(required(name))}" for name in FORMATS)
    raise BadRequest(
        f"{path}: its columns {', '.join(map(repr, row)) or 'none'} fit no format ({formats}). "
        f"The nearest is {near}, without {' and '.join(lacks)}. Rename columns, or say which are which in a "
        f'FILE.toml with [part] name = "{path.stem}", path = "{path.name}", format = "{near}", '
        f"fields = {{{fields}}} and pass --dataset FILE.toml"
    )
