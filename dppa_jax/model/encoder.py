"""BERT and RoBERTa on the stacked tree: last hidden states, and the classification head of either.

Layers are normed after attention and MLP (post-norm), and every token sees every token of its text. As in `decoder.py`,
linears stay in Hugging Face's (out, in) layout and one `lax.scan` runs the layers. There is no dropout.

Axis names are those of `decoder.py`; C is classes, or 1 for a number that is predicted.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dppa_jax.model.config import EncoderConfig
from dppa_jax.model.decoder import ACTIVATIONS, Record, linear
from dppa_jax.model.tree import Tree

Tokens = Int[Array | np.ndarray, "B T"]
Text = Bool[Array | np.ndarray, "B T"]


@partial(jax.jit, static_argnames=("config", "remat"))
def classify(
    config: EncoderConfig,
    tree: Tree,
    tokens: Tokens,
    text: Text | None = None,
    types: Tokens | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "B C"]:
    """Compute the logits of the classes in float32, or the number that is predicted.

    BERT's head is tanh(pooler(first token)) · classifierᵀ, RoBERTa's out_proj(tanh(dense(first token))).

    Args:
      config: sizes and constants; it names the classes.
      tree: the stacked tree; see README.md in this folder.
      tokens: ids; texts begin at the first slot, padding is to their right.
      text: which tokens are text; None for all.
      types: 1 for the second text of a pair and 0 elsewhere; None for 0 everywhere.
      remat: recompute each layer in the backward pass; this saves memory and costs one more forward pass.
    """
    first = encode(config, tree, tokens, text, types, remat=remat)[:, 0]
    if config.pooled:
        pooled = jnp.tanh(linear(tree["pooler"], "pooler.dense", first))
        return linear(tree, "classifier", pooled).astype(jnp.float32)
    pooled = jnp.tanh(linear(tree["classifier"], "classifier.dense", first))
    return linear(tree["classifier"], "classifier.out_proj", pooled).astype(jnp.float32)


def encode(
    config: EncoderConfig,
    tree: Tree,
    tokens: Tokens,
    text: Text | None = None,
    types: Tokens | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Return the last hidden states; those of padding mean nothing. Arguments are those of `classify`."""
    text = jnp.ones(tokens.shape, bool) if text is None else text

    def step(hidden, layer):
        return encoder_layer(config, layer, hidden, text), None

    step = jax.checkpoint(step) if remat else step
    hidden, _ = jax.lax.scan(step, embedded(config, tree["embeddings"], tokens, types), tree["layers"])
    return hidden


def compared_states(config: EncoderConfig, tree: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return what DAREx's unlabelled search of q compares: the last hidden states, of RoBERTa after the head's dense.

    Source: Deng et al. 2024, the authors' repository.
    """
    own = config.labels and not config.pooled
    return linear(tree["classifier"], "classifier.dense", hidden) if own else hidden


def embedded(
    config: EncoderConfig, embeddings: Tree, tokens: Tokens, types: Tokens | None = None
) -> Float[Array, "B T D"]:
    """Compute the first hidden states: the norm of the sum of a token's own, its type's and its position's row."""
    places = config.first_position + jnp.arange(tokens.shape[1])
    kinds = jnp.zeros(tokens.shape, jnp.int32) if types is None or config.type_vocab_size == 1 else types
    rows = jnp.asarray(embeddings["word_embeddings"])[tokens]
    rows = rows + jnp.asarray(embeddings["token_type_embeddings"])[kinds]
    rows = rows + jnp.asarray(embeddings["position_embeddings"])[places]
    return layer_norm(config, embeddings, rows)


def encoder_layer(
    config: EncoderConfig,
    layer: Tree,
    hidden: Float[Array, "B T D"],
    text: Text,
    record: Record | None = None,
) -> Float[Array, "B T D"]:
    """Compute one layer; `record` is that of `decoder_layer`, with paths such as "attention.self.query"."""
    block = layer["attention"]
    mixed = attention(config, block["self"], hidden, text, record)
    attended = linear(block["output"], "attention.output.dense", mixed, record)
    hidden = layer_norm(config, block["output"], attended + hidden)
    inner = ACTIVATIONS[config.activation](linear(layer["intermediate"], "intermediate.dense", hidden, record))
    computed = linear(layer["output"], "output.dense", inner, record)
    return layer_norm(config, layer["output"], computed + hidden)


def attention(
    config: EncoderConfig, weights: Tree, hidden: Float[Array, "B T D"], text: Text, record: Record | None
) -> Float[Array, "B T D"]:
    """Mix the values of all tokens of a text, head by head, before the output's linear."""
    batch, time, width = hidden.shape
    shape = (batch, time, config.num_attention_heads, -1)
    query, keys, values = (
        linear(weights, f"attention.self.{name}", hidden, record).reshape(shape).swapaxes(1, 2)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bhtd,bhsd->bhts", query, keys, preferred_element_type=jnp.float32)
    scores = scores * (width // config.num_attention_heads) ** -0.5
    scores = jnp.where(text[:, None, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(hidden.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", shares, values).swapaxes(1, 2).reshape(batch, time, width)


def layer_norm(config: EncoderConfig, weights: Tree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Compute the LayerNorm in `weights`, in float32 whatever the dtype of the activations."""
    wide = hidden.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + config.layer_norm_eps)
    return (centred * spread * weights["LayerNorm"] + weights["LayerNorm_bias"]).astype(hidden.dtype)
