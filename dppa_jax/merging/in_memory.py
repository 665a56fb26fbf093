"""Merges whose output stays in memory: for notebooks, and for candidates of a search."""

from pathlib import Path

import numpy as np

from dppa_jax.architecture.specs import stacked_shape, tree_of
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.merger import Merger, output_tensors
from dppa_jax.merging.rest import Rest


def merged_model(merger: Merger, directory: Path | None, rest: Rest | None = None, **overrides) -> Model:
    """What `merger` makes with these factors and coefficients; `directory` has the tokenizer.

    Args:
      rest: what the merge has beside, of which the head of an encoder's expert is taken.
    """
    tree = _empty(merger.base, merger.config)
    merged = Model(dict(merger.base.config), tree, directory, own_specs=merger.base.specs)
    merged.outcome = merger(_Sink(merged), **overrides)
    return with_rest(merged, rest)


def with_rest(model: Model, rest: Rest | None) -> Model:
    """The model with the head that is copied from an expert, and its config; the same model where none is."""
    heads = {name: rest.source.specs[name] for name in rest.names if name in rest.source.specs} if rest else {}
    if not heads:
        return model
    tree = dict(model.tree)
    for name, part in tree_of(heads.values(), lambda group: rest.source.read(group[0].name)).items():
        tree[name] = {**tree.get(name, {}), **part} if isinstance(part, dict) else part
    return Model(dict(rest.config), tree, model.directory, model.outcome, {**model.specs, **heads})


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
