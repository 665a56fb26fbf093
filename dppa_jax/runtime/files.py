"""Where things are kept between runs, and short names for what they were made from."""

import hashlib
import json
import os
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def cache_directory() -> Path:
    """$DPPA_JAX_CACHE, or ~/.cache/dppa_jax: compiled functions and the demo family."""
    return Path(os.environ.get("DPPA_JAX_CACHE") or Path.home() / ".cache" / "dppa_jax")


def digest(content) -> str:
    """Of something that JSON can say, the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sources_digest(*patterns: str) -> str:
    """Hash the files of code that make something, so that other code does not take it for its own.

    Args:
      patterns: paths below this package, such as "delta/*.py".

    Raises:
      FileNotFoundError: a pattern matches no file, as after a move; what it names would silently not count.
    """
    files = set()
    for pattern in patterns:
        if not (matched := set(PACKAGE.glob(pattern))):
            raise FileNotFoundError(f"sources_digest: no file in {PACKAGE} matches {pattern!r}")
        files |= matched
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a file aside and rename it, so that a crash leaves the old one or the new one."""
    aside = file.with_name(f"{file.name}.incomplete")
    aside.write_text(text)
    aside.replace(file)
