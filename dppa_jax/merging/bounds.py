"""Pass 2, before the arithmetic: which bounds and weights every row of every expert gets."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dppa_jax.architecture.rules import first_match
from dppa_jax.architecture.specs import LINEARS, linear_name
from dppa_jax.config.merge import MergeConfig, check_tensors
from dppa_jax.delta import scale
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics
from dppa_jax.delta.score import FIRST_BOUND, SCORES, random_bound, row_keys
from dppa_jax.delta.threshold import BOUNDS, SAMPLE, index, order_statistics, sample_starts
from dppa_jax.merging.blocks import Loaded, Part
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.runtime.mesh import PerLayer, put_rows
from dppa_jax.runtime.processes import joined

DECIDED = ("thresholds", "densities")


def allocate(config: MergeConfig, statistics: Statistics) -> np.ndarray:
    """Rates (nominal rates, layers, linears) of one expert, `--tensor_rate` rules last."""
    rates = np.zeros((len(config.rates), *statistics.numel.shape))
    for p, rate in enumerate(config.rates):
        rates[p] = ALLOCATIONS[config.allocate].rates(rate, statistics, config.max_fluctuation)
    for layer, j in np.ndindex(rates.shape[1:]):
        given = first_match(config.tensor_rates, linear_name(layer, j))
        if given is not None:
            rates[:, layer, j] = given
    return rates


class Pruner:
    """Turns rates into bounds and weights, a part at a time, and remembers them for the recipe."""

    def __init__(self, kernels: Kernels, config: MergeConfig, layers: int, norms: Mapping[str, Mapping] | None = None):
        check_tensors(config.coefficients, layers)
        self.kernels, self.config, self.norms = kernels, config, norms or {}
        shape = (len(config.experts), max(len(config.rates), 1), layers, len(LINEARS))
        self.rates = np.zeros(shape)
        self.weights = np.ones(shape)
        self.thresholds = np.zeros(shape)
        self.densities = np.ones(shape)
        self._starts: dict[tuple[int, int, int], jax.Array] = {}
        self._found: dict[tuple, tuple] = {}  # side and bounds, by part and expert: no factor changes them

    def allocate(self, statistics: Sequence[Statistics]) -> None:
        """Rates of every linear from the survey's statistics."""
        if self.config.score:
            self.rates[:] = [allocate(self.config, of_expert) for of_expert in statistics]

    def weigh(self, config: MergeConfig) -> None:
        """Weights of every linear, from the factors and coefficients of `config`, which may change between merges."""
        check_tensors(config.coefficients, self.rates.shape[2])
        self.config = config
        for e, name in enumerate(config.experts):
            # At rate 1 one random number in 2³² is still at its bound: it weighs nothing.
            self.weights[e] = np.where(self.rates[e] < 1, self._scale(name, self.rates[e]), 0.0)

    def _scale(self, expert: str, rates: np.ndarray) -> np.ndarray:
        match self.config.scale:
            case "partition":
                return scale.partition(rates, self.config.factors[expert], self.config.dpa_combine)
            case "q":
                return scale.q(rates, self.config.q[expert])
            case other:
                return scale.SCALES[other](rates)

    def _dense_weight(self, expert: str) -> float:
        """Of a tensor that is not pruned.

        Kept at every rate, it takes the factor that the combination rule gives such an element. Factors of random
        scores also make up for what is dropped, of which there is nothing here: 1/(1 − rate) leaves it as it is.
        """
        if self.config.scale != "partition":
            return 1.0
        factor = scale.partition(np.array(self.config.rates), self.config.factors[expert], self.config.dpa_combine)[0]
        made_up = self.config.score == "random" and self.config.rate < 1
        return float(factor * (1.0 - self.config.rate) if made_up else factor)

    def coefficient(self, expert: str, tensor: str) -> float:
        rule = first_match(self.config.tensor_coefficients, tensor)
        if rule is not None:
            return rule
        given = self.config.coefficients[expert]
        if not isinstance(given, Mapping):
            return given
        if tensor not in given:
            raise ValueError(f"--coefficient of {expert!r}: none for the tensor {tensor}, which the base has.")
        return given[tensor]

    def tables(self, x: Loaded, e: int) -> tuple:
        """(side, bounds, weights) of expert e for a part, on the devices; weights without the coefficient."""
        part, name = x.part, self.config.experts[e]
        if part.linear is None or self.config.score is None:
            pieces = len(part.pieces)
            return None, np.full((pieces, 1), FIRST_BOUND, np.uint32), np.full((pieces, 1), self._dense_weight(name))
        at = (slice(None), list(part.layers), part.linear)
        if (part, e) not in self._found:
            side = self._side(x, e)
            self._found[part, e] = side, self._bounds(x, e, side, at)
        return *self._found[part, e], self.weights[e][at].T

    def decided(self, part: Part) -> dict[str, list]:
        """What was found of a part, for a journal."""
        if part.linear is None:
            return {}
        return {name: getattr(self, name)[:, :, list(part.layers), part.linear].tolist() for name in DECIDED}

    def restore(self, part: Part, decided: Mapping[str, list]) -> None:
        """Take it from a journal."""
        for name, values in decided.items():
            getattr(self, name)[:, :, list(part.layers), part.linear] = values

    def joined(self) -> None:
        """Learn what the other processes found of their layers."""
        for name in DECIDED:
            setattr(self, name, joined(name, getattr(self, name), axis=2))

    def on_rows(self, x: Loaded, per_piece: np.ndarray) -> jax.Array:
        return put_rows(self.kernels.mesh, x.part.per_row(per_piece))

    def _bounds(self, x: Loaded, e: int, side, at) -> np.ndarray:
        """(layers, partitions) uint32 bounds of a linear; what is below is dropped."""
        rates = self.rates[e][at].T
        if self.config.score == "random":
            self.thresholds[e][at], self.densities[e][at] = rates.T, 1.0 - rates.T
            return random_bound(rates)
        numel = x.part.piece_rows * x.part.columns

        def count(bounds):
            rows = np.asarray(self.kernels.counts(x.base, x.experts[e], side, self.on_rows(x, bounds)))
            return rows[: x.part.rows].reshape(len(bounds), -1, BOUNDS).sum(axis=1, dtype=np.int64)

        keys, dropped = order_statistics(count, numel, index(numel, rates), self._sample(x, e, side))
        everything = rates == 0
        self.thresholds[e][at] = np.where(everything, -1.0, keys.view(np.float32)).T
        self.densities[e][at] = np.where(everything, 1.0, 1.0 - dropped / numel).T
        return np.where(everything, FIRST_BOUND, keys + np.uint32(1)).astype(np.uint32)

    def _sample(self, x: Loaded, e: int, side) -> np.ndarray:
        """Keys at a few columns of every row, (layers, samples)."""
        many = max(1, min(x.part.columns, -(-SAMPLE // x.part.piece_rows)))
        shape = (x.part.rows, x.part.columns, many)
        if shape not in self._starts:
            starts = sample_starts(x.part.rows, x.part.columns, many)
            self._starts[shape] = put_rows(self.kernels.mesh, starts)
        keys = np.asarray(self.kernels.sample(x.base, x.experts[e], side, self._starts[shape], many))
        return keys[: x.part.rows].reshape(len(x.part.pieces), -1)

    def _side(self, x: Loaded, e: int):
        """What the score needs beside the delta."""
        part, mesh, name = x.part, self.kernels.mesh, self.config.experts[e]
        match SCORES[self.config.score].side:
            case None:
                return None
            case "row_keys":
                keys = [row_keys(self.config.seed, name, p.name, p.start, p.stop) for p in part.pieces]
                return put_rows(mesh, np.concatenate(keys))
            case "row_sums":
                sums = host_sums(self.kernels.row_sums("absolute", x.base, x.experts[e]), part.rows)
                return put_rows(mesh, sums.astype(np.float32)[:, None])
            case "column_sums":
                shape = (len(part.pieces), part.piece_rows, part.columns)
                base, expert = (np.asarray(a)[: part.rows].astype(np.float32) for a in (x.base, x.experts[e]))
                values = np.abs(expert - base).reshape(shape).sum(axis=1, dtype=np.float64)
            case "activation_norms":
                values = self.norms[name][LINEARS[part.linear]][list(part.layers)]
        layer = part.per_row(np.arange(len(part.pieces), dtype=np.int32))
        return PerLayer(jax.numpy.asarray(values, np.float32), put_rows(mesh, layer))
