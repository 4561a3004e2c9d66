"""The house stands as CONTRIBUTING.md draws it: a file imports only from lower floors."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["spec", "errors", "plain", "shape", "metrics"],
    ["record"],
    ["store", "measuring", "doctor", "data"],
    ["method"],
    ["trial", "training"],
    ["plan", "child", "contract"],
    ["bench", "report"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [p for p in (ROOT / "harness").rglob("*.py") if p != ROOT / "harness" / "__init__.py"]


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


def room(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors(path):
    own = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "methods":
            pytest.fail(f"{path} imports a method")
        if parts[0] == "harness" and parts[1] != own and parts[1] != "ROOT":
            assert FLOOR[parts[1]] < FLOOR[own], f"{own} imports {parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_is_named_in_the_harness(path):
    names = {p.stem for p in (ROOT / "methods").glob("*.py")} - {"__init__", "base", "full", "peft"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    tree.body = [node for node in tree.body if "EPILOG" not in ast.unparse(node)[:6]]  # examples for people
    assert not [name for name in names if re.search(rf"\b{name}\b", ast.unparse(tree))]


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.stem)
def test_a_method_imports_the_method_interface_and_its_parents_alone(path):
    for name in imports(path):
        if name.startswith("harness"):
            assert name.startswith("harness.method"), name


@pytest.mark.parametrize("room", ["spec", "record", "errors", "store", "plan", "cli", "report"])
def test_these_rooms_do_without_torch(room):
    code = (
        f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"import harness.{room}, harness.method as m\n"
        "[m.resolve(name, source) for name, source in m.available().items()]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_room_stands_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in FILES:
        assert f"harness/{room(path)}" in text, path
