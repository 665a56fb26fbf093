"""The merge, top to bottom: survey, allocate, apply, write."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from dppa_jax.architecture.rules import check_patterns
from dppa_jax.architecture.specs import CheckpointError, Linears, TensorSpec, linears_of, pruned_specs
from dppa_jax.checkpoint import DTYPE_BY_NAME
from dppa_jax.checkpoint.dtypes import common_dtype
from dppa_jax.checkpoint.protocol import Headers, LastingSink, Sink, Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient
from dppa_jax.delta.allocate import Statistics
from dppa_jax.merging.asked import TensorNumbers
from dppa_jax.merging.blocks import Block, make_blocks, owners, shares
from dppa_jax.merging.bounds import Norms, Pruner, check_tensors, depth_factors
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.elementwise import elementwise_of
from dppa_jax.merging.grams import Grams
from dppa_jax.merging.groups import check_groups, rank_units
from dppa_jax.merging.kept import tell_of_q, tell_of_ties
from dppa_jax.merging.kernels import Kernels, shared_kernels
from dppa_jax.merging.rows import DeviceMatrix, Matrix
from dppa_jax.merging.solved import InputGrams, Solved
from dppa_jax.merging.stream import Stream
from dppa_jax.merging.survey import NonfiniteError, surveyed
from dppa_jax.runtime import signals
from dppa_jax.runtime.files import sources_digest
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.progress import stage

SEARCHES = 2  # thresholds sought at a time: one's host work beside another's counting
FILES = ("kernels", "elementwise", "bounds", "survey", "grams", "solved", "asked")
FILES += ("merger", "blocks", "rows", "stream", "groups", "vocabulary")
CODE = ("delta/*.py", "runtime/mesh.py", "checkpoint/matched.py", *(f"merging/{name}.py" for name in FILES))
ARITHMETIC = sources_digest(*CODE)  # of the code that decides a merge's bits
WRITES_BEHIND = 4  # finished matrices that may wait for the disk


@dataclass(frozen=True)
class Layout:
    """How the work is cut and placed: this `process` of several has the tensors that `blocks.owners` gives it.

    Attributes:
      small_blocks: see `make_blocks`.
      refuse_zeros: stop at rows that are zeros in one model only; see `zeros.check_zeros`.
    """

    block_layers: int = 1
    resident: bool = False
    processes: int = 1
    process: int = 0
    refuse_zeros: bool = True
    small_blocks: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a merge decided, of all processes: arrays (experts, partitions, linears).

    Attributes:
      linears: the last axis of the arrays.
      bytes_read: by this process.
    """

    linears: Linears
    rates: np.ndarray
    thresholds: np.ndarray
    densities: np.ndarray
    weights: np.ndarray
    statistics: list[Statistics] | None
    bytes_read: int


def merge_checkpoints(
    base: Source,
    experts: Mapping[str, Source],
    config: MergeConfig,
    sink: Sink,
    mesh: Mesh,
    layout: Layout,
    delta_sinks: Mapping[str, Sink] | None = None,
    norms: Norms | None = None,
    quiet: bool = False,
    journal: Journal | None = None,
    input_grams: InputGrams | None = None,
) -> Outcome:
    """merged = base + combine(λₖ · scaleₖ(keepₖ(expertₖ − base))), block by block, into `sink`: see `Merger`."""
    return Merger(base, experts, config, mesh, layout, norms, quiet, journal, input_grams)(sink, delta_sinks)


