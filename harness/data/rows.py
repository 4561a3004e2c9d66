"""Files become raw rows: .jsonl, .json, .parquet, .csv and .tsv, each also as .gz; a folder of them, or one
made by save_to_disk."""

import csv
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from harness.errors import BadRequest

CELL_CHARACTERS = 2**24  # of a .csv; Python's own limit, 131,072, is less than some real answers
USUAL = {  # our split -> what files of it are called: the names that the datasets library reads
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
NAMED = {name for names in USUAL.values() for name in names}
WORD = re.compile(r"[^\W\d_]+")  # of a file's name
WINDOWS = re.compile(rb"[\x80-\x9f]")  # letters and quotes there, invisible in Latin-1
BATCH = 1000  # rows that are made Python values together
BESIDE = {"dataset_info.json", "dataset_infos.json"}  # what the hub keeps beside the rows


def rows_of_file(path: Path, split: str = ""):
    """Of a folder, the files of `split` alone, where any is named for it.

    Raises BadRequest for a file that cannot be read or is empty, with its line where that is known.
    """
    empty = True
    try:
        for row in read(path, split):
            empty = False
            yield row
    except BadRequest:
        raise
    except Exception as error:  # of csv, gzip, pyarrow and datasets come errors of many kinds
        if isinstance(error, UnicodeDecodeError) and kind(path) in TEXTS:
            raise BadRequest(foreign(path)) from error
        raise BadRequest(f"{path}: {getattr(error, 'strerror', None) or error or repr(error)}") from error
    if empty:
        raise BadRequest(f"{path} holds no rows")


def read(path: Path, split: str):
    if saved(path):
        yield from saved_to_disk(path, split)
    elif path.is_dir():
        files = labelled(path)
        if not files or (of_a_model(path) and {kind(file) for file in files} == {".json"}):
            raise BadRequest(f"{path} holds no rows ({KINDS}) and is not from save_to_disk: {contents(path)}")
        for file in chosen(path, split):
            yield from rows_of_file(file)
    elif not is_rows(path):
        packed = ". Unpack it" if is_rows(path.with_suffix("")) else ""
        raise BadRequest(f"{path}: cannot read a {path.suffix or 'nameless'} file, only {KINDS}{packed}")
    elif path.exists() and not path.is_file():  # a pipe would never end
        raise BadRequest(f"{path} is neither a file nor a folder")
    else:
        yield from READERS[kind(path)](path)


def kind(path: Path) -> str:
    """Of Rows.JSONL.gz: .jsonl."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_rows(path: Path) -> bool:
    """Whether its name is one of a file of rows."""
    return kind(path) in READERS


def files_of(folder: Path) -> list[Path]:
    """The files of rows below a folder, none of them hidden."""
    found = sorted(file for file in folder.rglob("*") if is_rows(file) and file.name not in BESIDE)
    return [f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


class Labels(NamedTuple):
    """What a file's path says of its split. A folder's usual name counts where the file has none; of several
    in one name what is held out counts: train_test is no training file."""

    begins: set[str]  # with a split's name: test/rows.parquet and, as the hub has it, test-00000-of-00001
    usual: set[str]  # names of one split, wherever they stand: of gsm8k_test2


def chosen(folder: Path, split: str) -> list[Path]:
    """What bears the name of a split; else what bears no split's; else all, unless some of it begins with a
    split's name and the rest only may be one's, as test.jsonl and train_test.jsonl."""
    if own := bearing(folder, split) or bearing(folder):
        return own
    begin = {path: bool(labels.begins & NAMED) for path, labels in labelled(folder).items()}
    if len({*begin.values()}) > 1:
        unclear = min(path for path, begins in begin.items() if not begins).relative_to(folder)
        raise BadRequest(f"{folder} has nothing to train on: is {unclear} held out or to be trained on? "
                        "Rename it to begin with its split's name, as train- or test-")  # fmt: skip
    return list(begin)


def holds(folder: Path, split: str = "") -> bool:
    """Whether a folder has rows of its own for a split; without one, rows that bear no split's name."""
    return bool(bearing(folder, split))


def bearing(folder: Path, split: str = "") -> list[Path]:
    """What begins with a split's name; has it elsewhere, where nothing begins so; without one, has none."""
    found, split = labelled(folder), split.casefold()
    if not split:
        return [path for path, labels in found.items() if not labels.usual]
    same = next((set(names) for names in USUAL.values() if split in names), {split})
    if any(labels.begins & same for labels in found.values()):
        return [path for path, labels in found.items() if split in labels.begins]
    return [path for path, labels in found.items() if split in labels.usual]


def labelled(folder: Path) -> dict[Path, Labels]:
    """Its files of rows, or the datasets that save_to_disk made in it."""
    files = [folder / name for name in saved(folder)]
    return {file: labels(file.relative_to(folder).parts) for file in files or files_of(folder)}


def labels(parts: tuple[str, ...]) -> Labels:
    folded = [part.casefold() for part in parts]
    words = [{word.removesuffix("set") for word in WORD.findall(part)} for part in reversed(folded)]
    told = ({*names} & said for said in words for names in reversed(USUAL.values()))
    usual = next(filter(None, told), set())
    return Labels({re.split("[-.]", part)[0] for part in folded} - (NAMED - usual), usual)


# What a source of another kind is told


def contents(folder: Path) -> str:
    if of_a_model(folder):
        return "it is a model's folder"
    kinds = Counter(file.suffix.lower() or "nameless" for file in folder.rglob("*") if file.is_file())
    return f"it has {', '.join(f'{count} {name}' for name, count in kinds.most_common(3)) or 'no files'}"


def of_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def foreign(path: Path) -> str:
    """Where a text stops being UTF-8, and how it is made so."""
    convert = f"Convert it: iconv -f {{}} -t UTF-8 {path.name} > utf8-{path.name}"
    if path.suffix.lower() == ".gz":
        convert = f"Convert it: gunzip -c {path.name} | iconv -f {{}} -t UTF-8 | gzip > utf8-{path.name}"
    lines = opened(path)
    with suppress(OSError, EOFError, zlib.error), lines:  # of a .gz that is broken itself
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                return f"{path} is UTF-16, not UTF-8. {convert.format('UTF-16')}"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} (0x{line[error.start]:02X}) is not UTF-8"
                windows = any(map(WINDOWS.search, chain([line], lines)))
                name, code = ("Windows-1252", "WINDOWS-1252") if windows else ("Latin-1", "LATIN1")
                return f"{path}, line {number}: {byte}. If it is {name}: {convert.format(code)}"
    return f"{path}: not UTF-8"


