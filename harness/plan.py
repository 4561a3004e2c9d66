"""Names become specs: a request is checked whole, and is a list of RunSpec or all of its errors.

Nothing is created and no model is loaded here, so that a wrong request costs a second, not an hour.
"""

import os
import threading
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness import ROOT, method, trial
from harness.data import cache, splits
from harness.errors import absent, brief, misfit, misfits, neighbour, read_toml, shown, unknown
from harness.spec import Hyperparams, RunSpec, fingerprint, out_of_range

FOLDER = ROOT / "presets"
PRESET = {
    "title": "",
    "model": "",
    "dataset": "",
    "methods": [],
    "seeds": [0, 1, 2],
    "hp": {},
    "data": {},
    "options": {},
}
KINDS = {"methods": list[str], "seeds": list[int], "options": dict[str, dict]}  # the rest as their defaults
LARGEST_SEED = 2**32 - 1  # NumPy's, which seeds the order of the batches, takes no more
HUB_SECONDS = 30  # for one answer: the hub gives it in one or two, and its client alone would try for minutes


class BadRequest(ValueError):
    """Everything that is wrong with a request, a line each."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass
class Request:
    """What was typed. None: as the preset says."""

    methods: list[str] | None = None
    preset: str | None = None
    model: str | None = None
    dataset: str | None = None
    sources: list[str] = ()
    seeds: list[int] | None = None
    settings: list[str] = ()
    plugins: list[str] = ()


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def plan(request: Request) -> list[RunSpec]:
    """The runs of a request, base rows first, then seed by seed, so that drift of the machine hits
    every method alike. Raises BadRequest."""
    errors: list[str] = []
    own = request.model is not None or request.dataset is not None  # not the demo's values
    name = "demo" if request.preset is None and not own else request.preset
    preset = dict(PRESET) if name is None else load_preset(name, errors)
    values = settings(request.settings, errors)
    model, locations = find_model(preset["model"] if request.model is None else request.model, errors)
    hp = hyperparams({**preset["hp"], **values.pop("hp", {})}, errors)
    chosen = preset["dataset"] if request.dataset is None else request.dataset
    dataset = find_dataset(chosen, {**preset["data"], **values.pop("data", {})}, errors)
    locations["sources"] = find_sources(request.sources, dataset, errors, splits.own_rows(chosen))
    seeds = find_seeds(preset["seeds"] if request.seeds is None else request.seeds, errors)
    names = preset["methods"] if request.methods is None else request.methods
    plugins = find_plugins(request.plugins, errors)
    locations["plugins"] = [str(Path(plugin).resolve()) for plugin in plugins]
    methods = find_methods(names, plugins, preset["options"], values, hp, dataset, errors)
    if dataset and not errors and (reason := endless(hp, dataset["train"])):
        errors.append(reason)
    prints = {}
    if not errors:
        try:  # what is on the hub is not downloaded for a plan
            if len(locations["sources"]) == len(dataset["parts"]):
                cache.splits_of(dataset, locations["sources"])
            prints = {"model": fingerprint(locations["model"])} if locations.get("model") else {}
            prints |= {name: fingerprint(path) for name, path in locations["sources"].items()}
        except splits.DataError as error:
            errors.append(str(error))
        except OSError as error:  # a file in a folder of rows or weights that may not be read
            errors.append(f"{error.filename}: {error.strerror}")
    if errors:
        raise BadRequest(errors)

    specs = []
    for seed in seeds:
        for cls, options in methods:
            spec = RunSpec(cls.name, seed, model, dataset, hp, options, prints, locations)
            if not cls.trains:  # no seed and no training hyperparameter acts on it: one run, shared
                spec = replace(spec, seed=0, hp=hp.untrained())
            if spec not in specs:
                specs.append(spec)
    return sorted(specs, key=lambda spec: spec.trains)


# The parts of a request, each of which adds its errors


def load_preset(name: str, errors: list[str]) -> dict:
    path = Path(os.path.expanduser(name)) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in available():
        errors.append(unknown("preset", name, available()) + ", or a .toml file")
        return dict(PRESET)
    try:
        if reason := absent(path, "file"):
            raise ValueError(reason)
        preset = read_toml(path)
    except ValueError as error:
        errors.append(f"preset {shown(name)}: {error}")
        return dict(PRESET)
    good = dict(PRESET)
    for key, value in preset.items():
        if wrong := misfits(f"preset {shown(name)}", {key: value}, PRESET, KINDS):
            errors += wrong
        else:
            good[key] = value
    return good


def settings(texts: list[str], errors: list[str]) -> dict[str, dict]:
    """`lora.rank=16` -> {"lora": {"rank": 16}}; a value is TOML, or else a text."""
    found: dict[str, dict] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        group, dot, name = key.strip().rpartition(".")  # a method's name may have a dot: peft.vera
        if not (equals and dot and group and name):
            errors.append(
                f"--set {shown(text)}: write it as hp.NAME=VALUE, data.NAME=VALUE or METHOD.OPTION=VALUE"
            )
            continue
        read = value_of(value)
        earlier = found.setdefault(group, {}).setdefault(name, read)
        if (earlier, type(earlier)) != (read, type(read)):
            errors.append(f"--set {group}.{name}: has two values, {brief(earlier)} and {brief(read)}")
    return found


def value_of(text: str):
    """As TOML has it, else the text itself."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # a line end could hide further keys