def check_named(config: MergeConfig, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse coefficients, q and rules that name tensors which the base does not have."""
    check_tensors(config.coefficients, list(specs))
    check_tensors(config.q, linears_of(specs).names, "--q", "linear")
    check_tensors(config.expert_rates, list(specs), "--expert_rate")
    for name, own in config.tensor_options.items():
        check_tensors({expert or "all": numbers for expert, numbers in own.items()}, list(specs), name)
    check_patterns(config.tensor_rates, specs, "--tensor_rate")
    check_patterns(config.tensor_coefficients, specs, "--tensor_coefficient")
    check_groups(config, linears_of(specs))


class Merger:
    """Merges the same checkpoints, again and again with other factors, coefficients and q.

    The survey and the thresholds are made once, at the first merge. A further one is a fused pass over the weights,
    which are read again unless they are resident.

    Args:
      base, experts: open checkpoints; experts in the order in which their deltas are added.
      config: what is computed.
      norms: by expert and tensor, activation norms (columns,) for a score that is calibrated.
      quiet: no progress, no log.
      journal: of an earlier run, whose work is not done again; only for one merge.
      input_grams: products of what linears read, for a combination that solves for them.

    Raises CheckpointError for experts that do not fit the base, and for NaN or Inf unless `config.allow_nonfinite`.
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source],
        config: MergeConfig,
        mesh: Mesh,
        layout: Layout,
        norms: Norms | None = None,
        quiet: bool = False,
        journal: Journal | None = None,
        input_grams: InputGrams | None = None,
    ):
        config = config.of_deltas
        specs = check_compatible(base, experts, quiet=True)  # whoever opened the models has heard the warnings
        check_named(config, specs)
        specs = pruned_specs(specs, config.prune)
        config = with_arithmetic(config, (base, *experts.values()))
        self.base, self.config, self.quiet, self._journal = base, config, quiet, journal or Journal()
        own = shares(specs, layout.processes)[layout.process]
        blocks = make_blocks(own, layout.block_layers, layout.small_blocks)
        self._stream = Stream(base, list(experts.values()), blocks, mesh, layout.resident, layout.refuse_zeros)
        self._kernels, self._dense = kernels_of(mesh, config)
        self._linears, owner = linears_of(specs), owners(specs, layout.processes)
        self._owners = np.array([owner[name] for name in self._linears.names], np.int64)
        self._pruner = Pruner(self._kernels, config, self._linears, norms, depth_factors(config, specs))
        self._tensors = tensors_of(self._dense, config, self._pruner, input_grams)
        self._surveyed = False
        self._statistics: list[Statistics] | None = None

    def __call__(
        self,
        sink: Sink,
        delta_sinks: Mapping[str, Sink] | None = None,
        **overrides: Mapping | None,
    ) -> Outcome:
        """Merge once.

        Args:
          sink: receives the merged rows in the output dtype (`config.output_dtype`, or each base tensor's own).
          delta_sinks: per expert, receives its pruned and scaled delta in `config.delta_dtype`.
          **overrides: see `merge_config`.
        """
        config = self.merge_config(**overrides)
        stream, pruner = self._stream, self._pruner
        at_a_time = len(config.experts) if stream.resident else config.experts_at_a_time
        if not self._surveyed:
            self._survey()
        pruner.weigh(config)
        if not self.quiet:
            tell_of_q(pruner)
        with stage("merge", stream.pass_bytes(most=at_a_time), stream.bytes_read, self.quiet) as progress:
            for _ in self._merged_blocks(sink, delta_sinks or {}, config, at_a_time):
                progress.advance(stream.bytes_read)
        pruner.join(self._owners)
        if not self.quiet:
            tell_of_ties(pruner)
        tables = (pruner.rates, pruner.thresholds, pruner.densities, pruner.weights * pruner.rescales)
        return Outcome(self._linears, *tables, self._statistics, stream.bytes_read)

    def _merged_blocks(
        self, sink: Sink, delta_sinks: Mapping[str, Sink], config: MergeConfig, at_a_time: int
    ) -> Iterator[None]:
        """Merge and write block after block; tell when each is done."""
        pruner, pending, totals = self._pruner, [], {}
        with ThreadPoolExecutor(1, "write") as writer, ThreadPoolExecutor(SEARCHES, "threshold") as searcher:
            for _, loaded in self._stream.grouped(self._undone([sink, *delta_sinks.values()]), at_a_time):
                searches = [[searcher.submit(pruner.bounds_and_weights, x, e) for e in x.places] for x in loaded]
                checks = []
                for x, search in zip(loaded, searches, strict=True):
                    chosen = self._kernels if x.matrix.linears else self._dense
                    per_expert, total = [future.result() for future in search], totals.pop(x.matrix, None)
                    given = pruner, self.base, config, delta_sinks, self._tensors, total
                    merged = merge_matrix(x, per_expert, chosen, *given)
                    checks.append(searcher.submit(check_finite, x, merged, chosen, config))
                    if x.places.stop < len(config.experts):
                        totals[x.matrix] = merged
                        continue
                    pending.append(writer.submit(self._write, sink, x, merged, config, checks[-1]))
                    while len(pending) > WRITES_BEHIND:
                        pending.pop(0).result()
                for check in checks:  # with them the merges are done: the next block may be read over this one
                    check.result()
                yield
            for future in pending:
                future.result()

    def merge_config(
        self,
        factors: Mapping[str, tuple[float, ...]] | None = None,
        coefficients: Mapping[str, Coefficient] | None = None,
        q: Mapping[str, Coefficient] | None = None,
    ) -> MergeConfig:
        """The config of a merge with these factors, coefficients and q in place of its own."""
        chosen = {"factors": factors, "coefficients": coefficients, "q": q}
        config = replace(self.config, **{name: value for name, value in chosen.items() if value is not None})
        if coefficients is not None or q is not None:
            check_named(config, self.base.specs)
        return config

    @property
    def rates(self) -> np.ndarray:
        """The rates of every linear, (experts, partitions, linears), for which the survey is made if it was not yet."""
        if not self._surveyed:
            self._survey()
        return self._pruner.rates

    def _undone(self, sinks: Sequence[Sink]) -> list[Block]:
        """The blocks without the matrices that an earlier run has merged and that are whole in all sinks."""
        blocks = []
        for block in self._stream.blocks:
            left = []
            for matrix in block.matrices:
                decided = self._journal.get(_key(matrix))
                if decided is not None and all(_holds(sink, matrix) for sink in sinks):
                    self._pruner.restore(matrix, decided)
                else:
                    left.append(matrix)
            if left:
                blocks.append(block if len(left) == len(block.matrices) else replace(block, matrices=tuple(left)))
        return blocks

    def _write(self, sink: Sink, x: DeviceMatrix, merged: jax.Array, config: MergeConfig, check: Future) -> None:
        _write_ranges(sink, x, np.asarray(merged), lambda name: _output_dtype(name, self.base, config))
        check.result()
        self._journal.add(_key(x.matrix), self._pruner.decided(x.matrix))

    def _survey(self) -> None:
        self._statistics = surveyed(self._stream, self._linears, self._dense, self.config, self.quiet, self._journal)
        self._pruner.allocate(self._statistics)
        rank_units(self._stream, self._pruner, self.quiet)
        if self._tensors:
            self._tensors.survey(self._stream, self.quiet)
        self._surveyed = True


