"""What a merge asks of a checkpoint: a `Source` gives rows of tensors, a `Sink` takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dppa_jax.architecture.layout import Place
from dppa_jax.architecture.specs import TensorSpec


@runtime_checkable
class Stored(Protocol):
    """A tensor of a file, or what stands in its place: quantised weights, an array in memory.

    Attributes:
      file: how messages call the place where it lies.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def at(self, place: Place, shape: tuple[int, ...]) -> "Stored":
        """Return the tensor of this shape that lies at a place of this one."""


@runtime_checkable
class Headers(Protocol):
    """A model whose tensors are known, and perhaps not yet here: see `HubModel`.

    Attributes:
      config: the content of config.json.
      specs: what config.json promises of each tensor, by name.
      tensors: by name, an object with `dtype` and `shape`.
    """

    config: dict
    specs: Mapping[str, TensorSpec]
    tensors: Mapping


@runtime_checkable
class Source(Headers, Protocol):
    """A model that can be read by row: a directory, an Orbax checkpoint, a model in memory, or one that is made up."""

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype."""


@runtime_checkable
class Sink(Protocol):
    """A place where rows of finished tensors go, in any order and from any thread."""

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Write rows of a tensor, from row `start` on."""


@runtime_checkable
class LastingSink(Sink, Protocol):
    """A sink whose rows outlive the run, so that a later run can go on from them."""

    def has_rows(self, name: str, start: int, stop: int) -> bool:
        """Return whether an earlier run has written these rows, and they are still as they were written."""
