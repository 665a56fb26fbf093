"""The entropy of a merge as a function of its coefficients, from base and experts as they are.

    merged = base + Σₖ λ[k, tensor] · scaleₖ(keepₖ(expertₖ − base)),    loss = Σ weight · H(softmax(logits of merged))

No merged model exists at any time. One `lax.scan` runs the decoder layers and merges each one's weights when it gets
there, with the arithmetic of `kernels.Kernels.merge`; the backward pass merges them again. The head is merged, and its
logits are formed, a chunk of the vocabulary at a time. So beside base and experts a device holds one layer of merged
weights, one layer of their gradients, and the hidden states between layers.

Rows of all weight matrices are spread over both axes of the mesh, of stacked layers the rows of each layer: a scan over
a layer axis that is spread over devices would gather all layers on each of them. The mesh has the devices of all
processes, each of which reads the rows of its own; statistics and thresholds are found as for a merge, by each process
for its share of the layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.rules import check_patterns
from dppa_jax.architecture.specs import TensorSpec, tree_of
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.checkpoint.safetensors import common_dtype
from dppa_jax.checkpoint.stacked import StoredArray
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import scaled
from dppa_jax.delta.score import SCORES, row_keys
from dppa_jax.merging.blocks import Loaded, Part, Piece, Stream, make_blocks, shares
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.compatible import check_compatible
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.merger import kernels_of, merge_rates, output_tensors, surveyed
from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.decoder import decoder_layer, rms_norm, rotary, unembed, visibility
from dppa_jax.runtime import processes
from dppa_jax.runtime.mesh import AXES, REPLICATED, PerLayer, across_processes, put

CHUNK_ROWS = 4096  # of the vocabulary: with the logits of 6,000 positions 100 MB
LEAST = -1e30  # a maximum of nothing; a difference from it is finite in float32


class Batch(NamedTuple):
    """Right-padded prompts; `weights` of the positions whose entropy counts, 0 where `chosen` is padding."""

    tokens: Int[Array | np.ndarray, "B T"]
    chosen: Int[Array | np.ndarray, "B M"]
    weights: Float[Array | np.ndarray, "B M"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "experts", "sides", "bounds", "weights", "place"),
    meta_fields=("linear", "vector", "stored", "dtype"),
)
@dataclass(frozen=True)
class Tensor:
    """A tensor of base and experts, of all layers or of one, and what decides its merge.

    Attributes:
      base, experts: (layers, rows, columns) or (rows, columns); a vector is one row. Weights of 16 bits are held as
        integers until a layer is cut out: XLA on CPUs would convert all layers to float32 first.
      sides: per expert, what its score needs beside the delta (`delta.score`).
      bounds, weights: per expert, (layers, partitions) or (partitions,); weights without the coefficient.
      place: where the tensor's coefficients are, (layers,) or ().
      linear: is it pruned?
      stored: dtypes of base and experts.
      dtype: that of the merge, to which the weights are rounded.
    """

    base: Any
    experts: Any
    sides: Any
    bounds: Any
    weights: Any
    place: Any
    linear: bool
    vector: bool
    stored: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Arithmetic:
    """What is fixed when a step is compiled."""

    llama: LlamaConfig
    linear: Kernels
    dense: Kernels
    activations: str  # dtype

    def kernels(self, tensor: Tensor) -> Kernels:
        return self.linear if tensor.linear else self.dense

    def everywhere(self, tree):
        """The same, whole on every device, where any process can fetch it."""
        return lax.with_sharding_constraint(tree, NamedSharding(self.linear.mesh, REPLICATED))


class Mixture:
    """Base and experts on the devices as stacked trees, with the bounds and weights of a merge of them.

    Args:
      experts: by name, in the order of `config.experts`.
      config: the merge; its coefficients are not looked at, but `tensor_coefficients` are.
      mesh: of this process; the trees are on that and on the like of every other process.
      norms: of the score "wanda", see `Merger`.

    Attributes:
      names: of the tensors, in the order of the rows of coefficients.
      tree: `Tensor`s at the places of the model's weights.
      model_bytes: of base and experts, per device.
      bytes_read: by this process.
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source],
        config: MergeConfig,
        mesh: Mesh,
        norms: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ):
        check_combine(config)
        specs = check_compatible(base, experts, quiet=True)
        check_patterns(config.tensor_rates, specs, "--tensor_rate")
        self.mesh, self.names, self.bytes_read = across_processes(mesh), tuple(specs), 0
        self._sources, llama = (base, *experts.values()), LlamaConfig.from_hf(base.config)
        self._pruner = Pruner(kernels_of(mesh, config)[0], config, llama.num_hidden_layers, norms)
        self._found = self._thresholds(specs, mesh) if config.score else {}
        self._dtypes = {name: dtype for name, (_, dtype) in output_tensors(base, config).items()}
        self.tree = tree_of(specs.values(), self._tensor)
        on_cpu = jax.default_backend() == "cpu"  # where bfloat16 is slower than float32
        activations = "float32" if on_cpu else self.tree["norm"].dtype
        self.arithmetic = Arithmetic(llama, *kernels_of(self.mesh, config), activations)
        weights = [(t.base, t.experts) for t in jax.tree.leaves(self.tree, is_leaf=_is_tensor)]
        self.model_bytes = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(weights))

    def _thresholds(self, specs: Mapping[str, TensorSpec], mesh: Mesh) -> dict[tuple[int, int, int], tuple]:
        """Side and bounds of each linear by (layer, linear, expert), on the host: found as for a merge.

        Those of random scores need no weights, and are not among them.
        """
        config, pruner, own = self._pruner.config, self._pruner, shares(specs, processes.count())[processes.index()]
        own = {name: spec for name, spec in own.items() if spec.layer is not None}
        base, *experts = self._sources
        stream = Stream(base, experts, make_blocks(own, 1), mesh, resident=True)
        pruner.rates[:] = merge_rates(base, config, surveyed(stream, kernels_of(mesh, config)[1], config, quiet=True))
        pruner.weigh(config)
        found = {}
        for block, loaded in stream() if SCORES[config.score].side != "row_keys" else ():
            for x in (x for x in loaded if x.part.linear is not None):
                for e in range(len(config.experts)):
                    side, bounds, _ = pruner.tables(x, e)
                    found[block.layers[0], x.part.linear, e] = _on_host(side, x.part.rows), bounds[0]
        self.bytes_read += stream.bytes_read
        return {key: one for part in processes.exchange("thresholds", found) for key, one in part.items()}

    def _tensor(self, group: Sequence[TensorSpec]) -> Tensor:
        """Of all layers, or of one tensor outside them."""
        spec = group[0]
        stacked = spec.layer is not None
        arrays = [StoredArray(source, group) for source in self._sources]
        base, *experts = (self._placed(array, spec) for array in arrays)
        sides, bounds, weights = zip(*(self._tables(group, e, base) for e in range(len(experts))), strict=True)
        whole = NamedSharding(self.mesh, REPLICATED)
        small = lambda table, dtype: put(np.asarray(table if stacked else table[0], dtype), whole)  # noqa: E731
        return Tensor(
            base=base,
            experts=tuple(experts),
            sides=sides,
            bounds=tuple(small(table, np.uint32) for table in bounds),
            weights=tuple(small(table, np.float32) for table in weights),
            place=small([self.names.index(one.name) for one in group], np.int32),
            linear=spec.linear is not None,
            vector=len(spec.shape) == 1,
            stored=tuple(array.dtype.name for array in arrays),
            dtype=common_dtype(self._dtypes[one.name] for one in group).name,
        )

    def _placed(self, array: StoredArray, spec: TensorSpec) -> jax.Array:
        """(layers, rows, columns), or (rows, columns), spread over the mesh; each process reads its own rows.

        A vocabulary of several chunks is filled up with zeros to equal ones that all devices share evenly.
        """
        vocabulary = spec.path in (("embed_tokens",), ("lm_head",))
        chunks = chunks_of(spec.rows) if vocabulary else 0
        padded = spec.rows + (-spec.rows % (chunks * self.mesh.size) if chunks > 1 else 0)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            *layers, rows, columns = index
            start, stop, _ = rows.indices(padded)
            within = () if len(spec.shape) == 1 else (slice(start, min(stop, spec.rows)),)
            found = array[(*layers, *within, columns)]
            self.bytes_read += found.nbytes
            found = found.reshape(*found.shape[: len(layers)], -1, found.shape[-1])
            if missing := stop - start - found.shape[-2]:
                found = np.concatenate([found, np.zeros((missing, found.shape[-1]), found.dtype)])
            return found.view(np.uint16) if found.dtype.itemsize == 2 else found

        shape = (*array.shape[: spec.layer is not None], padded, spec.columns)
        return jax.make_array_from_callback(shape, self._by_rows(shape), read)

    def _by_rows(self, shape: tuple[int, ...]) -> NamedSharding:
        axes = row_axes(self.mesh, shape[-2])
        return NamedSharding(self.mesh, PartitionSpec(*([None] * (len(shape) - 2)), axes))

    def _tables(self, group: Sequence[TensorSpec], e: int, placed: jax.Array) -> tuple:
        """Side, bounds and weights of an expert; weights without the coefficient."""
        spec, pruner = group[0], self._pruner
        if self._found and spec.linear is not None:
            sides, bounds = zip(*(self._found[one.layer, spec.linear, e] for one in group), strict=True)
            return self._side(group, e, sides), np.array(bounds), pruner.weights[e][:, :, spec.linear].T
        pieces = tuple(Piece(one.name, 0, one.rows) for one in group)
        layers = tuple(one.layer for one in group if one.layer is not None)
        part = Part(pieces, spec.columns, spec.linear, layers)
        side, bounds, weights = pruner.tables(Loaded(part, placed, ()), e)  # that look at nothing but the part
        return None if side is None else self._side(group, e, ()), bounds, weights

    def _side(self, group: Sequence[TensorSpec], e: int, found: Sequence[np.ndarray | None]):
        """What the score needs beside the delta, of all layers: of rows (layers, rows, numbers), or of columns."""
        config = self._pruner.config
        match SCORES[config.score].side:
            case None:
                return None
            case "row_keys":
                keys = partial(row_keys, config.seed, config.experts[e])
                return self._of_rows(group, 2, lambda layer, *rows: keys(group[layer].name, *rows))
            case "row_sums":
                return self._of_rows(group, 1, lambda layer, start, stop: found[layer][start:stop])
        return PerLayer(put(np.stack(found), NamedSharding(self.mesh, REPLICATED)), None)

    def _of_rows(self, group: Sequence[TensorSpec], numbers: int, of: Callable[[int, int, int], np.ndarray]):
        """`numbers` for every row, spread as the rows are."""
        shape = (len(group), group[0].rows, numbers)

        def of_slice(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return np.stack([of(layer, start, stop) for layer in range(len(group))])

        return jax.make_array_from_callback(shape, self._by_rows(shape), of_slice)


def check_combine(config: MergeConfig) -> None:
    if config.combine != "sum":
        raise ValueError(
            f"--coefficient=adamerging needs --combine=sum, not {config.combine!r}: the sign that TIES elects jumps as "
            f"coefficients change. AdaMerging++, which elects signs once, is left out."
        )


def row_entropies(
    arithmetic: Arithmetic,
    tree: dict,
    coefficients: Float[Array | np.ndarray, "tensors experts"],
    batch: Batch,
    zero: Int[Array | np.ndarray, ""],
) -> Float[Array, "B"]:
    """Σ weight · entropy, in nats, of the merge's next-token distributions, for each row of a batch.

    Args:
      tree: of a `Mixture`.
      zero: the int32 number 0, unknown to the compiler; see `delta.combine.rounded`.
    """
    llama, embedding = arithmetic.llama, tree["embed_tokens"]
    merge = lambda tensor: merged(arithmetic, coefficients[tensor.place], _decoded(tensor), zero)  # noqa: E731
    rows, time = batch.tokens.shape
    looked_up = _rows(embedding, lambda table: table[batch.tokens.reshape(-1)])
    hidden = merge(looked_up).reshape(rows, time, -1)
    slots = jnp.arange(time)[None]
    rope, visible = rotary(llama, slots), visibility(slots, slots, time)

    def step(hidden, layer):
        weights = jax.tree.map(merge, layer, is_leaf=_is_tensor)
        return decoder_layer(llama, weights, hidden, None, rope, visible)[0], None

    # In a scan the backward pass cannot share work with the forward pass, so nothing need keep them apart.
    hidden, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), hidden, tree["layers"])
    hidden = jnp.take_along_axis(hidden, batch.chosen[..., None], axis=1)
    hidden = rms_norm(hidden, merge(tree["norm"]), llama.rms_norm_eps)
    entropies = head_entropies(tree.get("lm_head", embedding), merge, hidden, llama.vocab_size)
    return (entropies * batch.weights).sum(axis=1)


