"""The jitted functions of a merge, one compilation per matrix shape, lifted over the mesh's rows.

Sums are several jitted functions on purpose: within one, XLA on a CPU fuses the folds into a loop that it does not
vectorise, at ten times the cost (60 ms in place of 5 for a 5632 × 2048 pair).
"""

from collections.abc import Callable
from functools import cache, cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dppa_jax.delta import fold
from dppa_jax.delta.ranks import Ranked, host_ranks
from dppa_jax.delta.rounding import rounded
from dppa_jax.delta.score import float_keys
from dppa_jax.merging.elementwise import Elementwise
from dppa_jax.runtime.mesh import over_rows, put_rows

ZERO = np.int32(0)


class Kernels:
    """Functions of (base, expert, ...) matrices (rows, columns) in the checkpoint's dtypes, rows sharded."""

    def __init__(self, mesh: Mesh, elementwise: Elementwise):
        self.mesh, self.elementwise = mesh, elementwise
        self._over_rows = partial(over_rows, mesh)
        self._merges: dict[np.dtype | tuple | None, Callable] = {}
        self._samples: dict[tuple[int, bool], Callable] = {}

    def row_sums(self, term: str, base: jax.Array, expert: jax.Array, *per_row: jax.Array) -> jax.Array:
        """Σ over columns of fold.<term>(δ, *per_row), folded to (rows, ⌈columns/64⌉): see `host_sums`."""
        return self._fold_again(self._sums[term](base, expert, *per_row))

    def counts(self, base: jax.Array, expert: jax.Array, inputs, bounds: jax.Array) -> jax.Array:
        """How many keys of each row are at or above each of its four bounds: (rows, 4) int32."""
        return self._unpack(*self._fold_bytes(self._fold_again(self._reached(base, expert, inputs, bounds))))

    @cached_property
    def _sums(self):
        def folded(term, base, expert, *per_row):
            def of_columns(columns):
                return term(self.elementwise.delta(base[:, columns], expert[:, columns]), *per_row)

            return fold.fold(base.shape[1], of_columns)

        terms = (fold.absolute, fold.square, fold.above)
        return {term.__name__: self._over_rows(partial(folded, term)) for term in terms}

    def product_sums(self, base: jax.Array, expert: jax.Array, of_column: np.ndarray) -> jax.Array:
        """Σ over columns of c and of c², c = δ·(a number for each column), as one complex number: see `host_sums`."""
        return self._fold_again(self._products(ZERO, of_column[None], base, expert))

    def size_sums(self, sizes: jax.Array) -> jax.Array:
        """Σ over columns of what `sizes` gives, folded to (rows, ⌈columns/64⌉): see `host_sums`."""
        return self._fold_again(self._fold_again(sizes))

    @cached_property
    def sizes(self):
        """The score of every element, of a score that is a float32 number: (rows, columns)."""

        def sizes(base, expert, inputs):
            column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)
            keys = self.elementwise.keys(self.elementwise.delta(base, expert), inputs, column)
            return lax.bitcast_convert_type(keys, jnp.float32)

        return self._over_rows(sizes)

    @cached_property
    def _products(self):
        def folded(zero, of_column, base, expert):
            def of_columns(columns):
                delta = self.elementwise.delta(base[:, columns], expert[:, columns])
                product = rounded(delta * of_column[:, columns], zero)
                return lax.complex(product, rounded(product * product, zero))

            return fold.fold(base.shape[1], of_columns)

        return over_rows(self.mesh, folded, replicated=(0, 1))

    @cached_property
    def _fold_again(self):
        return self._over_rows(fold.fold_again)

    @cached_property
    def _fold_bytes(self):
        return self._over_rows(fold.fold_bytes)

    @cached_property
    def _unpack(self):
        return self._over_rows(fold.unpack)

    @cached_property
    def _reached(self):
        def reached(base, expert, inputs, bounds):
            def term(columns):
                column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)[:, columns]
                delta = self.elementwise.delta(base[:, columns], expert[:, columns])
                return fold.reached(self.elementwise.keys(delta, inputs, column), bounds)

            return fold.fold(base.shape[1], term)

        return self._over_rows(reached)

    def sample(self, base: jax.Array, expert: jax.Array, inputs, starts: jax.Array, count: int) -> jax.Array:
        """Keys of `count` neighbours in every row, from column starts (rows, 1): (rows, count) uint32."""
        return self._sampled(count, True)(base, expert, inputs, starts)

    def sample_delta(self, base: jax.Array, expert: jax.Array, starts: jax.Array, count: int) -> jax.Array:
        """The same of the deltas themselves: (rows, count) float32."""
        return self._sampled(count, False)(base, expert, None, starts)

    def _sampled(self, count: int, keys: bool):
        def sample(base, expert, inputs, starts):
            delta = self.elementwise.delta(*(fold.neighbours(x, starts, count) for x in (base, expert)))
            columns = starts + np.arange(count, dtype=np.int32)
            return self.elementwise.keys(delta, inputs, columns) if keys else delta

        if (count, keys) not in self._samples:
            self._samples[count, keys] = self._over_rows(sample)
        return self._samples[count, keys]

    @cached_property
    def extremes(self):
        """Least and greatest delta of each row: (rows, 2)."""

        def extremes(base, expert):
            delta = self.elementwise.delta(base, expert)
            return jnp.stack([delta.min(axis=1), delta.max(axis=1)], axis=1)

        return self._over_rows(extremes)

    def ranked(self, base: jax.Array, expert: jax.Array, inputs):
        """Return score inputs with the ranks within rows, found on the host, where that is faster: on a CPU."""
        if not self.elementwise.ranks_rows or self.mesh.devices.flat[0].platform != "cpu":
            return inputs
        return Ranked(inputs, put_rows(self.mesh, host_ranks(np.asarray(self._ranked(base, expert, inputs)))))

    @cached_property
    def _ranked(self):
        def ranked(base, expert, inputs):
            column = lax.broadcasted_iota(jnp.int32, (1, base.shape[1]), 1)
            return self.elementwise.ranked(self.elementwise.delta(base, expert), inputs, column)

        return self._over_rows(ranked)

    def merge(
        self, output_dtype: np.dtype | None, base: jax.Array, experts, inputs, bounds, weights, numbers=None, total=None
    ) -> jax.Array:
        """base + combine(scale(keep(δₖ))), cast once to the output dtype: (rows, columns).

        `experts`, `inputs`, `bounds` (rows, partitions) and `weights` (rows, partitions) are tuples over experts;
        `numbers` (rows, k) are what the combination has of every tensor, None for nothing. A sum may be made in parts:
        see `Elementwise.merged` for `total`, and for no dtype; the new total is written over the old one.
        """

        if output_dtype not in self._merges:
            lifted, donated = partial(self.merge_rows, output_dtype), () if output_dtype else (7,)
            self._merges[output_dtype] = over_rows(self.mesh, lifted, (0,), donated)
        return self._merges[output_dtype](ZERO, base, experts, inputs, bounds, weights, numbers, total)

    def weighted(
        self, output_dtype: np.dtype | None, base: jax.Array, experts, coefficients, divisor, total=None
    ) -> jax.Array:
        """Σ cₖ·xₖ over base and experts, over the divisor, cast once to the output dtype: (rows, columns).

        `coefficients` are a tuple of (rows, 1) over base and experts or, after a `total` of what was before, over
        experts; so is `divisor`, which may be None. Without a dtype the new total comes back, in float32, which is
        written over the old one.
        """

        def weighted(zero, base, experts, coefficients, divisor, total):
            models = (base, *experts) if total is None else experts
            merged = self.elementwise.weighted(base, models, coefficients, divisor, zero, total)
            return merged.astype(output_dtype) if output_dtype else merged

        if ("weighted", output_dtype) not in self._merges:
            donated = () if output_dtype else (5,)
            self._merges["weighted", output_dtype] = over_rows(self.mesh, weighted, (0,), donated)
        return self._merges["weighted", output_dtype](ZERO, base, experts, coefficients, divisor, total)

    def inner_products(self, of_deltas: bool, base: jax.Array, first: tuple, second: tuple) -> jax.Array:
        """Σ over columns of x·y for two pairs (x, y) of models or of their deltas, as one complex number.

        See `host_sums`.
        """
        return self._fold_again(self._inner[of_deltas](ZERO, base, first, second))

    def asked_sums(self, term: Callable, base: jax.Array, experts, numbers: jax.Array) -> jax.Array:
        """Σ over columns of the two values of a term of `delta.consensus`, as one complex number: see `host_sums`."""

        def sums(zero, base, experts, numbers):
            def of_columns(columns):
                return lax.complex(*self._asked_of(term, zero, base, experts, numbers, columns))

            return fold.fold(base.shape[1], of_columns)

        return self._fold_again(self._asked("sums", term, sums)(ZERO, base, experts, numbers))

    def asked_counts(self, key: Callable, base: jax.Array, experts, numbers: jax.Array, bounds: jax.Array):
        """How many keys of `delta.consensus` of each row are at or above each of its four bounds: (rows, 4) int32."""

        def reached(zero, base, experts, numbers, bounds):
            def of_columns(columns):
                keys = float_keys(self._asked_of(key, zero, base, experts, numbers, columns))
                return fold.reached(keys, bounds)

            return fold.fold(base.shape[1], of_columns)

        found = self._asked("counts", key, reached)(ZERO, base, experts, numbers, bounds)
        return self._unpack(*self._fold_bytes(self._fold_again(found)))

    def asked_sample(self, key: Callable, base: jax.Array, experts, numbers: jax.Array, starts: jax.Array, count: int):
        """Such keys of `count` neighbours in every row, from column starts (rows, 1): (rows, count) uint32."""

        def sample(zero, base, experts, numbers, starts):
            base, *experts = (fold.neighbours(x, starts, count) for x in (base, *experts))
            return float_keys(self._asked_of(key, zero, base, experts, numbers, slice(None)))

        return self._asked(count, key, sample)(ZERO, base, experts, numbers, starts)

    def _asked_of(self, function, zero, base, experts, numbers, columns: slice):
        start = base[:, columns]
        deltas = [self.elementwise.delta(start, x[:, columns]) for x in experts]
        return function(start.astype(jnp.float32), deltas, numbers, zero)

    def _asked(self, what: str | int, function: Callable, lifted: Callable) -> Callable:
        """Compile what is asked once for each term or key."""
        if (what, function) not in self._merges:
            self._merges[what, function] = over_rows(self.mesh, lifted, replicated=(0,))
        return self._merges[what, function]

    @cached_property
    def maxima(self):
        """Largest weight of each row: (rows,)."""
        return self._over_rows(lambda x: x.astype(jnp.float32).max(axis=1))

    @cached_property
    def _inner(self):
        def folded(vector, zero, base, first, second):
            def of_columns(columns):
                start = base[:, columns]
                pairs = [[vector(start, x[:, columns]) for x in pair] for pair in (first, second)]
                return lax.complex(*(rounded(x * y, zero) for x, y in pairs))

            return fold.fold(base.shape[1], of_columns)

        vectors = {False: self.elementwise.weights, True: self.elementwise.delta}
        return {way: over_rows(self.mesh, partial(folded, vector), (0,)) for way, vector in vectors.items()}

    def merge_rows(self, output_dtype, zero, base, experts, inputs, bounds, weights, numbers, total) -> jax.Array:
        """What `merge` compiles; `zero` is the int32 number 0, unknown to the compiler."""
        each = zip(experts, inputs, bounds, weights, strict=True)
        pruned = [self.elementwise.pruned(base, *of_expert, zero) for of_expert in each]
        return self.elementwise.merged(base, pruned, output_dtype, numbers, zero, total)

    @cached_property
    def prune(self):
        """scale(keep(δ)) of one expert, float32, +0 where nothing is left: (base, expert, inputs, bounds, weights)."""

        def prune(zero, base, expert, inputs, bounds, weights):
            pruned = self.elementwise.pruned(base, expert, inputs, bounds, weights, zero)
            return jnp.where(pruned == 0, 0.0, pruned)  # 0·δ is −0 for a negative δ

        return partial(over_rows(self.mesh, prune, replicated=(0,)), ZERO)

    def kept_sums(self, base: jax.Array, expert: jax.Array, inputs, bounds: jax.Array, weights: jax.Array) -> jax.Array:
        """Σ over columns of |scale(keep(δ))|, folded: see `host_sums`."""
        return self._fold_again(
            self._absolute(self.prune(base, expert, self.ranked(base, expert, inputs), bounds, weights))
        )

    @cached_property
    def _absolute(self):
        return self._over_rows(lambda x: fold.fold(x.shape[1], lambda columns: fold.absolute(x[:, columns])))

    @cached_property
    def _zeros(self):
        return self._over_rows(zeros)

    def nonfinite(self, x: jax.Array) -> bool:
        """Does a matrix hold NaN or Inf?"""
        return not np.isfinite(np.asarray(self._zeros(x))).all()


shared_kernels = cache(Kernels)  # a second merge of the same shapes in this process compiles nothing


def zeros(x: jax.Array) -> jax.Array:
    """0 for each row, NaN where it holds NaN or Inf: both times zero are NaN."""
    return (x.astype(jnp.float32) * 0).sum(axis=1)


def host_sums(folded: jax.Array, rows: int) -> np.ndarray:
    """Add up, in double precision, each of the first `rows` rows of what `row_sums` gives."""
    folded = np.asarray(folded)[:rows]
    return folded.sum(axis=1, dtype=np.complex128 if np.iscomplexobj(folded) else np.float64)
