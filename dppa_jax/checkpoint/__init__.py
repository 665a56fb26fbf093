"""Checkpoints: where models come from and go to."""

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dppa_jax.checkpoint.names import LINEARS, CheckpointError, TensorSpec, tensor_specs
from dppa_jax.checkpoint.safetensors_dir import COPIED, SafetensorsDirectory, SafetensorsWriter

__all__ = [
    "LINEARS",
    "CheckpointError",
    "SafetensorsDirectory",
    "SafetensorsWriter",
    "TensorSpec",
    "load_tree",
    "locate",
    "save_tree",
    "tensor_specs",
]

MAX_SHARD_SIZE = 2_000_000_000
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def locate(where: str | Path, seed: int = 0, weights: bool = True) -> Path:
    """The directory of a model given as a directory, `demo:NAME` or a hub id; fetches or builds it when needed.

    With weights=False only the small files of a hub id are fetched: enough for a plan.
    """
    text = str(where)
    if text.startswith("demo:"):
        from dppa_jax import demo

        return demo.directory(text.removeprefix("demo:"), seed)
    if Path(text).expanduser().exists():
        return Path(text).expanduser()
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
        raise CheckpointError(
            f"{text}: no such directory, and fetching it from the hub failed: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def load_tree(where: str | Path, seed: int = 0) -> tuple[dict, dict]:
    """config.json and the tree of numpy arrays, decoder layers stacked; see the README for the tree."""
    source = SafetensorsDirectory(locate(where, seed))
    tree: dict = {}
    for spec in source.specs.values():
        *parents, leaf = spec.path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if spec.layer is None:
            node[leaf] = source.read(spec.name)
            continue
        if leaf not in node:
            node[leaf] = np.empty((source.config["num_hidden_layers"], *spec.shape), source.tensors[spec.name].dtype)
        source.read_rows(spec.name, 0, spec.rows, node[leaf][spec.layer])
    source.close()
    return source.config, tree


def tree_tensor(tree: Mapping, spec: TensorSpec) -> np.ndarray:
    """The tensor of a spec in a tree."""
    node = tree
    for part in spec.path:
        node = node[part]
    return node if spec.layer is None else node[spec.layer]


def save_tree(
    directory: str | Path,
    tree: Mapping,
    config: Mapping,
    tokenizer_from: str | Path | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a tree as a Hugging Face directory, in the dtypes it has, under its final name only when complete."""
    specs = tensor_specs(config)
    arrays = {name: np.asarray(tree_tensor(tree, spec)) for name, spec in specs.items()}
    writer = SafetensorsWriter(directory, {n: (a.shape, a.dtype) for n, a in arrays.items()}, max_shard_size)
    try:
        for name, array in arrays.items():
            writer.write_rows(name, 0, array)
        dtype = arrays["model.embed_tokens.weight"].dtype.name
        writer.commit({**config, "torch_dtype": dtype}, Path(tokenizer_from) if tokenizer_from else None)
    except BaseException:
        writer.abort()
        raise