def head_entropies(
    head: Tensor, merge: Callable[[Tensor], Array], hidden: Float[Array, "B M D"], vocabulary: int
) -> Float[Array, "B M"]:
    """H = log Σ e^z − Σ z e^z / Σ e^z, with the largest z of the vocabulary seen so far taken off.

    Chunk c holds the rows c, c + chunks, c + 2·chunks, … of the head, so that each is spread over all devices.
    """
    chunks = chunks_of(vocabulary)
    split = _rows(head, lambda table: table.reshape(-1, chunks, table.shape[-1]))
    rows = split.base.shape[0]

    def step(carry, chunk):
        largest, total, moment = carry
        part = _rows(split, lambda table: lax.dynamic_index_in_dim(table, chunk, axis=1, keepdims=False))
        logits = unembed({"lm_head": merge(part)}, hidden)
        if rows * chunks > vocabulary:
            logits = jnp.where(jnp.arange(rows) * chunks + chunk < vocabulary, logits, LEAST)
        new = lax.stop_gradient(jnp.maximum(largest, logits.max(axis=-1)))
        logits = jnp.maximum(logits - new[..., None], LEAST)
        exponentials, kept = jnp.exp(logits), jnp.exp(largest - new)
        moment = kept * (moment + (largest - new) * total) + (exponentials * logits).sum(axis=-1)
        return (new, kept * total + exponentials.sum(axis=-1), moment), None

    nothing = jnp.zeros(hidden.shape[:-1], jnp.float32)
    carry, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), (nothing + LEAST, nothing, nothing), np.arange(chunks))
    _, total, moment = carry
    return jnp.log(total) - moment / total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(
    arithmetic: Arithmetic, coefficients: Float[Array, "experts"], tensor: Tensor, zero: Int[Array | np.ndarray, ""]
) -> Float[Array, "*shape"]:
    """The merge of one matrix, rounded to its dtype as when it is written, in the dtype of the activations.

    ∂/∂λₖ is scaleₖ(keepₖ(δₖ)): what is kept does not depend on λ, and rounding counts as the identity.
    """
    weighted = _pruned(arithmetic, tensor, [w * c for w, c in zip(tensor.weights, coefficients, strict=True)], zero)
    kernels = arithmetic.kernels(tensor)
    found = (tensor.base.astype(jnp.float32) + kernels.combine(weighted)).astype(tensor.dtype)
    return (found[0] if tensor.vector else found).astype(arithmetic.activations)


