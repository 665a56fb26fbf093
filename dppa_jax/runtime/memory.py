"""TODO."""

import re
import resource
import sys
from pathlib import Path

import jax
import numpy as np
import psutil


def device_memory(given: int = 0) -> tuple[int, str]:
    """Bytes of one local device, and the platform; a CPU's devices share half of what is free."""
    device = jax.local_devices()[0]
    if given:
        return given, device.platform
    if device.platform == "cpu":
        return psutil.virtual_memory().available // 2 // jax.local_device_count(), "cpu"
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 16 * 10**9), device.platform


def peak_resident() -> int:
    """Most bytes of memory that this process has held since it began.

    Linux's getrusage counts what the process that started it held as well.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def aligned(size: int, alignment: int) -> np.ndarray:
    """Allocate bytes that start at a multiple of `alignment`."""
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]
