"""The merge, top to bottom: survey, allocate, apply, write."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh

from dppa_jax.architecture.rules import check_patterns
from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.protocol import Sink, Source
from dppa_jax.checkpoint.safetensors import common_dtype
from dppa_jax.config.merge import Coefficient, MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics
from dppa_jax.merging.blocks import Block, Loaded, Part, Stream, make_blocks, shares
from dppa_jax.merging.bounds import Pruner, allocate
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.survey import NonfiniteError, survey
from dppa_jax.runtime.files import sources_digest
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.progress import stage

SEARCHES = 2  # thresholds sought at a time: one's host work beside another's counting
CODE = (
    "delta/*.py",
    "merging/kernels.py",
    "merging/bounds.py",
    "merging/survey.py",
    "merging/merger.py",
    "merging/blocks.py",
    "runtime/mesh.py",
)
ARITHMETIC = sources_digest(*CODE)  # of the code that decides a merge's bits
WRITES_BEHIND = 4  # finished matrices that may wait for the disk

shared_kernels = cache(Kernels)  # a second merge of the same shapes in this process compiles nothing


@dataclass(frozen=True)
class Layout:
    """How the work is cut and placed: this `process` of several has the tensors that `blocks.owners` gives it."""

    block_layers: int = 1
    resident: bool = False
    processes: int = 1
    process: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a merge decided, of all processes: arrays (experts, partitions, layers, linears)."""

    rates: np.ndarray
    thresholds: np.ndarray
    densities: np.ndarray
    weights: np.ndarray
    statistics: list[Statistics] | None
    bytes_read: int  # by this process


def merge_checkpoints(
    base: Source,
    experts: Mapping[str, Source],
    config: MergeConfig,
    sink: Sink,
    mesh: Mesh,
    layout: Layout,
    delta_sinks: Mapping[str, Sink] | None = None,
    norms: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    quiet: bool = False,
    journal: Journal | None = None,
) -> Outcome:
    """merged = base + combine(λₖ · scaleₖ(keepₖ(expertₖ − base))), block by block, into `sink`: see `Merger`."""
    return Merger(base, experts, config, mesh, layout, norms, quiet, journal)(sink, delta_sinks)


