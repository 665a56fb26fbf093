"""Matrices that a merge works on: rows of tensors, side by side on the devices."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of one tensor."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows they are."""
        return self.stop - self.start


@dataclass(frozen=True)
class Matrix:
    """Rows of equal width that are on the devices as one matrix.

    Attributes:
      ranges: where the rows come from, one after another; each range of a matrix of linears is a whole tensor.
      linears: the place of each range on the axis of linears; empty where the rows are not pruned.
    """

    ranges: tuple[RowRange, ...]
    columns: int
    linears: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all ranges."""
        return sum(rows.rows for rows in self.ranges)

    @property
    def elements(self) -> int:
        """Elements of all ranges."""
        return self.rows * self.columns

    def places(self) -> Iterator[tuple[RowRange, slice]]:
        """Each range, and where its rows are in the matrix."""
        row = 0
        for rows in self.ranges:
            yield rows, slice(row, row + rows.rows)
            row += rows.rows

    def per_row(self, per_range: np.ndarray) -> np.ndarray:
        """Repeat one value (or row of values) per range for each of its rows."""
        return np.repeat(per_range, [rows.rows for rows in self.ranges], axis=0)

    def range_sums(self, per_row: np.ndarray) -> np.ndarray:
        """Add up one value per row within each range of a matrix of linears, all of which have equally many rows."""
        return per_row.reshape(len(self.ranges), -1).sum(axis=1)


@dataclass(frozen=True)
class DeviceMatrix:
    """A matrix on the devices: base and experts, (padded rows, columns) each.

    Attributes:
      first: the place of the first of these experts among all.
    """

    matrix: Matrix
    base: jax.Array
    experts: tuple[jax.Array, ...]
    first: int = 0

    @property
    def places(self) -> range:
        """The places of these experts among all."""
        return range(self.first, self.first + len(self.experts))
