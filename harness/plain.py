"""Text that strangers wrote, made safe to show and keep: a model's answer, a plug-in's exception, a record's
name, without what acts on a terminal and without secrets."""

import os
import re

# Control characters (ANSI escapes, NUL), marks that turn the direction of text, invisible ones, and
# lone surrogates, which UTF-8 cannot write.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(value) -> str:
    """Text in which what would act or hide stands as its code point: ⟨U+001B⟩."""
    text = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, then how many more there were."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()}… ({len(text) - limit:,} characters more)"


def listed(names: list[str], most: int = 8) -> str:
    """`A, B and C`; beyond `most`, the number of the others."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# Secrets

HIDDEN = "[hidden]"
SECRETS = (  # what a secret looks like; the group is kept, so that a reader knows what was hidden
    r"(hf_|api_org_|gh[opsru]_|npm_|AKIA|ASIA|AIza)[A-Za-z0-9]{16,}",  # the mark that its maker gave it
    r"\b(sk-|github_pat_|glpat-|xox[a-z]-|pypi-Ag|eyJ)[\w.-]{16,}",
    r"(?i)\b(bearer\s+|authorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?)[\w.~+/=-]{8,}",
    r"(?i)((?:(?:api|access|private|secret)[_-]?key|(?:access|auth)[_-]?token|secret|passw(?:or)?d)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+",  # the name beside it
    r"(?i)((?:key|token|signature)[\"']?\s*[=:]\s*[\"']?)(?=[\w~+/=-]*\d)(?=[\w~+/=-]*[a-z])[\w~+/=-]{8,}",
    r"(\w://)[^\s/?#\"']+(?=@)",  # its place in an address
    r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)",
)
SECRET_NAME = re.compile(  # of an environment variable
    r"(?i)(token|key|secret|passw(or)?d|passphrase|credentials?|(^|_)pat)(_|\d*$)"
)


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


def space(size: float) -> str:
    """Bytes, as a person reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
