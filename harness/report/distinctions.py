"""What tells one comparison from the others of a store, in words."""

from dataclasses import asdict
from typing import Any

from harness.report.text import shorten
from harness.spec import RunSpec

LONGEST = 200  # characters of what is told
ROWS = {"train": "training rows", "validation": "validation rows", "test": "test rows", "seed": "data seed"}


def distinctions(titles: list[str], specs: list[RunSpec]) -> list[str]:
    """Of each comparison, the newest first, what it has of its own among those of the same title:
    `learning rate 0.0002, max length 512`; else its number, the oldest first. Empty where it is the only one.
    """
    told, found = [asked(spec) for spec in specs], []
    for title, own in zip(titles, told, strict=True):
        others = [other for t, other in zip(titles, told, strict=True) if t == title]
        differing = [name for name in own if any(other.get(name) != own[name] for other in others)]
        found.append(shorten(", ".join(f"{name} {own[name]}" for name in differing), LONGEST))
    whole = list(zip(titles, found, strict=True))
    return [
        ", ".join(filter(None, (text, f"number {whole[i:].count(whole[i])}" * (whole.count(whole[i]) > 1))))
        for i, text in enumerate(found)
    ]


def asked(spec: RunSpec) -> dict[str, str]:
    """All that is the same for the rows of a comparison, in words -> its value."""
    dataset: dict[str, Any] = {
        name: value for name, value in spec.dataset.items() if name not in ("name", "title", "notice")
    }
    parts = dataset.pop("parts", [])
    values = {ROWS.get(name, name): value for name, value in dataset.items()}
    values |= {"parts": " + ".join(str(part.get("name")) for part in parts)}
    values |= {f"files of {name}": hash_ for name, hash_ in spec.fingerprints.items()}
    values |= asdict(spec.hp)
    return {name.replace("_", " "): str(value) for name, value in values.items()}
