"""The model that a request names: a folder here, or an id on the hub."""

import os
from pathlib import Path
from typing import NamedTuple

from harness import ROOT
from harness.errors import Problem, Problems, absent, shown
from harness.plan import hub

DRAWN = "random:"  # before a name: the weights are drawn, not read
FILES = ("config.json", "tokenizer_config.json")


class Model(NamedTuple):
    name: str  # for the spec: a hub id, or the folder's without its place on this machine
    folder: Path | None


def find_model(name: str, problems: Problems) -> Model:
    if not name:
        problems.add("", "no model: name one with --model ID|DIR, or a preset with --preset")
        return Model("", None)
    drawn, text = DRAWN * name.startswith(DRAWN), name.removeprefix(DRAWN)
    folder, where = local_folder(text), f"model {shown(name)}"
    if problems.add(where, unreachable(text, folder)) or folder is None:
        return Model(name, None)
    if missing := [file for file in FILES if absent(folder / file, "file")]:
        problems.add(where, f"the folder has no {' and no '.join(missing)}")
    elif not drawn and not any(folder.glob("*.safetensors")):
        remedy = (
            f"convert them with save_pretrained, or write {DRAWN}{text} to measure cost alone, with weights "
            "drawn at random"
        )
        problems.add(where, "the folder has no .safetensors weights", remedy)
    folder = folder.resolve()
    own = folder.is_relative_to(ROOT)
    return Model(drawn + (str(folder.relative_to(ROOT)) if own else folder.name), folder)


def local_folder(text: str) -> Path | None:
    """The folder that a model's name says, from here or from the project's."""
    path = Path(os.path.expanduser(text))
    return next((p for p in (path, ROOT / path) if text and os.path.isdir(p)), None)


def unreachable(text: str, folder: Path | None) -> Problem | None:
    """Why nothing can be read of a model, here or on the hub; None if it can."""
    if not text:
        return Problem("its name is empty")
    if folder:
        return absent(folder, "folder")
    path = Path(os.path.expanduser(text))
    if os.path.lexists(path) or not hub.is_id(text):
        why = absent(path, "folder")
        return Problem(f"neither a folder nor a hub id such as google/gemma-3-1b-it: {why}")
    return hub.unreachable_model(text)
