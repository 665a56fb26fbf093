"""Ctrl-C and SIGTERM end a run as an error does, so that what is unfinished is removed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 0.1  # seconds until a dropped signal is sent again

_received: list[BaseException] = []
_holding = False


def end_on_signals() -> None:
    """SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt, and neither gets lost.

    Python drops an exception that a signal raises within a callback of the garbage collector. JAX has such a callback,
    and a signal that arrives during a long compilation is often delivered there. So a signal is remembered until
    `check` is next called, and one that Python reports as dropped is sent again.
    """
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.unraisablehook = _unraisable


def check() -> None:
    """End the run if a signal came and its exception did not get this far."""
    if _received:
        raise _received[0]


def stop(error: BaseException) -> None:
    """End the run with this error when `check` is next called."""
    _received[:] = _received or [error]


@contextmanager
def held() -> Iterator[None]:
    """A signal ends the run after the block and not within it, so that what the block makes gets its name."""
    global _holding
    _holding = True
    try:
        yield
    finally:
        _holding = False
    check()


def _end(number: int, _) -> None:
    _received[:] = [KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)]
    if not _holding:
        raise _received[0]


def _unraisable(dropped) -> None:
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(dropped.exc_type)
    if again is None:
        sys.__unraisablehook__(dropped)
    else:
        threading.Timer(PAUSE, os.kill, (os.getpid(), again)).start()
