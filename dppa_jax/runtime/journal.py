"""What a job has done, a line each: a run that was killed goes on from there.

A line counts when what it tells of is written, as far as this machine's kernel is concerned: that survives the process,
however it ends. After a power failure, or on another machine, only the lines before the last mark count, which is made
when both the work and the journal have been flushed to the disk.
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
    """Records by key, in a file; without a file nothing is kept and nothing found.

    Args:
      keep: go on from what is in the file; else it is written anew.
      flush: flushes the work of which the lines tell.
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
    def known(self) -> int:
        """How many records an earlier run left."""
        return len(self._records)

    def get(self, key: str) -> Any | None:
        """What an earlier run recorded."""
        return self._records.get(key)

    def add(self, key: str, record: Any) -> None:
        """Record work that is done, as JSON can say it; numbers keep their bits."""
        self._write({"key": key, "record": record})
        if self._file and time.monotonic() > self._marked + MARK_SECONDS:
            self.mark()

    def mark(self) -> None:
        """Let the lines so far count whatever happens."""
        if self._file:
            self._flush()
            self._write({"mark": True})
            os.fsync(self._file.fileno())
            self._marked = time.monotonic()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, line: dict) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _read(file: Path) -> dict[str, Any]:
    """The records that count; the last line of a killed run may be cut off."""
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
    """This run of this machine's kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())
