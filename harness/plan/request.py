"""What a request says: a preset's values, and over them what was typed."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from harness import ROOT
from harness.errors import Problems, absent, brief, read_toml, shown, unknown
from harness.search import TRIALS
from harness.shape import Range, fitting, misfits
from harness.spec import Hyperparams

FOLDER = ROOT / "presets"
LARGEST_SEED = 2**32 - 1  # NumPy's, which seeds the order of the batches, takes no more
Seeds = list[Annotated[int, Range(0, LARGEST_SEED)]]


@dataclass
class Request:
    """What was typed. None: as the preset says."""

    methods: list[str] | None = None
    preset: str | None = None
    model: str | None = None
    dataset: str | None = None
    sources: Sequence[str] = ()
    seeds: list[int] | None = None
    settings: Sequence[str] = ()
    plugins: Sequence[str] = ()
    sweeps: Sequence[str] = ()
    tracks: Sequence[str] = ("identical",)  # or tuned, or both
    trials: int = TRIALS
    ensembles: Sequence[str] = ()  # qlora+galore
    repeat: int = 0  # how often the first run is run again, unchanged
    elsewhere: bool = False  # on other machines, whose cards cannot be counted here


@dataclass
class Preset:
    """What a file of `presets/` says, and what holds where it is silent."""

    title: str = ""
    model: str = ""
    dataset: str = ""
    methods: list[str] = field(default_factory=list)
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])  # a ranking needs three
    hp: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    options: dict[str, dict] = field(default_factory=dict)  # of each method


@dataclass
class Wanted:
    """A request with its preset read, each value in the form that it is used in."""

    model: str
    dataset: str
    methods: list[str]
    seeds: list[int]
    hp: Hyperparams
    data: dict  # settings of the dataset
    preset_options: dict[str, dict]  # of methods that need not be asked for
    options: dict[str, dict]  # as typed: method -> option -> value
    sweeps: dict[str, dict[str, list]]  # method -> option or hyperparameter -> values


def read_request(request: Request, problems: Problems) -> Wanted:
    own = request.model is not None or request.dataset is not None  # not the demo's values
    name = "demo" if request.preset is None and not own else request.preset
    preset = Preset() if name is None else load_preset(name, problems)
    typed = settings(request.settings, problems)
    hp = {**preset.hp, **typed.pop("hp", {})}
    return Wanted(
        model=preset.model if request.model is None else request.model,
        dataset=preset.dataset if request.dataset is None else request.dataset,
        methods=preset.methods if request.methods is None else request.methods,
        seeds=distinct(preset.seeds if request.seeds is None else request.seeds, problems),
        hp=hyperparams(hp, problems),
        data={**preset.data, **typed.pop("data", {})},
        preset_options=preset.options,
        options=typed,
        sweeps=sweeps(request.sweeps, problems),
    )


def preset_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_preset(name: str, problems: Problems) -> Preset:
    """What is right of it."""
    path = Path(os.path.expanduser(name)) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in preset_names():
        problems.append(unknown("preset", name, preset_names(), "or a .toml file"))
        return Preset()
    what, said = f"preset {shown(name)}", {}
    with problems.caught(what):
        said = read_toml(path)
    kinds = get_type_hints(Preset, include_extras=True)
    return Preset(**fitting(said, kinds, f"key in {what}", f"{what}: ", problems))


def settings(texts: Sequence[str], problems: Problems) -> dict[str, dict]:
    """`lora.rank=16` -> {"lora": {"rank": 16}}; a value is TOML, or else a text."""
    found: dict[str, dict] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        group, dot, name = key.strip().rpartition(".")  # a method's name may have a dot: peft.vera
        if not (equals and dot and group and name):
            what = "write it as hp.NAME=VALUE, data.NAME=VALUE or METHOD.OPTION=VALUE"
            problems.add(f"--set {shown(text)}", what)
            continue
        value = value_of(value)
        earlier = found.setdefault(group, {}).setdefault(name, value)
        if (earlier, type(earlier)) != (value, type(value)):
            problems.add(f"--set {group}.{name}", f"has two values, {brief(earlier)} and {brief(value)}")
    return found


def sweeps(texts: Sequence[str], problems: Problems) -> dict[str, dict[str, list]]:
    """`lora.rank=8,64` -> {"lora": {"rank": [8, 64]}}; the values are TOML, or else texts."""
    found: dict[str, dict[str, list]] = {}
    for text in texts:
        key, _, said = text.partition("=")
        group, _, name = key.strip().rpartition(".")
        if not (group and name and said.strip()):
            problems.add(f"--sweep {shown(text)}", "write it as METHOD.NAME=VALUE,VALUE")
            continue
        values = value_of(f"[{said}]")
        values = values if isinstance(values, list) else [value_of(part.strip()) for part in said.split(",")]
        if name in found.setdefault(group, {}):
            problems.add(f"--sweep {group}.{name}", "is given twice", "write all values behind one =")
        found[group][name] = values
    return found


def value_of(text: str) -> Any:
    """As TOML has it, else the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line end could hide further keys


def hyperparams(values: dict, problems: Problems) -> Hyperparams:
    """The whole of them; as many rows in a micro-batch as in a step at most."""
    kinds = get_type_hints(Hyperparams, include_extras=True)
    good = fitting(values, kinds, "hyperparameter", "hp.", problems)
    if good.get("epochs") == 0:
        problems.add("hp.epochs", "0 trains nothing", "the row base is the untouched model")
    size = good.get("batch_size", Hyperparams.batch_size)
    good["micro_batch_size"] = min(size, good.get("micro_batch_size", Hyperparams.micro_batch_size))
    return Hyperparams(**good)


def distinct(seeds: list[int], problems: Problems) -> list[int]:
    problems.extend(misfits(seeds, Seeds, "--seeds"))
    if not seeds or len(set(seeds)) < len(seeds):
        said = ", ".join(map(brief, seeds)) or "none"
        problems.add("--seeds", f"must be some different whole numbers, not {said}")
    return seeds


def find_plugins(texts: Sequence[str], problems: Problems) -> list[str]:
    """The files that are Python's."""
    found = []
    for path in map(Path, map(os.path.expanduser, texts)):
        if problems.add("--plugins", absent(path, "file")):
            continue
        if not problems.add("--plugins", f"{shown(path)} is no .py file" if path.suffix != ".py" else None):
            found.append(str(path))
    return found
