"""Base and experts on the devices as a gradient by coefficients needs them: stacked, with what decides their merge.

Rows of all weight matrices are spread over both axes of the mesh, of stacked layers the rows of each layer: a scan over
a layer axis that is spread over devices would gather all layers on each of them. The mesh has the devices of all
processes, each of which reads the rows of its own; statistics and thresholds are found as for a merge, by each process
for its share of the layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dppa_jax.architecture.rules import check_patterns
from dppa_jax.architecture.specs import Role, TensorSpec, linears_of, tree_of
from dppa_jax.checkpoint.dtypes import common_dtype
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.checkpoint.stacked import StoredArray
from dppa_jax.config.conventions import OURS
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.delta.tied import Placed, pairs, place_words
from dppa_jax.merging.blocks import make_blocks, shares, whole_matrix
from dppa_jax.merging.bounds import Norms, Pruner
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.elementwise import Elementwise, elementwise_of
from dppa_jax.merging.groups import rank_units
from dppa_jax.merging.merger import kernels_of, output_tensors
from dppa_jax.merging.rows import DeviceMatrix, Matrix, RowRange
from dppa_jax.merging.stream import Stream
from dppa_jax.merging.survey import surveyed
from dppa_jax.model.config import DecoderConfig
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import AXES, REPLICATED, PerTensor, across_processes, put

CHUNK_ROWS = 4096  # of the vocabulary: with the logits of 6,000 positions 100 MB
Thresholds = dict[tuple[int, int], tuple[np.ndarray | None, np.ndarray]]  # score inputs and bounds by (linear, expert)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "experts", "inputs", "bounds", "weights", "place"),
    meta_fields=("linear", "vector", "stored", "dtype"),
)
@dataclass(frozen=True)
class Tensor:
    """A tensor of base and experts, of all layers or of one, and what decides its merge.

    Attributes:
      base, experts: (layers, rows, columns) or (rows, columns); a vector is one row. Weights of 16 bits are held as
        integers until a layer is cut out: XLA on CPUs would convert all layers to float32 first.
      inputs: per expert, what its score needs beside the delta (`delta.score`); `Placed` where ties are told apart.
      bounds, weights: per expert, (layers, partitions) or (partitions,); weights without the coefficient. Bounds of
        pairs have one axis more.
      place: where the tensor's coefficients are, (layers,) or ().
      linear: is it pruned?
      vector: is it a vector?
      stored: dtypes of base and experts.
      dtype: that of the merge, to which the weights are rounded.
    """

    base: Any
    experts: Any
    inputs: Any
    bounds: Any
    weights: Any
    place: Any
    linear: bool
    vector: bool
    stored: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Arithmetic:
    """What is fixed when a step is compiled.

    Attributes:
      linear, dense: keep·scale·δ of pruned linears, and of all other tensors.
      activations: their dtype.
    """

    model: DecoderConfig
    linear: Elementwise
    dense: Elementwise
    mesh: Mesh
    activations: str

    def elementwise(self, tensor: Tensor) -> Elementwise:
        """The arithmetic of one tensor."""
        return self.linear if tensor.linear else self.dense

    def everywhere(self, tree):
        """Put a whole copy of each array on every device, where any process can fetch it."""
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, REPLICATED))


class Mixture:
    """Base and experts on the devices as stacked trees, with the bounds and weights of a merge of them.

    Args:
      experts: by name, in the order of `config.experts`.
      config: the merge; its coefficients are not looked at, but `tensor_coefficients` are.
      mesh: of this process; the trees are on that and on the like of every other process.
      norms: activation norms for a calibrated score, see `merging.Merger`.

    Attributes:
      names: of the tensors, in the order of the rows of coefficients.
      tree: `Tensor`s at the places of the model's weights.
      rates: of the linears, (experts, partitions, linears).
      model_bytes: of base and experts, per device.
      bytes_read: by this process.
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source],
        config: MergeConfig,
        mesh: Mesh,
        norms: Norms | None = None,
    ):
        check_combine(config)
        config = config.of_deltas
        specs = check_compatible(base, experts, quiet=True)
        check_patterns(config.tensor_rates, specs, "--tensor_rate")
        self.mesh, self.names, self.bytes_read = across_processes(mesh), tuple(specs), 0
        self._sources, model = (base, *experts.values()), DecoderConfig.from_hf(base.config)
        self._pruner = Pruner(kernels_of(mesh, config)[0], config, linears_of(specs), norms)
        self._known = self._thresholds(specs, mesh) if config.score else {}
        self.rates = self._pruner.rates
        self._dtypes = {name: dtype for name, (_, dtype) in output_tensors(base, config).items()}
        self.tree = tree_of(specs.values(), self._tensor)
        on_cpu = jax.default_backend() == "cpu"  # where bfloat16 is slower than float32
        activations = "float32" if on_cpu else self.tree["norm"].dtype
        self.arithmetic = Arithmetic(model, *elementwise_of(config), self.mesh, activations)
        weights = [(t.base, t.experts) for t in jax.tree.leaves(self.tree, is_leaf=is_tensor)]
        self.model_bytes = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(weights))

    def _thresholds(self, specs: Mapping[str, TensorSpec], mesh: Mesh) -> Thresholds:
        """Score inputs and bounds of each linear by (place, expert), on the host: found as for a merge.

        A random score needs no weights: what it needs is made where it is used, and is not among these.
        """
        config, pruner = self._pruner.config, self._pruner
        own = shares(specs, processes.count())[processes.index()]
        own = {name: spec for name, spec in own.items() if spec.layer is not None}
        base, *experts = self._sources
        stream = Stream(base, experts, make_blocks(own, 1), mesh, resident=True)
        pruner.allocate(surveyed(stream, pruner.linears, kernels_of(mesh, config)[1], config, quiet=True))
        rank_units(stream, pruner, quiet=True)
        pruner.weigh(config)
        known: Thresholds = {}
        for _, loaded in () if config.has_random_score else stream():
            for x in (x for x in loaded if x.matrix.linears):
                for e in range(len(config.experts)):
                    _, bounds, _ = pruner.bounds_and_weights(x, e)
                    inputs = pruner.score_inputs(x, e) or [None] * len(bounds)
                    for i, place in enumerate(x.matrix.linears):
                        known[place, e] = inputs[i], bounds[i]
        self.bytes_read += stream.bytes_read
        told = processes.exchange("thresholds", known, Thresholds)
        return {key: value for part in told for key, value in part.items()}

    def _tensor(self, group: Sequence[TensorSpec]) -> Tensor:
        """The tensors of all layers at one place of the tree, or the one tensor outside them."""
        spec = group[0]
        stacked = spec.layer is not None
        arrays = [StoredArray(source, group) for source in self._sources]
        base, *experts = (self._placed(array, spec) for array in arrays)
        per_expert = [self._bounds_and_weights(group, e, base) for e in range(len(experts))]
        inputs, bounds, weights = zip(*per_expert, strict=True)
        whole = NamedSharding(self.mesh, REPLICATED)
        small = lambda table, dtype: put(np.asarray(table if stacked else table[0], dtype), whole)  # noqa: E731
        return Tensor(
            base=base,
            experts=tuple(experts),
            inputs=inputs,
            bounds=tuple(small(table, np.uint32) for table in bounds),
            weights=tuple(small(table, np.float32) for table in weights),
            place=small([self.names.index(each.name) for each in group], np.int32),
            linear=spec.role is Role.LINEAR,
            vector=len(spec.shape) == 1,
            stored=tuple(array.dtype.name for array in arrays),
            dtype=common_dtype(self._dtypes[each.name] for each in group).name,
        )

    def _placed(self, array: StoredArray, spec: TensorSpec) -> jax.Array:
        """(layers, rows, columns), or (rows, columns), spread over the mesh; each process reads its own rows.

        A vocabulary of several chunks is filled up with zeros to equal ones that all devices share evenly.
        """
        chunks = chunks_of(spec.rows) if spec.role is Role.VOCABULARY else 0
        padded = spec.rows + (-spec.rows % (chunks * self.mesh.size) if chunks > 1 else 0)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            *layers, rows, columns = index
            start, stop, _ = rows.indices(padded)
            within = () if len(spec.shape) == 1 else (slice(start, min(stop, spec.rows)),)
            values = array[(*layers, *within, columns)]
            self.bytes_read += values.nbytes
            values = values.reshape(*values.shape[: len(layers)], -1, values.shape[-1])
            if missing := stop - start - values.shape[-2]:
                values = np.concatenate([values, np.zeros((missing, values.shape[-1]), values.dtype)])
            return values.view(np.uint16) if values.dtype.itemsize == 2 else values

        shape = (*array.shape[: spec.layer is not None], padded, spec.columns)
        return jax.make_array_from_callback(shape, self._by_rows(shape), read)

    def _by_rows(self, shape: tuple[int, ...]) -> NamedSharding:
        axes = row_axes(self.mesh, shape[-2])
        return NamedSharding(self.mesh, PartitionSpec(*([None] * (len(shape) - 2)), axes))

    def _bounds_and_weights(self, group: Sequence[TensorSpec], e: int, placed: jax.Array) -> tuple:
        """Score inputs, bounds and weights of an expert; weights without the coefficient."""
        matrix = whole_matrix(group)
        if self._known and matrix.linears:
            inputs, bounds = zip(*(self._known[place, e] for place in matrix.linears), strict=True)
            inputs, weights = self._inputs(matrix, e, inputs), self._pruner.weights[e][:, list(matrix.linears)].T
            if all(table.ndim == 1 for table in bounds):
                return inputs, np.array(bounds), weights
            return Placed(inputs, self._words(matrix, e)), np.array([pairs(table) for table in bounds]), weights
        # A dense tensor, or a linear of a random score: its bounds and weights depend on no weight of a model.
        _, bounds, weights = self._pruner.bounds_and_weights(DeviceMatrix(matrix, placed, ()), e)
        return self._inputs(matrix, e) if matrix.linears else None, bounds, weights

    def _inputs(self, matrix: Matrix, e: int, known: Sequence[np.ndarray | None] = ()):
        """What the score needs beside the delta, of all layers: of rows (layers, rows, numbers), or of columns."""
        wanted = SCORES[self._pruner.config.score].inputs if self._pruner.config.score else None
        if wanted is None:
            return None
        if known and known[0].ndim == 1:  # of columns
            return PerTensor(put(np.stack(known), NamedSharding(self.mesh, REPLICATED)), None)

        def rows(i: int, start: int, stop: int) -> np.ndarray:
            if known:
                return known[i][start:stop]
            part = RowRange(matrix.ranges[i].name, start, stop)
            return wanted.make(self._pruner.rows(e, i, replace(matrix, ranges=(*matrix.ranges[:i], part))))

        return self._of_rows(matrix, rows)

    def _words(self, matrix: Matrix, e: int) -> jax.Array:
        """What tells tied elements of all layers apart."""
        expert, columns = self._pruner.config.experts[e], matrix.columns
        return self._of_rows(matrix, lambda i, *rows: place_words(expert, matrix.ranges[i].name, *rows, columns))

    def _of_rows(self, matrix: Matrix, rows: Callable[[int, int, int], np.ndarray]) -> jax.Array:
        """(layers, rows, numbers) from a function of a layer and the first and last of its rows, spread like rows."""
        shape = (len(matrix.ranges), matrix.ranges[0].rows, rows(0, 0, 1).shape[1])

        def of_slice(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return np.stack([rows(i, start, stop) for i in range(shape[0])])

        return jax.make_array_from_callback(shape, self._by_rows(shape), of_slice)


def check_combine(config: MergeConfig, needs: str = "--coefficient=adamerging") -> None:
    """Refuse what has no gradient, and pruning outside the linears; `needs` is the flag that wants a gradient."""
    if config.prune != OURS["prune"]:
        raise ValueError(f"--prune={config.prune}: {needs} prunes linears alone; leave it out.")
    if config.depth_scaling:
        raise ValueError(f"--depth_scaling: {needs} finds numbers by tensor itself; leave it out.")
    if not config.combination.is_sum:
        raise ValueError(
            f"{needs} needs --combine=sum, not {config.combine!r}: what others choose of the deltas, as "
            f"TIES does signs, jumps as coefficients change, so that there is no gradient."
        )
    if config.is_stepwise or SCALES[config.scale].keeps_norm:
        raise ValueError(
            f"{needs} is for sums in float32 as they are: leave out --divide, --lambda, "
            f"--arithmetic and --compatible, and give another scale than {config.scale!r} if it keeps norms."
        )


def some_rows(tensor: Tensor, choose: Callable[[Array], Array]) -> Tensor:
    """Cut some rows out of a tensor that is not pruned."""
    return replace(tensor, base=choose(tensor.base), experts=tuple(map(choose, tensor.experts)))


def decoded(tensor: Tensor) -> Tensor:
    """Turn the integers of 16-bit weights into the numbers that their bits stand for."""

    def decode(array, dtype):
        return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)

    base, *experts = map(decode, (tensor.base, *tensor.experts), tensor.stored)
    return replace(tensor, base=base, experts=tuple(experts))


def is_tensor(x) -> bool:
    """Is it a leaf of a `Mixture`'s tree?"""
    return isinstance(x, Tensor)


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | str | None:
    """The axes that rows are spread over: both, or the one that divides them, or none."""
    for axes in (AXES, AXES[1], AXES[0]):
        if rows % int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(axes)])) == 0:
            return axes
    return None


def chunks_of(vocabulary: int) -> int:
    """How many chunks the vocabulary's logits are formed in."""
    return -(-vocabulary // CHUNK_ROWS)
