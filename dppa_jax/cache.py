"""Where things are kept between runs, and short names for what they were made from."""

import hashlib
import json
import os
from pathlib import Path


def cache_directory() -> Path:
    """$DPPA_JAX_CACHE, or ~/.cache/dppa_jax: compiled functions and the demo family."""
    return Path(os.environ.get("DPPA_JAX_CACHE") or Path.home() / ".cache" / "dppa_jax")


def digest(content) -> str:
    """Of something that JSON can say, the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sources_digest(folder: Path, *patterns: str) -> str:
    """Of the files of code that make something, so that other code does not take it for its own."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a file aside and rename it, so that a crash leaves the old one or the new one."""
    aside = file.with_name(f"{file.name}.incomplete")
    aside.write_text(text)
    aside.replace(file)
