"""Arrays of the tree as they lie in a checkpoint: a process reads the slices that its devices hold, and no others."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dppa_jax.architecture.specs import TensorSpec, stacked_shape, tree_of
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.checkpoint.safetensors import common_dtype

BUFFER_BYTES = 1 << 26  # of whole rows, of which some columns or another dtype are wanted


class StoredArray:
    """A tensor, or one of all layers stacked; indexing it by slices, one for each axis, reads them.

    Its dtype is that of the tensors, and float32 where the layers' differ.
    """

    def __init__(self, source: Source, specs: Sequence[TensorSpec]):
        self._source, self._specs = source, tuple(specs)
        self._stacked, self.shape = specs[0].layer is not None, stacked_shape(specs)
        self.dtype = common_dtype(source.tensors[spec.name].dtype for spec in specs)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = [one.indices(size)[:2] for one, size in zip(index, self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], self.dtype)
        layers, within = (range(*bounds[0]), bounds[1:]) if self._stacked else (range(1), bounds)
        for layer, piece in zip(layers, out if self._stacked else out[None], strict=True):
            self._read(self._specs[layer], within, piece)
        return out

    def read(self) -> np.ndarray:
        """The whole of it."""
        return self[(slice(None),) * len(self.shape)]

    def _read(self, spec: TensorSpec, bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Rows and columns of a tensor; a vector is a row."""
        (first, last), (left, right) = bounds if len(bounds) == 2 else ((0, 1), bounds[0])
        out, dtype = out.reshape(last - first, right - left), self._source.tensors[spec.name].dtype
        if out.shape[1] == spec.columns and dtype == self.dtype:
            self._source.read_rows(spec.name, first, last, out)
            return
        step = max(1, BUFFER_BYTES // (spec.columns * dtype.itemsize))
        for start in range(first, last, step):
            stop = min(start + step, last)
            whole = np.empty((stop - start, spec.columns), dtype)
            self._source.read_rows(spec.name, start, stop, whole)
            out[start - first : stop - first] = whole[:, left:right]


def stored_tree(source: Source, specs: Mapping[str, TensorSpec]) -> dict:
    """The tree of a checkpoint, nothing of which is read yet."""
    return tree_of(specs.values(), lambda group: StoredArray(source, group))
