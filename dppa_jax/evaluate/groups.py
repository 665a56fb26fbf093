"""Kill process groups. This file uses the standard library only: the child of vLLM runs it in its own interpreter."""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CLEANUP_SECONDS = 5.0  # for killed processes to end, and for their shared memory to be removed


def kill_group(group: int) -> None:
    """Kill a process group that this process is not in, wait for its end, and let its shared memory be removed."""
    _wait_for_the_end(group, kill_members(group))
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    _wait_for_the_end(group, _members(group))


def kill_members(group: int) -> list[int]:
    """Kill the processes of a group, but not this one and not multiprocessing's resource trackers.

    A tracker ends by itself when the processes that it served have ended; before, it removes their shared memory.

    Returns:
      The ids of the trackers.
    """
    members = _members(group)
    trackers = [pid for pid in members if b"resource_tracker" in _read(Path(f"/proc/{pid}/cmdline"))]
    for pid in set(members) - {*trackers, os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return trackers


def _members(group: int) -> list[int]:
    """Return the ids of a group's processes."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _group_of(path) == group]


def _wait_for_the_end(group: int, members: Sequence[int]) -> None:
    """Wait for killed processes to end and free their memory, but no longer than CLEANUP_SECONDS."""
    deadline = time.monotonic() + CLEANUP_SECONDS
    while time.monotonic() < deadline and any(_group_of(Path(f"/proc/{pid}")) == group for pid in members):
        time.sleep(0.02)


def _group_of(process: Path) -> int | None:
    """Return the group of a process, given its directory in /proc; None if the process has ended."""
    state, _, group = _read(process / "stat").rpartition(b")")[2].split()[:3] or (b"Z", b"", b"")
    return None if state == b"Z" else int(group)


def _read(path: Path) -> bytes:
    """Return the content of a file; nothing if the file has gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