def hyperparams(values: dict, errors: list[str]) -> Hyperparams:
    kinds = {f.name: f.type for f in fields(Hyperparams)}
    good = {}
    for name, value in values.items():
        if name not in kinds:
            errors.append(unknown("hyperparameter", name, kinds))
        elif reason := misfit(value, kinds[name]) or out_of_range(name, value):
            errors.append(f"hp.{name}: {reason}")
        else:
            good[name] = float(value) if kinds[name] is float else value
    hp = Hyperparams(**good)
    if not errors and hp.micro_batch_size > hp.batch_size:
        hp = replace(hp, micro_batch_size=hp.batch_size)
    return hp


MOST_STEPS = 10**6  # a fine-tuning takes thousands; the order of its rows is held in memory


def endless(hp: Hyperparams, rows: int) -> str | None:
    """Why a training would never end."""
    steps = hp.max_steps or hp.epochs * max(1, rows / hp.batch_size)
    if steps <= MOST_STEPS:
        return None
    what = f"hp.max_steps={hp.max_steps}" if hp.max_steps else f"hp.epochs={hp.epochs:g} of {rows} rows"
    return f"{what} is more steps than could ever run: at most {MOST_STEPS:,}"


def find_model(name: str, errors: list[str]) -> tuple[str, dict]:
    """-> the model's name for the spec, and where it lies if it is a local folder."""
    if not name:
        errors.append("no model: name one with --model ID|DIR, or a preset with --preset")
        return "", {}
    drawn = "random:" * name.startswith("random:")
    text = name.removeprefix("random:")
    folder, reason = local_model(text)
    if reason := reason or (unreachable_model(text) if folder is None else None):
        errors.append(f"model {shown(name)}: {reason}")
    if folder is None:
        return name, {}
    missing = [file for file in ("config.json", "tokenizer_config.json") if absent(folder / file, "file")]
    if missing and not reason:
        errors.append(f"model {name}: the folder has no {' and no '.join(missing)}")
    elif not reason and not drawn and not any(folder.glob("*.safetensors")):
        errors.append(
            f"model {name}: the folder has no .safetensors weights. Convert them with save_pretrained, or "
            f"write random:{text} to measure cost alone, with weights drawn at random"
        )
    folder = folder.resolve()
    own = folder.is_relative_to(ROOT)
    return drawn + (str(folder.relative_to(ROOT)) if own else folder.name), {"model": str(folder)}


def local_model(text: str) -> tuple[Path | None, str | None]:
    """-> the folder that a text names, from here or from the project's, if it does, and why it cannot be
    read; or None, and why it cannot be on the hub either."""
    if not text:
        return None, "its name is empty"
    path = Path(os.path.expanduser(text))
    if folder := next((p for p in (path, ROOT / path) if os.path.isdir(p)), None):
        return folder, absent(folder, "folder")
    if os.path.lexists(path) or not_an_id(text):
        return None, f"neither a folder nor a hub id such as google/gemma-3-1b-it: {absent(path, 'folder')}"
    return None, None


