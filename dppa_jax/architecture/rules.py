"""TODO."""

import difflib
import re
from collections.abc import Iterable

from dppa_jax.architecture.specs import LINEARS


def first_match(rules: Iterable[tuple[str, float]], name: str) -> float | None:
    """The value of the first rule whose regular expression is found in the tensor's name."""
    return next((value for pattern, value in rules if re.search(pattern, name)), None)


def check_patterns(rules: Iterable[tuple[str, float]], names: Iterable[str], flag: str) -> None:
    """Every pattern must match some tensor; the error shows the nearest spelling."""
    names = list(names)
    for pattern, _ in rules:
        try:
            matched = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"{flag}: {pattern!r} is not a regular expression: {error}.") from None
        if not matched:
            words = {part for name in names for part in name.split(".") if not part.isdigit()} | set(LINEARS)
            raise ValueError(f"{flag}: no tensor matches {pattern!r}.{nearest(pattern, words | set(names))}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """' Did you mean …?', or the empty string when nothing is near."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
