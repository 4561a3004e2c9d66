"""The folder of a model: what belongs to it, no word of this machine in it, and there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from harness.errors import Problem, Problems, shown, unwritable
from harness.store import save

CARD = "README.md"
ADAPTER = "adapter_config.json"
# Weights, settings, vocabularies and chat templates: what else may lie there is nobody's model.
KINDS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", CARD)
# Where libraries write what they loaded.
PLACES = ("base_model_name_or_path", "_name_or_path", "name_or_path")


def nameless(folder: Path, base: str | None) -> None:
    """Takes out of a saved model's settings where its base lay on this machine, and the card that tells it.
    `base`: its id on the hub stands there instead; null where it has none, as another's model could have a
    folder's name as its id. Whoever restores an adapter says which base it is for."""
    for file in folder.rglob("*config.json"):
        try:
            value = dict(json.loads(file.read_text("utf-8")))
        except (TypeError, ValueError):  # a method's own, in a form of its own
            continue
        told = {name for name in PLACES if name in value and from_elsewhere(file.parent, value[name])}
        if any(value[name] != base for name in told):
            save(file, json.dumps(value | dict.fromkeys(told, base), indent=2, ensure_ascii=False) + "\n")
    (folder / CARD).unlink(missing_ok=True)


def from_elsewhere(folder: Path, place: object) -> bool:
    """Whether a setting does not name what lies beside it."""
    return not (isinstance(place, str) and place and not os.path.isabs(place) and (folder / place).is_dir())


def listed(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files of a model."""
    found = {file for kind in KINDS for file in folder.rglob(kind) if file.is_file()}
    visible = (f for f in found if not any(p.startswith(".") for p in f.relative_to(folder).parts))
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(visible)}


@contextmanager
def beside(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder to write in, which gets the name of `folder` when the block has ended well; else nothing
    is left. `needed`: bytes. Raises BadRequest where something stands there, or the disk has no room."""
    problems = Problems()
    problems.add("--to", taken(folder) or no_room(folder, needed))
    problems.refuse()
    part = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        yield part
        if problems.add("--to", taken(folder)):  # somebody was faster
            problems.refuse()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def taken(folder: Path) -> Problem | None:
    """Why nothing can be written under this name; None if it can."""
    if os.path.lexists(folder):
        return Problem(f"{shown(folder)} is there already", remedy="another folder with --to, or remove it")
    return unwritable(folder)


def no_room(folder: Path, needed: int) -> Problem | None:
    existing = next(p for p in folder.absolute().parents if p.is_dir())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    what = f"the model takes {needed / 2**30:.1f} GiB, {shown(existing)} has {free / 2**30:.1f} GiB free"
    return Problem(what, remedy="choose a folder on another disk")


def licence_of(source: str | None) -> str | None:
    """What the card of a base says, in its folder or in the hub's cache; null where there is none."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    if source is None:
        return None
    card = str(Path(source) / CARD) if os.path.isdir(source) else try_to_load_from_cache(source, CARD)
    try:
        said = (metadata_load(card) or {}).get("license") if isinstance(card, str) else None
    except Exception:  # no text, no YAML: strangers wrote it
        return None
    return said if isinstance(said, str) else None
