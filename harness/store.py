"""`results/`: one folder a run. Keeps a run whole or not at all, finds it by digest, names what is no run."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from uuid import uuid4

import numpy as np

from harness import metrics, migrate
from harness.claims import under_way
from harness.forks import each
from harness.plain import redacted
from harness.record import Output, Phase, RunRecord, finite
from harness.shape import all_fit, check, parse
from harness.spec import RunSpec, content_hash, digest

RECORD, OUTPUTS, UNSEEN = "record.json", "outputs.jsonl", "unseen.jsonl"
EVENTS, MODEL = "events.jsonl", "model"
ATTENTION = "attention.json"  # where somebody has asked what a model attends to
LM_EVAL = "lm-eval.json"  # where tasks of lm-evaluation-harness were asked
CHECKPOINTS, EARLIER_EVENTS = "checkpoints", "events.jsonl"  # the second in the first: of the stopped run
SPEC, RESULT = "spec.json", "result.json"  # what a bench gives its child, and what it gives back
TEST_ROW = ("id", "part", "prompt", "reference", "tokens")  # of an output: what is the same for all runs
SHARE = 64  # runs that are read in one go: fewer are not worth a second process
MARK = "complete.json"  # of a checkpoint that was written whole: the digest of each of its files
RUN = re.compile(r"[^.].*-s\d+-[0-9a-f]{12}")  # the name of a run's folder
# What may stand beside it.
ATTEMPT, EARLIER, ASIDE, STOPPED = ".{}", ".{}.earlier", "{}.aside-{}", ".{}.stopped"


@dataclass(frozen=True, eq=False)
class Tested:
    """What a comparison needs of a run's outputs, without their texts."""

    sums: dict[str, np.ndarray]  # by metric (rows, width); NaN: not known
    parts: list[str]  # of each row
    tokens: np.ndarray  # (rows,) of its reference, end mark included
    rows: int  # hash of what is the same for all runs on these rows; another one in another process

    @classmethod
    def of(cls, outputs: list[dict], sums: dict[str, np.ndarray]) -> "Tested":
        rows = hash(tuple(tuple(output[name] for name in TEST_ROW) for output in outputs))
        return cls(sums, [o["part"] for o in outputs], np.array([o["tokens"] for o in outputs]), rows)


FINAL = ("ok", "diverged", "unsupported")  # it would end so again, whatever it went on from


