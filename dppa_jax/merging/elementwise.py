"""keep·scale·δ and what is made of it, element by element: the arithmetic of merges and of AdaMerging alike.

merged = base + combine(λₖ · gainₖ · weightₖ[partition of score(δₖ)] · δₖ), or Σ cₖ·xₖ of whole tensors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS, scaled
from dppa_jax.delta.ranks import Ranked, ranks
from dppa_jax.delta.rounding import rounded
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES, Keys, delta, finite_delta, float_keys, hashed, in_dtype
from dppa_jax.delta.stepwise import STEPS, stepwise
from dppa_jax.delta.tied import Pair, Placed


@dataclass(frozen=True)
class Elementwise:
    """The functions of one choice of score, combination and delta's dtype; equal choices compile once.

    Attributes:
      within_rows: is an element's key its rank within its row, from 0 for the lowest score?
      gains: does the score's own scale of each element apply?
      stepwise: does the sum go step by step?
      divide: what it is then divided by.
      arithmetic: the dtype to which inputs and every step are rounded.
    """

    score: str
    combine: str
    delta_dtype: str
    allow_nonfinite: bool = False
    within_rows: bool = False
    gains: bool = True
    stepwise: bool = False
    divide: str = "none"
    arithmetic: str = "float32"

    def delta(self, base: jax.Array, expert: jax.Array) -> Float[Array, "rows columns"]:
        """Return expert − base, rounded to the delta's dtype, as float32."""
        base, expert = self._inputs(base), self._inputs(expert)
        return (finite_delta if self.allow_nonfinite else delta)(base, expert, self.delta_dtype)

    def keys(self, delta: jax.Array, inputs, column: jax.Array) -> Keys | Pair:
        """Return the keys of a delta whose columns have these numbers; pairs where the inputs are `Placed`."""
        if isinstance(inputs, Placed):
            return Pair(self.keys(delta, inputs.inputs, column), hashed(inputs.words, column))
        inputs, own = self._own(delta, inputs, column)
        return own["rank"] if self.within_rows else SCORES[self.score].keys(delta, inputs, column, **own)

    @property
    def ranks_rows(self) -> bool:
        """Are elements ranked within rows?"""
        return self.within_rows or SCORES[self.score].ranked

    def ranked(self, delta: jax.Array, inputs, column: jax.Array) -> Keys:
        """Return what is ranked within rows: the keys of a score that is compared so, or |δ|."""
        if not self.within_rows:
            return float_keys(jnp.abs(delta))
        return SCORES[self.score].keys(delta, inputs, column)

    def _own(self, delta: jax.Array, inputs, column: jax.Array) -> tuple[Any, dict[str, Any]]:
        """Return the score's inputs, and what else it takes by name: ranks, (rows, columns) uint32."""
        if not self.ranks_rows:
            return inputs, {}
        found = isinstance(inputs, Ranked)
        rank = inputs.ranks if found else ranks(self.ranked(delta, inputs, column))
        return inputs.inputs if found else inputs, {"rank": rank.astype(jnp.uint32)}

    def pruned(self, base, expert, inputs, bounds, weights, zero) -> Float[Array, "rows columns"]:
        """Return keep·scale·δ of one expert, float32.

        Args:
          inputs: what the score needs beside the delta; `Placed` where ties are told apart, `Ranked` after
            `Kernels.ranked`.
          bounds, weights: (rows, partitions), highest rate first; bounds of pairs (rows, partitions, 2).
          zero: the int32 number 0, unknown to the compiler; see `delta.rounding.rounded`.
        """
        difference = self.delta(base, expert)
        column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)
        score = SCORES[self.score]
        keys, gain = self.keys(difference, inputs, column), None
        if score.gain is not None and self.gains:
            inputs, own = self._own(difference, inputs, column)
            gain = score.gain(difference, inputs, column, **own)
        return in_dtype(scaled(difference, keys, bounds, weights, zero, gain), self.arithmetic)

    def merged(
        self, base, pruned: Sequence[jax.Array], dtype: str | np.dtype | None, numbers=None, zero=None, total=None
    ) -> jax.Array:
        """Return base + combine(pruned deltas), cast once to `dtype`; `numbers` (rows, k) are of the combination.

        Of a sum that goes step by step (`delta.stepwise`) these are the coefficients, the factor of all, and whether it
        is divided.
        A sum may be made in parts: `total` is that of the deltas before, and without a dtype the new total comes back.
        """
        if self.stepwise:
            *coefficients, factor, divided = (numbers[:, i : i + 1] for i in range(numbers.shape[1]))
            how = STEPS[self.combine], self.divide, self.arithmetic
            combined = stepwise(pruned, coefficients, factor, divided, zero, *how)
            return in_dtype(self._inputs(base).astype(jnp.float32) + combined, self.arithmetic).astype(dtype)
        pruned = pruned if total is None else [total, *pruned]
        given = (pruned,) if numbers is None else (pruned, numbers, zero)
        if dtype is None:
            return COMBINATIONS[self.combine].merged(*given)
        return (base.astype(jnp.float32) + COMBINATIONS[self.combine].merged(*given)).astype(dtype)

    def weights(self, base: jax.Array, model: jax.Array) -> Float[Array, "rows columns"]:
        """Return a model's weights in float32; with `allow_nonfinite` the base's where the delta is NaN or Inf."""
        own, start = model.astype(jnp.float32), base.astype(jnp.float32)
        return jnp.where(jnp.isfinite(own - start), own, start) if self.allow_nonfinite else own

    def weighted(self, base, models, coefficients, divisor, zero, total=None) -> Float[Array, "rows columns"]:
        """Return Σ cₖ·xₖ of models of one tensor, in their order, over the divisor.

        Args:
          base: as in the file, where the models' delta may be NaN or Inf.
          models: as in their files.
          coefficients: of each model, (rows, 1).
          divisor: (rows, 1), or None for 1.
          zero: see `pruned`.
          total: the sum over the models before; None where there are none.
        """
        each = zip(coefficients, models, strict=True)
        own = [rounded(c * self.weights(base, model), zero) for c, model in each]
        total = reduce(add, own if total is None else [total, *own])
        return total if divisor is None else total / jnp.where(divisor == 0, 1, divisor)  # padded rows have 0

    def _inputs(self, x: jax.Array) -> jax.Array:
        """Return weights as the arithmetic's dtype has them."""
        return x if self.arithmetic == "float32" else in_dtype(x.astype(jnp.float32), self.arithmetic)


def elementwise_of(config: MergeConfig) -> tuple[Elementwise, Elementwise]:
    """The arithmetic of pruned linears, and that of dense tensors and of the survey, which rank by magnitude."""
    arithmetic = config.arithmetic
    delta_dtype = config.delta_dtype if arithmetic == "float32" else arithmetic
    shared = config.combine, delta_dtype, config.allow_nonfinite
    steps = {"stepwise": True, "divide": config.divide, "arithmetic": arithmetic} if config.is_stepwise else {}
    plain = Elementwise("magnitude", *shared, **steps)
    if config.score is None:
        return plain, plain
    gains = SCALES[config.scale].gains or SCORES[config.score].gain is None
    return Elementwise(config.score, *shared, config.compares_rows, gains, **steps), plain
