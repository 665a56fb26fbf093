"""What marks a directory as unfinished, and what is put right when a run was killed while its outputs got their names.

An unfinished directory carries a mark, a small file. Only a directory with such a mark is emptied, taken over or
removed. A run may have several outputs (a merge and its deltas): they get their names one after another, the main one
last. A mark stays in each until all have their names, so that the next start can tell how far a killed run got. Then
`settle` either takes back what has its name already (the main output had not yet its own), or finishes what was left.

A directory that is replaced changes its name with the new one in a single step, where the file system can do that.
Elsewhere it takes three renames, and `settle` undoes them if a run is killed between two of them.
"""

import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

import msgspec
from absl import logging

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.runtime.directories import BusyError, lock_directory, open_directory
from dppa_jax.runtime.reading import read_json

MARK = ".dppa_jax.json"  # in every directory that is not finished
NOTES = "*.jsonl"  # journals, which lie beside the mark
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Mark(msgspec.Struct):
    """What an unfinished directory says of itself.

    Attributes:
      inode: of the directory; a copy of a mark in another directory says nothing.
      identity: names what decides the content; a run goes on only where its own identity stands.
      outputs: all outputs of the run as URIs, the main one last; empty until they get their names.
      old: the inode of the directory that this one replaces; 0 where there is none.
    """

    inode: int
    identity: str = ""
    outputs: list[str] = []
    old: int = 0


def aside_of(directory: Path) -> Path:
    """Return where a directory is written before it gets its name."""
    return directory.with_name(directory.name + ".incomplete")


def settle(directory: Path) -> None:
    """Put right what a run left that was killed while its outputs got their names.

    If the main output has its name, what is left to do is done: old directories and marks are removed. If not, this
    directory becomes an unfinished one again, from which the same command goes on.

    Raises:
      CheckpointError: a run is giving the outputs their names now.
    """
    if not _moving(directory) and read_mark(directory) is None:
        return
    held = []
    try:
        for place in (directory, aside_of(directory)):
            if place.is_dir() and not place.is_symlink():
                held.append(lock_directory(open_directory(place, CheckpointError), place))
        put_right(directory)
    except BusyError:
        raise CheckpointError(
            f"{directory} is being written by another run; wait, or choose another --output."
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def put_right(directory: Path) -> None:
    """Do what `settle` promises, for a run that holds the locks."""
    aside = aside_of(directory)
    _end_renames(directory)
    mark = read_mark(directory)
    if mark is None or not mark.outputs:
        return
    main = from_uri(mark.outputs[-1])
    if main == directory or read_mark(main) is not None:
        finish(main)
        logging.info("%s is complete: a run that was killed at its very end had made it", main)
    elif mark.old and inode(aside) == mark.old:
        exchange(aside, directory)
    else:
        os.rename(directory, aside)


def finish(main: Path) -> None:
    """Remove what the outputs of a run have replaced, and then their marks and journals, the main one's last."""
    named = read_mark(main).outputs
    for place in map(from_uri, named):
        _end_renames(place)
        mark = read_mark(place)
        if mark is None or mark.outputs != named:
            continue
        if mark.old and inode(aside_of(place)) == mark.old:
            shutil.rmtree(aside_of(place), ignore_errors=True)
        for notes in place.glob(NOTES):
            notes.unlink(missing_ok=True)
        (place / MARK).unlink(missing_ok=True)


def exchange(new: Path, old: Path) -> None:
    """Let two directories of one parent change their names, in one step where the file system can."""
    try:
        _exchange_at_once(new, old)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        place = _moving_name(old, inode(old))
        os.rename(old, place)
        os.rename(new, old)
        os.rename(place, new)


def _exchange_at_once(new: Path, old: Path) -> None:
    """Call renameat2(RENAME_EXCHANGE) of Linux; there is no such call elsewhere."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, "no renameat2") from None
    if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new), None, str(old))


def _moving_name(directory: Path, inode: int) -> Path:
    """Return the name that a directory has between two of the three renames, where there is no exchange at once."""
    return directory.with_name(f"{directory.name}.moving-{inode}")


def _moving(directory: Path) -> list[Path]:
    """Return the directories that a killed run left between two renames; the name says their inode."""
    if not directory.parent.is_dir():
        return []
    found = (place for place in directory.parent.iterdir() if place.name.startswith(f"{directory.name}.moving-"))
    return [place for place in found if place == _moving_name(directory, inode(place))]


def _end_renames(directory: Path) -> None:
    """Give what was left between two renames the name that is free: its old one, or that of the new directory."""
    aside = aside_of(directory)
    for moving in _moving(directory):
        if directory.exists():
            os.rename(moving, aside)
        elif read_mark(moving) is None:
            os.rename(moving, directory)
        else:  # a new one that was being taken back
            os.rename(aside, directory)
            os.rename(moving, aside)


def read_mark(directory: Path) -> Mark | None:
    """Return the mark of an unfinished directory; None where there is none, or where it is another directory's."""
    try:
        mark = read_json(directory / MARK, Mark)
    except (OSError, ValueError):
        return None
    return mark if mark.inode == inode(directory) else None


def uri(path: Path) -> str:
    """Return a path as text that JSON can hold, although its name need not be UTF-8."""
    return path.as_uri()


def from_uri(text: str) -> Path:
    """Return the path that `uri` turned into text."""
    return Path(os.fsdecode(unquote_to_bytes(text.removeprefix("file://"))))


def inode(path: Path) -> int:
    """Return the inode of a directory; 0 where there is none, or a link."""
    try:
        status = os.lstat(path)
        return status.st_ino if stat.S_ISDIR(status.st_mode) else 0
    except OSError:
        return 0
