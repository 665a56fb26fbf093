"""Checkpoints: where models come from and go to."""

import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np

from dppa_jax.architecture.specs import (
    LINEARS,
    CheckpointError,
    TensorSpec,
    check_config,
    tensor_specs,
    tree_of,
    with_dtype,
)
from dppa_jax.checkpoint.orbax import OrbaxDirectory, is_orbax
from dppa_jax.checkpoint.safetensors import COPIED, SafetensorsDirectory, read_config
from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter
from dppa_jax.config.run import MAX_SHARD_SIZE, PREFIX

__all__ = [
    "LINEARS",
    "MAX_SHARD_SIZE",
    "Checkpoint",
    "CheckpointError",
    "OrbaxDirectory",
    "SafetensorsDirectory",
    "SafetensorsWriter",
    "TensorSpec",
    "is_orbax",
    "load_tree",
    "locate",
    "open_checkpoint",
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


def open_checkpoint(where: str | Path, seed: int = 0, weights: bool = True) -> Checkpoint:
    """A model given as `locate` takes it, open to be read lazily."""
    directory = locate(where, seed, weights)
    return OrbaxDirectory(directory) if is_orbax(directory) else SafetensorsDirectory(directory)


def locate(where: str | Path, seed: int = 0, weights: bool = True) -> Path:
    """The directory of a model given as a directory, `orbax:DIR`, `demo:NAME` or a hub id.

    It is fetched or built when needed. With weights=False only the small files of a hub id are: enough for a plan.
    """
    text = str(where)
    if text.startswith("demo:"):
        from dppa_jax import demo

        return demo.directory(text.removeprefix("demo:"), seed)
    path = Path(text.removeprefix(PREFIX)).expanduser()
    if path.is_dir() and text.startswith(PREFIX) and not is_orbax(path):
        raise CheckpointError(
            f"{text}: {path} is not an Orbax checkpoint of a tree; --job=convert --base=WHERE --output={PREFIX}DIR "
            f"makes one. A Hugging Face directory is given without {PREFIX}, and of a CheckpointManager's directory "
            f"the item of a step: {PREFIX}DIR/STEP/default."
        )
    if path.is_dir():
        return path
    if text.startswith(PREFIX):
        raise CheckpointError(f"{text}: no such directory: {path}.")
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the directory that holds it and config.json.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith((".", "/")):
        return _from_hub(text, weights)
    raise CheckpointError(f"{text}: no such directory, and not of the form owner/name of a hub id.")


def _from_hub(text: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = text.partition("@")
    wanted = ["config.json", "*.index.json", "README.md", *COPIED]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted + ["*.safetensors"] * bool(weights)
            )
        )
    except Exception as error:  # the hub raises many kinds: no network, no such repository, gated, not logged in
        said = (str(error).strip() or "no message").splitlines()[0]
        raise CheckpointError(
            f"{text}: no such directory, and fetching it from the hub failed: {type(error).__name__}: {said} Check the "
            f"name, the network and, for a gated model, HF_TOKEN; or download it elsewhere and give its directory."
        ) from error


def load_tree(where: str | Path, seed: int = 0) -> tuple[dict, dict]:
    """config.json and the tree of numpy arrays, decoder layers stacked; see the README for the tree.

    An array has its tensors' dtype, and float32 where the layers' differ.
    """
    from dppa_jax.checkpoint.stacked import StoredArray  # which needs this package

    with closing(open_checkpoint(where, seed)) as source:
        return source.config, tree_of(source.specs.values(), lambda group: StoredArray(source, group).read())


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
    dtype = arrays["model.layers.0.self_attn.q_proj.weight"].dtype.name
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
