"""The jitted functions of a merge, one compilation per matrix shape, lifted over the mesh's rows.

Sums are several jitted functions on purpose: within one, XLA on a CPU fuses the folds into a loop that it does not
vectorise, at ten times the cost (60 ms in place of 5 for a 5632 × 2048 pair).
"""

from collections.abc import Callable
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dppa_jax.delta import statistics
from dppa_jax.delta.combine import COMBINATIONS, scaled
from dppa_jax.delta.score import SCORES, delta, finite_delta
from dppa_jax.runtime.mesh import over_rows

ZERO = np.int32(0)


class Kernels:
    """Functions of (base, expert, ...) matrices (rows, columns) in the checkpoint's dtypes, rows sharded."""

    def __init__(self, mesh: Mesh, score: str, combine: str, delta_dtype: str, allow_nonfinite: bool = False):
        self.mesh = mesh
        self.keys = SCORES[score].keys
        self.combine = COMBINATIONS[combine]
        self.delta = partial(finite_delta if allow_nonfinite else delta, dtype=delta_dtype)
        self._over_rows = partial(over_rows, mesh)
        self._merges: dict[np.dtype, Callable] = {}
        self._samples: dict[tuple[int, bool], Callable] = {}

    def row_sums(self, term: str, base: jax.Array, expert: jax.Array, *per_row: jax.Array) -> jax.Array:
        """Σ over columns of statistics.<term>(δ, *per_row), folded to (rows, ⌈columns/64⌉): see `host_sums`."""
        return self._fold_again(self._sums[term](base, expert, *per_row))

    def counts(self, base: jax.Array, expert: jax.Array, side, bounds: jax.Array) -> jax.Array:
        """How many keys of each row are at or above each of its four bounds: (rows, 4) int32."""
        return self._unpack(*self._fold_bytes(self._fold_again(self._reached(base, expert, side, bounds))))

    @cached_property
    def _sums(self):
        def folded(term, base, expert, *per_row):
            return statistics.fold(
                base.shape[1], lambda columns: term(self.delta(base[:, columns], expert[:, columns]), *per_row)
            )

        terms = (statistics.absolute, statistics.square, statistics.above)
        return {term.__name__: self._over_rows(partial(folded, term)) for term in terms}

    @cached_property
    def _fold_again(self):
        return self._over_rows(statistics.fold_again)

    @cached_property
    def _fold_bytes(self):
        return self._over_rows(statistics.fold_bytes)

    @cached_property
    def _unpack(self):
        return self._over_rows(statistics.unpack)

    @cached_property
    def _reached(self):
        def reached(base, expert, side, bounds):
            def term(columns):
                column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)[:, columns]
                keys = self.keys(self.delta(base[:, columns], expert[:, columns]), side, column)
                return statistics.reached(keys, bounds)

            return statistics.fold(base.shape[1], term)

        return self._over_rows(reached)

    def sample(self, base: jax.Array, expert: jax.Array, side, starts: jax.Array, many: int) -> jax.Array:
        """Keys of `many` neighbours in every row, from column starts (rows, 1): (rows, many) uint32."""
        return self._sampled(many, True)(base, expert, side, starts)

    def sample_delta(self, base: jax.Array, expert: jax.Array, starts: jax.Array, many: int) -> jax.Array:
        """The same of the deltas themselves: (rows, many) float32."""
        return self._sampled(many, False)(base, expert, None, starts)

    def _sampled(self, many: int, keys: bool):
        def sample(base, expert, side, starts):
            picked = self.delta(*(statistics.neighbours(x, starts, many) for x in (base, expert)))
            return self.keys(picked, side, starts + np.arange(many, dtype=np.int32)) if keys else picked

        if (many, keys) not in self._samples:
            self._samples[many, keys] = self._over_rows(sample)
        return self._samples[many, keys]

    @cached_property
    def extremes(self):
        """Least and greatest delta of each row: (rows, 2)."""

        def extremes(base, expert):
            d = self.delta(base, expert)
            return jnp.stack([d.min(axis=1), d.max(axis=1)], axis=1)

        return self._over_rows(extremes)

    def merge(self, output_dtype: np.dtype, base: jax.Array, experts, sides, bounds, weights) -> jax.Array:
        """base + combine(scale(keep(δₖ))), cast once to the output dtype: (rows, columns).

        `experts`, `sides`, `bounds` (rows, partitions) and `weights` (rows, partitions) are tuples over experts.
        """

        def merge(zero, base, experts, sides, bounds, weights):
            deltas = [
                self._scaled(base, expert, *of_expert, zero)
                for expert, *of_expert in zip(experts, sides, bounds, weights, strict=True)
            ]
            return (base.astype(jnp.float32) + self.combine(deltas)).astype(output_dtype)

        if output_dtype not in self._merges:
            self._merges[output_dtype] = over_rows(self.mesh, merge, replicated=(0,))
        return self._merges[output_dtype](ZERO, base, experts, sides, bounds, weights)

    @cached_property
    def prune(self):
        """scale(keep(δ)) of one expert, float32, +0 where nothing is left: (base, expert, side, bounds, weights)."""

        def prune(zero, base, expert, side, bounds, weights):
            pruned = self._scaled(base, expert, side, bounds, weights, zero)
            return jnp.where(pruned == 0, 0.0, pruned)  # 0·δ is −0 for a negative δ

        return partial(over_rows(self.mesh, prune, replicated=(0,)), ZERO)

    def _scaled(self, base, expert, side, bounds, weights, zero):
        d = self.delta(base, expert)
        column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)
        return scaled(d, self.keys(d, side, column), bounds, weights, zero)

    @cached_property
    def _zeros(self):
        return self._over_rows(zeros)

    def nonfinite(self, x: jax.Array) -> bool:
        """Does a matrix hold NaN or Inf?"""
        return not np.isfinite(np.asarray(self._zeros(x))).all()


def zeros(x: jax.Array) -> jax.Array:
    """0 for each row, NaN where it holds NaN or Inf: both times zero are NaN."""
    return (x.astype(jnp.float32) * 0).sum(axis=1)


def host_sums(folded: jax.Array, rows: int) -> np.ndarray:
    """The sum, in double precision, of each of the first `rows` rows of what `row_sums` gives."""
    folded = np.asarray(folded)[:rows]
    return folded.sum(axis=1, dtype=np.complex128 if np.iscomplexobj(folded) else np.float64)
