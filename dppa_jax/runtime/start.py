"""What is set up in a process before it works: a cache of compilations, and how memory is kept."""

import ctypes
import os
import warnings
from pathlib import Path

from absl import logging

from dppa_jax.runtime.files import cache_directory, kept_directory


def keep_compilations() -> None:
    """Keep what JAX compiles between runs: a merge compiles some forty small functions, 3 s of a run of 10 s.

    $JAX_COMPILATION_CACHE_DIR says where, if it is set. Where nothing can be kept, the run goes on without.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        try:
            jax.config.update("jax_compilation_cache_dir", str(_own(_own(cache_directory()) / "xla")))
        except OSError as error:
            logging.warning("compiled functions are not kept: %s", error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # one for each function


def _own(path: Path) -> Path:
    """Make a directory of machine code, and return it; refuse one in which another user could put code to be run."""
    status = kept_directory(path).stat()
    fault = "can be written by others (chmod go-w it)" if status.st_mode & 0o022 else ""
    if status.st_uid != os.geteuid():
        fault = f"belongs to another user (uid {status.st_uid})"
    if fault:
        raise PermissionError(
            f"{path} {fault}, who could put code there that would run as you; $DPPA_JAX_CACHE names another directory "
            f"for what is kept."
        )
    return path


def keep_memory() -> None:
    """Have glibc keep what XLA on a CPU frees: a merge asks for the same arrays again and again, and fresh pages cost.

    mallopt(3): no mmap for large arrays, no trimming, one arena. It saves a quarter of a merge's system time.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)


def leave_memory_to_vllm() -> None:
    """Have JAX take memory of a GPU when it needs it, not most of it at the start."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
