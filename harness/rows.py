"""Files become raw rows: .jsonl, .json, .parquet, .csv, a folder of them, or one made by save_to_disk."""

import csv
import json
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
CELL_CHARACTERS = 2**24  # of a .csv; Python's own limit, 131,072, is less than some real answers
BATCH = 1000  # rows that are made Python values together


class DataError(ValueError):
    """What is wrong with a dataset, by name, and the remedy."""


def rows_of_file(path: Path, split: str = ""):
    """Of a folder, the files of `split` alone, where any is named for it.

    Raises DataError for a file that cannot be read or is empty, with its line where that is known.
    """
    empty = True
    try:
        for row in read(path, split):
            empty = False
            yield row
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError, csv.Error, RecursionError) as error:  # pyarrow's too
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise DataError(f"{path} holds no rows")


def read(path: Path, split: str):
    if saved(path):
        yield from saved_to_disk(path, split)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file, and is not from save_to_disk")
        for file in [file for file in files if of_split(file, split)] or files:
            yield from rows_of_file(file)
    elif path.suffix not in READERS:
        raise DataError(f"{path}: cannot read a {path.suffix or 'nameless'} file, only {', '.join(SUFFIXES)}")
    else:
        yield from READERS[path.suffix](path)


def holds(path: Path, split: str) -> bool:
    """Whether a folder has rows of its own for a split."""
    if saved(path):
        return (path / split / "state.json").is_file()
    return any(of_split(file, split) for file in path.rglob("*") if file.suffix in SUFFIXES)


def of_split(file: Path, split: str) -> bool:
    """By its name, as the hub writes it: test.parquet, or test-00000-of-00001.parquet."""
    return bool(split) and file.stem.partition("-")[0] == split


def jsonl(path: Path):
    with path.open("rb") as file:  # decoded line by line, so that the line named is the one
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error


def json_list(path: Path):
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from jsonl(path)  # a value on each line, under the name of .json: common on the hub
        return
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows")
    yield from rows


def parquet(path: Path):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()


def table(path: Path):
    csv.field_size_limit(CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


READERS = {".jsonl": jsonl, ".json": json_list, ".parquet": parquet, ".csv": table}


def saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_to_disk(path: Path, split: str):
    from datasets import load_from_disk

    whole = load_from_disk(str(path))
    parts = whole if isinstance(whole, dict) else {"": whole}  # a DatasetDict is a dict
    for name in [split] if split in parts else parts:
        yield from rows_of_dataset(parts[name])


def rows_of_dataset(dataset):
    """Of a datasets.Dataset, through Arrow: several times as fast as row by row."""
    for batch in dataset.with_format("arrow").iter(BATCH):
        yield from batch.to_pylist()
