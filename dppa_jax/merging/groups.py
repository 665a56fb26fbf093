"""Heads and neurons: which linears drop them together, and which of them matter least, in a pass of its own."""

from dataclasses import replace

import jax
import numpy as np

from dppa_jax.architecture.rules import first_match
from dppa_jax.architecture.specs import CheckpointError, Group, Linears
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import SCORES
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.elementwise import elementwise_of
from dppa_jax.merging.kernels import Kernels, host_sums, shared_kernels
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.merging.stream import Stream
from dppa_jax.runtime.progress import stage


def check_groups(config: MergeConfig, linears: Linears) -> None:
    """Refuse to drop heads and neurons where they are not known, or where linears of a group have several rates."""
    if not config.drops_units:
        return
    rates: dict[str, tuple[float | None, str]] = {}
    for spec in linears.specs:
        if not spec.group:
            raise CheckpointError(
                f"--score={config.score}: of which heads or neurons {spec.name} consists is known only of families "
                f"that the table of architectures has; give a score of rows or columns."
            )
        rate = first_match(config.tensor_rates, spec.name)
        other, name = rates.setdefault(spec.group.name, (rate, spec.name))
        if other != rate:
            raise ValueError(
                f"--tensor_rate: {name} and {spec.name} get several rates, and --score={config.score} drops "
                f"{spec.group.kind} from both of them alike; give all linears of {spec.group.name} one rate."
            )


def rank_units(stream: Stream, pruner: Pruner, quiet: bool = False) -> None:
    """Rank the heads and neurons of every expert by the sums of a score over them, in a pass over the layers.

    The importance of a unit is the sum over all its elements, in all linears of its group. Float32 scores are added
    over rows as `fold` does or, where units are columns, over columns on the host, and all else on the host, in
    float64: ranks are the same on any mesh and in any blocks. Of units of equal importance the first has the lowest
    rank. Each process ranks those of its own layers. Nothing is done where units are not ranked.
    """
    if not pruner.config.ranks_units:
        return
    alone = replace(pruner.config, score=SCORES[pruner.config.score].sums)
    kernels = shared_kernels(pruner.kernels.mesh, elementwise_of(alone)[0])
    elements = Pruner(kernels, alone, pruner.linears, pruner.norms)
    sums: list[dict[str, np.ndarray]] = [{} for _ in alone.experts]
    blocks = [block for block in stream.blocks if block.layers]
    with stage("groups", sum(map(stream.block_bytes, blocks)), stream.bytes_read, quiet) as progress:
        for _, loaded in stream(blocks):
            for x in (x for x in loaded if x.matrix.linears):
                groups = [pruner.linears.specs[place].group for place in x.matrix.linears]
                for e, found in enumerate(sums):
                    sizes = kernels.sizes(x.base, x.experts[e], elements.placed_inputs(x, e))
                    _add(found, groups, _unit_sums(kernels, x, sizes, groups[0]))
            progress.advance(stream.bytes_read)
    pruner.ranks = [{name: _ranks(of_units) for name, of_units in found.items()} for found in sums]


def _add(found: dict[str, np.ndarray], groups: list[Group], sums: np.ndarray) -> None:
    for group, own in zip(groups, sums, strict=True):
        found[group.name] = found.get(group.name, 0.0) + own


def _unit_sums(kernels: Kernels, x: DeviceMatrix, sizes: jax.Array, group: Group) -> np.ndarray:
    """Add up the sizes of each unit of every range of a matrix, (ranges, units) float64."""
    matrix, ranges = x.matrix, len(x.matrix.ranges)
    if group.rows:
        lines = host_sums(kernels.size_sums(sizes), matrix.rows)
    else:
        lines = np.asarray(sizes)[: matrix.rows].reshape(ranges, -1, matrix.columns).sum(axis=1, dtype=np.float64)
    return lines.reshape(ranges, group.units, -1).sum(axis=2)


def _ranks(importance: np.ndarray) -> np.ndarray:
    """Return the place of each unit in the order of importance, from 0 for the least."""
    ranks = np.empty(len(importance), np.uint32)
    ranks[np.argsort(importance, kind="stable")] = np.arange(len(importance))
    return ranks
