"""Names become specs: a request is checked whole, and is a list of RunSpec or all of its errors.

Nothing is created and no model is loaded here, so that a wrong request costs a second, not an hour.
"""

import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness import ROOT, cache, data, method
from harness.errors import misfit, unknown
from harness.spec import PRECISIONS, SCHEDULES, Hyperparams, RunSpec, fingerprint

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
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class BadRequest(ValueError):
    """Everything that is wrong with a request, a line each."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass
class Request:
    """What was typed. None or empty: as the preset says."""

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
    own = bool(request.model or request.dataset)  # a model or data of one's own: not the demo's values
    name = request.preset or (None if own else "demo")
    preset = load_preset(name, errors) if name else dict(PRESET)
    values = settings(request.settings, errors)
    model, locations = find_model(request.model or preset["model"], errors)
    hp = hyperparams({**preset["hp"], **values.pop("hp", {})}, errors)
    dataset = find_dataset(
        request.dataset or preset["dataset"], {**preset["data"], **values.pop("data", {})}, errors
    )
    rows_file = Path(request.dataset or preset["dataset"])
    own_rows = [f"{rows_file.stem}={rows_file}"] if rows_file.suffix in data.SUFFIXES else []
    locations["sources"] = find_sources([*own_rows, *request.sources], dataset, errors)
    if dataset and not errors and (reason := endless(hp, dataset["train"])):
        errors.append(reason)
    locations["plugins"] = [str(Path(plugin).resolve()) for plugin in request.plugins]
    seeds = request.seeds if request.seeds is not None else preset["seeds"]
    if not seeds or any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        errors.append(
            f"--seeds: different whole numbers from 0 on, not {' '.join(map(str, seeds)) or 'none'}"
        )
    methods = find_methods(
        request.methods or preset["methods"], request.plugins, preset["options"], values, hp, dataset, errors
    )
    if dataset and not errors and len(locations["sources"]) == len(dataset["parts"]):
        try:  # what is on the hub is not downloaded for a plan
            cache.splits(dataset, locations["sources"])
        except data.DataError as error:
            errors.append(str(error))
    if errors:
        raise BadRequest(errors)

    prints = {"model": fingerprint(locations["model"])} if locations.get("model") else {}
    prints |= {name: fingerprint(path) for name, path in locations["sources"].items()}
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
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        errors.append(unknown("preset", name, available()) + ", or a .toml file")
        return dict(PRESET)
    try:
        preset = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        errors.append(f"preset {path} is not TOML: {error}")
        return dict(PRESET)
    for key, value in preset.items():
        if key not in PRESET:
            errors.append(unknown(f"key in preset {name}", key, PRESET))
        elif type(value) is not type(PRESET[key]):
            errors.append(f"preset {name}: {key} must be like {PRESET[key]!r}, not {value!r}")
    return {**PRESET, **{k: v for k, v in preset.items() if type(v) is type(PRESET.get(k))}}


def settings(texts: list[str], errors: list[str]) -> dict[str, dict]:
    """`lora.rank=16` -> {"lora": {"rank": 16}}; a value is TOML, or else a text."""
    found: dict[str, dict] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        group, dot, name = key.strip().rpartition(".")  # a method's name may have a dot: peft.vera
        if not (equals and dot and group and name):
            errors.append(f"--set {text}: write it as hp.NAME=VALUE, data.NAME=VALUE or METHOD.OPTION=VALUE")
            continue
        try:
            found.setdefault(group, {})[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found.setdefault(group, {})[name] = value
    return found


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
    return f"{what}: {steps:.3g} steps would never end; at most {MOST_STEPS:,} are run"


def out_of_range(name: str, value) -> str | None:
    if name in ("precision", "schedule"):
        choices = PRECISIONS if name == "precision" else SCHEDULES
        return None if value in choices else f"must be one of {', '.join(choices)}, not {value!r}"
    if isinstance(value, bool):
        return None
    positive = ("learning_rate", "epochs", "batch_size", "micro_batch_size", "epsilon",
                "max_length", "max_new_tokens", "eval_batch_size")  # fmt: skip
    if not value < float("inf"):
        return f"must be a finite number, not {value}"
    if name in positive and value <= 0:
        return f"must be above 0, not {value}"
    if value < 0:
        return f"must not be negative, not {value}"
    if name in ("beta1", "beta2", "warmup_ratio") and value >= 1:
        return f"must be below 1, not {value}"
    return None


def find_model(name: str, errors: list[str]) -> tuple[str, dict]:
    """-> the model's name for the spec, and where it lies if it is a local folder."""
    if not name:
        errors.append("no model: name one with --model ID|DIR, or a preset with --preset")
        return "", {}
    drawn = "random:" * name.startswith("random:")
    text = name.removeprefix("random:")
    folder = next((p for p in (Path(text), ROOT / text) if p.is_dir()), None)
    if folder is None:
        if Path(text).exists() or not HUB_ID.fullmatch(text):
            errors.append(f"model {name}: neither a folder nor a hub id such as google/gemma-3-1b-it")
        elif reason := unreachable_model(text):
            errors.append(f"model {name}: {reason}")
        return name, {}
    missing = [file for file in ("config.json", "tokenizer_config.json") if not (folder / file).is_file()]
    if missing:
        errors.append(f"model {name}: the folder has no {' and no '.join(missing)}")
    elif not drawn and not any(folder.glob("*.safetensors")):
        errors.append(
            f"model {name}: the folder has no .safetensors weights. Convert them with save_pretrained, or "
            f"write random:{text} to measure cost alone, with weights drawn at random"
        )
    folder = folder.resolve()
    own = folder.is_relative_to(ROOT)
    return drawn + (str(folder.relative_to(ROOT)) if own else folder.name), {"model": str(folder)}


