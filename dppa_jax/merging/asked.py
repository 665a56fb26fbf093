"""What combinations ask of whole tensors: sums and order statistics, exact, on the host."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.consensus import Asked, Key, Term
from dppa_jax.delta.threshold import SAMPLE, order_statistics, sample_starts
from dppa_jax.merging.blocks import cut_tensors
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.merging.stream import Stream
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.progress import stage

Pieces = Callable[[], Iterable[DeviceMatrix]]


class TensorNumbers:
    """Finds the numbers that a combination has of every tensor.

    A tensor that is in one matrix as a whole is asked when it is merged. One that is cut into several, as embeddings
    are, is read before, as often as it is asked.
    """

    def __init__(self, kernels: Kernels, config: MergeConfig, pruner: Pruner):
        self._kernels, self._config, self._pruner = kernels, config, pruner
        self._known: dict[str, np.ndarray] = {}  # of cut tensors, (1 or rows, k)

    def survey(self, stream: Stream, quiet: bool) -> None:
        """Find the numbers of tensors that are cut into several matrices."""
        cut = cut_tensors(stream.blocks) if self._config.combination.asks_tensors else {}
        if not cut:
            return
        with stage("whole tensors", stream.pass_bytes([b for own in cut.values() for b in own]), quiet=quiet):
            for name, blocks in cut.items():
                rows = [matrix.rows for block in blocks for matrix in block.matrices]

                def pieces(blocks=blocks) -> Iterable[DeviceMatrix]:
                    return (x for _, loaded in stream(blocks) for x in loaded)

                self._known[name] = self._numbers(pieces, (name,), sum(rows), blocks[0].matrices[0].columns)

    def on_rows(self, x: DeviceMatrix) -> jax.Array:
        """Put the numbers of every row of a matrix onto the devices, (rows, k)."""
        ranges = x.matrix.ranges
        known = self._known.get(ranges[0].name)
        if known is None:
            names = tuple(one.name for one in ranges)
            known = self._numbers(lambda: [x], names, ranges[0].rows, x.matrix.columns)
        elif len(known) > 1:
            known = known[ranges[0].start : ranges[0].stop]
        rows = known if len(known) == x.matrix.rows else x.matrix.per_row(known)
        rows[:, : len(self._config.experts)] = x.matrix.per_row(self._coefficients([one.name for one in ranges]))
        return put_rows(self._kernels.mesh, rows.astype(np.float32))

    def _numbers(self, pieces: Pieces, names: Sequence[str], rows: int, columns: int) -> np.ndarray:
        """The numbers of tensors of so many rows, (tensors or all their rows, k)."""
        answers = _Answers(self._kernels, pieces, len(names), rows, columns)
        asked = Asked(
            self._coefficients(names),
            self._pruner.options(self._config.method_options, names),
            rows * columns,
            answers.sums,
            answers.row_sums,
            answers.row_maxima,
            answers.ranked,
            answers.per_row,
        )
        return self._config.combination.numbers(asked)

    def _coefficients(self, names: Sequence[str]) -> np.ndarray:
        experts = self._config.experts
        return np.array([[self._pruner.coefficient(expert, name) for expert in experts] for name in names])


class _Answers:
    """Answers for tensors of one shape that lie one below the other in a matrix, or for one that is cut into several.

    Args:
      pieces: gives the matrices, each time anew.
    """

    def __init__(self, kernels: Kernels, pieces: Pieces, tensors: int, rows: int, columns: int):
        self._kernels, self._pieces = kernels, pieces
        self._tensors, self._rows, self._columns = tensors, rows, columns

    def per_row(self, by_tensor: np.ndarray) -> np.ndarray:
        return np.repeat(by_tensor, self._rows, axis=0)

    def sums(self, term: Term, numbers: np.ndarray) -> np.ndarray:
        return self._by_tensor(self.row_sums(term, numbers)).sum(axis=1)

    def row_sums(self, term: Term, numbers: np.ndarray) -> np.ndarray:
        found = []
        for x, own in self._each(numbers):
            sums = host_sums(self._kernels.asked_sums(term, x.base, x.experts, own), x.matrix.rows)
            found.append(np.stack([sums.real, sums.imag], axis=1))
        return np.concatenate(found)

    def row_maxima(self) -> np.ndarray:
        found = [np.asarray(self._kernels.maxima(x.base))[: x.matrix.rows] for x in self._pieces()]
        return np.concatenate(found)

    def ranked(self, key: Key, numbers: np.ndarray, index: np.ndarray) -> np.ndarray:
        per_row = max(1, min(self._columns, -(-SAMPLE // self._rows)))
        starts = np.tile(sample_starts(self._rows, self._columns, per_row), (self._tensors, 1))
        sample = [
            np.asarray(self._kernels.asked_sample(key, x.base, x.experts, own[0], own[1], per_row))[: x.matrix.rows]
            for x, own in self._each(numbers, starts)
        ]

        def count(bounds: np.ndarray) -> np.ndarray:
            rows = [
                np.asarray(self._kernels.asked_counts(key, x.base, x.experts, *own))[: x.matrix.rows]
                for x, own in self._each(numbers, self.per_row(bounds))
            ]
            return self._by_tensor(np.concatenate(rows)).sum(axis=1, dtype=np.int64)

        sampled = np.concatenate(sample).reshape(self._tensors, -1)
        found = order_statistics(count, self._rows * self._columns, index, sampled)
        return found.keys.view(np.float32)

    def _by_tensor(self, per_row: np.ndarray) -> np.ndarray:
        return per_row.reshape(self._tensors, self._rows, -1)

    def _each(self, numbers: np.ndarray, *more: np.ndarray):
        """Every matrix, with the numbers of its rows, and what else there is of them, on the devices."""
        rows = numbers if len(numbers) == self._tensors * self._rows else self.per_row(numbers)
        arrays, start = (rows.astype(np.float32), *more), 0
        for x in self._pieces():
            stop = start + x.matrix.rows
            own = tuple(put_rows(self._kernels.mesh, array[start:stop]) for array in arrays)
            yield x, own if more else own[0]
            start = stop
