"""When an unfinished output is taken up again: only by a run of the same inputs, options and code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from absl import logging

from dppa_jax.checkpoint import Checkpoint, SafetensorsWriter
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import digest
from dppa_jax.runtime.journal import Journal


def common_identity(content) -> str:
    """Name a run by what decides its output: one that was ended is taken up only by one of the same identity.

    Several processes have one between them, and each may have copies of the inputs of its own.
    """
    return digest(processes.exchange("identity", digest(content)))


def input_identity(model: Checkpoint) -> tuple[str, list[tuple[str, int, int]]]:
    """Return the fingerprint, and names, sizes and times of change of the files."""
    found = ((path, path.stat()) for path in sorted(model.directory.rglob("*")) if path.is_file())
    files = [(str(path.relative_to(model.directory)), stat.st_size, stat.st_mtime_ns) for path, stat in found]
    return model.fingerprint(), files


@contextmanager
def journal_of(writers: Sequence[SafetensorsWriter], identity: str) -> Iterator[Journal]:
    """Open the journal of what is written into these directories; it lies in the first."""
    flush = lambda: [writer.flush() for writer in writers]  # noqa: E731
    journal = Journal(writers[0].journal if identity else None, all(writer.resumed for writer in writers), flush)
    if journal.resumed:
        logging.info("goes on after %d steps that an earlier run has done; --resume=false starts anew", journal.resumed)
    try:
        yield journal
    finally:
        journal.close()
