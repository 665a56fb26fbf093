"""When an unfinished output is taken up again: only by a run of the same inputs, options and code."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from absl import logging

from dppa_jax.checkpoint import Checkpoint, CheckpointError, SafetensorsWriter
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.journal import Journal


def common_identity(content) -> str:
    """Name a run by what decides its output: one that was ended is taken up only by one of the same identity.

    Several processes have one between them, and each may have copies of the inputs of its own.
    """
    return digest(processes.exchange("identity", digest(content)))


def input_identity(model: Checkpoint) -> list:
    """Return the fingerprint of a model and the state of its files, as JSON can say them."""
    return [model.fingerprint(), files_of(model)]


def files_of(model: Checkpoint) -> dict[str, list[int]]:
    """Return inode, size, and times of writing and of change of every file of a model's weights, by name."""
    stats = {name: file.stat() for name, file in _paths(model).items()}
    return {name: [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


def _paths(model: Checkpoint) -> dict[str, Path]:
    """Return the files that decide what a model is, by name."""
    config = {"config.json": model.directory / "config.json"} if model.config else {}
    return config | model.files()


@contextmanager
def unchanged(models: Mapping[str, Checkpoint]) -> Iterator[Callable[[], None]]:
    """Yield a function that raises CheckpointError if a file of a model is not what it was when the block began.

    A merge whose input was written to meanwhile is part old and part new.
    """
    before = {name: files_of(model) for name, model in models.items()}

    def check() -> None:
        for name, model in models.items():
            for file, state in files_of(model).items():
                if state != before[name][file]:
                    raise CheckpointError(
                        f"{_paths(model)[file]} of {name!r} was written to or replaced during the run, so that the "
                        f"output would be part old, part new; it is removed. Run again when the file is complete."
                    )

    yield check


@contextmanager
def journal_of(writers: Sequence[SafetensorsWriter], identity: str) -> Iterator[Journal]:
    """Open the journal of what is written into these directories; it lies in the first."""
    journal = Journal(writers[0].journal if identity else None, all(writer.resumed for writer in writers))
    if journal.resumed:
        logging.info("goes on after %d steps that an earlier run has done; --resume=false starts anew", journal.resumed)
    try:
        yield journal
    finally:
        journal.close()
