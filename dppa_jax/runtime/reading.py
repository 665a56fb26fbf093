"""Read small files that a user or another program can have touched: a size limit, a declared shape, a clear message.

A file is read whole, so a limit on its size keeps a wrong or hostile one from filling the memory. A pipe, a device or a
directory in a file's place is refused before it is read, as reading it may never end. Each message names the file and
says what to do.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from absl import logging

MAX_BYTES = 4_000_000  # of a config, an index of a demo or a card; a larger one is not what its name says
MAX_LINES_BYTES = 1_000_000_000  # of a text or a file of lines that is held in memory: responses, journals
MAX_LINE_BYTES = 10_000_000  # of a JSON value in a line: a document to learn from is the largest
MAX_KEPT_BYTES = 256_000_000  # of what a search keeps: AdaMerging has a number for each step, expert and tensor
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON: half of a character, or a whole one by its halves
STEP = 1 << 20  # bytes that are read at a time, so that a file that grows meanwhile is cut off at the limit


def open_regular(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Open a file for reading and return the descriptor; refuse what is no regular file, such as a pipe.

    Links are followed: whoever must not follow one looks at it before.

    Raises:
      OSError: there is no such file, or it may not be read.
      ValueError: it is no file, or its name cannot be one; of the class `error`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without blocking: a pipe would
    except ValueError:
        raise error(f"{printable(str(path))}: a zero byte cannot be part of a file's name; correct it.") from None
    except OSError as failure:
        if failure.errno == errno.ENXIO:
            raise error(f"{path} is a socket in place of a file; put the file there.") from None
        if failure.errno == errno.ELOOP:
            raise error(f"{path} is a link that leads back to itself; put the file there.") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} is a {_kind(path)} in place of a file; put the file there.")
    return descriptor


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Add a file's name to an error of the operating system that lacks it, as one of reading from a descriptor does."""
    try:
        yield
    except OSError as failure:
        if failure.errno is None or failure.filename is not None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def read_bytes(
    path: Path | str, most: int = MAX_BYTES, fix: str = "Correct it.", error: type[ValueError] = ValueError
) -> bytes:
    """Read a whole file of at most `most` bytes.

    Args:
      fix: what to do when the file is not what it should be; a sentence.
      error: the class of the error for such a file.

    Raises:
      OSError: there is no such file, or reading fails; names the file.
      ValueError: it is no file, or larger; of the class `error`.
    """
    descriptor = open_regular(path, error)
    try:
        with naming(path):
            size = os.fstat(descriptor).st_size
            content = bytearray()
            while size <= most and (piece := os.read(descriptor, min(STEP, most + 1 - len(content)))):
                content += piece
    finally:
        os.close(descriptor)
    if (size := max(size, len(content))) > most:
        raise error(f"{path}: {size} bytes, and such a file has at most {most}. {fix}")
    return bytes(content)


def read_text(
    path: Path | str, most: int = MAX_BYTES, fix: str = "Save it as UTF-8.", error: type[ValueError] = ValueError
) -> str:
    """Read a UTF-8 text file; arguments and errors are those of `read_bytes`."""
    content = read_bytes(path, most, fix, error)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as failure:
        line = content[: failure.start].count(b"\n") + 1
        raise error(f"{path}:{line}: not UTF-8 ({failure.reason}). {fix}") from None


def read_json(
    path: Path | str,
    shape: Any = dict[str, Any],
    most: int = MAX_BYTES,
    fix: str = "Correct it.",
    error: type[ValueError] = ValueError,
) -> Any:
    """Read a JSON file whose value has a declared shape; see `parse_json` and `read_bytes`."""
    return parse_json(read_bytes(path, most, fix, error), str(path), shape, fix, error)


def parse_json(
    text: bytes | str,
    where: str,
    shape: Any = dict[str, Any],
    fix: str = "Correct it.",
    error: type[ValueError] = ValueError,
) -> Any:
    """Parse a JSON value and check its shape.

    Args:
      text: the value.
      where: what holds it, for the message: a path, or path:line.
      shape: a type such as `dict[str, float]`, a TypedDict or a `msgspec.Struct`; the value is converted to it.
      fix, error: see `read_bytes`.

    >>> parse_json('{"math": 1}', "coefficients.json", dict[str, float])
    {'math': 1.0}
    >>> parse_json('{"math": [1]}', "coefficients.json", dict[str, float])
    Traceback (most recent call last):
    ValueError: coefficients.json: Expected `float`, got `array` - at `$[...]`. Correct it.
    """
    try:
        value = json.loads(text)
        if SURROGATE.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair of surrogates is no text
    except (ValueError, RecursionError) as failure:
        reason = "nested too deep" if isinstance(failure, RecursionError) else failure
        raise error(f"{where} is not JSON ({printable(str(reason))}). {fix}") from None
    return convert(value, where, shape, fix, error)


def convert(value: Any, where: str, shape: Any, fix: str = "Correct it.", error: type[ValueError] = ValueError) -> Any:
    """Return a JSON value as the declared shape; the arguments are those of `parse_json`."""
    try:
        return msgspec.convert(value, shape)
    except (msgspec.ValidationError, RecursionError, OverflowError, UnicodeError) as failure:
        raise error(f"{where}: {printable(str(failure))}. {fix}") from None


def read_kept(path: Path | str, shape: Any, most: int = MAX_KEPT_BYTES) -> Any:
    """Read what an earlier run has left; None where there is nothing, or with a warning where it cannot be read."""
    try:
        return read_json(path, shape, most, fix="The work begins anew.")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        logging.warning("%s", failure)
        return None


def read_json_lines(
    path: Path | str,
    shape: Any = dict[str, Any],
    fix: str = "Correct the line.",
    error: type[ValueError] = ValueError,
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank; see `read_json`. Messages name the line.

    One line is in memory at a time, and has at most `MAX_LINE_BYTES`.
    """
    with os.fdopen(open_regular(path, error), "rb") as lines:
        for number in count(1):
            where = f"{path}:{number}"
            with naming(path):
                line = lines.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise error(f"{where}: a line has at most {MAX_LINE_BYTES} bytes. {fix}")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as failure:
                raise error(f"{where}: not UTF-8 ({failure.reason}). Save it as UTF-8.") from None
            if text.strip():
                yield number, parse_json(text, where, shape, fix, error)


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Escape what a terminal would obey or could not show: control characters, bytes of a name that is not UTF-8.

    >>> printable("layer\x1b[2J, caf\udce9")
    'layer\\x1b[2J, caf\\udce9'
    >>> printable("two\nlines", keep="")
    'two\\nlines'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else ascii(one)[1:-1] for one in text)


def _kind(path: Path | str) -> str:
    """Say what a path is that is no regular file."""
    mode = os.stat(path).st_mode
    kinds = {stat.S_ISDIR: "directory", stat.S_ISFIFO: "pipe", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}
    return next((name for holds, name in kinds.items() if holds(mode)), "special file")
