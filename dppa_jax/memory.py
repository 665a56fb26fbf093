"""Models in memory, for notebooks and sweeps: load, merge, save."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dppa_jax import checkpoint
from dppa_jax.architecture.specs import stacked_shape, tree_of
from dppa_jax.checkpoint import load_tree, locate, save_tree, tensor_specs
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.merge.merger import Layout, Merger, Outcome, output_tensors
from dppa_jax.runtime.mesh import make_mesh


@dataclass
class Model:
    """A LLaMA in memory: config.json as a dict, and the tree of stacked arrays (README, "The tree")."""

    config: dict
    tree: dict
    directory: Path | None = None  # where it came from; its tokenizer files go along when the model is saved
    outcome: Outcome | None = None  # of the merge that made it

    @cached_property
    def specs(self) -> Mapping:
        return tensor_specs(self.config)

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor by its name in a checkpoint, as a view of the tree."""
        return {name: checkpoint.tree_tensor(self.tree, spec) for name, spec in self.specs.items()}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = np.atleast_2d(self.tensors[name])[start:stop].reshape(out.shape)


def load(where: str | Path, seed: int = 0) -> Model:
    """Read a model: a directory, a hub id, or demo:base, demo:math, demo:finance, demo:law (of a seed)."""
    directory = locate(where, seed)
    return Model(*load_tree(directory), directory)


def merge(base: Model, experts: Mapping[str, Model], method: str = "dppa", *, mesh: str = "", **options) -> Model:
    """Merge in memory, with the arithmetic of the command line, bit for bit.

    Args:
      base: the model that the experts were fine-tuned from.
      experts: by name, in the order in which their deltas are added.
      method: a preset, a key of `dppa_jax.methods`.
      mesh: "layer=2,row=4"; all local devices on the row axis by default.
      **options: fields of `MergeConfig`: rate, factors, coefficients, allocate, seed, ...

    >>> import dppa_jax, numpy as np
    >>> from dppa_jax.model import LlamaConfig, init_tree
    >>> config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    ...           "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    ...           "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": True}
    >>> import jax
    >>> base, expert = (dppa_jax.Model(config, jax.tree.map(np.asarray, init_tree(
    ...     LlamaConfig.from_hf(config), jax.random.key(k), "float32"))) for k in (0, 1))
    >>> merged = dppa_jax.merge(base, {"math": expert}, "magnitude", rate=0.9, mesh="layer=1,row=1")
    >>> kept = merged.tensors["model.layers.0.mlp.up_proj.weight"] != base.tensors["model.layers.0.mlp.up_proj.weight"]
    >>> int(kept.sum()), kept.size
    (38, 384)
    """
    config = MergeConfig(experts=tuple(experts), method=method, **options)
    return merged_model(Merger(base, experts, config, make_mesh(mesh), Layout(), quiet=True), base.directory)


def merged_model(merger: Merger, directory: Path | None, **numbers) -> Model:
    """What `merger` makes with these factors and coefficients; `directory` has the tokenizer."""
    merged = Model(dict(merger.base.config), _empty(merger.base, merger.config), directory)
    merged.outcome = merger(_Sink(merged), **numbers)
    return merged


def save(model: Model, directory: str | Path, overwrite: bool = False) -> None:
    """Write a model as a Hugging Face directory, with the tokenizer of where it came from."""
    save_tree(directory, model.tree, model.config, model.directory, overwrite=overwrite)


class _Sink:
    def __init__(self, model: Model):
        self.tensors = model.tensors

    def write_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        out = self.tensors[name]
        if out.ndim == 1:
            out[:] = rows[0]
        else:
            out[start : start + len(rows)] = rows


def _empty(base: Source, config: MergeConfig) -> dict:
    """A tree of the merge's shapes and dtypes."""
    tensors = output_tensors(base, config)
    return tree_of(base.specs.values(), lambda group: np.empty(stacked_shape(group), tensors[group[0].name][1]))
