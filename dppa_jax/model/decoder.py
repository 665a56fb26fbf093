"""The LLaMA decoder on the stacked tree: a pure forward pass, and a Flax module that holds the tree as parameters.

Every linear stays in Hugging Face's (out, in) layout, so a checkpoint is read without a transpose. The array of a
linear holds all layers on its first axis, so one `lax.scan` runs the layers.

Axis names: B batch, T time (tokens of this call), S key slots, D hidden, F intermediate, V vocabulary, L layers,
K key/value heads, G query heads per key/value head, H head dimension.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dppa_jax.model.config import LlamaConfig

Tree = dict[str, Any]  # the stacked tree, see `abstract_tree`
Tokens = Int[Array | np.ndarray, "B T"]
Positions = Int[Array | np.ndarray, "#B T"]

EXACT_WIDTH = 64  # XLA's CPU products add hundreds of float32 terms in a row; sums of 64 round no more than torch's


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for all layers; `length` slots are filled."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, slots: int, dtype: Any) -> "Cache":
        """Return a cache with room for `slots` tokens of each sequence, none of which is filled."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


class Llama(nnx.Module):
    """The parameters as a Flax module; `nnx.state(model)` has exactly the structure of the stacked tree.

    Args:
      config: sizes and constants.
      tree: the stacked tree, of numpy or jax arrays; see README.md in this folder.
      dtype: cast the weights to this; None keeps their dtypes. Activations have the dtype of the embeddings.

    Raises:
      ValueError: an array of the tree does not have the shape that the config says.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    >>> model = Llama(config, init_tree(config, jax.random.key(0)))
    >>> model(jnp.array([[1, 5, 7]])).shape
    (1, 3, 32)
    """

    def __init__(self, config: LlamaConfig, tree: Tree, *, dtype: Any = None):
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
    config: LlamaConfig,
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
      cache: keys and values of earlier tokens.
      remat: recompute each layer in the backward pass; this saves memory and costs one more forward pass.

    Returns:
      Logits (B, T, V) in float32; with a cache, the pair of logits and the cache with these tokens added.
    """
    hidden, updated = hidden_states(config, tree, tokens, positions, cache, remat=remat)
    logits = unembed(tree, hidden)
    return logits if cache is None else (logits, updated)


def hidden_states(
    config: LlamaConfig,
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
    rope = rotary(config, positions)
    visible = visibility(slots, positions, tokens.shape[1] if cache is None else cache.keys.shape[3])

    def step(carry, indexed_layer):
        index, layer = indexed_layer
        return decoder_layer(config, layer, *carry, rope, visible, index), None

    step = jax.checkpoint(step) if remat else step
    carry = (jnp.asarray(tree["embed_tokens"])[tokens], cache)
    (hidden, cache), _ = jax.lax.scan(step, carry, (jnp.arange(config.num_hidden_layers), tree["layers"]))
    if cache is not None:
        cache = cache._replace(length=start + tokens.shape[1])
    return rms_norm(hidden, tree["norm"], config.rms_norm_eps), cache


def unembed(tree: Tree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Compute logits in float32 from hidden states: by `lm_head`, or by the tied embeddings if the tree has no head."""
    weight = tree["lm_head"] if "lm_head" in tree else tree["embed_tokens"]
    return project(hidden, weight, jnp.float32)


