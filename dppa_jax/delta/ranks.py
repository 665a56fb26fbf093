"""Ranks within rows: the place of each element in the order of its row.

Inside of a graph they take a sort of pairs, which XLA does slowly on a CPU: 180 ns an element of a 2048 × 2048 matrix
on 2 cores, where `host_ranks` takes 5. Both give the same ranks.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped, UInt32

PIECE = 1 << 17  # elements that a thread sorts at a time: 1 MB of pairs


class Ranked(NamedTuple):
    """What a score needs beside the delta, and ranks that were found before."""

    inputs: Any
    ranks: Shaped[Array, "rows columns"]


def ranks(keys: jax.Array) -> Int32[Array, "rows columns"]:
    """Return the rank of each element within its row, from 0 for the smallest; of equal ones the first is smaller."""
    row, column = (lax.broadcasted_iota(jnp.int32, keys.shape, axis) for axis in (0, 1))
    _, order = lax.sort((keys, column), dimension=1, num_keys=1, is_stable=True)
    return jnp.zeros(keys.shape, jnp.int32).at[row, order].set(column, unique_indices=True)


def host_ranks(keys: UInt32[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "rows columns"]:
    """Return what `ranks` does, as uint16 where that holds it, else uint32; with NumPy on all cores.

    (key, column) is one number of 64 bits, which NumPy sorts with vector instructions; (column, rank) is one of 32.

    >>> host_ranks(np.array([[7, 5, 7, 0]], np.uint32)).tolist()
    [[2, 1, 3, 0]]
    """
    rows, columns = keys.shape
    found = np.empty(keys.shape, "<u2" if columns <= 1 << 16 else "<u4")
    step = max(1, PIECE // max(columns, 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, rows, step)
        for _ in pool.map(lambda start: _rank(keys[start : start + step], found[start : start + step]), starts):
            pass
    return found


def _rank(keys: np.ndarray, out: np.ndarray) -> None:
    order = _sorted_by(keys, np.dtype("<u4"))
    out[...] = _sorted_by(order, out.dtype)  # the columns by their places in the order of columns, which are its ranks


def _sorted_by(keys: np.ndarray, half: np.dtype) -> np.ndarray:
    """Return the columns of each row in the order of their keys, both numbers of at most the bits of `half`."""
    pairs = np.empty((*keys.shape, 2), half)  # of a little-endian number of twice the bits, the low half is first
    pairs[..., 0], pairs[..., 1] = np.arange(keys.shape[1]), keys
    pairs.view(f"<u{2 * half.itemsize}")[..., 0].sort(axis=1)
    return pairs[..., 0]
