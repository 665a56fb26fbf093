"""Read Orbax checkpoints of the stacked tree, by row and only when asked for.

Orbax stores each array in chunks, by the library TensorStore. To read some rows, TensorStore reads the chunks that hold
them. config.json and the tokenizer files lie beside the arrays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.specs import (
    CheckpointError,
    TensorSpec,
    by_path,
    first_linear,
    stacked_shape,
    tensor_specs,
    tied_heads,
)
from dppa_jax.checkpoint.dtypes import DTYPE_BY_NAME
from dppa_jax.checkpoint.fingerprints import content_digest, fingerprint
from dppa_jax.checkpoint.safetensors import read_config, read_json
from dppa_jax.config.run import PREFIX

TREE = "_METADATA"  # the file in which Orbax lists the names of all arrays
MANIFEST = "manifest.ocdbt"  # this file is there when all arrays share files, which is Orbax's default
CACHE_BYTES = 1 << 26  # for all checkpoints together: a chunk that was read for one row is kept for the next row


@dataclass(frozen=True)
class StackedTensor:
    """A tensor in an Orbax checkpoint: an array, or the slice of a stacked array that belongs to one layer."""

    file: Path  # the checkpoint, for messages
    path: tuple[str, ...]  # of the array in the tree
    layer: int | None
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class OrbaxDirectory:
    """An open Orbax checkpoint, a `Source` that offers what a SafetensorsDirectory offers.

    Arrays are opened and checked at once, and read by row when asked for.

    Raises:
      CheckpointError: the arrays are damaged, or not those that config.json promises.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        check_name(self.directory)
        self.config = read_config(self.directory)
        self._arrays = _open_arrays(self.directory)
        self._check()
        self.specs = tensor_specs(self.config)
        self.tensors = {name: self._tensor(spec) for name, spec in self.specs.items()}

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the linears; norms may have another."""
        return self.tensors[first_linear(self.specs).name].dtype

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype.

        A vector counts as one row.

        Raises:
          CheckpointError: a chunk is missing or damaged.
        """
        import tensorstore

        tensor = self.tensors[name]
        rows = self._arrays[tensor.path]
        if tensor.layer is not None:
            rows = rows[tensor.layer]
        if len(tensor.shape) == 2:
            rows = rows[start:stop]
        try:
            tensorstore.array(out.reshape(rows.shape)).write(rows).result()
        except ValueError as error:
            raise _damaged(self.directory, name, error) from error

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, out.shape[0], out)
        return out

    def files(self) -> dict[str, Path]:
        """Return the files of the arrays by their paths in the checkpoint."""
        return _files(self.directory)

    def fingerprint(self) -> str:
        """Hash the config, and names, sizes and 64 pages of every file of the arrays: quick, but not exact."""
        return fingerprint(self.config, _files(self.directory))

    def content_digest(self) -> str:
        """Hash the config, the generation config and every byte of the arrays' files: about a second for each GB."""
        return content_digest(self.directory, self.config, _files(self.directory))

    def close(self) -> None:
        """Close the arrays. They cannot be read afterwards."""
        self._arrays.clear()

    def _check(self) -> None:
        """Refuse a checkpoint whose arrays are not exactly those that config.json promises, in names and shapes."""
        expected = stacked_shapes(self.config)
        copies = {tuple(name.removesuffix(".weight").split(".")) for name in tied_heads(self.config)}
        present = set(self._arrays) - copies
        if missing := [path for path in expected if path not in present]:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} arrays are missing, first {'.'.join(missing[0])!r}; is it the tree "
                f"of a model with layers stacked (dppa_jax/checkpoint/README.md), and is config.json that of these "
                f"arrays?"
            )
        if extra := sorted(present - set(expected)):
            raise CheckpointError(
                f"{self.directory} has {len(extra)} arrays that a model of this config.json does not have, first "
                f"{'.'.join(extra[0])!r}; save the weights alone, and check attention_bias, mlp_bias and "
                f"tie_word_embeddings."
            )
        for path, shape in expected.items():
            if self._arrays[path].shape != shape:
                raise CheckpointError(
                    f"{self.directory}: {'.'.join(path)} has shape {self._arrays[path].shape}, config.json says "
                    f"{shape}; config.json does not belong to these arrays."
                )
        if slow := [path for path in expected if len(expected[path]) == 3 and self._layers_of_chunk(path) > 1]:
            logging.warning(
                "%s: a chunk of %s has %d layers, and all of them are read to get one; --job=convert --base=%s%s "
                "--output=%sDIR makes a checkpoint of smaller chunks",
                *(self.directory, ".".join(slow[0]), self._layers_of_chunk(slow[0]), PREFIX, self.directory, PREFIX),
            )

    def _layers_of_chunk(self, path: tuple[str, ...]) -> int:
        """Return how many layers a chunk of a stacked array holds."""
        return self._arrays[path].chunk_layout.read_chunk.shape[0]

    def _tensor(self, spec: TensorSpec) -> StackedTensor:
        """Return where a tensor is among the arrays."""
        dtype = np.dtype(self._arrays[spec.path].dtype.numpy_dtype)
        return StackedTensor(self.directory, spec.path, spec.layer, dtype, spec.shape)


