"""Norms of every linear's inputs over calibration text, one decoder layer in memory at a time (score "wanda")."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import tree_of
from dppa_jax.checkpoint import LINEARS, Checkpoint
from dppa_jax.config.run import JobConfig
from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.decoder import attention, decoder_layer, mlp_inner, rms_norm, rotary, visibility

TOKENS = 512  # of a row; the text is one stream, cut into rows
ROWS = 128  # at most: 65,536 tokens


def calibration_tokens(tokenizer: Path, text: Path) -> Int[np.ndarray, "rows tokens"]:
    """The text's tokens as rows of equal length, the remainder dropped."""
    from transformers import AutoTokenizer

    tokens = np.array(AutoTokenizer.from_pretrained(tokenizer)(text.read_text())["input_ids"], np.int32)
    width = min(TOKENS, len(tokens))
    if not width:
        raise ValueError(f"--calibration={text}: no tokens in it.")
    rows = min(ROWS, len(tokens) // width)
    return tokens[: rows * width].reshape(rows, width)


def activation_norms(
    model: Checkpoint, tokens: Int[np.ndarray, "rows tokens"]
) -> dict[str, Float[np.ndarray, "layers columns"]]:
    """‖x_j‖₂ over all tokens for every input j of every linear, by the names in LINEARS. Source: Sun et al. 2023."""
    config = LlamaConfig.from_hf(model.config)
    norms: dict[str, list[np.ndarray]] = {name: [] for name in LINEARS}
    hidden = jnp.asarray(model.read("model.embed_tokens.weight")[tokens], jnp.float32)
    step = jax.jit(partial(_layer, config))
    for layer in range(config.num_hidden_layers):
        specs = (spec for spec in model.specs.values() if spec.layer == layer)
        weights = tree_of(specs, lambda own: jnp.asarray(model.read(own[0].name), jnp.float32))
        hidden, found = step(weights["layers"], hidden)
        for name in LINEARS:
            norms[name].append(np.asarray(found[name]))
    return {name: np.stack(rows) for name, rows in norms.items()}


def _layer(
    config: LlamaConfig, weights: dict, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, " columns"]]]:
    """A decoder layer's output and the norms of its linears' inputs."""
    positions = jnp.arange(hidden.shape[1])[None]
    rope, visible = rotary(config, positions), visibility(positions, positions, hidden.shape[1])
    normed = rms_norm(hidden, weights["input_layernorm"], config.rms_norm_eps)
    queries = weights["self_attn"]["q_proj"].shape[0]
    mixed, _ = attention(
        config, {**weights["self_attn"], "o_proj": jnp.eye(queries)}, normed, None, rope, visible, 0
    )  # an identity in place of o_proj leaves its input
    attended = hidden + jnp.einsum("bti,oi->bto", mixed, weights["self_attn"]["o_proj"])
    normed_again = rms_norm(attended, weights["post_attention_layernorm"], config.rms_norm_eps)
    inner = mlp_inner(weights["mlp"], normed_again)
    inputs = (normed, normed, normed, mixed, normed_again, normed_again, inner)
    norms = {name: jnp.sqrt((x * x).sum(axis=(0, 1))) for name, x in zip(LINEARS, inputs, strict=True)}
    return decoder_layer(config, weights, hidden, None, rope, visible)[0], norms


def norms_of_experts(job: JobConfig, experts: Mapping[str, Checkpoint]) -> dict:
    """Per expert and linear, what the score "wanda" weighs columns by."""
    from dppa_jax.merging import activations

    if not job.calibration:
        raise ValueError("--score=wanda needs --calibration=FILE, a text file whose lines the experts read.")
    norms = {}
    for name, expert in experts.items():
        tokens = activations.calibration_tokens(expert.directory, Path(job.calibration))
        norms[name] = activations.activation_norms(expert, tokens)
        logging.info("activation norms of %s on %s", name, job.calibration)
    return norms
