"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dppa_jax.architecture.specs import LINEARS, linear_name
from dppa_jax.checkpoint import DTYPES, Checkpoint
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import Statistics
from dppa_jax.delta.threshold import sample_starts
from dppa_jax.merging.blocks import Loaded, Stream
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.merger import merge_rates, pass_bytes, shared_kernels, surveyed
from dppa_jax.runtime.mesh import put_rows
from dppa_jax.runtime.progress import stage


@dataclass(frozen=True)
class Remaining:
    """How many parameters of a linear a rate leaves, by dimension.

    Attributes:
      linear: one of checkpoint.names.LINEARS.
      rate: the share removed, as asked for.
      rows: kept parameters of every output dimension.
      columns: kept parameters of every input dimension.
    """

    linear: str
    rate: float
    rows: Int[np.ndarray, " out"]
    columns: Int[np.ndarray, " in_"]


SAMPLED = 4_000_000  # deltas of an expert that its deciles are read from: a standard error of 0.03 % in rank


DECILES = np.linspace(0.1, 0.9, 9)


@dataclass
class Inspection:
    """One expert's delta. Norms are Frobenius norms (layers, linears); deciles are weighted sample quantiles."""

    minimum: float
    deciles: list[float]
    maximum: float
    norms: np.ndarray
    relative_norms: np.ndarray  # ‖δ‖ / ‖base‖
    statistics: Statistics | None
    rates: np.ndarray  # (nominal rates, layers, linears)


def inspect_deltas(stream: Stream, config: MergeConfig) -> dict[str, Inspection]:
    """Deciles, extremes, norms, significance and rates of every expert."""
    kernels = shared_kernels(stream.mesh, "magnitude", "sum", config.delta_dtype, config.allow_nonfinite)
    layers, many = stream.sources[0].config["num_hidden_layers"], len(config.experts)
    squares, base_squares = np.zeros((many, layers, len(LINEARS))), np.zeros((layers, len(LINEARS)))
    extremes = np.array([[np.inf, -np.inf]] * many)
    samples: list[list[tuple[np.ndarray, float]]] = [[] for _ in range(many)]
    share = max(1.0, sum(block.elements for block in stream.blocks) / SAMPLED)
    statistics = surveyed(stream, kernels, config)
    with stage("inspect", pass_bytes(stream), stream.bytes_read) as progress:
        for _, loaded in stream():
            for x in loaded:
                part = x.part
                if part.linear is not None:
                    base_squares[list(part.layers), part.linear] = _squares(kernels, x, x.base * 0, x.base)
                for e, expert in enumerate(x.experts):
                    low, high = np.asarray(kernels.extremes(x.base, expert))[: part.rows].T
                    extremes[e] = min(extremes[e][0], low.min()), max(extremes[e][1], high.max())
                    samples[e].append(_sample(kernels, x, e, share))
                    if part.linear is not None:
                        squares[e][list(part.layers), part.linear] = _squares(kernels, x, x.base, expert)
            progress.advance(stream.bytes_read)
    rates = merge_rates(stream.sources[0], config, statistics)
    return {
        name: Inspection(
            float(extremes[e][0]),
            _quantiles(samples[e]),
            float(extremes[e][1]),
            np.sqrt(squares[e]),
            np.sqrt(squares[e] / base_squares),
            statistics[e] if statistics else None,
            rates[e],
        )
        for e, name in enumerate(config.experts)
    }


def _squares(kernels: Kernels, x: Loaded, base, expert) -> np.ndarray:
    rows = host_sums(kernels.row_sums("square", base, expert), x.part.rows)
    return rows.reshape(len(x.part.pieces), -1).sum(axis=1)


def _sample(kernels: Kernels, x: Loaded, e: int, share: float) -> tuple[np.ndarray, float]:
    """Some deltas of a part and how many each of them stands for."""
    many = min(x.part.columns, max(1, round(x.part.columns / share)))
    starts = put_rows(kernels.mesh, sample_starts(x.part.rows, x.part.columns, many))
    picked = np.asarray(kernels.sample_delta(x.base, x.experts[e], starts, many))[: x.part.rows]
    return picked.reshape(-1), x.part.columns / many


def _quantiles(samples: Sequence[tuple[np.ndarray, float]]) -> list[float]:
    values = np.concatenate([deltas for deltas, _ in samples])
    weights = np.concatenate([np.full(deltas.size, weight, np.float32) for deltas, weight in samples])
    order = np.argsort(values)
    position = np.cumsum(weights[order], dtype=np.float64)
    return [float(values[order[np.searchsorted(position, q * position[-1])]]) for q in DECILES]


def remaining(
    base: Checkpoint,
    expert: Checkpoint,
    config: MergeConfig,
    layer: int,
    thresholds: Float[np.ndarray, "partitions linears"],
) -> list[Remaining]:
    """How many parameters of a layer are above the thresholds of the score "magnitude", by linear, rate and dimension.

    Args:
      config: of the merge that chose the thresholds.
      layer: counted from 0.
    """
    found = []
    dtype = DTYPES[config.delta_dtype]
    for j, linear in enumerate(LINEARS):
        name = linear_name(layer, j)
        tuned, plain = (model.read(name).astype(np.float32) for model in (expert, base))
        size = np.abs((tuned[: len(plain)] - plain).astype(dtype).astype(np.float32))
        for rate, threshold in zip(config.rates, thresholds[:, j], strict=True):
            kept = size > threshold
            found.append(Remaining(linear, rate, kept.sum(axis=1), kept.sum(axis=0)))
    return found
