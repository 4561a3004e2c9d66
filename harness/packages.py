"""What is installed: this program's version and commit, its packages, and the oldest that are good enough.

`python -m harness.packages NEED ...` tries, in a process of its own, what the runs of a bench will import.
"""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from typing import Any

from harness import ROOT, __version__

OURS = "tuneoff"
RECORDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "sacrebleu")
IMPORTED = (  # by every run
    "torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "jinja2", "sacrebleu.metrics",
)  # fmt: skip


def found(package: str) -> str | None:
    """Its version; null where it is missing, or where an installation that was broken off has left none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def floors() -> dict[str, str]:
    """Package -> the oldest version that the code is known to run on."""
    parts = [re.match(r"([\w.-]+)>=([\w.]+)", line) for line in requirements()]
    return {part[1]: part[2] for part in parts if part}


def requirements() -> list[str]:
    """Of who uses the program, 4-bit models included: as a clone's pyproject.toml has them, else as an
    installation was told."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        if project["name"] == OURS:
            return project["dependencies"] + project["optional-dependencies"]["4bit"]
    except (OSError, ValueError, KeyError):  # none lies there, or another program's
        pass
    return [line for line in requires(OURS) or [] if "extra" not in line or "4bit" in line]


def older(there: str, floor: str) -> bool:
    """By the leading numbers of each part: where packages are missing, packaging may be one of them."""
    first, second = (
        [int(number) for number in re.findall(r"(?:^|\.)(\d+)", text.partition("+")[0])]
        for text in (there, floor)
    )
    return first < second


def recorded() -> dict[str, str]:
    """Package -> version, of those that a run's numbers may depend on."""
    return {name: there for name in RECORDED if (there := found(name))}


def source() -> dict[str, Any]:
    """Of Tuneoff's own code: its version; the commit and whether it was changed since, where its files belong
    to a repository: one that merely lies around an installation is another's."""
    git = ["git", "-C", str(ROOT)]

    def ask(*command: str) -> str | None:
        done = subprocess.run([*git, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        own = ask("ls-files", "--error-unmatch", "harness/__init__.py") is not None
        commit = ask("rev-parse", "--short=12", "HEAD") if own else None
        dirty = bool(ask("status", "--porcelain", "-uno", ".")) if commit else None
    except OSError:  # no git
        commit = dirty = None
    return {"version": __version__, "commit": commit, "dirty": dirty}


def unimportable(needs: list[str]) -> dict[str, str]:
    """Package or module -> why it cannot be imported, with the remedy: of those that every run imports,
    and of the packages that some methods need beyond them."""
    sources = packages_distributions()
    reasons = {}
    for name in [*IMPORTED, *needs]:
        modules = [name] if name in IMPORTED else [m for m, named in sources.items() if name in named]
        try:
            for module in modules or [name]:
                importlib.import_module(module)
        except Exception as error:  # a package that is broken raises what it likes
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            remedy = f"pip install {missing.partition('.')[0]}" if missing else "install it again with pip"
            reasons[name] = f"{name} cannot be imported, {type(error).__name__}: {error}: {remedy}"
    return reasons


if __name__ == "__main__":
    print(json.dumps(unimportable(sys.argv[1:])))
