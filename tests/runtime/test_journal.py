"""Whatever stands in a journal or in a mark: what is whole counts, and nothing else does."""

import json

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.checkpoint.unfinished import MARK, read_mark
from dppa_jax.runtime.journal import Journal

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LINES = st.one_of(
    st.binary(max_size=40),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda key, record: json.dumps({"key": key, "record": record}).encode(), st.text(max_size=5), VALUES),
)


def with_checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text


@settings(max_examples=100, deadline=None)
@given(st.lists(LINES | LINES.map(with_checksum), max_size=4))
def test_any_journal_gives_records_or_none(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "journal"
    file.write_bytes(b"\n".join(lines))
    journal = Journal(file, keep=True)
    journal.add("next", [0.1, 1 / 3])
    journal.close()
    again = Journal(file, keep=True)
    again.close()
    assert again.get("next") == [0.1, 1 / 3], "whatever stood there, what is added is read again"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_mark_is_one_or_none(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "unfinished"
    directory.mkdir(exist_ok=True)
    (directory / MARK).write_bytes(content)
    assert read_mark(directory) is None