def not_an_id(name: str) -> bool:
    """What the hub's client would refuse to ask for, and a name without its owner."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return "/" not in name


def unreachable_model(name: str) -> str | None:
    """Why a hub model cannot be had, with the remedy; None if it can."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    def ask():
        HfApi().model_info(name, timeout=10)  # offline it says so at once, where a download would retry
        hf_hub_download(name, "config.json")

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    near = next(filter(None, map(neighbour, (Path(name), ROOT / name))), None)
    meant = f" (or did you mean the folder {near}?)" if near else ""
    try:
        within(HUB_SECONDS, ask)
    except hub.GatedRepoError:
        return f"is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login`"
    except hub.RepositoryNotFoundError:
        return f"is not on the hub, or is private: check the name, or `hf auth login`{meant}"
    except hub.EntryNotFoundError:
        return "has no config.json: not a transformers model"
    except Exception as error:  # the hub's client raises what its transport does
        return (
            f"the hub cannot be reached: {silence(error)}; and it is not in the local cache: pass a folder "
            f"with --model DIR{meant}"
        )
    return None


def within(seconds: float, ask):
    """Waits for a call no longer than this, and raises TimeoutError: a hub that takes a connection and says
    nothing would hold a plan for as long as its client cares to retry."""
    ended = []

    def call():
        try:
            ask()
        except BaseException as error:  # raised again where it was asked for
            ended.append(error)
        else:
            ended.append(None)

    asking = threading.Thread(target=call, daemon=True)  # one that never ends does not hold the process
    asking.start()
    asking.join(seconds)
    if not ended:
        raise TimeoutError(f"it was silent for {seconds:g} s")
    if ended[0]:
        raise ended[0]


