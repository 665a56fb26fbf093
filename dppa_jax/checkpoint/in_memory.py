"""A model in memory, as a source of a merge or of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dppa_jax import checkpoint
from dppa_jax.checkpoint import tensor_specs


@dataclass
class Model:
    """A LLaMA in memory: config.json as a dict, and the tree of stacked arrays (README, "The tree")."""

    config: dict
    tree: dict
    directory: Path | None = None  # where it came from; its tokenizer files go along when the model is saved
    outcome: Any = None  # merge.Outcome of the merge that made it; None of a model that was read

    @cached_property
    def specs(self) -> Mapping:
        return tensor_specs(self.config)

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor by its name in a checkpoint, as a view of the tree."""
        return {name: checkpoint.tree_tensor(self.tree, spec) for name, spec in self.specs.items()}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[...] = np.atleast_2d(self.tensors[name])[start:stop].reshape(out.shape)