# A reader for each kind


def opened(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def jsonl(path: Path):
    with opened(path) as file:  # decoded line by line, so that the line named is the one
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            try:
                yield json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"{path}, line {number}: {error}") from error


def json_list(path: Path):
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from jsonl(path)  # a value on each line, under the name of .json: common on the hub
        return
    if not isinstance(rows, list):
        raise BadRequest(f"{path} is not a list of rows{within(path, rows)}")
    yield from rows


def within(path: Path, found) -> str:
    """What is told of JSON that is no list of rows, but holds lists of rows, or columns."""
    columns = found if isinstance(found, dict) else {}
    lists = {name: value for name, value in columns.items() if isinstance(value, list)}
    of_rows = [name for name, value in lists.items() if all(isinstance(cell, dict) for cell in value)]
    if len(lists) == len(columns) != len(of_rows) and len(set(map(len, lists.values()))) == 1:
        turn = "[dict(zip(c, r)) for r in zip(*c.values())]"
        code = f'python3 -c "import json, sys; c = json.load(sys.stdin); json.dump({turn}, sys.stdout)"'
        name = path.name.removesuffix(".gz")
        return f", but one of columns. Make rows of them: {code} < {name} > rows-{name}"
    return f": save what stands under {' or '.join(map(repr, of_rows))} as a file" if of_rows else ""


def parquet(path: Path):
    import pyarrow.parquet

    with opened(path) as opened_file, pyarrow.parquet.ParquetFile(opened_file) as file:
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()


def table(path: Path):
    """Its cells are parted by what stands oftenest in the first line: commas, semicolons or tabs."""
    csv.field_size_limit(CELL_CHARACTERS)
    with opened(path) as file:
        first = file.readline().decode("utf-8-sig")
    with opened(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(lines, delimiter=max(",;\t", key=first.count), strict=True)
        try:
            if twice := [name for name, count in Counter(rows.fieldnames or ()).items() if count > 1]:
                raise BadRequest(f"{path}: two columns are named {twice[0]!r}")
            yield from rows
        except csv.Error as error:
            raise BadRequest(f"{path}, line {rows.reader.line_num}: {error}") from error


TEXTS = {".jsonl": jsonl, ".json": json_list, ".csv": table, ".tsv": table}
READERS = TEXTS | {".parquet": parquet}
KINDS = ", ".join(READERS)


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
