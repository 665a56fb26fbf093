"""Merges whose output stays in memory: for notebooks, and for candidates of a search."""

from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import stacked_shape, tree_of
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Merger, output_tensors


def merged_model(merger: Merger, directory: Path | None, **overrides) -> Model:
    """What `merger` makes with these factors and coefficients; `directory` has the tokenizer."""
    merged = Model(dict(merger.base.config), _empty(merger.base, merger.config), directory)
    merged.outcome = merger(_Sink(merged), **overrides)
    return merged


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
