"""Sums and counts over rows, in one order of addition on every backend, device count and block size.

`fold` adds eight column slices of a row elementwise. Compilers neither split nor reorder such additions, and on a CPU
it is as fast as the read; the reduction that XLA offers chooses its own order. Two folds leave 1/64 of the numbers,
which the host adds in float64. Counts are packed, four 8-bit counters to a word: two folds of eight reach 64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

WAYS = 8


def fold(columns: int, term: Callable[[slice], jax.Array]) -> jax.Array:
    """Σ over eight slices of the columns of term(slice), first to last. The last slices may be short or empty."""
    width = -(-columns // WAYS)
    total = term(slice(0, width))
    for start in range(width, columns, width):
        part = term(slice(start, min(start + width, columns)))
        if part.shape[1] < width:
            part = jnp.pad(part, ((0, 0), (0, width - part.shape[1])))
        total = total + part
    return total


def fold_again(x: jax.Array) -> jax.Array:
    """(rows, w) to (rows, ⌈w/8⌉)."""
    return fold(x.shape[1], lambda columns: x[:, columns])


def absolute(delta: Float[Array, "rows columns"]) -> jax.Array:
    """|δ|"""
    return jnp.abs(delta)


def square(delta: Float[Array, "rows columns"]) -> jax.Array:
    """δ²"""
    return delta * delta


def above(delta: Float[Array, "rows columns"], threshold: Float[Array, "rows 1"]) -> jax.Array:
    """|δ| where |δ| > threshold, else 0."""
    size = jnp.abs(delta)
    return jnp.where(size > threshold, size, 0)


def reached(keys: UInt32[Array, "rows columns"], bounds: UInt32[Array, "rows 4"]) -> Int32[Array, "rows columns"]:
    """Four packed counters: byte c is 1 where the key is at or above bound c."""
    return sum((keys >= bounds[:, c : c + 1]).astype(jnp.int32) << (8 * c) for c in range(bounds.shape[1]))


def unpack(packed: Int32[Array, "rows width"]) -> Int32[Array, "rows 4"]:
    """The four counters of each row, after two folds."""
    return jnp.stack([((packed >> (8 * c)) & 255).sum(axis=1) for c in range(4)], axis=1)
