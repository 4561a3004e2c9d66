"""What a wrong request is told: every `Problem` at once, each with the nearest valid thing and the remedy.

What can go on to look for more adds to a list of `Problems`; what cannot raises `BadRequest`.
"""

import difflib
import os
import stat
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

SHOWN = 80  # characters of a value: a slip is seen in fewer, and a file pasted by accident fills no screen
NEIGHBOURS = 10_000  # names of a folder among which the nearest is looked for


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; as a text, the line that is told."""

    what: str
    where: str = ""  # hp.epochs, --seeds, dataset demo; empty where `what` says it
    nearest: str = ""  # valid thing
    available: tuple[str, ...] | None = None  # valid things; None: they are not of a few names
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text += f": did you mean {self.nearest}?" if self.nearest else ""
        if self.available is not None:
            text += f"{'' if self.nearest else '.'} Available: {', '.join(self.available) or 'none'}"
        return f"{text}: {self.remedy}" if self.remedy else text


class BadRequest(ValueError):
    """Everything that is wrong with what was asked, a line each."""

    def __init__(self, *problems: Problem | str):
        self.problems = [Problem(p) if isinstance(p, str) else p for p in problems]
        super().__init__("\n".join(map(str, self.problems)))


class Problems(list):
    """Of Problem: what was found wrong so far."""

    def add(self, where: str, what: str | Problem | None, remedy: str = "") -> bool:
        """Whether there was a problem to add: None is none. `where` stands before a Problem's own."""
        if what:
            problem = what if isinstance(what, Problem) else Problem(what, remedy=remedy)
            self.append(replace(problem, where=": ".join(filter(None, (where, problem.where)))))
        return bool(what)

    @contextmanager
    def caught(self, where: str = ""):
        """Adds those of the BadRequest that ends the block, if one does."""
        try:
            yield
        except BadRequest as error:
            for problem in error.problems:
                self.add(where, problem)

    def refuse(self) -> None:
        """Raises BadRequest if there are any."""
        if self:
            raise BadRequest(*self)


def unknown(what: str, name: str, names, *others: str) -> Problem:
    """`unknown method 'qlor': did you mean qlora? Available: ...`. `others`: what may stand for a name."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1)
    return Problem(f"unknown {what} {brief(name)}", nearest="".join(near), available=(*names, *others))


def brief(value) -> str:
    """A value as Python writes it, its middle left out where it is long."""
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}...{text[-SHOWN // 4 :]} ({len(text):,} characters)"


def writable(text: str) -> bool:
    """As UTF-8, and without the character that ends a path: bytes of a terminal may be neither."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


# Files


def read_toml(path: Path) -> dict:
    """Raises BadRequest, which names the file and the reason."""
    if problem := absent(path, "file"):
        raise BadRequest(problem)
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a 13th month, too many digits or brackets
        raise BadRequest(f"{path} is not TOML: {error}") from error


def absent(path: Path, what: str = "file or folder") -> Problem | None:
    """Why nothing of this kind can be read at a path, with the nearest name there; None if it can."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Problem(f"there is no {what} {shown(path)}", nearest=neighbour(path))
    except (OSError, ValueError) as error:  # no right to look, a loop of links, a name too long
        return Problem(f"{getattr(error, 'strerror', None) or error}", shown(path))
    kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device or pipe"
    if kind not in what.split(" or "):
        return Problem(f"{shown(path)} is a {kind}, not a {what}")
    rights = os.R_OK | os.X_OK if kind == "folder" else os.R_OK
    return None if os.access(path, rights) else Problem("no right to read it", shown(path))


def unwritable(folder: Path) -> Problem | None:
    """Why files cannot be written in a folder that need not exist yet; None if they can."""
    import tempfile  # it imports `random`, which a working directory may have as well: after that is left out

    existing = next(p for p in [folder, *folder.absolute().parents] if os.path.lexists(p))
    if problem := absent(existing, "folder"):
        return problem
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        return Problem(error.strerror or str(error), shown(folder))
    try:  # rights do not say it: root has them in /proc, and on a disk that takes no file any more
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return Problem(f"cannot write in {existing} ({error.strerror})", remedy="choose another folder")


def unreadable(folder: Path) -> Problem | None:
    """Why records cannot be read from a folder that need not exist yet; None if they can."""
    return absent(folder, "folder") if os.path.lexists(folder) else None


def neighbour(path: Path) -> str:
    """The path of the nearest name in the same folder, or nothing."""
    try:
        with os.scandir(path.parent) as found:
            names = [entry.name for entry in islice(found, NEIGHBOURS)]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else ""


def reason(error: Exception) -> str:
    """What went wrong, in words: of a file its path and the cause, without the system's number for it."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return f"{shown(error.filename)}: {error.strerror}" if error.filename else error.strerror


def shown(path: Path | str) -> str:
    """A path or a text as it was typed, where a terminal can show it."""
    text = str(path)
    return text if len(text) < 256 and text.isprintable() else brief(text)
