"""Norms of every linear's inputs on calibration text, for calibrated scores; one decoder layer in memory at a time."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import Role, TensorSpec, by_path, tree_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.tokenizer import encode, load_tokenizer
from dppa_jax.config.run import JobConfig
from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.context import LayerKind, context_of, layer_kinds
from dppa_jax.model.decoder import decoder_layer, embed, mlp_inner
from dppa_jax.runtime.reading import MAX_LINES_BYTES, read_text

TOKENS = 512  # of a row; the text is one stream, cut into rows
ROWS = 128  # at most: 65,536 tokens


def calibration_tokens(tokenizer: Path, text: Path) -> Int[np.ndarray, "rows tokens"]:
    """Read a text as rows of equally many tokens, the remainder dropped."""
    (ids,) = encode(load_tokenizer(tokenizer), [read_text(text, MAX_LINES_BYTES)])
    tokens = np.array(ids, np.int32)
    width = min(TOKENS, len(tokens))
    if not width:
        raise ValueError(f"--calibration={text}: no tokens in it.")
    rows = min(ROWS, len(tokens) // width)
    return tokens[: rows * width].reshape(rows, width)


def activation_norms(
    model: Checkpoint, tokens: Int[np.ndarray, "rows tokens"]
) -> dict[str, Float[np.ndarray, " columns"]]:
    """Compute ‖x_j‖₂ over all tokens for every input j of every linear, by the tensors' names.

    Source: Sun et al. 2023.
    """
    config = DecoderConfig.from_hf(model.config)
    norms: dict[str, np.ndarray] = {}
    [embeddings] = (spec.name for spec in model.specs.values() if spec.kind == "model.embed_tokens")
    hidden = embed(config, jnp.asarray(model.read(embeddings)[tokens], jnp.float32))
    step, kinds = jax.jit(partial(_layer, config)), layer_kinds(config)
    for layer in range(config.num_hidden_layers):
        specs = [spec for spec in model.specs.values() if spec.layer == layer]
        weights = tree_of(specs, partial(_array, model))
        kind = jax.tree.map(lambda numbers, layer=layer: jnp.asarray(numbers[layer]), kinds)
        hidden, of_path = step(weights["layers"], kind, hidden)
        for path, group in by_path(spec for spec in specs if spec.role is Role.LINEAR).items():
            each = np.asarray(of_path[".".join(path[1:])]).reshape(len(group), -1)  # one of each expert of a mixture
            norms |= {spec.name: own for spec, own in zip(group, each, strict=True)}
    return norms


def _array(model: Checkpoint, group: Sequence[TensorSpec]) -> Float[Array, "..."]:
    """Read the tensor of a layer at one place of the tree, or stack those of all experts of a mixture."""
    arrays = [jnp.asarray(model.read(spec.name), jnp.float32) for spec in group]
    return arrays[0] if len(arrays) == 1 else jnp.stack(arrays)


def _layer(
    config: DecoderConfig, weights: dict, kind: LayerKind, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "..."]]]:
    """Return a decoder layer's output and, by the path of every linear, the norms of its inputs."""
    norms: dict[str, Array] = {}

    def record(path: str, inputs: Array, picked: Array | None) -> None:
        if picked is None:
            norms[path] = jnp.sqrt((inputs * inputs).sum(axis=(0, 1)))
        else:
            norms.update(_mixture(config, weights["mlp"]["experts"], inputs, picked))

    positions = jnp.arange(hidden.shape[1])[None]
    context = context_of(config, positions, positions).of(kind)
    return decoder_layer(config, weights, hidden, None, context, record=record)[0], norms


def _mixture(
    config: DecoderConfig, experts: dict, hidden: Float[Array, "B T D"], picked: Float[Array, "B T E"]
) -> dict[str, Float[Array, "E columns"]]:
    """Return the norms of every expert's inputs, over the tokens that the router sends to it; one expert at a time."""

    def norms(expert):
        weights, own = expert
        inputs = {"gate_proj": hidden, "up_proj": hidden, "down_proj": mlp_inner(config, weights, hidden)}
        return {f"mlp.experts.{name}": jnp.sqrt(jnp.einsum("bt,btj->j", own, x * x)) for name, x in inputs.items()}

    return jax.lax.map(norms, (experts, jnp.moveaxis(picked, -1, 0)))


def norms_of_experts(job: JobConfig, experts: Mapping[str, Checkpoint]) -> dict[str, dict[str, np.ndarray]]:
    """Compute the activation norms of every expert on --calibration text, by expert and tensor."""
    if not job.calibration:
        raise ValueError(
            f"--score={job.merge.score} needs --calibration=FILE, a text file whose lines the experts read."
        )
    norms = {}
    for name, expert in experts.items():
        norms[name] = activation_norms(expert, calibration_tokens(expert.directory, Path(job.calibration)))
        logging.info("activation norms of %s on %s", name, job.calibration)
    return norms
