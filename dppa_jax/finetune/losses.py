"""What training makes small: the cross-entropy of learned tokens, that of classes, or the square of an error."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dppa_jax.finetune.data import Rows
from dppa_jax.finetune.labelled import LabelledRows
from dppa_jax.model import classify, forward
from dppa_jax.model.config import ModelConfig

AnyRows = Rows | LabelledRows


def loss_sums(
    config: ModelConfig, tree: dict, rows: AnyRows, *, dtype: str = "float32", remat: bool = False
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the sum of what is made small, and of how many terms it is.

    Args:
      config, tree: the model.
      rows: say what is learned: tokens by a decoder, labels by an encoder.
      dtype: of the forward pass.
      remat: recompute layers in the backward pass.
    """
    tree = jax.tree.map(lambda weight: weight.astype(dtype), tree)
    return (_of_labels if isinstance(rows, LabelledRows) else _of_tokens)(config, tree, rows, remat)


def _of_tokens(config: ModelConfig, tree: dict, rows: Rows, remat: bool) -> tuple[Any, Any]:
    """Add up the cross-entropies, in nats, of the learned tokens.

    A token's cross-entropy is −log p(token | the tokens before it in its example). The first token of a row has none.
    """
    positions = None if rows.positions is None else rows.positions[:, :-1]
    logits = forward(config, tree, rows.tokens[:, :-1], positions, remat=remat)
    surprise = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens[:, 1:])
    learned: Bool[Array, "B T"] = rows.learned[:, 1:]
    return jnp.sum(surprise, where=learned), jnp.sum(learned)


def _of_labels(config: ModelConfig, tree: dict, rows: LabelledRows, remat: bool) -> tuple[Any, Any]:
    """Add up the cross-entropies, in nats, of classes; of a number that is predicted the squared errors."""
    logits, labels = classify(config, tree, rows.tokens, rows.text, rows.types, remat=remat), rows.labels[:, 0]
    if len(config.labels) == 1:
        each = jnp.square(logits[:, 0] - labels)
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))
    counted: Bool[Array, " B"] = rows.counted[:, 0]
    return jnp.sum(each, where=counted), jnp.sum(counted)
