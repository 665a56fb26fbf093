"""A child process that answers JSON lines: what may crash, hang or need another interpreter is kept out of ours.

The child reads one request per line from its stdin, answers each with one line on its stdout, writes everything else
to its stderr, and ends when its stdin does. During long work it shows that it lives by lines {"working": ...} before
the answer. Standard library only.
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

LOG_LINES = 15  # of its stderr, in an error
CLEANUP_SECONDS = 5.0  # for killed processes to end, and for what they shared to be removed


class WorkerError(ChildProcessError):
    """The child died, took too long or answered nonsense; the message ends with the last lines that it wrote."""


class Worker:
    """A child process in a process group of its own, started at once.

    It ends with this object, with this interpreter, and, because its stdin ends then, also when this process is
    killed.

    Args:
      command: its program and arguments.
      log: the file its stderr is appended to.
      env: its environment; None for a copy of this process's.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None):
        self.command = [str(part) for part in command]
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as errors:
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
        self._end = weakref.finalize(self, _end, self._process, 0.0)  # runs at exit, too
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._unread = b""

    @property
    def pid(self) -> int:
        """Of the child, and of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def ask(self, message: Mapping, timeout: float) -> dict:
        """The child's answer to a message.

        Args:
          message: anything that JSON can hold.
          timeout: in seconds, for the message to be taken, and from one line of the child to the next.

        Raises:
          WorkerError: there is no answer; the child and all that it started have been killed.
        """
        if not self._end.alive:
            raise WorkerError(f"{self.command[0]} has ended.")
        try:
            line = self._exchange(json.dumps(message).encode() + b"\n", time.monotonic() + timeout)
            while "working" in (answer := _parsed(line)):
                line = self._exchange(b"", time.monotonic() + timeout)
        except TimeoutError:
            raise self._failure(f"did not answer within {timeout:g} s") from None
        except (EOFError, BrokenPipeError):
            raise self._failure("ended") from None
        except ValueError:
            raise self._failure(f"answered {line[:100]!r}, which is no JSON object") from None
        except BaseException:  # an interrupt leaves an answer behind that belongs to no later message
            self._end()
            raise
        return answer

    def close(self, grace: float = 2.0) -> None:
        """End the child: its stdin ends, and what still runs `grace` seconds later is killed."""
        if self._end.detach():
            _end(self._process, grace)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _exchange(self, message: bytes, deadline: float) -> bytes:
        """Both pipes at once: a child that answers before it has read everything blocks nobody."""
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        left = memoryview(message)
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            if left:
                ready.register(stdin, selectors.EVENT_WRITE)
            while left or b"\n" not in self._unread:
                events = ready.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError
                for key, _ in events:
                    if key.fd == stdin:
                        left = left[os.write(stdin, left[:65536]) :]
                        if not left:
                            ready.unregister(stdin)
                    elif chunk := os.read(stdout, 1 << 20):
                        self._unread += chunk
                    else:
                        raise EOFError
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failure(self, what: str) -> WorkerError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5 if what == "ended" else 0)
        code = self._process.poll()
        self._end()
        if what == "ended" and code is not None:
            what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.last_lines() or ["(nothing)"]
        return WorkerError("\n  ".join([f"{self.command[0]} {what}. The last lines of {self.log}:", *lines]))

    def last_lines(self, count: int = LOG_LINES) -> list[str]:
        """What the child wrote last."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return [line.decode(errors="replace").rstrip() for line in deque(log, count)]


def _parsed(line: bytes) -> dict:
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError
    return answer


def _end(process: subprocess.Popen, grace: float) -> None:
    """Close its stdin, wait, and kill what is left of its process group, grandchildren included."""
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        if grace:
            process.wait(grace)
    kill_group(process.pid)
    process.wait()
    process.stdout.close()


def kill_group(group: int) -> None:
    """Kill a process group of others, shared memory that they would leave behind included, and wait for its end."""
    _wait_for_the_end(group, kill_members(group))
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    _wait_for_the_end(group, _members(group))


def kill_members(group: int) -> list[int]:
    """Kill a group but for this process and for multiprocessing's resource trackers, which are returned.

    A tracker ends by itself when the processes it served have ended, and removes their shared memory before.
    """
    members = _members(group)
    trackers = [pid for pid in members if b"resource_tracker" in _read(Path(f"/proc/{pid}/cmdline"))]
    for pid in set(members) - {*trackers, os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return trackers


def _members(group: int) -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _group_of(path) == group]


def _wait_for_the_end(group: int, members: Sequence[int]) -> None:
    """A killed process ends, and frees its memory, some time after the signal: wait for it, but not for ever."""
    until = time.monotonic() + CLEANUP_SECONDS
    while time.monotonic() < until and any(_group_of(Path(f"/proc/{pid}")) == group for pid in members):
        time.sleep(0.02)


def _group_of(process: Path) -> int | None:
    """The process group of a directory in /proc; None of a process that has ended."""
    state, _, group = _read(process / "stat").rpartition(b")")[2].split()[:3] or (b"Z", b"", b"")
    return None if state == b"Z" else int(group)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
