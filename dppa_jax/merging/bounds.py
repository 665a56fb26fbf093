"""Pass 2, before the arithmetic: which bounds and weights every row of every expert gets."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from dppa_jax.architecture.row import Role
from dppa_jax.architecture.rules import first_match, nearest
from dppa_jax.architecture.specs import Linears, TensorSpec, layer_count
from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import option_of
from dppa_jax.config.numbers import Coefficient
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics
from dppa_jax.delta.scale import SCALES, Numbers, over_depth
from dppa_jax.delta.score import FIRST_BOUND, SCORES, Rows, Units, random_bound
from dppa_jax.delta.threshold import BOUNDS, SAMPLE, cuts, order_statistics, sample_starts
from dppa_jax.delta.tied import Placed, dropped, place_words, ranks_of
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.rows import DeviceMatrix, Matrix
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import PerTensor, put_rows

DECIDED = ("thresholds", "densities", "tied", "rescales")
LEAST_NORM = 1e-7  # a sum of |δ| below this is left as it is, as in mergekit

Norms = Mapping[str, Mapping[str, np.ndarray]]  # by expert and tensor: ‖x_j‖ of its inputs, (columns,)


def allocate(config: MergeConfig, linears: Linears, statistics: Statistics, expert: str = "") -> np.ndarray:
    """Rates (nominal rates, linears) of one expert, its own of single tensors next, `--tensor_rate` rules last.

    Where a number of the scale differs by tensor, as γ of Breadcrumbs may, each linear's rates follow from its own.
    """
    rates, own = np.zeros((len(config.rates), len(linears))), config.expert_rates.get(expert, config.rate)
    by_tensor = own if isinstance(own, Mapping) else {}
    own = config.rate if by_tensor else own
    for p, rate in enumerate(config.rates if own == config.rate else config.rates_of_tensor(own)):
        rates[p] = ALLOCATIONS[config.allocate].rates(rate, statistics, config.max_fluctuation)
    differ = config.tensor_options.keys() & set(SCALES[config.scale].parameters)
    for place, name in enumerate(linears.names):
        rate = first_match(config.tensor_rates, name)
        rate = by_tensor.get(name, own if differ else None) if rate is None else rate
        if rate is not None:
            rates[:, place] = config.rates_of_tensor(rate, name, expert)
    return rates


def merge_rates(config: MergeConfig, linears: Linears, statistics: Sequence[Statistics] | None) -> np.ndarray:
    """Rates of every expert, (experts, nominal rates, linears)."""
    nothing = np.zeros(len(linears)), np.zeros(linears.layers)
    statistics = statistics or [Statistics(linears.layer, linears.numel, *nothing)] * len(config.experts)
    return np.array([allocate(config, linears, *each) for each in zip(statistics, config.experts, strict=True)])


def q_of_all(q: Mapping[str, float], linears: Linears) -> np.ndarray:
    """The divisor of everything that is pruned: its own q, that of its weight (a bias), or the mean of all.

    Source: Deng et al. 2024, the authors' code for encoders.
    """
    mean = sum(q.values()) / len(q)
    weights = [re.sub(r"bias$", "weight", name) for name in linears.names]
    return np.array([q.get(name, q.get(weight, mean)) for name, weight in zip(linears.names, weights, strict=True)])


def depth_factors(config: MergeConfig, specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """What coefficients are multiplied by, for each tensor; nothing without --depth_scaling."""
    if not config.depth_scaling:
        return {}
    layers, started, factors = layer_count(specs), False, {}
    for name, spec in specs.items():
        started |= spec.layer is not None
        outside = layers - 1 if started else 0
        factors[name] = over_depth(outside if spec.layer is None else spec.layer, layers, *config.depth_scaling)
    return factors


class Pruner:
    """Turns rates into bounds and weights, a matrix at a time, and remembers them for the recipe.

    Attributes:
      rates, weights, thresholds, densities: (experts, partitions, linears).
      tied: the share of each linear whose score is the threshold, (experts, partitions, linears).
      ranks: of each expert, by group: the place of each unit in the order of importance, from 0; empty where units are
        not ranked.
      rescales: what the weights of each linear are multiplied by, (experts, 1, linears), so that Σ|δ| stays; else 1.
    """

    def __init__(
        self,
        kernels: Kernels,
        config: MergeConfig,
        linears: Linears,
        norms: Norms | None = None,
        depths: Mapping[str, float] | None = None,
    ):
        self.kernels, self.config, self.linears, self.norms = kernels, config, linears, norms or {}
        self._depths = depths or {}
        shape = (len(config.experts), max(len(config.rates), 1), len(linears))
        self.rates = np.zeros(shape)
        self.weights = np.ones(shape)
        self.thresholds = np.zeros(shape)
        self.densities = np.ones(shape)
        self.tied = np.zeros(shape)
        self.ranks: list[dict[str, np.ndarray]] = [{} for _ in config.experts]
        self.rescales = np.ones((shape[0], 1, shape[2]))
        self._starts: dict[tuple[int, int, int], jax.Array] = {}
        self._found: dict[tuple, tuple] = {}  # inputs and bounds, by matrix and expert: no factor changes them

    def allocate(self, statistics: Sequence[Statistics] | None) -> None:
        """Set the rates of every linear from the survey's statistics; None where there was no survey."""
        if self.config.score:
            self.rates[:] = merge_rates(self.config, self.linears, statistics)

    def weigh(self, config: MergeConfig) -> None:
        """Set the weights of every linear from the factors of `config`, which may change between merges."""
        self.config = config
        for e, name in enumerate(config.experts):
            weights = SCALES[config.scale].weights(self.rates[e], self._numbers(name))
            # At rate 1 one random number in 2³² is still at its bound: it weighs nothing.
            self.weights[e] = np.where(self.rates[e] < 1, weights, 0.0)

    def _numbers(self, expert: str) -> Numbers:
        config = self.config
        q = config.q.get(expert, 1.0)
        divisor = q_of_all(q, self.linears) if isinstance(q, Mapping) else q
        return Numbers(config.factors.get(expert, ()), config.dpa_combine, divisor)

    def _dense_weight(self, expert: str) -> float:
        """The weight of a tensor that is not pruned.

        Kept at every rate, it takes the factor that the combination rule gives such an element. Factors of random
        scores also make up for what is dropped, of which there is nothing here: 1/(1 − rate) leaves it as it is.
        """
        config, scale = self.config, SCALES[self.config.scale]
        if not scale.takes_factors:
            return 1.0
        factor = scale.weights(np.array(config.rates), self._numbers(expert))[0]
        makes_up = config.has_random_score and config.rate < 1
        return float(factor * (1.0 - config.rate) if makes_up else factor)

    def coefficient(self, expert: str, tensor: str) -> float:
        """The coefficient of an expert's tensor: a rule's, the tensor's own, or the expert's; times that of its depth.

        The base's, where a method has one for it, knows no rule and no depth.
        """
        coefficient = self.config.coefficients.get(expert, 1.0)
        own = coefficient[tensor] if isinstance(coefficient, Mapping) else coefficient
        if expert == "base":
            return own
        rule = first_match(self.config.tensor_coefficients, tensor)
        return (own if rule is None else rule) * self._depths.get(tensor, 1.0)

    def options(self, names: Iterable[str], tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """Options of all experts, by name: one number for each tensor."""
        return {name: np.array([option_of(self.config, name, tensor) for tensor in tensors]) for name in names}

    def bounds_and_weights(self, x: DeviceMatrix, e: int) -> tuple:
        """(score inputs, bounds, weights) of expert e for a matrix; weights without the coefficient.

        Bounds and weights are (ranges, partitions), on the host; the score inputs are on the devices. Where ties are
        told apart, the inputs are `Placed` and the bounds pairs, (ranges, partitions, 2).
        """
        matrix, name = x.matrix, self.config.experts[e]
        if not matrix.linears or self.config.score is None:
            ranges = len(matrix.ranges)
            return None, np.full((ranges, 1), FIRST_BOUND, np.uint32), np.full((ranges, 1), self._dense_weight(name))
        places = list(matrix.linears)
        if (matrix, e) not in self._found:
            inputs = self.placed_inputs(x, e)
            self._found[matrix, e] = self._bounds(x, e, inputs)
            if SCALES[self.config.scale].keeps_norm:
                self.rescales[e, 0, places] = self._rescales(x, e, *self._found[matrix, e])
        return *self._found[matrix, e], (self.weights[e] * self.rescales[e])[:, places].T

    def decided(self, matrix: Matrix) -> dict[str, list]:
        """What was found of a matrix, for a journal."""
        at = list(matrix.linears)
        return {name: getattr(self, name)[:, :, at].tolist() for name in DECIDED} if at else {}

    def restore(self, matrix: Matrix, decided: Mapping[str, list]) -> None:
        """Take what was found of a matrix from a journal."""
        for name, values in decided.items():
            getattr(self, name)[:, :, list(matrix.linears)] = values

    def join(self, owners: np.ndarray) -> None:
        """Learn what the other processes found; `owners` says which one has each linear."""
        for name in DECIDED:
            setattr(self, name, processes.joined(name, getattr(self, name), 2, owners))

    def on_rows(self, x: DeviceMatrix, per_range: np.ndarray) -> jax.Array:
        """One value per range, on the devices for each of its rows."""
        return put_rows(self.kernels.mesh, x.matrix.per_row(per_range))

    def score_inputs(self, x: DeviceMatrix, e: int) -> list[np.ndarray] | None:
        """What the score of expert e needs beside the delta: an array for each range, as `delta.score.Inputs` says."""
        wanted = SCORES[self.config.score].inputs
        if wanted is None:
            return None
        sums = _Sums(self.kernels, x, e)
        return [wanted.make(self.rows(e, i, x.matrix, sums)) for i in range(len(x.matrix.ranges))]

    def rows(self, e: int, i: int, matrix: Matrix, sums: "_Sums | None" = None) -> Rows:
        """What a score may ask about range i of a matrix of linears; sums only where the weights are at hand."""
        name, rows = self.config.experts[e], matrix.ranges[i]
        rate = self.rates[e, -1, matrix.linears[i]]
        asks = {"row_sums": lambda: sums.rows(i), "column_sums": lambda: sums.columns(i)} if sums else {}
        norms = self.norms.get(name, {}).get(rows.name)
        if self.config.is_calibrated and self.linears.specs[matrix.linears[i]].role is not Role.LINEAR:
            norms = np.ones(matrix.columns, np.float32)  # its inputs are not measured: |δ| alone ranks
        own = {each: option_of(self.config, each, rows.name, name) for each in SCORES[self.config.score].parameters}
        asks |= {"norms": norms, "units": self._units(e, matrix.linears[i]), "parameters": own}
        return Rows(self.config.seed, name, rows.name, rows.start, rows.stop, float(rate), **asks)

    def _units(self, e: int, place: int) -> Units | None:
        """The heads or neurons of a linear, with their ranks where they are known."""
        spec = self.linears.specs[place]
        if not (group := spec.group):
            return None
        span = (spec.rows if group.rows else spec.columns) // group.units
        return Units(group.name, span, group.rows, self.ranks[e].get(group.name))

    def placed_inputs(self, x: DeviceMatrix, e: int):
        """Put what the score of expert e needs beside the delta onto the devices."""
        if (inputs := self.score_inputs(x, e)) is None:
            return None
        if inputs[0].ndim > 1:
            return put_rows(self.kernels.mesh, np.concatenate(inputs))
        tensor = x.matrix.per_row(np.arange(len(inputs), dtype=np.int32))
        return PerTensor(jax.numpy.asarray(np.stack(inputs)), put_rows(self.kernels.mesh, tensor))

    def _bounds(self, x: DeviceMatrix, e: int, inputs) -> tuple:
        """Score inputs and uint32 bounds of a matrix of linears; what is below is dropped."""
        matrix, places = x.matrix, list(x.matrix.linears)
        rates = self.rates[e][:, places].T
        if not self.config.is_counted:
            bounds, densities = self._known_bounds(matrix, e, rates)
            self.thresholds[e][:, places], self.densities[e][:, places] = rates.T, densities.T
            return inputs, bounds
        numel = matrix.ranges[0].rows * matrix.columns
        count = partial(self._count, x, e, inputs)
        ranks = ranks_of(self.config.ties_rule, numel, rates)
        found = order_statistics(count, numel, ranks, self._sample(x, e, inputs))
        gone = dropped(self.config.ties_rule, numel, rates, found)
        self.thresholds[e][:, places] = np.where(rates == 0, -1.0, found.keys.view(np.float32)).T
        self.densities[e][:, places] = (1.0 - gone / numel).T
        self.tied[e][:, places] = ((found.through - found.below) / numel).T
        bounds = np.where(gone < found.through, found.keys, found.keys + np.uint32(1))
        if not ((found.below < gone) & (gone < found.through)).any():
            return inputs, bounds
        inputs = Placed(inputs, put_rows(self.kernels.mesh, self._place_words(matrix, e)))
        return inputs, np.stack([bounds, cuts(partial(self._count, x, e, inputs), numel, found, gone)], axis=-1)

    def _rescales(self, x: DeviceMatrix, e: int, inputs, bounds: np.ndarray) -> np.ndarray:
        """Σ|δ| / Σ|what is kept of δ| of each range, in the dtype of the arithmetic; 1 where either is nothing."""
        matrix, kernels, dtype = x.matrix, self.kernels, DTYPE_BY_NAME[self.config.arithmetic]
        weights = self.on_rows(x, self.weights[e][:, list(matrix.linears)].T.astype(np.float32))
        kept = kernels.kept_sums(x.base, x.experts[e], inputs, self.on_rows(x, bounds), weights)
        both = kernels.row_sums("absolute", x.base, x.experts[e]), kept
        whole, kept = (matrix.range_sums(host_sums(sums, matrix.rows)).astype(dtype) for sums in both)
        keeps = self.options(["rescale"], [one.name for one in matrix.ranges])["rescale"]
        small = (whole < LEAST_NORM) | (kept < LEAST_NORM) | (keeps == 0)
        return np.where(small, 1, whole / np.where(small, np.ones_like(kept), kept)).astype(np.float64)

    def _known_bounds(self, matrix: Matrix, e: int, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds that need no counting, and the shares that are kept: of random scores, and of ranks."""
        if self.config.compares_rows or self.config.ranks_units:
            ranked = np.array([[self._ranked(place, matrix)] for place in matrix.linears])
            gone = np.minimum((ranked * rates).astype(np.int64), ranked)
            return gone.astype(np.uint32), 1.0 - gone / ranked
        bounds, score = random_bound(rates), SCORES[self.config.score]
        if score.draws is None:
            return bounds, 1.0 - rates
        words = (score.inputs.make(self.rows(e, i, matrix)) for i in range(len(matrix.ranges)))
        draws = (np.asarray(score.draws(each, matrix.columns)) for each in words)
        return bounds, np.array([[(own >= b).mean() for b in of] for own, of in zip(draws, bounds, strict=True)])

    def _ranked(self, place: int, matrix: Matrix) -> int:
        """How many things a linear's ranks compare: its units, or the elements of a row."""
        return self.linears.specs[place].group.units if self.config.ranks_units else matrix.columns

    def _count(self, x: DeviceMatrix, e: int, inputs, bounds: np.ndarray) -> np.ndarray:
        """How many elements of each range are at or above each of its four bounds, (ranges, 4)."""
        rows = np.asarray(self.kernels.counts(x.base, x.experts[e], inputs, self.on_rows(x, bounds)))
        return rows[: x.matrix.rows].reshape(len(bounds), -1, BOUNDS).sum(axis=1, dtype=np.int64)

    def _place_words(self, matrix: Matrix, e: int) -> np.ndarray:
        """(rows, 2) uint32 words with which tied elements are told apart."""
        name, columns = self.config.experts[e], matrix.columns
        return np.concatenate([place_words(name, r.name, r.start, r.stop, columns) for r in matrix.ranges])

    def _sample(self, x: DeviceMatrix, e: int, inputs) -> np.ndarray:
        """Keys at a few columns of every row, (ranges, samples)."""
        matrix = x.matrix
        count = max(1, min(matrix.columns, -(-SAMPLE // matrix.ranges[0].rows)))
        shape = (matrix.rows, matrix.columns, count)
        if shape not in self._starts:
            self._starts[shape] = put_rows(self.kernels.mesh, sample_starts(*shape))
        keys = np.asarray(self.kernels.sample(x.base, x.experts[e], inputs, self._starts[shape], count))
        return keys[: matrix.rows].reshape(len(matrix.ranges), -1)


class _Sums:
    """Sums of |δ| over the rows and over the columns of each range, computed when they are asked for."""

    def __init__(self, kernels: Kernels, x: DeviceMatrix, e: int):
        self._kernels, self._x, self._e = kernels, x, e
        self._of: dict[str, np.ndarray] = {}

    def rows(self, i: int) -> np.ndarray:
        """(rows,) float64."""
        return self._range("rows", self._row_sums, i)

    def columns(self, i: int) -> np.ndarray:
        """(columns,) float64."""
        return self._range("columns", self._column_sums, i)

    def _range(self, name: str, find: Callable[[], np.ndarray], i: int) -> np.ndarray:
        if name not in self._of:
            self._of[name] = find()
        return self._of[name][i]

    def _row_sums(self) -> np.ndarray:
        x, ranges = self._x, len(self._x.matrix.ranges)
        folded = self._kernels.row_sums("absolute", x.base, x.experts[self._e])
        return host_sums(folded, x.matrix.rows).reshape(ranges, -1)

    def _column_sums(self) -> np.ndarray:
        x, matrix = self._x, self._x.matrix
        base, expert = (np.asarray(a)[: matrix.rows].astype(np.float32) for a in (x.base, x.experts[self._e]))
        deltas = np.abs(expert - base).reshape(len(matrix.ranges), -1, matrix.columns)
        return deltas.sum(axis=1, dtype=np.float64)


def check_tensors(
    numbers: Mapping[str, Coefficient], tensors: Sequence[str], flag: str = "--coefficient", what: str = "tensor"
) -> None:
    """Refuse numbers by tensor that lack a tensor of the base, or name one that it has not."""
    known = set(tensors)
    for expert, own in numbers.items():
        if not isinstance(own, Mapping):
            continue
        for name in own:
            if name not in known:
                raise ValueError(f"{flag} of {expert!r}: the base has no {what} {name}.{nearest(name, tensors)}")
        for name in tensors:
            if name not in own:
                raise ValueError(f"{flag} of {expert!r}: none for the {what} {name}; give one number or all {what}s.")
