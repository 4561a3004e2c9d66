"""Files become raw rows: .jsonl, .json, .parquet, .csv, a folder of them, or one made by save_to_disk."""

import csv
import json
import re
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
CELL_CHARACTERS = 2**24  # of a .csv; Python's own limit, 131,072, is less than some real answers
USUAL = {  # our split -> what files of it are called: the names that the datasets library reads
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NAMED = {name for names in USUAL.values() for name in names}
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
        if not any(labelled(path)):
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file, and is not from save_to_disk")
        for file in chosen(path, split):
            yield from rows_of_file(file)
    elif path.suffix not in READERS:
        raise DataError(f"{path}: cannot read a {path.suffix or 'nameless'} file, only {', '.join(SUFFIXES)}")
    else:
        yield from READERS[path.suffix](path)


def chosen(folder: Path, split: str) -> list[Path]:
    """What bears the name of a split; else what bears no split's; else all."""
    found = labelled(folder)
    own = [path for path, labels in found.items() if split.casefold() in labels]
    return own or [path for path, labels in found.items() if not labels & NAMED] or list(found)


def holds(folder: Path, split: str = "") -> bool:
    """Whether a folder has rows of its own for a split; without one, rows that bear no split's name."""
    found = labelled(folder).values()
    return any(split.casefold() in labels if split else not labels & NAMED for labels in found)


def labelled(folder: Path) -> dict[Path, set[str]]:
    """Its files of rows, or the datasets that save_to_disk made in it -> the names that each may have of its
    split: of test/rows.parquet and, as the hub writes it, of test-00000-of-00001.parquet."""
    files = [folder / name for name in saved(folder)]
    files = files or sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES)
    return {
        file: {re.split("[-.]", part)[0].casefold() for part in file.relative_to(folder).parts}
        for file in files
    }


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


def saved(path: Path) -> list[str]:
    """The folders in this one that save_to_disk made: it itself, or one a split."""
    if (path / "state.json").is_file():
        return ["."]
    whole = (path / "dataset_dict.json").is_file()
    return sorted(state.parent.name for state in path.glob("*/state.json")) if whole else []


def saved_to_disk(path: Path, split: str):
    from datasets import load_from_disk

    for part in chosen(path, split):
        yield from rows_of_dataset(load_from_disk(str(part)))


def rows_of_dataset(dataset):
    """Of a datasets.Dataset, through Arrow: several times as fast as row by row."""
    for batch in dataset.with_format("arrow").iter(BATCH):
        yield from batch.to_pylist()