def unreachable_model(name: str) -> str | None:
    """Why a hub model cannot be had, with the remedy; None if it can."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        HfApi().model_info(name, timeout=10)  # offline it says so at once, where a download would retry
        hf_hub_download(name, "config.json")
    except hub.GatedRepoError:
        return f"is gated: accept its licence at https://huggingface.co/{name}, then `hf auth login`"
    except hub.RepositoryNotFoundError:
        return "is not on the hub, or is private: check the name, or `hf auth login`"
    except hub.EntryNotFoundError:
        return "has no config.json: not a transformers model"
    except Exception:  # the hub's client raises what its transport does
        return "the hub cannot be reached and it is not in the local cache: pass a folder with --model DIR"
    return None


def find_dataset(name: str, overrides: dict, errors: list[str]) -> dict | None:
    if not name:
        errors.append(f"no dataset: name one with --dataset ({', '.join(data.available())}, or a file)")
        return None
    try:
        return data.load_spec(name, overrides)
    except data.DataError as error:
        errors += str(error).splitlines()
        return None


def find_sources(texts: list[str], dataset: dict | None, errors: list[str]) -> dict[str, str]:
    """Part of the dataset -> where its rows lie: as `NAME=PATH` says, or as its spec does (from here
    or from the project's folder); the rest come from the hub."""
    parts = {part["name"]: part for part in dataset["parts"]} if dataset else {}
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (equals and name and path):
            errors.append(f"--source {text}: write it as NAME=PATH")
        elif dataset and name not in parts:
            errors.append(unknown(f"part of dataset {dataset['name']}", name, parts))
        elif not Path(path).exists():
            errors.append(f"--source {name}: there is no file or folder {path}")
        else:
            found[name] = str(Path(path).resolve())
    for name, part in parts.items():
        if name in found:
            continue
        places = [Path(part["path"]), ROOT / part["path"]] if part["path"] else []
        if local := next((place for place in places if place.exists()), None):
            found[name] = str(local.resolve())
        elif not part["hub"]:
            errors.append(
                f"dataset {dataset['name']}: no rows of part {name}; say where with --source {name}=PATH"
            )
        elif reason := unreachable_dataset(part["hub"]):
            errors.append(f"dataset {part['hub']}: {reason} with --source {name}=PATH")
    return found


def unreachable_dataset(name: str) -> str | None:
    """Why a hub dataset cannot be had, with the remedy; None if it can."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    try:
        HfApi().auth_check(name, repo_type="dataset")  # dataset_info answers for a gated one as well
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
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer ({type(error).__name__})"
        return f"the hub cannot be reached: {why}; and it is not in the local cache: read a copy"
    return None


def find_methods(
    names, plugins, preset_options, values, hp, dataset, errors
) -> list[tuple[type[method.Method], dict]]:
    """The methods asked for, each after the base row that it starts from, with all its options."""
    for plugin in plugins:
        if not Path(plugin).is_file():
            errors.append(f"--plugins: there is no file {plugin}")
    try:
        sources = method.available([p for p in plugins if Path(p).is_file()])
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
        try:
            cls = method.resolve(name, source)
        except ValueError as error:  # says itself what is wrong
            errors.append(str(error))
            return
        except (
            Exception,
            SystemExit,
        ) as error:  # a plugin is a stranger's code: whatever it raises is its fault, named
            errors.append(f"method {name} cannot be imported: {type(error).__name__}: {error}")
            return
        if cls.baseline != name and cls.trains:
            add("base")
            add(cls.baseline)
        chosen, wrong = method.build(cls, {**preset_options.get(name, {}), **values.get(name, {})})
        errors.extend(wrong)
        errors.extend(beyond(chosen, hp, dataset or {"parts": []}) if chosen else [])
        found[name] = (cls, method.options(chosen) if chosen else {})

    if not names:
        errors.append(f"no methods: name some with --methods. Available: {', '.join(sorted(sources))}")
    for name in names:
        add(name)
    for name in set(values) - set(found):
        groups = sorted({"hp", "data", *found})
        errors.append(unknown("group in --set", name, groups) if not method.find(name, sources)
                      else f"--set {name}.…: {name} is not among --methods {' '.join(names)}")  # fmt: skip
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
    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot write in {existing}: choose another folder"
    return None