def merge_matrix(
    x: DeviceMatrix,
    per_expert: list[tuple],
    kernels: Kernels,
    pruner: Pruner,
    base: Headers,
    config: MergeConfig,
    delta_sinks: Mapping[str, Sink] | None,
    tensors: Grams | TensorNumbers | None = None,
    total: jax.Array | None = None,
) -> jax.Array:
    """Merge a matrix on the devices; its pruned deltas go to `delta_sinks`.

    Where more experts follow, the sum of those until here comes back.

    Args:
      per_expert: score inputs, bounds and weights of each expert, as `Pruner.bounds_and_weights` gives them.
      tensors: find what the combination has of whole tensors.
      total: the sum of the experts before; None where there are none.
    """
    inputs, bounds, weights, apart = [], [], [], []
    names = [config.experts[e] for e in x.places]
    for e, (name, (own_inputs, bound, weight)) in enumerate(zip(names, per_expert, strict=True)):
        inputs.append(kernels.ranked(x.base, x.experts[e], own_inputs))
        bounds.append(pruner.on_rows(x, bound))
        if delta_sinks:
            plain = pruner.on_rows(x, weight.astype(np.float32))
            rows = np.asarray(kernels.prune(x.base, x.experts[e], inputs[-1], bounds[-1], plain))
            _write_ranges(delta_sinks[name], x, rows, lambda _: np.dtype(config.delta_dtype))
        scaled = config.combination.prunes  # else the combination has the coefficients
        coefficients = np.array([[pruner.coefficient(name, rows.name) if scaled else 1.0] for rows in x.matrix.ranges])
        apart.append(coefficients)
        weights.append(pruner.on_rows(x, (weight * (1.0 if config.is_stepwise else coefficients)).astype(np.float32)))
    dtype = common_dtype(_output_dtype(rows.name, base, config) for rows in x.matrix.ranges)
    is_last = x.places.stop == len(config.experts)
    if config.combination.whole:
        return tensors.merged(kernels, x, dtype if is_last else None, total)
    each = tuple(inputs), tuple(bounds), tuple(weights)
    numbers = tensors and tensors.on_rows(x)
    if config.is_stepwise:
        own = pruner.options(("lambda", "divide"), [rows.name for rows in x.matrix.ranges])
        numbers = np.column_stack([*apart, own["lambda"], own["divide"]])
        numbers = pruner.on_rows(x, numbers.astype(np.float32))
    return kernels.merge(dtype if is_last else None, x.base, x.experts, *each, numbers, total)


