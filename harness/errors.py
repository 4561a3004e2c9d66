"""What a wrong request is told: what is wrong, the nearest valid thing, and what is available."""

import difflib
import os
import re

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def unknown(what: str, name: str, names) -> str:
    """`unknown method 'qlor': did you mean qlora? Available: ...`"""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {near[0]}?" if near else "."
    return f"unknown {what} {name!r}{hint} Available: {', '.join(names) or 'none'}"


def misfit(value, kind) -> str | None:
    """Why a value is not of a kind (bool, int, float or str; others always fit), or None."""
    if kind not in KINDS:
        return None
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is kind
    return None if fits else f"must be {KINDS[kind]}, not {value!r}"


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
