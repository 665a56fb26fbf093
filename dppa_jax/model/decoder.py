"""A decoder on the stacked tree: a pure forward pass, and a Flax module that holds the tree as parameters.

Families of models differ by fields of `DecoderConfig`; what a model does without adds no operation.

Every linear stays in Hugging Face's (out, in) layout, so a checkpoint is read without a transpose. The array of a
linear holds all layers on its first axis, so one `lax.scan` runs the layers.

Axis names: B batch, T time (tokens of this call), S key slots, D hidden, F intermediate, V vocabulary, L layers,
K key/value heads, G query heads per key/value head, H head dimension, E experts of a mixture.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.context import LayerContext, context_of, layer_kinds
from dppa_jax.model.rope import rotate
from dppa_jax.model.tree import Tree, check_shapes

Tokens = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "#B T"]
Record = Callable[[str, Array, Array | None], None]  # of the inputs of a linear; see `decoder_layer`

EXACT_WIDTH = 64  # XLA's CPU products add hundreds of float32 terms in a row; sums of 64 round no more than torch's
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for all layers; `length` slots are filled."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "Cache":
        """Return a cache with room for `slots` tokens of each sequence, none of which is filled."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


class Decoder(nnx.Module):
    """The parameters as a Flax module; `nnx.state(model)` has exactly the structure of the stacked tree.

    Args:
      config: sizes and constants.
      tree: the stacked tree, of numpy or jax arrays; see README.md in this folder.
      dtype: cast the weights to this; None keeps their dtypes. Activations have the dtype of the embeddings.

    Raises:
      ValueError: an array of the tree does not have the shape that the config says.

    >>> from dppa_jax.model import init_tree
    >>> config = DecoderConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    >>> model = Decoder(config, init_tree(config, jax.random.key(0)))
    >>> model(jnp.array([[1, 5, 7]])).shape
    (1, 3, 32)
    """

    def __init__(self, config: DecoderConfig, tree: Tree, *, dtype: Any = None):
        check_shapes(config, tree)
        self.config = config
        for name, part in tree.items():
            parameters = jax.tree.map(lambda array: nnx.Param(jnp.asarray(array, dtype)), part)
            setattr(self, name, nnx.data(parameters))

    @property
    def tree(self) -> Tree:
        """The stacked tree of plain arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(
        self,
        tokens: Tokens,
        positions: Positions | None = None,
        cache: Cache | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache]:
        """Compute logits; see `forward` for the arguments."""
        return forward(self.config, self.tree, tokens, positions, cache, remat=remat)


@partial(jax.jit, static_argnames=("config", "remat"))
def forward(
    config: DecoderConfig,
    tree: Tree,
    tokens: Tokens,
    positions: Positions | None = None,
    cache: Cache | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], Cache]:
    """Compute the logits of every token.

    A token sees the tokens of its own sequence from position 0 up to itself. So positions are all that must be said
    about padding: padding to the right of a text needs no care, padding to the left has negative positions, and
    sequences that are packed into one row each begin at 0.

    Under `jax.default_matmul_precision("highest")`, float32 logits are as exact as those of transformers: accelerators
    do not round the operands, and on CPUs sums are kept short (XLA's long sums are what loses digits there). This is
    slower.

    Args:
      config: sizes and constants.
      tree: the stacked tree.
      tokens: ids, (B, T).
      positions: of the tokens, (B, T) or (1, T); by default 0, 1, 2, … or, with a cache, the slots that follow.
      cache: keys and values of earlier tokens. With the rope types `dynamic` and `longrope` these are of the length at
        which they were computed, as in transformers.
      remat: recompute each layer in the backward pass; this saves memory and costs one more forward pass.

    Returns:
      Logits (B, T, V) in float32; with a cache, the pair of logits and the cache with these tokens added.
    """
    hidden, updated = hidden_states(config, tree, tokens, positions, cache, remat=remat)
    logits = unembed(config, tree, hidden)
    return logits if cache is None else (logits, updated)


def hidden_states(
    config: DecoderConfig,
    tree: Tree,
    tokens: Tokens,
    positions: Positions | None = None,
    cache: Cache | None = None,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Return the hidden states after the last norm, and the cache. Arguments are those of `forward`."""
    start = 0 if cache is None else cache.length
    slots = start + jnp.arange(tokens.shape[1])[None]
    positions = slots if positions is None else positions
    context = context_of(config, slots, positions, None if cache is None else cache.keys.shape[3])

    def step(carry, scanned):
        index, layer, kind = scanned
        return decoder_layer(config, layer, *carry, context.of(kind), index), None

    step = jax.checkpoint(step) if remat else step
    carry = (embed(config, jnp.asarray(tree["embed_tokens"])[tokens]), cache)
    layers = jnp.arange(config.num_hidden_layers), tree["layers"], layer_kinds(config)
    (hidden, cache), _ = jax.lax.scan(step, carry, layers)
    if cache is not None:
        cache = cache._replace(length=start + tokens.shape[1])
    return norm(config, tree, "norm", hidden), cache


def embed(config: DecoderConfig, rows: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Compute the first hidden states from the tokens' rows of the embeddings."""
    if config.scaled_embeddings:
        rows = rows * jnp.asarray(config.hidden_size**0.5, rows.dtype)  # Gemma is trained with the rounded factor
    return multiplied(rows, config.embedding_multiplier)


def unembed(config: DecoderConfig, tree: Tree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Compute logits in float32 from hidden states: by `lm_head`, or by the tied embeddings if the tree has no head."""
    weight = tree["lm_head"] if "lm_head" in tree else tree["embed_tokens"]
    logits = project(hidden, weight, jnp.float32)
    logits = logits if config.logits_scaling == 1 else logits / config.logits_scaling
    return capped(logits, config.logit_cap)


def decoder_layer(
    config: DecoderConfig,
    layer: Tree,
    hidden: Float[Array, "B T D"],
    cache: Cache | None,
    context: LayerContext,
    index: Int[Array, ""] | int = 0,
    record: Record | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Compute one decoder layer.

    Args:
      config: sizes and constants.
      layer: `tree["layers"]` without its layer axis.
      hidden: what the layer before has computed.
      cache: the cache of all layers; layer `index` of it is updated. None attends to these tokens only.
      context: of this layer; see `context_of`.
      index: the number of the layer.
      record: called with the path, such as "mlp.up_proj", and the inputs of every linear that is computed, and None;
        for the experts of a mixture once, with "mlp.experts", their inputs, and 1 where one is picked, (B, T, E).
    """
    norms = config.norms
    normed = norm(config, layer, norms.before_attention, hidden)
    attended, cache = attention(config, layer["self_attn"], normed, cache, context, index, record)
    attended = norm(config, layer, norms.after_attention, attended)
    hidden = hidden + multiplied(attended, config.residual_multiplier)
    normed = norm(config, layer, norms.before_mlp, hidden)
    computed = (experts if config.num_experts else mlp)(config, layer["mlp"], normed, record)
    computed = norm(config, layer, norms.after_mlp, computed)
    return hidden + multiplied(computed, config.residual_multiplier), cache


def attention(
    config: DecoderConfig,
    weights: Tree,
    hidden: Float[Array, "B T D"],
    cache: Cache | None,
    context: LayerContext,
    index: Int[Array, ""] | int,
    record: Record | None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Compute grouped-query attention: the G query heads of a group share one key/value head, which is not copied."""
    batch, time, _ = hidden.shape

    def heads(name, norm_name=None):  # heads before time, so that the products below transpose nothing, either way
        split = linear(weights, f"self_attn.{name}", hidden, record)
        if config.query_key_norm == "projection":
            split = norm(config, weights, norm_name, split)
        split = split.reshape(batch, time, -1, config.head_dim)
        if config.query_key_norm == "head":
            split = norm(config, weights, norm_name, split)
        return split.swapaxes(1, 2)

    query, keys = (rotate(heads(f"{name}_proj", f"{name}_norm"), context.rope) for name in "qk")
    values = heads("v_proj")
    if cache is not None:
        at = (index, 0, 0, cache.length, 0)
        cache = cache._replace(
            keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], at),
            values=jax.lax.dynamic_update_slice(cache.values, values[None], at),
        )
        keys, values = cache.keys[index], cache.values[index]
    query = query.reshape(batch, config.num_key_value_heads, -1, time, config.head_dim)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, keys, preferred_element_type=jnp.float32)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(context.visible[:, None, None], capped(scores * scale, config.attention_cap), lowest)
    shares = jax.nn.softmax(scores, axis=-1).astype(hidden.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", shares, values).reshape(query.shape[0], -1, time, config.head_dim)
    mixed = mixed.swapaxes(1, 2).reshape(batch, time, -1)
    return linear(weights, "self_attn.o_proj", mixed, record), cache


def mlp(
    config: DecoderConfig, weights: Tree, hidden: Float[Array, "B T D"], record: Record | None = None
) -> Float[Array, "B T D"]:
    """Compute the gated block: down_proj(activation(gate_proj(x)) · up_proj(x))."""
    return linear(weights, "mlp.down_proj", mlp_inner(config, weights, hidden, record), record)


def mlp_inner(
    config: DecoderConfig, weights: Tree, hidden: Float[Array, "B T D"], record: Record | None = None
) -> Float[Array, "B T F"]:
    """Compute the input of `down_proj`: activation(gate_proj(x)) · up_proj(x)."""
    gate = ACTIVATIONS[config.activation](linear(weights, "mlp.gate_proj", hidden, record))
    return gate * linear(weights, "mlp.up_proj", hidden, record)


def experts(
    config: DecoderConfig, weights: Tree, hidden: Float[Array, "B T D"], record: Record | None = None
) -> Float[Array, "B T D"]:
    """Compute a mixture of gated blocks: each token takes the sum, by its shares, of those that the router picks.

    All are computed for all tokens, one after another. The router's softmax is over all experts, in float32.
    """
    routed = linear(weights, "mlp.gate", hidden, record)
    top, picked = jax.lax.top_k(jax.nn.softmax(routed.astype(jnp.float32)), config.num_experts_per_tok)
    top = top / top.sum(axis=-1, keepdims=True) if config.norm_topk_prob else top
    chosen = jax.nn.one_hot(picked, config.num_experts, dtype=jnp.float32)
    if record:
        record("mlp.experts", hidden, chosen.sum(axis=-2))

    def add(total, expert):
        own, share = expert
        return total + mlp(config, own, hidden).astype(jnp.float32) * share[..., None], None

    shares = jnp.einsum("btk,btke->ebt", top, chosen)
    nothing = jnp.zeros(hidden.shape, jnp.float32)
    total, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), nothing, (weights["experts"], shares))
    return total.astype(hidden.dtype)


def linear(
    weights: Tree, path: str, hidden: Float[Array, "*B in"], record: Record | None = None
) -> Float[Array, "*B out"]:
    """Compute a linear with its bias and its factors of low rank, if the tree has them.

    `path` is its place in a layer, such as "mlp.up_proj".
    """
    if record:
        record(path, hidden, None)
    name = path.rpartition(".")[2]
    biased = f"{name}_bias" in weights
    computed = project(hidden, weights[name], jnp.float32 if biased else None)
    if f"{name}_lora_a" in weights:  # of an adapter that is trained; see finetune/lora.py
        inner = project(hidden, weights[f"{name}_lora_a"])
        computed = computed + project(inner, weights[f"{name}_lora_b"], computed.dtype)
    return (computed + weights[f"{name}_bias"]).astype(hidden.dtype) if biased else computed


def project(hidden: Float[Array, "*B in"], weight: Float[Array, "out in"], dtype: Any = None) -> Float[Array, "*B out"]:
    """Compute hidden · weightᵀ, in `dtype` (default: that of the operands)."""
    # The gradient of the weight contracts batch and time; flattened into one axis, they need no transpose.
    flat = hidden.reshape(-1, hidden.shape[-1])
    width = EXACT_WIDTH if exact_sums_wanted(flat.dtype) else flat.shape[1]
    summands = [
        jnp.einsum("ni,oi->no", flat[:, at : at + width], weight[:, at : at + width], preferred_element_type=dtype)
        for at in range(0, flat.shape[1], width)
    ]
    return sum(summands[1:], start=summands[0]).reshape(*hidden.shape[:-1], -1)


def exact_sums_wanted(dtype: Any) -> bool:
    """Return whether products must add up in short sums: float32 on a CPU, under the highest matmul precision."""
    highest = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return highest and dtype == jnp.float32 and jax.default_backend() == "cpu"


def norm(config: DecoderConfig, weights: Tree, name: str | None, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Compute the norm of this name in `weights`; without a name nothing changes."""
    if name is None:
        return hidden
    weight = weights[name]
    return rms_norm(hidden, 1 + weight.astype(jnp.float32) if config.unit_norms else weight, config.rms_norm_eps)


def rms_norm(hidden: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Compute hidden / sqrt(mean(hidden²) + eps) · weight, in float32 whatever the dtype of the activations."""
    wide = hidden.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * weight).astype(hidden.dtype)


def multiplied(hidden: Float[Array, "*B"], factor: float) -> Float[Array, "*B"]:
    """Multiply by a constant, in float32; 1 adds no operation."""
    return hidden if factor == 1 else (hidden.astype(jnp.float32) * factor).astype(hidden.dtype)


def capped(values: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """Compute cap · tanh(values / cap), which lies between −cap and cap; None adds no operation."""
    return values if cap is None else cap * jnp.tanh(values / cap)
