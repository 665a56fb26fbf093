"""The rooms of the package, the floors they stand on, and what no file may do. House rules: see dppa_jax/README.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dppa_jax
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.score import SCORES

PACKAGE = Path(dppa_jax.__file__).parent
FLOORS = (  # the ground floor first; rooms of one floor do not know each other
    ("architecture", "delta"),
    ("runtime",),
    ("config",),
    ("flags",),
    ("checkpoint", "packs"),
    ("model",),
    ("merging", "finetune"),  # not "merge", which is a function of the package: dppa_jax.merge(base, experts)
    ("demo",),
    ("where",),
    ("evaluate",),
    ("search",),
    ("report", "recipes", "notebook"),
    ("jobs",),
    ("benchmark",),
    ("launch",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LINES, FUNCTION_LINES = 400, 50
LONG: dict[str, str] = {}  # files and functions that may be longer, and why
FRAGMENTS = ("Of", "Those", "That", "By", "As")  # a docstring that begins with one says nothing in help()


def test_no_rule_of_the_house_is_broken():
    found = sorted(set(violations()))
    assert not found, "\n".join(found)


def violations() -> Iterator[str]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name, text = str(file.relative_to(PACKAGE)), file.read_text()
        tree = ast.parse(text)
        room = name.split("/")[0].removesuffix(".py")
        if room == "__init__":
            continue
        if room not in FLOOR_OF:
            yield f"{name}: has no room"
        if len(text.splitlines()) > LINES and name not in LONG:
            yield f"{name}: more than {LINES} lines"
        for other in sorted(imported(tree)):
            if FLOOR_OF.get(other, 99) >= FLOOR_OF.get(room, 99) and other != room:
                yield f"{name}: imports {other}, which is not on a lower floor"
        yield from (f"{name}: {said}" for said in within(tree, room, name))


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a module imports, within functions as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("dppa_jax.")}


def within(tree: ast.AST, room: str, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            first = (ast.get_docstring(node) or " ").split(" ")[0]
            if first in FRAGMENTS:
                yield f"{getattr(node, 'name', 'module')}: its docstring begins with {first!r}"
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES and f"{file}:{node.name}" not in LONG:
                yield f"{node.name}: {FUNCTION_LINES} lines are exceeded"
        if isinstance(node, ast.Compare | ast.MatchValue) and room != "delta":
            compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            for name in sorted(compared & (METHODS.keys() | SCORES.keys())):
                yield f"compares with the name {name!r}"
