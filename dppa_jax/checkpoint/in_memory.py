"""A model in memory. A merge reads it like a checkpoint, and an evaluator answers with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dppa_jax.architecture.specs import tensor_specs, tree_of
from dppa_jax.checkpoint.lora import Adapted
from dppa_jax.checkpoint.matched import unwrapped
from dppa_jax.checkpoint.spliced import Spliced
from dppa_jax.checkpoint.stacked import StoredArray, tree_tensor


@dataclass
class Model:
    """A model in memory, a `Source`.

    Attributes:
      config: the content of config.json.
      tree: the stacked arrays; dppa_jax/model/README.md shows the tree.
      directory: where the model came from; its tokenizer files go along when the model is saved.
      outcome: the `merging.merger.Outcome` of the merge that made it; None for a model that was read.
      own_specs: of its tensors, where config.json does not promise them all: an encoder has a head of its own.
    """

    config: dict
    tree: dict
    directory: Path | None = None
    outcome: Any = None
    own_specs: Mapping | None = None

    @cached_property
    def specs(self) -> Mapping:
        """What is known of each tensor, by name."""
        return tensor_specs(self.config) if self.own_specs is None else self.own_specs

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor by its name in a checkpoint, as a view of the tree."""
        return {name: tree_tensor(self.tree, spec) for name, spec in self.specs.items()}

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows start to stop (exclusive) of a tensor into `out`."""
        out[...] = np.atleast_2d(self.tensors[name])[start:stop].reshape(out.shape)


def in_memory(source: Any) -> Model:
    """Read an open checkpoint into memory. It is not closed."""
    tree = tree_of(source.specs.values(), lambda group: StoredArray(source, group).read())
    return Model(source.config, tree, source.directory, own_specs=source.specs)


def for_evaluator(model: Any) -> Path | Model:
    """Return what an evaluator takes of an open checkpoint: its directory or, where none is all of it, the whole."""
    model = unwrapped(model)
    made = isinstance(model, Adapted | Spliced) or getattr(model, "is_dequantised", False)
    return in_memory(model) if made else model.directory
