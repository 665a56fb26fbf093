"""YAML with the place of every value: a file becomes values that know their line, and nothing else is made of it.

The file is composed into nodes by PyYAML, and never constructed: no tag can name a class. Its size, its nesting and
what aliases repeat are limited. A key that stands twice is refused, as the first would be lost in silence.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dppa_jax.runtime.reading import printable, read_text

MOST_BYTES = 200_000  # of a file of recipes; a chat template is the largest value in one
MOST_VALUES = 20_000  # of a file, with what aliases repeat
FIX = "See dppa_jax/recipes/README.md for what a recipe may say."
PLAIN = "tag:yaml.org,2002:"  # what the tags of YAML itself begin with
SCALARS = ("str", "int", "float", "bool", "null", "timestamp", "value")
TRUE = ("yes", "true", "on")


class RecipeError(ValueError):
    """A recipe that says something that cannot be meant: names file, line, key and fix."""


@dataclass(frozen=True)
class Value:
    """A value of a YAML file.

    Attributes:
      data: text, a number, a truth value, None, a list of values, or a dict of values by key.
      place: FILE:LINE of the value, or of its key where it has one.
    """

    data: Any
    place: str

    def error(self, message: str) -> RecipeError:
        """Return an error that begins with the place."""
        return RecipeError(printable(f"{self.place}: {message}"))

    @property
    def shown(self) -> str:
        """The value in a message, cut short."""
        kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
        return kinds.get(type(self.data)) or repr(self.data)[:99]

    def mapping(self, what: str) -> Mapping[str, "Value"]:
        """Return the values by key; {} where nothing is said.

        Args:
          what: the value's name in the message.
        """
        if not isinstance(self.data, dict | None):
            raise self.error(f"{what} is {self.shown}; give keys and values.")
        return self.data or {}

    def items(self, what: str) -> list["Value"]:
        """Return the values of a list that is not empty."""
        if not isinstance(self.data, list) or not self.data:
            raise self.error(f"{what} is {self.shown if self.data else 'empty'}; give a list: lines that begin with -.")
        return self.data

    def text(self, what: str) -> str:
        """Return a text that is not empty; a name that looks like a number is one, too."""
        if isinstance(self.data, dict | list | bool | None) or not str(self.data).strip():
            raise self.error(f"{what} is {self.shown}; give a text.")
        return str(self.data)


def read_documents(file: str | Path) -> list[tuple[Value, str]]:
    """Read the documents of a YAML file, each with its text.

    Raises:
      OSError: there is no such file.
      RecipeError: it is no YAML, too large, or holds what no recipe has.
    """
    text = read_text(file, MOST_BYTES, FIX, RecipeError)
    return parse_documents(text, str(file))


def parse_documents(text: str, file: str) -> list[tuple[Value, str]]:
    """Parse the documents of a YAML text, each with its own part of the text.

    Args:
      file: the name in messages.

    >>> [(recipe, own)] = parse_documents("dtype: bfloat16", "merge.yaml")
    >>> recipe.data["dtype"].data, recipe.data["dtype"].place
    ('bfloat16', 'merge.yaml:1')
    """
    try:
        nodes = [node for node in yaml.compose_all(text, yaml.SafeLoader) if node is not None]
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise RecipeError(printable(f"{file}:{line}: no YAML: {error.problem or error.context}.")) from None
    except yaml.YAMLError as error:
        raise RecipeError(printable(f"{file}: no YAML: {str(error).splitlines()[0]}.")) from None
    except (RecursionError, ValueError, IndexError):
        raise RecipeError(f"{file}: no YAML that can be read: nested too deep, or a number too large.") from None
    if not nodes:
        raise RecipeError(f"{file}: is empty. {FIX}")
    reader = _Reader(file)
    lines = text.splitlines(keepends=True)
    starts = [0, *(node.start_mark.line for node in nodes[1:]), len(lines)]
    parts = ["".join(lines[first:last]) for first, last in pairwise(starts)]
    return [(reader.value(node), _without_marks(part)) for node, part in zip(nodes, parts, strict=True)]


def _without_marks(text: str) -> str:
    """Return the text of a document without the lines that part it from others."""
    lines = [line for line in text.splitlines() if line.rstrip() not in ("---", "...")]
    return "\n".join(lines).strip("\n") + "\n"


class _Reader:
    """Turns nodes into values, as many as a recipe can have."""

    def __init__(self, file: str):
        self.file, self.left = file, MOST_VALUES

    def value(self, node: yaml.Node, place: str = "") -> Value:
        """Return the value of a node and of all within it."""
        place = place or self.place(node)
        self.left -= 1
        if self.left < 0:
            raise RecipeError(f"{place}: the file has more than {MOST_VALUES} values, or an alias of itself. {FIX}")
        kind = node.tag.removeprefix(PLAIN)
        try:
            if isinstance(node, yaml.MappingNode) and kind == "map":
                return Value(dict(self.pairs(node)), place)
            if isinstance(node, yaml.SequenceNode) and kind == "seq":
                return Value([self.value(item) for item in node.value], place)
        except RecursionError:
            raise RecipeError(f"{place}: nested too deep, or an alias of itself. {FIX}") from None
        if isinstance(node, yaml.ScalarNode) and kind in SCALARS:
            return Value(self.scalar(node, kind, place), place)
        raise RecipeError(printable(f"{place}: the tag {node.tag[:99]!r} has no meaning in a recipe; leave it out."))

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, Value]]:
        """Yield the keys with their values; refuse a key that stands twice, and one that is no text."""
        seen: dict[str, str] = {}
        for key, value in node.value:
            place = self.place(key)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key is a list or a mapping; give a word.")
            if key.value in seen:
                raise RecipeError(
                    printable(f"{place}: {key.value[:99]!r} stands twice, first in {seen[key.value]}; leave one out.")
                )
            seen[key.value] = place
            yield key.value, self.value(value, place)

    def scalar(self, node: yaml.ScalarNode, kind: str, place: str) -> Any:
        """Return a text, number, truth value or None."""
        text = node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in TRUE
        try:
            if kind == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
            if kind == "int":
                return int(text.replace("_", ""), 10)
        except ValueError:
            pass  # 0x1F or 1:30, which YAML 1.1 takes for numbers, and what no one means by it
        if any(0xD800 <= ord(one) < 0xE000 for one in text):
            raise RecipeError(f"{place}: half a character, which is no text; correct it.")
        return text

    def place(self, node: yaml.Node) -> str:
        """Return FILE:LINE of a node."""
        return f"{self.file}:{node.start_mark.line + 1}"
