"""Reading the golden files: see the README beside them for what they hold."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}  # the words of the files' names
EXPERTS = ("expert0", "expert1", "expert2")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def load_masks(path: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """True where kept, in the shapes of the tensors `like`."""
    return {
        name: np.unpackbits(bits)[: like[name].size].reshape(like[name].shape).astype(bool)
        for name, bits in load_file(path).items()
    }


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
