"""What a dataset became is kept for the next run: its splits, and their token ids. A miss costs only time.

The name of a file is a digest of all that decides its content: the sources, the dataset's spec, the
template, the tokenizer, and the code from here to there. A file that cannot be read is a miss, and a
folder that cannot be written is done without.
"""

import hashlib
import json
import os
import tempfile
from array import array
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np

from harness.data import splits
from harness.data.formats import Conversation
from harness.data.leaks import unanswered
from harness.data.template import Example, Template, tokenize
from harness.spec import digest, fingerprint

LIMIT = 2**31  # bytes of the folder; what was not used for longest goes first
SAMPLE = 100  # test conversations kept beside the token ids, to be shown
READING = ("rows", "formats", "duplicates", "leaks", "splits", "cache")  # the code on the way to the splits


@dataclass
class Tokens:
    """A dataset as token ids."""

    rows: dict[str, list[Example]]
    left_out: dict[str, int]  # by why, of the whole dataset, then of each split in tokenising
    refused: list[dict]
    revisions: dict[str, str]
    origins: dict[str, dict[str, str]]  # part -> our split -> the split of its source that it is drawn from
    unused: dict[str, list[str]]  # part -> its columns that no row was made of
    sample: list[Conversation]  # the first of the test split


def token_rows(dataset: dict, locations: dict, template: Template, max_length: int) -> Tokens:
    """data.splits and template.tokenize, from the cache where nothing has changed since."""
    key = tokens_key(dataset, locations, template, max_length)
    if key and (found := load(key)):
        try:
            return unpacked(*found)
        except (KeyError, TypeError, ValueError):  # whole, but not what is written here
            pass
    drawn = splits_of(dataset, locations)
    left_out, made = dict(drawn.left_out), {}
    for split in drawn.rows:
        made[split], counts = tokenize(drawn.rows[split], template, max_length)
        left_out |= {f"{split}_{name}": count for name, count in counts.items()}
    for split in [split for split in made if split != "train"]:
        scored = unanswered(made[split], made["train"])
        left_out[f"{split}_answered"] = len(made[split]) - len(scored)
        made[split] = scored
    same = {name: getattr(drawn, name) for name in ("refused", "revisions", "origins", "unused")}
    tokens = Tokens(made, left_out, sample=drawn.rows["test"][:SAMPLE], **same)
    if key:
        keep(key, *packed(tokens))
    return tokens


def splits_of(dataset: dict, locations: dict, kept: bool = True) -> splits.Splits:
    """data.splits, from the cache where nothing has changed since. Not `kept`: nothing is written."""
    key = "splits-" + digest([dataset, identities(dataset, locations), code(READING)])
    if found := load(key, kept):
        try:
            value = found[0]
            read = {name: [Conversation(**row) for row in value["rows"][name]] for name in value["rows"]}
            return splits.Splits(**{**value, "rows": read})
        except (KeyError, TypeError):
            pass
    drawn = splits.make_splits(dataset, locations)
    if kept:
        rows = {name: list(map(vars, rows)) for name, rows in drawn.rows.items()}
        keep(key, {**vars(drawn), "rows": rows}, {})
    return drawn


# What decides the content


def tokens_key(dataset: dict, locations: dict, template: Template, max_length: int) -> str | None:
    """None for a tokenizer whose content cannot be told."""
    tokenizer = template.tokenizer
    if not (backend := getattr(tokenizer, "backend_tokenizer", None)):
        return None
    asked = [
        dataset,
        identities(dataset, locations),
        code((*READING, "template")),
        max_length,
        template.kind,
        [version(package) for package in ("transformers", "tokenizers", "jinja2")],
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        str(
            [type(tokenizer).__name__, tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())]
        ),
    ]
    return "tokens-" + digest(asked)


def identities(dataset: dict, locations: dict) -> list:
    """Of every part's source what changes with its content."""
    return [
        fingerprint(Path(location))
        if (location := locations.get(part["name"]))
        else splits.hub_identity(part)
        for part in dataset["parts"]
    ]


def code(names) -> str:
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


# Rows as columns: numbers in arrays, the rest in JSON


def packed(tokens: Tokens) -> tuple[dict, dict[str, np.ndarray]]:
    value, arrays = {**vars(tokens), "rows": {}, "sample": list(map(vars, tokens.sample))}, {}
    for split, made in tokens.rows.items():
        value["rows"][split] = columns = {}
        for name in (field.name for field in fields(Example)):
            column = [getattr(row, name) for row in made]
            if any(isinstance(item, array) for item in column):
                lengths = [-1 if item is None else len(item) for item in column]
                arrays[f"{split}.{name}.lengths"] = np.array(lengths, np.int32)
                arrays[f"{split}.{name}"] = np.frombuffer(b"".join(item or b"" for item in column), np.int32)
            else:
                columns[name] = column
    return value, arrays


def unpacked(value: dict, arrays: dict[str, np.ndarray]) -> Tokens:
    made = {}
    for split, columns in value["rows"].items():
        columns = dict(columns)
        for name in (field.name for field in fields(Example)):
            if name not in columns:
                columns[name] = pieces(arrays[f"{split}.{name}"], arrays[f"{split}.{name}.lengths"])
        made[split] = [
            Example(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        ]
    return Tokens(**{**value, "rows": made, "sample": [Conversation(**c) for c in value["sample"]]})


def pieces(values: np.ndarray, lengths: np.ndarray) -> list[array | None]:
    data, found, start = memoryview(values).cast("B"), [], 0
    for length in lengths.tolist():
        item = array("i")
        stop = start + max(length, 0) * item.itemsize
        item.frombytes(data[start:stop])
        found.append(item if length >= 0 else None)
        start = stop
    return found


# Files


def folder() -> Path:
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in many a container
        home = Path(tempfile.gettempdir())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(os.environ.get("TUNEOFF_CACHE") or caches / "tuneoff")


def load(key: str, used: bool = True) -> tuple[dict, dict[str, np.ndarray]] | None:
    path = folder() / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        value = json.loads(arrays.pop("json").tobytes())
        if used:
            os.utime(path)  # the folder keeps what was used last
    except Exception:  # of a broken archive come errors of many kinds; whichever it is, it is made again
        return None
    return value, arrays


def keep(key: str, value: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes a whole file or none of it."""
    place = folder()
    part = None
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=place, suffix=".part", delete=False) as part:
            text = json.dumps(value, ensure_ascii=False).encode()
            np.savez(part, json=np.frombuffer(text, np.uint8), **arrays)
        os.replace(part.name, place / f"{key}.npz")
        sizes = [(file.stat().st_mtime, file.stat().st_size, file) for file in place.glob("*.npz")]
        total = 0
        for _, size, file in sorted(sizes, reverse=True):
            total += size
            if total > LIMIT:
                file.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        if part:
            Path(part.name).unlink(missing_ok=True)
