"""The entropy of a merge as a function of its coefficients, from base and experts as they are.

    merged = base + Σₖ λ[k, tensor] · scaleₖ(keepₖ(expertₖ − base)),    loss = Σ weight · H(softmax(logits of merged))

`q_gradient.py` has another loss, on the same hidden states and chunks of logits.

No merged model exists at any time. One `lax.scan` runs the decoder layers and merges each one's weights when it gets
there, with the arithmetic of any merge (`merging.elementwise`); the backward pass merges them again. The head is
merged, and its logits are formed, a chunk of the vocabulary at a time. So beside base and experts a device holds one
layer of merged weights, one layer of their gradients, and the hidden states between layers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dppa_jax.delta.tied import Placed
from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.context import context_of, layer_kinds
from dppa_jax.model.decoder import decoder_layer, embed, norm, unembed
from dppa_jax.runtime.mesh import PerTensor
from dppa_jax.search.mixture import Arithmetic, Tensor, chunks_of, decoded, is_tensor, some_rows

Weights = Callable[[Tensor], Array]  # makes the weights of a tensor of base and experts
LEAST = -1e30  # a maximum of nothing; a difference from it is finite in float32


class Batch(NamedTuple):
    """Right-padded prompts; `weights` of the positions whose entropy counts, 0 where `chosen` is padding."""

    tokens: Int[Array | np.ndarray, "B T"]
    chosen: Int[Array | np.ndarray, "B M"]
    weights: Float[Array | np.ndarray, "B M"]


def row_entropies(
    arithmetic: Arithmetic,
    tree: dict,
    coefficients: Float[Array | np.ndarray, "tensors experts"],
    batch: Batch,
    zero: Int[Array | np.ndarray, ""],
) -> Float[Array, "B"]:
    """Compute Σ weight · entropy, in nats, of the merge's next-token distributions, for each row of a batch.

    Args:
      tree: of a `Mixture`.
      zero: the int32 number 0, unknown to the compiler; see `delta.rounding.rounded`.
    """
    merge = merge_with(arithmetic, coefficients, zero)
    hidden = last_states(arithmetic.model, tree, batch, merge)
    entropies = head_entropies(arithmetic.model, head_of(tree), merge, hidden)
    return (entropies * batch.weights).sum(axis=1)


def merge_with(arithmetic: Arithmetic, coefficients: Float[Array | np.ndarray, "tensors experts"], zero) -> Weights:
    """Return the function that merges one tensor with its coefficients."""
    return lambda tensor: merged(arithmetic, coefficients[tensor.place], decoded(tensor), zero)


def head_of(tree: dict) -> Tensor:
    """Return the head, or the embeddings if they are tied."""
    return tree.get("lm_head", tree["embed_tokens"])


def last_states(model: DecoderConfig, tree: dict, batch: Batch, weights_of: Weights) -> Float[Array, "B M D"]:
    """Compute the hidden states after the last norm, at the positions that are chosen.

    Args:
      model: sizes and constants.
      tree: of a `Mixture`.
      batch: what is read.
      weights_of: makes the weights of each tensor when they are needed.
    """
    rows, time = batch.tokens.shape
    looked_up = some_rows(tree["embed_tokens"], lambda table: table[batch.tokens.reshape(-1)])
    hidden = embed(model, weights_of(looked_up).reshape(rows, time, -1))
    slots = jnp.arange(time)[None]
    context = context_of(model, slots, slots)

    def step(hidden, scanned):
        layer, kind = scanned
        weights = jax.tree.map(weights_of, layer, is_leaf=is_tensor)
        return decoder_layer(model, weights, hidden, None, context.of(kind))[0], None

    # In a scan the backward pass cannot share work with the forward pass, so nothing need keep them apart.
    scanned = tree["layers"], layer_kinds(model)
    hidden, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), hidden, scanned)
    hidden = jnp.take_along_axis(hidden, batch.chosen[..., None], axis=1)
    return norm(model, {"norm": weights_of(tree["norm"])}, "norm", hidden)


def head_entropies(
    model: DecoderConfig, head: Tensor, weights_of: Weights, hidden: Float[Array, "B M D"]
) -> Float[Array, "B M"]:
    """H = log Σ e^z − Σ z e^z / Σ e^z, with the largest z of the vocabulary seen so far taken off."""
    chunks, logits_of = logits_by_chunk(model, head, weights_of, hidden)

    def step(carry, chunk):
        largest, total, moment = carry
        logits, _ = logits_of(chunk)
        new = lax.stop_gradient(jnp.maximum(largest, logits.max(axis=-1)))
        logits = jnp.maximum(logits - new[..., None], LEAST)
        exponentials, kept = jnp.exp(logits), jnp.exp(largest - new)
        moment = kept * (moment + (largest - new) * total) + (exponentials * logits).sum(axis=-1)
        return (new, kept * total + exponentials.sum(axis=-1), moment), None

    nothing = jnp.zeros(hidden.shape[:-1], jnp.float32)
    carry, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), (nothing + LEAST, nothing, nothing), np.arange(chunks))
    _, total, moment = carry
    return jnp.log(total) - moment / total


def logits_by_chunk(
    model: DecoderConfig, head: Tensor, weights_of: Weights, hidden: Float[Array, "B M D"]
) -> tuple[int, Callable[[Array], tuple[Float[Array, "B M rows"], Int[Array, " rows"]]]]:
    """Return how many chunks the vocabulary has, and a function from the number of one to its logits and tokens.

    Chunk c holds the rows c, c + chunks, c + 2·chunks, … of the head, so that each is spread over all devices. Rows
    beyond the vocabulary have the logit LEAST.
    """
    chunks = chunks_of(model.vocab_size)
    split = some_rows(head, lambda table: table.reshape(-1, chunks, table.shape[-1]))
    rows = split.base.shape[0]

    def logits_of(chunk):
        part = some_rows(split, lambda table: lax.dynamic_index_in_dim(table, chunk, axis=1, keepdims=False))
        logits, tokens = unembed(model, {"lm_head": weights_of(part)}, hidden), jnp.arange(rows) * chunks + chunk
        if rows * chunks > model.vocab_size:
            logits = jnp.where(tokens < model.vocab_size, logits, LEAST)
        return logits, tokens

    return chunks, logits_of


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(
    arithmetic: Arithmetic, coefficients: Float[Array, "experts"], tensor: Tensor, zero: Int[Array | np.ndarray, ""]
) -> Float[Array, "*shape"]:
    """Merge one matrix, rounded to its dtype as when it is written, in the dtype of the activations.

    ∂/∂λₖ is scaleₖ(keepₖ(δₖ)): what is kept does not depend on λ, and rounding counts as the identity.
    """
    weighted = _pruned(arithmetic, tensor, [w * c for w, c in zip(tensor.weights, coefficients, strict=True)], zero)
    weights = arithmetic.elementwise(tensor).merged(tensor.base, weighted, tensor.dtype)
    return (weights[0] if tensor.vector else weights).astype(arithmetic.activations)


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
    elementwise, pruned = arithmetic.elementwise(tensor), []
    for expert, inputs, bounds, weight in zip(tensor.experts, tensor.inputs, tensor.bounds, weights, strict=True):
        inputs = _of_one_tensor(inputs, tensor.base.shape[0])
        pruned.append(elementwise.pruned(tensor.base, expert, inputs, bounds[None], weight[None], zero))
    return pruned


def _of_one_tensor(inputs, rows: int):
    """Give score inputs, of one tensor, the form in which a matrix of several has them."""
    if isinstance(inputs, Placed):
        return Placed(_of_one_tensor(inputs.inputs, rows), inputs.words)
    if isinstance(inputs, PerTensor):
        return PerTensor(inputs.values[None], jnp.zeros(rows, jnp.int32))
    return inputs
