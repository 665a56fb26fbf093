"""What hypothesis puts into files that others may touch: damaged copies of a good one, JSON of any form, bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

NUMBERS = st.one_of(st.integers(), st.integers(10**300, 10**301), st.floats(), st.booleans(), st.none())
WORDS = st.text(max_size=5)
WORDS = st.text(max_size=5)
VALUES = st.recursive(NUMBERS | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner))
ODD = (b"[" * 100_000, b'{"a":' * 100_000, b"5", b"\xe4", b"\x00" * 9, b"NaN", b'"\\ud800"', b"\xef\xbb\xbf[1]", b"")


def read_or_message(read: Callable[[], T], file: Path) -> T | None:
    """What `read` makes of a file, or None where it refuses it with a message that names the file."""
    try:
        return read()
    except ValueError as error:
        if str(file) not in str(error):
            raise AssertionError(f"{file} is not named") from error
        return None


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """A good content with a slice replaced: cut off, cut out, zeros, other bytes, JSON of another form."""
    cut = st.tuples(st.integers(0, len(good)), st.integers(0, len(good))).map(sorted)
    put = st.one_of(st.binary(max_size=4), VALUES.map(lambda value: json.dumps(value).encode()), st.sampled_from(ODD))
    return st.tuples(cut, put).map(lambda chosen: good[: chosen[0][0]] + chosen[1] + good[chosen[0][1] :])


def other_form(good: dict) -> st.SearchStrategy[bytes]:
    """A good JSON object in which one key has another value, or is missing."""
    keys = st.sampled_from(sorted(good))
    replaced = st.tuples(keys, VALUES).map(lambda pair: {**good, pair[0]: pair[1]})
    missing = keys.map(lambda key: {name: value for name, value in good.items() if name != key})
    return (replaced | missing).map(lambda content: json.dumps(content).encode())
