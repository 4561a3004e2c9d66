"""Files become raw rows: .jsonl, .json, .parquet, .csv, or a folder of them."""

import csv
import json
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
CELL_CHARACTERS = 2**24  # of a .csv; Python's own limit, 131,072, is less than some real answers


class DataError(ValueError):
    """What is wrong with a dataset, by name, and the remedy."""


def rows_of_file(path: Path):
    """Raises DataError for a file that cannot be read or is empty, with its line where that is known."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from rows_of_file(file)
        return
    if path.suffix not in READERS:
        raise DataError(f"{path}: cannot read a {path.suffix or 'nameless'} file, only {', '.join(SUFFIXES)}")
    empty = True
    try:
        for row in READERS[path.suffix](path):
            empty = False
            yield row
    except DataError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # pyarrow's are of the first two
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if empty:
        raise DataError(f"{path} holds no rows")


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
    rows = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows")
    yield from rows


def parquet(path: Path):
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


def table(path: Path):
    csv.field_size_limit(CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


READERS = {".jsonl": jsonl, ".json": json_list, ".parquet": parquet, ".csv": table}
