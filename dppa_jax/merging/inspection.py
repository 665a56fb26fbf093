"""What deltas look like before they are pruned, and what is left of a layer after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dppa_jax.architecture.specs import Linears, linears_of
from dppa_jax.checkpoint import DTYPE_BY_NAME, Checkpoint
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import Statistics
from dppa_jax.delta.threshold import sample_starts
from dppa_jax.delta.tied import chosen
from dppa_jax.merging.bounds import merge_rates
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.merger import kernels_of
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.merging.stream import Stream
from dppa_jax.merging.survey import surveyed
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.progress import stage

SAMPLED = 4_000_000  # deltas of an expert that its deciles are read from: a standard error of 0.03 % in rank
DECILES = np.linspace(0.1, 0.9, 9)


@dataclass
class Inspection:
    """One expert's delta.

    Attributes:
      minimum, deciles, maximum: of all delta parameters; deciles are weighted sample quantiles.
      mean_size: the mean |δ| over the linears.
      relative_norm: ‖δ‖ / ‖base‖ over all linears together.
      linears: the axis of the arrays below.
      norms: ‖δ‖ (Frobenius) of each linear.
      relative_norms: ‖δ‖ / ‖base‖ of each linear.
      statistics: outliers, where the allocation looks at them.
      rates: (nominal rates, linears).
    """

    minimum: float
    deciles: list[float]
    maximum: float
    mean_size: float
    relative_norm: float
    linears: Linears
    norms: Float[np.ndarray, " linears"]
    relative_norms: Float[np.ndarray, " linears"]
    statistics: Statistics | None
    rates: Float[np.ndarray, "rates linears"]


@dataclass(frozen=True)
class KeptCounts:
    """How many parameters of a linear are kept at a rate, by dimension.

    Attributes:
      linear: its kind, "mlp.up_proj".
      rate: the share removed, as asked for.
      rows: kept parameters of every output dimension.
      columns: kept parameters of every input dimension.
    """

    linear: str
    rate: float
    rows: Int[np.ndarray, " out"]
    columns: Int[np.ndarray, " in_"]


def inspect_deltas(stream: Stream, config: MergeConfig) -> dict[str, Inspection]:
    """Find deciles, extremes, norms, significance and rates of every expert, in one or two passes over the weights."""
    kernels, linears = kernels_of(stream.mesh, config)[1], linears_of(stream.sources[0].specs)
    squares, base_squares = np.zeros((len(config.experts), len(linears))), np.zeros(len(linears))
    sizes, numel = np.zeros(len(config.experts)), 0
    extremes = np.array([[np.inf, -np.inf]] * len(config.experts))
    samples: list[list[tuple[np.ndarray, float]]] = [[] for _ in config.experts]
    share = max(1.0, sum(block.elements for block in stream.blocks) / SAMPLED)
    statistics = surveyed(stream, linears, kernels, config)
    with stage("inspect", stream.pass_bytes(), stream.bytes_read) as progress:
        for _, loaded in stream():
            for x in loaded:
                places = list(x.matrix.linears)
                if places:
                    base_squares[places] = _squares(kernels, x, x.base * 0, x.base)
                    numel += x.matrix.rows * x.matrix.columns
                for e, expert in enumerate(x.experts):
                    low, high = np.asarray(kernels.extremes(x.base, expert))[: x.matrix.rows].T
                    extremes[e] = min(extremes[e][0], low.min()), max(extremes[e][1], high.max())
                    samples[e].append(_sample(kernels, x, e, share))
                    if places:
                        squares[e][places] = _squares(kernels, x, x.base, expert)
                        sizes[e] += host_sums(kernels.row_sums("absolute", x.base, expert), x.matrix.rows).sum()
            progress.advance(stream.bytes_read)
    rates = merge_rates(config, linears, statistics)
    return {
        name: Inspection(
            float(extremes[e][0]),
            _quantiles(samples[e]),
            float(extremes[e][1]),
            float(sizes[e] / numel),
            float(np.sqrt(squares[e].sum() / base_squares.sum())),
            linears,
            np.sqrt(squares[e]),
            np.sqrt(squares[e] / base_squares),
            statistics[e] if statistics else None,
            rates[e],
        )
        for e, name in enumerate(config.experts)
    }


def kept_counts(
    base: Checkpoint, expert: Checkpoint, config: MergeConfig, name: str, decided: Mapping[str, tuple]
) -> list[KeptCounts]:
    """Count the parameters of an expert that a merge by magnitude kept, by linear, rate and dimension.

    Args:
      config: of the merge.
      name: of the expert in it.
      decided: thresholds and densities, each one for each rate of `config.rates`, by the name of the linear.
    """
    counts = []
    for tensor, of_rates in decided.items():
        tuned, plain = (model.read(tensor).astype(np.float32) for model in (expert, base))
        size = np.abs((tuned[: len(plain)] - plain).astype(DTYPE_BY_NAME[config.delta_dtype]).astype(np.float32))
        for rate, threshold, density in zip(config.rates, *of_rates, strict=True):
            kept = size > threshold
            more = round(density * size.size) - int(kept.sum())
            if more > 0:
                kept |= chosen(size == threshold, more, name, tensor)
            counts.append(KeptCounts(base.specs[tensor].kind, rate, kept.sum(axis=1), kept.sum(axis=0)))
    return counts


def delta_sizes(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> dict[str, tuple[float, float]]:
    """Return the mean |δ| and ‖δ‖ / ‖base‖ of every expert, over all linears together; one linear is read at a time."""
    totals, whole, numel = {name: np.zeros(2) for name in experts}, 0.0, 0
    for linear in linears_of(base.specs).names:
        plain = base.read(linear).astype(np.float32)
        whole, numel = whole + float(np.square(plain, dtype=np.float64).sum()), numel + plain.size
        for name, expert in experts.items():
            delta = expert.read(linear).astype(np.float32) - plain
            totals[name] += np.abs(delta).sum(dtype=np.float64), np.square(delta, dtype=np.float64).sum()
    return {name: (float(size / numel), float(np.sqrt(squares / whole))) for name, (size, squares) in totals.items()}


def _squares(kernels: Kernels, x: DeviceMatrix, base, expert) -> np.ndarray:
    return x.matrix.range_sums(host_sums(kernels.row_sums("square", base, expert), x.matrix.rows))


def _sample(kernels: Kernels, x: DeviceMatrix, e: int, share: float) -> tuple[np.ndarray, float]:
    """Some deltas of a matrix and how many each of them stands for."""
    rows, columns = x.matrix.rows, x.matrix.columns
    count = min(columns, max(1, round(columns / share)))
    starts = put_rows(kernels.mesh, sample_starts(rows, columns, count))
    picked = np.asarray(kernels.sample_delta(x.base, x.experts[e], starts, count))[:rows]
    return picked.reshape(-1), columns / count


def _quantiles(samples: Sequence[tuple[np.ndarray, float]]) -> list[float]:
    values = np.concatenate([deltas for deltas, _ in samples])
    weights = np.concatenate([np.full(deltas.size, weight, np.float32) for deltas, weight in samples])
    order = np.argsort(values)
    position = np.cumsum(weights[order], dtype=np.float64)
    return [float(values[order[np.searchsorted(position, q * position[-1])]]) for q in DECILES]
