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
OPENERS = ("os", "tensorstore", "self")  # whose open takes other things than files of text
WORDS = {"linear"}  # names of methods that are other things, too: a matrix, a kind of rotary embedding
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
        if name != "runtime/progress.py" and (bars := {"Console", "Progress", "print"} & rich(tree)):
            yield f"{name}: takes {bars} from rich, which parse names as markup; see runtime/progress.py"
        yield from (f"{name}:{line}: names no encoding" for line in without_encoding(tree))


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a module imports, within functions as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("dppa_jax.")}


def rich(tree: ast.AST) -> set[str]:
    """The names that a module imports from rich."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return {alias.name for node in found if node.module.split(".")[0] == "rich" for alias in node.names}


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """The lines in which text is read or written in the encoding of the locale, which may know ASCII only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg == "encoding" for keyword in node.keywords):
            given = [value.value for value in node.args if isinstance(value, ast.Constant)]
            text = {keyword.arg for keyword in node.keywords if getattr(keyword.value, "value", False) is True}
            match node.func:
                case ast.Attribute(attr="read_text" | "write_text"):
                    yield node.lineno
                case ast.Attribute(value=ast.Name(id="subprocess")) if "text" in text:
                    yield node.lineno
                case ast.Name(id="open") | ast.Attribute(attr="fdopen"):
                    yield from [node.lineno] * (not any("b" in str(mode) for mode in given))
                case ast.Attribute(attr="open", value=path) if not (isinstance(path, ast.Name) and path.id in OPENERS):
                    yield from [node.lineno] * (not any("b" in str(mode) for mode in given))


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
            for name in sorted(compared & ((METHODS.keys() | SCORES.keys()) - WORDS)):
                yield f"compares with the name {name!r}"
