"""The entropy of a merge as a function of its coefficients, from base and experts as they are.

    merged = base + Σₖ λ[k, tensor] · scaleₖ(keepₖ(expertₖ − base)),    loss = Σ weight · H(softmax(logits of merged))

No merged model exists at any time. One `lax.scan` runs the decoder layers and merges each one's weights when it gets
there, with the arithmetic of `kernels.Kernels.merge`; the backward pass merges them again. The head is merged, and its
logits are formed, a chunk of the vocabulary at a time. So beside base and experts a device holds one layer of merged
weights, one layer of their gradients, and the hidden states between layers.

Rows of all weight matrices are spread over both axes of the mesh, of stacked layers the rows of each layer: a scan over
a layer axis that is spread over devices would gather all layers on each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dppa_jax.blocks import Block, Loaded, Part, Piece, Source, Stream, make_blocks
from dppa_jax.checkpoint.names import TensorSpec, check_patterns
from dppa_jax.config import MergeConfig
from dppa_jax.delta.combine import scaled
from dppa_jax.kernels import Kernels
from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.llama import decoder_layer, rms_norm, rotary, unembed, visibility
from dppa_jax.pipeline import check_compatible, kernels_of, merge_rates, output_tensors, surveyed
from dppa_jax.prune import Pruner
from dppa_jax.sharding import AXES, PerLayer

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


class Mixture:
    """Base and experts on the devices as stacked trees, with the bounds and weights of a merge of them.

    Args:
      experts: by name, in the order of `config.experts`.
      config: the merge; its coefficients are not looked at, but `tensor_coefficients` are.
      norms: of the score "wanda", see `Merger`.

    Attributes:
      names: of the tensors, in the order of the rows of coefficients.
      tree: `Tensor`s at the places of the model's weights.
      model_bytes: of base and experts, per device.
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
        self.mesh, self.names = mesh, tuple(specs)
        llama = LlamaConfig.from_hf(base.config)
        linear, dense = kernels_of(mesh, config)
        stream = Stream(base, list(experts.values()), make_blocks(specs, 1), mesh, resident=False)
        pruner = Pruner(linear, config, llama.num_hidden_layers, norms)
        pruner.rates[:] = (
            merge_rates(base, config, surveyed(stream, dense, config, quiet=True)) if config.score else 0.0
        )
        pruner.weigh(config)
        dtypes = {name: dtype for name, (_, dtype) in output_tensors(base, config).items()}
        self.tree: dict = {}
        for block in _whole_paths(specs):
            ((_, (loaded,)),) = list(stream([block]))
            spec = specs[block.parts[0].pieces[0].name]
            *parents, leaf = spec.path
            node = self.tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = _tensor(loaded, spec, pruner, mesh, self.names, dtypes)
        on_cpu = jax.default_backend() == "cpu"  # where bfloat16 is slower than float32
        activations = "float32" if on_cpu else self.tree["norm"].dtype
        self.arithmetic = Arithmetic(llama, linear, dense, activations)
        weights = [(t.base, t.experts) for t in jax.tree.leaves(self.tree, is_leaf=_is_tensor)]
        self.model_bytes = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(weights))


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


def _whole_paths(specs: Mapping[str, TensorSpec]) -> list[Block]:
    """A block for every array of the tree: one linear, or norm, of all layers; embeddings, norm and head whole."""
    groups: dict[tuple, list[TensorSpec]] = {}
    for spec in specs.values():
        groups.setdefault(spec.path, []).append(spec)
    blocks = []
    for group in groups.values():
        layers = tuple(s.layer for s in group if s.layer is not None)
        pieces = tuple(Piece(s.name, 0, s.rows) for s in group)
        blocks.append(Block((Part(pieces, group[0].columns, group[0].linear, layers),), layers))
    return blocks


def _tensor(
    x: Loaded, spec: TensorSpec, pruner: Pruner, mesh: Mesh, names: tuple[str, ...], dtypes: Mapping[str, np.dtype]
) -> Tensor:
    """A part with all its layers as arrays of their own, apart from the buffers that it was read into."""
    stacked, vocabulary = spec.layer is not None, spec.path in (("embed_tokens",), ("lm_head",))
    sides, bounds, weights = zip(*(pruner.tables(x, e) for e in range(len(x.experts))), strict=True)
    place = _stack(mesh, x.part.rows, len(x.part.pieces), stacked, chunks_of(spec.rows) if vocabulary else 0)
    of_partitions = lambda table, dtype: np.asarray(table if stacked else table[0], dtype)  # noqa: E731
    positions = np.array([names.index(piece.name) for piece in x.part.pieces], np.int32)
    found = {dtypes[piece.name].name for piece in x.part.pieces}
    tensor = Tensor(
        base=place(_bits(x.base)),
        experts=tuple(place(_bits(expert)) for expert in x.experts),
        sides=tuple(_side(side, place) for side in sides),
        bounds=tuple(of_partitions(table, np.uint32) for table in bounds),
        weights=tuple(of_partitions(table, np.float32) for table in weights),
        place=positions if stacked else positions[0],
        linear=spec.linear is not None,
        vector=len(spec.shape) == 1,
        stored=tuple(array.dtype.name for array in (x.base, *x.experts)),
        dtype=found.pop() if len(found) == 1 else "float32",
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    small = {f: jax.device_put(getattr(tensor, f), everywhere) for f in ("bounds", "weights", "place")}
    return jax.block_until_ready(replace(tensor, **small))


def _bits(array: jax.Array) -> jax.Array:
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _side(side, place: Callable[[Array], Array]):
    if side is None:
        return None
    return PerLayer(side.values, None) if isinstance(side, PerLayer) else place(side)


def _stack(mesh: Mesh, rows: int, pieces: int, stacked: bool, chunks: int) -> Callable[[Array], Array]:
    """From the padded rows of all pieces to (layers, rows, columns), or (rows, columns), spread over the mesh.

    A vocabulary of several chunks is filled up with zeros to equal ones that all devices share evenly.
    """
    each = rows // pieces
    unit = chunks * mesh.size if chunks > 1 else 1
    padding = -each % unit
    spec = PartitionSpec(None, row_axes(mesh, each)) if stacked else PartitionSpec(row_axes(mesh, each + padding))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, spec))
    def place(array):
        array = jnp.pad(array[:rows], ((0, padding), (0, 0)))
        return array.reshape(pieces, each, -1) if stacked else array

    return place


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | str | None:
    """The axes that rows are spread over: both, or the one that divides them, or none."""
    for axes in (AXES, AXES[1], AXES[0]):
        if rows % int(np.prod([mesh.shape[axis] for axis in np.atleast_1d(axes)])) == 0:
            return axes
    return None


def chunks_of(vocabulary: int) -> int:
    return -(-vocabulary // CHUNK_ROWS)
