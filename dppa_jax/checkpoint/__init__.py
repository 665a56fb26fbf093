"""Checkpoints: where models come from and go to."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dppa_jax.architecture.specs import (
    CheckpointError,
    TensorSpec,
    check_config,
    first_linear,
    tensor_specs,
    with_dtype,
)
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import SafetensorsDirectory, read_config
from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter
from dppa_jax.config.run import MAX_SHARD_SIZE

__all__ = [
    "MAX_SHARD_SIZE",
    "Checkpoint",
    "CheckpointError",
    "OrbaxDirectory",
    "SafetensorsDirectory",
    "SafetensorsWriter",
    "TensorSpec",
    "is_orbax",
    "read_config",
    "save_tree",
    "tensor_specs",
    "tree_tensor",
]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Checkpoint = SafetensorsDirectory | OrbaxDirectory


def save_tree(
    directory: str | Path,
    tree: Mapping,
    config: Mapping,
    tokenizer_from: str | Path | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a tree as a Hugging Face directory, in the dtypes it has, under its final name only when complete.

    `texts` are further small files by name.
    """
    check_config(config, "config")
    specs = tensor_specs(config)
    arrays = {name: tree_tensor(tree, spec) for name, spec in specs.items()}
    tensors = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    dtype = arrays[first_linear(specs).name].dtype.name
    with SafetensorsWriter(directory, tensors, max_shard_size, overwrite) as writer:
        for name, array in arrays.items():
            writer.write_rows(name, 0, array)
        writer.commit(with_dtype(config, dtype), Path(tokenizer_from) if tokenizer_from else None, texts)


def tree_tensor(tree: Mapping, spec: TensorSpec) -> np.ndarray:
    """The tensor of a spec in a tree, a view where the tree's arrays are numpy's."""
    node = tree
    for part in spec.path:
        if part not in node:
            raise CheckpointError(f"the tree has no {'.'.join(spec.path)}, which config says the model has.")
        node = node[part]
    array = np.asarray(node if spec.layer is None else node[spec.layer])
    if array.shape != spec.shape:
        raise CheckpointError(f"the tree's {spec.name} has shape {array.shape}, config says {spec.shape}.")
    if array.dtype not in DTYPES.values():
        raise CheckpointError(f"the tree's {spec.name} is {array.dtype}; weights must be {', '.join(DTYPES)}.")
    return array
