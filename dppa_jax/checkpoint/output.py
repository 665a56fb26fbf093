"""Output directories: written under a name that ends in .incomplete, and renamed when they are complete."""

import fcntl
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dppa_jax.architecture.specs import CheckpointError


def output_directory(directory: Path | str, overwrite: bool = False) -> Path:
    """Return the absolute path of a directory to write, and refuse it where writing would destroy something.

    Raises:
      CheckpointError: it is a mount point, a file, or not empty; with `overwrite`, a model may be replaced.
    """
    path = Path(directory).expanduser().resolve()
    if path.is_mount():
        raise CheckpointError(f"{directory} is a mount point, which cannot be replaced; give a directory inside it.")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{directory} is a file; choose another name for the output directory.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{directory} is not empty; choose another --output, or --overwrite to replace it.")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{directory} is not empty and holds no model (no config.json), so --overwrite does not replace it; "
                f"choose another --output."
            )
    return path


def check_space(sizes: Mapping[Path, int]) -> None:
    """Refuse outputs that together do not fit on their disks.

    Args:
      sizes: bytes by directory. What an earlier run has left in a directory counts as already there.

    Raises:
      OSError: a disk has too little room.
    """
    needed: dict[int, int] = {}
    for directory, nbytes in sizes.items():
        existing = next(place for place in (directory, *directory.parents) if place.exists())
        disk = existing.stat().st_dev
        needed[disk] = needed.get(disk, 0) + max(0, nbytes - _taken(aside_of(directory)))
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise OSError(
                f"{existing} has {free / 1e9:.2f} GB free, the output needs {needed[disk] / 1e9:.2f} GB. Make room, or "
                f"write to another disk."
            )


def aside_of(directory: Path) -> Path:
    """Return where a directory is written before it gets its name."""
    return directory.with_name(directory.name + ".incomplete")


def _taken(aside: Path) -> int:
    """Return the bytes on the disk that an earlier run left in a directory; a new run continues or removes them."""
    return sum(path.stat().st_blocks * 512 for path in aside.iterdir()) if aside.is_dir() else 0


def claim(aside: Path) -> int:
    """Make the directory, or take over what a killed run left, and lock it against other runs.

    Returns:
      The descriptor that holds the lock. The lock ends when it is closed, or with the process.

    Raises:
      CheckpointError: another run is writing there.
    """
    aside.mkdir(exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"{aside} is being written by another run; wait, or choose another --output.") from None
    except OSError:
        pass  # a file system without locks
    return lock


def swap(new: Path, directory: Path) -> None:
    """Rename `new` to `directory`. A directory that is there moves aside, and is deleted when the new one is in place.

    If the renaming fails, the old directory gets its name back.
    """
    old = directory.with_name(directory.name + ".replaced")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(directory, old)
    try:
        os.replace(new, directory)
    except BaseException:
        if old.exists():
            os.replace(old, directory)
        raise
    with suppress(OSError):  # not every file system can sync a directory
        sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of files, to the disk, where it survives a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
