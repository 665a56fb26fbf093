"""Output directories: written under a name that ends in .incomplete, and given their names when they are complete."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from absl import logging

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.unfinished import (
    MARK,
    NOTES,
    Mark,
    aside_of,
    exchange,
    finish,
    inode,
    put_right,
    read_mark,
    settle,
    uri,
)
from dppa_jax.runtime import signals
from dppa_jax.runtime.directories import (
    BusyError,
    claim_directory,
    existing_place,
    open_own_directory,
    remove_content,
    still_there,
)
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.reading import read_json

SHARDS = ("*.safetensors", "*.safetensors.incomplete")  # what a run goes on from, beside its journals
MODEL_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "_METADATA")  # what a model holds beside its config


class TakenError(CheckpointError):
    """Something else stands where a finished output should go; what was written is kept."""


def output_directory(directory: Path | str, overwrite: bool = False) -> Path:
    """Return the absolute path of a directory to write, and refuse it where writing would destroy something.

    What a run that was killed left half done is put right first, see `settle`.

    Raises:
      CheckpointError: it is a mount point, a file, or not empty (with `overwrite`, a model may be replaced); its parent
        may not be written to; or OUTPUT.incomplete, where it is written first, is not ours.
    """
    path = Path(os.path.realpath(os.path.expanduser(directory)))  # Path.resolve raises RuntimeError where a link loops
    if path.is_mount():
        raise CheckpointError(f"{directory} is a mount point, which cannot be replaced; give a directory inside it.")
    _refuse_locked_parent(path)
    settle(path)
    _refuse_taken(path, overwrite)
    _refuse_foreign(aside_of(path))
    return path


def check_space(sizes: Mapping[Path, int], needs: str = "the output needs", fix: str = "write to another disk") -> None:
    """Refuse outputs, or what will be fetched, that together do not fit on their disks.

    Args:
      sizes: bytes by directory. What an earlier run has left in a directory counts as already there.
      needs: subject and verb of the message.
      fix: what helps where room cannot be made.

    Raises:
      OSError: a disk has too little room.
    """
    needed: dict[int, int] = {}
    places = {directory: existing_place(directory) for directory in sizes}
    for directory, nbytes in sizes.items():
        disk = places[directory].stat().st_dev
        needed[disk] = needed.get(disk, 0) + max(0, nbytes - _taken(aside_of(directory)))
    for existing in places.values():
        free, wanted = shutil.disk_usage(existing).free, needed[existing.stat().st_dev]
        if wanted > free:
            raise OSError(
                f"{existing} has {free / 1e9:.2f} GB free, {needs} {wanted / 1e9:.2f} GB. Make room, or {fix}."
            )


class Unfinished:
    """A directory under its unfinished name, locked against other runs.

    What an earlier run left there stays if it has the same identity; else it is removed.

    Args:
      directory: the final name, as `output_directory` returned it.
      identity: names what decides the content; without one, nothing is taken over.

    Attributes:
      path: the unfinished directory.
      resumed: whether the content is that of an earlier run with this identity.

    Raises:
      CheckpointError: another run is writing there, or what is there is not ours.
    """

    def __init__(self, directory: Path, identity: str = ""):
        self.directory, self.path, self._identity = directory, aside_of(directory), identity
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock: int | None = claim_directory(self.path, CheckpointError)
        except BusyError:
            raise CheckpointError(
                f"{self.path} is being written by another run; wait, or choose another --output."
            ) from None
        try:
            _refuse_unmarked(self.path)
            mark = read_mark(self.path)
            self.resumed = bool(identity) and mark is not None and mark.identity == identity
            remove_content(self._lock, but=(MARK, NOTES, *SHARDS) if self.resumed else (MARK,))
            self.mark()
        except BaseException:
            os.close(self._lock)
            raise

    def mark(self, outputs: Sequence[str] = (), old: int = 0) -> None:
        """Write the mark, anew."""
        file, mark = self.path / MARK, Mark(os.fstat(self._lock).st_ino, self._identity, list(outputs), old)
        if not file.exists():
            file.touch()  # a run that is killed here leaves no other file without a mark
        write_whole(file, msgspec.json.encode(mark))

    def unmoved(self) -> bool:
        """Return whether the directory is still the one that was claimed, under its unfinished name."""
        return self._lock is not None and still_there(self.path, self._lock)

    def remove(self) -> None:
        """Remove the directory, unless it has its final name or another one stands in its place; end the lock."""
        if self.unmoved():
            with suppress(OSError):
                remove_content(self._lock, but=(MARK,))
                (self.path / MARK).unlink()  # last: killed before it, a run leaves nothing without a mark
                self.path.rmdir()
        self.close()

    def close(self) -> None:
        """End the lock. A later run may go on from what is there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def publish(outputs: Sequence[Unfinished], overwrite: bool = False) -> None:
    """Give all outputs of a run their final names, the main one last.

    Killed at any point, each output is whole under one of its two names, and the same command goes on.

    Raises:
      TakenError: something else has come to stand at a final name.
      CheckpointError: an unfinished directory was moved away or replaced.
      OSError: a rename fails.
    """
    with signals.defer_signals():
        for output in outputs:
            if not output.unmoved():
                raise CheckpointError(f"{output.path} was moved or replaced during the run; repeat the command.")
            try:
                _refuse_taken(output.directory, overwrite)
            except TakenError as error:
                raise _taken_error(output.directory) from error
            sync(output.path)
        names = [uri(output.directory) for output in outputs]
        replaced = {output: inode(output.directory) for output in outputs}
        for output in outputs:
            output.mark(names, replaced[output])
        try:
            for output in outputs:
                if replaced[output]:
                    exchange(output.path, output.directory)
                else:
                    os.rename(output.path, output.directory)
                with suppress(OSError):  # not every file system can sync a directory
                    sync(output.directory.parent)
        except OSError as error:
            for one in outputs:
                with suppress(OSError):
                    put_right(one.directory)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _taken_error(output.directory) from error
            raise
        try:
            finish(outputs[-1].directory)
        except OSError as error:
            logging.warning(
                "%s is complete, but not yet tidied: %s; the next run there does it", outputs[-1].directory, error
            )
        for output in outputs:
            output.close()