def decoder_layer(
    config: LlamaConfig,
    layer: Tree,
    hidden: Float[Array, "B T D"],
    cache: Cache | None,
    rope: Float[Array, "2 #B 1 T half"],
    visible: Bool[Array, "#B T S"],
    index: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Compute one decoder layer.

    Args:
      config: sizes and constants.
      layer: `tree["layers"]` without its layer axis.
      hidden: what the layer before has computed.
      cache: the cache of all layers; layer `index` of it is updated. None attends to these tokens only.
      rope: see `rotary`.
      visible: see `visibility`.
      index: the number of the layer.
    """
    normed = rms_norm(hidden, layer["input_layernorm"], config.rms_norm_eps)
    attended, cache = attention(config, layer["self_attn"], normed, cache, rope, visible, index)
    hidden = hidden + attended
    normed = rms_norm(hidden, layer["post_attention_layernorm"], config.rms_norm_eps)
    return hidden + mlp(layer["mlp"], normed), cache


def attention(
    config: LlamaConfig,
    weights: Tree,
    hidden: Float[Array, "B T D"],
    cache: Cache | None,
    rope: Float[Array, "2 #B 1 T half"],
    visible: Bool[Array, "#B T S"],
    index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Compute grouped-query attention: the G query heads of a group share one key/value head, which is not copied."""
    batch, time, _ = hidden.shape

    def heads(name):  # heads before time, so that the products below transpose nothing, forward or backward
        split = project(hidden, weights[name]).reshape(batch, time, -1, config.head_dim)
        return split.swapaxes(1, 2)

    query, keys, values = rotate(heads("q_proj"), rope), rotate(heads("k_proj"), rope), heads("v_proj")
    if cache is not None:
        at = (index, 0, 0, cache.length, 0)
        cache = cache._replace(
            keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], at),
            values=jax.lax.dynamic_update_slice(cache.values, values[None], at),
        )
        keys, values = cache.keys[index], cache.values[index]
    query = query.reshape(batch, config.num_key_value_heads, -1, time, config.head_dim)
    scores = jnp.einsum("bkgth,bksh->bkgts", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(hidden.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", shares, values).reshape(query.shape[0], -1, time, config.head_dim)
    return project(mixed.swapaxes(1, 2).reshape(batch, time, -1), weights["o_proj"]), cache


def mlp(weights: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Compute the SwiGLU block: down_proj(silu(gate_proj(x)) · up_proj(x))."""
    return project(mlp_inner(weights, hidden), weights["down_proj"])


def mlp_inner(weights: Tree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """Compute the input of `down_proj`: silu(gate_proj(x)) · up_proj(x)."""
    return jax.nn.silu(project(hidden, weights["gate_proj"])) * project(hidden, weights["up_proj"])


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


def rms_norm(hidden: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Compute hidden / sqrt(mean(hidden²) + eps) · weight, in float32 whatever the dtype of the activations."""
    wide = hidden.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * weight).astype(hidden.dtype)


def visibility(slots: Int[Array, "1 T"], positions: Int[Array, "#B T"], keys: int) -> Bool[Array, "#B T keys"]:
    """Return which key slots each token sees: from the slot of position 0 of its sequence to its own slot."""
    slot = jnp.arange(keys)
    return ((slots - positions)[..., None] <= slot) & (slot <= slots[..., None])


def rotary(config: LlamaConfig, positions: Int[Array, "#B T"]) -> Float[Array, "2 #B 1 T half"]:
    """Return the cosines and sines of the rotary angles, in float32."""
    angles = positions[:, None, :, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(heads: Float[Array, "B N T H"], rope: Float[Array, "2 #B 1 T half"]) -> Float[Array, "B N T H"]:
    """Rotate element i of the first half of each head together with element i of the second half."""
    cos, sin = rope
    first, second = jnp.split(heads, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads.dtype)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Return the radians per position of each pair of elements, (head_dim / 2,) float32, as `rope_scaling` says.

    Source of `llama3`: the reference implementation of Llama 3.1, as in transformers' `modeling_rope_utils`.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: as it was, 0: divided by the factor
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def abstract_tree(config: LlamaConfig, dtype: Any = jnp.float32) -> Tree:
    """Return the stacked tree of a config, as shapes and dtypes without weights."""
    layers, hidden, intermediate = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    tree = {
        "embed_tokens": array(config.vocab_size, hidden),
        "layers": {
            "self_attn": {
                "q_proj": array(layers, queries, hidden),
                "k_proj": array(layers, keys, hidden),
                "v_proj": array(layers, keys, hidden),
                "o_proj": array(layers, hidden, queries),
            },
            "mlp": {
                "gate_proj": array(layers, intermediate, hidden),
                "up_proj": array(layers, intermediate, hidden),
                "down_proj": array(layers, hidden, intermediate),
            },
            "input_layernorm": array(layers, hidden),
            "post_attention_layernorm": array(layers, hidden),
        },
        "norm": array(hidden),
    }
    return tree if config.tie_word_embeddings else {**tree, "lm_head": array(config.vocab_size, hidden)}


@partial(jax.jit, static_argnames=("config", "dtype", "stddev"))
def init_tree(config: LlamaConfig, key: PRNGKeyArray, dtype: Any = jnp.float32, *, stddev: float = 0.02) -> Tree:
    """Draw random weights for pre-training as transformers does: norms are 1, all others normal with `stddev`."""
    leaves, structure = jax.tree.flatten_with_path(abstract_tree(config, dtype))
    # A draw begins with the same numbers however long it is. So all are as long as the longest, and are compiled once.
    longest = max(leaf.size for _, leaf in leaves)
    drawn = lambda key: stddev * jax.random.normal(key, longest, dtype)  # noqa: E731
    draws = jax.lax.map(drawn, jax.random.split(key, len(leaves)))
    arrays = [
        jnp.ones(leaf.shape, dtype) if "norm" in path[-1].key else draw[: leaf.size].reshape(leaf.shape)
        for (path, leaf), draw in zip(leaves, draws, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def check_shapes(config: LlamaConfig, tree: Tree) -> None:
    """Refuse a tree whose arrays do not have the shapes that the config says.

    Raises:
      ValueError: names the first array that does not fit.
    """
    expected, actual = shapes_by_name(abstract_tree(config)), shapes_by_name(tree)
    for name in expected | actual:
        if expected.get(name) != actual.get(name):
            raise ValueError(
                f"{name}: the weights have shape {actual.get(name, '(absent)')}, "
                f"the config calls for {expected.get(name, '(absent)')}; give the config of these weights."
            )


def shapes_by_name(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array by its path, such as "layers.mlp.up_proj"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
