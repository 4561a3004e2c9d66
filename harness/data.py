"""A dataset spec becomes conversations: every part's rows, sampled, without duplicates, split."""

import hashlib
import json
import tomllib
from pathlib import Path

from harness import ROOT
from harness.errors import unknown
from harness.formats import FORMATS, Conversation, messages_of, rejected_of
from harness.metrics import REWARDS
from harness.rows import SUFFIXES, DataError, rows_of_file

FOLDER = ROOT / "datasets_spec"
SPLITS = ("test", "validation", "train")  # drawn in this order: more training rows leave the test alone
PART = {  # what a part of a dataset says, and what holds where it is silent
    "name": "", "title": "", "hub": "", "path": "", "split": "train", "revision": "", "licence": "",
    "format": "instruction", "fields": {}, "mapping": "",
}  # fmt: skip
DATASET = {
    "name": "", "title": "", "notice": "", "template": "auto", "seed": 0, "language": "en",
    "reward": "rouge_l",
    "train": 1000, "validation": 64, "test": 200,
}  # fmt: skip

# Specs


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_spec(name: str, overrides: dict) -> dict:
    """The whole spec of a dataset: `name` is one of `available()`, a TOML file, or a file of rows.

    `overrides` replaces top-level values. Raises DataError with everything that is wrong.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"there is no dataset file {path}")
        first = next(iter(rows_of_file(path)), {})
        shape = "messages" if "messages" in first else "instruction"
        part = {"name": path.stem, "title": path.stem, "path": path.name, "format": shape}
        spec = {"name": path.stem, "title": path.name, "parts": [part]}
    else:
        spec = read_toml(path if path.suffix == ".toml" else FOLDER / f"{name}.toml", name)
    parts = spec.pop("parts", None) or [spec.pop("part", {})]
    for mixed in spec.pop("mixture", []):
        parts = [p for p in parts if p] + load_spec(mixed, {})["parts"]
    errors = [unknown(f"key in dataset {name}", key, DATASET) for key in set(spec) - set(DATASET)]
    settable = set(DATASET) - {"name", "title", "notice"}
    errors += [unknown("data option", key, settable) for key in set(overrides) - settable]
    for part in parts:
        errors += [unknown(f"key in a part of dataset {name}", key, PART) for key in set(part) - set(PART)]
        if part.get("format", "instruction") not in FORMATS:
            errors.append(unknown("format", part["format"], FORMATS))
    if errors:
        raise DataError("\n".join(errors))
    spec = {**DATASET, "name": name, **spec, **overrides}
    for key, default in DATASET.items():
        if type(spec[key]) is not type(default):
            errors.append(f"data.{key}: must be like {default!r}, not {spec[key]!r}")
    errors += [f"data.{s}: must be at least {int(s != 'validation')}, not {spec[s]}"
               for s in SPLITS if isinstance(spec[s], int) and spec[s] < (s != "validation")]  # fmt: skip
    for key, choices in (("template", ("auto", "chat", "instruction")), ("reward", REWARDS)):
        if spec[key] not in choices:
            errors.append(unknown(key, str(spec[key]), choices))
    if errors:
        raise DataError("\n".join(errors))
    return {**spec, "parts": [{**PART, **part} for part in parts]}


def read_toml(path: Path, name: str) -> dict:
    if not path.is_file():
        raise DataError(unknown("dataset", name, available()) + f", or a .toml or {', '.join(SUFFIXES)} file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error


# Rows


def rows_of_part(part: dict, location: str | None):
    """Raw rows of a part: from where it lies on this machine, else from the hub."""
    if location:
        yield from rows_of_file(Path(location))
        return
    import datasets

    yield from datasets.load_dataset(part["hub"], split=part["split"], revision=part["revision"] or None)


def splits(dataset: dict, locations: dict) -> tuple[dict[str, list[Conversation]], dict[str, int]]:
    """split -> conversations, disjoint, the rows of all parts mixed; and what was left out, counted.

    A row's place is decided by a hash of the seed and its text: the order of the source does not
    matter. Of rows with the same prompt one is kept. Raises DataError if there are too few.
    """
    chosen = {split: [] for split in SPLITS}
    counts = {"unusable": 0, "duplicates": 0}
    seen = set()
    for part in dataset["parts"]:
        rows = []
        for row in rows_of_part(part, locations.get(part["name"])):
            if not isinstance(row, dict):
                raise DataError(f"part {part['name']}: a row is {type(row).__name__}, not an object")
            messages, rejected = messages_of(row, part), rejected_of(row, part)
            if messages and (rejected or part["format"] != "pairs"):
                said = [dataset["seed"], messages] + [rejected] * bool(rejected)
                text = json.dumps(said, ensure_ascii=False, sort_keys=True)
                rows.append((hashlib.sha256(text.encode()).hexdigest(), messages, rejected))
            else:
                counts["unusable"] += 1
        distinct = []
        for key, messages, rejected in sorted(rows, key=lambda row: row[0]):
            prompt = normalised(messages[:-1])
            if prompt in seen:
                counts["duplicates"] += 1
                continue
            seen.add(prompt)
            distinct.append(Conversation(f"{part['name']}:{key[:12]}", part["name"], messages, rejected))
        wanted = sum(dataset[split] for split in SPLITS)
        if len(distinct) < wanted:
            raise DataError(
                f"part {part['name']}: {wanted} rows are asked for ({describe(dataset)}), but it has "
                f"{len(distinct)} distinct usable ones. Ask for fewer with --set data.train=... "
            )
        start = 0
        for split in SPLITS:
            chosen[split] += distinct[start : start + dataset[split]]
            start += dataset[split]
    for split in SPLITS:  # mix the parts, by the same hash
        chosen[split].sort(key=lambda c: c.id.rpartition(":")[2])
    return chosen, counts


def describe(dataset: dict) -> str:
    return ", ".join(f"{dataset[split]} {split}" for split in reversed(SPLITS))


def normalised(messages: list[dict]) -> str:
    """Equal for prompts that differ in case, spacing and the punctuation around them alone."""
    return " ".join(" ".join(m["content"] for m in messages).casefold().split()).strip(" .,!?")
