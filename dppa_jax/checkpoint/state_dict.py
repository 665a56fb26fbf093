"""A state dict as a model: the tensors of a trainer or of `model.state_dict()`, read and written like files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dppa_jax.architecture.generic import GENERIC
from dppa_jax.architecture.layout import Layout, Place, stored_rows
from dppa_jax.architecture.specs import TensorSpec, matrix_shape
from dppa_jax.architecture.table import IGNORED
from dppa_jax.checkpoint.promised import Promised, drop_tied_heads

HERE = Path("state dict")  # in messages, in place of a file


@dataclass(frozen=True)
class Held:
    """A tensor of a state dict, or rows of one that holds several."""

    array: np.ndarray
    shape: tuple[int, ...]
    place: Place
    file: Path = HERE

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its elements."""
        return self.array.dtype

    def at(self, place: Place, shape: tuple[int, ...]) -> "Held":
        """Return the tensor of this shape that lies at a place of this one."""
        return self if place.whole else replace(self, shape=shape, place=place)

    def pieces(self, start: int, stop: int) -> list[tuple[slice, np.ndarray]]:
        """Return where rows start to stop lie: places among them, and views of the array, one for each run."""
        rows = self.array.reshape(matrix_shape(self.shape) if self.place.whole else stored_rows(self.array.shape))
        found = self.place.pieces(start, stop)
        return [(slice(row - start, row - start + count), rows[at : at + count]) for row, at, count in found]


class StateDict:
    """A state dict that a merge reads like a checkpoint, a `Source`; and, empty, one that it writes, a `Sink`.

    Args:
      arrays: by the names that a checkpoint's files have.
      config: the content of config.json; without it, the names and shapes say what each tensor is.

    Raises:
      CheckpointError: a tensor is missing, too many or of another shape than `config` says.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], config: Mapping | None = None):
        self.arrays, self.config = dict(arrays), dict(config or {})
        held = {
            name: Held(array, array.shape, Place(name)) for name, array in arrays.items() if not IGNORED.match(name)
        }
        promised = Promised(self.config, held, None if config else GENERIC)
        promised.check(HERE)
        self.layout: Layout = promised.layout
        self.specs: dict[str, TensorSpec] = promised.specs
        self.tensors: dict[str, Held] = promised.tensors
        self.tied = {head: name for head, name in promised.tied.items() if head in self.tensors}
        drop_tied_heads(self, promised.tied, self.specs)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows start to stop (exclusive) of a tensor into `out`."""
        for at, rows in self.tensors[name].pieces(start, stop):
            out.reshape(stop - start, -1)[at] = rows

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Copy rows of a tensor, from row `start` on, into the array that holds it."""
        for at, into in self.tensors[name].pieces(start, start + len(rows)):
            into[...] = rows[at]

    def like(self, dtypes: Mapping[str, np.dtype]) -> "StateDict":
        """Return one of these shapes to write into, in these dtypes by tensor; what is not merged is the same array."""
        made = dict(self.arrays)
        for name, dtype in dtypes.items():
            stored = self.layout.places[name].stored
            if made[stored] is self.arrays[stored]:
                made[stored] = np.empty(self.arrays[stored].shape, dtype)
        other = object.__new__(StateDict)
        tensors = {
            name: replace(held, array=made[held.place.stored]) for name, held in self.tensors.items() if name in dtypes
        }
        other.__dict__ = self.__dict__ | {"arrays": made, "tensors": tensors}
        return other

    def finished(self) -> dict[str, np.ndarray]:
        """Return all arrays; a head that is the embeddings is the same array as these."""
        places = {name: self.layout.places[name].stored for name in self.tied.values()}
        return self.arrays | {head: self.arrays[places[name]] for head, name in self.tied.items()}
