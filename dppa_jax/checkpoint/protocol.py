"""TODO."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from dppa_jax.architecture.specs import TensorSpec


@runtime_checkable
class Source(Protocol):
    """What a checkpoint must offer to be merged."""

    config: dict
    specs: Mapping[str, TensorSpec]
    tensors: Mapping  # of name to an object with .dtype and .shape

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Where rows of finished tensors go, in any order."""

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None: ...
