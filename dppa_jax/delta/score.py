"""What ranks a delta parameter: one function per score, from a delta matrix to unsigned integer keys.

Every score is turned into a uint32 whose order is the order of the score, so that thresholds, counts and masks are
integer work: exact, the same on every device, and blind to flushed denormals. An element is kept when its key is at
or above a bound; `bound_above(t)` is the bound for "score > t".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

Columns = jax.Array | np.ndarray
Matrix = Float[Array | np.ndarray, "rows columns"]
Keys = UInt32[Array | np.ndarray, "rows columns"]

FIRST_BOUND = 0  # keeps everything
LAST_BOUND = np.uint32(0xFFFFFFFF)


def delta(base: jax.Array, expert: jax.Array, dtype: str) -> Matrix:
    """expert − base, formed in float32 and rounded once to `dtype`, returned as float32.

    For 16-bit weights of that dtype these are the bits that PyTorch's 16-bit subtraction gives.
    """
    difference = expert.astype(jnp.float32) - base.astype(jnp.float32)
    if dtype == "float32":
        return difference
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(difference, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if dtype == "float16":  # reduce_precision flushes what is below 6.1e-5, and many deltas of a fine-tune are
        step = np.float32(info.smallest_subnormal)
        rounded = jnp.where(jnp.abs(difference) < info.tiny, jnp.round(difference / step) * step, rounded)
    return rounded


def finite_delta(base: jax.Array, expert: jax.Array, dtype: str) -> Matrix:
    """`delta` with 0 in place of NaN and Inf (--allow_nonfinite)."""
    difference = delta(base, expert, dtype)
    return jnp.where(jnp.isfinite(difference), difference, 0)


def magnitude(delta: Matrix, side: None = None, column: Columns | None = None) -> Keys:
    """|δ|. Source: Han et al. 2015.

    >>> delta = jnp.array([[-2.0, 0.0, 1.0]])
    >>> jnp.argsort(magnitude(delta)).tolist()
    [[1, 2, 0]]
    """
    return _float_keys(jnp.abs(delta))


def random(delta: Matrix, side: UInt32[Array | np.ndarray, "rows 2"], column: Columns) -> Keys:
    """u uniform on the 2³² integers, from a counter-based hash of (row key, column).

    `side` holds two words per row, folded from (seed, expert name, tensor name, row) by `row_keys`. The hash is a
    multiply-xorshift mixer with the second word entering between its rounds, so that two rows are never shifted
    copies of each other. Drop-and-rescale keeps u ≥ p·2³². Source: Yu et al. 2023 (DARE), algorithm 1.
    """
    x = column.astype(jnp.uint32) * np.uint32(0x9E3779B1) + side[:, :1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) ^ side[:, 1:]
    x = x * np.uint32(0x846CA68B)
    x = (x ^ (x >> 16)) * np.uint32(0x9E3779B1)
    return x ^ (x >> 15)


def wanda(delta: Matrix, side: tuple[Float[Array, "layers inputs"], jax.Array], column: Columns) -> Keys:
    """|δ_ij| · ‖x_j‖, ‖x_j‖ being the norm of input j over calibration tokens. Source: Sun et al. 2023, eq. 1.

    `side` is the norms of every layer in the matrix and the layer of each row (`sharding.PerLayer`).
    """
    norms, layer = side
    return _float_keys(jnp.abs(delta) * norms[layer[:, None], column])


def row(delta: Matrix, side: Float[Array, "rows 1"], column: Columns) -> Keys:
    """One score per output row, Σ_j |δ_ij|: structural pruning of rows."""
    return _float_keys(jnp.broadcast_to(side, delta.shape))


def column(delta: Matrix, side: tuple[Float[Array, "layers inputs"], jax.Array], column: Columns) -> Keys:
    """One score per input column, Σ_i |δ_ij|: structural pruning of columns."""
    sums, layer = side
    return _float_keys(jnp.broadcast_to(sums[layer[:, None], column], delta.shape))


@dataclass(frozen=True)
class Score:
    keys: Callable[..., Keys]
    side: str | None = None  # what the function needs beside the delta; the pipeline prepares it
    summary: str = ""


SCORES = {
    "magnitude": Score(magnitude, None, "|delta|"),
    "random": Score(random, "row_keys", "uniform random number"),
    "wanda": Score(wanda, "activation_norms", "|delta| times the input's norm, on --calibration text"),
    "row": Score(row, "row_sums", "sum of |delta| over an output row (structural)"),
    "column": Score(column, "column_sums", "sum of |delta| over an input column (structural)"),
}


def bound_above(threshold: float | np.floating | np.ndarray) -> np.uint32 | np.ndarray:
    """The smallest key whose score is greater than a non-negative float32 threshold.

    >>> bool(bound_above(np.float32(1.0)) == np.float32(1.0).view(np.uint32) + 1)
    True
    """
    return np.asarray(threshold, np.float32).view(np.uint32) + np.uint32(1)


def random_bound(rate: float | np.floating | np.ndarray) -> np.uint32 | np.ndarray:
    """⌈rate·2³²⌉: u is kept when it is at or above. At rate 1 no bound drops all keys; the scale is 0 there."""
    return np.minimum(np.ceil(np.asarray(rate, np.float64) * 2.0**32), float(LAST_BOUND)).astype(np.uint32)


def row_keys(seed: int, expert: str, tensor: str, start: int, stop: int) -> UInt32[np.ndarray, "rows 2"]:
    """Two random words for each of the rows start..stop of a tensor, the same however the tensor is split."""
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{tensor}".encode(), digest_size=8).digest()
    low, high = np.frombuffer(digest, "<u4")
    rows = np.arange(start, stop, dtype=np.uint32)
    return np.stack([_mix(rows + low), _mix((rows ^ high) * np.uint32(0x9E3779B1) + low)], axis=1)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _float_keys(score: jax.Array) -> Keys:
    """Non-negative float32 numbers sort like their bits."""
    return lax.bitcast_convert_type(score, jnp.uint32)
