"""Read Orbax checkpoints of the stacked tree, by row and only when asked for.

Orbax stores each array in chunks, by the library TensorStore. To read some rows, TensorStore reads the chunks that hold
them. config.json and the tokenizer files lie beside the arrays.
"""

import math
import operator
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
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
from dppa_jax.checkpoint.headers import UnfitError, shown
from dppa_jax.checkpoint.inside import inside
from dppa_jax.checkpoint.promised import drop_tied_heads, quantisation_left_over, without_quantisation
from dppa_jax.checkpoint.safetensors import read_any_config
from dppa_jax.config.run import PREFIX
from dppa_jax.runtime.reading import printable, read_json

TREE = "_METADATA"  # the file in which Orbax lists the names of all arrays
MANIFEST = "manifest.ocdbt"  # this file is there when all arrays share files, which is Orbax's default
CACHE_BYTES = 1 << 26  # for all checkpoints together: a chunk that was read for one row is kept for the next row


@dataclass(frozen=True)
class StackedTensor:
    """A tensor in an Orbax checkpoint: an array, or the slice of a stacked array that belongs to a layer or expert."""

    file: Path  # the checkpoint, for messages
    path: tuple[str, ...]  # of the array in the tree
    index: tuple[int, ...]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Key(msgspec.Struct):
    key: str | int


class _Array(msgspec.Struct):
    key_metadata: list[_Key]


class _Tree(msgspec.Struct):
    """What is read of Orbax's list of arrays."""

    tree_metadata: dict[str, _Array]
    use_zarr3: bool | None = False


class OrbaxDirectory:
    """An open Orbax checkpoint, a `Source` that offers what a SafetensorsDirectory offers.

    Arrays are opened and checked at once, and read by row when asked for.

    Raises:
      CheckpointError: the arrays are damaged, or not those that config.json promises.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        check_name(self.directory)
        said = read_any_config(self.directory)
        self.config = without_quantisation(said)
        with quantisation_left_over(said, self.directory / "config.json"):
            self._arrays = self._open()
        self.specs = tensor_specs(self.config)
        self.tensors = {name: self._tensor(spec) for name, spec in self.specs.items()}
        for head, path in _head_paths(self.config).items():
            if array := self._arrays.get(path):
                dtype = np.dtype(array.dtype.numpy_dtype)
                self.tensors[head] = StackedTensor(self.directory, path, (), dtype, array.shape)
        drop_tied_heads(self, tied_heads(self.config), self.specs)

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
        if tensor.index:
            rows = rows[tensor.index]
        if len(tensor.shape) == 2:
            rows = rows[start:stop]
        with _explained(self.directory, name):
            tensorstore.array(out.reshape(rows.shape)).write(rows).result()

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

    def _open(self) -> dict[tuple[str, ...], Any]:
        """Open the arrays by path, if they are exactly those that config.json promises, in names, dtypes and shapes."""
        expected, copies = stacked_shapes(self.config), set(_head_paths(self.config).values())
        present, zarr3 = _listed(self.directory)
        if missing := [path for path in expected if path not in present]:
            raise UnfitError(
                f"{self.directory}: {len(missing)} arrays are missing, first {'.'.join(missing[0])!r}; is it the tree "
                f"of a model with layers stacked (dppa_jax/checkpoint/README.md), and is config.json that of these "
                f"arrays?"
            )
        if extra := sorted(present - set(expected) - copies):
            raise UnfitError(
                f"{self.directory} has {len(extra)} arrays that a model of this config.json does not have, first "
                f"{shown('.'.join(extra[0]))!r}; save the weights alone, and check attention_bias, mlp_bias and "
                f"tie_word_embeddings."
            )
        arrays = {path: _opened(self.directory, path, zarr3) for path in (*expected, *(present - set(expected)))}
        for path, shape in expected.items():
            if arrays[path].shape != shape:
                raise UnfitError(
                    f"{self.directory}: {'.'.join(path)} has shape {arrays[path].shape}, config.json says "
                    f"{shape}; config.json does not belong to these arrays."
                )
        _check_chunks(self.directory, arrays)
        return arrays

    def _tensor(self, spec: TensorSpec) -> StackedTensor:
        """Return where a tensor is among the arrays."""
        dtype = np.dtype(self._arrays[spec.path].dtype.numpy_dtype)
        return StackedTensor(self.directory, spec.path, spec.index, dtype, spec.shape)


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


def _head_paths(config: Mapping) -> dict[str, tuple[str, ...]]:
    """Return the paths of heads that are the embeddings by their names; some checkpoints have them, as copies."""
    return {head: tuple(head.removesuffix(".weight").split(".")) for head in tied_heads(config)}


def _listed(directory: Path) -> tuple[set[tuple[str, ...]], bool]:
    """Return the paths of the arrays that Orbax lists, and whether they are in the third version of zarr's format.

    Raises:
      CheckpointError: the list is damaged, or a file of the checkpoint leads outside.
    """
    _check_files(directory)
    fix = "It is not as Orbax writes it; copy it again."
    tree = read_json(inside(directory, TREE), _Tree, fix=fix, error=CheckpointError)
    paths = {tuple(str(key.key) for key in array.key_metadata) for array in tree.tree_metadata.values()}
    return paths, bool(tree.use_zarr3)


def _check_files(directory: Path) -> None:
    """Refuse links that lead outside, and what is neither file nor directory: TensorStore would open them."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                mode = inside(directory, str(path.relative_to(directory))).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CheckpointError(f"{path} is neither a file nor a directory; put the file there.")


def _opened(directory: Path, path: tuple[str, ...], zarr3: bool) -> Any:
    """Open an array with TensorStore.

    Raises:
      UnfitError: it has another dtype than weights can have.
      CheckpointError: it is damaged.
    """
    import tensorstore  # takes 0.2 s, which a run without such a checkpoint saves

    name = ".".join(path)
    with _explained(directory, name):
        array = tensorstore.open(_store(directory, name, zarr3), context=_context(), open=True, read=True).result()
    if array.dtype.numpy_dtype not in DTYPE_BY_NAME.values():
        raise UnfitError(
            f"{directory}: {name} is stored as {array.dtype.name}; weights must be {', '.join(DTYPE_BY_NAME)}."
        )
    return array


def _check_chunks(directory: Path, arrays: Mapping[tuple[str, ...], Any]) -> None:
    """Refuse chunks larger than their array, which would fill the memory; warn of chunks of several layers."""
    slow = {}
    for path, array in arrays.items():
        chunk = array.chunk_layout.read_chunk.shape
        if any(map(operator.gt, chunk, array.shape)):
            raise CheckpointError(
                f"{directory}: {'.'.join(path)} has the shape {array.shape} and chunks of {chunk}; copy it again."
            )
        if len(chunk) == 3 and chunk[0] > 1:
            slow[".".join(path)] = chunk[0]
    for name, layers in [*slow.items()][:1]:
        logging.warning(
            "%s: a chunk of %s has %d layers, and all of them are read to get one; --job=convert --base=%s%s "
            "--output=%sDIR makes a checkpoint of smaller chunks",
            *(directory, name, layers, PREFIX, directory, PREFIX),
        )


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


@contextmanager
def _explained(directory: Path, name: str) -> Iterator[None]:
    """Turn errors of TensorStore into ours, which name the array and the fix."""
    try:
        yield
    except (ValueError, NotImplementedError, IndexError, KeyError) as error:
        reason = str(error).split(" [")[0]
        raise CheckpointError(
            f"{directory}: {name} cannot be read: {printable(reason)}. Copy the checkpoint again."
        ) from error