def _merged_forward(arithmetic, coefficients, tensor, zero):
    return merged(arithmetic, coefficients, tensor, zero), (tensor, zero)


def _merged_backward(arithmetic, residuals, gradient):
    tensor, zero = residuals
    gradient = gradient.astype(jnp.float32).reshape(tensor.base.shape)
    pruned = _pruned(arithmetic, tensor, tensor.weights, zero)
    return jnp.stack([(gradient * p).sum(axis=1).sum() for p in pruned]), None, None


merged.defvjp(_merged_forward, _merged_backward)


def _pruned(arithmetic: Arithmetic, tensor: Tensor, weights, zero) -> list[Array]:
    """weight · keep(δ) of every expert."""
    kernels = arithmetic.kernels(tensor)
    column = lax.broadcasted_iota(jnp.int32, (1, tensor.base.shape[1]), 1)
    found = []
    for expert, side, bounds, weight in zip(tensor.experts, tensor.sides, tensor.bounds, weights, strict=True):
        delta = kernels.delta(tensor.base, expert)
        if isinstance(side, PerLayer):
            side = PerLayer(side.values[None], jnp.zeros(tensor.base.shape[0], jnp.int32))
        found.append(scaled(delta, kernels.keys(delta, side, column), bounds[None], weight[None], zero))
    return found


def _rows(tensor: Tensor, choose: Callable[[Array], Array]) -> Tensor:
    """Some rows of a tensor that is not pruned."""
    return replace(tensor, base=choose(tensor.base), experts=tuple(map(choose, tensor.experts)))


def _decoded(tensor: Tensor) -> Tensor:
    """With the numbers that the bits of base and experts stand for."""

    def decode(array, dtype):
        return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)

    base, *experts = map(decode, (tensor.base, *tensor.experts), tensor.stored)
    return replace(tensor, base=base, experts=tuple(experts))


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def _on_host(side, rows: int) -> np.ndarray | None:
    """Of a matrix of one layer."""
    if side is None:
        return None
    return np.asarray(side.values)[0] if isinstance(side, PerLayer) else np.asarray(side)[:rows]


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | str | None:
    """The axes that rows are spread over: both, or the one that divides them, or none."""
    for axes in (AXES, AXES[1], AXES[0]):
        if rows % int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(axes)])) == 0:
            return axes
    return None


def chunks_of(vocabulary: int) -> int:
    return -(-vocabulary // CHUNK_ROWS)
