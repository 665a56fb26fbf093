"""A model made of layers of others, read as one: layers are repeated, left out, and taken from several models in turn.

What comes before the layers is the first model's, what comes after them the last's. config.json is the first model's,
with as many layers as there are; what it says of each layer follows the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.row import Architecture, wrapped
from dppa_jax.architecture.specs import MOST_LAYERS, CheckpointError, TensorSpec, first_linear, tensor_specs
from dppa_jax.architecture.table import known
from dppa_jax.checkpoint.laid_out import rest_of
from dppa_jax.runtime.files import digest

LAYERS = "num_hidden_layers"
BY_NUMBER = {  # keys by which a layer's number says what it computes: where this is set, and no list says it
    "sliding_window_pattern": ("sliding_window", "layer_types"),
    "max_window_layers": ("use_sliding_window", "layer_types"),
    "no_rope_layer_interval": ("no_rope_layer_interval", "no_rope_layers"),
}
LISTS_OF_NUMBERS = ("mlp_only_layers",)  # keys of config.json that list layers by their numbers


@dataclass(frozen=True)
class Run:
    """Layers first to last (exclusive) of a model, which is counted from 0."""

    model: int
    first: int
    last: int


class SplicedHeaders:
    """Runs of layers of several models as one model, by their headers alone, as weights may not be here yet.

    Args:
      models: open checkpoints, or models on the hub.
      runs: of layers, in the order of the output.
      where: the name of the whole in messages.

    Attributes:
      config: the content of config.json.
      specs, tensors: as `Headers` has them.

    Raises:
      CheckpointError: a model has no such layers, or they do not fit each other.
    """

    stated = None
    renamed: Mapping[str, str] = {}  # its names are those of this package

    def __init__(self, models: Sequence[Any], runs: Sequence[Run], where: str):
        self.models, self.runs, self.where = tuple(models), tuple(runs), where
        self.config = spliced_config([model.config for model in models], runs, where)
        self.specs = tensor_specs(self.config)
        row = known(self.config)
        layers = [(run.model, layer) for run in runs for layer in range(run.first, run.last)]
        outside = takewhile(lambda name: self.specs[name].layer is None, self.specs)
        before = dict.fromkeys(outside, runs[0].model)
        self._own = {name: self._source(row, spec, layers, before) for name, spec in self.specs.items()}
        self._check_shapes()
        self.tensors = {name: self.models[model].tensors[own] for name, (model, own) in self._own.items()}
        if lost := [name for model in models for name in rest_of(model)]:
            logging.warning("%s: %d tensors beside the layers are left out, first %s", where, len(lost), lost[0])

    def _source(
        self, row: Architecture, spec: TensorSpec, layers: Sequence[tuple[int, int]], before: Mapping[str, int]
    ) -> tuple[int, str]:
        """Return the model that a tensor is of, and its name there.

        Args:
          layers: the model and the number there of every layer.
          before: the model of each tensor that comes before the layers.
        """
        if spec.layer is None:
            return before.get(spec.name, self.runs[-1].model), spec.name
        model, layer = layers[spec.layer]
        return model, row.layer.format(layer) + spec.name.removeprefix(row.layer.format(spec.layer))

    def _check_shapes(self) -> None:
        """Refuse layers of which a model has not the tensors that the whole needs, in their shapes."""
        for name, (model, own) in self._own.items():
            specs, directory = self.models[model].specs, self.models[model].directory
            if own not in specs:
                raise CheckpointError(
                    f"{self.where}: {own}, which would be {name}, is not in {directory}: are the layers of one "
                    f"architecture, with the same biases and heads (tie_word_embeddings)?"
                )
            if specs[own].shape != self.specs[name].shape:
                raise CheckpointError(
                    f"{self.where}: {own} of {directory} has the shape {specs[own].shape}, and {name} must have "
                    f"{self.specs[name].shape}; take layers of models of one size."
                )

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories that the model is read from."""
        own = (getattr(model, "directories", (model.directory,)) for model in self.models)
        return tuple(dict.fromkeys(directory for each in own for directory in each))

    @property
    def directory(self) -> Path:
        """The directory of the tokenizer: the first model's."""
        return self.models[self.runs[0].model].directory

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the first linear."""
        return self.tensors[first_linear(self.specs).name].dtype

    def fetch(self) -> "Spliced":
        """Fetch the weights from the hub; return the model that can be read."""
        models = [model if hasattr(model, "read_rows") else model.fetch() for model in self.models]
        return Spliced(models, self.runs, self.where)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for model in self.models:
            model.close()


class Spliced(SplicedHeaders):
    """Runs of layers of open models as one model, a `Source` that offers what the models offer.

    Arguments and errors are those of `SplicedHeaders`.
    """

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows start to stop (exclusive) of a tensor into `out`, a contiguous array of the tensor's dtype."""
        model, own = self._own[name]
        self.models[model].read_rows(own, start, stop, out)

    def evict_rows(self, name: str, start: int, stop: int) -> None:
        """Drop rows from the operating system's page cache, where the model can."""
        model, own = self._own[name]
        if hasattr(self.models[model], "evict_rows"):
            self.models[model].evict_rows(own, start, stop)

    def read(self, name: str) -> np.ndarray:
        """Read a whole tensor."""
        model, own = self._own[name]
        return self.models[model].read(own)

    def files(self) -> dict[str, Path]:
        """Return the files of all models, by the number of the model and their name."""
        configs = {f"{i}/config.json": model.directory / "config.json" for i, model in enumerate(self.models)}
        return configs | {f"{i}/{name}": file for i, model in enumerate(self.models) for name, file in _files(model)}

    def fingerprint(self) -> str:
        """Hash samples of the models' files, and which layers are taken."""
        return digest([[model.fingerprint() for model in self.models], self._taken()])

    def content_digest(self) -> str:
        """Hash every byte of the models' weights, and which layers are taken."""
        return digest([[model.content_digest() for model in self.models], self._taken()])

    def _taken(self) -> list[list[int]]:
        return [[run.model, run.first, run.last] for run in self.runs]


