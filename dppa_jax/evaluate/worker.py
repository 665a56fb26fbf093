"""A child process that answers JSON lines, for work that may crash or hang, or needs another interpreter.

The child reads one request in each line of its stdin, and answers each with one line on its stdout. It writes all else
to its stderr, and ends when its stdin ends. During long work it writes lines {"working": ...} before the answer, which
show that it lives.
"""

import json
import os
import selectors
import signal
import subprocess
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dppa_jax.evaluate.groups import kill_group
from dppa_jax.runtime.files import open_to_append
from dppa_jax.runtime.reading import convert, parse_json

MOST_BYTES = 500_000_000  # of a line that the child writes
LOG_LINES = 15  # of the child's stderr that an error shows


class WorkerError(ChildProcessError):
    """The child died, took too long, or answered no JSON; the message ends with the last lines that it wrote."""


class Worker:
    """A child process in a process group of its own. It starts at once.

    It ends with this object and with this interpreter. It also ends when this process is killed, as then its stdin
    ends.

    Args:
      command: the program and its arguments.
      log: the file to which the child's stderr is appended.
      env: the child's environment; None copies that of this process.

    Raises:
      WorkerError: the program cannot be started.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None):
        self.command = [str(part) for part in command]
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_to_append(self.log), "ab") as errors:
            self._log_start = errors.tell()
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=None if env is None else dict(env),
                    start_new_session=True,
                    bufsize=0,
                )
            except OSError as error:
                raise WorkerError(f"{self.command[0]} cannot be started: {error.strerror or error}.") from error
        self._end = weakref.finalize(self, _end, self._process, 0.0)  # also runs when the interpreter exits
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._unread = b""

    @property
    def pid(self) -> int:
        """The id of the child, and of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._end.alive and self._process.poll() is None

    def ask(self, message: Mapping, timeout: float, shape: Any = dict[str, Any]) -> Any:
        """Send a message to the child and return its answer.

        Args:
          message: anything that JSON can hold.
          timeout: seconds for the child to take the message, and from one of its lines to the next.
          shape: of the answer, see `reading.parse_json`.

        Raises:
          WorkerError: there is no answer. The child and all processes that it started have been killed.
        """
        if not self._end.alive:
            raise WorkerError(f"{self.command[0]} has ended; its log is {self.log}.")
        try:
            line = self._exchange(json.dumps(message).encode() + b"\n", time.monotonic() + timeout)
            while "working" in (answer := parse_json(line, "the line", fix="")):
                line = self._exchange(b"", time.monotonic() + timeout)
            return convert(answer, "the line", shape, fix="")
        except TimeoutError:
            raise self._failure(f"did not answer within {timeout:g} s") from None
        except (EOFError, BrokenPipeError):
            raise self._failure("ended") from None
        except ValueError as error:
            raise self._failure(f"answered {line[:100]!r}, no JSON object as expected ({str(error).strip()})") from None
        except BaseException:  # e.g. an interrupt: the answer still to come would pass for that of the next message
            self._end()
            raise

    def close(self, grace: float = 2.0) -> None:
        """End the child: close its stdin, and kill what still runs `grace` seconds later."""
        if self._end.detach():
            _end(self._process, grace)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _exchange(self, message: bytes, deadline: float) -> bytes:
        """Write a message and read a line, both at once: a child may answer before it has read everything."""
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        unsent = memoryview(message)
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            if unsent:
                ready.register(stdin, selectors.EVENT_WRITE)
            while unsent or b"\n" not in self._unread:
                events = ready.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError
                for key, _ in events:
                    if key.fd == stdin:
                        unsent = unsent[os.write(stdin, unsent[:65536]) :]
                        if not unsent:
                            ready.unregister(stdin)
                    elif len(self._unread) > MOST_BYTES:
                        raise ValueError(f"a line of more than {MOST_BYTES} bytes")
                    elif chunk := os.read(stdout, 1 << 20):
                        self._unread += chunk
                    else:
                        raise EOFError
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failure(self, what: str) -> WorkerError:
        """Kill the child, and return the error that says what happened and shows the child's last lines."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5 if what == "ended" else 0)
        code = self._process.poll()
        self._end()
        if what == "ended" and code is not None:
            what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.last_lines() or ["(nothing)"]
        return WorkerError("\n  ".join([f"{self.command[0]} {what}. The last lines of {self.log}:", *lines]))

    def last_lines(self, count: int = LOG_LINES) -> list[str]:
        """Return the last lines that the child wrote to its log."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return [line.decode(errors="replace").rstrip() for line in deque(log, count)]


def _end(process: subprocess.Popen, grace: float) -> None:
    """Close a child's stdin, wait, and kill what is left of its process group, grandchildren included."""
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        if grace:
            process.wait(grace)
    kill_group(process.pid)
    process.wait()
    process.stdout.close()
