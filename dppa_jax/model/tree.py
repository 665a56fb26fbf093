"""The stacked tree of a model: its shapes, random weights for it, and a check."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dppa_jax.model.config import DecoderConfig, EncoderConfig, ModelConfig

Tree = dict[str, Any]  # see `abstract_tree`


def abstract_tree(config: ModelConfig, dtype: Any = jnp.float32) -> Tree:
    """Return the stacked tree of a config, as shapes and dtypes without weights."""
    return (_encoder_tree if isinstance(config, EncoderConfig) else _decoder_tree)(config, dtype)


def _encoder_tree(config: EncoderConfig, dtype: Any) -> Tree:
    """Return the tree of an encoder, with its classification head if it has one."""
    hidden, inner = config.hidden_size, config.intermediate_size

    def arrays(*stacked: int, **shapes: tuple[int, ...]):
        whole = {name: jax.ShapeDtypeStruct((*stacked, *shape), dtype) for name, shape in shapes.items()}
        return whole | {
            f"{name}_bias": jax.ShapeDtypeStruct((*stacked, shape[0]), dtype)
            for name, shape in shapes.items()
            if not name.endswith("embeddings")
        }

    layers = partial(arrays, config.num_hidden_layers)
    square, norm = (hidden, hidden), {"LayerNorm": (hidden,)}
    tree = {
        "embeddings": arrays(
            word_embeddings=(config.vocab_size, hidden),
            position_embeddings=(config.max_position_embeddings, hidden),
            token_type_embeddings=(config.type_vocab_size, hidden),
            **norm,
        ),
        "layers": {
            "attention": {
                "self": layers(query=square, key=square, value=square),
                "output": layers(dense=square, **norm),
            },
            "intermediate": layers(dense=(inner, hidden)),
            "output": layers(dense=(hidden, inner), **norm),
        },
    }
    if not config.labels:
        return tree
    out = (len(config.labels), hidden)
    if config.pooled:
        return {**tree, "pooler": arrays(dense=square), **arrays(classifier=out)}
    return {**tree, "classifier": arrays(dense=square, out_proj=out)}


def _decoder_tree(config: DecoderConfig, dtype: Any) -> Tree:
    """Return the tree of a decoder."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def linears(inner: tuple[int, ...], **shapes):
        each = {name: array(*inner, *shape) for name, shape in shapes.items()}
        return each | {
            f"{name}_bias": array(layers, shape[0]) for name, shape in shapes.items() if name in config.biases
        }

    attention = linears(
        (layers,), q_proj=(queries, hidden), k_proj=(keys, hidden), v_proj=(keys, hidden), o_proj=(hidden, queries)
    )
    if config.query_key_norm:
        widths = {"head": (config.head_dim, config.head_dim), "projection": (queries, keys)}[config.query_key_norm]
        attention |= {name: array(layers, width) for name, width in zip(("q_norm", "k_norm"), widths, strict=True)}
    inner = (layers, config.num_experts) if config.num_experts else (layers,)
    sizes = config.intermediate_size, hidden
    mlp = linears(inner, gate_proj=sizes, up_proj=sizes, down_proj=sizes[::-1])
    if config.num_experts:
        mlp = {"gate": array(layers, config.num_experts, hidden), "experts": mlp}
    norms = {name: array(layers, hidden) for name in config.norms if name}
    tree = {
        "embed_tokens": array(config.vocab_size, hidden),
        "layers": {"self_attn": attention, "mlp": mlp, **norms},
        "norm": array(hidden),
    }
    return tree if config.tie_word_embeddings else {**tree, "lm_head": array(config.vocab_size, hidden)}


@partial(jax.jit, static_argnames=("config", "dtype", "stddev"))
def init_tree(config: ModelConfig, key: PRNGKeyArray, dtype: Any = jnp.float32, *, stddev: float = 0.02) -> Tree:
    """Draw random weights for pre-training as transformers does: norms multiply by 1, biases are 0, all others normal.

    Args:
      config: the shapes.
      key: of the draws.
      dtype: of the weights.
      stddev: their standard deviation.
    """
    leaves, structure = jax.tree.flatten_with_path(abstract_tree(config, dtype))
    # A draw begins with the same numbers however long it is. So all are as long as the longest, and are compiled once.
    longest = max(leaf.size for _, leaf in leaves)
    drawn = lambda key: stddev * jax.random.normal(key, longest, dtype)  # noqa: E731
    draws = jax.lax.map(drawn, jax.random.split(key, len(leaves)))
    arrays = []
    for (path, leaf), draw in zip(leaves, draws, strict=True):
        name = path[-1].key
        if name.endswith("_bias"):
            arrays.append(jnp.zeros(leaf.shape, dtype))
        elif "norm" in name.lower():
            arrays.append(jnp.full(leaf.shape, not getattr(config, "unit_norms", False), dtype))
        else:
            arrays.append(draw[: leaf.size].reshape(leaf.shape))
    return jax.tree.unflatten(structure, arrays)


def check_shapes(config: ModelConfig, tree: Tree) -> None:
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