def silence(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return str(error) if type(error) is TimeoutError else f"no answer ({type(error).__name__})"


def find_dataset(name: str, overrides: dict, errors: list[str]) -> dict | None:
    if not name:
        errors.append(f"no dataset: name one with --dataset ({', '.join(splits.available())}, or a file)")
        return None
    try:
        return splits.load_spec(name, overrides)
    except splits.DataError as error:
        errors += str(error).splitlines()
        return None


def find_sources(
    texts: list[str], dataset: dict | None, errors: list[str], own: Path | None = None
) -> dict[str, str]:
    """Part of the dataset -> where its rows lie: in rows of one's own, as `NAME=PATH` says, or as its spec
    does (from here or from the project's folder); the rest come from the hub."""
    parts = {part["name"]: part for part in dataset["parts"]} if dataset else {}
    found, missing = {}, set()
    if own and dataset:
        found[own.stem] = str(own.resolve())
    for text in texts:
        name, equals, path = text.partition("=")
        path = Path(os.path.expanduser(path))
        if not (equals and name and text.partition("=")[2]):
            errors.append(f"--source {shown(text)}: write it as NAME=PATH")
        elif dataset and name not in parts:
            errors.append(unknown(f"part of dataset {dataset['name']}", name, parts))
        elif reason := absent(path):
            errors.append(f"--source {shown(name)}: {reason}")
            missing.add(name)
        elif found.setdefault(name, str(path.resolve())) != str(path.resolve()):
            errors.append(f"--source {name}: has two places, {found[name]} and {shown(path)}")
        elif dataset and (reason := no_rows(parts[name], found[name])):
            errors.append(f"--source {name}: {reason}")
    for name, part in parts.items():
        if name in found or name in missing:
            continue
        places = [Path(part["path"]), ROOT / part["path"]] if part["path"] else []
        if local := next((place for place in places if not absent(place)), None):
            found[name] = str(local.resolve())
        elif not part["hub"]:
            errors.append(
                f"dataset {dataset['name']}: no rows of part {name}; say where with --source {name}=PATH"
            )
        elif reason := unreachable_dataset(part["hub"]):
            errors.append(f"dataset {part['hub']}: {reason} with --source {name}=PATH")
    return found


def no_rows(part: dict, path: str) -> str | None:
    """Why a part's first row cannot be had: what is no data at all is named beside all other errors."""
    try:
        next(splits.rows_of_part(part, path, part["split"], {}))
    except splits.DataError as error:
        return str(error)


def unreachable_dataset(name: str) -> str | None:
    """Why a hub dataset cannot be had, with the remedy; None if it can."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    if not_an_id(name):
        return "is no hub id such as tatsu-lab/alpaca: check the spec, or read a copy"
    try:  # dataset_info answers for a gated one as well
        within(HUB_SECONDS, lambda: HfApi().auth_check(name, repo_type="dataset"))
    except hub.GatedRepoError:
        return (
            f"is gated: accept its terms at https://huggingface.co/datasets/{name} "
            "and `hf auth login`, or read a copy"
        )
    except hub.RepositoryNotFoundError:
        return "is not on the hub, or is private: check the name, `hf auth login`, or read a copy"
    except Exception as error:  # what the hub's client raises depends on its transport
        folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        if (folder / name.replace("/", "___")).is_dir():
            return None
        return f"the hub cannot be reached: {silence(error)}; and it is not in the local cache: read a copy"
    return None


def find_seeds(seeds: list[int], errors: list[str]) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= LARGEST_SEED for seed in seeds):
        said = ", ".join(map(brief, seeds)) or "none"
        errors.append(f"--seeds: different whole numbers from 0 to {LARGEST_SEED}, NumPy's limit, not {said}")
    return seeds


def find_plugins(texts: list[str], errors: list[str]) -> list[str]:
    found = []
    for text in texts:
        path = Path(os.path.expanduser(text))
        if reason := absent(path, "file") or (path.suffix != ".py" and f"{shown(path)} is no .py file"):
            errors.append(f"--plugins: {reason}")
        else:
            found.append(str(path))
    return found


def find_methods(
    names, plugins, preset_options, values, hp, dataset, errors
) -> list[tuple[type[method.Method], dict]]:
    """The methods asked for, each after the base row that it starts from, with all its options."""
    try:
        sources = method.available(plugins)
    except ValueError as error:
        errors.append(str(error))
        return []
    found = {}

    def add(name: str) -> None:
        if name in found:
            return
        source = method.find(name, sources)
        if source is None:
            errors.append(unknown("method", name, sources))
            return
        found[name] = None
        cls = trial.find(name, sources, plugins, errors)
        if cls is None:
            return
        if cls.baseline != name and cls.trains:
            add("base")
            add(cls.baseline)
        chosen = None
        with trial.blamed(name, source, errors):
            chosen, wrong = method.build(cls, {**preset_options.get(name, {}), **values.get(name, {})})
            errors.extend(wrong)
            errors.extend(beyond(chosen, hp, dataset or {"parts": []}) if chosen else [])
        found[name] = (cls, method.options(chosen) if chosen else {})

    if not names:
        errors.append(f"no methods: name some with --methods. Available: {', '.join(sorted(sources))}")
    for name in names:
        add(name)
    spelt = [found[name][0].name for name in names if found.get(name)]  # peft.VERA is peft.vera
    errors += [f"--methods: {name} is named twice" for name in sorted(set(spelt)) if spelt.count(name) > 1]
    for name in sorted(set(values) - set(found)):
        groups = sorted({"hp", "data", *found})
        errors.append(unknown("group in --set", name, groups) if not method.find(name, sources)
                      else f"--set {name}.…: {name} is not among --methods {' '.join(names)}")  # fmt: skip
    for name in sorted(preset_options):
        if not method.find(name, sources):
            errors.append(unknown("method in the preset's options", name, sources))
    return list(found.values())


def beyond(chosen: method.Method, hp: Hyperparams, dataset: dict) -> list[str]:
    """What the hyperparameters or the data ask of a method that it cannot do."""
    own = chosen.own(hp)
    return [
        f"method {chosen.name} cannot do {limit}: {reason}. Leave it out, or "
        + method.LIMITS[limit].remedy.format(hp=own)
        for limit, reason in chosen.cannot.items()
        if method.LIMITS[limit].asked(own, dataset)
    ]


def unwritable(folder: Path) -> str | None:
    """Why files cannot be written in a folder that need not exist yet."""
    existing = next(p for p in [folder, *folder.absolute().parents] if os.path.lexists(p))
    if reason := absent(existing, "folder"):
        return reason
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{shown(folder)}: {error.strerror}"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot write in {existing}: choose another folder"
    return None


def unreadable(folder: Path) -> str | None:
    """Why records cannot be read from a folder that need not exist yet."""
    return absent(folder, "folder") if os.path.lexists(folder) else None
