"""Ctrl-C and SIGTERM end a run as an error does, so that what is unfinished is removed."""

import os
import signal
import sys
import threading

PAUSE = 0.1  # seconds until a dropped signal is sent again


def end_on_signals() -> None:
    """SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt, and neither gets lost.

    Python drops an exception that a signal raises within a callback of the garbage collector. JAX has such a callback,
    and a signal that arrives during a long compilation is often delivered there.
    """
    signal.signal(signal.SIGTERM, _exit)
    sys.unraisablehook = _unraisable


def _exit(number: int, _) -> None:
    sys.exit(128 + number)


def _unraisable(dropped) -> None:
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(dropped.exc_type)
    if again is None:
        sys.__unraisablehook__(dropped)
    else:
        threading.Timer(PAUSE, os.kill, (os.getpid(), again)).start()
