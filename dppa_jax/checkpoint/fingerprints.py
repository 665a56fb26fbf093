"""Hashes of a checkpoint: a quick one from samples of its files, and an exact one from every byte."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.inside import inside
from dppa_jax.runtime.reading import naming, read_bytes

PAGE = 4096  # bytes
PAGES = 64  # sampled of each file


def fingerprint(config: Mapping, files: Mapping[str, Path]) -> str:
    """Hash a checkpoint's config, and the name, the size and 64 evenly spread pages of each of its files.

    Args:
      config: the content of config.json.
      files: by the name under which each counts.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, file in files.items():
        with naming(file), file.open("rb", buffering=0) as content:
            size = os.fstat(content.fileno()).st_size
            digest.update(f"{name} {size}".encode())
            for position in np.linspace(0, max(size - PAGE, 0), PAGES).astype(int):
                digest.update(os.pread(content.fileno(), PAGE, int(position)))
    return digest.hexdigest()


def content_digest(directory: Path, config: Mapping, files: Mapping[str, Path]) -> str:
    """Hash a checkpoint's config, its generation config and every byte of its files: about a second for each GB."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    generation = "generation_config.json"
    if (directory / generation).exists():
        digest.update(read_bytes(inside(directory, generation), error=CheckpointError))
    for file in files.values():
        stat = file.stat()
        digest.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@cache  # a report opens its models once for every seed
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """Hash a file; `size` and `modified` tell the cache that the file has changed."""
    with naming(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
