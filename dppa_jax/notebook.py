"""Load, merge and save models in memory, for notebooks and other tools."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dppa_jax.checkpoint import save_tree
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.merging.in_memory import merged_model
from dppa_jax.merging.merger import Layout, Merger
from dppa_jax.merging.tensors import config_of, merge_state_dicts, merge_tensors
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.where import load

__all__ = ["Model", "load", "merge", "merge_state_dicts", "merge_tensors", "save"]


def merge(
    base: Model,
    experts: Mapping[str, Model],
    method: str,
    *,
    density: float | None = None,
    mesh: str = "",
    **options: Any,
) -> Model:
    """Merge models in memory; the result has the bits that the command line would write.

    Args:
      base: the model that the experts were fine-tuned from.
      experts: the fine-tuned models by name, in the order in which their deltas are added.
      method: a preset, a key of `dppa_jax.methods`.
      density: the share of each delta that is kept, in place of rate = 1 − density.
      mesh: devices as --mesh takes them, "layer=2,row=4"; by default, all local devices are on the row axis.
      **options: fields of `MergeConfig`: rate, factors, coefficients, allocate, seed, ...

    Returns:
      The merged model. Its `outcome` holds the rates, thresholds, densities and weights of every linear.

    Raises:
      ValueError: an option is unknown or out of bounds, or the models do not fit together.

    >>> import dppa_jax, numpy as np
    >>> from dppa_jax.model import DecoderConfig, init_tree
    >>> config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    ...           "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...           "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": True}
    >>> import jax
    >>> base, expert = (dppa_jax.Model(config, jax.tree.map(np.asarray, init_tree(
    ...     DecoderConfig.from_hf(config), jax.random.key(k), "float32"))) for k in (0, 1))
    >>> merged = dppa_jax.merge(base, {"math": expert}, "magnitude", density=0.1, mesh="layer=1,row=1")
    >>> kept = merged.tensors["model.layers.0.mlp.up_proj.weight"] != base.tensors["model.layers.0.mlp.up_proj.weight"]
    >>> int(kept.sum()), kept.size
    (38, 384)
    """
    config = config_of(tuple(experts), method, density, options)
    return merged_model(Merger(base, experts, config, make_mesh(mesh), Layout(), quiet=True), base.directory)


def save(model: Model, directory: str | Path, overwrite: bool = False) -> None:
    """Write a model as a Hugging Face directory, with the tokenizer files of the directory that it came from.

    Raises:
      CheckpointError: the directory is not empty; with `overwrite`, a model that is there is replaced.
    """
    save_tree(directory, model.tree, model.config, model.directory, overwrite=overwrite)
