"""Progress of long work, a bar in a terminal or lines in a log; and the console for tables."""

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
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from dppa_jax.runtime import processes, signals
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.memory import size_text
from dppa_jax.runtime.reading import printable

LINE_SECONDS = 60  # between two lines of a log that shows no bar
_shown: list[Progress] = []  # the bars on the screen; rich allows one set of them, which nested steps join


class PlainConsole(Console):
    """A console that shows every text as it is: names of experts and tensors come from outside, and may hold anything.

    Nothing is parsed as markup or emoji, and control characters are escaped.
    """

    def __init__(self, **how: Any):
        super().__init__(markup=False, emoji=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """Make a text for the terminal; all that is printed, and all cells of tables, come through here."""
        return super().render_str(printable(text), **how)


def console() -> Console:
    """Return the console on which tables are printed. Of several processes only process 0 prints.

    It is as wide as the terminal; without a terminal it is wide enough for every table.
    """
    if processes.index():
        return PlainConsole(quiet=True)
    return PlainConsole() if sys.stdout.isatty() else PlainConsole(width=150)


def write_json(path: Path, content: Any) -> None:
    """Write the content of a table as JSON, for programs, and print where the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
    console().print(f"as JSON: {path}")


def _bars(*columns: ProgressColumn) -> Progress:
    """Return bars on stderr, with these columns between the bar and the time; they are not shown without a terminal."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=PlainConsole(stderr=True), transient=True, disable=not sys.stderr.isatty())


class Stage:
    """The progress of one stage of a job, measured in bytes read."""

    def __init__(self, name: str, total: int, bar: Progress | None):
        self.name, self.total, self._bar = name, total, bar
        self._offset = None
        self._task = bar.add_task(printable(name), total=total) if bar else None

    def start_at(self, done: int) -> "Stage":
        """Count from here: `done` is what the stream had read before this stage, in bytes."""
        self._offset = done
        return self

    def advance(self, done: int) -> None:
        """Report how many bytes the stream has read so far. Ends the run if a signal asked for it."""
        signals.check()
        if self._bar:
            self._bar.update(self._task, completed=min(done - (self._offset or 0), self.total))


@contextmanager
def stage(name: str, total: int, already: int = 0, quiet: bool = False):
    """Show the progress of a stage that will read `total` bytes; log its time and rate when it ends.

    Args:
      name: of the stage, for the bar and the log.
      total: bytes that the stage will read.
      already: bytes that the stream has read before.
      quiet: show and log nothing.

    Yields:
      The `Stage`, whose `advance` reports progress.
    """
    started = time.perf_counter()
    if sys.stderr.isatty() and not quiet:
        with _bars(DownloadColumn(), TransferSpeedColumn()) as bar:
            yield Stage(name, total, bar).start_at(already)
    else:
        yield Stage(name, total, None).start_at(already)
    seconds = time.perf_counter() - started
    if not quiet:
        logging.info("%s: %.1f s, %s, %s/s", name, seconds, size_text(total), size_text(total / max(seconds, 1e-9)))


@contextmanager
def steps(name: str, total: int | None, unit: str = "models"):
    """Show the progress of equal steps. Within other steps only a bar is shown; otherwise the time is logged, too.

    Args:
      name: of the work, for the bar and the log.
      total: how many steps there will be; None when that is not known.
      unit: what a step is, in the plural.

    Yields:
      The function that reports one step, or several.
    """
    started, taken, nested = time.perf_counter(), 0, bool(_shown)
    last_line = started
    with ExitStack() as stack:
        if not nested:
            _shown.append(stack.enter_context(_bars(MofNCompleteColumn())))
            stack.callback(_shown.clear)
        task = _shown[-1].add_task(printable(name), total=total)
        stack.callback(_shown[-1].remove_task, task)

        def advance(done: int = 1) -> None:
            nonlocal taken, last_line
            signals.check()
            taken += done
            _shown[-1].advance(task, done)
            if time.perf_counter() > last_line + LINE_SECONDS and not sys.stderr.isatty():
                last_line = time.perf_counter()
                of_total = f" of {total}" if total else ""
                logging.info("%s: %d%s %s in %.0f s", name, taken, of_total, unit, last_line - started)

        yield advance
    if not nested:
        logging.info("%s: %d %s in %.1f s", name, taken, unit, time.perf_counter() - started)
