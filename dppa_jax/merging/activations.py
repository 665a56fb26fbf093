"""Norms of every linear's inputs on calibration text, for calibrated scores; one decoder layer in memory at a time."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import Role, tree_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.checkpoint.tokenizer import encode, load_tokenizer
from dppa_jax.config.run import JobConfig
from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.decoder import attention, decoder_layer, mlp_inner, rms_norm, rotary, visibility
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
    config = LlamaConfig.from_hf(model.config)
    norms: dict[str, np.ndarray] = {}
    [embeddings] = (spec.name for spec in model.specs.values() if spec.kind == "model.embed_tokens")
    hidden = jnp.asarray(model.read(embeddings)[tokens], jnp.float32)
    step = jax.jit(partial(_layer, config))
    for layer in range(config.num_hidden_layers):
        specs = [spec for spec in model.specs.values() if spec.layer == layer]
        weights = tree_of(specs, lambda own: jnp.asarray(model.read(own[0].name), jnp.float32))
        hidden, of_kind = step(weights["layers"], hidden)
        norms |= {spec.name: np.asarray(of_kind[spec.kind]) for spec in specs if spec.role is Role.LINEAR}
    return norms


def _layer(
    config: LlamaConfig, weights: dict, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, " columns"]]]:
    """Return a decoder layer's output and, by the kind of linear, the norms of its inputs."""
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
    inputs = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), normed)
    inputs |= {"self_attn.o_proj": mixed, "mlp.gate_proj": normed_again, "mlp.up_proj": normed_again}
    inputs["mlp.down_proj"] = inner
    norms = {kind: jnp.sqrt((x * x).sum(axis=(0, 1))) for kind, x in inputs.items()}
    return decoder_layer(config, weights, hidden, None, rope, visible)[0], norms


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
