"""A journal of the steps that a job has done: a run that was killed goes on from there.

The journal is a file with one JSON line per step. A step is recorded after its results were handed to the operating
system. That survives the death of the process, however it ends, but not a power failure. So every MARK_SECONDS the
results and the journal are flushed to the disk, and the journal gets a mark. After a restart of the machine, or on
another machine, only the lines before the last mark count.
"""

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from dppa_jax.runtime.files import write_whole

MARK_SECONDS = 30  # between flushes, some hundredths of a second each


class Journal:
    """Records by key, kept in a file.

    Args:
      file: the journal's file; without one, nothing is recorded and `get` returns nothing.
      keep: read the records that the file holds; otherwise it is written anew.
      flush: flushes to the disk the results that the records stand for.
    """

    def __init__(self, file: Path | None = None, keep: bool = False, flush: Callable[[], None] = lambda: None):
        self._records = _read(file) if keep and file else {}
        self._flush, self._marked = flush, time.monotonic()
        self._file = None
        if file:
            lines = [{"boot": _boot()}, *({"key": key, "record": record} for key, record in self._records.items())]
            write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = file.open("a")

    @property
    def resumed(self) -> int:
        """The number of records that an earlier run left."""
        return len(self._records)

    def get(self, key: str) -> Any | None:
        """Return what an earlier run recorded under this key; None if it recorded nothing."""
        return self._records.get(key)

    def add(self, key: str, record: Any) -> None:
        """Record a step that is done. `record` is anything that JSON can hold; numbers keep their bits."""
        self._write({"key": key, "record": record})
        if self._file and time.monotonic() > self._marked + MARK_SECONDS:
            self.mark()

    def mark(self) -> None:
        """Flush the results and the journal to the disk: the lines so far count even after a power failure."""
        if self._file:
            self._flush()
            self._write({"mark": True})
            os.fsync(self._file.fileno())
            self._marked = time.monotonic()

    def close(self) -> None:
        """Close the file; later records are not kept."""
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, line: dict) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _read(file: Path) -> dict[str, Any]:
    """Read the records that count. A killed run may have left a last line that is cut off; it is ignored."""
    records: dict[str, Any] = {}
    marked: dict[str, Any] = {}
    same_boot = False
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if "boot" in line:
            same_boot = line["boot"] == _boot()
        elif "mark" in line:
            marked = dict(records)
        else:
            records[line["key"]] = line["record"]
    return records if same_boot else marked


@cache
def _boot() -> str:
    """Return a name of the time since this machine was started: what the kernel was handed before may be lost."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())
