"""`results/grades/`: one file a rater, written whole at each grade, read by the report."""

import json
import unicodedata
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from filelock import FileLock

from harness.plain import UNSEEN
from harness.shape import Range, check, parse
from harness.spec import digest
from harness.store import save

CRITERIA = {  # as the brief names them, and what a rater is told
    "fluency": "Is it well-formed language that reads well?",
    "relevance": "Does it do what the prompt asks?",
    "correctness": "Is what it says right, and all that was asked?",
}
HIGHEST = 5  # of a grade, from 0 on; the brief's scale
FOLDER = "grades"
LONGEST_NAME = 60  # characters
Grade = Annotated[int, Range(0, HIGHEST)]


class Graded(TypedDict):
    """An answer, as far as it was graded. `row`: the test row that it answers. `grades`: by criterion."""

    row: str
    grades: dict[str, Grade]


class Rater(TypedDict):
    """A file. `answers`: by the key of a text under a row, see `harness.grade.key`."""

    schema: Literal[1]
    rater: str
    answers: dict[str, Graded]


class Grades:
    """Of a folder of results. The files are the truth: who reads asks them again."""

    def __init__(self, results: Path):
        self.folder = Path(results) / FOLDER

    def load(self) -> tuple[list[Rater], list[str]]:
        """What each rater said, by name, and a line for each file that is no rater's."""
        raters, corrupt = [], []
        for path in sorted(self.folder.glob("[!.]*.json")):
            try:
                raters.append(read(path))
            except (OSError, ValueError) as error:
                corrupt.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        return sorted(raters, key=lambda rater: rater["rater"]), corrupt

    def of(self, name: str) -> Rater:
        """Of one rater, who may be new. Raises ValueError for what is no name, or for a file that cannot be
        read: it is not written over."""
        path = self.path(name)
        return read(path) if path.exists() else {"schema": 1, "rater": named(name), "answers": {}}

    def give(self, name: str, answer: str, row: str, criterion: str, grade: int | None) -> None:
        """Keeps one grade, or takes it back; on disk when this returns. Raises OSError and ValueError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            rater = self.of(name)
            grades = rater["answers"].setdefault(answer, {"row": row, "grades": {}})["grades"]
            if grade is None:
                grades.pop(criterion, None)
            else:
                grades[criterion] = grade
            check(rater, Rater)
            save(self.path(name), json.dumps(rater, indent=1, ensure_ascii=False))

    def path(self, name: str) -> Path:
        """`Ann` and ` ann` are one rater; two whose names a file cannot hold are two."""
        name = named(name).casefold()
        seen = "".join(c for c in name if c.isascii() and c.isalnum())[:24]
        return self.folder / f"{seen or 'rater'}-{digest(name)}.json"


def read(path: Path) -> Rater:
    if path.is_symlink() or not path.is_file():
        raise ValueError("not a file")
    value = parse(path.read_text("utf-8"))
    check(value, Rater)
    if value["rater"] != named(value["rater"]):
        raise ValueError("it.rater is no name as it is written here")
    return value


def named(name: str) -> str:
    """A rater's name as it is kept. Raises ValueError for what is none."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name or len(name) > LONGEST_NAME or UNSEEN.search(name):
        raise ValueError(f"a rater's name has 1 to {LONGEST_NAME} visible characters")
    return name