class Store:
    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.numbers: dict[tuple[str, str], Tested] = {}  # of each run that was read, by folder and file

    def path(self, spec: RunSpec) -> Path:
        """Where its run is: in the folder of its own name, else in that of an earlier version's spec, which
        asked for less: what it did not name has its default."""
        folder = self.folder.resolve()
        own = folder / spec.folder
        earlier = [] if os.path.lexists(own) else folder.glob(f"{spec.method}-s{spec.seed}-*")
        for path in sorted(path for path in earlier if RUN.fullmatch(path.name)):
            with suppress(OSError, ValueError):
                if RunRecord.from_json(self.text(path.name, RECORD)).spec == spec:
                    return path
        return own

    # Reading: nothing that a record says is believed before `read` has looked at all of the run

    def find(self, spec: RunSpec) -> RunRecord | None:
        """The record of this spec, if its run is here whole, with the model that it leaves."""
        record, _ = self.standing(self.path(spec).name)
        if not record or record.lacks_model:
            return None
        saved, files = record.sizes.saved_bytes, weights_in(self.folder / record.folder / MODEL)
        try:
            return record if saved is None or saved == sum(file.stat().st_size for file in files) else None
        except OSError:  # a link to nothing
            return None

    def load(self) -> tuple[list[RunRecord], list[str]]:
        """The records of all whole runs, in the order of their start, and a line for each that is not."""
        names = [
            path.name for path in sorted(self.folder.glob("[!.]*"))
            if ".aside-" not in path.name and (RUN.fullmatch(path.name) or os.path.lexists(path / RECORD))
        ]  # fmt: skip

        def read(some: list[str]) -> tuple[list, dict]:
            found = [self.standing(name) for name in some]
            return found, {key: numbers for key, numbers in self.numbers.items() if key[0] in some}

        parts = each(read, [names[i : i + SHARE] for i in range(0, len(names), SHARE)])
        for _, numbers in parts:
            self.numbers |= numbers
        found = [standing for part, _ in parts for standing in part]
        records = [record for record, _ in found if record]
        read_from = ((self.folder / name, *standing) for name, standing in zip(names, found, strict=True))
        corrupt = [f"{path}: {reason}" for path, record, reason in read_from if not record]
        return sorted(records, key=lambda r: (r.started, r.folder)), corrupt

    def records(self) -> Iterator[RunRecord]:
        """All that can be read, without a look at what else their runs have left: no more than a guide."""
        for path in self.folder.glob(f"[!.]*/{RECORD}"):
            with suppress(OSError, ValueError):
                yield RunRecord.from_json(self.text(path.parent.name, RECORD))

    def standing(self, name: str) -> tuple[RunRecord | None, str]:
        """The run in a folder, or why what stands there is none; neither where nothing does."""
        try:
            return self.read(name), ""
        except (OSError, ValueError) as error:
            there = os.path.lexists(self.folder / name)
            return None, (getattr(error, "strerror", None) or str(error)) if there else ""

    def read(self, name: str) -> RunRecord:
        """The record of a folder. Raises OSError or ValueError, with the reason, unless the folder has what a
        run leaves: a record whose spec gives the folder's name, and whole outputs."""
        record = RunRecord.from_json(self.text(name, RECORD))
        for path in (self.folder / name).rglob("*"):
            if path.is_symlink() and self.outside(path):  # a model is read, merged and pushed too
                raise ValueError(f"{path.relative_to(self.folder / name)} is a link out of {self.folder}")
        if record.folder != name:
            raise ValueError(f"{RECORD} is {record.folder}'s: its spec or the folder's name was changed")
        if not record.ok:
            return record
        if record.spec.trains and not record.phases.get("train", Phase()).seconds:
            raise ValueError(f"{RECORD} has trained in no time: its phase train is missing")
        if record.judged_by_loss:
            if not record.validation or record.validation[-1].get("loss") is None:
                raise ValueError(f"{RECORD} is of a trial, and has no validation loss")
            return record
        outputs = self.whole(record, OUTPUTS, "outputs", "validation" if record.spec.trial else "test")
        self.numbers[name, OUTPUTS] = Tested.of(outputs, score(record, outputs))
        if "unseen_outputs" in record.hashes:
            outputs = self.whole(record, UNSEEN, "unseen_outputs", "unseen")
            self.numbers[name, UNSEEN] = Tested.of(outputs, row_sums(record, outputs, UNSEEN))
        return record

    def whole(self, record: RunRecord, file: str, hashed: str, split: str) -> list[dict]:
        """The outputs of a file, one for each row of the split. Raises OSError or ValueError."""
        outputs = self.outputs(record, file=file)
        hashes: dict = {**record.hashes}
        if hashed not in hashes:
            raise ValueError(f"{RECORD} has no hash of {file}")
        if hashes[hashed] not in (None, content_hash(self.folder / record.folder / file)):
            raise ValueError(f"{file} was changed since the run")
        fine = all_fit(outputs, Output)
        for number, output in enumerate(outputs, 1):
            if not fine:
                check(output, Output, f"{file}, line {number}")
            if output["correct"] > output["tokens"]:
                raise ValueError(f"{file}, line {number}: more is right than there is")
        rows = record.data.rows.get(split, len(outputs))
        if rows != len(outputs) or rows != len({output["id"] for output in outputs}):
            raise ValueError(f"{file} has not one output for each of {rows} {split} rows")
        return outputs

    def outputs(
        self, record: RunRecord, chosen: Iterable[int] | None = None, file: str = OUTPUTS
    ) -> list[dict]:
        """The test outputs of a run with their per-example scores, in the order of the test rows; of some
        rows alone if these are `chosen`."""
        lines = [(i, line) for i, line in enumerate(self.text(record.folder, file).split("\n"), 1) if line]
        found = []
        for number, line in lines if chosen is None else [lines[row] for row in chosen]:
            try:
                found.append(migrate.output(parse(line)))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
        return found

    def tested(self, record: RunRecord, file: str = OUTPUTS) -> Tested | None:
        """The numbers of a run's outputs, as they were when it was read; none of a file that it has not."""
        if (record.folder, OUTPUTS) not in self.numbers:
            self.read(record.folder)
        return self.numbers.get((record.folder, file))

    def text(self, name: str, file: str) -> str:
        """Of a run's file that lies in the store: no link leads out of it, and no pipe keeps us waiting."""
        path = self.folder / name / file
        if self.outside(path):
            raise ValueError(f"{file} is a link out of {self.folder}")
        if not path.is_file():
            raise ValueError(f"{file} is " + ("not a file" if path.exists() else "missing"))
        return path.read_text("utf-8")

    def outside(self, path: Path) -> bool:
        return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    # Writing

    def attempt(self, spec: RunSpec, anew: bool = False) -> Path:
        """A folder to run in, beside the finished one, which stays until this one is kept. In it are the
        checkpoints of an earlier attempt, if there are, or not if it is to begin `anew`; else nothing. What
        lies beside a run that is ok is of an attempt that began anew already, and was stopped."""
        standing, _ = self.standing(spec.folder)
        folder, final = self.folder / ATTEMPT.format(spec.folder), self.folder / spec.folder
        if anew:
            shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
        anew = anew and not (standing and standing.ok)
        kept = next((place for place in (folder, final) if (place / CHECKPOINTS).is_dir()), None)
        aside = self.folder / STOPPED.format(spec.folder)
        if kept and not anew:
            put_by(kept, aside)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if aside.is_dir():
            shutil.rmtree(aside) if anew else aside.rename(folder / CHECKPOINTS)
        return folder

    def keep(self, spec: RunSpec, record: RunRecord) -> None:
        """Ends the attempt, and gives its record the scores of its outputs. One that is not ok never takes
        the place of one that is. What is no whole run, or one of a newer version, is set aside: nothing that
        cannot be read is overwritten."""
        attempt = self.folder / ATTEMPT.format(spec.folder)
        if record.status in FINAL and not record.lacks_model:
            shutil.rmtree(attempt / CHECKPOINTS, ignore_errors=True)
        for half in attempt.glob(".*.part"):  # of a writer that was killed
            half.unlink()
        earlier, reason = self.standing(spec.folder)
        if earlier and earlier.ok and not record.ok:
            if (attempt / CHECKPOINTS).is_dir():
                put_by(attempt, self.folder / STOPPED.format(spec.folder))
            shutil.rmtree(attempt)
            return
        if reason:
            aside = self.aside(spec.folder).name
            record.warnings.append(f"{spec.folder} held no whole run ({reason}): it was moved to {aside}")
        save(attempt / RECORD, record.to_json())
        self.settle(spec.folder)
        kept, _ = self.standing(spec.folder)
        record.scores = kept.scores if kept else {}

    def recover(self) -> None:
        """Ends what a bench had begun to keep when it was killed."""
        for path in self.folder.glob(".*"):
            name = path.name[1:].removesuffix(".earlier")
            if RUN.fullmatch(name) and not under_way(self.folder, name):
                self.settle(name)

    def settle(self, name: str) -> None:
        """Puts a finished attempt, which is one with a record, in its place. Each step is one renaming, and
        begun again it goes on: wherever a kill falls, neither the earlier run nor the new one is lost."""
        attempt, final, earlier = (self.folder / kind.format(name) for kind in (ATTEMPT, "{}", EARLIER))
        if (attempt / RECORD).is_file():
            if os.path.lexists(final):
                shutil.rmtree(earlier, ignore_errors=True)
                final.rename(self.aside(name) if self.standing(name)[1] else earlier)
            attempt.rename(final)
        if final.exists():
            shutil.rmtree(earlier, ignore_errors=True)

    def aside(self, name: str) -> Path:
        """Where something of this name is not in the way."""
        paths = (self.folder / ASIDE.format(name, i) for i in count(1))
        return next(path for path in paths if not os.path.lexists(path))


