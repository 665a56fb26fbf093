r"""Text for Markdown files: names of models, tensors and files come from outside, and are shown as they are.

>>> print(row([text("a|b <i>"), code("`x|y`")]))
| a\|b \<i\> | `` `x\|y` `` |
"""

import re
from collections.abc import Iterable

from dppa_jax.runtime.reading import printable


def text(given: str) -> str:
    """Escape what Markdown or HTML would take for a sign; one line."""
    return re.sub(r"[\\`*~\[\]<>&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(given, keep=""))


def code(given: str) -> str:
    """Return a code span; its backticks are more than any that the text has in a row."""
    shown = printable(given, keep="")
    ticks = _ticks(shown, 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def block(given: str, language: str = "") -> str:
    """Return a code block."""
    shown = printable(given)
    ticks = _ticks(shown, 3)
    return f"{ticks}{language}\n{shown}\n{ticks}"


def row(cells: Iterable[str]) -> str:
    """Return a row of a table; in its cells, a | is escaped even within code."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ticks(shown: str, least: int) -> str:
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return "`" * max(least, longest + 1)
