"""Models of which some tensors alone are merged, or whose rows of the vocabulary are read in another order."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dppa_jax.architecture.specs import Role, TensorSpec
from dppa_jax.checkpoint.dtypes import common_dtype

LACKS = -1  # in place of a row that a model does not have


def vocabulary_tensors(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the names of the matrices with a row for each token: embeddings and heads, all of as many rows."""
    found = [spec for spec in specs.values() if spec.role is Role.VOCABULARY and len(spec.shape) == 2]
    return tuple(spec.name for spec in found if spec.rows == found[0].rows)


class Matched:
    """A model in which row i of every vocabulary tensor is that of the merge's token i. A `Source`.

    All other tensors, and all that is not about rows, are the model's own.

    Args:
      model: an open checkpoint; of a plan, an object with config and specs alone.
      names: the vocabulary tensors.
      rows: (rows of the merge,), which row of the model each of them is; LACKS where the model has none.
      other: has the tensors and rows that the model lacks, by their numbers in the merge; a `Source` or `Means`.
      config: in place of the model's.
    """

    def __init__(self, model: Any, names: tuple[str, ...], rows: np.ndarray, other: Any, config: dict | None = None):
        self.model, self.config = model, config or model.config
        self._names, self._rows, self._other = names, rows, other
        own = model.specs
        self.specs = {
            name: replace(spec, shape=(len(rows), *spec.shape[1:])) if name in names else spec
            for name, spec in own.items()
        }

    def __getattr__(self, name: str) -> Any:
        """Return what is not about rows: directory, dtype, fingerprint, files, close and more of the model."""
        return getattr(self.model, name)

    @cached_property
    def tensors(self) -> dict:
        """The model's tensors; those of the vocabulary have the merge's rows, in a dtype that holds all of them."""
        lacking = bool((self._rows == LACKS).any())
        changed = {}
        for name in self._names:
            dtypes = [source.tensors[name].dtype for source in (self.model, *([self._other] if lacking else []))]
            shape = self.specs[name].shape
            changed[name] = replace(self.model.tensors[name], shape=shape, dtype=common_dtype(dtypes))
        return {**self.model.tensors, **changed}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`; rows that follow one another are read at once."""
        if name not in self._names:
            self.model.read_rows(name, start, stop, out)
            return
        rows = self._rows[start:stop]
        for begin, end in _runs(rows):
            if rows[begin] == LACKS:
                read_as(self._other, name, start + begin, start + end, out[begin:end])
            else:
                read_as(self.model, name, int(rows[begin]), int(rows[end - 1]) + 1, out[begin:end])

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        if name not in self._names:
            return self.model.read(name)
        out = np.empty(self.specs[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, len(out), out)
        return out


class Part:
    """A model of which only some tensors are merged. All else is the model's own; a `Source`.

    Args:
      model: an open checkpoint, or one whose headers alone are known.
      specs: of the tensors that are merged.
      copies: tensors that the files lack, as they are copies: the name of the other.
    """

    def __init__(self, model: Any, specs: Mapping[str, TensorSpec], copies: Mapping[str, str] | None = None):
        self.model, self.specs, self._copies = model, specs, dict(copies or {})

    def __getattr__(self, name: str) -> Any:
        """Return what is not about these tensors: directory, config, fingerprint, close and more of the model."""
        return getattr(self.model, name)

    @property
    def tensors(self) -> Mapping:
        """All tensors of the model, and those that are copies of others."""
        tensors = self.model.tensors
        return {**tensors, **{name: tensors[of] for name, of in self._copies.items()}} if self._copies else tensors

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`."""
        self.model.read_rows(self._copies.get(name, name), start, stop, out)

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        return self.model.read(self._copies.get(name, name))


class Means:
    """The rows of tokens that only experts have: each is the mean of the rows of the experts that have the token.

    The mean is formed in float32, in the order of the experts, and rounded once to the base's dtype.

    Args:
      base: says the dtype of each tensor.
      experts: by name, as they were opened.
      rows: by expert, (rows of the merge,); LACKS where the expert has no such token.
    """

    def __init__(self, base: Any, experts: Mapping[str, Any], rows: Mapping[str, np.ndarray]):
        self._base, self._experts, self._rows = base, experts, rows

    @property
    def tensors(self) -> Mapping:
        """The base's tensors, for their dtypes."""
        return self._base.tensors

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Compute rows start to stop (exclusive) of a tensor, each of which an expert has."""
        total, counts = np.zeros(out.shape, np.float32), np.zeros((stop - start, 1), np.float32)
        for expert, rows in self._rows.items():
            own = rows[start:stop]
            for begin, end in _runs(own):
                if own[begin] != LACKS:
                    piece = np.empty((end - begin, out.shape[1]), np.float32)
                    read_as(self._experts[expert], name, int(own[begin]), int(own[end - 1]) + 1, piece)
                    total[begin:end] += piece
                    counts[begin:end] += 1
        out[...] = total / counts


def read_as(source: Any, name: str, start: int, stop: int, out: np.ndarray) -> None:
    """Read rows of a tensor into an array that may have another dtype."""
    dtype = source.tensors[name].dtype
    if dtype == out.dtype:
        source.read_rows(name, start, stop, out)
    else:
        stored = np.empty(out.shape, dtype)
        source.read_rows(name, start, stop, stored)
        out[...] = stored


def opened_model(model: Any) -> Any:
    """Return a model as it was opened, with its rows in its own order."""
    return model.model if isinstance(model, Matched) else model


def unwrapped(model: Any) -> Any:
    """Return a model as it was opened, with all of its tensors and its rows in its own order."""
    while isinstance(model, Matched | Part):
        model = model.model
    return model


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield where rows follow one another, or are lacking: the first place, and the one after the last.

    >>> list(_runs(np.array([4, 5, 6, -1, -1, 0, 1, 3])))
    [(0, 3), (3, 5), (5, 7), (7, 8)]
    """
    before, after = rows[:-1], rows[1:]
    joined = np.where(before == LACKS, after == LACKS, after == before + 1)
    ends = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(rows)]
    yield from pairwise(ends)
