"""Directories that the program makes for itself: taken by one run at a time, never through a link or from another user.

Whoever can write into a shared directory can put a link, or a directory of their own, where the program is about to
make one. What the program would then empty or fill is not its own. So a place that is taken over must be a directory,
not a link, and must belong to the user who runs the program.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path


class BusyError(ValueError):
    """Another run holds the lock on a directory."""


def claim_directory(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Make a directory, or take over one that is the user's own, and lock it against other runs; see `own_directory`.

    Returns:
      The descriptor that holds the lock. The lock ends when it is closed, or with the process. A file system without
      locks gives none; then only the user keeps two runs apart.

    Raises:
      BusyError: another run has locked the directory.
      ValueError: it is a link or a file, or belongs to another user; of the class `error`.
      OSError: it cannot be made; names the directory.
    """
    return lock_directory(own_directory(path, error), path)


def own_directory(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Make a directory, or open one that is the user's own, and return the descriptor.

    The parent must be there. Nothing in the directory is touched.

    Raises:
      ValueError: it is a link or a file, or belongs to another user; of the class `error`.
      OSError: it cannot be made; names the directory.
    """
    try:
        os.mkdir(path)
    except FileExistsError:
        return open_own_directory(path, error)
    return open_directory(path, error)


def open_own_directory(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Open a directory that is the user's own, and no link, and return the descriptor; errors as `own_directory`."""
    descriptor = open_directory(path, error)
    if os.fstat(descriptor).st_uid != os.geteuid():
        owner = os.fstat(descriptor).st_uid
        os.close(descriptor)
        raise error(
            f"{path} belongs to another user (uid {owner}), so it is not taken over; remove it, or choose another name."
        )
    return descriptor


def lock_directory(descriptor: int, path: Path | str) -> int:
    """Lock an open directory against other runs; return its descriptor, which is closed where the lock is taken.

    Raises:
      BusyError: another run has locked the directory.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BusyError(f"{path} is in use by another run; wait for it, or end it.") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def empty_directory(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Claim a directory as `claim_directory` does, and remove what is in it; return the descriptor that holds the lock.

    The name must be one that nobody else gives, as what a killed run left there cannot be told from other things.
    """
    descriptor = claim_directory(path, error)
    remove_content(descriptor)
    return descriptor


@contextmanager
def scratch_directory(path: Path, error: type[ValueError] = ValueError) -> Iterator[Path]:
    """Yield an empty directory that is this run's alone, and remove it at the end; see `empty_directory`."""
    descriptor = empty_directory(path, error)
    try:
        yield path
    finally:
        remove_content(descriptor)
        with suppress(OSError):
            os.rmdir(path)
        os.close(descriptor)


def remove_content(descriptor: int, but: Iterable[str] = ()) -> None:
    """Remove what is in an open directory, but for names and patterns that stay; links are removed, not followed."""
    with os.scandir(descriptor) as found:
        entries = [entry for entry in found if not any(fnmatch(entry.name, pattern) for pattern in but)]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.name, dir_fd=descriptor)
        else:
            os.unlink(entry.name, dir_fd=descriptor)


def open_directory(path: Path | str, error: type[ValueError] = ValueError) -> int:
    """Open a directory that is not a link, and return the descriptor.

    Raises:
      ValueError: it is a link or a file; of the class `error`.
      OSError: it is not there, or may not be read.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as failure:
        if failure.errno in (errno.ELOOP, errno.ENOTDIR):
            what = f"a link to {os.readlink(path)}" if os.path.islink(path) else "a file"
            raise error(f"{path} is {what} in place of a directory; remove it, or choose another name.") from None
        raise


def existing_place(path: Path) -> Path:
    """Return the nearest place, at a path or above it, where something is; a link that leads nowhere counts."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def still_there(path: Path | str, descriptor: int) -> bool:
    """Return whether a path is still the directory that was opened, and not one that was put in its place."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