def _files(model: Any) -> list[tuple[str, Path]]:
    return list(model.files().items())


def spliced_config(configs: Sequence[Mapping], runs: Sequence[Run], where: str) -> dict:
    """Return the config.json of runs of layers.

    Raises:
      CheckpointError: a model has no such layers, is of no row of the table of architectures, or of another than the
        first; or a layer would compute something else at its new place.
    """
    first = configs[runs[0].model]
    row = known(first)
    if row is None or row.own_heads or wrapped(first) or any(known(config) is not row for config in configs):
        raise CheckpointError(
            f"{where}: layers are taken of decoders of one row of the table of architectures, without images; see "
            f"dppa_jax/architecture/README.md."
        )
    said = [row.said(config) for config in configs]
    for run in runs:
        if not 0 <= run.first < run.last <= said[run.model][LAYERS]:
            raise CheckpointError(
                f"{where}: [{run.first}:{run.last}] are no layers of a model that has {said[run.model][LAYERS]}."
            )
    layers = [(run.model, layer) for run in runs for layer in range(run.first, run.last)]
    if len(layers) > MOST_LAYERS:
        raise CheckpointError(f"{where}: {len(layers)} layers, a model has at most {MOST_LAYERS}.")
    changed = {LAYERS: len(layers), **_lists(said, layers, first)}
    _check_numbers(row, said, layers, changed, where)
    return {**first, **changed}


def _lists(said: Sequence[Mapping], layers: Sequence[tuple[int, int]], first: Mapping) -> dict[str, list]:
    """Return what config.json lists for each layer, for the layers that are taken."""
    changed = {}
    for key, value in first.items():
        if not isinstance(value, list):
            continue
        own = [one.get(key) if isinstance(one.get(key), list) else [] for one in said]
        if key in LISTS_OF_NUMBERS:
            changed[key] = [new for new, (model, layer) in enumerate(layers) if layer in own[model]]
        elif key != "architectures" and all(len(a) == one[LAYERS] for a, one in zip(own, said, strict=True)):
            changed[key] = [own[model][layer] for model, layer in layers]
    return changed


def _check_numbers(
    row: Architecture, said: Sequence[Mapping], layers: Sequence[tuple[int, int]], changed: Mapping, where: str
) -> None:
    """Refuse layers that would compute something else at their new places, as config.json counts layers there."""
    new = {**said[layers[0][0]], **changed}
    counting = [key for key, (where_set, listed) in BY_NUMBER.items() if new.get(where_set) and not new.get(listed)]
    counting = [key for key in counting if new.get(key)]
    for place, (model, layer) in enumerate(layers):
        own = said[model]
        other = [key for key in counting if _phase(key, own.get(key), layer) != _phase(key, new[key], place)]
        if row.sparse and row.sparse(own, layer) != row.sparse(new, place):
            other.append("its mixtures of experts")
        if other:
            raise CheckpointError(
                f"{where}: layer {layer} would become layer {place}, which computes something else by its number "
                f"({other[0]} in config.json); take layers whose new numbers have the same."
            )


def _phase(key: str, number: int | None, layer: int) -> int:
    """Return what a layer's number says under a key: is it past a border, or is it the last one of a period?"""
    if not number:
        return -1
    return int(layer >= number) if key == "max_window_layers" else int((layer + 1) % number == 0)
