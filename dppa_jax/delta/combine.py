"""How several experts become one delta: functions of the experts' scaled deltas, elementwise over (rows, columns)."""

from collections.abc import Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dppa_jax.delta.tied import Pair, reaches

Delta = Float[Array | np.ndarray, "*shape"]


def sum_(deltas: Sequence[Delta]) -> Delta:
    """Add: Σₖ λₖδₖ, in the order of the experts. Source: Ilharco et al. 2023 (task arithmetic)."""
    return reduce(add, deltas)


def ties(deltas: Sequence[Delta], zero_sign: float = 1.0) -> Delta:
    """Average the λₖδₖ that are not zero and have the elected sign, which is the sign of Σₖ λₖδₖ.

    Source: Yadav et al. 2023, section 3 (elect, disjoint merge); the trimming is the score's work.
    Differs from the authors' code: where the sum is exactly zero they elect the sign that is in the majority over the
    whole model, which takes a pass of its own; here it is `zero_sign`, +1 as in mergekit.

    >>> ties([jnp.array([3.0, 1.0]), jnp.array([1.0, -2.0]), jnp.array([-2.0, 0.0])]).tolist()
    [2.0, -2.0]
    """
    total = reduce(add, deltas)
    elected = jnp.where(jnp.where(total == 0, zero_sign, total) > 0, 1.0, -1.0)  # ±1: its product with δ has δ's size
    agree = [delta * elected > 0 for delta in deltas]
    kept = reduce(add, [jnp.where(a, delta, 0) for a, delta in zip(agree, deltas, strict=True)])
    count = reduce(add, [a.astype(jnp.float32) for a in agree])
    return jnp.where(jnp.isnan(total), total, kept / jnp.maximum(count, 1))  # NaN agrees with no sign: let it be seen


COMBINATIONS = {"sum": sum_, "ties": ties}


def scaled(
    delta: jax.Array,
    keys: jax.Array | Pair,
    bounds: jax.Array,
    weights: jax.Array,
    zero: jax.Array,
    gain: jax.Array | None = None,
) -> jax.Array:
    """Keep and scale: wₚ·δ with p the first partition (highest rate first) whose bound the key reaches, else 0.

    Args:
      delta: (rows, columns) float32.
      keys: (rows, columns) uint32, the score; with `tied.Pair` ties are told apart.
      bounds: (rows, partitions) uint32, not increasing along partitions; of pairs (rows, partitions, 2).
      weights: (rows, partitions) float32, factor times coefficient.
      gain: a scale for each element beside the weight, (rows, columns) float32; None for 1.
      zero: the int32 number 0, unknown to the compiler; see `rounded`.
    """
    weight = jnp.zeros_like(delta)
    for p in reversed(range(bounds.shape[1])):
        weight = jnp.where(reaches(keys, bounds[:, p : p + 1]), weights[:, p : p + 1], weight)
    return rounded((weight if gain is None else weight * gain) * delta, zero)


def rounded(product: jax.Array, zero: jax.Array) -> jax.Array:
    """Round a product to float32 before it is added to anything.

    Compilers contract a·b + c to one fused multiply-add, on some backends and in some loops only, which changes the
    last bit. An exclusive-or with a zero that the compiler cannot see keeps the two apart, at no measurable cost.
    """
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, jnp.int32) ^ zero, jnp.float32)
