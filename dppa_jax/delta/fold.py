"""Sums and counts over rows, in one order of addition on every backend, device count and block size.

`fold` adds eight column slices of a row elementwise. Compilers neither split nor reorder such additions, and on a CPU
it is as fast as the read; the reduction that XLA offers chooses its own order. Two folds leave 1/64 of the numbers,
which the host adds in float64. Memory bandwidth is what a survey costs, so a read counts four bounds, packed in the
bytes of a word, or adds two sums, packed in a complex number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from dppa_jax.delta.tied import Pair, reaches

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


def above(delta: Float[Array, "rows columns"], thresholds: Float[Array, "rows 2"]) -> jax.Array:
    """|δ| where |δ| is above a threshold, else 0, for two thresholds: a complex number adds both in one read."""
    size = jnp.abs(delta)
    first, second = (jnp.where(size > thresholds[:, i : i + 1], size, 0) for i in range(2))
    return lax.complex(first, second)


def reached(
    keys: UInt32[Array, "rows columns"] | Pair, bounds: UInt32[Array, "rows 4 ..."]
) -> UInt32[Array, "rows columns"]:
    """Four counters of eight bits: byte c is 1 where the key is at or above bound c. Two folds reach 64."""
    return sum(reaches(keys, bounds[:, c : c + 1]).astype(jnp.uint32) << (8 * c) for c in range(4))


def fold_bytes(packed: UInt32[Array, "rows width"]) -> tuple[jax.Array, jax.Array]:
    """The bytes as halves of two words, folded to 512: bounds 0 and 2, 1 and 3."""
    return tuple(fold_again((packed >> shift) & np.uint32(0x00FF00FF)) for shift in (0, 8))


def unpack(even: UInt32[Array, "rows width"], odd: UInt32[Array, "rows width"]) -> Int32[Array, "rows 4"]:
    """The four counters of each row, after three folds."""
    halves = [(word >> shift) & np.uint32(0xFFFF) for shift in (0, 16) for word in (even, odd)]
    return jnp.stack([half.astype(jnp.int32).sum(axis=1) for half in halves], axis=1)


def neighbours(x: Shaped[Array, "rows columns"], starts: Int32[Array, "rows 1"], count: int) -> jax.Array:
    """`count` neighbouring elements of each row, from a column of its own: one cache line a row, not one an element."""
    return jax.vmap(lambda row, start: lax.dynamic_slice(row, start, (count,)))(x, starts)
