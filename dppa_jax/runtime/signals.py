"""Ctrl-C and SIGTERM end a run like an error: `finally` and `with` blocks run, and unfinished files are removed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 0.1  # seconds until a dropped signal is sent again

_received: list[BaseException] = []
_deferring = False


def end_on_signals() -> None:
    """Let SIGTERM raise SystemExit and SIGINT raise KeyboardInterrupt, and let neither get lost.

    Python drops an exception that is raised within a callback of the garbage collector. JAX has such a callback, and a
    signal that arrives during a long compilation is often handled there. So a signal is remembered until `check` is
    called next, and a signal that Python reports as dropped is sent again.
    """
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.unraisablehook = _unraisable


def check() -> None:
    """Raise the exception of a signal that came earlier but did not end the run. Long loops call this at every step."""
    if _received:
        raise _received[0]


def stop(error: BaseException) -> None:
    """Make the next call of `check` raise this error."""
    _received[:] = _received or [error]


@contextmanager
def defer_signals() -> Iterator[None]:
    """Within the block, only note signals; raise at its end. A file that the block makes thus gets its final name."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    check()


def _end(number: int, _) -> None:
    """Handle a signal: remember its exception, and raise it unless signals are deferred."""
    _received[:] = [KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)]
    if not _deferring:
        raise _received[0]


def _unraisable(dropped) -> None:
    """Send a signal again whose exception Python has dropped."""
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(dropped.exc_type)
    if again is None:
        sys.__unraisablehook__(dropped)
    else:
        threading.Timer(PAUSE, os.kill, (os.getpid(), again)).start()
