"""Where things are kept between runs: compiled functions and the demo family."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$DPPA_JAX_CACHE, or ~/.cache/dppa_jax."""
    return Path(os.environ.get("DPPA_JAX_CACHE") or Path.home() / ".cache" / "dppa_jax")
