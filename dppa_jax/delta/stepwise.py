"""The sum of several experts' deltas step by step: coefficients, agreement, division, one factor, in a dtype of choice.

`combine` has the sums with coefficients that are multiplied into the weights beforehand, in float32. Here they are at
hand, so that a sum can be divided by them, and every step is rounded to a dtype as programs do that work in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dppa_jax.delta.combine import Delta
from dppa_jax.delta.rounding import rounded
from dppa_jax.delta.score import in_dtype

DIVISORS = ("none", "count", "weights")  # what a sum is divided by: 1, its number of terms, their coefficients


@dataclass(frozen=True)
class Steps:
    """The facts of a combination that can go step by step.

    Attributes:
      elects: do only the deltas count that have the elected sign, which is that of their sum, + for zero?
      divide: what its sum is divided by, if nothing else is asked; of `DIVISORS`.
      smallest: a sum of coefficients that is no larger is taken for 1.
    """

    elects: bool
    divide: str
    smallest: float


STEPS = {"sum": Steps(False, "none", 1e-8), "ties": Steps(True, "count", 0.0)}  # by the name of the combination


def stepwise(
    deltas: Sequence[Delta],
    coefficients: Sequence[Float[Array, "rows 1"]],
    factor: Array | np.floating | float,
    divided: Array | np.floating | float,
    zero: Array,
    steps: Steps,
    divide: str,
    dtype: str,
) -> Delta:
    """Compute factor · Σ λₖδₖ / divisor over the experts that agree, each step rounded to `dtype`, as float32.

    Args:
      deltas: keep·scale·δ of each expert, float32, rounded to `dtype`.
      coefficients: λ of each expert.
      factor: what the divided sum is multiplied by.
      divided: 1 where the sum is divided, else 0.
      zero: see `combine.rounded`.
      divide: what the sum is divided by, of `DIVISORS`.

    >>> one = lambda *x: jnp.array([x])
    >>> stepwise([one(1.0, 4.0), one(3.0, -1.0)], [one(3.0), one(1.0)], 0.5, 1, jnp.int32(0), STEPS["ties"],
    ...     "weights", "float32").tolist()
    [[0.75, 2.0]]
    """
    step: Callable = lambda x: in_dtype(rounded(x, zero), dtype)  # noqa: E731
    own = [step(coefficient) for coefficient in coefficients]
    weighted = [step(coefficient * delta) for coefficient, delta in zip(own, deltas, strict=True)]
    total = step(reduce(add, weighted))
    agree = [delta == delta for delta in weighted]  # all but NaN; XLA would multiply by the reciprocal of one number
    if steps.elects:
        elected = jnp.where(total >= 0, 1.0, -1.0)
        agree = [delta * elected > 0 for delta in weighted]
    kept = step(reduce(add, [jnp.where(a, delta, 0) for a, delta in zip(agree, weighted, strict=True)]))
    if divide != "none":
        terms = own if divide == "weights" else [jnp.ones_like(one) for one in own]
        divisor = step(reduce(add, [jnp.where(a, term, 0) for a, term in zip(agree, terms, strict=True)]))
        kept = step(kept / jnp.where((jnp.abs(divisor) <= steps.smallest) | (divided == 0), 1, divisor))
    return jnp.where(jnp.isnan(total), total, step(kept * factor))
