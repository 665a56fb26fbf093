"""Memory: what a device has, and what this process has taken at most."""

import re
import resource
import sys
from pathlib import Path

import jax
import numpy as np
import psutil
from rich.filesize import decimal


def device_memory(stated: int = 0) -> tuple[int, str]:
    """Return the memory of one local device in bytes, and its platform ("cpu", "gpu", "tpu").

    On a CPU, the devices share half of the memory that is free.

    Args:
      stated: bytes to return in place of what the device says (--device_memory); 0 asks the device.
    """
    device = jax.local_devices()[0]
    if stated:
        return stated, device.platform
    if device.platform == "cpu":
        return psutil.virtual_memory().available // 2 // jax.local_device_count(), "cpu"
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 16 * 10**9), device.platform


def peak_resident() -> int:
    """Return the peak memory of this process since it began, in bytes.

    Linux says it in /proc/self/status. Its `getrusage` would also count what the parent process held.
    """
    try:
        status = Path("/proc/self/status").read_bytes()
        return int(re.search(rb"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_text(count: float) -> str:
    """Say a number of bytes in the unit that suits it.

    >>> size_text(13_476_831_232), size_text(1_650_000)
    ('13.48 GB', '1.65 MB')
    """
    return decimal(int(count), precision=2)


def aligned(size: int, alignment: int) -> np.ndarray:
    """Allocate bytes that start at a multiple of `alignment`."""
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]
