"""--job=inspect: what the deltas look like before anything is pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich.table import Table

from dppa_jax.architecture.specs import LINEARS, linear_name
from dppa_jax.checkpoint import DTYPES, Checkpoint
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.delta.allocate import Statistics
from dppa_jax.delta.threshold import sample_starts
from dppa_jax.jobs import check_models, open_models, plan_of
from dppa_jax.merge.blocks import Loaded, Stream, make_blocks
from dppa_jax.merge.kernels import Kernels, host_sums
from dppa_jax.merge.merger import merge_rates, pass_bytes, shared_kernels, surveyed
from dppa_jax.report.measurements import Remaining
from dppa_jax.runtime.mesh import make_mesh, put_rows
from dppa_jax.runtime.progress import console, stage, write_json

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


def run_inspect(job: JobConfig) -> dict[str, Inspection]:
    """Print the tables and write them as JSON to inspect.json in --workdir."""
    base, experts = open_models(job)
    check_models(job, base, experts)
    mesh = make_mesh(job.mesh)
    plan = plan_of(job, [base.config, *(e.config for e in experts.values())], mesh.devices.shape)
    stream = Stream(base, list(experts.values()), make_blocks(base.specs, plan.block_layers), mesh, plan.resident)
    found = inspect_deltas(stream, job.merge)
    _print(found, job.merge)
    write_json(Path(job.workdir) / "inspect.json", {name: _as_json(one, job.merge) for name, one in found.items()})
    return found


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


def _as_json(one: Inspection, config: MergeConfig) -> dict:
    tables = {"norm": one.norms, "relative_norm": one.relative_norms}
    if one.statistics:
        tables["linear_significance"] = one.statistics.linear_outliers
    content = {"min": one.minimum, "deciles": one.deciles, "max": one.maximum}
    content |= {name: [dict(zip(LINEARS, row, strict=True)) for row in t.tolist()] for name, t in tables.items()}
    if one.statistics:
        content["layer_significance"] = one.statistics.layer_outliers.tolist()
    content["rates"] = {
        f"{rate:g}": [dict(zip(LINEARS, row, strict=True)) for row in table.tolist()]
        for rate, table in zip(config.rates, one.rates, strict=True)
    }
    return content


def _print(found: dict[str, Inspection], config: MergeConfig) -> None:
    out = console()
    table = Table("expert", "min", *(f"{q:.0%}" for q in DECILES), "max", title="delta parameters")
    for name, one in found.items():
        table.add_row(name, *(f"{value:.2g}" for value in (one.minimum, *one.deciles, one.maximum)))
    out.print(table)
    for name, one in found.items():
        out.print(_by_layer(f"{name}: norm of the delta (share of the base's norm)", one.norms, one.relative_norms))
        if one.statistics:
            shown = one.statistics.linear_outliers / one.statistics.numel
            out.print(_by_layer(f"{name}: significance per parameter", shown))
        for rate, rates in zip(config.rates, one.rates, strict=True):
            out.print(_by_layer(f"{name}: rates at {rate:g} by {config.allocate}", rates))


def _by_layer(title: str, values: np.ndarray, beside: np.ndarray | None = None) -> Table:
    table = Table("layer", *(linear.split(".")[1] for linear in LINEARS), title=title)
    for layer, row in enumerate(values):
        cells = [f"{value:.4g}" for value in row]
        if beside is not None:
            cells = [f"{cell} ({share:.1%})" for cell, share in zip(cells, beside[layer], strict=True)]
        table.add_row(str(layer), *cells)
    return table


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
