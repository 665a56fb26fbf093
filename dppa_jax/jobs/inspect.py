"""--job=inspect: what the deltas look like before anything is pruned."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from dppa_jax.architecture.specs import Linears, layer_count
from dppa_jax.architecture.table import ARCHITECTURES, known
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.laid_out import rest_of
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import open_job
from dppa_jax.merging.blocks import make_blocks
from dppa_jax.merging.inspection import DECILES, Inspection, inspect_deltas
from dppa_jax.merging.opened import Opened
from dppa_jax.merging.stream import Stream
from dppa_jax.runtime.progress import console, write_json
from dppa_jax.runtime.reading import printable

ARCHITECTURE = "architecture.json"


def run_inspect(job: JobConfig) -> dict[str, Inspection]:
    """Print the tensors, and extremes, deciles, norms and, of a method, significance and rates of the deltas.

    All of it but the tensors goes to inspect.json in --workdir. Where no row of the table of architectures says what
    the tensors are, architecture.json there says how they were taken; corrected, it can be given as --architecture.
    """
    with open_job(job) as opened:
        base, found = opened.base, inspected(opened)
        tensors = _tensors(base)
        if base_stated := getattr(base, "stated", None):
            write_json(Path(job.workdir) / ARCHITECTURE, msgspec.to_builtins(base_stated))
    console().print(tensors)
    _print(found, job.merge)
    write_json(Path(job.workdir) / "inspect.json", {name: _as_json(one, job.merge) for name, one in found.items()})
    return found


def inspected(opened: Opened) -> dict[str, Inspection]:
    """Look at the deltas of all experts of a job."""
    job, plan = opened.job, opened.plan(opened.job.merge)
    blocks = make_blocks(opened.base.specs, plan.block_layers)
    experts, refuse_zeros = list(opened.experts.values()), not job.allow_other_base
    stream = Stream(opened.base, experts, blocks, opened.mesh, plan.resident, refuse_zeros)
    return inspect_deltas(stream, job.merge)


def _tensors(base: Checkpoint) -> Table:
    """List the tensors of the model: a row for each kind, role and shape."""
    groups = Counter((spec.kind, spec.role.value, spec.shape, spec.layer is None) for spec in base.specs.values())
    stated = getattr(base, "stated", None)
    row = next((name for name, row in ARCHITECTURES.items() if not stated and row is known(base.config)), "")
    said = f"the row {row}" if row else "names and shapes"
    table = Table("tensor", "is", "shape", "number", title=f"tensors, by {said}: {layer_count(base.specs)} layers")
    for (kind, role, shape, outside), number in groups.items():
        table.add_row(printable(kind if outside else f"… {kind}"), role, " × ".join(map(str, shape)), str(number))
    if rest := rest_of(base):
        table.add_row(f"{printable(rest[0])}, …", "copied", "", str(len(rest)))
    return table


def _as_json(one: Inspection, config: MergeConfig) -> dict:
    tables = {"norm": one.norms, "relative_norm": one.relative_norms}
    if one.statistics:
        tables["linear_significance"] = one.statistics.linear_outliers
    content = {"min": one.minimum, "deciles": one.deciles, "max": one.maximum, "mean_size": one.mean_size}
    content["whole_relative_norm"] = one.relative_norm
    content |= {name: one.linears.named(table) for name, table in tables.items()}
    if one.statistics:
        content["layer_significance"] = one.statistics.layer_outliers.tolist()
    content["rates"] = {
        f"{rate:g}": one.linears.named(rates) for rate, rates in zip(config.rates, one.rates, strict=True)
    }
    return content


def _print(found: dict[str, Inspection], config: MergeConfig) -> None:
    out = console()
    out.print(delta_table(found))
    for name, one in found.items():
        out.print(
            _by_layer(
                f"{name}: norm of the delta (share of the base's norm)", one.linears, one.norms, one.relative_norms
            )
        )
        if one.statistics:
            shown = one.statistics.linear_outliers / one.statistics.numel
            out.print(_by_layer(f"{name}: significance per parameter", one.linears, shown))
        for rate, rates in zip(config.rates, one.rates, strict=True):
            out.print(_by_layer(f"{name}: rates at {rate:g} by {config.allocate}", one.linears, rates))


def delta_table(found: Mapping[str, Inspection]) -> Table:
    """Return a table of the experts' delta parameters."""
    deciles = [f"{q:.0%}" for q in DECILES]
    table = Table("expert", "min", *deciles, "max", "mean |δ|", "‖δ‖/‖base‖", title="delta parameters")
    for name, one in found.items():
        shown = one.minimum, *one.deciles, one.maximum, one.mean_size
        table.add_row(name, *(f"{value:.2g}" for value in shown), f"{one.relative_norm:.3g}")
    return table


def _by_layer(title: str, linears: Linears, values: np.ndarray, shares: np.ndarray | None = None) -> Table:
    """A row for each layer, a column for each kind of linear; `shares` stand in parentheses beside the values."""
    table = Table("layer", *(kind.split(".")[-1] for kind in linears.kinds), title=title)
    beside = None if shares is None else linears.by_layer(shares)
    for layer, row in enumerate(linears.by_layer(values)):
        cells = ["" if np.isnan(value) else f"{value:.4g}" for value in row]
        if beside is not None:
            cells = [f"{cell} ({share:.1%})" if cell else "" for cell, share in zip(cells, beside[layer], strict=True)]
        table.add_row(str(layer), *cells)
    return table