def _refuse_taken(path: Path, overwrite: bool) -> None:
    """Refuse a final name at which something stands that may not be replaced."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise TakenError(f"{path} is a file; choose another name for the output directory.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise TakenError(f"{path} is not empty; choose another --output, or --overwrite to replace it.")
    if not _is_model(path):
        raise TakenError(
            f"{path} is not empty and holds no model (config.json of a model and its weights), so --overwrite does not "
            f"replace it; choose another --output."
        )


def _is_model(path: Path) -> bool:
    """Return whether a directory holds a model or an adapter: its config says so, and there are weights."""
    name = "config.json" if os.path.lexists(path / "config.json") else "adapter_config.json"
    try:
        config = read_json(path / name)
    except (OSError, ValueError):
        return False
    named = any(key in config for key in ("architectures", "model_type", "peft_type"))
    return named and any(any(path.glob(pattern)) for pattern in MODEL_FILES)


def _taken_error(path: Path) -> TakenError:
    return TakenError(
        f"{path} came to stand there during the run, so the finished output is kept in {aside_of(path)}. Move {path} "
        f"away and repeat the command."
    )


def _refuse_locked_parent(path: Path) -> None:
    """Refuse an output beside which nothing can be written."""
    parent = existing_place(path.parent)
    if not parent.is_dir():
        raise CheckpointError(f"{path}: {parent} is no directory; choose another name for the output directory.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path}: the output is written beside its name first, and {parent} may not be written to. Give a "
            f"directory inside {path if path.is_dir() else 'one of your own'}, or change the permissions of {parent}."
        )


def _refuse_foreign(aside: Path) -> None:
    """Refuse an unfinished name at which something stands that this program did not leave there."""
    if os.path.lexists(aside):
        os.close(open_own_directory(aside, CheckpointError))
        _refuse_unmarked(aside)


def _refuse_unmarked(aside: Path) -> None:
    """Refuse an unfinished directory that holds files but no mark of this program."""
    if any(aside.iterdir()) and not (aside / MARK).is_file():
        raise CheckpointError(
            f"{aside} holds files that no unfinished run has left there (no {MARK} in it), so it is not emptied; move "
            f"it away, or choose another --output."
        )


def _taken(aside: Path) -> int:
    """Return the bytes on the disk that an earlier run left in a directory; a new run continues or removes them.

    Of several processes, one may be writing there while another one looks, so a file may go in between.
    """
    taken = 0
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(aside) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                taken += entry.stat(follow_symlinks=False).st_blocks * 512
    return taken


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of files, to the disk, where it survives a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
