"""Rules on tensor names: regular expressions of which the first match wins, and nearest spellings."""

import difflib
import re
from collections.abc import Iterable


def first_match(rules: Iterable[tuple[str, float]], name: str) -> float | None:
    """The value of the first rule whose regular expression is found in the tensor's name."""
    return next((value for pattern, value in rules if re.search(pattern, name)), None)


def check_patterns(rules: Iterable[tuple[str, float]], names: Iterable[str], flag: str) -> None:
    """Refuse a pattern that matches no tensor, with the nearest spelling."""
    names = list(names)
    for pattern, _ in rules:
        try:
            matched = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"{flag}: {pattern!r} is not a regular expression: {error}.") from None
        if not matched:
            words = {part for name in names for part in name.split(".") if not part.isdigit()}
            words |= {re.sub(r"^.*\.\d+\.|\.weight$", "", name) for name in names}
            raise ValueError(f"{flag}: no tensor matches {pattern!r}.{nearest(pattern, words | set(names))}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean …?", or the empty string when nothing is near."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
