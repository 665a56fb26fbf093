"""Standard streams that stay open while the program runs, and logs that no terminal obeys."""

import errno
import io
import os
import sys
from logging import LogRecord

from absl import logging

from dppa_jax.runtime.reading import printable


def open_streams() -> None:
    """Let nothing that becomes of stdin, stdout and stderr harm a run. To be called before any file is opened.

    A stream that was closed at the start leads to /dev/null: else the next file would get its number, and logs would be
    written into a model. A stream that can no longer be written, as its pipe has ended, does so from then on.
    Characters that the terminal's encoding does not have are written as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # else someone has put another one in its place, to capture it
            setattr(sys, name, _lasting(number, stream))


class LogFormatter(logging.PythonFormatter):
    """absl's log lines, with control characters escaped: names of tensors and files come from outside."""

    def format(self, record: LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))


class _Output(io.FileIO):
    """A descriptor that drops what it cannot write."""

    def write(self, content) -> int | None:
        """Write bytes. Once it fails, the descriptor leads to /dev/null, for libraries of C and child processes too."""
        try:
            return super().write(content)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self.fileno() == 1 and error.errno != errno.EPIPE:
                logging.warning("what is printed is lost from here on: %s", error.strerror)
            return len(content)


def _lasting(number: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Return a stream like one of Python's, or in place of one that was closed, that outlasts its reader."""
    output = _Output(number, "w", closefd=False)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace", line_buffering=True)
    stream.flush()
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
