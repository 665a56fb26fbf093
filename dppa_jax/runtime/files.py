"""Files that outlive a run: the cache directory, hashes of what something was made from, and whole writes."""

import hashlib
import json
import os
import secrets
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

PACKAGE = Path(__file__).parent.parent


def cache_directory() -> Path:
    """Return the directory of compiled functions and the demo family.

    It is $DPPA_JAX_CACHE where that is set, else `dppa_jax` in the user's cache directory: $XDG_CACHE_HOME or ~/.cache
    on Linux.
    """
    return Path(os.environ.get("DPPA_JAX_CACHE") or user_cache_path("dppa_jax", appauthor=False))


def kept_directory(path: Path) -> Path:
    """Make a directory of files that are kept between runs, and return it.

    Raises:
      OSError: files cannot be written there; the message says how to choose another place.
    """
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; $DPPA_JAX_CACHE names another directory for what is kept.") from None
    return path


def digest(content) -> str:
    """Hash anything that JSON can hold; the hash is the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sources_digest(*patterns: str) -> str:
    """Hash the source files that make something, so that a release with other code does not reuse it.

    Args:
      patterns: paths below this package, such as "delta/*.py".

    Raises:
      FileNotFoundError: a pattern matches no file, for instance because the file was moved. A pattern that matches
        nothing would be hashed as nothing, and changes of that code would go unnoticed.
    """
    files = set()
    for pattern in patterns:
        if not (matched := set(PACKAGE.glob(pattern))):
            raise FileNotFoundError(
                f"sources_digest: {pattern!r} matches no file in {PACKAGE}; give the file's new place to the caller."
            )
        files |= matched
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def open_to_append(file: Path) -> int:
    """Open a file to append to it, made if it is missing, and return the descriptor; never through a link.

    Raises:
      OSError: it is a link, a pipe without a reader, or cannot be written; names the file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(file, flags, 0o666)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it: a crash leaves the old file or the new one, never a part.

    A link at the file's place is replaced, not followed. What UTF-8 cannot say, such as a path that is not UTF-8, is
    written as an escape.
    """
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as out:
            out.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
        os.replace(aside, file)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
