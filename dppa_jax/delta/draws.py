"""Random numbers of 32 bits, each a hash of its place: of elements, of rows and columns, of heads and neurons.

A number depends on the seed, the names of expert and tensor (or group), and its place there; not on how a tensor is
split or where it is computed.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

Columns = jax.Array | np.ndarray
Words = UInt32[Array | np.ndarray, "rows words"]

NO_UNIT = np.uint32(0xFFFFFFFF)  # columns of a unit, where it consists of rows
COLUMN_STEP = np.uint32(0x9E3779B1)  # between the numbers that `hashed` mixes, of one column and the next


def row_words(seed: int, expert: str, tensor: str, start: int, stop: int) -> UInt32[np.ndarray, "rows 2"]:
    """Make two random words for each of the rows start..stop of a tensor, the same however the tensor is split."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{tensor}".encode(), digest_size=8).digest()
    low, high = np.frombuffer(digest, "<u4")
    rows = np.arange(start, stop, dtype=np.uint32)
    return np.stack([_mix(rows + low), _mix((rows ^ high) * np.uint32(0x9E3779B1) + low)], axis=1)


def row_draws(words: Words, columns: int) -> UInt32[Array | np.ndarray, "rows 1"]:
    """Return the u of every row of a tensor."""
    return hashed(words, np.zeros((1, 1), np.uint32))


def column_draws(words: Words, columns: int) -> UInt32[Array | np.ndarray, "1 columns"]:
    """Return the u of every column of a tensor."""
    return hashed(words[:1], np.arange(columns, dtype=np.uint32)[None])


def unit_draws(words: Words, columns: int) -> UInt32[Array | np.ndarray, "..."]:
    """Return the u of every row of a tensor, or of every column, of whichever units are made."""
    if words[0, 3] == NO_UNIT:
        return unit_keys(words, np.zeros((1, 1), np.uint32))
    return unit_keys(words[:1], np.arange(columns, dtype=np.uint32)[None])


def hashed(words: Words, column: Columns) -> UInt32[Array | np.ndarray, "rows columns"]:
    """Hash (two words of the row, column) to a number of 32 bits.

    This is a multiply-xorshift mixer with the second word entering between its rounds, so that two rows are never
    shifted copies of each other.
    """
    x = column.astype(jnp.uint32) * COLUMN_STEP + words[:, :1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) ^ words[:, 1:2]
    x = x * np.uint32(0x846CA68B)
    x = (x ^ (x >> 16)) * np.uint32(0x9E3779B1)
    return x ^ (x >> 15)


def unit_keys(words: Words, column: Columns) -> UInt32[Array | np.ndarray, "rows columns"]:
    """Hash the words of a group and the unit of each row, or of each column, of which the other one is 0."""
    return hashed(words, words[:, 2:3] + column.astype(jnp.uint32) // words[:, 3:4])


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