def check_finite(x: DeviceMatrix, merged: jax.Array, kernels: Kernels, config: MergeConfig) -> None:
    """Raise CheckpointError for NaN or Inf, unless the config allows them."""
    jax.block_until_ready(merged)
    if not config.allow_nonfinite and kernels.nonfinite(merged):
        raise _locate_nonfinite(x, merged, config)


def _key(matrix: Matrix) -> str:
    """What a merged matrix is called in a journal."""
    return f"merge {matrix.ranges[0].name} {matrix.ranges[0].start}"


def _holds(sink: LastingSink, matrix: Matrix) -> bool:
    """Whether a sink holds a matrix as an earlier run wrote it."""
    signals.check()
    return all(sink.has_rows(rows.name, rows.start, rows.stop) for rows in matrix.ranges)


def _write_ranges(sink: Sink, x: DeviceMatrix, array: np.ndarray, dtype: Callable[[str], np.dtype]) -> None:
    for rows, at in x.matrix.places():
        sink.write_rows(rows.name, rows.start, array[at].astype(dtype(rows.name), copy=False))


def output_tensors(base: Headers, config: MergeConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every tensor of the merged checkpoint."""
    return {name: (spec.shape, _output_dtype(name, base, config)) for name, spec in base.specs.items()}


def _output_dtype(name: str, base: Headers, config: MergeConfig) -> np.dtype:
    return DTYPE_BY_NAME[config.output_dtype] if config.output_dtype else base.tensors[name].dtype


def _locate_nonfinite(x: DeviceMatrix, merged: jax.Array, config: MergeConfig) -> CheckpointError:
    """Say which model holds the first NaN or Inf or, where all are finite, what overflows."""
    for rows, at in x.matrix.places():
        base, *experts = (np.asarray(array[at]).astype(np.float32) for array in (x.base, *x.experts))
        names = [config.experts[e] for e in x.places]
        for name, weights in zip(("base", *names), (base, *experts), strict=True):
            if not np.isfinite(weights).all():
                return NonfiniteError(rows.name, name)
        for name, expert in zip(names, experts, strict=True):
            if not np.isfinite((expert - base).astype(DTYPE_BY_NAME[config.delta_dtype]).astype(np.float32)).all():
                return CheckpointError(
                    f"{rows.name}: the delta of expert {name!r} overflows --delta_dtype={config.delta_dtype}; give "
                    f"--delta_dtype=float32, or --allow_nonfinite to let it count as 0 there."
                )
    return CheckpointError(
        f"{x.matrix.ranges[0].name}: the merged values overflow {merged.dtype}; lower --coefficient or --factors, or "
        f"give --output_dtype=bfloat16."
    )


def with_arithmetic(config: MergeConfig, models: Iterable[Headers]) -> MergeConfig:
    """Return the config with a dtype for its arithmetic: "inputs" is the one that holds those of all their tensors."""
    if config.arithmetic != "inputs":
        return config
    dtypes = (one.tensors[name].dtype for one in models for name in one.specs)
    return replace(config, arithmetic=common_dtype(dtypes).name)


def tensors_of(
    kernels: Kernels, config: MergeConfig, pruner: Pruner, input_grams: InputGrams | None = None
) -> Grams | TensorNumbers | None:
    """What finds the numbers that the combination has of whole tensors; None where it has none."""
    if config.combination.solves:
        return Solved(kernels, config, pruner, input_grams)
    if config.combination.whole:
        return Grams(kernels, config, pruner)
    return TensorNumbers(kernels, config, pruner) if config.combination.numbers else None


def kernels_of(mesh: Mesh, config: MergeConfig) -> tuple[Kernels, Kernels]:
    """The kernels of pruned linears, and those of dense tensors and of the survey."""
    linear, dense = elementwise_of(config)
    return shared_kernels(mesh, linear), shared_kernels(mesh, dense)