def put_by(attempt: Path, aside: Path) -> None:
    """The checkpoints of an attempt, with its events, which tell what was lost since the last."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # of an attempt that had trained
        if '"step"' in (attempt / EVENTS).read_text("utf-8", "replace"):
            (attempt / EVENTS).replace(attempt / CHECKPOINTS / EARLIER_EVENTS)
    (attempt / CHECKPOINTS).rename(aside)


def score(record: RunRecord, outputs: list[dict]) -> dict[str, np.ndarray]:
    """Derives the scores of a run from its test outputs; also of a metric that is newer than the run. -> the
    sums of each row, by metric (rows, width).

    Raises ValueError for outputs that give none, and for scores that cannot be.
    """
    sums = row_sums(record, outputs, OUTPUTS)
    metrics.check_range(record.start, f"the start in {RECORD}")
    record.scores = metrics.scores({name: of_rows.sum(0).tolist() for name, of_rows in sums.items()})
    for name in metrics.METRICS.keys() - record.signatures:
        with suppress(ImportError):
            record.signatures[name] = metrics.METRICS[name].signature(record.spec.dataset)
    return sums


def row_sums(record: RunRecord, outputs: list[dict], file: str) -> dict[str, np.ndarray]:
    sums = metrics.row_sums(outputs, record.spec.dataset)
    metrics.check_range(sums, file)
    return sums


def save(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none of it: a full disk leaves the earlier one as it was, and two who write at
    once do not mix. A lone surrogate, which UTF-8 has not, is written as JSON escapes it."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, value: dict) -> None:
    """Adds one line of JSON; whoever follows the file sees it at once."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n")


def digest_of(file: Path) -> str:
    """Of all of it, which is on the disk then."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def weights_in(folder: Path) -> list[Path]:
    """The files of a saved model that hold its weights."""
    return sorted(folder.rglob("*.safetensors"))


def weights_digest(folder: Path) -> str | None:
    """Of a saved model's weights; null where there are none."""
    files = weights_in(folder)
    return digest([digest_of(file) for file in files]) if files else None


def intact(checkpoint: Path) -> bool:
    """Whether its files are as they were written."""
    try:
        digests = parse((checkpoint / MARK).read_text("utf-8"))
        return all(digest_of(checkpoint / name) == expected for name, expected in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def leave(record: RunRecord, folder: Path) -> None:
    """What a run has measured so far, as its bench will find it."""
    record.warnings = [redacted(warning) for warning in record.warnings]
    save(folder / RESULT, record.to_json())