def is_orbax(directory: Path | str) -> bool:
    """Return whether a directory is an Orbax checkpoint of a tree."""
    return (Path(directory) / TREE).is_file()


def check_name(directory: Path) -> None:
    """Refuse a place that TensorStore cannot be told."""
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{directory}: TensorStore takes only paths that are UTF-8; rename it.") from None


def stacked_shapes(config: Mapping) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shapes of the tree's arrays by their paths; layers are stacked: (layers, out, in)."""
    return {path: stacked_shape(group) for path, group in by_path(tensor_specs(config).values()).items()}


def _open_arrays(directory: Path) -> dict[tuple[str, ...], Any]:
    """Open every array of the tree with TensorStore; return them by path."""
    import tensorstore  # takes 0.2 s, which a run without such a checkpoint saves

    tree = read_json(directory / TREE)
    arrays = {}
    try:
        for entry in tree["tree_metadata"].values():
            path = tuple(str(part["key"]) for part in entry["key_metadata"])
            spec = _store(directory, ".".join(path), bool(tree.get("use_zarr3")))
            arrays[path] = tensorstore.open(spec, context=_context(), open=True, read=True).result()
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / TREE} is not as Orbax writes it ({error!r}); copy it again.") from error
    except ValueError as error:
        raise _damaged(directory, ".".join(path), error) from error
    for path, array in arrays.items():
        if array.dtype.numpy_dtype not in DTYPE_BY_NAME.values():
            raise CheckpointError(
                f"{directory}: {'.'.join(path)} is stored as {array.dtype.name}; weights must be "
                f"{', '.join(DTYPE_BY_NAME)}."
            )
    return arrays


def _store(directory: Path, name: str, zarr3: bool) -> dict:
    """Tell TensorStore where an array is. A chunk that is missing is an error; by default it would be zeros."""
    root = {"driver": "file", "path": f"{directory.resolve()}/"}
    if (directory / MANIFEST).is_file():
        place = {"driver": "ocdbt", "base": root, "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{root['path']}{name}/"}
    driver = "zarr3" if zarr3 else "zarr"
    return {"driver": driver, "kvstore": place, "fill_missing_data_reads": False, "recheck_cached_data": "open"}


@cache
def _context() -> Any:
    """Make TensorStore's threads and cache, which all checkpoints share."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _files(directory: Path) -> dict[str, Path]:
    """Return the files of the arrays by their paths in the checkpoint."""
    files = [path for folder in directory.iterdir() if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    files += [path for name in (TREE, MANIFEST) if (path := directory / name).is_file()]
    return {str(path.relative_to(directory)): path for path in sorted(files)}


def _damaged(directory: Path, name: str, error: ValueError) -> CheckpointError:
    """Turn TensorStore's error into ours, which names the array and the fix."""
    reason = str(error).split(" [")[0]
    return CheckpointError(f"{directory}: {name} cannot be read: {reason}. Copy the checkpoint again.")
