"""What a wrong request is told: what is wrong, the nearest valid thing, and what is available.

How values, tables and paths from outside are checked stands here too: each kind of fault has one place.
"""

import difflib
import math
import os
import re
import stat
import tomllib
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text",
    list: "a list", dict: "a table", NoneType: "left out",
}  # fmt: skip
BOUNDS = {int: "below 2^63", float: "finite", str: "UTF-8 without a zero byte"}  # of those that have some
LARGEST = 2**63 - 1  # what torch, NumPy and JSON's other readers hold
SHOWN = 80  # characters of a value: a slip is seen in fewer, and a file pasted by accident fills no screen
NEIGHBOURS = 10_000  # names of a folder among which the nearest is looked for


def unknown(what: str, name: str, names) -> str:
    """`unknown method 'qlor': did you mean qlora? Available: ...`"""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {near[0]}?" if near else "."
    return f"unknown {what} {brief(name)}{hint} Available: {', '.join(names) or 'none'}"


def brief(value) -> str:
    """A value as Python writes it, its middle left out where it is long."""
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}...{text[-SHOWN // 4 :]} ({len(text):,} characters)"


# Values


def misfit(value, kind) -> str | None:
    """Why a value is not of a kind, or None. Kinds are as annotations write them: bool, int, float, str,
    list[str], dict[str, int], `int | None`, Literal["a", "b"]; of any other, what JSON can hold."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        reasons = [misfit(value, part) for part in parts]
        return None if None in reasons else reasons[0]
    if origin is Literal:
        same = any(value == part and type(value) is type(part) for part in parts)
        return None if same else f"must be one of {', '.join(map(str, parts))}, not {brief(value)}"
    if origin not in KINDS:
        origin, parts = type(value), ()
        if origin is tuple:  # JSON's list
            origin = list
    if origin not in KINDS or not fits(value, origin):
        wanted = BOUNDS.get(type(value)) if type(value) is origin else KINDS.get(origin)
        return f"must be {wanted or 'a value that JSON holds'}, not {brief(value)}"
    inner = parts[-1] if parts else Any
    if origin is dict:
        wrong = (f"{brief(key)} {reason}" for key, item in value.items()
                 if (reason := misfit(key, str) or misfit(item, inner)))  # fmt: skip
    elif origin is list:
        wrong = (f"item {n} {reason}" for n, item in enumerate(value, 1) if (reason := misfit(item, inner)))
    else:
        return None
    return next((f"has a wrong value: {reason}" for reason in wrong), None)


def fits(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and finite(value)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is str:
        return type(value) is str and writable(value)
    return isinstance(value, kind | tuple if kind is list else kind)


def finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def writable(text: str) -> bool:
    """As UTF-8, and without the character that ends a path: bytes of a terminal may be neither."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


# Tables


def read_toml(path: Path) -> dict:
    """Raises ValueError, which names the file and the reason."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a 13th month, too many digits or brackets
        raise ValueError(f"{path} is not TOML: {error}") from error


def misfits(what: str, values: dict, defaults: dict, kinds: dict) -> list[str]:
    """A line for each key that a table cannot have, and for each value that is not of its kind: that of
    `kinds`, else that of the default."""
    errors = []
    for key, value in values.items():
        if key not in defaults:
            errors.append(unknown(f"key in {what}", key, defaults))
        elif reason := misfit(value, kinds.get(key, type(defaults[key]))):
            errors.append(f"{what}: {key} {reason}")
    return errors


# Paths


def absent(path: Path, what: str = "file or folder") -> str | None:
    """Why nothing of this kind can be read at a path, with the nearest name there; None if it can."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        near = neighbour(path)
        return f"there is no {what} {shown(path)}" + (f": did you mean {near}?" if near else "")
    except (OSError, ValueError) as error:  # no right to look, a loop of links, a name too long
        return f"{shown(path)}: {getattr(error, 'strerror', None) or error}"
    kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device or pipe"
    if kind not in what.split(" or "):
        return f"{shown(path)} is a {kind}, not a {what}"
    rights = os.R_OK | os.X_OK if kind == "folder" else os.R_OK
    return None if os.access(path, rights) else f"{shown(path)}: no right to read it"


def neighbour(path: Path) -> str | None:
    """The path of the nearest name in the same folder."""
    try:
        with os.scandir(path.parent) as found:
            names = [entry.name for entry in islice(found, NEIGHBOURS)]
    except (OSError, ValueError):
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / near[0]) if near else None


def shown(path: Path | str) -> str:
    """A path or a text as it was typed, where a terminal can show it."""
    text = str(path)
    return text if len(text) < 256 and text.isprintable() else brief(text)


# Secrets

HIDDEN = "[hidden]"
SECRETS = (  # what a secret looks like; the group is kept, so that a reader knows what was hidden
    r"(hf_|gh[opsru]_|npm_|AKIA|ASIA|AIza)[A-Za-z0-9]{16,}",  # the mark that its maker gave it
    r"\b(sk-|github_pat_|glpat-|xox[a-z]-|pypi-Ag|eyJ)[\w.-]{16,}",
    r"(?i)\b(bearer\s+|authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?)[\w.~+/=-]{8,}",
    r"(?i)((?:(?:api|access|private|secret)[_-]?key|(?:access|auth)[_-]?token|secret|passw(?:or)?d)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+",  # the name beside it
    r"(?i)((?:key|token|signature)[\"']?\s*[=:]\s*[\"']?)(?=[\w~+/=-]*\d)(?=[\w~+/=-]*[a-z])[\w~+/=-]{8,}",
    r"(\w://)[^\s/?#\"']+(?=@)",  # its place in an address
    r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)",
)
SECRET_NAME = re.compile(r"(?i)(token|key|secret|passw(or)?d)$")  # of an environment variable


def redacted(text: str) -> str:
    """The text without what looks like a secret, and without those of this process's environment."""
    own = (value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 12)
    for value in sorted(own, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern in SECRETS:
        text = re.sub(pattern, rf"\1{HIDDEN}", text)
    return text


def redacted_in(value):
    """A JSON value with each of its texts redacted."""
    if isinstance(value, dict):
        return {redacted(name): redacted_in(item) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted_in(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
