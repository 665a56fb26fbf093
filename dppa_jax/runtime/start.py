"""What is set up in a process before it works: a cache of compilations, and how memory is kept."""

import ctypes
import os

from dppa_jax.runtime.files import cache_directory


def keep_compilations() -> None:
    """Keep what JAX compiles between runs: a merge compiles some forty small functions, 3 s of a run of 10 s.

    $JAX_COMPILATION_CACHE_DIR says where, if it is set.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
