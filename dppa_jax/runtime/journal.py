"""A journal of the steps that a job has done: a run that was killed goes on from there.

The journal is a file with a line for each step: a checksum, and the step's key and record as JSON. A step is recorded
after its results were handed to the operating system. That survives the death of the process, however it ends. It may
not survive a power failure: then lines, or the results that they stand for, can be lost, cut or zeros. So a line counts
only with its checksum, and whoever takes up results compares them with a checksum in the record.
"""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.reading import MAX_LINES_BYTES, parse_json, read_bytes


class _Line(msgspec.Struct):
    """What a line holds beside its checksum."""

    key: str
    record: Any


class Journal:
    """Records by key, kept in a file.

    Args:
      file: the journal's file; without one, nothing is recorded and `get` returns nothing.
      keep: read the records that the file holds; otherwise it is written anew.
    """

    def __init__(self, file: Path | None = None, keep: bool = False):
        self._records = _read(file) if keep and file else {}
        self._path, self._file = file, None
        if file:
            write_whole(file, b"".join(_line(key, record) for key, record in self._records.items()))
            self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    @property
    def resumed(self) -> int:
        """The number of records that an earlier run left."""
        return len(self._records)

    def get(self, key: str) -> Any | None:
        """Return what an earlier run recorded under this key; None if it recorded nothing."""
        return self._records.get(key)

    def add(self, key: str, record: Any) -> None:
        """Record a step that is done. `record` is anything that JSON can hold; numbers keep their bits.

        Raises:
          OSError: the line cannot be written; names the file.
        """
        line = memoryview(_line(key, record) if self._file is not None else b"")
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file; later records are not kept."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _line(key: str, record: Any) -> bytes:
    """Return a line: 16 digits of a checksum, a blank, JSON."""
    text = json.dumps({"key": key, "record": record}).encode()
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def _read(file: Path) -> dict[str, Any]:
    """Read the records up to the first line that is not whole: a killed run may have left one that is cut off."""
    records: dict[str, Any] = {}
    try:
        lines = read_bytes(file, MAX_LINES_BYTES).split(b"\n")
    except (OSError, ValueError):
        return {}
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if checksum != xxhash.xxh3_64_hexdigest(text).encode():
            break
        try:
            whole = parse_json(text, str(file), _Line)
        except ValueError:  # not a line of ours, although its checksum is right
            break
        records[whole.key] = whole.record
    return records
