"""`results/`: one folder a run. Saves atomically, finds by digest, loads all, names the corrupt ones."""

import json
import os
import shutil
from pathlib import Path

from harness.record import RunRecord, finite
from harness.spec import RunSpec

RECORD, OUTPUTS, EVENTS, MODEL = "record.json", "outputs.jsonl", "events.jsonl", "model"


class Store:
    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, spec: RunSpec) -> Path:
        return (self.folder / spec.folder).resolve()

    def find(self, spec: RunSpec) -> RunRecord | None:
        """The record of this spec, if there is a readable one."""
        try:
            return RunRecord.from_json((self.folder / spec.folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def load(self) -> tuple[list[RunRecord], list[str]]:
        """All records, in the order of their start, and a line for each file that is none."""
        records, corrupt = [], []
        for path in sorted(self.folder.glob(f"[!.]*/{RECORD}")):
            try:
                records.append(RunRecord.from_json(path.read_text("utf-8")))
            except (OSError, ValueError) as error:
                corrupt.append(f"{path}: {error}")
        return sorted(records, key=lambda r: (r.started, r.spec.folder)), corrupt

    def outputs(self, spec: RunSpec) -> list[dict]:
        """The test outputs of a run with their per-example scores, in the order of the test rows."""
        path = self.folder / spec.folder / OUTPUTS
        if not path.exists():
            return []
        outputs = []
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                outputs.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; run it again with --force") from error
        return outputs

    def attempt(self, spec: RunSpec) -> Path:
        """An empty folder to run in, beside the finished one, which stays until this one is kept."""
        folder = self.folder / f".{spec.folder}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def keep(self, spec: RunSpec, record: RunRecord) -> None:
        """Ends the attempt. One that is not ok never takes the place of one that is."""
        attempt, final = self.folder / f".{spec.folder}", self.folder / spec.folder
        earlier = self.find(spec)
        if earlier and earlier.ok and not record.ok:
            shutil.rmtree(attempt)
            return
        save(attempt / RECORD, record.to_json())
        shutil.rmtree(final, ignore_errors=True)
        attempt.rename(final)


def save(path: Path, text: str) -> None:
    """Writes a whole file or none of it: a full disk leaves the earlier one as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, value: dict) -> None:
    """Adds one line of JSON; whoever follows the file sees it at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n")
