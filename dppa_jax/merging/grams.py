"""Coefficients of whole tensors: inner products of the models' tensors, exact and in float64 on the host."""

from itertools import combinations_with_replacement

import jax
import numpy as np

from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.blocks import cut_tensors
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.merging.stream import Stream
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.progress import stage


class Grams:
    """Finds the coefficients of every tensor, from its Gram matrix where the method looks at one.

    A tensor that is in one matrix as a whole is added up when it is merged. One that is cut into several, as embeddings
    are, is read once more before.
    """

    def __init__(self, kernels: Kernels, config: MergeConfig, pruner: Pruner):
        self._kernels, self._config, self._pruner = kernels, config, pruner
        self._whole = config.combination.whole
        self._known: dict[str, np.ndarray] = {}  # of cut tensors, (pairs,)
        models = len(config.experts) + (not self._whole.of_deltas)
        self._pairs = list(combinations_with_replacement(range(models), 2))

    def survey(self, stream: Stream, quiet: bool) -> None:
        """Add up the tensors that are cut into several matrices."""
        asks = self._config.combination.asks_tensors and not self._config.combines_rows
        cut = [block for own in cut_tensors(stream.blocks).values() for block in own] if asks else []
        if not cut:
            return
        rows: dict[str, list[np.ndarray]] = {}
        with stage("inner products", stream.pass_bytes(cut), quiet=quiet) as progress:
            for _, loaded in stream(cut):
                for x in loaded:
                    rows.setdefault(x.matrix.ranges[0].name, []).append(self._products(x))
                progress.advance(stream.bytes_read)
        self._known = {name: np.concatenate(parts).sum(axis=0) for name, parts in rows.items()}

    def merged(
        self, kernels: Kernels, x: DeviceMatrix, dtype: np.dtype | None, total: jax.Array | None = None
    ) -> jax.Array:
        """Merge a matrix, cast once to the dtype; None for it, and `total`, where experts are added up in parts."""
        return kernels.weighted(dtype, x.base, x.experts, *self.on_rows(x), total)

    def on_rows(self, x: DeviceMatrix) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Put the coefficients of every model, and the divisors, onto the devices for each row of a matrix.

        Of experts that are not there, and of the base where it was seen before, there are none; nor are there divisors
        before the last expert.
        """
        found, divisor = self.coefficients(x)
        found = found[:, (x.first and x.first + 1) : x.places.stop + 1]
        divisor = divisor if x.places.stop == len(self._config.experts) else None
        per_row = found if len(found) == x.matrix.rows else x.matrix.per_row(found)
        columns = per_row.astype(np.float32).T[:, :, None]
        over = None if divisor is None else self._pruner.on_rows(x, divisor.astype(np.float32)[:, None])
        return tuple(put_rows(self._kernels.mesh, column) for column in columns), over

    def coefficients(self, x: DeviceMatrix) -> tuple[np.ndarray, np.ndarray | None]:
        """Find the coefficients of a matrix, (tensors or rows, base and experts), and its divisors, if it has any.

        Raises:
          ValueError: names the tensor that the method cannot merge.
        """
        ranges = x.matrix.ranges
        weights = np.array([self._weights(one.name) for one in ranges])
        by_row = self._config.combines_rows
        own = self._pruner.options(self._config.method_options, [one.name for one in ranges])
        if by_row:
            weights, own = x.matrix.per_row(weights), {name: x.matrix.per_row(each) for name, each in own.items()}
        given = weights[:, self._whole.of_deltas :], own
        try:
            with np.errstate(invalid="ignore"):  # NaN and Inf are told of where the merge is checked
                found = self._whole.coefficients(self._gram(x, by_row) if self._whole.gram else None, *given)
                divisor = None if self._whole.divisor is None else self._whole.divisor(*given)
        except ValueError as error:
            raise ValueError(f"{ranges[0].name}: --method={self._config.method}: {error}") from error
        if self._whole.of_deltas:
            found = np.concatenate([1 - found.sum(axis=1, keepdims=True), found], axis=1)
        return found, divisor

    def _weights(self, tensor: str) -> list[float]:
        """What the coefficients of base and experts are given as."""
        return [self._pruner.coefficient(name, tensor) for name in ("base", *self._config.experts)]

    def _gram(self, x: DeviceMatrix, by_row: bool) -> np.ndarray:
        if by_row:
            products = self._products(x)
        elif x.matrix.ranges[0].name in self._known:
            products = self._known[x.matrix.ranges[0].name][None]
        else:
            rows = self._products(x)
            products = np.array([rows[at].sum(axis=0) for _, at in x.matrix.places()])
        gram = np.empty((len(products), self._pairs[-1][0] + 1, self._pairs[-1][0] + 1))
        for (i, j), each in zip(self._pairs, products.T, strict=True):
            gram[:, i, j] = gram[:, j, i] = each
        return gram

    def _products(self, x: DeviceMatrix) -> np.ndarray:
        """Inner products of every row of every pair of models, (rows, pairs); two pairs in a read."""
        models = x.experts if self._whole.of_deltas else (x.base, *x.experts)
        pairs = [(models[i], models[j]) for i, j in self._pairs]
        of_deltas = self._whole.of_deltas
        folded = [
            self._kernels.inner_products(of_deltas, x.base, first, second)
            for first, second in zip(pairs[::2], [*pairs[1::2], pairs[-1]], strict=False)
        ]
        sums = [host_sums(each, x.matrix.rows) for each in folded]
        return np.stack([part for both in sums for part in (both.real, both.imag)], axis=1)[:, : len(pairs)]