class Merger:
    """Merges the same checkpoints, again and again with other factors and coefficients.

    The survey and the thresholds are made once, at the first merge. A further one is a fused pass over the weights,
    which are read again unless they are resident.

    Args:
      base, experts: open checkpoints; experts in the order in which their deltas are added.
      config: what is computed.
      norms: per expert and linear, activation norms (layers, columns) for the score "wanda".
      quiet: no progress, no log.
      journal: of an earlier run, whose work is not done again; only for one merge.

    Raises CheckpointError for experts that do not fit the base, and for NaN or Inf unless `config.allow_nonfinite`.
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source],
        config: MergeConfig,
        mesh: Mesh,
        layout: Layout,
        norms: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        quiet: bool = False,
        journal: Journal | None = None,
    ):
        specs = check_compatible(base, experts, quiet)
        for rules, flag in (
            (config.tensor_rates, "--tensor_rate"),
            (config.tensor_coefficients, "--tensor_coefficient"),
        ):
            check_patterns(rules, specs, flag)
        self.base, self.config, self.quiet, self._journal = base, config, quiet, journal or Journal()
        blocks = make_blocks(shares(specs, layout.processes)[layout.process], layout.block_layers)
        self._stream = Stream(base, list(experts.values()), blocks, mesh, layout.resident)
        self._kernels, self._dense = kernels_of(mesh, config)
        self._pruner = Pruner(self._kernels, config, base.config["num_hidden_layers"], norms)
        self._surveyed = False
        self._statistics: list[Statistics] | None = None

    def __call__(
        self,
        sink: Sink,
        delta_sinks: Mapping[str, Sink] | None = None,
        factors: Mapping[str, tuple[float, ...]] | None = None,
        coefficients: Mapping[str, Coefficient] | None = None,
    ) -> Outcome:
        """Merge once.

        Args:
          sink: receives the merged rows in the output dtype (`config.output_dtype`, or each base tensor's own).
          delta_sinks: per expert, receives its pruned and scaled delta in `config.delta_dtype`.
          factors, coefficients: in place of the config's.
        """
        config = self.merge_config(factors, coefficients)
        stream, pruner, one_pass = self._stream, self._pruner, pass_bytes(self._stream)
        if not self._surveyed:
            self._survey()
        pruner.weigh(config)
        with (
            stage("merge", one_pass, stream.bytes_read, self.quiet) as progress,
            ThreadPoolExecutor(1, "write") as writer,
            ThreadPoolExecutor(SEARCHES, "threshold") as searcher,
        ):
            pending = []
            for _, loaded in stream(self._undone()):
                searches = [[searcher.submit(pruner.tables, x, e) for e in range(len(config.experts))] for x in loaded]
                checks = []
                for x, found in zip(loaded, searches, strict=True):
                    chosen = self._kernels if x.part.linear is not None else self._dense
                    tables = [f.result() for f in found]
                    merged = merge_part(x, tables, chosen, pruner, self.base, config, delta_sinks)
                    checks.append(searcher.submit(check_finite, x, merged, chosen, config))
                    pending.append(writer.submit(self._write, sink, x, merged, config, checks[-1]))
                    while len(pending) > WRITES_BEHIND:
                        pending.pop(0).result()
                for check in checks:  # with them the merges are done: the next block may be read over this one
                    check.result()
                progress.advance(stream.bytes_read)
            for future in pending:
                future.result()
        pruner.joined()
        tables = (pruner.rates, pruner.thresholds, pruner.densities, pruner.weights.copy())
        return Outcome(*tables, self._statistics, stream.bytes_read)

    def merge_config(
        self,
        factors: Mapping[str, tuple[float, ...]] | None = None,
        coefficients: Mapping[str, Coefficient] | None = None,
    ) -> MergeConfig:
        """The config of a merge with these factors and coefficients."""
        chosen = {"factors": factors, "coefficients": coefficients}
        return replace(self.config, **{name: value for name, value in chosen.items() if value is not None})

    def _undone(self) -> list[Block]:
        """The blocks without the parts that an earlier run has merged."""
        blocks = []
        for block in self._stream.blocks:
            left = []
            for part in block.parts:
                if (decided := self._journal.get(_key(part))) is None:
                    left.append(part)
                else:
                    self._pruner.restore(part, decided)
            if left:
                blocks.append(block if len(left) == len(block.parts) else replace(block, parts=tuple(left)))
        return blocks

    def _write(self, sink: Sink, x: Loaded, merged: jax.Array, config: MergeConfig, check: Future) -> None:
        _write_pieces(sink, x, np.asarray(merged), lambda name: _output_dtype(name, self.base, config))
        check.result()
        self._journal.add(_key(x.part), self._pruner.decided(x.part))

    def _survey(self) -> None:
        self._statistics = surveyed(self._stream, self._dense, self.config, self.quiet, self._journal)
        self._pruner.allocate(self._statistics or [_numel_only(self.base)] * len(self.config.experts))
        self._surveyed = True


def merge_part(
    x: Loaded, tables: list[tuple], kernels: Kernels, pruner: Pruner, base: Source, config: MergeConfig, delta_sinks
) -> jax.Array:
    """The merged rows of a part, on the devices; its pruned deltas go to `delta_sinks`."""
    sides, bounds, weights = [], [], []
    for e, (name, (side, bound, weight)) in enumerate(zip(config.experts, tables, strict=True)):
        sides.append(side)
        bounds.append(pruner.on_rows(x, bound))
        if delta_sinks:
            plain = pruner.on_rows(x, weight.astype(np.float32))
            rows = np.asarray(kernels.prune(x.base, x.experts[e], side, bounds[-1], plain))
            _write_pieces(delta_sinks[name], x, rows, lambda _: np.dtype(config.delta_dtype))
        coefficients = np.array([[pruner.coefficient(name, piece.name)] for piece in x.part.pieces])
        weights.append(pruner.on_rows(x, (weight * coefficients).astype(np.float32)))
    dtype = common_dtype(_output_dtype(piece.name, base, config) for piece in x.part.pieces)
    return kernels.merge(dtype, x.base, x.experts, tuple(sides), tuple(bounds), tuple(weights))


def check_finite(x: Loaded, merged: jax.Array, kernels: Kernels, config: MergeConfig) -> None:
    """Raises CheckpointError for NaN or Inf, unless the config allows them."""
    jax.block_until_ready(merged)
    if not config.allow_nonfinite and kernels.nonfinite(merged):
        raise _locate_nonfinite(x, config)


def _key(part: Part) -> str:
    """Of a part that is merged, in a journal."""
    return f"merge {part.pieces[0].name} {part.pieces[0].start}"


def _write_pieces(sink: Sink, x: Loaded, rows: np.ndarray, dtype: Callable[[str], np.dtype]) -> None:
    row = 0
    for piece in x.part.pieces:
        stop = row + piece.stop - piece.start
        sink.write_rows(piece.name, piece.start, rows[row:stop].astype(dtype(piece.name), copy=False))
        row = stop


def output_tensors(base: Source, config: MergeConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every tensor of the merged checkpoint."""
    return {name: (spec.shape, _output_dtype(name, base, config)) for name, spec in base.specs.items()}


def _output_dtype(name: str, base: Source, config: MergeConfig) -> np.dtype:
    from dppa_jax.checkpoint import DTYPES

    return DTYPES[config.output_dtype] if config.output_dtype else base.tensors[name].dtype


def _locate_nonfinite(x: Loaded, config: MergeConfig) -> CheckpointError:
    row = 0
    for piece in x.part.pieces:
        stop = row + piece.stop - piece.start
        for name, array in (("base", x.base), *zip(config.experts, x.experts, strict=True)):
            if not np.isfinite(np.asarray(array[row:stop]).astype(np.float32)).all():
                return NonfiniteError(piece.name, name)
        row = stop
    return CheckpointError(
        f"{x.part.pieces[0].name}: the merged values overflow {config.output_dtype or 'the output dtype'}; "
        f"lower --coefficient or --factors, or give --output_dtype=bfloat16."
    )


def kernels_of(mesh: Mesh, config: MergeConfig) -> tuple[Kernels, Kernels]:
    """Those of pruned linears, and those of dense tensors and of the survey."""
    of = lambda score: shared_kernels(mesh, score, config.combine, config.delta_dtype, config.allow_nonfinite)  # noqa: E731
    return of(config.score or "magnitude"), of("magnitude")


def surveyed(
    stream: Stream, dense: Kernels, config: MergeConfig, quiet: bool = False, journal: Journal | None = None
) -> list[Statistics] | None:
    """Statistics of every expert in a pass over the weights; None where the allocation needs none."""
    if not (config.allocate and ALLOCATIONS[config.allocate].outliers):
        return None
    with stage("survey", pass_bytes(stream), quiet=quiet) as progress:
        return survey(stream, dense, config, progress, journal)


def merge_rates(base: Source, config: MergeConfig, statistics: list[Statistics] | None) -> np.ndarray:
    """The rates of every linear, (experts, nominal rates, layers, linears)."""
    statistics = statistics or [_numel_only(base)] * len(config.experts)
    return np.array([allocate(config, of_expert) for of_expert in statistics])


def _numel_only(base: Source) -> Statistics:
    sizes = [spec.rows * spec.columns for spec in base.specs.values() if spec.linear is not None]
    numel = np.array(sizes, np.float64).reshape(base.config["num_hidden_layers"], -1)
    return Statistics(numel, np.zeros_like(numel), np.zeros(len(numel)))


def pass_bytes(stream: Stream) -> int:
    return sum(
        (piece.stop - piece.start) * part.columns * source.tensors[piece.name].dtype.itemsize
        for block in stream.blocks
        for part in block.parts
        for piece in part.pieces
        for source in stream.sources
    )
