"""Reading the golden files: see the README beside them for what they hold."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from dppa_jax.checkpoint import SafetensorsDirectory

__all__ = ["arrays", "facts", "masks", "sha256", "zero_base"]

SHORT = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
LONG = {"fp32": "float32", "bf16": "bfloat16"}


def facts(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text()) if not path.exists() else json.loads(path.read_text())


def arrays(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


def masks(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """True where kept."""
    return {
        name: np.unpackbits(bits)[: np.prod(shapes[name])].reshape(shapes[name]).astype(bool)
        for name, bits in load_file(path).items()
    }


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def model(golden: Path, family: str, name: str) -> SafetensorsDirectory:
    return SafetensorsDirectory(golden / "family" / family / name)
