"""Progress of long work: a bar in a terminal, one line per stage in a log."""

import json
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dppa_jax.runtime import processes, signals


def console() -> Console:
    """For tables: as wide as the terminal, or wide enough for all of them when there is none.

    Of several processes the first one prints.
    """
    if processes.index():
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=150)


def write_json(path: Path, content: Any) -> None:
    """Write what a table shows, for programs, and tell where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    console().print(f"as JSON: {path}")


class Stage:
    """One stage of a job, measured in bytes read."""

    def __init__(self, name: str, total: int, bar: Progress | None):
        self.name, self.total, self._bar = name, total, bar
        self._offset = None
        self._task = bar.add_task(name, total=total) if bar else None

    def start_at(self, done: int) -> "Stage":
        """Bytes the stream had read before this stage."""
        self._offset = done
        return self

    def advance(self, done: int) -> None:
        """Report the bytes that the stream has read so far; ends the run where a signal asked for it."""
        signals.check()
        if self._bar:
            self._bar.update(self._task, completed=min(done - (self._offset or 0), self.total))


@contextmanager
def stage(name: str, total: int, already: int = 0, quiet: bool = False):
    """Progress of a stage that will read `total` bytes; its time and rate go to the log when it ends."""
    started = time.perf_counter()
    if sys.stderr.isatty() and not quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
            yield Stage(name, total, bar).start_at(already)
    else:
        yield Stage(name, total, None).start_at(already)
    seconds = time.perf_counter() - started
    if not quiet:
        logging.info("%s: %.1f s, %.2f GB, %.2f GB/s", name, seconds, total / 1e9, total / 1e9 / max(seconds, 1e-9))


TELL_SECONDS = 60  # between lines of a log that shows no bar
_shown: list[Progress] = []  # the bars on the screen, of which there can be one set: steps within steps join it


@contextmanager
def steps(name: str, total: int | None, unit: str = "models"):
    """Progress of equal steps, `total` if it is known; yields the function that reports one of them, or several.

    Within other steps only the bar is shown, else the time goes to the log, too.
    """
    started, taken, within = time.perf_counter(), 0, bool(_shown)
    told = started
    with ExitStack() as stack:
        if not within:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
            _shown.append(stack.enter_context(bars))
            stack.callback(_shown.clear)
        task = _shown[-1].add_task(name, total=total)
        stack.callback(_shown[-1].remove_task, task)

        def advance(done: int = 1) -> None:
            nonlocal taken, told
            signals.check()
            taken += done
            _shown[-1].advance(task, done)
            if time.perf_counter() > told + TELL_SECONDS and not sys.stderr.isatty():
                told = time.perf_counter()
                of = f" of {total}" if total else ""
                logging.info("%s: %d%s %s in %.0f s", name, taken, of, unit, told - started)

        yield advance
    if not within:
        logging.info("%s: %d %s in %.1f s", name, taken, unit, time.perf_counter() - started)
