"""The house stands as CONTRIBUTING.md draws it: a file imports only from lower floors."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["claims", "errors", "forks", "plain", "search"],
    ["shape", "endings", "ranks"],
    ["spec", "metrics", "migrate", "packages"],
    ["record"],
    ["store", "tuning", "machine", "data", "work"],
    ["method", "doctor", "measuring", "grade", "keeping", "tracking", "watchdog"],
    ["trial", "training"],
    ["plan", "child", "preflight", "forecast"],
    ["nursery"],
    ["bench", "report", "contract"],
    ["cli"],
]
WINGS = sorted(face.parent.name for face in (ROOT / "harness").glob("*/__init__.py"))  # their only doors
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [p for p in (ROOT / "harness").rglob("*.py") if p != ROOT / "harness" / "__init__.py"]


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from harness import x` counted as harness.x; those that it
    names in annotations alone are not."""
    found, tree = set(), ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def doors(wing: str) -> set[str]:
    """What the face of a wing says that it gives."""
    tree = ast.parse((ROOT / "harness" / wing / "__init__.py").read_text())
    [said] = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return {f"harness.{wing}.{name}" for name in ast.literal_eval(said)}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors(path):
    own = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "methods":
            pytest.fail(f"{path} imports a method")
        if parts[0] == "harness" and parts[1] not in (own, "ROOT", "__version__"):
            assert FLOOR[parts[1]] < FLOOR[own], f"{own} imports {parts[1]}"


@pytest.mark.parametrize("wing", WINGS)
def test_outside_of_a_wing_its_face_alone_is_imported(wing):
    others = [path for path in FILES if room(path) != wing]
    for path in [*others, *(ROOT / "methods").glob("*.py")]:
        inside = {name for name in imports(path) if name.startswith(f"harness.{wing}.")} - doors(wing)
        assert not inside, f"{path} imports {inside}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_is_named_in_the_harness(path):
    names = "|".join({p.stem for p in (ROOT / "methods").glob("*.py")} - {"__init__", "base", "full", "peft"})
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    tree.body = [node for node in tree.body if "EPILOG" not in ast.unparse(node)[:6]]  # examples for people
    assert not re.findall(rf"\b({names})\b", ast.unparse(tree))


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.stem)
def test_a_method_imports_the_method_interface_and_its_parents_alone(path):
    for name in imports(path):
        if name.startswith("harness"):
            assert name.startswith("harness.method"), name


def test_these_rooms_and_all_methods_files_do_without_torch():
    rooms = ("spec", "record", "errors", "store", "plan", "cli", "report", "grade", "forecast")
    code = (
        f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"import {', '.join(f'harness.{room}' for room in rooms)}, harness.method as m\n"
        "[m.resolve(name, source) for name, source in m.known_methods().items()]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_installation_has_every_folder():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert folders <= set(packages)


def test_every_room_stands_in_contributing_on_its_floor():
    row = re.compile(r"^\| (\d+) \| `harness/(\w+)(?:/|\.py)` \|", re.MULTILINE)
    drawn = [(name, int(floor)) for floor, name in row.findall((ROOT / "CONTRIBUTING.md").read_text())]
    assert sorted(drawn) == sorted(FLOOR.items())
    assert set(FLOOR) == {room(path) for path in FILES}
