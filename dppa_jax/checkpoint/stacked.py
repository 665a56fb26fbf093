"""The stacked tree of a model, read from a checkpoint and written as one.

A checkpoint has one tensor for each layer; the tree has one array for all layers (dppa_jax/model/README.md shows it).
A process reads only the slices of an array that its devices hold.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dppa_jax.architecture.specs import (
    CheckpointError,
    TensorSpec,
    check_config,
    first_linear,
    stacked_shape,
    tensor_specs,
    tree_of,
    with_dtype,
)
from dppa_jax.checkpoint.dtypes import DTYPE_BY_NAME, common_dtype
from dppa_jax.checkpoint.laid_out import laid_out_writer
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.run import MAX_SHARD_SIZE

BUFFER_BYTES = 1 << 26  # for whole rows, when only some of their columns or another dtype are wanted


class StoredArray:
    """An array of the tree in a checkpoint: one tensor, or that of all layers (or of all their experts) stacked.

    Indexing it with one slice for each axis reads these elements. Its dtype is that of the tensors, and float32 where
    the layers have different dtypes.

    Args:
      source: the checkpoint.
      specs: the tensor, or that of each layer in order.
    """

    def __init__(self, source: Source, specs: Sequence[TensorSpec]):
        self._source, self._specs = source, tuple(specs)
        self._stacked, self.shape = len(specs[0].index), stacked_shape(specs)
        self.dtype = common_dtype(source.tensors[spec.name].dtype for spec in specs)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtype)
        stacked, inner = bounds[: self._stacked], bounds[self._stacked :]
        numbers = np.arange(len(self._specs)).reshape(self.shape[: self._stacked])
        chosen = numbers[tuple(slice(*bound) for bound in stacked)].reshape(-1)
        for number, matrix in zip(chosen, out.reshape(len(chosen), *out.shape[self._stacked :]), strict=True):
            self._read(self._specs[number], inner, matrix)
        return out

    def read(self) -> np.ndarray:
        """Read the whole array."""
        return self[(slice(None),) * len(self.shape)]

    def _read(self, spec: TensorSpec, bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Read a range of rows and columns of a tensor into `out`; a vector counts as one row."""
        (first, last), (left, right) = bounds if len(bounds) == 2 else ((0, 1), bounds[0])
        out, dtype = out.reshape(last - first, right - left), self._source.tensors[spec.name].dtype
        if out.shape[1] == spec.columns and dtype == self.dtype:
            self._source.read_rows(spec.name, first, last, out)
            return
        step = max(1, BUFFER_BYTES // (spec.columns * dtype.itemsize))
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = np.empty((stop - start, spec.columns), dtype)
            self._source.read_rows(spec.name, start, stop, rows)
            out[start - first : stop - first] = rows[:, left:right]


def stored_tree(source: Source, specs: Mapping[str, TensorSpec]) -> dict:
    """Return the tree of a checkpoint as `StoredArray`s; no weight is read yet."""
    return tree_of(specs.values(), lambda group: StoredArray(source, group))


def save_tree(
    directory: str | Path,
    tree: Mapping,
    config: Mapping,
    tokenizer_from: str | Path | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a tree as a Hugging Face directory, in the dtypes of its arrays.

    The directory gets its name when it is complete.

    Args:
      directory: the output.
      tree: the stacked arrays.
      config: the content of config.json; its dtype becomes that of the tree's first linear.
      tokenizer_from: a model's directory, whose tokenizer files are copied.
      max_shard_size: bytes of weights in one file, at most.
      overwrite: replace a model that is there.
      texts: further small files, by name.

    Raises:
      CheckpointError: the tree does not fit the config, or the output is refused.
    """
    check_config(config, "config")
    specs = tensor_specs(config)
    arrays = {name: tree_tensor(tree, spec) for name, spec in specs.items()}
    tensors = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    dtype = arrays[first_linear(specs).name].dtype.name
    model = SimpleNamespace(config=config, specs=specs)
    with laid_out_writer(model, directory, tensors, max_shard_size, overwrite) as writer:
        for name, array in arrays.items():
            writer.write_rows(name, 0, array)
        writer.commit(with_dtype(config, dtype), Path(tokenizer_from) if tokenizer_from else None, texts)


def tree_tensor(tree: Mapping, spec: TensorSpec) -> np.ndarray:
    """Return a tensor of a tree; it is a view where the tree's arrays are numpy's.

    Raises:
      CheckpointError: the tree lacks the tensor, or has it in another shape or in a dtype that weights cannot have.
    """
    node = tree
    for part in spec.path:
        if part not in node:
            raise CheckpointError(f"the tree has no {'.'.join(spec.path)}, which config says the model has.")
        node = node[part]
    array = np.asarray(node[spec.index] if spec.index else node)
    if array.shape != spec.shape:
        raise CheckpointError(f"the tree's {spec.name} has shape {array.shape}, config says {spec.shape}.")
    if array.dtype not in DTYPE_BY_NAME.values():
        raise CheckpointError(f"the tree's {spec.name} is {array.dtype}; weights must be {', '.join(DTYPE_BY_NAME)}.")
    return array
